//! The output: answers as lines, in the order of the input if they must be, written on a thread of their own.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread::JoinHandle,
};

use serde_json::json;

use crate::mode::cluster::Answer;

/// Bytes of answers that may wait to be written before no more tasks are begun.
const ANSWERS_MAX: usize = 4 << 20;

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
    // most answers are replies, which are not taken apart
    let _ = write!(line, r#"{{"line":{number}"#);
    if attempts > 1 {
        let _ = write!(line, r#","attempts":{attempts}"#);
    }
    match answer {
        Answer::Reply(reply) => {
            line.extend_from_slice(br#","reply":"#);
            reply.write_line(line);
        }
        Answer::NoReply => {}
        Answer::Error(reason) => {
            line.extend_from_slice(br#","error":{"kind":"guest","value":"#);
            reason.write_line(line);
            line.push(b'}');
        }
        Answer::Invalid(error) => {
            let _ = write!(line, r#","error":{}"#, json!({"kind": "invalid", "message": error.to_string()}));
        }
        Answer::Ended(outcome) => {
            line.extend_from_slice(br#","error":"#);
            serde_json::to_writer(&mut *line, outcome).expect("plain data has a JSON form");
        }
    }
    line.extend_from_slice(b"}\n");
}

/// Writes on a thread of its own, so that a slow reader stops the tasks and not the supervision.
pub(super) struct Writer {
    state: Mutex<WriterState>,
    news: Condvar,
}

#[derive(Default)]
struct WriterState {
    waiting: Vec<u8>,
    closed: bool,
    failed: bool,
    error: Option<io::Error>,
    /// Who waits for room, or for a failure.
    waker: Option<Waker>,
}

impl Writer {
    pub(super) fn start(output: impl Write + Send + 'static) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let writer = Arc::new(Self { state: Mutex::default(), news: Condvar::new() });
        let ours = writer.clone();
        let thread = std::thread::Builder::new().name("wrun-output".into()).spawn(move || ours.run(output))?;
        Ok((writer, thread))
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut output: impl Write) {
        let mut chunk = vec![];
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() && !state.closed {
                state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.waiting.is_empty() {
                return;
            }
            chunk.clear();
            std::mem::swap(&mut chunk, &mut state.waiting);
            drop(state);
            let written = output.write_all(&chunk).and_then(|()| output.flush());
            let mut state = self.state();
            if let Err(error) = written {
                (state.failed, state.error) = (true, Some(error));
            }
            let waker = state.waker.take();
            let failed = state.failed;
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            if failed {
                return;
            }
        }
    }

    /// Adds bytes to what is written, and empties the buffer that they came in.
    fn write(&self, bytes: &mut Vec<u8>) {
        let mut state = self.state();
        if state.failed {
            bytes.clear();
        } else if state.waiting.is_empty() {
            std::mem::swap(&mut state.waiting, bytes);
        } else {
            state.waiting.append(bytes);
        }
        drop(state);
        self.news.notify_one();
    }

    pub(super) fn poll_has_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.waiting.len() < ANSWERS_MAX {
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ready once, when nothing can be written any more.
    pub(super) fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.failed && !state.closed {
            state.closed = true;
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.news.notify_one();
    }

    pub(super) fn take_error(&self) -> Option<io::Error> {
        self.state().error.take()
    }
}

#[cfg(test)]
mod tests {
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
