//! The second wall: what the system lets the process of a guest do. That each part of it holds alone, against native code
//! in a worker's place, is what `wrun doctor` shows.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use guest_artifacts::{ARGS, CAT, COURIER, ECHO, HELLO, HELLO_HTTP, HOSTILE_COMMAND, HOSTILE_COMMAND_P1};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::{
    client::Server,
    supervision::{children, event, events, gone, pid},
    wrun::{Folder, WRUN, Wrun, wrun},
};

/// The system calls of a kernel that has no Landlock.
const LANDLOCK: [i64; 3] =
    [libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule, libc::SYS_landlock_restrict_self];

/// The system call of one that has no filters.
const SECCOMP: [i64; 1] = [libc::SYS_seccomp];

/// What the system says of a process.
fn proc(pid: Pid, file: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{file}", pid.as_raw_pid())).expect("it is there")
}

/// Sees that a process is in a jail.
#[track_caller]
pub(super) fn is_jailed(pid: Pid) {
    let status = proc(pid, "status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.trim_start_matches(':').trim().to_owned()
    };
    for (name, expected) in
        [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", "0000000000000000"), ("CapPrm", "0000000000000000")]
    {
        assert_eq!(field(name), expected, "{name}");
    }
    let limits = proc(pid, "limits");
    let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim().to_owned();
    assert!(limit("Max core file size").starts_with("0 "), "{limits}");
    assert!(!limit("Max data size").starts_with("unlimited"), "{limits}");
    assert!(limit("Max address space").starts_with("unlimited"), "{limits}");
    assert_eq!(proc(pid, "oom_score_adj"), "500\n");
    assert_eq!(proc(pid, "environ"), "");
    assert_eq!(rustix::process::getsid(Some(pid)), Ok(pid));
}

#[test]
fn every_process_with_a_guest_is_in_a_jail() {
    // a pool fed lines
    let mut lines = wrun(["cluster", ECHO, "-w", "2", "--log-format", "json"]).stdin_open().spawn();
    let workers = [(); 2].map(|()| pid(&event(&mut lines, "online")["pid"]));
    workers.into_iter().for_each(is_jailed);
    lines.close_stdin();
    lines.wait().code(0);

    // one behind a port
    let mut server = Server::start(wrun(["cluster", HELLO_HTTP, "--listen=0", "-w1", "--log-format=json"]));
    is_jailed(pid(&event(&mut server, "online")["pid"]));

    // and a command
    let mut command = wrun(["run", "--isolation=jail", CAT]).stdin_open().spawn();
    command.write_line("so it is inside");
    assert_eq!(command.stdout_line(), "so it is inside");
    let [child] = children(command.pid())[..] else { panic!("expected one child") };
    is_jailed(child);
    command.close_stdin();
    command.wait().code(0);

    // and children, with a mailbox and without
    for (mode, guest) in [("spawn", CAT), ("fork", ECHO), ("fork", COURIER)] {
        let mut parent = wrun([mode, guest]).stdin_open().spawn();
        parent.write_line("[\"inside\"]");
        assert_eq!(parent.stdout_line(), "[\"inside\"]");
        let [child] = children(parent.pid())[..] else { panic!("expected one child") };
        is_jailed(child);
        parent.close_stdin();
        parent.wait().code(0);
    }
}

#[test]
fn a_command_in_a_process_is_one_like_any_other() {
    for isolation in ["process", "jail"] {
        let run = |guest: &str| wrun(["run", "--isolation", isolation, guest, "--"]);
        let args = run(ARGS).args(["a b", "", "--", "'\"", "漢"]).run().code(0).stderr("").stdout_json();
        assert_eq!(args["args"].as_array().unwrap()[1..], ["a b", "", "--", "'\"", "漢"]);
        assert_eq!(args["env"], json!({}));
        for guest in [HOSTILE_COMMAND, HOSTILE_COMMAND_P1] {
            let act = |args: &[&str]| run(guest).args(args);
            act(&["read-stdin"]).stdin(vec![b'x'; 3 << 20]).run().code(0).stdout("3145728\n");
            act(&["stderr", "news"]).run().code(0).stdout("").stderr("news\n");
            let flood = act(&["flood", "5000000"]).run().code(0).stdout_text();
            assert_eq!(flood.len(), 5_000_000);
            act(&["exit", "1"]).run().code(1).stdout("").stderr("");
            act(&["trap"]).run().code(134).stderr_has("trapped: wasm `unreachable` instruction executed");
            act(&["recurse"]).run().code(134).stderr_has("call stack exhausted");
            act(&["grow"]).run().code(137).stderr_has("hit the memory limit of 256MiB");
        }
        run(HOSTILE_COMMAND_P1).args(["exit", "42"]).run().code(42);
        let timed = wrun(["run", "--isolation", isolation, "--timeout=100ms", HOSTILE_COMMAND, "--", "spin"]);
        timed.run().code(124).stderr_has("hit the time limit of 100ms");
    }
    wrun(["run", "--isolation=process", ECHO])
        .run()
        .code(126)
        .error_and_hint("expected a command guest, found a handler guest (component)", "use `wrun cluster`");
    wrun(["run", "--isolation=process", "none.wasm"]).run().code(127);
}

/// As a shell that lists what follows what.
#[test]
fn a_command_does_not_outlive_wrun() {
    for signal in [Signal::KILL, Signal::TERM, Signal::INT] {
        let running = wrun(["run", "--isolation=jail", HOSTILE_COMMAND, "--", "spin"]).spawn();
        let child = loop {
            if let [child] = children(running.pid())[..]
                && proc(child, "status").contains("Seccomp:\t2")
            {
                break child;
            }
        };
        running.signal(signal);
        running.wait().killed_by(signal);
        assert!(gone(child), "{signal:?}");
    }
}

/// What each trial must have been stopped by.
fn verdicts(report: &Value) -> Vec<(&str, &str, &str)> {
    let text = |check: &Value, field: &str| check[field].as_str().expect("a text").to_owned().leak() as &str;
    let checks = report["checks"].as_array().expect("a list").iter();
    checks.map(|check| (text(check, "guard"), text(check, "what"), text(check, "verdict"))).collect()
}

#[test]
fn the_doctor_proves_every_wall() {
    let before = Folder::new();
    let report =
        before.wrun(["doctor", "--json"]).env("TMPDIR", before.path("")).run().code(0).stderr("").stdout_json();
    assert_eq!((&report["jail"], &report["missing"]), (&json!(true), &json!(null)), "{report}");
    assert!(before.names("").is_empty(), "it leaves nothing");
    let verdicts = verdicts(&report);
    let held = |guard, what| assert!(verdicts.contains(&(guard, what, "held")), "{guard}: {what}: {report}");
    for what in [
        "read /etc/passwd",
        "list the root folder",
        "write beside a granted folder",
        "follow a symbolic link out of it",
        "move a file out of it",
        "hard-link a file into it",
        "run a program",
        "connect to a port",
        "listen on a port",
        "listen when a port is granted",
    ] {
        held("landlock", what);
        held("seccomp", what);
    }
    // seccomp cannot see the port, and Landlock knows no other way to connect
    held("landlock", "connect to a port that is not granted");
    held("landlock", "lets through to a port that is granted");
    held("seccomp", "open a UDP socket when a port is granted");
    held("seccomp", "connect to another port by sending to it");
    // of these Landlock knows since Linux 6.12
    for what in [
        "connect to an abstract socket",
        "send its parent a signal",
        "open a UDP socket",
        "start a process",
        "enter a namespace",
        "map memory that can be executed",
    ] {
        held("seccomp", what);
    }
    for what in [
        "take more memory than allowed",
        "open more descriptors than allowed",
        "write a larger file than allowed",
        "compute for longer than allowed",
        "leaves no core",
    ] {
        held("limits", what);
    }
    for what in [
        "has a session of its own and no terminal",
        "inherits no variable",
        "inherits no descriptor",
        "live on without its parent",
    ] {
        held("start", what);
    }
    // what a system allows to nobody is not proof, and not a failure
    assert!(verdicts.iter().all(|(_, _, verdict)| ["held", "unproven"].contains(verdict)), "{report}");
    let text = wrun(["doctor"]).run().code(0).stdout_text();
    assert!(text.ends_with("\nevery wall is up\n"), "{text}");
    assert_eq!(text.matches("  held ").count(), verdicts.iter().filter(|(_, _, verdict)| *verdict == "held").count());
}

/// Whoever has no rights to give up has the same walls.
#[test]
fn the_walls_do_not_need_root() {
    let folder = Folder::new();
    fs::set_permissions(folder.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    let program = folder.path("wrun");
    fs::copy(WRUN, &program).unwrap();
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        command
    } else {
        Command::new(&program)
    };
    let done = command.args(["doctor", "--json"]).env_clear().env("TMPDIR", folder.path("")).output().unwrap();
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((done.status.code(), &report["jail"]), (Some(0), &json!(true)), "{report}");
    // a system may keep namespaces from its users; one that does not bounds their threads there
    let verdicts = verdicts(&report);
    let namespaces: Vec<_> = verdicts.iter().filter(|(guard, ..)| *guard == "namespaces").collect();
    assert_eq!(namespaces.len(), 2, "{report}");
    assert_eq!(namespaces[0].2, namespaces[1].2, "{report}");
}

#[test]
fn the_doctor_sees_a_missing_wall() {
    // what is only done in another way is not missed
    wrun(["doctor"]).on_a_kernel_without(&[libc::SYS_close_range]).run().code(0);
    for (calls, guard, other, missing) in [
        (&LANDLOCK[..], "landlock", "seccomp", "this kernel has no Landlock"),
        (&SECCOMP[..], "seccomp", "landlock", "this kernel takes no filter of system calls"),
    ] {
        let report = wrun(["doctor", "--json"]).on_a_kernel_without(calls).run().code(125).stdout_json();
        assert_eq!(report["jail"], json!(false));
        assert!(report["missing"].as_str().unwrap().contains(missing), "{report}");
        let verdicts = verdicts(&report);
        assert!(verdicts.contains(&(guard, "read /etc/passwd", "failed")), "{report}");
        assert!(verdicts.contains(&(other, "read /etc/passwd", "held")), "{report}");
        let text = wrun(["doctor"]).on_a_kernel_without(calls).run().code(125).stdout_text();
        assert!(text.contains(&format!("\nmissing: {missing}")), "{text}");
    }
}

#[test]
fn without_a_wall_a_process_says_so_once_and_a_jail_gives_up() {
    for (calls, missing) in
        [(&LANDLOCK[..], "this kernel has no Landlock"), (&SECCOMP[..], "this kernel takes no filter")]
    {
        let on = |wrun: Wrun| wrun.private_cache().on_a_kernel_without(calls);
        let lines = on(wrun(["cluster", ECHO, "-w2", "--log-format=json"])).stdin("1\n2\n").run().code(0);
        let told: Vec<_> = events(&lines).into_iter().filter(|event| event["event"] == "error").collect();
        assert_eq!(told.len(), 1, "{told:?}");
        let told = told[0]["message"].as_str().unwrap();
        assert!(told.starts_with("workers do without a wall: ") && told.contains(missing), "{told}");

        let process = on(wrun(["run", "--isolation=process", HELLO])).run().code(0).stdout("Hello, world!\n");
        assert_eq!(process.stderr_text().matches(missing).count(), 1, "{}", process.transcript());
        // nobody has asked for a wall
        on(wrun(["run", HELLO])).run().code(0).stdout("Hello, world!\n").stderr("");

        // in each of these a compiler comes first; with the code at hand it is the guest's own process that gives up
        let cached = Folder::new();
        cached.wrun(["compile", HELLO]).private_cache().run().code(0);
        cached.wrun(["compile", ECHO]).private_cache().run().code(0);
        for folder in [&Folder::new(), &cached] {
            for args in [
                &["run", "--isolation=jail", HELLO][..],
                &["cluster", "--isolation=jail", ECHO],
                &["cluster", "--isolation=jail", HELLO_HTTP, "--listen=0"],
            ] {
                let refused = folder.wrun(args).private_cache().on_a_kernel_without(calls).stdin("1\n");
                refused
                    .run()
                    .code(125)
                    .stderr_has(&format!("wrun: error: a wall is missing: {missing}"))
                    .stderr_has("hint: `wrun doctor` says what this system has; `--isolation process` goes on without");
            }
        }
    }
}

#[test]
fn a_pool_has_no_guest_in_its_own_process() {
    let refused = wrun(["cluster", "--isolation=thread", ECHO]).run().code(2).stdout("");
    refused.error("the workers of a pool are processes: expected `process` or `jail` for their isolation");
}

/// A folder that is granted in a pool is the workers' only one, and they open it for each instance anew.
#[test]
fn what_is_granted_in_a_pool_is_there_for_every_instance() {
    let folder = Folder::new().file("in/a.txt", "granted").file("secret.txt", "secret");
    let read = |path: &str| json!({"do": "read", "path": path}).to_string() + "\n";
    let (inside, outside) = (read("in/a.txt").repeat(3), read("secret.txt"));
    let args =
        ["cluster", guest_artifacts::HOSTILE, "-w1", "--instance=task", "--isolation=jail", "--dir=in", "--ordered"];
    let done = folder.wrun(args).stdin(inside + &outside).run().code(0).stdout_text();
    let replies: Vec<Value> = done.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(replies[..3].iter().all(|reply| reply["reply"]["text"] == "granted"), "{done}");
    assert!(replies[3]["reply"]["error"].is_string(), "{done}");
}
