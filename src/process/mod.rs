//! Process workers, seen from the primary: how one is started, spoken with, and how it is gone.
//!
//! A child is this very program, re-executed under another name ([`ARG0`]), with an empty environment, a socket for
//! its standard input and nothing else. Who it is and what to do comes as the first frame, and with it the descriptors
//! that it needs. It dies when the primary does, and a [`Process`] that is dropped is killed and reaped.
//!
//! The primary believes a child nothing: who speaks is known by the socket, lengths are capped before memory is
//! spent, and no descriptor ever comes back.

pub(crate) mod child;
mod filter;
mod jail;
pub(crate) mod names;
mod page;
pub(crate) mod port;
pub(crate) mod wire;

use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    os::{
        fd::BorrowedFd,
        unix::{net::UnixStream as StdStream, process::ExitStatusExt},
    },
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::OnceLock,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt},
    process::{Pid, PidfdFlags, Signal, WaitOptions},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{io::AsyncReadExt, net::UnixStream, process::Child, runtime::Runtime};

pub use self::jail::Isolation;
use self::wire::{Frame, Incoming, Kind, Outgoing, VERSION, WireError};
pub(crate) use self::{
    jail::{Bounds, Jail, Purpose, THREADS, Wall},
    page::{Board, Page},
};
use crate::{Error, outcome::End};

/// The name under which children run.
const ARG0: &str = "wrun-worker";

/// How large a socket's send buffer should be: a message of the default size in one piece.
const SEND_BUFFER: usize = 1 << 20;

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

/// What runs on the thread that asks for it, as must all that makes children: they die with the thread that made them.
///
/// # Errors
/// When the system has no descriptor left.
pub(crate) fn runtime() -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::io("start the runtime"))
}

/// A child process.
pub(crate) struct Process {
    pid: u32,
    child: Child,
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
    /// Starts a child. Must be called inside of a runtime on a thread that lives as long as the child is wanted: the
    /// kernel ends it together with the thread that made it.
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
        let child = tokio::process::Command::new(path)
            .arg0(ARG0)
            .env_clear()
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let pid = child.id().expect("not waited for yet");

        let hello = Hello {
            version: VERSION,
            parent: rustix::process::getpid().as_raw_pid(),
            fds: fds.len() + 1,
            role,
            config: serde_json::value::to_raw_value(config).expect("plain data has a JSON form"),
        };
        let mut outgoing = Outgoing::default();
        outgoing.push(Kind::Hello, 0, &serde_json::to_vec(&hello).expect("plain data has a JSON form"));
        let mut all = vec![std::os::fd::AsFd::as_fd(&page)];
        all.extend_from_slice(fds);
        match send_with(&ours, outgoing.pending(), &all) {
            Ok(count) => outgoing.advance(count),
            // it is gone already; how, shows when it is looked at
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
            Err(error) => return Err(error),
        }

        ours.set_nonblocking(true)?;
        Ok(Self {
            pid,
            child,
            socket: UnixStream::from_std(ours)?,
            cut: false,
            incoming: Incoming::new(body_max),
            outgoing,
            page,
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Its counters.
    pub(crate) fn page(&self) -> &Page {
        &self.page
    }

    /// Adds a frame to what is sent with the next [`Process::flush`].
    pub(crate) fn send(&mut self, kind: Kind, id: u64, body: &[u8]) {
        self.outgoing.push(kind, id, body);
    }

    /// Writes what can be written without waiting. An error shows when the process is looked at.
    pub(crate) fn flush(&mut self) {
        while !self.outgoing.pending().is_empty() {
            match self.socket.try_write(self.outgoing.pending()) {
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

    /// Ends it now.
    pub(crate) fn kill(&mut self) {
        // fails when it is dead already
        let _ = self.child.start_kill();
    }

    /// Lets go of it without ending it. Our end of its socket stays open.
    pub(crate) fn into_orphan(self) -> Orphan {
        let pid = Pid::from_raw(self.pid.cast_signed()).expect("a process has a number");
        std::mem::forget(self);
        Orphan(pid)
    }

    /// Hands every frame to `take` until the process is gone; one that is not within this time is killed. How it ended,
    /// and whether it was out of time.
    pub(crate) async fn finish(mut self, within: Option<Duration>, mut take: impl FnMut(Frame<'_>)) -> (End, bool) {
        self.flush();
        let mut deadline = std::pin::pin!(within.map(tokio::time::sleep));
        let mut out_of_time = false;
        let end = poll_fn(|cx| {
            if let Some(deadline) = deadline.as_mut().as_pin_mut()
                && !out_of_time
                && deadline.poll(cx).is_ready()
            {
                out_of_time = true;
                self.kill();
            }
            loop {
                match self.poll(cx, &mut take) {
                    Poll::Ready(Seen::Gone(end)) => return Poll::Ready(end),
                    Poll::Ready(_) => {}
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
        (end, out_of_time)
    }

    /// Hands every frame that has come to `take`, writes what waits, and sees whether the process is gone. It is not
    /// gone before all that it sent has been taken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, mut take: impl FnMut(Frame<'_>)) -> Poll<Seen> {
        let mut progress = false;
        if !self.outgoing.pending().is_empty() {
            while let Poll::Ready(Ok(())) = self.socket.poll_write_ready(cx) {
                let before = self.outgoing.pending().len();
                self.flush();
                progress |= self.outgoing.pending().len() < before;
                if self.outgoing.pending().is_empty() {
                    break;
                }
            }
        }
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
        let status = ready!(std::pin::pin!(self.child.wait()).poll(cx));
        let signal = || status.as_ref().ok().and_then(ExitStatus::signal).unwrap_or(Signal::KILL.as_raw());
        Poll::Ready(Seen::Gone(match status.as_ref().ok().and_then(ExitStatus::code) {
            Some(code) => End::Exited { code },
            None => End::Killed { signal: signal() },
        }))
    }
}

/// A child whose thread is gone, as seen by the rest of its process: all that is left of it is its end.
pub(crate) struct Orphan(Pid);

impl Orphan {
    /// How it ended, if it does within this time. It is killed otherwise.
    ///
    /// # Errors
    /// When the system has no descriptor left to wait with.
    pub(crate) fn ended_within(self, time: Duration) -> io::Result<Option<End>> {
        let ends = rustix::process::pidfd_open(self.0, PidfdFlags::empty())?;
        let time = Timespec::try_from(time).ok();
        let ended = poll(&mut [PollFd::new(&ends, PollFlags::IN)], time.as_ref())? == 1;
        // a second time is no harm
        rustix::process::kill_process(self.0, Signal::KILL)?;
        let status = rustix::process::waitpid(Some(self.0), WaitOptions::empty())?.map(|(_, status)| status);
        Ok(status.filter(|_| ended).map(|status| match status.exit_status() {
            Some(code) => End::Exited { code },
            None => End::Killed { signal: status.terminating_signal().unwrap_or(Signal::KILL.as_raw()) },
        }))
    }
}

/// Sends the first bytes, and descriptors with them.
fn send_with(socket: &StdStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    // an empty socket takes this much at once; the descriptors go with the first byte
    let bytes = &bytes[..bytes.len().min(1024)];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more descriptors than a hello can carry"));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}
