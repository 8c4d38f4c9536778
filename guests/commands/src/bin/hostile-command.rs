//! Does what its first argument tells it to, and most of that is what no guest should do.

use std::hint::black_box;
use std::io::{self, Write};
use std::net::TcpStream;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

const USAGE: &str = "\
usage: hostile-command ACT

  trap               traps
  panic              panics
  spin               loops without end
  recurse            calls itself without end
  sleep [MS]         sleeps for so long, or for ever
  grow [MIB]         allocates and touches so much memory, or until there is no more
  flood [BYTES]      writes so much to stdout, or without end
  exit CODE          exits; of a component, the host sees whether the code is 0
  read-stdin         waits for the end of stdin and prints how many bytes came
  read PATH          prints a file
  write PATH TEXT    writes a file
  open PATH TIMES    holds a file open so many times
  fill PATH BYTES    writes a file of so many bytes
  connect ADDRESS    connects to a port
  rename FROM TO     gives a file another name
  link FROM TO       gives a file a second name
  hunt PATH TIMES    reads a file so many times and prints each text that it finds, once
  ls PATH            prints the names in a directory, sorted
  stderr TEXT        prints to stderr
  turns TIMES [ACT]  prints a line to stdout and one to stderr, so many times, and goes on with another act
  say TEXT [ACT]     prints, and goes on with another act";

const MIB: usize = 1 << 20;

/// How deep [`recurse`] is.
static DEPTH: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match perform(&args) {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => {
            match error.kind().to_string() {
                // what std has no kind for has a text
                kind if kind == "uncategorized error" => eprintln!("{error}"),
                kind => eprintln!("{kind}"),
            }
            ExitCode::FAILURE
        }
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// Answers `None` when the arguments make no act.
fn perform(args: &[&str]) -> Option<io::Result<()>> {
    let outcome = match *args {
        [] => Ok(()),
        ["trap"] => trap(),
        ["panic"] => panic!("as told"),
        ["spin"] => spin(),
        ["recurse"] => {
            recurse();
            Ok(())
        }
        ["sleep"] => loop {
            thread::sleep(Duration::from_hours(1));
        },
        ["sleep", ms] => {
            thread::sleep(Duration::from_millis(ms.parse().ok()?));
            Ok(())
        }
        ["grow"] => grow(usize::MAX),
        ["grow", mib] => grow(mib.parse().ok()?),
        ["flood"] => flood(u64::MAX),
        ["flood", bytes] => flood(bytes.parse().ok()?),
        ["exit", code] => process::exit(code.parse().ok()?),
        ["read-stdin"] => read_stdin(),
        ["read", path] => fs::read(path).and_then(|bytes| print(&bytes)),
        ["write", path, text] => fs::write(path, text),
        ["open", path, times] => open(path, times.parse().ok()?),
        ["fill", path, bytes] => fill(path, bytes.parse().ok()?),
        ["connect", address] => TcpStream::connect(address).map(drop),
        ["rename", from, to] => fs::rename(from, to),
        ["link", from, to] => fs::hard_link(from, to),
        ["hunt", path, times] => hunt(path, times.parse().ok()?),
        ["ls", path] => ls(path),
        ["stderr", text] => writeln!(io::stderr(), "{text}"),
        ["turns", times, ref act @ ..] => {
            return match turns(times.parse().ok()?) {
                Ok(()) => perform(act),
                error => Some(error),
            };
        }
        ["say", text, ref act @ ..] => {
            return match print(text.as_bytes()) {
                Ok(()) => perform(act),
                error => Some(error),
            };
        }
        _ => return None,
    };
    Some(outcome)
}

/// A function of its own, for backtraces to name.
#[inline(never)]
fn trap() -> ! {
    process::abort()
}

#[inline(never)]
fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

/// Never ends, which neither the compiler nor its optimizer may know: the one warns and the other makes it a loop.
#[inline(never)]
fn recurse() {
    if DEPTH.fetch_add(1, Ordering::Relaxed) < u64::MAX {
        recurse();
    }
    DEPTH.fetch_sub(1, Ordering::Relaxed);
}

fn grow(mib: usize) -> io::Result<()> {
    let mut chunks = Vec::new();
    for _ in 0..mib {
        chunks.push(black_box(vec![1_u8; MIB]));
    }
    print(format!("{mib}\n").as_bytes())
}

fn flood(mut bytes: u64) -> io::Result<()> {
    let lines = "y\n".repeat(1 << 15);
    let mut stdout = io::stdout().lock();
    while bytes > 0 {
        let chunk = usize::try_from(bytes).map_or(lines.len(), |bytes| bytes.min(lines.len()));
        stdout.write_all(&lines.as_bytes()[..chunk])?;
        bytes -= chunk as u64;
    }
    stdout.flush()
}

fn read_stdin() -> io::Result<()> {
    let bytes = io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    print(format!("{bytes}\n").as_bytes())
}

fn open(path: &str, times: usize) -> io::Result<()> {
    let files = (0..times).map(|_| fs::File::open(path)).collect::<io::Result<Vec<_>>>()?;
    print(format!("{}\n", files.len()).as_bytes())
}

fn fill(path: &str, mut bytes: usize) -> io::Result<()> {
    let chunk = vec![b'x'; 64 << 10];
    let mut file = fs::File::create(path)?;
    while bytes > 0 {
        let length = bytes.min(chunk.len());
        file.write_all(&chunk[..length])?;
        bytes -= length;
    }
    Ok(())
}

/// Errors are no news here: somebody else moves what is read.
fn hunt(path: &str, times: usize) -> io::Result<()> {
    let mut found: Vec<_> = (0..times).filter_map(|_| fs::read_to_string(path).ok()).collect();
    found.sort();
    found.dedup();
    print(found.concat().as_bytes())
}

fn ls(path: &str) -> io::Result<()> {
    let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    names.iter().try_for_each(|name| print(format!("{name}\n").as_bytes()))
}

fn turns(times: usize) -> io::Result<()> {
    (0..times).try_for_each(|turn| {
        print(format!("out {turn}\n").as_bytes())?;
        writeln!(io::stderr(), "err {turn}")
    })
}

fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}
