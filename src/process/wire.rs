//! Frames: what a primary and its process workers say to each other over a socket pair.
//!
//! | bytes | what |
//! | --- | --- |
//! | 4 | length of the body, little-endian |
//! | 1 | [`Kind`] |
//! | 8 | id: which task the frame is about, 0 when it is about none; little-endian |
//! | n | body, mostly JSON |
//!
//! A descriptor may come with a frame, with its first byte. The primary opens with a [`Kind::Hello`], whose body names the version of all this. Pure: bytes in, frames out. A
//! frame that is too long is refused by its first four bytes, before there is memory for it.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// The version of the frames; both ends are the same binary, so a difference is a mistake and not to be bridged.
pub(crate) const VERSION: u32 = 1;

const HEADER: usize = 4 + 1 + 8;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// To the child: who it is and what to do.
    Hello = 1,
    /// To the primary: ready for tasks.
    Ready = 2,
    /// To the primary: this process ends, and the body says how (an outcome).
    Ended = 3,
    /// To the worker: handle the body.
    Task = 4,
    /// To the primary: the task's reply.
    Reply = 5,
    /// To the primary: the task is done and has no reply.
    NoReply = 6,
    /// To the primary: the guest failed the task; the body is its reason.
    TaskError = 7,
    /// To the primary: the task ended its instance, and the body says how (an outcome).
    TaskEnded = 8,
    /// To the primary: the guest sent a message through its mailbox.
    Message = 9,
    /// To the primary: lines the guest printed to its standard output, without their ends.
    Stdout = 10,
    /// To the primary: lines the guest printed to its standard error, without their ends.
    Stderr = 11,
    /// To the primary: the id is how many bytes of the guest's output were dropped.
    Dropped = 12,
    /// To the worker: there will be no more tasks; end when those at hand are done. The id is for how many milliseconds
    /// connections without a request may still bring one.
    Drain = 13,
    /// To the primary: the worker's own code is at fault; the body says where.
    Panic = 14,
    /// To the worker: it is its slot's; a port may be served from now on.
    Open = 15,
    /// To the primary: the worker has done as much as it should and wants a successor; it goes on until it is drained.
    Recycle = 16,
    /// To the primary: a request was answered; the body is its record, the id how many before it were dropped.
    Access = 17,
    /// To the primary: something is wrong that ends nothing; the body says what.
    Warning = 18,
    /// To the primary: not all walls are up, but the child may go on; the body says which are missing.
    Walls = 19,
    /// To the primary: the guest was refused something of the network; the body says what, and which grant it lacks.
    Denied = 20,
    /// To the worker: a part of a buffer comes with this; the body is its name, the id how many parts come, with this one.
    Buffer = 21,
    /// To the router: where an app's requests go; the body is a route. The id is the number of the version that is live,
    /// whose channel comes with this; 0 when none is.
    Route = 22,
    /// To the router: the app of this name is no more. The id is the number of this change.
    Unroute = 23,
    /// To the router: what there is to list. The id is the number of this change.
    Index = 24,
    /// To the primary: nothing of the version with this number is in flight any more.
    Idle = 25,
    /// To the primary: somebody waits for the app of this name.
    Wake = 26,
    /// To the primary: the change of this number holds for all requests from now on.
    Routed = 27,
}

impl Kind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Ready,
            3 => Self::Ended,
            4 => Self::Task,
            5 => Self::Reply,
            6 => Self::NoReply,
            7 => Self::TaskError,
            8 => Self::TaskEnded,
            9 => Self::Message,
            10 => Self::Stdout,
            11 => Self::Stderr,
            12 => Self::Dropped,
            13 => Self::Drain,
            14 => Self::Panic,
            15 => Self::Open,
            16 => Self::Recycle,
            17 => Self::Access,
            18 => Self::Warning,
            19 => Self::Walls,
            20 => Self::Denied,
            21 => Self::Buffer,
            22 => Self::Route,
            23 => Self::Unroute,
            24 => Self::Index,
            25 => Self::Idle,
            26 => Self::Wake,
            27 => Self::Routed,
            _ => return None,
        })
    }
}

/// One frame, its body borrowed from the buffer that it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: u64,
    pub(crate) body: &'a [u8],
}

/// Why the bytes of the other side are not frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a frame of {length} bytes came, at most {max} are taken")]
    TooLong { length: u32, max: u32 },
    #[error("a frame of unknown kind {kind} came")]
    UnknownKind { kind: u8 },
}

/// Bytes that came, as frames.
#[derive(Debug)]
pub(crate) struct Incoming {
    buffer: Vec<u8>,
    taken: usize,
    body_max: u32,
}

impl Incoming {
    /// Takes frames whose body has at most `body_max` bytes.
    pub(crate) fn new(body_max: u32) -> Self {
        Self { buffer: Vec::new(), taken: 0, body_max }
    }

    /// The buffer to read more bytes into, at its end. Call it when all whole frames are taken.
    pub(crate) fn space(&mut self) -> &mut Vec<u8> {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        // one read for all that a busy peer has queued; the rest of a long frame at once
        self.buffer.reserve(self.missing().max(READ));
        &mut self.buffer
    }

    /// How many bytes are to come of the frame that has begun, as far as that is known.
    pub(crate) fn missing(&self) -> usize {
        let rest = &self.buffer[self.taken..];
        rest.first_chunk::<4>().map_or(0, |length| {
            let length = u32::from_le_bytes(*length).min(self.body_max) as usize;
            (HEADER + length).saturating_sub(rest.len())
        })
    }

    /// Whether all that came was taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.taken == self.buffer.len()
    }

    /// Takes the next frame, if it is whole.
    pub(crate) fn next(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let rest = &self.buffer[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length);
        if length > self.body_max {
            return Err(WireError::TooLong { length, max: self.body_max });
        }
        let Some((&[kind], rest)) = rest.split_first_chunk::<1>() else { return Ok(None) };
        let kind = Kind::from_byte(kind).ok_or(WireError::UnknownKind { kind })?;
        let Some((id, rest)) = rest.split_first_chunk::<8>() else { return Ok(None) };
        let Some(body) = rest.get(..length as usize) else { return Ok(None) };
        self.taken += HEADER + body.len();
        Ok(Some(Frame { kind, id: u64::from_le_bytes(*id), body }))
    }
}

/// How much is read at once when nothing is known of what comes.
const READ: usize = 64 << 10;

/// Frames that wait to be written, as bytes.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    buffer: Vec<u8>,
    written: usize,
    /// Those that go with a frame, by where in the buffer that begins.
    fds: VecDeque<(usize, OwnedFd)>,
}

impl Outgoing {
    /// Adds a frame.
    ///
    /// # Panics
    /// When the body has 4 GiB or more: messages are bounded far below.
    pub(crate) fn push(&mut self, kind: Kind, id: u64, body: &[u8]) {
        let length = u32::try_from(body.len()).expect("messages are bounded far below 4 GiB");
        self.buffer.reserve(HEADER + body.len());
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.push(kind as u8);
        self.buffer.extend_from_slice(&id.to_le_bytes());
        self.buffer.extend_from_slice(body);
    }

    /// Adds a frame with a descriptor.
    ///
    /// # Panics
    /// As [`Outgoing::push`].
    pub(crate) fn push_with(&mut self, kind: Kind, id: u64, body: &[u8], fd: OwnedFd) {
        self.fds.push_back((self.buffer.len(), fd));
        self.push(kind, id, body);
    }

    /// Takes over all frames of another one.
    pub(crate) fn append(&mut self, other: &mut Self) {
        if self.buffer.is_empty() {
            std::mem::swap(self, other);
        } else {
            let (end, taken) = (self.buffer.len(), other.written);
            self.fds.extend(other.fds.drain(..).map(|(at, fd)| (at - taken + end, fd)));
            self.buffer.extend_from_slice(other.pending());
            other.advance(other.pending().len());
        }
    }

    /// What is written next: bytes, and the descriptor that goes with the first of them.
    pub(crate) fn next(&self) -> (&[u8], Option<BorrowedFd<'_>>) {
        let mut fds = self.fds.iter();
        let mut following = fds.next();
        let fd = following.filter(|(at, _)| *at == self.written).map(|(_, fd)| fd.as_fd());
        if fd.is_some() {
            following = fds.next();
        }
        (&self.buffer[self.written..following.map_or(self.buffer.len(), |(at, _)| *at)], fd)
    }

    /// The bytes that wait.
    pub(crate) fn pending(&self) -> &[u8] {
        &self.buffer[self.written..]
    }

    /// Notes that the first `count` of them are written.
    pub(crate) fn advance(&mut self, count: usize) {
        self.written += count;
        while self.fds.pop_front_if(|(at, _)| *at < self.written).is_some() {}
        if self.written == self.buffer.len() {
            self.buffer.clear();
            self.written = 0;
        } else if self.written > 1 << 20 && self.written * 2 > self.buffer.len() {
            self.buffer.drain(..self.written);
            for (at, _) in &mut self.fds {
                *at -= self.written;
            }
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(frames: &[(Kind, u64, &[u8])]) -> Vec<u8> {
        let mut outgoing = Outgoing::default();
        for (kind, id, body) in frames {
            outgoing.push(*kind, *id, body);
        }
        outgoing.pending().to_vec()
    }

    #[test]
    fn frames_survive_any_cut() {
        let frames: &[(Kind, u64, &[u8])] =
            &[(Kind::Task, 7, b"[1,2]"), (Kind::NoReply, u64::MAX, b""), (Kind::Reply, 8, &[b'x'; 300])];
        let whole = bytes(frames);
        for step in [1, 2, 3, 5, 13, 64, whole.len()] {
            let mut incoming = Incoming::new(300);
            let mut count = 0;
            for piece in whole.chunks(step) {
                incoming.space().extend_from_slice(piece);
                let before = incoming.missing();
                assert!(before <= whole.len(), "no more than there is");
                while let Some(frame) = incoming.next().expect("frames") {
                    assert_eq!((frame.kind, frame.id, frame.body), frames[count]);
                    count += 1;
                }
            }
            assert_eq!(count, frames.len(), "in steps of {step}");
        }
    }

    #[test]
    fn a_long_frame_is_refused_by_its_length_alone() {
        let mut incoming = Incoming::new(100);
        incoming.space().extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(incoming.buffer.capacity() < 2 * READ);
        assert_eq!(incoming.next(), Err(WireError::TooLong { length: u32::MAX, max: 100 }));

        let mut incoming = Incoming::new(100);
        incoming.space().extend_from_slice(&bytes(&[(Kind::Reply, 1, &[0; 100])]));
        assert!(incoming.next().expect("just short enough").is_some());
        incoming.space().extend_from_slice(&bytes(&[(Kind::Reply, 1, &[0; 101])]));
        assert_eq!(incoming.next(), Err(WireError::TooLong { length: 101, max: 100 }));
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        for kind in [0, 28, 255] {
            let mut incoming = Incoming::new(100);
            incoming.space().extend_from_slice(&[0, 0, 0, 0, kind, 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(incoming.next(), Err(WireError::UnknownKind { kind }));
        }
        for kind in 1..=27 {
            assert_eq!(Kind::from_byte(kind).map(|kind| kind as u8), Some(kind));
        }
    }

    #[test]
    fn descriptors_stay_with_their_frames() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").expect("it is there"));
        let mut first = Outgoing::default();
        first.push(Kind::Task, 1, &vec![0; 3 << 20]);
        first.push_with(Kind::Buffer, 0, b"a", null());
        first.push_with(Kind::Buffer, 0, b"b", null());
        let mut second = Outgoing::default();
        second.push(Kind::Task, 2, b"2");
        second.push_with(Kind::Buffer, 0, b"c", null());
        second.push(Kind::Task, 3, b"3");
        // past one frame, so that what is taken over begins within a buffer
        second.advance(HEADER + 1);
        // and far enough into the other that what is written of it is given up
        first.advance(HEADER + (2 << 20));
        first.append(&mut second);
        let mut incoming = Incoming::new(4 << 20);
        let mut header = Outgoing::default();
        header.push(Kind::Task, 1, &vec![0; 3 << 20]);
        incoming.space().extend_from_slice(&header.pending()[..HEADER + (2 << 20)]);
        let (mut with, mut names) = (vec![], vec![]);
        while let (bytes @ [_, ..], fd) = first.next() {
            // a descriptor goes once, with the first byte of what is written
            let count = bytes.len().min(700_001);
            if fd.is_some() {
                with.push(bytes[HEADER..].to_vec());
            }
            incoming.space().extend_from_slice(&bytes[..count]);
            first.advance(count);
        }
        while let Some(frame) = incoming.next().expect("frames") {
            if frame.kind == Kind::Buffer {
                names.push(frame.body.to_vec());
            }
        }
        assert_eq!(names, [b"a", b"b", b"c"]);
        assert_eq!(with.iter().map(|bytes| bytes[0]).collect::<Vec<_>>(), b"abc");
        assert_eq!((first.fds.len(), second.fds.len()), (0, 0));
    }

    #[test]
    fn what_is_written_is_forgotten() {
        let mut outgoing = Outgoing::default();
        outgoing.push(Kind::Task, 1, &vec![1; 3 << 20]);
        let whole = outgoing.pending().to_vec();
        let mut seen = Vec::new();
        while !outgoing.pending().is_empty() {
            let count = outgoing.pending().len().min(700_001);
            seen.extend_from_slice(&outgoing.pending()[..count]);
            outgoing.advance(count);
        }
        assert!(seen == whole);
        assert_eq!(outgoing.buffer.len(), 0);
    }
}
