//! `sum-command THREADS START END`: adds up the numbers, each thread its part, and prints the total and the longest time
//! that a thread took.

use std::thread;

use threads::{slice, sum, timed};

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a number"));
    let (Some(count), Some(start), Some(end)) = (numbers.next(), numbers.next(), numbers.next()) else {
        panic!("expected THREADS START END");
    };
    let count = u32::try_from(count).expect("fewer threads");
    let parts = thread::scope(|scope| {
        let part = |index| scope.spawn(move || timed(|| sum(slice(&(start..end), (index, count)))));
        let parts: Vec<_> = (0..count).map(part).collect();
        parts.into_iter().map(|part| part.join().expect("it does not panic")).collect::<Vec<_>>()
    });
    let total = parts.iter().fold(0u64, |sum, (part, _)| sum.wrapping_add(*part));
    let longest = parts.iter().map(|(_, ms)| *ms).fold(0.0, f64::max);
    println!(r#"{{"total":{total},"compute_ms":{longest}}}"#);
}
