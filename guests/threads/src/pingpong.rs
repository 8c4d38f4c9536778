//! Two workers wake each other, in turn: `{"rounds":1000}` gives `{"rounds":1000,"us_per_round":…}`, from the first.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};

use serde::{Deserialize, Serialize};
use threads::{part, timed};
use wrun_guest::handler;

#[derive(Deserialize)]
struct Game {
    rounds: u32,
}

#[derive(Serialize)]
struct Played {
    rounds: u32,
    us_per_round: f64,
}

static PLAYERS: [OnceLock<Thread>; 2] = [const { OnceLock::new() }; 2];

/// How often the ball was hit: the first player hits at even numbers.
static HITS: AtomicU64 = AtomicU64::new(0);

fn handle(Game { rounds }: Game) -> Option<Result<Played, String>> {
    let (index, count) = part();
    if count != 2 {
        return Some(Err(format!("expected 2 workers, found {count}")));
    }
    let (me, other) = (u64::from(index), 1 - index as usize);
    let _ = PLAYERS[index as usize].set(thread::current());
    let opponent = PLAYERS[other].wait();
    let ((), ms) = timed(|| {
        for _ in 0..rounds {
            while HITS.load(Ordering::Acquire) % 2 != me {
                thread::park();
            }
            HITS.fetch_add(1, Ordering::Release);
            opponent.unpark();
        }
    });
    (me == 0).then(|| Ok(Played { rounds, us_per_round: ms * 1000.0 / f64::from(rounds) }))
}

handler!(handle);
