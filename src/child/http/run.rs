//! A command that answers requests: one run for each, with the body as its standard input. What it prints is the response,
//! when it exits with code 0; else that is 500, and what it printed is nobody's business.
//!
//! It learns of the request by variables of CGI (RFC 3875), but none of the headers: programs were never meant to have
//! their environment written by strangers.

use std::{
    net::IpAddr,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde::{Deserialize, Serialize};

use super::{
    Server,
    reply::Reply,
    request::{place, timed, whole},
    ticket::{Problem, Ticket},
};
use crate::{
    event::Stream,
    limits::Bytes,
    outcome::End,
    sandbox::{OutputSink, Setup, Stdio},
};

/// How a command answers requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunConfig {
    /// Its arguments, after its own name.
    pub(crate) args: Vec<String>,
    /// The most that it may print for one request.
    pub(crate) stdout_max: Bytes,
    /// What its output is; none is text if it is UTF-8, and any bytes if not.
    pub(crate) content_type: Option<String>,
}

/// Runs the command once.
pub(super) async fn run(
    server: &Rc<Server>,
    request: Request<Incoming>,
    client: IpAddr,
    body_max: u64,
    ticket: Ticket,
) -> Response<Reply> {
    let Some(config) = &server.command else {
        let message = "this command answers no requests";
        return ticket.refuse(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", message));
    };
    match printed(server, config, request, client, body_max, &ticket).await {
        Ok(output) => {
            let kind = match &config.content_type {
                Some(kind) => HeaderValue::from_str(kind).ok(),
                None if std::str::from_utf8(&output).is_ok() => None,
                None => Some(HeaderValue::from_static("application/octet-stream")),
            };
            let mut response = ticket.respond(StatusCode::OK, output);
            let kind = kind.unwrap_or(HeaderValue::from_static("text/plain; charset=utf-8"));
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(problem) => ticket.refuse(problem),
    }
}

/// What it prints for a request.
async fn printed(
    server: &Rc<Server>,
    config: &RunConfig,
    request: Request<Incoming>,
    client: IpAddr,
    body_max: u64,
    ticket: &Ticket,
) -> Result<Vec<u8>, Problem> {
    let (parts, body) = request.into_parts();
    let body = whole(body, body_max, ticket).await?;
    let content_type = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let mut env = vec![
        ("GATEWAY_INTERFACE", "CGI/1.1".to_owned()),
        ("SERVER_PROTOCOL", format!("{:?}", parts.version)),
        ("REQUEST_METHOD", parts.method.to_string()),
        ("PATH_INFO", parts.uri.path().to_owned()),
        ("QUERY_STRING", parts.uri.query().unwrap_or_default().to_owned()),
        ("REMOTE_ADDR", client.to_string()),
        ("CONTENT_LENGTH", body.len().to_string()),
    ];
    env.extend(content_type.map(|kind| ("CONTENT_TYPE", kind.to_owned())));

    let _place = place(server, ticket).await?;
    let setup = &server.worker.setup;
    let output = Arc::new(Output {
        lines: server.worker.lines.clone(),
        max: config.stdout_max.as_usize(),
        printed: Mutex::default(),
    });
    let mut setup = Setup { stdio: Stdio::Piped(body, output.clone()), ..(**setup).clone() };
    setup.args.extend(config.args.iter().cloned());
    // what its own settings say comes after, and wins
    let settings = std::mem::take(&mut setup.grants.env);
    setup.grants.env = env.into_iter().map(|(name, value)| (name.into(), value)).chain(settings).collect();
    let setup = Arc::new(setup);
    let ran = timed(server, ticket.deadline(), async {
        let outcome = server.worker.sandbox.run(&setup).await;
        match outcome.end {
            End::Exited { code } => Ok(code),
            _ => Err(outcome),
        }
    });
    let code = ran.await.map_err(|outcome| {
        ticket.failed(&outcome);
        Problem::of(&outcome)
    })?;
    let failed = |kind, message: String| Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, kind, message));
    let printed = std::mem::take(&mut *output.printed());
    match printed {
        _ if code != 0 => failed("exited", format!("the guest exited with code {code}")),
        Printed { is_cut: true, .. } => failed("limit", format!("the guest printed more than {}", config.stdout_max)),
        Printed { bytes, .. } => Ok(bytes),
    }
}

/// What a run prints: standard output for the client, standard error for the log.
struct Output {
    lines: Arc<dyn OutputSink>,
    max: usize,
    printed: Mutex<Printed>,
}

#[derive(Default)]
struct Printed {
    bytes: Vec<u8>,
    is_cut: bool,
}

impl Output {
    fn printed(&self) -> MutexGuard<'_, Printed> {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OutputSink for Output {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        if stream == Stream::Stderr {
            return self.lines.write(stream, bytes);
        }
        let mut printed = self.printed();
        let room = self.max - printed.bytes.len();
        printed.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
        printed.is_cut |= bytes.len() > room;
    }
}
