//! The chunks of a buffer, handed to instances of one guest on threads of this process.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use super::Builder;
use crate::{
    Error,
    buffer::{BufferMut, Failed, INPUT, Mapped, OUTPUT, ParMap},
    child::{can_map, entry, runtimes, threads},
    message::Message,
    outcome::{Answer, End, LimitKind, Outcome, Usage},
    sandbox::{
        BufferSource, Buffers, EngineSpec, Guest, Identity, Mapped as MappedCode, Pool, Setup, Shape, Stdio, Ticker,
        Work,
    },
};

/// How often guests that compute are asked to give way, which is when it shows that they shall end.
const TICK: Duration = Duration::from_millis(5);

impl Builder {
    /// Hands the chunks of a buffer to instances of the guest, a handler and a component, on as many threads as there are
    /// [workers](Builder::workers). Each gets `{"chunk":K,"offset":O,"length":L}` as its message and can have windows of the
    /// buffer, `input`, and of its range of the output, `output`: ranges of its own memory, which are not copied for that.
    /// The first that fails ends all, and so does dropping the future.
    ///
    /// A time limit holds for the whole. [`Command::par_map`](crate::Command::par_map) does the same in a process of its own,
    /// with the second wall around it.
    ///
    /// A picture is blurred twice, the second time from what the first has made:
    ///
    /// ```standalone_crate
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use wrun::{Buffer, ParMap, Threads, limits::Bytes};
    ///
    /// wrun::init(); // first thing in main: guests are compiled by this program, started again
    /// # let guest = guest_artifacts::BLUR;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    /// # rt.block_on(async {
    /// let mut picture = Buffer::from_slice(b"P5 4 4 255\n\0\0\0\0\0\x90\0\0\0\0\0\0\0\0\0\0")?;
    /// for _ in 0..2 {
    ///     let map = ParMap::over(picture.split(Bytes(9)).overlap(Bytes(5))).output(Buffer::zeroed(picture.length())?);
    ///     let blurred = Threads::builder(guest).workers(2).par_map(map).await?;
    ///     picture = blurred.output.expect("nothing failed").seal()?;
    /// }
    /// assert_eq!(picture[11..15], [16, 16, 10, 5]);
    /// # Ok(()) })
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the guest is no handler or cannot be loaded, or [`init`](crate::init) was not called first.
    pub async fn par_map(self, map: impl Into<ParMap>) -> Result<Mapped, Error> {
        let map = map.into();
        let workers = self.count();
        self.can_start()?;
        map.check(self.limits.memory).map_err(Error::Usage)?;
        let guest = Guest::read(&self.guest)?;
        let fuel = self.limits.fuel.is_some();
        let pool = Some(Pool { instances: workers, memory: self.limits.memory });
        let spec = EngineSpec { epoch_checks: true, fuel, stack: self.limits.stack, pool };
        let entry = entry(&self.cache, spec, &guest)?;
        let (code, _) = self.compiler.load(entry.as_deref(), spec, &guest).await?;
        can_map(&code.inspection, self.limits.memory)?;
        // an engine of its own, whose epoch is moved for these instances and no others
        let engine = spec.engine(&code.inspection).map_err(|error| Error::Usage(format!("{error:#}")))?;
        let sandbox = MappedCode::of(engine, &code)?.link(&code.inspection, Shape::Handler)?;

        let ParMap { chunks, output, reduce, each } = map;
        let shared = output.map(BufferMut::share);
        let sources = std::iter::once((INPUT.to_owned(), BufferSource::Input(chunks.buffer.clone())))
            .chain(shared.clone().map(|shared| (OUTPUT.to_owned(), BufferSource::Output(shared))));
        let (limits, timeout) = (self.limits.clone(), self.limits.timeout);
        let setup = Setup {
            data: self.data,
            stdio: self.output.map_or(Stdio::Inherit, Stdio::Sink),
            buffers: Arc::new(Buffers::of(sources)),
            ..Setup::alone(self.grants, limits, vec![guest.name.clone()], Identity::alone(guest.name, false))
        };
        let pool = threads(workers)?;
        let runtimes = runtimes(workers).map_err(Error::io("start the runtimes"))?;
        // dropped with this future, which ends all
        let (end, stop) = watch::channel(None);
        let (done, came) = oneshot::channel();
        let ticking = Ticking::start(sandbox.ticker()).map_err(Error::io("start a clock"))?;
        let pin = self.pin;
        let run = move || {
            let begun = Instant::now();
            let has_output = shared.is_some();
            let heard = Mutex::new((each, vec![]));
            let work = Work {
                sandbox: &sandbox,
                setup: &setup,
                pool: &pool,
                runtimes,
                chunks,
                has_output,
                reduce,
                pin,
                stop: Some(stop),
            };
            let result = work.run(&|chunk, reply| {
                let (each, replies) = &mut *heard.lock().unwrap_or_else(PoisonError::into_inner);
                match each {
                    Some(each) => each(chunk, reply),
                    None => replies.extend(reply.cloned()),
                }
            });
            drop(ticking);
            // with it, all windows are gone
            drop((setup, pool, sandbox));
            let (_, replies) = heard.into_inner().unwrap_or_else(PoisonError::into_inner);
            let _ = done.send(mapped(result, replies, shared.map(BufferMut::shared), begun.elapsed()));
        };
        thread::Builder::new().name("wrun-map".into()).spawn(run).map_err(Error::io("start a thread"))?;
        let mut came = came;
        let mapped = match timeout {
            None => (&mut came).await,
            Some(timeout) => {
                if let Ok(mapped) = tokio::time::timeout(timeout, &mut came).await {
                    mapped
                } else {
                    end.send_replace(Some(End::Limit { limit: LimitKind::Time, allowed: format!("{timeout:?}") }));
                    came.await
                }
            }
        };
        mapped.map_err(|_| Error::Stopped)
    }
}

fn mapped(
    result: Result<Option<Message>, Box<Failed>>,
    mut replies: Vec<Message>,
    output: Option<BufferMut>,
    took: Duration,
) -> Mapped {
    let usage = Usage::wall(took);
    match result {
        Ok(last) => {
            replies.extend(last);
            Mapped { replies, output, outcome: End::Exited { code: 0 }.with(usage), failed: None }
        }
        Err(failed) => {
            let outcome = match &failed.answer {
                Answer::Ended(outcome) => Outcome { usage, ..outcome.clone() },
                _ => End::Exited { code: 1 }.with(usage),
            };
            Mapped { replies, output: None, outcome, failed: Some(*failed) }
        }
    }
}

/// A thread that moves an engine's clock until this is dropped.
struct Ticking {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Ticking {
    fn start(ticker: Ticker) -> io::Result<Self> {
        let over = Arc::<AtomicBool>::default();
        let told = over.clone();
        let tick = move || {
            while !told.load(Ordering::Relaxed) {
                thread::park_timeout(TICK);
                ticker.tick();
            }
        };
        let thread = thread::Builder::new().name("wrun-clock".into()).stack_size(64 << 10).spawn(tick)?;
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
