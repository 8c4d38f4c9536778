//! What becomes of an app's versions, and what clients feel when one takes over.

use std::{collections::BTreeSet, fs, process::Command};

use guest_artifacts::{CRASH_AT_START, HELLO, HELLO_HTTP, SLOW};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::{
    apps::{Apps, begun, events_of, guest, kind, variant},
    client::Client,
    load::{Load, Who, eventually},
    supervision::{children, events, gone},
};

#[test]
fn a_bad_version_changes_nothing_and_says_why() {
    let mut apps = Apps::new();
    let live = apps.live("app", guest(HELLO_HTTP));
    let worker = Who::says(&apps.get("/app")).pid;
    for (bad, reason) in [
        (b"junk".to_vec(), "found a text that is not WAT"),
        (guest(HELLO_HTTP)[..20_000].to_vec(), "unexpected end"),
        (vec![], "an empty file"),
        (guest(HELLO), "expected an http guest, found a command guest"),
        (guest(CRASH_AT_START), "a worker"),
    ] {
        apps.put("app.wasm", bad);
        let refused = apps.told("refused", "app");
        assert!(refused["reason"].as_str().unwrap().contains(reason), "{reason}: {refused}");
        assert_eq!(Who::says(&apps.get("/app")).pid, worker, "{reason}");
        let listed = apps.listed("app");
        assert_eq!((&listed["version"], &listed["error"]), (&live["version"], &refused["reason"]));
    }
    // the good one again: nothing is to be said of it any more
    apps.put("app.wasm", guest(HELLO_HTTP));
    eventually("its error is gone", || apps.listed("app")["error"].is_null());
    assert_eq!(Who::says(&apps.get("/app")).pid, worker);
    // one that was never live
    apps.put("new.wasm", guest(CRASH_AT_START));
    apps.told("refused", "new");
    assert_eq!(kind(&apps.get("/new")), (503, "not-live".into()));
    apps.live("new", guest(HELLO_HTTP));
    assert_eq!(apps.get("/new").status, 200);
}

#[test]
fn no_request_fails_when_a_guest_is_replaced() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    let load = Load::start_at(&apps.server, 8, "/app");
    load.until_more(200);
    for number in 0..10 {
        let live = apps.live("app", variant(HELLO_HTTP, number));
        // each answer after this event is of the new version
        let worker = Who::says(&apps.get("/app")).pid;
        load.until("the new one answers", |tally| tally.of(|who| who.pid == worker) > 20);
        assert_eq!(apps.listed("app")["version"], live["version"]);
    }
    load.stop().is_unharmed();
    // and the old ones have ended as they were asked to
    let exits = events_of(apps, "exit");
    assert!(exits.iter().all(|exit| exit["outcome"]["voluntary"] == true), "{exits:?}");
}

#[test]
fn whatever_happens_to_a_file_each_answer_is_of_a_version_that_was_live() {
    // more for those who have the time
    let changes = std::env::var("CHANGES").unwrap_or_else(|_| "30".into());
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(HELLO_HTTP));
    // another process, as installers are: two guests alternately, in ways that change at random
    let script = r#"
        state=$3
        for change in $(seq "$4"); do
            state=$(( (state * 1103515245 + 12345) % 2147483648 ))
            from=$([ $(( (state >> 16) % 2 )) = 0 ] && echo "$1" || echo "$2")
            case $(( (state >> 8) % 4 )) in
                0) cp "$from" .app.tmp && mv .app.tmp app.wasm ;;
                1) cp "$from" app.wasm ;;
                2) rm -f app.wasm; cp "$from" app.wasm ;;
                3) { head -c 1000 "$from"; sleep 0.05; tail -c +1001 "$from"; } > app.wasm ;;
            esac
            sleep 0.$(( state % 10 ))
        done
        cp "$1" app.wasm"#;
    let other = apps.folder.path("other.wasm");
    fs::write(&other, variant(HELLO_HTTP, 1)).unwrap();
    let load = Load::start_at(&apps.server, 4, "/app");
    let installer = Command::new("sh")
        .args(["-c", script, "sh", HELLO_HTTP])
        .arg(&other)
        .args(["7", &changes])
        .current_dir(apps.path(""))
        .status();
    assert!(installer.unwrap().success());
    // what is there at the end is live at the end
    let last = apps.live("last", guest(HELLO_HTTP))["version"].clone();
    eventually("it settles", || apps.listed("app")["version"] == last);
    let tally = load.stop();
    tally.is_unharmed();
    // the processes that answered are those of versions that went live
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    let events = events(&finished);
    let forked: BTreeSet<i64> =
        events.iter().filter(|event| event["event"] == "fork").filter_map(|event| event["pid"].as_i64()).collect();
    assert!(tally.answers.keys().all(|answer| forked.contains(&Who::of(answer).pid.into())), "{tally:?}");
    assert!(events.iter().filter(|event| event["event"] == "live").count() > 5, "{}", finished.stderr_text());
    assert!(events.iter().all(|event| event["event"] != "refused"), "{}", finished.stderr_text());
}

#[test]
fn what_was_begun_is_finished_by_the_version_that_has_it() {
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "30s"]));
    apps.live("app", guest(SLOW));
    let mut clients: Vec<Client> = (0..4).map(|_| apps.server.connect()).collect();
    for client in &mut clients {
        client.send_get("/app?ms=1500");
    }
    eventually("they are begun", || begun(&children(apps.server.pid())) == 4);
    apps.live("app", guest(HELLO_HTTP));
    assert_eq!(apps.get("/app").json()["worker"], 1);
    for client in &mut clients {
        assert_eq!(client.response().json(), json!({"slept": 1500}));
    }
    // one that takes longer than it may is cut off
    apps.server.signal(Signal::TERM);
    apps.server.running.wait().code(0);
    let mut apps = Apps::with(|wrun| wrun.args(["--grace", "300ms"]));
    apps.live("app", guest(SLOW));
    let mut client = apps.server.connect();
    client.send_get("/app?ms=20000");
    eventually("it is begun", || begun(&children(apps.server.pid())) == 1);
    fs::remove_file(apps.path("app.wasm")).unwrap();
    assert_eq!(kind(&client.response()), (502, "worker".into()));
}

#[test]
fn a_new_version_whose_workers_crash_is_taken_back() {
    let mut apps = Apps::new();
    let good = apps.live("app", guest(HELLO_HTTP));
    let bad = apps.live("app", variant(HELLO_HTTP, 1));
    for _ in 0..3 {
        let mut worker = Who::says(&apps.get("/app"));
        kill_process(Pid::from_raw(worker.pid).unwrap(), Signal::KILL).unwrap();
        // the next one is another
        let dead = worker.pid;
        eventually("it is replaced", || {
            let response = apps.get("/app");
            if response.status == 200 {
                worker = Who::says(&response);
            }
            worker.pid != dead
        });
    }
    let back = apps.told("rolled-back", "app");
    assert_eq!((&back["version"], &back["to"]), (&bad["version"], &good["version"]));
    assert_eq!(apps.told("live", "app")["version"], good["version"]);
    let listed = apps.listed("app");
    assert_eq!(listed["version"], good["version"]);
    assert!(listed["error"].as_str().unwrap().contains("crashed again and again"), "{listed}");
    // it is not tried again, but the good one is welcome, and any other
    apps.put("app.wasm", guest(HELLO_HTTP));
    eventually("its error is gone", || apps.listed("app")["error"].is_null());
    apps.put("app.wasm", variant(HELLO_HTTP, 1));
    assert!(apps.told("refused", "app")["reason"].as_str().unwrap().contains("crashed again and again"));
    // until everything is tried anew
    apps.server.signal(Signal::HUP);
    assert_eq!(apps.told("live", "app")["version"], bad["version"]);
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn workers_that_are_replaced_or_die_between_requests_lose_none() {
    let mut apps = Apps::new();
    apps.put("app.toml", "max-requests = 50\nworkers = 2\n");
    apps.live("app", guest(HELLO_HTTP));
    let load = Load::start_at(&apps.server, 8, "/app");
    load.until("generation 6 of each slot", |tally| {
        (1..=2).all(|worker| tally.of(|who| who.worker == worker && who.generation >= 6) > 0)
    });
    load.stop().is_unharmed();
    // one that is killed when nobody asks it for anything
    apps.put("app.toml", "workers = 1\n");
    apps.told("live", "app");
    let mut client = apps.server.connect();
    for generation in 1..=3 {
        client.send_get("/app");
        let who = Who::says(&client.response());
        assert_eq!(who.generation, generation);
        kill_process(Pid::from_raw(who.pid).unwrap(), Signal::KILL).unwrap();
        assert!(gone(Pid::from_raw(who.pid).unwrap()));
    }
}

#[test]
fn replacing_costs_nothing_that_stays() {
    // more for those who have the time
    let times = std::env::var("REPLACEMENTS").map_or(40, |times| times.parse().unwrap());
    let mut apps = Apps::new();
    let router = children(apps.server.pid())[0];
    // with a mebibyte that would be missed
    let padded = |number: u8| [variant(HELLO_HTTP, number), vec![0, 0x80, 0x80, 0x40], vec![0; 1 << 20]].concat();
    let replace = |apps: &mut Apps, times: u32| {
        for number in 0..times {
            apps.live("app", padded((number % 2) as u8));
            assert_eq!(apps.get("/app").status, 200);
        }
        // those that were taken over from are gone
        eventually("the last is live alone", || children(apps.server.pid()).len() == 2);
    };
    let count = |pid: Pid, what: &str| fs::read_dir(format!("/proc/{}/{what}", pid.as_raw_pid())).unwrap().count();
    let memory_kib = |pid: Pid| -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let pid = apps.server.pid();
    let spent = || format!("{:?}", (count(pid, "fd"), count(pid, "task"), count(router, "fd")));
    // both are compiled then
    replace(&mut apps, 4);
    apps.server.running.until_stable("descriptors and threads", spent);
    let (before, memory) = (spent(), [pid, router].map(memory_kib));
    replace(&mut apps, times);
    apps.server.running.until_stable("descriptors and threads", spent);
    assert_eq!(spent(), before);
    let grown = [pid, router].map(memory_kib);
    assert!(grown[0] < memory[0] + (16 << 10) && grown[1] < memory[1] + (4 << 10), "{memory:?} KiB, then {grown:?}");
}

#[test]
fn one_that_is_lazy_starts_with_its_first_request() {
    let mut apps = Apps::with(|wrun| wrun.arg("--lazy"));
    apps.put("app.wasm", guest(HELLO_HTTP));
    apps.told("asleep", "app");
    assert_eq!((&apps.listed("app")["state"], children(apps.server.pid()).len()), (&json!("asleep"), 1), "the router");
    let mut clients: Vec<Client> = (0..8).map(|_| apps.server.connect()).collect();
    for client in &mut clients {
        client.send_get("/app");
    }
    assert!(clients.iter_mut().all(|client| client.response().status == 200));
    assert_eq!(apps.listed("app")["state"], "live");
    // one that does not start, and one whose file says that it is not lazy
    apps.put("bad.wasm", guest(CRASH_AT_START));
    apps.told("asleep", "bad");
    assert_eq!(kind(&apps.get("/bad")), (503, "not-live".into()));
    assert_eq!(kind(&apps.get("/bad")), (503, "not-live".into()));
    apps.put("eager.toml", "lazy = false");
    apps.live("eager", guest(HELLO_HTTP));
}
