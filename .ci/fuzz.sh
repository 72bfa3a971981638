# Sourced by .ci/run: libFuzzer on the targets of tests/fuzz, with AddressSanitizer, overflow checks and debug
# assertions. What `cargo fuzz` does, without installing it: flags of the compiler, and libFuzzer built by a C++
# compiler. The stable compiler has all of it; RUSTC_BOOTSTRAP only opens the one flag it does not guarantee.
#   fuzz SECONDS   builds the targets and runs each that long; fails on the first finding and prints its file
# shellcheck shell=bash

fuzz() {
    local host dir target
    host=$(rustc -vV | sed -n 's/^host: //p')
    dir=$(mktemp -d)
    RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target/fuzz RUSTFLAGS="-Zsanitizer=address --cfg fuzzing \
        -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares" \
        cargo build --release --locked --manifest-path tests/fuzz/Cargo.toml --target "$host"
    for target in tests/fuzz/corpus/*; do
        target=${target##*/}
        mkdir "$dir/$target"
        step "  $target"
        # New inputs go to the first folder and are thrown away; the kept ones are only read.
        "target/fuzz/$host/release/$target" -max_total_time="$1" -timeout=10 -rss_limit_mb=512 -max_len=4096 \
            -print_final_stats=1 -artifact_prefix="$dir/" "$dir/$target" "tests/fuzz/corpus/$target" 2>"$dir/log" ||
            { tail -n 60 "$dir/log"; for file in "$dir"/*-*; do base64 "$file" | head -n 100; done; return 1; }
        grep -E 'DONE|stat::(number_of_executed|peak_rss)' "$dir/log"
    done
    rm -r "$dir"
}
