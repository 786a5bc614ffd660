#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Make the disk with a Debian for containers: a package manager, databases and servers, for what a file system must do.

    debian.py       print its path, making it first if need be

It is ${XDG_CACHE_HOME:-~/.cache}/runx/debian-<key>/disk.img, an ext4 file system (sparse).  The lab
gives it to the dom0 as a second disk, /dev/vdb: a rootfs by itself, and where it is mounted a folder with one.  What a
boot writes to it is forgotten.

Needs root, for the chroot that packages are installed in.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path

import image
from cache import kept

PACKAGES = "apt git nginx postgresql-15 python3-minimal redis-server sqlite3".split()

# What is large and of no use without readers, translations, or a query that is worth compiling.
# fmt: off
EXCLUDED_PATHS = [
    *image.EXCLUDED_PATHS, "/usr/share/lintian/*", "/usr/share/zoneinfo/right/*", "/usr/share/zoneinfo/posix/*",
    "/usr/lib/*/libLLVM-*", "/usr/lib/postgresql/*/lib/bitcode/*", "/usr/lib/postgresql/*/lib/llvmjit*",
    "/usr/lib/*/perl/*/unicore/*", "/usr/lib/*/gconv/*", "/usr/share/i18n/*",
]
# fmt: on
# Packages make users, groups and their configuration; lists and archives of packages are of no use without a network,
# and a cluster of postgres is made by who wants one.
REMOVED = "var/lib/apt/lists/* var/cache/apt/* var/lib/postgresql/15/main etc/postgresql/15/main var/log/*.log".split()
DISK_SIZE = "1G"  # sparse; free space is for what the tests write


def make(work: Path, _target: Path) -> None:
    """Fill the folder."""
    root = work / "root"
    image.make_root(root, image.SUITE, PACKAGES, EXCLUDED_PATHS)
    for pattern in REMOVED:
        for path in root.glob(pattern):
            image.run("rm", "-rf", path)
    image.run("mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", root, work / "disk.img", DISK_SIZE)
    shutil.rmtree(root)


def main() -> int:
    inputs = [Path(__file__).read_text(), inspect.getsource(image.make_root), image.SUITE, *image.EXCLUDED_PATHS]
    print(kept("debian", [text.encode() for text in inputs], make) / "disk.img")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (image.ImageError, OSError) as error:
        sys.exit(f"debian.py: {error}")
