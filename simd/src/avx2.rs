//! Kernels for x86-64 with AVX2, FMA and F16C.

use std::arch::x86_64::*;

use crate::vec::LANES;

/// The instructions `vec.rs` asks for by name.
pub(crate) struct Avx2;

impl crate::vec::Native for Avx2 {
    #[inline(always)]
    fn load(h: &[u16; 8]) -> [f32; 8] {
        #[inline]
        #[target_feature(enable = "avx,f16c")]
        fn convert(h: &[u16; 8]) -> [f32; 8] {
            let mut out = [0.0; 8];
            // SAFETY: both arrays are as large as the unaligned load and store.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(h.as_ptr().cast()))) };
            out
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { convert(h) }
    }

    #[inline(always)]
    fn store(x: &[f32; 8]) -> [u16; 8] {
        #[inline]
        #[target_feature(enable = "avx,f16c")]
        fn convert(x: &[f32; 8]) -> [u16; 8] {
            let mut out = [0; 8];
            let limit = _mm256_set1_ps(crate::half::F16_MAX);
            // SAFETY: both arrays are as large as the unaligned load and store.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr());
                // With NaN, min and max return their second operand, x.
                let x = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, x));
                _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
            }
            out
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { convert(x) }
    }

    #[inline(always)]
    fn tree(lanes: [f32; LANES]) -> f32 {
        #[inline]
        #[target_feature(enable = "avx")]
        fn sum(lanes: [f32; LANES]) -> f32 {
            // SAFETY: four loads of 8 cover the 32 lanes.
            let [a, b, c, d] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(lanes[8 * i..].as_ptr()) });
            let v = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { sum(lanes) }
    }
}
