#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Xen for those who have none: boot Xen and a Debian dom0 in QEMU, with runX installed.

    lab.py build                prepare all that the lab needs; the first time takes minutes
    lab.py demo                 run a container as a VM and show what each step took
    lab.py shell                a root shell in the dom0
    lab.py run -- COMMAND...    run one command in the dom0; its streams and status become ours
    lab.py test                 run every check and every test: here, under other Pythons, and in two dom0s at once
    lab.py test ARGS...         run some: ARGS are pytest's, which runs here, in one dom0 or in both places

    lab.py --arch arm64 ...     the same on an Arm machine; what does not depend on the machine is then not tested
    lab.py --release trixie ... the same with a dom0 of a newer Debian: its Xen, Linux, engines and Python

Needs Debian 12 and root; what else is missing, `build` installs, and the other commands begin with
a build.  QEMU emulates the processor in software, so this works in a VM or a container too.  In
the dom0 the working tree is at /repo, read-only.  A boot changes nothing on this machine, and labs
may run side by side.  What is worth keeping is kept in ${XDG_CACHE_HOME:-~/.cache}/runx.

As a library:

    with Lab(kernel, ramdisk) as lab:
        status = lab.run(["xl", "list"], stdout=collect)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

sys.dont_write_bytecode = True  # no __pycache__ in the working tree

import image  # noqa: E402
import suite  # noqa: E402
from arch import ARCHITECTURES, DOM0_MEMORY, X86_64  # noqa: E402
from build import Built, build  # noqa: E402
from common import Interrupted, LabError, say  # noqa: E402
from machine import DEFAULT_MEMORY, DEFAULT_TIME_LIMIT, booted_lab, window_size  # noqa: E402
from release import BOOKWORM, RELEASES  # noqa: E402

SHELL_TIME_LIMIT = 7 * 86400  # seconds
DEMO_SCRIPT = """\
echo "hello from a container that is a Xen domain"
echo "its kernel:     $(uname -srm)"
echo "its memory:     $(free -m | awk '/^Mem/ { print $2 }') MiB"
echo "its processors: $(nproc)"
exit 42
"""
DEMO_STATUS = 42  # any that nothing gives by accident


# -- commands --------------------------------------------------------------------------------------


def command_build(args: argparse.Namespace) -> int:
    """build: prepare all that the lab needs."""
    build(arch=args.arch, release=args.release)
    return 0


def options_of(args: argparse.Namespace, built: Built) -> dict[str, Any]:
    """Return what a Lab is made with for `run` and `shell`."""
    more = {"disk": built.debian, "share": args.share, "memory": args.memory, "network": args.network}
    return {**built.machine(), **more}


def command_run(args: argparse.Namespace) -> int:
    """run: run one command in the dom0."""
    if args.share and not args.share.is_dir():
        raise LabError(f"sharing {args.share}: it is not a folder; make it first")
    for path in (args.kernel, args.initrd):
        if path and not path.exists():
            raise LabError(f"installing runX with {path}: there is no such file; build it first")
    progress = say if args.verbose or sys.stderr.isatty() else (lambda text: None)
    began = time.monotonic()
    built = build(progress, args.kernel, args.initrd, arch=args.arch, release=args.release)
    deadline = time.monotonic() + args.time_limit
    with booted_lab(args.time_limit, **options_of(args, built)) as lab:
        progress(f"{time.monotonic() - began:.1f} s: the dom0 is up")
        return lab.run(args.words, stdin=own_stdin(), time_limit=deadline - time.monotonic())


def own_stdin() -> int:
    """Our standard input, or nothing if we have none."""
    # Reading a terminal from the background then fails, instead of stopping us.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    try:
        os.fstat(0)
    except OSError:
        return os.open(os.devnull, os.O_RDONLY)
    return 0


def command_shell(args: argparse.Namespace) -> int:
    """shell: an interactive shell in the dom0."""
    if not (os.isatty(0) and os.isatty(1)):
        raise LabError(
            "starting a shell: standard input or output is not a terminal; use lab.py run -- COMMAND instead"
        )
    built = build(arch=args.arch, release=args.release)
    with booted_lab(**options_of(args, built)) as lab:
        say("the dom0 is up; leaving the shell powers it off")
        with resize_events() as resizes, raw_terminal():
            return lab.run(
                ["bash", "--login"],
                stdin=0,
                window=window_size(),
                resizes=resizes,
                env={"TERM": os.environ.get("TERM", "dumb")},
                time_limit=SHELL_TIME_LIMIT,
            )


@contextlib.contextmanager
def resize_events() -> Iterator[int]:
    """A descriptor that becomes readable when our terminal's size changes."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.signal(signal.SIGWINCH, lambda *_: os.write(writer, b"\0"))
    try:
        yield reader
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Our terminal passes every key on, unchanged."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def command_demo(args: argparse.Namespace) -> int:
    """demo: run a container, and show what each step took."""
    began = time.monotonic()
    built = build(arch=args.arch, release=args.release)
    set_up = time.monotonic() - began
    with booted_lab(**built.machine(), memory=args.memory) as lab:
        if lab.warnings:
            raise LabError("running the demo: it needs runX in the dom0; see the warnings above")
        kernel: list[bytes] = []
        lab.run(["uname", "-srm"], stdout=kernel.append)
        options = ["--rm", "--runc-binary=/usr/sbin/runX"]
        argv = ["ctr", "run", *options, image.BUSYBOX_REFERENCE, "demo", "sh", "-c", DEMO_SCRIPT]
        print(f"dom0's kernel:  {b''.join(kernel).decode().strip()}\ndom0 # {' '.join(argv[:-1])} ...\n", flush=True)
        run_began = time.monotonic()
        status = lab.run(argv)
        ran = time.monotonic() - run_began
        rows = [("set-up", set_up)]
        rows += [(step.name, step.end - step.begin) for step in lab.steps]
        rows += [("container, from ctr run to its end", ran), ("all", time.monotonic() - began)]
    print(f"\nexit status: {status} ({DEMO_STATUS} is expected)\n")
    for name, seconds in rows:
        print(f"{seconds:7.1f} s  {name}")
    return 0 if status == DEMO_STATUS else 1


def command_test(args: argparse.Namespace) -> int:
    """test: run every check and every test, or some tests here and in a dom0."""
    built = build(for_tests=True, arch=args.arch, release=args.release)
    if args.words:
        return suite.run_some(built, args.words)
    return suite.run_all(built)


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its options.  Words for the dom0's command, or for pytest, are in .words."""
    words: list[str] = []
    command_at = 0
    while argv[command_at : command_at + 1] and argv[command_at].startswith("--"):
        command_at += 1 if "=" in argv[command_at] else 2
    if argv[command_at : command_at + 1] == ["test"]:
        argv, words = argv[: command_at + 1], argv[command_at + 1 :]
    elif "--" in argv:
        split = argv.index("--")
        argv, words = argv[:split], argv[split + 1 :]

    main_parser = argparse.ArgumentParser(
        prog="lab.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=str(__doc__).split("\n\nAs a library")[0],
    )
    main_parser.add_argument(
        "--arch", choices=list(ARCHITECTURES), default=X86_64.name, help="the machine's (default: %(default)s)"
    )
    main_parser.add_argument(
        "--release", choices=list(RELEASES), default=BOOKWORM.name, help="the dom0's Debian (default: %(default)s)"
    )
    commands = main_parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(function: Callable[[argparse.Namespace], int], usage: str) -> argparse.ArgumentParser:
        name, text = str(function.__doc__).rstrip(".").split(": ", 1)
        parser = commands.add_parser(name, help=text, description=text, usage=f"lab.py {name} {usage}")
        parser.set_defaults(function=function, words=words)
        return parser

    options = "[--memory MIB] [--network] [--share DIR]"
    command(command_build, "")
    demo = command(command_demo, "[--memory MIB]")
    shell = command(command_shell, options)
    run = command(
        command_run,
        f"{options} [--kernel FILE] [--initrd FILE]\n              [--time-limit SECONDS] [--verbose] -- COMMAND...",
    )
    command(command_test, "[PYTEST ARGUMENTS...]")
    for parser in (demo, shell, run):
        parser.add_argument(
            "--memory",
            type=memory_size,
            default=DEFAULT_MEMORY,
            metavar="MIB",
            help=f"of the whole machine, {DOM0_MEMORY} of it for the dom0 (default: %(default)s)",
        )
    for parser in (shell, run):
        parser.add_argument("--network", action="store_true", help="give the dom0 a network card")
        parser.add_argument("--share", type=Path, metavar="DIR", help="a folder for /share in the dom0, read-write")
    run.add_argument(
        "--kernel", type=Path, metavar="FILE", help="install runX with this guest kernel, not with kernel/build.sh's"
    )
    run.add_argument(
        "--initrd", type=Path, metavar="FILE", help="install runX with this guest ramdisk, not with initrd/build.sh's"
    )
    run.add_argument(
        "--time-limit",
        type=float,
        default=DEFAULT_TIME_LIMIT,
        metavar="SECONDS",
        help="power off after so long (default: %(default)s)",
    )
    run.add_argument(
        "--verbose", action="store_true", help="report progress even when standard error is not a terminal"
    )
    args = main_parser.parse_args(argv)
    args.arch, args.release = ARCHITECTURES[args.arch], RELEASES[args.release]
    if args.name == "run" and not words:
        run.error("no command; put one after --")
    return args


def memory_size(text: str) -> int:
    """The value of --memory, in MiB."""
    least = DOM0_MEMORY + 512
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB from {least} up")
    return int(text)


def interrupt(signum: int, _frame: FrameType | None) -> None:
    """Signal handler: end, once; nothing may disturb the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signum)


def main() -> int:
    args = parse(sys.argv[1:])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    try:
        status: int = args.function(args)
        return status
    except (LabError, image.ImageError) as error:
        say(str(error))
        return error.status if isinstance(error, LabError) else LabError.status
    except OSError as error:
        say(f"{args.name}: {error}")
        return LabError.status
    except Interrupted as interrupted:
        return interrupted.status


if __name__ == "__main__":
    sys.exit(main())
