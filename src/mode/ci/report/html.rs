//! The report of a run as one HTML page, which needs nothing but itself: no script, no font, no picture from elsewhere.
//! All text of the record may come from who wrote the guests, so none of it gets into the page but through [`Escaped`].

use std::fmt::{self, Display, Formatter, Write as _};

use super::svg::{graph, timeline};
use crate::mode::ci::record::{JobRecord, RunRecord, Status, StreamRecord};

/// Colours of text, line and fill have a contrast of AA in both schemes.
const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--dim:#57606a;--line:#d0d7de;--alt:#f6f8fa;--link:#0757b5}
.pass{--t:#116329;--s:#1a7f37;--f:#dafbe1}.flaky{--t:#6b4300;--s:#9a6700;--f:#fff3b8}
.bad{--t:#a40e26;--s:#cf222e;--f:#ffe3e0}.infra{--t:#5c31a8;--s:#8250df;--f:#f3e8ff}
.none{--t:#4d555e;--s:#6e7781;--f:#eef1f4}
@media(prefers-color-scheme:dark){
:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9aa4af;--line:#30363d;--alt:#161b22;--link:#6cb2ff}
.pass{--t:#7ee787;--s:#3fb950;--f:#12261e}.flaky{--t:#f0c45c;--s:#d29922;--f:#2b2111}
.bad{--t:#ffa198;--s:#f85149;--f:#341619}.infra{--t:#d2b3ff;--s:#a371f7;--f:#221a33}
.none{--t:#b6bec8;--s:#8b949e;--f:#21262d}}
*{box-sizing:border-box}a{color:var(--link)}
body{margin:0 auto;max-width:80rem;padding:1rem;background:var(--bg);color:var(--fg);font:1rem/1.5 system-ui,sans-serif}
h1,h2,h3,h4,p,dl{margin:.5rem 0;overflow-wrap:anywhere}h1{font-size:1.6rem;line-height:1.25}
h2{font-size:1.25rem;margin-top:2rem}h4{font-size:1rem;margin-top:1rem}
.badge{display:inline-block;padding:0 .5em;border:1px solid var(--s);border-radius:1em;background:var(--f);\
color:var(--t);font-size:.85rem;font-weight:600;line-height:1.6;white-space:nowrap}
h1 .badge{font-size:1rem;vertical-align:.15em}
.m{color:var(--dim);font-size:.9rem}dl{display:flex;flex-wrap:wrap;gap:.25rem 2rem}dt{color:var(--dim);font-size:.85rem}
dd{margin:0}.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem}
svg{display:block}svg text{font:12px system-ui,sans-serif;fill:var(--fg)}
svg text.dim{font-size:11px;fill:var(--dim)}svg a text{fill:var(--t)}svg rect{fill:var(--f);stroke:var(--s)}
svg path{fill:none;stroke:var(--dim);stroke-width:1.3}svg a:hover rect{stroke-width:2.5}svg line{stroke:var(--line)}
#timeline{width:100%;min-width:56rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}th,td{padding:.3rem .6rem;text-align:left;vertical-align:top}
thead th{background:var(--alt);white-space:nowrap}tbody tr{border-top:1px solid var(--line)}
tbody th{font-weight:500;min-width:10rem;overflow-wrap:anywhere}td:last-child{min-width:14rem;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
details{margin:.5rem 0;border:1px solid var(--line);border-left:4px solid var(--s);border-radius:.5rem;\
padding:.4rem .8rem}
summary{cursor:pointer}summary h3{display:inline;font-size:1rem}:target{outline:2px solid var(--link)}
code,pre{font:.85rem/1.45 ui-monospace,monospace;overflow-wrap:anywhere}
pre{margin:.25rem 0;padding:.6rem;max-height:32rem;overflow:auto;white-space:pre-wrap;tab-size:4;background:var(--alt);\
border:1px solid var(--line);border-radius:.3rem}";

/// Text that is safe in an element and in an attribute.
pub(super) struct Escaped<'a>(pub(super) &'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(is_unsafe) {
            let (safe, found) = rest.split_at(at);
            let mut after = found.chars();
            f.write_str(safe)?;
            f.write_str(match after.next() {
                Some('&') => "&amp;",
                Some('<') => "&lt;",
                Some('>') => "&gt;",
                Some('"') => "&quot;",
                Some('\'') => "&#39;",
                _ => "\u{fffd}",
            })?;
            rest = after.as_str();
        }
        f.write_str(rest)
    }
}

/// Besides what HTML knows, what would turn text around, and show other than what is there.
fn is_unsafe(c: char) -> bool {
    matches!(c, '&' | '<' | '>' | '"' | '\'' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        || (c.is_control() && c != '\n' && c != '\t')
}

/// The page of a run. `output` gives the text of a log file.
pub(super) fn html(run: &RunRecord, output: &dyn Fn(&str) -> String) -> String {
    let (class, verdict) = verdict(run);
    let mut page = String::with_capacity(16_384 + run.jobs.len() * 512);
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name}: {verdict}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<header>\n\
         <h1>{name} <span class=\"badge {class}\">{verdict}</span></h1>\n",
        name = Escaped(&run.name),
    );
    header(&mut page, run);
    page += "</header>\n<main>\n<section>\n<h2>Graph</h2>\n";
    graph(&mut page, run);
    page += "</section>\n<section>\n<h2>Timeline</h2>\n";
    timeline(&mut page, run);
    page += "</section>\n<section>\n<h2>Jobs</h2>\n";
    let mut order: Vec<_> = run.jobs.iter().enumerate().collect();
    order.sort_by_key(|(_, job)| rank(job));
    table(&mut page, &order);
    page += "</section>\n<section>\n<h2>Output</h2>\n";
    if !run.jobs.iter().any(has_details) {
        page += "<p>No job printed anything.</p>\n";
    }
    for (number, job) in order.into_iter().filter(|(_, job)| has_details(job)) {
        details(&mut page, number, job, output);
    }
    page += "</section>\n</main>\n</body>\n</html>\n";
    page
}

/// How the run ended, as class and word.
fn verdict(run: &RunRecord) -> (&'static str, &'static str) {
    if run.jobs.iter().any(JobRecord::is_failure) {
        ("bad", "✗ failed")
    } else if run.ended.is_some() {
        ("none", "⊘ ended early")
    } else if run.exit != 0 {
        ("bad", "✗ failed")
    } else {
        ("pass", "✓ passed")
    }
}

fn header(page: &mut String, run: &RunRecord) {
    let _ = writeln!(page, "<p>{}</p>", Escaped(&run.counts().words()));
    if let Some(ended) = &run.ended {
        let _ = writeln!(page, "<p><strong>Ended early:</strong> {}</p>", Escaped(ended));
    }
    page.push_str("<dl>\n");
    let mut term = |name: &str, text: &str| {
        let _ = writeln!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", Escaped(text));
    };
    term("Started", &run.times.started);
    term("Wall time", &duration(run.times.wall_ms));
    term("Slots", &run.times.slots.to_string());
    term("Engine", &run.engine);
    term("Job file", &run.file);
    if let Some(profile) = &run.profile {
        term("Profile", profile);
    }
    if run.unselected > 0 {
        term("Not selected", &run.unselected.to_string());
    }
    term("Exit code", &run.exit.to_string());
    term("Run", &run.run);
    page.push_str("</dl>\n");
}

/// What is to be looked at comes first.
fn rank(job: &JobRecord) -> u8 {
    match job.status {
        _ if job.is_failure() => 0,
        _ if job.status.is_bad() => 1,
        Status::Flaky => 2,
        Status::Pass => 4,
        _ => 3,
    }
}

fn table(page: &mut String, order: &[(usize, &JobRecord)]) {
    page.push_str(
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Table of jobs\">\n<table id=\"jobs\">\n<thead>\
         <tr><th scope=\"col\">Status</th><th scope=\"col\">Job</th><th scope=\"col\" class=\"n\">Time</th>\
         <th scope=\"col\" class=\"n\">Fuel</th><th scope=\"col\" class=\"n\">Peak memory</th>\
         <th scope=\"col\" class=\"n\">Attempts</th><th scope=\"col\">Reason</th></tr></thead>\n<tbody>\n",
    );
    for &(at, job) in order {
        let name = Escaped(&job.job);
        let _ = if has_details(job) {
            write!(page, "<tr><td>{}</td><th scope=\"row\"><a href=\"#job-{at}\">{name}</a></th>", badge(job))
        } else {
            write!(page, "<tr id=\"job-{at}\"><td>{}</td><th scope=\"row\">{name}</th>", badge(job))
        };
        let time = if job.attempts.is_empty() { "–".to_owned() } else { duration(job.wall_ms()) };
        let fuel = job.last().and_then(|attempt| attempt.fuel);
        let memory = job.attempts.iter().filter_map(|attempt| attempt.memory_peak).max();
        let _ = writeln!(
            page,
            "<td class=\"n\">{time}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td>{}</td></tr>",
            fuel.map_or_else(|| "–".to_owned(), amount),
            memory.map_or_else(|| "–".to_owned(), size),
            job.attempts.len(),
            Escaped(job.reason.as_deref().unwrap_or_default()),
        );
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
}

/// Whether there is more of a job than its row says.
fn has_details(job: &JobRecord) -> bool {
    let printed = |stream: &StreamRecord| stream.bytes > 0 || stream.log.is_some();
    job.status.is_bad() || job.attempts.iter().any(|a| !a.status.is_good() || printed(&a.stdout) || printed(&a.stderr))
}

fn details(page: &mut String, at: usize, job: &JobRecord, output: &dyn Fn(&str) -> String) {
    let _ = writeln!(
        page,
        "<details id=\"job-{at}\" class=\"{}\"{}><summary>{} <h3>{}</h3> <span class=\"m\">{}</span></summary>",
        class(job.status),
        if job.status.is_bad() { " open" } else { "" },
        badge(job),
        Escaped(&job.job),
        duration(job.wall_ms()),
    );
    if let Some(reason) = &job.reason {
        let _ = writeln!(page, "<p><strong>{}</strong></p>", Escaped(reason));
    }
    let _ =
        writeln!(page, "<p class=\"m\">Line {} of the job file · <code>{}</code></p>", job.line, Escaped(&job.wasm));
    for attempt in &job.attempts {
        let (word, time) = (label(attempt.status, false), duration(attempt.times.wall_ms));
        let _ = write!(page, "<h4>Attempt {}: {word}, {time}", attempt.attempt);
        let _ = attempt.exit.map(|code| write!(page, ", exit code {code}"));
        page.push_str("</h4>\n");
        if let Some(reason) = attempt.reason.as_ref().filter(|_| attempt.reason != job.reason) {
            let _ = writeln!(page, "<p>{}</p>", Escaped(reason));
        }
        if !attempt.backtrace.is_empty() {
            page.push_str("<p class=\"m\">Backtrace, innermost first</p>\n<ol>\n");
            for function in &attempt.backtrace {
                let _ = writeln!(page, "<li><code>{}</code></li>", Escaped(function));
            }
            page.push_str("</ol>\n");
        }
        stream(page, "stdout", &attempt.stdout, output);
        stream(page, "stderr", &attempt.stderr, output);
    }
    page.push_str("</details>\n");
}

fn stream(page: &mut String, name: &str, stream: &StreamRecord, output: &dyn Fn(&str) -> String) {
    if stream.bytes == 0 && stream.log.is_none() {
        return;
    }
    let (lines, bytes) = (plural(usize::try_from(stream.lines).unwrap_or(usize::MAX), "line"), size(stream.bytes));
    let _ = writeln!(page, "<p class=\"m\">{name}: {lines}, {bytes}</p>");
    if let Some(log) = &stream.log {
        // the first line feed of a <pre> is not shown, so that it must not be one of the text
        let text = output(log);
        let _ = writeln!(page, "<pre tabindex=\"0\" role=\"group\" aria-label=\"{name}\">\n{}</pre>", Escaped(&text));
    }
}

fn badge(job: &JobRecord) -> String {
    format!("<span class=\"badge {}\">{}</span>", class(job.status), label(job.status, job.allow_failure))
}

/// The sign and the word of a status.
pub(super) fn label(status: Status, allowed: bool) -> String {
    format!("{} {}{}", sign(status), status.word(), if allowed && status.is_bad() { " (allowed)" } else { "" })
}

pub(super) fn sign(status: Status) -> &'static str {
    match status {
        Status::Pass => "✓",
        Status::Flaky => "≈",
        Status::Infra => "⚠",
        Status::Skipped => "–",
        Status::Cancelled => "⊘",
        _ => "✗",
    }
}

pub(super) fn class(status: Status) -> &'static str {
    match status {
        Status::Pass => "pass",
        Status::Flaky => "flaky",
        Status::Infra => "infra",
        Status::Skipped | Status::Cancelled => "none",
        _ => "bad",
    }
}

pub(super) fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// `845 ms`, `1.25 s`, `2 min 03 s`, `1 h 02 min`.
pub(super) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => decimal(ms, 1000) + " s",
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

/// `999`, `1.20 M`.
fn amount(number: u64) -> String {
    let units = [(1_000_000_000_000, " T"), (1_000_000_000, " G"), (1_000_000, " M"), (1000, " k")];
    let unit = units.into_iter().find(|(unit, _)| number >= *unit);
    unit.map_or_else(|| number.to_string(), |(unit, name)| decimal(number, unit) + name)
}

/// `512 B`, `2.10 MiB`.
fn size(bytes: u64) -> String {
    let unit = [(1 << 30, " GiB"), (1 << 20, " MiB"), (1 << 10, " KiB")].into_iter().find(|(unit, _)| bytes >= *unit);
    unit.map_or_else(|| format!("{bytes} B"), |(unit, name)| decimal(bytes, unit) + name)
}

/// Three digits of how many units a number is.
fn decimal(number: u64, unit: u64) -> String {
    let hundredths = u128::from(number) * 100 / u128::from(unit);
    match hundredths {
        0..1000 => format!("{}.{:02}", hundredths / 100, hundredths % 100),
        1000..10_000 => format!("{}.{}", hundredths / 100, hundredths / 10 % 10),
        _ => (hundredths / 100).to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::mode::ci::record::{Attempt, RunTimes, Times};

    /// Not even this gets out of its place.
    const HOSTILE: &str = "</script><b>\"'&";

    pub(in super::super) fn job(name: &str, needs: &[&str], status: Status) -> JobRecord {
        let started = !matches!(status, Status::Skipped | Status::Cancelled);
        let attempt = Attempt {
            attempt: 1,
            status,
            reason: status.is_bad().then(|| "it broke".to_owned()),
            exit: Some(i32::from(status.is_bad())),
            backtrace: Vec::new(),
            fuel: Some(1_200_000),
            memory_peak: Some(2_202_010),
            stdout: StreamRecord::default(),
            stderr: StreamRecord::default(),
            times: Times { start_ms: 10, wall_ms: 500, cpu_ms: None, slot: 0 },
        };
        JobRecord {
            job: name.to_owned(),
            id: name.to_owned(),
            line: 7,
            tags: Vec::new(),
            needs: needs.iter().map(ToString::to_string).collect(),
            wasm: "a.wasm".to_owned(),
            wasm_sha256: None,
            status,
            reason: attempt.reason.clone(),
            allow_failure: false,
            tries: 1,
            outputs: Vec::new(),
            attempts: if started { vec![attempt] } else { Vec::new() },
        }
    }

    pub(in super::super) fn run(jobs: Vec<JobRecord>) -> RunRecord {
        RunRecord {
            v: 1,
            run: "r1".to_owned(),
            name: "nightly".to_owned(),
            file: "ci.toml".to_owned(),
            profile: None,
            engine: "wasmi 1".to_owned(),
            unselected: 0,
            exit: u8::from(jobs.iter().any(JobRecord::is_failure)),
            jobs,
            ended: None,
            times: RunTimes { started: "2026-01-02T03:04:05Z".to_owned(), wall_ms: 1000, slots: 2 },
        }
    }

    fn page(run: &RunRecord) -> String {
        html(run, &|path| format!("\ntext of {path}"))
    }

    /// What is between `begin` and the next quote, for all of the page.
    fn values<'a>(page: &'a str, begin: &str) -> Vec<&'a str> {
        page.split(begin).skip(1).filter_map(|rest| rest.split('"').next()).collect()
    }

    #[test]
    fn hostile_text_is_escaped_everywhere() {
        let text = || HOSTILE.to_owned();
        let mut jobs = vec![job(HOSTILE, &[], Status::Trap), job("after", &[HOSTILE], Status::Skipped)];
        jobs[0].reason = Some(text());
        jobs[0].wasm = text();
        jobs[0].attempts[0].reason = Some(text() + "2");
        jobs[0].attempts[0].backtrace = vec![text()];
        jobs[0].attempts[0].stderr = StreamRecord { bytes: 1, lines: 1, sha256: text(), log: Some(text()) };
        let mut run = run(jobs);
        (run.name, run.run, run.file, run.engine) = (text(), text(), text(), text());
        (run.ended, run.profile, run.times.started) = (Some(text()), Some(text()), text());
        let page = page(&run);
        assert!(!page.contains("</script") && !page.contains("<b>") && !page.contains("\"'") && !page.contains("'&"));
        // 8 for the run (its title too), 2 in the graph, 2 in the timeline, 2 in the table, and 6 below
        assert_eq!(page.matches("&lt;/script&gt;&lt;b&gt;&quot;&#39;&amp;").count(), 20);
        assert_eq!(Escaped("a\u{1b}[1m\u{202e}\n\tä").to_string(), "a\u{fffd}[1m\u{fffd}\n\tä");
    }

    #[test]
    fn every_link_has_its_target() {
        let all = Status::ALL.iter().enumerate().map(|(at, status)| job(&format!("job {at}"), &["job 0"], *status));
        let mut run = run(all.collect());
        run.jobs[0].attempts[0].stdout =
            StreamRecord { bytes: 8, lines: 1, log: Some("0".to_owned()), ..Default::default() };
        let page = page(&run);
        let ids = values(&page, " id=\"");
        let targets: HashSet<&str> = ids.iter().copied().collect();
        assert_eq!(ids.len(), targets.len(), "an id is there twice");
        assert!((0..run.jobs.len()).all(|at| targets.contains(format!("job-{at}").as_str())));
        let links = values(&page, " href=\"#");
        assert!(links.len() > 30 && links.iter().all(|link| targets.contains(link)), "{links:?}");
        assert!(page.contains("stdout\">\n\ntext of 0</pre>"));
    }

    #[test]
    fn without_needs_there_is_no_graph() {
        let page = page(&run(vec![job("a", &["nobody"], Status::Skipped)]));
        assert!(!page.contains("<svg") && page.contains("no job needs another") && page.contains("no job was started"));
    }

    #[test]
    fn failures_come_first_and_are_open() {
        let statuses = [Status::Pass, Status::Skipped, Status::Flaky, Status::Fail];
        let page = page(&run(statuses.iter().map(|status| job(status.word(), &[], *status)).collect()));
        let at = |word: &str| page.find(&format!("{word}</span></td>")).expect("a row");
        assert!(at("fail") < at("flaky") && at("flaky") < at("skipped") && at("skipped") < at("pass"));
        assert!(page.contains("<details id=\"job-3\" class=\"bad\" open>"));
    }

    #[test]
    fn numbers_can_be_read() {
        assert_eq!([999, 1_200_000, 45_600, u64::MAX].map(amount), ["999", "1.20 M", "45.6 k", "18446744 T"]);
        assert_eq!([512, 2_202_010, 157_286_400].map(size), ["512 B", "2.10 MiB", "150 MiB"]);
        assert_eq!([12, 1250, 123_000, 3_720_000].map(duration), ["12 ms", "1.25 s", "2 min 03 s", "1 h 02 min"]);
    }

    #[test]
    fn a_chain_of_thousands_is_fast() {
        let names: Vec<String> = (0..5000).map(|at| format!("job {at}")).collect();
        let jobs = (0..5000).map(|at| job(&names[at], &[names[at.saturating_sub(1)].as_str()], Status::Fail));
        let (run, begin) = (run(jobs.collect()), Instant::now());
        let page = page(&run);
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert!(!page.contains("id=\"graph\"") && page.contains("5000 jobs are too many"));
        assert_eq!(page.matches("<details").count(), 5000);
    }
}
