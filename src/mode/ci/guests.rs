//! The guests of all jobs: each is read and compiled once, whatever the number of jobs that run it.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    rc::Rc,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use tokio::sync::{OnceCell, Semaphore};

use super::{capture::hex, plan::Job, record::Status};
use crate::{
    Error,
    child::{Compiler, cores, entry},
    limits::Bytes,
    outcome::Stage,
    process::Isolation,
    sandbox::{Cache, Code, EngineSpec, Guest, LoadError, Mapped, Sandbox, Shape},
};

/// How often a guest in this process gives way.
const TICK: Duration = Duration::from_millis(10);

/// A guest that was read.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Its SHA-256, in hexadecimal digits; none when it could not be read.
    pub(super) sha256: Option<String>,
    /// What can be run, or how a job ends that would run it, and why.
    pub(super) made: Result<Made, (Status, String)>,
}

impl Loaded {
    /// One that cannot be run.
    pub(super) fn nothing(status: Status, reason: &str) -> Self {
        Self { sha256: None, made: Err((status, reason.into())) }
    }
}

/// What can be run.
pub(super) enum Made {
    /// In a process of its own.
    Process(Code),
    /// In this one, at whose checks it gives way as long as the other end of the channel is there.
    Thread(Arc<Sandbox>, #[expect(dead_code, reason = "it is dropped")] mpsc::Sender<()>),
}

impl std::fmt::Debug for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Process(_) => "Process",
            Self::Thread(..) => "Thread",
        })
    }
}

/// What two jobs must have in common to run the same code.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    wasm: PathBuf,
    stack: u64,
    here: bool,
}

/// All guests that were read.
#[derive(Debug)]
pub(super) struct Guests {
    cache: Cache,
    compiler: Compiler,
    compiling: Semaphore,
    known: HashMap<Key, Rc<OnceCell<Rc<Loaded>>>>,
}

impl Guests {
    pub(super) fn new(cache: Cache, compiler: Compiler, jobs: &[Job]) -> Self {
        // what another job makes may be another guest each time
        let made: HashSet<&Path> = jobs.iter().flat_map(|job| &job.outputs).map(|output| &*output.to).collect();
        let is_made = |wasm: &Path| wasm.ancestors().any(|path| made.contains(path));
        let keys = jobs.iter().filter(|job| !is_made(&job.wasm)).map(Key::of);
        let known = keys.map(|key| (key, Rc::default())).collect();
        Self { cache, compiler, compiling: Semaphore::new(cores() as usize), known }
    }

    /// Whether a job's guest is there before anything runs.
    pub(super) fn is_known(&self, job: &Job) -> bool {
        self.known.contains_key(&Key::of(job))
    }

    /// A job's guest, read when it was not before.
    pub(super) async fn get(&self, job: &Job) -> Rc<Loaded> {
        let key = Key::of(job);
        match self.known.get(&key) {
            Some(cell) => cell.get_or_init(|| async { Rc::new(self.load(&key).await) }).await.clone(),
            None => Rc::new(self.load(&key).await),
        }
    }

    async fn load(&self, key: &Key) -> Loaded {
        let guest = match Guest::read(&key.wasm) {
            Ok(guest) => guest,
            Err(error) => return Loaded::nothing(Status::Compile, &error.to_string()),
        };
        let sha256 = Some(hex(&guest.digest()));
        let _turn = self.compiling.acquire().await;
        let made = self.make(key, &guest).await.map_err(|error| (status_of(&error), error.to_string()));
        Loaded { sha256, made }
    }

    async fn make(&self, key: &Key, guest: &Guest) -> Result<Made, Error> {
        let metered = EngineSpec { epoch_checks: key.here, fuel: true, stack: Bytes(key.stack), pool: None };
        let mut code = self.code(metered, guest).await?;
        let (expected, found, form) = (Shape::Command, code.inspection.shape, code.inspection.form);
        if found != Some(expected) {
            return Err(LoadError::WrongShape { expected, found, form }.into());
        }
        if key.here {
            if code.inspection.has_threads() {
                return Err(Error::Usage(
                    "a guest with threads has a process of its own: expected `isolation = \"jail\"`".into(),
                ));
            }
            let engine = metered.engine(&code.inspection).map_err(|error| Error::Usage(format!("{error:#}")))?;
            let sandbox = Mapped::of(engine, &code)?.link(&code.inspection, Shape::Command)?;
            let ticker = sandbox.ticker();
            let (alive, ended) = mpsc::channel::<()>();
            let tick = move || {
                while ended.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                    ticker.tick();
                }
            };
            thread::Builder::new().name("wrun-tick".into()).spawn(tick).map_err(Error::io("start a thread"))?;
            return Ok(Made::Thread(Arc::new(sandbox), alive));
        }
        if code.inspection.has_threads() {
            code = self.code(EngineSpec { fuel: false, ..metered }, guest).await?;
        }
        Ok(Made::Process(code))
    }

    async fn code(&self, spec: EngineSpec, guest: &Guest) -> Result<Code, Error> {
        let entry = entry(&self.cache, spec, guest)?;
        Ok(self.compiler.load(entry.as_deref(), spec, guest).await?.0)
    }
}

impl Key {
    pub(super) fn of(job: &Job) -> Self {
        Self { wasm: job.wasm.clone(), stack: job.limits.stack.0, here: job.isolation == Isolation::Thread }
    }
}

/// Who is to blame for a guest that could not be started.
pub(super) fn status_of(error: &Error) -> Status {
    match error {
        Error::Load(error) => match error.end() {
            crate::outcome::End::Failed { stage: Stage::Jail | Stage::Start, .. } => Status::Infra,
            _ => Status::Compile,
        },
        Error::Usage(_) => Status::Compile,
        _ => Status::Infra,
    }
}
