//! Runs the engine on a file for tests: the whole sequence in chunks, logits of every position.

use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::weight::{Act, Numerics};
use gemrun_simd::{Choice, Isa};

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

/// Logits of every position: (tokens, vocab).
pub fn logits(gguf: &Gguf, tokens: &[u32], way: Way) -> Vec<f32> {
    let kernel = Choice { isa: way.isa.unwrap_or(Isa::best()), ..Choice::default() };
    let model = Model::load(gguf, &Numerics { act: way.act, kernel }).unwrap();
    let mut state = State::new(&model, way.kv, tokens.len(), way.batch).unwrap();
    let mut logits = Vec::new();
    Team::new(way.threads).unwrap().enter(|team| {
        for chunk in tokens.chunks(way.batch) {
            logits.extend(forward(&model, team, &mut state, chunk, Want::All).unwrap());
        }
    });
    logits
}
