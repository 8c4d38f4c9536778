//! `wrun cluster --listen`: what clients get whose guest fails, takes too long or has no room, and how little others
//! notice of it.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    sync::mpsc,
    thread,
    time::Instant,
};

use guest_artifacts::{CRASH, SLOW, SPIN};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    client::{Client, PATIENCE, Response, Server},
    http::serve,
    load::SOON,
    supervision::event,
};

/// The status of a response that wrun gives instead of a guest, and the kind of its error.
#[track_caller]
fn error(response: &Response) -> (u16, Value) {
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert_eq!(response.json()["request"].as_str(), response.header("x-request-id"));
    (response.status, response.json()["error"]["kind"].clone())
}

/// Asks on a connection that lives on.
#[track_caller]
fn ask(client: &mut Client, path: &str) -> Response {
    client.send_get(path);
    client.response()
}

#[test]
fn what_a_guest_does_is_its_own_clients_problem() {
    let args = ["-w", "1", "--memory", "64MiB", "--instance", "worker", "--log-format", "json"];
    let mut server = serve(CRASH, &args);
    let pid = event(&mut server, "fork")["pid"].clone();
    // all on one connection: that lives on, too
    let mut client = server.connect();
    for (path, kind) in [("/trap", "trapped"), ("/exit?code=3", "exited"), ("/exit?code=0", "exited")]
        .into_iter()
        .chain([("/recurse", "trapped"), ("/memory?mib=64", "limit")])
    {
        // one that is used, so that it shows whether it is used again
        let handled = ask(&mut client, "/").json();
        assert_eq!(handled, json!({"handled": 1}), "before {path}");
        let response = ask(&mut client, path);
        assert_eq!(error(&response), (500, json!(kind)), "{path}");
        assert!(!response.text().contains("wasm"), "nothing of its inside: {}", response.text());
        let limit = event(&mut server, "limit");
        assert_eq!((&limit["worker"], &limit["outcome"]["kind"]), (&json!(1), &json!(kind)));
        match kind {
            "trapped" => assert!(limit["outcome"]["backtrace"].as_array().is_some_and(|frames| !frames.is_empty())),
            "limit" => assert_eq!(limit["outcome"]["limit"], "memory"),
            _ => assert_eq!(limit["outcome"]["code"], i32::from(!path.ends_with('0')), "all that WASI tells"),
        }
    }
    assert_eq!(ask(&mut client, "/memory?mib=60").status, 200, "just under");
    for path in ["/none", "/error", "/short", "/status?code=101"] {
        let response = ask(&mut client, path);
        assert_eq!(error(&response), (500, json!("failed")), "{path}");
        assert!(!response.text().contains("told to fail"), "nothing of its inside: {}", response.text());
    }
    assert_eq!(ask(&mut client, "/status?code=418").status, 418);
    // and so does the worker
    server.signal(Signal::TERM);
    assert_eq!(event(&mut server, "exit")["pid"], pid);
}

#[test]
fn a_failure_is_told_to_a_client_who_still_sends() {
    let server = serve(CRASH, &["-w", "1"]);
    let body = "x".repeat(4 << 20);
    for (path, status) in [("/trap", 500), ("/none", 500), ("/", 200)] {
        let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        // a reset would take the response from many a client: it may send all it has, and then the connection ends
        let mut client = server.connect();
        client.stream.write_all((head + &body).as_bytes()).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(client.response().status, status, "{path}");
        assert_eq!(client.stream.read(&mut [0]).unwrap(), 0, "{path}");
    }
}

#[test]
fn a_response_that_is_not_whole_does_not_look_whole() {
    let mut server = serve(CRASH, &["-w", "1", "--log-format", "json"]);
    for path in ["/late", "/short"] {
        assert_eq!(server.get(path).status, 500, "its head was not out yet");
    }
    event(&mut server, "limit");
    for path in ["/late?ms=50", "/short?ms=50"] {
        is_cut_off(&server, path, b"");
    }
    assert_eq!(event(&mut server, "limit")["outcome"]["kind"], "trapped");

    for guest in [SLOW, SPIN] {
        let mut server = serve(guest, &["-w", "1", "--timeout", "300ms", "--log-format", "json"]);
        is_cut_off(&server, "/late", b"early\n");
        assert_eq!(event(&mut server, "limit")["outcome"]["limit"], "time");
    }
}

/// A response begins, perhaps with this chunk, and ends before its end.
#[track_caller]
fn is_cut_off(server: &Server, path: &str, chunk: &[u8]) {
    let mut client = server.connect();
    client.send_get(path);
    if !chunk.is_empty() {
        assert_eq!(client.head().unwrap().0, 200);
        assert_eq!(client.chunk().unwrap(), chunk);
        assert!(client.is_closed(), "without a last chunk");
        return;
    }
    let error = client.try_response().expect_err("it is cut off");
    assert!(matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{error}");
}

#[test]
fn a_guest_that_fails_after_its_response_is_told_of() {
    // the response to a HEAD is whole with its head, and the guest goes on
    for (guest, path, end) in [(CRASH, "/late?ms=50", ("kind", "trapped")), (SPIN, "/late", ("limit", "time"))] {
        let mut server = serve(guest, &["-w", "1", "--timeout", "1s", "--log-format", "json"]);
        assert_eq!(server.request(format!("HEAD {path} HTTP/1.1\r\nHost: a\r\n\r\n")).status, 200);
        assert_eq!(event(&mut server, "limit")["outcome"][end.0], end.1);
    }
}

#[test]
fn time_runs_for_those_who_sleep_and_those_who_loop() {
    for guest in [SLOW, SPIN] {
        let mut server = serve(guest, &["-w", "1", "--timeout", "500ms", "--log-format", "json"]);
        let mut client = server.connect();
        assert_eq!(ask(&mut client, "/?ms=10").status, 200, "just under");
        assert_eq!(error(&ask(&mut client, "/")), (504, json!("limit")));
        assert_eq!(event(&mut server, "limit")["outcome"]["allowed"], json!("500ms"));
        assert_eq!(ask(&mut client, "/?ms=10").status, 200, "the worker lives on, and so does the connection");
    }
    let server = serve(SLOW, &["-w", "1", "--timeout", "0s"]);
    assert_eq!(server.get("/?ms=50").status, 200);
}

#[test]
fn time_runs_while_a_request_waits_for_its_turn() {
    let server = serve(SLOW, &["-w", "1", "--concurrency", "1", "--timeout", "3s"]);
    let mut at_work = server.connect();
    at_work.send_get("/late");
    at_work.head().unwrap();
    // its turn comes when the time of the other one is over, and then there is not enough left of its own
    assert_eq!(error(&server.get("/?ms=1500")), (504, json!("limit")));
    assert_eq!(at_work.chunk().unwrap(), b"early\n");
    assert!(at_work.is_closed());
    assert_eq!(server.get("/?ms=1500").status, 200, "alone, it is in time");
}

#[test]
fn a_full_worker_says_when_to_come_back() {
    for queue in [0, 1, 3] {
        let server = serve(SLOW, &["-w", "1", "--concurrency", "1", "--queue", &queue.to_string()]);
        let mut at_work = server.connect();
        at_work.send_get("/late");
        at_work.head().unwrap();
        // nobody knows which of them comes last, but it is the only one that is answered now
        let (answered, answers) = mpsc::channel();
        for _ in 0..=queue {
            let (mut client, answered) = (server.connect(), answered.clone());
            client.send_get("/?ms=1");
            thread::spawn(move || answered.send(client.try_response()));
        }
        let next = || answers.recv_timeout(PATIENCE).expect("an answer").expect("a whole one");
        let refused = next();
        assert_eq!(error(&refused), (503, json!("full")), "{queue} may wait");
        assert_eq!(refused.header("retry-after"), Some("1"));
        drop(at_work);
        for _ in 0..queue {
            assert_eq!(next().text(), "{\"slept\":1}", "those that waited get their turn");
        }
    }
}

#[test]
fn so_many_requests_run_at_once_and_no_more() {
    let server = serve(SLOW, &["-w", "1", "--concurrency", "3", "--queue", "0"]);
    let at_work = [(); 3].map(|()| {
        let mut client = server.connect();
        client.send_get("/late");
        assert_eq!(client.head().unwrap().0, 200);
        client
    });
    assert_eq!(server.get("/?ms=1").status, 503);
    drop(at_work);
    until(&server, 200);
}

#[test]
fn a_guest_that_computes_lets_others_go_on() {
    let server = serve(SPIN, &["-w", "1", "--timeout", "0s"]);
    let mut spinning = server.connect();
    spinning.send_get("/late");
    spinning.head().unwrap();
    // it never ends, and the same worker answers others, also those that need more than one turn
    for ms in [0, 1, 100] {
        assert_eq!(server.get(&format!("/?ms={ms}")).json(), json!({"spun": ms}));
    }
    // no part of the response is there but the first
    assert_eq!(spinning.chunk().unwrap(), b"early\n");
    spinning.stream.set_nonblocking(true).unwrap();
    assert_eq!(spinning.chunk().expect_err("still at work").kind(), ErrorKind::WouldBlock);
}

#[test]
fn requests_at_once_are_not_in_one_instance_and_one_that_is_cut_off_is_used_no_more() {
    let args = ["-w", "1", "--instance", "worker"];
    let unfinished = |server: &Server| {
        let mut client = server.connect();
        client.send_get("/short?ms=3600000");
        assert_eq!(client.head().unwrap().0, 200);
        client
    };
    let handled = |server: &Server| server.get("/").json()["handled"].as_u64().unwrap();
    let server = serve(CRASH, &args);
    assert_eq!([handled(&server), handled(&server)], [1, 2]);
    let _second = unfinished(&server);
    assert_eq!([handled(&server), handled(&server)], [1, 2]);

    // by its client, and by the clock
    let server = serve(CRASH, &[&args[..], &["--concurrency", "1"]].concat());
    assert_eq!([handled(&server), handled(&server)], [1, 2]);
    drop(unfinished(&server));
    assert_eq!([handled(&server), handled(&server)], [1, 2]);
    let server = serve(CRASH, &[&args[..], &["--timeout", "1s"]].concat());
    assert_eq!([handled(&server), handled(&server)], [1, 2]);
    let mut client = unfinished(&server);
    assert_eq!(client.exact(10).unwrap(), b"ten bytes\n");
    assert!(client.is_closed());
    assert_eq!([handled(&server), handled(&server)], [1, 2]);
}

/// Asks until the answer has this status.
#[track_caller]
fn until(server: &Server, status: u16) {
    let deadline = Instant::now() + SOON;
    while server.get("/?ms=1").status != status {
        assert!(Instant::now() < deadline, "expected {status} within {SOON:?}");
    }
}

#[test]
fn a_client_that_leaves_takes_its_request_along() {
    let args = ["-w", "1", "--concurrency", "1", "--queue", "0", "--access-log"];
    let mut server = serve(SLOW, &args);
    for (path, logged) in [("/", "/ HTTP/1.1\" 499 0 "), ("/late?ms=3600000", "/late?ms=3600000 HTTP/1.1\" 200 6 ")] {
        let mut leaving = server.connect();
        leaving.send_get(path);
        until(&server, 503);
        drop(leaving);
        until(&server, 200);
        server.stderr_line_with(&format!("\"GET {logged}"));
    }
    // also while it waits for its turn
    let mut server = serve(SLOW, &["-w", "1", "--concurrency", "1", "--queue", "1", "--access-log"]);
    let mut at_work = server.connect();
    at_work.send_get("/late");
    at_work.head().unwrap();
    for _ in 0..3 {
        let [mut waiting, mut refused] = [server.connect(), server.connect()];
        waiting.send_get("/?ms=3600000");
        // whichever of the two comes first is the one that waits
        refused.send_get("/?ms=3600000");
        server.stderr_line_with(" 503 ");
        drop((waiting, refused));
        server.stderr_line_with(" 499 0 ");
    }
}
