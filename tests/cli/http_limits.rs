//! Clients that abuse a port: by how slowly they send and take, how they leave, and how many they are. Each is cut off
//! in time, and nobody else feels it.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use guest_artifacts::{CRASH, ECHO, HELLO_HTTP, SLOW, STREAM, UPLOAD};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit, setrlimit};

use crate::{
    client::{Client, PATIENCE, Response, Server},
    load::{SOON, eventually},
    supervision::{children, event, pid},
    wrun::{Wrun, wrun},
};

/// `wrun cluster` behind any port that is free.
fn cluster(guest: &str, workers: u32, args: &[&str]) -> Wrun {
    wrun(["cluster", guest, "--listen", "0", "-w", &workers.to_string(), "--log-format", "json"]).args(args)
}

/// Starts it with one worker.
#[track_caller]
pub(super) fn serve(guest: &str, args: &[&str]) -> (Server, Worker) {
    let (server, workers) = start(cluster(guest, 1, args), 1);
    (server, workers[0])
}

/// Starts it, and waits until so many workers are online.
#[track_caller]
fn start(wrun: Wrun, workers: u32) -> (Server, Vec<Worker>) {
    let mut server = Server::start(wrun);
    let pids = (0..workers).map(|_| Worker(pid(&event(&mut server, "fork")["pid"]))).collect();
    (0..workers).for_each(|_| drop(event(&mut server, "online")));
    (server, pids)
}

/// The process of a worker, as the system sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Worker(Pid);

impl Worker {
    fn file(self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.0.as_raw_pid())).expect("it is there")
    }

    /// How many files and sockets it has open.
    pub(super) fn open(self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0.as_raw_pid())).expect("it is there").count()
    }

    /// How much memory it has, or has had at most.
    pub(super) fn memory_kib(self, which: &str) -> u64 {
        let status = self.file("status");
        let line = status.lines().find_map(|line| line.strip_prefix(which)).expect("a line");
        line.trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// What it may use of something.
    fn limit(self, which: &str) -> u64 {
        let limits = self.file("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(which)).expect("a line");
        line.split_whitespace().next().expect("the soft limit").parse().expect("a number")
    }

    /// How long it has computed.
    fn computed(self) -> Duration {
        let stat = self.file("stat");
        let fields: Vec<_> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Waits until it has as many files and sockets open as it had.
    #[track_caller]
    pub(super) fn until_open(self, count: usize) {
        eventually(&format!("{self:?} has {count} open"), || self.open() == count);
    }
}

/// A client takes its time.
fn pause(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}

/// For [`Worker::memory_kib`].
pub(super) const NOW: &str = "VmRSS:";
pub(super) const PEAK: &str = "VmHWM:";

pub(super) fn statuses(responses: &[Response]) -> Vec<u16> {
    responses.iter().map(|response| response.status).collect()
}

#[test]
fn a_head_that_takes_too_long_is_answered_408_while_others_are_served() {
    let (server, _) = serve(HELLO_HTTP, &["--header-timeout", "2s"]);
    // the time runs from the first byte, and for each head anew
    let mut client = server.connect();
    for _ in 0..2 {
        pause(2100);
        for piece in ["G", "ET /", " HTTP/1.1\r\nHo", "st: a\r\n\r", "\n"] {
            client.send(piece);
            pause(50);
        }
        assert_eq!(client.response().status, 200);
    }
    let begun = Instant::now();
    client.stream.set_nonblocking(true).unwrap();
    for byte in format!("GET /{}", "x".repeat(1000)).bytes() {
        client.send([byte]);
        assert_eq!(server.get("/").status, 200);
        match client.stream.peek(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => pause(50),
            _ => break,
        }
    }
    client.stream.set_nonblocking(false).unwrap();
    assert_eq!(statuses(&client.responses()), [408]);
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[test]
fn a_head_that_comes_with_the_end_of_another_has_a_time_of_its_own() {
    let (server, _) = serve(HELLO_HTTP, &["--header-timeout", "2s"]);
    let mut client = server.connect();
    let (start, rest) = ("GET / HTTP/1.1\r\n", "Host: a\r\n\r\n");
    client.send(start);
    for _ in 0..10 {
        client.send(format!("{rest}{start}"));
        assert_eq!(client.response().status, 200);
        pause(250);
    }
    assert_eq!(statuses(&client.responses()), [408]);
}

#[test]
fn an_idle_connection_is_closed_and_a_used_one_is_not() {
    let (server, worker) = serve(HELLO_HTTP, &["--idle-timeout", "1s"]);
    let open = worker.open();
    let begun = Instant::now();
    let [mut unused, mut once, mut used] = [(); 3].map(|()| server.connect());
    once.send_get("/");
    assert_eq!(once.response().status, 200);
    for _ in 0..7 {
        used.send_get("/");
        assert_eq!(used.response().status, 200);
        pause(200);
    }
    assert!(unused.is_closed() && once.is_closed());
    assert!(used.is_closed());
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    worker.until_open(open);
}

#[test]
fn empty_lines_keep_no_connection_alive() {
    let (server, _) = serve(HELLO_HTTP, &["--idle-timeout", "500ms", "--header-timeout", "500ms"]);
    for pieces in [["\r\n", "\r\n"], ["\r", "\n"]] {
        let mut client = server.connect();
        let begun = Instant::now();
        for piece in pieces.iter().cycle() {
            if client.stream.write_all(piece.as_bytes()).is_err() {
                break;
            }
            assert!(begun.elapsed() < SOON, "it is still there");
            pause(50);
        }
    }
}

#[test]
fn empty_lines_hold_up_no_stop() {
    let (server, _) = serve(HELLO_HTTP, &["--idle-timeout", "1h", "--grace", "1h"]);
    let mut client = server.connect();
    client.send("\r\n");
    assert_eq!(server.get("/").status, 200);
    server.signal(Signal::TERM);
    let _ = server.running.wait().code(0);
    assert!(client.is_closed());
}

#[test]
fn a_client_that_pauses_within_a_body_is_cut_off_and_its_guest_ends() {
    const BODIES: [(&str, &str); 2] =
        [("Content-Length: 10", "\"12345678\""), ("Transfer-Encoding: chunked", "a\r\n\"12345678\"\r\n0\r\n\r\n")];
    let pauses = |guest, (head, body): (&str, &str)| {
        // one place: whoever is next is served only when the guest is gone
        let (server, _) = serve(guest, &["--concurrency", "1", "--idle-timeout", "1500ms", "--timeout", "0s"]);
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n");
        for sent in [0, body.len() - 1] {
            let mut client = server.connect();
            let begun = Instant::now();
            client.send(format!("{head}{}", &body[..sent]));
            assert!(client.is_closed(), "{:?}", &body[..sent]);
            assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
        }
        // one that goes on in time
        let mut client = server.connect();
        client.send(&head);
        for piece in body.as_bytes().chunks(body.len() / 10) {
            pause(160);
            client.send(piece);
        }
        assert_eq!(client.response().status, 200);
    };
    thread::scope(|scope| {
        for guest in [UPLOAD, ECHO] {
            for body in BODIES {
                scope.spawn(move || pauses(guest, body));
            }
        }
    });
}

#[test]
fn a_body_that_comes_for_ever_is_cut_off_by_the_time_of_its_request() {
    let (server, _) = serve(UPLOAD, &["--concurrency", "1", "--timeout", "1s"]);
    let mut client = server.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    let begun = Instant::now();
    while client.stream.write_all(b"1\r\nx\r\n").is_ok() {
        assert!(begun.elapsed() < SOON, "it is still there");
        pause(50);
    }
    assert_eq!(statuses(&client.responses()), [504]);
    assert_eq!(server.post("/", "1").status, 200);
}

#[test]
fn a_client_that_takes_nothing_is_cut_off_while_others_are_served() {
    let (server, worker) = serve(STREAM, &["--write-timeout", "500ms", "--timeout", "0s"]);
    let open = worker.open();
    // a response without end, and requests without end
    let endless = "GET /?chunks=100000&bytes=65536 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned();
    let many = "GET /?bytes=10000 HTTP/1.1\r\nHost: a\r\n\r\n".repeat(10_000);
    for requests in [endless, many] {
        let mut client = server.connect();
        client.keep_little();
        let begun = Instant::now();
        let mut others = 0;
        let asking = thread::spawn(move || {
            client.send(requests);
            client
        });
        eventually("it is there", || worker.open() > open);
        while worker.open() > open {
            assert_eq!(server.get("/").text(), "a");
            others += 1;
            assert!(begun.elapsed() < SOON, "it is still there");
        }
        assert!(begun.elapsed() >= Duration::from_millis(500) && others > 1, "{others} in {:?}", begun.elapsed());
        let mut client = asking.join().unwrap();
        let error = std::iter::repeat_with(|| client.try_response()).find_map(Result::err).unwrap();
        assert!(matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{error}");
    }
}

#[test]
fn a_client_that_takes_its_response_slowly_gets_all_of_it() {
    let text = format!("\"{}\"", "x".repeat(8 << 20));
    let args = ["--message-max", "9MiB", "--idle-timeout", "200ms", "--header-timeout", "200ms"];
    let (server, _) = serve(ECHO, &args);
    // the handler has long ended, and what the client has begun to ask for next waits for this response
    for next in ["", "POST"] {
        let mut client = server.connect();
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{text}{next}", text.len()));
        let taken = client.take_slowly(text.len(), 64 << 10, Duration::from_millis(20));
        assert!(taken.is_ok() && client.response().body == text.as_bytes(), "{next:?}: {taken:?}");
    }
}

#[test]
fn a_client_that_half_closes_within_a_request_has_asked_for_nothing() {
    let (server, worker) = serve(CRASH, &["--instance", "worker", "--concurrency", "1"]);
    let open = worker.open();
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n";
    for end in 0..head.len() {
        let mut client = server.connect();
        client.send(&head[..end]);
        client.half_close();
        assert!(client.is_closed(), "{:?}", &head[..end]);
    }
    assert_eq!(server.get("/").text(), r#"{"handled":1}"#, "the guest has seen none of it");
    worker.until_open(open);
    // within a body the guest hears of it, and what it makes of that is answered
    let (server, worker) = serve(UPLOAD, &["--concurrency", "1"]);
    for rest in ["Content-Length: 3\r\n\r\nab", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"] {
        let mut client = server.connect();
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{rest}"));
        client.half_close();
        let responses = client.responses();
        assert!(matches!(&responses[..], [one] if one.json()["error"].is_string()), "{rest:?}: {responses:?}");
    }
    worker.until_open(open);
}

#[test]
fn a_client_that_half_closes_after_its_request_is_answered_or_has_left() {
    let (server, worker) = serve(HELLO_HTTP, &[]);
    let open = worker.open();
    for _ in 0..100 {
        let mut client = server.connect();
        client.send_get("/");
        client.half_close();
        let responses = client.responses();
        assert!(responses.len() <= 1 && responses.iter().all(|response| response.status == 200), "{responses:?}");
    }
    worker.until_open(open);
}

/// All ways in which a client can go.
const LEAVE: [fn(Client); 3] = [drop, Client::reset, |mut client| {
    client.half_close();
    client.is_closed();
}];

#[test]
fn whoever_leaves_takes_its_guest_along() {
    // one place: whoever is next is served only when the guest is gone
    let (server, worker) = serve(SLOW, &["--concurrency", "1", "--timeout", "0s", "--idle-timeout", "1h"]);
    let open = worker.open();
    for leave in LEAVE {
        let mut client = server.connect();
        client.send_get("/");
        leave(client);
        let mut client = server.connect();
        client.send_get("/late");
        client.head().unwrap();
        leave(client);
        assert_eq!(server.get("/?ms=0").text(), r#"{"slept":0}"#);
    }
    worker.until_open(open);
}

#[test]
fn whoever_leaves_with_something_unread_takes_its_guest_along() {
    // its guest does not read, and what it has sent ahead waits for the response
    for rest in ["Content-Length: 9\r\n\r\n", "Content-Length: 9\r\n\r\n123456789", "\r\nGET"] {
        let (server, worker) = serve(SLOW, &["--concurrency", "1", "--timeout", "0s", "--idle-timeout", "1h"]);
        let open = worker.open();
        // a reset may come at any moment between two looks at the connection
        for leave in LEAVE.into_iter().chain([Client::reset as fn(Client); 5]) {
            let mut client = server.connect();
            client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{rest}"));
            leave(client);
            assert_eq!(server.get("/?ms=0").text(), r#"{"slept":0}"#, "{rest:?}");
        }
        worker.until_open(open);
    }
}

#[test]
fn a_thousand_resets_leave_nothing_behind() {
    let (server, workers) = start(cluster(SLOW, 2, &["--timeout", "0s"]), 2);
    let open: Vec<_> = workers.iter().map(|worker| worker.open()).collect();
    for bytes in ["", "GET", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET /late HTTP/1.1\r\nHost: a\r\n\r\n"] {
        let mut clients: Vec<Client> = (0..250).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.send(bytes);
        }
        clients.into_iter().for_each(Client::reset);
        assert_eq!(server.get("/?ms=0").status, 200);
    }
    for (worker, open) in workers.iter().zip(open) {
        worker.until_open(open);
    }
    let mut processes: Vec<Pid> = children(server.pid());
    processes.sort_by_key(|pid| pid.as_raw_pid());
    assert_eq!(processes, workers.iter().map(|worker| worker.0).collect::<Vec<_>>(), "nobody has died");
    server.signal(Signal::TERM);
    let _ = server.running.wait().code(0);
}

/// Whether a client has been sent nothing, as far as it can tell without waiting.
fn has_nothing(client: &mut Client) -> bool {
    client.stream.set_nonblocking(true).unwrap();
    let first = client.stream.peek(&mut [0]);
    client.stream.set_nonblocking(false).unwrap();
    first.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn a_worker_has_so_many_connections_and_the_rest_waits() {
    let (server, worker) = serve(HELLO_HTTP, &["--connections", "2"]);
    let open = worker.open();
    let [mut first, mut second, mut third] = [(); 3].map(|()| server.connect());
    third.send_get("/");
    // the worker has time enough to take another one
    for _ in 0..200 {
        for client in [&mut first, &mut second] {
            client.send_get("/");
            assert_eq!(client.response().status, 200);
        }
    }
    assert!(has_nothing(&mut third));
    assert_eq!(worker.open(), open + 2);
    drop(first);
    assert_eq!(third.response().status, 200);
    second.send_get("/");
    assert_eq!(second.response().status, 200);
}

/// For a second a client's request is not answered, and the worker rests.
#[track_caller]
fn waits_at_rest(client: &mut Client, worker: Worker) {
    let before = worker.computed();
    client.stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert_eq!(client.stream.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let computed = worker.computed().saturating_sub(before);
    assert!(computed < Duration::from_millis(200), "{computed:?}");
}

#[test]
fn a_worker_has_no_more_connections_than_descriptors_for_them() {
    // 64 are kept for other things
    const MAX: usize = 36;
    let (server, workers) = start(cluster(HELLO_HTTP, 1, &[]).open_files(64 + 36), 1);
    let mut clients: Vec<Client> = (0..MAX + 20).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send_get("/");
    }
    let mut rest = clients.split_off(MAX);
    assert!(clients.iter_mut().all(|client| client.response().status == 200));
    waits_at_rest(&mut rest[0], workers[0]);
    assert!(rest.iter_mut().all(has_nothing));
    drop(clients);
    assert!(rest.iter_mut().all(|client| client.response().status == 200));
}

#[test]
fn a_worker_that_runs_out_of_descriptors_rests_until_there_are_some() {
    let (mut server, worker) = serve(HELLO_HTTP, &[]);
    let mut inside = server.connect();
    inside.send_get("/");
    assert_eq!(inside.response().status, 200);
    let descriptors = format!("/proc/{}/fd", worker.0.as_raw_pid());
    // what the worker may have is less than what this process may, and cannot be raised again
    let maximum = worker.limit("Max open files");
    let limit = |most: Option<u64>| {
        let bounds = Rlimit { current: most.or(Some(maximum)), maximum: Some(maximum) };
        prlimit(Some(worker.0), Resource::Nofile, bounds).unwrap();
    };
    let open = worker.open();
    for _ in 0..2 {
        worker.until_open(open);
        // a new one would get the lowest number that is free
        let free = (0..1000).find(|number| !Path::new(&format!("{descriptors}/{number}")).exists());
        limit(free);
        let mut outside: Vec<Client> = (0..20).map(|_| server.connect()).collect();
        for client in &mut outside {
            client.send_get("/");
        }
        let error = event(&mut server, "error");
        assert!(error["message"].as_str().unwrap().contains("accepts no more connections for a while"), "{error}");
        waits_at_rest(&mut outside[0], worker);
        assert!(outside.iter_mut().all(has_nothing));
        inside.send_get("/");
        assert_eq!(inside.response().status, 200);
        limit(None);
        assert!(outside.iter_mut().all(|client| client.response().status == 200));
    }
}

#[test]
fn ten_thousand_idle_connections_are_held_and_spread_evenly() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    // other tests of this process need some, too
    let room = limit.maximum.map_or(usize::MAX, |most| usize::try_from(most).unwrap().saturating_sub(500));
    let count = room.min(10_000);
    let (server, workers) = start(cluster(HELLO_HTTP, 2, &["--idle-timeout", "1h"]), 2);
    let open: Vec<_> = workers.iter().map(|worker| worker.open()).collect();
    let memory: Vec<_> = workers.iter().map(|worker| worker.memory_kib(NOW)).collect();
    let held = || workers.iter().zip(&open).map(|(worker, open)| worker.open().saturating_sub(*open));
    let clients: Vec<Client> = (0..count).map(|_| server.connect()).collect();
    eventually("they are accepted", || held().sum::<usize>() == count);
    let each: Vec<_> = held().collect();
    let grown: Vec<_> = workers.iter().zip(memory).map(|(worker, before)| worker.memory_kib(NOW) - before).collect();
    assert!(each.iter().all(|each| each.abs_diff(count / 2) <= count / 100), "{each:?}");
    assert!(each.iter().zip(&grown).all(|(each, kib)| *kib < 32 * *each as u64), "{each:?} cost {grown:?} KiB");
    assert_eq!(server.get("/").status, 200);
    drop(clients);
    eventually("they are gone", || held().sum::<usize>() == 0);
    assert_eq!(server.get("/").status, 200);
}
