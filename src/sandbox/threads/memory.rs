//! The memory of a group, as the host reads and writes it: by copies, of what any thread may be changing meanwhile, which are
//! looked at after they were made; and single numbers, atomically.

use wasmtime_wasi::p1::types::Errno;
use wiggle::{GuestMemory, GuestPtr};

/// The memory that the threads of a group share. It is there as long as anybody has it, also after the group has ended.
#[derive(Clone)]
pub struct SharedMemory(wasmtime::SharedMemory);

/// What lies outside of a shared memory, or across its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected {length} bytes at {offset} in a shared memory of {size} bytes, and a number at a multiple of its size"
)]
pub struct OutOfBounds {
    /// Where it begins, in bytes.
    pub offset: u32,
    /// How long it is, in bytes.
    pub length: usize,
    /// How large the memory is, in bytes.
    pub size: usize,
}

impl SharedMemory {
    pub(super) fn of(memory: &wasmtime::SharedMemory) -> Self {
        Self(memory.clone())
    }

    /// Its size now, in bytes. It never shrinks.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.data_size()
    }

    /// Copies bytes out of it. What threads write meanwhile may be in the copy in part.
    ///
    /// # Errors
    /// When they do not all lie in it.
    pub fn read(&self, offset: u32, length: usize) -> Result<Vec<u8>, OutOfBounds> {
        let out = |_| self.out_of_bounds(offset, length);
        Memory(&self.0)
            .read(offset, u32::try_from(length).map_err(|_| self.out_of_bounds(offset, length))?)
            .map_err(out)
    }

    /// Copies bytes into it. Threads may see some of them earlier than others.
    ///
    /// # Errors
    /// When they do not all fit into it; then none is written.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), OutOfBounds> {
        Memory(&self.0).write(offset, bytes).map_err(|_| self.out_of_bounds(offset, bytes.len()))
    }

    /// Reads a number atomically, in sequence with all that is atomic.
    ///
    /// # Errors
    /// When it does not lie in it, at a multiple of 4.
    pub fn load(&self, offset: u32) -> Result<u32, OutOfBounds> {
        Memory(&self.0).guest().read(GuestPtr::new(offset)).map_err(|_| self.out_of_bounds(offset, 4))
    }

    /// Writes a number atomically, in sequence with all that is atomic.
    ///
    /// # Errors
    /// When it does not lie in it, at a multiple of 4.
    pub fn store(&self, offset: u32, number: u32) -> Result<(), OutOfBounds> {
        Memory(&self.0).guest().write(GuestPtr::new(offset), number).map_err(|_| self.out_of_bounds(offset, 4))
    }

    /// Wakes at most so many threads that wait at an address (`memory.atomic.wait`); how many.
    ///
    /// # Errors
    /// When that does not lie in it, at a multiple of 4.
    pub fn notify(&self, offset: u32, count: u32) -> Result<u32, OutOfBounds> {
        self.0.atomic_notify(offset.into(), count).map_err(|_| self.out_of_bounds(offset, 4))
    }

    fn out_of_bounds(&self, offset: u32, length: usize) -> OutOfBounds {
        OutOfBounds { offset, length, size: self.size() }
    }
}

impl std::fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedMemory").field("size", &self.size()).finish()
    }
}

/// The most buffers of one read or write, as systems have it.
const BUFFERS_MAX: u32 = 1024;

/// It, for the host's own calls.
pub(super) struct Memory<'a>(pub(super) &'a wasmtime::SharedMemory);

impl Memory<'_> {
    fn guest(&self) -> GuestMemory<'_> {
        GuestMemory::Shared(self.0.data())
    }

    /// Copies bytes out of it.
    ///
    /// # Errors
    /// When they do not all lie in it.
    pub(super) fn read(&self, pointer: u32, length: u32) -> Result<Vec<u8>, Errno> {
        self.guest().to_vec(GuestPtr::<[u8]>::new((pointer, length))).map_err(|_| Errno::Fault)
    }

    /// Copies bytes into it.
    ///
    /// # Errors
    /// When they do not all fit into it.
    pub(super) fn write(&self, pointer: u32, bytes: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::Fault)?;
        self.guest().copy_from_slice(bytes, GuestPtr::<[u8]>::new((pointer, length))).map_err(|_| Errno::Fault)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// When it does not lie in it, at a multiple of 4.
    pub(super) fn read_u32(&self, pointer: u32) -> Result<u32, Errno> {
        self.guest().read(GuestPtr::new(pointer)).map_err(|_| Errno::Fault)
    }

    /// Calls `each` with the place of each buffer of a list, which answers how much of it was used, until that makes `most`
    /// bytes; answers how many it makes.
    pub(super) fn buffers(
        &self,
        list: i32,
        count: i32,
        most: usize,
        mut each: impl FnMut(&Self, u32, u32) -> Result<u32, Errno>,
    ) -> Result<u32, Errno> {
        let count = u32::try_from(count).ok().filter(|count| *count <= BUFFERS_MAX).ok_or(Errno::Inval)?;
        let mut sum = 0;
        for index in 0..count {
            let entry = index.checked_mul(8).and_then(|offset| offset.checked_add(list.cast_unsigned()));
            let entry = entry.ok_or(Errno::Fault)?;
            let (pointer, length) = (self.read_u32(entry)?, self.read_u32(entry.checked_add(4).ok_or(Errno::Fault)?)?);
            let left = u32::try_from(most).unwrap_or(u32::MAX) - sum;
            let length = length.min(left);
            if length > 0 {
                sum += each(self, pointer, length)?;
            }
            if left == length {
                break;
            }
        }
        Ok(sum)
    }
}
