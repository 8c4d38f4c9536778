//! Threads in a process of the user's own, as a program uses them.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use guest_artifacts::{
    ECHO, ECHO_THREADS, HOSTILE_THREADS, HOSTILE_WORKERS_THREADS, PRIMES, SUM_THREADS, WHOAMI_THREADS,
};
use serde_json::{Value, json};
use wrun::{
    Cache, Error, Threads,
    event::Stream,
    grant::{DirGrant, Grants},
    limits::{Bytes, Limits},
    message::{Message, SendError},
    outcome::{Answer, End, LimitKind, Outcome},
    threads::{Builder, Said, SharedMemory, To},
};

/// Compilers are made of the command: this test's own program does not call `wrun::init`.
const WRUN: &str = env!("CARGO_BIN_EXE_wrun");

fn cache() -> Cache {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let own = fs::Permissions::from_mode(0o700);
    Cache::at(Some(DIR.get_or_init(|| tempfile::Builder::new().permissions(own).tempdir().unwrap()).path()))
}

fn group(guest: &str) -> Builder {
    Threads::builder(guest).program(WRUN).cache(cache()).workers(2)
}

/// A command that does this, and whose output is collected.
fn command(act: &[&str]) -> (Builder, Arc<Mutex<String>>) {
    let text = Arc::new(Mutex::new(String::new()));
    let to = text.clone();
    let builder = group(HOSTILE_THREADS)
        .args(act.iter().copied())
        .on_output(move |_, bytes| to.lock().unwrap().push_str(std::str::from_utf8(bytes).unwrap()));
    (builder, text)
}

fn limits(change: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits::of_a_run();
    change(&mut limits);
    limits
}

fn message(value: &Value) -> Message {
    Message::of(value).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Waits until something holds that nobody tells of.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// What an answer is, with its worker.
fn replied(said: Option<Said>) -> (u32, Value) {
    match said {
        Some(Said::Answer { worker, answer: Answer::Reply(reply) }) => (worker, reply.to().unwrap()),
        other => panic!("expected a reply, found {other:?}"),
    }
}

/// The thread that an outcome names.
fn thread_of(outcome: &Outcome) -> Option<(u32, &str)> {
    outcome.thread.as_ref().map(|thread| (thread.id, thread.name.as_str()))
}

#[test]
fn workers_get_messages_one_by_one_all_at_once_and_whoever_is_free() {
    block_on(async {
        let threads = group(ECHO_THREADS).workers(3).start().await.unwrap();
        assert_eq!(threads.workers(), 3);
        threads.send(To::Worker(2), &message(&json!("to two"))).unwrap();
        assert_eq!(replied(threads.recv().await), (2, json!("to two")));
        threads.send_all(&message(&json!("to all"))).unwrap();
        let mut all: Vec<_> = [(); 3].map(|()| 0).to_vec();
        for worker in &mut all {
            *worker = replied(threads.recv().await).0;
        }
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3]);
        for to in [To::Any, To::Worker(1), To::Worker(3)] {
            let answer = threads.request(to, &message(&json!({"a": 1.50}))).await.unwrap();
            assert_eq!(answer, Answer::Reply(message(&json!({"a": 1.50}))));
        }
        assert_eq!(threads.send(To::Worker(4), &Message::null()), Err(SendError::Closed));
        assert_eq!(threads.send(To::Worker(0), &Message::null()), Err(SendError::Closed));
        assert_eq!(threads.try_recv(), None);
        let outcome = threads.shutdown().await;
        assert_eq!((&outcome.end, outcome.voluntary), (&End::Exited { code: 0 }, false));
        assert_eq!(threads.send(To::Any, &Message::null()), Err(SendError::Closed));
        assert_eq!(threads.recv().await, None);
    });
}

#[test]
fn four_workers_answer_many_requests_at_once_each_with_its_own() {
    block_on(async {
        let threads = Arc::new(group(ECHO_THREADS).workers(4).start().await.unwrap());
        let mut at_work = tokio::task::JoinSet::new();
        let own = tokio::task::LocalSet::new();
        own.run_until(async {
            for asker in 0..64u64 {
                let threads = threads.clone();
                at_work.spawn_local(async move {
                    for turn in 0..300 {
                        let asked = message(&json!([asker, turn]));
                        assert_eq!(threads.request(To::Any, &asked).await.unwrap(), Answer::Reply(asked));
                    }
                });
            }
            while let Some(done) = at_work.join_next().await {
                done.unwrap();
            }
        })
        .await;
    });
}

#[test]
fn data_and_identity_are_each_workers_and_statics_are_all_of_theirs() {
    block_on(async {
        let data = message(&json!({"seed": 7}));
        let threads = group(WHOAMI_THREADS).data(data).start().await.unwrap();
        let mut handled = vec![];
        for worker in [1, 2] {
            let Answer::Reply(reply) = threads.request(To::Worker(worker), &Message::null()).await.unwrap() else {
                panic!("expected a reply")
            };
            let reply: Value = reply.to().unwrap();
            assert_eq!((&reply["id"], &reply["count"], &reply["kind"]), (&json!(worker), &json!(2), &json!("thread")));
            assert_eq!((&reply["data"], &reply["pid"]), (&json!({"seed": 7}), &json!(std::process::id())));
            handled.push(reply["handled"].clone());
        }
        assert_eq!(handled, [1, 2], "one counter for both");
    });
}

#[test]
fn a_worker_can_send_and_fail_and_is_not_heard_twice() {
    block_on(async {
        let threads = group(HOSTILE_WORKERS_THREADS).start().await.unwrap();
        let send = message(&json!({"do": "send", "message": {"a": [1]}}));
        assert_eq!(threads.request(To::Worker(2), &send).await.unwrap(), Answer::Reply(message(&json!("sent"))));
        assert_eq!(threads.recv().await, Some(Said::Message { worker: 2, message: message(&json!({"a": [1]})) }));
        let failed = threads.request(To::Worker(1), &message(&json!({"do": "fail"}))).await.unwrap();
        assert_eq!(failed, Answer::Error(message(&json!({"failed": 1}))));
        threads.send(To::Worker(1), &message(&json!({"do": "fail"}))).unwrap();
        let answer = Answer::Error(message(&json!({"failed": 1})));
        assert_eq!(threads.recv().await, Some(Said::Answer { worker: 1, answer }));
    });
}

#[test]
fn whoever_is_not_listened_to_waits_and_nothing_is_lost() {
    block_on(async {
        let threads = group(ECHO_THREADS).workers(1).start().await.unwrap();
        let long = message(&json!("x".repeat(500_000)));
        let mut sent = 0;
        // its answers are not taken, so its messages are not either, at some point
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut full = 0;
        while full < 100_000 {
            assert!(Instant::now() < deadline);
            match threads.send(To::Any, &long) {
                Ok(()) => (sent, full) = (sent + 1, 0),
                Err(SendError::Full) => full += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!((16..40).contains(&sent), "{sent} messages of 500 KB were taken");
        let take = async |count: usize| {
            for _ in 0..count {
                assert_eq!(replied(threads.recv().await).1.as_str().unwrap().len(), 500_000);
            }
        };
        tokio::select! {
            biased;
            () = threads.ready() => panic!("there is no room"),
            () = std::future::ready(()) => {}
        }
        // as soon as somebody listens, there is
        tokio::join!(threads.ready(), take(sent / 2));
        threads.send(To::Any, &message(&json!("x".repeat(500_000)))).unwrap();
        threads.disconnect();
        take(sent - sent / 2 + 1).await;
        assert_eq!(threads.wait().await.end, End::Exited { code: 0 });
    });
}

#[test]
fn the_message_limit_holds_both_ways() {
    block_on(async {
        let limits = limits(|limits| limits.message_max = Bytes(1000));
        let threads = group(HOSTILE_WORKERS_THREADS).limits(limits).start().await.unwrap();
        let text = |length: usize| message(&json!("x".repeat(length - 2)));
        assert_eq!(threads.request(To::Any, &text(1000)).await.unwrap(), Answer::Reply(text(1000)));
        assert!(matches!(threads.request(To::Any, &text(1001)).await, Err(SendError::TooLong(_))));
        let long = message(&json!({"do": "long", "bytes": 1001}));
        let Answer::Ended(outcome) = threads.request(To::Worker(2), &long).await.unwrap() else {
            panic!("it answered")
        };
        assert_eq!(outcome.end, End::Limit { limit: LimitKind::Message, allowed: "1000B".into() });
        assert_eq!(thread_of(&outcome), Some((2, "worker-2")));
    });
}

#[test]
fn terminate_ends_threads_that_loop_sleep_wait_and_make_threads() {
    block_on(async {
        for act in ["wait", "spin", "sleep", "storm"] {
            let (builder, text) = command(&[act]);
            let threads = builder.start().await.unwrap();
            eventually("it runs", || !text.lock().unwrap().is_empty());
            threads.terminate();
            let outcome = threads.wait().await;
            assert_eq!((&outcome.end, outcome.voluntary), (&End::Cancelled, true), "{act}");
            assert_eq!(threads.wait().await, outcome, "the same when it is asked again");
        }
        for act in ["wait", "spin", "sleep"] {
            let threads = group(HOSTILE_WORKERS_THREADS).workers(4).start().await.unwrap();
            threads.send_all(&message(&json!({"do": act}))).unwrap();
            // who waits for an answer is told
            let asked = message(&json!(1));
            let asked = threads.request(To::Worker(1), &asked);
            let (answer, ()) = tokio::join!(asked, async { threads.terminate() });
            assert!(matches!(answer, Ok(Answer::Ended(Outcome { end: End::Cancelled, .. }))), "{act}: {answer:?}");
            assert_eq!(threads.wait().await.end, End::Cancelled);
        }
    });
}

#[test]
fn a_time_limit_ends_them_too() {
    block_on(async {
        for act in ["wait", "spin", "sleep", "storm"] {
            let timeout = Some(Duration::from_millis(300));
            let (builder, _) = command(&[act]);
            let threads = builder.limits(limits(|limits| limits.timeout = timeout)).start().await.unwrap();
            let outcome = threads.wait().await;
            assert_eq!(outcome.end, End::Limit { limit: LimitKind::Time, allowed: "300ms".into() }, "{act}");
            assert_eq!((outcome.voluntary, thread_of(&outcome)), (false, None));
        }
        let (builder, text) = command(&["tls"]);
        let long = limits(|limits| limits.timeout = Some(Duration::from_hours(1)));
        assert_eq!(builder.limits(long).start().await.unwrap().wait().await.end, End::Exited { code: 0 });
        assert_eq!(*text.lock().unwrap(), "[1000, 2000, 3000, 4000] 0\n");
    });
}

#[test]
fn one_thread_that_fails_ends_all_and_is_named() {
    block_on(async {
        let run = async |act: Value| {
            let threads = group(HOSTILE_WORKERS_THREADS).workers(4).start().await.unwrap();
            // those after the one that fails may be gone already
            let _ = threads.send_all(&message(&act));
            threads.wait().await
        };
        let trapped = run(json!({"worker": 3, "do": "trap"})).await;
        assert!(matches!(&trapped.end, End::Trapped { backtrace, .. } if !backtrace.is_empty()), "{trapped:?}");
        assert_eq!(thread_of(&trapped), Some((3, "worker-3")));
        let exited = run(json!({"worker": 2, "do": "exit", "code": 9})).await;
        assert_eq!((&exited.end, thread_of(&exited)), (&End::Exited { code: 9 }, Some((2, "worker-2"))));
        let grown = run(json!({"worker": 1, "do": "grow"})).await;
        assert_eq!(grown.end, End::Limit { limit: LimitKind::Memory, allowed: "256MiB".into() });
        assert!(grown.usage.memory_peak > Some(200 << 20), "{grown:?}");
        let (builder, _) = command(&["recurse"]);
        let recursed = builder.start().await.unwrap().wait().await;
        assert!(matches!(&recursed.end, End::Trapped { trap, .. } if trap == "call stack exhausted"), "{recursed:?}");
        let (builder, _) = command(&["exit"]);
        assert_eq!(builder.start().await.unwrap().wait().await.end, End::Exited { code: 7 });
        let (builder, _) = command(&["main-ends"]);
        let ended = builder.start().await.unwrap().wait().await;
        assert_eq!((&ended.end, thread_of(&ended)), (&End::Exited { code: 0 }, None));
    });
}

#[test]
fn waits_and_wake_ups_are_as_the_instructions_are() {
    // what each comes to lies in memory when it has ended
    let text = r#"(module
        (import "env" "memory" (memory 1 2 shared))
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (export "memory" (memory 0))
        (func (export "wasi_thread_start") (param i32 i32)
            (drop (i32.atomic.rmw.add (i32.const 512) (i32.const 1)))
            (i32.atomic.store (i32.add (i32.const 600) (i32.mul (local.get 1) (i32.const 4)))
                (memory.atomic.wait32 offset=400 (i32.const 0) (i32.const 0) (i64.const -1)))
            (drop (i32.atomic.rmw.add (i32.const 516) (i32.const 1))))
        (func (export "_start") (local $woken i32)
            (i32.store (i32.const 0) (memory.atomic.wait32 (i32.const 300) (i32.const 1) (i64.const -1)))
            (i32.store (i32.const 4) (memory.atomic.wait32 (i32.const 300) (i32.const 0) (i64.const 1000)))
            (i32.store (i32.const 8) (memory.atomic.wait64 offset=8 (i32.const 304) (i64.const 1) (i64.const -1)))
            (i32.store (i32.const 12) (memory.atomic.wait64 (i32.const 304) (i64.const 0) (i64.const 0)))
            (i32.store (i32.const 16) (memory.atomic.notify (i32.const 400) (i32.const -1)))
            (drop (call $spawn (i32.const 0))) (drop (call $spawn (i32.const 1))) (drop (call $spawn (i32.const 2)))
            ;; one is woken, then the two others
            (loop $again
                (br_if $again (i32.eqz (memory.atomic.notify (i32.const 400) (i32.const 1)))))
            (loop $again
                (local.set $woken (i32.add (local.get $woken) (memory.atomic.notify (i32.const 400) (i32.const -1))))
                (br_if $again (i32.lt_u (local.get $woken) (i32.const 2))))
            (i32.store (i32.const 20) (local.get $woken))
            (loop $again (br_if $again (i32.lt_u (i32.atomic.load (i32.const 516)) (i32.const 3))))
            (i32.store (i32.const 24) (memory.grow (i32.const 1)))
            (i32.store (i32.const 28) (memory.size))
            (i32.store (i32.const 32) (memory.grow (i32.const 1)))))"#;
    let folder = tempfile::tempdir().unwrap();
    let guest = folder.path().join("waits.wat");
    fs::write(&guest, text).unwrap();
    block_on(async {
        let threads = group(guest.to_str().unwrap()).start().await.unwrap();
        let memory: SharedMemory = threads.memory();
        assert_eq!(threads.wait().await.end, End::Exited { code: 0 });
        let found: Vec<_> = (0..9).map(|word| memory.load(word * 4).unwrap().cast_signed()).collect();
        assert_eq!(found, [1, 2, 1, 2, 0, 2, 1, 2, -1]);
        assert_eq!((0..3).map(|thread| memory.load(600 + thread * 4).unwrap()).collect::<Vec<_>>(), [0, 0, 0]);
    });
    for (wait, trap) in [
        ("(memory.atomic.wait32 (i32.const 2) (i32.const 0) (i64.const 0))", "unaligned atomic"),
        ("(memory.atomic.wait32 (i32.const 65536) (i32.const 0) (i64.const 0))", "out of bounds memory access"),
        (
            "(memory.atomic.wait64 offset=4294967295 (i32.const 1) (i64.const 0) (i64.const 0))",
            "out of bounds memory access",
        ),
    ] {
        let text =
            format!(r#"(module (import "env" "memory" (memory 1 1 shared)) (func (export "_start") (drop {wait})))"#);
        fs::write(&guest, text).unwrap();
        let outcome = block_on(async { group(guest.to_str().unwrap()).start().await.unwrap().wait().await });
        assert!(matches!(&outcome.end, End::Trapped { trap: found, .. } if found == trap), "{wait}: {outcome:?}");
    }
}

#[test]
fn the_host_reads_and_writes_the_memory_and_wakes_who_waits_there() {
    let text = r#"(module
        (import "env" "memory" (memory 1 1 shared))
        (export "memory" (memory 0))
        (data (i32.const 100) "from the guest")
        (func (export "_start")
            (drop (memory.atomic.wait32 (i32.const 64) (i32.const 0) (i64.const -1)))
            (loop $again (br_if $again (i32.eqz (i32.atomic.load (i32.const 64)))))
            (i32.atomic.store (i32.const 68) (i32.load8_u (i32.const 200)))))"#;
    let folder = tempfile::tempdir().unwrap();
    let guest = folder.path().join("memory.wat");
    fs::write(&guest, text).unwrap();
    block_on(async {
        let threads = group(guest.to_str().unwrap()).start().await.unwrap();
        let memory = threads.memory();
        eventually("its data is there", || memory.read(100, 14).unwrap() == b"from the guest");
        assert_eq!(memory.size(), 65536);
        memory.write(200, b"*").unwrap();
        // it is woken once it waits, and goes on when it sees the number
        eventually("it waits", || memory.notify(64, 1).unwrap() == 1);
        memory.store(64, 1).unwrap();
        threads.wait().await;
        assert_eq!(memory.load(68).unwrap(), u32::from(b'*'));
        // just inside, and just outside
        assert_eq!(memory.read(65532, 4).unwrap(), [0; 4]);
        assert_eq!(memory.read(65533, 4).unwrap_err().size, 65536);
        assert!(memory.write(65535, b"ab").is_err() && memory.write(u32::MAX, b"a").is_err());
        assert!(memory.read(0, usize::MAX).is_err());
        assert!(memory.load(65532).is_ok() && memory.load(65536).is_err() && memory.load(2).is_err());
        assert!(memory.store(65533, 1).is_err() && memory.notify(65536, 1).is_err());
    });
}

#[test]
fn groups_do_not_see_or_end_each_other() {
    block_on(async {
        let one = group(SUM_THREADS).start().await.unwrap();
        let two = group(SUM_THREADS).start().await.unwrap();
        let other = group(HOSTILE_WORKERS_THREADS).start().await.unwrap();
        let numbers = |end: u64| message(&json!({"start": 0, "end": end}));
        one.send_all(&numbers(3_000_000)).unwrap();
        two.send_all(&numbers(2_000_001)).unwrap();
        other.send(To::Worker(1), &message(&json!({"do": "trap"}))).unwrap();
        assert!(matches!(other.wait().await.end, End::Trapped { .. }));
        assert_eq!(replied(one.recv().await).1["total"], 4_499_998_500_000u64);
        assert_eq!(replied(two.recv().await).1["total"], 2_000_001_000_000u64);
        one.terminate();
        assert_eq!(one.wait().await.end, End::Cancelled);
        two.send_all(&numbers(11)).unwrap();
        assert_eq!(replied(two.recv().await).1["total"], 55, "the other lives on, and counts from 0");
    });
}

/// What this process has: threads, mappings, descriptors.
fn holdings() -> [usize; 3] {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    [count("/proc/self/task"), maps.lines().count(), count("/proc/self/fd")]
}

#[test]
fn groups_that_come_and_go_leave_nothing() {
    // in a process of its own: other tests of this one come and go, too
    if std::env::var_os("ALONE").is_none() {
        let cycles = std::env::var("CYCLES").unwrap_or("100".into());
        let name = "groups_that_come_and_go_leave_nothing";
        let ran = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env("ALONE", cycles)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        return;
    }
    let cycles: usize = std::env::var("ALONE").unwrap().parse().unwrap();
    let resident = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    block_on(async {
        let cycle = async |n: usize| match n % 4 {
            0 => {
                let threads = group(SUM_THREADS).workers(4).start().await.unwrap();
                threads.send_all(&message(&json!({"start": 0, "end": 10}))).unwrap();
                assert_eq!(threads.shutdown().await.end, End::Exited { code: 0 });
            }
            1 => {
                let threads = group(HOSTILE_WORKERS_THREADS).workers(4).start().await.unwrap();
                threads.send_all(&message(&json!({"do": "wait"}))).unwrap();
                threads.terminate();
                assert_eq!(threads.wait().await.end, End::Cancelled);
            }
            2 => {
                let threads = group(HOSTILE_WORKERS_THREADS).workers(4).start().await.unwrap();
                // those after the second may be gone already
                let _ = threads.send_all(&message(&json!({"worker": 2, "do": "trap"})));
                assert!(matches!(threads.wait().await.end, End::Trapped { .. }));
            }
            // dropped as it runs
            _ => drop(group(HOSTILE_WORKERS_THREADS).workers(4).start().await.unwrap()),
        };
        // what is made once is made
        for n in 0..20 {
            cycle(n).await;
        }
        // the last thread of a group may still be leaving
        eventually("few threads", || holdings()[0] <= 3);
        let (before, memory) = (holdings(), resident());
        for n in 0..cycles {
            cycle(n).await;
        }
        eventually("nothing is left", || {
            let after = holdings();
            // the allocator's own mappings come and go; what a group leaves behind would be one for each
            after[0] <= before[0] && after[1] < before[1] + cycles / 2 && after[2] <= before[2]
        });
        let grown = resident().saturating_sub(memory);
        assert!(grown < 16 << 10, "{grown} KiB more after {cycles} groups");
    });
}

#[test]
fn files_and_arguments_are_a_commands() {
    let folder = tempfile::tempdir().unwrap();
    let dir = DirGrant { host: folder.path().into(), guest: "data".into(), read_only: false };
    block_on(async {
        let (builder, text) = command(&["files", "data"]);
        let grants = Grants { dirs: vec![dir], ..Grants::default() };
        let outcome = builder.grants(grants).start().await.unwrap().wait().await;
        assert_eq!(outcome.end, End::Exited { code: 0 });
        assert_eq!(*text.lock().unwrap(), "written by a thread\nopened by a thread\nafter before\n");
        // it is told how many threads to make, and has no input
        let said = Arc::new(Mutex::new(String::new()));
        let to = said.clone();
        let hear = move |stream, bytes: &[u8]| {
            assert_eq!(stream, Stream::Stdout);
            to.lock().unwrap().push_str(std::str::from_utf8(bytes).unwrap());
        };
        let primes = group(PRIMES).workers(3).args(["100"]).on_output(hear).start().await.unwrap();
        assert_eq!(primes.workers(), 0);
        assert_eq!(primes.send(To::Any, &Message::null()), Err(SendError::Closed));
        assert_eq!(primes.request(To::Any, &Message::null()).await, Err(SendError::Closed));
        primes.wait().await;
        assert_eq!(*said.lock().unwrap(), "25 primes below 100, found by 3 threads\n");
        let (builder, text) = command(&["read"]);
        builder.start().await.unwrap().wait().await;
        assert_eq!(*text.lock().unwrap(), "another thread prints\nread \"\"\n");
    });
}

#[test]
fn what_does_not_fit_is_an_error_and_starts_nothing() {
    block_on(async {
        let error = |started: Result<Threads, Error>| started.expect_err("it starts").to_string();
        assert!(error(group(ECHO).start().await).contains("it imports no shared memory"));
        assert!(error(group(ECHO_THREADS).workers(0).start().await).contains("expected 1 to 64 workers"));
        assert!(error(group(ECHO_THREADS).workers(65).start().await).contains("found 65"));
        let many = limits(|limits| limits.threads = 65);
        assert!(group(ECHO_THREADS).workers(65).limits(many).start().await.is_ok());
        let fuel = limits(|limits| limits.fuel = Some(1));
        assert!(error(group(ECHO_THREADS).limits(fuel).start().await).contains("fuel is not metered across threads"));
        let small = limits(|limits| limits.memory = Bytes::mib(1));
        assert!(error(group(ECHO_THREADS).limits(small).start().await).contains("more than the 1MiB"));
        assert!(error(Threads::builder(ECHO_THREADS).cache(cache()).start().await).contains("call `wrun::init()`"));
        assert!(error(group("none.wasm").start().await).contains("no such guest"));
    });
}
