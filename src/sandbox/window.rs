//! Windows: ranges of buffers, mapped into a guest's own memory.
//!
//! What keeps this sound:
//!
//! - A buffer that is read is sealed, and mapped private: nobody changes it under the feet of the engine, which reads a
//!   guest's memory as plain memory, and a write, the guest's or the engine's, makes a copy of a page that is the
//!   instance's own. It is never mapped read-only, or a host that writes where a guest says would fault.
//! - A buffer that is written is mapped shared, in ranges that each belong to one window of one instance, until that is
//!   undone; nobody else reads or writes them meanwhile.
//! - Only whole pages within a range are mapped. Those that it shares with what lies around it are copied, when it is
//!   attached and, of what is written, when it is detached: so no page is mapped that belongs to two.
//! - The memory that a window takes the place of is not thrown away but parked elsewhere, and brought back when the window
//!   is undone, so that the engine finds its mappings as it made them. It is undone before the engine gets the memory back:
//!   a store drops its data, of which windows are a part, before its instances.
//! - The memory does not move: `EngineSpec` sees to that.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    io::Errno,
    mm::{MapFlags, MremapFlags, ProtFlags},
};
use wasmtime::{StoreContextMut, component::WasmList};

use super::{
    host::bindings::wrun::guest::window::{Attached as WitAttached, Buffer as WitBuffer, WindowError},
    instance::State,
};
use crate::{
    buffer::{Buffer, Shared},
    limits::Bytes,
};

/// The most windows of one instance.
const WINDOWS_MAX: usize = 64;

/// The buffers of a worker, by their names.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<(Arc<str>, Source)>>);

/// What windows are of.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// What is read.
    Input(Buffer),
    /// What is written.
    Output(Arc<Shared>),
}

impl Buffers {
    /// These.
    pub(crate) fn of(all: impl IntoIterator<Item = (String, Source)>) -> Self {
        Self(Mutex::new(all.into_iter().map(|(name, source)| (name.into(), source)).collect()))
    }

    /// Adds one, in place of one of the same name. Windows of that stay as they are.
    pub(crate) fn add(&self, name: &str, buffer: Buffer) {
        let mut all = self.all();
        all.retain(|(other, _)| **other != *name);
        all.push((name.into(), Source::Input(buffer)));
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    fn find(&self, name: &str) -> Option<(Arc<str>, Source)> {
        self.all().iter().find(|(other, _)| **other == *name).cloned()
    }

    fn all(&self) -> MutexGuard<'_, Vec<(Arc<str>, Source)>> {
        // whole after every call, whoever panicked
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    fn length(&self) -> u64 {
        match self {
            Self::Input(buffer) => buffer.length().0,
            Self::Output(shared) => shared.length(),
        }
    }
}

/// The windows of one instance.
#[derive(Debug, Default)]
pub(super) struct Windows {
    attached: Vec<Window>,
    last: u32,
    /// The range of buffers that are written which belongs to the task at hand.
    own: Range<u64>,
}

/// One window, which is undone when this is dropped.
#[derive(Debug)]
struct Window {
    number: u32,
    name: Arc<str>,
    range: Range<u64>,
    /// The first byte of the region.
    at: usize,
    source: Source,
    /// The whole pages of the region, and where what they were has gone.
    mapped: Range<usize>,
    parked: Vec<Parked>,
    /// Whether the guest has it, so that what it writes there counts.
    is_open: bool,
}

/// Memory that is elsewhere for a while.
#[derive(Debug)]
struct Parked {
    from: usize,
    at: usize,
    length: usize,
}

impl Windows {
    /// Begins a task, to which a range of what is written belongs.
    pub(super) fn begin(&mut self, own: Range<u64>) {
        self.own = own;
    }

    /// Ends it: nothing belongs to it any more.
    pub(super) fn end(&mut self) {
        self.own = 0..0;
        self.attached.retain(|window| matches!(window.source, Source::Input(_)));
    }

    /// What there is.
    pub(super) fn list(&self) -> Vec<WitAttached> {
        let told = |window: &Window| WitAttached {
            window: window.number,
            name: window.name.to_string(),
            offset: window.range.start,
            length: window.range.end - window.range.start,
        };
        self.attached.iter().map(told).collect()
    }

    /// Undoes one.
    pub(super) fn detach(&mut self, number: u32) -> Result<(), WindowError> {
        let at = self.attached.iter().position(|window| window.number == number).ok_or(WindowError::NotAttached)?;
        drop(self.attached.remove(at));
        Ok(())
    }

    /// Whether a window can be made of this region.
    fn check(&self, source: &Source, range: &Range<u64>, region: &Range<usize>) -> Result<(), WindowError> {
        let intersects = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        if range.end > source.length() {
            return Err(WindowError::OutOfRange);
        }
        if let Source::Output(_) = source {
            if range.start < self.own.start || range.end > self.own.end {
                return Err(WindowError::OutOfRange);
            }
            let written = |window: &&Window| matches!(window.source, Source::Output(_));
            if self.attached.iter().filter(written).any(|window| intersects(&window.range, range)) {
                return Err(WindowError::Taken);
            }
        }
        let page = rustix::param::page_size() as u64;
        if !region.is_empty() && region.start as u64 % page != range.start % page {
            return Err(WindowError::Misaligned);
        }
        if self.attached.iter().any(|window| region.start < window.end() && window.at < region.end) {
            return Err(WindowError::Overlaps);
        }
        if self.attached.len() == WINDOWS_MAX {
            return Err(WindowError::TooMany);
        }
        Ok(())
    }
}

/// What buffers an instance can have windows of.
pub(super) fn list(buffers: &Buffers) -> Vec<WitBuffer> {
    let told = |(name, source): &(Arc<str>, Source)| WitBuffer {
        name: name.to_string(),
        length: source.length(),
        writable: matches!(source, Source::Output(_)),
    };
    buffers.all().iter().map(told).collect()
}

/// Makes a region of a guest's memory a window.
pub(super) fn attach(
    mut store: StoreContextMut<'_, State>,
    name: &str,
    offset: u64,
    region: &WasmList<u8>,
) -> Result<u32, WindowError> {
    // only where it lies: nobody holds a reference when it changes
    let region = region.as_le_slice(&store).as_ptr_range();
    let region = region.start.addr()..region.end.addr();
    let state = store.data_mut();
    let (name, source) = state.setup.buffers.find(name).ok_or(WindowError::NoSuchBuffer)?;
    let end = offset.checked_add(region.len() as u64).ok_or(WindowError::OutOfRange)?;
    let windows = &mut state.windows;
    windows.check(&source, &(offset..end), &region)?;
    windows.last = windows.last.wrapping_add(1);
    let window = Window {
        number: windows.last,
        name,
        range: offset..end,
        at: region.start,
        source,
        mapped: whole_pages(&region),
        parked: vec![],
        is_open: false,
    };
    // SAFETY: the region is of the memory of the guest that calls, which stays where it is as long as its store, of whose
    // data the window becomes a part; it is in no other window. Nobody holds a reference into it: the guest waits for this
    // call, and the engine's have ended with the line above.
    let window = unsafe { window.open() }.map_err(|error| {
        tracing::debug!("a window could not be mapped: {error}");
        WindowError::NoRoom
    })?;
    windows.attached.push(window);
    Ok(windows.last)
}

/// The pages that lie in a region as a whole.
fn whole_pages(region: &Range<usize>) -> Range<usize> {
    let page = rustix::param::page_size();
    let (first, last) = (region.start.next_multiple_of(page), region.end / page * page);
    if first < last { first..last } else { region.end..region.end }
}

impl Window {
    /// Puts the buffer's bytes into its place.
    ///
    /// # Safety
    /// Its region is memory of a guest, in no other window, and stays where it is until this is dropped; nobody holds a
    /// reference into it, now or when this is dropped.
    unsafe fn open(mut self) -> io::Result<Self> {
        if !self.mapped.is_empty() {
            // SAFETY: by the caller's word.
            unsafe { self.park(self.mapped.start, self.mapped.len())? };
            let range = self.range_of(&self.mapped);
            let map = |file: BorrowedFd<'_>, from: u64, at: usize, length: u64, flags| {
                let to = ptr::with_exposed_provenance_mut(at);
                let protection = ProtFlags::READ | ProtFlags::WRITE;
                // SAFETY: these pages are the guest's, and what was there is parked. The file is as long as the range, and
                // its length is sealed.
                unsafe {
                    rustix::mm::mmap(to, Bytes(length).as_usize(), protection, flags | MapFlags::FIXED, file, from)
                }
            };
            match &self.source {
                Source::Input(buffer) => {
                    let mut at = self.mapped.start;
                    for (file, from, length) in buffer.pieces(range) {
                        // copies of pages are made of memory that the guest may have anyway
                        map(file, from, at, length, MapFlags::PRIVATE | MapFlags::NORESERVE)?;
                        at += Bytes(length).as_usize();
                    }
                }
                Source::Output(shared) => {
                    let length = range.end - range.start;
                    map(shared.as_fd(), range.start, self.mapped.start, length, MapFlags::SHARED)?;
                }
            }
        }
        for edge in self.edges() {
            let (range, at) = (self.range_of(&edge), ptr::with_exposed_provenance_mut(edge.start));
            match &self.source {
                Source::Input(buffer) => {
                    let from = &buffer[Bytes(range.start).as_usize()..Bytes(range.end).as_usize()];
                    // SAFETY: of the guest's memory, by the caller's word, and not of the buffer's.
                    unsafe { ptr::copy_nonoverlapping(from.as_ptr(), at, from.len()) };
                }
                // SAFETY: as above; the range belongs to this window alone.
                Source::Output(shared) => unsafe { shared.read_to(&range, at) },
            }
        }
        self.is_open = true;
        Ok(self)
    }

    /// Moves memory elsewhere, and leaves empty memory where it was: whatever other threads map meanwhile, it is not mapped
    /// there.
    ///
    /// # Safety
    /// As [`Window::open`].
    unsafe fn park(&mut self, from: usize, length: usize) -> io::Result<()> {
        let flags = (MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP).bits();
        // Not by rustix: with this flag the system looks at a fifth argument, a hint where to go, which that leaves open.
        // SAFETY: by the caller's word, nobody refers to it.
        match unsafe { libc::syscall(libc::SYS_mremap, from, length, length, flags, 0usize) } {
            -1 => {}
            at => {
                let at = usize::try_from(at).expect("an address");
                // what comes back from there does so by this number
                self.parked.push(Parked { from, at, length });
                return Ok(());
            }
        }
        match Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL) {
            // of several mappings: one at a time
            Errno::FAULT if length > rustix::param::page_size() => {
                let half = (length / 2).next_multiple_of(rustix::param::page_size());
                // SAFETY: parts of the same.
                unsafe {
                    self.park(from, half)?;
                    self.park(from + half, length - half)
                }
            }
            error => Err(error.into()),
        }
    }

    /// Where the region ends.
    fn end(&self) -> usize {
        self.at + Bytes(self.range.end - self.range.start).as_usize()
    }

    /// What of the region is copied: the parts of pages at its ends.
    fn edges(&self) -> [Range<usize>; 2] {
        [self.at..self.mapped.start, self.mapped.end..self.end()]
    }

    /// Which offset in the buffer lies at an address.
    fn offset_of(&self, address: usize) -> u64 {
        self.range.start + (address - self.at) as u64
    }

    fn range_of(&self, part: &Range<usize>) -> Range<u64> {
        self.offset_of(part.start)..self.offset_of(part.end)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.is_open
            && let Source::Output(shared) = &self.source
        {
            for edge in self.edges() {
                let from = ptr::with_exposed_provenance(edge.start);
                // SAFETY: by the word of `open`'s caller it is the guest's memory still; the range is this window's alone.
                unsafe { shared.write_from(&self.range_of(&edge), from) };
            }
        }
        for Parked { from, at, length } in self.parked.drain(..) {
            let (from, at) = (ptr::with_exposed_provenance_mut(from), ptr::with_exposed_provenance_mut(at));
            // SAFETY: what `park` has moved goes back to where it was, over this very window, into which nobody holds a
            // reference, by the word of `open`'s caller.
            let back = unsafe { rustix::mm::mremap_fixed(at, length, length, MremapFlags::MAYMOVE, from) };
            if let Err(error) = back {
                // the next guest in this memory would see what this one saw
                tracing::error!("the memory behind a window could not be brought back: {error}");
                std::process::abort();
            }
        }
    }
}
