//! The thread beside a worker's guest, for all that must not wait for it: the heartbeat, replies that lie ready while
//! the next task computes, the epoch clock, and an eye on the primary.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use super::output::Lines;
use crate::{
    process::{Page, child::Out},
    sandbox::Ticker,
};

/// How long a reply may lie ready, at most.
const FLUSH: Duration = Duration::from_millis(1);

/// How long it goes on looking that often when there is nothing to do.
const LINGER: Duration = Duration::from_millis(20);

/// How often a guest with epoch checks gives way.
const TICK: Duration = Duration::from_millis(10);

/// A handle to the thread.
#[derive(Clone)]
pub(super) struct Pulse {
    shared: Arc<Shared>,
    thread: Thread,
}

#[derive(Default)]
struct Shared {
    asleep: AtomicBool,
    touched: AtomicBool,
    /// How many tasks need the epoch clock.
    timed: AtomicU32,
}

/// While there is one, the epoch clock runs.
pub(super) struct Timed<'a>(&'a Shared);

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.0.timed.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pulse {
    /// Starts the thread, which beats every `beat`.
    pub(super) fn start(
        page: Arc<Page>,
        out: Arc<Out>,
        lines: Arc<Lines>,
        ticker: Option<Ticker>,
        beat: Duration,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let handle = std::thread::Builder::new()
            .name("wrun-pulse".into())
            .stack_size(64 << 10)
            .spawn(move || theirs.run(&page, &out, &lines, ticker.as_ref(), beat))?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    /// There is work that it must look after for the next moments.
    pub(super) fn touch(&self) {
        self.shared.touched.store(true, Ordering::Relaxed);
        // the exchange is there so that one wake-up is paid per sleep, not per call
        if self.shared.asleep.swap(false, Ordering::AcqRel) {
            self.thread.unpark();
        }
    }
}

impl Pulse {
    /// A task begins that the epoch clock must end in time.
    pub(super) fn time(&self) -> Timed<'_> {
        self.shared.timed.fetch_add(1, Ordering::Relaxed);
        self.touch();
        Timed(&self.shared)
    }
}

impl Shared {
    fn run(&self, page: &Page, out: &Out, lines: &Lines, ticker: Option<&Ticker>, beat: Duration) {
        let (mut last_beat, mut last_tick, mut busy_until) = (None::<Instant>, Instant::now(), Instant::now());
        loop {
            let now = Instant::now();
            if last_beat.is_none_or(|at| now.duration_since(at) >= beat) {
                last_beat = Some(now);
                page.beat();
                lines.tell();
                // the parent-death signal should have come first; this is for the kernel that sends none
                if out.is_cut() {
                    std::process::exit(125);
                }
            }
            if let Some(ticker) = ticker
                && now.duration_since(last_tick) >= TICK
            {
                last_tick = now;
                ticker.tick();
            }
            // an error here is met again by the thread that reads
            let all_written = out.flush().unwrap_or(true);
            if self.touched.swap(false, Ordering::Relaxed) || !all_written {
                busy_until = now + LINGER;
            }
            if now < busy_until {
                std::thread::sleep(FLUSH);
            } else if self.timed.load(Ordering::Relaxed) > 0 {
                std::thread::sleep(TICK);
            } else {
                self.asleep.store(true, Ordering::Release);
                if !self.touched.load(Ordering::Acquire) {
                    std::thread::park_timeout(beat);
                }
                self.asleep.store(false, Ordering::Release);
            }
        }
    }
}
