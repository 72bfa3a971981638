//! Weights as the forward pass sees them: something to multiply by ([`Weight`]) or to look rows up in ([`Table`]).
//!
//! These two are the only users of a kernel. A weight picks its kernel once, when the model is loaded, from its format
//! and the caller's [`Numerics`]; its bytes stay in the mapped file. Bits never depend on how rows are cut into tiles,
//! because a kernel computes every output from one row and one token alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use gemrun_simd::{
    Acts, ActsBuf, ActsMut, Choice, DIGITS, Format, Kernel, Layout, Ops, Rows, Tile, dequant, interleave, select_in,
};

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
    /// Static scales of inputs for a file that has none, by tensor name without `.weight`.
    pub input_scales: Arc<BTreeMap<String, f32>>,
}

impl Numerics {
    /// The vector operations that go with the kernels.
    pub fn ops(&self) -> &'static Ops {
        gemrun_simd::ops(self.kernel.isa)
    }

    /// The kernel for `format` in interleaved order; `None` where only the file's own order will do: the format has no
    /// other, or a kernel for the file's order was asked for by name.
    fn interleaved(&self, format: Format) -> Option<&'static dyn Kernel> {
        match self.kernel.only {
            Some(only) if only.format() == format => Some(only).filter(|only| only.layout() == Layout::Interleaved),
            _ => select_in(Layout::Interleaved, format, self.kernel.isa),
        }
    }
}

/// The static scales of a matrix's activations, as a file gives them; 0 leaves a side as it is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StaticScales {
    /// What a unit of the rounded input is worth.
    pub input: f32,
    /// What a unit of the rounded output is worth.
    pub output: f32,
}

/// How a weight reads its activations.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    /// As f32.
    Float,
    /// int8, a scale for each 32 values.
    Groups,
    /// int8, a scale for each token.
    Tokens,
    /// int8 with this scale, for block formats.
    Static(f32),
    /// int8 with this scale, for channel-wise formats.
    StaticTokens(f32),
    /// 24 bits as three int8, for channel-wise formats whose input the file wants unrounded: as fine as f32, in exact integers.
    Digits,
}

impl Input {
    /// What `numerics` asks of a matrix in `format`, for which the file may give static scales.
    fn new(format: Format, scales: Option<StaticScales>, numerics: &Numerics) -> Input {
        let per_token = format.is_channel();
        match (numerics.act, scales) {
            _ if format.is_float() => Input::Float,
            (Act::Float, _) => Input::Float,
            (Act::Auto | Act::Static, Some(StaticScales { input, .. })) => match input {
                0.0 if per_token => Input::Digits,
                0.0 => Input::Float,
                _ if per_token => Input::StaticTokens(input),
                _ => Input::Static(input),
            },
            _ if per_token => Input::Tokens,
            _ => Input::Groups,
        }
    }
}

/// Where a matrix lies and what it is.
pub struct Stored {
    /// Its number format.
    pub format: Format,
    /// Exactly `rows` rows of `cols` values, in the order of GGUF files.
    pub bytes: Bytes,
    /// The same in interleaved order, if there is a packed copy.
    pub packed: Option<Bytes>,
    /// Output width.
    pub rows: usize,
    /// Input width.
    pub cols: usize,
    /// The scale of each row, for channel-wise formats; empty for others.
    pub row_scale: Vec<f32>,
    /// Static scales of the activations.
    pub scales: Option<StaticScales>,
}

/// A (rows, cols) matrix to multiply by: the bytes of a mapped file, in the order its kernel reads.
#[derive(Clone)]
pub struct Weight {
    kernel: &'static dyn Kernel,
    bytes: Bytes,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    input: Input,
    /// What a unit of the rounded output is worth; 0 if it is not rounded.
    output_scale: f32,
    /// Scales of the rows of the matrix that this one is cut from, and the first of its own.
    row_scale: Arc<[f32]>,
    first_row: usize,
    /// Remembers how large inputs were, if asked to.
    seen: Option<Arc<Seen>>,
}

impl Weight {
    /// A weight over `stored`, with the kernel that `numerics` leads to.
    pub fn new(stored: Stored, numerics: &Numerics) -> Weight {
        let Stored { format, bytes, packed, rows, cols, row_scale, scales } = stored;
        let input = Input::new(format, scales, numerics);
        let (kernel, bytes) = match (input, packed, numerics.interleaved(format)) {
            (Input::Float, ..) => (dequant(format, numerics.kernel.isa), bytes),
            (_, Some(packed), Some(kernel)) => (kernel, packed),
            _ => (numerics.kernel.kernel(format), bytes),
        };
        let row_bytes = format.row_bytes(cols).expect("shapes are checked at load");
        assert_eq!(bytes.len(), rows * row_bytes, "{rows} x {cols} {}", format.name());
        assert_eq!(row_scale.len(), if format.is_channel() { rows } else { 0 }, "{rows} x {cols} {}", format.name());
        let rounded = matches!(numerics.act, Act::Auto | Act::Static);
        let output_scale = scales.filter(|_| rounded).map_or(0.0, |scales| scales.output);
        Weight {
            kernel,
            bytes,
            rows,
            cols,
            row_bytes,
            input,
            output_scale,
            row_scale: row_scale.into(),
            first_row: 0,
            seen: None,
        }
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
        self.bytes.len() + if self.row_scale.is_empty() { 0 } else { 4 * self.rows }
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
        Weight { bytes, first_row: self.first_row + rows.start, rows: rows.len(), ..self.clone() }
    }

    /// From now on remembers how large its inputs are.
    pub fn observe(&mut self) -> Arc<Seen> {
        self.seen.get_or_insert_default().clone()
    }

    fn see(&self, x: &[f32]) {
        if let Some(seen) = &self.seen {
            seen.add(x);
        }
    }

    /// Those activations, of all that [`acts`] made for this weight, that belong to some of the tokens.
    pub fn part<'a>(&self, x: &Acts<'a>, tokens: Range<usize>) -> Acts<'a> {
        let rows = self.input.rows_of_a_token();
        x.part(rows * tokens.start..rows * tokens.end)
    }

    /// Bytes and scales of some of the rows, as the kernel takes them.
    fn rows_of(&self, rows: Range<usize>) -> Rows<'_> {
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        let scale = match self.row_scale.is_empty() {
            true => &[],
            false => &self.row_scale[self.first_row + rows.start..self.first_row + rows.end],
        };
        Rows { bytes, scale }
    }
}

/// How large the inputs of a weight were: magnitudes, counted by their leading bits.
#[derive(Default)]
pub struct Seen(Mutex<Magnitudes>);

#[derive(Default)]
struct Magnitudes {
    /// By the exponent and the five bits below it; empty before the first value.
    counts: Vec<u64>,
    largest: f32,
}

impl Seen {
    /// Bits of an f32 that do not matter.
    const SHIFT: u32 = 18;

    fn add(&self, x: &[f32]) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.counts.resize(1 << (31 - Seen::SHIFT), 0);
        for x in x {
            let magnitude = x.abs();
            seen.counts[(magnitude.to_bits() >> Seen::SHIFT) as usize] += 1;
            seen.largest = seen.largest.max(magnitude);
        }
    }

    /// A magnitude that at least `share` of the values do not exceed: 1 for all of them. 0 if there was none.
    pub fn quantile(&self, share: f64) -> f32 {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: u64 = seen.counts.iter().sum();
        let mut left = (all as f64 * share).ceil() as u64;
        for (bin, &count) in seen.counts.iter().enumerate() {
            left = left.saturating_sub(count);
            if left == 0 {
                let end = f32::from_bits((bin as u32 + 1) << Seen::SHIFT);
                return end.min(seen.largest);
            }
        }
        seen.largest
    }
}

/// Values that are quantized together.
const GROUP: usize = 32;
/// Groups that are worth another thread.
const SOME: usize = 64;

/// Room for the activations of a product of up to three weights that read the same values, maybe in different ways.
pub type ActsBufs = [ActsBuf; 3];

/// The activations `x` — (tokens, cols) — as each of `weights` reads them; quantized once for those that read them alike.
pub fn acts<'a, const N: usize>(
    ops: &Ops,
    team: &Team,
    bufs: &'a mut ActsBufs,
    x: &'a [f32],
    weights: [&Weight; N],
) -> [Acts<'a>; N] {
    weights.iter().for_each(|weight| weight.see(x));
    let first_alike = |i: usize| weights.iter().position(|w| w.input == weights[i].input).unwrap_or(i);
    for i in (0..N).filter(|&i| first_alike(i) == i) {
        quantize(ops, team, &mut bufs[i], x, weights[i]);
    }
    let bufs = &*bufs;
    std::array::from_fn(|i| view(&bufs[first_alike(i)], x, weights[i]))
}

/// [`acts`] of `gelu(gate) * up`, which replaces `gate`: who computes a value rounds it.
pub fn gelu_acts<'a>(
    ops: &Ops,
    team: &Team,
    bufs: &'a mut ActsBufs,
    gate: &'a mut [f32],
    up: &[f32],
    weight: &Weight,
) -> Acts<'a> {
    let buf = &mut bufs[0];
    if let Input::Float | Input::Tokens | Input::Digits = weight.input {
        team.share(gate.len() / weight.cols, 1, Lines(gate, weight.cols), |rows, Lines(gate, _)| {
            ops.gelu_mul(gate, &up[rows.start * weight.cols..rows.end * weight.cols]);
        });
        weight.see(gate);
        quantize(ops, team, buf, gate, weight);
        return view(buf, gate, weight);
    }
    let pieces = (Lines(gate, GROUP), buf.rows(up.len(), GROUP));
    team.share(up.len() / GROUP, SOME, pieces, |groups, (Lines(gate, _), out)| {
        ops.gelu_mul(gate, &up[groups.start * GROUP..groups.end * GROUP]);
        weight.input.round(ops, gate, out);
    });
    weight.see(gate);
    weight.input.merge(buf, gate.len(), weight.cols);
    view(buf, gate, weight)
}

/// Fills `buf` with `x` as `weight` reads it.
fn quantize(ops: &Ops, team: &Team, buf: &mut ActsBuf, x: &[f32], weight: &Weight) {
    // What is rounded together: groups know nothing of rows, so that a single long row can be shared out as well.
    let (unit, some) = match weight.input {
        Input::Float => return,
        Input::Digits => {
            buf.quantize_digits(x, weight.cols);
            return;
        }
        Input::Tokens => (weight.cols, 1),
        Input::Groups | Input::Static(_) | Input::StaticTokens(_) => (GROUP, SOME),
    };
    team.share(x.len() / unit, some, buf.rows(x.len(), unit), |units, out| {
        weight.input.round(ops, &x[units.start * unit..units.end * unit], out);
    });
    weight.input.merge(buf, x.len(), weight.cols);
}

/// What [`quantize`] made of `x`.
fn view<'a>(buf: &'a ActsBuf, x: &'a [f32], weight: &Weight) -> Acts<'a> {
    match weight.input {
        Input::Float => Acts::float(x, weight.cols),
        Input::Digits => buf.acts_digits(x.len(), weight.cols),
        Input::Groups | Input::Static(_) => buf.acts(x, weight.cols),
        Input::Tokens | Input::StaticTokens(_) => buf.acts_per_token(x, weight.cols),
    }
}

impl Input {
    fn rows_of_a_token(self) -> usize {
        if self == Input::Digits { DIGITS } else { 1 }
    }

    fn round(self, ops: &Ops, x: &[f32], out: ActsMut) {
        match self {
            Input::Float | Input::Digits => {}
            Input::Groups => out.quantize(ops, x),
            Input::Tokens => out.quantize_rows(ops, x),
            Input::Static(scale) | Input::StaticTokens(scale) => out.quantize_static(ops, x, scale),
        }
    }

    fn merge(self, buf: &mut ActsBuf, elems: usize, cols: usize) {
        if let Input::Tokens | Input::StaticTokens(_) = self {
            buf.merge_scales(elems, cols);
        }
    }
}

/// Rows that stay together: a multiple of every kernel's row group.
const TOGETHER: usize = 16;

/// The bytes of weights that are read while a thread waits for the first of them some ten times.
const LEAST_BYTES: usize = 128 << 10;

/// A matrix product: out = activations · weightᵀ, (tokens, rows).
pub type Product<'a> = (Acts<'a>, &'a Weight, &'a mut [f32]);

/// Computes `products` as one region of the team; who computes an output rounds it, where the file gives a scale for that.
pub fn multiply<const N: usize>(ops: &Ops, team: &Team, products: [Product; N]) {
    let inputs = products.each_ref().map(|(x, weight, _)| (*x, *weight));
    let outs = products.map(|(x, weight, out)| {
        assert!(weight.cols == x.cols && out.len() == x.tokens / weight.input.rows_of_a_token() * weight.rows, "shape");
        (out, weight.rows)
    });
    let least = inputs.iter().map(|(x, weight)| least(weight, x.tokens)).max().unwrap_or(1);
    team.tiles(outs, TOGETHER, least, |which, rows, mut tile| {
        let (x, weight) = &inputs[which];
        match weight.input {
            Input::Digits => multiply_digits(weight, rows, x, &mut tile),
            _ => weight.kernel.matmul(weight.rows_of(rows), x, &mut tile),
        }
        if weight.output_scale > 0.0 {
            (0..tile.tokens()).for_each(|t| ops.round_static(tile.row(t), weight.output_scale));
        }
    });
}

/// The fewest units of [`TOGETHER`] rows for a tile of a product with so many tokens.
fn least(weight: &Weight, tokens: usize) -> usize {
    LEAST_BYTES / (TOGETHER * weight.row_bytes * tokens.max(1)).max(1)
}

/// The product with tokens of which each is given as the rows of its digits, the one that is worth most first.
fn multiply_digits(weight: &Weight, rows: Range<usize>, x: &Acts, tile: &mut Tile) {
    const ROWS: usize = 512;
    let mut digits = [0.0; DIGITS * ROWS];
    for t in 0..tile.tokens() {
        let x = weight.part(x, t..t + 1);
        for (first, out) in rows.clone().step_by(ROWS).zip(tile.row(t).chunks_mut(ROWS)) {
            let n = out.len();
            let digits = &mut digits[..DIGITS * n];
            weight.kernel.matmul(weight.rows_of(first..first + n), &x, &mut Tile::whole(digits, n));
            let (first, rest) = digits.split_at(n);
            let (second, third) = rest.split_at(n);
            for (i, out) in out.iter_mut().enumerate() {
                *out = first[i] + (second[i] + third[i]);
            }
        }
    }
}

/// Outputs that are judged together in [`multiply_best`].
const PART: usize = 256;

/// The product with one token, of which only the `best` largest outputs are asked for: these are what [`multiply`] gives, others may be
/// lower than they are. `maxima` is room to work in.
///
/// Where activations are digits, the most significant ones alone tell which rows cannot be among the best: the others change a
/// product by no more than the length of the vector they form times that of a row (Cauchy and Schwarz). Only what can still win is
/// multiplied by all digits.
pub fn multiply_best(ops: &Ops, team: &Team, (x, weight, out): Product, best: usize, maxima: &mut Vec<f32>) {
    if weight.input != Input::Digits || x.tokens != DIGITS || best >= weight.rows / PART || weight.output_scale > 0.0 {
        return multiply(ops, team, [(x, weight, out)]);
    }
    let (first, rest) = (x.part(0..1), x.part(1..DIGITS));
    team.tiles([(&mut *out, weight.rows)], TOGETHER, least(weight, 1), |_, rows, mut tile| {
        weight.kernel.matmul(weight.rows_of(rows), &first, &mut tile);
    });

    // What the digits left out can change, for a row whose scale is 1. A little more, for what the sums below round away.
    let (second, third) = rest.q.split_at(weight.cols);
    let worth = [rest.scale[0], rest.scale[1]].map(f64::from);
    let left_out = second.iter().zip(third).map(|(&a, &b)| worth[0] * f64::from(a) + worth[1] * f64::from(b));
    let length = left_out.map(|x| x * x).sum::<f64>().sqrt();
    let largest = f64::from(1 << (weight.kernel.format().bits() - 1));
    let most = (1.001 * length * largest * (weight.cols as f64).sqrt()) as f32;
    let scales = &weight.row_scale[weight.first_row..][..weight.rows];
    let off = |scale: f32, y: f32| scale.abs() * most + y.abs() * 1e-6;

    // If so many parts have an output of at least some size for sure, then so many outputs have.
    maxima.clear();
    maxima.resize(weight.rows.div_ceil(PART), 0.0);
    for ((out, scales), least) in out.chunks(PART).zip(scales.chunks(PART)).zip(&mut *maxima) {
        // In lanes, of which a compiler makes vectors.
        let mut lanes = [f32::MIN; 8];
        for (out, scales) in out.chunks(8).zip(scales.chunks(8)) {
            for ((lane, &y), &scale) in lanes.iter_mut().zip(out).zip(scales) {
                let sure = y - off(scale, y);
                *lane = if sure > *lane { sure } else { *lane };
            }
        }
        *least = lanes.into_iter().fold(f32::MIN, f32::max);
    }
    let (_, &mut bar, _) = maxima.select_nth_unstable_by(best.max(1) - 1, |a, b| b.total_cmp(a));

    // Of what is not a number nothing can be told. No row ends the question early: they are asked as vectors.
    let lost = |out: &[f32], scales: &[f32]| {
        out.iter().zip(scales).fold(true, |lost, (&y, &scale)| lost & (y + off(scale, y) < bar))
    };
    const GROUP: usize = interleave::ROWS;
    team.share(weight.rows.div_ceil(GROUP), PART / GROUP, Lines(out, GROUP), |groups, Lines(out, _)| {
        let start = groups.start * GROUP;
        for (part, (out, scales)) in out.chunks_mut(PART).zip(scales[start..].chunks(PART)).enumerate() {
            if lost(out, scales) {
                out.fill(f32::MIN);
                continue;
            }
            for (group, (out, scales)) in out.chunks_mut(GROUP).zip(scales.chunks(GROUP)).enumerate() {
                if lost(out, scales) {
                    out.fill(f32::MIN);
                    continue;
                }
                let (first, n) = (start + part * PART + group * GROUP, out.len());
                let mut digits = [0.0; (DIGITS - 1) * GROUP];
                let digits = &mut digits[..(DIGITS - 1) * n];
                weight.kernel.matmul(weight.rows_of(first..first + n), &rest, &mut Tile::whole(digits, n));
                let (second, third) = digits.split_at(n);
                for ((out, second), third) in out.iter_mut().zip(second).zip(third) {
                    *out += second + third;
                }
            }
        }
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
    /// (rows, groups) scales of parts of a row, little-endian f32, for channel-wise formats.
    scales: Option<Bytes>,
}

impl Table {
    /// A table over `bytes`, which are exactly `rows` rows of `cols` values in `format`.
    pub fn new(format: Format, bytes: Bytes, rows: usize, cols: usize) -> Table {
        let row_bytes = format.row_bytes(cols).expect("shapes are checked at load");
        assert_eq!(bytes.len(), rows * row_bytes, "{rows} x {cols} {}", format.name());
        Table { format, bytes, rows, cols, row_bytes, scales: None }
    }

    /// The same with scales in `scales`: as many little-endian f32 for each row as it has equal parts.
    pub fn with_scales(self, scales: Bytes) -> Table {
        let groups = scales.len() / 4 / self.rows.max(1);
        assert!(scales.len() == 4 * groups * self.rows && self.cols.is_multiple_of(groups.max(1)), "scales of a table");
        Table { scales: Some(scales), ..self }
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
        self.bytes.len() + self.scales.as_ref().map_or(0, |scales| scales.len())
    }

    /// Tells the system that rows are looked up in no order.
    pub fn advise_random(&self) {
        self.mapped().for_each(Bytes::advise_random);
    }

    /// Takes rows that were looked up out of this process's memory.
    pub fn let_go(&self) {
        self.mapped().for_each(Bytes::let_go);
    }

    fn mapped(&self) -> impl Iterator<Item = &Bytes> {
        [&self.bytes].into_iter().chain(&self.scales)
    }

    /// Starts reading some rows that will be looked up soon.
    pub fn read_ahead(&self, rows: &[u32]) {
        for bytes in self.mapped() {
            let row_bytes = bytes.len() / self.rows;
            for row in rows.iter().map(|&row| row as usize).filter(|&row| row < self.rows) {
                bytes.slice(row * row_bytes..(row + 1) * row_bytes).willneed();
            }
        }
    }

    /// Unpacks row `row` into `out`, exactly.
    pub fn look_up(&self, row: usize, out: &mut [f32]) {
        self.format.unpack_row(&self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes], out);
        let Some(scales) = &self.scales else { return };
        let row_bytes = scales.len() / self.rows;
        let scales = scales[row * row_bytes..(row + 1) * row_bytes].as_chunks().0;
        for (values, scale) in out.chunks_exact_mut(self.cols / scales.len()).zip(scales) {
            let scale = f32::from_le_bytes(*scale);
            values.iter_mut().for_each(|value| *value *= scale);
        }
    }
}
