//! A client of `wasi:http`: one request, and the response to it.

use std::time::Duration;

use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, FutureIncomingResponse, IncomingBody, Method, OutgoingBody, OutgoingRequest, RequestOptions,
    Scheme,
};
use wasip2::io::streams::StreamError;

/// How much of a body is read at a time.
const PIECE: u64 = 64 << 10;

/// What is sent, and how long for an answer is waited.
#[derive(Default)]
pub struct Request {
    /// `http://…` or `https://…`
    pub url: String,
    /// Headers beside those that the host sets.
    pub headers: Vec<(String, String)>,
    /// Sent with `POST` when there is one.
    pub body: Option<Vec<u8>>,
    /// How long to wait for a connection, for the first byte and between bytes.
    pub patience: Option<Duration>,
}

/// A response, with its whole body.
pub struct Response {
    /// 200 and the like.
    pub status: u16,
    /// Where it sends its client instead.
    pub location: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// Sends a request and waits for all of the response.
///
/// # Errors
///
/// What the host says, in words.
///
/// # Panics
///
/// When the URL has no scheme, or the host does not keep to the order of things.
pub fn send(request: &Request) -> Result<Response, String> {
    let (body, answer) = begin(request)?;
    write(body, request.body.as_deref().unwrap_or_default())?;
    answer.subscribe().block();
    let response = answer.get().expect("it is there").expect("the first time").map_err(|code| in_words(&code))?;
    let location = response.headers().get("location").into_iter().next();
    let incoming = response.consume().expect("the first time");
    Ok(Response {
        status: response.status(),
        location: location.map(|location| String::from_utf8_lossy(&location).into_owned()),
        body: read(&incoming)?,
    })
}

/// Sends a request and waits for nothing.
///
/// # Errors
///
/// As [`send`].
///
/// # Panics
///
/// As [`send`].
pub fn send_and_forget(request: &Request) -> Result<(), String> {
    begin(request).map(drop)
}

/// Hands a request over.
fn begin(request: &Request) -> Result<(OutgoingBody, FutureIncomingResponse), String> {
    let (scheme, rest) = request.url.split_once("://").expect("a scheme");
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let fields = Fields::new();
    for (name, value) in &request.headers {
        fields.append(name, value.as_bytes()).map_err(|error| format!("{name}: {error:?}"))?;
    }
    let outgoing = OutgoingRequest::new(fields);
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => Scheme::Other(other.to_owned()),
    };
    let method = if request.body.is_some() { Method::Post } else { Method::Get };
    outgoing.set_method(&method).expect("a method");
    outgoing.set_scheme(Some(&scheme)).map_err(|()| "not a scheme")?;
    outgoing.set_authority(Some(authority)).map_err(|()| "not an authority")?;
    outgoing.set_path_with_query(Some(path)).map_err(|()| "not a path")?;
    let options = RequestOptions::new();
    if let Some(patience) = request.patience {
        let patience = u64::try_from(patience.as_nanos()).ok();
        options.set_connect_timeout(patience).expect("it is supported");
        options.set_first_byte_timeout(patience).expect("it is supported");
        options.set_between_bytes_timeout(patience).expect("it is supported");
    }
    let body = outgoing.body().expect("the first time");
    let answer = outgoing_handler::handle(outgoing, Some(options)).map_err(|code| in_words(&code))?;
    Ok((body, answer))
}

fn write(body: OutgoingBody, bytes: &[u8]) -> Result<(), String> {
    let stream = body.write().expect("the first time");
    for piece in bytes.chunks(4096) {
        // whoever does not take it has answered, or has an error that the response tells
        if stream.blocking_write_and_flush(piece).is_err() {
            break;
        }
    }
    drop(stream);
    OutgoingBody::finish(body, None).map_err(|code| in_words(&code))
}

fn read(incoming: &IncomingBody) -> Result<Vec<u8>, String> {
    let stream = incoming.stream().expect("the first time");
    let mut body = vec![];
    loop {
        match stream.blocking_read(PIECE) {
            Ok(piece) => body.extend(piece),
            Err(StreamError::Closed) => return Ok(body),
            Err(StreamError::LastOperationFailed(error)) => {
                let code = wasip2::http::types::http_error_code(&error);
                return Err(code.map_or_else(|| error.to_debug_string(), |code| in_words(&code)));
            }
        }
    }
}

/// The name of the code, and what it carries.
fn in_words(code: &ErrorCode) -> String {
    format!("{code:?}")
}
