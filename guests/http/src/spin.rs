//! Computes. `GET /?ms=N` keeps a core busy so long and then answers `{"spun":N}`, or never without `ms`; `GET /late`
//! sends headers and a first chunk and never ends the body.

use std::hint::black_box;
use std::io;
use std::time::Duration;

use http_guests::{Body, Target, respond_json};
use wasip2::clocks::monotonic_clock;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

struct Spin;

impl Guest for Spin {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let target = Target::of(&request);
        // a client that goes away is nothing to trap for
        let _ = match target.number("ms") {
            _ if target.path == "/late" => late(answer),
            Some(ms) => spun(ms, answer),
            None => spin(),
        };
    }
}

fn spun(ms: u64, answer: ResponseOutparam) -> io::Result<()> {
    let start = monotonic_clock::now();
    while Duration::from_nanos(monotonic_clock::now() - start) < Duration::from_millis(ms) {
        compute();
    }
    respond_json(answer, &format!(r#"{{"spun":{ms}}}"#))
}

fn late(answer: ResponseOutparam) -> io::Result<()> {
    let mut body = Body::open(answer, 200, &[("content-type", "text/plain")]);
    body.send(b"early\n")?;
    spin()
}

/// Never calls the host.
#[inline(never)]
fn spin() -> ! {
    loop {
        compute();
    }
}

/// A fraction of a millisecond: so long that looking at the clock in between does not count.
fn compute() {
    let mut state = 1_u64;
    for _ in 0..100_000 {
        state = black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

wasip2::http::proxy::export!(Spin);
