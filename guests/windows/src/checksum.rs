//! The Adler-32 checksum, as zlib has it: of a chunk, or of all together.

use serde::{Deserialize, Serialize};
use windows::kernel;
use wrun_guest::{handler, window::Chunk};

#[derive(Serialize, Deserialize)]
struct Sum {
    adler32: u32,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Task {
    Chunk(Chunk),
    /// The sums of all chunks, in order (`--reduce`).
    All(Vec<Sum>),
}

fn handle(task: Task) -> Result<Sum, String> {
    match task {
        Task::Chunk(chunk) => {
            let bytes = chunk.input()?;
            Ok(Sum { adler32: kernel::adler32(&bytes), bytes: bytes.len() as u64 })
        }
        Task::All(sums) => Ok(sums.into_iter().fold(Sum { adler32: 1, bytes: 0 }, |all, one| Sum {
            adler32: kernel::adler32_of_both(all.adler32, one.adler32, one.bytes),
            bytes: all.bytes + one.bytes,
        })),
    }
}

handler!(handle);
