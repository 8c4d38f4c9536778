//! `wrun spawn` and `wrun exec`: one guest in a process of its own, with its streams as they come, or collected.

use std::fs;

use guest_artifacts::{
    ARGS, ARGS_P1, CAT, CAT_P1, COURIER, HELLO, HELLO_HTTP, HELLO_P1, HOSTILE_COMMAND, HOSTILE_COMMAND_P1,
};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::{
    run::HI_WAT,
    supervision::children,
    wrun::{Folder, Running, wrun},
};

/// Events, one a line.
pub(crate) fn events(text: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    text.lines().map(parse).collect()
}

/// What the chunks of a stream add up to, and how many are base64.
fn stream(events: &[Value], name: &str) -> (String, usize) {
    let chunks: Vec<_> = events.iter().filter(|event| event["event"] == "chunk" && event["stream"] == name).collect();
    let text = chunks.iter().filter_map(|chunk| chunk["data"].as_str()).collect();
    (text, chunks.iter().filter(|chunk| chunk["data"]["base64"].is_string()).count())
}

/// The process of the guest of a running `spawn` or `exec`: its only child.
fn guest(running: &mut Running) -> Pid {
    let parent = running.pid();
    running.until_holds("a child", || children(parent).len() == 1);
    children(parent)[0]
}

#[test]
fn components_modules_and_text_run_in_a_process_of_their_own() {
    for mode in ["spawn", "exec"] {
        wrun([mode, HELLO]).run().code(0).stdout("Hello, world!\n").stderr("");
        wrun([mode, HELLO_P1]).run().code(0).stdout("Hello, world!\n").stderr("");
        Folder::new().file("hi.wat", HI_WAT).wrun([mode, "hi.wat"]).run().code(0).stdout("hi\n").stderr("");
        wrun([mode, "--isolation", "jail", HELLO]).run().code(0).stdout("Hello, world!\n").stderr("");
        wrun([mode, "-"]).stdin(fs::read(HELLO).unwrap()).run().code(0).stdout("Hello, world!\n").stderr("");
        wrun([mode, "--isolation", "thread", HELLO]).run().code(2).stderr_has("a child has a process of its own");
        wrun([mode, "none.wasm"]).run().code(127).stderr_has("no such guest: `none.wasm`");
        wrun([mode, HELLO_HTTP]).run().code(126).stderr_has("expected a command guest, found an http guest");
        let nothing = Folder::new().file("a.wat", "(module)");
        nothing.wrun([mode, "a.wat"]).run().code(126).stderr_has("exports nothing wrun can run");
    }
}

#[test]
fn a_guest_has_a_process_and_a_session_of_its_own() {
    let mut spawned = wrun(["spawn", HOSTILE_COMMAND, "--", "say", "on\n", "sleep"]).spawn();
    assert_eq!(spawned.stdout_line(), "on");
    let guest = guest(&mut spawned);
    assert_eq!(rustix::process::getsid(Some(guest)).unwrap(), guest);
    // it has nothing of ours in its environment, whatever its guest has
    assert_eq!(fs::read(format!("/proc/{}/environ", guest.as_raw_nonzero())).unwrap(), b"");
}

#[test]
fn arguments_arrive_untouched() {
    let args =
        ["", " ", "two words", "--help", "--", "-", "--memory=1", "é 漢字 🦀", "a\nb", "\"quoted\"", "$HOME", "'*'"];
    for mode in ["spawn", "exec"] {
        for guest in [ARGS, ARGS_P1] {
            let ran = wrun([mode, guest, "--"]).args(args).run().code(0).stderr("");
            let mut expected = vec![guest];
            expected.extend(args);
            assert_eq!(ran.stdout_json()["args"], json!(expected));
        }
        let ran = wrun([mode, "--argv0", "my name", ARGS, "--", "a"]).run().code(0);
        assert_eq!(ran.stdout_json()["args"], json!(["my name", "a"]));
    }
}

#[test]
fn the_environment_is_empty_by_default_and_exact_when_it_is_given() {
    for mode in ["spawn", "exec"] {
        let env = |args: &[&str]| {
            let ran = wrun([mode]).args(args).args([ARGS]).env("SECRET", "s3cr3t").env("B", "").run().code(0);
            ran.stdout_json()["env"].clone()
        };
        assert_eq!(env(&[]), json!({}));
        assert_eq!(
            env(&["--env", "A=1 = 2", "--env", "B", "--env", "É=漢"]),
            json!({"A": "1 = 2", "B": "", "É": "漢"})
        );
        let all = env(&["--inherit-env", "--env", "B=mine"]);
        assert_eq!((&all["SECRET"], &all["B"]), (&json!("s3cr3t"), &json!("mine")));
    }
}

#[test]
fn exit_codes_are_exact() {
    for mode in ["spawn", "exec"] {
        for code in [0, 1, 23, 124, 125, 126, 127, 137, 255] {
            wrun([mode, HOSTILE_COMMAND_P1, "--", "exit", &code.to_string()]).run().code(code).stdout("").stderr("");
        }
        // a component only says whether all went well
        wrun([mode, HOSTILE_COMMAND, "--", "exit", "23"]).run().code(1).stdout("").stderr("");
        let trapped = wrun([mode, HOSTILE_COMMAND, "--", "say", "last", "trap"]).run().code(134).stdout("last");
        trapped.stderr_has("trapped: wasm `unreachable` instruction executed").stderr_has("trap");
        wrun([mode, "--memory", "8MiB", HOSTILE_COMMAND, "--", "grow"])
            .run()
            .code(137)
            .stderr_has("memory limit of 8MiB");
        wrun([mode, "--fuel", "1000000", HOSTILE_COMMAND, "--", "spin"]).run().code(124).stderr_has("fuel limit");
    }
}

#[test]
fn json_tells_all_that_happens() {
    let ran = wrun(["spawn", "--json", HOSTILE_COMMAND_P1, "--", "turns", "200"]).run().code(0).stderr("");
    let told = events(&ran.stdout_text());
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names[0], "fork");
    assert_eq!(names[names.len() - 1], "close");
    assert_eq!(names.iter().filter(|name| **name == "exit").count(), 1, "{names:?}");
    assert_eq!(told[0]["pid"], told.iter().find(|event| event["event"] == "exit").unwrap()["pid"]);
    let lines = |what: &str| (0..200).map(|turn| format!("{what} {turn}\n")).collect::<String>();
    assert_eq!(stream(&told, "stdout"), (lines("out"), 0));
    assert_eq!(stream(&told, "stderr"), (lines("err"), 0));

    let ran = wrun(["spawn", "--json", HOSTILE_COMMAND_P1, "--", "exit", "23"]).run().code(23);
    let exit = events(&ran.stdout_text()).into_iter().find(|event| event["event"] == "exit").unwrap();
    assert_eq!((&exit["outcome"]["kind"], &exit["outcome"]["code"]), (&json!("exited"), &json!(23)));
}

#[test]
fn chunks_are_texts_wherever_they_are_cut_and_base64_when_they_are_none() {
    // three bytes each: chunks of any power of two cut them
    let text = "漢".repeat(200_000);
    let folder = Folder::new().file("text", &text).file("bytes", b"a\xff\xfeb");
    let cat = |file: &str| {
        let ran = folder.wrun(["spawn", "--json", "--stdin", file, CAT_P1]).run().code(0);
        events(&ran.stdout_text())
    };
    assert_eq!(stream(&cat("text"), "stdout"), (text, 0));
    let told = cat("bytes");
    let chunk = told.iter().find(|event| event["event"] == "chunk").unwrap();
    assert_eq!(chunk["data"], json!({"base64": "Yf/+Yg=="}));
}

#[test]
fn streams_lead_where_they_are_sent() {
    let folder = Folder::new().file("in", "from a file").file("out", "there before, and longer than what comes");
    let spawn = |args: &[&str], act: &[&str]| {
        folder.wrun(["spawn"]).args(args).args([HOSTILE_COMMAND_P1, "--"]).args(act).stdin("from wrun").run().code(0)
    };
    spawn(&["--stdout", "out", "--stderr", "err"], &["turns", "1"]).stdout("").stderr("");
    assert_eq!((folder.read("out"), folder.read("err")), ("out 0\n".into(), "err 0\n".into()));
    spawn(&["--stdout", "null"], &["turns", "1"]).stdout("").stderr("err 0\n");
    spawn(&["--stdout", "pipe", "--stderr", "pipe"], &["turns", "1"]).stdout("out 0\n").stderr("err 0\n");
    spawn(&[], &["read-stdin"]).stdout("9\n");
    spawn(&["--stdin", "inherit"], &["read-stdin"]).stdout("9\n");
    spawn(&["--stdin", "pipe"], &["read-stdin"]).stdout("9\n");
    spawn(&["--stdin", "null"], &["read-stdin"]).stdout("0\n");
    spawn(&["--stdin", "in"], &["read-stdin"]).stdout("11\n");
    folder.wrun(["spawn", "--stdin", "none", HELLO]).run().code(2).stderr_has("could not open `none`: No such file");
    folder.wrun(["spawn", "--stdout", "no/out", HELLO]).run().code(2).stderr_has("could not open `no/out`");
    wrun(["spawn", "--stdin", "pipe", "-"]).stdin("x").run().code(2).stderr_has("standard input has the guest");

    let exec =
        |args: &[&str]| folder.wrun(["exec"]).args(args).args([CAT]).stdin("from wrun").run().code(0).stdout_text();
    assert_eq!(
        (exec(&[]), exec(&["--input", "-"]), exec(&["--input", "in"])),
        (String::new(), "from wrun".into(), "from a file".into())
    );
    wrun(["exec", "--input", "-", "-"]).stdin("x").run().code(2).stderr_has("standard input has the guest");
}

#[test]
fn three_mib_of_any_bytes_pass_through_pipes() {
    let bytes: Vec<u8> = (0..3u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let ran = wrun(["spawn", "--stdin", "pipe", "--stdout", "pipe", CAT]).stdin(bytes.clone()).run().code(0);
    assert!(ran.stdout == bytes);
}

#[test]
fn the_working_directory_lies_in_a_granted_folder() {
    let folder = Folder::new().file("data/in/a.txt", "found").file("outside/a.txt", "secret").file("data/file", "");
    let folder = folder.link("data/way-out", "../outside").link("data/way-in", "in");
    for mode in ["spawn", "exec"] {
        let cat = |guest: &str, cwd: &str, file: &str| {
            folder.wrun([mode, "--dir", "data::/data", "--cwd", cwd, guest, "--", file]).run()
        };
        for guest in [CAT, CAT_P1] {
            cat(guest, "/data/in", "a.txt").code(0).stdout("found");
            cat(guest, "/data/in", "./a.txt").code(0).stdout("found");
            cat(guest, "/data/way-in", "a.txt").code(0).stdout("found");
            cat(guest, "/data", "in/a.txt").code(0).stdout("found");
            cat(guest, "/data/in", "/data/in/a.txt").code(0).stdout("found");
            cat(guest, "/data/in", "../../outside/a.txt").code(1).stdout("");
        }
        cat(CAT, "/data/way-out", "a.txt")
            .code(2)
            .stderr_has("could not grant `--cwd /data/way-out`: a link leads out of");
        cat(CAT, "/data/../outside", "a.txt").code(2).stderr_has("expected a path without `..`");
        cat(CAT, "/outside", "a.txt").code(2).stderr_has("it lies in no folder that is granted");
        cat(CAT, "/data/none", "a.txt").code(2).stderr_has("No such file");
        cat(CAT, "/data/file", "a.txt").code(2).stderr_has("it is not a folder");
        folder.wrun([mode, "--cwd", "/data", CAT]).run().code(2).stderr_has("it lies in no folder that is granted");
    }
    // a folder that may only be read stays that, by this name too
    let write = |dir: &str| {
        folder.wrun(["exec", "--dir", dir, "--cwd", "/data/in", HOSTILE_COMMAND, "--", "write", "b.txt", "x"]).run()
    };
    write("data::/data:ro").code(1);
    assert!(!folder.path("data/in/b.txt").exists());
    write("data::/data").code(0);
    assert_eq!(folder.read("data/in/b.txt"), "x");
}

#[test]
fn the_time_limit_ends_loops_sleeps_and_blocked_reads() {
    for mode in ["spawn", "exec"] {
        for act in ["spin", "sleep", "read-stdin"] {
            let input = if mode == "spawn" { ["--stdin", "inherit"] } else { ["--input", "-"] };
            let timed = wrun([mode, "--timeout", "300ms"]).args(input).args([HOSTILE_COMMAND, "--", act]);
            timed.stdin_open().run().code(124).stderr_has("hit the time limit of 300ms");
        }
        // time enough
        wrun([mode, "--timeout", "1m", HOSTILE_COMMAND, "--", "sleep", "10"]).run().code(0).stderr("");
        // a signal that does not end a process is followed by one that does
        let weak = ["--timeout", "100ms", "--grace", "100ms", "--kill-signal", "WINCH"];
        wrun([mode]).args(weak).args([HOSTILE_COMMAND, "--", "spin"]).run().code(124).stderr_has("time limit of 100ms");
        let stopped = ["--timeout", "100ms", "--grace", "100ms", "--kill-signal", "SIGSTOP"];
        wrun([mode])
            .args(stopped)
            .args([HOSTILE_COMMAND, "--", "spin"])
            .run()
            .code(124)
            .stderr_has("time limit of 100ms");
    }
    wrun(["spawn", "--kill-signal", "SIGNONE", HELLO]).run().code(2).stderr_has("expected a signal such as `SIGTERM`");
}

#[test]
fn ctrl_c_reaches_the_guests_process_once() {
    for mode in ["spawn", "exec"] {
        let mut running = wrun([mode, HOSTILE_COMMAND, "--", "sleep"]).spawn();
        let guest = guest(&mut running);
        running.signal(Signal::INT);
        running.wait().code(130).stderr_has("killed by signal 2 (SIGINT)");
        assert!(rustix::process::test_kill_process(guest).is_err());
    }
    // one that is stopped feels the second one
    let mut running = wrun(["spawn", HOSTILE_COMMAND, "--", "sleep"]).spawn();
    let guest = guest(&mut running);
    rustix::process::kill_process(guest, Signal::STOP).unwrap();
    running.until_holds("the guest to stop", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", guest.as_raw_nonzero())).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    });
    running.signal(Signal::INT);
    running.signal(Signal::TERM);
    running.signal(Signal::INT);
    running.wait().code(137).stderr_has("killed by signal 9");
}

#[test]
fn sigterm_lets_a_guest_finish_and_then_ends_it() {
    // the end of its input is what it hears
    let mut running = wrun(["spawn", "--json", "--stdin", "pipe", CAT]).stdin_open().spawn();
    running.write_line("all that came");
    let fork: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!(fork["event"], "fork");
    let chunk: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!(chunk["data"], "all that came\n");
    running.signal(Signal::TERM);
    let ran = running.wait().code(0);
    let told = events(&ran.stdout_text());
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["fork", "chunk", "disconnect", "exit", "close"]);
    assert_eq!(told[3]["outcome"]["voluntary"], true);

    for (signal, code) in [("TERM", 143), ("KILL", 137), ("HUP", 129), ("USR1", 138)] {
        let stop = ["spawn", "--grace", "50ms", "--kill-signal", signal, HOSTILE_COMMAND, "--", "say", "on\n", "sleep"];
        let mut running = wrun(stop).spawn();
        running.stdout_line();
        running.signal(Signal::TERM);
        running.wait().code(code).stderr_has(&format!("(SIG{signal})"));
    }
    // the grace time is there to be used
    let mut running = wrun(["spawn", HOSTILE_COMMAND, "--", "say", "on\n", "sleep", "300"]).spawn();
    running.stdout_line();
    running.signal(Signal::TERM);
    running.wait().code(0).stderr("");
}

#[test]
fn a_signal_from_elsewhere_is_reported_exactly() {
    for (signal, code) in [(Signal::KILL, 137), (Signal::TERM, 143), (Signal::USR2, 140), (Signal::QUIT, 131)] {
        let mut running = wrun(["spawn", HOSTILE_COMMAND, "--", "say", "on\n", "sleep"]).spawn();
        running.stdout_line();
        rustix::process::kill_process(guest(&mut running), signal).unwrap();
        running.wait().code(code).stderr_has(&format!("killed by signal {}", signal.as_raw()));
    }
    // whatever wrun itself was told to ignore
    let mut running = wrun(["spawn", HOSTILE_COMMAND, "--", "say", "on\n", "sleep"]).ignoring("QUIT").spawn();
    running.stdout_line();
    rustix::process::kill_process(guest(&mut running), Signal::QUIT).unwrap();
    running.wait().code(131).stderr_has("killed by signal 3 (SIGQUIT)");
}

#[test]
fn a_guest_does_not_outlive_its_parent() {
    let spawn = ["spawn", HOSTILE_COMMAND, "--", "say", "on\n", "spin"];
    for args in [&spawn[..], &["exec", HOSTILE_COMMAND, "--", "spin"], &["fork", COURIER]] {
        let mut running = wrun(args).stdin_open().spawn();
        let guest = guest(&mut running);
        let ended = rustix::process::pidfd_open(guest, rustix::process::PidfdFlags::empty()).unwrap();
        running.signal(Signal::KILL);
        running.wait().killed_by(Signal::KILL);
        // the kernel takes its time, but not ours
        let minute = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&ended, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, Some(&minute)).unwrap(), 1);
    }
}

#[test]
fn a_kill_during_the_start_leaves_nothing() {
    for _ in 0..30 {
        let mut running = wrun(["spawn", HOSTILE_COMMAND, "--", "sleep"]).spawn();
        let guest = guest(&mut running);
        running.signal(Signal::INT);
        running.wait().code(130);
        assert!(rustix::process::test_kill_process(guest).is_err());
    }
}

#[test]
fn a_stalled_reader_makes_the_guest_wait_and_costs_no_memory() {
    for args in [&["--stdout", "pipe"][..], &["--json"], &[]] {
        let mut running = wrun(["spawn"]).args(args).args([HOSTILE_COMMAND, "--", "flood"]).spawn();
        running.stdout_line();
        running.pause_stdout();
        let guest = guest(&mut running);
        running.until_stable("what the guest has written", || {
            fs::read_to_string(format!("/proc/{}/io", guest.as_raw_nonzero())).unwrap_or_default()
        });
        let resident = fs::read_to_string(format!("/proc/{}/statm", running.pid().as_raw_nonzero())).unwrap();
        let pages: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(pages * 4096 < 64 << 20, "{pages} pages");
        running.signal(Signal::INT);
        running.close_stdout();
        running.until_ended();
        // a write of the guest's own may come first
        let ran = running.wait();
        let holds = matches!(ran.status.code(), Some(130 | 141));
        ran.check(holds, "expected the end by SIGINT, or by what a closed pipe means");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_guest() {
    for args in [&["--stdout", "pipe"][..], &[]] {
        let mut running = wrun(["spawn"]).args(args).args([HOSTILE_COMMAND, "--", "flood"]).spawn();
        running.stdout_line();
        running.close_stdout();
        running.wait().code(141).stderr("");
    }
    let mut running = wrun(["spawn", "--json", HOSTILE_COMMAND, "--", "flood"]).spawn();
    running.stdout_line();
    running.close_stdout();
    running.wait().code(141).stderr("");
}

#[test]
fn a_reader_that_stalls_and_then_goes_away_ends_the_guest() {
    for form in [&["--stdout", "pipe"][..], &["--json"]] {
        let mut running = wrun(["spawn"]).args(form).args([HOSTILE_COMMAND, "--", "flood"]).spawn();
        running.stdout_line();
        running.pause_stdout();
        let guest = guest(&mut running);
        running.until_stable("what the guest has written", || {
            fs::read_to_string(format!("/proc/{}/io", guest.as_raw_nonzero())).unwrap_or_default()
        });
        running.close_stdout();
        running.wait().code(141).stderr("");
    }
}

#[test]
fn exec_collects_up_to_a_bound_and_keeps_what_it_has() {
    let flood =
        |max: &str, bytes: &str| wrun(["exec", "--stdout-max", max, HOSTILE_COMMAND, "--", "flood", bytes]).run();
    flood("1000B", "1000").code(0).stderr("").stdout_is_long(1000);
    flood("1000B", "1001").code(123).stderr_has("hit the output limit of 1000B").stdout_is_long(1000);
    wrun(["exec", HOSTILE_COMMAND, "--", "flood"]).run().code(123).stdout_is_long(1 << 20);
    flood("0", "0").code(0).stdout_is_long(0);
    flood("0", "1").code(123).stdout_is_long(0);

    let ran =
        wrun(["exec", "--json", "--stdout-max", "10B", HOSTILE_COMMAND, "--", "flood"]).run().code(123).stderr("");
    let output = ran.stdout_json();
    assert_eq!((&output["stdout"], &output["stderr"]), (&json!("y\ny\ny\ny\ny\n"), &json!("")));
    assert_eq!((&output["outcome"]["limit"], &output["outcome"]["allowed"]), (&json!("output"), &json!("10B")));
    // standard error counts by itself
    let both = wrun(["exec", "--json", "--stdout-max", "60B", HOSTILE_COMMAND_P1, "--", "turns", "10"]).run().code(0);
    assert_eq!(both.stdout_json()["stderr"].as_str().unwrap().len(), 60);
    wrun(["exec", "--json", "--stdout-max", "59B", HOSTILE_COMMAND_P1, "--", "turns", "10"]).run().code(123);
}

#[test]
fn exec_says_what_was_printed_and_how_it_ended() {
    let ran = wrun(["exec", "--json", HOSTILE_COMMAND_P1, "--", "turns", "2"]).run().code(0).stderr("");
    let output = ran.stdout_json();
    assert_eq!((&output["stdout"], &output["stderr"]), (&json!("out 0\nout 1\n"), &json!("err 0\nerr 1\n")));
    assert_eq!((&output["outcome"]["kind"], &output["outcome"]["voluntary"]), (&json!("exited"), &json!(false)));
    let folder = Folder::new().file("bytes", b"\xff");
    let ran = folder.wrun(["exec", "--json", "--input", "bytes", CAT]).run().code(0);
    assert_eq!(ran.stdout_json()["stdout"], json!({"base64": "/w=="}));
    // what a guest prints is passed on as it is, its last words included
    wrun(["exec", HOSTILE_COMMAND, "--", "say", "last", "trap"]).run().code(134).stdout("last").stderr_has("trapped");
}

#[test]
fn a_command_that_nobody_writes_to_finds_its_mailbox_closed() {
    for mode in ["spawn", "exec", "run"] {
        // it receives nothing, says goodbye, and that is refused
        let ran = wrun([mode, COURIER]).run().code(134);
        ran.stderr_has("Closed");
    }
}
