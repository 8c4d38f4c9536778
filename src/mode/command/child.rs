//! A guest in a process of its own, with its standard streams.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use serde::{Serialize, Serializer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::unix::pipe,
};

use super::launch::Worker;
use crate::{
    Error,
    event::Data,
    limits::Bytes,
    outcome::{End, LimitKind, Outcome},
    signal::Signal,
};

/// A guest that was started. It is ended when this is dropped.
#[derive(Debug)]
pub struct Child {
    /// Its standard input, when that is a pipe. Dropping it is the end of the input.
    pub stdin: Option<ChildStdin>,
    /// Its standard output, when that is a pipe.
    pub stdout: Option<ChildOutput>,
    /// Its standard error, when that is a pipe.
    pub stderr: Option<ChildOutput>,
    pub(super) worker: Worker,
    kill_signal: Signal,
    grace: Duration,
}

/// The end of a pipe that leads to a guest's standard input.
#[derive(Debug)]
pub struct ChildStdin(pipe::Sender);

/// The end of a pipe that comes from a guest's standard output or error. What the guest wrote before it ended, in whatever
/// way, can be read to the last byte.
#[derive(Debug)]
pub struct ChildOutput(pipe::Receiver);

/// How a guest ended, and what it printed.
///
/// As JSON: `{"stdout":"…","stderr":"…","outcome":{…}}`; what is not UTF-8 is `{"base64":"…"}` instead of a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Output {
    /// What it wrote to its standard output.
    #[serde(serialize_with = "as_data")]
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    #[serde(serialize_with = "as_data")]
    pub stderr: Vec<u8>,
    /// How it ended.
    pub outcome: Outcome,
}

fn as_data<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    Data(bytes.into()).serialize(serializer)
}

/// Our ends of a guest's pipes.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) stdin: Option<ChildStdin>,
    pub(super) stdout: Option<ChildOutput>,
    pub(super) stderr: Option<ChildOutput>,
}

impl Ends {
    /// Lets them be used by this runtime.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn of([stdin, stdout, stderr]: super::Pipes) -> Result<Self, Error> {
        let output = |fd: Option<OwnedFd>| fd.map(|fd| pipe::Receiver::from_owned_fd(nonblocking(fd)?)).transpose();
        let made = || -> io::Result<Self> {
            Ok(Self {
                stdin: stdin.map(|fd| pipe::Sender::from_owned_fd(nonblocking(fd)?)).transpose()?.map(ChildStdin),
                stdout: output(stdout)?.map(ChildOutput),
                stderr: output(stderr)?.map(ChildOutput),
            })
        };
        made().map_err(Error::io("watch the guest's standard streams"))
    }
}

/// Only this end of the pipe: the guest's waits as it should.
fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

impl Child {
    pub(super) fn new(worker: Worker, ends: Ends, kill_signal: Signal, grace: Duration) -> Self {
        let Ends { stdin, stdout, stderr } = ends;
        Self { stdin, stdout, stderr, worker, kill_signal, grace }
    }

    /// The process that it runs in.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.worker.process.pid()
    }

    /// Sends its process a signal; whether it was still there. The guest does not see signals: what would end a process,
    /// ends it.
    pub fn kill(&mut self, signal: Signal) -> bool {
        self.worker.kill(signal)
    }

    /// Whether its process is still there.
    pub fn is_alive(&mut self) -> bool {
        self.worker.is_alive()
    }

    /// Waits until it has ended. Its standard input is closed first, when that is a pipe that is still here.
    ///
    /// Cancel-safe, but for the closed input; when it is asked again, it answers the same.
    ///
    /// # Errors
    /// When the guest never ran: its imports are not offered, a wall is missing.
    pub async fn wait(&mut self) -> Result<Outcome, Error> {
        drop(self.stdin.take());
        self.worker.wait().await
    }

    /// Asks it to end: closes its standard input, when that is a pipe that is still here, waits for the grace time, and
    /// sends it the kill signal, and SIGKILL when that does not end it.
    ///
    /// Cancel-safe: when it is called again, the grace time begins anew.
    ///
    /// # Errors
    /// As [`Child::wait`].
    pub async fn shutdown(&mut self) -> Result<Outcome, Error> {
        drop(self.stdin.take());
        self.worker.voluntary = true;
        self.worker.end(self.grace, self.kill_signal).await
    }

    /// Waits until it has ended, and collects what it writes to its pipes, at most [`OUTPUT_MAX`](super::OUTPUT_MAX) of
    /// each. Its standard input is closed first, when that is a pipe that is still here. A guest that writes more is ended;
    /// what was collected is kept.
    ///
    /// Not cancel-safe: what was collected is lost, and the guest with it.
    ///
    /// # Errors
    /// As [`Child::wait`].
    pub async fn wait_with_output(self) -> Result<Output, Error> {
        self.collect(super::OUTPUT_MAX).await
    }

    /// As [`Child::wait_with_output`], with another bound.
    pub(super) async fn collect(mut self, max: Bytes) -> Result<Output, Error> {
        drop(self.stdin.take());
        let (mut stdout, mut stderr) = (vec![], vec![]);
        let (mut out, mut err) = (self.stdout.take(), self.stderr.take());
        let both = async {
            tokio::try_join!(read_up_to(out.as_mut(), &mut stdout, max), read_up_to(err.as_mut(), &mut stderr, max))
        };
        if let Err(TooMuch) = both.await {
            self.worker.kill(self.kill_signal);
            // what its other stream still has, now that it writes no more
            let outcome = self.worker.end(self.grace, Signal::KILL).await?;
            let _ = read_up_to(out.as_mut(), &mut stdout, max).await;
            let _ = read_up_to(err.as_mut(), &mut stderr, max).await;
            let end = End::Limit { limit: LimitKind::Output, allowed: max.to_string() };
            return Ok(Output { stdout, stderr, outcome: Outcome { end, voluntary: false, ..outcome } });
        }
        Ok(Output { stdout, stderr, outcome: self.wait().await? })
    }
}

/// There is more than is collected.
struct TooMuch;

/// Reads to the end, or until there is more than `max`.
async fn read_up_to(from: Option<&mut ChildOutput>, to: &mut Vec<u8>, max: Bytes) -> Result<(), TooMuch> {
    let Some(from) = from else { return Ok(()) };
    while to.len() < max.as_usize() {
        let room = max.as_usize() - to.len();
        // an error is the end of what can be read
        if !matches!(from.take(room as u64).read_buf(to).await, Ok(1..)) {
            return Ok(());
        }
    }
    match from.read_u8().await {
        Ok(_) => Err(TooMuch),
        Err(_) => Ok(()),
    }
}

impl ChildStdin {
    /// As something that can be written to on a thread that waits.
    pub(super) fn into_blocking(self) -> io::Result<OwnedFd> {
        self.0.into_blocking_fd()
    }
}

impl ChildOutput {
    /// As something that can be read from on a thread that waits.
    pub(super) fn into_blocking(self) -> io::Result<OwnedFd> {
        self.0.into_blocking_fd()
    }
}

impl AsFd for ChildStdin {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for ChildOutput {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsyncWrite for ChildStdin {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl AsyncRead for ChildOutput {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, bytes)
    }
}
