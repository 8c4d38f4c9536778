//! The chunks of a buffer, handed to instances of one guest on the threads of a process of its own.

use std::{future::poll_fn, io, os::fd::AsFd, task::Poll};

use super::{
    Command, Kind as StdioKind, Mailbox,
    launch::{Worker, ran},
};
use crate::{
    Error,
    buffer::{BufferMut, Chunks, Each, Failed, INPUT, Mapped, ParMap},
    child::{MapConfig, can_map, cores, id_of},
    message::Message,
    outcome::{Answer, End, Outcome, Stage},
    process::{
        Seen, Signaller,
        wire::{Frame, Kind},
    },
    signal::Signal,
};

impl Command {
    /// Hands the chunks of a buffer to instances of the guest, a handler, on [`Command::workers`] threads of one process;
    /// default one for each core. Each gets `{"chunk":K,"offset":O,"length":L}` as its message and can have windows of the
    /// buffer, `input`, and of its range of the output, `output`. The first that fails ends all.
    ///
    /// What the guest prints goes to the standard error of this process, unless it is sent elsewhere.
    ///
    /// ```standalone_crate
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use wrun::{Buffer, Command, ParMap, limits::Bytes};
    ///
    /// wrun::init();
    /// # let guest = guest_artifacts::WORDCOUNT;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    /// # rt.block_on(async {
    /// let text = Buffer::from_slice(b"so many words\nin one buffer\n")?;
    /// let counted = ParMap::over(text.split(Bytes(10)).lines()).reduce();
    /// let counted = Command::new(guest).par_map(counted).await?;
    /// assert_eq!(counted.replies[0].as_str(), r#"{"lines":2,"words":6,"bytes":28}"#);
    /// # Ok(()) })
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the guest is no handler, cannot be loaded, or its process cannot be started.
    pub async fn par_map(&mut self, map: impl Into<ParMap>) -> Result<Mapped, Error> {
        let mut mapping = self.start_map(map.into()).await?;
        while !mapping.step().await {}
        mapping.finish()
    }

    /// Starts the process that does it.
    pub(super) async fn start_map(&mut self, map: ParMap) -> Result<Mapping, Error> {
        map.check(self.settings.limits.memory).map_err(Error::Usage)?;
        let code = self.load().await?;
        can_map(&code.inspection, self.settings.limits.memory)?;
        let ParMap { chunks, output, reduce, each } = map;
        let cannot = Error::io("share a descriptor");
        let fd = output.as_ref().map(|output| output.as_fd().try_clone_to_owned()).transpose().map_err(cannot)?;
        let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(Error::io("share standard error"))?;
        let workers = self.settings.workers.unwrap_or_default();
        let count = if workers.count == 0 { cores() } else { workers.count };
        let message_max = self.settings.limits.message_max.as_usize();
        let config = MapConfig { split: chunks.split, output: fd.is_some(), reduce, workers: count, pin: workers.pin };
        let named = self.settings.buffers.clone();
        // the one that is cut comes first
        self.settings.buffers.retain(|(name, _)| name != INPUT);
        self.settings.buffers.insert(0, (INPUT.into(), chunks.buffer.clone()));
        let streams = [StdioKind::Null, StdioKind::Fd(stderr), StdioKind::Inherit];
        let started = self.start(&code, Mailbox::None, Some((config, fd)), streams);
        self.settings.buffers = named;
        let (worker, _) = started?;
        let came = Came {
            left: chunks,
            reduce,
            each,
            message_max,
            replies: vec![],
            failed: None,
            is_done: false,
            broken: None,
        };
        Ok(Mapping { worker, came, output, outcome: None })
    }
}

/// Chunks on their way, and what has come back.
pub(super) struct Mapping {
    worker: Worker,
    came: Came,
    output: Option<BufferMut>,
    outcome: Option<Outcome>,
}

/// What has come back.
struct Came {
    /// Chunks that were not answered yet.
    left: Chunks,
    reduce: bool,
    each: Option<Each>,
    message_max: usize,
    replies: Vec<Message>,
    failed: Option<Failed>,
    /// The last call was answered.
    is_done: bool,
    /// It said what it should not.
    broken: Option<String>,
}

impl Mapping {
    /// What signals its process.
    pub(super) fn signaller(&self) -> Signaller {
        self.worker.process.signaller()
    }

    /// Waits until something has come, and takes it; whether its process is gone. Cancel-safe.
    pub(super) async fn step(&mut self) -> bool {
        let Self { worker: Worker { process, notes, .. }, came, .. } = self;
        let end = poll_fn(|cx| {
            let seen = process.poll(cx, |frame| {
                if came.broken.is_none()
                    && let Err(reason) = came.take(&frame)
                {
                    came.broken = Some(reason);
                }
                notes.take(&frame);
            });
            match seen {
                Poll::Ready(Seen::Gone(end)) => return Poll::Ready(Some(end)),
                Poll::Ready(Seen::Broken(error)) => _ = came.broken.get_or_insert(error.to_string()),
                Poll::Ready(Seen::Progress) => {}
                Poll::Pending => return Poll::Pending,
            }
            if came.broken.is_some() {
                process.signal(Signal::KILL);
            }
            Poll::Ready(None)
        });
        let Some(end) = end.await else { return false };
        let end = match came.broken.take() {
            Some(reason) => End::Failed { stage: Stage::Protocol, reason, hint: None },
            None => end,
        };
        self.outcome = Some(self.worker.gone(end));
        true
    }

    /// What came of it, when its process is gone.
    ///
    /// # Errors
    /// When its guest never ran.
    pub(super) fn finish(self) -> Result<Mapped, Error> {
        let Self { mut came, output, outcome, .. } = self;
        let mut outcome = ran(outcome.expect("its process is gone"))?;
        let is_whole = came.left.next().is_none() && (came.is_done || !came.reduce);
        if outcome.end == (End::Exited { code: 0 }) && came.failed.is_none() && !is_whole {
            let reason = "its process ended well before all was done".into();
            outcome.end = End::Failed { stage: Stage::Protocol, reason, hint: None };
        }
        let output = output.filter(|_| outcome.end == End::Exited { code: 0 } && came.failed.is_none());
        Ok(Mapped { replies: came.replies, output, outcome, failed: came.failed })
    }
}

impl Came {
    /// Takes a frame about a chunk, or the last call; others are nothing to it.
    ///
    /// # Errors
    /// Says what is wrong with it, when the process has broken the protocol.
    fn take(&mut self, frame: &Frame<'_>) -> Result<(), String> {
        let (Kind::Reply | Kind::NoReply | Kind::TaskError | Kind::TaskEnded) = frame.kind else { return Ok(()) };
        let is_last_call = frame.id == 0;
        if is_last_call {
            if !self.reduce || std::mem::replace(&mut self.is_done, true) {
                return Err("it answered a last call that was not made".into());
            }
        } else if self.failed.is_some() {
            return Err("it went on after a failure".into());
        }
        let chunk = if is_last_call { None } else { self.left.next() };
        if chunk.as_ref().map_or(0, id_of) != frame.id {
            return Err(format!("it answered out of turn (frame {})", frame.id));
        }
        // its process has looked at it already
        let message = || {
            let checked = Message::check(frame.body, self.message_max);
            checked.map_err(|error| format!("it sent what is no message: {error}"))
        };
        match frame.kind {
            Kind::Reply => {
                let reply = message()?;
                match (&mut self.each, &chunk) {
                    (Some(each), Some(chunk)) => each(chunk, Some(&reply)),
                    _ => self.replies.push(reply),
                }
            }
            Kind::NoReply => {
                if let (Some(each), Some(chunk)) = (&mut self.each, &chunk) {
                    each(chunk, None);
                }
            }
            Kind::TaskError => self.failed = Some(Failed { chunk, answer: Answer::Error(message()?) }),
            _ => {
                let outcome =
                    serde_json::from_slice(frame.body).map_err(|error| format!("it sent no outcome: {error}"))?;
                self.failed = Some(Failed { chunk, answer: Answer::Ended(outcome) });
            }
        }
        Ok(())
    }
}
