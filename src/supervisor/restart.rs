//! When a dead worker returns. Pure: the clock and the dice are handed in.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Which deaths are followed by a new start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Restart {
    /// None.
    Never,
    /// Those that were not a clean exit (code 0).
    OnFailure,
    /// All.
    #[default]
    Always,
}

/// The rules of a pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// Which deaths are followed by a new start.
    pub(crate) restart: Restart,
    /// The pause after the second death in a row; the first has none.
    pub(crate) pause_first: Duration,
    /// The longest pause.
    pub(crate) pause_max: Duration,
    /// How long a worker must have been ready for its death to be the first in a row again.
    pub(crate) stable_after: Duration,
    /// So many deaths ...
    pub(crate) deaths_max: usize,
    /// ... within this time fail the slot.
    pub(crate) deaths_within: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            restart: Restart::Always,
            pause_first: Duration::from_millis(100),
            pause_max: Duration::from_secs(30),
            stable_after: Duration::from_secs(30),
            deaths_max: 5,
            deaths_within: Duration::from_mins(1),
        }
    }
}

/// What one slot has been through.
#[derive(Debug, Default)]
pub(crate) struct Record {
    deaths: VecDeque<Instant>,
    in_a_row: u32,
}

/// What follows a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A new start, after a pause.
    Start {
        /// The pause.
        after: Duration,
        /// How many deaths in a row this was.
        in_a_row: u32,
    },
    /// The slot has failed.
    GiveUp,
    /// The worker was meant to end: the slot is done.
    Leave,
}

impl Record {
    /// A worker that had been ready for `up` died at `now`; `clean` when it exited with code 0. The pause is stretched
    /// by up to a quarter, by `jitter` from 0 to 1, so that slots that died together do not start together.
    pub(crate) fn died(&mut self, policy: &Policy, now: Instant, up: Duration, clean: bool, jitter: f64) -> Verdict {
        match policy.restart {
            Restart::Always => {}
            Restart::OnFailure if !clean => {}
            Restart::OnFailure => return Verdict::Leave,
            Restart::Never if clean => return Verdict::Leave,
            Restart::Never => return Verdict::GiveUp,
        }
        if up >= policy.stable_after {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        while self.deaths.front().is_some_and(|death| now.duration_since(*death) >= policy.deaths_within) {
            self.deaths.pop_front();
        }
        self.deaths.push_back(now);
        if self.deaths.len() >= policy.deaths_max {
            return Verdict::GiveUp;
        }
        let after = match self.in_a_row {
            1 => Duration::ZERO,
            n => {
                let doubled = policy.pause_first.saturating_mul(1u32.checked_shl(n - 2).unwrap_or(u32::MAX));
                doubled.mul_f64(1.0 + jitter.clamp(0.0, 1.0) / 4.0).min(policy.pause_max)
            }
        };
        Verdict::Start { after, in_a_row: self.in_a_row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pauses(policy: &Policy, up: Duration, apart: Duration, count: u32) -> Vec<Option<u128>> {
        let (start, mut record) = (Instant::now(), Record::default());
        (0..count)
            .map(|n| match record.died(policy, start + apart * n, up, false, 0.0) {
                Verdict::Start { after, .. } => Some(after.as_millis()),
                Verdict::GiveUp => None,
                Verdict::Leave => panic!("a crash is not left alone"),
            })
            .collect()
    }

    #[test]
    fn pauses_double_and_the_fifth_death_in_a_minute_is_the_last() {
        let policy = Policy::default();
        assert_eq!(pauses(&policy, Duration::ZERO, SECOND, 5), [Some(0), Some(100), Some(200), Some(400), None]);
        // 15 s apart, the fifth is 60 s after the first, which no longer counts; just under, it does
        assert!(pauses(&policy, Duration::ZERO, SECOND * 15, 5)[4].is_some());
        assert!(pauses(&policy, Duration::ZERO, Duration::from_millis(14_999), 5)[4].is_none());
    }

    #[test]
    fn pauses_end_at_thirty_seconds() {
        let policy = Policy { deaths_max: usize::MAX, ..Policy::default() };
        assert_eq!(pauses(&policy, Duration::ZERO, SECOND, 60).last(), Some(&Some(30_000)));
    }

    #[test]
    fn a_stable_worker_starts_again_at_once() {
        let policy = Policy { deaths_max: usize::MAX, ..Policy::default() };
        let just_under = Duration::from_millis(29_999);
        assert_eq!(pauses(&policy, policy.stable_after, SECOND, 3), [Some(0), Some(0), Some(0)]);
        assert_eq!(pauses(&policy, just_under, SECOND, 3), [Some(0), Some(100), Some(200)]);
        // but flapping just over the reset is caught by the window all the same
        assert!(pauses(&Policy::default(), policy.stable_after, SECOND * 10, 5)[4].is_none());
    }

    #[test]
    fn jitter_stretches_by_at_most_a_quarter() {
        let (policy, now) = (Policy::default(), Instant::now());
        for (jitter, expected) in [(0.0, 100), (0.5, 112), (1.0, 125), (7.0, 125)] {
            let mut record = Record::default();
            record.died(&policy, now, Duration::ZERO, false, jitter);
            let Verdict::Start { after, .. } = record.died(&policy, now, Duration::ZERO, false, jitter) else {
                panic!()
            };
            assert_eq!(after.as_millis(), expected);
        }
    }

    #[test]
    fn who_returns_depends_on_the_policy() {
        let verdict = |restart, clean| {
            let policy = Policy { restart, ..Policy::default() };
            Record::default().died(&policy, Instant::now(), SECOND, clean, 0.0)
        };
        let start = Verdict::Start { after: Duration::ZERO, in_a_row: 1 };
        assert_eq!(verdict(Restart::Always, true), start);
        assert_eq!(verdict(Restart::Always, false), start);
        assert_eq!(verdict(Restart::OnFailure, true), Verdict::Leave);
        assert_eq!(verdict(Restart::OnFailure, false), start);
        assert_eq!(verdict(Restart::Never, true), Verdict::Leave);
        assert_eq!(verdict(Restart::Never, false), Verdict::GiveUp);
    }
}
