//! Any bytes as weights and any numbers as activations: every kernel this processor can run must give the scalar
//! kernel's bits.

use gemrun_simd::{ActsBuf, Format, Isa, KERNELS, Tile, ops, select};

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

    let mut buf = ActsBuf::default();
    let x = buf.quantize(ops(Isa::Scalar), &x, cols);
    let mut want = vec![0.0; tokens * rows];
    select(format, Isa::Scalar).matmul(&w, &x, &mut Tile::whole(&mut want, rows));
    for kernel in KERNELS.iter().filter(|kernel| kernel.format() == format && kernel.supported()) {
        let mut got = vec![0.0; tokens * rows];
        kernel.matmul(&w, &x, &mut Tile::whole(&mut got, rows));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            let (name, token, row) = (kernel.name(), i / rows, i % rows);
            assert!(same, "{name}, {rows} rows, {cols} columns, token {token} of {tokens}, row {row}: {got}, {want}");
        }
    }
}
