//! Windows in a process of the user's own, and in its children, as a program uses them.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]

use std::{
    fs,
    os::unix::fs::FileExt,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use guest_artifacts::{BLUR, CHECKSUM, ECHO, HELLO, HOSTILE_WINDOWS, WORDCOUNT};
use serde_json::{Value, json};
use wrun::{
    Buffer, Cache, Command, Error, Mapped, ParMap, Threads,
    limits::{Bytes, Limits},
    message::{Message, SendError},
    outcome::{Answer, End, LimitKind, Stage},
    threads::Builder,
};

/// Compilers and children are made of the command: this test's own program does not call `wrun::init`.
const WRUN: &str = env!("CARGO_BIN_EXE_wrun");

fn cache() -> Cache {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let own = fs::Permissions::from_mode(0o700);
    Cache::at(Some(DIR.get_or_init(|| tempfile::Builder::new().permissions(own).tempdir().unwrap()).path()))
}

fn here(guest: &str) -> Builder {
    Threads::builder(guest).program(WRUN).cache(cache()).workers(3)
}

fn child(guest: &str) -> Command {
    let mut command = Command::new(guest);
    command.program(WRUN).cache(cache());
    command
}

fn hostile(act: &str) -> Builder {
    here(HOSTILE_WINDOWS).data(Message::of(&act).unwrap())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_mins(1), future).await.expect("it takes too long") })
}

fn texts(mapped: &Mapped) -> Vec<&str> {
    mapped.replies.iter().map(Message::as_str).collect()
}

fn buffer(bytes: &[u8]) -> Buffer {
    Buffer::from_slice(bytes).unwrap()
}

/// How many mappings, descriptors and threads this process has.
fn counted() -> [usize; 3] {
    let entries = |what: &str| fs::read_dir(Path::new("/proc/self").join(what)).unwrap().count();
    [fs::read_to_string("/proc/self/maps").unwrap().lines().count(), entries("fd"), entries("task")]
}

#[test]
fn threads_and_a_process_answer_alike() {
    let text = buffer("one two\nthree\n\nfour five six\n".repeat(1_000).as_bytes());
    let expected = json!({"lines": 4_000, "words": 6_000, "bytes": 29_000});
    for size in [1, 4_095, 4_096, 29_000] {
        let map = || ParMap::over(text.split(Bytes(size)).lines()).reduce();
        let limits = Limits { message_max: Bytes::mib(10), ..Limits::of_a_run() };
        let mapped = block_on(here(WORDCOUNT).limits(limits.clone()).par_map(map())).unwrap();
        let other = block_on(child(WORDCOUNT).limits(limits).par_map(map())).unwrap();
        assert_eq!(mapped.replies[0].to::<Value>().unwrap(), expected, "{size}");
        assert_eq!(mapped.replies, other.replies);
        assert_eq!((mapped.outcome.end, other.outcome.end), (End::Exited { code: 0 }, End::Exited { code: 0 }));
    }
    // plain chunks are mapped, too, and echo shows what each is told
    let told = [r#"{"chunk":0,"offset":0,"length":20000}"#, r#"{"chunk":1,"offset":20000,"length":9000}"#];
    assert_eq!(texts(&block_on(here(ECHO).par_map(text.split(Bytes(20_000)))).unwrap()), told);
    assert_eq!(texts(&block_on(child(ECHO).par_map(text.split(Bytes(20_000)))).unwrap()), told);
}

#[test]
fn an_output_becomes_the_next_input() {
    let (width, height) = (97, 41);
    let head = format!("P5 {width} {height} 255\n");
    let dot = |n: usize| if n == height / 2 * width + width / 2 { 243 } else { 0 };
    let picture: Vec<u8> = head.bytes().chain((0..width * height).map(dot)).collect();
    let mut here_it_is = buffer(&picture);
    let mut there_it_is = here_it_is.clone();
    for size in [1_000, 50] {
        let map = |from: &Buffer| {
            ParMap::over(from.split(Bytes(size)).overlap(Bytes(98))).output(Buffer::zeroed(from.length()).unwrap())
        };
        let blurred = block_on(here(BLUR).par_map(map(&here_it_is))).unwrap();
        assert_eq!(blurred.failed, None);
        here_it_is = blurred.output.unwrap().seal().unwrap();
        there_it_is = block_on(child(BLUR).par_map(map(&there_it_is))).unwrap().output.unwrap().seal().unwrap();
    }
    assert_eq!(here_it_is[..], there_it_is[..]);
    // 243 in the middle, a ninth of that in nine pixels, and those once more
    let at = |x: usize, y: usize| here_it_is[head.len() + (height / 2 + y - 2) * width + width / 2 + x - 2];
    let expected = [[3, 6, 9, 6, 3], [6, 12, 18, 12, 6], [9, 18, 27, 18, 9], [6, 12, 18, 12, 6], [3, 6, 9, 6, 3]];
    for (y, line) in expected.iter().enumerate() {
        for (x, pixel) in line.iter().enumerate() {
            assert_eq!(at(x, y), *pixel, "{x} {y}");
        }
    }
    assert_eq!(here_it_is[head.len()..].iter().map(|byte| u64::from(*byte)).sum::<u64>(), 243);
}

#[test]
fn who_wants_to_hears_of_each_chunk_in_order() {
    let bytes = buffer(&[1; 10_000]);
    let heard = Arc::new(Mutex::new(vec![]));
    let to = heard.clone();
    let map = ParMap::over(bytes.split(Bytes(100))).each(move |chunk, reply| {
        to.lock().unwrap().push((chunk.index, chunk.offset, reply.is_some()));
    });
    let mapped = block_on(here(CHECKSUM).par_map(map)).unwrap();
    assert_eq!((mapped.replies.len(), mapped.failed), (0, None));
    let expected: Vec<_> = (0..100).map(|n| (n, n * 100, true)).collect();
    assert_eq!(*heard.lock().unwrap(), expected);
}

#[test]
fn what_fails_is_named_and_has_no_output() {
    let bytes = buffer(&vec![1; 2 << 20]);
    for (act, end) in [("trap", None), ("exit", Some(End::Exited { code: 1 })), ("none", Some(End::Exited { code: 1 }))]
    {
        let map = || ParMap::over(bytes.split(Bytes(1 << 20))).output(Buffer::zeroed(bytes.length()).unwrap());
        let mut command = child(HOSTILE_WINDOWS);
        command.data(Message::of(&act).unwrap());
        for mapped in [block_on(hostile(act).par_map(map())), block_on(command.par_map(map()))] {
            let mapped = mapped.unwrap();
            let failed = mapped.failed.unwrap();
            assert_eq!(failed.chunk.map(|chunk| (chunk.index, chunk.length)), Some((0, 1 << 20)), "{act}");
            assert!(mapped.output.is_none() && mapped.replies.is_empty());
            match &end {
                Some(end) => assert_eq!(mapped.outcome.end, *end, "{act}"),
                None => assert!(matches!(mapped.outcome.end, End::Trapped { .. }), "{:?}", mapped.outcome),
            }
        }
    }
}

#[test]
fn a_time_limit_ends_all_and_so_does_dropping() {
    let bytes = buffer(&vec![1; 2 << 20]);
    let limits = Limits { timeout: Some(Duration::from_millis(100)), ..Limits::of_a_run() };
    let limit = End::Limit { limit: LimitKind::Time, allowed: "100ms".into() };
    let mapped =
        block_on(hostile("spin").limits(limits.clone()).on_output(|_, _| ()).par_map(bytes.split(Bytes(1 << 20))));
    assert_eq!(mapped.unwrap().outcome.end, limit);
    let mut command = child(HOSTILE_WINDOWS);
    command.data(Message::of(&"spin").unwrap()).limits(limits).stdout(wrun::command::Stdio::null());
    assert_eq!(block_on(command.par_map(bytes.split(Bytes(1 << 20)))).unwrap().outcome.end, limit);

    // dropped while it computes: its threads end by themselves
    let (told, mut spins) = tokio::sync::mpsc::unbounded_channel();
    let map = hostile("spin").on_output(move |_, _| _ = told.send(())).par_map(bytes.split(Bytes(1 << 20)));
    block_on(async {
        tokio::select! {
            mapped = map => panic!("{mapped:?}"),
            _ = spins.recv() => {}
        }
    });
    // what is told holds the sender, which goes with the last of its threads
    block_on(async { while spins.recv().await.is_some() {} });
}

#[test]
fn nothing_is_left_of_what_has_ended() {
    let bytes = buffer(&vec![0xa7; 2 << 20]);
    let once = || {
        for act in ["leave", "private", "fragments", "trap"] {
            let map = ParMap::over(bytes.split(Bytes(1 << 19))).output(Buffer::zeroed(bytes.length()).unwrap());
            let _ = block_on(hostile(act).par_map(map)).unwrap();
        }
    };
    once();
    let before = counted();
    for _ in 0..60 {
        once();
    }
    // other tests of this process come and go; what is left of 240 maps would stay
    let deadline = Instant::now() + Duration::from_mins(1);
    while let after = counted()
        && before.iter().zip(after).any(|(before, after)| after >= before + 150)
    {
        assert!(Instant::now() < deadline, "{before:?} have become {after:?}");
        std::thread::yield_now();
    }
}

#[test]
fn windows_leave_no_pieces_behind() {
    // 5,000 windows of a page each, at as many places
    let bytes = buffer(&vec![3; 100_000]);
    let fork = async {
        let fork = child(HOSTILE_WINDOWS).memory(Bytes::mib(400)).buffer("input", &bytes).fork().await.unwrap();
        let maps = || fs::read_to_string(format!("/proc/{}/maps", fork.id())).unwrap().lines().count();
        let ask = async |count: u32| {
            let act = Message::of(&json!({"act": "fragments", "count": count})).unwrap();
            assert_eq!(fork.request(&act).await.unwrap(), Answer::Reply(Message::of(&true).unwrap()));
        };
        ask(1).await;
        let before = maps();
        ask(5_000).await;
        let after = maps();
        assert!(after < before + 50, "{before} mappings have become {after}");
    };
    block_on(fork);
}

#[test]
fn buffers_come_with_messages_and_in_their_order() {
    let fork = async {
        let fork = child(CHECKSUM).fork().await.unwrap();
        let ask = Message::parse(r#"{"offset":0,"length":4}"#).unwrap();
        let sum = |bytes: u8| {
            let a = 1 + 4 * u64::from(bytes);
            let b = 4 + 10 * u64::from(bytes);
            Message::parse(&format!(r#"{{"adler32":{},"bytes":4}}"#, b << 16 | a)).unwrap()
        };
        // each is the next message's, however many lie in the socket
        for round in 1..=200u8 {
            fork.send_buffer("input", &buffer(&[round; 4])).unwrap();
            fork.send(&ask).unwrap();
        }
        for round in 1..=200u8 {
            assert_eq!(fork.recv().await, Some(sum(round)));
        }
        // one that comes in several parts, and is asked for across them
        let file = tempfile::tempfile().unwrap();
        file.set_len(70 << 20).unwrap();
        let at = (35u64 << 20).next_multiple_of(2 << 20) - 2;
        file.write_all_at(&[7; 4], at).unwrap();
        fork.send_buffer("input", &Buffer::read_by(2, &file, Bytes::mib(70)).unwrap()).unwrap();
        let across = Message::parse(&format!(r#"{{"offset":{at},"length":4}}"#)).unwrap();
        assert_eq!(fork.request(&across).await.unwrap(), Answer::Reply(sum(7)));
        for n in 0..63 {
            fork.send_buffer(&format!("other-{n}"), &buffer(&[n])).unwrap();
        }
        fork.send_buffer("input", &buffer(&[9; 4])).unwrap();
        let refused = fork.send_buffer("one-more", &buffer(&[])).unwrap_err();
        assert!(matches!(&refused, SendError::NotShared(reason) if reason.contains("64 buffers")), "{refused}");
        assert!(matches!(fork.send_buffer("a b", &buffer(&[])), Err(SendError::NotShared(_))));
        assert_eq!(fork.request(&ask).await.unwrap(), Answer::Reply(sum(9)));
        fork.disconnect();
        assert_eq!(fork.send_buffer("input", &buffer(&[])), Err(SendError::Closed));
        assert_eq!(fork.wait().await.unwrap().end, End::Exited { code: 0 });
    };
    block_on(fork);
}

#[test]
fn what_cannot_be_mapped_is_told_before_anything_runs() {
    let bytes = buffer(&[1; 100]);
    let refused = |mapped: Result<Mapped, Error>, expected: &str| {
        let error = mapped.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let output = || ParMap::over(bytes.split(Bytes(10))).output(Buffer::zeroed(Bytes(99)).unwrap());
    refused(block_on(here(ECHO).par_map(output())), "expected an output of 100B, as the input has, found 99B");
    refused(block_on(child(ECHO).par_map(output())), "expected an output of 100B, as the input has, found 99B");
    refused(block_on(here(HELLO).par_map(bytes.split(Bytes(10)))), "expected a handler guest, found a command guest");
    refused(block_on(child(HELLO).par_map(bytes.split(Bytes(10)))), "expected a handler guest, found a command guest");
    let error = block_on(here(ECHO).start()).unwrap_err();
    assert!(error.to_string().contains("it imports no shared memory"), "{error}");
}

#[test]
fn a_process_that_lies_is_refused_by_name() {
    let bytes = buffer(b"ab");
    let map = |reduce: bool| {
        let map = ParMap::over(bytes.split(Bytes(1))).output(Buffer::zeroed(bytes.length()).unwrap());
        if reduce { map.reduce() } else { map }
    };
    // compiled once, by an honest program
    assert_eq!(block_on(child(ECHO).par_map(map(false))).unwrap().failed, None);
    let frame = |kind: u8, id: u64, body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap();
        [&length.to_le_bytes()[..], &[kind], &id.to_le_bytes(), body].concat()
    };
    let (reply, error, ended) = (|id| frame(5, id, b"1"), |id| frame(7, id, b"1"), |id| frame(8, id, b"{}"));
    let well = frame(3, 0, br#"{"kind":"exited","code":0,"voluntary":false,"wall_ms":0}"#);
    let folder = tempfile::tempdir().unwrap();
    let (script, answer) = (folder.path().join("liar"), folder.path().join("bytes"));
    fs::write(&script, format!("#!/bin/sh\ncat {} >&0\n", answer.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    let told = |reduce: bool, frames: &[Vec<u8>]| {
        fs::write(&answer, frames.concat()).unwrap();
        block_on(child(ECHO).program(&script).par_map(map(reduce))).unwrap()
    };
    for (reduce, frames, expected) in [
        (false, vec![reply(2)], "it answered out of turn"),
        (false, vec![reply(1), reply(1)], "it answered out of turn"),
        (false, vec![reply(1), reply(2), reply(3)], "it answered out of turn"),
        (false, vec![reply(0)], "it answered a last call that was not made"),
        (true, vec![reply(1), reply(2), reply(0), reply(0)], "it answered a last call that was not made"),
        (false, vec![error(1), reply(2)], "it went on after a failure"),
        (false, vec![frame(5, 1, b"nope")], "it sent what is no message"),
        (false, vec![ended(1)], "it sent no outcome"),
        (false, vec![reply(1), well.clone()], "its process ended well before all was done"),
        (true, vec![reply(1), reply(2), well.clone()], "its process ended well before all was done"),
        (true, vec![reply(0), well.clone()], "its process ended well before all was done"),
    ] {
        let mapped = told(reduce, &frames);
        let End::Failed { stage: Stage::Protocol, reason, .. } = &mapped.outcome.end else { panic!("{mapped:?}") };
        assert!(reason.starts_with(expected), "{reason}");
        assert!(mapped.output.is_none());
    }
    // one that failed has no output, however well its process says it went
    let mapped = told(false, &[error(1), well]);
    assert!(mapped.failed.is_some() && mapped.output.is_none(), "{mapped:?}");
}
