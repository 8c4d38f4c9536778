//! How a pool is made: what it runs, how many, within which bounds, and what its work comes from.

use std::{
    future::Future,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use super::{
    Balance, Cluster, Handle, InstanceLife, Interrupt, Order, Work,
    pool::{Client, Pool, PoolLimits},
    server::{Port, Server},
};
use crate::{
    Error,
    buffer::{self, Buffer, Named},
    child::{Compiler, ListenConfig, MEMORY_MAX, ROUTER, RunConfig, WorkerConfig, cores, entry, jail_of, with_windows},
    event::Event,
    grant::Grants,
    limits::{Bytes, CompileLimits, HttpLimits, Limits},
    message::Message,
    process::{Isolation, Process, Program, Role, body_max, names, runtime},
    sandbox::{Cache, EngineSpec, Form, Guest, Identity, Inspection, LoadError, Pool as EnginePool, Roots, Shape},
    supervisor::{EventSink, Launch, Policy, Restart, Supervisor, Watch},
};

/// What may be queued in a pool, in bytes, beside the number of tasks.
const QUEUE_BYTES: usize = 64 << 20;

/// How long a worker may take to get ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long after a task's deadline its worker is killed when it should have ended the task itself.
const BACKSTOP: Duration = Duration::from_secs(5);

/// How many requests a worker handles at once by default: they wait more than they compute.
const HTTP_CONCURRENCY: u32 = 64;

/// How to make a pool.
#[derive(Debug, Clone)]
#[must_use = "no pool is there before it is started"]
pub struct Builder {
    guest: PathBuf,
    /// The guest, when it was read already: then no reload brings another.
    read: Option<Arc<Guest>>,
    workers: u32,
    compiler: Compiler,
    cache: Cache,
    grants: Grants,
    pub(super) limits: Limits,
    data: Message,
    life: Option<InstanceLife>,
    reuse: Option<u64>,
    interrupt: Interrupt,
    concurrency: Option<u32>,
    pub(super) queue: usize,
    retries: u32,
    restart: Restart,
    heartbeat: Duration,
    grace: Duration,
    listen: Option<SocketAddr>,
    http: HttpLimits,
    balance: Balance,
    access_log: bool,
    trusted: Vec<IpNet>,
    probe: Option<String>,
    requests_max: Option<u64>,
    process_memory_max: Option<Bytes>,
    buffers: Named,
    /// Whether connections come from a router, and not from a port of its own.
    is_routed: bool,
    /// How a command answers requests, when it is to be one.
    command: Option<RunConfig>,
}

impl Builder {
    pub(super) fn new(guest: PathBuf) -> Self {
        Self {
            guest,
            read: None,
            workers: cores(),
            compiler: Compiler {
                program: Program::Own,
                isolation: Isolation::Process,
                limits: CompileLimits::default(),
            },
            cache: Cache::at(None),
            grants: Grants::default(),
            limits: Limits::of_a_task(),
            data: Message::null(),
            life: None,
            reuse: None,
            interrupt: Interrupt::default(),
            concurrency: None,
            queue: 1024,
            retries: 0,
            restart: Restart::default(),
            heartbeat: Duration::from_secs(5),
            grace: Duration::from_secs(10),
            listen: None,
            http: HttpLimits::default(),
            balance: Balance::default(),
            access_log: false,
            trusted: vec![],
            probe: None,
            requests_max: None,
            process_memory_max: None,
            buffers: vec![],
            is_routed: false,
            command: None,
        }
    }

    /// What apps of a folder are made of, each with a guest of its own: one worker.
    pub fn for_apps() -> Self {
        Self::new(PathBuf::new()).workers(1)
    }

    /// How many worker processes; default one per core.
    pub fn workers(mut self, workers: u32) -> Self {
        self.workers = workers;
        self
    }

    /// The program that workers are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.compiler.program = Program::At(path.into());
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

    /// What is between a worker and the host; default [`Isolation::Process`]. A pool has no [`Isolation::Thread`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.compiler.isolation = isolation;
        self
    }

    /// What bounds the compilation of its guest.
    pub fn compile_limits(mut self, limits: CompileLimits) -> Self {
        self.compiler.limits = limits;
        self
    }

    /// What `worker.get-data` answers; default `null`.
    pub fn data(mut self, data: Message) -> Self {
        self.data = data;
        self
    }

    /// What an instance lives for; default the worker for handlers, one request for http guests.
    pub fn instance(mut self, life: InstanceLife) -> Self {
        self.life = Some(life);
        self
    }

    /// For how many tasks or requests an instance is used that lives as long as its worker; default no end.
    pub fn reuse(mut self, uses: u64) -> Self {
        self.reuse = Some(uses);
        self
    }

    /// How a task that is out of time is ended; default [`Interrupt::Auto`].
    pub fn interrupt(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// How many tasks or requests a worker handles at once, each in an instance of its own; default 1 for handlers and
    /// 64 for http guests. More is for guests that wait, not for those that compute: a worker has one thread.
    pub fn concurrency(mut self, tasks: u32) -> Self {
        self.concurrency = Some(tasks);
        self
    }

    /// How many tasks may wait in the pool; default 1,024, and never more than 64 MiB. Of a pool that serves a port, how
    /// many requests may wait in all its workers; with 0, what cannot run at once is refused.
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

    /// Serves a port: http guests answer its requests, handlers the messages that are posted to it. Port 0 is any that is
    /// free, see [`Cluster::address`].
    ///
    /// ```standalone_crate
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::io::{Read, Write};
    /// use wrun::Cluster;
    ///
    /// wrun::init(); // workers are this program, started again
    /// # let guest = guest_artifacts::HELLO_HTTP;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    /// # rt.block_on(async {
    /// let site = Cluster::builder(guest).workers(2).listen("127.0.0.1:0".parse()?).start().await?;
    ///
    /// let mut client = std::net::TcpStream::connect(site.address().expect("it listens"))?;
    /// client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    /// let mut response = String::new();
    /// client.read_to_string(&mut response)?;
    /// assert!(response.ends_with("\"generation\":1}"), "{response}");
    ///
    /// site.reload().await?; // no request is lost
    /// site.shutdown().await?; // what is in flight is finished
    /// # Ok(()) })
    /// # }
    /// ```
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = Some(address);
        self
    }

    /// What bounds the clients of the port.
    pub fn http(mut self, limits: HttpLimits) -> Self {
        self.http = limits;
        self
    }

    /// How connections get to the workers; default [`Balance::Shared`].
    pub fn balance(mut self, balance: Balance) -> Self {
        self.balance = balance;
        self
    }

    /// Tells of each request, as [`Event::Access`]; default not.
    pub fn access_log(mut self, wanted: bool) -> Self {
        self.access_log = wanted;
        self
    }

    /// Whose `x-forwarded-*`, `forwarded` and `x-request-id` headers are believed; default nobody's, and they are
    /// removed.
    pub fn trust_proxies(mut self, proxies: impl IntoIterator<Item = IpNet>) -> Self {
        self.trusted = proxies.into_iter().collect();
        self
    }

    /// A path that each worker asks its guest for before it is ready; another answer than a success is a failed start.
    pub fn probe(mut self, path: impl Into<String>) -> Self {
        self.probe = Some(path.into());
        self
    }

    /// After how many requests a worker is replaced, without losing one; default never.
    pub fn requests_max(mut self, requests: u64) -> Self {
        self.requests_max = Some(requests);
        self
    }

    /// At how much memory of its process a worker of a port is replaced, without losing a request; default never. It is
    /// looked at five times within the heartbeat time.
    pub fn process_memory_max(mut self, memory: Bytes) -> Self {
        self.process_memory_max = Some(memory);
        self
    }

    /// Lets guests have windows of a buffer, under this name: ranges of it in their own memories, which are not copied for
    /// that. One of the same name is replaced. See `wrun:guest/window`.
    ///
    /// ```standalone_crate
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use wrun::{Buffer, Cluster, message::Message, outcome::Answer};
    ///
    /// wrun::init();
    /// # let guest = guest_artifacts::WORDCOUNT;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    /// # rt.block_on(async {
    /// let text = Buffer::from_slice(b"so many words\nin one buffer\n")?;
    /// let pool = Cluster::builder(guest).workers(2).buffer("input", &text).start().await?;
    /// let answer = pool.request(Message::parse(r#"{"chunk":0,"offset":0,"length":14}"#)?).await?;
    /// # let Answer::Reply(reply) = answer else { panic!("{answer:?}") };
    /// assert_eq!(reply.as_str(), r#"{"lines":1,"words":3,"bytes":14}"#);
    /// # Ok(()) })
    /// # }
    /// ```
    pub fn buffer(mut self, name: impl Into<String>, buffer: &Buffer) -> Self {
        buffer::add(&mut self.buffers, name.into(), buffer);
        self
    }

    /// Starts the pool on a thread of its own, and waits until its guest is compiled and its first worker is ready.
    ///
    /// # Errors
    /// When the guest cannot be loaded or is of no shape that can be served, something granted is not there, the
    /// address cannot be listened on, no worker gets ready, or [`init`](crate::init) was not called first.
    pub async fn start(self) -> Result<Cluster, Error> {
        let (started, ready) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("wrun-pool".into())
            .spawn(move || {
                let runtime = match runtime() {
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
    /// A task then costs no more than the wake-ups of the worker and of this thread.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub async fn start_here(self) -> Result<(Cluster, impl Future<Output = Result<(), Error>>), Error> {
        let (events, _) = broadcast::channel(1024);
        let (orders, ordered) = mpsc::unbounded_channel();
        let (online, mut first) = mpsc::unbounded_channel::<()>();
        let told = events.clone();
        let sink: EventSink = Box::new(move |event| {
            if matches!(event, Event::Online { .. }) {
                let _ = online.send(());
            }
            // nobody may be listening
            let _ = told.send(event);
        });
        let work;
        let mut run: Pin<Box<dyn Future<Output = Result<(), Error>>>> = if self.listen.is_some() {
            let server = self.server(ordered, sink).await?;
            work = server.address().map_or_else(|| unreachable!("it listens"), Work::Port);
            Box::pin(async move { server.run().await.map(drop) })
        } else {
            let (tasks, submitted) = mpsc::channel(self.queue.max(1));
            work = Work::Tasks(tasks);
            let mut pool = self.pool(Handle { submitted, ordered, finished: vec![] }, sink).await?;
            Box::pin(async move { pool.run().await.map(drop).map_err(Error::of_pool) })
        };
        tokio::select! {
            ended = &mut run => return Err(ended.err().unwrap_or(Error::Stopped)),
            _ = first.recv() => {}
        }
        Ok((Cluster { work, orders: Some(orders), events, thread: None }, run))
    }

    /// Takes the port, compiles the guest and makes what serves it; its workers start when it runs.
    pub(super) async fn server(
        self,
        orders: mpsc::UnboundedReceiver<Order>,
        events: EventSink,
    ) -> Result<Server, Error> {
        let address = self.listen.ok_or_else(|| Error::Usage("expected an address to listen on".into()))?;
        self.check()?;
        let port = Arc::new(Port::bind(address, self.balance, self.workers)?);
        let launch = self.launch(Some(port.clone())).await?;
        let supervisor = Supervisor::new(self.workers, self.watch(), launch, events);
        Ok(Server::new(supervisor, port, self, orders))
    }

    /// A pool of a guest that was read already.
    pub(in crate::mode) fn with_guest(mut self, guest: Arc<Guest>) -> Self {
        self.read = Some(guest);
        self
    }

    /// What bounds each instance and each task, so far.
    pub(in crate::mode) fn current_limits(&self) -> &Limits {
        &self.limits
    }

    /// How long work in flight may take after a polite stop, so far.
    pub(in crate::mode) fn current_grace(&self) -> Duration {
        self.grace
    }

    /// A pool of a command, one run of which answers each request that a router sends.
    pub(in crate::mode) fn with_command(mut self, command: RunConfig) -> Self {
        self.command = Some(command);
        self
    }

    /// How many worker processes, so far.
    pub(in crate::mode) fn current_workers(&self) -> u32 {
        self.workers
    }

    /// Compiles the guest, and serves the connections that come over the workers' end of a router's channel, until the
    /// pool is stopped. It compiles when `compiling` has room.
    ///
    /// # Errors
    /// As [`Builder::start`], or when every worker failed.
    pub(in crate::mode) async fn serve_channel(
        mut self,
        channel: OwnedFd,
        orders: mpsc::UnboundedReceiver<Order>,
        events: EventSink,
        compiling: &Semaphore,
    ) -> Result<(), Error> {
        (self.is_routed, self.listen) = (true, None);
        // how long clients may pause the router sees to; its own connections may lie idle
        self.http.idle_timeout = self.http.idle_timeout.max(HttpLimits::default().idle_timeout);
        // whoever the router speaks for, it says
        self.trusted.push(IpNet::from(ROUTER));
        self.check()?;
        let port = Arc::new(Port::of_channel(channel, self.workers)?);
        let turn = compiling.acquire().await;
        let launch = self.launch(Some(port.clone())).await?;
        drop(turn);
        let supervisor = Supervisor::new(self.workers, self.watch(), launch, events);
        Server::new(supervisor, port, self, orders).run().await.map(drop)
    }

    /// Compiles the guest and makes the pool; its workers start when it runs.
    pub(super) async fn pool<C: Client>(self, client: C, events: EventSink) -> Result<Pool<C>, Error> {
        self.check()?;
        let launch = self.launch(None).await?;
        let supervisor = Supervisor::new(self.workers, self.watch(), launch, events);
        let concurrency = self.concurrency.unwrap_or(1);
        let bounds = PoolLimits {
            queue: self.queue.max(1),
            queue_bytes: QUEUE_BYTES,
            retries: self.retries,
            kill_after: self.limits.timeout.map(
                |timeout| {
                    if self.epoch_checks() { timeout + BACKSTOP } else { timeout }
                },
            ),
        };
        Ok(Pool::new(supervisor, self.workers, concurrency, self.limits, bounds, client))
    }

    /// What the guest is, as a child says; none when wrun knows no way to run it.
    pub(super) async fn shape(&self) -> Result<Option<Shape>, Error> {
        let guest = Guest::read(&self.guest)?;
        for listen in [None, Some(SocketAddr::from(([127, 0, 0, 1], 0)))] {
            let spec = Self { listen, ..self.clone() }.engine(1);
            if let Some(code) = entry(&self.cache, spec, &guest)?.as_deref().and_then(Cache::find) {
                return Ok(code.inspection.shape);
            }
        }
        self.compiler.shape(&guest).await
    }

    fn watch(&self) -> Watch {
        Watch {
            policy: Policy { restart: self.restart, ..Policy::default() },
            heartbeat: self.heartbeat,
            ready_within: READY_WITHIN,
            grace: self.grace,
            memory_max: self.process_memory_max.filter(|_| self.has_clients()),
        }
    }

    /// Whether it serves clients, and not tasks.
    fn has_clients(&self) -> bool {
        self.is_routed || self.listen.is_some()
    }

    /// Whether guests are compiled with checks. Those of a port are: to end one that is out of time with its worker
    /// would end the connections of others, too.
    fn epoch_checks(&self) -> bool {
        match self.interrupt {
            _ if self.has_clients() => true,
            Interrupt::Kill => false,
            Interrupt::Epoch => true,
            Interrupt::Auto => self.concurrency.is_some_and(|tasks| tasks > 1),
        }
    }

    fn engine(&self, concurrency: u32) -> EngineSpec {
        EngineSpec {
            epoch_checks: self.epoch_checks(),
            fuel: self.limits.fuel.is_some(),
            stack: self.limits.stack,
            pool: Some(EnginePool { instances: concurrency, memory: self.limits.memory }),
        }
    }

    /// Compiles the guest as it is now: what makes workers of it, for a port or for tasks.
    pub(super) async fn launch(&self, port: Option<Arc<Port>>) -> Result<Launch, Error> {
        let guest = match &self.read {
            Some(guest) => guest.clone(),
            None => Arc::new(Guest::read(&self.guest)?),
        };
        let name = guest.name.clone();
        let spec = self.engine(1);
        let entry = entry(&self.cache, spec, &guest)?;
        let (code, _) = self.compiler.load(entry.as_deref(), spec, &guest).await?;
        let inspection = code.inspection.clone();
        self.check_guest(&inspection, port.is_some())?;
        let found = inspection.shape;
        let concurrency = self.concurrency.unwrap_or(if found == Some(Shape::Http) { HTTP_CONCURRENCY } else { 1 });
        let life = match self.life {
            Some(life) => life,
            None if found == Some(Shape::Handler) || self.reuse.is_some() => InstanceLife::Worker,
            None => InstanceLife::Task,
        };
        let engine = self.engine(concurrency);
        let listen = port.as_ref().map(|port| ListenConfig {
            is_routed: port.address().is_none(),
            http: self.http.clone(),
            queue: u32::try_from(self.queue.div_ceil(self.workers as usize)).unwrap_or(u32::MAX),
            access_log: self.access_log,
            trusted: self.trusted.clone(),
            probe: self.probe.clone(),
            requests_max: self.requests_max,
            command: self.command.clone(),
        });
        let size = code.size().map_err(Error::io("look at the compiled guest"))?;
        let mut jail = jail_of(
            self.compiler.isolation,
            (&self.grants, &self.limits),
            (&engine, concurrency),
            (&inspection, size),
            listen.as_ref(),
        );
        if let Some(command) = &self.command {
            // each may have to be copied once while it grows
            let bytes = self.http.body.0.saturating_add(command.stdout_max.0).saturating_mul(2);
            let all = bytes.saturating_mul(concurrency.into());
            jail.bounds.data = Bytes(jail.bounds.data.0.saturating_add(all));
        }
        let buffers = self.buffers.clone();
        if !buffers.is_empty() {
            with_windows(&mut jail, buffers.len(), concurrency, self.limits.memory);
        }
        let mut config = WorkerConfig {
            engine,
            inspection,
            grants: self.grants.clone(),
            roots: Roots::of_environment(),
            limits: self.limits.clone(),
            identity: Identity { id: 0, count: self.workers, generation: 0, name, process: true },
            data: self.data.clone(),
            reuse: match life {
                InstanceLife::Task => 1,
                InstanceLife::Worker => self.reuse.unwrap_or(u64::MAX),
            },
            concurrency,
            beat: self.heartbeat / 10,
            buffers: buffer::names(&buffers),
            listen,
            jail,
        };
        let body_max = body_max(self.limits.message_max);
        let program = self.compiler.program.clone();
        Ok(Box::new(move |worker, generation| {
            (config.identity.id, config.identity.generation) = (worker, generation);
            let names = names::answer(&config.grants)?;
            let start = |fds: &[BorrowedFd<'_>]| {
                let fds = fds.iter().copied().chain(buffer::descriptors(&buffers));
                let fds: Vec<_> = fds.chain(names.as_ref().map(AsFd::as_fd)).collect();
                Process::start(&program, Role::Worker, &config, &fds, body_max)
            };
            match &port {
                None => start(&[code.as_fd()]),
                Some(port) => {
                    port.with_listener(worker, |listener| start(&[code.as_fd(), port.board().as_fd(), listener]))
                }
            }
        }))
    }

    /// Sees that a guest can do what the pool is for: answer requests, or tasks.
    ///
    /// # Errors
    /// Says what does not fit.
    pub(in crate::mode) fn check_guest(&self, inspection: &Inspection, is_port: bool) -> Result<(), Error> {
        let (found, form) = (inspection.shape, inspection.form);
        let fits = match found {
            _ if self.command.is_some() => found == Some(Shape::Command) && !inspection.has_threads(),
            Some(Shape::Handler) => form == Form::Component,
            Some(Shape::Http) => form == Form::Component && is_port,
            _ => false,
        };
        if !fits {
            let expected = match is_port {
                _ if self.command.is_some() => Shape::Command,
                true => Shape::Http,
                false => Shape::Handler,
            };
            return Err(LoadError::WrongShape { expected, found, form }.into());
        }
        let needs = Bytes(inspection.memory_min);
        if needs > self.limits.memory {
            return Err(LoadError::NeedsMemory { needs, limit: self.limits.memory }.into());
        }
        if found != Some(Shape::Http)
            && let (Some(_), Some(shape)) = (&self.probe, found)
        {
            return Err(Error::Usage(format!("a {shape} has no path that could be probed")));
        }
        Ok(())
    }

    /// Sees that what is granted is there.
    ///
    /// # Errors
    /// Names the grant that is not.
    pub(in crate::mode) fn check_grants(&self) -> Result<(), Error> {
        Ok(self.grants.check().map_err(LoadError::from)?)
    }

    fn check(&self) -> Result<(), Error> {
        let usage = |text: &str| Err(Error::Usage(text.into()));
        if !self.compiler.program.is_prepared() {
            return usage("call `wrun::init()` first thing in `main`: workers are this program, started again");
        }
        if self.compiler.isolation == Isolation::Thread {
            return usage("the workers of a pool are processes: expected `process` or `jail` for their isolation");
        }
        let concurrency = self.concurrency.unwrap_or(1);
        if self.workers == 0 || concurrency == 0 {
            return usage("expected at least one worker and one task at once");
        }
        if self.interrupt == Interrupt::Kill && self.has_clients() {
            return usage("`kill` would end all the connections of a worker: use `epoch` when it serves a port");
        }
        if concurrency > 1 && self.interrupt == Interrupt::Kill {
            return usage("`kill` would end all the tasks of a worker: use `epoch` when it handles several at once");
        }
        buffer::check(&self.buffers).map_err(Error::Usage)?;
        if self.limits.memory > MEMORY_MAX {
            return Err(Error::Usage(format!("expected at most {MEMORY_MAX} of memory for one instance")));
        }
        if self.heartbeat < Duration::from_millis(10) {
            return usage("expected a heartbeat of 10ms or more");
        }
        if self.reuse == Some(0) || (self.reuse.is_some() && self.life == Some(InstanceLife::Task)) {
            return usage("expected a number of uses above 0, of an instance that lives as long as its worker");
        }
        if self.http.head < Bytes(256) || self.http.head > Bytes::mib(1) {
            return usage("expected 256B to 1MiB for the head of a request");
        }
        let times = [self.http.head_timeout, self.http.idle_timeout, self.http.write_timeout];
        if times.iter().any(Duration::is_zero) || self.http.connections == 0 {
            return usage("expected times and a number of connections above 0 for the clients of a port");
        }
        if self.probe.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return usage("expected a path that starts with `/` for the probe");
        }
        self.check_grants()
    }
}
