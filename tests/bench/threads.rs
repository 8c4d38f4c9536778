//! What threads on one shared memory compute, what they cost, and how long they take to end: beside the bare engine without
//! checks, native rayon, and Node's `worker_threads`.

use std::{
    path::Path,
    sync::{
        Arc, Barrier,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use guest_artifacts::{ECHO_THREADS, HOSTILE_WORKERS_THREADS, KERNELS_THREADS, PINGPONG_THREADS};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use wasmtime::{Config, Engine, InstancePre, Linker, MemoryType, Module, SharedMemory, Store};
use wrun::{
    Cache, Command, Fork, Threads,
    message::Message,
    outcome::Answer,
    threads::{Said, To},
};

use crate::harness::{Node, Probe, cache_dir, compare};

#[path = "../../guests/threads/src/kernel.rs"]
mod kernel;

/// The kernels, each with its size.
const KERNELS: [(&str, &str, u32); 4] =
    [("sum", "numbers", 200_000_000), ("map", "numbers", 8 << 20), ("mandelbrot", "size", 1024), ("fib", "n", 35)];

/// Pieces of the picture, of which each thread takes the next.
const PIECES: u32 = 16;

pub(crate) fn run() {
    let mut node = Node::on(NODE);
    for (name, unit, size) in KERNELS {
        for threads in [1, 2] {
            kernels(node.as_mut(), name, &format!(r#"{{"kernel":"{name}","{unit}":{size}}}"#), size, threads);
        }
    }
    starts(node.as_mut());
    messages(node.as_mut());
    ping_pong(node.as_mut());
    stops();
}

/// Node's workers: `KERNEL SIZE THREADS` is the longest time that a worker took, in microseconds, as are all figures;
/// `start`, `trip COUNT`, `many COUNT WINDOW`, `pong ROUNDS` say the time of one.
const NODE: &str = r#"
const { Worker } = require("worker_threads");
const code = `
const { parentPort } = require("worker_threads"), now = () => Number(process.hrtime.bigint()) / 1000;
const fib = n => n < 2 ? n : fib(n - 1) + fib(n - 2);
const kernels = {
  // within doubles: there is no cheap 64-bit integer
  sum: ({ lo, hi }) => { let s = 0; for (let i = lo; i < hi; i++) s += i ^ (i >> 3); return s; },
  map: ({ sab, off, n }) => { const a = new Float64Array(sab, off * 8, n); for (let i = 0; i < n; i++) a[i] = Math.sqrt(a[i]) * 1.000001 + 0.5; },
  mandelbrot: ({ next, size }) => { const c = new Int32Array(next); let steps = 0, b;
    while ((b = Atomics.add(c, 0, 1)) < 16) for (let y = b * size / 16; y < (b + 1) * size / 16; y++) for (let x = 0; x < size; x++) {
      const cx = x / size * 3 - 2, cy = y / size * 2 - 1; let p = 0, q = 0, k = 0;
      while (k < 200 && p * p + q * q <= 4) { const t = p * p - q * q + cx; q = 2 * p * q + cy; p = t; k++; } steps += k; } return steps; },
  fib: ({ n }) => fib(n),
};
parentPort.on("message", m => {
  if (m.pong) {
    const a = new Int32Array(m.pong), since = now();
    for (let i = 0; i < m.rounds; i++) {
      while (Atomics.load(a, 0) % 2 !== m.me) Atomics.wait(a, 0, 1 - m.me + (Atomics.load(a, 0) & ~1));
      Atomics.add(a, 0, 1); Atomics.notify(a, 0);
    }
    return parentPort.postMessage(now() - since);
  }
  if (!m.k) return parentPort.postMessage(m);
  const since = now(); kernels[m.k](m); parentPort.postMessage(now() - since);
});`;
const make = () => new Worker(code, { eval: true });
const workers = [make(), make()];
const call = (w, m) => new Promise(r => { w.once("message", r); w.postMessage(m); });
const micros = since => Number(process.hrtime.bigint() - since) / 1000;
let sab = new SharedArrayBuffer(8);
require("readline").createInterface({ input: process.stdin }).on("line", async line => {
  const [what, ...words] = line.split(" "), [size, threads] = words.map(Number), since = process.hrtime.bigint();
  if (what === "start") { const w = make(); await call(w, "x"); console.log(micros(since)); await w.terminate(); return; }
  if (what === "trip") { for (let i = 0; i < size; i++) await call(workers[0], "x".repeat(60)); console.log(micros(since) / size); return; }
  if (what === "many") {
    let sent = 0, got = 0; const text = "x".repeat(60);
    await new Promise(done => {
      const hear = () => { if (++got === size) { workers[0].off("message", hear); done(); } else if (sent < size) { sent++; workers[0].postMessage(text); } };
      workers[0].on("message", hear); while (sent < Math.min(threads, size)) { sent++; workers[0].postMessage(text); }
    });
    console.log(size / micros(since) * 1e6); return;
  }
  if (what === "pong") {
    const pong = new SharedArrayBuffer(4);
    const took = await Promise.all([0, 1].map(me => call(workers[me], { pong, me, rounds: size })));
    console.log(Math.max(...took) / size); return;
  }
  if (what === "map" && sab.byteLength !== size * 8) { sab = new SharedArrayBuffer(size * 8); new Float64Array(sab).forEach((_, i, a) => a[i] = i); }
  const next = new SharedArrayBuffer(4);
  const part = i => ({ k: what, lo: i * size / threads, hi: (i + 1) * size / threads, sab, off: i * size / threads, n: what === "fib" ? size : size / threads, next, size });
  const took = await Promise.all(workers.slice(0, threads).map((w, i) => call(w, part(i))));
  console.log(Math.max(...took));
}).on("close", () => process.exit());
"#;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn here(guest: &str, workers: u32) -> Threads {
    let builder = Threads::builder(guest).workers(workers).cache(Cache::at(Some(&cache_dir())));
    block_on(builder.start()).unwrap()
}

/// A group in a process of its own, as `wrun threads` has it.
async fn in_a_process(guest: &str, workers: u32) -> Fork {
    Command::new(guest).cache(Cache::at(Some(&cache_dir()))).workers(workers).tasks(true).fork().await.unwrap()
}

/// The longest time that one of the answers tells of.
fn longest(answers: impl Iterator<Item = String>) -> f64 {
    let ms = |text: String| {
        let after = text.split_once("\"ms\":").unwrap().1;
        after[..after.find('}').unwrap()].parse::<f64>().unwrap()
    };
    answers.map(ms).fold(0.0, f64::max)
}

fn kernels(node: Option<&mut Node>, name: &str, order: &str, size: u32, threads: u32) {
    let message = Message::parse(order).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let process = runtime.block_on(in_a_process(KERNELS_THREADS, threads));
    let in_process = || {
        runtime.block_on(async {
            // they begin together, so each of them gets one
            for _ in 0..threads {
                process.send(&message).unwrap();
            }
            let mut answers = vec![];
            for _ in 0..threads {
                answers.push(process.recv().await.unwrap().as_str().to_owned());
            }
            longest(answers.into_iter())
        })
    };
    let group = here(KERNELS_THREADS, threads);
    let with_epochs = || {
        group.send_all(&message).unwrap();
        longest((0..threads).map(|_| match block_on(group.recv()) {
            Some(Said::Answer { answer: Answer::Reply(reply), .. }) => reply.as_str().to_owned(),
            other => panic!("{other:?}"),
        }))
    };
    let raw = Raw::new(threads);
    let mut numbers: Vec<f64> = (0..size).map(f64::from).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build().unwrap();
    let mut probes: Vec<Probe<'_>> = vec![
        ("wrun threads", Box::new(in_process)),
        ("wrun, in this process", Box::new(with_epochs)),
        ("bare engine, no checks", Box::new(|| raw.run(name, size))),
        ("native rayon", Box::new(|| native(&pool, name, size, threads, &mut numbers))),
    ];
    if let Some(node) = node {
        probes.push(("Node, worker_threads", Box::new(|| node.ask(&format!("{name} {size} {threads}")) / 1e3)));
    }
    compare(&format!("{name}, {threads} threads"), "ms", 7, probes);
}

/// The part of a range that is this thread's.
fn part(size: u32, index: u32, count: u32) -> (u64, u64) {
    let at = |index: u32| u64::from(size) * u64::from(index) / u64::from(count);
    (at(index), at(index + 1))
}

/// Runs a kernel in a pool of rayon's, and answers how long that took, in milliseconds.
fn native(pool: &rayon::ThreadPool, name: &str, size: u32, threads: u32, numbers: &mut [f64]) -> f64 {
    use std::hint::black_box;
    pool.install(|| {
        let start = Instant::now();
        let range = (0..threads).into_par_iter();
        match name {
            "sum" => range.for_each(|index| {
                let (first, last) = part(size, index, threads);
                black_box(kernel::kernel_sum(black_box(first), last));
            }),
            "map" => {
                use rayon::slice::ParallelSliceMut;
                let chunk = numbers.len().div_ceil(threads as usize);
                numbers.par_chunks_mut(chunk).for_each(|own| {
                    // SAFETY: all of them are this call's
                    unsafe { kernel::kernel_map(own.as_mut_ptr(), own.len()) };
                });
            }
            "mandelbrot" => (0..PIECES).into_par_iter().for_each(|piece| {
                let (first, last) = (piece * size / PIECES, (piece + 1) * size / PIECES);
                black_box(kernel::kernel_mandelbrot(size, first, last, 200));
            }),
            _ => range.for_each(|_| {
                black_box(kernel::kernel_fib(black_box(size)));
            }),
        }
        start.elapsed().as_secs_f64() * 1e3
    })
}

/// The same module in the bare engine, compiled without checks: an instance for each thread, one memory for all.
struct Raw {
    engine: Engine,
    pre: InstancePre<()>,
    threads: u32,
    numbers: u32,
}

impl Raw {
    fn new(threads: u32) -> Self {
        let mut config = Config::new();
        config.wasm_threads(true).shared_memory(true).concurrency_support(false);
        let engine = Engine::new(&config).unwrap();
        let module = Module::from_file(&engine, Path::new(KERNELS_THREADS)).unwrap();
        let mut linker = Linker::new(&engine);
        linker.define_unknown_imports_as_traps(&module).unwrap();
        let memory = SharedMemory::new(&engine, MemoryType::shared(17, 16384)).unwrap();
        // beyond all that the module itself has there
        let numbers = u32::try_from(memory.grow((8 << 20) * 8 / 65536 + 1).unwrap() * 65536).unwrap();
        linker.allow_shadowing(true).define(&Store::new(&engine, ()), "env", "memory", memory).unwrap();
        let pre = linker.instantiate_pre(&module).unwrap();
        Self { engine, pre, threads, numbers }
    }

    /// Runs a kernel, and answers the longest time that a thread took, in milliseconds.
    fn run(&self, name: &str, size: u32) -> f64 {
        let (start, next) = (Barrier::new(self.threads as usize), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let threads = (0..self.threads).map(|index| {
                let (start, next) = (&start, &next);
                scope.spawn(move || {
                    on_core(index);
                    let mut store = Store::new(&self.engine, ());
                    let instance = self.pre.instantiate(&mut store).unwrap();
                    let (first, last) = part(size, index, self.threads);
                    start.wait();
                    let begun = Instant::now();
                    match name {
                        "sum" => {
                            let sum = instance.get_typed_func::<(u64, u64), u64>(&mut store, "kernel_sum").unwrap();
                            sum.call(&mut store, (first, last)).unwrap();
                        }
                        "map" => {
                            let map = instance.get_typed_func::<(u32, u32), ()>(&mut store, "kernel_map").unwrap();
                            let at = self.numbers + u32::try_from(first * 8).unwrap();
                            map.call(&mut store, (at, u32::try_from(last - first).unwrap())).unwrap();
                        }
                        "mandelbrot" => {
                            let draw = instance
                                .get_typed_func::<(u32, u32, u32, u32), u64>(&mut store, "kernel_mandelbrot")
                                .unwrap();
                            loop {
                                let piece = next.fetch_add(1, Ordering::Relaxed);
                                if piece >= PIECES {
                                    break;
                                }
                                let rows = (piece * size / PIECES, (piece + 1) * size / PIECES);
                                draw.call(&mut store, (size, rows.0, rows.1, 200)).unwrap();
                            }
                        }
                        _ => {
                            let fib = instance.get_typed_func::<u32, u32>(&mut store, "kernel_fib").unwrap();
                            fib.call(&mut store, size).unwrap();
                        }
                    }
                    begun.elapsed().as_secs_f64() * 1e3
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).fold(0.0, f64::max)
        })
    }
}

/// Keeps a thread on a core: two that live for a moment would share one.
fn on_core(index: u32) {
    let mut one = rustix::thread::CpuSet::new();
    one.set(index as usize % std::thread::available_parallelism().unwrap().get());
    let _ = rustix::thread::sched_setaffinity(None, &one);
}

fn starts(mut node: Option<&mut Node>) {
    let group = here(KERNELS_THREADS, 1);
    let order = Message::parse(r#"{"kernel":"spawn","count":200}"#).unwrap();
    let spawned = || match block_on(group.request(To::Any, &order)).unwrap() {
        Answer::Reply(reply) => longest(std::iter::once(reply.as_str().to_owned())) * 1e3,
        other => panic!("{other:?}"),
    };
    let native = || {
        let start = Instant::now();
        (0..200).for_each(|_| std::thread::spawn(|| ()).join().unwrap());
        start.elapsed().as_secs_f64() * 1e6 / 200.0
    };
    let mut probes: Vec<Probe<'_>> =
        vec![("wrun, `std::thread` in a guest", Box::new(spawned)), ("native `std::thread`", Box::new(native))];
    if let Some(node) = &mut node {
        probes.push(("Node, `new Worker()` to its first message", Box::new(|| node.ask("start"))));
    }
    compare("start and end of a thread", "us", 9, probes);

    let first = || {
        let start = Instant::now();
        let group = here(ECHO_THREADS, 1);
        block_on(group.request(To::Any, &Message::null())).unwrap();
        start.elapsed().as_secs_f64() * 1e6
    };
    let mut probes: Vec<Probe<'_>> = vec![("wrun, a group from its file", Box::new(first))];
    if let Some(node) = &mut node {
        probes.push(("Node, `new Worker()` to its first message", Box::new(|| node.ask("start"))));
    }
    compare("start to the first message", "us", 9, probes);
}

fn messages(mut node: Option<&mut Node>) {
    const TRIPS: u32 = 5_000;
    const MANY: u32 = 100_000;
    let message = Message::of(&"x".repeat(60)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let group = here(ECHO_THREADS, 1);
    let process = runtime.block_on(in_a_process(ECHO_THREADS, 1));
    let trips = || {
        let start = Instant::now();
        runtime.block_on(async {
            for _ in 0..TRIPS {
                group.request(To::Any, &message).await.unwrap();
            }
        });
        start.elapsed().as_secs_f64() * 1e6 / f64::from(TRIPS)
    };
    let mut probes: Vec<Probe<'_>> = vec![("wrun, in this process", Box::new(trips))];
    if let Some(node) = &mut node {
        probes.push(("Node, `postMessage`", Box::new(|| node.ask(&format!("trip {TRIPS}")))));
    }
    compare("thread message, there and back, 64 B", "us", 9, probes);

    let many = |window: u32| {
        let start = Instant::now();
        let (mut sent, mut received) = (0, 0);
        runtime.block_on(async {
            while received < MANY {
                while sent < MANY && sent - received < window {
                    group.send(To::Any, &message).unwrap();
                    sent += 1;
                }
                assert!(group.recv().await.is_some());
                received += 1;
                while group.try_recv().is_some() {
                    received += 1;
                }
            }
        });
        f64::from(MANY) / start.elapsed().as_secs_f64()
    };
    let many_to_process = || {
        let start = Instant::now();
        let (mut sent, mut received) = (0, 0);
        runtime.block_on(async {
            while received < MANY {
                while sent < MANY && sent - received < 64 {
                    process.ready().await;
                    process.send(&message).unwrap();
                    sent += 1;
                }
                assert!(process.recv().await.is_some());
                received += 1;
                while process.try_recv().is_some() {
                    received += 1;
                }
            }
        });
        f64::from(MANY) / start.elapsed().as_secs_f64()
    };
    let mut probes: Vec<Probe<'_>> =
        vec![("wrun, in this process", Box::new(|| many(64))), ("wrun threads", Box::new(many_to_process))];
    if let Some(node) = &mut node {
        probes.push(("Node, `postMessage`", Box::new(|| node.ask(&format!("many {MANY} 64")))));
    }
    compare("thread messages, 64 in flight, 64 B", "/s", 7, probes);
}

fn ping_pong(mut node: Option<&mut Node>) {
    const ROUNDS: u32 = 20_000;
    let order = Message::parse(&format!(r#"{{"rounds":{ROUNDS}}}"#)).unwrap();
    let time_of = |text: &str| {
        let after = text.split_once("\"us_per_round\":").unwrap().1;
        after[..after.find('}').unwrap()].parse::<f64>().unwrap()
    };
    // each game is another group's: the players know each other for good
    let in_process = || {
        block_on(async {
            let mut command = Command::new(PINGPONG_THREADS);
            let data = order.clone();
            let child = command.cache(Cache::at(Some(&cache_dir()))).workers(2).data(data).fork().await.unwrap();
            time_of(child.recv().await.unwrap().as_str())
        })
    };
    let here = || {
        let group = here(PINGPONG_THREADS, 2);
        group.send_all(&order).unwrap();
        match block_on(group.recv()) {
            Some(Said::Answer { answer: Answer::Reply(reply), .. }) => time_of(reply.as_str()),
            other => panic!("{other:?}"),
        }
    };
    let native = || {
        let hits = Arc::new(AtomicU32::new(0));
        let main = std::thread::current();
        let theirs = hits.clone();
        let other = std::thread::spawn(move || {
            on_core(1);
            for _ in 0..ROUNDS {
                while theirs.load(Ordering::Acquire) % 2 != 1 {
                    std::thread::park();
                }
                theirs.fetch_add(1, Ordering::Release);
                main.unpark();
            }
        });
        let start = Instant::now();
        for _ in 0..ROUNDS {
            while !hits.load(Ordering::Acquire).is_multiple_of(2) {
                std::thread::park();
            }
            hits.fetch_add(1, Ordering::Release);
            other.thread().unpark();
        }
        other.join().unwrap();
        start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS)
    };
    let mut probes: Vec<Probe<'_>> = vec![
        ("wrun threads", Box::new(in_process)),
        ("wrun, in this process", Box::new(here)),
        ("native `park`", Box::new(native)),
    ];
    if let Some(node) = &mut node {
        probes.push(("Node, `Atomics.wait`", Box::new(|| node.ask(&format!("pong {ROUNDS}")))));
    }
    compare("wait and wake, there and back", "us", 9, probes);
}

fn stops() {
    let stop = |act: &str| {
        let group = here(HOSTILE_WORKERS_THREADS, 4);
        group.send_all(&Message::parse(&format!(r#"{{"do":"{act}"}}"#)).unwrap()).unwrap();
        // a moment in which they begin: what is measured is the end
        std::thread::sleep(std::time::Duration::from_millis(5));
        let start = Instant::now();
        group.terminate();
        block_on(group.wait());
        start.elapsed().as_secs_f64() * 1e3
    };
    for act in ["wait", "spin", "sleep"] {
        let probes: Vec<Probe<'_>> = vec![("wrun, in this process", Box::new(|| stop(act)))];
        compare(&format!("end of 4 threads that {act}"), "ms", 25, probes);
    }
}
