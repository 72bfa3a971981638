//! What memory and arithmetic of a CPU give at best, to be compared with what kernels get of them.
//!
//! The one idea: work that does one thing and nothing else. [`read`] reads every byte of a buffer once, from several
//! places at a time and asking ahead for what comes next, which is how one core gets most and how the kernels read
//! weights; which of the [`WAYS`] is fastest depends on the CPU. [`int8`] multiplies and adds what is in registers already. Neither knows of time and threads: who measures runs
//! them on each thread and looks at a clock.

use crate::Isa;
use crate::wide::prefetch;

/// A line of a cache, on every CPU but a few with longer ones.
pub type Line = [u64; 8];

/// A way to read.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Places read at once, an equal part of the buffer from each other.
    pub streams: usize,
    /// Lines asked for ahead of the one being read.
    pub ahead: usize,
}

/// Who wants to know how fast memory can be read tries them all.
pub const WAYS: [Way; 2] = [Way { streams: 8, ahead: 32 }, Way { streams: 4, ahead: 4 }];

/// Reads every line once and returns the exclusive or of all words, so that no read can be left out.
pub fn read(lines: &[Line], way: Way) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide(lines: &[Line], way: Way) -> u64 {
            streams(lines, way)
        }
        // SAFETY: this CPU has AVX2.
        return unsafe { wide(lines, way) };
    }
    streams(lines, way)
}

#[inline(always)]
fn streams(lines: &[Line], way: Way) -> u64 {
    match way.streams {
        4 => from_places::<4>(lines, way.ahead),
        _ => from_places::<8>(lines, way.ahead),
    }
}

#[inline(always)]
fn from_places<const N: usize>(lines: &[Line], ahead: usize) -> u64 {
    let length = lines.len() / N;
    let (even, rest) = lines.split_at(N * length);
    let mut streams = [even; N];
    for (i, stream) in streams.iter_mut().enumerate() {
        *stream = &even[i * length..][..length];
    }
    let mut sums = [[0; 8]; 2];
    for at in 0..length {
        for (i, stream) in streams.iter().enumerate() {
            prefetch(stream.as_ptr().wrapping_add(at + ahead));
            xor(&mut sums[i % 2], &stream[at]);
        }
    }
    rest.iter().for_each(|line| xor(&mut sums[0], line));
    sums.as_flattened().iter().fold(0, |sum, word| sum ^ word)
}

#[inline(always)]
fn xor(sum: &mut Line, line: &Line) {
    sum.iter_mut().zip(line).for_each(|(sum, word)| *sum ^= word);
}

/// Multiplies bytes and adds the products, `rounds` times, with the instructions the kernels of `isa` use; returns the
/// number of products. `None` where this is not known of an ISA.
///
/// # Panics
/// If this CPU lacks the ISA.
pub fn int8(isa: Isa, rounds: usize) -> Option<u64> {
    assert!(isa.supported(), "this CPU has no {}", isa.name());
    let loops: unsafe fn(usize) -> u64 = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => peak::avx2,
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => peak::avx_vnni,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => peak::avx512,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => peak::neon,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => peak::neon_dot,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => peak::neon_i8mm,
        _ => return None,
    };
    // SAFETY: this CPU has the ISA, just asserted.
    Some(unsafe { loops(rounds) })
}

/// The loops of [`int8`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod peak {
    #[cfg(target_arch = "aarch64")]
    use std::arch::aarch64::*;
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// `$step`, of `$products` products, on `$sums` sums with `$weights` weights: as many as hide its latency and fit in registers.
    /// Where products are made apart from sums each sum has weights of its own, and each round other activations, or the compiler
    /// would make products once for all.
    macro_rules! peak {
        ($name:ident, $features:literal, $sums:literal sums of $products:literal with $weights:literal weights,
         $byte:ident, $int:ident, $xor:ident, |$sum:ident, $w:ident, $a:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name(rounds: usize) -> u64 {
                let (mut w, mut sums) = ([$byte(0); $weights], [$int(0); $sums]);
                w.iter_mut().enumerate().for_each(|(i, w)| *w = black_box($byte(i as i8)));
                sums.iter_mut().enumerate().for_each(|(i, sum)| *sum = black_box($int(i as i32)));
                let (mut $a, change) = black_box(($byte(1), $byte(3)));
                for _ in 0..rounds {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let ($sum, $w) = (*sum, w[i % $weights]);
                        *sum = $step;
                    }
                    $a = $xor($a, change);
                }
                black_box(sums);
                (rounds * $sums * $products) as u64
            }
        };
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use super::*;
        peak!(avx2, "avx2", 5 sums of 32 with 5 weights, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_xor_si256, |sum, w, a| {
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)))
        });
        peak!(avx_vnni, "avx2,avxvnni", 10 sums of 32 with 2 weights, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_xor_si256, |sum, w, a| {
            _mm256_dpbusd_avx_epi32(sum, w, a)
        });
        peak!(
            avx512,
            "avx512f,avx512bw,avx512vnni",
            12 sums of 64 with 2 weights,
            _mm512_set1_epi8,
            _mm512_set1_epi32,
            _mm512_xor_si512,
            |sum, w, a| _mm512_dpbusd_epi32(sum, w, a)
        );
    }
    #[cfg(target_arch = "x86_64")]
    pub use x86::*;

    #[cfg(target_arch = "aarch64")]
    mod arm {
        use super::*;
        use crate::neon_dot::sdot;
        use crate::neon_i8mm::smmla;
        peak!(neon, "neon", 8 sums of 16 with 8 weights, vdupq_n_s8, vdupq_n_s32, veorq_s8, |sum, w, a| {
            let products = vmull_s8(vget_low_s8(w), vget_low_s8(a));
            vpadalq_s16(sum, vmlal_high_s8(products, w, a))
        });
        peak!(neon_dot, "neon,dotprod", 12 sums of 16 with 2 weights, vdupq_n_s8, vdupq_n_s32, veorq_s8, |sum, w, a| sdot(sum, w, a));
        peak!(
            neon_i8mm,
            "neon,dotprod,i8mm",
            12 sums of 32 with 2 weights,
            vdupq_n_s8,
            vdupq_n_s32,
            veorq_s8,
            |sum, w, a| smmla(sum, w, a)
        );
    }
    #[cfg(target_arch = "aarch64")]
    pub use arm::*;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::Rng;

    #[test]
    fn products_are_counted() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let (one, ten) = (int8(isa, 1), int8(isa, 10));
            assert_eq!(one.map(|n| 10 * n), ten, "{}", isa.name());
            assert!(one != Some(0) && (isa == Isa::Scalar || one.is_some()), "{}", isa.name());
        }
    }

    /// Every word counts, whatever the number of lines.
    #[test]
    fn all_is_read_once() {
        let mut rng = Rng(1);
        for n in (0..40).chain([257, 1000]) {
            let mut lines: Vec<Line> = (0..n).map(|_| std::array::from_fn(|_| rng.next())).collect();
            let sum = lines.as_flattened().iter().fold(0, |sum, word| sum ^ word);
            for way in WAYS {
                assert_eq!((read(&lines, way), streams(&lines, way)), (sum, sum), "{n} lines, {way:?}");
            }
            if n > 0 {
                lines[n * 3 / 4][5] ^= 1 << 40;
                assert!(WAYS.into_iter().all(|way| read(&lines, way) == sum ^ 1 << 40), "{n} lines");
            }
        }
    }
}
