#!/bin/sh
# Installs gemrun for this user, without root: looks what system this is, gets the archive for it, checks it, and puts the
# program into ~/.local/bin (or $PREFIX/bin), its manual pages and completions below ~/.local/share.
#   sh install.sh FROM        FROM: a directory, or the https address of one, that holds SHA256SUMS and the archives
set -eu

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

from=${1:-${GEMRUN_RELEASE:-}}
[ -n "$from" ] || fail "expected the directory or address of a release: sh install.sh FROM"
prefix=${PREFIX:-$HOME/.local}

[ "$(uname -s)" = Linux ] || fail "$(uname -s): there are archives for Linux only: expected cargo install --path . of the sources"
case $(uname -m) in
x86_64 | amd64) arch=x86_64 ;;
aarch64 | arm64) arch=aarch64 ;;
armv6l | armv7l | armv8l) fail "$(uname -m): a 32-bit system: gemrun needs a 64-bit one (on a Raspberry Pi 3 or later: Raspberry Pi OS 64-bit)" ;;
i?86) fail "$(uname -m): a 32-bit system: gemrun needs a 64-bit one" ;;
*) fail "$(uname -m): there are archives for x86_64 and aarch64" ;;
esac
# A 64-bit kernel below 32-bit programs says it is 64-bit, and then nothing 64-bit is found.
if command -v getconf >/dev/null 2>&1 && [ "$(getconf LONG_BIT)" = 32 ]; then
    # A static program runs all the same where the kernel is 64-bit; people should still know.
    echo "note: the programs of this system are 32-bit, its kernel is 64-bit: gemrun brings all it needs and runs" >&2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
get() {
    case $from in
    https://* | http://localhost* | http://127.0.0.1*)
        if command -v curl >/dev/null 2>&1; then
            curl -fsSL --retry 3 -o "$work/$1" "$from/$1"
        elif command -v wget >/dev/null 2>&1; then
            wget -q -O "$work/$1" "$from/$1"
        else
            fail "neither curl nor wget is installed"
        fi || fail "$from/$1: cannot be downloaded"
        ;;
    *://*) fail "$from: expected an https address" ;;
    *) cp "$from/$1" "$work/$1" || fail "$from/$1: cannot be read" ;;
    esac
}

get SHA256SUMS
archive=$(sed -n "s/^[0-9a-f]\{64\}  \(gemrun-[0-9A-Za-z.+-]*-$arch-unknown-linux-musl\.tar\.gz\)\$/\1/p" "$work/SHA256SUMS" | head -n 1)
[ -n "$archive" ] || fail "SHA256SUMS: names no archive for $arch"
get "$archive"
(cd "$work" && grep "  $archive\$" SHA256SUMS | sha256sum -c - >/dev/null 2>&1) || fail "$archive: is damaged: its SHA-256 differs from the one in SHA256SUMS"

tar -xzf "$work/$archive" -C "$work"
files=$work/${archive%.tar.gz}
"$files/gemrun" --version >/dev/null || fail "the program does not start on this system"
mkdir -p "$prefix/bin" "$prefix/share/man/man1" "$prefix/share/bash-completion/completions"
# First beside, then in place: a program that runs meanwhile is not disturbed.
cp "$files/gemrun" "$prefix/bin/.gemrun.new"
chmod 755 "$prefix/bin/.gemrun.new"
mv -f "$prefix/bin/.gemrun.new" "$prefix/bin/gemrun"
cp "$files"/man/*.1.gz "$prefix/share/man/man1/"
cp "$files/completions/gemrun.bash" "$prefix/share/bash-completion/completions/gemrun"

echo "installed $("$prefix/bin/gemrun" --version) as $prefix/bin/gemrun"
case :$PATH: in
*":$prefix/bin:"*) ;;
*) echo "note: $prefix/bin is not on your PATH" ;;
esac
