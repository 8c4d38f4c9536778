//! Tells what it is sent. `POST` reads the body and answers its length, its FNV-1a hash, its trailers and how it
//! failed; `POST /ignore` does not read it and answers `{"ignored":true}`; every other method answers the request's
//! method, path, scheme, authority and headers.
//!
//! `GET /back` answers the request's headers as those of the response, and no body.
//!
//! `GET /fetch?url=host:port` asks another server and answers `{"fetched":200}` or `{"refused":"why"}`.

use std::collections::BTreeMap;

use http_guests::{Target, respond_json};
use serde::Serialize;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingRequest, Method, OutgoingBody, OutgoingRequest, OutgoingResponse,
    ResponseOutparam, Scheme,
};
use wasip2::io::streams::StreamError;
use wrun_guest::serde_json;

/// How much of the body is held at a time.
const PIECE: u64 = 64 << 10;

/// A body that was read.
#[derive(Serialize)]
struct Report {
    bytes: u64,
    fnv: String,
    trailers: BTreeMap<String, String>,
    error: Option<String>,
}

/// What was asked, beside the body.
#[derive(Serialize)]
struct Seen {
    method: String,
    path: Option<String>,
    scheme: Option<String>,
    authority: Option<String>,
    headers: Vec<(String, String)>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum Fetch {
    Fetched(u16),
    Refused(String),
}

struct Upload;

impl Guest for Upload {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let target = Target::of(&request);
        if target.path == "/back" {
            return send_back(&request, answer);
        }
        let json = match (request.method(), &*target.path) {
            (Method::Post, "/ignore") => Ok(r#"{"ignored":true}"#.to_owned()),
            (Method::Post, _) => serde_json::to_string(&read(&request)),
            (_, "/fetch") => serde_json::to_string(&match fetch(&target.text("url").expect("`url`")) {
                Ok(status) => Fetch::Fetched(status),
                Err(code) => Fetch::Refused(format!("{code:?}")),
            }),
            (method, _) => serde_json::to_string(&see(&request, &method)),
        };
        // a client that goes away is nothing to trap for
        let _ = respond_json(answer, &json.expect("serializes"));
    }
}

fn send_back(request: &IncomingRequest, answer: ResponseOutparam) {
    // made anew, as a guest does that leaves some of them out
    let headers = Fields::from_list(&request.headers().entries()).expect("headers");
    let response = OutgoingResponse::new(headers);
    let body = response.body().expect("the first time");
    ResponseOutparam::set(answer, Ok(response));
    OutgoingBody::finish(body, None).expect("a body without a length");
}

fn read(request: &IncomingRequest) -> Report {
    let mut report = Report { bytes: 0, fnv: String::new(), trailers: BTreeMap::new(), error: None };
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let body = request.consume().expect("the first time");
    let stream = body.stream().expect("the first time");
    let failure = loop {
        match stream.blocking_read(PIECE) {
            Ok(piece) => {
                report.bytes += piece.len() as u64;
                hash = piece.into_iter().fold(hash, fnv1a);
            }
            Err(StreamError::Closed) => break None,
            Err(StreamError::LastOperationFailed(error)) => break Some(error.to_debug_string()),
        }
    };
    drop(stream);
    report.fnv = format!("{hash:016x}");
    report.error = failure.or_else(|| {
        let trailers = IncomingBody::finish(body);
        trailers.subscribe().block();
        match trailers.get().expect("waited for").expect("the first time") {
            Ok(fields) => {
                report.trailers = fields.iter().flat_map(texts).collect();
                None
            }
            Err(code) => Some(format!("{code:?}")),
        }
    });
    report
}

fn fnv1a(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
}

fn see(request: &IncomingRequest, method: &Method) -> Seen {
    let method = match method {
        Method::Get => "GET",
        Method::Head => "HEAD",
        Method::Post => "POST",
        Method::Put => "PUT",
        Method::Delete => "DELETE",
        Method::Connect => "CONNECT",
        Method::Options => "OPTIONS",
        Method::Trace => "TRACE",
        Method::Patch => "PATCH",
        Method::Other(name) => name,
    };
    let scheme = request.scheme().map(|scheme| match scheme {
        Scheme::Http => "HTTP".to_owned(),
        Scheme::Https => "HTTPS".to_owned(),
        Scheme::Other(name) => name,
    });
    Seen {
        method: method.to_owned(),
        path: request.path_with_query(),
        scheme,
        authority: request.authority(),
        headers: texts(&request.headers()).collect(),
    }
}

fn texts(fields: &Fields) -> impl Iterator<Item = (String, String)> + use<> {
    fields.entries().into_iter().map(|(name, value)| (name, String::from_utf8_lossy(&value).into_owned()))
}

fn fetch(authority: &str) -> Result<u16, ErrorCode> {
    let request = OutgoingRequest::new(Fields::new());
    request.set_scheme(Some(&Scheme::Http)).expect("a scheme");
    request.set_authority(Some(authority)).map_err(|()| ErrorCode::HttpRequestUriInvalid)?;
    request.set_path_with_query(Some("/")).expect("a path");
    let response = outgoing_handler::handle(request, None)?;
    response.subscribe().block();
    response.get().expect("waited for").expect("the first time").map(|response| response.status())
}

wasip2::http::proxy::export!(Upload);
