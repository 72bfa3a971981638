//! Dequantisers of the oracle: one function a format, bytes of a block in, f32 values out.
//!
//! Written for reading, from the block layouts alone. The order of the f32 operations is the one that
//! defines the formats: scale times sub-scale first, then times the quantum, then the minimum subtracted,
//! so the values are exact to the bit and not only close.

/// A block format: its GGUF type id, elements and bytes of a block, and how a block is read.
pub struct Format {
    pub id: u32,
    pub name: &'static str,
    pub elements: usize,
    pub bytes: usize,
    read: fn(&[u8], &mut [f32]),
}

#[rustfmt::skip]
pub const FORMATS: [Format; 20] = [
    Format { id: 0, name: "F32", elements: 1, bytes: 4, read: f32_ },
    Format { id: 1, name: "F16", elements: 1, bytes: 2, read: f16_ },
    Format { id: 2, name: "Q4_0", elements: 32, bytes: 18, read: q4_0 },
    Format { id: 3, name: "Q4_1", elements: 32, bytes: 20, read: q4_1 },
    Format { id: 6, name: "Q5_0", elements: 32, bytes: 22, read: q5_0 },
    Format { id: 7, name: "Q5_1", elements: 32, bytes: 24, read: q5_1 },
    Format { id: 8, name: "Q8_0", elements: 32, bytes: 34, read: q8_0 },
    Format { id: 10, name: "Q2_K", elements: 256, bytes: 84, read: q2_k },
    Format { id: 11, name: "Q3_K", elements: 256, bytes: 110, read: q3_k },
    Format { id: 12, name: "Q4_K", elements: 256, bytes: 144, read: q4_k },
    Format { id: 13, name: "Q5_K", elements: 256, bytes: 176, read: q5_k },
    Format { id: 14, name: "Q6_K", elements: 256, bytes: 210, read: q6_k },
    Format { id: 20, name: "IQ4_NL", elements: 32, bytes: 18, read: iq4_nl },
    Format { id: 23, name: "IQ4_XS", elements: 256, bytes: 136, read: iq4_xs },
    Format { id: 30, name: "BF16", elements: 1, bytes: 2, read: bf16 },
    Format { id: 34, name: "TQ1_0", elements: 256, bytes: 54, read: tq1_0 },
    Format { id: 35, name: "TQ2_0", elements: 256, bytes: 66, read: tq2_0 },
    Format { id: 39, name: "MXFP4", elements: 32, bytes: 17, read: mxfp4 },
    Format { id: 41, name: "Q1_0", elements: 128, bytes: 18, read: q1_0 },
    Format { id: 42, name: "Q2_0", elements: 64, bytes: 18, read: q2_0 },
];

/// The format with a GGUF type id.
pub fn format(id: u32) -> &'static Format {
    FORMATS.iter().find(|format| format.id == id).unwrap_or_else(|| panic!("type id {id} is not known to the oracle"))
}

/// The format with a name such as `"Q4_0"`.
pub fn by_name(name: &str) -> &'static Format {
    FORMATS
        .iter()
        .find(|format| format.name == name)
        .unwrap_or_else(|| panic!("format {name} is not known to the oracle"))
}

/// The first `elements` values stored in `bytes`; `elements` is a multiple of the block's.
pub fn dequantise(format: &Format, bytes: &[u8], elements: usize) -> Vec<f32> {
    assert_eq!(elements % format.elements, 0);
    let mut out = vec![0.0; elements];
    for (block, values) in bytes.chunks(format.bytes).zip(out.chunks_mut(format.elements)) {
        (format.read)(block, values);
    }
    out
}

/// IEEE half precision to f32: 1 sign bit, 5 exponent bits with bias 15, 10 fraction bits.
pub fn f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 31);
    let fraction = f32::from(bits & 1023) / 1024.0;
    match exponent {
        0 => sign * fraction * 2f32.powi(-14),
        31 if fraction == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * (1.0 + fraction) * 2f32.powi(exponent - 15),
    }
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16(u16::from_le_bytes([block[at], block[at + 1]]))
}

fn f32_(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes(block.try_into().unwrap());
}

fn f16_(block: &[u8], out: &mut [f32]) {
    out[0] = f16_at(block, 0);
}

fn bf16(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_bits(u32::from(u16::from_le_bytes([block[0], block[1]])) << 16);
}

/// The 32 nibbles of 16 bytes: the low ones are elements 0..16, the high ones 16..32.
fn nibbles(qs: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for j in 0..16 {
        q[j] = qs[j] & 15;
        q[j + 16] = qs[j] >> 4;
    }
    q
}

/// `nibbles` with a fifth bit from the 32-bit word before them.
fn five_bits(qh: &[u8], qs: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes(qh.try_into().unwrap());
    let mut q = nibbles(qs);
    for (j, q) in q.iter_mut().enumerate() {
        *q |= ((high >> j & 1) as u8) << 4;
    }
    q
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (e, q) in out.iter_mut().zip(nibbles(&block[2..])) {
        *e = (f32::from(q) - 8.0) * d;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (e, q) in out.iter_mut().zip(nibbles(&block[4..])) {
        *e = f32::from(q) * d + m;
    }
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (e, q) in out.iter_mut().zip(five_bits(&block[2..6], &block[6..])) {
        *e = (f32::from(q) - 16.0) * d;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (e, q) in out.iter_mut().zip(five_bits(&block[4..8], &block[8..])) {
        *e = f32::from(q) * d + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (e, q) in out.iter_mut().zip(&block[2..]) {
        *e = f32::from(*q as i8) * d;
    }
}

/// Q2_K: sixteen groups of 16, each with a 4-bit scale and a 4-bit minimum; two bits an element.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for group in 0..16 {
        let (half, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        let dl = d * f32::from(scales[group] & 15);
        let ml = dmin * f32::from(scales[group] >> 4);
        for l in 0..16 {
            let q = qs[32 * half + 16 * side + l] >> shift & 3;
            out[16 * group + l] = dl * f32::from(q) - ml;
        }
    }
}

/// Q3_K: as Q2_K, with a third bit (stored inverted) in `hmask` and signed 6-bit scales.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (hmask, qs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = f16_at(block, 108);
    for group in 0..16 {
        let (half, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let dl = d * (f32::from(high << 4 | low) - 32.0);
        for l in 0..16 {
            let two = qs[32 * half + 16 * side + l] >> shift & 3;
            let bit = hmask[16 * side + l] >> (group / 2) & 1;
            let q = f32::from(two) - if bit == 1 { 0.0 } else { 4.0 };
            out[16 * group + l] = dl * q;
        }
    }
}

/// The eight 6-bit (scale, minimum) pairs that Q4_K and Q5_K keep in 12 bytes.
fn scales_and_minima(packed: &[u8]) -> [(u8, u8); 8] {
    let mut pairs = [(0, 0); 8];
    for j in 0..4 {
        pairs[j] = (packed[j] & 63, packed[j + 4] & 63);
        pairs[j + 4] = (packed[j + 8] & 15 | packed[j] >> 6 << 4, packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
    }
    pairs
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let qs = &block[16..144];
    for (group, (s, m)) in scales_and_minima(&block[4..16]).into_iter().enumerate() {
        let (dl, ml) = (d * f32::from(s), dmin * f32::from(m));
        for l in 0..32 {
            let q = qs[32 * (group / 2) + l] >> (4 * (group % 2)) & 15;
            out[32 * group + l] = dl * f32::from(q) - ml;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (qh, qs) = (&block[16..48], &block[48..176]);
    for (group, (s, m)) in scales_and_minima(&block[4..16]).into_iter().enumerate() {
        let (dl, ml) = (d * f32::from(s), dmin * f32::from(m));
        for l in 0..32 {
            let low = qs[32 * (group / 2) + l] >> (4 * (group % 2)) & 15;
            let high = qh[l] >> group & 1;
            out[32 * group + l] = dl * f32::from(high << 4 | low) - ml;
        }
    }
}

/// Q6_K: four low bits in `ql`, two high bits in `qh`, a signed 8-bit scale for each 16 elements.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16_at(block, 208);
    for (i, e) in out.iter_mut().enumerate() {
        let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
        let low = ql[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 15;
        let high = qh[32 * half + l] >> (2 * quarter) & 3;
        let scale = f32::from(scales[i / 16] as i8);
        *e = d * scale * (f32::from(high << 4 | low) - 32.0);
    }
}

const IQ4: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (e, q) in out.iter_mut().zip(nibbles(&block[2..])) {
        *e = d * IQ4[usize::from(q)];
    }
}

fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    let scales_h = u16::from_le_bytes([block[2], block[3]]);
    let (scales_l, qs) = (&block[4..8], &block[8..136]);
    for group in 0..8 {
        let low = scales_l[group / 2] >> (4 * (group % 2)) & 15;
        let high = (scales_h >> (2 * group) & 3) as u8;
        let dl = d * (f32::from(high << 4 | low) - 32.0);
        for (l, q) in nibbles(&qs[16 * group..16 * group + 16]).into_iter().enumerate() {
            out[32 * group + l] = dl * IQ4[usize::from(q)];
        }
    }
}

/// TQ1_0: five base-3 digits a byte (four in the last four bytes), read from the top by multiplying.
fn tq1_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 52);
    let mut out = out.iter_mut();
    for (bytes, digits) in [(&block[..32], 5), (&block[32..48], 5), (&block[48..52], 4)] {
        for n in 0..digits {
            for byte in bytes {
                let shifted = byte.wrapping_mul(3u8.pow(n));
                let digit = (u16::from(shifted) * 3) >> 8;
                *out.next().unwrap() = (f32::from(digit) - 1.0) * d;
            }
        }
    }
}

fn tq2_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 64);
    for (i, e) in out.iter_mut().enumerate() {
        let (half, shift, l) = (i / 128, i % 128 / 32 * 2, i % 32);
        let q = block[32 * half + l] >> shift & 3;
        *e = (f32::from(q) - 1.0) * d;
    }
}

/// MXFP4: a power-of-two scale and 4-bit floats (E2M1, here doubled so that the table is integer).
fn mxfp4(block: &[u8], out: &mut [f32]) {
    const MAGNITUDE: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
    let scale = 2f64.powi(i32::from(block[0]) - 128) as f32;
    for (e, q) in out.iter_mut().zip(nibbles(&block[1..])) {
        let magnitude = MAGNITUDE[usize::from(q & 7)];
        *e = if q < 8 { magnitude } else { -magnitude } * scale;
    }
}

fn q1_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (j, e) in out.iter_mut().enumerate() {
        let bit = block[2 + j / 8] >> (j % 8) & 1;
        *e = if bit == 1 { d } else { -d };
    }
}

fn q2_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (j, e) in out.iter_mut().enumerate() {
        let q = block[2 + j / 4] >> (2 * (j % 4)) & 3;
        *e = (f32::from(q) - 1.0) * d;
    }
}
