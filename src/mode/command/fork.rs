//! A guest in a process of its own, with its mailbox.

use std::{
    collections::{BTreeSet, VecDeque},
    future::poll_fn,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, broadcast, oneshot},
    task::JoinHandle,
};

use super::{
    Command, Mailbox,
    child::{ChildOutput, ChildStdin, Ends},
    launch::{Notes, Worker, ran},
};
use crate::{
    Error,
    buffer::{BUFFERS_MAX, Buffer, check_name},
    event::Event,
    grant::Denied,
    message::{Message, MessageError, SendError},
    outcome::{Answer, End, Outcome, Stage, millis},
    process::{
        Seen, Signaller,
        wire::{Frame, Kind, Outgoing},
    },
    signal::Signal,
};

/// Bytes of messages that may wait on their way to a guest, and as many that it sent and nobody took, each beside one
/// message and what is in the socket.
const WAITING_MAX: usize = 4 << 20;

/// What a message takes beside its text.
const MESSAGE_COST: usize = 64;

/// How much more may have come from a guest that was asked to end, so that it can: all that it can have said before that,
/// and some more.
const LAST_WORDS: usize = 16 << 20;

/// How much of a guest's reason for failing a message is told as an event, in characters.
const REASON_MAX: usize = 1000;

/// How many bytes are given to the socket before more are taken from those that wait.
const WRITE_AHEAD: usize = 1 << 20;

/// A guest that was started with a mailbox. It is ended when this is dropped.
///
/// Messages arrive in the order in which they were sent, in both directions. Nothing is lost unless the guest ends: a
/// parent that sends faster than its guest receives is told so ([`SendError::Full`]), and a guest whose parent does not
/// receive finds its mailbox full.
///
/// All methods take `&self`: several tasks can share one, in an `Arc`. It moves by a task on the runtime that it was
/// started in.
#[derive(Debug)]
pub struct Fork {
    /// The guest's standard input, when that is a pipe. Dropping it is the end of the input.
    pub stdin: Option<ChildStdin>,
    /// The guest's standard output, when that is a pipe.
    pub stdout: Option<ChildOutput>,
    /// The guest's standard error, when that is a pipe.
    pub stderr: Option<ChildOutput>,
    shared: Arc<Shared>,
    driver: JoinHandle<()>,
    pid: u32,
    message_max: usize,
    kill_signal: Signal,
    grace: Duration,
    is_handler: bool,
}

/// What a [`Fork`] and its driver share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The driver's.
    signaller: Signaller,
    events: broadcast::Sender<Event>,
    /// There is a message, or there will be none.
    received: Notify,
    /// There is room to send, or nobody to send to.
    has_room: Notify,
    /// It is gone.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// On their way to the guest.
    outgoing: Outgoing,
    sent: u64,
    /// Those that get answers, in the order of what they asked: a handler's by their messages' numbers.
    asked: VecDeque<(u64, Option<oneshot::Sender<Answer>>)>,
    /// The names of the buffers that it has or will have.
    buffers: BTreeSet<String>,
    /// From the guest.
    incoming: VecDeque<Message>,
    incoming_bytes: usize,
    /// No more is sent.
    disconnected: bool,
    /// The guest is asked to end, by whom does not matter.
    voluntary: bool,
    ended: Option<Outcome>,
    /// The driver, when it waits.
    driver: Option<Waker>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // whole after every call, whoever panicked
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake_driver(&mut self) {
        if let Some(waker) = self.driver.take() {
            waker.wake();
        }
    }

    /// Whether so much has come that no more is read.
    fn is_full(&self) -> bool {
        self.incoming_bytes > WAITING_MAX + if self.disconnected { LAST_WORDS } else { 0 }
    }

    fn is_closed(&self) -> bool {
        self.disconnected || self.ended.is_some()
    }
}

impl Fork {
    pub(super) fn new(worker: Worker, ends: Ends, mailbox: Mailbox, command: &Command) -> Self {
        let (events, _) = broadcast::channel(1024);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                buffers: command.settings.buffers.iter().map(|(name, _)| name.clone()).collect(),
                ..State::default()
            }),
            signaller: worker.process.signaller(),
            events,
            received: Notify::new(),
            has_room: Notify::new(),
            ended: Notify::new(),
        });
        let pid = worker.process.pid();
        let is_handler = mailbox == Mailbox::Handler;
        let message_max = command.settings.limits.message_max.as_usize();
        let driver = Driver {
            shared: shared.clone(),
            worker,
            message_max: command.settings.message_max().as_usize(),
            is_handler,
            started: Instant::now(),
            is_online: false,
            drained: false,
            tasks: 0,
            broken: None,
        };
        let Ends { stdin, stdout, stderr } = ends;
        Self {
            stdin,
            stdout,
            stderr,
            shared,
            driver: tokio::spawn(driver.run()),
            pid,
            message_max,
            kill_signal: command.kill_signal,
            grace: command.grace,
            is_handler,
        }
    }

    /// The process that the guest runs in.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// What happens from now on. A receiver that falls 1,024 events behind is told how many it has missed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Sends the guest a message. Never waits.
    ///
    /// What a handler replies, and what a command sends, comes with [`Fork::recv`].
    ///
    /// # Errors
    /// When the message was not sent: the mailbox is full or closed.
    pub fn send(&self, message: &Message) -> Result<(), SendError> {
        self.put(None, message, None)
    }

    /// As [`Fork::send`], for a message with a number of its own; numbers go up.
    pub(super) fn send_as(&self, number: u64, message: &Message) -> Result<(), SendError> {
        self.put(Some(number), message, None)
    }

    /// Sends a message and waits for its answer: a handler's to this very message, or the next message that a command
    /// sends and that no earlier request waits for.
    ///
    /// A request that is dropped has been sent all the same; its answer is dropped with it. An answer comes behind the
    /// messages that the guest has sent before: when more of those lie here than may, somebody must take them.
    ///
    /// # Errors
    /// As [`Fork::send`]. A guest that ends instead of answering is [`Answer::Ended`].
    pub async fn request(&self, message: &Message) -> Result<Answer, SendError> {
        let (ticket, answer) = oneshot::channel();
        self.put(None, message, Some(ticket))?;
        answer.await.map_err(|_| SendError::Closed)
    }

    fn put(
        &self,
        number: Option<u64>,
        message: &Message,
        ticket: Option<oneshot::Sender<Answer>>,
    ) -> Result<(), SendError> {
        let length = message.as_str().len();
        if length > self.message_max {
            return Err(SendError::TooLong(MessageError::TooLong { length, max: self.message_max }));
        }
        let state = &mut *self.shared.state();
        if state.is_closed() {
            return Err(SendError::Closed);
        }
        if state.outgoing.pending().len() > WAITING_MAX {
            return Err(SendError::Full);
        }
        state.sent = number.unwrap_or(state.sent + 1);
        if self.is_handler || ticket.is_some() {
            state.asked.push_back((state.sent, ticket));
        }
        state.outgoing.push(Kind::Task, state.sent, message.as_str().as_bytes());
        state.wake_driver();
        Ok(())
    }

    /// Lets the guest have windows of a buffer, under this name, from the messages on that are sent after it: ranges of it in
    /// its own memory. What is sent is a descriptor, and none of its bytes. One of the same name is replaced. See `wrun:guest/window`; only components have it.
    ///
    /// ```standalone_crate
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use wrun::{Buffer, message::Message, outcome::Answer};
    ///
    /// wrun::init();
    /// # let guest = guest_artifacts::WORDCOUNT;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    /// # rt.block_on(async {
    /// let child = wrun::fork(guest).await?;
    /// child.send_buffer("input", &Buffer::from_slice(b"so many words\nin one buffer\n")?)?;
    /// let answer = child.request(&Message::parse(r#"{"chunk":0,"offset":3,"length":10}"#)?).await?;
    /// assert_eq!(answer, Answer::Reply(Message::parse(r#"{"lines":0,"words":2,"bytes":10}"#)?));
    /// # Ok(()) })
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the mailbox is full or closed, the name cannot be one, the guest has 64 buffers already, or there is no
    /// descriptor left.
    pub fn send_buffer(&self, name: &str, buffer: &Buffer) -> Result<(), SendError> {
        check_name(name).map_err(SendError::NotShared)?;
        let parts = buffer.parts().map(|part| part.try_clone_to_owned()).collect::<io::Result<Vec<_>>>();
        let parts = parts.map_err(|error| SendError::NotShared(error.to_string()))?;
        let state = &mut *self.shared.state();
        if state.is_closed() {
            return Err(SendError::Closed);
        }
        if state.outgoing.pending().len() > WAITING_MAX {
            return Err(SendError::Full);
        }
        if !state.buffers.contains(name) && state.buffers.len() == BUFFERS_MAX {
            return Err(SendError::NotShared(format!("the guest has {BUFFERS_MAX} buffers, as many as it may have")));
        }
        state.buffers.insert(name.to_owned());
        for (left, part) in (1..=parts.len() as u64).rev().zip(parts) {
            state.outgoing.push_with(Kind::Buffer, left, name.as_bytes(), part);
        }
        state.wake_driver();
        Ok(())
    }

    /// Waits until the mailbox has room for a message, or is closed. Cancel-safe.
    pub async fn ready(&self) {
        let mut notified = std::pin::pin!(self.shared.has_room.notified());
        loop {
            notified.as_mut().enable();
            {
                let state = self.shared.state();
                if state.is_closed() || state.outgoing.pending().len() <= WAITING_MAX {
                    return;
                }
            }
            notified.as_mut().await;
            notified.set(self.shared.has_room.notified());
        }
    }

    /// The next message from the guest; none when it has ended and all that it sent was taken. Cancel-safe.
    pub async fn recv(&self) -> Option<Message> {
        let mut notified = std::pin::pin!(self.shared.received.notified());
        loop {
            notified.as_mut().enable();
            if let Poll::Ready(message) = self.take() {
                return message;
            }
            notified.as_mut().await;
            notified.set(self.shared.received.notified());
        }
    }

    /// The next message from the guest, if one is here.
    #[must_use]
    pub fn try_recv(&self) -> Option<Message> {
        match self.take() {
            Poll::Ready(message) => message,
            Poll::Pending => None,
        }
    }

    /// What [`Fork::recv`] would answer without waiting.
    fn take(&self) -> Poll<Option<Message>> {
        let state = &mut *self.shared.state();
        match state.incoming.pop_front() {
            Some(message) => {
                let was_full = state.is_full();
                state.incoming_bytes -= message.as_str().len() + MESSAGE_COST;
                if was_full && !state.is_full() {
                    state.wake_driver();
                }
                Poll::Ready(Some(message))
            }
            None if state.ended.is_some() => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// Sends no more. What was sent is still received; after that a handler ends, and a command finds its mailbox closed.
    pub fn disconnect(&self) {
        let state = &mut *self.shared.state();
        if !state.is_closed() {
            state.disconnected = true;
            state.voluntary = true;
            state.wake_driver();
            self.shared.has_room.notify_waiters();
        }
    }

    /// Sends its process a signal; whether it was still there. The guest does not see signals: what would end a process,
    /// ends it.
    pub fn kill(&self, signal: Signal) -> bool {
        let state = &mut *self.shared.state();
        let felt = state.ended.is_none() && self.shared.signaller.send(signal);
        state.voluntary |= felt;
        felt
    }

    /// Waits until the guest has ended. Cancel-safe, and answers the same when it is asked again. Messages that were not
    /// taken can still be; but a guest that has sent more than may lie here ends when enough of them are taken, or it is
    /// killed, or [`Fork::disconnect`] is called.
    ///
    /// # Errors
    /// When the guest never ran: its imports are not offered, a wall is missing.
    pub async fn wait(&self) -> Result<Outcome, Error> {
        let mut notified = std::pin::pin!(self.shared.ended.notified());
        loop {
            notified.as_mut().enable();
            if let Some(ended) = self.shared.state().ended.clone() {
                return ran(ended);
            }
            notified.as_mut().await;
            notified.set(self.shared.ended.notified());
        }
    }

    /// Asks it to end: disconnects, waits for the grace time, and sends it the kill signal, and SIGKILL when that does not
    /// end it. What it sent can still be taken.
    ///
    /// Cancel-safe: when it is called again, the grace time begins anew.
    ///
    /// # Errors
    /// As [`Fork::wait`].
    pub async fn shutdown(&self) -> Result<Outcome, Error> {
        self.disconnect();
        for signal in [self.kill_signal, Signal::KILL] {
            if let Ok(outcome) = tokio::time::timeout(self.grace, self.wait()).await {
                return outcome;
            }
            self.kill(signal);
        }
        self.wait().await
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        self.shared.signaller.send(Signal::KILL);
        // and with it what waits for the process
        self.driver.abort();
    }
}

/// Moves the messages of one guest.
struct Driver {
    shared: Arc<Shared>,
    worker: Worker,
    message_max: usize,
    is_handler: bool,
    started: Instant,
    is_online: bool,
    /// The guest was told that no more will come.
    drained: bool,
    tasks: u64,
    /// It said what it should not.
    broken: Option<String>,
}

impl Driver {
    async fn run(mut self) {
        let end = poll_fn(|cx| self.poll(cx)).await;
        self.ended(end);
    }

    /// Tells all who wait how it ended.
    fn ended(&mut self, end: End) {
        let end = match self.broken.take() {
            Some(reason) => End::Failed { stage: Stage::Protocol, reason, hint: None },
            None => end,
        };
        self.worker.voluntary = self.shared.state().voluntary;
        let pid = self.worker.process.pid();
        let outcome = self.worker.gone(end);
        let asked = {
            let state = &mut *self.shared.state();
            state.ended = Some(outcome.clone());
            let waiting = state.outgoing.pending().len();
            state.outgoing.advance(waiting);
            std::mem::take(&mut state.asked)
        };
        for (_, ticket) in asked {
            answer(ticket, Answer::Ended(outcome.clone()));
        }
        let _ = self.shared.events.send(Event::Exit { worker: 1, pid, tasks: self.tasks, outcome });
        self.shared.ended.notify_waiters();
        self.shared.received.notify_waiters();
        self.shared.has_room.notify_waiters();
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let is_full = self.give(cx);
            if is_full {
                // it may still end, and then what it has sent is bounded by what the socket holds
                if self.worker.process.poll_unread(cx).is_pending() {
                    let is_idle = self.worker.process.waiting_bytes() == 0;
                    if is_idle && !self.shared.state().outgoing.pending().is_empty() {
                        continue;
                    }
                    return Poll::Pending;
                }
            }
            let Self { shared, worker, message_max, is_handler, started, is_online, tasks, broken, .. } = self;
            let Worker { process, notes, .. } = worker;
            let pid = process.pid();
            let mut came = Came { state: shared.state(), shared, notes, message_max: *message_max, received: 0 };
            let seen = process.poll(cx, |frame| {
                if broken.is_some() {
                    return;
                }
                if frame.kind == Kind::Ready && std::mem::replace(is_online, true) {
                    *broken = Some("it got ready twice".into());
                } else if frame.kind == Kind::Ready {
                    let start_ms = millis(started.elapsed());
                    let _ = shared.events.send(Event::Online { worker: 1, pid, start_ms });
                } else if let Err(reason) = came.take(&frame, *is_handler, tasks) {
                    *broken = Some(reason);
                }
            });
            let received = came.received;
            drop(came);
            if received > 0 {
                shared.received.notify_waiters();
            }
            if broken.is_some() {
                process.signal(Signal::KILL);
            }
            match seen {
                Poll::Ready(Seen::Gone(end)) => return Poll::Ready(end),
                Poll::Ready(Seen::Broken(error)) => {
                    broken.get_or_insert(error.to_string());
                    process.signal(Signal::KILL);
                }
                Poll::Ready(Seen::Progress) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Gives the process what waits for it; whether so much has come from it that no more is read.
    fn give(&mut self, cx: &mut Context<'_>) -> bool {
        let state = &mut *self.shared.state();
        state.driver = Some(cx.waker().clone());
        let process = &mut self.worker.process;
        if process.waiting_bytes() < WRITE_AHEAD {
            let was_full = state.outgoing.pending().len() > WAITING_MAX;
            process.send_all(&mut state.outgoing);
            if was_full {
                self.shared.has_room.notify_waiters();
            }
        }
        if state.disconnected && !self.drained && state.outgoing.pending().is_empty() {
            self.drained = true;
            process.send(Kind::Drain, 0, b"");
            let _ = self.shared.events.send(Event::Disconnect { worker: 1 });
        }
        state.is_full()
    }
}

impl Drop for Driver {
    /// Its runtime is gone, or its [`Fork`]: the guest goes with it.
    fn drop(&mut self) {
        let has_ended = self.shared.state().ended.is_some();
        if !has_ended {
            self.worker.process.kill();
            self.ended(End::Cancelled);
        }
    }
}

/// Takes frames while the state is locked.
struct Came<'a> {
    state: MutexGuard<'a, State>,
    shared: &'a Shared,
    notes: &'a mut Notes,
    message_max: usize,
    received: usize,
}

impl Came<'_> {
    /// Takes one frame.
    ///
    /// # Errors
    /// Says what is wrong with it, when the process has broken the protocol.
    fn take(&mut self, frame: &Frame<'_>, is_handler: bool, tasks: &mut u64) -> Result<(), String> {
        let message = || Message::check(frame.body, self.message_max);
        match frame.kind {
            Kind::Message => {
                // its process has looked at it already
                let message = message().map_err(|error| format!("it sent what is no message: {error}"))?;
                match self.state.asked.pop_front_if(|_| !is_handler) {
                    Some((_, ticket)) => answer(ticket, Answer::Reply(message)),
                    None => self.receive(message),
                }
            }
            Kind::Reply | Kind::NoReply | Kind::TaskError if is_handler => {
                let Some((_, ticket)) = self.state.asked.pop_front_if(|(id, _)| *id == frame.id) else {
                    return Err(format!("it answered message {}, which it was not asked", frame.id));
                };
                *tasks += 1;
                let given = match (frame.kind, message()) {
                    (Kind::NoReply, _) => Answer::NoReply,
                    (_, Err(error)) => Answer::Invalid(error),
                    (Kind::Reply, Ok(reply)) => Answer::Reply(reply),
                    (_, Ok(reason)) => Answer::Error(reason),
                };
                match (ticket, given) {
                    (Some(ticket), given) => answer(Some(ticket), given),
                    (None, Answer::Reply(reply)) => self.receive(reply),
                    (None, Answer::NoReply | Answer::Ended(_)) => {}
                    (None, Answer::Error(reason)) => {
                        let reason: String = reason.as_str().chars().take(REASON_MAX).collect();
                        self.complain(format!("the guest failed message {}: {reason}", frame.id));
                    }
                    (None, Answer::Invalid(error)) => {
                        self.complain(format!("the guest's answer to message {} is {error}", frame.id));
                    }
                }
            }
            _ => {
                if let Some(Denied { grant, reason }) = self.notes.take(frame) {
                    let _ = self.shared.events.send(Event::Denied { worker: 1, grant, reason });
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self, message: Message) {
        self.state.incoming_bytes += message.as_str().len() + MESSAGE_COST;
        self.state.incoming.push_back(message);
        self.received += 1;
    }

    fn complain(&self, message: String) {
        let _ = self.shared.events.send(Event::Error { worker: Some(1), message });
    }
}

/// Tells an answer to whoever asked, who may have gone.
fn answer(ticket: Option<oneshot::Sender<Answer>>, answer: Answer) {
    if let Some(ticket) = ticket {
        let _ = ticket.send(answer);
    }
}
