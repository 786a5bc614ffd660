#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the base ramdisk of RunX's VMs and prints its path. busybox, which takes the time, is kept in the cache; the
# rest is made anew by each call.
#
#   build.sh [--arch x86_64|arm64|arm] [--busybox TARBALL] [--output FILE] [--cached]
#
# --output copies the ramdisk there as well; --cached builds nothing and fails if the ramdisk is not there yet.
# The programs are static, with musl, which makes them a fifth as large as glibc does. Of the environment: CC names
# another compiler, with what libc it has; CROSS_COMPILE the prefix of the compiler, if CC does not name it, and of its
# binutils; MAKEFLAGS may hold -j. Options stand in CC: CFLAGS, CPPFLAGS and LDFLAGS, such as the environment of an SDK
# has for other programs, have no effect. There is no time in the ramdisk, so SOURCE_DATE_EPOCH changes nothing.
# What is not on this machine comes from the Debian mirrors its apt uses: busybox's source unless --busybox is given,
# and to cross-compile the other architecture's musl-dev unless CC is given.
#
# Debian packages: gcc libc6-dev make bzip2 python3 musl-tools; to cross-compile, gcc-aarch64-linux-gnu and
# linux-libc-dev-arm64-cross or gcc-arm-linux-gnueabihf and linux-libc-dev-armhf-cross.
set -eu
unset CFLAGS CPPFLAGS LDFLAGS

fail() {
    echo "initrd/build.sh: $1" >&2
    exit 1
}

begin=$(date +%s)
say() {
    echo "initrd: $(($(date +%s) - begin)) s: $1" >&2
}

case $(uname -m) in
aarch64) machine=arm64 ;;
arm*) machine=arm ;;
*) machine=x86_64 ;;
esac

arch=$machine busybox='' output='' cached=no
while [ $# -gt 0 ]; do
    case $1 in
    --cached)
        cached=yes
        shift
        continue
        ;;
    --arch | --busybox | --output) [ $# -gt 1 ] || fail "$1 needs a value." ;;
    *) fail "unknown option $1; see the head of the script." ;;
    esac
    case $1 in
    --arch) arch=$2 ;;
    --busybox) busybox=$2 ;;
    --output) output=$2 ;;
    esac
    shift 2
done

case $arch in
x86_64) debian_arch=amd64 triplet=x86_64-linux-gnu gcc_package=gcc-x86-64-linux-gnu ;;
arm64) debian_arch=arm64 triplet=aarch64-linux-gnu gcc_package=gcc-aarch64-linux-gnu ;;
arm) debian_arch=armhf triplet=arm-linux-gnueabihf gcc_package=gcc-arm-linux-gnueabihf ;;
*) fail "no ramdisk for architecture $arch: use x86_64, arm64 or arm." ;;
esac
if [ "$arch" = "$machine" ] && [ -z "${CROSS_COMPILE:-}" ]; then
    cross='' compiler=${CC:-musl-gcc} gcc_package=musl-tools
    linux_headers=/usr/include asm_headers=/usr/include/$triplet headers_package=libc6-dev
else
    cross=${CROSS_COMPILE:-$triplet-} compiler=${CC:-${CROSS_COMPILE:-$triplet-}gcc}
    linux_headers=/usr/$triplet/include asm_headers=$linux_headers
    headers_package=linux-libc-dev-$debian_arch-cross
fi

# --- is it there already? ---

# The version that apt would fetch or has installed; the other architectures have the same.
version() {
    apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Version: //p'
}

here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
if [ -n "$busybox" ]; then
    [ -r "$busybox" ] || fail "cannot read busybox's source $busybox: name a tarball with --busybox."
    busybox_identity=$(sha256sum <"$busybox")
else
    busybox_identity=$(version busybox)
fi
musl_version=$(version musl-dev)
compiler_identity=$($compiler --version 2>&1 | head -n 1)
busybox_key=$({
    (cd "$here" && sha256sum build.sh busybox.config)
    echo "$arch $busybox_identity $musl_version $compiler $compiler_identity"
} | sha256sum | cut -c 1-16)
key=$({
    (cd "$here" && sha256sum ./*)
    echo "$busybox_key"
} | sha256sum | cut -c 1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/runx
built=$cache/busybox-$arch-$busybox_key
result=$cache/initrd-$arch-$key/initrd.gz

if [ $cached = yes ]; then
    [ -f "$result" ] || exit 1
    [ -z "$output" ] || cp "$result" "$output"
    echo "$result"
    exit
fi

# --- can it be built? ---

packages=''
need() {
    command -v "$1" >/dev/null || packages="$packages $2"
}
need "${compiler%% *}" "$gcc_package"
need gcc gcc
need make make
need bzip2 bzip2
need python3 python3
[ -n "${CC:-}" ] || [ -d "$asm_headers/asm" ] || packages="$packages $headers_package"
[ -z "$packages" ] || fail "cannot build the ramdisk: install the packages$packages."

mkdir -p "$cache"
work=$(mktemp -d "$cache/initrd-build.XXXXXX")
builder=''
trap '[ -z "$builder" ] || kill "$builder" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# fetch TYPE COMMAND...: has apt-get do COMMAND in $work/TYPE, with the mirrors that this machine uses as sources of
# TYPE (deb or deb-src). Its lists are its own there, so the machine's stay as they are; it authenticates as ever.
fetch() {
    apt=$work/$1
    options="arch=$debian_arch"
    [ ! -f /usr/share/keyrings/debian-archive-keyring.gpg ] ||
        options="$options signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    # shellcheck disable=SC2016 # the $(...) are apt's
    apt-get indextargets --format "$1 [$options] "'$(SITE) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Component: main' 2>"$work/log" | sort -u >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
Dir::Etc::SourceList "$apt/sources.list";
Dir::Etc::SourceParts "-";
Dir::State::Lists "$apt/lists";
Dir::Cache "$apt/cache";
APT::Architecture "$debian_arch";
#clear APT::Architectures;
APT::Architectures { "$debian_arch"; };
END
    shift
    # An update that misses one of several mirrors may still have what is wanted.
    (cd "$apt" && { apt-get -q -c apt.conf update || true; } && apt-get -q -c apt.conf "$@") >"$work/log" 2>&1
}

# --- the libc ---

# musl has no headers of the kernel. Those that came with glibc serve, through a folder of their own because glibc's lie
# beside them.
if [ -z "${CC:-}" ]; then
    mkdir "$work/include"
    ln -s "$linux_headers/linux" "$linux_headers/asm-generic" "$asm_headers/asm" "$work/include"
    if [ -n "$cross" ]; then
        # For another architecture there is no package with a musl-gcc, but that is only gcc told where musl lies.
        musl=$cache/musl-$arch-$musl_version
        if [ ! -f "$musl/specs" ]; then
            say "fetching musl for $arch"
            fetch deb download musl-dev || {
                tail -n 10 "$work/log" >&2
                fail "cannot fetch musl-dev:$debian_arch with apt: run apt-get update or name a cross compiler in CC."
            }
            mkdir -p "$musl"
            dpkg-deb -x "$work"/deb/musl-dev_*.deb "$musl"
            sed "s|/usr/|$musl/usr/|g" "$musl"/usr/lib/*/musl-gcc.specs >"$work/specs"
            mv "$work/specs" "$musl/specs"
        fi
        compiler="$compiler -specs=$musl/specs"
    fi
    compiler="$compiler -idirafter $work/include"
fi

# --- busybox ---

busybox_make() {
    exec make -C "$work/busybox" CROSS_COMPILE="$cross" CC="$compiler" "$@" </dev/null >"$work/log" 2>&1
}

if [ ! -f "$built/busybox" ]; then
    if [ -z "$busybox" ]; then
        say "fetching busybox's source"
        fetch deb-src source --download-only --tar-only busybox || {
            tail -n 10 "$work/log" >&2
            fail "cannot fetch busybox's source with apt: run apt-get update or name a tarball with --busybox."
        }
        busybox=$(ls "$work"/deb-src/busybox_*.orig.tar.*)
    fi
    mkdir "$work/busybox"
    tar -x -f "$busybox" -C "$work/busybox" --strip-components=1 ||
        fail "cannot unpack $busybox: name an intact tarball of busybox with --busybox."

    # The first of two lines on one option counts, so ours go before all the "is not set"; no option is new then.
    # The same inputs make the same binary, so no time of the build in it.
    export LC_ALL=C KCONFIG_NOTIMESTAMP=1 MAKEFLAGS="${MAKEFLAGS:--j$(getconf _NPROCESSORS_ONLN)}"
    (busybox_make allnoconfig) || fail "cannot configure busybox: $(tail -n 5 "$work/log")"
    cat "$here/busybox.config" "$work/busybox/.config" >"$work/config"
    mv "$work/config" "$work/busybox/.config"
    (busybox_make oldconfig) || fail "cannot configure busybox: $(tail -n 5 "$work/log")"
    lost=$(grep '^CONFIG_' "$here/busybox.config" | grep -vxFf "$work/busybox/.config" || true)
    [ -z "$lost" ] || fail "busybox's configuration does not honour these requests, so busybox.config needs a change:
$lost"

    say "compiling busybox"
    busybox_make busybox busybox.links &
    builder=$!
    wait "$builder" || {
        tail -n 30 "$work/log" >&2
        fail "cannot compile busybox; the end of the compiler's messages stands above."
    }
    mkdir -p "$built"
    mv "$work/busybox/busybox.links" "$built/links"
    mv "$work/busybox/busybox" "$built/busybox"
fi

# --- the ramdisk ---

say "compiling init"
umask 022 # modes are in the archive
root=$work/root
mkdir "$root"
(cd "$root" && mkdir bin sbin dev proc sys mnt run etc tmp)
cp "$built/busybox" "$root/bin/busybox"
while read -r link; do
    ln -s busybox "$root/bin/${link##*/}"
done <"$built/links"

# shellcheck disable=SC2086 # a compiler and its options
$compiler -Os -Wall -Wextra -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables \
    -static -s -Wl,--gc-sections -o "$root/sbin/init" "$here"/*.c >&2 ||
    fail "cannot compile init in $here; the compiler's messages stand above."
ln -s sbin/init "$root/init"
for name in poweroff xs net; do
    ln -s init "$root/sbin/$name"
done

# Names and numbers of system calls, for seccomp filters: container.c looks them up.  "-": those of 32-bit programs.
syscalls() { # HEADER PREFIX
    echo "#include <asm/$1>" >"$work/names.h"
    $compiler -E -dM "$work/names.h" | sed -n 's/^#define __NR_\([a-z_][a-z0-9_]*\) .*/= \1 __NR_\1/p' >"$work/numbers"
    cat "$work/names.h" "$work/numbers" >"$work/syscalls.h"
    $compiler -E -P "$work/syscalls.h" | sed -n 's/^= //p' | while read -r name number; do
        # shellcheck disable=SC2004 # on Arm it is a sum, which dash adds up only here
        echo "$2$name $(($number))"
    done
}
{
    syscalls unistd.h ''
    [ "$arch" != x86_64 ] || syscalls unistd_32.h -
} | LC_ALL=C sort >"$root/etc/syscalls"
grep -q '^execve [0-9]' "$root/etc/syscalls" || fail "cannot list the system calls: install $headers_package."
cp "$here/setup" "$root/sbin"
cp "$here/udhcpc" "$root/sbin/udhcpc.script"
chmod 755 "$root" "$root"/* "$root/bin/busybox" "$root"/sbin/*
chmod 1777 "$root/tmp"

mkdir -p "${result%/*}"
python3 "$here/../runx.py" pack-initrd "$root" "$result" || fail "cannot pack the ramdisk with runx.py."
[ -z "$output" ] || cp "$result" "$output"
say "done, $(($(wc -c <"$result") / 1024)) KiB"
echo "$result"
