//! `wrun cluster`: a guest as a pool of supervised worker processes.
//!
//! The workers of a pool get tasks from their primary ([`Cluster::request`], [`lines`]), or share a port and answer what
//! comes there ([`Builder::listen`], [`serve`]). Either way they are the same processes under the same supervision.

mod builder;
mod choice;
mod dispatch;
pub mod lines;
mod pool;
pub mod serve;
mod server;

use std::{
    net::SocketAddr,
    path::PathBuf,
    task::{Context, Poll},
    thread::JoinHandle,
};

use tokio::sync::{broadcast, mpsc, oneshot};

pub(in crate::mode) use self::pool::Stop;
use self::pool::{Client, Request};
pub use self::{
    builder::Builder,
    choice::{Balance, InstanceLife, Interrupt},
};
pub use crate::outcome::Answer;
use crate::{Error, event::Event, message::Message};

/// How a pool ended that a command ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All its work is done.
    Done,
    /// A signal asked for an early end. What was begun is answered, if only with `cancelled`.
    Stopped {
        /// The signal.
        signal: i32,
        /// Whether workers had to be killed.
        killed: bool,
    },
    /// Nobody reads the answers any more.
    OutputClosed,
}

/// What the owner of a pool wants of it.
#[derive(Debug)]
pub(in crate::mode) enum Order {
    /// An early end.
    Stop(Stop),
    /// Workers of the guest as it is now.
    Reload(oneshot::Sender<Result<(), Error>>),
}

/// Where the work of a pool comes from.
#[derive(Debug)]
enum Work {
    /// From whoever has the [`Cluster`].
    Tasks(mpsc::Sender<(oneshot::Sender<Answer>, Message)>),
    /// From a port.
    Port(SocketAddr),
}

/// A running pool of workers. Dropping it ends them at once; [`Cluster::shutdown`] lets them finish.
///
/// ```standalone_crate
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use wrun::{Cluster, cluster::Answer, event::Event, message::Message};
///
/// wrun::init(); // workers are this program, started again
/// # let guest = guest_artifacts::WHOAMI;
/// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # rt.block_on(async {
/// let cluster = Cluster::builder(guest).workers(2).data(Message::of(&42)?).start().await?;
/// let mut events = cluster.events();
///
/// #[derive(serde::Deserialize)]
/// struct Who {
///     pid: i32,
///     data: u32,
/// }
/// let Answer::Reply(reply) = cluster.request(Message::null()).await? else { panic!("whoami replies") };
/// let who: Who = reply.to()?;
/// assert_eq!(who.data, 42);
///
/// // A worker that dies is replaced.
/// # let pid = rustix::process::Pid::from_raw(who.pid).expect("a process");
/// rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
/// while !matches!(events.recv().await?, Event::Exit { .. }) {}
/// while !matches!(events.recv().await?, Event::Restart { .. }) {}
/// assert!(matches!(cluster.request(Message::null()).await?, Answer::Reply(_)));
///
/// cluster.shutdown().await?;
/// # Ok(()) })
/// # }
/// ```
#[derive(Debug)]
pub struct Cluster {
    work: Work,
    /// Taken by a shutdown; a drop without one stops the pool at once.
    orders: Option<mpsc::UnboundedSender<Order>>,
    events: broadcast::Sender<Event>,
    /// Where the pool runs, when that is a thread of its own.
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Cluster {
    /// A pool of the guest in a file: one worker per core, no grants, the default limits.
    pub fn builder(guest: impl Into<PathBuf>) -> Builder {
        Builder::new(guest.into())
    }

    /// Gives the pool a task, and waits for its answer. Waits for room first when the pool's queue is full.
    ///
    /// Cancel-safe before the pool has taken the task; after that a dropped request is answered to nobody.
    ///
    /// # Errors
    /// When the pool has stopped, or serves a port: then its work comes from there.
    pub async fn request(&self, message: Message) -> Result<Answer, Error> {
        let Work::Tasks(tasks) = &self.work else {
            return Err(Error::Usage("this pool serves a port: send it requests there".into()));
        };
        let (ticket, answer) = oneshot::channel();
        tasks.send((ticket, message)).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)
    }

    /// Where a pool listens that serves a port ([`Builder::listen`]), with the real port when any was asked for.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match self.work {
            Work::Tasks(_) => None,
            Work::Port(address) => Some(address),
        }
    }

    /// Replaces all workers of a port by ones of the guest as its file is now, and waits until they have taken over.
    /// No request is lost: the old ones finish what they have. A reload that comes while another is under way follows it.
    ///
    /// # Errors
    /// When the guest cannot be loaded or one of the new workers does not get ready: then none takes over, and the old
    /// ones go on. When the pool serves no port, or has stopped.
    pub async fn reload(&self) -> Result<(), Error> {
        let orders = self.orders.as_ref().ok_or(Error::Stopped)?;
        let (told, ended) = oneshot::channel();
        orders.send(Order::Reload(told)).map_err(|_| Error::Stopped)?;
        ended.await.map_err(|_| Error::Stopped)?
    }

    /// What happens from now on. A receiver that falls 1,024 events behind is told how many it has missed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Takes no more tasks or connections, waits until those that were begun are answered, for at most the grace time,
    /// and ends the workers. Tasks that were not begun are answered with a cancelled outcome.
    ///
    /// Of a pool that runs on the caller's thread ([`Builder::start_here`]) it only asks: that one's future tells.
    ///
    /// # Errors
    /// When every worker had failed.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        if let Some(orders) = self.orders.take() {
            let _ = orders.send(Order::Stop(Stop::Politely));
        }
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let joined = tokio::task::spawn_blocking(|| thread.join()).await;
        match joined {
            Ok(Ok(ended)) => ended,
            _ => Err(Error::Stopped),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(orders) = self.orders.take() {
            let _ = orders.send(Order::Stop(Stop::Now));
        }
        if let Some(thread) = self.thread.take() {
            // takes as long as the kernel needs to end the workers
            let _ = thread.join();
        }
    }
}

/// The pool's side of a [`Cluster`].
struct Handle {
    submitted: mpsc::Receiver<(oneshot::Sender<Answer>, Message)>,
    ordered: mpsc::UnboundedReceiver<Order>,
    finished: Vec<(oneshot::Sender<Answer>, Answer)>,
}

impl Client for Handle {
    type Ticket = oneshot::Sender<Answer>;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Request<Self::Ticket>> {
        self.submitted.poll_recv(cx).map(|submitted| match submitted {
            Some((ticket, message)) => Request::Task(ticket, message),
            None => Request::Finish,
        })
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stop> {
        loop {
            match self.ordered.poll_recv(cx) {
                Poll::Ready(Some(Order::Stop(stop))) => return Poll::Ready(stop),
                Poll::Ready(Some(Order::Reload(told))) => {
                    let reason = "expected a pool that serves a port: only those are reloaded";
                    let _ = told.send(Err(Error::Usage(reason.into())));
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn poll_has_room(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn complete(&mut self, ticket: Self::Ticket, answer: Answer, _: u32) {
        self.finished.push((ticket, answer));
    }

    fn flush(&mut self) {
        for (ticket, answer) in self.finished.drain(..) {
            // whoever asked may have gone
            let _ = ticket.send(answer);
        }
    }
}
