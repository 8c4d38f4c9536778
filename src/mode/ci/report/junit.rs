//! A run as `JUnit` XML, of the kind that Maven Surefire writes: one `<testsuite>` as the root, valid against its
//! schema of version 3.0 and later. That has no room for properties or lines at a `<testcase>`, so those of a job are
//! among the properties of the suite, as in `wrun.fuel[unit (case=a)]`.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, SerializeError, TestCase, TestCaseStatus, TestRerun, TestSuite};

use crate::mode::ci::record::{Attempt, JobRecord, RunRecord, Status, StreamRecord};

/// Stands for a tab until the document is written, since quick-junit drops tabs. It is no character of any text.
const TAB: char = '\u{fdd0}';

/// Gives a run as XML. `output` gives the text of a log that a stream names.
pub(super) fn junit(run: &RunRecord, output: &dyn Fn(&str) -> String) -> Result<String, SerializeError> {
    let mut suite = TestSuite::new(clean(&run.name));
    suite.set_time(Duration::from_millis(run.times.wall_ms));
    suite.add_property((clean("wrun.file"), clean(&run.file)));
    for job in &run.jobs {
        for (name, value) in properties(job) {
            suite.add_property((clean(&format!("wrun.{name}[{}]", job.job)), clean(&value)));
        }
        suite.add_test_case(case(run, job, output));
    }
    let mut report = Report::unnamed();
    report.add_test_suite(suite);
    Ok(to_surefire(&report.to_string()?))
}

/// What Surefire's schema has no attribute for.
fn properties(job: &JobRecord) -> Vec<(&'static str, String)> {
    let last = job.last();
    let known = [
        ("status", Some(job.status.word().to_owned())),
        ("line", Some(job.line.to_string())),
        ("attempt", last.map(|attempt| attempt.attempt.to_string())),
        ("fuel", last.and_then(|attempt| attempt.fuel).map(|fuel| fuel.to_string())),
        ("memory_peak", last.and_then(|attempt| attempt.memory_peak).map(|peak| peak.to_string())),
        ("wasm_sha256", job.wasm_sha256.clone()),
    ];
    known.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn case(run: &RunRecord, job: &JobRecord, output: &dyn Fn(&str) -> String) -> TestCase {
    let mut case = TestCase::new(clean(&job.job), status(job, output));
    case.set_classname(clean(&format!("{}.{}", run.name, job.id)));
    case.set_time(Duration::from_millis(job.wall_ms()));
    if let Some(last) = job.last().filter(|_| job.status != Status::Pass) {
        if let Some(text) = text(&last.stdout, output) {
            case.set_system_out(text);
        }
        if let Some(text) = text(&last.stderr, output) {
            case.set_system_err(text);
        }
    }
    case
}

fn status(job: &JobRecord, output: &dyn Fn(&str) -> String) -> TestCaseStatus {
    let reason = job.reason.as_deref().unwrap_or(job.status.word());
    let Some(kind) = kind(job.status) else {
        let mut status = if job.status.is_good() { TestCaseStatus::success() } else { TestCaseStatus::skipped() };
        status.set_message(clean(reason));
        // A plain pass has no earlier attempts, and a skipped case takes none.
        status.add_reruns(reruns(job, output));
        return status;
    };
    if job.allow_failure {
        let mut status = TestCaseStatus::skipped();
        status.set_message(clean(&format!("allowed to fail: {reason}")));
        return status;
    }
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(clean(reason)).set_type(word(job.status)).add_reruns(reruns(job, output));
    if let Some(last) = job.last().filter(|last| !last.backtrace.is_empty()) {
        status.set_description(clean(&last.backtrace.join("\n")));
    }
    status
}

/// The attempts before the last: failures first and errors after them, as the schema wants it.
fn reruns(job: &JobRecord, output: &dyn Fn(&str) -> String) -> Vec<TestRerun> {
    let earlier = job.attempts.split_last().map_or(&[][..], |(_, earlier)| earlier);
    let of = |wanted| {
        let attempts = earlier.iter().filter(move |attempt| kind(attempt.status) == Some(wanted));
        attempts.map(move |attempt| rerun(attempt, wanted, output))
    };
    of(NonSuccessKind::Failure).chain(of(NonSuccessKind::Error)).collect()
}

fn rerun(attempt: &Attempt, kind: NonSuccessKind, output: &dyn Fn(&str) -> String) -> TestRerun {
    let reason = attempt.reason.as_deref().unwrap_or(attempt.status.word());
    let mut rerun = TestRerun::new(kind);
    rerun.set_message(clean(&format!("attempt {}: {reason}", attempt.attempt)));
    // The schema wants a stack trace even where there is none.
    rerun.set_type(word(attempt.status)).set_stack_trace(clean(&attempt.backtrace.join("\n")));
    if let Some(text) = text(&attempt.stdout, output) {
        rerun.set_system_out(text);
    }
    if let Some(text) = text(&attempt.stderr, output) {
        rerun.set_system_err(text);
    }
    rerun
}

/// Whether the guest is to blame, as its tests would be, or something else is wrong; none for what is not bad.
fn kind(status: Status) -> Option<NonSuccessKind> {
    match status {
        Status::Pass | Status::Flaky | Status::Skipped | Status::Cancelled => None,
        Status::Fail | Status::Mismatch => Some(NonSuccessKind::Failure),
        Status::Trap
        | Status::Timeout
        | Status::Fuel
        | Status::Memory
        | Status::Output
        | Status::Compile
        | Status::Infra => Some(NonSuccessKind::Error),
    }
}

/// The `type` of a status. All failures have the same, the property tells them apart.
fn word(status: Status) -> &'static str {
    if status == Status::Mismatch { Status::Fail.word() } else { status.word() }
}

fn text(stream: &StreamRecord, output: &dyn Fn(&str) -> String) -> Option<String> {
    let text = clean(&output(stream.log.as_deref()?));
    (!text.is_empty()).then_some(text)
}

/// Removes what XML 1.0 does not allow, and colours. quick-junit would do most of that, but it would also take all that
/// follows an unfinished escape sequence, and leave U+FFFE and U+FFFF.
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' if chars.next_if_eq(&'[').is_some() => {
                while chars.next_if(|c| (' '..='?').contains(c)).is_some() {}
                chars.next_if(|c| ('@'..='~').contains(c));
            }
            '\r' => {
                chars.next_if_eq(&'\n');
                clean.push('\n');
            }
            '\t' => clean.push(TAB),
            '\n' => clean.push('\n'),
            TAB | '\u{fffe}' | '\u{ffff}' => {}
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

/// Makes the suite the root, and puts failures before errors. All `<` are markup, as those of texts are escaped.
fn to_surefire(xml: &str) -> String {
    let start = xml.find("<testsuite ").unwrap_or(0);
    let end = xml.rfind("</testsuites>").unwrap_or(xml.len());
    let mut document = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    for part in xml[start..end].trim_end().split_inclusive("</testcase>") {
        let moved = part.find("<error ").and_then(|error| {
            let from = error + part[error..].find("<rerunFailure ")?;
            let to = part.rfind("</rerunFailure>")? + "</rerunFailure>".len();
            let (before, error) = part[..from].split_at(error);
            let (element, indent) = error.split_at(error.trim_end().len());
            Some([before, &part[from..to], indent, element, &part[to..]].concat())
        });
        document += moved.as_deref().unwrap_or(part);
    }
    document.push('\n');
    document.replace(TAB, "\t")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{HOSTILE, all, attempt, job, run};
    use super::*;

    fn xml(run: &RunRecord) -> String {
        junit(run, &|log| format!("text of {log}")).expect("a document")
    }

    /// The element of one job.
    fn element(xml: &str, name: &str) -> String {
        let from = xml.find(&format!("<testcase name=\"{name}\"")).expect("a case");
        let rest = &xml[from..];
        let (open, body) = rest.split_once('>').expect("a tag");
        if open.ends_with('/') {
            open.to_owned()
        } else {
            open.to_owned() + body.split("</testcase>").next().expect("a part")
        }
    }

    #[test]
    fn every_status_has_its_element() {
        let xml = xml(&all());
        assert!(xml.contains(r#"<testsuite name="ci" tests="13" skipped="2" errors="7" failures="2" time="1.500">"#));
        for status in Status::ALL {
            let (word, case) = (status.word(), element(&xml, status.word()));
            assert!(case.contains(&format!("classname=\"ci.{word}\" time=\"")), "{case}");
            let wanted = match status {
                Status::Pass => {
                    assert!(case.ends_with('/'), "{case}");
                    continue;
                }
                Status::Flaky => "<flakyFailure message=\"attempt 2: because 2\" type=\"fail\">".to_owned(),
                Status::Fail | Status::Mismatch => format!("<failure message=\"why {word}\" type=\"fail\"/>"),
                Status::Trap => "<error message=\"why trap\" type=\"trap\">inner\nouter&lt;T&gt;</error>".to_owned(),
                Status::Skipped | Status::Cancelled => format!("<skipped message=\"why {word}\"/>"),
                _ => format!("<error message=\"why {word}\" type=\"{word}\"/>"),
            };
            assert!(case.contains(&wanted), "{case}");
            assert!(xml.contains(&format!("name=\"wrun.status[{word}]\" value=\"{word}\"")));
            assert_eq!(case.contains("<system-out>"), kind(status).is_some() || status == Status::Flaky, "{case}");
        }
    }

    #[test]
    fn properties_are_those_of_the_last_attempt() {
        let xml = xml(&run(vec![job("a", Status::Flaky)]));
        for (name, value) in [("fuel", "1234567"), ("memory_peak", "1572864"), ("attempt", "3"), ("line", "7")] {
            assert!(xml.contains(&format!("name=\"wrun.{name}[a]\" value=\"{value}\"")), "{name}");
        }
        assert!(xml.contains("name=\"wrun.file\" value=\"wrun.toml\""));
        assert!(xml.contains("name=\"wrun.wasm_sha256[a]\" value=\"abc\""));
    }

    #[test]
    fn failures_come_before_errors() {
        let mut bad = job("a", Status::Trap);
        bad.attempts = vec![attempt(1, Status::Trap), attempt(2, Status::Fail), attempt(3, Status::Trap)];
        let xml = xml(&run(vec![job("p", Status::Pass), bad, job("f", Status::Flaky)]));
        let places =
            |case: &str, tags: &[&str]| tags.iter().map(|tag| case.find(tag).expect("a tag")).collect::<Vec<_>>();
        assert!(places(&element(&xml, "a"), &["<rerunFailure ", "<error ", "<rerunError ", "3.out"]).is_sorted());
        let flaky = element(&xml, "f");
        assert!(places(&flaky, &["<flakyFailure ", "2.out", "2.err", "<flakyError ", "1.out", "3.out"]).is_sorted());
        assert!(flaky.contains("<stackTrace></stackTrace>"), "wanted by the schema");
    }

    #[test]
    fn what_may_fail_is_skipped() {
        let mut may = job("a", Status::Trap);
        may.allow_failure = true;
        let xml = xml(&run(vec![may]));
        assert!(xml.contains("skipped=\"1\" errors=\"0\""));
        assert!(element(&xml, "a").contains("<skipped message=\"allowed to fail: why trap\"/>"));
    }

    #[test]
    fn hostile_text_stays_text() {
        let mut bad = job(HOSTILE, Status::Fail);
        bad.reason = Some(HOSTILE.into());
        let xml = junit(&run(vec![bad]), &|_| HOSTILE.to_owned()).expect("a document");
        assert!(!xml.contains(['\0', '\u{1b}', '\u{ffff}', '\r', TAB]) && !xml.contains("]]>"));
        assert!(!xml.contains("<b>"));
        let wanted = "<system-out>x]]&gt;red]0;\n::error::x\n|`@octocat`&lt;b&gt;&amp;amp;\t[a](https://e.example)";
        assert!(xml.contains(wanted), "{xml}");
    }

    #[test]
    fn without_jobs_it_is_still_a_suite() {
        let xml = xml(&run(Vec::new()));
        assert!(xml.contains("<testsuite ") && xml.ends_with("</testsuite>\n") && !xml.contains("testsuites"));
    }
}
