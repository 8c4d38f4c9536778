//! `wrun cluster --listen`: what clients get, from http guests.

use std::{
    io::Write as _,
    net::TcpListener,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use guest_artifacts::{CRASH, ECHO, FOREIGN_HTTP, HELLO, HELLO_HTTP, SLOW, SPIN, STREAM, UPLOAD};
use serde_json::{Value, json};

use crate::{
    client::{Response, Server},
    wrun::{Folder, wrun},
};

fn serve(guest: &str, args: &[&str]) -> Server {
    Server::start(wrun(["cluster", guest, "--listen", "0"]).args(args))
}

/// The next event of this name, of a server that tells in JSON.
#[track_caller]
fn event(server: &mut Server, name: &str) -> Value {
    let line = server.stderr_line_with(&format!("\"event\":\"{name}\""));
    serde_json::from_str(&line).expect("JSON")
}

/// What `curl` prints.
#[track_caller]
fn curl(args: &[&str], stdin: &[u8]) -> String {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "30"]).args(args);
    let mut curl = curl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("curl is installed");
    let mut input = curl.stdin.take().unwrap();
    let bytes = stdin.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&bytes));
    let output = curl.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    assert!(output.status.success(), "curl {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fnv(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn it_says_where_it_listens() {
    let server = serve(HELLO_HTTP, &["-w", "1"]);
    assert!(server.address.ip().is_loopback() && server.address.port() != 0);
    let response = server.get("/");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_eq!((&response.json()["worker"], &response.json()["generation"]), (&json!(1), &json!(1)));

    let server = Server::start(wrun(["cluster", HELLO_HTTP, "-w", "1", "--listen", "[::1]:0"]));
    assert!(server.address.is_ipv6());
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn a_port_that_is_taken_is_98() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for balance in ["shared", "slots"] {
        let args = ["cluster", HELLO_HTTP, "--listen", &address, "--balance", balance];
        let finished = wrun(args).run().code(98);
        finished.stderr_has(&format!("could not listen on `{address}`")).stderr_has("hint: ").stdout("");
    }
}

#[test]
fn only_guests_that_answer_get_a_port() {
    let finished = wrun(["cluster", HELLO, "--listen", "0"]).run().code(126);
    finished.error_and_hint("expected an http guest, found a command guest (component)", "use `wrun run`");
    wrun(["cluster", ECHO]).stdin("[1]\n").run().code(0).stdout("{\"line\":1,\"reply\":[1]}\n");
    wrun(["cluster", HELLO_HTTP, "--listen", "nowhere"]).run().code(2).stderr_has("expected `ADDR:PORT`");
    wrun(["cluster", HELLO_HTTP, "--listen", "0", "--interrupt", "kill"]).run().code(2).stderr_has("use `epoch`");
}

#[test]
fn a_connection_brings_many_requests() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let mut client = server.connect();
    for n in 0..3 {
        client.send_get(&format!("/{n}"));
        assert_eq!(client.response().json()["path"], json!(format!("/{n}")));
    }
    // all at once: the answers come in their order
    let all: Vec<String> = (0..20).map(|n| format!("GET /{n} HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
    client.send(all.concat());
    for n in 0..20 {
        assert_eq!(client.response().json()["path"], json!(format!("/{n}")));
    }
    client.send("GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert_eq!(client.response().header("connection"), Some("close"));
    assert!(client.is_closed());

    let mut old = server.connect();
    old.send("GET / HTTP/1.0\r\n\r\n");
    assert_eq!(old.response().status, 200);
    assert!(old.is_closed());
}

#[test]
fn curl_gets_what_it_asks_for() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let url = |path: &str| format!("http://{}{path}", server.address);
    let got: Value = serde_json::from_str(&curl(&[&url("/x?y=z")], b"")).unwrap();
    assert_eq!((&got["method"], &got["path"]), (&json!("GET"), &json!("/x?y=z")));
    assert_eq!(got["authority"], json!(server.address.to_string()));
    let head = curl(&["--head", &url("/")], b"");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(curl(&["--http1.0", &url("/")], b"").contains("\"method\":\"GET\""));

    // more than a megabyte: curl expects a 100 before it sends it
    let body: Vec<u8> = (0..20 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let posted = curl(&["--data-binary", "@-", &url("/")], &body);
    let expected = json!({"bytes": body.len(), "fnv": fnv(&body), "trailers": {}, "error": null});
    assert_eq!(serde_json::from_str::<Value>(&posted).unwrap(), expected);
    // in chunks
    let put = curl(&["--upload-file", "-", &url("/"), "--request", "POST"], &body);
    assert_eq!(serde_json::from_str::<Value>(&put).unwrap(), expected);
    let ignored = curl(&["--data-binary", "@-", &url("/ignore")], &body);
    assert_eq!(ignored, "{\"ignored\":true}");
}

#[test]
fn a_client_that_expects_is_told_to_go_on() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let mut client = server.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n");
    assert_eq!(client.response().status, 100);
    client.send("abc");
    assert_eq!(client.response().json()["fnv"], json!(fnv(b"abc")));
}

#[test]
fn a_response_goes_out_while_the_guest_is_at_work() {
    let server = serve(SLOW, &["-w", "1"]);
    let mut client = server.connect();
    // it has an hour, and its first piece is here
    client.send_get("/late?ms=3600000");
    let (status, headers) = client.head().unwrap();
    assert_eq!(status, 200);
    assert!(headers.contains(&("transfer-encoding".into(), "chunked".into())), "{headers:?}");
    assert_eq!(client.chunk().unwrap(), b"early\n");
}

#[test]
fn both_ways_at_once_with_trailers() {
    let server = serve(STREAM, &["-w", "1"]);
    let mut client = server.connect();
    client.send("POST /echo HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send("3\r\none\r\n");
    assert_eq!(client.head().unwrap().0, 200);
    assert_eq!(client.chunk().unwrap(), b"one");
    client.send("3\r\ntwo\r\n");
    assert_eq!(client.chunk().unwrap(), b"two");
    client.send("0\r\nx-checksum: 42\r\n\r\n");

    let request = "POST /echo HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n\
        3\r\none\r\n0\r\nX-Checksum: 42\r\n\r\n";
    let response = server.request(request);
    assert_eq!((response.text(), response.trailers), ("one".into(), vec![("x-checksum".into(), "42".into())]));
    // a client that cannot take trailers gets none
    assert_eq!(server.request(request.replace("TE: trailers\r\n", "")).trailers, []);

    let uploaded = serve(UPLOAD, &["-w", "1"]).request(request);
    assert_eq!(uploaded.json()["trailers"], json!({"x-checksum": "42"}));
}

#[test]
fn lengths_and_heads_are_as_they_should_be() {
    let server = serve(STREAM, &["-w", "1"]);
    let response = server.get("/?chunks=3&bytes=100000");
    assert_eq!((response.body.len(), response.body[0], response.body[299_999]), (300_000, b'a', b'c'));
    // one that has returned has written all of it: that needs no chunks
    let server = serve(HELLO_HTTP, &["-w", "1"]);
    let response = server.get("/");
    assert_eq!(response.header("content-length"), Some(&*response.body.len().to_string()));
    assert_eq!((response.header("transfer-encoding"), response.chunks.len()), (None, 0));
    let head = server.request("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(head.header("content-length").is_some_and(|length| length != "0"), "{head:?}");
}

#[test]
fn an_instance_lives_as_long_as_it_is_told() {
    let handled = |args: &[&str]| {
        let server = serve(CRASH, &[&["-w", "1"], args].concat());
        let mut client = server.connect();
        let mut handled = || {
            client.send_get("/");
            client.response().json()["handled"].as_u64().unwrap()
        };
        [handled(), handled(), handled(), handled()]
    };
    assert_eq!(handled(&[]), [1, 1, 1, 1]);
    assert_eq!(handled(&["--instance", "task"]), [1, 1, 1, 1]);
    assert_eq!(handled(&["--instance", "worker"]), [1, 2, 3, 4]);
    assert_eq!(handled(&["--reuse", "3"]), [1, 2, 3, 1]);
    wrun(["cluster", CRASH, "--listen", "0", "--instance", "task", "--reuse", "3"]).run().code(2);
}

#[test]
fn what_a_guest_does_is_its_own_clients_problem() {
    let args = ["-w", "1", "--memory", "64MiB", "--instance", "worker", "--log-format", "json"];
    let mut server = serve(CRASH, &args);
    let pid = event(&mut server, "fork")["pid"].clone();
    let error = |response: &Response| (response.status, response.json()["error"]["kind"].clone());
    for (path, kind) in [("/trap", "trapped"), ("/exit?code=3", "exited"), ("/recurse", "trapped")] {
        let response = server.get(path);
        assert_eq!(error(&response), (500, json!(kind)), "{path}");
        assert_eq!(response.json()["request"].as_str(), response.header("x-request-id"));
        assert!(!response.text().contains("wasm"), "nothing of its inside: {}", response.text());
        let limit = event(&mut server, "limit");
        assert_eq!((&limit["worker"], &limit["outcome"]["kind"]), (&json!(1), &json!(kind)));
    }
    assert_eq!(error(&server.get("/none")), (500, json!("failed")));
    assert_eq!(error(&server.get("/error")), (500, json!("failed")));
    assert_eq!(server.get("/memory?mib=40").status, 200, "just under");
    assert_eq!(error(&server.get("/memory?mib=80")), (500, json!("limit")), "just over");
    assert_eq!(event(&mut server, "limit")["outcome"]["limit"], json!("memory"));
    // an instance that failed is not used again, and the worker is the same
    assert_eq!(server.get("/").json(), json!({"handled": 1}));
    assert_eq!(server.get("/status?code=418").status, 418);
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(event(&mut server, "exit")["pid"], pid);
}

#[test]
fn a_response_that_is_not_whole_does_not_look_whole() {
    let server = serve(CRASH, &["-w", "1"]);
    for path in ["/late", "/short"] {
        assert_eq!(server.get(path).status, 500, "its head was not out yet");
    }
    for path in ["/late?ms=50", "/short?ms=50"] {
        let mut client = server.connect();
        client.send_get(path);
        let error = client.try_response().expect_err("it is cut");
        assert!(matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset));
    }
    let server = serve(SPIN, &["-w", "1", "--timeout", "300ms"]);
    let mut client = server.connect();
    client.send_get("/late");
    assert!(client.try_response().is_err(), "its time is over, and its head is out");
}

#[test]
fn time_runs_for_those_who_sleep_and_those_who_loop() {
    for guest in [SLOW, SPIN] {
        let mut server = serve(guest, &["-w", "1", "--timeout", "500ms", "--log-format", "json"]);
        assert_eq!(server.get("/?ms=10").status, 200, "just under");
        let response = server.get("/");
        assert_eq!((response.status, &response.json()["error"]["kind"]), (504, &json!("limit")));
        assert_eq!(event(&mut server, "limit")["outcome"]["allowed"], json!("500ms"));
        assert_eq!(server.get("/?ms=10").status, 200, "the worker lives on");
    }
    let server = serve(SLOW, &["-w", "1", "--timeout", "0s"]);
    assert_eq!(server.get("/?ms=50").status, 200);
}

#[test]
fn a_full_worker_says_when_to_come_back() {
    let server = serve(SLOW, &["-w", "1", "--concurrency", "1", "--queue", "1", "--timeout", "1s"]);
    let mut at_work = server.connect();
    at_work.send_get("/late?ms=3600000");
    at_work.head().unwrap();
    let mut waiting = server.connect();
    waiting.send_get("/?ms=1");
    // the third is one too many, as soon as the second waits
    let deadline = Instant::now() + Duration::from_secs(20);
    let refused = loop {
        let response = server.get("/?ms=1");
        if response.status == 503 {
            break response;
        }
        assert!(Instant::now() < deadline, "{response:?}");
    };
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.json()["error"]["kind"], json!("full"));
    // its time runs while it waits; whether it gets its turn first depends on whose time is over first
    let response = waiting.response();
    assert!(response.status == 504 || response.status == 200, "{response:?}");
    assert!(at_work.try_response().is_err(), "its time is over, too");
    assert_eq!(server.get("/?ms=1").status, 200, "and there is room again");
}

#[test]
fn a_guest_that_computes_lets_others_go_on() {
    let server = serve(SPIN, &["-w", "1"]);
    let mut spinning = server.connect();
    spinning.send_get("/?ms=3000");
    // answered by the same worker while the other one is at work
    for _ in 0..5 {
        assert_eq!(server.get("/?ms=1").json(), json!({"spun": 1}));
    }
    spinning.stream.set_nonblocking(true).unwrap();
    assert_eq!(spinning.try_response().expect_err("still at work").kind(), std::io::ErrorKind::WouldBlock);
    spinning.stream.set_nonblocking(false).unwrap();
    assert_eq!(spinning.response().json(), json!({"spun": 3000}));
}

#[test]
fn a_client_that_leaves_takes_its_request_along() {
    let server = serve(SLOW, &["-w", "1", "--concurrency", "1", "--queue", "0"]);
    for path in ["/", "/late?ms=3600000"] {
        let mut leaving = server.connect();
        leaving.send_get(path);
        let deadline = Instant::now() + Duration::from_secs(20);
        let until = |status: u16| {
            while server.get("/?ms=1").status != status {
                assert!(Instant::now() < deadline, "{path}: expected {status}");
            }
        };
        until(503);
        drop(leaving);
        until(200);
    }
}

#[test]
fn every_request_has_an_id() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let with = |server: &Server, header: &str| {
        server.request(format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{header}\r\n"))
    };
    let id = |response: &Response| response.header("x-request-id").unwrap().to_owned();
    let (first, second) = (with(&server, ""), with(&server, "X-Request-Id: forged\r\n"));
    assert_ne!(id(&first), id(&second));
    assert_ne!(id(&second), "forged");
    let sees = |response: &Response, name: &str, value: &str| {
        response.json()["headers"].as_array().unwrap().contains(&json!([name, value]))
    };
    assert!(sees(&first, "x-request-id", &id(&first)));
    assert!(sees(&with(&server, "traceparent: 00-ab-cd-01\r\n"), "traceparent", "00-ab-cd-01"));

    let proxied =
        "X-Request-Id: mine\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\nForwarded: for=1.1.1.1\r\n";
    let stranger = with(&server, proxied);
    assert!(!stranger.text().contains("forwarded") && !stranger.text().contains("mine"), "{}", stranger.text());
    assert_eq!(stranger.json()["scheme"], json!("HTTP"));
    for trusted in ["127.0.0.1", "127.0.0.0/8"] {
        let server = serve(UPLOAD, &["-w", "1", "--trust-proxy", trusted]);
        let proxy = with(&server, proxied);
        assert_eq!((id(&proxy), &proxy.json()["scheme"]), ("mine".into(), &json!("HTTPS")));
        assert!(sees(&proxy, "x-forwarded-for", "9.9.9.9") && sees(&proxy, "forwarded", "for=1.1.1.1"));
    }
    let server = serve(UPLOAD, &["-w", "1", "--trust-proxy", "10.0.0.0/8"]);
    assert_ne!(id(&with(&server, proxied)), "mine");
    wrun(["cluster", UPLOAD, "--listen", "0", "--trust-proxy", "me"]).run().code(2).stderr_has("expected an address");
}

#[test]
fn the_access_log_has_a_line_for_each_request() {
    let agent = "User-Agent: a\"b\u{202e}\\\r\nReferer: http://r/\r\nX-Forwarded-For: 9.9.9.9\r\n";
    let request = format!("GET /x?y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{agent}\r\n");
    let mut server = serve(HELLO_HTTP, &["-w", "1", "--access-log", "--trust-proxy", "127.0.0.1"]);
    let response = server.request(&request);
    let line = server.stderr_line_with("GET");
    let length = response.body.len();
    assert!(line.starts_with("9.9.9.9 - - [20"), "{line}");
    let rest = format!("\"GET /x?y HTTP/1.1\" 200 {length} \"http://r/\" \"a\\\"b\\u{{202e}}\\\\\" ");
    assert!(line.contains(&rest), "{line}\n{rest}");
    assert!(line.contains(&format!("us {} 1 -", response.header("x-request-id").unwrap())), "{line}");
    server.request("GET / HTTP/1.1\r\n\r\n");
    assert!(server.stderr_line_with(" 400 ").ends_with("\"it has no Host\""));

    let folder = Folder::new();
    let args = ["cluster", HELLO_HTTP, "--listen", "0", "-w", "1", "--access-log=log", "--log-format", "json"];
    let server = Server::start(folder.wrun(args));
    server.request(&request);
    server.signal(rustix::process::Signal::TERM);
    let finished = server.running.wait().code(0);
    assert!(!finished.stderr_text().contains("\"access\""));
    let record: Value = serde_json::from_str(&folder.read("log")).unwrap();
    assert_eq!(
        (&record["event"], &record["status"], &record["client"]),
        (&json!("access"), &json!(200), &json!("127.0.0.1"))
    );
    assert_eq!((&record["method"], &record["target"]), (&json!("GET"), &json!("/x?y")));
    let args = ["cluster", HELLO_HTTP, "--listen", "0", "--access-log=no/such/folder"];
    wrun(args).run().code(125).stderr_has("could not open the log");
}

#[test]
fn a_guests_lines_come_with_its_workers_number() {
    let mut server = serve(CRASH, &["-w", "1"]);
    assert_eq!(server.get("/print?text=hi%20there").status, 200);
    assert_eq!(server.stderr_line_with("hi there"), "[1] | hi there");
    assert_eq!(server.stderr_line_with("hi there"), "[1] ! hi there");
}

#[test]
fn a_guest_has_no_way_out() {
    let elsewhere = serve(HELLO_HTTP, &["-w", "1"]);
    let server = serve(UPLOAD, &["-w", "1"]);
    let refused = server.get(&format!("/fetch?url={}", elsewhere.address)).json();
    assert!(refused["refused"].as_str().is_some_and(|code| code.contains("HttpRequestDenied")), "{refused}");
}

#[test]
fn a_guest_that_knows_nothing_of_wrun_is_served() {
    let server = serve(FOREIGN_HTTP, &["-w", "1"]);
    assert_eq!(server.get("/").text(), "Hello, wasi:http/proxy world!\n");
    assert_eq!(server.post("/echo", "back and forth").text(), "back and forth");
    assert_eq!(server.get("/stream-body").text().lines().count(), 5);
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/response-fail").status, 500);
    assert_eq!(server.get("/response-body-fail").status, 500, "its body is broken off");
}
