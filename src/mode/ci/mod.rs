//! Jobs of a file, each a guest in a sandbox of its own, with a verdict and reports: `wrun ci`.
//!
//! A job file says which guests are run, on which files, in which order, and how they must end. [`Builder::plan`] reads it,
//! [`run()`] runs it; what happens is told as [`Event`]s, and what is left is a [`RunRecord`], `run.json` in the folder of
//! artifacts, from which the other reports are made.
//!
//! ```no_run
//! use wrun::ci;
//!
//! wrun::init(); // jobs are this program, started again
//! let plan = ci::Builder::new("wrun-ci.toml").plan()?;
//! let done = ci::run(plan, |event| eprintln!("{event:?}"))?;
//! std::process::exit(done.record.exit.into());
//! # #[allow(unreachable_code)]
//! # Ok::<(), ci::Error>(())
//! ```

mod attempt;
mod capture;
mod event;
mod file;
mod graph;
mod guests;
mod init;
mod mask;
mod plan;
mod record;
mod report;
mod run;
mod schedule;
mod select;
mod stage;
mod verdict;

use std::{
    collections::{HashMap, HashSet},
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

/// The last lines of a log, without control characters; empty when there is none.
#[must_use]
pub fn log_tail(path: &Path) -> String {
    report::tail(path, 64 << 10)
}

pub use self::{
    event::Event,
    file::Show,
    init::init,
    record::{Attempt, Counts, JobRecord, RunRecord, RunTimes, Status, StreamRecord, Times},
    report::{Reports, annotations},
    run::{Done, run},
    select::{Filter, Partition, Selection},
};
use self::{
    file::{FILE_MAX, JobFile},
    mask::SECRET_MIN,
    plan::{Plan, Retries},
};
use crate::{limits::CompileLimits, process::Program, sandbox::Cache, settings::Flaw};

/// The names that a job file has where none is named.
pub const FILES: [&str; 2] = ["wrun-ci.toml", ".config/wrun-ci.toml"];

/// Why no job was run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No job was selected.
    #[error("no job was selected")]
    Nothing,
    /// What was asked for selects nothing that there is.
    #[error("{0}")]
    Selection(String),
    /// The job file is not as expected.
    #[error("{}", flaws_text(.file, .flaws))]
    File {
        /// The file.
        file: PathBuf,
        /// All that is wrong.
        flaws: Vec<Flaw>,
    },
    /// A report, or the folder of artifacts, cannot be written to.
    #[error("could not write {what} `{}`: {source}", .path.display())]
    Report {
        /// What was to be written.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A signal came before any job had run, or while those that ran were being ended.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// wrun could not do it.
    #[error(transparent)]
    Cannot(#[from] crate::Error),
}

impl Error {
    /// Something that has a name and no meaning yet.
    #[must_use]
    pub fn later(what: &str) -> Self {
        crate::Error::Usage(format!("`{what}` is not supported yet")).into()
    }

    /// The exit code of `wrun ci`.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Nothing => 4,
            Self::Selection(_) => 94,
            Self::File { .. } => 96,
            Self::Report { .. } => 110,
            Self::Interrupted { signal } => u8::try_from(128 + signal).unwrap_or(255),
            Self::Cannot(error @ crate::Error::Usage(_)) => error.exit_code() as u8,
            Self::Cannot(_) => 103,
        }
    }
}

fn flaws_text(file: &Path, flaws: &[Flaw]) -> String {
    let flaws: Vec<_> = flaws.iter().map(|flaw| format!("{}: {flaw}", file.display())).collect();
    flaws.join("\n")
}

/// After how many failures no more jobs are started; none = never.
#[derive(Debug, Clone, Copy)]
struct MaxFail(Option<u32>);

/// Which profile of a file is chosen.
#[derive(Debug, Clone)]
struct Profile {
    name: String,
    /// Whether it must be there.
    required: bool,
}

/// What is to be run, and how: a job file, and what is otherwise this time.
#[derive(Debug)]
pub struct Builder {
    file: PathBuf,
    profile: Option<Profile>,
    selection: Selection,
    slots: Option<u32>,
    retries: Option<u32>,
    max_fail: Option<MaxFail>,
    artifacts: Option<PathBuf>,
    show: Option<Show>,
    flaky_fails: bool,
    cache: Cache,
    compile_limits: CompileLimits,
    program: Program,
    reports: Reports,
    json: Option<Lines>,
}

/// Where events go as lines.
struct Lines(Box<dyn Write + Send>);

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

impl Builder {
    /// All jobs of a file.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            profile: None,
            selection: Selection::default(),
            slots: None,
            retries: None,
            max_fail: None,
            artifacts: None,
            show: None,
            flaky_fails: false,
            cache: Cache::at(None),
            compile_limits: CompileLimits::default(),
            program: Program::Own,
            reports: Reports::default(),
            json: None,
        }
    }

    /// With what this profile of the file says.
    #[must_use]
    pub fn profile(mut self, name: &str) -> Self {
        self.profile = Some(Profile { name: name.into(), required: true });
        self
    }

    /// The same, when the file has such a profile.
    #[must_use]
    pub fn profile_if_there(mut self, name: &str) -> Self {
        self.profile = Some(Profile { name: name.into(), required: false });
        self
    }

    /// Only these jobs, and what they need.
    #[must_use]
    pub fn selection(mut self, selection: Selection) -> Self {
        self.selection = selection;
        self
    }

    /// So many at once.
    #[must_use]
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Each that fails is tried again so often.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = Some(retries);
        self
    }

    /// No more are started after so many failures; none: all are, whatever fails.
    #[must_use]
    pub fn max_fail(mut self, failures: Option<u32>) -> Self {
        self.max_fail = Some(MaxFail(failures));
        self
    }

    /// The folder of artifacts. Default: `artifacts` beside the job file.
    #[must_use]
    pub fn artifacts(mut self, folder: impl Into<PathBuf>) -> Self {
        self.artifacts = Some(folder.into());
        self
    }

    /// Of which jobs the last lines are shown.
    #[must_use]
    pub fn show(mut self, show: Show) -> Self {
        self.show = Some(show);
        self
    }

    /// Whether a run with flaky jobs has failed.
    #[must_use]
    pub fn flaky_fails(mut self, flaky_fails: bool) -> Self {
        self.flaky_fails = flaky_fails;
        self
    }

    /// Where compiled code is kept.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// What bounds the compilation of each guest.
    #[must_use]
    pub fn compile_limits(mut self, limits: CompileLimits) -> Self {
        self.compile_limits = limits;
        self
    }

    /// The program that jobs are made of, when it is not this one: a `wrun` of the same version.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Program::At(path.into());
        self
    }

    /// What is written when all is over.
    #[must_use]
    pub fn reports(mut self, reports: Reports) -> Self {
        self.reports = reports;
        self
    }

    /// Reads the file and chooses jobs. Nothing runs yet, and no guest is looked at.
    ///
    /// # Errors
    /// All that is wrong with the file, or that nothing of it is selected.
    pub fn plan(self) -> Result<Planned, Error> {
        let of_file = |flaws| Error::File { file: self.file.clone(), flaws };
        let text = read(&self.file).map_err(|reason| of_file(vec![Flaw::of_all(reason)]))?;
        let file = JobFile::read(&text, self.profile.as_ref()).map_err(of_file)?;
        let folder = std::path::absolute(&self.file).map_err(|error| of_file(vec![Flaw::of_all(error.to_string())]))?;
        let folder = folder.parent().unwrap_or(Path::new("/")).to_owned();
        // `.config` is a place for files, and the jobs are those of what it lies in
        let folder = if folder.ends_with(".config") { folder.parent().unwrap_or(&folder).to_owned() } else { folder };
        let mut plan = Plan::of(file, &text, &folder).map_err(of_file)?;
        let mut flaws = plan.check_files(&text);
        if let Some(slots) = self.slots {
            plan.run.slots = slots;
        }
        if let Some(MaxFail(max_fail)) = self.max_fail {
            plan.run.max_fail = max_fail;
        }
        if let Some(retries) = self.retries {
            for job in &mut plan.jobs {
                job.retries = Retries::times(retries);
            }
        }
        plan.run.show = self.show.unwrap_or(plan.run.show);
        let artifacts = self.artifacts.clone().unwrap_or_else(|| folder.join("artifacts"));
        let last = RunRecord::read(&artifacts);
        let failed: HashSet<String> = match &last {
            Some(last) => {
                let unwell = last.jobs.iter().filter(|job| !job.status.is_good());
                unwell.map(|job| job.job.clone()).collect()
            }
            None if self.selection.rerun_failed => {
                let message = format!("there is no `run.json` of a run before in `{}`", artifacts.display());
                return Err(Error::Selection(message));
            }
            None => HashSet::new(),
        };
        let chosen = self.selection.choose(&plan.jobs, &failed).map_err(Error::Selection)?;
        // what is not run may lack what it will
        let mut env = HashMap::new();
        for job in plan.jobs.iter().zip(&chosen).filter(|(_, is)| **is).map(|(job, _)| job) {
            for (key, names) in [("secrets", &job.secrets), ("env-pass", &job.env_pass)] {
                for name in names.iter().filter(|name| !env.contains_key(*name)).cloned().collect::<Vec<_>>() {
                    match env::var(&name) {
                        Ok(value) if key == "secrets" && value.len() < SECRET_MIN => {
                            let expected = format!("expected {SECRET_MIN} bytes or more");
                            let message = format!("the secret `{name}` is too short to be masked: {expected}");
                            flaws.push(Flaw::at(&text, job.places[key].clone(), message));
                        }
                        Ok(value) => _ = env.insert(name, value),
                        Err(error) => {
                            // its value is nobody's business
                            let why = match error {
                                env::VarError::NotPresent => "is not set",
                                env::VarError::NotUnicode(_) => "is not UTF-8",
                            };
                            let message = format!("the variable `{name}` is to be passed on, and {why}");
                            flaws.push(Flaw::at(&text, job.places[key].clone(), message));
                        }
                    }
                }
            }
        }
        let outputs = plan.jobs.iter().flat_map(|job| job.outputs.iter().map(move |output| (output, job)));
        let whole = std::path::absolute(&artifacts).unwrap_or_else(|_| artifacts.clone());
        for (output, job) in outputs.filter(|(output, _)| whole.starts_with(&output.to)) {
            let message =
                format!("expected a folder of its own, found that of all artifacts: `{}`", output.to.display());
            flaws.push(Flaw::at(&text, job.places["outputs"].clone(), message));
        }
        if !flaws.is_empty() {
            return Err(of_file(flaws));
        }
        Ok(Planned { plan, text, chosen, last, artifacts, env, builder: self })
    }
}

/// Jobs that can be run.
#[derive(Debug)]
pub struct Planned {
    plan: Plan,
    text: String,
    chosen: Vec<bool>,
    /// The last run in the folder of artifacts.
    last: Option<RunRecord>,
    artifacts: PathBuf,
    /// Variables of our own environment that some job gets.
    env: HashMap<String, String>,
    builder: Builder,
}

/// A job, as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// Its name.
    pub job: String,
    /// Its guest.
    pub wasm: String,
    /// The names of the jobs that it needs.
    pub needs: Vec<String>,
    /// Its tags.
    pub tags: Vec<String>,
}

impl Planned {
    /// Where events go as JSON lines, each at once.
    #[must_use]
    pub fn json(mut self, to: Box<dyn Write + Send>) -> Self {
        self.builder.json = Some(Lines(to));
        self
    }

    /// The jobs that are chosen, in the order of the file.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        let chosen = self.plan.jobs.iter().zip(&self.chosen).filter(|(_, is)| **is);
        let needs = |job: &plan::Job| job.needs.iter().map(|need| self.plan.jobs[*need].name.clone()).collect();
        chosen
            .map(|(job, _)| Listed {
                job: job.name.clone(),
                wasm: job.wasm_text.clone(),
                needs: needs(job),
                tags: job.tags.clone(),
            })
            .collect()
    }

    /// How many jobs of the file are not chosen.
    #[must_use]
    pub fn unselected(&self) -> usize {
        self.chosen.iter().filter(|is| !**is).count()
    }

    /// Of which jobs the last lines are shown.
    #[must_use]
    pub fn show(&self) -> Show {
        self.plan.run.show
    }

    /// The folder of artifacts.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.artifacts
    }

    /// Sees that each chosen guest is one that can be run and is the one that it should be. Compiles them.
    ///
    /// # Errors
    /// Names those that are not.
    pub fn check(&self) -> Result<(), Error> {
        run::check(self)
    }
}

/// A JSON Schema of job files.
#[must_use]
pub fn schema() -> Value {
    file::schema()
}

/// Reads a job file.
fn read(file: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("could not read it: {error}");
    let metadata = fs::metadata(file).map_err(cannot)?;
    if !metadata.is_file() {
        return Err("expected a file".into());
    }
    if metadata.len() > FILE_MAX {
        return Err(format!("expected a job file of at most {FILE_MAX} bytes, found {}", metadata.len()));
    }
    let text = String::from_utf8(fs::read(file).map_err(cannot)?).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = memchr::memchr_iter(b'\n', before).count() + 1;
        format!("expected UTF-8, found other bytes in line {line}")
    })?;
    // editors of other systems begin with that
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.into(),
        None => text,
    })
}
