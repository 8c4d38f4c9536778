//! Computes for benches: `{"kernel":"sum"}` and the like, to be told to all workers. They begin together, each does its part
//! (of `fib` all of it), and replies with the time that it took, `{"ms":…}`.
//!
//! `{"kernel":"spawn","count":N}` makes so many threads, one after the other, and replies with the time of one.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, OnceLock};
use std::thread;

use serde::{Deserialize, Serialize};
use threads::{part, slice, timed};
use wrun_guest::handler;

mod kernel;

#[derive(Deserialize)]
#[serde(tag = "kernel", rename_all = "lowercase")]
enum Order {
    Sum { numbers: u64 },
    Map { numbers: u32 },
    Mandelbrot { size: u32 },
    Fib { n: u32 },
    Spawn { count: u32 },
}

#[derive(Serialize)]
struct Took {
    ms: f64,
}

/// Where the workers begin together.
static START: OnceLock<Barrier> = OnceLock::new();

/// The next rows that nobody draws, sixteen to a piece of work.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// What is mapped, once for all rounds; each worker has a part of its own.
static NUMBERS: Mutex<Vec<f64>> = Mutex::new(vec![]);

const PIECES: u32 = 16;

fn handle(order: Order) -> Result<Took, String> {
    let (index, count) = part();
    if let Order::Spawn { count } = order {
        let ((), ms) = timed(|| (0..count).for_each(|_| thread::spawn(|| ()).join().expect("it does not panic")));
        return Ok(Took { ms: ms / f64::from(count) });
    }
    let start = START.get_or_init(|| Barrier::new(count as usize));
    if let Order::Map { numbers } = order {
        let mut all = NUMBERS.lock().expect("nobody panics");
        if all.len() != numbers as usize {
            *all = (0..numbers).map(f64::from).collect();
        }
    }
    if start.wait().is_leader() {
        NEXT.store(0, Ordering::Relaxed);
    }
    start.wait();
    let ((), ms) = match order {
        Order::Sum { numbers } => timed(|| {
            let part = slice(&(0..numbers), (index, count));
            black_box(kernel::kernel_sum(part.start, part.end));
        }),
        Order::Map { numbers } => {
            let part = slice(&(0..numbers.into()), (index, count));
            let [first, last] = [part.start, part.end].map(|at| usize::try_from(at).expect("within the numbers"));
            let own = NUMBERS.lock().expect("nobody panics").as_mut_ptr();
            // SAFETY: the parts lie within the numbers and have nothing in common; nobody changes their length meanwhile
            timed(|| unsafe { kernel::kernel_map(own.add(first), last - first) })
        }
        Order::Mandelbrot { size } => timed(|| {
            loop {
                let piece = NEXT.fetch_add(1, Ordering::Relaxed);
                if piece >= PIECES {
                    break;
                }
                let (first, last) = (piece * size / PIECES, (piece + 1) * size / PIECES);
                black_box(kernel::kernel_mandelbrot(size, first, last, 200));
            }
        }),
        Order::Fib { n } => timed(|| {
            black_box(kernel::kernel_fib(n));
        }),
        Order::Spawn { .. } => unreachable!("done above"),
    };
    Ok(Took { ms })
}

handler!(handle);
