//! The framing of what a client sends, looked at before it is believed. Pure: bytes in, a verdict out.
//!
//! The server behind this is as liberal as many are: it takes a bare line feed for the end of a line, prefers one of
//! two headers that contradict each other, and takes a request without `Host`. Whoever stands in front of us may read
//! the same bytes in another way, and then one client's body becomes another one's request. So whatever two readers
//! could take for two things is refused here, with 400 and the end of the connection (RFC 9112, sections 2.2, 3.2, 6):
//!
//! - line ends that are not CR LF, in heads, chunk sizes and trailers;
//! - `Transfer-Encoding` that is not just `chunked`, stands more than once, beside `Content-Length`, or in HTTP/1.0;
//! - `Content-Length` that stands more than once, or is not digits alone;
//! - no `Host` in HTTP/1.1, or more than one.
//!
//! All else that is wrong with a head the server refuses by itself.

use std::mem::MaybeUninit;

use crate::limits::HEADERS_MAX;

/// What the server is given instead of bytes that are refused: no reading of them is valid, so it answers 400 to a head,
/// and gives up on a body.
const POISON: &[u8] = b"\0\r\n\r\n";

/// The same within the extension of a chunk's size, where only a bare line feed is not valid.
const POISON_OF_EXTENSION: &[u8] = b"\n";

/// Where in a client's messages the next byte is.
#[derive(Debug)]
pub(crate) struct Framing {
    state: State,
    /// The start of a head whose end has not come.
    partial: Vec<u8>,
    /// The longest head that is kept here; beyond, the server refuses it.
    head_max: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head,
    Body(u64),
    Chunked(Chunked),
    /// Nothing more is looked at: the server ends the connection.
    Over,
}

/// Where in a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunked {
    Size { size: u64, digits: u8 },
    Extension { size: u64 },
    SizeEnd { size: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    Trailer { line: u32 },
    TrailerEnd { line: u32 },
}

/// What a client is doing, as far as its bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Nothing of a message has come.
    Nothing,
    /// A head has begun.
    Head,
    /// A body has begun.
    Body,
}

/// Bytes that are refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// How many bytes before them may go on.
    pub(crate) good: usize,
    /// What goes on in their place.
    pub(crate) poison: &'static [u8],
    /// Whether they are of a body: then its request is there and has its own end.
    pub(crate) is_body: bool,
    /// Why, in words.
    pub(crate) reason: &'static str,
}

impl Framing {
    pub(crate) fn new(head_max: usize) -> Self {
        Self { state: State::Head, partial: vec![], head_max }
    }

    pub(crate) fn doing(&self) -> Doing {
        match self.state {
            State::Head if self.partial.is_empty() || self.partial == b"\r" => Doing::Nothing,
            State::Head | State::Over => Doing::Head,
            State::Body(_) | State::Chunked(_) => Doing::Body,
        }
    }

    /// Looks at the next bytes.
    ///
    /// # Errors
    /// When they are refused; nothing that comes after is looked at.
    pub(crate) fn look(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        let mut at = 0;
        while at < bytes.len() {
            let taken = match self.state {
                State::Over => return Ok(()),
                State::Head => self.head(&bytes[at..]),
                State::Body(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                    let left = left - taken as u64;
                    self.state = if left == 0 { State::Head } else { State::Body(left) };
                    Ok(taken)
                }
                State::Chunked(chunked) => self.chunked(chunked, &bytes[at..]),
            };
            match taken {
                Ok(taken) => at += taken,
                Err(reason) => {
                    let poison = match self.state {
                        State::Chunked(Chunked::Extension { .. }) => POISON_OF_EXTENSION,
                        _ => POISON,
                    };
                    let is_body = matches!(self.state, State::Chunked(_));
                    self.state = State::Over;
                    return Err(Refused { good: at, poison, is_body, reason });
                }
            }
        }
        Ok(())
    }

    /// Takes bytes of a head; answers how many.
    fn head(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        let mut start = 0;
        // empty lines before a request are nobody's
        if self.partial == b"\r" && bytes[0] == b'\n' {
            self.partial.clear();
            start = 1;
        }
        if self.partial.is_empty() {
            while bytes[start..].starts_with(b"\r\n") {
                start += 2;
            }
        }
        let before = |at: usize, back: usize| match at.checked_sub(back) {
            Some(at) if at >= start => Some(bytes[at]),
            _ => {
                let back = back - (at - start);
                self.partial.len().checked_sub(back).map(|at| self.partial[at])
            }
        };
        for at in memchr::memchr_iter(b'\n', &bytes[start..]).map(|at| at + start) {
            if before(at, 1) != Some(b'\r') {
                return Err("a line in its head does not end with CR LF");
            }
            if before(at, 2) == Some(b'\n') {
                let end = at + 1;
                self.state = if self.partial.is_empty() {
                    after_head(&bytes[start..end])?
                } else {
                    let mut head = std::mem::take(&mut self.partial);
                    head.extend_from_slice(&bytes[start..end]);
                    after_head(&head)?
                };
                return Ok(end);
            }
        }
        self.partial.extend_from_slice(&bytes[start..]);
        if self.partial.len() > self.head_max {
            // the server has as much, and refuses it
            self.partial = vec![];
            self.state = State::Over;
        }
        Ok(bytes.len())
    }

    /// Takes bytes of a chunked body; answers how many.
    fn chunked(&mut self, chunked: Chunked, bytes: &[u8]) -> Result<usize, &'static str> {
        use Chunked::{Data, DataCr, DataLf, Extension, Size, SizeEnd, Trailer, TrailerEnd};
        if let Data { left } = chunked {
            let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let left = left - taken as u64;
            self.state = State::Chunked(if left == 0 { DataCr } else { Data { left } });
            return Ok(taken);
        }
        let next = match (chunked, bytes[0]) {
            (Size { size, digits }, byte) if byte.is_ascii_hexdigit() => {
                if digits == 16 {
                    return Err("the size of a chunk has more than 16 digits");
                }
                let digit = char::from(byte).to_digit(16).expect("a hexadecimal digit");
                Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Size { digits: 0, .. }, _) => return Err("a chunk does not start with its size"),
            (Size { size, .. }, b';' | b' ' | b'\t') => Extension { size },
            (Size { size, .. } | Extension { size }, b'\r') => SizeEnd { size },
            (Size { .. }, _) => return Err("the size of a chunk is not hexadecimal"),
            (Extension { .. }, b'\n') => return Err("the size of a chunk does not end with CR LF"),
            (Extension { size }, _) => Extension { size },
            (SizeEnd { size: 0 }, b'\n') => Trailer { line: 0 },
            (SizeEnd { size }, b'\n') => Data { left: size },
            (SizeEnd { .. }, _) => return Err("the size of a chunk does not end with CR LF"),
            (DataCr, b'\r') => DataLf,
            (DataLf, b'\n') => Size { size: 0, digits: 0 },
            (DataCr | DataLf, _) => return Err("a chunk is longer than its size"),
            (Trailer { line }, b'\r') => TrailerEnd { line },
            (Trailer { .. }, b'\n') => return Err("a trailer does not end with CR LF"),
            (Trailer { line }, _) => Trailer { line: line.saturating_add(1) },
            (TrailerEnd { line: 0 }, b'\n') => {
                self.state = State::Head;
                return Ok(1);
            }
            (TrailerEnd { .. }, b'\n') => Trailer { line: 0 },
            (TrailerEnd { .. }, _) => return Err("a trailer does not end with CR LF"),
            (Data { .. }, _) => unreachable!("taken above"),
        };
        self.state = State::Chunked(next);
        Ok(1)
    }
}

/// What follows a whole head.
fn after_head(head: &[u8]) -> Result<State, &'static str> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut []);
    if !matches!(request.parse_with_uninit_headers(head, &mut headers), Ok(httparse::Status::Complete(_))) {
        // the server parses in the same way, and has an answer for each case
        return Ok(State::Over);
    }
    let (mut hosts, mut length, mut is_chunked) = (0, None, false);
    for header in request.headers.iter() {
        // by length first: most headers are none of these
        match header.name.len() {
            4 if header.name.eq_ignore_ascii_case("host") => hosts += 1,
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                if length.is_some() {
                    return Err("it has more than one Content-Length");
                }
                length = Some(content_length(header.value).ok_or("its Content-Length is not a number")?);
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                if is_chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                    return Err("its Transfer-Encoding is not just `chunked`");
                }
                is_chunked = true;
            }
            _ => {}
        }
    }
    let is_1_0 = request.version == Some(0);
    match hosts {
        0 if !is_1_0 => return Err("it has no Host"),
        0 | 1 => {}
        _ => return Err("it has more than one Host"),
    }
    match (is_chunked, length) {
        (true, _) if is_1_0 => Err("it has a Transfer-Encoding, but is HTTP/1.0"),
        (true, Some(_)) => Err("it has both a Content-Length and a Transfer-Encoding"),
        (true, None) => Ok(State::Chunked(Chunked::Size { size: 0, digits: 0 })),
        (false, None | Some(0)) => Ok(State::Head),
        (false, Some(length)) => Ok(State::Body(length)),
    }
}

fn content_length(value: &[u8]) -> Option<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of bytes that come in pieces of a size: how many were good, and why not more.
    fn look(bytes: &[u8], step: usize) -> Result<Doing, (usize, &'static str)> {
        let mut framing = Framing::new(1000);
        let mut before = 0;
        for piece in bytes.chunks(step) {
            match framing.look(piece) {
                Ok(()) => before += piece.len(),
                Err(Refused { good, reason, .. }) => return Err((before + good, reason)),
            }
        }
        Ok(framing.doing())
    }

    #[track_caller]
    fn good(text: &str, doing: Doing) {
        for step in [1, 2, 3, 7, text.len()] {
            assert_eq!(look(text.as_bytes(), step), Ok(doing), "{text:?} in steps of {step}");
        }
    }

    #[track_caller]
    fn refused(text: &str, why: &str) {
        for step in [1, 2, 3, 7, text.len()] {
            let (_, reason) = look(text.as_bytes(), step).expect_err(text);
            assert!(reason.contains(why), "{text:?} in steps of {step}: {reason}");
        }
    }

    #[test]
    fn whole_messages_are_followed_to_their_ends() {
        good("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Doing::Nothing);
        good("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Doing::Nothing);
        good("GET / HTTP/1.0\r\n\r\n", Doing::Nothing);
        good("GET / HTTP/1.1\r\nHost", Doing::Head);
        good("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab", Doing::Body);
        good(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            Doing::Nothing,
        );
        let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n";
        good(&format!("{chunked}3\r\nab\n\r\n"), Doing::Body);
        good(&format!("{chunked}3;x=y\r\nab\n\r\n0\r\n\r\n"), Doing::Nothing);
        good(&format!("{chunked}A\r\n0123456789\r\n00\r\nx-a: b\r\nx-c: d\r\n\r\nGET"), Doing::Head);
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let post = "POST / HTTP/1.1\r\nHost: a\r\n";
        refused(&format!("{post}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"), "both");
        refused(&format!("{post}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"), "both");
        refused(&format!("{post}Content-Length: 3\r\nContent-Length: 3\r\n\r\n"), "more than one Content-Length");
        refused(&format!("{post}Content-Length: 3, 3\r\n\r\n"), "not a number");
        refused(&format!("{post}Content-Length: +3\r\n\r\n"), "not a number");
        refused(&format!("{post}Content-Length: 99999999999999999999\r\n\r\n"), "not a number");
        refused(&format!("{post}Transfer-Encoding: xchunked\r\n\r\n"), "not just");
        refused(&format!("{post}Transfer-Encoding: gzip, chunked\r\n\r\n"), "not just");
        refused(&format!("{post}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"), "not just");
        refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0");
        refused("GET / HTTP/1.1\nHost: a\r\n\r\n", "CR LF");
        refused("GET / HTTP/1.1\r\nHost: a\n\r\n", "CR LF");
        refused("GET / HTTP/1.1\r\nHost: a\r\n\n", "CR LF");
        refused("GET / HTTP/1.1\r\n\r\n", "no Host");
        refused("GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", "more than one Host");
        let chunked = format!("{post}Transfer-Encoding: chunked\r\n\r\n");
        refused(&format!("{chunked}\r\n"), "does not start");
        refused(&format!("{chunked}3\nabc\r\n"), "not hexadecimal");
        refused(&format!("{chunked}0x3\r\nabc\r\n"), "not hexadecimal");
        refused(&format!("{chunked}3;x\nabc\r\n"), "CR LF");
        refused(&format!("{chunked}3\r\nabcd\r\n"), "longer");
        refused(&format!("{chunked}00000000000000003\r\n"), "16 digits");
        refused(&format!("{chunked}0\r\nx: y\n\r\n"), "CR LF");
        refused(&format!("{chunked}0\r\n\rx"), "CR LF");
    }

    #[test]
    fn what_comes_before_a_refused_head_goes_on() {
        let first = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let both = format!("{first}GET / HTTP/1.1\r\n\r\n");
        assert_eq!(look(both.as_bytes(), both.len()), Err((first.len(), "it has no Host")));
    }

    #[test]
    fn a_head_without_end_is_not_kept() {
        let mut framing = Framing::new(1000);
        assert_eq!(framing.look(&[b'a'; 1000]), Ok(()));
        assert_eq!(framing.partial.len(), 1000);
        assert_eq!(framing.look(b"a"), Ok(()));
        assert_eq!((framing.partial.capacity(), framing.state), (0, State::Over));
    }
}
