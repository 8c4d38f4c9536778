//! A run as workflow commands of GitHub Actions, which it shows beside the job file.

use crate::mode::ci::record::{JobRecord, RunRecord, Status};

/// GitHub shows so many of each kind for a step.
const MOST: usize = 10;
/// The most characters of a message.
const MESSAGE_MAX: usize = 1000;
/// The most characters of a title, of which GitHub shows one line.
const TITLE_MAX: usize = 200;

/// Gives the commands: an error for each failure, and a warning for each flaky job.
#[must_use]
pub fn annotations(run: &RunRecord) -> Vec<String> {
    let errors = run.jobs.iter().filter(|job| job.is_failure()).map(|job| {
        let reason = job.reason.as_deref().unwrap_or(job.status.word());
        (job, reason.to_owned())
    });
    let warnings = run.jobs.iter().filter(|job| job.status == Status::Flaky).map(|job| {
        let before = job.attempts.iter().rev().find(|attempt| attempt.status.is_bad());
        let reason = before.map(|attempt| attempt.reason.as_deref().unwrap_or(attempt.status.word()));
        let count = job.attempts.len();
        (job, format!("passed at attempt {count}; before that: {}", reason.unwrap_or("not known")))
    });
    let mut lines = commands("error", run, &errors.collect::<Vec<_>>());
    lines.extend(commands("warning", run, &warnings.collect::<Vec<_>>()));
    lines
}

fn commands(kind: &str, run: &RunRecord, found: &[(&JobRecord, String)]) -> Vec<String> {
    let file = escape_property(&printable(&run.file, MESSAGE_MAX));
    // The last is kept for the count when not all can be shown.
    let shown = if found.len() > MOST { MOST - 1 } else { found.len() };
    let commands = found[..shown].iter().map(|(job, message)| {
        let title = escape_property(&printable(&format!("{}: {}", job.job, job.status.word()), TITLE_MAX));
        let message = escape_data(&printable(message, MESSAGE_MAX));
        format!("::{kind} title={title},file={file},line={}::{message}", job.line)
    });
    let mut commands: Vec<_> = commands.collect();
    if shown < found.len() {
        let title = escape_property(&printable(&run.name, TITLE_MAX));
        commands.push(format!("::{kind} title={title},file={file}::and {} more", found.len() - shown));
    }
    commands
}

/// Makes text safe as the message of a command: it stays one line, and means itself.
pub(super) fn escape_data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// Makes text safe as a property of a command.
fn escape_property(text: &str) -> String {
    escape_data(text).replace(':', "%3A").replace(',', "%2C")
}

/// Removes control characters other than ends of lines, and cuts what is too long.
fn printable(text: &str, max: usize) -> String {
    let text = text.chars().map(|c| if c == '\t' { ' ' } else { c });
    let mut chars = text.filter(|c| matches!(c, '\n' | '\r') || !c.is_control());
    let mut start: String = chars.by_ref().take(max).collect();
    if chars.next().is_some() {
        start.pop();
        start.push('…');
    }
    start
}

#[cfg(test)]
mod tests {
    use super::super::sample::{HOSTILE, all, job, run};
    use super::*;

    #[test]
    fn every_status_has_its_command() {
        let lines = annotations(&all());
        for status in Status::ALL {
            let word = status.word();
            let of = |kind| format!("::{kind} title={word}%3A {word},file=wrun.toml,line=7::");
            let wanted = match status {
                Status::Pass | Status::Skipped | Status::Cancelled => {
                    assert!(!lines.iter().any(|line| line.contains(&format!("title={word}"))), "{word}");
                    continue;
                }
                Status::Flaky => of("warning") + "passed at attempt 3; before that: because 2",
                _ => of("error") + &format!("why {word}"),
            };
            assert!(lines.contains(&wanted), "{word}: {lines:?}");
        }
        assert_eq!(lines.len(), 10);
    }

    #[test]
    fn what_may_fail_is_no_error() {
        let mut may = job("a", Status::Fail);
        may.allow_failure = true;
        assert!(annotations(&run(vec![may])).is_empty());
    }

    #[test]
    fn at_most_ten_of_a_kind() {
        for (status, kind) in [(Status::Fail, "error"), (Status::Flaky, "warning")] {
            let of = |count| annotations(&run(vec![job("a", status); count]));
            assert_eq!(of(10).len(), 10);
            assert!(!of(10).iter().any(|line| line.ends_with("more")));
            let lines = of(11);
            assert_eq!(lines.len(), 10);
            assert_eq!(lines[9], format!("::{kind} title=ci,file=wrun.toml::and 2 more"));
            assert!(lines[8].contains("line=7::"));
        }
    }

    #[test]
    fn hostile_text_stays_in_its_place() {
        let mut bad = job(HOSTILE, Status::Fail);
        bad.reason = Some(HOSTILE.into());
        let mut run = run(vec![bad]);
        run.file = "a,line=1::x\n.toml".into();
        let lines = annotations(&run);
        assert_eq!(lines.len(), 1);
        let line = &lines[0];
        assert!(!line.contains(char::is_control), "{line:?}");
        let (properties, message) =
            line.strip_prefix("::error ").expect("an error").split_once("::").expect("a message");
        assert_eq!(properties.split(',').count(), 3, "{properties}");
        assert!(properties.contains(",file=a%2Cline=1%3A%3Ax%0A.toml,line=7"), "{properties}");
        assert!(message.starts_with("x]]>[31mred]0;%0A::error::x%0D|`@octocat`"), "{message}");
        assert!(message.ends_with("\\|%25"), "{message}");
    }

    #[test]
    fn messages_are_cut_at_their_limit() {
        let message = |length| {
            let mut bad = job("a", Status::Fail);
            bad.reason = Some("%".repeat(length));
            annotations(&run(vec![bad]))[0].rsplit_once("::").expect("a message").1.replace("%25", "%")
        };
        assert_eq!(message(1000), "%".repeat(1000));
        assert_eq!(message(1001), "%".repeat(999) + "…");
    }

    #[test]
    fn data_is_escaped_once() {
        assert_eq!(escape_data("%0A\r\n:,"), "%250A%0D%0A:,");
    }
}
