//! The library as a program uses it: a pool from Rust, and what it makes of workers that lie.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, Instant},
};

use guest_artifacts::{
    CRASH_AT_START, ECHO, HELLO, HELLO_HTTP, HOSTILE, HOSTILE_COMMAND, HOSTILE_COMMAND_P1, SLOW, WHOAMI,
};
use wrun::{
    Cache, Cluster, Error, Isolation, Run, ci,
    cluster::{Answer, Builder, Interrupt},
    event::Event,
    grant::{Denied, Grants},
    limits::Limits,
    message::Message,
    outcome::{End, LimitKind, Stage},
};

/// Workers are made of the command: this test's own program does not call `wrun::init`.
const WRUN: &str = env!("CARGO_BIN_EXE_wrun");

fn cache() -> Cache {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let own = fs::Permissions::from_mode(0o700);
    Cache::at(Some(DIR.get_or_init(|| tempfile::Builder::new().permissions(own).tempdir().unwrap()).path()))
}

fn pool(guest: &str) -> Builder {
    Cluster::builder(guest).program(WRUN).cache(cache()).workers(2)
}

/// The same behind a port that is free.
fn port(guest: impl Into<PathBuf>) -> Builder {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    Cluster::builder(guest).program(WRUN).cache(cache()).workers(2).listen(any)
}

/// Sends a `GET` on a connection of its own.
fn send(address: SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    stream
}

/// The whole response.
fn get(address: SocketAddr, path: &str) -> String {
    let mut response = String::new();
    send(address, path).read_to_string(&mut response).unwrap();
    response
}

/// Waits until a port is free. The children of other tests of this process may have it, from their fork to their exec.
fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

fn message(text: &str) -> Message {
    Message::parse(text).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn requests_are_answered() {
    block_on(async {
        let cluster = pool(ECHO).start().await.unwrap();
        assert_eq!(cluster.request(message("[1.10]")).await.unwrap(), Answer::Reply(message("[1.10]")));
        cluster.shutdown().await.unwrap();
    });
}

#[test]
fn many_requests_at_once_get_their_own_answers() {
    block_on(async {
        let cluster = std::sync::Arc::new(pool(ECHO).queue(16).start().await.unwrap());
        let mut asked = tokio::task::JoinSet::new();
        for n in 0..2000 {
            let cluster = cluster.clone();
            asked.spawn(async move {
                let text = n.to_string();
                assert_eq!(cluster.request(message(&text)).await.unwrap(), Answer::Reply(message(&text)));
            });
        }
        assert_eq!(asked.join_all().await.len(), 2000);
    });
}

#[test]
fn a_pool_runs_on_the_callers_thread_when_asked() {
    block_on(async {
        let (cluster, run) = pool(WHOAMI).start_here().await.unwrap();
        let asked = async {
            let Answer::Reply(who) = cluster.request(Message::null()).await.unwrap() else { panic!("no reply") };
            cluster.shutdown().await.unwrap();
            who
        };
        let (who, ended) = tokio::join!(asked, run);
        ended.unwrap();
        assert!(who.as_str().contains("\"count\":2"), "{who}");
    });
}

#[test]
fn a_shutdown_finishes_what_is_begun() {
    block_on(async {
        let cluster = std::sync::Arc::new(pool(HOSTILE).workers(1).start().await.unwrap());
        let asking = tokio::spawn({
            let cluster = cluster.clone();
            async move { cluster.request(message(r#"{"do":"sleep","ms":300}"#)).await.unwrap() }
        });
        // behind the first in the same worker: when it is answered, the first has been
        assert_eq!(cluster.request(message(r#"{"do":"ok"}"#)).await.unwrap(), Answer::Reply(message(r#"{"ok":true}"#)));
        assert_eq!(asking.await.unwrap(), Answer::Reply(message(r#"{"ms":300}"#)));
        std::sync::Arc::into_inner(cluster).unwrap().shutdown().await.unwrap();
    });
}

#[test]
fn a_dropped_pool_takes_its_workers_along() {
    block_on(async {
        let cluster = pool(WHOAMI).workers(1).start().await.unwrap();
        let Answer::Reply(who) = cluster.request(Message::null()).await.unwrap() else { panic!("no reply") };
        let pid = who.to::<serde_json::Value>().unwrap()["pid"].as_u64().unwrap();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(cluster);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "reaped before the drop returns");
    });
}

#[test]
fn what_cannot_start_says_why() {
    block_on(async {
        let error = Cluster::builder(ECHO).cache(cache()).start().await.unwrap_err();
        assert!(error.to_string().contains("wrun::init()"), "{error}");
        let error = pool(HELLO).start().await.unwrap_err();
        assert_eq!(error.to_string(), "expected a handler guest, found a command guest (component)");
        assert_eq!(error.hint().as_deref(), Some("use `wrun run`"));
        let error = pool("nope.wasm").start().await.unwrap_err();
        assert!(matches!(error, Error::Load(wrun::LoadError::NotFound { .. })), "{error}");
        let error = pool(ECHO).workers(0).start().await.unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
    });
}

#[test]
fn two_hundred_starts_and_stops_leave_nothing() {
    let count = |what: &str| fs::read_dir(what).unwrap().count();
    let children = || {
        let children: BTreeSet<PathBuf> = fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
            .flat_map(|list| list.split_whitespace().map(PathBuf::from).collect::<Vec<_>>())
            .collect();
        children
    };
    // in a process of its own: other tests of this one come and go meanwhile
    if std::env::var_os("WRUN_TEST_CYCLES").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "two_hundred_starts_and_stops_leave_nothing", "--nocapture"])
            .env("WRUN_TEST_CYCLES", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let cycle = || {
        block_on(async {
            let cluster = pool(ECHO).start().await.unwrap();
            assert!(matches!(cluster.request(Message::null()).await.unwrap(), Answer::Reply(_)));
            cluster.shutdown().await.unwrap();
        });
    };
    let cycle_of_a_port = || {
        block_on(async {
            let cluster = port(HELLO_HTTP).start().await.unwrap();
            cluster.reload().await.unwrap();
            cluster.shutdown().await.unwrap();
        });
    };
    cycle();
    cycle_of_a_port();
    let (files, threads) = (count("/proc/self/fd"), count("/proc/self/task"));
    (0..200).for_each(|_| cycle());
    (0..50).for_each(|_| cycle_of_a_port());
    assert_eq!(count("/proc/self/fd"), files);
    assert_eq!(count("/proc/self/task"), threads);
    assert_eq!(children(), BTreeSet::new());
}

/// A worker that answers the hello with these bytes, and then waits.
fn liar(folder: &Path, bytes: &[u8]) -> PathBuf {
    let (script, answer) = (folder.join("liar"), folder.join("bytes"));
    fs::write(&answer, bytes).unwrap();
    fs::write(&script, format!("#!/bin/sh\ncat {} >&0\nexec sleep 60\n", answer.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    script
}

/// One frame.
fn frame(length: u32, kind: u8, id: u64, body: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes()[..], &[kind], &id.to_le_bytes(), body].concat()
}

#[test]
fn workers_that_lie_are_refused_by_name() {
    block_on(async {
        // compiled once, by an honest program
        pool(ECHO).start().await.unwrap().shutdown().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        for (bytes, reason) in [
            (frame(u32::MAX, 5, 1, b""), "a frame of 4294967295 bytes came, at most 1310720 are taken"),
            (frame((1 << 20) + (256 << 10) + 1, 5, 1, b""), "a frame of 1310721 bytes came, at most 1310720 are taken"),
            (frame(0, 99, 1, b""), "a frame of unknown kind 99 came"),
            (frame(1, 5, 7, b"1"), "it answered task 7, which it does not have"),
            (frame(2, 8, 1, b"{}"), "it sent a broken outcome: missing field"),
            (frame(4, 9, 0, b"nope"), "it sent a broken message: not JSON: expected ident"),
            (frame(0, 4, 1, b""), "it sent Task, which only a primary may"),
            (frame(2, 20, 0, b"{}"), "it sent what is no refusal"),
            (b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), "a frame of 1347703880 bytes came, at most 1310720 are taken"),
        ] {
            let liar = liar(folder.path(), &bytes);
            let error = pool(ECHO).workers(1).program(liar).start().await.unwrap_err();
            let Error::PoolFailed { last } = &error else { panic!("{error}") };
            let End::Failed { stage: Stage::Protocol, reason: found, .. } = &last.end else { panic!("{last:?}") };
            assert!(found.starts_with(reason), "{found}");
        }
    });
}

#[test]
fn a_worker_that_says_nothing_sensible_and_leaves_is_a_dead_one() {
    block_on(async {
        pool(ECHO).start().await.unwrap().shutdown().await.unwrap();
        let error = pool(ECHO).workers(1).program("/bin/false").start().await.unwrap_err();
        let Error::PoolFailed { last } = &error else { panic!("{error}") };
        assert_eq!(last.end, End::Exited { code: 1 });
        let error = pool(ECHO).workers(1).program("/no/such/program").start().await.unwrap_err();
        assert!(error.to_string().contains("no process could be started"), "{error}");
    });
}

#[test]
fn events_tell_a_whole_life() {
    block_on(async {
        let cluster = pool(HOSTILE).workers(1).start().await.unwrap();
        let mut events = cluster.events();
        let answer = cluster.request(message(r#"{"do":"exit","code":0}"#)).await.unwrap();
        assert!(matches!(answer, Answer::Ended(outcome) if outcome.end == End::Exited { code: 0 }));
        assert!(matches!(cluster.request(message(r#"{"do":"ok"}"#)).await.unwrap(), Answer::Reply(_)));
        cluster.shutdown().await.unwrap();
        let mut names = vec![];
        while let Ok(event) = events.recv().await {
            names.push(match event {
                Event::Fork { generation, .. } => format!("fork {generation}"),
                Event::Exit { outcome, .. } => format!("exit, voluntary {}", outcome.voluntary),
                other => serde_json::to_value(&other).unwrap()["event"].as_str().unwrap().to_owned(),
            });
        }
        let expected =
            ["limit", "exit, voluntary false", "restart", "fork 2", "online", "disconnect", "exit, voluntary true"];
        assert_eq!(names, expected);
    });
}

#[test]
fn a_port_is_served_and_each_request_is_told() {
    block_on(async {
        let cluster = port(HELLO_HTTP).access_log(true).start().await.unwrap();
        let address = cluster.address().unwrap();
        let mut events = cluster.events();
        let response = get(address, "/a?b=c");
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n") && response.contains("\"generation\":1"), "{response}");
        let record = loop {
            if let Event::Access { record, .. } = events.recv().await.unwrap() {
                break record;
            }
        };
        assert_eq!((&*record.method, &*record.target, record.status), ("GET", "/a?b=c", 200));
        assert_eq!(record.client, address.ip());
        cluster.shutdown().await.unwrap();
        eventually(|| TcpStream::connect(address).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused));
    });
}

#[test]
fn a_port_is_reloaded() {
    block_on(async {
        let cluster = port(HELLO_HTTP).start().await.unwrap();
        let address = cluster.address().unwrap();
        cluster.reload().await.unwrap();
        // the old ones may still be about to hear of it
        let mut answers = (0..1000).map(|_| get(address, "/"));
        assert!(answers.any(|answer| answer.contains("\"generation\":2")));
        // the second begins after the first, and the third with it
        let mut events = cluster.events();
        let (first, second, third) = tokio::join!(cluster.reload(), cluster.reload(), cluster.reload());
        assert!(first.is_ok() && second.is_ok() && third.is_ok());
        cluster.shutdown().await.unwrap();
        let mut reloads = vec![];
        while let Ok(event) = events.recv().await {
            if let Event::Reload { error, .. } = event {
                reloads.push(error);
            }
        }
        assert_eq!(reloads, [None, None]);
    });
}

#[test]
fn a_reload_that_fails_says_why_and_changes_nothing() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let guest = folder.path().join("app.wasm");
        let install = |from: &str| fs::copy(from, &guest).unwrap();
        install(HELLO_HTTP);
        let cluster = port(&guest).start().await.unwrap();
        let address = cluster.address().unwrap();
        fs::write(&guest, "no guest").unwrap();
        assert!(matches!(cluster.reload().await.unwrap_err(), Error::Load(_)));
        let all = tokio::join!(cluster.reload(), cluster.reload(), cluster.reload());
        assert!(all.0.is_err() && all.1.is_err() && all.2.is_err(), "{all:?}");
        install(CRASH_AT_START);
        let error = cluster.reload().await.unwrap_err();
        assert!(matches!(&error, Error::Reload(reason) if reason.contains("trapped")), "{error}");
        fs::remove_file(&guest).unwrap();
        let error = cluster.reload().await.unwrap_err();
        assert!(matches!(error, Error::Load(wrun::LoadError::NotFound { .. })), "{error}");
        for _ in 0..20 {
            assert!(get(address, "/").contains("\"generation\":1"));
        }
        install(HELLO_HTTP);
        cluster.reload().await.unwrap();
        cluster.shutdown().await.unwrap();
    });
}

#[test]
fn a_shutdown_of_a_port_finishes_the_requests_that_are_begun() {
    block_on(async {
        let cluster = port(SLOW).start().await.unwrap();
        let mut stream = send(cluster.address().unwrap(), "/late?ms=700");
        let mut begun = vec![0; 12];
        stream.read_exact(&mut begun).unwrap();
        assert_eq!(begun, b"HTTP/1.1 200");
        cluster.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with("early\n\r\n0\r\n\r\n"), "{rest}");
    });
}

#[test]
fn a_dropped_port_is_free_at_once_whatever_is_under_way() {
    block_on(async {
        let cluster = port(SLOW).grace(Duration::from_hours(1)).start().await.unwrap();
        let address = cluster.address().unwrap();
        let mut stream = send(address, "/late");
        stream.read_exact(&mut [0; 12]).unwrap();
        drop(cluster);
        eventually(|| TcpListener::bind(address).is_ok());
        let mut rest = vec![];
        // whether the end is a clean one is the kernel's choice
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"0\r\n\r\n"));
    });
}

#[test]
fn what_a_port_has_not_is_refused() {
    block_on(async {
        let served = port(HELLO_HTTP).start().await.unwrap();
        let error = served.request(Message::null()).await.unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("serves a port")), "{error}");
        let taken = served.address().unwrap();
        let error = port(HELLO_HTTP).listen(taken).start().await.unwrap_err();
        assert!(matches!(&error, Error::Listen { address, .. } if *address == taken), "{error}");
        assert_eq!(error.exit_code() as u8, 98);
        let tasks = pool(ECHO).start().await.unwrap();
        assert_eq!(tasks.address(), None);
        let error = tasks.reload().await.unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("serves a port")), "{error}");
        assert!(matches!(tasks.request(message("1")).await.unwrap(), Answer::Reply(_)), "and it goes on");
        for (builder, reason) in [
            (port(HELLO_HTTP).interrupt(Interrupt::Kill), "`kill` would end all the connections"),
            (port(ECHO).probe("/"), "a handler has no path"),
            (port(HELLO), "expected an http guest, found a command guest"),
            (pool(HELLO_HTTP), "expected a handler guest, found an http guest"),
        ] {
            let error = builder.start().await.unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    });
}

#[test]
fn jobs_are_run_and_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let job = |id: &str, args: &str| format!("[[job]]\nid = '{id}'\nwasm = '{HOSTILE_COMMAND}'\nargs = [{args}]\n");
    let text = format!("version = 1\n{}{}", job("good", "'say', 'hello'"), job("bad", "'trap'"));
    let file = folder.path().join("wrun-ci.toml");
    fs::write(&file, text).unwrap();
    let jobs = || ci::Builder::new(&file).program(WRUN).cache(cache());
    let mut told = vec![];
    let done =
        ci::run(jobs().plan().unwrap(), |event| told.push(event.json("x")["t"].as_str().unwrap().to_owned())).unwrap();
    assert_eq!((done.record.exit, done.record.counts().get(ci::Status::Trap)), (100, 1));
    assert_eq!(told.iter().filter(|kind| *kind == "job.end").count(), 2);
    assert_eq!(ci::RunRecord::read(&folder.path().join("artifacts")), Some(done.record));
    assert_eq!(ci::log_tail(&folder.path().join("artifacts/logs/good.stdout")), "hello");
    let selection = ci::Selection { filter: Some("id(goo*)".parse().unwrap()), ..ci::Selection::default() };
    let planned = jobs().selection(selection).plan().unwrap();
    assert_eq!((planned.list()[0].job.as_str(), planned.unselected()), ("good", 1));
    assert_eq!(ci::run(planned, |_| {}).unwrap().record.exit, 0);
    let none = ci::Selection { filter: Some("!all()".parse().unwrap()), ..ci::Selection::default() };
    assert!(matches!(ci::run(jobs().selection(none).plan().unwrap(), |_| {}), Err(ci::Error::Nothing)));
    fs::write(&file, "version = 1\n[[jbo]]").unwrap();
    let Err(ci::Error::File { flaws, .. }) = jobs().plan() else { panic!("it is no job file") };
    assert_eq!((flaws[0].line, flaws[0].column, flaws.len()), (Some(2), 3, 1));
}

#[test]
fn a_run_that_sleeps_in_this_process_ends_by_its_time_limit() {
    let limits = Limits { timeout: Some(Duration::from_millis(150)), ..Limits::of_a_run() };
    let run = Run::new(HOSTILE_COMMAND_P1).args(["sleep", "5000"]).limits(limits).program(WRUN).cache(cache());
    let outcome = run.run().unwrap();
    assert!(matches!(outcome.end, End::Limit { limit: LimitKind::Time, .. }), "{outcome:?}");
    assert!(outcome.usage.wall_ms < 4000, "{outcome:?}");
}

#[test]
fn what_a_run_was_refused_is_heard() {
    for isolation in [Isolation::Thread, Isolation::Jail] {
        let (told, heard) = std::sync::mpsc::channel();
        let grants = Grants { tcp: vec!["127.0.0.1:1".parse().unwrap()], ..Grants::default() };
        let run = Run::new(HOSTILE_COMMAND).args(["connect", "127.0.0.1:2"]).grants(grants).isolation(isolation);
        let run = run.program(WRUN).cache(cache()).on_denied(move |denied| told.send(denied.clone()).unwrap());
        assert_eq!(run.run().unwrap().end, End::Exited { code: 1 });
        let reason = "the guest may not connect to 127.0.0.1:2".to_owned();
        assert_eq!(heard.iter().collect::<Vec<_>>(), [Denied { grant: "--tcp 127.0.0.1:2".into(), reason }]);
    }
}
