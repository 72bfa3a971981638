//! The fuzzer's entry to `src/gguf.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gemrun_fuzz::gguf::run(data));
