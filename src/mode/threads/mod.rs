//! Threads of one guest in this very process, over one shared memory, as Node's `worker_threads` has them.
//!
//! The guest is a core module that imports a shared memory, as `--target wasm32-wasip1-threads` makes them: a handler, whose
//! workers get messages, or a command, which makes its threads itself. All of them end together. They are ended by checks that
//! are compiled into the guest, which make tight loops slower; a group that has a process of its own does without, and has
//! the second wall around it: [`Command::workers`](crate::Command::workers), `wrun threads`. The engine's own authors do not
//! count its threads among what they guarantee: a guest that must not be trusted belongs in a process.
//!
//! What ends a group: its main thread (of a command), the first thread that traps, exits or hits a limit, the time limit,
//! [`Threads::terminate`], or dropping the [`Threads`]. Then each thread is gone within a moment, whether it computes, sleeps,
//! or waits for the others; the one exception is a thread within a call of the system for a file, or for an output that
//! nobody reads, whose return is waited for. Nothing of the memory is used again.
//!
//! # What the threads of a guest have in common
//!
//! - The memory, all of it: `static`s, the heap, what mutexes and channels hold. Thread-local variables are each thread's, and
//!   so is what it throws; the limit holds for the shared memory, and once more for what all threads have of their own.
//! - Files: what one opens, others read, and what one closes is closed. One thread is served at a time, and for no other
//!   reason does one wait for another.
//! - The standard streams. What one thread writes in one call (a line of Rust's `println!`) is not torn by another.
//! - The exit code: the first thread that exits ends all, with its code.
//! - `--stack` bounds each thread's calls. What a compiler keeps in memory beside that is a part of the heap, of a size that
//!   the guest chooses (`std::thread::Builder::stack_size`), and nothing stands below it: a thread that recurses without end
//!   usually hits `--stack` first, and may overwrite the heap of its own group before that.
//!
//! # What Node's `worker_threads` has
//!
//! | in Node | here |
//! | --- | --- |
//! | `new Worker(file)` | [`Threads::builder`]: so many at once; or `std::thread` in the guest |
//! | `workerData`, `threadId`, `isMainThread`, `threadName` | `wrun:guest/worker`: data, and an identity with id, count and name |
//! | `argv`, `env` | [`Builder::args`], [`Builder::grants`]; of all threads, and no environment by default |
//! | `SHARE_ENV` | `static`s and `std::env` are one for all threads |
//! | `stdin`, `stdout`, `stderr` | [`Builder::on_output`], or this process's own; there is no input |
//! | `name` | threads are called `GUEST/worker-N` in the system, and in outcomes `worker-N` |
//! | `resourceLimits` | [`Builder::limits`]: memory of the group, stack of each, number of threads, time |
//! | `postMessage`, `parentPort` | [`Threads::send`], [`Threads::send_all`], [`Threads::request`]; a handler, and `wrun:guest/mailbox` |
//! | events `online`, `message`, `error`, `exit` | [`Builder::start`] returns; [`Threads::recv`]; the [`Outcome`], which names the thread |
//! | `terminate()`, `await using` | [`Threads::terminate`], dropping it |
//! | `ref`, `unref` | nothing waits for a group unless it is asked to |
//! | `SharedArrayBuffer`, `Atomics` | the guest's memory, with all its atomics; for the host [`SharedMemory`] |
//! | `receiveMessageOnPort` | [`Threads::try_recv`] |
//! | `process.exit()` ends one thread | no: it ends the group, as in a program; a handler ends a task by returning |
//! | `eventLoopUtilization`, `cpuUsage` | [`Usage::cpu_ms`] of the whole |
//! | posting a compiled module | it is compiled once, and kept in the cache |
//! | `MessageChannel`, `BroadcastChannel`, `locks`, `transferList`, `setEnvironmentData` | in the guest's own memory: `std::sync` has channels, barriers, locks, and what is shared needs no transfer |
//! | `eval`, structured clones, `markAsUntransferable`, `trackUnmanagedFds` | no: there is no JavaScript, messages are JSON, and a guest has no descriptors |
//! | heap snapshots, profiles | not yet |

mod builder;
mod map;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
};

use tokio::sync::{Notify, oneshot, watch};

pub use self::builder::Builder;
pub use crate::sandbox::{OutOfBounds, SharedMemory, To};
use crate::{
    message::{Message, MessageError, SendError},
    outcome::{Answer, End, Outcome, Usage},
    sandbox::{self, Answers, Full, Group, NotTaken, Task},
};

/// Bytes of messages and answers that may lie here, beside one of any length.
const WAITING_MAX: usize = 4 << 20;

/// What a message takes beside its text.
const MESSAGE_COST: usize = 64;

/// A group of threads that was started. They are ended when this is dropped.
///
/// All methods take `&self`: several tasks can share one, in an `Arc`.
///
/// The numbers from 0 to ten million, added up by two threads:
///
/// ```standalone_crate
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use wrun::{Threads, message::Message, threads::Said};
///
/// wrun::init(); // first thing in main: guests are compiled by this program, started again
/// # let guest = guest_artifacts::SUM_THREADS;
/// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # rt.block_on(async {
/// let threads = Threads::builder(guest).workers(2).start().await?;
/// threads.send_all(&Message::parse(r#"{"start":0,"end":10000000}"#)?)?;
/// // the last to finish replies
/// let Some(Said::Answer { answer: wrun::outcome::Answer::Reply(reply), .. }) = threads.recv().await else { panic!() };
/// assert!(reply.as_str().contains("\"total\":49999995000000"));
/// let outcome = threads.shutdown().await;
/// assert_eq!(outcome.end.exit_code(), 0);
/// # Ok(()) })
/// # }
/// ```
#[derive(Debug)]
pub struct Threads {
    group: Group,
    shared: Arc<Shared>,
    ended: watch::Receiver<Option<Outcome>>,
    workers: u32,
    message_max: usize,
    sent: AtomicU64,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Said {
    /// The answer to a message that was sent with [`Threads::send`] or [`Threads::send_all`]; one without a reply is not
    /// told.
    Answer {
        /// Which worker, from 1.
        worker: u32,
        /// Its answer; never [`Answer::NoReply`] or [`Answer::Ended`].
        answer: Answer,
    },
    /// What it sent through its mailbox.
    Message {
        /// Which worker, from 1.
        worker: u32,
        /// What it sent.
        message: Message,
    },
}

/// What the threads of the guest and those of the host have in common.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    message_max: usize,
    /// There is something to take, or there will be nothing.
    received: Notify,
    /// There is room for what workers say, or nobody who says anything.
    has_room: Condvar,
    /// There may be room for messages to workers, or nobody to send to.
    handled: Notify,
}

#[derive(Debug, Default)]
struct State {
    asked: HashMap<u64, oneshot::Sender<Answer>>,
    said: VecDeque<Said>,
    said_bytes: usize,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // whole after every call, whoever panicked
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, state: &mut State, said: Said) {
        state.said_bytes += cost(&said);
        state.said.push_back(said);
        self.received.notify_waiters();
    }

    /// What a worker answered, once it was looked at.
    fn check(&self, answer: sandbox::Answer) -> Answer {
        let check = |text: String| Message::check(text.as_bytes(), self.message_max);
        match answer {
            sandbox::Answer::Reply(text) => check(text).map_or_else(Answer::Invalid, Answer::Reply),
            sandbox::Answer::Error(text) => check(text).map_or_else(Answer::Invalid, Answer::Error),
            sandbox::Answer::NoReply => Answer::NoReply,
        }
    }

    /// Tells all who wait that the group has ended. Its threads may still be there.
    fn end(&self, outcome: &Outcome) {
        let asked = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.asked)
        };
        for ticket in asked.into_values() {
            let _ = ticket.send(Answer::Ended(outcome.clone()));
        }
        self.has_room.notify_all();
        self.received.notify_waiters();
        self.handled.notify_waiters();
    }
}

fn cost(said: &Said) -> usize {
    MESSAGE_COST
        + match said {
            Said::Message { message, .. }
            | Said::Answer { answer: Answer::Reply(message) | Answer::Error(message), .. } => message.as_str().len(),
            Said::Answer { .. } => 0,
        }
}

impl Answers for Shared {
    fn answer(&self, worker: u32, id: u64, answer: sandbox::Answer, _: bool) {
        let answer = self.check(answer);
        self.handled.notify_waiters();
        let mut state = self.state();
        if let Some(ticket) = state.asked.remove(&id) {
            drop(state);
            // whoever asked may have gone
            let _ = ticket.send(answer);
            return;
        }
        // who was told of the end hears nothing after that
        if answer == Answer::NoReply || state.ended {
            return;
        }
        self.say(&mut state, Said::Answer { worker, answer });
        // who is not listened to does not go on
        while state.said_bytes > WAITING_MAX && !state.ended {
            state = self.has_room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn message(&self, worker: u32, message: Message) -> Result<(), Full> {
        let mut state = self.state();
        if state.said_bytes > WAITING_MAX || state.ended {
            return Err(Full);
        }
        self.say(&mut state, Said::Message { worker, message });
        Ok(())
    }
}

impl Threads {
    /// Threads of the guest in this file: one worker for each core, no grants, the default limits.
    pub fn builder(guest: impl Into<std::path::PathBuf>) -> Builder {
        Builder::new(guest.into())
    }

    /// How many workers there are, whose numbers begin with 1; none of a command.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.workers
    }

    /// Sends a message to one worker, or to the next that is free. Never waits. Its answer comes with [`Threads::recv`].
    ///
    /// # Errors
    /// When it was not sent: as much waits as may ([`Threads::ready`] waits for room), the group has ended, or there is no such
    /// worker.
    pub fn send(&self, to: To, message: &Message) -> Result<(), SendError> {
        self.post(to, self.number(), message)
    }

    /// Sends a message to every worker; those before the first that did not get it have got it.
    ///
    /// # Errors
    /// As [`Threads::send`].
    pub fn send_all(&self, message: &Message) -> Result<(), SendError> {
        (1..=self.workers).try_for_each(|worker| self.send(To::Worker(worker), message))
    }

    /// Waits until there is room for a message, or nobody to send it to. Cancel-safe.
    pub async fn ready(&self) {
        let mut notified = std::pin::pin!(self.shared.handled.notified());
        loop {
            notified.as_mut().enable();
            if !self.group.is_full() || self.shared.state().ended {
                return;
            }
            notified.as_mut().await;
            notified.set(self.shared.handled.notified());
        }
    }

    /// Sends a message and waits for its answer. A request that is dropped has been sent all the same.
    ///
    /// # Errors
    /// As [`Threads::send`]. A group that ends instead of answering is [`Answer::Ended`]; a command has nobody to answer. Behind
    /// workers that have said more than may lie here, it waits until that is taken ([`Threads::recv`]).
    pub async fn request(&self, to: To, message: &Message) -> Result<Answer, SendError> {
        let (ticket, answer) = oneshot::channel();
        let id = self.number();
        {
            let mut state = self.shared.state();
            if state.ended {
                return Err(SendError::Closed);
            }
            state.asked.insert(id, ticket);
        }
        if let Err(error) = self.post(to, id, message) {
            self.shared.state().asked.remove(&id);
            return Err(error);
        }
        answer.await.map_err(|_| SendError::Closed)
    }

    fn number(&self) -> u64 {
        self.sent.fetch_add(1, Ordering::Relaxed)
    }

    fn post(&self, to: To, id: u64, message: &Message) -> Result<(), SendError> {
        let length = message.as_str().len();
        if length > self.message_max {
            return Err(SendError::TooLong(MessageError::TooLong { length, max: self.message_max }));
        }
        self.group.post(to, Task { id, message: message.as_str().into() }).map_err(|reason| match reason {
            NotTaken::Full => SendError::Full,
            NotTaken::Closed => SendError::Closed,
        })
    }

    /// The next that a worker says; none when the group has ended and all was taken. Cancel-safe.
    ///
    /// A worker whose answers nobody takes gets no more messages at some point, and finds its mailbox full.
    pub async fn recv(&self) -> Option<Said> {
        let mut notified = std::pin::pin!(self.shared.received.notified());
        loop {
            notified.as_mut().enable();
            if let Poll::Ready(said) = self.take() {
                return said;
            }
            notified.as_mut().await;
            notified.set(self.shared.received.notified());
        }
    }

    /// The next that a worker has said, if there is something.
    #[must_use]
    pub fn try_recv(&self) -> Option<Said> {
        match self.take() {
            Poll::Ready(said) => said,
            Poll::Pending => None,
        }
    }

    fn take(&self) -> Poll<Option<Said>> {
        let mut state = self.shared.state();
        match state.said.pop_front() {
            Some(said) => {
                state.said_bytes -= cost(&said);
                self.shared.has_room.notify_all();
                Poll::Ready(Some(said))
            }
            None if state.ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// The memory that the threads share, and that the host can look into.
    #[must_use]
    pub fn memory(&self) -> SharedMemory {
        self.group.memory()
    }

    /// Sends no more messages. When what was sent is handled, the group ends.
    pub fn disconnect(&self) {
        self.group.close();
    }

    /// Ends all threads now, if they have not ended already.
    pub fn terminate(&self) {
        self.group.end(End::Cancelled);
    }

    /// Waits until the group has ended and all of its threads are gone. Cancel-safe, and answers the same when it is asked
    /// again.
    pub async fn wait(&self) -> Outcome {
        let mut ended = self.ended.clone();
        let outcome = ended.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        // else the thread that would tell is gone, and with it those that it watched
        outcome.unwrap_or_else(|| End::Cancelled.with(Usage::default()))
    }

    /// Lets the workers handle what was sent, and waits until they have. For how long, the time limit bounds: workers that have
    /// said more than may lie here go on when that is taken ([`Threads::recv`]).
    pub async fn shutdown(&self) -> Outcome {
        self.disconnect();
        self.wait().await
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.terminate();
    }
}
