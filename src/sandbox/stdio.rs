//! A guest's standard streams: the process's own, or lines that are handed to a sink.

use std::{
    io,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};
use tokio::io::AsyncWrite;
use wasmtime_wasi::{
    cli::{IsTerminal, StdoutStream},
    p2::{OutputStream, Pollable, StreamError, StreamResult},
};

use crate::event::Stream;

/// How much a guest may write at once.
pub(super) const CHUNK: usize = 64 << 10;

/// Nobody reads this process's output any more. A program on its own would be ended by SIGPIPE; so is the guest.
#[derive(Debug, thiserror::Error)]
#[error("broken pipe")]
pub(crate) struct ReaderGone;

/// Takes what a guest prints. It must not block for long: the guest waits meanwhile.
pub(crate) trait OutputSink: Send + Sync {
    /// Takes the next bytes of a stream.
    fn write(&self, stream: Stream, bytes: &[u8]);
}

/// What a guest's standard streams are.
#[derive(Clone)]
pub(crate) enum Stdio {
    /// Those of this process, byte for byte.
    Inherit,
    /// No input; what is printed goes to a sink.
    Sink(Arc<dyn OutputSink>),
    /// This input, and the same.
    Piped(Bytes, Arc<dyn OutputSink>),
}

/// One output stream of a guest.
#[derive(Clone)]
pub(crate) enum Output {
    /// This process's own, unbuffered: an error (a full disk, a closed pipe) reaches the guest's very call.
    Own(Stream),
    /// A sink.
    Sink(Stream, Arc<dyn OutputSink>),
}

impl Output {
    pub(super) fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let stream = match self {
            Self::Sink(stream, sink) => {
                sink.write(*stream, bytes);
                return Ok(());
            }
            Self::Own(stream) => own(*stream),
        };
        while !bytes.is_empty() {
            match rustix::io::write(stream, bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::INTR) => {}
                // somebody we share the terminal or pipe with has made it non-blocking
                Err(Errno::AGAIN) => {
                    rustix::event::poll(&mut [PollFd::new(&stream, PollFlags::OUT)], None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn own(stream: Stream) -> BorrowedFd<'static> {
    match stream {
        Stream::Stdout => rustix::stdio::stdout(),
        Stream::Stderr => rustix::stdio::stderr(),
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        match self {
            Self::Own(stream) => rustix::termios::isatty(own(*stream)),
            Self::Sink(..) => false,
        }
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.write_all(&bytes).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => StreamError::Trap(ReaderGone.into()),
            _ => StreamError::LastOperationFailed(error.into()),
        })
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(CHUNK)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl AsyncWrite for Output {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.write_all(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
