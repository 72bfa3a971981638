//! What the tests and benches of this crate share: the self-test's generator of weights and activations.
#![allow(unused_imports)] // each test file uses a part

pub use gemrun_simd::selftest::{Rng, same, weights};
