//! A pool of handler workers: tasks in, answers out. What the tasks come from and where the answers go is a [`Client`].

use std::{
    future::{Future, poll_fn},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use super::dispatch::Dispatch;
use crate::{
    Error,
    event::{Event, WorkerId},
    limits::Limits,
    message::Message,
    outcome::{Answer, End, LimitKind, Outcome, Usage},
    process::wire::Kind,
    supervisor::{Step, Supervisor},
};

/// Whoever gives tasks to a pool.
pub(crate) trait Client {
    /// What it knows a task by.
    type Ticket;

    /// What to do next. Asked only while there is room.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Request<Self::Ticket>>;

    /// What to do now, whether there is room or not: a stop.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stop>;

    /// Whether more answers can be taken; while not, no task is begun.
    fn poll_has_room(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// A task is done, and was begun so many times.
    fn complete(&mut self, ticket: Self::Ticket, answer: Answer, attempts: u32);

    /// All that could be told for now has been told.
    fn flush(&mut self);
}

/// What a client wants.
#[derive(Debug)]
pub(crate) enum Request<T> {
    /// A task to be done.
    Task(T, Message),
    /// Nothing more: do what there is, then end.
    Finish,
}

/// An early end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Begin nothing more, finish what is begun.
    Politely,
    /// At once.
    Now,
}

/// What bounds a pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolLimits {
    /// The most tasks that wait for a worker ...
    pub(crate) queue: usize,
    /// ... and the most bytes.
    pub(crate) queue_bytes: usize,
    /// How often a task is tried again when its worker dies.
    pub(crate) retries: u32,
    /// When the primary ends a task's worker; none when there is no time limit.
    pub(crate) kill_after: Option<Duration>,
}

/// How a pool ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// All workers ended by themselves.
    Drained,
    /// Some had to be killed: at once as asked, or when the grace time was over.
    Killed,
}

pub(crate) struct Pool<C: Client> {
    supervisor: Supervisor,
    dispatch: Dispatch<C::Ticket>,
    client: C,
    limits: Limits,
    bounds: PoolLimits,
    phase: Phase,
    killed: bool,
    timer: std::pin::Pin<Box<tokio::time::Sleep>>,
    /// What frames told while the supervisor was busy handing them out.
    pending: Vec<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Takes tasks.
    Open,
    /// Takes no more, does what it has.
    Finishing,
    /// Waits for its workers to end.
    Draining,
}

impl<C: Client> Pool<C> {
    pub(crate) fn new(
        supervisor: Supervisor,
        workers: u32,
        concurrency: u32,
        limits: Limits,
        bounds: PoolLimits,
        client: C,
    ) -> Self {
        Self {
            supervisor,
            dispatch: Dispatch::new(workers, concurrency, Instant::now()),
            client,
            limits,
            bounds,
            phase: Phase::Open,
            killed: false,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            pending: vec![],
        }
    }

    /// Runs until the client has no more tasks, all are answered, and all workers are gone.
    ///
    /// # Errors
    /// When every worker failed; all tasks have been answered, with that.
    pub(crate) async fn run(&mut self) -> Result<Finish, Error> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Gives the client back.
    pub(crate) fn into_client(self) -> C {
        self.client
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Finish, Error>> {
        loop {
            self.listen(cx);
            self.work(cx);
            if self.phase == Phase::Finishing && self.dispatch.is_idle() {
                self.phase = Phase::Draining;
                self.supervisor.drain();
            }
            self.supervisor.flush();
            self.client.flush();

            let Poll::Ready(step) = self.watch(cx) else {
                return match self.poll_timeout(cx) {
                    Poll::Ready(()) => continue,
                    Poll::Pending => Poll::Pending,
                };
            };
            match step {
                Step::Online(worker) if self.phase != Phase::Draining => self.dispatch.open(worker),
                Step::Online(_) | Step::Reloaded(_) | Step::Progress => {}
                Step::Gone { worker, outcome, begun } => self.lost(worker, &outcome, begun),
                Step::Down(failure) => {
                    return Poll::Ready(self.down(failure));
                }
            }
        }
    }

    /// Takes stops, and tasks while there is room for them.
    fn listen(&mut self, cx: &mut Context<'_>) {
        if let Poll::Ready(stop) = self.client.poll_stop(cx) {
            match stop {
                Stop::Politely => {
                    self.phase = Phase::Draining;
                    self.cancel_waiting();
                    self.supervisor.drain();
                }
                Stop::Now => {
                    self.phase = Phase::Draining;
                    self.killed = true;
                    self.cancel_waiting();
                    self.supervisor.kill_all();
                }
            }
        }
        while self.phase == Phase::Open {
            let (tasks, bytes) = self.dispatch.waiting();
            if tasks >= self.bounds.queue || bytes >= self.bounds.queue_bytes {
                break;
            }
            match self.client.poll_next(cx) {
                Poll::Ready(Request::Task(ticket, message)) => self.dispatch.submit(ticket, message),
                Poll::Ready(Request::Finish) => self.phase = Phase::Finishing,
                Poll::Pending => break,
            }
        }
    }

    /// Gives tasks to workers.
    fn work(&mut self, cx: &mut Context<'_>) {
        if self.phase == Phase::Draining || self.client.poll_has_room(cx).is_pending() {
            return;
        }
        let now = Instant::now();
        while let Some((worker, id, message)) = self.dispatch.next(now) {
            self.supervisor.send(worker, Kind::Task, id, message.as_str().as_bytes());
        }
    }

    /// Takes what workers send.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        let Self { supervisor, dispatch, client, limits, pending, .. } = self;
        let mut counted: Option<(WorkerId, u64)> = None;
        let mut answered = vec![];
        let now = Instant::now();
        let step = supervisor.poll(cx, |worker, frame| {
            let answer = match frame.kind {
                Kind::Reply => match Message::check(frame.body, limits.message_max.as_usize()) {
                    Ok(reply) => Answer::Reply(reply),
                    Err(error) => Answer::Invalid(error),
                },
                Kind::NoReply => Answer::NoReply,
                Kind::TaskError => match Message::check(frame.body, limits.message_max.as_usize()) {
                    Ok(reason) => Answer::Error(reason),
                    Err(error) => Answer::Invalid(error),
                },
                Kind::TaskEnded => match serde_json::from_slice::<Outcome>(frame.body) {
                    Ok(outcome) => {
                        pending.push(Event::Limit { worker, outcome: outcome.clone() });
                        Answer::Ended(outcome)
                    }
                    Err(error) => return Err(format!("it sent a broken outcome: {error}")),
                },
                kind => return Err(format!("it sent {kind:?}, which is not for this pool")),
            };
            match dispatch.answered(worker, frame.id, now) {
                Some(task) => {
                    match &mut counted {
                        Some((last, count)) if *last == worker => *count += 1,
                        _ => answered.extend(counted.replace((worker, 1))),
                    }
                    client.complete(task.ticket, answer, task.attempts);
                }
                None => return Err(format!("it answered task {}, which it does not have", frame.id)),
            }
            Ok(())
        });
        for (worker, count) in answered.into_iter().chain(counted) {
            self.supervisor.count_tasks(worker, count);
        }
        for event in self.pending.drain(..) {
            self.supervisor.emit(event);
        }
        step
    }

    /// Ends the worker whose task is out of time.
    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(timeout) = self.bounds.kill_after else { return Poll::Pending };
        let Some((at, worker)) = self.dispatch.deadline(timeout) else { return Poll::Pending };
        self.timer.as_mut().reset(at.into());
        if self.timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.dispatch.close(worker);
        let allowed = self.limits.timeout.unwrap_or(timeout);
        self.supervisor.enforce(worker, End::Limit { limit: LimitKind::Time, allowed: format!("{allowed:?}") });
        Poll::Ready(())
    }

    /// A worker is gone, and its tasks with it, or not.
    fn lost(&mut self, worker: WorkerId, outcome: &Outcome, begun: u64) {
        let lost = self.dispatch.lost(worker, begun, self.bounds.retries);
        if lost.retried > 0 {
            let message = format!("{} tasks that it had begun are tried again", lost.retried);
            self.supervisor.emit(Event::Error { worker: Some(worker), message });
        }
        for task in lost.failed {
            self.client.complete(task.ticket, Answer::Ended(outcome.clone()), task.attempts);
        }
        if self.phase == Phase::Draining {
            self.cancel_waiting();
        }
    }

    fn cancel_waiting(&mut self) {
        for task in self.dispatch.cancel_waiting() {
            let cancelled = End::Cancelled.with(Usage::default());
            self.client.complete(task.ticket, Answer::Ended(cancelled), task.attempts);
        }
    }

    /// No worker is left.
    fn down(&mut self, failure: Option<Outcome>) -> Result<Finish, Error> {
        for task in self.dispatch.cancel_waiting() {
            let outcome = failure.clone().unwrap_or_else(|| End::Cancelled.with(Usage::default()));
            self.client.complete(task.ticket, Answer::Ended(outcome), task.attempts);
        }
        self.client.flush();
        match failure {
            Some(last) => Err(Error::PoolFailed { last }),
            None if self.killed || self.supervisor.grace_exceeded() => Ok(Finish::Killed),
            None => Ok(Finish::Drained),
        }
    }
}
