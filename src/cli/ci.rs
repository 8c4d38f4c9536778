//! `wrun ci`: its flags and commands.

use std::{
    env, fs,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use wrun::ci::{Builder, Error, FILES, Partition, Planned, Reports, Selection};

use super::{CacheArgs, CompileLimitArgs};

/// Run the jobs of a file, each a guest in a sandbox of its own
///
/// `wrun-ci.toml` names guests, what they get and how they must end; `wrun ci init` writes one. Each job runs in a jailed
/// process with copies of its inputs, and with limits on memory, time, fuel, output and files. Logs and `run.json` go to the folder
/// `artifacts` beside the file.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, after_help = EXAMPLES, after_long_help = EXIT_CODES)]
pub(crate) struct CiArgs {
    #[command(subcommand)]
    pub(crate) command: Option<CiCommand>,
    #[command(flatten)]
    pub(crate) run: CiRunArgs,
}

const EXAMPLES: &str = "Example:\n  wrun ci -E 'tag(fast) & !id(fuzz-*)' --junit junit.xml";

const EXIT_CODES: &str = "\
Example:
  wrun ci -E 'tag(fast) & !id(fuzz-*)' --junit junit.xml

Exit codes:
    0  all jobs are well              103  wrun could not do it: try again
    4  no job was selected            110  a report or an output was not written
   94  no such job, or a bad filter   124  the total timeout was over
   96  a bad job file                 130  ended by SIGINT
  100  a job failed                   143  ended by SIGTERM
  101  a guest was not compiled";

#[derive(Debug, Subcommand)]
pub(crate) enum CiCommand {
    /// Say all that is wrong with a job file, and compile its guests; run nothing
    Check(FileArgs),
    /// Print a JSON Schema of job files, for editors
    Schema,
    /// Write a job file for the guests below a folder
    Init(InitArgs),
    #[command(hide = true)]
    ExplainCache(LaterArgs),
    #[command(hide = true)]
    FuelBaseline(LaterArgs),
    #[command(hide = true)]
    Cache(LaterArgs),
}

/// What comes after a word that means nothing yet.
#[derive(Debug, Args)]
pub(crate) struct LaterArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// The job file [default: `wrun-ci.toml` or `.config/wrun-ci.toml`]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Take what `[profile.NAME]` says; `ci` is taken where `CI=true`, if there is one
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Where guests are looked for, and the file is written
    #[arg(default_value = ".")]
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags are on or off")]
pub(crate) struct CiRunArgs {
    /// The jobs, by their ids; what they need is run, too [default: all]
    jobs: Vec<String>,
    #[command(flatten)]
    file: FileArgs,
    /// List the jobs that are selected, and run nothing; with `--json -` as JSON
    #[arg(short, long)]
    pub(crate) list: bool,
    /// Only jobs for which this holds, of `id(…)`, `tag(…)`, `needs(…)`, `rneeds(…)`, `failed()`, with `&`, `|`, `!`
    #[arg(short = 'E', long, value_name = "FILTER", help_heading = "Selection")]
    filter: Option<String>,
    /// Only a part of them, for several machines: `hash:1/3`, `count:1/3`
    #[arg(long, value_name = "PART", help_heading = "Selection")]
    partition: Option<Partition>,
    /// Only those that were not well in the last run
    #[arg(long, help_heading = "Selection")]
    rerun_failed: bool,
    /// What it is when no job is selected
    #[arg(long, value_enum, default_value_t = NoTests::Fail, value_name = "WHAT", help_heading = "Selection")]
    pub(crate) no_tests: NoTests,
    /// How many jobs run at once [default: one for each core]
    #[arg(short, long = "slots", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Running")]
    j: Option<u32>,
    /// How often a job is tried again that failed
    #[arg(long, value_name = "N", help_heading = "Running")]
    retries: Option<u32>,
    /// Start no more jobs after one has failed
    #[arg(long, conflicts_with_all = ["no_fail_fast", "max_fail"], help_heading = "Running")]
    fail_fast: bool,
    /// Run all jobs, however many fail
    #[arg(long, conflicts_with = "max_fail", help_heading = "Running")]
    no_fail_fast: bool,
    /// Start no more jobs after so many have failed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Running")]
    max_fail: Option<u32>,
    /// Fail when a job had to be tried again
    #[arg(long, help_heading = "Running")]
    flaky_fails: bool,
    /// Write a report in the XML of `JUnit`
    #[arg(long, value_name = "FILE", help_heading = "Reports")]
    junit: Option<PathBuf>,
    /// Write what happens as JSON lines, each at once; `-` is standard output
    #[arg(long, value_name = "FILE", help_heading = "Reports")]
    json: Option<PathBuf>,
    /// Write a summary in Markdown [default: to `$GITHUB_STEP_SUMMARY`, if that is set]
    #[arg(long, value_name = "FILE", help_heading = "Reports")]
    summary: Option<PathBuf>,
    /// Write a page with the graph of jobs, a timeline and all output
    #[arg(long, value_name = "FILE", help_heading = "Reports")]
    html: Option<PathBuf>,
    /// Where logs and `run.json` go [default: `artifacts` beside the job file]
    #[arg(long, value_name = "DIR", help_heading = "Reports")]
    artifacts: Option<PathBuf>,
    /// Whether lines have colors
    #[arg(long, value_enum, default_value_t = Color::Auto, value_name = "WHEN", help_heading = "Output")]
    pub(crate) color: Color,
    /// How progress is shown
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "HOW", help_heading = "Output")]
    pub(crate) progress: ProgressMode,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    compile: CompileLimitArgs,
    #[arg(long, hide = true)]
    on: Option<String>,
    #[arg(long, hide = true)]
    force: bool,
    #[arg(long, hide = true)]
    verify_determinism: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NoTests {
    /// An error, with code 4
    Fail,
    /// Nothing to do, with code 0
    Pass,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless `NO_COLOR` is set
    Auto,
    Always,
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// A bar on a terminal, lines everywhere
    Auto,
    /// A bar in any case
    Bar,
    /// Lines only
    Plain,
    /// Lines for what fails only
    None,
}

impl FileArgs {
    /// The job file.
    ///
    /// # Errors
    /// When none is named, and there is none where it usually is.
    pub(crate) fn path(&self) -> Result<PathBuf, Error> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let found = FILES.iter().map(PathBuf::from).find(|file| file.exists());
        found.ok_or_else(|| {
            let message = format!("found no `{}` and no `{}` here; `wrun ci init` writes one", FILES[0], FILES[1]);
            Error::Selection(message)
        })
    }

    /// All jobs of the file.
    ///
    /// # Errors
    /// As [`FileArgs::path`].
    pub(crate) fn builder(&self) -> Result<Builder, Error> {
        let builder = Builder::new(self.path()?);
        Ok(match &self.profile {
            Some(profile) => builder.profile(profile),
            None if env::var_os("CI").is_some_and(|ci| ci == "true") => builder.profile_if_there("ci"),
            None => builder,
        })
    }
}

impl CiRunArgs {
    /// Whether standard output is for JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// The job file.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn path(&self) -> Result<PathBuf, Error> {
        self.file.path()
    }

    /// What the flags describe.
    ///
    /// # Errors
    /// What was expected, or that a report cannot be written.
    pub(crate) fn builder(&self) -> Result<Builder, Error> {
        let later = [
            ("--on", self.on.is_some()),
            ("--force", self.force),
            ("--verify-determinism", self.verify_determinism.is_some()),
        ];
        if let Some((flag, _)) = later.into_iter().find(|(_, is_given)| *is_given) {
            return Err(Error::later(flag));
        }
        let selection = Selection {
            names: self.jobs.clone(),
            filter: self.filter.as_ref().map(|text| text.parse()).transpose().map_err(Error::Selection)?,
            partition: self.partition,
            rerun_failed: self.rerun_failed,
        };
        let mut builder = self.file.builder()?.selection(selection).flaky_fails(self.flaky_fails);
        builder = builder.cache(self.cache.cache()).compile_limits(self.compile.limits());
        if let Some(slots) = self.j {
            builder = builder.slots(slots);
        }
        if let Some(retries) = self.retries {
            builder = builder.retries(retries);
        }
        match (self.fail_fast, self.no_fail_fast, self.max_fail) {
            (true, _, _) => builder = builder.max_fail(Some(1)),
            (_, true, _) => builder = builder.max_fail(None),
            (_, _, Some(max)) => builder = builder.max_fail(Some(max)),
            _ => {}
        }
        if let Some(folder) = &self.artifacts {
            builder = builder.artifacts(folder);
        }
        let step = env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty() && self.summary.is_none());
        builder = builder.reports(Reports {
            junit: self.junit.clone(),
            html: self.html.clone(),
            summary: self.summary.clone(),
            step_summary: step.map(PathBuf::from),
        });
        Ok(builder)
    }

    /// With where JSON lines go, if anywhere.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn with_json(&self, planned: Planned) -> Result<Planned, Error> {
        match &self.json {
            None => Ok(planned),
            Some(_) if self.is_json() => Ok(planned.json(Box::new(io::stdout()))),
            Some(path) => {
                let what = "the JSON lines";
                let error = |source| Error::Report { what, path: path.clone(), source };
                if fs::symlink_metadata(path).is_ok_and(|it| it.is_symlink()) && !path.starts_with("/dev") {
                    return Err(error(io::Error::other("it is a link")));
                }
                Ok(planned.json(Box::new(File::create(path).map_err(error)?)))
            }
        }
    }
}
