"""The demo vocabulary: 2048 tokens laid out as Gemma 4's, and the chat turns as ids.

One idea: ids 0..493 and the media tokens at the tail are fixed by the real vocabulary; a byte-pair training on the corpus
fills the middle. `merges` lists every split of every token into two tokens, ordered by the id of the result, so a token
has several merge rules, as in the real one.
"""
import json
import os
import random
import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import corpus
from model import VOCAB

SPACE = "\u2581"
SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
           49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>",
           101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}
VISIBLE = {48, 49, 50, 51, 52, 100, 101}        # user-defined in the GGUF: shown, so that a parser sees them
TAIL = ["<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"]
FIRST_TRAINED = 494
BOS, EOS, TURN, TURN_END, NEWLINE, CHANNEL, CHANNEL_END = 2, 1, 105, 106, 107, 100, 101


def reserved_block():
    """Ids 0..493: specials, unused, newline runs, space runs, tag-like tokens, bytes."""
    tok, unused = {}, 0

    def fill(i):
        nonlocal unused
        if i in SPECIAL:
            tok[i] = SPECIAL[i]
        elif i == 5:
            tok[i] = "[multimodal]"
        else:
            tok[i] = f"<unused{unused}>"
            unused += 1
    for i in range(107):
        fill(i)
    for k in range(1, 32):
        tok[106 + k] = "\n" * k
    for k in range(2, 32):
        tok[136 + k] = SPACE * k
    for i, t in zip(range(168, 238), real_tags()):
        tok[i] = t
    for b in range(256):
        tok[238 + b] = "<0x%02X>" % b
    return tok, unused


def real_tags():
    here = os.path.dirname(os.path.abspath(__file__))
    return open(os.path.join(here, "tags.txt")).read().split()


def train(text_lines):
    """A list of VOCAB tokens and the merge rules."""
    tok, unused = reserved_block()
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Replace(" ", SPACE)
    t.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\d|\n+|\u2581?[A-Za-z']+|\u2581?[^A-Za-z'\d\n\u2581]+|\u2581"), "isolated")
    alphabet = [chr(c) for c in range(33, 127)] + [SPACE, "\t"] + list("äöüßéèçñåø“”‘’…–—°€½")
    free = VOCAB - FIRST_TRAINED - len(TAIL)
    t.train_from_iterator(text_lines, trainers.BpeTrainer(
        vocab_size=free + 60, limit_alphabet=len(alphabet), initial_alphabet=alphabet, show_progress=False, min_frequency=2))
    learned = [w for w, _ in sorted(t.get_vocab().items(), key=lambda kv: kv[1])]
    taken = set(tok.values()) | set(TAIL)
    singles = [w for w in learned if len(w) == 1 and w not in taken and w != "\n"]
    multi = [w for w in learned if len(w) > 1 and w not in taken and "\n" not in w and not re.fullmatch(SPACE + "+", w)]
    multi = multi[:free - len(singles)]
    assert len(multi) + len(singles) == free, (len(multi), len(singles), free)
    for i, w in enumerate(multi + singles + TAIL):
        tok[FIRST_TRAINED + i] = w
    tokens = [tok[i] for i in range(VOCAB)]
    assert len(set(tokens)) == VOCAB
    return tokens, merge_rules(tokens)


def is_plain(w, tags):
    return not (w in SPECIAL.values() or w in TAIL or w in tags or w == "[multimodal]" or re.fullmatch(r"<unused\d+>|<0x[0-9A-F]{2}>", w))


def merge_rules(tokens):
    tags = set(real_tags())
    vocab = {w: i for i, w in enumerate(tokens)}
    rules = []
    for w in tokens:
        if len(w) < 2 or not is_plain(w, tags):
            continue
        splits = [(w[:k], w[k:]) for k in range(1, len(w))]
        splits = [(l, r) for l, r in splits if l in vocab and r in vocab and is_plain(l, tags) and is_plain(r, tags)]
        rules += sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    return rules


def token_types(tokens):
    """GGUF token types: 1 normal, 3 control, 4 user-defined, 6 byte."""
    return [6 if 238 <= i < FIRST_TRAINED else 4 if i in VISIBLE else 3 if i in SPECIAL or w in TAIL else 1 for i, w in enumerate(tokens)]


def hugging_face(tokens, merges):
    """The same tokenizer as a tokenizers.Tokenizer (no BOS added)."""
    special = [dict(id=i, content=w, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for i, w in enumerate(tokens) if w in SPECIAL.values() or w in TAIL]
    return Tokenizer.from_str(json.dumps(dict(
        version="1.0", truncation=None, padding=None, added_tokens=special,
        normalizer=dict(type="Replace", pattern={"String": " "}, content=SPACE),
        pre_tokenizer=dict(type="Split", pattern={"String": " "}, behavior="MergedWithPrevious", invert=False),
        post_processor=None,
        decoder=dict(type="Sequence", decoders=[dict(type="Replace", pattern={"String": SPACE}, content=" "), dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True,
                   byte_fallback=True, ignore_merges=False, vocab={w: i for i, w in enumerate(tokens)}, merges=[list(m) for m in merges]))))


def training_text():
    """What the vocabulary is trained on: answers often, questions and other topics less."""
    c, r = corpus.Corpus(), random.Random(5)
    lines = [f.answer for f in c.facts] * 12
    lines += [corpus.plain(q) for f in c.facts for q in f.questions]
    lines += [corpus.plain(q) for q in c.off]
    lines += [corpus.story(r) for _ in range(400)]
    lines += [f"user model system thought The user asks about {f.topic}." for f in c.facts]
    return lines


class Tokens:
    """Text and conversations as ids."""

    def __init__(self, tokens, merges):
        self.tokens, self.merges = tokens, merges
        self.hf = hugging_face(tokens, merges)
        self.memo = {}

    def encode(self, text):
        ids = self.memo.get(text)
        if ids is None:
            ids = self.hf.encode(text, add_special_tokens=False).ids
            if len(self.memo) < 200000:
                self.memo[text] = ids
        return ids

    def chat(self, turns):
        """(ids, learn): the conversation as the chat template renders it; `learn` marks what the model has to say."""
        ids, learn, opened = [BOS], [False], False

        def put(new, say):
            ids.extend(new)
            learn.extend([say] * len(new))
        for role, text in turns:
            if role in ("system", "user"):
                put([TURN] + self.encode(role) + [NEWLINE], False)
                put(self.encode(text) + [TURN_END, NEWLINE], False)
            else:
                if not opened:
                    put([TURN] + self.encode("model") + [NEWLINE], False)
                if role == "thought":
                    put([CHANNEL] + self.encode("thought") + [NEWLINE] + self.encode(text) + [NEWLINE, CHANNEL_END], True)
                    opened = True
                    continue
                put(self.encode(text) + [TURN_END], True)
                put([NEWLINE], False)
                opened = False
        return ids, learn

    def question(self, text, system=None):
        """The prompt that asks `text`, up to the opening of the model's turn."""
        turns = ([("system", system)] if system else []) + [("user", text)]
        return self.chat(turns)[0] + [TURN] + self.encode("model") + [NEWLINE]

    def text(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    tokens, merges = train(training_text())
    t = Tokens(tokens, merges)
    print(len(tokens), len(merges), tokens[494:520], tokens[1850:1900])
    for s in ("What is gemrun?", "Download gemma-4-E2B_q4_0-it.gguf and type gemrun run gemma-4-E2B_q4_0-it.gguf.", "what does --top-k do\n\n  12 ü 日"):
        e = t.hf.encode(s, add_special_tokens=False)
        print(len(e.ids), e.tokens, t.text(e.ids) == s)
