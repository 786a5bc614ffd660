# SPDX-License-Identifier: Apache-2.0
"""The lab's hand inside its dom0: run commands for lab.py, one after another.

    agent.py PORT       PORT is a virtio-serial device; frames.py says how bytes travel on it

Control messages, besides credit:

    to lab.py       {"ready": {"steps": [[name, begin, end], ...], "warnings": [...], "uptime"}},
                    with all times in seconds of uptime
                    {"exit": status}: 128 + n if signal n ended the command
    from lab.py     {"start": {"argv", "env", "cwd", "window"}}: window is [rows, columns] and
                    asks for a terminal, or null
                    {"window": [rows, columns]}: the terminal has been resized

When lab.py goes away, the agent ends, and the dom0 with it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Mapping, Sequence

from frames import STDERR, STDIN, STDOUT, Link, Message, Pump, Sink, Source

STATE = "/run/lab"  # dom0-init notes there what it has done


def lines_of(name: str) -> list[str]:
    """The lines of one of dom0-init's notes; none if it has not written it."""
    try:
        with open(f"{STATE}/{name}", encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def report() -> Message:
    """What lab.py wants to know about the boot."""
    steps = [line.split(" ", 2) for line in lines_of("steps")]
    return {
        "steps": [[name, float(begin), float(end)] for begin, end, name in steps],
        "warnings": lines_of("warnings"),
        "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
    }


def set_window(fd: int, window: Sequence[int]) -> None:
    """Tell a terminal its size; its foreground processes get SIGWINCH from the kernel."""
    rows, columns = window
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class Command:
    """One command, its standard streams joined to the link."""

    def __init__(self, link: Link, argv: Sequence[str], env: Mapping[str, str], cwd: str, window: Sequence[int] | None):
        self.terminal: int | None = None
        if window:
            to_command, *from_command = self.start_on_terminal(argv, env, cwd, window)
        else:
            to_command, *from_command = self.start_on_pipes(argv, env, cwd)
        self.stdin = Sink(link, STDIN, to_command)
        self.outputs = [Source(link, stream, fd) for stream, fd in zip((STDOUT, STDERR), from_command)]
        self.pump = Pump(link, self.outputs, [self.stdin])
        self.open_fds = {to_command, *from_command}

    def start_on_pipes(self, argv: Sequence[str], env: Mapping[str, str], cwd: str) -> list[int]:
        """Start it with three pipes; return our ends of them."""
        (stdin, to_command), (from_stdout, stdout), (from_stderr, stderr) = (os.pipe() for _ in range(3))
        ours, theirs = [to_command, from_stdout, from_stderr], [stdin, stdout, stderr]
        try:
            self.process = subprocess.Popen(
                argv, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
            )
        except OSError:
            close_all(ours)
            raise
        finally:
            close_all(theirs)
        for fd in ours:
            os.set_blocking(fd, False)
        return ours

    def start_on_terminal(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str, window: Sequence[int]
    ) -> list[int]:
        """Start it with a controlling terminal; return our end of it, for both directions."""
        self.terminal, slave = pty.openpty()
        set_window(slave, window)
        try:
            self.process = subprocess.Popen(
                argv,
                env=env,
                cwd=cwd,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        except OSError:
            os.close(self.terminal)
            raise
        finally:
            os.close(slave)
        os.set_blocking(self.terminal, False)
        return [self.terminal, self.terminal]

    def run(self) -> int:
        """Move bytes until the command has ended; return its status."""
        ended = os.pidfd_open(self.process.pid)
        ready: set[int] = set()
        while ended not in ready:
            message, ready = self.pump.step(also=[ended])
            if message and "window" in message and self.terminal is not None:
                set_window(self.terminal, message["window"])
            self.close_stdin_at_its_end()
        os.close(ended)
        status = self.process.wait()
        # What it wrote is in the pipes by now.  Their end need not come: a daemon that the
        # command left behind may hold them open.
        for source in self.outputs:
            while source.has_data():
                self.pump.step()
        close_all(self.open_fds)
        return status if status >= 0 else 128 - status

    def close_stdin_at_its_end(self) -> None:
        """Close the pipe to the command when all has been written; a terminal has no such end."""
        at_end = self.stdin.broken or self.stdin.ended and not self.stdin.pending
        if at_end and not self.terminal and self.stdin.fd in self.open_fds:
            self.open_fds.remove(self.stdin.fd)
            os.close(self.stdin.fd)
            self.stdin.broken = True  # should more come, drop it


def execute(link: Link, request: Message) -> int:
    """Run one command; a status as a shell would give it when it cannot even start."""
    try:
        command = Command(link, **request)
    except OSError as error:
        link.send(
            STDERR, f"lab: cannot run {request['argv'][0]} in dom0 (in {request['cwd']}): {error.strerror}\n".encode()
        )
        return 127 if isinstance(error, FileNotFoundError) else 126
    return command.run()


def main() -> int:
    link = Link(os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC))
    link.control(ready=report())
    idle = Pump(link)
    try:
        while True:
            message, _ = idle.step()
            if message and "start" in message:
                status = execute(link, message["start"])
                if os.path.ismount("/share"):
                    subprocess.run(["sync", "--file-system", "/share"], check=False)
                link.control(exit=status)
    except EOFError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
