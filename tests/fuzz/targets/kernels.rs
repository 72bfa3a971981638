//! The fuzzer's entry to `src/kernels.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gemrun_fuzz::kernels::run(data));
