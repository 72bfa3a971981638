//! From floats to the blocks of a GGUF format.
//!
//! Q4_0 and Q8_0 are the reference quantizers, value for value, so that a file made here has the bytes that others give it.
//! Q6_K is our own search for scales. Not here: what uses which format.

use gemrun_simd::Format;
use gemrun_simd::half::{f16_to_f32, f32_to_f16};

/// Appends `values` in `format`, which is F32, F16, BF16, Q4_0, Q8_0 or Q6_K; a whole number of its blocks.
pub(super) fn encode(format: Format, values: &[f32], out: &mut Vec<u8>) {
    debug_assert!(values.len().is_multiple_of(format.block_elems()));
    match format {
        Format::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Format::F16 => out.extend(values.iter().flat_map(|&value| f32_to_f16(value).to_le_bytes())),
        Format::Q4_0 => values.as_chunks().0.iter().for_each(|block| q4_0(block, out)),
        Format::Q8_0 => values.as_chunks().0.iter().for_each(|block| q8_0(block, out)),
        Format::Q6K => values.as_chunks().0.iter().for_each(|block| q6_k(block, out)),
        _ => debug_assert!(false, "nothing is written in {format}"),
    }
}

/// The value of the largest magnitude, with its sign; of equal ones the first.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |best: f32, &value| if value.abs() > best.abs() { value } else { best })
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The extreme value becomes -8 whatever its sign, as there is one more negative integer than positive ones.
fn q4_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let d = extreme(block) / -8.0;
    let inverse = inverse(d);
    let q = |value: f32| ((value * inverse + 8.5) as u8).min(15);
    out.extend(f32_to_f16(d).to_le_bytes());
    let (low, high) = block.split_at(16);
    out.extend(low.iter().zip(high).map(|(&low, &high)| q(low) | q(high) << 4));
}

/// Rounded half away from zero.
fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let d = extreme(block).abs() / 127.0;
    let inverse = inverse(d);
    out.extend(f32_to_f16(d).to_le_bytes());
    out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
}

/// Scales tried for a group of 16: the extreme value becomes -32 divided by these.
const STRETCH: [f32; 9] = [0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.09, 1.12];

/// The signed scale with which 16 values lose least as integers from -32 to 31.
fn scale_of_16(values: &[f32; 16]) -> f32 {
    let extreme = extreme(values);
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0);
    for stretch in STRETCH {
        let inverse = -32.0 * stretch / extreme;
        let q = values.map(|value| (value * inverse).round_ties_even().clamp(-32.0, 31.0));
        // The best scale for these integers.
        let (mut vq, mut qq) = (0.0, 0.0);
        for (value, q) in values.iter().zip(q) {
            vq += value * q;
            qq += q * q;
        }
        let scale = if qq > 0.0 { vq / qq } else { 0.0 };
        let loss: f32 = values.iter().zip(q).map(|(value, q)| (value - scale * q) * (value - scale * q)).sum();
        if loss < best.0 {
            best = (loss, scale);
        }
    }
    best.1
}

/// Sixteen groups of 16 with scales of 8 bits; six bits a value, the lower four and the upper two apart.
fn q6_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let groups = block.as_chunks::<16>().0;
    let mut scales = [0.0_f32; 16];
    scales.iter_mut().zip(groups).for_each(|(scale, group)| *scale = scale_of_16(group));
    let d = f32_to_f16(extreme(&scales) / -128.0);
    let per = inverse(f16_to_f32(d));
    let scales = scales.map(|scale| (scale * per).round_ties_even().clamp(-128.0, 127.0) as i8);

    let mut q = [0_u8; 256];
    for ((group, q), scale) in groups.iter().zip(q.as_chunks_mut::<16>().0).zip(scales) {
        let inverse = inverse(f16_to_f32(d) * f32::from(scale));
        let code = |value: f32| ((value * inverse).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
        q.iter_mut().zip(group).for_each(|(q, value)| *q = code(*value));
    }
    let halves = q.as_chunks::<128>().0;
    for half in halves {
        let (low, high) = half.split_at(64);
        out.extend(low.iter().zip(high).map(|(low, high)| (low & 15) | (high & 15) << 4));
    }
    for half in halves {
        let [a, b, c, d] = half.as_chunks::<32>().0 else { continue };
        let top = |((a, b), (c, d)): ((&u8, &u8), (&u8, &u8))| a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        out.extend(a.iter().zip(b).zip(c.iter().zip(d)).map(top));
    }
    out.extend(scales.map(|scale| scale as u8));
    out.extend(d.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of all sizes, as a fixed sequence gives them.
    fn values(count: usize) -> Vec<f32> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|i| next() * next() * (1.0 + (i / 256) as f32)).collect()
    }

    /// Root of the mean square of what is lost, over that of the values.
    fn loss(format: Format, values: &[f32]) -> f64 {
        let mut blocks = Vec::new();
        encode(format, values, &mut blocks);
        let mut back = vec![0.0; values.len()];
        format.unpack_row(&blocks, &mut back);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let lost: f64 = values.iter().zip(&back).map(|(a, b)| square(a - b)).sum();
        (lost / values.iter().copied().map(square).sum::<f64>()).sqrt()
    }

    #[test]
    fn what_is_lost_is_what_the_width_allows() {
        let values = values(4096);
        for (format, most) in
            [(Format::F32, 0.0), (Format::F16, 3e-4), (Format::Q8_0, 6e-3), (Format::Q6K, 0.021), (Format::Q4_0, 0.1)]
        {
            let lost = loss(format, &values);
            assert!(lost <= most && (most == 0.0 || lost > most / 10.0), "{format}: {lost}");
        }
    }

    #[test]
    fn zeros_and_extremes() {
        for format in [Format::F16, Format::Q4_0, Format::Q8_0, Format::Q6K] {
            let mut blocks = Vec::new();
            let mut back = vec![1.0; 256];
            encode(format, &[0.0; 256], &mut blocks);
            format.unpack_row(&blocks, &mut back);
            assert!(back.iter().all(|&value| value == 0.0), "{format}");
            blocks.clear();
            encode(format, &[f32::MAX; 256], &mut blocks);
            format.unpack_row(&blocks, &mut back);
            assert!(back.iter().all(|value| value.is_finite()), "{format}");
        }
    }
}
