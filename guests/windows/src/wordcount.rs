//! Counts lines, words and bytes, as `wc` does: of a chunk, or of all together.

use serde::{Deserialize, Serialize};
use windows::kernel;
use wrun_guest::{handler, window::Chunk};

#[derive(Serialize, Deserialize)]
struct Counts {
    lines: u64,
    words: u64,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Task {
    Chunk(Chunk),
    /// The counts of all chunks (`--reduce`).
    All(Vec<Counts>),
}

fn handle(task: Task) -> Result<Counts, String> {
    match task {
        Task::Chunk(chunk) => {
            let kernel::Counts { lines, words, bytes } = kernel::count(&chunk.input()?);
            Ok(Counts { lines, words, bytes })
        }
        Task::All(counts) => Ok(counts.into_iter().fold(Counts { lines: 0, words: 0, bytes: 0 }, |all, one| Counts {
            lines: all.lines + one.lines,
            words: all.words + one.words,
            bytes: all.bytes + one.bytes,
        })),
    }
}

handler!(handle);
