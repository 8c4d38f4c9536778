//! What guests compute on windows of one buffer, what a window costs, and how a buffer gets to a process: beside native rayon
//! with the same kernels, and Node's `worker_threads` with a `SharedArrayBuffer`.

use std::{
    cell::RefCell,
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, Mutex},
    time::Instant,
};

use guest_artifacts::{BLUR, HOSTILE_WINDOWS, WORDCOUNT};
use rayon::{
    iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator},
    slice::ParallelSliceMut,
};
use wrun::{
    Buffer, Cache, Command, Mapped, ParMap, Threads,
    limits::{Bytes, Limits},
    message::Message,
    outcome::Answer,
};

use crate::harness::{Node, Probe, cache_dir, compare};

#[expect(dead_code, unreachable_pub, reason = "it is a library of guests, of which checksums are not measured")]
#[path = "../../guests/windows/src/kernel.rs"]
mod kernel;

const TEXT: usize = 1 << 30;
const CHUNK: Bytes = Bytes::mib(4);
/// The width and the height of the picture.
const PICTURE: usize = 8192;

pub(crate) fn run() {
    let mut node = Node::on(NODE);
    let text = Buffer::from_slice(&words(TEXT)).unwrap();
    for threads in [1, 2] {
        word_count(node.as_mut(), &text, threads);
    }
    drop(text);
    for threads in [1, 2] {
        blur(node.as_mut(), threads);
    }
    windows();
    hand_over();
    in_memory();
}

/// `wordcount THREADS` and `blur THREADS` answer how long it took, in microseconds, with buffers as large as ours.
const NODE: &str = r#"
const { Worker } = require("worker_threads");
const code = `
const { parentPort } = require("worker_threads");
parentPort.on("message", ({ what, sab, out, from, to, width }) => {
  const a = new Uint8Array(sab);
  if (what === "wordcount") {
    let lines = 0, words = 0, space = from === 0 || a[from - 1] <= 32;
    for (let i = from; i < to; i++) {
      const b = a[i], s = b === 32 || (b >= 9 && b < 14);
      if (b === 10) lines++;
      if (space && !s) words++;
      space = s;
    }
    return parentPort.postMessage([lines, words]);
  }
  const o = new Uint8Array(out), w = width;
  for (let y = from; y < to; y++) {
    const up = Math.max(y - 1, 0) * w, same = y * w, down = Math.min(y + 1, w - 1) * w;
    for (let x = 0; x < w; x++) {
      const l = x === 0 ? 0 : x - 1, r = x === w - 1 ? x : x + 1;
      o[same + x] = (a[up + l] + a[up + x] + a[up + r] + a[same + l] + a[same + x] + a[same + r] + a[down + l] + a[down + x] + a[down + r]) / 9;
    }
  }
  parentPort.postMessage(null);
});`;
const make = () => new Worker(code, { eval: true });
const workers = [make(), make()];
const call = (w, m) => new Promise(r => { w.once("message", r); w.postMessage(m); });
let text, picture, out;
require("readline").createInterface({ input: process.stdin }).on("line", async line => {
  const [what, threads] = line.split(" ").map((w, i) => i ? Number(w) : w);
  const width = 8192, size = what === "blur" ? width : 2 ** 30;
  if (what === "wordcount" && !text) {
    text = new SharedArrayBuffer(size); const t = new Uint8Array(text);
    const line = Buffer.from("some words of a line, of which there are many\n");
    for (let i = 0; i < size; i += line.length) t.set(line.subarray(0, Math.min(line.length, size - i)), i);
  }
  if (what === "blur" && !picture) { text = null; picture = new SharedArrayBuffer(width * width); out = new SharedArrayBuffer(width * width); }
  const since = process.hrtime.bigint();
  const part = i => ({ what, sab: what === "blur" ? picture : text, out, width, from: i * size / threads, to: (i + 1) * size / threads });
  await Promise.all(workers.slice(0, threads).map((w, i) => call(w, part(i))));
  console.log(Number(process.hrtime.bigint() - since) / 1000);
}).on("close", () => process.exit());
"#;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// So many bytes of lines with words.
fn words(length: usize) -> Vec<u8> {
    b"some words of a line, of which there are many\n".iter().copied().cycle().take(length).collect()
}

fn cache() -> Cache {
    Cache::at(Some(&cache_dir()))
}

fn command(guest: &str, threads: u32) -> Command {
    let mut command = Command::new(guest);
    command.cache(cache()).workers(threads);
    command
}

fn here(guest: &str, threads: u32) -> wrun::threads::Builder {
    Threads::builder(guest).cache(cache()).workers(threads)
}

/// How long it takes, in milliseconds.
fn millis<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    std::hint::black_box(work());
    start.elapsed().as_secs_f64() * 1e3
}

#[track_caller]
fn succeeded(mapped: Result<Mapped, wrun::Error>) -> Mapped {
    let mapped = mapped.unwrap();
    assert_eq!(mapped.failed, None);
    mapped
}

/// A file without a name that has these bytes.
fn file_of(bytes: &[u8]) -> OwnedFd {
    let file = rustix::fs::memfd_create("native", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    File::from(file.try_clone().unwrap()).write_all_at(bytes, 0).unwrap();
    file
}

/// Works as a program begins that was handed a file: with a mapping of its own, which has no pages yet.
fn with_mapping<T>(file: &OwnedFd, length: usize, work: impl FnOnce(&[u8]) -> T) -> T {
    let (read, private) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::PRIVATE);
    // SAFETY: a new mapping of a file that nobody else has, as long as the file, gone before anybody else could see it
    unsafe {
        let start = rustix::mm::mmap(std::ptr::null_mut(), length, read, private, file, 0).unwrap();
        let result = work(std::slice::from_raw_parts(start.cast(), length));
        rustix::mm::munmap(start, length).unwrap();
        result
    }
}

fn word_count(node: Option<&mut Node>, text: &Buffer, threads: u32) {
    let map = || ParMap::over(text.split(CHUNK).lines()).reduce();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build().unwrap();
    let native = |text: &[u8], chunks: &[wrun::Chunk]| {
        pool.install(|| {
            let counted = chunks.par_iter().map(|chunk| {
                let range = chunk.range();
                kernel::count(&text[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()])
            });
            counted.map(|counts| counts.words).sum::<u64>()
        })
    };
    let chunks: Vec<_> = text.split(CHUNK).lines().collect();
    let file = file_of(text);
    let mapped = || with_mapping(&file, text.len(), |text| native(text, &chunks));
    let expected = native(text, &chunks);
    let reply = succeeded(block_on(command(WORDCOUNT, threads).par_map(map()))).replies[0].as_str().to_owned();
    assert!(reply.contains(&format!("\"words\":{expected},")), "{reply} instead of {expected}");
    let mut probes: Vec<Probe<'_>> = vec![
        (
            "wrun threads, with its process",
            Box::new(|| millis(|| succeeded(block_on(command(WORDCOUNT, threads).par_map(map()))))),
        ),
        ("wrun, in this process", Box::new(|| millis(|| succeeded(block_on(here(WORDCOUNT, threads).par_map(map())))))),
        ("native rayon, which maps the text", Box::new(|| millis(mapped))),
        ("native rayon, which has it in memory", Box::new(|| millis(|| native(text, &chunks)))),
    ];
    if let Some(node) = node {
        probes.push(("Node, worker_threads", Box::new(|| node.ask(&format!("wordcount {threads}")) / 1e3)));
    }
    compare(&format!("wordcount of {} MiB, {threads} threads", TEXT >> 20), "ms", 5, probes);
}

fn blur(node: Option<&mut Node>, threads: u32) {
    let head = format!("P5 {PICTURE} {PICTURE} 255\n");
    let pixels: Vec<u8> = (0..PICTURE * PICTURE).map(|n| u8::try_from(n * n / 7 % 256).unwrap()).collect();
    let picture = Buffer::from_slice(&[head.as_bytes(), &pixels].concat()).unwrap();
    let map = || {
        let chunks = picture.split(CHUNK).overlap(Bytes(PICTURE as u64 + 1));
        ParMap::over(chunks).output(Buffer::zeroed(picture.length()).unwrap())
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build().unwrap();
    let rows = usize::try_from(CHUNK.0).unwrap() / PICTURE * PICTURE;
    // made anew each time, as the other is
    let native = |pixels: &[u8]| {
        let mut output = Buffer::zeroed(Bytes(pixels.len() as u64)).unwrap();
        pool.install(|| {
            output.par_chunks_mut(rows).enumerate().for_each(|(n, to)| {
                kernel::blur(pixels, 0, (PICTURE, PICTURE), n * rows, to);
            });
        });
        output
    };
    let blurred = succeeded(block_on(command(BLUR, threads).par_map(map()))).output.unwrap();
    assert!(blurred[head.len()..] == native(&pixels)[..]);
    let file = file_of(&pixels);
    let mapped = || with_mapping(&file, pixels.len(), native);
    let mut probes: Vec<Probe<'_>> = vec![
        (
            "wrun threads, with its process",
            Box::new(|| millis(|| succeeded(block_on(command(BLUR, threads).par_map(map()))))),
        ),
        ("wrun, in this process", Box::new(|| millis(|| succeeded(block_on(here(BLUR, threads).par_map(map())))))),
        ("native rayon, which maps the picture", Box::new(|| millis(mapped))),
        ("native rayon, which has it in memory", Box::new(|| millis(|| native(&pixels)))),
    ];
    if let Some(node) = node {
        probes.push(("Node, worker_threads", Box::new(|| node.ask(&format!("blur {threads}")) / 1e3)));
    }
    compare(&format!("blur of {PICTURE} x {PICTURE}, {threads} threads"), "ms", 7, probes);
}

/// What attaching and detaching takes, beside a copy.
fn windows() {
    const COUNT: u32 = 2_000;
    let bytes = vec![7u8; 64 << 20];
    let buffer = Buffer::from_slice(&bytes).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let fork = runtime.block_on(Command::new(HOSTILE_WINDOWS).cache(cache()).buffer("input", &buffer).fork()).unwrap();
    let to = RefCell::new(vec![1u8; bytes.len()]);
    for length in [4 << 10, 1 << 20, 64 << 20] {
        let act = format!(r#"{{"act":"attach","count":{COUNT},"offset":0,"length":{length}}}"#);
        let act = Message::parse(&act).unwrap();
        let attach = || {
            let took = millis(|| {
                let answer = runtime.block_on(fork.request(&act)).unwrap();
                assert!(matches!(answer, Answer::Reply(_)), "{answer:?}");
            });
            took * 1e3 / f64::from(COUNT)
        };
        let copy = || {
            let count = if length > 1 << 20 { 5 } else { 500 };
            let took = millis(|| {
                for _ in 0..count {
                    to.borrow_mut()[..length].copy_from_slice(std::hint::black_box(&bytes[..length]));
                }
            });
            took * 1e3 / f64::from(count)
        };
        let probes: Vec<Probe<'_>> = vec![("attach and detach", Box::new(attach)), ("a copy", Box::new(copy))];
        compare(&format!("a window of {} KiB", length >> 10), "us", 7, probes);
    }
}

/// How long a buffer takes to get to a process worker, to its guest's first answer about it.
fn hand_over() {
    const PART: usize = 1 << 20;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limits = Limits { message_max: Bytes::mib(2), ..Limits::of_a_run() };
    let fork = runtime.block_on(Command::new(HOSTILE_WINDOWS).cache(cache()).limits(limits).fork()).unwrap();
    let large = Buffer::from_slice(&vec![7; 1 << 30]).unwrap();
    let small = Buffer::from_slice(&vec![7; PART]).unwrap();
    let act = Message::parse(r#"{"act":"attach","count":1,"offset":0,"length":65536}"#).unwrap();
    let handed = |buffer: &Buffer| {
        millis(|| {
            fork.send_buffer("input", buffer).unwrap();
            let answer = runtime.block_on(fork.request(&act)).unwrap();
            assert!(matches!(answer, Answer::Reply(_)), "{answer:?}");
        })
    };
    let text = Message::of(&serde_json::json!({"act": "sink", "text": "x".repeat(PART)})).unwrap();
    let sent = || {
        millis(|| {
            runtime.block_on(async {
                for _ in 0..(1 << 30) / PART {
                    fork.ready().await;
                    fork.send(&text).unwrap();
                    while fork.try_recv().is_some() {}
                }
                // the answer to this one comes behind those to all before it
                fork.ready().await;
                let last = fork.request(&act).await.unwrap();
                assert!(matches!(last, Answer::Reply(_)), "{last:?}");
                while fork.try_recv().is_some() {}
            });
        })
    };
    let probes: Vec<Probe<'_>> = vec![
        ("a buffer of 1 GiB", Box::new(|| handed(&large))),
        ("a buffer of 1 MiB", Box::new(|| handed(&small))),
        ("1 GiB in messages of 1 MiB", Box::new(sent)),
    ];
    compare("hand-over to a process worker", "ms", 5, probes);
}

/// How much memory 1 GiB takes that eight instances work on.
fn in_memory() {
    let text = Buffer::from_slice(&words(1 << 30)).unwrap();
    let most = Arc::new(Mutex::new(0u64));
    let seen = most.clone();
    // the only child that there is meanwhile
    let map = ParMap::over(text.split(Bytes::mib(64)).lines()).each(move |_, _| {
        let own = fs::read_to_string("/proc/thread-self/children").unwrap();
        let children = own.split_whitespace().map(str::to_owned).chain(["self".to_owned()]);
        let pss = children.map(|pid| {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or("0 kB").to_owned();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        });
        let mut seen = seen.lock().unwrap();
        *seen = (*seen).max(pss.sum());
    });
    succeeded(block_on(command(WORDCOUNT, 8).par_map(map)));
    println!(
        "  1 GiB in eight instances: at most {} MiB of this process and its child (PSS)",
        *most.lock().unwrap() >> 10
    );
}
