//! Streams. `GET /?chunks=N&bytes=B&ms=M` sends so many chunks of so many bytes, one chunk of one byte unless it is
//! told otherwise, and waits before each of them; `POST /echo` gives the request's body and trailers back as they come.

use std::io;

use http_guests::{Body, Target, respond, sleep};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingBody, IncomingRequest, ResponseOutparam};
use wasip2::io::streams::StreamError;

/// How much of a request's body is held at a time.
const PIECE: u64 = 64 << 10;

struct Stream;

impl Guest for Stream {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let target = Target::of(&request);
        // a client that goes away is nothing to trap for
        let _ = match &*target.path {
            "/" => chunks(&target, answer),
            "/echo" => echo(request, answer),
            path => respond(answer, 404, "text/plain", path),
        };
    }
}

fn chunks(target: &Target, answer: ResponseOutparam) -> io::Result<()> {
    let chunks = target.number("chunks").unwrap_or(1_usize);
    let bytes = target.number("bytes").unwrap_or(1);
    let ms = target.number("ms").unwrap_or(0);
    let mut body = Body::open(answer, 200, &[("content-type", "text/plain")]);
    let mut chunk = vec![];
    for letter in (b'a'..=b'z').cycle().take(chunks) {
        if ms > 0 {
            sleep(ms);
        }
        chunk.clear();
        chunk.resize(bytes, letter);
        body.send(&chunk)?;
    }
    body.finish(None)
}

fn echo(request: IncomingRequest, answer: ResponseOutparam) -> io::Result<()> {
    // HTTP/1 sends those trailers only that the headers speak of
    let headers = [("content-type", "application/octet-stream"), ("trailer", "x-checksum")];
    let mut body = Body::open(answer, 200, &headers);
    let incoming = request.consume().expect("the first time");
    let stream = incoming.stream().expect("the first time");
    loop {
        match stream.blocking_read(PIECE) {
            Ok(piece) => body.send(&piece)?,
            Err(StreamError::Closed) => break,
            Err(StreamError::LastOperationFailed(error)) => return Err(io::Error::other(error)),
        }
    }
    drop(stream);
    let trailers = IncomingBody::finish(incoming);
    trailers.subscribe().block();
    let received = trailers.get().expect("waited for").expect("the first time").map_err(io::Error::other)?;
    body.finish(received.map(|trailers| trailers.clone()))
}

wasip2::http::proxy::export!(Stream);
