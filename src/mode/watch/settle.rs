//! When a file is whole: nobody writes to it any more, and it has not changed for a while. Pure: what was seen and when
//! goes in, what is to be done comes out.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How long a file stays as it is after its writer has closed it, or it was renamed into place.
const CLOSED: Duration = Duration::from_millis(50);

/// How long when nothing is known of who writes to it.
const UNKNOWN: Duration = Duration::from_millis(500);

/// How long when somebody has written to it and not closed it since: perhaps that was not seen.
const OPEN: Duration = Duration::from_secs(10);

/// How long one is gone that is taken for removed: editors and tools put a file aside before they write the new one.
const GONE: Duration = Duration::from_millis(500);

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    /// When its bytes were changed last, in nanoseconds.
    pub(super) modified: i128,
    /// When anything of it was changed last, in nanoseconds.
    pub(super) changed: i128,
}

/// What was heard of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Somebody writes to it.
    Written,
    /// Whoever wrote to it has closed it, or it was put in its place whole.
    Closed,
}

/// One name in the folder.
#[derive(Debug)]
struct Seen {
    stamp: Option<Stamp>,
    since: Instant,
    heard: Option<Heard>,
    /// The state that was told of last.
    told: Option<Stamp>,
}

/// All names that were seen in a folder.
#[derive(Debug, Default)]
pub(super) struct Settle {
    files: BTreeMap<String, Seen>,
}

impl Settle {
    /// Notes what was heard of a file.
    pub(super) fn hear(&mut self, name: &str, heard: Heard, now: Instant) {
        let new = || Seen { stamp: None, since: now, heard: None, told: None };
        let seen = self.files.entry(name.into()).or_insert_with(new);
        seen.heard = Some(heard);
        if heard == Heard::Written {
            seen.since = now;
        }
    }

    /// Forgets what was heard: some of it was lost.
    pub(super) fn forget_heard(&mut self) {
        self.files.values_mut().for_each(|seen| seen.heard = None);
    }

    /// Notes what is there before anything was heard, with how long each file has been as it is.
    pub(super) fn begin(&mut self, there: &BTreeMap<String, (Stamp, Duration)>, now: Instant) {
        for (name, (stamp, age)) in there {
            // more is as good as so much
            let since = now.checked_sub((*age).min(UNKNOWN)).unwrap_or(now);
            self.files.insert(name.clone(), Seen { stamp: Some(*stamp), since, heard: None, told: None });
        }
    }

    /// Notes what is there now.
    pub(super) fn look(&mut self, there: &BTreeMap<String, Stamp>, now: Instant) {
        for (name, stamp) in there {
            let new = || Seen { stamp: None, since: now, heard: None, told: None };
            let seen = self.files.entry(name.clone()).or_insert_with(new);
            if seen.stamp != Some(*stamp) {
                (seen.stamp, seen.since) = (Some(*stamp), now);
            }
        }
        for (name, seen) in &mut self.files {
            if seen.stamp.is_some() && !there.contains_key(name) {
                (seen.stamp, seen.since, seen.heard) = (None, now, None);
            }
        }
    }

    /// The names that have come to rest in another state than was said of them last, and are to be read, or are gone.
    pub(super) fn settled(&mut self, now: Instant) -> Vec<String> {
        let mut settled = vec![];
        self.files.retain(|name, seen| {
            if seen.is_pending() && seen.due() <= now {
                seen.told = seen.stamp;
                // who writes to it next is not known yet
                seen.heard = None;
                settled.push(name.clone());
            }
            // one that is gone and was told of is nothing any more
            seen.stamp.is_some() || seen.told.is_some() || seen.due() > now
        });
        settled
    }

    /// When something will have come to rest.
    pub(super) fn next(&self) -> Option<Instant> {
        self.files.values().filter(|seen| seen.is_pending()).map(Seen::due).min()
    }

    /// Whether a file has changed and not come to rest since.
    pub(super) fn is_pending(&self, name: &str) -> bool {
        self.files.get(name).is_some_and(Seen::is_pending)
    }
}

impl Seen {
    fn is_pending(&self) -> bool {
        self.told != self.stamp
    }

    fn due(&self) -> Instant {
        let rest = match (self.stamp, self.heard) {
            (None, _) => GONE,
            (Some(_), Some(Heard::Closed)) => CLOSED,
            (Some(_), Some(Heard::Written)) => OPEN,
            (Some(_), None) => UNKNOWN,
        };
        self.since + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "a.wasm";

    fn stamp(size: u64) -> Stamp {
        Stamp { device: 1, inode: 1, size, modified: 0, changed: 0 }
    }

    /// What settles, some milliseconds after the start.
    struct Clock(Settle, Instant);

    impl Clock {
        fn new() -> Self {
            Self(Settle::default(), Instant::now())
        }

        fn at(&self, ms: u64) -> Instant {
            self.1 + Duration::from_millis(ms)
        }

        fn look(&mut self, ms: u64, size: Option<u64>) {
            let there = size.map(|size| (A.to_owned(), stamp(size))).into_iter().collect();
            self.0.look(&there, self.at(ms));
        }

        fn hear(&mut self, ms: u64, heard: Heard) {
            self.0.hear(A, heard, self.at(ms));
        }

        fn settled(&mut self, ms: u64) -> usize {
            self.0.settled(self.at(ms)).len()
        }
    }

    #[test]
    fn a_slow_copy_is_no_file_before_it_is_closed() {
        let mut clock = Clock::new();
        clock.hear(0, Heard::Written);
        for ms in 0..50 {
            clock.look(ms * 100, Some(ms));
            clock.hear(ms * 100, Heard::Written);
            assert_eq!(clock.settled(ms * 100 + 99), 0);
        }
        // a pause of seconds
        clock.look(9_000, Some(49));
        assert_eq!(clock.settled(9_000), 0);
        clock.hear(9_001, Heard::Closed);
        clock.look(9_001, Some(50));
        assert_eq!((clock.settled(9_050), clock.settled(9_051), clock.settled(99_000)), (0, 1, 0));
        // that it was closed says nothing of what comes after
        clock.look(100_000, Some(51));
        assert_eq!((clock.settled(100_499), clock.settled(100_500)), (0, 1));
    }

    #[test]
    fn a_writer_that_was_not_seen_to_close_is_waited_for_only_so_long() {
        let mut clock = Clock::new();
        clock.look(0, Some(1));
        clock.hear(0, Heard::Written);
        assert_eq!((clock.settled(9_999), clock.settled(10_000)), (0, 1));
        // one that goes on is another state
        clock.hear(20_000, Heard::Written);
        clock.look(20_000, Some(2));
        assert_eq!((clock.settled(29_999), clock.settled(30_000)), (0, 1));
    }

    #[test]
    fn what_comes_without_a_word_must_rest() {
        let mut clock = Clock::new();
        clock.look(0, Some(1));
        assert_eq!(clock.0.next(), Some(clock.at(500)));
        clock.look(400, Some(2));
        assert_eq!((clock.settled(899), clock.settled(900)), (0, 1));
        assert_eq!(clock.0.next(), None);
        // lost words do not make it wait for ever
        clock.look(1_000, Some(3));
        clock.hear(1_000, Heard::Written);
        clock.0.forget_heard();
        assert_eq!((clock.settled(1_499), clock.settled(1_500)), (0, 1));
    }

    #[test]
    fn a_file_that_is_put_aside_and_back_was_never_gone() {
        let mut clock = Clock::new();
        clock.look(0, Some(1));
        assert_eq!(clock.settled(500), 1);
        clock.look(1_000, None);
        assert_eq!(clock.settled(1_499), 0);
        clock.look(1_499, Some(1));
        assert_eq!(clock.settled(9_000), 0, "it is as it was");
        clock.look(10_000, None);
        assert_eq!((clock.settled(10_499), clock.settled(10_500)), (0, 1));
        assert_eq!(clock.0.files.len(), 0, "and nothing is kept of it");
        assert_eq!(clock.settled(99_000), 0);
    }

    #[test]
    fn what_was_there_before_waits_no_longer_than_it_must() {
        let mut clock = Clock::new();
        let there = [("old.wasm", 3_600_000), ("new.wasm", 100)];
        let there = there.map(|(name, age)| (name.to_owned(), (stamp(1), Duration::from_millis(age))));
        clock.0.begin(&there.into(), clock.at(1_000));
        assert_eq!(clock.0.settled(clock.at(1_000)), ["old.wasm"]);
        assert!(clock.0.is_pending("new.wasm") && !clock.0.is_pending("old.wasm"));
        assert_eq!(clock.settled(1_399), 0);
        assert_eq!(clock.0.settled(clock.at(1_400)), ["new.wasm"]);
        // a name that was heard of and never seen is nothing
        clock.hear(2_000, Heard::Written);
        assert_eq!((clock.settled(99_000), clock.0.files.len()), (0, 2));
    }
}
