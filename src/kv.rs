//! The key/value cache of one conversation.
//!
//! Positions are stored in blocks of [`BLOCK`] positions that are allocated when the conversation first reaches
//! them, so a long context costs memory only as it fills. A global layer keeps every block. A sliding layer keeps a
//! ring of blocks: just enough for its window, the chunk being computed, and some slack so that the last turns can
//! be taken back. A layer that shares another's cache has none here; [`Config`] says whose it reads.
//!
//! ```text
//! keys of a block:     head 0: panels of 16 positions    head 1: …      a panel: dimension after dimension of its positions
//! values of a block:   head 0: panels of 16 dimensions   head 1: …      a panel: position after position, its dimensions
//! ring of 4:           position p lives in block (p / 64) % 4, slot p % 64
//! ```
//!
//! So attention reads one panel after the other from end to end, sixteen numbers at a time, see [`Ops::scores_f32`].
//! Integers are stored with one scale for each head and position: the file's own, or one made of the largest magnitude. They
//! are rounded when they are written, so every query, that of the same token included, reads the same. Attention is not
//! computed here; [`disk`] keeps a cache as a file.

pub mod disk;

use std::ops::Range;

use gemrun_simd::Ops;
use gemrun_simd::vec::key_order;

use crate::config::{Config, KvScale};
use crate::{Error, Kind, Result};

/// Positions per block.
pub const BLOCK: usize = gemrun_simd::vec::KEYS;

/// Numbers of a row of a panel.
pub const PANEL: usize = gemrun_simd::vec::PANEL;

/// Positions a sliding layer keeps beyond its window and one chunk, so that this many tokens can be taken back
/// (`/undo`, `/regen`, an edited prompt) without computing the window again.
const SLACK: usize = 512;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// As computed.
    F32,
    /// IEEE half, rounded to nearest even.
    F16,
    /// −128 to 127. Static scales for four bits are made finer by 16.
    Int8,
    /// As the file's static scales are meant: eight bits in sliding layers, four in global ones.
    Mixed,
}

impl KvType {
    /// The one with a name.
    pub fn of_name(name: &str) -> Option<KvType> {
        [KvType::F32, KvType::F16, KvType::Int8, KvType::Mixed].into_iter().find(|kind| kind.name() == name)
    }

    /// The name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Int8 => "int8",
            KvType::Mixed => "mixed",
        }
    }
}

/// How the keys of one layer are stored, or its values.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    F32,
    F16,
    I8(Scale),
    I4(Scale),
}

/// What integers are multiples of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    /// The file says so.
    Static(f32),
    /// The largest magnitude of each head's key or value becomes the largest integer.
    Dynamic,
}

impl Form {
    /// Of a layer that keeps its own keys and values. A static scale of 0 says that they were not rounded when the model was
    /// trained: as it was trained, halves are nearest to that; where integers are asked for, they get a scale.
    fn of(kind: KvType, sliding: bool, fixed: Option<(u8, f32)>) -> Form {
        match (kind, fixed) {
            (KvType::F32, _) => Form::F32,
            (KvType::F16, _) | (KvType::Mixed, Some((_, 0.0))) => Form::F16,
            (KvType::Int8, None | Some((_, 0.0))) => Form::I8(Scale::Dynamic),
            (KvType::Int8, Some((4, scale))) => Form::I8(Scale::Static(scale / 16.0)),
            (KvType::Int8, Some((_, scale))) => Form::I8(Scale::Static(scale)),
            (KvType::Mixed, None) if sliding => Form::I8(Scale::Dynamic),
            (KvType::Mixed, None) => Form::I4(Scale::Dynamic),
            (KvType::Mixed, Some((4, scale))) => Form::I4(Scale::Static(scale)),
            (KvType::Mixed, Some((_, scale))) => Form::I8(Scale::Static(scale)),
        }
    }

    /// Elements of panels of `rows` rows for `columns` columns, sixteen in each.
    fn elements(self, rows: usize, columns: usize) -> usize {
        let numbers = rows * columns.next_multiple_of(PANEL);
        if let Form::I4(_) = self { numbers / 2 } else { numbers }
    }

    /// Bytes of so many elements, and of the scales of so many rows.
    fn bytes(self, elements: usize, scales: usize) -> usize {
        match self {
            Form::F32 => 4 * elements,
            Form::F16 => 2 * elements,
            Form::I8(_) | Form::I4(_) => elements + 4 * scales,
        }
    }
}

/// The cache of one conversation: every layer's keys and values for positions `0..len`.
pub struct Kv {
    kind: KvType,
    context: usize,
    len: usize,
    layers: Vec<Option<Layer>>,
}

/// Keys and values of one layer.
struct Layer {
    head_dim: usize,
    sliding: bool,
    /// The dimensions of a key in the order in which they are stored.
    order: Vec<usize>,
    kv_heads: usize,
    keys: Form,
    values: Form,
    /// Blocks of a ring; 0 for a global layer.
    ring: usize,
    /// Allocated in order as the conversation grows.
    blocks: Vec<Block>,
    /// One past the highest position ever written since the cache was cleared: what a ring may have overwritten.
    written: usize,
    /// Earlier positions of a sliding layer are missing: what it was restored from did not have them.
    since: usize,
}

/// [`BLOCK`] positions: (kv_heads, BLOCK / PANEL, head_dim, PANEL) keys and (kv_heads, head_dim / PANEL, BLOCK, PANEL) values, the
/// last panel filled up.
struct Block {
    keys: Store,
    values: Store,
}

/// Keys or values of a block; integers with their scales, (kv_heads, BLOCK).
enum Store {
    F32(Vec<f32>),
    F16(Vec<u16>),
    I8(Scale, Vec<i8>, Vec<f32>),
    I4(Scale, Vec<u8>, Vec<f32>),
}

/// Stored keys or values.
#[derive(Clone, Copy)]
pub enum Run<'a> {
    /// Plain values.
    F32(&'a [f32]),
    /// IEEE half bits.
    F16(&'a [u16]),
    /// Integers, and a scale for each position.
    I8(&'a [i8], &'a [f32]),
    /// The same in nibbles, as [`Ops::scores_i4`] and [`Ops::weigh_i4`] take them.
    I4(&'a [u8], &'a [f32]),
}

/// Values that are converted at a time.
const SOME: usize = 64;

impl Store {
    fn new(form: Form, elements: usize, scales: usize) -> Result<Store> {
        fn zeroed<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
            let mut values = Vec::new();
            values.try_reserve_exact(len).map_err(|_| Error::new(Kind::Memory, "no memory left for the kv cache"))?;
            values.resize(len, T::default());
            Ok(values)
        }
        Ok(match form {
            Form::F32 => Store::F32(zeroed(elements)?),
            Form::F16 => Store::F16(zeroed(elements)?),
            Form::I8(scale) => Store::I8(scale, zeroed(elements)?, zeroed(scales)?),
            Form::I4(scale) => Store::I4(scale, zeroed(elements)?, zeroed(scales)?),
        })
    }

    /// Stores `value`, the one of a head at slot `slot`: a row in each panel.
    fn write(&mut self, head: usize, slot: usize, value: &[f32], ops: &Ops) {
        let panels = value.len().div_ceil(PANEL);
        let scale = self.scale(head, slot, value, ops);
        for (i, part) in value.chunks(PANEL).enumerate() {
            let row = (head * panels + i) * BLOCK + slot;
            match self {
                Store::F32(store) => store[row * PANEL..][..part.len()].copy_from_slice(part),
                Store::F16(store) => ops.store_f16(&mut store[row * PANEL..][..part.len()], part),
                Store::I8(_, store, _) => ops.store_i8(&mut store[row * PANEL..][..part.len()], part, scale, 127),
                Store::I4(_, store, _) => {
                    let mut q = [0; PANEL];
                    ops.store_i8(&mut q[..part.len()], part, scale, 7);
                    let bytes: [u8; PANEL / 2] = std::array::from_fn(|i| (q[i] & 15 | q[i + PANEL / 2] << 4) as u8);
                    store[row * PANEL / 2..][..PANEL / 2].copy_from_slice(&bytes);
                }
            }
        }
    }

    /// Stores `key`, the one of a head at slot `slot`: a column of one panel, its dimensions in `order`.
    fn scatter(&mut self, head: usize, slot: usize, key: &[f32], order: &[usize], ops: &Ops) {
        let (mut values, mut halves, mut integers) = ([0.0; SOME], [0; SOME], [0; SOME]);
        let scale = self.scale(head, slot, key, ops);
        for (i, order) in order.chunks(SOME).enumerate() {
            let values = &mut values[..order.len()];
            values.iter_mut().zip(order).for_each(|(value, &d)| *value = key[d]);
            let row = (head * BLOCK + slot) / PANEL * key.len() + i * SOME;
            let first = row * PANEL + slot % PANEL;
            match self {
                Store::F32(store) => {
                    let slots = store[first..].iter_mut().step_by(PANEL);
                    slots.zip(values).for_each(|(slot, value)| *slot = *value);
                }
                Store::F16(store) => {
                    let halves = &mut halves[..order.len()];
                    ops.store_f16(halves, values);
                    let slots = store[first..].iter_mut().step_by(PANEL);
                    slots.zip(halves).for_each(|(slot, half)| *slot = *half);
                }
                Store::I8(_, store, _) => {
                    let integers = &mut integers[..order.len()];
                    ops.store_i8(integers, values, scale, 127);
                    let slots = store[first..].iter_mut().step_by(PANEL);
                    slots.zip(integers).for_each(|(slot, integer)| *slot = *integer);
                }
                Store::I4(_, store, _) => {
                    let integers = &mut integers[..order.len()];
                    ops.store_i8(integers, values, scale, 7);
                    let high = slot % PANEL >= PANEL / 2;
                    let slots = store[row * PANEL / 2 + slot % (PANEL / 2)..].iter_mut().step_by(PANEL / 2);
                    for (slot, integer) in slots.zip(integers) {
                        let nibble = *integer as u8 & 15;
                        *slot = if high { *slot & 15 | nibble << 4 } else { *slot & 0xf0 | nibble };
                    }
                }
            }
        }
    }

    /// What to divide `x`, a head's key or value at slot `slot`, by; stored with it.
    fn scale(&mut self, head: usize, slot: usize, x: &[f32], ops: &Ops) -> f32 {
        match self {
            Store::F32(_) | Store::F16(_) => 1.0,
            Store::I8(scale, _, scales) => scale.of(x, 127, &mut scales[head * BLOCK + slot], ops),
            Store::I4(scale, _, scales) => scale.of(x, 7, &mut scales[head * BLOCK + slot], ops),
        }
    }

    /// Elements `range` and the scales of a head.
    fn run(&self, range: Range<usize>, head: usize) -> Run<'_> {
        let scales = head * BLOCK..(head + 1) * BLOCK;
        match self {
            Store::F32(store) => Run::F32(&store[range]),
            Store::F16(store) => Run::F16(&store[range]),
            Store::I8(_, store, all) => Run::I8(&store[range], &all[scales]),
            Store::I4(_, store, all) => Run::I4(&store[range], &all[scales]),
        }
    }
}

impl Scale {
    /// What to divide `x` by so that it becomes integers of at most `top`; `stored` is what to multiply them by again. That is
    /// not finite if an x is not, so that damage shows in every score and sum.
    fn of(self, x: &[f32], top: i8, stored: &mut f32, ops: &Ops) -> f32 {
        let amax = ops.amax(x);
        let scale = match self {
            Scale::Static(scale) => scale,
            Scale::Dynamic => amax / f32::from(top),
        };
        *stored = if amax.is_finite() { scale } else { f32::NAN };
        // Nothing but zeros stays so.
        if scale > 0.0 { scale } else { 1.0 }
    }
}

impl Kv {
    /// An empty cache for up to `context` positions, filled by chunks of at most `batch` tokens.
    pub fn new(config: &Config, kind: KvType, context: usize, batch: usize) -> Kv {
        let form = |il: usize, sliding: bool, scale: fn(&KvScale) -> f32| {
            let fixed = config.srq.as_ref().map(|srq| (srq.kv[il].bits, scale(&srq.kv[il])));
            Form::of(kind, sliding, fixed)
        };
        let layer = |(il, layer): (usize, &crate::config::LayerConfig)| {
            config.owns_kv(il).then(|| {
                let all = context.div_ceil(BLOCK);
                // A chunk may begin anywhere in a block: one more block on either side.
                let ring = (config.window + batch + SLACK).div_ceil(BLOCK) + 1;
                let ring = if layer.sliding && ring < all { ring } else { 0 };
                let (head_dim, kv_heads) = (layer.head_dim, layer.kv_heads);
                Layer {
                    head_dim,
                    sliding: layer.sliding,
                    order: key_order(head_dim),
                    kv_heads,
                    keys: form(il, layer.sliding, |scale| scale.k),
                    values: form(il, layer.sliding, |scale| scale.v),
                    ring,
                    blocks: Vec::new(),
                    written: 0,
                    since: 0,
                }
            })
        };
        Kv { kind, context, len: 0, layers: config.layers.iter().enumerate().map(layer).collect() }
    }

    /// Tokens held: the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens it can hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Bytes the cache takes with `len` positions filled.
    pub fn bytes(&self, len: usize) -> usize {
        let layer = |layer: &Layer| layer.blocks(len) * layer.block_bytes();
        self.layers.iter().flatten().map(layer).sum()
    }

    /// Forgets positions from `len` on, and returns how many are really kept: `len`, or 0 where a sliding layer's
    /// ring no longer holds the window before position `len`.
    pub fn truncate(&mut self, len: usize, window: usize) -> usize {
        if len < self.len {
            self.len = self.reach(len, window);
            if self.len == 0 {
                self.layers.iter_mut().flatten().for_each(|layer| (layer.written, layer.since) = (0, 0));
            }
        }
        self.len
    }

    /// How many positions [`Kv::truncate`] to `len` would keep.
    pub fn reach(&self, len: usize, window: usize) -> usize {
        let intact = |layer: &Layer| len.saturating_sub(window - 1) >= layer.oldest();
        if len >= self.len || self.layers.iter().flatten().all(intact) { len.min(self.len) } else { 0 }
    }

    /// Makes room for `tokens` more positions, so that later writes cannot fail.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let end = self.len + tokens;
        if end > self.context {
            let error = format!("context: {end} tokens do not fit: it holds {}", self.context);
            return Err(Error::usage(error));
        }
        for layer in self.layers.iter_mut().flatten() {
            while layer.blocks.len() < layer.blocks(end) {
                layer.blocks.push(layer.new_block()?);
            }
        }
        Ok(())
    }

    /// Stores key and value — each (kv_heads, head_dim) — of layer `il` at `position`, which was reserved.
    pub fn write(&mut self, il: usize, position: usize, key: &[f32], value: &[f32], ops: &Ops) {
        let layer = self.layers[il].as_mut().expect("only layers that own a cache write to it");
        let index = layer.index(position);
        let dim = layer.head_dim;
        let block = &mut layer.blocks[index];
        for head in 0..layer.kv_heads {
            let slot = position % BLOCK;
            block.keys.scatter(head, slot, &key[head * dim..][..dim], &layer.order, ops);
            block.values.write(head, slot, &value[head * dim..][..dim], ops);
        }
        layer.written = layer.written.max(position + 1);
    }

    /// Counts `tokens` more positions as held, after every layer wrote them.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// The order in which layer `il` stores the dimensions of its keys.
    pub fn key_order(&self, il: usize) -> &[usize] {
        self.layers[il].as_ref().map_or(&[], |layer| &layer.order)
    }

    /// Panels of keys, their dimensions in [`Kv::key_order`], and of values of one head of layer `il` at positions
    /// `block * BLOCK` and after.
    /// Slots of positions that were never written, or not since a ring came round, hold other numbers.
    pub fn block(&self, il: usize, head: usize, block: usize) -> (Run<'_>, Run<'_>) {
        let layer = self.layers[il].as_ref().expect("attention reads layers that own a cache");
        let stored = &layer.blocks[layer.index(block * BLOCK)];
        let of_head = |elements: usize| head * elements..(head + 1) * elements;
        (stored.keys.run(of_head(layer.key_elements()), head), stored.values.run(of_head(layer.value_elements()), head))
    }
}

impl Layer {
    /// Blocks allocated with `len` positions filled.
    fn blocks(&self, len: usize) -> usize {
        let blocks = len.div_ceil(BLOCK);
        if self.ring > 0 { blocks.min(self.ring) } else { blocks }
    }

    /// The first position that is still there.
    fn oldest(&self) -> usize {
        // The ring holds its newest `ring` blocks, the newest maybe in part.
        let blocks = self.written.div_ceil(BLOCK);
        let kept = if self.ring > 0 { blocks.saturating_sub(self.ring) * BLOCK } else { 0 };
        kept.max(self.since)
    }

    /// An empty block.
    fn new_block(&self) -> Result<Block> {
        let scales = self.kv_heads * BLOCK;
        let keys = Store::new(self.keys, self.kv_heads * self.key_elements(), scales)?;
        let values = Store::new(self.values, self.kv_heads * self.value_elements(), scales)?;
        Ok(Block { keys, values })
    }

    /// Elements of one head's keys in a block.
    fn key_elements(&self) -> usize {
        self.keys.elements(self.head_dim, BLOCK)
    }

    /// Elements of one head's values in a block.
    fn value_elements(&self) -> usize {
        self.values.elements(BLOCK, self.head_dim)
    }

    fn block_bytes(&self) -> usize {
        self.kv_heads * (self.keys.bytes(self.key_elements(), BLOCK) + self.values.bytes(self.value_elements(), BLOCK))
    }

    fn index(&self, position: usize) -> usize {
        let block = position / BLOCK;
        if self.ring > 0 { block % self.ring } else { block }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LayerConfig, Rope, Srq};
    use gemrun_simd::selftest::Rng;
    use gemrun_simd::{Isa, ops};

    /// `layers`: for each its head width and whether it slides; the last `shared` own no cache.
    fn config(window: usize, kv_heads: usize, layers: &[(usize, bool)], shared: usize, srq: Option<Srq>) -> Config {
        let owners = layers.len() - shared;
        let rope = Rope { base: 1e4, dims: 2 };
        let layer = |(il, &(head_dim, sliding)): (usize, &(usize, bool))| {
            let last = (0..owners).rev().find(|&owner| layers[owner].1 == sliding).unwrap();
            let kv_layer = if il < owners { il } else { last };
            LayerConfig { sliding, heads: 8, kv_heads, head_dim, ff: 1, expert_ff: 0, kv_layer }
        };
        Config {
            dim: 1536,
            vocab: 1,
            context: 1 << 17,
            eps: 1e-6,
            softcap: None,
            window,
            ple: 0,
            rope_global: rope,
            rope_sliding: rope,
            experts: None,
            layers: layers.iter().enumerate().map(layer).collect(),
            suppress: Vec::new(),
            srq,
        }
    }

    fn scales(layers: &[(u8, f32, f32)]) -> Option<Srq> {
        let kv = layers.iter().map(|&(bits, k, v)| KvScale { bits, k, v }).collect();
        Some(Srq { prefix: String::new(), kv, layers: Vec::new(), output: Default::default() })
    }

    /// 35 layers, every fifth global, the last 20 without a cache.
    #[test]
    fn e2b_with_8192_positions_fits_into_45_megabytes() {
        let layers: Vec<_> = (0..35).map(|il| if il % 5 == 4 { (512, false) } else { (256, true) }).collect();
        let kv: Vec<_> =
            layers.iter().map(|&(_, sliding)| if sliding { (8, 0.1, 0.1) } else { (4, 1.0, 1.0) }).collect();
        let config = config(512, 1, &layers, 20, scales(&kv));
        let bytes = |kind| Kv::new(&config, kind, 8192, 64).bytes(8192);
        // A ring of 512 + 64 + 512 positions, in blocks, and one block more: 18 of them.
        let (sliding, global) = (12 * 18 * 64, 3 * 8192);
        assert_eq!(bytes(KvType::Mixed), sliding * 2 * (256 + 4) + global * 2 * (256 + 4));
        assert_eq!(bytes(KvType::Int8), sliding * 2 * (256 + 4) + global * 2 * (512 + 4));
        assert_eq!(bytes(KvType::F16), sliding * 2 * 256 * 2 + global * 2 * 512 * 2);
        assert_eq!(bytes(KvType::Mixed), 19_968_000);
    }

    /// What [`Kv::block`] gives for a position: key and value, the integers times their scales.
    fn read(kv: &Kv, il: usize, head: usize, dim: usize, position: usize) -> (Vec<f32>, Vec<f32>) {
        let (keys, values) = kv.block(il, head, position / BLOCK);
        let slot = position % BLOCK;
        let nibble = |bytes: &[u8], at: usize| ((bytes[at % 8] >> (at / 8 * 4)) as i8) << 4 >> 4;
        let (panel, column) = (slot / PANEL * dim, slot % PANEL);
        let mut key = vec![f32::NAN; dim];
        for (r, &d) in kv.key_order(il).iter().enumerate() {
            let row = (panel + r) * PANEL;
            key[d] = match keys {
                Run::F32(keys) => keys[row + column],
                Run::F16(keys) => gemrun_simd::half::f16_to_f32(keys[row + column]),
                Run::I8(keys, scale) => f32::from(keys[row + column]) * scale[slot],
                Run::I4(keys, scale) => f32::from(nibble(&keys[row / 2..], column)) * scale[slot],
            };
        }
        let value = |d: usize| {
            let (row, column) = ((d / PANEL * BLOCK + slot) * PANEL, d % PANEL);
            match values {
                Run::F32(values) => values[row + column],
                Run::F16(values) => gemrun_simd::half::f16_to_f32(values[row + column]),
                Run::I8(values, scale) => f32::from(values[row + column]) * scale[slot],
                Run::I4(values, scale) => f32::from(nibble(&values[row / 2..], column)) * scale[slot],
            }
        };
        (key, (0..dim).map(value).collect())
    }

    /// What is written is what is read, rounded, for widths that fill no vector and positions that go round a ring.
    #[test]
    fn what_was_written_is_read_rounded() {
        let layers = [(10, true), (24, false), (256, false), (48, true)];
        let fixed = scales(&[(8, 0.05, 0.02), (4, 0.6, 0.7), (4, 0.5, 0.0), (8, 0.0, 0.03)]);
        for srq in [None, fixed] {
            let config = config(32, 2, &layers, 0, srq);
            for kind in [KvType::F32, KvType::F16, KvType::Int8, KvType::Mixed] {
                let (mut kv, mut rng) = (Kv::new(&config, kind, 2000, 8), Rng(1));
                let mut written = Vec::new();
                for position in 0..1500 {
                    kv.reserve(1).unwrap();
                    for (il, (dim, _)) in layers.iter().enumerate() {
                        let (mut key, mut value) = (rng.values(2 * dim), rng.values(2 * dim));
                        key.iter_mut().chain(&mut value).for_each(|x| *x = x.clamp(-4.0, 4.0));
                        if position % 3 == 0 {
                            key[..*dim].fill(0.0);
                        }
                        kv.write(il, position, &key, &value, ops(Isa::best()));
                        written.push((il, *dim, position, key, value));
                    }
                    kv.advance(1);
                }
                for (il, dim, position, key, value) in &written[written.len() - 4 * 40..] {
                    for head in 0..2 {
                        let (stored_key, stored_value) = read(&kv, *il, head, *dim, *position);
                        let of = |x: &[f32], form: Form| -> Vec<f32> {
                            let x = &x[head * dim..][..*dim];
                            let amax = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                            let round = |scale: f32, top: f32| -> Vec<f32> {
                                let nearest = |x: &f32| (x / scale).round_ties_even().clamp(-1.0 - top, top) * scale;
                                if amax == 0.0 { x.to_vec() } else { x.iter().map(nearest).collect() }
                            };
                            use gemrun_simd::half::{f16_to_f32, f32_to_f16};
                            match form {
                                Form::F32 => x.to_vec(),
                                Form::F16 => x.iter().map(|x| f16_to_f32(f32_to_f16(*x))).collect(),
                                Form::I8(Scale::Dynamic) => round(amax / 127.0, 127.0),
                                Form::I8(Scale::Static(scale)) => round(scale, 127.0),
                                Form::I4(Scale::Dynamic) => round(amax / 7.0, 7.0),
                                Form::I4(Scale::Static(scale)) => round(scale, 7.0),
                            }
                        };
                        let layer = kv.layers[*il].as_ref().unwrap();
                        assert_eq!(stored_key, of(key, layer.keys), "{kind:?}: layer {il}: key {position}");
                        assert_eq!(stored_value, of(value, layer.values), "{kind:?}: layer {il}: value {position}");
                    }
                }
                assert_eq!(kv.bytes(kv.len()), kv.layers.iter().flatten().map(allocated).sum::<usize>(), "{kind:?}");
            }
        }
    }

    /// Bytes of a layer's buffers.
    fn allocated(layer: &Layer) -> usize {
        let store = |store: &Store| match store {
            Store::F32(values) => 4 * values.len(),
            Store::F16(values) => 2 * values.len(),
            Store::I8(_, values, scales) => values.len() + 4 * scales.len(),
            Store::I4(_, values, scales) => values.len() + 4 * scales.len(),
        };
        layer.blocks.iter().map(|block| store(&block.keys) + store(&block.values)).sum()
    }

    #[test]
    fn forms_are_what_the_file_says() {
        use Scale::{Dynamic, Static};
        let form = |kind, fixed| Form::of(kind, true, fixed);
        assert_eq!(form(KvType::Mixed, Some((8, 0.5))), Form::I8(Static(0.5)));
        assert_eq!(form(KvType::Mixed, Some((4, 0.5))), Form::I4(Static(0.5)));
        assert_eq!(form(KvType::Int8, Some((8, 0.5))), Form::I8(Static(0.5)));
        assert_eq!(form(KvType::Int8, Some((4, 0.5))), Form::I8(Static(0.03125)));
        assert_eq!(form(KvType::Int8, None), Form::I8(Dynamic));
        assert_eq!(form(KvType::Mixed, Some((4, 0.0))), Form::F16);
        assert_eq!(form(KvType::Int8, Some((4, 0.0))), Form::I8(Dynamic));
        for fixed in [None, Some((4, 0.5))] {
            assert_eq!((form(KvType::F32, fixed), form(KvType::F16, fixed)), (Form::F32, Form::F16));
        }
    }

    /// A key or value that is not finite must not become an integer like any other.
    #[test]
    fn damage_is_not_rounded_away() {
        for srq in [None, scales(&[(4, 0.5, 0.5)])] {
            for kind in [KvType::Int8, KvType::Mixed] {
                for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut kv = Kv::new(&config(8, 1, &[(16, false)], 0, srq.clone()), kind, 64, 1);
                    kv.reserve(2).unwrap();
                    let (sound, mut damaged) = ([1.0; 16], [1.0; 16]);
                    damaged[9] = x;
                    kv.write(0, 0, &damaged, &sound, ops(Isa::best()));
                    kv.write(0, 1, &sound, &damaged, ops(Isa::best()));
                    let all = |values: &[f32], f: fn(f32) -> bool| values.iter().all(|x| f(*x));
                    let (key, value) = read(&kv, 0, 0, 16, 0);
                    assert!(all(&key, f32::is_nan) && all(&value, f32::is_finite));
                    let (key, value) = read(&kv, 0, 0, 16, 1);
                    assert!(all(&key, f32::is_finite) && all(&value, f32::is_nan));
                }
            }
        }
    }
}
