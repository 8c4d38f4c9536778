//! The thread that makes children, and that lives as long as this process: the kernel ends a child together with the
//! thread that made it. It also keeps their time, so that a time limit holds whether or not anybody looks at the child.

use std::{
    collections::BTreeMap,
    io,
    process::{Child, Command},
    sync::{
        Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

/// What an alarm does in the end.
pub(super) type Last = Box<dyn FnOnce() + Send>;

/// What an alarm does first: it may want another one, so much later.
type First = Box<dyn FnOnce() -> Option<(Duration, Last)> + Send>;

enum Order {
    Spawn(Box<Command>, Sender<io::Result<Child>>),
    Alarm(u64, Instant, First),
    Cancel(u64),
}

/// The keeper, once there is need for it.
static KEEPER: Mutex<Option<Keeper>> = Mutex::new(None);

struct Keeper {
    orders: Sender<Order>,
    alarms: u64,
}

/// Runs with the keeper, which is started by the first who needs it.
fn with<T>(run: impl FnOnce(&mut Keeper) -> T) -> io::Result<T> {
    // whole after every call, whoever panicked
    let mut keeper = KEEPER.lock().unwrap_or_else(PoisonError::into_inner);
    if keeper.is_none() {
        let (orders, received) = mpsc::channel();
        std::thread::Builder::new().name("wrun-keeper".into()).stack_size(256 << 10).spawn(move || keep(&received))?;
        *keeper = Some(Keeper { orders, alarms: 0 });
    }
    Ok(run(keeper.as_mut().expect("made above")))
}

/// Starts a program.
///
/// # Errors
/// When the system has no room for another process.
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    let (told, spawned) = mpsc::channel();
    with(|keeper| drop(keeper.orders.send(Order::Spawn(Box::new(command), told))))?;
    spawned.recv().map_err(io::Error::other)?
}

/// Calls `first` after this time.
///
/// # Errors
/// When the system has no room for another thread.
pub(super) fn alarm(
    after: Duration,
    first: impl FnOnce() -> Option<(Duration, Last)> + Send + 'static,
) -> io::Result<Alarm> {
    with(|keeper| {
        keeper.alarms += 1;
        // one that lies beyond what the clock can count never rings
        if let Some(due) = Instant::now().checked_add(after) {
            let _ = keeper.orders.send(Order::Alarm(keeper.alarms, due, Box::new(first)));
        }
        Alarm(keeper.alarms)
    })
}

/// An alarm that will ring, unless this is dropped before.
#[derive(Debug)]
pub(super) struct Alarm(u64);

impl Drop for Alarm {
    fn drop(&mut self) {
        let _ = with(|keeper| keeper.orders.send(Order::Cancel(self.0)));
    }
}

fn keep(orders: &Receiver<Order>) {
    let mut alarms: BTreeMap<(Instant, u64), First> = BTreeMap::new();
    loop {
        let now = Instant::now();
        while let Some(next) = alarms.first_entry().filter(|next| next.key().0 <= now) {
            let ((_, id), ring) = next.remove_entry();
            if let Some((later, last)) = ring()
                && let Some(due) = now.checked_add(later)
            {
                alarms.insert(
                    (due, id),
                    Box::new(|| {
                        last();
                        None
                    }),
                );
            }
        }
        let order = match alarms.first_key_value() {
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(((due, _), _)) => orders.recv_timeout(due.saturating_duration_since(now)),
        };
        match order {
            Ok(Order::Spawn(mut command, told)) => {
                let spawned = command.spawn();
                // it holds the child's end of the socket, and whoever asked shall not find that open
                drop(command);
                let _ = told.send(spawned);
            }
            Ok(Order::Alarm(id, due, ring)) => drop(alarms.insert((due, id), ring)),
            Ok(Order::Cancel(id)) => alarms.retain(|(_, other), _| *other != id),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_ring_in_order_unless_they_are_dropped() {
        let (told, heard) = mpsc::channel();
        let ring = |name: &'static str, again: Option<Duration>| {
            let told = told.clone();
            move || {
                let _ = told.send(name);
                again.map(|later| (later, Box::new(move || _ = told.send("again")) as Last))
            }
        };
        let dropped = alarm(Duration::from_millis(5), ring("dropped", None)).expect("a thread");
        let _late = alarm(Duration::from_millis(30), ring("late", None)).expect("a thread");
        let _early = alarm(Duration::from_millis(10), ring("early", Some(Duration::from_millis(1)))).expect("a thread");
        let _never = alarm(Duration::MAX, ring("never", None)).expect("a thread");
        drop(dropped);
        drop(told);
        let heard: Vec<_> = std::iter::from_fn(|| heard.recv_timeout(Duration::from_secs(10)).ok()).take(3).collect();
        assert_eq!(heard, ["early", "again", "late"]);
    }
}
