# SPDX-License-Identifier: Apache-2.0
"""Where a VM has its root file system: over 9p, in its own memory or on a disk; and what of it dom0 can enter."""

import os
import pathlib
import socket
import struct
import subprocess

import pytest
from conftest import (
    DEVPTS,
    SEEN,
    call,
    config,
    file_servers,
    in_memory,
    make_image,
    mounted,
    runx_command,
    wait_for,
    wait_in,
    wait_until,
    xl,
)

pytestmark = pytest.mark.usefixtures("clean_dom0")


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # CAP_NET_RAW, of revision 2


def bind(source, destination, *options):
    return {"destination": destination, "type": "bind", "source": str(source), "options": list(options)}


# ---- over 9p


@pytest.mark.main_path
def test_what_the_container_writes_is_in_the_bundles_rootfs_also_after_sigkill(bundle):
    script = """
        echo kept >/tmp/file; chmod 4711 /tmp/file; ln -s file /tmp/link; mkdir /tmp/dir
        exec 5>/tmp/open; echo written >&5; echo done; sleep 1000
    """
    pidfd = bundle.started(config("sh", "-c", script))
    bundle.wait_for_output("done\n")
    bundle.succeed("kill", "9")
    wait_for(pidfd)
    written = bundle.rootfs / "tmp/file"
    assert (written.read_text(), written.stat().st_mode & 0o7777) == ("kept\n", 0o4711)
    assert os.readlink(bundle.rootfs / "tmp/link") == "file"
    assert (bundle.rootfs / "tmp/dir").is_dir()
    assert (bundle.rootfs / "tmp/open").read_text() == "written\n"


@pytest.fixture
def host(tmp_path):
    """A folder of dom0's with a file, and with a file system mounted in it."""
    host = tmp_path / "host"
    (host / "below").mkdir(parents=True)
    (host / "file").write_text("from the host")
    assert call("mount", "-t", "tmpfs", "none", str(host / "below")).returncode == 0
    yield host
    call("umount", str(host / "below"))


def test_a_read_only_root_and_volumes_are_so_and_other_mounts_can_be_written(bundle, host):
    """dom0 enforces it: root in the VM may undo its own mounts."""
    script = """
        mount -o remount,rw / && mount -o remount,rw /all || echo undone
        echo no >/tmp/file; echo no >/all/new; echo no >/all/below/new; echo no >/one/file
        echo x >/dev/file && cat /dev/file /data/file /one/file && echo back >/data/new && echo x >/data/below/x
    """
    spec = config("sh", "-c", script)
    spec["root"]["readonly"] = True
    spec["mounts"] += [
        bind(host, "/all", "rbind", "rro"), bind(host, "/data", "rbind", "rw"),
        bind(host / "file", "/one/file", "bind", "ro"),
    ]  # fmt: skip
    result = bundle.run(spec)
    assert (result.returncode, result.stdout) == (0, b"x\n" + b"from the host" * 2), result
    assert result.stderr.count(b"Read-only file system") == 4
    assert not (bundle.rootfs / "tmp/file").exists()
    assert {path.name: path.read_text() for path in (host / "below").iterdir()} == {"x": "x\n"}
    assert {name: (host / name).read_text() for name in ("new", "file")} == {"new": "back\n", "file": "from the host"}


def test_the_guest_cannot_fill_the_hosts_memory(bundle):
    # what is exported beside the rootfs is the state folder's, on the host's /run
    before = file_servers()
    bundle.started(config("sh", "-c", "mkdir /s; mount -t xenfuse share /s || echo refused; exec sleep 1000"))
    bundle.wait_for_output("refused\n")
    (pid,) = file_servers() - before
    places = [line.split() for line in pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert [fields[5].split(",")[0] for fields in places if fields[4] == "/share"] == ["ro"]
    bundle.succeed("delete", "--force")


# ---- in the VM's memory


def with_volume(bundle, *args):
    """A config with the rootfs in memory, and a volume that is not to be written."""
    spec = in_memory(config(*args))
    (bundle.folder / "volume").mkdir()
    (bundle.folder / "volume/note").write_text("from dom0\n")
    spec["mounts"].append(bind(bundle.folder / "volume", "/volume", "rbind", "ro"))
    return spec


def test_a_rootfs_in_memory_is_as_the_image_has_it(bundle):
    rootfs = bundle.rootfs
    (rootfs / "file").write_text("content\n")
    os.link(rootfs / "file", rootfs / "same")
    os.chown(rootfs / "file", 12, 34)
    os.utime(rootfs / "file", (1, 981158400))
    (rootfs / "out").symlink_to("/volume/note")
    os.mkfifo(rootfs / "fifo", 0o600)
    os.mknod(rootfs / "null", 0o20666, os.makedev(1, 3))
    (rootfs / "null").chmod(0o666)
    (rootfs / "closed").mkdir(0o700)
    (rootfs / "closed/tool").write_text("#!/bin/sh\n")
    (rootfs / "closed/tool").chmod(0o4755)
    os.setxattr(rootfs / "closed/tool", "security.capability", CAPABILITY)
    with open(rootfs / "sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"in the middle")
    script = """stat -c '%n %F %a %u:%g %h %Y %t,%T' file same fifo null closed closed/tool | sed 's/ 1[0-9]*,/,/'
        cat same out; wc -c <sparse; dd if=sparse bs=1 skip=1048576 count=13 2>/dev/null; echo
        echo lost >written; echo no >volume/new; busybox mount | sed -n 's/^rootfs on/on/p'"""
    bundle.add_applets("stat", "wc")
    before = file_servers()
    bundle.started(with_volume(bundle, "sh", "-c", f"{script}; echo over; exec sleep 1000"))
    bundle.wait_for_output("over\n")
    assert file_servers() == before
    text = bundle.output()
    for line in (
        "file regular file 644 12:34 2 981158400 0,0", "same regular file 644 12:34 2 981158400 0,0",
        "fifo fifo 600 0:0", "null character special file 666 0:0", "closed directory 700",
        "closed/tool regular file 4755", "content\nfrom dom0\n3145728\nin the middle\n",
    ):  # fmt: skip
        assert line in text, (line, text)
    assert "volume/new: Read-only file system" in (bundle.folder / "stderr").read_text()
    assert not (rootfs / "written").exists()
    bundle.succeed("delete", "--force")


def test_capabilities_of_files_arrive(bundle):
    """Without root, a program that may not do so by itself: the file's capability gives it CAP_NET_RAW."""
    (bundle.rootfs / "bin/busybox-raw").write_bytes((bundle.rootfs / "bin/busybox").read_bytes())
    (bundle.rootfs / "bin/busybox-raw").chmod(0o755)
    os.setxattr(bundle.rootfs / "bin/busybox-raw", "security.capability", CAPABILITY)
    spec = config("busybox-raw", "sed", "-n", "s/CapPrm:.//p", "/proc/self/status")
    spec["process"]["user"] = {"uid": 1000, "gid": 1000}
    spec["process"]["capabilities"] = {"bounding": ["CAP_NET_RAW"]}
    result = bundle.run(in_memory(spec))
    assert int(result.stdout, 16) == 1 << 13, result


def test_what_does_not_fit_is_refused(bundle):
    with open(bundle.rootfs / "large", "wb") as file:  # 100 MiB with this dom0's busybox
        file.truncate((100 << 20) - (bundle.rootfs / "bin/busybox").stat().st_size)
    bundle.write_config(with_volume(bundle, "true"))
    assert "need a VM of 319 MiB to be in its memory, and it has 64: raise" in bundle.refused("create")
    with open(bundle.rootfs / "large", "wb") as file:
        file.truncate(5 << 30)
    assert "need a VM of 15" in bundle.refused("create")
    assert not bundle.root.joinpath(bundle.id).exists()


# ---- on a block device, or in an image


def loops():
    return subprocess.check_output(["losetup", "-nO", "NAME,BACK-FILE"], text=True).strip()


def on_disk(root, *args, readonly=False, **annotations):
    """A config whose rootfs is on the disk that root names."""
    spec = {**config(*args), "root": {"path": str(root), "readonly": readonly}}
    spec["annotations"] = {"org.runx.rootfs": "block", **annotations}
    return spec


def is_clean(image):
    """Whether an ext4 has been unmounted, so that it can be mounted read-only without a repair."""
    header = subprocess.check_output(["dumpe2fs", "-h", str(image)], text=True, stderr=subprocess.DEVNULL)
    return "needs_recovery" not in header


def test_an_image_is_the_rootfs_and_keeps_what_is_written(bundle):
    bundle.add_applets("cut")
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/passwd").write_text("broken\nother:x:10:0::/no:\nroot:x:0:0::/home/root:/bin/sh\n")
    image = make_image(bundle.folder, bundle.rootfs)
    result = bundle.run(on_disk(image, "sh", "-c", SEEN + "echo kept >/written; mknod /null c 1 3; echo x >/null"))
    assert (result.stdout, result.stderr, result.returncode) == (b"ext4 rw\n/home/root\n", b"", 0), result
    assert is_clean(image), "the guest has not unmounted it"
    script = SEEN + "cat /written; ls -l /null | cut -c1-3; echo no >/new"
    result = bundle.run(on_disk(image, "sh", "-c", script, readonly=True))
    assert (result.stdout, result.returncode) == (b"overlay ro\n/home/root\nkept\ncrw\n", 1), result
    wait_until(lambda: not loops(), "the loop device to go")


@pytest.mark.main_path
def test_what_cannot_be_written_gets_a_layer_of_memory(bundle):
    spec = config("sh", "-c", SEEN + "echo lost >/written; cat /written /sys/block/xvda/ro; ls /")
    spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
    for kind in ("squashfs", "erofs"):
        image = make_image(bundle.folder, bundle.rootfs, kind)
        before = image.read_bytes()
        # what vm.image names needs no root, and no annotation: nothing else can be done with it
        result = bundle.run({**spec, "vm": {"image": {"path": str(image), "format": "raw"}}, "root": None})
        assert result.stdout == b"overlay rw\n/\nlost\n1\nbin\ndev\nproc\nsys\ntmp\nwritten\n", result
        assert image.read_bytes() == before


def test_what_an_engine_has_mounted_is_taken_over_at_start(bundle):
    image = make_image(bundle.folder, bundle.rootfs)
    target, volume = bundle.folder / "mnt", bundle.folder / "volume"
    volume.mkdir()
    (bundle.folder / "hosts").write_text("127.0.0.1 here\n")
    script = "cat /etc/hosts; echo kept >/written; echo through >/volume/note; sleep 1000"
    spec = on_disk(target, "sh", "-c", script)
    spec["mounts"] += [bind(volume, "/volume", "bind"), bind(bundle.folder / "hosts", "/etc/hosts", "bind")]
    with mounted(image, target, "noatime"):
        pidfd = bundle.created(spec)
        assert os.path.ismount(target)  # hooks see it, as under runc
        bundle.succeed("start")
        assert not os.path.ismount(target)
        wait_in(volume, (volume / "note").exists, "the VM's writing to the volume")
        assert "51712 0" in xl("block-list", str(bundle.domain()))
        bundle.succeed("kill", "KILL")
        wait_for(pidfd)
        bundle.succeed("delete")
        wait_until(lambda: not loops(), "the engine's loop device to go, which only it had open")
    assert bundle.output() == "127.0.0.1 here\n"
    with mounted(image, target, "ro"):
        assert (target / "written").read_text() == "kept\n"


def test_without_volumes_there_is_no_file_server_and_a_read_only_mount_may_stay(bundle):
    image, target, before = make_image(bundle.folder, bundle.rootfs), bundle.folder / "mnt", file_servers()
    with mounted(image, target, "ro"):
        bundle.started(on_disk(target, "sleep", "1000"))
        assert file_servers() == before
        assert os.path.ismount(target)
        bundle.succeed("delete", "--force")


def refused(bundle, spec):
    bundle.write_config(spec)
    message = bundle.refused("run")
    assert not bundle.root.joinpath(bundle.id).exists()
    return message


def test_refusals_leave_all_as_it_was(bundle):
    image, target = make_image(bundle.folder, bundle.rootfs), bundle.folder / "mnt"
    message = refused(bundle, on_disk(bundle.rootfs, "true"))
    assert "is a folder, not where a block device is mounted: use org" in message
    (bundle.folder / "zeros").write_bytes(bytes(8192))
    assert "holds no file system that a VM can have" in refused(bundle, on_disk(bundle.folder / "zeros", "true"))
    assert "is an image, which is not for 9p" in refused(bundle, on_disk(image, "true", **{"org.runx.rootfs": "9p"}))
    with mounted(image, target, "noatime", "nosuid", "commit=7") as loop:
        before = [line for line in pathlib.Path("/proc/mounts").read_text().splitlines() if str(target) in line]
        message = refused(bundle, on_disk(image, "true"))
        assert f"cannot give the image {image} to the VM: {loop} has it too" in message
        with open(target / "open", "w", encoding="ascii"):
            assert f"cannot unmount {target} from dom0" in refused(bundle, on_disk(target, "true"))
        other = bundle.folder / "other"
        other.mkdir()
        subprocess.run(["mount", "--bind", str(target), str(other)], check=True)
        try:
            assert f"is mounted at {other}; unmount it there" in refused(bundle, on_disk(target, "true"))
        finally:
            call("umount", str(other))
        after = [line for line in pathlib.Path("/proc/mounts").read_text().splitlines() if str(target) in line]
        assert (after, (target / "open").exists()) == (before, True)
        assert bundle.run(on_disk(target, "cat", "/open")).returncode == 0
    wait_until(lambda: not loops(), "all loop devices to go")


def test_two_vms_share_only_what_neither_writes(bundle, second):
    image = make_image(bundle.folder, bundle.rootfs)
    for each in (bundle, second):
        each.started(on_disk(image, "sleep", "1000", readonly=True))
    assert xl("list").count("runx-") == 2
    second.succeed("delete", "--force")
    assert "has it too, and one could write" in refused(second, on_disk(image, "true"))
    bundle.succeed("delete", "--force")


def test_an_image_with_a_backing_file_is_refused(bundle):
    image = bundle.folder / "image"
    image.write_bytes(struct.pack(">4sIQI", b"QFI\xfb", 3, 0x200, 12).ljust(0x200, b"\0") + b"/root/secret")
    spec = {**config("true"), "vm": {"kernel": {"path": "/usr/lib/runX/kernel"}}}
    spec["vm"]["image"] = {"path": str(image), "format": "qcow2"}
    bundle.write_config(spec)
    result = bundle.create()
    assert result.returncode == 1 and b"for it has a backing file" in result.stderr, result


def test_an_image_in_qcow2_is_refused_where_there_is_no_qemu(bundle):
    """Xen's tools are all that this dom0 has: nothing else of runX's needs a QEMU."""
    assert not list(pathlib.Path("/usr").rglob("qemu-system*"))
    image = bundle.folder / "image"
    image.write_bytes(struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 0, 0, 16, 16 << 20).ljust(0x10000, b"\0"))
    spec = {**config("true"), "vm": {"kernel": {"path": "/usr/lib/runX/kernel"}}}
    spec["vm"]["image"] = {"path": str(image), "format": "qcow2"}
    bundle.write_config(spec)
    bundle.check_refused("only an image in the format raw does without a QEMU")


# ---- on dom0, by the container's pid

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")

SLEEP = ["sh", "-c", "echo begun; while :; do sleep 1; done"]


def namespaces_of(pid):
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in NAMESPACES}


def inside(pid, *command, **options):
    """Run a command of the container's rootfs in all namespaces of a process."""
    return call("nsenter", "--target", str(pid), "--all", *command, **options)


def full(bundle, tmp_path):
    """A config.json with bind mounts of every kind, and a container's usual file systems."""
    data = tmp_path / "data"
    (data / "below").mkdir(parents=True)
    (data / "file").write_text("of the volume\n")
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/resolv.conf").symlink_to("../run/stub/resolv.conf")
    (bundle.rootfs / "absolute").symlink_to("/made/by/link")
    (bundle.rootfs / "out").symlink_to("../../../../../../../../../../../..")
    (bundle.rootfs / "proc").mkdir()
    (bundle.rootfs / "proc/secret").write_text("covered\n")
    spec = config(*SLEEP)
    spec["hostname"] = "a-host-of-its-own"
    spec["mounts"] += [
        DEVPTS,
        {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
        bind(data, "/data", "rbind"),
        bind(data, "/data/read", "rbind", "ro"),
        bind(data / "file", "/etc/resolv.conf", "bind"),
        bind(data / "file", "/absolute/file", "bind"),
        bind(data, "/out/tmp/volume", "bind"),
    ]
    return data, spec


def devices_below(root):
    """Every device that a walk from root, over folders and through no link, meets."""
    found = {}
    for folder, names, files in os.walk(root):
        for name in [".", "..", *names, *files]:
            path = os.path.join(folder, name)
            found.setdefault(os.lstat(path).st_dev, path)
    return found


@pytest.mark.parametrize("exported", [True, False], ids=["9p", "ramdisk"])
def test_through_the_containers_pid_its_files_can_be_entered_and_nothing_of_dom0(bundle, tmp_path, exported):
    data, spec = full(bundle, tmp_path)
    spec["root"]["readonly"] = True
    (tmp_path / "real").mkdir()
    bundle.root = tmp_path / "link"  # as Docker's is, in /var/run
    bundle.root.symlink_to("real")
    bundle.started(spec if exported else in_memory(spec))
    pid, root = bundle.pid(), pathlib.Path(f"/proc/{bundle.pid()}/root")
    assert not set(namespaces_of(pid).values()) & set(namespaces_of("self").values())
    assert os.path.samefile(root, f"/proc/{pid}/cwd") and os.path.samefile(root, root / "..")
    # what is mounted: the rootfs and the volume, both from where this test has them, and an empty tmpfs
    mounted = [line.split(" - ") for line in pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    roots = {fields.split()[3] for fields, _ in mounted}
    ours = [str(bundle.rootfs), str(data), str(data / "file"), "/"] if exported else ["/"]
    assert all(any(path.endswith(each) for path in ours) for each in roots), mounted
    empties = {fields.split()[2] for fields, kind in mounted if kind.startswith("tmpfs tmpfs ro")}
    assert len(empties) == 1
    allowed = {os.lstat(each).st_dev for each in [bundle.rootfs, data]} if exported else set()
    seen = devices_below(root)
    assert {f"{os.major(each)}:{os.minor(each)}" for each in seen.keys() - allowed} <= empties, seen
    assert os.listdir(root / "proc" if exported else root) == []
    # no file, folder or namespace of dom0's is open
    for fd in os.listdir(f"/proc/{pid}/fd"):
        assert os.readlink(f"/proc/{pid}/fd/{fd}").startswith(("socket:", "pipe:", "anon_inode:[pidfd]"))
    if exported:
        check_inside(pid, data)
    table = call(*runx_command(*bundle.globals(), "ps", bundle.id, "-o", "pid,args")).stdout.decode()
    assert table.splitlines()[1].split(None, 2) == [str(pid), "sh", "-c echo begun; while :; do sleep 1; done"]


def check_inside(pid, data):
    """Who enters sees the container's files, its name and no process of dom0's, and cannot write what is read-only."""
    script = """
        cat /data/file /etc/resolv.conf /made/by/link/file /tmp/volume/file
        hostname
        echo x >/data/new && echo written
        echo x >/data/read/new || echo refused
        echo x >/new || echo refused
        ls /proc /sys /dev | sed '/:$/d;/^$/d'
        mount -t proc proc /proc && cd /proc && echo [0-9]*
        cat /proc/1/cmdline | tr '\\0' ' '
    """
    busybox = ["/bin/busybox", "sh", "-c", f"PATH=/bin; alias hostname='busybox hostname'; {script}"]
    result = inside(pid, *busybox)
    lines = result.stdout.decode().splitlines()
    expected = ["of the volume"] * 4 + ["a-host-of-its-own", "written", "refused", "refused"]
    assert lines[: len(expected)] == expected, result
    numbers, title = lines[len(expected) :]
    assert numbers.split()[0] == "1" and len(numbers.split()) <= 4, result
    assert title.startswith("sh -c echo begun;")
    assert (data / "new").read_text() == "x\n"
    assert socket.gethostname() != "a-host-of-its-own"
