//! The fuzzer's entry to `src/tokenizer.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gemrun_fuzz::tokenizer::run(data));
