//! `wrun cluster` on JSON lines: what goes in, what comes out, and what bounds it.

use std::{collections::BTreeMap, fs::File};

use guest_artifacts::{CRASH_AT_START, DATA_PROCESSOR, ECHO, FIB, HELLO, HOSTILE, WHOAMI};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::wrun::{Finished, Folder, wrun};

/// The answers by line; every line is answered once.
#[track_caller]
fn answers(finished: &Finished) -> BTreeMap<u64, Value> {
    let mut answers = BTreeMap::new();
    for line in finished.stdout_text().lines() {
        let answer: Value = serde_json::from_str(line).expect(line);
        let number = answer["line"].as_u64().expect(line);
        assert!(answers.insert(number, answer).is_none(), "line {number} is answered twice\n{}", finished.transcript());
    }
    answers
}

#[test]
fn every_line_is_answered_once() {
    let input: String = (1..=200).map(|n| format!("{}\n", n % 20)).collect();
    let finished = wrun(["cluster", FIB, "-w", "2"]).stdin(input).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers.len(), 200);
    assert_eq!(answers[&10]["reply"], json!({"n": 10, "fib": 55}));
    assert_eq!(answers[&199]["reply"], json!({"n": 19, "fib": 4181}));
}

#[test]
fn the_guides_example_maps_an_array() {
    wrun(["cluster", DATA_PROCESSOR, "-w", "1"])
        .stdin("{\"data\":[1,2,3]}\n")
        .run()
        .code(0)
        .stdout("{\"line\":1,\"reply\":{\"result\":[2,4,6],\"count\":3}}\n");
}

#[test]
fn json_comes_back_byte_for_byte() {
    let texts = [
        "42",
        "-0.0",
        "1e400",
        "123456789012345678901234567890.10",
        r#"{"b":1,"a":{"z":[ 1 , 2 ]},"b":2}"#,
        r#""\u00e9\/\ud83d\ude00 é 漢""#,
        r#""a\tb\\n""#,
        "null",
        "[]",
    ];
    let input = texts.join("\n");
    let expected: String = (1..).zip(texts).map(|(n, text)| format!("{{\"line\":{n},\"reply\":{text}}}\n")).collect();
    // the last line has no end, and counts
    wrun(["cluster", ECHO, "-w", "2", "--ordered"]).stdin(input).run().code(0).stdout(expected);
}

#[test]
fn no_input_is_no_work() {
    wrun(["cluster", ECHO, "-w", "1"]).run().code(0).stdout("");
    wrun(["cluster", ECHO, "-w", "1"]).stdin("\n \n").run().code(0).stdout("");
}

#[test]
fn what_is_no_message_is_refused_by_line() {
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    let input = [b"1\n{\"a\":\n\"\xff\"\n".as_slice(), deep.as_bytes(), b"\n\n6\n"].concat();
    let finished = wrun(["cluster", ECHO, "-w", "1"]).stdin(input).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers[&1]["reply"], 1);
    let message = |line| answers[&line]["error"]["message"].as_str().expect("a message").to_owned();
    assert!(message(2).starts_with("not JSON: EOF"), "{}", message(2));
    assert_eq!(message(3), "not UTF-8 at byte 1");
    assert_eq!(message(4), "nested deeper than 128 levels");
    assert_eq!(answers[&6]["reply"], 6, "blank lines are counted");
    assert_eq!(answers.len(), 5);
}

#[test]
fn the_message_limit_holds_both_ways() {
    let string = |length: usize| format!("\"{}\"", "x".repeat(length - 2));
    let input = format!("{}\n{}\n", string(1000), string(1001));
    let finished = wrun(["cluster", ECHO, "-w", "1", "--message-max", "1000B"]).stdin(input).run().code(0);
    let answer = answers(&finished);
    assert_eq!(answer[&1]["reply"].as_str().map(str::len), Some(998));
    assert_eq!(answer[&2]["error"]["message"], "1001 bytes long, at most 1000 are allowed (--message-max)");

    let input = "{\"do\":\"giant\",\"bytes\":1000}\n{\"do\":\"giant\",\"bytes\":1001}\n{\"do\":\"ok\"}\n";
    let finished = wrun(["cluster", HOSTILE, "-w", "1", "--message-max", "1000B"]).stdin(input).run().code(0);
    let answer = answers(&finished);
    assert_eq!(answer[&1]["reply"].as_str().map(str::len), Some(998));
    assert_eq!((&answer[&2]["error"]["kind"], &answer[&2]["error"]["limit"]), (&json!("limit"), &json!("message")));
    assert_eq!(answer[&3]["reply"], json!({"ok": true}));
}

#[test]
fn a_mebibyte_each_way_at_once_does_not_deadlock() {
    let line = format!("\"{}\"\n", "x".repeat((1 << 20) - 2));
    let finished = wrun(["cluster", ECHO, "-w", "2"]).stdin(line.repeat(48)).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers.len(), 48);
    assert!(answers.values().all(|answer| answer["reply"].as_str().map(str::len) == Some((1 << 20) - 2)));
}

#[test]
fn a_reader_that_stops_pauses_the_pool_and_loses_nothing() {
    let line = format!("\"{}\"\n", "x".repeat((64 << 10) - 2));
    let mut running = wrun(["cluster", ECHO, "-w", "2", "--queue", "4"]).stdin_open().spawn();
    running.pause_stdout();
    running.write_later(line.repeat(1000));
    // the first answer is there, and all that can be taken without a reader is taken
    running.stderr_line_with("ready");
    running.until_input_stalls();
    assert!(running.unwritten() > 32 << 20, "{} of 62 MiB are still to be read", running.unwritten());
    for _ in 0..1000 {
        assert!(running.stdout_line().len() > 64 << 10);
    }
    running.close_stdin();
    running.wait().code(0);
}

#[test]
fn errors_of_the_guest_are_answers() {
    let input = r#"{"do":"error"}
{"do":"none"}
{"do":"invalid"}
{"do":"deep","depth":129}
{"do":"deep","depth":100}
{"do":"ok"}
"#;
    let finished = wrun(["cluster", HOSTILE, "-w", "1"]).stdin(input).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers[&1]["error"], json!({"kind": "guest", "value": {"error": "as told"}}));
    assert_eq!(answers[&2], json!({"line": 2}));
    assert_eq!(answers[&3]["error"]["kind"], "invalid");
    assert_eq!(answers[&4]["error"]["message"], "nested deeper than 128 levels");
    assert!(answers[&5]["reply"].is_array());
    assert_eq!(answers[&6]["reply"], json!({"ok": true}));
}

#[test]
fn a_trap_fails_its_task_and_drops_its_instance_only() {
    let input = "{\"do\":\"count\"}\n{\"do\":\"count\"}\n{\"do\":\"trap\"}\n{\"do\":\"recurse\"}\n{\"do\":\"count\"}\n";
    let finished = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin(input).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers[&2]["reply"], json!({"count": 2}));
    assert_eq!(answers[&3]["error"]["kind"], "trapped");
    let backtrace = answers[&3]["error"]["backtrace"].to_string();
    assert!(backtrace.contains("abort"), "{backtrace}");
    assert_eq!(answers[&4]["error"]["trap"], "call stack exhausted");
    assert_eq!(answers[&5]["reply"], json!({"count": 1}), "nothing of the old instance is left");
    let forks = finished.stderr_text().matches("\"event\":\"fork\"").count();
    assert_eq!(forks, 1, "the worker lives on\n{}", finished.transcript());
}

#[test]
fn an_instance_lives_for_the_worker_or_for_one_task() {
    let handled = |life| {
        let args = ["cluster", WHOAMI, "-w", "1", "--ordered", "--instance", life];
        let finished = wrun(args).stdin("0\n0\n0\n").run().code(0);
        answers(&finished).values().map(|answer| answer["reply"]["handled"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(handled("worker"), [1, 2, 3]);
    assert_eq!(handled("task"), [1, 1, 1]);
}

#[test]
fn a_worker_knows_who_it_is_and_what_it_was_given() {
    let args = ["cluster", WHOAMI, "-w", "3", "--data", r#"{"big":12345678901234567890123,"f":1.10}"#];
    let finished = wrun(args).stdin("0\n").run().code(0);
    let text = finished.stdout_text();
    assert!(text.contains(r#""data":{"big":12345678901234567890123,"f":1.10}"#), "{text}");
    let reply = &answers(&finished)[&1]["reply"];
    assert_eq!((&reply["kind"], &reply["count"], &reply["generation"]), (&json!("process"), &json!(3), &json!(1)));
    assert_eq!(reply["name"], "whoami");
    assert!((1..=3).contains(&reply["id"].as_u64().unwrap()));

    wrun(["cluster", WHOAMI, "--data", "{oops"])
        .run()
        .code(2)
        .stderr_has("expected JSON for `--data`, but it is not JSON: key must be a string");
}

#[test]
fn several_tasks_share_a_worker_when_told_to() {
    // the second is answered while the first sleeps, by the only worker
    let mut running = wrun(["cluster", HOSTILE, "-w", "1", "--concurrency", "2"]).stdin_open().spawn();
    running.write_line(r#"{"do":"sleep","ms":1000}"#);
    running.write_line(r#"{"do":"ok"}"#);
    assert_eq!(running.stdout_line(), r#"{"line":2,"reply":{"ok":true}}"#);
    assert_eq!(running.stdout_line(), r#"{"line":1,"reply":{"ms":1000}}"#);
    running.close_stdin();
    running.wait().code(0);

    wrun(["cluster", HOSTILE, "--concurrency", "2", "--interrupt", "kill"])
        .run()
        .code(2)
        .error("`kill` would end all the tasks of a worker: use `epoch` when it handles several at once");
}

#[test]
fn ordered_answers_follow_the_input() {
    let input: String =
        (0..40).map(|n| format!("{{\"do\":\"sleep\",\"ms\":{}}}\n", if n % 8 == 0 { 30 } else { 0 })).collect();
    let finished = wrun(["cluster", HOSTILE, "-w", "2", "--ordered"]).stdin(input).run().code(0);
    let lines: Vec<u64> = finished
        .stdout_text()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["line"].as_u64().unwrap())
        .collect();
    assert_eq!(lines, (1..=40).collect::<Vec<_>>());
}

#[test]
fn what_guests_print_is_prefixed_and_never_among_the_answers() {
    let input = r#"{"do":"stdout","text":"one\ntwo\u001b[31m"}
{"do":"stderr","text":"three\n"}
"#;
    let finished = wrun(["cluster", HOSTILE, "-w", "1"]).stdin(input).run().code(0);
    assert_eq!(answers(&finished).len(), 2);
    let finished = finished.stderr_has("[1] | one\n[1] | two\\u{1b}[31m\n");
    finished.stderr_has("[1] ! three\n");
}

#[test]
fn a_flood_of_output_is_bounded_and_counted() {
    let input = "{\"do\":\"flood\",\"lines\":100000,\"bytes\":100}\n{\"do\":\"ok\"}\n";
    let finished = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin(input).run().code(0);
    assert_eq!(answers(&finished).len(), 2);
    let (mut printed, mut dropped) = (0, 0);
    for line in finished.stderr_text().lines() {
        let event: Value = serde_json::from_str(line).expect(line);
        match event["event"].as_str() {
            Some("output") => printed += event["line"].as_str().unwrap().len() as u64 + 1,
            Some("drop") => dropped += event["bytes"].as_u64().unwrap(),
            _ => {}
        }
    }
    // lines of 100 bytes, or of 100 and their end: each byte is either printed or counted
    assert!(printed + dropped >= 10_000_000, "{printed} + {dropped}");
    assert!(dropped > 5_000_000, "{printed} + {dropped}");
}

#[test]
fn a_stuck_reader_of_the_news_does_not_stop_the_pool() {
    let mut running = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin_open().spawn();
    running.pause_stderr();
    // ten times what a pipe holds
    running.write_line(r#"{"do":"flood","lines":7000,"bytes":100}"#);
    running.write_line(r#"{"do":"ok"}"#);
    assert_eq!(running.stdout_line(), r#"{"line":1,"reply":{"written":true}}"#);
    assert_eq!(running.stdout_line(), r#"{"line":2,"reply":{"ok":true}}"#);
    running.resume_stderr();
    running.close_stdin();
    let finished = running.wait().code(0);
    let last = finished.stderr_json();
    assert_eq!((&last["event"], &last["tasks"]), (&json!("exit"), &json!(2)), "{}", finished.transcript());
    assert_eq!(finished.stderr_text().matches("\"event\":\"output\"").count(), 7000);
}

#[test]
fn messages_of_the_guest_are_events() {
    let input = r#"{"do":"send","message":{"n":1.5}}
{"do":"send-raw","text":"{oops"}
{"do":"receive","ms":10000}
"#;
    let finished = wrun(["cluster", HOSTILE, "-w", "1", "--log-format", "json"]).stdin(input).run().code(0);
    let answers = answers(&finished);
    assert_eq!(answers[&1]["reply"], json!({"sent": true}));
    assert_eq!(answers[&2]["reply"]["error"], "not-json");
    assert_eq!(answers[&3]["reply"]["error"], "closed", "a handler's messages come as tasks");
    finished.stderr_has(r#"{"event":"message","worker":1,"message":{"n":1.5}}"#);
}

#[test]
fn grants_reach_the_guest_and_nothing_else_does() {
    let folder = Folder::new().file("in/a.txt", "hello").folder("out");
    let input = r#"{"do":"read","path":"in/a.txt"}
{"do":"write","path":"in/b.txt","text":"x"}
{"do":"write","path":"out/b.txt","text":"x"}
{"do":"read","path":"/etc/passwd"}
{"do":"env"}
"#;
    let args = ["cluster", HOSTILE, "-w", "1", "--dir", "in:ro", "--dir", "out", "--env", "A=b"];
    let granted = answers(&folder.wrun(args).env("SECRET", "x").stdin(input).run().code(0));
    assert_eq!(granted[&1]["reply"], json!({"text": "hello"}));
    assert!(granted[&2]["reply"]["error"].is_string(), "{}", granted[&2]);
    assert_eq!(granted[&3]["reply"], json!({"written": true}));
    assert!(granted[&4]["reply"]["error"].is_string(), "{}", granted[&4]);
    assert_eq!(granted[&5]["reply"], json!({"A": "b"}));
    assert_eq!(folder.read("out/b.txt"), "x");

    let denied = answers(&folder.wrun(["cluster", HOSTILE, "-w", "1"]).env("SECRET", "x").stdin(input).run().code(0));
    for line in [1, 2, 3, 4] {
        assert!(denied[&line]["reply"]["error"].is_string(), "{}", denied[&line]);
    }
    assert_eq!(denied[&5]["reply"], json!({}));

    folder.wrun(["cluster", HOSTILE, "--dir", "missing"]).run().code(2).stderr_has("could not grant `--dir missing`");
}

#[test]
fn limits_hold_in_a_pool() {
    let kinds = |args: &[&str], input: &str| {
        let finished = wrun(["cluster", HOSTILE, "-w", "1"]).args(args).stdin(input).run().code(0);
        answers(&finished)
            .into_values()
            .map(|answer| answer["error"]["limit"].as_str().map_or_else(|| answer["reply"].to_string(), str::to_owned))
            .collect::<Vec<_>>()
    };
    let input = "{\"do\":\"grow\",\"mib\":4}\n{\"do\":\"grow\",\"mib\":32}\n{\"do\":\"grow\",\"mib\":4}\n";
    assert_eq!(kinds(&["--memory", "16MiB"], input), [r#"{"mib":4}"#, "memory", r#"{"mib":4}"#]);
    let input = "{\"do\":\"ok\"}\n{\"do\":\"spin\"}\n{\"do\":\"ok\"}\n";
    assert_eq!(kinds(&["--fuel", "10000000"], input), [r#"{"ok":true}"#, "fuel", r#"{"ok":true}"#]);
    for interrupt in ["kill", "epoch"] {
        let input = "{\"do\":\"sleep\",\"ms\":1}\n{\"do\":\"spin\"}\n{\"do\":\"sleep\"}\n{\"do\":\"ok\"}\n";
        assert_eq!(
            kinds(&["--timeout", "300ms", "--interrupt", interrupt], input),
            [r#"{"ms":1}"#, "time", "time", r#"{"ok":true}"#],
            "{interrupt}"
        );
    }
}

#[test]
fn a_memory_that_starts_larger_than_the_limit_is_named_with_what_it_needs() {
    let found = wrun(["inspect", "--json", HOSTILE]).run().code(0).stdout_json();
    let needs = found["memory_min"].as_u64().unwrap();
    let pool = |memory: u64| {
        let memory = format!("{memory}B");
        wrun(["cluster", HOSTILE, "-w", "1", "--memory", &memory]).stdin("{\"do\":\"ok\"}\n").run()
    };
    pool(needs).code(0).stdout("{\"line\":1,\"reply\":{\"ok\":true}}\n");
    let just_under = pool(needs - 1).code(126).stdout("");
    just_under.stderr_has("it starts with ").stderr_has("hint: give it more: `--memory ");
    wrun(["cluster", HOSTILE, "--memory", "5GiB"])
        .run()
        .code(2)
        .error("expected at most 4GiB of memory for one instance");
}

#[test]
fn an_import_that_wrun_does_not_offer_is_named_before_a_worker_is_started() {
    let folder = Folder::new().file(
        "saw.wat",
        r#"(component
            (import "acme:tools/saw@1.0.0" (instance (export "cut" (func))))
            (instance $nothing)
            (export "wrun:guest/handler@0.1.0" (instance $nothing)))"#,
    );
    folder.wrun(["cluster", "saw.wat"]).stdin("1\n").run().code(126).error_and_hint(
        "it imports `acme:tools/saw@1.0.0`, which wrun does not offer",
        "wrun offers WASI preview 1, WASI 0.2 and wrun:guest@0.1.0",
    );
}

#[test]
fn a_reader_that_stalls_for_ever_is_not_waited_for_after_a_signal() {
    let mut running = wrun(["cluster", "-w1", "--log-format=json", ECHO]).stdin_open().spawn();
    running.pause_stdout();
    let line = format!("\"{}\"\n", "x".repeat(1 << 19));
    // more than the pipe takes, and less than is too much to wait
    running.write(line.repeat(4));
    running.close_stdin();
    running.stderr_line_with("\"event\":\"exit\"");
    running.signal(Signal::TERM);
    running.until_ended();
    running.close_stdout();
    running.wait().code(143);
}

#[test]
fn a_guest_that_no_pool_can_run_is_named_in_one_line() {
    wrun(["cluster", "-"])
        .stdin("1\n")
        .run()
        .code(2)
        .error("expected a file for the guest: standard input has the tasks");
    wrun(["cluster", "nope.wasm"]).stdin("1\n").run().code(127).error("no such guest: `nope.wasm`");
    wrun(["cluster", HELLO])
        .stdin("1\n")
        .run()
        .code(126)
        .error_and_hint("expected a handler guest, found a command guest (component)", "use `wrun run`");
    let whole = std::fs::read(ECHO).unwrap();
    let folder = Folder::new().file("cut.wasm", &whole[..whole.len() / 2]).file("text.wasm", "hello");
    let finished = folder.wrun(["cluster", "cut.wasm"]).stdin("1\n").run().code(126).stdout("");
    assert_eq!(finished.stderr_text().lines().count(), 1, "{}", finished.transcript());
    finished.stderr_has("wrun: error: not a valid guest: ").stderr_has("offset");
    folder
        .wrun(["cluster", "text.wasm"])
        .run()
        .code(126)
        .error("expected WebAssembly (a binary or WAT text), found a text that is not WAT");
    let folder =
        folder.file("import.wat", r#"(component (import "acme:tools/saw@1.0.0" (instance (export "cut" (func)))))"#);
    folder.wrun(["cluster", "import.wat"]).run().code(126).error_and_hint(
        "expected a handler guest, found a component that exports nothing wrun can run",
        "a handler exports `wrun:guest/handler@0.1.0`, see wit/handler.wit",
    );
}

#[test]
fn a_guest_that_crashes_at_start_fails_the_pool_and_answers_every_line() {
    let finished = wrun(["cluster", CRASH_AT_START, "-w", "1", "--log-format", "json"]).stdin("1\n2\n").run().code(70);
    let answers = answers(&finished);
    assert_eq!((&answers[&1]["error"]["kind"], &answers[&2]["error"]["kind"]), (&json!("trapped"), &json!("trapped")));
    let text = finished.stderr_text();
    assert_eq!(text.matches("\"event\":\"fork\"").count(), 5, "{text}");
    assert_eq!(text.matches("\"event\":\"exit\"").count(), 5, "{text}");
    assert_eq!(text.matches("\"event\":\"failed\"").count(), 1, "{text}");
    assert!(text.contains("every worker failed"), "{text}");
}

#[test]
fn an_output_that_nobody_reads_ends_it_quietly() {
    let mut running = wrun(["cluster", ECHO, "-w", "1"]).stdin_open().spawn();
    running.write_line("1");
    running.stdout_line();
    running.close_stdout();
    running.write_line("2");
    let finished = running.wait().code(141);
    assert!(!finished.stderr_text().contains("error"), "{}", finished.transcript());
}

#[test]
fn an_output_that_is_full_is_an_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut running = wrun(["cluster", ECHO, "-w", "1"]).stdin_open().stdout_to(full).spawn();
    running.write_line("1");
    running.wait().code(125).stderr_has("could not write the answers: No space left on device");
}

#[test]
fn nothing_in_the_environment_makes_a_worker() {
    wrun(["cluster", ECHO, "-w", "1"])
        .env("WRUN_WORKER", "7")
        .env("WRUN_FD", "3")
        .env("NODE_CHANNEL_FD", "0")
        .env("TOKIO_WORKER_THREADS", "junk")
        .env("RUST_LOG", "junk")
        .stdin("42\n")
        .run()
        .code(0)
        .stdout("{\"line\":1,\"reply\":42}\n");
}
