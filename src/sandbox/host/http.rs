//! `wasi:http`: requests in, responses out, in types that the engine has no part in.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    Response,
    body::{Body, Frame, SizeHint},
};
use tokio::sync::oneshot;
use wasmtime_wasi_http::{
    Error,
    p2::{
        bindings::http::types::{self, ErrorCode},
        body::HyperOutgoingBody,
    },
};

/// How a request came, as its guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// In the clear.
    Http,
    /// Over TLS, which a proxy in front of us has ended.
    Https,
}

impl From<Scheme> for types::Scheme {
    fn from(scheme: Scheme) -> Self {
        match scheme {
            Scheme::Http => Self::Http,
            Scheme::Https => Self::Https,
        }
    }
}

/// Why the body of a request ends before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    /// It is larger than it may be.
    #[error("the body is larger than {0} bytes")]
    TooLarge(u64),
    /// The client is gone, or does not keep to the protocol.
    #[error("the body was cut off")]
    Cut,
}

impl From<BodyError> for Error {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLarge(max) => Self::HttpRequestBodySize(Some(max)),
            BodyError::Cut => Self::ConnectionTerminated,
        }
    }
}

/// What a guest answered: a response, or the code of the error that it wants to be taken for one.
pub(crate) type GuestResponse = Result<Response<GuestBody>, String>;

/// Takes a guest's response.
pub(crate) struct Respond(oneshot::Sender<GuestResponse>);

impl Respond {
    /// A way to respond, and where the response arrives; nothing arrives when the guest ends without one.
    pub(crate) fn channel() -> (Self, oneshot::Receiver<GuestResponse>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    pub(in crate::sandbox) fn send(self, answer: Result<Response<HyperOutgoingBody>, ErrorCode>) {
        let answer = match answer {
            Ok(response) => Ok(response.map(GuestBody)),
            Err(code) => Err(format!("{code:?}")),
        };
        // the client may have gone meanwhile
        let _ = self.0.send(answer);
    }
}

/// The body of a guest's response, as it writes it. It also ends when its instance is dropped; whether the guest meant
/// that is for whoever drops instances to know.
pub(crate) struct GuestBody(HyperOutgoingBody);

/// The guest gave up its response, or did not write as much as it had promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest did not finish its response")]
pub(crate) struct Unfinished;

impl Body for GuestBody {
    type Data = Bytes;
    type Error = Unfinished;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unfinished>>> {
        Pin::new(&mut self.0).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(|_| Unfinished)))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
