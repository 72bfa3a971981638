//! Weights as the forward pass sees them: something to multiply by ([`Weight`]) or to look rows up in ([`Table`]).
//!
//! These two are the only users of a kernel. A weight picks its kernel once, when the model is loaded, from its format
//! and the caller's [`Numerics`]; its bytes stay in the mapped file. Bits never depend on how rows are cut into tiles,
//! because a kernel computes every output from one row and one token alone.

use std::ops::Range;

use gemrun_simd::{Acts, ActsBuf, Choice, Format, Kernel, Layout, Ops, dequant, interleave, select_in};

use crate::gguf::Bytes;
use crate::team::{Lines, Team};

/// What the activations are turned into before a matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Act {
    /// What the file was made for: int8 per 32 values for block formats, f32 for float formats.
    #[default]
    Auto,
    /// The static int8 scales in the file.
    Static,
    /// int8 with a scale for each 32 values.
    Int8,
    /// f32, against weights unpacked to f32: the slow reference.
    Float,
}

/// The choices that may change a logit (`act`), or must not (`kernel`).
#[derive(Clone, Default)]
pub struct Numerics {
    /// How activations enter a matrix product.
    pub act: Act,
    /// Which kernels may run.
    pub kernel: Choice,
}

impl Numerics {
    /// The vector operations that go with the kernels.
    pub fn ops(&self) -> &'static Ops {
        gemrun_simd::ops(self.kernel.isa)
    }

    fn kernel(&self, format: Format) -> &'static dyn Kernel {
        match self.act {
            Act::Float => dequant(format, self.kernel.isa),
            Act::Auto | Act::Static | Act::Int8 => self.kernel.kernel(format),
        }
    }

    /// The kernel for `format` in interleaved order; `None` where only the file's own order will do: the format has no
    /// other, f32 activations are wanted, or a kernel for the file's order was asked for by name.
    pub fn interleaved(&self, format: Format) -> Option<&'static dyn Kernel> {
        match self.kernel.only {
            _ if self.act == Act::Float => None,
            Some(only) if only.format() == format => Some(only).filter(|only| only.layout() == Layout::Interleaved),
            _ => select_in(Layout::Interleaved, format, self.kernel.isa),
        }
    }
}

/// A (rows, cols) matrix to multiply by: the bytes of a mapped file, in the order its kernel reads.
#[derive(Clone)]
pub struct Weight {
    kernel: &'static dyn Kernel,
    bytes: Bytes,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    /// Whether the kernel reads activations as int8.
    quantized: bool,
}

impl Weight {
    /// A weight over `bytes`, which are exactly `rows` rows of `cols` values in `format`, in the order of GGUF files.
    pub fn new(format: Format, bytes: Bytes, rows: usize, cols: usize, numerics: &Numerics) -> Weight {
        let quantized = !format.is_float() && numerics.act != Act::Float;
        Weight::over(bytes, rows, cols, numerics.kernel(format), quantized)
    }

    /// A weight over `bytes` in interleaved order, for a kernel [`Numerics::interleaved`] chose; `rows` is a multiple of
    /// eight.
    pub fn interleaved(bytes: Bytes, rows: usize, cols: usize, kernel: &'static dyn Kernel) -> Weight {
        assert!(kernel.layout() == Layout::Interleaved && rows.is_multiple_of(interleave::ROWS), "{}", kernel.name());
        Weight::over(bytes, rows, cols, kernel, true)
    }

    fn over(bytes: Bytes, rows: usize, cols: usize, kernel: &'static dyn Kernel, quantized: bool) -> Weight {
        let format = kernel.format();
        let row_bytes = format.row_bytes(cols).expect("shapes are checked at load");
        assert_eq!(bytes.len(), rows * row_bytes, "{rows} x {cols} {}", format.name());
        Weight { kernel, bytes, rows, cols, row_bytes, quantized }
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The kernel this weight runs on.
    pub fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    /// Bytes a product reads.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// What a product reads, where it lies.
    pub fn stored(&self) -> &Bytes {
        &self.bytes
    }

    /// Some of the rows, as a weight of its own over the same bytes.
    ///
    /// # Panics
    /// If the range cuts rows that are interleaved.
    pub fn slice(&self, rows: Range<usize>) -> Weight {
        let unit = if self.kernel.layout() == Layout::Interleaved { interleave::ROWS } else { 1 };
        assert!(rows.start.is_multiple_of(unit) && rows.end.is_multiple_of(unit), "{rows:?} of interleaved rows");
        let bytes = self.bytes.slice(rows.start * self.row_bytes..rows.end * self.row_bytes);
        Weight { bytes, rows: rows.len(), ..self.clone() }
    }
}

/// Values that are quantized together.
const GROUP: usize = 32;
/// Groups that are worth another thread.
const SOME: usize = 64;

/// The activations `x` — (tokens, cols) — as `weights` read them: quantized once if any of them wants int8.
pub fn acts<'a>(ops: &Ops, team: &Team, buf: &'a mut ActsBuf, x: &'a [f32], weights: &[&Weight]) -> Acts<'a> {
    let cols = weights[0].cols;
    debug_assert!(weights.iter().all(|w| w.cols == cols));
    if !weights.iter().any(|w| w.quantized) {
        return Acts::float(x, cols);
    }
    // Groups know nothing of rows, so a single long row can be shared out as well.
    team.share(x.len() / GROUP, SOME, buf.rows(x.len(), GROUP), |groups, out| {
        out.quantize(ops, &x[groups.start * GROUP..groups.end * GROUP]);
    });
    buf.acts(x, cols)
}

/// [`acts`] of `gelu(gate) * up`, which replaces `gate`: who computes a value rounds it.
pub fn gelu_acts<'a>(
    ops: &Ops,
    team: &Team,
    buf: &'a mut ActsBuf,
    gate: &'a mut [f32],
    up: &[f32],
    weight: &Weight,
) -> Acts<'a> {
    if !weight.quantized {
        team.share(gate.len() / weight.cols, 1, Lines(gate, weight.cols), |rows, Lines(gate, _)| {
            ops.gelu_mul(gate, &up[rows.start * weight.cols..rows.end * weight.cols]);
        });
        return Acts::float(gate, weight.cols);
    }
    let pieces = (Lines(gate, GROUP), buf.rows(up.len(), GROUP));
    team.share(up.len() / GROUP, SOME, pieces, |groups, (Lines(gate, _), out)| {
        ops.gelu_mul(gate, &up[groups.start * GROUP..groups.end * GROUP]);
        out.quantize(ops, gate);
    });
    buf.acts(gate, weight.cols)
}

/// Rows of a tile: enough that claiming one costs nothing beside computing it, few enough that slow cores do not
/// hold up the rest. A multiple of every kernel's row group.
fn tile_rows(rows: usize, threads: usize) -> usize {
    (rows / (8 * threads)).clamp(16, 512).next_multiple_of(16)
}

/// A matrix product: out = activations · weightᵀ, (tokens, rows).
pub type Product<'a> = (Acts<'a>, &'a Weight, &'a mut [f32]);

/// Computes `products` as one region of the team.
pub fn multiply<const N: usize>(team: &Team, products: [Product; N]) {
    let inputs = products.each_ref().map(|(x, weight, _)| (*x, *weight));
    let outs = products.map(|(x, weight, out)| {
        assert!(weight.cols == x.cols && out.len() == x.tokens * weight.rows, "shape");
        (out, weight.rows, tile_rows(weight.rows, team.threads()))
    });
    team.tiles(outs, |which, rows, mut tile| {
        let (x, weight) = &inputs[which];
        let bytes = &weight.bytes[rows.start * weight.row_bytes..rows.end * weight.row_bytes];
        weight.kernel.matmul(bytes.into(), x, &mut tile);
    });
}

/// A (rows, cols) matrix to look rows up in: embeddings.
#[derive(Clone)]
pub struct Table {
    format: Format,
    bytes: Bytes,
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

impl Table {
    /// A table over `bytes`, which are exactly `rows` rows of `cols` values in `format`.
    pub fn new(format: Format, bytes: Bytes, rows: usize, cols: usize) -> Table {
        let row_bytes = format.row_bytes(cols).expect("shapes are checked at load");
        assert_eq!(bytes.len(), rows * row_bytes, "{rows} x {cols} {}", format.name());
        Table { format, bytes, rows, cols, row_bytes }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row length.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the whole table.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Tells the system that rows are looked up in no order.
    pub fn advise_random(&self) {
        self.bytes.advise_random();
    }

    /// Takes rows that were looked up out of this process's memory.
    pub fn let_go(&self) {
        self.bytes.let_go();
    }

    /// Starts reading some rows that will be looked up soon.
    pub fn read_ahead(&self, rows: &[u32]) {
        for row in rows.iter().map(|&row| row as usize).filter(|&row| row < self.rows) {
            self.bytes.slice(row * self.row_bytes..(row + 1) * self.row_bytes).willneed();
        }
    }

    /// Unpacks row `row` into `out`, exactly.
    pub fn look_up(&self, row: usize, out: &mut [f32]) {
        self.format.unpack_row(&self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes], out);
    }
}
