//! The fuzzer's entry to `src/output.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gemrun_fuzz::output::run(data));
