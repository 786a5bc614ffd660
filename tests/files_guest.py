# SPDX-License-Identifier: Apache-2.0
"""Checks of a file system: what programs do with files, and what a local ext4 answers.

    files_guest.py FOLDER [NAME...]     all checks, or those named; each in a new folder below FOLDER

Each prints `ok NAME` or `FAIL NAME: why`.  Containers of tests/test_xen_files.py run it.  It needs root, coreutils and
a Python of 3.10 or newer.  On ext4 every check passes: one that fails there is wrong.  A tmpfs has no ZERO_RANGE and
COLLAPSE_RANGE, other limits of sizes, and keeps what is written to a mapping behind the file's end.

$SEED and $STEPS decide on the random operations, $LIMIT is a check's time limit in seconds.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback

CHECKS = {}
TIME_LIMIT = int(os.environ.get("LIMIT", "180"))  # seconds, for one check
USER, OTHER_USER, GROUP = 1000, 1001, 2000
PAGE = 4096
SEED = int(os.environ.get("SEED") or int.from_bytes(os.urandom(3), "big"))

# <fcntl.h>, <linux/fs.h>, <linux/falloc.h>, <sched.h>, <sys/mount.h>
AT_FDCWD, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x400, 0x1000
AT_STATX_FORCE_SYNC, STATX_MODE, STATX_ATIME, STATX_MTIME, STATX_SIZE = 0x2000, 2, 0x20, 0x40, 0x200
SYNC_FILE_RANGE_WRITE = 2
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 0x1000, 0x4000, 1 << 18
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # CAP_NET_RAW, effective, of revision 2


# ---- what the checks are made of


def check(function):
    """Add a check; it runs in a process of its own, in an empty folder."""
    CHECKS[function.__name__] = function
    return function


def same(got, wanted, what=""):
    if got != wanted:
        texts = [text if len(text) < 300 else f"{text[:300]}… ({len(text)} long)" for text in map(repr, (got, wanted))]
        raise AssertionError(f"{what}: {', not '.join(texts)}" if what else ", not ".join(texts))


def name_of(function):
    return getattr(function, "__name__", None) or getattr(function, "func", function).__name__


def refused(number, function, *args, what="", **options):
    """The call must fail with this errno, or one of these."""
    numbers = number if isinstance(number, tuple) else (number,)
    wanted = " or ".join(errno.errorcode[each] for each in numbers)
    what = what or name_of(function)
    try:
        function(*args, **options)
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"{what}: {errno.errorcode.get(error.errno)}, not {wanted}") from error
        return
    raise AssertionError(f"{what} succeeds: {wanted} is expected")


libc = ctypes.CDLL(None, use_errno=True)


def system(name, *args):
    """Call a function of the C library; return its result.  Raise OSError as Python's own do."""
    words = [ctypes.c_long(arg) if isinstance(arg, int) else os.fsencode(arg) for arg in args]
    result = getattr(libc, name)(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


def fallocate(fd, mode, offset, length):
    system("fallocate", fd, mode, offset, length)


def renameat2(source, target, flags):
    system("renameat2", AT_FDCWD, source, AT_FDCWD, target, flags)


def link_descriptor(fd, path):
    system("linkat", AT_FDCWD, f"/proc/self/fd/{fd}", AT_FDCWD, path, AT_SYMLINK_FOLLOW)


def put(path, content=b"", mode=None):
    """Make a file, or give it new content."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        same(os.write(fd, content), len(content), "write")
        if mode is not None:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def get(path):
    with open(path, "rb", 0) as file:
        return file.read()


def mode_of(path):
    return oct(os.lstat(path).st_mode & 0o7777)


def drop_caches():
    """What nobody has changed since must be asked for again."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


@contextlib.contextmanager
def flusher_at_work():
    """The kernel sends, or writes to the disk, what is dirty: every 10 ms, and not after some seconds."""
    clocks = [f"/proc/sys/vm/dirty_{name}_centisecs" for name in ("expire", "writeback")]
    before = [get(clock) for clock in clocks]
    try:
        for clock in clocks:
            put(clock, b"1")
        yield
    finally:
        for clock, value in zip(clocks, before):
            put(clock, value)


def why(error):
    """An exception in one line, with where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
    helpers = ("same", "refused", "user", "join", "put", "get", "system")
    lines = [frame.lineno for frame in frames if frame.name not in helpers] or [0]
    kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
    return f"{kind}{error} (line {lines[-1]})".replace("\n", " ")


class Other:
    """Another process, which does one thing."""

    def __init__(self, work, *args, uid=None, gid=USER, groups=()):
        self.why, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        text = b""
        try:
            if uid is not None:
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
            work(*args)
        except BaseException as error:
            text = why(error).encode(errors="replace")[:PAGE]
        os.write(writer, text)
        os._exit(1 if text else 0)

    def join(self):
        """Wait for its end.  Raise AssertionError with what it has raised."""
        text = b""
        while data := os.read(self.why, PAGE):
            text += data
        os.close(self.why)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status:
            raise AssertionError(text.decode(errors="replace") or f"the other process: status {status}")


def user(work, *args, **options):
    """Do it as a user who is not root."""
    Other(work, *args, **{"uid": USER, **options}).join()


def for_user(*paths):
    for path in paths:
        os.chown(path, USER, USER)


# ---- a file is itself, not its name

OLD, NEW = b"old content, " * 700, b"new"


def renamed_over():
    put("b", NEW)
    os.rename("b", "a")


def made_anew():
    os.unlink("a")
    put("a", NEW)


def renamed_over_by_another():
    Other(renamed_over).join()


def made_anew_by_another():
    Other(made_anew).join()


REPLACED = (renamed_over, made_anew, renamed_over_by_another, made_anew_by_another)
WORK = {
    "ftruncate": (lambda fd: os.ftruncate(fd, 5), lambda s: s.st_size, 5),
    "fchmod": (lambda fd: os.fchmod(fd, 0o600), lambda s: oct(s.st_mode), "0o100600"),
    "fchown": (lambda fd: os.fchown(fd, USER, GROUP), lambda s: (s.st_uid, s.st_gid), (USER, GROUP)),
    "futimens": (lambda fd: os.utime(fd, ns=(1, 10**18 + 1)), lambda s: s.st_mtime_ns, 10**18 + 1),
    "write": (lambda fd: os.pwrite(fd, b"x" * 20000, 0), lambda s: s.st_size, 20000),
    "fallocate": (lambda fd: fallocate(fd, 0, 0, 30000), lambda s: s.st_size, 30000),
}


def changes_after(replace):
    """What is done to the file that is open does not come to the new one of its name."""
    wrong, before = [], {}
    for name, (work, seen, wanted) in WORK.items():
        os.mkdir(name)
        os.chdir(name)
        put("a", OLD, 0o644)
        fd = os.open("a", os.O_RDWR)
        replace()
        before[name] = os.stat("a")
        try:
            work(fd)
            os.fsync(fd)
            same((seen(os.fstat(fd)), os.fstat(fd).st_nlink), (wanted, 0), f"{name}: the open file")
        except (AssertionError, OSError) as error:
            wrong.append(f"{name}: {error}")
        os.chdir("..")
    drop_caches()
    for name, old in before.items():
        new = os.stat(f"{name}/a")
        fields = [(field, getattr(old, field)) for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_ino")]
        if [(field, getattr(new, field)) for field, _ in fields] != fields or get(f"{name}/a") != NEW:
            wrong.append(f"{name}: the new file too")
    same(wrong, [])


for _replace in REPLACED[:3]:
    CHECKS[f"changes_of_a_file_{_replace.__name__}"] = functools.partial(changes_after, _replace)


def read_after(replace, content):
    """The open file's content stays, whether the new one is shorter or longer."""
    global NEW
    files = {}
    for name, NEW in (("shorter", b"short"), ("longer", b"longer " * 5000)):  # noqa: PLW0603
        os.mkdir(name)
        os.chdir(name)
        put("a", content)
        files[name] = os.open("a", os.O_RDONLY), NEW
        same(os.read(files[name][0], 5), content[:5])
        replace()
        same(os.fstat(files[name][0]).st_size, len(content), "the open file's size")
        same(os.pread(files[name][0], 100000, 0), content, "the open file")
        os.chdir("..")
    drop_caches()
    for name, (fd, new) in files.items():
        same(os.pread(fd, 100000, 0), content, "the open file, without caches")
        same(get(f"{name}/a"), new, "the new file")


for _replace in REPLACED:
    CHECKS[f"reading_of_a_file_{_replace.__name__}"] = functools.partial(read_after, _replace, OLD)


@check
def mapping_of_a_removed_file():
    memories = []
    for replace in (lambda: os.unlink("a"), renamed_over, lambda: os.rename("a", "c")):
        put("a", OLD)
        fd = os.open("a", os.O_RDWR)
        memories.append(mmap.mmap(fd, len(OLD)))
        os.close(fd)
        replace()
        memories[-1].madvise(mmap.MADV_DONTNEED)
    drop_caches()
    for memory in memories:
        same(memory[:], OLD, "the mapping")
        memory[:3] = b"OLD"
        memory.flush()
        memory.madvise(mmap.MADV_DONTNEED)
    drop_caches()
    for memory in memories:
        same(memory[:], b"OLD" + OLD[3:], "the mapping that was written")


@check
def use_of_an_unlinked_file():
    fd = os.open("a", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"hello world")
    os.unlink("a")
    for name, (work, seen, wanted) in WORK.items():
        work(fd)
        same(seen(os.fstat(fd)), wanted, name)
    os.setxattr(fd, "user.x", b"1")
    same((os.getxattr(fd, "user.x"), os.listxattr(fd)), (b"1", ["user.x"]))
    os.ftruncate(fd, 5)
    os.pwrite(fd, b"more", 100000)
    os.fsync(fd)
    drop_caches()
    same((os.pread(fd, 3, 0), os.pread(fd, 5, 99999)), (b"xxx", b"\0more"))
    same((os.fstat(fd).st_size, os.fstat(fd).st_nlink), (100004, 0))


@check
def open_of_an_unlinked_file_by_its_descriptor():
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"hello")
    os.unlink("a")
    path = f"/proc/self/fd/{fd}"
    same(get(path), b"hello")
    same(os.readlink(path).endswith("/a (deleted)"), True, os.readlink(path))
    same(os.stat(path).st_size, 5, "stat")
    os.chmod(path, 0o640)
    same(oct(os.fstat(fd).st_mode), "0o100640")
    with open(path, "wb", 0) as file:
        same(os.fstat(fd).st_size, 0, "after O_TRUNC")
        file.write(b"again")
    os.truncate(path, 3)
    same(os.pread(fd, 10, 0), b"aga")
    refused(errno.ENOENT, link_descriptor, fd, "b")


@check
def temporary_files():
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"x" * 70000)
        file.truncate(10)
        file.seek(0)
        same(file.read(), b"x" * 10)
    same(os.listdir("."), [])


@check
def renamed_open_file():
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 10000)
    os.mkdir("d")
    os.rename("a", "d/b")
    os.write(fd, b"y")
    os.ftruncate(fd, 9000)
    os.fchmod(fd, 0o640)
    same((os.stat("d/b").st_size, mode_of("d/b")), (9000, "0o640"))
    os.rename("d", "e")
    os.pwrite(fd, b"z", 0)
    same(get("e/b")[:2], b"zx")


@check
def hard_links_are_one_file():
    put("a", b"1")
    os.link("a", "b")
    one, two = os.open("a", os.O_RDWR), os.open("b", os.O_RDWR | os.O_APPEND)
    same(os.fstat(one).st_ino, os.fstat(two).st_ino, "inode")
    os.write(two, b"2")
    same(os.pread(one, 10, 0), b"12")
    os.pwrite(one, b"Z", 0)
    same(os.pread(two, 10, 0), b"Z2")
    with mmap.mmap(one, 2) as memory, mmap.mmap(two, 2) as same_memory:
        memory[1:2] = b"!"
        same(same_memory[:], b"Z!")
    os.chmod("a", 0o611)
    same((mode_of("b"), os.stat("b").st_nlink), ("0o611", 2))
    os.unlink("a")
    same((os.stat("b").st_nlink, os.fstat(one).st_nlink, get("b")), (1, 1, b"Z!"))
    drop_caches()
    os.link("b", "a")
    same((os.stat("a").st_ino, os.stat("a").st_nlink, os.fstat(two).st_nlink), (os.fstat(one).st_ino, 2, 2))


@check
def inode_numbers():
    for name in "abc":
        put(name)
    os.mkdir("d")
    os.symlink("a", "l")
    before = {entry.name: entry.inode() for entry in os.scandir(".")}
    same({name: os.lstat(name).st_ino for name in before}, before, "stat and readdir")
    same(len(set(before.values())), 5)
    same({os.lstat(name).st_dev for name in before}, {os.stat(".").st_dev}, "devices")
    drop_caches()
    same({name: os.lstat(name).st_ino for name in before}, before, "after caches were dropped")
    os.rename("a", "d/z")
    same(os.stat("d/z").st_ino, before["a"], "after a rename")


# ---- who is told

EVENTS = {
    2: "MODIFY", 4: "ATTRIB", 8: "CLOSE_WRITE", 0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE", 0x200: "DELETE",
    0x400: "DELETE_SELF", 0x800: "MOVE_SELF",
}  # fmt: skip


class Watch:
    """An inotify watch on one file or folder."""

    def __init__(self, path):
        self.fd = system("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        system("inotify_add_watch", self.fd, path, sum(EVENTS))

    def expect(self, *wanted):
        """What has come since the last time; without repetitions one after the other."""
        seen = []
        while select.select([self.fd], [], [], 0)[0]:
            data = os.read(self.fd, PAGE)
            while data:
                _, mask, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                data = data[16 + length :]
                event = " ".join([EVENTS.get(mask & ~0x40000000, "IGNORED"), *([name] if name else [])])
                if event != "IGNORED" and seen[-1:] != [event]:
                    seen.append(event)
        same(seen, list(wanted), "events")


@check
def inotify_of_a_file():
    put("a")
    put("b")
    watch = Watch("a")

    def append():
        with open("a", "ab", 0) as file:
            file.write(b"x")

    Other(append).join()
    watch.expect("MODIFY", "CLOSE_WRITE")
    Other(os.chmod, "a", 0o600).join()
    watch.expect("ATTRIB")
    Other(os.truncate, "a", 0).join()
    watch.expect("MODIFY")
    Other(os.rename, "a", "c").join()
    watch.expect("MOVE_SELF")
    Other(os.rename, "b", "c").join()
    watch.expect("ATTRIB", "DELETE_SELF")
    watch = Watch("c")
    Other(os.unlink, "c").join()
    watch.expect("ATTRIB", "DELETE_SELF")


@check
def inotify_of_a_folder():
    os.mkdir("d")
    watch = Watch("d")
    Other(put, "d/a", b"x").join()
    watch.expect("CREATE a", "MODIFY a", "CLOSE_WRITE a")
    Other(os.rename, "d/a", "d/b").join()
    watch.expect("MOVED_FROM a", "MOVED_TO b")
    Other(os.chmod, "d/b", 0o600).join()
    watch.expect("ATTRIB b")
    Other(os.link, "d/b", "d/c").join()
    watch.expect("CREATE c")
    Other(os.unlink, "d/c").join()
    watch.expect("DELETE c")
    Other(os.rename, "d/b", "b").join()
    watch.expect("MOVED_FROM b")
    Other(os.rmdir, "d").join()
    watch.expect("DELETE_SELF")


# ---- privileges of files


def program(mode=0o755):
    """Make a program that prints /proc/self/status as `./cat /proc/self/status`."""
    shutil.copyfile(os.path.realpath(shutil.which("cat")), "cat")
    os.chmod("cat", mode)


def status_of_program(field):
    """Run it as the user; return a field of its status."""
    text = subprocess.run(["./cat", "/proc/self/status"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return next(line.split(":")[1].split() for line in text.splitlines() if line.startswith(f"{field}:"))


@check
def capabilities_of_a_program():
    program()
    os.setxattr("cat", "security.capability", CAPABILITY)
    drop_caches()
    user(lambda: same(int(status_of_program("CapEff")[0], 16), 1 << 13, "CapEff"))
    same(os.listxattr("cat"), ["security.capability"])
    os.removexattr("cat", "security.capability")
    user(lambda: same(int(status_of_program("CapEff")[0], 16), 0, "CapEff"))


@check
def capabilities_go_with_a_change():
    for change in (lambda: os.truncate("cat", 10), lambda: os.chown("cat", 5, 5), lambda: put("cat", b"x")):
        program()
        os.setxattr("cat", "security.capability", CAPABILITY)
        change()
        refused(errno.ENODATA, os.getxattr, "cat", "security.capability")


@check
def capabilities_need_a_capability():
    program()
    for_user("cat")
    user(lambda: refused(errno.EPERM, os.setxattr, "cat", "security.capability", CAPABILITY))


@check
def setuid_and_setgid_of_a_program():
    program(0o6755)
    os.chown("cat", OTHER_USER, GROUP)
    os.chmod("cat", 0o6755)
    user(lambda: same(status_of_program("Uid"), [str(USER)] + [str(OTHER_USER)] * 3, "Uid"))
    user(lambda: same(status_of_program("Gid"), [str(USER)] + [str(GROUP)] * 3, "Gid"))


@check
def execution_needs_its_bit():
    program(0o644)
    run = functools.partial(subprocess.run, ["./cat", "/dev/null"])
    refused(errno.EACCES, run)
    os.chmod("cat", 0o700)
    run(check=True)
    user(lambda: refused(errno.EACCES, run))
    os.chmod("cat", 0o711)
    user(lambda: run(check=True))
    put("script", b"#!/bin/sh\necho $0\n", 0o755)
    same(subprocess.run(["./script"], stdout=subprocess.PIPE, check=True).stdout, b"./script\n")


@check
def a_program_that_is_written_is_busy():
    program()
    put("script", b"#!/bin/sh\nexit 0\n", 0o755)
    for argv in (["./cat", "/dev/null"], ["./script"]):
        fd = os.open(argv[0], os.O_WRONLY)
        refused(errno.ETXTBSY, subprocess.run, argv)
        os.close(fd)
        subprocess.run(argv, check=True)
    running = subprocess.Popen(["./cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    running.stdin.write(b"x")
    running.stdin.flush()
    running.stdout.read(1)
    for function in (lambda: os.open("cat", os.O_RDWR), lambda: os.truncate("cat", 0)):
        refused(errno.ETXTBSY, function, what="a change of a running program")
    os.unlink("cat")
    running.communicate()


@check
def execution_of_an_unlinked_program():
    program()
    fd = os.open("cat", os.O_RDONLY)
    os.unlink("cat")
    result = subprocess.run([f"/proc/self/fd/{fd}", "/dev/null"], pass_fds=[fd])
    same(result.returncode, 0)


SPECIAL = [  # who writes how, the mode before, and after
    ("write by root", 0, lambda: put_at("f"), 0o6777, 0o6777),
    ("write by another", USER, lambda: put_at("f"), 0o6777, 0o777),
    ("truncate by another", USER, lambda: os.truncate("f", 1), 0o6777, 0o777),
    ("O_TRUNC by another", USER, lambda: put("f"), 0o6777, 0o777),
    ("fallocate by another", USER, lambda: fallocate_of("f"), 0o6777, 0o777),
    ("copy_file_range by another", USER, lambda: copy_to("f"), 0o6777, 0o777),
    ("copy_file_range by root", 0, lambda: copy_to("f"), 0o6777, 0o6777),
    ("chown by root", 0, lambda: os.chown("f", 5, 6), 0o6755, 0o755),
    ("chown by root, without x for the group", 0, lambda: os.chown("f", 5, 6), 0o2745, 0o2745),
]


def put_at(path):
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def fallocate_of(path):
    fd = os.open(path, os.O_WRONLY)
    fallocate(fd, 0, 0, 10000)
    os.close(fd)


def copy_to(path):
    source, target = os.open("source", os.O_RDONLY), os.open(path, os.O_WRONLY)
    same(os.copy_file_range(source, target, 5), 5, "copied")


@check
def setuid_goes_with_a_change():
    put("source", b"content")
    for what, uid, work, before, after in SPECIAL:
        put("f", b"content", before)
        same(mode_of("f"), oct(before), f"before {what}")
        Other(work, uid=uid or None).join()
        same(mode_of("f"), oct(after), what)
        os.unlink("f")


@check
def setgid_of_no_program_goes_with_a_write():
    put("f", b"content", 0o2767)
    user(put_at, "f")
    same(mode_of("f"), "0o767")


@check
def setuid_goes_with_chown_to_nobody_else():
    put("f", b"content", 0o6755)
    os.chown("f", -1, -1)
    same(mode_of("f"), "0o755")


@check
def setuid_and_the_owner():
    put("f")
    os.chown("f", USER, GROUP)
    user(os.chmod, "f", 0o4755)
    same(mode_of("f"), "0o4755", "setuid by the owner")
    user(os.chmod, "f", 0o2755)
    same(mode_of("f"), "0o755", "setgid of a group that the owner is not in")
    user(os.chmod, "f", 0o2755, groups=[GROUP])
    same(mode_of("f"), "0o2755", "setgid of a group that the owner is in")
    os.chmod("f", 0o6755)
    user(os.chown, "f", -1, USER)
    same(mode_of("f"), "0o755", "after chgrp by the owner")
    os.mkdir("d")
    os.chmod("d", 0o6755)
    os.chown("d", USER, GROUP)
    same(mode_of("d"), "0o6755", "a folder's after chown")


@check
def all_modes():
    modes = {oct(mode): mode for mode in (0o777, 0o4711, 0o2755, 0o1777, 0, 0o6777, 0o1644)}
    for name, mode in modes.items():
        put(name, b"", mode)
        same(mode_of(name), name)
    drop_caches()
    for name in modes:
        same(mode_of(name), name, "without caches")
    os.mkdir("d")
    os.chmod("d", 0o1777)
    same(mode_of("d"), "0o1777")


@check
def modes_of_what_is_made():
    for mask in (0o022, 0o077, 0):
        os.umask(mask)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("d", 0o777)
        os.mkfifo("p", 0o666)
        os.mknod("n", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.symlink("x", "l")
        for name, mode in {"f": 0o666, "d": 0o777, "p": 0o666, "n": 0o666}.items():
            same(mode_of(name), oct(mode & ~mask), f"{name}, with umask {mask:o}")
        same(mode_of("l"), "0o777", "a link")
        for name in "fpnl":
            os.unlink(name)
        os.rmdir("d")


@check
def special_files_are_made_with_every_mode():
    os.mkdir("d")
    os.chmod("d", 0o777)
    os.umask(0)

    def make():
        for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG):
            os.mknod("d/n", kind | 0o7751)
            same(oct(os.stat("d/n").st_mode), oct(kind | 0o7751))
            os.unlink("d/n")

    user(make)


@check
def owners_of_what_is_made():
    os.chmod(".", 0o777)

    def make(gid):
        put("f")
        os.mkdir("d")
        os.symlink("x", "l")
        os.mkfifo("p")
        for name in "fdlp":
            same((os.lstat(name).st_uid, os.lstat(name).st_gid), (USER, gid), name)
        for name in "flp":
            os.unlink(name)
        os.rmdir("d")

    user(make, USER)
    user(make, GROUP, gid=GROUP)
    os.chown(".", 0, GROUP)
    os.chmod(".", 0o2777)
    user(make, GROUP)


@check
def setgid_folders():
    os.mkdir("d")
    os.chown("d", 0, GROUP)
    os.chmod("d", 0o2777)
    os.mkdir("d/d")
    put("d/f")
    same((os.stat("d/d").st_gid, mode_of("d/d")), (GROUP, "0o2755"), "a folder's")
    same((os.stat("d/f").st_gid, mode_of("d/f")), (GROUP, "0o644"), "a file's")

    def stranger():
        os.close(os.open("d/g", os.O_CREAT | os.O_WRONLY, 0o2775))
        same(mode_of("d/g"), "0o755", "a program's, of a group that its maker is not in")

    user(stranger)


@check
def a_file_that_its_maker_may_not_open():
    os.chmod(".", 0o777)

    def make():
        fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0)
        os.write(fd, b"zz")
        same(os.pread(fd, 2, 0), b"zz")
        os.fchmod(fd, 0o400)
        os.ftruncate(fd, 1)
        os.close(fd)
        refused(errno.EACCES, os.open, "f", os.O_RDWR)
        same(get("f"), b"z")

    user(make)


# ---- extended attributes and access control lists


@check
def attributes_of_every_kind():
    put("f")
    os.mkdir("d")
    for path in "fd":
        for name in ("user.a", "trusted.b", "security.c"):
            for value in (b"w\0rld", b"", b"x" * 3000):
                os.setxattr(path, name, value)
                same(os.getxattr(path, name), value, f"{name} of {path}")
            os.setxattr(path, name, name.encode())
    drop_caches()
    for path in "fd":
        same(sorted(os.listxattr(path)), ["security.c", "trusted.b", "user.a"])
        for name in os.listxattr(path):
            same(os.getxattr(path, name), name.encode())
            os.removexattr(path, name)
            refused(errno.ENODATA, os.getxattr, path, name)
            refused(errno.ENODATA, os.removexattr, path, name)
        same(os.listxattr(path), [])


@check
def attributes_of_links_and_pipes():
    os.symlink("nowhere", "l")
    os.mkfifo("p")
    os.setxattr("l", "trusted.x", b"1", follow_symlinks=False)
    os.setxattr("p", "trusted.x", b"2")
    same(os.getxattr("l", "trusted.x", follow_symlinks=False), b"1")
    same(os.getxattr("p", "trusted.x"), b"2")
    refused(errno.EPERM, os.setxattr, "l", "user.x", b"1", follow_symlinks=False)
    refused(errno.EPERM, os.setxattr, "p", "user.x", b"1")
    refused(errno.ENOENT, os.getxattr, "l", "trusted.x")


@check
def errors_of_attributes():
    put("f")
    os.setxattr("f", "user.a", b"long value", os.XATTR_CREATE)
    refused(errno.EEXIST, os.setxattr, "f", "user.a", b"", os.XATTR_CREATE)
    refused(errno.ENODATA, os.setxattr, "f", "user.b", b"", os.XATTR_REPLACE)
    refused(errno.ENODATA, os.getxattr, "f", "user.b")
    refused(errno.EOPNOTSUPP, os.setxattr, "f", "nothing.b", b"")
    refused(errno.ERANGE, os.setxattr, "f", "user." + "x" * 251, b"")
    buffer = os.fsencode(" " * 4)
    refused(errno.ERANGE, system, "getxattr", "f", "user.a", buffer, 4)
    refused(errno.ERANGE, system, "listxattr", "f", buffer, 4)
    same(system("getxattr", "f", "user.a", buffer, 0), 10, "its length")
    refused((errno.ENOSPC, errno.E2BIG), os.setxattr, "f", "user.large", b"x" * 65537)


@check
def attributes_of_other_users():
    put("f", b"", 0o644)
    os.setxattr("f", "user.a", b"1")
    os.setxattr("f", "trusted.b", b"2")
    os.setxattr("f", "security.c", b"3")

    def stranger():
        same(os.getxattr("f", "user.a"), b"1")
        refused(errno.ENODATA, os.getxattr, "f", "trusted.b")
        same(sorted(os.listxattr("f")), ["security.c", "user.a"])
        refused(errno.EACCES, os.setxattr, "f", "user.a", b"x")
        refused(errno.EPERM, os.setxattr, "f", "trusted.b", b"x")
        refused(errno.EPERM, os.setxattr, "f", "security.c", b"x")
        refused(errno.EACCES, os.removexattr, "f", "user.a")

    user(stranger)
    os.chmod("f", 0o600)
    user(lambda: refused(errno.EACCES, os.getxattr, "f", "user.a"))


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, NAMED_USER, GROUP_OBJ, NAMED_GROUP, MASK, EVERYBODY = 1, 2, 4, 8, 16, 32


def acl(*entries):
    """The bytes of an access control list; entries: (tag, permissions, id) or (tag, permissions)."""
    packed = [struct.pack("<HHI", *(entry if len(entry) == 3 else (*entry, 0xFFFFFFFF))) for entry in entries]
    return struct.pack("<I", 2) + b"".join(packed)


ONE_READER = acl((USER_OBJ, 6), (NAMED_USER, 6, USER), (GROUP_OBJ, 0), (MASK, 6), (EVERYBODY, 0))


@check
def access_control_lists():
    put("f", b"content", 0o600)
    user(lambda: refused(errno.EACCES, get, "f"))
    os.setxattr("f", ACCESS, ONE_READER)
    same((os.getxattr("f", ACCESS), mode_of("f")), (ONE_READER, "0o660"))
    user(lambda: same(get("f"), b"content"))
    user(put_at, "f")
    user(lambda: refused(errno.EACCES, get, "f"), uid=OTHER_USER)
    drop_caches()
    user(lambda: same(get("f"), b"xontent"))
    same(os.listxattr("f"), [ACCESS])
    os.chmod("f", 0o640)  # the mask
    user(lambda: refused(errno.EACCES, put_at, "f"))
    user(lambda: same(get("f"), b"xontent"))
    os.chmod("f", 0o600)
    user(lambda: refused(errno.EACCES, get, "f"))
    os.removexattr("f", ACCESS)
    same((mode_of("f"), os.listxattr("f")), ("0o600", []))


@check
def access_control_lists_of_groups():
    put("f", b"content", 0o600)
    os.setxattr("f", ACCESS, acl((USER_OBJ, 6), (GROUP_OBJ, 0), (NAMED_GROUP, 4, GROUP), (MASK, 4), (EVERYBODY, 0)))
    user(lambda: same(get("f"), b"content"), groups=[GROUP])
    user(lambda: refused(errno.EACCES, get, "f"), groups=[GROUP + 1])
    os.setxattr("f", ACCESS, acl((USER_OBJ, 6), (NAMED_USER, 0, USER), (GROUP_OBJ, 4), (MASK, 4), (EVERYBODY, 4)))
    user(lambda: refused(errno.EACCES, get, "f"))
    user(lambda: same(get("f"), b"content"), uid=OTHER_USER)


@check
def default_access_control_lists():
    os.mkdir("d")
    os.setxattr("d", DEFAULT, acl((USER_OBJ, 7), (NAMED_USER, 7, USER), (GROUP_OBJ, 5), (MASK, 7), (EVERYBODY, 0)))
    os.umask(0o077)  # does not count where there is a default list
    put("d/f")
    os.mkdir("d/d")
    wanted = acl((USER_OBJ, 6), (NAMED_USER, 7, USER), (GROUP_OBJ, 5), (MASK, 6), (EVERYBODY, 0))
    same((mode_of("d/f"), os.getxattr("d/f", ACCESS)), ("0o660", wanted), "a file's")
    same((mode_of("d/d"), os.getxattr("d/d", DEFAULT)), ("0o770", os.getxattr("d", DEFAULT)), "a folder's")
    os.chmod("d", 0o755)
    user(put_at, "d/f")
    user(put, "d/d/made")
    user(lambda: refused(errno.EACCES, put_at, "d/f"), uid=OTHER_USER)
    os.removexattr("d", DEFAULT)
    put("d/g")
    same((mode_of("d/g"), os.listxattr("d/g")), ("0o600", []))


@check
def errors_of_access_control_lists():
    put("f", b"", 0o644)
    refused(errno.EINVAL, os.setxattr, "f", ACCESS, acl((USER_OBJ, 6)))
    refused((errno.EOPNOTSUPP, errno.EINVAL), os.setxattr, "f", ACCESS, b"\x01\0\0\0")
    refused(errno.EACCES, os.setxattr, "f", DEFAULT, ONE_READER)
    user(lambda: refused(errno.EPERM, os.setxattr, "f", ACCESS, ONE_READER))
    os.setxattr("f", ACCESS, acl((USER_OBJ, 6), (GROUP_OBJ, 4), (EVERYBODY, 0)))
    same((mode_of("f"), os.listxattr("f")), ("0o640", []), "a list that says no more than the mode")
    for_user("f")
    user(os.setxattr, "f", ACCESS, ONE_READER)


# ---- space


def blocks(path_or_fd):
    return os.stat(path_or_fd).st_blocks * 512


@check
def allocation_of_space():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    fallocate(fd, 0, 0, 100000)
    same((os.fstat(fd).st_size, blocks(fd) >= 100000), (100000, True))
    same(os.pread(fd, 200000, 0), bytes(100000))
    fallocate(fd, KEEP_SIZE, 100000, 1 << 20)
    same((os.fstat(fd).st_size, blocks(fd) >= 1 << 20), (100000, True), "with KEEP_SIZE")
    os.posix_fallocate(fd, 150000, 10)
    same(os.fstat(fd).st_size, 150010, "posix_fallocate")
    os.pwrite(fd, b"kept", 0)
    fallocate(fd, 0, 0, 200000)
    same(os.pread(fd, 5, 0), b"kept\0")


@check
def holes_are_punched():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    content = os.urandom(1 << 18)
    os.write(fd, content)
    os.fsync(fd)
    before = blocks(fd)
    with mmap.mmap(fd, 1 << 18) as memory:
        same(memory[PAGE], content[PAGE])
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 1000, 1 << 17)
        wanted = content[:1000] + bytes(1 << 17) + content[1000 + (1 << 17) :]
        same(memory[:] == wanted, True, "the mapping")
    same(os.pread(fd, 1 << 18, 0) == wanted, True, "the file")
    drop_caches()
    same(os.pread(fd, 1 << 18, 0) == wanted, True, "the file without caches")
    same((os.fstat(fd).st_size, blocks(fd) < before), (1 << 18, True))


@check
def ranges_are_zeroed():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 20000)
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, 100, 5000)
    same(os.pread(fd, 30000, 0), b"x" * 100 + bytes(5000) + b"x" * 14900)
    fallocate(fd, ZERO_RANGE, 19000, 5000)
    same(os.pread(fd, 30000, 19000 - 2), b"xx" + bytes(5000))


@check
def ranges_are_collapsed_and_inserted():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)
    fallocate(fd, COLLAPSE_RANGE, PAGE, PAGE)
    same(get("f"), b"a" * PAGE + b"c" * PAGE)
    fallocate(fd, INSERT_RANGE, PAGE, PAGE)
    same(get("f"), b"a" * PAGE + bytes(PAGE) + b"c" * PAGE)


@check
def errors_of_allocation():
    put("f", b"x")
    reader, writer = os.open("f", os.O_RDONLY), os.open("f", os.O_WRONLY)
    refused(errno.EBADF, fallocate, reader, 0, 0, 10)
    refused(errno.EINVAL, fallocate, writer, 0, -1, 10)
    refused(errno.EINVAL, fallocate, writer, 0, 0, 0)
    refused(errno.EOPNOTSUPP, fallocate, writer, PUNCH_HOLE, 0, 10)
    refused(errno.EFBIG, fallocate, writer, 0, 1 << 62, 10)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, PAGE))
    refused(errno.EFBIG, fallocate, writer, 0, 0, PAGE + 1)


@check
def holes_are_found():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 << 20)
    os.pwrite(fd, b"x" * PAGE, 1 << 20)
    for _ in range(2):
        same(os.lseek(fd, 0, os.SEEK_DATA), 1 << 20)
        same(os.lseek(fd, 1 << 20, os.SEEK_HOLE), (1 << 20) + PAGE)
        same(os.lseek(fd, 5, os.SEEK_HOLE), 5)
        refused(errno.ENXIO, os.lseek, fd, (1 << 20) + PAGE, os.SEEK_DATA)
        refused(errno.ENXIO, os.lseek, fd, 2 << 20, os.SEEK_HOLE)
        refused(errno.ENXIO, os.lseek, fd, -1, os.SEEK_DATA)
        drop_caches()
    put("g", b"x" * 100)
    fd = os.open("g", os.O_RDONLY)
    same((os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, 50, os.SEEK_DATA)), (100, 50))


@check
def a_copy_of_what_is_not_yet_on_disk():
    """cp looks for holes; what another process has written a moment ago is none."""
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 << 20)
    os.pwrite(fd, b"x" * PAGE, 1 << 20)
    Other(subprocess.run, ["cp", "--sparse=auto", "a", "b"]).join()
    same(get("b")[1 << 20 : (1 << 20) + PAGE] == b"x" * PAGE, True, "the copy")


@check
def sparse_files_beyond_4_gib():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    end = 5 << 30
    os.pwrite(fd, b"end", end - 3)
    os.pwrite(fd, b"middle", (4 << 30) - 3)
    os.fsync(fd)
    drop_caches()
    same((os.fstat(fd).st_size, os.stat("f").st_size, blocks(fd) < 1 << 20), (end, end, True))
    same(os.pread(fd, 10, end - 5), b"\0\0end")
    same(os.pread(fd, 8, (4 << 30) - 4), b"\0middle\0")
    with mmap.mmap(fd, PAGE, offset=end - PAGE) as memory:
        same(memory[-4:], b"\0end")
    os.ftruncate(fd, (4 << 30) + 1)
    same((os.stat("f").st_size, os.pread(fd, 9, (4 << 30) - 3)), ((4 << 30) + 1, b"midd"))


@check
def limits_of_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    refused(errno.EINVAL, os.ftruncate, fd, -1)
    refused((errno.EFBIG, errno.EINVAL), os.ftruncate, fd, (1 << 63) - 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    same(os.write(fd, b"x" * 2000), 1000, "a write over the limit")
    refused(errno.EFBIG, os.write, fd, b"x")
    refused(errno.EFBIG, os.ftruncate, fd, 1001)
    same(os.fstat(fd).st_size, 1000)


def take_errors():
    """Of writes to the whole file system: or whoever asks next is told of them."""
    with contextlib.suppress(OSError):
        system("syncfs", os.open(".", os.O_RDONLY))


@check
def writing_where_no_file_can_be():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    try:
        refused(errno.EFBIG, os.pwrite, fd, b"x", (1 << 63) - 2)
    finally:
        take_errors()


@check
def what_cannot_be_written_is_told_at_the_latest_by_close():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)

    def write_and_close():
        os.pwrite(fd, b"x", 1 << 62)
        os.close(fd)

    try:
        refused(errno.EFBIG, write_and_close)
    finally:
        take_errors()


@check
def what_cannot_be_written_is_told_to_who_has_written_it():
    """Whoever else closes the file before, and does not care."""
    closings = {
        "a reader": lambda fd, reader: os.close(reader),
        "a duplicate": lambda fd, reader: os.close(os.dup(fd)),
        "another program": lambda fd, reader: subprocess.call(["true"]),
    }

    def write_and_close(first):
        fd, reader = os.open("f", os.O_RDWR | os.O_CREAT), os.open("f", os.O_RDONLY)
        os.pwrite(fd, b"x", 1 << 62)
        with contextlib.suppress(OSError):
            first(fd, reader)
        os.close(fd)

    try:
        for what, first in closings.items():
            refused(errno.EFBIG, write_and_close, first, what=what)
    finally:
        take_errors()


@check
def what_another_one_could_not_write_is_no_error_of_who_appends_or_looks_for_holes():
    put("f", b"abc")
    fd, end, reader = (os.open("f", flags) for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDONLY))
    try:
        for settle in (lambda: None, os.sync):
            with contextlib.suppress(OSError):
                os.pwrite(fd, b"x", 1 << 62)
            settle()
            same(os.write(end, b"d"), 1)
        with contextlib.suppress(OSError):
            os.pwrite(fd, b"x", 1 << 62)
        os.sync()
        same(os.lseek(reader, 0, os.SEEK_DATA), 0)
    finally:
        take_errors()


@check
def sizes_and_blocks():
    put("f", b"x" * 10000)
    os.sync()
    same((os.stat("f").st_size, 10000 <= blocks("f") <= 65536), (10000, True), "blocks")
    seen = os.statvfs(".")
    same((seen.f_namemax, seen.f_blocks > 0, 0 < seen.f_bavail <= seen.f_bfree <= seen.f_blocks), (255, True, True))
    same((seen.f_bsize >= 512, seen.f_frsize >= 512, seen.f_files > 0, seen.f_flag & os.ST_RDONLY), (1, 1, 1, 0))


# ---- times


@check
def times_are_kept():
    put("f")
    os.mkdir("d")
    os.symlink("f", "l")
    for path in ("f", "d", "l"):
        for times in ((1234567890123456789, 987654321987654321), (1, 2), (0, 0), (7 * 10**18, 6 * 10**18)):
            os.utime(path, ns=times, follow_symlinks=False)
            seen = os.lstat(path)
            same((seen.st_atime_ns, seen.st_mtime_ns), times, path)
    drop_caches()
    same(os.stat("d").st_mtime_ns, 6 * 10**18)


@check
def times_before_1970_are_kept():
    times = {"a": -1, "b": -(10**9), "c": -2 * 10**9 + 5}
    for name, mtime in times.items():
        put(name)
        os.utime(name, ns=(-(10**9), mtime))
    drop_caches()
    for name, mtime in times.items():
        same((os.stat(name).st_atime_ns, os.stat(name).st_mtime_ns), (-(10**9), mtime))


@check
def times_now_and_omitted():
    put("f")
    os.utime("f", ns=(10**18, 10**18))
    now, omit = (1 << 30) - 1, (1 << 30) - 2
    system("utimensat", AT_FDCWD, "f", struct.pack("qqqq", 0, now, 0, omit), 0)
    seen = os.stat("f")
    same((abs(seen.st_atime - time.time()) < 60, seen.st_mtime_ns), (True, 10**18))
    system("utimensat", AT_FDCWD, "f", struct.pack("qqqq", 5, 6, 0, now), 0)
    seen = os.stat("f")
    same((seen.st_atime_ns, abs(seen.st_mtime - time.time()) < 60), (5 * 10**9 + 6, True))
    os.utime("f")
    same(abs(os.stat("f").st_mtime - time.time()) < 60, True)


def seen_of(fd):
    """Mode, atime and mtime in nanoseconds: what all who ask are told, also who has the file system look again."""
    found, kinds = ctypes.create_string_buffer(256), STATX_MODE | STATX_ATIME | STATX_MTIME
    system("statx", fd, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, kinds, ctypes.addressof(found))
    mode, atime, mtime = (struct.unpack_from(form, found, at) for form, at in (("H", 28), ("qI", 64), ("qI", 112)))
    seen = os.fstat(fd)
    told = (oct(mode[0] & 0o7777), atime[0] * 10**9 + atime[1], mtime[0] * 10**9 + mtime[1])
    same(told, (oct(stat.S_IMODE(seen.st_mode)), seen.st_atime_ns, seen.st_mtime_ns), "with a look, without")
    return told


@check
def attributes_of_a_new_file():
    """They count at once, before it is closed and behind that, whoever sends what is written meanwhile."""
    for pause in (lambda fd: None, os.fsync, lambda fd: os.sync()):
        fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, b"x" * 5000)
        os.fchmod(fd, 0o644)
        pause(fd)
        os.utime(fd, ns=(10**18 + 7, 2 * 10**18 + 7))
        os.fchown(fd, 0, 0)
        same(seen_of(fd), ("0o644", 10**18 + 7, 2 * 10**18 + 7))
        pause(fd)
        same(seen_of(fd), ("0o644", 10**18 + 7, 2 * 10**18 + 7))
        os.utime(fd)
        now = time.time()
        same([abs(each / 10**9 - now) < 60 for each in seen_of(fd)[1:]], [True, True], "touched")
        os.utime(fd, ns=(3, 4))
        os.pwrite(fd, b"y", 0)
        pause(fd)
        same((seen_of(fd)[1], abs(seen_of(fd)[2] / 10**9 - now) < 60), (3, True), "written behind")
        os.utime(fd, ns=(5, 6))
        os.fchmod(fd, 0o755)
        os.fchmod(fd, 0o640)
        pause(fd)
        same(seen_of(fd), ("0o640", 5, 6), "less")
        os.close(fd)
        drop_caches()
        seen = os.stat("f")
        same((seen.st_atime_ns, seen.st_mtime_ns, mode_of("f")), (5, 6, "0o640"), "closed")
        os.unlink("f")


@check
def modes_of_a_new_file_and_its_other_attributes():
    """Each that depends on another comes behind it."""
    os.mkdir("d")
    os.setxattr("d", DEFAULT, acl((USER_OBJ, 7), (NAMED_USER, 7, USER), (GROUP_OBJ, 5), (MASK, 7), (EVERYBODY, 0)))
    fd = os.open("d/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(fd, 0o664)
    wanted = acl((USER_OBJ, 6), (NAMED_USER, 7, USER), (GROUP_OBJ, 5), (MASK, 6), (EVERYBODY, 4))
    same((os.getxattr(fd, ACCESS), seen_of(fd)[0]), (wanted, "0o664"), "a list with another mask")
    user(put_at, "d/f")
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(fd, 0o666)
    os.setxattr(fd, ACCESS, ONE_READER)
    same((os.getxattr(fd, ACCESS), seen_of(fd)[0]), (ONE_READER, "0o660"), "a list behind a mode")
    fd = os.open("g", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    refused(errno.ENODATA, os.getxattr, fd, "security.capability")
    os.setxattr(fd, "security.capability", CAPABILITY)
    same(os.getxattr(fd, "security.capability"), CAPABILITY)
    os.fchown(fd, 0, 0)
    refused(errno.ENODATA, os.getxattr, fd, "security.capability")
    fd = os.open("h", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o755)
    os.fchmod(fd, 0o4755)
    for_user("h")
    os.fchmod(fd, 0o6755)
    user(put_at, "h")
    same(mode_of("h"), "0o755", "written by another")


@check
def a_new_file_with_a_second_writer():
    """What it has got is behind what was set before."""
    for flags in (os.O_APPEND, os.O_TRUNC, 0):
        fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, b"some")
        os.utime(fd, ns=(10**9, 10**9))
        other = os.open("f", os.O_WRONLY | flags)
        os.write(other, b"more")
        os.close(other)
        os.close(fd)
        drop_caches()
        same((abs(os.stat("f").st_mtime - time.time()) < 60, os.stat("f").st_atime), (True, 1), flags)
        os.unlink("f")


@check
def a_copy_is_not_older():
    put("a", b"x")
    subprocess.run(["cp", "-p", "a", "b"], check=True)
    same(os.stat("b").st_mtime_ns, os.stat("a").st_mtime_ns)
    same(subprocess.run(["sh", "-c", "[ a -nt b ] || [ a -ot b ]"]).returncode, 1)


@check
def times_of_other_users():
    put("f", b"", 0o666)

    def stranger():
        os.utime("f")
        refused(errno.EPERM, os.utime, "f", (1, 2))

    user(stranger)
    os.chmod("f", 0o644)
    user(lambda: refused(errno.EACCES, os.utime, "f"))
    user(lambda: refused(errno.EPERM, os.utime, "f", (1, 2)))
    for_user("f")
    user(os.utime, "f", (1, 2))
    same(os.stat("f").st_mtime, 2)


def changed(paths, work):
    """Return which of mtime and ctime of these paths an operation has moved, as {path: "mc"}; those of no file: ""."""

    def look():
        found = {}
        for path in paths:
            seen = os.lstat(path) if os.path.lexists(path) else None
            found[path] = (seen.st_mtime_ns, seen.st_ctime_ns) if seen else None
        return found

    before = look()
    time.sleep(0.03)  # the kernel's clock for files goes by steps of up to 10 ms
    work()
    after = look()
    return {
        path: "".join(letter for letter, old, new in zip("mc", before[path], after[path]) if old != new)
        for path in paths
        if before[path] and after[path]
    }


MOVES = [  # an operation, and which times it moves: m and c
    ("creation", lambda: put("d/new"), {"d": "mc", "e": ""}),
    ("creation of what is there", lambda: os.close(os.open("d/new", os.O_CREAT)), {"d": "", "d/new": ""}),
    ("mkdir", lambda: os.mkdir("d/sub"), {"d": "mc"}),
    ("symlink", lambda: os.symlink("x", "d/l"), {"d": "mc"}),
    ("mkfifo", lambda: os.mkfifo("d/p"), {"d": "mc"}),
    ("link", lambda: os.link("f", "d/f"), {"d": "mc", "f": "c"}),
    ("write through the other name", lambda: put_at("d/f"), {"f": "mc", "d": ""}),
    ("unlink of one name", lambda: os.unlink("d/f"), {"d": "mc", "f": "c"}),
    ("rename", lambda: os.rename("f", "g"), {".": "mc"}),
    ("rename back", lambda: os.rename("g", "f"), {".": "mc"}),
    ("rename to another folder", lambda: os.rename("d/sub", "e/sub"), {"d": "mc", "e": "mc"}),
    ("exchange", lambda: renameat2("d/l", "e/sub", RENAME_EXCHANGE), {"d": "mc", "e": "mc"}),
    ("rmdir", lambda: os.rmdir("d/l"), {"d": "mc"}),
    ("unlink", lambda: os.unlink("d/p"), {"d": "mc"}),
    ("chmod", lambda: os.chmod("f", 0o640), {"f": "c", ".": ""}),
    ("chmod to the same", lambda: os.chmod("f", 0o640), {"f": "c"}),
    ("chown", lambda: os.chown("f", 5, 6), {"f": "c"}),
    ("utime", lambda: os.utime("f", (5, 6)), {"f": "mc"}),
    ("setxattr", lambda: os.setxattr("f", "user.x", b"1"), {"f": "c"}),
    ("write", lambda: put_at("f"), {"f": "mc", ".": ""}),
    ("write of nothing", lambda: os.write(os.open("f", os.O_WRONLY), b""), {"f": ""}),
    ("truncate", lambda: os.truncate("f", 100), {"f": "mc", ".": ""}),
    ("O_TRUNC", lambda: put("f"), {"f": "mc", ".": ""}),
    ("reading", lambda: get("f"), {"f": ""}),
    ("a refused mkdir", lambda: refused(errno.EEXIST, os.mkdir, "d"), {"d": "", ".": ""}),
    ("a refused rmdir", lambda: refused(errno.ENOTEMPTY, os.rmdir, "d"), {"d": "", ".": ""}),
]


@check
def what_moves_times():
    os.mkdir("d")
    os.mkdir("e")
    put("f", b"content")
    wrong = []
    for what, work, wanted in MOVES:
        try:
            seen = changed(wanted, work)
        except OSError as error:
            wrong.append(f"{what}: {error}")
            continue
        wrong += [f"{what}: {path} {seen[path] or '-'}, not {wanted[path] or '-'}" for path in wanted
                  if seen[path] != wanted[path]]  # fmt: skip
    same(wrong, [])


@check
def a_mapping_moves_times():
    put("f", bytes(PAGE))
    fd = os.open("f", os.O_RDWR)

    def write():
        with mmap.mmap(fd, PAGE) as memory:
            memory[:1] = b"x"
            memory.flush()

    same(changed(["f"], write), {"f": "mc"})


@check
def times_do_not_go_back():
    """Not by what is written back later either."""
    for number in range(5):
        put(f"f{number}", b"x" * 50000)
        os.utime(f"f{number}", ns=(5, 10**18 + 7))
    drop_caches()
    same({os.stat(f"f{number}").st_mtime_ns for number in range(5)}, {10**18 + 7})
    fd = os.open("f0", os.O_WRONLY)
    os.write(fd, b"y" * 60000)
    os.utime("f0", ns=(5, 6))
    os.close(fd)
    drop_caches()
    same(os.stat("f0").st_mtime_ns, 6)


@check
def times_of_what_was_written_stay():
    """Also those of what is still to be written when they are asked for."""
    seen = {}
    for name in "abc":
        put(name, b"x" * 5000)
        fd = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"y")
        seen[name] = os.stat(name).st_mtime_ns
    drop_caches()
    same({name: os.stat(name).st_mtime_ns for name in seen}, seen)


@check
def times_of_what_two_have_written_stay():
    """One of them appends behind what the other one has just written."""
    one, two = os.open("f", os.O_RDWR | os.O_CREAT), os.open("f", os.O_RDWR | os.O_APPEND)
    os.write(one, b"1")
    same(changed(["f"], lambda: os.write(two, b"2")), {"f": "mc"})
    before = os.stat("f").st_mtime_ns
    os.close(one)
    os.close(two)
    drop_caches()
    same((os.stat("f").st_mtime_ns, get("f")), (before, b"12"))


@check
def times_stay_when_much_is_sent():
    """More pieces than are on their way at once: the last ones are no later change."""
    for name in "abc":
        fd = os.open(name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 400 * PAGE)
        for number in range(0, 400, 2):
            os.pwrite(fd, b"x" * PAGE, number * PAGE)
        before = os.fstat(fd).st_mtime_ns
        with flusher_at_work():
            while blocks(fd) < 200 * PAGE:
                time.sleep(0.01)
        drop_caches()
        same(os.fstat(fd).st_mtime_ns, before)


@check
def times_that_are_set_while_it_is_sent():
    """The kernel sends the time of a write by its own clock: never behind one that was set since."""
    fds = [os.open(name, os.O_RDWR | os.O_CREAT) for name in "abcd"]
    number = random.Random(SEED)
    with flusher_at_work():
        for step in range(1, 151):
            for fd in fds:
                os.pwrite(fd, b"x" * PAGE, 0)
            time.sleep(number.random() * 0.02)
            for fd in fds:
                os.utime(fd, ns=(1, step))
            time.sleep(number.random() * 0.02)
            same([os.fstat(fd).st_mtime_ns for fd in fds], [step] * 4)


@check
def reading_moves_atime():
    put("f", b"x")
    os.utime("f", ns=(10**18, 10**18 + 1))
    get("f")
    same(os.stat("f").st_atime_ns > 10**18 + 1, True, "atime behind mtime, after a read")


@check
def birth_times():
    put("f")
    born = subprocess.run(["stat", "-c", "%W", "f"], stdout=subprocess.PIPE, check=True).stdout
    same(abs(int(born) - time.time()) < 60, True, f"born at {born}")


# ---- errors

NEEDS_IT = {  # needs what the path names
    "open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "open to write": lambda path: os.close(os.open(path, os.O_WRONLY)),
    "stat": os.stat,
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, -1, -1),
    "truncate": lambda path: os.truncate(path, 0),
    "utime": os.utime,
    "chdir": os.chdir,
    "listdir": os.listdir,
    "getxattr": lambda path: os.getxattr(path, "user.x"),
    "access": lambda path: system("access", path, os.R_OK),
    "statvfs": os.statvfs,
    "exec": lambda path: os.execv(path, ["x"]),
}
NEEDS_NAME = {  # the same, and does not follow a link at its end
    "lstat": os.lstat,
    "readlink": os.readlink,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "rename": lambda path: os.rename(path, "other"),
    "link": lambda path: os.link(path, "other"),
    "lchown": lambda path: os.lchown(path, -1, -1),
}
MAKES_IT = {
    "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
    "mkdir": os.mkdir,
    "symlink": lambda path: os.symlink("x", path),
    "mkfifo": os.mkfifo,
    "mknod": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "link to": lambda path: os.link("file", path),
    "rename to": lambda path: os.rename("file", path),
    "O_TMPFILE below": lambda path: os.close(os.open(os.path.dirname(path) or ".", os.O_TMPFILE | os.O_WRONLY)),
}


def all_refused(number, path, *tables, without=()):
    for name, function in itertools.chain(*(table.items() for table in tables)):
        if name not in without:
            refused(number, function, path, what=f"{name} {path[:20]}")


@check
def enoent():
    put("file")
    os.symlink("nowhere", "link")
    all_refused(errno.ENOENT, "missing", NEEDS_IT, NEEDS_NAME)
    all_refused(errno.ENOENT, "missing/name", NEEDS_IT, NEEDS_NAME, MAKES_IT)
    all_refused(errno.ENOENT, "link", NEEDS_IT)
    all_refused(errno.ENOENT, "link/name", NEEDS_IT, NEEDS_NAME, MAKES_IT)
    all_refused(errno.ENOENT, "", NEEDS_IT, NEEDS_NAME, MAKES_IT, without=["O_TMPFILE below"])
    same(sorted(os.listdir(".")), ["file", "link"])


@check
def enotdir():
    put("file", b"", 0o755)
    os.mkfifo("pipe")
    for path in ("file/name", "pipe/name"):
        all_refused(errno.ENOTDIR, path, NEEDS_IT, NEEDS_NAME, MAKES_IT)
    for function in (os.rmdir, os.chdir, os.listdir):
        refused(errno.ENOTDIR, function, "file")
    refused(errno.ENOTDIR, os.open, "file", os.O_DIRECTORY)
    for function in (os.stat, os.lstat, os.unlink, get, os.readlink):
        refused(errno.ENOTDIR, function, "file/")
    refused(errno.ENOTDIR, os.rename, "file", "other/")
    os.mkdir("d")
    refused(errno.ENOTDIR, os.rename, "d", "file")


@check
def eloop():
    put("file")
    os.symlink("a", "b")
    os.symlink("b", "a")
    all_refused(errno.ELOOP, "a", NEEDS_IT)
    all_refused(errno.ELOOP, "a/name", NEEDS_IT, NEEDS_NAME, MAKES_IT)
    refused(errno.ELOOP, put, "a")
    refused(errno.ELOOP, os.open, "a", os.O_NOFOLLOW)
    os.symlink("file", "l0")
    for number in range(40):
        os.symlink(f"l{number}", f"l{number + 1}")
    same(get("l39"), b"")
    refused(errno.ELOOP, get, "l40")


@check
def enametoolong():
    put("file")
    for path in ("x" * 256, "d/" + "x" * 256, "x" * 256 + "/name"):
        os.makedirs("d", exist_ok=True)
        all_refused(errno.ENAMETOOLONG, path, NEEDS_IT, NEEDS_NAME, MAKES_IT, without=["O_TMPFILE below"])
    all_refused(errno.ENAMETOOLONG, "./" * 2048, NEEDS_IT, NEEDS_NAME, MAKES_IT, without=["O_TMPFILE below"])
    refused(errno.ENAMETOOLONG, os.symlink, "x" * 4096, "l")


@check
def eexist():
    put("file")
    put("there")
    os.mkdir("folder")
    os.symlink("nowhere", "link")
    for path in ("there", "folder", "link"):
        all_refused(errno.EEXIST, path, MAKES_IT, without=["create", "rename to", "O_TMPFILE below"])
        refused(errno.EEXIST, os.open, path, os.O_CREAT | os.O_EXCL)
    same(sorted(os.listdir(".")), ["file", "folder", "link", "there"])
    put("link", b"through it")
    same(get("nowhere"), b"through it")
    refused(errno.EEXIST, os.open, "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@check
def enotempty():
    os.makedirs("full/sub")
    os.mkdir("empty")
    refused(errno.ENOTEMPTY, os.rmdir, "full")
    refused(errno.ENOTEMPTY, os.rename, "empty", "full")
    refused(errno.EINVAL, os.rmdir, "empty/.")
    refused(errno.ENOTEMPTY, os.rmdir, "full/sub/..")
    os.rename("full", "empty")
    same(os.listdir("empty"), ["sub"])


@check
def eisdir():
    os.mkdir("d")
    put("file")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT | os.O_RDONLY, os.O_RDONLY | os.O_TRUNC):
        refused(errno.EISDIR, os.open, "d", flags)
    refused(errno.EISDIR, os.truncate, "d", 0)
    refused(errno.EISDIR, os.unlink, "d")
    refused(errno.EISDIR, os.rename, "file", "d")
    fd = os.open("d", os.O_RDONLY)
    refused(errno.EISDIR, os.read, fd, 1)
    refused(errno.EINVAL, os.ftruncate, fd, 0)
    refused(errno.EPERM, os.link, "d", "e")
    refused(errno.EINVAL, os.readlink, "d")


@check
def eacces_below_a_closed_folder():
    os.mkdir("closed")
    put("closed/name")
    put("file")
    for_user(".", "file")
    os.chmod("closed", 0o600)

    def stranger():
        all_refused(errno.EACCES, "closed/name", NEEDS_IT, NEEDS_NAME, MAKES_IT, without=["O_TMPFILE below", "mknod"])
        all_refused(errno.EACCES, "closed/missing", NEEDS_IT, NEEDS_NAME, without=["link"])

    user(stranger)


@check
def eacces_in_a_read_only_folder():
    os.makedirs("d/sub")
    put("d/name", b"", 0o644)
    put("file")
    for_user(".", "file")
    os.chmod("d", 0o755)

    def stranger():
        all_refused(errno.EACCES, "d/new", MAKES_IT, without=["mknod"])
        for function in (os.unlink, NEEDS_NAME["rename"], NEEDS_IT["open to write"], NEEDS_IT["truncate"]):
            refused(errno.EACCES, function, "d/name")
        refused(errno.EACCES, os.rmdir, "d/sub")
        refused(errno.EACCES, os.rename, "file", "d/name")
        same(os.access("d/name", os.W_OK), False)
        os.mkdir("mine")
        refused(errno.EACCES, os.rename, "d/sub", "mine/sub")

    user(stranger)


@check
def permissions_of_owner_group_and_others():
    """The first class that one is in counts, whether it gives more or less."""
    put("f", b"x")
    read, write = (lambda: get("f")), (lambda: put_at("f"))
    for mode, owner, group, ids, may in [
        (0o400, USER, GROUP, (), (read,)), (0o200, USER, GROUP, (), (write,)), (0o077, USER, GROUP, [GROUP], ()),
        (0o040, 0, GROUP, [GROUP], (read,)), (0o020, 0, GROUP, [GROUP], (write,)), (0o707, 0, GROUP, [GROUP], ()),
        (0o004, 0, 0, (), (read,)), (0o002, 0, 0, (), (write,)), (0o770, 0, 0, (), ()), (0o040, 0, USER, (), (read,)),
    ]:  # fmt: skip
        os.chown("f", owner, group)
        os.chmod("f", mode)
        for work in (read, write):
            function = work if work in may else functools.partial(refused, errno.EACCES, work)
            user(function, groups=ids)
        put_at("f")  # root may always


@check
def what_only_owners_may():
    put("f", b"", 0o666)
    os.chmod(".", 0o777)

    def stranger():
        refused(errno.EPERM, os.chmod, "f", 0o777)
        refused(errno.EPERM, os.chown, "f", USER, -1)
        refused(errno.EPERM, os.chown, "f", -1, USER)
        refused(errno.EPERM, os.open, "f", os.O_RDONLY | os.O_NOATIME)
        refused(errno.EPERM, os.mknod, "n", stat.S_IFCHR | 0o600, os.makedev(1, 3))

    def owner():
        os.chmod("f", 0o600)
        refused(errno.EPERM, os.chown, "f", OTHER_USER, -1)
        refused(errno.EPERM, os.chown, "f", -1, GROUP + 1)
        os.chown("f", -1, GROUP)

    user(stranger)
    for_user("f")
    user(owner, groups=[GROUP])
    same(os.stat("f").st_gid, GROUP)


@check
def sticky_folders():
    os.mkdir("t")
    os.chmod("t", 0o1777)
    for uid, name in ((OTHER_USER, "theirs"), (USER, "mine")):
        user(put, f"t/{name}", uid=uid)
        user(os.mkdir, f"t/{name}-folder", uid=uid)

    def stranger():
        refused(errno.EPERM, os.unlink, "t/theirs")
        refused(errno.EPERM, os.rmdir, "t/theirs-folder")
        refused(errno.EPERM, os.rename, "t/theirs", "t/other")
        refused(errno.EPERM, os.rename, "t/mine", "t/theirs")
        refused(errno.EPERM, renameat2, "t/mine", "t/theirs", RENAME_EXCHANGE)
        os.rename("t/mine", "t/still-mine")
        os.unlink("t/still-mine")
        os.rmdir("t/mine-folder")

    user(stranger)
    os.chown("t", USER, USER)  # the folder's owner may
    user(os.unlink, "t/theirs")


@check
def ebadf_and_einval_of_descriptors():
    put("f", b"content")
    reader, writer, path = os.open("f", os.O_RDONLY), os.open("f", os.O_WRONLY), os.open("f", os.O_PATH)
    refused(errno.EBADF, os.write, reader, b"x")
    refused(errno.EBADF, os.read, writer, 1)
    refused(errno.EINVAL, os.ftruncate, reader, 0)
    for function in (lambda: os.read(path, 1), lambda: os.fchmod(path, 0o600), lambda: os.getxattr(path, "user.x")):
        refused(errno.EBADF, function, what="use of O_PATH")
    same(os.fstat(path).st_size, 7)
    refused(errno.EINVAL, os.lseek, reader, -1, os.SEEK_SET)
    refused(errno.EINVAL, os.pread, reader, 1, -1)
    same((os.lseek(reader, 100, os.SEEK_SET), os.read(reader, 10)), (100, b""))


@check
def opening():
    put("f", b"content")
    os.symlink("f", "l")
    refused(errno.ELOOP, os.open, "l", os.O_RDONLY | os.O_NOFOLLOW)
    same(stat.S_ISLNK(os.fstat(os.open("l", os.O_PATH | os.O_NOFOLLOW)).st_mode), True)
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY))
    same(get("f"), b"content")
    os.close(os.open("f", os.O_TRUNC | os.O_RDWR))
    same((get("f"), os.stat("f").st_size), (b"", 0))
    one, two = os.open("f", os.O_RDWR), os.open("f", os.O_RDWR | os.O_SYNC)
    os.write(one, b"12345")
    same((os.read(two, 3), os.read(os.dup(two), 3), os.read(two, 3)), (b"123", b"45", b""))
    same(os.read(os.open(f"/proc/self/fd/{two}", os.O_RDONLY), 9), b"12345")


# ---- names and folders


@check
def renaming_over():
    for kind in (lambda path: put(path, b"a"), lambda path: os.symlink("a", path), os.mkfifo):
        kind("a")
        put("b", b"b")
        before = os.lstat("a")
        os.rename("a", "b")
        same((os.lstat("b").st_ino, os.lstat("b").st_mode), (before.st_ino, before.st_mode))
        refused(errno.ENOENT, os.lstat, "a")
        os.unlink("b")
    put("a")
    os.link("a", "b")
    os.rename("a", "b")
    same((sorted(os.listdir(".")), os.stat("a").st_nlink), (["a", "b"], 2), "two names of one file")
    os.rename("a", "a")


@check
def renaming_without_replacement():
    put("a", b"a")
    put("b", b"b")
    refused(errno.EEXIST, renameat2, "a", "b", RENAME_NOREPLACE)
    renameat2("a", "c", RENAME_NOREPLACE)
    same((get("b"), get("c"), sorted(os.listdir("."))), (b"b", b"a", ["b", "c"]))


@check
def exchanging_names():
    put("a", b"a")
    os.makedirs("d/sub")
    put("d/in", b"in")
    renameat2("a", "d", RENAME_EXCHANGE)
    same((get("d"), get("a/in"), os.path.isdir("a/sub")), (b"a", b"in", True))
    renameat2("a/in", "d", RENAME_EXCHANGE)
    drop_caches()
    same((get("d"), get("a/in")), (b"in", b"a"))
    refused(errno.ENOENT, renameat2, "a", "missing", RENAME_EXCHANGE)
    refused(errno.EINVAL, renameat2, "a", "d", RENAME_EXCHANGE | RENAME_NOREPLACE)
    refused(errno.EINVAL, renameat2, "a", "a/sub", RENAME_EXCHANGE)


@check
def a_whiteout_is_left():
    put("a", b"a")
    renameat2("a", "b", RENAME_WHITEOUT)
    same((get("b"), os.stat("a").st_rdev, stat.S_ISCHR(os.stat("a").st_mode)), (b"a", 0, True))


@check
def renaming_of_folders():
    os.makedirs("a/b/c")
    os.mkdir("z")
    put("a/b/c/f", b"x")
    same((os.stat("a").st_nlink, os.stat("z").st_nlink), (3, 2))
    refused(errno.EINVAL, os.rename, "a", "a/b/c/d")
    refused(errno.EINVAL, os.rename, "a/b", "a/b/new")
    refused((errno.EBUSY, errno.EINVAL), os.rename, "a/.", "y")
    refused(errno.ENOTEMPTY, os.rename, "a/b/c", "a")
    fd = os.open("a/b", os.O_RDONLY)
    os.rename("a/b", "z/b")
    same((os.stat("a").st_nlink, os.stat("z").st_nlink, get("z/b/c/f")), (2, 3, b"x"))
    same(os.stat("z/b/..").st_ino, os.stat("z").st_ino, "its parent")
    same(os.stat("..", dir_fd=fd).st_ino, os.stat("z").st_ino, "its parent by a descriptor")
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    same(sorted(os.listdir("z/b")), ["c", "new"])
    refused(errno.ENOENT, os.stat, "a/b/c/f")
    os.chdir("z/b/c")
    os.rename("../../../z", "../../../y")
    same(os.getcwd().endswith("/y/b/c"), True, os.getcwd())


@check
def link_counts():
    put("f")
    os.mkdir("d")
    counts = [(os.stat("f").st_nlink, os.stat("d").st_nlink)]
    for number in range(3):
        os.link("f", f"d/{number}")
        os.mkdir(f"d/sub{number}")
        counts.append((os.stat("f").st_nlink, os.stat("d").st_nlink))
    same(counts, [(1, 2), (2, 3), (3, 4), (4, 5)])
    os.rename("d/0", "d/1")  # two names of one file: nothing
    os.rmdir("d/sub0")
    os.unlink("d/2")
    same((os.stat("f").st_nlink, os.stat("d").st_nlink), (3, 4))
    put("d/new")
    os.rename("d/new", "d/0")
    same(os.stat("f").st_nlink, 2)
    os.symlink("f", "l")
    os.link("l", "m", follow_symlinks=False)
    same((os.readlink("m"), os.lstat("l").st_nlink, os.lstat("l").st_ino == os.lstat("m").st_ino), ("f", 2, True))


@check
def many_names():
    wanted = [f"{number:04}-{'n' * (number % 50)}" for number in range(240)]
    for name in wanted:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    drop_caches()
    same(sorted(os.listdir(".")), wanted)
    same(len({entry.inode() for entry in os.scandir(".")}), 240, "inode numbers")
    with os.scandir(".") as entries:
        count = 0
        for entry in entries:
            os.unlink(entry.name)
            count += 1
    same((count, os.listdir(".")), (240, []), "removal while reading")


@check
def reading_of_a_folder_that_changes():
    """What stays is seen once each."""
    os.mkdir("d")
    stays = {f"stays{number:03}" for number in range(120)}
    for name in stays:
        put(f"d/{name}")
    seen = []
    with os.scandir("d") as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number < 120 and number % 4 == 0:
                put(f"d/new{number}")
                if number % 8 == 0:
                    os.unlink(f"d/new{number}")
    same(len(seen), len(set(seen)), "names seen twice")
    same(stays - set(seen), set(), "names not seen")
    same(len(os.listdir("d")), 120 + 15)


class Directory(ctypes.Structure):
    """struct dirent of <dirent.h> on 64-bit machines."""

    _fields_ = [  # noqa: RUF012
        ("d_ino", ctypes.c_uint64), ("d_off", ctypes.c_int64), ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte), ("d_name", ctypes.c_char * 256),
    ]  # fmt: skip


@check
def places_in_a_folder():
    """telldir, seekdir, rewinddir."""
    names = {f"{number:03}" for number in range(120)}
    for name in names:
        put(name)
    for function in (libc.opendir, libc.readdir):
        function.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    directory = ctypes.c_void_p(libc.opendir(b"."))
    places, read = [], []

    def next_name():
        address = libc.readdir(directory)
        return Directory.from_address(address).d_name.decode() if address else None

    while True:
        place = libc.telldir(directory)
        name = next_name()
        if name is None:
            break
        places.append(place)
        read.append(name)
    same(sorted(read), sorted(names | {".", ".."}))
    for index in (110, 3, 100, 0, 121):
        libc.seekdir(directory, ctypes.c_long(places[index]))
        same(next_name(), read[index], f"after seekdir to entry {index}")
    put("made later")
    libc.rewinddir(directory)
    again = []
    while name := next_name():
        again.append(name)
    same(set(again) - set(read), {"made later"}, "after rewinddir")
    libc.closedir(directory)


@check
def strange_names():
    names = [b"x" * 255, b"\xff\xfe\x80", "ü€".encode(), b" ", b"-rf", b"a\nb", b"...", b"\x7f\x01", b"a\\b", b"*"]
    os.mkdir(b"d")
    for name in names:
        put(b"d/" + name, name)
    drop_caches()
    same(sorted(os.listdir(b"d")), sorted(names))
    for name in names:
        same(get(b"d/" + name), name)
        os.rename(b"d/" + name, b"e")
        os.rename(b"e", b"d/" + name)
    put("A", b"upper")
    put("a", b"lower")
    same((get("A"), get("a")), (b"upper", b"lower"))


@check
def long_paths_and_links():
    os.symlink("z" * 4095, "long")
    drop_caches()
    same((len(os.readlink("long")), os.lstat("long").st_size), (4095, 4095))
    path = "deep"
    for _ in range(40):
        os.mkdir(path)
        path += "/" + "d" * 90
    os.mkdir(path)
    put(path + "/f", b"x")
    drop_caches()
    same(get(path + "/f"), b"x")
    os.symlink(path, "short")
    same(get("short/f"), b"x")
    shutil.rmtree("deep")


@check
def types_of_entries():
    put("file")
    os.mkdir("folder")
    os.symlink("x", "link")
    os.mkfifo("pipe")
    os.mknod("char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod("block", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    socket.socket(socket.AF_UNIX).bind("socket")
    drop_caches()
    fd = os.open(".", os.O_RDONLY)
    buffer = ctypes.create_string_buffer(PAGE)
    length = libc.syscall({"x86_64": 217, "aarch64": 61}[os.uname().machine], fd, buffer, PAGE)  # getdents64
    types, data = {}, buffer.raw[:length]
    while data:
        _, _, size, kind = struct.unpack_from("=QqHB", data)
        types[data[19:size].split(b"\0")[0].decode()] = kind
        data = data[size:]
    same(types, {name: stat.S_IFMT(os.lstat(name).st_mode) >> 12 for name in [".", "..", *os.listdir(".")]})
    same(types["socket"], 12)


@check
def a_folder_that_is_gone():
    os.mkdir("d")
    put("f")
    os.chdir("d")
    fd = os.open(".", os.O_RDONLY)
    os.rmdir("../d")
    refused(errno.ENOENT, os.getcwd)
    same(os.readlink("/proc/self/cwd").endswith("/d (deleted)"), True)
    for function in (lambda: put("x"), lambda: os.mkdir("x"), lambda: os.stat("x"), lambda: os.rename("/dev/fd", "x")):
        refused((errno.ENOENT, errno.EXDEV), function)
    refused(errno.ENOENT, os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    same(os.fstat(fd).st_nlink, 0)
    os.fchmod(fd, 0o711)
    same(mode_of("."), "0o711")


@check
def opening_of_a_folder_that_is_gone():
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    same(os.listdir("."), [])
    os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY))


@check
def a_folder_by_its_descriptor():
    os.makedirs("d/sub")
    fd = os.open("d", os.O_RDONLY)
    os.rename("d", "e")
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.symlink("f", "l", dir_fd=fd)
    os.link("f", "g", src_dir_fd=fd, dst_dir_fd=fd)
    os.rename("g", "h", src_dir_fd=fd, dst_dir_fd=fd)
    same(sorted(os.listdir(fd)), ["f", "h", "l", "sub"])
    same(sorted(os.listdir("e")), ["f", "h", "l", "sub"])
    os.unlink("f", dir_fd=fd)
    os.rmdir("sub", dir_fd=fd)
    os.fsync(fd)
    same(os.readlink("l", dir_fd=fd), "f")


@check
def nameless_files():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"content")
    same((os.fstat(fd).st_nlink, os.listdir(".")), (0, []))
    link_descriptor(fd, "named")
    same((get("named"), os.fstat(fd).st_nlink, mode_of("named")), (b"content", 1, "0o640"))
    os.pwrite(fd, b"C", 0)
    same(get("named"), b"Content")
    system("linkat", fd, "", AT_FDCWD, "again", AT_EMPTY_PATH)
    same(os.stat("named").st_nlink, 2)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    refused(errno.ENOENT, link_descriptor, fd, "never")


@check
def pipes_and_sockets():
    os.mkfifo("pipe", 0o604)
    writer = Other(put, "pipe", b"through")
    same(get("pipe"), b"through")
    writer.join()
    refused(errno.ENXIO, os.open, "pipe", os.O_WRONLY | os.O_NONBLOCK)
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.listen()

    def client(path):
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(path)
            end.send(b"hi")

    os.link("socket", "same")
    os.rename("socket", "moved")
    for path in ("moved", "same"):
        other = Other(client, path)
        same(server.accept()[0].recv(5), b"hi")
        other.join()
    refused(errno.ENXIO, os.open, "moved", os.O_RDWR)
    refused(errno.EADDRINUSE, socket.socket(socket.AF_UNIX).bind, "moved")
    put("file")
    refused(errno.ECONNREFUSED, client, "file")
    os.chmod("moved", 0o600)
    user(lambda: refused(errno.EACCES, client, "moved"))


@check
def device_nodes():
    os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod("block", 0o600 | stat.S_IFBLK, os.makedev(259, 70000))
    os.mknod("whiteout", 0o600 | stat.S_IFCHR, 0)
    drop_caches()
    same([os.stat(name).st_rdev for name in ("null", "block", "whiteout")], [259, os.makedev(259, 70000), 0])
    put("null", b"x")
    same(get("null"), b"")
    os.mknod("file", 0o640)
    same((oct(os.stat("file").st_mode), get("file")), ("0o100640", b""))


@check
def file_handles():
    """name_to_handle_at and open_by_handle_at, as servers of files and watchers of whole file systems use them."""
    put("f", b"content")
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount_id = ctypes.c_int()
    result = libc.name_to_handle_at(AT_FDCWD, b"f", handle, ctypes.byref(mount_id), 0)
    same(result, 0, f"name_to_handle_at: {os.strerror(ctypes.get_errno())}")
    os.rename("f", "g")
    drop_caches()
    fd = libc.open_by_handle_at(os.open(".", os.O_RDONLY), handle, os.O_RDONLY)
    same(fd >= 0, True, f"open_by_handle_at: {os.strerror(ctypes.get_errno())}")
    same(os.read(fd, 100), b"content")


@check
def inode_flags():
    """chattr +i and +a."""
    get_flags, set_flags, append, immutable = 0x80086601, 0x40086602, 0x20, 0x10
    put("f", b"x")
    fd = os.open("f", os.O_RDONLY)
    (before,) = struct.unpack_from("I", fcntl.ioctl(fd, get_flags, bytes(8)))
    for flag in (append, immutable):
        fcntl.ioctl(fd, set_flags, struct.pack("Q", before | flag))
        try:
            refused(errno.EPERM, put, "f")
            refused(errno.EPERM, os.unlink, "f")
        finally:
            fcntl.ioctl(fd, set_flags, struct.pack("Q", before))
    put("f", b"y")


# ---- content


class Model:
    """A file and what must be in it: random operations on both, and comparisons."""

    most = 100 * PAGE  # bytes

    def __init__(self, seed):
        self.random, self.seed, self.content, self.step = random.Random(seed), seed, bytearray(), 0
        self.fd = os.open("f", os.O_RDWR | os.O_CREAT)

    def run(self, steps):
        names = sorted(name for name in dir(self) if name.startswith("do_"))
        for self.step in range(steps):
            name = self.random.choice(names)
            self.offset = self.random.randrange(self.most)
            self.length = min(self.random.choice((1, 100, PAGE, 60000)), self.most - self.offset)
            if self.random.random() < 0.3:
                self.offset, self.length = self.offset & -PAGE, self.length & -PAGE or 1
            if os.environ.get("TRACE"):
                print(self.step, name, self.offset, self.length, len(self.content), flush=True)
            try:
                getattr(self, name)()
                same(os.fstat(self.fd).st_size, len(self.content), "size")
            except (AssertionError, OSError, ValueError) as error:
                where = f"seed {self.seed}, step {self.step}, {name[3:]} at {self.offset}, {self.length} bytes"
                raise AssertionError(f"{error}; {where}, of {len(self.content)}") from error
        drop_caches()
        self.compare(get("f"), 0, self.most, "at the end")

    def compare(self, got, offset, length, what):
        wanted = bytes(self.content[offset : offset + length])
        if got != wanted:
            bad = [index for index, (one, two) in enumerate(zip(got, wanted)) if one != two]
            zeros = " all NUL" if bad and not any(got[index] for index in bad) else ""
            place = f"{len(bad)} bytes{zeros} from {offset + bad[0]} to {offset + bad[-1]}" if bad else "none"
            raise AssertionError(f"{what}: {len(got)} bytes, not {len(wanted)}; wrong: {place}; seed {self.seed}")

    def change(self, data, offset):
        self.grow(offset)
        self.content[offset : offset + len(data)] = data

    def grow(self, size):
        self.content.extend(bytes(max(0, size - len(self.content))))

    def do_write(self):
        data = self.random.randbytes(self.length)
        same(os.pwrite(self.fd, data, self.offset), len(data), "written")
        self.change(data, self.offset)

    do_write_again = do_write

    def do_write_directly(self):
        offset, length = self.offset & -PAGE, max(PAGE, self.length & -PAGE)
        with mmap.mmap(-1, length) as memory:
            memory[:] = self.random.randbytes(length)
            fd = os.open("f", os.O_WRONLY | os.O_DIRECT)
            same(os.pwritev(fd, [memory], offset), length, "written")
            os.close(fd)
            self.change(memory[:], offset)

    def do_read_directly(self):
        offset, length = self.offset & -PAGE, max(PAGE, self.length & -PAGE)
        with mmap.mmap(-1, length) as memory:
            fd = os.open("f", os.O_RDONLY | os.O_DIRECT)
            count = os.preadv(fd, [memory], offset)
            os.close(fd)
            self.compare(memory[:count], offset, length, "read directly")

    def do_append(self):
        if len(self.content) + self.length <= self.most:
            data = self.random.randbytes(self.length)
            fd = os.open("f", os.O_WRONLY | os.O_APPEND)
            same(os.pwrite(fd, data, 3), len(data), "written")  # pwrite(2): the offset does not count
            os.close(fd)
            self.content.extend(data)

    def do_read(self):
        self.compare(os.pread(self.fd, self.length, self.offset), self.offset, self.length, "read")

    do_read_again = do_read

    def do_truncate(self):
        size = self.random.choice((self.offset, len(self.content) // 2, len(self.content) & -PAGE))
        (os.truncate if size % 2 else lambda _, size: os.ftruncate(self.fd, size))("f", size)
        del self.content[size:]
        self.grow(size)

    def do_map_and_write(self):
        if self.content:
            with mmap.mmap(self.fd, len(self.content)) as memory:
                offset = self.offset % len(self.content)
                data = self.random.randbytes(min(self.length, len(self.content) - offset))
                memory[offset : offset + len(data)] = data
                self.change(data, offset)
                if self.step % 2:
                    memory.flush()

    def do_map_and_read(self):
        if self.content:
            with mmap.mmap(self.fd, len(self.content), prot=mmap.PROT_READ) as memory:
                self.compare(memory[self.offset : self.offset + self.length], self.offset, self.length, "mapped")

    def do_punch(self):
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, self.offset, self.length)
        end = min(len(self.content), self.offset + self.length)
        self.change(bytes(max(0, end - self.offset)), min(self.offset, len(self.content)))

    def do_zero(self):
        fallocate(self.fd, ZERO_RANGE, self.offset, self.length)
        self.change(bytes(self.length), self.offset)

    def do_allocate(self):
        fallocate(self.fd, 0, self.offset, self.length)
        self.grow(self.offset + self.length)

    def do_copy(self):
        """From one place of the file to another, which do not overlap."""
        source, target = self.offset, self.random.randrange(self.most)
        length = min(self.length, abs(source - target), self.most - target, len(self.content) - source)
        if length > 0:
            data = bytes(self.content[source : source + length])
            done = 0
            while done < length:
                count = os.copy_file_range(self.fd, self.fd, length - done, source + done, target + done)
                assert count, f"copy_file_range: 0 after {done} of {length} bytes to {target}"
                done += count
            self.change(data, target)

    def do_reopen(self):
        os.close(self.fd)
        self.fd = os.open("f", os.O_RDWR)

    def do_sync(self):
        os.fsync(self.fd)

    def do_drop(self):
        if self.step % 3 == 0:
            drop_caches()

    def do_advise(self):
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def do_look(self):
        same(os.stat("f").st_size, len(self.content), "stat")

    def do_send(self):
        size = len(self.content)
        with open("sent", "w+b", 0) as file:
            done = 0
            while done < size:
                done += os.sendfile(file.fileno(), self.fd, done, size - done)
            self.compare(get("sent"), 0, size, "sent")


@check
def random_operations():
    Model(SEED).run(int(os.environ.get("STEPS", "150")))


@check
def random_operations_of_two_names():
    """The second file is the first one by another name, with descriptors of its own."""
    model = Model(SEED + 1)
    os.link("f", "g")
    others = itertools.cycle([model.fd, os.open("g", os.O_RDWR)])
    model.do_reopen = lambda: setattr(model, "fd", next(others))
    model.do_sync = lambda: model.compare(get("g"), 0, model.most, "by the other name")
    model.run(60)


@check
def appending_by_two():
    put("f")

    def append(letter):
        fd = os.open("f", os.O_WRONLY | os.O_APPEND)
        for _ in range(100):
            os.write(fd, letter * 60 + b"\n")

    for other in [Other(append, letter) for letter in (b"a", b"b")]:
        other.join()
    drop_caches()
    lines = get("f").splitlines()
    same((len(lines), set(lines)), (200, {b"a" * 60, b"b" * 60}))


@check
def appending_behind_what_was_just_written():
    """By another descriptor, which is not open to append."""
    wanted = (b"1" * PAGE + b"x" * PAGE) * 3
    one = os.open("f", os.O_RDWR | os.O_CREAT)
    two = os.open("f", os.O_WRONLY | os.O_APPEND)
    for _ in range(3):
        os.pwrite(one, b"1" * PAGE, os.fstat(one).st_size)
        os.write(two, b"x" * PAGE)
    same(get("f"), wanted)
    drop_caches()
    same(get("f"), wanted, "without caches")


@check
def appending_since_a_moment_ago():
    """By a descriptor that was not opened for it, behind what it has just written."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a" * 3 * PAGE)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_DIRECT)
    with mmap.mmap(-1, PAGE) as page:
        page[:] = b"b" * PAGE
        same(os.write(fd, page), PAGE)
    drop_caches()
    same(get("f") == b"a" * 3 * PAGE + b"b" * PAGE, True, "the content")


@check
def reading_past_the_cache_before_what_was_just_written():
    """What is not sent yet has moved the file's end."""
    writer, reader = os.open("f", os.O_RDWR | os.O_CREAT), os.open("f", os.O_RDWR | os.O_APPEND)
    os.pwrite(writer, b"x", 100_000)
    same(os.pread(reader, 10, 0), bytes(10))


@check
def reading_past_the_cache_into_a_file_that_is_written():
    """What is read lands in pages of another file, which wait for what is sent meanwhile."""
    size = 4 << 20  # more pieces than are on their way at once
    put("f", b"x" * size)
    put("g", bytes(size))
    source, target = os.open("f", os.O_RDONLY | os.O_DIRECT), os.open("g", os.O_RDWR)
    end = time.monotonic() + 5

    def repeat(work):
        while time.monotonic() < end:
            work()

    def write():
        for number in range(0, size, 16 * PAGE):
            os.pwrite(target, b"y" * PAGE, number)
        system("sync_file_range", target, 0, 0, SYNC_FILE_RANGE_WRITE)

    with mmap.mmap(target, size) as memory:
        others = Other(repeat, write), Other(repeat, lambda: os.fsync(target))
        repeat(lambda: same(os.preadv(source, [memory], 0), size))
        for other in others:
            other.join()


@check
def the_size_while_it_is_sent():
    """The kernel sends what was written, by its own clock, while others look: nobody sees the size of before."""
    fd, (end, of_others) = os.open("f", os.O_RDWR | os.O_CREAT), os.pipe()

    def look():
        os.close(of_others)
        found, last = ctypes.create_string_buffer(256), 0
        while not select.select([end], [], [], 0)[0]:
            system("statx", fd, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_SIZE, ctypes.addressof(found))
            size = int.from_bytes(found[40:48], sys.byteorder)
            same(size >= last, True, f"{size} bytes after {last}")
            last = size

    others = [Other(look) for _ in range(2)]
    with flusher_at_work():
        for _ in range(400):
            os.write(fd, b"x" * 100)
            time.sleep(0.02)
    os.close(of_others)
    for other in others:
        other.join()


@check
def exclusive_creation_by_two():
    def create(name):
        made = 0
        for number in range(50):
            try:
                os.close(os.open(f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                made += 1
            except FileExistsError:
                pass
        put(name, b"%d" % made)

    for other in [Other(create, name) for name in ("one", "two")]:
        other.join()
    same(int(get("one")) + int(get("two")), 50, "files made")


@check
def renaming_beside_reading():
    """Whoever opens the name finds one of the two, whole."""
    contents = (b"a" * 5000, b"b" * 9000)
    put("f", contents[0])

    def replace():
        for number in range(40):
            put("new", contents[number % 2])
            os.rename("new", "f")

    other = Other(replace)
    while not select.select([other.why], [], [], 0)[0]:  # it has not ended
        content = get("f")
        same(content in contents, True, f"{len(content)} bytes")
    other.join()


@check
def mappings_are_shared():
    """By two processes, and with what write(2) does."""
    with open("f", "wb", 0) as file:
        file.truncate(4 * PAGE)
    ours, theirs = os.pipe(), os.pipe()

    def child():
        fd = os.open("f", os.O_RDWR)
        with mmap.mmap(fd, 4 * PAGE) as memory:
            memory[5000:5005] = b"child"
            os.write(theirs[1], b"x")
            os.read(ours[0], 1)
            same(memory[9000:9006], b"parent")

    fd = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 4 * PAGE) as memory:
        other = Other(child)
        os.read(theirs[0], 1)
        same((memory[5000:5005], os.pread(fd, 5, 5000)), (b"child", b"child"))
        os.pwrite(fd, b"parent", 9000)
        same(memory[9000:9006], b"parent")
        os.write(ours[1], b"x")
        other.join()
    drop_caches()
    same(get("f")[5000:5005] + get("f")[9000:9006], b"childparent")


@check
def private_mappings():
    put("f", b"content" + bytes(PAGE))
    fd = os.open("f", os.O_RDONLY)
    with mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        memory[:3] = b"CON"
        same((memory[:7], os.pread(fd, 7, 0)), (b"CONtent", b"content"))
    refused(errno.EACCES, mmap.mmap, fd, PAGE)


@check
def the_end_of_a_mapping():
    """Behind the file's end is SIGBUS; behind its last byte are zeros that are not kept."""
    put("f", b"x" * 100)
    fd = os.open("f", os.O_RDWR)

    def beyond(size):
        with mmap.mmap(fd, 0) as memory:
            os.ftruncate(fd, size)
            memory[PAGE]

    os.ftruncate(fd, 3 * PAGE)
    other = Other(beyond, 100)
    same(os.waitstatus_to_exitcode(os.waitpid(other.pid, 0)[1]), -signal.SIGBUS)
    with mmap.mmap(fd, 100) as memory:
        same(memory[:], b"x" * 100)
    address = libc.mmap
    address.restype = ctypes.c_void_p
    place = address(None, PAGE, 3, mmap.MAP_SHARED, fd, 0)
    ctypes.memmove(place + 100, b"lost", 4)
    os.fsync(fd)
    os.ftruncate(fd, 200)
    same(os.pread(fd, 200, 0), b"x" * 100 + bytes(100))


@check
def vectors_and_offsets():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    pieces = [bytes([number]) * (number * 37) for number in range(200)]
    wanted = b"".join(pieces)
    same(os.writev(fd, pieces), len(wanted))
    os.lseek(fd, 0, os.SEEK_SET)
    buffers = [bytearray(len(piece)) for piece in pieces]
    same((os.readv(fd, buffers), b"".join(buffers) == wanted), (len(wanted), True))
    os.lseek(fd, 10, os.SEEK_SET)
    Other(os.read, fd, 20).join()
    same(os.lseek(fd, 0, os.SEEK_CUR), 30, "an offset that two processes share")
    same((os.lseek(fd, -5, os.SEEK_END), os.read(fd, 100)), (len(wanted) - 5, wanted[-5:]))


@check
def large_pieces():
    content = os.urandom(3_000_001)
    put("f", content)
    same(get("f") == content, True, "cached")
    drop_caches()
    fd = os.open("f", os.O_RDONLY)
    same(b"".join(iter(lambda: os.read(fd, 777_777), b"")) == content, True, "in large pieces")
    same(os.pread(fd, 3_000_000, 1) == content[1:], True, "in one piece")


@check
def splicing_and_copying():
    content = os.urandom(150_000)
    put("f", content)
    source, target = os.open("f", os.O_RDONLY), os.open("g", os.O_RDWR | os.O_CREAT)
    reader, writer = os.pipe()
    done = 0
    while count := os.splice(source, writer, 60000):
        while count:
            moved = os.splice(reader, target, count)
            count -= moved
            done += moved
    same((done, get("g") == content), (150_000, True), "splice")
    os.ftruncate(target, 0)
    done = 0
    while done < 150_000:
        done += os.copy_file_range(source, target, 150_000 - done, done, done)
    same((os.copy_file_range(source, target, 10, 150_000, 0), get("g") == content), (0, True), "copy_file_range")
    refused(errno.EINVAL, os.copy_file_range, target, target, 1000, 0, 10)
    ours, theirs = socket.socketpair()
    same(os.sendfile(ours.fileno(), source, 5, 1000), 1000)
    same(theirs.recv(2000), content[5:1005], "sendfile to a socket")


@check
def synchronisation():
    os.mkdir("d")
    put("d/f", b"x")
    for path in ("d", "d/f"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.fdatasync(fd)
        system("syncfs", fd)
    fd = os.open("d/f", os.O_WRONLY | os.O_DSYNC)
    os.write(fd, b"y")
    system("sync_file_range", fd, 0, 0, 7)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    system("readahead", os.open("d/f", os.O_RDONLY), 0, PAGE)


# ---- locks


def lock_with(kind, fd, how, wait=False):
    """Take or give back a lock on the whole file; how: LOCK_SH, LOCK_EX or LOCK_UN."""
    if kind != "ofd":
        getattr(fcntl, kind)(fd, how | (0 if wait or how == fcntl.LOCK_UN else fcntl.LOCK_NB))
        return
    type_ = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}[how]
    fcntl.fcntl(fd, F_OFD_SETLKW if wait else F_OFD_SETLK, struct.pack("hhqqi4x", type_, 0, 0, 0, 0))


def locks_of(kind):
    """Two processes, of which one holds it, and the other one tries and then waits."""
    put("f")
    fd = os.open("f", os.O_RDWR)
    reader, writer = os.pipe()

    def child():
        os.close(fd)
        own = os.open("f", os.O_RDWR)
        for how in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            refused((errno.EAGAIN, errno.EACCES), lock_with, kind, own, how)
        os.write(writer, b"x")
        lock_with(kind, own, fcntl.LOCK_EX, True)
        same(os.pread(own, 5, 0), b"first")
        lock_with(kind, own, fcntl.LOCK_SH)
        os.write(writer, b"x")

    lock_with(kind, fd, fcntl.LOCK_EX)
    other = Other(child)
    os.read(reader, 1)
    os.pwrite(fd, b"first", 0)
    lock_with(kind, fd, fcntl.LOCK_UN)
    os.read(reader, 1)
    lock_with(kind, fd, fcntl.LOCK_SH, True)
    other.join()
    lock_with(kind, fd, fcntl.LOCK_EX)  # the other one's has ended with its process


for _kind in ("flock", "lockf", "ofd"):
    CHECKS[f"locks_by_{_kind}"] = functools.partial(locks_of, _kind)


@check
def locks_of_ranges():
    put("f", b"x" * 100)
    fd = os.open("f", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 20)

    def child():
        own = os.open("f", os.O_RDWR)
        fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)
        fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 30)
        refused(errno.EAGAIN, fcntl.lockf, own, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 29)
        found = fcntl.fcntl(own, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        same(struct.unpack("hhqqi4x", found), (fcntl.F_WRLCK, 0, 20, 10, os.getppid()), "F_GETLK")

    Other(child).join()
    os.close(os.open("f", os.O_RDONLY))  # with any descriptor of it the process's locks go
    Other(lambda: fcntl.lockf(os.open("f", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)).join()


@check
def locks_of_one_process():
    put("f")
    one, two = os.open("f", os.O_RDWR), os.open("f", os.O_RDWR)
    for kind in ("flock", "ofd"):
        lock_with(kind, one, fcntl.LOCK_SH)
        lock_with(kind, two, fcntl.LOCK_SH)
        refused(errno.EAGAIN, lock_with, kind, one, fcntl.LOCK_EX)
        lock_with(kind, two, fcntl.LOCK_UN)
        lock_with(kind, one, fcntl.LOCK_EX)
        lock_with(kind, one, fcntl.LOCK_UN)
    os.unlink("f")
    lock_with("lockf", one, fcntl.LOCK_EX)
    lock_with("flock", one, fcntl.LOCK_EX)
    refused(errno.EAGAIN, lock_with, "flock", two, fcntl.LOCK_EX)


@check
def a_deadlock_of_locks():
    put("f")
    fd = os.open("f", os.O_RDWR)
    reader, writer = os.pipe()

    def child():
        own = os.open("f", os.O_RDWR)
        fcntl.lockf(own, fcntl.LOCK_EX, 1, 1)
        os.write(writer, b"x")
        fcntl.lockf(own, fcntl.LOCK_EX, 1, 0)  # waits for the parent

    fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
    other = Other(child)
    os.read(reader, 1)
    deadline = time.monotonic() + 20
    while b"->" not in get("/proc/locks") and time.monotonic() < deadline:
        time.sleep(0.01)
    refused(errno.EDEADLK, fcntl.lockf, fd, fcntl.LOCK_EX, 1, 1)
    fcntl.lockf(fd, fcntl.LOCK_UN)
    other.join()


# ---- mounts upon it


def own_mounts():
    system("unshare", CLONE_NEWNS)
    system("mount", "none", "/", "none", MS_REC | MS_PRIVATE, 0)


@check
def a_root_below_it():
    os.mkdir("root")
    put("root/f", b"inside")
    os.symlink("/f", "root/l")

    def child():
        os.chroot("root")
        os.chdir("/")
        same((get("/f"), get("/l"), get("/../f"), os.getcwd()), (b"inside", b"inside", b"inside", "/"))

    Other(child).join()


@check
def bind_mounts_of_it():
    for name in ("a", "b"):
        os.mkdir(name)
    put("a/f", b"x")
    put("file", b"covered")

    def child():
        own_mounts()
        system("mount", "a", "b", "none", MS_BIND, 0)
        system("mount", "a/f", "file", "none", MS_BIND, 0)
        same((get("b/f"), get("file")), (b"x", b"x"))
        put("a/f", b"changed")
        same((get("b/f"), get("file")), (b"changed", b"changed"))
        refused(errno.EXDEV, os.rename, "a/f", "b/g")
        refused(errno.EXDEV, os.link, "a/f", "b/g")
        for path, function in {"file": os.unlink, "b": os.rmdir}.items():
            refused(errno.EBUSY, function, path)
        system("mount", "none", "b", "none", MS_REMOUNT | MS_BIND | MS_RDONLY, 0)
        refused(errno.EROFS, put, "b/f")
        refused(errno.EROFS, os.chmod, "b/f", 0o600)
        refused(errno.EROFS, os.mkdir, "b/d")

    Other(child).join()
    same(get("file"), b"covered")


def overlay():
    """Mount one on `merged`, with `lower` below and `upper` for what is written."""
    own_mounts()
    here = os.getcwd()
    options = f"lowerdir={here}/lower,upperdir={here}/upper,workdir={here}/work"
    system("mount", "overlay", "merged", "overlay", 0, options)


def use_overlay():
    overlay()
    same(sorted(os.listdir("merged")), ["d", "f", "g"])
    with open("merged/f", "ab", 0) as file:
        file.write(b" and more")
    os.unlink("merged/g")
    shutil.rmtree("merged/d")
    os.mkdir("merged/d")
    put("merged/d/new", b"new")
    os.rename("merged/f", "merged/h")
    os.mkdir("merged/e")
    os.rename("merged/e", "merged/i")
    os.link("merged/h", "merged/j")
    with tempfile.TemporaryFile(dir="merged") as file:
        file.write(b"x")
    same(get("merged/h"), b"content and more")
    same((sorted(os.listdir("merged")), os.listdir("merged/d")), (["d", "h", "i", "j"], ["new"]))


@check
def an_overlay_upon_it():
    for name in ("lower", "lower/d", "upper", "work", "merged"):
        os.mkdir(name)
    for name in ("f", "g", "d/in"):
        put(f"lower/{name}", b"content")
    Other(use_overlay).join()
    same(sorted(os.listdir("upper")), ["d", "f", "g", "h", "i", "j"])
    same((stat.S_ISCHR(os.stat("upper/g").st_mode), os.stat("upper/g").st_rdev), (True, 0), "a whiteout")
    same((get("lower/f"), get("upper/h"), get("lower/d/in")), (b"content", b"content and more", b"content"))

    def again():
        overlay()
        same((sorted(os.listdir("merged")), os.listdir("merged/d")), (["d", "h", "i", "j"], ["new"]))

    Other(again).join()


# ---- the whole


def run(name, folder):
    """Run a check in a new folder; return why it has failed, None if it has not."""

    def work():
        os.setsid()
        os.chdir(folder)
        os.umask(0o022)
        CHECKS[name]()

    os.mkdir(folder)
    other = Other(work)
    if not select.select([other.why], [], [], TIME_LIMIT)[0]:
        os.killpg(other.pid, signal.SIGKILL)
        os.waitpid(other.pid, 0)
        return f"it has not ended after {TIME_LIMIT} s"
    try:
        other.join()
    except AssertionError as error:
        return str(error)
    finally:
        try:
            os.killpg(other.pid, signal.SIGKILL)  # what it has left
        except ProcessLookupError:
            pass
    return None


def main():
    base, *names = sys.argv[1:]
    os.makedirs(base, exist_ok=True)
    os.chmod(base, 0o755)
    seconds = {}
    for name in names or CHECKS:
        began = time.monotonic()
        folder = os.path.join(base, name)
        failure = run(name, folder)
        print(f"FAIL {name}: {failure}" if failure else f"ok {name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        seconds[name] = time.monotonic() - began
    slowest = sorted(seconds, key=seconds.get)[-8:]
    text = ", ".join(f"{name} {seconds[name]:.1f} s" for name in reversed(slowest))
    print(f"# seed {SEED}; {sum(seconds.values()):.1f} s, of them {text}", flush=True)


main()
