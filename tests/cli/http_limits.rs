//! Clients that abuse a port: by what they send, how much of it, how slowly, and how they leave. Each is answered or cut
//! off, and nobody else feels it.

use std::{
    fs,
    io::{ErrorKind, Write},
    thread,
    time::{Duration, Instant},
};

use guest_artifacts::{CRASH, ECHO, HELLO_HTTP, SLOW, STREAM, UPLOAD};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use serde_json::{Value, json};

use crate::{
    client::{Client, PATIENCE, Response, Server},
    load::SOON,
    supervision::{children, event, pid},
    wrun::{Wrun, wrun},
};

/// A request that hides behind what is none: nobody may answer it.
const HIDDEN: &[u8] = b"GET /hidden HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

/// `wrun cluster` behind any port that is free.
fn cluster(guest: &str, workers: u32, args: &[&str]) -> Wrun {
    wrun(["cluster", guest, "--listen", "0", "-w", &workers.to_string(), "--log-format", "json"]).args(args)
}

/// Starts it with one worker.
#[track_caller]
fn serve(guest: &str, args: &[&str]) -> (Server, Worker) {
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
struct Worker(Pid);

impl Worker {
    fn file(self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.0.as_raw_pid())).expect("it is there")
    }

    /// How many files and sockets it has open.
    fn open(self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0.as_raw_pid())).expect("it is there").count()
    }

    /// How much memory it has, or has had at most.
    fn memory_kib(self, which: &str) -> u64 {
        let status = self.file("status");
        let line = status.lines().find_map(|line| line.strip_prefix(which)).expect("a line");
        line.trim_end_matches("kB").trim().parse().expect("a number")
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
    fn until_open(self, count: usize) {
        eventually(&format!("{self:?} has {count} open"), || self.open() == count);
    }
}

/// Waits until this holds, which nobody tells of.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}, within {SOON:?}");
        thread::yield_now();
    }
}

/// A client takes its time.
fn pause(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}

/// For [`Worker::memory_kib`].
const NOW: &str = "VmRSS:";
const PEAK: &str = "VmHWM:";

fn statuses(responses: &[Response]) -> Vec<u16> {
    responses.iter().map(|response| response.status).collect()
}

/// How a client sends bytes, and when the request that hides behind them.
#[derive(Debug, Clone, Copy)]
enum Way {
    AtOnce,
    ByteByByte,
    HiddenLast,
}

/// All that is answered.
#[track_caller]
fn replay(server: &Server, bytes: &[u8], way: Way) -> Vec<Response> {
    let mut client = server.connect();
    let mut first = None;
    match way {
        Way::AtOnce => client.send([bytes, HIDDEN].concat()),
        Way::ByteByByte => bytes.iter().chain(HIDDEN).for_each(|byte| client.send([*byte])),
        Way::HiddenLast => {
            client.send(bytes);
            first = client.try_response().ok();
            client.send(HIDDEN);
        }
    }
    first.into_iter().chain(client.responses()).collect()
}

const WAYS: [Way; 3] = [Way::AtOnce, Way::ByteByByte, Way::HiddenLast];

/// Headers that say in two ways where the body ends, or in one that not all understand.
const FRAMINGS: [&str; 25] = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Content-Length: 5\r\nContent-Length: 5",
    "Content-Length: 5\r\nContent-Length: 0",
    "Content-Length: 0\r\ncontent-length: 5",
    "Content-Length: 5, 5",
    "Content-Length: 5,0",
    "Content-Length: +5",
    "Content-Length: -5",
    "Content-Length: 5x",
    "Content-Length: 0x5",
    "Content-Length: 5 5",
    "Content-Length: 5\x0b",
    "Content-Length:",
    "Content-Length: 18446744073709551616",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding: \"chunked\"",
    "Transfer-Encoding: chunked;q=1",
    "Transfer-Encoding:",
];

/// What is no request, or is one to some readers only.
const HEADS: [&[u8]; 36] = [
    b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nX: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\n\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\n\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\0\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\n: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    b"GET / HTTP/1.1\rHost: a\r\r",
    b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x7fb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX\x80: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n",
    b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET  /  HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"\xff\xfe\xfd\x80\x00\x01\x1b\x7f\r\n\r\n",
];

#[test]
fn what_could_be_read_in_two_ways_is_refused_and_hides_nothing() {
    // times that end a test in which the server waits for more
    let (server, _) = serve(CRASH, &["--instance", "worker", "--concurrency", "1", "--header-timeout", "2s"]);
    let framed = FRAMINGS.map(|headers| format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n0\r\n\r\n"));
    for bytes in framed.iter().map(String::as_bytes).chain(HEADS) {
        for way in WAYS {
            let responses = replay(&server, bytes, way);
            assert_eq!(statuses(&responses), [400], "{way:?}: {}", bytes.escape_ascii());
        }
    }
    // an old friend of port scanners that gets no answer: whoever speaks HTTP/2 would not understand it
    assert!(replay(&server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Way::AtOnce).is_empty());
    assert_eq!(server.get("/").text(), r#"{"handled":1}"#, "the guest has seen none of it");
}

#[test]
fn what_is_unusual_but_clear_is_answered_and_so_is_what_follows() {
    const CLEAR: [&str; 13] = [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX:\r\nx: \t a \t \r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c, websocket\r\nConnection: upgrade\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \t3\t \r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0003\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\tCHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;a=\"b\"\r\nabc\r\n00;c\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3 \t\r\nabc\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n000000000000000A\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
    ];
    let (server, _) = serve(UPLOAD, &[]);
    for text in CLEAR {
        for way in WAYS {
            let responses = replay(&server, text.as_bytes(), way);
            assert_eq!(statuses(&responses), [200, 200], "{way:?}: {text:?}");
            assert!(responses[0].json()["error"].is_null(), "{text:?}: {}", responses[0].text());
            assert_eq!(responses[1].json()["path"], "/hidden");
        }
    }
}

#[test]
fn a_chunked_body_that_is_none_ends_its_connection_and_hides_nothing() {
    const BODIES: [&str; 30] = [
        "\r\n0\r\n\r\n",
        "x\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        "-3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n",
        " 3\r\nabc\r\n0\r\n\r\n",
        "3 3\r\nabc\r\n0\r\n\r\n",
        "3\x0b\r\nabc\r\n0\r\n\r\n",
        "3,3\r\nabc\r\n0\r\n\r\n",
        "00000000000000003\r\nabc\r\n0\r\n\r\n",
        "10000000000000003\r\nabc\r\n0\r\n\r\n",
        "3\nabc\r\n0\r\n\r\n",
        "3\rabc\r\n0\r\n\r\n",
        "3;x\nabc\r\n0\r\n\r\n",
        "3;x\n",
        "3 \nabc\r\n0\r\n\r\n",
        "3;x\rabc\r\n0\r\n\r\n",
        "3\r\nabc0\r\n\r\n",
        "3\r\nabc\n0\r\n\r\n",
        "3\r\nabc\r0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nabc\r\n0\n\r\n",
        "3\r\nabc\r\n0;x\n",
        "3\r\nabc\r\n0 \n",
        "3\r\nabc\r\n0\r\n\n",
        "3\r\nabc\r\n0\r\nx: y\n\r\n",
        "3\r\nabc\r\n0\r\n\rx: y\r\n\r\n",
        "3\r\nabc\r\n0\r\nx: y\0\r\n\r\n",
        "3\r\nabc\r\n0\r\nno colon\r\n\r\n",
        "3\r\nabc\r\n0\r\n : y\r\n\r\n",
    ];
    // times that end a test in which the server waits for more
    let (server, _) = serve(UPLOAD, &["--idle-timeout", "2s", "--timeout", "2s"]);
    for body in BODIES {
        let bytes = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        for way in WAYS {
            // the guest hears of it, and what it makes of that is answered, when there is still somebody to answer
            let responses = replay(&server, bytes.as_bytes(), way);
            let told = |response: &Response| response.status == 200 && !response.json()["error"].is_null();
            let holds = responses.is_empty() || matches!(&responses[..], [one] if told(one));
            assert!(holds, "{way:?}: {body:?}: {responses:?}");
        }
    }
}

/// A `GET` whose head has so many bytes.
fn head_of(bytes: usize) -> Vec<u8> {
    let rest = b"GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n".len();
    format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(bytes - rest)).into_bytes()
}

#[test]
fn a_head_has_so_many_bytes_and_no_more() {
    for (args, max) in [(&[][..], 64 << 10), (&["--header-max", "8KiB"], 8 << 10), (&["--header-max", "1MiB"], 1 << 20)]
    {
        let (server, _) = serve(UPLOAD, args);
        for pieces in [max, 1000] {
            let ask = |bytes: &[u8]| {
                let mut client = server.connect();
                bytes.chunks(pieces).for_each(|piece| client.send(piece));
                client.send(HIDDEN);
                statuses(&client.responses())
            };
            assert_eq!(ask(&head_of(max)), [200, 200], "{max} in pieces of {pieces}");
            assert_eq!(ask(&head_of(max + 1)), [431], "{max} + 1 in pieces of {pieces}");
        }
        // what has no end needs none to be too long
        let mut client = server.connect();
        client.send(&head_of(max + 10)[..=max]);
        assert_eq!(statuses(&client.responses()), [431]);
    }
}

#[test]
fn a_request_has_so_many_headers_and_no_more() {
    let (server, _) = serve(UPLOAD, &[]);
    let ask = |headers: usize| {
        let headers = "X: a\r\n".repeat(headers - 1);
        statuses(&replay(&server, format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n").as_bytes(), Way::AtOnce))
    };
    assert_eq!(ask(100), [200, 200]);
    assert_eq!(ask(101), [431]);
}

#[test]
fn a_target_has_so_many_bytes_and_no_more() {
    for (args, max) in [(&[][..], 8 << 10), (&["--uri-max", "100"], 100)] {
        let (server, _) = serve(UPLOAD, args);
        for (host, path) in [("", "/"), ("", "/?"), ("b", "/")] {
            let ask = |bytes: usize| {
                let scheme = if host.is_empty() { "" } else { "http://" };
                let path = path.to_owned() + &"x".repeat(bytes - host.len() - path.len());
                let request = format!("GET {scheme}{host}{path} HTTP/1.1\r\nHost: a\r\n\r\n");
                statuses(&replay(&server, request.as_bytes(), Way::AtOnce))
            };
            assert_eq!(ask(max), [200, 200], "{host}{path}");
            assert_eq!(ask(max + 1), [414], "{host}{path}");
        }
    }
}

#[test]
fn a_body_has_so_many_bytes_and_no_more() {
    const MAX: usize = 64 << 10;
    let (server, _) = serve(UPLOAD, &["--body-max", "64KiB"]);
    assert_eq!(server.post("/", vec![b'x'; MAX]).json()["bytes"], MAX);
    let chunked = |bytes: usize| {
        let chunks: String = vec!["x"; bytes].chunks(1000).map(|chunk| chunk_of(&chunk.concat())).collect();
        let text = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n");
        replay(&server, text.as_bytes(), Way::AtOnce)
    };
    let fits = chunked(MAX);
    assert_eq!((statuses(&fits), &fits[0].json()["bytes"]), (vec![200, 200], &json!(MAX)));
    assert_eq!(statuses(&chunked(MAX + 1)), [413]);
    assert_eq!(statuses(&chunked(100 * MAX)), [413]);
    // one that says its length is refused before it is sent, however large
    for length in [MAX as u64 + 1, u64::MAX - 2] {
        for expect in ["", "Expect: 100-continue\r\n"] {
            let mut client = server.connect();
            client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{expect}Content-Length: {length}\r\n\r\n"));
            let response = client.response();
            assert_eq!((response.status, response.header("connection")), (413, Some("close")), "{response:?}");
            client.send(HIDDEN);
            assert!(client.is_closed());
        }
    }
    let mut client = server.connect();
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {MAX}\r\n\r\n"));
    assert_eq!(client.response().status, 100);
    client.send(vec![b'x'; MAX]);
    assert_eq!(client.response().json()["bytes"], MAX);
}

fn chunk_of(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

#[test]
fn a_handlers_message_has_so_many_bytes_and_no_more() {
    let message = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    for (args, max) in [(["--body-max", "1KiB"], 1 << 10), (["--message-max", "2KiB"], 2 << 10)] {
        let (server, _) = serve(ECHO, &args);
        assert_eq!(server.post("/", message(max)).text(), message(max));
        assert_eq!(server.post("/", message(max + 1)).status, 413);
        let chunked = |bytes: usize| {
            let chunk = chunk_of(&message(bytes));
            let text = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n");
            statuses(&replay(&server, text.as_bytes(), Way::AtOnce))
        };
        // a handler is not asked by GET
        assert_eq!(chunked(max), [200, 405]);
        assert_eq!(chunked(max + 1), [413]);
    }
}

/// Writes to a client's server until that takes no more, and answers how much it took.
#[track_caller]
fn flood(client: &mut Client, bytes: &[u8]) -> usize {
    client.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut taken = 0;
    loop {
        match client.stream.write(bytes) {
            Ok(length) => taken += length,
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => return taken,
            Err(error) => panic!("after {taken} bytes: {error}"),
        }
    }
}

#[test]
fn what_has_no_end_is_cut_off_and_costs_no_memory() {
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let endless = [
        ("GET / HTTP/1.1\r\nX: ".to_owned(), "x", 431),
        ("GET /".into(), "x", 431),
        ("GET / HTTP/1.1\r\n".into(), "X: a\r\n", 431),
        (String::new(), "\r\n", 431),
        (chunked.into(), "1\r\na\r\n", 413),
        (format!("{chunked}fffffffffffffff\r\n"), "x", 413),
        // the guest hears of it and answers
        (format!("{chunked}1;"), "x", 200),
        (format!("{chunked}0\r\n"), "x: y\r\n", 200),
    ];
    let (server, worker) = serve(UPLOAD, &["--body-max", "1MiB"]);
    server.get("/");
    let before = worker.memory_kib(NOW);
    let floods = endless.map(|(start, rest, status)| {
        let mut client = server.connect();
        thread::spawn(move || {
            client.send(&start);
            flood(&mut client, rest.repeat((64 << 10) / rest.len()).as_bytes());
            assert_eq!(statuses(&client.responses()), [status], "{start:?} {rest:?}");
        })
    });
    floods.into_iter().for_each(|flood| flood.join().unwrap());
    let grown = worker.memory_kib(PEAK) - before;
    assert!(grown < 8 << 10, "{grown} KiB");
}

#[test]
fn heads_without_end_cost_little_more_memory_than_they_have_bytes() {
    const CLIENTS: u64 = 300;
    const KIB_EACH: u64 = 60;
    let (server, worker) = serve(HELLO_HTTP, &["--header-timeout", "2s"]);
    server.get("/");
    let (before, open) = (worker.memory_kib(NOW), worker.open());
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect()).collect();
    let head = head_of(64 << 10);
    clients.iter_mut().for_each(|client| client.send(&head[..60 << 10]));
    assert!(clients.iter_mut().all(|client| statuses(&client.responses()) == [408]));
    let grown = worker.memory_kib(PEAK) - before;
    assert!(grown > CLIENTS * KIB_EACH && grown < 3 * CLIENTS * KIB_EACH, "{grown} KiB");
    worker.until_open(open);
    eventually("the memory is given back", || worker.memory_kib(NOW) - before < grown / 3);
}

#[test]
fn a_head_that_takes_too_long_is_answered_408_while_others_are_served() {
    let (server, _) = serve(HELLO_HTTP, &["--header-timeout", "1s"]);
    // the time runs from the first byte, and for each head anew
    let mut client = server.connect();
    pause(1100);
    for _ in 0..2 {
        for piece in ["G", "ET /", " HTTP/1.1\r\nHo", "st: a\r\n\r", "\n"] {
            client.send(piece);
            pause(50);
        }
        assert_eq!(client.response().status, 200);
        pause(1100);
    }
    let begun = Instant::now();
    client.stream.set_nonblocking(true).unwrap();
    for byte in head_of(60 << 10) {
        client.send([byte]);
        assert_eq!(server.get("/").status, 200);
        match client.stream.peek(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => pause(50),
            _ => break,
        }
    }
    client.stream.set_nonblocking(false).unwrap();
    assert_eq!(statuses(&client.responses()), [408]);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn an_idle_connection_is_closed_and_a_used_one_is_not() {
    let (server, worker) = serve(HELLO_HTTP, &["--idle-timeout", "500ms"]);
    let open = worker.open();
    let begun = Instant::now();
    let [mut unused, mut once, mut used] = [(); 3].map(|()| server.connect());
    once.send_get("/");
    assert_eq!(once.response().status, 200);
    for _ in 0..8 {
        used.send_get("/");
        assert_eq!(used.response().status, 200);
        pause(150);
    }
    assert!(unused.is_closed() && once.is_closed());
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert!(used.is_closed());
    worker.until_open(open);
}

#[test]
fn empty_lines_keep_no_connection_alive() {
    let (server, _) = serve(HELLO_HTTP, &["--idle-timeout", "500ms", "--header-timeout", "500ms"]);
    let mut client = server.connect();
    let begun = Instant::now();
    while client.stream.write_all(b"\r\n").is_ok() {
        assert!(begun.elapsed() < SOON, "it is still there");
        pause(50);
    }
}

#[test]
fn a_client_that_pauses_within_a_body_is_cut_off_and_its_guest_ends() {
    // one place: whoever is next is served only when the guest is gone
    let args = ["--concurrency", "1", "--idle-timeout", "400ms", "--timeout", "0s"];
    for guest in [UPLOAD, ECHO] {
        let (server, _) = serve(guest, &args);
        for (head, body) in
            [("Content-Length: 10", "\"12345678\""), ("Transfer-Encoding: chunked", "a\r\n\"12345678\"\r\n0\r\n\r\n")]
        {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n");
            for sent in [0, body.len() / 2, body.len() - 1] {
                let mut client = server.connect();
                let begun = Instant::now();
                client.send(format!("{head}{}", &body[..sent]));
                assert!(client.is_closed(), "{:?}", &body[..sent]);
                assert!(begun.elapsed() >= Duration::from_millis(400), "{:?}", begun.elapsed());
            }
            // one that goes on in time
            let mut client = server.connect();
            client.send(&head);
            for piece in body.as_bytes().chunks(2) {
                pause(100);
                client.send(piece);
            }
            assert_eq!(client.response().status, 200);
        }
        assert_eq!(server.post("/", "1").status, 200);
    }
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
    let (server, worker) = serve(STREAM, &["--write-timeout", "500ms", "--timeout", "0s", "--concurrency", "2"]);
    let open = worker.open();
    // a response without end, and responses without end
    for request in [
        "GET /?chunks=2000&bytes=65536 HTTP/1.1\r\nHost: a\r\n\r\n",
        &"GET /?bytes=1000 HTTP/1.1\r\nHost: a\r\n\r\n".repeat(1000),
    ] {
        let mut client = server.connect();
        client.keep_little();
        let begun = Instant::now();
        client.send(request);
        while worker.open() > open && begun.elapsed() < SOON {
            assert_eq!(server.get("/").text(), "a");
        }
        assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
        worker.until_open(open);
        assert_eq!(
            client.try_response().and_then(|_| client.try_response()).unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
    }
}

#[test]
fn a_client_that_takes_its_response_slowly_gets_all_of_it() {
    const BYTES: usize = 512 << 10;
    let args = ["--idle-timeout", "100ms", "--header-timeout", "100ms", "--write-timeout", "5s"];
    let (server, _) = serve(STREAM, &args);
    // what it has begun to ask for next has time, too: nobody has read it yet
    for next in ["", "GET"] {
        let mut client = server.connect();
        client.keep_little();
        client.send(format!("GET /?chunks=8&bytes=65536 HTTP/1.1\r\nHost: a\r\n\r\n{next}"));
        client.take_slowly(BYTES, 4 << 10, Duration::from_millis(20)).unwrap();
        assert_eq!(client.response().body.len(), BYTES, "{next:?}");
    }
}
