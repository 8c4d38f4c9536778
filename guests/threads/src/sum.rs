//! Adds up all numbers from `start` to `end`: `{"start":0,"end":10}` gives `{"total":45,"compute_ms":…}`.
//!
//! Each worker adds up its part, and the last to finish replies for all of them, with the time that its own part took.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use threads::{part, slice, sum, timed};
use wrun_guest::handler;

#[derive(Deserialize)]
struct Numbers {
    start: u64,
    end: u64,
}

#[derive(Serialize)]
struct Sum {
    total: u64,
    compute_ms: f64,
}

/// What those have found who have finished, and how many they are.
static TOTAL: AtomicU64 = AtomicU64::new(0);
static FINISHED: AtomicU32 = AtomicU32::new(0);

fn handle(Numbers { start, end }: Numbers) -> Option<Result<Sum, String>> {
    let (index, count) = part();
    let (found, compute_ms) = timed(|| sum(slice(&(start..end), (index, count))));
    TOTAL.fetch_add(found, Ordering::Relaxed);
    if FINISHED.fetch_add(1, Ordering::AcqRel) + 1 < count {
        return None;
    }
    FINISHED.store(0, Ordering::Relaxed);
    Some(Ok(Sum { total: TOTAL.swap(0, Ordering::Relaxed), compute_ms }))
}

handler!(handle);
