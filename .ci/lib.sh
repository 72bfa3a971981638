# Sourced by .ci/run: what every step uses.
#   step WHAT…   names the step that begins, with the seconds since the start
#   skip WHAT…   says, now and again at the end, that something was not checked on this machine, and why
#   have PROGRAM whether there is such a program
# shellcheck shell=bash
start=$SECONDS
skipped=()
step() { printf '\n== [%4d s] %s\n' $((SECONDS - start)) "$*"; }
skip() { skipped+=("$*"); printf '!! NOT CHECKED: %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }

# Installs distribution packages when PROGRAM is missing, where that is possible: packages PROGRAM PACKAGE…
packages() {
    have "$1" && return
    shift
    have apt-get || return 1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null 2>&1 && return
    apt-get update -q >/dev/null 2>&1 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null 2>&1
}
