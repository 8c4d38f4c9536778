//! Windows: ranges of the host's buffers in this guest's own memory, without a copy.
//!
//! ```
//! //! Counts the zeros of a buffer: `wrun threads zeros.wasm --input FILE`.
//!
//! use wrun_guest::{handler, window::{Chunk, WindowError}};
//!
//! fn handle(chunk: Chunk) -> Result<usize, WindowError> {
//!     let bytes = chunk.input()?;
//!     Ok(bytes.iter().filter(|byte| **byte == 0).count())
//! }
//!
//! handler!(handle);
//! ```
//!
//! A [`Window`] is a slice of bytes as long as it lives, and is detached when it is dropped: then what was written to one of
//! the output is in the buffer. What is written to another one stays this guest's own.

use std::{
    alloc::{Layout, alloc, dealloc},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
};

use serde::{Deserialize, Serialize, Serializer};

use crate::bindings::wrun::guest::window;
pub use crate::bindings::wrun::guest::window::{Attached, Buffer};

/// The buffer that is cut into chunks, and the one that they write to.
const INPUT: &str = "input";
const OUTPUT: &str = "output";

/// What a region and its range must be the same modulo of.
const ALIGN: usize = 64 << 10;

/// A piece of the buffer `input`: the message that a handler gets in `wrun threads --input FILE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Chunk {
    /// Its number, from 0.
    #[serde(rename = "chunk", default)]
    pub index: u64,
    /// Where it begins in the buffer, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
    /// How many bytes before it are in its window, too (`--overlap`).
    #[serde(default)]
    pub before: u64,
    /// How many bytes after it are.
    #[serde(default)]
    pub after: u64,
}

impl Chunk {
    /// Its bytes, and those before and after it that overlap with others.
    ///
    /// # Errors
    /// When there is no such buffer, or no memory for it.
    pub fn input(&self) -> Result<Window, WindowError> {
        let offset = self.offset.checked_sub(self.before).ok_or(WindowError::OutOfRange)?;
        Window::of(INPUT, offset, self.before + self.length + self.after)
    }

    /// Its range of the output, of which it is the only one to write there.
    ///
    /// # Errors
    /// When there is no output, or no memory for it.
    pub fn output(&self) -> Result<Window, WindowError> {
        Window::of(OUTPUT, self.offset, self.length)
    }
}

/// A range of a buffer, in this guest's memory. Dropping it detaches it.
#[derive(Debug)]
pub struct Window {
    start: NonNull<u8>,
    length: usize,
    /// Its number, and the memory that it lies in; an empty one has none.
    within: Option<(u32, NonNull<u8>, Layout)>,
}

impl Window {
    /// So many bytes of the buffer of this name, from `offset` on.
    ///
    /// # Errors
    /// When the buffer has no such range, or this guest no memory for as much.
    pub fn of(buffer: &str, offset: u64, length: u64) -> Result<Self, WindowError> {
        let length = usize::try_from(length).map_err(|_| WindowError::NoMemory)?;
        if length == 0 {
            return Ok(Self { start: NonNull::dangling(), length, within: None });
        }
        let skipped = usize::try_from(offset % ALIGN as u64).map_err(|_| WindowError::NoMemory)?;
        let size = length.checked_add(skipped).ok_or(WindowError::NoMemory)?;
        let layout = Layout::from_size_align(size, ALIGN).map_err(|_| WindowError::NoMemory)?;
        // SAFETY: of a size above 0
        let block = NonNull::new(unsafe { alloc(layout) }).ok_or(WindowError::NoMemory)?;
        // SAFETY: within the block
        let start = unsafe { block.add(skipped) };
        match attach(buffer, offset, start, length) {
            Ok(number) => Ok(Self { start, length, within: Some((number, block, layout)) }),
            Err(error) => {
                // SAFETY: allocated above, with this layout, and nobody else knows of it
                unsafe { dealloc(block.as_ptr(), layout) };
                Err(error)
            }
        }
    }
}

/// Lets the host put a range of a buffer there. By hand: the generated function takes a reference, under which memory must
/// not change.
fn attach(buffer: &str, offset: u64, region: NonNull<u8>, length: usize) -> Result<u32, WindowError> {
    #[link(wasm_import_module = "wrun:guest/window@0.1.0")]
    unsafe extern "C" {
        #[link_name = "attach"]
        fn import(name: *const u8, length: usize, offset: u64, region: *mut u8, size: usize, answer: *mut Answer);
    }
    /// `result<u32, window-error>` by the canonical ABI.
    #[repr(C)]
    struct Answer {
        is_error: u8,
        value: u32,
    }
    let mut answer = Answer { is_error: 0, value: 0 };
    // SAFETY: the name and the answer live as long as the call; the region is the caller's, who holds no reference into it
    unsafe { import(buffer.as_ptr(), buffer.len(), offset, region.as_ptr(), length, &raw mut answer) };
    match answer {
        Answer { is_error: 0, value } => Ok(value),
        // one byte of it is the error's number
        Answer { value, .. } => Err(WindowError::numbered(value.to_le_bytes()[0])),
    }
}

impl Deref for Window {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: of this guest's memory, attached until it is dropped; whoever writes does so through `deref_mut`
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Window {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some((number, block, layout)) = self.within {
            // one of the output may be gone: it ends with its task
            let _ = window::detach(number);
            // SAFETY: allocated in `of`, with this layout
            unsafe { dealloc(block.as_ptr(), layout) };
        }
    }
}

/// What buffers there are.
#[must_use]
pub fn buffers() -> Vec<Buffer> {
    window::buffers()
}

/// What windows this guest has, in the order in which they were attached.
#[must_use]
pub fn windows() -> Vec<Attached> {
    window::windows()
}

/// Why there is no such window. As a handler's error it is a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WindowError {
    /// There is no buffer of that name.
    NoSuchBuffer,
    /// The buffer has no such range, or, of the output, it does not belong to this task.
    OutOfRange,
    /// The region does not lie as the range does.
    Misaligned,
    /// A part of the region is a window already.
    Overlaps,
    /// A part of the range, of the output, is in another window.
    Taken,
    /// There are as many windows as one guest may have.
    TooMany,
    /// There is no such window.
    NotAttached,
    /// The host's system has no room for it.
    NoRoom,
    /// This guest has no memory for it.
    NoMemory,
}

impl WindowError {
    /// As they are numbered in `wit/window.wit`.
    fn numbered(number: u8) -> Self {
        match number {
            0 => Self::NoSuchBuffer,
            1 => Self::OutOfRange,
            2 => Self::Misaligned,
            3 => Self::Overlaps,
            4 => Self::Taken,
            5 => Self::TooMany,
            6 => Self::NotAttached,
            _ => Self::NoRoom,
        }
    }
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSuchBuffer => "there is no such buffer",
            Self::OutOfRange => "the buffer has no such range, or it does not belong to this task",
            Self::Misaligned => "the region does not lie as the range does",
            Self::Overlaps => "a part of the region is a window already",
            Self::Taken => "a part of the range is in another window",
            Self::TooMany => "there are as many windows as one guest may have",
            Self::NotAttached => "there is no such window",
            Self::NoRoom => "the host's system has no room for it",
            Self::NoMemory => "there is no memory for it (--chunk, --memory)",
        })
    }
}

impl std::error::Error for WindowError {}

impl Serialize for WindowError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl From<WindowError> for String {
    fn from(error: WindowError) -> Self {
        error.to_string()
    }
}
