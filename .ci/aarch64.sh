# Sourced by .ci/run: a way to build for aarch64 and to run the result on an emulated core.
#   a64_cargo ARGS…   cargo for aarch64; tests run under emulation        a64_run PROGRAM ARGS…
#   A64_TARGET        where its builds lie                                A64_CPU=cortex-a72|cortex-a76|max
# Prefers rustup's own target with qemu-user; where that target cannot be had, a cross toolchain made from
# distribution packages.
# shellcheck shell=bash

if rustup target add aarch64-unknown-linux-musl >/dev/null 2>&1; then
    # The compiler is for the C and assembly of ring, which encrypts downloads.
    packages qemu-aarch64 qemu-user
    packages aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    export CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc AR_aarch64_unknown_linux_musl=aarch64-linux-gnu-ar
    a64_run() { local cpu=${A64_CPU:-max}; [ "$cpu" = max ] && cpu=max,pauth-impdef=on; qemu-aarch64 -cpu "$cpu" "$@"; }
    a64_cargo() {
        local cpu=${A64_CPU:-max}
        [ "$cpu" = max ] && cpu=max,pauth-impdef=on
        CARGO_BUILD_TARGET=aarch64-unknown-linux-musl CARGO_TARGET_DIR=target/a64 \
            CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld \
            CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER="qemu-aarch64 -cpu $cpu" cargo "$@"
    }
    A64_TARGET=target/a64/aarch64-unknown-linux-musl
else
    A64_ROOT=${A64_ROOT:-/opt/a64}
    export A64_ROOT
    bash ../shared/tools/aarch64.sh
    a64_run() { "$A64_ROOT/bin/a64-run" "$@"; }
    a64_cargo() { "$A64_ROOT/bin/a64-cargo" "$@"; }
    A64_TARGET=target/a64/aarch64-unknown-linux-gnu
fi
