//! `wrun compile` and what is kept of it: a cache that nobody else may write to, and files the user vouches for.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use guest_artifacts::{CAT, ECHO, HELLO, HELLO_P1};

use crate::wrun::{Finished, Folder, WRUN};

/// The cache of [`Wrun::private_cache`](crate::wrun::Wrun::private_cache).
const CACHE: &str = "cache/wrun";

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").mode() & 0o777
}

/// What changes when a file is written again, however that is done.
fn identity(path: &Path) -> (u64, i64, i64) {
    let meta = fs::metadata(path).expect("it is there");
    (meta.ino(), meta.mtime(), meta.mtime_nsec())
}

trait Hello {
    fn says_hello(self) -> Finished;
}

impl Hello for Finished {
    #[track_caller]
    fn says_hello(self) -> Finished {
        self.code(0).stdout("Hello, world!\n").stderr("")
    }
}

/// Compiles into the folder's own cache, and answers the entry.
fn compile(folder: &Folder, guest: &str) -> PathBuf {
    let printed = folder.wrun(["compile", guest]).private_cache().run().code(0).stderr("").stdout_text();
    PathBuf::from(printed.strip_suffix('\n').expect("one line"))
}

fn run(folder: &Folder, guest: &str) -> Finished {
    folder.wrun(["run", guest]).private_cache().run()
}

#[test]
fn the_cache_is_filled_with_what_only_the_user_can_touch() {
    for guest in [HELLO, HELLO_P1, ECHO] {
        let folder = Folder::new();
        let entry = compile(&folder, guest);
        assert_eq!(entry.parent(), Some(&*folder.path(CACHE)));
        assert_eq!(folder.names(CACHE), [entry.file_name().unwrap().to_string_lossy()]);
        assert_eq!((mode(&entry), mode(&folder.path(CACHE))), (0o600, 0o700));
    }
}

#[test]
fn a_guest_is_compiled_once() {
    for guest in [HELLO, HELLO_P1] {
        let folder = Folder::new();
        let entry = compile(&folder, guest);
        let first = identity(&entry);
        assert_eq!(compile(&folder, guest), entry);
        run(&folder, guest).says_hello();
        run(&folder, guest).says_hello();
        assert_eq!(identity(&entry), first);
        assert_eq!(folder.names(CACHE).len(), 1);
    }
}

#[test]
fn a_run_fills_the_cache_too() {
    let folder = Folder::new();
    run(&folder, HELLO).says_hello();
    let names = folder.names(CACHE);
    let entry = folder.path(CACHE).join(&names[0]);
    let first = identity(&entry);
    assert_eq!(compile(&folder, HELLO), entry);
    assert_eq!((identity(&entry), folder.names(CACHE)), (first, names));
}

#[test]
fn an_entry_is_named_by_content_and_flags() {
    let folder = Folder::new().file("copy.wasm", fs::read(HELLO).unwrap());
    let entry = compile(&folder, HELLO);
    assert_eq!(compile(&folder, "copy.wasm"), entry, "the same content");
    assert_ne!(compile(&folder, HELLO_P1), entry, "another content");
    let with = |flag| folder.wrun(["compile", flag, HELLO]).private_cache().run().code(0).stdout_text();
    let others = [with("--epoch"), with("--fuel")];
    assert!(others[0] != others[1] && others.iter().all(|other| other.trim_end() != entry.to_str().unwrap()));
    assert_eq!(folder.names(CACHE).len(), 4);
    // what the fuel is metered in is not what runs without
    folder.wrun(["run", "--fuel", "1000000000", HELLO]).private_cache().run().says_hello();
    run(&folder, HELLO).says_hello();
    assert_eq!(folder.names(CACHE).len(), 4);
}

#[test]
fn a_damaged_entry_is_compiled_again() {
    for guest in [HELLO, HELLO_P1] {
        let folder = Folder::new();
        let entry = compile(&folder, guest);
        let whole = fs::read(&entry).unwrap();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        for damaged in [
            flipped(0),
            flipped(whole.len() / 3),
            flipped(whole.len() / 2),
            flipped(whole.len() - 60),
            flipped(whole.len() - 1),
            whole[..whole.len() / 2].to_vec(),
            whole[..whole.len() - 1].to_vec(),
            b"not what it was".to_vec(),
            vec![],
        ] {
            fs::write(&entry, &damaged).unwrap();
            run(&folder, guest).code(0).stdout("Hello, world!\n");
            assert!(fs::read(&entry).unwrap() == whole, "the entry is as it was");
            assert_eq!(folder.names(CACHE).len(), 1);
        }
    }
}

#[test]
fn an_entry_goes_when_nobody_has_needed_it_for_a_month() {
    let folder = Folder::new();
    let aged = |guest, days: u64| {
        let entry = compile(&folder, guest);
        let then = SystemTime::now() - Duration::from_hours(days * 24);
        fs::File::open(&entry).unwrap().set_modified(then).unwrap();
        entry
    };
    let (old, younger, used) = (aged(HELLO, 30), aged(HELLO_P1, 29), aged(CAT, 40));
    folder.wrun(["run", CAT]).private_cache().run().code(0);
    compile(&folder, ECHO);
    assert!(!old.exists());
    assert!(younger.exists() && used.exists());
}

#[test]
fn an_entry_that_cannot_be_replaced_is_no_obstacle() {
    let folder = Folder::new();
    let entry = compile(&folder, HELLO);
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    run(&folder, HELLO).code(0).stdout("Hello, world!\n");
    assert_eq!(folder.names(CACHE).len(), 1, "nothing was left beside it");
}

#[test]
fn precompiled_code_runs_without_its_guest() {
    for guest in [HELLO, HELLO_P1] {
        let folder = Folder::new().file("hello.wasm", fs::read(guest).unwrap());
        let compiled = folder.wrun(["compile", "hello.wasm", "-o", "hello.cwasm"]).private_cache().run();
        compiled.code(0).stdout("").stderr("");
        assert_eq!(folder.names(""), ["hello.cwasm", "hello.wasm"], "no cache, nothing temporary");
        assert_eq!(mode(&folder.path("hello.cwasm")), 0o600);
        fs::remove_file(folder.path("hello.wasm")).unwrap();
        folder.wrun(["run", "--precompiled", "hello.cwasm"]).private_cache().run().says_hello();
        folder.wrun(["run", "--precompiled", "--timeout=1h", "--stack=1MiB", "hello.cwasm"]).run().says_hello();
        assert_eq!(folder.names(""), ["hello.cwasm"]);
    }
}

#[test]
fn precompiled_code_runs_only_when_it_is_asked_for() {
    let folder = Folder::new();
    folder.wrun(["compile", HELLO, "-o", "hello.cwasm"]).run().code(0);
    for command in ["run", "inspect", "compile"] {
        folder.wrun([command, "hello.cwasm"]).run().code(126).error(
            "expected WebAssembly (a binary or WAT text), \
             found a native program or precompiled code (--precompiled runs what you trust)",
        );
    }
}

const MAKE_AGAIN: &str =
    "make it again with `wrun compile -o`, by this wrun, with `--fuel` if it runs with that, and without `--epoch`";

#[test]
fn damaged_precompiled_code_is_refused() {
    let folder = Folder::new();
    folder.wrun(["compile", HELLO, "-o", "hello.cwasm"]).run().code(0);
    let whole = fs::read(folder.path("hello.cwasm")).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let a_guest = fs::read(HELLO).unwrap();
    for bytes in [&flipped[..], &whole[..whole.len() - 1], &whole[1..], b"", b"text", &a_guest] {
        fs::write(folder.path("hello.cwasm"), bytes).unwrap();
        folder
            .wrun(["run", "--precompiled", "hello.cwasm"])
            .run()
            .code(126)
            .error_and_hint("precompiled code does not fit: the file is damaged, or not made by wrun", MAKE_AGAIN);
    }
}

#[test]
fn precompiled_code_of_other_flags_is_refused() {
    let folder = Folder::new();
    let refused = |flags: &[&str], file, reason: &str| {
        let ran = folder.wrun(["run", "--precompiled"]).args(flags).args([file]).run().code(126);
        ran.error_and_hint(&format!("precompiled code does not fit: {reason}"), MAKE_AGAIN)
    };
    folder.wrun(["compile", HELLO, "-o", "plain"]).run().code(0);
    folder.wrun(["compile", "--fuel", HELLO, "-o", "fuel"]).run().code(0);
    folder.wrun(["compile", "--epoch", HELLO, "-o", "epoch"]).run().code(0);

    refused(&[], "fuel", "Module was compiled with fuel support but it is not enabled for the host");
    folder.wrun(["run", "--precompiled", "--fuel=1000000000", "fuel"]).run().says_hello();
    refused(&["--fuel=1000"], "plain", "Module was compiled without fuel support but it is enabled for the host");

    // `run` has no need for checks: at its deadline the process goes
    let reason = "Module was compiled with epoch interruption but it is not enabled for the host";
    refused(&[], "epoch", reason);
    refused(&["--timeout=1h"], "epoch", reason);
}

#[test]
fn precompiled_code_of_another_shape_is_refused() {
    let folder = Folder::new();
    folder.wrun(["compile", ECHO, "-o", "echo.cwasm"]).run().code(0);
    folder
        .wrun(["run", "--precompiled", "echo.cwasm"])
        .run()
        .code(126)
        .error_and_hint("expected a command guest, found a handler guest (component)", "use `wrun cluster`");
}

#[test]
fn a_cache_that_others_may_enter_is_not_used() {
    for bits in [0o755, 0o770, 0o701] {
        let folder = Folder::new().folder("open");
        fs::set_permissions(folder.path("open"), fs::Permissions::from_mode(bits)).unwrap();
        folder.wrun(["run", "--cache-dir", "open", HELLO]).run().code(0).stdout("Hello, world!\n");
        folder.wrun(["compile", "--cache-dir", "open", HELLO]).run().code(2).stdout("").stderr_has(NO_CACHE);
        assert_eq!(folder.names("open"), [""; 0]);
        assert_eq!(mode(&folder.path("open")), bits, "it is the user's to close");
    }
}

const NO_CACHE: &str = "wrun: error: there is no cache to compile into; give a file with `-o`\n";

#[test]
fn a_cache_that_belongs_to_somebody_else_is_not_used() {
    let folder = Folder::new().folder("theirs");
    let theirs = if rustix::process::geteuid().is_root() {
        fs::set_permissions(folder.path("theirs"), fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(folder.path("theirs"), Some(65_534), None).unwrap();
        folder.path("theirs")
    } else {
        PathBuf::from("/")
    };
    let ran = folder.wrun(["run", "--cache-dir"]).args([&theirs]).args([HELLO]).run();
    ran.code(0).stdout("Hello, world!\n");
    let compiled = folder.wrun(["compile", "--cache-dir"]).args([&theirs]).args([HELLO]).run();
    compiled.code(2).stdout("").stderr_has(NO_CACHE);
    assert_eq!(folder.names("theirs"), [""; 0]);
}

#[test]
fn a_cache_that_cannot_be_made_is_no_obstacle() {
    let folder = Folder::new().file("file", "");
    for cache in ["file", "file/below", "/proc/none"] {
        folder.wrun(["run", "--cache-dir", cache, HELLO]).run().code(0).stdout("Hello, world!\n");
    }
}

/// In a mount namespace of its own, with a file system that has no room for the code.
#[test]
fn a_cache_on_a_full_disk_is_no_obstacle() {
    let folder = Folder::new().folder("small");
    let script = "mount -t tmpfs -o size=16k,mode=700 none small && \"$0\" run --cache-dir small \"$1\" && ls -A small";
    let run = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", script, WRUN, HELLO])
        .current_dir(folder.path(""))
        .output()
        .expect("unshare is there");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(run.status.success(), "{}", text(&run.stderr));
    // and nothing that is half there
    assert_eq!(text(&run.stdout), "Hello, world!\n");
    assert!(text(&run.stderr).contains("compiled code is not kept"), "{}", text(&run.stderr));
}

#[test]
fn the_cache_may_be_elsewhere_or_nowhere() {
    let folder = Folder::new();
    folder.wrun(["run", "--cache-dir", "deep/er/cache", HELLO]).private_cache().run().says_hello();
    assert_eq!(folder.names("deep/er/cache").len(), 1);
    assert_eq!(mode(&folder.path("deep/er/cache")), 0o700);
    assert_eq!(folder.names(""), ["deep"]);

    let folder = Folder::new();
    folder.wrun(["run", "--no-cache", HELLO]).private_cache().run().says_hello();
    folder.wrun(["compile", "--no-cache", HELLO]).private_cache().run().code(2).stdout("").stderr(NO_CACHE);
    assert_eq!(folder.names(""), [""; 0]);

    // without a place for it there is none; what is not an absolute path is none
    folder.wrun(["run", HELLO]).env("XDG_CACHE_HOME", "relative").run().says_hello();
    assert_eq!(folder.names(""), [""; 0]);
    let home = folder.wrun(["run", HELLO]).env("XDG_CACHE_HOME", "").env("HOME", folder.path("home")).run();
    home.says_hello();
    assert_eq!(folder.names("home/.cache/wrun").len(), 1);
}

#[test]
fn a_compilation_that_fails_leaves_nothing() {
    let folder = Folder::new().file("bad.wat", "(module (func (call 7)))");
    folder.wrun(["compile", "bad.wat"]).private_cache().run().code(126).stdout("");
    folder.wrun(["compile", "bad.wat", "-o", "bad.cwasm"]).private_cache().run().code(126).stdout("");
    assert_eq!((folder.names(""), folder.names(CACHE)), (vec!["bad.wat".into(), "cache".into()], vec![]));

    let folder = Folder::new().folder("folder");
    let into = |output| folder.wrun(["compile", HELLO, "-o", output]).private_cache().run().code(125);
    into("none/x").error("could not write the compiled guest: No such file or directory (os error 2)");
    into("folder").error("could not write the compiled guest: Is a directory (os error 21)");
    assert_eq!(folder.names(""), ["folder"]);
}

#[test]
fn a_guest_that_would_be_quoted_at_length_is_refused_for_its_own_reason() {
    let long = "x".repeat(3 << 20);
    let folder = Folder::new()
        .file("line.wat", format!(r#"(module (func (call $f)) (data "{long}"))"#))
        .file("comment.wat", format!("(module (;{long}"))
        // each of these is six bytes in JSON
        .file(
            "name.wat",
            format!(r#"(module (import "{0}" "{0}" (func)) (func (export "_start")))"#, "\\01".repeat(99_999)),
        );
    for (guest, reason) in [
        ("line.wat", "not a valid guest: unknown func: failed to find name `$f` --> <anon>:1:21 | 1 | (module"),
        ("comment.wat", "not a valid guest: unterminated block comment --> <anon>:1:9 | 1 | (module (;xxx"),
        ("name.wat", "it imports `\\u{1}\\u{1}"),
    ] {
        let ran = folder.wrun(["compile", guest, "-o", "out"]).run().code(126).stderr_has(reason);
        assert!(ran.stderr_text().len() < 10_000, "{guest}: {} bytes", ran.stderr_text().len());
    }
    // the shape of a guest is told, however much else there would be to tell
    let exports: String = (0..60_000).map(|n| format!(r#"(export "a long enough name {n}" (func 0))"#)).collect();
    let folder = Folder::new().file("names.wat", format!("(module (func) {exports})"));
    folder
        .wrun(["cluster", "names.wat"])
        .run()
        .code(126)
        .stderr_has("expected a handler guest, found a core module that exports nothing wrun can run");
}

#[test]
fn many_may_compile_the_same_guest_at_once() {
    for guest in [HELLO, HELLO_P1] {
        let folder = Folder::new();
        let all: Vec<_> = (0..8).map(|_| folder.wrun(["run", guest]).private_cache().spawn()).collect();
        for one in all {
            one.wait().says_hello();
        }
        let names = folder.names(CACHE);
        assert!(names.len() == 1 && !names[0].contains("tmp"), "{names:?}");
        run(&folder, guest).says_hello();
    }
}
