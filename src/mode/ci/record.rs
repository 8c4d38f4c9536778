//! What is kept of a run: `run.json`, from which all other reports are made. What differs from one machine to the next is
//! in members of the name `times`.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// How a job ended, or an attempt of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As expected.
    Pass,
    /// As expected, but not at the first attempt.
    Flaky,
    /// With another exit code than expected.
    Fail,
    /// It broke a rule of WebAssembly, or aborted.
    Trap,
    /// Its time was over.
    Timeout,
    /// Its fuel was used up.
    Fuel,
    /// It asked for more memory than it may have.
    Memory,
    /// It printed or left more than it may, or what it left cannot be kept.
    Output,
    /// It did not print what was expected, or took more fuel.
    Mismatch,
    /// Its guest could not be compiled, or is none that could be run.
    Compile,
    /// wrun is to blame: its process could not be started, or did not say how it ended.
    Infra,
    /// It was not started.
    Skipped,
    /// It was ended, or not started, since the run was.
    Cancelled,
}

impl Status {
    /// All of them, in the order in which they are counted.
    pub const ALL: [Self; 13] = [
        Self::Pass,
        Self::Flaky,
        Self::Fail,
        Self::Trap,
        Self::Timeout,
        Self::Fuel,
        Self::Memory,
        Self::Output,
        Self::Mismatch,
        Self::Compile,
        Self::Infra,
        Self::Skipped,
        Self::Cancelled,
    ];

    /// Its word in reports.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Flaky => "flaky",
            Self::Fail => "fail",
            Self::Trap => "trap",
            Self::Timeout => "timeout",
            Self::Fuel => "fuel",
            Self::Memory => "memory",
            Self::Output => "output",
            Self::Mismatch => "mismatch",
            Self::Compile => "compile",
            Self::Infra => "infra",
            Self::Skipped => "skipped",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the job did what it should.
    #[must_use]
    pub fn is_good(self) -> bool {
        matches!(self, Self::Pass | Self::Flaky)
    }

    /// Whether the job failed, whoever is to blame.
    #[must_use]
    pub fn is_bad(self) -> bool {
        !self.is_good() && !matches!(self, Self::Skipped | Self::Cancelled)
    }
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The version of this format: 1.
    pub v: u32,
    /// What tells this run from all others.
    pub run: String,
    /// The name that the job file gives it.
    pub name: String,
    /// The job file, as it was named.
    pub file: String,
    /// The profile that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// What fuel was counted by: numbers of different engines cannot be compared.
    pub engine: String,
    /// How many jobs of the file were not selected.
    pub unselected: usize,
    /// The selected jobs, in the order of the file.
    pub jobs: Vec<JobRecord>,
    /// The exit code of the command, as far as it was known when this was written.
    pub exit: u8,
    /// Why not all jobs ran, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// When, and for how long.
    pub times: RunTimes,
}

/// When a run was, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunTimes {
    /// When it began: RFC 3339, in UTC.
    pub started: String,
    /// How long it took, in milliseconds.
    pub wall_ms: u64,
    /// How many jobs could run at once.
    pub slots: u32,
}

/// One job of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its name: its id, and what it has of a matrix, as in `unit (case=a,size=1)`.
    pub job: String,
    /// Its id.
    pub id: String,
    /// The line of the job file that it begins in.
    pub line: usize,
    /// Its tags.
    pub tags: Vec<String>,
    /// The names of the jobs that it needs.
    pub needs: Vec<String>,
    /// Its guest.
    pub wasm: String,
    /// The SHA-256 of that, when it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wasm_sha256: Option<String>,
    /// How it ended.
    pub status: Status,
    /// Why, in words; none for a pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether all is well even when it failed.
    pub allow_failure: bool,
    /// How many attempts it may have.
    pub tries: u32,
    /// The folders of its outputs that wrun has made, and may replace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// All attempts, in order; none when it was not started.
    pub attempts: Vec<Attempt>,
}

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: u32,
    /// How it ended.
    pub status: Status,
    /// Why, in words; none for a pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The guest's exit code, if it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    /// The guest's functions in which it trapped, innermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backtrace: Vec<String>,
    /// How much fuel it used; not known of one whose process was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
    /// The most memory that it had, in bytes; not known of one whose process was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak: Option<u64>,
    /// What it printed.
    pub stdout: StreamRecord,
    /// What it printed to standard error.
    pub stderr: StreamRecord,
    /// When, and for how long.
    pub times: Times,
}

/// What a guest printed to one stream. Secrets are masked before anything of it is counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    /// How many bytes.
    pub bytes: u64,
    /// How many lines.
    pub lines: u64,
    /// Their SHA-256, in hexadecimal digits.
    pub sha256: String,
    /// The file that has them, from the folder of artifacts; none when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
}

/// When an attempt was, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// When it began, in milliseconds from the begin of the run.
    pub start_ms: u64,
    /// How long it took, in milliseconds, with all that was done around its guest.
    pub wall_ms: u64,
    /// The CPU time of its process, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// Which of the jobs that run at once it was, from 0.
    pub slot: u32,
}

/// How many jobs ended how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts([usize; Status::ALL.len()]);

impl Counts {
    /// Counts jobs.
    pub fn of<'a>(jobs: impl IntoIterator<Item = &'a JobRecord>) -> Self {
        let mut counts = Self::default();
        for job in jobs {
            counts.0[job.status as usize] += 1;
        }
        counts
    }

    /// How many ended so.
    #[must_use]
    pub fn get(&self, status: Status) -> usize {
        self.0[status as usize]
    }

    /// `11 passed (1 flaky), 2 failed, 1 timed out, 3 skipped`.
    #[must_use]
    pub fn words(&self) -> String {
        let passed = self.get(Status::Pass) + self.get(Status::Flaky);
        let mut text = format!("{passed} passed");
        if self.get(Status::Flaky) > 0 {
            let _ = write!(text, " ({} flaky)", self.get(Status::Flaky));
        }
        let rest = Status::ALL.iter().filter(|status| !status.is_good() && self.get(**status) > 0);
        for status in rest {
            let word = match status {
                Status::Fail => "failed",
                Status::Trap => "trapped",
                Status::Timeout => "timed out",
                Status::Fuel => "out of fuel",
                Status::Memory => "out of memory",
                Status::Output => "over the output limit",
                Status::Mismatch => "mismatched",
                Status::Compile => "not compiled",
                Status::Infra => "not run by wrun's fault",
                other => other.word(),
            };
            let _ = write!(text, ", {} {word}", self.get(*status));
        }
        text
    }
}

impl RunRecord {
    /// How many jobs ended how.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts::of(&self.jobs)
    }
}

impl JobRecord {
    /// Whether the run is not well for it.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        self.status.is_bad() && !self.allow_failure
    }

    /// How long all its attempts took, in milliseconds.
    #[must_use]
    pub fn wall_ms(&self) -> u64 {
        self.attempts.iter().fold(0, |sum, attempt| sum.saturating_add(attempt.times.wall_ms))
    }

    /// Its last attempt.
    #[must_use]
    pub fn last(&self) -> Option<&Attempt> {
        self.attempts.last()
    }
}
