#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Every CPython that runX promises to run on, from 3.9 to the newest: those of this machine, and Debian's.

    pythons.py      print the folder of Debian's, fetching them first if need be

The folder is ${XDG_CACHE_HOME:-~/.cache}/runx/pythons-<key>; remove it to look for newer ones.  For each suite of
Debian's it has a tree of unpacked packages, whose interpreters find their own C library.  A suite that cannot be had
is left out, with a warning.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cache import kept
from image import SUITE, ImageError, apt_sources, run

OLDEST = 9  # Python 3.9
SUITES = ["bullseye", "testing"]  # the oldest one with Python 3.9, and the one with the newest
PACKAGES = r"?and(?name(^python3\.[0-9]+$),?not(?virtual))"
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
LOADER = "ld-linux-x86-64.so.2"
QUERY = "import sys; print(sys.implementation.name, *sys.version_info[:2], sys.abiflags)"


def mirror() -> str:
    """The address of the Debian mirror that this machine uses."""
    sources = [line.split() for line in apt_sources().splitlines()]
    return next(uri for _, uri, suite, _ in sources if suite == SUITE)


def unpack(suite: str, folder: Path, target: Path) -> None:
    """Unpack all of the suite's interpreters into the folder, to be moved to `target`; ImageError if that fails."""
    options = ["--mode=root", "--variant=extract", "--format=directory", f"--include={PACKAGES}"]
    options += ["--aptopt=Acquire::Check-Valid-Until false"]  # of a mirror that stands still
    run("mmdebstrap", *options, suite, folder, f"deb {mirror()} {suite} main")
    libraries = [target / path for path in LIBRARIES]
    loader = next(target / path / LOADER for path in LIBRARIES if (folder / path / LOADER).exists())
    for python in sorted(folder.glob("usr/bin/python3.*")):
        if re.fullmatch(r"python3\.\d+", python.name):
            path = ":".join(map(str, libraries))
            run("patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", path, python)


def make(work: Path, target: Path) -> None:
    for suite in SUITES:
        try:
            unpack(suite, work / suite, target / suite)
        except ImageError:
            shutil.rmtree(work / suite, ignore_errors=True)
            print(f"pythons: the interpreters of Debian's {suite} cannot be had", file=sys.stderr, flush=True)
    if not any(work.iterdir()):
        raise ImageError("fetching Pythons: no suite of Debian's can be had")


def candidates(folder: Path | None) -> Iterator[Path]:
    """Whatever may be a CPython; those of this machine come first."""
    yield from Path("/usr/bin").glob("python3.*")
    for entry in os.environ.get("PATH", "").split(":"):
        yield from Path(entry or ".").glob("python3.*")
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from sorted(versions.glob("3.*/bin/python3"), reverse=True)
    if folder:
        yield from folder.glob("*/usr/bin/python3.*")


def find(folder: Path | None) -> dict[int, Path]:
    """Return one CPython 3.N for each N that is to be had, from OLDEST, by N."""
    found: dict[int, Path] = {}
    for path in candidates(folder):
        if not re.fullmatch(r"python3(\.\d+)?", path.name) or "shims" in path.parts:
            continue
        try:
            done = subprocess.run([path, "-IS", "-c", QUERY], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue  # it is no Python, or one for another machine
        answer = re.fullmatch(r"cpython 3 (\d+)", done.stdout.strip())  # the abiflags of a usual one are empty
        if answer and int(answer[1]) >= OLDEST:
            found.setdefault(int(answer[1]), path)
    return dict(sorted(found.items()))


def main() -> int:
    print(kept("pythons", [Path(__file__).read_bytes()], make))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImageError, OSError) as error:
        sys.exit(f"pythons.py: {error}")
