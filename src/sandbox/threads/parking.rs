//! Where the threads of a group wait in the host, and how all of them are woken when the group is stopped.
//!
//! A thread that waits for a change of the shared memory notes the address, then looks whether the group is stopped, and
//! then waits. Whoever stops the group sets that first and then wakes those who wait at noted addresses, again and again
//! until all threads have left: one that looked before the flag was set, and waits a moment later, is found by the next
//! round.

#[cfg(not(test))]
use std::sync::{
    Condvar, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};
use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

#[cfg(test)]
use shuttle::sync::{
    Condvar, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

/// The group was stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stopped;

/// No address.
const NOWHERE: u64 = u64::MAX;

/// One thread's place, on a cache line of its own.
#[repr(align(64))]
struct Place(AtomicU64);

/// The places of all threads of a group.
pub(super) struct Parking {
    stopped: AtomicBool,
    places: Box<[Place]>,
    sleeping: Mutex<()>,
    woken: Condvar,
}

impl Parking {
    /// Room for so many threads at once.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            stopped: AtomicBool::new(false),
            places: (0..threads).map(|_| Place(AtomicU64::new(NOWHERE))).collect(),
            sleeping: Mutex::new(()),
            woken: Condvar::new(),
        }
    }

    /// Whether the group is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Waits at an address of the shared memory by `wait`, which [`Parking::stop`] ends.
    ///
    /// # Errors
    /// When the group is stopped.
    pub(super) fn wait_at<T>(&self, place: usize, address: u64, wait: impl FnOnce() -> T) -> Result<T, Stopped> {
        let place = &self.places[place].0;
        place.store(address, SeqCst);
        let waited = (!self.is_stopped()).then(wait);
        place.store(NOWHERE, SeqCst);
        match waited {
            Some(waited) if !self.is_stopped() => Ok(waited),
            _ => Err(Stopped),
        }
    }

    /// Sleeps until then, or for ever.
    ///
    /// # Errors
    /// When the group is stopped.
    pub(super) fn sleep(&self, until: Option<Instant>) -> Result<(), Stopped> {
        let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.is_stopped() {
                return Err(Stopped);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            sleeping = match left {
                Some(Duration::ZERO) => return Ok(()),
                Some(left) => self.woken.wait_timeout(sleeping, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.woken.wait(sleeping).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Stops the group: nobody who comes from now on waits, and who sleeps is woken.
    pub(super) fn stop(&self) {
        let _sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        self.stopped.store(true, SeqCst);
        self.woken.notify_all();
    }

    /// The addresses at which somebody waits, or is about to.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> {
        self.places.iter().map(|place| place.0.load(SeqCst)).filter(|address| *address != NOWHERE)
    }
}

/// The end of waiting in a model. The engine's parking spot stands there as what it is: under one lock it looks whether the
/// value is as expected, and whoever wakes takes the same lock.
#[cfg(test)]
mod tests {
    use shuttle::{
        sync::{Arc, atomic::AtomicUsize},
        thread,
    };

    use super::*;

    /// Waits for a change that never comes, like `memory.atomic.wait32` with the value that is there.
    #[derive(Default)]
    struct Spot {
        waiting: Mutex<u32>,
        woken: Condvar,
    }

    impl Spot {
        fn wait(&self) {
            let mut waiting = self.waiting.lock().expect("no panic");
            *waiting += 1;
            let ticket = *waiting;
            while *waiting >= ticket {
                waiting = self.woken.wait(waiting).expect("no panic");
            }
        }

        fn notify(&self) {
            *self.waiting.lock().expect("no panic") = 0;
            self.woken.notify_all();
        }
    }

    #[test]
    fn whoever_waits_or_is_about_to_is_found_by_some_round() {
        let model = || {
            let (parking, spot) = (Arc::new(Parking::new(3)), Arc::new(Spot::default()));
            let left = Arc::new(AtomicUsize::new(0));
            let waiters: Vec<_> = (0..3)
                .map(|place| {
                    let (parking, spot, left) = (parking.clone(), spot.clone(), left.clone());
                    thread::spawn(move || {
                        // the guest waits again and again; only a stop gets it out
                        while parking.wait_at(place, 8, || spot.wait()).is_ok() {}
                        left.fetch_add(1, SeqCst);
                    })
                })
                .collect();
            parking.stop();
            while left.load(SeqCst) < 3 {
                for address in parking.addresses() {
                    assert_eq!(address, 8);
                    spot.notify();
                }
                thread::yield_now();
            }
            for waiter in waiters {
                waiter.join().expect("no panic");
            }
            assert_eq!(parking.addresses().count(), 0);
        };
        shuttle::check_random(model, 2_000);
        shuttle::check_pct(model, 1_000, 3);
    }

    #[test]
    fn sleepers_are_woken_by_the_stop_and_stay_awake_after() {
        let model = || {
            let parking = Arc::new(Parking::new(1));
            let sleepers: Vec<_> = (0..2)
                .map(|_| {
                    let parking = parking.clone();
                    thread::spawn(move || parking.sleep(None))
                })
                .collect();
            parking.stop();
            for sleeper in sleepers {
                assert_eq!(sleeper.join().expect("no panic"), Err(Stopped));
            }
            assert_eq!(parking.sleep(None), Err(Stopped));
            assert_eq!(parking.wait_at(0, 8, || unreachable!("it would wait for ever")), Err::<(), _>(Stopped));
        };
        shuttle::check_random(model, 2_000);
        shuttle::check_pct(model, 1_000, 3);
    }
}
