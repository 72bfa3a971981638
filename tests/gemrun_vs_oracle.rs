//! The engine against the oracle on random models: the formats, shapes and lengths that the golden data lacks.
//!
//! With f32 activations the two may differ by rounding only. What the golden data has is tested in
//! `golden.rs`.

mod common;
mod oracle;

use common::raw_gguf;
use common::run::{self, Way};
use common::{kl, max_abs_difference, median};
use gemrun::config::Rope;
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::ops::RopeTable;
use gemrun::team::Team;
use gemrun::weight::{Act, Numerics};
use oracle::synth::{self, Experts, Spec};
use oracle::{Trace, dequant};

/// What the median difference of the logits may be, and the largest. Rounding in f32 gives a median of 1e-6 to 1e-5;
/// a random model amplifies it up to a thousandfold for the odd token. A mistake in the model moves logits by 0.1 and more.
const TYPICAL: f64 = 5e-5;
const WORST: f64 = 1e-2;

/// Small chunks, so that every sequence needs several.
const EXACT: Way = Way { batch: 5, ..run::EXACT };

fn gemrun(file: &[u8], tokens: &[u32], way: Way) -> Vec<f32> {
    run::logits(&Gguf::from_bytes("synthetic.gguf", file.to_vec()).unwrap(), tokens, way)
}

/// A file, tokens and what the oracle makes of them.
struct Case {
    spec: Spec,
    file: Vec<u8>,
    tokens: Vec<u32>,
    trace: Trace,
}

impl Case {
    /// Where the choice of experts hangs on less than f32 can tell, other tokens are tried.
    fn new(spec: Spec, len: usize) -> Case {
        let file = synth::gguf(&spec);
        let oracle = oracle::Model::read(&file);
        let attempts = (0..50).map(|attempt| {
            let tokens = synth::tokens(&Spec { seed: spec.seed + 1000 * attempt, ..spec.clone() }, len);
            let trace = oracle.trace(&tokens, 0);
            (tokens, trace)
        });
        let mut settled = attempts.filter(|(_, trace)| trace.router_gap > 1e-4);
        let (tokens, trace) = settled.next().expect("tokens with a clear choice of experts");
        Case { spec, file, tokens, trace }
    }

    fn check(&self, way: Way) {
        let ours = gemrun(&self.file, &self.tokens, way);
        assert_close(&self.trace.logits.concat(), &ours, || format!("{way:?} on {:?}", self.spec));
    }
}

fn assert_close(expected: &[f64], ours: &[f32], what: impl Fn() -> String) {
    let worst = max_abs_difference(expected.iter().copied(), ours.iter().copied());
    let typical = median(expected.iter().zip(ours).map(|(a, b)| (a - f64::from(*b)).abs()).collect());
    assert!(worst <= WORST && typical <= TYPICAL, "differences {worst:e}, typically {typical:e}: {}", what());
}

#[test]
fn every_format_on_random_shapes() {
    for (i, format) in dequant::FORMATS.iter().enumerate() {
        for round in 0..3 {
            let spec = Spec::random(100 * round + i as u64).all_in(format.name);
            // Blocks of 256 need rows that they divide.
            let spec = if round == 0 { Spec { dim: 256, ff: 256, ff_shared: 512, ..spec } } else { spec };
            Case::new(spec, 14).check(EXACT);
        }
    }
}

#[test]
fn every_format_beside_others() {
    for seed in 0..30 {
        let name = |i: u64| dequant::FORMATS[((seed * 7 + i * 3) % 20) as usize].name;
        let formats = vec![
            ("token_embd", name(0)),
            ("attn_q", name(1)),
            ("attn_v", name(2)),
            ("ffn_down", name(3)),
            ("model_proj", name(4)),
            ("inp_gate", name(5)),
            ("", name(6)),
        ];
        Case::new(Spec { formats, ..Spec::random(seed) }, 9).check(EXACT);
    }
}

/// Layer by layer, so that a mistake is found where it is made.
#[test]
fn hidden_states() {
    for spec in [Spec::dense(31), Spec::per_layer(32), Spec::moe(33)] {
        let case = Case::new(spec.all_in("Q4_0"), 20);
        let gguf = Gguf::from_bytes("synthetic.gguf", case.file.clone()).unwrap();
        let seen = run::hidden(&gguf, &case.tokens, EXACT);
        assert_eq!(seen.len(), case.trace.hidden.len());
        for (layer, (ours, expected)) in seen.iter().zip(&case.trace.hidden).enumerate() {
            assert_close(&expected.concat(), ours, || format!("hidden state {layer} of {:?}", case.spec));
        }
    }
}

/// Each length around the window, and windows that no chunk or block of the cache divides.
#[test]
fn window_edges() {
    for window in [1, 2, 7, 16, 63, 64, 65] {
        let spec = Spec { window, layers: "SFSS", ..Spec::dense(window as u64).all_in("Q4_0") };
        Case::new(spec.clone(), 2 * window + 3).check(Way { batch: window, ..EXACT });
        Case::new(spec, window + 1).check(Way { batch: 3, ..EXACT });
    }
}

/// Sliding and full layers, owners and sharers, all small.
fn tiny(seed: u64) -> Spec {
    let small = Spec { dim: 64, ff: 64, ff_shared: 64, window: 24, ..Spec::per_layer(seed) };
    Spec { layers: "SFSF", shared: 2, ..small }.all_in("Q8_0")
}

/// Long enough that sliding layers have overwritten their oldest positions more than once, with chunks from far below
/// the window to far above it.
#[test]
fn long_sequences() {
    let case = Case::new(tiny(11), 2000);
    for batch in [1, 17, 900] {
        case.check(Way { batch, threads: 2, ..EXACT });
    }
}

/// Tokens are added and taken back at random. What is left must be continued with the bits of a run that never held
/// anything else; a length that cannot be returned to must be refused by forgetting everything.
#[test]
fn taking_tokens_back() {
    const LEN: usize = 1600;
    const BATCH: usize = 64;
    let spec = tiny(13);
    let vocab = spec.vocab;
    let tokens = synth::tokens(&spec, LEN);
    let gguf = Gguf::from_bytes("synthetic.gguf", synth::gguf(&spec)).unwrap();
    let expected = run::logits(&gguf, &tokens, run::INT8);
    let model = Model::load(&gguf, &Numerics::default()).unwrap();
    let mut state = State::new(&model, KvType::F32, LEN, BATCH).unwrap();
    let mut random = synth::tokens(&Spec { seed: 14, vocab: 1 << 20, ..spec }, 1000).into_iter().map(|r| r as usize);
    let (mut kept, mut refused) = (0, 0);
    Team::new(1).unwrap().enter(|team| {
        while let (Some(add), Some(take)) = (random.next(), random.next()) {
            let first = state.kv.len();
            let add = (1 + add % BATCH).min(LEN - first);
            let logits = forward(&model, team, &mut state, &tokens[first..first + add], Want::All).unwrap();
            assert!(logits == &expected[first * vocab..(first + add) * vocab], "positions from {first}");
            if take % 16 == 0 || first + add == LEN {
                let wanted = (first + add).saturating_sub(take / 16 % 1000);
                match state.truncate(&model, wanted) {
                    0 if wanted > 0 => refused += 1,
                    len => {
                        assert_eq!(len, wanted);
                        kept += 1;
                    }
                }
            }
        }
    });
    println!("{kept} times taken back, {refused} times refused");
    assert!(kept > 10 && refused > 0);
}

/// Sliding layers only, so that the last logits depend on a few tokens and the oracle need not see the others.
#[test]
fn large_positions() {
    let spec = Spec { dim: 32, ff: 32, ff_shared: 32, layers: "SS", ..Spec::dense(12).all_in("Q8_0") };
    let tokens = synth::tokens(&spec, 100_000);
    let file = synth::gguf(&spec);
    let gguf = Gguf::from_bytes("synthetic.gguf", file.clone()).unwrap();
    let model = Model::load(&gguf, &Numerics { act: Act::Float, ..Numerics::default() }).unwrap();
    let mut state = State::new(&model, KvType::F32, tokens.len(), 500).unwrap();
    let ours = Team::new(2).unwrap().enter(|team| {
        let mut logits = Vec::new();
        for chunk in tokens.chunks(500) {
            logits = forward(&model, team, &mut state, chunk, Want::Last).unwrap().to_vec();
        }
        logits
    });
    // Two layers look back two windows.
    let tail = tokens.len() - 2 * spec.window;
    let trace = oracle::trace(&file, &tokens[tail..], tail);
    assert_close(trace.logits.last().unwrap(), &ours, || format!("{spec:?}"));
}

/// Angles are what suffers at large positions: those of both classes of layers against their definition.
#[test]
fn rotation_at_large_positions() {
    let (dims, positions) = (512, 262_140..262_144);
    let factors: Vec<f32> = (0..dims / 2).map(|i| if i < 64 { 1.0 } else { 1e30 }).collect();
    let ops = Numerics::default().ops();
    for (base, factors) in [(1e4, None), (1e6, Some(&factors[..]))] {
        let team = Team::new(1).unwrap();
        let mut table = RopeTable::new(Rope { base, dims }, factors);
        table.fill(&team, positions.clone());
        let x: Vec<f32> = (0..dims * positions.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        let mut ours = x.clone();
        table.rotate(ops, &team, &mut ours, 1, dims, 0);
        for (t, position) in positions.clone().enumerate() {
            let (x, ours) = (&x[t * dims..][..dims], &ours[t * dims..][..dims]);
            for i in 0..dims / 2 {
                let factor = factors.map_or(1.0, |factors| f64::from(factors[i]));
                let angle = position as f64 * f64::from(base).powf(-2.0 * i as f64 / dims as f64) / factor;
                let (a, b) = (f64::from(x[i]), f64::from(x[i + dims / 2]));
                let expected = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()];
                let difference = max_abs_difference(expected, [ours[i], ours[i + dims / 2]]);
                assert!(difference <= 1e-6, "base {base} position {position} pair {i}: {difference:e}");
            }
        }
    }
}

/// The same weights stored in another way, or run in another way: the same bits.
#[test]
fn storage_chunks_and_threads_do_not_matter() {
    let experts = |fused_gate_up| Experts { fused_gate_up, ..Spec::moe(7).experts.unwrap() };
    let pairs = [
        (Spec::per_layer(5), Spec { redundant_kv: true, lists: true, alignment: 64, ..Spec::per_layer(5) }),
        (Spec::per_layer(6), Spec { fused_qkv: true, redundant_kv: true, ..Spec::per_layer(6) }),
        (Spec::moe(7), Spec { experts: Some(experts(false)), ..Spec::moe(7) }),
    ];
    for (plain, other) in pairs {
        for (format, act) in [("Q4_0", Act::Auto), ("Q5_1", Act::Int8), ("Q2_0", Act::Float)] {
            let (plain, other) = (plain.clone().all_in(format), other.clone().all_in(format));
            let tokens = synth::tokens(&plain, 40);
            let way = Way { act, batch: 40, ..EXACT };
            let bits = |spec, way| -> Vec<u32> {
                gemrun(&synth::gguf(spec), &tokens, way).into_iter().map(f32::to_bits).collect()
            };
            let expected = bits(&plain, way);
            for (batch, threads) in [(40, 1), (1, 2), (7, 3), (40, 8)] {
                let way = Way { batch, threads, ..way };
                assert!(bits(&other, way) == expected, "{way:?} on {other:?}");
            }
        }
    }
}

/// int8 activations change logits, but not by much.
#[test]
fn int8_activations() {
    for (i, format) in dequant::FORMATS.iter().enumerate() {
        let spec = Spec { dim: 256, ff: 256, ff_shared: 256, softcap: Some(30.0), ..Spec::dense(i as u64) };
        let case = Case::new(spec.all_in(format.name), 40);
        let ours = gemrun(&case.file, &case.tokens, Way { act: Act::Int8, ..EXACT });
        let rows = case.trace.logits.iter().zip(ours.chunks_exact(512));
        let divergence = rows.map(|(exact, ours)| kl(&exact.iter().map(|&v| v as f32).collect::<Vec<_>>(), ours));
        let divergence = median(divergence.collect());
        println!("{}: {divergence:.1e}", format.name);
        assert!(divergence < 0.02, "{}: {divergence}", format.name);
    }
}

/// An f16 cache rounds keys and values to 11 bits.
#[test]
fn f16_cache() {
    let case = Case::new(Spec::per_layer(21).all_in("Q4_0"), 40);
    let ours = gemrun(&case.file, &case.tokens, Way { kv: KvType::F16, ..EXACT });
    let difference = max_abs_difference(case.trace.logits.concat(), ours);
    assert!((1e-5..0.1).contains(&difference), "{difference:e}");
}

/// A cache of integers, by static scales and by the largest magnitude: keys and values are rounded once, when they are written,
/// and all queries read them rounded, that of the same token included.
///
/// Where f32 and f64 round one value apart, all that follows changes; so sequences are short and rows are counted.
#[test]
fn integer_caches() {
    /// Tokens of a sequence, and sequences.
    const LEN: usize = 8;
    const SEQUENCES: u64 = 12;
    // Steps as a model would have.
    let scales = [(8, 0.03, 0.02), (4, 0.5, 0.4), (8, 0.02, 0.03), (4, 0.4, 0.5), (0, 0.0, 0.0)];
    let spec = Spec { layers: "SFSFS", shared: 1, window: 5, ..Spec::per_layer(22) }.all_in("Q4_0");
    let file = synth::gguf(&spec);
    let mut parts = raw_gguf::File::of(&Gguf::from_bytes("synthetic.gguf", file.clone()).unwrap());
    parts.set_kv_scales(&scales);
    let with_scales = parts.bytes();
    let mut oracle = oracle::Model::read(&file);
    for (file, fixed) in [(&file, false), (&with_scales, true)] {
        for kv in [KvType::Int8, KvType::Mixed] {
            oracle.round_kv = Some(Box::new(move |il, sliding, key, x| {
                let amax = x.iter().fold(0f64, |m, x| m.max(x.abs()));
                let four = kv == KvType::Mixed && !sliding;
                let (low, high) = if four { (-8.0, 7.0) } else { (-128.0, 127.0) };
                let finer = if four || sliding { 1.0 } else { 16.0 };
                let scale = match (fixed, key) {
                    (false, _) => amax / high,
                    (true, true) => f64::from(scales[il].1) / finer,
                    (true, false) => f64::from(scales[il].2) / finer,
                };
                x.iter_mut().for_each(|x| *x = (*x / scale).round_ties_even().clamp(low, high) * scale);
            }));
            let (mut close, mut close_without) = (0, 0);
            for seed in 0..SEQUENCES {
                let tokens = synth::tokens(&Spec { seed, ..spec.clone() }, LEN);
                let expected = oracle.trace(&tokens, 0).logits;
                let count = |kv: KvType, batch: usize| {
                    let ours = gemrun(file, &tokens, Way { kv, batch, ..EXACT });
                    let rows = expected.iter().zip(ours.chunks_exact(spec.vocab));
                    rows.filter(|(a, b)| max_abs_difference(a.iter().copied(), b.iter().copied()) < WORST).count()
                };
                close += count(kv, 1 + seed as usize % LEN);
                close_without += count(KvType::F32, LEN);
            }
            let all = SEQUENCES as usize * LEN;
            println!("{kv:?}, static {fixed}: {close} of {all} rows, {close_without} without rounding");
            assert!(close >= all * 9 / 10, "{kv:?}, static {fixed}: {close} of {all} rows");
            assert!(
                close_without <= all / 10,
                "{kv:?}, static {fixed}: {close_without} of {all} rows without rounding"
            );
        }
    }
}
