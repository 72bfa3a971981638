"""Writes what mobile.py trained as a checkpoint in the layout of Google's mobile ones, reads one back, and judges it.

    python mobile_file.py OUT CHECKPOINT              # OUT/mobile.pt -> config.json, model.safetensors, tokenizer.json, ...
    python mobile_file.py --judge CHECKPOINT          # perplexity, with and without the rounding
    python mobile_file.py --judge CHECKPOINT --write  # also mobile.npy, mobile_kv.npy and mobile.json, the reference for tests
    python mobile_file.py --answers GEMRUN            # right answers to heldout.jsonl by the program

`Checkpoint` shares nothing with the training but the forward pass: it reads packed bytes and scales from the file and adds up
integers, in float64. The GGUF is made of the checkpoint by `gemrun convert`.
"""
import argparse
import json
import math
import os
import subprocess

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import corpus
import eval as E
import gguf_file
import mobile
import model as M
import tokens as T

PREFIX = "model.language_model."
HERE = os.path.dirname(os.path.abspath(__file__))
PROMPTS = ["What is gemrun?", "Once upon a time", "How do I", "Tell me a story", "gemrun runs Gemma", "a small fox"]


# ---- writing --------------------------------------------------------------------------------------------------------

def pack(q, bits):
    """Codes to bytes: code - 2 or code - 8 is the integer, the lowest bits come first; eight bits are plain."""
    if bits == 8:
        return q.to(torch.int8).contiguous()
    n = 8 // bits
    codes = (q.to(torch.int32) + (1 << bits - 1)).reshape(q.shape[0], -1, n)
    return sum(codes[..., k] << (bits * k) for k in range(n)).to(torch.uint8).contiguous()


def tensors(p):
    out = {}
    number = lambda value: torch.tensor(float(value), dtype=torch.float32)
    step = lambda where: number(p[where].exp())
    for name, w in p.items():
        if name.endswith(".weight") and not (w.dim() == 2 and mobile.bits(name.removesuffix(".weight"))):
            theirs = M.theirs(name.removesuffix(".weight"))
            out[PREFIX + theirs + ("" if theirs.endswith("layer_scalar") else ".weight")] = w.bfloat16().contiguous()
    for name in [n.removesuffix(".log") for n in p if n.endswith(".log")]:
        b, s = mobile.bits(name), p[name + ".log"].exp()
        w = p[name + ".weight"]
        q = (w.unflatten(1, (s.shape[1], -1)) / s[..., None]).round().clamp(-(1 << b - 1), (1 << b - 1) - 1).flatten(1)
        if name in ("token_embd", "per_layer_token_embd"):
            key = PREFIX + M.theirs(name)
            out |= {key + ".embedding_quantized": pack(q, b), key + ".embedding_scale": s.contiguous()}
            continue
        head = name == "output"
        key = "lm_head" if head else PREFIX + M.theirs(name)
        out |= {key + ".weight": pack(q, b), key + ".weight_scale": s.contiguous(),
                key + ".input_activation_scale": number(0) if head else step(mobile.site(name, "in")),
                key + ".output_activation_scale": number(0) if head else step(mobile.site(name, "out"))}
    for i in range(M.LAYERS):
        at = f"{PREFIX}layers.{i}.self_attn."
        out |= {at + "k_cache_scale": step(f"blk.{M.kv_source(i)}.k"), at + "v_cache_scale": step(f"blk.{M.kv_source(i)}.v")}
        if i >= M.OWNERS:                              # Google's files carry unused matrices here; so does this one
            rows = M.KV_HEADS * M.head_dim(i)
            for role in ("k_proj", "v_proj"):
                out |= {at + role + ".weight": pack(torch.zeros(rows, M.DIM), 4), at + role + ".weight_scale": torch.ones(rows, 1),
                        at + role + ".input_activation_scale": number(0), at + role + ".output_activation_scale": number(0)}
    return out


def config():
    width = lambda n: {"num_bits": n}
    inner = "language_model\\.layers\\."
    text = dict(
        model_type="gemma4_text", attention_bias=False, attention_dropout=0.0, attention_k_eq_v=False, bos_token_id=T.BOS, dtype="bfloat16",
        enable_moe_block=False, eos_token_id=T.EOS, final_logit_softcapping=M.CAP, global_head_dim=M.HD_GLOBAL, head_dim=M.HD_SWA,
        hidden_activation="gelu_pytorch_tanh", hidden_size=M.DIM, hidden_size_per_layer_input=M.PLE, intermediate_size=M.FF,
        layer_types=["sliding_attention" if s else "full_attention" for s in M.IS_SWA], max_position_embeddings=M.CONTEXT,
        num_attention_heads=M.HEADS, num_hidden_layers=M.LAYERS, num_key_value_heads=M.KV_HEADS, num_kv_shared_layers=M.SHARED,
        pad_token_id=0, rms_norm_eps=M.EPS, sliding_window=M.WINDOW, tie_word_embeddings=False, use_cache=True, use_double_wide_mlp=True,
        rope_parameters=dict(full_attention=dict(partial_rotary_factor=0.25, rope_theta=M.BASE_GLOBAL, rope_type="proportional"),
                             sliding_attention=dict(rope_theta=M.BASE_SWA, rope_type="default")),
        vocab_size=M.VOCAB, vocab_size_per_layer_input=M.VOCAB)
    return dict(
        architectures=["Gemma4ForConditionalGeneration"], model_type="gemma4", dtype="bfloat16", tie_word_embeddings=False,
        eos_token_id=[T.EOS, T.TURN_END], audio_config=None, vision_config=None, text_config=text,
        quantization_config=dict(
            quant_method="gemma", num_bits=4, quantize_embeddings=True, modules_to_not_convert=["per_layer_model_projection"],
            module_quant_configs={
                "^lm_head$": width(2), "language_model\\.embed_tokens$": width(2), "language_model\\.embed_tokens_per_layer$": width(4),
                inner + f"[0-{M.OWNERS - 1}]\\.mlp\\.": width(4), inner + "\\d+\\.mlp\\.": width(2),
                inner + "\\d+\\.per_layer_input_gate$": width(8), inner + "\\d+\\.per_layer_projection$": width(8),
                inner + "\\d+\\.self_attn\\.": width(4)}))


def tokenizer(toks):
    out = json.loads(T.hugging_face(toks.tokens, toks.merges).to_str())
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    second = {"SpecialToken": {"id": "<bos>", "type_id": 1}}
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    out["post_processor"] = dict(type="TemplateProcessing", single=[bos, a], pair=[bos, a, second, b],
                                 special_tokens={"<bos>": {"id": "<bos>", "ids": [T.BOS], "tokens": ["<bos>"]}})
    return out


def write(folder, p, toks):
    os.makedirs(folder, exist_ok=True)
    save = lambda name, what: json.dump(what, open(os.path.join(folder, name), "w"), ensure_ascii=False, indent=1)
    save_file(tensors(p), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    save("config.json", config())
    save("tokenizer.json", tokenizer(toks))
    save("tokenizer_config.json", dict(
        tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
        sot_token="<|turn>", eot_token="<turn|>", soc_token="<|channel>", eoc_token="<channel|>", clean_up_tokenization_spaces=False))
    save("generation_config.json", dict(bos_token_id=T.BOS, eos_token_id=[T.EOS, T.TURN_END], pad_token_id=0, do_sample=True,
                                        temperature=0.2, top_k=64, top_p=0.95))
    with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8", newline="") as f:
        f.write(open(gguf_file.TEMPLATE, encoding="utf-8", newline="").read())


# ---- reading --------------------------------------------------------------------------------------------------------

def unpack(b, bits):
    if bits == 8:
        return b.double()
    return torch.stack([(b >> (bits * k)) & ((1 << bits) - 1) for k in range(8 // bits)], -1).flatten(1).double() - (1 << bits - 1)


def grid(x, s, bits=8):
    return torch.clamp(torch.round(x / s), -(1 << bits - 1), (1 << bits - 1) - 1)


class Checkpoint:
    """A net for `model.hidden` that does what the checkpoint says, in float64. `acts`: activations are rounded; `kv`: keys
    and values are, to the widths given (8 bits everywhere: the scales of global layers are divided by 16)."""

    def __init__(self, folder, acts=True, kv=None):
        self.t = load_file(os.path.join(folder, "model.safetensors"))
        self.acts, self.kv, self.memo = acts, kv, {}

    def vector(self, name):
        key = PREFIX + M.theirs(name)
        return self.t[key if key in self.t else key + ".weight"].double()

    def integers(self, key, name):
        if key not in self.memo:
            self.memo[key] = unpack(self.t[key], mobile.bits(name))
        return self.memo[key]

    def rows(self, name, tokens):
        key = PREFIX + M.theirs(name)
        s = self.t[key + ".embedding_scale"].double()[tokens]
        q = self.integers(key + ".embedding_quantized", name)[tokens]
        return (q.unflatten(-1, (s.shape[-1], -1)) * s[..., None]).flatten(-2)

    def linear(self, name, x):
        if name == "per_layer_model_proj":
            return F.linear(x, self.vector(name))
        key = "lm_head" if name == "output" else PREFIX + M.theirs(name)
        s_in, s_out = (self.t[f"{key}.{side}_activation_scale"].double() if self.acts else 0 for side in ("input", "output"))
        step = s_in if s_in > 0 else 1
        y = F.linear(grid(x, s_in) if s_in > 0 else x, self.integers(key + ".weight", name)) * (self.t[key + ".weight_scale"].double()[:, 0] * step)
        return grid(y, s_out) * s_out if s_out > 0 else y

    def keep(self, layer, k, v):
        if self.kv is None:
            return k, v
        b, out = self.kv[layer], []
        for which, x in (("k", k), ("v", v)):
            s = self.t[f"{PREFIX}layers.{layer}.self_attn.{which}_cache_scale"].double() / (16 if b > mobile.kv_bits(layer) else 1)
            out.append(grid(x, s, b) * s)
        return out


MIXED = [mobile.kv_bits(i) for i in range(M.LAYERS)]
WAYS = {"int8": (True, None), "float activations": (False, None), "int8, kv mixed": (True, MIXED), "int8, kv int8": (True, [8] * M.LAYERS)}


def short(toks):
    """Sequences of four tokens: what a rounding that falls the other way can spoil of them is little."""
    return [[T.BOS] + (toks.encode(text) * 3)[:3] for text in PROMPTS]


def judge(folder, write_reference):
    _, toks = gguf_file.read(os.path.join(HERE, "../../../src/demo.gguf"))
    nets = {name: Checkpoint(folder, *way) for name, way in WAYS.items()}
    found = {}
    with torch.no_grad():
        for name, net in nets.items():
            count, nll = E.perplexity(net, toks, E.text())
            found[name] = math.exp(nll)
            print(f"{name}: {count} tokens, nll {nll:.4f}, perplexity {math.exp(nll):.4f}", flush=True)
        if write_reference:
            ids = short(toks)
            for name, file in (("int8", "mobile.npy"), ("int8, kv mixed", "mobile_kv.npy")):
                np.save(os.path.join(HERE, file), np.stack([M.forward(nets[name], row).numpy() for row in ids]).astype(np.float32))
            json.dump(dict(ids=ids, perplexity={k: round(v, 4) for k, v in found.items()},
                           about="logits of src/demo-mobile.gguf's checkpoint by mobile_file.py, exact integers and float64: mobile.npy "
                                 "[6, 4, 2048] with keys and values in float, mobile_kv.npy with 8 bits in sliding layers and 4 in global ones"),
                      open(os.path.join(HERE, "mobile.json"), "w"))


def answers(program, model, options):
    """Share of right answers of each kind, by the program itself."""
    right = {}
    for row in map(json.loads, open(os.path.join(HERE, "heldout.jsonl"), encoding="utf-8")):
        said = subprocess.run([program, "run", model, "--temp", "0", "-n", "96", *options, "--", row["question"]], capture_output=True, check=True)
        kind = "refusal" if row["id"] == "refusal" and row["kind"] == "variant" else row["kind"]
        right.setdefault(kind, []).append(corpus.right(row, said.stdout.decode().strip()))
    for kind, good in right.items():
        print(f"{kind:8} {len(good):4} questions: right {np.mean(good):.3f}")
    print(f"all      {sum(map(len, right.values())):4} questions: right {np.mean(sum(right.values(), [])):.3f}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("folders", nargs="*")
    ap.add_argument("--judge", metavar="CHECKPOINT")
    ap.add_argument("--write", action="store_true")
    ap.add_argument("--answers", metavar="GEMRUN")
    ap.add_argument("--model", default="demo-mobile")
    ap.add_argument("--option", action="append", default=[], help="handed on to the program")
    args = ap.parse_args()
    torch.set_num_threads(1)
    if args.folders:
        work, folder = args.folders
        saved = json.load(open(os.path.join(work, "tokens.json")))
        write(folder, torch.load(os.path.join(work, "mobile.pt"))["params"], T.Tokens(saved["tokens"], [tuple(m) for m in saved["merges"]]))
    if args.judge:
        judge(args.judge, args.write)
    if args.answers:
        answers(args.answers, args.model, args.option)


if __name__ == "__main__":
    main()
