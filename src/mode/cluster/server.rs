//! The primary's part of a port: it takes the port, keeps the workers that serve it, and replaces them. It sees no
//! request.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use tokio::sync::{mpsc, oneshot};

use super::{Balance, Builder, Order, pool::Finish, pool::Stop};
use crate::{
    Error,
    event::{AccessRecord, Event, WorkerId},
    outcome::{Outcome, millis},
    process::{
        Board, port,
        wire::{Frame, Kind},
    },
    supervisor::{Launch, Step, Supervisor},
};

/// A port that was taken, or a channel of a router's.
pub(super) struct Port {
    /// None for a channel.
    address: Option<SocketAddr>,
    board: Board,
    /// One for all workers, or one for each slot. They are kept here, so that connections which wait at them outlive the
    /// workers. None: nobody will come to accept there, and connections must not wait for it.
    listeners: Mutex<Vec<Option<OwnedFd>>>,
}

impl Port {
    /// Takes a port for so many workers.
    pub(super) fn bind(address: SocketAddr, balance: Balance, workers: u32) -> Result<Self, Error> {
        let bind = || -> io::Result<Self> {
            let first = port::bind(address, balance == Balance::Slots)?;
            // the others take the port that the first one got
            let address = port::address_of(&first)?;
            let mut listeners = vec![Some(first)];
            let others = if balance == Balance::Slots { workers - 1 } else { 0 };
            for _ in 0..others {
                listeners.push(Some(port::bind(address, true)?));
            }
            Ok(Self { address: Some(address), board: Board::new(workers)?, listeners: Mutex::new(listeners) })
        };
        bind().map_err(|source| Error::Listen { address, source })
    }

    /// The workers' end of a channel.
    pub(super) fn of_channel(channel: OwnedFd, workers: u32) -> Result<Self, Error> {
        let board = Board::new(workers).map_err(Error::io("make the board of a pool"))?;
        Ok(Self { address: None, board, listeners: Mutex::new(vec![Some(channel)]) })
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    pub(super) fn board(&self) -> &Board {
        &self.board
    }

    /// Lets `start` have the socket that a worker's connections come from.
    ///
    /// # Errors
    /// When the socket was closed and cannot be had again, or those of `start`.
    pub(super) fn with_listener<T>(
        &self,
        worker: WorkerId,
        start: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut listeners = self.listeners();
        let at = (worker as usize - 1) % listeners.len();
        let listener = match listeners[at].take() {
            Some(listener) => listener,
            None => port::bind(self.address.ok_or(io::ErrorKind::NotConnected)?, true)?,
        };
        start(listeners[at].insert(listener).as_fd())
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up the socket of a slot that has one of its own: the kernel then sends connections to the others.
    fn close_slot(&self, worker: WorkerId) {
        let mut listeners = self.listeners();
        if listeners.len() > 1 {
            listeners[worker as usize - 1] = None;
        }
    }

    /// Gives up the port, as far as it is ours: whoever still has it may accept what waits there.
    fn close(&self) {
        self.listeners().fill_with(|| None);
    }
}

/// A port and the workers that serve it.
pub(super) struct Server {
    supervisor: Supervisor,
    port: Arc<Port>,
    builder: Builder,
    orders: mpsc::UnboundedReceiver<Order>,
    reload: Option<Reload>,
    /// Who wants another reload after the one that is under way.
    waiting: Vec<oneshot::Sender<Result<(), Error>>>,
    has_listened: bool,
    stopping: bool,
    killed: bool,
    /// What frames told while the supervisor was busy handing them out.
    pending: Vec<Event>,
}

/// A guest that is being compiled.
type Compiling = Pin<Box<dyn Future<Output = Result<Launch, Error>> + Send>>;

/// A reload that is under way.
struct Reload {
    since: Instant,
    /// The guest, while it is being compiled.
    launch: Option<Compiling>,
    told: Vec<oneshot::Sender<Result<(), Error>>>,
}

impl Server {
    pub(super) fn new(
        supervisor: Supervisor,
        port: Arc<Port>,
        builder: Builder,
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> Self {
        Self {
            supervisor,
            port,
            builder,
            orders,
            reload: None,
            waiting: vec![],
            has_listened: false,
            stopping: false,
            killed: false,
            pending: vec![],
        }
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.port.address()
    }

    /// Runs until it is stopped and all workers are gone.
    ///
    /// # Errors
    /// When every worker failed.
    pub(super) async fn run(mut self) -> Result<Finish, Error> {
        poll_fn(|cx| self.poll(cx)).await.map_err(Error::of_pool)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Finish, Error>> {
        loop {
            while let Poll::Ready(Some(order)) = self.orders.poll_recv(cx) {
                self.obey(order);
            }
            if let Some(launch) = self.reload.as_mut().and_then(|reload| reload.launch.as_mut())
                && let Poll::Ready(launch) = launch.as_mut().poll(cx)
            {
                self.compiled(launch);
            }
            self.supervisor.flush();
            match self.watch(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Step::Online(_)) => {
                    if !std::mem::replace(&mut self.has_listened, true)
                        && let Some(address) = self.port.address()
                    {
                        self.supervisor.emit(Event::Listening { address });
                    }
                }
                Poll::Ready(Step::Gone { worker, .. }) => {
                    self.port.board().clear(worker);
                    self.close_vacant();
                }
                Poll::Ready(Step::Reloaded(result)) => {
                    self.reloaded(result.map_err(Error::Reload));
                    self.close_vacant();
                }
                Poll::Ready(Step::Progress) => {}
                Poll::Ready(Step::Down(Some(last))) => return Poll::Ready(Err(Error::PoolFailed { last })),
                Poll::Ready(Step::Down(None)) => {
                    let killed = self.killed || self.supervisor.grace_exceeded();
                    return Poll::Ready(Ok(if killed { Finish::Killed } else { Finish::Drained }));
                }
            }
        }
    }

    /// Sees that no connections wait for workers that will not come.
    fn close_vacant(&self) {
        if self.reload.as_ref().is_none_or(|reload| reload.launch.is_some()) {
            self.supervisor.vacant().for_each(|worker| self.port.close_slot(worker));
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Reload(told) if self.stopping => {
                let _ = told.send(Err(Error::Stopped));
            }
            Order::Reload(told) if self.reload.is_some() => self.waiting.push(told),
            Order::Reload(told) => self.begin_reload(vec![told]),
            Order::Stop(stop) => {
                self.stopping = true;
                // whoever waits for it hears that nobody will tell
                (self.reload, self.waiting) = (None, vec![]);
                // whoever comes from now on is refused, and does not wait for nobody
                self.port.close();
                match stop {
                    Stop::Politely => self.supervisor.drain(),
                    Stop::Now => {
                        self.killed = true;
                        self.supervisor.kill_all();
                    }
                }
            }
        }
    }

    /// Compiles the guest anew; the workers go on meanwhile.
    fn begin_reload(&mut self, told: Vec<oneshot::Sender<Result<(), Error>>>) {
        let (builder, port) = (self.builder.clone(), self.port.clone());
        let launch = Box::pin(async move { builder.launch(Some(port)).await });
        self.reload = Some(Reload { since: Instant::now(), launch: Some(launch), told });
    }

    fn compiled(&mut self, launch: Result<Launch, Error>) {
        match launch {
            Ok(launch) => {
                if let Some(reload) = &mut self.reload {
                    reload.launch = None;
                }
                self.supervisor.reload(launch);
            }
            Err(error) => self.reloaded(Err(error)),
        }
    }

    fn reloaded(&mut self, result: Result<(), Error>) {
        let Some(Reload { since, told, .. }) = self.reload.take() else { return };
        let error = result.as_ref().err().map(ToString::to_string);
        self.supervisor.emit(Event::Reload { took_ms: millis(since.elapsed()), error: error.clone() });
        let mut result = Some(result);
        for told in told {
            // an error is not copied: all but the first hear of it in words
            let result =
                result.take().unwrap_or_else(|| error.clone().map_or(Ok(()), |error| Err(Error::Reload(error))));
            let _ = told.send(result);
        }
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            self.begin_reload(waiting);
        }
    }

    /// Takes what workers send.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        let Self { supervisor, pending, .. } = self;
        let step = supervisor.poll(cx, |worker, frame| event_of(worker, frame, pending));
        for event in self.pending.drain(..) {
            self.supervisor.emit(event);
        }
        step
    }
}

/// What a worker's frame says of its requests.
fn event_of(worker: WorkerId, frame: Frame<'_>, events: &mut Vec<Event>) -> Result<(), String> {
    match frame.kind {
        Kind::Access => {
            let record = serde_json::from_slice::<Box<AccessRecord>>(frame.body);
            let record = record.map_err(|error| format!("it sent a broken access record: {error}"))?;
            if frame.id > 0 {
                let message = format!("{} lines of its access log were dropped: nobody took them", frame.id);
                events.push(Event::Error { worker: Some(worker), message });
            }
            events.push(Event::Access { worker, record });
        }
        Kind::TaskEnded => {
            let outcome = serde_json::from_slice::<Outcome>(frame.body);
            let outcome = outcome.map_err(|error| format!("it sent a broken outcome: {error}"))?;
            events.push(Event::Limit { worker, outcome });
        }
        kind => return Err(format!("it sent {kind:?}, which is not for this pool")),
    }
    Ok(())
}
