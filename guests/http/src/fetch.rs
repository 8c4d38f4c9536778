//! Command: fetches the URLs that are its arguments, one after the other, and goes where it is sent. For each it prints
//! the status and the body, or the code of the error to stderr.
//!
//! - `--header NAME=VALUE` goes with all requests.
//! - `--post BYTES` posts a body of so many bytes.
//! - `--ms N` is how long it waits for a connection, for a response, and within one.
//! - `--forget TIMES` sends each request so many times before that, and waits for no response.
//! - `--count` prints the size of a body in its place.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use http_guests::client::{Request, send, send_and_forget};

/// How often it goes where it is sent.
const REDIRECTS_MAX: usize = 10;

fn main() -> ExitCode {
    let mut request = Request::default();
    let (mut urls, mut count, mut forgotten) = (vec![], false, 0u32);
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().expect("a value");
        match &*arg {
            "--header" => {
                let header = value();
                let (name, value) = header.split_once('=').expect("a name and a value");
                request.headers.push((name.to_owned(), value.to_owned()));
            }
            "--post" => request.body = Some(vec![b'x'; value().parse().expect("a number")]),
            "--ms" => request.patience = Some(Duration::from_millis(value().parse().expect("a number"))),
            "--count" => count = true,
            "--forget" => forgotten = value().parse().expect("a number"),
            _ => urls.push(arg),
        }
    }
    let mut code = ExitCode::SUCCESS;
    for url in urls {
        request.url = url;
        for _ in 0..forgotten {
            // how that went is nobody's business
            let _ = send_and_forget(&request);
        }
        match fetch(&mut request) {
            Ok((status, body)) if count => println!("{status} {}", body.len()),
            Ok((status, body)) => println!("{status} {}", String::from_utf8_lossy(&body)),
            Err(error) => {
                // in one piece: others may write there, too
                let _ = io::stderr().write_all(format!("{error}\n").as_bytes());
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn fetch(request: &mut Request) -> Result<(u16, Vec<u8>), String> {
    for _ in 0..REDIRECTS_MAX {
        let response = send(request)?;
        match response.location {
            Some(location) if response.status / 100 == 3 => request.url = location,
            _ => return Ok((response.status, response.body)),
        }
    }
    Err("too many redirects".to_owned())
}
