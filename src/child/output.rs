//! What guests print in a pool: cut into lines, held to a rate, counted when it is dropped.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::{
    event::Stream,
    process::{child::Out, wire::Kind},
    sandbox::OutputSink,
};

/// The longest line; a longer one is cut into several.
const LINE_MAX: usize = 64 << 10;

/// Bytes a second, and bytes at once.
const RATE: u64 = 1 << 20;

/// What a line costs at least: each is an event, however short.
const LINE_MIN: u64 = 64;

/// One worker's printing.
pub(super) struct Lines {
    out: Arc<Out>,
    state: Mutex<State>,
}

struct State {
    partial: [Vec<u8>; 2],
    budget: Budget,
}

/// A bucket of bytes that fills with time.
#[derive(Debug)]
struct Budget {
    left: u64,
    filled: Instant,
    dropped: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: RATE, filled: now, dropped: 0 }
    }

    /// Whether so many bytes may go; counts them when they may not.
    fn take(&mut self, bytes: usize, now: Instant) -> bool {
        let bytes = bytes as u64;
        let micros = u64::try_from(now.duration_since(self.filled).as_micros()).unwrap_or(u64::MAX);
        let gained = micros.saturating_mul(RATE) / 1_000_000;
        if gained > 0 {
            (self.left, self.filled) = (self.left.saturating_add(gained).min(RATE), now);
        }
        let cost = bytes.max(LINE_MIN);
        if cost > self.left {
            self.dropped += bytes;
            return false;
        }
        self.left -= cost;
        true
    }
}

impl Lines {
    pub(super) fn new(out: Arc<Out>) -> Self {
        let state = State { partial: [vec![], vec![]], budget: Budget::new(Instant::now()) };
        Self { out, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends lines that have no end yet, and tells what was dropped: at the end of a task, and now and then.
    pub(super) fn settle(&self) {
        let mut state = self.state();
        for (at, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            if !state.partial[at].is_empty() {
                let line = std::mem::take(&mut state.partial[at]);
                self.send(&mut state.budget, stream, &line);
            }
        }
        self.tell_dropped(&mut state.budget);
    }

    /// Tells what was dropped.
    pub(super) fn tell(&self) {
        self.tell_dropped(&mut self.state().budget);
    }

    fn tell_dropped(&self, budget: &mut Budget) {
        if budget.dropped > 0 {
            self.out.push(Kind::Dropped, std::mem::take(&mut budget.dropped), b"");
        }
    }

    fn send(&self, budget: &mut Budget, stream: Stream, line: &[u8]) {
        if budget.take(line.len() + 1, Instant::now()) {
            let kind = match stream {
                Stream::Stdout => Kind::Stdout,
                Stream::Stderr => Kind::Stderr,
            };
            self.out.push(kind, 0, line);
        }
    }
}

impl OutputSink for Lines {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        let state = &mut *self.state();
        let partial = &mut state.partial[stream as usize];
        let mut ready = vec![];
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in piece.chunks(LINE_MAX) {
                if partial.len() + piece.len() > LINE_MAX {
                    ready.push(std::mem::take(partial));
                }
                partial.extend_from_slice(piece);
            }
            if partial.last() == Some(&b'\n') {
                partial.pop();
                ready.push(std::mem::take(partial));
            }
        }
        for line in ready {
            self.send(&mut state.budget, stream, &line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, time::Duration};

    use super::*;

    #[test]
    fn the_budget_is_a_burst_and_a_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert!(budget.take(1 << 20, start), "a whole second's worth at once");
        assert!(!budget.take(1, start));
        assert!(!budget.take(1000, start));
        assert_eq!(budget.dropped, 1001);
        let mut short = Budget::new(start);
        let lines = (0..1 << 20).take_while(|_| short.take(1, start)).count() as u64;
        assert_eq!(lines, RATE / LINE_MIN, "short lines are not for nothing");
        let half = start + Duration::from_millis(500);
        assert!(!budget.take((1 << 19) + 1, half));
        assert!(budget.take(1 << 19, half));
        let long = half + Duration::from_secs(1000);
        assert!(budget.take(1 << 20, long) && !budget.take(1, long), "it does not save up");
    }

    #[test]
    fn lines_are_cut_where_they_end_or_are_too_long() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let out = Arc::new(Out::new(theirs));
        let lines = Lines::new(out.clone());
        lines.write(Stream::Stdout, b"one\ntwo");
        lines.write(Stream::Stderr, b"other\n");
        lines.write(Stream::Stdout, b" and more\n\n");
        lines.write(Stream::Stdout, &vec![b'x'; LINE_MAX + 1]);
        lines.settle();
        assert!(out.flush().expect("open"));
        drop((lines, out));
        let mut incoming = crate::process::wire::Incoming::new(1 << 20);
        std::io::Read::read_to_end(&mut &ours, incoming.space()).expect("open");
        let mut seen = vec![];
        while let Some(frame) = incoming.next().expect("frames") {
            seen.push((frame.kind, frame.body.len(), frame.body.first().copied()));
        }
        assert_eq!(
            seen,
            [
                (Kind::Stdout, 3, Some(b'o')),
                (Kind::Stderr, 5, Some(b'o')),
                (Kind::Stdout, 12, Some(b't')),
                (Kind::Stdout, 0, None),
                (Kind::Stdout, LINE_MAX, Some(b'x')),
                (Kind::Stdout, 1, Some(b'x')),
            ]
        );
    }
}
