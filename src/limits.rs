//! Every bound on a guest, with its unit and its default.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// A number of bytes, written `65536`, `64k`, `64KiB`, `1.5MiB`, `1GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// As many KiB.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// As many MiB.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// As an index; more than the address space has is as good as all of it.
    #[must_use]
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size: bytesize::ByteSize = text
            .parse()
            .map_err(|_| format!("expected a size such as `65536`, `64KiB` or `1.5GiB`, found `{text}`"))?;
        Ok(Self(size.as_u64()))
    }
}

impl fmt::Display for Bytes {
    /// The largest binary unit that keeps it exact: `256MiB`, `1536KiB`, `100B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// Parses `500ms`, `30s`, `1m30s`; a bare number is refused, since nobody agrees on its unit.
///
/// # Errors
/// Says what was expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("expected a duration with its unit such as `500ms`, `30s` or `1m30s`, found `{text}`"))
}

/// What bounds one guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// The most linear memory that one instance may have. Default 256 MiB.
    pub memory: Bytes,
    /// The longest that a run, or a task, may take by the clock on the wall. Default: none for a run, 30 s for a task.
    pub timeout: Option<Duration>,
    /// How much fuel a run, or a task, may use: about one unit an instruction, the same on every machine. Default none.
    pub fuel: Option<u64>,
    /// The stack of one instance. Default 512 KiB.
    pub stack: Bytes,
    /// The longest message, either way. Default 1 MiB.
    pub message_max: Bytes,
    /// The most files that one instance may hold open, in a worker process. Beyond, opening fails. Default 64.
    pub open_files: u32,
    /// The largest file that it may write, in a worker process. Beyond, writing fails. Default 1 GiB.
    pub file_size: Bytes,
    /// The most threads that it may have at once beside its main thread. Beyond, making one fails. Default 64.
    pub threads: u32,
}

impl Limits {
    /// The limits of a single run: no time limit.
    #[must_use]
    pub const fn of_a_run() -> Self {
        Self {
            memory: Bytes::mib(256),
            timeout: None,
            fuel: None,
            stack: Bytes::kib(512),
            message_max: Bytes::mib(1),
            open_files: 64,
            file_size: Bytes::mib(1024),
            threads: 64,
        }
    }

    /// The limits of a task in a pool: 30 seconds each.
    #[must_use]
    pub const fn of_a_task() -> Self {
        Self { timeout: Some(Duration::from_secs(30)), ..Self::of_a_run() }
    }
}

/// What bounds the compilation of a guest, which happens in a process of its own.
///
/// The first two hold whatever the guest is. The others are looked at before anything is compiled: a small guest can be
/// made so that compiling it takes gigabytes and hours, and what is beyond these is more likely to be one of those than
/// a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompileLimits {
    /// The most CPU time, in whole seconds, and the longest by the clock on the wall. Default 300 s.
    pub time: Duration,
    /// The most memory. Default 4 GiB.
    pub memory: Bytes,
    /// The most functions of all modules together. Default 300,000.
    pub functions: u32,
    /// The most local variables of one function, its parameters included. Default 10,000.
    pub locals: u32,
    /// The largest function, in bytes of the binary. Default 2 MiB.
    pub body: Bytes,
    /// How deep blocks may be nested in a function. Default 10,000.
    pub nesting: u32,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_mins(5),
            memory: Bytes::mib(4096),
            functions: 300_000,
            locals: 10_000,
            body: Bytes::mib(2),
            nesting: 10_000,
        }
    }
}

/// What bounds the clients of a port. A client that goes beyond is answered and cut off, and nobody else feels it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpLimits {
    /// The most bytes of a request's line and headers together. Beyond: 431. Default 64 KiB; there may be at most
    /// [`HEADERS_MAX`] headers.
    pub head: Bytes,
    /// The longest request target. Beyond: 414. Default 8 KiB.
    pub uri: Bytes,
    /// The largest body of a request. Beyond: 413. Default 64 MiB.
    pub body: Bytes,
    /// How long a client may take to send the head of a request, from its first byte on. Beyond: 408. Default 10 s.
    pub head_timeout: Duration,
    /// How long a connection may lie idle, and how long a client may pause while its body is read. Default 30 s.
    pub idle_timeout: Duration,
    /// How long a client may take no byte of what is written to it. Default 30 s.
    pub write_timeout: Duration,
    /// The most connections of one worker; more wait in the port's queue. Default 10,000, and never more than the
    /// worker has descriptors for.
    pub connections: u32,
}

/// The most headers that a request may have. Beyond: 431.
pub const HEADERS_MAX: usize = 100;

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            head: Bytes::kib(64),
            uri: Bytes::kib(8),
            body: Bytes::mib(64),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            connections: 10_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("0", 0), ("65536", 65536), ("64k", 64_000), ("64KiB", 65536), ("1.5MiB", 3 << 19), ("1GB", 1_000_000_000)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "-1", "ten", "10 parsecs"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for (bytes, text) in
            [(0, "0B"), (1 << 30, "1GiB"), (256 << 20, "256MiB"), (1536 << 10, "1536KiB"), (1000, "1000B")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(Bytes(bytes)));
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert!(parse_duration("5").is_err());
        assert!(parse_duration("-5s").is_err());
    }
}
