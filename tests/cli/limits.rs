//! What bounds a guest: every limit just under and just over, reached on purpose.

use guest_artifacts::{HELLO, HELLO_P1, HOSTILE_COMMAND, HOSTILE_COMMAND_P1};
use serde_json::json;

use crate::wrun::{Finished, Folder, wrun};

const GUESTS: [&str; 2] = [HOSTILE_COMMAND, HOSTILE_COMMAND_P1];

/// Runs an act of the hostile command with a limit.
#[track_caller]
fn with_limit(guest: &str, limit: [&str; 2], act: &[&str]) -> Finished {
    wrun(["run", limit[0], limit[1], guest, "--"]).args(act).run()
}

#[test]
fn memory_is_there_up_to_the_limit() {
    for guest in GUESTS {
        let grow = |mib| with_limit(guest, ["--memory", "16MiB"], &["grow", mib]);
        grow("12").code(0).stdout("12\n").stderr("");
        grow("16").code(137).stdout("").stderr(format!("wrun: `{guest}` hit the memory limit of 16MiB\n"));
        // what is too much for one limit fits into another
        with_limit(guest, ["--memory", "24MiB"], &["grow", "16"]).code(0).stdout("16\n");
    }
}

#[test]
fn memory_is_limited_by_default() {
    for guest in GUESTS {
        wrun(["run", guest, "--", "grow"]).run().code(137).stderr_has("hit the memory limit of 256MiB");
    }
}

#[test]
fn a_memory_that_starts_larger_than_the_limit_does_not_start() {
    // 16 MiB are 256 pages of 64 KiB
    let start = |pages: u32| {
        let wat = format!(r#"(module (memory {pages}) (func (export "_start")))"#);
        Folder::new().file("large.wat", wat).wrun(["run", "--memory", "16MiB", "large.wat"]).run().stdout("")
    };
    start(256).code(0).stderr("");
    start(257).code(137).stderr("wrun: `large.wat` hit the memory limit of 16MiB\n");
}

#[test]
fn several_memories_count_together() {
    let start = |pages: u32| {
        let wat = format!(r#"(module (memory 128) (memory {pages}) (func (export "_start")))"#);
        Folder::new().file("two.wat", wat).wrun(["run", "--memory", "16MiB", "two.wat"]).run().stdout("")
    };
    start(128).code(0).stderr("");
    start(129).code(137).stderr("wrun: `two.wat` hit the memory limit of 16MiB\n");
}

#[test]
fn the_memory_limit_is_in_the_outcome() {
    let ran = wrun(["run", "--json", "--memory", "16MiB", HOSTILE_COMMAND, "--", "grow", "16"]).run().code(137);
    let outcome = ran.stderr_json();
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("limit"), &json!("memory")));
    assert_eq!(outcome["allowed"], json!("16MiB"));
    let peak = outcome["memory_peak"].as_u64().unwrap();
    assert!(peak > 8 << 20 && peak <= 16 << 20, "{outcome}");
}

#[test]
fn a_table_cannot_grow_without_end() {
    // grows by 60,000 elements twice: the second time there is no room, which is the guest's to see (-1)
    let wat = r#"(module
        (table 1 funcref)
        (func (export "_start")
          (if (i32.eq (table.grow (ref.null func) (i32.const 60000)) (i32.const -1)) (then unreachable))
          (if (i32.ne (table.grow (ref.null func) (i32.const 60000)) (i32.const -1)) (then unreachable))))"#;
    Folder::new().file("table.wat", wat).wrun(["run", "table.wat"]).run().code(0).stdout("").stderr("");
}

#[test]
fn a_timeout_ends_a_loop_a_sleep_and_a_read() {
    for guest in GUESTS {
        for act in ["spin", "sleep", "read-stdin"] {
            // standard input is a pipe that stays open: a read waits for ever
            let ran = wrun(["run", "--timeout", "150ms", guest, "--", act]).stdin_open().run().code(124).stdout("");
            ran.stderr(format!("wrun: `{guest}` hit the time limit of 150ms\n"));
        }
    }
}

#[test]
fn a_timeout_ends_a_guest_that_waits_to_write() {
    for guest in GUESTS {
        let mut flood = wrun(["run", "--timeout", "150ms", guest, "--", "flood"]).spawn();
        flood.pause_stdout();
        flood.stderr_line_with("hit the time limit of 150ms");
        flood.close_stdout();
        flood.wait().code(124);
    }
}

#[test]
fn a_timeout_ends_a_guest_whose_readers_are_all_stuck() {
    let args = ["run", "--timeout", "200ms", HOSTILE_COMMAND_P1, "--", "flood"];
    let mut running = wrun(args).stderr_to_stdout().spawn();
    running.pause_stdout();
    running.until_ended();
    running.close_stdout();
    running.wait().code(124);
}

#[test]
fn a_quick_guest_does_not_wait_for_its_timeout() {
    for guest in [HELLO, HELLO_P1] {
        // longer than the builder's deadline
        wrun(["run", "--timeout", "1h", guest]).run().code(0).stdout("Hello, world!\n").stderr("");
    }
    with_limit(HOSTILE_COMMAND, ["--timeout", "1h"], &["sleep", "1"]).code(0).stderr("");
    with_limit(HOSTILE_COMMAND, ["--timeout", "1h"], &["trap"]).code(134);
}

#[test]
fn the_time_limit_is_in_the_outcome() {
    let folder = Folder::new();
    let ran = folder.wrun(["run", "--json=outcome.json", "--timeout=150ms", HOSTILE_COMMAND, "--", "spin"]).run();
    ran.code(124).stdout("").stderr("");
    let outcome: serde_json::Value = serde_json::from_str(&folder.read("outcome.json")).unwrap();
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("limit"), &json!("time")));
    assert_eq!(outcome["allowed"], json!("150ms"));
    assert!(outcome["wall_ms"].as_u64() >= Some(150), "{outcome}");
}

/// How much fuel a guest uses.
fn fuel_of(guest: &str) -> u64 {
    let ran = wrun(["run", "--json", "--fuel", "1000000000000", guest]).run().code(0).stdout("Hello, world!\n");
    ran.stderr_json()["fuel"].as_u64().unwrap()
}

#[test]
fn fuel_is_the_same_every_time_and_one_less_is_too_little() {
    for guest in [HELLO, HELLO_P1] {
        let fuel = fuel_of(guest);
        assert!(fuel > 1_000, "{fuel}");
        assert_eq!(fuel_of(guest), fuel);

        let run = |fuel: u64| wrun(["run", "--fuel", &fuel.to_string(), guest]).run();
        run(fuel + FUEL_STEP).code(0).stdout("Hello, world!\n").stderr("");
        let less = fuel - FUEL_STEP;
        run(less).code(124).stderr(format!("wrun: `{guest}` hit the fuel limit of {less}\n"));
    }
}

/// Fuel is looked at where a function starts or a loop goes round, not at every instruction.
const FUEL_STEP: u64 = 1_000;

#[test]
fn fuel_ends_a_loop() {
    for guest in GUESTS {
        let spin = with_limit(guest, ["--fuel", "1000000"], &["spin"]).code(124).stdout("");
        spin.stderr(format!("wrun: `{guest}` hit the fuel limit of 1000000\n"));
        with_limit(guest, ["--fuel", "1"], &["spin"]).code(124).stderr_has("hit the fuel limit of 1\n");
        with_limit(guest, ["--fuel", "0"], &["spin"]).code(124).stderr_has("hit the fuel limit of 0\n");
    }
}

#[test]
fn the_fuel_limit_is_in_the_outcome() {
    let ran = wrun(["run", "--json", "--fuel", "1000000", HOSTILE_COMMAND, "--", "spin"]).run().code(124);
    let outcome = ran.stderr_json();
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("limit"), &json!("fuel")));
    assert_eq!((&outcome["allowed"], &outcome["fuel"]), (&json!("1000000"), &json!(1_000_000)));
}

#[test]
fn endless_recursion_traps() {
    for guest in GUESTS {
        for stack in ["16KiB", "512KiB", "8MiB"] {
            let ran = with_limit(guest, ["--stack", stack], &["recurse"]).code(134).stdout("");
            ran.stderr_has("trapped: call stack exhausted\n").stderr_has("hostile_command::recurse");
        }
    }
}

#[test]
fn a_larger_stack_is_deeper() {
    let wat = r#"(module
        (func $down (param i32)
          (if (local.get 0) (then (call $down (i32.sub (local.get 0) (i32.const 1))))))
        (func (export "_start") (call $down (i32.const 10000))))"#;
    let folder = Folder::new().file("deep.wat", wat);
    let run = |stack| folder.wrun(["run", "--stack", stack, "deep.wat"]).run().stdout("");
    run("64KiB").code(134).stderr_has("trapped: call stack exhausted");
    run("4MiB").code(0).stderr("");
    run("256MiB").code(0).stderr("");
}

#[test]
fn limits_bound_a_guest_that_is_only_instantiated() {
    // `start` runs while the instance is made
    let wat = r#"(module (func $spin (loop (br 0))) (start $spin) (func (export "_start")))"#;
    let folder = Folder::new().file("start.wat", wat);
    let run = |limit: [&str; 2]| folder.wrun(["run", "start.wat"]).args(limit).run().code(124).stdout("");
    run(["--timeout", "150ms"]).stderr("wrun: `start.wat` hit the time limit of 150ms\n");
    run(["--fuel", "1000"]).stderr("wrun: `start.wat` hit the fuel limit of 1000\n");
}
