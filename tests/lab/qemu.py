#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A QEMU newer than Debian 12's: version 10 takes half as long to start a process in an emulated dom0.

    qemu.py ARCHITECTURE    print the folder of the one that emulates it, fetching it first if need be

The folder is ${XDG_CACHE_HOME:-~/.cache}/runx/qemu-<key>, with packages of the backports to Debian 12, unpacked; remove
it to look for newer ones.  Debian 12's own package, which has to be installed, brings the libraries.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from arch import ARCHITECTURES
from cache import kept
from image import SUITE, ImageError, run
from pythons import mirror

DATA = ["qemu-system-common", "qemu-system-data", "seabios"]


def fetch(packages: list[str], work: Path) -> None:
    """Unpack packages of the backports into the folder; ImageError if they cannot be had, or do not run here."""
    apt = work / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb {mirror()} {SUITE}-backports main\n")
    settings = [
        f"Dir::Etc::SourceList={apt}/sources.list", "Dir::Etc::SourceParts=/dev/null", f"Dir::State::Lists={apt}/lists",
        f"Dir::Cache={apt}", "Acquire::Check-Valid-Until=false", "APT::Sandbox::User=root",
    ]  # fmt: skip
    options = ["-q", *(f"-o{setting}" for setting in settings)]
    run("apt-get", *options, "update")
    run("apt-get", *options, "download", *(f"{package}/{SUITE}-backports" for package in packages), cwd=apt)
    for package in apt.glob("*.deb"):
        run("dpkg-deb", "--extract", package, work)
    shutil.rmtree(apt)
    for program in work.glob("usr/bin/qemu-system-*"):
        run(program, "--version")


def main() -> int:
    packages = [ARCHITECTURES[sys.argv[1]].qemu_package, *DATA]
    inputs = [Path(__file__).read_bytes(), *(package.encode() for package in packages)]
    print(kept(f"qemu-{sys.argv[1]}", inputs, lambda work, _target: fetch(packages, work)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImageError, OSError) as error:
        sys.exit(f"qemu.py: there is no QEMU of the backports, so Debian 12's is used, which is slower: {error}")
