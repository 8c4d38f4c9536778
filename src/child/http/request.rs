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
//! A command is in [`run`](super::run).
//!
//! Once a response's head is out, a guest that fails can only be told by the end of the connection.

use std::{
    future::{Future, poll_fn},
    net::Ipv4Addr,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Frame, Incoming},
    header::{CONTENT_LENGTH, HOST, HeaderValue},
};

use super::{
    Server,
    connection::Connection,
    front::{Front, Serve},
    gate::{Full, Place},
    reply::{Reply, Streamed, Upload},
    run::run,
    ticket::{Problem, Ticket, check, finish},
};
use crate::{
    message::{Message, MessageError},
    outcome::{End, LimitKind, Outcome, Usage},
    sandbox::{Answer, BodyError, GuestBody, Respond, Scheme, Shape},
};

/// A guest at work on a request, until it returns.
pub(super) type Work = Pin<Box<dyn Future<Output = Result<(), Outcome>>>>;

impl Serve for Server {
    fn front(&self) -> &Rc<Front> {
        &self.front
    }

    async fn answer(self: Rc<Self>, connection: Rc<Connection>, mut request: Request<Incoming>) -> Response<Reply> {
        let (number, client, ticket) = self.front.take(connection, &mut request, self.worker.timeout);
        self.note(number);
        let id = ticket.id().clone();
        let is_handler = self.worker.shape == Shape::Handler;
        let mut max = self.front.limits.body.0;
        if is_handler {
            max = max.min(self.worker.setup.limits.message_max.0);
        }
        let mut response = match check(&self.front.limits, &request, max) {
            Err(problem) => ticket.refuse(problem),
            Ok(()) if is_handler => handle(&self, request, max, ticket).await,
            Ok(()) if self.worker.shape == Shape::Command => run(&self, request, client.address, max, ticket).await,
            Ok(()) => {
                let has_no_body = request.method() == Method::HEAD;
                let request = request.map(|body| Upload::new(body, max));
                serve(&self, request, client.scheme, max, has_no_body, ticket).await
            }
        };
        finish(&self.front, id, &mut response);
        response
    }

    fn is_at_work(&self) -> bool {
        self.gate.running() > 0
    }
}

/// Lets an http guest answer.
async fn serve(
    server: &Rc<Server>,
    mut request: Request<Upload>,
    scheme: Scheme,
    body_max: u64,
    is_head: bool,
    ticket: Ticket,
) -> Response<Reply> {
    let place = match place(server, &ticket).await {
        Ok(place) => place,
        Err(problem) => return ticket.refuse(problem),
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
        return ticket.refuse(Problem::of(&outcome));
    }
    let internal = |message: &str| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", message);
    let response = match head {
        None if too_large.is() => return ticket.refuse(Problem::too_large(body_max)),
        None => return ticket.refuse(internal("the guest gave no response")),
        Some(Err(_)) => return ticket.refuse(internal("the guest gave up")),
        Some(Ok(response)) if response.status().is_informational() => {
            return ticket.refuse(internal("the guest's response is not a final one"));
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
                return ticket.refuse(internal("the guest did not finish its response"));
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
pub(super) async fn timed<T>(
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
async fn handle(server: &Rc<Server>, request: Request<Incoming>, body_max: u64, ticket: Ticket) -> Response<Reply> {
    if request.method() != Method::POST {
        let message = "a handler's messages are posted";
        return ticket.refuse(Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", message));
    }
    match handled(server, request, body_max, &ticket).await {
        Ok(Answer::Reply(reply)) => ticket.respond(StatusCode::OK, reply),
        Ok(Answer::NoReply) => ticket.respond(StatusCode::NO_CONTENT, ""),
        Ok(Answer::Error(reason)) => ticket.respond(StatusCode::UNPROCESSABLE_ENTITY, reason),
        Err(problem) => ticket.refuse(problem),
    }
}

async fn handled(
    server: &Rc<Server>,
    request: Request<Incoming>,
    body_max: u64,
    ticket: &Ticket,
) -> Result<Answer, Problem> {
    let body = whole(request.into_body(), body_max, ticket).await?;
    let max = server.worker.setup.limits.message_max;
    let message = Message::check(&body, max.as_usize())
        .map_err(|error| Problem::new(StatusCode::BAD_REQUEST, "invalid", error.to_string()))?;
    let _place = place(server, ticket).await?;
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

/// A body of at most so many bytes, when all of it has come.
pub(super) async fn whole(body: Incoming, max: u64, ticket: &Ticket) -> Result<Bytes, Problem> {
    match ticket.in_time(Upload::new(body, max).collect()).await {
        Some(Ok(body)) => Ok(body.to_bytes()),
        Some(Err(BodyError::TooLarge(max))) => Err(Problem::too_large(max)),
        Some(Err(BodyError::Cut)) => Err(Problem::new(StatusCode::BAD_REQUEST, "cut", "the body has no end").closing()),
        None => Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "slow", "the body took too long").closing()),
    }
}

/// Waits for a place among those that run.
pub(super) async fn place(server: &Server, ticket: &Ticket) -> Result<Place, Problem> {
    match ticket.in_time(server.gate.enter()).await {
        Some(Ok(place)) => Ok(place),
        Some(Err(Full)) => {
            let message = "as many requests run and wait as may";
            Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "full", message))
        }
        None => Err(Problem::new(StatusCode::GATEWAY_TIMEOUT, "limit", "its turn did not come in time")),
    }
}

/// Asks the guest for a path, as a client would.
///
/// # Errors
/// What it answered, when that is no success.
pub(super) async fn probe(server: &Rc<Server>, path: &str) -> Result<(), String> {
    let request = Request::get(path).header(HOST, "localhost").body(Upload::empty());
    let request = request.map_err(|error| format!("the probe `{path}` is no path: {error}"))?;
    let local = Ipv4Addr::LOCALHOST.into();
    let connection = Rc::new(Connection::new(local, None));
    let ticket = Ticket::new(server.front.clone(), connection, server.front.id(0), server.worker.timeout, None);
    let response = serve(server, request, Scheme::Http, 0, false, ticket).await;
    match response.status() {
        status if status.is_success() || status.is_redirection() => Ok(()),
        status => Err(format!("the probe `GET {path}` was answered {status}")),
    }
}
