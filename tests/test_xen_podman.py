# SPDX-License-Identifier: Apache-2.0
"""Podman at a running container: what goes in and out, what of it is seen, and what no other can share with it."""

import contextlib
import os
import shutil
import signal

import pytest
from conftest import (
    PODMAN,
    Bundle,
    call,
    difference,
    dom0_state,
    fetch,
    podman_commands,
    processes,
    wait_in,
    wait_until,
    xl,
)
from test_xen_exec import check_exec
from test_xen_network import engines_firewall
from test_xen_streams import OUR_PS1

pytestmark = pytest.mark.skipif(not shutil.which("podman"), reason="needs podman")


@pytest.fixture(scope="module")
def podman():
    """What runs podman; when all tests here have ended, dom0 is as it was."""
    before = dom0_state()
    with engines_firewall(), podman_commands() as command:
        yield command
    wait_until(lambda: not difference(before), "dom0 as it was before these tests", 10)


@pytest.fixture(scope="module")
def box(tmp_path_factory, podman):
    """The bundle of a container with a web server at a published port, a volume, and a check of its health."""
    before, bundle = processes(), Bundle(tmp_path_factory.mktemp("podman"))
    bundle.add_applets("httpd")
    (bundle.rootfs / "page").write_text("hello from a VM\n")
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/hostname").write_text("of the image\n")
    (bundle.folder / "volume").mkdir()
    # the check's own timer would be systemd's
    health = ["--health-cmd", "[ -e /tmp/well ]", "--health-interval", "disable", "--health-retries", "1"]
    options = ["--detach", "--ipc", "shareable", "--name", bundle.id, "--volume", f"{bundle.folder}/volume:/volume"]
    options += ["--publish", "8081:80", "--env", OUR_PS1, "--env", "PATH=/bin", *health]
    script = "httpd -h /; while :; do sleep 1; done"
    try:
        started = podman("run", *options, "--rootfs", str(bundle.rootfs), "sh", "-c", script)
        assert started.returncode == 0, started
        yield bundle
    finally:
        # the first process of a pid namespace does not care for SIGTERM
        removed = podman("rm", "--force", "--time", "1", bundle.id)
        for pid, comm in processes() - before:
            if comm == "conmon":  # that of an exec waits five minutes for somebody who asks for its status
                with contextlib.suppress(ProcessLookupError):  # that of the container has just ended
                    os.kill(pid, signal.SIGKILL)
        call("umount", "/run/netns")
    assert (removed.returncode, removed.stdout.decode().strip()) == (0, bundle.id), removed


def test_a_published_port(box):
    wait_until(lambda: fetch("http://127.0.0.1:8081/page") == b"hello from a VM\n", "the page", 60)


def test_copies_end_in_the_containers_files_and_never_in_dom0s(box, podman, tmp_path):
    (tmp_path / "f").write_text("copied\n")
    before = set(os.listdir("/"))
    assert podman("cp", str(tmp_path / "f"), f"{box.id}:/volume/f").returncode == 0
    assert (box.folder / "volume/f").read_text() == "copied\n"
    assert set(os.listdir("/")) == before
    # a link that the VM has made since: under runc it would lead to the container's process
    (box.rootfs / "escape").symlink_to("/proc/1/root/tmp")
    assert podman("cp", str(tmp_path / "f"), f"{box.id}:/escape/runx-escaped").returncode != 0
    assert not os.path.exists("/tmp/runx-escaped")
    assert podman("cp", f"{box.id}:/bin/busybox", str(tmp_path / "b")).returncode == 0
    assert (tmp_path / "b").read_bytes() == (box.rootfs / "bin/busybox").read_bytes()
    assert podman("cp", f"{box.id}:/usr/sbin/runX", str(tmp_path / "x")).returncode != 0


def test_no_process_of_dom0s_is_shown(box, podman):
    top = podman("top", box.id).stdout
    assert b"runX" not in top and b"xenstored" not in top
    stats = podman("stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", box.id)
    assert (stats.returncode, stats.stderr) == (0, b""), stats
    assert int(stats.stdout.split()[-1]) >= 2


def test_exec(box):
    check_exec([*PODMAN, "exec"], [box.id])


def test_a_health_check(box, podman):
    well = box.rootfs / "tmp/well"
    for change, status in ((well.touch, 0), (well.unlink, 1)):
        change()
        assert podman("healthcheck", "run", box.id).returncode == status


def test_nothing_can_be_shared_with_another_container(box, podman):
    options = [word for kind in ("pid", "ipc", "uts") for word in (f"--{kind}", f"container:{box.id}")]
    refused = podman("run", "--rm", "--network", "none", *options, "--rootfs", str(box.rootfs), "true")
    words = b"of another container or of the host, and containers cannot share a VM yet"
    assert refused.returncode != 0 and words in refused.stderr, refused


def test_a_pod_has_one_vm(bundle, podman, tmp_path, monkeypatch):
    """Its sandbox, for which Podman wants a program that is never run, is none."""
    shutil.copy(shutil.which("busybox"), tmp_path / "catatonit")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bundle.add_applets("hostname")
    options = ["--pod", "inside", "--rootfs", str(bundle.rootfs)]
    try:
        # in the cgroup that Podman 4.3 would make for the pod, nobody may open a device
        made = podman("pod", "create", "--share-parent=false", "--name", "inside", "--network", "none")
        assert made.returncode == 0, made
        before, name = len(xl("list").splitlines()), bundle.rootfs / "tmp/name"
        started = podman("run", "--detach", *options, "sh", "-c", "hostname >/tmp/name; exec sleep 1000")
        assert started.returncode == 0, started
        wait_in(name.parent, lambda: name.exists() and name.read_text() == "inside\n", "the pod's name")
        assert len(xl("list").splitlines()) == before + 1
        refused = podman("run", "--rm", *options, "true")
        assert refused.returncode != 0 and b"containers cannot share a VM yet" in refused.stderr, refused
    finally:
        removed = podman("pod", "rm", "--force", "--time", "0", "inside")
        call("podman", "rmi", "--force", "--all")
    assert removed.returncode == 0, removed
