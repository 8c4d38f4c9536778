//! Which jobs run, in which order, how often, and until when.

use std::collections::BTreeSet;

use guest_artifacts::RG;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat, open},
    io::ioctl_fionread,
    process::Signal,
};
use serde_json::Value;

use crate::{
    ci::{Jobs, Ran, hello, job},
    supervision::children,
    wrun::{Folder, Running},
};

/// The events of a run as it wrote them.
fn events(jobs: &Jobs) -> Vec<Value> {
    jobs.folder.read("events").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The names of the jobs of some events, in the order in which those happened.
fn order(jobs: &Jobs, kind: &str) -> Vec<String> {
    let of_kind = events(jobs).into_iter().filter(|event| event["t"] == kind);
    of_kind.map(|event| event["job"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn jobs_run_after_what_they_need() {
    let text = hello("c", "needs = ['b']") + &hello("b", "needs = ['a']") + &hello("a", "") + &hello("d", "");
    let jobs = Jobs::of(text);
    let _ = jobs.run(&["-j", "4", "--json", "events"]).code(0);
    let (starts, ends) = (order(&jobs, "job.start"), order(&jobs, "job.end"));
    let at = |list: &[String], job: &str| list.iter().position(|it| it == job).unwrap();
    assert_eq!(starts.iter().filter(|job| *job != "d").collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(at(&ends, "a") < at(&ends, "b") && at(&ends, "b") < at(&ends, "c"));
    // what took long is begun early the next time
    let text = hello("quick", "") + &job("long", &["sleep", "300"], "");
    let jobs = Jobs::of(text);
    for expected in [["quick", "long"], ["long", "quick"]] {
        let _ = jobs.run(&["-j", "1", "--json", "events"]).code(0);
        assert_eq!(order(&jobs, "job.start"), expected);
    }
}

#[test]
fn jobs_are_selected() {
    let text = hello("unit", "tags = ['fast', 'pr']\nmatrix = { n = [1, 2] }")
        + &hello("slow-one", "tags = ['slow']\nneeds = ['unit']")
        + &hello("slow-two", "tags = ['slow']")
        + &hello("last", "needs = ['slow-one']");
    let jobs = Jobs::of(text);
    let listed = |flags: &[&str]| {
        let listed = jobs.wrun(&[&["-l"], flags].concat()).run().code(0).stdout_text();
        listed.lines().map(|line| line.split("  ").next().unwrap().to_owned()).collect::<Vec<_>>().join(" + ")
    };
    let units = "unit (n=1) + unit (n=2)";
    for (filter, expected) in [
        ("tag(fast)", units),
        ("id(slow-*)", "unit (n=1) + unit (n=2) + slow-one + slow-two"),
        ("id(=slow-two)", "slow-two"),
        ("id(/two$/)", "slow-two"),
        ("id(*n=2*)", "unit (n=2)"),
        ("tag(slow) & !needs(unit)", "slow-two"),
        ("rneeds(slow-one)", "unit (n=1) + unit (n=2) + slow-one"),
        ("needs(=slow-one) | tag(p?)", "unit (n=1) + unit (n=2) + slow-one + last"),
        ("!(all() & !tag(fast))", units),
    ] {
        assert_eq!(listed(&["-E", filter]), expected, "{filter}");
    }
    assert_eq!(listed(&["slow-two", "unit (n=2)"]), "unit (n=2) + slow-two");
    for (filter, told) in [
        ("", "expected `id(…)`"),
        ("id(a", "expected a name and `)` at column 4, found `a`"),
        ("id(/(/)", "the regular expression `(`"),
        ("id(a) id(b)", "expected `&`, `|` or the end at column 7, found `id(b)`"),
        ("name(a)", "at column 1, found `name(a)`"),
        (&"!".repeat(100), "nested deeper than 64"),
    ] {
        let _ = jobs.wrun(&["-E", filter]).run().code(94).stderr_has(told);
    }
    let _ = jobs.wrun(&["slow-tow"]).run().code(94).stderr_has("there is no job `slow-tow`; did you mean `slow-two`?");
    let _ = jobs.wrun(&["slow-two"]).run().code(0).stdout_has("Starting 1 job (4 not selected) on ");
}

#[test]
fn parts_share_all_jobs() {
    let numbers: Vec<_> = (0..50).map(|n| n.to_string()).collect();
    let matrix = |order: &[String]| Jobs::of(hello("m", &format!("matrix = {{ n = [{}] }}", order.join(","))));
    let part = |jobs: &Jobs, part: &str| -> BTreeSet<String> {
        jobs.wrun(&["-l", "--partition", part]).run().code(0).stdout_text().lines().map(str::to_owned).collect()
    };
    let jobs = matrix(&numbers);
    let reversed = matrix(&numbers.iter().rev().cloned().collect::<Vec<_>>());
    for kind in ["hash:", "count:", ""] {
        let parts: Vec<_> = (1..=3).map(|n| part(&jobs, &format!("{kind}{n}/3"))).collect();
        assert_eq!(parts.iter().map(BTreeSet::len).sum::<usize>(), 50, "{kind}");
        assert_eq!(parts.iter().flatten().collect::<BTreeSet<_>>().len(), 50, "{kind}");
        // by hash it does not matter where a job is in the file
        let same = (1..=3).all(|n| part(&reversed, &format!("{kind}{n}/3")) == parts[n - 1]);
        assert_eq!(same, kind != "count:", "{kind}");
    }
    for bad in ["0/3", "4/3", "1/0", "x", "slice:1/2", "1/"] {
        let _ = jobs.wrun(&["--partition", bad]).run().code(2);
    }
}

#[test]
fn what_was_not_well_is_run_again() {
    let text = hello("well", "")
        + &job("bad", &["read", "/in/x"], "inputs = [{ from = 'in', to = '/in' }]")
        + &hello("after", "needs = ['bad']");
    let jobs = Jobs::in_folder(Folder::new().folder("in"), text);
    let _ = jobs.wrun(&["--rerun-failed"]).run().code(94).stderr_has("there is no `run.json` of a run before");
    assert_eq!(jobs.run(&[]).code(100).ends(), [("well", "pass"), ("bad", "fail"), ("after", "skipped")]);
    std::fs::write(jobs.folder.path("in/x"), "x").unwrap();
    assert_eq!(jobs.wrun(&["-l", "-E", "failed()"]).run().stdout_text().lines().count(), 2);
    assert_eq!(jobs.run(&["--rerun-failed"]).code(0).ends(), [("bad", "pass"), ("after", "pass")]);
    let _ = jobs.run(&["--rerun-failed"]).code(4);
}

#[test]
fn failures_are_tried_again() {
    let flaky =
        job("flaky", &["read", "/in/attempt-${attempt}"], "inputs = [{ from = 'wrun-ci.toml', to = '/in/attempt-3' }]");
    let jobs = Jobs::of(format!(
        "[run]\nretries = {{ count = 2, backoff = 'exponential', delay = '1ms', jitter = true }}\n{flaky}"
    ));
    let ran = jobs.run(&["--json", "events"]).code(0);
    assert_eq!(ran.end("flaky"), ("flaky", ""));
    let text = ran.finished.stdout_text();
    for line in ["TRY 1 FAIL [", "TRY 2 FAIL [", "FLAKY 3/3 [", "1 passed (1 flaky)"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let attempts = events(&jobs).into_iter().filter(|event| event["t"] == "job.attempt");
    assert_eq!(attempts.map(|event| event["attempt"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    // each attempt has a log of its own
    assert_eq!(jobs.folder.names("artifacts/logs"), ["flaky.2.stderr", "flaky.3.stdout", "flaky.stderr"]);
    assert_eq!(jobs.run(&["--flaky-fails"]).code(100).end("flaky").0, "flaky");
    assert_eq!(jobs.run(&["--retries", "1"]).code(100).end("flaky").0, "fail");
    // a job's own word is better than that of all
    let own = Jobs::of(format!("[run]\nretries = 2\n{flaky}retries = 1\n"));
    assert_eq!(own.run(&[]).code(100).job("flaky")["attempts"].as_array().unwrap().len(), 2);
}

#[test]
fn a_run_may_end_with_its_first_failure() {
    let text = job("a", &["exit", "1"], "") + &job("b", &["exit", "1"], "") + &hello("c", "");
    // each in a folder of its own: the order would follow from how long they took before
    let jobs = || Jobs::of(format!("[run]\nfail-fast = {{ max-fail = 2 }}\njobs = 1\n{text}"));
    assert_eq!(jobs().run(&[]).code(100).ends(), [("a", "fail"), ("b", "fail"), ("c", "skipped")]);
    let ran = jobs().run(&["--fail-fast"]).code(100);
    assert_eq!(ran.ends(), [("a", "fail"), ("b", "skipped"), ("c", "skipped")]);
    assert_eq!(ran.end("c").1, "1 failed before, and `fail-fast` is set");
    assert_eq!(jobs().run(&["--no-fail-fast"]).code(100).end("c").0, "pass");
    assert_eq!(jobs().run(&["--max-fail", "3"]).code(100).end("c").0, "pass");
    let _ = jobs().wrun(&["--max-fail", "0"]).run().code(2);
}

#[test]
fn jobs_of_one_serial_word_do_not_overlap() {
    let text: String = ["a", "b", "c"].iter().map(|id| job(id, &["sleep", "30"], "serial = 'db'")).collect();
    let ran = Jobs::of(text).run(&["-j", "3"]).code(0);
    let mut spans: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|id| {
            let times = &ran.job(id)["attempts"][0]["times"];
            let start = times["start_ms"].as_u64().unwrap();
            (start, start + times["wall_ms"].as_u64().unwrap())
        })
        .collect();
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{spans:?}");
}

#[test]
fn a_slow_job_is_told_of_and_ended() {
    let text = job("a", &["sleep"], "") + &hello("b", "");
    let jobs =
        Jobs::of(format!("[run]\njobs = 1\nslow = {{ period = '200ms', terminate-after = 3, grace = '1s' }}\n{text}"));
    let ran = jobs.run(&["--json", "events"]).code(100);
    assert_eq!(ran.ends(), [("a", "timeout"), ("b", "pass")]);
    assert_eq!(ran.end("a").1, "hit the time limit of 600ms");
    let slow = events(&jobs).into_iter().filter(|event| event["t"] == "job.slow").count();
    assert!((1..=3).contains(&slow), "{slow}");
}

#[test]
fn a_signal_ends_jobs_and_leaves_reports() {
    for (signal, code, word) in
        [(Signal::INT, 130, "interrupted"), (Signal::TERM, 143, "terminated"), (Signal::HUP, 129, "hung up")]
    {
        let text = job("a", &["sleep"], "") + &hello("b", "needs = ['a']") + &hello("c", "serial = 'x'");
        let jobs = Jobs::of(format!("[run]\njobs = 1\n{text}"));
        let mut running = jobs.wrun(&["--json", "-", "--junit", "junit.xml"]).spawn();
        while !running.stdout_line().contains("\"job.start\"") {}
        running.signal(signal);
        let ran: Ran = jobs.ran(running.wait()).code(code);
        assert_eq!(ran.ends(), [("a", "cancelled"), ("b", "cancelled"), ("c", "cancelled")]);
        assert_eq!((&ran.record["ended"], &ran.record["exit"]), (&word.into(), &code.into()));
        let ends: Vec<Value> =
            ran.finished.stdout_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(ends.iter().filter(|event| event["t"] == "job.end").count(), 3);
        assert_eq!(ends.last().unwrap()["t"], "run.end");
        assert!(jobs.folder.read("junit.xml").contains("tests=\"3\""));
    }
}

#[test]
fn a_signal_ends_what_is_being_compiled() {
    let jobs = Jobs::of(format!("[[job]]\nid = 'a'\nwasm = '{RG}'\n{}", hello("b", "needs = ['a']")));
    let mut running = jobs.wrun(&["--json", "events", "--junit", "junit.xml"]).private_cache().spawn();
    let pid = running.pid();
    running.until_holds("its guest is compiled", || !children(pid).is_empty());
    running.signal(Signal::INT);
    let ran = jobs.ran(running.wait()).code(130);
    assert_eq!(ran.ends(), [("a", "cancelled"), ("b", "cancelled")]);
    assert_eq!(order(&jobs, "job.end").len(), 2);
    assert!(jobs.folder.read("junit.xml").contains("tests=\"2\""));
}

fn until_c_runs(running: &mut Running) {
    let begins = |line: String| line.contains("\"job\":\"c\"") && line.contains("\"job.start\"");
    while !begins(running.stdout_line()) {}
}

#[test]
fn a_second_signal_ends_all_at_once() {
    let flood = |id: &str| job(id, &["flood", "64000"], "expect = { exit = 1 }");
    let jobs = Jobs::of(format!("[run]\njobs = 2\n{}{}{}", flood("a"), flood("b"), job("c", &["sleep"], "")));
    let pipe = jobs.folder.path("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // nobody opens it: that is no reason to wait
    let mut running = jobs.wrun(&["--json", "-", "--junit", "pipe"]).spawn();
    until_c_runs(&mut running);
    running.signal(Signal::INT);
    let _ = running.wait().code(130).stdout_has("could not write the JUnit report `pipe`");
    // somebody does, and takes nothing
    let reader = open(&pipe, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let mut running = jobs.wrun(&["--json", "-", "--junit", "pipe"]).spawn();
    until_c_runs(&mut running);
    running.signal(Signal::INT);
    while !running.stdout_line().contains("\"status\":\"cancelled\"") {}
    running.until_holds("its report is written", || ioctl_fionread(&reader).is_ok_and(|waiting| waiting > 0));
    running.signal(Signal::INT);
    let _ = running.wait().code(130);
}

#[test]
fn a_run_is_the_same_on_any_number_of_slots() {
    let text = (0..12).map(|n| job(&format!("j{n}"), &["say", "x", "exit", &(n % 3).to_string()], "retries = 1"));
    let text = text.collect::<String>()
        + &hello("after", "needs = ['j0', 'j1']")
        + &job("out", &["write", "/out/x", "1"], "outputs = [{ from = '/out', to = 'kept' }]");
    let jobs = Jobs::of(text);
    let same = |slots: &str| {
        let mut record = jobs.run(&["-j", slots]).code(100).record;
        forget_times(&mut record);
        record.to_string()
    };
    let one = same("1");
    assert!(one.contains("\"fuel\":") && !one.contains("start_ms"));
    assert_eq!(one, same("2"));
    assert_eq!(one, same("16"));
}

/// Takes away what differs from run to run: its name, and all times.
fn forget_times(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|name, _| name != "times" && name != "run");
            members.values_mut().for_each(forget_times);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_times),
        _ => {}
    }
}
