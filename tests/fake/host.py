# SPDX-License-Identifier: Apache-2.0
"""The fake dom0 itself: namespaces of its own, in which PID 1 starts runX, and all ends with it.

    host.py COMMANDS EVENTS FOLDER

COMMANDS, a socket: a line of JSON with up to three descriptors starts a runX; a line comes back when any process that
is ours to wait for has ended.  EVENTS, a socket: Xen's side, see server.py.  FOLDER: where the dom0 may keep files.
"""

import ctypes
import errno
import json
import mmap
import os
import pathlib
import select
import shutil
import signal
import socket
import struct
import sys
import traceback

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import lines  # noqa: E402

lines.start_if_asked()

import runx  # noqa: E402
from fake import server, xl  # noqa: E402

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID, CLONE_NEWNET, MS_REC, MS_PRIVATE, MS_BIND = 0x20000000, 0x40000000, 0x4000, 1 << 18, 4096
MNT_DETACH, IFLA_IFALIAS = 2, 20
libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, target, kind, flags=0, data=None):
    check(libc.mount(*(text and text.encode() for text in (source, target, kind)), flags, data and data.encode()))


def become_root():
    """Of a user namespace of our own, for who is not root: in it everything here is allowed."""
    user, group = os.geteuid(), os.getegid()
    if user:
        check(libc.unshare(CLONE_NEWUSER))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            pathlib.Path(f"/proc/self/{name}").write_text(text)


def enter_cgroup(folder):
    """Makes a cgroup of version 2 that is the root of all that is seen here, if this machine lets us; its path is then
    in a file, so that who has started us can remove it."""
    mounts = [line.split() for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    try:
        path = next(words[4] for words in mounts if "cgroup2" in words) + f"/runx-fake-{os.getpid()}"
        os.mkdir(path)
        pathlib.Path(path, "cgroup.procs").write_text("0")
        check(libc.unshare(CLONE_NEWCGROUP))
        pathlib.Path(folder, "cgroup").write_text(path)
    except (StopIteration, OSError):
        pass  # it has none, or not for us: then nothing is seen


def see_own_cgroup(folder):
    for line in reversed(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()):
        if line.rpartition(" - ")[2].startswith("cgroup"):
            libc.umount2(line.split()[4].encode(), MNT_DETACH)
    if pathlib.Path(folder, "cgroup").exists():
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2")


def furnish(folder):
    """The files of a dom0, seen by nobody else."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc")
    see_own_cgroup(folder)
    mount("devpts", "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=0620")
    mount("/dev/pts/ptmx", "/dev/ptmx", None, MS_BIND)
    for place in ("/run", "/var/tmp", "/var/log", "/opt", "/sys/bus"):
        if os.path.isdir(place) and not folder.startswith(place):
            mount("tmpfs", place, "tmpfs", 0, "mode=755")
    for place in ("/run/fake/grants", "/run/fake/bin", "/run/fake/lib", "/run/fake/etc",
                  "/var/log/xen", "/sys/bus/xen-backend/devices"):  # fmt: skip
        os.makedirs(place)
    shutil.copy(f"{folder}/xl", "/run/fake/bin/xl")
    pathlib.Path("/run/fake/lib/kernel").write_bytes(b"a kernel")
    runx.pack_initrd("/run/fake/etc", "/run/fake/lib/initrd")


# ---- what of runX needs Xen's devices, and faults of the system's


class EventChannels:
    """What stands for /dev/xen/evtchn."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(f"{server.FOLDER}/evtchn")
        self.fd, self.domids = self.socket.fileno(), {}

    def bind(self, domid, port):
        self.domids[port] = domid
        self.socket.send(struct.pack("=cII", b"b", domid, port))
        return port

    def restrict(self, domid):
        pass

    def notify(self, port):
        self.socket.send(struct.pack("=cII", b"n", self.domids[port], port))

    def acknowledge(self):
        try:
            while self.socket.recv(1, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            pass


class Grants:
    """What stands for /dev/xen/gntdev: a file for each range of pages, by its first reference."""

    def __init__(self):
        self.fd = os.open(f"{server.FOLDER}/grants", os.O_RDONLY | os.O_DIRECTORY)
        self.null = os.open("/dev/null", os.O_RDWR)

    def map(self, domid, references):
        file = os.open(f"{domid}-{references[0]}", os.O_RDWR, dir_fd=self.fd)
        copy = os.dup(file)
        os.close(copy)
        pages = mmap.mmap(file, 4096 * len(references))
        os.dup2(self.null, copy, False)  # as runX does it with what the device stands for
        os.close(file)
        return memoryview(pages)

    def close(self):
        os.close(self.fd)
        os.close(self.null)


class Faults:
    """Counts system calls that runX makes by name, and what it redirects, in memory that all its processes share, and
    has one fail."""

    LAYOUT = struct.Struct("=QQQ")  # how many there were, which is to fail, with what errno (0: the caller is killed)

    def __init__(self, page):
        self.page, self.call = page, runx.system_call

    def system_call(self, name, *args):
        self.strike()
        return self.call(name, *args)

    def strike(self):
        count, target, error = self.LAYOUT.unpack_from(self.page)
        self.page[:8] = struct.pack("=Q", count + 1)
        if count + 1 == target:
            if error == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(error, os.strerror(error))

    # for a redirection stands an alias of both links: not every kernel has the classifier

    def redirect(self, netlink, source, target):
        if alias(netlink, source) or alias(netlink, target):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        try:
            for index in (source, target):
                netlink.set_link(index, {IFLA_IFALIAS: "redirected"})
                self.strike()
        except OSError:
            for index in (source, target):
                netlink.set_link(index, {IFLA_IFALIAS: b""})
            raise

    def end_redirect(self, netlink, index):
        if not alias(netlink, index):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        netlink.set_link(index, {IFLA_IFALIAS: b""})
        self.strike()


def alias(netlink, index):
    (link,) = netlink.request(runx.Message(runx.RTM_NEWLINK + runx.RTM_GET, (0, 0, index, 0, 0), {}))
    return link.attributes.get(IFLA_IFALIAS)


def patch(page):
    faults = Faults(page)
    replacements = {
        "XENSTORED_SOCKET": server.XENSTORED,
        "PATH": f"/run/fake/bin:{runx.PATH}",
        "HOST_CONFIG": "/run/fake/etc/config.json",
        "lib_folder": lambda: "/run/fake/lib",
        "EventChannels": EventChannels,
        "Grants": Grants,
        "redirect": faults.redirect,
        "end_redirect": faults.end_redirect,
        "system_call": faults.system_call,
    }
    for name, value in replacements.items():
        assert hasattr(runx, name), f"runx.py has no {name} any more"
        setattr(runx, name, value)


# ---- PID 1


def start(request, descriptors):
    """A runX of its own; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        for target, source in enumerate(descriptors):
            os.dup2(source, target)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as CPython has it
        os.closerange(3, 256)
        for fd in request["closed"]:
            os.close(fd)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["runX", *request["words"]]
        for name, value in request["constants"].items():
            assert hasattr(runx, name), name
            setattr(runx, name, value)
        if request["session"]:
            os.setsid()
        if request["program"]:
            os.execvpe(request["program"][0], request["program"], os.environ)
        runx.run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(commands):
    """PID 1's whole life: it starts what it is told to, and waits for all that nobody else waits for."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = select.select([commands, reader], [], [])[0]
        if commands in ready:
            message, descriptors, _, _ = socket.recv_fds(commands, 1 << 16, 3)
            if not message:
                return
            pid = start(json.loads(message), descriptors)
            for fd in descriptors:
                os.close(fd)
            commands.send(json.dumps(["started", pid]).encode())
        if reader in ready:
            os.read(reader, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                commands.send(json.dumps(["ended", pid, os.waitstatus_to_exitcode(status)]).encode())


def tidy(folder, *sockets):
    """Goes on in a child; when that has ended, however the test has, this removes what no namespace takes along."""
    pid = os.fork()
    if pid:
        for fd in sockets:
            os.close(fd)
        os.waitpid(pid, 0)
        path = pathlib.Path(folder, "cgroup")
        if path.exists():
            os.rmdir(path.read_text())
        os._exit(0)


def main(commands, events, folder):
    tidy(folder, commands, events)
    xl.install(f"{folder}/xl")
    become_root()
    enter_cgroup(folder)
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET))
    pid = os.fork()
    if pid:
        libc.prctl(1, signal.SIGKILL)
        os.close(commands)
        os.close(events)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    libc.prctl(1, signal.SIGKILL)
    os.setsid()
    furnish(folder)
    with open(f"{folder}/faults", "r+b") as file:
        patch(mmap.mmap(file.fileno(), 4096))
    commands = socket.socket(fileno=commands)
    ready, told = os.pipe()
    if os.fork() == 0:
        commands.close()
        test = socket.socket(fileno=events)
        xen = server.Xen(test)
        os.close(ready)
        os.write(told, b"+")
        os.close(told)
        try:
            xen.serve()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(events)
    os.close(told)
    if os.read(ready, 1) == b"+":
        commands.send(b'["ready"]')
        os.close(ready)
        try:
            serve(commands)
        except OSError:
            pass  # the test is over
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
