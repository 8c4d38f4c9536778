//! One attempt of a job: its files, its guest in a sandbox, and how it ended.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::MemfdFlags;
use tokio::{
    io::AsyncReadExt,
    sync::{Notify, watch},
};

use super::{
    capture::{Capture, file_name},
    guests::{Loaded, Made},
    mask::Masks,
    plan::{Job, Stdin, at_attempt},
    record::{Attempt, Status, Times},
    stage::{Owned, Stage},
    verdict::{Cut, Ran, Verdict, verdict},
};
use crate::{
    Error,
    event::Stream,
    grant::{Denied, Grants},
    limits::Limits,
    mode::command::{ChildOutput, Command, LATE, Stdio},
    outcome::{End, LimitKind, Outcome, Usage, millis},
    process::{Program, names},
    sandbox::{self, Code, Identity, LoadError, Network, OutputSink, Roots, Sandbox, Setup, open_file},
    signal::Signal,
};

/// How often it is looked at how much a guest has written.
const LOOK: Duration = Duration::from_millis(100);

/// How much of a stream is read at once.
const PIECE: usize = 64 << 10;

/// What is the same for all attempts of a run.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) masks: Masks,
    /// Variables of our own environment that some job gets.
    pub(super) env: HashMap<String, String>,
    /// The folder of artifacts.
    pub(super) artifacts: PathBuf,
    /// Where files are staged.
    pub(super) work: PathBuf,
    pub(super) grace: Duration,
    /// The folders of outputs that are wrun's own.
    pub(super) owned: Owned,
    /// What processes are made of.
    pub(super) program: Program,
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) struct Attempted {
    /// Without when it began, and in which slot.
    pub(super) attempt: Attempt,
    /// What of its output could not be written, through no fault of its own.
    pub(super) problem: Option<String>,
}

/// What an attempt has that begins.
struct Try<'a> {
    context: &'a Context,
    job: &'a Job,
    number: u32,
    /// What its guest is refused.
    denied: &'a Arc<Mutex<Vec<Denied>>>,
    /// Whether the run is over.
    stop: watch::Receiver<bool>,
}

/// Both streams of a guest.
type Captures = [Capture; 2];

/// Runs a job once.
pub(super) async fn attempt(
    context: &Arc<Context>,
    job: &Job,
    loaded: &Loaded,
    number: u32,
    stop: watch::Receiver<bool>,
) -> Attempted {
    let begin = Instant::now();
    let suffix = if number == 1 { String::new() } else { format!(".{number}") };
    let name = file_name(&job.name);
    let capture = |stream: &str, max| {
        Capture::new(&context.masks, max, &context.artifacts, &format!("logs/{name}{suffix}.{stream}"))
    };
    let captures = [capture("stdout", job.stdout_max), capture("stderr", job.stderr_max)];
    let denied = Arc::new(Mutex::new(vec![]));
    let (verdict, usage, captures, stage) = match &loaded.made {
        Err((status, reason)) => (Verdict::of(*status, reason), Usage::default(), captures, None),
        Ok(made) => match prepare(job, context.work.join(format!("{name}{suffix}"))).await {
            Err(reason) => (Verdict::of(Status::Infra, reason), Usage::default(), captures, None),
            Ok(stage) => {
                let this = Try { context, job, number, denied: &denied, stop };
                let (ran, captures) = match made {
                    Made::Process(code) => in_process(this, code, &stage, captures).await,
                    Made::Thread(sandbox, _) => here(this, sandbox, &stage, captures).await,
                };
                let usage = ran.0.as_ref().map(|outcome| outcome.usage).unwrap_or_default();
                (verdict(job, ran), usage, captures, Some(stage))
            }
        },
    };
    let [stdout, stderr] = captures.map(Capture::finish);
    let (mut verdict, uncollected) = match stage {
        Some(stage) => verdict.settle(context, job, stage, &stdout.0, usage).await,
        None => (verdict, None),
    };
    let problem = stdout.1.or(stderr.1).or(uncollected);
    if verdict.status != Status::Pass {
        let denied = denied.lock().unwrap_or_else(PoisonError::into_inner);
        let refused: Vec<String> = denied.iter().map(refusal).collect();
        verdict.reason = verdict.reason.map(|reason| context.masks.mask(&(reason + &refused.concat())));
    }
    let attempt = Attempt {
        attempt: number,
        status: verdict.status,
        reason: verdict.reason,
        exit: verdict.exit,
        backtrace: verdict.backtrace.iter().map(|line| context.masks.mask(line)).collect(),
        fuel: usage.fuel.filter(|_| verdict.has_run),
        memory_peak: usage.memory_peak,
        stdout: stdout.0,
        stderr: stderr.0,
        times: Times { wall_ms: millis(begin.elapsed()), cpu_ms: usage.cpu_ms, ..Times::default() },
    };
    Attempted { attempt, problem }
}

/// What a job was refused, with what of its file would allow it.
fn refusal(Denied { grant, reason }: &Denied) -> String {
    let host = grant.rsplit(' ').next().unwrap_or_default();
    format!("; it was refused: {reason}; `network = {{ allow = [\"{host}\"] }}` would allow it")
}

/// Stages a job's files.
///
/// # Errors
/// Names what could not be copied.
async fn prepare(job: &Job, folder: PathBuf) -> Result<Stage, String> {
    if job.inputs.is_empty() && job.outputs.is_empty() {
        return Stage::prepare(job, folder);
    }
    // all other jobs would wait for that
    let job = job.clone();
    let staged = tokio::task::spawn_blocking(move || Stage::prepare(&job, folder)).await;
    staged.unwrap_or_else(|error| Err(error.to_string()))
}

/// What a guest may touch.
fn grants(context: &Context, job: &Job, stage: &Stage, number: u32) -> Grants {
    let passed = job.env_pass.iter().chain(&job.secrets);
    let passed = passed.filter_map(|name| Some((name.clone(), context.env.get(name)?.clone())));
    let own = job.env.iter().map(|(name, value)| (name.clone(), at_attempt(value, number)));
    Grants { dirs: stage.dirs.clone(), env: passed.chain(own).collect(), http: job.http.clone(), tcp: job.tcp.clone() }
}

/// A guest's standard input.
fn stdin(job: &Job, number: u32) -> Result<Option<File>, Error> {
    match &job.stdin {
        None => Ok(None),
        Some(Stdin::File(path)) => open_file(path).map(Some).map_err(|error| Error::Io {
            what: "open the standard input",
            source: match error {
                LoadError::Unreadable { source, .. } => source,
                other => std::io::Error::other(other.to_string()),
            },
        }),
        Some(Stdin::Text(text)) => {
            let made = || -> std::io::Result<File> {
                let mut file = File::from(rustix::fs::memfd_create("wrun-stdin", MemfdFlags::CLOEXEC)?);
                file.write_all(at_attempt(text, number).as_bytes())?;
                file.seek(SeekFrom::Start(0))?;
                Ok(file)
            };
            made().map(Some).map_err(Error::io("make a file in memory"))
        }
    }
}

/// Runs a guest in a process of its own.
async fn in_process(
    Try { context, job, number, denied, mut stop }: Try<'_>,
    code: &Code,
    stage: &Stage,
    mut captures: Captures,
) -> (Ran, Captures) {
    if code.inspection.has_threads() && job.limits.fuel != Some(u64::MAX) {
        let error = Error::Usage("fuel is not metered across threads: expected no `fuel`".into());
        return ((Err(error), None), captures);
    }
    let fuel = job.limits.fuel.filter(|_| !code.inspection.has_threads());
    let limits = Limits { fuel, ..job.limits.clone() };
    let mut command = Command::new(&job.wasm);
    command.arg0(&job.id).args(job.args.iter().map(|arg| at_attempt(arg, number)));
    command.grants(grants(context, job, stage, number)).limits(limits).isolation(job.isolation);
    command.kill_signal(Signal::TERM).grace(context.grace).ends_itself();
    if let Program::At(path) = &context.program {
        command.program(path);
    }
    let refusals = denied.clone();
    command.on_denied(move |denied| refusals.lock().unwrap_or_else(PoisonError::into_inner).push(denied.clone()));
    let started = stdin(job, number).and_then(|stdin| {
        if let Some(file) = stdin {
            command.stdin(Stdio::from(file));
        }
        command.spawn_loaded(code)
    });
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return ((Err(error), None), captures),
    };
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let [stdout, stderr] = &mut captures;
    let reads = async {
        tokio::try_join!(pump(out.as_mut(), stdout, job, "stdout"), pump(err.as_mut(), stderr, job, "stderr"))
    };
    let cut = tokio::select! {
        biased;
        read = reads => read.err().map(Cut::Output),
        reason = grown(job, stage) => Some(Cut::Output(reason)),
        _ = stop.wait_for(|is_over| *is_over) => Some(Cut::Stopped),
    };
    if cut.is_some() {
        child.kill(Signal::KILL);
    }
    let outcome = child.wait().await;
    ((outcome, cut), captures)
}

/// Takes what comes until there is no more, or too much.
async fn pump(from: Option<&mut ChildOutput>, to: &mut Capture, job: &Job, stream: &str) -> Result<(), String> {
    let Some(from) = from else { return Ok(()) };
    let mut piece = vec![0; PIECE];
    // an error is the end of what can be read
    while let Ok(read @ 1..) = from.read(&mut piece).await {
        if to.take(&piece[..read]) {
            return Err(too_much(job, stream));
        }
    }
    Ok(())
}

fn too_much(job: &Job, stream: &str) -> String {
    let max = if stream == "stdout" { job.stdout_max } else { job.stderr_max };
    format!("hit the output limit of {max} ({stream}-max)")
}

/// Waits until a guest has written too much.
async fn grown(job: &Job, stage: &Stage) -> String {
    if !stage.is_writable() {
        return std::future::pending().await;
    }
    let mut pause = LOOK;
    loop {
        tokio::time::sleep(pause).await;
        let begin = Instant::now();
        if let Err(reason) = stage.check(job.files_max) {
            return reason;
        }
        // whoever has many files is looked at less often
        pause = LOOK.max(begin.elapsed() * 20);
    }
}

/// Takes what a guest in this process prints.
struct Sink {
    captures: Mutex<Option<Captures>>,
    /// Which stream is too much.
    over: Mutex<Option<&'static str>>,
    is_over: Notify,
}

impl Sink {
    fn captures(&self) -> MutexGuard<'_, Option<Captures>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> MutexGuard<'_, Option<&'static str>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OutputSink for Sink {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        let (at, name) = match stream {
            Stream::Stdout => (0, "stdout"),
            Stream::Stderr => (1, "stderr"),
        };
        let mut captures = self.captures();
        if captures.as_mut().is_some_and(|captures| captures[at].take(bytes)) {
            self.over().get_or_insert(name);
            self.is_over.notify_one();
        }
    }
}

/// Runs a guest on a thread of this process.
async fn here(
    Try { context, job, number, denied, mut stop }: Try<'_>,
    sandbox: &Arc<Sandbox>,
    stage: &Stage,
    captures: Captures,
) -> (Ran, Captures) {
    let sink = Arc::new(Sink { captures: Mutex::new(Some(captures)), over: Mutex::default(), is_over: Notify::new() });
    let grants = grants(context, job, stage, number);
    let input = match &job.stdin {
        None => Ok(vec![]),
        Some(Stdin::Text(text)) => Ok(at_attempt(text, number).into_bytes()),
        Some(Stdin::File(path)) => fs::read(path).map_err(Error::io("read the standard input")),
    };
    let made = input.and_then(|input| {
        let names = names::answer(&grants).map_err(Error::io("make a socket"))?;
        let refusals = denied.clone();
        let hear = move |denied| refusals.lock().unwrap_or_else(PoisonError::into_inner).push(denied);
        let network = Arc::new(Network::prepare(&grants, names, &Roots::of_environment(), hear));
        let args = std::iter::once(job.id.clone()).chain(job.args.iter().map(|arg| at_attempt(arg, number)));
        let identity = Identity::alone(job.id.clone(), false);
        Ok(Setup {
            stdio: sandbox::Stdio::Piped(input.into(), sink.clone()),
            network,
            // its clock waits for that thread
            shares_thread: true,
            ends_itself: true,
            ..Setup::alone(grants, job.limits.clone(), args.collect(), identity)
        })
    });
    let take = |sink: &Sink| sink.captures().take().expect("they are taken once");
    let setup = match made {
        Ok(setup) => Arc::new(setup),
        Err(error) => return ((Err(error), None), take(&sink)),
    };
    let (sandbox, limits, printed) = (sandbox.clone(), job.limits.clone(), sink.clone());
    let run = tokio::task::spawn_blocking(move || -> Result<(Outcome, bool), Error> {
        let runtime = crate::process::runtime()?;
        let timeout = limits.timeout.unwrap_or(Duration::MAX);
        let begin = Instant::now();
        Ok(runtime.block_on(async {
            let out_of_time = || {
                let end = End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") };
                end.with(Usage::wall(begin.elapsed()))
            };
            tokio::select! {
                outcome = sandbox.run(&setup) => (outcome, false),
                // one that does not even begin to run
                () = tokio::time::sleep(timeout.saturating_add(LATE)) => (out_of_time(), false),
                () = printed.is_over.notified() => (End::Cancelled.with(Usage::wall(begin.elapsed())), false),
                _ = stop.wait_for(|is_over| *is_over) => (End::Cancelled.with(Usage::wall(begin.elapsed())), true),
            }
        }))
    });
    let grown = grown(job, stage);
    tokio::pin!(run, grown);
    // what it left is looked at when it has ended: a file of a guest in this process has no other bound
    let ran = tokio::select! {
        ran = &mut run => ran,
        reason = grown => {
            sink.over().get_or_insert("");
            sink.is_over.notify_one();
            let ran = run.await;
            let over = (ran.unwrap_or_else(|error| Err(Error::Usage(error.to_string()))).map(|(outcome, _)| outcome), Some(Cut::Output(reason)));
            return (over, take(&sink));
        }
    };
    let over = sink.over().take();
    let ran = match ran.unwrap_or_else(|error| Err(Error::Usage(error.to_string()))) {
        Ok((outcome, true)) => (Ok(outcome), Some(Cut::Stopped)),
        Ok((outcome, false)) => (Ok(outcome), over.map(|stream| Cut::Output(too_much(job, stream)))),
        Err(error) => (Err(error), None),
    };
    (ran, take(&sink))
}
