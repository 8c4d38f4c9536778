//! What every guest with a process of its own is started with, and how it is watched until it is gone.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Error,
    buffer::{self, BUFFERS_MAX, Named},
    child::{CommandConfig, Compiler, MapConfig, THREAD_STACK, Workers, cores, entry, jail_of, with_windows},
    grant::{Denied, GrantError, Grants, REFUSALS_MAX},
    limits::{Bytes, CompileLimits, Limits},
    message::Message,
    outcome::{End, LimitKind, Outcome, Stage, Usage},
    process::{
        Clock, Isolation, Process, Program, Role, body_max, names,
        wire::{Frame, Kind},
    },
    sandbox::{
        Cache, Code, Cwd, EngineSpec, Form, Guest, Identity, Inspection, LoadError, Pool, Roots, Shape, name_of,
        open_file,
    },
    signal::Signal,
};

/// What stands around the answer of a worker: `{"worker":ID,"line":N,"error":{"kind":"guest","value":…}}`.
const WORKER_HEAD: u64 = 128;

/// Descriptors of a thread that hands out chunks, which what it waits with has.
const DESCRIPTORS_OF_A_THREAD: u64 = 8;

/// How much of what a process warns of is told, in characters.
const WARNING_MAX: usize = 1000;

/// How much later than that of a guest that ends itself our clock is.
pub(in crate::mode) const LATE: Duration = Duration::from_millis(250);

/// How much later than our clock the kernel's is.
const BACKSTOP: Duration = Duration::from_secs(2);

/// A guest, and what it gets and may.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) guest: PathBuf,
    pub(super) args: Vec<String>,
    /// Its own name, when that is not the file's.
    pub(super) argv0: Option<String>,
    pub(super) grants: Grants,
    pub(super) limits: Limits,
    pub(super) cache: Cache,
    /// Whether the file is code that is trusted.
    pub(super) precompiled: bool,
    pub(super) compiler: Compiler,
    pub(super) on_denied: OnDenied,
    /// The workers of a guest that shares its memory; none = of a handler there are none.
    pub(super) workers: Option<Workers>,
    /// What it can have windows of.
    pub(super) buffers: Named,
    /// Whether a guest whose fuel is metered ends itself at its time limit, so that it is known what it used.
    pub(super) ends_itself: bool,
}

/// Who hears what a guest was refused of the network.
#[derive(Clone)]
pub(super) struct OnDenied(Arc<dyn Fn(&Denied) + Send + Sync>);

impl OnDenied {
    pub(super) fn new(hear: impl Fn(&Denied) + Send + Sync + 'static) -> Self {
        Self(Arc::new(hear))
    }

    pub(super) fn tell(&self, denied: &Denied) {
        (self.0)(denied);
    }
}

impl Default for OnDenied {
    fn default() -> Self {
        Self::new(|denied| tracing::warn!("refused: {denied}"))
    }
}

impl fmt::Debug for OnDenied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDenied")
    }
}

impl Settings {
    pub(super) fn new(guest: PathBuf, isolation: Isolation) -> Self {
        Self {
            guest,
            args: vec![],
            argv0: None,
            grants: Grants::default(),
            limits: Limits::of_a_run(),
            cache: Cache::at(None),
            precompiled: false,
            compiler: Compiler { program: Program::Own, isolation, limits: CompileLimits::default() },
            on_denied: OnDenied::default(),
            workers: None,
            buffers: vec![],
            ends_itself: false,
        }
    }

    /// Sees that it can be started at all.
    ///
    /// # Errors
    /// Says what is missing.
    pub(super) fn check(&self) -> Result<(), Error> {
        if !self.compiler.program.is_prepared() {
            return Err(Error::Usage(
                "call `wrun::init()` first thing in `main`: guests are compiled by this program, started again".into(),
            ));
        }
        Ok(self.grants.check().map_err(LoadError::from)?)
    }

    /// An engine that does not look after the guest's time.
    pub(super) fn spec(&self) -> EngineSpec {
        EngineSpec { epoch_checks: false, fuel: self.limits.fuel.is_some(), stack: self.limits.stack, pool: None }
    }

    /// The guest's code, found or compiled.
    ///
    /// # Errors
    /// When it is no guest, or is not compiled within its limits.
    pub(super) async fn load(&self, spec: EngineSpec) -> Result<Code, Error> {
        if self.precompiled {
            let damaged = || LoadError::Precompiled { reason: "the file is damaged, or not made by wrun".into() };
            return Ok(Code::open(open_file(&self.guest)?).ok_or_else(damaged)?);
        }
        let guest = Guest::read(&self.guest)?;
        let entry = entry(&self.cache, spec, &guest)?;
        Ok(self.compiler.load(entry.as_deref(), spec, &guest).await?.0)
    }

    /// Its arguments, its own name first.
    pub(super) fn argv(&self) -> Vec<String> {
        let own = self.argv0.clone().unwrap_or_else(|| self.guest.display().to_string());
        std::iter::once(own).chain(self.args.iter().cloned()).collect()
    }

    /// Who it is, in this process or in one of its own.
    pub(super) fn identity(&self, process: bool) -> Identity {
        Identity::alone(name_of(&self.guest), process)
    }

    /// Starts its process with these standard streams.
    ///
    /// # Errors
    /// When it does not fit, or the system has no room for another process.
    pub(super) fn start(&self, code: &Code, extra: Extra, streams: [BorrowedFd<'_>; 3]) -> Result<Worker, Error> {
        let (mut spec, inspection) = (self.spec(), code.inspection.clone());
        let instances = if let Some((map, _)) = &extra.map {
            spec.pool = Some(Pool { instances: map.workers, memory: self.limits.memory });
            map.workers
        } else {
            self.fits(&inspection)?;
            1
        };
        let cannot = Error::io("start a process");
        let mut jail = jail_of(
            self.compiler.isolation,
            (&self.grants, &self.limits),
            (&spec, instances),
            (&inspection, code.size().map_err(Error::io("look at the compiled guest"))?),
            None,
        );
        // should this process be stopped, the kernel's clock goes on; it counts what all threads use together
        let at_once = if inspection.has_threads() || extra.map.is_some() { cores() } else { 1 };
        jail.bounds.cpu = self.limits.timeout.map(|timeout| timeout.saturating_add(BACKSTOP).saturating_mul(at_once));
        if self.grants.dirs.iter().all(|dir| dir.read_only) {
            // the only files that it can write are those that its output was sent to
            jail.bounds.file_size = Bytes(u64::MAX);
        }
        if let Some((map, _)) = &extra.map {
            jail.threads = map.workers;
            jail.bounds.files += u64::from(map.workers) * DESCRIPTORS_OF_A_THREAD;
            let stacks = u64::from(map.workers) * THREAD_STACK as u64;
            jail.bounds.data = Bytes(jail.bounds.data.0.saturating_add(stacks));
        }
        // to who has a mailbox, buffers may come later
        let may_come = if extra.mailbox { BUFFERS_MAX } else { self.buffers.len() };
        if inspection.form == Form::Component && may_come > 0 {
            with_windows(&mut jail, may_come + 1, instances, self.limits.memory);
        }
        let (map, output) = extra.map.unzip();
        let output = output.flatten();
        let config = CommandConfig {
            engine: spec,
            inspection,
            grants: match self.workers {
                Some(workers) => self.grants.clone().telling_threads(workers.count),
                None => self.grants.clone(),
            },
            roots: Roots::of_environment(),
            limits: self.limits.clone(),
            args: self.argv(),
            identity: self.identity(true),
            data: extra.data,
            cwd: extra.cwd,
            mailbox: extra.mailbox,
            workers: self.workers,
            buffers: buffer::names(&self.buffers),
            map,
            ends_itself: self.ends_itself,
            jail,
        };
        let body_max = body_max(self.message_max());
        let [stdin, stdout, stderr] = streams;
        let names = names::answer(&self.grants).map_err(Error::io("make a socket"))?;
        let fds = [code.as_fd(), stdin, stdout, stderr].into_iter();
        let fds = fds.chain(buffer::descriptors(&self.buffers)).chain(output.as_ref().map(AsFd::as_fd));
        let fds: Vec<_> = fds.chain(names.as_ref().map(AsFd::as_fd)).collect();
        let process = Process::start(&self.compiler.program, Role::Command, &config, &fds, body_max).map_err(cannot)?;
        let limit = self.limits.timeout;
        let late = if self.ends_itself { LATE } else { Duration::ZERO };
        let clock =
            limit.map(|limit| process.time(limit.saturating_add(late), extra.kill_signal, extra.grace)).transpose();
        Ok(Worker {
            started: Instant::now(),
            clock: clock.map_err(Error::io("start a clock"))?,
            limit,
            process,
            notes: Notes { on_denied: self.on_denied.clone(), ..Notes::default() },
            voluntary: false,
            outcome: None,
        })
    }

    /// Sees that a guest with threads gets what it needs, and no other is asked for threads.
    ///
    /// # Errors
    /// Says what does not fit.
    pub(super) fn fits(&self, guest: &Inspection) -> Result<(), Error> {
        match (guest.has_threads(), self.workers) {
            (false, Some(_)) => Err(LoadError::NoThreads { form: guest.form }.into()),
            (true, _) if self.limits.fuel.is_some() => Err(Error::Usage(
                "fuel is not metered across threads: expected no `--fuel` for a guest with threads (--timeout bounds it)".into(),
            )),
            (true, None) if guest.shape == Some(Shape::Handler) => {
                let (expected, found, form) = (Shape::Command, guest.shape, guest.form);
                Err(LoadError::WrongShape { expected, found, form }.into())
            }
            (true, Some(workers)) if guest.shape == Some(Shape::Handler) && workers.count > self.limits.threads => {
                Err(Error::Usage(format!(
                    "expected at most {} workers (--threads), found {}",
                    self.limits.threads, workers.count
                )))
            }
            (true, _) if Bytes(guest.memory_min) > self.limits.memory => {
                Err(LoadError::NeedsMemory { needs: Bytes(guest.memory_min), limit: self.limits.memory }.into())
            }
            _ => Ok(()),
        }
    }

    /// The longest message from its process, which may say beside each which worker it is of.
    pub(super) fn message_max(&self) -> Bytes {
        let max = self.limits.message_max.0;
        Bytes(if self.workers.is_some() { max.saturating_add(WORKER_HEAD) } else { max })
    }

    /// The working directory of this name in the guest, which lies in a folder that is granted.
    ///
    /// # Errors
    /// Says why there is none.
    pub(super) fn cwd(&self, guest: &str) -> Result<Cwd, Error> {
        let refused = |reason: String| {
            let grant = format!("--cwd {guest}");
            Error::from(LoadError::from(GrantError { grant, reason }))
        };
        let of_dir = |dir: &Path| Path::new(guest).strip_prefix(dir).ok().map(Path::to_owned);
        let dirs = self.grants.dirs.iter().filter_map(|dir| Some((dir, of_dir(Path::new(&dir.guest))?)));
        let Some((dir, rest)) = dirs.min_by_key(|(_, rest)| rest.components().count()) else {
            return Err(refused("it lies in no folder that is granted with `--dir`".into()));
        };
        if !rest.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(refused("expected a path without `..`".into()));
        }
        let (root, read_only) = (dir.host.clone(), dir.read_only);
        let cwd = Cwd { guest: guest.to_owned(), root, rest, read_only };
        // its process opens it again; whether it can be opened shows before anything is started
        cwd.open()?;
        Ok(cwd)
    }
}

/// What not every guest gets.
#[derive(Debug)]
pub(super) struct Extra {
    /// What `worker.get-data` answers.
    pub(super) data: Message,
    /// The folder that it starts in.
    pub(super) cwd: Option<Cwd>,
    /// Whether its mailbox leads to us.
    pub(super) mailbox: bool,
    /// How chunks are handed to it, and what they write to.
    pub(super) map: Option<(MapConfig, Option<OwnedFd>)>,
    /// What it gets when its time is over ...
    pub(super) kill_signal: Signal,
    /// ... and how much later SIGKILL.
    pub(super) grace: Duration,
}

impl Default for Extra {
    fn default() -> Self {
        Self {
            data: Message::null(),
            cwd: None,
            mailbox: false,
            map: None,
            kill_signal: Signal::KILL,
            grace: Duration::ZERO,
        }
    }
}

/// A guest's process, until it is gone and after.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) process: Process,
    started: Instant,
    clock: Option<Clock>,
    limit: Option<Duration>,
    pub(super) notes: Notes,
    /// Whether we have asked it to end.
    pub(super) voluntary: bool,
    outcome: Option<Outcome>,
}

/// What a process says of itself.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// How its guest ended.
    said: Option<Outcome>,
    panicked: Option<String>,
    /// That walls are missing is told once, however often it says so.
    walls_told: bool,
    refusals: usize,
    on_denied: OnDenied,
}

impl Notes {
    /// Takes a frame that is no message. Answers what its guest was refused, if it says so, and has not too often.
    pub(super) fn take(&mut self, frame: &Frame<'_>) -> Option<Denied> {
        match frame.kind {
            Kind::Ended => self.said = serde_json::from_slice::<Outcome>(frame.body).ok(),
            Kind::Panic => {
                self.panicked = Some(format!("its process panicked: {}", String::from_utf8_lossy(frame.body)));
            }
            Kind::Walls if !std::mem::replace(&mut self.walls_told, true) => {
                tracing::warn!("a wall is missing: {}", String::from_utf8_lossy(frame.body));
            }
            Kind::Warning if self.refusals < REFUSALS_MAX => {
                self.refusals += 1;
                let text: String = String::from_utf8_lossy(frame.body).chars().take(WARNING_MAX).collect();
                // escaped: who knows what a process says that was taken over
                tracing::warn!("its process says {text:?}");
            }
            Kind::Denied if self.refusals < REFUSALS_MAX => {
                self.refusals += 1;
                let denied = Denied::read(frame.body)?;
                self.on_denied.tell(&denied);
                return Some(denied);
            }
            _ => {}
        }
        None
    }
}

impl Worker {
    /// Sends it a signal; whether it was still there.
    pub(super) fn kill(&mut self, signal: Signal) -> bool {
        let felt = self.outcome.is_none() && self.process.signal(signal);
        self.voluntary |= felt;
        felt
    }

    /// Whether it is still there.
    pub(super) fn is_alive(&mut self) -> bool {
        self.outcome.is_none() && !matches!(self.process.ended_within(Duration::ZERO), Ok(Some(_)))
    }

    /// Waits until it is gone for at most the grace time, then sends it the signal, and after as much time again SIGKILL.
    ///
    /// # Errors
    /// As [`Worker::wait`].
    pub(super) async fn end(&mut self, grace: Duration, signal: Signal) -> Result<Outcome, Error> {
        for signal in [signal, Signal::KILL] {
            if let Ok(outcome) = tokio::time::timeout(grace, self.wait()).await {
                return outcome;
            }
            self.kill(signal);
        }
        self.wait().await
    }

    /// Waits until it is gone. Cancel-safe, and answers the same when it is asked again.
    ///
    /// # Errors
    /// When its guest never ran.
    pub(super) async fn wait(&mut self) -> Result<Outcome, Error> {
        if self.outcome.is_none() {
            let Self { process, notes, .. } = self;
            let end = process.wait(|frame| _ = notes.take(&frame)).await;
            self.gone(end);
        }
        ran(self.outcome.clone().expect("it is gone"))
    }

    /// Notes how its process ended: how its guest did.
    pub(super) fn gone(&mut self, end: End) -> Outcome {
        let outcome = self.notes.said.take().unwrap_or_else(|| {
            let end = match (self.limit, self.notes.panicked.take()) {
                (Some(limit), _) if self.clock.as_ref().is_some_and(Clock::has_fired) => {
                    End::Limit { limit: LimitKind::Time, allowed: format!("{limit:?}") }
                }
                (_, Some(reason)) => End::Failed { stage: Stage::Start, reason, hint: None },
                _ => match end {
                    End::Exited { code } => {
                        let reason =
                            format!("its process exited with code {code}, and did not say how its guest ended");
                        End::Failed { stage: Stage::Start, reason, hint: None }
                    }
                    end => end,
                },
            };
            end.with(Usage::wall(self.started.elapsed()))
        });
        self.clock = None;
        let outcome = Outcome { voluntary: self.voluntary, ..outcome };
        self.outcome = Some(outcome.clone());
        outcome
    }
}

/// An outcome, if its guest ran at all.
///
/// # Errors
/// Why it did not.
pub(super) fn ran(outcome: Outcome) -> Result<Outcome, Error> {
    match outcome.end {
        End::Failed { stage, reason, hint } if stage.is_hopeless() => {
            Err(LoadError::Reported { stage, reason, hint }.into())
        }
        _ => Ok(outcome),
    }
}
