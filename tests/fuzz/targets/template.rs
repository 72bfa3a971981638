//! The fuzzer's entry to `src/template.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gemrun_fuzz::template::run(data));
