//! The job file: what is wrong with it is told all at once, and where.

use std::fmt::Write as _;

use guest_artifacts::HELLO;
use serde_json::Value;

use crate::{
    ci::{Jobs, hello, job},
    wrun::{Folder, wrun},
};

/// What `wrun ci` says of a job file that is not as expected.
#[track_caller]
fn flaws(text: impl AsRef<[u8]>) -> String {
    let folder = Folder::new().file("wrun-ci.toml", text);
    folder.wrun(["ci"]).run().code(96).stdout("").stderr_text()
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let text = "version = 1\n[run]\njobs = 'many'\nnmae = 'x'\n[defaults]\nmemory = 'big'\n[[job]]\nid = 'A b'\nwasm = 'none.wasm'\n\
                memroy = '1MiB'\nneeds = ['c']\nmatrix = { n = [1], exclude = [{ m = 1 }] }\nargs = ['${matrix.o}']\n[[job]]\nid = 'd'\n[deafults]\n";
    let told = flaws(text);
    for flaw in [
        "wrun-ci.toml: line 3, column 8: expected a number of jobs, or `num-cpus`\n  3 | jobs = 'many'\n    |        ^^^^^^",
        "line 4, column 1: unknown field `nmae`, expected one of",
        "did you mean `name`?",
        "line 6, column 10: expected a size such as",
        "line 10, column 1: unknown field `memroy`; did you mean `memory`?",
        "missing field `wasm`",
        "line 16, column 2: unknown field `deafults`; did you mean `defaults`?",
    ] {
        assert!(told.contains(flaw), "{flaw}:\n{told}");
    }
    // what can be read is looked at for its meaning
    let text = "version = 1\n[[job]]\nid = 'A b'\nwasm = 'none.wasm'\nneeds = ['c']\nmatrix = { n = [1], exclude = [{ m = 1 }] }\n\
                args = ['${matrix.o}', '${']\ninputs = [{ from = 'x', to = 'in' }]\n[[job]]\nid = 'cc'\nwasm = 'none.wasm'\n";
    let told = flaws(text);
    for flaw in [
        "line 3, column 6: expected an id of at most 64 small letters, digits, `-` and `_`, found `A b`",
        "line 5, column 10: there is no job of the id `c`; did you mean `cc`?",
        "`exclude` names `m`, which the matrix does not have; did you mean `n`?",
        "`${matrix.o}` stands for nothing; did you mean `matrix.n`?",
        "expected `}` after `${`",
        "expected a path in the guest such as `/data`, found `in`",
    ] {
        assert!(told.contains(flaw), "{flaw}:\n{told}");
    }
}

#[test]
fn files_that_are_none_are_told() {
    assert!(flaws("").contains("expected `version = 1`, found no `version`"));
    assert!(
        flaws("version = 2\nnew = 1").ends_with(
            "this wrun reads version 1 of the format, found version 2\n  1 | version = 2\n    |           ^\n"
        )
    );
    assert!(flaws("version = 1").contains("expected at least one `[[job]]`"));
    assert!(flaws(b"version = 1\n\n\xff").contains("expected UTF-8, found other bytes in line 3"));
    assert!(
        flaws("version = 1\n".to_owned() + &"# x\n".repeat(3 << 20))
            .contains("expected a job file of at most 8388608 bytes")
    );
    assert!(flaws("version = 1\nx = \ny = [1\n").contains("line 2, column 5"));
    // a mark at the begin, and lines as other systems end them
    let dos = format!("\u{feff}version = 1\n{}", hello("a", "")).replace('\n', "\r\n");
    let _ = Folder::new().file("wrun-ci.toml", dos).wrun(["ci"]).run().code(0);
    let folder = Folder::new().folder("wrun-ci.toml");
    let _ = folder.wrun(["ci"]).run().code(96).stderr_has("expected a file");
}

#[test]
fn what_comes_later_is_refused_by_name() {
    let with = |key: &str| flaws(format!("version = 1\n{}", hello("a", key)));
    for (key, told) in [
        ("clock = 'fixed:2020-01-01T00:00:00Z'", "a fixed clock is not supported yet"),
        ("random = 'seeded:42'", "seeded random numbers are not supported yet"),
        ("nan = 'canonical'", "canonical NaNs are not supported yet"),
        ("cache = true", "the cache of results is not supported yet"),
        ("protocol = 'tap'", "protocols of test suites are not supported yet"),
        ("world = 'wasi:http'", "other worlds are not supported yet"),
        ("expect = { fuel-tolerance = '1%' }", "`fuel-tolerance` is not supported yet"),
        ("table-elements = 5", "is not supported yet"),
    ] {
        assert!(with(key).contains(told), "{}", with(key));
    }
    for wasm in ["oci://example/a:b", "sha256:00"] {
        assert!(
            flaws(format!("version = 1\n[[job]]\nid = 'a'\nwasm = '{wasm}'"))
                .contains("guests from a registry are not supported yet")
        );
    }
    let all = "clock = 'real'\nrandom = 'real'\nnan = 'native'\ncache = false\nprotocol = 'none'\nworld = 'wasi:cli'";
    let _ = Jobs::of(hello("a", all)).run(&[]).code(0);
    let jobs = Jobs::of(hello("a", ""));
    for flags in [&["explain-cache", "a"][..], &["fuel-baseline", "write"], &["--on", "nats://x"], &["--force"]] {
        let _ = jobs.wrun(flags).run().code(2).stderr_has("is not supported yet");
    }
}

#[test]
fn outputs_go_to_folders_of_their_own() {
    let out = |id: &str, to: &str| hello(id, &format!("outputs = [{{ from = '/out', to = '{to}' }}]"));
    for to in ["", ".", "./", "..", "a/../..", "/"] {
        assert!(flaws(format!("version = 1\n{}", out("a", to))).contains("expected a folder of its own"), "{to}");
    }
    for to in ["artifacts", "./artifacts/", "a/../artifacts"] {
        assert!(flaws(format!("version = 1\n{}", out("a", to))).contains("found that of all artifacts"), "{to}");
    }
    for (one, other) in [("out", "out"), ("out", "./a/../out/"), ("out", "out/deep"), ("out/deep", "out")] {
        let told = flaws(format!("version = 1\n{}{}", out("a", one), out("b", other)));
        assert!(told.contains("is where an output of"), "{told}");
    }
    let each = hello("a", "matrix = { n = [1, 2] }\noutputs = [{ from = '/out', to = 'out' }]");
    assert!(flaws(format!("version = 1\n{each}")).contains("is where an output of `a (n=1)` goes"));
    let _ = Jobs::of(out("a", "out/a") + &out("b", "out/ab") + &out("c", "artifacts/c")).run(&[]).code(0);
}

#[test]
fn times_without_end_are_times() {
    let ever = "'10000000000years'";
    let run = format!("[run]\ntotal-timeout = {ever}\nretries = {{ count = 1, delay = {ever} }}\n");
    let slow = format!("slow = {{ period = {ever}, terminate-after = 4000000000, grace = {ever} }}\n");
    for isolation in ["jail", "thread"] {
        let more = format!("timeout = {ever}\nisolation = '{isolation}'");
        let _ = Jobs::of(format!("{run}{slow}{}", hello("a", &more))).run(&[]).code(0);
    }
}

#[test]
fn files_that_have_no_end_are_refused() {
    let text = |key: &str, path: &str| {
        hello("a", &format!("{key} = {{ {} = '{path}' }}", if key == "stdin" { "file" } else { "stdout" }))
    };
    for key in ["stdin", "expect"] {
        for path in ["/dev/zero", ".", "none"] {
            let told = flaws(format!("version = 1\n{}", text(key, path)));
            assert!(told.contains(&format!("line 5, column {}: expected a file at `", key.len() + 4)), "{told}");
        }
    }
}

#[test]
fn jobs_that_wait_for_each_other_are_told() {
    let cycle = hello("a", "needs = ['b']") + &hello("b", "needs = ['a']") + &hello("c", "needs = ['a']");
    assert!(flaws(format!("version = 1\n{cycle}")).contains("jobs wait for each other: a -> b -> a"));
    assert!(
        flaws(format!("version = 1\n{}", hello("a", "needs = ['a']"))).contains("jobs wait for each other: a -> a")
    );
    assert!(flaws(format!("version = 1\n{}", hello("a", "").repeat(2))).contains("there is another job of the id `a`"));
}

#[test]
fn a_matrix_has_so_many_cells_and_no_more() {
    let numbers = |count: u32| (0..count).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    let of = |a: u32, b: u32| hello("m", &format!("matrix = {{ a = [{}], b = [{}] }}", numbers(a), numbers(b)));
    let listed = Jobs::of(of(16, 16)).wrun(&["-l"]).run().code(0).stdout_text();
    assert_eq!(listed.lines().count(), 256);
    assert!(flaws(format!("version = 1\n{}", of(257, 1))).contains("expected a matrix of 1 to 256 cells, found 257"));
    assert!(flaws(format!("version = 1\n{}", of(100, 100))).contains("found 10000"));
    assert!(flaws(format!("version = 1\n{}", hello("m", "matrix = {}"))).contains("found 0"));
    assert!(
        flaws(format!("version = 1\n{}", hello("m", "matrix = { n = [1, '1'] }")))
            .contains("the matrix has `m (n=1)` twice")
    );
    let some = hello("m", "matrix = { case = ['a', 'b'], size = [1, 1000], exclude = [{ case = 'b', size = 1000 }] }");
    let listed = Jobs::of(some).wrun(&["-l"]).run().code(0).stdout_text();
    assert_eq!(listed, "m (case=a,size=1)\nm (case=a,size=1000)\nm (case=b,size=1)\n");
}

#[test]
fn a_file_of_many_jobs_is_read() {
    let mut text = String::new();
    for n in 0..5000 {
        let _ = write!(
            text,
            "{}",
            hello(&format!("job-{n}"), &if n == 0 { String::new() } else { format!("needs = ['job-{}']", n - 1) })
        );
    }
    let jobs = Jobs::of(text);
    assert_eq!(jobs.wrun(&["-l"]).run().code(0).stdout_text().lines().count(), 5000);
    let listed = jobs.wrun(&["-l", "--json", "-", "job-2"]).run().code(0).stdout_json();
    assert_eq!(listed.as_array().unwrap().len(), 3);
    assert_eq!(listed[2]["needs"][0], "job-1");
}

#[test]
fn check_runs_nothing_and_says_what_could_not_be_run() {
    let good = Jobs::of(job("bad", &["exit", "1"], "") + &hello("a", ""));
    let _ = good.wrun(&["check"]).run().code(0).stdout("2 jobs, and nothing wrong\n").stderr("");
    assert_eq!(good.folder.names("artifacts"), [""; 0]);
    let one = Jobs::of(hello("a", ""));
    let _ = one.wrun(&["check"]).run().code(0).stdout("1 job, and nothing wrong\n");
    let handler = Jobs::of(format!("[[job]]\nid = 'a'\nwasm = '{}'\n", guest_artifacts::ECHO));
    let _ = handler.wrun(&["check"]).run().code(96).stderr_has("line 4, column 8: expected a command guest");
    let text = "[[job]]\nid = 'a'\nwasm = 'no.wasm'\n[[job]]\nid = 'b'\nwasm = 'also.wat'\n";
    let bad =
        Jobs::in_folder(Folder::new().file("no.wasm", "no").file("also.wat", "(module (func $f (call $g)))"), text);
    let told = bad.wrun(&["check"]).run().code(96).stderr_text();
    assert!(told.contains("line 4, column 8: expected WebAssembly") && told.contains("line 7, column 8: "), "{told}");
}

#[test]
fn a_guest_may_be_pinned() {
    let digest =
        String::from_utf8(std::process::Command::new("sha256sum").arg(HELLO).output().unwrap().stdout).unwrap();
    let digest = digest.split(' ').next().unwrap();
    let ran = Jobs::of(hello("a", &format!("sha256 = '{digest}'"))).run(&[]).code(0);
    assert_eq!(ran.job("a")["wasm_sha256"], digest);
    let other = Jobs::of(
        hello("b", "")
            + &hello(
                "a",
                &format!(
                    "sha256 = '{}'",
                    digest.replace(&digest[..1], if digest.starts_with('0') { "1" } else { "0" })
                ),
            ),
    );
    for flags in [&[][..], &["check"]] {
        let _ = other
            .wrun(flags)
            .run()
            .code(96)
            .stdout("")
            .stderr_has(&format!("is another guest: its SHA-256 is {digest}"));
    }
    assert!(
        flaws(format!("version = 1\n{}", hello("a", "sha256 = '12'"))).contains("expected the 64 hexadecimal digits")
    );
    // one that another job makes is looked at when it is there
    let guest = r#"(module (memory (export "memory") 1) (func (export "_start")))"#;
    let made = |pin: &str| {
        let make = job("make", &["write", "/out/guest.wat", guest], "outputs = [{ from = '/out', to = 'made' }]");
        let run = format!("[[job]]\nid = 'run'\nwasm = 'made/guest.wat'\nneeds = ['make']\nsha256 = '{pin}'\n");
        Jobs::of(make + &run).run(&[])
    };
    let found = made(digest).code(101);
    assert_eq!(found.end("run").0, "compile");
    let pin = found.end("run").1.rsplit(' ').next().unwrap().to_owned();
    assert_eq!(made(&pin).code(0).end("run").0, "pass");
}

#[test]
fn a_profile_says_what_is_otherwise() {
    let text = job("a", &["exit", "1"], "")
        + "[profile.ci.run]\nname = 'other'\nretries = 1\n[profile.ci.defaults]\nfuel = 5\n[profile.more]\n";
    let jobs = Jobs::of(text);
    assert_eq!(jobs.run(&[]).code(100).end("a").0, "fail");
    let ran = jobs.run(&["--profile", "ci"]).code(100);
    assert_eq!((ran.end("a").0, &ran.record["name"], &ran.record["profile"]), ("fuel", &"other".into(), &"ci".into()));
    assert_eq!(ran.job("a")["attempts"].as_array().unwrap().len(), 2);
    // where it is chosen by the environment it need not be there
    let finished = jobs.wrun(&[]).env("CI", "true").run();
    assert_eq!(jobs.ran(finished).record["profile"], "ci");
    let _ = Jobs::of(hello("a", "")).wrun(&[]).env("CI", "true").run().code(0);
    let _ = jobs.wrun(&["--profile", "mroe"]).run().code(96).stderr_has("found none; did you mean `more`?");
}

#[test]
fn the_schema_knows_every_key() {
    let schema = wrun(["ci", "schema"]).run().code(0).stdout_json();
    let keys =
        |name: &str| schema["$defs"][name]["properties"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    for key in ["id", "wasm", "needs", "matrix", "memory", "timeout", "isolation"] {
        assert!(keys("JobTable").contains(&key.to_owned()), "{key}");
    }
    assert!(keys("RunTable").contains(&"fail-fast".to_owned()));
    let described =
        |value: &Value| value["description"].is_string() || value["$ref"].is_string() || value["anyOf"].is_array();
    let job = schema["$defs"]["JobTable"]["properties"].as_object().unwrap();
    let silent: Vec<_> = job.iter().filter(|(_, value)| !described(value)).collect();
    assert!(silent.is_empty(), "{silent:?}");
}

#[test]
fn init_writes_a_file_that_works() {
    let folder = Folder::new().folder("build").file("build/no.wasm", "no").folder("deps");
    std::fs::copy(HELLO, folder.path("build/Hello World.wasm")).unwrap();
    std::fs::copy(HELLO, folder.path("hello-world.wasm")).unwrap();
    std::fs::copy(HELLO, folder.path("deps/other.wasm")).unwrap();
    let _ = folder.wrun(["ci", "init"]).run().code(0).stdout_has("with 2 jobs");
    let _ = folder.wrun(["ci", "check"]).run().code(0).stdout("2 jobs, and nothing wrong\n");
    let _ = folder.wrun(["ci"]).run().code(0).stdout_has("2 passed");
    assert_eq!(folder.wrun(["ci", "-l"]).run().stdout_text(), "hello-world\nhello-world-2\n");
    // what is there is not written over
    let _ = folder.wrun(["ci", "init"]).run().code(110).stderr_has("File exists");
    let empty = Folder::new();
    let _ = empty.wrun(["ci", "init"]).run().code(0).stdout_has("with 0 jobs");
    assert!(empty.read("wrun-ci.toml").contains("No guest was found here"));
}

#[test]
fn paths_are_from_the_files_folder() {
    let folder = Folder::new().folder(".config").folder("elsewhere").file("in.txt", "x");
    std::fs::copy(HELLO, folder.path("hello.wasm")).unwrap();
    let text = "version = 1\n[[job]]\nid = 'a'\nwasm = 'hello.wasm'\ninputs = [{ from = 'in.txt', to = '/in/x' }]";
    let folder = folder.file(".config/wrun-ci.toml", text);
    let _ = folder.wrun(["ci"]).run().code(0);
    assert_eq!(folder.names("artifacts"), [".gitignore", "logs", "run.json"]);
    let file = folder.path(".config/wrun-ci.toml").display().to_string();
    let elsewhere = folder.path("elsewhere").display().to_string();
    let _ = wrun(["ci", "-f", &file, "--artifacts", &elsewhere]).run().code(0);
    assert!(folder.names("elsewhere").contains(&"run.json".to_owned()));
}
