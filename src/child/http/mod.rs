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
//! | [`framing`] | whether a client's bytes can be read in one way only |
//! | [`request`] | from a request to its guest, and back |
//! | [`reply`] | bodies, and a guest that goes on while its response is sent |
//! | [`gate`] | how many requests run and wait at once |
//! | [`client`] | who asks, and which of its headers are believed |

mod accept;
mod client;
mod connection;
pub(crate) mod framing;
mod gate;
mod reply;
mod request;

use std::{
    cell::{Cell, RefCell},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    rc::{Rc, Weak},
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::Notify};

use self::{connection::Connection, gate::Gate, request::probe};
use super::worker::Worker;
use crate::{
    event::{AccessRecord, WorkerId},
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
}

/// A port that is to be served.
pub(super) struct Port {
    config: ListenConfig,
    board: Board,
    listener: OwnedFd,
    id: WorkerId,
    generation: u32,
}

impl Port {
    pub(super) fn new(
        config: ListenConfig,
        board: OwnedFd,
        listener: OwnedFd,
        (id, generation, count): (WorkerId, u32, u32),
    ) -> io::Result<Self> {
        Ok(Self { config, board: Board::map(board, count)?, listener, id, generation })
    }
}

/// Access records and messages of guests that may wait to be written.
const OUT_MAX: usize = 4 << 20;

/// How long the head of a request may still take when its worker is to end.
const HEAD_AT_THE_END: Duration = Duration::from_secs(1);

/// What all connections of a worker share.
struct Server {
    worker: Rc<Worker>,
    config: ListenConfig,
    board: Board,
    id: WorkerId,
    generation: u32,
    gate: Gate,
    /// Connections that are there.
    connections: RefCell<Vec<Weak<Connection>>>,
    held: Cell<u32>,
    /// Whether it has been asked to end: responses say so to their clients, and the board hears of it no more.
    draining: Cell<bool>,
    /// Something has ended that a drain may wait for.
    ended: Rc<Notify>,
    requests: Cell<u64>,
    /// What the ids of this worker's requests start with.
    id_prefix: u64,
    /// Access records that were dropped.
    records_dropped: Cell<u64>,
    /// Where bytes of clients are looked at.
    scratch: RefCell<Box<[u8]>>,
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
    let Port { config, board, listener, id, generation } = port;
    let ended = Rc::<Notify>::default();
    let server = Rc::new(Server {
        gate: Gate::new(worker.concurrency, config.queue, ended.clone()),
        id_prefix: random(),
        worker,
        config,
        board,
        id,
        generation,
        connections: RefCell::default(),
        held: Cell::new(0),
        draining: Cell::new(false),
        ended,
        requests: Cell::new(0),
        records_dropped: Cell::new(0),
        scratch: RefCell::new(vec![0; 64 << 10].into()),
    });
    if let Some(path) = &server.config.probe
        && let Err(reason) = probe(&server, path).await
    {
        return Ok(End::Failed { stage: Stage::Start, reason, hint: None }.with(Usage::default()));
    }
    server.worker.say_ready();

    socket.set_nonblocking(true)?;
    let mut socket = UnixStream::from_std(socket)?;
    let mut listener = Some(listener);
    let mut accepting = None;
    let mut drain: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        while let Ok(Some(frame)) = incoming.next() {
            match frame.kind {
                Kind::Open => {
                    if let Some(listener) = listener.take() {
                        accepting = Some(tokio::task::spawn_local(accept::run(server.clone(), listener)));
                        tokio::task::spawn_local(connection::watch(server.clone()));
                    }
                }
                Kind::Drain => {
                    accepting.take().inspect(tokio::task::JoinHandle::abort);
                    drop(listener.take());
                    // a second one may be more impatient
                    drain.take().inspect(tokio::task::JoinHandle::abort);
                    let linger = Duration::from_millis(frame.id);
                    drain = Some(tokio::task::spawn_local(server.clone().drain(linger)));
                }
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
            // a drain has no result but its end
            _ = async { drain.as_mut().expect("looked at").await }, if drain.is_some() => {
                server.flush();
                return Ok(server.worker.drained());
            }
        }
    }
}

impl Server {
    /// Waits until all connections are gone and no guest is at work.
    async fn drain(self: Rc<Self>, linger: Duration) {
        self.draining.set(true);
        self.board.leave(self.id, self.generation);
        if self.held.get() > 0 && !linger.is_zero() {
            // whoever sends a request meanwhile is told with its response that it was the last
            tokio::select! {
                () = tokio::time::sleep(linger) => {}
                () = self.quiet() => {}
            }
        }
        self.to_all(Connection::finish);
        tokio::select! {
            // a head that has begun may still come to its end, but not for as long as heads may take
            () = tokio::time::sleep(HEAD_AT_THE_END) => {}
            () = self.quiet() => return,
        }
        self.to_all(Connection::finish_what_is_asked);
        self.quiet().await;
    }

    fn to_all(&self, tell: impl Fn(&Connection)) {
        for connection in self.connections.borrow().iter().filter_map(Weak::upgrade) {
            tell(&connection);
        }
    }

    async fn quiet(&self) {
        loop {
            let ended = self.ended.notified();
            if self.held.get() == 0 && self.gate.running() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Notes that there is one connection more or less.
    fn note_connections(&self, change: i32) {
        let held = self.held.get().saturating_add_signed(change);
        self.held.set(held);
        if !self.draining.get() {
            self.board.hold(self.id, self.generation, held);
        }
        if held == 0 {
            self.ended.notify_waiters();
        }
    }

    /// Notes that a request is begun, and answers its number.
    fn begin(&self) -> u64 {
        let number = self.requests.get() + 1;
        self.requests.set(number);
        self.worker.page.note_requests(number);
        if self.config.requests_max == Some(number) {
            let reason = format!("it has begun {number} requests");
            self.worker.out.push(Kind::Recycle, 0, reason.as_bytes());
            self.worker.pulse.touch();
        }
        number
    }

    /// Tells of a request.
    fn log(&self, record: &AccessRecord) {
        if self.worker.out.waiting_bytes() > OUT_MAX {
            self.records_dropped.set(self.records_dropped.get() + 1);
            return;
        }
        let record = serde_json::to_vec(record).expect("plain data has a JSON form");
        self.worker.out.push(Kind::Access, self.records_dropped.take(), &record);
        self.worker.pulse.touch();
    }

    /// Tells how a guest ended that should have gone on.
    fn failed(&self, outcome: &Outcome) {
        self.worker.say_ended(0, outcome);
        self.worker.pulse.touch();
    }

    /// Sees that what guests have printed is told.
    fn flush(&self) {
        self.worker.lines.settle();
        if self.worker.out.is_waiting() {
            self.worker.pulse.touch();
        }
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // an id that is not random is still one
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
