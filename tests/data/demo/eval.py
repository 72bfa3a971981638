"""Judges a demo GGUF: right answers and perplexity on text that was never trained, and the reference files beside this one.

    python eval.py ../../../src/demo.gguf                      # figures of the file, weights dequantised by gguf-py
    python eval.py ../../../src/demo.gguf --float OUT/last.pt  # the same for the float32 parameters it was made from
    python eval.py ../../../src/demo.gguf --write              # also rewrites heldout.jsonl, heldout.txt, logits.npy, logits.json
    python eval.py ../../../src/demo.gguf --transformers       # our forward pass against transformers' Gemma4ForCausalLM

A question counts as right when greedy decoding yields every key of its fact (corpus.right); "exact" means the canonical answer.
"""
import argparse
import json
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

import corpus
import gguf_file
import model as M
import tokens as T
import train

HERE = os.path.dirname(os.path.abspath(__file__))
STOP = {T.EOS, T.TURN_END, 50}


# Held-out wordings that the first part of the training met by chance, by varying another wording.
SPOILT = {"can it run gpt with gemrun", "what exactly is repeat penalty", "tell me about system prompt", "what is --tokens", "define kv cache",
          "explain mixture of experts", "can you explain kernel", "ok, good"}


def questions():
    """The fixed selection that is stored in heldout.jsonl: fresh and new wordings, 300 of the expanded ones, all off-topic ones."""
    rows = [x for x in corpus.Corpus().heldout() if corpus.bare(x["question"]) not in SPOILT]
    variants = [x for x in rows if x["kind"] == "variant" and x["id"] != "refusal"]
    random.Random(1).shuffle(variants)
    return [x for x in rows if x["kind"] in ("fresh", "new")] + variants[:300] + [x for x in rows if x["id"] == "refusal" and x["kind"] == "variant"]


def text():
    """Plain text of the kinds the model writes, from seeds that training does not use; no line break inside a paragraph."""
    c, r = corpus.Corpus(), random.Random(20260704)
    return "\n".join(c.prose(r) for _ in range(60)) + "\n"


def answer(p, toks, ids, limit=96):
    """Greedy continuation as text."""
    n = len(ids)
    ids = list(ids)
    with torch.no_grad():
        while len(ids) - n < limit:
            best = int(M.forward(p, ids)[-1].argmax())
            if best in STOP:
                break
            ids.append(best)
    return toks.text(ids[n:])


def perplexity(p, toks, what, ctx=512):
    """(tokens predicted, mean nll): windows of `ctx` tokens that each begin with BOS and share nothing."""
    ids = toks.hf.encode(what, add_special_tokens=False).ids
    total = count = 0
    with torch.no_grad():
        for at in range(0, len(ids), ctx - 1):
            part = [T.BOS] + ids[at:at + ctx - 1]
            out = M.forward(p, part)[:-1]
            total += F.cross_entropy(out, torch.tensor(part[1:]), reduction="sum").item()
            count += len(part) - 1
    return count, total / count


def judge(p, toks, name):
    rows = questions()
    loss, exact = train.answer_scores(p, toks, rows)
    wrong = []
    right = []
    for row, same in zip(rows, exact):
        said = row["answer"] if same else answer(p, toks, toks.question(row["question"]))
        right.append(corpus.right(row, said))
        if not right[-1]:
            wrong.append((row["kind"], row["id"], row["question"], said))
    print(f"{name}: answer loss {loss:.4f} nats a token")
    kinds = [("variant", lambda x: x["kind"] == "variant" and x["id"] != "refusal"), ("fresh", lambda x: x["kind"] == "fresh"), ("new", lambda x: x["kind"] == "new"),
             ("refusal", lambda x: x["id"] == "refusal" and x["kind"] == "variant"), ("all", lambda x: True)]
    for kind, of in kinds:
        at = [i for i, x in enumerate(rows) if of(x)]
        print(f"  {kind:8} {len(at):4} questions: right {np.mean([right[i] for i in at]):.3f}, exact {np.mean([exact[i] for i in at]):.3f}")
    count, nll = perplexity(p, toks, text())
    print(f"  held-out text: {count} tokens, nll {nll:.4f}, perplexity {np.exp(nll):.3f}", flush=True)
    return wrong


def hugging_face(params):
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig
    kinds = ["sliding_attention" if s else "full_attention" for s in M.IS_SWA]
    cfg = Gemma4TextConfig(
        vocab_size=M.VOCAB, vocab_size_per_layer_input=M.VOCAB, max_position_embeddings=M.CONTEXT, rms_norm_eps=M.EPS,
        hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=M.CAP, sliding_window=M.WINDOW, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, attention_bias=False, attention_dropout=0.0,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": M.BASE_SWA},
                         "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": M.BASE_GLOBAL}},
        hidden_size=M.DIM, intermediate_size=M.FF, num_hidden_layers=M.LAYERS, layer_types=kinds, num_attention_heads=M.HEADS,
        num_key_value_heads=M.KV_HEADS, head_dim=M.HD_SWA, global_head_dim=M.HD_GLOBAL, num_kv_shared_layers=M.SHARED,
        hidden_size_per_layer_input=M.PLE, use_double_wide_mlp=True, attention_k_eq_v=False, enable_moe_block=False)
    cfg._attn_implementation = "eager"
    m = Gemma4ForCausalLM(cfg).float().eval()
    state = m.state_dict()
    left = set(state) - {"lm_head.weight"}
    for name, p in params.items():
        key = "model." + M.theirs(name.removesuffix(".weight"))
        key = key if key in state else key + ".weight"
        assert state[key].shape == p.shape, (key, state[key].shape, p.shape)
        state[key] = p.clone()
        left.discard(key)
    print("kept as transformers made them:", sorted(left))
    state["lm_head.weight"] = params["token_embd.weight"].clone()
    m.load_state_dict(state)
    m.tie_weights()
    return m


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("file")
    ap.add_argument("--float")
    ap.add_argument("--write", action="store_true")
    ap.add_argument("--transformers", action="store_true")
    ap.add_argument("--wrong", action="store_true", help="print the wrong answers")
    args = ap.parse_args()
    params, toks = gguf_file.read(args.file)
    ids = toks.chat([("user", "What is gemrun?"), ("model", canonical("what-is-gemrun"))])[0][:32]
    if args.transformers or args.write:
        m = hugging_face(params)
        with torch.no_grad():
            ref = m(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            long = toks.hf.encode(text(), add_special_tokens=False).ids[:300]
            far = m(input_ids=torch.tensor([long]), use_cache=False).logits[0]
            print("transformers: largest difference of a logit", float((ref - M.forward(params, ids)).abs().max()),
                  "over 32 tokens,", float((far - M.forward(params, long)).abs().max()), "over 300")
        if args.write:
            np.save(os.path.join(HERE, "logits.npy"), ref.numpy().astype(np.float32))
            json.dump(dict(ids=ids, about="logits.npy: float32 [32, 2048] of transformers' Gemma4ForCausalLM on the dequantised weights of src/demo.gguf"),
                      open(os.path.join(HERE, "logits.json"), "w"))
            open(os.path.join(HERE, "heldout.txt"), "w").write(text())
            with open(os.path.join(HERE, "heldout.jsonl"), "w") as f:
                for row in questions():
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
        if args.transformers:
            return
    with torch.no_grad():
        if args.float:
            judge(torch.load(args.float), toks, "float32 parameters")
        wrong = judge(params, toks, os.path.basename(args.file))
    if args.wrong:
        for w in wrong:
            print("  wrong:", *w, sep=" | ")


def canonical(id):
    return corpus.Corpus().by_id[id].answer


if __name__ == "__main__":
    main()
