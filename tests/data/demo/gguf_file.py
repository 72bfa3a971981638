"""Writes the demo model as a GGUF with the tensor types of Google's Q4_0 files, and reads one back as float32.

    python gguf_file.py OUT            # OUT/last.pt and OUT/tokens.json -> OUT/demo.gguf
"""
import json
import os
import sys

import gguf
import numpy as np
import torch

import model as M
import tokens as T

HERE = os.path.dirname(os.path.abspath(__file__))
TEMPLATE = os.path.join(HERE, "../../../src/template/canonical.jinja")


def pack_q4_0(w):
    """Blocks of 18 bytes: f16 scale, then byte j holds codes j (low) and j+16 (high)."""
    q, d = M.q4_0_parts(w)
    q = q.numpy().astype(np.uint8)
    scale = d.numpy().astype(np.float16).view(np.uint8).reshape(-1, 2)
    return np.concatenate([scale, q[:, :16] | q[:, 16:] << 4], 1).reshape(w.shape[0], -1)


def pack_q6_k(w):
    """Super-blocks of 210 bytes: ql[128], qh[64], i8 scales[16], f16 d; see `Q6_K` of the GGUF block formats."""
    q, scales, d = M.q6_k_parts(w)
    n = q.shape[0]
    q = (q.numpy().astype(np.int16) + 32).astype(np.uint8).reshape(n, 2, 4, 32)        # half, quarter, element
    ql = np.stack([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], 2)
    qh = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    sc = scales.numpy().reshape(n, 16).astype(np.int8).view(np.uint8)
    dd = d.numpy().astype(np.float16).reshape(n, 1).view(np.uint8)
    return np.concatenate([ql.reshape(n, 128), qh.reshape(n, 64), sc, dd], 1).reshape(w.shape[0], -1)


def write(path, params, toks):
    w = gguf.GGUFWriter(path + ".part", "gemma4")
    w.add_type("model")
    w.add_int32("general.sampling.top_k", 64)
    w.add_float32("general.sampling.top_p", 0.95)
    w.add_float32("general.sampling.temp", 0.2)
    w.add_name("gemrun demo")
    w.add_description("A small model that answers questions about gemrun; trained from scratch, no pretrained weights.")
    w.add_license("MIT OR Apache-2.0")
    a = "gemma4."
    w.add_uint32(a + "block_count", M.LAYERS)
    w.add_uint32(a + "context_length", M.CONTEXT)
    w.add_uint32(a + "embedding_length", M.DIM)
    w.add_array(a + "feed_forward_length", [M.ff_width(i) for i in range(M.LAYERS)])
    w.add_uint32(a + "attention.head_count", M.HEADS)
    w.add_uint32(a + "attention.head_count_kv", M.KV_HEADS)
    w.add_float32(a + "rope.freq_base", M.BASE_GLOBAL)
    w.add_float32(a + "rope.freq_base_swa", M.BASE_SWA)
    w.add_float32(a + "attention.layer_norm_rms_epsilon", M.EPS)
    w.add_uint32(a + "attention.key_length", M.HD_GLOBAL)
    w.add_uint32(a + "attention.value_length", M.HD_GLOBAL)
    w.add_uint32("general.file_type", 2)
    w.add_float32(a + "final_logit_softcapping", M.CAP)
    w.add_uint32(a + "attention.sliding_window", M.WINDOW)
    w.add_uint32(a + "attention.shared_kv_layers", M.SHARED)
    w.add_uint32(a + "embedding_length_per_layer_input", M.PLE)
    w.add_array(a + "attention.sliding_window_pattern", M.IS_SWA)
    w.add_uint32(a + "attention.key_length_swa", M.HD_SWA)
    w.add_uint32(a + "attention.value_length_swa", M.HD_SWA)
    w.add_uint32(a + "rope.dimension_count", M.HD_GLOBAL)
    w.add_uint32(a + "rope.dimension_count_swa", M.HD_SWA)
    w.add_uint32("general.quantization_version", 2)
    t = "tokenizer.ggml."
    w.add_string(t + "model", "gemma4")
    w.add_array(t + "tokens", toks.tokens)
    w.add_array(t + "scores", [-1000.0] * len(toks.tokens))
    w.add_array(t + "token_type", T.token_types(toks.tokens))
    w.add_array(t + "merges", [" ".join(m) for m in toks.merges])
    for name, i in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0), ("mask", 4)):
        w.add_uint32(f"{t}{name}_token_id", i)
    w.add_string("tokenizer.chat_template", open(TEMPLATE, encoding="utf-8", newline="").read())
    w.add_bool(t + "add_space_prefix", False)
    w.add_bool(t + "add_bos_token", True)
    kinds = gguf.GGMLQuantizationType
    names = list(M.shapes())
    w.add_tensor("rope_freqs.weight", M.rope_freqs())
    for name in names:
        p = params[name].to(torch.float32)
        kind = M.stored_as(name, p.shape)
        if kind == "Q4_0":
            w.add_tensor(name, pack_q4_0(p), raw_dtype=kinds.Q4_0)
        elif kind == "Q6_K":
            w.add_tensor(name, pack_q6_k(p), raw_dtype=kinds.Q6_K)
        else:
            w.add_tensor(name, p.numpy().astype(np.float16 if kind == "F16" else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(path + ".part", path)


def read(path):
    """(float32 parameters, Tokens) of a demo GGUF, dequantised by gguf-py: a second opinion on the packing above."""
    r = gguf.GGUFReader(path)
    params = {}
    for t in r.tensors:
        if t.name != "rope_freqs.weight":
            x = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
            params[t.name] = torch.from_numpy(x.reshape(tuple(int(n) for n in reversed(t.shape))).copy())
    strings = lambda key: [bytes(r.fields[key].parts[i]).decode() for i in r.fields[key].data]
    merges = []
    for m in strings("tokenizer.ggml.merges"):
        cut = m.index(" ", 1)
        merges.append((m[:cut], m[cut + 1:]))
    return params, T.Tokens(strings("tokenizer.ggml.tokens"), merges)


if __name__ == "__main__":
    saved = json.load(open(os.path.join(sys.argv[1], "tokens.json")))
    write(os.path.join(sys.argv[1], "demo.gguf"), torch.load(os.path.join(sys.argv[1], "last.pt")),
          T.Tokens(saved["tokens"], [tuple(m) for m in saved["merges"]]))
