//! The mappings of buffers into this process.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    slice,
};

use rustix::mm::{MapFlags, ProtFlags};

/// All of a buffer's files, mapped side by side. They are of the lengths that the files had, and the files do not shrink: that
/// is sealed, or nobody else has them.
#[derive(Debug)]
pub(super) struct Map {
    start: NonNull<u8>,
    length: usize,
    /// The lengths of the files.
    lengths: Vec<u64>,
}

impl Default for Map {
    /// Of nothing.
    fn default() -> Self {
        Self { start: NonNull::dangling(), length: 0, lengths: vec![] }
    }
}

// SAFETY: memory that belongs to no thread; who may read and write it, its owner's types decide.
unsafe impl Send for Map {}
// SAFETY: as above: shared, it can only be read.
unsafe impl Sync for Map {}

impl Map {
    /// Of files that are sealed.
    pub(super) fn sealed(files: &[OwnedFd]) -> io::Result<Self> {
        Self::of(files, ProtFlags::READ, MapFlags::PRIVATE)
    }

    /// Of a file that is written through it.
    pub(super) fn shared(file: &OwnedFd) -> io::Result<Self> {
        Self::of(slice::from_ref(file), ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
    }

    fn of(files: &[OwnedFd], protection: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        let lengths = files.iter().map(|file| Ok(rustix::fs::fstat(file)?.st_size.cast_unsigned()));
        let lengths = lengths.collect::<io::Result<Vec<u64>>>()?;
        let page = rustix::param::page_size() as u64;
        if lengths.split_last().is_some_and(|(_, others)| others.iter().any(|length| length % page != 0)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a part of a buffer is no whole pages long"));
        }
        let whole = usize::try_from(lengths.iter().sum::<u64>()).map_err(io::Error::other)?;
        if whole == 0 {
            return Ok(Self { lengths, ..Self::default() });
        }
        let nothing = ProtFlags::empty();
        // SAFETY: a new mapping, placed by the kernel, aliases nothing of this process.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), whole, nothing, MapFlags::PRIVATE)? };
        let start = NonNull::new(start.cast::<u8>()).expect("the kernel never maps page 0 by itself");
        // from here on it is unmapped with this
        let map = Self { start, length: whole, lengths };
        let mut at = 0;
        for (file, length) in files.iter().zip(&map.lengths) {
            let length = usize::try_from(*length).map_err(io::Error::other)?;
            if length > 0 {
                // SAFETY: within the mapping that was just made, of which nobody knows yet.
                unsafe {
                    let to = start.as_ptr().add(at).cast();
                    rustix::mm::mmap(to, length, protection, flags | MapFlags::FIXED, file, 0)?;
                }
            }
            at += length;
        }
        Ok(map)
    }

    /// The lengths of the files.
    pub(super) fn lengths(&self) -> &[u64] {
        &self.lengths
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped by `of` until `drop`, or empty. A sealed file does not change. One that is not is this `Map`'s
        // alone, until it becomes a `Shared`, which does not call this.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// Of a mapping by [`Map::shared`].
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: mapped by `of`, of this length, and nothing borrows from it any more.
            let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}

/// A buffer that guests write to, each to a range of its own. Nobody reads it meanwhile.
#[derive(Debug)]
pub(crate) struct Shared {
    file: OwnedFd,
    map: Map,
}

impl Shared {
    pub(super) fn of(file: OwnedFd, map: Map) -> Self {
        Self { file, map }
    }

    /// What another process has made, which gives it to guests, too.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub(crate) fn received(file: OwnedFd) -> io::Result<Self> {
        let map = Map::shared(&file)?;
        Ok(Self { file, map })
    }

    pub(super) fn into_parts(self) -> (OwnedFd, Map) {
        (self.file, self.map)
    }

    pub(crate) fn length(&self) -> u64 {
        self.map.length as u64
    }

    /// Copies a range of it to somewhere else.
    ///
    /// # Panics
    /// When it has no such range.
    ///
    /// # Safety
    /// `to` can be written to for as many bytes, and nobody else accesses the range meanwhile.
    pub(crate) unsafe fn read_to(&self, range: &Range<u64>, to: *mut u8) {
        let (from, count) = self.at(range);
        // SAFETY: within the mapping, and the caller's word for `to`, which is in no mapping of this buffer.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), to, count) };
    }

    /// Copies what lies elsewhere to a range of it.
    ///
    /// # Panics
    /// When it has no such range.
    ///
    /// # Safety
    /// `from` can be read for as many bytes, and nobody else accesses the range meanwhile.
    pub(crate) unsafe fn write_from(&self, range: &Range<u64>, from: *const u8) {
        let (to, count) = self.at(range);
        // SAFETY: as in `read_to`.
        unsafe { ptr::copy_nonoverlapping(from, to, count) };
    }

    fn at(&self, range: &Range<u64>) -> (*mut u8, usize) {
        assert!(range.start <= range.end && range.end <= self.length(), "a range of this buffer");
        // both are within an address space
        #[expect(clippy::cast_possible_truncation, reason = "they are within the mapping")]
        let (start, count) = (range.start as usize, (range.end - range.start) as usize);
        // SAFETY: within the mapping, or at its end.
        (unsafe { self.map.start.as_ptr().add(start) }, count)
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
