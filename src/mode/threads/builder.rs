//! How a group is described and started, and the thread that watches it until all of its threads are gone.

use std::{
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, atomic::AtomicU64},
    time::Instant,
};

use tokio::sync::{Notify, oneshot, watch};

use super::{Shared, State, Threads};
use crate::{
    Error,
    child::{Compiler, cores, entry},
    event::Stream,
    grant::Grants,
    limits::{CompileLimits, Limits},
    message::Message,
    outcome::{End, LimitKind, Outcome, Stage},
    process::{Isolation, Program},
    sandbox::{
        Cache, EngineSpec, Group, GroupSetup, Guest, Identity, LoadError, Mapped, OutputSink, Setup, Shape, Stdio,
    },
};

/// Threads that were not started yet.
#[derive(Clone)]
#[must_use = "nothing runs before `start`"]
pub struct Builder {
    pub(super) guest: PathBuf,
    args: Vec<String>,
    workers: Option<u32>,
    pub(super) pin: bool,
    pub(super) data: Message,
    pub(super) grants: Grants,
    pub(super) limits: Limits,
    pub(super) cache: Cache,
    pub(super) compiler: Compiler,
    pub(super) output: Option<Arc<dyn OutputSink>>,
}

/// Hands what a guest prints to a function.
struct Hear<F>(F);

impl<F: Fn(Stream, &[u8]) + Send + Sync> OutputSink for Hear<F> {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        (self.0)(stream, bytes);
    }
}

impl Builder {
    pub(super) fn new(guest: PathBuf) -> Self {
        Self {
            guest,
            args: vec![],
            workers: None,
            pin: false,
            data: Message::null(),
            grants: Grants::default(),
            limits: Limits::of_a_run(),
            cache: Cache::at(None),
            compiler: Compiler {
                program: Program::Own,
                // of the compiler's own process
                isolation: Isolation::Process,
                limits: CompileLimits::default(),
            },
            output: None,
        }
    }

    /// How many workers a handler has; a command is told so, in `RAYON_NUM_THREADS` and `OMP_NUM_THREADS`. Default one for
    /// each core.
    pub fn workers(mut self, count: u32) -> Self {
        self.workers = Some(count);
        self
    }

    /// Whether each thread stays on one core. By default they are spread over the cores when they start, and the system
    /// moves them as it likes.
    pub fn pin(mut self, pin: bool) -> Self {
        self.pin = pin;
        self
    }

    /// What `worker.get-data` answers. Default `null`.
    pub fn data(mut self, data: Message) -> Self {
        self.data = data;
        self
    }

    /// The arguments of a command, after its own name.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// What the guest may touch. It has no network.
    pub fn grants(mut self, grants: Grants) -> Self {
        self.grants = grants;
        self
    }

    /// What bounds it: the memory of the group, the stack of each thread, their number, the length of messages, and the time
    /// from its start to its end. Fuel is not metered.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Where its compiled code is kept.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// What bounds its compilation.
    pub fn compile_limits(mut self, limits: CompileLimits) -> Self {
        self.compiler.limits = limits;
        self
    }

    /// The program that compilers are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.compiler.program = Program::At(path.into());
        self
    }

    /// Who hears what the guest prints; by default it goes to this process's own standard output and error. It is called by
    /// whichever thread prints, and must not block for long.
    pub fn on_output(mut self, hear: impl Fn(Stream, &[u8]) + Send + Sync + 'static) -> Self {
        self.output = Some(Arc::new(Hear(hear)));
        self
    }

    /// Starts the threads, and returns when all workers are there; a command is then at its start. Must be called inside of
    /// a tokio runtime.
    ///
    /// # Errors
    /// When the guest could not be loaded or has no threads, when its workers ended before they were there, or when
    /// [`init`](crate::init) was not called first.
    pub async fn start(self) -> Result<Threads, Error> {
        self.check()?;
        let guest = Guest::read(&self.guest)?;
        let spec = EngineSpec { epoch_checks: true, fuel: false, stack: self.limits.stack, pool: None };
        let entry = entry(&self.cache, spec, &guest)?;
        let (code, _) = self.compiler.load(entry.as_deref(), spec, &guest).await?;
        let inspection = &code.inspection;
        if !inspection.has_threads() {
            return Err(LoadError::NoThreads { form: inspection.form }.into());
        }
        let shape = if inspection.shape == Some(Shape::Handler) { Shape::Handler } else { Shape::Command };
        // an engine of its own, whose epoch ends this group and no other
        let engine = spec.engine(inspection).map_err(|error| Error::Usage(format!("{error:#}")))?;
        let program = Mapped::of(engine, &code)?.link_group(inspection, shape, self.limits.memory)?;
        let workers = if shape == Shape::Handler { self.count() } else { 0 };

        let message_max = self.limits.message_max.as_usize();
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            message_max,
            received: Notify::new(),
            has_room: Condvar::new(),
            handled: Notify::new(),
        });
        let own_name = self.guest.display().to_string();
        let args = std::iter::once(own_name).chain(self.args.iter().cloned()).collect();
        let identity = Identity { count: workers.max(1), ..Identity::alone(guest.name, false) };
        let grants = self.grants.clone().telling_threads(self.count());
        let stdio = self.output.map_or(Stdio::Inherit, Stdio::Sink);
        let limits = self.limits;
        let timeout = limits.timeout;
        let setup = Setup { data: self.data, stdio, ..Setup::alone(grants, limits, args, identity) };
        let setup = GroupSetup { setup: Arc::new(setup), pin: self.pin, input: false, answers: shared.clone() };
        let group = Group::start(program, setup)?;

        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let (tell, ended) = watch::channel(None);
        let (told_ready, ready) = oneshot::channel();
        let threads = Threads {
            group: group.clone(),
            shared: shared.clone(),
            ended,
            workers,
            message_max,
            sent: AtomicU64::new(1),
        };
        let watch = move || {
            let _ = told_ready.send(group.ready(until));
            if group.ended(until).is_none() {
                let allowed = timeout.map_or(String::new(), |timeout| format!("{timeout:?}"));
                group.end(End::Limit { limit: LimitKind::Time, allowed });
            }
            shared.end(&group.outcome());
            group.clear();
            // with what its threads have used
            let outcome = group.outcome();
            let voluntary = outcome.end == End::Cancelled;
            let _ = tell.send(Some(Outcome { voluntary, ..outcome }));
        };
        std::thread::Builder::new().name("wrun-group".into()).stack_size(256 << 10).spawn(watch).map_err(|source| {
            // nobody else brings its threads to an end
            threads.terminate();
            threads.group.clear();
            Error::Io { what: "start a thread", source }
        })?;
        if ready.await == Ok(true) {
            return Ok(threads);
        }
        let outcome = threads.wait().await;
        Err(LoadError::Reported {
            stage: Stage::Start,
            reason: format!("its workers did not start: {outcome}"),
            hint: None,
        }
        .into())
    }

    pub(super) fn count(&self) -> u32 {
        self.workers.unwrap_or_else(cores)
    }

    fn check(&self) -> Result<(), Error> {
        if self.limits.fuel.is_some() {
            return Err(Error::Usage(
                "fuel is not metered across threads: expected no limit for it (a time limit bounds them)".into(),
            ));
        }
        self.can_start()
    }

    /// Sees to what holds for all guests.
    pub(super) fn can_start(&self) -> Result<(), Error> {
        if !self.compiler.program.is_prepared() {
            return Err(Error::Usage(
                "call `wrun::init()` first thing in `main`: guests are compiled by this program, started again".into(),
            ));
        }
        let (workers, threads) = (self.count(), self.limits.threads);
        if workers == 0 || workers > threads {
            return Err(Error::Usage(format!("expected 1 to {threads} workers (`Limits::threads`), found {workers}")));
        }
        Ok(self.grants.check().map_err(LoadError::from)?)
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("guest", &self.guest).field("workers", &self.workers).finish_non_exhaustive()
    }
}
