//! A client's stream of bytes: over TCP, or from the router, over a socket pair.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    task::{Context, Poll, ready},
};

use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Calls the same method, whichever it is.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self {
            Stream::Tcp($stream) => $call,
            Stream::Unix($stream) => $call,
        }
    };
}

impl Stream {
    /// A connection that was accepted; it does not wait.
    ///
    /// # Errors
    /// When there is no room to wait for it.
    pub(super) fn tcp(fd: OwnedFd) -> io::Result<Self> {
        TcpStream::from_std(fd.into()).map(Self::Tcp)
    }

    /// One end of a pair; it does not wait.
    ///
    /// # Errors
    /// As [`Stream::tcp`].
    pub(super) fn unix(fd: OwnedFd) -> io::Result<Self> {
        UnixStream::from_std(fd.into()).map(Self::Unix)
    }

    pub(super) fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read_ready(cx))
    }

    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_write_ready(cx))
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        either!(self, stream => stream.readable().await)
    }

    pub(super) fn try_read(&self, to: &mut [u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_read(to))
    }

    pub(super) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_write(bytes))
    }

    pub(super) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_write_vectored(slices))
    }

    /// Writes as soon as something can be written.
    pub(super) fn poll_out(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&Self) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_write_ready(cx))?;
            match write(self) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Notes that there is nothing to read at the moment.
    pub(super) fn is_empty(&self) {
        let would_block = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = either!(self, stream => stream.try_io(Interest::READABLE, would_block));
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, stream => stream.as_fd())
    }
}
