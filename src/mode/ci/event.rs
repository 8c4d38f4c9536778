//! What happens in a run, as it is told to whoever watches, and as JSON lines.

use serde_json::{Map, Value, json};

use super::record::{Attempt, JobRecord, RunRecord, Status};

/// Something that happened in a run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// It begins: all that is known of it before any job has run.
    RunStart(Box<RunRecord>),
    /// A job is to be run.
    Queue {
        /// Its name.
        job: String,
    },
    /// An attempt of a job begins.
    Start {
        /// The job.
        job: String,
        /// The number of the attempt, from 1.
        attempt: u32,
        /// Which of the jobs that run at once it is, from 0.
        slot: u32,
    },
    /// A job still runs after so long.
    Slow {
        /// The job.
        job: String,
        /// The number of the attempt.
        attempt: u32,
        /// How long it has run, in milliseconds.
        after_ms: u64,
    },
    /// An attempt failed, and another one follows.
    Attempt {
        /// The job.
        job: String,
        /// How it ended.
        attempt: Box<Attempt>,
        /// How many attempts there can be in all.
        of: u32,
        /// When the next one begins, in milliseconds from now.
        retry_ms: u64,
    },
    /// A job is over.
    End(Box<JobRecord>),
    /// Something could not be written, or had to be said.
    Warning {
        /// What it is, in words.
        message: String,
    },
    /// All is over.
    RunEnd(Box<RunRecord>),
}

impl Event {
    /// As one JSON object, of the run of that name.
    #[must_use]
    pub fn json(&self, run: &str) -> Value {
        let mut event = match self {
            Self::RunStart(run) => json!({
                "t": "run.start", "name": run.name, "file": run.file, "profile": run.profile, "engine": run.engine,
                "jobs": run.jobs.len(), "unselected": run.unselected, "slots": run.times.slots,
                "started": run.times.started,
            }),
            Self::Queue { job } => json!({"t": "job.queue", "job": job}),
            Self::Start { job, attempt, slot } => {
                json!({"t": "job.start", "job": job, "attempt": attempt, "slot": slot})
            }
            Self::Slow { job, attempt, after_ms } => {
                json!({"t": "job.slow", "job": job, "attempt": attempt, "after_ms": after_ms})
            }
            Self::Attempt { job, attempt, of, retry_ms } => {
                let mut event = attempt_json(attempt);
                event["t"] = "job.attempt".into();
                (event["job"], event["of"], event["retry_ms"]) = (json!(job), json!(of), json!(retry_ms));
                event
            }
            Self::End(job) => {
                let mut event = job.last().map_or_else(|| json!({"attempt": 0}), attempt_json);
                event["t"] = "job.end".into();
                (event["job"], event["status"], event["reason"]) =
                    (json!(job.job), json!(job.status), json!(job.reason));
                event["allow_failure"] = json!(job.allow_failure);
                event
            }
            Self::Warning { message } => json!({"t": "warning", "message": message}),
            Self::RunEnd(run) => {
                let counts = run.counts();
                let all = Status::ALL.iter().filter(|status| counts.get(**status) > 0);
                let all: Map<_, _> = all.map(|status| (status.word().into(), counts.get(*status).into())).collect();
                json!({
                    "t": "run.end", "exit": run.exit, "ended": run.ended, "wall_ms": run.times.wall_ms, "jobs": all,
                })
            }
        };
        (event["v"], event["run"]) = (1.into(), run.into());
        event
    }
}

/// An attempt as a flat object.
fn attempt_json(attempt: &Attempt) -> Value {
    json!({
        "attempt": attempt.attempt, "status": attempt.status, "reason": attempt.reason, "exit": attempt.exit,
        "fuel": attempt.fuel, "memory_peak": attempt.memory_peak, "wall_ms": attempt.times.wall_ms,
        "cpu_ms": attempt.times.cpu_ms, "slot": attempt.times.slot,
        "stdout": {"bytes": attempt.stdout.bytes, "sha256": attempt.stdout.sha256},
        "stderr": {"bytes": attempt.stderr.bytes, "sha256": attempt.stderr.sha256},
    })
}
