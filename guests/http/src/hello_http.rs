//! Tells who answers: `{"pid":4711,"worker":1,"generation":1}`, whatever is asked.
//!
//! Benches start an instance of it for every request, so it is as small as it gets: few calls of the host, and neither
//! a panic nor an allocation that may fail, whose messages would bring in half of WASI.

use std::fmt::{self, Write};
use std::process::abort;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wrun_guest::worker;

struct Hello;

impl Guest for Hello {
    fn handle(_: IncomingRequest, answer: ResponseOutparam) {
        let worker::Identity { pid, id, generation, .. } = worker::identity();
        let text = Text::new(format_args!(r#"{{"pid":{pid},"worker":{id},"generation":{generation}}}"#));
        let text = text.bytes();

        let headers = Fields::new();
        headers.append("content-type", b"application/json").unwrap_or_else(|_| abort());
        headers.append("content-length", Text::new(format_args!("{}", text.len())).bytes()).unwrap_or_else(|_| abort());
        let response = OutgoingResponse::new(headers);
        let body = response.body().unwrap_or_else(|()| abort());
        let stream = body.write().unwrap_or_else(|()| abort());
        if stream.check_write().is_ok_and(|room| room >= text.len() as u64) {
            // a body that is there before the headers are sent goes with them
            stream.write(text).unwrap_or_else(|_| abort());
            drop(stream);
            OutgoingBody::finish(body, None).unwrap_or_else(|_| abort());
            ResponseOutparam::set(answer, Ok(response));
        } else {
            ResponseOutparam::set(answer, Ok(response));
            stream.blocking_write_and_flush(text).unwrap_or_else(|_| abort());
            drop(stream);
            OutgoingBody::finish(body, None).unwrap_or_else(|_| abort());
        }
    }
}

/// A short text, on the stack.
struct Text {
    bytes: [u8; 64],
    len: usize,
}

impl Text {
    fn new(text: fmt::Arguments<'_>) -> Self {
        let mut this = Self { bytes: [0; 64], len: 0 };
        this.write_fmt(text).unwrap_or_else(|_| abort());
        this
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_else(|| abort())
    }
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.len..).and_then(|rest| rest.get_mut(..part.len())).ok_or(fmt::Error)?;
        room.copy_from_slice(part.as_bytes());
        self.len += part.len();
        Ok(())
    }
}

wasip2::http::proxy::export!(Hello);
