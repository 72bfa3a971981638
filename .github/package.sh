#!/usr/bin/env bash
# Makes what a release consists of, in target/package: for each TARGET a .tar.gz with the static binary, manual pages and
# completions, a .deb where cargo-deb is installed, the checksums of all of it, and the Homebrew formula.
#   .github/package.sh [TARGET…]        default: x86_64 and aarch64, both -unknown-linux-musl
# The same sources and toolchain give the same archives.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(x86_64-unknown-linux-musl aarch64-unknown-linux-musl)
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
# The encryption of downloads is C and assembly without a C library.
export CC_x86_64_unknown_linux_musl=${CC_x86_64_unknown_linux_musl:-cc}
export CC_aarch64_unknown_linux_musl=${CC_aarch64_unknown_linux_musl:-aarch64-linux-gnu-gcc}
out=target/package
rm -rf "$out"
mkdir -p "$out/man" "$out/completions"

# Pages and completions are the same everywhere: the program that runs on this machine writes them.
cargo build --release --locked
target/release/gemrun man --dir "$out/man"
target/release/gemrun completions bash >"$out/completions/gemrun.bash"
target/release/gemrun completions zsh >"$out/completions/_gemrun"
target/release/gemrun completions fish >"$out/completions/gemrun.fish"
gzip -9n "$out"/man/*.1

for target in "${targets[@]}"; do
    linker=CARGO_TARGET_${target^^}_LINKER
    env "${linker//-/_}=rust-lld" cargo build --release --locked --target "$target"
    name=gemrun-$version-$target
    mkdir -p "$out/$name"
    cp -r "target/$target/release/gemrun" README.md CHANGELOG.md LICENSE-* "$out/man" "$out/completions" "$out/$name"
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -C "$out" -c "$name" |
        gzip -9n >"$out/$name.tar.gz"
    rm -r "${out:?}/$name"
    if command -v cargo-deb >/dev/null; then
        cargo deb --no-build --no-strip --target "$target" --output "$out/"
    else
        echo "no cargo-deb: no .deb for $target (cargo install cargo-deb)" >&2
    fi
done

(cd "$out" && shopt -s nullglob && sha256sum -- *.tar.gz *.deb >SHA256SUMS)
sum() { sed -n "s/^\([0-9a-f]*\)  gemrun-$version-$1.tar.gz\$/\1/p" "$out/SHA256SUMS"; }
sed -e "s/@VERSION@/$version/" -e "s/@SHA256_X86_64@/$(sum x86_64-unknown-linux-musl)/" \
    -e "s/@SHA256_AARCH64@/$(sum aarch64-unknown-linux-musl)/" .github/gemrun.rb.in >"$out/gemrun.rb"
cat "$out/SHA256SUMS"
