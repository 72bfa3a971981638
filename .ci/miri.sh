# Sourced by .ci/run: Miri, which interprets the program and reports undefined behaviour where it happens.
#   miri_ready     whether a nightly toolchain with Miri is there or can be had; its name goes to $NIGHTLY
#   miri TESTS…    cargo miri test on x86-64, where it runs the kernels of $MIRI_X86 whatever this processor has
#   miri_threads   the team's threads, for data races; the borrow models are off, as rayon's own queues and scopes break both at times,
#                  and leaks are not looked for, as its threads end when they like
# A kernel that uses an instruction it does not know, or inline assembly, makes it fail by name.
# shellcheck shell=bash

# What Miri interprets of x86-64 beyond the baseline: AVX2, AVX-VNNI and AVX-512 kernels run on any machine.
MIRI_X86="-Ctarget-feature=+avx2,+fma,+f16c,+avxvnni,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"

miri_ready() {
    for NIGHTLY in nightly nightly-2026-05-20; do
        cargo "+$NIGHTLY" miri --version 2>/dev/null && return
        timeout 120 rustup toolchain install "$NIGHTLY" --profile minimal -c miri -c rust-src >/dev/null 2>&1 || continue
        cargo "+$NIGHTLY" miri --version 2>/dev/null && return
    done
    return 1
}

miri() {
    # Damage to files is chosen by time elsewhere; here only the kept inputs run.
    GEMRUN_FUZZ_SECONDS=0 MIRIFLAGS="-Zmiri-disable-isolation ${MIRI_MODEL-}" RUSTFLAGS=$MIRI_X86 \
        CARGO_TARGET_DIR=target/miri cargo "+$NIGHTLY" miri test --locked "$@"
}

miri_threads() {
    MIRI_MODEL="-Zmiri-disable-stacked-borrows -Zmiri-ignore-leaks" miri --lib team::
}
