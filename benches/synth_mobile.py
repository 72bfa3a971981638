#!/usr/bin/env python3
"""Write a GGUF file with the shape of Gemma 4 E2B's mobile checkpoint and random weights: 2-, 4- and 8-bit integers with a scale a
row, static int8 activations, and their widths layer by layer as in the real one. What such a model says is noise; what it costs
is not. Needs the Python packages gguf and numpy.

  synth_mobile.py OUT.gguf [--blocks] [--vocab FILE.gguf]

--blocks  TQ2_0, Q4_0 and Q8_0 under the names other programs know, as `gemrun convert --format stock` writes them (without the exact
          scales of the per-layer embedding), instead of the checkpoint's own packing
--vocab   takes tokenizer and chat template from a file with Gemma's 262144 tokens; without it the tokens are made up
"""
import argparse
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFValueType as Kind
from synth_moe import vocabulary

LAYERS, SHARED, DIM, HEADS, PLE, VOCAB, CONTEXT, WINDOW = 35, 20, 1536, 8, 256, 262144, 131072, 512
SLIDING, GLOBAL, EVERY = 256, 512, 5  # head widths; every fifth layer is global
OWNERS = LAYERS - SHARED              # layers with keys and values of their own
FF = [6144 if layer < OWNERS else 12288 for layer in range(LAYERS)]
BLOCKS = {2: Type.TQ2_0, 4: Type.Q4_0, 8: Type.Q8_0}
PIECE = 1 << 26

random = np.random.Generator(np.random.SFC64(11))


def head(layer):
    return GLOBAL if (layer + 1) % EVERY == 0 else SLIDING


def matrices(layer):
    """Role, rows, columns and bits of the matrices of a layer."""
    ff, width, mlp = FF[layer], head(layer), 4 if layer < OWNERS else 2
    yield from [("attn_q", HEADS * width, DIM, 4), ("attn_output", DIM, HEADS * width, 4)]
    if layer < OWNERS:
        yield from [("attn_k", width, DIM, 4), ("attn_v", width, DIM, 4)]
    yield from [("ffn_gate", ff, DIM, mlp), ("ffn_up", ff, DIM, mlp), ("ffn_down", DIM, ff, mlp)]
    yield from [("inp_gate", PLE, DIM, 8), ("proj", DIM, PLE, 8)]


ROLES = [role for role, *_ in matrices(0)]
DEVIATION = {2: 1.12, 4: 4.61, 8: 73.9}  # of random integers


def row_scales(rows, cols, bits):
    return (random.uniform(0.75, 1.25, rows) * cols ** -0.5 / DEVIATION[bits]).astype(np.float32)


def packed(rows, cols, bits):
    """Random integers as the checkpoint packs them, in pieces."""
    width = cols * bits // 8
    step = max(1, PIECE // width)
    for first in range(0, rows, step):
        yield random.integers(0, 256, (min(step, rows - first), width), dtype=np.uint8)


def blocks(rows, cols, bits, scales):
    """The same as blocks that repeat the scale of their row, or of their part of it, in half precision; in pieces."""
    elements, size = gguf.GGML_QUANT_SIZES[BLOCKS[bits]]
    per_row = cols // elements
    scales = np.repeat(scales.reshape(rows, -1), per_row // (scales.size // rows), axis=1)
    step = max(1, PIECE // (per_row * size))
    at = 64 if bits == 2 else 0
    for first in range(0, rows, step):
        n = min(step, rows - first)
        data = random.integers(0, 256, (n, per_row, size), dtype=np.uint8)
        d = (-scales if bits == 2 else scales)[first:first + n].astype(np.float16)
        data[:, :, at:at + 2] = np.ascontiguousarray(d).view(np.uint8).reshape(n, per_row, 2)
        yield data.reshape(n, -1)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out")
    arguments.add_argument("--blocks", action="store_true")
    arguments.add_argument("--vocab")
    a = arguments.parse_args()
    arch = "gemma4" if a.blocks else "gemma4-srq"

    w = gguf.GGUFWriter(a.out, arch)
    w.add_name("synthetic E2B, mobile" + (", in blocks" if a.blocks else ""))
    w.add_quantization_version(2)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(DIM)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_key_length(GLOBAL)
    w.add_value_length(GLOBAL)
    w.add_key_length_swa(SLIDING)
    w.add_value_length_swa(SLIDING)
    w.add_rope_freq_base(1e6)
    w.add_rope_freq_base_swa(1e4)
    w.add_rope_dimension_count(GLOBAL)
    w.add_rope_dimension_count_swa(SLIDING)
    w.add_sliding_window(WINDOW)
    w.add_sliding_window_pattern([head(layer) == SLIDING for layer in range(LAYERS)])
    w.add_shared_kv_layers(SHARED)
    w.add_embedding_length_per_layer_input(PLE)
    w.add_final_logit_softcapping(30.0)
    if a.vocab:
        fields = gguf.GGUFReader(a.vocab).fields
        tokens, kinds, merges = (fields["tokenizer.ggml." + key].contents() for key in ["tokens", "token_type", "merges"])
        w.add_chat_template(fields["tokenizer.chat_template"].contents())
    else:
        tokens, kinds, merges = vocabulary(VOCAB)
    w.add_tokenizer_model("gemma4")
    w.add_token_list(tokens)
    w.add_token_scores([-1000.0] * len(tokens))
    w.add_token_types(kinds)
    w.add_token_merges(merges)
    w.add_bos_token_id(2)
    w.add_eos_token_id(1)
    w.add_unk_token_id(3)
    w.add_pad_token_id(0)
    w.add_add_space_prefix(False)
    w.add_add_bos_token(True)

    def numbers(key, values, kind=Kind.FLOAT32):
        w.add_key_value(f"{arch}.srq.{key}", [kind_of(kind, v) for v in values], Kind.ARRAY, sub_type=kind)

    kind_of = lambda kind, value: float(value) if kind == Kind.FLOAT32 else int(value)
    w.add_uint32(f"{arch}.srq.version", 1)
    w.add_string(f"{arch}.srq.scheme", "wna8o8")
    w.add_string(f"{arch}.srq.round", "half_even")
    w.add_int32(f"{arch}.srq.qmin", -128)
    w.add_int32(f"{arch}.srq.qmax", 127)
    w.add_string(f"{arch}.srq.source", "synthetic")
    bits = {(layer, role): width for layer in range(LAYERS) for role, _, _, width in matrices(layer)}
    for role in ROLES:
        there = [(layer, role) in bits for layer in range(LAYERS)]
        numbers("input_scale." + role, [0.03 if is_there else 0 for is_there in there])
        numbers("output_scale." + role, [0.03 if is_there else 0 for is_there in there])
        if not a.blocks:
            numbers("bits." + role, [bits.get((layer, role), 0) for layer in range(LAYERS)], Kind.UINT8)
    w.add_float32(f"{arch}.srq.input_scale.output", 0.0)
    w.add_float32(f"{arch}.srq.output_scale.output", 0.0)
    if not a.blocks:
        w.add_uint8(f"{arch}.srq.bits.token_embd", 2)
        w.add_uint8(f"{arch}.srq.bits.per_layer_token_embd", 4)
    owns = [layer < OWNERS for layer in range(LAYERS)]
    wide = [head(layer) == GLOBAL for layer in range(LAYERS)]
    numbers("kv.k_scale", [(0.5 if g else 0.03) * o for o, g in zip(owns, wide)])
    numbers("kv.v_scale", [(0.75 if g else 6 / 127) * o for o, g in zip(owns, wide)])
    numbers("kv.bits", [(4 if g else 8) * o for o, g in zip(owns, wide)], Kind.UINT8)

    tensors = []  # name, shape, type or dtype, pieces of data

    def vector(name, values):
        values = np.asarray(values, np.float32)
        tensors.append((name, values.shape, values.dtype, None, lambda: [values]))

    def matrix(name, rows, cols, width, groups=1):
        scales = row_scales(rows * groups, cols, width)
        if a.blocks:
            if groups == 1:
                numbers("row_scale." + name, scales)
            _, size = gguf.GGML_QUANT_SIZES[BLOCKS[width]]
            shape = (rows, cols // gguf.GGML_QUANT_SIZES[BLOCKS[width]][0] * size)
            tensors.append((name + ".weight", shape, np.dtype(np.uint8), BLOCKS[width], lambda: blocks(rows, cols, width, scales)))
            return
        shape = (rows, cols * width // 8)
        tensors.append((name + ".weight", shape, np.dtype(np.int8), None, lambda: packed(rows, cols, width)))
        kind, shape = ("row_scale", (rows,)) if groups == 1 else ("group_scale", (rows, groups))
        vector(f"{name}.{kind}", scales.reshape(shape))

    ones = np.ones(DIM)
    matrix("token_embd", VOCAB, DIM, 2)
    matrix("per_layer_token_embd", VOCAB, PLE * LAYERS, 4, groups=LAYERS)
    proj = (random.standard_normal((PLE * LAYERS, DIM)) * DIM ** -0.5).astype(np.float32).view(np.uint32) >> 16
    proj = proj.astype(np.uint16).view(np.uint8)
    tensors.append(("per_layer_model_proj.weight", proj.shape, proj.dtype, Type.BF16, lambda: [proj]))
    vector("per_layer_proj_norm.weight", np.ones(PLE))
    vector("output_norm.weight", ones)
    vector("rope_freqs.weight", [1.0] * (GLOBAL // 8) + [1e30] * (GLOBAL * 3 // 8))
    for layer in range(LAYERS):
        blk = f"blk.{layer}."
        for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"]:
            vector(blk + norm + ".weight", ones)
        vector(blk + "attn_q_norm.weight", np.ones(head(layer)))
        if layer < OWNERS:
            vector(blk + "attn_k_norm.weight", np.full(head(layer), head(layer) ** -0.5))
        vector(blk + "layer_output_scale.weight", [0.7])
        for role, rows, cols, width in matrices(layer):
            matrix(blk + role, rows, cols, width)

    for name, shape, dtype, kind, _ in tensors:
        w.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for name, shape, dtype, kind, data in tensors:
        file = w.fout[0]
        w.write_padding(file, file.tell())
        for piece in data():
            piece.tofile(file)
        w.write_padding(file, file.tell())
    w.close()
    print(f"{a.out}: {len(tensors)} tensors")


main()
