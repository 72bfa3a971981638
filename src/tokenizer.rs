//! Text to token ids and back, built from a GGUF file's own vocabulary.
//!
//! The pipeline is that of the `tokenizers` crate with a model of ours in it ([`Bpe`](bpe::Bpe)): the crate splits
//! text at Gemma's 24 marker tokens, the model does the rest. Markers are known by their text, never by the type or
//! the id a file gives them, because published files disagree about both. Encoding text that a person typed with
//! `markers` off never yields a marker, so nobody can write `<turn|>` and end a turn.
//!
//! Decoding works on bytes; [`Decoder`] turns a stream of tokens into text without ever cutting a character.
//! Not here: chat templates (`template.rs`) and the meaning of markers in the model's output (`channel.rs`).

mod bpe;
mod vocab;

use std::path::Path;
use std::sync::Arc;

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use crate::error::{Error, Result, printable};
use crate::gguf::{Array, Gguf};
use bpe::{Bpe, SPACE};
use vocab::{Vocab, byte_of};

/// The marker tokens of Gemma 4, by text. A file need not have all of them.
pub const MARKERS: [&str; 24] = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|\"|>",
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
];

/// Tokens that end a reply. `<|tool_response>` means: the caller is to run the tool.
const STOPS: [&str; 3] = ["<eos>", "<turn|>", "<|tool_response>"];

/// Markers that are input only; with the unused tokens these are never to be sampled.
const NEVER_SAMPLED: [&str; 11] = [
    "<pad>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
];

/// Longest token text accepted; Gemma's longest is 93 bytes.
const MAX_TOKEN_BYTES: usize = 64 << 10;
/// More tokens than this are not believed. Gemma has 262,144.
const MAX_TOKENS: usize = 1 << 21;
/// `token_type` of tokens that are not shown.
const TYPE_UNKNOWN: i64 = 2;
const TYPE_CONTROL: i64 = 3;
const TYPE_BYTE: i64 = 6;

type Pipeline = TokenizerImpl<Bpe, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A file's vocabulary, ready to encode and decode. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    vocab: Arc<Vocab>,
    bpe: Bpe,
    marked: Pipeline,
    bos: u32,
    stops: Vec<u32>,
    never_sample: Vec<u32>,
    hidden: Vec<u32>, // sorted: markers, and whatever else the file calls control or unknown
}

impl Tokenizer {
    /// Builds the tokenizer of `gguf`.
    ///
    /// # Errors
    /// `Unsupported` when the file's tokenizer is not Gemma 4's; `Invalid` when the vocabulary is missing or
    /// contradicts itself (array types and lengths, ids beyond the vocabulary, malformed byte tokens).
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
        let invalid = |key: &str, what: String| Error::invalid(format!("{}: key {key}: {what}", gguf.name()));
        let required = |key: &'static str| -> Result<Array<'_>> {
            gguf.array(key)?.ok_or_else(|| invalid(key, "is missing: expected the vocabulary".into()))
        };

        const MODEL: &str = "tokenizer.ggml.model";
        match gguf.string(MODEL)? {
            Some("gemma4") => {}
            Some(other) => {
                let found = printable(&other.chars().take(40).collect::<String>());
                return Err(Error::unsupported(format!("{}: key {MODEL}: is {found}: expected gemma4", gguf.name())));
            }
            None => return Err(invalid(MODEL, "is missing: expected gemma4".into())),
        }

        const TOKENS: &str = "tokenizer.ggml.tokens";
        let tokens = required(TOKENS)?;
        let count = tokens.len();
        if count == 0 || count > MAX_TOKENS {
            return Err(invalid(TOKENS, format!("has {count} entries: expected 1 to {MAX_TOKENS}")));
        }
        let same_length = |key: &str, len: usize| match len == count {
            true => Ok(()),
            false => Err(invalid(key, format!("has {len} entries: expected {count}, one a token"))),
        };
        if let Some(scores) = gguf.array("tokenizer.ggml.scores")? {
            let _ = scores.floats()?; // only the type counts: Gemma 4 ranks by merges, the scores mean nothing
            same_length("tokenizer.ggml.scores", scores.len())?;
        }
        const TYPES: &str = "tokenizer.ggml.token_type";
        let mut types = match gguf.array(TYPES)? {
            Some(types) => {
                same_length(TYPES, types.len())?;
                Some(types.ints()?)
            }
            None => None,
        };

        let mut vocab = Vocab::with_capacity(count);
        let mut hidden = Vec::new();
        let mut never_sample = Vec::new();
        for (id, token) in tokens.strings()?.enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                return Err(invalid(
                    TOKENS,
                    format!("entry {id} has {} bytes: expected at most {MAX_TOKEN_BYTES}", token.len()),
                ));
            }
            if !vocab.push(token) {
                return Err(invalid(TOKENS, format!("entry {id} ends beyond 4 GiB of text: expected less")));
            }
            match types.as_mut().and_then(Iterator::next) {
                Some(TYPE_CONTROL | TYPE_UNKNOWN) => hidden.push(id as u32),
                Some(TYPE_BYTE) if byte_of(token).is_none() => {
                    let found = printable(&String::from_utf8_lossy(&token[..token.len().min(40)]));
                    return Err(invalid(TOKENS, format!("entry {id} is the byte token {found}: expected <0xHH>")));
                }
                _ => {}
            }
            if is_unused(token) {
                never_sample.push(id as u32);
            }
        }

        vocab.find_newlines();

        const MERGES: &str = "tokenizer.ggml.merges";
        let merges = required(MERGES)?;
        if merges.len() > 16 * MAX_TOKENS {
            return Err(invalid(MERGES, format!("has {} entries: expected fewer", merges.len())));
        }
        // A rule that can apply has two bytes at least; a file may announce any number of empty ones.
        let usable = merges.len().min(merges.raw().len().saturating_sub(8 * merges.len()) / 2);
        vocab.set_merges(usable, merges.strings()?);

        let valid_id = |key: &str, id: i128| match u32::try_from(id) {
            Ok(id) if (id as usize) < count => Ok(id),
            _ => Err(invalid(key, format!("is token {id}: expected less than {count}"))),
        };
        let mut bos = vocab.id(b"<bos>");
        let mut end = None;
        for name in ["bos", "eos", "eot", "unknown", "padding", "mask", "separator", "seperator"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let Some(id) = gguf.uint(&key)? else { continue };
            let id = valid_id(&key, id.into())?;
            match name {
                "bos" => bos = bos.or(Some(id)),
                "eos" => end = Some(id),
                _ => {}
            }
        }
        let bos =
            bos.ok_or_else(|| invalid(TOKENS, "has no <bos>: expected the token every text begins with".into()))?;
        const SUPPRESS: &str = "tokenizer.ggml.suppress_tokens";
        if let Some(suppressed) = gguf.array(SUPPRESS)? {
            if suppressed.len() > count {
                let len = suppressed.len();
                return Err(invalid(SUPPRESS, format!("has {len} entries: expected at most {count}, one a token")));
            }
            for id in suppressed.ints()? {
                never_sample.push(valid_id(SUPPRESS, id.into())?);
            }
        }

        let find = |texts: &[&str]| texts.iter().filter_map(|text| vocab.id(text.as_bytes())).collect::<Vec<_>>();
        let mut stops = find(&STOPS);
        if stops.is_empty() {
            stops.extend(end);
        }
        never_sample.extend(find(&NEVER_SAMPLED));
        never_sample.retain(|id| !stops.contains(id));
        let markers = find(&MARKERS);
        hidden.extend(&markers);
        for list in [&mut never_sample, &mut hidden] {
            list.sort_unstable();
            list.dedup();
        }

        let vocab = Arc::new(vocab);
        let bpe = Bpe { unknown: vocab.id(b"<unk>"), vocab: vocab.clone() };
        let mut marked = Pipeline::new(bpe.clone());
        let present = MARKERS.iter().filter(|text| vocab.id(text.as_bytes()).is_some());
        marked
            .add_special_tokens(present.map(|&text| AddedToken::from(text, true)))
            .map_err(|e| invalid(TOKENS, format!("cannot be searched for markers: {e}")))?;
        Ok(Tokenizer(Arc::new(Inner { vocab, bpe, marked, bos, stops, never_sample, hidden })))
    }

    /// Opens `path` and builds its tokenizer.
    ///
    /// # Errors
    /// As [`Gguf::open`] and [`Tokenizer::from_gguf`].
    pub fn open(path: &Path) -> Result<Tokenizer> {
        Tokenizer::from_gguf(&Gguf::open(path)?)
    }

    /// The ids of `text`, without BOS. With `markers`, marker texts become their tokens; without, they are plain text
    /// like any other.
    pub fn encode(&self, text: &str, markers: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        self.append(text, markers, &mut ids);
        ids
    }

    /// As [`Tokenizer::encode`], with BOS in front. A text that already begins with the BOS marker does not get a
    /// second one. BOS does not depend on the file's `add_bos_token`: Gemma needs it and published files deny it.
    pub fn encode_with_bos(&self, text: &str, markers: bool) -> Vec<u32> {
        let mut ids = vec![self.0.bos];
        self.append(text, markers, &mut ids);
        if ids.get(1) == Some(&self.0.bos) {
            ids.remove(0);
        }
        ids
    }

    /// Appends the ids of `text` to `ids`.
    pub fn append(&self, text: &str, markers: bool, ids: &mut Vec<u32>) {
        if !markers {
            return self.0.bpe.append(text, ids);
        }
        // The crate keeps 16 bytes of offsets for every byte of text: hand it long texts in pieces. Between a line
        // feed and another character is a safe place, since neither markers nor merges reach across.
        const PIECE: usize = 64 << 10;
        let mut rest = text;
        while !rest.is_empty() {
            let bytes = rest.as_bytes();
            let cut = (PIECE..bytes.len()).find(|&at| bytes[at - 1] == b'\n' && bytes[at] != b'\n');
            let (piece, tail) = rest.split_at(cut.unwrap_or(rest.len()));
            rest = tail;
            let encoding = self.0.marked.encode_fast(piece, false).expect("no step of the pipeline fails");
            ids.extend_from_slice(encoding.get_ids());
        }
    }

    /// The bytes of `ids`, which need not be UTF-8. Ids beyond the vocabulary give nothing; markers and other control
    /// tokens only with `show_markers`.
    pub fn decode(&self, ids: &[u32], show_markers: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            self.append_bytes(id, show_markers, &mut out);
        }
        out
    }

    /// The bytes token `id` stands for: its text with spaces, or its one byte. `None` beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.0.vocab.get(id)?;
        Some(self.decode(&[id], true))
    }

    fn append_bytes(&self, id: u32, show_markers: bool, out: &mut Vec<u8>) {
        let Some(mut text) = self.0.vocab.get(id) else { return };
        if !show_markers && self.0.hidden.binary_search(&id).is_ok() {
            return;
        }
        if let Some(byte) = byte_of(text) {
            return out.push(byte);
        }
        let mut space = [0; 4];
        let space = SPACE.encode_utf8(&mut space).as_bytes();
        while let Some(at) = text.windows(space.len()).position(|window| window == space) {
            out.extend_from_slice(&text[..at]);
            out.push(b' ');
            text = &text[at + space.len()..];
        }
        out.extend_from_slice(text);
    }

    /// The first token with exactly this stored text (U+2581 for a space).
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.0.vocab.id(text.as_bytes())
    }

    /// The token every text begins with.
    pub fn bos(&self) -> u32 {
        self.0.bos
    }

    /// The tokens that end a reply: `<eos>`, `<turn|>` and `<|tool_response>`, as far as the file has them.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.0.stops
    }

    /// Tokens a text model is never to produce, in order: `<unusedN>`, `[multimodal]`, media markers, padding and the
    /// like, and those the file itself suppresses. No stop token is among them.
    pub fn never_sample(&self) -> &[u32] {
        &self.0.never_sample
    }

    /// True for markers and other control tokens, which are no part of plain text.
    pub fn is_hidden(&self, id: u32) -> bool {
        self.0.hidden.binary_search(&id).is_ok()
    }

    /// Number of tokens: ids are less than this.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab.len()
    }

    /// Merge rules of the file that can never apply.
    pub fn dropped_merges(&self) -> usize {
        self.0.vocab.dropped_merges()
    }
}

/// `<unused17>`, `[multimodal]`: rows of the embedding that were never trained.
fn is_unused(token: &[u8]) -> bool {
    if token == b"[multimodal]" {
        return true;
    }
    let number = token.strip_prefix(b"<unused").and_then(|rest| rest.strip_suffix(b">"));
    number.is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

/// Turns tokens into text as they come, without cutting a character that is spread over several tokens.
///
/// Bytes that can still become a character are held back; bytes that cannot are U+FFFD, one for each invalid
/// sequence, as soon as that is certain. The texts of all calls joined are the lossy UTF-8 of all bytes joined.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    show_markers: bool,
}

impl Decoder {
    /// A decoder at the start of a text.
    pub fn new(show_markers: bool) -> Decoder {
        Decoder { pending: Vec::new(), show_markers }
    }

    /// The text that token `id` completes, often its own, sometimes none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        tokenizer.append_bytes(id, self.show_markers, &mut self.pending);
        self.complete()
    }

    /// The text at the end of the stream: a U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn complete(&mut self) -> String {
        let mut text = String::new();
        let mut bytes = self.pending.as_slice();
        while let Err(e) = std::str::from_utf8(bytes) {
            let (valid, rest) = bytes.split_at(e.valid_up_to());
            text.push_str(&String::from_utf8_lossy(valid));
            bytes = rest;
            let Some(bad) = e.error_len() else { break };
            text.push(char::REPLACEMENT_CHARACTER);
            bytes = &bytes[bad..];
        }
        if let Ok(valid) = std::str::from_utf8(bytes) {
            text.push_str(valid);
            bytes = &[];
        }
        self.pending = bytes.to_vec();
        text
    }
}
