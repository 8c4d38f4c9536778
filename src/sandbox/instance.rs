//! One started guest with its own store: the calls into it, and how they end.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use hyper::{Request, body::Body};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
    process::Signal,
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use wasmtime::{
    AsContextMut, Engine, ExternType, GcHeapOutOfMemory, ResourceLimiter, Store, Trap, UpdateDeadline, WasmBacktrace,
    component::{Linker, ResourceTable, ResourceTableError},
};
use wasmtime_wasi::{
    FsPerms, I32Exit, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView, p1::WasiP1Ctx, p2::pipe::MemoryInputPipe,
    sockets::SocketAddrUse,
};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView, p2::bindings::Proxy};

use crate::{
    grant::{GrantError, Grants},
    limits::{self, Limits},
    message::Message,
    outcome::{End, LimitKind, Outcome, Stage, Usage, millis},
    sandbox::{
        Form, Identity, LoadError, Mailbox, Program, Stdio,
        engine::{CORE_INSTANCES_MAX, MEMORIES_MAX, TABLE_ELEMENTS_MAX, TABLES_MAX},
        guest,
        host::{
            BodyError, Network, Outbound, Respond, Scheme, Sockets,
            bindings::{HandlerGuest, wrun::guest as wit},
            link_outbound, link_sockets, link_window,
        },
        stdio::{Output, ReaderGone},
        window::{Buffers, Windows},
    },
};

/// After so much fuel a guest gives way that sees to its own time: less than a millisecond of computation, beside which that
/// costs nothing.
const FUEL_SLICE: u64 = 500_000;

/// What an instance is started with.
#[derive(Clone)]
pub(crate) struct Setup {
    /// What it may touch.
    pub(crate) grants: Grants,
    /// What bounds it.
    pub(crate) limits: Limits,
    /// Who it is.
    pub(crate) identity: Identity,
    /// What `worker.get-data` answers.
    pub(crate) data: Message,
    /// Its arguments, its own name first.
    pub(crate) args: Vec<String>,
    /// Its standard streams.
    pub(crate) stdio: Stdio,
    /// Its line to its parent; none = there is nobody.
    pub(crate) mailbox: Option<Arc<dyn Mailbox>>,
    /// The folder that it starts in; none = it has none.
    pub(crate) cwd: Option<Arc<OpenCwd>>,
    /// Whether others wait for the thread that it runs on: then what blocks is done on another one.
    pub(crate) shares_thread: bool,
    /// Whether a run sees to its time limit, and then knows what it used: one that gives way when its fuel is metered, or at
    /// the ticks of its engine. Whoever started it must see to it none the less: what blocks the thread gives way to nobody.
    pub(crate) ends_itself: bool,
    /// The longest head of a request that its port lets through; 0 without a port.
    pub(crate) head_max: limits::Bytes,
    /// What it reaches of the network.
    pub(crate) network: Arc<Network>,
    /// What it can have windows of.
    pub(crate) buffers: Arc<Buffers>,
}

/// The folder that a guest starts in, which lies in one that was granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cwd {
    /// Its name in the guest.
    pub(crate) guest: String,
    /// The folder that was granted.
    pub(crate) root: PathBuf,
    /// The way from there.
    pub(crate) rest: PathBuf,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
}

impl Cwd {
    /// Opens it: the very folder that is found is the guest's, whatever becomes of its name.
    ///
    /// # Errors
    /// When there is none, or a link on the way leads out of the granted folder.
    pub(crate) fn open(&self) -> Result<OpenCwd, LoadError> {
        let refused = |error: Errno| {
            let reason = match error {
                Errno::XDEV | Errno::LOOP => format!("a link leads out of `{}`", self.root.display()),
                Errno::NOTDIR => "it is not a folder".into(),
                error => io::Error::from(error).to_string(),
            };
            LoadError::from(GrantError { grant: format!("--cwd {}", self.guest), reason })
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.root, flags, Mode::empty()).map_err(refused)?;
        let rest = if self.rest.as_os_str().is_empty() { Path::new(".") } else { &self.rest };
        let folder = rustix::fs::openat2(&root, rest, flags, Mode::empty(), ResolveFlags::BENEATH).map_err(refused)?;
        Ok(OpenCwd { guest: self.guest.clone(), folder, read_only: self.read_only })
    }
}

/// A [`Cwd`] that is open.
#[derive(Debug)]
pub(crate) struct OpenCwd {
    guest: String,
    folder: OwnedFd,
    read_only: bool,
}

impl Setup {
    /// Of a guest that is nobody's worker but its own process's, with the standard streams of that.
    pub(crate) fn alone(grants: Grants, limits: Limits, args: Vec<String>, identity: Identity) -> Self {
        Self {
            grants,
            limits,
            identity,
            data: Message::null(),
            args,
            stdio: Stdio::Inherit,
            mailbox: None,
            cwd: None,
            shares_thread: false,
            ends_itself: false,
            head_max: limits::Bytes(0),
            network: Arc::default(),
            buffers: Arc::default(),
        }
    }
}

/// What the host keeps for one instance.
pub(crate) struct State {
    wasi: Wasi,
    pub(super) setup: Arc<Setup>,
    /// Undone before the engine gets the memory back, which a store sees to.
    pub(super) windows: Windows,
    limiter: Limiter,
}

enum Wasi {
    Component(Box<ComponentCtx>),
    Module(Box<WasiP1Ctx>),
}

struct ComponentCtx {
    wasi: WasiCtx,
    table: ResourceTable,
    http: WasiHttpCtx,
    outbound: Outbound,
    sockets: Sockets,
}

/// A started guest.
pub(crate) struct Instance {
    store: Store<State>,
    entry: Entry,
    started: Instant,
    uses: u64,
}

enum Entry {
    Handler(HandlerGuest),
    Http(Proxy),
    Command(wasmtime_wasi::p2::bindings::Command),
    Module(wasmtime::TypedFunc<(), ()>),
}

/// What a handler said to a task.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Its reply; not checked yet.
    Reply(String),
    /// That there is none.
    NoReply,
    /// That the task failed, and why; not checked yet.
    Error(String),
}

/// The bounds that the engine asks about while a guest runs.
struct Limiter {
    memory: usize,
    memory_now: usize,
    memory_peak: usize,
}

/// A guest asked for more memory than it may have.
#[derive(Debug, thiserror::Error)]
#[error("memory limit")]
struct OutOfMemory;

/// What one call from the guest may make the host allocate, beside messages and what a core module reads and writes.
pub(super) const HOSTCALL_BYTES: usize = 8 << 20;
/// What the headers and trailers that a guest makes may take, each set of them, beside those that came with a request.
/// That is more than [`HEADERS_MAX`](crate::limits::HEADERS_MAX) headers take beside their texts.
const FIELDS_BYTES: usize = 32 << 10;
/// Files, streams and the like that one guest may hold at once.
const RESOURCES_MAX: usize = 1_000;
/// Random bytes that one call may ask for.
const RANDOM_MAX: u64 = 1 << 20;

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        // an instance may have several memories: what counts is their sum
        let sum = self.memory_now.saturating_add(desired.saturating_sub(current));
        if sum > self.memory {
            return Err(OutOfMemory.into());
        }
        self.memory_now = sum;
        self.memory_peak = self.memory_peak.max(sum);
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }

    fn instances(&self) -> usize {
        CORE_INSTANCES_MAX as usize
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX as usize
    }

    fn tables(&self) -> usize {
        TABLES_MAX as usize
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        match &mut self.wasi {
            Wasi::Component(ctx) => WasiCtxView { ctx: &mut ctx.wasi, table: &mut ctx.table },
            Wasi::Module(_) => unreachable!("core modules are linked to preview 1 only"),
        }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        match &mut self.wasi {
            Wasi::Component(ctx) => {
                WasiHttpCtxView { ctx: &mut ctx.http, table: &mut ctx.table, hooks: &mut ctx.outbound }
            }
            Wasi::Module(_) => unreachable!("core modules are linked to preview 1 only"),
        }
    }
}

/// Links what components may import; `wasi:http` only for those that ask for it.
pub(super) fn link_component(linker: &mut Linker<State>, imports: &[String]) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    link_sockets(linker)?;
    if imports.iter().any(|import| import.starts_with("wasi:http/")) {
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)?;
        link_outbound(linker)?;
    }
    wit::worker::add_to_linker::<_, wasmtime::component::HasSelf<State>>(linker, |state| state)?;
    wit::mailbox::add_to_linker::<_, wasmtime::component::HasSelf<State>>(linker, |state| state)?;
    link_window(linker)
}

/// Links what core modules may import.
pub(super) fn link_module(linker: &mut wasmtime::Linker<State>) -> wasmtime::Result<()> {
    wasmtime_wasi::p1::add_to_linker_async(linker, |state: &mut State| match &mut state.wasi {
        Wasi::Module(ctx) => ctx,
        Wasi::Component(_) => unreachable!("components are linked to WASI 0.2 only"),
    })?;
    // the engine's own traps at codes above 125, which a shell has uses for; whose they are, wrun says
    linker.allow_shadowing(true);
    linker.func_wrap("wasi_snapshot_preview1", "proc_exit", |code: i32| -> wasmtime::Result<()> {
        Err(I32Exit(code).into())
    })?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Whether an export of a core module can be called to run it.
pub(super) fn is_start(export: Option<ExternType>) -> bool {
    matches!(export, Some(ExternType::Func(start)) if start.params().len() == 0 && start.results().len() == 0)
}

/// What a guest has of WASI, by its grants.
///
/// # Errors
/// When something granted is not there.
pub(super) fn wasi(setup: &Setup) -> Result<WasiCtxBuilder, LoadError> {
    let mut wasi = WasiCtxBuilder::new();
    wasi.args(&setup.args).envs(&setup.grants.env).max_random_size(RANDOM_MAX);
    // where one guest runs at a time, a thread to read a file on would only cost
    wasi.allow_blocking_current_thread(!setup.shares_thread);
    wasi.allow_tcp(may_create_sockets(setup));
    let network = setup.network.clone();
    wasi.socket_addr_check(move |address, purpose| {
        let allowed = match purpose {
            // a connection has an address of ours, too, which the system chooses
            SocketAddrUse::TcpBind => address.ip().is_unspecified() && address.port() == 0,
            SocketAddrUse::TcpConnect => network.check_tcp(address),
            _ => false,
        };
        Box::pin(std::future::ready(allowed))
    });
    for dir in &setup.grants.dirs {
        let perms = if dir.read_only { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        wasi.preopened_dir(&dir.host, &dir.guest, perms)
            .map_err(|error| GrantError { grant: format!("--dir {dir}"), reason: format!("{error:#}") })?;
    }
    if let Some(cwd) = &setup.cwd {
        let OpenCwd { guest, folder, read_only } = &**cwd;
        let perms = if *read_only { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        // programs that know nothing of a working directory take relative paths from the folder of this name
        wasi.initial_cwd(guest)
            .preopened_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()), ".", perms)
            .map_err(|error| GrantError { grant: format!("--cwd {guest}"), reason: format!("{error:#}") })?;
    }
    match &setup.stdio {
        Stdio::Inherit => {
            use crate::event::Stream::{Stderr, Stdout};
            wasi.inherit_stdin().stdout(Output::Own(Stdout)).stderr(Output::Own(Stderr));
        }
        Stdio::Sink(sink) | Stdio::Piped(_, sink) => {
            use crate::event::Stream::{Stderr, Stdout};
            if let Stdio::Piped(input, _) = &setup.stdio {
                wasi.stdin(MemoryInputPipe::new(input.clone()));
            }
            wasi.stdout(Output::Sink(Stdout, sink.clone())).stderr(Output::Sink(Stderr, sink.clone()));
        }
    }
    Ok(wasi)
}

impl State {
    fn new(setup: &Arc<Setup>, form: Form) -> Result<Self, LoadError> {
        let mut wasi = wasi(setup)?;
        let wasi = match form {
            Form::Component => {
                let mut table = ResourceTable::new();
                table.set_max_capacity(RESOURCES_MAX);
                let (wasi, mut http) = (wasi.build(), WasiHttpCtx::new());
                // a guest may send back all the headers that it got
                http.set_field_size_limit(setup.head_max.as_usize().saturating_add(FIELDS_BYTES));
                let outbound = Outbound::new(setup.network.clone());
                Wasi::Component(Box::new(ComponentCtx { wasi, table, http, outbound, sockets: Sockets::default() }))
            }
            Form::Module => {
                let mut wasi = wasi.build_p1();
                wasi.ctx().table.set_max_capacity(RESOURCES_MAX);
                Wasi::Module(Box::new(wasi))
            }
        };
        let limiter = Limiter { memory: setup.limits.memory.as_usize(), memory_now: 0, memory_peak: 0 };
        Ok(Self { wasi, setup: setup.clone(), windows: Windows::default(), limiter })
    }

    /// What it reaches of the network.
    pub(super) fn network(&self) -> &Arc<Network> {
        &self.setup.network
    }

    /// Whether it may have sockets at all.
    pub(super) fn may_create_sockets(&self) -> bool {
        may_create_sockets(&self.setup)
    }

    /// The sockets that it has, and the table in which they are.
    pub(super) fn sockets_and_table(&mut self) -> (&mut Sockets, &ResourceTable) {
        match &mut self.wasi {
            Wasi::Component(ctx) => (&mut ctx.sockets, &ctx.table),
            Wasi::Module(_) => unreachable!("core modules are linked to preview 1 only"),
        }
    }
}

/// A socket alone leads nowhere. Where no jail forbids it, a guest without a grant has it, so that the address which it
/// then asks for can be told.
fn may_create_sockets(setup: &Setup) -> bool {
    !setup.grants.tcp.is_empty() || !setup.identity.process
}

impl Instance {
    /// Makes an instance of a program. Nothing of the guest runs but what it runs at instantiation.
    pub(super) async fn start(engine: &Engine, program: &Program, setup: &Arc<Setup>) -> Result<Self, Outcome> {
        let started = Instant::now();
        let state =
            State::new(setup, program.form()).map_err(|error| error.end().with(Usage::wall(started.elapsed())))?;
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_max_component_handles(RESOURCES_MAX);
        if setup.ends_itself {
            // fails when fuel is not metered: then there are ticks, or nobody to give way to
            let _ = store.fuel_async_yield_interval(Some(FUEL_SLICE));
        }
        refill(&mut store, setup);
        let made = match program {
            Program::Handler(pre) => pre.instantiate_async(&mut store).await.map(Entry::Handler),
            Program::Http(pre) => pre.instantiate_async(&mut store).await.map(Entry::Http),
            Program::Command(pre) => pre.instantiate_async(&mut store).await.map(Entry::Command),
            Program::Module(pre) => match pre.instantiate_async(&mut store).await {
                Ok(instance) => instance.get_typed_func(&mut store, "_start").map(Entry::Module),
                Err(error) => Err(error),
            },
        };
        match made {
            Ok(entry) => Ok(Self { store, entry, started, uses: 0 }),
            Err(error) => {
                let end = match end_of(&error, &setup.limits) {
                    End::Trapped { .. } if has_too_many_instances(&error) => LoadError::TOO_MANY_INSTANCES.end(),
                    // an error that is no trap is the engine's own: no room in the pool, a start that does not fit
                    End::Trapped { trap, backtrace }
                        if backtrace.is_empty() && error.downcast_ref::<Trap>().is_none() =>
                    {
                        End::Failed { stage: Stage::Start, reason: trap, hint: None }
                    }
                    end => end,
                };
                Err(end.with(usage(&mut store, started, &setup.limits)))
            }
        }
    }

    /// Hands one message to a handler. After an error the instance must be dropped.
    ///
    /// # Errors
    /// The outcome, when the guest did not answer but trapped, hit a limit or exited.
    ///
    /// # Panics
    /// When the guest is no handler: the caller has looked.
    pub(crate) async fn handle(&mut self, message: String) -> Result<Answer, Outcome> {
        self.handle_with(message, 0..0).await
    }

    /// As [`Instance::handle`], a message to which a range of the buffer that is written belongs.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn handle_with(&mut self, message: String, own: Range<u64>) -> Result<Answer, Outcome> {
        let called = Instant::now();
        self.uses += 1;
        let setup = self.store.data().setup.clone();
        refill(&mut self.store, &setup);
        let Entry::Handler(guest) = &self.entry else { unreachable!("tasks go to handlers only") };
        self.store.data_mut().windows.begin(own);
        let answer = guest.wrun_guest_handler().call_handle(self.store.as_context_mut(), &message).await;
        self.store.data_mut().windows.end();
        match answer {
            Ok(Ok(Some(reply))) => Ok(Answer::Reply(reply)),
            Ok(Ok(None)) => Ok(Answer::NoReply),
            Ok(Err(reason)) => Ok(Answer::Error(reason)),
            Err(error) => Err(end_of(&error, &setup.limits).with(usage(&mut self.store, called, &setup.limits))),
        }
    }

    /// Hands one request to an http guest; what it answers goes to `respond`, at latest when this ends. The guest may
    /// go on after that, as long as this is polled. After an error the instance must be dropped.
    ///
    /// # Errors
    /// The outcome, when the guest trapped, hit a limit or exited.
    ///
    /// # Panics
    /// When the guest is no http guest: the caller has looked.
    pub(crate) async fn serve<B>(
        &mut self,
        request: Request<B>,
        scheme: Scheme,
        respond: Respond,
    ) -> Result<(), Outcome>
    where
        B: Body<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        let called = Instant::now();
        self.uses += 1;
        let setup = self.store.data().setup.clone();
        refill(&mut self.store, &setup);
        let Entry::Http(guest) = &self.entry else { unreachable!("requests go to http guests only") };
        let served = async {
            let mut http = self.store.data_mut().http();
            let request = http.new_incoming_request(scheme.into(), request)?;
            let response = http.new_response_outparam_from_callback(move |answer| respond.send(answer))?;
            guest.wasi_http_incoming_handler().call_handle(&mut self.store, request, response).await
        };
        served.await.map_err(|error| end_of(&error, &setup.limits).with(usage(&mut self.store, called, &setup.limits)))
    }

    /// How many messages or requests it was handed.
    pub(crate) fn uses(&self) -> u64 {
        self.uses
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// When the guest is no command: the caller has looked.
    pub(crate) async fn run(self) -> Outcome {
        let Self { mut store, entry, started, .. } = self;
        let setup = store.data().setup.clone();
        let call = async {
            match &entry {
                Entry::Command(guest) => {
                    guest.wasi_cli_run().call_run(&mut store).await.map(|result| i32::from(result.is_err()))
                }
                Entry::Module(start) => start.call_async(&mut store, ()).await.map(|()| 0),
                Entry::Handler(_) | Entry::Http(_) => unreachable!("only commands are run"),
            }
        };
        let result = match setup.limits.timeout.filter(|_| setup.ends_itself) {
            Some(timeout) => tokio::time::timeout(timeout, call).await.map_err(|_| timeout),
            None => Ok(call.await),
        };
        let end = match result {
            Ok(Ok(code)) => End::Exited { code },
            Ok(Err(error)) => end_of(&error, &setup.limits),
            Err(timeout) => End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") },
        };
        end.with(usage(&mut store, started, &setup.limits))
    }
}

/// Sets what one call may use.
fn refill(store: &mut Store<State>, setup: &Setup) {
    let limits = &setup.limits;
    let most = match store.data().wasi {
        Wasi::Component(_) if setup.buffers.is_empty() => limits.message_max.as_usize().saturating_mul(4),
        // whole files go through one buffer, and regions become windows, which may be as large as the memory that they lie in
        Wasi::Component(_) | Wasi::Module(_) => limits.memory.as_usize(),
    };
    store.set_hostcall_fuel(most.saturating_add(HOSTCALL_BYTES));
    // fails when fuel is not metered: then there is none to set
    let _ = store.set_fuel(limits.fuel.unwrap_or(u64::MAX));
    // With epoch checks the guest gives way at every tick, and whoever waits for it decides; without, this is nothing.
    store.set_epoch_deadline(1);
    // Tokio's own way to yield sees to its timers and sockets first; a plain one would let them wait for dozens of ticks.
    store.epoch_deadline_callback(|_| Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))));
}

/// The CPU time of this process.
pub(crate) fn cpu_ms() -> u64 {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    u64::try_from(cpu.tv_sec * 1000 + cpu.tv_nsec / 1_000_000).unwrap_or(0)
}

fn usage(store: &mut Store<State>, since: Instant, limits: &Limits) -> Usage {
    Usage {
        wall_ms: millis(since.elapsed()),
        cpu_ms: Some(cpu_ms()),
        memory_peak: Some(store.data().limiter.memory_peak as u64),
        fuel: limits.fuel.and_then(|fuel| Some(fuel.saturating_sub(store.get_fuel().ok()?))),
    }
}

/// How a failed call ended.
pub(super) fn end_of(error: &wasmtime::Error, limits: &Limits) -> End {
    if let Some(I32Exit(code)) = error.downcast_ref() {
        return End::Exited { code: *code };
    }
    // what is thrown lies in a heap of the engine's, which grows within the guest's memory
    if error.is::<OutOfMemory>() || error.is::<GcHeapOutOfMemory<()>>() {
        return End::Limit { limit: LimitKind::Memory, allowed: limits.memory.to_string() };
    }
    if error.downcast_ref::<ReaderGone>().is_some() {
        return End::Killed { signal: Signal::PIPE.as_raw() };
    }
    let trap = error.downcast_ref::<Trap>();
    if let (Some(Trap::OutOfFuel), Some(fuel)) = (trap, limits.fuel) {
        return End::Limit { limit: LimitKind::Fuel, allowed: fuel.to_string() };
    }
    let text = match error.downcast_ref() {
        Some(ResourceTableError::Full) => format!("it holds more than {RESOURCES_MAX} files, streams and the like"),
        _ => guest::one_line(&error.root_cause().to_string()),
    };
    let backtrace = error.downcast_ref::<WasmBacktrace>().map_or_else(Vec::new, |backtrace| {
        // the first line of its text is a heading
        backtrace.to_string().lines().skip(1).map(|line| cut(line.trim())).collect()
    });
    End::Trapped {
        trap: trap.map_or(cut(&text), |trap| trap.to_string().trim_start_matches("wasm trap: ").into()),
        backtrace,
    }
}

/// Whether the engine refuses a guest for its core instances. It has no type for that error, and does not tell how many
/// a guest has.
pub(super) fn has_too_many_instances(error: &wasmtime::Error) -> bool {
    let text = error.root_cause().to_string();
    // the words of a store, and those of a pool
    text.contains("instance count too high") || text.contains("core module instances, which exceeds")
}

/// A text that a guest has a say in, such as a function's name, at a length that fits a line.
fn cut(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}
