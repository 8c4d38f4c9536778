//! A child whose guest has threads: a command that makes them, or a handler whose workers share one memory.
//!
//! Nothing in it can be interrupted, and nothing needs to be: what ends the guest ends the process. Its first thread runs no
//! guest code; it brings the messages, or waits.

use std::{io::Write as _, sync::Arc};

use serde::{Deserialize, Serialize};

use super::mailbox::Line;
use crate::{
    message::Message,
    outcome::{self, Outcome, Stage, Usage},
    process::wire::Kind,
    sandbox::{
        Answer, Answers, Full, Group, GroupSetup, Identity, Inspection, LoadError, Mailbox, Mapped, NotTaken, Received,
        Setup, Shape, Task, To, cpu_ms,
    },
};

/// How the workers of a handler are made and fed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Workers {
    /// How many.
    pub(crate) count: u32,
    /// Whether each stays on one core.
    pub(crate) pin: bool,
    /// Whether the messages of the mailbox are their tasks; otherwise each gets one message, its data.
    pub(crate) tasks: bool,
}

/// Runs it to its end.
pub(super) fn run(
    mapped: Mapped,
    inspection: &Inspection,
    setup: Setup,
    line: Option<Arc<Line>>,
    workers: Option<Workers>,
) -> Result<Outcome, LoadError> {
    let is_handler = inspection.shape == Some(Shape::Handler);
    let shape = if is_handler { Shape::Handler } else { Shape::Command };
    let program = mapped.link_group(inspection, shape, setup.limits.memory)?;
    let pin = workers.is_some_and(|workers| workers.pin);
    let (Some(line), true) = (&line, is_handler) else {
        // a command speaks for itself
        let mailbox = line.clone().map(|line| -> Arc<dyn Mailbox> { line });
        let setup = Arc::new(Setup { mailbox, ..setup });
        if let Some(line) = line {
            line.say_now(Kind::Ready);
        }
        let group = Group::start(program, GroupSetup { setup, pin, input: true, answers: Arc::new(()) })?;
        return Ok(ended(&group));
    };
    let Some(Workers { count, tasks, .. }) = workers else {
        return Err(LoadError::Invalid { reason: "a handler with threads got no workers".into() });
    };
    let identity = Identity { count, process: false, ..setup.identity.clone() };
    let (data, max) = (setup.data.as_str().to_owned(), setup.limits.message_max);
    let answers = Arc::new(Lines { line: line.clone(), max: max.as_usize(), tasks });
    let setup = Arc::new(Setup { identity, ..setup });
    let group = Group::start(program, GroupSetup { setup, pin, input: false, answers })?;
    if group.ready(None) {
        line.say_now(Kind::Ready);
        if tasks {
            let (group, line) = (group.clone(), line.clone());
            let fed = std::thread::Builder::new().name("wrun-tasks".into()).spawn(move || feed(&group, &line));
            fed.map_err(|error| LoadError::Reported {
                stage: Stage::Start,
                reason: format!("no thread for its tasks: {error}"),
                hint: None,
            })?;
        } else {
            for worker in 1..=count {
                // one for each is little, whatever is in it
                let task = Task { id: 0, message: data.clone() };
                let _ = group.post_when_there_is_room(To::Worker(worker), task);
            }
            group.close();
        }
    }
    Ok(ended(&group))
}

/// Waits for its end.
fn ended(group: &Group) -> Outcome {
    let outcome = group.outcome();
    // threads that have not left count, too
    Outcome { usage: Usage { cpu_ms: Some(cpu_ms()), ..outcome.usage }, ..outcome }
}

/// Hands the messages of the mailbox to whichever worker is free, until there are no more.
fn feed(group: &Group, line: &Line) {
    while let Received::Message(id, message) = line.receive_here() {
        if group.post_when_there_is_room(To::Any, Task { id, message }) == Err(NotTaken::Closed) {
            return;
        }
    }
    group.close();
}

/// The answers of workers as messages of the guest: `{"worker":ID,"line":N,"reply":…}`.
struct Lines {
    line: Arc<Line>,
    max: usize,
    tasks: bool,
}

impl Answers for Lines {
    fn answer(&self, worker: u32, id: u64, answer: Answer, more_to_come: bool) {
        let check = |text: &str| Message::check(text.as_bytes(), self.max);
        let answer = match answer {
            Answer::Reply(text) => check(&text).map_or_else(outcome::Answer::Invalid, outcome::Answer::Reply),
            Answer::Error(text) => check(&text).map_or_else(outcome::Answer::Invalid, outcome::Answer::Error),
            Answer::NoReply if self.tasks => outcome::Answer::NoReply,
            Answer::NoReply => return,
        };
        let mut line = format!(r#"{{"worker":{worker}"#).into_bytes();
        if self.tasks {
            let _ = write!(line, r#","line":{id}"#);
        }
        answer.write_members(&mut line);
        line.push(b'}');
        self.line.say_soon(Kind::Message, 0, &line, more_to_come);
        self.line.make_room();
    }

    fn message(&self, worker: u32, message: Message) -> Result<(), Full> {
        let mut line = format!(r#"{{"worker":{worker},"message":"#).into_bytes();
        message.write_line(&mut line);
        line.push(b'}');
        self.line.post(&line)
    }
}
