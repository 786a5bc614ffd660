# SPDX-License-Identifier: Apache-2.0
"""The file server's protocols: FUSE for this machine's own kernel, and both with what a hostile guest may say."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import pathlib
import random
import resource
import signal
import stat
import struct
import tempfile
import threading
import time
import types

import conftest
import pytest
import served

import runx

CAPABILITIES = 0xA80425FB  # Docker's: without CAP_NET_ADMIN and CAP_SYS_ADMIN
CAP_NET_ADMIN = 1 << 12
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = -100, 1, 2, 4
AT_STATX_FORCE_SYNC, AT_SYMLINK_FOLLOW, FALLOC_PUNCH_HOLE = 0x2000, 0x400, 3
NO_FUSE = "" if os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK) else "needs root and /dev/fuse"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def our_umask():
    """The protocols set the process's; it is this test's alone."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def call(name, *args):
    """A function of the C library that Python has not."""
    if getattr(LIBC, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def refused(number):
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


@contextlib.contextmanager
def opened(path, flags, mode=0o644):
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def as_user(uid, gid):
    """This thread's ids for files; its capabilities for files go with them."""
    LIBC.setfsgid(gid)
    LIBC.setfsuid(uid)
    try:
        yield
    finally:
        LIBC.setfsuid(0)
        LIBC.setfsgid(0)


def rename(old, new, flags):
    call("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def refresh(path):
    """Have the guest's kernel ask for a file's attributes, whatever it still knows."""
    call("statx", AT_FDCWD, os.fsencode(path), AT_STATX_FORCE_SYNC, 0x7FF, ctypes.create_string_buffer(256))


@pytest.fixture(scope="module")
def mounts():
    """{writeback: the Mounted}, in a mount namespace of this process's own."""
    if NO_FUSE:
        pytest.skip(NO_FUSE)
    runx.own_mounts()
    with contextlib.ExitStack() as stack:
        found = {}
        for writeback in (False, True):
            folders = [pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
            for folder in folders:
                folder.chmod(0o755)  # pytest's own are not for other users
            found[writeback] = stack.enter_context(served.mounted(*folders, CAPABILITIES, writeback))
        yield found


def own_folder(mount, request):
    name = request.node.name.partition("[")[0][:200]
    (mount.host / name).mkdir()
    return served.Mounted(mount.host / name, mount.guest / name, mount.counts)


@pytest.fixture(params=[False, True], ids=["through", "back"])
def share(mounts, request):
    """A folder of the test's own in a share, with both ways of writing."""
    return own_folder(mounts[request.param], request)


@pytest.fixture
def shared(mounts, request):
    """One in which dom0 writes too.  Unless patched, Linux does not look at that when it keeps what is written."""
    return own_folder(mounts[False], request)


# ---- names


def test_a_tree_is_seen_as_it_is(share):
    (share.host / "folder").mkdir(mode=0o750)
    (share.host / "folder/file").write_text("content")
    os.symlink("folder/file", share.host / "link")
    os.mkfifo(share.host / "fifo", 0o640)
    assert sorted(os.listdir(share.guest)) == ["fifo", "folder", "link"]
    assert os.readlink(share.guest / "link") == "folder/file"
    assert (share.guest / "link").read_text() == "content"
    fields = "st_mode st_ino st_nlink st_uid st_gid st_size st_mtime_ns st_ctime_ns st_blocks".split()
    for name in ("folder", "folder/file", "link", "fifo", ""):
        here, there = os.lstat(share.guest / name), os.lstat(share.host / name)
        assert [getattr(here, each) for each in fields] == [getattr(there, each) for each in fields], name


def test_a_large_folder_is_listed_whole_and_once(share):
    names = {f"{number}" + "x" * (number % 200) for number in range(1500)}
    for name in names:
        (share.host / name).touch()
    found = [entry.name for entry in os.scandir(share.guest)]
    assert len(found) == 1500 and set(found) == names
    assert {entry.name for entry in os.scandir(share.guest) if entry.stat().st_size == 0} == names  # readdirplus


def test_a_folder_is_read_on_from_any_place(share):
    for number in range(500):
        (share.host / f"file{number}").touch()
    LIBC.opendir.restype = LIBC.readdir.restype = ctypes.c_void_p
    LIBC.telldir.restype = ctypes.c_long
    folder = ctypes.c_void_p(LIBC.opendir(os.fsencode(share.guest)))

    def names(count):
        return [ctypes.string_at(LIBC.readdir(folder) + 19) for _ in range(count)]

    try:
        names(300)
        place = LIBC.telldir(folder)
        following = names(150)
        LIBC.seekdir(folder, ctypes.c_long(place))
        assert names(150) == following
    finally:
        LIBC.closedir(folder)


def test_names_are_made_renamed_and_removed(share):
    os.mkdir(share.guest / "a")
    (share.guest / "a/file").write_text("1")
    os.rename(share.guest / "a/file", share.guest / "other")
    os.link(share.guest / "other", share.guest / "a/second")
    assert os.stat(share.host / "a/second").st_nlink == os.stat(share.guest / "other").st_nlink == 2
    with refused(errno.ENOTEMPTY):
        os.rmdir(share.guest / "a")
    with refused(errno.EISDIR):
        os.unlink(share.guest / "a")
    os.unlink(share.guest / "a/second")
    os.rmdir(share.guest / "a")
    assert os.listdir(share.host) == ["other"]


def test_a_rename_refuses_exchanges_or_leaves_a_whiteout(share):
    for name in ("a", "b"):
        (share.host / name).write_text(name)
    with refused(errno.EEXIST):
        rename(share.guest / "a", share.guest / "b", RENAME_NOREPLACE)
    rename(share.guest / "a", share.guest / "b", RENAME_EXCHANGE)
    assert (share.guest / "a").read_text() == "b" and (share.host / "b").read_text() == "a"
    rename(share.guest / "a", share.guest / "b", RENAME_WHITEOUT)
    assert stat.S_ISCHR(os.lstat(share.host / "a").st_mode)


def test_a_rename_that_dom0_cannot_do_is_none(guest, tmp_path):
    """Where runX does not know the system call's number."""
    guest.fuse.files.sys_renameat2 = 0
    head = struct.pack("<QII", 1, RENAME_NOREPLACE, 0)
    assert guest.request("rename2", 1, head + b"file\0new\0") == (errno.EINVAL, b"")
    assert (tmp_path / "share/file").exists()


def test_special_files_are_made_and_work(share):
    os.mknod(share.guest / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(share.guest / "large", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    assert os.lstat(share.host / "null").st_rdev == os.lstat(share.guest / "null").st_rdev == os.makedev(1, 3)
    assert os.lstat(share.host / "large").st_rdev == os.lstat(share.guest / "large").st_rdev == os.makedev(259, 70000)
    os.mkfifo(share.guest / "fifo")
    with opened(share.guest / "fifo", os.O_RDWR) as fifo:
        os.write(fifo, b"through the kernel")
        assert os.read(fifo, 100) == b"through the kernel"


# ---- open files


def test_an_unlinked_open_file_is_still_a_file(share):
    path = share.guest / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"0123456789")
        os.unlink(path)
        os.ftruncate(fd, 4)
        os.fchmod(fd, 0o601)
        os.fchown(fd, 7, 8)
        os.utime(fd, ns=(5, 6))
        status = os.fstat(fd)
        assert (status.st_size, status.st_mode & 0o777, status.st_uid, status.st_gid) == (4, 0o601, 7, 8)
        assert (status.st_mtime_ns, status.st_nlink) == (6, 0)
        with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as again:
            assert os.read(again, 100) == b"0123"


def test_what_is_done_to_an_open_file_never_hits_the_one_that_took_its_name(share):
    path = share.guest / "file"
    path.write_text("old")
    with opened(path, os.O_RDWR) as fd:
        (share.guest / "new").write_text("new content")
        os.chmod(share.guest / "new", 0o600)
        os.rename(share.guest / "new", path)
        os.ftruncate(fd, 0)
        os.fchmod(fd, 0o666)
        os.fchown(fd, 1000, 1000)
    assert path.read_text() == "new content"
    status = os.stat(share.host / "file")
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, 0)


def test_an_open_file_keeps_its_content_when_dom0_replaces_it(share):
    (share.host / "file").write_bytes(b"a" * 10000)
    with opened(share.guest / "file", os.O_RDONLY) as fd, mmap.mmap(fd, 10000, prot=mmap.PROT_READ) as memory:
        (share.host / "new").write_bytes(b"b" * 100)
        os.rename(share.host / "new", share.host / "file")
        assert os.pread(fd, 20000, 0) == b"a" * 10000 == memory[:]
        os.unlink(share.host / "file")
        assert memory[9999:] == b"a" and os.fstat(fd).st_size == 10000


def test_a_file_without_a_name_gets_one(share):
    with opened(share.guest, os.O_TMPFILE | os.O_RDWR) as fd:
        os.write(fd, b"content")
        name = os.fsencode(share.guest / "named")
        call("linkat", AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, name, AT_SYMLINK_FOLLOW)
    assert (share.host / "named").read_bytes() == b"content"


def test_appending_writes_at_the_end_whoever_wrote_before(share):
    path = share.guest / "log"
    path.write_text("one\n")
    with opened(path, os.O_WRONLY | os.O_APPEND) as first, opened(path, os.O_WRONLY | os.O_APPEND) as second:
        os.write(first, b"two\n")
        os.write(second, b"three\n")
        os.write(first, b"four\n")
    assert path.read_text() == "one\ntwo\nthree\nfour\n" == (share.host / "log").read_text()


def test_two_names_of_a_file_have_the_same_content_at_once(share):
    (share.guest / "a").write_text("old")
    os.link(share.guest / "a", share.guest / "b")
    with opened(share.guest / "a", os.O_RDWR) as a, opened(share.guest / "b", os.O_RDWR) as b:
        os.pwrite(a, b"new", 0)
        assert os.pread(b, 10, 0) == b"new"


def test_a_shared_mapping_is_written(share):
    (share.guest / "file").write_bytes(bytes(8192))
    with opened(share.guest / "file", os.O_RDWR) as fd, mmap.mmap(fd, 8192) as memory:
        memory[4096:4100] = b"here"
        memory.flush()
    assert (share.host / "file").read_bytes()[4096:4100] == b"here"


def test_random_changes_of_a_file_are_those_of_a_model(share):
    """As fsx tries them."""
    model, number, path = bytearray(), random.Random(18), share.guest / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for step in range(500):
            at, size, what = number.randrange(40000), number.randrange(1, 20000), number.randrange(5)
            if what == 0:
                data = number.randbytes(size)
                os.pwrite(fd, data, at)
                model.extend(bytes(max(0, at - len(model))))
                model[at : at + size] = data
            elif what == 1:
                os.ftruncate(fd, at)
                del model[at:]
                model.extend(bytes(at - len(model)))
            elif what == 2:
                assert os.pread(fd, size, at) == model[at : at + size], step
            elif what == 3:
                call("fallocate", fd, FALLOC_PUNCH_HOLE, ctypes.c_long(at), ctypes.c_long(size))
                end = min(at + size, len(model))
                model[at:end] = bytes(max(0, end - at))
            else:
                os.fsync(fd)
            assert os.fstat(fd).st_size == len(model), step
    assert path.read_bytes() == model == (share.host / "file").read_bytes()


def test_space_is_reserved_and_holes_are_found(share):
    with opened(share.guest / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.posix_fallocate(fd, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000 and os.fstat(fd).st_blocks >= 100_000 // 512
        os.ftruncate(fd, 0)
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"data", 1 << 19)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 19
        assert os.lseek(fd, 1 << 19, os.SEEK_HOLE) == (1 << 19) + 4096
    assert os.stat(share.host / "file").st_blocks < 64


def test_a_range_is_copied_by_dom0(share):
    (share.host / "a").write_bytes(os.urandom(100_000))
    before = share.asked("read")
    with opened(share.guest / "a", os.O_RDONLY) as a, opened(share.guest / "b", os.O_RDWR | os.O_CREAT) as b:
        assert os.copy_file_range(a, b, 100_000) == 100_000
    assert share.asked("read") == before
    assert (share.guest / "b").read_bytes() == (share.host / "a").read_bytes()


def test_pages_for_which_the_disk_has_no_room_to_the_last_one_are_not_written(mounts, request):
    share = own_folder(mounts[True], request)
    runx.mount("tmpfs", str(share.host), 0, "tmpfs", "size=1m")
    try:
        (share.host / "filled").write_bytes(bytes((1 << 20) - 5 * 4096))
        with opened(share.guest / "file", os.O_WRONLY | os.O_CREAT) as fd:
            os.write(fd, bytes(25 * 4096))  # one request
            with refused(errno.ENOSPC):
                os.fsync(fd)
        assert os.stat(share.host / "file").st_size == 5 * 4096
    finally:
        runx.detach(str(share.host))


# ---- what is kept, and what dom0 changes


def test_what_was_read_is_not_read_again(share):
    (share.host / "file").write_bytes(b"x" * 8192)
    changed = os.stat(share.host / "file").st_ctime_ns
    conftest.wait_until(lambda: time.time_ns() - changed > runx.SETTLED, "the change is old")
    (share.guest / "file").read_bytes()
    before = share.asked("read")
    assert (share.guest / "file").read_bytes() == b"x" * 8192
    assert share.asked("read") == before


def test_what_was_written_is_not_read_again_where_the_guest_keeps_it(mounts, request):
    share = own_folder(mounts[True], request)
    before = share.asked("read")
    (share.guest / "file").write_bytes(b"y" * 8192)
    os.rename(share.guest / "file", share.guest / "new")
    assert (share.guest / "new").read_bytes() == b"y" * 8192
    assert share.asked("read") == before


def test_a_name_is_not_looked_up_twice_within_a_second(share):
    (share.host / "file").touch()
    os.stat(share.guest / "file")
    assert not (share.guest / "missing").exists()
    before = share.asked("lookup") + share.asked("getattr")
    os.stat(share.guest / "file")
    assert not (share.guest / "missing").exists()
    assert share.asked("lookup") + share.asked("getattr") == before


def test_what_dom0_writes_into_a_file_is_seen_at_the_next_open(shared):
    for content in ("short", "much longer than before", "same length as before!!", "x", "y"):
        (shared.host / "file").write_text(content)
        refresh(shared.guest / "file")
        assert (shared.guest / "file").read_text() == content


def test_a_content_of_the_same_size_is_seen_at_the_next_open_at_once(shared):
    for number in range(50):
        with open(shared.host / "file", "r+" if number else "w") as file:
            file.write(f"{number:04}")
        assert (shared.guest / "file").read_text() == f"{number:04}"


def test_dom0s_changes_between_the_guests_own_are_not_taken_for_those(shared):
    with opened(shared.guest / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"guest", 0)
        with open(shared.host / "file", "r+b") as file:
            file.write(b"DOM0!")
        os.pwrite(fd, b"g", 4)
    assert (shared.guest / "file").read_bytes() == b"DOM0g"


def test_a_file_that_was_just_missed_is_opened_with_its_own_permissions(shared):
    os.chmod(shared.host, 0o777)
    path = shared.guest / "file"
    assert not path.exists()  # which the guest remembers
    (shared.host / "file").write_text("secret")
    os.chmod(shared.host / "file", 0o600)
    with as_user(1000, 1000), refused(errno.EACCES):
        os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        assert os.read(fd, 10) == b"secret"


def test_one_folder_at_two_places_stays_at_both(shared):
    for name in ("data/below", "a", "b"):
        (shared.host / name).mkdir(parents=True)
    for name in ("a", "b"):
        runx.mount(str(shared.host / "data"), str(shared.host / name), runx.MS_BIND)
    try:
        paths = [shared.guest / "a/below", shared.guest / "b/below"]
        with opened(paths[0], os.O_RDONLY) as first, opened(paths[1], os.O_RDONLY) as second:
            for path in paths * 2:
                refresh(path)
            assert [os.readlink(f"/proc/self/fd/{fd}") for fd in (first, second)] == [str(path) for path in paths]
            assert os.fstat(first).st_ino == os.fstat(second).st_ino
    finally:
        for name in ("a", "b"):
            runx.detach(str(shared.host / name))


def test_a_file_that_was_seen_by_a_read_only_mount_is_written_by_another(shared):
    for name in ("data", "fixed", "free"):
        (shared.host / name).mkdir()
    (shared.host / "data/file").write_text("old")
    for name in ("fixed", "free"):
        runx.mount(str(shared.host / "data"), str(shared.host / name), runx.MS_BIND)
    runx.mount(None, str(shared.host / "fixed"), runx.MS_BIND | runx.MS_REMOUNT | runx.MS_RDONLY)
    fixed, free = (shared.guest / name / "file" for name in ("fixed", "free"))
    try:
        assert fixed.read_text() == "old"
        for _ in range(2):
            with refused(errno.EROFS):
                fixed.write_text("x")
        free.chmod(0o600)
        free.write_text("new")
        assert fixed.read_text() == "new" and (shared.host / "data/file").read_text() == "new"
    finally:
        for name in ("fixed", "free"):
            runx.detach(str(shared.host / name))


def test_before_linux_5_14_a_folder_is_moved_where_its_mount_cannot_be_asked_for(monkeypatch):
    def read_file(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(runx, "read_file", read_file)
    node = types.SimpleNamespace(fd=3)
    assert runx.mount_of(node) == 0


def test_files_of_several_file_systems_have_numbers_of_their_own(shared):
    (shared.host / "other").mkdir()
    (shared.host / "file").touch()
    runx.mount("tmpfs", str(shared.host / "other"), 0, "tmpfs")
    try:
        for number in range(20):
            (shared.host / f"other/{number}").touch()
        numbers = [os.stat(path).st_ino for path in (shared.guest / "other").iterdir()]
        assert len(set(numbers)) == 20 and min(numbers) > 1 << 47
        assert os.stat(shared.guest / "file").st_ino == os.stat(shared.host / "file").st_ino
    finally:
        runx.detach(str(shared.host / "other"))


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_APPEND_FL = 0x80086601, 0x40086602, 0x20  # <linux/fs.h>: chattr(1)'s a


def test_a_file_that_only_grows_can_be_appended_to(share):
    path = share.host / "log"
    path.write_text("one\n")
    with opened(path, os.O_RDONLY) as fd:
        try:
            before = fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4))
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=L", struct.unpack("=L", before)[0] | FS_APPEND_FL))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise
            pytest.skip(f"the file system of {path} has no such files: {error.strerror}")
        try:
            with open(share.guest / "log", "a") as file:
                for line in ("two\n", "three\n"):
                    file.write(line)
                    file.flush()
            assert path.read_text() == (share.guest / "log").read_text() == "one\ntwo\nthree\n"
            for flags in (os.O_WRONLY, os.O_WRONLY | os.O_APPEND | os.O_TRUNC):
                with refused(errno.EPERM):
                    os.open(share.guest / "log", flags)
        finally:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, before)


@pytest.fixture
def overlay(shared):
    """One of dom0's in the share, whose lower layer has a file of three names."""
    for name in ("lower", "upper", "work", "merged"):
        (shared.host / name).mkdir()
    (shared.host / "lower/a").write_text("content")
    for name in ("b", "c"):
        os.link(shared.host / "lower/a", shared.host / "lower" / name)
    options = ",".join(f"{name}dir={shared.host}/{name}" for name in ("lower", "upper", "work"))
    try:
        runx.mount("overlay", str(shared.host / "merged"), 0, "overlay", options)
    except runx.Error as error:
        pytest.skip(f"needs an overlay: {error}")
    yield served.Mounted(shared.host / "merged", shared.guest / "merged", shared.counts)
    runx.detach(str(shared.host / "merged"))


def test_names_of_one_file_below_an_overlay_are_files_of_their_own(overlay):
    """As on dom0, where the one that is changed is copied and the others stay, without the overlay's index."""
    for name in "abc":  # so that the guest knows each before
        os.stat(overlay.guest / name)
    os.chmod(overlay.guest / "b", 0o600)
    (overlay.guest / "c").write_text("changed")
    paths = {name: overlay.host / name for name in "abc"}
    found = {name: (stat.S_IMODE(path.stat().st_mode), path.read_text()) for name, path in paths.items()}
    assert found == {"a": (0o644, "content"), "b": (0o600, "content"), "c": (0o644, "changed")}
    for name in "abc":
        refresh(overlay.guest / name)
        path = overlay.guest / name
        assert (stat.S_IMODE(os.stat(path).st_mode), path.read_text()) == found[name], name


def test_a_file_that_an_overlay_has_copied_stays_the_same_file(overlay):
    with opened(overlay.guest / "a", os.O_RDONLY) as before, opened(overlay.guest / "a", os.O_RDWR) as fd:
        os.write(fd, b"CON")
        os.link(overlay.guest / "a", overlay.guest / "d")
        with opened(overlay.guest / "a", os.O_RDWR) as again, opened(overlay.guest / "d", os.O_RDWR) as linked:
            fcntl.flock(fd, fcntl.LOCK_EX)
            for other in (before, again, linked):
                assert os.path.sameopenfile(fd, other)
                with refused(errno.EAGAIN):
                    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert (overlay.host / "d").read_text() == "CONtent" and (overlay.host / "b").read_text() == "content"


# ---- owners, permissions, attributes


def test_what_a_user_makes_is_the_users(share):
    os.chmod(share.host, 0o777)
    with as_user(1000, 1001):
        old = os.umask(0o027)
        try:
            os.mkdir(share.guest / "folder", 0o777)
            os.mkfifo(share.guest / "fifo", 0o666)
            os.symlink("x", share.guest / "link")
            os.close(os.open(share.guest / "file", os.O_CREAT | os.O_WRONLY, 0o4777))
        finally:
            os.umask(old)
    modes = {"folder": 0o750, "fifo": 0o640, "link": 0o777, "file": 0o4750}
    for side in (share.guest, share.host):  # the guest knows what it was told when it was made
        for name, mode in modes.items():
            status = os.lstat(side / name)
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 1001, mode), (side, name)


def test_a_folder_with_set_group_id_gives_its_group(share):
    (share.host / "folder").mkdir()
    os.chown(share.host / "folder", 0, 50)
    os.chmod(share.host / "folder", 0o2777)
    refresh(share.guest / "folder")
    with as_user(1000, 1000):
        (share.guest / "folder/file").touch()
        os.mkdir(share.guest / "folder/below")
    assert (os.stat(share.host / "folder/file").st_uid, os.stat(share.host / "folder/file").st_gid) == (1000, 50)
    below = os.stat(share.host / "folder/below")
    assert (below.st_uid, below.st_gid, below.st_mode & stat.S_ISGID) == (1000, 50, stat.S_ISGID)


def test_permissions_are_those_of_the_files(share):
    (share.host / "file").write_text("x")
    os.chmod(share.host / "file", 0o640)
    os.chmod(share.host, 0o755)
    refresh(share.guest)
    with as_user(1000, 1000):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            with refused(errno.EACCES):
                os.open(share.guest / "file", flags)
        with refused(errno.EACCES):
            os.mkdir(share.guest / "folder")
        with refused(errno.EPERM):
            os.chmod(share.guest / "file", 0o666)


def test_times_have_nanoseconds_and_may_be_before_1970(share):
    path = share.guest / "file"
    path.touch()
    for times in ((-5 * 10**9 + 1, -(10**9) - 999_999_999), (10**18 + 123_456_789, 1)):
        os.utime(path, ns=times)
        for each in (path, share.host / "file"):
            assert (os.stat(each).st_atime_ns, os.stat(each).st_mtime_ns) == times
    call("utimensat", AT_FDCWD, os.fsencode(path), struct.pack("=qqqq", 0, (1 << 30) - 1, 0, (1 << 30) - 2), 0)
    status = os.stat(share.host / "file")
    assert status.st_mtime_ns == 1 and status.st_atime_ns > 1_500_000_000 * 10**9


def test_a_program_loses_its_privileges_when_it_is_written_or_given_away(share):
    path = share.guest / "program"
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # <linux/capability.h>, cap_net_raw=ep
    for change in ("write", "truncate", "open", "chown"):
        path.write_text("content")
        os.chmod(path, 0o6777)
        os.setxattr(path, "security.capability", capability)
        assert os.getxattr(share.host / "program", "security.capability") == capability
        if change == "chown":
            os.chown(path, 5, 5)
        else:
            with as_user(1000, 1000):
                if change == "write":
                    with opened(path, os.O_WRONLY) as fd:
                        os.write(fd, b"x")
                elif change == "truncate":
                    os.truncate(path, 2)
                else:
                    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        for each in (path, share.host / "program"):
            assert stat.S_IMODE(os.stat(each).st_mode) == 0o777, change
            with refused(errno.ENODATA):
                os.getxattr(each, "security.capability")
        os.unlink(path)


def test_root_may_write_a_program_and_leave_it_privileged(share):
    path = share.guest / "program"
    path.touch()
    os.chmod(path, 0o4755)
    path.write_text("content")
    assert stat.S_IMODE(os.stat(share.host / "program").st_mode) == 0o4755


def test_extended_attributes_are_set_listed_and_removed(share):
    path = share.guest / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "user.b", b"x" * 2000)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    assert sorted(os.listxattr(path)) == ["user.a", "user.b"]
    assert os.getxattr(path, "user.b") == b"x" * 2000
    with refused(errno.ERANGE):
        call("getxattr", os.fsencode(path), b"user.b", ctypes.create_string_buffer(10), 10)
    os.removexattr(path, "user.a")
    assert os.listxattr(share.host / "file") == ["user.b"]
    with refused(errno.ENODATA):
        os.getxattr(path, "user.a")


ACL_ACCESS, ACL_DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(*entries):
    """<linux/posix_acl_xattr.h>: tag, permissions and id each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NONE = 0xFFFFFFFF
FEW = (4, 5, NONE), (0x10, 7, NONE), (0x20, 0, NONE)  # what follows users
FOR_USER_1000 = acl((1, 7, NONE), (2, 6, 1000), *FEW)


def test_access_lists_count_and_are_inherited(share):
    try:
        os.setxattr(share.host, ACL_DEFAULT, FOR_USER_1000)
    except OSError as error:
        pytest.skip(f"no access lists in {share.host}: {error}")
    os.chmod(share.host, 0o755)
    old = os.umask(0o077)  # does not count here
    try:
        (share.guest / "file").touch(0o666)
        (share.guest / "folder").mkdir(0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(share.host / "file").st_mode) == 0o660
    assert os.getxattr(share.guest / "folder", ACL_DEFAULT) == FOR_USER_1000
    with as_user(1000, 1000):
        (share.guest / "file").write_text("by the list")
    with as_user(1001, 1001), refused(errno.EACCES):
        os.open(share.guest / "file", os.O_RDONLY)


def test_an_access_list_of_a_stranger_takes_set_group_id(share):
    path = share.guest / "file"
    path.touch()
    os.chown(path, 1000, 50)
    os.chmod(path, 0o2755)
    with as_user(1000, 1000):
        try:
            os.setxattr(path, ACL_ACCESS, acl((1, 7, NONE), (2, 6, 5), (4, 5, NONE), (0x10, 7, NONE), (0x20, 0, NONE)))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip(f"no access lists in {share.host}")
    assert not os.stat(share.host / "file").st_mode & stat.S_ISGID


@pytest.mark.parametrize("name", [ACL_ACCESS, ACL_DEFAULT])
def test_a_long_access_list_is_refused_for_dom0s_kernel_would_keep_it(tmp_path, name):
    """124 entries are not too many, and another attribute may be as long."""
    fits, long = (acl((1, 7, NONE), *((2, 6, uid) for uid in range(count - 4)), *FEW) for count in (124, 125))
    guest = served.Guest(runx.Fuse(os.open(tmp_path, os.O_PATH), CAPABILITIES))
    ninep = served.NinePGuest(runx.NineP(os.open(tmp_path, os.O_PATH), CAPABILITIES))
    results = []
    for fid, (title, value) in enumerate([(name, long), (name, fits), ("user.a", long)], 1):
        body = struct.pack("<4I", len(value), 0, 0, 0) + os.fsencode(title) + b"\0" + value
        ninep.walk(fid)
        asked = ninep.request("xattrcreate", fid, os.fsencode(title), len(value), 0)[0]
        results.append((guest.request("setxattr", 1, body)[0], asked))
    assert results[0] == (errno.ENOSPC, errno.ENOSPC)
    assert set(results[1:]) <= {(0, 0), (errno.EOPNOTSUPP, 0)}, results


def test_the_file_systems_space_is_told(share):
    here, there = os.statvfs(share.guest), os.statvfs(share.host)
    assert (here.f_blocks, here.f_frsize, here.f_files) == (there.f_blocks, there.f_frsize, there.f_files)
    os.sync()


# ---- files without a size


@pytest.fixture
def special(shared):
    """Dom0's /proc, and a sysfs of a network namespace of its own."""
    runx.mount("/proc", make_folder(shared.host / "proc"), runx.MS_BIND)
    path, (reader, writer) = make_folder(shared.host / "sys"), os.pipe()
    pid = os.fork()
    if not pid:  # as long as it lives its namespace does
        try:
            runx.system_call("unshare", runx.CLONE_NEWNET)
            runx.mount("sysfs", path, 0, "sysfs")
            os.write(writer, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"+"
    yield shared
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    runx.detach(str(shared.host / "sys"))
    runx.detach(str(shared.host / "proc"))


def make_folder(path):
    path.mkdir(exist_ok=True)
    return str(path)


def test_files_without_a_size_are_read_as_they_are(special):
    assert (special.guest / "proc/meminfo").read_text().startswith("MemTotal:")
    assert (special.guest / "proc/sys/kernel/ostype").read_text() == "Linux\n"
    assert (special.guest / "sys/class/net/lo/mtu").read_bytes() == b"65536\n"
    first, then = ((special.guest / "proc/uptime").read_text() for _ in range(2) if os.sync() is None)
    assert float(then.split()[0]) >= float(first.split()[0])


def test_links_of_proc_are_read_anew(special):
    """Not those of a process with more capabilities: as in dom0, they are not for the guest's root."""
    with opened(special.host, os.O_RDONLY) as fd:
        with refused(errno.EACCES):
            os.readlink(special.guest / f"proc/{os.getpid()}/fd/{fd}")
        guest = served.Guest(runx.Fuse(os.open("/proc", os.O_PATH), (1 << 64) - 1))
        folder = guest.look_up(b"fd", guest.look_up(b"%d" % os.getpid()))
        links = [guest.look_up(b"%d" % fd, folder) for _ in range(2)]
        assert len(set(links)) == 2
        assert guest.done("readlink", links[0]) == os.fsencode(special.host)


def test_dom0s_device_is_not_changed_by_who_may_not(special):
    path = special.guest / "sys/class/net/lo/mtu"
    for content in ("1400", "bogus"):
        with refused(errno.EPERM):  # root of the guest, without CAP_NET_ADMIN
            path.write_text(content)
    with as_user(1000, 1000), refused(errno.EACCES):
        path.write_text("1400")
    assert (special.host / "sys/class/net/lo/mtu").read_text() == "65536\n"


def test_dom0s_device_is_changed_by_who_may_and_errors_arrive(special):
    fd = os.open(special.host / "sys", os.O_PATH)
    guest = served.Guest(runx.Fuse(fd, CAPABILITIES | CAP_NET_ADMIN))
    node = 1
    for name in (b"devices", b"virtual", b"net", b"lo", b"mtu"):
        node = guest.look_up(name, node)
    assert guest.open(node, os.O_WRONLY, uid=1000)[0] == errno.EACCES
    error, handle, flags = guest.open(node, os.O_RDWR | os.O_TRUNC)
    assert (error, flags) == (0, runx.FOPEN_DIRECT_IO)
    assert guest.write(node, handle, b"bogus") == errno.EINVAL
    assert guest.write(node, handle, b"1400", uid=1000) == errno.EPERM
    assert guest.write(node, handle, b"1400") == 0
    assert guest.read(node, handle) == (0, b"1400\n")


def test_what_is_made_without_a_size_is_not_kept_by_the_guest(shared):
    path = make_folder(shared.host / "queues")
    runx.mount("mqueue", path, 0, "mqueue")
    guest = served.Guest(runx.Fuse(os.open(path, os.O_PATH), CAPABILITIES))
    made = guest.done("create", 1, struct.pack("<IIII", os.O_RDWR, 0o600, 0, 0) + b"made\0")
    os.unlink(f"{path}/made")
    assert runx.OPEN_OUT.unpack(made[-runx.OPEN_OUT.size :])[1] == runx.FOPEN_DIRECT_IO
    del guest
    runx.detach(path)


def test_what_is_mounted_later_is_not_taken_for_what_had_its_number(shared):
    path, seen = make_folder(shared.host / "folder"), {}
    guest = served.Guest(runx.Fuse(os.open(shared.host, os.O_PATH), CAPABILITIES))
    for kind in ("tmpfs", "bpf") * 20:
        try:
            runx.mount(kind, path, 0, kind)
        except runx.Error as error:
            pytest.skip(str(error))
        kinds = seen.setdefault(os.stat(path).st_dev, set())
        kinds.add(kind)
        number = guest.look_up(b"folder")
        assert guest.fuse.known.nodes[number].sizeless == (kind == "bpf")
        guest.request("forget", number, struct.pack("<Q", 1))
        runx.detach(path)
        if len(kinds) == 2:
            return
    pytest.skip("no number was given twice")


# ---- a hostile guest


@pytest.fixture
def exported(tmp_path):
    """Opens tmp_path/share as a server does; tmp_path/secret is outside, and no descriptor is to be left."""
    (tmp_path / "share/folder").mkdir(parents=True)
    (tmp_path / "share/file").write_text("content")
    (tmp_path / "secret").write_text("secret")
    os.symlink("..", tmp_path / "share/up")
    before = len(conftest.open_descriptors())
    yield lambda: os.open(tmp_path / "share", os.O_PATH)
    assert len(conftest.open_descriptors()) <= before


@pytest.fixture
def guest(exported, tmp_path):
    """Asks for what is in tmp_path/share."""
    os.symlink("../secret", tmp_path / "share/link")
    guest = served.Guest(runx.Fuse(exported(), CAPABILITIES))
    yield guest
    guest.fuse = None


@pytest.fixture
def made(guest):
    """Makes one of each kind as a user; returns the errno of each."""
    names = {"mkdir": b"d\0", "symlink": b"l\0target\0", "mknod": b"n\0", "create": b"f\0", "tmpfile": b""}
    heads = {
        "mkdir": struct.pack("<II", 0o777, 0), "symlink": b"", "mknod": struct.pack("<IIII", 0o10666, 0, 0, 0),
        "create": struct.pack("<IIII", os.O_WRONLY, 0o100666, 0, 0),
        "tmpfile": struct.pack("<IIII", os.O_WRONLY, 0o100666, 0, 0),
    }  # fmt: skip
    folder = guest.look_up(b"folder")
    return lambda: {kind: guest.request(kind, folder, heads[kind] + names[kind], uid=1000)[0] for kind in heads}


@needs_root
def test_what_cannot_become_its_makers_is_not_left(made, tmp_path, monkeypatch):
    """Such as where that user's quota is used up."""
    before = os.listdir(tmp_path / "share/folder")
    monkeypatch.setattr(os, "chown", lambda *args: runx.refuse(errno.EDQUOT))
    assert set(made().values()) == {errno.EDQUOT}
    assert os.listdir(tmp_path / "share/folder") == before


@needs_root
def test_a_file_system_without_owners_says_whose_a_new_file_is(made, tmp_path, monkeypatch):
    """vfat: chown(2) to another than the one of all is EPERM."""
    monkeypatch.setattr(os, "chown", lambda *args: runx.refuse(errno.EPERM))
    assert set(made().values()) == {0}
    assert {os.lstat(tmp_path / "share/folder" / name).st_uid for name in "dlnf"} == {0}


def test_what_is_appended_to_a_file_that_is_open_to_synchronize_is_on_disk(guest, monkeypatch):
    """The guest's kernel keeps no page of it, so it leaves that to the server."""
    seen = []
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset, flags: seen.append(flags) or 1)
    node = guest.look_up(b"file")
    for flags in (0, os.O_SYNC, os.O_DSYNC):
        _, handle, _ = guest.open(node, os.O_WRONLY | os.O_APPEND | flags)
        head = struct.pack("<QQIIQII", handle, 0, 1, 0, 0, os.O_WRONLY | os.O_APPEND | flags, 0)
        guest.done("write", node, head + b"x")
    assert seen == [runx.RWF_APPEND, runx.RWF_APPEND | runx.RWF_SYNC, runx.RWF_APPEND | runx.RWF_SYNC]


def test_a_write_by_a_program_that_has_no_room_to_its_end_is_short(guest, monkeypatch):
    """The program sees it; of pages that were written before, nobody would."""
    pwritev = os.pwritev

    def full(fd, buffers, offset, flags):
        if offset >= 4:
            runx.refuse(errno.ENOSPC)
        return pwritev(fd, [b"".join(buffers)[: 4 - offset]], offset, flags)

    monkeypatch.setattr(os, "pwritev", full)
    node = guest.look_up(b"file")
    _, handle, _ = guest.open(node, os.O_RDWR)
    for flags, answer in ((0, (0, struct.pack("<II", 4, 0))), (runx.WRITE_CACHE, (errno.ENOSPC, b""))):
        head = struct.pack("<QQIIQII", handle, 0, 9, flags, 0, os.O_RDWR, 0)
        assert guest.request("write", node, head + b"123456789") == answer
    assert guest.read(node, handle) == (0, b"1234ent")


@needs_root
def test_what_cannot_be_read_is_not_taken_for_what_is_behind_the_end(guest, tmp_path, monkeypatch):
    """A disk's bad block: dom0's kernel answers with what stands before it, and only then with EIO."""
    preadv, asked = os.preadv, []

    def bad(fd, buffers, offset):
        asked.append(offset)
        if offset == 8192:
            runx.refuse(errno.EIO)
        return preadv(fd, [buffers[0][: 8192 - offset]] if offset < 8192 else buffers, offset)

    monkeypatch.setattr(os, "preadv", bad)
    (tmp_path / "share/file").write_bytes(b"x" * 13000)
    node = guest.look_up(b"file")
    _, handle, _ = guest.open(node, os.O_RDONLY)
    assert guest.read(node, handle, 0, 16384) == (errno.EIO, b"")
    assert guest.read(node, handle, 0, 8192) == (0, b"x" * 8192)
    assert guest.read(node, handle, 12288, 4096) == (0, b"x" * 712)
    assert asked == [0, 8192, 0, 12288]  # the end of a file is asked for once
    guest.fuse.known.nodes[node].sizeless = True  # such as what is gone once it has been read
    assert guest.read(node, handle, 0, 16384) == (0, b"x" * 8192)


BAD_NAMES = (b"", b".", b"..", b"a/b", b"/", b"../secret", b"x" * 300)


def test_no_name_leads_elsewhere(guest, tmp_path):
    folder = guest.look_up(b"folder")
    name_at = {"lookup": 0, "mknod": 16, "mkdir": 8, "unlink": 0, "rmdir": 0, "create": 16, "tmpfile": None}
    for opcode, size in name_at.items():
        for name in BAD_NAMES if size is not None else ():
            error, _ = guest.request(opcode, folder, bytes(size) + name + b"\0")
            assert error in (errno.EINVAL, errno.ENAMETOOLONG), (opcode, name)
    for name in BAD_NAMES:
        for opcode, head in (("rename", struct.pack("<Q", folder)), ("rename2", struct.pack("<QII", folder, 0, 0))):
            for pair in (name + b"\0new\0", b"file\0" + name + b"\0"):
                assert guest.request(opcode, 1, head + pair)[0] in (errno.EINVAL, errno.ENAMETOOLONG), name
        assert guest.request("symlink", folder, name + b"\0target\0")[0] in (errno.EINVAL, errno.ENAMETOOLONG)
        link = struct.pack("<Q", guest.look_up(b"file")) + name + b"\0"
        assert guest.request("link", folder, link)[0] in (errno.EINVAL, errno.ENAMETOOLONG), name
    assert sorted(os.listdir(tmp_path / "share")) == ["file", "folder", "link", "up"]
    assert sorted(os.listdir(tmp_path)) == ["secret", "share"]


def test_a_link_is_never_followed(guest, tmp_path):
    up, link = guest.look_up(b"up"), guest.look_up(b"link")
    assert guest.request("lookup", up, b"secret\0")[0] == errno.ENOTDIR
    assert guest.open(link, os.O_RDONLY)[0] == errno.ENXIO
    folder, kill = guest.look_up(b"folder"), struct.pack("<II", os.O_RDONLY, runx.OPEN_KILL_SUIDGID)
    os.chmod(tmp_path / "share/folder", 0o2775)
    assert guest.request("open", folder, kill)[0] == errno.ENXIO  # that is opendir's, and nothing is done before
    assert stat.S_IMODE(os.stat(tmp_path / "share/folder").st_mode) == 0o2775
    assert guest.request("opendir", up, bytes(8))[0] == errno.ENOTDIR
    assert guest.request("mkdir", up, bytes(8) + b"new\0")[0] == errno.ENOTDIR
    assert guest.request("create", 1, struct.pack("<IIII", os.O_WRONLY, 0o644, 0, 0) + b"link\0")[0] == errno.ESTALE
    assert guest.done("readlink", link) == b"../secret"


def test_a_folder_that_becomes_a_link_meanwhile_leads_nowhere_else(guest, tmp_path):
    share = tmp_path / "share"
    (share / "folder/secret").write_text("inside")
    inside, ended = os.stat(share / "folder/secret").st_ino, threading.Event()

    def swap():
        while not ended.is_set():
            rename(share / "folder", share / "up", RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    found = set()
    try:
        for number in range(200_000):
            error, body = guest.request("lookup", guest.look_up(b"folder"), b"secret\0")
            found.add(errno.errorcode[error] if error else runx.ENTRY_OUT.unpack(body)[6])
            if number > 2000 and len(found) > 1:  # the other thread may not have had its turn before
                break
    finally:
        ended.set()
        thread.join()
    assert found == {"ENOTDIR", inside}


def test_every_request_that_is_cut_short_or_random_gets_an_answer(guest):
    number = random.Random(18)
    guest.look_up(b"file")
    syncfs = runx.FUSE_REQUESTS["syncfs"][0]  # which would only take its time
    for opcode in (each for each in range(60) if each != syncfs):
        for size in (*range(0, 104, 4), 41, 200, 4000):
            for body in (bytes(size), b"\xff" * size, number.randbytes(size)):
                for node in (0, 1, 2, 3, 1 << 63):
                    assert guest.request(opcode, node, body)
                    guest.look_up(b"file")  # a random request may have forgotten it


def test_all_file_systems_are_synchronized_also_where_one_cannot_be(guest, monkeypatch):
    nodes = [guest.fuse.known.nodes[guest.look_up(name)] for name in (b"file", b"folder")]
    for number, node in enumerate(nodes, 1):
        node.inode |= number << 48  # of a file system of its own
    nodes[1].sizeless = True
    tried = []

    def system_call(name, *args):
        assert name == "syncfs"
        tried.append(os.readlink(f"/proc/self/fd/{args[0]}"))
        runx.refuse(errno.EIO)

    monkeypatch.setattr(runx, "system_call", system_call)
    assert guest.request("syncfs", 1, bytes(8))[0] == errno.EIO
    assert sorted(map(os.path.basename, tried)) == ["file", "share"]


def test_what_is_unknown_is_refused(guest):
    assert guest.request("getattr", 77, bytes(16))[0] == errno.ESTALE
    node = guest.look_up(b"file")
    _, handle, _ = guest.open(node, os.O_RDONLY)
    assert guest.read(node, handle) == (0, b"content")
    assert guest.read(node, handle + 1)[0] == errno.EBADF
    assert guest.read(guest.look_up(b"folder"), handle)[0] == errno.EBADF  # another file's
    assert guest.write(node, handle, b"x") == errno.EBADF  # open for reading
    assert guest.request(4711, node)[0] == errno.ENOSYS
    assert guest.request("write", node, struct.pack("<QQIIQII", handle, 0, 1 << 20, 0, 0, 0, 0))[0] == errno.EINVAL
    assert guest.read(node, handle, 1 << 63)[0] == errno.EINVAL
    assert guest.read(node, handle, 0, NONE) == (0, b"content")
    guest.request("forget", node, struct.pack("<Q", 1 << 60))
    assert guest.request("getattr", node, bytes(16))[0] == errno.ESTALE


def test_a_number_is_never_given_to_another_file(guest, tmp_path):
    seen = set()
    for _ in range(20):
        node = guest.look_up(b"file")
        assert node not in seen
        seen.add(node)
        assert guest.look_up(b"file") == node
        guest.request("forget", node, struct.pack("<Q", 1))
        assert guest.done("getattr", node, bytes(16))
        guest.request("batch_forget", 0, struct.pack("<IIQQ", 1, 0, node, 1))
        assert guest.request("getattr", node, bytes(16))[0] == errno.ESTALE


def test_a_request_to_forget_has_a_reply_only_where_a_process_waits_for_it(guest):
    """Then it has a number, as what readdirplus gives back at once because it cannot take it."""
    node = guest.look_up(b"file")
    assert guest.look_up(b"file") == node
    assert guest.request("forget", node, struct.pack("<Q", 1), unique=0) is None
    assert guest.done("getattr", node, bytes(16))
    assert guest.request("forget", node, struct.pack("<Q", 1)) == (0, b"")
    assert guest.request("getattr", node, bytes(16))[0] == errno.ESTALE
    assert guest.request("batch_forget", 0, struct.pack("<IIQQ", 1, 0, node, 1), unique=0) is None


def test_what_the_guest_knows_and_opens_has_a_bound(guest, tmp_path, monkeypatch):
    monkeypatch.setattr(runx, "NODES_MAX", 50)
    monkeypatch.setattr(runx, "HANDLES_MAX", 20)
    for number in range(60):
        (tmp_path / f"share/{number}").touch()
    results = [guest.request("lookup", 1, b"%d\0" % number) for number in range(60)]
    assert [error for error, _ in results] == [0] * 49 + [errno.ENFILE] * 11
    assert guest.request("mkdir", 1, bytes(8) + b"new\0")[0] == errno.ENFILE
    assert not (tmp_path / "share/new").exists()  # nothing is made that the guest cannot be told of
    node = runx.ENTRY_OUT.unpack(results[0][1])[0]
    assert [guest.open(node, os.O_RDONLY)[0] for _ in range(25)] == [0] * 20 + [errno.ENFILE] * 5
    guest.done("init", 0, struct.pack("<IIII44s", 7, 40, 1 << 17, NONE, b""))
    assert guest.look_up(b"59") and len(guest.fuse.known.nodes) == 2 and not guest.fuse.known.handles


def test_a_file_for_which_there_is_no_number_leaves_no_descriptor(guest, monkeypatch):
    """Such as on NFS, where numbers may have all of their 64 bits."""
    files, before = guest.fuse.files, len(conftest.open_descriptors())
    monkeypatch.setattr(files, "device", 0)
    monkeypatch.setattr(files, "prefixes", {})
    monkeypatch.setattr(runx, "PREFIXES_MAX", 0)
    with refused(errno.EOVERFLOW):
        files.find(files.root, b"file")
    assert len(conftest.open_descriptors()) == before


def test_a_file_that_has_just_gone_from_nfs_leaves_no_descriptor(guest, monkeypatch):
    """It can be opened still, and fstat(2) of it fails."""
    files, before = guest.fuse.files, len(conftest.open_descriptors())
    monkeypatch.setattr(os, "fstat", lambda fd: runx.refuse(errno.ESTALE))
    with refused(errno.ESTALE):
        files.find(files.root, b"file")
    monkeypatch.undo()
    assert len(conftest.open_descriptors()) == before


def test_a_folder_whose_offsets_have_all_bits_is_read_to_its_end(guest, monkeypatch):
    """Its file system takes none of them from lseek(2), and goes on where it is."""
    node, call = guest.look_up(b"folder"), runx.system_call
    (handle,) = struct.unpack_from("<Q", guest.done("opendir", node, bytes(8)))

    def system_call(name, *args):
        end = call(name, *args)
        for at in (15, 24 + 15) if end and name.startswith("getdents") else ():  # of "." and "..", d_off's highest byte
            memoryview(args[1]).cast("B")[at] = 0xFF
        return end

    monkeypatch.setattr(runx, "system_call", system_call)
    body = guest.done("readdir", node, struct.pack("<QQI", handle, 0, 4096))
    offset = runx.FUSE_DIRENT.unpack_from(body, 32)[1]
    assert offset >> 56 == 0xFF
    assert guest.request("readdir", node, struct.pack("<QQI", handle, offset, 4096)) == (0, b"")


class Folders:
    """What a guest reads in folders."""

    def __init__(self, guest, path):
        self.guest, self.path = guest, path

    def open(self, name):
        node = self.guest.look_up(name)
        return node, struct.unpack_from("<Q", self.guest.done("opendir", node, bytes(8)))[0]

    def read(self, node, handle, offset=0):
        """Some names, and the offset behind them."""
        body, found = self.guest.done("readdir", node, struct.pack("<QQI", handle, offset, 300)), []
        while body:
            _, offset, length, _ = runx.FUSE_DIRENT.unpack_from(body)
            found.append(body[24 : 24 + length])
            body = body[24 + (length + 7 & ~7) :]
        return found, offset

    def read_on(self, opened, begun):
        """All names, of which some were read already."""
        found, offset = more, _ = begun
        while more:
            more, offset = self.read(*opened, offset)
            found = found + more
        return sorted(found)

    def kept(self):
        """How many are open of which names were read."""
        handles = self.guest.fuse.known.handles.values()
        return sum(os.lseek(handle.fd, 0, os.SEEK_CUR) != 0 for handle in handles)


@pytest.fixture
def folders(guest, tmp_path):
    return Folders(guest, tmp_path / "share")


def test_dom0s_kernel_has_to_keep_the_names_of_few_folders(folders, monkeypatch):
    """An overlay's are in its memory from when they are first read until that descriptor is closed."""
    monkeypatch.setattr(runx, "LISTS_MAX", 6)
    monkeypatch.setattr(runx, "LISTS_OF_ONE", 3)
    names = {b"%02d" % number for number in range(40)}
    for name in names:
        (folders.path / "folder" / os.fsdecode(name)).touch()
        (folders.path / f"other{os.fsdecode(name)}").mkdir()
    opened = [folders.open(b"folder") for _ in range(5)]
    begun = [folders.read(*each) for each in opened]
    assert folders.kept() == 3
    for each, (found, offset) in zip(opened, begun):
        assert 0 < len(found) < len(names)
        assert folders.read_on(each, (found, offset)) == sorted([*names, b".", b".."])
    for name in names:
        folders.read(*folders.open(b"other" + name))
    assert folders.kept() == 6


def test_dom0s_kernel_has_to_keep_the_names_of_one_large_folder_at_a_time(folders, monkeypatch):
    """Or of one in several states; not of how many read it in one state, for these share a list."""
    names = [b"%03d" % number for number in range(100)]
    for name in (b"one", b"two"):
        (folders.path / os.fsdecode(name)).mkdir()
        for each in names:
            (folders.path / os.fsdecode(name) / os.fsdecode(each)).touch()
    os.utime(folders.path / "one", ns=(1, 1))  # so that it has another one after the next change
    monkeypatch.setattr(runx, "LISTS_SIZE", os.stat(folders.path / "one").st_size * 3 // 2)
    first, *others = (folders.open(b"one") for _ in range(4))
    begun = [folders.read(*each) for each in (first, *others)]
    assert folders.kept() == 4
    second = folders.open(b"two")
    begun.append(folders.read(*second))
    assert folders.kept() == 1
    for each, so_far in zip((first, *others, second), begun):
        assert folders.read_on(each, so_far) == sorted([*names, b".", b".."])
    # as it has become, also for one that was read before
    folders.read(*first)
    folders.read(*others[0])
    assert folders.kept() == 2
    (folders.path / "one/new").touch()
    folders.read(*others[0])
    assert folders.kept() == 1


def test_what_cannot_be_opened_is_neither_emptied_nor_made(guest, tmp_path, monkeypatch):
    monkeypatch.setattr(runx, "HANDLES_MAX", 2)
    os.chmod(tmp_path / "share/file", 0o4755)
    node, folder = guest.look_up(b"file"), guest.look_up(b"folder")
    for _ in range(2):
        assert guest.open(node, os.O_RDONLY)[0] == 0
    kill = struct.pack("<II", os.O_WRONLY | os.O_TRUNC, runx.OPEN_KILL_SUIDGID)
    assert guest.request("open", node, kill)[0] == errno.ENFILE
    assert (tmp_path / "share/file").read_text() == "content"
    assert stat.S_IMODE(os.stat(tmp_path / "share/file").st_mode) == 0o4755
    head = struct.pack("<IIII", os.O_WRONLY, 0o644, 0, 0)
    assert guest.request("create", folder, head + b"new\0")[0] == errno.ENFILE
    assert os.listdir(tmp_path / "share/folder") == []
    assert guest.request("opendir", folder, bytes(8))[0] == errno.ENFILE


def test_where_dom0_gives_fewer_descriptors_the_guest_is_told_of_the_same_bound(guest, tmp_path):
    for number in range(30):
        (tmp_path / f"share/{number}").touch()
    before, lowest = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, before[1]))
    try:
        errors = {guest.request("lookup", 1, b"%d\0" % number)[0] for number in range(30)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert errors == {0, errno.ENFILE}


def test_a_file_that_is_read_only_is_told_also_where_no_descriptor_is_left(guest, monkeypatch):
    """The server ended then, and the container with it, for it looks by which mount it has found the file."""
    node = guest.look_up(b"file")
    mode = struct.pack("<I12xQ8xqq8xII4xI4xII4x", runx.SET_MODE, 0, 0, 0, 0, 0, 0o600, 0, 0)
    monkeypatch.setattr(os, "chmod", lambda *args: runx.refuse(errno.EROFS))
    assert [guest.request("setattr", node, mode)[0] for _ in range(2)] == [errno.ESTALE, errno.EROFS]
    monkeypatch.setattr(runx, "mount_of", lambda node: runx.refuse(errno.EMFILE))
    assert guest.request("setattr", node, mode)[0] == errno.ENFILE


def test_attributes_are_set_by_what_is_open_if_it_is_that_file(guest, tmp_path):
    one, other = tmp_path / "share/file", tmp_path / "share/other"
    other.write_text("other")
    _, handle, _ = guest.open(guest.look_up(b"other"), os.O_RDONLY)

    def set_mode(name, handle, mode):
        valid = runx.SET_MODE | 1 << 6  # FATTR_FH
        node = guest.look_up(name)
        return guest.request("setattr", node, struct.pack("<I4xQ52xI16x", valid, handle, mode))[0]

    for number, mode in ((handle, 0o640), (0, 0o600), (12345, 0o644)):
        assert set_mode(b"file", number, mode) == 0, "not of this file, or none"
        assert (stat.S_IMODE(one.stat().st_mode), stat.S_IMODE(other.stat().st_mode)) == (mode, 0o644)
    assert set_mode(b"other", handle, 0o600) == 0
    assert (stat.S_IMODE(one.stat().st_mode), stat.S_IMODE(other.stat().st_mode)) == (0o644, 0o600)


def test_who_cannot_change_a_file_is_told_so_whoever_else_tries(guest, tmp_path, monkeypatch):
    """A system call that is told ESTALE once more fails with that, and so did those of two processes by turns."""
    (tmp_path / "share/other").touch()
    mode = struct.pack("<I12xQ8xqq8xII4xI4xII4x", runx.SET_MODE, 0, 0, 0, 0, 0, 0o600, 0, 0)
    monkeypatch.setattr(os, "chmod", lambda *args: runx.refuse(errno.EROFS))
    monkeypatch.setattr(runx, "FIXED_MAX", 3)

    def tried(name, pid):
        return guest.request("setattr", guest.look_up(name), mode, pid=pid)[0]

    for names in ((b"file", b"other", b"file"), (b"file", b"file", b"file")):
        assert [tried(name, pid) for pid, name in enumerate(names)] == [errno.ESTALE] * 3
        assert [tried(name, pid) for pid, name in enumerate(names)] == [errno.EROFS] * 3
    assert [tried(b"file", pid) for pid in range(10)] == [errno.ESTALE] * 10
    assert len(guest.fuse.known.fixed) == 3


def test_a_name_that_the_guest_cannot_be_told_of_is_not_left(guest, tmp_path, monkeypatch):
    """It asks again when it has forgotten others, and must not find what it could not make."""
    monkeypatch.setattr(runx, "may_be_two", lambda status: True)  # as on an overlay
    before, node = resource.getrlimit(resource.RLIMIT_NOFILE), guest.look_up(b"file")
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        assert guest.request("link", 1, struct.pack("<Q", node) + b"new\0")[0] == errno.ENFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not (tmp_path / "share/new").exists()


def test_what_has_not_changed_is_read_without_being_opened(guest, tmp_path, monkeypatch):
    monkeypatch.setattr(runx, "READERS_MAX", 2)
    monkeypatch.setattr(runx, "SETTLED", -(10**12))  # whatever the clock says
    names, rootfs = [b"one", b"two", b"three"], tmp_path / "share/rootfs"
    rootfs.mkdir()
    for name in names:
        (rootfs / name.decode()).write_bytes(name)
    folder = guest.look_up(b"rootfs")

    def attributes(name, folder=folder):
        """A file's number, and whether it may be read so."""
        fields = runx.ENTRY_OUT.unpack(guest.done("lookup", folder, name + b"\0"))
        return fields[0], fields[-1] == runx.ATTR_NO_OPEN

    numbers = {name: attributes(name) for name in names}
    assert all(may for _, may in numbers.values())
    for name, (node, _) in numbers.items():
        assert guest.read(node, 0) == (0, name)
        assert guest.write(node, 0, b"x") == errno.EBADF
        assert len(guest.fuse.known.readers) <= 2
    assert attributes(b"file", 1)[1] is False  # of a volume
    one = rootfs / "one"
    status = one.stat()
    one.write_bytes(b"new")
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert attributes(b"one")[1] is False  # what is kept of it may be old, and looks the same
    node = numbers[b"one"][0]
    assert guest.open(node, os.O_RDONLY)[::2] == (0, 0)  # nothing is kept
    assert attributes(b"one")[1] is True
    guest.request("release", node, bytes(24))
    assert guest.request("readdir", 1, struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0))[0] == errno.EBADF
    guest.request("forget", node, struct.pack("<Q", 1 << 40))
    assert node not in guest.fuse.known.readers


def test_what_dom0_changes_beside_the_guest_s_own_changes_is_dropped_at_the_next_opening(guest, tmp_path, monkeypatch):
    """Where it has not sent all of its own yet, the guest passes over the time that it is told."""
    monkeypatch.setattr(runx, "SETTLED", -(10**12))  # whatever the clock says
    node, size = guest.look_up(b"file"), (tmp_path / "share/file").stat().st_size

    def keeps():
        error, _, flags = guest.open(node, os.O_RDWR)
        assert not error
        return bool(flags & runx.FOPEN_KEEP_CACHE)

    keeps()
    assert keeps()
    (tmp_path / "share/file").write_bytes(b"x" * size)
    guest.done("getattr", node, bytes(16))
    times = struct.pack("<I12xQ8xqq8xII4xI4xII4x", runx.SET_MTIME, 0, 0, 5, 0, 0, 0, 0, 0)
    guest.done("setattr", node, times)  # that of what it has written
    assert [keeps(), keeps()] == [False, True]


def test_a_kernel_of_another_version_is_told_ours_or_refused(guest):
    def init(major, minor, offered=NONE):
        return guest.request("init", 0, struct.pack("<IIII44s", major, minor, 1 << 17, offered, b""))

    error, body = init(7, 40)
    assert error == 0 and len(body) == 64
    major, minor, readahead, flags, _, _, most, granularity, pages, *_ = struct.unpack("<IIIIHHIIHHII24s", body)
    assert (major, minor, readahead, most, granularity, pages) == (7, 40, 1 << 17, 1 << 17, 1, 32)
    assert flags == runx.FUSE_FLAGS
    assert struct.unpack_from("<I", init(7, 40, served.WRITEBACK_CACHE)[1], 12) == (served.WRITEBACK_CACHE,)
    assert init(8, 0)[0] == 0 and init(7, 20)[0] == errno.EPROTO and init(6, 0)[0] == errno.EPROTO


# ---- 9P


@pytest.fixture
def ninep(exported):
    """As guest."""
    ninep = served.NinePGuest(runx.NineP(exported(), CAPABILITIES))
    yield ninep
    ninep.ninep = None


def test_ninep_finds_reads_and_writes_files(ninep, tmp_path):
    assert ninep.walk(1, b"file") == (
        0,
        [(0, ninep.walk(2, b"file")[1][0][1], os.stat(tmp_path / "share/file").st_ino)],
    )
    assert [kind for kind, _, _ in ninep.walk(3, b"folder")[1] + ninep.walk(4, b"up")[1]] == [0x80, 2]
    ninep.done("lopen", 1, os.O_RDWR | os.O_APPEND)
    assert ninep.read(1) == (0, b"content") and ninep.read(1, 3, 2) == (0, b"te") and ninep.read(1, 7) == (0, b"")
    assert ninep.write(1, b"C") == 0
    assert (tmp_path / "share/file").read_text() == "Content"
    os.rename(tmp_path / "share/file", tmp_path / "share/other")
    assert ninep.read(1) == (0, b"Content")
    attributes = struct.unpack("<Q13s3I5Q6q4Q", ninep.done("getattr", 1))
    status = os.stat(tmp_path / "share/other")
    assert attributes[2:9] == (status.st_mode, 0, 0, 1, 0, 7, status.st_blksize)
    assert attributes[12] * 10**9 + attributes[13] == status.st_mtime_ns
    ninep.done("clunk", 1)
    assert ninep.read(1)[0] == errno.EBADF
    assert ninep.done("readlink", 4) == b"\x02\0.."


@needs_root
def test_ninep_makes_and_removes_names(ninep, tmp_path):
    ninep.done("mkdir", 0, b"new", 0o750, 50)
    ninep.done("mknod", 0, b"fifo", stat.S_IFIFO | 0o640, 0, 0, 50)
    ninep.done("symlink", 0, b"link", b"target", 50)
    ninep.walk(1)
    ninep.done("lcreate", 1, b"made", os.O_RDWR, 0o4755, 50)
    assert ninep.write(1, b"data") == 0
    for name, mode in (("new", 0o750), ("fifo", 0o640), ("link", 0o777), ("made", 0o4755)):
        status = os.lstat(tmp_path / "share" / name)
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, 50), name
    ninep.done("link", 0, 1, b"second")
    ninep.done("renameat", 0, b"second", 0, b"third")
    ninep.done("unlinkat", 0, b"made", 0)
    ninep.done("unlinkat", 0, b"new", runx.P9_REMOVEDIR)
    assert (tmp_path / "share/third").read_bytes() == b"data"
    assert ninep.read(1) == (0, b"data")
    assert not (tmp_path / "share/made").exists() and not (tmp_path / "share/new").exists()


@needs_root
def test_ninep_sets_attributes(ninep, tmp_path):
    ninep.walk(1, b"file")
    ninep.done("setattr", 1, 1 | 2 | 4 | 8 | 16 | 32 | 128 | 256, 0o600, 5, 6, 3, -5, 1, 10**9, 999_999_999)
    status = os.stat(tmp_path / "share/file")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size) == (0o600, 5, 6, 3)
    assert (status.st_atime_ns, status.st_mtime_ns) == (-5 * 10**9 + 1, 10**18 + 999_999_999)
    ninep.done("setattr", 1, 32, 0, 0, 0, 0, 0, 0, 0, 0)
    assert os.stat(tmp_path / "share/file").st_mtime_ns != status.st_mtime_ns
    assert os.stat(tmp_path / "share/file").st_atime_ns == status.st_atime_ns
    ninep.walk(2, b"file")
    ninep.done("xattrcreate", 2, b"user.a", 4, 0)
    assert ninep.write(2, b"va") == 0 and ninep.write(2, b"lu", 2) == 0 and ninep.write(2, b"e", 4) == errno.EINVAL
    ninep.done("clunk", 2)
    assert struct.unpack("<Q", ninep.done("xattrwalk", 1, 2, b"user.a")) == (4,)
    assert ninep.read(2) == (0, b"valu")
    ninep.done("xattrwalk", 1, 3, b"")
    assert b"user.a\0" in ninep.read(3)[1]


def test_ninep_lists_a_folder_whole_and_from_any_place(ninep, tmp_path):
    names = {b"%d" % number + b"x" * (number % 100) for number in range(300)}
    for name in names:
        (tmp_path / "share/folder" / os.fsdecode(name)).touch()
    ninep.walk(1, b"folder")
    ninep.done("lopen", 1, os.O_RDONLY)
    found, offset = [], 0
    while body := ninep.done("readdir", 1, offset, 1000)[4:]:
        while body:
            _, _, inode = runx.QID.unpack_from(body)
            offset, kind, size = runx.NINEP_DIRENT.unpack_from(body, runx.QID.size)
            end = runx.QID.size + runx.NINEP_DIRENT.size + size
            found.append((body[end - size : end], offset))
            body = body[end:]
    assert len(found) == 302 and {name for name, _ in found} == names | {b".", b".."}
    assert found[101][0] in ninep.done("readdir", 1, found[100][1], 1000)


@needs_root
def test_ninep_has_files_without_a_size_read_directly_and_with_the_askers_rights():
    ninep = served.NinePGuest(runx.NineP(os.open("/proc", os.O_PATH), CAPABILITIES), uid=1000)
    _, found = ninep.walk(1, b"sys", b"kernel", b"hostname")
    assert found[-1][1] == 0
    ninep.done("lopen", 1, os.O_RDONLY)
    assert ninep.read(1)[1].endswith(b"\n")
    ninep.walk(2, b"sys", b"kernel", b"hostname")
    assert ninep.request("lopen", 2, os.O_WRONLY)[0] == errno.EACCES
    ninep.walk(3, b"%d" % os.getppid(), b"exe")
    assert ninep.request("readlink", 3)[0] == errno.EACCES


def test_ninep_makes_files_without_a_size_as_the_makers(shared):
    path = make_folder(shared.host / "queues")
    runx.mount("mqueue", path, 0, "mqueue")
    ninep = served.NinePGuest(runx.NineP(os.open(path, os.O_PATH), 0), uid=1000)
    ninep.walk(1)
    ninep.done("lcreate", 1, b"queue", os.O_RDWR, 0o600, 1001)
    status = os.stat(f"{path}/queue")
    runx.detach(path)
    assert (status.st_uid, status.st_gid) == (1000, 1001)


@needs_root
def test_ninep_makes_all_in_such_a_folder_as_the_makers(ninep, tmp_path):
    (tmp_path / "share").chmod(0o777)
    ninep.ninep.files.root.sizeless = True
    ninep.done("attach", 1, runx.NO_USER, b"", b"", 1000)
    ninep.done("mkdir", 1, b"new", 0o750, 1001)
    ninep.done("mknod", 1, b"fifo", stat.S_IFIFO | 0o640, 0, 0, 1001)
    ninep.done("symlink", 1, b"target", b"target", 1001)
    ninep.done("lcreate", 1, b"made", os.O_RDWR, 0o640, 1001)
    for name in ("new", "fifo", "target", "made"):
        status = os.lstat(tmp_path / "share" / name)
        assert (status.st_uid, status.st_gid) == (1000, 1001), name


def test_ninep_follows_no_name_out_of_the_share(ninep, tmp_path):
    for name in BAD_NAMES:
        errors = {
            ninep.walk(1, name)[0], ninep.request("mkdir", 0, name, 0o755, 0)[0],
            ninep.request("mknod", 0, name, stat.S_IFIFO, 0, 0, 0)[0], ninep.request("symlink", 0, name, b"x", 0)[0],
            ninep.request("unlinkat", 0, name, 0)[0], ninep.request("renameat", 0, name, 0, b"x")[0],
            ninep.request("renameat", 0, b"file", 0, name)[0], ninep.request("lcreate", 0, name, 1, 0o644, 0)[0],
            ninep.request("link", 0, 0, name)[0],
        }  # fmt: skip
        assert errors <= {errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM}, name
    assert ninep.walk(1, b"up", b"secret") == (0, ninep.walk(2, b"up")[1])  # as far as it leads
    assert ninep.request("getattr", 1)[0] == errno.EBADF
    assert ninep.request("lopen", 2, os.O_RDONLY)[0] == errno.ENXIO
    assert sorted(os.listdir(tmp_path / "share")) == ["file", "folder", "up"]


def test_ninep_answers_whatever_is_asked(ninep):
    number = random.Random(18)
    for kind in range(128):
        for size in (*range(0, 80, 3), 500):
            for body in (bytes(size), b"\xff" * size, b"\1\0\0\0" + number.randbytes(size)):
                ninep.walk(1, b"file")
                ninep.send(kind, body)
    assert ninep.request("version", 1 << 30, b"9P2000.u")[1].endswith(b"unknown")
    assert ninep.request("version", 100, b"9P2000.L")[0] == errno.EMSGSIZE


def test_ninep_says_no_more_of_a_lock_than_its_reply_has_room_for(ninep):
    ninep.walk(1, b"file")
    asked = struct.pack("<IBQQI", 1, 1, 2, 3, 4) + runx.ninep_string(b"x" * 60_000)
    assert ninep.send(runx.NINEP_REQUESTS["getlock"][0], asked) == (0, struct.pack("<BQQIH", 2, 2, 3, 4, 0))


def test_ninep_fids_have_a_bound(ninep, monkeypatch):
    monkeypatch.setattr(runx, "NODES_MAX", 100)
    assert [ninep.walk(number, b"file")[0] for number in range(1, 60)] == [0] * 49 + [errno.EMFILE] * 10
    assert ninep.walk(1)[0] == errno.EINVAL  # it is in use
    ninep.done("version", 1 << 17, b"9P2000.L")
    assert not ninep.ninep.fids
