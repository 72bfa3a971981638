//! The reference kernels: plain loops, one for block formats, one for float formats, one that unpacks.
//!
//! The one idea: the order of operations written down here is the contract. For each (row, token) the
//! groups are taken in order; the sum of a group is an exact integer; one f32 accumulator takes
//! `fma(sum, d·da, acc)` and, for formats with minima, `fma(minima, −(dmin·da), acc)`. With one scale a row, the whole
//! row is one integer. Every other kernel must give these bits. No SIMD here, and nothing clever: interleaved rows are put back
//! into the order of GGUF files first.

#![forbid(unsafe_code)]

use std::marker::PhantomData;

use crate::format::{Block, Group};
use crate::vec::{Ops, ops};
use crate::{Acts, Format, Isa, Kernel, Layout, Rows, Tile, interleave};

/// From this many tokens on, float kernels widen a row first.
const MANY: usize = 4;

/// Checks what every kernel relies on, and returns the bytes of a row of weights.
///
/// # Panics
/// If the weights, the activations and the tile do not fit together.
#[inline]
pub(crate) fn check(format: Format, layout: Layout, w: &Rows, x: &Acts, out: &Tile) -> usize {
    let (name, cols, rows) = (format.name(), x.cols, out.rows());
    let row_bytes = format.row_bytes(cols).unwrap_or_else(|| panic!("{name}: rows of {cols}: not whole blocks"));
    assert!(out.tokens() == x.tokens || rows == 0, "{name}: {} tokens in, {} out", x.tokens, out.tokens());
    assert!(Some(w.bytes.len()) == rows.checked_mul(row_bytes), "{name}: {} bytes for {rows} rows", w.bytes.len());
    if layout == Layout::Interleaved {
        assert!(rows.is_multiple_of(interleave::ROWS), "{name}: {rows} rows: expected a multiple of eight");
    }
    if format.is_float() {
        assert!(Some(x.x.len()) == x.tokens.checked_mul(cols), "{name}: {} activations", x.x.len());
    } else {
        assert!(x.is_quantized(), "{name}: activations are not quantised");
        let scales = if format.is_channel() { x.tokens } else { x.q.len() / 32 };
        assert!(x.scale.len() == scales && x.sums.len() == x.q.len() / 16, "{name}: scales or sums missing");
    }
    let row_scales = if format.is_channel() { rows } else { 0 };
    assert!(w.scale.len() == row_scales, "{name}: {} scales for {rows} rows", w.scale.len());
    row_bytes
}

/// Calls `run` with the rows of `w` in the order of GGUF files.
fn in_gguf_order(format: Format, layout: Layout, w: &[u8], row_bytes: usize, run: impl FnOnce(&[u8])) {
    match layout {
        Layout::Gguf => run(w),
        Layout::Interleaved => {
            let mut rows = vec![0; w.len()];
            let eight = interleave::ROWS * row_bytes;
            for (w, rows) in w.chunks_exact(eight).zip(rows.chunks_exact_mut(eight)) {
                format.deinterleave(w, rows);
            }
            run(&rows);
        }
    }
}

/// One step of the canonical order: adds a group's product with 32 activations to `acc`.
#[inline(always)]
pub(crate) fn step<const MINIMA: bool>(w: &Group, a: &[i8; 32], da: f32, sums: &[i16; 2], acc: f32) -> f32 {
    let mut isum = 0;
    for h in 0..2 {
        let pairs = w.q[16 * h..16 * h + 16].iter().zip(&a[16 * h..16 * h + 16]);
        isum += w.s[h] * pairs.map(|(q, a)| *q as i32 * *a as i32).sum::<i32>();
    }
    let acc = (isum as f32).mul_add(w.d * da, acc);
    if !MINIMA {
        return acc;
    }
    let msum = w.m[0] * sums[0] as i32 + w.m[1] * sums[1] as i32;
    (msum as f32).mul_add(-(w.dmin * da), acc)
}

/// The matmul of every block format.
fn matmul_groups<B: Block>(w: &[u8], row_bytes: usize, x: &Acts, out: &mut Tile) {
    let (groups, a) = (x.cols / 32, x.q.as_chunks::<32>().0);
    let sums = x.sums.as_chunks::<2>().0;
    for t in 0..out.tokens() {
        let range = t * groups..(t + 1) * groups;
        let acts = || a[range.clone()].iter().zip(&x.scale[range.clone()]).zip(&sums[range.clone()]);
        for (out, row) in out.row(t).iter_mut().zip(w.chunks_exact(row_bytes)) {
            let mut acts = acts();
            let mut acc = 0.0;
            for block in row.chunks_exact(B::FORMAT.block_bytes()) {
                for (g, ((a, da), sums)) in acts.by_ref().take(B::FORMAT.block_elems() / 32).enumerate() {
                    let w = B::group(block, g);
                    acc = if B::MINIMA {
                        step::<true>(&w, a, *da, sums, acc)
                    } else {
                        step::<false>(&w, a, *da, sums, acc)
                    };
                }
            }
            *out = acc;
        }
    }
}

/// The matmul of every channel-wise format: the exact integer sum over the whole row, rounded to f32 once, times the
/// product of the row's and the token's scale.
fn matmul_channels<B: Block>(w: &[u8], scale: &[f32], row_bytes: usize, x: &Acts, out: &mut Tile) {
    for t in 0..out.tokens() {
        let a = x.q[t * x.cols..(t + 1) * x.cols].as_chunks::<32>().0;
        for ((out, row), scale) in out.row(t).iter_mut().zip(w.chunks_exact(row_bytes)).zip(scale) {
            let mut isum = 0;
            let groups = B::FORMAT.block_elems() / 32;
            for (block, a) in row.chunks_exact(B::FORMAT.block_bytes()).zip(a.chunks_exact(groups)) {
                for (g, a) in a.iter().enumerate() {
                    isum += B::weights(block, g).iter().zip(a).map(|(q, a)| *q as i32 * *a as i32).sum::<i32>();
                }
            }
            *out = isum as f32 * (scale * x.scale[t]);
        }
    }
}

/// The scalar kernel of a block format, for one order of bytes. `S` is nothing: there are no vectors.
pub(crate) struct Groups<S, B>(pub &'static str, pub Layout, pub PhantomData<fn() -> (S, B)>);

impl<S, B: Block> Kernel for Groups<S, B> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn format(&self) -> Format {
        B::FORMAT
    }
    fn isa(&self) -> Isa {
        Isa::Scalar
    }
    fn layout(&self) -> Layout {
        self.1
    }
    fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
        let row_bytes = check(B::FORMAT, self.1, &w, x, out);
        in_gguf_order(B::FORMAT, self.1, w.bytes, row_bytes, |bytes| {
            if B::FORMAT.is_channel() {
                matmul_channels::<B>(bytes, w.scale, row_bytes, x, out);
            } else {
                matmul_groups::<B>(bytes, row_bytes, x, out);
            }
        });
    }
}

/// The kernel of a float format on an ISA: the dot products of `vec.rs`, row by row. With many tokens, a row is widened
/// to f32 once and two tokens share its loads; the sums are the same.
pub(crate) struct Floats {
    pub name: &'static str,
    pub format: Format,
    pub isa: Isa,
    pub dot: fn(&Ops, &[u8], &[f32]) -> f32,
}

impl Kernel for Floats {
    fn name(&self) -> &'static str {
        self.name
    }
    fn format(&self) -> Format {
        self.format
    }
    fn isa(&self) -> Isa {
        self.isa
    }
    fn layout(&self) -> Layout {
        Layout::Gguf
    }
    fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
        let (w, row_bytes) = (w.bytes, check(self.format, Layout::Gguf, &w, x, out));
        let ops = ops(self.isa);
        let token = |t: usize| &x.x[t * x.cols..][..x.cols];
        if x.tokens < MANY {
            for t in 0..out.tokens() {
                for (out, row) in out.row(t).iter_mut().zip(w.chunks_exact(row_bytes)) {
                    *out = (self.dot)(ops, row, token(t));
                }
            }
            return;
        }
        let mut wide = vec![0.0; x.cols];
        for (r, row) in w.chunks_exact(row_bytes).enumerate() {
            match self.format {
                Format::F16 => ops.widen_f16_bytes(&mut wide, row),
                _ => self.format.unpack_row(row, &mut wide),
            }
            for t in (0..x.tokens - 1).step_by(2) {
                let [first, second] = ops.dot_pair(&wide, token(t), token(t + 1));
                (out.row(t)[r], out.row(t + 1)[r]) = (first, second);
            }
            if x.tokens % 2 == 1 {
                out.row(x.tokens - 1)[r] = ops.dot(&wide, token(x.tokens - 1));
            }
        }
    }
}

/// The kernel that unpacks each row of a block format to f32 and multiplies f32 activations: slow, and
/// free of the rounding of int8 activations.
pub(crate) struct Unpacked {
    pub name: &'static str,
    pub format: Format,
    pub isa: Isa,
}

impl Kernel for Unpacked {
    fn name(&self) -> &'static str {
        self.name
    }
    fn format(&self) -> Format {
        self.format
    }
    fn isa(&self) -> Isa {
        self.isa
    }
    fn layout(&self) -> Layout {
        Layout::Gguf
    }
    fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
        let Rows { bytes: w, scale } = w;
        // Not quantised, so `check` cannot be asked about a block format.
        let row_bytes = self.format.row_bytes(x.cols).expect("rows of whole blocks");
        assert!(w.len() == out.rows() * row_bytes && x.x.len() == x.tokens * x.cols, "{}", self.name);
        assert!(out.tokens() == x.tokens || out.rows() == 0, "{}", self.name);
        assert!(scale.len() == if self.format.is_channel() { out.rows() } else { 0 }, "{}", self.name);
        let ops = ops(self.isa);
        let mut unpacked = vec![0.0; x.cols];
        for (r, row) in w.chunks_exact(row_bytes).enumerate() {
            self.format.unpack_row(row, &mut unpacked);
            for t in 0..x.tokens {
                let dot = ops.dot(&unpacked, &x.x[t * x.cols..][..x.cols]);
                out.row(t)[r] = scale.get(r).map_or(dot, |scale| dot * scale);
            }
        }
    }
}
