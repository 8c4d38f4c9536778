//! What a stranger gives us to run: text or binary, as a compiler takes it.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| wrun::fuzz::guest(bytes));
