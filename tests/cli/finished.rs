//! A program that has ended, and what is expected of it.

use std::{fmt::Write as _, os::unix::process::ExitStatusExt as _, process::ExitStatus};

use rustix::process::Signal;
use serde_json::Value;

/// A program that has ended, and what it printed.
#[derive(Clone)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) command: String,
}

impl Finished {
    /// It ended with this exit code.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        let holds = self.status.code() == Some(code);
        self.check(holds, &format!("expected exit code {code}"))
    }

    /// It was ended by this signal.
    #[track_caller]
    pub(crate) fn killed_by(self, signal: Signal) -> Self {
        let holds = self.status.signal() == Some(signal.as_raw());
        self.check(holds, &format!("expected the end by {signal:?}"))
    }

    /// Exactly this is on standard output.
    #[track_caller]
    pub(crate) fn stdout(self, expected: impl AsRef<[u8]>) -> Self {
        let expected = expected.as_ref();
        let holds = self.stdout == expected;
        self.check(holds, &format!("expected on stdout: {}", shown(expected)))
    }

    /// So many bytes are on standard output.
    #[track_caller]
    pub(crate) fn stdout_is_long(self, expected: usize) -> Self {
        let holds = self.stdout.len() == expected;
        self.check(holds, &format!("expected so many bytes on stdout: {expected}"))
    }

    /// Exactly this is on standard error.
    #[track_caller]
    pub(crate) fn stderr(self, expected: impl AsRef<[u8]>) -> Self {
        let expected = expected.as_ref();
        let holds = self.stderr == expected;
        self.check(holds, &format!("expected on stderr: {}", shown(expected)))
    }

    /// This is somewhere on standard output.
    #[track_caller]
    pub(crate) fn stdout_has(self, text: &str) -> Self {
        let holds = self.stdout_text().contains(text);
        self.check(holds, &format!("expected somewhere on stdout: {text}"))
    }

    /// This is somewhere on standard error.
    #[track_caller]
    pub(crate) fn stderr_has(self, text: &str) -> Self {
        let holds = self.stderr_text().contains(text);
        self.check(holds, &format!("expected somewhere on stderr: {text}"))
    }

    /// Nothing is on standard output, and on standard error one line: wrun's own error with this text.
    #[track_caller]
    pub(crate) fn error(self, text: &str) -> Self {
        self.stdout("").stderr(format!("wrun: error: {text}\n"))
    }

    /// As [`Finished::error`], and a second line with a hint.
    #[track_caller]
    pub(crate) fn error_and_hint(self, text: &str, hint: &str) -> Self {
        self.stdout("").stderr(format!("wrun: error: {text}\nhint: {hint}\n"))
    }

    /// Standard output as text.
    pub(crate) fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub(crate) fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output is one JSON value: this one.
    #[track_caller]
    pub(crate) fn stdout_json(&self) -> Value {
        self.json(&self.stdout)
    }

    /// The last line of standard error is one JSON value: this one.
    #[track_caller]
    pub(crate) fn stderr_json(&self) -> Value {
        self.json(self.stderr_text().lines().last().unwrap_or_default().as_bytes())
    }

    #[track_caller]
    fn json(&self, text: &[u8]) -> Value {
        match serde_json::from_slice(text) {
            Ok(value) => value,
            Err(error) => panic!("expected JSON: {error}: {}\n{}", shown(text), self.transcript()),
        }
    }

    /// This holds; when it does not, the test fails with what was expected and what there was.
    #[track_caller]
    pub(crate) fn check(self, holds: bool, expected: &str) -> Self {
        assert!(holds, "{expected}\n{}", self.transcript());
        self
    }

    pub(crate) fn transcript(&self) -> String {
        transcript(&self.command, Some(self.status), &self.stdout, &self.stderr)
    }
}

pub(crate) fn transcript(command: &str, status: Option<ExitStatus>, stdout: &[u8], stderr: &[u8]) -> String {
    let mut text = format!("  command: {command}\n");
    let status = match status.map(|status| (status.code(), status.signal())) {
        None => "none: it was killed by the test".to_owned(),
        Some((Some(code), _)) => format!("code {code}"),
        Some((None, signal)) => format!("signal {signal:?}"),
    };
    let _ = writeln!(text, "  ended: {status}\n  stdout: {}\n  stderr: {}", shown(stdout), shown(stderr));
    text
}

/// As much of it as helps.
fn shown(bytes: &[u8]) -> String {
    const MAX: usize = 4 << 10;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX)]);
    match bytes.len() {
        0 => "nothing".into(),
        length if length > MAX => format!("{length} bytes:\n{text}\n  …"),
        _ => format!("\n{text}"),
    }
}
