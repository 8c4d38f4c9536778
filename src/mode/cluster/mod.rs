//! `wrun cluster`: a handler guest as a pool of supervised worker processes.
//!
//! [`Cluster`] is the pool for programs, [`lines`] the one that eats and prints JSON lines. Both are the same pool with
//! another client.

mod dispatch;
pub mod lines;
mod pool;

use std::{
    future::Future,
    os::fd::AsFd,
    path::PathBuf,
    task::{Context, Poll},
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::{broadcast, mpsc, oneshot};

pub use self::pool::Answer;
use self::pool::{Client, Pool, PoolLimits, Request, Stop};
use crate::{
    Error,
    child::{WorkerConfig, compile_aside},
    event::Event,
    grant::Grants,
    limits::{Bytes, Limits},
    message::Message,
    process::{Process, Program, Role},
    sandbox::{Cache, Code, EngineSpec, Form, Guest, Identity, LoadError, Pool as EnginePool, Shape},
    supervisor::{EventSink, Policy, Restart, Supervisor, Watch},
};

/// What may be queued in a pool, in bytes, beside the number of tasks.
const QUEUE_BYTES: usize = 64 << 20;

/// How long a worker may take to get ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long after a task's deadline its worker is killed when it should have ended the task itself.
const BACKSTOP: Duration = Duration::from_secs(5);

/// The most memory of one instance: what a 32-bit guest can address.
const MEMORY_MAX: Bytes = Bytes::mib(4096);

/// What a frame may have beyond the longest message: outcomes with their backtraces, lines.
const FRAME_SLACK: u32 = 128 << 10;

/// What an instance lives for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InstanceLife {
    /// The worker: what it keeps in memory is there for the next task.
    #[default]
    Worker,
    /// One task.
    Task,
}

/// How a task that is out of time is ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Interrupt {
    /// With its worker. The guest is compiled without checks, so its loops run at full speed.
    Kill,
    /// By checks that are compiled into it: the worker lives on, tight loops are slower.
    Epoch,
    /// [`Interrupt::Epoch`] when a worker handles several tasks at once, else [`Interrupt::Kill`].
    #[default]
    Auto,
}

/// How to make a pool.
#[derive(Debug, Clone)]
#[must_use = "no pool is there before it is started"]
pub struct Builder {
    guest: PathBuf,
    workers: u32,
    program: Program,
    cache: Cache,
    grants: Grants,
    limits: Limits,
    data: Message,
    life: InstanceLife,
    interrupt: Interrupt,
    concurrency: u32,
    queue: usize,
    retries: u32,
    restart: Restart,
    heartbeat: Duration,
    grace: Duration,
}

impl Builder {
    fn new(guest: PathBuf) -> Self {
        Self {
            guest,
            workers: std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1)),
            program: Program::Own,
            cache: Cache::at(None),
            grants: Grants::default(),
            limits: Limits::of_a_task(),
            data: Message::null(),
            life: InstanceLife::default(),
            interrupt: Interrupt::default(),
            concurrency: 1,
            queue: 1024,
            retries: 0,
            restart: Restart::default(),
            heartbeat: Duration::from_secs(5),
            grace: Duration::from_secs(10),
        }
    }

    /// How many worker processes; default one per core.
    pub fn workers(mut self, workers: u32) -> Self {
        self.workers = workers;
        self
    }

    /// The program that workers are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Program::At(path.into());
        self
    }

    /// Where compiled code is kept; default the user's cache folder.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// What the guest may touch; default nothing.
    pub fn grants(mut self, grants: Grants) -> Self {
        self.grants = grants;
        self
    }

    /// What bounds each instance and each task; default [`Limits::of_a_task`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// What `worker.get-data` answers; default `null`.
    pub fn data(mut self, data: Message) -> Self {
        self.data = data;
        self
    }

    /// What an instance lives for; default the worker.
    pub fn instance(mut self, life: InstanceLife) -> Self {
        self.life = life;
        self
    }

    /// How a task that is out of time is ended; default [`Interrupt::Auto`].
    pub fn interrupt(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// How many tasks a worker handles at once, each in an instance of its own; default 1. More is for guests that
    /// wait, not for those that compute: a worker has one thread.
    pub fn concurrency(mut self, tasks: u32) -> Self {
        self.concurrency = tasks;
        self
    }

    /// How many tasks may wait in the pool; default 1,024, and never more than 64 MiB.
    pub fn queue(mut self, tasks: usize) -> Self {
        self.queue = tasks;
        self
    }

    /// How often a task is tried again when its worker dies; default 0. Only for tasks that may be done twice.
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// When a dead worker is replaced; default always.
    pub fn restart(mut self, restart: Restart) -> Self {
        self.restart = restart;
        self
    }

    /// How long a worker may go without a heartbeat before it is replaced; default 5 s.
    pub fn heartbeat(mut self, time: Duration) -> Self {
        self.heartbeat = time;
        self
    }

    /// How long work in flight may take after a polite stop; default 10 s.
    pub fn grace(mut self, time: Duration) -> Self {
        self.grace = time;
        self
    }

    /// Starts the pool on a thread of its own, and waits until its guest is compiled and its first worker is ready.
    ///
    /// # Errors
    /// When the guest cannot be loaded or is no handler, something granted is not there, no worker gets ready, or
    /// [`init`](crate::init) was not called first.
    pub async fn start(self) -> Result<Cluster, Error> {
        let (started, ready) = oneshot::channel();
        // The kernel ends workers together with the thread that made them, so that thread is the pool's own.
        let thread = std::thread::Builder::new()
            .name("wrun-pool".into())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = match runtime.map_err(Error::io("start the runtime")) {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return Ok(());
                    }
                };
                runtime.block_on(async {
                    match self.start_here().await {
                        Ok((cluster, run)) => {
                            let _ = started.send(Ok(cluster));
                            run.await
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                            Ok(())
                        }
                    }
                })
            })
            .map_err(Error::io("start the pool's thread"))?;
        let mut cluster = ready.await.map_err(|_| Error::Stopped)??;
        cluster.thread = Some(thread);
        Ok(cluster)
    }

    /// As [`Builder::start`], for a program that lets the pool run on its own thread: nothing moves unless the future
    /// that comes with it is polled. It resolves when the pool has ended.
    ///
    /// A task then costs no more than the wake-ups of the worker and of this thread. But the kernel ends the workers
    /// together with this thread, so it must live as long as they are wanted.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub async fn start_here(self) -> Result<(Cluster, impl Future<Output = Result<(), Error>>), Error> {
        let (tasks, submitted) = mpsc::channel(self.queue.max(1));
        let (events, _) = broadcast::channel(1024);
        let (stop, stopped) = mpsc::unbounded_channel();
        let (online, mut first) = mpsc::unbounded_channel::<()>();
        let told = events.clone();
        let sink: EventSink = Box::new(move |event| {
            if matches!(event, Event::Online { .. }) {
                let _ = online.send(());
            }
            // nobody may be listening
            let _ = told.send(event);
        });
        let mut pool = self.pool(Handle { submitted, stopped, finished: vec![] }, sink).await?;
        let mut run = Box::pin(async move { pool.run().await.map(drop).map_err(Error::of_pool) });
        tokio::select! {
            ended = &mut run => return Err(ended.err().unwrap_or(Error::Stopped)),
            _ = first.recv() => {}
        }
        Ok((Cluster { tasks, stop: Some(stop), events, thread: None }, run))
    }

    /// Compiles the guest and makes the pool; its workers start when it runs.
    async fn pool<C: Client>(self, client: C, events: EventSink) -> Result<Pool<C>, Error> {
        self.check()?;
        let epoch = match self.interrupt {
            Interrupt::Kill => false,
            Interrupt::Epoch => true,
            Interrupt::Auto => self.concurrency > 1,
        };
        let engine = EngineSpec {
            epoch_checks: epoch,
            fuel: self.limits.fuel.is_some(),
            stack: self.limits.stack,
            pool: Some(EnginePool { instances: self.concurrency, memory: self.limits.memory }),
        };
        let guest = Guest::read(&self.guest)?;
        let name = guest.name.clone();
        let code = compile_aside(&self.program, &self.cache, engine, guest).await?;
        let inspection = code.inspection.clone();
        if (inspection.shape, inspection.form) != (Some(Shape::Handler), Form::Component) {
            let (found, form) = (inspection.shape, inspection.form);
            return Err(LoadError::WrongShape { expected: Shape::Handler, found, form }.into());
        }
        let needs = Bytes(inspection.memory_min);
        if needs > self.limits.memory {
            return Err(LoadError::NeedsMemory { needs, limit: self.limits.memory }.into());
        }
        let body_max = u32::try_from(self.limits.message_max.0).unwrap_or(u32::MAX).saturating_add(FRAME_SLACK);
        let watch = Watch {
            policy: Policy { restart: self.restart, ..Policy::default() },
            heartbeat: self.heartbeat,
            ready_within: READY_WITHIN,
            grace: self.grace,
        };
        let pool = PoolLimits {
            queue: self.queue.max(1),
            queue_bytes: QUEUE_BYTES,
            retries: self.retries,
            kill_after: self.limits.timeout.map(|timeout| if epoch { timeout + BACKSTOP } else { timeout }),
        };
        let mut config = WorkerConfig {
            engine,
            inspection,
            grants: self.grants,
            limits: self.limits.clone(),
            identity: Identity { id: 0, count: self.workers, generation: 0, name, process: true },
            data: self.data,
            fresh: self.life == InstanceLife::Task,
            concurrency: self.concurrency,
            beat: self.heartbeat / 10,
        };
        let program = self.program;
        let launch = move |worker, generation| {
            (config.identity.id, config.identity.generation) = (worker, generation);
            launch(&program, &config, &code, body_max)
        };
        let supervisor = Supervisor::new(self.workers, watch, Box::new(launch), events);
        Ok(Pool::new(supervisor, self.workers, self.concurrency, self.limits, pool, client))
    }

    fn check(&self) -> Result<(), Error> {
        let usage = |text: &str| Err(Error::Usage(text.into()));
        if !self.program.is_prepared() {
            return usage("call `wrun::init()` first thing in `main`: workers are this program, started again");
        }
        if self.workers == 0 || self.concurrency == 0 {
            return usage("expected at least one worker and one task at once");
        }
        if self.concurrency > 1 && self.interrupt == Interrupt::Kill {
            return usage("`kill` would end all the tasks of a worker: use `epoch` when it handles several at once");
        }
        if self.limits.memory > MEMORY_MAX {
            return Err(Error::Usage(format!("expected at most {MEMORY_MAX} of memory for one instance")));
        }
        if self.heartbeat < Duration::from_millis(10) {
            return usage("expected a heartbeat of 10ms or more");
        }
        Ok(self.grants.check().map_err(LoadError::from)?)
    }
}

fn launch(program: &Program, config: &WorkerConfig, code: &Code, body_max: u32) -> std::io::Result<Process> {
    Process::start(program, Role::Worker, config, &[code.as_fd()], body_max)
}

/// A running pool of workers. Dropping it ends them at once; [`Cluster::shutdown`] lets them finish.
///
/// ```standalone_crate
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use wrun::{Cluster, cluster::Answer, event::Event, message::Message};
///
/// wrun::init(); // workers are this program, started again
/// # let guest = guest_artifacts::WHOAMI;
/// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # rt.block_on(async {
/// let cluster = Cluster::builder(guest).workers(2).data(Message::of(&42)?).start().await?;
/// let mut events = cluster.events();
///
/// #[derive(serde::Deserialize)]
/// struct Who {
///     pid: i32,
///     data: u32,
/// }
/// let Answer::Reply(reply) = cluster.request(Message::null()).await? else { panic!("whoami replies") };
/// let who: Who = reply.to()?;
/// assert_eq!(who.data, 42);
///
/// // A worker that dies is replaced.
/// # let pid = rustix::process::Pid::from_raw(who.pid).expect("a process");
/// rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
/// while !matches!(events.recv().await?, Event::Exit { .. }) {}
/// while !matches!(events.recv().await?, Event::Restart { .. }) {}
/// assert!(matches!(cluster.request(Message::null()).await?, Answer::Reply(_)));
///
/// cluster.shutdown().await?;
/// # Ok(()) })
/// # }
/// ```
#[derive(Debug)]
pub struct Cluster {
    tasks: mpsc::Sender<(oneshot::Sender<Answer>, Message)>,
    /// Taken by a shutdown; a drop without one stops the pool at once.
    stop: Option<mpsc::UnboundedSender<Stop>>,
    events: broadcast::Sender<Event>,
    /// Where the pool runs, when that is a thread of its own.
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Cluster {
    /// A pool of the guest in a file: one worker per core, no grants, the default limits.
    pub fn builder(guest: impl Into<PathBuf>) -> Builder {
        Builder::new(guest.into())
    }

    /// Gives the pool a task, and waits for its answer. Waits for room first when the pool's queue is full.
    ///
    /// Cancel-safe before the pool has taken the task; after that a dropped request is answered to nobody.
    ///
    /// # Errors
    /// When the pool has stopped.
    pub async fn request(&self, message: Message) -> Result<Answer, Error> {
        let (ticket, answer) = oneshot::channel();
        self.tasks.send((ticket, message)).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)
    }

    /// What happens from now on. A receiver that falls 1,024 events behind is told how many it has missed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Takes no more tasks, waits until those that were begun are answered, for at most the grace time, and ends the
    /// workers. Requests that were not begun are answered with a cancelled outcome.
    ///
    /// Of a pool that runs on the caller's thread ([`Builder::start_here`]) it only asks: that one's future tells.
    ///
    /// # Errors
    /// When every worker had failed.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(Stop::Politely);
        }
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let joined = tokio::task::spawn_blocking(|| thread.join()).await;
        match joined {
            Ok(Ok(ended)) => ended,
            _ => Err(Error::Stopped),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(Stop::Now);
        }
        if let Some(thread) = self.thread.take() {
            // takes as long as the kernel needs to end the workers
            let _ = thread.join();
        }
    }
}

/// The pool's side of a [`Cluster`].
struct Handle {
    submitted: mpsc::Receiver<(oneshot::Sender<Answer>, Message)>,
    stopped: mpsc::UnboundedReceiver<Stop>,
    finished: Vec<(oneshot::Sender<Answer>, Answer)>,
}

impl Client for Handle {
    type Ticket = oneshot::Sender<Answer>;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Request<Self::Ticket>> {
        self.submitted.poll_recv(cx).map(|submitted| match submitted {
            Some((ticket, message)) => Request::Task(ticket, message),
            None => Request::Finish,
        })
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stop> {
        match self.stopped.poll_recv(cx) {
            Poll::Ready(Some(stop)) => Poll::Ready(stop),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    fn poll_has_room(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn complete(&mut self, ticket: Self::Ticket, answer: Answer, _: u32) {
        self.finished.push((ticket, answer));
    }

    fn flush(&mut self) {
        for (ticket, answer) in self.finished.drain(..) {
            // whoever asked may have gone
            let _ = ticket.send(answer);
        }
    }
}
