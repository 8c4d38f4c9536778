//! A run: jobs are started as the schedule says, on one thread, and all that happens is told and kept.

use std::{
    collections::{HashMap, HashSet},
    future::poll_fn,
    io,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::{
    signal::{self, unix::SignalKind},
    sync::{mpsc, oneshot, watch},
    task::{JoinSet, LocalSet},
    time::sleep_until,
};

use super::{
    Error, Event, Lines, Planned,
    attempt::{Attempted, Context as Shared, attempt},
    guests::{Guests, Key, Loaded},
    mask::Masks,
    plan::{Job, Plan},
    record::{Attempt, JobRecord, RunRecord, RunTimes, Status},
    report,
    schedule::{Act, Schedule},
    stage::{Owned, WorkFolder},
};
use crate::{
    child::Compiler,
    outcome::millis,
    process::{Isolation, raise_descriptors, runtime},
    sandbox::ENGINE,
    settings::Flaw,
    signal::Signals,
};

/// How long is waited when there is nothing to wait for.
const LONG: Duration = Duration::from_hours(1);

/// A run that is over.
#[derive(Debug)]
pub struct Done {
    /// All that is known of it.
    pub record: RunRecord,
    /// What could not be written.
    pub problems: Vec<String>,
}

/// Runs jobs until all are over. SIGINT and SIGTERM end those that run, and the reports are of what there was; another one
/// ends this at once.
///
/// # Errors
/// When nothing could be run. How jobs ended is in the record.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn run(planned: Planned, tell: impl FnMut(&Event)) -> Result<Done, Error> {
    if !planned.chosen.contains(&true) {
        return Err(Error::Nothing);
    }
    raise_descriptors();
    let runtime = runtime()?;
    let done = runtime.block_on(LocalSet::new().run_until(drive(planned, tell)));
    // files that are still copied, and guests in this process that wait for the system, nobody waits for
    runtime.shutdown_background();
    done
}

/// Compiles the guests of all chosen jobs, and says which are none.
pub(super) fn check(planned: &Planned) -> Result<(), Error> {
    let guests = Rc::new(guests(planned));
    let local = LocalSet::new();
    runtime()?.block_on(local.run_until(async {
        let mut flaws = load(planned, &guests).await?;
        for (job, _) in planned.plan.jobs.iter().zip(&planned.chosen).filter(|(_, is)| **is) {
            if guests.is_known(job)
                && let Err((_, reason)) = &guests.get(job).await.made
            {
                flaws.push(Flaw::at(&planned.text, job.places["wasm"].clone(), reason.clone()));
            }
        }
        of_file(planned, flaws)
    }))
}

fn of_file(planned: &Planned, mut flaws: Vec<Flaw>) -> Result<(), Error> {
    flaws.dedup();
    if flaws.is_empty() { Ok(()) } else { Err(Error::File { file: planned.builder.file.clone(), flaws }) }
}

fn guests(planned: &Planned) -> Guests {
    let isolations = planned.plan.jobs.iter().map(|job| job.isolation);
    let jailed = isolations.clone().any(|isolation| isolation == Isolation::Jail);
    let compiler = Compiler {
        program: planned.builder.program.clone(),
        // whoever asks for a jail anywhere has its guests compiled in one
        isolation: if jailed { Isolation::Jail } else { Isolation::Process },
        limits: planned.builder.compile_limits,
    };
    Guests::new(planned.builder.cache.clone(), compiler, &planned.plan.jobs)
}

/// Reads and compiles all guests that are there, as many at once as there are cores. Answers which are not those that they
/// should be.
async fn load(planned: &Planned, guests: &Rc<Guests>) -> Result<Vec<Flaw>, Error> {
    let chosen = || planned.plan.jobs.iter().zip(&planned.chosen).filter(|(_, is)| **is).map(|(job, _)| job);
    let known = || chosen().filter(|job| guests.is_known(job));
    // each once, however many jobs run it
    let mut seen = HashSet::new();
    let mut loading = JoinSet::new();
    for job in known().filter(|job| seen.insert(Key::of(job))) {
        let (guests, job) = (guests.clone(), job.clone());
        loading.spawn_local(async move { _ = guests.get(&job).await });
    }
    while loading.join_next().await.is_some() {}
    let mut flaws = vec![];
    for job in known() {
        if let Some(message) = wrong_pin(job, &*guests.get(job).await) {
            flaws.push(Flaw::at(&planned.text, job.places["sha256"].clone(), message));
        }
    }
    Ok(flaws)
}

fn wrong_pin(job: &Job, loaded: &Loaded) -> Option<String> {
    let (pin, found) = (job.sha256.as_ref()?, loaded.sha256.as_ref()?);
    (pin != found).then(|| format!("`{}` is another guest: its SHA-256 is {found}", job.wasm_text))
}

/// The signals that end a run.
struct Ends {
    signals: Signals,
    hangup: signal::unix::Signal,
}

impl Ends {
    fn new() -> io::Result<Self> {
        Ok(Self { signals: Signals::new()?, hangup: signal::unix::signal(SignalKind::hangup())? })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        match self.hangup.poll_recv(cx) {
            Poll::Ready(Some(())) => Poll::Ready(SignalKind::hangup().as_raw_value()),
            _ => self.signals.poll(cx),
        }
    }
}

/// An attempt that has ended.
struct Ended {
    job: usize,
    slot: u32,
    start_ms: u64,
    attempted: Attempted,
    sha256: Option<String>,
}

/// One that runs.
struct Running {
    attempt: u32,
    since: Instant,
    /// When it is told of as slow next.
    slow_at: Instant,
}

/// A run that is under way.
struct Driver<F> {
    plan: Rc<Plan>,
    schedule: Schedule,
    guests: Rc<Guests>,
    context: Arc<Shared>,
    record: RunRecord,
    /// Where a job is in the record.
    places: HashMap<usize, usize>,
    running: HashMap<usize, Running>,
    free_slots: Vec<u32>,
    begin: Instant,
    stop: watch::Sender<bool>,
    ended: mpsc::UnboundedSender<Ended>,
    json: Option<Lines>,
    problems: Vec<String>,
    /// The exit code of a run that was ended.
    stopped: Option<u8>,
    tell: F,
}

async fn drive<F: FnMut(&Event)>(planned: Planned, tell: F) -> Result<Done, Error> {
    let mut signals = Ends::new().map_err(crate::Error::io("listen for signals"))?;
    let guests = Rc::new(guests(&planned));
    // compiling may take long, and a signal ends it with all the rest
    let interrupted = tokio::select! {
        flaws = load(&planned, &guests) => of_file(&planned, flaws?).map(|()| None)?,
        signal = poll_fn(|cx| signals.poll(cx)) => Some(signal),
    };
    let artifacts = planned.artifacts.clone();
    let taken = report::take_folder(&artifacts, planned.last.as_ref());
    let _taken = taken.map_err(|source| Error::Report { what: "to the folder", path: artifacts.clone(), source })?;
    let (ended, mut came) = mpsc::unbounded_channel();
    let flaky_fails = planned.builder.flaky_fails;
    let total = planned.plan.run.total_timeout;
    let (mut driver, reports, work) = Driver::new(planned, guests, ended, tell)?;
    let deadline = total.map(|total| driver.begin + total);
    let mut stopped = interrupted.map(|signal| driver.stop(signal));
    while !driver.schedule.is_over() {
        driver.start();
        let due = driver.next_due().unwrap_or_else(|| Instant::now() + LONG);
        tokio::select! {
            biased;
            signal = poll_fn(|cx| signals.poll(cx)) => {
                if stopped.is_some() {
                    return Err(Error::Interrupted { signal });
                }
                stopped = Some(driver.stop(signal));
            }
            Some(ended) = came.recv() => driver.take(ended),
            () = sleep_until(deadline.unwrap_or(due).into()), if deadline.is_some() && stopped.is_none() => {
                let reason = format!("the total timeout of {:?} was over", total.unwrap_or_default());
                driver.end_all(&reason);
                stopped = Some((124, reason));
            }
            () = sleep_until(due.into()) => driver.tell_slow(),
        }
    }
    drop(work);
    driver.settle(stopped, flaky_fails);
    // whoever takes a report may take it slowly, or not at all
    let (written, done) = oneshot::channel();
    let (record, artifacts) = (driver.record.clone(), driver.context.artifacts.clone());
    let write = move || _ = written.send(reports.write(&record, &artifacts));
    thread::Builder::new().name("wrun-report".into()).spawn(write).map_err(crate::Error::io("start a thread"))?;
    let problems = tokio::select! {
        problems = done => problems.unwrap_or_default(),
        signal = poll_fn(|cx| signals.poll(cx)) => return Err(Error::Interrupted { signal }),
    };
    Ok(driver.finish(problems, flaky_fails))
}

impl<F: FnMut(&Event)> Driver<F> {
    fn new(
        planned: Planned,
        guests: Rc<Guests>,
        ended: mpsc::UnboundedSender<Ended>,
        tell: F,
    ) -> Result<(Self, report::Reports, WorkFolder), Error> {
        let Planned { plan, chosen, last, artifacts, env, builder, .. } = planned;
        let run = id();
        let work = std::env::temp_dir().join(format!("wrun-ci-{run}"));
        let folder = WorkFolder::new(work.clone()).map_err(|source| Error::Report {
            what: "to the folder",
            path: work.clone(),
            source,
        })?;
        let secrets = plan.jobs.iter().zip(&chosen).filter(|(_, is)| **is).flat_map(|(job, _)| &job.secrets);
        let masks = Masks::of(secrets.filter_map(|name| env.get(name)).map(String::as_str));
        let settings = plan.run.clone();
        let durations = durations(&plan, last.as_ref());
        let (schedule, acts) =
            Schedule::new(&plan.jobs, &chosen, (settings.slots, settings.max_fail, settings.infra_retries), &durations);
        let at = plan.jobs.iter().zip(&chosen).enumerate().filter(|(_, (_, is))| **is).map(|(at, _)| at);
        let at: Vec<usize> = at.collect();
        let record = RunRecord {
            v: 1,
            run,
            name: masks.mask(&plan.name),
            file: builder.file.display().to_string(),
            profile: plan.profile.clone(),
            engine: ENGINE.into(),
            unselected: plan.jobs.len() - at.len(),
            jobs: at.iter().map(|at| first_record(&plan, *at, &masks)).collect(),
            exit: 0,
            ended: None,
            times: RunTimes {
                started: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
                wall_ms: 0,
                slots: settings.slots,
            },
        };
        let before = last.iter().flat_map(|last| &last.jobs).flat_map(|job| &job.outputs);
        let owned = Owned::of(before.map(PathBuf::from));
        let (stop, _) = watch::channel(false);
        let mut driver = Self {
            schedule,
            guests,
            context: Arc::new(Shared {
                masks,
                env,
                artifacts,
                work,
                grace: settings.grace,
                owned,
                program: builder.program.clone(),
            }),
            record,
            places: at.iter().enumerate().map(|(place, at)| (*at, place)).collect(),
            running: HashMap::new(),
            free_slots: (0..settings.slots).rev().collect(),
            begin: Instant::now(),
            stop,
            ended,
            json: builder.json,
            problems: vec![],
            stopped: None,
            tell,
            plan: Rc::new(plan),
        };
        driver.tell(&Event::RunStart(Box::new(driver.record.clone())));
        for place in 0..driver.record.jobs.len() {
            let job = driver.record.jobs[place].job.clone();
            driver.tell(&Event::Queue { job });
        }
        driver.act(acts, None);
        Ok((driver, builder.reports, folder))
    }

    fn tell(&mut self, event: &Event) {
        if let Some(Lines(json)) = &mut self.json {
            let mut line = event.json(&self.record.run).to_string();
            line.push('\n');
            // each at once: who is killed leaves what there was
            if let Err(error) = json.write_all(line.as_bytes()).and_then(|()| json.flush()) {
                let message = format!("could not write the JSON lines: {error}");
                self.problems.push(message.clone());
                self.json = None;
                (self.tell)(&Event::Warning { message });
            }
        }
        (self.tell)(event);
    }

    /// Starts what can be.
    fn start(&mut self) {
        let now = Instant::now();
        while let Some((at, number)) = self.schedule.start(now) {
            let slot = self.free_slots.pop().unwrap_or_default();
            let job = self.plan.jobs[at].clone();
            let terminate =
                self.plan.run.terminate_after.map(|periods| self.plan.run.slow_period.saturating_mul(periods));
            self.tell(&Event::Start { job: job.name.clone(), attempt: number, slot });
            let slow_at = now + self.plan.run.slow_period;
            self.running.insert(at, Running { attempt: number, since: now, slow_at });
            let (guests, context) = (self.guests.clone(), self.context.clone());
            let (ended, stop) = (self.ended.clone(), self.stop.subscribe());
            let start_ms = millis(self.begin.elapsed());
            tokio::task::spawn_local(async move {
                let job = Job { limits: bounded(&job, terminate), ..job };
                let mut is_over = stop.clone();
                // one that another job has made is compiled now
                let loaded = tokio::select! {
                    loaded = guests.get(&job) => loaded,
                    _ = is_over.wait_for(|is_over| *is_over) => {
                        Rc::new(Loaded::nothing(Status::Cancelled, "the run was ended"))
                    }
                };
                let loaded = match wrong_pin(&job, &loaded) {
                    Some(reason) => Rc::new(Loaded::nothing(Status::Compile, &reason)),
                    None => loaded,
                };
                let attempted = attempt(&context, &job, &loaded, number, stop).await;
                let sha256 = loaded.sha256.clone();
                // nobody listens when the run is over
                let _ = ended.send(Ended { job: at, slot, start_ms, attempted, sha256 });
            });
        }
    }

    /// When something is to be done although nothing happens.
    fn next_due(&self) -> Option<Instant> {
        let slow = self.running.values().map(|running| running.slow_at);
        slow.chain(self.schedule.next_due()).min()
    }

    fn tell_slow(&mut self) {
        let (now, period) = (Instant::now(), self.plan.run.slow_period);
        let mut slow = vec![];
        for (at, running) in self.running.iter_mut().filter(|(_, running)| running.slow_at <= now) {
            // once, however long nobody has looked
            running.slow_at = now + period;
            slow.push((*at, running.attempt, millis(running.since.elapsed())));
        }
        for (at, attempt, after_ms) in slow {
            let job = self.plan.jobs[at].name.clone();
            self.tell(&Event::Slow { job, attempt, after_ms });
        }
    }

    /// Ends all for a signal. Answers the exit code, and why.
    fn stop(&mut self, signal: i32) -> (u8, String) {
        let reason = match signal {
            1 => "hung up",
            2 => "interrupted",
            _ => "terminated",
        };
        self.end_all(&format!("the run was {reason}"));
        (u8::try_from(128 + signal).unwrap_or(255), reason.into())
    }

    /// Starts nothing any more, and ends what runs.
    fn end_all(&mut self, reason: &str) {
        let acts = self.schedule.close(Status::Cancelled, reason);
        self.act(acts, None);
        // nobody listens when nothing runs
        let _ = self.stop.send(true);
    }

    /// Takes an attempt that has ended.
    fn take(&mut self, ended: Ended) {
        let Ended { job, slot, start_ms, attempted, sha256 } = ended;
        self.running.remove(&job);
        self.free_slots.push(slot);
        if let Some(problem) = attempted.problem {
            self.tell(&Event::Warning { message: problem.clone() });
            self.problems.push(problem);
        }
        let mut attempt = attempted.attempt;
        (attempt.times.start_ms, attempt.times.slot) = (start_ms, slot);
        let record = &mut self.record.jobs[self.places[&job]];
        record.wasm_sha256 = sha256.or(record.wasm_sha256.take());
        record.attempts.push(attempt.clone());
        let outputs = self.plan.jobs[job].outputs.iter().filter(|output| self.context.owned.has(&output.to));
        record.outputs = outputs.map(|output| output.to.display().to_string()).collect();
        let acts = self.schedule.ended(job, attempt.status, Instant::now(), chance());
        self.act(acts, Some(&attempt));
    }

    fn act(&mut self, acts: Vec<Act>, attempt: Option<&Attempt>) {
        for act in acts {
            match act {
                Act::Retry { job, after } => {
                    let Some(attempt) = attempt.cloned() else { continue };
                    let of = self.plan.jobs[job].retries.count + 1;
                    let job = self.plan.jobs[job].name.clone();
                    self.tell(&Event::Attempt { job, attempt: Box::new(attempt), of, retry_ms: millis(after) });
                }
                Act::End { job, status, reason } => {
                    let record = &mut self.record.jobs[self.places[&job]];
                    record.status = status;
                    let last = record.attempts.last();
                    record.reason =
                        if status.is_good() { None } else { reason.or(last.and_then(|it| it.reason.clone())) };
                    let record = record.clone();
                    self.tell(&Event::End(Box::new(record)));
                }
            }
        }
    }

    /// Says how the run ended, as far as that is known before the reports are written.
    fn settle(&mut self, stopped: Option<(u8, String)>, flaky_fails: bool) {
        self.record.times.wall_ms = millis(self.begin.elapsed());
        (self.stopped, self.record.ended) = stopped.unzip();
        self.record.exit = self.exit(flaky_fails);
    }

    fn exit(&self, flaky_fails: bool) -> u8 {
        self.stopped.unwrap_or_else(|| exit_code(&self.record, flaky_fails, &self.problems))
    }

    /// All is over, and these reports could not be written.
    fn finish(mut self, problems: Vec<String>, flaky_fails: bool) -> Done {
        for message in problems {
            self.tell(&Event::Warning { message: message.clone() });
            self.problems.push(message);
        }
        self.record.exit = self.exit(flaky_fails);
        self.tell(&Event::RunEnd(Box::new(self.record.clone())));
        // that may have been what could not be told
        self.record.exit = self.exit(flaky_fails);
        Done { record: self.record, problems: self.problems }
    }
}

/// The exit code of a run that came to its end: the worst that happened in it.
fn exit_code(record: &RunRecord, flaky_fails: bool, problems: &[String]) -> u8 {
    let has = |status| record.jobs.iter().any(|job| job.status == status && job.is_failure());
    let is_flaky = flaky_fails && record.jobs.iter().any(|job| job.status == Status::Flaky);
    match () {
        () if !problems.is_empty() => 110,
        () if has(Status::Infra) => 103,
        () if has(Status::Compile) => 101,
        () if is_flaky || record.jobs.iter().any(JobRecord::is_failure) => 100,
        () => 0,
    }
}

/// What a job's guest is bounded by when it may take no longer than that.
fn bounded(job: &Job, terminate: Option<Duration>) -> crate::limits::Limits {
    let timeout = job.limits.timeout.into_iter().chain(terminate).min();
    crate::limits::Limits { timeout, ..job.limits.clone() }
}

fn first_record(plan: &Plan, at: usize, masks: &Masks) -> JobRecord {
    let job = &plan.jobs[at];
    JobRecord {
        job: job.name.clone(),
        id: job.id.clone(),
        line: job.line,
        tags: job.tags.clone(),
        needs: job.needs.iter().map(|need| plan.jobs[*need].name.clone()).collect(),
        wasm: masks.mask(&job.wasm_text),
        wasm_sha256: None,
        status: Status::Skipped,
        reason: None,
        allow_failure: job.allow_failure,
        tries: job.retries.count.saturating_add(1),
        outputs: vec![],
        attempts: vec![],
    }
}

/// How long jobs are thought to take: as in the last run, and what was not in it as long as half of those.
fn durations(plan: &Plan, last: Option<&RunRecord>) -> Vec<Duration> {
    let known = last.into_iter().flat_map(|last| &last.jobs).filter(|job| !job.attempts.is_empty());
    let known: HashMap<&str, u64> = known.map(|job| (job.job.as_str(), job.wall_ms())).collect();
    let mut all: Vec<u64> = known.values().copied().collect();
    all.sort_unstable();
    let usual = all.get(all.len() / 2).copied().unwrap_or(0);
    let of = |job: &Job| Duration::from_millis(known.get(job.name.as_str()).copied().unwrap_or(usual).max(1));
    plan.jobs.iter().map(of).collect()
}

/// What tells a run from all others: when it began, and a random number.
fn id() -> String {
    let now = millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    format!("{now:012x}-{:08x}", random() >> 32)
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // where there is none, the time is all
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    u64::from_le_bytes(bytes)
}

/// A number between 0 and 1.
fn chance() -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "any number will do")]
    let chance = (random() >> 11) as f64 / (1u64 << 53) as f64;
    chance
}
