//! One connection: its bytes on their way to the server and back, what it may take its time for, and its end.
//!
//! Time is watched from outside: a connection notes what it waits for and since when, and [`watch`] looks at all of them
//! now and then. A request then costs no timer, and ten thousand idle connections cost two looks a second.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use super::{
    framing::{Doing, Framing, Refused},
    front::{Front, Serve},
    stream::Stream,
};
use crate::limits::HttpLimits;
use hyper::{
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::Shutdown,
};

/// How often connections are looked at: so often within the shortest of their times, but within these bounds.
const LOOKS: u32 = 4;
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// What a client gets that takes too long for the head of a request.
const TOO_SLOW: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// What is known of a connection.
pub(super) struct Connection {
    pub(super) peer: IpAddr,
    /// Whether a request of it is at work or its response on the way.
    pub(super) busy: Cell<bool>,
    doing: Cell<Doing>,
    /// When the client last did what it is doing; for a head, when that began.
    since: Cell<Instant>,
    /// Whether the server wants to read, and nothing is there.
    reads: Cell<bool>,
    /// Since when the client takes nothing of what is written.
    writes: Cell<Option<Instant>>,
    order: Cell<Option<Order>>,
    waker: RefCell<Option<Waker>>,
    /// Its socket; none for a request that nobody has sent.
    stream: Option<Rc<Stream>>,
    /// Why something was refused before it was a request.
    refused: Cell<Option<&'static str>>,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// It ends after the request that it is busy with.
    Finish,
    /// It ends now.
    Cut,
    /// It ends now, and the client is told that it took too long.
    TooSlow,
}

impl Connection {
    pub(super) fn new(peer: IpAddr, stream: Option<Rc<Stream>>) -> Self {
        Self {
            peer,
            stream,
            busy: Cell::new(false),
            doing: Cell::new(Doing::Nothing),
            since: Cell::new(Instant::now()),
            reads: Cell::new(false),
            writes: Cell::new(None),
            order: Cell::new(None),
            waker: RefCell::new(None),
            refused: Cell::new(None),
        }
    }

    /// Lets it end after the request that it is busy with, or now when it has none.
    pub(super) fn finish(&self) {
        self.command(Order::Finish);
    }

    /// Ends it now, unless a request is at work or its response on the way.
    pub(super) fn finish_what_is_asked(&self) {
        if !self.busy.get() && self.writes.get().is_none() {
            self.command(Order::Cut);
        }
    }

    /// Notes that its last response is on its way to the end. What the client does next has its time from now on, also
    /// when it has begun already: nobody has read it.
    pub(super) fn rest(&self) {
        self.busy.set(false);
        self.since.set(Instant::now());
    }

    fn command(&self, order: Order) {
        self.order.set(Some(order));
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// What is to become of it, if it takes too long for something.
    fn overdue(&self, limits: &HttpLimits, now: Instant) -> Option<Order> {
        let over = |since: Instant, limit: Duration| now.duration_since(since) >= limit;
        if self.writes.get().is_some_and(|since| over(since, limits.write_timeout)) {
            return Some(Order::Cut);
        }
        match self.doing.get() {
            // the next request waits until this one is answered, and the answer taken
            Doing::Nothing | Doing::Head if self.busy.get() || self.writes.get().is_some() => None,
            Doing::Nothing => over(self.since.get(), limits.idle_timeout).then_some(Order::Cut),
            Doing::Head => over(self.since.get(), limits.head_timeout).then_some(Order::TooSlow),
            // while the guest does not want to read, it is not the client who pauses
            Doing::Body => (self.reads.get() && over(self.since.get(), limits.idle_timeout)).then_some(Order::Cut),
        }
    }

    /// Whether the client of a request that is at work has closed its end, while the server does not read what else it
    /// has sent and so would not come to see it.
    fn has_left_unseen(&self) -> bool {
        let Some(stream) = self.stream.as_ref().filter(|_| self.busy.get() && !self.reads.get()) else { return false };
        let mut look = [PollFd::new(&**stream, PollFlags::RDHUP)];
        rustix::event::poll(&mut look, Some(&Timespec::default())).is_ok_and(|_| !look[0].revents().is_empty())
    }
}

/// Looks at all connections, as long as it is polled.
pub(super) async fn watch(front: Rc<Front>) {
    let limits = &front.limits;
    let shortest = limits.head_timeout.min(limits.idle_timeout).min(limits.write_timeout);
    let pause = (shortest / LOOKS).clamp(LOOK_MIN, LOOK_MAX);
    loop {
        tokio::time::sleep(pause).await;
        let now = Instant::now();
        front.connections.borrow_mut().retain(|connection| {
            let Some(connection) = connection.upgrade() else { return false };
            if let Some(order) = connection.overdue(limits, now) {
                connection.command(order);
            } else if connection.has_left_unseen() {
                connection.command(Order::Cut);
            }
            true
        });
    }
}

/// Serves a connection to its end.
pub(super) async fn run(server: Rc<impl Serve>, stream: Stream, peer: IpAddr) {
    let front = server.front().clone();
    let _counted = Counted(front.clone());
    let stream = Rc::new(stream);
    let connection = Rc::new(Connection::new(peer, Some(stream.clone())));
    front.connections.borrow_mut().push(Rc::downgrade(&connection));
    let head_max = front.limits.head.as_usize();
    let io = Io { stream, framing: Framing::new(head_max), front: front.clone(), connection: connection.clone() };
    let to_service = connection.clone();
    let service = service_fn(move |request| {
        let (server, connection) = (server.clone(), to_service.clone());
        async move { Ok::<_, Infallible>(server.answer(connection, request).await) }
    });
    let mut http = http1::Builder::new();
    // time is watched here
    http.header_read_timeout(None).max_header_size(head_max).max_buf_size(head_max.max(BUFFER));
    let mut serving = http.serve_connection(io, service);
    let end = poll_fn(|cx| {
        match &mut *connection.waker.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        match connection.order.take() {
            None => {}
            Some(Order::Finish) => Pin::new(&mut serving).graceful_shutdown(),
            Some(order) => return Poll::Ready(Err(order)),
        }
        Pin::new(&mut serving).poll(cx).map(Ok)
    })
    .await;
    let Io { stream, framing, .. } = serving.into_parts().io;
    if end.as_ref().is_err_and(|order| *order == Order::TooSlow) {
        // there is room: nothing else was written
        let _ = stream.try_write(TOO_SLOW);
    }
    let refused = match (&end, connection.refused.get()) {
        (Ok(_), Some(reason)) => Some((400, reason.to_owned())),
        (Ok(Err(error)), None) if error.is_parse_too_large() => Some((431, "its head is too large".into())),
        (Ok(Err(error)), None) if error.is_parse() => Some((400, error.to_string())),
        (Err(Order::TooSlow), _) => Some((408, "its head took too long".into())),
        _ => None,
    };
    if let Some((status, reason)) = refused {
        front.log_refused(&connection, status, reason);
    }
    if end.is_ok() && framing.doing() != Doing::Nothing {
        let _ = tokio::time::timeout(LINGER, discard(stream)).await;
    }
}

/// How long a client that is still sending may take to see that it was answered, and how much of what it sends meanwhile
/// is taken.
const LINGER: Duration = Duration::from_secs(1);
const DISCARDED_MAX: usize = 64 << 20;

/// Takes what a client still sends after its last response. To close at once would reset the connection, and the client
/// would lose the response that says why.
async fn discard(stream: Rc<Stream>) -> io::Result<()> {
    rustix::net::shutdown(&*stream, Shutdown::Write)?;
    let mut bytes = [0; 4 << 10];
    let mut left = DISCARDED_MAX;
    while left > 0 {
        stream.readable().await?;
        match stream.try_read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => left = left.saturating_sub(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The least that the server may buffer each way.
const BUFFER: usize = 64 << 10;

/// Counts a connection as long as it is there.
struct Counted(Rc<Front>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.note_connections(-1);
        self.0.ended.notify_one();
    }
}

/// The server's side of a connection.
struct Io {
    stream: Rc<Stream>,
    framing: Framing,
    front: Rc<Front>,
    connection: Rc<Connection>,
}

impl Io {
    fn poll_bytes(&self, cx: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read(to) {
                Ok(count) => {
                    if count > 0 && count < to.len() {
                        // all that was there: to say so spares the call that would
                        self.stream.is_empty();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_out(&self, cx: &mut Context<'_>, write: impl Fn(&Stream) -> io::Result<usize>) -> Poll<io::Result<usize>> {
        let writes = &self.connection.writes;
        let written = self.stream.poll_out(cx, write);
        if written.is_pending() {
            writes.set(writes.get().or_else(|| Some(Instant::now())));
        } else if writes.take().is_some() {
            self.connection.since.set(Instant::now());
        }
        written
    }
}

impl Read for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut to: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let front = self.front.clone();
        let mut scratch = front.scratch.borrow_mut();
        let max = to.remaining().min(scratch.len());
        let Poll::Ready(count) = self.poll_bytes(cx, &mut scratch[..max]) else {
            self.connection.reads.set(true);
            return Poll::Pending;
        };
        // an error, too, is the last that is read: whether the client has left is looked for from now on
        self.connection.reads.set(false);
        let bytes = &scratch[..count?];
        let Self { framing, connection, .. } = &mut *self;
        let before = framing.doing();
        match framing.look(bytes) {
            Ok(()) => to.put_slice(bytes),
            Err(Refused { good, poison, is_body, reason }) => {
                connection.refused.set(Some(reason).filter(|_| !is_body));
                to.put_slice(&bytes[..good]);
                to.put_slice(&poison[..poison.len().min(to.remaining())]);
            }
        }
        let now = framing.doing();
        // the time for a head runs from its first byte, and empty lines are nothing; when a whole request has come, its
        // end is what counts
        if now != before || now == Doing::Body {
            connection.since.set(Instant::now());
        }
        connection.doing.set(now);
        Poll::Ready(Ok(()))
    }
}

impl Write for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_out(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_out(cx, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // a client that has gone needs no end
        let _ = rustix::net::shutdown(&*self.stream, Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_runs_for_what_the_client_does() {
        let limits = HttpLimits {
            head_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(3),
            write_timeout: Duration::from_secs(2),
            ..HttpLimits::default()
        };
        let connection = Connection::new([127, 0, 0, 1].into(), None);
        let start = connection.since.get();
        let after = |seconds| connection.overdue(&limits, start + Duration::from_secs(seconds));
        assert_eq!((after(2), after(3)), (None, Some(Order::Cut)), "idle");
        connection.doing.set(Doing::Head);
        assert_eq!((after(0), after(1)), (None, Some(Order::TooSlow)), "a head");
        connection.busy.set(true);
        assert_eq!(after(9), None, "while a request is at work, the next may wait");
        connection.doing.set(Doing::Body);
        assert_eq!(after(9), None, "a guest that does not read");
        connection.reads.set(true);
        assert_eq!((after(2), after(3)), (None, Some(Order::Cut)), "a body");
        connection.writes.set(Some(start));
        assert_eq!((after(1), after(2)), (None, Some(Order::Cut)), "a response that is not taken");
    }
}
