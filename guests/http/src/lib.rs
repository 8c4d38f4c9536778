//! wrun's HTTP guests. Each file beside this one is a guest of its own: an example of this package, built as a
//! `cdylib`. What several of them need is here.

pub mod client;

use std::io::{self, Write};
use std::time::Duration;

use wasip2::clocks::monotonic_clock;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam, Trailers};
use wasip2::io::streams::OutputStream;

/// What a request asks for: the path, and what its query says.
pub struct Target {
    /// With its slash in front and no query.
    pub path: String,
    query: String,
}

impl Target {
    /// Reads the target of a request.
    #[must_use]
    pub fn of(request: &IncomingRequest) -> Self {
        let target = request.path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        Self { path: path.to_owned(), query: query.to_owned() }
    }

    /// Answers the text of `name=text` in the query, percent-decoded.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        let mut pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, text)| decoded(text))
    }

    /// Answers the number of `name=number` in the query.
    ///
    /// # Panics
    ///
    /// When it is not a number.
    #[must_use]
    pub fn number<N: std::str::FromStr>(&self, name: &str) -> Option<N> {
        self.text(name).map(|text| text.parse().ok().expect("a number"))
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut decoded = vec![];
    while let Some(byte) = bytes.next() {
        let hex = |digit: Option<u8>| char::from(digit?).to_digit(16)?.try_into().ok();
        decoded.push(match byte {
            b'%' => hex(bytes.next()).zip(hex(bytes.next())).map_or(b'?', |(high, low): (u8, u8)| high << 4 | low),
            byte => byte,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The body of a response whose headers are sent.
///
/// Dropping it breaks the response off; [`finish`](Self::finish) ends it.
pub struct Body {
    // the stream is of the body, and must be dropped before it
    stream: OutputStream,
    body: OutgoingBody,
}

impl Body {
    /// Sends status and headers.
    ///
    /// # Panics
    ///
    /// When the host does not take one of them.
    #[must_use]
    pub fn open(answer: ResponseOutparam, status: u16, headers: &[(&str, &str)]) -> Self {
        let fields = Fields::new();
        for (name, value) in headers {
            fields.append(name, value.as_bytes()).expect("a header");
        }
        let response = OutgoingResponse::new(fields);
        response.set_status_code(status).expect("a status");
        let body = response.body().expect("the first time");
        let stream = body.write().expect("the first time");
        ResponseOutparam::set(answer, Ok(response));
        Self { stream, body }
    }

    /// Sends a part of the body at once.
    ///
    /// # Errors
    ///
    /// When nobody takes it any more.
    pub fn send(&mut self, part: &[u8]) -> io::Result<()> {
        self.stream.write_all(part)?;
        self.stream.blocking_flush().map_err(io::Error::other)
    }

    /// Ends the body.
    ///
    /// # Errors
    ///
    /// When it is not as long as its `content-length` says.
    pub fn finish(self, trailers: Option<Trailers>) -> io::Result<()> {
        drop(self.stream);
        OutgoingBody::finish(self.body, trailers).map_err(io::Error::other)
    }
}

/// Answers a text, all at once.
///
/// # Errors
///
/// When nobody takes it any more.
pub fn respond(answer: ResponseOutparam, status: u16, content_type: &str, text: &str) -> io::Result<()> {
    let length = text.len().to_string();
    let mut body = Body::open(answer, status, &[("content-type", content_type), ("content-length", &length)]);
    body.send(text.as_bytes())?;
    body.finish(None)
}

/// Answers a JSON text with status 200.
///
/// # Errors
///
/// When nobody takes it any more.
pub fn respond_json(answer: ResponseOutparam, json: &str) -> io::Result<()> {
    respond(answer, 200, "application/json", json)
}

/// Waits, as WASI does: in the host.
pub fn sleep(ms: u64) {
    let duration = Duration::from_millis(ms).as_nanos().try_into().unwrap_or(u64::MAX);
    monotonic_clock::subscribe_duration(duration).block();
}
