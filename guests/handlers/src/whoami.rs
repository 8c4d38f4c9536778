//! Tells who it is, what it was started with, and how many tasks this instance has handled. Takes any message.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::IgnoredAny;
use wrun_guest::handler;
use wrun_guest::serde_json::value::RawValue;
use wrun_guest::worker::{self, Kind};

/// Lives as long as the instance: a worker's life, or one task with `--instance task`.
static HANDLED: AtomicU64 = AtomicU64::new(0);

#[derive(Serialize)]
struct Whoami {
    id: u32,
    kind: &'static str,
    count: u32,
    pid: u32,
    generation: u32,
    name: String,
    data: Box<RawValue>,
    handled: u64,
}

fn handle(_: IgnoredAny) -> Result<Whoami, String> {
    let identity = worker::identity();
    Ok(Whoami {
        id: identity.id,
        kind: match identity.kind {
            Kind::Process => "process",
            Kind::Thread => "thread",
        },
        count: identity.count,
        pid: identity.pid,
        generation: identity.generation,
        name: identity.name,
        data: worker::data().map_err(|error| error.to_string())?,
        handled: HANDLED.fetch_add(1, Ordering::Relaxed) + 1,
    })
}

handler!(handle);
