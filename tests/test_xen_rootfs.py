"""Where a VM has its rootfs: in its own memory, or over 9p; and what that does to files."""

import os
import struct

import pytest
from conftest import IMAGE, call, config, processes

pytestmark = pytest.mark.usefixtures("clean_dom0")
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # CAP_NET_RAW, of revision 2


def run(bundle, script, rootfs="ramdisk", **annotations):
    spec = config("sh", "-c", script)
    spec["annotations"] = {"org.runx.rootfs": rootfs, **annotations}
    (bundle.folder / "volume").mkdir(exist_ok=True)
    (bundle.folder / "volume/note").write_text("from dom0\n")
    source = {"source": str(bundle.folder / "volume"), "options": ["rbind", "ro"]}
    spec["mounts"].append({"destination": "/volume", "type": "bind", **source})
    bundle.write_config(spec)
    for applet in ("stat", "dd", "od", "wc"):
        if not (bundle.rootfs / "bin" / applet).exists():
            (bundle.rootfs / "bin" / applet).symlink_to("busybox")
    return bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)


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
    result = run(bundle, script)
    text = result.stdout.decode()
    for line in (
        "file regular file 644 12:34 2 981158400 0,0", "same regular file 644 12:34 2 981158400 0,0",
        "fifo fifo 600 0:0", "null character special file 666 0:0", "closed directory 700",
        "closed/tool regular file 4755", "content\nfrom dom0\n3145728\nin the middle\n",
    ):  # fmt: skip
        assert line in text, (line, result)
    assert b"volume/new: Read-only file system" in result.stderr
    assert not (rootfs / "written").exists()


def test_capabilities_of_files_arrive(bundle):
    """Without root, a program that may not do so by itself: the file's capability gives it CAP_NET_RAW."""
    (bundle.rootfs / "bin/busybox-raw").write_bytes((bundle.rootfs / "bin/busybox").read_bytes())
    (bundle.rootfs / "bin/busybox-raw").chmod(0o755)
    os.setxattr(bundle.rootfs / "bin/busybox-raw", "security.capability", CAPABILITY)
    spec = config("busybox-raw", "sed", "-n", "s/CapPrm:.//p", "/proc/self/status")
    spec["process"]["user"] = {"uid": 1000, "gid": 1000}
    spec["process"]["capabilities"] = {"bounding": ["CAP_NET_RAW"]}
    spec["annotations"] = {"org.runx.rootfs": "ramdisk"}
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert int(result.stdout, 16) == 1 << 13, result


def test_a_running_one_has_no_qemu_and_leaves_nothing(bundle):
    before = processes()
    spec = config("sleep", "1000")
    spec["annotations"] = {"org.runx.rootfs": "ramdisk"}
    bundle.write_config(spec)
    bundle.created()
    assert bundle.runx("start", bundle.id).returncode == 0
    assert not [command for _, command in processes() - before if "qemu" in command]
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0


def test_what_does_not_fit_is_refused(bundle):
    with open(bundle.rootfs / "large", "wb") as file:
        file.truncate(100 << 20)
    result = run(bundle, "true")
    assert b"need a VM of 324 MiB to be in its memory, and it has 64: raise" in result.stderr, result
    with open(bundle.rootfs / "large", "wb") as file:
        file.truncate(5 << 30)
    assert b"need a VM of 15" in run(bundle, "true").stderr
    assert not bundle.root.joinpath(bundle.id).exists()


def test_where_qemu_cannot_start_auto_takes_the_memory(bundle):
    spec = config("sh", "-c", "cat /proc/mounts")
    spec["vm"] = {"hypervisor": {"parameters": ['device_model_override="/bin/false"']}}
    spec["annotations"] = {"org.runx.rootfs": "auto"}
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.returncode == 0 and b"9p" not in result.stdout, result
    assert "cannot export the container's files over 9p on this host: the VM has all" in bundle.log.read_text()


def test_through_containerd(bundle):
    options = ["--rm", "--runc-binary=/usr/sbin/runX", "--annotation", "org.runx.rootfs=ramdisk"]
    result = call("ctr", "run", *options, IMAGE, bundle.id, "sh", "-c", "echo hello; grep -c 9p /proc/mounts")
    assert (result.stdout, result.returncode) == (b"hello\n0\n", 1), result
