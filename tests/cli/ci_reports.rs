//! What a run tells: lines, reports and a page; whatever guests print.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use serde_json::Value;

use crate::{
    ci::{Jobs, Ran, hello, job},
    wrun::Folder,
};

/// What a hostile guest prints: orders to runners and terminals, ends of what reports put around it, no UTF-8.
const HOSTILE: &str = "::error::x\\n::stop-commands::t\\n\\u001b]0;title\\u0007]]>\\u0000<script>alert(1)</script>\\n##[error]x\\u202e`|@a";

/// Jobs that end in every way in which they can.
fn all_ends() -> String {
    let flaky = "inputs = [{ from = 'wrun-ci.toml', to = '/in/attempt-2' }]\nretries = 1";
    hello("pass", "")
        + &job("flaky", &["read", "/in/attempt-${attempt}"], flaky)
        + &job("fail", &["exit", "1"], "retries = 1")
        + &job("trap", &["say", "last words", "trap"], "")
        + &job("timeout", &["sleep"], "timeout = '100ms'")
        + &job("fuel", &["spin"], "fuel = 1000000")
        + &job("memory", &["grow"], "memory = '16MiB'")
        + &job("output", &["flood"], "")
        + &hello("mismatch", "expect = { stdout = 'wrun-ci.toml' }")
        + "[[job]]\nid = 'compile'\nwasm = 'none.wasm'\n"
        + &hello("skipped", "needs = ['trap']")
        + &job("allowed", &["exit", "1"], "allow-failure = true")
        + &format!(
            "[[job]]\nid = 'hostile'\nwasm = '{}'\nstdin = {{ text = \"{HOSTILE}\" }}\nexpect = {{ exit = 1 }}\n",
            guest_artifacts::CAT
        )
}

fn with_all_ends(flags: &[&str], env: &[(&str, &str)]) -> (Jobs, Ran) {
    let jobs = Jobs::in_folder(Folder::new().file("none.wasm", "no"), all_ends());
    let mut wrun = jobs.wrun(flags);
    for (name, value) in env {
        wrun = wrun.env(name, value);
    }
    let finished = wrun.run();
    let ran = jobs.ran(finished).code(101);
    (jobs, ran)
}

/// Whether what reads reports must be here: elsewhere a test of it is left out where it is not.
fn is_required() -> bool {
    std::env::var_os("REPORT_READERS").is_some_and(|readers| readers == "required")
}

/// A Python that has what reads reports, made once.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = PYTHON.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report-readers");
        let python = folder.join("bin/python");
        let has_all = || {
            Command::new(&python)
                .args(["-c", "import junitparser, xmlschema"])
                .output()
                .is_ok_and(|it| it.status.success())
        };
        if !has_all() {
            let _ = Command::new("python3").args(["-m", "venv"]).arg(&folder).output();
            let packages = ["junitparser==5.0.0", "xmlschema==4.1.0"];
            let _ = Command::new(&python).args(["-m", "pip", "install", "--quiet"]).args(packages).output();
        }
        has_all().then_some(python)
    });
    assert!(made.is_some() || !is_required(), "expected a Python with `junitparser` and `xmlschema`");
    made.as_deref()
}

#[test]
fn junit_is_what_its_readers_take() {
    let Some(python) = python() else { return };
    let (jobs, ran) = with_all_ends(&["--junit", "junit.xml"], &[]);
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schema/surefire-test-report.xsd");
    let script = "import sys, json, xmlschema, junitparser\n\
        xmlschema.XMLSchema(sys.argv[1]).validate(sys.argv[2])\n\
        suite, = junitparser.JUnitXml.fromfile(sys.argv[2])\n\
        kind = lambda case: [type(r).__name__ for r in case.result]\n\
        print(json.dumps({'counts': [suite.tests, suite.failures, suite.errors, suite.skipped],\n\
            'cases': {case.name: kind(case) for case in suite},\n\
            'out': {case.name: case.system_out for case in suite},\n\
            'properties': {p.name: p.value for p in suite.properties()}}))";
    let output =
        Command::new(python).args(["-c", script]).arg(schema).arg(jobs.folder.path("junit.xml")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    // what may fail and what was skipped is skipped
    assert_eq!(read["counts"].to_string(), "[13,3,6,2]", "{read:#}");
    for (job, kind) in [
        ("pass", "[]"),
        ("fail", "[\"Failure\""),
        ("trap", "[\"Error\"]"),
        ("skipped", "[\"Skipped\"]"),
        ("allowed", "[\"Skipped\"]"),
    ] {
        assert!(read["cases"][job].to_string().starts_with(kind), "{job}: {}", read["cases"][job]);
    }
    let xml = jobs.folder.read("junit.xml");
    assert!(xml.contains("<flakyFailure ") && xml.contains("<rerunFailure "), "{xml}");
    let fuel = ran.job("pass")["attempts"][0]["fuel"].as_u64().unwrap();
    assert_eq!(read["properties"]["wrun.fuel[pass]"], fuel.to_string());
    assert!(read["properties"]["wrun.memory_peak[pass]"].is_string());
    assert!(read["out"]["trap"].as_str().unwrap().contains("last words"));
    assert!(read["out"]["hostile"].as_str().unwrap().contains("]]>"));
    let counts = "13 jobs: 2 passed (1 flaky), 3 failed, 1 trapped, 1 timed out, 1 out of fuel, 1 out of memory, \
                  1 over the output limit, 1 mismatched, 1 not compiled, 1 skipped\n";
    let _ = ran.finished.stdout_has(counts);
}

#[test]
fn json_lines_have_an_end_for_each_job() {
    let (jobs, ran) = with_all_ends(&["--json", "events.jsonl"], &[]);
    let events = jobs.folder.read("events.jsonl");
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let run = events[0]["run"].clone();
    assert!(events.iter().all(|event| event["v"] == 1 && event["run"] == run));
    assert_eq!((&events[0]["t"], &events.last().unwrap()["t"]), (&"run.start".into(), &"run.end".into()));
    let mut ends: Vec<_> = events.iter().filter(|event| event["t"] == "job.end").collect();
    assert_eq!(ends.len(), 13);
    ends.sort_by_key(|event| event["job"].as_str());
    let mut kept = ran.ends();
    kept.sort_unstable();
    let told: Vec<_> =
        ends.iter().map(|event| (event["job"].as_str().unwrap(), event["status"].as_str().unwrap())).collect();
    assert_eq!(told, kept);
    let pass = ends.iter().find(|event| event["job"] == "pass").unwrap();
    for key in ["attempt", "exit", "fuel", "memory_peak", "wall_ms", "cpu_ms", "slot"] {
        assert!(pass[key].is_u64(), "{key}: {pass}");
    }
    assert_eq!((&pass["stdout"]["bytes"], pass["stdout"]["sha256"].as_str().unwrap().len()), (&14.into(), 64));
    // on standard output there is nothing else, and lines for people are beside it
    let jobs = Jobs::of(hello("a", ""));
    let finished = jobs.wrun(&["--json", "-"]).run().code(0).stderr_has("PASS [");
    assert!(finished.stdout_text().lines().all(|line| line.starts_with('{')));
}

#[test]
fn a_reader_that_leaves_stops_no_run() {
    let jobs = Jobs::of(hello("a", "") + &hello("b", ""));
    let ran = jobs.ran(jobs.wrun(&["--junit", "junit.xml"]).stdout_closed().run()).code(0);
    assert_eq!(ran.ends(), [("a", "pass"), ("b", "pass")]);
    assert!(jobs.folder.read("junit.xml").contains("tests=\"2\""));
    // what is written for a program is missed
    let mut running = jobs.wrun(&["--json", "-"]).spawn();
    running.close_stdout();
    let ran = jobs.ran(running.wait()).code(110);
    assert_eq!(ran.ends(), [("a", "pass"), ("b", "pass")]);
}

#[test]
fn a_guest_commands_no_runner_and_no_terminal() {
    let (_, ran) = with_all_ends(&["--color", "never"], &[("GITHUB_ACTIONS", "true")]);
    let text = ran.finished.stdout_text();
    let is_order = |line: &&str| line.starts_with("::") || line.starts_with("##[");
    let orders: Vec<_> = text.lines().filter(is_order).collect();
    let tokens: Vec<_> = orders.iter().filter_map(|line| line.strip_prefix("::stop-commands::")).collect();
    assert!(
        !tokens.is_empty()
            && tokens.iter().all(|token| token.len() == 32 && orders.contains(&&*format!("::{token}::")))
    );
    let known = ["::group::", "::endgroup::", "::error title=", "::warning title=", "::stop-commands::"];
    let others: Vec<_> = orders.iter().filter(|line| !known.iter().any(|it| line.starts_with(it))).collect();
    assert_eq!(others.len(), tokens.len(), "{others:?}");
    assert!(text.contains("    | ::error::x\n    | ::stop-commands::t\n"), "{text}");
    assert!(!text.contains('\u{1b}') && !text.contains('\0') && !text.contains('\u{202e}'));
    let errors: Vec<_> = orders.iter().filter(|line| line.starts_with("::error")).collect();
    assert_eq!(errors.len(), 9, "{errors:?}");
    assert!(errors[0].contains("file=wrun-ci.toml,line="), "{errors:?}");
    // GitLab folds what lies between its marks
    let (_, ran) = with_all_ends(&["--color", "never"], &[("GITLAB_CI", "true")]);
    let text = ran.finished.stdout_text();
    assert!(text.contains("section_start:") && text.contains("section_end:") && !text.contains("::error title"));
}

#[test]
fn what_is_printed_without_end_costs_no_memory() {
    let jobs = Jobs::of(job("a", &["flood", "100000000"], "stdout-max = '200MiB'\nexpect = { exit = 1 }"));
    let limited = Command::new("sh")
        .args(["-c", "ulimit -d 150000; exec \"$0\" ci --junit junit.xml --html page.html --json events"])
        .arg(crate::wrun::WRUN)
        .current_dir(jobs.folder.path("."))
        .output()
        .unwrap();
    assert_eq!(limited.status.code(), Some(100), "{}", String::from_utf8_lossy(&limited.stderr));
    let stdout = String::from_utf8(limited.stdout).unwrap();
    assert!(stdout.len() < 20_000 && stdout.contains("FAIL"), "{stdout}");
    assert_eq!(fs::metadata(jobs.folder.path("artifacts/logs/a.stdout")).unwrap().len(), 100_000_000);
    assert!(fs::metadata(jobs.folder.path("junit.xml")).unwrap().len() < 100_000);
}

#[test]
fn secrets_are_masked_wherever_they_are_told() {
    let secret = "s3cr3t/value+1";
    let encoded = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(format!("user:{secret}"))
    };
    let reversed: String = secret.chars().rev().collect();
    let text = |text: &str| format!("stdin = {{ text = \"{text}\" }}");
    let cat = |id: &str, more: &str| {
        format!(
            "[[job]]\nid = '{id}'\nwasm = '{}'\nsecrets = ['TOKEN']\nexpect = {{ exit = 1 }}\n{more}\n",
            guest_artifacts::CAT
        )
    };
    let text = cat("whole", &text(&format!("a {secret} b")))
        + &cat("base64", &text(&format!("Basic {encoded}")))
        + &cat("url", &text("q=s3cr3t%2Fvalue%2B1"))
        + &cat("reversed", &text(&reversed))
        + &job("split", &["say", "s3cr3t/va", "say", "lue+1", "trap"], "secrets = ['TOKEN']")
        + &job("reason", &["exit", "1"], "secrets = ['TOKEN']");
    let jobs = Jobs::of(text);
    let _ =
        jobs.wrun(&[]).env("TOKEN", "abc").run().code(96).stderr_has("the secret `TOKEN` is too short to be masked");
    let no_text = std::os::unix::ffi::OsStringExt::from_vec(b"hunter22\xff".to_vec());
    let no_text: std::ffi::OsString = no_text;
    let told = jobs.wrun(&[]).env("TOKEN", no_text).run().code(96).stderr_has("and is not UTF-8");
    assert!(!told.stderr_text().contains("hunter22"));
    let flags = ["--junit", "junit.xml", "--html", "page.html", "--json", "events", "--summary", "summary.md"];
    let ran = jobs.ran(jobs.wrun(&flags).env("TOKEN", secret).env("GITHUB_ACTIONS", "true").run()).code(100);
    assert_eq!(jobs.folder.read("artifacts/logs/whole.stdout"), "a *** b");
    assert_eq!(jobs.folder.read("artifacts/logs/split.stdout"), "***");
    assert_eq!(jobs.folder.read("artifacts/logs/url.stdout"), "q=***");
    // one that is turned round is another text: nobody can mask all that can be made of one
    assert_eq!(jobs.folder.read("artifacts/logs/reversed.stdout"), reversed);
    let core = &encoded[8..encoded.len() - 4];
    let mut told: Vec<String> = ["junit.xml", "page.html", "events", "summary.md", "artifacts/run.json"]
        .iter()
        .map(|file| jobs.folder.read(file))
        .collect();
    told.extend(
        jobs.folder.names("artifacts/logs").iter().map(|log| jobs.folder.read(&format!("artifacts/logs/{log}"))),
    );
    told.push(ran.finished.stdout_text());
    for text in told {
        assert!(!text.contains(secret) && !text.contains("s3cr3t%2F") && !text.contains(core), "{text}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_told() {
    let jobs = Jobs::in_folder(Folder::new().folder("folder").file("target", "as it was"), hello("a", ""));
    symlink("target", jobs.folder.path("link")).unwrap();
    for (path, told) in
        [("none/x", "No such file"), ("folder", "directory"), ("link", "it is a link"), ("/dev/full", "No space left")]
    {
        for report in ["--junit", "--html", "--summary", "--json"] {
            let ran = jobs.run(&[report, path]);
            let finished = ran.finished.code(110);
            let text = finished.stdout_text() + &finished.stderr_text();
            assert!(text.contains(told), "{report} {path}: {text}");
            // the summary is there unless there was nowhere to write to from the start
            assert!(text.contains("Summary") || report == "--json", "{report} {path}: {text}");
        }
    }
    assert_eq!(jobs.folder.read("target"), "as it was");
    let _ = Jobs::in_folder(Folder::new().file("artifacts", "a file"), hello("a", "")).run(&[]).finished.code(110);
}

#[test]
fn a_summary_is_added_to_that_of_a_step() {
    let jobs =
        Jobs::in_folder(Folder::new().file("step", "# Before\n"), all_ends().replace("none.wasm", "wrun-ci.toml"));
    let step = jobs.folder.path("step").display().to_string();
    let _ = jobs.wrun(&[]).env("GITHUB_STEP_SUMMARY", &step).run();
    let _ = jobs.wrun(&["--summary", "own.md"]).env("GITHUB_STEP_SUMMARY", &step).run();
    let text = jobs.folder.read("step");
    assert!(text.starts_with("# Before\n") && text.contains("trap"), "{text}");
    assert_eq!(text.matches("last words").count() + text.matches("# Before").count(), 1);
    assert_eq!(text["# Before\n".len()..].lines().next(), jobs.folder.read("own.md").lines().next());
    for status in ["trap", "timeout", "fuel", "memory", "flaky"] {
        assert!(jobs.folder.read("own.md").contains(status), "{status}");
    }
}

#[test]
fn the_page_is_one_that_a_browser_shows() {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let is_there = |name: &&&str| Command::new(name).arg("--version").output().is_ok_and(|it| it.status.success());
    let Some(chromium) = browsers.iter().find(is_there) else {
        assert!(!is_required(), "expected one of {browsers:?}");
        return;
    };
    let (jobs, _) = with_all_ends(&["--html", "page.html"], &[]);
    let page = jobs.folder.read("page.html");
    assert!(!page.contains("src=") && !page.contains("http://www") && !page.contains("https://"), "nothing is fetched");
    let profile = jobs.folder.path("profile");
    let flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync --dump-dom";
    let output = Command::new(chromium)
        .args(flags.split(' '))
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("file://{}", jobs.folder.path("page.html").display()))
        .output()
        .unwrap();
    let dom = String::from_utf8(output.stdout).unwrap();
    for id in ["graph", "timeline", "jobs"] {
        assert_eq!(dom.matches(&format!("id=\"{id}\"")).count(), 1, "{id}: {dom}");
    }
    let rows = dom.split("id=\"jobs\"").nth(1).unwrap().matches("<tr").count();
    assert!(rows >= 14, "{rows} rows");
    assert!(dom.contains("last words") && dom.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert_eq!(dom.matches("<script").count(), 0);
}

#[test]
fn a_bar_is_shown_on_a_terminal_only() {
    let jobs = Jobs::of(hello("a", "") + &hello("b", ""));
    // util-linux has a terminal for whoever needs one
    let on_terminal = |env: &[(&str, &str)], flags: &str| {
        let mut script = Command::new("script");
        script
            .args(["-qefc", &format!("{} ci {flags}", crate::wrun::WRUN), "/dev/null"])
            .current_dir(jobs.folder.path("."));
        script.env_remove("CI").env("TERM", "xterm").envs(env.iter().copied());
        let output = script.stdin(std::process::Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("2 jobs: 2 passed"), "{text}");
        (text.contains("/2 "), text.contains("\u{1b}[32;1m"))
    };
    assert_eq!(on_terminal(&[], ""), (true, true));
    assert_eq!(on_terminal(&[("CI", "true")], ""), (false, true));
    assert_eq!(on_terminal(&[("TERM", "dumb")], ""), (false, false));
    assert_eq!(on_terminal(&[("NO_COLOR", "1")], "--progress plain"), (false, false));
    assert!(!jobs.wrun(&[]).run().stderr_text().contains("/2 "));
}

#[test]
fn a_folder_that_was_there_loses_nothing() {
    let jobs =
        Jobs::in_folder(Folder::new().folder("logs").file("logs/mine", "mine"), hello("a", "") + &hello("b", ""));
    let _ = jobs.wrun(&["--artifacts", "."]).run().code(0);
    assert_eq!(jobs.folder.names("logs"), ["a.stdout", "b.stdout", "mine"]);
    // what the run before left is gone, and nothing else; such a folder is version control's as before
    let _ = jobs.wrun(&["--artifacts", ".", "b"]).run().code(0);
    assert_eq!(jobs.folder.names("logs"), ["b.stdout", "mine"]);
    assert!(!jobs.folder.names(".").contains(&".gitignore".to_owned()));
    let record = jobs.folder.read("run.json").replace("logs/b.stdout", "wrun-ci.toml");
    fs::write(jobs.folder.path("run.json"), record).unwrap();
    let _ = jobs.wrun(&["--artifacts", "."]).run().code(0);
    // one run at a time
    let slow = Jobs::of(job("a", &["sleep"], "") + &hello("b", ""));
    let mut running = slow.wrun(&["--json", "-", "a"]).spawn();
    while !running.stdout_line().contains("\"job.start\"") {}
    let _ = slow.wrun(&["b"]).run().code(110).stderr_has("artifacts`: another run has it");
    running.signal(rustix::process::Signal::TERM);
    let _ = running.wait().code(143);
    let _ = slow.wrun(&["b"]).run().code(0);
}

#[test]
fn lines_are_shown_as_it_is_asked() {
    let text = hello("a", "") + &job("b", &["say", "said", "exit", "1"], "");
    let jobs = Jobs::of(text);
    let shown = |flags: &[&str]| jobs.wrun(flags).run().stdout_text();
    assert!(shown(&["--progress", "none"]).contains("FAIL [") && !shown(&["--progress", "none"]).contains("PASS ["));
    assert!(shown(&["--color", "always"]).contains("\u{1b}[32;1m        PASS\u{1b}[0m ["));
    assert!(!shown(&[]).contains('\u{1b}'));
    let with = |name: &str, value: &str| jobs.wrun(&[]).env(name, value).run().stdout_text().contains('\u{1b}');
    assert!(with("CLICOLOR_FORCE", "1") && !with("NO_COLOR", "1") && !with("TERM", "dumb"));
    for (output, of_a, of_b) in
        [("failure", false, true), ("always", true, true), ("never", false, false), ("final", true, true)]
    {
        let jobs = Jobs::of(format!(
            "[run]\noutput = '{output}'\n{}",
            hello("a", "") + &job("b", &["say", "said", "exit", "1"], "")
        ));
        let text = jobs.run(&[]).finished.stdout_text();
        assert_eq!(
            (text.contains("    | Hello, world!\n"), text.contains("    | said\n")),
            (of_a, of_b),
            "{output}: {text}"
        );
    }
    // of much only the end
    let jobs = Jobs::of(job("a", &["turns", "30", "trap"], ""));
    let text = jobs.run(&[]).finished.stdout_text();
    assert!(text.contains("--- stdout: a (last 20 of 30 lines; full: "), "{text}");
}
