//! A handler whose workers share one memory: what `handler!` exports from a module for wasm32-wasip1-threads.
//!
//! The host asks for so many threads, once. Each of them calls the host, which then calls the handler on it, message by
//! message. So all threads are made by the C library, which knows their stacks and their thread-local variables.

use std::ptr;
use std::thread;

use crate::bindings::wrun::guest::thread as host;

unsafe extern "C" {
    /// Of the C library: prepares the calling thread to be its first one.
    fn __wasi_init_tp();
    /// Of the linker: runs the constructors of the module.
    fn __wasm_call_ctors();
}

/// Prepares the module, as the start code of a command does. Without it the first thread that is made never starts.
pub fn initialize() {
    // SAFETY: the host calls `_initialize` once, on the first instance, before anything else runs in this memory.
    unsafe {
        __wasi_init_tp();
        __wasm_call_ctors();
    }
}

/// Makes the workers; whether there was room for all of them.
#[must_use]
pub fn start(workers: u32) -> bool {
    (1..=workers).all(|worker| thread::Builder::new().spawn(move || host::serve(worker)).is_ok())
}

/// What `handle` returns by the canonical ABI, a `result<option<json>, json>`.
///
/// The bindings would put it into one static area, which all threads would write to; here each answer has its own.
#[repr(C)]
pub struct Returned {
    /// 0: it was handled. 1: it failed.
    failed: u8,
    /// Of one that was handled, 1 when there is a reply, and the text of that: pointer and length. Of one that failed,
    /// pointer and length of the reason, and nothing.
    words: [usize; 3],
}

/// Takes a text that the host handed over.
///
/// # Safety
///
/// It lies in memory that `cabi_realloc` gave, is UTF-8, and is taken once.
#[must_use]
pub unsafe fn lift(text: *mut u8, length: usize) -> String {
    // SAFETY: as the caller says; `cabi_realloc` is the allocator's, with the very size that was asked for
    let bytes = unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(text, length)) };
    // SAFETY: as the caller says
    unsafe { String::from_utf8_unchecked(bytes.into_vec()) }
}

/// Puts an answer where the host finds it.
#[must_use]
pub fn lower(answer: Result<Option<String>, String>) -> *mut Returned {
    let place = |text: String| {
        let text: &'static mut str = Box::leak(text.into_boxed_str());
        (text.as_mut_ptr() as usize, text.len())
    };
    let returned = match answer {
        Ok(None) => Returned { failed: 0, words: [0; 3] },
        Ok(Some(reply)) => {
            let (text, length) = place(reply);
            Returned { failed: 0, words: [1, text, length] }
        }
        Err(reason) => {
            let (text, length) = place(reason);
            Returned { failed: 1, words: [text, length, 0] }
        }
    };
    Box::into_raw(Box::new(returned))
}

/// Frees an answer that the host has copied.
///
/// # Safety
///
/// It came from [`lower`], and is freed once.
pub unsafe fn free(returned: *mut Returned) {
    // SAFETY: as the caller says
    let Returned { failed, words } = *unsafe { Box::from_raw(returned) };
    let ((0, [1, text, length]) | (1, [text, length, _])) = (failed, words) else { return };
    // SAFETY: `lower` has leaked that very text
    drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(text as *mut u8, length)) });
}
