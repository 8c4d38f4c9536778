//! What the end of a guest means for its job: the status, with why, and what is kept of what it left.

use std::{fs, io::Read, sync::Arc};

use sha2::{Digest, Sha256};

use super::{
    attempt::Context,
    capture::hex,
    guests::status_of,
    plan::Job,
    record::{Status, StreamRecord},
    stage::{Stage, Uncollected},
};
use crate::{
    Error,
    outcome::{End, LimitKind, Outcome, Stage as Step, Usage},
    sandbox::open_file,
};

/// The largest text that is compared with what was expected.
const EXPECTED_MAX: u64 = 64 << 20;

/// Why a guest was ended before it did.
#[derive(Debug)]
pub(super) enum Cut {
    /// It printed or left too much.
    Output(String),
    /// The run is over.
    Stopped,
}

/// How a guest ended.
pub(super) type Ran = (Result<Outcome, Error>, Option<Cut>);

/// What is to be said of an attempt.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) status: Status,
    pub(super) reason: Option<String>,
    pub(super) exit: Option<i32>,
    pub(super) backtrace: Vec<String>,
    /// Whether its guest was there at all.
    pub(super) has_run: bool,
}

impl Verdict {
    pub(super) fn of(status: Status, reason: impl Into<String>) -> Self {
        Self { status, reason: Some(reason.into()), exit: None, backtrace: vec![], has_run: false }
    }

    /// Compares with what was expected, and keeps what is to be kept. Answers what could not be, through no fault of the
    /// guest's.
    pub(super) async fn settle(
        self,
        context: &Arc<Context>,
        job: &Job,
        stage: Stage,
        stdout: &StreamRecord,
        usage: Usage,
    ) -> (Self, Option<String>) {
        if !stage.has_files() && job.expect.stdout.is_none() {
            return self.settle_now(context, job, &stage, stdout, usage);
        }
        // files are read and written, and all other jobs would wait for that
        let (context, job, stdout) = (context.clone(), job.clone(), stdout.clone());
        let settle = move || self.settle_now(&context, &job, &stage, &stdout, usage);
        let settled = tokio::task::spawn_blocking(settle).await;
        settled.unwrap_or_else(|error| (Self::of(Status::Infra, error.to_string()), None))
    }

    fn settle_now(
        mut self,
        context: &Context,
        job: &Job,
        stage: &Stage,
        stdout: &StreamRecord,
        usage: Usage,
    ) -> (Self, Option<String>) {
        if self.status == Status::Pass {
            let differs = mismatch(context, job, stdout, usage).map(|reason| (Status::Mismatch, reason));
            let is_full = || stage.check(job.files_max).err().map(|reason| (Status::Output, reason));
            if let Some((status, reason)) = differs.or_else(is_full) {
                (self.status, self.reason) = (status, Some(reason));
            }
        }
        // what a job leaves that failed may say why
        if !self.has_run || self.status == Status::Output {
            return (self, None);
        }
        match stage.collect(job, &context.masks, &context.owned) {
            Ok(()) => (self, None),
            Err(Uncollected::Cannot(reason)) => (self, Some(reason)),
            Err(Uncollected::Refused(reason)) => {
                if self.status == Status::Pass {
                    (self.status, self.reason) = (Status::Output, Some(reason));
                }
                (self, None)
            }
        }
    }
}

/// What the end of a guest means.
pub(super) fn verdict(job: &Job, (outcome, cut): Ran) -> Verdict {
    let outcome = match (cut, outcome) {
        (Some(Cut::Stopped), _) => return Verdict::of(Status::Cancelled, "the run was ended"),
        (Some(Cut::Output(reason)), _) => return Verdict { has_run: true, ..Verdict::of(Status::Output, reason) },
        (None, Err(error)) => return Verdict::of(status_of(&error), error.to_string()),
        (None, Ok(outcome)) => outcome,
    };
    let reason = outcome.to_string();
    let (status, backtrace) = match outcome.end {
        End::Exited { code } if code == job.expect.exit => {
            return Verdict { status: Status::Pass, reason: None, exit: Some(code), backtrace: vec![], has_run: true };
        }
        End::Exited { code } => {
            let reason = format!("expected exit code {}, found {code}", job.expect.exit);
            return Verdict { exit: Some(code), has_run: true, ..Verdict::of(Status::Fail, reason) };
        }
        End::Trapped { backtrace, .. } => (Status::Trap, backtrace),
        End::Limit { limit, .. } => {
            let status = match limit {
                LimitKind::Time => Status::Timeout,
                LimitKind::Fuel => Status::Fuel,
                LimitKind::Memory => Status::Memory,
                LimitKind::Message | LimitKind::Output => Status::Output,
            };
            (status, vec![])
        }
        End::Failed { stage: Step::Load | Step::Compile | Step::Link, .. } => (Status::Compile, vec![]),
        End::Failed { .. } | End::Killed { .. } | End::Cancelled => (Status::Infra, vec![]),
    };
    let has_run = !matches!(status, Status::Compile | Status::Infra);
    Verdict { backtrace, has_run, ..Verdict::of(status, reason) }
}

/// What of a good run is not as expected.
fn mismatch(context: &Context, job: &Job, stdout: &StreamRecord, usage: Usage) -> Option<String> {
    if let (Some(most), Some(used)) = (job.expect.fuel_max, usage.fuel)
        && used > most
    {
        return Some(format!("expected at most {most} fuel, it used {used}"));
    }
    let path = job.expect.stdout.as_ref()?;
    let read = || -> Result<Vec<u8>, String> {
        let file = open_file(path).map_err(|error| error.to_string())?;
        let mut expected = vec![];
        file.take(EXPECTED_MAX + 1).read_to_end(&mut expected).map_err(|error| error.to_string())?;
        let is_too_large = expected.len() as u64 > EXPECTED_MAX;
        if is_too_large { Err("it is too large to be compared with".into()) } else { Ok(expected) }
    };
    let expected = match read() {
        Ok(expected) => expected,
        Err(reason) => return Some(format!("could not read `{}`: {reason}", path.display())),
    };
    let expected = match String::from_utf8(expected) {
        Ok(text) => context.masks.mask(&text).into_bytes(),
        Err(bytes) => bytes.into_bytes(),
    };
    if hex(&Sha256::digest(&expected)) == stdout.sha256 {
        return None;
    }
    let log = stdout.log.as_ref().map(|log| fs::read(context.artifacts.join(log)).unwrap_or_default());
    let found = log.unwrap_or_default();
    let differs = expected.split(|b| *b == b'\n').zip(found.split(|b| *b == b'\n')).position(|(a, b)| a != b);
    let line = differs.map_or_else(
        || expected.split(|b| *b == b'\n').count().min(found.split(|b| *b == b'\n').count()),
        |line| line + 1,
    );
    Some(format!("its output is not that of `{}`: line {line} is the first that differs", path.display()))
}
