//! One slot's life. Pure: the clock is handed in, and what is to be done is handed out.
//!
//! | state | next | when |
//! | --- | --- | --- |
//! | waiting | starting | its time has come |
//! | starting | ready | its worker is ready |
//! | starting, ready | waiting | its worker died, and may return |
//! | starting, ready | failed | its worker died too often, or nothing can come of the guest |
//! | starting, ready | draining | it was asked to end |
//! | waiting, draining | exited | it was asked to end, and its worker is gone |
//! | all but draining | ready | a successor, started beside its worker, has taken over |

use std::time::{Duration, Instant};

use super::restart::{Policy, Record, Verdict};

/// Where a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// No process; one is due at this time (at once, or after a pause).
    Waiting(Instant),
    /// A process that is not ready yet, since then.
    Starting(Instant),
    /// A process that takes work, since then.
    Ready(Instant),
    /// A process that takes no more work.
    Draining,
    /// Done, as it was asked or as its policy says.
    Exited,
    /// Given up.
    Failed,
}

/// Why a process is gone, as far as its slot cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// It exited with code 0.
    Clean,
    /// It crashed, was killed by somebody else, or exited otherwise.
    Crash,
    /// The primary killed it to enforce one task's limit: no fault of the worker's.
    Enforced,
    /// The guest can never work: another start would end the same way.
    Hopeless,
}

/// A worker's place in a pool.
#[derive(Debug)]
pub(crate) struct Slot {
    state: State,
    generation: u32,
    record: Record,
}

impl Slot {
    /// A slot whose first worker is due now.
    pub(crate) fn new(now: Instant) -> Self {
        Self { state: State::Waiting(now), generation: 0, record: Record::default() }
    }

    /// Where it is.
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// Which start this is, from 1; 0 before the first.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// A process is being started.
    pub(crate) fn start(&mut self, now: Instant) {
        debug_assert!(matches!(self.state, State::Waiting(due) if due <= now), "{:?}", self.state);
        self.generation += 1;
        self.state = State::Starting(now);
    }

    /// A successor is being started beside whatever is in the slot now; answers its generation.
    pub(crate) fn succeed(&mut self) -> u32 {
        self.generation += 1;
        self.generation
    }

    /// The successor is ready and takes the slot.
    pub(crate) fn replaced(&mut self, now: Instant) {
        debug_assert!(!matches!(self.state, State::Draining), "{:?}", self.state);
        self.state = State::Ready(now);
    }

    /// Its worker says it is ready; whether that is news. One that is being drained stays so.
    pub(crate) fn ready(&mut self, now: Instant) -> bool {
        let news = matches!(self.state, State::Starting(_));
        if news {
            self.state = State::Ready(now);
        }
        news
    }

    /// It is asked to end; whether it has a worker that must be told.
    pub(crate) fn drain(&mut self) -> bool {
        match self.state {
            State::Starting(_) | State::Ready(_) => {
                self.state = State::Draining;
                true
            }
            State::Waiting(_) => {
                self.state = State::Exited;
                false
            }
            State::Draining | State::Exited | State::Failed => false,
        }
    }

    /// Its process is gone.
    pub(crate) fn died(&mut self, policy: &Policy, now: Instant, death: Death, jitter: f64) -> Verdict {
        let up = match self.state {
            State::Ready(since) => now.duration_since(since),
            State::Draining => {
                self.state = State::Exited;
                return Verdict::Leave;
            }
            _ => Duration::ZERO,
        };
        let verdict = match death {
            Death::Enforced => Verdict::Start { after: Duration::ZERO, in_a_row: 0 },
            Death::Hopeless => Verdict::GiveUp,
            Death::Clean | Death::Crash => self.record.died(policy, now, up, death == Death::Clean, jitter),
        };
        self.state = match verdict {
            Verdict::Start { after, .. } => State::Waiting(now + after),
            Verdict::GiveUp => State::Failed,
            Verdict::Leave => State::Exited,
        };
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_returns_with_the_next_generation() {
        let (policy, now) = (Policy::default(), Instant::now());
        let mut slot = Slot::new(now);
        for generation in 1..=4 {
            let State::Waiting(due) = slot.state() else { panic!("{:?}", slot.state()) };
            slot.start(due);
            assert_eq!(slot.generation(), generation);
            assert!(slot.ready(due));
            assert!(!slot.ready(due), "ready is news once");
            slot.died(&policy, due, Death::Crash, 0.0);
        }
        let State::Waiting(due) = slot.state() else { panic!("{:?}", slot.state()) };
        slot.start(due);
        assert_eq!(slot.died(&policy, due, Death::Crash, 0.0), Verdict::GiveUp);
        assert_eq!(slot.state(), State::Failed);
    }

    #[test]
    fn deaths_by_a_tasks_limit_do_not_count() {
        let (policy, now) = (Policy::default(), Instant::now());
        let mut slot = Slot::new(now);
        for _ in 0..20 {
            slot.start(now);
            slot.ready(now);
            assert_eq!(
                slot.died(&policy, now, Death::Enforced, 0.0),
                Verdict::Start { after: Duration::ZERO, in_a_row: 0 }
            );
        }
    }

    #[test]
    fn a_hopeless_guest_is_not_tried_again() {
        let now = Instant::now();
        let mut slot = Slot::new(now);
        slot.start(now);
        assert_eq!(slot.died(&Policy::default(), now, Death::Hopeless, 0.0), Verdict::GiveUp);
    }

    #[test]
    fn a_successor_takes_over_whatever_became_of_the_slot() {
        let (policy, now) = (Policy::default(), Instant::now());
        let mut slot = Slot::new(now);
        slot.start(now);
        assert_eq!(slot.succeed(), 2);
        slot.died(&policy, now, Death::Hopeless, 0.0);
        assert_eq!(slot.state(), State::Failed);
        slot.replaced(now);
        assert_eq!(slot.state(), State::Ready(now));
        // generations go on from the successor's
        slot.died(&policy, now, Death::Crash, 0.0);
        let State::Waiting(due) = slot.state() else { panic!("{:?}", slot.state()) };
        slot.start(due);
        assert_eq!(slot.generation(), 3);
    }

    #[test]
    fn what_drains_does_not_return() {
        let (policy, now) = (Policy::default(), Instant::now());
        let mut slot = Slot::new(now);
        slot.start(now);
        assert!(slot.drain(), "also while it starts");
        assert!(!slot.ready(now), "and is never ready after that");
        assert!(!slot.drain(), "and is told once");
        assert_eq!(slot.died(&policy, now, Death::Crash, 0.0), Verdict::Leave);
        assert_eq!(slot.state(), State::Exited);

        let mut waiting = Slot::new(now);
        assert!(!waiting.drain(), "nobody to tell");
        assert_eq!(waiting.state(), State::Exited);
    }
}
