//! The input: bytes, cut into lines, checked, and handed over in batches.

use std::io::{self, BufRead, BufReader, Read};

use tokio::sync::mpsc;

use crate::message::{Message, MessageError};

/// Lines that are read ahead: so many batches, of so many lines or bytes each.
pub(crate) const BATCHES: usize = 4;
const BATCH_LINES: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// One line that is not blank.
pub(crate) struct Line {
    pub(crate) number: u64,
    pub(crate) message: Result<Message, MessageError>,
}

/// Reads lines until the end, and hands them over in batches: full ones, or what there is before it has to wait.
pub(crate) fn read_lines(input: impl Read, max: usize, lines: &mpsc::Sender<io::Result<Vec<Line>>>) {
    let mut input = BufReader::with_capacity(BATCH_BYTES / 4, input);
    let mut reader = LineReader { max, number: 0, partial: vec![], dropped: 0, batch: vec![], batch_bytes: 0 };
    loop {
        let chunk = match input.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = lines.blocking_send(Ok(reader.take_batch()));
                let _ = lines.blocking_send(Err(error));
                return;
            }
        };
        if chunk.is_empty() {
            reader.end();
            let _ = lines.blocking_send(Ok(reader.take_batch()));
            return;
        }
        let mut rest = chunk;
        while !rest.is_empty() {
            rest = reader.take(rest);
            if reader.is_full() && lines.blocking_send(Ok(reader.take_batch())).is_err() {
                return;
            }
        }
        let length = chunk.len();
        input.consume(length);
        // the next read may have to wait
        if !reader.batch.is_empty() && lines.blocking_send(Ok(reader.take_batch())).is_err() {
            return;
        }
    }
}

struct LineReader {
    max: usize,
    number: u64,
    /// The start of a line whose end has not come yet ...
    partial: Vec<u8>,
    /// ... and how much of it came after that and was not kept, since it is too long anyhow.
    dropped: usize,
    batch: Vec<Line>,
    batch_bytes: usize,
}

impl LineReader {
    /// Takes the bytes up to the next end of a line, or all; answers the rest.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            // white space around the message does not count for its length, within reason
            let room = (self.max + 1024).saturating_sub(self.partial.len());
            let kept = bytes.len().min(room);
            self.partial.extend_from_slice(&bytes[..kept]);
            self.dropped += bytes.len() - kept;
            return &[];
        };
        if self.partial.is_empty() && self.dropped == 0 {
            self.line(&bytes[..end], 0);
        } else {
            let mut line = std::mem::take(&mut self.partial);
            line.extend_from_slice(&bytes[..end]);
            let dropped = std::mem::take(&mut self.dropped);
            self.line(&line, dropped);
        }
        &bytes[end + 1..]
    }

    /// The input has ended, perhaps within a line.
    fn end(&mut self) {
        let (line, dropped) = (std::mem::take(&mut self.partial), std::mem::take(&mut self.dropped));
        if !line.is_empty() {
            self.line(&line, dropped);
        }
    }

    fn line(&mut self, line: &[u8], dropped: usize) {
        self.number += 1;
        let message = match line.trim_ascii() {
            [] if dropped == 0 => return,
            text if dropped > 0 => Err(MessageError::TooLong { length: text.len() + dropped, max: self.max }),
            text => Message::check(text, self.max),
        };
        self.batch_bytes += line.len();
        self.batch.push(Line { number: self.number, message });
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= BATCH_LINES || self.batch_bytes >= BATCH_BYTES
    }

    fn take_batch(&mut self) -> Vec<Line> {
        self.batch_bytes = 0;
        std::mem::take(&mut self.batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &[u8], step: usize, max: usize) -> Vec<(u64, Result<String, MessageError>)> {
        let mut reader = LineReader { max, number: 0, partial: vec![], dropped: 0, batch: vec![], batch_bytes: 0 };
        for piece in input.chunks(step) {
            let mut rest = piece;
            while !rest.is_empty() {
                rest = reader.take(rest);
            }
        }
        reader.end();
        let lines = reader.take_batch().into_iter();
        lines.map(|line| (line.number, line.message.map(|message| message.to_string()))).collect()
    }

    #[test]
    fn lines_are_numbered_and_blank_ones_skipped() {
        let input = b"1\n\n \t\r\n[2]\r\n\n\"three\"";
        for step in [1, 2, 3, 100] {
            let expected = [(1, Ok("1".into())), (4, Ok("[2]".into())), (6, Ok("\"three\"".into()))];
            assert_eq!(read(input, step, 100), expected, "in steps of {step}");
        }
        assert_eq!(read(b"", 1, 100), []);
        assert_eq!(read(b"\n\n", 1, 100), []);
    }

    #[test]
    fn long_lines_are_refused_with_their_length_and_not_kept() {
        let mut input = vec![b'7'; 1 << 20];
        input.extend_from_slice(b"\n8\n");
        for step in [1000, 1 << 21] {
            assert_eq!(
                read(&input, step, 100),
                [(1, Err(MessageError::TooLong { length: 1 << 20, max: 100 })), (2, Ok("8".into()))]
            );
        }
    }
}
