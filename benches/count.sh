#!/usr/bin/env bash
# Instructions that the ARM kernels execute, counted under emulation: for each weight with one token, for each
# multiplication of a weight with 64. One line a kernel, for benches/RESULTS.md.
#   benches/count.sh [KERNEL TOKENS]   one kernel with the mnemonics of its instructions, instead of the table
# Needs what .ci/aarch64.sh needs, and the emulator's plugin: PLUGIN=…/liba64count.so, or its source beside this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/lib.sh
. .ci/aarch64.sh

plugin=${PLUGIN:-target/liba64count.so}
[ -e "$plugin" ] || gcc -O2 -shared -fPIC -o "$plugin" ../shared/tools/plugin/a64count.c
a64_cargo build --release --locked -q -p gemrun-simd --example count
program=$A64_TARGET/release/examples/count

# Executed instructions of KERNEL with TOKENS, run TIMES times.
executed() {
    qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max,pauth-impdef=on -plugin "$plugin,${OPTIONS:-top=0}" -d plugin \
        "$program" "$@" 2>&1 >/dev/null
}
# Of two listings of counts by name, the differences, divided.
each() {
    awk -v n="$3" 'FNR == 1 { file++ } $2 != "total" { v = $2; k = $3 } $2 == "total" { v = $3; k = "all" }
        file == 1 { before[k] = v } file == 2 { d = (v - before[k]) / n; if (d > 0.0001) printf "%.4f %s\n", d, k }' \
        <(printf '%s\n' "$1") <(printf '%s\n' "$2")
}
weights=128*1536

if (($#)); then
    OPTIONS="top=40,sym=compiled,mnem=1"
    each "$(executed "$1" "$2" 1)" "$(executed "$1" "$2" 3)" "$((2 * weights * $2))"
    exit
fi
kernel() { each "$(executed "$1/$2" "$3" 1)" "$(executed "$1/$2" "$3" 3)" "$((2 * weights * $3))" | cut -d' ' -f1; }
echo "| kernel | neon, 1 token | neon, 64 | neon_dot, 1 | neon_dot, 64 | neon_i8mm, 64 |"
echo "|---|---|---|---|---|---|"
for format in ${FORMATS:-q4_0x8 q4_0 w2cx8 w2c w4cx8 w4c w8cx8 w8c q8_0x8 q8_0 q6_kx8 q6_k q4_kx8 q4_k}; do
    printf '| %s |' "$format"
    for run in "neon 1" "neon 64" "neon_dot 1" "neon_dot 64" "neon_i8mm 64"; do
        # shellcheck disable=SC2086
        printf ' %s |' "$(kernel "$format" $run)"
    done
    echo
done
