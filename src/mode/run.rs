//! `wrun run`: one command guest in the foreground, in this process, with its standard streams passed through.

use std::{path::PathBuf, sync::Arc, time::Instant};

use crate::{
    Error,
    grant::Grants,
    limits::Limits,
    message::Message,
    outcome::{End, LimitKind, Outcome, Usage},
    sandbox::{Cache, Code, EngineSpec, Guest, Identity, LoadError, Sandbox, Setup, Shape, Stdio, cpu_ms, open_file},
};

/// What to run, and how.
///
/// ```no_run
/// # fn main() -> Result<(), wrun::Error> {
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

    /// Runs the guest to its end, on this thread.
    ///
    /// With a time limit the guest is compiled with checks, at which it is ended; see [`Run::run_or_exit`].
    ///
    /// # Errors
    /// When the guest could not be loaded. How it ran is the outcome.
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
        self.grants.check().map_err(LoadError::from)?;
        let spec = EngineSpec {
            epoch_checks: self.limits.timeout.is_some() && matches!(interrupt, Interrupt::Epoch),
            fuel: self.limits.fuel.is_some(),
            stack: self.limits.stack,
            pool: None,
        };
        let engine = spec.engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
        let (code, name) = if self.precompiled {
            (open_precompiled(&self.guest)?, self.guest.display().to_string())
        } else {
            let guest = Guest::read(&self.guest)?;
            let name = guest.path.display().to_string();
            (self.cache.load(&engine, guest)?.0, name)
        };
        let sandbox = Sandbox::load(engine, &code, Shape::Command)?;
        let setup = Arc::new(Setup {
            grants: self.grants,
            limits: self.limits,
            identity: Identity { id: 1, count: 1, generation: 1, name: name.clone(), process: false },
            data: Message::null(),
            args: std::iter::once(name).chain(self.args).collect(),
            stdio: Stdio::Inherit,
            outbox: None,
            shares_thread: false,
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("start the runtime"))?;
        let outcome = runtime.block_on(run_until(&sandbox, &setup, interrupt));
        // a thread may still sit in a read of standard input: nobody waits for it
        runtime.shutdown_background();
        Ok(outcome)
    }
}

async fn run_until(sandbox: &Sandbox, setup: &Arc<Setup>, interrupt: Interrupt) -> Outcome {
    let started = Instant::now();
    let run = async {
        match sandbox.start(setup).await {
            Ok(instance) => instance.run().await,
            Err(outcome) => outcome,
        }
    };
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
