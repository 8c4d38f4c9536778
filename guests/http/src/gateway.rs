//! `/?url=URL` answers what is fetched from there: its status and its body, or 502 and the code of the error.

use http_guests::client::{Request, send};
use http_guests::{Target, respond};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

struct Gateway;

impl Guest for Gateway {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let url = Target::of(&request).text("url").unwrap_or_default();
        let (status, text) = match send(&Request { url, ..Request::default() }) {
            Ok(response) => (response.status, String::from_utf8_lossy(&response.body).into_owned()),
            Err(error) => (502, error),
        };
        // a client that goes away is nothing to trap for
        let _ = respond(answer, status, "text/plain", &text);
    }
}

wasip2::http::proxy::export!(Gateway);
