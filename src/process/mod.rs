//! Process workers, seen from the primary: how one is started, spoken with, and how it is gone.
//!
//! A child is this very program, re-executed under another name ([`ARG0`]), with an empty environment, a socket for
//! its standard input and nothing else. Who it is and what to do comes as the first frame, and with it the descriptors
//! that it needs. It dies when the primary does, and a [`Process`] that is dropped is killed and reaped.
//!
//! The primary believes a child nothing: who speaks is known by the socket, lengths are capped before memory is
//! spent, and no descriptor ever comes back.

pub(crate) mod channel;
pub(crate) mod child;
mod filter;
mod jail;
mod keeper;
pub(crate) mod names;
mod page;
mod pidfd;
pub(crate) mod port;
pub(crate) mod wire;

use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream as StdStream, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
    task::{Context, Poll},
    time::Duration,
};

use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncReadExt, Interest},
    net::UnixStream,
    runtime::Runtime,
};

pub use self::jail::Isolation;
pub(crate) use self::{
    jail::{Bounds, Jail, Purpose, THREADS, Wall},
    page::{Board, Page},
    pidfd::{Clock, Signaller},
};
use self::{
    pidfd::Pidfd,
    wire::{Frame, Incoming, Kind, Outgoing, VERSION, WireError},
};
use crate::{
    Error,
    buffer::{BUFFERS_MAX, PARTS_MAX},
    limits::Bytes,
    outcome::End,
    signal::Signal,
};

/// The name under which children run.
const ARG0: &str = "wrun-worker";

/// How large a socket's send buffer should be: a message of the default size in one piece.
const SEND_BUFFER: usize = 1 << 20;

/// How long a child may take to read what does not fit into its socket. It has not met its guest then.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// The most descriptors that come with a hello: a dozen, and buffers. The system lets 253 go with one message.
const FDS_MAX: usize = 12 + BUFFERS_MAX * PARTS_MAX;

/// How much is read from one child before others get their turn.
const READ_TURN: usize = 1 << 20;

/// The first frame to a child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// [`VERSION`]
    pub(crate) version: u32,
    /// The primary's process id.
    pub(crate) parent: i32,
    /// How many descriptors come with it.
    pub(crate) fds: usize,
    /// What the child is to be.
    pub(crate) role: Role,
    /// What it needs for that; the role knows its form.
    pub(crate) config: Box<RawValue>,
}

/// What a child can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// It runs a guest.
    Worker,
    /// It runs a command.
    Command,
    /// It compiles a guest.
    Compiler,
    /// It tries what no guest should be able to do.
    Trial,
    /// It passes requests to workers.
    Router,
}

/// The program that children are made of.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    /// This one.
    Own,
    /// Another, which must be a `wrun` of the same version.
    At(PathBuf),
}

/// Set by [`initialised`]: this program knows what to do when it is started as a child.
static INITIALISED: OnceLock<()> = OnceLock::new();

/// Notes that the program has looked whether it is a child.
pub(crate) fn initialised() {
    let _ = INITIALISED.set(());
}

impl Program {
    /// Whether children made of it will know what they are.
    pub(crate) fn is_prepared(&self) -> bool {
        matches!(self, Self::At(_)) || INITIALISED.get().is_some()
    }
}

/// What a frame may have beyond the longest message: outcomes with their backtraces, lines, access records.
const FRAME_SLACK: u32 = 256 << 10;

/// The longest body of a frame from a child whose messages have at most so many bytes.
pub(crate) fn body_max(message_max: Bytes) -> u32 {
    u32::try_from(message_max.0).unwrap_or(u32::MAX).saturating_add(FRAME_SLACK)
}

/// Lets this process have as many descriptors as its user may: each child takes some.
pub(crate) fn raise_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // without it there is room for fewer children
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// What runs on the thread that asks for it.
///
/// # Errors
/// When the system has no descriptor left.
pub(crate) fn runtime() -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::io("start the runtime"))
}

/// A child process.
#[derive(Debug)]
pub(crate) struct Process {
    child: Pidfd,
    socket: UnixStream,
    /// Nothing more is read: it closed its end, or sent what is no frame.
    cut: bool,
    incoming: Incoming,
    outgoing: Outgoing,
    page: Page,
}

/// What a look at a process found.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Frames came, or bytes went.
    Progress,
    /// It sends what is no frame; nothing more is read.
    Broken(WireError),
    /// It is gone, and all that it sent has been seen.
    Gone(End),
}

impl Process {
    /// Starts a child. Must be called inside of a runtime.
    ///
    /// The descriptors come after that of the page of counters.
    ///
    /// # Errors
    /// When the system has no room for another process.
    pub(crate) fn start(
        program: &Program,
        role: Role,
        config: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        body_max: u32,
    ) -> io::Result<Self> {
        Self::start_by(Pidfd::spawn, program, role, config, fds, body_max)
    }

    /// As [`Process::start`], as a child of the thread that calls: the kernel ends it together with that.
    ///
    /// # Errors
    /// When the system has no room for another process.
    pub(crate) fn start_on_this_thread(program: &Program, role: Role, config: &impl Serialize) -> io::Result<Self> {
        Self::start_by(Pidfd::spawn_here, program, role, config, &[], 1 << 16)
    }

    fn start_by(
        spawn: impl FnOnce(Command) -> io::Result<Pidfd>,
        program: &Program,
        role: Role,
        config: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        body_max: u32,
    ) -> io::Result<Self> {
        let (ours, theirs) = StdStream::pair()?;
        for socket in [&ours, &theirs] {
            // more than the system allows is cut to what it allows
            let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER);
        }
        let page = Page::new()?;
        let path = match program {
            // the very file that runs now, even if another has taken its name meanwhile
            Program::Own => PathBuf::from("/proc/self/exe"),
            Program::At(path) => path.clone(),
        };
        let mut command = Command::new(path);
        command.arg0(ARG0).env_clear().stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        child::reset_ignored_signals(&mut command);
        let child = spawn(command)?;

        let hello = Hello {
            version: VERSION,
            parent: rustix::process::getpid().as_raw_pid(),
            fds: fds.len() + 1,
            role,
            config: serde_json::value::to_raw_value(config).expect("plain data has a JSON form"),
        };
        let mut outgoing = Outgoing::default();
        outgoing.push(Kind::Hello, 0, &serde_json::to_vec(&hello).expect("plain data has a JSON form"));
        let mut all = vec![page.as_fd()];
        all.extend_from_slice(fds);
        // all of it: nobody may look at this child before it has something to say
        ours.set_write_timeout(Some(HELLO_WITHIN))?;
        let sent = send_with(&ours, outgoing.pending(), &all).and_then(|count| {
            outgoing.advance(count);
            (&ours).write_all(outgoing.pending())
        });
        match sent {
            // it is gone already; how, shows when it is looked at
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
            sent => sent?,
        }

        ours.set_nonblocking(true)?;
        Ok(Self {
            child,
            socket: UnixStream::from_std(ours)?,
            cut: false,
            incoming: Incoming::new(body_max),
            outgoing: Outgoing::default(),
            page,
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its counters.
    pub(crate) fn page(&self) -> &Page {
        &self.page
    }

    /// Adds a frame to what is sent with the next [`Process::flush`].
    pub(crate) fn send(&mut self, kind: Kind, id: u64, body: &[u8]) {
        self.outgoing.push(kind, id, body);
    }

    /// As [`Process::send`], with a descriptor.
    pub(crate) fn send_with(&mut self, kind: Kind, id: u64, body: &[u8], fd: OwnedFd) {
        self.outgoing.push_with(kind, id, body, fd);
    }

    /// Writes what can be written without waiting. An error shows when the process is looked at.
    pub(crate) fn flush(&mut self) {
        while let (bytes @ [_, ..], fd) = self.outgoing.next() {
            let written = match fd {
                None => self.socket.try_write(bytes),
                Some(fd) => self.socket.try_io(Interest::WRITABLE, || send_with(&self.socket, bytes, &[fd])),
            };
            match written {
                Ok(count) => self.outgoing.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // a closed socket: the process is gone or going
                Err(_) => {
                    let all = self.outgoing.pending().len();
                    self.outgoing.advance(all);
                }
            }
        }
    }

    /// Ends it now, if it is still there.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
    }

    /// Adds frames to what is sent with the next [`Process::flush`], and empties what they came in.
    pub(crate) fn send_all(&mut self, frames: &mut Outgoing) {
        self.outgoing.append(frames);
    }

    /// How many bytes wait to be written.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.outgoing.pending().len()
    }

    /// What can signal it from elsewhere.
    pub(crate) fn signaller(&self) -> Signaller {
        self.child.signaller()
    }

    /// Sends it a signal; whether it was still there.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        self.child.signal(signal)
    }

    /// Starts its time: the signal after `limit`, and SIGKILL after `grace` more.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub(crate) fn time(&self, limit: Duration, signal: Signal, grace: Duration) -> io::Result<Clock> {
        self.child.time(limit, signal, grace)
    }

    /// How it ended, if it does within this time, for which this waits on its thread.
    ///
    /// # Errors
    /// When the system has no memory left.
    pub(crate) fn ended_within(&mut self, time: Duration) -> io::Result<Option<End>> {
        self.child.ended_within(time)
    }

    /// Hands every frame to `take` until the process is gone; one that is not within this time is killed. How it ended,
    /// and whether it was out of time.
    pub(crate) async fn finish(mut self, within: Option<Duration>, take: impl FnMut(Frame<'_>)) -> (End, bool) {
        let clock = within.map(|within| self.time(within, Signal::KILL, Duration::ZERO)).transpose();
        // without a clock it would not end in time
        let clock = clock.unwrap_or_else(|_| {
            self.kill();
            None
        });
        let end = self.wait(take).await;
        (end, clock.is_some_and(|clock| clock.has_fired()))
    }

    /// Hands every frame to `take` until the process is gone. How it ended. Cancel-safe.
    pub(crate) async fn wait(&mut self, mut take: impl FnMut(Frame<'_>)) -> End {
        self.flush();
        poll_fn(|cx| {
            loop {
                match self.poll(cx, &mut take) {
                    Poll::Ready(Seen::Gone(end)) => return Poll::Ready(end),
                    Poll::Ready(_) => {}
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// Writes what waits, as far as that goes; whether anything went.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while !self.outgoing.pending().is_empty()
            && let Poll::Ready(Ok(())) = self.socket.poll_write_ready(cx)
        {
            let before = self.outgoing.pending().len();
            self.flush();
            progress |= self.outgoing.pending().len() < before;
        }
        progress
    }

    /// Writes what waits, reads nothing, and sees whether the process has ended. What it has sent is still to be taken
    /// with [`Process::poll`].
    pub(crate) fn poll_unread(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_write(cx);
        self.child.poll_end(cx).map(drop)
    }

    /// Hands every frame that has come to `take`, writes what waits, and sees whether the process is gone. It is not
    /// gone before all that it sent has been taken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, mut take: impl FnMut(Frame<'_>)) -> Poll<Seen> {
        let mut progress = self.poll_write(cx);
        let mut turn = READ_TURN;
        while !self.cut {
            if turn == 0 {
                cx.waker().wake_by_ref();
                return Poll::Ready(Seen::Progress);
            }
            // unlike a bare read it knows a short one for the last, which spares the call that would say so
            let read = std::pin::pin!(self.socket.read_buf(self.incoming.space())).poll(cx);
            match read {
                Poll::Pending => break,
                Poll::Ready(Err(_) | Ok(0)) => self.cut = true,
                Poll::Ready(Ok(count)) => {
                    turn = turn.saturating_sub(count);
                    progress = true;
                    loop {
                        match self.incoming.next() {
                            Ok(Some(frame)) => take(frame),
                            Ok(None) => break,
                            Err(error) => {
                                self.cut = true;
                                return Poll::Ready(Seen::Broken(error));
                            }
                        }
                    }
                }
            }
        }
        if progress {
            return Poll::Ready(Seen::Progress);
        }
        if !self.cut {
            // its death closes the socket, which wakes us; only then is there an end to wait for
            return Poll::Pending;
        }
        // one that is exiting does not feel this any more; one that only closed its end, or lies, has nothing to live for
        self.kill();
        self.child.poll_end(cx).map(Seen::Gone)
    }
}

/// Sends the first bytes, and descriptors with them.
fn send_with(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    // an empty socket takes this much at once; the descriptors go with the first byte
    let bytes = &bytes[..bytes.len().min(1024)];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more descriptors than a hello can carry"));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}
