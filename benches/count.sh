#!/usr/bin/env bash
# Instructions that the ARM kernels execute, counted under emulation: for each weight with one token, for each
# multiplication of a weight with 64. A table for benches/RESULTS.md: all of it / the inner loop, which is what twice the
# columns add.
#   benches/count.sh                   the table
#   benches/count.sh KERNEL TOKENS     one kernel by mnemonics (those the emulator cannot name are .byte: sdot, smmla)
# Needs what .ci/aarch64.sh needs, and the emulator's plugin: PLUGIN=.../liba64count.so, or its source beside this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/lib.sh
. .ci/aarch64.sh

plugin=${PLUGIN:-target/liba64count.so}
[ -e "$plugin" ] || gcc -O2 -shared -fPIC -o "$plugin" ../shared/tools/plugin/a64count.c
a64_cargo build --release --locked -q -p gemrun-simd --example count
program=$A64_TARGET/release/examples/count
cols=1536 rows=128

# counted OPTIONS ARGS... - what the plugin says of a run of `count`.
counted() {
    local options=$1
    shift
    qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max,pauth-impdef=on -plugin "$plugin,$options" -d plugin "$program" "$@" \
        2>&1 >/dev/null
}
# Instructions of KERNEL TOKENS with so many columns, once: of three times less those of one.
once() {
    local three one
    three=$(counted top=0 "$1" "$2" 3 "$3" | awk '/total/ { print $3 }')
    one=$(counted top=0 "$1" "$2" 1 "$3" | awk '/total/ { print $3 }')
    echo $(((three - one) / 2))
}

if (($#)); then
    awk -v n=$((2 * rows * cols * $2)) 'FNR == 1 { run++ }
        $2 != "total" { if (run == 1) before[$3] = $2; else if ($2 - before[$3] > n / 10000) print ($2 - before[$3]) / n, $3 }' \
        <(counted top=999,sym=enter,mnem=1 "$1" "$2" 1 $cols) <(counted top=999,sym=enter,mnem=1 "$1" "$2" 3 $cols) | sort -rn
    exit
fi
runs=("neon 1" "neon_dot 1" "neon 64" "neon_dot 64" "neon_i8mm 64")
printf '| |'; printf ' %s |' "${runs[@]}"; echo
printf '|---|'; printf '%s' "${runs[@]/*/---|}"; echo
for format in ${FORMATS:-q4_0x8 q4_0 w2c w4c w8c q8_0x8 q8_0 q6_kx8 q6_k q4_kx8 q4_k}; do
    printf '| %s |' "$format"
    for run in "${runs[@]}"; do
        read -r isa tokens <<<"$run"
        short=$(once "$format/$isa" "$tokens" $cols)
        long=$(once "$format/$isa" "$tokens" $((2 * cols)))
        awk -v s="$short" -v l="$long" -v n=$((rows * cols * tokens)) 'BEGIN { printf " %.3f / %.3f |", s / n, (l - s) / n }'
    done
    echo
done
