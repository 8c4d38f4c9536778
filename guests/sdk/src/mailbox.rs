//! A guest's line to its parent: messages beside the tasks and replies of a handler.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bindings::wrun::guest::mailbox as host;

pub use host::SendError;

/// Why no message was received.
#[derive(Debug)]
pub enum ReceiveError {
    /// No message will ever come: the parent has disconnected, there is none, or this guest is a handler, whose
    /// messages come as tasks.
    Closed,
    /// None came in time.
    TimedOut,
    /// One came, and does not fit the type that was asked for. It is gone.
    Mismatch(serde_json::Error),
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("no message will ever come"),
            Self::TimedOut => f.write_str("no message came in time"),
            Self::Mismatch(error) => write!(f, "the message does not fit: {error}"),
        }
    }
}

impl Error for ReceiveError {}

/// Sends one message to the parent. Never blocks.
///
/// # Errors
///
/// When the message was not sent; [`SendError`] tells why. One that does not serialize is
/// [`NotJson`](SendError::NotJson).
pub fn send(message: &impl Serialize) -> Result<(), SendError> {
    let json = serde_json::to_string(message).map_err(|error| SendError::NotJson(error.to_string()))?;
    send_json(&json)
}

/// Sends one message that is JSON already, as it is written. Never blocks.
///
/// # Errors
///
/// As [`send`].
pub fn send_json(json: &str) -> Result<(), SendError> {
    host::send(json)
}

/// Receives the next message from the parent, for commands that run a loop of their own.
///
/// Waits for at most `timeout`, in whole milliseconds rounded up, or for ever with `None`.
///
/// # Errors
///
/// When there is no message, or it is not a `T`.
pub fn receive<T: DeserializeOwned>(timeout: Option<Duration>) -> Result<T, ReceiveError> {
    let timeout_ms = timeout.map(|timeout| timeout.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(u64::MAX));
    match host::receive(timeout_ms) {
        Ok(json) => serde_json::from_str(&json).map_err(ReceiveError::Mismatch),
        Err(host::ReceiveError::Closed) => Err(ReceiveError::Closed),
        Err(host::ReceiveError::TimedOut) => Err(ReceiveError::TimedOut),
    }
}
