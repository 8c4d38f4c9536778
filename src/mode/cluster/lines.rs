//! JSON lines through a pool: every line of the input is a task, every task is answered by one line.
//!
//! `{"line":N,"reply":…}`, or `{"line":N}` when the guest has no reply, or `{"line":N,"error":{…}}`; N counts from 1. The
//! error says its kind: `guest` (the guest failed the task; its reason is `value`), `invalid` (the line, or what the
//! guest answered, is no message; `message` says why), or the kind of an [`Outcome`](crate::outcome::Outcome), with its
//! fields. A task that was begun more than once says so: `"attempts":2`. Blank lines are counted and skipped.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread::JoinHandle,
};

use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{
    Answer, Builder,
    pool::{Client, Finish, Request, Stop},
};
use crate::{
    Error,
    event::Event,
    message::{Message, MessageError},
};

/// Lines that are read ahead of the pool: so many batches, of so many lines or bytes each.
const BATCHES: usize = 4;
const BATCH_LINES: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// Bytes of answers that may wait to be written before no more tasks are begun.
const ANSWERS_MAX: usize = 4 << 20;

/// How the lines ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All lines are answered.
    Done,
    /// A signal asked for an early end. All lines that were read are answered, if only with `cancelled`.
    Stopped {
        /// The signal.
        signal: i32,
        /// Whether workers had to be killed.
        killed: bool,
    },
    /// Nobody reads the answers any more.
    OutputClosed,
}

/// Runs a pool on the lines of `input` until its end, or until SIGINT or SIGTERM. Events go to `events`.
///
/// With `ordered`, answers come in the order of the lines instead of that of their completion.
///
/// # Errors
/// As [`Builder::start`], when every worker failed, or when `output` cannot be written.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn run(
    builder: Builder,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    ordered: bool,
    events: impl FnMut(Event) + Send + 'static,
) -> Result<End, Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::io("start the runtime"))?;
    let ended = runtime.block_on(async {
        let max = builder.limits.message_max.as_usize();
        let window = ordered.then(|| builder.queue.saturating_mul(2) as u64);
        let (lines, batches) = mpsc::channel(BATCHES);
        let (writer, writing) = Writer::start(output).map_err(Error::io("start a thread for the answers"))?;
        let client = Lines {
            batches,
            batch: vec![].into_iter(),
            sequence: 0,
            signals: Signals::new().map_err(Error::io("listen for signals"))?,
            stopped: None,
            input_error: None,
            answers: Answers { writer: writer.clone(), ready: vec![], ordered: window.map(Ordered::new) },
        };
        let mut pool = builder.pool(client, Box::new(events)).await?;
        // only now: nothing is read from the input of a pool that cannot start
        std::thread::Builder::new()
            .name("wrun-input".into())
            .spawn(move || read_lines(input, max, &lines))
            .map_err(Error::io("start a thread for the input"))?;
        let finish = pool.run().await;
        let client = pool.into_client();
        writer.close();
        // waits for the last bytes to be written, or refused
        let _ = writing.join();
        match writer.take_error() {
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(End::OutputClosed),
            Some(source) => return Err(Error::Io { what: "write the answers", source }),
            None => {}
        }
        let finish = finish.map_err(Error::of_pool)?;
        match (client.stopped, client.input_error) {
            (Some(signal), _) => Ok(End::Stopped { signal, killed: finish == Finish::Killed }),
            (None, Some(source)) => Err(Error::Io { what: "read the tasks", source }),
            (None, None) => Ok(End::Done),
        }
    });
    // a thread may still sit in a read of the input: nobody waits for it
    runtime.shutdown_background();
    ended
}

/// One line that is not blank.
struct Line {
    number: u64,
    message: Result<Message, MessageError>,
}

/// Whose task it is: its place in the output when that is ordered, and its line.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    sequence: u64,
    number: u64,
}

struct Lines {
    batches: mpsc::Receiver<io::Result<Vec<Line>>>,
    batch: std::vec::IntoIter<Line>,
    sequence: u64,
    signals: Signals,
    stopped: Option<i32>,
    input_error: Option<io::Error>,
    answers: Answers,
}

impl Client for Lines {
    type Ticket = Ticket;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Request<Ticket>> {
        loop {
            // answers that come later make the room, and they come through this pool
            if self.answers.ordered.as_ref().is_some_and(|ordered| self.sequence >= ordered.next + ordered.window) {
                return Poll::Pending;
            }
            let Some(Line { number, message }) = self.batch.next() else {
                match std::task::ready!(self.batches.poll_recv(cx)) {
                    Some(Ok(batch)) => self.batch = batch.into_iter(),
                    Some(Err(error)) => self.input_error = Some(error),
                    None => return Poll::Ready(Request::Finish),
                }
                continue;
            };
            let ticket = Ticket { sequence: self.sequence, number };
            self.sequence += 1;
            match message {
                Ok(message) => return Poll::Ready(Request::Task(ticket, message)),
                Err(error) => self.complete(ticket, Answer::Invalid(error), 0),
            }
        }
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stop> {
        if self.answers.writer.poll_failed(cx).is_ready() {
            return Poll::Ready(Stop::Now);
        }
        let signal = std::task::ready!(self.signals.poll(cx));
        let again = self.stopped.replace(signal).is_some();
        Poll::Ready(if again { Stop::Now } else { Stop::Politely })
    }

    fn poll_has_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.answers.writer.poll_has_room(cx)
    }

    fn complete(&mut self, ticket: Ticket, answer: Answer, attempts: u32) {
        self.answers.push(ticket, &answer, attempts);
    }

    fn flush(&mut self) {
        self.answers.flush();
    }
}

/// Answers on their way out.
struct Answers {
    writer: Arc<Writer>,
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
    fn push(&mut self, ticket: Ticket, answer: &Answer, attempts: u32) {
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

    fn flush(&mut self) {
        if !self.ready.is_empty() {
            self.writer.write(&mut self.ready);
        }
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
struct Writer {
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
    fn start(output: impl Write + Send + 'static) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
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

    fn poll_has_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.waiting.len() < ANSWERS_MAX {
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ready once, when nothing can be written any more.
    fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.failed && !state.closed {
            state.closed = true;
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn close(&self) {
        self.state().closed = true;
        self.news.notify_one();
    }

    fn take_error(&self) -> Option<io::Error> {
        self.state().error.take()
    }
}

/// The signals that end a pool politely.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        for (signal, kind) in
            [(&mut self.interrupt, SignalKind::interrupt()), (&mut self.terminate, SignalKind::terminate())]
        {
            if let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                return Poll::Ready(kind.as_raw_value());
            }
        }
        Poll::Pending
    }
}

/// Reads lines until the end, and hands them over in batches: full ones, or what there is before it has to wait.
fn read_lines(input: impl Read, max: usize, lines: &mpsc::Sender<io::Result<Vec<Line>>>) {
    let mut input = BufReader::with_capacity(BATCH_BYTES / 4, input);
    let mut reader = LineReader { max, number: 0, partial: vec![], dropped: 0, batch: vec![], batch_bytes: 0 };
    loop {
        let chunk = match input.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = lines.blocking_send(Ok(reader.take_batch()));
                let _ = lines.blocking_send(Err(error));
                return;
            }
        };
        if chunk.is_empty() {
            reader.end();
            let _ = lines.blocking_send(Ok(reader.take_batch()));
            return;
        }
        let mut rest = chunk;
        while !rest.is_empty() {
            rest = reader.take(rest);
            if reader.is_full() && lines.blocking_send(Ok(reader.take_batch())).is_err() {
                return;
            }
        }
        let length = chunk.len();
        input.consume(length);
        // the next read may have to wait
        if !reader.batch.is_empty() && lines.blocking_send(Ok(reader.take_batch())).is_err() {
            return;
        }
    }
}

struct LineReader {
    max: usize,
    number: u64,
    /// The start of a line whose end has not come yet ...
    partial: Vec<u8>,
    /// ... and how much of it came after that and was not kept, since it is too long anyhow.
    dropped: usize,
    batch: Vec<Line>,
    batch_bytes: usize,
}

impl LineReader {
    /// Takes the bytes up to the next end of a line, or all; answers the rest.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            // white space around the message does not count for its length, within reason
            let room = (self.max + 1024).saturating_sub(self.partial.len());
            let kept = bytes.len().min(room);
            self.partial.extend_from_slice(&bytes[..kept]);
            self.dropped += bytes.len() - kept;
            return &[];
        };
        if self.partial.is_empty() && self.dropped == 0 {
            self.line(&bytes[..end], 0);
        } else {
            let mut line = std::mem::take(&mut self.partial);
            line.extend_from_slice(&bytes[..end]);
            let dropped = std::mem::take(&mut self.dropped);
            self.line(&line, dropped);
        }
        &bytes[end + 1..]
    }

    /// The input has ended, perhaps within a line.
    fn end(&mut self) {
        let (line, dropped) = (std::mem::take(&mut self.partial), std::mem::take(&mut self.dropped));
        if !line.is_empty() {
            self.line(&line, dropped);
        }
    }

    fn line(&mut self, line: &[u8], dropped: usize) {
        self.number += 1;
        let message = match line.trim_ascii() {
            [] if dropped == 0 => return,
            text if dropped > 0 => Err(MessageError::TooLong { length: text.len() + dropped, max: self.max }),
            text => Message::check(text, self.max),
        };
        self.batch_bytes += line.len();
        self.batch.push(Line { number: self.number, message });
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= BATCH_LINES || self.batch_bytes >= BATCH_BYTES
    }

    fn take_batch(&mut self) -> Vec<Line> {
        self.batch_bytes = 0;
        std::mem::take(&mut self.batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &[u8], step: usize, max: usize) -> Vec<(u64, Result<String, MessageError>)> {
        let mut reader = LineReader { max, number: 0, partial: vec![], dropped: 0, batch: vec![], batch_bytes: 0 };
        for piece in input.chunks(step) {
            let mut rest = piece;
            while !rest.is_empty() {
                rest = reader.take(rest);
            }
        }
        reader.end();
        let lines = reader.take_batch().into_iter();
        lines.map(|line| (line.number, line.message.map(|message| message.to_string()))).collect()
    }

    #[test]
    fn lines_are_numbered_and_blank_ones_skipped() {
        let input = b"1\n\n \t\r\n[2]\r\n\n\"three\"";
        for step in [1, 2, 3, 100] {
            let expected = [(1, Ok("1".into())), (4, Ok("[2]".into())), (6, Ok("\"three\"".into()))];
            assert_eq!(read(input, step, 100), expected, "in steps of {step}");
        }
        assert_eq!(read(b"", 1, 100), []);
        assert_eq!(read(b"\n\n", 1, 100), []);
    }

    #[test]
    fn long_lines_are_refused_with_their_length_and_not_kept() {
        let mut input = vec![b'7'; 1 << 20];
        input.extend_from_slice(b"\n8\n");
        for step in [1000, 1 << 21] {
            assert_eq!(
                read(&input, step, 100),
                [(1, Err(MessageError::TooLong { length: 1 << 20, max: 100 })), (2, Ok("8".into()))]
            );
        }
    }

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
        let mut answers = Answers { writer: writer.clone(), ready: vec![], ordered: Some(Ordered::new(8)) };
        for sequence in [2, 0, 3, 1] {
            answers.push(Ticket { sequence, number: sequence + 10 }, &Answer::NoReply, 1);
        }
        let lines = String::from_utf8(answers.ready.clone()).expect("UTF-8");
        assert_eq!(lines, "{\"line\":10}\n{\"line\":11}\n{\"line\":12}\n{\"line\":13}\n");
        writer.close();
        thread.join().expect("no panic");
    }
}
