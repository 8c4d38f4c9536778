//! Jobs of a file: the harness, the example, and the exit codes.

use std::{fs, path::Path};

use guest_artifacts::{CAT, HELLO, HOSTILE_COMMAND};
use serde_json::{Value, json};

use crate::wrun::{Finished, Folder, Wrun};

/// A folder with a job file, in which `wrun ci` is run.
pub(crate) struct Jobs {
    pub(crate) folder: Folder,
}

/// How jobs ended.
pub(crate) struct Ran {
    pub(crate) finished: Finished,
    pub(crate) record: Value,
}

/// A job that does an act of the hostile command, and what more is said of it.
pub(crate) fn job(id: &str, act: &[&str], more: &str) -> String {
    format!("[[job]]\nid = \"{id}\"\nwasm = \"{HOSTILE_COMMAND}\"\nargs = {act:?}\n{more}\n")
}

/// A job that prints something, and what more is said of it.
pub(crate) fn hello(id: &str, more: &str) -> String {
    format!("[[job]]\nid = \"{id}\"\nwasm = \"{HELLO}\"\n{more}\n")
}

impl Jobs {
    /// With these lines after that of the version.
    pub(crate) fn of(text: impl AsRef<str>) -> Self {
        Self::in_folder(Folder::new(), text)
    }

    /// In a folder that has something in it.
    pub(crate) fn in_folder(folder: Folder, text: impl AsRef<str>) -> Self {
        Self { folder: folder.file("wrun-ci.toml", format!("version = 1\n{}", text.as_ref())) }
    }

    /// `wrun ci` with these flags.
    pub(crate) fn wrun(&self, flags: &[&str]) -> Wrun {
        self.folder.wrun(["ci"]).args(flags)
    }

    /// Runs jobs, and reads what is left of that.
    #[track_caller]
    pub(crate) fn run(&self, flags: &[&str]) -> Ran {
        self.ran(self.wrun(flags).run())
    }

    /// What is left of a run.
    pub(crate) fn ran(&self, finished: Finished) -> Ran {
        let record = fs::read_to_string(self.folder.path("artifacts/run.json")).unwrap_or_default();
        Ran { finished, record: serde_json::from_str(&record).unwrap_or_default() }
    }
}

impl Ran {
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        Self { finished: self.finished.code(code), ..self }
    }

    /// What the record says of a job.
    #[track_caller]
    pub(crate) fn job(&self, name: &str) -> &Value {
        let jobs = self.record["jobs"].as_array().unwrap_or_else(|| panic!("{}", self.finished.transcript()));
        let job = jobs.iter().find(|job| job["job"] == name);
        job.unwrap_or_else(|| panic!("no `{name}` in {:#}", self.record))
    }

    /// How a job ended, and why.
    #[track_caller]
    pub(crate) fn end(&self, name: &str) -> (&str, &str) {
        let job = self.job(name);
        (job["status"].as_str().unwrap(), job["reason"].as_str().unwrap_or_default())
    }

    /// How all jobs ended, in the order of the file.
    #[track_caller]
    pub(crate) fn ends(&self) -> Vec<(&str, &str)> {
        let jobs = self.record["jobs"].as_array().unwrap_or_else(|| panic!("{}", self.finished.transcript()));
        jobs.iter().map(|job| (job["job"].as_str().unwrap(), job["status"].as_str().unwrap())).collect()
    }
}

/// The example of the repository, at a place of its own.
fn example() -> Folder {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Folder::new().folder("target");
    for (from, to) in
        [("guests/wrun-ci.toml", "guests/wrun-ci.toml"), ("guests/fixtures/hello.txt", "guests/fixtures/hello.txt")]
    {
        fs::create_dir_all(folder.path(to).parent().unwrap()).unwrap();
        fs::copy(root.join(from), folder.path(to)).unwrap();
    }
    std::os::unix::fs::symlink(guest_artifacts::dir(), folder.path("target/guests")).unwrap();
    std::os::unix::fs::symlink(root.join("wit"), folder.path("wit")).unwrap();
    folder
}

#[test]
fn the_example_shows_how_jobs_end() {
    let folder = example();
    let finished = folder.wrun(["ci", "-f", "guests/wrun-ci.toml"]).run().code(100);
    let record: Value = serde_json::from_str(&folder.read("guests/artifacts/run.json")).unwrap();
    let jobs = record["jobs"].as_array().unwrap();
    let ends: Vec<_> = jobs.iter().map(|job| (job["job"].as_str().unwrap(), job["status"].as_str().unwrap())).collect();
    assert_eq!(
        ends,
        [
            ("hello", "pass"),
            ("copy (file=handler.wit)", "pass"),
            ("copy (file=worker.wit)", "pass"),
            ("write", "pass"),
            ("read", "pass"),
            ("flaky", "flaky"),
            ("trap", "trap"),
            ("time-limit", "timeout"),
            ("fuel-limit", "fuel"),
            ("memory-limit", "memory"),
            ("skipped", "skipped"),
        ]
    );
    assert_eq!(folder.read("guests/artifacts/greeting/greeting.txt"), "hello");
    assert_eq!(folder.read("guests/artifacts/logs/read.stdout"), "hello");
    let text = finished.stdout_text();
    for line in [
        "FLAKY 2/3 [",
        "SLOW [>",
        "] trap: trapped: wasm `unreachable` instruction executed\n",
        "] time-limit: hit the time limit of 2s\n",
        "] fuel-limit: hit the fuel limit of 2000000000\n",
        "] memory-limit: hit the memory limit of 64MiB\n",
        "] skipped: it needs `trap`, which ended with trap\n",
        "--- stdout: trap ---\n    | before the trap\n",
        "11 jobs: 6 passed (1 flaky), 1 trapped, 1 timed out, 1 out of fuel, 1 out of memory, 1 skipped\n",
        "TRAP trap | rerun: wrun ci trap -f guests/wrun-ci.toml\n",
    ] {
        assert!(text.contains(line), "{line}: {}", finished.transcript());
    }
    // fuel and memory are told of each that has run
    for job in jobs.iter().filter(|job| job["status"] != "skipped") {
        let last = job["attempts"].as_array().unwrap().last().unwrap();
        assert!(last["fuel"].as_u64() > Some(0) && last["memory_peak"].as_u64() > Some(1 << 16), "{job}");
    }
    assert!(finished.stderr.is_empty(), "{}", finished.transcript());
}

#[test]
fn exit_codes_are_those_of_the_table() {
    let two = hello("well", "") + &job("bad", &["exit", "3"], "");
    let jobs = Jobs::of(&two);
    for (flags, code) in [
        (&["well"][..], 0),
        (&[], 100),
        (&["bad", "well"], 100),
        (&["-E", "id(none)"], 4),
        (&["-E", "id(none)", "--no-tests", "pass"], 0),
        (&["none"], 94),
        (&["-E", "id("], 94),
        (&["-E", "cached()"], 94),
        (&["-f", "none.toml"], 96),
        (&["well", "--on", "nats://x"], 2),
        (&["well", "--junit", "no/folder/junit.xml"], 110),
        (&["bad", "--junit", "no/folder/junit.xml"], 110),
        (&["--no-such-flag"], 2),
    ] {
        let _ = jobs.wrun(flags).run().code(code);
    }
    let _ = Folder::new().wrun(["ci"]).run().code(94).stderr_has("`wrun ci init` writes one");
    // a guest that is none, one that is missing, one that is another
    let _ =
        Jobs::in_folder(Folder::new().file("a.wasm", "no"), "[[job]]\nid = 'a'\nwasm = 'a.wasm'").run(&[]).code(101);
    let _ = Jobs::of("[[job]]\nid = 'a'\nwasm = 'none.wasm'").run(&[]).code(96);
    // a whole run that takes too long
    let timed =
        Jobs::of("[run]\ntotal-timeout = '300ms'\njobs = 1\n".to_owned() + &job("a", &["sleep"], "") + &hello("b", ""));
    let ran = timed.run(&[]).code(124);
    assert_eq!(ran.ends(), [("a", "cancelled"), ("b", "cancelled")]);
    assert_eq!(ran.record["ended"], "the total timeout of 300ms was over");
    // where no wall can be made
    let jailed = jobs.wrun(&["well"]).on_a_kernel_without(&[libc::SYS_seccomp]).run().code(103);
    assert!(jailed.stdout_text().contains("INFRA"), "{}", jailed.transcript());
}

#[test]
fn what_may_fail_fails_nothing() {
    let ran = Jobs::of(job("bad", &["exit", "1"], "allow-failure = true") + &hello("next", "needs = ['bad']"))
        .run(&[])
        .code(0);
    assert_eq!(ran.ends(), [("bad", "fail"), ("next", "pass")]);
    assert!(ran.finished.stdout_text().contains("bad: expected exit code 0, found 1 (allowed to fail)"));
}

#[test]
fn jobs_have_what_they_are_given() {
    let text = format!(
        "[defaults.env]\nA = 'default'\nB = 'default'\n[[job]]\nid = 'args'\nwasm = '{}'\nargs = ['${{attempt}}', '$${{x}}', '${{job}}']\n\
         env-pass = ['PASSED']\n[job.env]\nB = 'own ${{attempt}}'\n",
        guest_artifacts::ARGS
    );
    let jobs = Jobs::of(text);
    let finished = jobs.wrun(&[]).env("PASSED", "on").env("OTHER", "off").run();
    let _ = jobs.ran(finished).code(0);
    let printed: Value = serde_json::from_str(&jobs.folder.read("artifacts/logs/args.stdout")).unwrap();
    assert_eq!(printed["args"], json!(["args", "1", "${x}", "args"]));
    assert_eq!(printed["env"], json!({"A": "default", "B": "own 1", "PASSED": "on"}));
    // one that is to be passed on and is not there
    let _ = jobs.run(&[]).finished.code(96).stderr_has("the variable `PASSED` is to be passed on, and is not set");
}

#[test]
fn standard_input_is_a_file_or_a_text() {
    let cat =
        |id: &str, stdin: &str, more: &str| format!("[[job]]\nid = '{id}'\nwasm = '{CAT}'\nstdin = {stdin}\n{more}\n");
    let thread = "isolation = 'thread'";
    let text = cat("file", "{ file = 'in.txt' }", "expect = { stdout = 'in.txt' }")
        + &cat("text", "{ text = 'attempt ${attempt}' }", "")
        + &cat("here", "{ text = 'attempt ${attempt}' }", thread)
        + &cat("file-here", "{ file = 'in.txt' }", &format!("expect = {{ stdout = 'in.txt' }}\n{thread}"))
        + &cat("other", "{ text = 'one\ntwo' }", "").replace("'one\ntwo'", "\"one\\ntwo\"")
        + &cat("differs", "{ text = \"one\\n2\" }", "expect = { stdout = 'in.txt' }");
    let jobs = Jobs::in_folder(Folder::new().file("in.txt", "one\ntwo\n"), text);
    let ran = jobs.run(&[]).code(100);
    assert_eq!(jobs.folder.read("artifacts/logs/text.stdout"), "attempt 1");
    assert_eq!(jobs.folder.read("artifacts/logs/here.stdout"), "attempt 1");
    assert_eq!(ran.end("differs").0, "mismatch");
    assert!(ran.end("differs").1.ends_with("line 2 is the first that differs"), "{:?}", ran.end("differs"));
    let well = ran.ends().iter().filter(|(_, status)| *status == "pass").count();
    assert_eq!(well, 5, "{:?}", ran.ends());
}
