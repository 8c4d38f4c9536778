//! What the engine lets one guest have, beside the limits that have flags: each cap just under and just over, for a
//! command that is run and for a handler in a pool. A guest that wants more is told so or ends, and the host does not
//! grow.

use std::fmt::Write as _;

use guest_artifacts::{HOSTILE_COMMAND_P1, UPLOAD};
use rustix::process::Pid;
use serde_json::json;

use crate::{
    client::Server,
    supervision::{children, event, pid},
    wrun::{Finished, Folder, Wrun, wrun},
};

const MIB: usize = 1 << 20;

/// A component that calls the host.
#[derive(Default)]
struct Component {
    /// What it imports, and other definitions before its modules.
    imports: &'static str,
    /// The functions that its body calls: the name and the type there, and how it is made.
    functions: &'static [(&'static str, &'static str, &'static str)],
    /// More of the core module that the body is in.
    definitions: String,
    /// What it does; `$n` and `$m` are variables.
    body: String,
    /// What comes after that module.
    after: String,
}

impl Component {
    /// As a command.
    fn command(&self) -> String {
        self.text(
            r#"(func $run (result (result)) (canon lift (core func $main "run")))
            (instance $run (export "run" (func $run)))
            (export "wasi:cli/run@0.2.0" (instance $run))"#,
        )
    }

    /// As a handler, which ends each task without a reply.
    fn handler(&self) -> String {
        self.text(
            r#"(func $handle (param "message" string) (result (result (option string) (error string)))
              (canon lift (core func $main "handle") (memory $memory) (realloc $realloc)))
            (instance $handler (export "handle" (func $handle)))
            (export "wrun:guest/handler@0.1.0" (instance $handler))"#,
        )
    }

    fn text(&self, exports: &str) -> String {
        let Self { imports, functions, definitions, body, after } = self;
        let (mut made, mut needed, mut given) = (String::new(), String::new(), String::new());
        for (name, kind, how) in *functions {
            let _ = writeln!(made, "(core func ${name} ({how}))");
            let _ = writeln!(needed, r#"(import "host" "{name}" (func ${name} {kind}))"#);
            let _ = writeln!(given, r#"(export "{name}" (func ${name}))"#);
        }
        // what the host puts into the memory lies from 32 MiB on; the result of a task is the zeros at 16
        format!(
            r#"(component
            {imports}
            (core module $libc
              (memory (export "memory") 1024)
              (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0x2000000)))
            (core instance $libc (instantiate $libc))
            (alias core export $libc "memory" (core memory $memory))
            (alias core export $libc "realloc" (core func $realloc))
            {made}
            (core module $main
              (import "libc" "memory" (memory 1))
              {needed}
              {definitions}
              (func $act (local $n i32) (local $m i32) {body})
              (func (export "run") (result i32) (call $act) (i32.const 0))
              (func (export "handle") (param i32 i32) (result i32) (call $act) (i32.const 16)))
            (core instance $main
              (instantiate $main (with "libc" (instance $libc)) (with "host" (instance {given}))))
            {after}
            {exports})"#
        )
    }

    /// Runs it.
    fn run(&self, limits: &[&str]) -> Finished {
        Folder::new().file("guest.wat", self.command()).wrun(["run", "guest.wat"]).args(limits).run().stdout("")
    }

    /// A pool of one worker with these limits.
    fn pool(&self, limits: &[&str]) -> Wrun {
        Folder::new().file("guest.wat", self.handler()).wrun(["cluster", "guest.wat", "-w", "1"]).args(limits)
    }

    /// Ends well, be it run or given a task.
    #[track_caller]
    fn passes(&self) {
        self.run(&[]).code(0).stderr("");
        self.pool(&[]).stdin("1\n").run().code(0).stdout("{\"line\":1}\n");
    }

    /// Traps with these words, be it run or given a task.
    #[track_caller]
    fn traps(&self, words: &str) {
        self.run(&[]).code(134).stderr_has(&format!("wrun: `guest.wat` trapped: {words}\n"));
        let task = self.pool(&[]).stdin("1\n").run().code(0).stdout_json();
        assert_eq!((&task["error"]["kind"], &task["error"]["trap"]), (&json!("trapped"), &json!(words)), "{task}");
    }

    /// Is refused before anything of it runs, be it run or put into a pool.
    #[track_caller]
    fn is_refused(&self, reason: &str) {
        self.run(&[]).code(126).stderr_has(&format!("{reason}\n"));
        self.pool(&[]).stdin("1\n").run().code(126).stderr_has(&format!("wrun: error: {reason}\n"));
    }
}

/// A core module that imports these functions of WASI preview 1, does something and exits with a number.
fn module(imports: &[(&str, &str)], body: &str) -> String {
    let mut needed = String::new();
    for (name, kind) in imports.iter().chain(&[("proc_exit", "(param i32)")]) {
        let _ = writeln!(needed, r#"(import "wasi_snapshot_preview1" "{name}" (func ${name} {kind}))"#);
    }
    format!(
        r#"(module {needed} (memory (export "memory") 256)
        (func (export "_start") (local $n i32) (local $m i32) {body} (call $proc_exit)))"#
    )
}

/// Runs such a module. It cannot have more memory than it begins with, which is 16 MiB.
fn run_module(wat: &str, args: &[&str]) -> Finished {
    Folder::new().file("guest.wat", wat).wrun(["run", "guest.wat", "--memory", "16MiB"]).args(args).run()
}

/// Does something so often.
fn times(count: u32, what: &str) -> String {
    format!(
        "(local.set $n (i32.const {count}))
        (loop {what} (br_if 0 (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))"
    )
}

/// The most memory that a process has had, in KiB.
fn memory_peak(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).expect("it is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    line.trim_end_matches("kB").trim().parse().expect("a number")
}

/// What a process may grow by in KiB, whatever its guest does.
const FLAT_KIB: u64 = 4 << 10;

/// Pollables and what they are of: timers, and standard output.
const WASI: &str = r#"
    (import "wasi:io/poll@0.2.0" (instance $poll
      (export "pollable" (type $pollable (sub resource)))
      (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
      (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))))
    (alias export $poll "pollable" (type $pollable))
    (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
      (alias outer 1 $pollable (type $outer))
      (export "pollable" (type $pollable (eq $outer)))
      (export "now" (func (result u64)))
      (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
    (import "wasi:io/streams@0.2.0" (instance $streams (export "output-stream" (type (sub resource)))))
    (alias export $streams "output-stream" (type $stream))
    (import "wasi:cli/stdout@0.2.0" (instance $stdout
      (alias outer 1 $stream (type $outer))
      (export "output-stream" (type $stream (eq $outer)))
      (export "get-stdout" (func (result (own $stream))))))"#;

/// What [`WASI`] has.
const CALLS: &[(&str, &str, &str)] = &[
    ("now", "(result i64)", r#"canon lower (func $clock "now")"#),
    ("timer", "(param i64) (result i32)", r#"canon lower (func $clock "subscribe-duration")"#),
    ("stdout", "(result i32)", r#"canon lower (func $stdout "get-stdout")"#),
    ("block", "(param i32)", r#"canon lower (func $poll "[method]pollable.block")"#),
    ("poll", "(param i32 i32 i32)", r#"canon lower (func $poll "poll") (memory $memory) (realloc $realloc)"#),
];

/// A component that uses [`WASI`].
fn calling(body: impl Into<String>) -> Component {
    Component { imports: WASI, functions: CALLS, body: body.into(), ..Component::default() }
}

const NO_FUEL: &str = "too much data is being copied between the host and the guest: \
    fuel allocated for hostcalls has been exhausted";
const TABLE_FULL: &str = "it holds more than 1000 files, streams and the like";
const HANDLES_FULL: &str = "cannot allocate another handle: store handle limit exceeded";

/// Sends a message of so many zeros. Whether it is one is looked at when it has come whole.
fn send(bytes: usize) -> Component {
    Component {
        imports: r#"
            (type $error (variant (case "not-json" string) (case "too-large" u64) (case "full") (case "closed")))
            (import "wrun:guest/mailbox@0.1.0" (instance $mailbox
              (alias outer 1 $error (type $outer))
              (export "send-error" (type $error (eq $outer)))
              (export "send" (func (param "message" string) (result (result (error $error)))))))"#,
        functions: &[(
            "send",
            "(param i32 i32 i32)",
            r#"canon lower (func $mailbox "send") (memory $memory) (realloc $realloc)"#,
        )],
        body: format!("(call $send (i32.const 0x10000) (i32.const {bytes}) (i32.const 0x100))"),
        ..Component::default()
    }
}

/// Asks for so many random bytes.
fn random(bytes: usize) -> Component {
    Component {
        imports: r#"(import "wasi:random/random@0.2.0" (instance $random
          (export "get-random-bytes" (func (param "len" u64) (result (list u8))))))"#,
        functions: &[(
            "random",
            "(param i64 i32)",
            r#"canon lower (func $random "get-random-bytes") (memory $memory) (realloc $realloc)"#,
        )],
        body: format!("(call $random (i64.const {bytes}) (i32.const 0x100))"),
        ..Component::default()
    }
}

/// Makes so many handles of a resource of its own, about which the host knows nothing else.
fn own(count: u32) -> Component {
    Component {
        imports: "(type $thing (resource (rep i32)))",
        functions: &[("new", "(param i32) (result i32)", "canon resource.new $thing")],
        body: times(count, "(drop (call $new (i32.const 0)))"),
        ..Component::default()
    }
}

#[test]
fn what_one_call_hands_to_the_host_is_bounded() {
    // 8 MiB, and four times what a message may have
    send(12 * MIB).passes();
    send(12 * MIB + 1).traps(NO_FUEL);
}

#[test]
fn polling_a_long_list_is_bounded() {
    // the list has one pollable again and again, which is ready
    let poll = |length: u32| {
        let fill = times(
            length,
            "(i32.store (i32.add (i32.const 0x10000) (i32.shl (local.get $n) (i32.const 2))) (local.get $m))",
        );
        calling(format!(
            "(local.set $m (call $timer (i64.const 0))) {fill}
            (call $poll (i32.const 0x10004) (i32.const {length}) (i32.const 0x100))"
        ))
    };
    // what is lent to the host counts as a handle more
    poll(999).passes();
    poll(1000).traps("cannot lend resource: store handle limit exceeded");
    poll(2_000_000).traps(NO_FUEL);
}

#[test]
fn a_core_module_polls_no_more_than_it_may_hold() {
    // the subscriptions are zeros: clocks that have rung
    let poll = |length: u32| {
        let wat = module(
            &[("poll_oneoff", "(param i32 i32 i32 i32) (result i32)")],
            &format!(
                "(call $poll_oneoff (i32.const 0) (i32.const 0x800000) (i32.const {length}) (i32.const 0xf00000))"
            ),
        );
        run_module(&wat, &[]).stdout("")
    };
    // each is a timer and something to wait for it with
    poll(500).code(0).stderr("");
    poll(501).code(134).stderr_has(&format!("trapped: {TABLE_FULL}\n"));
    poll(100_000).code(134).stderr_has(&format!("trapped: {TABLE_FULL}\n"));
    for length in [1_000_000, u32::MAX] {
        poll(length).code(ENOMEM).stderr("");
    }
}

/// What preview 1 says when there is no memory for something.
const ENOMEM: i32 = 48;

#[test]
fn a_core_module_reads_into_all_of_its_memory_at_once_and_hands_over_no_more() {
    // so many buffers, of which the first is all that is read into: the whole memory
    let read = |buffers: u32| {
        let wat = module(
            &[("fd_read", "(param i32 i32 i32 i32) (result i32)")],
            &format!(
                "(i32.store (i32.const 4) (i32.const 0x1000000))
                (call $fd_read (i32.const 0) (i32.const 0) (i32.const {buffers}) (i32.const 0x900000))"
            ),
        );
        run_module(&wat, &[]).stdout("")
    };
    // a buffer is named by 8 bytes, and there is room for 8 MiB beside the memory
    read(1 << 20).code(0).stderr("");
    read((1 << 20) + 1).code(ENOMEM).stderr("");
}

#[test]
fn a_core_module_reads_a_large_file_at_once() {
    let text = "x".repeat(20 * MIB);
    let folder = Folder::new().file("data/large", &text);
    folder.wrun(["run", "--dir", "data", HOSTILE_COMMAND_P1, "--", "read", "data/large"]).run().code(0).stdout(&text);
}

/// As C++ does. What is thrown lies in a heap of the engine's.
#[test]
fn a_guest_may_throw_and_what_it_keeps_of_that_is_its_memory() {
    let throwing = |body: &str| Component {
        definitions: "(tag $e (param i32)) (table $kept 50001 exnref) (func $throw (throw $e (i32.const 1)))".into(),
        body: body.into(),
        ..Component::default()
    };
    let caught = "(drop (block $caught (result i32)
        (try_table (catch $e $caught) (call $throw))
        (unreachable)))";
    throwing(&times(200_000, caught)).passes();
    throwing("(call $throw)").traps("thrown Wasm exception");

    // some 40 bytes each, beside the 64 MiB that it begins with
    let kept = throwing(&times(
        50_000,
        "(table.set $kept (local.get $n) (block $caught (result exnref)
            (try_table (catch_all_ref $caught) (call $throw))
            (unreachable)))",
    ));
    kept.run(&["--memory", "72MiB"]).code(0).stderr("");
    kept.run(&["--memory", "65MiB"]).code(137).stderr("wrun: `guest.wat` hit the memory limit of 65MiB\n");
    let task = kept.pool(&["--memory", "65MiB"]).stdin("1\n").run().code(0).stdout_json();
    assert_eq!((&task["error"]["kind"], &task["error"]["limit"]), (&json!("limit"), &json!("memory")), "{task}");
    kept.pool(&["--memory", "72MiB"]).stdin("1\n2\n").run().code(0).stdout("{\"line\":1}\n{\"line\":2}\n");
}

#[test]
fn random_bytes_come_a_mebibyte_at_a_time() {
    let words = "requested len 1048577 exceeds limit 1048576";
    random(MIB).passes();
    random(MIB + 1).traps(words);

    let random = |bytes: usize| {
        let random_get = [("random_get", "(param i32 i32) (result i32)")];
        run_module(&module(&random_get, &format!("(call $random_get (i32.const 0) (i32.const {bytes}))")), &[])
    };
    random(MIB).code(0).stderr("");
    random(MIB + 1).code(134).stderr_has(&format!("trapped: {words}\n"));
}

#[test]
fn a_guest_has_so_many_handles() {
    own(1000).passes();
    own(1001).traps(HANDLES_FULL);
}

#[test]
fn a_guest_holds_so_many_things_of_the_host() {
    // a pollable of a timer is one handle, and two things
    let hold = |count: u32| calling(times(count, "(drop (call $timer (i64.const 0)))"));
    hold(500).passes();
    hold(501).traps(TABLE_FULL);
}

#[test]
fn whatever_a_guest_asks_for_its_worker_stays_as_small_as_it_was() {
    for (flood, words) in [
        (calling(times(1_000_000, "(drop (call $stdout))")), TABLE_FULL),
        (calling(times(1_000_000, "(drop (call $timer (i64.const 0)))")), TABLE_FULL),
        (own(1_000_000), HANDLES_FULL),
        (send(60 * MIB), NO_FUEL),
        (random(30 * MIB), "requested len 31457280 exceeds limit 1048576"),
    ] {
        let mut pool = flood.pool(&["--log-format", "json"]).stdin_open().spawn();
        let worker = pid(&event(&mut pool, "fork")["pid"]);
        event(&mut pool, "online");
        let before = memory_peak(worker);
        for _ in 0..10 {
            pool.write_line("1");
            let line = pool.stdout_line();
            assert!(line.contains(&format!(r#""trap":"{words}""#)), "{line}");
        }
        let grown = memory_peak(worker) - before;
        assert!(grown < FLAT_KIB, "{words}: {grown} KiB");
        pool.close_stdin();
        pool.wait().code(0);
    }
}

/// Opens one file until that fails, prints a line, waits for the end of its input, and exits with the error. It traps
/// when that fails too early, or too late.
fn open_many(least: u32, most: u32) -> Folder {
    let wat = module(
        &[
            ("path_open", "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)"),
            ("fd_write", "(param i32 i32 i32 i32) (result i32)"),
            ("fd_read", "(param i32 i32 i32 i32) (result i32)"),
        ],
        &format!(
            r"(i64.store (i32.const 0x100) (i64.const 0x6174_6164)) ;; data
            (i32.store (i32.const 0x110) (i32.const 0x118))
            (i32.store (i32.const 0x114) (i32.const 1))
            (i32.store (i32.const 0x118) (i32.const 10)) ;; a line's end
            (loop
              (if (i32.gt_u (local.get $n) (i32.const {most})) (then unreachable))
              (local.set $n (i32.add (local.get $n) (i32.const 1)))
              (local.set $m (call $path_open (i32.const 3) (i32.const 0) (i32.const 0x100) (i32.const 4) (i32.const 0)
                (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 0x200)))
              (br_if 0 (i32.eqz (local.get $m))))
            (if (i32.le_u (local.get $n) (i32.const {least})) (then unreachable))
            (drop (call $fd_write (i32.const 1) (i32.const 0x110) (i32.const 1) (i32.const 0x200)))
            (drop (call $fd_read (i32.const 0) (i32.const 0x110) (i32.const 1) (i32.const 0x200)))
            (local.get $m)"
        ),
    );
    Folder::new().file("guest.wat", wat).file("dir/data", "")
}

#[test]
fn a_flood_of_files_is_refused_and_takes_no_memory() {
    let args = ["run", "guest.wat", "--dir", "dir", "--isolation", "process", "--open-files", "64"];
    let mut flood = open_many(64, 128).wrun(args).stdin_open().spawn();
    assert_eq!(flood.stdout_line(), "");
    let peak = memory_peak(children(flood.pid())[0]);
    assert!(peak < 64 << 10, "{peak} KiB");
    flood.close_stdin();
    // WASI 0.2, through which this goes, has no name for it but an error of input or output
    flood.wait().code(29).stderr("");

    // without a process of its own there is no such limit, but that of everything that it holds
    let flood = open_many(0, 1000).wrun(["run", "guest.wat", "--dir", "dir"]).open_files(4096).run();
    flood.code(134).stdout("").stderr_has(&format!("trapped: {TABLE_FULL}\n"));
}

/// A header of so many bytes, in a set of its own.
fn header(bytes: usize) -> Component {
    Component {
        imports: r#"
            (type $error (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
            (import "wasi:http/types@0.2.0" (instance $http
              (export "fields" (type $fields (sub resource)))
              (alias outer 1 $error (type $outer))
              (export "header-error" (type $error (eq $outer)))
              (export "[constructor]fields" (func (result (own $fields))))
              (export "[method]fields.append" (func
                (param "self" (borrow $fields)) (param "name" string) (param "value" (list u8))
                (result (result (error $error)))))))"#,
        functions: &[
            ("fields", "(result i32)", r#"canon lower (func $http "[constructor]fields")"#),
            (
                "append",
                "(param i32 i32 i32 i32 i32 i32)",
                r#"canon lower (func $http "[method]fields.append") (memory $memory) (realloc $realloc)"#,
            ),
        ],
        definitions: r#"(data (i32.const 0x100) "x")"#.into(),
        // all of it is a `0`
        body: times(65_536 * 2, "(i32.store8 (i32.add (i32.const 0x10000) (local.get $n)) (i32.const 48))")
            + &format!(
                "(call $append (call $fields) (i32.const 0x100) (i32.const 1) (i32.const 0x10001) (i32.const {bytes})
                  (i32.const 0x200))
                (if (i32.load8_u (i32.const 0x200)) (then unreachable))"
            ),
        ..Component::default()
    }
}

const FIELDS_FULL: &str = "total size of fields exceeds limit";

#[test]
fn headers_that_a_guest_makes_are_small_without_a_port() {
    // what they are kept in counts, too
    header((32 << 10) - 100).passes();
    header(32 << 10).traps(FIELDS_FULL);
}

#[test]
fn headers_that_a_guest_makes_may_be_as_large_as_those_of_a_request_and_somewhat_larger() {
    let ask = |bytes: usize, args: &[&str]| {
        let server = Server::start(header(bytes).pool(&["--listen", "0"]).args(args));
        server.post("/", "1").status
    };
    assert_eq!(ask((96 << 10) - 100, &[]), 204);
    assert_eq!(ask(96 << 10, &[]), 500);
    assert_eq!(ask((40 << 10) - 100, &["--header-max", "8KiB"]), 204);
    assert_eq!(ask(40 << 10, &["--header-max", "8KiB"]), 500);
}

#[test]
fn a_guest_sends_back_the_largest_headers_that_it_gets() {
    for (max, value) in [("64KiB", 60 << 10), ("1MiB", 1000 << 10)] {
        let server = Server::start(wrun(["cluster", UPLOAD, "-w", "1", "--listen", "0", "--header-max", max]));
        let value = "v".repeat(value);
        let ask = |path: &str| {
            server.request(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Large: {value}\r\n\r\n"))
        };
        assert!(ask("/").json()["headers"].as_array().unwrap().contains(&json!(["x-large", value])));
        assert_eq!(ask("/back").header("x-large"), Some(&*value));
    }
}

/// The module that the others are instances of, and so many of them.
fn parts(module: &str, instances: usize) -> Component {
    let after = format!("(core module $part {module})") + &"(core instance (instantiate $part))".repeat(instances);
    Component { after, ..Component::default() }
}

#[test]
fn a_guest_has_so_many_core_instances() {
    // two are there already
    parts("", 30).passes();
    let refused = "it has more core instances than the 32 that a guest may have";
    parts("", 31).is_refused(refused);

    // each of these has two of the one before
    let doubled = |times: u32| {
        let mut component = "(component $c (core module $m) (core instance (instantiate $m)))".to_owned();
        for _ in 0..times {
            component = format!("(component $c {component} (instance (instantiate $c)) (instance (instantiate $c)))");
        }
        Component { after: format!("{component} (instance (instantiate $c))"), ..Component::default() }
    };
    doubled(4).passes();
    for times in [5, 40] {
        doubled(times).is_refused(refused);
    }
}

#[test]
fn components_that_come_as_values_are_counted_when_they_are_made() {
    let values = |count: usize| {
        let after = r#"
            (component $c
              (component $d (core module $m) (core instance (instantiate $m)))
              (export "d" (component $d)))
            (instance $c (instantiate $c))
            (alias export $c "d" (component $d))"#
            .to_owned();
        Component { after: after + &"(instance (instantiate $d))".repeat(count), ..Component::default() }
    };
    values(30).passes();
    values(31).is_refused("it has more core instances than the 32 that a guest may have");
}

#[test]
fn a_guest_has_so_many_memories() {
    let refused = "it has more linear memories than the 4 that a guest may have";
    // one is there already; whether the others are of one module does not matter
    parts("(memory 1)", 3).passes();
    parts("(memory 1) (memory 1) (memory 1)", 1).passes();
    parts("(memory 1)", 4).is_refused(refused);
    parts("(memory 1) (memory 1) (memory 1) (memory 1)", 1).is_refused(refused);

    let run = |count| run_module(&format!(r#"(module {} (func (export "_start")))"#, "(memory 1)".repeat(count)), &[]);
    run(4).code(0).stderr("");
    run(5).code(126).error(refused);
}

#[test]
fn a_guest_has_so_many_tables() {
    let refused = "it has more tables than the 8 that a guest may have";
    let tables = |count| "(table 1 funcref)".repeat(count);
    parts(&tables(1), 8).passes();
    parts(&tables(8), 1).passes();
    parts(&tables(1), 9).is_refused(refused);
    parts(&tables(9), 1).is_refused(refused);

    let run = |count| run_module(&format!(r#"(module {} (func (export "_start")))"#, tables(count)), &[]);
    run(8).code(0).stderr("");
    run(9).code(126).error(refused);
}

#[test]
fn a_table_starts_with_so_many_elements() {
    let refused = "it has more elements in a table than the 100000 that a guest may have";
    let table = |elements: u32| format!("(table {elements} funcref)");
    parts(&table(100_000), 1).passes();
    for elements in [100_001, 10_000_000] {
        parts(&table(elements), 1).is_refused(refused);
    }

    let run = |elements| run_module(&format!(r#"(module {} (func (export "_start")))"#, table(elements)), &[]);
    run(100_000).code(0).stderr("");
    run(100_001).code(126).error(refused);
}

#[test]
fn a_table_grows_to_so_many_elements() {
    let grow = |elements: u32, expected: i32| Component {
        definitions: "(table $table 1 funcref)".into(),
        body: format!(
            "(if (i32.ne (table.grow $table (ref.null func) (i32.const {elements})) (i32.const {expected}))
              (then unreachable))"
        ),
        ..Component::default()
    };
    grow(99_999, 1).passes();
    // the guest is told
    grow(100_000, -1).passes();
}

#[test]
fn a_memory_that_starts_with_4_gib_does_not_start() {
    let large = parts("(memory 65536)", 1);
    large.run(&[]).code(137).stderr("wrun: `guest.wat` hit the memory limit of 256MiB\n");
    let ran = large.pool(&[]).stdin("").run().code(126).stdout("");
    ran.stderr_has("wrun: error: it starts with 4160MiB of memory, more than the 256MiB that it may have (--memory)\n");

    let module = r#"(module (memory 65536) (func (export "_start")))"#;
    run_module(module, &[]).code(137).stderr("wrun: `guest.wat` hit the memory limit of 16MiB\n");
}

/// Does not end by itself, but by its time limit, be it run or given a task.
#[track_caller]
fn runs_out_of_time(guest: &Component) {
    const LIMIT: [&str; 2] = ["--timeout", "150ms"];
    guest.run(&LIMIT).code(124).stderr("wrun: `guest.wat` hit the time limit of 150ms\n");
    for concurrency in ["1", "2"] {
        let pool = guest.pool(&LIMIT).args(["--concurrency", concurrency]).stdin("1\n").run().code(0);
        let error = &pool.stdout_json()["error"];
        assert_eq!((&error["kind"], &error["limit"]), (&json!("limit"), &json!("time")), "{concurrency}: {error}");
    }
}

#[test]
fn the_longest_sleep_ends_by_the_time_limit() {
    runs_out_of_time(&calling("(call $block (call $timer (i64.const -1)))"));
    let wat = module(
        &[("poll_oneoff", "(param i32 i32 i32 i32) (result i32)")],
        "(i64.store (i32.const 24) (i64.const -1))
        (call $poll_oneoff (i32.const 0) (i32.const 0x100) (i32.const 1) (i32.const 0x200))",
    );
    let ran = run_module(&wat, &["--timeout", "150ms"]);
    ran.code(124).stderr("wrun: `guest.wat` hit the time limit of 150ms\n");
}

#[test]
fn a_flood_of_host_calls_ends_by_the_time_limit_or_its_fuel() {
    let now = |count| calling(times(count, "(drop (call $now))"));
    now(1_000).passes();
    runs_out_of_time(&now(100_000_000));
    let fuel = now(100_000_000).run(&["--fuel", "100000"]);
    fuel.code(124).stderr("wrun: `guest.wat` hit the fuel limit of 100000\n");

    let calls =
        [("clock_time_get", "(param i32 i64 i32) (result i32)"), ("fd_write", "(param i32 i32 i32 i32) (result i32)")];
    for call in [
        "(call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 0x100))",
        // one buffer of no bytes
        "(call $fd_write (i32.const 1) (i32.const 0x200) (i32.const 1) (i32.const 0x100))",
    ] {
        let flood = |count| module(&calls, &(times(count, &format!("(drop {call})")) + "(i32.const 0)"));
        run_module(&flood(1_000), &[]).code(0).stdout("").stderr("");
        for (limit, said) in [("--timeout=150ms", "time limit of 150ms"), ("--fuel=100000", "fuel limit of 100000")] {
            let ran = run_module(&flood(100_000_000), &[limit]).code(124).stdout("");
            ran.stderr(format!("wrun: `guest.wat` hit the {said}\n"));
        }
    }
}
