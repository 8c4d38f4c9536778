//! Compiles `guests/` and puts what comes out into `<target dir>/guests`.

use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::time::SystemTime;
use std::{env, fs, io};

/// The handlers, and a command that needs their library: examples of `guests/handlers`.
const HANDLERS: [&str; 7] = ["courier", "crash-at-start", "data-processor", "echo", "fib", "hostile", "whoami"];

/// The commands, which are binaries of `guests/commands`.
const COMMANDS: [&str; 5] = ["args", "cat", "hello", "hostile-command", "net"];

/// The HTTP guests, which are examples of `guests/http`.
const HTTP: [&str; 7] = ["crash", "gateway", "hello-http", "slow", "spin", "stream", "upload"];

/// The commands that need more of WASI 0.2 than a module can have, which are examples of `guests/http` with a `main`.
const HTTP_COMMANDS: [&str; 1] = ["fetch"];

/// The HTTP guest that others wrote: an example that this crate was published with, found in the lock file of `guests/`.
const FOREIGN_HTTP: (&str, &str) = ("wstd", "http_server");

/// The guests with threads, which are examples of `guests/threads`; they are handlers, and built as components, too.
const THREADED: [&str; 6] = ["histogram", "hostile-workers", "kernels", "mandelbrot", "pingpong", "sum"];

/// The handlers that work on windows of a buffer, which are examples of `guests/windows`.
const WINDOWED: [&str; 4] = ["blur", "checksum", "hostile-windows", "wordcount"];

/// The commands with threads, which are binaries of `guests/threads`.
const THREADED_COMMANDS: [&str; 3] = ["hostile-threads", "primes", "sum-command"];

/// The examples of `guests/handlers` that are built with threads, too.
const ALSO_THREADED: [&str; 5] = ["courier", "data-processor", "echo", "fib", "whoami"];

/// The command with threads that others wrote: a program and its version on crates.io, built with its own lock file.
const FOREIGN_THREADS: (&str, &str) = ("b3sum", "1.8.7");

/// Commands that others wrote and many use: a program's package and its version on crates.io, and its own name.
const FOREIGN_COMMANDS: [(&str, &str, &str); 2] = [("ripgrep", "15.2.0", "rg"), ("hexyl", "0.17.0", "hexyl")];

/// What the guests are made of: all but `guests/target`, which changes with every build that is run there.
const SOURCES: [&str; 16] = [
    "guests/Cargo.toml",
    "guests/Cargo.lock",
    "guests/sdk/Cargo.toml",
    "guests/sdk/build.rs",
    "guests/sdk/src",
    "guests/handlers/Cargo.toml",
    "guests/handlers/src",
    "guests/commands/Cargo.toml",
    "guests/commands/src",
    "guests/http/Cargo.toml",
    "guests/http/src",
    "guests/threads/Cargo.toml",
    "guests/threads/src",
    "guests/windows/Cargo.toml",
    "guests/windows/src",
    "wit",
];

const COMPONENT: &str = "wasm32-wasip2";
const MODULE: &str = "wasm32-wasip1";
const THREADS: &str = "wasm32-wasip1-threads";

fn main() {
    let package = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let root = Path::new(&package).join("../..");
    let target_dir = target_dir();
    let built = target_dir.join("guests-build");
    let guests = target_dir.join("guests");

    let sources = SOURCES.map(|source| root.join(source));
    for source in &sources {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let newest = sources.iter().map(|source| newest(source)).max().expect("there are sources");

    install_targets(&[COMPONENT, MODULE, THREADS]);
    let manifest = root.join("guests/Cargo.toml");
    let packages =
        ["handlers", "http-guests", "threads", "windows", "commands"].into_iter().flat_map(|name| ["-p", name]);
    let ours: Vec<_> = packages.chain(["--examples", "--bins"]).collect();
    compile(&manifest, &built, COMPONENT, &ours);
    // cargo builds an example of a dependency as long as it needs no more than the crate itself does
    let (foreign, example) = FOREIGN_HTTP;
    compile(&manifest, &built, COMPONENT, &["-p", foreign, "--example", example]);
    compile(&manifest, &built, MODULE, &["-p", "commands", "--bins"]);
    compile(&manifest, &built, THREADS, &["-p", "threads", "--examples", "--bins"]);
    let also = ALSO_THREADED.into_iter().flat_map(|name| ["--example", name]);
    compile(&manifest, &built, THREADS, &["-p", "handlers"].into_iter().chain(also).collect::<Vec<_>>());

    let (package, version) = FOREIGN_THREADS;
    let foreign_threads = install(&built, THREADS, (package, version, package));
    let foreign_commands = FOREIGN_COMMANDS.map(|program| (program.2, install(&built, MODULE, program)));

    fs::create_dir_all(&guests).unwrap_or_else(|error| panic!("{}: {error}", guests.display()));
    println!("cargo::rustc-env=GUESTS={}", guests.display());
    let publish = |variable: String, from: PathBuf, to: PathBuf| {
        publish(&from, &to, newest).unwrap_or_else(|error| panic!("{} -> {}: {error}", from.display(), to.display()));
        println!("cargo::rerun-if-changed={}", to.display());
        println!("cargo::rustc-env={variable}={}", to.display());
    };
    let components = built.join(COMPONENT).join("release");
    let modules = built.join(MODULE).join("release");
    let threaded = built.join(THREADS).join("release");
    for name in HANDLERS.into_iter().chain(HTTP).chain(THREADED).chain(WINDOWED) {
        // a cdylib is a library, whose name is an identifier; that of the command is one word
        let file = format!("examples/{}.wasm", name.replace('-', "_"));
        publish(variable(name), components.join(file), guests.join(format!("{name}.wasm")));
    }
    for name in THREADED.into_iter().chain(ALSO_THREADED) {
        let file = format!("examples/{}.wasm", name.replace('-', "_"));
        publish(variable(name) + "_THREADS", threaded.join(file), guests.join(format!("{name}.threads.wasm")));
    }
    for name in THREADED_COMMANDS {
        publish(variable(name), threaded.join(format!("{name}.wasm")), guests.join(format!("{name}.wasm")));
    }
    for (name, program) in foreign_commands {
        publish(variable(name), program, guests.join(format!("{name}.wasm")));
    }
    publish(variable("foreign-threads"), foreign_threads, guests.join("foreign-threads.wasm"));
    for name in HTTP_COMMANDS {
        publish(variable(name), components.join(format!("examples/{name}.wasm")), guests.join(format!("{name}.wasm")));
    }
    let file = format!("examples/{example}.wasm");
    publish(variable("foreign-http"), components.join(file), guests.join("foreign-http.wasm"));
    for name in COMMANDS {
        let file = format!("{name}.wasm");
        publish(variable(name), components.join(&file), guests.join(&file));
        publish(variable(name) + "_P1", modules.join(&file), guests.join(format!("{name}.p1.wasm")));
    }
}

/// The target directory of the build that runs this script, wherever it was told to be: `OUT_DIR` is
/// `<target dir>/[<triple>/]<profile>/build/…`, and neither the profile's name nor the way on from `build` is fixed.
fn target_dir() -> PathBuf {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let build = out_dir.ancestors().find(|dir| dir.ends_with("build")).expect("OUT_DIR is in a directory `build`");
    let dir = build.ancestors().nth(2).expect("`build` is in the directory of a profile");
    let triple = env::var("TARGET").expect("cargo sets TARGET");
    let dir = if dir.ends_with(triple) { dir.parent().expect("a triple is in the target directory") } else { dir };
    dir.to_owned()
}

/// Installs the targets that are missing, or ends the build with the command that does.
fn install_targets(targets: &[&str]) {
    let missing: Vec<_> = targets.iter().copied().filter(|target| !is_installed(target)).collect();
    if missing.is_empty() {
        return;
    }
    let status = Command::new("rustup").args(["target", "add"]).args(&missing).status();
    if !status.is_ok_and(|status| status.success()) {
        fail(&format!("the guests cannot be compiled without: rustup target add {}", missing.join(" ")));
    }
}

fn is_installed(target: &str) -> bool {
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target", target]).output();
    output.is_ok_and(|output| {
        output.status.success() && Path::new(String::from_utf8_lossy(&output.stdout).trim_end()).is_dir()
    })
}

fn compile(manifest: &Path, built: &Path, target: &str, what: &[&str]) {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--release", "--locked", "--target", target]).args(what);
    cargo.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(built);
    run(cargo, &format!("the guests do not compile for {target}"));
}

/// Builds a program from the registry, with its own lock file, unless it was built before. Where it is.
fn install(built: &Path, target: &str, (package, version, name): (&str, &str, &str)) -> PathBuf {
    let root = built.join(format!("{package}-{version}"));
    let program = root.join(format!("bin/{name}.wasm"));
    if !program.exists() {
        let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
        cargo.args(["install", package, "--version", version, "--locked", "--no-track", "--target", target, "--root"]);
        cargo.arg(root).arg("--target-dir").arg(built);
        run(cargo, &format!("{package} does not compile for {target}"));
    }
    program
}

/// Runs cargo for guests, or ends the build.
fn run(mut cargo: Command, failure: &str) {
    // flags and wrappers (clippy, coverage) are for the host; this variable beats all other ways to set flags
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "").env_remove("RUSTC_WRAPPER").env_remove("RUSTC_WORKSPACE_WRAPPER");
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("{failure}: {status}")),
        Err(error) => fail(&format!("cargo does not start: {error}")),
    }
}

/// Copies a guest for all to see: never half a file, and never a new file for what is the same.
///
/// Cargo runs this script again when a file that it watches is gone or newer than the script's last start. The guests
/// are watched, so that a deleted one is made again, and always newer than that; hence they get the time of their
/// newest source.
fn publish(from: &Path, to: &Path, modified: SystemTime) -> io::Result<()> {
    let content = fs::read(from)?;
    if !fs::read(to).is_ok_and(|old| old == content) {
        // the scripts of two profiles may run at the same time
        let temporary = to.with_extension(process::id().to_string());
        fs::write(&temporary, &content)?;
        fs::rename(&temporary, to)?;
    }
    fs::File::options().write(true).open(to)?.set_modified(modified)
}

/// When a file, or anything in a directory, was last modified.
fn newest(path: &Path) -> SystemTime {
    let modified = |path: &Path| -> io::Result<SystemTime> {
        let metadata = fs::metadata(path)?;
        let mut time = metadata.modified()?;
        if metadata.is_dir() {
            for entry in fs::read_dir(path)? {
                time = time.max(newest(&entry?.path()));
            }
        }
        Ok(time)
    };
    modified(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn variable(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

/// Ends the build with an error and no backtrace.
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    process::exit(1)
}
