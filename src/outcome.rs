//! How a run ended.
//!
//! An [`Outcome`] is the same record everywhere: a library value, the JSON of `--json`, and what events carry. A guest
//! that fails is an outcome, never an [`Error`](crate::Error): that one means that wrun could not do what was asked.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    message::{Message, MessageError},
    signal::Signal,
};

/// How a run, a task or a worker ended, and what it used.
///
/// As JSON: one flat object, `{"kind":"exited","code":0,"voluntary":false,"wall_ms":12,"cpu_ms":3,"memory_peak":1114112}`;
/// the fields after `kind` depend on it, see [`End`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
    /// Whether it ended because the user or the primary asked it to (a drain, a stop, a replacement).
    pub voluntary: bool,
    /// The thread that ended it, of a guest that has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<Box<Thread>>,
    /// What it used until then.
    #[serde(flatten)]
    pub usage: Usage,
}

/// One of a guest's threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its number: 0 for the main thread, others from 1 in the order in which they were made.
    pub id: u32,
    /// `main`, `worker-2` for what answers messages, `thread-3` for others.
    pub name: String,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The guest's reply.
    Reply(Message),
    /// The guest handled it and has no reply.
    NoReply,
    /// The guest failed it, for this reason.
    Error(Message),
    /// What the guest answered is no message.
    Invalid(MessageError),
    /// It ended its instance or its worker: it may have been handled in part.
    Ended(Outcome),
}

impl Answer {
    /// Appends it to a line of JSON as members of the object that stands there: `,"reply":…` or `,"error":…`, or nothing
    /// for no reply.
    pub(crate) fn write_members(&self, line: &mut Vec<u8>) {
        // most answers are replies, which are not taken apart
        match self {
            Self::Reply(reply) => {
                line.extend_from_slice(br#","reply":"#);
                reply.write_line(line);
            }
            Self::NoReply => {}
            Self::Error(reason) => {
                line.extend_from_slice(br#","error":{"kind":"guest","value":"#);
                reason.write_line(line);
                line.push(b'}');
            }
            Self::Invalid(error) => {
                let error = serde_json::json!({"kind": "invalid", "message": error.to_string()});
                line.extend_from_slice(format!(r#","error":{error}"#).as_bytes());
            }
            Self::Ended(outcome) => {
                line.extend_from_slice(br#","error":"#);
                serde_json::to_writer(&mut *line, outcome).expect("plain data has a JSON form");
            }
        }
    }
}

/// How something ended. The tag is `kind` in JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum End {
    /// The guest ended by itself.
    Exited {
        /// Its exit code; WASI leaves the range to the guest, the shell sees the low 8 bits.
        code: i32,
    },
    /// The guest broke a rule of WebAssembly, or aborted.
    Trapped {
        /// The rule, in the engine's words.
        trap: String,
        /// The guest's functions, innermost first, one line each; empty when the guest has no names or no frame.
        backtrace: Vec<String>,
    },
    /// A limit was hit.
    Limit {
        /// Which one.
        limit: LimitKind,
        /// Its value as the user would write it, such as `256MiB` or `5s`.
        allowed: String,
    },
    /// The worker's process was ended by a signal.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// It was given up before it was done: its client went away, or the primary stopped.
    Cancelled,
    /// wrun could not start or keep the guest.
    Failed {
        /// In which step: `load`, `compile`, `link`, `jail`, `start`, `protocol` or `hung`.
        stage: Stage,
        /// Why, in words.
        reason: String,
        /// What to do about it, when there is something.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// The step in which wrun gave a guest up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Reading the file and telling what it is.
    Load,
    /// Compiling it.
    Compile,
    /// Matching its imports with what wrun offers.
    Link,
    /// Closing the walls around its process.
    Jail,
    /// Making its first instance.
    Start,
    /// Speaking with its worker.
    Protocol,
    /// Waiting for its worker's heartbeat.
    Hung,
}

impl Stage {
    /// Whether another try would end the same way: the guest is at fault, or the system.
    pub(crate) fn is_hopeless(self) -> bool {
        matches!(self, Self::Load | Self::Compile | Self::Link | Self::Jail)
    }
}

/// A limit that can end a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitKind {
    /// `--timeout`
    Time,
    /// `--fuel`
    Fuel,
    /// `--memory`
    Memory,
    /// A reply or message longer than `--message-max`.
    Message,
    /// More on a standard stream than is collected: `--stdout-max`.
    Output,
}

/// What a run used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Wall-clock time in milliseconds.
    pub wall_ms: u64,
    /// CPU time of its process in milliseconds; not known of one that was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// The largest linear memory that the guest had, in bytes; not known of one that was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak: Option<u64>,
    /// Fuel used; only when fuel is metered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
}

impl Usage {
    /// A usage that knows only how long it took.
    #[must_use]
    pub fn wall(wall: Duration) -> Self {
        Self { wall_ms: millis(wall), ..Self::default() }
    }
}

/// A duration in whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl End {
    /// With what was used, an outcome that nobody asked for.
    #[must_use]
    pub fn with(self, usage: Usage) -> Outcome {
        Outcome { end: self, voluntary: false, thread: None, usage }
    }

    /// The exit code of a `wrun` command that ends this way: the guest's own, or one of the table in the README.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a shell sees the low 8 bits")]
            Self::Exited { code } => *code as u8,
            Self::Trapped { .. } => 134,
            Self::Limit { limit: LimitKind::Time | LimitKind::Fuel, .. } => 124,
            Self::Limit { limit: LimitKind::Memory, .. } => 137,
            Self::Limit { limit: LimitKind::Message | LimitKind::Output, .. }
            | Self::Failed { stage: Stage::Protocol, .. } => 123,
            Self::Killed { signal } => u8::try_from(128 + signal).unwrap_or(255),
            Self::Cancelled => 130,
            Self::Failed { stage: Stage::Load | Stage::Compile | Stage::Link, .. } => 126,
            Self::Failed { stage: Stage::Jail | Stage::Start | Stage::Hung, .. } => 125,
        }
    }
}

impl fmt::Display for LimitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Time => "time",
            Self::Fuel => "fuel",
            Self::Memory => "memory",
            Self::Message => "message",
            Self::Output => "output",
        })
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "exited with code {code}"),
            Self::Trapped { trap, .. } => write!(f, "trapped: {trap}"),
            Self::Limit { limit, allowed } => write!(f, "hit the {limit} limit of {allowed}"),
            Self::Killed { signal } => match Signal::from_number(*signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::Cancelled => f.write_str("cancelled"),
            Self::Failed { reason, .. } => write!(f, "failed: {reason}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.end.fmt(f)?;
        match self.thread.as_deref() {
            Some(Thread { id, name }) => write!(f, " (thread {id}, {name})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_is_one_flat_object() {
        let outcome = End::Limit { limit: LimitKind::Memory, allowed: "8MiB".into() }.with(Usage {
            wall_ms: 7,
            cpu_ms: Some(5),
            memory_peak: Some(9),
            fuel: None,
        });
        let text = serde_json::to_string(&outcome).expect("plain data");
        assert_eq!(
            text,
            r#"{"kind":"limit","limit":"memory","allowed":"8MiB","voluntary":false,"wall_ms":7,"cpu_ms":5,"memory_peak":9}"#
        );
        assert_eq!(serde_json::from_str::<Outcome>(&text).expect("round trip"), outcome);
    }

    #[test]
    fn exit_codes_follow_the_table() {
        let limit = |limit| End::Limit { limit, allowed: String::new() };
        let cases = [
            (End::Exited { code: 42 }, 42),
            (End::Exited { code: 256 + 3 }, 3),
            (End::Trapped { trap: String::new(), backtrace: vec![] }, 134),
            (limit(LimitKind::Time), 124),
            (limit(LimitKind::Fuel), 124),
            (limit(LimitKind::Memory), 137),
            (End::Killed { signal: 9 }, 137),
            (End::Killed { signal: 15 }, 143),
            (End::Failed { stage: Stage::Link, reason: String::new(), hint: None }, 126),
        ];
        for (end, code) in cases {
            assert_eq!(end.exit_code(), code, "{end:?}");
        }
    }
}
