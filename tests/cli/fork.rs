//! `wrun fork`: one guest in a process of its own, with a mailbox.

use guest_artifacts::{COURIER, CRASH_AT_START, DATA_PROCESSOR, ECHO, HELLO, HELLO_HTTP, HOSTILE, WHOAMI};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::wrun::{Folder, wrun};

/// Lines as a program would be fed with.
fn lines(lines: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    lines.into_iter().map(|line| format!("{line}\n")).collect()
}

#[test]
fn a_handler_replies_to_each_message() {
    let data = wrun(["fork", DATA_PROCESSOR]).stdin("{\"data\":[1,2,3]}\n").run().code(0).stderr("");
    data.stdout("{\"result\":[2,4,6],\"count\":3}\n");
    // bare, in order, and to the last digit
    let texts = ["1.10", "-0.0", "123456789012345678901234567890", "\"\\u00e9\\/\"", "{\"b\":1,\"a\":[]}", "null"];
    wrun(["fork", ECHO]).stdin(lines(texts)).run().code(0).stdout(lines(texts)).stderr("");
    let many = lines(0..20_000);
    wrun(["fork", ECHO]).stdin(many.clone()).run().code(0).stdout(many).stderr("");
    wrun(["fork", "--isolation", "jail", ECHO]).stdin("1\n").run().code(0).stdout("1\n").stderr("");
    wrun(["fork", ECHO]).run().code(0).stdout("").stderr("");
}

#[test]
fn a_handler_keeps_what_it_has_in_memory() {
    let ran = wrun(["fork", "--data", "[7]", WHOAMI]).stdin(lines([1, 2, 3])).run().code(0);
    let replies: Vec<Value> = ran.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(replies.len(), 3);
    for (n, reply) in (1..).zip(&replies) {
        assert_eq!((&reply["data"], &reply["handled"]), (&json!([7]), &json!(n)), "{reply}");
    }
}

#[test]
fn a_command_receives_and_sends() {
    let sent = ["1", "[2,  3]", "{\"a\":\"b\"}"];
    let ran = wrun(["fork", COURIER]).stdin(lines(sent)).run().code(0).stderr("");
    ran.stdout(lines(sent.into_iter().chain(["\"bye\""])));

    let folder = Folder::new().folder("data/in");
    let fork = ["fork", "--data", "{\"x\":1.0}", "--dir", "data::/data", "--cwd", "/data/in", COURIER];
    let told = folder.wrun(fork).stdin("{\"do\":\"tell\"}\n").run().code(0);
    let told: Value = serde_json::from_str(told.stdout_text().lines().next().unwrap()).unwrap();
    assert_eq!(told["data"].to_string(), "{\"x\":1.0}");
    let who = (&told["cwd"], &told["name"], &told["id"], &told["count"], &told["generation"], &told["process"]);
    assert_eq!(who, (&json!("/data/in"), &json!("courier"), &json!(1), &json!(1), &json!(1), &json!(true)));
}

#[test]
fn a_message_comes_as_soon_as_it_was_sent() {
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    for n in 0..50 {
        fork.write_line(n.to_string());
        assert_eq!(fork.stdout_line(), n.to_string());
    }
    // also when it computes for ever after that, and when others wait behind it
    fork.write("\"last\"\n{\"do\":\"spin\"}\n1\n");
    assert_eq!(fork.stdout_line(), "\"last\"");
    fork.signal(Signal::INT);
    fork.wait().code(130);

    let mut fork = wrun(["fork", HOSTILE]).stdin_open().spawn();
    fork.write("{\"do\":\"ok\"}\n{\"do\":\"spin\"}\n{\"do\":\"ok\"}\n");
    assert_eq!(fork.stdout_line(), "{\"ok\":true}");
    fork.signal(Signal::INT);
    fork.wait().code(130);
}

#[test]
fn receiving_may_time_out() {
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    for ms in [0, 1, 20] {
        fork.write_line(format!("{{\"do\":\"wait\",\"ms\":{ms}}}"));
        assert_eq!(fork.stdout_line(), "\"timed-out\"");
    }
    fork.write("{\"do\":\"wait\",\"ms\":60000}\n7\n");
    assert_eq!(fork.stdout_line(), "7");
    // a longer time than there is
    fork.write(format!("{{\"do\":\"wait\",\"ms\":{}}}\n8\n", u64::MAX));
    assert_eq!(fork.stdout_line(), "8");
    fork.close_stdin();
    fork.wait().code(0);
}

#[test]
fn what_is_no_message_is_reported_and_skipped() {
    for guest in [ECHO, COURIER] {
        let ran = wrun(["fork", guest]).stdin("1\n{\"a\":\n\n\"\u{1}\"\n2\n").run().code(123);
        ran.clone().check(ran.stdout_text().starts_with("1\n2\n"), "expected the messages alone");
        ran.stderr_has("wrun: line 2 is no message: not JSON").stderr_has("wrun: line 4 is no message: not JSON");
    }
    let deep = |depth: usize| format!("{}{}\n", "[".repeat(depth), "]".repeat(depth));
    wrun(["fork", ECHO]).stdin(deep(128)).run().code(0).stdout(deep(128));
    wrun(["fork", ECHO]).stdin(deep(129)).run().code(123).stderr_has("nested deeper than 128 levels");
    // what the guest makes of its own comes first
    let both = wrun(["fork", COURIER]).stdin("{\n{\"do\":\"exit\",\"code\":1}\n").run();
    both.code(1);
}

#[test]
fn messages_are_bounded_both_ways() {
    let text = |length: usize| format!("\"{}\"\n", "x".repeat(length - 2));
    let fork = |guest: &str, length: usize| wrun(["fork", "--message-max", "100B", guest]).stdin(text(length)).run();
    fork(ECHO, 100).code(0).stdout(text(100));
    fork(ECHO, 101).code(123).stderr_has("101 bytes long, at most 100 are allowed");
    // a reply, and a message that a command sends
    let reply = |length: usize| format!("{{\"do\":\"giant\",\"bytes\":{length}}}\n");
    wrun(["fork", "--message-max", "100B", HOSTILE]).stdin(reply(100)).run().code(0).stdout_is_long(101);
    wrun(["fork", "--message-max", "100B", HOSTILE])
        .stdin(reply(101))
        .run()
        .code(123)
        .stderr_has("message limit of 100B");
    let send = |text: &str| {
        let order = json!({"do": "send", "text": text}).to_string() + "\n";
        wrun(["fork", "--message-max", "200B", COURIER]).stdin(order).run().code(0).stdout_text()
    };
    assert_eq!(send(" [1] "), "[1]\n\"bye\"\n");
    assert_eq!(
        send("{"),
        "\"SendError::NotJson(\\\"not JSON: EOF while parsing an object at line 1 column 1\\\")\"\n\"bye\"\n"
    );
    let mut fork = wrun(["fork", "--message-max", "100B", COURIER]).stdin_open().spawn();
    fork.write_line("{\"do\":\"long\",\"bytes\":100}");
    assert_eq!(fork.stdout_line().len(), 100);
    fork.write_line("{\"do\":\"long\",\"bytes\":101}");
    assert_eq!(fork.stdout_line(), "\"SendError::TooLarge(100)\"");
}

#[test]
fn a_failed_message_is_no_end_and_a_trap_is_one() {
    let ran = wrun(["fork", HOSTILE]).stdin(lines(["{\"do\":\"error\"}", "{\"do\":\"ok\"}"])).run().code(0);
    ran.stdout("{\"ok\":true}\n").stderr_has("wrun: worker 1: the guest failed message 1: ");
    let ran =
        wrun(["fork", HOSTILE]).stdin(lines(["{\"do\":\"invalid\"}", "{\"do\":\"none\"}", "{\"do\":\"ok\"}"])).run();
    ran.code(0).stdout("{\"ok\":true}\n").stderr_has("wrun: worker 1: the guest's answer to message 1 is not JSON");
    // beside its replies a handler may send messages
    let ran = wrun(["fork", HOSTILE]).stdin("{\"do\":\"send\",\"message\":[1]}\n").run().code(0).stderr("");
    assert_eq!(ran.stdout_text().lines().next(), Some("[1]"));
    let ran = wrun(["fork", HOSTILE]).stdin(lines(["{\"do\":\"ok\"}", "{\"do\":\"trap\"}", "{\"do\":\"ok\"}"])).run();
    ran.code(134).stdout("{\"ok\":true}\n").stderr_has("trapped: wasm `unreachable` instruction executed");
    let ran = wrun(["fork", COURIER]).stdin(lines(["1", "{\"do\":\"trap\"}", "2"])).run().code(134).stdout("1\n");
    ran.stderr_has("trapped");
    let ran = wrun(["fork", COURIER]).stdin(lines(["1", "{\"do\":\"exit\",\"code\":1}", "2"])).run();
    ran.code(1).stdout("1\n").stderr("");
    wrun(["fork", CRASH_AT_START]).stdin("1\n").run().code(134).stdout("").stderr_has("trapped");
    wrun(["fork", "--timeout", "200ms", COURIER]).stdin_open().run().code(124).stderr_has("time limit of 200ms");
}

#[test]
fn guests_without_a_mailbox_are_told_apart() {
    wrun(["fork", HELLO_HTTP]).run().code(126).stderr_has("found an http guest").stderr_has("use `wrun cluster`");
    // a command that does not look at its messages just runs
    wrun(["fork", HELLO]).stdin("1\n").run().code(0).stdout("").stderr("Hello, world!\n");
    wrun(["fork", "--data", "{", ECHO]).run().code(2).stderr_has("expected JSON for `--data`, but it is not JSON");
    wrun(["fork", "-"]).stdin("1\n").run().code(2).stderr_has("expected a file for the guest");
    wrun(["fork", "--stdin", "inherit", ECHO]).run().code(2).stderr_has("standard input has the messages");
    wrun(["fork", "--stdout", "pipe", ECHO]).run().code(2).stderr_has("standard output has the messages");
}

#[test]
fn what_a_guest_prints_is_never_among_its_messages() {
    let print = "{\"do\":\"print\",\"text\":\"not JSON\"}\n1\n";
    wrun(["fork", COURIER]).stdin(print).run().code(0).stdout("1\n\"bye\"\n").stderr("not JSON\n");
    wrun(["fork", "--stdout", "null", COURIER]).stdin(print).run().code(0).stdout("1\n\"bye\"\n").stderr("");
    let folder = Folder::new();
    folder.wrun(["fork", "--stdout", "out", COURIER]).stdin(print).run().code(0).stdout("1\n\"bye\"\n").stderr("");
    assert_eq!(folder.read("out"), "not JSON\n");
}

#[test]
fn the_end_of_the_input_lets_the_guest_finish() {
    // all that came before is answered, however much that is
    let many = lines((0..300).map(|n| format!("\"{n}{}\"", "x".repeat(10_000))));
    for (guest, last) in [(ECHO, ""), (COURIER, "\"bye\"\n")] {
        wrun(["fork", guest]).stdin(many.clone()).run().code(0).stdout(many.clone() + last).stderr("");
    }
}

#[test]
fn sigterm_disconnects_and_then_ends_the_guest() {
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    fork.write_line("1");
    assert_eq!(fork.stdout_line(), "1");
    fork.signal(Signal::TERM);
    fork.wait().code(0).stdout("1\n\"bye\"\n").stderr("");

    let mut fork = wrun(["fork", "--grace", "50ms", COURIER]).stdin_open().spawn();
    fork.write("1\n{\"do\":\"spin\"}\n");
    assert_eq!(fork.stdout_line(), "1");
    fork.signal(Signal::TERM);
    fork.wait().code(143).stderr_has("killed by signal 15 (SIGTERM)");

    // a second one means now
    let mut fork = wrun(["fork", "--log-format", "json", COURIER]).stdin_open().spawn();
    fork.write("1\n{\"do\":\"spin\"}\n");
    assert_eq!(fork.stdout_line(), "1");
    fork.signal(Signal::TERM);
    fork.stderr_line_with("disconnect");
    fork.signal(Signal::INT);
    fork.wait().code(137).stderr_has("\"signal\":9");
}

#[test]
fn events_are_lines_for_tools() {
    let mut fork = wrun(["fork", "--log-format", "json", COURIER]).stdin_open().spawn();
    let event = |line: String| serde_json::from_str::<Value>(&line).unwrap();
    let started = event(fork.stderr_line());
    assert_eq!((&started["event"], &started["generation"]), (&json!("fork"), &json!(1)));
    let online = event(fork.stderr_line());
    assert_eq!((&online["event"], &online["pid"]), (&json!("online"), &started["pid"]));
    fork.write_line("{");
    assert_eq!(event(fork.stderr_line())["event"], "error");
    fork.close_stdin();
    assert_eq!(event(fork.stderr_line())["event"], "disconnect");
    let exit = event(fork.stderr_line());
    assert_eq!(
        (&exit["event"], &exit["outcome"]["kind"], &exit["outcome"]["voluntary"]),
        (&json!("exit"), &json!("exited"), &json!(true))
    );
    fork.wait().code(123);
}

#[test]
fn both_ends_may_send_all_they_have_at_once() {
    // twenty messages of a MiB each way, and nobody reads before all of them are written
    let many = lines((0..20).map(|_| format!("\"{}\"", "x".repeat((1 << 20) - 2))));
    for guest in [ECHO, COURIER] {
        let mut fork = wrun(["fork", guest]).stdin_open().spawn();
        fork.pause_stdout();
        fork.write_later(&many);
        fork.until_input_stalls();
        for _ in 0..20 {
            assert_eq!(fork.stdout_line().len(), 1 << 20);
        }
        fork.close_stdin();
        fork.wait().code(0);
    }
}

#[test]
fn a_flood_from_either_side_is_bounded() {
    // the guest floods: it is told that its mailbox is full, and what it has sent arrives
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    fork.pause_stdout();
    fork.write_line("{\"do\":\"flood\",\"bytes\":100000}");
    fork.until_input_stalls();
    let resident = |pid: i32| {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    assert!(resident(fork.pid().as_raw_nonzero().get()) < 100 << 20);
    let mut flooded = 0;
    let sent = loop {
        let line = fork.stdout_line();
        if line.starts_with('{') {
            break serde_json::from_str::<Value>(&line).unwrap()["sent"].as_u64().unwrap();
        }
        assert_eq!(line.len(), 100_000);
        flooded += 1;
    };
    assert_eq!(flooded, sent);
    assert!((50..1000).contains(&sent), "{sent} messages of 100,000 bytes fit somewhere");

    // however small its messages are
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    fork.pause_stdout();
    fork.write_line("{\"do\":\"flood\",\"bytes\":2}");
    fork.until_input_stalls();
    assert!(resident(fork.pid().as_raw_nonzero().get()) < 100 << 20);
    drop(fork);

    // nobody reads what a handler replies: it is not asked for more
    let mut fork = wrun(["fork", ECHO]).stdin_open().spawn();
    fork.pause_stdout();
    fork.write_later(lines((0..100).map(|_| format!("\"{}\"", "x".repeat((1 << 20) - 2)))));
    fork.until_input_stalls();
    assert!(fork.unwritten() > 50 << 20, "{} bytes are left", fork.unwritten());
    for _ in 0..100 {
        assert_eq!(fork.stdout_line().len(), 1 << 20);
    }
    fork.close_stdin();
    fork.wait().code(0);

    // we flood a guest that takes nothing: the input waits
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    fork.write_line("{\"do\":\"spin\"}");
    fork.write_later(lines((0..1000).map(|_| format!("\"{}\"", "x".repeat(100_000)))));
    fork.until_input_stalls();
    assert!(fork.unwritten() > 50 << 20, "{} bytes are left", fork.unwritten());
    assert!(resident(fork.pid().as_raw_nonzero().get()) < 100 << 20);
    fork.signal(Signal::INT);
    fork.wait().code(130);
}

#[test]
fn a_reader_that_goes_away_ends_the_guest() {
    let mut fork = wrun(["fork", COURIER]).stdin_open().spawn();
    fork.write_line("1");
    assert_eq!(fork.stdout_line(), "1");
    fork.close_stdout();
    fork.write_line("2");
    fork.wait().code(141).stderr("");
}

#[test]
fn messages_during_a_shutdown_are_answered_or_not_but_never_hang() {
    for _ in 0..20 {
        let mut fork = wrun(["fork", ECHO]).stdin_open().spawn();
        fork.write(lines(0..1000));
        assert_eq!(fork.stdout_line(), "0");
        fork.signal(Signal::TERM);
        fork.write(lines(0..1000));
        let ran = fork.wait().code(0);
        let replies = ran.stdout_text();
        let in_order = replies.lines().enumerate().all(|(n, line)| line == (n % 1000).to_string());
        ran.check(in_order, "expected replies without a gap");
    }
}
