//! Buffers: memory of the host that guests see windows of, in this process and in others, and that is never copied for it.
//!
//! A [`Buffer`] is sealed: nobody can write to it or cut it off any more, not even this process. A [`BufferMut`] is this
//! process's alone until guests write to it, each to a range of its own, and becomes a [`Buffer`] when it is sealed. Both
//! are files without a name (`memfd`), so that a descriptor is all that another process needs.

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
    file: OwnedFd,
    map: Map,
}

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
        Self::seal(file.into())
    }

    /// A copy of a file as it is now: whatever becomes of the file, the buffer stays. What is no regular
    /// file is read to its end.
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
        let metadata = file.metadata()?;
        // of what lies in a list of the kernel's the length is not known before it is read
        if !metadata.is_file() || metadata.len() == 0 {
            return Self::from_reader(file, max);
        }
        let length = metadata.len();
        if length > max.0 {
            return Err(too_large(max));
        }
        let (buffer, mut at) = (file_of(0)?, 0);
        while at < length {
            let left = Bytes(length - at).as_usize();
            // by one thread: the system lets one at a time write to a file, and spares it a copy by way of our memory
            match rustix::fs::sendfile(&buffer, file, Some(&mut at), left) {
                // cut off meanwhile: as long as it was found to be
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                // of some file systems
                Err(Errno::INVAL | Errno::NOSYS) if at == 0 => return Self::from_reader(file, max),
                Err(error) => return Err(error.into()),
            }
        }
        Self::seal(buffer)
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
                Ok(0) => return Self::seal(buffer.into()),
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

    /// A buffer that came from another process.
    ///
    /// # Errors
    /// When it is not sealed.
    pub(crate) fn received(file: OwnedFd) -> io::Result<Self> {
        if !rustix::fs::fcntl_get_seals(&file)?.contains(SEALS) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a buffer that came is not sealed"));
        }
        let map = Map::sealed(&file)?;
        Ok(Self(Arc::new(Sealed { file, map })))
    }

    fn seal(file: OwnedFd) -> io::Result<Self> {
        rustix::fs::fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        Self::received(file)
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

impl AsFd for Buffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
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
        Buffer::seal(file)
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
        let file = File::from(buffer.as_fd().try_clone_to_owned().expect("a descriptor"));
        assert!(file.write_all_at(b"x", 0).is_err() && file.set_len(0).is_err() && file.set_len(100).is_err());
        assert_eq!(&buffer[..], b"sealed");
        let received = Buffer::received(file.into()).expect("it is sealed");
        assert_eq!(&received[..], b"sealed");
        let open = Buffer::zeroed(Bytes(1)).expect("memory");
        assert!(Buffer::received(open.file.try_clone().expect("a descriptor")).is_err(), "it is not");
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
    fn what_has_no_length_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let bytes = vec![3; BLOCK * 2 + 5];
        let sent = bytes.clone();
        let sender = std::thread::spawn(move || writer.write_all(&sent));
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
