//! Memory that processes share: what a message could not tell, since a dead worker sends none (which tasks it had
//! begun), and what a message would be too dear for (that it is alive, how many connections it holds).
//!
//! A worker can write what it likes there. All of it is advice: the worst that a lie does is to make others wait for
//! some milliseconds, or to let the primary take a task for begun that was not.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};

use crate::event::WorkerId;

/// Words that two or more processes share.
#[derive(Debug)]
struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
    file: OwnedFd,
}

// SAFETY: the mapping is only ever read and written through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Makes zeros. Their number is sealed: nobody can cut the file off under the others' feet.
    fn new(name: &str, count: usize) -> io::Result<Self> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, (count * size_of::<AtomicU64>()) as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(file, count)
    }

    /// Maps what another process made.
    fn map(file: OwnedFd, count: usize) -> io::Result<Self> {
        let size = count * size_of::<AtomicU64>();
        if u64::try_from(rustix::fs::fstat(&file)?.st_size).is_ok_and(|found| found < size as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the shared counters are too small"));
        }
        // SAFETY: a new mapping, placed by the kernel, aliases nothing of this process.
        let address = unsafe {
            rustix::mm::mmap(ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        Ok(Self { start: NonNull::new(address.cast()).expect("the kernel never maps page 0 by itself"), count, file })
    }

    fn all(&self) -> &[AtomicU64] {
        // SAFETY: mapped by `map` until `drop`, page-aligned, of this length, and as long as the file, whose size `new`
        // has sealed; any bytes are valid atomics, and nobody accesses them in another way.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, of this size, and nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
    }
}

/// The highest id of a task that was begun; ids rise with every task sent to a worker.
const BEGUN: usize = 0;
/// Goes up while the worker's process runs, whatever its guest does.
const BEATS: usize = 1;
/// How many requests a worker that serves a port has begun.
const REQUESTS: usize = 2;

/// One worker's counters: written by the worker, read by its primary, also after the worker is dead.
#[derive(Debug)]
pub(crate) struct Page(Words);

impl Page {
    /// Makes a page of zeros.
    ///
    /// # Errors
    /// When the system has no memory or no descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Words::new("wrun-page", REQUESTS + 1)?))
    }

    /// Maps a page that another process made.
    ///
    /// # Errors
    /// When it is too small, which a page by `new` never is.
    pub(crate) fn map(file: OwnedFd) -> io::Result<Self> {
        Ok(Self(Words::map(file, REQUESTS + 1)?))
    }

    /// Notes that a task is begun.
    pub(crate) fn begin(&self, id: u64) {
        self.0.all()[BEGUN].fetch_max(id, Ordering::Release);
    }

    /// The highest task that was begun, 0 for none.
    pub(crate) fn begun(&self) -> u64 {
        self.0.all()[BEGUN].load(Ordering::Acquire)
    }

    /// Notes that the process is alive.
    pub(crate) fn beat(&self) {
        self.0.all()[BEATS].fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was alive.
    pub(crate) fn beats(&self) -> u64 {
        self.0.all()[BEATS].load(Ordering::Relaxed)
    }

    /// Notes how many requests were begun.
    pub(crate) fn note_requests(&self, count: u64) {
        self.0.all()[REQUESTS].store(count, Ordering::Relaxed);
    }

    /// How many requests were begun.
    pub(crate) fn requests(&self) -> u64 {
        self.0.all()[REQUESTS].load(Ordering::Relaxed)
    }
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

/// How many connections each worker of a port holds, for all of them to see: who holds more than its share lets others
/// accept first.
///
/// One word for each slot: the generation that wrote it, and the number plus one; zero when nobody accepts there. While
/// one generation takes over from another, the newer one counts.
#[derive(Debug)]
pub(crate) struct Board(Words);

impl Board {
    /// A board for so many slots, nobody at any.
    ///
    /// # Errors
    /// When the system has no memory or no descriptor left.
    pub(crate) fn new(slots: u32) -> io::Result<Self> {
        Ok(Self(Words::new("wrun-board", slots as usize)?))
    }

    /// Maps a board that another process made.
    ///
    /// # Errors
    /// When it has fewer slots.
    pub(crate) fn map(file: OwnedFd, slots: u32) -> io::Result<Self> {
        Ok(Self(Words::map(file, slots as usize)?))
    }

    fn slot(&self, worker: WorkerId) -> &AtomicU64 {
        &self.0.all()[worker as usize - 1]
    }

    /// Notes how many connections a worker holds, unless a newer generation has its slot.
    pub(crate) fn hold(&self, worker: WorkerId, generation: u32, connections: u32) {
        let slot = self.slot(worker);
        if slot.load(Ordering::Relaxed) >> 32 <= u64::from(generation) {
            slot.store(u64::from(generation) << 32 | (u64::from(connections) + 1), Ordering::Relaxed);
        }
    }

    /// Notes that a worker accepts no more, unless a newer generation has its slot.
    pub(crate) fn leave(&self, worker: WorkerId, generation: u32) {
        let slot = self.slot(worker);
        if slot.load(Ordering::Relaxed) >> 32 <= u64::from(generation) {
            slot.store(u64::from(generation) << 32, Ordering::Relaxed);
        }
    }

    /// Notes that a worker is gone, whatever it wrote.
    pub(crate) fn clear(&self, worker: WorkerId) {
        self.slot(worker).fetch_and(!u64::from(u32::MAX), Ordering::Relaxed);
    }

    /// Whether a worker with so many connections should let others accept first.
    pub(crate) fn is_above_share(&self, connections: u32) -> bool {
        let (mut sum, mut workers) = (0, 0);
        for slot in self.0.all() {
            if let Some(held) = (slot.load(Ordering::Relaxed) & u64::from(u32::MAX)).checked_sub(1) {
                sum += held;
                workers += 1;
            }
        }
        workers > 1 && u64::from(connections) > sum / workers + 1
    }
}

impl AsFd for Board {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
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
        theirs.note_requests(9);
        assert_eq!((ours.begun(), ours.beats(), ours.requests()), (7, 1, 9));
        assert!(rustix::fs::ftruncate(&theirs, 0).is_err());
        let small = rustix::fs::memfd_create("small", MemfdFlags::CLOEXEC).expect("a file");
        assert!(Page::map(small).is_err());
    }

    #[test]
    fn who_holds_more_than_its_share_is_told() {
        let board = Board::new(3).expect("a board");
        board.hold(1, 1, 10);
        assert!(!board.is_above_share(10), "alone, all are its share");
        board.hold(2, 1, 6);
        assert!(board.is_above_share(10) && !board.is_above_share(9), "the share is 8, and one more is fine");
        board.clear(1);
        assert!(!board.is_above_share(6), "alone again");
    }

    #[test]
    fn the_newer_generation_counts() {
        let board = Board::new(2).expect("a board");
        board.hold(1, 1, 20);
        board.hold(2, 1, 0);
        board.hold(1, 2, 0);
        board.hold(1, 1, 19);
        board.leave(1, 1);
        assert!(!board.is_above_share(1) && board.is_above_share(2), "the old one's connections do not count");
    }
}
