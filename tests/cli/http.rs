//! `wrun cluster --listen`: what clients get, from http guests.

use std::{
    io::Write as _,
    net::TcpListener,
    process::{Command, Stdio},
};

use guest_artifacts::{CRASH, ECHO, FOREIGN_HTTP, HELLO, HELLO_HTTP, SLOW, STREAM, UPLOAD};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    client::{Client, Response, Server},
    supervision::event,
    wrun::{Folder, wrun},
};

pub(super) fn serve(guest: &str, args: &[&str]) -> Server {
    Server::start(wrun(["cluster", guest, "--listen", "0"]).args(args))
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
fn it_says_where_it_listens_and_nothing_else() {
    for listen in ["0", ":0", "localhost:0", "127.0.0.1:0", "[::1]:0"] {
        let server = Server::start(wrun(["cluster", HELLO_HTTP, "-w", "1", "--listen", listen]));
        let address = server.address;
        assert!(address.ip().is_loopback() && address.port() != 0, "{address}");
        assert_eq!(address.is_ipv6(), listen.starts_with('['), "{address}");
        let response = server.get("/");
        assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
        assert_eq!((&response.json()["worker"], &response.json()["generation"]), (&json!(1), &json!(1)));
        server.signal(Signal::TERM);
        let _ = server.running.wait().code(0).stdout(format!("listening on http://{address}\n"));
    }
}

#[test]
fn a_port_that_is_taken_is_98() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let text = format!("could not listen on `{address}`: Address already in use (os error 98)");
    for listen in [address.to_string(), address.port().to_string()] {
        for balance in ["shared", "slots"] {
            let args = ["cluster", HELLO_HTTP, "--listen", &listen, "--balance", balance];
            let hint = "another program listens there; choose a port with --listen";
            wrun(args).run().code(98).error_and_hint(&text, hint);
        }
    }
}

#[test]
fn without_an_address_an_http_guest_is_at_port_8080_of_this_machine() {
    // whether it is ours or somebody else's: it is taken
    let _taken = TcpListener::bind("127.0.0.1:8080");
    let finished = wrun(["cluster", HELLO_HTTP]).run().code(98).stdout("");
    finished.stderr_has("could not listen on `127.0.0.1:8080`").stderr_has("choose a port with --listen");
}

#[test]
fn only_guests_that_answer_get_a_port() {
    let finished = wrun(["cluster", HELLO, "--listen", "0"]).run().code(126);
    finished.error_and_hint("expected an http guest, found a command guest (component)", "use `wrun run`");
    let finished = wrun(["run", HELLO_HTTP]).run().code(126);
    finished.error_and_hint("expected a command guest, found an http guest (component)", "use `wrun cluster`");
    wrun(["cluster", ECHO]).stdin("[1]\n").run().code(0).stdout("{\"line\":1,\"reply\":[1]}\n");
    wrun(["cluster", HELLO_HTTP, "--listen", "nowhere"]).run().code(2).stderr_has("expected `ADDR:PORT`");
    wrun(["cluster", HELLO_HTTP, "--listen", "0", "--interrupt", "kill"]).run().code(2).stderr_has("use `epoch`");
    for lines_only in [&["--ordered"][..], &["--retries", "1"]] {
        let finished = wrun(["cluster", ECHO, "--listen", "0"]).args(lines_only).run().code(2).stdout("");
        finished.stderr_has("cannot be used with");
    }
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
}

#[test]
fn answers_keep_their_order_when_the_first_takes_longest() {
    let server = serve(SLOW, &["-w", "1"]);
    let mut client = server.connect();
    let all = [300, 0, 100, 1].map(|ms| format!("GET /?ms={ms} HTTP/1.1\r\nHost: a\r\n\r\n"));
    client.send(all.concat());
    for ms in [300, 0, 100, 1] {
        assert_eq!(client.response().json(), json!({"slept": ms}));
    }
}

#[test]
fn an_old_client_gets_one_answer_that_ends_with_its_connection() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let mut old = server.connect();
    old.send("GET / HTTP/1.0\r\n\r\n");
    let seen = old.response().json();
    assert_eq!((&seen["method"], &seen["authority"]), (&json!("GET"), &json!("localhost")));
    assert!(old.is_closed());
    // it knows no chunks
    let server = serve(SLOW, &["-w", "1"]);
    let response = server.request("GET /late?ms=50 HTTP/1.0\r\n\r\n");
    assert_eq!((response.text(), response.header("transfer-encoding")), ("early\n".into(), None));
}

#[test]
fn a_guest_sees_what_was_asked() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let seen = |request: &str| server.request(format!("{request}\r\nConnection: close\r\n\r\n")).json();
    let expected = |[method, path, authority]: [&str; 3]| {
        let seen = seen(&format!("{method} {path} HTTP/1.1\r\nHost: a:1"));
        let found = ["method", "path", "authority", "scheme"].map(|field| seen[field].as_str().unwrap());
        let path = path.strip_prefix("http://b:2").unwrap_or(path);
        assert_eq!(found, [method, path, authority, "HTTP"]);
    };
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"] {
        expected([method, "/x/../%20?y=z&%zz", "a:1"]);
    }
    expected(["OPTIONS", "*", "a:1"]);
    expected(["GET", "http://b:2/x?y", "b:2"]);

    let seen =
        seen("GET / HTTP/1.1\r\nHost: a\r\ntraceparent: 00-ab-cd-01\r\nX: 1\r\nCookie: a=b\r\nx: 2\r\nX: \u{e9}");
    let headers: Vec<_> =
        seen["headers"].as_array().unwrap().iter().filter(|header| header[0] != "x-request-id").collect();
    for header in [json!(["traceparent", "00-ab-cd-01"]), json!(["cookie", "a=b"])] {
        assert!(headers.contains(&&header), "{header} in {headers:?}");
    }
    let several: Vec<_> = headers.iter().filter(|header| header[0] == "x").map(|header| header[1].clone()).collect();
    assert_eq!(several, ["1", "2", "\u{e9}"], "in their order");
    assert_eq!(headers.len(), 5, "and nothing that is the connection's: {headers:?}");

    let mut client = server.connect();
    client.send("CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\n");
    assert_eq!(client.response().status, 501);
    assert!(client.is_closed());
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
    // two requests, and one connection
    let twice = curl(&["--write-out", "\n%{num_connects}\n", &url("/1"), &url("/2")], b"");
    let connects: Vec<_> = twice.lines().filter(|line| !line.starts_with('{')).collect();
    assert_eq!(connects, ["1", "0"], "{twice}");

    let told = |args: &[&str], body: &[u8]| {
        let told: Value = serde_json::from_str(&curl(&[args, &[&url("/")]].concat(), body)).unwrap();
        assert_eq!(told, json!({"bytes": body.len(), "fnv": fnv(body), "trailers": {}, "error": null}));
    };
    told(&["--data", "@-"], b"a=b&c");
    told(&["--data", "@-"], b"");
    let body: Vec<u8> = (0..20 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // more than a megabyte: it expects a 100 before it sends that, and here it would wait for it longer than it may
    let expects = ["--expect100-timeout", "60"];
    told(&[&expects[..], &["--data-binary", "@-"]].concat(), &body);
    // in chunks
    told(&[&expects[..], &["--upload-file", "-", "--request", "POST"]].concat(), &body);
    told(&[&expects[..], &["--http1.0", "--data-binary", "@-"]].concat(), &body);
    assert_eq!(curl(&["--data-binary", "@-", &url("/ignore")], &body), "{\"ignored\":true}");
}

#[test]
fn a_client_that_expects_is_told_to_go_on_if_the_guest_reads() {
    let server = serve(UPLOAD, &["-w", "1"]);
    let expecting = |path: &str| {
        let mut client = server.connect();
        client.send(format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"));
        let response = client.response();
        (client, response)
    };
    let (mut client, response) = expecting("/");
    assert_eq!(response.status, 100);
    client.send("abc");
    assert_eq!(client.response().json()["fnv"], json!(fnv(b"abc")));
    // what it sends after that must not be taken for the body: the connection ends
    let (mut client, response) = expecting("/ignore");
    assert_eq!((response.status, &*response.text()), (200, "{\"ignored\":true}"));
    client.send_get("/");
    assert!(client.is_closed());
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
    let end = b"0\r\nx-checksum: 42\r\n\r\n";
    assert_eq!(client.exact(end.len()).unwrap(), end);
    client.send_get("/nowhere");
    assert_eq!(client.response().status, 404, "the connection lives on");

    let request = "POST /echo HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n\
        3\r\none\r\n0\r\nX-Checksum: 42\r\n\r\n";
    let response = server.request(request);
    assert_eq!((response.text(), response.trailers), ("one".into(), vec![("x-checksum".into(), "42".into())]));
    // also from a guest that has nothing else to say, and is done at once
    let response = server.request(request.replace("3\r\none\r\n", ""));
    assert_eq!((response.text(), response.trailers), (String::new(), vec![("x-checksum".into(), "42".into())]));
    // a client that cannot take trailers gets none
    assert_eq!(server.request(request.replace("TE: trailers\r\n", "")).trailers, []);

    let uploaded = serve(UPLOAD, &["-w", "1"]).request(request);
    assert_eq!(uploaded.json()["trailers"], json!({"x-checksum": "42"}));
}

#[test]
fn what_is_there_at_once_has_a_length_and_needs_no_chunks() {
    let server = serve(STREAM, &["-w", "1"]);
    for (chunks, bytes) in [(3, 100_000), (1, 1), (100, 10)] {
        let response = server.get(&format!("/?chunks={chunks}&bytes={bytes}"));
        let expected: Vec<u8> = (b'a'..=b'z').cycle().take(chunks).flat_map(|letter| vec![letter; bytes]).collect();
        assert!(response.body == expected, "{chunks} chunks of {bytes} bytes: {:?}", response.headers);
    }
    // one that has returned has written all of it
    for guest in [HELLO_HTTP, CRASH] {
        let response = serve(guest, &["-w", "1"]).get("/");
        assert_eq!(response.header("content-length"), Some(&*response.body.len().to_string()));
        assert_eq!((response.header("transfer-encoding"), response.chunks.len()), (None, 0));
    }
    let response = serve(FOREIGN_HTTP, &["-w", "1"]).post("/echo", "");
    assert_eq!((response.header("content-length"), response.text()), (Some("0"), String::new()));
}

#[test]
fn what_has_no_body_has_none() {
    let server = serve(CRASH, &["-w", "1"]);
    // what follows on the same connection would be taken for the body, or the body for what follows
    let mut client = server.connect();
    for (request, status, length) in [
        ("HEAD /", 200, Some("13")),
        ("HEAD /short", 200, Some("100")),
        ("HEAD /late?ms=20", 200, None),
        ("GET /status?code=204", 204, None),
        ("GET /status?code=304", 304, None),
        ("HEAD /status?code=404", 404, Some("11")),
    ] {
        client.send(format!("{request} HTTP/1.1\r\nHost: a\r\n\r\n"));
        let response = client.response();
        assert_eq!((response.status, response.header("content-length")), (status, length), "{request}: {response:?}");
        assert_eq!(response.header("transfer-encoding"), None, "{request}");
        client.send_get("/");
        assert_eq!(client.response().json(), json!({"handled": 1}), "after {request}");
    }
    // nor has what wrun itself says
    client.send("HEAD /trap HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.response().status, 500);
    client.send_get("/");
    assert_eq!(client.response().json(), json!({"handled": 1}));
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
fn every_request_has_an_id_of_its_own() {
    let server = serve(UPLOAD, &["-w", "2", "--balance", "slots"]);
    let mut clients: Vec<Client> = (0..8).map(|_| server.connect()).collect();
    let mut ids = vec![];
    for n in 0..40 {
        let client = &mut clients[n % 8];
        client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: forged\r\n\r\n");
        let response = client.response();
        let id = response.header("x-request-id").unwrap().to_owned();
        assert!(!response.text().contains("forged") && sees(&response, "x-request-id", &id), "{}", response.text());
        ids.push(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 40, "{ids:?}");
}

/// Whether the guest has seen a header.
#[track_caller]
fn sees(response: &Response, name: &str, value: &str) -> bool {
    response.json()["headers"].as_array().unwrap().contains(&json!([name, value]))
}

#[test]
fn only_trusted_proxies_say_whom_they_speak_for() {
    const HEADERS: [(&str, &str); 7] = [
        ("x-request-id", "mine"),
        ("x-forwarded-for", "9.9.9.9"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "h.example"),
        ("x-forwarded-port", "444"),
        ("x-real-ip", "8.8.8.8"),
        ("forwarded", "for=1.1.1.1"),
    ];
    let proxied: String = HEADERS.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let ask = |server: &Server| server.request(format!("GET / HTTP/1.1\r\nHost: a\r\n{proxied}\r\n"));
    for stranger in [&[][..], &["--trust-proxy", "10.0.0.0/8"], &["--trust-proxy", "::1"]] {
        let response = ask(&serve(UPLOAD, &[&["-w", "1"], stranger].concat()));
        for (name, value) in HEADERS {
            assert!(!sees(&response, name, value), "{name} with {stranger:?}: {}", response.text());
        }
        assert_ne!(response.header("x-request-id"), Some("mine"));
        assert_eq!((&response.json()["scheme"], &response.json()["authority"]), (&json!("HTTP"), &json!("a")));
    }
    for trusted in ["127.0.0.1", "127.0.0.0/8", "0.0.0.0/0"] {
        let response = ask(&serve(UPLOAD, &["-w", "1", "--trust-proxy", "10.1.1.1", "--trust-proxy", trusted]));
        for (name, value) in HEADERS {
            assert!(sees(&response, name, value), "{name} with {trusted}: {}", response.text());
        }
        assert_eq!((response.header("x-request-id"), &response.json()["scheme"]), (Some("mine"), &json!("HTTPS")));
    }
    wrun(["cluster", UPLOAD, "--listen", "0", "--trust-proxy", "me"]).run().code(2).stderr_has("expected an address");
}

/// A request whose client would like to write the log itself.
const HOSTILE: &str = "GET /x\"?y\\ HTTP/1.1\r\nHost: a\r\nConnection: close\r\nUser-Agent: a\"b\u{9b}\u{202e}\\\r\n\
    Referer: http://r/\r\nTraceparent: 00-ab-cd-01\r\nX-Forwarded-For: 6.6.6.6, 9.9.9.9\r\n\r\n";

#[test]
fn the_access_log_has_a_line_for_each_request() {
    let mut server = serve(HELLO_HTTP, &["-w", "1", "--access-log", "--trust-proxy", "127.0.0.1"]);
    let response = server.request(HOSTILE);
    let line = server.stderr_line_with("GET");
    assert!(line.starts_with("9.9.9.9 - - [20"), "{line}");
    let (length, id) = (response.body.len(), response.header("x-request-id").unwrap());
    let agent = "a\\\"b\\u{9b}\\u{202e}\\\\";
    let rest = format!("] \"GET /x\\\"?y\\\\ HTTP/1.1\" 200 {length} \"http://r/\" \"{agent}\" ");
    let end = line.split_once(&rest).unwrap_or_else(|| panic!("{line}\n{rest}")).1;
    assert!(end.ends_with(&format!("us {id} 1 00-ab-cd-01")), "{line}");
    server.request("HEAD / HTTP/1.0\r\nX-Request-Id: \"\\\u{85}\r\n\r\n");
    let line = server.stderr_line_with("HEAD");
    assert!(line.starts_with("127.0.0.1 - - [") && line.contains("] \"HEAD / HTTP/1.0\" 200 0 \"-\" \"-\" "), "{line}");
    assert!(line.ends_with("us \\\"\\\\\\u{85} 1 -"), "{line}");
}

#[test]
fn the_access_log_tells_of_what_was_no_request_too() {
    let mut server = serve(HELLO_HTTP, &["-w", "1", "--access-log", "--header-max", "8KiB", "--header-timeout", "1s"]);
    let long = "x".repeat(9 << 10);
    for (bytes, status) in [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a", 408),
        ("GET /<> HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n", 400),
        (&*format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n"), 431),
    ] {
        assert_eq!(server.request(bytes).status, status, "{bytes:.60}");
        let line = server.stderr_line_with("127.0.0.1");
        assert!(line.contains(&format!("] \"- - -\" {status} 0 \"-\" \"-\" ")), "{bytes:.60}: {line}");
        let why = line.rsplit_once(" - \"").unwrap_or_else(|| panic!("{bytes:.60}: {line}")).1;
        assert!(why.ends_with('"') && why.len() > 5, "{bytes:.60}: {line}");
    }
}

#[test]
fn the_access_log_has_one_line_for_a_request_whose_body_breaks_off() {
    let mut server = serve(UPLOAD, &["-w", "1", "--access-log"]);
    let mut client = server.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n");
    assert_eq!(client.response().json()["error"], "connection terminated");
    // what is told of the connection is told when it ends
    assert!(client.is_closed());
    server.get("/next");
    for start in ["POST / HTTP/1.1\" 200 ", "GET /next HTTP/1.1\" 200 "] {
        let line = server.stderr_line_with("127.0.0.1");
        assert!(line.contains(&format!("] \"{start}")), "{line}");
    }
}

#[test]
fn the_access_log_can_be_json() {
    let mut server = serve(HELLO_HTTP, &["-w", "1", "--access-log", "--log-format", "json"]);
    let response = server.request(HOSTILE);
    let mut record = event(&mut server, "access");
    let numbers = ["time_ms", "took_us"].map(|field| record.as_object_mut().unwrap().remove(field).unwrap());
    assert!(numbers.iter().all(|number| number.as_u64() > Some(0)), "{numbers:?}");
    let expected = json!({
        "event": "access", "worker": 1, "client": "127.0.0.1", "method": "GET", "target": "/x\"?y\\",
        "protocol": "HTTP/1.1", "status": 200, "bytes": response.body.len(),
        "id": response.header("x-request-id"), "traceparent": "00-ab-cd-01", "referer": "http://r/",
        "user_agent": "a\"b\u{9b}\u{202e}\\",
    });
    assert_eq!(record, expected);
}

#[test]
fn the_access_log_can_be_a_file_to_which_lines_are_added() {
    for format in ["text", "json"] {
        let folder = Folder::new().file("log", "what was there\n");
        for _ in 0..2 {
            let args = ["cluster", HELLO_HTTP, "--listen", "0", "-w", "1", "--access-log=log", "--log-format", format];
            let server = Server::start(folder.wrun(args));
            server.get("/in-the-log");
            server.signal(Signal::TERM);
            let finished = server.running.wait().code(0).stderr_has("worker");
            assert!(!finished.stderr_text().contains("in-the-log"));
        }
        let log = folder.read("log");
        let lines: Vec<_> = log.lines().collect();
        assert_eq!((lines.len(), lines[0]), (3, "what was there"), "{log}");
        for line in &lines[1..] {
            assert!(line.contains("/in-the-log"), "{log}");
            assert_eq!(serde_json::from_str::<Value>(line).is_ok(), format == "json", "{log}");
        }
    }
    let args = ["cluster", HELLO_HTTP, "--listen", "0", "--access-log=no/such/folder"];
    wrun(args).run().code(125).stderr_has("could not open the log");
}

#[test]
fn a_guests_lines_come_with_its_workers_number() {
    let mut server = serve(CRASH, &["-w", "1"]);
    assert_eq!(server.get("/print?text=hi%20%1b%5b2Jthere").status, 200);
    assert_eq!(server.stderr_line_with("there"), "[1] | hi \\u{1b}[2Jthere");
    assert_eq!(server.stderr_line_with("there"), "[1] ! hi \\u{1b}[2Jthere");
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
    let mut server = serve(FOREIGN_HTTP, &["-w", "1"]);
    assert_eq!(server.get("/").text(), "Hello, wasi:http/proxy world!\n");
    assert_eq!(server.stderr_line_with("serving"), "[1] | serving /");
    let body = "back and forth, ".repeat(100_000);
    assert_eq!(server.post("/echo", &body).text(), body);
    let with = |path: &str, header: &str| {
        server.request(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{header}\r\n\r\n"))
    };
    assert_eq!(with("/echo-headers", "X-Mine: yes").header("x-mine"), Some("yes"));
    assert_eq!(with("/response-status", "X-Response-Status: 418").status, 418);
    assert_eq!(server.get("/stream-body").text().lines().count(), 5);
    assert!(server.get("/wait-response").text().starts_with("slept for "));
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/response-fail").status, 500);
    assert_eq!(server.get("/response-body-fail").status, 500, "its body is broken off");
}
