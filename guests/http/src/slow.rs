//! Sleeps. `GET /?ms=N` waits so long, or for an hour, and then answers `{"slept":N}`; `GET /late?ms=N` sends headers
//! and a first chunk at once and ends the body after the wait.

use std::io;

use http_guests::{Body, Target, respond_json, sleep};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

const HOUR_MS: u64 = 60 * 60 * 1000;

struct Slow;

impl Guest for Slow {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let target = Target::of(&request);
        let ms = target.number("ms").unwrap_or(HOUR_MS);
        // a client that goes away is nothing to trap for
        let _ = if target.path == "/late" { late(ms, answer) } else { slept(ms, answer) };
    }
}

fn slept(ms: u64, answer: ResponseOutparam) -> io::Result<()> {
    sleep(ms);
    respond_json(answer, &format!(r#"{{"slept":{ms}}}"#))
}

fn late(ms: u64, answer: ResponseOutparam) -> io::Result<()> {
    let mut body = Body::open(answer, 200, &[("content-type", "text/plain")]);
    body.send(b"early\n")?;
    sleep(ms);
    body.finish(None)
}

wasip2::http::proxy::export!(Slow);
