//! Commands that make threads: through `wrun threads`, and through the modes that run any command.

use std::{
    fs,
    time::{Duration, Instant},
};

use guest_artifacts::{COURIER_THREADS, FOREIGN_THREADS, HELLO_P1, HOSTILE_THREADS, PRIMES, SUM_COMMAND};
use rustix::process::Signal;
use serde_json::json;

use crate::{
    jail::is_jailed,
    supervision::children,
    wrun::{Folder, wrun},
};

/// A guest in text, with a shared memory of so many pages and a body for its `_start`.
fn text(pages: &str, body: &str) -> String {
    format!(
        r#"(module
            (import "env" "memory" (memory {pages} shared))
            (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (export "memory" (memory 0))
            (func (export "wasi_thread_start") (param i32 i32)
                (i32.store (i32.const 16) (local.get 0))
                (i32.store (i32.const 20) (local.get 1))
                (i32.atomic.store (i32.const 24) (i32.const 1))
                (drop (memory.atomic.notify (i32.const 24) (i32.const 1))))
            (func (export "_start") {body}))"#
    )
}

#[test]
fn every_mode_for_commands_runs_threads() {
    for mode in ["threads", "run", "spawn", "exec"] {
        let run = |act: &[&str]| wrun([mode, HOSTILE_THREADS, "--"]).args(act).run();
        run(&["count", "10000"]).code(0).stdout("40000 40000\n").stderr("");
        run(&["exit"]).code(7).stdout("4 threads run\n").stderr("");
    }
    wrun(["fork", HOSTILE_THREADS, "--", "tls"]).run().code(0).stdout("").stderr_has("[1000, 2000, 3000, 4000] 0");
}

#[test]
fn threads_have_their_own_variables_and_clocks() {
    wrun(["threads", HOSTILE_THREADS, "--", "tls"]).run().code(0).stdout("[1000, 2000, 3000, 4000] 0\n");
    wrun(["threads", HOSTILE_THREADS, "--", "pthreads"]).run().code(0).stdout("40000\n");
    // all eight sleep at once
    wrun(["threads", HOSTILE_THREADS, "--", "clock"]).run().code(0).stdout("true\n");
    wrun(["threads", HOSTILE_THREADS, "--", "race"]).run().code(0).stdout("every word is one writer's: true\n");
}

#[test]
fn a_plain_program_with_rayon_is_told_how_many_threads_to_make() {
    let found = |count: u32| format!("9592 primes below 100000, found by {count} threads\n");
    for count in [1, 2, 5] {
        wrun(["threads", "-t", &count.to_string(), PRIMES, "--", "100000"]).run().code(0).stdout(found(count));
    }
    // what is given is not overwritten, and without `threads` nothing is given
    let given = wrun(["threads", "-t", "4", "--env", "RAYON_NUM_THREADS=3", PRIMES, "--", "100000"]);
    given.run().code(0).stdout(found(3));
    wrun(["run", "--env", "RAYON_NUM_THREADS=2", PRIMES, "--", "100000"]).run().code(0).stdout(found(2));
    let sum = wrun(["threads", SUM_COMMAND, "--", "3", "0", "1000001"]).run().code(0).stdout_json();
    assert_eq!(sum["total"], 500_000_500_000u64);
}

#[test]
fn lines_of_threads_are_whole() {
    let ran = wrun(["threads", HOSTILE_THREADS, "--", "lines", "500"]).run().code(0).stderr("");
    let text = ran.stdout_text();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    let mut expected: Vec<_> = (0..8)
        .flat_map(|thread| (0..500).map(move |line| format!("thread {thread} prints line {line} {}", "x".repeat(50))))
        .collect();
    expected.sort();
    assert_eq!(lines, expected);
}

#[test]
fn a_thread_that_reads_does_not_keep_others_from_printing() {
    let mut running = wrun(["threads", HOSTILE_THREADS, "--", "read"]).stdin_open().spawn();
    assert_eq!(running.stdout_line(), "another thread prints");
    running.write_line("a line");
    assert_eq!(running.stdout_line(), "read \"a line\"");
    running.wait().code(0);
}

#[test]
fn files_are_those_of_all_threads() {
    let folder = Folder::new().folder("data");
    folder
        .wrun(["threads", "--dir", "data", HOSTILE_THREADS, "--", "files", "data"])
        .run()
        .code(0)
        .stdout("written by a thread\nopened by a thread\nafter before\n");
    assert_eq!(folder.read("data/after"), "opened by a thread");
    // and those of nobody without a grant, or beyond it
    let denied = folder.wrun(["threads", HOSTILE_THREADS, "--", "files", "data"]).run().code(134);
    denied.stderr_has("No such file or directory");
    let denied = folder.wrun(["threads", "--dir", "data:ro", HOSTILE_THREADS, "--", "files", "data"]).run().code(134);
    denied.stderr_has("Operation not permitted");
}

#[test]
fn the_first_thread_that_fails_ends_all_and_is_named() {
    let json = |act: &str| {
        let ran = wrun(["run", "--json", HOSTILE_THREADS, "--", act]).run();
        let last = ran.stderr_text().lines().last().unwrap().to_owned();
        serde_json::from_str::<serde_json::Value>(&last).unwrap()
    };
    let trapped = json("trap");
    assert_eq!(trapped["kind"], "trapped");
    assert_eq!(trapped["thread"], json!({"id": 3, "name": "thread-3"}));
    let exited = json("exit");
    assert_eq!((&exited["kind"], &exited["code"]), (&json!("exited"), &json!(7)));
    assert_eq!(exited["thread"], json!({"id": 2, "name": "thread-2"}));
    let panicked = wrun(["threads", HOSTILE_THREADS, "--", "panic"]).run().code(134);
    panicked.stderr_has("on purpose").stderr_has("instruction executed (thread 2, thread-2)");
    // one that ends as a program does is no thread's affair
    let ended = json("main-ends");
    assert_eq!((&ended["kind"], &ended["code"], &ended["thread"]), (&json!("exited"), &json!(0), &json!(null)));
}

#[test]
fn a_time_limit_ends_threads_that_wait_sleep_and_loop() {
    for act in ["wait", "sleep", "spin", "storm"] {
        for mode in ["threads", "run"] {
            let ran = wrun([mode, "--timeout", "700ms", HOSTILE_THREADS, "--", act]).run().code(124);
            ran.stderr_has("hit the time limit of 700ms");
        }
    }
    wrun(["threads", "--timeout", "1h", HOSTILE_THREADS, "--", "clock"]).run().code(0);
    // together they compute for longer than that
    let ran = wrun(["threads", "--timeout", "4s", HOSTILE_THREADS, "--", "spin"]).run().code(124);
    ran.stderr_has("hit the time limit of 4s");
}

#[test]
fn no_thread_outlives_wrun() {
    let mut running = wrun(["threads", HOSTILE_THREADS, "--", "wait"]).spawn();
    assert_eq!(running.stdout_line(), "4 threads run");
    let [child] = children(running.pid())[..] else { panic!("expected one child") };
    // five threads of the guest, and wrun's own
    let tasks = fs::read_dir(format!("/proc/{}/task", child.as_raw_nonzero())).unwrap().flatten();
    let mut names: Vec<_> = tasks.map(|task| fs::read_to_string(task.path().join("comm")).unwrap()).collect();
    names.retain(|name| name.starts_with("hosti/"));
    names.sort();
    assert_eq!(names, ["hosti/main\n", "hosti/thread-1\n", "hosti/thread-2\n", "hosti/thread-3\n", "hosti/thread-4\n"]);
    running.signal(Signal::KILL);
    running.until_ended();
    running.wait();
    let gone = || !fs::exists(format!("/proc/{}", child.as_raw_nonzero())).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !gone() {
        assert!(Instant::now() < deadline, "it is still there");
        std::thread::yield_now();
    }
}

#[test]
fn threads_are_in_a_jail() {
    for (mode, isolation) in [("threads", "process"), ("threads", "jail"), ("run", "thread"), ("run", "jail")] {
        let mut running = wrun([mode, "--isolation", isolation, HOSTILE_THREADS, "--", "wait"]).spawn();
        assert_eq!(running.stdout_line(), "4 threads run");
        let [child] = children(running.pid())[..] else { panic!("expected one child") };
        is_jailed(child);
        running.signal(Signal::INT);
        let ended = running.wait();
        // `run` is the guest's own program, as it were
        if mode == "run" {
            ended.killed_by(Signal::INT)
        } else {
            ended.code(130)
        };
    }
}

#[test]
fn a_guest_has_so_many_threads_and_no_more() {
    let bomb = |threads: &str| wrun(["threads", "--threads", threads, HOSTILE_THREADS, "--", "bomb"]).run().code(0);
    let refused = |count: u32| format!("{count} threads, then: Resource temporarily unavailable (os error 6)\n");
    bomb("3").stdout(refused(3));
    bomb("200").stdout(refused(200));
    wrun(["run", HOSTILE_THREADS, "--", "bomb"]).run().code(0).stdout(refused(64));
    // in a jail, where the system counts them, too
    let jailed = wrun(["run", "--isolation", "jail", "--threads", "300", HOSTILE_THREADS, "--", "bomb"]);
    jailed.run().code(0).stdout(refused(300));
    // one that has ended makes room
    wrun(["threads", "--threads", "1", HOSTILE_THREADS, "--", "reuse", "200"]).run().code(0).stdout("done\n");
    wrun(["threads", "--threads", "0", HOSTILE_THREADS]).run().code(2).stderr_has("0 is not in 1..=1000");
}

#[test]
fn the_memory_of_all_threads_is_bounded() {
    let grow = |memory: &str| wrun(["threads", "--memory", memory, HOSTILE_THREADS, "--", "grow"]).run().code(137);
    grow("8MiB").stderr_has("hit the memory limit of 8MiB (thread 1, thread-1)");
    grow("64MiB").stderr_has("hit the memory limit of 64MiB (thread 1, thread-1)");
    let small = wrun(["threads", "--memory", "1MiB", HOSTILE_THREADS, "--", "tls"]).run().code(126);
    small.stderr_has("more than the 1MiB that it may have (--memory)").stderr_has("give it more");

    // just as many pages as there may be, and one more
    let grow = |pages: u32, memory: &str| {
        let body = format!("(call $exit (i32.add (memory.grow (i32.const {pages})) (i32.const 40)))");
        Folder::new().file("a.wat", text("1 100", &body)).wrun(["threads", "--memory", memory, "a.wat"]).run()
    };
    grow(9, "640KiB").code(41);
    grow(10, "640KiB").code(137).stderr_has("memory limit of 640KiB");
    // what the guest itself has declared is the guest's own error
    grow(99, "256MiB").code(41);
    grow(100, "256MiB").code(39);
}

#[test]
fn what_a_thread_has_for_itself_is_bounded_with_that_of_the_others() {
    let run = |memory: &str, parts: &str| {
        let text = format!(
            r#"(module
                (import "env" "memory" (memory 1 2 shared))
                (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
                {parts})"#
        );
        Folder::new().file("a.wat", text).wrun(["threads", "--memory", memory, "a.wat"]).run()
    };
    // exceptions lie in a heap of the engine's
    let throws = r#"(tag $e (param i32))
        (func $throw (throw $e (i32.const 41)))
        (func (export "_start")
            (block $caught (result i32) (try_table (catch $e $caught) (call $throw)) (i32.const 0)) (call $exit))"#;
    run("16MiB", throws).code(41);
    let own = |pages: u32| format!(r#"(memory {pages}) (func (export "_start") (call $exit (i32.const 5)))"#);
    run("1MiB", &own(15)).code(5);
    run("1MiB", &own(16)).code(126).stderr_has("(--memory)");
    let grown =
        |pages: u32| format!(r#"(memory 1) (func (export "_start") (call $exit (memory.grow 1 (i32.const {pages}))))"#);
    run("1MiB", &grown(15)).code(1);
    run("1MiB", &grown(16)).code(137).stderr_has("memory limit of 1MiB");
}

#[test]
fn a_deep_recursion_ends_the_group() {
    let ran = wrun(["threads", HOSTILE_THREADS, "--", "recurse"]).run().code(134);
    ran.stderr_has("call stack exhausted (thread 1, thread-1)");
}

#[test]
fn any_module_that_imports_a_shared_memory_is_taken() {
    let run = |pages: &str, body: &str| Folder::new().file("a.wat", text(pages, body)).wrun(["threads", "a.wat"]).run();
    // a thread gets its number and its argument, and waiting for it works
    let spawned = "(if (i32.lt_s (call $spawn (i32.const 30)) (i32.const 1)) (then (call $exit (i32.const 1))))
        (drop (memory.atomic.wait32 (i32.const 24) (i32.const 0) (i64.const -1)))
        (call $exit (i32.add (i32.load (i32.const 16)) (i32.load (i32.const 20))))";
    run("1 1", spawned).code(31);
    run("1 1", "(unreachable)").code(134).stderr_has("(thread 0, main)");
    // a wait tells what it came to
    let wait = |expected: u32, timeout: i64| {
        let body = format!(
            "(call $exit (i32.add (i32.const 50) (memory.atomic.wait32 (i32.const 0) (i32.const {expected}) (i64.const {timeout}))))"
        );
        run("1 1", &body)
    };
    wait(1, -1).code(51);
    wait(0, 1_000_000).code(52);
    run("1 1", "(drop (memory.atomic.wait32 (i32.const 2) (i32.const 0) (i64.const 0)))").code(134);
}

#[test]
fn what_cannot_have_threads_is_told_why() {
    wrun(["threads", HELLO_P1])
        .run()
        .code(126)
        .error_and_hint(
            "it imports no shared memory, in which its threads could work",
            "build it with `--target wasm32-wasip1-threads`, or for C with `-pthread -Wl,--import-memory,--export-memory,--max-memory=…`",
        );
    let run = |wat: &str| Folder::new().file("a.wat", wat).wrun(["threads", "a.wat"]).run();
    let two = r#"(module (import "a" "a" (memory 1 1 shared)) (import "a" "b" (memory 1 1 shared)) (func (export "_start")))"#;
    run(two).code(126).stderr_has("more shared memories than the 1 that a guest may have");
    let large = r#"(module (import "a" "a" (memory i64 1 1 shared)) (func (export "_start")))"#;
    run(large).code(126).stderr_has("64-bit addresses");
    let unknown = r#"(module (import "a" "a" (memory 1 1 shared)) (import "a" "b" (func)) (func (export "_start")))"#;
    run(unknown).code(126).stderr_has("it imports `a::b`, which wrun does not offer");
    let both = r#"(module (import "a" "a" (memory 1 1 shared)) (memory 1 65536 shared) (func (export "_start")))"#;
    run(both).code(126).stderr_has("it defines a shared memory beside the one that it imports");
    let own = r#"(module (memory 1 1 shared) (func (export "_start")))"#;
    run(own).code(126);
    let calls = r#"(module (import "a" "a" (memory 1 1 shared))
        (import "wrun:shared-memory" "grow" (func (param i32) (result i32))) (func (export "_start")))"#;
    run(calls).code(126).stderr_has("which wrun does not offer");
    wrun(["threads", "--fuel", "1000", HOSTILE_THREADS]).run().code(2).stderr_has("fuel is not metered across threads");
    wrun(["threads", "--tasks", "-", PRIMES]).run().code(2).stderr_has("a command has no tasks");
    wrun(["threads", "-"]).run().code(2).stderr_has("expected a file for the guest");
}

#[test]
fn a_command_with_threads_can_live_on_its_mailbox() {
    let input = [
        r#"{"a":1.50}"#,
        r#"{"do":"wait","ms":10000}"#,
        "[2]",
        r#"{"do":"send","text":"no JSON"}"#,
        r#"{"do":"long","bytes":1001}"#,
        r#"{"do":"print","text":"aside"}"#,
    ];
    let ran = wrun(["fork", "--message-max", "1000B", COURIER_THREADS]).stdin(input.join("\n") + "\n").run().code(0);
    let text = ran.stdout_text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], [r#"{"a":1.50}"#, "[2]"]);
    assert!(lines[2].contains("not JSON") || lines[2].contains("expected"), "{}", lines[2]);
    assert!(lines[3].contains("1000"), "{}", lines[3]);
    assert_eq!(lines[lines.len() - 1], "\"bye\"");
    ran.stderr_has("aside");
    let told = wrun(["fork", "--data", "[7]", COURIER_THREADS]).stdin(r#"{"do":"tell"}"#).run().code(0).stdout_text();
    assert!(told.contains("[7]"), "{told}");
}

#[test]
fn groups_do_not_see_each_other() {
    let both = [(); 2].map(|()| wrun(["threads", HOSTILE_THREADS, "--", "count", "200000"]).spawn());
    for running in both {
        running.wait().code(0).stdout("800000 800000\n");
    }
}

#[test]
fn a_program_that_others_wrote_runs() {
    // it makes a pool of as many threads, and hashes files in that
    let folder = Folder::new().file("a", "").file("b", "abc");
    folder
        .wrun(["threads", "--dir", ".", FOREIGN_THREADS, "--", "--num-threads", "3", "a", "b"])
        .run()
        .code(0)
        .stdout(
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262  a\n\
             6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85  b\n",
        )
        .stderr("");
    // which are not there for it
    let refused =
        folder.wrun(["threads", "--threads", "2", "--dir", ".", FOREIGN_THREADS, "--", "--num-threads", "3", "a"]);
    refused.run().code(1).stderr_has("Resource temporarily unavailable");
}
