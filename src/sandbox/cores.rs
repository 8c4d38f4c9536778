//! On which cores the threads of a group run.

use rustix::thread::CpuSet;

/// The cores that threads are spread over. The system would leave threads that live for a moment where they were made.
pub(super) struct Cores {
    all: CpuSet,
    numbers: Vec<usize>,
    pin: bool,
}

impl Cores {
    /// Those that this process may use; with `pin` a thread stays where it is put.
    pub(super) fn of_this_process(pin: bool) -> Self {
        let all = rustix::thread::sched_getaffinity(None).unwrap_or_default();
        let numbers = (0..CpuSet::MAX_CPU).filter(|number| all.is_set(*number)).collect();
        Self { all, numbers, pin }
    }

    /// Moves the calling thread to a core: for good, or to begin with.
    pub(super) fn settle(&self, place: usize) {
        let [_, _, ..] = self.numbers[..] else { return };
        let mut one = CpuSet::new();
        // the main thread, which mostly waits, has the first place
        one.set(self.numbers[place % self.numbers.len()]);
        // where that is not allowed, the system decides
        if rustix::thread::sched_setaffinity(None, &one).is_ok() && !self.pin {
            let _ = rustix::thread::sched_setaffinity(None, &self.all);
        }
    }
}
