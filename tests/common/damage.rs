//! Damage to files, chosen by a seeded generator or by the bytes of a fuzzer.

use std::time::Duration;

use super::raw_gguf::{Field, File, ty};

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

/// Where choices come from.
pub trait Draw {
    /// A number below `n`, 0 if that is 0.
    fn below(&mut self, n: usize) -> usize;

    /// Any byte.
    fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
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
}

impl Draw for Rng {
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Choices spelled out by bytes: as many for each as its range needs, zeros when none are left. A fuzzer that changes
/// a byte changes one choice.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next `n` bytes, or as many as there are.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A short string of bytes: its length, then itself.
    pub fn string(&mut self) -> &'a [u8] {
        let len = self.byte();
        self.take(len.into())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Draw for Bytes<'_> {
    fn below(&mut self, n: usize) -> usize {
        let width = (usize::BITS - n.saturating_sub(1).leading_zeros()).div_ceil(8) as usize;
        self.take(width).iter().fold(0, |number, &byte| number << 8 | usize::from(byte)) % n.max(1)
    }
}

/// One to six random injuries.
pub fn injure(bytes: &mut Vec<u8>, fields: &[Field], rng: &mut impl Draw) {
    for _ in 0..=rng.below(6) {
        let at = rng.below(bytes.len());
        let len = rng.below(40).min(bytes.len() - at);
        match rng.below(7) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.byte(),
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

/// Changes that leave a file well-formed and its contents wrong: they get further than damaged bytes.
pub fn contradict(parts: &mut File, rng: &mut impl Draw) {
    let small = [0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 128, 511, 512, 513];
    for _ in 0..=rng.below(2) {
        let number = match rng.below(4) {
            0 => EXTREMES[rng.below(EXTREMES.len())],
            _ => small[rng.below(small.len())],
        };
        let pair = rng.below(parts.pairs.len());
        let tensor = rng.below(parts.tensors.len());
        let other = rng.below(parts.tensors.len());
        match rng.below(9) {
            0 | 1 => {
                let numbers: Vec<usize> = (0..parts.pairs.len()).filter(|&i| parts.pairs[i].ty == ty::U32).collect();
                parts.pairs[numbers[rng.below(numbers.len())]].value = (number as u32).to_le_bytes().into();
            }
            2 => drop(parts.pairs.remove(pair)),
            3 => {
                let value = &mut parts.pairs[pair].value;
                let at = rng.below(value.len());
                value[at] = rng.byte();
            }
            4 => drop(parts.tensors.remove(tensor)),
            5 => {
                let dims = &mut parts.tensors[tensor].dims;
                let at = rng.below(dims.len());
                dims[at] = number;
            }
            6 => parts.tensors[tensor].type_id = number as u32,
            7 => {
                let name = std::mem::take(&mut parts.tensors[tensor].name);
                parts.tensors[tensor].name = std::mem::replace(&mut parts.tensors[other].name, name);
            }
            _ => {
                let data = &mut parts.tensors[tensor].data;
                let at = rng.below(data.len());
                data[at..].iter_mut().take(40).for_each(|byte| *byte = rng.byte());
            }
        }
        if parts.pairs.is_empty() || parts.tensors.is_empty() {
            return;
        }
    }
}
