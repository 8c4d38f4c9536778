//! Signals by their names.

use std::{
    fmt, io,
    str::FromStr,
    task::{Context, Poll},
};

use rustix::process::Signal as Raw;
use tokio::signal::unix::{Signal as Listener, SignalKind, signal as listen};

/// A signal that a process can be sent, written `SIGTERM`, `TERM` or `15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signal(i32);

/// Every signal of Linux that has a name of its own.
const NAMES: [(Raw, &str); 31] = [
    (Raw::HUP, "SIGHUP"),
    (Raw::INT, "SIGINT"),
    (Raw::QUIT, "SIGQUIT"),
    (Raw::ILL, "SIGILL"),
    (Raw::TRAP, "SIGTRAP"),
    (Raw::ABORT, "SIGABRT"),
    (Raw::BUS, "SIGBUS"),
    (Raw::FPE, "SIGFPE"),
    (Raw::KILL, "SIGKILL"),
    (Raw::USR1, "SIGUSR1"),
    (Raw::SEGV, "SIGSEGV"),
    (Raw::USR2, "SIGUSR2"),
    (Raw::PIPE, "SIGPIPE"),
    (Raw::ALARM, "SIGALRM"),
    (Raw::TERM, "SIGTERM"),
    (Raw::STKFLT, "SIGSTKFLT"),
    (Raw::CHILD, "SIGCHLD"),
    (Raw::CONT, "SIGCONT"),
    (Raw::STOP, "SIGSTOP"),
    (Raw::TSTP, "SIGTSTP"),
    (Raw::TTIN, "SIGTTIN"),
    (Raw::TTOU, "SIGTTOU"),
    (Raw::URG, "SIGURG"),
    (Raw::XCPU, "SIGXCPU"),
    (Raw::XFSZ, "SIGXFSZ"),
    (Raw::VTALARM, "SIGVTALRM"),
    (Raw::PROF, "SIGPROF"),
    (Raw::WINCH, "SIGWINCH"),
    (Raw::IO, "SIGIO"),
    (Raw::POWER, "SIGPWR"),
    (Raw::SYS, "SIGSYS"),
];

impl Signal {
    /// Ends a process, and cannot be refused.
    pub const KILL: Self = Self(Raw::KILL.as_raw());
    /// Asks a process to end.
    pub const TERM: Self = Self(Raw::TERM.as_raw());
    /// What Ctrl-C sends.
    pub const INT: Self = Self(Raw::INT.as_raw());
    /// What a terminal sends that is closed.
    pub const HUP: Self = Self(Raw::HUP.as_raw());
    /// What Ctrl-\ sends.
    pub const QUIT: Self = Self(Raw::QUIT.as_raw());
    /// What a program in a pipe gets whose reader is gone. A guest's process does not feel it: its guest gets an error.
    pub const PIPE: Self = Self(Raw::PIPE.as_raw());
    /// Stops a process until it is told to go on.
    pub const STOP: Self = Self(Raw::STOP.as_raw());
    /// Lets a stopped process go on.
    pub const CONT: Self = Self(Raw::CONT.as_raw());

    /// The signal with this number; none when no signal has it.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        NAMES.iter().any(|(raw, _)| raw.as_raw() == number).then_some(Self(number))
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }

    /// Its name, such as `SIGTERM`.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(raw, _)| raw.as_raw() == self.0).map_or("", |(_, name)| name)
    }
}

impl FromStr for Signal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_ascii_uppercase();
        let is_named = |known: &str| known == upper || known["SIG".len()..] == upper;
        let by_name = NAMES.iter().find(|(_, known)| is_named(known)).map(|(raw, _)| Self(raw.as_raw()));
        by_name
            .or_else(|| Self::from_number(text.parse().ok()?))
            .ok_or_else(|| format!("expected a signal such as `SIGTERM`, `KILL` or `15`, found `{text}`"))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Those that ask a command to end, while it listens.
pub(crate) struct Signals {
    interrupt: Listener,
    terminate: Listener,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// The next one that comes.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        for (signal, kind) in
            [(&mut self.interrupt, SignalKind::interrupt()), (&mut self.terminate, SignalKind::terminate())]
        {
            if let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                return Poll::Ready(kind.as_raw_value());
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_and_written() {
        for text in ["SIGTERM", "term", "15"] {
            assert_eq!(text.parse(), Ok(Signal::TERM), "{text}");
        }
        for (raw, name) in NAMES {
            let signal: Signal = name.parse().expect(name);
            assert_eq!((signal.number(), signal.to_string()), (raw.as_raw(), name.to_owned()));
            // that it is one the system knows shows when it is sent
            assert!(Raw::from_named_raw(signal.number()).is_some(), "{name}");
        }
        for text in ["", "SIG", "0", "-9", "64", "SIGNOTHING", "9 "] {
            assert!(text.parse::<Signal>().is_err(), "{text}");
        }
    }
}
