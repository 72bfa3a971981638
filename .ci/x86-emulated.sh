#!/usr/bin/env bash
# Runs a static x86-64 Linux program on a CPU this machine need not have: Bochs interprets a whole PC, which boots
# a Debian kernel with the program as its only process. Slow (a boot is 0.6 G instructions, at 50 to 100 M/s) and
# sealed: the program sees its arguments and no file, no environment, no input, one core, 1 GB.
#   x86_emulated_run MODEL PROGRAM ARGS…  prints its stdout and stderr (at the end), returns its exit code
#                                         (125: the machine failed, 124: not done after X86_SECONDS)
# Sourced, it defines that function and sets x86_emulated=yes if it works here; called with those arguments, as
# by cargo as a runner, it runs them. MODEL is one of Bochs's, of which these differ in what kernels look at:
#   corei7_haswell_4770   AVX2                     arrow_lake        AVX2, AVX-VNNI
#   corei7_skylake_x      AVX-512 without VNNI     corei7_icelake_u  AVX-512 with VNNI
#   sapphire_rapids       AVX-512 with VNNI, AVX-VNNI
# The first use makes the machine in X86_ROOT: two minutes of compiler, as Debian's own Bochs is a debugger's.
# shellcheck shell=bash
X86_ROOT=${X86_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/gemrun-x86-emulated}
x86_source=pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz # at the mirror apt knows
x86_sha256=78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b

# Everything into $1, which becomes X86_ROOT only when whole: files of a boot image, BIOSes, the emulator.
x86_make() (
    set -e
    local dir=$1
    install() {
        apt-get install -y -q --no-install-recommends bochsbios vgabios isolinux syslinux-common genisoimage \
            cpio busybox-static curl ca-certificates xz-utils make g++
    }
    install || { apt-get update -q && install; }
    mkdir -p "$dir/iso/isolinux" "$dir/kernel" "$dir/src" "$dir/build"
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$dir/iso/isolinux"
    cp /usr/share/bochs/BIOS-bochs-latest /usr/share/vgabios/vgabios.bin /bin/busybox "$dir"

    # No module is loaded, so the kernel image alone is needed: downloaded, not installed.
    cd "$dir/kernel"
    apt-get download "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-\)/\1/p')"
    dpkg -x linux-image-*.deb .
    cp boot/vmlinuz-* "$dir/iso/vmlinuz"
    # Two faults of Bochs 3.0 are kept away: a loop of page faults in copies by `rep movsb` (fsrm), and a panic
    # when it leaves system management mode with five-level paging on.
    cat >"$dir/iso/isolinux/isolinux.cfg" <<-END
	default linux
	label linux
	 kernel /vmlinuz
	 initrd /initrd
	 append console=ttyS0,115200 quiet nokaslr mitigations=off no5lvl clearcpuid=fsrm panic=-1
	END

    cd "$dir/build"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | sort -u | head -n 1)
    curl -sSfL --retry 3 "${mirror%/}/$x86_source" -o ../bochs.tar.xz
    echo "$x86_sha256 ../bochs.tar.xz" | sha256sum -c
    tar xf ../bochs.tar.xz -C ../src --strip-components=1
    ../src/configure --with-nogui --enable-x86-64 --enable-avx --enable-evex --enable-memtype \
        --enable-all-optimizations --disable-logging --disable-stats --disable-docbook CXXFLAGS=-O2 CFLAGS=-O2
    make -j"$(nproc)"
    cp bochs "$dir/bochs"
    cd "$dir"
    rm -rf src build kernel bochs.tar.xz
)

x86_emulated_run() (
    model=$1 program=$2
    shift 2
    run=$(mktemp -d)
    trap 'rm -rf "$run"' EXIT
    mkdir -p "$run/init/dev" "$run/init/proc" "$run/init/sys" "$run/init/tmp"
    cp "$X86_ROOT/busybox" "$run/init"
    strip -o "$run/init/program" "$program" || return 125
    # The second and third serial line carry stdout and stderr, the console the exit code.
    cat >"$run/init/init" <<-END
	#!/busybox sh
	/busybox mount -t devtmpfs none /dev
	/busybox mount -t proc none /proc
	/busybox mount -t sysfs none /sys
	/busybox stty -F /dev/ttyS1 raw 115200
	/busybox stty -F /dev/ttyS2 raw 115200
	/program ${*@Q} </dev/null >/dev/ttyS1 2>/dev/ttyS2
	echo "exit code \$?"
	/busybox poweroff -f
	END
    chmod +x "$run/init/init"
    cp -r "$X86_ROOT/iso" "$run"
    (cd "$run/init" && find . | cpio -o -H newc --quiet) >"$run/iso/initrd"
    genisoimage -quiet -o "$run/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
        -boot-load-size 4 -boot-info-table "$run/iso" || return 125
    cat >"$run/bochsrc" <<-END
	display_library: nogui
	romimage: file=$X86_ROOT/BIOS-bochs-latest
	vgaromimage: file=$X86_ROOT/vgabios.bin
	cpu: model=$model, ips=50000000, reset_on_triple_fault=0
	memory: guest=1024, host=1024
	ata0-master: type=cdrom, path=$run/boot.iso, status=inserted
	boot: cdrom
	com1: enabled=1, mode=file, dev=$run/console
	com2: enabled=1, mode=file, dev=$run/stdout
	com3: enabled=1, mode=file, dev=$run/stderr
	clock: sync=none
	log: $run/bochs.log
	info: action=ignore
	END
    touch "$run/console" "$run/stdout" "$run/stderr"
    stopped=0
    timeout "${X86_SECONDS:-3600}" "$X86_ROOT/bochs" -q -f "$run/bochsrc" >"$run/messages" 2>&1 || stopped=$?
    cat "$run/stdout"
    cat "$run/stderr" >&2
    code=$(sed -n 's/^exit code \([0-9]*\)\r*$/\1/p' "$run/console")
    if [ -z "$code" ]; then
        code=$((stopped == 124 ? 124 : 125))
        echo "x86-emulated: $model: no exit code (bochs: $stopped); the last it said:" >&2
        tail -n 5 "$run/console" "$run/bochs.log" "$run/messages" >&2
    fi
    return "$code"
)

if [ ! -x "$X86_ROOT/bochs" ]; then
    mkdir -p "$(dirname "$X86_ROOT")"
    x86_new=$(mktemp -d "$X86_ROOT.XXXXXX")
    x86_make "$x86_new" >"$x86_new/log" 2>&1 & # in a condition, `set -e` would not hold in it
    if wait $!; then
        mv -T "$x86_new" "$X86_ROOT" || rm -rf "$x86_new"
    fi
fi
if [ -x "$X86_ROOT/bochs" ]; then
    x86_emulated=yes
else
    x86_emulated=
    echo "x86-emulated: NO EMULATOR HERE, code for AVX-512 and AVX-VNNI stays unrun (see $x86_new/log)" >&2
fi
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    [ -n "$x86_emulated" ] || exit 125
    x86_emulated_run "$@"
fi
