//! JSON lines through a pool: every line of the input is a task, every task is answered by one line.
//!
//! `{"line":N,"reply":…}`, or `{"line":N}` when the guest has no reply, or `{"line":N,"error":{…}}`; N counts from 1. The
//! error says its kind: `guest` (the guest failed the task; its reason is `value`), `invalid` (the line, or what the
//! guest answered, is no message; `message` says why), or the kind of an [`Outcome`](crate::outcome::Outcome), with its
//! fields. A task that was begun more than once says so: `"attempts":2`. Blank lines are counted and skipped.

mod output;

use std::{
    future::poll_fn,
    io::{self, Read, Write},
    task::{Context, Poll, ready},
};

use tokio::sync::mpsc;

use self::output::{Answers, Ticket};
use crate::{
    Error,
    event::Event,
    lines::{BATCHES, Line, Writer, read_lines},
    mode::cluster::{
        Answer, Builder, End,
        pool::{Client, Finish, Request, Stop},
    },
    process::runtime,
    signal::Signals,
};

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
    let runtime = runtime()?;
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
            answers: Answers::new(writer.clone(), window),
        };
        // compiling may take long, and a signal ends it with all the rest
        let mut signals = Signals::new().map_err(Error::io("listen for signals"))?;
        let mut pool = tokio::select! {
            pool = builder.pool(client, Box::new(events)) => pool?,
            signal = poll_fn(|cx| signals.poll(cx)) => return Ok(End::Stopped { signal, killed: true }),
        };
        // only now: nothing is read from the input of a pool that cannot start
        std::thread::Builder::new()
            .name("wrun-input".into())
            .spawn(move || read_lines(input, max, &lines))
            .map_err(Error::io("start a thread for the input"))?;
        let finish = pool.run().await;
        let client = pool.into_client();
        writer.close();
        // waits for the last bytes to be written, or refused; whoever reads them may never do
        let mut signals = Signals::new().map_err(Error::io("listen for signals"))?;
        tokio::select! {
            _ = tokio::task::spawn_blocking(|| writing.join()) => {}
            signal = poll_fn(|cx| signals.poll(cx)) => return Ok(End::Stopped { signal, killed: true }),
        }
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
            if !self.answers.has_room_for(self.sequence) {
                return Poll::Pending;
            }
            let Some(Line { number, message }) = self.batch.next() else {
                match ready!(self.batches.poll_recv(cx)) {
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
        let signal = ready!(self.signals.poll(cx));
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
