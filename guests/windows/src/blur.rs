//! Blurs a picture: a binary PGM becomes another one of the same size. It needs `--overlap` of a row and a pixel.

use windows::kernel;
use wrun_guest::{
    handler,
    window::{Chunk, Window, buffers},
};

/// The head of a picture is no longer than this.
const HEAD_MAX: u64 = 1024;

fn handle(chunk: Chunk) -> Option<Result<(), String>> {
    // there is nothing to reply: the picture is the answer
    blur(chunk).err().map(Err)
}

fn blur(chunk: Chunk) -> Result<(), String> {
    let size = buffers().iter().find(|buffer| buffer.name == "input").ok_or("expected a picture as input")?.length;
    let (head, width, height) = kernel::read_pgm(&Window::of("input", 0, size.min(HEAD_MAX))?)?;
    let pixels = width.checked_mul(height).and_then(|pixels| pixels.checked_add(head)).map(|end| end as u64);
    if pixels != Some(size) {
        return Err(format!(
            "expected {width} times {height} pixels behind the head of {head} bytes, found {size} bytes"
        ));
    }
    let (input, mut output) = (chunk.input()?, chunk.output()?);
    // what of the chunk is head stays as it is
    let number = |n: u64| usize::try_from(n).map_err(|_| "expected a picture of less than 4 GiB".to_owned());
    let skipped = number((head as u64).saturating_sub(chunk.offset).min(chunk.length))?;
    let before = number(chunk.before)?;
    output[..skipped].copy_from_slice(&input[before..before + skipped]);
    let first = (number(chunk.offset)? + skipped).saturating_sub(head);
    let start = number(chunk.offset - chunk.before)?;
    let needed = (width + 1) as u64;
    let lacks = |had: u64, there_is: u64| had < needed.min(there_is);
    if lacks(chunk.before, chunk.offset) || lacks(chunk.after, size - chunk.offset - chunk.length) {
        return Err(format!("expected windows that overlap by a row and a pixel: --overlap {needed}"));
    }
    // without the head
    let (around, start) =
        if start < head { (&input[(head - start).min(input.len())..], 0) } else { (&input[..], start - head) };
    kernel::blur(around, start, (width, height), first, &mut output[skipped..]);
    Ok(())
}

handler!(handle);
