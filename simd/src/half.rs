//! IEEE half and bfloat16 as bits: conversion to and from f32, by the `half` crate's portable functions.
//!
//! The one idea: every conversion is exact or rounds to nearest even, and gives the same bits as the
//! CPU's own instructions (F16C, NEON), which the faster instances use instead.

#![forbid(unsafe_code)]

use ::half::f16;

/// The largest finite half, and what larger values saturate to.
pub const F16_MAX: f32 = 65504.0;

/// The value of a half. Exact; NaN stays NaN (quieted).
#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    f16::from_bits(h).to_f32_const()
}

/// The value of a bfloat16. Exact.
#[inline(always)]
pub fn bf16_to_f32(b: u16) -> f32 {
    f32::from_bits((b as u32) << 16)
}

/// Rounds to the nearest half, ties to even. Finite and infinite values beyond ±65504 become ±65504;
/// NaN stays NaN.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    f16::from_f32_const(x.clamp(-F16_MAX, F16_MAX)).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition of a half, in f64.
    fn value(h: u16) -> f64 {
        let (e, m) = ((h >> 10) & 31, (h & 0x3ff) as f64);
        let magnitude = match e {
            0 => m * 2f64.powi(-24),
            31 if m == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1.0 + m / 1024.0) * 2f64.powi(e as i32 - 15),
        };
        if h & 0x8000 != 0 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_half_has_its_value_and_comes_back() {
        for h in 0..=u16::MAX {
            let (want, got) = (value(h), f16_to_f32(h));
            if want.is_nan() {
                assert!(got.is_nan() && f16_to_f32(f32_to_f16(got)).is_nan(), "{h:#06x}");
                continue;
            }
            assert_eq!((got as f64).to_bits(), want.to_bits(), "{h:#06x}");
            let back = if want.is_infinite() { h - 1 } else { h };
            assert_eq!(f32_to_f16(got), back, "{h:#06x}");
        }
    }

    #[test]
    fn rounds_to_nearest_even_between_any_two_halves() {
        for h in 0..0x7bff_u16 {
            let (low, high) = (f16_to_f32(h), f16_to_f32(h + 1));
            let middle = ((low as f64 + high as f64) / 2.0) as f32; // exact
            let even = if h % 2 == 0 { h } else { h + 1 };
            assert_eq!(f32_to_f16(middle), even, "{h:#06x}");
            assert_eq!(f32_to_f16(middle.next_down()), h, "{h:#06x}");
            assert_eq!(f32_to_f16(middle.next_up()), h + 1, "{h:#06x}");
            assert_eq!(f32_to_f16(-middle), even | 0x8000, "{h:#06x}");
        }
    }

    #[test]
    fn saturates_and_keeps_nan() {
        for (x, want) in [
            (65504.0, 0x7bff),
            (65519.9, 0x7bff),
            (65520.0, 0x7bff),
            (1e30, 0x7bff),
            (f32::INFINITY, 0x7bff),
            (f32::NEG_INFINITY, 0xfbff),
            (0.0, 0),
            (-0.0, 0x8000),
            (1e-30, 0),
        ] {
            assert_eq!(f32_to_f16(x), want, "{x}");
        }
        assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan());
    }
}
