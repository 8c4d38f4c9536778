//! Which worker gets which task, and what becomes of the tasks of a worker that died. Pure: the clock is handed in.
//!
//! A worker takes its tasks in the order in which they were sent, `concurrency` at a time. While it works, a few more
//! may lie in its socket, so that it never waits for the primary; but only as many as are done in a few milliseconds,
//! so that none waits behind a slow one for long while another worker is idle.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{event::WorkerId, message::Message};

/// The work that may lie ahead of a worker, by how long its last tasks took.
const AHEAD: Duration = Duration::from_millis(5);

/// The most tasks and bytes that may lie ahead of it however short they are.
const AHEAD_TASKS: usize = 128;
const AHEAD_BYTES: usize = 4 << 20;

/// A task on its way to a reply.
#[derive(Debug)]
pub(crate) struct Task<T> {
    /// Whose it is.
    pub(crate) ticket: T,
    /// What is asked.
    pub(crate) message: Message,
    /// How often a worker has begun it.
    pub(crate) attempts: u32,
}

/// The tasks of a pool.
#[derive(Debug)]
pub(crate) struct Dispatch<T> {
    waiting: VecDeque<Task<T>>,
    waiting_bytes: usize,
    lanes: Vec<Lane<T>>,
    concurrency: usize,
}

/// One worker's share.
#[derive(Debug)]
struct Lane<T> {
    open: bool,
    /// It is being ended for its oldest task, whose time is no longer of interest.
    ending: bool,
    sent: VecDeque<(u64, Task<T>)>,
    sent_bytes: usize,
    next_id: u64,
    /// Since when its oldest task is at work.
    head_since: Instant,
    /// How long its tasks take, lately.
    pace: Duration,
}

/// The tasks of a worker that is gone.
#[derive(Debug)]
pub(crate) struct Lost<T> {
    /// Those that it had begun, and that are tried again.
    pub(crate) retried: usize,
    /// Those that it had begun, and that are not.
    pub(crate) failed: Vec<Task<T>>,
}

impl<T> Dispatch<T> {
    /// For `workers` workers, each of which handles `concurrency` tasks at once.
    pub(crate) fn new(workers: u32, concurrency: u32, now: Instant) -> Self {
        let lane = || Lane {
            open: false,
            ending: false,
            sent: VecDeque::new(),
            sent_bytes: 0,
            next_id: 1,
            head_since: now,
            pace: AHEAD,
        };
        Self {
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            lanes: (0..workers).map(|_| lane()).collect(),
            concurrency: concurrency as usize,
        }
    }

    /// Takes a task.
    pub(crate) fn submit(&mut self, ticket: T, message: Message) {
        self.waiting_bytes += message.as_str().len();
        self.waiting.push_back(Task { ticket, message, attempts: 0 });
    }

    /// How many tasks and bytes wait for a worker.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting_bytes)
    }

    /// Whether there is nothing left to answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.lanes.iter().all(|lane| lane.sent.is_empty())
    }

    /// A worker takes tasks from now on; it knows of none yet.
    pub(crate) fn open(&mut self, worker: WorkerId) {
        let lane = &mut self.lanes[worker as usize - 1];
        debug_assert!(lane.sent.is_empty());
        (lane.open, lane.ending, lane.next_id, lane.pace) = (true, false, 1, AHEAD);
    }

    /// A worker is being ended: it gets no more tasks, and its deadline has been seen to.
    pub(crate) fn close(&mut self, worker: WorkerId) {
        let lane = &mut self.lanes[worker as usize - 1];
        (lane.open, lane.ending) = (false, true);
    }

    /// The next task to send, with its id at that worker: to the one with the fewest.
    pub(crate) fn next(&mut self, now: Instant) -> Option<(WorkerId, u64, &Message)> {
        if self.waiting.is_empty() {
            return None;
        }
        let concurrency = self.concurrency;
        let (at, lane) = self
            .lanes
            .iter_mut()
            .enumerate()
            .filter(|(_, lane)| lane.has_room(concurrency))
            .min_by_key(|(_, lane)| lane.sent.len())?;
        let mut task = self.waiting.pop_front()?;
        let bytes = task.message.as_str().len();
        self.waiting_bytes -= bytes;
        task.attempts += 1;
        if lane.sent.is_empty() {
            lane.head_since = now;
        }
        let id = lane.next_id;
        lane.next_id += 1;
        lane.sent_bytes += bytes;
        lane.sent.push_back((id, task));
        let worker = WorkerId::try_from(at + 1).expect("slots are counted in 32 bits");
        Some((worker, id, &lane.sent.back().expect("just pushed").1.message))
    }

    /// A worker is done with a task; none when it was not given such a task.
    pub(crate) fn answered(&mut self, worker: WorkerId, id: u64, now: Instant) -> Option<Task<T>> {
        let lane = &mut self.lanes[worker as usize - 1];
        let at = lane.sent.iter().position(|(sent, _)| *sent == id)?;
        let (_, task) = lane.sent.remove(at)?;
        lane.sent_bytes -= task.message.as_str().len();
        if at == 0 {
            let took = now.duration_since(lane.head_since);
            // up at once, down slowly: one slow task is a warning, one quick one is not
            lane.pace = if took > lane.pace { took } else { (lane.pace * 7 + took) / 8 };
            lane.head_since = now;
        }
        Some(task)
    }

    /// A worker is gone. Tasks that it had begun (up to `begun`) are tried again while they have been begun at most
    /// `retries` times before; those that it had not go on to another worker and have lost nothing.
    pub(crate) fn lost(&mut self, worker: WorkerId, begun: u64, retries: u32) -> Lost<T> {
        let lane = &mut self.lanes[worker as usize - 1];
        (lane.open, lane.sent_bytes) = (false, 0);
        let mut lost = Lost { retried: 0, failed: vec![] };
        let mut again = VecDeque::new();
        for (id, mut task) in std::mem::take(&mut lane.sent) {
            if id > begun {
                task.attempts -= 1;
                again.push_back(task);
            } else if task.attempts <= retries {
                lost.retried += 1;
                again.push_back(task);
            } else {
                lost.failed.push(task);
            }
        }
        // before all others, in their old order
        for task in again.into_iter().rev() {
            self.waiting_bytes += task.message.as_str().len();
            self.waiting.push_front(task);
        }
        lost
    }

    /// Gives up the tasks that wait for a worker.
    pub(crate) fn cancel_waiting(&mut self) -> impl Iterator<Item = Task<T>> + use<T> {
        self.waiting_bytes = 0;
        std::mem::take(&mut self.waiting).into_iter()
    }

    /// The worker whose oldest task is out of time first, and when.
    pub(crate) fn deadline(&self, timeout: Duration) -> Option<(Instant, WorkerId)> {
        let busy = self.lanes.iter().zip(1..).filter(|(lane, _)| !lane.sent.is_empty() && !lane.ending);
        busy.map(|(lane, worker)| (lane.head_since + timeout, worker)).min()
    }
}

impl<T> Lane<T> {
    fn has_room(&self, concurrency: usize) -> bool {
        if !self.open {
            return false;
        }
        let ahead = AHEAD.as_nanos() / self.pace.as_nanos().max(1);
        let ahead = usize::try_from(ahead).unwrap_or(usize::MAX).min(AHEAD_TASKS);
        self.sent.len() < concurrency + ahead && (self.sent.is_empty() || self.sent_bytes < AHEAD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dispatch(workers: u32, tasks: u32, now: Instant) -> Dispatch<u32> {
        let mut dispatch = Dispatch::new(workers, 1, now);
        for ticket in 1..=tasks {
            dispatch.submit(ticket, Message::null());
        }
        for worker in 1..=workers {
            dispatch.open(worker);
        }
        dispatch
    }

    fn send_all(dispatch: &mut Dispatch<u32>, now: Instant) -> Vec<(WorkerId, u64)> {
        std::iter::from_fn(|| dispatch.next(now).map(|(worker, id, _)| (worker, id))).collect()
    }

    #[test]
    fn the_least_busy_worker_is_next() {
        let now = Instant::now();
        let mut dispatch = dispatch(2, 10, now);
        // nothing is known of the tasks yet: one at work and one ahead each
        assert_eq!(send_all(&mut dispatch, now), [(1, 1), (2, 1), (1, 2), (2, 2)]);
        assert_eq!(dispatch.answered(2, 1, now + AHEAD).expect("known").ticket, 2);
        assert_eq!(send_all(&mut dispatch, now + AHEAD), [(2, 3)]);
    }

    #[test]
    fn slow_tasks_are_not_sent_ahead_and_quick_ones_are() {
        let start = Instant::now();
        let mut slow = dispatch(1, 300, start);
        assert_eq!(send_all(&mut slow, start).len(), 2);
        let later = start + AHEAD * 10;
        slow.answered(1, 1, later);
        slow.answered(1, 2, later + AHEAD * 10);
        assert_eq!(send_all(&mut slow, later).len(), 1, "only the one at work");

        let mut quick = dispatch(1, 3000, start);
        let mut now = start;
        let mut most = 0;
        for id in 1..=200 {
            most = most.max(send_all(&mut quick, now).len() + quick.lanes[0].sent.len());
            now += Duration::from_micros(5);
            quick.answered(1, id, now);
        }
        assert!(quick.lanes[0].sent.len() > 100, "{}", quick.lanes[0].sent.len());
        assert!(quick.lanes[0].sent.len() <= AHEAD_TASKS + 1);
    }

    #[test]
    fn a_closed_worker_gets_nothing() {
        let now = Instant::now();
        let mut dispatch = Dispatch::new(2, 1, now);
        dispatch.submit(1, Message::null());
        assert!(dispatch.next(now).is_none());
        dispatch.open(2);
        assert_eq!(dispatch.next(now).map(|(worker, ..)| worker), Some(2));
    }

    #[test]
    fn only_begun_tasks_pay_for_a_death() {
        let now = Instant::now();
        let mut dispatch = dispatch(1, 5, now);
        assert_eq!(send_all(&mut dispatch, now).len(), 2);
        let lost = dispatch.lost(1, 1, 0);
        assert_eq!(lost.failed.iter().map(|task| task.ticket).collect::<Vec<_>>(), [1]);
        assert_eq!((lost.retried, dispatch.waiting().0), (0, 4));
        dispatch.open(1);
        // in their old order, from id 1 again, and with a clean record
        let (_, id, _) = dispatch.next(now).expect("open");
        let next = dispatch.answered(1, id, now).expect("sent");
        assert_eq!((id, next.ticket, next.attempts), (1, 2, 1));
    }

    #[test]
    fn a_task_is_begun_once_more_than_it_is_retried() {
        let now = Instant::now();
        let mut dispatch = dispatch(1, 1, now);
        for attempt in 1..=3 {
            assert_eq!(send_all(&mut dispatch, now).len(), 1, "attempt {attempt}");
            let lost = dispatch.lost(1, 1, 2);
            assert_eq!((lost.retried, lost.failed.len()), if attempt < 3 { (1, 0) } else { (0, 1) });
            dispatch.open(1);
        }
        assert!(dispatch.is_idle());
    }

    #[test]
    fn an_answer_to_nothing_is_seen() {
        let now = Instant::now();
        let mut dispatch = dispatch(2, 2, now);
        send_all(&mut dispatch, now);
        assert!(dispatch.answered(1, 2, now).is_none());
        assert!(dispatch.answered(1, 1, now).is_some());
        assert!(dispatch.answered(1, 1, now).is_none());
        assert!(!dispatch.is_idle());
        assert!(dispatch.answered(2, 1, now).is_some());
        assert!(dispatch.is_idle());
    }

    #[test]
    fn time_runs_for_the_oldest_task_of_each_worker() {
        let (now, timeout) = (Instant::now(), Duration::from_secs(5));
        let mut dispatch = dispatch(2, 4, now);
        assert_eq!(dispatch.deadline(timeout), None);
        send_all(&mut dispatch, now);
        assert_eq!(dispatch.deadline(timeout), Some((now + timeout, 1)));
        let later = now + Duration::from_secs(3);
        dispatch.answered(1, 1, later);
        assert_eq!(dispatch.deadline(timeout), Some((now + timeout, 2)));
        dispatch.answered(2, 1, later);
        assert_eq!(dispatch.deadline(timeout), Some((later + timeout, 1)), "from when the one before it was done");
        dispatch.close(1);
        assert_eq!(dispatch.deadline(timeout), Some((later + timeout, 2)), "a deadline is seen to once");
    }
}
