//! A child that runs a handler guest: tasks come, instances handle them, answers go.

use std::{
    cell::RefCell,
    future::Future,
    io,
    os::unix::net::UnixStream as StdStream,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::UnixStream,
    runtime::{LocalOptions, LocalRuntime},
    task::JoinSet,
};

use super::{
    enter,
    http::{self, ListenConfig, Port},
    mailbox,
    output::Lines,
    pulse::Pulse,
    receive_buffers, tell_end,
};
use crate::{
    buffer::PARTS_MAX,
    grant::{Denied, Grants},
    limits::{Bytes, Limits},
    message::Message,
    outcome::{End, LimitKind, Outcome, Usage},
    process::{
        Bounds, Isolation, Jail, Page, Purpose,
        child::{Out, Start},
        wire::{Incoming, Kind},
    },
    sandbox::{
        Answer, BufferSource, Buffers, Code, EngineSpec, Form, Full, Identity, Inspection, Instance, LoadError,
        Mailbox, Mapped, Network, Received, Roots, SOCKETS_MAX, Sandbox, Setup, Shape, Stdio, cpu_ms,
    },
};

/// What a worker is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WorkerConfig {
    /// How its engine is made.
    pub(crate) engine: EngineSpec,
    /// What its guest is; the primary has read that from the code's own file.
    pub(crate) inspection: Inspection,
    /// What the guest may touch.
    pub(crate) grants: Grants,
    /// Who vouches for the servers that it sends requests to.
    pub(crate) roots: Roots,
    /// What bounds it.
    pub(crate) limits: Limits,
    /// Who it is.
    pub(crate) identity: Identity,
    /// What `worker.get-data` answers.
    pub(crate) data: Message,
    /// How many tasks or requests an instance is used for; 1 is a fresh one for each.
    pub(crate) reuse: u64,
    /// How many tasks it handles at once.
    pub(crate) concurrency: u32,
    /// How often it gives a sign of life.
    pub(crate) beat: Duration,
    /// The names of the buffers that come before whoever looks names up, each with how many descriptors it has.
    pub(crate) buffers: Vec<(String, usize)>,
    /// How it serves a port; none when tasks come from the primary.
    pub(crate) listen: Option<ListenConfig>,
    /// What its process may do.
    pub(crate) jail: Jail,
}

/// What a worker's process takes beside its instances: the program, its threads, frames on their way.
const DATA_BASE: Bytes = Bytes::mib(64);

/// Copies of one message that are there at once, from the socket to the guest and back.
const MESSAGE_COPIES: u64 = 8;

/// What a connection takes beside the head of its request.
const CONNECTION_DATA: Bytes = Bytes::kib(64);

/// What an outgoing connection takes: three chunks of a body, buffers of both sides, and TLS.
const OUTGOING_DATA: Bytes = Bytes::mib(1);

/// What is read before there is a guest that sends requests: the certificates of those who vouch for servers.
const ROOTS_DATA: Bytes = Bytes::mib(16);

/// Threads on which guests that share theirs wait for files.
const BLOCKING_THREADS: usize = 16;

/// Descriptors that a worker needs for itself: about 15 ...
const DESCRIPTORS_KEPT: u64 = 24;

/// ... and some more on a port, for connections that come and go.
pub(super) const DESCRIPTORS_OF_A_PORT: u64 = 64;

/// The jail of a worker whose guest has these grants and limits, and as much room as its engine and its port give.
pub(crate) fn jail_of(
    isolation: Isolation,
    (grants, limits): (&Grants, &Limits),
    (engine, concurrency): (&EngineSpec, u32),
    code: (&Inspection, u64),
    listen: Option<&ListenConfig>,
) -> Jail {
    let (inspection, code_size) = code;
    let (concurrency, connections) =
        (u64::from(concurrency), listen.map_or(0, |listen| listen.http.connections.into()));
    let per_connection = listen.map_or(0, |listen| listen.http.head.0 + CONNECTION_DATA.0);
    let copies = match inspection.form {
        Form::Component => limits.message_max.0.saturating_mul(MESSAGE_COPIES),
        // what it reads or writes at once, which may be as large as its memory
        Form::Module => limits.memory.0,
    };
    // one that may make none has its first, which is put on a core as all are
    let threads = if inspection.has_threads() { limits.threads.max(1) } else { 0 };
    let kinds = u64::from(!grants.http.is_empty()) + u64::from(!grants.tcp.is_empty());
    let outgoing = concurrency * kinds * SOCKETS_MAX as u64;
    let data = [
        code_size,
        copies.saturating_mul(concurrency),
        per_connection.saturating_mul(connections),
        if kinds == 0 { 0 } else { ROOTS_DATA.0 + OUTGOING_DATA.0.saturating_mul(outgoing) },
        u64::from(threads)
            .saturating_mul(engine.thread_data().saturating_add(limits.message_max.0.saturating_mul(MESSAGE_COPIES))),
    ]
    .into_iter()
    .fold(DATA_BASE.0, u64::saturating_add)
    .saturating_add(engine.instances_data(limits.memory, inspection));
    let own_files = if listen.is_some() { DESCRIPTORS_OF_A_PORT } else { DESCRIPTORS_KEPT };
    // one for each folder; without one nothing is opened
    let guests_files = match grants.dirs.len() as u64 {
        0 => 0,
        dirs => concurrency * (u64::from(limits.open_files) + dirs),
    };
    Jail {
        required: isolation == Isolation::Jail,
        dirs: grants.dirs.clone(),
        ports: grants.ports(),
        purpose: if listen.is_some() { Purpose::Port } else { Purpose::Guest },
        // in a granted folder root's files would be nobody's
        namespaces: isolation == Isolation::Jail && grants.dirs.is_empty(),
        threads,
        bounds: Bounds {
            // it works as long as there is work; each task has a clock
            cpu: None,
            files: own_files + connections + guests_files + outgoing,
            file_size: limits.file_size,
            data: Bytes(data),
        },
        without: vec![],
    }
}

/// Makes room in a jail for windows of so many buffers, in so many instances with this much memory each.
pub(crate) fn with_windows(jail: &mut Jail, buffers: usize, instances: u32, memory: Bytes) {
    jail.bounds.files += (buffers * PARTS_MAX) as u64;
    // what a window takes the place of is kept meanwhile; what is read of a buffer counts for nobody
    let windows = memory.0.saturating_mul(instances.into());
    jail.bounds.data = Bytes(jail.bounds.data.0.saturating_add(windows));
}

/// Bytes that may wait to be written before the next task is begun.
const OUT_MAX: usize = 4 << 20;

/// A task that took this long is answered at once. The answers of quicker ones go together, and a worker that is killed
/// takes with it those that have not gone.
const PROMPT: Duration = Duration::from_micros(100);

/// The child. Returns its exit code.
pub(super) fn main(start: Start) -> i32 {
    tell_end(start, |start, out| match Worker::new(start, out.clone()) {
        Ok((worker, runtime, begin)) => worker.run(runtime, begin).ok(),
        Err(error) => Some(error.end().with(Usage::default())),
    })
}

/// One worker: a sandbox, and what goes around it.
pub(super) struct Worker {
    pub(super) sandbox: Sandbox,
    pub(super) setup: Arc<Setup>,
    pub(super) shape: Shape,
    reuse: u64,
    pub(super) concurrency: usize,
    /// The time limit, when it is enforced here.
    pub(super) timeout: Option<Duration>,
    pub(super) page: Arc<Page>,
    pub(super) out: Arc<Out>,
    pub(super) lines: Arc<Lines>,
    pub(super) pulse: Pulse,
    started: Instant,
    /// Instances that wait for a task.
    idle: RefCell<Vec<Instance>>,
    /// How the guest ended the whole worker.
    ended: RefCell<Option<Outcome>>,
}

/// Where a worker's work comes from.
enum Work {
    /// From the primary.
    Tasks,
    /// From a port.
    Port(Box<Port>),
}

/// What a worker begins with.
struct Begin {
    work: Work,
    socket: StdStream,
    incoming: Incoming,
}

/// What a worker has to do next.
enum Next {
    /// A task, by its id.
    Task(u64, String),
    /// Nothing before more has come.
    Nothing,
    /// What is begun, and no more.
    Drain,
}

/// The line of a worker to its primary. What comes the other way are tasks.
struct Outbox(Arc<Out>);

impl Mailbox for Outbox {
    fn send(&self, message: Message) -> Result<(), Full> {
        mailbox::post(&self.0, message.as_str().as_bytes()).map(drop)
    }

    fn receive(&self, _: Option<Duration>) -> Pin<Box<dyn Future<Output = Received> + Send + '_>> {
        Box::pin(std::future::ready(Received::Closed))
    }
}

impl Worker {
    fn new(start: Start, out: Arc<Out>) -> Result<(Self, LocalRuntime, Begin), LoadError> {
        let broken = |reason: String| LoadError::Invalid { reason };
        let config: WorkerConfig =
            serde_json::from_str(start.hello.config.get()).map_err(|error| broken(error.to_string()))?;
        let mut fds = start.fds.into_iter();
        let (Some(page), Some(code)) = (fds.next(), fds.next()) else {
            return Err(broken("the worker got no code".into()));
        };
        let page = Arc::new(Page::map(page).map_err(|error| broken(error.to_string()))?);
        let head_max = config.listen.as_ref().map_or(Bytes(0), |listen| listen.http.head);
        let work = match config.listen {
            None => Work::Tasks,
            Some(listen) => {
                let (Some(board), Some(listener)) = (fds.next(), fds.next()) else {
                    return Err(broken("the worker got no port".into()));
                };
                let Identity { id, generation, count, .. } = config.identity;
                let port = Port::new(listen, board, listener, (id, generation, count));
                Work::Port(Box::new(port.map_err(|error| broken(error.to_string()))?))
            }
        };
        let shape = config.inspection.shape.filter(|_| matches!(work, Work::Port(_))).unwrap_or(Shape::Handler);
        let buffers = receive_buffers(config.buffers, &mut fds)?;
        let buffers = buffers.into_iter().map(|(name, buffer)| (name, BufferSource::Input(buffer)));
        let names = fds.next().map(StdStream::from);
        let code = Code::checked(code.into(), config.inspection);
        let told = out.clone();
        let tell = move |denied: Denied| {
            told.push(Kind::Denied, 0, &serde_json::to_vec(&denied).expect("plain data has a JSON form"));
        };
        let (mapped, runtime, network) = enter(&config.jail, &out, || {
            let engine = config.engine.engine(&code.inspection).map_err(|error| broken(format!("{error:#}")))?;
            // the runtime makes sockets for itself
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().max_blocking_threads(BLOCKING_THREADS);
            let runtime = runtime.build_local(LocalOptions::default());
            let network = Network::prepare(&config.grants, names, &config.roots, tell);
            Ok((Mapped::of(engine, &code)?, runtime.map_err(|error| broken(error.to_string()))?, network))
        })?;
        let sandbox = mapped.link(&code.inspection, shape)?;
        drop(code);
        let lines = Arc::new(Lines::new(out.clone()));
        // its threads are made inside
        let epoch = config.engine.epoch_checks;
        let pulse =
            Pulse::start(page.clone(), out.clone(), Some(lines.clone()), epoch.then(|| sandbox.ticker()), config.beat)
                .map_err(|error| broken(error.to_string()))?;
        let setup = Arc::new(Setup {
            args: vec![config.identity.name.clone()],
            grants: config.grants,
            identity: config.identity,
            data: config.data,
            stdio: Stdio::Sink(lines.clone()),
            mailbox: Some(Arc::new(Outbox(out.clone()))),
            cwd: None,
            shares_thread: config.concurrency > 1 || matches!(work, Work::Port(_)),
            ends_itself: false,
            head_max,
            network: Arc::new(network),
            buffers: Arc::new(Buffers::of(buffers)),
            limits: config.limits,
        });
        let worker = Self {
            timeout: setup.limits.timeout.filter(|_| epoch),
            sandbox,
            setup,
            shape,
            reuse: config.reuse,
            concurrency: config.concurrency as usize,
            page,
            out,
            lines,
            pulse,
            started: Instant::now(),
            idle: RefCell::default(),
            ended: RefCell::default(),
        };
        Ok((worker, runtime, Begin { work, socket: start.socket, incoming: start.incoming }))
    }

    /// Works until it is drained, or the guest ends it.
    fn run(self, runtime: LocalRuntime, begin: Begin) -> io::Result<Outcome> {
        let Begin { work, socket, incoming } = begin;
        let worker = Rc::new(self);
        let outcome = match work {
            Work::Port(port) => runtime.block_on(http::serve(worker, *port, socket, incoming)),
            Work::Tasks => match runtime.block_on(worker.get_ready()) {
                Err(outcome) => Ok(outcome),
                Ok(()) if worker.concurrency == 1 => worker.serve_in_turn(&runtime, &socket, incoming),
                Ok(()) => runtime.block_on(worker.serve_at_once(socket, incoming)),
            },
        };
        runtime.shutdown_background();
        outcome
    }

    /// Makes the first instance before the worker is ready: a guest that cannot start is never given a task.
    pub(super) async fn make_first(&self) -> Result<(), Outcome> {
        let first = self.sandbox.start(&self.setup).await;
        self.lines.settle();
        let first = first?;
        // one of a command can be run, and that once, with streams of its own
        if self.shape != Shape::Command {
            self.idle.borrow_mut().push(first);
        }
        Ok(())
    }

    /// Tells the primary that it is ready.
    pub(super) fn say_ready(&self) {
        self.out.push(Kind::Ready, 0, b"");
        self.out.finish();
    }

    async fn get_ready(&self) -> Result<(), Outcome> {
        self.make_first().await?;
        self.say_ready();
        Ok(())
    }

    /// One task after the other, with plain blocking reads in between: a wake-up by those is cheaper than one through
    /// the runtime, and often on the core that the primary has just left.
    fn serve_in_turn(&self, runtime: &LocalRuntime, socket: &StdStream, mut incoming: Incoming) -> io::Result<Outcome> {
        loop {
            let ended = runtime.block_on(async {
                loop {
                    match self.next(&mut incoming) {
                        Next::Task(id, message) => self.handle(id, message).await,
                        Next::Nothing => return self.ended.take(),
                        Next::Drain => return Some(self.drained()),
                    }
                }
            });
            if let Some(outcome) = ended {
                return Ok(outcome);
            }
            self.out.finish();
            match rustix::io::read(socket, rustix::buffer::spare_capacity(incoming.space())) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Several tasks at once, each in an instance of its own.
    async fn serve_at_once(self: Rc<Self>, socket: StdStream, mut incoming: Incoming) -> io::Result<Outcome> {
        socket.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(socket)?;
        let (mut reading, writing) = socket.split();
        let mut at_work = JoinSet::new();
        loop {
            let drained = loop {
                match self.next(&mut incoming) {
                    Next::Task(id, message) => {
                        while at_work.len() >= self.concurrency {
                            at_work.join_next().await;
                        }
                        let this = self.clone();
                        at_work.spawn_local(async move { this.handle(id, message).await });
                    }
                    Next::Nothing => break false,
                    Next::Drain => break true,
                }
            };
            if drained {
                while at_work.join_next().await.is_some() {}
                return Ok(self.drained());
            }
            if let Some(outcome) = self.ended.take() {
                return Ok(outcome);
            }
            let all_written = self.out.flush()?;
            tokio::select! {
                biased;
                count = reading.read_buf(incoming.space()) => {
                    if count? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                writable = writing.writable(), if !all_written => {
                    writable?;
                    let flush = || if self.out.flush()? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) };
                    match writing.as_ref().try_io(Interest::WRITABLE, flush) {
                        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                        _ => {}
                    }
                }
                _ = at_work.join_next(), if !at_work.is_empty() => {}
            }
        }
    }

    /// The next task that has come whole; none when the guest has ended the worker.
    fn next(&self, incoming: &mut Incoming) -> Next {
        if self.ended.borrow().is_some() {
            return Next::Nothing;
        }
        if self.out.waiting_bytes() > OUT_MAX {
            self.out.finish();
        }
        loop {
            return match incoming.next() {
                Ok(Some(frame)) if frame.kind == Kind::Task => {
                    // an answer that lies ready must not wait for this task, however long that takes
                    if self.out.is_waiting() {
                        self.pulse.touch();
                    }
                    // the primary has checked it, and what it sends is believed
                    let message = std::str::from_utf8(frame.body).unwrap_or_default().to_owned();
                    Next::Task(frame.id, message)
                }
                Ok(Some(frame)) if frame.kind == Kind::Drain => Next::Drain,
                Ok(Some(_)) => continue,
                Ok(None) | Err(_) => Next::Nothing,
            };
        }
    }

    /// How the worker ends when it was asked to.
    pub(super) fn drained(&self) -> Outcome {
        let usage = Usage { cpu_ms: Some(cpu_ms()), ..Usage::wall(self.started.elapsed()) };
        self.ended.take().unwrap_or_else(|| End::Exited { code: 0 }.with(usage))
    }

    /// Does one task, and says how it went.
    async fn handle(&self, id: u64, message: String) {
        let begun = Instant::now();
        self.page.begin(id);
        let idle = self.take_idle();
        let result = match self.timeout {
            None => self.attempt(idle, message).await,
            Some(timeout) => {
                let _clock = self.pulse.time();
                tokio::time::timeout(timeout, self.attempt(idle, message)).await.unwrap_or_else(|_| {
                    let end = End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") };
                    Err(end.with(Usage::wall(begun.elapsed())))
                })
            }
        };
        self.lines.settle();
        let max = self.setup.limits.message_max;
        match result {
            Ok(Answer::Reply(text) | Answer::Error(text)) if text.len() as u64 > max.0 => {
                let end = End::Limit { limit: LimitKind::Message, allowed: max.to_string() };
                self.say_ended(id, &end.with(Usage::wall(begun.elapsed())));
            }
            Ok(Answer::Reply(text)) => {
                self.out.push(Kind::Reply, id, text.as_bytes());
            }
            Ok(Answer::NoReply) => {
                self.out.push(Kind::NoReply, id, b"");
            }
            Ok(Answer::Error(text)) => {
                self.out.push(Kind::TaskError, id, text.as_bytes());
            }
            Err(outcome) => {
                self.say_ended(id, &outcome);
                // as a program that exits: the worker is gone with it
                if let End::Exited { .. } = outcome.end {
                    self.ended.borrow_mut().get_or_insert(outcome);
                }
            }
        }
        if begun.elapsed() >= PROMPT {
            // what does not go now goes later; that the primary is gone shows when it is read from
            let _ = self.out.flush();
        }
    }

    /// Hands the message to an instance, which is kept for the next one when it may be.
    pub(super) async fn attempt(&self, idle: Option<Instance>, message: String) -> Result<Answer, Outcome> {
        let mut instance = self.started(idle).await?;
        let answer = instance.handle(message).await?;
        self.keep(instance);
        Ok(answer)
    }

    /// An instance that waits for work.
    pub(super) fn take_idle(&self) -> Option<Instance> {
        self.idle.borrow_mut().pop()
    }

    /// That instance, or a new one.
    pub(super) async fn started(&self, idle: Option<Instance>) -> Result<Instance, Outcome> {
        match idle {
            Some(instance) => Ok(instance),
            None => self.sandbox.start(&self.setup).await,
        }
    }

    /// Keeps an instance that did its work well for the next, when it may be used again.
    pub(super) fn keep(&self, instance: Instance) {
        if instance.uses() < self.reuse {
            self.idle.borrow_mut().push(instance);
        }
    }

    /// Tells the primary how a task or request ended its instance.
    pub(super) fn say_ended(&self, id: u64, outcome: &Outcome) {
        self.out.push(Kind::TaskEnded, id, &serde_json::to_vec(outcome).expect("plain data has a JSON form"));
    }
}
