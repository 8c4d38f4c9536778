//! Children of a command: run until they end, with the signals that the command gets.
//!
//! What a terminal sends (SIGINT by Ctrl-C) reaches the guest's process once, from this process: the guest is in no
//! terminal's session. SIGTERM lets the guest finish: its mailbox is disconnected and its input ends, where those come
//! from here; after the grace time its process gets the kill signal. A second signal of either kind ends it now.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    io::{self, Read, Write},
    ops::ControlFlow,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Notify, broadcast, mpsc},
    time::Instant,
};

use super::{
    Command, Fork,
    child::{ChildOutput, ChildStdin},
};
use crate::{
    Error,
    buffer::{Chunk, Mapped, ParMap},
    event::{Data, Event, Stream},
    grant::Denied,
    lines::{BATCHES, Line, Writer, read_lines},
    message::Message,
    outcome::{End, Outcome, Usage},
    process::{Signaller, runtime},
    sandbox::Shape,
    signal::{Signal, Signals},
};

/// How much of a stream is handed on at once.
const CHUNK: usize = 64 << 10;

/// What becomes of a child's output that comes through a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// It goes on to this process's own streams, byte for byte.
    Raw,
    /// It becomes JSON, which goes to standard output: events as lines, or all of it as one.
    Json,
}

/// Runs a guest until it has ended, and hands on what comes through pipes: this process's input to it when
/// [`Command::stdin`] is [`Stdio::piped`](super::Stdio::piped), and its output in a [`Form`].
///
/// # Errors
/// As [`Command::spawn`], or when its guest never ran, or the output cannot be written.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn spawn(command: &mut Command, form: Form) -> Result<Outcome, Error> {
    in_foreground(async |mut signals| {
        let mut stop = Stop::new(command);
        let (out, err) = (Target::start(io::stdout())?, Target::start(io::stderr())?);
        if form == Form::Json {
            let writer = out.writer.clone();
            command.on_denied(move |Denied { grant, reason }| {
                writer.line(&Event::Denied { worker: 1, grant: grant.clone(), reason: reason.clone() });
            });
        }
        let mut child = match until_started(&mut signals, command.spawn()).await? {
            ControlFlow::Continue(child) => child,
            ControlFlow::Break(outcome) => return Ok(outcome),
        };
        let tell = |event: &Event| {
            if form == Form::Json {
                out.writer.line(event);
            }
        };
        let (pid, signaller) = (child.id(), child.worker.process.signaller());
        tell(&Event::Fork { worker: 1, pid, generation: 1 });

        let input = child.stdin.take().map(read_input).transpose().map_err(Error::io("read the input"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (finish, told, ended) = (Notify::new(), Cell::new(false), RefCell::new(None));
        let work = async {
            let wait = async {
                let outcome = child.worker.wait().await;
                let outcome = outcome.map(|outcome| Outcome { voluntary: told.get(), ..outcome });
                if let Ok(outcome) = &outcome {
                    tell(&Event::Exit { worker: 1, pid, tasks: 0, outcome: outcome.clone() });
                }
                ended.replace(Some(outcome));
                finish.notify_one();
            };
            let feed = async {
                tokio::select! {
                    () = feed(input) => {}
                    () = finish.notified() => {}
                }
            };
            let err = if form == Form::Json { &out } else { &err };
            let stdout = hand_on(stdout, Stream::Stdout, form, &out, &signaller);
            let stderr = hand_on(stderr, Stream::Stderr, form, err, &signaller);
            tokio::join!(wait, feed, stdout, stderr);
            tell(&Event::Close { worker: 1 });
            out.written().await;
            err.written().await;
        };
        let obey = stop.obey(
            &mut signals,
            &signaller,
            &told,
            || ended.borrow().is_some(),
            || {
                tell(&Event::Disconnect { worker: 1 });
                finish.notify_one();
            },
        );
        tokio::select! {
            () = work => {}
            () = obey => {}
        }
        let outcome = ended.into_inner().expect("it has ended")?;
        let errors = [out.error()?, err.error()?];
        Ok(read_by_none(outcome, errors.contains(&true)))
    })
}

/// Runs a guest until it has ended, and then writes what it printed: to this process's own streams, or with
/// [`Form::Json`] as one line, an [`Output`](super::Output), to standard output.
///
/// # Errors
/// As [`Command::output`], or when the output cannot be written.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn exec(command: &mut Command, form: Form) -> Result<Outcome, Error> {
    in_foreground(async |mut signals| {
        let (mut stop, max) = (Stop::new(command), command.output_max);
        let (out, err) = (Target::start(io::stdout())?, Target::start(io::stderr())?);
        let child = match until_started(&mut signals, command.spawn_for_output()).await? {
            ControlFlow::Continue(child) => child,
            ControlFlow::Break(outcome) => return Ok(outcome),
        };
        let signaller = child.worker.process.signaller();
        let (told, ended) = (Cell::new(false), RefCell::new(None));
        let work = async {
            let outcome = child.collect(max).await.map(|mut output| {
                output.outcome.voluntary = told.get();
                match form {
                    Form::Json => out.writer.line(&output),
                    Form::Raw => {
                        out.writer.write(&mut output.stdout);
                        err.writer.write(&mut output.stderr);
                    }
                }
                output.outcome
            });
            ended.replace(Some(outcome));
            out.written().await;
            err.written().await;
        };
        // of its own it has nothing that could be closed
        let obey = stop.obey(&mut signals, &signaller, &told, || ended.borrow().is_some(), || {});
        tokio::select! {
            () = work => {}
            () = obey => {}
        }
        let outcome = ended.into_inner().expect("it has ended");
        out.error()?;
        err.error()?;
        outcome
    })
}

/// Hands the chunks of a buffer to the guest until all are done, and writes the replies as lines of `output`, in order.
/// `told` hears of each chunk that is done.
///
/// # Errors
/// As [`Command::par_map`], or when the output cannot be written.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn par_map(
    command: &mut Command,
    map: ParMap,
    output: impl Write + Send + 'static,
    mut told: impl FnMut(&Chunk) + Send + 'static,
) -> Result<Mapped, Error> {
    in_foreground(async |mut signals| {
        let mut stop = Stop::new(command);
        let out = Target::start(output)?;
        let (writer, reduce) = (out.writer.clone(), map.reduce);
        let map = map.each(move |chunk, reply| {
            told(chunk);
            if let Some(reply) = reply {
                write_message(&writer, reply);
            }
        });
        let mut mapping = match until_started(&mut signals, command.start_map(map)).await? {
            ControlFlow::Continue(mapping) => mapping,
            ControlFlow::Break(outcome) => return Ok(Mapped::stopped(outcome)),
        };
        let (signaller, asked, has_ended) = (mapping.signaller(), Cell::new(false), Cell::new(false));
        let work = async {
            loop {
                out.room().await;
                tokio::select! {
                    is_over = mapping.step() => {
                        if is_over {
                            break;
                        }
                    }
                    () = out.failed() => {
                        signaller.send(Signal::KILL);
                    }
                }
            }
            has_ended.set(true);
            let mut mapped = mapping.finish();
            if let Ok(mapped) = &mut mapped {
                mapped.outcome.voluntary = asked.get();
                if reduce {
                    mapped.replies.iter().for_each(|reply| write_message(&out.writer, reply));
                }
            }
            out.written().await;
            mapped
        };
        // it has nothing that could be closed, and what is half done is of no use
        let obey = stop.obey(&mut signals, &signaller, &asked, || has_ended.get(), || _ = signaller.send(Signal::TERM));
        let mut mapped = tokio::select! {
            mapped = work => mapped?,
            () = obey => return Ok(Mapped::stopped(End::Killed { signal: Signal::KILL.number() }.with(Usage::default()))),
        };
        mapped.outcome = read_by_none(mapped.outcome, out.error()?);
        Ok(mapped)
    })
}

fn write_message(writer: &Writer, message: &Message) {
    let mut text = vec![];
    message.write_line(&mut text);
    text.push(b'\n');
    writer.write(&mut text);
}

/// What the guest is, which is compiled for that if it was not before.
///
/// # Errors
/// When it is no guest, or cannot be started with these settings.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn shape(command: &Command) -> Result<Option<Shape>, Error> {
    let code = runtime()?.block_on(command.load())?;
    command.settings.fits(&code.inspection)?;
    Ok(code.inspection.shape)
}

/// How a guest with a mailbox went.
#[derive(Debug, Clone, PartialEq)]
pub struct Forked {
    /// How it ended.
    pub outcome: Outcome,
    /// How many lines of the input were no messages.
    pub refused: u64,
}

/// Runs a guest with a mailbox until it has ended. Lines of `input`, each one JSON value, are messages to it; its messages
/// are lines of `output`. The end of the input disconnects. Events go to `events`; a line that is no message is one.
///
/// # Errors
/// As [`Command::fork`], or when its guest never ran, or the input cannot be read or the output written.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn fork(
    command: &mut Command,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    events: impl FnMut(Event),
) -> Result<Forked, Error> {
    let max = command.settings.limits.message_max.as_usize();
    in_foreground(async |mut signals| {
        let mut stop = Stop::new(command);
        // of a fork that is an event
        command.on_denied(|_| {});
        let fork = match until_started(&mut signals, command.fork()).await? {
            ControlFlow::Continue(fork) => fork,
            ControlFlow::Break(outcome) => return Ok(Forked { outcome, refused: 0 }),
        };
        let events = RefCell::new(events);
        let tell = |event| (events.borrow_mut())(event);
        let happens = fork.events();
        tell(Event::Fork { worker: 1, pid: fork.id(), generation: 1 });
        let out = Target::start(output)?;
        let (lines, batches) = mpsc::channel(BATCHES);
        std::thread::Builder::new()
            .name("wrun-input".into())
            .spawn(move || read_lines(input, max, &lines))
            .map_err(Error::io("start a thread for the input"))?;

        let (refused, unread) = (Cell::new(0), RefCell::new(None));
        let work = async {
            let send = async {
                let sent = tokio::select! {
                    sent = send_lines(&fork, batches, &tell, &refused) => sent,
                    _ = fork.wait() => Ok(()),
                };
                // what came until then is answered
                fork.disconnect();
                unread.replace(sent.err());
            };
            tokio::join!(send, receive_lines(&fork, &out), tell_all(happens, &tell));
            out.written().await;
        };
        let obey = async {
            loop {
                match stop.next(&mut signals).await {
                    Next::Finish => fork.disconnect(),
                    // it is gone, and nobody waits for a reader that is slower than the guest was
                    Next::Signal(signal) => {
                        if !fork.kill(signal) {
                            return;
                        }
                    }
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = obey => {}
        }
        if let Some(source) = unread.into_inner() {
            return Err(Error::Io { what: "read the messages", source });
        }
        let outcome = fork.wait().await?;
        Ok(Forked { outcome: read_by_none(outcome, out.error()?), refused: refused.get() })
    })
}

/// Sends every line of the input that is a message, as long as there is a guest.
async fn send_lines(
    fork: &Fork,
    mut batches: mpsc::Receiver<io::Result<Vec<Line>>>,
    tell: &impl Fn(Event),
    refused: &Cell<u64>,
) -> io::Result<()> {
    while let Some(batch) = batches.recv().await {
        for Line { number, message } in batch? {
            let message = match message {
                Ok(message) => message,
                Err(error) => {
                    refused.set(refused.get() + 1);
                    let message = format!("line {number} is no message: {error}");
                    tell(Event::Error { worker: None, message });
                    continue;
                }
            };
            fork.ready().await;
            // its length was looked at where it came in, and there is room: there is no guest any more
            if fork.send_as(number, &message).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Writes every message of a guest as a line. One whose messages nobody takes is ended, as a program in a pipe would be.
async fn receive_lines(fork: &Fork, out: &Target) {
    let mut text = vec![];
    loop {
        let received = tokio::select! {
            received = fork.recv() => received,
            () = out.failed() => {
                fork.kill(Signal::KILL);
                continue;
            }
        };
        let Some(message) = received else { return };
        message.write_line(&mut text);
        text.push(b'\n');
        while text.len() < CHUNK
            && let Some(message) = fork.try_recv()
        {
            message.write_line(&mut text);
            text.push(b'\n');
        }
        out.room().await;
        out.writer.write(&mut text);
    }
}

/// Tells all that happens, to the end.
async fn tell_all(mut events: broadcast::Receiver<Event>, tell: &impl Fn(Event)) {
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(count)) => {
                Event::Error { worker: None, message: format!("{count} events were not told") }
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let is_last = matches!(event, Event::Exit { .. });
        tell(event);
        if is_last {
            return;
        }
    }
}

/// Runs on this thread, with the signals that the command gets.
fn in_foreground<T>(work: impl AsyncFnOnce(Signals) -> Result<T, Error>) -> Result<T, Error> {
    let runtime = runtime()?;
    let done = runtime.block_on(async { work(Signals::new().map_err(Error::io("listen for signals"))?).await });
    // a thread may still sit in a read of the input, or a write of the output: nobody waits for it
    runtime.shutdown_background();
    done
}

/// How a guest ended whose output may have lost its reader. It was killed then, and ended as a program in a pipe does.
fn read_by_none(outcome: Outcome, is_unread: bool) -> Outcome {
    match outcome.end {
        End::Killed { .. } if is_unread => {
            let end = End::Killed { signal: Signal::PIPE.number() };
            Outcome { end, voluntary: false, ..outcome }
        }
        _ => outcome,
    }
}

/// A child once it is started, unless a signal comes first: compiling may take long.
async fn until_started<T>(
    signals: &mut Signals,
    start: impl Future<Output = Result<T, Error>>,
) -> Result<ControlFlow<Outcome, T>, Error> {
    let begun = std::time::Instant::now();
    tokio::select! {
        started = start => Ok(ControlFlow::Continue(started?)),
        signal = poll_fn(|cx| signals.poll(cx)) => {
            let outcome = End::Killed { signal }.with(Usage::wall(begun.elapsed()));
            Ok(ControlFlow::Break(Outcome { voluntary: true, ..outcome }))
        }
    }
}

/// What a signal, or a time that is over, means for a guest.
enum Next {
    /// It may finish what it has.
    Finish,
    /// Its process gets this signal.
    Signal(Signal),
}

/// How a guest is ended when its command is told to end.
struct Stop {
    grace: Duration,
    kill_signal: Signal,
    is_told: bool,
    /// What its process gets if it is still there then.
    due: Option<(Instant, Signal)>,
}

impl Stop {
    fn new(command: &Command) -> Self {
        Self { grace: command.grace, kill_signal: command.kill_signal, is_told: false, due: None }
    }

    /// Does as the signals say, until one comes after the guest has ended: nobody waits then for a reader that is slower.
    async fn obey(
        &mut self,
        signals: &mut Signals,
        signaller: &Signaller,
        told: &Cell<bool>,
        has_ended: impl Fn() -> bool,
        finish: impl Fn(),
    ) {
        loop {
            let next = self.next(signals).await;
            if has_ended() {
                return;
            }
            told.set(true);
            match next {
                Next::Finish => finish(),
                Next::Signal(signal) => _ = signaller.send(signal),
            }
        }
    }

    /// Waits until there is something to be done. Cancel-safe.
    async fn next(&mut self, signals: &mut Signals) -> Next {
        let due = self.due;
        let time = async {
            match due {
                Some((at, signal)) => {
                    tokio::time::sleep_until(at).await;
                    signal
                }
                None => std::future::pending().await,
            }
        };
        let (next, then) = tokio::select! {
            number = poll_fn(|cx| signals.poll(cx)) => match Signal::from_number(number) {
                _ if self.is_told => (Next::Signal(Signal::KILL), None),
                Some(signal) if signal != Signal::TERM => (Next::Signal(signal), Some(Signal::KILL)),
                _ => (Next::Finish, Some(self.kill_signal)),
            },
            signal = time => (Next::Signal(signal), (signal != Signal::KILL).then_some(Signal::KILL)),
        };
        self.is_told = true;
        self.due = then.map(|signal| (Instant::now() + self.grace, signal));
        next
    }
}

/// Somewhere to write to, on a thread of its own: whoever reads there may be slow.
struct Target {
    writer: Arc<Writer>,
    thread: RefCell<Option<JoinHandle<()>>>,
}

impl Target {
    fn start(output: impl Write + Send + 'static) -> Result<Self, Error> {
        let (writer, thread) = Writer::start(output).map_err(Error::io("start a thread for the output"))?;
        Ok(Self { writer, thread: RefCell::new(Some(thread)) })
    }

    /// Waits until there is room for more.
    async fn room(&self) {
        poll_fn(|cx| self.writer.poll_has_room(cx)).await;
    }

    /// Waits until nothing can be written any more. It is told once.
    async fn failed(&self) {
        poll_fn(|cx| self.writer.poll_failed(cx)).await;
    }

    /// Waits until all is written, or refused.
    async fn written(&self) {
        self.writer.close();
        let thread = self.thread.take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(|| thread.join()).await;
        }
    }

    /// Whether nobody reads it any more.
    ///
    /// # Errors
    /// Why else not all was written.
    fn error(&self) -> Result<bool, Error> {
        match self.writer.take_error() {
            None => Ok(false),
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(true),
            Some(source) => Err(Error::Io { what: "write the guest's output", source }),
        }
    }
}

impl Drop for Target {
    /// Lets the thread end.
    fn drop(&mut self) {
        self.writer.close();
    }
}

/// Hands a stream on to its end. A guest whose output nobody takes is ended, as a program in a pipe would be.
async fn hand_on(from: Option<ChildOutput>, stream: Stream, form: Form, to: &Target, signaller: &Signaller) {
    let Some(mut from) = from else { return };
    let mut bytes = Vec::with_capacity(CHUNK);
    loop {
        to.room().await;
        let mut part = (&mut from).take((CHUNK - bytes.len()) as u64);
        let count = tokio::select! {
            read = part.read_buf(&mut bytes) => read.unwrap_or(0),
            () = to.failed() => {
                signaller.send(Signal::KILL);
                continue;
            }
        };
        if form == Form::Raw {
            to.writer.write(&mut bytes);
            bytes.reserve(CHUNK);
        } else {
            // a character that is cut in two waits for its other half
            let kept = if count == 0 { 0 } else { started_character(&bytes) };
            let rest = bytes.split_off(bytes.len() - kept);
            let data = std::mem::replace(&mut bytes, rest);
            bytes.reserve(CHUNK);
            if !data.is_empty() {
                to.writer.line(&Event::Chunk { worker: 1, stream, data: Data(data) });
            }
        }
        if count == 0 {
            return;
        }
    }
}

/// How many bytes at the end are the start of a character whose rest has not come.
fn started_character(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => bytes.len() - error.valid_up_to(),
        _ => 0,
    }
}

/// This process's input, read by a thread of its own as far ahead as the pipe to the guest is behind.
struct Input {
    to: ChildStdin,
    chunks: mpsc::Receiver<Vec<u8>>,
}

fn read_input(to: ChildStdin) -> io::Result<Input> {
    let (sender, chunks) = mpsc::channel(4);
    std::thread::Builder::new().name("wrun-input".into()).spawn(move || {
        let mut input = io::stdin().lock();
        let mut bytes = vec![0; CHUNK];
        loop {
            match input.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if sender.blocking_send(bytes[..count].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    })?;
    Ok(Input { to, chunks })
}

/// Gives the guest its input, to its end or as long as it takes it.
async fn feed(input: Option<Input>) {
    let Some(Input { mut to, mut chunks }) = input else { return };
    while let Some(chunk) = chunks.recv().await {
        if to.write_all(&chunk).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        for (bytes, kept) in [
            (&b""[..], 0),
            (b"abc", 0),
            ("aé".as_bytes(), 0),
            (&"aé".as_bytes()[..2], 1),
            (&"a\u{6f22}".as_bytes()[..3], 2),
            (&"\u{1f980}".as_bytes()[..3], 3),
            // no character begins like that, whatever follows
            (b"a\xff", 0),
            (b"\xe6\xbcx", 0),
        ] {
            assert_eq!(started_character(bytes), kept, "{bytes:?}");
        }
    }
}
