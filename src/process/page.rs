//! A page of counters that a worker writes and its primary reads, also after the worker is dead.
//!
//! What a message could not tell, since a dead worker sends none: which tasks it had begun. And what a message would
//! be too dear for: that it is alive.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};

const SIZE: usize = 4096;

#[repr(C)]
struct Counters {
    /// The highest id of a task that was begun; ids rise with every task sent to a worker.
    begun: AtomicU64,
    /// Goes up while the worker's process runs, whatever its guest does.
    beats: AtomicU64,
}

/// One worker's counters, mapped.
#[derive(Debug)]
pub(crate) struct Page {
    counters: NonNull<Counters>,
    file: OwnedFd,
}

// SAFETY: the mapping is only ever read and written through atomics.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Makes a page of zeros. Its size is sealed: a worker cannot cut it off under the primary's feet.
    pub(crate) fn new() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("wrun-page", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, SIZE as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(file)
    }

    /// Maps a page that another process made.
    ///
    /// # Errors
    /// When it is too small, which a page by `new` never is.
    pub(crate) fn map(file: OwnedFd) -> io::Result<Self> {
        if rustix::fs::fstat(&file)?.st_size < i64::try_from(SIZE).expect("small") {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the page of counters is too small"));
        }
        // SAFETY: a new mapping, placed by the kernel, aliases nothing of this process.
        let address = unsafe {
            rustix::mm::mmap(ptr::null_mut(), SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        Ok(Self { counters: NonNull::new(address.cast()).expect("the kernel never maps page 0 by itself"), file })
    }

    fn counters(&self) -> &Counters {
        // SAFETY: mapped by `map` until `drop`, page-aligned, large enough, and as long as the file, whose size `new`
        // has sealed; any bytes are valid atomics, and nobody accesses them in another way.
        unsafe { self.counters.as_ref() }
    }

    /// Notes that a task is begun.
    pub(crate) fn begin(&self, id: u64) {
        self.counters().begun.fetch_max(id, Ordering::Release);
    }

    /// The highest task that was begun, 0 for none.
    pub(crate) fn begun(&self) -> u64 {
        self.counters().begun.load(Ordering::Acquire)
    }

    /// Notes that the process is alive.
    pub(crate) fn beat(&self) {
        self.counters().beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was alive.
    pub(crate) fn beats(&self) -> u64 {
        self.counters().beats.load(Ordering::Relaxed)
    }
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, of this size, and nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.counters.as_ptr().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_share_and_cannot_be_cut() {
        let ours = Page::new().expect("a page");
        let theirs = Page::map(ours.as_fd().try_clone_to_owned().expect("a descriptor")).expect("the same page");
        theirs.begin(7);
        theirs.begin(5);
        theirs.beat();
        assert_eq!((ours.begun(), ours.beats()), (7, 1));
        assert!(rustix::fs::ftruncate(&theirs, 0).is_err());
    }
}
