//! A pool that serves a port until a signal ends it.

use std::{future::poll_fn, task::Poll};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};

use super::{
    Builder, End, Order,
    pool::{Finish, Stop},
};
use crate::{Error, event::Event, process::runtime, sandbox::Shape, signal::Signals};

/// Says what the guest of a pool is, so that a command can choose what to do with it; none when wrun cannot run it.
///
/// # Errors
/// When the guest cannot be read, or is none.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn shape(builder: &Builder) -> Result<Option<Shape>, Error> {
    runtime()?.block_on(builder.shape())
}

/// Serves a port until SIGINT or SIGTERM. SIGHUP reloads: all workers are replaced by ones of the guest as it is now.
/// Events go to `events`.
///
/// # Errors
/// As [`Builder::start`], or when every worker failed.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn run(builder: Builder, events: impl FnMut(Event) + Send + 'static) -> Result<End, Error> {
    runtime()?.block_on(async {
        let mut signals = Signals::new().map_err(Error::io("listen for signals"))?;
        let mut reload = signal(SignalKind::hangup()).map_err(Error::io("listen for signals"))?;
        let (orders, ordered) = mpsc::unbounded_channel();
        // compiling may take long, and a signal ends it with all the rest
        let server = tokio::select! {
            server = builder.server(ordered, Box::new(events)) => server?,
            signal = poll_fn(|cx| signals.poll(cx)) => return Ok(End::Stopped { signal, killed: true }),
        };
        let mut stopped = None;
        let obey = poll_fn(|cx| {
            while let Poll::Ready(Some(())) = reload.poll_recv(cx) {
                // how it went is an event
                let (told, _) = oneshot::channel();
                let _ = orders.send(Order::Reload(told));
            }
            while let Poll::Ready(signal) = signals.poll(cx) {
                let again = stopped.replace(signal).is_some();
                let _ = orders.send(Order::Stop(if again { Stop::Now } else { Stop::Politely }));
            }
            Poll::<()>::Pending
        });
        let finish = tokio::select! {
            finish = server.run() => finish?,
            () = obey => unreachable!("it goes on for ever"),
        };
        Ok(match stopped {
            Some(signal) => End::Stopped { signal, killed: finish == Finish::Killed },
            None => End::Done,
        })
    })
}
