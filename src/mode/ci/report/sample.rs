//! Made-up runs for the tests of the reports.

use crate::mode::ci::record::{Attempt, JobRecord, RunRecord, RunTimes, Status, StreamRecord, Times};

/// Text that tries to break out of whatever it is put into.
pub(super) const HOSTILE: &str =
    "x]]>\0\u{1b}[31mred\u{1b}]0;\n::error::x\r|`@octocat`<b>&amp;\u{ffff}\t[a](https://e.example) www.e.example \\|%";

/// A run of these jobs.
pub(super) fn run(jobs: Vec<JobRecord>) -> RunRecord {
    RunRecord {
        v: 1,
        run: "r1".into(),
        name: "ci".into(),
        file: "wrun.toml".into(),
        profile: None,
        engine: "e1".into(),
        unselected: 0,
        jobs,
        exit: 0,
        ended: None,
        times: RunTimes { started: "2026-01-02T03:04:05Z".into(), wall_ms: 1500, slots: 2 },
    }
}

/// An attempt that printed to both streams.
pub(super) fn attempt(number: u32, status: Status) -> Attempt {
    let stream = |name| StreamRecord { log: Some(format!("{number}.{name}")), ..StreamRecord::default() };
    Attempt {
        attempt: number,
        status,
        reason: (status != Status::Pass).then(|| format!("because {number}")),
        exit: None,
        backtrace: if status == Status::Trap { vec!["inner".into(), "outer<T>".into()] } else { Vec::new() },
        fuel: Some(1_234_567),
        memory_peak: Some(3 << 19),
        stdout: stream("out"),
        stderr: stream("err"),
        times: Times { wall_ms: 1250, ..Times::default() },
    }
}

/// A job that ended so, with as many attempts as such a job has at least.
pub(super) fn job(name: &str, status: Status) -> JobRecord {
    let attempts = match status {
        Status::Skipped | Status::Cancelled => Vec::new(),
        Status::Flaky => vec![attempt(1, Status::Trap), attempt(2, Status::Fail), attempt(3, Status::Pass)],
        other => vec![attempt(1, other)],
    };
    JobRecord {
        job: name.into(),
        id: name.split(' ').next().unwrap_or_default().into(),
        line: 7,
        tags: Vec::new(),
        needs: Vec::new(),
        wasm: "a.wasm".into(),
        wasm_sha256: Some("abc".into()),
        status,
        reason: (status != Status::Pass).then(|| format!("why {}", status.word())),
        allow_failure: false,
        tries: 3,
        outputs: Vec::new(),
        attempts,
    }
}

/// A run with a job of each status, named by its word.
pub(super) fn all() -> RunRecord {
    run(Status::ALL.iter().map(|status| job(status.word(), *status)).collect())
}
