//! What wrun could not do, sorted by who must act, and the exit codes that say so.
//!
//! A guest that fails is no error: that is an [`Outcome`].

use std::{io, net::SocketAddr};

use crate::{
    message::MessageError,
    outcome::{End, Outcome, Stage},
    sandbox::LoadError,
};

/// Why wrun could not do what was asked.
///
/// The text is one line, lower case, without a full stop; [`Error::hint`] says what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense as it is: the caller must change it.
    #[error("{0}")]
    Usage(String),
    /// The guest cannot be run: its author, or whoever chose it, must act.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A text is not a message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The machine refused something.
    #[error("could not {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The port could not be taken.
    #[error("could not listen on `{address}`: {source}")]
    Listen {
        /// Which port.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The new version of a guest was not taken; the old one goes on.
    #[error("the reload was given up: {0}")]
    Reload(String),
    /// Every worker died too often.
    #[error("every worker failed; the last one {last}")]
    PoolFailed {
        /// How the last worker ended.
        last: Outcome,
    },
    /// The pool is stopping or has stopped.
    #[error("the pool is stopped")]
    Stopped,
}

impl Error {
    /// For `map_err`: what was tried when the machine refused.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// A pool whose guest cannot be loaded says so instead of counting its workers.
    pub(crate) fn of_pool(self) -> Self {
        match self {
            Self::PoolFailed { last: Outcome { end: End::Failed { stage, reason, hint }, .. } }
                if stage.is_hopeless() =>
            {
                LoadError::Reported { stage, reason, hint }.into()
            }
            other => other,
        }
    }

    /// What to do next, when there is something to say.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Load(error) => error.hint(),
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => Some("another program listens there; choose a port with --listen".into()),
                io::ErrorKind::PermissionDenied => {
                    Some("ports below 1024 are for the privileged: choose one above, behind a proxy".into())
                }
                _ => None,
            },
            Self::PoolFailed { .. } => Some("the events above say how each worker ended".into()),
            _ => None,
        }
    }

    /// The exit code of a `wrun` command that ends with this error, see [`ExitCode`].
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) | Self::Message(_) | Self::Load(LoadError::Grant(_)) => ExitCode::Usage,
            Self::Load(LoadError::NotFound { .. }) => ExitCode::NoSuchGuest,
            Self::Load(LoadError::Reported { stage: Stage::Jail, .. }) => ExitCode::Cannot,
            Self::Load(_) => ExitCode::NotRunnable,
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => ExitCode::AddressInUse,
            Self::Io { .. } | Self::Listen { .. } | Self::Reload(_) | Self::Stopped => ExitCode::Cannot,
            Self::PoolFailed { .. } => ExitCode::PoolFailed,
        }
    }
}

/// The exit codes that are wrun's own; a guest's come from [`End::exit_code`](crate::outcome::End::exit_code).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// Every worker failed.
    PoolFailed = 70,
    /// The address to listen on is in use.
    AddressInUse = 98,
    /// A limit that has no code of its own, or what was said to a guest or by it is no message.
    Limit = 123,
    /// wrun could not do it: the machine refused.
    Cannot = 125,
    /// The guest is not runnable.
    NotRunnable = 126,
    /// There is no such guest.
    NoSuchGuest = 127,
}
