"""What the tests share: the module under test, bundles, and a dom0 that must be left as it was found."""

import fcntl
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
import uuid

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import runx  # noqa: E402

IMAGE = "docker.io/library/busybox:latest"


def on_xen():
    try:
        return "control_d" in pathlib.Path("/proc/xen/capabilities").read_text()
    except OSError:
        return False


def pytest_configure(config):
    config.addinivalue_line("markers", "crowd: many VMs at once; it comes last, when no other dom0 has anything to run")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("crowd") is not None)
    if not on_xen():
        reason = "needs a Xen dom0: `python3 tests/lab/lab.py test` boots one"
        for item in items:
            if item.path.name.startswith("test_xen_"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtestloop(session):
    """With TEST_CLAIMS, a folder that several dom0s share, each test runs in the one that comes to it first."""
    if "TEST_CLAIMS" not in os.environ or session.testsfailed:
        return None  # as usual
    for number, item in enumerate(session.items):
        try:
            os.mkdir(os.path.join(os.environ["TEST_CLAIMS"], str(number)))
        except FileExistsError:
            continue
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    return True


def wait_until(condition, what, seconds=30):
    """Waits for what nobody announces, such as another program's clean-up; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what}"
        time.sleep(0.05)


def wait_for(pidfd, seconds=60):
    assert select.select([pidfd], [], [], seconds)[0], f"the process has not ended in {seconds} s"


def call(*args, **options):
    """Runs a command to its end; bytes in and out, never our own standard input."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(args, timeout=120, **{"capture_output": True, **options})


# ---- bundles


ALL_CAPABILITIES = [f"CAP_{name}" for name in runx.CAPABILITIES]


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


def namespaces(**paths):
    """linux.namespaces with each kind that a container usually has; paths: of those to join."""
    kinds = ("pid", "mount", "ipc", "uts", "cgroup", "network")
    return [{"type": kind, **({"path": paths[kind]} if paths.get(kind) else {})} for kind in kinds]


def in_memory(spec):
    """The same with its rootfs in the VM's memory: where that does not matter, a life without QEMU is shorter."""
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
        for applet in APPLETS.split():
            (bin_folder / applet).symlink_to("busybox")
        (self.rootfs / "tmp").mkdir()

    def write_config(self, config):
        (self.folder / "config.json").write_text(json.dumps(config))

    def command(self, command, *args):
        """The argv of a runX command on the bundle's root."""
        return ["runX", "--root", str(self.root), "--log", str(self.log), "--log-format", "json", command, *args]

    def runx(self, command, *args, **options):
        return call(*self.command(command, *args), **options)

    def create(self, *options):
        """Its output goes to files: the monitor keeps them open as the container's."""
        with open(self.folder / "stdout", "wb") as stdout, open(self.folder / "stderr", "wb") as stderr:
            result = self.runx(
                "create", "--bundle", str(self.folder), "--pid-file", str(self.pid_file), *options, self.id,
                capture_output=False, stdout=stdout, stderr=stderr,
            )  # fmt: skip
        result.stderr = (self.folder / "stderr").read_bytes()
        return result

    def created(self, *options):
        """Creates it, which must succeed; returns a pidfd of the monitor, which is closed with the bundle."""
        result = self.create(*options)
        assert (result.returncode, result.stderr) == (0, b""), result
        self.pidfds.append(os.pidfd_open(self.pid()))
        return self.pidfds[-1]

    def run(self, *args, **options):
        self.write_config(config(*args))
        return self.runx("run", "--bundle", str(self.folder), self.id, **options)

    def state(self):
        return json.loads(self.runx("state", self.id).stdout)

    def pid(self):
        return int(self.pid_file.read_text())

    def monitor(self):
        """The pid of the monitor, beside the container's."""
        return json.loads((self.root / self.id / "state.json").read_text())["monitor"][0]

    def last_log(self):
        return json.loads(self.log.read_text().splitlines()[-1])

    def domain(self):
        """The domid of the container's domain, as xl sees it."""
        for line in xl("list").splitlines()[1:]:
            if line.startswith(f"runx-{self.id}-"):
                return int(line.split()[1])
        return None


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

    def rest(self):
        """What is left until the container's end is closed."""
        try:
            while data := os.read(self.fd, 4096):
                self.seen += data
        except OSError:
            pass
        return self.seen


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
    bundle = Bundle(tmp_path)
    yield bundle
    for pidfd in bundle.pidfds:
        os.close(pidfd)
    if bundle.root.joinpath(bundle.id).exists():
        bundle.runx("delete", "--force", bundle.id)


@pytest.fixture
def second(tmp_path):
    """Another bundle."""
    (tmp_path / "second").mkdir()
    return Bundle(tmp_path / "second")


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
    names, prefixes = ("runX", "xl", "conmon", "ctr"), ("xen-qemu", "qemu", "containerd-shim")
    return {(pid, comm) for pid, comm in running() if comm in names or comm.startswith(prefixes)}


def can_run_pvh():
    return "hvm" in pathlib.Path("/sys/hypervisor/properties/capabilities").read_text()


@pytest.fixture
def podman():
    """Runs podman, with runX as its runtime; afterwards, what podman leaves running or mounted is gone."""
    if not shutil.which("podman"):
        pytest.skip("needs podman")
    yield lambda *args: call("podman", "--cgroup-manager", "cgroupfs", "--runtime", "/usr/sbin/runX", *args)
    wait_until(lambda: "podman" not in [comm for _, comm in running()], "podman's own cleaning up")
    call("umount", "/var/lib/containers/storage/overlay")


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


def dom0_state():
    """Everything that a container adds to a dom0 and must take away again."""
    xenstore = runx.Xenstore()
    return {
        "domains": {line.split()[0] for line in xl("list").splitlines()[1:]},
        "mounts": set(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()),
        "processes": processes(),
        "state folders": listing("/run/runX", "/run/containerd/runc/default"),
        "xenstore": set(nodes(xenstore, "/local/domain/0/backend")) | set(xenstore.list("/libxl")),
        "xen files": listing("/var/log/xen", "/var/lib/xen", "/run/xen") - XENS_OWN,
        "descriptors": set(descriptors("xenconsoled").items()),
    }


def difference(before):
    """What of dom0_state() is not as before: {} where all is."""
    now = dom0_state()
    return {key: now[key] ^ before[key] for key in now if now[key] != before[key]}


dom0_before = {}


@pytest.fixture
def clean_dom0():
    """The leak check: after the test, dom0 is as it was before the first one."""
    dom0_before.update(dom0_before or dom0_state())
    yield
    left = {}

    def nothing_left():
        left.clear()
        left.update(difference(dom0_before))
        return not left

    try:
        wait_until(nothing_left, "dom0 as it was before the test", 10)
    except AssertionError:
        dom0_before.clear()  # one test's leak is not the next one's
        pytest.fail(f"left behind or taken away: {left}")
