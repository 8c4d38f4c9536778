//! Guests that are small and cost a compiler much: they end as guests that are not compiled, and harm nothing else.

use std::fs;

use guest_artifacts::{HELLO, HELLO_HTTP};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    client::Server,
    jail::is_jailed,
    supervision::{children, event, gone},
    wrun::{Folder, Wrun},
};

/// A number as WebAssembly writes it.
fn number(mut value: usize) -> Vec<u8> {
    let mut bytes = vec![];
    loop {
        let low = u8::try_from(value & 0x7f).unwrap();
        value >>= 7;
        if value == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}

fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id], &number(content.len())[..], content].concat()
}

/// A command whose functions have these bodies; the first one is its start.
fn command(bodies: &[Vec<u8>]) -> Vec<u8> {
    let count = number(bodies.len());
    let code: Vec<u8> = bodies.iter().flat_map(|body| [number(body.len()), body.clone()].concat()).collect();
    [
        b"\0asm\x01\0\0\0".to_vec(),
        section(1, b"\x01\x60\0\0"),
        section(3, &[&count[..], &vec![0; bodies.len()]].concat()),
        section(7, b"\x01\x06_start\0\0"),
        section(10, &[count, code].concat()),
    ]
    .concat()
}

/// A body with so many local variables and this code.
fn body(locals: usize, code: &[u8]) -> Vec<u8> {
    [&[1][..], &number(locals), &[0x7f], code, &[0x0b]].concat()
}

fn functions(count: usize) -> Vec<u8> {
    command(&vec![b"\0\x0b".to_vec(); count])
}

fn nested(depth: usize) -> Vec<u8> {
    command(&[body(0, &[b"\x02\x40".repeat(depth), b"\x0b".repeat(depth)].concat())])
}

/// `nop`s: with the locals and the end, a body of so many bytes.
fn long(bytes: usize) -> Vec<u8> {
    command(&[body(0, &vec![1; bytes - 4])])
}

const TOO_MUCH: [&str; 4] =
    ["--compile-functions=1000000", "--compile-locals=50000", "--compile-nesting=1000000", "--compile-body=7MiB"];

#[test]
fn what_is_at_a_limit_is_compiled_and_what_is_beyond_is_named() {
    for (flag, at, beyond, error) in [
        (
            "--compile-functions=100",
            functions(100),
            functions(101),
            "the guest has 101 functions, more than the 100 that are compiled (--compile-functions)",
        ),
        (
            // the default
            "--compile-locals=10000",
            command(&[body(10_000, b"")]),
            command(&[body(10_001, b"")]),
            "function 0 has 10001 local variables, more than the 10000 that are compiled (--compile-locals)",
        ),
        (
            // the default, too: no stack overflows at it
            "--compile-nesting=10000",
            nested(10_000),
            nested(10_001),
            "function 0 has 10001 blocks in each other, more than the 10000 that are compiled (--compile-nesting)",
        ),
        (
            "--compile-body=1KiB",
            long(1024),
            long(1025),
            "function 0 has 1025 bytes, more than the 1024 that are compiled (--compile-body)",
        ),
    ] {
        let folder = Folder::new().file("at.wasm", at).file("beyond.wasm", beyond);
        folder.wrun(["run", flag, "at.wasm"]).private_cache().run().code(0).stderr("");
        let refused = folder.wrun(["run", flag, "beyond.wasm"]).private_cache().run().code(126);
        let (name, _) = flag.split_once('=').unwrap();
        refused.stderr_has(&format!(
            "wrun: error: {error}\nhint: few programs are like that; if this one shall be compiled: `{name} "
        ));
        folder.wrun(["compile", "beyond.wasm", flag]).private_cache().run().code(126);
        // it can be compiled when it shall be, and is then like any other
        folder.wrun(["run", "beyond.wasm"]).args(TOO_MUCH).private_cache().run().code(0).stderr("");
        folder.wrun(["run", flag, "beyond.wasm"]).private_cache().run().code(0).stderr("");
    }
}

#[test]
fn bombs_are_refused_by_default_and_at_once() {
    let million = b"\x20\0\x20\x01\x6a\x21\x02".repeat(5000);
    for bomb in [functions(1_000_000), command(&[body(50_000, &million)]), nested(1_000_000)] {
        let folder = Folder::new().file("bomb.wasm", bomb);
        for args in [&["run"][..], &["run", "--isolation=jail"], &["compile"], &["cluster"], &["cluster", "--listen=0"]]
        {
            let refused = folder.wrun(args).args(["bomb.wasm"]).run().code(126).stdout("");
            refused.stderr_has("that are compiled (--compile-").stderr_has("hint: few programs are like that");
        }
        // nothing is kept of it
        assert_eq!(folder.names(""), ["bomb.wasm"]);
    }
}

/// `wrun run` of a guest that takes a second and half a gigabyte to compile.
fn compiled(folder: &Folder, limit: &str) -> Wrun {
    fs::write(folder.path("bomb.wasm"), functions(300_000)).unwrap();
    folder.wrun(["run", limit, "bomb.wasm"]).private_cache()
}

#[test]
fn a_compilation_has_so_much_memory_and_time() {
    let folder = Folder::new();
    let memory = compiled(&folder, "--compile-memory=96MiB").run().code(126);
    memory.error_and_hint(
        "it took more than 96MiB of memory to compile (--compile-memory)",
        "few programs are like that; if this one shall be compiled, raise `--compile-memory`",
    );
    let time = compiled(&folder, "--compile-time=100ms").run().code(126);
    time.error_and_hint(
        "it took more than 100ms to compile (--compile-time)",
        "few programs are like that; if this one shall be compiled, raise `--compile-time`",
    );
    assert!(folder.names("cache/wrun").is_empty());
    // a program is compiled within either
    let limits = ["run", "--compile-memory=96MiB", "--compile-time=1m", HELLO];
    folder.wrun(limits).private_cache().run().code(0).stdout("Hello, world!\n");
}

/// The process that compiles for another one.
fn compiler(of: Pid) -> Pid {
    loop {
        if let [child] = children(of)[..]
            // it has begun
            && fs::read_to_string(format!("/proc/{}/status", child.as_raw_pid()))
                .is_ok_and(|status| status.contains("Seccomp:\t2"))
        {
            return child;
        }
    }
}

#[test]
fn a_compiler_is_in_a_jail_and_does_not_outlive_wrun() {
    let folder = Folder::new();
    let running = compiled(&folder, "--compile-time=1m").spawn();
    let child = compiler(running.pid());
    is_jailed(child);
    running.signal(Signal::KILL);
    running.wait().killed_by(Signal::KILL);
    assert!(gone(child));
}

#[test]
fn a_compiler_that_dies_is_an_error_of_one_guest() {
    let folder = Folder::new();
    let running = compiled(&folder, "--compile-time=1m").spawn();
    kill_process(compiler(running.pid()), Signal::KILL).unwrap();
    running.wait().code(126).error("its compiler was killed by signal 9 (SIGKILL)");
}

#[test]
fn a_bomb_in_the_place_of_a_guest_leaves_the_old_one_serving() {
    let folder = Folder::new().file("site.wasm", fs::read(HELLO_HTTP).unwrap());
    let mut server = Server::start(folder.wrun(["cluster", "site.wasm", "--listen=0", "-w1", "--log-format=json"]));
    event(&mut server, "online");
    fs::write(folder.path("site.wasm"), functions(1_000_000)).unwrap();
    server.signal(Signal::HUP);
    let reload = event(&mut server, "reload");
    assert!(reload["error"].as_str().unwrap().contains("the guest has 1000000 functions"), "{reload}");
    assert_eq!(server.get("/").json()["generation"], 1);
}

/// As large as an interpreter or a synthesis tool: more than 20 MB of code in many functions.
#[test]
fn a_program_of_twenty_megabytes_is_compiled_with_the_defaults() {
    // some arithmetic on two variables, over and over
    let line = b"\x20\0\x41\x07\x6c\x20\x01\x73\x21\0\x20\x01\x20\0\x6a\x21\x01";
    let bodies: Vec<_> = (0..40_000).map(|_| body(2, &line.repeat(30))).collect();
    let large = command(&bodies);
    assert!(large.len() > 20_000_000, "{}", large.len());
    let folder = Folder::new().file("large.wasm", large);
    folder.wrun(["run", "--isolation=jail", "large.wasm"]).private_cache().run().code(0).stdout("").stderr("");
    // and refused with a little less than it takes
    let little = folder.wrun(["run", "--isolation=jail", "--compile-memory=64MiB", "--no-cache", "large.wasm"]);
    little.run().code(126);
    folder.wrun(["run", "--compile-functions=39999", "--no-cache", "large.wasm"]).run().code(126);
}
