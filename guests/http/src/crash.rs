//! Fails in all the ways there are; the path says how.
//!
//! - `/trap` panics before there is a response.
//! - `/late?ms=N` panics after headers and one chunk, and a pause.
//! - `/short?ms=N` promises 100 bytes, sends 10 and returns after a pause.
//! - `/exit?code=N` exits, with 1 unless it is told otherwise.
//! - `/none` returns without a response.
//! - `/error` answers an error instead of a response.
//! - `/memory?mib=N` keeps so much memory for ever and answers `{"mib":N}`.
//! - `/recurse` calls itself without end.
//! - `/status?code=N` answers with that status.
//! - `/print?text=…` prints a line to stdout and to stderr.
//! - All else answers `{"handled":N}`: how many requests this instance has got.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, mem, process};

use http_guests::{Body, Target, respond, respond_json, sleep};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{ErrorCode, IncomingRequest, ResponseOutparam};

const MIB: usize = 1 << 20;

/// How many requests this instance has got.
static HANDLED: AtomicU64 = AtomicU64::new(0);

/// How deep [`recurse`] is.
static DEPTH: AtomicU64 = AtomicU64::new(0);

struct Crash;

impl Guest for Crash {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let handled = HANDLED.fetch_add(1, Ordering::Relaxed) + 1;
        let target = Target::of(&request);
        // a client that goes away is nothing to trap for
        let _ = match &*target.path {
            "/trap" => panic!("told to trap"),
            "/late" => late(answer, target.number("ms")),
            "/short" => short(answer, target.number("ms")),
            "/exit" => process::exit(target.number("code").unwrap_or(1)),
            "/none" => Ok(()),
            "/error" => {
                ResponseOutparam::set(answer, Err(ErrorCode::InternalError(Some("told to fail".to_owned()))));
                Ok(())
            }
            "/memory" => {
                let mib = target.number("mib").unwrap_or(0);
                keep(mib);
                respond_json(answer, &format!(r#"{{"mib":{mib}}}"#))
            }
            "/recurse" => {
                recurse();
                Ok(())
            }
            "/status" => {
                let code = target.number("code").unwrap_or(200);
                respond(answer, code, "text/plain", &format!("status {code}\n"))
            }
            "/print" => {
                let text = target.text("text").unwrap_or_default();
                println!("{text}");
                eprintln!("{text}");
                respond(answer, 200, "text/plain", "printed\n")
            }
            _ => respond_json(answer, &format!(r#"{{"handled":{handled}}}"#)),
        };
    }
}

fn late(answer: ResponseOutparam, pause_ms: Option<u64>) -> io::Result<()> {
    let mut body = Body::open(answer, 200, &[("content-type", "text/plain")]);
    body.send(b"so far, so good\n")?;
    pause_ms.into_iter().for_each(sleep);
    panic!("told to trap late")
}

fn short(answer: ResponseOutparam, pause_ms: Option<u64>) -> io::Result<()> {
    let mut body = Body::open(answer, 200, &[("content-type", "text/plain"), ("content-length", "100")]);
    body.send(b"ten bytes\n")?;
    pause_ms.into_iter().for_each(sleep);
    body.finish(None)
}

fn keep(mib: usize) {
    for _ in 0..mib {
        mem::forget(black_box(vec![1_u8; MIB]));
    }
}

/// Never ends, which neither the compiler nor its optimizer may know: the one warns and the other makes it a loop.
#[inline(never)]
fn recurse() {
    if DEPTH.fetch_add(1, Ordering::Relaxed) < u64::MAX {
        recurse();
    }
    DEPTH.fetch_sub(1, Ordering::Relaxed);
}

wasip2::http::proxy::export!(Crash);
