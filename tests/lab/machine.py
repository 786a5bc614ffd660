# SPDX-License-Identifier: Apache-2.0
"""The emulated machine with Xen and a dom0, and the commands that run there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import image
from arch import X86_64, Architecture, machine_options
from common import REPO, LabError, TimeLimit, say
from frames import STDERR, STDIN, STDOUT, Link, Message, Pump, Sink, Source, Target
from release import BOOKWORM, Release

DEFAULT_MEMORY = 4096  # MiB, the whole machine
DEFAULT_TIME_LIMIT = 1800  # seconds
BOOT_TIME_LIMIT = 180  # seconds; on a machine that does nothing else a boot takes 15

DOM0_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",  # /repo is read-only
}


@dataclasses.dataclass
class Step:
    """One part of a boot; `begin` and `end` are in seconds after the start of QEMU."""

    name: str
    begin: float
    end: float


class Lab:
    """One emulated machine with Xen and a dom0: start() it, run() commands, stop() it.

    `arch` is of the machine, `release` of its dom0.  `kernel` and `ramdisk` are files that runX is installed
    with; without both it is not.  `disk` is a file for /dev/vdb in the dom0, which never changes: what is
    written to it is forgotten.  `share` is a folder for /share in the dom0, read-write; `memory` is in MiB; with
    `network` the dom0 reaches other machines through this one.  QEMU runs no longer than the
    thread that calls start().

    After start(), `steps` and `warnings` say how the boot went.
    """

    # from start() to stop()
    folder: Path
    link: Link
    qemu: subprocess.Popen[bytes]

    def __init__(
        self,
        kernel: Path | None = None,
        ramdisk: Path | None = None,
        *,
        arch: Architecture = X86_64,
        release: Release = BOOKWORM,
        disk: Path | None = None,
        share: Path | None = None,
        memory: int = DEFAULT_MEMORY,
        processors: int = 2,
        network: bool = False,
    ):
        self.kernel, self.ramdisk, self.disk, self.share = kernel, ramdisk, disk, share
        self.arch, self.release, self.network = arch, release, network
        self.memory, self.processors = memory, processors
        self.steps: list[Step] = []
        self.warnings: list[str] = []
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, time_limit: float = BOOT_TIME_LIMIT) -> None:
        """Boot, and return when commands can be run.  `time_limit` is in seconds."""
        began = time.monotonic()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="runx-lab-"))
            self.undo.callback(shutil.rmtree, self.folder)
            self.fill_boot_share()
            ours, theirs = socket.socketpair()
            self.undo.enter_context(ours)
            self.link = Link(ours.fileno())
            with theirs:
                self.launch(theirs.fileno())
            report = self.await_agent(began + time_limit)
        except BaseException:
            self.stop()
            raise
        # The dom0's clock started when its kernel did.
        offset = time.monotonic() - began - report["uptime"]
        self.warnings = report["warnings"]
        self.steps = [
            Step(name, offset + begin if begin else 0.0, offset + end) for name, begin, end in report["steps"]
        ]

    def stop(self) -> None:
        """Power off at once and remove what the boot left on this machine."""
        self.undo.close()

    def fill_boot_share(self) -> None:
        """Put the kernel and the ramdisk where dom0-init expects them."""
        boot = self.folder / "boot"
        boot.mkdir()
        for name, source in (("kernel", self.kernel), ("initrd", self.ramdisk)):
            if source:
                shutil.copyfile(source, boot / name)

    def launch(self, agent_fd: int) -> None:
        """Start QEMU, with the agent's end of the link as its file descriptor `agent_fd`."""
        folder = image.image_folder(self.arch, self.release)
        if not folder.exists():
            build = f"tests/lab/lab.py --arch {self.arch.name} --release {self.release.name} build"
            raise LabError(f"starting the lab: there is no dom0 image for this working tree; run {build}")
        with open(self.folder / "qemu.log", "wb") as log:
            self.qemu = subprocess.Popen(
                # setpriv: should we be killed, so is QEMU
                ["setpriv", "--pdeathsig", "KILL", *self.qemu_command(agent_fd)],
                cwd=folder,
                # TMPDIR: what the dom0 writes to its disk goes there
                env={**os.environ, "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[agent_fd],
                start_new_session=True,  # a terminal's Ctrl-C is for us; stop() ends QEMU
            )
            self.undo.callback(self.qemu.wait)
            self.undo.callback(self.qemu.kill)

    def qemu_command(self, agent_fd: int) -> list[str]:
        """QEMU's command line.  Its relative paths are in the image's folder."""
        switches = {"LAB_INSTALL": self.kernel and self.ramdisk, "LAB_SHARE": self.share, "LAB_NETWORK": self.network}
        options = " ".join(f"{name}=1" for name, on in switches.items() if on)
        bus = self.arch.bus
        # fmt: off
        command = [
            *machine_options(self.arch, options), "-nodefaults", "-no-user-config", "-display", "none",
            "-accel", "tcg,thread=multi", "-smp", str(self.processors), "-m", str(self.memory), "-no-reboot",
            "-serial", f"file:{self.folder}/console.log",
            *forgetful_disk("vda", "disk.img", bus),
            "-chardev", f"socket,id=agent,fd={agent_fd}", "-device", f"virtio-serial-{bus}",
            "-device", "virtserialport,chardev=agent",
            *shared_folder("repo", REPO, bus, readonly=True),
            *shared_folder("boot", self.folder / "boot", bus, readonly=True),
        ]
        # fmt: on
        if self.disk:
            command += forgetful_disk("vdb", self.disk, bus)
        if self.share:
            command += shared_folder("share", Path(self.share).resolve(), bus, readonly=False)
        if self.network:
            command += ["-netdev", "user,id=net", "-device", f"virtio-net-{bus},netdev=net"]
        return command

    def await_agent(self, deadline: float) -> Message:
        """Wait for the agent's first message and return what it reports."""
        pump = Pump(self.link)
        while True:
            message = self.step(pump, deadline, "booting Xen and dom0")
            if "ready" in message:
                report: Message = message["ready"]
                return report

    def step(self, pump: Pump, deadline: float, doing: str, also: Sequence[int] = ()) -> Message:
        """One step of the pump, and the message that came, or an empty one.

        LabError at the deadline, or when the machine is gone.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeLimit(f"{doing}: not done at the time limit; the console ended with\n" + self.console_tail())
        try:
            return pump.step(also, remaining)[0] or {}
        except EOFError:
            raise LabError(
                f"{doing}: the machine went off (QEMU's status is {self.qemu.wait()}); "
                "the console ended with\n" + self.console_tail()
            ) from None

    def console_tail(self, count: int = 40) -> str:
        """The last lines of what Xen, dom0 and QEMU have printed."""
        lines: list[str] = []
        for name in ("console.log", "qemu.log"):
            with contextlib.suppress(FileNotFoundError):
                lines += (self.folder / name).read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-count:])

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: bytes | int = b"",
        stdout: Target = 1,
        stderr: Target = 2,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = "/root",
        time_limit: float = DEFAULT_TIME_LIMIT,
        window: Sequence[int] | None = None,
        resizes: int | None = None,
    ) -> int:
        """Run one command as root in the dom0 and return its status, 128 + n for signal n.

        `stdin` is bytes or a file descriptor; `stdout` and `stderr` are file descriptors or
        functions that take bytes.  `env` is added to the dom0's environment.  `time_limit` is in
        seconds.  After an exception the command still runs, and the lab is good only for stop().

        With `window`, [rows, columns], the command has a terminal, whose output goes to `stdout`;
        `resizes` is then a descriptor that is readable whenever window_size() has changed.
        """
        deadline = time.monotonic() + time_limit
        request = {
            "argv": [str(word) for word in argv],
            "cwd": str(cwd),
            "window": window,
            "env": {**DOM0_ENVIRONMENT, **(env or {})},
        }
        with contextlib.ExitStack() as stack:
            if isinstance(stdin, bytes):
                stdin = stack.enter_context(in_memory(stdin)).fileno()
            source = Source(self.link, STDIN, stdin)
            sinks = [Sink(self.link, STDOUT, stdout), Sink(self.link, STDERR, stderr)]
            pump = Pump(self.link, [source], sinks)
            self.link.control(start=request)
            also = [] if resizes is None else [resizes]
            status: int | None = None
            while status is None or any(sink.pending for sink in sinks):
                message = self.step(pump, deadline, f"running {argv[0]}", also)
                if "exit" in message:
                    status = message["exit"]
                    source.ended = True  # nobody takes the rest
                if resizes is not None and drain(resizes):
                    self.link.control(window=window_size())
            return status


def forgetful_disk(name: str, path: str | Path, bus: str) -> list[str]:
    """QEMU's options for a disk with the content of a file, which is left as it is."""
    drive = f"file={str(path).replace(',', ',,')},if=none,id={name},format=raw,snapshot=on,cache=unsafe"
    return ["-drive", drive, "-device", f"virtio-blk-{bus},drive={name}"]


def shared_folder(tag: str, path: Path, bus: str, readonly: bool) -> list[str]:
    """QEMU's options that let the dom0 mount a folder of this machine, by 9p over virtio."""
    options = f"security_model=none,multidevs=remap,readonly={'on' if readonly else 'off'}"
    return [
        "-fsdev", f"local,id={tag},path={str(path).replace(',', ',,')},{options}",
        "-device", f"virtio-9p-{bus},fsdev={tag},mount_tag={tag}",
    ]  # fmt: skip


def in_memory(content: bytes) -> BinaryIO:
    """Return an open file with this content, to be read from its beginning."""
    file = open(os.memfd_create("stdin"), "w+b", buffering=0)
    file.write(content)
    file.seek(0)
    return file


def drain(fd: int) -> bool:
    """Empty a non-blocking descriptor; return whether there was anything."""
    try:
        return bool(os.read(fd, 4096))
    except BlockingIOError:
        return False


def window_size() -> list[int]:
    """[rows, columns] of our terminal."""
    size = os.get_terminal_size(0)
    return [size.lines, size.columns]


@contextlib.contextmanager
def booted_lab(time_limit: float = DEFAULT_TIME_LIMIT, **options: Any) -> Iterator[Lab]:
    """A started lab that tells the user of its warnings; `time_limit`, seconds, is the boot's."""
    lab = Lab(**options)
    try:
        lab.start(min(BOOT_TIME_LIMIT, time_limit))
        for warning in lab.warnings:
            say(f"warning: {warning}")
        yield lab
    finally:
        lab.stop()
