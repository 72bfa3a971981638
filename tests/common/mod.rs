//! What several test programs share: finding golden data, reading it, measuring differences.

// Each test program uses its own part of this module.
#![allow(dead_code)]

pub mod golden;
pub mod npy;
pub mod raw_gguf;

/// The largest absolute difference of two equally long sequences; NaN counts as infinite.
pub fn max_abs_difference(
    a: impl IntoIterator<Item = impl Into<f64>>,
    b: impl IntoIterator<Item = impl Into<f64>>,
) -> f64 {
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    let mut max = 0.0f64;
    loop {
        match (a.next(), b.next()) {
            (Some(a), Some(b)) => {
                let difference = (a.into() - b.into()).abs();
                max = max.max(if difference.is_nan() { f64::INFINITY } else { difference });
            }
            (None, None) => return max,
            _ => panic!("the sequences differ in length"),
        }
    }
}
