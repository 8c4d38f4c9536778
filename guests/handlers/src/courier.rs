//! A command that lives on its mailbox: what it receives it sends back as it is written, unless that is an object which
//! tells it to do something else:
//!
//! | message | |
//! | --- | --- |
//! | `{"do":"exit","code":N}` | exits |
//! | `{"do":"trap"}` | traps |
//! | `{"do":"spin"}` | loops without end |
//! | `{"do":"tell"}` | sends its data, the folder that it is in, and who it is |
//! | `{"do":"print","text":T}` | prints to stdout, and sends nothing |
//! | `{"do":"send","text":T}` | sends a text as it is; when that is refused, sends why |
//! | `{"do":"long","bytes":N}` | sends a message of so many bytes; when that is refused, sends why |
//! | `{"do":"flood","bytes":N}` | sends messages of so many bytes until there is no more room, then how many it sent |
//! | `{"do":"wait","ms":N}` | waits for the next message for so long, and sends it or `"timed-out"` |
//!
//! When its parent has disconnected it sends `"bye"` and exits with 0.

use std::process;

use serde::Deserialize;
use serde_json::json;
use wrun_guest::{
    mailbox::{self, ReceiveError, SendError},
    serde_json::value::RawValue,
    worker,
};

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Order {
    Exit { code: i32 },
    Trap,
    Spin,
    Tell,
    Print { text: String },
    Send { text: String },
    Long { bytes: usize },
    Flood { bytes: usize },
    Wait { ms: u64 },
}

fn main() {
    loop {
        let message: Box<RawValue> = match mailbox::receive(None) {
            Ok(message) => message,
            Err(ReceiveError::Closed) => break,
            Err(error) => panic!("{error}"),
        };
        match serde_json::from_str(message.get()) {
            Ok(order) => obey(order),
            Err(_) => deliver(message.get()),
        }
    }
    deliver("\"bye\"");
}

/// Modules have no way to ask.
fn initial_cwd() -> Option<String> {
    #[cfg(target_env = "p2")]
    return wasip2::cli::environment::initial_cwd();
    #[cfg(not(target_env = "p2"))]
    return None;
}

fn obey(order: Order) {
    match order {
        Order::Exit { code } => process::exit(code),
        Order::Trap => process::abort(),
        Order::Spin => loop {
            std::hint::spin_loop();
        },
        Order::Tell => {
            let who = worker::identity();
            let data: Box<RawValue> = worker::data().expect("JSON");
            let cwd = initial_cwd();
            let told = json!({
                "data": data, "cwd": cwd, "id": who.id, "count": who.count, "generation": who.generation,
                "name": who.name, "pid": who.pid, "process": who.kind == worker::Kind::Process,
            });
            deliver(&told.to_string());
        }
        Order::Print { text } => println!("{text}"),
        Order::Send { text } => send_or_say_why(&text),
        Order::Long { bytes } => send_or_say_why(&text_of(bytes)),
        Order::Flood { bytes } => {
            let message = text_of(bytes);
            let mut sent = 0;
            while mailbox::send_json(&message).is_ok() {
                sent += 1;
            }
            deliver(&json!({"sent": sent}).to_string());
        }
        Order::Wait { ms } => match mailbox::receive::<Box<RawValue>>(Some(std::time::Duration::from_millis(ms))) {
            Ok(message) => deliver(message.get()),
            Err(ReceiveError::TimedOut) => deliver("\"timed-out\""),
            Err(error) => panic!("{error}"),
        },
    }
}

fn send_or_say_why(json: &str) {
    if let Err(refused) = mailbox::send_json(json) {
        deliver(&json!(format!("{refused:?}")).to_string());
    }
}

/// A message of so many bytes.
fn text_of(bytes: usize) -> String {
    format!("\"{}\"", "x".repeat(bytes - 2))
}

/// Sends, as soon as there is room.
fn deliver(json: &str) {
    while let Err(refused) = mailbox::send_json(json) {
        match refused {
            SendError::Full => std::thread::sleep(std::time::Duration::from_millis(1)),
            refused => panic!("{refused:?}"),
        }
    }
}
