//! The output: answers as lines, in the order of the input if they must be.

use std::{collections::BTreeMap, io::Write, sync::Arc};

use crate::{lines::Writer, outcome::Answer};

/// Whose task it is: its place in the output when that is ordered, and its line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) sequence: u64,
    pub(super) number: u64,
}

/// Answers on their way out.
pub(super) struct Answers {
    pub(super) writer: Arc<Writer>,
    ready: Vec<u8>,
    ordered: Option<Ordered>,
}

/// Answers that wait for those of earlier lines.
struct Ordered {
    next: u64,
    window: u64,
    early: BTreeMap<u64, Vec<u8>>,
}

impl Ordered {
    fn new(window: u64) -> Self {
        Self { next: 0, window: window.max(1), early: BTreeMap::new() }
    }
}

impl Answers {
    /// Answers for `writer`; when `window` is given, in the order of the input, of which so many lines may be under way.
    pub(super) fn new(writer: Arc<Writer>, window: Option<u64>) -> Self {
        Self { writer, ready: vec![], ordered: window.map(Ordered::new) }
    }

    /// Whether an answer to the next line could be kept until it is its turn.
    pub(super) fn has_room_for(&self, sequence: u64) -> bool {
        self.ordered.as_ref().is_none_or(|ordered| sequence < ordered.next + ordered.window)
    }

    pub(super) fn push(&mut self, ticket: Ticket, answer: &Answer, attempts: u32) {
        let Some(ordered) = &mut self.ordered else {
            return write_answer(&mut self.ready, ticket.number, answer, attempts);
        };
        let mut line = vec![];
        write_answer(&mut line, ticket.number, answer, attempts);
        ordered.early.insert(ticket.sequence, line);
        while let Some(line) = ordered.early.remove(&ordered.next) {
            self.ready.extend_from_slice(&line);
            ordered.next += 1;
        }
    }

    pub(super) fn flush(&mut self) {
        if !self.ready.is_empty() {
            self.writer.write(&mut self.ready);
        }
    }
}

impl Drop for Answers {
    /// Lets the writer's thread end, also when the pool never starts.
    fn drop(&mut self) {
        self.writer.close();
    }
}

/// Appends one answer, as a line.
fn write_answer(line: &mut Vec<u8>, number: u64, answer: &Answer, attempts: u32) {
    let _ = write!(line, r#"{{"line":{number}"#);
    if attempts > 1 {
        let _ = write!(line, r#","attempts":{attempts}"#);
    }
    answer.write_members(line);
    line.extend_from_slice(b"}\n");
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::message::{Message, MessageError};

    #[test]
    fn answers_are_one_line_each() {
        let text = |answer: &Answer, attempts| {
            let mut line = vec![];
            write_answer(&mut line, 7, answer, attempts);
            String::from_utf8(line).expect("UTF-8")
        };
        let message = |text: &str| Message::parse(text).expect("JSON");
        assert_eq!(text(&Answer::Reply(message("{\"a\":\n1.0}")), 1), "{\"line\":7,\"reply\":{\"a\": 1.0}}\n");
        assert_eq!(text(&Answer::NoReply, 2), "{\"line\":7,\"attempts\":2}\n");
        assert_eq!(
            text(&Answer::Error(message("[1]")), 1),
            "{\"line\":7,\"error\":{\"kind\":\"guest\",\"value\":[1]}}\n"
        );
        assert_eq!(
            text(&Answer::Invalid(MessageError::TooDeep), 0),
            "{\"line\":7,\"error\":{\"kind\":\"invalid\",\"message\":\"nested deeper than 128 levels\"}}\n"
        );
    }

    #[test]
    fn ordered_answers_wait_for_earlier_ones() {
        let (writer, thread) = Writer::start(io::sink()).expect("a thread");
        let mut answers = Answers::new(writer.clone(), Some(8));
        for sequence in [2, 0, 3, 1] {
            answers.push(Ticket { sequence, number: sequence + 10 }, &Answer::NoReply, 1);
        }
        let lines = String::from_utf8(answers.ready.clone()).expect("UTF-8");
        assert_eq!(lines, "{\"line\":10}\n{\"line\":11}\n{\"line\":12}\n{\"line\":13}\n");
        writer.close();
        thread.join().expect("no panic");
    }
}
