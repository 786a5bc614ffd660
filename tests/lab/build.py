# SPDX-License-Identifier: Apache-2.0
"""What a boot needs: Debian packages of this machine, the dom0 image, runX's kernel and ramdisk."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arch import X86_64, Architecture
from common import REPO, LabError, say
from release import BOOKWORM, Release

HERE = Path(__file__).resolve().parent

# Debian packages on this machine, by what needs them; besides QEMU, which arch.py names.
# fmt: off
HOST_PACKAGES = [
    "mmdebstrap", "e2fsprogs", "kmod", "zstd",                            # image.py
    "gcc", "libc6-dev", "make",                                           # both build.sh
    "linux-source-6.12", "bc", "bison", "flex", "libelf-dev", "patch", "xz-utils",  # kernel/
    "musl-tools", "bzip2",                                                # initrd/
    "busybox-static", "iproute2",                                         # tests/, and image.py
    "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "gcc-arm-linux-gnueabihf", "libc6-dev-armhf-cross",
    "python3-venv", "shellcheck", "patchelf", "git",                      # the checks, and the other Pythons
]
# fmt: on


def missing_packages(wanted: list[str]) -> list[str]:
    """Those of these Debian packages that are not installed."""
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    installed = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in wanted if package not in installed]


def install_packages(packages: list[str]) -> None:
    """Install Debian packages on this machine; apt's messages are shown only if it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["apt-get", "-q", "update"], ["apt-get", "-q", "install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode != 0:
            sys.stderr.buffer.write(done.stdout)
            raise LabError(f"installing {' '.join(packages)}: {' '.join(argv[:3])} failed; its messages are above")


@dataclasses.dataclass
class Builder:
    """A program that prints the path of what it makes, and makes it unless it is cached."""

    what: str
    program: Path
    arguments: tuple[str, ...] = ()
    needed: bool = True
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [str(self.program), *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that abort() ends what it has started, too
        )

    def finish(self) -> Path | None:
        """The path of the result; None if there is none and it is not needed, LabError if it is."""
        assert self.process
        lines = self.process.communicate()[0].splitlines()
        if not self.needed and self.process.returncode != 0:
            return None
        if self.process.returncode != 0 or not lines:
            raise LabError(
                f"making {self.what}: {self.program} failed with status "
                f"{self.process.returncode}; its messages are above"
            )
        return Path(lines[-1])

    def abort(self) -> None:
        """End the program and those that it has started, if it still runs."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


@dataclasses.dataclass
class Built:
    """What runX is installed with in the dom0, None for what the working tree cannot make; what its tests run with."""

    kernel: Path | None
    ramdisk: Path | None
    debian: Path | None = None  # a disk: see debian.py; None if there is none
    tools: Path | None = None  # see tools.py
    pythons: Path | None = None  # see pythons.py; None if there are none
    arch: Architecture = X86_64
    release: Release = BOOKWORM  # of its dom0

    def machine(self) -> dict[str, Any]:
        """Return what a Lab of it is made with, but for its disk."""
        return {"kernel": self.kernel, "ramdisk": self.ramdisk, "arch": self.arch, "release": self.release}


def build(
    progress: Callable[[str], None] = say,
    kernel: Path | None = None,
    ramdisk: Path | None = None,
    for_tests: bool = False,
    arch: Architecture = X86_64,
    release: Release = BOOKWORM,
) -> Built:
    """Prepare everything for a boot, and for the tests; what is cached, or given, is used as it is.

    `progress` is called with a line of text as each step is done.
    """
    began = time.monotonic()

    def report(text: str) -> None:
        progress(f"{time.monotonic() - began:.1f} s: {text}")

    missing = missing_packages([arch.qemu_package, *HOST_PACKAGES])
    if missing:
        say(f"installing {len(missing)} Debian packages: {' '.join(missing)}")
        install_packages(missing)
        report("the Debian packages are installed")
    builders = {"image": Builder("the dom0 image", HERE / "image.py", (arch.name, release.name))}
    if not arch.foreign:  # its packages must be installed, not only unpacked
        builders["debian"] = Builder("the containers' Debian", HERE / "debian.py")
    if not kernel:
        builders["kernel"] = Builder("the guest kernel", REPO / "kernel/build.sh", ("--arch", arch.name))
    if not ramdisk:
        builders["ramdisk"] = Builder("the guest ramdisk", REPO / "initrd/build.sh", ("--arch", arch.name))
    if for_tests:
        builders["tools"] = Builder("the environment for the tests", HERE / "tools.py")
        builders["pythons"] = Builder("the folder of other Pythons", HERE / "pythons.py", needed=False)
    paths = {"kernel": kernel, "ramdisk": ramdisk, **finished(builders, report)}
    get = paths.get
    return Built(get("kernel"), get("ramdisk"), get("debian"), get("tools"), get("pythons"), arch, release)


def finished(builders: dict[str, Builder], report: Callable[[str], None]) -> dict[str, Path | None]:
    """Run them side by side and return what they have made; None where the working tree has no such program."""
    paths: dict[str, Path | None] = {}
    try:
        for builder in builders.values():
            if builder.program.exists():
                builder.start()
        for name, builder in builders.items():
            if builder.process:
                paths[name] = builder.finish()
                report(f"{builder.what} {'is' if paths[name] else 'is not'} ready")
            else:
                paths[name] = None
                say(
                    f"warning: the working tree has no {builder.program.relative_to(REPO)}, "
                    f"so {builder.what} is missing and runX will not be installed"
                )
    finally:
        for builder in builders.values():
            builder.abort()
    return paths
