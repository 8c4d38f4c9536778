//! Buffers: memory of the host that guests see windows of, in this process and in others, and that is never copied for it.
//!
//! A [`Buffer`] is sealed: nobody can write to it or cut it off any more, not even this process. A [`BufferMut`] is this
//! process's alone until guests write to it, each to a range of its own, and becomes a [`Buffer`] when it is sealed. Both
//! are files without a name (`memfd`), so that a descriptor is all that another process needs. A large file is copied into
//! several of these at once, which lie side by side: the system lets one at a time write to each.

mod chunks;
mod mapped;
mod memory;

use std::{
    fs::File,
    io::{self, Read},
    ops::{Deref, DerefMut},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::Arc,
    thread,
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    io::Errno,
};

use self::memory::Map;
pub(crate) use self::{
    chunks::Split,
    mapped::{Each, INPUT, OUTPUT},
    memory::Shared,
};
pub use self::{
    chunks::{Chunk, Chunks},
    mapped::{Failed, Mapped, ParMap},
};
use crate::limits::Bytes;

/// What is read and written at once of what has no length: little enough to stay in a core's cache between the two.
const BLOCK: usize = 256 << 10;

/// The longest name of a buffer, in bytes.
const NAME_MAX: usize = 64;

/// Bytes that do not change any more. Clones are the same buffer.
///
/// ```
/// use wrun::Buffer;
///
/// let buffer = Buffer::from_slice(b"one\ntwo\n")?;
/// assert_eq!(&buffer[..3], b"one");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Buffer(Arc<Sealed>);

#[derive(Debug)]
struct Sealed {
    /// All but the last are whole pages long.
    parts: Vec<OwnedFd>,
    map: Map,
}

impl Drop for Sealed {
    /// Gives back the memory of all parts at once, which takes the system about half as long as filling them.
    fn drop(&mut self) {
        drop(std::mem::take(&mut self.map));
        let mut parts = std::mem::take(&mut self.parts).into_iter();
        let first = parts.next();
        thread::scope(|scope| {
            for part in parts {
                // when there is no room for a thread, what it was given is dropped here
                let _ = thread::Builder::new().spawn_scoped(scope, || drop(part));
            }
            drop(first);
        });
    }
}

/// The most parts of a buffer. Those of all buffers of a child come with one message.
pub(crate) const PARTS_MAX: usize = 3;

/// The shortest part that is worth a thread.
const PART_MIN: u64 = 32 << 20;

/// What a part is a multiple of: the largest page that a system may have.
const PART_STEP: u64 = 2 << 20;

/// Bytes that are yet to be written, by this process or by guests.
///
/// ```
/// use wrun::{Buffer, limits::Bytes};
///
/// let mut squares = Buffer::zeroed(Bytes(16))?;
/// for (n, square) in squares.iter_mut().enumerate() {
///     *square = (n * n) as u8;
/// }
/// let squares = squares.seal()?;
/// assert_eq!(squares[15], 225);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct BufferMut {
    file: OwnedFd,
    map: Map,
}

/// What makes a buffer one that does not change.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

fn file_of(length: u64) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("wrun-buffer", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, length)?;
    Ok(file)
}

/// Copies a range of a file; whether all of it was there. None: the system cannot do so with this file.
fn copy(file: &File, range: std::ops::Range<u64>) -> io::Result<Option<(OwnedFd, bool)>> {
    let (part, mut at) = (file_of(0)?, range.start);
    while at < range.end {
        let left = Bytes(range.end - at).as_usize();
        // it spares a copy by way of our memory
        match rustix::fs::sendfile(&part, file, Some(&mut at), left) {
            Ok(0) => return Ok(Some((part, false))),
            Ok(_) | Err(Errno::INTR) => {}
            // of some file systems
            Err(Errno::INVAL | Errno::NOSYS) if at == range.start => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some((part, true)))
}

fn too_large(max: Bytes) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {max}"))
}

impl Buffer {
    /// A copy of these bytes.
    ///
    /// # Errors
    /// When the system has no memory or no descriptor left.
    pub fn from_slice(bytes: &[u8]) -> io::Result<Self> {
        let file = File::from(file_of(bytes.len() as u64)?);
        file.write_all_at(bytes, 0)?;
        Self::seal(vec![file.into()])
    }

    /// A copy of a file as it is now: whatever becomes of the file, the buffer stays. What is no regular
    /// file is read to its end. A large one is copied by several threads, on as many cores as there are.
    ///
    /// # Errors
    /// When it cannot be read, or the system has no memory left.
    pub fn from_file(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::read(&File::open(path)?, Bytes(u64::MAX))
    }

    /// As [`Buffer::from_file`], of a file that is open and has at most so many bytes.
    ///
    /// # Errors
    /// As [`Buffer::from_file`], or when it has more.
    pub fn read(file: &File, max: Bytes) -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::read_by(cores, file, max)
    }

    /// As [`Buffer::read`], by at most so many threads.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub fn read_by(threads: usize, file: &File, max: Bytes) -> io::Result<Self> {
        let metadata = file.metadata()?;
        // of what lies in a list of the kernel's the length is not known before it is read
        if !metadata.is_file() || metadata.len() == 0 {
            return Self::from_reader(file, max);
        }
        let length = metadata.len();
        if length > max.0 {
            return Err(too_large(max));
        }
        let parts = (length / PART_MIN).clamp(1, threads.clamp(1, PARTS_MAX) as u64);
        let step = length.div_ceil(parts).next_multiple_of(PART_STEP);
        let copy = |start: u64| copy(file, start..(start + step).min(length));
        let copied: Vec<_> = thread::scope(|scope| {
            let other = |part| thread::Builder::new().spawn_scoped(scope, move || copy(part * step));
            let others: Vec<_> = (1..parts).map(other).collect();
            let first = copy(0);
            let others = others.into_iter().map(|other| {
                other?.join().unwrap_or_else(|_| Err(io::Error::other("the thread that copies has panicked")))
            });
            [first].into_iter().chain(others).collect()
        });
        let mut parts = vec![];
        for copied in copied {
            let Some((part, is_whole)) = copied? else { return Self::from_reader(file, max) };
            parts.push(part);
            if !is_whole {
                // cut off meanwhile: as long as it was found to be
                break;
            }
        }
        Self::seal(parts)
    }

    /// All that a reader has, which may be at most so much.
    ///
    /// # Errors
    /// When it cannot be read or has more, or the system has no memory left.
    pub fn from_reader(mut reader: impl Read, max: Bytes) -> io::Result<Self> {
        let buffer = File::from(file_of(0)?);
        let (mut block, mut length) = (vec![0; BLOCK], 0);
        loop {
            match reader.read(&mut block) {
                Ok(0) => return Self::seal(vec![buffer.into()]),
                Ok(count) => {
                    buffer.write_all_at(&block[..count], length)?;
                    length += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if length > max.0 {
                return Err(too_large(max));
            }
        }
    }

    /// So many zeros, to be written to.
    ///
    /// # Errors
    /// When the system has no address space or no descriptor left.
    pub fn zeroed(length: Bytes) -> io::Result<BufferMut> {
        let file = file_of(length.0)?;
        // a process that it is shared with could cut it off under our feet
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        BufferMut::of(file)
    }

    /// A buffer that came from another process, in parts.
    ///
    /// # Errors
    /// When one is not sealed, or not as long as a part has to be.
    pub(crate) fn received(parts: Vec<OwnedFd>) -> io::Result<Self> {
        for part in &parts {
            if !rustix::fs::fcntl_get_seals(part)?.contains(SEALS) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a buffer that came is not sealed"));
            }
        }
        let map = Map::sealed(&parts)?;
        Ok(Self(Arc::new(Sealed { parts, map })))
    }

    fn seal(parts: Vec<OwnedFd>) -> io::Result<Self> {
        for part in &parts {
            rustix::fs::fcntl_add_seals(part, SEALS | SealFlags::SEAL)?;
        }
        Self::received(parts)
    }

    /// The files that it is made of.
    pub(crate) fn parts(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.0.parts.iter().map(AsFd::as_fd)
    }

    /// Where a range of it lies: in which file, from which offset on, and how much of it.
    pub(crate) fn pieces(&self, mut range: std::ops::Range<u64>) -> impl Iterator<Item = (BorrowedFd<'_>, u64, u64)> {
        let lengths = self.0.map.lengths();
        let starts = lengths.iter().scan(0, |end, length| {
            let start = *end;
            *end += length;
            Some((start, *end))
        });
        self.parts().zip(starts).filter_map(move |(part, (start, end))| {
            let taken = range.start.max(start)..range.end.min(end);
            if taken.is_empty() {
                return None;
            }
            range.start = taken.end;
            Some((part, taken.start - start, taken.end - taken.start))
        })
    }

    /// How many bytes it has.
    #[must_use]
    pub fn length(&self) -> Bytes {
        Bytes(self.0.map.length() as u64)
    }

    /// Cuts it into pieces of so many bytes, the last of which may have less; of at least one byte.
    #[must_use]
    pub fn split(&self, chunk: Bytes) -> Chunks {
        Chunks::of(self.clone(), chunk)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.map.bytes()
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl BufferMut {
    fn of(file: OwnedFd) -> io::Result<Self> {
        let map = Map::shared(&file)?;
        Ok(Self { file, map })
    }

    /// Lets nobody write to it any more.
    ///
    /// # Errors
    /// When somebody still can: another process has it.
    pub fn seal(self) -> io::Result<Buffer> {
        let Self { file, map } = self;
        drop(map);
        Buffer::seal(vec![file])
    }

    /// How many bytes it has.
    #[must_use]
    pub fn length(&self) -> Bytes {
        Bytes(self.map.length() as u64)
    }

    /// Gives it to guests, until nobody has what comes of it any more.
    pub(crate) fn share(self) -> Arc<Shared> {
        Arc::new(Shared::of(self.file, self.map))
    }

    /// What guests have written, when no guest is left.
    ///
    /// # Panics
    /// When one is: whoever shared it has waited for them.
    pub(crate) fn shared(shared: Arc<Shared>) -> Self {
        let (file, map) = Arc::into_inner(shared).expect("no guest has it any more").into_parts();
        Self { file, map }
    }
}

impl Deref for BufferMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.bytes()
    }
}

impl DerefMut for BufferMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.bytes_mut()
    }
}

impl AsFd for BufferMut {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The most buffers of one child.
pub(crate) const BUFFERS_MAX: usize = 64;

/// Buffers, by what they are called in a guest.
pub(crate) type Named = Vec<(String, Buffer)>;

/// What their names are, each with how many descriptors come for it.
pub(crate) fn names(named: &Named) -> Vec<(String, usize)> {
    named.iter().map(|(name, buffer)| (name.clone(), buffer.parts().len())).collect()
}

/// Their descriptors, in the same order.
pub(crate) fn descriptors(named: &Named) -> impl Iterator<Item = BorrowedFd<'_>> {
    named.iter().flat_map(|(_, buffer)| buffer.parts())
}

/// Adds one, in place of one of the same name.
pub(crate) fn add(named: &mut Named, name: String, buffer: &Buffer) {
    named.retain(|(other, _)| *other != name);
    named.push((name, buffer.clone()));
}

/// Sees that a child can have them.
///
/// # Errors
/// Says what was expected.
pub(crate) fn check(named: &Named) -> Result<(), String> {
    if named.len() > BUFFERS_MAX {
        return Err(format!("expected at most {BUFFERS_MAX} buffers, found {}", named.len()));
    }
    named.iter().try_for_each(|(name, _)| check_name(name))
}

/// Sees that a buffer can be called so.
///
/// # Errors
/// Says what was expected.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(is_name) {
        return Err(format!("expected a name of at most {NAME_MAX} letters, digits, `-`, `_` and `.`, found `{name}`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_sealed_does_not_change() {
        let buffer = Buffer::from_slice(b"sealed").expect("memory");
        let file = File::from(buffer.parts().next().expect("one").try_clone_to_owned().expect("a descriptor"));
        assert!(file.write_all_at(b"x", 0).is_err() && file.set_len(0).is_err() && file.set_len(100).is_err());
        assert_eq!(&buffer[..], b"sealed");
        let received = Buffer::received(vec![file.into()]).expect("it is sealed");
        assert_eq!(&received[..], b"sealed");
        let open = Buffer::zeroed(Bytes(1)).expect("memory");
        assert!(Buffer::received(vec![open.file.try_clone().expect("a descriptor")]).is_err(), "it is not");
    }

    #[test]
    fn what_is_written_is_sealed_with_it() {
        let mut open = Buffer::zeroed(Bytes(10_000)).expect("memory");
        assert!(open.iter().all(|byte| *byte == 0));
        let file = File::from(open.as_fd().try_clone_to_owned().expect("a descriptor"));
        assert!(file.set_len(0).is_err() && file.set_len(20_000).is_err(), "whoever has it");
        drop(file);
        open[9_999] = 7;
        let buffer = open.seal().expect("nobody else has it");
        assert_eq!((buffer.length(), buffer[9_999], buffer[0]), (Bytes(10_000), 7, 0));
        assert_eq!(Buffer::zeroed(Bytes(0)).expect("memory").seal().expect("nobody else has it").len(), 0);
    }

    #[test]
    fn a_file_is_copied_and_may_change_after_that() {
        let mut file = tempfile::tempfile().expect("a file");
        let bytes: Vec<u8> = (0..5_012_345u32).map(|n| (n / 7).to_le_bytes()[0]).collect();
        file.write_all(&bytes).expect("written");
        let buffer = Buffer::read(&file, Bytes(bytes.len() as u64)).expect("read");
        assert!(buffer[..] == bytes[..]);
        assert!(Buffer::read(&file, Bytes(bytes.len() as u64 - 1)).is_err());
        file.set_len(10).expect("cut");
        file.write_all_at(b"other text", 0).expect("written");
        assert!(buffer[..] == bytes[..]);
    }

    #[test]
    fn a_large_file_is_copied_in_parts_that_lie_side_by_side() {
        let length = 2 * PART_MIN + 12_345;
        let bytes: Vec<u8> = (0..length).map(|n| (n / 4099).to_le_bytes()[0]).collect();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("written");
        let read = |threads| Buffer::read_by(threads, &file, Bytes(length)).expect("read");
        for (threads, parts) in [(0, 1), (1, 1), (2, 2), (3, 2)] {
            let buffer = read(threads);
            assert_eq!(buffer.parts().len(), parts, "by {threads}");
            assert!(buffer[..] == bytes[..]);
        }
        let buffer = read(2);
        let step = (length / 2).next_multiple_of(PART_STEP);
        let pieces = |range| buffer.pieces(range).map(|(_, at, length)| (at, length)).collect::<Vec<_>>();
        assert_eq!(pieces(0..length), [(0, step), (0, length - step)]);
        assert_eq!(pieces(step - 4096..step), [(step - 4096, 4096)]);
        assert_eq!(pieces(step - 4096..step + 8192), [(step - 4096, 4096), (0, 8192)]);
        assert_eq!(pieces(step + 4096..length), [(4096, length - step - 4096)]);
        assert_eq!(pieces(7..7), []);
        // as another process gets it, and not with a part in the midst that is no whole pages long
        let clones = || buffer.parts().map(|part| part.try_clone_to_owned().expect("a descriptor")).collect::<Vec<_>>();
        assert!(Buffer::received(clones()).expect("sealed")[..] == bytes[..]);
        assert!(Buffer::received(clones().into_iter().rev().collect()).is_err());
        // one that is cut off meanwhile ends where it is cut
        file.set_len(step + 10).expect("cut");
        let copied = copy(&file, step..length).expect("read").expect("a regular file");
        assert!(!copied.1 && std::fs::File::from(copied.0).metadata().expect("a file").len() == 10);
    }

    #[test]
    fn what_has_no_length_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let bytes = vec![3; BLOCK * 2 + 5];
        let sent = bytes.clone();
        let sender = thread::spawn(move || writer.write_all(&sent));
        let reader = File::from(OwnedFd::from(reader));
        assert!(Buffer::read(&reader, Bytes(bytes.len() as u64)).expect("read")[..] == bytes[..]);
        sender.join().expect("no panic").expect("sent");
        assert!(!Buffer::from_file("/proc/self/status").expect("read").is_empty());
        assert!(Buffer::from_reader(&bytes[..], Bytes(bytes.len() as u64 - 1)).is_err());
    }

    #[test]
    fn names_are_short_and_plain() {
        for name in ["input", "a.b-c_1", &"x".repeat(NAME_MAX)] {
            check_name(name).expect("a name");
        }
        for name in ["", "a b", "ä", "a/b", "a=b", &"x".repeat(NAME_MAX + 1)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
