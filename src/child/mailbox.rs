//! A guest's mailbox in a process of its own: frames from the primary, read when the guest asks for them and not before,
//! so that a guest that is slow makes its parent wait; and frames to it, written in batches.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::RecvFlags,
};

use super::pulse::Pulse;
use crate::{
    buffer::Buffer,
    message::Message,
    process::{
        child::{Out, receive_more},
        wire::{Incoming, Kind},
    },
    sandbox::{Buffers, Full, Mailbox, Received},
};

/// Messages of a guest that may wait to be written, in bytes.
const WAITING_MAX: usize = 8 << 20;

/// Bytes of a handler's answers that may wait to be written before it gets its next message.
const ANSWERS_MAX: usize = 4 << 20;

/// How many bytes are received at once.
const RECEIVE: usize = 64 << 10;

/// Bytes of either that are worth a write of their own.
const BATCH: usize = 64 << 10;

/// Adds a guest's message to what is written to the primary, if there is room. How much waits then.
///
/// # Errors
/// When there is none.
pub(super) fn post(out: &Out, message: &[u8]) -> Result<usize, Full> {
    if out.waiting_bytes() > WAITING_MAX {
        return Err(Full);
    }
    Ok(out.push(Kind::Message, 0, message))
}

/// The mailbox of a guest that has its process for itself.
pub(super) struct Line {
    out: Arc<Out>,
    pulse: Pulse,
    /// Whether other things than the guest wait for this thread.
    shares_thread: bool,
    /// Whether another message lies ready.
    has_more: Arc<AtomicBool>,
    inbox: Arc<Mutex<Inbox>>,
}

/// What came and was not asked for yet.
struct Inbox {
    out: Arc<Out>,
    socket: UnixStream,
    incoming: Incoming,
    /// Where bytes come in. To make room for more of them in place would cost more than to copy the few that most messages
    /// have.
    received: Box<[u8]>,
    /// Those of buffers whose frames are yet to be taken.
    fds: VecDeque<OwnedFd>,
    /// Those of a buffer of which not all have come.
    parts: Vec<OwnedFd>,
    buffers: Arc<Buffers>,
    /// The primary has disconnected.
    closed: bool,
    has_more: Arc<AtomicBool>,
}

impl Line {
    pub(super) fn new(
        out: Arc<Out>,
        (socket, incoming, fds): (UnixStream, Incoming, VecDeque<OwnedFd>),
        pulse: Pulse,
        shares_thread: bool,
        buffers: Arc<Buffers>,
    ) -> Self {
        let has_more = Arc::<AtomicBool>::default();
        let has = has_more.clone();
        let received = vec![0; RECEIVE].into();
        let inbox = Inbox {
            out: out.clone(),
            socket,
            incoming,
            received,
            fds,
            parts: vec![],
            buffers,
            closed: false,
            has_more: has,
        };
        Self { out, pulse, shares_thread, has_more, inbox: Arc::new(Mutex::new(inbox)) }
    }

    /// Says something to the primary, with what follows until the next message is asked for.
    pub(super) fn say(&self, kind: Kind, id: u64, body: &[u8]) {
        if self.out.push(kind, id, body) > BATCH {
            // the rest goes when there is room
            let _ = self.out.flush();
        }
    }

    /// Says something to the primary now, or a moment later when there is more to come.
    pub(super) fn say_soon(&self, kind: Kind, id: u64, body: &[u8], more_to_come: bool) {
        let waiting = self.out.push(kind, id, body);
        self.flush_soon(waiting, more_to_come);
    }

    fn flush_soon(&self, waiting: usize, more_to_come: bool) {
        if (more_to_come && waiting < BATCH) || !self.out.flush().unwrap_or(true) {
            self.pulse.touch();
        }
    }

    /// Says something without a body to the primary at once.
    pub(super) fn say_now(&self, kind: Kind) {
        self.out.push(kind, 0, b"");
        // what does not go now goes later
        let _ = self.out.flush();
    }

    /// Sends a message of the guest.
    ///
    /// # Errors
    /// When there is no room.
    pub(super) fn post(&self, message: &[u8]) -> Result<(), Full> {
        let waiting = post(&self.out, message)?;
        // in the midst of many, several go at once
        self.flush_soon(waiting, self.has_more.load(Ordering::Relaxed));
        Ok(())
    }

    /// Waits until the primary has taken most of what was said: who is not listened to does not go on.
    pub(super) fn make_room(&self) {
        if self.out.waiting_bytes() > ANSWERS_MAX {
            self.out.finish();
        }
    }

    /// The next message, for at most so long. What was said lies no longer than a moment, whatever the guest does with it.
    pub(super) async fn next(&self, within: Option<Duration>) -> Received {
        let received = self.wait(within).await;
        if self.out.is_waiting() {
            self.pulse.touch();
        }
        received
    }

    /// The next message, for which this thread waits.
    pub(super) fn receive_here(&self) -> Received {
        lock(&self.inbox).receive(None)
    }

    async fn wait(&self, within: Option<Duration>) -> Received {
        // a time that the clock cannot count to never comes
        let until = within.map(|within| Instant::now().checked_add(within));
        let until = until.flatten();
        if !self.shares_thread {
            return lock(&self.inbox).receive(until);
        }
        let at_once = lock(&self.inbox).receive(Some(Instant::now()));
        if at_once != Received::TimedOut || within == Some(Duration::ZERO) {
            return at_once;
        }
        let inbox = self.inbox.clone();
        tokio::task::spawn_blocking(move || lock(&inbox).receive(until)).await.unwrap_or(Received::Closed)
    }
}

impl Mailbox for Line {
    fn send(&self, message: Message) -> Result<(), Full> {
        self.post(message.as_str().as_bytes())
    }

    fn receive(&self, within: Option<Duration>) -> Pin<Box<dyn Future<Output = Received> + Send + '_>> {
        Box::pin(self.next(within))
    }
}

fn lock(inbox: &Mutex<Inbox>) -> MutexGuard<'_, Inbox> {
    // the guest that panicked the host with it gets no further
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    /// Waits on this thread for the next message, until then. What the guest has sent goes first.
    fn receive(&mut self, until: Option<Instant>) -> Received {
        loop {
            if let Some(received) = self.take() {
                return received;
            }
            // both directions may be full: whoever waits for one of them alone may wait for ever
            let all_written = self.out.flush().unwrap_or(true);
            // a wake-up by a plain read is cheaper than one by a poll, and often on the core that the primary has left
            let may_wait = all_written && until.is_none();
            let flags = if may_wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match receive_more(&self.socket, &mut self.received, &mut self.incoming, &mut self.fds, flags) {
                Ok(1..) | Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                // the primary is gone, and with it all that this process is for
                _ => std::process::exit(125),
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Received::TimedOut;
            }
            let events = if all_written { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            // whatever it says, the next round looks itself
            let _ = poll(&mut [PollFd::new(&self.socket, events)], left.as_ref());
        }
    }

    /// What has come whole.
    fn take(&mut self) -> Option<Received> {
        loop {
            if self.closed {
                return Some(Received::Closed);
            }
            match self.incoming.next() {
                // the primary has checked it, and what it sends is believed
                Ok(Some(frame)) if frame.kind == Kind::Task => {
                    let (id, text) = (frame.id, std::str::from_utf8(frame.body).unwrap_or_default().to_owned());
                    self.has_more.store(!self.incoming.is_empty(), Ordering::Relaxed);
                    return Some(Received::Message(id, text));
                }
                Ok(Some(frame)) if frame.kind == Kind::Drain => self.closed = true,
                Ok(Some(frame)) if frame.kind == Kind::Buffer => {
                    let name = String::from_utf8_lossy(frame.body);
                    let part = self.fds.pop_front().ok_or_else(|| io::Error::other("no descriptor came with it"));
                    let part = part.map(|part| self.parts.push(part));
                    if part.is_ok() && frame.id > 1 {
                        // others of it are to come
                        continue;
                    }
                    let parts = std::mem::take(&mut self.parts);
                    match part.and_then(|()| Buffer::received(parts)) {
                        Ok(buffer) => self.buffers.add(&name, buffer),
                        Err(error) => {
                            let text = format!("the buffer `{name}` did not come: {error}");
                            self.out.push(Kind::Warning, 0, text.as_bytes());
                        }
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }
}
