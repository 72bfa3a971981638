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
