//! `wrun run`: one command guest in the foreground, its standard streams passed through.

use std::fs::File;

use guest_artifacts::{ARGS, ARGS_P1, CAT, CAT_P1, HELLO, HELLO_P1, HOSTILE_COMMAND, HOSTILE_COMMAND_P1};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::wrun::{Folder, wrun};

/// Prints `hi` by a call of WASI preview 1.
pub(crate) const HI_WAT: &str = r#"
    (module
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (data (i32.const 0) "\08\00\00\00\03\00\00\00hi\n")
      (func (export "_start") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20)))))
"#;

#[test]
fn component_module_and_text_run_alike() {
    wrun(["run", HELLO]).run().code(0).stdout("Hello, world!\n").stderr("");
    wrun(["run", HELLO_P1]).run().code(0).stdout("Hello, world!\n").stderr("");
    Folder::new().file("hi.wat", HI_WAT).wrun(["run", "hi.wat"]).run().code(0).stdout("hi\n").stderr("");
}

#[test]
fn a_dash_is_a_guest_on_stdin() {
    for guest in [HELLO, HELLO_P1] {
        let bytes = std::fs::read(guest).unwrap();
        wrun(["run", "-"]).stdin(bytes).run().code(0).stdout("Hello, world!\n").stderr("");
    }
    wrun(["run", "-"]).stdin(HI_WAT).run().code(0).stdout("hi\n").stderr("");
    // the guest took all of stdin: nothing of it is left to be its input
    let bytes = std::fs::read(CAT).unwrap();
    wrun(["run", "-"]).stdin(bytes).run().code(0).stdout("").stderr("");
}

#[test]
fn arguments_arrive_untouched() {
    let args =
        ["", " ", "two words", "--help", "--", "-", "--memory=1", "é 漢字 🦀", "a\nb", "\"quoted\"", "$HOME", "*"];
    for guest in [ARGS, ARGS_P1] {
        let ran = wrun(["run", guest, "--"]).args(args).run().code(0).stderr("");
        let mut expected = vec![guest];
        expected.extend(args);
        assert_eq!(ran.stdout_json()["args"], json!(expected));
    }
}

#[test]
fn arguments_before_the_dashes_are_wruns() {
    wrun(["run", ARGS, "mine"]).run().code(2).stdout("").stderr_has("unexpected argument 'mine'");
    wrun(["run", ARGS, "--"]).run().code(0).stdout(format!("{{\"args\":[\"{ARGS}\"],\"env\":{{}}}}\n"));
}

#[test]
fn environment_is_empty_by_default() {
    for guest in [ARGS, ARGS_P1] {
        let ran = wrun(["run", guest]).env("SECRET", "s3cr3t").env("PATH", "/bin").env("HOME", "/root").run().code(0);
        assert_eq!(ran.stdout_json()["env"], json!({}));
    }
}

/// All byte values in changing neighbourhoods, longer than any buffer on the way, and of no round length.
fn three_mib() -> Vec<u8> {
    (0..(3 << 20) + 7_u32).map(|n| (n ^ (n >> 8) ^ (n >> 16)).to_le_bytes()[0]).collect()
}

#[test]
fn stdin_to_stdout_is_safe_for_any_byte() {
    let bytes = three_mib();
    for guest in [CAT, CAT_P1] {
        wrun(["run", guest]).stdin(bytes.clone()).run().code(0).stdout(&bytes).stderr("");
    }
}

#[test]
fn what_is_written_is_there_before_the_end() {
    for guest in [CAT, CAT_P1] {
        let mut cat = wrun(["run", guest]).stdin_open().spawn();
        cat.write_line("one");
        assert_eq!(cat.stdout_line(), "one");
        cat.write_line("two");
        assert_eq!(cat.stdout_line(), "two");
        cat.close_stdin();
        cat.wait().code(0).stdout("one\ntwo\n").stderr("");
    }
}

#[test]
fn stdin_may_be_empty_or_closed() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let read_stdin = || wrun(["run", guest, "--", "read-stdin"]);
        read_stdin().run().code(0).stdout("0\n").stderr("");
        read_stdin().stdin("").run().code(0).stdout("0\n").stderr("");
        read_stdin().stdin_closed().run().code(0).stdout("0\n").stderr("");
    }
}

#[test]
fn stdin_that_nobody_reads_is_no_obstacle() {
    for guest in [HELLO, HELLO_P1] {
        wrun(["run", guest]).stdin_open().run().code(0).stdout("Hello, world!\n").stderr("");
        wrun(["run", guest]).stdin(vec![0; 1 << 20]).run().code(0).stdout("Hello, world!\n").stderr("");
    }
}

#[test]
fn stderr_is_the_guests() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        wrun(["run", guest, "--", "stderr", "to err"]).run().code(0).stdout("").stderr("to err\n");
    }
}

#[test]
fn exit_code_is_the_guests() {
    let exit = |guest, code| wrun(["run", guest, "--", "exit", code]).run().stdout("").stderr("");
    exit(HOSTILE_COMMAND_P1, "0").code(0);
    exit(HOSTILE_COMMAND_P1, "42").code(42);
    exit(HOSTILE_COMMAND_P1, "125").code(125);
    exit(HOSTILE_COMMAND, "0").code(0);
    // the stable `wasi:cli/exit` has one function, `exit(result)`: that it failed is all that a component says
    exit(HOSTILE_COMMAND, "7").code(1);
    // `main` that answers a failure, as told by a component's `run` and a module's `proc_exit`
    wrun(["run", HOSTILE_COMMAND, "--", "read", "/none"]).run().code(1).stderr("entity not found\n");
    wrun(["run", HOSTILE_COMMAND_P1, "--", "read", "/none"]).run().code(1).stderr("entity not found\n");
}

#[test]
fn a_trap_is_134_with_a_reason_and_a_backtrace() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let ran = wrun(["run", guest, "--", "trap"]).run().code(134).stdout("");
        let text = ran.stderr_text();
        let (reason, backtrace) = text.split_once('\n').unwrap();
        assert_eq!(reason, format!("wrun: `{guest}` trapped: wasm `unreachable` instruction executed"));
        // the function that trapped, and who called it
        let at = |function| backtrace.find(function).unwrap_or_else(|| panic!("no {function} in {backtrace}"));
        assert!(at("hostile_command::trap") < at("hostile_command::main"), "{backtrace}");
        assert!(at("hostile_command::main") < at("_start"), "{backtrace}");
        assert!(backtrace.lines().all(|line| line.starts_with("    ")), "{backtrace}");
    }
}

#[test]
fn a_panic_is_134_after_the_guests_own_words() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let ran = wrun(["run", guest, "--", "panic"]).run().code(134).stdout("").stderr_has("as told");
        let text = ran.stderr_text();
        assert!(text.find("as told") < text.find("trapped: wasm `unreachable`"), "{text}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_guest_quietly() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let mut flood = wrun(["run", guest, "--", "flood"]).spawn();
        assert_eq!(flood.stdout_line(), "y");
        flood.close_stdout();
        // 128 + SIGPIPE, as a native program
        flood.wait().code(141).stderr("");
    }
}

#[test]
fn a_signal_ends_the_guest() {
    for guest in [CAT, CAT_P1] {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut cat = wrun(["run", guest]).stdin_open().spawn();
            cat.write_line("it runs");
            assert_eq!(cat.stdout_line(), "it runs");
            cat.signal(signal);
            // by the signal itself, as a native program: a shell then sees 128 + n
            cat.wait().killed_by(signal).stderr("");
        }
    }
}

#[test]
fn a_full_disk_is_the_guests_error() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let cat = |guest| wrun(["run", guest]).stdin("some bytes").stdout_to(full()).run().code(1);
    cat(CAT_P1).stderr("cat: stdin: No space left on device (os error 51)\n");
    // of a failed stream the guest's standard library makes an I/O error without a reason
    cat(CAT).stderr("cat: stdin: I/O error (os error 29)\n");
    // wrun's own results say it, too
    let inspect = wrun(["inspect", HELLO]).stdout_to(full()).run().code(125);
    inspect.stderr("wrun: error: could not write to standard output: No space left on device (os error 28)\n");
}

#[test]
fn a_closed_stdout_takes_everything() {
    for guest in [HELLO, HELLO_P1] {
        wrun(["run", guest]).stdout_closed().run().code(0).stdout("").stderr("");
    }
}

/// The outcome, after the checks that hold for every one of a guest that ran.
fn checked(outcome: Value) -> Value {
    for field in ["wall_ms", "cpu_ms", "memory_peak"] {
        assert!(outcome[field].is_u64(), "{field} in {outcome}");
    }
    assert!(outcome["memory_peak"].as_u64() > Some(0), "{outcome}");
    assert_eq!(outcome["voluntary"], json!(false), "{outcome}");
    outcome
}

#[test]
fn json_is_the_outcome_on_stderr() {
    for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
        let run = |args: &[&str]| wrun(["run", "--json", guest, "--"]).args(args).run();

        let exited = run(&["exit", "0"]).code(0).stdout("");
        assert_eq!(exited.stderr_text().lines().count(), 1);
        let outcome = checked(exited.stderr_json());
        assert_eq!((&outcome["kind"], &outcome["code"]), (&json!("exited"), &json!(0)));
        assert_eq!(outcome.get("fuel"), None, "nothing was metered: {outcome}");

        let outcome = checked(run(&["exit", "7"]).stderr_json());
        let code = if guest == HOSTILE_COMMAND { 1 } else { 7 };
        assert_eq!((&outcome["kind"], &outcome["code"]), (&json!("exited"), &json!(code)));

        let trapped = run(&["trap"]).code(134);
        assert_eq!(trapped.stderr_text().lines().count(), 1, "instead of the text, not beside it");
        let outcome = checked(trapped.stderr_json());
        assert_eq!(outcome["kind"], json!("trapped"));
        assert_eq!(outcome["trap"], json!("wasm `unreachable` instruction executed"));
        let frames: Vec<_> = outcome["backtrace"].as_array().unwrap().iter().map(|frame| frame.as_str()).collect();
        assert!(frames.iter().flatten().any(|frame| frame.contains("hostile_command::trap")), "{frames:?}");
    }
}

#[test]
fn json_may_go_to_a_file() {
    let folder = Folder::new();
    let ran = folder.wrun(["run", "--json=out come.json", HELLO]).run();
    ran.code(0).stdout("Hello, world!\n").stderr("");
    let text = folder.read("out come.json");
    assert_eq!((text.lines().count(), text.ends_with('\n')), (1, true));
    assert_eq!(checked(serde_json::from_str(&text).unwrap())["kind"], json!("exited"));

    folder.wrun(["run", "--json=out come.json", HOSTILE_COMMAND, "--", "trap"]).run().code(134).stderr("");
    assert_eq!(checked(serde_json::from_str(&folder.read("out come.json")).unwrap())["kind"], json!("trapped"));

    // a report that cannot be written is said, and changes nothing about the run
    let ran = folder.wrun(["run", "--json=none/outcome.json", HELLO]).run().code(0).stdout("Hello, world!\n");
    ran.stderr("wrun: error: could not write the outcome: No such file or directory (os error 2)\n");
}

#[test]
fn fuel_is_reported_when_it_is_metered() {
    let ran = wrun(["run", "--json", "--fuel", "1000000000", HELLO]).run().code(0);
    assert!(checked(ran.stderr_json())["fuel"].as_u64() > Some(0));
}

#[test]
fn memory_peak_follows_the_guest() {
    let peak = |mib| {
        let ran = wrun(["run", "--json", HOSTILE_COMMAND, "--", "grow", mib]).run().code(0);
        checked(ran.stderr_json())["memory_peak"].as_u64().unwrap()
    };
    let (small, large) = (peak("1"), peak("40"));
    assert!(small < 40 << 20 && large >= 40 << 20, "{small} {large}");
}

#[test]
fn junk_in_the_environment_does_nothing() {
    for guest in [ARGS, ARGS_P1] {
        let mut run = wrun(["run", guest]);
        for (name, value) in [
            ("WRUN_WORKER", "junk"),
            ("WRUN_FD", "junk"),
            ("WRUN_LOG", "trace"),
            ("RUST_LOG", "trace"),
            ("RUST_BACKTRACE", "full"),
            ("NODE_CHANNEL_FD", "3"),
            ("LISTEN_FDS", "1"),
            ("LISTEN_PID", "1"),
            ("NOTIFY_SOCKET", "/none"),
            ("WASMTIME_BACKTRACE_DETAILS", "1"),
        ] {
            run = run.env(name, value);
        }
        let ran = run.run().code(0).stderr("");
        assert_eq!(ran.stdout_json()["env"], json!({}));
    }
}

#[test]
fn log_format_json_makes_errors_json_lines() {
    let error = wrun(["--log-format", "json", "run", "none.wasm"]).run().code(127).stdout("");
    assert_eq!(error.stderr_text().lines().count(), 1);
    assert_eq!(error.stderr_json(), json!({"event": "error", "message": "no such guest: `none.wasm`", "hint": null}));

    let error = wrun(["run", "--log-format=json", guest_artifacts::ECHO]).run().code(126).stdout("");
    assert_eq!(error.stderr_text().lines().count(), 1);
    assert_eq!(error.stderr_json()["hint"], json!("use `wrun cluster`"));

    let trapped = wrun(["run", "--log-format=json", HOSTILE_COMMAND, "--", "trap"]).run().code(134).stdout("");
    assert_eq!(trapped.stderr_text().lines().count(), 1);
    assert_eq!(checked(trapped.stderr_json())["kind"], json!("trapped"));
}

#[test]
fn what_a_file_is_called_cannot_forge_output() {
    // a terminal would show this name as a line of its own, in red
    let name = "x\n\u{1b}[31mwrun: error: you are hacked";
    let error = wrun(["run", name]).run().code(127);
    error.error(r"no such guest: `x\n\u{1b}[31mwrun: error: you are hacked`");
}

#[test]
fn usage_errors_are_2_and_start_nothing() {
    for args in [
        &["run"][..],
        &["run", HELLO, "--memory", "lots"],
        &["run", HELLO, "--memory", "-1"],
        &["run", HELLO, "--timeout", "5"],
        &["run", HELLO, "--fuel", "1.5"],
        &["run", HELLO, "--stack", "1KiB"],
        &["run", HELLO, "--stack", "1GiB"],
        &["run", HELLO, "--dir", "::/x"],
        &["run", HELLO, "--env", "=x"],
        &["run", HELLO, "--no-cache", "--cache-dir", "x"],
        &["run", HELLO, "--nonsense"],
        &["nonsense"],
        &[],
    ] {
        let ran = wrun(args).run().code(2).stdout("");
        assert!(!ran.stderr.is_empty(), "{}", ran.transcript());
    }
}
