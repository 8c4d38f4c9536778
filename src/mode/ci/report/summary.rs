//! A run as GitHub-flavoured Markdown, for the summary of a workflow's step.

use std::{cmp::Reverse, fmt::Write as _};

use crate::mode::ci::record::{JobRecord, RunRecord, Status};

/// The most bytes of a summary: GitHub refuses more than 1 MiB for a step.
pub(super) const SUMMARY_MAX: usize = 900 << 10;
/// Kept free for all that is no row: titles, heads of tables, counts.
const RESERVE: usize = 4 << 10;
/// The most characters of a name or a reason, so that one alone cannot fill the summary.
const CELL_MAX: usize = 1000;
/// How many of the slowest jobs are named.
const SLOWEST: usize = 5;

/// Gives a run as Markdown, failures first.
pub(super) fn summary(run: &RunRecord) -> String {
    render(run, SUMMARY_MAX)
}

fn render(run: &RunRecord, max: usize) -> String {
    let jobs = |wanted: &dyn Fn(&JobRecord) -> bool| run.jobs.iter().filter(|job| wanted(job)).collect::<Vec<_>>();
    let failures = jobs(&JobRecord::is_failure);
    let verdict = if failures.is_empty() && run.exit == 0 { "passed" } else { "failed" };
    let mut text = format!("## {} {verdict}\n\n{}\n", code(&run.name), run.counts().words());
    if let Some(ended) = &run.ended {
        let _ = write!(text, "\nNot all jobs ran: {}\n", code(ended));
    }
    table(&mut text, "Failures", &failures, max);
    table(&mut text, "Flaky", &jobs(&|job| job.status == Status::Flaky), max);
    table(&mut text, "Allowed to fail", &jobs(&|job| job.status.is_bad() && job.allow_failure), max);
    let mut slowest = jobs(&|job| !job.attempts.is_empty());
    slowest.sort_by_key(|job| Reverse(job.wall_ms()));
    slowest.truncate(SLOWEST);
    table(&mut text, "Slowest", &slowest, max);
    let counts = run.counts();
    let (skipped, cancelled) = (counts.get(Status::Skipped), counts.get(Status::Cancelled));
    let _ = write!(text, "\nSkipped: {skipped}. Cancelled: {cancelled}. Not selected: {}.\n", run.unselected);
    text
}

/// Adds a table of jobs, as long as there is room for its rows.
fn table(text: &mut String, title: &str, jobs: &[&JobRecord], max: usize) {
    if jobs.is_empty() {
        return;
    }
    let _ = write!(text, "\n### {title}\n\n| Job | Status | Reason | Time | Fuel | Peak memory |\n");
    *text += "| --- | --- | --- | ---: | ---: | ---: |\n";
    for (shown, job) in jobs.iter().enumerate() {
        let row = row(job);
        if text.len() + row.len() + RESERVE > max {
            let _ = write!(text, "\nand {} more\n", jobs.len() - shown);
            return;
        }
        *text += &row;
    }
}

fn row(job: &JobRecord) -> String {
    // A flaky job's reason is that of the attempt which failed, if it has none itself.
    let earlier = || job.attempts.iter().rev().find_map(|attempt| attempt.reason.as_deref());
    let reason = job.reason.as_deref().or_else(earlier).unwrap_or_default();
    let mut status = job.status.word().to_owned();
    if job.attempts.len() > 1 {
        let _ = write!(status, ", {} attempts", job.attempts.len());
    }
    let fuel = job.last().and_then(|last| last.fuel).map_or("?".to_owned(), grouped);
    let peak = job.last().and_then(|last| last.memory_peak).map_or("?".to_owned(), size);
    let (name, reason, time) = (code(&job.job), code(reason), seconds(job.wall_ms()));
    format!("| {name} | {status} | {reason} | {time} | {fuel} | {peak} |\n")
}

/// Text of others, which must stay text. Inside of `<code>` GitHub makes no mentions, references or emoji; entities
/// keep it from being Markdown, a cell's end or HTML; and an `@` without a neighbour is no address to link to.
fn code(text: &str) -> String {
    // A line's end becomes a blank; other control characters, and those that turn text around, only mislead.
    let text = text.chars().map(|c| if matches!(c, '\n' | '\r' | '\t') { ' ' } else { c });
    let mislead = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut chars = text.filter(|c| !mislead(*c));
    let mut escaped = String::new();
    let mut last = ' ';
    for c in chars.by_ref().take(CELL_MAX) {
        match c {
            '@' => escaped += "&#64;&#8203;",
            '&' | '<' | '>' | '"' | '\'' | '`' | '*' | '_' | '~' | '[' | ']' | '!' | '#' | '|' | '\\' | '$' | ':' => {
                let _ = write!(escaped, "&#{};", u32::from(c));
            }
            // `www.` would be a link.
            '.' if matches!(last, 'w' | 'W') => escaped += "&#46;",
            c => escaped.push(c),
        }
        last = c;
    }
    if chars.next().is_some() {
        escaped.push('…');
    }
    if escaped.is_empty() { escaped } else { format!("<code>{escaped}</code>") }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

/// `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes in the greatest unit of which there is one, rounded down to a tenth.
fn size(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => ("KiB", 10),
        0x10_0000..0x4000_0000 => ("MiB", 20),
        _ => ("GiB", 30),
    };
    let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
    format!("{}.{tenths} {unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{HOSTILE, all, job, run};
    use super::*;

    /// The rows of a table.
    fn rows<'a>(text: &'a str, title: &str) -> Vec<&'a str> {
        let Some((_, section)) = text.split_once(&format!("### {title}\n\n")) else { return Vec::new() };
        section.lines().take_while(|line| line.starts_with('|')).skip(2).collect()
    }

    #[test]
    fn every_status_is_in_its_table() {
        let text = summary(&all());
        assert!(text.starts_with("## <code>ci</code> failed\n\n2 passed (1 flaky), 1 failed, "), "{text}");
        for status in Status::ALL {
            let cell = format!("| <code>{0}</code> | {0}", status.word());
            let is_in = |title| rows(&text, title).iter().any(|row| row.starts_with(&cell));
            assert_eq!(is_in("Failures"), status.is_bad(), "{cell}");
            assert_eq!(is_in("Flaky"), status == Status::Flaky, "{cell}");
        }
        assert!(text.ends_with("\nSkipped: 1. Cancelled: 1. Not selected: 0.\n"), "{text}");
        let row = "| <code>fail</code> | fail | <code>why fail</code> | 1.250 s | 1,234,567 | 1.5 MiB |";
        assert!(rows(&text, "Failures").contains(&row), "{text}");
        assert!(text.find("### Failures") < text.find("### Flaky"));
    }

    #[test]
    fn the_verdict_minds_what_may_fail() {
        let mut may = job("a", Status::Fail);
        may.allow_failure = true;
        let mut run = run(vec![may]);
        let text = summary(&run);
        assert!(text.starts_with("## <code>ci</code> passed\n") && !text.contains("### Failures"), "{text}");
        assert_eq!(rows(&text, "Allowed to fail").len(), 1);
        run.exit = 1;
        assert!(summary(&run).starts_with("## <code>ci</code> failed\n"));
    }

    #[test]
    fn the_slowest_are_five_in_order() {
        let jobs = (0..7u64).map(|number| {
            let mut job = job(&format!("j{number}"), Status::Pass);
            job.attempts[0].times.wall_ms = number;
            job
        });
        let text = summary(&run(jobs.collect()));
        let names: Vec<_> = rows(&text, "Slowest").iter().map(|row| row[8..10].to_owned()).collect();
        assert_eq!(names, ["j6", "j5", "j4", "j3", "j2"]);
    }

    #[test]
    fn hostile_text_stays_in_its_cell() {
        let mut bad = job(HOSTILE, Status::Fail);
        bad.reason = Some(HOSTILE.into());
        let mut run = run(vec![bad]);
        run.name = HOSTILE.into();
        run.ended = Some(HOSTILE.into());
        let text = summary(&run);
        for row in rows(&text, "Failures") {
            assert_eq!(row.matches('|').count(), 7, "{row}");
        }
        assert_eq!(rows(&text, "Failures").len(), 1);
        for bad in ["@", "`", "<b>", "\0", "\u{1b}", "\r", "[a]", "https:", "www.", "\\", "&amp;"] {
            assert!(!text.contains(bad), "{bad:?}: {text}");
        }
        assert!(text.contains("&#124;&#96;&#64;&#8203;octocat&#96;&#60;b&#62;&#38;amp;"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("::")).count(), 0);
    }

    #[test]
    fn long_cells_are_cut_at_their_limit() {
        assert_eq!(code(&"|".repeat(CELL_MAX)), format!("<code>{}</code>", "&#124;".repeat(CELL_MAX)));
        assert_eq!(code(&"é".repeat(CELL_MAX + 1)), format!("<code>{}…</code>", "é".repeat(CELL_MAX)));
        assert_eq!(code("\0"), "");
    }

    #[test]
    fn whole_rows_are_cut_at_the_limit() {
        let run = run(vec![job("a", Status::Fail); 20]);
        let enough = (RESERVE..SUMMARY_MAX).find(|max| !render(&run, *max).contains(" more\n")).expect("a limit");
        let text = render(&run, enough - 1);
        assert!(text.contains("\nand 1 more\n") && text.len() < enough, "{text}");
        for max in (RESERVE..enough).step_by(97) {
            let text = render(&run, max);
            let shown = rows(&text, "Failures").len();
            assert!(text.len() <= max, "{max}");
            assert_eq!(text.contains(&format!("\nand {} more\n", 20 - shown)), shown < 20, "{max}");
        }
    }

    #[test]
    fn a_row_that_just_fits_is_kept() {
        let fail = job("a", Status::Fail);
        let of = |max| {
            let mut text = String::new();
            table(&mut text, "T", &[&fail], max);
            text
        };
        let whole = of(SUMMARY_MAX);
        assert_eq!(of(whole.len() + RESERVE), whole);
        assert!(of(whole.len() + RESERVE - 1).ends_with("---: |\n\nand 1 more\n"));
    }

    #[test]
    fn a_huge_run_is_under_the_limit() {
        let mut bad = job("a", Status::Fail);
        bad.reason = Some("|".repeat(2000));
        let mut run = run(vec![bad; 500]);
        run.jobs.extend(vec![job("f", Status::Flaky); 5000]);
        let text = summary(&run);
        assert!(text.len() <= SUMMARY_MAX && text.len() > SUMMARY_MAX - RESERVE - 8000, "{}", text.len());
        assert!(text.contains(" more\n\n### Flaky\n") && text.ends_with("Not selected: 0.\n"));
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([1023, 1024, 3 << 19, u64::MAX].map(size), ["1023 B", "1.0 KiB", "1.5 MiB", "17179869183.9 GiB"]);
        assert_eq!(seconds(61_005), "61.005 s");
    }
}
