//! The reference kernels: plain loops, one for block formats, one for float formats, one that unpacks.
//!
//! The one idea: the order of operations written down here is the contract. For each (row, token) the
//! groups are taken in order; the sum of a group is an exact integer; one f32 accumulator takes
//! `fma(sum, d·da, acc)` and, for formats with minima, `fma(minima, −(dmin·da), acc)`. Every other
//! kernel must give these bits. No SIMD here, and nothing clever; `avx2.rs` compiles the same source
//! again for formats it has no hand-written kernel for.

#![forbid(unsafe_code)]

use std::marker::PhantomData;

use crate::format::{Block, Group};
use crate::vec::{Ops, ops};
use crate::{Acts, Format, Isa, Kernel, Layout, Tile};

/// Checks what every kernel relies on, and returns the bytes of a row of weights.
///
/// # Panics
/// If the weights, the activations and the tile do not fit together.
#[inline]
pub(crate) fn check(format: Format, w: &[u8], x: &Acts, out: &Tile) -> usize {
    let (name, cols) = (format.name(), x.cols);
    let row_bytes = format.row_bytes(cols).unwrap_or_else(|| panic!("{name}: rows of {cols}: not whole blocks"));
    assert!(out.tokens() == x.tokens || out.rows() == 0, "{name}: {} tokens in, {} out", x.tokens, out.tokens());
    assert!(Some(w.len()) == out.rows().checked_mul(row_bytes), "{name}: {} bytes for {} rows", w.len(), out.rows());
    assert!(Some(x.x.len()) == x.tokens.checked_mul(cols), "{name}: {} activations", x.x.len());
    if !format.is_float() {
        assert!(x.is_quantized(), "{name}: activations are not quantised");
        assert!(x.scale.len() == x.q.len() / 32 && x.sums.len() == x.q.len() / 16, "{name}: scales or sums missing");
    }
    row_bytes
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

/// The matmul of every block format. Inlined into one instance per format and ISA.
#[inline(always)]
pub(crate) fn matmul_groups<B: Block>(w: &[u8], x: &Acts, out: &mut Tile) {
    let row_bytes = check(B::FORMAT, w, x, out);
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

/// The scalar kernel of a block format.
pub(crate) struct Groups<B>(pub &'static str, pub PhantomData<B>);

impl<B: Block> Kernel for Groups<B> {
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
        Layout::Gguf
    }
    fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
        matmul_groups::<B>(w, x, out);
    }
}

/// The kernel of a float format on an ISA: the dot products of `vec.rs`, row by row.
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
    fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
        let row_bytes = check(self.format, w, x, out);
        let ops = ops(self.isa);
        for t in 0..out.tokens() {
            let x = &x.x[t * x.cols..][..x.cols];
            for (out, row) in out.row(t).iter_mut().zip(w.chunks_exact(row_bytes)) {
                *out = (self.dot)(ops, row, x);
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
    fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
        // Not quantised, so `check` cannot be asked about a block format.
        let row_bytes = self.format.row_bytes(x.cols).expect("rows of whole blocks");
        assert!(w.len() == out.rows() * row_bytes && x.x.len() == x.tokens * x.cols, "{}", self.name);
        assert!(out.tokens() == x.tokens || out.rows() == 0, "{}", self.name);
        let ops = ops(self.isa);
        let mut unpacked = vec![0.0; x.cols];
        for (r, row) in w.chunks_exact(row_bytes).enumerate() {
            self.format.unpack_row(row, &mut unpacked);
            for t in 0..x.tokens {
                out.row(t)[r] = ops.dot(&unpacked, &x.x[t * x.cols..][..x.cols]);
            }
        }
    }
}
