//! Static int8 execution against reference data of two other implementations (`../shared/golden-mobile`), skipped with a note
//! where that is absent.
//!
//! Rounding makes the forward pass discontinuous: a value one ulp from a boundary moves a whole step, and one flipped code
//! changes everything after it. So integers are compared exactly where the reference itself is certain of them; without rounding
//! logits are compared by a bound; with rounding by the share of rows that agree, over short sequences and over single layers that
//! are given the reference's input. Bounds are those at which correct implementations pass and wrong ones (another tie rule, scales
//! in half precision, no rounding of one side) fail.

mod common;

use std::sync::{Arc, Mutex};

use common::mobile::{self, relative};
use common::run::{self, EXACT, INT8, Way};
use common::{max_abs_difference, median};
use gemrun::forward::{State, Want, forward};
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::ops::rms_norm;
use gemrun::team::Team;
use gemrun::weight::{ActsBufs, Numerics, acts, multiply};
use gemrun_simd::{Isa, Rows, Tile};

/// As in the checkpoint; keys and values as computed.
const STATIC: Way = INT8;

/// The first linear layer, integer for integer.
#[test]
fn the_first_product_is_exact() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let model = Model::load(&gguf, &Numerics::default()).unwrap();
        let tokens = golden.tokens(7);
        let dim = model.config.dim;
        let mut x = vec![0.0; tokens.len() * dim];
        for (x, &token) in x.chunks_exact_mut(dim).zip(&tokens) {
            model.token_embd.look_up(token as usize, x);
            model.ops.scale(x, (dim as f32).sqrt());
        }
        let team = Team::new(1).unwrap();
        let mut h = vec![0.0; x.len()];
        let layer = &model.layers[0];
        rms_norm(model.ops, &team, &mut h, &x, &layer.attn_norm, model.config.eps);
        let mut bufs = ActsBufs::default();
        let [h] = acts(model.ops, &team, &mut bufs, &h, [&layer.attn_q]);
        let codes: Vec<f32> = h.q.iter().map(|&q| f32::from(q)).collect();
        assert_eq!(codes, golden.array("l0_q_proj_in_int8_len7").values, "{kind}");

        let rows = layer.attn_q.rows();
        let ones = vec![1.0; rows];
        let unscaled = gemrun_simd::Acts { scale: &ones[..tokens.len()], ..h };
        let mut sums = vec![0.0; tokens.len() * rows];
        let w = Rows { bytes: layer.attn_q.stored(), scale: &ones };
        layer.attn_q.kernel().matmul(w, &unscaled, &mut Tile::whole(&mut sums, rows));
        assert_eq!(sums, golden.array("l0_q_proj_acc_int32_len7").values, "{kind}");

        let mut out = vec![0.0; tokens.len() * rows];
        multiply(model.ops, &team, [(h, &layer.attn_q, &mut out)]);
        let step = model.config.static_scales(0, "attn_q").unwrap().output;
        let codes: Vec<f32> = out.iter().map(|y| (y / step).round()).collect();
        assert_eq!(codes, golden.array("l0_q_proj_out_int8_len7").values, "{kind}");
    }
}

/// f32 activations: a continuous function, so a bound at every position. Also what tells that the integers and scales of every
/// matrix are right.
#[test]
fn without_rounding() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let expected = golden.array("logits_nosrq_len64");
        let ours = run::logits(&gguf, &golden.tokens(64), EXACT);
        let worst = max_abs_difference(expected.values.iter().copied(), ours.iter().copied());
        let mean = mean_difference(&expected.values, &ours);
        println!("{kind}: {worst:.1e}, on average {mean:.1e}");
        assert!(worst <= 5e-4 && mean <= 5e-5, "{kind}: {worst:e}, on average {mean:e}");
    }
}

#[test]
fn one_token() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let expected = golden.array("logits_len1");
        let worst = max_abs_difference(expected.values, run::logits(&gguf, &golden.tokens(1), STATIC));
        println!("{kind}: {worst:.1e}");
        assert!(worst <= 1e-4, "{kind}: {worst:e}");
    }
}

/// 32 sequences of four tokens: the first is exact in every implementation, of the others most are.
#[test]
fn short_sequences() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        let agreement = golden.short("logits_short", |tokens| run::logits(&gguf, tokens, STATIC));
        println!("{kind}: {agreement:?}");
        assert!(agreement.same_rows >= 0.80 && agreement.same_best >= 0.95 && agreement.kl <= 0.01, "{agreement:?}");
        // The gate can fail: with f32 activations no row is the same.
        let floats = golden.short("logits_short", |tokens| run::logits(&gguf, tokens, EXACT));
        println!("{kind}, f32 activations: {floats:?}");
        assert!(floats.same_rows < 0.1 && floats.kl > 0.05, "{floats:?}");
    }
}

/// Every layer on its own: it is given the reference's input, its output is compared, and the next is given the reference's again.
#[test]
fn one_layer_at_a_time() {
    let Some(golden) = mobile::golden() else { return };
    let tokens = golden.tokens(64);
    for (kind, gguf) in golden.files() {
        let model = Model::load(&gguf, &Numerics::default()).unwrap();
        let mut state = State::new(&model, KvType::F32, tokens.len(), tokens.len()).unwrap();
        let expected = golden.array("hidden_len64");
        let layers = model.layers.len();
        let found = Arc::new(Mutex::new(Vec::new()));
        let (seen, reference) = (found.clone(), expected.values.clone());
        let size = tokens.len() * model.config.dim;
        state.tap = Some(Box::new(move |name, layer, values| match name {
            "inp_scaled" => values.copy_from_slice(&reference[..size]),
            "l_out" => {
                seen.lock().unwrap().push(values.to_vec());
                values.copy_from_slice(&reference[(layer + 1) * size..][..size]);
            }
            _ => {}
        }));
        Team::new(1).unwrap().enter(|team| forward(&model, team, &mut state, &tokens, Want::All).map(drop)).unwrap();
        let found = found.lock().unwrap();
        assert_eq!(found.len(), layers);
        let (mut shares, mut distances) = (Vec::new(), Vec::new());
        for (il, ours) in found.iter().enumerate() {
            let theirs = &expected.values[(il + 1) * size..][..size];
            let rows = || ours.chunks_exact(model.config.dim).zip(theirs.chunks_exact(model.config.dim));
            let same = rows().filter(|(a, b)| max_abs_difference(a.iter().copied(), b.iter().copied()) < 1e-4).count();
            shares.push(same as f64 / tokens.len() as f64);
            distances.push(relative(ours, theirs));
        }
        let mean = shares.iter().sum::<f64>() / layers as f64;
        let least = shares.iter().copied().fold(1.0, f64::min);
        let most = distances.iter().copied().fold(0.0, f64::max);
        println!("{kind}: same rows {mean:.3}, at least {least:.3}; distance at most {most:.1e}");
        assert!(mean >= 0.95 && least >= 0.80, "{kind}: {shares:?}");
        assert!(most <= 0.03 && median(distances.clone()) <= 1e-3, "{kind}: {distances:?}");
    }
}

/// Long sequences lose their power after a few layers; a smoke test.
#[test]
fn long_sequences() {
    let Some(golden) = mobile::golden() else { return };
    for (kind, gguf) in golden.files() {
        for len in [64, 200] {
            let expected = golden.array(&format!("logits_len{len}"));
            let agreement = mobile::agreement(&expected, &run::logits(&gguf, &golden.tokens(len), STATIC));
            println!("{kind}, {len} tokens: {agreement:?}");
            assert!(agreement.distance <= 0.13 && agreement.kl <= 0.08 && agreement.same_best >= 0.80, "{agreement:?}");
        }
    }
}

/// The numeric contract, with every kind of rounding: threads, chunks, kernels, and which of the two files.
#[test]
fn the_same_bits() {
    let Some(golden) = mobile::golden() else { return };
    let tokens = golden.tokens(64);
    let files = golden.files();
    let expected = run::logits(&files[0].1, &tokens, STATIC);
    for (kind, gguf) in &files {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            for (threads, batch) in [(1, 64), (2, 7), (3, 1), (8, 13)] {
                let way = Way { isa: Some(isa), threads, batch, ..STATIC };
                let same =
                    run::logits(gguf, &tokens, way).iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{kind} {way:?}");
            }
        }
    }
}

fn mean_difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / a.len() as f64
}
