//! Weights and activations for tests and benches: random, extreme, and of any format.
#![allow(dead_code)] // each test file uses a part

use gemrun_simd::{Format, half::f32_to_f16};

/// A small generator (splitmix64), so that a failure comes back with its seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn byte(&mut self) -> u8 {
        (self.next() >> 40) as u8
    }

    /// Between −1 and 1.
    pub fn unit(&mut self) -> f32 {
        ((self.next() >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
    }
}

/// Where the half-precision scales of a block stand, as the format's definition gives them.
fn scales_at(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::F16 | Format::BF16 | Format::Mxfp4 => &[],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        Format::Tq1_0 => &[52],
        Format::Tq2_0 => &[64],
        _ => &[0],
    }
}

/// Rows of weights whose integers are the bytes `next` gives and whose scales are random, finite and
/// neither tiny nor huge. Float formats get values between −1 and 1 and ignore `next`.
pub fn weights(
    format: Format,
    rows: usize,
    cols: usize,
    rng: &mut Rng,
    mut next: impl FnMut(&mut Rng) -> u8,
) -> Vec<u8> {
    let len = rows * format.row_bytes(cols).expect("whole blocks");
    match format {
        Format::F32 => (0..rows * cols).flat_map(|_| rng.unit().to_le_bytes()).collect(),
        Format::F16 => (0..rows * cols).flat_map(|_| f32_to_f16(rng.unit()).to_le_bytes()).collect(),
        Format::BF16 => (0..rows * cols).flat_map(|_| ((rng.unit().to_bits() >> 16) as u16).to_le_bytes()).collect(),
        _ => {
            let mut w: Vec<u8> = (0..len).map(|_| next(rng)).collect();
            for block in w.chunks_exact_mut(format.block_bytes()) {
                for &at in scales_at(format) {
                    block[at..at + 2].copy_from_slice(&f32_to_f16(rng.unit()).to_le_bytes());
                }
                if format == Format::Mxfp4 {
                    block[0] = 120 + rng.byte() % 16;
                }
            }
            w
        }
    }
}

/// Equal bits, or both NaN.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}
