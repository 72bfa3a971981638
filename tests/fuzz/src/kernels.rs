//! Any bytes as weights and any numbers as activations: every kernel this processor can run must give the scalar
//! kernel's bits.

use gemrun_simd::selftest::same;
use gemrun_simd::{ActsBuf, Format, Isa, KERNELS, Layout, Rows, Tile, ops, select};

use super::common::damage::{Bytes, Draw};

/// Shapes stay small, so that a run takes microseconds: up to 17 rows, 9 tokens and 9 blocks.
pub fn run(data: &[u8]) {
    let choices = &mut Bytes(data);
    let format = Format::ALL[choices.below(Format::ALL.len())];
    let block = format.block_elems().max(32);
    let (rows, tokens, cols) = (1 + choices.below(17), 1 + choices.below(9), block * (1 + choices.below(9)));
    let any_bits = choices.below(2) == 1;
    let acts = choices.string();
    let acts = if acts.is_empty() { &[1] } else { acts };
    // Whole bit patterns reach infinities, NaN and subnormals; bytes as numbers reach both ends of every group.
    let x: Vec<f32> = match acts.as_chunks::<4>().0 {
        words if any_bits && !words.is_empty() => {
            words.iter().cycle().take(tokens * cols).map(|word| f32::from_le_bytes(*word)).collect()
        }
        _ => acts.iter().cycle().take(tokens * cols).map(|&byte| f32::from(byte as i8) / 127.0).collect(),
    };
    let weights = if choices.0.is_empty() { &[0x80] } else { choices.0 };
    let row_bytes = format.row_bytes(cols).expect("whole blocks");
    let w: Vec<u8> = weights.iter().copied().cycle().take(rows * row_bytes).collect();

    let scale: Vec<f32> = if format.is_channel() { (0..rows).map(|r| 0.01 + r as f32).collect() } else { vec![] };

    let mut buf = ActsBuf::default();
    let ops = ops(Isa::Scalar);
    let x = match format.is_channel() {
        true => buf.quantize_static(ops, &x, cols, 1.0 / 127.0),
        false => buf.quantize(ops, &x, cols),
    };
    let mut want = vec![0.0; tokens * rows];
    let scalar = select(format, Isa::Scalar);
    scalar.matmul(Rows { bytes: &w, scale: &scale }, &x, &mut Tile::whole(&mut want, rows));
    for kernel in KERNELS.iter().filter(|kernel| kernel.format() == format && kernel.supported()) {
        // Interleaved rows come in eights.
        let (w, n) = match kernel.layout() {
            Layout::Gguf => (w.clone(), rows),
            Layout::Interleaved => (interleaved(format, &w, row_bytes), rows / 8 * 8),
        };
        let w = Rows { bytes: &w, scale: &scale[..n.min(scale.len())] };
        let mut got = vec![0.0; tokens * n];
        kernel.matmul(w, &x, &mut Tile::whole(&mut got, n));
        for (i, got) in got.iter().enumerate() {
            let (token, row) = (i / n, i % n);
            let (name, want) = (kernel.name(), want[token * rows + row]);
            assert!(same(*got, want), "{name}, {n} x {cols}, token {token} of {tokens}, row {row}: {got}, {want}");
        }
    }
}

/// As many of the rows as come in eights, in interleaved order.
fn interleaved(format: Format, w: &[u8], row_bytes: usize) -> Vec<u8> {
    let mut out = vec![0; w.len() / (8 * row_bytes) * 8 * row_bytes];
    for (rows, out) in w.chunks_exact(8 * row_bytes).zip(out.chunks_exact_mut(8 * row_bytes)) {
        format.interleave(rows, out);
    }
    out
}
