//! What a job costs: many that do nothing, beside as many tests of `cargo nextest` that do nothing, and as many runs of
//! `wasmtime` in a shell's loop.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use crate::harness::{Probe, WRUN, compare, spread, time};

/// How many jobs there are.
const JOBS: u32 = 1000;

/// A guest that does nothing.
const NOTHING: &str = r#"(module (memory (export "memory") 1) (func (export "_start")))"#;

pub(crate) fn run() {
    let jail = folder("jail", JOBS, "jail");
    let thread = folder("thread", JOBS, "thread");
    let nextest = nextest();
    let wasmtime = std::env::var("WASMTIME").unwrap_or_else(|_| "wasmtime".into());
    let has_wasmtime = Command::new(&wasmtime).arg("--version").stdout(Stdio::null()).status().is_ok();
    for (what, folder) in [("a jailed job", &jail), ("a job on a thread", &thread)] {
        let mut probes: Vec<Probe<'_>> = vec![("wrun ci", Box::new(|| each(&mut ci(folder))))];
        if let Some(nextest) = &nextest {
            probes.push(("cargo nextest", Box::new(|| each(&mut tests(nextest)))));
        }
        if has_wasmtime {
            let guest = jail.join("nothing.wat");
            let script = format!("for i in $(seq {JOBS}); do {wasmtime} run {}; done", guest.display());
            probes.push(("wasmtime in a loop", Box::new(move || each(Command::new("sh").args(["-c", &script])))));
        }
        compare(&format!("{what}, of {JOBS} that do nothing"), "ms", 5, probes);
    }
    let small = folder("small", 1, "jail");
    compare("a run of one jailed job", "ms", 15, vec![("wrun ci", Box::new(|| whole(&mut ci(&small))))]);
    let many = folder("many", 5000, "jail");
    let peaks: Vec<f64> = (0..3).map(|_| peak(&many)).collect();
    let one: Vec<f64> = (0..3).map(|_| peak(&small)).collect();
    println!("  memory of the runner at its most, 5,000 jobs: {} MiB; one job: {} MiB", spread(&peaks), spread(&one));
}

/// A folder with so many jobs that do nothing.
fn folder(name: &str, jobs: u32, isolation: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-ci-{name}"));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("nothing.wat"), NOTHING).unwrap();
    let mut text = format!("version = 1\n[defaults]\nisolation = \"{isolation}\"\n");
    for n in 0..jobs {
        let _ = write!(text, "[[job]]\nid = \"job-{n}\"\nwasm = \"nothing.wat\"\n");
    }
    fs::write(folder.join("wrun-ci.toml"), text).unwrap();
    folder
}

fn ci(folder: &Path) -> Command {
    let mut command = Command::new(WRUN);
    command.args(["ci", "--cache-dir"]).arg(crate::harness::cache_dir()).current_dir(folder);
    command
}

/// A crate with so many tests that do nothing, built; none without `cargo nextest`.
fn nextest() -> Option<PathBuf> {
    if !Command::new("cargo").args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success()) {
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-ci-nextest");
    fs::create_dir_all(folder.join("src")).unwrap();
    fs::write(folder.join("Cargo.toml"), "[package]\nname = \"empty\"\nedition = \"2024\"\n[workspace]\n").unwrap();
    let text: String = (0..JOBS).fold(String::new(), |mut text, n| {
        let _ = writeln!(text, "#[test]\nfn test_{n}() {{}}");
        text
    });
    fs::write(folder.join("src/lib.rs"), text).unwrap();
    assert!(tests(&folder).arg("--no-run").status().unwrap().success());
    Some(folder)
}

fn tests(folder: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.args(["nextest", "run", "--release", "--offline"]).current_dir(folder);
    command.env_remove("CARGO_TARGET_DIR").stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// How long one job takes of a run of many, in milliseconds.
fn each(command: &mut Command) -> f64 {
    whole(command) / f64::from(JOBS)
}

fn whole(command: &mut Command) -> f64 {
    let took: Duration = time(|| {
        let output = command.stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    });
    took.as_secs_f64() * 1e3
}

/// The most memory that the runner itself had, in MiB.
fn peak(folder: &Path) -> f64 {
    let mut child = ci(folder).stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0.0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let kib =
            text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        most = kib.unwrap_or(most).max(most);
        std::thread::sleep(Duration::from_millis(5));
    }
    most / 1024.0
}
