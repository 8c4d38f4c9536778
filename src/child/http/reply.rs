//! Bodies: a client's on its way to a guest, and a response's on its way back.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::{forward::Passage, request::Work, ticket::Ticket};
use crate::sandbox::{BodyError, GuestBody, Unfinished};

/// The body of a request, no longer than it may be.
pub(super) struct Upload {
    /// None: there is no body.
    body: Option<Incoming>,
    max: u64,
    seen: u64,
    too_large: TooLarge,
}

/// Whether a body turned out to be larger than it may be.
#[derive(Debug, Clone, Default)]
pub(super) struct TooLarge(Option<Arc<AtomicBool>>);

impl TooLarge {
    pub(super) fn is(&self) -> bool {
        self.0.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

impl Upload {
    /// A body that may have so many bytes.
    pub(super) fn new(body: Incoming, max: u64) -> Self {
        if body.is_end_stream() {
            return Self::empty();
        }
        // one that says its length was looked at before
        let flag = body.size_hint().exact().is_none().then(Arc::default);
        Self { body: Some(body), max, seen: 0, too_large: TooLarge(flag) }
    }

    /// No body.
    pub(super) fn empty() -> Self {
        Self { body: None, max: 0, seen: 0, too_large: TooLarge(None) }
    }

    /// Tells, also while somebody else reads the body, whether it is too large.
    pub(super) fn too_large(&self) -> TooLarge {
        self.too_large.clone()
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let Some(frame) = ready!(Pin::new(body).poll_frame(cx)) else { return Poll::Ready(None) };
        let Ok(frame) = frame else { return Poll::Ready(Some(Err(BodyError::Cut))) };
        self.seen += frame.data_ref().map_or(0, Bytes::len) as u64;
        if self.seen > self.max {
            self.too_large.0.iter().for_each(|flag| flag.store(true, Ordering::Relaxed));
            return Poll::Ready(Some(Err(BodyError::TooLarge(self.max))));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

/// The body of a response, and what goes on while it is sent.
pub(super) struct Reply {
    content: Content,
    /// Tells of the request when the response is at its end, or given up.
    ticket: Ticket,
}

enum Content {
    /// All of it.
    Whole(Option<Bytes>),
    /// What a guest writes.
    Guest(Box<Streamed>),
    /// What comes from another process, until all of it has come.
    PassedOn { body: Incoming, is_empty: bool, passage: Passage },
}

/// The body of a response that a guest may still be writing.
pub(super) struct Streamed {
    body: GuestBody,
    /// What was taken out of it before.
    early: std::vec::IntoIter<Frame<Bytes>>,
    /// The guest, while it is at work. It moves when this body is polled: a client that is slow slows its own guest.
    work: Option<Work>,
    too_large: TooLarge,
    /// How many bytes the response has promised.
    promised: Option<u64>,
    sent: u64,
    /// Whether there is no body to send, whatever the guest writes.
    is_empty: bool,
    /// Whether the client will have all that there is.
    complete: bool,
}

impl Reply {
    /// A response that is whole.
    pub(super) fn whole(content: impl Into<Bytes>, ticket: Ticket) -> Self {
        Self { content: Content::Whole(Some(content.into()).filter(|content| !content.is_empty())), ticket }
    }

    /// A response that a guest has begun, and may still be writing.
    pub(super) fn streamed(streamed: Streamed, ticket: Ticket) -> Self {
        Self { content: Content::Guest(Box::new(streamed)), ticket }
    }
}

impl Reply {
    /// A response that another process gives; when it `is_empty`, there is none to come, whatever its head says.
    pub(super) fn passed_on(body: Incoming, is_empty: bool, passage: Passage, ticket: Ticket) -> Self {
        Self { content: Content::PassedOn { body, is_empty, passage }, ticket }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Unfinished;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unfinished>>> {
        let Self { content, ticket } = self.get_mut();
        match content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| {
                ticket.count(bytes.len());
                Ok(Frame::data(bytes))
            })),
            Content::Guest(streamed) => streamed.poll_frame(cx, ticket),
            Content::PassedOn { body, passage, .. } => {
                let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
                if frame.is_none() || body.is_end_stream() {
                    passage.note_end();
                }
                let length = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref().map(Bytes::len));
                ticket.count(length.unwrap_or_default());
                Poll::Ready(frame.map(|frame| frame.map_err(|_| Unfinished)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.is_none(),
            Content::Guest(streamed) => streamed.is_empty,
            Content::PassedOn { body, is_empty, .. } => *is_empty || body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Content::Guest(streamed) => streamed.promised.map_or_else(SizeHint::default, SizeHint::with_exact),
            Content::PassedOn { body, .. } => body.size_hint(),
        }
    }
}

impl Streamed {
    /// What a guest writes: `early` was taken out of its body before, `promised` is the length that its head names, and
    /// none of it goes to the client when there `is_no_body`.
    pub(super) fn new(
        body: GuestBody,
        early: Vec<Frame<Bytes>>,
        work: Option<Work>,
        too_large: TooLarge,
        promised: Option<u64>,
        is_no_body: bool,
    ) -> Self {
        let is_empty = is_no_body || promised == Some(0);
        Self { body, early: early.into_iter(), work, too_large, promised, sent: 0, is_empty, complete: is_empty }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        ticket: &mut Ticket,
    ) -> Poll<Option<Result<Frame<Bytes>, Unfinished>>> {
        if let Some(work) = &mut self.work
            && let Poll::Ready(ended) = work.as_mut().poll(cx)
        {
            self.work = None;
            if let Err(outcome) = ended {
                // what it has written ends as if it were meant to: the client must see that it is not
                ticket.failed(&outcome);
                return Poll::Ready(Some(Err(Unfinished)));
            }
        }
        if self.too_large.is() {
            self.work = None;
            return Poll::Ready(Some(Err(Unfinished)));
        }
        let frame = match self.early.next() {
            Some(early) => Poll::Ready(Some(Ok(early))),
            None => Pin::new(&mut self.body).poll_frame(cx),
        };
        match frame {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                self.sent += length as u64;
                self.complete = frame.is_trailers() || self.promised.is_some_and(|promised| self.sent >= promised);
                ticket.count(length);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(unfinished))) => Poll::Ready(Some(Err(unfinished))),
            Poll::Ready(None) => {
                self.complete = true;
                Poll::Ready(None)
            }
            // a guest that has returned writes no more, even if it has not said so
            Poll::Pending if self.work.is_none() => {
                self.complete = true;
                Poll::Ready(None)
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Reply {
    /// A guest may go on after its response, if the client has all of that; when the client has gone, so does the guest.
    fn drop(&mut self) {
        if let Content::Guest(streamed) = &mut self.content
            && let Some(work) = streamed.work.take()
            && streamed.complete
        {
            self.ticket.go_on(work);
        }
    }
}
