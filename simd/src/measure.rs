//! What a CPU's memory could give at best, to be compared with what kernels get of it.
//!
//! The one idea: one core reads faster when it walks several places at once and asks ahead for what comes next, which is
//! also how the kernels read weights. [`read`] does nothing else: every byte of a buffer once, in [`STREAMS`] streams. It
//! knows nothing of time and threads; who measures runs it on each thread and looks at a clock.

/// A line of a cache, on every CPU but a few with longer ones.
pub type Line = [u64; 8];

/// Places read at once, an equal part of the buffer from each other.
pub const STREAMS: usize = 8;

/// Lines asked for ahead of the one being read: 2 KB.
const AHEAD: usize = 32;

/// Reads every line once and returns the exclusive or of all words, so that no read can be left out.
pub fn read(lines: &[Line]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide(lines: &[Line]) -> u64 {
            streams(lines)
        }
        // SAFETY: this CPU has AVX2.
        return unsafe { wide(lines) };
    }
    streams(lines)
}

#[inline(always)]
fn streams(lines: &[Line]) -> u64 {
    let length = lines.len() / STREAMS;
    let (even, rest) = lines.split_at(STREAMS * length);
    let mut streams = [even; STREAMS];
    for (i, stream) in streams.iter_mut().enumerate() {
        *stream = &even[i * length..][..length];
    }
    let mut sums = [[0; 8]; 2];
    for at in 0..length {
        for (i, stream) in streams.iter().enumerate() {
            prefetch(stream.as_ptr().wrapping_add(at + AHEAD).cast());
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

/// Asks for the line at `at`, which need not exist: a prefetch reads nothing and never faults.
#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: a hint, which changes neither memory nor registers.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", not(miri)))))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::Rng;

    /// Every word counts, whatever the number of lines.
    #[test]
    fn all_is_read_once() {
        let mut rng = Rng(1);
        for n in (0..40).chain([257, 1000]) {
            let mut lines: Vec<Line> = (0..n).map(|_| std::array::from_fn(|_| rng.next())).collect();
            let sum = lines.as_flattened().iter().fold(0, |sum, word| sum ^ word);
            assert_eq!((read(&lines), streams(&lines)), (sum, sum), "{n} lines");
            if n > 0 {
                lines[n * 3 / 4][5] ^= 1 << 40;
                assert_eq!(read(&lines), sum ^ 1 << 40, "{n} lines");
            }
        }
    }
}
