//! `wrun run`: one command guest in the foreground, with the standard streams passed through: in this process, or in one
//! of its own.

use std::{
    fmt,
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Error,
    child::{CommandConfig, Compiler, entry, jail_of},
    grant::{Denied, Grants, REFUSALS_MAX},
    limits::{Bytes, CompileLimits, Limits},
    outcome::{End, LimitKind, Outcome, Stage, Usage},
    process::{Isolation, Process, Program, Role, names, runtime, wire::Kind},
    sandbox::{
        Cache, Code, EngineSpec, Guest, LoadError, Mapped, Network, Roots, Sandbox, Setup, Shape, cpu_ms, open_file,
    },
};

/// What to run, and how.
///
/// The guest is compiled by a child of this process, and so is what runs it with [`Isolation::Process`].
///
/// ```no_run
/// # fn main() -> Result<(), wrun::Error> {
/// wrun::init(); // children are this program, started again
/// let outcome = wrun::Run::new("hello.wasm").args(["--loud"]).run()?;
/// assert_eq!(outcome.end.exit_code(), 0);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "nothing runs before `run`"]
pub struct Run {
    guest: PathBuf,
    args: Vec<String>,
    grants: Grants,
    limits: Limits,
    cache: Cache,
    precompiled: bool,
    compiler: Compiler,
    on_denied: OnDenied,
}

/// Who hears what the guest was refused.
struct OnDenied(Box<dyn Fn(&Denied) + Send + Sync>);

impl fmt::Debug for OnDenied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDenied")
    }
}

/// How a deadline ends a guest that computes.
enum Interrupt {
    /// From inside, by checks that were compiled into it.
    Epoch,
    /// From outside: the process goes, and the guest with it.
    Exit(Box<dyn FnOnce(Outcome) + Send>),
}

impl Run {
    /// A run of the guest in a file, or on standard input (`-`): no arguments, no grants, the default limits.
    pub fn new(guest: impl Into<PathBuf>) -> Self {
        Self {
            guest: guest.into(),
            args: vec![],
            grants: Grants::default(),
            limits: Limits::of_a_run(),
            cache: Cache::at(None),
            precompiled: false,
            compiler: Compiler {
                program: Program::Own,
                isolation: Isolation::Thread,
                limits: CompileLimits::default(),
            },
            on_denied: OnDenied(Box::new(|denied| tracing::warn!("refused: {denied}"))),
        }
    }

    /// The arguments after the guest's own name, handed over as they are.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// What the guest may touch.
    pub fn grants(mut self, grants: Grants) -> Self {
        self.grants = grants;
        self
    }

    /// What bounds it.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Where its compiled code is kept.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Takes the file for code that `wrun compile -o` made, and *trusts it as a native program*: it can do whatever
    /// this process can.
    pub fn precompiled(mut self, precompiled: bool) -> Self {
        self.precompiled = precompiled;
        self
    }

    /// What is between the guest and the host; default [`Isolation::Thread`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.compiler.isolation = isolation;
        self
    }

    /// What bounds its compilation.
    pub fn compile_limits(mut self, limits: CompileLimits) -> Self {
        self.compiler.limits = limits;
        self
    }

    /// The program that children are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.compiler.program = Program::At(path.into());
        self
    }

    /// Who hears what the guest was refused of the network: each grant that it lacks once, and not without end. Default a
    /// warning.
    pub fn on_denied(mut self, hear: impl Fn(&Denied) + Send + Sync + 'static) -> Self {
        self.on_denied = OnDenied(Box::new(hear));
        self
    }

    /// Runs the guest to its end, on this thread or in a process that dies with this thread.
    ///
    /// In this process, with a time limit the guest is compiled with checks, at which it is ended; see [`Run::run_or_exit`].
    ///
    /// # Errors
    /// When the guest could not be loaded, or [`init`](crate::init) was not called first. How it ran is the outcome.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn run(self) -> Result<Outcome, Error> {
        self.run_with(Interrupt::Epoch)
    }

    /// As [`Run::run`], for a process that has nothing else to do: at the deadline `exit` is called on another thread
    /// and must end the process. The guest is compiled without checks, so its loops run at full speed, and whatever
    /// it is stuck in, it is gone.
    ///
    /// # Errors
    /// As [`Run::run`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn run_or_exit(self, exit: impl FnOnce(Outcome) + Send + 'static) -> Result<Outcome, Error> {
        self.run_with(Interrupt::Exit(Box::new(exit)))
    }

    fn run_with(self, interrupt: Interrupt) -> Result<Outcome, Error> {
        if !self.compiler.program.is_prepared() {
            return Err(Error::Usage(
                "call `wrun::init()` first thing in `main`: guests are compiled by this program, started again".into(),
            ));
        }
        self.grants.check().map_err(LoadError::from)?;
        let here = self.compiler.isolation == Isolation::Thread;
        let spec = EngineSpec {
            epoch_checks: here && self.limits.timeout.is_some() && matches!(interrupt, Interrupt::Epoch),
            fuel: self.limits.fuel.is_some(),
            stack: self.limits.stack,
            pool: None,
        };
        let runtime = runtime()?;
        let code = if self.precompiled {
            open_precompiled(&self.guest)?
        } else {
            let guest = Guest::read(&self.guest)?;
            let entry = entry(&self.cache, spec, &guest)?;
            runtime.block_on(self.compiler.load(entry.as_deref(), spec, &guest))?.0
        };
        let args = std::iter::once(self.guest.display().to_string()).chain(self.args).collect();
        let outcome = if here {
            let engine = spec.engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
            let sandbox = Mapped::of(engine, &code)?.link(&code.inspection, Shape::Command)?;
            // who looks names up is a task of this runtime
            let _inside = runtime.enter();
            let names = names::answer(&self.grants).map_err(Error::io("make a socket"))?;
            let hear = move |denied| self.on_denied.0(&denied);
            let network = Network::prepare(&self.grants, names, &Roots::of_environment(), hear);
            let setup = Arc::new(Setup {
                network: Arc::new(network),
                // its clock waits for that thread when it is ended from inside
                shares_thread: spec.epoch_checks,
                ..Setup::of_command(self.grants, self.limits, args, false)
            });
            runtime.block_on(run_until(&sandbox, &setup, interrupt))
        } else {
            let mut jail = jail_of(
                self.compiler.isolation,
                (&self.grants, &self.limits),
                (&spec, 1),
                (&code.inspection, code.size().map_err(Error::io("look at the compiled guest"))?),
                None,
            );
            // should this process be stopped, the kernel's clock goes on
            jail.bounds.cpu = self.limits.timeout.map(|timeout| timeout + BACKSTOP);
            if self.grants.dirs.iter().all(|dir| dir.read_only) {
                // the only files that it can write are those that its output was sent to
                jail.bounds.file_size = Bytes(u64::MAX);
            }
            let config = CommandConfig {
                engine: spec,
                inspection: code.inspection.clone(),
                grants: self.grants,
                roots: Roots::of_environment(),
                limits: self.limits,
                args,
                jail,
            };
            runtime.block_on(run_aside(&self.compiler.program, &config, &code, &self.on_denied))?
        };
        // a thread may still sit in a read of standard input: nobody waits for it
        runtime.shutdown_background();
        Ok(outcome)
    }
}

/// How much later than our clock the kernel's is.
const BACKSTOP: Duration = Duration::from_secs(2);

/// Runs it in a process of its own, which gets the standard streams of this one.
async fn run_aside(
    program: &Program,
    config: &CommandConfig,
    code: &Code,
    on_denied: &OnDenied,
) -> Result<Outcome, Error> {
    let started = Instant::now();
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let names = names::answer(&config.grants).map_err(Error::io("make a socket"))?;
    let mut fds = vec![code.as_fd(), stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    fds.extend(names.as_ref().map(AsFd::as_fd));
    let body_max = u32::try_from(Bytes::mib(1).0).expect("small");
    let child = Process::start(program, Role::Command, config, &fds, body_max).map_err(Error::io("start a process"))?;
    // the child has it now
    drop(names);
    let mut refusals = 0;
    let (mut said, mut panicked) = (None, None);
    let (end, out_of_time) = child
        .finish(config.limits.timeout, |frame| match frame.kind {
            Kind::Ended => said = serde_json::from_slice::<Outcome>(frame.body).ok(),
            Kind::Panic => panicked = Some(format!("its process panicked: {}", String::from_utf8_lossy(frame.body))),
            Kind::Denied if refusals < REFUSALS_MAX => {
                refusals += 1;
                if let Ok(denied) = serde_json::from_slice(frame.body) {
                    on_denied.0(&denied);
                }
            }
            Kind::Walls => tracing::warn!("a wall is missing: {}", String::from_utf8_lossy(frame.body)),
            _ => {}
        })
        .await;
    let Some(outcome) = said else {
        let end = match (config.limits.timeout, panicked) {
            (Some(timeout), _) if out_of_time => End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") },
            (_, Some(reason)) => End::Failed { stage: Stage::Start, reason, hint: None },
            _ => end,
        };
        return Ok(end.with(Usage::wall(started.elapsed())));
    };
    match outcome.end {
        // it never ran
        End::Failed { stage, reason, hint } if stage.is_hopeless() => {
            Err(LoadError::Reported { stage, reason, hint }.into())
        }
        _ => Ok(outcome),
    }
}

async fn run_until(sandbox: &Sandbox, setup: &Arc<Setup>, interrupt: Interrupt) -> Outcome {
    let started = Instant::now();
    let run = sandbox.run(setup);
    let Some(timeout) = setup.limits.timeout else { return run.await };
    let out_of_time = move || {
        End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") }
            .with(Usage { cpu_ms: Some(cpu_ms()), ..Usage::wall(started.elapsed()) })
    };
    match interrupt {
        Interrupt::Exit(exit) => {
            // dropping `done` tells the watchdog that the guest has ended
            let (done, ended) = std::sync::mpsc::channel::<()>();
            let watchdog = std::thread::spawn(move || {
                if ended.recv_timeout(timeout) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    exit(out_of_time());
                }
            });
            let outcome = run.await;
            drop(done);
            // a guest that ends while the deadline is being reported does not get a second outcome
            let _ = watchdog.join();
            outcome
        }
        Interrupt::Epoch => {
            let ticker = sandbox.ticker();
            let (done, ended) = std::sync::mpsc::channel::<()>();
            std::thread::spawn(move || {
                let tick = std::time::Duration::from_millis(10);
                while ended.recv_timeout(tick) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    ticker.tick();
                }
            });
            let outcome = tokio::time::timeout(timeout, run).await.unwrap_or_else(|_| out_of_time());
            drop(done);
            outcome
        }
    }
}

fn open_precompiled(path: &std::path::Path) -> Result<Code, LoadError> {
    Code::open(open_file(path)?)
        .ok_or_else(|| LoadError::Precompiled { reason: "the file is damaged, or not made by wrun".into() })
}
