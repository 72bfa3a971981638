//! Whether a model fits in memory, before it is run.
//!
//! The one idea: what running takes is known from the file's header: the weights that each token reads, the cache of the whole
//! context, the buffers of the pass, the tokenizer. Compared with what the computer has left, a model fits, or fits as far
//! as each token needs it (a mixture of experts reads few of them), or would read its weights from the disk again for every
//! token, and then it is better not begun. Nothing is measured or allocated here.

use crate::config::Config;
use crate::forward::State;
use crate::kv::{Kv, KvType};
use crate::model::Model;

/// Bytes that running a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Weights that every token reads.
    pub hot: u64,
    /// All weights that some token reads: with experts more than `hot`.
    pub weights: u64,
    /// The cache, when the context is full.
    pub cache: u64,
    /// Buffers, the tokenizer, the program.
    pub other: u64,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// All of it stays in memory.
    Fits,
    /// A token's weights fit, but not those of all experts: some are read from the disk now and then.
    Pages,
    /// Each token would wait for the disk.
    Refused,
}

/// Bytes of the program and of a few rows of embedding tables.
const PROGRAM: u64 = 32 << 20;
/// Bytes of the tokenizer's tables for each token of the vocabulary, about.
const TOKEN: u64 = 160;

/// The contexts to choose from where none is asked for. Longer ones than the first make prompts a patient person's business.
const CONTEXTS: [usize; 6] = [32_768, 16_384, 8192, 4096, 2048, 1024];
/// The part of what the weights leave that a chosen context's cache may take.
const CACHE_SHARE: u64 = 4;

impl Need {
    /// Of `model` with a cache for `context` tokens of type `kv`, fed by chunks of at most `batch`.
    pub fn of(model: &Model, kv: KvType, context: usize, batch: usize) -> Need {
        let weights: usize = model.weights().map(|weight| weight.bytes()).sum();
        let config = &model.config;
        Need {
            hot: model.bytes_per_token() as u64,
            weights: (weights as u64).max(model.bytes_per_token() as u64),
            cache: cache(config, kv, context, batch),
            other: PROGRAM + TOKEN * config.vocab as u64 + State::buffer_bytes(config, context, batch) as u64,
        }
    }

    /// With `usable` bytes of memory.
    pub fn fit(&self, usable: u64) -> Fit {
        let beside = self.cache + self.other;
        match usable {
            _ if usable >= self.weights + beside => Fit::Fits,
            _ if self.weights > self.hot && usable >= self.hot + beside => Fit::Pages,
            _ => Fit::Refused,
        }
    }

    /// Bytes that must stay in memory.
    pub fn resident(&self) -> u64 {
        self.hot + self.cache + self.other
    }
}

/// Bytes of a full cache.
fn cache(config: &Config, kv: KvType, context: usize, batch: usize) -> u64 {
    Kv::new(config, kv, context, batch).bytes(context) as u64
}

/// The context for a conversation where none is asked for: the longest whose cache takes at most a quarter of what the rest
/// leaves of `usable` bytes (as much as there is, if nobody knows), and not more than the model was made for.
pub fn context(model: &Model, kv: KvType, batch: usize, usable: Option<u64>) -> usize {
    let trained = model.config.context;
    let suits = |context: &usize| {
        let need = Need::of(model, kv, *context, batch);
        usable.is_none_or(|usable| need.cache <= usable.saturating_sub(need.hot + need.other) / CACHE_SHARE)
    };
    let mut choices = CONTEXTS.iter().map(|context| trained.min(*context));
    choices.find(suits).unwrap_or(trained.min(CONTEXTS[CONTEXTS.len() - 1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;
    use crate::weight::Numerics;

    #[test]
    fn what_fits() {
        let dense = Need { hot: 100, weights: 100, cache: 20, other: 5 };
        assert_eq!([125, 124].map(|usable| dense.fit(usable)), [Fit::Fits, Fit::Refused]);
        let experts = Need { weights: 400, ..dense };
        assert_eq!(
            [425, 424, 125, 124].map(|usable| experts.fit(usable)),
            [Fit::Fits, Fit::Pages, Fit::Pages, Fit::Refused]
        );
    }

    #[test]
    fn the_context_follows_the_memory() {
        let gguf = Gguf::from_static("demo", include_bytes!("demo.gguf")).unwrap();
        let model = Model::load(&gguf, &Numerics::default()).unwrap();
        let trained = model.config.context;
        let chosen = |usable| context(&model, KvType::F16, 64, usable);
        assert_eq!(chosen(None), trained.min(CONTEXTS[0]));
        assert_eq!(chosen(Some(u64::MAX)), trained.min(CONTEXTS[0]));
        assert_eq!(chosen(Some(0)), trained.min(1024));
        // Just enough for the longest, and one byte less.
        let need = Need::of(&model, KvType::F16, chosen(None), 64);
        let enough = CACHE_SHARE * need.cache + need.hot + need.other;
        assert_eq!(chosen(Some(enough)), chosen(None));
        assert!(chosen(Some(enough - 1)) < chosen(None));
    }
}
