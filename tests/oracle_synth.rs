//! The generated files themselves: complete, reproducible, and sane enough to compare engines on.

mod oracle;

use oracle::{dequant, gguf::Gguf, synth, synth::Spec};

#[test]
fn the_same_spec_gives_the_same_bytes() {
    let bytes = |seed| synth::gguf(&Spec::random(seed).all_in("Q4_K"));
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
}

/// A comparison on logits that are all alike, all capped or not finite would prove nothing.
#[test]
fn logits_are_spread_out() {
    for seed in 0..40 {
        let format = dequant::FORMATS[seed as usize % dequant::FORMATS.len()].name;
        let spec = Spec::random(seed).all_in(format);
        let logits = oracle::logits(&synth::gguf(&spec), &synth::tokens(&spec, 5));
        for row in logits {
            assert_eq!(row.len(), spec.vocab);
            let mean = row.iter().sum::<f64>() / row.len() as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / row.len() as f64;
            let deviation = variance.sqrt();
            assert!((0.5..20.0).contains(&deviation), "deviation {deviation} of {spec:?}");
        }
    }
}

#[test]
fn every_block_of_a_tensor_has_the_wanted_size() {
    for format in &dequant::FORMATS {
        let spec = Spec { dim: 256, ..Spec::dense(3).all_in(format.name) };
        let file = synth::gguf(&spec);
        let gguf = Gguf::read(&file);
        let tensor = &gguf.tensors["token_embd.weight"];
        assert_eq!(tensor.type_id, format.id);
        let values = dequant::dequantise(format, tensor.bytes, 256 * spec.vocab);
        for block in values.chunks(256) {
            let rms = (block.iter().map(|v| v * v).sum::<f32>() / 256.0).sqrt();
            assert!((0.02..0.15).contains(&rms), "{}: {rms}", format.name);
        }
    }
}

/// The variants of storage that the golden files lack: each must be read as the plain one.
#[test]
fn storage_does_not_change_the_model() {
    let experts = |fused_gate_up| synth::Experts { fused_gate_up, ..Spec::moe(7).experts.unwrap() };
    let pairs = [
        (Spec::per_layer(5), Spec { redundant_kv: true, ..Spec::per_layer(5) }),
        (Spec::per_layer(6), Spec { fused_qkv: true, ..Spec::per_layer(6) }),
        (Spec::per_layer(6), Spec { fused_qkv: true, redundant_kv: true, ..Spec::per_layer(6) }),
        (Spec::moe(7), Spec { experts: Some(experts(false)), ..Spec::moe(7) }),
        (Spec::moe(8), Spec { lists: true, alignment: 128, ..Spec::moe(8) }),
    ];
    for (plain, other) in pairs {
        let (plain, other) = (plain.all_in("Q5_1"), other.all_in("Q5_1"));
        let (plain_file, other_file) = (synth::gguf(&plain), synth::gguf(&other));
        assert_ne!(plain_file, other_file);
        let tokens = synth::tokens(&plain, 12);
        assert_eq!(oracle::logits(&plain_file, &tokens), oracle::logits(&other_file, &tokens), "{other:?}");
    }
}
