//! What is taken for a guest and what is not: one line that names the cause, a hint when there is one, and a code.

use std::{fs, os::unix::fs::PermissionsExt as _};

use guest_artifacts::{ECHO, HELLO, HELLO_P1};

use crate::wrun::{Finished, Folder, WRUN, wrun};

/// Runs a guest of this text.
fn run_text(text: &str) -> Finished {
    Folder::new().file("guest.wat", text).wrun(["run", "guest.wat"]).run()
}

/// Runs, inspects and compiles what is no guest: all three say the same.
#[track_caller]
fn all_refuse(folder: &Folder, guest: &str, code: i32, error: &str) {
    for command in ["run", "inspect", "compile"] {
        folder.wrun([command, guest]).run().code(code).error(error);
    }
}

#[test]
fn what_is_not_there_is_127() {
    let folder = Folder::new();
    all_refuse(&folder, "none.wasm", 127, "no such guest: `none.wasm`");
    all_refuse(&folder, "none/none.wasm", 127, "no such guest: `none/none.wasm`");
    let below_a_file = format!("{HELLO}/x");
    all_refuse(&folder, &below_a_file, 127, &format!("no such guest: `{below_a_file}`"));
    folder.wrun(["run", "--precompiled", "none.cwasm"]).run().code(127).error("no such guest: `none.cwasm`");
    let folder = folder.link("dangling.wasm", "gone.wasm");
    all_refuse(&folder, "dangling.wasm", 127, "no such guest: `dangling.wasm`");
}

#[test]
fn what_is_not_a_file_is_126_and_never_waited_for() {
    let folder = Folder::new().folder("folder");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, folder.path("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for (path, found) in [
        ("folder", "a folder"),
        // nobody will ever write to it
        ("pipe", "a pipe (use `-` for standard input)"),
        ("/dev/zero", "a special file"),
    ] {
        let error = format!("expected a file, but `{path}` is {found}");
        if path != "folder" {
            // of which `inspect` says what would be served
            all_refuse(&folder, path, 126, &error);
        }
        folder.wrun(["run", "--precompiled", path]).run().code(126).error(&error);
    }
}

#[test]
fn what_is_no_webassembly_is_126() {
    let folder = Folder::new()
        .file("empty", "")
        .file("text", "#!/bin/sh\necho hi\n")
        .file("binary", [0xff; 64])
        .file("almost", "\0as")
        .link("program", WRUN);
    let native = "a native program or precompiled code (--precompiled runs what you trust)";
    for (name, found) in [
        ("empty", "an empty file"),
        ("text", "a text that is not WAT"),
        ("binary", "other binary data"),
        ("almost", "a text that is not WAT"),
        ("program", native),
        ("/proc/self/exe", native),
    ] {
        all_refuse(&folder, name, 126, &format!("expected WebAssembly (a binary or WAT text), found {found}"));
    }
}

#[test]
fn an_error_in_wat_is_named_on_one_line() {
    let folder = Folder::new().file("bad.wat", "(module\n  (func $f\n    (call $missing)))\n");
    for command in ["run", "inspect", "compile"] {
        let ran = folder.wrun([command, "bad.wat"]).run().code(126).stdout("");
        let text = ran.stderr_text();
        assert!(text.starts_with("wrun: error: not a valid guest: unknown func"), "{text}");
        assert!(text.contains("$missing") && text.contains(":3:11"), "what and where: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn wat_that_is_text_but_not_valid_is_126() {
    let ran = run_text(r#"(module (func (export "_start") i32.const 1))"#).code(126).stdout("");
    ran.stderr_has("wrun: error: not a valid guest: ").stderr_has("values remaining on stack at end of block");
}

#[test]
fn a_cut_guest_is_not_valid() {
    for guest in [HELLO, HELLO_P1] {
        let whole = fs::read(guest).unwrap();
        // the magic number alone, then cuts in the header and in every part of the rest
        for length in [4, 5, 7, 9, 20, 100, 1_000, whole.len() / 4, whole.len() / 2, whole.len() - 1] {
            let folder = Folder::new().file("cut.wasm", &whole[..length]);
            for command in ["run", "inspect"] {
                let ran = folder.wrun([command, "cut.wasm"]).run().code(126).stdout("");
                let text = ran.stderr_text();
                assert!(text.starts_with("wrun: error: not a valid guest: "), "cut to {length}: {text}");
                assert!(text.contains("offset") && text.lines().count() == 1, "cut to {length}: {text}");
            }
        }
        // a header alone is a whole guest that has nothing to run
        let folder = Folder::new().file("cut.wasm", &whole[..8]);
        folder.wrun(["run", "cut.wasm"]).run().code(126).stderr_has("that exports nothing wrun can run");
    }
}

/// A stream of numbers that is the same every time (`SplitMix64`).
fn numbers(mut seed: u64) -> impl Iterator<Item = usize> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut n = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((n ^ (n >> 31)) & 0x7fff_ffff).expect("31 bits")
    })
}

#[test]
fn a_flipped_bit_is_never_a_crash() {
    let (mut taken, mut refused) = (0, 0);
    for (guest, rounds) in [(HELLO_P1, 200), (HELLO, 100)] {
        let whole = fs::read(guest).unwrap();
        let mut numbers = numbers(0x5eed);
        for _ in 0..rounds {
            // most of a guest is code, which `inspect` does not look at: every second flip is in what comes before it
            let before_code = if numbers.next().unwrap().is_multiple_of(2) { 200 } else { whole.len() };
            let at = numbers.next().unwrap() % before_code;
            let bit = numbers.next().unwrap() % 8;
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << bit;
            let ran = Folder::new().file("flipped.wasm", flipped).wrun(["inspect", "flipped.wasm"]).run();
            match ran.status.code() {
                Some(0) => taken += 1,
                Some(126) => refused += 1,
                _ => panic!("bit {bit} of byte {at} in {guest}\n{}", ran.transcript()),
            }
            assert!(ran.stderr_text().lines().count() <= 1, "{}", ran.transcript());
        }
    }
    assert!(taken > 0 && refused > 0, "the sample is of both kinds: {taken} {refused}");
}

#[test]
fn a_flipped_bit_is_never_a_crash_of_the_compiler() {
    let whole = fs::read(HELLO_P1).unwrap();
    let mut numbers = numbers(0xc0de);
    for _ in 0..12 {
        let (at, bit) = (numbers.next().unwrap() % whole.len(), numbers.next().unwrap() % 8);
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << bit;
        let folder = Folder::new().file("flipped.wasm", flipped);
        let ran = folder.wrun(["compile", "flipped.wasm", "-o", "flipped.cwasm"]).run();
        let known = matches!(ran.status.code(), Some(0 | 126));
        let ran = ran.check(known, &format!("bit {bit} of byte {at}: expected 0 or 126"));
        assert!(ran.stderr_text().lines().count() <= 1, "{}", ran.transcript());
    }
}

#[test]
fn an_import_that_is_not_offered_is_named_with_a_hint() {
    let import = |module: &str, name: &str| {
        run_text(&format!(r#"(module (import "{module}" "{name}" (func)) (func (export "_start")))"#)).code(126)
    };
    import("env", "puts").error_and_hint(
        "it imports `env::puts`, which wrun does not offer",
        "an import from `env` is usually a C function that was not linked in",
    );
    import("wasi_snapshot_preview1", "fly").error_and_hint(
        "it imports `wasi_snapshot_preview1::fly`, which wrun does not offer",
        "that function is not part of WASI preview 1",
    );
    import("wasi", "thread-spawn").error_and_hint(
        "it imports `wasi::thread-spawn`, which wrun does not offer",
        "threads share a memory, which the guest must import (`--target wasm32-wasip1-threads` does)",
    );
    import("wbg", "__wbg_log").error_and_hint(
        "it imports `wbg::__wbg_log`, which wrun does not offer",
        "that module was made for a browser (wasm-bindgen); build it for wasm32-wasip2",
    );
}

#[test]
fn an_import_of_another_type_is_named() {
    let wat = r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)) (func (export "_start")))"#;
    let ran = run_text(wat).code(126).stdout("");
    ran.stderr_has(
        "wrun: error: its imports do not fit: incompatible import type for `wasi_snapshot_preview1::fd_write`",
    );
}

/// A component that is a command and imports something.
pub(crate) fn command_component(import: &str) -> String {
    format!(
        r#"(component
            (import "{import}" (instance (export "f" (func))))
            (core module $m (func (export "run") (result i32) (i32.const 0)))
            (core instance $i (instantiate $m))
            (func $run (result (result)) (canon lift (core func $i "run")))
            (instance $e (export "run" (func $run)))
            (export "wasi:cli/run@0.2.0" (instance $e)))"#
    )
}

#[test]
fn an_import_of_a_component_that_is_not_offered_is_named_with_a_hint() {
    let import = |name: &str| run_text(&command_component(name)).code(126);
    import("acme:things/maker@1.0.0").error_and_hint(
        "it imports `acme:things/maker@1.0.0`, which wrun does not offer",
        "wrun offers WASI preview 1, WASI 0.2 and wrun:guest@0.1.0",
    );
    import("wasi:http/client@0.3.0").error_and_hint(
        "it imports `wasi:http/client@0.3.0`, which wrun does not offer",
        "wrun offers wasi:http 0.2; build the guest for that",
    );
    import("wasi:cli/environment@0.3.0").error_and_hint(
        "it imports `wasi:cli/environment@0.3.0`, which wrun does not offer",
        "wrun offers WASI 0.2; build the guest for that (`--target wasm32-wasip2`)",
    );
}

#[test]
fn a_handler_is_not_run_but_the_command_that_does_is_named() {
    wrun(["run", ECHO])
        .run()
        .code(126)
        .error_and_hint("expected a command guest, found a handler guest (component)", "use `wrun cluster`");
}

#[test]
fn a_guest_that_exports_nothing_to_run_is_126() {
    let hint = "a command is a program with a `main`, built for wasm32-wasip1 or wasm32-wasip2";
    run_text(r#"(module (func (export "add")))"#)
        .code(126)
        .error_and_hint("expected a command guest, found a core module that exports nothing wrun can run", hint);
    run_text("(component)")
        .code(126)
        .error_and_hint("expected a command guest, found a component that exports nothing wrun can run", hint);
}

#[test]
fn a_start_that_cannot_be_called_is_126() {
    for start in [
        r#"(func (export "_start") (param i32))"#,
        r#"(func (export "_start") (result i32) (i32.const 0))"#,
        r#"(global (export "_start") i32 (i32.const 1))"#,
    ] {
        run_text(&format!("(module {start})"))
            .code(126)
            .error("not a valid guest: `_start` must be a function without parameters and results");
    }
}

#[test]
fn a_guest_that_may_not_be_read_says_so() {
    if rustix::process::geteuid().is_root() {
        // who may read everything cannot be refused: at least the permission bits change nothing
        let folder = Folder::new().file("guest.wasm", fs::read(HELLO_P1).unwrap());
        fs::set_permissions(folder.path("guest.wasm"), fs::Permissions::from_mode(0o000)).unwrap();
        folder.wrun(["run", "guest.wasm"]).run().code(0).stdout("Hello, world!\n");
    } else {
        let folder = Folder::new().file("guest.wasm", "");
        fs::set_permissions(folder.path("guest.wasm"), fs::Permissions::from_mode(0o000)).unwrap();
        all_refuse(&folder, "guest.wasm", 126, "could not read `guest.wasm`: Permission denied (os error 13)");
    }
}

#[test]
fn a_guest_that_is_too_large_is_not_read() {
    let folder = Folder::new();
    // takes no room on the disk, and would take memory only when it were read
    fs::File::create(folder.path("large.wasm")).unwrap().set_len((256 << 20) + 1).unwrap();
    all_refuse(&folder, "large.wasm", 126, "`large.wasm` is larger than the 256MiB that a guest may have");
}
