//! The promise that logits depend on the file, the tokens and the flags that name numerics, and on nothing else:
//! not on the instruction set, the number of threads, or how the tokens were cut into chunks.
//!
//! On one machine all of these are compared bit by bit. Between machines the recorded digests do it.

mod common;
mod oracle;

use common::run::{self, EXACT, INT8, Way};
use common::{golden, raw_gguf};
use gemrun::config::{Config, LayerConfig};
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry;
use gemrun::team::Team;
use gemrun::weight::{Act, Numerics};
use gemrun_simd::Isa;
use oracle::dequant::FORMATS;
use oracle::synth::{self, Spec};
use sha2::{Digest, Sha256};

/// Digests of the logits of 64 tokens: (model, int8 activations and f16 cache, f32 activations and cache).
///
/// They may change only together with the definition of a result, and such a change belongs in the change log: every
/// saved conversation and recorded seed gives other text from then on.
const RECORDED: [(&str, &str, &str); 3] = [
    ("a_eseries", "3ced07397f04048f", "13b93432001d123f"),
    ("b_dense", "6535d1965fa6cfd8", "74f99a7df84ea642"),
    ("c_moe", "7a2a03b2a6ac7b7c", "b33c5ed0b8183303"),
];

/// The same of the mobile demo model: static int8 activations, its cache as computed and as the file wants it.
const RECORDED_MOBILE: [(KvType, &str); 2] = [(KvType::F32, "68adbc00c19f12d7"), (KvType::Mixed, "b9f68b1d40e66d21")];

fn digest(logits: &[f32]) -> String {
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    Sha256::digest(bytes)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn isas() -> impl Iterator<Item = Option<Isa>> {
    Isa::ALL.into_iter().filter(|isa| isa.supported()).map(Some)
}

#[test]
fn digests_are_the_recorded_ones() {
    for (name, int8, float) in RECORDED {
        let file = golden::path(name, &format!("{name}-q4_0-pure.gguf")).unwrap();
        let gguf = Gguf::open(&file).unwrap();
        let tokens = golden::tokens(name, 64);
        let usual = Way { kv: KvType::F16, ..INT8 };
        for isa in isas() {
            for (batch, threads) in [(64, 1), (1, 2), (7, 3), (40, 8)] {
                let way = Way { batch, threads, isa, ..usual };
                let found = digest(&run::logits(&gguf, &tokens, way));
                assert_eq!(found, int8, "{name} {way:?}");
            }
            let way = Way { isa, ..EXACT };
            let found = digest(&run::logits(&gguf, &tokens, way));
            assert_eq!(found, float, "{name} {way:?}");
        }
    }
}

#[test]
fn static_integers_have_the_recorded_digests() {
    let gguf = Gguf::from_static("demo-mobile", registry::DEMO_MOBILE).unwrap();
    let tokens: Vec<u32> = std::iter::once(2).chain((0..63).map(|i| 500 + i * 21 % 1400)).collect();
    for (kv, recorded) in RECORDED_MOBILE {
        let ways = isas().map(|isa| (isa, 64, 1)).chain([(None, 1, 2), (None, 7, 3), (None, 40, 8)]);
        for (isa, batch, threads) in ways {
            let way = Way { kv, batch, threads, isa, ..INT8 };
            assert_eq!(digest(&run::logits(&gguf, &tokens, way)), recorded, "{way:?}");
        }
    }
}

#[test]
fn every_format_on_every_isa() {
    for (i, format) in FORMATS.iter().enumerate() {
        let spec = Spec { dim: 256, ff: 256, layers: "SFS", shared: 1, ..Spec::per_layer(i as u64) };
        let file = synth::gguf(&spec.clone().all_in(format.name));
        let gguf = Gguf::from_bytes("synthetic.gguf", file).unwrap();
        let tokens = synth::tokens(&spec, 9);
        for act in [Act::Int8, Act::Float] {
            let bits = |isa, batch| -> Vec<u32> {
                let way = Way { act, isa, batch, threads: 2, ..EXACT };
                run::logits(&gguf, &tokens, way).into_iter().map(f32::to_bits).collect()
            };
            let expected = bits(Some(Isa::Scalar), 9);
            for isa in isas() {
                for batch in [9, 4, 1] {
                    assert!(bits(isa, batch) == expected, "{} {act:?} {isa:?} in chunks of {batch}", format.name);
                }
            }
        }
    }
}

/// Integers in the cache, with and without static scales, on every path; each way to store must have bits of its own.
#[test]
fn integer_caches_have_the_same_bits() {
    for name in ["a_eseries", "b_dense"] {
        let plain = Gguf::open(&golden::path(name, &format!("{name}-q4_0-pure.gguf")).unwrap()).unwrap();
        let config = Config::from_gguf(&plain).unwrap();
        let scales = |layer: &LayerConfig| if layer.sliding { (8, 0.03, 0.02) } else { (4, 0.5, 0.4) };
        let mut parts = raw_gguf::File::of(&plain);
        parts.set_kv_scales(&config.layers.iter().map(scales).collect::<Vec<_>>());
        let fixed = Gguf::from_bytes("with-scales.gguf", parts.bytes()).unwrap();
        let tokens = golden::tokens(name, 64);
        let mut all = vec![run::logits(&plain, &tokens, Way { kv: KvType::F16, ..INT8 })];
        for (gguf, kv) in
            [(&plain, KvType::Int8), (&plain, KvType::Mixed), (&fixed, KvType::Int8), (&fixed, KvType::Mixed)]
        {
            let mut bits = None;
            for isa in isas() {
                for (batch, threads) in [(64, 1), (1, 2), (7, 3)] {
                    let way = Way { kv, batch, threads, isa, ..INT8 };
                    let found = run::logits(gguf, &tokens, way);
                    assert!(found == *bits.get_or_insert_with(|| found.clone()), "{name} {way:?}");
                }
            }
            all.extend(bits);
        }
        for (i, one) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|other| one != other), "{name}: {i} is as another");
        }
    }
}

/// A prompt's tokens that stop early, at every size of chunk, leave the same cache: what follows has the bits of a run in
/// which every token went all the way.
#[test]
fn the_prompt_shortcut_changes_nothing() {
    for (name, ..) in RECORDED {
        let gguf = Gguf::open(&golden::path(name, &format!("{name}-q4_0-pure.gguf")).unwrap()).unwrap();
        let tokens = golden::tokens(name, 64);
        let (prompt, generated) = tokens.split_at(60);
        let vocab = Model::load(&gguf, &Numerics::default()).unwrap().config.vocab;
        let all = run::logits(&gguf, &tokens, Way { kv: KvType::F16, ..INT8 });
        for (shortcut, batch, threads) in [(true, 1, 1), (true, 7, 2), (true, 60, 3), (false, 60, 2), (false, 13, 1)] {
            let model = Model::load(&gguf, &Numerics { act: Act::Int8, ..Numerics::default() }).unwrap();
            let mut state = State::new(&model, KvType::F16, tokens.len(), batch).unwrap();
            state.shortcut = shortcut;
            Team::new(threads).unwrap().enter(|team| {
                for (i, chunk) in prompt.chunks(batch).enumerate() {
                    let end = i * batch + chunk.len();
                    let want = if end == prompt.len() { Want::Last } else { Want::Nothing };
                    let logits = forward(&model, team, &mut state, chunk, want).unwrap();
                    let expected = if want == Want::Last { &all[(end - 1) * vocab..end * vocab] } else { &[] };
                    assert!(logits == expected, "{name}: shortcut {shortcut}, chunks of {batch}: prompt");
                }
                for (at, token) in (prompt.len()..).zip(generated) {
                    let logits = forward(&model, team, &mut state, &[*token], Want::Last).unwrap();
                    let expected = &all[at * vocab..(at + 1) * vocab];
                    assert!(logits == expected, "{name}: shortcut {shortcut}, chunks of {batch}: token {at}");
                }
            });
        }
    }
}
