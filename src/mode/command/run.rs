//! `wrun run`: one command guest in the foreground, with the standard streams passed through: in this process, or in one
//! of its own.

use std::{os::fd::AsFd, path::PathBuf, sync::Arc, time::Instant};

use super::launch::{Extra, OnDenied, Settings};
use crate::{
    Error,
    grant::{Denied, Grants},
    limits::{CompileLimits, Limits},
    outcome::{End, LimitKind, Outcome, Usage},
    process::{Isolation, Program, names, runtime},
    sandbox::{Cache, EngineSpec, Mapped, Network, Roots, Sandbox, Setup, Shape, cpu_ms},
};

/// What to run, and how.
///
/// The guest is compiled by a child of this process, and so is what runs it with [`Isolation::Process`]. A guest with threads
/// always has a process of its own.
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
pub struct Run(Settings);

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
        Self(Settings::new(guest.into(), Isolation::Thread))
    }

    /// The arguments after the guest's own name, handed over as they are.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.0.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// What the guest may touch.
    pub fn grants(mut self, grants: Grants) -> Self {
        self.0.grants = grants;
        self
    }

    /// What bounds it.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.0.limits = limits;
        self
    }

    /// Where its compiled code is kept.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.0.cache = cache;
        self
    }

    /// Takes the file for code that `wrun compile -o` made, and *trusts it as a native program*: it can do whatever
    /// this process can.
    pub fn precompiled(mut self, precompiled: bool) -> Self {
        self.0.precompiled = precompiled;
        self
    }

    /// What is between the guest and the host; default [`Isolation::Thread`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.0.compiler.isolation = isolation;
        self
    }

    /// What bounds its compilation.
    pub fn compile_limits(mut self, limits: CompileLimits) -> Self {
        self.0.compiler.limits = limits;
        self
    }

    /// The program that children are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.compiler.program = Program::At(path.into());
        self
    }

    /// Who hears what the guest was refused of the network: each grant that it lacks once, and not without end. Default a
    /// warning.
    pub fn on_denied(mut self, hear: impl Fn(&Denied) + Send + Sync + 'static) -> Self {
        self.0.on_denied = OnDenied::new(hear);
        self
    }

    /// Runs the guest to its end, on this thread or in a process of its own.
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
        let settings = self.0;
        settings.check()?;
        let here = settings.compiler.isolation == Isolation::Thread;
        let spec = EngineSpec {
            epoch_checks: here && settings.limits.timeout.is_some() && matches!(interrupt, Interrupt::Epoch),
            ..settings.spec()
        };
        let runtime = runtime()?;
        let mut code = runtime.block_on(settings.load(spec))?;
        // threads cannot be ended one by one, as a process can
        let here = here && !code.inspection.has_threads();
        if !here && spec.epoch_checks {
            code = runtime.block_on(settings.load(settings.spec()))?;
        }
        let outcome = if here {
            let engine = spec.engine(&code.inspection).map_err(|error| Error::Usage(format!("{error:#}")))?;
            let sandbox = Mapped::of(engine, &code)?.link(&code.inspection, Shape::Command)?;
            let (args, identity) = (settings.argv(), settings.identity(false));
            let names = names::answer(&settings.grants).map_err(Error::io("make a socket"))?;
            let hear = move |denied| settings.on_denied.tell(&denied);
            let network = Network::prepare(&settings.grants, names, &Roots::of_environment(), hear);
            let setup = Arc::new(Setup {
                network: Arc::new(network),
                // its clock waits for that thread when it is ended from inside
                shares_thread: spec.epoch_checks,
                ..Setup::alone(settings.grants, settings.limits, args, identity)
            });
            runtime.block_on(run_until(&sandbox, &setup, interrupt))
        } else {
            let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
            runtime.block_on(async {
                let streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
                settings.start(&code, Extra::default(), streams)?.wait().await
            })?
        };
        // a thread may still sit in a read of standard input: nobody waits for it
        runtime.shutdown_background();
        Ok(outcome)
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
