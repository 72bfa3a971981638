"""Trains the mobile version of the demo model: 2, 4 and 8 bit rows, int8 activations on static scales, integer keys and values.

    python mobile.py OUT --start ../../../src/demo.gguf --minutes 45      # OUT/mobile.pt, OUT/mobile.csv
    python mobile_file.py OUT CHECKPOINT                                  # then `gemrun convert CHECKPOINT -o demo-mobile.gguf`

One idea: every number that the file will hold as an integer is rounded in the forward pass and its scale, one for a row of
weights or for a whole activation, is learned beside the weights; the gradient passes a rounding as if it were not there and
stops where it saturates (learned step sizes). It starts from the demo model, which also serves as the teacher. A run is a
series of slices: each goes on where the last one stopped, so that a busy machine can be given back in between.
"""
import argparse
import csv
import json
import math
import os
import random
import time

import torch
import torch.nn.functional as F

import corpus
import eval as E
import gguf_file
import model as M
import train

LR, SCALE_LR, WARMUP, SEED = 8e-4, 8e-4, 40, 11
ROUND_ACTS, ROUND_KV = 0.06, 0.35      # shares of the time from which activations, and keys and values, are rounded
TEACHER = 0.5                          # share of the loss that is the distance to the teacher's probabilities
TABLES = ("token_embd", "output", "per_layer_token_embd")
SIBLINGS = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "ffn_gate": "ffn", "ffn_up": "ffn"}


def linears(layer):
    kv = ["attn_k", "attn_v"] if layer < M.OWNERS else []
    return ["attn_q", *kv, "attn_output", "ffn_gate", "ffn_up", "ffn_down", "inp_gate", "proj"]


def bits(name):
    """Width of the integers of a matrix; None for those that stay BF16. The map of Google's E2B."""
    if name in TABLES:
        return 4 if name == "per_layer_token_embd" else 2
    if not name.startswith("blk."):
        return None
    _, layer, role = name.split(".")
    if role in ("inp_gate", "proj"):
        return 8
    return 2 if role.startswith("ffn_") and int(layer) >= M.OWNERS else 4


def kv_bits(layer):
    return 8 if M.IS_SWA[layer] else 4


def site(name, side):
    """Name of the activation scale on the `in` or `out` side of a matrix. Matrices that read the same input share one."""
    _, layer, role = name.split(".")
    return f"blk.{layer}.{SIBLINGS.get(role, role) if side == 'in' else role}.{side}"


def sites():
    names = {site(f"blk.{i}.{role}", side): 8 for i in range(M.LAYERS) for role in linears(i) for side in ("in", "out")}
    return names | {f"blk.{i}.{which}": kv_bits(i) for i in range(M.OWNERS) for which in ("k", "v")}


class Grid(torch.autograd.Function):
    """x on the grid of `bits`-bit integers times exp(log): rounded half to even, saturating."""

    @staticmethod
    def forward(ctx, x, log, bits):
        s = log.exp()
        v = x / s
        q = v.round().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)
        ctx.save_for_backward(v, q, s)
        return q * s

    @staticmethod
    def backward(ctx, grad):
        v, q, s = ctx.saved_tensors
        error = q - v
        inside = error.abs() <= 0.5
        # d(q s)/d(log s) is (q - v) s inside the grid and q s where it saturates; divided by the root of how many share it.
        slope = (grad * torch.where(inside, error, q)).sum_to_size(s.shape) * s * (s.numel() / v.numel()) ** 0.5
        return grad * inside, slope, None


class Bf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, grad):
        return grad


def least_error(x, bits, steps=48):
    """Scale for each row of x, (rows, 1), that rounds it with the least squared error."""
    top = x.abs().amax(1, keepdim=True).clamp_min(1e-8) / (1 << bits - 1)
    best, found = torch.full_like(top, math.inf), top.clone()
    for k in range(steps):
        s = top * (1.06 - 0.9 * k / steps)
        err = ((torch.round(x / s).clamp(-(1 << bits - 1), (1 << bits - 1) - 1) * s - x) ** 2).sum(1, keepdim=True)
        found = torch.where(err < best, s, found)
        best = torch.minimum(err, best)
    return found


class Mobile:
    """A net for `model.hidden`: weights rounded; activations, and keys and values, if asked for."""

    def __init__(self, params, acts, kv):
        self.params, self.acts, self.kv = params, acts, kv
        self.memo, self.last = {}, (None, None, None)
        self.seen = None                       # site -> largest values, while calibrating

    def vector(self, name):
        return Bf16.apply(self.params[name + ".weight"])

    def rows(self, name, tokens):
        w = F.embedding(tokens, self.params[name + ".weight"])
        log = F.embedding(tokens, self.params[name + ".log"])          # one scale a row, or one for each layer's part of it
        return Grid.apply(w.unflatten(-1, (log.shape[-1], -1)), log[..., None], bits(name)).flatten(-2)

    def matrix(self, name):
        if name not in self.memo:
            w, b = self.params[name + ".weight"], bits(name)
            self.memo[name] = Grid.apply(w, self.params[name + ".log"], b) if b else Bf16.apply(w)
        return self.memo[name]

    def rounded(self, x, where, on, b=8):
        if self.seen is not None:
            self.seen.setdefault(where, []).append(x.detach().flatten()[torch.randint(x.numel(), (4096,))])
            self.seen[where].append(x.detach().abs().amax().view(1))
        return Grid.apply(x, self.params[where], b) if on else x

    def linear(self, name, x):
        if not name.startswith("blk."):
            return F.linear(x, self.matrix(name))
        where = site(name, "in")
        if self.last[0] is not x or self.last[1] != where:             # siblings read what was rounded once
            self.last = x, where, self.rounded(x, where, self.acts)
        return self.rounded(F.linear(self.last[2], self.matrix(name)), site(name, "out"), self.acts)

    def keep(self, layer, k, v):
        b = kv_bits(layer)
        return self.rounded(k, f"blk.{layer}.k", self.kv, b), self.rounded(v, f"blk.{layer}.v", self.kv, b)


def begin(params):
    """Parameters of the demo model, a head of its own, and first scales: of weights by least error, of activations 1."""
    out = {n: p.clone() for n, p in params.items()}
    out["output.weight"] = out["token_embd.weight"].clone()
    for name in [n.removesuffix(".weight") for n, p in out.items() if p.dim() == 2]:
        if b := bits(name):
            parts = M.LAYERS if name == "per_layer_token_embd" else 1
            w = out[name + ".weight"]
            out[name + ".log"] = least_error(w.reshape(w.shape[0] * parts, -1), b).log().view(-1, parts)
    return out | {where: torch.zeros(()) for where in sites()}


def calibrate(params, source, steps=12):
    """First scales of activations: the least squared error on what the rounded weights make of some text."""
    seen = {}
    with torch.no_grad():
        for _ in range(steps):
            tokens, positions, doc, _ = next(source)
            net = Mobile(params, False, False)
            net.seen = seen
            M.hidden(net, tokens, positions, M.masks(positions, doc))
        for where, b in sites().items():
            params[where].copy_(least_error(torch.cat(seen[where])[None], b, 96).log()[0, 0])


def loss_of(net, teacher, a):
    tokens, positions, doc, learn = a
    mask = M.masks(positions[:, :-1], doc[:, :-1])
    pick = (learn[:, 1:] == 1) & (doc[:, 1:] == doc[:, :-1])
    target = tokens[:, 1:][pick]
    ours = M.logits(net, M.hidden(net, tokens[:, :-1], positions[:, :-1], mask)[pick])
    with torch.no_grad():
        soft = M.logits(teacher, M.hidden(teacher, tokens[:, :-1], positions[:, :-1], mask)[pick]).softmax(-1)
    hard = F.cross_entropy(ours, target)
    return (1 - TEACHER) * hard + TEACHER * F.cross_entropy(ours, soft), hard.item()


def report(params, toks, probe):
    """Held-out figures of the rounded weights: with integers everywhere, and with float activations, keys and values."""
    with torch.no_grad():
        nll = {on: E.perplexity(Mobile(params, on, on), toks, E.text())[1] for on in (True, False)}
        loss, exact = train.answer_scores(Mobile(params, True, True), toks, probe)
    return math.exp(nll[True]), math.exp(nll[False]), loss, sum(exact) / len(exact)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("work")
    ap.add_argument("--start", default="../../../src/demo.gguf")
    ap.add_argument("--minutes", type=float, default=45, help="of training, all slices together")
    ap.add_argument("--slice", type=float, default=1e9, help="minutes until this process stops")
    args = ap.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.work, exist_ok=True)
    last = os.path.join(args.work, "mobile.pt")
    teacher, toks = gguf_file.read(args.start)
    state = torch.load(last) if os.path.exists(last) else dict(params=begin(teacher), opt=None, seconds=0.0, step=0, tokens=0, slices=0, calibrated=False)
    params = {n: p.requires_grad_() for n, p in state["params"].items()}
    groups = [dict(params=[p for n, p in params.items() if n.endswith(".weight") and p.dim() == 2], weight_decay=0.01),
              dict(params=[p for n, p in params.items() if n.endswith(".weight") and p.dim() == 1], weight_decay=0.0),
              dict(params=[p for n, p in params.items() if not n.endswith(".weight")], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), fused=True)
    if state["opt"]:
        opt.load_state_dict(state["opt"])
    c, r = corpus.Corpus(), random.Random(SEED + state["slices"])
    source = train.batches(c, toks, r)
    probe = random.Random(3).sample(E.questions(), 120)
    mean, start, before, t = None, time.time(), state["seconds"], 0.0
    while t < 1 and time.time() - start < 60 * args.slice:
        t = min(1.0, state["seconds"] / (60 * args.minutes))
        acts, kv = t >= ROUND_ACTS, t >= ROUND_KV
        if acts and not state["calibrated"]:
            calibrate(params, source)
            state["calibrated"] = True
        fade = min(1, (state["step"] + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t)))
        for g, lr in zip(opt.param_groups, (LR, LR, SCALE_LR)):
            g["lr"] = lr * fade
        a = next(source)
        loss, hard = loss_of(Mobile(params, acts, kv), teacher, a)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in params.values() if p.grad is not None], 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean = hard if mean is None else 0.97 * mean + 0.03 * hard
        state["step"] += 1
        state["tokens"] += a.shape[1] * (a.shape[2] - 1)
        state["seconds"] = before + time.time() - start
        if state["step"] % 50 == 0:
            print(f"{state['step']} {state['seconds']:.0f}s loss {mean:.4f}", flush=True)
    state |= dict(params={n: p.detach() for n, p in params.items()}, opt=opt.state_dict(), slices=state["slices"] + 1)
    torch.save(state, last + ".part")
    os.replace(last + ".part", last)
    row = [f"{state['seconds'] / 60:.1f}", state["step"], state["tokens"], int(t >= ROUND_ACTS), int(t >= ROUND_KV), f"{mean:.4f}",
           *(f"{x:.4f}" for x in report(state["params"], toks, probe))]
    path = os.path.join(args.work, "mobile.csv")
    fresh = not os.path.exists(path)
    with open(path, "a") as f:
        table = csv.writer(f)
        if fresh:
            table.writerow("minutes steps tokens int8 int_kv train_loss heldout_ppl_int8 heldout_ppl_float_acts answer_loss answers_exact".split())
        table.writerow(row)
    print(*row, flush=True)
    json.dump(dict(tokens=toks.tokens, merges=toks.merges), open(os.path.join(args.work, "tokens.json"), "w"), ensure_ascii=False)
    return t >= 1


if __name__ == "__main__":
    raise SystemExit(0 if main() else 3)               # 3: there is time left, start again
