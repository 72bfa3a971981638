//! The cache of a mobile checkpoint against reference data (`../shared/golden-mobile`), skipped with a note where that is absent.
//!
//! The reference rounds keys and values by the checkpoint's static scales when they are written, and every query reads them
//! rounded. Its integers are compared exactly, logits by the share of rows that agree over short sequences and, only roughly,
//! over a long one: `mobile.rs` says why.

mod common;

use common::mobile;
use common::run::{self, INT8, Way};
use gemrun::forward::{State, Want, forward};
use gemrun::kv::{BLOCK, Kv, KvType, PANEL, Run};
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::weight::Numerics;

/// The integers of layer `il`'s keys and of its values at the first positions, (positions, kv heads, head dim).
fn integers(kv: &Kv, il: usize, positions: usize, kv_heads: usize, dim: usize) -> [Vec<f32>; 2] {
    let nibble = |bytes: &[u8], at: usize| ((bytes[at % 8] >> (at / 8 * 4)) as i8) << 4 >> 4;
    let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
    for position in 0..positions {
        for head in 0..kv_heads {
            let (keys, values) = kv.block(il, head, 0);
            let mut key = vec![f32::NAN; dim];
            for (r, &d) in kv.key_order(il).iter().enumerate() {
                let (row, column) = ((position / PANEL * dim + r) * PANEL, position % PANEL);
                key[d] = match keys {
                    Run::I8(keys, _) => f32::from(keys[row + column]),
                    Run::I4(keys, _) => f32::from(nibble(&keys[row / 2..], column)),
                    _ => panic!("keys that are no integers"),
                };
            }
            all_keys.extend(key);
            all_values.extend((0..dim).map(|d| {
                let (row, column) = ((d / PANEL * BLOCK + position) * PANEL, d % PANEL);
                match values {
                    Run::I8(values, _) => f32::from(values[row + column]),
                    Run::I4(values, _) => f32::from(nibble(&values[row / 2..], column)),
                    _ => panic!("values that are no integers"),
                }
            }));
        }
    }
    [all_keys, all_values]
}

/// No tolerance: the reference's values keep their distance from where rounding turns.
#[test]
fn the_cache_holds_the_reference_integers() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let model = Model::load(&gguf, &Numerics::default()).unwrap();
        let tokens = golden.tokens(7);
        let layers = &model.config.layers;
        // As one chunk, and token by token.
        for batch in [7, 1] {
            let mut state = State::new(&model, KvType::Mixed, BLOCK, batch).unwrap();
            Team::new(1).unwrap().enter(|team| {
                for chunk in tokens.chunks(batch) {
                    forward(&model, team, &mut state, chunk, Want::Last).unwrap();
                }
            });
            for (il, bits) in [(0, 8), (3, 4)] {
                let found = integers(&state.kv, il, tokens.len(), layers[il].kv_heads, layers[il].head_dim);
                for (side, found) in ["k", "v"].iter().zip(found) {
                    let expected = golden.array(&format!("l{il}_{side}cache_int{bits}_len7"));
                    assert_eq!(expected.shape, [tokens.len(), layers[il].kv_heads, layers[il].head_dim]);
                    let wrong = expected.values.iter().zip(&found).filter(|(a, b)| a != b).count();
                    assert_eq!(wrong, 0, "{kind}: layer {il}, {side}: of {}", found.len());
                }
            }
        }
    }
}

#[test]
fn short_sequences() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let short = |kv| golden.short("logits_kvq_short", |tokens| run::logits(&gguf, tokens, Way { kv, ..INT8 }));
        let agreement = short(KvType::Mixed);
        println!("{kind}: {agreement:?}");
        assert!(agreement.same_rows >= 0.80 && agreement.same_best >= 0.95 && agreement.kl <= 0.01, "{agreement:?}");
        // The gate can fail: with keys and values as computed no row is the same, nor with eight bits everywhere.
        for kv in [KvType::F32, KvType::Int8] {
            let other = short(kv);
            println!("{kind}, {}: {other:?}", kv.name());
            assert!(other.same_rows < 0.1, "{}: {other:?}", kv.name());
        }
    }
}

/// A smoke test: a flipped code changes all that follows.
#[test]
fn a_long_sequence() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        for (kv, name) in [(KvType::Mixed, "logits_kvq_len64"), (KvType::Int8, "logits_kvq8_len64")] {
            let ours = run::logits(&gguf, &golden.tokens(64), Way { kv, ..INT8 });
            let agreement = mobile::agreement(&golden.array(name), &ours);
            println!("{kind}, {}: {agreement:?}", kv.name());
            assert!(agreement.distance <= 0.13 && agreement.kl <= 0.08 && agreement.same_best >= 0.80, "{agreement:?}");
        }
    }
}
