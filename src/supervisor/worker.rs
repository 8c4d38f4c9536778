//! One process of a slot, and what is known of it.

use std::{
    task::{Context, Poll},
    time::{Duration, Instant},
};

use super::slot::Death;
use crate::{
    event::{Event, Stream, WorkerId},
    grant::{Denied, REFUSALS_MAX},
    message::Message,
    outcome::{End, Outcome, Stage, Usage},
    process::{
        Process, Seen,
        wire::{Frame, Kind},
    },
};

/// Takes frames that are about a mode's work.
///
/// # Errors
/// When a frame is not as it should be: why, in words.
pub(super) type Take<'a> = dyn FnMut(WorkerId, Frame<'_>) -> Result<(), String> + 'a;

/// A process of a slot.
pub(super) struct Worker {
    pub(super) process: Process,
    pub(super) forked: Instant,
    /// Whether it said that it is ready.
    pub(super) ready: bool,
    /// The walls that it has to do without.
    pub(super) missing_walls: Option<String>,
    /// Whether it wants a successor, for this reason.
    pub(super) wants_successor: Option<String>,
    /// How many refusals of its guest it has told.
    refusals: usize,
    /// How many tasks its mode has counted.
    pub(super) tasks: u64,
    /// When it is killed if it is still there.
    pub(super) kill_at: Option<Instant>,
    beats: u64,
    silent: u32,
    /// What is known of its end before the process is gone: what it said itself, or why we killed it.
    ending: Option<Ending>,
}

struct Ending {
    outcome: Outcome,
    death: Death,
}

impl Worker {
    pub(super) fn new(process: Process, now: Instant) -> Self {
        Self {
            process,
            forked: now,
            ready: false,
            missing_walls: None,
            wants_successor: None,
            refusals: 0,
            tasks: 0,
            kill_at: None,
            beats: 0,
            silent: 0,
            ending: None,
        }
    }

    /// Kills it, for this reason.
    pub(super) fn end(&mut self, end: End, death: Death) {
        let outcome = end.with(Usage::wall(self.age()));
        self.ending.get_or_insert(Ending { outcome, death });
        self.process.kill();
    }

    /// Kills it because it does not keep to the rules.
    pub(super) fn reject(&mut self, reason: String) {
        self.end(End::Failed { stage: Stage::Protocol, reason, hint: None }, Death::Crash);
    }

    /// Takes what it sends: hands frames that are about its mode's work to `take`, and tells events of all others. A frame
    /// that `take` refuses is its end.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        worker: WorkerId,
        events: &mut dyn FnMut(Event),
        take: &mut Take<'_>,
    ) -> Poll<Seen> {
        let Self { process, ready, missing_walls, wants_successor, refusals, ending, forked, .. } = self;
        let mut broken = None;
        let seen = process.poll(cx, |frame| match frame.kind {
            Kind::Ready => *ready = true,
            Kind::Walls => *missing_walls = Some(String::from_utf8_lossy(frame.body).into_owned()),
            Kind::Recycle => *wants_successor = Some(String::from_utf8_lossy(frame.body).into_owned()),
            Kind::Stdout => tell_lines(events, worker, Stream::Stdout, frame.body),
            Kind::Stderr => tell_lines(events, worker, Stream::Stderr, frame.body),
            Kind::Dropped => events(Event::Drop { worker, bytes: frame.id }),
            Kind::Message => match Message::check(frame.body, usize::MAX) {
                Ok(message) => events(Event::Message { worker, message }),
                Err(error) => broken = Some(format!("it sent a broken message: {error}")),
            },
            Kind::Ended => match serde_json::from_slice::<Outcome>(frame.body) {
                Ok(outcome) => {
                    ending.get_or_insert_with(|| Ending { death: death_of(&outcome.end), outcome });
                }
                Err(error) => broken = Some(format!("it sent a broken outcome: {error}")),
            },
            Kind::Panic => {
                let message = format!("its own code panicked: {}", String::from_utf8_lossy(frame.body));
                events(Event::Error { worker: Some(worker), message });
            }
            Kind::Warning => {
                let message = String::from_utf8_lossy(frame.body).into_owned();
                events(Event::Error { worker: Some(worker), message });
            }
            Kind::Denied => match Denied::read(frame.body) {
                // one that keeps to the rules says no more
                Some(_) if *refusals >= REFUSALS_MAX => {}
                Some(Denied { grant, reason }) => {
                    *refusals += 1;
                    events(Event::Denied { worker, grant, reason });
                }
                None => broken = Some("it sent what is no refusal".into()),
            },
            Kind::Hello | Kind::Task | Kind::Drain | Kind::Open => {
                broken = Some(format!("it sent {:?}, which only a primary may", frame.kind));
            }
            _ => {
                if let Err(reason) = take(worker, frame) {
                    broken = Some(reason);
                }
            }
        });
        if let Some(reason) = broken {
            tracing::debug!("worker {worker}, {:?} after its start: {reason}", forked.elapsed());
            self.reject(reason);
        }
        seen
    }

    /// Whether its counter has stood still for so many looks: it is stopped, or its process is stuck.
    pub(super) fn is_silent(&mut self, looks: u32) -> bool {
        let beats = self.process.page().beats();
        self.silent = if beats == self.beats { self.silent + 1 } else { 0 };
        self.beats = beats;
        self.silent >= looks
    }

    /// How it ended, by what it said itself, why we killed it, or how its process is gone.
    pub(super) fn ended(&mut self, end: End) -> (Outcome, Death) {
        if let Some(Ending { outcome, death }) = self.ending.take() {
            return (outcome, death);
        }
        let death = death_of(&end);
        (end.with(Usage::wall(self.age())), death)
    }

    /// How many tasks it answered, or how many requests it began.
    pub(super) fn done(&self) -> u64 {
        self.tasks.max(self.process.page().requests())
    }

    /// How much memory its process has now, in bytes; none when it is gone.
    pub(super) fn resident(&self) -> Option<u64> {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.process.pid())).ok()?;
        let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
        Some(pages * rustix::param::page_size() as u64)
    }

    /// How long it is there.
    pub(super) fn age(&self) -> Duration {
        self.forked.elapsed()
    }
}

fn tell_lines(events: &mut dyn FnMut(Event), worker: WorkerId, stream: Stream, body: &[u8]) {
    for line in String::from_utf8_lossy(body).split('\n') {
        events(Event::Output { worker, stream, line: line.into() });
    }
}

fn death_of(end: &End) -> Death {
    match end {
        End::Exited { code: 0 } => Death::Clean,
        End::Failed { stage, .. } if stage.is_hopeless() => Death::Hopeless,
        _ => Death::Crash,
    }
}
