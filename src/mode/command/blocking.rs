//! The same for programs without a runtime: each call waits on its thread.

use std::{
    fmt,
    io::{self, PipeReader, PipeWriter},
    os::fd::OwnedFd,
    time::Duration,
};

use tokio::runtime::Runtime;

use super::{Child, ChildOutput, ChildStdin, Command, Fork, Output};
use crate::{
    Error,
    message::{Message, SendError},
    outcome::{Answer, Outcome},
    process::runtime,
    signal::Signal,
};

impl Command {
    /// As [`Command::spawn`].
    ///
    /// # Errors
    /// As [`Command::spawn`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn spawn_blocking(&mut self) -> Result<BlockingChild, Error> {
        let runtime = runtime()?;
        let mut child = runtime.block_on(self.spawn())?;
        let [stdin, stdout, stderr] = ends(&runtime, &mut child.stdin, &mut child.stdout, &mut child.stderr)?;
        Ok(BlockingChild {
            stdin: stdin.map(Into::into),
            stdout: stdout.map(Into::into),
            stderr: stderr.map(Into::into),
            child,
            runtime,
        })
    }

    /// As [`Command::output`].
    ///
    /// # Errors
    /// As [`Command::output`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn output_blocking(&mut self) -> Result<Output, Error> {
        runtime()?.block_on(self.output())
    }

    /// As [`Command::status`].
    ///
    /// # Errors
    /// As [`Command::status`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn status_blocking(&mut self) -> Result<Outcome, Error> {
        runtime()?.block_on(self.status())
    }

    /// As [`Command::fork`].
    ///
    /// # Errors
    /// As [`Command::fork`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn fork_blocking(&mut self) -> Result<BlockingFork, Error> {
        let runtime = runtime()?;
        let mut fork = runtime.block_on(async {
            let fork = self.fork().await?;
            // whoever moves its messages finds out that its socket takes some
            tokio::task::yield_now().await;
            Ok::<_, Error>(fork)
        })?;
        let [stdin, stdout, stderr] = ends(&runtime, &mut fork.stdin, &mut fork.stdout, &mut fork.stderr)?;
        Ok(BlockingFork {
            stdin: stdin.map(Into::into),
            stdout: stdout.map(Into::into),
            stderr: stderr.map(Into::into),
            fork,
            runtime,
        })
    }
}

/// Our ends of a guest's pipes, for a thread that waits.
fn ends(
    runtime: &Runtime,
    stdin: &mut Option<ChildStdin>,
    stdout: &mut Option<ChildOutput>,
    stderr: &mut Option<ChildOutput>,
) -> Result<[Option<OwnedFd>; 3], Error> {
    let _inside = runtime.enter();
    let mut ends = || -> io::Result<_> {
        Ok([
            stdin.take().map(ChildStdin::into_blocking).transpose()?,
            stdout.take().map(ChildOutput::into_blocking).transpose()?,
            stderr.take().map(ChildOutput::into_blocking).transpose()?,
        ])
    };
    ends().map_err(Error::io("hand over the guest's standard streams"))
}

/// A [`Child`] for programs without a runtime. It is ended when this is dropped.
pub struct BlockingChild {
    /// Its standard input, when that is a pipe. Dropping it is the end of the input.
    pub stdin: Option<PipeWriter>,
    /// Its standard output, when that is a pipe.
    pub stdout: Option<PipeReader>,
    /// Its standard error, when that is a pipe.
    pub stderr: Option<PipeReader>,
    child: Child,
    runtime: Runtime,
}

impl fmt::Debug for BlockingChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.child.fmt(f)
    }
}

impl BlockingChild {
    /// The process that it runs in.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// As [`Child::kill`].
    pub fn kill(&mut self, signal: Signal) -> bool {
        self.child.kill(signal)
    }

    /// Whether its process is still there.
    pub fn is_alive(&mut self) -> bool {
        self.child.is_alive()
    }

    /// Waits until it has ended. Its standard input is closed first, when that is a pipe that is still here. Pipes that
    /// nobody reads fill up, and a guest that writes to them then never ends.
    ///
    /// # Errors
    /// As [`Child::wait`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn wait(&mut self) -> Result<Outcome, Error> {
        drop(self.stdin.take());
        self.runtime.block_on(self.child.wait())
    }

    /// As [`Child::shutdown`].
    ///
    /// # Errors
    /// As [`Child::wait`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn shutdown(&mut self) -> Result<Outcome, Error> {
        drop(self.stdin.take());
        self.runtime.block_on(self.child.shutdown())
    }
}

/// A [`Fork`] for programs without a runtime. It is ended when this is dropped.
///
/// Messages move during calls only. Time limits hold always.
pub struct BlockingFork {
    /// The guest's standard input, when that is a pipe. Dropping it is the end of the input.
    pub stdin: Option<PipeWriter>,
    /// The guest's standard output, when that is a pipe.
    pub stdout: Option<PipeReader>,
    /// The guest's standard error, when that is a pipe.
    pub stderr: Option<PipeReader>,
    fork: Fork,
    runtime: Runtime,
}

impl fmt::Debug for BlockingFork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fork.fmt(f)
    }
}

impl BlockingFork {
    /// The process that the guest runs in.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.fork.id()
    }

    /// As [`Fork::send`].
    ///
    /// # Errors
    /// As [`Fork::send`].
    ///
    /// # Panics
    /// Inside of a tokio runtime.
    pub fn send(&mut self, message: &Message) -> Result<(), SendError> {
        self.runtime.block_on(async {
            let sent = self.fork.send(message);
            // it goes now, and not with the next call
            tokio::task::yield_now().await;
            sent
        })
    }

    /// As [`Fork::request`].
    ///
    /// # Errors
    /// As [`Fork::request`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn request(&mut self, message: &Message) -> Result<Answer, SendError> {
        self.runtime.block_on(self.fork.request(message))
    }

    /// The next message from the guest; none when it has ended and all that it sent was taken.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn recv(&mut self) -> Option<Message> {
        self.runtime.block_on(self.fork.recv())
    }

    /// As [`BlockingFork::recv`], for at most so long.
    ///
    /// # Errors
    /// When there was none in time.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn recv_timeout(&mut self, within: Duration) -> Result<Option<Message>, TimedOut> {
        let received = async { tokio::time::timeout(within, self.fork.recv()).await };
        self.runtime.block_on(received).map_err(|_| TimedOut)
    }

    /// Waits until the mailbox has room for a message, or is closed.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn ready(&mut self) {
        self.runtime.block_on(self.fork.ready());
    }

    /// As [`Fork::disconnect`].
    ///
    /// # Panics
    /// Inside of a tokio runtime.
    pub fn disconnect(&mut self) {
        self.runtime.block_on(async {
            self.fork.disconnect();
            tokio::task::yield_now().await;
        });
    }

    /// As [`Fork::kill`].
    pub fn kill(&mut self, signal: Signal) -> bool {
        self.fork.kill(signal)
    }

    /// As [`Fork::wait`].
    ///
    /// # Errors
    /// As [`Fork::wait`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn wait(&mut self) -> Result<Outcome, Error> {
        self.runtime.block_on(self.fork.wait())
    }

    /// As [`Fork::shutdown`].
    ///
    /// # Errors
    /// As [`Fork::wait`].
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn shutdown(&mut self) -> Result<Outcome, Error> {
        self.runtime.block_on(self.fork.shutdown())
    }
}

/// No message came in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no message came in time")]
pub struct TimedOut;
