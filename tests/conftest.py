# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the module under test, bundles, and a dom0 that must be left as it was found."""

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import pathlib
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
import uuid

import lines
import pytest

lines.start_if_asked()

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def on_xen():
    try:
        return "control_d" in pathlib.Path("/proc/xen/capabilities").read_text()
    except OSError:
        return False


# on a dom0 the one that is installed, which is compiled: to compile it takes ten seconds there
sys.path.insert(0, "/usr/lib/runX" if on_xen() else str(REPOSITORY))

from fake.dom0 import Dom0  # noqa: E402

import runx  # noqa: E402

IMAGE = "docker.io/library/busybox:latest"
PROGRAM_MOUNTS = [  # this machine's programs and their libraries, in a container; what is a link here is a folder there
    {"destination": path, "type": "bind", "source": os.path.realpath(path), "options": ["rbind", "ro"]}
    for path in ("/usr", "/lib", "/lib64")
    if os.path.exists(path)
]


def pytest_configure(config):
    config.addinivalue_line("markers", "crowd: many VMs at once; it comes last")
    config.addinivalue_line("markers", "main_path: CI runs it on an Arm machine and on newer Debians, too")
    config.addinivalue_line("markers", "processors: it needs a host of two")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("crowd") is not None)
    if not on_xen():
        reason = "needs a Xen dom0: `python3 tests/lab/lab.py test` boots one"
        for item in items:
            if item.path.name.startswith("test_xen_"):
                item.add_marker(pytest.mark.skip(reason=reason))


def open_descriptors():
    """Our open descriptors, without those that only wait for the garbage collector."""
    gc.collect()
    return os.listdir("/proc/self/fd")


def wait_until(condition, what, seconds=30, pause=0.05):
    """Wait for what nobody announces, such as another program's clean-up; fail after `seconds`.  pause: where to look
    takes a time that who is waited for could use."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what}"
        time.sleep(pause)


# <sys/inotify.h>
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 2, 8, 64, 128, 256, 512


def wait_in(folder, condition, what, seconds=60):
    """Wait until condition() holds, of what is in a folder; the kernel announces each change (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    changes = libc.inotify_init1(os.O_CLOEXEC)
    kinds = IN_MODIFY | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
    assert libc.inotify_add_watch(changes, os.fsencode(folder), kinds) >= 0, os.strerror(ctypes.get_errno())
    try:
        deadline = time.monotonic() + seconds
        while not condition():
            announced = select.select([changes], [], [], max(0, deadline - time.monotonic()))[0]
            assert announced, f"still not after {seconds} s: {what}"
            os.read(changes, 4096)
    finally:
        os.close(changes)


def wait_in_xenstore(path, condition, what, seconds=60):
    """Wait until condition() holds, of what is at or below a node; xenstored announces each change."""
    xenstore = runx.Xenstore()
    xenstore.watch((path, what))
    deadline = time.monotonic() + seconds
    while not condition():
        if not xenstore.events:
            announced = select.select([xenstore.fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert announced, f"still not after {seconds} s: {what}"
        xenstore.take_events()


def wait_for(pidfd, seconds=60):
    """Wait until the process has ended; fail after `seconds`."""
    assert select.select([pidfd], [], [], seconds)[0], f"the process has not ended in {seconds} s"


def call(*args, **options):
    """Run a command to its end, and return its result: bytes in and out, never our own standard input."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(args, **{"capture_output": True, "timeout": 120, **options})


def fetch(url):
    """What a web server says, None while it does not."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()
    except OSError:
        return None


# this working tree's runX, which python3 would compile each time if it were told the file
PROGRAM = (
    f"import sys; sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / 'tests')]}; "
    "import lines; lines.start_if_asked(); import runx; runx.run()"
)


def runx_command(*args):
    """Return the argv of a runX command: of the one that is installed on a dom0, elsewhere of this working tree's."""
    return ["runX", *args] if on_xen() else [sys.executable, "-ISc", PROGRAM, *args]


# ---- bundles


ALL_CAPABILITIES = list(runx.CAPABILITIES)


def config(*args, **process):
    """A config.json as an engine writes it for a privileged container, as small as it may be."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": list(args),
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {name: ALL_CAPABILITIES for name in ("bounding", "effective", "permitted")},
            **process,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
    }


def record(of, /, **fields):
    """One of runX's records with these fields, without the document that it reads them from."""
    made = of.__new__(of)
    vars(made).update(fields)
    return made


def namespaces(**paths):
    """linux.namespaces with each kind that a container usually has; paths: of those to join."""
    kinds = ("pid", "mount", "ipc", "uts", "cgroup", "network")
    return [{"type": kind, **({"path": paths[kind]} if paths.get(kind) else {})} for kind in kinds]


def in_memory(spec):
    """The same with its rootfs in the VM's memory: where that does not matter, a life without a server is shorter."""
    return {**spec, "annotations": {**spec.get("annotations", {}), "org.runx.rootfs": "ramdisk"}}


APPLETS = (
    "sh echo cat chmod dd env id kill ln ls mkdir mknod mount nproc poweroff pwd reboot sed sleep stty sync tail true "
    "tty vi"
)


class Bundle:
    """A bundle with a busybox rootfs, and the runX commands on the container made of it."""

    def __init__(self, folder):
        self.folder, self.rootfs, self.id = folder, folder / "rootfs", f"test-{uuid.uuid4().hex[:8]}"
        self.root, self.log, self.pid_file = folder / "root", folder / "log.json", folder / "pid"
        self.pidfds = []
        bin_folder = self.rootfs / "bin"
        bin_folder.mkdir(parents=True)
        shutil.copy(shutil.which("busybox"), bin_folder / "busybox")
        self.add_applets(*APPLETS.split())
        (self.rootfs / "tmp").mkdir()

    def add_applets(self, *names):
        """Add commands of busybox's to the rootfs."""
        for name in names:
            if not os.path.lexists(self.rootfs / "bin" / name):
                (self.rootfs / "bin" / name).symlink_to("busybox")

    def write_config(self, config):
        (self.folder / "config.json").write_text(json.dumps(config))

    def globals(self):
        """The options before a command."""
        return ["--root", str(self.root), "--log", str(self.log), "--log-format", "json"]

    def command(self, command, *args):
        """Return the argv of a runX command on the container; args: its options, or the signal of `kill`."""
        words = [self.id, *args] if command == "kill" else [*args, self.id]
        if command in ("create", "run"):
            words = ["--bundle", str(self.folder), *words]
        return runx_command(*self.globals(), command, *words)

    def runx(self, command, *args, **options):
        return call(*self.command(command, *args), **options)

    def succeed(self, command, *args, **options):
        """Run a command that must have no word to say on standard error; return its standard output."""
        result = self.runx(command, *args, **options)
        assert (result.returncode, result.stderr) == (0, b""), result
        return result.stdout

    def refused(self, command, *args, **options):
        """Run a command that must be refused, in one sentence; return that."""
        result = self.runx(command, *args, **options)
        assert (result.returncode, result.stderr.count(b"\n")) == (1, 1), result
        return result.stderr.decode()

    def check_refused(self, *words, command="create"):
        """A command is refused with these words, on standard error and in the log, and leaves nothing."""
        options = ["--pid-file", str(self.pid_file)] if command == "create" else []
        message = self.refused(command, *options)
        assert message.startswith("runX: ") and "internal error" not in message, message
        assert all(word in message for word in words), message
        assert message == f"runX: {self.last_log()['msg']}\n" and self.last_log()["level"] == "error"
        assert not self.root.joinpath(self.id).exists() and not self.pid_file.exists()

    def run(self, spec=None, **options):
        """`run` of this config, or of the one that is written; return its result."""
        if spec is not None:
            self.write_config(spec)
        return self.runx("run", **options)

    def create(self, *options):
        """`create` with the config that is written; its output goes to files, for the monitor keeps them open as the
        container's."""
        with open(self.folder / "stdout", "wb") as stdout, open(self.folder / "stderr", "wb") as stderr:
            result = self.runx(
                "create", "--pid-file", str(self.pid_file), *options,
                capture_output=False, stdout=stdout, stderr=stderr,
            )  # fmt: skip
        result.stderr = (self.folder / "stderr").read_bytes()
        return result

    def created(self, spec=None, *options):
        """Create a container of this config, or of the one that is written; return a pidfd of its process on dom0,
        which is closed with the bundle."""
        if spec is not None:
            self.write_config(spec)
        result = self.create(*options)
        assert (result.returncode, result.stderr) == (0, b""), result
        self.pidfds.append(os.pidfd_open(self.pid()))
        return self.pidfds[-1]

    def started(self, spec=None):
        """The same, and start it."""
        pidfd = self.created(spec)
        self.succeed("start")
        return pidfd

    def output(self):
        """What a container that was created has written to its standard output until now."""
        return (self.folder / "stdout").read_text()

    def wait_for_output(self, text, seconds=60):
        """Wait until its standard output ends with the text."""
        wait_in(self.folder, lambda: self.output().endswith(text), f"{text!r} at the end of the output", seconds)

    def state(self):
        return json.loads(self.runx("state").stdout)

    def pid(self):
        return int(self.pid_file.read_text())

    def monitor(self):
        """The pid of the monitor, beside the container's."""
        return json.loads((self.root / self.id / "state.json").read_text())["monitor"][0]

    def last_log(self):
        return json.loads(self.log.read_text().splitlines()[-1])

    def domain(self):
        """The domid of the container's domain, by xenstore; None if there is none."""
        xenstore = runx.Xenstore()
        for domid in xenstore.list("/local/domain"):
            if xenstore.read(f"/local/domain/{domid}/name").startswith(f"runx-{self.id}-"):
                return int(domid)
        return None


# ---- disks


def make_image(folder, source, kind="ext4"):
    """An image file of a file system with what is in the folder source."""
    image = folder / f"image.{kind}"
    command = {
        "ext4": ["mkfs.ext4", "-q", "-d", str(source), str(image), "16m"],
        "squashfs": ["mksquashfs", str(source), str(image), "-quiet", "-no-progress"],
        "erofs": ["mkfs.erofs", "-zlz4", str(image), str(source)],
    }[kind]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return image


@contextlib.contextmanager
def mounted(image, target, *options):
    """An image where an engine's snapshotter mounts it; yield the loop device."""
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", ",".join(["loop", *options]), str(image), str(target)], check=True)
    try:
        yield subprocess.check_output(["findmnt", "-no", "SOURCE", str(target)], text=True).strip()
    finally:
        call("umount", str(target))


# for a container: how its root is mounted, and its home
SEEN = "sed -n 's/^[^ ]* \\/ \\([a-z0-9]* [a-z]*\\).*/\\1/p' /proc/mounts; echo $HOME; "


# ---- terminals


DEVPTS = {
    "destination": "/dev/pts", "type": "devpts", "source": "devpts",
    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
}  # fmt: skip


class Terminal:
    """The engine's end of a container's terminal: a pty's master."""

    def __init__(self, fd):
        self.fd, self.seen = fd, b""

    def expect(self, text, seconds=60):
        """Reads until text is there, and forgets all up to it; returns what it was behind."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], (text, self.seen)
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # EIO: the container's end is closed
                data = b""
            assert data, (text, self.seen)
            self.seen += data
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text)

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def interrupt(self, prompt):
        """What the shell at the other end runs, with status 130; what has been typed before has been done by then."""
        self.type(b"echo all re''ad\n")  # what comes late of earlier commands is no answer to the next ones
        self.expect(b"all read\r")
        self.type(b"sh -c 'echo be\"\"gun; exec sleep 1000'\n")
        self.expect(b"begun\r")
        self.type(b"\x03")
        self.expect(prompt)

    def rest(self):
        """What is left until the container's end is closed."""
        try:
            while data := os.read(self.fd, 4096):
                self.seen += data
        except OSError:
            pass
        return self.seen


def check_our_terminal(start):
    """What `out:go line: exit:4` of the fake guest shows and takes at a terminal of ours.  start: with streams."""
    master, slave = os.openpty()
    terminal = Terminal(master)
    process = start(stdin=slave, stdout=slave, session=True)
    os.close(slave)
    terminal.expect(b"go")
    terminal.type(b"\x03typed\n")
    terminal.expect(b"\x03typed\n")
    assert process.wait().returncode == 4
    os.close(master)


class ConsoleSocket:
    """What an engine waits at for the terminal of a container that it creates."""

    def __init__(self, path):
        self.path, self.socket = str(path), socket.socket(socket.AF_UNIX)
        self.socket.bind(self.path)
        self.socket.listen(1)

    def receive(self):
        """The Terminal, from one message with one descriptor and nothing after it; runX does not wait for this."""
        connection, _ = self.socket.accept()
        with connection:
            name, fds, _, _ = socket.recv_fds(connection, 4096, 10)
            assert (name[:9], len(fds), connection.recv(1)) == (b"/dev/pts/", 1, b"")
        return Terminal(fds[0])


@pytest.fixture
def bundle(tmp_path):
    yield from closing(Bundle(tmp_path))


@pytest.fixture
def second(tmp_path):
    """Another bundle."""
    (tmp_path / "second").mkdir()
    yield from closing(Bundle(tmp_path / "second"))


def closing(bundle):
    """Yield the bundle, and remove its container where the test has left one."""
    yield bundle
    for pidfd in bundle.pidfds:
        os.close(pidfd)
    if bundle.root.joinpath(bundle.id).exists():
        bundle.runx("delete", "--force")


# ---- a dom0 without Xen


@pytest.fixture(scope="session")
def one_fake_dom0(tmp_path_factory):
    dom0 = Dom0(tmp_path_factory.mktemp("dom0"))
    yield dom0
    dom0.close()


def emptied(dom0):
    """Yield a fake dom0, which must be empty again after the test, as after all that may go wrong with a container."""
    yield dom0
    left = dom0.left()
    dom0.clean()
    dom0.release()
    assert not left, "what is there now, and what should be"


@pytest.fixture
def dom0(one_fake_dom0):
    """See fake/dom0.py."""
    yield from emptied(one_fake_dom0)


# ---- dom0


def xl(*args):
    return subprocess.run(["xl", *args], stdout=subprocess.PIPE, check=True, text=True).stdout


def listing(*folders):
    return {os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}


def running():
    """(pid, command) of every process."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/comm", encoding="utf-8") as file:
                    yield int(name), file.read().strip()
            except OSError:
                pass  # it has just ended


def processes():
    """Those that runX, xl or an engine may leave."""
    names, prefixes = ("xl", "conmon", "ctr"), ("runX", "xen-qemu", "qemu", "containerd-shim")
    return {(pid, comm) for pid, comm in running() if comm in names or comm.startswith(prefixes)}


def file_servers():
    """The pids of what serves a guest's files."""
    return {pid for pid, comm in processes() if comm == "runX files"}


def can_run_pvh():
    """On Arm all guests are of this kind."""
    return (
        os.uname().machine != "x86_64" or "hvm" in pathlib.Path("/sys/hypervisor/properties/capabilities").read_text()
    )


PODMAN = ["podman", "--cgroup-manager", "cgroupfs", "--runtime", "/usr/sbin/runX"]


@contextlib.contextmanager
def podman_commands():
    """Yield what runs podman, with runX as its runtime; afterwards, what podman leaves running or mounted is gone."""
    yield lambda *args: call(*PODMAN, *args)
    wait_until(lambda: "podman" not in [comm for _, comm in running()], "podman's own cleaning up")
    call("umount", "/var/lib/containers/storage/overlay")


@pytest.fixture
def podman():
    """See podman_commands()."""
    if not shutil.which("podman"):
        pytest.skip("needs podman")
    with podman_commands() as podman:
        yield podman


def shim_pid(name):
    """The pid of a container's containerd-shim."""
    for pid, comm in running():
        if comm.startswith("containerd-shim"):
            try:
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if name.encode() in words:
                return pid
    return None


def descriptors(*names):
    """How many files each of these daemons has open: a dom0 runs out of them slowly and for good."""
    return {comm: len(os.listdir(f"/proc/{pid}/fd")) for pid, comm in running() if comm in names}


def nodes(xenstore, path):
    """All of xenstore below path."""
    for name in xenstore.list(path):
        yield f"{path}/{name}"
        yield from nodes(xenstore, f"{path}/{name}")


XENS_OWN = {"/run/xen/domid-history", "/var/log/xen/xen-hotplug.log"}  # not a domain's


def device_nodes():
    """All that xenstore has of domains' devices, and what libxl notes of each domain."""
    xenstore = runx.Xenstore()
    return set(nodes(xenstore, "/local/domain/0/backend")) | set(xenstore.list("/libxl"))


# everything that a container adds to a dom0 and must take away again: what is looked at sooner takes less time
LOOKS = {
    "processes": processes,
    "state folders": lambda: listing("/run/runX", *(f"/run/containerd/runc/{name}" for name in ("default", "k8s.io"))),
    "mounts": lambda: set(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()),
    "xen files": lambda: listing("/var/log/xen", "/var/lib/xen", "/run/xen") - XENS_OWN,
    "descriptors": lambda: set(descriptors("xenconsoled").items()),
    "xenstore": device_nodes,
    "domains": lambda: set(runx.Xenstore().list("/local/domain")),
}


def dom0_state():
    return {what: look() for what, look in LOOKS.items()}


def difference(before):
    """The first thing of dom0_state() that is not as before: {} where all is."""
    for what, look in LOOKS.items():
        if (now := look()) != before[what]:
            return {what: now ^ before[what]}
    return {}


dom0_before = {}


def names_of_domains():
    """Of those that Xen has, also of what it only keeps because something of it is still mapped."""
    return {line.split()[0] for line in xl("list").splitlines()[1:]}


@pytest.fixture(scope="session")
def same_domains():
    """After the last test, Xen has the domains that it had before: to ask it takes as long as all other looks."""
    before = names_of_domains()
    yield
    wait_until(lambda: names_of_domains() == before, f"no other domains than {before}", 10)


@pytest.fixture
def clean_dom0(same_domains):
    """The leak check: after the test, dom0 is as it was before the first one."""
    dom0_before.update(dom0_before or dom0_state())
    yield
    try:
        wait_until(lambda: not difference(dom0_before), "dom0 as it was before the test", 10)
    except AssertionError:
        now = dom0_state()
        left = {what: now[what] ^ before for what, before in dom0_before.items() if now[what] != before}
        dom0_before.clear()  # one test's leak is not the next one's
        pytest.fail(f"left behind or taken away: {left}")
