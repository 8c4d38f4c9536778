//! What `wrun ci` prints: lines for people on standard output, a bar on a terminal's standard error.
//!
//! What guests print is shown behind a prefix, so that it can never begin a line: a runner of CI jobs takes lines that begin
//! with its own marks for orders.

use std::{
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use wrun::ci::{Attempt, Done, Event, JobRecord, RunRecord, Show, Status, StreamRecord, annotations, log_tail};

use super::Clean;
use crate::cli::{Color, ProgressMode};

/// How many lines of a log are shown.
const LINES: usize = 20;

/// In what it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    None,
    GitHub,
    GitLab,
}

impl Host {
    fn of_environment() -> Self {
        let is = |name: &str| env::var_os(name).is_some_and(|value| value == "true");
        match () {
            () if is("GITHUB_ACTIONS") => Self::GitHub,
            () if is("GITLAB_CI") => Self::GitLab,
            () => Self::None,
        }
    }
}

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Out {
    Stdout,
    /// Standard output is for JSON.
    Stderr,
    /// Nobody reads them any more.
    Nowhere,
}

/// Prints a run.
pub(crate) struct CiPrinter {
    host: Host,
    color: bool,
    show: Show,
    /// Whether jobs that are well are told of.
    lines: bool,
    out: Out,
    bar: ProgressBar,
    artifacts: PathBuf,
    /// How a job is run again.
    rerun: String,
}

impl CiPrinter {
    /// For a run of a job file, whose artifacts go to that folder.
    pub(crate) fn new(
        (color, progress): (Color, ProgressMode),
        (show, aside): (Show, bool),
        artifacts: &Path,
        file: &Path,
    ) -> Self {
        let is_ci = env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
        let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
        let has_bar = match progress {
            ProgressMode::Auto => io::stderr().is_terminal() && !is_ci && !is_dumb,
            ProgressMode::Bar => true,
            ProgressMode::Plain | ProgressMode::None => false,
        };
        let bar = if has_bar {
            let style =
                ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed_precise} {msg}").expect("a template");
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
        } else {
            ProgressBar::hidden()
        };
        let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto if is_set("NO_COLOR") => false,
            Color::Auto if is_set("CLICOLOR_FORCE") => true,
            Color::Auto => !is_dumb && if aside { io::stderr().is_terminal() } else { io::stdout().is_terminal() },
        };
        Self {
            host: Host::of_environment(),
            color,
            show,
            lines: progress != ProgressMode::None,
            out: if aside { Out::Stderr } else { Out::Stdout },
            bar,
            artifacts: artifacts.to_owned(),
            rerun: format!(" -f {}", quoted(&file.display().to_string())),
        }
    }

    /// Prints text of whole lines. Who does not read it any more still gets all reports.
    fn print(&mut self, text: &str) {
        let written = self.bar.suspend(|| match self.out {
            Out::Stdout => io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()),
            Out::Stderr => io::stderr().write_all(text.as_bytes()),
            Out::Nowhere => Ok(()),
        });
        if written.is_err() {
            self.out = Out::Nowhere;
        }
    }

    /// A line whose first word says how something ended.
    fn line(&mut self, word: &str, status: Status, rest: &str) {
        let color = match status {
            Status::Pass => "32;1",
            Status::Flaky | Status::Skipped | Status::Cancelled => "33;1",
            _ => "31;1",
        };
        let word = format!("{word:>12}");
        let word = if self.color { format!("\u{1b}[{color}m{word}\u{1b}[0m") } else { word };
        self.print(&format!("{word} {rest}\n"));
    }

    /// Something has happened.
    pub(crate) fn tell(&mut self, event: &Event) {
        match event {
            Event::RunStart(run) => {
                let unselected = match run.unselected {
                    0 => String::new(),
                    n => format!(" ({n} not selected)"),
                };
                let (jobs, slots, id) = (run.jobs.len(), run.times.slots, &run.run);
                let plural = if jobs == 1 { "" } else { "s" };
                let slots = format!("{slots} slot{}", if slots == 1 { "" } else { "s" });
                self.bar.set_length(jobs as u64);
                self.line("Starting", Status::Pass, &format!("{jobs} job{plural}{unselected} on {slots}, run {id}"));
            }
            Event::Start { job, .. } => self.bar.set_message(Clean(job).to_string()),
            Event::Slow { job, after_ms, .. } => {
                let rest = format!("[>{:>8.3}s                     ] {}", seconds(*after_ms), Clean(job));
                self.line("SLOW", Status::Flaky, &rest);
            }
            Event::Attempt { job, attempt, .. } => {
                let word = format!("TRY {} {}", attempt.attempt, upper(attempt.status));
                let rest = format!("{} {}{}", stats(Some(attempt)), Clean(job), because(attempt.reason.as_ref()));
                self.line(&word, attempt.status, &rest);
            }
            Event::End(job) => {
                self.bar.inc(1);
                self.end(job);
            }
            Event::Warning { message } => self.line("WARNING", Status::Flaky, &Clean(message).to_string()),
            _ => {}
        }
    }

    fn end(&mut self, job: &JobRecord) {
        if !self.lines && !job.status.is_bad() {
            return;
        }
        let word = match job.status {
            Status::Flaky => format!("FLAKY {}/{}", job.attempts.len(), job.tries),
            status => upper(status),
        };
        let allowed = if job.status.is_bad() && job.allow_failure { " (allowed to fail)" } else { "" };
        let rest = format!("{} {}{}{allowed}", stats(job.last()), Clean(&job.job), because(job.reason.as_ref()));
        self.line(&word, job.status, &rest);
        if self.show == Show::Always {
            self.output(job);
        }
    }

    /// All is over.
    pub(crate) fn done(&mut self, done: &Done) {
        self.bar.finish_and_clear();
        let run = &done.record;
        let show = self.show;
        let shown = run.jobs.iter().filter(|job| match show {
            Show::Failure => job.status.is_bad(),
            Show::Final => true,
            Show::Always | Show::Never => false,
        });
        for job in shown {
            self.output(job);
        }
        self.summary(run);
        if self.host == Host::GitHub {
            for line in annotations(run) {
                self.print(&format!("{line}\n"));
            }
        }
    }

    fn summary(&mut self, run: &RunRecord) {
        let status = if run.exit == 0 { Status::Pass } else { Status::Fail };
        let jobs = run.jobs.len();
        let plural = if jobs == 1 { "" } else { "s" };
        let ended = run.ended.as_ref().map_or_else(String::new, |ended| format!("; {}", Clean(ended)));
        let rest = format!(
            "[{:>8.3}s                     ] {jobs} job{plural}: {}{ended}",
            seconds(run.times.wall_ms),
            run.counts().words()
        );
        self.print(&format!("{}\n", "-".repeat(12)));
        self.line("Summary", status, &rest);
        for job in run.jobs.iter().filter(|job| job.status.is_bad()) {
            let name = quoted(&job.job);
            let rest = format!("{} | rerun: wrun ci {}{}", Clean(&job.job), Clean(&name), Clean(&self.rerun));
            self.line(&upper(job.status), job.status, &rest);
        }
    }

    /// The last lines of what a job printed.
    fn output(&mut self, job: &JobRecord) {
        let Some(last) = job.last() else { return };
        let mut text = String::new();
        for line in &last.backtrace {
            let _ = writeln!(text, "    | {}", Clean(line));
        }
        for (name, stream) in [("stdout", &last.stdout), ("stderr", &last.stderr)] {
            self.stream(&mut text, name, job, stream);
        }
        if text.is_empty() {
            return;
        }
        let job = Clean(&job.job).to_string();
        let text = match self.host {
            Host::None => text,
            Host::GitHub => {
                // nobody who does not know this word can end what it begins
                let token = token();
                format!("::group::output of {job}\n::stop-commands::{token}\n{text}::{token}::\n::endgroup::\n")
            }
            Host::GitLab => {
                let section: String = job.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
                format!(
                    "\u{1b}[0Ksection_start:{now}:{section}\r\u{1b}[0Koutput of {job}\n{text}\u{1b}[0Ksection_end:{now}:{section}\r\u{1b}[0K\n"
                )
            }
        };
        self.print(&text);
    }

    fn stream(&self, text: &mut String, name: &str, job: &JobRecord, stream: &StreamRecord) {
        let Some(log) = &stream.log else { return };
        let path = self.artifacts.join(log);
        let tail = log_tail(&path);
        let lines: Vec<&str> = tail.lines().collect();
        let shown = &lines[lines.len().saturating_sub(LINES)..];
        let cut = if stream.lines > shown.len() as u64 {
            format!(" (last {} of {} lines; full: {})", shown.len(), stream.lines, path.display())
        } else {
            String::new()
        };
        let _ = writeln!(text, "--- {name}: {}{} ---", Clean(&job.job), Clean(&cut));
        for line in shown {
            let _ = writeln!(text, "    | {}", Clean(line));
        }
    }
}

fn upper(status: Status) -> String {
    status.word().to_ascii_uppercase()
}

fn because(reason: Option<&String>) -> String {
    reason.map_or_else(String::new, |reason| format!(": {}", Clean(reason)))
}

fn seconds(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

/// `[   0.012s  1.20 Mfuel   2.1 MiB]`, as wide whatever is known.
fn stats(attempt: Option<&Attempt>) -> String {
    let Some(attempt) = attempt else { return format!("[{:31}]", "") };
    let fuel = attempt.fuel.map_or_else(|| "-".into(), fuel);
    let memory = attempt.memory_peak.map_or_else(|| "-".into(), |bytes| format!("{} MiB", decimal(bytes, 1 << 20)));
    format!("[{:>9.3}s {fuel:>12} {memory:>9}]", seconds(attempt.times.wall_ms)).replacen("[ ", "[", 1)
}

/// `812 fuel`, `4.21 kfuel`, `1.20 Mfuel`.
fn fuel(used: u64) -> String {
    match used {
        0..1_000 => format!("{used} fuel"),
        1_000..1_000_000 => format!("{} kfuel", decimal(used, 1_000)),
        1_000_000..1_000_000_000 => format!("{} Mfuel", decimal(used, 1_000_000)),
        _ => format!("{} Gfuel", decimal(used, 1_000_000_000)),
    }
}

/// A part of a number with two digits after the point, or one of a large one.
fn decimal(number: u64, unit: u64) -> String {
    let hundredths = u128::from(number) * 100 / u128::from(unit);
    if hundredths >= 10_000 {
        return format!("{}.{}", hundredths / 100, hundredths % 100 / 10);
    }
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// A word that nobody can know.
fn token() -> String {
    let mut bytes = [0; 16];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("{:032x}", u128::from_le_bytes(bytes))
}

/// As a shell takes it for one word.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@+".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.into()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_places() {
        assert_eq!(decimal(1_200_000, 1_000_000), "1.20");
        assert_eq!(decimal(0, 1 << 20), "0.00");
        assert_eq!(decimal(123_456_789, 1_000_000), "123.4");
        assert_eq!(decimal(u64::MAX, 1), "18446744073709551615.0");
        assert_eq!([fuel(999), fuel(1_200_000), fuel(2_000_000_000)], ["999 fuel", "1.20 Mfuel", "2.00 Gfuel"]);
        assert_eq!(quoted("unit (case=a)"), "'unit (case=a)'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted("a-b"), "a-b");
        assert_ne!(token(), token());
    }
}
