//! Counts how often each of 16 values comes up among `values` numbers that look random: `{"values":1000}` gives
//! `{"counts":[…]}`, from counters that all workers add to. The last to finish replies.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use threads::{part, slice};
use wrun_guest::handler;

#[derive(Deserialize)]
struct Numbers {
    values: u64,
}

#[derive(Serialize)]
struct Histogram {
    counts: [u64; 16],
}

static COUNTS: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static FINISHED: AtomicU32 = AtomicU32::new(0);

/// The first step of `SplitMix64`: neighbours have little in common.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 60
}

fn handle(Numbers { values }: Numbers) -> Option<Result<Histogram, String>> {
    let (index, count) = part();
    for number in slice(&(0..values), (index, count)) {
        let value = usize::try_from(scatter(number)).expect("four bits");
        COUNTS[value].fetch_add(1, Ordering::Relaxed);
    }
    if FINISHED.fetch_add(1, Ordering::AcqRel) + 1 < count {
        return None;
    }
    FINISHED.store(0, Ordering::Relaxed);
    Some(Ok(Histogram { counts: COUNTS.each_ref().map(|counter| counter.swap(0, Ordering::Relaxed)) }))
}

handler!(handle);
