//! The only code that prints: lines for people, JSON lines for tools.
//!
//! What comes from a guest is hostile text: control characters are escaped before a terminal sees them.

#![expect(clippy::print_stderr, reason = "this is the place that prints")]

mod ci;

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, UNIX_EPOCH},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::json;
use wrun::{
    Error, Failed, Report, ci as ci_mode,
    doctor::{Checkup, Guard, Verdict},
    event::{AccessRecord, Event, Stream},
    grant::Denied,
    limits::Bytes,
    outcome::{Answer, End, Outcome},
    watch,
};

pub(crate) use self::ci::CiPrinter;
use crate::cli::LogFormat;

/// Lets what wrun's parts warn of, or with `verbose` all they tell, be seen on standard error.
pub(crate) fn log_to_stderr(format: LogFormat, verbose: bool) {
    let level = if verbose { tracing::Level::DEBUG } else { tracing::Level::WARN };
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_ansi(false).without_time();
    match format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
}

/// Prints about a command while it runs and when it ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    pub(crate) format: LogFormat,
}

impl Printer {
    /// What wrun could not do.
    pub(crate) fn error(self, error: &Error) {
        match self.format {
            LogFormat::Json => {
                self.log_line(&json!({"event": "error", "message": error.to_string(), "hint": error.hint()}));
            }
            LogFormat::Text => {
                let mut text = format!("wrun: error: {}\n", Clean(&error.to_string()));
                if let Some(hint) = error.hint() {
                    let _ = writeln!(text, "hint: {}", Clean(&hint));
                }
                print_error(&text);
            }
        }
    }

    /// Why no job was run.
    pub(crate) fn ci_error(self, error: &ci_mode::Error) {
        let hint = if let ci_mode::Error::Cannot(error) = error { error.hint() } else { None };
        match self.format {
            LogFormat::Json => {
                self.log_line(&json!({"event": "error", "message": error.to_string(), "hint": hint}));
            }
            LogFormat::Text => {
                let hint = hint.map_or_else(String::new, |hint| format!("hint: {}\n", Clean(&hint)));
                print_error(&format!("wrun: error: {}\n{hint}", Lines(&error.to_string())));
            }
        }
    }

    /// What a guest in the foreground was refused.
    pub(crate) fn denied(self, denied: &Denied) {
        match self.format {
            LogFormat::Json => {
                let Denied { grant, reason } = denied;
                self.log_line(&json!({"event": "denied", "grant": grant, "reason": reason}));
            }
            LogFormat::Text => print_error(&format!("wrun: refused: {}\n", Clean(&denied.to_string()))),
        }
    }

    /// How a guest in the foreground ended; its own exit code needs no words.
    pub(crate) fn outcome(self, guest: &Path, outcome: &Outcome) {
        // as quiet as any program in a pipe whose reader has gone
        let quiet = matches!(&outcome.end, End::Exited { .. }) || outcome.end.exit_code() == 128 + 13;
        match self.format {
            _ if quiet => {}
            LogFormat::Json => self.log_line(outcome),
            LogFormat::Text => {
                let mut text = format!("wrun: `{}` {}\n", Clean(&guest.to_string_lossy()), Clean(&outcome.to_string()));
                if let End::Trapped { backtrace, .. } = &outcome.end {
                    for frame in backtrace {
                        let _ = writeln!(text, "    {}", Clean(frame));
                    }
                }
                print_error(&text);
            }
        }
    }

    /// Which chunk failed, and how.
    pub(crate) fn failed(self, guest: &Path, failed: &Failed) {
        match self.format {
            LogFormat::Json => self.log_line(failed),
            LogFormat::Text => {
                let guest = guest.to_string_lossy();
                let mut text = format!("wrun: `{}` {}\n", Clean(&guest), Clean(&failed.to_string()));
                if let Answer::Ended(Outcome { end: End::Trapped { backtrace, .. }, .. }) = &failed.answer {
                    for frame in backtrace {
                        let _ = writeln!(text, "    {}", Clean(frame));
                    }
                }
                print_error(&text);
            }
        }
    }

    /// Something that happened, as a line.
    fn event_line(self, event: &impl Tell) -> String {
        match self.format {
            LogFormat::Json => serde_json::to_string(event).expect("plain data has a JSON form") + "\n",
            LogFormat::Text => event.line(),
        }
    }

    /// One JSON object on standard error.
    #[expect(clippy::unused_self, reason = "reads like its siblings")]
    pub(crate) fn log_line(self, value: &impl Serialize) {
        print_error(&(serde_json::to_string(value).expect("plain data has a JSON form") + "\n"));
    }
}

/// How far a command has come, for a person who watches: on a terminal only.
#[derive(Clone)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn of(length: Bytes, printer: Printer) -> Self {
        if printer.format == LogFormat::Json {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(length.0);
        let style = "{bar:40} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
        Self(bar.with_style(ProgressStyle::with_template(style).expect("a template")))
    }

    /// Some more is done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Takes it away.
    pub(crate) fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// Events on their way to standard error. Whoever reads that may be slow, or stop; the pool must not stop with it, so a
/// thread of its own writes, and what does not fit into its buffer is counted instead.
pub(crate) struct EventLog {
    shared: Arc<(Mutex<Waiting>, Condvar)>,
    printer: Printer,
}

/// Lines that are to be written.
#[derive(Default)]
struct Waiting {
    text: String,
    dropped: u64,
    closed: bool,
}

/// How much text may wait.
const WAITING_MAX: usize = 4 << 20;

/// How long the last lines may take after the pool has ended.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Waits for the last lines of an [`EventLog`].
pub(crate) struct LastLines(mpsc::Receiver<()>);

impl EventLog {
    /// Starts the thread.
    ///
    /// It writes to standard error, or to the end of a file.
    ///
    /// # Errors
    /// When there is no room for another thread, or the file cannot be opened.
    pub(crate) fn start(printer: Printer, file: Option<&Path>) -> io::Result<(Self, LastLines)> {
        let file = file.map(|file| fs::File::options().append(true).create(true).open(file)).transpose()?;
        let shared = Arc::<(Mutex<Waiting>, Condvar)>::default();
        let (done, last) = mpsc::channel();
        let theirs = shared.clone();
        std::thread::Builder::new().name("wrun-log".into()).spawn(move || {
            Self::write_all(&theirs, file);
            let _ = done.send(());
        })?;
        Ok((Self { shared, printer }, LastLines(last)))
    }

    /// Takes an event, and never waits.
    pub(crate) fn tell(&self, event: &impl Tell) {
        let line = self.printer.event_line(event);
        let mut waiting = lock(&self.shared.0);
        if waiting.text.len() + line.len() > WAITING_MAX {
            waiting.dropped += 1;
            return;
        }
        if waiting.dropped > 0 {
            let message = format!("{} events were not printed, since standard error took no more", waiting.dropped);
            waiting.dropped = 0;
            waiting.text += &self.printer.event_line(&Event::Error { worker: None, message });
        }
        waiting.text += &line;
        drop(waiting);
        self.shared.1.notify_one();
    }

    fn write_all((waiting, news): &(Mutex<Waiting>, Condvar), mut file: Option<fs::File>) {
        loop {
            let mut waiting = lock(waiting);
            while waiting.text.is_empty() && !waiting.closed {
                waiting = news.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            if waiting.text.is_empty() {
                return;
            }
            let text = std::mem::take(&mut waiting.text);
            drop(waiting);
            match &mut file {
                None => print_error(&text),
                // a full disk: what does not fit is lost, and the pool goes on
                Some(file) => drop(file.write_all(text.as_bytes())),
            }
        }
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for EventLog {
    fn drop(&mut self) {
        lock(&self.shared.0).closed = true;
        self.shared.1.notify_one();
    }
}

impl LastLines {
    /// Waits until they are written, or nobody takes them.
    pub(crate) fn wait(self) {
        let _ = self.0.recv_timeout(LAST_LINES);
    }
}

/// What happens in a mode that goes on for a while.
pub(crate) trait Tell: Serialize {
    /// As a line for people, with its end; empty when there is nothing to say.
    fn line(&self) -> String;
}

impl Tell for Event {
    fn line(&self) -> String {
        event_line(self, None)
    }
}

impl Tell for watch::Event {
    fn line(&self) -> String {
        use watch::Event as E;
        let line = match self {
            // the line on standard output says it
            E::Listening { .. } => return String::new(),
            E::Starting { app, version } => format!("{app}: version {version} is started"),
            E::Live { app, version, took_ms, former: None } => {
                format!("{app}: version {version} is live after {took_ms} ms")
            }
            E::Live { app, version, took_ms, former: Some(former) } => {
                format!("{app}: version {version} is live after {took_ms} ms, in place of {former}")
            }
            E::Asleep { app, version } => format!("{app}: version {version} starts with the first request"),
            E::Refused { app, version, reason } => {
                let version = version.as_ref().map_or_else(String::new, |version| format!("version {version} "));
                format!("{app}: {version}is not taken: {}", Lines(reason))
            }
            E::RolledBack { app, version, to, reason } => {
                format!("{app}: version {version} crashed and {to} is started again: {}", Clean(reason))
            }
            E::Failed { app, version, reason } => format!("{app}: version {version} has failed: {}", Clean(reason)),
            E::Removed { app } => format!("{app}: is no longer served"),
            E::Ignored { file, reason } => format!("`{}` is ignored: {}", Clean(file), Clean(reason)),
            E::Error { message } => Clean(message).to_string(),
            E::Access { record } => {
                let version = record.version.as_ref().map_or_else(String::new, |version| format!("@{version}"));
                return access_line(&format!("{}{version}", record.app.as_deref().unwrap_or("-")), record);
            }
            E::Worker { app, version, event } => return event_line(event, Some((app, version))),
            E::Router { event, .. } => return event_line(event, Some(("router", ""))),
            other => format!("{other:?}"),
        };
        format!("wrun: {line}\n")
    }
}

/// Text of several lines that is ours but for what it quotes.
struct Lines<'a>(&'a str);

impl std::fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, line) in self.0.lines().enumerate() {
            if n > 0 {
                f.write_char('\n')?;
            }
            write!(f, "{}", Clean(line))?;
        }
        Ok(())
    }
}

/// An event as one line, perhaps of one of several pools.
fn event_line(event: &Event, of: Option<(&str, &str)>) -> String {
    let line = match event {
        Event::Fork { worker, pid, generation } => {
            format!("worker {worker}: started, pid {pid}, generation {generation}")
        }
        Event::Online { worker, start_ms, .. } => format!("worker {worker}: ready after {start_ms} ms"),
        Event::Message { worker, message } => format!("worker {worker}: sent {}", Clean(message.as_str())),
        Event::Output { worker, stream, line } => {
            let mark = match stream {
                Stream::Stdout => '|',
                Stream::Stderr => '!',
            };
            let of = of.map_or_else(String::new, |(app, _)| format!("{app} "));
            return format!("[{of}{worker}] {mark} {}\n", Clean(line));
        }
        Event::Drop { worker, bytes } => format!("worker {worker}: printed too much, {bytes} bytes dropped"),
        Event::Access { worker, record } => return access_line(&worker.to_string(), record),
        Event::Reload { took_ms, error: None } => format!("reloaded: all workers are new after {took_ms} ms"),
        Event::Reload { error: Some(error), .. } => {
            format!("the reload was given up, and the old workers go on: {}", Clean(error))
        }
        // the line on standard output says it
        Event::Listening { .. } => return String::new(),

        Event::Disconnect { worker } => format!("worker {worker}: draining"),
        Event::Exit { worker, tasks, outcome, .. } => {
            let why = if outcome.voluntary { ", as asked" } else { "" };
            format!("worker {worker}: {}{why}, after {tasks} tasks", Clean(&outcome.to_string()))
        }
        Event::Restart { worker, after_ms: 0, .. } => format!("worker {worker}: starting again"),
        Event::Restart { worker, after_ms, deaths } => {
            format!("worker {worker}: starting again in {after_ms} ms, after {deaths} deaths in a row")
        }
        Event::Failed { worker, outcome } => {
            format!(
                "worker {worker}: given up, no other is started in its place; at last it {}",
                Clean(&outcome.to_string())
            )
        }
        Event::Limit { worker, outcome } => format!("worker {worker}: a task {}", Clean(&outcome.to_string())),
        Event::Denied { worker, grant, reason } => {
            format!("worker {worker}: refused: {}; `{}` would allow it", Clean(reason), Clean(grant))
        }
        Event::Error { worker: Some(worker), message } => format!("worker {worker}: {}", Clean(message)),
        Event::Error { worker: None, message } => Clean(message).to_string(),
        other => format!("{other:?}"),
    };
    match of {
        None => format!("wrun: {line}\n"),
        Some((part, "")) => format!("wrun: {part}: {line}\n"),
        Some((app, version)) => format!("wrun: {app} {version}: {line}\n"),
    }
}

/// A request as one line, in the order of the common log format, with the time in UTC as RFC 3339:
/// `CLIENT - - [TIME] "METHOD TARGET PROTOCOL" STATUS BYTES "REFERER" "USER AGENT" MICROSECONDSus ID WORKER TRACEPARENT`
/// with `APP@VERSION` in place of the worker in a folder, and `"WHY"` when it was refused before it was a request.
fn access_line(worker: &str, record: &AccessRecord) -> String {
    let or_none = |text: &Option<String>| text.as_deref().map_or_else(|| "-".into(), quoted);
    let time = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(record.time_ms));
    let refused = record.refused.as_deref().map_or_else(String::new, |why| format!(" \"{}\"", quoted(why)));
    format!(
        "{} - - [{time}] \"{} {} {}\" {} {} \"{}\" \"{}\" {}us {} {worker} {}{refused}\n",
        record.client,
        quoted(&record.method),
        quoted(&record.target),
        quoted(&record.protocol),
        record.status,
        record.bytes,
        or_none(&record.referer),
        or_none(&record.user_agent),
        record.took_us,
        quoted(&record.id),
        or_none(&record.traceparent),
    )
}

/// Text that stands between quotes: it can neither end them nor the line.
fn quoted(text: &str) -> String {
    Clean(&text.replace('\\', "\\\\").replace('"', "\\\"")).to_string()
}

/// What of a folder would be served.
pub(crate) fn folder(found: &watch::Inspected, as_json: bool) {
    if as_json {
        return print(&(serde_json::to_string(found).expect("plain data has a JSON form") + "\n"));
    }
    let mut text = String::new();
    for watch::Found { name, version, at, refused, .. } in &found.apps {
        let at = at.as_deref().unwrap_or("-");
        let version = version.as_deref().unwrap_or("-");
        let _ = match refused {
            None => writeln!(text, "{name}: version {version} at {}", Clean(at)),
            Some(reason) => writeln!(text, "{name}: not served: {}", Lines(reason)),
        };
    }
    for (file, reason) in &found.ignored {
        let _ = writeln!(text, "{}: ignored: {}", Clean(file), Clean(reason));
    }
    print(&text);
}

/// The jobs that are selected.
pub(crate) fn jobs(jobs: &[ci_mode::Listed], as_json: bool) {
    if as_json {
        return print(&(serde_json::to_string(jobs).expect("plain data has a JSON form") + "\n"));
    }
    let mut text = String::new();
    for ci_mode::Listed { job, needs, tags, .. } in jobs {
        let needs = if needs.is_empty() { String::new() } else { format!("  needs {}", needs.join(", ")) };
        let tags = if tags.is_empty() { String::new() } else { format!("  tags {}", tags.join(", ")) };
        let _ = writeln!(text, "{}", Clean(&format!("{job}{needs}{tags}")));
    }
    print(&text);
}

/// What a guest is.
pub(crate) fn inspection(report: &Report, as_json: bool) {
    if as_json {
        print(&(serde_json::to_string(report).expect("plain data has a JSON form") + "\n"));
        return;
    }
    let found = &report.inspection;
    let or_none = |list: &[&str]| if list.is_empty() { "none".to_owned() } else { list.join(", ") };
    let mut text = String::new();
    let shape = found.shape.map_or_else(|| "nothing that wrun can run".to_owned(), |shape| shape.to_string());
    let _ = writeln!(text, "name      {}", Clean(&report.name));
    let _ = writeln!(text, "shape     {shape}");
    let _ = writeln!(text, "form      {}", found.form);
    let _ = writeln!(
        text,
        "size      {} bytes: code {} in {} functions, data {}",
        found.bytes, found.code_bytes, found.functions, found.data_bytes
    );
    let _ = writeln!(text, "memory    {} to start with", Bytes(found.memory_min));
    let _ = writeln!(text, "modes     {}", or_none(&report.modes));
    let _ = writeln!(text, "flags     {}", or_none(&report.flags));
    for (title, names) in [("imports", &found.imports), ("exports", &found.exports)] {
        for (n, name) in names.iter().enumerate() {
            let _ = writeln!(text, "{:<9} {}", if n == 0 { title } else { "" }, Clean(name));
        }
    }
    for refused in &report.refused {
        let _ = writeln!(text, "refused   {}: {}", Clean(&refused.import), refused.hint);
    }
    print(&text);
}

/// What stands between guests and this system.
pub(crate) fn checkup(found: &Checkup, as_json: bool) {
    if as_json {
        print(&(serde_json::to_string(found).expect("plain data has a JSON form") + "\n"));
        return;
    }
    let mut text = format!("kernel {}\n", Clean(&found.kernel));
    let mut guard = None;
    let mut checks: Vec<_> = found.checks.iter().collect();
    checks.sort_by_key(|check| check.guard as u8);
    for check in checks {
        if guard.replace(check.guard) != Some(check.guard) {
            let title = match check.guard {
                Guard::Landlock => "Landlock alone: files, ports, signals",
                Guard::Seccomp => "seccomp alone: the list of system calls",
                Guard::Privileges => "no privileges",
                Guard::Limits => "limits of a process",
                Guard::Start => "how a process is started",
                Guard::Namespaces => "namespaces of its own, where the system lets it",
            };
            let _ = writeln!(text, "\n{title}");
        }
        let verdict = match check.verdict {
            Verdict::Held => "held    ",
            Verdict::Failed => "FAILED  ",
            Verdict::Unproven => "unproven",
        };
        let _ = writeln!(text, "  {verdict}  {:<42} {}", check.what, Clean(&check.found));
    }
    let _ = match (&found.missing, found.jail) {
        (Some(missing), _) => writeln!(text, "\nmissing: {}; `--isolation jail` runs nothing here", Clean(missing)),
        (None, false) => writeln!(text, "\nnot every wall holds; `--isolation jail` should not be relied on here"),
        (None, true) => writeln!(text, "\nevery wall is up"),
    };
    print(&text);
}

/// One result line on standard output.
pub(crate) fn result(line: &str) {
    print(&format!("{line}\n"));
}

/// Prints to standard output; when nobody reads it, the program is done.
#[expect(clippy::exit, reason = "as SIGPIPE would, which Rust programs ignore")]
fn print(text: &str) {
    if let Err(error) = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        if error.kind() != io::ErrorKind::BrokenPipe {
            eprintln!("wrun: error: could not write to standard output: {error}");
        }
        std::process::exit(if error.kind() == io::ErrorKind::BrokenPipe { 141 } else { 125 });
    }
}

/// Prints to standard error in one write, so that lines of several processes do not mix; when it is closed, there is
/// nobody to tell.
fn print_error(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Text without control characters, and without the invisible ones that turn a line around.
struct Clean<'a>(&'a str);

impl std::fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '\t' => f.write_char(c)?,
                c if c.is_control() => write!(f, "{}", c.escape_default())?,
                '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {
                    write!(f, "{}", c.escape_unicode())?;
                }
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_escaped() {
        let text = "a\u{1b}[2Jb\rc\u{202e}d\u{0}é\t漢";
        assert_eq!(Clean(text).to_string(), "a\\u{1b}[2Jb\\rc\\u{202e}d\\u{0}é\t漢");
    }
}
