//! Does what the message tells it to, and most of that is what no guest should do: `{"do":"spin"}`.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, process, thread};

use serde::Deserialize;
use wrun_guest::bindings::exports::wrun::guest::handler::Guest;
use wrun_guest::bindings::wrun::guest::mailbox as raw_mailbox;
use wrun_guest::mailbox::{self, ReceiveError, SendError};
use wrun_guest::serde_json::{self, Value, json};
use wrun_guest::worker;

const MIB: usize = 1 << 20;

/// How many messages this instance has got.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// How deep [`recurse`] is.
static DEPTH: AtomicU64 = AtomicU64::new(0);

/// What the workers' `--data` may say.
#[derive(Default, Deserialize)]
struct Options {
    /// Exit with code 7, of which WASI 0.2 tells the host no more than that it is not 0, instead of handling one
    /// message more than this.
    exit_after: Option<u64>,
}

/// What a message may ask for.
#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
enum Act {
    /// Traps.
    Trap,
    /// Loops without end.
    Spin,
    /// Sleeps for so long, or for ever.
    Sleep { ms: Option<u64> },
    /// Allocates and touches so much memory, or until there is no more, which aborts.
    Grow { mib: Option<usize> },
    /// Calls itself without end.
    Recurse,
    /// Exits from within the task. The host sees whether the code is 0.
    Exit { code: i32 },
    /// Writes so many lines of so many bytes to stdout, or as much without a line's end.
    Flood {
        lines: usize,
        bytes: usize,
        #[serde(default = "yes")]
        newline: bool,
    },
    /// Writes the text to stdout.
    Stdout { text: String },
    /// Writes the text to stderr.
    Stderr { text: String },
    /// Replies a JSON string of so many bytes, its quotes included.
    Giant { bytes: usize },
    /// Replies arrays within arrays.
    Deep { depth: usize },
    /// Replies what is not JSON.
    Invalid,
    /// Fails the task.
    Error,
    /// Ends the task without a reply.
    None,
    /// Sends a message to the parent, once or so many times until one fails.
    Send {
        message: Value,
        #[serde(default = "once")]
        times: usize,
    },
    /// Sends the text, be it JSON or not.
    SendRaw { text: String },
    /// Sends a JSON string of so many bytes.
    SendGiant { bytes: usize },
    /// Waits for a message from the parent.
    Receive { ms: Option<u64> },
    /// Reads a file.
    Read { path: String },
    /// Writes a file.
    Write { path: String, text: String },
    /// Connects to a port and replies the first line that comes.
    Connect { address: String },
    /// Replies the environment.
    Env,
    /// Replies how many messages this instance has got.
    Count,
    /// Replies and does no harm.
    Ok,
}

struct Hostile;

/// By hand, since [`wrun_guest::handler!`] lets no reply through that is not JSON.
impl Guest for Hostile {
    fn handle(message: String) -> Result<Option<String>, String> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        // data that is not options is some other test's
        let options: Options = worker::data().unwrap_or_default();
        if options.exit_after.is_some_and(|last| count > last) {
            process::exit(7);
        }
        match serde_json::from_str(&message) {
            Ok(act) => perform(act),
            Err(error) => Err(json!(error.to_string()).to_string()),
        }
    }
}

wrun_guest::bindings::export!(Hostile);

fn perform(act: Act) -> Result<Option<String>, String> {
    let reply = match act {
        Act::Trap => trap(),
        Act::Spin => spin(),
        Act::Sleep { ms: Some(ms) } => {
            thread::sleep(Duration::from_millis(ms));
            json!({ "ms": ms })
        }
        Act::Sleep { ms: None } => loop {
            thread::sleep(Duration::from_hours(1));
        },
        Act::Grow { mib } => {
            grow(mib.unwrap_or(usize::MAX));
            json!({ "mib": mib })
        }
        Act::Recurse => {
            recurse();
            json!(null)
        }
        Act::Exit { code } => process::exit(code),
        Act::Flood { lines, bytes, newline } => written(flood(lines, bytes, newline)),
        Act::Stdout { text } => written(print(io::stdout(), &text)),
        Act::Stderr { text } => written(print(io::stderr(), &text)),
        Act::Giant { bytes } => return Ok(Some(giant(bytes))),
        Act::Deep { depth } => return Ok(Some("[".repeat(depth) + &"]".repeat(depth))),
        Act::Invalid => return Ok(Some("this is not JSON".to_owned())),
        Act::Error => return Err(json!({ "error": "as told" }).to_string()),
        Act::None => return Ok(None),
        Act::Send { message, times } => sent((0..times).try_for_each(|_| mailbox::send(&message))),
        Act::SendRaw { text } => sent(raw_mailbox::send(&text)),
        Act::SendGiant { bytes } => sent(raw_mailbox::send(&giant(bytes))),
        Act::Receive { ms } => received(mailbox::receive(ms.map(Duration::from_millis))),
        Act::Read { path } => match fs::read_to_string(path) {
            Ok(text) => json!({ "text": text }),
            Err(error) => failure(&error),
        },
        Act::Write { path, text } => written(fs::write(path, text)),
        Act::Connect { address } => match connect(&address) {
            Ok(line) => json!({ "line": line.trim_end() }),
            Err(error) => failure(&error),
        },
        Act::Env => json!(env::vars().collect::<BTreeMap<_, _>>()),
        Act::Count => json!({ "count": COUNT.load(Ordering::Relaxed) }),
        Act::Ok => json!({ "ok": true }),
    };
    Ok(Some(reply.to_string()))
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

fn grow(mib: usize) {
    let mut chunks = Vec::new();
    for _ in 0..mib {
        chunks.push(black_box(vec![1_u8; MIB]));
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

fn flood(lines: usize, bytes: usize, newline: bool) -> io::Result<()> {
    let line = "y".repeat(bytes) + if newline { "\n" } else { "" };
    let mut stdout = io::stdout().lock();
    for _ in 0..lines {
        stdout.write_all(line.as_bytes())?;
    }
    stdout.flush()
}

fn print(mut stream: impl Write, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    stream.flush()
}

fn connect(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"hello\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}

fn giant(bytes: usize) -> String {
    format!("\"{}\"", "a".repeat(bytes.saturating_sub(2)))
}

fn written(outcome: io::Result<()>) -> Value {
    outcome.map_or_else(|error| failure(&error), |()| json!({ "written": true }))
}

fn sent(outcome: Result<(), SendError>) -> Value {
    match outcome {
        Ok(()) => json!({ "sent": true }),
        Err(SendError::NotJson(why)) => json!({ "error": "not-json", "why": why }),
        Err(SendError::TooLarge(limit)) => json!({ "error": "too-large", "limit": limit }),
        Err(SendError::Full) => json!({ "error": "full" }),
        Err(SendError::Closed) => json!({ "error": "closed" }),
    }
}

fn received(outcome: Result<Value, ReceiveError>) -> Value {
    match outcome {
        Ok(message) => json!({ "message": message }),
        Err(ReceiveError::Closed) => json!({ "error": "closed" }),
        Err(ReceiveError::TimedOut) => json!({ "error": "timed-out" }),
        Err(ReceiveError::Mismatch(why)) => json!({ "error": "mismatch", "why": why.to_string() }),
    }
}

fn failure(error: &io::Error) -> Value {
    json!({ "error": error.kind().to_string() })
}

fn yes() -> bool {
    true
}

fn once() -> usize {
    1
}
