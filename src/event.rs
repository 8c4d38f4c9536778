//! What a mode tells the world while it runs: one closed list.
//!
//! Modes hand events to a sink and never print; the command turns them into lines for people or JSON
//! for tools, and a library user gets them as they are.

use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};

use crate::{message::Message, outcome::Outcome};

/// A worker's slot in its pool, from 1. It is the same for every worker that takes this place.
pub type WorkerId = u32;

/// Something that happened in a pool.
///
/// As JSON: one flat object with the tag `event`, such as `{"event":"fork","worker":1,"pid":4711,"generation":1}`.
///
/// Every start of a worker gives `fork`, at most one `online`, and exactly one `exit`, in this order.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Event {
    /// A worker process was started.
    Fork {
        /// Its slot.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// Which start of the slot it is, from 1.
        generation: u32,
    },
    /// A worker is ready: it said hello, mapped the code and made its first instance.
    Online {
        /// Its slot.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How long after its `fork`, in milliseconds.
        start_ms: u64,
    },
    /// The first worker takes connections.
    Listening {
        /// Where; with the real port when any was asked for.
        address: SocketAddr,
    },
    /// A guest sent a message through its mailbox.
    Message {
        /// Its slot.
        worker: WorkerId,
        /// What it sent.
        message: Message,
    },
    /// A guest printed a line.
    Output {
        /// Its slot.
        worker: WorkerId,
        /// Where to.
        stream: Stream,
        /// The line without its end; bytes that are not UTF-8 are replaced.
        line: String,
    },
    /// A guest printed, and its output is handed on as it comes.
    Chunk {
        /// Its slot.
        worker: WorkerId,
        /// Where to.
        stream: Stream,
        /// What.
        data: Data,
    },
    /// A guest printed more than it may, and what came after that was dropped.
    Drop {
        /// Its slot.
        worker: WorkerId,
        /// How many bytes since the last such event.
        bytes: u64,
    },
    /// A worker is being drained: it gets no new work.
    Disconnect {
        /// Its slot.
        worker: WorkerId,
    },
    /// A worker process is gone.
    Exit {
        /// Its slot.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How many tasks it answered, or how many requests it began.
        tasks: u64,
        /// How it ended.
        outcome: Outcome,
    },
    /// A worker is gone, and all that it printed has been handed on.
    Close {
        /// Its slot.
        worker: WorkerId,
    },
    /// A worker will be started in the place of one that is gone.
    Restart {
        /// The slot.
        worker: WorkerId,
        /// In how many milliseconds.
        after_ms: u64,
        /// How many deaths in a row this slot has had.
        deaths: u32,
    },
    /// A slot is not started again: its workers died too often, or none can start.
    Failed {
        /// The slot.
        worker: WorkerId,
        /// How its last worker ended.
        outcome: Outcome,
    },
    /// All workers were to be replaced by ones of the guest as it is now, without a request being lost.
    Reload {
        /// How long that took until the new ones took over, in milliseconds; the old ones finish what they have.
        took_ms: u64,
        /// Why it was given up; the old workers go on.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A request was answered; only when an access log is wanted.
    Access {
        /// The slot.
        worker: WorkerId,
        /// What it was, and how it went.
        #[serde(flatten)]
        record: Box<AccessRecord>,
    },
    /// A task ended its instance: by a trap, a limit or an exit. The next task gets a new instance.
    Limit {
        /// The slot.
        worker: WorkerId,
        /// How the task ended.
        outcome: Outcome,
    },
    /// A guest was refused something of the network: once for each grant that it lacks, and not without end.
    Denied {
        /// The slot.
        worker: WorkerId,
        /// The flag that would have allowed it, such as `--tcp 127.0.0.1:5432`.
        grant: String,
        /// What the guest may not do, in words.
        reason: String,
    },
    /// Something went wrong that ends neither a worker nor the pool.
    Error {
        /// The slot, when it concerns one.
        #[serde(skip_serializing_if = "Option::is_none")]
        worker: Option<WorkerId>,
        /// What, in words.
        message: String,
    },
}

/// One request in an access log. What the client sent is as it came: text for people must escape it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AccessRecord {
    /// When it came, in milliseconds since 1970.
    pub time_ms: u64,
    /// Whose it was: the peer, or whom a trusted proxy names.
    pub client: IpAddr,
    /// `GET`, `POST` ...
    pub method: String,
    /// The request target.
    pub target: String,
    /// `HTTP/1.0` or `HTTP/1.1`.
    pub protocol: String,
    /// The status of the response; 499 when the client left before there was one.
    pub status: u16,
    /// How many bytes of the response's body were sent.
    pub bytes: u64,
    /// From the end of the request's head to the end of the response, in microseconds.
    pub took_us: u64,
    /// The request's id: `x-request-id`.
    pub id: String,
    /// The client's `traceparent`, when it sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The client's `referer`, when it sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referer: Option<String>,
    /// The client's `user-agent`, when it sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
    /// Why it was refused before it was a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The app that it was for, of those of a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<String>,
    /// The version of the app that it went to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// Bytes that a guest printed. As JSON a string, or `{"base64":"…"}` when they are not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data(pub Vec<u8>);

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Ok(text) = std::str::from_utf8(&self.0) {
            return serializer.serialize_str(text);
        }
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("base64", &base64::engine::general_purpose::STANDARD.encode(&self.0))?;
        map.end()
    }
}

/// Where a guest printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Its standard output.
    Stdout,
    /// Its standard error.
    Stderr,
}
