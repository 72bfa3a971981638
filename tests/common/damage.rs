//! Seeded random damage to files.

use std::time::Duration;

use super::raw_gguf::Field;

/// How long a test goes on damaging files: `GEMRUN_FUZZ_SECONDS`, 3 by default.
pub fn time() -> Duration {
    let seconds = std::env::var("GEMRUN_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(3))
}

/// Values that overflow what they are added to or multiplied with.
pub const EXTREMES: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 61,
    1 << 62,
    (1 << 63) - 64,
    1 << 63,
    u64::MAX - 39,
    u64::MAX,
];

/// Writes an integer over the one at `field`.
pub fn put(bytes: &mut [u8], field: Field, value: u64) {
    bytes[field.at..field.at + field.width].copy_from_slice(&value.to_le_bytes()[..field.width]);
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, 0 if that is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to six random injuries.
pub fn injure(bytes: &mut Vec<u8>, fields: &[Field], rng: &mut Rng) {
    for _ in 0..=rng.below(6) {
        let at = rng.below(bytes.len());
        let len = rng.below(40).min(bytes.len() - at);
        match rng.below(7) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next() as u8,
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let copy = bytes[at..at + len].to_vec();
                let to = rng.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            4 => bytes.truncate(at.max(1)),
            // Deletions and insertions move the fields: then these hit something else, which is as good.
            kind => {
                let field = fields[rng.below(fields.len())];
                if field.at + field.width <= bytes.len() {
                    let old = &bytes[field.at..field.at + field.width];
                    let old = old.iter().rev().fold(0_u64, |n, &b| n << 8 | u64::from(b));
                    let near = old.wrapping_add(rng.below(9) as u64).wrapping_sub(4);
                    put(bytes, field, if kind == 5 { EXTREMES[rng.below(EXTREMES.len())] } else { near });
                }
            }
        }
        if bytes.is_empty() {
            bytes.push(b'G');
        }
    }
}
