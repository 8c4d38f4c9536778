//! One request on its way, and what is said instead of an answer.

use std::{
    cell::Cell,
    future::Future,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{ALLOW, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER},
};
use serde_json::json;

use super::{client::REQUEST_ID, connection::Connection, front::Front, reply::Reply, request::Work};
use crate::{
    event::AccessRecord,
    limits::HttpLimits,
    outcome::{End, LimitKind, Outcome},
};

/// How soon a client may come back when there is no room, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// The status in an access log when the client left before there was one.
const CLIENT_LEFT: u16 = 499;

/// Something to be answered instead of a guest.
pub(super) struct Problem {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// Whether what the client still sends is not read.
    closes: bool,
}

impl Problem {
    pub(super) fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), closes: false }
    }

    pub(super) fn closing(self) -> Self {
        Self { closes: true, ..self }
    }

    /// What a guest's end means to a client: enough to act on, and nothing of the guest's inside.
    pub(super) fn of(outcome: &Outcome) -> Self {
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

    pub(super) fn too_large(max: u64) -> Self {
        let message = format!("the body has more than the {max} bytes that it may have");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", message).closing()
    }
}

/// What can be said of a request before anybody sees it whose body may have so many bytes.
///
/// # Errors
/// What to answer.
pub(super) fn check(limits: &HttpLimits, request: &Request<Incoming>, body_max: u64) -> Result<(), Problem> {
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
    Ok(())
}

fn target_length(request: &Request<Incoming>) -> usize {
    let uri = request.uri();
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    path + uri.authority().map_or(0, |authority| authority.as_str().len())
}

/// One request on its way, until its response is sent or given up.
pub(super) struct Ticket {
    front: Rc<Front>,
    connection: Rc<Connection>,
    id: HeaderValue,
    pub(super) started: Instant,
    timeout: Option<Duration>,
    pub(super) status: Cell<u16>,
    sent: u64,
    record: Option<Box<AccessRecord>>,
}

impl Ticket {
    pub(super) fn new(
        front: Rc<Front>,
        connection: Rc<Connection>,
        id: HeaderValue,
        timeout: Option<Duration>,
        record: Option<Box<AccessRecord>>,
    ) -> Self {
        let status = Cell::new(CLIENT_LEFT);
        Self { front, connection, id, started: Instant::now(), timeout, status, sent: 0, record }
    }

    /// The request's id.
    pub(super) fn id(&self) -> &HeaderValue {
        &self.id
    }

    /// Notes whose request it is, and how long it may take.
    pub(super) fn belongs_to(&mut self, app: &str, timeout: Option<Duration>) {
        self.timeout = timeout;
        if let Some(record) = &mut self.record {
            record.app = Some(app.into());
        }
    }

    /// Notes which version it goes to.
    pub(super) fn goes_to(&mut self, version: &str) {
        if let Some(record) = &mut self.record {
            record.version = Some(version.into());
        }
    }

    /// When its time is over.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| self.started + timeout)
    }

    /// What comes of something, if that is done in time.
    pub(super) async fn in_time<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match self.deadline() {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
            None => Some(work.await),
        }
    }

    /// Notes that so many bytes of the response's body went to the client.
    pub(super) fn count(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// Tells that the guest did not end as it should.
    pub(super) fn failed(&self, outcome: &Outcome) {
        self.front.failed(outcome);
    }

    /// Lets a guest go on whose response is on its way.
    pub(super) fn go_on(&self, work: Work) {
        let front = self.front.clone();
        tokio::task::spawn_local(async move {
            if let Err(outcome) = work.await {
                front.failed(&outcome);
            }
            front.flush();
        });
    }

    /// A whole response, of JSON if it has a body.
    pub(super) fn respond(self, status: StatusCode, body: impl Into<Bytes>) -> Response<Reply> {
        self.status.set(status.as_u16());
        let mut response = Response::new(Reply::whole(body, self));
        *response.status_mut() = status;
        if status != StatusCode::NO_CONTENT {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        response
    }

    /// The answer to what a guest is not asked, or has failed.
    pub(super) fn refuse(self, problem: Problem) -> Response<Reply> {
        let Problem { status, kind, message, closes } = problem;
        let id = self.id.to_str().unwrap_or_default();
        let body = json!({"error": {"kind": kind, "message": message}, "request": id});
        let mut response = self.respond(status, body.to_string());
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
}

/// Adds what every response has.
pub(super) fn finish(front: &Front, id: HeaderValue, response: &mut Response<Reply>) {
    let headers = response.headers_mut();
    headers.entry(REQUEST_ID).or_insert(id);
    if front.is_draining() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.connection.rest();
        self.front.flush();
        if let Some(mut record) = self.record.take() {
            record.status = self.status.get();
            record.bytes = self.sent;
            record.took_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.front.log(&record);
        }
    }
}
