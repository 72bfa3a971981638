# Sourced by .ci/run: what a release consists of, made and installed as people would.
#   packages_install TARGET   makes the archive (and the .deb where cargo-deb is) of TARGET, installs it into an empty directory,
#                             refuses a damaged one, and says so on a 32-bit system
# shellcheck shell=bash

packages_install() {
    local home archive byte
    .github/package.sh "$1"
    home=$(mktemp -d)
    env -u PREFIX HOME="$home" sh .github/install.sh target/package
    HOME=$home "$home/.local/bin/gemrun" run demo "What is gemrun?" </dev/null
    man -l "$home/.local/share/man/man1/gemrun.1.gz" >/dev/null 2>&1 || gzip -t "$home"/.local/share/man/man1/*.gz

    # An archive with one byte changed is not installed.
    archive=$(cd target/package && ls ./*.tar.gz)
    cp -r target/package "$home/damaged"
    byte=$(od -An -tu1 -j100000 -N1 "$home/damaged/$archive")
    printf "\\x$(printf %02x $((byte ^ 255)))" | dd of="$home/damaged/$archive" bs=1 seek=100000 conv=notrunc status=none
    if PREFIX=$home/none sh .github/install.sh "$home/damaged" 2>"$home/said"; then
        echo "a damaged archive was installed"
        return 1
    fi
    grep -q 'is damaged' "$home/said" && [ ! -e "$home/none" ]

    # Nor is anything on a system that could not run it.
    mkdir "$home/fake"
    printf '#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo armv7l\n' >"$home/fake/uname"
    chmod +x "$home/fake/uname"
    if PATH=$home/fake:$PATH PREFIX=$home/none sh .github/install.sh target/package 2>"$home/said"; then
        echo "a 32-bit system was given a 64-bit program"
        return 1
    fi
    grep -q '32-bit' "$home/said" && [ ! -e "$home/none" ]

    if compgen -G 'target/package/*.deb' >/dev/null; then
        dpkg-deb -x target/package/*.deb "$home/root"
        if unshare -r true 2>/dev/null; then
            # A root directory with nothing else in it.
            unshare -r chroot "$home/root" /usr/bin/gemrun run demo "What is gemrun?" </dev/null
        else
            skip "the .deb in an empty root: user namespaces are not allowed"
        fi
    else
        skip "the .deb: cargo-deb is not installed"
    fi
    rm -r "$home"
}
