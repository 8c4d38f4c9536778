//! What an HTTP client sends, as its framing is looked at.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| wrun::fuzz::requests(bytes));
