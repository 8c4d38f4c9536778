//! wrun's guests with threads, and what they have in common. Each file beside this one is a guest of its own: an example of
//! this package, built as a `cdylib`; those in `bin` are commands.

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use wrun_guest::worker::{self, Kind};

/// Which part of the work is this worker's, and of how many: all of it, unless it has its memory in common with others.
#[must_use]
pub fn part() -> (u32, u32) {
    let identity = worker::identity();
    match identity.kind {
        Kind::Thread => (identity.id - 1, identity.count),
        Kind::Process => (0, 1),
    }
}

/// One of `count` parts of a range, as even as they can be.
///
/// # Panics
///
/// Never: a part lies within its range.
#[must_use]
pub fn slice(range: &Range<u64>, (index, count): (u32, u32)) -> Range<u64> {
    let length = u128::from(range.end.saturating_sub(range.start));
    let bound = |index: u32| {
        let offset = length * u128::from(index) / u128::from(count);
        range.start + u64::try_from(offset).expect("no further than the end")
    };
    bound(index)..bound(index + 1)
}

/// Adds up a range, number by number: the compiler would know a formula.
#[must_use]
pub fn sum(range: Range<u64>) -> u64 {
    range.fold(0, |sum, number| sum.wrapping_add(black_box(number)))
}

/// Runs something, and answers how long it took, in milliseconds.
pub fn timed<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let started = Instant::now();
    let value = run();
    (value, started.elapsed().as_secs_f64() * 1000.0)
}
