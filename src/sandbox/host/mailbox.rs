//! `wrun:guest/mailbox`: messages to the parent.

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

/// Where a guest's messages go. Sending never blocks.
pub(crate) trait Outbox: Send + Sync {
    /// Takes one message, if there is room.
    fn send(&self, message: Message) -> Result<(), Full>;
}

/// There is no room now.
#[derive(Debug)]
pub(crate) struct Full;

impl types::Host for State {}

impl Host for State {
    fn send(&mut self, message: String) -> Result<(), SendError> {
        let Some(outbox) = &self.setup.outbox else { return Err(SendError::Closed) };
        let max = self.setup.limits.message_max;
        let message = Message::check(message.as_bytes(), max.as_usize()).map_err(|error| match error {
            MessageError::TooLong { .. } => SendError::TooLarge(max.0),
            error => SendError::NotJson(error.to_string()),
        })?;
        outbox.send(message).map_err(|Full| SendError::Full)
    }

    /// A handler's messages come as tasks, and a command that runs by itself has no parent: there is nothing to wait for.
    async fn receive(&mut self, _timeout_ms: Option<u64>) -> Result<String, ReceiveError> {
        Err(ReceiveError::Closed)
    }
}
