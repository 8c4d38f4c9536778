//! The router of a folder: it takes the port, and passes each request to the workers of the app that it is for. It runs no
//! guest, and can reach nobody but through the channels that it was given.
//!
//! The primary tells it where requests go ([`Kind::Route`]); from the moment at which it has read that, they go there. It
//! tells the primary when nothing of an older version is in flight any more ([`Kind::Idle`]), and when somebody waits for
//! an app that sleeps ([`Kind::Wake`]).

use std::{
    collections::VecDeque,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{Request, Response, StatusCode, body::Incoming as Body};
use ipnet::IpNet;
use rustix::net::RecvFlags;
use serde::{Deserialize, Serialize};
use tokio::{
    io::Interest,
    net::UnixStream,
    runtime::{LocalOptions, LocalRuntime},
};

use super::{
    accept::Listener,
    connection::Connection,
    forward,
    front::{Door, Front, Line, Serve},
    index,
    reply::Reply,
    table::{Route, Table, Target},
    ticket::{Problem, check, finish},
};
use crate::{
    child::{enter, pulse::Pulse, tell_end},
    limits::{Bytes, HttpLimits},
    outcome::{End, Usage},
    process::{
        Bounds, Isolation, Jail, Page, Purpose,
        child::{Out, Start, receive_more},
        wire::{Incoming, Kind},
    },
    sandbox::{LoadError, cpu_ms},
};

/// What a router is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RouterConfig {
    /// What bounds its clients.
    pub(crate) http: HttpLimits,
    /// Whether each request is told of.
    pub(crate) access_log: bool,
    /// Whose forwarded headers are believed.
    pub(crate) trusted: Vec<IpNet>,
    /// How many requests may wait for one app that is not there yet.
    pub(crate) queue: u32,
    /// How often it gives a sign of life.
    pub(crate) beat: Duration,
    /// What its process may do.
    pub(crate) jail: Jail,
}

/// What its process takes beside its connections: the program, its threads, frames on their way.
const DATA_BASE: Bytes = Bytes::mib(64);

/// What one request takes on both sides, beside its head: what is read and written at once.
const REQUEST_DATA: Bytes = Bytes::kib(256);

/// Descriptors for itself, and one for each app: a thousand apps, and those of versions that come and go.
const DESCRIPTORS: u64 = 4096;

/// The jail of a router with these limits.
pub(crate) fn jail_of_router(isolation: Isolation, http: &HttpLimits) -> Jail {
    let connections = u64::from(http.connections);
    let per_connection = http.head.0.saturating_mul(2).saturating_add(REQUEST_DATA.0);
    Jail {
        required: isolation == Isolation::Jail,
        dirs: vec![],
        ports: vec![],
        purpose: Purpose::Router,
        namespaces: isolation == Isolation::Jail,
        threads: 0,
        bounds: Bounds {
            cpu: None,
            // each request has a connection from its client, and two ends of one to its worker for a moment
            files: DESCRIPTORS + connections.saturating_mul(3),
            file_size: Bytes(0),
            data: Bytes(DATA_BASE.0.saturating_add(per_connection.saturating_mul(connections))),
        },
        without: vec![],
    }
}

/// The router.
pub(super) struct Router {
    front: Rc<Front>,
    table: Table,
}

/// The child. Returns its exit code.
pub(in crate::child) fn main(start: Start) -> i32 {
    tell_end(start, |start, out| match Router::new(start.hello.config.get(), start.fds, out.clone()) {
        Ok((router, runtime, listener)) => {
            let (socket, incoming, following) = (start.socket, start.incoming, start.following);
            out.push(Kind::Ready, 0, b"");
            out.finish();
            runtime.block_on(router.serve(listener, socket, incoming, following)).ok()?;
            let usage = Usage { cpu_ms: Some(cpu_ms()), ..Usage::default() };
            Some(End::Exited { code: 0 }.with(usage))
        }
        Err(error) => Some(error.end().with(Usage::default())),
    })
}

impl Router {
    fn new(config: &str, fds: Vec<OwnedFd>, out: Arc<Out>) -> Result<(Rc<Self>, LocalRuntime, Listener), LoadError> {
        let broken = |reason: String| LoadError::Invalid { reason };
        let config: RouterConfig = serde_json::from_str(config).map_err(|error| broken(error.to_string()))?;
        let [page, listener] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| broken("the router got no port".into()))?;
        let page = Arc::new(Page::map(page).map_err(|error| broken(error.to_string()))?);
        let runtime = enter(&config.jail, &out, || {
            // it makes sockets for itself
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build_local(LocalOptions::default());
            runtime.map_err(|error| broken(error.to_string()))
        })?;
        let pulse = Pulse::start(page.clone(), out.clone(), None, None, config.beat);
        let pulse = pulse.map_err(|error| broken(error.to_string()))?;
        let line = Line { out, pulse, page, lines: None };
        let front = Front::new(config.http, config.access_log, config.trusted, None, line);
        let table = Table::new(front.clone(), config.queue);
        Ok((Rc::new(Self { front, table }), runtime, Listener::Tcp(listener)))
    }

    /// Serves until it is drained.
    ///
    /// # Errors
    /// When the primary is gone.
    async fn serve(
        self: Rc<Self>,
        listener: Listener,
        socket: StdStream,
        mut incoming: Incoming,
        mut fds: VecDeque<OwnedFd>,
    ) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let socket = UnixStream::from_std(socket)?;
        let mut received = vec![0; 64 << 10];
        let mut door = Door::new(self.clone(), listener);
        loop {
            while let Ok(Some(frame)) = incoming.next() {
                match frame.kind {
                    Kind::Drain => door.close(Duration::from_millis(frame.id)),
                    Kind::Route => {
                        let route: Route = serde_json::from_slice(frame.body)?;
                        let number = route.number;
                        // a version that is live comes with its channel, and its number
                        let target = match frame.id {
                            0 => None,
                            serial => {
                                let fd = fds.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
                                Some(Target::new(serial, &route, fd, self.front.clone())?)
                            }
                        };
                        self.table.set(route, target);
                        self.front.say(Kind::Routed, number, b"");
                    }
                    Kind::Unroute => {
                        self.table.remove(&String::from_utf8_lossy(frame.body));
                        self.front.say(Kind::Routed, frame.id, b"");
                    }
                    Kind::Index => {
                        self.table.set_index(serde_json::from_slice(frame.body)?);
                        self.front.say(Kind::Routed, frame.id, b"");
                        // what comes first is the table: whoever came before it would find nothing
                        door.open();
                    }
                    _ => {}
                }
            }
            tokio::select! {
                biased;
                readable = socket.readable() => {
                    readable?;
                    let read = || {
                        let flags = RecvFlags::DONTWAIT;
                        Ok(receive_more(&socket, &mut received, &mut incoming, &mut fds, flags)?)
                    };
                    match socket.try_io(Interest::READABLE, read) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                () = door.closed() => {
                    self.front.flush();
                    return Ok(());
                }
            }
        }
    }
}

impl Serve for Router {
    fn front(&self) -> &Rc<Front> {
        &self.front
    }

    async fn answer(self: Rc<Self>, connection: Rc<Connection>, mut request: Request<Body>) -> Response<Reply> {
        let peer = connection.peer;
        let (_, client, mut ticket) = self.front.take(connection, &mut request, None);
        let id = ticket.id().clone();
        let limits = &self.front.limits;
        let mut response = match check(limits, &request, limits.body.0) {
            Err(problem) => ticket.refuse(problem),
            Ok(()) => match self.table.find(&request) {
                Some((app, prefix)) => {
                    let route = app.route();
                    ticket.belongs_to(&route.app, route.timeout.map(|timeout| timeout + BACKSTOP));
                    // who waits for an app to start does not wait for its answer, but not longer than for that either
                    let wait_until = Instant::now() + route.timeout.unwrap_or(START_WITHIN).min(START_WITHIN);
                    match self.table.live(&app, wait_until).await {
                        Ok(target) => {
                            ticket.goes_to(&target.target().version);
                            let from = forward::From { peer, scheme: client.scheme, prefix };
                            forward::forward(&self.front, target, request, from, ticket).await
                        }
                        Err(problem) => ticket.refuse(problem),
                    }
                }
                None if index::is_asked(&request) => index::answer(&self.table.index(), &request, ticket),
                None => {
                    let message = "nothing is served at this path";
                    ticket.refuse(Problem::new(StatusCode::NOT_FOUND, "not-found", message))
                }
            },
        };
        finish(&self.front, id, &mut response);
        response
    }

    fn is_at_work(&self) -> bool {
        // whatever is, is on a connection
        false
    }
}

/// How long after a request's time the router gives it up when its worker should have.
const BACKSTOP: Duration = Duration::from_secs(2);

/// How long a request waits for an app that is not there yet.
const START_WITHIN: Duration = Duration::from_secs(30);
