//! Which worker takes a connection.
//!
//! All workers of a port wait on one listener, and the kernel wakes whoever it likes: left alone, one of two workers was
//! seen with 65 of 65 connections. So a worker looks at the board when a connection is there, and lets the others go
//! first for some milliseconds when it holds more than its share; nobody waits longer than that for a worker that cannot.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use rustix::{io::Errno, net::SocketFlags};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    connection,
    front::{Front, Serve},
    stream::Stream,
};
use crate::{
    child::worker::DESCRIPTORS_OF_A_PORT,
    process::{channel, wire::Kind},
};

/// How long a worker with more than its share lets others go first, and how often.
const STEP_BACK: Duration = Duration::from_millis(1);
const STEPS_BACK: u32 = 5;

/// How long it waits when there is no descriptor or memory for a connection: the first time, and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Where connections come from.
pub(super) enum Listener {
    /// From clients.
    Tcp(OwnedFd),
    /// From the router, which speaks for its clients.
    Channel(OwnedFd),
}

/// Takes a connection, and says whose it is.
type Accept = fn(&OwnedFd) -> io::Result<(Stream, IpAddr)>;

/// The address of the router, which nobody else can have.
pub(crate) const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// Accepts connections until it is dropped.
pub(super) async fn run(server: Rc<impl Serve>, listener: Listener) {
    let front = server.front().clone();
    let max = front.limits.connections.min(descriptors());
    let (listener, accept) = match listener {
        Listener::Tcp(listener) => (listener, accept as Accept),
        Listener::Channel(channel) => (channel, receive as Accept),
    };
    // SAFETY: an `OwnedFd` is open until it is dropped and is the same all the time; it is dropped with the `AsyncFd`.
    let listener = match unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) } {
        Ok(listener) => listener,
        Err(error) => return tell(&front, &format!("could not wait for connections: {error}")),
    };
    front.note_connections(0);
    let mut pause = PAUSE_FIRST;
    loop {
        while front.held() >= max {
            front.ended.notified().await;
        }
        // the listener is there as long as this is
        let Ok(mut ready) = listener.readable().await else { return };
        for _ in 0..STEPS_BACK {
            if !front.is_above_share() {
                break;
            }
            tokio::time::sleep(STEP_BACK).await;
        }
        match ready.try_io(|listener| accept(listener.get_ref())) {
            // another worker has taken it
            Err(_) => {}
            Ok(Ok((stream, peer))) => {
                pause = PAUSE_FIRST;
                front.note_connections(1);
                tokio::task::spawn_local(connection::run(server.clone(), stream, peer));
            }
            Ok(Err(error)) => match Errno::from_io_error(&error) {
                Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    if pause == PAUSE_FIRST {
                        tell(&front, &format!("accepts no more connections for a while: {error}"));
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                // the client has gone before it was accepted, or the network has
                _ => tokio::task::yield_now().await,
            },
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<(Stream, IpAddr)> {
    let (stream, peer) = rustix::net::acceptfrom_with(listener.as_fd(), SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
    let peer = peer.ok_or_else(|| io::Error::other("a client without an address"))?;
    Ok((Stream::tcp(stream)?, peer.ip().to_canonical()))
}

fn receive(channel: &OwnedFd) -> io::Result<(Stream, IpAddr)> {
    Ok((Stream::unix(channel::receive(channel)?)?, ROUTER))
}

/// For how many connections there are descriptors. The jail has asked for as many as are wanted.
fn descriptors() -> u32 {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.map_or(u32::MAX, |allowed| {
        u32::try_from(allowed.saturating_sub(DESCRIPTORS_OF_A_PORT)).unwrap_or(u32::MAX).max(1)
    })
}

fn tell(front: &Front, message: &str) {
    front.say(Kind::Warning, 0, message.as_bytes());
}
