//! The supervisor: slots of process workers, started, watched, drained and replaced. Every mode that keeps workers
//! uses it.
//!
//! It knows nothing of tasks. A mode starts it with a way to make one worker, gets every frame that a worker sends and
//! every [`Step`] in a worker's life, and sends frames of its own. Decisions are in [`slot`] and [`restart`], which are
//! pure; here is what acts on them.

mod restart;
mod slot;

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

pub(crate) use self::restart::Policy;
pub use self::restart::Restart;
use self::{
    restart::Verdict,
    slot::{Death, Slot, State},
};
use crate::{
    event::{Event, WorkerId},
    outcome::{End, Outcome, Stage, Usage, millis},
    process::{
        Process, Seen,
        wire::{Frame, Kind},
    },
};

/// How often within the heartbeat time a worker is looked at. Looks are counted, not time: a primary that was itself
/// stopped for a while does not take its workers for dead.
const LOOKS: u32 = 5;

/// How a pool is watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch {
    /// When the dead return.
    pub(crate) policy: Policy,
    /// How long a worker may go without a sign of life.
    pub(crate) heartbeat: Duration,
    /// How long it may take to get ready.
    pub(crate) ready_within: Duration,
    /// How long it may take to end when it is asked to.
    pub(crate) grace: Duration,
}

/// Makes one worker: its slot and its generation.
pub(crate) type Launch = Box<dyn FnMut(WorkerId, u32) -> io::Result<Process> + Send>;

/// Hears of everything that happens.
pub(crate) type EventSink = Box<dyn FnMut(Event) + Send>;

/// A step in a worker's life that its mode must know.
#[derive(Debug)]
pub(crate) enum Step {
    /// It takes work.
    Online(WorkerId),
    /// It is gone. What it had begun is as its counters said.
    Gone {
        /// Its slot.
        worker: WorkerId,
        /// How it ended.
        outcome: Outcome,
        /// The highest task that it had begun.
        begun: u64,
    },
    /// No slot has a worker, and none will. How the last one ended when all have failed.
    Down(Option<Outcome>),
    /// Frames came or went.
    Progress,
}

/// A pool of workers.
pub(crate) struct Supervisor {
    seats: Vec<Seat>,
    watch: Watch,
    launch: Launch,
    events: EventSink,
    timer: Pin<Box<tokio::time::Sleep>>,
    next_look: Instant,
    kill_at: Option<Instant>,
    grace_exceeded: bool,
    last_failure: Option<Outcome>,
}

/// One slot and the process in it.
struct Seat {
    id: WorkerId,
    slot: Slot,
    process: Option<Process>,
    forked: Instant,
    tasks: u64,
    beats: u64,
    silent: u32,
    /// What is known of its end before the process is gone: what it said itself, or why we killed it.
    ending: Option<Ending>,
}

struct Ending {
    outcome: Outcome,
    death: Death,
}

impl Supervisor {
    /// Starts with `count` slots, all due now.
    pub(crate) fn new(count: u32, watch: Watch, launch: Launch, events: EventSink) -> Self {
        let now = Instant::now();
        let seat = |id| Seat {
            id,
            slot: Slot::new(now),
            process: None,
            forked: now,
            tasks: 0,
            beats: 0,
            silent: 0,
            ending: None,
        };
        Self {
            seats: (1..=count).map(seat).collect(),
            next_look: now + watch.heartbeat / LOOKS,
            watch,
            launch,
            events,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            kill_at: None,
            grace_exceeded: false,
            last_failure: None,
        }
    }

    /// Tells the world something.
    pub(crate) fn emit(&mut self, event: Event) {
        (self.events)(event);
    }

    /// Adds a frame to what a worker is sent with the next [`Supervisor::flush`]; a worker that is gone gets nothing.
    pub(crate) fn send(&mut self, worker: WorkerId, kind: Kind, id: u64, body: &[u8]) {
        if let Some(process) = &mut self.seat(worker).process {
            process.send(kind, id, body);
        }
    }

    /// Sends what waits, as far as that goes without waiting.
    pub(crate) fn flush(&mut self) {
        for seat in &mut self.seats {
            if let Some(process) = &mut seat.process {
                process.flush();
            }
        }
    }

    /// Notes that a worker answered so many more tasks.
    pub(crate) fn count_tasks(&mut self, worker: WorkerId, count: u64) {
        self.seat(worker).tasks += count;
    }

    /// Kills a worker to enforce one task's limit. Its slot does not pay for it.
    pub(crate) fn enforce(&mut self, worker: WorkerId, end: End) {
        self.end(worker, end, Death::Enforced);
    }

    /// Kills a worker that does not keep to the rules.
    pub(crate) fn reject(&mut self, worker: WorkerId, reason: String) {
        self.end(worker, End::Failed { stage: Stage::Protocol, reason, hint: None }, Death::Crash);
    }

    /// Notes how a worker says it ends, and lets it.
    pub(crate) fn note_end(&mut self, worker: WorkerId, outcome: Outcome) {
        let death = match &outcome.end {
            End::Exited { code: 0 } => Death::Clean,
            End::Failed { stage, .. } if stage.is_guests() => Death::Hopeless,
            _ => Death::Crash,
        };
        self.seat(worker).ending.get_or_insert(Ending { outcome, death });
    }

    /// Asks all workers to end when what they have is done, and kills those that have not after the grace time.
    pub(crate) fn drain(&mut self) {
        for seat in &mut self.seats {
            if seat.slot.drain() {
                (self.events)(Event::Disconnect { worker: seat.id });
                if let Some(process) = &mut seat.process {
                    process.send(Kind::Drain, 0, b"");
                }
            }
        }
        self.flush();
        self.kill_at.get_or_insert(Instant::now() + self.watch.grace);
    }

    /// Kills all workers; none returns.
    pub(crate) fn kill_all(&mut self) {
        for seat in &mut self.seats {
            seat.slot.drain();
            if let Some(process) = &mut seat.process {
                process.kill();
            }
        }
    }

    /// Whether workers had to be killed because the grace time was over.
    pub(crate) fn grace_exceeded(&self) -> bool {
        self.grace_exceeded
    }

    fn seat(&mut self, worker: WorkerId) -> &mut Seat {
        &mut self.seats[worker as usize - 1]
    }

    fn end(&mut self, worker: WorkerId, end: End, death: Death) {
        tracing::debug!("ending worker {worker}: {end}");
        let seat = self.seat(worker);
        let outcome = end.with(Usage::wall(seat.forked.elapsed()));
        seat.ending.get_or_insert(Ending { outcome, death });
        if let Some(process) = &mut seat.process {
            process.kill();
        }
    }

    /// Hands every frame of a worker to `take`, until there is a step to tell of.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, mut take: impl FnMut(WorkerId, Frame<'_>)) -> Poll<Step> {
        let now = Instant::now();
        if let Some(step) = self.act(now) {
            return Poll::Ready(step);
        }
        let mut progress = false;
        for at in 0..self.seats.len() {
            let seat = &mut self.seats[at];
            let Some(process) = &mut seat.process else { continue };
            let worker = seat.id;
            let mut ready = false;
            let seen = process.poll(cx, |frame| match frame.kind {
                Kind::Ready => ready = true,
                _ => take(worker, frame),
            });
            if ready && seat.slot.ready(now) {
                (self.events)(Event::Online { worker, pid: process.pid(), start_ms: millis(seat.forked.elapsed()) });
                // whatever else was seen will be seen again
                cx.waker().wake_by_ref();
                if let Poll::Ready(Seen::Gone(end)) = seen {
                    return Poll::Ready(self.gone(at, end));
                }
                return Poll::Ready(Step::Online(worker));
            }
            match seen {
                Poll::Pending => {}
                Poll::Ready(Seen::Progress) => progress = true,
                Poll::Ready(Seen::Broken(error)) => {
                    self.reject(worker, error.to_string());
                    progress = true;
                }
                Poll::Ready(Seen::Gone(end)) => return Poll::Ready(self.gone(at, end)),
            }
        }
        if progress {
            return Poll::Ready(Step::Progress);
        }
        let Some(next) = self.next_deadline() else {
            let all_failed = self.seats.iter().all(|seat| seat.slot.state() == State::Failed);
            return Poll::Ready(Step::Down(self.last_failure.take().filter(|_| all_failed)));
        };
        self.timer.as_mut().reset(next.into());
        match self.timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Step::Progress),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Does what is due.
    fn act(&mut self, now: Instant) -> Option<Step> {
        for at in 0..self.seats.len() {
            let seat = &mut self.seats[at];
            match seat.slot.state() {
                State::Waiting(due) if due <= now => {
                    if let Some(step) = self.fork(at, now) {
                        return Some(step);
                    }
                }
                State::Starting(since) if now.duration_since(since) >= self.watch.ready_within => {
                    let reason = format!("it was not ready after {:?}", self.watch.ready_within);
                    let worker = seat.id;
                    self.end(worker, End::Failed { stage: Stage::Start, reason, hint: None }, Death::Crash);
                }
                _ => {}
            }
        }
        if now >= self.next_look {
            self.next_look = now + self.watch.heartbeat / LOOKS;
            self.look_for_beats();
        }
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            for seat in &mut self.seats {
                if let Some(process) = &mut seat.process {
                    self.grace_exceeded = true;
                    process.kill();
                }
            }
        }
        None
    }

    fn fork(&mut self, at: usize, now: Instant) -> Option<Step> {
        let seat = &mut self.seats[at];
        tracing::debug!("starting worker {}", seat.id);
        seat.slot.start(now);
        let generation = seat.slot.generation();
        (seat.forked, seat.tasks, seat.beats, seat.silent, seat.ending) = (now, 0, 0, 0, None);
        match (self.launch)(seat.id, generation) {
            Ok(process) => {
                let pid = process.pid();
                seat.process = Some(process);
                (self.events)(Event::Fork { worker: seat.id, pid, generation });
                None
            }
            Err(error) => {
                let reason = format!("no process could be started: {error}");
                Some(self.gone(at, End::Failed { stage: Stage::Start, reason, hint: None }))
            }
        }
    }

    /// A worker whose counter stands still for the whole heartbeat time is stopped, or its process is stuck.
    fn look_for_beats(&mut self) {
        for seat in &mut self.seats {
            let Some(process) = &mut seat.process else { continue };
            let beats = process.page().beats();
            if beats != seat.beats {
                (seat.beats, seat.silent) = (beats, 0);
                continue;
            }
            seat.silent += 1;
            if seat.silent >= LOOKS {
                let reason = format!("no heartbeat for {:?}", self.watch.heartbeat);
                let end = End::Failed { stage: Stage::Hung, reason, hint: None };
                let outcome = end.with(Usage::wall(seat.forked.elapsed()));
                seat.ending.get_or_insert(Ending { outcome, death: Death::Crash });
                process.kill();
            }
        }
    }

    /// A process is gone: tells the world, and decides what becomes of its slot.
    fn gone(&mut self, at: usize, end: End) -> Step {
        let seat = &mut self.seats[at];
        let worker = seat.id;
        let (pid, begun) = seat.process.take().map_or((0, 0), |process| (process.pid(), process.page().begun()));
        let Ending { mut outcome, death } = seat.ending.take().unwrap_or_else(|| {
            let death = if end == (End::Exited { code: 0 }) { Death::Clean } else { Death::Crash };
            Ending { outcome: end.with(Usage::wall(seat.forked.elapsed())), death }
        });
        outcome.voluntary = seat.slot.state() == State::Draining;
        if pid != 0 {
            (self.events)(Event::Exit { worker, pid, tasks: seat.tasks, outcome: outcome.clone() });
        }
        match seat.slot.died(&self.watch.policy, Instant::now(), death, jitter()) {
            Verdict::Start { after, in_a_row } => {
                (self.events)(Event::Restart { worker, after_ms: millis(after), deaths: in_a_row });
            }
            Verdict::GiveUp => {
                (self.events)(Event::Failed { worker, outcome: outcome.clone() });
                self.last_failure = Some(outcome.clone());
            }
            Verdict::Leave => {}
        }
        Step::Gone { worker, outcome, begun }
    }

    /// When something will be due; none when there is nothing left to wait for.
    fn next_deadline(&self) -> Option<Instant> {
        let due = self.seats.iter().filter_map(|seat| match seat.slot.state() {
            State::Waiting(due) => Some(due),
            State::Starting(since) => Some((since + self.watch.ready_within).min(self.next_look)),
            State::Ready(_) | State::Draining => Some(self.next_look),
            State::Exited | State::Failed => None,
        });
        due.chain(self.kill_at.filter(|_| self.seats.iter().any(|seat| seat.process.is_some()))).min()
    }
}

/// From 0 to 1.
fn jitter() -> f64 {
    let mut byte = [0];
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::empty());
    f64::from(byte[0]) / 255.0
}
