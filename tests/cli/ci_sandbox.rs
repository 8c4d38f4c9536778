//! What a job may touch and spend, each limit just under and just over, and what becomes of its files.

use std::{fmt::Write as _, fs, io::Write as _, os::unix::fs::symlink};

use guest_artifacts::{HELLO, HEXYL, HOSTILE_COMMAND, HOSTILE_COMMAND_P1, HOSTILE_THREADS, NET, RG};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::{
    ci::{Jobs, Ran, hello, job},
    wrun::Folder,
};

/// Jobs in a jail, and the same on a thread of wrun's own process.
const BOTH: [&str; 2] = ["", "isolation = 'thread'"];

/// How jobs end that differ in one limit.
#[track_caller]
fn ends(limit: &str, cases: &[(&str, &[&str])], more: &str) -> Ran {
    let jobs = cases
        .iter()
        .enumerate()
        .map(|(n, (value, act))| job(&format!("j{n}"), act, &format!("{limit} = {value}\n{more}")));
    Jobs::of(jobs.collect::<String>()).run(&[])
}

#[test]
fn memory_fuel_time_and_output_have_limits() {
    for more in BOTH {
        let ran = ends("memory", &[("'16MiB'", &["grow", "12"]), ("'16MiB'", &["grow", "16"])], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "memory")], "{more}");
        assert_eq!(ran.end("j1").1, "hit the memory limit of 16MiB");

        let used = ends("fuel", &[("1_000_000_000", &["say", "x"])], more);
        let used = used.job("j0")["attempts"][0]["fuel"].as_u64().unwrap();
        let (just, less) = (used.to_string(), (used * 9 / 10).to_string());
        let ran = ends("fuel", &[(&just, &["say", "x"]), (&less, &["say", "x"])], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "fuel")], "{more}");
        let ran = ends("expect.fuel-max", &[(&just, &["say", "x"]), (&less, &["say", "x"])], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "mismatch")], "{more}");
        assert_eq!(ran.end("j1").1, format!("expected at most {less} fuel, it used {used}"));

        let spin: &[&str] = &["spin"];
        let ran = ends("timeout", &[("'30s'", &["sleep", "20"]), ("'200ms'", &["sleep"]), ("'200ms'", spin)], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "timeout"), ("j2", "timeout")], "{more}");
        assert_eq!(ran.end("j2").1, "hit the time limit of 200ms");
        // what they had used by then is known
        for id in ["j1", "j2"] {
            let attempt = &ran.job(id)["attempts"][0];
            assert!(
                attempt["fuel"].as_u64() > Some(0) && attempt["memory_peak"].as_u64() > Some(0),
                "{more}: {attempt}"
            );
        }

        let ran = ends("stdout-max", &[("'100B'", &["flood", "100"]), ("'100B'", &["flood", "101"])], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "output")], "{more}");
        assert_eq!(ran.end("j1").1, "hit the output limit of 100B (stdout-max)");
        assert_eq!(ran.job("j1")["attempts"][0]["stdout"]["bytes"], 100);
        let ran = ends("stderr-max", &[("'4B'", &["stderr", "abc"]), ("'3B'", &["stderr", "abc"])], more);
        assert_eq!(ran.ends(), [("j0", "pass"), ("j1", "output")], "{more}");
    }
    // one that loops before it has begun ends as well
    let start = "(module (func $loop (loop $again (br $again))) (start $loop) (memory (export \"memory\") 1) (func (export \"_start\")))";
    for more in BOTH {
        let text = format!("[[job]]\nid = 'a'\nwasm = 'start.wat'\ntimeout = '200ms'\n{more}\n");
        let ran = Jobs::in_folder(Folder::new().file("start.wat", start), text).run(&[]).code(100);
        assert_eq!(ran.end("a"), ("timeout", "hit the time limit of 200ms"), "{more}");
    }
    // by default there is an end to it
    let ran = Jobs::of(job("a", &["flood"], "") + &job("b", &["grow"], "")).run(&[]).code(100);
    assert_eq!(ran.ends(), [("a", "output"), ("b", "memory")]);
    assert_eq!(ran.job("a")["attempts"][0]["stdout"]["bytes"], 1 << 20);
}

#[test]
fn files_have_limits() {
    let out = "outputs = [{ from = '/out', to = 'kept' }]";
    let fill = |bytes: &'static str| -> Vec<&'static str> { vec!["fill", "/out/x", bytes] };
    // each file, and all together
    let (just, more) = (fill("1000"), fill("1001"));
    let ran = ends("files-max", &[("'1000B'", &just)], out);
    assert_eq!(ran.ends(), [("j0", "pass")]);
    let ran = ends("files-max", &[("'1000B'", &more)], out);
    assert_eq!(ran.ends(), [("j0", "fail")], "a file that is too large is the guest's own error");
    let two = |files: &str, more: &str| {
        let ran = Jobs::in_folder(
            Folder::new().file("in/a", "x".repeat(600)),
            job(
                "a",
                &["fill", "/rw/b", "400"],
                &format!("files-max = '{files}'\ninputs = [{{ from = 'in', to = '/rw', mode = 'rw' }}]\n{more}"),
            ),
        );
        ran.run(&[]).end("a").0.to_owned()
    };
    assert_eq!((two("1000B", ""), two("999B", "")), ("pass".into(), "output".into()));
    assert_eq!((two("1000B", BOTH[1]), two("999B", BOTH[1])), ("pass".into(), "output".into()));
    // an output has a bound of its own
    let max = |max: &str| {
        job("a", &["fill", "/out/x", "1000"], &format!("outputs = [{{ from = '/out', to = 'kept', max = '{max}' }}]"))
    };
    assert_eq!(Jobs::of(max("1000B")).run(&[]).code(0).end("a").0, "pass");
    let ran = Jobs::of(max("999B")).run(&[]).code(100);
    assert_eq!(
        ran.end("a"),
        ("output", "what it left in `/out` is not kept: expected at most 999B of files, found 1000 bytes")
    );
    // open files
    let fill = job("fill", &["fill", "/out/x", "1"], out);
    let input = "inputs = [{ from = 'kept', to = '/in' }]\nneeds = ['fill']\nopen-files = 20";
    let text = fill + &job("few", &["open", "/in/x", "20"], input) + &job("many", &["open", "/in/x", "40"], input);
    let jobs = Jobs::of(text);
    let ran = jobs.run(&[]).code(100);
    assert_eq!(ran.ends(), [("fill", "pass"), ("few", "pass"), ("many", "fail")]);
    assert!(!jobs.folder.names("artifacts/logs").contains(&"many.stdout".to_owned()));
}

#[test]
fn threads_have_a_limit() {
    let threads =
        |id: &str, more: &str| format!("[[job]]\nid = '{id}'\nwasm = '{HOSTILE_THREADS}'\nargs = ['bomb']\n{more}\n");
    let text = threads("none", "")
        + &threads("some", "threads = 4")
        + &threads("here", "isolation = 'thread'")
        + &threads("fuel", "fuel = 5");
    let jobs = Jobs::of(text);
    let ran = jobs.run(&[]);
    let made = |id: &str| jobs.folder.read(&format!("artifacts/logs/{id}.stdout"));
    assert!(made("none").starts_with("0 threads, then") && made("some").starts_with("4 threads, then"));
    assert_eq!(
        ran.end("here"),
        ("compile", "a guest with threads has a process of its own: expected `isolation = \"jail\"`")
    );
    assert_eq!(ran.end("fuel"), ("compile", "fuel is not metered across threads: expected no `fuel`"));
}

#[test]
fn nothing_of_the_host_is_there() {
    let text = job("file", &["read", "/etc/passwd"], "")
        + &job("ls", &["ls", "/"], "")
        + &job("net", &["connect", "127.0.0.1:1"], "");
    let ran = Jobs::of(&text).run(&[]).code(100);
    assert_eq!(ran.ends(), [("file", "fail"), ("ls", "fail"), ("net", "fail")]);
    // a connection is there when it is granted, and a job that lacks it is told which grant that is
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let net = |id: &str, more: &str| {
        format!("[[job]]\nid = '{id}'\nwasm = '{NET}'\nargs = ['connect', '{address}']\n{more}\n")
    };
    for isolation in BOTH {
        let allowed = net("yes", &format!("network = {{ allow = ['{address}'] }}\n{isolation}"));
        let denied = net("no", &format!("network = 'none'\n{isolation}"));
        let jobs = Jobs::of(allowed + &denied);
        let ran = jobs.run(&["no"]).code(100);
        assert_eq!(ran.end("no").0, "fail");
        assert!(
            ran.end("no").1.contains(&format!("`network = {{ allow = [\"{address}\"] }}` would allow it"))
                || isolation.is_empty(),
            "{:?}",
            ran.end("no")
        );
        let accepts = std::thread::spawn({
            let server = server.try_clone().unwrap();
            move || server.accept().and_then(|(mut client, _)| client.write_all(b"welcome\n"))
        });
        assert_eq!(jobs.run(&["yes"]).code(0).end("yes").0, "pass");
        assert_eq!(jobs.folder.read("artifacts/logs/yes.stdout"), "welcome\n");
        accepts.join().unwrap().unwrap();
    }
}

#[test]
fn inputs_are_copies() {
    let folder = Folder::new().file("in/a.txt", "a").file("in/deep/b.txt", "b");
    symlink("a.txt", folder.path("in/link")).unwrap();
    let input = |mode: &str| {
        format!(
            "inputs = [{{ from = 'in', to = '/in', mode = '{mode}' }}, {{ from = 'in/a.txt', to = '/other/name' }}]"
        )
    };
    for isolation in BOTH {
        let with = |id: &str, act: &[&str], mode: &str| job(id, act, &format!("{}\n{isolation}", input(mode)));
        let text = with("deep", &["read", "/in/deep/b.txt"], "ro")
            + &with("link", &["read", "/in/link"], "ro")
            + &with("one", &["read", "/other/name"], "ro")
            + &with("ro", &["write", "/in/a.txt", "new"], "ro")
            + &with("rw", &["write", "/in/a.txt", "new"], "rw");
        let jobs = Jobs { folder: folder.clone().file("wrun-ci.toml", format!("version = 1\n{text}")) };
        let ran = jobs.run(&[]).code(100);
        let pass = ran.ends().into_iter().filter(|(_, end)| *end == "pass").map(|(job, _)| job).collect::<Vec<_>>();
        assert_eq!(pass, ["deep", "link", "one", "rw"], "{}", ran.finished.transcript());
        assert_eq!(jobs.folder.read("in/a.txt"), "a");
        assert_eq!(jobs.folder.read("artifacts/logs/link.stdout"), "a");
    }
}

#[test]
fn inputs_that_lead_elsewhere_are_refused() {
    let text = hello("a", "inputs = [{ from = 'in', to = '/in' }]");
    let refused = |make: &dyn Fn(&Folder), told: &str| {
        let folder = Folder::new().folder("in");
        make(&folder);
        let _ = Jobs::in_folder(folder, &text).run(&[]).finished.code(96).stderr_has(told);
    };
    refused(&|folder| symlink("/etc/passwd", folder.path("in/x")).unwrap(), "is a link out of");
    refused(&|folder| symlink("../wrun-ci.toml", folder.path("in/x")).unwrap(), "in/x`");
    refused(&|folder| mknodat(CWD, folder.path("in/x"), FileType::Fifo, Mode::RUSR, 0).unwrap(), "is a special file");
    refused(&|folder| fs::remove_dir(folder.path("in")).unwrap(), "expected a file or a folder at");
    // one that another job makes is looked at when it is there
    let made = job("make", &["write", "/out/x", "1"], "outputs = [{ from = '/out', to = 'in/made' }]")
        + &hello("use", "inputs = [{ from = 'in/made/y', to = '/in/y' }]\nneeds = ['make']");
    let ran = Jobs::of(made).run(&[]).code(103);
    assert_eq!(ran.end("use").0, "infra");
    assert!(ran.end("use").1.starts_with("could not read the input"), "{:?}", ran.end("use"));
}

#[test]
fn outputs_are_kept_as_a_whole_or_not_at_all() {
    let out = "outputs = [{ from = '/out', to = 'kept/deep', required = true }]";
    let jobs = Jobs::of(job("a", &["write", "/out/${attempt}", "new"], out) + "retries = 1\nexpect = { exit = 1 }\n");
    // a folder that it has made itself is replaced with each attempt and each run
    for _ in 0..2 {
        let _ = jobs.run(&[]).code(100);
        assert_eq!(
            (jobs.folder.names("kept"), jobs.folder.names("kept/deep")),
            (vec!["deep".into()], vec!["2".into()])
        );
    }
    // from one that was there before nothing is removed
    fs::remove_dir_all(jobs.folder.path("artifacts")).unwrap();
    fs::write(jobs.folder.path("kept/deep/mine"), "mine").unwrap();
    fs::write(jobs.folder.path("kept/deep/1"), "old").unwrap();
    for _ in 0..2 {
        let _ = jobs.run(&[]).code(100);
        assert_eq!(jobs.folder.names("kept/deep"), ["1", "2", "mine"]);
        assert_eq!(
            (jobs.folder.read("kept/deep/1"), jobs.folder.read("kept/deep/mine")),
            ("new".into(), "mine".into())
        );
    }
    // what a job leaves that fails, is kept, too
    let ran = Jobs::of(job("a", &["write", "/out/x", "new"], &format!("{out}\nexpect = {{ exit = 5 }}")));
    assert_eq!(ran.run(&[]).code(100).end("a").0, "fail");
    assert_eq!(ran.folder.read("kept/deep/x"), "new");
    let ran = Jobs::of(hello("a", out)).run(&[]).code(100);
    assert_eq!(ran.end("a"), ("output", "expected files in `/out`, found none"));
    // where it cannot be written
    let jobs = Jobs::in_folder(Folder::new().file("kept", "a file"), job("a", &["write", "/out/x", "new"], out));
    let ran = jobs.run(&[]).code(110);
    assert!(ran.finished.stdout_text().contains("WARNING could not write to"), "{}", ran.finished.transcript());
    let jobs =
        Jobs::in_folder(Folder::new().folder("kept").folder("other"), job("a", &["write", "/out/x", "new"], out));
    symlink("../other", jobs.folder.path("kept/deep")).unwrap();
    let _ = jobs.run(&[]).code(110);
    assert_eq!(jobs.folder.names("other"), [""; 0]);
}

#[test]
fn outputs_that_are_no_plain_files_are_refused() {
    // a module in text form that does with its folder, the first one, what a guest in Rust would not
    let guest = |call: &str| {
        format!(
            r#"(module
                (import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
                (import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
                (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
                (memory (export "memory") 1)
                (data (i32.const 0) "../wrun-ci.toml")
                (data (i32.const 32) "a\0ab")
                (data (i32.const 48) "dddddddd")
                (func (export "_start") {call}))"#
        )
    };
    let out = "outputs = [{ from = '/out', to = 'kept' }]";
    let link = "(call $exit (call $symlink (i32.const 0) (i32.const 15) (i32.const 3) (i32.const 32) (i32.const 1)))";
    let name = "(call $exit (call $mkdir (i32.const 3) (i32.const 32) (i32.const 3)))";
    // eight letters that count up: more folders than are kept
    let many = "(local $n i32) (loop $l
        (i32.store (i32.const 48) (i32.or (i32.const 0x40404040) (i32.and (local.get $n) (i32.const 0x0f0f0f0f))))
        (i32.store (i32.const 52) (i32.or (i32.const 0x40404040) (i32.and (i32.shr_u (local.get $n) (i32.const 4)) (i32.const 0x0f0f0f0f))))
        (drop (call $mkdir (i32.const 3) (i32.const 48) (i32.const 8)))
        (br_if $l (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 10300))))";
    for (call, told) in [
        (link, "expected files and folders, found a link: `a`"),
        (name, "expected names without control characters"),
        (many, "expected at most 10000 files, found more"),
    ] {
        let jobs = Jobs::in_folder(
            Folder::new().file("guest.wat", guest(call)),
            format!("[[job]]\nid = 'a'\nwasm = 'guest.wat'\n{out}\n"),
        );
        let ran = jobs.run(&[]).code(100);
        assert_eq!(ran.end("a").0, "output", "{}", ran.finished.transcript());
        assert!(ran.end("a").1.contains(told), "{:?}", ran.end("a"));
        assert!(!jobs.folder.names(".").contains(&"kept".to_owned()));
    }
}

#[test]
fn a_secret_in_an_output_fails_the_job() {
    let out = "outputs = [{ from = '/out', to = 'kept' }]\nsecrets = ['TOKEN']";
    let write = |text: &str| Jobs::of(job("a", &["write", "/out/x", text], out));
    let run = |jobs: &Jobs| jobs.ran(jobs.wrun(&[]).env("TOKEN", "hunter22").run());
    let ran = run(&write("the token is hunter22!"));
    assert_eq!(ran.code(100).end("a"), ("output", "a secret is in `x`"));
    let named = Jobs::of(job("a", &["write", "/out/hunter22", "x"], out));
    assert!(run(&named).code(100).end("a").1.ends_with("a secret is in the name of a file"));
    assert!(!named.folder.names(".").contains(&"kept".to_owned()));
    assert_eq!(run(&write("the token is hunter2!")).code(0).end("a").0, "pass");
}

#[test]
fn nothing_is_left_of_a_run() {
    let out = "outputs = [{ from = '/out', to = 'kept' }]";
    let text = job("a", &["write", "/out/x", "1"], out) + &job("b", &["trap"], &out.replace("kept", "other"));
    let jobs = Jobs::in_folder(Folder::new().folder("tmp"), text);
    let tmp = jobs.folder.path("tmp");
    let _ = jobs.wrun(&[]).env("TMPDIR", &tmp).run().code(100);
    assert_eq!(jobs.folder.names("tmp"), [""; 0]);
    assert_eq!(jobs.folder.names("artifacts"), [".gitignore", "run.json"]);
    assert_eq!(jobs.folder.read("artifacts/.gitignore"), "*\n");
}

#[test]
fn programs_that_many_use_are_jobs() {
    let root = env!("CARGO_MANIFEST_DIR");
    let text = format!(
        "[[job]]\nid = 'search'\nwasm = '{RG}'\nargs = ['--sort', 'path', '--count', '--only-matching', 'interface', '/in']\n\
         inputs = [{{ from = '{root}/wit', to = '/in' }}]\n\
         [[job]]\nid = 'none'\nwasm = '{RG}'\nargs = ['no such words', '/in']\ninputs = [{{ from = '{root}/wit', to = '/in' }}]\n\
         [[job]]\nid = 'dump'\nwasm = '{HEXYL}'\nargs = ['--color=never', '--border=none', '--length=8', '/in/guest']\n\
         inputs = [{{ from = '{HELLO}', to = '/in/guest' }}]\n"
    );
    let jobs = Jobs::of(text);
    let ran = jobs.run(&[]).code(100);
    assert_eq!(ran.ends(), [("search", "pass"), ("none", "fail"), ("dump", "pass")]);
    // what it finds is what is there
    let mut expected = String::new();
    let mut names: Vec<_> =
        fs::read_dir(format!("{root}/wit")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    for name in names {
        let name = name.to_str().unwrap();
        let count = fs::read_to_string(format!("{root}/wit/{name}")).unwrap().matches("interface").count();
        if count > 0 {
            let _ = writeln!(expected, "/in/{name}:{count}");
        }
    }
    assert_eq!(jobs.folder.read("artifacts/logs/search.stdout"), expected);
    assert!(jobs.folder.read("artifacts/logs/dump.stdout").contains("00 61 73 6d 0d 00 01 00"));
}

#[test]
fn guests_of_both_forms_are_jobs() {
    let text = [HOSTILE_COMMAND, HOSTILE_COMMAND_P1, HELLO].iter().enumerate();
    let text = text
        .map(|(n, guest)| format!("[[job]]\nid = 'g{n}'\nwasm = '{guest}'\nargs = ['exit', '0']\n"))
        .collect::<String>();
    let handler = format!("[[job]]\nid = 'handler'\nwasm = '{}'\n", guest_artifacts::ECHO);
    for isolation in BOTH {
        let handler = format!("{handler}{isolation}\n");
        let ran = Jobs::of(text.clone() + &handler).run(&[]).code(101);
        assert_eq!(ran.ends(), [("g0", "pass"), ("g1", "pass"), ("g2", "pass"), ("handler", "compile")]);
    }
}
