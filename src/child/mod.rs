//! What a child process does: the other end of [`process`](crate::process), with the sandbox in it.

mod command;
mod compiler;
mod group;
mod http;
mod mailbox;
mod map;
mod output;
mod pulse;
mod trial;
mod worker;

#[cfg(any(fuzzing, test))]
pub(crate) use self::http::framing;
pub(crate) use self::{
    command::CommandConfig,
    compiler::{Compiler, entry},
    group::Workers,
    http::{
        At, Entry, ListenConfig, Listing, ROUTE_MAX, ROUTER, Route, RouterConfig, RunConfig, Standing, jail_of_router,
    },
    map::{MEMORY_MAX, MapConfig, THREAD_STACK, can_map, cores, id_of, runtimes, threads},
    trial::{Scene, Trial, Tried, attempt_aside, live_on},
    worker::{WorkerConfig, jail_of, with_windows},
};
use std::{os::fd::OwnedFd, sync::Arc};

use crate::{
    buffer::{Buffer, Named},
    outcome::{Outcome, Stage},
    process::{
        Jail, Role,
        child::{self, Out, Start, report_panics},
        wire::Kind,
    },
    sandbox::LoadError,
};

/// If this process was started as a child of another one (a worker, a compiler), becomes that and never returns.
///
/// A program that uses [`Cluster`](crate::Cluster) calls this first thing in `main`, before it starts threads or
/// looks at its arguments: the pool's workers are this program, started again.
///
/// ```
/// wrun::init();
/// // the program
/// ```
#[expect(clippy::exit, reason = "a child has no main to return to")]
pub fn init() {
    if !child::is_child() {
        crate::process::initialised();
        return;
    }
    let code = match child::start() {
        Ok(start) => match start.hello.role {
            Role::Worker => worker::main(start),
            Role::Command => command::main(start),
            Role::Compiler => compiler::main(start),
            Role::Trial => trial::main(start),
            Role::Router => http::router::main(start),
        },
        // nobody listens: whoever started this is gone, or is no primary
        Err(_) => 125,
    };
    std::process::exit(code);
}

/// Lets a child that reads from its socket do its work, and tells the primary how that ended; `run` answers nothing when the
/// primary is gone. The exit code.
fn tell_end(start: Start, run: impl FnOnce(Start, &Arc<Out>) -> Option<Outcome>) -> i32 {
    let Ok(out) = start.socket.try_clone().map(Out::new) else { return 125 };
    let out = Arc::new(out);
    // lives as long as the process
    report_panics(Box::leak(Box::new(out.clone())));
    let Some(outcome) = run(start, &out) else { return 125 };
    out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
    out.finish();
    outcome.end.exit_code().into()
}

/// The buffers of these names, each with how many descriptors come next for it.
///
/// # Errors
/// When one is missing, or could still change.
fn receive_buffers(names: Vec<(String, usize)>, fds: &mut impl Iterator<Item = OwnedFd>) -> Result<Named, LoadError> {
    let broken = |reason: String| LoadError::Invalid { reason };
    let received = names.into_iter().map(|(name, parts)| {
        let parts: Vec<_> = fds.take(parts).collect();
        if parts.is_empty() {
            return Err(broken(format!("the buffer `{name}` is missing")));
        }
        Ok((name, Buffer::received(parts).map_err(|error| broken(error.to_string()))?))
    });
    received.collect()
}

/// Enters the jail, after `prepare` has opened what cannot be opened inside, and tells the primary which walls are
/// missing.
///
/// # Errors
/// When one is and the child may not go on without, or `prepare` failed.
fn enter<T>(jail: &Jail, out: &Out, prepare: impl FnOnce() -> Result<T, LoadError>) -> Result<T, LoadError> {
    let (prepared, missing) = jail.enter(prepare).map_err(|missing| LoadError::Reported {
        stage: Stage::Jail,
        reason: format!("a wall is missing: {missing}"),
        hint: Some("`wrun doctor` says what this system has; `--isolation process` goes on without".into()),
    })?;
    if !missing.0.is_empty() {
        out.push(Kind::Walls, 0, missing.to_string().as_bytes());
    }
    prepared
}

/// Ends this process when the primary's end of the socket is closed, for a child that does not read from it. The
/// parent-death signal should come first; this is for the kernel that sends none.
#[expect(clippy::exit, reason = "the thread that would return is busy")]
fn exit_with_primary(out: &'static Out) -> std::io::Result<()> {
    std::thread::Builder::new().name("wrun-watch".into()).stack_size(64 << 10).spawn(|| {
        out.wait_until_cut();
        std::process::exit(125);
    })?;
    Ok(())
}
