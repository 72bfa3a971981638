//! The two tables behind the tokenizer: token text ↔ id, and merge rules.
//!
//! A vocabulary of 262,144 tokens and half a million merge rules has to be ready in the time a person does not
//! notice, so nothing is allocated per entry. Token texts lie end to end in one buffer. Both hash tables are flat
//! arrays with linear probing, at most half full. A merge rule `left right` is only useful when `left + right` is a
//! token, so its row holds that token's id, the length of `left` and the rank, and a look-up compares the bytes of
//! the token: a collision costs time, never a wrong answer. The hash is keyed per process, so a file cannot be
//! crafted to collide.

use std::hash::{BuildHasher, RandomState};

use super::MARKERS;

/// An id no vocabulary reaches: marks an empty row.
pub(super) const NONE: u32 = u32::MAX;

/// Token texts by id, ids by text, merge ranks by pair of texts.
pub(super) struct Vocab {
    text: Vec<u8>,      // all token texts, end to end
    starts: Vec<u32>,   // (tokens + 1): token i is text[starts[i]..starts[i + 1]]
    by_text: Vec<u32>,  // (power of two): token ids, NONE where empty
    merges: Vec<Merge>, // (power of two): rows with result NONE are empty
    dropped_merges: usize,
    bytes: [u32; 256],  // id of <0x00> .. <0xFF>, NONE where the file has none
    newlines: Vec<u32>, // ids of 1, 2, .. line feeds, up to the first length that is no token
    key: [u64; 2],
}

/// One merge rule: the texts `left` (its length is all that is kept) and the rest of `result` become `result`.
#[derive(Clone, Copy)]
pub(super) struct Merge {
    pub(super) rank: u32,
    pub(super) result: u32,
    left: u32,
}

const EMPTY: Merge = Merge { rank: 0, result: NONE, left: 0 };

impl Vocab {
    /// An empty vocabulary with room for `tokens` tokens.
    pub(super) fn with_capacity(tokens: usize) -> Vocab {
        let random = RandomState::new();
        Vocab {
            text: Vec::with_capacity(tokens * 9),
            starts: {
                let mut starts = Vec::with_capacity(tokens + 1);
                starts.push(0);
                starts
            },
            by_text: vec![NONE; (tokens * 2).next_power_of_two()],
            merges: Vec::new(),
            dropped_merges: 0,
            bytes: [NONE; 256],
            newlines: Vec::new(),
            key: [random.hash_one(0u8), random.hash_one(1u8) | 1],
        }
    }

    /// Appends the next token; its id is the number of tokens so far. Of equal texts the first one is found by
    /// [`Vocab::id`]. False when the texts no longer fit the table (4 GiB of text, or more tokens than announced).
    pub(super) fn push(&mut self, token: &[u8]) -> bool {
        let id = self.len() as u32;
        let Ok(end) = u32::try_from(self.text.len() + token.len()) else { return false };
        if (id as usize + 1) * 2 > self.by_text.len() {
            return false;
        }
        if self.id(token).is_none() {
            let mask = self.by_text.len() - 1;
            let mut row = self.hash(token) as usize & mask;
            while self.by_text[row] != NONE {
                row = (row + 1) & mask;
            }
            self.by_text[row] = id;
            if let Some(byte) = byte_of(token) {
                self.bytes[byte as usize] = id;
            }
        }
        self.text.extend_from_slice(token);
        self.starts.push(end);
        true
    }

    /// Takes over the merge rules, best first: each is `left`, a space, `right`, where the space is the first one
    /// after the first byte. Rules without such a space, or whose result is no token, are dropped and counted, and so are
    /// rules that lead to a marker: typed text is merged by them. Of two rules for one pair the first counts. `usable`
    /// bounds the number of rules of two bytes or more.
    pub(super) fn set_merges<'a>(&mut self, usable: usize, rules: impl Iterator<Item = &'a [u8]>) {
        self.merges = vec![EMPTY; (usable * 2).next_power_of_two()];
        let mask = self.merges.len() - 1;
        let mut result = 0;
        let mut joined = Vec::new();
        let mut batch = Vec::with_capacity(64);
        for (rank, rule) in rules.enumerate() {
            let Some(left) = rule.iter().skip(1).position(|&b| b == b' ').map(|at| at + 1) else {
                self.dropped_merges += 1;
                continue;
            };
            joined.clear();
            joined.extend_from_slice(&rule[..left]);
            joined.extend_from_slice(&rule[left + 1..]);
            if joined[0] == b'<' && MARKERS.iter().any(|marker| marker.as_bytes() == joined) {
                self.dropped_merges += 1;
                continue;
            }
            // Files list the rules of one token together and tokens mostly by id: try those before hashing.
            if self.get(result) != Some(&joined) {
                result = if self.get(result + 1) == Some(&joined) {
                    result + 1
                } else if let Some(id) = self.id(&joined) {
                    id
                } else {
                    self.dropped_merges += 1;
                    continue;
                };
            }
            let (a, b) = joined.split_at(left);
            let row = self.pair_hash(a, b) as usize & mask;
            batch.push((row, Merge { rank: rank as u32, result, left: left as u32 }));
            if batch.len() == batch.capacity() {
                self.insert_merges(&mut batch);
            }
        }
        self.insert_merges(&mut batch);
    }

    /// Rows are scattered over a table larger than most caches. Reading those of a batch first, which has no purpose of
    /// its own, lets the waits for memory overlap.
    fn insert_merges(&mut self, batch: &mut Vec<(usize, Merge)>) {
        let mask = self.merges.len() - 1;
        std::hint::black_box(batch.iter().filter(|(row, _)| self.merges[*row].result == NONE).count());
        for (mut row, merge) in batch.drain(..) {
            let (a, b) = self.get(merge.result).unwrap_or_default().split_at(merge.left as usize);
            while self.merges[row].result != NONE && !self.is_merge(&self.merges[row], a, b) {
                row = (row + 1) & mask;
            }
            if self.merges[row].result == NONE {
                self.merges[row] = merge;
            }
        }
    }

    /// Looks up the runs of line feeds. To be called once, after the last token.
    pub(super) fn find_newlines(&mut self) {
        let mut run = vec![b'\n'];
        while let Some(id) = self.id(&run) {
            self.newlines.push(id);
            run.push(b'\n');
        }
    }

    /// Ids of the runs of 1, 2, .. line feeds.
    pub(super) fn newlines(&self) -> &[u32] {
        &self.newlines
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Merge rules that can never apply.
    pub(super) fn dropped_merges(&self) -> usize {
        self.dropped_merges
    }

    /// The stored bytes of token `id`.
    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.starts.get(id as usize)?, *self.starts.get(id as usize + 1)?);
        Some(&self.text[start as usize..end as usize])
    }

    /// The first token with this text.
    pub(super) fn id(&self, text: &[u8]) -> Option<u32> {
        let mask = self.by_text.len() - 1;
        let mut row = self.hash(text) as usize & mask;
        loop {
            match self.by_text[row] {
                NONE => return None,
                id if self.get(id) == Some(text) => return Some(id),
                _ => row = (row + 1) & mask,
            }
        }
    }

    /// The token that stands for one byte, `<0xHH>`.
    pub(super) fn byte(&self, byte: u8) -> Option<u32> {
        Some(self.bytes[byte as usize]).filter(|&id| id != NONE)
    }

    /// The rule that joins two neighbouring texts.
    pub(super) fn merge(&self, left: &[u8], right: &[u8]) -> Option<Merge> {
        let mask = self.merges.len().checked_sub(1)?;
        let mut row = self.pair_hash(left, right) as usize & mask;
        loop {
            let merge = self.merges[row];
            if merge.result == NONE {
                return None;
            }
            if self.is_merge(&merge, left, right) {
                return Some(merge);
            }
            row = (row + 1) & mask;
        }
    }

    fn is_merge(&self, merge: &Merge, left: &[u8], right: &[u8]) -> bool {
        merge.left as usize == left.len()
            && self.get(merge.result).is_some_and(|text| {
                text.len() == left.len() + right.len() && text.starts_with(left) && text.ends_with(right)
            })
    }

    fn pair_hash(&self, left: &[u8], right: &[u8]) -> u64 {
        fold(self.hash(left) ^ self.key[1].rotate_left(32), self.hash(right) | 1)
    }

    /// A keyed multiply-and-fold hash: each 8 bytes enter through a 64 × 64 → 128 bit product.
    fn hash(&self, text: &[u8]) -> u64 {
        let n = text.len();
        let word = |at: usize| u64::from_le_bytes(text[at..at + 8].try_into().expect("eight bytes"));
        let half = |at: usize| u64::from(u32::from_le_bytes(text[at..at + 4].try_into().expect("four bytes")));
        let mut h = self.key[0] ^ n as u64;
        let mut at = 0;
        while n - at > 16 {
            h = fold(h ^ word(at), self.key[1]);
            at += 8;
        }
        let (a, b) = match n - at {
            8.. => (word(at), word(n - 8)),
            4.. => (half(at), half(n - 4)),
            0 => (0, 0),
            left => (u64::from(text[at]) << 16 | u64::from(text[at + left / 2]) << 8 | u64::from(text[n - 1]), 0),
        };
        fold(fold(h ^ a, self.key[1]) ^ b, self.key[1])
    }
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// The byte a token of the form `<0xHH>` stands for.
pub(super) fn byte_of(token: &[u8]) -> Option<u8> {
    let &[b'<', b'0', b'x', high, low, b'>'] = token else { return None };
    let digit = |d: u8| (d as char).to_digit(16);
    Some((digit(high)? * 16 + digit(low)?) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_texts_the_first_token_is_found() {
        let mut vocab = Vocab::with_capacity(3);
        for token in [&b"a"[..], b"b", b"a"] {
            assert!(vocab.push(token));
        }
        assert_eq!((vocab.id(b"a"), vocab.get(2), vocab.len()), (Some(0), Some(&b"a"[..]), 3));
        assert!(!vocab.push(b"one more than announced") || vocab.len() <= 4);
    }

    #[test]
    fn merges_split_at_the_first_space_after_the_first_byte() {
        let mut vocab = Vocab::with_capacity(4);
        for token in [&b" b"[..], b"a c", b"ab", b""] {
            vocab.push(token);
        }
        let rules = [&b"  b"[..], b"a  c", b"nospace", b"a b", b"a b", b"x y"];
        vocab.set_merges(rules.len(), rules.iter().copied());
        assert_eq!(vocab.merge(b" ", b"b").map(|m| (m.rank, m.result)), Some((0, 0)));
        assert_eq!(vocab.merge(b"a", b" c").map(|m| (m.rank, m.result)), Some((1, 1)));
        assert_eq!(vocab.merge(b"a", b"b").map(|m| (m.rank, m.result)), Some((3, 2)), "the first of two equal rules");
        assert!(vocab.merge(b"x", b"y").is_none());
        assert_eq!(vocab.dropped_merges(), 2);
    }

    #[test]
    fn byte_tokens_are_exactly_two_hex_digits() {
        assert_eq!([byte_of(b"<0x0A>"), byte_of(b"<0xff>")], [Some(10), Some(255)]);
        for text in [&b"<0x-1>"[..], b"<0x1>", b"<0x001>", b"<0x+1>", b"0x0A", b"<0x0G>", b""] {
            assert_eq!(byte_of(text), None, "{}", String::from_utf8_lossy(text));
        }
    }
}
