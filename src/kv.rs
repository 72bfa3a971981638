//! The key/value cache of one conversation.
//!
//! Positions are stored in blocks of [`BLOCK`] positions that are allocated when the conversation first reaches
//! them, so a long context costs memory only as it fills. A global layer keeps every block. A sliding layer keeps a
//! ring of blocks: just enough for its window, the chunk being computed, and some slack so that the last turns can
//! be taken back. A layer that shares another's cache has none here; [`Config`] says whose it reads.
//!
//! ```text
//! values of a block:   head 0: position 0 … 63   head 1: position 0 … 63   …      each position: head_dim values
//! keys of a block:     head 0: dimension after dimension   head 1: …               each dimension: 64 positions
//! ring of 4:           position p lives in block (p / 64) % 4, slot p % 64
//! ```
//!
//! So attention finds 64 keys side by side, which is how it multiplies them with a query, and each value in one piece.
//! Attention is not computed here.

use std::ops::Range;

use gemrun_simd::Ops;
use gemrun_simd::vec::key_order;

use crate::config::Config;
use crate::{Error, Kind, Result};

/// Positions per block.
pub const BLOCK: usize = gemrun_simd::vec::KEYS;

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
}

impl KvType {
    /// The name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
        }
    }

    /// Bytes of one stored value.
    pub fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
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
    /// The dimensions of a key in the order in which they are stored.
    order: Vec<usize>,
    kv_heads: usize,
    /// Blocks of a ring; 0 for a global layer.
    ring: usize,
    /// Allocated in order as the conversation grows.
    blocks: Vec<Block>,
    /// One past the highest position ever written since the cache was cleared: what a ring may have overwritten.
    written: usize,
}

/// [`BLOCK`] positions: (kv_heads, head_dim, BLOCK) keys and (kv_heads, BLOCK, head_dim) values.
struct Block {
    keys: Store,
    values: Store,
}

enum Store {
    F32(Vec<f32>),
    F16(Vec<u16>),
}

/// Stored keys or values.
#[derive(Clone, Copy)]
pub enum Run<'a> {
    /// Plain values.
    F32(&'a [f32]),
    /// IEEE half bits.
    F16(&'a [u16]),
}

impl Store {
    fn new(kind: KvType, len: usize) -> Result<Store> {
        fn zeroed<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
            let mut values = Vec::new();
            values.try_reserve_exact(len).map_err(|_| Error::new(Kind::Memory, "no memory left for the kv cache"))?;
            values.resize(len, T::default());
            Ok(values)
        }
        Ok(match kind {
            KvType::F32 => Store::F32(zeroed(len)?),
            KvType::F16 => Store::F16(zeroed(len)?),
        })
    }

    fn write(&mut self, at: usize, values: &[f32], ops: &Ops) {
        match self {
            Store::F32(store) => store[at..at + values.len()].copy_from_slice(values),
            Store::F16(store) => ops.store_f16(&mut store[at..at + values.len()], values),
        }
    }

    /// Stores `key`'s dimensions in `order` from `at` on, each [`BLOCK`] after the one before.
    fn scatter(&mut self, at: usize, key: &[f32], order: &[usize], ops: &Ops) {
        const SOME: usize = 64;
        let (mut values, mut halves) = ([0.0; SOME], [0; SOME]);
        for (i, order) in order.chunks(SOME).enumerate() {
            let (values, at) = (&mut values[..order.len()], at + i * SOME * BLOCK);
            values.iter_mut().zip(order).for_each(|(value, &d)| *value = key[d]);
            match self {
                Store::F32(store) => {
                    store[at..].iter_mut().step_by(BLOCK).zip(values).for_each(|(slot, value)| *slot = *value);
                }
                Store::F16(store) => {
                    let halves = &mut halves[..order.len()];
                    ops.store_f16(halves, values);
                    store[at..].iter_mut().step_by(BLOCK).zip(halves).for_each(|(slot, half)| *slot = *half);
                }
            }
        }
    }

    fn run(&self, range: Range<usize>) -> Run<'_> {
        match self {
            Store::F32(store) => Run::F32(&store[range]),
            Store::F16(store) => Run::F16(&store[range]),
        }
    }
}

impl Kv {
    /// An empty cache for up to `context` positions, filled by chunks of at most `batch` tokens.
    pub fn new(config: &Config, kind: KvType, context: usize, batch: usize) -> Kv {
        let layer = |(il, layer): (usize, &crate::config::LayerConfig)| {
            config.owns_kv(il).then(|| {
                let all = context.div_ceil(BLOCK);
                // A chunk may begin anywhere in a block: one more block on either side.
                let ring = (config.window + batch + SLACK).div_ceil(BLOCK) + 1;
                let ring = if layer.sliding && ring < all { ring } else { 0 };
                let (head_dim, kv_heads) = (layer.head_dim, layer.kv_heads);
                Layer { head_dim, order: key_order(head_dim), kv_heads, ring, blocks: Vec::new(), written: 0 }
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
        let layer = |layer: &Layer| {
            let blocks = len.div_ceil(BLOCK);
            (if layer.ring > 0 { blocks.min(layer.ring) } else { blocks })
                * BLOCK
                * layer.kv_heads
                * layer.head_dim
                * 2
                * self.kind.bytes()
        };
        self.layers.iter().flatten().map(layer).sum()
    }

    /// Forgets positions from `len` on, and returns how many are really kept: `len`, or 0 where a sliding layer's
    /// ring no longer holds the window before position `len`.
    pub fn truncate(&mut self, len: usize, window: usize) -> usize {
        if len < self.len {
            let intact = |layer: &Layer| {
                // The ring holds its newest `ring` blocks, the newest maybe in part.
                let newest = layer.written.saturating_sub(1) / BLOCK;
                let oldest_kept = (newest + 1).saturating_sub(layer.ring) * BLOCK;
                layer.ring == 0 || len.saturating_sub(window - 1) >= oldest_kept
            };
            self.len = if self.layers.iter().flatten().all(intact) { len } else { 0 };
            if self.len == 0 {
                self.layers.iter_mut().flatten().for_each(|layer| layer.written = 0);
            }
        }
        self.len
    }

    /// Makes room for `tokens` more positions, so that later writes cannot fail.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let end = self.len + tokens;
        if end > self.context {
            let error = format!("context: {end} tokens do not fit: it holds {}", self.context);
            return Err(Error::usage(error));
        }
        for layer in self.layers.iter_mut().flatten() {
            let blocks = end.div_ceil(BLOCK);
            let blocks = if layer.ring > 0 { blocks.min(layer.ring) } else { blocks };
            while layer.blocks.len() < blocks {
                let values = BLOCK * layer.kv_heads * layer.head_dim;
                let keys = Store::new(self.kind, values)?;
                layer.blocks.push(Block { keys, values: Store::new(self.kind, values)? });
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
            let (slot, first) = (position % BLOCK, head * BLOCK * dim);
            block.keys.scatter(first + slot, &key[head * dim..][..dim], &layer.order, ops);
            block.values.write(first + slot * dim, &value[head * dim..][..dim], ops);
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

    /// Keys (head_dim, BLOCK), their dimensions in [`Kv::key_order`], and values (BLOCK, head_dim) of one head of layer `il` at positions `block * BLOCK` and after.
    /// Slots of positions that were never written, or not since a ring came round, hold other numbers.
    pub fn block(&self, il: usize, head: usize, block: usize) -> (Run<'_>, Run<'_>) {
        let layer = self.layers[il].as_ref().expect("attention reads layers that own a cache");
        let stored = &layer.blocks[layer.index(block * BLOCK)];
        let size = BLOCK * layer.head_dim;
        let range = head * size..(head + 1) * size;
        (stored.keys.run(range.clone()), stored.values.run(range))
    }
}

impl Layer {
    fn index(&self, position: usize) -> usize {
        let block = position / BLOCK;
        if self.ring > 0 { block % self.ring } else { block }
    }
}
