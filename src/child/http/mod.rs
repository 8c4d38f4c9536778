//! A worker that serves a port: it accepts connections that all workers of the port share, and answers requests by its
//! guest.
//!
//! The primary has no part in it. It hands over the listener, says when to begin (`Open`) and when to end (`Drain`),
//! and hears what went wrong. Everything runs on one thread: connections, requests and guests take turns there, and a
//! guest that computes gives way at every tick of the epoch clock.
//!
//! | file | what |
//! | --- | --- |
//! | `accept` | which worker takes a connection |
//! | [`connection`] | one connection: what bounds it, how it ends |
//! | [`front`] | what is known of all of them, and how they are drained |
//! | [`ticket`] | one request on its way, and what is said instead of an answer |
//! | [`framing`] | whether a client's bytes can be read in one way only |
//! | [`request`] | from a request to its guest, and back |
//! | [`run`] | the same for a command: one run for each request |
//! | [`reply`] | bodies, and a guest that goes on while its response is sent |
//! | [`gate`] | how many requests run and wait at once |
//! | [`client`] | who asks, and which of its headers are believed |

mod accept;
mod client;
mod connection;
mod forward;
pub(crate) mod framing;
mod front;
mod gate;
mod index;
mod reply;
mod request;
pub(super) mod router;
mod run;
mod stream;
mod table;
mod ticket;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    rc::Rc,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::UnixStream};

use self::{
    accept::Listener,
    front::{Door, Front, Line, Seat},
    gate::Gate,
    request::probe,
};
pub(crate) use self::{
    accept::ROUTER,
    index::{Entry, Listing},
    router::{RouterConfig, jail_of_router},
    run::RunConfig,
    table::{At, ROUTE_MAX, Route, Standing},
};
use super::worker::Worker;
use crate::{
    event::WorkerId,
    limits::HttpLimits,
    outcome::{End, Outcome, Stage, Usage},
    process::{
        Board,
        wire::{Incoming, Kind},
    },
};

/// How a worker serves a port.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ListenConfig {
    /// Whether the listener is a channel of a router's, which speaks for the clients.
    pub(crate) is_routed: bool,
    /// What bounds its clients.
    pub(crate) http: HttpLimits,
    /// How many requests may wait for their turn.
    pub(crate) queue: u32,
    /// Whether each request is told of.
    pub(crate) access_log: bool,
    /// Whose forwarded headers are believed.
    pub(crate) trusted: Vec<IpNet>,
    /// A path whose answer says whether the guest is well.
    pub(crate) probe: Option<String>,
    /// After how many requests it asks for a successor.
    pub(crate) requests_max: Option<u64>,
    /// How a command answers requests, when the guest is one.
    pub(crate) command: Option<RunConfig>,
}

/// A port that is to be served.
pub(super) struct Port {
    config: ListenConfig,
    seat: Seat,
    listener: Listener,
}

impl Port {
    pub(super) fn new(
        config: ListenConfig,
        board: OwnedFd,
        listener: OwnedFd,
        (id, generation, count): (WorkerId, u32, u32),
    ) -> io::Result<Self> {
        let listener = if config.is_routed { Listener::Channel(listener) } else { Listener::Tcp(listener) };
        Ok(Self { config, seat: Seat { board: Board::map(board, count)?, id, generation }, listener })
    }
}

/// A worker that serves a port by its guest.
struct Server {
    worker: Rc<Worker>,
    front: Rc<Front>,
    gate: Gate,
    requests_max: Option<u64>,
    command: Option<RunConfig>,
}

/// The worker, until it is drained.
///
/// # Errors
/// When the primary is gone.
pub(super) async fn serve(
    worker: Rc<Worker>,
    port: Port,
    socket: StdStream,
    mut incoming: Incoming,
) -> io::Result<Outcome> {
    if let Err(outcome) = worker.make_first().await {
        return Ok(outcome);
    }
    let Port { config, seat, listener } = port;
    let line = Line {
        out: worker.out.clone(),
        pulse: worker.pulse.clone(),
        page: worker.page.clone(),
        lines: Some(worker.lines.clone()),
    };
    let front = Front::new(config.http, config.access_log, config.trusted, Some(seat), line);
    let gate = Gate::new(worker.concurrency, config.queue, front.ended.clone());
    let server = Rc::new(Server { worker, front, gate, requests_max: config.requests_max, command: config.command });
    if let Some(path) = &config.probe
        && let Err(reason) = probe(&server, path).await
    {
        return Ok(End::Failed { stage: Stage::Start, reason, hint: None }.with(Usage::default()));
    }
    server.worker.say_ready();

    socket.set_nonblocking(true)?;
    let mut socket = UnixStream::from_std(socket)?;
    let mut door = Door::new(server.clone(), listener);
    loop {
        while let Ok(Some(frame)) = incoming.next() {
            match frame.kind {
                Kind::Open => door.open(),
                Kind::Drain => door.close(Duration::from_millis(frame.id)),
                _ => {}
            }
        }
        tokio::select! {
            biased;
            count = socket.read_buf(incoming.space()) => {
                if count? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            () = door.closed() => {
                server.front.flush();
                return Ok(server.worker.drained());
            }
        }
    }
}

impl Server {
    /// Notes that a request is begun.
    fn note(&self, number: u64) {
        if self.requests_max == Some(number) {
            self.front.say(Kind::Recycle, 0, format!("it has begun {number} requests").as_bytes());
        }
    }
}
