//! Guests that nobody wrote, through the compiler's process as any other: generated ones, valid and damaged, and the
//! corpus of `fuzz/`. Each is compiled, or refused with a reason of its own; none ends the compiler or stays in it.
//!
//! The same guests each time, so that what fails once fails again.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use arbitrary::Unstructured;
use wasm_smith::{Component, Config, Module};
use wrun::{
    Compile, Error, LoadError,
    limits::{Bytes, CompileLimits},
    outcome::Stage,
};

/// Far beyond what any of these guests should need, so that one that comes near is a find; the rest as small as that a
/// few of them go beyond.
const LIMITS: CompileLimits = CompileLimits {
    time: Duration::from_secs(20),
    memory: Bytes::mib(1024),
    functions: 60,
    locals: 300,
    body: Bytes::kib(4),
    nesting: 40,
};

/// How many guests are generated of each kind; each is compiled as it is and damaged.
const ROUNDS: u32 = 50;

/// How long the names are that a run of the fuzzer gives to what it adds to the corpus: git does not have it.
const HASH: usize = 40;

/// What a module may import and must export to be a command.
const COMMAND: &str = r#"(module
    (import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))
    (import "wasi_snapshot_preview1" "sched_yield" (func (result i32)))
    (func (export "_start") unreachable)
    (memory (export "memory") 1 2))"#;

/// `SplitMix64`: enough to make guests, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// What generated guests may be made of.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// What our engine has.
    Plain,
    /// The same, with the imports and exports of a command.
    Command,
    /// All that the generator knows.
    Any,
    /// Components, of what our engine has.
    Component,
}

fn generate(kind: Kind, random: &mut Random) -> Vec<u8> {
    // not all bytes are enough for a component: then others
    loop {
        let size = 200 + random.below(4000);
        if let Ok(guest) = generate_from(kind, &random.bytes(size)) {
            return guest;
        }
    }
}

fn generate_from(kind: Kind, bytes: &[u8]) -> arbitrary::Result<Vec<u8>> {
    let mut unstructured = Unstructured::new(bytes);
    let config =
        Config { max_memories: 2, max_tables: 2, max_table_elements: 100_000, min_funcs: 1, ..Config::default() };
    let plain = |config| Config {
        exceptions_enabled: false,
        gc_enabled: false,
        memory64_enabled: false,
        reference_types_enabled: false,
        threads_enabled: false,
        ..config
    };
    Ok(match kind {
        Kind::Plain => Module::new(plain(config), &mut unstructured)?.to_bytes(),
        Kind::Command => {
            let module_shape = Some(wat::parse_str(COMMAND).unwrap());
            Module::new(plain(Config { module_shape, ..config }), &mut unstructured)?.to_bytes()
        }
        Kind::Any => Module::new(config, &mut unstructured)?.to_bytes(),
        Kind::Component => Component::new(plain(config), &mut unstructured)?.to_bytes(),
    })
}

/// Damages a guest behind its first eight bytes, which say that it is one.
fn damage(guest: &mut Vec<u8>, random: &mut Random) {
    const OUTLINE: usize = 8;
    for _ in 0..=random.below(2) {
        if guest.len() <= OUTLINE {
            return;
        }
        let at = OUTLINE + random.below(guest.len() - OUTLINE);
        match random.below(12) {
            0 => guest.insert(at, random.bytes(1)[0]),
            1 => drop(guest.drain(at..guest.len().min(at + 1 + random.below(8)))),
            2 => guest.truncate(at),
            3..6 => guest[at] = [0, 1, 0x40, 0x7f, 0x80, 0xff][random.below(6)],
            _ => guest[at] ^= 1 << random.below(8),
        }
    }
}

/// Has a guest compiled, and answers in short how that ended.
fn compile(guest: &[u8], folder: &Path, what: &str) -> &'static str {
    let (path, output) = (folder.join("guest.wasm"), folder.join("guest.cwasm"));
    fs::write(&path, guest).unwrap();
    let started = Instant::now();
    let result = Compile::new(&path).program(env!("CARGO_BIN_EXE_wrun")).limits(LIMITS).to_file(&output);
    assert!(started.elapsed() < LIMITS.time, "{what}: took {:?}", started.elapsed());
    let wrote = fs::remove_file(output).is_ok();
    match result {
        Ok(()) => {
            assert!(wrote, "{what}");
            "compiled"
        }
        Err(Error::Load(LoadError::Reported { stage: stage @ (Stage::Compile | Stage::Link), reason, .. })) => {
            assert!(!wrote, "{what}");
            assert!(!reason.is_empty() && reason.lines().count() == 1, "{what}: {reason:?}");
            // what is said of a compiler that said nothing itself
            for gave_up in ["its compiler", "--compile-time", "--compile-memory"] {
                assert!(!reason.contains(gave_up), "{what}: {reason}");
            }
            if reason.contains("(--compile-") {
                "beyond a limit"
            } else if stage == Stage::Link {
                "not linked"
            } else {
                "not valid"
            }
        }
        Err(error) => panic!("{what}: {error:?}"),
    }
}

/// How many descriptors and children this process has.
fn left() -> (usize, usize) {
    let children = fs::read_dir("/proc/self/task").unwrap().flatten().filter_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        Some(children.split_whitespace().count())
    });
    (fs::read_dir("/proc/self/fd").unwrap().count(), children.sum())
}

// alone in its program: what is left at the end is this test's
#[test]
fn guests_that_nobody_wrote_are_compiled_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    // the first one opens what the runtime keeps for all children
    compile(b"(module)", folder.path(), "an empty module");
    let before = left();
    let mut endings = BTreeMap::<_, u32>::new();
    let mut count = |kind: &str, ending| *endings.entry((kind.to_owned(), ending)).or_default() += 1;

    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/guests")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().len() == HASH {
            continue;
        }
        count("corpus", compile(&fs::read(&path).unwrap(), folder.path(), &path.display().to_string()));
    }
    for kind in [Kind::Plain, Kind::Command, Kind::Any, Kind::Component] {
        for seed in 0..ROUNDS {
            let mut random = Random(seed.into());
            let mut guest = generate(kind, &mut random);
            let ending = compile(&guest, folder.path(), &format!("{kind:?} of seed {seed}"));
            count(&format!("{kind:?}"), ending);
            damage(&mut guest, &mut random);
            let ending = compile(&guest, folder.path(), &format!("damaged {kind:?} of seed {seed}"));
            count(&format!("damaged {kind:?}"), ending);
        }
    }

    // what is valid is taken; and the other ends are reached too
    for kind in ["Plain", "Command"] {
        assert_eq!(endings.get(&(kind.into(), "compiled")), Some(&ROUNDS), "{kind}: {endings:?}");
    }
    for reached in [("Component", "compiled"), ("damaged Command", "not linked"), ("corpus", "beyond a limit")] {
        assert!(endings.contains_key(&(reached.0.into(), reached.1)), "{reached:?}: {endings:?}");
    }
    assert_eq!(left(), before, "descriptors and children");
}
