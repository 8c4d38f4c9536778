//! `wrun:guest/mailbox`: messages to the parent, and from it.

use std::{future::Future, pin::Pin, time::Duration};

use crate::{
    message::{Message, MessageError},
    sandbox::{
        host::bindings::wrun::guest::{
            mailbox::{Host, ReceiveError, SendError},
            types,
        },
        instance::State,
    },
};

/// A guest's line to its parent.
pub(crate) trait Mailbox: Send + Sync {
    /// Takes one message, if there is room. Never blocks.
    ///
    /// # Errors
    /// When there is none.
    fn send(&self, message: Message) -> Result<(), Full>;

    /// The next message from the parent, for at most so long.
    fn receive(&self, within: Option<Duration>) -> Pin<Box<dyn Future<Output = Received> + Send + '_>>;
}

/// There is no room now.
#[derive(Debug)]
pub(crate) struct Full;

/// What came from the parent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A message, and its number there. It was checked where it entered.
    Message(u64, String),
    /// None in time.
    TimedOut,
    /// None, and none will ever come.
    Closed,
}

impl types::Host for State {}

impl Host for State {
    fn send(&mut self, message: String) -> Result<(), SendError> {
        let Some(mailbox) = &self.setup.mailbox else { return Err(SendError::Closed) };
        let max = self.setup.limits.message_max;
        let message = Message::check(message.as_bytes(), max.as_usize()).map_err(|error| match error {
            MessageError::TooLong { .. } => SendError::TooLarge(max.0),
            error => SendError::NotJson(error.to_string()),
        })?;
        mailbox.send(message).map_err(|Full| SendError::Full)
    }

    async fn receive(&mut self, timeout_ms: Option<u64>) -> Result<String, ReceiveError> {
        let Some(mailbox) = self.setup.mailbox.clone() else { return Err(ReceiveError::Closed) };
        match mailbox.receive(timeout_ms.map(Duration::from_millis)).await {
            Received::Message(_, text) => Ok(text),
            Received::TimedOut => Err(ReceiveError::TimedOut),
            Received::Closed => Err(ReceiveError::Closed),
        }
    }
}
