//! How many requests run at once, and how many wait for their turn.

use std::{cell::Cell, rc::Rc, sync::Arc};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// A worker's places.
pub(super) struct Gate {
    places: Arc<Semaphore>,
    running: Rc<Cell<u32>>,
    waiting: Cell<u32>,
    queue: u32,
    ended: Rc<Notify>,
}

/// A place among those that run, given back when it is dropped.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    running: Rc<Cell<u32>>,
    ended: Rc<Notify>,
}

/// As many run and wait as may.
#[derive(Debug)]
pub(super) struct Full;

impl Gate {
    /// So many places, and room for so many that wait; `ended` is notified when none runs any more.
    pub(super) fn new(concurrency: usize, queue: u32, ended: Rc<Notify>) -> Self {
        let places = Arc::new(Semaphore::new(concurrency));
        Self { places, running: Rc::default(), waiting: Cell::new(0), queue, ended }
    }

    /// Waits for a place. Cancel-safe.
    pub(super) async fn enter(&self) -> Result<Place, Full> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Ok(self.place(permit));
        }
        if self.waiting.get() >= self.queue {
            return Err(Full);
        }
        self.waiting.set(self.waiting.get() + 1);
        let _waits = Waits(&self.waiting);
        let permit = self.places.clone().acquire_owned().await.map_err(|_| Full)?;
        Ok(self.place(permit))
    }

    /// How many run.
    pub(super) fn running(&self) -> u32 {
        self.running.get()
    }

    fn place(&self, permit: OwnedSemaphorePermit) -> Place {
        self.running.set(self.running.get() + 1);
        Place { _permit: permit, running: self.running.clone(), ended: self.ended.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.running.set(self.running.get() - 1);
        if self.running.get() == 0 {
            self.ended.notify_waiters();
        }
    }
}

/// One that waits, or has gone.
struct Waits<'a>(&'a Cell<u32>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn some_run_some_wait_and_the_rest_is_refused() {
        let gate = Gate::new(1, 1, Rc::default());
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(first)) = pin!(gate.enter()).poll(&mut cx) else { panic!("a free place") };
        {
            let mut second = Box::pin(gate.enter());
            assert!(second.as_mut().poll(&mut cx).is_pending());
            assert!(matches!(pin!(gate.enter()).poll(&mut cx), Poll::Ready(Err(Full))));
            // whoever gives up waiting makes room
        }
        let mut third = pin!(gate.enter());
        assert!(third.as_mut().poll(&mut cx).is_pending());
        assert_eq!(gate.running(), 1);
        drop(first);
        assert!(matches!(third.poll(&mut cx), Poll::Ready(Ok(_))));
        assert_eq!(gate.running(), 0, "and it is given back");
    }
}
