//! The number formats of GGUF tensors: sizes, names, ids, and one decoder for all of them.
//!
//! The one idea: every block format is a sequence of *groups* of 32 weights, and every group can be
//! written as `value[i] = d·s[i/16]·q[i] − dmin·m[i/16]` with small integers `q`, `s`, `m` and two
//! f32 scales. [`Block`] is that decoder; dequantisation, the scalar kernels, the many-token
//! kernels and the tests are all built on it. Formats whose tables (IQ1, IQ2, IQ3) this crate does not
//! carry are known by name and size only.
//!
//! Layouts: ggml's `block_*` structs, little-endian, packed without padding.

#![forbid(unsafe_code)]

use crate::half::{bf16_to_f32, f16_to_f32};

/// A number format this crate can multiply with. The discriminant is ggml's type id, or above all of them for formats
/// that ggml does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
#[allow(missing_docs)] // the variants are ggml's names
pub enum Format {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2K = 10,
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
    Iq4Nl = 20,
    Iq4Xs = 23,
    BF16 = 30,
    Tq1_0 = 34,
    Tq2_0 = 35,
    Mxfp4 = 39,
    Q1_0 = 41,
    Q2_0 = 42,
    /// Ours: 2-bit weights with one scale a row, as the mobile checkpoints store them.
    W2C = 0x1_0002,
    /// Ours: 4-bit weights with one scale a row.
    W4C = 0x1_0004,
    /// Ours: 8-bit weights with one scale a row.
    W8C = 0x1_0008,
    /// Blocks of [`Format::Q4_0`] whose integers have one scale a row, not those of the blocks.
    Q4_0C = 0x1_0102,
    /// The same of [`Format::Q8_0`].
    Q8_0C = 0x1_0108,
    /// The same of [`Format::Tq2_0`], for weights in −2..=1: as that format has them in −1..=2, they are its integers with the sign changed.
    Tq2_0C = 0x1_0135,
}

/// ggml's type table, indexed by id: name, elements a block, bytes a block. Removed ids have no name.
const GGML_TYPES: [(&str, usize, usize); 43] = [
    ("F32", 1, 4),
    ("F16", 1, 2),
    ("Q4_0", 32, 18),
    ("Q4_1", 32, 20),
    ("", 0, 0),
    ("", 0, 0),
    ("Q5_0", 32, 22),
    ("Q5_1", 32, 24),
    ("Q8_0", 32, 34),
    ("Q8_1", 32, 36),
    ("Q2_K", 256, 84),
    ("Q3_K", 256, 110),
    ("Q4_K", 256, 144),
    ("Q5_K", 256, 176),
    ("Q6_K", 256, 210),
    ("Q8_K", 256, 292),
    ("IQ2_XXS", 256, 66),
    ("IQ2_XS", 256, 74),
    ("IQ3_XXS", 256, 98),
    ("IQ1_S", 256, 50),
    ("IQ4_NL", 32, 18),
    ("IQ3_S", 256, 110),
    ("IQ2_S", 256, 82),
    ("IQ4_XS", 256, 136),
    ("I8", 1, 1),
    ("I16", 1, 2),
    ("I32", 1, 4),
    ("I64", 1, 8),
    ("F64", 1, 8),
    ("IQ1_M", 256, 56),
    ("BF16", 1, 2),
    ("", 0, 0),
    ("", 0, 0),
    ("", 0, 0),
    ("TQ1_0", 256, 54),
    ("TQ2_0", 256, 66),
    ("", 0, 0),
    ("", 0, 0),
    ("", 0, 0),
    ("MXFP4", 32, 17),
    ("NVFP4", 64, 36),
    ("Q1_0", 128, 18),
    ("Q2_0", 64, 18),
];

/// Name, elements a block and bytes a block of any ggml type, supported here or not; `None` for an
/// id that ggml has removed or not yet given out.
pub fn ggml_type_name(id: u32) -> Option<(&'static str, usize, usize)> {
    GGML_TYPES.get(id as usize).copied().filter(|t| !t.0.is_empty())
}

impl Format {
    /// Every format, in the order of the ids.
    pub const ALL: [Format; 26] = [
        Format::F32,
        Format::F16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::Iq4Nl,
        Format::Iq4Xs,
        Format::BF16,
        Format::Tq1_0,
        Format::Tq2_0,
        Format::Mxfp4,
        Format::Q1_0,
        Format::Q2_0,
        Format::W2C,
        Format::W4C,
        Format::W8C,
        Format::Q4_0C,
        Format::Q8_0C,
        Format::Tq2_0C,
    ];

    /// The format with this ggml type id, if this crate can multiply with it.
    pub fn from_ggml(id: u32) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.ggml_id() == Some(id))
    }

    /// ggml's type id, as stored in a GGUF tensor table; `None` for formats that ggml does not have.
    pub const fn ggml_id(self) -> Option<u32> {
        if self.is_channel() { None } else { Some(self as u32) }
    }

    /// Name, elements a block, bytes a block.
    const fn row(self) -> (&'static str, usize, usize) {
        match self {
            Format::W2C => ("W2C", 32, 8),
            Format::W4C => ("W4C", 32, 16),
            Format::W8C => ("W8C", 32, 32),
            Format::Q4_0C => ("Q4_0C", 32, 18),
            Format::Q8_0C => ("Q8_0C", 32, 34),
            Format::Tq2_0C => ("TQ2_0C", 256, 66),
            _ => GGML_TYPES[self as usize],
        }
    }

    /// The name as ggml spells it (`Q4_0`, `Q6_K`, `IQ4_NL`), or ours.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Weights in a block; 1 for the float formats, otherwise a multiple of 32.
    pub const fn block_elems(self) -> usize {
        self.row().1
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        self.row().2
    }

    /// The formats that are ours: integers, with a scale a row beside them, to be multiplied with activations that have one
    /// scale a token.
    pub const fn is_channel(self) -> bool {
        matches!(self, Format::W2C | Format::W4C | Format::W8C | Format::Q4_0C | Format::Q8_0C | Format::Tq2_0C)
    }

    /// Bits of a weight, those of scales left out: exact for formats with a scale a row.
    pub const fn bits(self) -> usize {
        self.block_bytes() * 8 / self.block_elems()
    }

    /// Bytes of a row of `cols` weights; `None` if `cols` is not a whole number of blocks or the
    /// product overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block_elems()) {
            (cols / self.block_elems()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// F32, F16 and BF16: formats that are multiplied with f32 activations.
    pub const fn is_float(self) -> bool {
        self.block_elems() == 1
    }

    /// Writes the exact f32 values of a row of weights. The scale products `d·s` and `dmin·m` are
    /// rounded first, then multiplied by `q`, then the minimum is subtracted. Of a channel-wise format: the integers,
    /// still to be multiplied by the row's scale.
    ///
    /// # Panics
    /// If `bytes` is not exactly `self.row_bytes(out.len())` long.
    pub fn unpack_row(self, bytes: &[u8], out: &mut [f32]) {
        let want = self.row_bytes(out.len());
        assert!(want == Some(bytes.len()), "{}: {} bytes for {} weights", self.name(), bytes.len(), out.len());
        match self {
            Format::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Format::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f16_to_f32(u16::from_le_bytes(*b));
                }
            }
            Format::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = bf16_to_f32(u16::from_le_bytes(*b));
                }
            }
            Format::Q4_0 => unpack::<Q4_0>(bytes, out),
            Format::Q4_1 => unpack::<Q4_1>(bytes, out),
            Format::Q5_0 => unpack::<Q5_0>(bytes, out),
            Format::Q5_1 => unpack::<Q5_1>(bytes, out),
            Format::Q8_0 => unpack::<Q8_0>(bytes, out),
            Format::Q2K => unpack::<Q2K>(bytes, out),
            Format::Q3K => unpack::<Q3K>(bytes, out),
            Format::Q4K => unpack::<Q4K>(bytes, out),
            Format::Q5K => unpack::<Q5K>(bytes, out),
            Format::Q6K => unpack::<Q6K>(bytes, out),
            Format::Iq4Nl => unpack::<Iq4Nl>(bytes, out),
            Format::Iq4Xs => unpack::<Iq4Xs>(bytes, out),
            Format::Tq1_0 => unpack::<Tq1_0>(bytes, out),
            Format::Tq2_0 => unpack::<Tq2_0>(bytes, out),
            Format::Mxfp4 => unpack::<Mxfp4>(bytes, out),
            Format::Q1_0 => unpack::<Q1_0>(bytes, out),
            Format::Q2_0 => unpack::<Q2_0>(bytes, out),
            Format::W2C => unpack::<W2C>(bytes, out),
            Format::W4C => unpack::<W4C>(bytes, out),
            Format::W8C => unpack::<W8C>(bytes, out),
            Format::Q4_0C => unpack::<Q4_0C>(bytes, out),
            Format::Q8_0C => unpack::<Q8_0C>(bytes, out),
            Format::Tq2_0C => unpack::<Tq2_0C>(bytes, out),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

fn unpack<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.chunks_exact(B::FORMAT.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(B::FORMAT.block_elems())) {
        for (g, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            *out = B::group(block, g).values();
        }
    }
}

/// 32 consecutive weights of a row: `value[i] = d·s[i/16]·q[i] − dmin·m[i/16]`.
///
/// `|Σ_h s[h]·Σ q·a|` with activations of ±127 stays below 2^24 for every format, so the integer sum
/// of a group converts to f32 exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// The integer weights.
    pub q: [i8; 32],
    /// Integer scale of each half.
    pub s: [i32; 2],
    /// Integer minimum of each half; zero for formats without minima.
    pub m: [i32; 2],
    /// Scale of the group (of the super-block, where `s` refines it).
    pub d: f32,
    /// Scale of the minima.
    pub dmin: f32,
}

/// All but the weights of a [`Group`].
#[derive(Clone, Copy)]
#[allow(missing_docs)] // as in `Group`
pub struct Scales {
    pub s: [i32; 2],
    pub m: [i32; 2],
    pub d: f32,
    pub dmin: f32,
}

impl Scales {
    /// A scale alone.
    #[inline(always)]
    fn one(d: f32) -> Scales {
        Scales { s: [1, 1], m: [0, 0], d, dmin: 0.0 }
    }
}

impl Group {
    /// The 32 weights as f32; see [`Format::unpack_row`] for the rounding.
    #[inline(always)]
    pub fn values(&self) -> [f32; 32] {
        each(|i| {
            let h = i / 16;
            (self.d * self.s[h] as f32) * self.q[i] as f32 - self.dmin * self.m[h] as f32
        })
    }
}

/// A block format: how to read group `g` of a block.
pub trait Block: Sync {
    /// Which format this is.
    const FORMAT: Format;
    /// Whether groups have minima (`m`, `dmin`); decides whether the minimum term is accumulated at all.
    const MINIMA: bool = false;
    /// Whether the halves of a group may have different scales.
    const PER_16: bool = false;
    /// `q + BIAS` is in `0..=SPAN`, with `BIAS` as small as that allows.
    const BIAS: i32;
    /// Largest value of `q + BIAS`.
    const SPAN: i32;
    /// Whether what is stored is `BIAS − q`, not `q + BIAS`.
    const NEGATIVE: bool = false;

    /// The integers of group `g` (weights `32·g ..`) of `block`, which is exactly one block long.
    fn weights(block: &[u8], g: usize) -> [i8; 32];

    /// Its scales and minima. `half` converts halves.
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales;

    /// Both.
    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let Scales { s, m, d, dmin } = Self::scales(block, g, f16_to_f32);
        Group { q: Self::weights(block, g), s, m, d, dmin }
    }
}

/// Reads `block` as exactly N bytes, so that constant indices below need no checks.
#[inline(always)]
fn fixed<const N: usize>(block: &[u8]) -> &[u8; N] {
    block.try_into().expect("a block has the size of its format")
}

/// An array of f(0), f(1), …: `array::from_fn`, but always inlined, so that the loop vectorises.
#[inline(always)]
pub(crate) fn each<T: Copy + Default, const N: usize>(f: impl Fn(usize) -> T) -> [T; N] {
    let mut out = [T::default(); N];
    for (i, out) in out.iter_mut().enumerate() {
        *out = f(i);
    }
    out
}

#[inline(always)]
fn signed(q: [u8; 32]) -> [i8; 32] {
    each(|i| q[i] as i8)
}

#[inline(always)]
fn f16_at(block: &[u8], at: usize, half: impl Fn(u16) -> f32) -> f32 {
    half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The 16 bytes of nibbles at the start of `b`: low nibbles first, then high nibbles.
#[inline(always)]
fn nibbles(b: &[u8]) -> [u8; 32] {
    let b: &[u8; 16] = b[..16].try_into().expect("16 bytes");
    let mut out = [0; 32];
    let (low, high) = out.split_at_mut(16);
    for ((low, high), b) in low.iter_mut().zip(high).zip(b) {
        (*low, *high) = (b & 15, b >> 4);
    }
    out
}

/// f16 d; 16 bytes of nibbles. Weight (q − 8)·d.
pub struct Q4_0;
impl Block for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const BIAS: i32 = 8;
    const SPAN: i32 = 15;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<18>(block);
        let q = nibbles(&b[2..]);
        each(|i| q[i] as i8 - 8)
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<18>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// f16 d; f16 m; 16 bytes of nibbles. Weight q·d + m, written as a minimum of −m.
pub struct Q4_1;
impl Block for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const MINIMA: bool = true;
    const BIAS: i32 = 0;
    const SPAN: i32 = 15;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<20>(block);
        signed(nibbles(&b[4..]))
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<20>(block);
        Scales { s: [1, 1], m: [1, 1], d: f16_at(b, 0, half), dmin: -f16_at(b, 2, half) }
    }
}

/// Adds 16 where the bit of `high` is set: bit i belongs to weight i.
#[inline(always)]
fn fifth_bit(q: [u8; 32], high: u32) -> [u8; 32] {
    each(|i| q[i] | (((high >> i) & 1) << 4) as u8)
}

/// f16 d; u32 fifth bits; 16 bytes of nibbles. Weight (q − 16)·d.
pub struct Q5_0;
impl Block for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const BIAS: i32 = 16;
    const SPAN: i32 = 31;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<22>(block);
        let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
        let q = fifth_bit(nibbles(&b[6..]), high);
        each(|i| q[i] as i8 - 16)
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<22>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// f16 d; f16 m; u32 fifth bits; 16 bytes of nibbles. Weight q·d + m, written as a minimum of −m.
pub struct Q5_1;
impl Block for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const MINIMA: bool = true;
    const BIAS: i32 = 0;
    const SPAN: i32 = 31;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<24>(block);
        let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        signed(fifth_bit(nibbles(&b[8..]), high))
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<24>(block);
        Scales { s: [1, 1], m: [1, 1], d: f16_at(b, 0, half), dmin: -f16_at(b, 2, half) }
    }
}

/// f16 d; 32 × i8. Weight q·d; a file may hold −128.
pub struct Q8_0;
impl Block for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const BIAS: i32 = 128;
    const SPAN: i32 = 255;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<34>(block);
        each(|i| b[2 + i] as i8)
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<34>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// Two bits of each of 32 bytes: the order Q2_K, Q3_K and TQ2_0 share. Group g lives in the 32-byte
/// half g/4, at bit 2·(g%4).
#[inline(always)]
fn two_bits(qs: &[u8], g: usize) -> [u8; 32] {
    let half: &[u8; 32] = qs[32 * (g / 4)..][..32].try_into().expect("32 bytes");
    each(|i| (half[i] >> (2 * (g % 4))) & 3)
}

/// 16 × (4-bit scale, 4-bit minimum); 64 bytes of 2-bit weights; f16 d; f16 dmin.
pub struct Q2K;
impl Block for Q2K {
    const FORMAT: Format = Format::Q2K;
    const MINIMA: bool = true;
    const PER_16: bool = true;
    const BIAS: i32 = 0;
    const SPAN: i32 = 3;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<84>(block);
        signed(two_bits(&b[16..80], g))
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<84>(block);
        let sm = [b[2 * g], b[2 * g + 1]];
        Scales {
            s: [(sm[0] & 15) as i32, (sm[1] & 15) as i32],
            m: [(sm[0] >> 4) as i32, (sm[1] >> 4) as i32],
            d: f16_at(b, 80, half),
            dmin: f16_at(b, 82, half),
        }
    }
}

/// 32 bytes of third bits; 64 bytes of 2-bit weights; 16 six-bit scales in 12 bytes; f16 d.
pub struct Q3K;
impl Block for Q3K {
    const FORMAT: Format = Format::Q3K;
    const PER_16: bool = true;
    const BIAS: i32 = 4;
    const SPAN: i32 = 7;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<110>(block);
        let low = two_bits(&b[32..96], g);
        each(|i| (low[i] | ((b[i] >> g) & 1) << 2) as i8 - 4)
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<110>(block);
        let scales = &b[96..108];
        let s = each(|h| {
            let i = 2 * g + h;
            let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
            let high = (scales[8 + i % 4] >> (2 * (i / 4))) & 3;
            (low | high << 4) as i32 - 32
        });
        Scales { s, ..Scales::one(f16_at(b, 108, half)) }
    }
}

/// Scale and minimum of group g from the 12 bytes Q4_K and Q5_K share: eight 6-bit pairs.
#[inline(always)]
fn scale_min(scales: &[u8], g: usize) -> (i32, i32) {
    let (s, m) = if g < 4 {
        (scales[g] & 63, scales[g + 4] & 63)
    } else {
        let low = scales[g + 4];
        ((low & 15) | (scales[g - 4] >> 6) << 4, (low >> 4) | (scales[g] >> 6) << 4)
    };
    (s as i32, m as i32)
}

/// 32 nibbles for group g of 128 bytes: each 32 bytes hold two groups, low nibbles then high nibbles.
#[inline(always)]
fn pair_nibbles(qs: &[u8], g: usize) -> [u8; 32] {
    let pair: &[u8; 32] = qs[32 * (g / 2)..][..32].try_into().expect("32 bytes");
    each(|i| (pair[i] >> (4 * (g % 2))) & 15)
}

/// f16 d; f16 dmin; 12 bytes of scales and minima; 128 bytes of nibbles.
pub struct Q4K;
impl Block for Q4K {
    const FORMAT: Format = Format::Q4K;
    const MINIMA: bool = true;
    const BIAS: i32 = 0;
    const SPAN: i32 = 15;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<144>(block);
        signed(pair_nibbles(&b[16..], g))
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<144>(block);
        let (s, m) = scale_min(&b[4..16], g);
        Scales { s: [s, s], m: [m, m], d: f16_at(b, 0, half), dmin: f16_at(b, 2, half) }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit g of byte i.
pub struct Q5K;
impl Block for Q5K {
    const FORMAT: Format = Format::Q5K;
    const MINIMA: bool = true;
    const BIAS: i32 = 0;
    const SPAN: i32 = 31;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<176>(block);
        let low = pair_nibbles(&b[48..], g);
        each(|i| (low[i] | ((b[16 + i] >> g) & 1) << 4) as i8)
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<176>(block);
        let (s, m) = scale_min(&b[4..16], g);
        Scales { s: [s, s], m: [m, m], d: f16_at(b, 0, half), dmin: f16_at(b, 2, half) }
    }
}

/// 128 bytes of low nibbles; 64 bytes of high bit pairs; 16 × i8 scales; f16 d. Weight (q − 32)·s·d.
///
/// Each half of the block (128 weights) has 64 low-nibble bytes, 32 high bytes and 8 scales. Its four
/// groups take: low nibbles of bytes 0..32, low of 32..64, high of 0..32, high of 32..64; and bit pair
/// 0, 1, 2, 3 of the high bytes.
pub struct Q6K;
impl Block for Q6K {
    const FORMAT: Format = Format::Q6K;
    const PER_16: bool = true;
    const BIAS: i32 = 32;
    const SPAN: i32 = 63;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<210>(block);
        let (half, part) = (g / 4, g % 4);
        let low: &[u8; 32] = b[64 * half + 32 * (part % 2)..][..32].try_into().expect("32 bytes");
        let high: &[u8; 32] = b[128 + 32 * half..][..32].try_into().expect("32 bytes");
        each(|i| {
            let low = (low[i] >> (4 * (part / 2))) & 15;
            let high = (high[i] >> (2 * part)) & 3;
            (low | high << 4) as i8 - 32
        })
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<210>(block);
        let s = [b[192 + 2 * g] as i8 as i32, b[193 + 2 * g] as i8 as i32];
        Scales { s, ..Scales::one(f16_at(b, 208, half)) }
    }
}

/// The 16 values of IQ4_NL and IQ4_XS.
pub(crate) const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// f16 d; 16 bytes of nibbles that index a table of 16 values.
pub struct Iq4Nl;
impl Block for Iq4Nl {
    const FORMAT: Format = Format::Iq4Nl;
    const BIAS: i32 = 127;
    const SPAN: i32 = 240;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<18>(block);
        let q = nibbles(&b[2..]);
        each(|i| IQ4[q[i] as usize])
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<18>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// f16 d; u16 high bits and 4 bytes of low nibbles of eight 6-bit scales; 128 bytes of nibbles, indices
/// into the table of IQ4_NL, 16 bytes a group.
pub struct Iq4Xs;
impl Block for Iq4Xs {
    const FORMAT: Format = Format::Iq4Xs;
    const BIAS: i32 = 127;
    const SPAN: i32 = 240;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<136>(block);
        let q = nibbles(&b[8 + 16 * g..]);
        each(|i| IQ4[q[i] as usize])
    }
    #[inline(always)]
    fn scales(block: &[u8], g: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<136>(block);
        let high = u16::from_le_bytes([b[2], b[3]]);
        let low = (b[4 + g / 2] >> (4 * (g % 2))) & 15;
        let s = (low as u16 | ((high >> (2 * g)) & 3) << 4) as i32 - 32;
        Scales { s: [s, s], ..Scales::one(f16_at(b, 0, half)) }
    }
}

/// Digit `n` (most significant first) of a byte that holds five base-3 digits as a fraction of 256.
#[inline(always)]
fn trit(byte: u8, n: usize) -> i8 {
    let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][n]);
    ((shifted as u16 * 3) >> 8) as i8 - 1
}

/// 48 + 4 bytes of base-3 digits; f16 d. Weights −d, 0, d.
///
/// Order of the 256 weights: digit 0 of bytes 0..32, then digit 1 of them, … digit 4; the same for
/// bytes 32..48; then digits 0..4 of the last 4 bytes.
pub struct Tq1_0;
impl Block for Tq1_0 {
    const FORMAT: Format = Format::Tq1_0;
    const BIAS: i32 = 1;
    const SPAN: i32 = 2;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<54>(block);
        if g < 5 {
            return each(|i| trit(b[i], g));
        }
        each(|i| match 2 * (g - 5) + i / 16 {
            n @ 0..5 => trit(b[32 + i % 16], n),
            _ => trit(b[48 + i % 4], i % 16 / 4),
        })
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<54>(block);
        Scales::one(f16_at(b, 52, half))
    }
}

/// 64 bytes of 2-bit weights; f16 d. Weight (q − 1)·d.
pub struct Tq2_0;
impl Block for Tq2_0 {
    const FORMAT: Format = Format::Tq2_0;
    const BIAS: i32 = 1;
    const SPAN: i32 = 3;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<66>(block);
        let q = two_bits(&b[..64], g);
        each(|i| q[i] as i8 - 1)
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<66>(block);
        Scales::one(f16_at(b, 64, half))
    }
}

/// The 16 values of MXFP4: E2M1, doubled so that they are integers.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The same plus MXFP4's bias.
pub(crate) const E2M1_PLUS_12: [i8; 16] = {
    let mut table = E2M1;
    let mut i = 0;
    while i < 16 {
        table[i] += 12;
        i += 1;
    }
    table
};

/// u8 exponent; 16 bytes of nibbles that index E2M1. Scale 2^(e − 128), which for e < 2 is subnormal.
pub struct Mxfp4;
impl Block for Mxfp4 {
    const FORMAT: Format = Format::Mxfp4;
    const BIAS: i32 = 12;
    const SPAN: i32 = 24;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<17>(block);
        let q = nibbles(&b[1..]);
        each(|i| E2M1[q[i] as usize])
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, _: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<17>(block);
        let bits = if b[0] < 2 { 0x0020_0000 << b[0] } else { (b[0] as u32 - 1) << 23 };
        Scales::one(f32::from_bits(bits))
    }
}

/// f16 d; 128 bits, least significant first. Weight d where set, −d where clear.
pub struct Q1_0;
impl Block for Q1_0 {
    const FORMAT: Format = Format::Q1_0;
    const BIAS: i32 = 1;
    const SPAN: i32 = 2;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<18>(block);
        each(|i| {
            let set = (b[2 + 4 * g + i / 8] >> (i % 8)) & 1;
            2 * set as i8 - 1
        })
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<18>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// f16 d; 64 × 2 bits, least significant first. Weight (q − 1)·d: −d, 0, d, 2d.
pub struct Q2_0;
impl Block for Q2_0 {
    const FORMAT: Format = Format::Q2_0;
    const BIAS: i32 = 1;
    const SPAN: i32 = 3;
    #[inline(always)]
    fn weights(block: &[u8], g: usize) -> [i8; 32] {
        let b = fixed::<18>(block);
        each(|i| ((b[2 + 8 * g + i / 4] >> (2 * (i % 4))) & 3) as i8 - 1)
    }
    #[inline(always)]
    fn scales(block: &[u8], _: usize, half: impl Fn(u16) -> f32 + Copy) -> Scales {
        let b = fixed::<18>(block);
        Scales::one(f16_at(b, 0, half))
    }
}

/// 8 bytes of 2-bit weights, least significant first. Weight q − 2: −2, −1, 0, 1.
pub struct W2C;
impl Block for W2C {
    const FORMAT: Format = Format::W2C;
    const BIAS: i32 = 2;
    const SPAN: i32 = 3;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<8>(block);
        each(|i| ((b[i / 4] >> (2 * (i % 4))) & 3) as i8 - 2)
    }
    #[inline(always)]
    fn scales(_: &[u8], _: usize, _: impl Fn(u16) -> f32 + Copy) -> Scales {
        Scales::one(1.0)
    }
}

/// 16 bytes of nibbles, low ones first: weight 2i and 2i + 1 in byte i. Weight q − 8.
pub struct W4C;
impl Block for W4C {
    const FORMAT: Format = Format::W4C;
    const BIAS: i32 = 8;
    const SPAN: i32 = 15;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<16>(block);
        each(|i| ((b[i / 2] >> (4 * (i % 2))) & 15) as i8 - 8)
    }
    #[inline(always)]
    fn scales(_: &[u8], _: usize, _: impl Fn(u16) -> f32 + Copy) -> Scales {
        Scales::one(1.0)
    }
}

/// 32 × i8.
pub struct W8C;
impl Block for W8C {
    const FORMAT: Format = Format::W8C;
    const BIAS: i32 = 128;
    const SPAN: i32 = 255;
    #[inline(always)]
    fn weights(block: &[u8], _: usize) -> [i8; 32] {
        let b = fixed::<32>(block);
        each(|i| b[i] as i8)
    }
    #[inline(always)]
    fn scales(_: &[u8], _: usize, _: impl Fn(u16) -> f32 + Copy) -> Scales {
        Scales::one(1.0)
    }
}

/// Blocks whose own scales do not count.
macro_rules! by_rows {
    ($(#[doc = $doc:literal])* $name:ident of $of:ident, $bias:literal, $span:literal, $negative:literal) => {
        $(#[doc = $doc])*
        pub struct $name;
        impl Block for $name {
            const FORMAT: Format = Format::$name;
            const BIAS: i32 = $bias;
            const SPAN: i32 = $span;
            const NEGATIVE: bool = $negative;
            #[inline(always)]
            fn weights(block: &[u8], g: usize) -> [i8; 32] {
                let q = $of::weights(block, g);
                each(|i| if $negative { -q[i] } else { q[i] })
            }
            #[inline(always)]
            fn scales(_: &[u8], _: usize, _: impl Fn(u16) -> f32 + Copy) -> Scales {
                Scales::one(1.0)
            }
        }
    };
}
by_rows! {
    /// The integers of [`Q4_0`].
    Q4_0C of Q4_0, 8, 15, false
}
by_rows! {
    /// The integers of [`Q8_0`].
    Q8_0C of Q8_0, 128, 255, false
}
by_rows! {
    /// The integers of [`Tq2_0`], their sign changed: weight 1 − q.
    Tq2_0C of Tq2_0, 1, 3, true
}

// The sizes follow from the fields named in the comments above; a slip in the table would misread
// every tensor, so it must not compile.
const _: () = {
    let mut i = 0;
    while i < Format::ALL.len() {
        let f = Format::ALL[i];
        assert!(!f.name().is_empty());
        assert!(f.is_float() || f.block_elems().is_multiple_of(32));
        i += 1;
    }
    assert!(Format::Q4_0.block_bytes() == 2 + 16);
    assert!(Format::Q4_1.block_bytes() == 2 + 2 + 16);
    assert!(Format::Q5_0.block_bytes() == 2 + 4 + 16);
    assert!(Format::Q5_1.block_bytes() == 2 + 2 + 4 + 16);
    assert!(Format::Q8_0.block_bytes() == 2 + 32);
    assert!(Format::Q2K.block_bytes() == 16 + 64 + 2 + 2);
    assert!(Format::Q3K.block_bytes() == 32 + 64 + 12 + 2);
    assert!(Format::Q4K.block_bytes() == 2 + 2 + 12 + 128);
    assert!(Format::Q5K.block_bytes() == 2 + 2 + 12 + 32 + 128);
    assert!(Format::Q6K.block_bytes() == 128 + 64 + 16 + 2);
    assert!(Format::Iq4Nl.block_bytes() == 2 + 16);
    assert!(Format::Iq4Xs.block_bytes() == 2 + 2 + 4 + 128);
    assert!(Format::Tq1_0.block_bytes() == 48 + 4 + 2);
    assert!(Format::Tq2_0.block_bytes() == 64 + 2);
    assert!(Format::Mxfp4.block_bytes() == 1 + 16);
    assert!(Format::Q1_0.block_bytes() == 2 + 16 && Format::Q1_0.block_elems() == 128);
    assert!(Format::Q2_0.block_bytes() == 2 + 16 && Format::Q2_0.block_elems() == 64);
};
