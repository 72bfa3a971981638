"""The demo model in torch: the Gemma 4 E-series forward pass, small, in float32.

One idea: the parameters carry the names of the GGUF tensors, so that export is a loop and nothing has to be mapped.
`quantise` is what Q4_0 and Q6_K storage does to a matrix; training passes gradients straight through it, export writes
the same numbers. How a matrix is multiplied and what is kept of keys and values is asked of an object (`Plain` here, others
in mobile.py), so there is one forward pass. There is no cache and no sampling here: that is gemrun's work.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

VOCAB, DIM, LAYERS, PLE = 2048, 256, 8, 64
HEADS, KV_HEADS, HD_SWA, HD_GLOBAL, FF = 4, 1, 64, 128, 256
SHARED = 4                                     # trailing layers without keys and values of their own
WINDOW, CONTEXT, EPS, CAP = 64, 2048, 1e-6, 30.0
BASE_SWA, BASE_GLOBAL = 1e4, 1e6
IS_SWA = [True, True, True, False] * 2
OWNERS = LAYERS - SHARED


def kv_source(layer):
    """The layer whose keys and values `layer` attends to: itself, or the last owner of the same class."""
    if layer < OWNERS:
        return layer
    return max(i for i in range(OWNERS) if IS_SWA[i] == IS_SWA[layer])


def head_dim(layer):
    return HD_SWA if IS_SWA[layer] else HD_GLOBAL


def ff_width(layer):
    return FF if layer < OWNERS else 2 * FF


def shapes():
    """GGUF name -> torch shape (rows, cols); the GGUF order is the reverse."""
    out = {
        "token_embd.weight": (VOCAB, DIM),
        "per_layer_token_embd.weight": (VOCAB, PLE * LAYERS),
        "per_layer_model_proj.weight": (PLE * LAYERS, DIM),
        "per_layer_proj_norm.weight": (PLE,),
        "output_norm.weight": (DIM,),
    }
    for i in range(LAYERS):
        hd, ff, b = head_dim(i), ff_width(i), f"blk.{i}."
        out[b + "attn_norm.weight"] = (DIM,)
        out[b + "attn_q.weight"] = (HEADS * hd, DIM)
        out[b + "attn_q_norm.weight"] = (hd,)
        if i < OWNERS:
            out[b + "attn_k.weight"] = (KV_HEADS * hd, DIM)
            out[b + "attn_v.weight"] = (KV_HEADS * hd, DIM)
            out[b + "attn_k_norm.weight"] = (hd,)
        out[b + "attn_output.weight"] = (DIM, HEADS * hd)
        out[b + "post_attention_norm.weight"] = (DIM,)
        out[b + "ffn_norm.weight"] = (DIM,)
        out[b + "ffn_gate.weight"] = (ff, DIM)
        out[b + "ffn_up.weight"] = (ff, DIM)
        out[b + "ffn_down.weight"] = (DIM, ff)
        out[b + "post_ffw_norm.weight"] = (DIM,)
        out[b + "inp_gate.weight"] = (PLE, DIM)
        out[b + "proj.weight"] = (DIM, PLE)
        out[b + "post_norm.weight"] = (DIM,)
        out[b + "layer_output_scale.weight"] = (1,)
    return out


# The names transformers gives the same tensors: of the whole model and of a layer.
THEIRS = {"token_embd": "embed_tokens", "per_layer_token_embd": "embed_tokens_per_layer", "per_layer_model_proj": "per_layer_model_projection",
          "per_layer_proj_norm": "per_layer_projection_norm", "output_norm": "norm"}
THEIRS_IN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "layer_output_scale": "layer_scalar",
    "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm"}


def theirs(name):
    """`blk.3.attn_q` -> `layers.3.self_attn.q_proj`."""
    part = name.split(".")
    return THEIRS[name] if len(part) == 1 else f"layers.{part[1]}.{THEIRS_IN_LAYER[part[2]]}"


def stored_as(name, shape):
    """The tensor types of Google's Q4_0 files."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "Q6_K"
    if name == "per_layer_model_proj.weight":
        return "F16"
    return "Q4_0" if len(shape) == 2 else "F32"


def fresh(seed):
    """Initial parameters. Query and key norms carry the 1/sqrt(head) scale, residual branches start small."""
    g = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes().items():
        if len(shape) == 2:
            std = {"token_embd.weight": 0.05, "per_layer_token_embd.weight": PLE ** -0.5}.get(name, shape[1] ** -0.5)
            p = torch.randn(shape, generator=g) * std
        elif name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
            p = torch.full(shape, shape[0] ** -0.25)
        elif name.endswith(("post_attention_norm.weight", "post_ffw_norm.weight", "post_norm.weight")):
            p = torch.full(shape, 0.35)
        else:
            p = torch.ones(shape)
        params[name] = p
    return params


# ---- storage: what a block format does to a matrix ------------------------------------------------------------------

def f16(x):
    return x.to(torch.float16).to(torch.float32)


def q4_0_parts(w):
    """(codes 0..15, f16 scale) of blocks of 32: the largest magnitude lands on -8, the first of equals wins."""
    b = w.reshape(-1, 32)
    v = b.gather(1, b.abs().argmax(1, keepdim=True))
    d = v / -8
    inv = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    return torch.clamp(torch.floor(b * inv + 8.5), max=15), f16(d)


def q6_k_parts(w):
    """(codes -32..31, i8 scales, f16 super-scale) of super-blocks of 256 in 16 groups of 16. Each group tries a few
    scales around the one that puts its largest magnitude on -32 and keeps the one with the least squared error."""
    b = w.reshape(-1, 16, 16)
    v = b.gather(2, b.abs().argmax(2, keepdim=True))
    best_err, best = None, None
    for steps in (32.0, 31.0, 30.5, 33.0, -31.0, -32.0):
        s = v / -steps
        inv = torch.where(s == 0, torch.zeros_like(s), 1 / s)
        q = torch.clamp(torch.round(b * inv), -32, 31)
        err = ((q * s - b) ** 2).sum(2, keepdim=True)
        if best is None:
            best_err, best = err, s
        else:
            best = torch.where(err < best_err, s, best)
            best_err = torch.minimum(err, best_err)
    top = best.gather(1, best.abs().argmax(1, keepdim=True))
    d = f16(top / -128)
    inv = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    scales = torch.clamp(torch.round(best * inv), -128, 127)
    step = d * scales
    inv = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    return torch.clamp(torch.round(b * inv), -32, 31), scales, d


def quantise(w, kind):
    """`w` after a round trip through its storage."""
    if kind == "Q4_0":
        q, d = q4_0_parts(w)
        return ((q - 8) * d).reshape(w.shape)
    if kind == "Q6_K":
        q, scales, d = q6_k_parts(w)
        return (q * (d * scales)).reshape(w.shape)
    return f16(w) if kind == "F16" else w


class Straight(torch.autograd.Function):
    """Quantised forwards, identity backwards."""

    @staticmethod
    def forward(ctx, w, kind):
        return quantise(w, kind)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def stored(params):
    """The parameters as the file will hold them, differentiable."""
    return {n: Straight.apply(p, k) if (k := stored_as(n, p.shape)) != "F32" else p for n, p in params.items()}


# ---- forward --------------------------------------------------------------------------------------------------------

def rms(x, weight=None):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


def rope_table(positions, hd, base, rotated):
    """cos and sin, (..., hd/2); pairs from `rotated` on stand still (proportional partial rotation)."""
    i = torch.arange(hd // 2, dtype=torch.float32)
    freq = base ** (-2 * i / hd)
    freq[rotated:] = 0
    phi = positions[..., None].float() * freq
    return phi.cos(), phi.sin()


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def rope_freqs():
    """The divisors stored in the file: ones for the rotated quarter, 1e30 for the rest."""
    f = np.full(HD_GLOBAL // 2, 1e30, np.float32)
    f[: HD_GLOBAL // 8] = 1
    return f


def masks(positions, document):
    """(sliding, global) boolean masks, (rows, 1, tokens, tokens): causal, inside one document."""
    n = positions.shape[1]
    i = torch.arange(n)
    ok = (i[:, None] >= i[None, :]) & (document[:, :, None] == document[:, None, :])
    near = i[:, None] - i[None, :] < WINDOW
    return (ok & near)[:, None], ok[:, None]


class Plain:
    """Parameters used as they are."""

    def __init__(self, params):
        self.params = params

    def vector(self, name):
        return self.params[name + ".weight"]

    def rows(self, name, tokens):
        return F.embedding(tokens, self.params[name + ".weight"])

    def linear(self, name, x):
        tied = name == "output" and "output.weight" not in self.params
        return F.linear(x, self.params["token_embd.weight" if tied else name + ".weight"])

    def keep(self, layer, k, v):
        return k, v


def plain(p):
    return Plain(p) if isinstance(p, dict) else p


def hidden(p, tokens, positions, mask):
    """The final normalised vector of every position, (rows, tokens, DIM). `p`: parameters, or an object like `Plain`."""
    net = plain(p)
    rows, n = tokens.shape
    x = net.rows("token_embd", tokens) * math.sqrt(DIM)
    table = net.rows("per_layer_token_embd", tokens) * math.sqrt(PLE)
    proj = (net.linear("per_layer_model_proj", x) / math.sqrt(DIM)).view(rows, n, LAYERS, PLE)
    ple = (rms(proj, net.vector("per_layer_proj_norm")) + table.view(rows, n, LAYERS, PLE)) * 2 ** -0.5
    turns = {
        True: [t[:, None] for t in rope_table(positions, HD_SWA, BASE_SWA, HD_SWA // 2)],
        False: [t[:, None] for t in rope_table(positions, HD_GLOBAL, BASE_GLOBAL, HD_GLOBAL // 8)],
    }
    cache = {}
    for i in range(LAYERS):
        w = lambda name: net.vector(f"blk.{i}.{name}")
        times = lambda name, x: net.linear(f"blk.{i}.{name}", x)
        hd, swa = head_dim(i), IS_SWA[i]
        h = rms(x, w("attn_norm"))
        split = lambda y, heads: y.view(rows, n, heads, hd).transpose(1, 2)
        q = rope(rms(split(times("attn_q", h), HEADS), w("attn_q_norm")), *turns[swa])
        if i < OWNERS:
            k = rope(rms(split(times("attn_k", h), KV_HEADS), w("attn_k_norm")), *turns[swa])
            v = rms(split(times("attn_v", h), KV_HEADS))
            cache[i] = net.keep(i, k, v)
        k, v = cache[kv_source(i)]
        o = F.scaled_dot_product_attention(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1),
                                           attn_mask=mask[0 if swa else 1], scale=1.0)
        o = times("attn_output", o.transpose(1, 2).reshape(rows, n, HEADS * hd))
        x = x + rms(o, w("post_attention_norm"))
        h = rms(x, w("ffn_norm"))
        f = times("ffn_down", F.gelu(times("ffn_gate", h), approximate="tanh") * times("ffn_up", h))
        x = x + rms(f, w("post_ffw_norm"))
        g = F.gelu(times("inp_gate", x), approximate="tanh") * ple[:, :, i]
        x = x + rms(times("proj", g), w("post_norm"))
        x = x * w("layer_output_scale")
    return rms(x, net.vector("output_norm"))


def logits(p, y):
    return CAP * torch.tanh(plain(p).linear("output", y) / CAP)


def forward(p, ids):
    """Logits of one sequence, (tokens, VOCAB)."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    return logits(p, hidden(p, tokens, positions, masks(positions, torch.zeros_like(tokens))))[0]
