//! The thread beside a worker's guest, for all that must not wait for it: the heartbeat, replies that lie ready while
//! the next task computes, the epoch clock, an eye on the primary, and one on guests that never come back from the host.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use super::output::Lines;
use crate::{
    outcome::{End, Stage, Usage},
    process::{Page, child::Out, wire::Kind},
    sandbox::Ticker,
};

/// How long a reply may lie ready, at most.
const FLUSH: Duration = Duration::from_millis(1);

/// How long it goes on looking that often when there is nothing to do.
const LINGER: Duration = Duration::from_millis(20);

/// How often a guest with epoch checks gives way.
const TICK: Duration = Duration::from_millis(10);

/// How long a guest may stay in one call of the host when others wait for its thread. Its own code gives way at every
/// tick, and what the host waits for is waited for aside.
const STUCK: Duration = Duration::from_secs(5);

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
    /// Goes up when a guest that shares its thread is entered, and when it is left.
    entries: AtomicU64,
}

/// While there is one, the epoch clock runs.
pub(super) struct Timed(Arc<Shared>);

impl Drop for Timed {
    fn drop(&mut self) {
        self.0.timed.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Timed {
    /// Lets a guest run on this thread until it gives way. The worker ends when that takes too long.
    pub(super) fn enter<T>(&self, run: impl FnOnce() -> T) -> T {
        self.0.entries.fetch_add(1, Ordering::Relaxed);
        let result = run();
        self.0.entries.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl Pulse {
    /// Starts the thread, which beats every `beat`.
    pub(super) fn start(
        page: Arc<Page>,
        out: Arc<Out>,
        lines: Option<Arc<Lines>>,
        ticker: Option<Ticker>,
        beat: Duration,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let handle = std::thread::Builder::new()
            .name("wrun-pulse".into())
            .stack_size(64 << 10)
            .spawn(move || theirs.run(&page, &out, lines.as_deref(), ticker.as_ref(), beat))?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    /// There is work that it must look after for the next moments.
    pub(super) fn touch(&self) {
        self.shared.touched.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// A task begins that the epoch clock must end in time.
    pub(super) fn time(&self) -> Timed {
        self.shared.timed.fetch_add(1, Ordering::SeqCst);
        self.wake();
        Timed(self.shared.clone())
    }

    fn wake(&self) {
        // The exchange is there so that one wake-up is paid per sleep, not per call. One order for all of these: the thread
        // says that it sleeps and then looks for work, and here there is work and then a look whether it sleeps.
        if self.shared.asleep.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

impl Shared {
    fn run(&self, page: &Page, out: &Out, lines: Option<&Lines>, ticker: Option<&Ticker>, beat: Duration) {
        let (mut last_beat, mut last_tick, mut busy_until) = (None::<Instant>, Instant::now(), Instant::now());
        let mut entered = (0, Instant::now());
        loop {
            let now = Instant::now();
            if last_beat.is_none_or(|at| now.duration_since(at) >= beat) {
                last_beat = Some(now);
                page.beat();
                lines.into_iter().for_each(Lines::tell);
                // the parent-death signal should have come first; this is for the kernel that sends none
                if out.is_cut() {
                    std::process::exit(125);
                }
                let entries = self.entries.load(Ordering::Relaxed);
                if entries != entered.0 {
                    entered = (entries, now);
                } else if entries % 2 == 1 && now.duration_since(entered.1) >= STUCK {
                    end_stuck(out);
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
                self.asleep.store(true, Ordering::SeqCst);
                if !self.touched.load(Ordering::SeqCst) && self.timed.load(Ordering::SeqCst) == 0 {
                    std::thread::park_timeout(beat);
                }
                self.asleep.store(false, Ordering::Release);
            }
        }
    }
}

/// Ends a worker whose guest is stuck in the host; nothing inside of the process could end that call.
#[expect(clippy::exit, reason = "the thread that would return is stuck")]
fn end_stuck(out: &Out) {
    let reason = format!("its guest was stuck in the host for {STUCK:?}");
    let outcome = End::Failed { stage: Stage::Hung, reason, hint: None }.with(Usage::default());
    out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
    out.finish();
    std::process::exit(outcome.end.exit_code().into());
}
