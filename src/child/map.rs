//! A child that hands the chunks of a buffer to instances of its guest, on threads of its own.
//!
//! Nothing in it is interrupted: who is out of time ends the process.

use std::sync::Arc;

use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::{
    Error,
    buffer::{Buffer, Chunk, Chunks, Failed, Split},
    limits::Bytes,
    message::Message,
    outcome::{Answer, End, Outcome, Usage},
    process::{child::Out, wire::Kind},
    sandbox::{Form, Inspection, LoadError, Sandbox, Setup, Shape, Work, cpu_ms},
};

/// How the chunks are handed out.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct MapConfig {
    /// Where the first of the buffers is cut.
    pub(crate) split: Split,
    /// Whether a buffer comes that is written.
    pub(crate) output: bool,
    /// Whether all replies are handed to a last call.
    pub(crate) reduce: bool,
    /// How many threads there are.
    pub(crate) workers: u32,
    /// Whether each stays on its core.
    pub(crate) pin: bool,
}

/// The id of the frame about a chunk; what is about none, the last call, has 0.
pub(crate) fn id_of(chunk: &Chunk) -> u64 {
    chunk.index + 1
}

/// The most memory of one instance: what a 32-bit guest can address.
pub(crate) const MEMORY_MAX: Bytes = Bytes::mib(4096);

/// Sees that a guest can be handed chunks, with this much memory for each of its instances.
///
/// # Errors
/// Says what was expected.
pub(crate) fn can_map(guest: &Inspection, memory: Bytes) -> Result<(), Error> {
    let Inspection { form, shape: found, memory_min, .. } = *guest;
    let needs = Bytes(memory_min);
    if guest.shape != Some(Shape::Handler) || form != Form::Component {
        return Err(LoadError::WrongShape { expected: Shape::Handler, found, form }.into());
    }
    if memory > MEMORY_MAX {
        return Err(Error::Usage(format!("expected at most {MEMORY_MAX} of memory for one instance")));
    }
    if needs > memory {
        return Err(LoadError::NeedsMemory { needs, limit: memory }.into());
    }
    Ok(())
}

/// A thread for each core.
pub(crate) fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1))
}

/// The stack of a thread: guests have theirs elsewhere.
pub(crate) const THREAD_STACK: usize = 1 << 20;

/// Bytes of replies that may wait to be written before the next one.
const WAITING_MAX: usize = 1 << 20;

/// Threads that hand out chunks.
///
/// # Errors
/// When the system has no room for them.
pub(crate) fn threads(workers: u32) -> Result<ThreadPool, LoadError> {
    let pool = ThreadPoolBuilder::new().num_threads(workers as usize).stack_size(THREAD_STACK);
    let pool = pool.thread_name(|index| format!("wrun-map-{}", index + 1));
    pool.build().map_err(|error| LoadError::Invalid { reason: format!("no threads to hand out chunks: {error}") })
}

/// What guests on each of these threads wait with. It makes sockets for itself, so before a jail.
///
/// # Errors
/// When the system has no room for them.
pub(crate) fn runtimes(workers: u32) -> std::io::Result<Vec<Runtime>> {
    (0..workers).map(|_| tokio::runtime::Builder::new_current_thread().enable_all().build()).collect()
}

/// Does it, and tells the primary of each chunk.
pub(super) fn run(
    sandbox: &Sandbox,
    setup: &Setup,
    input: Buffer,
    (config, runtimes): (MapConfig, Vec<Runtime>),
    out: &Arc<Out>,
) -> Result<Outcome, LoadError> {
    let started = std::time::Instant::now();
    let MapConfig { split, output, reduce, workers, pin } = config;
    let pool = threads(workers)?;
    let (chunks, has_output) = (Chunks::new(input, split), output);
    let work = Work { sandbox, setup, pool: &pool, runtimes, chunks, has_output, reduce, pin, stop: None };
    let say = |kind: Kind, id: u64, body: &[u8]| {
        if out.push(kind, id, body) > WAITING_MAX {
            out.finish();
        }
    };
    let done = work.run(&|chunk: &Chunk, reply: Option<&Message>| {
        match reply {
            Some(reply) => say(Kind::Reply, id_of(chunk), reply.as_str().as_bytes()),
            None => say(Kind::NoReply, id_of(chunk), b""),
        }
        // what does not go now goes later
        let _ = out.flush();
    });
    let usage = Usage { cpu_ms: Some(cpu_ms()), ..Usage::wall(started.elapsed()) };
    let end = match done {
        Ok(last) => {
            if let Some(reply) = last {
                say(Kind::Reply, 0, reply.as_str().as_bytes());
            }
            End::Exited { code: 0 }
        }
        Err(failed) => {
            let Failed { chunk, answer } = *failed;
            let id = chunk.as_ref().map_or(0, id_of);
            match answer {
                Answer::Error(reason) => {
                    say(Kind::TaskError, id, reason.as_str().as_bytes());
                    End::Exited { code: 1 }
                }
                Answer::Ended(outcome) => {
                    say(Kind::TaskEnded, id, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
                    outcome.end
                }
                Answer::Reply(_) | Answer::NoReply | Answer::Invalid(_) => unreachable!("none of these is a failure"),
            }
        }
    };
    Ok(end.with(usage))
}
