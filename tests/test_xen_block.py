"""A rootfs on a block device or in an image: what the VM sees of it, what it leaves, and what dom0 has meanwhile."""

import contextlib
import os
import pathlib
import shutil
import subprocess

import pytest
from conftest import call, config, processes, wait_for, wait_until, xl

pytestmark = pytest.mark.usefixtures("clean_dom0")


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
    """An image where an engine's snapshotter mounts it; yields the loop device."""
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", ",".join(["loop", *options]), str(image), str(target)], check=True)
    try:
        yield subprocess.check_output(["findmnt", "-no", "SOURCE", str(target)], text=True).strip()
    finally:
        call("umount", str(target))


def loops():
    return subprocess.check_output(["losetup", "-nO", "NAME,BACK-FILE"], text=True).strip()


def run(bundle, script, root, *options, **annotations):
    spec = config("sh", "-c", script)
    spec["annotations"] = {"org.runx.rootfs": "block", **annotations}
    spec["root"] = {"path": str(root), "readonly": "ro" in options}
    bundle.write_config(spec)
    return bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)


def is_clean(image):
    """Whether an ext4 has been unmounted, so that it can be mounted read-only without a repair."""
    header = subprocess.check_output(["dumpe2fs", "-h", str(image)], text=True, stderr=subprocess.DEVNULL)
    return "needs_recovery" not in header


SEEN = "sed -n 's/^[^ ]* \\/ \\([a-z0-9]* [a-z]*\\).*/\\1/p' /proc/mounts; echo $HOME; "


def test_an_image_is_the_rootfs_and_keeps_what_is_written(bundle):
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/passwd").write_text("broken\nother:x:10:0::/no:\nroot:x:0:0::/home/root:/bin/sh\n")
    image = make_image(bundle.folder, bundle.rootfs)
    result = run(bundle, SEEN + "echo kept >/written; mknod /null c 1 3; echo x >/null", image)
    assert (result.stdout, result.stderr, result.returncode) == (b"ext4 rw\n/home/root\n", b"", 0), result
    assert is_clean(image), "the guest has not unmounted it"
    result = run(bundle, "cat /written; ls -l /null", image)
    assert result.stdout.startswith(b"kept\ncrw"), result
    result = run(bundle, SEEN + "echo no >/new", image, "ro")
    assert (result.stdout, result.returncode) == (b"overlay ro\n/home/root\n", 1), result
    wait_until(lambda: not loops(), "the loop device to go")


def test_what_cannot_be_written_gets_a_layer_of_memory(bundle):
    spec = config("sh", "-c", SEEN + "echo lost >/written; cat /written /sys/block/xvda/ro; ls /")
    spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
    for kind in ("squashfs", "erofs"):
        image = make_image(bundle.folder, bundle.rootfs, kind)
        before = image.read_bytes()
        # what vm.image names needs no root, and no annotation: nothing else can be done with it
        bundle.write_config({**spec, "vm": {"image": {"path": str(image), "format": "raw"}}, "root": None})
        result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
        assert result.stdout == b"overlay rw\n/\nlost\n1\nbin\ndev\nproc\nsys\ntmp\nwritten\n", result
        assert image.read_bytes() == before


def test_what_an_engine_has_mounted_is_taken_over_at_start(bundle):
    image = make_image(bundle.folder, bundle.rootfs)
    target, volume = bundle.folder / "mnt", bundle.folder / "volume"
    volume.mkdir()
    (bundle.folder / "hosts").write_text("127.0.0.1 here\n")
    spec = config("sh", "-c", "cat /etc/hosts; echo kept >/written; echo through >/volume/note; sleep 1000")
    spec["annotations"], spec["root"] = {"org.runx.rootfs": "block"}, {"path": str(target)}
    for source, destination in ((volume, "/volume"), (bundle.folder / "hosts", "/etc/hosts")):
        spec["mounts"].append({"destination": destination, "type": "bind", "source": str(source), "options": ["bind"]})
    bundle.write_config(spec)
    with mounted(image, target, "noatime"):
        pidfd = bundle.created()
        assert os.path.ismount(target)  # hooks see it, as under runc
        assert bundle.runx("start", bundle.id).returncode == 0
        assert not os.path.ismount(target)
        wait_until(lambda: (volume / "note").exists(), "the VM's writing to the volume")
        assert "51712 0" in xl("block-list", str(bundle.domain()))
        assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
        wait_for(pidfd)
        assert bundle.runx("delete", bundle.id).returncode == 0
        wait_until(lambda: not loops(), "the engine's loop device to go, which only it had open")
    assert (bundle.folder / "stdout").read_bytes() == b"127.0.0.1 here\n"
    with mounted(image, target, "ro"):
        assert (target / "written").read_text() == "kept\n"


def test_without_volumes_there_is_no_qemu_and_a_read_only_mount_may_stay(bundle):
    image, target, before = make_image(bundle.folder, bundle.rootfs), bundle.folder / "mnt", processes()
    spec = config("sleep", "1000")
    spec["annotations"], spec["root"] = {"org.runx.rootfs": "block"}, {"path": str(target)}
    bundle.write_config(spec)
    with mounted(image, target, "ro"):
        bundle.created()
        assert bundle.runx("start", bundle.id).returncode == 0
        assert not [command for _, command in processes() - before if "qemu" in command]
        assert os.path.ismount(target)
        assert bundle.runx("delete", "--force", bundle.id).returncode == 0


def refused(bundle, root, **others):
    result = run(bundle, "true", root, **others)
    assert result.returncode != 0 and not bundle.root.joinpath(bundle.id).exists(), result
    return result.stderr.decode()


def test_refusals_leave_all_as_it_was(bundle):
    image, target = make_image(bundle.folder, bundle.rootfs), bundle.folder / "mnt"
    assert "is a folder, not where a block device is mounted: use org" in refused(bundle, bundle.rootfs)
    (bundle.folder / "zeros").write_bytes(bytes(8192))
    assert "holds no file system that a VM can have" in refused(bundle, bundle.folder / "zeros")
    assert "is an image, which is not for 9p" in refused(bundle, image, **{"org.runx.rootfs": "9p"})
    with mounted(image, target, "noatime", "nosuid", "commit=7") as loop:
        before = [line for line in pathlib.Path("/proc/mounts").read_text().splitlines() if str(target) in line]
        message = refused(bundle, image)
        assert f"cannot give the image {image} to the VM: {loop} has it too" in message
        with open(target / "open", "w", encoding="ascii"):
            assert f"cannot unmount {target} from dom0" in refused(bundle, target)
        other = bundle.folder / "other"
        other.mkdir()
        subprocess.run(["mount", "--bind", str(target), str(other)], check=True)
        try:
            assert f"is mounted at {other}; unmount it there" in refused(bundle, target)
        finally:
            call("umount", str(other))
        after = [line for line in pathlib.Path("/proc/mounts").read_text().splitlines() if str(target) in line]
        assert (after, (target / "open").exists()) == (before, True)
        assert run(bundle, "cat /open", target).returncode == 0
    wait_until(lambda: not loops(), "all loop devices to go")


def test_two_vms_share_only_what_neither_writes(bundle, second):
    image = make_image(bundle.folder, bundle.rootfs)
    for each, readonly in ((bundle, True), (second, True)):
        spec = config("sleep", "1000")
        spec["annotations"], spec["root"] = {"org.runx.rootfs": "block"}, {"path": str(image), "readonly": readonly}
        each.write_config(spec)
        each.created()
        assert each.runx("start", each.id).returncode == 0
    assert call("xl", "list").stdout.count(b"runx-") == 2
    assert second.runx("delete", "--force", second.id).returncode == 0
    assert "has it too, and one could write" in refused(second, image)
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0


def test_without_qemu_auto_takes_the_block_device(bundle):
    image, target = make_image(bundle.folder, bundle.rootfs), bundle.folder / "mnt"
    with mounted(image, target):
        spec = config("sh", "-c", SEEN)
        spec["annotations"], spec["root"] = {"org.runx.rootfs": "auto"}, {"path": str(target)}
        spec["vm"] = {"hypervisor": {"parameters": ['device_model_override="/bin/false"']}}
        bundle.write_config(spec)
        result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
        assert result.stdout == b"ext4 rw\n/\n", result
        assert "the VM has its rootfs on a block device, the rest in its memory" in bundle.log.read_text()


def test_through_containerd(bundle):
    """A rootfs that a snapshotter of block devices has mounted, as ctr takes one that is ready."""
    shutil.copytree(bundle.rootfs, bundle.folder / "source", symlinks=True)
    image, target = make_image(bundle.folder, bundle.folder / "source"), bundle.folder / "mnt"
    options = ["--rm", "--runc-binary=/usr/sbin/runX", "--annotation", "org.runx.rootfs=block", "--rootfs"]
    with mounted(image, target):
        result = call("ctr", "run", *options, str(target), bundle.id, "sh", "-c", SEEN + "echo kept >/written")
        assert (result.stdout, result.returncode) == (b"ext4 rw\n/\n", 0), result
    with mounted(image, target, "ro"):
        assert (target / "written").read_text() == "kept\n"
