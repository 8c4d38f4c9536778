//! From a request to its guest, and from what the guest does to a response.
//!
//! | what happens | an http guest's client gets | a handler's |
//! | --- | --- | --- |
//! | it answers | its response | 200 with the reply, 204 without, 422 with its error |
//! | it traps, exits, hits another limit, answers nothing | 500 | 500 |
//! | it takes too long | 504 | 504 |
//! | too many run and wait | 503 and `Retry-After` | the same |
//! | the target, the body is too long | 414, 413 | the same |
//! | the method is `CONNECT` | 501 | 501 |
//! | the method is not `POST`, the body is no JSON | (the guest's business) | 405, 400 |
//!
//! Once a response's head is out, a guest that fails can only be told by the end of the connection.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    net::{IpAddr, Ipv4Addr},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Frame, Incoming},
    header::{ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, REFERER, RETRY_AFTER, USER_AGENT},
};
use serde_json::json;

use super::{
    Server,
    client::{Client, REQUEST_ID},
    connection::Connection,
    gate::{Full, Place},
    reply::{Reply, Streamed, Upload},
};
use crate::{
    event::AccessRecord,
    message::{Message, MessageError},
    outcome::{End, LimitKind, Outcome, Usage, millis},
    sandbox::{Answer, BodyError, GuestBody, Respond, Scheme, Shape},
};

/// A guest at work on a request, until it returns.
pub(super) type Work = Pin<Box<dyn Future<Output = Result<(), Outcome>>>>;

/// How soon a client may come back when a worker is full, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// The status in an access log when the client left before there was one.
const CLIENT_LEFT: u16 = 499;

/// Something to be answered instead of a guest.
struct Problem {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// Whether what the client still sends is not read.
    closes: bool,
}

impl Problem {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), closes: false }
    }

    fn closing(self) -> Self {
        Self { closes: true, ..self }
    }

    /// What a guest's end means to a client: enough to act on, and nothing of the guest's inside.
    fn of(outcome: &Outcome) -> Self {
        let (status, kind) = match &outcome.end {
            End::Limit { limit: LimitKind::Time, .. } => (StatusCode::GATEWAY_TIMEOUT, "limit"),
            End::Limit { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "limit"),
            End::Trapped { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "trapped"),
            End::Exited { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "exited"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        let message = match &outcome.end {
            End::Limit { limit, .. } => format!("the guest hit its {limit} limit"),
            End::Trapped { .. } => "the guest trapped".into(),
            End::Exited { .. } => "the guest exited".into(),
            _ => "the guest could not be run".into(),
        };
        Self::new(status, kind, message)
    }

    fn too_large(max: u64) -> Self {
        let message = format!("the body has more than the {max} bytes that it may have");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", message).closing()
    }
}

/// Answers a request.
pub(super) async fn answer(
    server: Rc<Server>,
    connection: Rc<Connection>,
    mut request: Request<Incoming>,
) -> Response<Reply> {
    let started = Instant::now();
    connection.busy.set(true);
    let number = server.begin();
    let client = Client::of(connection.peer, request.headers_mut(), &server.config.trusted);
    // one that is there came through a trusted proxy, or it would not be there any more
    let id = if let Some(id) = request.headers().get(&REQUEST_ID) {
        id.clone()
    } else {
        let id = request_id(server.id_prefix, number);
        request.headers_mut().insert(REQUEST_ID, id.clone());
        id
    };
    let record = server.config.access_log.then(|| record(client, &request, &id));
    let ticket = Ticket::new(server.clone(), connection, started, record.map(Box::new));
    let max = match server.worker.shape {
        Shape::Handler => server.worker.setup.limits.message_max.0.min(server.config.http.body.0),
        _ => server.config.http.body.0,
    };
    let mut response = match check(&server, &request, max) {
        Err(problem) => refuse(problem, &id, ticket),
        Ok(()) if server.worker.shape == Shape::Handler => handle(&server, request, max, &id, ticket).await,
        Ok(()) => {
            let has_no_body = request.method() == Method::HEAD;
            let request = request.map(|body| Upload::new(body, max));
            serve(&server, request, client.scheme, max, has_no_body, &id, ticket).await
        }
    };
    let headers = response.headers_mut();
    headers.entry(REQUEST_ID).or_insert(id);
    if server.draining.get() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What can be said of a request before its guest sees it.
fn check(server: &Server, request: &Request<Incoming>, body_max: u64) -> Result<(), Problem> {
    let limits = &server.config.http;
    let target = target_length(request);
    if target as u64 > limits.uri.0 {
        let message = format!("the target has {target} bytes, at most {} are taken", limits.uri.0);
        return Err(Problem::new(StatusCode::URI_TOO_LONG, "uri-too-long", message).closing());
    }
    if request.method() == Method::CONNECT {
        return Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "method", "this is no proxy").closing());
    }
    if request.headers().get(HOST).is_some_and(|host| host.to_str().is_err()) {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "host", "the host is not ASCII").closing());
    }
    if request.body().size_hint().exact().is_some_and(|length| length > body_max) {
        return Err(Problem::too_large(body_max));
    }
    if server.worker.shape == Shape::Handler && request.method() != Method::POST {
        return Err(Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", "a handler's messages are posted"));
    }
    Ok(())
}

fn target_length(request: &Request<Incoming>) -> usize {
    let uri = request.uri();
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    path + uri.authority().map_or(0, |authority| authority.as_str().len())
}

/// The answer to what a guest is not asked, or has failed.
fn refuse(problem: Problem, id: &HeaderValue, ticket: Ticket) -> Response<Reply> {
    let Problem { status, kind, message, closes } = problem;
    let body = json!({"error": {"kind": kind, "message": message}, "request": id.to_str().unwrap_or_default()});
    let mut response = ticket.respond(status, body.to_string());
    let headers = response.headers_mut();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    if closes {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Lets an http guest answer.
async fn serve(
    server: &Rc<Server>,
    mut request: Request<Upload>,
    scheme: Scheme,
    body_max: u64,
    is_head: bool,
    id: &HeaderValue,
    ticket: Ticket,
) -> Response<Reply> {
    let place = match ticket.place(server).await {
        Ok(place) => place,
        Err(problem) => return refuse(problem, id, ticket),
    };
    if !request.headers().contains_key(HOST) && request.uri().authority().is_none() {
        // only HTTP/1.0 may leave it out, and a guest must be told something
        request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    }
    let too_large = request.body().too_large();
    let (respond, mut response) = Respond::channel();
    let mut work = Some(work(server.clone(), request, scheme, respond, ticket.deadline(), place));
    let mut ended = None;
    let head = poll_fn(|cx| {
        if let Some(at_work) = &mut work
            && let Poll::Ready(end) = at_work.as_mut().poll(cx)
        {
            (work, ended) = (None, Some(end));
        }
        if let Some(Err(_)) = ended {
            return Poll::Ready(None);
        }
        if too_large.is() {
            work = None;
            return Poll::Ready(None);
        }
        match response.try_recv() {
            Ok(response) => Poll::Ready(Some(response)),
            // it responds while it is polled, so this is polled then, too; one that has closed the way to respond may
            // still end in a way that tells why
            Err(_) if work.is_some() => Poll::Pending,
            Err(_) => Poll::Ready(None),
        }
    })
    .await;
    if let Some(Err(outcome)) = ended {
        ticket.failed(&outcome);
        return refuse(Problem::of(&outcome), id, ticket);
    }
    let internal = |message: &str| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", message);
    let response = match head {
        None if too_large.is() => return refuse(Problem::too_large(body_max), id, ticket),
        None => return refuse(internal("the guest gave no response"), id, ticket),
        Some(Err(_)) => return refuse(internal("the guest gave up"), id, ticket),
        Some(Ok(response)) if response.status().is_informational() => {
            return refuse(internal("the guest's response is not a final one"), id, ticket);
        }
        Some(Ok(response)) => response,
    };
    let (parts, mut body) = response.into_parts();
    let promised = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let has_no_body = is_head || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let mut early = vec![];
    if work.is_none() && !has_no_body {
        // a guest that has returned has written all of it: it needs no chunks, and can still be found wanting
        match written(&mut body) {
            Written::Whole(whole) if promised.is_none_or(|promised: u64| promised == whole.len() as u64) => {
                ticket.status.set(parts.status.as_u16());
                return Response::from_parts(parts, Reply::whole(whole, ticket));
            }
            Written::Whole(_) | Written::Broken => {
                return refuse(internal("the guest did not finish its response"), id, ticket);
            }
            Written::WithTrailers(pieces) => early = pieces,
        }
    }
    ticket.status.set(parts.status.as_u16());
    let streamed = Streamed::new(body, early, work, too_large, promised, has_no_body);
    Response::from_parts(parts, Reply::streamed(streamed, ticket))
}

/// What a guest that has returned wrote to a body.
enum Written {
    Whole(Bytes),
    WithTrailers(Vec<Frame<Bytes>>),
    Broken,
}

fn written(body: &mut GuestBody) -> Written {
    let mut pieces: Vec<Frame<Bytes>> = vec![];
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        match Pin::new(&mut *body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) if frame.is_data() => pieces.push(frame),
            Poll::Ready(Some(Ok(trailers))) => {
                pieces.push(trailers);
                return Written::WithTrailers(pieces);
            }
            Poll::Ready(Some(Err(_))) => return Written::Broken,
            // one that does not say that it has ended has, too
            Poll::Ready(None) | Poll::Pending => break,
        }
    }
    let mut pieces = pieces.into_iter().filter_map(|piece| piece.into_data().ok());
    let first = pieces.next().unwrap_or_default();
    let rest: Vec<Bytes> = pieces.collect();
    Written::Whole(if rest.is_empty() { first } else { [vec![first], rest].concat().concat().into() })
}

/// A guest at work on a request.
fn work(
    server: Rc<Server>,
    request: Request<Upload>,
    scheme: Scheme,
    respond: Respond,
    deadline: Option<Instant>,
    place: Place,
) -> Work {
    Box::pin(async move {
        let _place = place;
        timed(&server, deadline, async {
            let mut instance = server.worker.started(server.worker.take_idle()).await?;
            instance.serve(request, scheme, respond).await?;
            server.worker.keep(instance);
            Ok(())
        })
        .await
    })
}

/// Lets a guest work until it is done or its time is over.
async fn timed<T>(
    server: &Server,
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, Outcome>>,
) -> Result<T, Outcome> {
    let clock = server.worker.pulse.time();
    let begun = Instant::now();
    let mut work = pin!(work);
    let work = poll_fn(|cx| clock.enter(|| work.as_mut().poll(cx)));
    let Some(deadline) = deadline else { return work.await };
    tokio::time::timeout_at(deadline.into(), work).await.unwrap_or_else(|_| {
        let allowed = server.worker.timeout.unwrap_or_default();
        let end = End::Limit { limit: LimitKind::Time, allowed: format!("{allowed:?}") };
        Err(end.with(Usage::wall(begun.elapsed())))
    })
}

/// Lets a handler answer a message.
async fn handle(
    server: &Rc<Server>,
    request: Request<Incoming>,
    body_max: u64,
    id: &HeaderValue,
    ticket: Ticket,
) -> Response<Reply> {
    match handled(server, request, body_max, &ticket).await {
        Ok(Answer::Reply(reply)) => ticket.respond(StatusCode::OK, reply),
        Ok(Answer::NoReply) => ticket.respond(StatusCode::NO_CONTENT, ""),
        Ok(Answer::Error(reason)) => ticket.respond(StatusCode::UNPROCESSABLE_ENTITY, reason),
        Err(problem) => refuse(problem, id, ticket),
    }
}

async fn handled(
    server: &Rc<Server>,
    request: Request<Incoming>,
    body_max: u64,
    ticket: &Ticket,
) -> Result<Answer, Problem> {
    let bad = |kind, message: String| Problem::new(StatusCode::BAD_REQUEST, kind, message);
    let body = Upload::new(request.into_body(), body_max).collect();
    let body = match ticket.in_time(body).await {
        Some(Ok(body)) => body.to_bytes(),
        Some(Err(BodyError::TooLarge(max))) => return Err(Problem::too_large(max)),
        Some(Err(BodyError::Cut)) => return Err(bad("cut", "the body has no end".into()).closing()),
        None => return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "slow", "the body took too long").closing()),
    };
    let max = server.worker.setup.limits.message_max;
    let message = Message::check(&body, max.as_usize()).map_err(|error| bad("invalid", error.to_string()))?;
    let _place = ticket.place(server).await?;
    let idle = server.worker.take_idle();
    let answer = timed(server, ticket.deadline(), server.worker.attempt(idle, message.as_str().into())).await;
    let failed = |outcome: Outcome| {
        ticket.failed(&outcome);
        Problem::of(&outcome)
    };
    if let Ok(Answer::Reply(text) | Answer::Error(text)) = &answer {
        match Message::check(text.as_bytes(), max.as_usize()) {
            Ok(_) => {}
            Err(MessageError::TooLong { .. }) => {
                let end = End::Limit { limit: LimitKind::Message, allowed: max.to_string() };
                return Err(failed(end.with(Usage::wall(ticket.started.elapsed()))));
            }
            Err(error) => {
                let message = format!("the guest's answer is no message: {error}");
                return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "invalid", message));
            }
        }
    }
    answer.map_err(failed)
}

/// One request on its way, until its response is sent or given up.
pub(super) struct Ticket {
    server: Rc<Server>,
    connection: Rc<Connection>,
    started: Instant,
    status: Cell<u16>,
    sent: u64,
    record: Option<Box<AccessRecord>>,
}

impl Ticket {
    fn new(
        server: Rc<Server>,
        connection: Rc<Connection>,
        started: Instant,
        record: Option<Box<AccessRecord>>,
    ) -> Self {
        Self { server, connection, started, status: Cell::new(CLIENT_LEFT), sent: 0, record }
    }

    /// When its time is over.
    fn deadline(&self) -> Option<Instant> {
        self.server.worker.timeout.map(|timeout| self.started + timeout)
    }

    /// What comes of something, if that is done in time.
    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match self.deadline() {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
            None => Some(work.await),
        }
    }

    /// Waits for a place among those that run.
    async fn place(&self, server: &Server) -> Result<Place, Problem> {
        match self.in_time(server.gate.enter()).await {
            Some(Ok(place)) => Ok(place),
            Some(Err(Full)) => {
                let message = "as many requests run and wait as may";
                Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "full", message))
            }
            None => Err(Problem::new(StatusCode::GATEWAY_TIMEOUT, "limit", "its turn did not come in time")),
        }
    }

    /// Notes that so many bytes of the response's body went to the client.
    pub(super) fn count(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// Tells that the guest did not end as it should.
    pub(super) fn failed(&self, outcome: &Outcome) {
        self.server.failed(outcome);
    }

    /// Lets a guest go on whose response is on its way.
    pub(super) fn go_on(&self, work: Work) {
        let server = self.server.clone();
        tokio::task::spawn_local(async move {
            if let Err(outcome) = work.await {
                server.failed(&outcome);
            }
            server.flush();
        });
    }

    /// A whole response, of JSON if it has a body.
    fn respond(self, status: StatusCode, body: impl Into<Bytes>) -> Response<Reply> {
        self.status.set(status.as_u16());
        let mut response = Response::new(Reply::whole(body, self));
        *response.status_mut() = status;
        if status != StatusCode::NO_CONTENT {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        response
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.connection.rest();
        self.server.flush();
        if let Some(mut record) = self.record.take() {
            record.status = self.status.get();
            record.bytes = self.sent;
            record.took_us = micros(self.started.elapsed());
            self.server.log(&record);
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// What an access log says of a request, as far as that is known when it comes.
fn record(client: Client, request: &Request<Incoming>, id: &HeaderValue) -> AccessRecord {
    let headers = request.headers();
    let header = |name: &str| headers.get(name).map(|value| short(&String::from_utf8_lossy(value.as_bytes())));
    AccessRecord {
        method: short(request.method().as_str()),
        target: short(&request.uri().to_string()),
        protocol: format!("{:?}", request.version()),
        id: short(&String::from_utf8_lossy(id.as_bytes())),
        traceparent: header("traceparent"),
        referer: header(REFERER.as_str()),
        user_agent: header(USER_AGENT.as_str()),
        ..nothing_known(client.address)
    }
}

/// A client's text, at a length that fits a line.
fn short(text: &str) -> String {
    match text.char_indices().nth(2048) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

fn nothing_known(client: IpAddr) -> AccessRecord {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    AccessRecord {
        time_ms: millis(time),
        client,
        method: "-".into(),
        target: "-".into(),
        protocol: "-".into(),
        status: 0,
        bytes: 0,
        took_us: 0,
        id: "-".into(),
        traceparent: None,
        referer: None,
        user_agent: None,
        refused: None,
    }
}

/// Tells of what was refused before it was a request.
pub(super) fn log_refused(server: &Server, connection: &Connection, status: u16, reason: String) {
    server.log(&AccessRecord { status, refused: Some(reason), ..nothing_known(connection.peer) });
}

/// The id of a worker's request: unlike any other's.
fn request_id(prefix: u64, number: u64) -> HeaderValue {
    HeaderValue::try_from(format!("{prefix:016x}-{number:x}")).expect("hexadecimal digits")
}

/// Asks the guest for a path, as a client would.
///
/// # Errors
/// What it answered, when that is no success.
pub(super) async fn probe(server: &Rc<Server>, path: &str) -> Result<(), String> {
    let request = Request::get(path).header(HOST, "localhost").body(Upload::empty());
    let request = request.map_err(|error| format!("the probe `{path}` is no path: {error}"))?;
    let local = Ipv4Addr::LOCALHOST.into();
    let ticket = Ticket::new(server.clone(), Rc::new(Connection::new(local, None)), Instant::now(), None);
    let id = request_id(server.id_prefix, 0);
    let response = serve(server, request, Scheme::Http, 0, false, &id, ticket).await;
    match response.status() {
        status if status.is_success() || status.is_redirection() => Ok(()),
        status => Err(format!("the probe `GET {path}` was answered {status}")),
    }
}
