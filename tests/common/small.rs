//! Small complete models to damage, and what a program does with a model file.
//!
//! Needs `common` and `oracle` beside it.

use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::tokenizer::Tokenizer;

use super::common::raw_gguf::File as Parts;
use super::oracle::synth::{self, Experts, Spec};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}";

/// Two layers with a cache, two that share it, per-layer embeddings.
pub fn spec() -> Spec {
    Spec {
        vocab: 512,
        dim: 64,
        layers: "SFSF",
        heads: 2,
        kv_heads_sliding: 1,
        kv_heads_full: 1,
        ff: 64,
        ff_shared: 64,
        shared: 2,
        ..Spec::per_layer(1)
    }
    .all_in("Q4_0")
}

pub fn parts(spec: &Spec) -> Parts {
    let mut parts = Parts::of(&Gguf::from_bytes("base.gguf", synth::gguf(spec)).unwrap());
    parts.set_str("tokenizer.chat_template", TEMPLATE);
    parts
}

/// The model most cases start from.
pub fn base() -> Parts {
    parts(&spec())
}

/// The same without sharing, with experts.
pub fn experts() -> Parts {
    let experts = Experts { count: 4, used: 2, ff: 32, fused_gate_up: true, output_scale: true };
    let spec = Spec { dim: 64, layers: "SF", heads: 2, ff: 64, ff_shared: 64, experts: Some(experts), ..Spec::moe(2) };
    parts(&spec.all_in("Q4_0"))
}

/// Everything `run` does with a file, in this process: load, tokenize, three tokens through the model.
pub fn use_model(bytes: Vec<u8>) -> gemrun::Result<()> {
    let gguf = Gguf::from_bytes("x.gguf", bytes)?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let model = Model::load(&gguf, &Default::default())?;
    let ids = tokenizer.encode_with_bos("the\n<|turn>\u{e9}", true);
    let mut state = State::new(&model, KvType::F32, model.config.context.min(8), 2)?;
    let team = Team::new(1)?;
    for chunk in ids[..model.config.context.min(ids.len()).min(3)].chunks(state.batch()) {
        let logits = forward(&model, &team, &mut state, chunk, Want::Last)?;
        assert_eq!(logits.len(), tokenizer.vocab_size());
    }
    tokenizer.decode(&ids, true);
    Ok(())
}
