//! A child that runs one guest with the standard streams that it was given: a command from start to end, or whatever
//! answers the messages of its mailbox until that is closed.

use std::{
    collections::VecDeque,
    os::{
        fd::{IntoRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    enter, exit_with_primary,
    group::{self, Workers},
    mailbox::Line,
    map::{self, MapConfig},
    pulse::Pulse,
    receive_buffers,
};
use crate::{
    buffer::{OUTPUT, Shared},
    grant::{Denied, Grants},
    limits::Limits,
    message::Message,
    outcome::{End, LimitKind, Outcome, Usage},
    process::{
        Hello, Jail, Page,
        child::{Out, Start, report_panics},
        wire::{Incoming, Kind},
    },
    sandbox::{
        Answer, BufferSource, Buffers, Code, Cwd, EngineSpec, Identity, Inspection, LoadError, Mapped, Network,
        Received, Roots, Sandbox, Setup, Shape, cpu_ms,
    },
};

/// What such a child is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CommandConfig {
    /// How its engine is made.
    pub(crate) engine: EngineSpec,
    /// What its guest is.
    pub(crate) inspection: Inspection,
    /// What the guest may touch.
    pub(crate) grants: Grants,
    /// Who vouches for the servers that it sends requests to.
    pub(crate) roots: Roots,
    /// What bounds it. The primary watches the clock.
    pub(crate) limits: Limits,
    /// Its arguments, its own name first.
    pub(crate) args: Vec<String>,
    /// Who it is.
    pub(crate) identity: Identity,
    /// What `worker.get-data` answers.
    pub(crate) data: Message,
    /// The folder that it starts in.
    pub(crate) cwd: Option<Cwd>,
    /// Whether its mailbox leads anywhere.
    pub(crate) mailbox: bool,
    /// How its workers are made, when it shares its memory and is a handler.
    pub(crate) workers: Option<Workers>,
    /// The names of the buffers that come with its streams, each with how many descriptors it has.
    pub(crate) buffers: Vec<(String, usize)>,
    /// How the chunks of the first of these are handed to it; none when it runs by itself.
    pub(crate) map: Option<MapConfig>,
    /// Whether it sees to its time limit itself. The primary's clock comes after.
    pub(crate) ends_itself: bool,
    /// What its process may do.
    pub(crate) jail: Jail,
}

/// How often the thread beside the guest looks whether the primary is there.
const BEAT: Duration = Duration::from_millis(500);

/// The child. Its code comes on the first descriptor, its standard streams on those after it, then its buffers, the one that
/// is written at their end, and last, when a name is granted, the line to who looks names up.
pub(super) fn main(start: Start) -> i32 {
    let Start { socket, hello, fds, incoming, following } = start;
    let Ok(out) = socket.try_clone().map(Out::new) else { return 125 };
    // lives as long as the process
    let out: &'static Arc<Out> = Box::leak(Box::new(Arc::new(out)));
    report_panics(out);
    // descriptor 0 becomes the guest's
    let from_primary = socket.try_clone();
    let _ = socket.into_raw_fd();
    let run = from_primary
        .map_err(|error| LoadError::Invalid { reason: error.to_string() })
        .and_then(|socket| run(out, (socket, incoming, following), &hello, fds));
    let outcome = run.unwrap_or_else(|error| error.end().with(Usage::default()));
    out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
    out.finish();
    outcome.end.exit_code().into()
}

fn run(
    out: &'static Arc<Out>,
    line: (UnixStream, Incoming, VecDeque<OwnedFd>),
    hello: &Hello,
    fds: Vec<OwnedFd>,
) -> Result<Outcome, LoadError> {
    let broken = |reason: String| LoadError::Invalid { reason };
    let config: CommandConfig = serde_json::from_str(hello.config.get()).map_err(|error| broken(error.to_string()))?;
    let mut fds = fds.into_iter();
    let (Some(page), Some(code), Some(stdin), Some(stdout), Some(stderr)) =
        (fds.next(), fds.next(), fds.next(), fds.next(), fds.next())
    else {
        return Err(broken("the command got no code or no standard streams".into()));
    };
    let received = receive_buffers(config.buffers, &mut fds)?;
    let input = received.first().map(|(_, buffer)| buffer.clone());
    let mut buffers: Vec<_> = received.into_iter().map(|(name, it)| (name, BufferSource::Input(it))).collect();
    if config.map.is_some_and(|map| map.output) {
        let fd = fds.next().ok_or_else(|| broken("the output is missing".into()))?;
        let shared = Shared::received(fd).map_err(|error| broken(error.to_string()))?;
        buffers.push((OUTPUT.into(), BufferSource::Output(Arc::new(shared))));
    }
    let buffers = Arc::new(Buffers::of(buffers));
    let names = fds.next().map(UnixStream::from);
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .map_err(|error| broken(error.to_string()))?;
    let page = Arc::new(Page::map(page).map_err(|error| broken(error.to_string()))?);

    let code = Code::checked(code.into(), config.inspection);
    let tell = |denied: Denied| {
        out.push(Kind::Denied, 0, &serde_json::to_vec(&denied).expect("plain data has a JSON form"));
        // what does not go now goes later
        let _ = out.flush();
    };
    let (mapped, runtime, runtimes, network, cwd) = enter(&config.jail, out, || {
        let engine = config.engine.engine(&code.inspection).map_err(|error| broken(format!("{error:#}")))?;
        // the runtime makes sockets for itself
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        if config.ends_itself {
            // whenever its guest gives way its clock is looked at
            runtime.event_interval(1);
        }
        let runtime = runtime.enable_all().build();
        let runtimes = map::runtimes(config.map.map_or(0, |map| map.workers));
        let runtimes = runtimes.map_err(|error| broken(error.to_string()))?;
        let network = Network::prepare(&config.grants, names, &config.roots, tell);
        let cwd = config.cwd.as_ref().map(Cwd::open).transpose()?;
        Ok((Mapped::of(engine, &code)?, runtime.map_err(|error| broken(error.to_string()))?, runtimes, network, cwd))
    })?;
    // what is missing is told of before the guest prints
    out.finish();
    let answers = config.mailbox || config.map.is_some();
    let shape = code.inspection.shape.filter(|shape| answers && *shape == Shape::Handler);
    let setup = Setup {
        data: config.data,
        cwd: cwd.map(Arc::new),
        network: Arc::new(network),
        buffers: buffers.clone(),
        ends_itself: config.ends_itself,
        // what its connections wait for is waited for there, too
        shares_thread: !config.jail.ports.is_empty(),
        ..Setup::alone(config.grants, config.limits, config.args, config.identity)
    };
    let line = if config.mailbox {
        let pulse = Pulse::start(page, out.clone(), None, None, BEAT).map_err(|error| broken(error.to_string()))?;
        Some(Arc::new(Line::new(out.clone(), line, pulse, setup.shares_thread, buffers)))
    } else {
        exit_with_primary(out).map_err(|error| broken(error.to_string()))?;
        None
    };
    if code.inspection.has_threads() {
        return group::run(mapped, &code.inspection, setup, line, config.workers);
    }
    let sandbox = mapped.link(&code.inspection, shape.unwrap_or(Shape::Command))?;
    if let (Some(config), Some(input)) = (config.map, input) {
        return map::run(&sandbox, &setup, input, (config, runtimes), out);
    }
    let outcome = if let Some(line) = line {
        let setup = Arc::new(Setup { mailbox: Some(line.clone()), ..setup });
        runtime.block_on(async {
            if shape.is_some() {
                return answer(&sandbox, &setup, &line).await;
            }
            line.say_now(Kind::Ready);
            sandbox.run(&setup).await
        })
    } else {
        runtime.block_on(sandbox.run(&Arc::new(setup)))
    };
    // a thread may still sit in a read of standard input: nobody waits for it
    runtime.shutdown_background();
    Ok(outcome)
}

/// Lets a handler answer one message after the other, until there are no more or it fails.
async fn answer(sandbox: &Sandbox, setup: &Arc<Setup>, line: &Line) -> Outcome {
    let started = Instant::now();
    let usage = || Usage { cpu_ms: Some(cpu_ms()), ..Usage::wall(started.elapsed()) };
    let mut instance = match sandbox.start(setup).await {
        Ok(instance) => instance,
        Err(outcome) => return outcome,
    };
    line.say_now(Kind::Ready);
    let max = setup.limits.message_max;
    loop {
        line.make_room();
        let (id, message) = match line.next(None).await {
            Received::Message(id, message) => (id, message),
            Received::TimedOut | Received::Closed => return End::Exited { code: 0 }.with(usage()),
        };
        match instance.handle(message).await {
            Ok(Answer::Reply(text) | Answer::Error(text)) if text.len() as u64 > max.0 => {
                return End::Limit { limit: LimitKind::Message, allowed: max.to_string() }.with(usage());
            }
            Ok(Answer::Reply(text)) => line.say(Kind::Reply, id, text.as_bytes()),
            Ok(Answer::NoReply) => line.say(Kind::NoReply, id, b""),
            Ok(Answer::Error(text)) => line.say(Kind::TaskError, id, text.as_bytes()),
            Err(outcome) => return outcome,
        }
    }
}
