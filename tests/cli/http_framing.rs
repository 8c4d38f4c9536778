//! What clients send that is no request, or could be taken for another one, or is more than they may send. It is
//! answered once, the connection ends, and what hides behind it is nobody's request.

use std::{
    io::{ErrorKind, Write as _},
    thread,
};

use guest_artifacts::{CRASH, ECHO, HELLO_HTTP, UPLOAD};
use serde_json::json;

use crate::{
    client::{Client, PATIENCE, Response, Server},
    http_limits::{NOW, PEAK, serve, statuses},
};

/// A request that hides behind what is none: nobody may answer it.
const HIDDEN: &[u8] = b"GET /hidden HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

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
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000003\r\nabc\r\n0\r\na: b\r\n\r\n",
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

/// Writes to a client's server until that takes no more.
#[track_caller]
fn flood(client: &mut Client, bytes: &[u8]) {
    client.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let error = std::iter::repeat_with(|| client.stream.write(bytes)).find_map(Result::err).unwrap();
    assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
}

#[test]
fn what_has_no_end_is_cut_off_and_costs_no_memory() {
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let endless = [
        ("GET / HTTP/1.1\r\nX: ".to_owned(), "x", 431),
        ("GET /".into(), "x", 431),
        ("GET / HTTP/1.1\r\n".into(), "X: a\r\n", 431),
        (String::new(), "\r\n", 431),
        (chunked.into(), "40\r\n0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\r\n", 413),
        (format!("{chunked}fffffffffffffff\r\n"), "x", 413),
        // the guest hears of it and answers
        (format!("{chunked}1;"), "x", 200),
        (format!("{chunked}0\r\n"), "x: y\r\n", 200),
    ];
    let (server, worker) = serve(UPLOAD, &["--body-max", "16MiB"]);
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
    for flood in floods {
        flood.join().unwrap();
    }
    let grown = worker.memory_kib(PEAK) - before;
    // what is kept of floods without end would be far more
    assert!(grown < 16 << 10, "{grown} KiB");
}

#[test]
fn heads_without_end_cost_little_more_memory_than_they_have_bytes() {
    const CLIENTS: u64 = 300;
    const KIB_EACH: u64 = 60;
    let (server, worker) = serve(HELLO_HTTP, &["--header-timeout", "2s"]);
    let open = worker.open();
    server.get("/");
    let before = worker.memory_kib(NOW);
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect()).collect();
    let head = head_of(64 << 10);
    for client in &mut clients {
        client.send(&head[..60 << 10]);
    }
    assert!(clients.iter_mut().all(|client| statuses(&client.responses()) == [408]));
    let grown = worker.memory_kib(PEAK) - before;
    assert!(grown > CLIENTS * KIB_EACH && grown < 3 * CLIENTS * KIB_EACH, "{grown} KiB");
    worker.until_open(open);
}
