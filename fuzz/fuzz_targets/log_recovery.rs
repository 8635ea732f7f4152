//! Feeds `log_recovery` in tests/fuzz_bodies.rs.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/fuzz_bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::log_recovery(bytes));
