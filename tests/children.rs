//! Children as a program uses them: guests that are spawned, run for their output, and forked.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use guest_artifacts::{ARGS, CAT, COURIER, DATA_PROCESSOR, ECHO, HELLO, HELLO_HTTP, HOSTILE, HOSTILE_COMMAND_P1, NET};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wrun::{
    Cache, Command, Error, Isolation, Signal,
    command::Stdio,
    event::Event,
    limits::Bytes,
    message::{Message, SendError},
    outcome::{Answer, End, LimitKind, Stage},
};

/// Children are made of the command: this test's own program does not call `wrun::init`.
const WRUN: &str = env!("CARGO_BIN_EXE_wrun");

fn command(guest: &str) -> Command {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let own = fs::Permissions::from_mode(0o700);
    let dir = DIR.get_or_init(|| tempfile::Builder::new().permissions(own).tempdir().unwrap());
    let mut command = Command::new(guest);
    command.program(WRUN).cache(Cache::at(Some(dir.path())));
    command
}

/// The guest that does as it is told.
fn told(act: &[&str]) -> Command {
    let mut command = command(HOSTILE_COMMAND_P1);
    command.args(act.iter().copied());
    command
}

fn message(text: &str) -> Message {
    Message::parse(text).unwrap()
}

fn long_message(length: usize) -> Message {
    Message::of(&"x".repeat(length - 2)).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Waits for the end of a process that is ours, without reaping it.
#[track_caller]
fn until_ended(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    // one that is gone already has no descriptor
    let Ok(ends) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
    let ended = rustix::event::poll(&mut [PollFd::new(&ends, PollFlags::IN)], Some(&minute)).unwrap();
    assert_eq!(ended, 1, "it is still there after a minute");
}

#[test]
fn a_child_has_streams() {
    block_on(async {
        let mut child = command(CAT).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().await.unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        assert!(child.stderr.is_none() && child.is_alive());
        let mut back = [0; 6];
        for text in [b"first\n", b"other\n"] {
            stdin.write_all(text).await.unwrap();
            stdout.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, text);
        }
        drop(stdin);
        let mut rest = vec![];
        stdout.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"");
        let outcome = child.wait().await.unwrap();
        assert_eq!((&outcome.end, outcome.voluntary), (&End::Exited { code: 0 }, false));
        assert_eq!(child.wait().await.unwrap(), outcome, "it says the same again");
        assert!(!child.is_alive() && !child.kill(Signal::KILL));
    });
}

#[test]
fn waiting_ends_the_input() {
    block_on(async {
        let mut child = command(CAT).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().await.unwrap();
        assert_eq!(child.wait().await.unwrap().end, End::Exited { code: 0 });
    });
}

#[test]
fn a_pipe_that_nobody_took_is_the_end_of_the_input() {
    block_on(async {
        let output = command(CAT).stdin(Stdio::piped()).output().await.unwrap();
        assert_eq!((output.stdout, output.outcome.end), (vec![], End::Exited { code: 0 }));
    });
}

#[test]
fn what_has_ended_is_not_killed() {
    block_on(async {
        let mut child = told(&["exit", "3"]).timeout(Duration::from_mins(1)).spawn().await.unwrap();
        until_ended(child.id());
        // it was not waited for yet
        assert!(!child.kill(Signal::TERM) && !child.is_alive());
        let outcome = child.wait().await.unwrap();
        assert_eq!((outcome.end, outcome.voluntary), (End::Exited { code: 3 }, false));
        // nor is it out of time
        let mut child = told(&["sleep"]).timeout(Duration::from_millis(200)).spawn().await.unwrap();
        child.kill(Signal::TERM);
        until_ended(child.id());
        // one whose time is over later
        let mut other = told(&["sleep"]).timeout(Duration::from_millis(300)).spawn().await.unwrap();
        assert!(matches!(other.wait().await.unwrap().end, End::Limit { .. }));
        assert_eq!(child.wait().await.unwrap().end, End::Killed { signal: 15 });
    });
}

#[test]
fn output_is_collected_with_how_it_ended() {
    block_on(async {
        let output = told(&["turns", "3"]).output().await.unwrap();
        assert_eq!(output.stdout, b"out 0\nout 1\nout 2\n");
        assert_eq!(output.stderr, b"err 0\nerr 1\nerr 2\n");
        let output = told(&["say", "last", "exit", "255"]).output().await.unwrap();
        assert_eq!((output.stdout, output.outcome.end), (b"last".into(), End::Exited { code: 255 }));
        let output = command(ARGS).args(["a", "b"]).output().await.unwrap();
        assert!(output.stdout.starts_with(b"{\"args\":[\"") && output.stdout.ends_with(b"\"a\",\"b\"],\"env\":{}}\n"));

        let mut flood = told(&["flood"]);
        let output = flood.output_max(Bytes(7)).output().await.unwrap();
        assert_eq!(output.stdout, b"y\ny\ny\ny");
        assert_eq!(output.outcome.end, End::Limit { limit: LimitKind::Output, allowed: "7B".into() });
        let child = flood.stdout(Stdio::piped()).spawn().await.unwrap();
        assert_eq!(child.wait_with_output().await.unwrap().stdout.len(), 1 << 20);
    });
}

#[test]
fn a_command_can_be_started_again() {
    block_on(async {
        let file = tempfile::tempfile().unwrap();
        let mut command = told(&["say", "x", "exit", "2"]);
        command.stdout(file.try_clone().unwrap());
        for _ in 0..3 {
            assert_eq!(command.status().await.unwrap().end, End::Exited { code: 2 });
        }
        assert_eq!(file.metadata().unwrap().len(), 3);
    });
}

#[test]
fn what_cannot_start_is_an_error() {
    block_on(async {
        let error = |result: Result<wrun::Child, Error>| result.unwrap_err().to_string();
        assert_eq!(error(command("none.wasm").spawn().await), "no such guest: `none.wasm`");
        let thread = command(HELLO).isolation(Isolation::Thread).spawn().await;
        assert!(error(thread).contains("a child has a process of its own"));
        assert!(error(Command::new(HELLO).spawn().await).contains("wrun::init()"));
        assert!(error(command(HELLO).current_dir("/").spawn().await).contains("it lies in no folder"));
        // what its process finds out shows when it is waited for
        let mut child = command(HELLO_HTTP).stdout(Stdio::null()).spawn().await.unwrap();
        for _ in 0..2 {
            assert!(child.wait().await.unwrap_err().to_string().contains("expected a command guest"));
        }
        let fork = command(HELLO_HTTP).fork().await.unwrap();
        assert!(fork.wait().await.unwrap_err().to_string().contains("expected a command guest"));
        assert_eq!((fork.recv().await, fork.send(&Message::null())), (None, Err(SendError::Closed)));
    });
}

#[test]
fn signals_are_reported_exactly() {
    block_on(async {
        for signal in [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
            let mut child = told(&["sleep"]).spawn().await.unwrap();
            assert!(child.kill(signal));
            let outcome = child.wait().await.unwrap();
            assert_eq!((outcome.end, outcome.voluntary), (End::Killed { signal: signal.number() }, true));
        }
        // stopped, and then ended all the same
        let mut child = told(&["sleep"]).grace(Duration::from_millis(20)).spawn().await.unwrap();
        child.kill(Signal::STOP);
        let stat = format!("/proc/{}/stat", child.id());
        while !fs::read_to_string(&stat).unwrap().rsplit(") ").next().unwrap().starts_with('T') {
            tokio::task::yield_now().await;
        }
        assert_eq!(child.shutdown().await.unwrap().end, End::Killed { signal: 9 });
        // by somebody else
        let mut child = told(&["sleep"]).spawn().await.unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
        let outcome = child.wait().await.unwrap();
        assert_eq!((outcome.end, outcome.voluntary), (End::Killed { signal: 10 }, false));
    });
}

#[test]
fn waiting_may_be_given_up_and_begun_again() {
    block_on(async {
        let mut child = told(&["sleep", "50"]).spawn().await.unwrap();
        let outcome = loop {
            if let Ok(outcome) = tokio::time::timeout(Duration::from_millis(1), child.wait()).await {
                break outcome.unwrap();
            }
        };
        assert_eq!(outcome.end, End::Exited { code: 0 });

        let fork = command(ECHO).fork().await.unwrap();
        fork.send(&message("1")).unwrap();
        let received = loop {
            if let Ok(received) = tokio::time::timeout(Duration::from_micros(10), fork.recv()).await {
                break received;
            }
        };
        assert_eq!(received, Some(message("1")));
    });
}

#[test]
fn the_last_bytes_are_never_lost() {
    block_on(async {
        for n in 0..170 {
            let last = format!("these are the last words, and their number is {n}");
            let output = told(&["say", &last, "exit", "23"]).output().await.unwrap();
            assert_eq!((output.stdout, output.outcome.end), (last.clone().into(), End::Exited { code: 23 }));

            let output = told(&["say", &last, "trap"]).output().await.unwrap();
            assert_eq!(output.stdout, last.as_bytes());
            assert!(matches!(output.outcome.end, End::Trapped { .. }));

            // nobody reads them before it is killed
            let mut child = told(&["say", &last, "turns", "1", "say", "", "spin"]);
            let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().await.unwrap();
            let mut told = [0; 6];
            child.stderr.as_mut().unwrap().read_exact(&mut told).await.unwrap();
            assert_eq!(&told, b"err 0\n");
            child.kill(Signal::KILL);
            assert!(matches!(child.wait().await.unwrap().end, End::Killed { signal: 9 } | End::Exited { .. }));
            let mut text = String::new();
            child.stdout.as_mut().unwrap().read_to_string(&mut text).await.unwrap();
            assert_eq!(text, format!("{last}out 0\n"));
        }
    });
}

#[test]
fn a_dropped_child_is_gone() {
    block_on(async {
        let child = told(&["sleep"]).spawn().await.unwrap();
        let pid = child.id();
        drop(child);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it was reaped");
        let fork = command(COURIER).fork().await.unwrap();
        let pid = fork.id();
        drop(fork);
        until_ended(pid);
    });
    // with its runtime, too
    let fork = block_on(async { command(COURIER).fork().await.unwrap() });
    until_ended(fork.id());
    assert_eq!(block_on(fork.recv()), None);
    assert_eq!(fork.send(&Message::null()), Err(SendError::Closed));
}

#[test]
fn a_time_limit_holds_when_nobody_waits() {
    block_on(async {
        let mut child = told(&["sleep"]).timeout(Duration::from_millis(50)).spawn().await.unwrap();
        until_ended(child.id());
        let expected = End::Limit { limit: LimitKind::Time, allowed: "50ms".into() };
        let outcome = child.wait().await.unwrap();
        assert_eq!((&outcome.end, outcome.voluntary), (&expected, false));
        let fork = command(COURIER).timeout(Duration::from_millis(50)).fork().await.unwrap();
        assert_eq!(fork.wait().await.unwrap().end, expected);
    });
}

#[test]
fn a_child_outlives_the_thread_that_started_it() {
    let spawn = || command(CAT).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn_blocking().unwrap();
    let mut child = std::thread::spawn(spawn).join().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"still here").unwrap();
    drop(stdin);
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), child.wait().unwrap().end), ("still here", End::Exited { code: 0 }));
}

#[test]
fn names_are_looked_up_for_a_child_that_nobody_looks_at() {
    let mut command = command(NET);
    command.args(["lookup", "localhost"]).tcp("localhost:1".parse().unwrap()).stdout(Stdio::piped());
    let mut child = command.spawn_blocking().unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("127.0.0.1"), "{text}");
    assert_eq!(child.wait().unwrap().end, End::Exited { code: 0 });
}

#[test]
fn blocking_children_are_like_the_others() {
    assert_eq!(command(HELLO).output_blocking().unwrap().stdout, b"Hello, world!\n");
    assert_eq!(told(&["exit", "7"]).status_blocking().unwrap().end, End::Exited { code: 7 });
    let mut child = told(&["sleep"]).spawn_blocking().unwrap();
    assert!(child.is_alive() && child.kill(Signal::TERM));
    assert_eq!(child.wait().unwrap().end, End::Killed { signal: 15 });
    let mut child = command(CAT).stdin(Stdio::piped()).stdout(Stdio::null()).spawn_blocking().unwrap();
    assert_eq!(child.shutdown().unwrap().end, End::Exited { code: 0 });

    let mut fork = command(COURIER).fork_blocking().unwrap();
    fork.send(&message("1")).unwrap();
    assert_eq!(fork.recv(), Some(message("1")));
    assert_eq!(fork.request(&message("2")).unwrap(), Answer::Reply(message("2")));
    fork.recv_timeout(Duration::from_millis(10)).unwrap_err();
    fork.ready();
    fork.disconnect();
    assert_eq!(fork.recv_timeout(Duration::from_mins(1)).unwrap(), Some(message("\"bye\"")));
    assert_eq!(fork.recv(), None);
    assert_eq!(fork.wait().unwrap().end, End::Exited { code: 0 });
    // what is sent goes at once, whether or not the fork is used after that
    let mut fork = command(COURIER).stdout(Stdio::piped()).fork_blocking().unwrap();
    fork.send(&message(r#"{"do":"print","text":"it came"}"#)).unwrap();
    let mut told = [0; 8];
    fork.stdout.take().unwrap().read_exact(&mut told).unwrap();
    assert_eq!(&told, b"it came\n");
    let mut fork = command(COURIER).grace(Duration::ZERO).fork_blocking().unwrap();
    fork.send(&message(r#"{"do":"spin"}"#)).unwrap();
    assert_eq!(fork.shutdown().unwrap().end, End::Killed { signal: 15 });
}

#[test]
fn a_handler_answers_requests_and_messages_in_order() {
    block_on(async {
        let fork = command(ECHO).fork().await.unwrap();
        for n in 0..100 {
            fork.send(&message(&n.to_string())).unwrap();
        }
        // a reply to a request is nobody else's
        assert_eq!(fork.request(&message("\"mine\"")).await.unwrap(), Answer::Reply(message("\"mine\"")));
        for n in 0..100 {
            assert_eq!(fork.recv().await, Some(message(&n.to_string())));
        }
        let (a, b) = (message("\"a\""), message("\"b\""));
        let (one, other) = tokio::join!(fork.request(&a), fork.request(&b));
        assert_eq!((one.unwrap(), other.unwrap()), (Answer::Reply(a), Answer::Reply(b)));
        fork.disconnect();
        assert_eq!(fork.wait().await.unwrap().end, End::Exited { code: 0 });
    });
}

#[test]
fn an_answer_says_how_a_message_went() {
    block_on(async {
        let fork = command(HOSTILE).fork().await.unwrap();
        let mut events = fork.events();
        let ask = async |act: &str| fork.request(&Message::of(&json!({ "do": act })).unwrap()).await.unwrap();
        assert!(matches!(ask("error").await, Answer::Error(_)));
        assert!(matches!(ask("none").await, Answer::NoReply));
        assert!(matches!(ask("invalid").await, Answer::Invalid(_)));
        assert!(matches!(ask("ok").await, Answer::Reply(_)));
        // a failed message that nobody waits for is an event
        fork.send(&message(r#"{"do":"error"}"#)).unwrap();
        let Answer::Ended(outcome) = ask("trap").await else { panic!("a trap ends it") };
        assert!(matches!(outcome.end, End::Trapped { .. }));
        assert_eq!(fork.wait().await.unwrap(), outcome);
        assert_eq!(fork.request(&Message::null()).await, Err(SendError::Closed));
        let mut told = vec![];
        loop {
            match events.recv().await.unwrap() {
                Event::Online { pid, .. } => assert_eq!(pid, fork.id()),
                Event::Error { message, .. } => told.push(message),
                Event::Exit { tasks, outcome: ended, .. } => {
                    assert_eq!((tasks, ended), (5, outcome));
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("the guest failed message 5: "), "{told:?}");
    });
}

#[test]
fn sending_to_a_mailbox_that_takes_no_more_is_an_error() {
    block_on(async {
        let mut spinning = command(COURIER);
        let fork = Arc::new(spinning.fork().await.unwrap());
        fork.send(&message(r#"{"do":"spin"}"#)).unwrap();
        let long = long_message(100_000);
        let mut sent = 0u64;
        let mut full = 0;
        // what is in the buffer moves on to the socket until that is full, too
        while full < 100 {
            match fork.send(&long) {
                Ok(()) => (sent, full) = (sent + 1, 0),
                Err(SendError::Full) => {
                    full += 1;
                    tokio::task::yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!((40..300).contains(&sent), "{sent} messages of 100,000 bytes fit somewhere");
        let waiting = tokio::spawn({
            let fork = fork.clone();
            async move { fork.ready().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert!(matches!(fork.send(&long_message((1 << 20) + 1)), Err(SendError::TooLong(_))));
        assert!(fork.kill(Signal::KILL));
        assert_eq!(fork.wait().await.unwrap().end, End::Killed { signal: 9 });
        assert_eq!(fork.send(&Message::null()), Err(SendError::Closed));
        waiting.await.unwrap();

        let fork = command(ECHO).fork().await.unwrap();
        fork.disconnect();
        assert_eq!(fork.send(&Message::null()), Err(SendError::Closed));
        assert_eq!(fork.wait().await.unwrap().end, End::Exited { code: 0 });
    });
}

#[test]
fn a_parent_that_does_not_receive_makes_the_guest_wait() {
    block_on(async {
        let fork = command(COURIER).fork().await.unwrap();
        fork.send(&message(r#"{"do":"flood","bytes":100000}"#)).unwrap();
        // it says how many it sent when its mailbox was full, after those
        let mut received = 0;
        let sent = loop {
            let message = fork.recv().await.unwrap();
            match message.to::<serde_json::Value>().unwrap()["sent"].as_u64() {
                Some(sent) => break sent,
                None => received += 1,
            }
        };
        assert_eq!(received, sent);
        // one that has sent more than anybody takes can be killed and waited for all the same
        fork.send(&message(r#"{"do":"flood","bytes":100000}"#)).unwrap();
        fork.recv().await.unwrap();
        fork.kill(Signal::TERM);
        assert_eq!(fork.wait().await.unwrap().end, End::Killed { signal: 15 });
        while fork.recv().await.is_some() {}
    });
}

#[test]
fn both_ends_may_send_twenty_mib_at_once() {
    for guest in [ECHO, COURIER] {
        block_on(async {
            let fork = command(guest).fork().await.unwrap();
            let long = long_message(1 << 20);
            let send = async {
                for _ in 0..20 {
                    fork.ready().await;
                    fork.send(&long).unwrap();
                }
            };
            let receive = async {
                for _ in 0..20 {
                    assert_eq!(fork.recv().await.unwrap().as_str().len(), 1 << 20);
                }
            };
            tokio::join!(send, receive);
        });
    }
}

#[test]
fn a_fork_is_shared_by_the_tasks_of_several_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let fork = Arc::new(command(DATA_PROCESSOR).fork().await.unwrap());
        let ask = |n: u64| {
            let fork = fork.clone();
            async move {
                let request = Message::of(&json!({ "data": [n] })).unwrap();
                let Answer::Reply(reply) = fork.request(&request).await.unwrap() else { panic!("no reply") };
                assert_eq!(reply.to::<serde_json::Value>().unwrap()["result"], json!([2 * n]));
            }
        };
        let tasks: Vec<_> = (0..500).map(|n| tokio::spawn(ask(n))).collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(fork.shutdown().await.unwrap().end, End::Exited { code: 0 });
    });
}

#[test]
fn shutdown_lets_finish_and_then_ends() {
    block_on(async {
        let fork = command(COURIER).fork().await.unwrap();
        fork.send(&message("1")).unwrap();
        let outcome = fork.shutdown().await.unwrap();
        assert_eq!((outcome.end, outcome.voluntary), (End::Exited { code: 0 }, true));
        assert_eq!(
            [fork.recv().await, fork.recv().await, fork.recv().await],
            [Some(message("1")), Some(message("\"bye\"")), None]
        );
        // also when more of its messages lie here than may
        let fork = command(COURIER).fork().await.unwrap();
        for _ in 0..10 {
            fork.send(&message(r#"{"do":"long","bytes":1000000}"#)).unwrap();
        }
        assert_eq!(fork.shutdown().await.unwrap().end, End::Exited { code: 0 });
        for _ in 0..10 {
            assert_eq!(fork.recv().await.unwrap().as_str().len(), 1_000_000);
        }
        assert_eq!((fork.recv().await, fork.recv().await), (Some(message("\"bye\"")), None));
        let fork = command(COURIER).grace(Duration::from_millis(20)).fork().await.unwrap();
        fork.send(&message(r#"{"do":"spin"}"#)).unwrap();
        assert_eq!(fork.shutdown().await.unwrap().end, End::Killed { signal: 15 });
    });
}

#[test]
fn a_process_that_says_nothing_is_no_guest_that_ended() {
    block_on(async {
        let mut command = command(HELLO);
        assert_eq!(command.output().await.unwrap().stdout, b"Hello, world!\n");
        // the guest is compiled by now, and this is no wrun
        let outcome = command.program("/bin/true").status().await.unwrap();
        assert!(matches!(&outcome.end, End::Failed { stage: Stage::Start, .. }), "{outcome:?}");
        assert_eq!(outcome.end.exit_code(), 125);
    });
}
