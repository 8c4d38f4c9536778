//! Keeps a core busy: the `n`th Fibonacci number, the slow way. `10` gives `{"n":10,"fib":55}`.

use serde::Serialize;
use wrun_guest::handler;

/// The last one that fits 64 bits.
const MAX: u32 = 93;

#[derive(Serialize)]
struct Answer {
    n: u32,
    fib: u64,
}

fn handle(n: u32) -> Result<Answer, String> {
    if n > MAX {
        return Err(format!("{n} is more than {MAX}"));
    }
    Ok(Answer { n, fib: fib(n) })
}

fn fib(n: u32) -> u64 {
    if n < 2 { n.into() } else { fib(n - 1) + fib(n - 2) }
}

handler!(handle);
