#!/bin/sh
# Builds the base ramdisk of RunX's VMs and prints its path. busybox, which takes the time, is kept in the cache; the
# rest is made anew by each call.
#
#   build.sh [--arch x86_64|arm64|arm] [--busybox TARBALL] [--output FILE] [--cached]
#
# --output copies the ramdisk there as well; --cached builds nothing and fails if the ramdisk is not there yet. Without
# --busybox the source is Debian's, from the mirrors this machine's apt uses. CC names the compiler: for this machine's
# architecture the default is musl-gcc, whose busybox has a fifth of the size of one with glibc; for another it is the
# cross compiler, with glibc, whose prefix CROSS_COMPILE can change.
#
# Debian packages: gcc libc6-dev musl-tools make bzip2 python3; gcc-aarch64-linux-gnu or gcc-arm-linux-gnueabihf to
# cross-compile.
set -eu

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
x86_64) prefix=x86_64-linux-gnu- package=gcc-x86-64-linux-gnu ;;
arm64) prefix=aarch64-linux-gnu- package=gcc-aarch64-linux-gnu ;;
arm) prefix=arm-linux-gnueabihf- package=gcc-arm-linux-gnueabihf ;;
*) fail "no ramdisk for architecture $arch: use x86_64, arm64 or arm." ;;
esac
if [ "$arch" = "$machine" ]; then
    cross='' compiler=${CC:-musl-gcc} package=musl-tools
else
    cross=${CROSS_COMPILE:-$prefix} compiler=${CC:-${CROSS_COMPILE:-$prefix}gcc}
fi

# --- is it there already? ---

here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
if [ -n "$busybox" ]; then
    [ -r "$busybox" ] || fail "cannot read busybox's source $busybox: name a tarball with --busybox."
    source_identity=$(sha256sum <"$busybox")
else
    source_identity=$(apt-cache show --no-all-versions busybox 2>&1 | grep '^Version:') || source_identity=missing
fi
compiler_identity=$($compiler --version 2>&1 | head -n 1)
busybox_key=$({
    (cd "$here" && sha256sum build.sh busybox.config)
    echo "$arch $source_identity $compiler $compiler_identity"
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
need "${compiler%% *}" "$package"
need gcc gcc
need make make
need bzip2 bzip2
need python3 python3
[ -z "$packages" ] || fail "cannot build the ramdisk: install the packages$packages."

mkdir -p "$cache"
work=$(mktemp -d "$cache/initrd-build.XXXXXX")
builder=''
trap '[ -z "$builder" ] || kill "$builder" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# musl has no headers of the kernel: those of this machine's libc6-dev serve, seen through a folder of their own because
# glibc's lie beside them.
flags=''
if [ "$compiler" = musl-gcc ]; then
    mkdir "$work/include"
    ln -s /usr/include/linux /usr/include/asm-generic "/usr/include/$(gcc -print-multiarch)/asm" "$work/include"
    flags="-idirafter $work/include"
fi

# --- busybox ---

# Has apt fetch the source's tarball, which it authenticates, from the mirrors this machine uses, and leaves the
# machine's lists and configuration as they are.
fetch_busybox() {
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    keys=''
    [ ! -f /usr/share/keyrings/debian-archive-keyring.gpg ] ||
        keys='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] '
    # shellcheck disable=SC2016 # the $(...) are apt's
    apt-get indextargets --format "deb-src $keys"'$(SITE) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Component: main' | sort -u >"$work/apt/sources.list"
    set -- -q -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache"
    (apt-get "$@" update && cd "$work/apt" && apt-get "$@" source --download-only --tar-only busybox) \
        >"$work/log" 2>&1 && ls "$work"/apt/busybox_*.orig.tar.*
}

busybox_make() {
    exec make -C "$work/busybox" -j "$(nproc)" CROSS_COMPILE="$cross" CC="$compiler" EXTRA_CFLAGS="$flags" "$@" \
        </dev/null >"$work/log" 2>&1
}

if [ ! -f "$built/busybox" ]; then
    if [ -z "$busybox" ]; then
        say "fetching busybox's source"
        busybox=$(fetch_busybox) || {
            tail -n 10 "$work/log" >&2
            fail "cannot fetch busybox's source with apt: run apt-get update or name a tarball with --busybox."
        }
    fi
    mkdir "$work/busybox"
    tar -x -f "$busybox" -C "$work/busybox" --strip-components=1 ||
        fail "cannot unpack $busybox: name an intact tarball of busybox with --busybox."

    # The first of two lines on one option counts, so ours go before all the "is not set"; no option is new then.
    # The same inputs make the same binary, so no time of the build in it.
    export LC_ALL=C KCONFIG_NOTIMESTAMP=1
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

root=$work/root
mkdir "$root"
(cd "$root" && mkdir bin sbin dev proc sys mnt run etc tmp)
cp "$built/busybox" "$root/bin/busybox"
while read -r link; do
    ln -s busybox "$root/bin/${link##*/}"
done <"$built/links"
# /sbin/poweroff is the doorbell; a second command of that name would be taken for it.
rm "$root/bin/poweroff"

say "compiling enter"
# shellcheck disable=SC2086 # several words each
$compiler $flags -Os -Wall -Wextra -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables \
    -static -s -Wl,--gc-sections -o "$root/sbin/enter" "$here/enter.c" >&2 || fail "cannot compile $here/enter.c."
ln -s enter "$root/sbin/xs"
cp "$here/init" "$root/init"
cp "$here/poweroff" "$root/sbin/poweroff"
if [ -f "$here/udhcpc" ]; then
    cp "$here/udhcpc" "$root/sbin/udhcpc.script"
    chmod 755 "$root/sbin/udhcpc.script"
fi
chmod 755 "$root" "$root"/* "$root/bin/busybox" "$root/sbin/enter" "$root/sbin/poweroff"
chmod 1777 "$root/tmp"

mkdir -p "${result%/*}"
python3 "$here/../runx.py" pack-initrd "$root" "$result" || fail "cannot pack the ramdisk with runx.py."
[ -z "$output" ] || cp "$result" "$output"
say "done, $(($(wc -c <"$result") / 1024)) KiB"
echo "$result"
