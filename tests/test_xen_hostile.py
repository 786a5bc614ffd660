# SPDX-License-Identifier: Apache-2.0
"""A guest that speaks to the rings of its files itself: it sees nothing but the share, keeps nobody waiting, and takes
no more of dom0 than is said."""

import ast
import contextlib
import ctypes
import os
import pathlib
import resource
import select
import shutil
import stat
import subprocess
import threading

import pytest
from conftest import config, file_servers, wait_until

import runx

PROGRAM = pathlib.Path(__file__).with_name("hostile_guest.py")
IMAGES = sorted(pathlib.Path("/boot").glob("vmlinuz-*"))
pytestmark = [
    pytest.mark.usefixtures("clean_dom0"), pytest.mark.skipif(not IMAGES, reason="needs a Debian kernel in /boot")
]  # fmt: skip

INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
busybox insmod /xen-evtchn.ko
busybox insmod /xen-gntalloc.ko
busybox stty raw -echo
exec /usr/bin/python3 -ISB /hostile_guest.py
"""
# prints the files of a Python that has imported what the program does
FILES_OF_PYTHON = """
import sys
import collections, errno, fcntl, mmap, os, random, struct
for module in list(sys.modules.values()):
    for path in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
        if path:
            print(path)
"""
MOST_FILES = runx.NODES_MAX + runx.HANDLES_MAX + 256  # of a server
FEW_NODES = 1 << 12  # for a server that comes to its limit soon: to open 32,768 files takes minutes
FEW = f"import sys; sys.path.insert(0, '/usr/lib/runX'); import runx; runx.NODES_MAX = {FEW_NODES}; runx.run()"
RENAME_EXCHANGE, AT_FDCWD = 2, -100
POLLS = {"x86_64": ("7", "271"), "aarch64": ("73",)}[os.uname().machine]  # numbers of poll and ppoll


# ---- the guest's system


def python_files():
    """dom0's Python, as far as the program needs it."""
    listed = subprocess.check_output(["/usr/bin/python3", "-IS", "-c", FILES_OF_PYTHON], text=True).split()
    files = {path for path in listed if os.path.exists(path)} | {"/usr/bin/python3"}
    for path in [path for path in files if path.endswith(".so") or path == "/usr/bin/python3"]:
        words = subprocess.check_output(["ldd", path], text=True).split()
        files |= {word for word in words if word.startswith("/")}
    return files


@pytest.fixture(scope="module")
def ramdisk(tmp_path_factory):
    """An archive with modules of Debian's kernel, dom0's Python, and the program."""
    modules = pathlib.Path("/lib/modules", IMAGES[0].name.removeprefix("vmlinuz-"), "kernel/drivers/xen")
    sources = {path: path for path in python_files()}
    sources.update({"/bin/busybox": shutil.which("busybox"), "/hostile_guest.py": PROGRAM})
    sources.update({f"/{name}": modules / name for name in ("xen-evtchn.ko", "xen-gntalloc.ko")})
    entries = {"dev": (stat.S_IFDIR | 0o755, b""), "init": (stat.S_IFREG | 0o755, INIT.encode())}
    for path, source in sources.items():
        for parent in list(pathlib.PurePath(path).parents)[:-1]:
            entries[str(parent)[1:]] = (stat.S_IFDIR | 0o755, b"")
        entries[path[1:]] = (stat.S_IFREG | 0o755, pathlib.Path(source).read_bytes())
    archive = b"".join(
        runx.cpio_members([(name, mode, content, 0) for name, (mode, content) in sorted(entries.items())])
    )
    path = tmp_path_factory.mktemp("hostile") / "ramdisk"
    path.write_bytes(archive)
    return path


class Guest:
    """The program in its VM, which does what it is told."""

    def __init__(self, bundle, process, server):
        self.bundle, self.process, self.server, self.left = bundle, process, server, b""

    def line(self, start, seconds=600):
        """Return what stands behind start in the next line that begins so: the kernel may write others.  seconds: after
        which it hangs; thousands of requests take minutes on a slow machine."""
        while True:
            while b"\n" not in self.left:
                assert select.select([self.process.stdout], [], [], seconds)[0], self.left
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, (self.left, self.bundle.log.read_text())
                self.left += data
            line, _, self.left = self.left.partition(b"\n")
            if line.startswith(start):
                return line[len(start) :].strip()
            print(line)

    def tell(self, text):
        os.write(self.process.stdin.fileno(), text.encode() + b"\n")

    def __call__(self, text):
        """Return what an expression is."""
        self.tell(text)
        return ast.literal_eval(self.line(b"= ").decode())

    def data(self):
        """Return how many bytes of memory its server has that it may write."""
        text = pathlib.Path(f"/proc/{self.server}/status").read_text()
        return int(text.partition("VmData:")[2].split()[0]) << 10

    def open_files(self):
        return len(os.listdir(f"/proc/{self.server}/fd"))

    def waits(self):
        """Return whether its server sleeps in poll(2): it does not spin."""
        return pathlib.Path(f"/proc/{self.server}/syscall").read_text().split()[0] in POLLS

    def end(self):
        """Return the exit status, when it has ended, and the log."""
        self.process.stdin.close()
        log = self.bundle.log
        return self.process.wait(60), log.read_text() if log.exists() else ""


@contextlib.contextmanager
def hostile_guest(bundle, ramdisk, connect="connect()", program=("runX",)):
    """Run a container with the program, and tell it to connect; yield its Guest.  program: what is runX here."""
    spec = config("ignored")
    spec["annotations"] = {"org.runx.rootfs": "9p", "org.runx.memory": "160"}
    spec["vm"] = {"kernel": {"path": str(IMAGES[0]), "initrd": str(ramdisk), "parameters": ["quiet"]}}
    bundle.write_config(spec)
    before = file_servers()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*program, *bundle.command("run")[1:]], **pipes) as process:
        try:
            guest = Guest(bundle, process, 0)
            guest.line(b"ready")
            (guest.server,) = file_servers() - before
            guest.tell(connect)
            yield guest
        finally:
            process.stdin.close()
            if process.poll() is None:
                bundle.runx("kill", "KILL")
                process.wait(60)


@pytest.fixture
def outside(bundle):
    """A folder beside the share, which nobody may read or change."""
    (bundle.folder / "outside").mkdir()
    (bundle.folder / "outside/secret").write_text("outside")
    before = look(bundle.folder / "outside")
    yield bundle.folder / "outside"
    assert look(bundle.folder / "outside") == before


def slab():
    """Return how many bytes dom0's kernel has in small objects."""
    text = pathlib.Path("/proc/meminfo").read_text()
    return int(text.partition("Slab:")[2].split()[0]) << 10


def look(folder):
    """All that a guest could change there, or read."""
    found = {}
    for path in (folder, *sorted(folder.iterdir())):
        status = path.lstat()
        found[path.name] = (*status[:7], status.st_mtime_ns, status.st_ctime_ns, os.listxattr(path))
    return found, (folder / "secret").read_text()


@contextlib.contextmanager
def swapped(*pairs):
    """Each pair of files change their names with each other, all the time."""
    library, stop = ctypes.CDLL(None, use_errno=True), threading.Event()

    def swap():
        while not stop.is_set():
            for one, other in pairs:
                library.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---- what it may try


def test_a_hostile_guest_stays_in_its_share_and_within_its_bounds(bundle, ramdisk, outside):
    work = bundle.rootfs / "work"
    work.mkdir()
    for name in ("inside", "ok"):
        (work / name).write_text(name)
    (work / "large").write_text("x" * 4000)
    with hostile_guest(bundle, ramdisk, program=("python3", "-IS", "-c", FEW)) as guest:
        assert guest.line(b"= ") == b"None"
        guest("attach()")
        check_protocol(guest, outside)
        check_races(guest, work, outside)
        check_bounds(guest)
        check_no_reader(guest)
        assert guest.end()[0] == 137


def check_protocol(guest, outside):
    assert guest("unknown_fids()") == []
    assert guest("types(1)") == []
    guest("attach()")
    assert guest("names()") == []
    assert guest(f"links({os.fsencode(outside)!r}, b'../../../outside', b'/')") == []
    guest("attach()")
    assert guest("nodes()") == []
    assert guest("sizes()") == []
    guest("attach()")
    assert guest("our_indexes(2)") == []
    guest("storm(1000)")
    assert guest.bundle.state()["status"] == "running"
    assert guest("unknown_fids()") == []


def check_races(guest, work, outside):
    """Between a folder and a link, a file and a link; and between what the server checks and what it uses."""
    (work / "folder").mkdir()
    (work / "folder/secret").write_text("inside")
    (work / "swapped").symlink_to(outside)
    (work / "link").symlink_to(outside / "secret")
    (work / "file").write_text("inside")
    with swapped((work / "folder", work / "swapped"), (work / "file", work / "link")):
        contents, found = guest("race(6)")
    assert contents <= {b"inside", b"INSIDE", b""}
    assert (found["make"].keys(), found["truncate"].keys()) == ({"done", "ENOTDIR"}, {"done", "ENXIO"}), found
    found = guest("two_faces(2)")
    assert found.keys() == {"the file", "EINVAL"}, found


def check_bounds(guest):
    """Of what it takes for each open file there is room for all that it may open; and then it is told so."""
    guest("attach()")
    count, before, kernel = guest.open_files(), guest.data(), slab()
    half = FEW_NODES // 4 - 1  # attach() has two
    for first in (100, 100 + half):
        assert guest(f"fids({first}, {half})") == {"walk": {"done": half}, "open": {"done": half}}
    assert guest("fids(50_000, 100)") == {"walk": {"EMFILE": 100}, "open": {"EBADF": 100}}
    opened = guest.open_files() - count
    assert opened == 4 * half
    assert before + (guest.data() - before) / opened * MOST_FILES < runx.SERVING_DATA
    assert (slab() - kernel) / opened < 2048
    guest("attach()")
    assert guest.open_files() == count
    # where dom0 gives less
    resource.prlimit(guest.server, resource.RLIMIT_NOFILE, (count + 50, count + 50))
    assert guest("fids(100, 100)") == {"walk": {"done": 25, "EMFILE": 75}, "open": {"done": 25, "EBADF": 75}}
    guest("attach()")
    assert guest.open_files() == count


def check_no_reader(guest):
    """It never reads a reply: nobody waits for it, and nothing is lost."""
    counts = guest("flood()")
    wait_until(guest.waits, "the server to wait")
    assert guest.bundle.state()["status"] == "running"
    assert guest(f"drain({counts})") == []
    guest("flood()")
    wait_until(guest.waits, "the server to wait")
    guest.bundle.succeed("kill", "KILL")


def test_a_guest_that_has_too_much_remembered_ends(bundle, ramdisk):
    """With a lower limit than SERVING_DATA, which would take long."""
    (bundle.rootfs / "work").mkdir()
    (bundle.rootfs / "work/inside").write_text("inside")
    with hostile_guest(bundle, ramdisk) as guest:
        assert guest.line(b"= ") == b"None"
        guest("attach()")
        limits = [resource.prlimit(guest.server, kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_DATA)]
        assert limits[0] <= MOST_FILES and limits[1] == runx.SERVING_DATA, limits
        limit = guest.data() + (8 << 20)
        resource.prlimit(guest.server, resource.RLIMIT_DATA, (limit, limit))
        guest("values(100, 80)")
        guest.tell("values(1000, 100)")
        status, log = guest.end()
    assert status == 255
    assert "its files are not served any more: what it has open and remembers takes more than 128 MiB" in log


def test_a_guest_that_grants_nothing_ends_with_a_sentence(bundle, ramdisk):
    with hostile_guest(bundle, ramdisk, "connect(reference=60000)") as guest:
        status, log = guest.end()
    assert status == 255 and "its files are not served any more: cannot connect to a ring of domain " in log
