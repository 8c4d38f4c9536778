//! The router of a folder: what it bounds, what it tells, and its end.

use std::{
    fs,
    time::{Duration, Instant},
};

use guest_artifacts::{HELLO_HTTP, SLOW, UPLOAD};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::{
    apps::{Apps, begun, guest, kind, variant},
    client::{Client, Server},
    load::{Who, eventually},
    supervision::{children, event, gone, pid},
    wrun::Folder,
};

#[test]
fn the_limits_of_a_port_hold_at_the_router() {
    let flags = ["--header-max", "4KiB", "--uri-max", "100B", "--body-max", "1000B", "--header-timeout", "300ms"];
    let mut apps = Apps::with(|wrun| wrun.args(flags));
    apps.live("up", guest(UPLOAD));
    let get = |path: &str, more: &str| {
        apps.server.request(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{more}Connection: close\r\n\r\n")).status
    };
    // of what no app is asked for, too
    for app in ["/up", "/no"] {
        let found = if app == "/up" { 200 } else { 404 };
        assert_eq!(get(&format!("{app}?{}", "x".repeat(96)), ""), found);
        assert_eq!(get(&format!("{app}?{}", "x".repeat(97)), ""), 414);
        assert_eq!(get(app, &format!("x: {}\r\n", "x".repeat(3000))), found);
        assert_eq!(get(app, &format!("x: {}\r\n", "x".repeat(5000))), 431);
    }
    assert_eq!(apps.server.post("/up", vec![b'x'; 1000]).json()["bytes"], 1000);
    assert_eq!(kind(&apps.server.post("/up", vec![b'x'; 1001])), (413, "too-large".into()));
    // one that does not say how long it is
    let chunked = |count: usize| {
        let head = "POST /up HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunks: String = (0..count).map(|_| format!("64\r\n{}\r\n", "x".repeat(100))).collect();
        apps.server.request(format!("{head}{chunks}0\r\n\r\n"))
    };
    assert_eq!(chunked(10).json()["bytes"], 1000);
    assert_eq!(chunked(11).status, 413);
    // what can be read in two ways is read in none
    for smuggled in [
        "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        "GET /up HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ] {
        assert_eq!(apps.server.request(smuggled).status, 400, "{smuggled}");
    }
    assert_eq!(apps.server.request("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nConnection: close\r\n\r\n").status, 501);
    // whoever dawdles is cut off
    let mut client = apps.server.connect();
    client.send("GET /up HTTP/1.1\r\nHo");
    assert_eq!(client.response().status, 408);
}

#[test]
fn an_app_hears_whom_the_router_speaks_for() {
    let mut apps = Apps::new();
    apps.live("up", guest(UPLOAD));
    let forged = "GET /up/x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\n\
        X-Forwarded-Prefix: /forged\r\nX-Request-Id: mine\r\nKeep-Alive: 1\r\nX-Once: 1\r\nConnection: close, x-once\r\n\r\n";
    let response = apps.server.request(forged);
    let seen = response.json();
    let headers: Vec<(String, String)> = serde_json::from_value(seen["headers"].clone()).unwrap();
    let header =
        |name: &str| headers.iter().filter(|(header, _)| header == name).map(|(_, value)| &**value).collect::<Vec<_>>();
    assert_eq!((header("x-forwarded-for"), header("x-forwarded-prefix")), (vec!["127.0.0.1"], vec!["/up"]));
    assert_eq!((header("x-forwarded-proto"), header("x-forwarded-host")), (vec!["http"], vec!["a"]));
    assert_eq!(header("x-request-id"), [response.header("x-request-id").unwrap()]);
    assert_ne!(header("x-request-id"), ["mine"]);
    for gone in ["keep-alive", "x-once"] {
        assert_eq!(header(gone), Vec::<&str>::new(), "{gone}");
    }
    assert_eq!((&seen["scheme"], &seen["authority"]), (&json!("HTTP"), &json!("a")));
    // a proxy that is trusted is believed
    let mut apps = Apps::with(|wrun| wrun.args(["--trust-proxy", "127.0.0.1", "--access-log"]));
    apps.live("up", guest(UPLOAD));
    let seen = apps.server.request(forged).json();
    assert_eq!(seen["scheme"], "HTTPS");
    let record = event(&mut apps.server, "access");
    assert_eq!((&record["client"], &record["app"], &record["id"]), (&json!("9.9.9.9"), &json!("up"), &json!("mine")));
    assert_eq!((&record["target"], &record["status"]), (&json!("/up/x"), &json!(200)));
    assert_eq!(record["version"], apps.listed("up")["version"]);
}

#[test]
fn an_access_log_names_the_app_and_its_version() {
    let folder = Folder::new().file("apps/up.wasm", guest(UPLOAD));
    let server = Server::start(folder.wrun(["watch", "apps", "--listen", "0", "--access-log=access.log"]));
    eventually("it is live", || server.get("/up").status == 200);
    let version = server.get("/").json()["apps"][0]["version"].as_str().unwrap().to_owned();
    assert_eq!(server.get("/nobody").status, 404);
    eventually("both are logged", || folder.read("access.log").contains("/nobody"));
    let log = folder.read("access.log");
    let line = |target: &str| log.lines().rfind(|line| line.contains(target)).unwrap().to_owned();
    assert!(line("\"GET /up HTTP/1.1\" 200 ").ends_with(&format!(" up@{version} -")), "{log}");
    assert!(line("\"GET /nobody HTTP/1.1\" 404 ").ends_with(" - -"), "{log}");
}

#[test]
fn the_router_is_replaced_when_it_dies() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    let worker = Who::says(&apps.get("/app")).pid;
    let router = children(apps.server.pid()).into_iter().find(|child| child.as_raw_pid() != worker).unwrap();
    kill_process(router, Signal::KILL).unwrap();
    assert!(gone(router));
    // whoever comes meanwhile waits at the port
    assert_eq!(Who::says(&apps.get("/app")).pid, worker, "apps go on");
    assert_eq!(apps.listed("app")["state"], "live");
    apps.live("app", variant(HELLO_HTTP, 1));
    assert_ne!(Who::says(&apps.get("/app")).pid, worker);
}

#[test]
fn the_router_is_in_a_jail_of_its_own() {
    let mut apps = Apps::with(|wrun| wrun.args(["--isolation", "jail"]));
    let fork = pid(&children(apps.server.pid()).first().map(|pid| json!(pid.as_raw_pid())).unwrap());
    let status = fs::read_to_string(format!("/proc/{}/status", fork.as_raw_pid())).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((&*field("Seccomp:"), &*field("NoNewPrivs:")), ("2", "1"));
    assert_eq!(field("CapEff:"), "0000000000000000");
    apps.live("app", guest(HELLO_HTTP));
    assert_eq!(apps.get("/app").status, 200);
}

#[test]
fn a_signal_lets_requests_finish_and_a_second_one_does_not() {
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=700");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    apps.server.signal(Signal::TERM);
    eventually("nobody is let in", || Client::try_connect(apps.server.address).is_err());
    assert_eq!(client.response().json(), json!({"slept": 700}));
    apps.server.running.wait().code(0);

    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "60s"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=60000");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    let (start, workers) = (Instant::now(), children(apps.server.pid()));
    apps.server.signal(Signal::TERM);
    eventually("nobody is let in", || Client::try_connect(apps.server.address).is_err());
    apps.server.signal(Signal::TERM);
    apps.server.running.wait().code(143);
    assert!(start.elapsed() < Duration::from_secs(30) && workers.into_iter().all(gone));
}
