# Sourced by .ci/run: release binaries that need nothing of the machine they run on, and never an instruction the
# processor lacks. Each is linked statically with musl by the linker that comes with Rust, then chats with the demo
# model on emulated processors without the instructions it would like to use, and gives the demo model's bits.
#   static_binary TARGET          builds it; leaves its path in $STATIC
#   static_runs BITS COMMAND…     chats, checks the hash of its logits and tests itself: COMMAND runs the binary
# shellcheck shell=bash

static_binary() {
    local linker=CARGO_TARGET_${1^^}_LINKER
    env "${linker//-/_}=rust-lld" cargo build --release --locked --target "$1"
    STATIC=target/$1/release/gemrun
    # An interpreter or a needed library would make it depend on the machine.
    if readelf -ld "$STATIC" | grep -E 'INTERP|NEEDED'; then
        echo "$STATIC is not static"
        return 1
    fi
}

static_runs() {
    local bits=$1 answer out
    shift
    answer=$("$@" run demo "What is gemrun?" </dev/null)
    printf '%s\n' "$answer"
    grep -qi gemma <<<"$answer"
    out=$(mktemp)
    "$@" eval logits demo --tokens "$tokens" -o "$out"
    [ "$(sha256sum "$out" | cut -d' ' -f1)" = "$bits" ]
    rm "$out"
    "$@" selftest
}

# QEMU says on each start what it cannot emulate of a processor; none of that is used.
quiet() { "$@" 2> >(grep -v "TCG doesn't support requested feature" >&2); }

# Whether the emulator traps what a processor lacks, without which running on it would prove nothing: a program
# compiled for AVX must die of SIGILL (4) on a processor without.
emulator_traps() {
    local dir status=0
    dir=$(mktemp -d)
    echo 'fn main() { let x = std::env::args().count() as f32; println!("{}", x.mul_add(x, x)) }' >"$dir/avx.rs"
    rustc -O -C target-cpu=haswell -o "$dir/avx" "$dir/avx.rs"
    quiet qemu-x86_64 -cpu Haswell "$dir/avx" >/dev/null || return 1
    (ulimit -c 0; quiet qemu-x86_64 -cpu "$1" "$dir/avx" >/dev/null 2>&1) || status=$?
    rm -r "$dir"
    [ $status = $((128 + 4)) ]
}
