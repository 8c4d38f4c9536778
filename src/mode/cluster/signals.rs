//! The signals that a pool listens to while a command runs it.

use std::{
    io,
    task::{Context, Poll},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Those that end a pool politely.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The next one that comes.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        for (signal, kind) in
            [(&mut self.interrupt, SignalKind::interrupt()), (&mut self.terminate, SignalKind::terminate())]
        {
            if let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                return Poll::Ready(kind.as_raw_value());
            }
        }
        Poll::Pending
    }
}
