//! Workers that do what they must not, while the others wait for ever: `{"worker":2,"do":"trap"}`, to be told to all of
//! them; without a worker it is for each. Any other message is given back as it is, by whoever gets it.

use std::hint::black_box;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use wrun_guest::serde_json::{self, Value, json};
use wrun_guest::{handler, mailbox, worker};

#[derive(Deserialize)]
struct Order {
    worker: Option<u32>,
    #[serde(flatten)]
    act: Act,
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
enum Act {
    /// Traps.
    Trap,
    /// Panics.
    Panic,
    /// Exits.
    Exit { code: i32 },
    /// Loops for ever.
    Spin,
    /// Waits for ever.
    Wait,
    /// Sleeps for an hour.
    Sleep,
    /// Takes memory without end.
    Grow,
    /// Replies with so many bytes.
    Long { bytes: usize },
    /// Fails the task.
    Fail,
    /// Replies with who it is, its data, and how many it has in common with the others.
    Who,
    /// Sends a message, and replies when it was sent.
    Send { message: Value },
    /// Waits until so many workers are here, and replies with its number.
    Meet { workers: u32 },
}

static HERE: AtomicU32 = AtomicU32::new(0);

fn handle(message: String) -> Result<Option<String>, String> {
    let Ok(Order { worker, act }) = serde_json::from_str(&message) else { return Ok(Some(message)) };
    let me = worker::identity();
    if worker.is_some_and(|worker| worker != me.id) {
        wait();
    }
    Ok(Some(match act {
        Act::Trap => process::abort(),
        Act::Panic => panic!("on purpose"),
        Act::Exit { code } => process::exit(code),
        Act::Spin => loop {
            black_box(());
        },
        Act::Wait => wait(),
        Act::Sleep => loop {
            thread::sleep(Duration::from_hours(1));
        },
        Act::Grow => {
            let mut kept = vec![];
            loop {
                kept.push(black_box(vec![1u8; 1 << 20]));
            }
        }
        Act::Long { bytes } => format!("\"{}\"", "x".repeat(bytes.saturating_sub(2))),
        Act::Fail => return Err(json!({"failed": me.id}).to_string()),
        Act::Who => {
            let here = HERE.fetch_add(1, Ordering::Relaxed) + 1;
            let data: Value = worker::data().map_err(|error| format!("{:?}", error.to_string()))?;
            json!({"id": me.id, "count": me.count, "name": me.name, "data": data, "here": here}).to_string()
        }
        Act::Send { message } => match mailbox::send(&message) {
            Ok(()) => "\"sent\"".into(),
            Err(error) => format!("{:?}", error.to_string()),
        },
        Act::Meet { workers } => {
            HERE.fetch_add(1, Ordering::Relaxed);
            while HERE.load(Ordering::Relaxed) < workers {
                thread::yield_now();
            }
            me.id.to_string()
        }
    }))
}

fn wait() -> ! {
    loop {
        thread::park();
    }
}

handler!(raw handle);
