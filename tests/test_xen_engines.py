"""What engines and images ask for, through Podman where it was Podman that showed it."""

import json
import pathlib
import subprocess

import pytest
from conftest import call, config, in_memory, namespaces

pytestmark = pytest.mark.usefixtures("clean_dom0")


def told(result):
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_podman_is_told_what_a_vm_cannot_share(bundle, podman):
    run = ["run", "--rm", "--annotation", "org.runx.rootfs=ramdisk"]
    network, rootfs = ["--network", "none"], ["--rootfs", str(bundle.rootfs)]
    status, first, errors = told(podman(*run, "-d", *network, "--ipc", "shareable", *rootfs, "sleep", "1000"))
    assert status == 0, errors
    first = first.strip()
    try:
        for kind in ("pid", "ipc", "uts"):
            status, _, errors = told(podman(*run, *network, f"--{kind}", f"container:{first}", *rootfs, "true"))
            assert (
                status != 0
                and f"names {kind} of another container or of the host, and containers cannot share a VM yet" in errors
            )
        status, _, errors = told(podman(*run, "--network", f"container:{first}", *rootfs, "true"))
        assert status != 0 and "another container, and containers cannot share a VM yet" in errors
        for kind in ("pid", "ipc"):
            status, _, errors = told(podman(*run, *network, f"--{kind}", "host", *rootfs, "true"))
            assert status != 0 and f"asks for the host's own {kind} namespace, which a VM cannot have" in errors
        host = pathlib.Path("/proc/sys/kernel/hostname").read_text()
        result = podman(*run, *network, "--uts", "host", *rootfs, "cat", "/proc/sys/kernel/hostname")
        assert told(result) == (0, host, "")
    finally:
        podman("rm", "-f", "-t", "0", first)


def test_an_image_gets_no_more_than_its_user_gave(bundle, podman):
    """Annotations, which Podman 4.3 takes from the image, and NETCONF of its environment."""
    said = {"memory": "1500", "vcpus": "3", "cmdline": "of=image", "type": "hvm", "kernel": "/k"}
    annotations = [word for key, value in said.items() for word in ("--annotation", f"org.runx.{key}={value}")]
    (bundle.folder / "Containerfile").write_text("FROM scratch\nCOPY rootfs /\nENV NETCONF=/etc/cni/net.d/x,net\n")
    assert call("podman", "build", "-q", *annotations, "-t", "greedy", str(bundle.folder)).returncode == 0
    try:
        script = "grep MemTotal /proc/meminfo; nproc; cat /proc/cmdline; ls /sys/class/net"
        limits = ["-m", "64m", "--cpus", "1", "--network", "none"]
        status, output, errors = told(podman("run", "--rm", *limits, "greedy", "sh", "-c", script))
        assert status == 0, errors
        memory, processors, words, *interfaces = output.splitlines()
        assert int(memory.split()[1]) < 64 << 10 and processors == "1"
        assert "of=image" not in words and interfaces == ["lo"]
    finally:
        call("podman", "rmi", "-f", "greedy")


def test_no_more_processors_than_the_host_has(bundle):
    spec = in_memory(config("nproc"))
    spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
    spec["linux"] = {"resources": {"cpu": {"quota": 6400000, "period": 100000}}}
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    lines = subprocess.run(["xl", "info"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    processors = next(int(line.split(":")[1]) for line in lines if line.startswith("nr_cpus"))
    assert (result.returncode, result.stdout.decode()) == (0, f"{min(processors, 8)}\n"), result


def test_a_network_namespace_that_another_vm_has_is_refused_at_create(bundle, second):
    call("ip", "netns", "add", "shared", check=True)
    try:
        spec = in_memory(config("sleep", "1000"))
        spec["linux"] = {"namespaces": namespaces(network="/run/netns/shared")}
        for each in (bundle, second):
            each.write_config(spec)
        first = bundle.created()
        for again in (bundle.root, second.root):  # the engine's own root, and another one's
            second.root = again
            refused = second.create()
            assert refused.returncode == 1 and b"containers cannot share a VM yet" in refused.stderr
            assert refused.stderr.count(b"\n") == 1 and not (again / second.id).exists()
        # by the monitor's pid, as engines name it
        spec["linux"]["namespaces"][-1]["path"] = f"/proc/{bundle.pid()}/ns/net"
        second.write_config(spec)
        assert b"containers cannot share a VM yet" in second.create().stderr
        assert bundle.runx("delete", "--force", bundle.id).returncode == 0 and first is not None
        spec["linux"]["namespaces"][-1]["path"] = "/run/netns/shared"
        second.write_config(spec)
        second.created()
        assert json.loads(second.runx("state", second.id).stdout)["status"] == "created"
        assert second.runx("delete", "--force", second.id).returncode == 0
    finally:
        call("ip", "netns", "delete", "shared")
        call("umount", "/run/netns")  # which ip has mounted
