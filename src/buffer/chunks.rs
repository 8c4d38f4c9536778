//! A buffer in pieces: where each begins and ends.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Buffer;
use crate::limits::Bytes;

/// One piece of a buffer, and what a guest is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Chunk {
    /// Its number, from 0.
    #[serde(rename = "chunk")]
    pub index: u64,
    /// Where it begins in the buffer, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
    /// How many bytes before it belong to its window, too.
    #[serde(skip_serializing_if = "is_zero")]
    pub before: u64,
    /// How many bytes after it do.
    #[serde(skip_serializing_if = "is_zero")]
    pub after: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Chunk {
    /// Its bytes, without those around it.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }
}

/// How a buffer is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Split {
    /// How many bytes a chunk has, at least one.
    pub(crate) chunk: u64,
    /// Where it is cut.
    pub(crate) cut: Cut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Cut {
    /// Where a chunk is full; the window has so many bytes more at both ends.
    Anywhere { overlap: u64 },
    /// Behind the first end of a line at or after that.
    Lines,
}

impl Split {
    /// The most bytes of a window that is not of long lines.
    pub(crate) fn window(&self, buffer: u64) -> u64 {
        let overlap = match self.cut {
            Cut::Anywhere { overlap } => overlap,
            Cut::Lines => 0,
        };
        self.chunk.saturating_add(overlap).saturating_add(overlap).min(buffer)
    }
}

/// A buffer in pieces, in order: together they are the buffer, and none is empty.
///
/// ```
/// use wrun::{Buffer, limits::Bytes};
///
/// let text = Buffer::from_slice(b"one\ntwo\nthree\n")?;
/// let ranges = |chunk| text.split(Bytes(chunk)).lines().map(|chunk| chunk.range()).collect::<Vec<_>>();
/// assert_eq!(ranges(5), [0..8, 8..14]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Chunks {
    pub(crate) buffer: Buffer,
    pub(crate) split: Split,
    index: u64,
    offset: u64,
}

impl Chunks {
    pub(super) fn of(buffer: Buffer, chunk: Bytes) -> Self {
        Self::new(buffer, Split { chunk: chunk.0.max(1), cut: Cut::Anywhere { overlap: 0 } })
    }

    pub(crate) fn new(buffer: Buffer, split: Split) -> Self {
        Self { buffer, split, index: 0, offset: 0 }
    }

    /// Cuts behind the ends of lines only: a chunk goes on to the end of its last line.
    #[must_use]
    pub fn lines(mut self) -> Self {
        self.split.cut = Cut::Lines;
        self
    }

    /// Lets the window of each chunk begin so many bytes before it and end as many after it, as far as there are some.
    #[must_use]
    pub fn overlap(mut self, overlap: Bytes) -> Self {
        self.split.cut = Cut::Anywhere { overlap: overlap.0 };
        self
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let all = self.buffer.length().0;
        let (index, offset) = (self.index, self.offset);
        if offset == all {
            return None;
        }
        let full = offset.saturating_add(self.split.chunk).min(all);
        let (end, overlap) = match self.split.cut {
            Cut::Anywhere { overlap } => (full, overlap),
            Cut::Lines => {
                // the last byte of a full chunk may be the end of a line itself
                let from = full - 1;
                let rest = &self.buffer[Bytes(from).as_usize()..];
                (memchr::memchr(b'\n', rest).map_or(all, |at| from + at as u64 + 1), 0)
            }
        };
        (self.index, self.offset) = (index + 1, end);
        let (before, after) = (overlap.min(offset), overlap.min(all - end));
        Some(Chunk { index, offset, length: end - offset, before, after })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn chunks_are_the_buffer(bytes in vec(prop_oneof![Just(b'\n'), Just(b'x')], 0..300), chunk in 1..400u64, overlap in 0..50u64) {
            let buffer = Buffer::from_slice(&bytes).expect("memory");
            let ends = |at: u64| bytes[usize::try_from(at).expect("small") - 1] == b'\n' || at == bytes.len() as u64;
            for (chunks, by_lines) in
                [(buffer.split(Bytes(chunk)).overlap(Bytes(overlap)), false), (buffer.split(Bytes(chunk)).lines(), true)]
            {
                let mut end = 0;
                for (index, found) in chunks.enumerate() {
                    prop_assert_eq!((found.index, found.offset), (index as u64, end));
                    end = found.range().end;
                    prop_assert!(found.length > 0 && end <= bytes.len() as u64);
                    if by_lines {
                        prop_assert!(ends(end) && (found.length >= chunk || end == bytes.len() as u64));
                        // no line end between where it was full and its end
                        let inner = (found.offset + chunk).min(end)..end;
                        prop_assert!(inner.clone().skip(1).all(|at| !ends(at)), "{:?}", inner);
                    } else {
                        prop_assert!(found.length == chunk || end == bytes.len() as u64);
                        prop_assert_eq!(found.before, overlap.min(found.offset));
                        prop_assert_eq!(found.after, overlap.min(bytes.len() as u64 - end));
                    }
                }
                prop_assert_eq!(end, bytes.len() as u64);
            }
        }
    }

    #[test]
    fn a_guest_is_told_what_there_is() {
        let buffer = Buffer::from_slice(b"0123456789").expect("memory");
        let told =
            |chunks: Chunks| chunks.map(|chunk| serde_json::to_string(&chunk).expect("JSON")).collect::<Vec<_>>();
        assert_eq!(
            told(buffer.split(Bytes(6))),
            [r#"{"chunk":0,"offset":0,"length":6}"#, r#"{"chunk":1,"offset":6,"length":4}"#]
        );
        assert_eq!(
            told(buffer.split(Bytes(6)).overlap(Bytes(2))),
            [r#"{"chunk":0,"offset":0,"length":6,"after":2}"#, r#"{"chunk":1,"offset":6,"length":4,"before":2}"#]
        );
        assert_eq!(buffer.split(Bytes(0)).count(), 10);
        assert_eq!(buffer.split(Bytes(u64::MAX)).count(), 1);
    }
}
