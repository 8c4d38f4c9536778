//! Windows: chunks of one buffer in guests' own memories, in threads and in process workers.

use std::{collections::BTreeSet, fmt::Write as _};

use guest_artifacts::{BLUR, CHECKSUM, ECHO, HELLO, HOSTILE_WINDOWS, SUM_THREADS, WORDCOUNT};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::{
    jail::is_jailed,
    supervision::children,
    wrun::{Folder, wrun},
};

/// Bytes that differ from place to place.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 12_345u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn text(lines: usize) -> String {
    (0..lines).fold(String::new(), |mut text, n| {
        let _ = writeln!(text, "{} line {n}\t of  {}", "x".repeat(n % 40), "many ".repeat(n % 7));
        text
    })
}

fn adler32(bytes: &[u8]) -> u64 {
    let (a, b) = bytes.iter().fold((1u64, 0u64), |(a, b), byte| {
        let a = (a + u64::from(*byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    b << 16 | a
}

fn counts(text: &str) -> String {
    let (lines, words) = (text.matches('\n').count(), text.split_ascii_whitespace().count());
    format!("{{\"lines\":{lines},\"words\":{words},\"bytes\":{}}}\n", text.len())
}

/// What a misuse of windows finds, in a chunk of its own.
#[track_caller]
fn found(act: &str) -> Value {
    let folder = Folder::new().file("in", noise(200_000));
    let args = ["threads", "--input", "in", "--chunk", "1MiB", "-t", "1"];
    folder.wrun(args).args(["--data", &json!(act).to_string(), HOSTILE_WINDOWS]).run().code(0).stdout_json()
}

#[test]
fn any_size_of_chunks_gives_the_same() {
    let bytes = noise(9_000);
    let folder = Folder::new().file("in", &bytes).file("empty", "");
    let whole = format!("{{\"adler32\":{},\"bytes\":9000}}\n", adler32(&bytes));
    for size in ["1", "4095", "4096", "4097", "9000", "4MiB"] {
        let chunks = folder.wrun(["threads", "--input", "in", "--chunk", size, CHECKSUM]);
        let ran = chunks.run().code(0).stderr("");
        let size = size.parse().unwrap_or(9_000);
        let expected = bytes.chunks(size).fold(String::new(), |mut text, chunk| {
            let _ = writeln!(text, "{{\"adler32\":{},\"bytes\":{}}}", adler32(chunk), chunk.len());
            text
        });
        ran.stdout(expected);
        let reduced = folder.wrun(["threads", "--input", "in", "--chunk", &size.to_string(), CHECKSUM]);
        reduced.args(["--reduce", "--message-max", "10MiB"]).run().code(0).stdout(&whole).stderr("");
    }
    folder.wrun(["threads", "--input", "empty", CHECKSUM]).run().code(0).stdout("").stderr("");
    let reduced = folder.wrun(["threads", "--input", "empty", "--reduce", CHECKSUM]).run();
    reduced.code(0).stdout("{\"adler32\":1,\"bytes\":0}\n");
    // what comes through a pipe is the same
    let piped = wrun(["threads", "--input", "-", "--chunk", "1000", "--reduce", CHECKSUM]).stdin(bytes);
    piped.run().code(0).stdout(whole);
}

#[test]
fn a_guest_in_any_language_has_windows() {
    // the text of a component, with no library and no compiler but wrun's
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/text/checksum.wat");
    let bytes = noise((2 << 20) + 12_345);
    let folder = Folder::new().file("in", bytes);
    for size in ["4095", "100000", "2MiB"] {
        let run =
            |guest: &str| folder.wrun(["threads", "--input", "in", "--chunk", size, guest]).run().code(0).stderr("");
        run(text).stdout(run(CHECKSUM).stdout_text());
    }
    let larger = folder.wrun(["threads", "--input", "in", "--chunk", "3MiB", text]).run();
    larger.code(1).stderr_has("expected a chunk of at most 2 MiB of the buffer `input`");
}

#[test]
fn lines_are_whole() {
    let text = text(2_000);
    let folder = Folder::new().file("in", &text).file("long", "a b ".repeat(50_000)).file("no-end", "one\ntwo three");
    for size in ["1", "100", "4096", "1MiB"] {
        let args = ["threads", "--lines", "--reduce", "--chunk", size, "--message-max", "10MiB", WORDCOUNT, "--input"];
        folder.wrun(args).arg("in").run().code(0).stdout(counts(&text)).stderr("");
        folder.wrun(args).arg("no-end").run().code(0).stdout(counts("one\ntwo three"));
        folder.wrun(args).arg("long").run().code(0).stdout(counts(&"a b ".repeat(50_000)));
    }
    folder
        .wrun(["threads", "--lines", "--chunk", "4", WORDCOUNT, "--input", "no-end"])
        .run()
        .code(0)
        .stdout("{\"lines\":1,\"words\":1,\"bytes\":4}\n{\"lines\":0,\"words\":2,\"bytes\":9}\n");
}

#[test]
fn a_picture_is_blurred_in_place() {
    let (width, height) = (61, 83);
    let (head, pixels) = (format!("P5\n# a comment\n{width} {height}\n255\n"), noise(width * height));
    let picture = [head.as_bytes(), &pixels].concat();
    let at = |x: usize, y: usize| u32::from(pixels[y.min(height - 1) * width + x.min(width - 1)]);
    let blurred = (0..width * height).map(|n| {
        let (x, y) = (n % width, n / width);
        let rows = [y.saturating_sub(1), y, y + 1];
        let columns = [x.saturating_sub(1), x, x + 1];
        let sum: u32 = rows.iter().flat_map(|y| columns.map(|x| at(x, *y))).sum();
        u8::try_from(sum / 9).unwrap()
    });
    let expected: Vec<u8> = head.bytes().chain(blurred).collect();
    let folder = Folder::new().file("in.pgm", &picture).file("out.pgm", vec![0; 100_000]).file("no.pgm", "P6 1 1 255 ");
    let blur = |input: &str, chunk: &str, overlap: &str| {
        let args = ["threads", "--input", input, "--output", "out.pgm", "--chunk", chunk, "--overlap", overlap, BLUR];
        folder.wrun(args).run()
    };
    for chunk in ["1", "10", "1000", "4095", "4096", "1MiB"] {
        blur("in.pgm", chunk, "62").code(0).stdout("").stderr("");
        assert!(std::fs::read(folder.path("out.pgm")).unwrap() == expected, "in chunks of {chunk}");
        std::fs::write(folder.path("out.pgm"), "as it was").unwrap();
    }
    // what fails leaves the output as it was
    blur("in.pgm", "1000", "61")
        .code(1)
        .stdout("")
        .stderr_has("--overlap 62")
        .stderr_has("in chunk 0 (1000 bytes from 0 on)");
    blur("no.pgm", "1000", "61").code(1).stderr_has("expected a PGM picture");
    assert_eq!(folder.read("out.pgm"), "as it was");
    folder.wrun(["threads", "--input", "no.pgm", "--output", "new.pgm", BLUR]).run().code(1);
    folder.wrun(["threads", "--input", "in.pgm", "--output", "new.pgm", HELLO]).run().code(126);
    assert!(!folder.path("new.pgm").exists());
}

#[test]
fn a_large_file_lies_in_parts_and_nobody_sees_it() {
    let block = text(1_000);
    let times = (70 << 20) / block.len() + 1;
    let bytes = block.repeat(times);
    let folder = Folder::new().file("in", &bytes);
    let expected = {
        let (lines, words) = (block.matches('\n').count(), block.split_ascii_whitespace().count());
        format!("{{\"lines\":{},\"words\":{},\"bytes\":{}}}\n", lines * times, words * times, bytes.len())
    };
    for threads in ["1", "2"] {
        let args = ["threads", "--input", "in", "--lines", "--chunk", "5MiB", "--reduce", "-t", threads, WORDCOUNT];
        folder.wrun(args).run().code(0).stdout(&expected);
    }
    // across the place where the second part begins, in the midst of a page and not
    let second = (bytes.len() / 2).next_multiple_of(2 << 20);
    for (offset, length) in [(second - 3_000_001, 6_000_002), (second - 8192, 16_384), (second, 4096), (second - 1, 2)]
    {
        let task = format!("{{\"offset\":{offset},\"length\":{length}}}\n");
        let sum = adler32(&bytes.as_bytes()[offset..offset + length]);
        let fork = folder.wrun(["fork", "--isolation", "jail", "--buffer", "input=in", CHECKSUM]).stdin(task);
        fork.run().code(0).stdout(format!("{{\"adler32\":{sum},\"bytes\":{length}}}\n"));
    }
}

#[test]
fn the_same_guest_works_in_process_workers() {
    let text = text(1_000);
    let middle = text.match_indices('\n').nth(500).unwrap().0 + 1;
    let folder = Folder::new().file("in", &text);
    let chunks = [(0, middle), (middle, text.len() - middle)];
    let tasks = chunks.iter().enumerate().fold(String::new(), |mut tasks, (n, (offset, length))| {
        let _ = writeln!(tasks, r#"{{"chunk":{n},"offset":{offset},"length":{length}}}"#);
        tasks
    });
    let replies = chunks.map(|(offset, length)| counts(&text[offset..offset + length]));
    let named: String = (1..).zip(&replies).fold(String::new(), |mut lines, (n, reply)| {
        let _ = writeln!(lines, r#"{{"line":{n},"reply":{}}}"#, reply.trim_end());
        lines
    });
    let cluster = folder.wrun(["cluster", "-w", "2", "--ordered", "--buffer", "input=in", WORDCOUNT]);
    cluster.stdin(tasks.clone()).run().code(0).stdout(&named);
    // several instances of one worker, and behind all walls
    for more in [["--concurrency", "4"], ["--isolation", "jail"]] {
        let cluster = folder.wrun(["cluster", "-w", "1", "--ordered", "--buffer", "input=in", WORDCOUNT]);
        cluster.args(more).stdin(tasks.clone()).run().code(0).stdout(&named);
    }
    let fork = folder.wrun(["fork", "--buffer", "input=in", WORDCOUNT]).stdin(tasks.clone());
    fork.run().code(0).stdout(replies.concat()).stderr("");
    let fork = folder.wrun(["fork", "--isolation", "jail", "--buffer", "input=in", WORDCOUNT]).stdin(tasks);
    fork.run().code(0).stdout(replies.concat());
    // who has no such buffer is told so
    let other = folder.wrun(["fork", "--buffer", "other=in", WORDCOUNT]).stdin("{\"offset\":0,\"length\":1}\n").run();
    other.code(0).stdout("").stderr_has("there is no such buffer");
}

#[test]
fn a_file_may_change_while_guests_have_windows_of_it() {
    let folder = Folder::new().file("in", noise(100_000));
    let whole = "{\"offset\":0,\"length\":100000}";
    let sum = format!("{{\"adler32\":{},\"bytes\":100000}}", adler32(&noise(100_000)));
    let mut fork = folder.wrun(["fork", "--buffer", "input=in", CHECKSUM]).stdin_open().spawn();
    fork.write_line(whole);
    assert_eq!(fork.stdout_line(), sum);
    for other in [vec![], vec![7; 200_000]] {
        // in place: the same file
        std::fs::write(folder.path("in"), other).unwrap();
        fork.write_line(whole);
        assert_eq!(fork.stdout_line(), sum);
    }
    fork.close_stdin();
    fork.wait().code(0);
}

#[test]
fn a_misuse_is_an_error_and_no_trouble() {
    assert_eq!(
        found("errors"),
        json!({
            "again": "overlaps",
            "within": "overlaps",
            "misaligned": "misaligned",
            "unknown": "no-such-buffer",
            "beyond": "out-of-range",
            "overflow": "out-of-range",
            "no-output": "no-such-buffer",
            "empty": "attached",
            "windows": 2,
            "detach": true,
            "detach-twice": "not-attached",
            "detach-unknown": "not-attached",
            "and-again": "attached",
        })
    );
    assert_eq!(found("grow"), json!({"grown": true, "same": true}));
    assert_eq!(found("static"), json!({"detached": true, "same": true}));
    assert_eq!(found("free")["sum"], 7 * 4 * 65_536);
    assert_eq!(found("fragments"), true);
    let folder = Folder::new().file("in", "ok".repeat(100_000));
    let passed = folder.wrun(["threads", "--input", "in", "--data", "\"pass-back\"", HOSTILE_WINDOWS]).run();
    // as a message it is none, as a name no buffer's
    let expected = json!({"text": "ok", "sent": false, "named": "no-such-buffer", "onto": "overlaps"});
    assert_eq!(passed.code(0).stdout_json(), expected);
}

#[test]
fn a_guest_has_so_many_windows_and_no_more() {
    let folder = Folder::new().file("in", noise(100));
    let tasks = "{\"act\":\"many\",\"count\":64}\n{\"act\":\"many\",\"count\":65}\n";
    let ran = folder.wrun(["fork", "--buffer", "input=in", HOSTILE_WINDOWS]).stdin(tasks).run().code(0);
    ran.stdout("{\"error\":null,\"fits\":64}\n{\"error\":\"too-many\",\"fits\":64}\n");
}

#[test]
fn each_chunk_writes_its_own_range_alone() {
    for (chunk, count) in [(1_000, 10), (4_096, 3), (5_000, 2), (9_999, 2)] {
        let folder = Folder::new().file("in", noise(10_000));
        let size = chunk.to_string();
        let args = ["threads", "--input", "in", "--output", "out", "--data", "\"own\"", "-t", "3", "--chunk", &size];
        let ran = folder.wrun(args).arg(HOSTILE_WINDOWS).run().code(0).stderr("");
        let found: Vec<Value> = ran.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = json!({"twice": "a part of the range is in another window", "others": true, "kept": true});
        assert_eq!(found, vec![expected; count], "{chunk}");
        let written = std::fs::read(folder.path("out")).unwrap();
        let expected: Vec<u8> = (0..10_000).map(|n| u8::try_from(n / chunk).unwrap() + 1).collect();
        assert!(written == expected, "{chunk}");
    }
}

#[test]
fn what_is_written_to_an_input_stays_private() {
    let folder = Folder::new().file("in", noise(50_000));
    let args =
        ["threads", "--input", "in", "--data", "\"private\"", "-t", "2", "--chunk", "10000", "--overlap", "5000"];
    let ran = folder.wrun(args).arg(HOSTILE_WINDOWS).run().code(0);
    assert_eq!(ran.stdout_text(), "{\"same\":true,\"written\":true}\n".repeat(5));
    assert!(std::fs::read(folder.path("in")).unwrap() == noise(50_000));
}

#[test]
fn nothing_of_a_window_is_left_to_the_next_instance() {
    let folder = Folder::new().file("in", vec![0xa7; 2 << 20]);
    let run = |act: &str, count: usize, more: &[&str]| {
        let tasks = format!("{{\"act\":\"{act}\"}}\n{{\"act\":\"scan\"}}\n{{\"act\":\"static\"}}\n").repeat(count);
        let args = ["cluster", "-w", "1", "--instance", "task", "--ordered", "--buffer", "input=in", HOSTILE_WINDOWS];
        let ran = folder.wrun(args).args(more).stdin(tasks).run();
        let text = ran.stdout_text();
        let clean = text.matches("\"reply\":{\"found\":false}").count();
        let whole = text.matches("\"reply\":{\"detached\":true,\"same\":true}").count();
        assert_eq!((clean, whole), (count, count), "{act}: {}", &text[..text.len().min(1_000)]);
        text
    };
    // one slot, used 10,000 times
    assert_eq!(run("leave", 3_400, &[]).matches("\"reply\":true").count(), 3_400);
    assert_eq!(run("trap", 300, &[]).matches("\"kind\":\"trapped\"").count(), 300);
    assert_eq!(run("leave-static", 300, &[]).matches("\"kind\":\"trapped\"").count(), 300);
    // long enough for the tasks that end by themselves, on a machine that has other things to do
    let spun = run("spin", 2, &["--interrupt", "epoch", "--timeout", "2s"]);
    assert_eq!(spun.matches("\"limit\":\"time\"").count(), 2);
}

#[test]
fn one_buffer_is_in_memory_once() {
    const SIZE: usize = 64 << 20;
    let bytes = noise(SIZE);
    let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
    let folder = Folder::new().file("in", bytes);
    let args = ["cluster", "-w", "8", "--buffer", "input=in", HOSTILE_WINDOWS];
    let mut cluster = folder.wrun(args).stdin_open().spawn();
    let mut holding = BTreeSet::new();
    while holding.len() < 8 {
        cluster.write("{\"act\":\"hold\"}\n".repeat(8));
        for _ in 0..8 {
            let answer: Value = serde_json::from_str(&cluster.stdout_line()).unwrap();
            assert_eq!(answer["reply"]["sum"], sum, "{answer}");
            holding.insert(answer["reply"]["worker"].as_u64());
        }
    }
    let pss = |pid: Pid| {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_pid())).unwrap_or_default();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or("0 kB");
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    };
    let workers = children(cluster.pid());
    let pss: usize = workers.iter().map(|pid| pss(*pid)).sum();
    // in each of them it would be eight times as much
    assert!((SIZE..2 * SIZE).contains(&pss), "{} MiB in {} workers", pss >> 20, workers.len());
    cluster.close_stdin();
    cluster.wait().code(0);
}

#[test]
fn the_first_chunk_that_fails_ends_all_and_is_named() {
    let folder = Folder::new().file("in", noise(1 << 20));
    let run = |act: &str, more: &[&str]| {
        let args = ["threads", "--input", "in", "--chunk", "1000", "-t", "2", "--data", act, HOSTILE_WINDOWS];
        folder.wrun(args).args(more).run()
    };
    run("\"trap\"", &[]).code(134).stdout("").stderr_has("in chunk 0 (1000 bytes from 0 on)").stderr_has("handle");
    run("\"exit\"", &[]).code(1).stdout("").stderr_has("exited with code 1 in chunk 0");
    run("\"none\"", &[]).code(1).stderr_has("failed: \"no such act: none\" in chunk 0 (1000 bytes from 0 on)");
    run("\"spin\"", &["--timeout", "200ms"]).code(124).stderr_has("time limit of 200ms");
    let json = run("\"none\"", &["--log-format", "json"]).code(1);
    let line: Value = serde_json::from_str(json.stderr_text().lines().last().unwrap()).unwrap();
    let error = json!({"kind": "guest", "value": "no such act: none"});
    assert_eq!(line, json!({"chunk": 0, "offset": 0, "length": 1000, "error": error}));
    // too long for the last call
    let args = ["threads", "--input", "in", "--chunk", "10", "--reduce", CHECKSUM, "--message-max"];
    let folder = folder.file("in", noise(10_000));
    folder.wrun(args).arg("100KiB").run().code(0);
    folder.wrun(args).arg("10KiB").run().code(123).stdout("").stderr_has("in the last call, with all replies");
}

#[test]
fn a_chunk_counts_for_the_memory_of_its_instance() {
    let folder = Folder::new().file("in", noise(8 << 20));
    let run = |chunk: &str| {
        let args = ["threads", "--input", "in", "--memory", "6MiB", "--chunk", chunk, CHECKSUM];
        folder.wrun(args).run()
    };
    run("3MiB").code(0).stderr("");
    // there is room for it, but not for it and what the guest begins with
    run("5MiB").code(137).stderr_has("hit the memory limit of 6MiB in chunk 0 (5242880 bytes from 0 on)");
    run("6MiB").code(2).stderr_has("a chunk of 6MiB does not fit the 6MiB of memory of an instance");
    let run = |max: &str| folder.wrun(["threads", "--input", "in", "--input-max", max, "--reduce", CHECKSUM]).run();
    run("8MiB").code(0);
    run("8388607").code(2).stderr_has("--input-max");
    let piped = wrun(["threads", "--input", "-", "--input-max", "99", CHECKSUM]).stdin([7; 100]).run();
    piped.code(2).stderr_has("it is larger than 99B (--input-max)");
}

#[test]
fn instances_are_in_a_jail() {
    let folder = Folder::new().file("in", noise(1 << 20));
    let args = ["threads", "--input", "in", "--isolation", "jail", "--data", "\"spin\"", "-t", "2", HOSTILE_WINDOWS];
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut threads = folder.wrun(args).spawn();
        threads.stderr_line_with("it spins");
        let [child] = children(threads.pid())[..] else { panic!("expected one child") };
        is_jailed(child);
        threads.signal(signal);
        threads.wait().code(code);
    }
}

#[test]
fn what_does_not_fit_is_told_why() {
    let folder = Folder::new().file("in", "abc");
    let run = |args: &[&str]| folder.wrun(["threads"]).args(args).run();
    run(&["--input", "in", HELLO]).code(126).stderr_has("expected a handler guest, found a command guest");
    run(&["--input", "in", SUM_THREADS]).code(126).stderr_has("expected a handler guest");
    run(&[ECHO]).code(126).stderr_has("it imports no shared memory").stderr_has("--input FILE");
    run(&["--input", "none", ECHO]).code(2).stderr_has("could not read the input, `none`");
    run(&["--input", "in", "--output", "no/out", ECHO]).code(2).stderr_has("could not open the output");
    run(&["--input", "in", "--chunk", "0", ECHO]).code(2).stderr_has("expected a byte or more");
    run(&["--input", "in", "--lines", "--overlap", "1", ECHO]).code(2).stderr_has("cannot be used with");
    run(&["--lines", ECHO]).code(2).stderr_has("--input");
    for (buffer, expected) in [
        ("x", "expected `NAME=FILE`"),
        ("x=none", "could not read `none` for the buffer `x`"),
        ("a/b=in", "expected a name of at most 64 letters"),
    ] {
        folder.wrun(["cluster", "--buffer", buffer, ECHO]).run().code(2).stderr_has(expected);
        folder.wrun(["fork", "--buffer", buffer, ECHO]).run().code(2).stderr_has(expected);
    }
    // a handler that does without windows gets its chunks as any other message
    run(&["--input", "in", "--chunk", "2", ECHO])
        .code(0)
        .stdout("{\"chunk\":0,\"offset\":0,\"length\":2}\n{\"chunk\":1,\"offset\":2,\"length\":1}\n");
}
