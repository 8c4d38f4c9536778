//! What a pool does when its workers die, hang, or are asked to end.

use std::{collections::BTreeMap, time::Duration};

use guest_artifacts::{ECHO, FIB, HOSTILE, WHOAMI};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

use crate::wrun::{Finished, Folder, Running, wrun};

pub(super) fn pid(value: &Value) -> Pid {
    Pid::from_raw(value.as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid")).expect("a pid")
}

/// The next event of this name.
#[track_caller]
pub(super) fn event(running: &mut Running, name: &str) -> Value {
    let line = running.stderr_line_with(&format!("\"event\":\"{name}\""));
    serde_json::from_str(&line).expect("JSON")
}

/// All events of a run, in order.
pub(super) fn events(finished: &Finished) -> Vec<Value> {
    crate::spawn::events(&finished.stderr_text())
}

/// The processes that a process has started and that are there.
pub(super) fn children(of: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", of.as_raw_pid())).expect("it is there").flatten();
    let lists = tasks.map(|task| std::fs::read_to_string(task.path().join("children")).expect("a list"));
    lists
        .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .map(|pid| Pid::from_raw(pid.parse().expect("a pid")).expect("a pid"))
        .collect()
}

/// Waits until no such process is there any more; who waits too long fails with the test's deadline.
pub(super) fn gone(pid: Pid) -> bool {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while std::time::Instant::now() < deadline {
        // a zombie that nobody has reaped yet is gone, too
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
        match stat {
            Err(_) => return true,
            Ok(stat) if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')) => return true,
            Ok(_) => std::thread::yield_now(),
        }
    }
    false
}

#[test]
fn every_start_is_a_fork_then_online_then_one_exit() {
    let input = "1\n".repeat(50);
    let finished = wrun(["cluster", ECHO, "-w", "3", "--log-format", "json"]).stdin(input).run().code(0);
    let mut by_pid: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for event in events(&finished) {
        if let Some(pid) = event["pid"].as_i64() {
            by_pid.entry(pid).or_default().push(event["event"].as_str().unwrap().into());
        }
    }
    assert_eq!(by_pid.len(), 3, "{}", finished.transcript());
    for names in by_pid.values() {
        // one that is asked to end before it is ready never says it is
        assert!(names == &["fork", "online", "exit"] || names == &["fork", "exit"], "{}", finished.transcript());
    }
    assert!(by_pid.values().any(|names| names.len() == 3));
}

#[test]
fn a_killed_worker_fails_its_own_task_only_and_is_replaced() {
    let mut running = wrun(["cluster", HOSTILE, "-w", "2", "--log-format", "json"]).stdin_open().spawn();
    let first = event(&mut running, "fork");
    let second = event(&mut running, "fork");
    event(&mut running, "online");
    event(&mut running, "online");
    // both are at work, and more waits
    running.write_line(r#"{"do":"sleep","ms":2000}"#);
    running.write_line(r#"{"do":"sleep","ms":2000}"#);
    for _ in 0..6 {
        running.write_line(r#"{"do":"ok"}"#);
    }
    await_begun(pid(&first["pid"]));
    kill_process(pid(&first["pid"]), Signal::KILL).unwrap();
    let exit = event(&mut running, "exit");
    assert_eq!((&exit["worker"], &exit["outcome"]["signal"]), (&first["worker"], &json!(9)));
    let restart = event(&mut running, "restart");
    assert_eq!((&restart["worker"], &restart["after_ms"]), (&first["worker"], &json!(0)));
    let fork = event(&mut running, "fork");
    assert_eq!((&fork["worker"], &fork["generation"]), (&first["worker"], &json!(2)));
    assert_ne!(fork["pid"], second["pid"]);
    assert_eq!(event(&mut running, "online")["worker"], first["worker"]);
    running.close_stdin();
    let finished = running.wait().code(0);
    let lines: Vec<Value> = finished.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let failed: Vec<_> = lines.iter().filter(|line| !line["error"].is_null()).collect();
    assert_eq!(lines.len(), 8, "{}", finished.transcript());
    assert_eq!(failed.len(), 1, "{}", finished.transcript());
    for line in failed {
        assert!(line["line"] == 1 || line["line"] == 2, "{line}");
        assert_eq!((&line["error"]["kind"], &line["error"]["signal"]), (&json!("killed"), &json!(9)));
    }
}

#[test]
fn tasks_of_dead_workers_are_tried_again_and_say_so() {
    let args = ["cluster", WHOAMI, "-w", "1", "--retries", "1", "--log-format", "json"];
    let mut running = wrun(args).stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    running.write_line("1");
    assert!(!running.stdout_line().contains("attempts"));
    kill_process(pid(&fork["pid"]), Signal::KILL).unwrap();
    event(&mut running, "exit");
    running.write_line("2");
    assert!(!running.stdout_line().contains("attempts"), "it was not begun when the worker died");
    running.close_stdin();
    running.wait().code(0);

    // begun, and its worker is killed for it each time: once and once again
    let args = ["cluster", HOSTILE, "-w", "1", "--retries", "1", "--log-format", "json"];
    let mut running = wrun(args).stdin_open().spawn();
    event(&mut running, "online");
    running.write_line(r#"{"do":"exit","code":3}"#);
    running.write_line(r#"{"do":"sleep"}"#);
    // an exit answers its own task: that is no lost task, and is not tried again
    let answer: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!((&answer["line"], &answer["error"]["kind"]), (&json!(1), &json!("exited")));
    let mut fork = event(&mut running, "fork");
    for _ in 0..2 {
        event(&mut running, "online");
        await_begun(pid(&fork["pid"]));
        kill_process(pid(&fork["pid"]), Signal::KILL).unwrap();
        fork = event(&mut running, "fork");
    }
    let answer: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!((&answer["line"], &answer["attempts"]), (&json!(2), &json!(2)));
    assert_eq!(answer["error"]["kind"], "killed");
    running.close_stdin();
    running.wait().code(0);
}

/// Waits until a worker's counters say that it has begun a task.
fn await_begun(pid: Pid) {
    // its page of counters: the first is the highest task that it has begun
    let page = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid()))
        .expect("it is there")
        .flatten()
        .find(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("wrun-page")))
        .expect("its page");
    loop {
        let counters = std::fs::read(page.path()).expect("a page");
        if counters[..8] != [0; 8] {
            return;
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_stopped_worker_is_noticed_and_replaced() {
    let args = ["cluster", WHOAMI, "-w", "1", "--heartbeat", "500ms", "--log-format", "json"];
    let mut running = wrun(args).stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    kill_process(pid(&fork["pid"]), Signal::STOP).unwrap();
    let exit = event(&mut running, "exit");
    assert_eq!(exit["outcome"]["stage"], "hung", "{exit}");
    assert_eq!(exit["outcome"]["reason"], "no heartbeat for 500ms");
    event(&mut running, "online");
    running.write_line("1");
    assert!(running.stdout_line().contains("\"generation\":2"));
    running.close_stdin();
    running.wait().code(0);
}

#[test]
fn a_guest_that_computes_is_not_taken_for_hung() {
    // much longer than the heartbeat time, in one task
    let args = ["cluster", HOSTILE, "-w", "1", "--heartbeat", "100ms", "--timeout", "1500ms", "--log-format", "json"];
    let finished = wrun(args).stdin("{\"do\":\"spin\"}\n").run().code(0);
    assert!(finished.stdout_text().contains(r#""limit":"time","allowed":"1.5s""#), "{}", finished.transcript());
    assert!(!finished.stderr_text().contains("hung"), "{}", finished.transcript());
}

#[test]
fn a_crash_loop_backs_off_then_fails_then_ends_the_primary() {
    let input = "{\"do\":\"exit\",\"code\":3}\n".repeat(7);
    let finished = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin(input).run().code(70);
    let events = events(&finished);
    let pauses: Vec<u64> = events
        .iter()
        .filter(|event| event["event"] == "restart")
        .map(|event| event["after_ms"].as_u64().unwrap())
        .collect();
    assert_eq!(pauses.len(), 4, "{}", finished.transcript());
    assert_eq!(pauses[0], 0);
    for (pause, least) in pauses[1..].iter().zip([100, 200, 400]) {
        assert!((least..=least * 5 / 4).contains(pause), "{pauses:?}");
    }
    assert_eq!(events.iter().filter(|event| event["event"] == "failed").count(), 1);
    // each of the five deaths took a task with it, and the other two are told why they were not begun
    let kinds: Vec<Value> = finished
        .stdout_text()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["error"]["kind"].clone())
        .collect();
    assert_eq!(kinds, vec![json!("exited"); 7], "{}", finished.transcript());
}

#[test]
fn who_returns_is_the_users_choice() {
    let forks = |restart: &str, act: &str| {
        let input = format!("{act}\n{{\"do\":\"ok\"}}\n");
        let args = ["cluster", HOSTILE, "-w", "1", "--restart", restart, "--log-format", "json"];
        let finished = wrun(args).stdin(input).run();
        let forks = events(&finished).iter().filter(|event| event["event"] == "fork").count();
        assert_eq!(finished.stdout_text().lines().count(), 2, "{}", finished.transcript());
        (forks, finished.status.code().unwrap())
    };
    assert_eq!(forks("always", r#"{"do":"exit","code":0}"#), (2, 0));
    assert_eq!(forks("on-failure", r#"{"do":"exit","code":3}"#), (2, 0));
    assert_eq!(forks("on-failure", r#"{"do":"exit","code":0}"#).0, 1);
    assert_eq!(forks("never", r#"{"do":"exit","code":3}"#), (1, 70));
}

#[test]
fn tasks_that_run_out_of_time_do_not_fail_a_slot() {
    let input = "{\"do\":\"sleep\"}\n".repeat(7) + "{\"do\":\"ok\"}\n";
    let args = ["cluster", HOSTILE, "-w", "1", "--timeout", "100ms", "--log-format", "json"];
    let finished = wrun(args).stdin(input).run().code(0);
    let lines: Vec<Value> = finished.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 8);
    assert!(lines[..7].iter().all(|line| line["error"]["limit"] == "time"), "{}", finished.transcript());
    assert_eq!(lines[7]["reply"], json!({"ok": true}));
    assert!(events(&finished).iter().all(|event| event["event"] != "failed"));
}

#[test]
fn out_of_time_ends_the_worker_or_only_its_instance() {
    let generations = |interrupt| {
        let input = "0\n";
        let args = ["cluster", WHOAMI, "-w", "1", "--interrupt", interrupt];
        let _ = wrun(args).stdin(input).run().code(0);
        let args =
            ["cluster", HOSTILE, "-w", "1", "--timeout", "200ms", "--interrupt", interrupt, "--log-format", "json"];
        let finished = wrun(args).stdin("{\"do\":\"spin\"}\n{\"do\":\"ok\"}\n").run().code(0);
        events(&finished).iter().filter(|event| event["event"] == "fork").count()
    };
    assert_eq!(generations("kill"), 2);
    assert_eq!(generations("epoch"), 1);
}

#[test]
fn a_term_lets_work_in_flight_finish() {
    let mut running = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    running.write_line(r#"{"do":"sleep","ms":700}"#);
    for _ in 0..5 {
        running.write_line(r#"{"do":"sleep","ms":1}"#);
    }
    await_begun(pid(&fork["pid"]));
    running.signal(Signal::TERM);
    // its input is still open: it ends all the same
    let finished = running.wait().code(0);
    let lines: Vec<Value> = finished.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let find = |line: u64| lines.iter().find(|answer| answer["line"] == line);
    assert_eq!(find(1).expect("answered")["reply"], json!({"ms": 700}), "{}", finished.transcript());
    for answer in &lines[..] {
        assert!(answer["reply"].is_object() || answer["error"]["kind"] == "cancelled", "{answer}");
    }
    assert!(finished.stderr_text().contains("\"event\":\"disconnect\""));
    assert!(gone(pid(&fork["pid"])));
}

#[test]
fn work_that_outlasts_the_grace_time_is_killed() {
    let args = ["cluster", HOSTILE, "-w", "1", "--grace", "200ms", "--log-format", "json"];
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut running = wrun(args).stdin_open().spawn();
        let fork = event(&mut running, "fork");
        event(&mut running, "online");
        running.write_line(r#"{"do":"sleep"}"#);
        await_begun(pid(&fork["pid"]));
        running.signal(signal);
        let finished = running.wait().code(code);
        let answer: Value = serde_json::from_str(finished.stdout_text().trim()).unwrap();
        assert_eq!((&answer["line"], &answer["error"]["kind"]), (&json!(1), &json!("killed")));
    }
}

#[test]
fn a_second_signal_means_now() {
    let args = ["cluster", HOSTILE, "-w", "1", "--grace", "1h", "--log-format", "json"];
    let mut running = wrun(args).stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    running.write_line(r#"{"do":"spin"}"#);
    await_begun(pid(&fork["pid"]));
    running.signal(Signal::INT);
    event(&mut running, "disconnect");
    running.signal(Signal::INT);
    running.wait().code(130);
    assert!(gone(pid(&fork["pid"])));
}

#[test]
fn a_signal_ends_a_compilation_too() {
    // many locals that are all alive at once: a register allocator's bad day, of a minute and more
    let locals = 20_000;
    let sets: String = (0..locals).map(|n| format!("(local.set {n} (call $f))")).collect();
    let gets: String = (0..locals).map(|n| format!("(call $g (local.get {n}))")).collect();
    let wat = format!(
        r#"(module (import "a" "f" (func $f (result i32))) (import "a" "g" (func $g (param i32)))
            (func (export "_start") (local {}) {sets} {} {gets}))"#,
        "i32 ".repeat(locals),
        gets.repeat(20),
    );
    let folder = Folder::new().file("slow.wat", wat);
    let mut running = folder.wrun(["cluster", "slow.wat", "--verbose", "--no-cache"]).stdin_open().spawn();
    running.stderr_line_with("compiling `slow`");
    let compiler = children(running.pid()).pop().expect("a compiler");
    running.signal(Signal::INT);
    running.wait().code(130).stdout("");
    assert!(gone(compiler));
}

#[test]
fn workers_do_not_outlive_a_killed_primary() {
    // busy, idle, and at different moments of their start
    for moment in 0..12 {
        let mut running = wrun(["cluster", HOSTILE, "-w", "2", "--log-format", "json"]).stdin_open().spawn();
        let mut pids = vec![pid(&event(&mut running, "fork")["pid"])];
        if moment % 3 > 0 {
            pids.push(pid(&event(&mut running, "fork")["pid"]));
        }
        if moment % 3 == 2 {
            event(&mut running, "online");
            running.write_line(r#"{"do":"spin"}"#);
        }
        running.signal(Signal::KILL);
        for pid in pids {
            assert!(gone(pid), "worker {pid:?} is still there");
        }
        running.wait().killed_by(Signal::KILL);
    }
}

#[test]
fn a_terminals_interrupt_reaches_the_primary_only() {
    let mut running = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    let worker = pid(&fork["pid"]);
    let group = rustix::process::getpgid(Some(worker)).unwrap();
    assert_eq!(group, worker, "a group of its own, which a terminal does not signal");
    assert!(test_kill_process(worker).is_ok());
    running.close_stdin();
    running.wait().code(0);
}

#[test]
fn a_worker_gets_nothing_of_the_primarys_environment_or_files() {
    let mut running = wrun(["cluster", FIB, "-w", "1", "--log-format", "json"]).env("SECRET", "x").stdin_open().spawn();
    let fork = event(&mut running, "fork");
    event(&mut running, "online");
    let proc = format!("/proc/{}", fork["pid"]);
    assert_eq!(std::fs::read(format!("{proc}/environ")).unwrap(), b"");
    let files: Vec<String> = std::fs::read_dir(format!("{proc}/fd"))
        .unwrap()
        .map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .collect();
    for file in &files {
        let known = [
            "socket:",
            "anon_inode:",
            "/dev/null",
            "/memfd:wrun-page",
            ".cwasm",
            "/proc/",
            "/memfd:wrun-code",
            "/memfd:wasm-memory-image",
            "pipe:",
        ];
        assert!(known.iter().any(|known| file.contains(known)), "{file} in {files:?}");
    }
    running.close_stdin();
    running.wait().code(0);
}
