//! Where requests go: the apps of a folder, each with the version that is live.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    rc::Rc,
    time::{Duration, Instant},
};

use hyper::{Request, StatusCode, header::HOST, http::uri::Authority};
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, net::UnixStream, sync::Notify};

use super::{forward::Lane, front::Front, index::Listing, stream::Stream, ticket::Problem};
use crate::process::{channel, wire::Kind};

/// The longest path that a route may have, in bytes.
pub(crate) const ROUTE_MAX: usize = 255;

/// Where an app is, and how it stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Route {
    /// The number of this change.
    pub(crate) number: u64,
    /// Its name.
    pub(crate) app: String,
    /// Its version, when one is live.
    pub(crate) version: Option<String>,
    /// Which requests are for it.
    pub(crate) at: At,
    /// How long one of them may take.
    pub(crate) timeout: Option<Duration>,
    /// How long a connection to its workers may lie idle that is used again.
    pub(crate) keep: Duration,
    /// What to do with requests.
    pub(crate) standing: Standing,
}

/// Which requests are for an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum At {
    /// Those whose path is this one, or below it. The rest is passed on. `/` has what no other has.
    Path(String),
    /// Those to this host, in lower case and without a port.
    Host(String),
}

/// What becomes of requests for an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Standing {
    /// They go to the version whose channel came with this.
    Live,
    /// They wait for one, and the primary is told that they do.
    Asleep,
    /// They wait for one that is being started.
    Starting,
    /// They are refused: no version works.
    Down,
}

/// An app.
pub(super) struct App {
    state: RefCell<State>,
    changed: Notify,
    waiting: Cell<u32>,
}

struct State {
    route: Rc<Route>,
    target: Option<Rc<Target>>,
    /// Whether the primary was told that somebody waits.
    woken: bool,
}

impl App {
    pub(super) fn route(&self) -> Rc<Route> {
        self.state.borrow().route.clone()
    }
}

/// The workers of one version.
pub(super) struct Target {
    serial: u64,
    pub(super) version: String,
    keep: Duration,
    /// The kind of socket matters to nobody who only waits until it can be written to.
    channel: UnixStream,
    in_flight: Cell<u32>,
    retired: Cell<bool>,
    /// Connections that may be used again, the last one last.
    idle: RefCell<Vec<Lane>>,
    front: Rc<Front>,
}

/// How many connections to the workers of a version lie ready.
const IDLE_MAX: usize = 256;

impl Target {
    /// The workers behind a channel, which does not wait.
    ///
    /// # Errors
    /// When there is no room to wait for it.
    pub(super) fn new(serial: u64, route: &Route, channel: OwnedFd, front: Rc<Front>) -> io::Result<Rc<Self>> {
        let channel = UnixStream::from_std(StdStream::from(channel))?;
        let (version, keep) = (route.version.clone().unwrap_or_default(), route.keep);
        Ok(Rc::new(Self {
            serial,
            version,
            keep,
            channel,
            in_flight: Cell::new(0),
            retired: Cell::new(false),
            idle: RefCell::default(),
            front,
        }))
    }

    /// A connection that its workers will take.
    ///
    /// # Errors
    /// As the system says.
    pub(super) async fn connect(&self) -> io::Result<Stream> {
        loop {
            self.channel.writable().await?;
            match self.channel.try_io(Interest::WRITABLE, || channel::connect(self.as_fd())) {
                Ok(connection) => return Stream::unix(connection),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A connection that lies ready.
    pub(super) fn reuse(&self) -> Option<Lane> {
        let mut idle = self.idle.borrow_mut();
        loop {
            let lane = idle.pop()?;
            if lane.idle_for() >= self.keep {
                // those below have lain for longer
                idle.clear();
                return None;
            }
            if lane.is_ready() {
                return Some(lane);
            }
        }
    }

    /// Keeps a connection that may be used again.
    pub(super) fn keep(&self, lane: Lane) {
        let mut idle = self.idle.borrow_mut();
        if !self.retired.get() && idle.len() < IDLE_MAX {
            idle.push(lane);
        }
    }

    /// Whether another version has taken over.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.get()
    }

    /// There will be no more requests for it.
    fn retire(&self) {
        self.retired.set(true);
        self.idle.borrow_mut().clear();
        self.tell_if_idle();
    }

    fn tell_if_idle(&self) {
        if self.retired.get() && self.in_flight.get() == 0 {
            self.front.say(Kind::Idle, self.serial, b"");
        }
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// A request that is on its way to a version, or its response on the way back.
pub(super) struct InFlight(Rc<Target>);

impl InFlight {
    fn new(target: &Rc<Target>) -> Self {
        target.in_flight.set(target.in_flight.get() + 1);
        Self(target.clone())
    }

    pub(super) fn target(&self) -> &Target {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        self.0.tell_if_idle();
    }
}

/// The table.
pub(super) struct Table {
    front: Rc<Front>,
    queue: u32,
    apps: RefCell<HashMap<String, Rc<App>>>,
    places: RefCell<HashMap<At, Rc<App>>>,
    index: RefCell<Rc<Listing>>,
}

impl Table {
    /// An empty one, in which so many requests may wait for each app.
    pub(super) fn new(front: Rc<Front>, queue: u32) -> Self {
        Self { front, queue, apps: RefCell::default(), places: RefCell::default(), index: RefCell::default() }
    }

    /// Lets requests go to an app as it is from now on.
    pub(super) fn set(&self, route: Route, target: Option<Rc<Target>>) {
        let mut apps = self.apps.borrow_mut();
        let mut places = self.places.borrow_mut();
        let new = || {
            let state = State { route: Rc::new(route.clone()), target: None, woken: false };
            Rc::new(App { state: RefCell::new(state), changed: Notify::new(), waiting: Cell::new(0) })
        };
        let app = apps.entry(route.app.clone()).or_insert_with(new).clone();
        leave(&mut places, &app);
        places.insert(route.at.clone(), app.clone());
        let former = {
            let mut state = app.state.borrow_mut();
            state.route = Rc::new(route);
            state.woken = false;
            std::mem::replace(&mut state.target, target)
        };
        former.inspect(|former| former.retire());
        app.changed.notify_waiters();
    }

    /// An app is no more.
    pub(super) fn remove(&self, name: &str) {
        let Some(app) = self.apps.borrow_mut().remove(name) else { return };
        leave(&mut self.places.borrow_mut(), &app);
        let former = {
            let mut state = app.state.borrow_mut();
            state.route = Rc::new(Route { standing: Standing::Down, ..(*state.route).clone() });
            state.target.take()
        };
        former.inspect(|former| former.retire());
        app.changed.notify_waiters();
    }

    pub(super) fn set_index(&self, listing: Listing) {
        self.index.replace(Rc::new(listing));
    }

    pub(super) fn index(&self) -> Rc<Listing> {
        self.index.borrow().clone()
    }

    /// The app that a request is for, and how much of its path leads there.
    pub(super) fn find<B>(&self, request: &Request<B>) -> Option<(Rc<App>, usize)> {
        let places = self.places.borrow();
        let authority = request.uri().authority().map(Authority::as_str);
        let host = authority.or_else(|| request.headers().get(HOST)?.to_str().ok());
        if let Some(host) = host.map(without_port)
            && let Some(app) = places.get(&At::Host(host.to_ascii_lowercase()))
        {
            return Some((app.clone(), 0));
        }
        let path = request.uri().path();
        prefixes(path).find_map(|prefix| {
            let app = places.get(&At::Path(prefix.into()))?;
            Some((app.clone(), if prefix == "/" { 0 } else { prefix.len() }))
        })
    }

    /// The workers that a request of an app goes to, when there are some.
    ///
    /// # Errors
    /// What to answer when there are none in time.
    pub(super) async fn live(&self, app: &App, until: Instant) -> Result<InFlight, Problem> {
        let unavailable = |message: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not-live", message);
        let mut waits = None;
        loop {
            let changed = app.changed.notified();
            {
                let mut state = app.state.borrow_mut();
                if let Some(target) = &state.target {
                    return Ok(InFlight::new(target));
                }
                let standing = state.route.standing;
                match standing {
                    Standing::Live | Standing::Down => return Err(unavailable("no version of this app works")),
                    Standing::Asleep if !std::mem::replace(&mut state.woken, true) => {
                        self.front.say(Kind::Wake, 0, state.route.app.as_bytes());
                    }
                    Standing::Asleep | Standing::Starting => {}
                }
            }
            if waits.is_none() {
                if app.waiting.get() >= self.queue {
                    return Err(unavailable("as many requests wait for this app as may"));
                }
                waits = Some(Waits::new(&app.waiting));
            }
            if tokio::time::timeout_at(until.into(), changed).await.is_err() {
                return Err(unavailable("this app did not start in time"));
            }
        }
    }
}

/// Takes an app from where it was, unless another one is there now.
fn leave(places: &mut HashMap<At, Rc<App>>, app: &Rc<App>) {
    let at = &app.route().at;
    if places.get(at).is_some_and(|there| Rc::ptr_eq(there, app)) {
        places.remove(at);
    }
}

/// One that waits, or has gone.
struct Waits<'a>(&'a Cell<u32>);

impl<'a> Waits<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A path, and the paths of all that it is below, the longest first; but none that no route can have.
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let slashes = path.bytes().take(ROUTE_MAX + 1).enumerate().filter(|(_, byte)| *byte == b'/').map(|(at, _)| at);
    let slashes: Vec<_> = slashes.collect();
    let whole = (path.len() <= ROUTE_MAX && path != "/").then_some(path);
    let above = slashes.into_iter().rev().map(|at| if at == 0 { "/" } else { &path[..at] });
    whole.into_iter().chain(above)
}

/// A host as clients write it, without a port.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_below_whole_names_only() {
        let of = |path| prefixes(path).collect::<Vec<_>>();
        assert_eq!(of("/a/b/c"), ["/a/b/c", "/a/b", "/a", "/"]);
        assert_eq!(of("/ab"), ["/ab", "/"]);
        assert_eq!(of("/a/"), ["/a/", "/a", "/"]);
        assert_eq!(of("/"), ["/"]);
        assert_eq!(of("*"), ["*"], "of OPTIONS");
        let long = format!("/{}/{}", "x".repeat(ROUTE_MAX - 1), "y".repeat(5000));
        assert_eq!(of(&long), [&long[..ROUTE_MAX], "/"], "no longer than a route");
        let deep = "/".repeat(8 << 10);
        assert!(of(&deep).len() <= ROUTE_MAX + 1);
    }

    #[test]
    fn a_port_is_no_part_of_a_host() {
        for (host, name) in [
            ("a.example", "a.example"),
            ("a.example:8080", "a.example"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("a:b", "a:b"),
        ] {
            assert_eq!(without_port(host), name);
        }
    }
}
