//! What a hostile peer sends over its socket, as frames.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| wrun::fuzz::frames(bytes));
