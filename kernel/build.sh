#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the kernel of RunX's VMs and prints the path of the image. It is kept in the cache, so that the next call with
# the same inputs only prints it.
#
#   build.sh [--arch x86_64|arm64|arm] [--source TARBALL] [--output FILE] [--cached]
#
# --output copies the image there as well; --cached builds nothing and fails if the image is not there yet.
# Of the environment: CC and CROSS_COMPILE name the compiler, and the prefix of it and its binutils; HOSTCFLAGS and
# HOSTLDFLAGS are for the kernel's own programs, which run here; SOURCE_DATE_EPOCH is the time that the image tells as
# that of its build, without it the source's; MAKEFLAGS may hold -j. The image depends on nothing else of this machine.
#
# Debian packages: gcc libc6-dev make flex bison bc patch xz-utils linux-source-6.12 (6.12.111 or later); libelf-dev for
# x86_64, whose build checks the objects (objtool); gcc-aarch64-linux-gnu or gcc-arm-linux-gnueabihf to cross-compile.
set -eu
# what make(1) would take up, and the key of what is kept does not know
unset KCFLAGS KCPPFLAGS KAFLAGS KBUILD_OUTPUT KBUILD_BUILD_VERSION KCONFIG_CONFIG LLVM

fail() {
    echo "kernel/build.sh: $1" >&2
    exit 1
}

begin=$(date +%s)
say() {
    echo "kernel: $(($(date +%s) - begin)) s: $1" >&2
}

case $(uname -m) in
aarch64) machine=arm64 ;;
arm*) machine=arm ;;
*) machine=x86_64 ;;
esac

arch=$machine source='' output='' cached=no
while [ $# -gt 0 ]; do
    case $1 in
    --cached)
        cached=yes
        shift
        continue
        ;;
    --arch | --source | --output) [ $# -gt 1 ] || fail "$1 needs a value." ;;
    *) fail "unknown option $1; see the head of the script." ;;
    esac
    case $1 in
    --arch) arch=$2 ;;
    --source) source=$2 ;;
    --output) output=$2 ;;
    esac
    shift 2
done

cross=${CROSS_COMPILE:-}
case $arch in
x86_64) target=vmlinux image=vmlinux prefix=x86_64-linux-gnu- cross_package=gcc-x86-64-linux-gnu ;;
arm64) target=Image image=arch/arm64/boot/Image prefix=aarch64-linux-gnu- cross_package=gcc-aarch64-linux-gnu ;;
arm) target=zImage image=arch/arm/boot/zImage prefix=arm-linux-gnueabihf- cross_package=gcc-arm-linux-gnueabihf ;;
*) fail "no kernel for architecture $arch: use x86_64, arm64 or arm." ;;
esac
[ "$arch" = "$machine" ] || cross=${cross:-$prefix}
compiler=${CC:-${cross}gcc}

# --- is it there already? ---

here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
if [ -n "$source" ]; then
    [ -r "$source" ] || fail "cannot read the kernel's source $source: name a tarball with --source."
    source_identity=$(sha256sum <"$source")
else
    source=/usr/src/linux-source-6.12.tar.xz
    # Taken from dpkg, because reading 150 MB takes longer than all else that --cached does.
    source_identity=$(dpkg-query -W -f '${Version}' linux-source-6.12 2>&1) || source_identity=missing
fi
compiler_identity=$($compiler --version 2>&1 | head -n 1)
key=$({
    (cd "$here" && sha256sum build.sh common.config "$arch.config" patches/*)
    echo "$arch $source_identity $compiler_identity ${SOURCE_DATE_EPOCH:-}"
} | sha256sum | cut -c 1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/runx
result=$cache/kernel-$arch-$key/vmlinux

deliver() {
    [ -z "$output" ] || cp "$result" "$output"
    echo "$result"
    exit 0
}

[ ! -f "$result" ] || deliver
[ $cached = no ] || exit 1

# --- can it be built? ---

[ -r "$source" ] ||
    fail "cannot read the kernel's source $source: install linux-source-6.12 or name a tarball with --source."

packages=''
need() {
    command -v "$1" >/dev/null || packages="$packages $2"
}
need gcc gcc
[ "$compiler" = gcc ] || need "${compiler%% *}" "$cross_package"
need make make
need flex flex
need bison bison
need bc bc
need patch patch
need xz xz-utils
if [ "$arch" = x86_64 ]; then
    # shellcheck disable=SC2086 # options
    echo '#include <gelf.h>' | gcc ${HOSTCFLAGS:-} -E - >/dev/null 2>&1 || packages="$packages libelf-dev"
fi
[ -z "$packages" ] || fail "cannot build the kernel: install the packages$packages."

# --- build ---

mkdir -p "$cache"
work=$(mktemp -d "$cache/kernel-build.XXXXXX")
builder=''
trap '[ -z "$builder" ] || kill "$builder" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

say "unpacking $source"
# What only takes time and a gigabyte of room: drivers of hardware that no VM has. Their Kconfig and Makefiles stay,
# the build reads them.
mkdir "$work/linux"
XZ_DEFAULTS=-T0 tar -x -f "$source" -C "$work/linux" --strip-components=1 \
    --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/net/ethernet/*.[ch]' \
    --exclude='*/drivers/net/wireless/*.[ch]' --exclude='*/sound/*.[ch]' --exclude='*/Documentation/*.rst' ||
    fail "cannot unpack $source: name an intact tarball of the kernel with --source."

# Of an older one, fs/fuse/readdir.c is not what patches/0018 changes.
wanted='use a source of Linux 6.12.111 or later of that series.'
release=$(sed -n 's/^VERSION = //p; s/^PATCHLEVEL = /./p; s/^SUBLEVEL = /./p' "$work/linux/Makefile" | tr -d '\n')
case $release in
6.12.?*) [ "${release##*.}" -ge 111 ] ;;
*) false ;;
esac || fail "cannot patch $source, which is of Linux $release: $wanted"
for patch in "$here"/patches/*.patch; do
    patch -p1 -s -d "$work/linux" <"$patch" >&2 || fail "cannot apply $patch to $source: $wanted"
done

# The same inputs make the same image.
export LC_ALL=C KBUILD_BUILD_USER=runx KBUILD_BUILD_HOST=runx LOCALVERSION=''
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date -r "$work/linux/Makefile" +%s)}
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$SOURCE_DATE_EPOCH")
MAKEFLAGS=${MAKEFLAGS:--j$(getconf _NPROCESSORS_ONLN)}
export SOURCE_DATE_EPOCH KBUILD_BUILD_TIMESTAMP MAKEFLAGS

# To be called in a subshell, which becomes make: so a signal to it reaches make.
kernel_make() {
    exec make -C "$work/linux" ARCH="$arch" CROSS_COMPILE="$cross" ${CC:+"CC=$CC"} "$@" >"$work/log" 2>&1
}

say "configuring for $arch"
cat "$here/common.config" "$here/$arch.config" >"$work/requested"
(kernel_make KCONFIG_ALLCONFIG="$work/requested" allnoconfig) ||
    fail "cannot configure the kernel: $(tail -n 5 "$work/log")"
lost=$(
    grep '^CONFIG_' "$work/requested" | grep -vxFf "$work/linux/.config" || true
    sed -n 's/^# \(CONFIG_[A-Z0-9_]*\) is not set$/^\1=/p' "$work/requested" | grep -f - "$work/linux/.config" || true
)
[ -z "$lost" ] || fail "the kernel's configuration does not honour these requests, so the fragments need a change:
$lost"

say "compiling"
kernel_make "$target" &
builder=$!
next=30
while sleep 1 && kill -0 "$builder" 2>/dev/null; do
    if [ $(($(date +%s) - begin)) -ge $next ]; then
        say "compiling, $(find "$work/linux" -name '*.o' | wc -l) objects so far"
        next=$((next + 30))
    fi
done
wait "$builder" || {
    tail -n 30 "$work/log" >&2
    fail "cannot compile the kernel; the end of the compiler's messages stands above."
}

image=$work/linux/$image
if [ "$arch" = x86_64 ]; then
    "${cross}strip" -s "$image"
    # What xl needs to start the image as pv (0x0f, which only a PV kernel has) and as pvh (0x12).
    for note in 0x0000000f 0x00000012; do
        "${cross}readelf" -n "$image" | grep -q "^ *Xen .*($note)" ||
            fail "the kernel lacks Xen's ELF note $note: see XEN_PV and XEN_PVH in x86_64.config."
    done
fi
mkdir -p "${result%/*}"
mv "$image" "$result"
say "done, $(($(wc -c <"$result") / 1024)) KiB"
deliver
