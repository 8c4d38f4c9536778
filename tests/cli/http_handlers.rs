//! `wrun cluster --listen` for handlers: a message is posted, the reply is the response.

use guest_artifacts::{DATA_PROCESSOR, ECHO, HOSTILE, WHOAMI};
use serde_json::json;

use crate::{client::Server, supervision::event, wrun::wrun};

fn serve(guest: &str, args: &[&str]) -> Server {
    Server::start(wrun(["cluster", guest, "--listen", "0", "-w", "1"]).args(args))
}

#[test]
fn a_reply_is_a_response() {
    let server = serve(ECHO, &[]);
    let response = server.post("/any/path", " {\"b\":1.10, \"a\":\"\\u00e9\"}\n");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_eq!(response.text(), "{\"b\":1.10, \"a\":\"\\u00e9\"}", "as it is written");
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
        2\r\n[1\r\n3\r\n,2]\r\n0\r\n\r\n";
    assert_eq!(server.request(chunked).text(), "[1,2]");
    let server = serve(DATA_PROCESSOR, &[]);
    assert_eq!(server.post("/", r#"{"data":[1,2,3]}"#).text(), r#"{"result":[2,4,6],"count":3}"#);
    let refused = server.post("/", r#"{"data":"x"}"#);
    assert_eq!((refused.status, refused.header("content-type")), (422, Some("application/json")));
    assert!(refused.json().as_str().is_some_and(|reason| reason.contains("does not fit")), "{}", refused.text());
}

#[test]
fn what_is_no_message_does_not_reach_the_guest() {
    let server = serve(WHOAMI, &[]);
    let kind = |body: &str| {
        let response = server.post("/", body);
        (response.status, response.json()["error"]["kind"].clone())
    };
    for body in ["", "{", "[1,]", "1 2", "\"\u{1}\""] {
        assert_eq!(kind(body), (400, json!("invalid")), "{body}");
    }
    assert_eq!(kind(&"[".repeat(129)), (400, json!("invalid")));
    let mut client = server.connect();
    for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"] {
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n0"));
        let response = client.response();
        assert_eq!((response.status, response.header("allow")), (405, Some("POST")), "{method}");
    }
    assert_eq!(server.post("/", "0").json()["handled"], json!(1), "none of them did");

    let server = serve(ECHO, &["--message-max", "100B"]);
    assert_eq!(server.post("/", "7".repeat(100)).status, 200, "just under");
    assert_eq!(server.post("/", "7".repeat(101)).status, 413, "just over");
}

#[test]
fn what_is_no_reply_does_not_reach_the_client() {
    let mut server = serve(HOSTILE, &["--message-max", "1000B", "--log-format", "json"]);
    let mut client = server.connect();
    let mut ask = |task: &str| {
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{task}", task.len()));
        client.response()
    };
    let none = ask(r#"{"do":"none"}"#);
    assert_eq!((none.status, none.header("content-type"), none.header("content-length")), (204, None, None));
    let error = ask(r#"{"do":"error"}"#);
    assert_eq!((error.status, &*error.text()), (422, r#"{"error":"as told"}"#));
    let mut refused = |task: &str, kind: &str| {
        let response = ask(task);
        assert_eq!((response.status, &response.json()["error"]["kind"]), (500, &json!(kind)), "{task}");
    };
    refused(r#"{"do":"invalid"}"#, "invalid");
    refused(r#"{"do":"giant","bytes":1001}"#, "limit");
    assert_eq!(event(&mut server, "limit")["outcome"]["limit"], "message");
    refused(r#"{"do":"deep","depth":129}"#, "invalid");
    for just_under in [r#"{"do":"giant","bytes":1000}"#, r#"{"do":"deep","depth":128}"#] {
        assert_eq!(ask(just_under).status, 200, "{just_under}");
    }
}

#[test]
fn an_instance_is_kept_and_knows_who_it_is() {
    let server = serve(WHOAMI, &["--data", "[4]"]);
    let who = server.post("/", "0").json();
    assert_eq!((&who["id"], &who["generation"], &who["kind"]), (&json!(1), &json!(1), &json!("process")));
    assert_eq!((&who["data"], &who["handled"]), (&json!([4]), &json!(1)));
    assert_eq!(server.post("/", "0").json()["handled"], json!(2));
    let fresh = serve(WHOAMI, &["--instance", "task"]);
    assert_eq!(
        [fresh.post("/", "0").json()["handled"].clone(), fresh.post("/", "0").json()["handled"].clone()],
        [1, 1]
    );
}

#[test]
fn a_handler_that_fails_fails_one_request() {
    let server = serve(HOSTILE, &["--timeout", "500ms"]);
    let status = |task: &str| server.post("/", task).status;
    assert_eq!(status(r#"{"do":"ok"}"#), 200);
    assert_eq!(status(r#"{"do":"trap"}"#), 500);
    assert_eq!(status(r#"{"do":"exit","code":3}"#), 500, "the worker is not its alone");
    assert_eq!(status(r#"{"do":"spin"}"#), 504);
    assert_eq!(status(r#"{"do":"sleep","ms":60000}"#), 504);
    assert_eq!(status(r#"{"do":"sleep","ms":1}"#), 200);
}

#[test]
fn one_task_at_a_time_and_the_others_wait() {
    let server = serve(HOSTILE, &["--queue", "1"]);
    let sleep = "{\"do\":\"sleep\",\"ms\":300}";
    let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{sleep}", sleep.len());
    let mut clients: Vec<_> = (0..4).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send(&request);
    }
    let mut statuses: Vec<u16> = clients.iter_mut().map(|client| client.response().status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 503, 503]);
}
