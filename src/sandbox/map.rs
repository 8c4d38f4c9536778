//! The chunks of a buffer, handed to instances on the threads of a pool, and their replies, in order.
//!
//! Each thread keeps an instance and asks for the next chunk when it is done with one. Chunks are handed out in order, so
//! what is told first of the failures is always the same: the first by the order of chunks.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use rayon::ThreadPool;
use tokio::{runtime::Runtime, sync::watch};

use super::{Answer, Identity, Instance, Sandbox, Setup, cores::Cores};
use crate::{
    buffer::{Chunk, Chunks, Failed},
    message::Message,
    outcome::{self, End, LimitKind, Outcome, Stage, Usage},
};

/// Replies that may wait for those of earlier chunks, ...
const AHEAD: usize = 1024;

/// ... and how many bytes of them.
const AHEAD_BYTES: usize = 16 << 20;

/// What is to be done.
pub(crate) struct Work<'a> {
    pub(crate) sandbox: &'a Sandbox,
    /// What instances are started with, each with a number of its own.
    pub(crate) setup: &'a Setup,
    /// The threads.
    pub(crate) pool: &'a ThreadPool,
    /// One for each thread, for what guests wait for.
    pub(crate) runtimes: Vec<Runtime>,
    pub(crate) chunks: Chunks,
    /// Whether guests write to the range of their chunk.
    pub(crate) has_output: bool,
    /// Whether all replies are handed to a last call.
    pub(crate) reduce: bool,
    /// Whether each thread stays on its core.
    pub(crate) pin: bool,
    /// What ends all of it, when it is there.
    pub(crate) stop: Option<watch::Receiver<Option<End>>>,
}

/// Who hears of each chunk that is done, in order, and of its reply unless it goes to the last call.
pub(crate) type Hear<'a> = &'a (dyn Fn(&Chunk, Option<&Message>) + Sync);

impl Work<'_> {
    /// Does it. Answers what the last call said.
    ///
    /// # Errors
    /// What failed.
    pub(crate) fn run(mut self, hear: Hear<'_>) -> Result<Option<Message>, Box<Failed>> {
        let cores = Cores::of_this_process(self.pin);
        let runtimes = Mutex::new(std::mem::take(&mut self.runtimes));
        let line = Line::new(self.chunks.clone(), self.reduce, self.setup.limits.message_max.as_usize());
        let kept = self.pool.broadcast(|thread| {
            let runtime = lock(&runtimes).pop()?;
            cores.settle(thread.index());
            let mut worker = Worker::new(&self, thread.index(), runtime);
            while let Some(chunk) = line.next() {
                let text = serde_json::to_string(&chunk).expect("plain data has a JSON form");
                let answer = worker.ask(text, if self.has_output { chunk.range() } else { 0..0 });
                line.done(chunk, answer, hear);
            }
            Some(worker)
        });
        let replies = line.finish()?;
        let Some(replies) = replies else { return Ok(None) };
        // on a thread of the pool, as all the others
        self.pool.install(|| {
            let mut worker = kept.into_iter().flatten().next().expect("there is a thread");
            worker.ask(replies, 0..0).map_err(|answer| Box::new(Failed { chunk: None, answer }))
        })
    }
}

/// One thread's instance.
struct Worker<'a> {
    work: &'a Work<'a>,
    setup: Arc<Setup>,
    runtime: Runtime,
    instance: Option<Instance>,
}

impl<'a> Worker<'a> {
    fn new(work: &'a Work<'a>, index: usize, runtime: Runtime) -> Self {
        let (id, count) = (index + 1, work.pool.current_num_threads());
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let identity = Identity { id: number(id), count: number(count), ..work.setup.identity.clone() };
        Self { work, setup: Arc::new(Setup { identity, ..work.setup.clone() }), runtime, instance: None }
    }

    /// Hands a message to its instance. Its reply, or how it failed.
    fn ask(&mut self, message: String, own: std::ops::Range<u64>) -> Result<Option<Message>, outcome::Answer> {
        let begun = Instant::now();
        let Self { work, setup, runtime, instance } = self;
        let max = setup.limits.message_max;
        let ended = |end: End| outcome::Answer::Ended(end.with(Usage::wall(begun.elapsed())));
        let mut stop = work.stop.clone();
        let answered = runtime.block_on(async {
            let attempt = async {
                let mut it = match instance.take() {
                    Some(it) => it,
                    None => work.sandbox.start(setup).await?,
                };
                let answer = it.handle_with(message, own).await?;
                *instance = Some(it);
                Ok::<_, Outcome>(answer)
            };
            let stopped = async {
                match &mut stop {
                    // who could say so is gone: it is not wanted any more
                    Some(stop) => stop.wait_for(Option::is_some).await.map_or(Some(End::Cancelled), |end| end.clone()),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = attempt => answer.map_err(outcome::Answer::Ended),
                end = stopped => Err(ended(end.unwrap_or(End::Cancelled))),
            }
        });
        let checked = |text: String| {
            if text.len() as u64 > max.0 {
                return Err(ended(End::Limit { limit: LimitKind::Message, allowed: max.to_string() }));
            }
            Message::check(text.as_bytes(), max.as_usize()).map_err(|error| {
                let reason = format!("what it answered is no message: {error}");
                ended(End::Failed { stage: Stage::Protocol, reason, hint: None })
            })
        };
        match answered? {
            Answer::Reply(text) => checked(text).map(Some),
            Answer::NoReply => Ok(None),
            Answer::Error(text) => Err(outcome::Answer::Error(checked(text)?)),
        }
    }
}

/// The chunks that are to come, and the replies that are to be told.
struct Line {
    state: Mutex<State>,
    moved: Condvar,
    message_max: usize,
}

struct State {
    chunks: Chunks,
    /// The chunk whose reply is told next.
    next: u64,
    /// What is done before its turn.
    done: BTreeMap<u64, (Chunk, Result<Option<Message>, outcome::Answer>)>,
    done_bytes: usize,
    /// No more are handed out.
    stopped: bool,
    failed: Option<Failed>,
    replies: Replies,
}

/// Where replies go.
enum Replies {
    /// To who hears of them.
    Told,
    /// Into an array, whose end is missing.
    Kept(String),
    /// Nowhere: the array would be longer than a message may be.
    TooMany,
}

impl Line {
    fn new(chunks: Chunks, reduce: bool, message_max: usize) -> Self {
        let replies = if reduce { Replies::Kept("[".into()) } else { Replies::Told };
        let state =
            State { chunks, next: 0, done: BTreeMap::new(), done_bytes: 0, stopped: false, failed: None, replies };
        Self { state: Mutex::new(state), moved: Condvar::new(), message_max }
    }

    /// The next chunk; none when there is none, or one has failed. Waits while too much waits for a slower one.
    fn next(&self) -> Option<Chunk> {
        let mut state = lock(&self.state);
        // the chunk whose turn it is is with another thread, which does not wait
        while !state.stopped && (state.done.len() >= AHEAD || state.done_bytes >= AHEAD_BYTES) {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped { None } else { state.chunks.next() }
    }

    /// Takes what became of a chunk, and tells what can be told.
    fn done(&self, chunk: Chunk, answer: Result<Option<Message>, outcome::Answer>, hear: Hear<'_>) {
        let state = &mut *lock(&self.state);
        state.stopped |= answer.is_err();
        state.done_bytes += bytes_of(&answer);
        state.done.insert(chunk.index, (chunk, answer));
        while state.failed.is_none()
            && let Some((chunk, answer)) = state.done.remove(&state.next)
        {
            state.next += 1;
            state.done_bytes -= bytes_of(&answer);
            match (answer, &mut state.replies) {
                (Err(answer), _) => state.failed = Some(Failed { chunk: Some(chunk), answer }),
                (Ok(reply), Replies::Told) => hear(&chunk, reply.as_ref()),
                (Ok(reply), replies) => {
                    if let Some(reply) = reply {
                        replies.add(&reply, self.message_max);
                    }
                    hear(&chunk, None);
                }
            }
        }
        self.moved.notify_all();
    }

    /// The array of replies, if it is wanted.
    fn finish(self) -> Result<Option<String>, Box<Failed>> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = state.failed {
            return Err(Box::new(failed));
        }
        match state.replies {
            Replies::Told => Ok(None),
            Replies::Kept(replies) => Ok(Some(replies + "]")),
            Replies::TooMany => {
                let allowed = crate::limits::Bytes(self.message_max as u64).to_string();
                let end = End::Limit { limit: LimitKind::Message, allowed };
                Err(Box::new(Failed { chunk: None, answer: outcome::Answer::Ended(end.with(Usage::default())) }))
            }
        }
    }
}

impl Replies {
    /// Adds a reply to an array that may have so many bytes, with its end.
    fn add(&mut self, reply: &Message, max: usize) {
        if let Self::Kept(text) = self {
            if text.len() > 1 {
                text.push(',');
            }
            text.push_str(reply.as_str());
            if text.len() >= max {
                *self = Self::TooMany;
            }
        }
    }
}

fn bytes_of(answer: &Result<Option<Message>, outcome::Answer>) -> usize {
    match answer {
        Ok(Some(reply)) => reply.as_str().len(),
        _ => 0,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{buffer::Buffer, limits::Bytes};

    fn line(bytes: usize, reduce: bool, max: usize) -> Line {
        Line::new(Buffer::from_slice(&vec![0; bytes]).expect("memory").split(Bytes(1)), reduce, max)
    }

    fn reply(text: &str) -> Message {
        Message::parse(text).expect("JSON")
    }

    #[test]
    fn replies_are_told_in_order() {
        let line = line(4, false, 100);
        let chunks: Vec<_> = std::iter::from_fn(|| line.next()).collect();
        let told = Mutex::new(vec![]);
        let hear = |chunk: &Chunk, reply: Option<&Message>| {
            lock(&told).push((chunk.index, reply.map(|reply| reply.as_str().to_owned())));
        };
        for (index, answer) in [(2, Some(reply("2"))), (0, Some(reply("0"))), (3, None), (1, Some(reply("1")))] {
            line.done(chunks[index], Ok(answer), &hear);
        }
        let texts: Vec<_> = [Some("0"), Some("1"), Some("2"), None].map(|text| text.map(str::to_owned)).into();
        assert_eq!(*lock(&told), (0..4).zip(texts).collect::<Vec<_>>());
        assert_eq!(line.finish().expect("none failed"), None);
    }

    #[test]
    fn the_first_failure_by_order_is_told() {
        let line = line(5, false, 100);
        let chunks: Vec<_> = std::iter::from_fn(|| line.next()).take(3).collect();
        let told = Mutex::new(0);
        let hear = |_: &Chunk, _: Option<&Message>| *lock(&told) += 1;
        let failure = |text: &str| Err(outcome::Answer::Error(Message::parse(text).expect("JSON")));
        line.done(chunks[2], failure("2"), &hear);
        assert_eq!(line.next(), None, "no more are handed out");
        line.done(chunks[1], failure("1"), &hear);
        line.done(chunks[0], Ok(Some(reply("0"))), &hear);
        assert_eq!(*lock(&told), 1);
        assert_eq!(line.finish().expect_err("failed").chunk, Some(chunks[1]));
    }

    #[test]
    fn an_array_of_replies_is_no_longer_than_a_message() {
        for (max, fits) in [(11, true), (10, false)] {
            let line = line(3, true, max);
            for text in ["12", "34", "567"] {
                let chunk = line.next().expect("a chunk");
                line.done(chunk, Ok(Some(reply(text))), &|_, reply| assert_eq!(reply, None));
            }
            assert_eq!(
                line.finish().map(|replies| replies.map(|it| it == "[12,34,567]")).ok(),
                fits.then_some(Some(true)),
                "{max}"
            );
        }
        assert_eq!(line(0, true, 100).finish().expect("none failed").as_deref(), Some("[]"));
    }
}
