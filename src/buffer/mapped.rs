//! What is done with a buffer whose chunks are handed to guests, and what comes of it.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::{BufferMut, Chunk, Chunks};
use crate::{
    limits::Bytes,
    message::Message,
    outcome::{Answer, Outcome},
};

/// What the buffer whose chunks a guest gets is called there.
pub(crate) const INPUT: &str = "input";

/// And what chunks write to.
pub(crate) const OUTPUT: &str = "output";

/// Who hears of each chunk that is done, and its reply.
pub(crate) type Each = Box<dyn FnMut(&Chunk, Option<&Message>) + Send>;

/// Chunks that are to be handed to guests: [`threads::Builder::par_map`](crate::threads::Builder::par_map) hands them to
/// threads of this process, [`Command::par_map`](crate::Command::par_map) to those of another one.
///
/// A plain [`Chunks`] is one, too, whose replies are collected.
pub struct ParMap {
    pub(crate) chunks: Chunks,
    pub(crate) output: Option<BufferMut>,
    pub(crate) reduce: bool,
    pub(crate) each: Option<Each>,
}

impl ParMap {
    /// These.
    #[must_use]
    pub fn over(chunks: Chunks) -> Self {
        Self { chunks, output: None, reduce: false, each: None }
    }

    /// Where guests write to, as `output`: the range of each chunk belongs to the guest that got the chunk.
    #[must_use]
    pub fn output(mut self, output: BufferMut) -> Self {
        self.output = Some(output);
        self
    }

    /// Hands all replies, as one array, to a last call, whose reply is the only one then.
    #[must_use]
    pub fn reduce(mut self) -> Self {
        self.reduce = true;
        self
    }

    /// Who hears of each chunk when it is done and all before it are, with its reply unless there is none or it goes to the
    /// last call. Replies are then not collected, but for that of the last call.
    #[must_use]
    pub fn each(mut self, hear: impl FnMut(&Chunk, Option<&Message>) + Send + 'static) -> Self {
        self.each = Some(Box::new(hear));
        self
    }

    /// How many bytes its chunks have together.
    #[must_use]
    pub fn input_length(&self) -> Bytes {
        self.chunks.buffer.length()
    }

    /// Sees that it can be done by instances with this much memory.
    ///
    /// # Errors
    /// Says what was expected.
    pub(crate) fn check(&self, memory: Bytes) -> Result<(), String> {
        let input = self.chunks.buffer.length();
        let window = Bytes(self.chunks.split.window(input.0));
        if window >= memory {
            return Err(format!(
                "a chunk of {window} does not fit the {memory} of memory of an instance: expected a smaller chunk (--chunk), or more memory (--memory)"
            ));
        }
        match self.output.as_ref().map(BufferMut::length) {
            Some(output) if output != input => {
                Err(format!("expected an output of {input}, as the input has, found {output}"))
            }
            _ => Ok(()),
        }
    }
}

impl From<Chunks> for ParMap {
    fn from(chunks: Chunks) -> Self {
        Self::over(chunks)
    }
}

impl fmt::Debug for ParMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParMap").field("chunks", &self.chunks).field("reduce", &self.reduce).finish_non_exhaustive()
    }
}

/// What guests have made of a buffer's chunks.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mapped {
    /// Their replies, in the order of the chunks; one that has none left it out. When they were handed to a last call, its
    /// reply alone.
    pub replies: Vec<Message>,
    /// What they wrote, when there was an output, and all of them did their work.
    pub output: Option<BufferMut>,
    /// How it ended as a whole: as the first chunk that failed.
    pub outcome: Outcome,
    /// What failed, when something did. No chunk after it is in the replies, and every chunk before it is.
    pub failed: Option<Failed>,
}

impl Mapped {
    /// Nothing but how it ended.
    pub(crate) fn stopped(outcome: Outcome) -> Self {
        Self { replies: vec![], output: None, outcome, failed: None }
    }
}

/// What failed first, by the order of chunks.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Failed {
    /// Which chunk; none = the last call, which got all replies.
    pub chunk: Option<Chunk>,
    /// How: [`Answer::Error`] or [`Answer::Ended`].
    pub answer: Answer,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.answer {
            Answer::Error(reason) => write!(f, "failed: {}", reason.as_str())?,
            Answer::Ended(outcome) => write!(f, "{outcome}")?,
            Answer::Invalid(error) => write!(f, "answered what is {error}")?,
            Answer::Reply(_) | Answer::NoReply => {}
        }
        match &self.chunk {
            Some(Chunk { index, offset, length, .. }) => {
                write!(f, " in chunk {index} ({length} bytes from {offset} on)")
            }
            None => f.write_str(" in the last call, with all replies"),
        }
    }
}

impl Serialize for Failed {
    /// `{"chunk":K,"offset":O,"length":L,"error":…}`, the error as in the answers of a cluster.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let chunk = self.chunk.as_ref().map(|chunk| serde_json::to_string(chunk).expect("plain data has a JSON form"));
        let mut text = chunk.unwrap_or_else(|| r#"{"chunk":null}"#.to_owned()).into_bytes();
        text.pop();
        self.answer.write_members(&mut text);
        text.push(b'}');
        let text = String::from_utf8(text).map_err(serde::ser::Error::custom)?;
        RawValue::from_string(text).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl Failed {
    /// The exit code of a command that ends so.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match &self.answer {
            Answer::Ended(outcome) => outcome.end.exit_code(),
            _ => 1,
        }
    }
}
