//! A group: threads of one guest that share one linear memory, each with a store and an instance of its own.
//!
//! Two kinds of guests make them, both core modules that import their memory. A *command* makes threads when it likes
//! (`wasi.thread-spawn`, which the C library's `pthread_create` calls). A *handler* is told to make its workers, once, and
//! each of them comes to the host to be handed messages: so the guest's own C library makes all threads, and stacks and
//! thread-local variables are right, while what a worker does next is the host's matter ([`work`]).
//!
//! A group ends as a whole: with the first thread that traps, exits or hits a limit, with its main thread, or when it is
//! stopped. What a thread leaves behind in a memory that others use is unknown, so nothing of a group is used again.
//!
//! Ending it from inside takes code that was compiled with epoch checks, in which atomic waits are calls of the host
//! ([`mod@rewrite`], [`parking`]); otherwise the group has a process of its own, which ends with it.

mod canonical;
mod contract;
mod link;
mod memory;
mod parking;
mod rewrite;
mod wasi;
mod work;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use wasmtime::{Engine, InstancePre, ResourceLimiter, Store, Trap, UpdateDeadline};

pub(crate) use self::work::{NotTaken, Task};
pub(super) use self::{
    contract::check as check_contract,
    link::link,
    rewrite::{MODULE as OWN_IMPORTS, rewrite},
};
use self::{link::MemoryFull, parking::Parking, wasi::Wasi, work::Work};
pub use self::{
    memory::{OutOfBounds, SharedMemory},
    work::To,
};
use crate::{
    message::Message,
    outcome::{End, LimitKind, Outcome, Stage, Thread, Usage, millis},
    sandbox::{
        Answer, Full, LoadError, Received, Setup, Shape,
        cores::Cores,
        engine::{HOST_STACK, TABLE_ELEMENTS_MAX},
        instance,
    },
};

/// Who hears what the workers of a group answer.
pub(crate) trait Answers: Send + Sync {
    /// Takes an answer, on the worker's thread, which has more to do at once or has not. It may block: then the worker gets
    /// its next message later.
    fn answer(&self, worker: u32, id: u64, answer: Answer, more_to_come: bool);

    /// Takes what a thread sends beside its answers; none of a command's. Never blocks.
    ///
    /// # Errors
    /// When there is no room.
    fn message(&self, worker: u32, message: Message) -> Result<(), Full>;
}

/// Nobody hears: of a command.
impl Answers for () {
    fn answer(&self, _: u32, _: u64, _: Answer, _: bool) {}

    fn message(&self, _: u32, _: Message) -> Result<(), Full> {
        Err(Full)
    }
}

/// A module that was linked with a memory of its own: good for one group.
pub(crate) struct Program {
    engine: Engine,
    pre: InstancePre<State>,
    memory: wasmtime::SharedMemory,
    shape: Shape,
}

/// What one thread's store has.
pub(crate) struct State {
    running: Option<Running>,
    own: Own,
}

/// One thread of a group.
struct Running {
    group: Arc<Inner>,
    /// Who it is, for those outside.
    thread: Thread,
    /// The worker that it is, or that it was made by.
    worker: Option<u32>,
    /// Its place among all that wait.
    place: usize,
}

/// What a thread has for itself: tables, and memories that are not the group's, such as the engine's for what is thrown.
struct Own {
    budget: Arc<Budget>,
    bytes: usize,
}

/// How much memory of their own the threads of a group may have together.
#[derive(Default)]
struct Budget {
    used: AtomicUsize,
    most: usize,
}

impl ResourceLimiter for Own {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current);
        let used = self.budget.used.fetch_add(more, Ordering::Relaxed);
        self.bytes += more;
        if used.saturating_add(more) > self.budget.most {
            return Err(MemoryFull.into());
        }
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl State {
    fn running(&self) -> &Running {
        self.running.as_ref().expect("only a thread that runs calls the host")
    }

    fn group(&self) -> &Arc<Inner> {
        &self.running().group
    }

    /// The end of a thread whose group is stopped.
    fn interrupted() -> wasmtime::Error {
        Trap::Interrupt.into()
    }

    fn check_stopped(&self) -> wasmtime::Result<i32> {
        if self.group().parking.is_stopped() { Err(Self::interrupted()) } else { Ok(0) }
    }
}

/// An answer is longer than a message may be: the end of the group.
#[derive(Debug, thiserror::Error)]
#[error("message limit")]
struct TooLong;

/// What a group is started with.
pub(crate) struct GroupSetup {
    /// What its guest gets.
    pub(crate) setup: Arc<Setup>,
    /// Whether each thread stays on one core.
    pub(crate) pin: bool,
    /// Whether this process's standard input is the guest's. A thread that reads it is ended with the process only.
    pub(crate) input: bool,
    /// Who hears what its workers answer.
    pub(crate) answers: Arc<dyn Answers>,
}

/// A group that was started. It goes on when this is dropped.
#[derive(Clone)]
pub(crate) struct Group(Arc<Inner>);

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Group")
    }
}

/// What all threads of a group have in common.
struct Inner {
    engine: Engine,
    pre: InstancePre<State>,
    memory: wasmtime::SharedMemory,
    /// How many pages the guest itself wants at most.
    declared: u64,
    wasi: Wasi,
    setup: Arc<Setup>,
    answers: Arc<dyn Answers>,
    budget: Arc<Budget>,
    parking: Parking,
    work: Work,
    cores: Cores,
    started: Instant,
    state: Mutex<Life>,
    changed: Condvar,
}

/// How a group fares.
#[derive(Default)]
struct Life {
    /// How it ended, with the first of its threads that did, and after how long.
    end: Option<(End, Option<Thread>, Duration)>,
    /// Places that no thread has.
    free: Vec<usize>,
    /// Threads that have not left.
    threads: usize,
    /// Threads that were made, which are numbered.
    made: u32,
    /// Workers that have come, each once, ...
    entered: Vec<bool>,
    /// ... and how many have gone again.
    left: usize,
    /// What its threads that have left used.
    cpu: Duration,
}

/// What a thread does.
enum Entry {
    /// The first one: runs the command, or makes the workers.
    Main(Shape),
    /// One that the guest made, with what it is to be told.
    Made { id: i32, argument: i32 },
}

impl Group {
    /// Starts the main thread, and with it the guest.
    ///
    /// # Errors
    /// When something granted is not there, or the system has no room for a thread.
    pub(crate) fn start(program: Program, setup: GroupSetup) -> Result<Self, LoadError> {
        let Program { engine, pre, memory, shape } = program;
        let GroupSetup { setup, pin, input, answers } = setup;
        let declared = pre.module().imports().find_map(|import| import.ty().memory()?.maximum()).unwrap_or(0);
        let places = setup.limits.threads as usize + 1;
        let workers = if shape == Shape::Handler { setup.identity.count } else { 0 };
        let files = instance::wasi(&setup)?.build_p1();
        let inner = Arc::new(Inner {
            engine,
            wasi: Wasi::new(files, &setup.stdio, input, setup.limits.memory.as_usize()),
            pre,
            memory,
            declared,
            budget: Arc::new(Budget { used: AtomicUsize::new(0), most: setup.limits.memory.as_usize() }),
            parking: Parking::new(places),
            work: Work::new(workers as usize),
            cores: Cores::of_this_process(pin),
            started: Instant::now(),
            state: Mutex::new(Life {
                free: (0..places).rev().collect(),
                entered: vec![false; workers as usize],
                ..Life::default()
            }),
            changed: Condvar::new(),
            setup,
            answers,
        });
        let thread = Thread { id: 0, name: "main".into() };
        inner.start_thread(thread, None, Entry::Main(shape)).map_err(|reason| LoadError::Reported {
            stage: Stage::Start,
            reason: reason.to_string(),
            hint: None,
        })?;
        Ok(Self(inner))
    }

    /// Hands it a message; see [`Work`].
    ///
    /// # Errors
    /// When it is not taken.
    pub(crate) fn post(&self, to: To, task: Task) -> Result<(), NotTaken> {
        self.0.work.post(to, task)
    }

    /// Whether as many messages wait as may.
    pub(crate) fn is_full(&self) -> bool {
        self.0.work.is_full()
    }

    /// Hands it a message when there is room for it.
    ///
    /// # Errors
    /// When no more are taken.
    pub(crate) fn post_when_there_is_room(&self, to: To, task: Task) -> Result<(), NotTaken> {
        self.0.work.post_when_there_is_room(to, task)
    }

    /// Takes no more messages. When its workers have handled all that were taken, it ends.
    pub(crate) fn close(&self) {
        self.0.work.close();
    }

    /// Waits until all workers are there, at most until then; whether they are, or were. A command has none to wait for.
    pub(crate) fn ready(&self, until: Option<Instant>) -> bool {
        let ready = self.0.until(until, |life| match life {
            life if life.entered.iter().all(|entered| *entered) => Some(true),
            life => life.end.is_some().then_some(false),
        });
        ready == Some(true)
    }

    /// Ends it with this outcome, unless it has ended already. Its threads may still be there.
    pub(crate) fn end(&self, end: End) {
        self.0.finish(end, None);
    }

    /// Waits until it has ended, at most until then; none when it has not.
    pub(crate) fn ended(&self, until: Option<Instant>) -> Option<Outcome> {
        self.0.until(until, |life| {
            let (end, thread, wall) = life.end.as_ref()?;
            let usage = Usage {
                cpu_ms: Some(millis(life.cpu)),
                memory_peak: Some(self.0.memory.data_size() as u64),
                ..Usage::wall(*wall)
            };
            Some(Outcome { thread: thread.clone().map(Box::new), ..end.clone().with(usage) })
        })
    }

    /// Waits until it has ended. How it did, and what the threads have used that have left.
    pub(crate) fn outcome(&self) -> Outcome {
        self.ended(None).expect("without a time, it ends")
    }

    /// Waits until all threads of a group that has ended have left. For code with epoch checks only: others go on.
    ///
    /// The flag that they look at is set; this brings them to look at it, in every round anew, since a thread may begin to
    /// wait, or to run, after it was looked for.
    pub(crate) fn clear(&self) {
        let Inner { engine, memory, parking, changed, .. } = &*self.0;
        let mut life = self.0.life();
        while life.threads > 0 {
            engine.increment_epoch();
            for address in parking.addresses() {
                // an address that is no good traps the thread that waits there
                let _ = memory.atomic_notify(address, u32::MAX);
            }
            life = changed.wait_timeout(life, ROUND).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The memory that its threads share.
    pub(crate) fn memory(&self) -> SharedMemory {
        SharedMemory::of(&self.0.memory)
    }
}

/// How long a thread that has ended may take until another one has its place.
const CLEARING_UP: Duration = Duration::from_millis(20);

/// How long it takes until threads that were told to leave are told again.
const ROUND: Duration = Duration::from_micros(200);

impl Inner {
    fn life(&self) -> MutexGuard<'_, Life> {
        // whole after every call, whoever panicked
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `look` finds something, at most until then.
    fn until<T>(&self, until: Option<Instant>, mut look: impl FnMut(&mut Life) -> Option<T>) -> Option<T> {
        let mut life = self.life();
        loop {
            if let Some(found) = look(&mut life) {
                return Some(found);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            life = match left {
                Some(Duration::ZERO) => return None,
                Some(left) => self.changed.wait_timeout(life, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(life).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Ends the group, unless it has ended already.
    fn finish(&self, end: End, thread: Option<Thread>) {
        let after = self.started.elapsed();
        self.life().end.get_or_insert((end, thread, after));
        self.parking.stop();
        self.work.stop();
        self.changed.notify_all();
    }

    /// Notes that a worker has come, and answers its index; none when there is no such worker, or it is there already.
    fn enter(&self, worker: u32) -> Option<usize> {
        let index = (worker as usize).checked_sub(1)?;
        let mut life = self.life();
        let entered = life.entered.get_mut(index)?;
        if std::mem::replace(entered, true) {
            return None;
        }
        drop(life);
        self.changed.notify_all();
        Some(index)
    }

    /// Notes that a worker has no more to do.
    fn leave(&self) {
        self.life().left += 1;
        self.changed.notify_all();
    }

    /// Hands on what a thread sends to its parent; none when there is nobody.
    fn send(&self, worker: Option<u32>, message: Message) -> Option<Result<(), Full>> {
        match (&self.setup.mailbox, worker) {
            (Some(mailbox), _) => Some(mailbox.send(message)),
            (None, Some(worker)) => Some(self.answers.message(worker, message)),
            (None, None) => None,
        }
    }

    /// The next message for a command; a handler's come as tasks.
    fn receive(&self, within: Option<Duration>) -> Received {
        match &self.setup.mailbox {
            Some(mailbox) => wasi::block_on(mailbox.receive(within)),
            None => Received::Closed,
        }
    }

    /// Makes a thread for the guest; none when there are as many as there may be.
    fn spawn(self: &Arc<Self>, argument: i32, worker: Option<u32>) -> Option<i32> {
        let made = {
            let mut life = self.life();
            life.made = life.made.saturating_add(1);
            life.made
        };
        // what the C library takes for an id
        let id = i32::try_from(made).ok().filter(|id| *id < 1 << 29)?;
        let thread = Thread { id: made, name: format!("thread-{made}") };
        self.start_thread(thread, worker, Entry::Made { id, argument }).ok().map(|()| id)
    }

    /// Room for one more thread, if there is some. When all places are taken it waits a moment: a guest that has joined a
    /// thread knows that this is done, while its host is still clearing up behind it.
    fn place(&self) -> Option<usize> {
        let until = Some(Instant::now() + CLEARING_UP);
        self.until(until, |life| {
            let place = life.free.pop();
            life.threads += usize::from(place.is_some());
            match place {
                None if life.end.is_none() => None,
                place => Some(place),
            }
        })?
    }

    fn start_thread(self: &Arc<Self>, thread: Thread, worker: Option<u32>, entry: Entry) -> std::io::Result<()> {
        let place = self.place().ok_or_else(|| std::io::Error::other("there are as many as there may be"))?;
        let group = self.clone();
        let stack = self.setup.limits.stack.as_usize().saturating_add(HOST_STACK);
        let made = std::thread::Builder::new().name("wrun-thread".into()).stack_size(stack).spawn(move || {
            group.name_thread(&thread);
            group.cores.settle(place);
            let ran = catch_unwind(AssertUnwindSafe(|| group.run(thread.clone(), worker, place, &entry)));
            let ran = ran.unwrap_or_else(|_| {
                let reason = "the host panicked in one of its threads".into();
                Some((End::Failed { stage: Stage::Start, reason, hint: None }, thread))
            });
            group.gone(place, ran);
        });
        made.map(drop).inspect_err(|_| self.vacate(place, Duration::ZERO))
    }

    /// Gives the calling thread a name that the system shows, of which it has room for 15 bytes.
    fn name_thread(&self, thread: &Thread) {
        let guest: String = self.setup.identity.name.chars().filter(char::is_ascii_graphic).take(5).collect();
        let name = format!("{guest}/{}", thread.name);
        if let Ok(name) = std::ffi::CString::new(&name[..name.len().min(15)]) {
            let _ = rustix::thread::set_name(&name);
        }
    }

    /// Notes that a thread has left, and how it ended when that is the end of all.
    fn gone(&self, place: usize, ran: Option<(End, Thread)>) {
        if let Some((end, thread)) = ran {
            // that the main thread exits is nothing to be told about a thread
            let is_ordinary = thread.id == 0 && matches!(end, End::Exited { .. });
            self.finish(end, (!is_ordinary).then_some(thread));
        }
        self.vacate(place, thread_time());
    }

    fn vacate(&self, place: usize, cpu: Duration) {
        let mut life = self.life();
        life.free.push(place);
        life.threads -= 1;
        life.cpu += cpu;
        drop(life);
        self.changed.notify_all();
    }

    /// Runs a thread's guest code. How it ended, when that is the end of the group; its store is gone then.
    fn run(
        self: &Arc<Self>,
        thread: Thread,
        worker: Option<u32>,
        place: usize,
        entry: &Entry,
    ) -> Option<(End, Thread)> {
        let own = Own { budget: self.budget.clone(), bytes: 0 };
        let running = Running { group: self.clone(), thread, worker, place };
        let mut store = Store::new(&self.engine, State { running: Some(running), own });
        store.limiter(|state| &mut state.own);
        // with epoch checks, whoever stops the group bumps the epoch; without, this is nothing
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|context| context.data().check_stopped().map(|_| UpdateDeadline::Continue(1)));
        let result = match entry {
            // one that comes after the end does not begin
            _ if self.parking.is_stopped() => Err(State::interrupted()),
            Entry::Main(Shape::Handler) => self.make_workers(&mut store).map(|()| Some(0)),
            Entry::Main(_) => self
                .pre
                .instantiate(&mut store)
                .and_then(|instance| instance.get_typed_func::<(), ()>(&mut store, "_start")?.call(&mut store, ()))
                .map(|()| Some(0)),
            Entry::Made { id, argument } => self
                .pre
                .instantiate(&mut store)
                .and_then(|instance| {
                    let start = instance.get_typed_func::<(i32, i32), ()>(&mut store, "wasi_thread_start")?;
                    start.call(&mut store, (*id, *argument))
                })
                .map(|()| None),
        };
        let limits = &self.setup.limits;
        let end = match result {
            Ok(code) => End::Exited { code: code? },
            Err(error) if error.is::<MemoryFull>() => {
                End::Limit { limit: LimitKind::Memory, allowed: limits.memory.to_string() }
            }
            Err(error) if error.is::<TooLong>() => {
                End::Limit { limit: LimitKind::Message, allowed: limits.message_max.to_string() }
            }
            Err(error) => instance::end_of(&error, limits),
        };
        Some((end, store.data().running().thread.clone()))
    }

    /// Lets the guest make its workers, and waits until they have nothing more to do.
    fn make_workers(&self, store: &mut Store<State>) -> wasmtime::Result<()> {
        let instance = self.pre.instantiate(&mut *store)?;
        if let Ok(initialize) = instance.get_typed_func::<(), ()>(&mut *store, "_initialize") {
            initialize.call(&mut *store, ())?;
        }
        let count = self.setup.identity.count;
        let start = instance.get_typed_func::<u32, u32>(&mut *store, canonical::START)?;
        if start.call(&mut *store, count)? != 1 {
            return Err(wasmtime::format_err!(
                "it could not make {count} threads (--threads {})",
                self.setup.limits.threads
            ));
        }
        let mut life = self.life();
        while life.left < life.entered.len() && life.end.is_none() {
            // with this one
            if life.threads == 1 {
                return Err(wasmtime::format_err!("its threads have ended before their work"));
            }
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

/// The CPU time of the calling thread.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
