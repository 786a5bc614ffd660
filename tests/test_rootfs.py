# SPDX-License-Identifier: Apache-2.0
"""The container's files: names below a root, mounts, ramdisks, block devices, and the ways in which a VM gets them."""

import contextlib
import errno
import fcntl
import io
import os
import pathlib
import re
import shutil
import stat
import struct
import subprocess
import tracemalloc
from types import SimpleNamespace

import pytest
from archive import members
from conftest import open_descriptors, record
from namespace import in_own_mounts

import runx


@pytest.fixture(autouse=True)
def mount_table(tmp_path):
    """Nothing stays mounted here."""
    yield
    assert str(tmp_path) not in pathlib.Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def root(tmp_path):
    """A root folder beside a file that is nobody's in there."""
    (tmp_path / "secret").write_text("dom0's")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name").write_text("inside")
    links = {
        "absolute": "/etc/name", "up": "../../../etc/name", "folder": "/etc", "out": str(tmp_path / "secret"),
        "nothing": "/new/place", "endless": "endless", "etc/back": "../../secret",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    return root


def mount_entry(destination, kind="bind", source="", flags=runx.MS_BIND | runx.MS_REC, **fields):
    fields = {"data": "", "propagation": 0, "kept": 0, "copy_up": False, **fields}
    return record(runx.Mount, destination=destination, type=kind, source=str(source), flags=flags, **fields)


def raised(number):
    return pytest.raises(OSError, match=re.escape(os.strerror(number)))


# ---- names below a root


@pytest.mark.parametrize("path", ["etc/name", "/etc/name", "absolute", "up", "folder/name", "../../etc/../etc/name"])
def test_a_file_is_found_as_in_the_container(root, path):
    assert runx.read_in_root(str(root), path, 100) == b"inside"
    assert runx.read_in_root(str(root), path, 3) == b"ins"


@pytest.mark.parametrize("busy", [127, 128])
def test_what_others_rename_meanwhile_is_waited_for_within_bounds(root, monkeypatch, busy):
    """openat2(2): EAGAIN if anything on the host was renamed or mounted while it was behind a ".."."""
    calls = []

    def system_call(name, *args):
        calls.append(name)
        if len(calls) <= busy:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(name, *args)

    real = runx.system_call
    monkeypatch.setattr(runx, "system_call", system_call)
    before = open_descriptors()
    if busy < 128:
        assert runx.read_in_root(str(root), "../etc/name", 100) == b"inside"
    else:
        with pytest.raises(runx.Error, match="cannot read etc/name of the container: Resource temporarily unavailable"):
            runx.read_in_root(str(root), "etc/name", 100)
    assert len(calls) == 128 and open_descriptors() == before


@pytest.mark.parametrize(
    "path, reason",
    [
        ("out", "No such file"), ("etc/back", "No such file"), ("endless", "Too many levels"),
        ("fifo", "it is not a regular file"), ("etc", "it is not a regular file"), ("etc/name/x", "Not a directory"),
    ],
)  # fmt: skip
def test_no_name_leads_out_of_the_root_and_no_fifo_is_waited_for(root, path, reason):
    before = open_descriptors()
    with pytest.raises(runx.Error, match=f"cannot read {path} of the container: {reason}"):
        runx.read_in_root(str(root), path, 100)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "path, names",
    [
        ("/", []), ("..", []), ("etc//./name", ["etc", "name"]), ("absolute", ["etc", "name"]),
        ("up", ["etc", "name"]), ("nothing/x", ["new", "place", "x"]), ("missing/../etc", ["etc"]),
        ("etc/back", ["secret"]), ("folder/../fifo", ["fifo"]), ("a/b/c/../d", ["a", "b", "d"]),
    ],
)  # fmt: skip
def test_links_are_resolved_below_the_root(root, path, names):
    assert runx.resolve_in_root(str(root), path) == names


def test_links_may_lead_on_as_often_as_for_the_kernel(root):
    for number in range(41):
        (root / f"l{number}").symlink_to(f"l{number + 1}" if number < 40 else "etc")
    assert runx.resolve_in_root(str(root), "l1") == ["etc"]
    with raised(errno.ELOOP):
        runx.resolve_in_root(str(root), "l0")


def test_links_and_paths_that_are_longer_together_than_a_path_may_be_lead_nowhere(root):
    """An image's could keep dom0 busy for hours, whose kernel takes each by itself."""
    (root / "l0").symlink_to("/l1/" + "a/" * 1000)
    (root / "l1").symlink_to("/l2/" + "a/" * 1000)
    assert len(runx.resolve_in_root(str(root), "l1")) == 1001
    for path in ("l0/a/a" + "/a" * 100, "a/" * 2100):
        with raised(errno.ELOOP):
            runx.resolve_in_root(str(root), path)


@pytest.mark.parametrize(
    "path, folder, made",
    [
        ("a/b/c", True, "a/b/c"), ("a/b/c", False, "a/b/c"), ("nothing", False, "new/place"),
        ("../x", True, "x"), ("out", False, None), ("etc/name", False, "etc/name"), ("etc", True, "etc"),
    ],
)  # fmt: skip
def test_what_is_missing_for_a_mount_is_made_below_the_root(root, path, folder, made):
    made = str(root) + str(root.parent / "secret") if made is None else str(root / made)
    with runx.find_in_root(str(root), path, folder, make=True) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == made
        assert stat.S_ISDIR(os.fstat(fd).st_mode) == folder
    assert sorted(os.listdir(root.parent)) == ["root", "secret"]
    mode = os.stat(made).st_mode & 0o777
    assert mode == (0o755 if folder else 0o644)


def test_nothing_is_made_where_nothing_is_to_be(root):
    before = open_descriptors()
    with raised(errno.ENOENT):
        runx.find_in_root(str(root), "a/b", True, make=False)
    with raised(errno.ENOTDIR):
        runx.find_in_root(str(root), "etc/name/below", True, make=False)
    assert not (root / "a").exists() and open_descriptors() == before


# ---- mounts


@pytest.mark.parametrize("flags", [0, runx.MS_RDONLY, runx.RECURSIVE_RO | runx.MS_RDONLY])
def test_a_mount_for_the_guest_has_no_devices_and_is_as_writable_as_said(tmp_path, flags):
    def work():
        runx.mount("tmpfs", str(tmp_path), 0, "tmpfs")
        (tmp_path / "below").mkdir()
        runx.mount("tmpfs", str(tmp_path / "below"), 0, "tmpfs")
        runx.restrict(str(tmp_path), flags)
        return [os.statvfs(path).f_flag & 7 for path in (tmp_path, tmp_path / "below")]

    top = os.ST_NODEV | os.ST_NOSUID | (os.ST_RDONLY if flags else 0)
    below = os.ST_NODEV | os.ST_NOSUID | (os.ST_RDONLY if flags & runx.RECURSIVE_RO else 0)
    assert in_own_mounts(work) == [top, below]


def test_what_is_read_only_stays_so(tmp_path):
    def work():
        runx.mount("tmpfs", str(tmp_path), runx.MS_RDONLY | runx.MS_NOEXEC, "tmpfs")
        runx.restrict(str(tmp_path))
        return os.statvfs(tmp_path).f_flag & 15

    assert in_own_mounts(work) == os.ST_RDONLY | os.ST_NODEV | os.ST_NOSUID | os.ST_NOEXEC


@pytest.mark.parametrize("calls", ["new", "old"])
def test_what_is_to_be_written_is_so_also_where_its_source_is_read_only(container, monkeypatch, calls):
    volume, read_only = container.volume, runx.MS_RDONLY
    container.config.mounts = [
        mount_entry("/data", source=volume, kept=kept, place=f"mounts/{number}")
        for number, kept in enumerate((0, read_only))
    ]
    if calls == "old":
        without_new_calls(monkeypatch)

    def work():
        runx.mount(str(volume), str(volume), runx.MS_BIND)
        runx.mount(None, str(volume), runx.MS_BIND | runx.MS_REMOUNT | read_only)
        runx.build_share(container.share, container.config)
        paths = (str(volume), f"{container.share}/mounts/0", f"{container.share}/mounts/1")
        return [os.statvfs(path).f_flag & os.ST_RDONLY for path in paths]

    assert in_own_mounts(work) == [read_only, 0, read_only]


def without_new_calls(monkeypatch, number=errno.ENOSYS):
    call = runx.system_call

    def refuse(name, *args):
        if name == "syscall":
            raise OSError(number, os.strerror(number))
        return call(name, *args)

    monkeypatch.setattr(runx, "system_call", refuse)


def test_an_older_kernel_restricts_the_mount_itself(tmp_path, monkeypatch):
    without_new_calls(monkeypatch)

    def work():
        runx.mount("tmpfs", str(tmp_path), runx.MS_NOEXEC, "tmpfs")
        runx.restrict(str(tmp_path), runx.MS_RDONLY)
        return os.statvfs(tmp_path).f_flag & 15

    assert in_own_mounts(work) == os.ST_NODEV | os.ST_NOSUID | os.ST_RDONLY | os.ST_NOEXEC
    with pytest.raises(runx.Error, match=f"cannot restrict the mount {tmp_path}: Function not"):
        runx.restrict(str(tmp_path), runx.RECURSIVE_RO)
    without_new_calls(monkeypatch, errno.EINVAL)
    with pytest.raises(runx.Error, match=f"cannot restrict the mount {tmp_path}: Invalid"):
        runx.restrict(str(tmp_path))


def test_a_mount_that_fails_says_which_and_why(tmp_path):
    with pytest.raises(runx.Error, match="^cannot mount x at /no/such: No such file or directory$"):
        runx.mount("x", "/no/such", runx.MS_BIND)
    with pytest.raises(runx.Error, match=f"^cannot mount x at {tmp_path}: neither VM nor dom0 has a type nofs$"):
        runx.mount("x", str(tmp_path), 0, "nofs")
    with pytest.raises(runx.Error, match=f"^cannot change the mount {tmp_path}: Invalid argument$"):
        runx.mount(None, str(tmp_path), runx.MS_REC | runx.MS_PRIVATE)


def test_what_is_discarded_is_unmounted_before(tmp_path):
    def work():
        (tmp_path / "file").write_text("below")
        runx.mount("/dev/null", str(tmp_path / "file"), runx.MS_BIND)
        runx.discard(str(tmp_path / "file"))
        runx.discard(str(tmp_path / "file"))
        runx.mount("tmpfs", str(tmp_path), 0, "tmpfs")
        with open(tmp_path / "busy", "wb"):
            runx.detach(str(tmp_path))
        runx.detach(str(tmp_path))
        return os.listdir(tmp_path)

    assert in_own_mounts(work) == []


MOUNTINFO = """\
1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
2 1 0:5 / /with\\040blank\\011tab\\134 ro,nosuid - tmpfs tmpfs rw,size=4k
3 1 7:3 /sub /with\\040blank\\011tab\\134 rw,noatime shared:2 master:1 - xfs /dev/loop3 ro
4 1 0:6 / /a\rb rw - tmpfs tmpfs rw
"""


def test_a_table_of_mounts_is_read_and_the_last_one_is_seen(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    found = list(runx.host_mounts(f"..{tmp_path}"))
    target = "/with blank\ttab\\"
    assert [vars(entry) for entry in found] == [
        {"device": os.makedev(8, 1), "root": "/", "target": "/", "options": ["rw", "relatime"], "kind": "ext4",
         "of_all": ["rw", "errors=remount-ro"]},
        {"device": 5, "root": "/", "target": target, "options": ["ro", "nosuid"], "kind": "tmpfs",
         "of_all": ["rw", "size=4k"]},
        {"device": os.makedev(7, 3), "root": "/sub", "target": target, "options": ["rw", "noatime"], "kind": "xfs",
         "of_all": ["ro"]},
        {"device": 6, "root": "/", "target": "/a\rb", "options": ["rw"], "kind": "tmpfs", "of_all": ["rw"]},
    ]  # fmt: skip
    monkeypatch.setattr(runx, "host_mounts", lambda: iter(found))
    assert runx.top_mount(target) is found[2]
    assert runx.top_mount("/with") is None


# ---- the share


@pytest.fixture
def container(root, tmp_path):
    """A config with mounts of each kind; and the folder that is shared."""
    volume, note = tmp_path / "volume", tmp_path / "note"
    (volume / "deep").mkdir(parents=True)
    (volume / "file").write_text("of the volume")
    note.write_text("of the note")
    mounts = [
        mount_entry("/proc", "proc", "proc", 0),
        mount_entry("/data", source=volume),
        mount_entry("/folder/note", source=note, flags=runx.MS_BIND | runx.MS_RDONLY),
        mount_entry("/proc/below", source=volume),
        mount_entry("/own", "tmpfs", "tmpfs", 0),
        mount_entry("/own/below", source=volume),
        mount_entry("/fifo", source=volume),
    ]
    for number, entry in enumerate(filter(runx.Mount.on_host, mounts)):
        entry.place = f"mounts/{number}"
    config = SimpleNamespace(
        rootfs=str(root), mounts=mounts, readonly=False, machine=SimpleNamespace(rootfs="auto", own_init=False),
        linux=SimpleNamespace(devices=[]), process=SimpleNamespace(cwd="/task/deep"), netconf=[],
    )  # fmt: skip
    return SimpleNamespace(config=config, share=str(tmp_path / "share"), volume=volume)


def test_the_share_has_the_rootfs_and_what_dom0_mounts(container, tmp_path):
    share = tmp_path / "share"

    def work():
        runx.build_share(str(share), container.config)
        seen = [sorted(os.listdir(share)), sorted(os.listdir(share / "mounts"))]
        seen.append([(share / name).read_text() for name in ("rootfs/etc/name", "mounts/0/file", "mounts/1")])
        for name in ("new", "mounts/1", "rootfs/etc/new", "mounts/0/new"):
            try:
                (share / name).write_text("x")
                seen.append(name)
            except OSError as error:
                seen.append(error.errno)
        return seen, [entry.target for entry in runx.host_mounts() if entry.target.startswith(str(share))]

    seen, targets = in_own_mounts(work)
    assert seen == [
        ["mounts", "rootfs"], ["0", "1", "2", "3", "4"], ["inside", "of the volume", "of the note"],
        errno.EROFS, errno.EROFS, "rootfs/etc/new", "mounts/0/new",
    ]  # fmt: skip
    assert len(targets) == 7
    assert sorted(os.listdir(share)) == ["mounts", "rootfs"] and os.listdir(share / "rootfs") == []


def written(container):
    """What comes of writing to the share's rootfs and to a volume, an errno or None; what is new in the rootfs; and the
    options of each tmpfs."""
    before = {str(path) for path in pathlib.Path(container.config.rootfs).rglob("*")}

    def work():
        runx.build_share(container.share, container.config)
        results = []
        for path in ("rootfs/new", "mounts/0/new"):
            try:
                pathlib.Path(container.share, path).touch()
                results.append(None)
            except OSError as error:
                results.append(error.errno)
        return results, {each.destination: each.data for each in container.config.mounts if each.type == "tmpfs"}

    results, options = in_own_mounts(work)
    new = {str(path) for path in pathlib.Path(container.config.rootfs).rglob("*")} - before
    return results, sorted(path[len(container.config.rootfs) :] for path in new), options


def test_a_read_only_rootfs_cannot_be_written_by_any_guest_and_has_the_places_for_its_mounts(container):
    container.config.readonly = True
    container.config.mounts.insert(0, mount_entry("/dev", "tmpfs", "tmpfs", 0))
    container.config.mounts.append(mount_entry("/dev/pts", "devpts", "devpts", 0))
    container.config.linux.devices = [("/dev/fuse", 0o20666, 10, 229, 0, 0)]
    pathlib.Path(container.config.rootfs, "old").mkdir()
    container.config.mounts.append(mount_entry("/old", "tmpfs", "tmpfs", 0, data="size=1m"))
    next(each for each in container.config.mounts if each.destination == "/own").data = "size=1m"
    container.config.netconf = [("NETCONF", "/file", "net", "")]
    before = os.umask(0o077)
    try:
        results, made, options = written(container)
    finally:
        os.umask(before)
    assert results == [errno.EROFS, None]
    # the mode is that of a tmpfs where nothing is below it
    assert options == {"/dev": "mode=1777", "/own": "size=1m,mode=1777", "/old": "size=1m"}
    assert made == ["/data", "/dev", "/etc/note", "/etc/resolv.conf", "/own", "/proc", "/task", "/task/deep"]
    root = pathlib.Path(container.config.rootfs)
    assert (root / "etc/note").is_file() and (root / "task/deep").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("case", ["nodes", "a node elsewhere", "not asked for", "in memory", "its own init", "links"])
def test_who_makes_more_than_places_for_mounts_in_the_rootfs_may_write_there(container, case):
    config = container.config
    config.readonly = case != "not asked for"
    if case != "nodes":
        config.mounts.insert(0, mount_entry("/dev", "tmpfs", "tmpfs", 0))
    if case == "a node elsewhere":
        config.linux.devices = [("/srv/node", 0o20666, 1, 3, 0, 0)]
    config.machine.rootfs = "ramdisk" if case == "in memory" else "9p"
    config.machine.own_init = case == "its own init"
    if case == "links":  # an image's do not keep it writable
        os.symlink("dev", f"{config.rootfs}/dev")
        os.symlink("etc/name", f"{config.rootfs}/own")
        config.process.cwd = "/dev"
    results, made, _ = written(container)
    assert results[0] == (errno.EROFS if case in ("its own init", "links") else None)
    assert made == (["/data", "/etc/note", "/proc"] if case == "links" else ["/new"] * (results[0] is None))


def test_a_share_without_a_folder_as_rootfs_and_with_a_file_system_of_dom0s(tmp_path):
    flags = runx.MS_NOEXEC | runx.MS_RDONLY
    mounts = [mount_entry("/x", "ramfs-of-dom0", "", flags, data="size=1m", place="mounts/0")]
    config = SimpleNamespace(rootfs=str(tmp_path / "image"), mounts=mounts)
    calls = []

    def work():
        real = runx.mount

        def mount(*args):
            calls.append(args)
            real(*(["tmpfs", *args[1:3], "tmpfs", args[4]] if args[0] == "ramfs-of-dom0" else args))

        runx.mount = mount
        runx.build_share(str(tmp_path / "share"), config)
        return calls

    target = str(tmp_path / "share/mounts/0")
    expected = ("ramfs-of-dom0", target, flags, "ramfs-of-dom0", "size=1m")
    done = in_own_mounts(work)
    assert expected in done and (None, target, runx.MS_REC | runx.MS_PRIVATE) in done
    assert not [call for call in done if call[1].endswith("rootfs")]


@pytest.mark.parametrize("propagation", [0, runx.MS_SLAVE])
def test_what_the_host_mounts_later_arrives_only_where_that_is_asked_for(container, tmp_path, propagation):
    volume = container.volume
    container.config.mounts = [mount_entry("/data", source=volume, propagation=propagation, place="mounts/0")]

    def work():
        runx.mount(str(volume), str(volume), runx.MS_BIND)
        runx.mount(None, str(volume), runx.MS_SHARED)
        ready, done = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            runx.build_share(container.share, container.config)
            os.write(ready[1], b"+")
            os.read(done[0], 1)
            arrived = os.path.ismount(f"{container.share}/mounts/0/deep")
            os._exit(arrived)
        os.read(ready[0], 1)
        runx.mount("tmpfs", str(volume / "deep"), 0, "tmpfs")
        os.write(done[1], b"+")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_own_mounts(work) == bool(propagation)


def changed_root(container, exported):
    """What is seen after change_root(): {path: content of a file, names in a folder, or errno}."""
    paths = ("/", "/data/file", "/etc/note", "/proc", "/own", "/fifo", str(container.volume), "/data", "/..")

    def look(path):
        try:
            if os.path.isdir(path):
                return sorted(os.listdir(path))
            return pathlib.Path(path).read_text() if os.path.isfile(path) else "neither"
        except OSError as error:
            return error.errno

    def work():
        runx.build_share(container.share, container.config)
        runx.change_root(container.share, container.config, exported)
        found = {path: look(path) for path in paths}
        try:
            pathlib.Path("/written").write_text("x")
        except OSError as error:
            found["written"] = error.errno
        return found, os.getcwd(), len(os.listdir("/")), sum(name.isdigit() for name in os.listdir("."))

    return in_own_mounts(work)


def test_the_holders_root_is_the_containers_files_and_nothing_of_dom0s(container):
    found, folder, _, _ = changed_root(container, True)
    assert found["/data/file"] == "of the volume" and found["/etc/note"] == "of the note"
    assert found["/data"] == ["deep", "file"]
    assert "written" not in found and os.path.exists(f"{container.config.rootfs}/written")
    # nothing is made in the image for what is in the VM only, nor for what is mounted there
    assert found["/"] == found["/.."] and "own" not in found["/"] and "proc" not in found["/"]
    assert found["/fifo"] == "neither" and found[str(container.volume)] == "neither"
    assert folder == "/"


def test_an_empty_folder_hides_what_the_image_has_where_the_vm_mounts(container):
    for name in ("proc/1", "own"):
        pathlib.Path(container.config.rootfs, name).mkdir(parents=True)
    found, *_ = changed_root(container, True)
    assert found["/proc"] == found["/own"] == []


@pytest.mark.parametrize("is_sealed", [True, False])
def test_the_holders_root_is_as_read_only_as_the_containers(container, is_sealed):
    container.config.readonly = True
    container.config.mounts += [mount_entry("/dev", "tmpfs", "tmpfs", 0)] * is_sealed
    found = changed_root(container, True)[0]
    assert (found["written"], found["/data/file"], found["/etc/note"]) == (errno.EROFS, "of the volume", "of the note")


def test_without_the_files_the_holders_root_is_empty(container):
    found, folder, names, _ = changed_root(container, False)
    assert (found["/"], found["/.."], names, folder, found["written"]) == ([], [], 0, "/", errno.EROFS)


def test_a_dom0_in_its_initramfs_moves_the_root(monkeypatch, tmp_path):
    done = []

    def call(name, *args):
        done.append((name, *args))
        if name == "pivot_root":
            raise OSError(failure, "")
        return 0

    monkeypatch.setattr(runx, "system_call", call)
    monkeypatch.setattr(runx.os, "chdir", lambda path: done.append(("chdir", path)))
    failure = errno.EPERM
    with pytest.raises(OSError):
        runx.pivot_root()
    assert done.pop() == ("pivot_root", ".", ".") and not done
    failure = errno.EINVAL
    runx.pivot_root()
    assert done[1:] == [("mount", ".", "/", None, runx.MS_MOVE, None), ("chroot", "."), ("chdir", "/")]


def test_no_namespace_is_an_error_of_its_own(monkeypatch, container):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(runx, "system_call", refuse)
    with pytest.raises(runx.Error, match="cannot make a mount namespace: Operation not permitted"):
        runx.build_share(container.share, container.config)
    with pytest.raises(runx.Error, match="the root of its mount namespace: Operation not permitted"):
        runx.change_root(container.share, container.config, True)


# ---- ramdisks


def packed(folder, memory=64):
    output = io.BytesIO()
    capabilities = runx.pack_share(output, str(folder), memory)
    return output.getvalue(), capabilities


def fields(archive, name):
    """The 13 numbers of a member's header."""
    start = archive.index(name.encode() + b"\0") - 110
    return [int(archive[start + 6 + 8 * n : start + 14 + 8 * n], 16) for n in range(13)]


def test_a_member_has_all_of_the_files_status(root):
    path = root / "etc/name"
    os.chown(path, 12, 34)
    path.chmod(0o4755)
    os.utime(path, (1, 981158400))
    os.link(path, root / "same")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    archive, _ = packed(root)
    inode, *rest = fields(archive, "mnt/same")
    assert rest == [0o104755, 12, 34, 2, 981158400, 6, 0, 0, 0, 0, 9, 0]
    assert fields(archive, "mnt/etc/name")[:7] == [inode, 0o104755, 12, 34, 2, 981158400, 0]
    assert fields(archive, "mnt/null")[1] & 0o170000 == 0o020000 and fields(archive, "mnt/null")[9:11] == [1, 3]
    assert fields(archive, "mnt")[:7] == [0, 0o40755, 0, 0, 1, 0, 0]
    assert fields(archive, "TRAILER!!!") == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0]
    found = {name: data for name, _, data in members(archive)}
    assert found["mnt/absolute"] == b"/etc/name" and "mnt/folder/name" not in found
    inodes = [fields(archive, name)[0] for name in found if name not in ("mnt/same", "mnt/etc/name")]
    assert len(set(inodes)) == len(inodes)


def test_an_archive_is_the_same_to_the_byte():
    def member(name, inode, mode, links, size, length, rdev="0" * 16):
        numbers = f"{inode:08X}{mode:08X}{0:016X}{links:08X}{0:08X}{size:08X}{0:016X}{rdev}{length:08X}{0:08X}"
        return b"070701" + numbers.encode() + name

    expected = member(b"a\0", 1, 0o100644, 1, 3, 2) + b"xyz\0"
    expected += member(b"null\0\0", 2, 0o20666, 1, 0, 5, "0000000100000003") + b""
    expected += member(b"TRAILER!!!\0", 0, 0, 1, 0, 11) + b"\0\0\0"
    archive = b"".join(runx.cpio_members([("a", 0o100644, b"xyz", 0), ("null", 0o20666, b"", os.makedev(1, 3))]))
    assert archive.hex() == expected.hex()


def test_times_before_1970_and_names_and_sizes_have_bounds():
    assert b"%08X" % 0 == runx.cpio_header("x", 0, 0, mtime=-5)[46:54]
    assert len(runx.cpio_header("x" * 4095, 0, 2**32 - 1)) % 4 == 0
    with pytest.raises(runx.Error, match="cannot pack x: the archive format ends at 4 GiB"):
        runx.cpio_header("x", 0, 2**32)
    with pytest.raises(runx.Error, match="cannot pack x{100}...: its path is longer than the 4096 bytes"):
        runx.cpio_header("x" * 4096, 0, 0)


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def test_capabilities_of_programs_are_told(root):
    for name, mode in (("tool", 0o755), ("others", 0o601), ("data", 0o644)):
        (root / name).write_text("x")
        (root / name).chmod(mode)
        os.setxattr(root / name, "security.capability", CAPABILITY)
    (root / "other").write_text("x")
    (root / "other").chmod(0o755)
    assert packed(root)[1] == {"tool": CAPABILITY, "others": CAPABILITY}


def test_of_many_programs_with_capabilities_dom0_does_not_keep_the_paths(root, monkeypatch):
    monkeypatch.setattr(runx, "capability_of", lambda file: CAPABILITY)
    monkeypatch.setattr(runx, "CAPABLE_MAX", 2)
    for name in ("one", "two", "three"):
        assert len(packed(root)[1]) < 3
        (root / name).touch(0o755)
    with pytest.raises(runx.Error, match="^the rootfs has more than 2 programs with capabilities: use"):
        packed(root)


def test_a_file_system_without_capabilities_has_none_and_other_errors_count(root, monkeypatch):
    (root / "tool").write_text("x")
    (root / "tool").chmod(0o755)
    number = errno.EOPNOTSUPP

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runx.os, "getxattr", refuse)
    assert packed(root)[1] == {}
    number = errno.EIO
    with pytest.raises(runx.Error, match="cannot pack tool: Input/output error"):
        packed(root)


def test_what_a_share_needs_is_told_to_the_mebibyte(tmp_path):
    share = tmp_path / "share"
    share.mkdir()
    with open(share / "large", "wb") as file:
        file.truncate(10 << 20)
    # 18 MiB, three times the file with its inode, rounded up
    with pytest.raises(runx.Error, match="need a VM of 49 MiB to be in its memory, and it has 48: raise"):
        packed(share, 48)
    assert len(packed(share, 49)[0]) > 10 << 20


def test_many_small_files_need_a_page_each(tmp_path, monkeypatch):
    share = tmp_path / "share"
    share.mkdir()
    for number in range(600):
        (share / str(number)).touch()
    # 600 inodes of 1 KiB, and 600 pages twice
    with pytest.raises(runx.Error, match="need a VM of 24 MiB .* it has 23"):
        packed(share, 23)
    packed(share, 24)
    monkeypatch.setattr(runx, "SHARE_MAX", 600)
    packed(share, 24)
    monkeypatch.setattr(runx, "SHARE_MAX", 599)
    with pytest.raises(runx.Error, match="have more than 599 files: use org.runx.rootfs=9p"):
        packed(share, 24)


def count_names(monkeypatch):
    """A list of all names of folders that are read from now on."""
    read, scandir = [], os.scandir

    @contextlib.contextmanager
    def scan(folder):
        with scandir(folder) as entries:
            yield (read.append(entry.name) or entry for entry in entries)

    monkeypatch.setattr(runx.os, "scandir", scan)
    return read


def test_of_a_folder_with_millions_of_names_dom0_reads_what_counts(tmp_path, monkeypatch):
    modules = tmp_path / "lib/modules"
    modules.mkdir(parents=True)
    for number in range(200):
        (modules / str(number)).touch()
    read = count_names(monkeypatch)
    monkeypatch.setattr(runx, "SHARE_MAX", 150)
    with pytest.raises(runx.Error, match="have more than 150 files"):
        packed(tmp_path)
    assert len(read) == 151
    read.clear()
    assert runx.kernel_modules(str(tmp_path), "/boot/vmlinuz", ("9p",)) == []
    assert len(read) == runx.FOLDERS_MAX


def test_many_folders_in_a_deep_one_do_not_each_take_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(15):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    for number in range(500):
        os.mkdir(str(number))
    tracemalloc.start()
    try:
        assert sum(1 for _ in runx.walk(str(tmp_path))) == 515
        assert tracemalloc.get_traced_memory()[1] < 500 * 15 * 250 // 4
    finally:
        tracemalloc.stop()


def change_while_packing(monkeypatch, root, name, change):
    """Have change() run when walk() has come to a member, and before that is packed."""
    walk = runx.walk

    def interrupted(share):
        for member in walk(share):
            if member.name == name:
                change(root / "etc" / name)
            yield member

    monkeypatch.setattr(runx, "walk", interrupted)


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "change, reason", [(replace_by_fifo, "Stale file handle"), (replace_by_link, "Too many levels of symbolic links")]
)
def test_a_file_that_becomes_another_thing_is_not_followed(root, monkeypatch, change, reason):
    change_while_packing(monkeypatch, root, "name", change)
    before = len(open_descriptors())
    with pytest.raises(runx.Error, match=f"cannot pack etc/name: {reason}"):
        packed(root)
    assert len(open_descriptors()) == before


def test_a_file_that_grows_or_shrinks_is_packed_as_it_was(root, monkeypatch):
    change_while_packing(monkeypatch, root, "name", lambda path: path.write_text("in"))
    assert {name: data for name, _, data in members(packed(root)[0])}["mnt/etc/name"] == b"in\0\0\0\0"
    (root / "etc/name").write_text("inside")
    change_while_packing(monkeypatch, root, "name", lambda path: path.write_text("inside and more"))
    assert {name: data for name, _, data in members(packed(root)[0])}["mnt/etc/name"] == b"inside"


def test_a_folder_that_is_listed_again_as_a_link_is_packed_once(root, monkeypatch):
    """Others may exchange them in a volume, and some file systems list last what is new.  The kernel would follow that
    link when it unpacks what is in the folder."""
    folder, scandir = root / "etc/folder", os.scandir
    folder.mkdir()
    (folder / "file").touch()

    @contextlib.contextmanager
    def listed(fd):
        with scandir(fd) as entries:
            yield exchanged([*entries])

    def exchanged(entries):
        yield from entries
        if "folder" in [entry.name for entry in entries] and not folder.is_symlink():
            folder.rename(root / "etc/away")
            folder.symlink_to("/")
            with scandir(root / "etc") as again:
                yield from (entry for entry in again if entry.name == "folder")
            folder.unlink()
            (root / "etc/away").rename(folder)

    (root / "folder").unlink()
    monkeypatch.setattr(os, "scandir", listed)
    found = [(name, stat.S_IFMT(mode)) for name, mode, _ in members(packed(root)[0]) if "etc/folder" in name]
    assert found == [("mnt/etc/folder", stat.S_IFDIR), ("mnt/etc/folder/file", stat.S_IFREG)]


def test_a_file_that_goes_is_left_out(root, monkeypatch):
    change_while_packing(monkeypatch, root, "name", lambda path: path.unlink())
    names = [name for name, *_ in members(packed(root)[0])]
    assert "mnt/etc/name" not in names and "mnt/etc/back" in names


def replace_by_file(path):
    (path.parent / "new").write_text("of another")
    (path.parent / "new").rename(path)


@pytest.mark.parametrize("change", [lambda path: path.rename(path.parent / "0"), pathlib.Path.unlink, replace_by_file])
def test_another_name_of_a_file_that_goes_has_its_content(root, monkeypatch, change):
    os.link(root / "etc/name", root / "etc/same")
    os.link(root / "etc/name", root / "etc/third")
    change_while_packing(monkeypatch, root, "name", change)
    archive = packed(root)[0]
    found = {name: data for name, _, data in members(archive)}
    assert (found["mnt/etc/same"], found["mnt/etc/third"]) == (b"inside", b"")
    inodes = {name: fields(archive, name)[0] for name in found}
    assert inodes["mnt/etc/same"] == inodes["mnt/etc/third"] != inodes.get("mnt/etc/name")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(runx.Error, match=f"cannot pack {tmp_path}/none/: No such file"):
        runx.pack_initrd(str(tmp_path / "none"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(runx, "system_call", lambda *_: (_ for _ in ()).throw(OSError(errno.EACCES, "denied")))
    with pytest.raises(runx.Error, match="cannot pack .*: denied"):
        list(runx.walk(str(tmp_path)))


# ---- block devices


def image(folder, kind):
    offset, magic = {name: (at, magic) for name, at, magic in runx.FILE_SYSTEMS}[kind]
    path = folder / f"image.{kind}"
    path.write_bytes(bytes(offset) + magic + bytes(4096))
    return path


@pytest.mark.parametrize("kind", ["ext4", "squashfs", "erofs"])
def test_a_file_system_is_told_by_its_superblock(tmp_path, kind):
    assert runx.file_system(str(image(tmp_path, kind))) == kind


def test_an_ext4_of_mkfs_is_known(tmp_path):
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", str(tmp_path / "image"), "1m"], check=True)
    assert runx.file_system(str(tmp_path / "image")) == "ext4"


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(100))
    with pytest.raises(runx.Error, match="zeros holds no file system .*: make it one of ext4, squashfs, erofs"):
        runx.file_system(str(tmp_path / "zeros"))
    with pytest.raises(runx.Error, match="cannot read the image .*/none: No such file"):
        runx.file_system(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "kind, readonly, mode, writable",
    [("ext4", False, 0o644, True), ("ext4", True, 0o644, False), ("ext4", False, 0o444, False),
     ("squashfs", False, 0o644, False)],
)  # fmt: skip
def test_an_image_is_writable_if_all_agree(tmp_path, kind, readonly, mode, writable):
    path = image(tmp_path, kind)
    path.chmod(mode)
    disk = runx.find_disk(SimpleNamespace(rootfs=str(path), readonly=readonly))
    assert vars(disk) == {"path": str(path), "kind": kind, "writable": writable, "mounted": []}


LOOP3 = os.makedev(7, 3)


def host_mount(target, device=LOOP3, **others):
    entry = {"root": "/", "options": ["rw"], "kind": "ext4", "of_all": ["rw"], **others}
    return record(runx.HostMount, device=device, target=str(target), **entry)


@pytest.mark.parametrize(
    "options, of_all, writable, mounted",
    [
        (["rw", "noatime", "nosuid"], ["rw", "seclabel", "commit=7", "x=y"], True,
         [runx.MOUNT_OPTIONS["noatime"][0] | runx.MS_NOSUID, "commit=7,x=y"]),
        (["ro"], ["rw"], False, [runx.MS_RDONLY, ""]),
        (["ro"], ["ro"], False, []),
    ],
)  # fmt: skip
def test_a_mounted_block_device_is_found_with_how_it_is_mounted(
    tmp_path, monkeypatch, options, of_all, writable, mounted
):
    entry, path = host_mount(tmp_path, options=options, of_all=of_all), image(tmp_path, "ext4")
    monkeypatch.setattr(runx, "top_mount", lambda target: entry if target == str(tmp_path) else None)
    monkeypatch.setattr(runx, "device_path", lambda device: str(path) if device == entry.device else None)
    disk = runx.find_disk(SimpleNamespace(rootfs=str(tmp_path), readonly=False))
    mounted = mounted and [str(tmp_path), *mounted]
    assert vars(disk) == {"path": str(path), "kind": "ext4", "writable": writable, "mounted": mounted}


@pytest.mark.parametrize(
    "top, what",
    [(None, "a folder"), (host_mount("/", root="/sub"), "a mount of ext4"),
     (host_mount("/", device=5, kind="tmpfs"), "a mount of tmpfs")],
)  # fmt: skip
def test_what_no_block_device_is_mounted_at_is_refused(tmp_path, monkeypatch, top, what):
    monkeypatch.setattr(runx, "top_mount", lambda target: top)
    with pytest.raises(runx.Error, match=f"is {what}, not where a block device is mounted: use org"):
        runx.find_disk(SimpleNamespace(rootfs=str(tmp_path), readonly=False))


def test_a_block_device_has_a_name():
    name = os.listdir("/sys/class/block")[0]
    major, minor = pathlib.Path(f"/sys/class/block/{name}/dev").read_text().split(":")
    assert runx.device_path(os.makedev(int(major), int(minor))) == f"/dev/{name}"
    with pytest.raises(runx.Error, match="cannot find the block device 4095:77 in /sys"):
        runx.device_path(os.makedev(4095, 77))


def make_disk(path="/image", writable=False, mounted=()):
    return runx.Disk(path=str(path), kind="ext4", writable=writable, mounted=list(mounted))


class Loops:
    """A dom0 with loop devices, of which the first one is taken from under us; calls: of ioctl(2)."""

    def __init__(self, monkeypatch, folder, busy=errno.EBUSY, then=4):
        self.calls, self.opened, self.busy, self.number, self.then = [], [], busy, 3, then
        (folder / "loops").mkdir()
        for name in ("loop-control", "loop3", "loop4"):
            (folder / "loops" / name).touch()
        real_open, real_os_open = open, os.open

        def place(path):
            path = str(path)
            return str(folder / "loops" / path[5:]) if path.startswith("/dev/loop") else path

        def os_open(path, flags, *args, **others):
            self.opened.append((path, flags))
            return real_os_open(place(path), flags, *args, **others)

        monkeypatch.setattr(runx.os, "open", os_open)
        monkeypatch.setattr(runx, "open", lambda path, *args: real_open(place(path), *args), raising=False)
        monkeypatch.setattr(runx.fcntl, "ioctl", self.ioctl)

    def ioctl(self, fd, request, argument=0):
        if request == runx.LOOP_CTL_GET_FREE:
            return self.number
        assert request == runx.LOOP_CONFIGURE and len(self.calls) < 1000
        self.calls.append((os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2], argument))
        if self.number == 3:
            self.number = self.then
            raise OSError(self.busy, os.strerror(self.busy))
        return 0


@pytest.mark.parametrize("writable", [True, False])
def test_an_image_goes_into_a_free_loop_device(tmp_path, monkeypatch, writable):
    path = image(tmp_path, "ext4")
    before = len(open_descriptors())
    loops = Loops(monkeypatch, tmp_path)
    with runx.open_disk(make_disk(path, writable)) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("/loop4")
        assert len(open_descriptors()) == before + 1
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    (first, _), (second, request) = loops.calls
    assert (first, second, len(request)) == ("loop3", "loop4", 304)  # struct loop_config
    flags = struct.unpack_from("=I", request, 4 + 4 + 52)[0]
    assert flags == (4 if writable else 5)  # LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY
    assert request[64:128].rstrip(b"\0") == os.fsencode(path)[:63]
    modes = [flags & os.O_ACCMODE for name, flags in loops.opened if "loop" in name or name == str(path)]
    assert set(modes) == {os.O_RDWR if writable else os.O_RDONLY}


def test_a_free_loop_device_that_somebody_holds_is_not_asked_for_without_end(tmp_path, monkeypatch):
    path = image(tmp_path, "ext4")
    before, slept = len(open_descriptors()), []
    loops = Loops(monkeypatch, tmp_path, then=3)
    monkeypatch.setattr(runx, "time", SimpleNamespace(sleep=slept.append))
    with pytest.raises(runx.Error, match=f"cannot put {path} into a loop device: Device or resource busy"):
        runx.open_disk(make_disk(path))
    assert len(loops.calls) == len(slept) == 100
    assert len(open_descriptors()) == before


def test_a_dom0_without_loop_devices_is_told_what_it_needs(tmp_path, monkeypatch):
    path = image(tmp_path, "ext4")
    before = len(open_descriptors())
    Loops(monkeypatch, tmp_path, busy=errno.EINVAL)
    with pytest.raises(runx.Error, match=f"cannot put {path} into a loop device: Invalid argument; is dom0's module"):
        runx.open_disk(make_disk(path))
    assert len(open_descriptors()) == before
    with pytest.raises(runx.Error, match="cannot open the block device .*/none: No such file"):
        runx.open_disk(make_disk(tmp_path / "none"))


def test_a_block_device_is_opened_as_it_is(tmp_path):
    os.mknod(tmp_path / "device", 0o60600, os.makedev(7, 200))
    try:
        with runx.open_disk(make_disk(tmp_path / "device")) as fd:
            assert stat.S_ISBLK(os.fstat(fd).st_mode)
    except runx.Error as error:
        assert "cannot open the block device" in str(error)  # there is none of that number


@pytest.mark.parametrize("writable, ro, refused", [(True, "1", True), (False, "0", True), (False, "1", False)])
def test_an_image_in_two_loop_devices_must_be_written_by_none(tmp_path, monkeypatch, writable, ro, refused):
    (tmp_path / "image").touch()
    (tmp_path / "other").touch()
    files = {"loop1": "image", "loop2": "image", "loop3": "other", "loop4": "gone", "sda": None}
    monkeypatch.setattr(runx, "device_path", lambda device: "/dev/loop1")
    monkeypatch.setattr(runx, "backing_file", lambda name: files[name] and str(tmp_path / files[name]) or "")
    monkeypatch.setattr(runx, "read_file", lambda path: ro if path == "/sys/block/loop2/ro" else "0")
    monkeypatch.setattr(runx.os, "listdir", lambda path: list(files))
    if refused:
        with pytest.raises(runx.Error, match=f"cannot give the image {tmp_path}/image to the VM: /dev/loop2 has it"):
            runx.check_image(make_disk(writable=writable), 1)
    else:
        runx.check_image(make_disk(writable=writable), 1)
    files["loop1"] = None
    runx.check_image(make_disk(writable=True), 1)  # no loop device at all


def test_the_image_in_a_loop_device_is_told_by_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/backing_file").write_bytes(b"/a b\r\xff\n")
    assert runx.backing_file(f"../..{tmp_path}") == "/a b\r\udcff"
    assert runx.backing_file("no-such-device") == ""


class Devices:
    """/dev and the mounts of processes, as check_unused() finds them."""

    def __init__(self, monkeypatch, tmp_path):
        self.node, self.mounts = tmp_path / "node", {"self": []}
        self.node.mkdir()  # cannot be opened for writing
        monkeypatch.setattr(runx, "device_path", lambda device: str(self.node))
        monkeypatch.setattr(runx, "host_mounts", self.of_process)

    def of_process(self, pid="self"):
        if pid not in self.mounts:
            raise FileNotFoundError
        return iter(self.mounts[pid])


def test_a_block_device_that_nobody_has_open_is_free(tmp_path, monkeypatch):
    devices = Devices(monkeypatch, tmp_path)
    devices.node.rmdir()
    devices.node.touch()
    opened = []
    real = os.open
    monkeypatch.setattr(runx.os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    for writable, mode in ((True, os.O_RDWR), (False, os.O_RDONLY)):
        runx.check_unused(make_disk(writable=writable), 1)
        assert opened.pop() == mode | os.O_EXCL


@pytest.mark.parametrize("writable, of_all, free", [(False, "ro", True), (False, "rw", False), (True, "ro", False)])
def test_a_block_device_that_dom0_has_mounted_too(tmp_path, monkeypatch, writable, of_all, free):
    devices = Devices(monkeypatch, tmp_path)
    if not writable:
        devices.node.rmdir()  # so that opening fails
    devices.mounts["self"] = [host_mount("/other", device=9), host_mount("/here", device=1, of_all=[of_all])]
    devices.mounts[str(os.getpid())] = devices.mounts["self"]
    if free:
        runx.check_unused(make_disk(writable=writable), 1)
        return
    reason = f"for process {os.getpid()} it is mounted at /here; unmount it there"
    with pytest.raises(runx.Error, match=f"cannot give /image to the VM, because dom0 uses it: {reason}"):
        runx.check_unused(make_disk(writable=writable), 1)


def test_a_block_device_in_use_by_nobody_knows_whom(tmp_path, monkeypatch):
    Devices(monkeypatch, tmp_path)
    with pytest.raises(runx.Error, match="because dom0 uses it: Is a directory"):
        runx.check_unused(make_disk(writable=True), 1)


class Store:
    """Enough of xenstore."""

    def __init__(self, **nodes):
        self.nodes = {name.replace("__", "/"): value for name, value in nodes.items()}

    def read(self, path, default=""):
        return self.nodes.get(path, default)

    def list(self, path):
        below = [name[len(path) + 1 :].split("/")[0] for name in self.nodes if name.startswith(path + "/")]
        return list(dict.fromkeys(below))

    def write_all(self, steps):
        self.nodes.update((path, value) for path, value in steps if isinstance(value, str))

    def transaction(self, work):
        work()


@pytest.fixture
def vbd(monkeypatch):
    monkeypatch.setattr(runx, "await_blkback", lambda *args: None)
    return runx.Device(runx.Domain(Store(__local__domain__5__vm="/vm/u"), 5, "u"), "vbd", runx.DISK)


def test_blkback_gets_the_block_device_and_the_guest_xvda(vbd):
    runx.announce_disk(vbd, make_disk(writable=True), os.makedev(7, 18))
    backend = "/local/domain/0/backend/vbd/5/51712"
    nodes = vbd.xenstore.nodes
    written = {
        "dev": "xvda", "type": "phy", "params": "/image", "physical-device": "7:12", "mode": "w", "removable": "0",
        "bootable": "1", "device-type": "disk", "hotplug-status": "connected", "online": "1", "state": "1",
        "frontend": "/local/domain/5/device/vbd/51712", "frontend-id": "5",
    }  # fmt: skip
    assert {name: nodes[f"{backend}/{name}"] for name in written} == written
    frontend = "/local/domain/5/device/vbd/51712"
    assert (nodes[f"{frontend}/virtual-device"], nodes[f"{frontend}/device-type"]) == ("51712", "disk")


@pytest.mark.parametrize("ours, theirs, refused", [(False, "r", False), (False, "w", True), (True, "r", True)])
def test_two_vms_have_one_block_device_only_if_neither_writes(vbd, ours, theirs, refused):
    other = "/local/domain/0/backend/vbd/3/51712"
    vbd.xenstore.nodes.update({f"{other}/physical-device": "7:12", f"{other}/mode": theirs})
    vbd.xenstore.nodes["/local/domain/0/backend/vbd/4/768/physical-device"] = "8:1"
    vbd.xenstore.nodes["/local/domain/0/backend/vbd/4/768/mode"] = "w"
    if refused:
        with pytest.raises(runx.Error, match="cannot give /image to the VM: domain 3 has it, and one could write"):
            runx.announce_disk(vbd, make_disk(writable=ours), os.makedev(7, 18))
    else:
        runx.announce_disk(vbd, make_disk(writable=ours), os.makedev(7, 18))
        assert vbd.xenstore.nodes["/local/domain/0/backend/vbd/5/51712/mode"] == "r"


def test_blkback_is_awaited_until_it_has_it_or_says_why_not(monkeypatch):
    store, looked, now = Store(), [], iter(range(0, 1000, 4))
    vbd = runx.Device(SimpleNamespace(domid=5, path="/local/domain/5", xenstore=store), "vbd", runx.DISK)
    monkeypatch.setattr(runx.os.path, "exists", lambda path: looked.append(path) or len(looked) > 2)
    monkeypatch.setattr(runx, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: next(now)))
    runx.await_blkback(vbd, make_disk())
    assert looked == ["/sys/bus/xen-backend/devices/vbd-5-51712/mode"] * 3
    monkeypatch.setattr(runx.os.path, "exists", lambda path: False)
    with pytest.raises(runx.Error, match="dom0's kernel has not opened /image for the VM: is its module xen-blkback"):
        runx.await_blkback(vbd, make_disk())
    store.nodes["/local/domain/0/error/backend/vbd/5/51712/error"] = "6 creating vbd structure"
    with pytest.raises(runx.Error, match="for the VM: it says 6 creating vbd structure"):
        runx.await_blkback(vbd, make_disk())


class Attachment:
    """attach_disk() with all that it calls noted."""

    def __init__(self, monkeypatch, disk, top, failing="", share="fuse"):
        self.done, self.undo = [], runx.Undo(SimpleNamespace(attempt=lambda what, work, *args: work(*args)))
        self.fd = os.open("/dev/null", os.O_RDONLY)
        number = os.fstat(self.fd).st_rdev
        top = top and host_mount("/mnt", device=number if top == "ours" else 1)

        def note(name):
            def call(*args):
                if name == "mount":
                    os.fstat(self.disk)  # closed, the loop device of a `mount -o loop` would be gone
                self.done.append((name, *args))
                if name == failing:
                    raise runx.Error(name)

            return call

        for name in ("mount", "check_image", "check_unused", "announce_disk"):
            monkeypatch.setattr(runx, name, note(name))
        monkeypatch.setattr(runx, "system_call", note("unmount"))
        monkeypatch.setattr(runx, "open_disk", self.open_disk)
        monkeypatch.setattr(runx, "top_mount", lambda target: top)
        self.domain = SimpleNamespace(domid=5, path="/local/domain/5", xenstore=Store())
        state = SimpleNamespace(disk=disk and vars(disk), devices=[["console", 1], [share, 0]])
        self.container = SimpleNamespace(
            state=state, acquire=lambda device: note("acquire")(device.number), release=note("release")
        )

    def open_disk(self, disk):
        self.disk = runx.Descriptor(os.dup(self.fd))
        return self.disk

    def run(self):
        try:
            with self.undo:
                runx.attach_disk(self.container, self.domain, self.undo)
        finally:
            os.close(self.fd)
        return [name for name, *_ in self.done]


MOUNTED = ["/mnt", runx.MOUNT_OPTIONS["noatime"][0], "commit=7"]


def test_a_mounted_disk_is_taken_from_dom0_before_it_is_the_vms(monkeypatch):
    attachment = Attachment(monkeypatch, make_disk("/dev/x", True, MOUNTED), "ours")
    before = len(open_descriptors())
    assert attachment.run() == ["unmount", "check_image", "check_unused", "acquire", "announce_disk"]
    assert attachment.done[3] == ("acquire", 51712)
    assert len(open_descriptors()) == before - 1


@pytest.mark.parametrize(
    "failing, share, writable",
    [("check_unused", "fuse", True), ("check_unused", "9pfs", True), ("announce_disk", "fuse", True),
     ("announce_disk", "9pfs", False)],
)  # fmt: skip
def test_a_disk_that_the_vm_does_not_get_is_mounted_again(monkeypatch, failing, share, writable):
    attachment = Attachment(monkeypatch, make_disk("/dev/x", writable, MOUNTED), "ours", failing, share)
    before = len(open_descriptors())
    with pytest.raises(runx.Error, match=failing):
        attachment.run()
    assert len(open_descriptors()) == before - 1
    assert attachment.done[-1] == ("mount", "/dev/x", "/mnt", runx.MOUNT_OPTIONS["noatime"][0], "ext4", "commit=7")


def test_a_disk_that_another_kernel_than_ours_has_seen_is_not_mounted_again(monkeypatch):
    """It may have written what dom0's kernel must not read, and may still do so."""
    attachment = Attachment(monkeypatch, make_disk("/dev/x", True, MOUNTED), "ours", "announce_disk", "9pfs")
    with pytest.raises(runx.Error, match="announce_disk"):
        attachment.run()
    assert [name for name, *_ in attachment.done][-2:] == ["announce_disk", "release"]


@pytest.mark.parametrize("mounted, top", [((), None), (MOUNTED, None), (MOUNTED, "another")])
def test_what_is_not_mounted_any_more_is_not_unmounted(monkeypatch, mounted, top):
    attachment = Attachment(monkeypatch, make_disk(mounted=mounted), top)
    assert attachment.run() == ["check_image", "check_unused", "acquire", "announce_disk"]


def test_no_disk_is_asked_for_or_its_name_is_taken(monkeypatch):
    assert Attachment(monkeypatch, None, None).run() == []
    attachment = Attachment(monkeypatch, make_disk(), None)
    attachment.domain.xenstore.nodes["/local/domain/5/device/vbd/51712/backend"] = "/x"
    with pytest.raises(runx.Error, match="as xvda: its settings for xl name a disk of that name"):
        attachment.run()
    assert attachment.done == []


def test_a_target_that_is_busy_is_not_the_vms(monkeypatch):
    attachment = Attachment(monkeypatch, make_disk("/dev/x", True, MOUNTED), "ours")
    monkeypatch.setattr(runx, "system_call", lambda *args: args == ("umount2", "/mnt", 0) and runx.refuse(errno.EBUSY))
    with pytest.raises(runx.Error, match="cannot unmount /mnt from dom0, which the VM's writing would ruin: Device or"):
        attachment.run()
    assert attachment.done == []


# ---- the ways


@pytest.fixture
def disks(monkeypatch):
    """Where find_disk() finds a Disk."""
    found = [make_disk()]

    def find(config):
        if not found:
            raise runx.Error("no disk")
        return found[0]

    monkeypatch.setattr(runx, "find_disk", find)
    return found


@pytest.mark.parametrize(
    "wanted, is_folder, volume, way",
    [
        ("9p", True, False, (True, False, False)),
        ("auto", True, False, (True, False, False)),
        ("auto", False, False, (False, True, True)),
        ("auto", False, True, (True, False, True)),
        ("block", True, True, (True, False, True)),
        ("block", True, False, (False, True, True)),
        ("ramdisk", True, True, (False, True, False)),
        ("none", True, True, (False, False, False)),
    ],
)  # fmt: skip
def test_the_way_is_the_one_that_is_asked_for(tmp_path, disks, wanted, is_folder, volume, way):
    mounts = [mount_entry("/etc/hosts", source=tmp_path / "hosts"), mount_entry("/proc", "proc", "proc", 0)]
    (tmp_path / "hosts").touch()
    if volume:
        mounts.append(mount_entry("/volume", source=tmp_path))
    rootfs = str(tmp_path if is_folder else tmp_path / "hosts")
    config = SimpleNamespace(rootfs=rootfs, mounts=mounts, machine=SimpleNamespace(rootfs=wanted))
    chosen = runx.choose_rootfs(config)
    assert (chosen.is_served, chosen.in_memory, bool(chosen.disk)) == way


def test_a_block_device_that_is_asked_for_must_be_there(tmp_path, disks):
    disks.clear()
    config = SimpleNamespace(rootfs=str(tmp_path), mounts=[], machine=SimpleNamespace(rootfs="block"))
    with pytest.raises(runx.Error, match="no disk"):
        runx.choose_rootfs(config)


def test_share_and_disk_need_modules_and_a_disk_a_word_for_the_guest():
    disk = make_disk(writable=True)
    assert runx.Rootfs().modules() == runx.Rootfs(in_memory=True).modules() == ()
    assert runx.Rootfs(is_served=True).modules() == ("9pnet_xen", "9p")
    assert runx.Rootfs(in_memory=True, disk=disk).modules() == ("xen_blkfront", "ext4", "overlay")
    assert runx.Rootfs(is_served=True, disk=disk).modules() == ("9pnet_xen", "9p", "xen_blkfront", "ext4", "overlay")
    assert disk.for_guest() == b"ext4 rw\n"
    disk.writable = False
    assert disk.for_guest() == b"ext4 ro\n"


def test_a_ramdisk_has_no_name_and_with_the_files_takes_none_of_run(tmp_path):
    container = SimpleNamespace(path=lambda name: str(tmp_path / name), state=SimpleNamespace(name="runx-test-of-name"))
    for in_memory, name in ((False, tmp_path / "ramdisk"), (True, "/var/tmp/runx-test-of-name")):
        ramdisk, path = runx.Rootfs(in_memory=in_memory).open_ramdisk(container)
        with ramdisk:
            ramdisk.write(b"content")
            ramdisk.flush()
            assert path == f"/proc/{os.getpid()}/fd/{ramdisk.fileno()}"
            assert pathlib.Path(path).read_bytes() == b"content"
            assert os.readlink(path) == f"{name} (deleted)"
            assert os.fstat(ramdisk.fileno()).st_mode & 0o777 == 0o600
