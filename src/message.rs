//! Messages: JSON texts, checked once where they enter and never altered after that.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// How deep a message may nest arrays and objects.
pub const DEPTH_MAX: usize = 128;

/// One JSON value as text: well-formed, in UTF-8, no longer and no deeper than was allowed when it was made.
///
/// It is the text that came, less the white space around it: `1.10`, `-0.0`, 40-digit integers, escapes and the order
/// of keys stay as they are.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Message(Box<str>);

/// Why a text is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The bytes are not UTF-8.
    #[error("not UTF-8 at byte {at}")]
    NotUtf8 {
        /// The first byte that is not, from 0.
        at: usize,
    },
    /// The text is not one JSON value.
    #[error("not JSON: {reason}")]
    NotJson {
        /// What was expected and where.
        reason: String,
    },
    /// The value is nested too deep.
    #[error("nested deeper than {DEPTH_MAX} levels")]
    TooDeep,
    /// The text is too long.
    #[error("{length} bytes long, at most {max} are allowed (--message-max)")]
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        max: usize,
    },
}

/// Why a message was not sent. It can be sent again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// As much waits already as may: the guest is slower than its parent.
    #[error("the mailbox is full")]
    Full,
    /// The guest is gone, or the mailbox was disconnected.
    #[error("the mailbox is closed")]
    Closed,
    /// It is longer than a message may be.
    #[error(transparent)]
    TooLong(MessageError),
    /// It is a buffer that cannot be shared so.
    #[error("the buffer was not shared: {0}")]
    NotShared(String),
}

impl Message {
    /// Checks bytes that claim to be a message of at most `max` bytes.
    ///
    /// # Errors
    /// Says why they are not.
    pub fn check(bytes: &[u8], max: usize) -> Result<Self, MessageError> {
        let bytes = bytes.trim_ascii();
        if bytes.len() > max {
            return Err(MessageError::TooLong { length: bytes.len(), max });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| MessageError::NotUtf8 { at: error.valid_up_to() })?;
        // serde_json skips values without recursion, so depth costs it nothing, and the host after it nothing either;
        // but whoever parses the message into a tree would pay with its stack.
        if deeper_than(bytes, DEPTH_MAX) {
            return Err(MessageError::TooDeep);
        }
        match serde_json::from_str::<serde::de::IgnoredAny>(text) {
            Ok(_) => Ok(Self(text.into())),
            Err(error) => Err(MessageError::NotJson { reason: error.to_string() }),
        }
    }

    /// Checks a text of any length; its depth is bounded all the same.
    ///
    /// # Errors
    /// Says why it is not a message.
    pub fn parse(text: &str) -> Result<Self, MessageError> {
        Self::check(text.as_bytes(), usize::MAX)
    }

    /// Makes a message of a value.
    ///
    /// # Errors
    /// When the value has no JSON form ([`serde_json::to_string`]), or one nested too deep.
    pub fn of(value: &impl Serialize) -> Result<Self, MessageError> {
        let text = serde_json::to_string(value).map_err(|error| MessageError::NotJson { reason: error.to_string() })?;
        if deeper_than(text.as_bytes(), DEPTH_MAX) { Err(MessageError::TooDeep) } else { Ok(Self(text.into())) }
    }

    /// The message `null`.
    #[must_use]
    pub fn null() -> Self {
        Self("null".into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads the message as a value.
    ///
    /// # Errors
    /// When the value is of another shape ([`serde_json::from_str`]).
    pub fn to<T: serde::de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }

    /// Appends the text to one line: the line breaks that JSON allows between its tokens become spaces.
    pub(crate) fn write_line(&self, line: &mut Vec<u8>) {
        let start = line.len();
        line.extend_from_slice(self.0.as_bytes());
        // raw line breaks are never inside a JSON string
        let mut rest = &mut line[start..];
        while let Some(at) = memchr::memchr2(b'\n', b'\r', rest) {
            rest[at] = b' ';
            rest = &mut rest[at + 1..];
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Message").field(&&*self.0).finish()
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> serde::Deserialize<'de> for Message {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        if deeper_than(raw.get().as_bytes(), DEPTH_MAX) {
            return Err(serde::de::Error::custom(MessageError::TooDeep));
        }
        Ok(Self(raw.get().into()))
    }
}

/// Whether brackets outside of strings nest deeper than `max`.
fn deeper_than(json: &[u8], max: usize) -> bool {
    // without more opening brackets than that, wherever they stand, there is nothing to follow
    if memchr::memchr2_iter(b'[', b'{', json).nth(max).is_none() {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in json {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > max {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Message, MessageError> {
        Message::check(text.as_bytes(), 1 << 20)
    }

    #[test]
    fn text_is_kept_as_it_came() {
        for text in
            ["42", "-0.0", "1e400", "123456789012345678901234567890", r#"{"b":1,"a":1.10}"#, r#""\u00e9\/\ud800""#]
        {
            assert_eq!(check(text).expect(text).as_str(), text);
        }
        assert_eq!(check(" [1,\n2]\r\n").expect("padded").as_str(), "[1,\n2]");
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for text in ["", "{", "[1,]", "nul", "1 2", "'a'", "\"\u{1}\"", "01", r#""\x""#, "{\"a\" 1}"] {
            assert!(matches!(check(text), Err(MessageError::NotJson { .. })), "{text:?}");
        }
        assert_eq!(Message::check(b"\"a\xff\"", 100), Err(MessageError::NotUtf8 { at: 2 }));
    }

    #[test]
    fn depth_ends_at_128() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        assert!(check(&nested(128)).is_ok());
        assert_eq!(check(&nested(129)), Err(MessageError::TooDeep));
        assert_eq!(check(&nested(10_000)), Err(MessageError::TooDeep));
        // brackets in strings and side by side are no depth
        assert!(check(&format!("\"{}\\\"{}\"", "[".repeat(500), "{".repeat(500))).is_ok());
        assert!(check(&format!("[{}]", vec!["[]"; 500].join(","))).is_ok());
    }

    #[test]
    fn length_is_just_under_and_just_over() {
        let text = format!("\"{}\"", "x".repeat(98));
        assert!(Message::check(text.as_bytes(), 100).is_ok());
        assert_eq!(Message::check(text.as_bytes(), 99), Err(MessageError::TooLong { length: 100, max: 99 }));
    }

    #[test]
    fn one_line_is_one_line() {
        let mut line = Vec::new();
        check("{\"a\":\r\n [1,\n\"\\n\"]}").expect("json").write_line(&mut line);
        assert_eq!(line, b"{\"a\":   [1, \"\\n\"]}");
    }
}
