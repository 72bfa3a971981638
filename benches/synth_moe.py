#!/usr/bin/env python3
"""Write a GGUF file with the shape of the Gemma 4 mixture of experts (26B-A4B) and random weights, fewer layers and a smaller
vocabulary than the real one: layers of full width, so that an expert's matrices, their number and the choice of 8 of 128 are as
they are. What such a model says is noise; what it costs is not. Needs the Python packages gguf and numpy.

  synth_moe.py OUT.gguf [--layers 6] [--vocab 49152]
"""
import argparse
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

DIM, HEADS, FF, EXPERT_FF, EXPERTS, USED = 2816, 16, 2112, 704, 128, 8
WINDOW, CONTEXT, EVERY = 1024, 262144, 6  # every sixth layer is global
SLIDING, GLOBAL = (256, 8), (512, 2)      # head dimension, key/value heads

random = np.random.Generator(np.random.SFC64(7))


def scales(count, base):
    """Halves around `base`, as bytes."""
    return (base * random.uniform(0.75, 1.25, count)).astype(np.float16).view(np.uint8).reshape(count, 2)


def blocks(kind, rows, cols):
    """Random blocks whose values have a standard deviation of about 1 / sqrt(cols); (rows, bytes of a row)."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    count = rows * cols // size
    data = random.integers(0, 256, (count, width), dtype=np.uint8)
    deviation = cols ** -0.5
    if kind == Type.Q4_0:    # scale, 16 bytes of 4 bits; 4.6 is the deviation of -8..7
        data[:, :2] = scales(count, deviation / 4.6)
    elif kind == Type.Q6_K:  # ..., 16 signed sub-scales, scale; 18.5 is the deviation of -32..31
        data[:, 192:208] = 48 + (data[:, 192:208] & 31)
        data[:, 208:] = scales(count, deviation / (18.5 * 64))
    else:
        raise ValueError(kind)
    return data.reshape(rows, -1)


def vocabulary(size):
    """Special tokens where Gemma has them, all bytes, then short strings; with the merges that make them."""
    special = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<|turn>", 106: "<turn|>"}
    tokens = [special.get(i, f"<unused{i}>") for i in range(238)] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [3 if i in special else 1 for i in range(238)] + [6] * 256
    letters = "\u2581etaoinshrdlcumwfgypbvkjxqz"
    words, merges = list(letters), []
    for word in words:  # grows while it is read: all one-letter words, all of two letters, ...
        if len(words) >= size:
            break
        words += [word + letter for letter in letters[1:]]
        merges += [f"{word} {letter}" for letter in letters[1:]]
    words = words[: size - len(tokens)]
    known = set(words)
    merges = [merge for merge in merges if merge.replace(" ", "") in known]
    return tokens + words, kinds + [1] * len(words), merges


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out")
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--vocab", type=int, default=49152)
    a = arguments.parse_args()
    sliding = [(layer + 1) % EVERY != 0 for layer in range(a.layers)]

    w = gguf.GGUFWriter(a.out, "gemma4")
    w.add_name(f"synthetic 26B-A4B, {a.layers} layers")
    w.add_file_type(2)
    w.add_quantization_version(2)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(DIM)
    w.add_block_count(a.layers)
    w.add_feed_forward_length(FF)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    w.add_expert_feed_forward_length(EXPERT_FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv([SLIDING[1] if s else GLOBAL[1] for s in sliding])
    w.add_layer_norm_rms_eps(1e-6)
    w.add_key_length(GLOBAL[0])
    w.add_value_length(GLOBAL[0])
    w.add_key_length_swa(SLIDING[0])
    w.add_value_length_swa(SLIDING[0])
    w.add_rope_freq_base(1e6)
    w.add_rope_freq_base_swa(1e4)
    w.add_rope_dimension_count(GLOBAL[0])
    w.add_rope_dimension_count_swa(SLIDING[0])
    w.add_sliding_window(WINDOW)
    w.add_sliding_window_pattern(sliding)
    w.add_shared_kv_layers(0)
    w.add_embedding_length_per_layer_input(0)
    w.add_final_logit_softcapping(30.0)
    tokens, kinds, merges = vocabulary(a.vocab)
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

    # Name, and either a constant or a block format with the shape, rows last but one as numpy has it.
    tensors = []
    vector = lambda name, values: tensors.append((name, np.asarray(values, np.float32), None, None))
    matrix = lambda name, kind, *shape: tensors.append((name, None, kind, shape))
    ones = np.ones(DIM)
    matrix("token_embd.weight", Type.Q6_K, a.vocab, DIM)
    vector("output_norm.weight", ones)
    vector("rope_freqs.weight", [1.0] * (GLOBAL[0] // 8) + [1e30] * (GLOBAL[0] * 3 // 8))
    for layer, is_sliding in enumerate(sliding):
        blk = f"blk.{layer}."
        head, kv_heads = SLIDING if is_sliding else GLOBAL
        for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "pre_ffw_norm_2", "post_ffw_norm_1",
                     "post_ffw_norm_2"]:
            vector(blk + norm + ".weight", ones)
        vector(blk + "attn_q_norm.weight", np.ones(head))
        vector(blk + "attn_k_norm.weight", np.full(head, head ** -0.5))
        vector(blk + "layer_output_scale.weight", [0.7])
        matrix(blk + "attn_q.weight", Type.Q4_0, HEADS * head, DIM)
        matrix(blk + "attn_k.weight", Type.Q4_0, kv_heads * head, DIM)
        if is_sliding:
            matrix(blk + "attn_v.weight", Type.Q4_0, kv_heads * head, DIM)
        matrix(blk + "attn_output.weight", Type.Q4_0, DIM, HEADS * head)
        matrix(blk + "ffn_gate.weight", Type.Q4_0, FF, DIM)
        matrix(blk + "ffn_up.weight", Type.Q4_0, FF, DIM)
        matrix(blk + "ffn_down.weight", Type.Q4_0, DIM, FF)
        vector(blk + "ffn_gate_inp.weight", random.standard_normal((EXPERTS, DIM)))
        vector(blk + "ffn_gate_inp.scale", ones)
        matrix(blk + "ffn_gate_up_exps.weight", Type.Q4_0, EXPERTS, 2 * EXPERT_FF, DIM)
        matrix(blk + "ffn_down_exps.weight", Type.Q4_0, EXPERTS, DIM, EXPERT_FF)
        vector(blk + "ffn_down_exps.scale", np.ones(EXPERTS))

    for name, values, kind, shape in tensors:
        if kind is None:
            w.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        else:
            size, width = gguf.GGML_QUANT_SIZES[kind]
            row = shape[-1] // size * width
            count = int(np.prod(shape[:-1])) * row
            w.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), count, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for _, values, kind, shape in tensors:
        w.write_tensor_data(values if kind is None else blocks(kind, int(np.prod(shape[:-1])), shape[-1]))
    w.close()


if __name__ == "__main__":
    main()
