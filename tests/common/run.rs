//! Runs the engine on a file for tests: the whole sequence in chunks, logits of every position.

use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::pack::Packed;
use gemrun::team::Team;
use gemrun::weight::{Act, Numerics};
use gemrun_simd::{Choice, Isa};
use std::sync::mpsc;

/// How the engine is run; of this only `act` and `kv` may change a bit.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub act: Act,
    pub kv: KvType,
    /// Tokens in a chunk.
    pub batch: usize,
    pub threads: usize,
    /// The best instruction set to use; None for the best there is.
    pub isa: Option<Isa>,
}

/// What a file stands for, with nothing rounded but f32.
pub const EXACT: Way = Way { act: Act::Float, kv: KvType::F32, batch: 64, threads: 1, isa: None };

/// What a user gets, but for the f16 cache.
pub const INT8: Way = Way { act: Act::Auto, ..EXACT };

fn load(gguf: &Gguf, packed: Option<&Packed>, way: Way) -> Model {
    let kernel = Choice { isa: way.isa.unwrap_or(Isa::best()), ..Choice::default() };
    Model::load_packed(gguf, packed, &Numerics { act: way.act, kernel, ..Numerics::default() }).unwrap()
}

/// Logits of every position: (tokens, vocab).
pub fn logits(gguf: &Gguf, tokens: &[u32], way: Way) -> Vec<f32> {
    logits_packed(gguf, None, tokens, way)
}

/// The same with a packed copy of the file.
pub fn logits_packed(gguf: &Gguf, packed: Option<&Packed>, tokens: &[u32], way: Way) -> Vec<f32> {
    let model = load(gguf, packed, way);
    let mut state = State::new(&model, way.kv, tokens.len(), way.batch).unwrap();
    let mut logits = Vec::new();
    Team::new(way.threads).unwrap().enter(|team| {
        for chunk in tokens.chunks(way.batch) {
            logits.extend(forward(&model, team, &mut state, chunk, Want::All).unwrap());
        }
    });
    logits
}

/// Hidden states of all tokens as one chunk, (layers + 2, tokens · dim): the scaled embedding, each layer's output, the
/// output of the final norm.
pub fn hidden(gguf: &Gguf, tokens: &[u32], way: Way) -> Vec<Vec<f32>> {
    let model = load(gguf, None, way);
    let mut state = State::new(&model, way.kv, tokens.len(), tokens.len()).unwrap();
    let (sender, seen) = mpsc::channel();
    state.tap = Some(Box::new(move |tensor, _, values| {
        if ["inp_scaled", "l_out", "result_norm"].contains(&tensor) {
            sender.send(values.to_vec()).unwrap();
        }
    }));
    Team::new(way.threads)
        .unwrap()
        .enter(|team| forward(&model, team, &mut state, tokens, Want::All).map(drop))
        .unwrap();
    seen.try_iter().collect()
}
