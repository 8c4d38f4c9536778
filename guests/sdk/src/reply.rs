//! From a message to a reply: what `handler!` wraps around a function.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What a handler returns: how its task ends.
pub trait IntoReply {
    /// Answers the JSON text of the reply if there is one, or that of the error that fails the task.
    ///
    /// # Errors
    ///
    /// When the handler failed, or what it returned does not serialize.
    fn into_reply(self) -> Result<Option<String>, String>;
}

impl<R: Serialize, E: Serialize> IntoReply for Result<R, E> {
    fn into_reply(self) -> Result<Option<String>, String> {
        match self {
            Ok(reply) => to_json(&reply).map(Some),
            Err(error) => Err(to_json(&error).unwrap_or_else(|refusal| refusal)),
        }
    }
}

/// `None` ends the task without a reply.
impl<R: Serialize, E: Serialize> IntoReply for Option<Result<R, E>> {
    fn into_reply(self) -> Result<Option<String>, String> {
        self.map_or(Ok(None), IntoReply::into_reply)
    }
}

/// Handles one message: the body of what `handler!` exports.
#[doc(hidden)]
pub fn answer<T: DeserializeOwned, R: IntoReply>(
    message: &str,
    handle: impl FnOnce(T) -> R,
) -> Result<Option<String>, String> {
    match serde_json::from_str(message) {
        Ok(task) => handle(task).into_reply(),
        Err(error) => Err(refusal("the message does not fit", &error)),
    }
}

fn to_json(value: &impl Serialize) -> Result<String, String> {
    serde_json::to_string(value).map_err(|error| refusal("the reply does not serialize", &error))
}

/// A JSON string that says what serde refused and why.
fn refusal(what: &str, why: &serde_json::Error) -> String {
    Value::String(format!("{what}: {why}")).to_string()
}
