#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs runX on a Xen dom0, or below DESTDIR for an image that will become one.
set -eu
umask 022 # for what is compiled

usage() {
    cat <<END
usage: [DESTDIR=DIR] [PREFIX=/usr] ./install.sh [--kernel FILE] [--initrd FILE] [--uninstall]

Installs PREFIX/sbin/runX, PREFIX/lib/runX, the manual and bash's completion.  The kernel and the base ramdisk of the VMs
are, if not given, those that kernel/build.sh and initrd/build.sh have built on this machine.
END
}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

prefix=${PREFIX:-/usr}
sbin=${DESTDIR:-}$prefix/sbin
lib=${DESTDIR:-}$prefix/lib/runX
manual=${DESTDIR:-}$prefix/share/man/man8
completions=${DESTDIR:-}$prefix/share/bash-completion/completions
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
kernel='' initrd='' uninstall=''

while [ $# -gt 0 ]; do
    case $1 in
    --kernel) kernel=${2:?"install.sh: --kernel needs a file"} && shift ;;
    --initrd) initrd=${2:?"install.sh: --initrd needs a file"} && shift ;;
    --uninstall) uninstall=yes ;;
    --help) usage && exit ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done

if [ "$uninstall" ]; then
    rm -rf "$sbin/runX" "$lib" "$manual/runX.8" "$completions/runX"
    exit
fi

# Before anything is changed.
[ -z "$kernel" ] || [ -f "$kernel" ] || fail "cannot install the kernel: $kernel is not a file"
[ -z "$initrd" ] || [ -f "$initrd" ] || fail "cannot install the initrd: $initrd is not a file"

# Copies a file, readable by all: not every busybox has install(1).
put() {
    cp -f "$1" "$2"
    chmod 644 "$2"
}

# Puts FILE ($2) there as NAME ($1); without one, what SCRIPT ($3) has built, or what is there already.
install_boot_file() {
    file=$2
    [ "$file" ] || file=$("$here/$3" --cached 2>/dev/null) || file=''
    if [ "$file" ]; then
        put "$file" "$lib/$1.new"
        mv "$lib/$1.new" "$lib/$1"
    else
        what="there is no $1 yet: build it"
        [ ! -f "$lib/$1" ] || what="the $1 stays the one of before: build that of this source"
        echo "install.sh: $what with $3 and call install.sh again, or give one with --$1 FILE" >&2
    fi
}

mkdir -p "$sbin" "$lib" "$manual" "$completions"

# The compiled module is used only by the same version of Python, so a build host's does no harm. It has the path that the
# module has on dom0, and no time: the same source and Python make the same file. Python takes it without a look at the
# source, which would be an eighth of what it takes to load it, and it has no docstrings, which nobody reads there.
# Containers may be created meanwhile: there always is a module, and never an older one compiled beside a new source.
trap 'rm -f "$lib/runx.py.new"' EXIT
put "$here/runx.py" "$lib/runx.py.new"
compiled=''
if command -v python3 >/dev/null; then
    compiled=$(python3 -IS -c 'import py_compile, sys
sys.version_info >= (3, 9) or sys.exit("runX needs Python 3.9 or newer")
print(py_compile.compile(
        sys.argv[1], dfile=sys.argv[2], doraise=True, optimize=2,
        cfile=sys.argv[3] + "/__pycache__/runx." + sys.implementation.cache_tag + ".pyc",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH))' \
        "$lib/runx.py.new" "$prefix/lib/runX/runx.py" "$lib") ||
        fail "$(python3 -V) cannot compile runX, and nothing was replaced"
fi
for file in "$lib/__pycache__"/*; do
    [ "$file" = "$compiled" ] || rm -f "$file"
done
mv "$lib/runx.py.new" "$lib/runx.py"

put "$here/docs/runX.8" "$manual/runX.8"
put "$here/docs/runX.bash-completion" "$completions/runX"
install_boot_file kernel "$kernel" kernel/build.sh
install_boot_file initrd "$initrd" initrd/build.sh

# Python compiles a module once and a script at each call, so the command is only this much.
cat >"$sbin/runX.new" <<END
#!/usr/bin/python3 -IS
import gc
import sys

sys.path.insert(0, "$prefix/lib/runX")
gc.disable()  # while a module is loaded there is no garbage to look for
import runx

gc.enable()
runx.run()
END
chmod 755 "$sbin/runX.new"
mv "$sbin/runX.new" "$sbin/runX"
