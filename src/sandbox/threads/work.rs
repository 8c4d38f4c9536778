//! How messages reach the workers of a group: to one of them, or to the next that is free.
//!
//! Every message that was taken is handed to one worker, once, in the order in which they came; a worker that waits while
//! there is something for it does not exist, at whatever moment it began to wait.

#[cfg(not(test))]
use std::sync::{Condvar, Mutex, MutexGuard};
use std::{collections::VecDeque, sync::PoisonError};

#[cfg(test)]
use shuttle::sync::{Condvar, Mutex, MutexGuard};

/// Bytes of messages that may wait, beside one of any length.
const WAITING_MAX: usize = 4 << 20;

/// What a message takes beside its text.
const MESSAGE_COST: usize = 64;

/// For whom a message to workers is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// For one worker, by its number from 1.
    Worker(u32),
    /// For the next that is free.
    Any,
}

/// A message that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    /// Its number, which comes back with the answer.
    pub(crate) id: u64,
    /// One JSON text, checked where it entered.
    pub(crate) message: String,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotTaken {
    /// As many wait as may.
    Full,
    /// No more are taken, or there is no such worker.
    Closed,
}

/// The messages of a group.
pub(super) struct Work {
    state: Mutex<State>,
    /// Where each worker waits.
    places: Box<[Condvar]>,
    /// Where those wait who have more to say than there is room for.
    room: Condvar,
}

struct State {
    own: Box<[VecDeque<Task>]>,
    any: VecDeque<Task>,
    /// Workers that wait, the one that began last behind the others: it is the one whose core is warm.
    idle: Vec<usize>,
    bytes: usize,
    /// No more are taken.
    closed: bool,
    /// Nothing is handed out.
    stopped: bool,
}

impl Work {
    /// For so many workers.
    pub(super) fn new(workers: usize) -> Self {
        Self {
            state: Mutex::new(State {
                own: (0..workers).map(|_| VecDeque::new()).collect(),
                any: VecDeque::new(),
                idle: vec![],
                bytes: 0,
                // with nobody to hand them to
                closed: workers == 0,
                stopped: false,
            }),
            places: (0..workers).map(|_| Condvar::new()).collect(),
            room: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // whole after every call, whoever panicked
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message. Never waits.
    ///
    /// # Errors
    /// When it is not taken.
    pub(super) fn post(&self, to: To, task: Task) -> Result<(), NotTaken> {
        self.put(&mut self.state(), to, task).map_err(|(reason, _)| reason)
    }

    /// Whether as many wait as may.
    pub(super) fn is_full(&self) -> bool {
        let state = self.state();
        state.bytes > WAITING_MAX && !state.closed && !state.stopped
    }

    /// Takes a message, when there is room.
    ///
    /// # Errors
    /// When it is not taken, because no more are.
    pub(super) fn post_when_there_is_room(&self, to: To, mut task: Task) -> Result<(), NotTaken> {
        let mut state = self.state();
        loop {
            match self.put(&mut state, to, task) {
                Ok(()) => return Ok(()),
                Err((NotTaken::Closed, _)) => return Err(NotTaken::Closed),
                Err((NotTaken::Full, back)) => task = back,
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put(&self, state: &mut State, to: To, task: Task) -> Result<(), (NotTaken, Task)> {
        if state.closed || state.stopped {
            return Err((NotTaken::Closed, task));
        }
        if state.bytes > WAITING_MAX {
            return Err((NotTaken::Full, task));
        }
        let bytes = task.message.len() + MESSAGE_COST;
        let wake = match to {
            To::Any => {
                state.any.push_back(task);
                state.idle.pop()
            }
            To::Worker(id) => {
                let worker = (id as usize).wrapping_sub(1);
                let Some(own) = state.own.get_mut(worker) else { return Err((NotTaken::Closed, task)) };
                own.push_back(task);
                let at = state.idle.iter().position(|idle| *idle == worker);
                at.map(|at| state.idle.remove(at))
            }
        };
        state.bytes += bytes;
        if let Some(worker) = wake {
            self.places[worker].notify_one();
        }
        Ok(())
    }

    /// The next message for a worker, by its index, and whether there is another one; none when there will be none.
    pub(super) fn next(&self, worker: usize) -> Option<(Task, bool)> {
        let mut state = self.state();
        loop {
            if state.stopped {
                return None;
            }
            let was_full = state.bytes > WAITING_MAX;
            if let Some(task) = state.own[worker].pop_front().or_else(|| state.any.pop_front()) {
                state.idle.retain(|idle| *idle != worker);
                state.bytes -= task.message.len() + MESSAGE_COST;
                if was_full && state.bytes <= WAITING_MAX {
                    self.room.notify_all();
                }
                // whoever was woken for what is for all may have found something of its own first
                if !state.any.is_empty()
                    && let Some(other) = state.idle.pop()
                {
                    self.places[other].notify_one();
                }
                let has_more = !(state.own[worker].is_empty() && state.any.is_empty());
                return Some((task, has_more));
            }
            if state.closed {
                return None;
            }
            if !state.idle.contains(&worker) {
                state.idle.push(worker);
            }
            state = self.places[worker].wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes no more. What was taken is still handed out.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.wake_all();
    }

    /// Hands out nothing any more.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.wake_all();
    }

    fn wake_all(&self) {
        self.places.iter().for_each(Condvar::notify_all);
        self.room.notify_all();
    }
}

/// The hand-over in a model: every order in which its threads can run is as good as another, and many are tried.
#[cfg(test)]
mod tests {
    use shuttle::{
        sync::{Arc, mpsc},
        thread,
    };

    use super::*;

    fn task(id: u64) -> Task {
        Task { id, message: "1".into() }
    }

    /// Runs a model in as many orders as are tried.
    fn model(run: impl Fn() + Send + Sync + 'static) {
        let run = std::sync::Arc::new(run);
        let again = run.clone();
        shuttle::check_random(move || run(), 2_000);
        shuttle::check_pct(move || again(), 1_000, 3);
    }

    /// A worker to the end of its work. It tells what it has handled.
    fn worker(work: &Arc<Work>, index: usize, handled: &mpsc::Sender<(usize, u64)>) -> thread::JoinHandle<()> {
        let (work, handled) = (work.clone(), handled.clone());
        thread::spawn(move || {
            while let Some((task, _)) = work.next(index) {
                handled.send((index, task.id)).expect("somebody hears");
            }
        })
    }

    #[test]
    fn every_message_is_handed_to_one_worker_once_and_no_worker_is_left_waiting() {
        model(|| {
            let work = Arc::new(Work::new(3));
            let (handled, heard) = mpsc::channel();
            let workers: Vec<_> = (0..3).map(|index| worker(&work, index, &handled)).collect();
            let other = work.clone();
            let poster = thread::spawn(move || {
                for id in 0..3 {
                    other.post(To::Any, task(id)).expect("there is room");
                }
            });
            for id in [10, 11] {
                work.post(To::Worker(2), task(id)).expect("there is room");
            }
            // all of them, before anybody is woken by the end
            let handled: Vec<_> = (0..5).map(|_| heard.recv().expect("it is handled")).collect();
            let own: Vec<_> = handled.iter().filter(|(_, id)| *id >= 10).collect();
            assert_eq!(own, [&(1, 10), &(1, 11)], "in order, and its own");
            let mut all: Vec<_> = handled.iter().map(|(_, id)| *id).collect();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 10, 11]);
            poster.join().expect("no panic");
            work.close();
            for worker in workers {
                worker.join().expect("no panic");
            }
            assert!(heard.try_recv().is_err(), "nothing twice");
            assert_eq!(work.post(To::Any, task(5)), Err(NotTaken::Closed));
        });
    }

    #[test]
    fn no_message_for_all_waits_behind_one_that_waits_for_it() {
        model(|| {
            let work = Arc::new(Work::new(2));
            let done = Arc::new((Mutex::new(false), Condvar::new()));
            let workers: Vec<_> = (0..2)
                .map(|index| {
                    let (work, done) = (work.clone(), done.clone());
                    thread::spawn(move || {
                        while let Some((task, _)) = work.next(index) {
                            let mut is_done = done.0.lock().expect("no panic");
                            if task.id == 1 {
                                *is_done = true;
                                done.1.notify_all();
                            }
                            while !*is_done {
                                is_done = done.1.wait(is_done).expect("no panic");
                            }
                        }
                    })
                })
                .collect();
            work.post(To::Any, task(1)).expect("there is room");
            work.post(To::Worker(2), task(2)).expect("there is room");
            let mut is_done = done.0.lock().expect("no panic");
            while !*is_done {
                is_done = done.1.wait(is_done).expect("no panic");
            }
            drop(is_done);
            work.close();
            for worker in workers {
                worker.join().expect("no panic");
            }
        });
    }

    #[test]
    fn stopping_ends_workers_and_those_who_wait_for_room() {
        model(|| {
            let work = Arc::new(Work::new(2));
            let (handled, _heard) = mpsc::channel();
            let workers: Vec<_> = (0..2).map(|index| worker(&work, index, &handled)).collect();
            let other = work.clone();
            let long = thread::spawn(move || {
                // each fills it; workers may or may not make room before the stop
                for id in 0..3 {
                    let message = "x".repeat(WAITING_MAX);
                    let _ = other.post_when_there_is_room(To::Worker(1), Task { id, message });
                }
            });
            work.stop();
            long.join().expect("no panic");
            for worker in workers {
                worker.join().expect("no panic");
            }
            assert_eq!(work.next(0), None);
        });
    }

    #[test]
    fn who_waits_for_room_gets_it() {
        model(|| {
            let work = Arc::new(Work::new(1));
            let other = work.clone();
            let poster = thread::spawn(move || {
                for id in 0..3 {
                    let message = "x".repeat(WAITING_MAX);
                    other.post_when_there_is_room(To::Any, Task { id, message }).expect("it is not closed");
                }
                other.close();
            });
            let (handled, heard) = mpsc::channel();
            worker(&work, 0, &handled).join().expect("no panic");
            assert_eq!((0..3).map(|_| heard.recv().expect("it was handled").1).collect::<Vec<_>>(), [0, 1, 2]);
            poster.join().expect("no panic");
        });
    }

    #[test]
    fn what_is_full_or_not_there_is_refused() {
        shuttle::check_random(
            || {
                let work = Work::new(1);
                let message = "x".repeat(WAITING_MAX);
                assert_eq!(work.post(To::Any, Task { id: 0, message }), Ok(()));
                assert_eq!(work.post(To::Worker(1), task(1)), Err(NotTaken::Full));
                let (first, has_more) = work.next(0).expect("there is one");
                assert_eq!((first.id, has_more), (0, false));
                assert_eq!(work.post(To::Worker(1), task(1)), Ok(()));
                for worker in [0, 2, u32::MAX] {
                    assert_eq!(work.post(To::Worker(worker), task(2)), Err(NotTaken::Closed), "worker {worker}");
                }
            },
            1,
        );
    }
}
