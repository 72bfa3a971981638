//! Byte-pair encoding over the characters of a whole line, as a model for the `tokenizers` crate.
//!
//! Gemma has no word splitting: a line, however long, is one unit. Its symbols form a doubly linked list, the
//! possible merges wait in a heap (best rank first, then leftmost), and stale heap entries are recognised when they
//! come up, so a line of n characters costs O(n log n). Spaces become U+2581 here and runs of line feeds are looked
//! up whole, which keeps the crate's per-character offset tables out of the way. Special tokens are not known here.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

use super::vocab::{NONE, Vocab};

/// Stands for the space inside token texts.
pub(super) const SPACE: char = '\u{2581}';

/// The merge loop over a shared vocabulary.
#[derive(Clone)]
pub(super) struct Bpe {
    pub(super) vocab: Arc<Vocab>,
    pub(super) unknown: Option<u32>,
}

/// A piece of the text that is (so far) one token; `start + length` in bytes, neighbours by index.
struct Symbol {
    start: u32,
    len: u32, // 0 once merged into its left neighbour
    prev: u32,
    next: u32,
    id: u32, // NONE: a single character not looked up yet
}

/// A merge that was possible when it entered the heap. The order of the fields is the order of the heap.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
    len: u32, // of both together: differs once either has grown
    id: u32,
}

impl Bpe {
    /// Appends the ids of `text` to `ids`. No special token is recognised.
    pub(super) fn append(&self, text: &str, ids: &mut Vec<u32>) {
        let mut rest = text;
        while !rest.is_empty() {
            let newlines = rest.len() - rest.trim_start_matches('\n').len();
            let (run, tail) = match newlines {
                0 => rest.split_at(rest.find('\n').unwrap_or(rest.len())),
                _ => rest.split_at(newlines),
            };
            rest = tail;
            if newlines == 0 {
                self.append_run(run, ids);
            } else {
                self.append_newlines(run, ids);
            }
        }
    }

    /// A run of line feeds: one token if there is one of that length, else by the merge rules. Files of the Gemma 3
    /// layout have the tokens but no rules that lead to them; there the longest token comes first.
    fn append_newlines(&self, run: &str, ids: &mut Vec<u32>) {
        let known = self.vocab.newlines();
        if let Some(&id) = known.get(run.len() - 1) {
            ids.push(id);
        } else if known.is_empty() || self.vocab.merge(b"\n", b"\n").is_some() {
            self.append_run(run, ids);
        } else {
            ids.extend(std::iter::repeat_n(known[known.len() - 1], run.len() / known.len()));
            ids.extend((run.len() % known.len()).checked_sub(1).map(|i| known[i]));
        }
    }

    /// One line.
    fn append_run(&self, run: &str, ids: &mut Vec<u32>) {
        // Positions are 32-bit; a line beyond that is cut, which no text meets.
        const LONGEST: usize = 1 << 30;
        let mut rest = run;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(rest.floor_char_boundary(LONGEST.min(rest.len())));
            rest = tail;
            let text: Cow<str> = if piece.contains(' ') {
                piece.replace(' ', SPACE.encode_utf8(&mut [0; 4])).into()
            } else {
                piece.into()
            };
            self.append_symbols(&text, ids);
        }
    }

    fn append_symbols(&self, text: &str, ids: &mut Vec<u32>) {
        let bytes = text.as_bytes();
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            let i = symbols.len() as u32;
            let prev = i.wrapping_sub(1); // of the first symbol: NONE
            symbols.push(Symbol { start: at as u32, len: c.len_utf8() as u32, prev, next: i + 1, id: NONE });
        }
        let Some(last) = symbols.last_mut() else { return };
        last.next = NONE;

        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let (a, b) = (&symbols[left as usize], &symbols[right as usize]);
            let (start, middle, end) = (a.start as usize, b.start as usize, (b.start + b.len) as usize);
            let merge = self.vocab.merge(&bytes[start..middle], &bytes[middle..end])?;
            Some(Reverse(Candidate { rank: merge.rank, left, right, len: a.len + b.len, id: merge.result }))
        };
        let first: Vec<_> =
            (1..symbols.len() as u32).filter_map(|right| candidate(&symbols, right - 1, right)).collect();
        let mut heap = BinaryHeap::from(first);

        while let Some(Reverse(best)) = heap.pop() {
            let (left, right) = (best.left as usize, best.right as usize);
            let current = symbols[left].next == best.right
                && symbols[left].len != 0
                && symbols[left].len + symbols[right].len == best.len;
            if !current {
                continue;
            }
            let after = symbols[right].next;
            symbols[right].len = 0;
            symbols[left].len = best.len;
            symbols[left].next = after;
            symbols[left].id = best.id;
            if after != NONE {
                symbols[after as usize].prev = best.left;
                heap.extend(candidate(&symbols, best.left, after));
            }
            let before = symbols[left].prev;
            if before != NONE {
                heap.extend(candidate(&symbols, before, best.left));
            }
        }

        let mut at = 0;
        while at != NONE {
            let symbol = &symbols[at as usize];
            at = symbol.next;
            if symbol.id != NONE {
                ids.push(symbol.id);
            } else {
                self.append_character(&bytes[symbol.start as usize..(symbol.start + symbol.len) as usize], ids);
            }
        }
    }

    /// A character no rule touched: its token, or one token a byte, or `<unk>` where the file lacks byte tokens.
    fn append_character(&self, character: &[u8], ids: &mut Vec<u32>) {
        if let Some(id) = self.vocab.id(character) {
            return ids.push(id);
        }
        let before = ids.len();
        ids.extend(character.iter().filter_map(|&byte| self.vocab.byte(byte)));
        if ids.len() != before + character.len() {
            ids.truncate(before);
            ids.extend(self.unknown);
        }
    }
}

/// What the `tokenizers` crate asks of a model. Token texts are left empty: only ids are used.
impl Model for Bpe {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let mut ids = Vec::new();
        self.append(sequence, &mut ids);
        Ok(ids.into_iter().map(|id| Token::new(id, String::new(), (0, 0))).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocab.id(token.as_bytes())
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        Some(String::from_utf8_lossy(self.vocab.get(id)?).into_owned())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        (0..self.vocab.len() as u32).rev().filter_map(|id| Some((self.id_to_token(id)?, id))).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.vocab.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("the vocabulary lives in its GGUF file".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}
