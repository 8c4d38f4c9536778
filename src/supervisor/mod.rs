//! The supervisor: slots of process workers, started, watched, drained and replaced. Every mode that keeps workers
//! uses it.
//!
//! It knows nothing of tasks and requests. A mode starts it with a way to make one worker, gets every frame that is
//! about its work and every [`Step`] in a worker's life, and sends frames of its own. Decisions are in [`slot`] and
//! [`restart`], which are pure; here is what acts on them.
//!
//! A slot has one worker that does its work. Beside it there may be a *successor*, started to take over when it is
//! ready (of this slot alone, or of all in a reload: then all take over together or none does), and workers that were
//! taken over from and finish what they have.

mod restart;
mod slot;
mod worker;

use std::{
    future::Future,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

pub(crate) use self::restart::Policy;
pub use self::restart::Restart;
use self::{
    restart::Verdict,
    slot::{Death, Slot, State},
    worker::{Take, Worker},
};
use crate::{
    event::{Event, WorkerId},
    limits::Bytes,
    outcome::{End, Outcome, Stage, Usage, millis},
    process::{
        Process, Seen,
        wire::{Frame, Kind},
    },
};

/// How often within the heartbeat time a worker is looked at. Looks are counted, not time: a primary that was itself
/// stopped for a while does not take its workers for dead.
const LOOKS: u32 = 5;

/// How long a connection without a request may still bring one when its worker was taken over from: whoever sends one
/// at that very moment must not find it closed.
const LINGER: Duration = Duration::from_secs(1);

/// How long a worker that wants a successor waits after one could not be started, and how long one that was started for
/// the memory of its predecessor may have as much.
const NEXT_TRY: Duration = Duration::from_secs(10);

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
    /// The memory at which a worker gets a successor.
    pub(crate) memory_max: Option<Bytes>,
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
    /// A reload is over: all successors have taken over, or none has, for this reason.
    Reloaded(Result<(), String>),
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
    /// What makes the successors while all are being replaced; it makes all workers when they have taken over.
    reload: Option<Launch>,
    events: EventSink,
    timer: Pin<Box<tokio::time::Sleep>>,
    next_look: Instant,
    kill_at: Option<Instant>,
    grace_exceeded: bool,
    /// Whether it was told which walls are missing: the system is the same for all workers.
    walls_told: bool,
    last_failure: Option<Outcome>,
}

/// One slot and the processes in it.
struct Seat {
    id: WorkerId,
    slot: Slot,
    /// Does the slot's work.
    current: Option<Worker>,
    /// Is to take over.
    successor: Option<Worker>,
    /// Were taken over from.
    former: Vec<Worker>,
    /// Before this no successor is started for this slot alone.
    next_try: Instant,
    /// Before this no memory is too much: a limit below what every worker needs must not start one after the other.
    next_growth: Instant,
}

impl Seat {
    fn workers(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.current.iter_mut().chain(&mut self.successor).chain(&mut self.former)
    }

    /// The successor is wanted no more.
    fn dismiss_successor(&mut self) {
        if let Some(mut successor) = self.successor.take() {
            successor.process.kill();
            self.former.push(successor);
        }
    }
}

impl Supervisor {
    /// Starts with `count` slots, all due now.
    pub(crate) fn new(count: u32, watch: Watch, launch: Launch, events: EventSink) -> Self {
        let now = Instant::now();
        let seat = |id| Seat {
            id,
            slot: Slot::new(now),
            current: None,
            successor: None,
            former: vec![],
            next_try: now,
            next_growth: now,
        };
        Self {
            seats: (1..=count).map(seat).collect(),
            next_look: now + watch.heartbeat / LOOKS,
            watch,
            launch,
            reload: None,
            events,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            kill_at: None,
            grace_exceeded: false,
            walls_told: false,
            last_failure: None,
        }
    }

    /// Tells the world something.
    pub(crate) fn emit(&mut self, event: Event) {
        (self.events)(event);
    }

    /// Adds a frame to what a worker is sent with the next [`Supervisor::flush`]; a worker that is gone gets nothing.
    pub(crate) fn send(&mut self, worker: WorkerId, kind: Kind, id: u64, body: &[u8]) {
        if let Some(worker) = &mut self.seat(worker).current {
            worker.process.send(kind, id, body);
        }
    }

    /// As [`Supervisor::send`], with a descriptor.
    pub(crate) fn send_with(&mut self, worker: WorkerId, kind: Kind, id: u64, body: &[u8], fd: OwnedFd) {
        if let Some(worker) = &mut self.seat(worker).current {
            worker.process.send_with(kind, id, body, fd);
        }
    }

    /// Sends what waits, as far as that goes without waiting.
    pub(crate) fn flush(&mut self) {
        self.seats.iter_mut().flat_map(Seat::workers).for_each(|worker| worker.process.flush());
    }

    /// Notes that a worker answered so many more tasks.
    pub(crate) fn count_tasks(&mut self, worker: WorkerId, count: u64) {
        if let Some(worker) = &mut self.seat(worker).current {
            worker.tasks += count;
        }
    }

    /// Kills a worker to enforce one task's limit. Its slot does not pay for it.
    pub(crate) fn enforce(&mut self, worker: WorkerId, end: End) {
        if let Some(worker) = &mut self.seat(worker).current {
            worker.end(end, Death::Enforced);
        }
    }

    /// Starts a successor for each slot, made by `launch`. When all of them are ready they take over, and their
    /// predecessors finish what they have; if one is not, none takes over. Either way a [`Step::Reloaded`] tells.
    ///
    /// Not to be called while another reload is under way, or after a drain.
    pub(crate) fn reload(&mut self, launch: Launch) {
        debug_assert!(self.reload.is_none(), "one reload at a time");
        self.reload = Some(launch);
        for at in 0..self.seats.len() {
            // it was for this slot alone, and of the old kind
            self.seats[at].dismiss_successor();
            self.start_successor(at);
        }
    }

    /// Asks all workers to end when what they have is done, and kills those that have not after the grace time.
    pub(crate) fn drain(&mut self) {
        for seat in &mut self.seats {
            if seat.slot.drain() {
                (self.events)(Event::Disconnect { worker: seat.id });
                if let Some(worker) = &mut seat.current {
                    worker.process.send(Kind::Drain, 0, b"");
                }
            }
            // those that were taken over from wait no longer for connections that bring nothing
            seat.former.iter_mut().for_each(|worker| worker.process.send(Kind::Drain, 0, b""));
            seat.dismiss_successor();
        }
        self.reload = None;
        self.flush();
        self.kill_at.get_or_insert(Instant::now() + self.watch.grace);
    }

    /// Kills all workers; none returns.
    pub(crate) fn kill_all(&mut self) {
        self.reload = None;
        for seat in &mut self.seats {
            seat.slot.drain();
            seat.dismiss_successor();
            seat.workers().for_each(|worker| worker.process.kill());
        }
    }

    /// Whether workers had to be killed because the grace time was over.
    pub(crate) fn grace_exceeded(&self) -> bool {
        self.grace_exceeded
    }

    /// The slots whose workers nobody takes the place of, unless a reload brings some.
    pub(crate) fn vacant(&self) -> impl Iterator<Item = WorkerId> {
        let is_vacant = |seat: &&Seat| matches!(seat.slot.state(), State::Failed | State::Exited);
        self.seats.iter().filter(is_vacant).map(|seat| seat.id)
    }

    fn seat(&mut self, worker: WorkerId) -> &mut Seat {
        &mut self.seats[worker as usize - 1]
    }

    /// Hands every frame about its mode's work to `take`, until there is a step to tell of. A worker whose frame is
    /// refused is killed.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(WorkerId, Frame<'_>) -> Result<(), String>,
    ) -> Poll<Step> {
        let now = Instant::now();
        if let Some(step) = self.act(now) {
            return Poll::Ready(step);
        }
        let mut progress = false;
        for at in 0..self.seats.len() {
            progress |= self.poll_former(at, cx, &mut take);
            match self.poll_successor(at, cx, &mut take) {
                Poll::Ready(Some(step)) => {
                    // whatever else was seen will be seen again
                    cx.waker().wake_by_ref();
                    return Poll::Ready(step);
                }
                Poll::Ready(None) => progress = true,
                Poll::Pending => {}
            }
            let Self { seats, events, walls_told, .. } = self;
            let Seat { id, slot, current, .. } = &mut seats[at];
            let id = *id;
            let Some(worker) = current else { continue };
            let seen = worker.poll(cx, id, events, &mut take);
            if worker.ready && slot.ready(now) {
                if let Some(missing) = worker.missing_walls.take()
                    && !std::mem::replace(walls_told, true)
                {
                    let message = format!("workers do without a wall: {missing}");
                    events(Event::Error { worker: None, message });
                }
                let start_ms = millis(worker.age());
                events(Event::Online { worker: id, pid: worker.process.pid(), start_ms });
                worker.process.send(Kind::Open, 0, b"");
                cx.waker().wake_by_ref();
                if let Poll::Ready(Seen::Gone(end)) = seen {
                    return Poll::Ready(self.gone(at, end));
                }
                return Poll::Ready(Step::Online(id));
            }
            match seen {
                Poll::Pending => {}
                Poll::Ready(Seen::Progress) => progress = true,
                Poll::Ready(Seen::Broken(error)) => {
                    worker.reject(error.to_string());
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

    /// Looks at a slot's successor: the step that it led to, or that something moved.
    fn poll_successor(&mut self, at: usize, cx: &mut Context<'_>, take: &mut Take<'_>) -> Poll<Option<Step>> {
        let Self { seats, events, .. } = self;
        let Seat { id, successor: Some(worker), .. } = &mut seats[at] else { return Poll::Pending };
        let was_ready = worker.ready;
        let seen = worker.poll(cx, *id, events, take);
        if worker.ready && !was_ready {
            let start_ms = millis(worker.age());
            events(Event::Online { worker: *id, pid: worker.process.pid(), start_ms });
        }
        match seen {
            Poll::Ready(Seen::Gone(end)) => return Poll::Ready(self.successor_gone(at, end)),
            Poll::Ready(Seen::Broken(error)) => worker.reject(error.to_string()),
            Poll::Ready(Seen::Progress) | Poll::Pending => {}
        }
        match self.take_over(at) {
            Some(step) => Poll::Ready(Some(step)),
            None if seen.is_ready() => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// Looks at those of a slot that were taken over from; whether anything moved.
    fn poll_former(&mut self, at: usize, cx: &mut Context<'_>, take: &mut Take<'_>) -> bool {
        let Self { seats, events, .. } = self;
        let Seat { id, former, .. } = &mut seats[at];
        let mut progress = false;
        former.retain_mut(|worker| match worker.poll(cx, *id, events, take) {
            Poll::Pending => true,
            Poll::Ready(Seen::Progress) => {
                progress = true;
                true
            }
            Poll::Ready(Seen::Broken(error)) => {
                worker.reject(error.to_string());
                progress = true;
                true
            }
            Poll::Ready(Seen::Gone(end)) => {
                tell_exit(events, *id, worker, end, true);
                progress = true;
                false
            }
        });
        progress
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
                    let end = not_ready(self.watch.ready_within);
                    seat.current.iter_mut().for_each(|worker| worker.end(end.clone(), Death::Crash));
                }
                _ => {}
            }
            let seat = &mut self.seats[at];
            for worker in seat.successor.iter_mut().filter(|worker| !worker.ready) {
                if now.duration_since(worker.forked) >= self.watch.ready_within {
                    worker.end(not_ready(self.watch.ready_within), Death::Crash);
                }
            }
            for worker in seat.former.iter_mut().filter(|worker| worker.kill_at.is_some_and(|at| at <= now)) {
                worker.kill_at = None;
                worker.process.kill();
            }
            self.recycle(at, now);
        }
        if self.reload.is_some() && self.seats.iter().any(|seat| seat.successor.is_none()) {
            return Some(self.give_up_reload("not every successor could be started".into()));
        }
        if now >= self.next_look {
            self.next_look = now + self.watch.heartbeat / LOOKS;
            self.look();
        }
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            for worker in self.seats.iter_mut().flat_map(Seat::workers) {
                self.grace_exceeded = true;
                worker.process.kill();
            }
        }
        None
    }

    fn fork(&mut self, at: usize, now: Instant) -> Option<Step> {
        let seat = &mut self.seats[at];
        tracing::debug!("starting worker {}", seat.id);
        seat.slot.start(now);
        let generation = seat.slot.generation();
        match (self.launch)(seat.id, generation) {
            Ok(process) => {
                (self.events)(Event::Fork { worker: seat.id, pid: process.pid(), generation });
                seat.current = Some(Worker::new(process, now));
                None
            }
            Err(error) => Some(self.gone(at, not_started(&error))),
        }
    }

    /// Starts a worker that is to take over a slot.
    fn start_successor(&mut self, at: usize) {
        let seat = &mut self.seats[at];
        let generation = seat.slot.succeed();
        tracing::debug!("starting generation {generation} of worker {}", seat.id);
        let now = Instant::now();
        match self.reload.as_mut().unwrap_or(&mut self.launch)(seat.id, generation) {
            Ok(process) => {
                (self.events)(Event::Fork { worker: seat.id, pid: process.pid(), generation });
                seat.successor = Some(Worker::new(process, now));
            }
            Err(error) => {
                seat.next_try = now + NEXT_TRY;
                let message = format!("a successor {}", not_started(&error));
                (self.events)(Event::Error { worker: Some(seat.id), message });
            }
        }
    }

    /// Starts a successor for a worker that wants one, unless all are being replaced anyhow.
    fn recycle(&mut self, at: usize, now: Instant) {
        let seat = &mut self.seats[at];
        let wanted = seat.current.as_ref().and_then(|worker| worker.wants_successor.clone());
        let Some(reason) = wanted else { return };
        let is_time = matches!(seat.slot.state(), State::Ready(_)) && seat.successor.is_none() && seat.next_try <= now;
        if is_time && self.reload.is_none() {
            tracing::debug!("worker {} gets a successor: {reason}", seat.id);
            self.start_successor(at);
        }
    }

    /// A successor died before it took over.
    fn successor_gone(&mut self, at: usize, end: End) -> Option<Step> {
        let Self { seats, events, .. } = self;
        let seat = &mut seats[at];
        let mut worker = seat.successor.take()?;
        let outcome = tell_exit(events, seat.id, &mut worker, end, false);
        if self.reload.is_some() {
            return Some(self.give_up_reload(format!("worker {} {outcome}", at + 1)));
        }
        seat.next_try = Instant::now() + NEXT_TRY;
        let message = format!("its successor {outcome}, so it goes on");
        (self.events)(Event::Error { worker: Some(seat.id), message });
        None
    }

    fn give_up_reload(&mut self, reason: String) -> Step {
        self.reload = None;
        self.seats.iter_mut().for_each(Seat::dismiss_successor);
        Step::Reloaded(Err(reason))
    }

    /// Lets successors take over: that of one slot when it is ready, or those of all when all are.
    fn take_over(&mut self, at: usize) -> Option<Step> {
        if self.reload.is_none() {
            if self.seats[at].successor.as_ref().is_some_and(|worker| worker.ready) {
                self.switch(at);
                return Some(Step::Online(self.seats[at].id));
            }
            return None;
        }
        if self.seats.iter().all(|seat| seat.successor.as_ref().is_some_and(|worker| worker.ready)) {
            (0..self.seats.len()).for_each(|at| self.switch(at));
            self.launch = self.reload.take().expect("looked at above");
            return Some(Step::Reloaded(Ok(())));
        }
        None
    }

    fn switch(&mut self, at: usize) {
        let now = Instant::now();
        let seat = &mut self.seats[at];
        let mut successor = seat.successor.take().expect("it is ready");
        successor.process.send(Kind::Open, 0, b"");
        seat.slot.replaced(now);
        if let Some(mut predecessor) = seat.current.replace(successor) {
            (self.events)(Event::Disconnect { worker: seat.id });
            predecessor.process.send(Kind::Drain, millis(LINGER.min(self.watch.grace / 2)), b"");
            predecessor.kill_at = Some(now + self.watch.grace);
            seat.former.push(predecessor);
        }
        seat.workers().for_each(|worker| worker.process.flush());
    }

    /// Looks whether all are alive, and none has grown too large.
    fn look(&mut self) {
        let heartbeat = self.watch.heartbeat;
        for worker in self.seats.iter_mut().flat_map(Seat::workers) {
            if worker.is_silent(LOOKS) {
                let reason = format!("no heartbeat for {heartbeat:?}");
                worker.end(End::Failed { stage: Stage::Hung, reason, hint: None }, Death::Crash);
            }
        }
        let Some(max) = self.watch.memory_max else { return };
        let now = Instant::now();
        for seat in self.seats.iter_mut().filter(|seat| seat.next_growth <= now) {
            let Some(worker) = seat.current.as_mut().filter(|worker| worker.wants_successor.is_none()) else {
                continue;
            };
            if let Some(resident) = worker.resident().filter(|resident| *resident > max.0) {
                seat.next_growth = now + NEXT_TRY;
                worker.wants_successor = Some(format!("its process has {}, more than {max}", Bytes(resident)));
            }
        }
    }

    /// A slot's worker is gone: tells the world, and decides what becomes of the slot.
    fn gone(&mut self, at: usize, end: End) -> Step {
        let Self { seats, events, .. } = self;
        let seat = &mut seats[at];
        let worker = seat.id;
        let voluntary = seat.slot.state() == State::Draining;
        let (outcome, death, begun) = match seat.current.take() {
            Some(mut gone) => {
                let (mut outcome, death) = gone.ended(end);
                outcome.voluntary = voluntary;
                let (pid, tasks) = (gone.process.pid(), gone.done());
                events(Event::Exit { worker, pid, tasks, outcome: outcome.clone() });
                (outcome, death, gone.process.page().begun())
            }
            None => (end.with(Usage::default()), Death::Crash, 0),
        };
        match seat.slot.died(&self.watch.policy, Instant::now(), death, jitter()) {
            Verdict::Start { after, in_a_row } => {
                events(Event::Restart { worker, after_ms: millis(after), deaths: in_a_row });
            }
            Verdict::GiveUp => {
                events(Event::Failed { worker, outcome: outcome.clone() });
                self.last_failure = Some(outcome.clone());
            }
            Verdict::Leave => {}
        }
        Step::Gone { worker, outcome, begun }
    }

    /// When something will be due; none when there is nothing left to wait for.
    fn next_deadline(&self) -> Option<Instant> {
        let ready_within = self.watch.ready_within;
        let due = self.seats.iter().filter_map(|seat| match seat.slot.state() {
            State::Waiting(due) => Some(due),
            State::Starting(since) => Some((since + ready_within).min(self.next_look)),
            State::Ready(_) | State::Draining => Some(self.next_look),
            State::Exited | State::Failed => None,
        });
        let successors = self.seats.iter().filter_map(|seat| seat.successor.as_ref());
        let successors = successors.map(|worker| (worker.forked + ready_within).min(self.next_look));
        let former = self.seats.iter().flat_map(|seat| &seat.former);
        let former = former.map(|worker| worker.kill_at.map_or(self.next_look, |at| at.min(self.next_look)));
        let is_any = |seat: &Seat| seat.current.is_some() || seat.successor.is_some() || !seat.former.is_empty();
        let kill_at = self.kill_at.filter(|_| self.seats.iter().any(is_any));
        due.chain(successors).chain(former).chain(kill_at).min()
    }
}

/// Tells that a process is gone that was not its slot's worker, or not any more.
fn tell_exit(events: &mut EventSink, id: WorkerId, worker: &mut Worker, end: End, voluntary: bool) -> Outcome {
    let (mut outcome, _) = worker.ended(end);
    outcome.voluntary = voluntary;
    let (pid, tasks) = (worker.process.pid(), worker.done());
    events(Event::Exit { worker: id, pid, tasks, outcome: outcome.clone() });
    outcome
}

fn not_ready(within: Duration) -> End {
    End::Failed { stage: Stage::Start, reason: format!("it was not ready after {within:?}"), hint: None }
}

fn not_started(error: &io::Error) -> End {
    End::Failed { stage: Stage::Start, reason: format!("no process could be started: {error}"), hint: None }
}

/// From 0 to 1.
fn jitter() -> f64 {
    let mut byte = [0];
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::empty());
    f64::from(byte[0]) / 255.0
}
