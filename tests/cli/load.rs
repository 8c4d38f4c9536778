//! Clients that keep a port busy, and account for each of their requests.
//!
//! ```ignore
//! let load = Load::start(&server, 8);
//! load.until("it answers", |tally| !tally.answers.is_empty());
//! load.stop().is_unharmed();
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::Pid;
use serde::Deserialize;

use crate::client::{Client, Response, Server};

/// How long something may take that is waited for.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Waits until this holds, which nobody tells of.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}, within {SOON:?}");
        thread::yield_now();
    }
}

/// After how long without an answer a request counts as hung.
const HUNG: Duration = Duration::from_secs(10);

/// For how many answers a client keeps a connection. One that kept it for ever would never come to a worker that was late.
const KEPT_FOR: usize = 100;

/// Who answered, as [`HELLO_HTTP`](guest_artifacts::HELLO_HTTP) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(crate) struct Who {
    pub(crate) worker: u32,
    pub(crate) generation: u32,
    pub(crate) pid: i32,
}

impl Who {
    #[track_caller]
    pub(crate) fn of(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    #[track_caller]
    pub(crate) fn says(response: &Response) -> Self {
        Self::of(&response.text())
    }

    pub(crate) fn is(self, pid: Pid) -> bool {
        self.pid == pid.as_raw_pid()
    }
}

/// Clients that send one request after the other until they are told to stop, and account for each of them.
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    tally: Mutex<Tally>,
    news: Condvar,
}

/// What became of all requests so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How often each body came, with status 200.
    pub(crate) answers: BTreeMap<String, usize>,
    pub(crate) failures: Vec<Failure>,
    pub(crate) hung: usize,
}

/// A request whose connection ended without a whole response, or that had another response than 200.
#[derive(Debug)]
pub(crate) struct Failure {
    client: usize,
    /// The answer before it on the same connection; none when that was a new one.
    after: Option<String>,
    /// Whether some of the response had come.
    pub(crate) begun: bool,
    /// For whoever reads why a test failed.
    _why: String,
}

impl Load {
    /// So many clients, each on a connection that it keeps for some time, if the server lets it.
    pub(crate) fn start(server: &Server, clients: usize) -> Self {
        Self::start_at(server, clients, "/")
    }

    /// As [`Load::start`], for this path.
    pub(crate) fn start_at(server: &Server, clients: usize, path: &'static str) -> Self {
        let (shared, address) = (Arc::<Shared>::default(), server.address);
        let client = |client| {
            let shared = shared.clone();
            thread::spawn(move || shared.ask(client, address, path))
        };
        let clients = (0..clients).map(client).collect();
        Self { shared, clients }
    }

    /// What the clients have seen so far.
    pub(crate) fn tally(&self) -> MutexGuard<'_, Tally> {
        self.shared.tally()
    }

    /// Waits until this holds of what the clients have seen.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, holds: impl Fn(&Tally) -> bool) {
        let (tally, _) = self.shared.news.wait_timeout_while(self.tally(), SOON, |tally| !holds(tally)).unwrap();
        assert!(holds(&tally), "expected within {SOON:?} that {what}: {tally:?}");
    }

    /// Waits until each of these has answered.
    #[track_caller]
    pub(crate) fn until_answered_by(&self, workers: &[Pid]) {
        self.until("each worker answers", |tally| workers.iter().all(|worker| tally.of(|who| who.is(*worker)) > 0));
    }

    /// Waits until the clients have had so many answers more.
    #[track_caller]
    pub(crate) fn until_more(&self, answers: usize) {
        let before = self.tally().total();
        self.until("it goes on", |tally| tally.total() >= before + answers);
    }

    /// Lets the requests under way be answered, and no more begin.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| client.join().expect("a client does not panic"));
        std::mem::take(&mut self.tally())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| drop(client.join()));
    }
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One client. It ends when nobody listens any more.
    fn ask(&self, client: usize, address: SocketAddr, path: &str) {
        let mut kept: Option<(Client, String)> = None;
        let mut answers = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let (mut connection, after) = match kept.take() {
                Some((connection, answer)) => (connection, Some(answer)),
                None => match Client::try_connect(address) {
                    Ok(connection) => (connection, None),
                    Err(_) => return,
                },
            };
            connection.stream.set_read_timeout(Some(HUNG)).unwrap();
            connection.send_get(path);
            let begun = matches!(connection.stream.peek(&mut [0]), Ok(1));
            let response = connection.try_response();
            let mut tally = self.tally();
            match response {
                Ok(response) if response.status == 200 => {
                    *tally.answers.entry(response.text()).or_default() += 1;
                    answers += 1;
                    if response.header("connection") != Some("close") && answers % KEPT_FOR != 0 {
                        kept = Some((connection, response.text()));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => tally.hung += 1,
                failed => tally.failures.push(Failure { client, after, begun, _why: format!("{failed:?}") }),
            }
            drop(tally);
            self.news.notify_all();
        }
    }
}

impl Tally {
    fn total(&self) -> usize {
        self.answers.values().sum()
    }

    /// How many answers came of those workers for whom this holds.
    pub(crate) fn of(&self, holds: impl Fn(Who) -> bool) -> usize {
        self.answers.iter().filter(|(text, _)| holds(Who::of(text))).map(|(_, count)| count).sum()
    }

    /// Nobody has felt anything.
    #[track_caller]
    pub(crate) fn is_unharmed(&self) {
        assert!(self.failures.is_empty() && self.hung == 0 && !self.answers.is_empty(), "{self:?}");
    }

    /// Nobody has felt anything but the clients of one worker, and each of them lost the one request that was there.
    #[track_caller]
    pub(crate) fn is_harmed_by(&self, worker: Pid) {
        let clients: BTreeSet<_> = self.failures.iter().map(|failure| failure.client).collect();
        assert!(clients.len() == self.failures.len() && self.hung == 0, "one each: {self:?}");
        for failure in &self.failures {
            assert!(failure.after.as_ref().is_none_or(|before| Who::of(before).is(worker)), "{failure:?}");
        }
    }
}
