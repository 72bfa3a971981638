#!/usr/bin/env python3
"""Cycles that LLVM's models of ARM cores expect of the kernels' inner loops, as a table for benches/RESULTS.md.

    RUSTFLAGS=-Csymbol-mangling-version=v0 cargo build --release -p gemrun-simd --example count \
        --target aarch64-unknown-linux-musl --target-dir target/mca
    benches/mca.py target/mca/aarch64-unknown-linux-musl/release/examples/count

Cuts the innermost loops out of the program (the other way of mangling keeps the formats' names), picks of each kernel the
one that multiplies most in a turn, with prefetches for one token and without for many, and asks llvm-mca (LLVMMCA=...).
A turn's weights follow from its products: sdot 16, smmla 32. Models know no caches: compare, do not believe.
"""

import os
import re
import subprocess
import sys

CPUS = ["neoverse-n1", "cortex-x1"]
PRODUCTS = {"sdot": 16, "smmla": 32}
KERNELS = [("Q4_0", "Sdot"), ("Q4_0", "Smmla"), ("W2C", "Sdot"), ("W2C", "Smmla")]
JUMP = re.compile(r"^(b\.\w+|cbn?z|tbn?z|b)\t(.*?)([0-9a-f]+) <[^>]*>$")


def functions(program):
    text = subprocess.run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", program],
                          capture_output=True, text=True, check=True).stdout
    for part in text.split("\n\n"):
        name, *lines = part.strip().split("\n")
        code = [line.split("\t", 1) for line in lines if re.match(r" +[0-9a-f]+:\t", line)]
        yield name, [(int(at.strip(" :"), 16), re.sub(r"\s+//.*", "", op)) for at, op in code]


def loops(code):
    """Loops without a loop inside."""
    index = {at: i for i, (at, _) in enumerate(code)}
    found = []
    for i, (_, op) in enumerate(code):
        jump = JUMP.match(op)
        start = index.get(int(jump[3], 16)) if jump else None
        if start is not None and start < i:
            found.append((start, i))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]
    return [[op for _, op in code[a:b + 1]] for a, b in inner]


def products(loop):
    return sum(PRODUCTS.get(op.split("\t")[0], 0) for op in loop)


def cycles(loop, cpu):
    lines = [JUMP.sub(r"\1\t\g<2>1f", op) for op in loop]
    run = subprocess.run([os.environ.get("LLVMMCA", "llvm-mca"), "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm",
                          "-iterations=200"], input="\n".join(lines) + "\n1:\n", capture_output=True, text=True, check=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", run.stdout)[1]) / 200


def main():
    of = {kernel: [] for kernel in KERNELS}
    for name, code in functions(sys.argv[1]):
        for block, isa in KERNELS:
            if f"{len(isa)}{isa}N" in name and f"compiledNtNtB7_6format{len(block)}{block}E" in name:
                of[block, isa] += loops(code)
    print("| loop | instructions | products | per product |", *(f"cycles per product, {cpu} |" for cpu in CPUS))
    print("|---|---|---|---|" + "---|" * len(CPUS))
    for (block, isa), found in of.items():
        for what, prefetches in (("1 token", True), ("64 tokens", False)):
            fits = [loop for loop in found if any(op.startswith("prfm") for op in loop) == prefetches]
            if fits:
                loop = max(fits, key=products)
                n = products(loop)
                print(f"| {block} {isa.lower()}, {what} | {len(loop)} | {n} | {len(loop) / n:.3f} |",
                      *(f"{cycles(loop, cpu) / n:.3f} |" for cpu in CPUS))


main()
