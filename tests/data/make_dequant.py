"""Writes dequant.bin: random blocks of every format that gguf-py can dequantise, with the values it gives.

Run with the packages `gguf` and `numpy`: python make_dequant.py dequant.bin
The file is a sequence of records: type id, elements, bytes (u32 LE each), the blocks, the f32 values.
"""

import struct
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

# Format -> byte offsets of its f16 fields; every other byte of a block is random.
HALVES = {
    T.Q4_0: [0],
    T.Q4_1: [0, 2],
    T.Q5_0: [0],
    T.Q5_1: [0, 2],
    T.Q8_0: [0],
    T.Q2_K: [80, 82],
    T.Q3_K: [108],
    T.Q4_K: [0, 2],
    T.Q5_K: [0, 2],
    T.Q6_K: [208],
    T.IQ4_NL: [0],
    T.IQ4_XS: [0],
    T.TQ1_0: [52],
    T.TQ2_0: [64],
    T.MXFP4: [],
    T.BF16: [],
}


def finite_halves(rng, n):
    """Random f16 bit patterns without infinities and NaNs: all signs and exponents, subnormals included."""
    bits = rng.integers(0, 1 << 16, n, dtype=np.uint16)
    return np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)


def record(out, kind, blocks, values):
    blocks = blocks.tobytes()
    values = values.astype("<f4")
    assert np.isfinite(values).all()
    out.write(struct.pack("<III", kind.value, values.size, len(blocks)))
    out.write(blocks)
    out.write(values.tobytes())


def main():
    rng = np.random.default_rng(4)
    with open(sys.argv[1], "wb") as out:
        for kind, halves in HALVES.items():
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            n = 1024 // elements
            blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
            for at in halves:
                blocks[:, at : at + 2] = finite_halves(rng, n).view(np.uint8).reshape(n, 2)
            if kind == T.BF16:  # keep the exponent below 255
                blocks[:, 1] &= 0xBF
            if kind == T.MXFP4:  # the ends of the exponent's range, then a usual one
                blocks[:, 0] = np.resize([0, 1, 2, 127, 128, 250, 100, 131], n)
            values = gguf.quants.dequantize(blocks.reshape(-1), kind)
            record(out, kind, blocks, values)
        halves = finite_halves(rng, 1024)
        record(out, T.F16, halves, halves.view(np.float16).astype(np.float32))


main()
