"""What the VM is made of: its size, its kernel and ramdisk, and what xl is told about it."""

import json
import pathlib
import shutil

import pytest
from conftest import call, config, wait_for, wait_until

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")

KERNEL = pathlib.Path("/usr/lib/runX/kernel")
# a system of its own: prints, and powers off when it is told to, or when it has read a line
INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
echo "own system: $(busybox cat /proc/cmdline)"
read line
echo "read $line"
[ "$line" != crash ] || exit 1
busybox poweroff -f
"""
POWEROFF = """#!/bin/busybox sh
echo told to >/dev/console
busybox poweroff -f
"""


def make_system(folder):
    """A root file system that is none of ours."""
    for name in ("bin", "sbin", "dev", "proc"):
        (folder / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), folder / "bin/busybox")
    for name, text in (("init", INIT), ("sbin/init", INIT), ("sbin/poweroff", POWEROFF)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.fixture
def own_system(bundle):
    """The bundle with a kernel and a ramdisk in its rootfs, which its environment names as an image would."""
    make_system(bundle.folder / "system")
    (bundle.rootfs / "boot").mkdir()
    runx.pack_initrd(str(bundle.folder / "system"), str(bundle.rootfs / "boot/ramdisk"))
    shutil.copy(KERNEL, bundle.rootfs / "boot/kernel")
    (bundle.rootfs / "kernel").symlink_to("/../../boot/kernel")
    spec = config("ignored", env=["RUNX_KERNEL=/kernel", "RUNX_RAMDISK=boot/ramdisk"])
    spec["annotations"], spec["vm"] = {"org.runx.memory": "64"}, {"kernel": {"parameters": ["of=mine", "quiet"]}}
    bundle.write_config(spec)
    return bundle


def qemus():
    return call("pgrep", "-f", "xen-domid").stdout


def test_a_system_of_its_own_from_the_rootfs(own_system):
    result = own_system.runx("run", "--bundle", str(own_system.folder), own_system.id, input=b"something\n")
    assert result.returncode == 0, result
    lines = result.stdout.decode().replace("\r", "").splitlines()
    assert "own system: console=hvc0 panic=-1 of=mine quiet" in lines and "read something" in lines
    assert not own_system.log.exists()


def test_term_shuts_a_system_of_its_own_down(own_system):
    pidfd = own_system.created()
    assert qemus() == b""  # nothing that would need 9p
    own_system.runx("start", own_system.id)
    output = own_system.folder / "stdout"
    wait_until(lambda: "own system" in output.read_text(), "its first words")
    assert own_system.runx("kill", own_system.id, "TERM").returncode == 0
    wait_for(pidfd)
    assert "told to" in output.read_text()


def test_a_system_of_its_own_can_be_killed_and_can_crash(own_system):
    pidfd = own_system.created()
    own_system.runx("start", own_system.id)
    assert own_system.runx("kill", own_system.id, "KILL").returncode == 0
    wait_for(pidfd)
    own_system.runx("delete", own_system.id)
    result = own_system.runx("run", "--bundle", str(own_system.folder), own_system.id, input=b"crash\n")
    assert result.returncode == 255 and b"the VM crashed" in own_system.log.read_bytes()


def test_a_system_of_its_own_on_a_disk(bundle):
    make_system(bundle.folder / "system")
    image = bundle.folder / "disk, with a comma.img"
    made = call("mke2fs", "-q", "-t", "ext4", "-d", str(bundle.folder / "system"), str(image), "16M")
    assert made.returncode == 0, made
    spec = config("ignored")
    spec["vm"] = {
        "hypervisor": {"path": "", "parameters": ['device_model_args=["-d", "guest_errors"]']},
        "kernel": {"path": str(KERNEL), "parameters": ["root=/dev/xvda", "rw", "quiet"], "initrd": ""},
        "image": {"path": str(image), "format": "raw"}, "hwConfig": {"memory": 64 << 20, "vcpus": 2},
    }  # fmt: skip
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id, input=b"something\n")
    assert result.returncode == 0 and b"read something" in result.stdout, result


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("/no/kernel", "cannot boot /no/kernel of the container: No such file"),
        ("/bin", "cannot boot /bin of the container: it is not a regular file"),
        ("/bin/busybox", "xl create failed"),
        ("/large", "cannot boot /large of the container: 4096 MiB do not fit into a VM of"),
        ("", "the kernel's command line is 10"),
    ],
)
def test_a_kernel_that_cannot_be_booted(bundle, kernel, words):
    with open(bundle.rootfs / "large", "wb") as file:
        file.truncate(1 << 32)
    spec = config("true", env=[f"RUNX_KERNEL={kernel}"])
    spec["vm"] = {"kernel": {"parameters": ["" if kernel else "x" * 1000]}}
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.returncode == 1 and words in result.stderr.decode(), result


@pytest.mark.skipif(not list(pathlib.Path("/boot").glob("vmlinuz-*")), reason="needs a Debian kernel in /boot")
def test_debians_own_kernel_with_our_init(bundle):
    """Its 9p is modules: runX takes them from the rootfs into the ramdisk."""
    image = next(pathlib.Path("/boot").glob("vmlinuz-*"))
    version = image.name.removeprefix("vmlinuz-")
    modules = pathlib.Path("/lib/modules") / version
    (bundle.rootfs / "boot").mkdir()
    shutil.copy(image, bundle.rootfs / "boot")
    dependencies = (modules / "modules.dep").read_text().splitlines()
    needed = [path for line in dependencies if "/9p" in line.split(":")[0] for path in line.replace(":", "").split()]
    for path in needed:
        (bundle.rootfs / f"lib/modules/{version}" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / path, bundle.rootfs / f"lib/modules/{version}" / path)
    shutil.copy(modules / "modules.dep", bundle.rootfs / f"lib/modules/{version}")
    spec = config("sh", "-c", "uname -r; echo written >/file", env=["PATH=/bin", f"RUNX_KERNEL=/boot/{image.name}"])
    spec["annotations"] = {"org.runx.memory": "160"}
    (bundle.rootfs / "bin/uname").symlink_to("busybox")
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert (result.returncode, result.stdout.decode()) == (0, f"{version}\n"), result
    assert (bundle.rootfs / "file").read_text() == "written\n"


def test_what_xl_is_told(bundle, tmp_path):
    """Annotations, the host's own file, and XLCONF."""
    host, folder = pathlib.Path(runx.HOST_CONFIG), tmp_path / "xl"
    before = host.read_text() if host.exists() else None
    folder.mkdir()
    (folder / "extra").write_text("cap = 77\n")
    settings = {**json.loads(before or "{}"), "memory": 72, "cmdline": "of=host", "xlconf": [str(folder)]}
    settings.update(annotations=["vcpus", "cmdline"], environment=["XLCONF"])
    host.write_text(json.dumps(settings))
    try:
        spec = config("sleep", "1000", env=["PATH=/bin", f"XLCONF={folder}/extra"])
        spec["annotations"] = {"org.runx.vcpus": "2", "org.runx.cmdline": "of=mine"}
        bundle.write_config(spec)
        bundle.created()
        domain = json.loads(call("xl", "list", "-l", str(bundle.domain())).stdout)[0]["config"]
        sizes = (domain["b_info"]["max_memkb"] >> 10, domain["b_info"]["max_vcpus"])
        assert sizes == (72, 2) and domain["b_info"]["cmdline"].endswith(" of=host of=mine")
        assert domain["b_info"]["sched_params"]["cap"] == 77
    finally:
        host.unlink()
        if before is not None:
            host.write_text(before)
