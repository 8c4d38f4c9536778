//! What a process that serves clients knows of them, whoever it is that answers.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    net::IpAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper::{
    Request, Response,
    body::Incoming,
    header::{HeaderValue, REFERER, USER_AGENT},
};
use ipnet::IpNet;
use tokio::{sync::Notify, task::JoinHandle};

use super::{
    accept::{self, Listener},
    client::{Client, REQUEST_ID},
    connection::{self, Connection},
    reply::Reply,
    ticket::Ticket,
};
use crate::{
    child::{output::Lines, pulse::Pulse},
    event::{AccessRecord, WorkerId},
    limits::HttpLimits,
    outcome::{Outcome, millis},
    process::{Board, Page, child::Out, wire::Kind},
};

/// Access records and messages of guests that may wait to be written.
const OUT_MAX: usize = 4 << 20;

/// How long the head of a request may still take when the process is to end.
const HEAD_AT_THE_END: Duration = Duration::from_secs(1);

/// Where bytes of clients are looked at.
const SCRATCH: usize = 64 << 10;

/// Whoever answers the requests of a port.
pub(super) trait Serve: 'static {
    /// What it knows of its clients.
    fn front(&self) -> &Rc<Front>;

    /// Answers a request.
    fn answer(
        self: Rc<Self>,
        connection: Rc<Connection>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Reply>>;

    /// Whether anything is at work, which no connection may wait for.
    fn is_at_work(&self) -> bool;
}

/// What all connections of a process share.
pub(super) struct Front {
    pub(super) limits: HttpLimits,
    access_log: bool,
    /// Whose forwarded headers are believed.
    trusted: Vec<IpNet>,
    /// Where it tells the other workers of its port how many connections it holds; none when it is alone.
    seat: Option<Seat>,
    out: Arc<Out>,
    pulse: Pulse,
    page: Arc<Page>,
    lines: Option<Arc<Lines>>,
    /// Connections that are there.
    pub(super) connections: RefCell<Vec<Weak<Connection>>>,
    held: Cell<u32>,
    /// Whether it has been asked to end: responses say so to their clients, and the board hears of it no more.
    draining: Cell<bool>,
    /// Something has ended that a drain may wait for.
    pub(super) ended: Rc<Notify>,
    requests: Cell<u64>,
    /// What the ids of this process's requests start with.
    id_prefix: u64,
    /// Access records that were dropped.
    records_dropped: Cell<u64>,
    pub(super) scratch: RefCell<Box<[u8]>>,
}

/// A worker's place on the board of its port.
pub(super) struct Seat {
    pub(super) board: Board,
    pub(super) id: WorkerId,
    pub(super) generation: u32,
}

/// By what a process speaks to its primary.
pub(super) struct Line {
    pub(super) out: Arc<Out>,
    pub(super) pulse: Pulse,
    pub(super) page: Arc<Page>,
    /// What its guests print.
    pub(super) lines: Option<Arc<Lines>>,
}

impl Front {
    pub(super) fn new(
        limits: HttpLimits,
        access_log: bool,
        trusted: Vec<IpNet>,
        seat: Option<Seat>,
        line: Line,
    ) -> Rc<Self> {
        let Line { out, pulse, page, lines } = line;
        Rc::new(Self {
            limits,
            access_log,
            trusted,
            seat,
            out,
            pulse,
            page,
            lines,
            connections: RefCell::default(),
            held: Cell::new(0),
            draining: Cell::new(false),
            ended: Rc::default(),
            requests: Cell::new(0),
            id_prefix: random(),
            records_dropped: Cell::new(0),
            scratch: RefCell::new(vec![0; SCRATCH].into()),
        })
    }

    /// How many connections it holds.
    pub(super) fn held(&self) -> u32 {
        self.held.get()
    }

    /// Whether it holds more than its share of the connections of its port.
    pub(super) fn is_above_share(&self) -> bool {
        self.seat.as_ref().is_some_and(|seat| seat.board.is_above_share(self.held.get()))
    }

    /// Notes that there is one connection more or less.
    pub(super) fn note_connections(&self, change: i32) {
        let held = self.held.get().saturating_add_signed(change);
        self.held.set(held);
        if !self.draining.get()
            && let Some(Seat { board, id, generation }) = &self.seat
        {
            board.hold(*id, *generation, held);
        }
        if held == 0 {
            self.ended.notify_waiters();
        }
    }

    /// Takes a request: its number, who asks, and what keeps its time and tells of its end.
    pub(super) fn take(
        self: &Rc<Self>,
        connection: Rc<Connection>,
        request: &mut Request<Incoming>,
        timeout: Option<Duration>,
    ) -> (u64, Client, Ticket) {
        connection.busy.set(true);
        let number = self.requests.get() + 1;
        self.requests.set(number);
        self.page.note_requests(number);
        let client = Client::of(connection.peer, request.headers_mut(), &self.trusted);
        // one that is there came through a trusted proxy, or it would not be there any more
        let id = if let Some(id) = request.headers().get(&REQUEST_ID) {
            id.clone()
        } else {
            let id = self.id(number);
            request.headers_mut().insert(REQUEST_ID, id.clone());
            id
        };
        let record = self.access_log.then(|| Box::new(record(client, request, &id)));
        (number, client, Ticket::new(self.clone(), connection, id, timeout, record))
    }

    /// The id of a request: unlike any other's.
    pub(super) fn id(&self, number: u64) -> HeaderValue {
        HeaderValue::try_from(format!("{:016x}-{number:x}", self.id_prefix)).expect("hexadecimal digits")
    }

    /// Whether responses tell their clients that they were the last.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Says something to the primary.
    pub(super) fn say(&self, kind: Kind, id: u64, body: &[u8]) {
        self.out.push(kind, id, body);
        self.pulse.touch();
    }

    /// Tells of a request.
    pub(super) fn log(&self, record: &AccessRecord) {
        if self.out.waiting_bytes() > OUT_MAX {
            self.records_dropped.set(self.records_dropped.get() + 1);
            return;
        }
        let record = serde_json::to_vec(record).expect("plain data has a JSON form");
        self.say(Kind::Access, self.records_dropped.take(), &record);
    }

    /// Tells of what was refused before it was a request.
    pub(super) fn log_refused(&self, connection: &Connection, status: u16, reason: String) {
        if self.access_log {
            self.log(&AccessRecord { status, refused: Some(reason), ..nothing_known(connection.peer) });
        }
    }

    /// Tells how a guest ended that should have gone on.
    pub(super) fn failed(&self, outcome: &Outcome) {
        self.say(Kind::TaskEnded, 0, &serde_json::to_vec(outcome).expect("plain data has a JSON form"));
    }

    /// Sees that what guests have printed is told.
    pub(super) fn flush(&self) {
        self.lines.iter().for_each(|lines| lines.settle());
        if self.out.is_waiting() {
            self.pulse.touch();
        }
    }
}

/// Lets connections in, and sees the last of them out.
pub(super) struct Door<S> {
    server: Rc<S>,
    listener: Option<Listener>,
    accepting: Option<JoinHandle<()>>,
    draining: Option<JoinHandle<()>>,
}

impl<S: Serve> Door<S> {
    /// One that is closed yet.
    pub(super) fn new(server: Rc<S>, listener: Listener) -> Self {
        Self { server, listener: Some(listener), accepting: None, draining: None }
    }

    /// Lets connections in, unless it has been opened or closed before.
    pub(super) fn open(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.accepting = Some(tokio::task::spawn_local(accept::run(self.server.clone(), listener)));
            tokio::task::spawn_local(connection::watch(self.server.front().clone()));
        }
    }

    /// Lets nobody in any more. Connections without a request may bring one for so long; a second call may be more
    /// impatient.
    pub(super) fn close(&mut self, linger: Duration) {
        self.accepting.take().inspect(JoinHandle::abort);
        drop(self.listener.take());
        self.draining.take().inspect(JoinHandle::abort);
        self.draining = Some(tokio::task::spawn_local(drain(self.server.clone(), linger)));
    }

    /// Waits until it is closed and all who were in are out. Cancel-safe.
    pub(super) async fn closed(&mut self) {
        match &mut self.draining {
            // it has no result but its end
            Some(draining) => drop(draining.await),
            None => std::future::pending().await,
        }
    }
}

/// Waits until all connections are gone and nothing is at work. Those without a request may bring one for so long.
async fn drain(server: Rc<impl Serve>, linger: Duration) {
    let front = server.front();
    front.draining.set(true);
    if let Some(Seat { board, id, generation }) = &front.seat {
        board.leave(*id, *generation);
    }
    if front.held() > 0 && !linger.is_zero() {
        // whoever sends a request meanwhile is told with its response that it was the last
        tokio::select! {
            () = tokio::time::sleep(linger) => {}
            () = quiet(&*server) => {}
        }
    }
    let to_all = |tell: fn(&Connection)| {
        for connection in front.connections.borrow().iter().filter_map(Weak::upgrade) {
            tell(&connection);
        }
    };
    to_all(Connection::finish);
    tokio::select! {
        // a head that has begun may still come to its end, but not for as long as heads may take
        () = tokio::time::sleep(HEAD_AT_THE_END) => {}
        () = quiet(&*server) => return,
    }
    to_all(Connection::finish_what_is_asked);
    quiet(&*server).await;
}

async fn quiet(server: &impl Serve) {
    let front = server.front();
    loop {
        let ended = front.ended.notified();
        if front.held() == 0 && !server.is_at_work() {
            return;
        }
        ended.await;
    }
}

/// What an access log says of a request, as far as that is known when it comes.
fn record(client: Client, request: &Request<Incoming>, id: &HeaderValue) -> AccessRecord {
    let headers = request.headers();
    let header = |name: &str| headers.get(name).map(|value| short(&String::from_utf8_lossy(value.as_bytes())));
    AccessRecord {
        method: short(request.method().as_str()),
        target: short(&request.uri().to_string()),
        protocol: format!("{:?}", request.version()),
        id: short(&String::from_utf8_lossy(id.as_bytes())),
        traceparent: header("traceparent"),
        referer: header(REFERER.as_str()),
        user_agent: header(USER_AGENT.as_str()),
        ..nothing_known(client.address)
    }
}

/// A client's text, at a length that fits a line.
fn short(text: &str) -> String {
    match text.char_indices().nth(2048) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

fn nothing_known(client: IpAddr) -> AccessRecord {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    AccessRecord {
        time_ms: millis(time),
        client,
        method: "-".into(),
        target: "-".into(),
        protocol: "-".into(),
        status: 0,
        bytes: 0,
        took_us: 0,
        id: "-".into(),
        traceparent: None,
        referer: None,
        user_agent: None,
        refused: None,
        app: None,
        version: None,
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // an id that is not random is still one
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
