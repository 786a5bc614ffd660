# SPDX-License-Identifier: Apache-2.0
"""VMs with a system, a kernel or a rootfs of their own, and cgroups, in a dom0 without Xen."""

import os
import pathlib

import pytest
from fake.dom0 import config


def finish(container, status=0):
    assert container.wait() == status, container.log_text()
    assert container.runx("delete").returncode == 0, container.log_text()


def kill(container, *words):
    assert container.dom0.run(*container.words("kill", container.id, *words)).returncode == 0


# ---- a VM that boots a system of its own


@pytest.fixture
def system(dom0, tmp_path):
    """Makes a container that boots a kernel of the host's with an image of its own."""

    def make(**changes):
        (tmp_path / "kernel").write_bytes(b"a kernel")
        (tmp_path / "image").write_bytes(bytes(4096))
        container = dom0.container()
        spec = config(**changes)
        spec.pop("annotations")
        spec["process"]["args"] = ["ignored"]
        spec["vm"] = {
            "kernel": {"path": str(tmp_path / "kernel"), "parameters": ["root=/dev/xvda"]},
            "image": {"path": str(tmp_path / "image"), "format": "raw"},
        }
        container.write(spec)
        return container

    return make


def test_a_system_of_its_own_has_the_first_console(dom0, system):
    reader, writer = os.pipe()
    container = system().started(stdin=reader)
    domain = dom0.domains()[container.domid()]
    assert "root=/dev/xvda" in domain["settings"]["cmdline"] and "quiet" not in domain["settings"]["cmdline"]
    assert "image" in domain["settings"]["disk"][0]
    dom0.ask("say", container.domid(), "login: ")
    os.write(writer, b"root\n")
    dom0.ask("hears", container.domid(), "root\n")
    kill(container, "TERM")
    dom0.ask("await_node", f"/local/domain/{container.domid()}/control/shutdown", "poweroff")
    dom0.ask("end", container.domid(), "-")
    finish(container)
    assert container.output() == "login: "
    os.close(reader)
    os.close(writer)


def test_a_system_of_its_own_is_destroyed_by_sigkill(dom0, system):
    container = system().started()
    kill(container, "KILL")
    finish(container, 137)


# ---- a kernel of the container's


def test_a_kernel_of_the_containers_is_mounted_for_xl_and_gone_afterwards(dom0):
    settings = pathlib.Path(dom0.inside) / "run/fake/etc/config.json"
    settings.write_text('{"annotations": ["rootfs", "kernel"]}')
    container = dom0.container()
    rootfs = container.bundle / "rootfs"
    (rootfs / "boot").mkdir()
    (rootfs / "boot/vmlinuz-6.1").write_bytes(b"my kernel")
    modules = rootfs / "lib/modules/6.1"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("a/9p.ko: a/9pnet.ko\na/9pnet.ko:\na/9pnet_xen.ko: a/9pnet.ko\n")
    (modules / "a").mkdir()
    for name in ("9p", "9pnet", "9pnet_xen"):
        (modules / f"a/{name}.ko").write_bytes(name.encode())
    container.write(config("exit:0", annotations={"org.runx.rootfs": "9p", "org.runx.kernel": "/boot/vmlinuz-6.1"}))
    container.created()
    settings.unlink()
    kernel = container.root / container.id / "kernel"
    assert dom0.domains()[container.domid()]["settings"]["kernel"] == str(kernel)
    assert not kernel.exists()
    files = [name for name in container.guest()["files"] if name.startswith("modules/")]
    assert files == ["modules/00-9pnet.ko", "modules/01-9pnet_xen.ko", "modules/02-9p.ko"]
    assert container.runx("start").stderr == ""
    finish(container)


# ---- a rootfs on a block device


@pytest.fixture
def image(dom0, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"hsqs".ljust(8192, b"\0"))
    return path


def test_an_image_is_given_as_a_block_device(dom0, image):
    """Where this machine has no loop device, it is told."""
    container = dom0.container()
    spec = config("wait", annotations={"org.runx.rootfs": "block"})
    spec["root"] = {"path": str(image)}
    container.write(spec)
    container.created()
    assert "container/disk" in container.guest()["files"]
    result = container.runx("start")
    if result.returncode:
        assert "cannot put" in result.stderr and "loop" in result.stderr
        assert container.status() == "created"
        assert container.runx("delete").returncode == 0
        return
    domid = container.domid()
    back = f"/local/domain/0/backend/vbd/{domid}/51712"
    nodes = dom0.nodes()
    assert (nodes[f"{back}/mode"], nodes[f"{back}/dev"], nodes[f"{back}/params"]) == ("r", "xvda", str(image))
    assert nodes[f"/local/domain/{domid}/device/vbd/51712/backend"] == back
    kill(container, "TERM")
    finish(container, 143)


def test_a_block_device_that_dom0_does_not_open_is_told(dom0, image):
    if not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("needs a loop device")
    dom0.constants["DISK_TIME_LIMIT"] = 0.05
    container = dom0.container()
    spec = config(annotations={"org.runx.rootfs": "block"})
    spec["root"] = {"path": str(image)}
    container.write(spec)
    container.created()
    dom0.ask("deaf", True)
    result = container.runx("start")
    dom0.ask("deaf", False)
    assert "has not opened" in result.stderr and "is its module xen-blkback loaded?" in result.stderr
    assert container.status() == "created"
    assert container.runx("delete").returncode == 0


# ---- cgroups


def test_holder_and_monitor_are_in_the_containers_cgroup(dom0):
    if not (dom0.folder / "cgroup").exists():
        pytest.skip("needs a hierarchy of cgroups, version 2, of this machine's to make one in")
    resources = {"memory": {"limit": 64 << 20}, "cpu": {"shares": 512}}
    linux = {"cgroupsPath": "/one", "resources": resources}
    container = dom0.container("wait", linux=linux).started()
    processes = dom0.run(program=["cat", "/sys/fs/cgroup/one/cgroup.procs"]).stdout.split()
    state = container.stored()
    assert {state["pid"], state["monitor"][0]} == set(map(int, processes))
    second = dom0.container("wait", linux=linux)
    assert "others are in it" in second.create().stderr
    assert container.runx("update", "--memory", "48m").returncode == 0
    kill(container, "TERM")
    finish(container, 143)
    assert dom0.cgroups() == []
