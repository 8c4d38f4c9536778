//! What the clients of a port feel when its workers die, hang, are replaced or asked to end: as little as can be.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    net::{TcpListener, TcpStream},
    path::PathBuf,
};

use guest_artifacts::{CRASH, CRASH_AT_START, ECHO, HELLO, HELLO_HTTP, SLOW};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    client::{Client, Server},
    load::{Load, Who, eventually},
    supervision::{children, event, events, gone, pid},
    wrun::{Folder, Wrun, wrun},
};

/// `wrun cluster` with so many workers behind any port that is free.
fn cluster(guest: &str, workers: u32) -> Wrun {
    wrun(["cluster", guest, "--listen", "0", "-w", &workers.to_string()])
}

/// Starts it, and waits until all its workers take connections; their processes.
#[track_caller]
fn serve(wrun: Wrun, workers: u32) -> (Server, Vec<Pid>) {
    let mut server = Server::start(wrun.args(["--log-format", "json"]));
    let pids = (0..workers).map(|_| pid(&event(&mut server, "fork")["pid"])).collect();
    (0..workers).for_each(|_| drop(event(&mut server, "online")));
    // they are told to begin when they are online; a moment later there is a number on their board
    let board = memory(server.pid(), "wrun-board");
    eventually("all take connections", || fs::read(&board).unwrap().chunks(8).all(|slot| slot[..4] != [0; 4]));
    (server, pids)
}

/// The file of memory that a process shares under this name.
#[track_caller]
fn memory(process: Pid, name: &str) -> PathBuf {
    let files = fs::read_dir(format!("/proc/{}/fd", process.as_raw_pid())).expect("it is there").flatten();
    let is_it = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.ends_with(format!("memfd:{name} (deleted)")));
    files.map(|file| file.path()).find(is_it).expect("its file")
}

/// All processes of a pool, in the order of their start.
fn processes(server: &Server) -> Vec<Pid> {
    let mut pids = children(server.pid());
    pids.sort_by_key(|pid| pid.as_raw_pid());
    pids
}

/// Waits until a worker has begun so many requests: the third of its counters.
#[track_caller]
fn until_begun(worker: Pid, requests: u64) {
    let page = memory(worker, "wrun-page");
    eventually("its requests are begun", || fs::read(&page).unwrap()[16..24] == requests.to_ne_bytes());
}

/// So many clients, each with a request that is not answered yet.
fn ask_at_once(server: &Server, clients: usize) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..clients).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send_get("/");
    }
    clients
}

/// Stops a process, and waits until all its threads stand still.
#[track_caller]
fn freeze(worker: Pid) {
    kill_process(worker, Signal::STOP).unwrap();
    eventually("it stands still", || {
        let threads = fs::read_dir(format!("/proc/{}/task", worker.as_raw_pid())).unwrap().flatten();
        let states = threads.map(|thread| fs::read_to_string(thread.path().join("stat")).unwrap_or_default());
        states.into_iter().all(|state| state.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
    });
}

/// Puts a guest where another one is, at once as a careful installer does.
fn install(folder: &Folder, guest: impl AsRef<[u8]>) {
    fs::write(folder.path("new"), guest).unwrap();
    fs::rename(folder.path("new"), folder.path("app.wasm")).unwrap();
}

/// Every process was told of when it started, when it was ready if it ever was, and when it ended; how many there were.
#[track_caller]
fn lives(events: &[Value]) -> usize {
    let mut lives: BTreeMap<i64, Vec<&str>> = BTreeMap::new();
    for event in events {
        if let Some(pid) = event["pid"].as_i64() {
            lives.entry(pid).or_default().push(event["event"].as_str().unwrap());
        }
    }
    for life in lives.values() {
        assert!(life == &["fork", "online", "exit"] || life == &["fork", "exit"], "{events:?}");
    }
    lives.len()
}

#[test]
fn connections_are_spread_over_the_workers() {
    // left to the kernel, one worker would have nearly all
    let spread = |answers: &[Who]| {
        let first = answers.iter().filter(|who| who.worker == 1).count();
        assert!(answers.len() == 64 && (24..=40).contains(&first), "{first} of {}", answers.len());
    };
    let (server, _) = serve(cluster(HELLO_HTTP, 2), 2);
    let mut clients = ask_at_once(&server, 64);
    spread(&clients.iter_mut().map(|client| Who::says(&client.response())).collect::<Vec<_>>());
    // and one after the other, when both have nothing else to do
    let (server, _) = serve(cluster(HELLO_HTTP, 2), 2);
    let mut clients = vec![];
    let one = |_| {
        let mut client = ask_at_once(&server, 1).remove(0);
        let who = Who::says(&client.response());
        clients.push(client);
        who
    };
    spread(&(0..64).map(one).collect::<Vec<_>>());
}

#[test]
fn a_killed_worker_takes_only_the_requests_along_that_it_had() {
    for balance in ["shared", "slots"] {
        let (mut server, pids) = serve(cluster(HELLO_HTTP, 2).args(["--balance", balance]), 2);
        let load = Load::start(&server, 16);
        load.until_answered_by(&pids);
        kill_process(pids[0], Signal::KILL).unwrap();
        let exit = event(&mut server, "exit");
        assert_eq!((&exit["worker"], &exit["outcome"]["signal"]), (&json!(1), &json!(9)), "{exit}");
        let restart = event(&mut server, "restart");
        assert_eq!((&restart["worker"], &restart["after_ms"]), (&json!(1), &json!(0)));
        let fork = event(&mut server, "fork");
        assert_eq!((&fork["worker"], &fork["generation"]), (&json!(1), &json!(2)));
        assert_eq!(event(&mut server, "online")["pid"], fork["pid"]);
        eventually("the new one answers", || Who::says(&server.get("/")).is(pid(&fork["pid"])));
        load.until_more(100);
        load.stop().is_harmed_by(pids[0]);
        assert_eq!(processes(&server).len(), 2);
    }
}

#[test]
fn connections_that_wait_outlive_the_worker_that_could_have_taken_them() {
    for balance in ["shared", "slots"] {
        let patient = ["--balance", balance, "--heartbeat", "1m"];
        let (server, pids) = serve(cluster(HELLO_HTTP, 2).args(patient), 2);
        freeze(pids[0]);
        freeze(pids[1]);
        let mut clients = ask_at_once(&server, 32);
        kill_process(pids[0], Signal::KILL).unwrap();
        kill_process(pids[1], Signal::CONT).unwrap();
        let answers: Vec<Who> = clients.iter_mut().map(|client| Who::says(&client.response())).collect();
        assert!(answers.iter().any(|who| who.is(pids[1])), "{answers:?}");
        // those at the socket of the dead one are answered by whoever has it now
        let successor = answers.iter().find(|who| who.worker == 1).map(|who| who.generation);
        assert!(successor == Some(2) || (successor.is_none() && balance == "shared"), "{answers:?}");
    }
}

#[test]
fn a_worker_that_hangs_is_replaced_and_the_other_goes_on_meanwhile() {
    let (mut server, pids) = serve(cluster(HELLO_HTTP, 2).args(["--heartbeat", "500ms"]), 2);
    let load = Load::start(&server, 12);
    load.until_answered_by(&pids);
    freeze(pids[0]);
    // long before it is noticed
    load.until_more(20);
    let exit = event(&mut server, "exit");
    assert_eq!((&exit["worker"], &exit["outcome"]["stage"]), (&json!(1), &json!("hung")), "{exit}");
    event(&mut server, "online");
    eventually("the new one answers", || Who::says(&server.get("/")).generation == 2);
    load.stop().is_harmed_by(pids[0]);
}

#[test]
fn a_reload_under_load_replaces_all_workers_and_loses_nothing() {
    for (balance, reloads) in [("shared", 5), ("slots", 2)] {
        let (mut server, mut pids) = serve(cluster(HELLO_HTTP, 2).args(["--balance", balance]), 2);
        let load = Load::start(&server, 16);
        let files = |server: &Server| fs::read_dir(format!("/proc/{}/fd", server.pid().as_raw_pid())).unwrap().count();
        let before = files(&server);
        for _ in 0..reloads {
            load.until_answered_by(&pids);
            server.signal(Signal::HUP);
            let successors: Vec<Pid> = (0..2).map(|_| pid(&event(&mut server, "fork")["pid"])).collect();
            let reload = event(&mut server, "reload");
            assert!(reload["error"].is_null(), "{reload}");
            for _ in 0..2 {
                let exit = event(&mut server, "exit");
                let outcome = &exit["outcome"];
                assert_eq!((&outcome["voluntary"], &outcome["code"]), (&json!(true), &json!(0)), "{exit}");
            }
            assert!(pids.into_iter().all(gone));
            pids = successors;
            eventually("nothing is kept of the old ones", || processes(&server) == pids && files(&server) == before);
        }
        load.until_answered_by(&pids);
        load.stop().is_unharmed();
        assert_eq!(Who::says(&server.get("/")).generation, reloads + 1);
        server.signal(Signal::TERM);
        let events = events(&server.running.wait().code(0));
        assert_eq!(lives(&events), 2 + 2 * reloads as usize);
    }
}

#[test]
fn reloads_that_are_asked_for_at_once_follow_each_other() {
    let (mut server, _) = serve(cluster(HELLO_HTTP, 2), 2);
    let load = Load::start(&server, 8);
    for _ in 0..4 {
        // those that come while the signal is still to be taken are one
        (0..3).for_each(|_| server.signal(Signal::HUP));
        event(&mut server, "reload");
    }
    load.stop().is_unharmed();
    server.signal(Signal::TERM);
    let events = events(&server.running.wait().code(0));
    let reloads: Vec<_> = events.iter().filter(|event| event["event"] == "reload").collect();
    assert!((4..=12).contains(&reloads.len()) && reloads.iter().all(|reload| reload["error"].is_null()), "{reloads:?}");
    assert!(lives(&events) >= 2 + 2 * reloads.len());
}

#[test]
fn idle_connections_are_asked_to_move_to_the_new_workers() {
    let (mut server, pids) = serve(cluster(HELLO_HTTP, 1), 1);
    let [mut asks, mut is_silent] = [server.connect(), server.connect()];
    for client in [&mut asks, &mut is_silent] {
        client.send_get("/");
        assert_eq!(client.response().header("connection"), None);
    }
    server.signal(Signal::HUP);
    event(&mut server, "reload");
    // whoever asks at this moment has a second for it, and the old worker answers, from some moment on for the last time
    eventually("it is told to ask elsewhere", || {
        asks.send_get("/");
        let response = asks.response();
        assert!(Who::says(&response).is(pids[0]), "{response:?}");
        response.header("connection") == Some("close")
    });
    assert!(asks.is_closed() && is_silent.is_closed());
    assert!(gone(pids[0]));
    assert_eq!(Who::says(&server.get("/")).generation, 2);
}

#[test]
fn a_reload_takes_the_guest_as_its_file_is_now() {
    let folder = Folder::new();
    install(&folder, fs::read(HELLO_HTTP).unwrap());
    let (mut server, pids) = serve(folder.wrun(["cluster", "app.wasm", "-w", "2", "--listen", "0"]), 2);
    let load = Load::start(&server, 12);
    load.until("it answers", |tally| !tally.answers.is_empty());
    install(&folder, fs::read(CRASH).unwrap());
    server.signal(Signal::HUP);
    let reload = event(&mut server, "reload");
    assert!(reload["error"].is_null(), "{reload}");
    load.until("the new version answers", |tally| tally.answers.contains_key("{\"handled\":1}"));
    load.stop().is_unharmed();
    assert!(pids.into_iter().all(gone));
    assert_eq!(server.get("/").text(), "{\"handled\":1}");
}

#[test]
fn a_new_version_that_does_not_work_is_not_taken() {
    let http = |guest| fs::read(guest).unwrap();
    let plain: &[(Vec<u8>, u32, &str)] = &[
        (b"this is no guest".to_vec(), 0, "expected WebAssembly (a binary or WAT text), found a text that is not WAT"),
        (http(HELLO), 0, "expected an http guest, found a command guest (component)"),
        (http(CRASH_AT_START), 2, "trapped: wasm `unreachable` instruction executed"),
    ];
    let probed: &[(Vec<u8>, u32, &str)] = &[
        (http(CRASH), 2, "the probe `GET /status?code=500` was answered 500"),
        (http(ECHO), 0, "a handler has no path that could be probed"),
    ];
    for (probe, versions) in [(&[][..], plain), (&["--probe", "/status?code=500"], probed)] {
        let folder = Folder::new();
        install(&folder, http(HELLO_HTTP));
        let args = ["cluster", "app.wasm", "-w", "2", "--listen", "0"];
        let (mut server, pids) = serve(folder.wrun(args).args(probe), 2);
        let load = Load::start(&server, 8);
        for (version, started, reason) in versions {
            install(&folder, version);
            server.signal(Signal::HUP);
            let tried: Vec<Pid> = (0..*started).map(|_| pid(&event(&mut server, "fork")["pid"])).collect();
            let reload = event(&mut server, "reload");
            assert!(reload["error"].as_str().is_some_and(|error| error.contains(reason)), "{reason}: {reload}");
            assert!(tried.into_iter().all(gone));
            eventually("nobody else is left", || processes(&server).len() == 2);
            load.until_more(50);
        }
        fs::remove_file(folder.path("app.wasm")).unwrap();
        server.signal(Signal::HUP);
        assert!(event(&mut server, "reload")["error"].is_string());
        load.until_more(50);
        assert_eq!(load.tally().of(|who| who.generation > 1), 0);
        // and all is as before when the file is good again
        install(&folder, http(HELLO_HTTP));
        server.signal(Signal::HUP);
        assert!(event(&mut server, "reload")["error"].is_null());
        load.until("new workers answer", |tally| tally.of(|who| who.generation > 1) > 0);
        load.stop().is_unharmed();
        assert!(pids.into_iter().all(gone));
    }
}

#[test]
fn a_successor_that_is_killed_ends_the_reload_and_nothing_else() {
    // the probe is what makes a start take its time
    let slow = ["--probe", "/?ms=500"];
    let (mut server, pids) = serve(cluster(SLOW, 2).args(slow), 2);
    server.signal(Signal::HUP);
    let successors: Vec<Pid> = (0..2).map(|_| pid(&event(&mut server, "fork")["pid"])).collect();
    // the other one is ready, and must wait for this one all the same
    freeze(successors[1]);
    assert_eq!(pid(&event(&mut server, "online")["pid"]), successors[0]);
    kill_process(successors[1], Signal::KILL).unwrap();
    let reload = event(&mut server, "reload");
    assert!(reload["error"].as_str().is_some_and(|error| error.contains("worker 2")), "{reload}");
    assert!(successors.into_iter().all(gone));
    eventually("they are reaped", || processes(&server) == pids);
    assert_eq!(server.get("/?ms=1").text(), "{\"slept\":1}");
    // a stop in the middle of one is a stop
    server.signal(Signal::HUP);
    event(&mut server, "fork");
    server.signal(Signal::TERM);
    lives(&events(&server.running.wait().code(0)));
}

#[test]
fn a_worker_and_its_successor_do_not_need_each_other() {
    // it wants a successor after its first request, and that one takes its time
    let args = ["--max-requests", "1", "--probe", "/?ms=500"];
    for the_successor_dies in [true, false] {
        let (mut server, pids) = serve(cluster(SLOW, 1).args(args), 1);
        assert_eq!(server.get("/?ms=0").status, 200);
        let successor = pid(&event(&mut server, "fork")["pid"]);
        if the_successor_dies {
            kill_process(successor, Signal::KILL).unwrap();
            let error = event(&mut server, "error");
            assert!(error["message"].as_str().is_some_and(|text| text.ends_with("so it goes on")), "{error}");
            eventually("it is reaped", || processes(&server) == pids);
        } else {
            kill_process(pids[0], Signal::KILL).unwrap();
            // whoever is ready last is one too many
            event(&mut server, "disconnect");
            eventually("one is left", || processes(&server).len() == 1);
        }
        assert_eq!(server.get("/?ms=1").text(), "{\"slept\":1}");
        server.signal(Signal::TERM);
        let lives = lives(&events(&server.running.wait().code(0)));
        assert!(lives == 2 || !the_successor_dies, "the next one is tried after a while: {lives}");
    }
}

#[test]
fn a_reload_lets_requests_finish_within_the_grace_time() {
    let (mut server, pids) = serve(cluster(SLOW, 1).args(["--grace", "2s"]), 1);
    let [mut short, mut long] = [server.connect(), server.connect()];
    short.send_get("/?ms=1000");
    long.send_get("/?ms=60000");
    until_begun(pids[0], 2);
    server.signal(Signal::HUP);
    event(&mut server, "reload");
    assert_eq!(server.get("/?ms=1").text(), "{\"slept\":1}", "the new one is there");
    let response = short.response();
    assert_eq!((&*response.text(), response.header("connection")), ("{\"slept\":1000}", Some("close")));
    assert!(long.is_closed(), "without a response");
    assert!(gone(pids[0]));
    assert_eq!(server.get("/?ms=1").text(), "{\"slept\":1}");
}

#[test]
fn a_port_of_which_every_slot_was_given_up_is_closed() {
    let finished = cluster(CRASH_AT_START, 2).args(["--log-format", "json"]).run().code(70).stdout("");
    let finished = finished.stderr_has("trapped");
    let events = events(&finished);
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!((lives(&events), count("fork"), count("failed"), count("online")), (10, 10, 2, 0));
    assert!(events.last().unwrap()["message"].as_str().unwrap().contains("every worker failed"), "{events:?}");
}

#[test]
fn a_slot_that_was_given_up_takes_no_connections_along_and_returns_with_a_reload() {
    for balance in ["shared", "slots"] {
        let folder = Folder::new();
        install(&folder, fs::read(HELLO_HTTP).unwrap());
        let args = ["cluster", "app.wasm", "-w", "2", "--listen", "0", "--balance", balance];
        let (mut server, pids) = serve(folder.wrun(args), 2);
        let mut worker = pids[0];
        for _ in 0..4 {
            kill_process(worker, Signal::KILL).unwrap();
            worker = pid(&event(&mut server, "fork")["pid"]);
        }
        kill_process(worker, Signal::KILL).unwrap();
        assert_eq!(event(&mut server, "failed")["worker"], 1);
        // those that wait at a socket of its own at this moment have nobody to wait for
        let address = server.address;
        let ask = || {
            let mut client = Client::try_connect(address)?;
            client.send_get("/");
            client.try_response()
        };
        let all_are_answered = || (0..32).all(|_| ask().is_ok_and(|answer| Who::says(&answer).is(pids[1])));
        eventually("the other one answers all", all_are_answered);
        // and none comes back with a version that does not work
        install(&folder, fs::read(CRASH_AT_START).unwrap());
        server.signal(Signal::HUP);
        assert!(event(&mut server, "reload")["error"].is_string());
        eventually("the other one answers all", all_are_answered);
        install(&folder, fs::read(HELLO_HTTP).unwrap());
        server.signal(Signal::HUP);
        assert!(event(&mut server, "reload")["error"].is_null());
        for worker in [1, 2] {
            eventually("each answers", || Who::says(&server.get("/")).worker == worker);
        }
    }
}

#[test]
fn a_worker_whose_probe_fails_takes_no_connections() {
    for code in [200, 204, 399] {
        let (server, _) = serve(cluster(CRASH, 1).args(["--probe", &format!("/status?code={code}")]), 1);
        assert_eq!(server.get("/").text(), "{\"handled\":1}");
    }
    for (code, text) in [(400, "400 Bad Request"), (500, "500 Internal Server Error")] {
        let path = format!("/status?code={code}");
        let finished = cluster(CRASH, 1).args(["--probe", &path]).run().code(70).stdout("");
        let _ = finished.stderr_has(&format!("the probe `GET {path}` was answered {text}"));
    }
    let _ = cluster(CRASH, 1).args(["--probe", "/trap"]).run().code(70).stdout("");
    cluster(ECHO, 1).args(["--probe", "/"]).run().code(2).error("a handler has no path that could be probed");
    cluster(CRASH, 1).args(["--probe", "x"]).run().code(2).error("expected a path that starts with `/` for the probe");
}

#[test]
fn a_worker_is_replaced_after_so_many_requests_and_not_before() {
    let (mut server, _) = serve(cluster(HELLO_HTTP, 1).args(["--max-requests", "50", "--access-log"]), 1);
    let mut client = server.connect();
    let mut ask = || {
        client.send_get("/");
        assert_eq!(Who::says(&client.response()).generation, 1);
    };
    let next = |server: &mut Server| serde_json::from_str::<Value>(&server.stderr_line()).unwrap()["event"].clone();
    assert_eq!(next(&mut server), "listening");
    for _ in 1..50 {
        ask();
        assert_eq!(next(&mut server), "access");
    }
    // the record of the last one may be told before its successor is started, or after
    ask();
    assert_eq!(event(&mut server, "fork")["generation"], 2);
}

#[test]
fn workers_are_replaced_again_and_again_without_losing_a_request() {
    let (server, _) = serve(cluster(HELLO_HTTP, 2).args(["--max-requests", "50"]), 2);
    let load = Load::start(&server, 8);
    load.until("generation 6 of each slot", |tally| {
        (1..=2).all(|worker| tally.of(|who| who.worker == worker && who.generation >= 6) > 0)
    });
    load.stop().is_unharmed();
    server.signal(Signal::TERM);
    let events = events(&server.running.wait().code(0));
    let exits: Vec<_> = events.iter().filter(|event| event["event"] == "exit").collect();
    assert!(lives(&events) >= 12 && exits.iter().all(|exit| exit["outcome"]["voluntary"] == true), "{exits:?}");
}

#[test]
fn a_worker_that_has_grown_is_replaced() {
    // one instance, so that what it keeps adds up
    let args = ["--instance", "worker", "--concurrency", "1", "--max-memory", "96MiB", "--heartbeat", "500ms"];
    let (mut server, pids) = serve(cluster(CRASH, 1).args(args), 1);
    let load = Load::start(&server, 8);
    for _ in 0..2 {
        assert_eq!(server.get("/memory?mib=50").text(), "{\"mib\":50}");
    }
    let fork = event(&mut server, "fork");
    assert_eq!(fork["generation"], 2);
    let exit = event(&mut server, "exit");
    assert_eq!((&exit["outcome"]["voluntary"], &exit["outcome"]["code"]), (&json!(true), &json!(0)), "{exit}");
    assert!(gone(pids[0]));
    load.until_more(50);
    load.stop().is_unharmed();
    assert_eq!(processes(&server), [pid(&fork["pid"])]);
}

#[test]
fn a_stop_finishes_the_requests_that_are_begun() {
    for signal in [Signal::TERM, Signal::INT] {
        let (server, pids) = serve(cluster(SLOW, 1), 1);
        let [mut idle, mut slow, mut late, mut fresh] = [(); 4].map(|()| server.connect());
        idle.send_get("/?ms=0");
        assert_eq!(idle.response().header("connection"), None);
        slow.send_get("/?ms=1000");
        late.send_get("/late?ms=1000");
        late.head().unwrap();
        assert_eq!(late.chunk().unwrap(), b"early\n");
        until_begun(pids[0], 3);
        server.signal(signal);
        assert!(idle.is_closed() && fresh.is_closed());
        let response = slow.response();
        assert_eq!((&*response.text(), response.header("connection")), ("{\"slept\":1000}", Some("close")));
        assert_eq!(late.exact(5).unwrap(), b"0\r\n\r\n");
        assert!(slow.is_closed() && late.is_closed());
        let address = server.address;
        lives(&events(&server.running.wait().code(0)));
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_stop_under_load_cuts_no_response_off() {
    let (server, pids) = serve(cluster(HELLO_HTTP, 2), 2);
    let load = Load::start(&server, 12);
    load.until_answered_by(&pids);
    server.signal(Signal::TERM);
    lives(&events(&server.running.wait().code(0)));
    let tally = load.stop();
    assert!(tally.hung == 0 && tally.failures.iter().all(|failure| !failure.begun), "{tally:?}");
}

#[test]
fn a_stop_that_takes_too_long_or_is_repeated_kills() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        for (grace, repeats) in [("300ms", false), ("1h", true)] {
            let (mut server, pids) = serve(cluster(SLOW, 1).args(["--grace", grace]), 1);
            let mut client = server.connect();
            client.send_get("/?ms=60000");
            until_begun(pids[0], 1);
            server.signal(signal);
            event(&mut server, "disconnect");
            if repeats {
                server.signal(signal);
            }
            let _ = server.running.wait().code(code);
            assert!(client.is_closed() && gone(pids[0]));
        }
    }
}

#[test]
fn a_stop_after_a_reload_waits_for_the_old_workers_requests_too() {
    let (mut server, pids) = serve(cluster(SLOW, 1), 1);
    let [mut slow, mut idle] = [server.connect(), server.connect()];
    idle.send_get("/?ms=0");
    idle.response();
    slow.send_get("/?ms=1000");
    until_begun(pids[0], 2);
    server.signal(Signal::HUP);
    event(&mut server, "reload");
    server.signal(Signal::TERM);
    assert_eq!(slow.response().text(), "{\"slept\":1000}");
    assert!(idle.is_closed());
    assert_eq!(lives(&events(&server.running.wait().code(0))), 2);
}

#[test]
fn no_process_outlives_a_killed_primary_and_its_port_is_free() {
    for reloads in [false, true] {
        let (mut server, pids) = serve(cluster(SLOW, 2), 2);
        let mut client = server.connect();
        client.send_get("/?ms=60000");
        eventually("it is begun", || server.get("/?ms=0").status == 200);
        if reloads {
            server.signal(Signal::HUP);
            event(&mut server, "fork");
        }
        let processes = processes(&server);
        assert!(processes.len() >= pids.len());
        server.signal(Signal::KILL);
        assert!(processes.into_iter().all(gone));
        assert!(client.is_closed());
        eventually("the port is free", || TcpListener::bind(server.address).is_ok());
        let _ = server.running.wait().killed_by(Signal::KILL);
    }
}

#[test]
fn the_address_is_told_when_the_first_worker_takes_connections() {
    let mut server = Server::start(cluster(HELLO_HTTP, 1).args(["--log-format", "json"]));
    let names: Vec<Value> = (0..3).map(|_| serde_json::from_str(&server.stderr_line()).unwrap()).collect();
    let listening = json!({"event": "listening", "address": server.address.to_string()});
    assert_eq!((&names[0]["event"], &names[1]["event"], &names[2]), (&json!("fork"), &json!("online"), &listening));
    assert_ne!(server.address.port(), 0);
}

#[test]
fn a_memory_that_no_worker_keeps_to_starts_no_storm() {
    let args = ["--max-memory", "1MiB", "--heartbeat", "100ms", "-w", "1", "--log-format", "json", "--grace", "1s"];
    let mut server = Server::start(wrun(["cluster", HELLO_HTTP, "--listen", "0"]).args(args));
    let first = event(&mut server, "fork")["pid"].clone();
    // the first one is too large and replaced; its successor is just as large, and is let be
    while server.get("/").json()["pid"] == first {}
    for _ in 0..500 {
        assert_eq!(server.get("/").json()["generation"], 2);
    }
    server.signal(Signal::TERM);
    let finished = server.running.wait().code(0);
    assert_eq!(finished.stderr_text().matches("\"event\":\"fork\"").count(), 2, "{}", finished.transcript());
}

#[test]
fn a_port_that_ends_refuses_newcomers_and_waits_for_no_head() {
    let (server, _) = serve(cluster(SLOW, 1), 1);
    let mut at_work = server.connect();
    at_work.send_get("/late?ms=1500");
    assert_eq!(at_work.head().unwrap().0, 200);
    let mut begun = server.connect();
    begun.send("GET / HT");
    server.signal(Signal::TERM);
    // the port is given up while the request is still at work
    eventually("newcomers are refused", || Client::try_connect(server.address).is_err());
    assert!(begun.is_closed(), "long before its ten seconds are over");
    assert_eq!(at_work.chunk().unwrap(), b"early\n");
    let _ = server.running.wait().code(0);
}
