//! `wrun threads` with a handler: workers on one shared memory, each with its messages.

use guest_artifacts::{
    DATA_PROCESSOR_THREADS, ECHO, ECHO_THREADS, FIB_THREADS, HISTOGRAM, HISTOGRAM_THREADS, HOSTILE_WORKERS,
    HOSTILE_WORKERS_THREADS, KERNELS, KERNELS_THREADS, MANDELBROT, MANDELBROT_THREADS, PINGPONG, PINGPONG_THREADS, SUM,
    SUM_THREADS, WHOAMI_THREADS,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use crate::{
    jail::is_jailed,
    supervision::children,
    wrun::{Folder, wrun},
};

/// JSON lines, in the order of their workers and lines.
fn lines(text: &str) -> Vec<Value> {
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines.sort_by_key(|line| (line["line"].as_u64(), line["worker"].as_u64()));
    lines
}

/// Runs the workers on data, and answers what they say.
fn said(count: u32, guest: &str, data: &Value) -> Vec<Value> {
    let ran = wrun(["threads", "-t", &count.to_string(), guest, "--data", &data.to_string()]).run().code(0).stderr("");
    lines(&ran.stdout_text())
}

#[test]
fn workers_add_up_their_parts_and_the_last_replies() {
    for count in [1, 2, 3, 8] {
        let said = said(count, SUM_THREADS, &json!({"start": 5, "end": 1_000_000}));
        let [last] = &said[..] else { panic!("expected one reply: {said:?}") };
        assert_eq!(last["reply"]["total"], 499_999_500_000u64 - 10);
    }
    // the same source as a component
    let mut pool = wrun(["cluster", "-w", "1", SUM]).stdin(r#"{"start":5,"end":1000000}"#).run().code(0).stdout_json();
    assert_eq!(pool["reply"]["total"].take(), 499_999_499_990u64);
}

#[test]
fn counters_that_all_add_to_are_exact() {
    let alone = said(1, HISTOGRAM_THREADS, &json!({"values": 300_000}));
    let counts = &alone[0]["reply"]["counts"];
    let sum: u64 = counts.as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(sum, 300_000);
    for count in [2, 7] {
        assert_eq!(&said(count, HISTOGRAM_THREADS, &json!({"values": 300_000}))[0]["reply"]["counts"], counts);
    }
    let pool = wrun(["cluster", "-w", "1", HISTOGRAM]).stdin(r#"{"values":300000}"#).run().code(0).stdout_json();
    assert_eq!(&pool["reply"]["counts"], counts);
}

#[test]
fn a_picture_is_drawn_by_all_and_written_by_one() {
    let folder = Folder::new().folder("out");
    let draw = |count: &str, file: &str| {
        let data = json!({"width": 90, "height": 60, "file": format!("out/{file}")}).to_string();
        let args = ["threads", "-t", count, "--dir", "out", MANDELBROT_THREADS, "--data", &data];
        let reply = folder.wrun(args).run().code(0).stdout_json()["reply"].take();
        (reply, std::fs::read(folder.path(format!("out/{file}"))).unwrap())
    };
    let (one, picture) = draw("1", "one.pgm");
    assert!(picture.starts_with(b"P5 90 60 255\n") && picture.len() == 13 + 90 * 60);
    assert_eq!(one["rows"], json!([60]));
    assert!(picture[13..].contains(&0) && picture[13..].iter().max() > Some(&250), "black, and nearly white");
    let (three, same) = draw("3", "three.pgm");
    assert_eq!(same, picture);
    let rows = three["rows"].as_array().unwrap();
    assert_eq!((rows.len(), rows.iter().map(|rows| rows.as_u64().unwrap()).sum::<u64>()), (3, 60));
    // not without a grant, which the last worker is told
    let data = json!({"width": 9, "height": 6, "file": "out/no.pgm"}).to_string();
    let denied = folder.wrun(["threads", "-t", "2", MANDELBROT_THREADS, "--data", &data]).run().code(0);
    assert_eq!(denied.stdout_json()["error"]["kind"], "guest");
    let pool = folder.wrun(["cluster", "-w1", MANDELBROT]).stdin(r#"{"width":90,"height":60}"#).run().code(0);
    assert_eq!(pool.stdout_json()["reply"]["sum"], one["sum"]);
}

#[test]
fn what_benches_measure_is_computed() {
    for kernel in [
        json!({"kernel": "sum", "numbers": 1000}),
        json!({"kernel": "map", "numbers": 1000}),
        json!({"kernel": "mandelbrot", "size": 16}),
        json!({"kernel": "fib", "n": 10}),
        json!({"kernel": "spawn", "count": 2}),
    ] {
        let said = said(2, KERNELS_THREADS, &kernel);
        assert!(said.len() == 2 && said.iter().all(|line| line["reply"]["ms"].is_f64()), "{said:?}");
        // alone, and without threads of its own
        if kernel["kernel"] != "spawn" {
            let alone = wrun(["cluster", "-w", "1", KERNELS]).stdin(kernel.to_string()).run().code(0).stdout_json();
            assert!(alone["reply"]["ms"].is_f64(), "{alone}");
        }
    }
}

#[test]
fn workers_wake_each_other() {
    let said = said(2, PINGPONG_THREADS, &json!({"rounds": 2000}));
    assert_eq!((&said[0]["worker"], &said[0]["reply"]["rounds"]), (&json!(1), &json!(2000)));
    let alone = wrun(["cluster", "-w", "1", PINGPONG]).stdin(r#"{"rounds":1}"#).run().code(0).stdout_json();
    assert_eq!(alone["error"]["value"], "expected 2 workers, found 1");
}

#[test]
fn each_worker_has_an_identity_and_they_share_what_is_static() {
    let data = json!({"do": "who"});
    let mut said = said(3, HOSTILE_WORKERS_THREADS, &data);
    let mut here: Vec<_> = said.iter_mut().map(|line| line["reply"]["here"].take().as_u64().unwrap()).collect();
    here.sort_unstable();
    assert_eq!(here, [1, 2, 3]);
    let of = |id: u32| {
        json!({"worker": id, "reply":
            {"id": id, "count": 3, "name": "hostile-workers", "data": data, "here": null}})
    };
    assert_eq!(said, [of(1), of(2), of(3)]);
    let who = self::said(2, WHOAMI_THREADS, &json!(7));
    assert_eq!((&who[1]["reply"]["kind"], &who[1]["reply"]["data"]), (&json!("thread"), &json!(7)));
}

#[test]
fn lines_go_to_whoever_is_free() {
    let input: String = (1..=200).map(|n| format!("{{\"data\":[{n}]}}\n")).collect();
    let ran = wrun(["threads", "-t", "4", "--tasks", "-", DATA_PROCESSOR_THREADS]).stdin(input).run().code(0);
    for (index, line) in lines(&ran.stdout_text()).iter().enumerate() {
        let number = index as u64 + 1;
        assert_eq!(line["line"], number);
        assert_eq!(line["reply"], json!({"result": [number * 2], "count": 1}));
        assert!((1..=4).contains(&line["worker"].as_u64().unwrap()));
    }
    assert_eq!(ran.stdout_text().lines().count(), 200);

    // two that wait for each other are at work at once
    let meet = "{\"do\":\"meet\",\"workers\":2}\n".repeat(2);
    let ran = wrun(["threads", "-t", "2", "--tasks", "-", HOSTILE_WORKERS_THREADS]).stdin(meet).run().code(0);
    let workers: Vec<_> = lines(&ran.stdout_text()).iter().map(|line| line["reply"].clone()).collect();
    assert!(workers == [json!(1), json!(2)] || workers == [json!(2), json!(1)], "{workers:?}");

    // lines that are no messages are told of, counted, and skipped
    let ran = wrun(["threads", "-t", "1", "--tasks", "-", FIB_THREADS]).stdin("10\nnope\n20\n").run().code(123);
    assert_eq!(
        lines(&ran.stdout_text()),
        [
            json!({"worker": 1, "line": 1, "reply": {"n": 10, "fib": 55}}),
            json!({"worker": 1, "line": 3, "reply": {"n": 20, "fib": 6765}})
        ]
    );
    ran.stderr_has("line 2 is no message");
    let folder = Folder::new().file("tasks", "1\n2\n");
    let ran = folder.wrun(["threads", "-t", "1", "--tasks", "tasks", ECHO_THREADS]).run().code(0);
    assert_eq!(lines(&ran.stdout_text()).len(), 2);
    folder.wrun(["threads", "--tasks", "none", ECHO_THREADS]).run().code(2).stderr_has("could not open the tasks");
}

#[test]
fn every_one_of_many_tasks_gets_its_own_answer() {
    let input: String = (1..=480_000u32).map(|n| format!("{{\"n\":{n}}}\n")).collect();
    let ran = wrun(["threads", "-t", "4", "--tasks", "-", ECHO_THREADS]).stdin(input).run().code(0).stderr("");
    let mut answered = vec![false; 480_001];
    for line in ran.stdout_text().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let number = line["line"].as_u64().unwrap();
        assert_eq!(line["reply"]["n"], number);
        assert!(!std::mem::replace(&mut answered[usize::try_from(number).unwrap()], true), "{number} twice");
    }
    assert!(answered[1..].iter().all(|answered| *answered));
}

#[test]
fn what_workers_send_and_what_they_fail_is_told_of_each() {
    let said = self::said(2, HOSTILE_WORKERS_THREADS, &json!({"do": "send", "message": [1, {"a": 2}]}));
    let of = |worker: u32| said.iter().filter(move |line| line["worker"] == worker).collect::<Vec<_>>();
    for worker in [1, 2] {
        let [sent, reply] = of(worker)[..] else { panic!("{said:?}") };
        assert_eq!((&sent["message"], &reply["reply"]), (&json!([1, {"a": 2}]), &json!("sent")));
    }
    let failed = self::said(2, HOSTILE_WORKERS_THREADS, &json!({"do": "fail"}));
    assert_eq!(failed[1], json!({"worker": 2, "error": {"kind": "guest", "value": {"failed": 2}}}));
    let text = self::said(1, ECHO_THREADS, &json!("é漢🦀"));
    assert_eq!(text[0]["reply"], "é漢🦀");
}

#[test]
fn one_worker_that_fails_ends_all_and_is_named() {
    let run = |data: &str| {
        wrun(["threads", "-t", "4", "--timeout", "1h", HOSTILE_WORKERS_THREADS, "--data", data]).run().stdout("")
    };
    run(r#"{"worker":3,"do":"trap"}"#).code(134).stderr_has("instruction executed (thread 3, worker-3)");
    run(r#"{"worker":2,"do":"panic"}"#).code(134).stderr_has("on purpose").stderr_has("(thread 2, worker-2)");
    run(r#"{"worker":2,"do":"exit","code":9}"#).code(9);
    run(r#"{"worker":1,"do":"grow"}"#).code(137).stderr_has("memory limit of 256MiB (thread 1, worker-1)");
}

#[test]
fn a_time_limit_ends_workers_that_wait_sleep_and_loop() {
    for act in ["wait", "sleep", "spin"] {
        let data = json!({"do": act}).to_string();
        let ran = wrun(["threads", "-t", "3", "--timeout", "500ms", HOSTILE_WORKERS_THREADS, "--data", &data]).run();
        ran.code(124).stderr_has("hit the time limit of 500ms").stdout("");
    }
}

#[test]
fn the_message_limit_holds_both_ways() {
    let run = |data: &str| {
        wrun(["threads", "-t", "1", "--message-max", "1000B", HOSTILE_WORKERS_THREADS, "--data", data]).run()
    };
    let just = run(r#"{"do":"long","bytes":1000}"#).code(0).stdout_json();
    assert_eq!(just["reply"].as_str().unwrap().len(), 998);
    run(r#"{"do":"long","bytes":1001}"#).code(123).stderr_has("message limit of 1000B (thread 1, worker-1)");
    let long = |length: usize| format!("\"{}\"", "x".repeat(length - 2));
    run(&long(1000)).code(0);
    run(&long(1001)).code(2).stderr_has("1001 bytes long, at most 1000 are allowed");
    let send = |length: usize| json!({"do": "send", "message": "x".repeat(length - 2)}).to_string();
    assert_eq!(run(&send(960)).code(0).stdout_text().lines().count(), 2);
}

#[test]
fn workers_are_kept_and_named_and_in_a_jail() {
    let args = ["threads", "-t", "2", "--isolation", "jail", "--pin", "--tasks", "-", HOSTILE_WORKERS_THREADS];
    let mut running = wrun(args).stdin_open().spawn();
    running.write_line("1");
    assert!(running.stdout_line().ends_with("\"line\":1,\"reply\":1}"));
    let [child] = children(running.pid())[..] else { panic!("expected one child") };
    is_jailed(child);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.as_raw_nonzero())).unwrap().flatten();
    let status = |path: std::path::PathBuf| std::fs::read_to_string(path.join("status")).unwrap();
    let mut workers: Vec<_> = tasks
        .map(|task| status(task.path()))
        .filter(|status| status.starts_with("Name:\thosti/worker-"))
        .map(|status| status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).unwrap().to_owned())
        .collect();
    workers.sort();
    assert_eq!(workers.len(), 2);
    // one core each, and not the same
    assert!(workers.iter().all(|cores| cores.parse::<u32>().is_ok()), "{workers:?}");
    assert!(std::thread::available_parallelism().unwrap().get() == 1 || workers[0] != workers[1], "{workers:?}");
    running.write_line("2");
    assert!(running.stdout_line().ends_with("\"line\":2,\"reply\":2}"));
    running.close_stdin();
    running.wait().code(0);
}

#[test]
fn a_signal_lets_workers_finish_and_a_second_one_does_not() {
    let mut running = wrun(["threads", "-t", "2", "--tasks", "-", HOSTILE_WORKERS_THREADS]).stdin_open().spawn();
    running.write_line("1");
    running.stdout_line();
    running.signal(Signal::TERM);
    running.wait().code(0);
    let args = ["threads", "-t", "1", "--tasks", "-", "--log-format", "json", HOSTILE_WORKERS_THREADS];
    let mut running = wrun(args).stdin_open().spawn();
    running.write_line("1");
    running.write_line(r#"{"do":"wait"}"#);
    running.stdout_line();
    running.signal(Signal::TERM);
    running.stderr_line_with("\"disconnect\"");
    running.signal(Signal::TERM);
    running.wait().code(137);
}

#[test]
fn other_guests_are_told_what_they_lack() {
    wrun(["threads", ECHO]).run().code(126).stderr_has("it imports no shared memory");
    wrun(["threads", HOSTILE_WORKERS]).run().code(126).stderr_has("it imports no shared memory");
    let handler = "expected a handler guest, found a handler guest (core module)";
    wrun(["cluster", ECHO_THREADS]).run().code(126).error_and_hint(handler, "use `wrun threads`");
    for mode in ["run", "spawn", "exec", "fork"] {
        wrun([mode, ECHO_THREADS]).run().code(126).stderr_has("use `wrun threads`");
    }
    wrun(["threads", "-t", "65", ECHO_THREADS])
        .run()
        .code(2)
        .stderr_has("expected at most 64 workers (--threads), found 65");
    wrun(["threads", "-t", "65", "--threads", "65", ECHO_THREADS, "--data", "1"]).run().code(0);
    wrun(["threads", ECHO_THREADS, "--data", "{"]).run().code(2).stderr_has("expected JSON for `--data`");
    let inspected = wrun(["inspect", "--json", ECHO_THREADS]).run().code(0).stdout_json();
    assert_eq!((&inspected["shape"], &inspected["modes"]), (&json!("handler"), &json!(["threads"])));
    assert_eq!(inspected["shared_memory"], "env::memory");
}

#[test]
fn a_guest_that_was_built_against_another_contract_is_refused_by_name() {
    let group = "interface thread-group { start: func(workers: u32) -> bool; }";
    let exports = r#"(func (export "wrun:guest/thread-group@0.1.0#start") (param i32) (result i32) (i32.const 0))
        (func (export "wrun:guest/handler@0.1.0#handle") (param i32 i32) (result i32) (i32.const 0))"#;
    let run = |interfaces: &str| {
        Folder::new().file("a.wasm", handler(interfaces, "", exports)).wrun(["threads", "-t", "1", "a.wasm"]).run()
    };
    // bytes instead of a text have the same flat type
    run(&format!("interface handler {{ handle: func(message: list<u8>) -> result<option<string>, string>; }} {group}"))
        .code(126)
        .stderr_has(
            "`wrun:guest/handler.handle` is `func(string) -> result<option<string>, string>` in wrun, and \
             `func(list<u8>) -> result<option<string>, string>` in the guest",
        );
    let handle = "handle: func(message: string) -> result<option<string>, string>;";
    run(&format!("interface handler {{ {handle} undo: func(); }} {group}"))
        .code(126)
        .stderr_has("wrun's `wrun:guest/handler` has no `handler.undo`");
    // the right one gets further: it says that it can make no threads
    run(&format!("interface handler {{ {handle} }} {group}")).code(134).stderr_has("it could not make 1 threads");
    // and one that says nothing of itself, a command included
    let command = r#"(module (import "env" "memory" (memory 1 1 shared))
        (import "wrun:guest/worker@0.1.0" "get-data" (func (param i32))) (func (export "_start")))"#;
    let ran = Folder::new().file("a.wat", command).wrun(["threads", "a.wat"]).run();
    ran.code(126).stderr_has("it has no section `component-type`");
    let silent = format!(r#"(module (import "env" "memory" (memory 1 1 shared)) {exports})"#);
    let ran = Folder::new().file("a.wat", silent).wrun(["threads", "a.wat"]).run();
    ran.code(126).stderr_has("it has no section `component-type`");
}

#[test]
fn a_guest_that_breaks_the_abi_ends_its_group() {
    let wit = "interface handler { handle: func(message: string) -> result<option<string>, string>; }
        interface thread-group { start: func(workers: u32) -> bool; }";
    let run = |serve: &str, handle: &str| {
        let exports = format!(
            r#"(import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
            (import "wrun:guest/thread@0.1.0" "serve" (func $serve (param i32)))
            (func (export "wasi_thread_start") (param i32 i32) {serve})
            (func (export "wrun:guest/thread-group@0.1.0#start") (param i32) (result i32)
                (i32.gt_s (call $spawn (i32.const 1)) (i32.const 0)))
            (func (export "cabi_post_wrun:guest/handler@0.1.0#handle") (param i32))
            (func (export "wrun:guest/handler@0.1.0#handle") (param i32 i32) (result i32) {handle})"#
        );
        // imports come first
        let (imports, rest) = exports.split_at(exports.find("(func (export").unwrap());
        let wasm = handler(wit, imports, rest);
        Folder::new().file("a.wasm", wasm).wrun(["threads", "-t", "1", "--timeout", "10s", "a.wasm"]).run()
    };
    let serve = "(call $serve (i32.const 1))";
    // no reply: result.ok(option.none)
    run(serve, "(i64.store (i32.const 64) (i64.const 0)) (i32.const 64)").code(0).stdout("");
    run(serve, "(i32.const 65530)").code(134).stderr_has("its answer lies outside of its memory");
    run(serve, "(i32.store8 (i32.const 64) (i32.const 7)) (i32.const 64)").code(134).stderr_has("no case of a result");
    let far = "(i32.store (i32.const 64) (i32.const 1)) (i32.store (i32.const 68) (i32.const 65535))
        (i32.store (i32.const 72) (i32.const 100)) (i32.const 64)";
    run(serve, far).code(134).stderr_has("a text lies outside of its memory");
    let latin = "(i32.store (i32.const 64) (i32.const 1)) (i32.store (i32.const 68) (i32.const 80))
        (i32.store (i32.const 72) (i32.const 1)) (i32.store8 (i32.const 80) (i32.const 0xe9)) (i32.const 64)";
    run(serve, latin).code(134).stderr_has("a text is not UTF-8");
    run("(call $serve (i32.const 2))", "(i32.const 0)").code(134).stderr_has("it makes worker 2 of 1");
    run("", "(i32.const 0)").code(134).stderr_has("its threads have ended before their work");
    // JSON that is none is an error of that answer
    let word = "(i32.store (i32.const 64) (i32.const 0)) (i32.store (i32.const 68) (i32.const 1))
        (i32.store (i32.const 72) (i32.const 80)) (i32.store (i32.const 76) (i32.const 1))
        (i32.store8 (i32.const 80) (i32.const 0x78)) (i32.const 64)";
    let invalid = run(serve, word).code(0).stdout_json();
    assert_eq!(invalid["error"]["kind"], "invalid");
}

/// A handler in text, with the section that bindings made of these interfaces would leave in it.
fn handler(wit: &str, imports: &str, exports: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let wit = format!("package wrun:guest@0.1.0; {wit} world threads-guest {{ export handler; export thread-group; }}");
    let package = resolve.push_str("a.wit", &wit).unwrap();
    let world = resolve.packages[package].worlds["threads-guest"];
    let text = format!(
        r#"(module
            {imports}
            (import "env" "memory" (memory 1 1 shared))
            (export "memory" (memory 0))
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
            {exports})"#
    );
    let mut wasm = wat::parse_str(text).unwrap();
    embed_component_metadata(&mut wasm, &resolve, world, StringEncoding::UTF8).unwrap();
    wasm
}
