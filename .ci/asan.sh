# Sourced by .ci/run: the tests of gemrun-simd, where nearly all unsafe code is, under AddressSanitizer. The rest of
# the program meets it in the fuzzing targets. As there, the stable compiler ships what is needed.
#   asan
# shellcheck shell=bash

asan() {
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan \
        cargo test --locked -p gemrun-simd --lib --tests --target "$(rustc -vV | sed -n 's/^host: //p')"
}
