//! A child that runs one command guest, with the standard streams that it was given.

use std::{
    os::{
        fd::{IntoRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{enter, exit_with_primary};
use crate::{
    grant::{Denied, Grants},
    limits::Limits,
    outcome::{Outcome, Usage},
    process::{
        Jail,
        child::{Out, Start, report_panics},
        wire::Kind,
    },
    sandbox::{Code, EngineSpec, Inspection, LoadError, Mapped, Network, Roots, Setup, Shape},
};

/// What a command is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CommandConfig {
    /// How its engine is made.
    pub(crate) engine: EngineSpec,
    /// What its guest is.
    pub(crate) inspection: Inspection,
    /// What the guest may touch.
    pub(crate) grants: Grants,
    /// Who vouches for the servers that it sends requests to.
    pub(crate) roots: Roots,
    /// What bounds it. The primary watches the clock.
    pub(crate) limits: Limits,
    /// Its arguments, its own name first.
    pub(crate) args: Vec<String>,
    /// What its process may do.
    pub(crate) jail: Jail,
}

/// The child. Its code comes on the first descriptor, its standard streams on those after it, and last, when a name is
/// granted, the line to who looks names up.
pub(super) fn main(start: Start) -> i32 {
    let Start { socket, hello, fds, .. } = start;
    let Ok(out) = socket.try_clone().map(Out::new) else { return 125 };
    // lives as long as the process
    let out: &'static Out = Box::leak(Box::new(out));
    report_panics(out);
    // descriptor 0 becomes the guest's
    let _ = socket.into_raw_fd();
    let outcome = run(out, hello.config.get(), fds).unwrap_or_else(|error| error.end().with(Usage::default()));
    out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
    out.finish();
    outcome.end.exit_code().into()
}

fn run(out: &'static Out, config: &str, fds: Vec<OwnedFd>) -> Result<Outcome, LoadError> {
    let broken = |reason: String| LoadError::Invalid { reason };
    let config: CommandConfig = serde_json::from_str(config).map_err(|error| broken(error.to_string()))?;
    let mut fds = fds.into_iter().skip(1);
    let (Some(code), Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next(), fds.next()) else {
        return Err(broken("the command got no code or no standard streams".into()));
    };
    let names = fds.next().map(UnixStream::from);
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .map_err(|error| broken(error.to_string()))?;

    let code = Code::checked(code.into(), config.inspection);
    let tell = |denied: Denied| {
        out.push(Kind::Denied, 0, &serde_json::to_vec(&denied).expect("plain data has a JSON form"));
        // what does not go now goes later
        let _ = out.flush();
    };
    let (mapped, runtime, network) = enter(&config.jail, out, || {
        let engine = config.engine.engine().map_err(|error| broken(format!("{error:#}")))?;
        // the runtime makes sockets for itself
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let network = Network::prepare(&config.grants, names, &config.roots, tell);
        Ok((Mapped::of(engine, &code)?, runtime.map_err(|error| broken(error.to_string()))?, network))
    })?;
    // what is missing is told of before the guest prints
    out.finish();
    exit_with_primary(out).map_err(|error| broken(error.to_string()))?;
    let sandbox = mapped.link(&code.inspection, Shape::Command)?;
    let setup = Setup::of_command(config.grants, config.limits, config.args, true);
    let setup = Arc::new(Setup { network: Arc::new(network), ..setup });
    let outcome = runtime.block_on(sandbox.run(&setup));
    // a thread may still sit in a read of standard input: nobody waits for it
    runtime.shutdown_background();
    Ok(outcome)
}
