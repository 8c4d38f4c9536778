//! From the router to a worker and back.
//!
//! A connection to a worker is used again, but not when it has lain idle for some time ([`Route::keep`]): a worker that is to
//! end lets those that it has bring requests for longer than that before it closes them, so that none meets one that closes.
//! One that dies without a word takes idle ones with it, too; a request that does no harm when it is done twice is then asked
//! again.
//!
//! [`Route::keep`]: super::table::Route::keep

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    body::{Body, Incoming},
    client::conn::http1::{self, SendRequest},
    header::{
        CONNECTION, EXPECT, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
    http::uri::PathAndQuery,
    rt::{Read, ReadBufCursor, Write},
};
use tokio::task::JoinHandle;

use super::{
    client::{FORWARDED_FOR, FORWARDED_PROTO},
    front::Front,
    reply::{Reply, Upload},
    stream::Stream,
    table::{InFlight, Target},
    ticket::{Problem, Ticket},
};
use crate::sandbox::Scheme;

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// What concerns one connection and not what goes over it (RFC 9110, section 7.6.1).
const OF_CONNECTIONS: [HeaderName; 6] = [CONNECTION, KEEP_ALIVE, TE, TRANSFER_ENCODING, UPGRADE, PROXY_AUTHENTICATE];

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct From {
    /// The client, or the last proxy.
    pub(super) peer: IpAddr,
    /// How the client came to us.
    pub(super) scheme: Scheme,
    /// How many bytes of its path led to the app.
    pub(super) prefix: usize,
}

/// Lets the workers of a version answer a request.
pub(super) async fn forward(
    front: &Rc<Front>,
    target: InFlight,
    request: Request<Incoming>,
    from: From,
    ticket: Ticket,
) -> Response<Reply> {
    let max = front.limits.body.0;
    let (mut parts, body) = request.into_parts();
    let is_head = parts.method == Method::HEAD;
    let Some(rest) = rest_of(&parts.uri, from.prefix) else {
        return ticket.refuse(Problem::new(StatusCode::BAD_REQUEST, "target", "the target is no path"));
    };
    prepare(&mut parts.headers, &parts.uri, from);
    parts.uri = rest;
    // of one that is older, too: the worker is no older
    parts.version = Version::HTTP_11;
    let body = Upload::new(body, max);
    let too_large = body.too_large();
    let mut again = target.target().reuse().map(|kept| {
        // what has a body is read once, and what changes something must not be done twice
        let may_repeat = body.is_end_stream() && parts.method.is_idempotent();
        (kept, may_repeat.then(|| parts.clone()))
    });
    let mut request = Request::from_parts(parts, body);
    loop {
        let (mut lane, spare) = match again.take() {
            Some((kept, spare)) => (kept, spare),
            None => match ticket.in_time(connect(front, target.target())).await {
                Some(Ok(lane)) => (lane, None),
                Some(Err(error)) => return ticket.refuse(gone(&format!("no worker can be reached: {error}"))),
                None => return ticket.refuse(slow()),
            },
        };
        let Some(sent) = ticket.in_time(lane.sender.try_send_request(request)).await else {
            return ticket.refuse(slow());
        };
        let mut error = match sent {
            Ok(response) => {
                let (mut parts, body) = response.into_parts();
                remove_of_connections(&mut parts.headers);
                parts.version = Version::HTTP_11;
                ticket.status.set(parts.status.as_u16());
                let passage = Passage { lane: Some(lane), is_over: body.is_end_stream(), target };
                return Response::from_parts(parts, Reply::passed_on(body, is_head, passage, ticket));
            }
            Err(error) => error,
        };
        // it was not sent at all, or can be sent again
        let unsent = error.take_message().filter(|_| lane.was_used);
        request = match (unsent, spare) {
            _ if target.target().is_retired() => return ticket.refuse(gone(GONE)),
            (Some(unsent), _) => unsent,
            (None, Some(parts)) => Request::from_parts(parts, Upload::empty()),
            _ if too_large.is() => return ticket.refuse(Problem::too_large(max)),
            _ if error.error().is_user() => {
                return ticket.refuse(Problem::new(StatusCode::BAD_REQUEST, "cut", "the body has no end").closing());
            }
            _ => return ticket.refuse(gone(GONE)),
        };
    }
}

/// What is said when the worker of a request is no more.
const GONE: &str = "the worker that had this request is gone";

fn gone(what: &str) -> Problem {
    Problem::new(StatusCode::BAD_GATEWAY, "worker", what)
}

fn slow() -> Problem {
    Problem::new(StatusCode::GATEWAY_TIMEOUT, "limit", "no worker answered in time")
}

/// A connection to a worker.
pub(super) struct Lane {
    sender: SendRequest<Upload>,
    connection: JoinHandle<()>,
    was_used: bool,
    /// Since when nothing is on it.
    since: Instant,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Lane {
    /// Whether another request can go over it.
    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// How long nothing has been on it.
    pub(super) fn idle_for(&self) -> Duration {
        self.since.elapsed()
    }
}

async fn connect(front: &Rc<Front>, target: &Target) -> io::Result<Lane> {
    let stream = target.connect().await?;
    let (sender, connection) =
        http1::handshake(Pipe { stream, front: front.clone() }).await.map_err(io::Error::other)?;
    let connection = tokio::task::spawn_local(async { drop(connection.await) });
    Ok(Lane { sender, connection, was_used: false, since: Instant::now() })
}

/// What goes on while a response is passed on. When it is dropped before that is over, the worker sees that nobody wants
/// more of it.
pub(super) struct Passage {
    lane: Option<Lane>,
    is_over: bool,
    target: InFlight,
}

impl Passage {
    /// Notes that all of the response has come.
    pub(super) fn note_end(&mut self) {
        self.is_over = true;
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(mut lane) = self.lane.take().filter(|_| self.is_over) {
            (lane.was_used, lane.since) = (true, Instant::now());
            self.target.target().keep(lane);
        }
    }
}

/// What is left of a target below a prefix; none when it is no path, such as `*`.
fn rest_of(uri: &Uri, prefix: usize) -> Option<Uri> {
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let rest = path.get(prefix..)?;
    if rest.starts_with('/') {
        return rest.parse().ok();
    }
    (prefix > 0).then(|| format!("/{rest}").parse().ok())?
}

/// Removes what was said to this process only, and says whom it speaks for.
fn prepare(headers: &mut HeaderMap, uri: &Uri, from: From) {
    remove_of_connections(headers);
    headers.remove(PROXY_AUTHORIZATION);
    // a body that is waited for is asked for
    headers.remove(EXPECT);
    // a whole URI says more than the header (RFC 9112, section 3.2.2)
    if let Some(host) = uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok()) {
        headers.insert(HOST, host);
    }
    let value = |text: &str| HeaderValue::from_str(text).ok();
    if let Some(peer) = value(&from.peer.to_string()) {
        headers.append(FORWARDED_FOR, peer);
    }
    let scheme = if from.scheme == Scheme::Https { "https" } else { "http" };
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme));
    if let Some(host) = headers.get(HOST).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    headers.remove(FORWARDED_PREFIX);
    if let Some(prefix) = uri.path().get(..from.prefix).filter(|prefix| !prefix.is_empty()).and_then(value) {
        headers.insert(FORWARDED_PREFIX, prefix);
    }
}

fn remove_of_connections(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // what a connection may not take away with it: what says where a request goes and where its body ends
        .filter(|name| *name != HOST && *name != hyper::header::CONTENT_LENGTH && *name != TRAILER)
        .collect();
    for name in named.iter().chain(&OF_CONNECTIONS) {
        headers.remove(name);
    }
}

/// The client's end of a connection to a worker.
struct Pipe {
    stream: Stream,
    front: Rc<Front>,
}

impl Read for Pipe {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut to: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let mut scratch = self.front.scratch.borrow_mut();
            let max = to.remaining().min(scratch.len());
            match self.stream.try_read(&mut scratch[..max]) {
                Ok(count) => {
                    to.put_slice(&scratch[..count]);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Write for Pipe {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.poll_out(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.poll_out(cx, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // whoever drops the stream ends it
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_path_is_a_path() {
        let rest = |uri: &str, prefix: usize| rest_of(&uri.parse().expect("a URI"), prefix).map(|uri| uri.to_string());
        assert_eq!(rest("/hello/a?b=/c", 6).as_deref(), Some("/a?b=/c"));
        assert_eq!(rest("/hello", 6).as_deref(), Some("/"));
        assert_eq!(rest("/hello?x", 6).as_deref(), Some("/?x"));
        assert_eq!(rest("/hello/", 6).as_deref(), Some("/"));
        assert_eq!(rest("/hello//x", 6).as_deref(), Some("//x"));
        assert_eq!(rest("/a/b", 0).as_deref(), Some("/a/b"));
        assert_eq!(rest("http://host.example/hello/a", 6).as_deref(), Some("/a"));
        assert_eq!(rest("*", 0), None);
    }

    #[test]
    fn what_concerns_a_connection_stays_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-mine, host, content-length"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("host", "a.example"),
            ("content-length", "3"),
            ("x-forwarded-prefix", "/forged"),
            ("accept", "*/*"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let from = From { peer: [10, 0, 0, 1].into(), scheme: Scheme::Http, prefix: 6 };
        prepare(&mut headers, &"/hello/a".parse().expect("a URI"), from);
        let mut left: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().expect("text"))).collect();
        left.sort_unstable();
        let expected = [
            ("accept", "*/*"),
            ("content-length", "3"),
            ("host", "a.example"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-host", "a.example"),
            ("x-forwarded-prefix", "/hello"),
            ("x-forwarded-proto", "http"),
        ];
        assert_eq!(left, expected);
    }
}
