#!/usr/bin/python3
"""Xen for those who have none: boot Xen and a Debian dom0 in QEMU, with runX installed.

    lab.py build                prepare all that the lab needs; the first time takes minutes
    lab.py demo                 run a container as a VM and show what each step took
    lab.py shell                a root shell in the dom0
    lab.py run -- COMMAND...    run one command in the dom0; its streams and status become ours
    lab.py test [ARGS...]       run every test: pytest here and in the dom0 (without ARGS, in two dom0s at once)

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
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tty
from pathlib import Path

sys.dont_write_bytecode = True  # no __pycache__ in the working tree

import image  # noqa: E402
from frames import STDERR, STDIN, STDOUT, Link, Pump, Sink, Source  # noqa: E402

REPO = Path(__file__).resolve().parents[2]

# Debian packages on this machine, by what needs them.
# fmt: off
HOST_PACKAGES = [
    "qemu-system-x86",                                                    # this file
    "mmdebstrap", "e2fsprogs",                                            # image.py
    "gcc", "libc6-dev", "make",                                           # both build.sh
    "linux-source-6.12", "bc", "bison", "flex", "libelf-dev", "patch", "xz-utils",  # kernel/
    "musl-tools", "bzip2",                                                # initrd/
    "busybox-static", "python3-pytest",                                   # tests/
]
# fmt: on

DOM0_MEMORY = 1024  # MiB
DEFAULT_MEMORY = 4096  # MiB, the whole machine
DEFAULT_TIME_LIMIT = 1800  # seconds
SHELL_TIME_LIMIT = 7 * 86400  # seconds
TEST_TIME_LIMIT = 3600  # seconds
BOOT_TIME_LIMIT = 180  # seconds; on a machine that does nothing else a boot takes 15

# Xen in software emulation is stable only with four features off: with xsave, vector registers
# leak from one domain into another; with smap or smep dom0 crashes; with rdtscp PVH guests do.
# Without erms memory is copied eight bytes at a time, not one: reading the disk is then three times
# as fast.
CPU = "max,-smap,-smep,-rdtscp,-xsave,-erms"

# dom0 gets one of the two processors.  Interrupting the other one, for each TLB flush and each
# patch of the kernel's code, is so slow in emulation that all of dom0 is slower with two; and
# the guests have the second one to themselves.  There is nothing to protect from speculation.
XEN_OPTIONS = (
    f"console=com1 com1=115200,8n1 dom0_mem={DOM0_MEMORY}M,max:{DOM0_MEMORY}M "
    "dom0_max_vcpus=1 loglvl=warning guest_loglvl=warning spec-ctrl=no bootscrub=0"
)

# After loglevel, each option saves a check or a wait that takes a tenth of a second or more.
KERNEL_OPTIONS = "console=hvc0 panic=-1 loglevel=4 mitigations=off rodata=off pmtmr=0 audit=0 cryptomgr.notests"

DOM0_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",  # /repo is read-only
}

DEMO_SCRIPT = """\
echo "hello from a container that is a Xen domain"
echo "its kernel:     $(uname -srm)"
echo "its memory:     $(free -m | awk '/^Mem/ { print $2 }') MiB"
echo "its processors: $(nproc)"
exit 42
"""
DEMO_STATUS = 42  # any that nothing gives by accident


class LabError(Exception):
    """Something that the user should know, in a sentence; the lab ends with `status`."""

    status = 125


class TimeLimit(LabError):
    """Something took too long; the status is that of timeout(1)."""

    status = 124


class Interrupted(BaseException):
    """A signal asks the lab to end; like KeyboardInterrupt, not for `except Exception`."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.status = 128 + signum


def say(text: str) -> None:
    """Tell the user something, beside the output of what runs."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


# -- what a boot needs -----------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Those of HOST_PACKAGES that are not installed."""
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *HOST_PACKAGES],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    installed = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in HOST_PACKAGES if package not in installed]


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
    process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [str(self.program)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that abort() ends what it has started, too
        )

    def finish(self) -> Path:
        """The path of the result; LabError if there is none."""
        lines = self.process.communicate()[0].splitlines()
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
    """What runX is installed with in the dom0; None for what the working tree cannot make."""

    kernel: Path | None
    ramdisk: Path | None


def build(progress=say, kernel: Path | None = None, ramdisk: Path | None = None) -> Built:
    """Prepare everything for a boot; what is cached, or given, is used as it is.

    `progress` is called with a line of text as each step is done.
    """
    began = time.monotonic()

    def report(text):
        progress(f"{time.monotonic() - began:.1f} s: {text}")

    missing = missing_packages()
    if missing:
        say(f"installing {len(missing)} Debian packages: {' '.join(missing)}")
        install_packages(missing)
        report("the Debian packages are installed")
    builders = {"image": Builder("the dom0 image", Path(image.__file__))}
    if not kernel:
        builders["kernel"] = Builder("the guest kernel", REPO / "kernel/build.sh")
    if not ramdisk:
        builders["ramdisk"] = Builder("the guest ramdisk", REPO / "initrd/build.sh")
    paths = {"kernel": kernel, "ramdisk": ramdisk}
    try:
        for builder in builders.values():  # side by side
            if builder.program.exists():
                builder.start()
        for name, builder in builders.items():
            if builder.process:
                paths[name] = builder.finish()
                report(f"{builder.what} is ready")
            else:
                say(
                    f"warning: the working tree has no {builder.program.relative_to(REPO)}, "
                    f"so {builder.what} is missing and runX will not be installed"
                )
    finally:
        for builder in builders.values():
            builder.abort()
    return Built(paths["kernel"], paths["ramdisk"])


# -- the machine -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """One part of a boot; `begin` and `end` are in seconds after the start of QEMU."""

    name: str
    begin: float
    end: float


class Lab:
    """One emulated machine with Xen and a dom0: start() it, run() commands, stop() it.

    `kernel` and `ramdisk` are files that runX is installed with; without both it is not.
    `share` is a folder for /share in the dom0, read-write; `memory` is in MiB; with `network` the
    dom0 reaches other machines through this one.  QEMU runs no longer than the thread that calls
    start().

    After start(), `steps` and `warnings` say how the boot went.
    """

    def __init__(self, kernel=None, ramdisk=None, *, share=None, memory=DEFAULT_MEMORY, network=False):
        self.kernel, self.ramdisk, self.share = kernel, ramdisk, share
        self.memory, self.network = memory, network
        self.steps: list[Step] = []
        self.warnings: list[str] = []
        self.folder = self.qemu = self.link = None

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, time_limit: float = BOOT_TIME_LIMIT) -> None:
        """Boot, and return when commands can be run.  `time_limit` is in seconds."""
        began = time.monotonic()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="runx-lab-"))
            self.fill_boot_share()
            ours, theirs = socket.socketpair()
            self.link = Link(ours.detach())
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
        if self.qemu:
            self.qemu.kill()
            self.qemu.wait()
        if self.link:
            os.close(self.link.fd)
        if self.folder:
            shutil.rmtree(self.folder)
        self.folder = self.qemu = self.link = None

    def fill_boot_share(self) -> None:
        """Put the kernel and the ramdisk where dom0-init expects them."""
        boot = self.folder / "boot"
        boot.mkdir()
        for name, source in (("kernel", self.kernel), ("initrd", self.ramdisk)):
            if source:
                shutil.copyfile(source, boot / name)

    def launch(self, agent_fd: int) -> None:
        """Start QEMU, with the agent's end of the link as its file descriptor `agent_fd`."""
        folder = image.image_folder()
        if not folder.exists():
            raise LabError("starting the lab: there is no dom0 image for this working tree; run tests/lab/lab.py build")
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

    def qemu_command(self, agent_fd: int) -> list[str]:
        """QEMU's command line.  Its relative paths are in the image's folder."""
        switches = {"LAB_INSTALL": self.kernel and self.ramdisk, "LAB_SHARE": self.share, "LAB_NETWORK": self.network}
        options = " ".join([KERNEL_OPTIONS] + [f"{name}=1" for name, on in switches.items() if on])
        # fmt: off
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2",
            "-m", str(self.memory), "-no-reboot",
            "-serial", f"file:{self.folder}/console.log",
            "-kernel", "xen", "-append", XEN_OPTIONS,
            "-initrd", f"vmlinux {options},initrd.img",
            "-drive", "file=disk.img,if=virtio,format=raw,snapshot=on,cache=unsafe",
            "-chardev", f"socket,id=agent,fd={agent_fd}", "-device", "virtio-serial",
            "-device", "virtserialport,chardev=agent",
            *shared_folder("repo", REPO, readonly=True),
            *shared_folder("boot", self.folder / "boot", readonly=True),
        ]
        # fmt: on
        if self.share:
            command += shared_folder("share", Path(self.share).resolve(), readonly=False)
        if self.network:
            command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        return command

    def await_agent(self, deadline: float) -> dict:
        """Wait for the agent's first message and return what it reports."""
        pump = Pump(self.link)
        while True:
            message = self.step(pump, deadline, "booting Xen and dom0")
            if "ready" in message:
                return message["ready"]

    def step(self, pump: Pump, deadline: float, doing: str, also=()) -> dict:
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
        lines = []
        for name in ("console.log", "qemu.log"):
            with contextlib.suppress(FileNotFoundError):
                lines += (self.folder / name).read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-count:])

    def run(
        self,
        argv,
        *,
        stdin=b"",
        stdout=1,
        stderr=2,
        env=None,
        cwd="/root",
        time_limit: float = DEFAULT_TIME_LIMIT,
        window=None,
        resizes=None,
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
            status = None
            while status is None or any(sink.pending for sink in sinks):
                message = self.step(pump, deadline, f"running {argv[0]}", also)
                if "exit" in message:
                    status = message["exit"]
                    source.ended = True  # nobody takes the rest
                if also and drain(resizes):
                    self.link.control(window=window_size())
            return status


def shared_folder(tag: str, path: Path, readonly: bool) -> list[str]:
    """QEMU's options that let the dom0 mount a folder of this machine, by 9p over virtio."""
    escaped = str(path).replace(",", ",,")
    return [
        "-virtfs",
        f"local,path={escaped},mount_tag={tag},security_model=none,"
        f"multidevs=remap,readonly={'on' if readonly else 'off'}",
    ]


def in_memory(content: bytes):
    """An open file with this content, to be read from its beginning."""
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


# -- commands --------------------------------------------------------------------------------------


@contextlib.contextmanager
def booted_lab(time_limit: float = DEFAULT_TIME_LIMIT, **options):
    """A started lab that tells the user of its warnings; `time_limit`, seconds, is the boot's."""
    lab = Lab(**options)
    try:
        lab.start(min(BOOT_TIME_LIMIT, time_limit))
        for warning in lab.warnings:
            say(f"warning: {warning}")
        yield lab
    finally:
        lab.stop()


def command_build(_args) -> int:
    """build: prepare all that the lab needs."""
    build()
    return 0


def command_run(args) -> int:
    """run: run one command in the dom0."""
    if args.share and not args.share.is_dir():
        raise LabError(f"sharing {args.share}: it is not a folder; make it first")
    for path in (args.kernel, args.initrd):
        if path and not path.exists():
            raise LabError(f"installing runX with {path}: there is no such file; build it first")
    progress = say if args.verbose or sys.stderr.isatty() else (lambda text: None)
    began = time.monotonic()
    built = build(progress, args.kernel, args.initrd)
    deadline = time.monotonic() + args.time_limit
    with booted_lab(
        args.time_limit,
        kernel=built.kernel,
        ramdisk=built.ramdisk,
        share=args.share,
        memory=args.memory,
        network=args.network,
    ) as lab:
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


def command_shell(args) -> int:
    """shell: an interactive shell in the dom0."""
    if not (os.isatty(0) and os.isatty(1)):
        raise LabError(
            "starting a shell: standard input or output is not a terminal; use lab.py run -- COMMAND instead"
        )
    built = build()
    with booted_lab(
        kernel=built.kernel, ramdisk=built.ramdisk, share=args.share, memory=args.memory, network=args.network
    ) as lab:
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
def resize_events():
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
def raw_terminal():
    """Our terminal passes every key on, unchanged."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def command_demo(args) -> int:
    """demo: run a container, and show what each step took."""
    began = time.monotonic()
    built = build()
    set_up = time.monotonic() - began
    with booted_lab(kernel=built.kernel, ramdisk=built.ramdisk, memory=args.memory) as lab:
        if lab.warnings:
            raise LabError("running the demo: it needs runX in the dom0; see the warnings above")
        kernel = []
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


PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-rs"]


def command_test(args) -> int:
    """test: run the tests that need no Xen here, then the others in the dom0."""
    here, there = divide_tests(args.words)
    built = build()
    with tempfile.TemporaryDirectory() as claims:
        jobs = []
        if there and args.words:
            jobs.append(lambda: test_in_lab(built, there))
        elif there:
            jobs += [lambda: test_in_lab(built, there, Path(claims))] * 2
        if here:
            jobs.append(lambda: call(["/usr/bin/python3", *PYTEST, "--ignore-glob=*/test_xen_*", *here]))
        if len(jobs) > 1:
            say(f"{len(jobs)} runs of pytest side by side; what the first one prints comes at once")
        statuses = side_by_side(jobs)
    # 5 means that no test was selected, which may well be so in one of the places.
    failed = [status for status in statuses if status not in (0, 5)]
    return failed[0] if failed else min(statuses)


def test_in_lab(built: Built, words: list[str], claims: Path | None = None) -> int:
    """Run pytest in a dom0; with other labs that have the same folder `claims`, each test in one: see conftest.py."""
    command = ["python3", *PYTEST, "--durations=10", "-o", "python_files=test_xen_*.py", *words]
    env = {"TEST_CLAIMS": "/share"} if claims else {}
    with booted_lab(kernel=built.kernel, ramdisk=built.ramdisk, share=claims) as lab:
        return lab.run(command, env=env, time_limit=TEST_TIME_LIMIT)


def side_by_side(jobs) -> list[int]:
    """Their statuses: one lab leaves nearly half of two processors idle.  What the first one prints comes at once."""
    with contextlib.ExitStack() as stack:
        others = []
        for job in jobs[1:]:
            output = stack.enter_context(tempfile.TemporaryFile())
            others.append((start_job(job, output), output))
        try:
            statuses = [jobs[0]()]
            while others:
                child, output = others[0]
                statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                show(output)
                del others[0]
            return statuses
        finally:
            for child, _ in others:
                os.kill(child, signal.SIGINT)
            for child, output in others:
                os.waitpid(child, 0)
                show(output)


def start_job(job, output) -> int:
    """Run it in a process of its own, which is returned, with its output and errors in a file."""
    child = os.fork()
    if child:
        return child
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    status = 1
    try:
        status = job()
    except (LabError, OSError, Interrupted) as error:
        say(str(error))
    finally:
        os._exit(status)


def show(output) -> None:
    output.seek(0)
    shutil.copyfileobj(output, sys.stdout.buffer)
    sys.stdout.flush()


def divide_tests(words: list[str]) -> tuple[list[str], list[str]]:
    """Pytest's arguments here and in the dom0; an empty list where there is nothing to run.

    Files and folders of the working tree are named by their path in the respective place, and
    files only where they belong; the other arguments are the same.
    """
    here, there, paths_here, paths_there = [], [], [], []
    for word in words:
        path, colons, test = word.partition("::")
        inside = Path(path).exists() and REPO in [Path(path).resolve(), *Path(path).resolve().parents]
        if word.startswith("-") or not inside:
            here.append(word)
            there.append(word)
            continue
        path = Path(path).resolve()
        if path.is_dir() or not path.name.startswith("test_xen_"):
            paths_here.append(str(path) + colons + test)
        if path.is_dir() or path.name.startswith("test_xen_"):
            paths_there.append(str("/repo" / path.relative_to(REPO)) + colons + test)
    if not paths_here and not paths_there:
        paths_here, paths_there = [str(REPO / "tests")], ["/repo/tests"]
    return (here + paths_here if paths_here else [], there + paths_there if paths_there else [])


def call(argv: list[str]) -> int:
    """Run a program of this machine that cleans up after SIGINT; let it do so when we must end."""
    process = subprocess.Popen(
        argv,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,  # so that a terminal's Ctrl-C reaches only us
    )
    try:
        status = process.wait()
        return status if status >= 0 else 128 - status
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its options.  Words for the dom0's command, or for pytest, are in .words."""
    words = []
    if argv[:1] == ["test"]:
        argv, words = argv[:1], argv[1:]
    elif "--" in argv:
        split = argv.index("--")
        argv, words = argv[:split], argv[split + 1 :]

    main_parser = argparse.ArgumentParser(
        prog="lab.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\nAs a library")[0],
    )
    commands = main_parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(function, usage):
        name, text = function.__doc__.rstrip(".").split(": ", 1)
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
    if args.name == "run" and not words:
        run.error("no command; put one after --")
    return args


def memory_size(text: str) -> int:
    """The value of --memory, in MiB."""
    least = DOM0_MEMORY + 512
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB from {least} up")
    return int(text)


def interrupt(signum: int, _frame) -> None:
    """Signal handler: end, once; nothing may disturb the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signum)


def main() -> int:
    args = parse(sys.argv[1:])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    try:
        return args.function(args)
    except (LabError, image.ImageError) as error:
        say(str(error))
        return getattr(error, "status", LabError.status)
    except OSError as error:
        say(f"{args.name}: {error}")
        return LabError.status
    except Interrupted as interrupted:
        return interrupted.status


if __name__ == "__main__":
    sys.exit(main())
