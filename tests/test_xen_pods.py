# SPDX-License-Identifier: Apache-2.0
"""Pods of containerd's CRI plugin, asked for as the kubelet does.

With EXEC_OF=runc in the environment the first test is of runc's: so it was found to say what is right.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tarfile

import cri
import pytest
from conftest import IMAGE, call, fetch, wait_for, wait_in, wait_until, xl

pytestmark = pytest.mark.skipif(not shutil.which("containerd"), reason="needs containerd")

BUSYBOX = "/usr/share/lab/busybox.tar"  # IMAGE, as OCI lays it out
LABS_CONFIG = pathlib.Path(__file__).parent / "lab/containerd.toml"
CONFIG = """\
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."{images}"]
  {sandbox_image} = "{image}"
[plugins."{runtime}".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{folder}/net.d"
[plugins."{runtime}".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."{runtime}".containerd.runtimes.runx]
  runtime_type = "io.containerd.runc.v2"
  [plugins."{runtime}".containerd.runtimes.runx.options]
    BinaryName = "/usr/sbin/runX"
"""
CRI = "io.containerd.grpc.v1.cri"
TABLES = {  # by the number of containerd
    "1": {"runtime": CRI, "images": CRI, "sandbox_image": "sandbox_image"},
    "2": {"runtime": "io.containerd.cri.v1.runtime", "images": "io.containerd.cri.v1.images",
          "sandbox_image": "pinned_images.sandbox"},
}  # fmt: skip


def make_config(folder):
    """config.toml: the lab's, with the CRI plugin; from 2.0 on as these have it, which take the older one too."""
    number = re.search(r" v?(\d+)\.\d", call("containerd", "--version").stdout.decode())[1]
    text = LABS_CONFIG.read_text().replace(f'  "{CRI}",\n', "")
    if number != "1":
        text = text.replace("version = 2", "version = 3")
    return text + CONFIG.format(folder=folder, image=IMAGE, **TABLES[number])


def write_image(target):
    """IMAGE, laid out as `docker save` does it, with a command that suits a sandbox: it runs until it is killed."""
    with tarfile.open(BUSYBOX) as archive:

        def blob(descriptor):
            return archive.extractfile("blobs/" + descriptor["digest"].replace(":", "/")).read()

        manifest = json.loads(blob(json.load(archive.extractfile("index.json"))["manifests"][0]))
        config, layer = json.loads(blob(manifest["config"])), blob(manifest["layers"][0])
    config["config"]["Cmd"] = ["sleep", "infinity"]
    names = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    with tarfile.open(target, "w") as archive:
        for name, data in (("manifest.json", names), ("config.json", config), ("layer.tar", layer)):
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def has_image(address):
    """Whether the CRI plugin is there and knows the image, of whose import it hears a little later."""
    try:
        return 1 in cri.call(address, "ImageStatus", {1: {1: IMAGE}}, "ImageService")
    except (OSError, cri.Refused):
        return False


@pytest.fixture(scope="module")
def containerd(tmp_path_factory):
    """The folder of a containerd with the CRI plugin, and a network for pods."""
    folder = tmp_path_factory.mktemp("containerd")
    (folder / "config.toml").write_text(make_config(folder))
    routes = [{"dst": "0.0.0.0/0"}]
    ipam = {"type": "host-local", "subnet": "10.78.0.0/24", "dataDir": f"{folder}/leases", "routes": routes}
    bridge = {"type": "bridge", "bridge": "testpods0", "isGateway": True, "ipam": ipam}
    (folder / "net.d").mkdir()
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
    (folder / "net.d/10-pods.conflist").write_text(json.dumps(network))
    write_image(folder / "image.tar")
    address = folder / "containerd.sock"
    with open(folder / "log", "wb") as log:
        command = ["containerd", "--config", str(folder / "config.toml")]
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_in(folder, address.exists, "containerd's socket")
        words = ["--address", str(address), "--namespace", "k8s.io", "images", "import", str(folder / "image.tar")]
        imported = call("ctr", *words)
        assert imported.returncode == 0, imported
        wait_until(lambda: has_image(address), "the image", pause=1)
        yield folder
    finally:
        daemon.terminate()
        daemon.wait()
        for part in ("root", "state"):
            call("umount", "-R", str(folder / part))
        call("ip", "link", "del", "testpods0")


@pytest.fixture
def run_pod(clean_dom0, containerd, tmp_path):
    """Run a pod; afterwards those that are left are removed, and their addresses are free."""
    pods = []

    def run(*args, **options):
        pods.append(cri.Pod(containerd / "containerd.sock", *args, tmp_path, **options))
        return pods[-1]

    yield run
    for pod in pods:
        pod.remove()
    assert not list((containerd / "leases/pods").glob("10.*"))


def wait_for_page(address, page):
    """As the kubelet's probe of a container does, here when its output says that there is soon to be one."""
    wait_until(lambda: fetch(f"http://{address}:8080/token") == page, "the pod's page")


def wait_for_pid(pid):
    """Wait until a process has ended."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        wait_for(pidfd)
        os.close(pidfd)


def log_of(folder, name, lines):
    """What a container has written to its log: so many lines."""

    def read():
        return (folder / name).read_text().splitlines() if (folder / name).exists() else []

    wait_in(folder, lambda: len(read()) >= lines, f"{lines} lines in {name}")
    return [line.split(" ", 3)[3] for line in read()]  # behind the time, the stream, and whether it is a whole line


@pytest.fixture
def token(tmp_path):
    """A volume with a file as the kubelet writes one, which may change: a link to a link."""
    for name in ("first", "second"):
        (tmp_path / "token" / f"..{name}").mkdir(parents=True)
        (tmp_path / "token" / f"..{name}" / "token").write_text(f"{name}\n")
    (tmp_path / "token/..data").symlink_to("..first")
    (tmp_path / "token/token").symlink_to("..data/token")
    return tmp_path / "token"


SHOW = """
hostname; echo $HOSTNAME; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /etc/resolv.conf /token/token
ip -o -4 address show eth0
"""
SHOWN = ["web", "web", "79", "search default.svc.test", "nameserver 10.96.0.10", "options ndots:5"]
# until the token changes
SERVE = """
echo serving; httpd -f -p 8080 -h /token &
token=$(cat /token/token); while [ "$token" = "$(cat /token/token)" ]; do sleep 1; done; exit 7
"""


@pytest.mark.main_path
def test_containers_of_a_pod_have_its_network_and_name_one_after_the_other(run_pod, token, tmp_path):
    domains = xl("list").count("\n")
    pod = run_pod("web", os.environ.get("EXEC_OF", "runx").lower())
    ready, address, _ = pod.status()
    assert ready and address.startswith("10.78.0.") and xl("list").count("\n") == domains
    end = tmp_path / "termination"
    end.touch()
    mounts = [("/token", token, True), ("/dev/termination-log", end, False)]
    first = pod.start("app", IMAGE, "sh", "-c", SHOW + "echo end >/dev/termination-log; " + SERVE, mounts=mounts)
    *lines, interface, _ = log_of(tmp_path, "app-0.log", 9)
    assert lines == [*SHOWN, "first"] and f" inet {address}/24 " in interface
    assert end.read_text() == "end\n"
    wait_for_page(address, b"first\n")
    assert pod.exec(first, "sh", "-c", "cat /token/token; exit 3") == (b"first\n", 3)
    pid = pod.state(first)[2]
    (token / "..new").symlink_to("..second")
    (token / "..new").rename(token / "..data")
    wait_for_pid(pid)
    wait_until(lambda: pod.state(first)[:2] == (cri.EXITED, 7), "containerd's word of the container's end", 60, pause=1)
    # as the kubelet starts it again: it removes the first one only later
    second = pod.start("app", IMAGE, "sh", "-c", SHOW + SERVE, mounts=mounts, attempt=1)
    *lines, interface, _ = log_of(tmp_path, "app-1.log", 9)
    assert lines == [*SHOWN, "second"] and f" inet {address}/24 " in interface
    wait_for_page(address, b"second\n")
    pod.call("RemoveContainer", {1: first})
    pod.call("StopPodSandbox", {1: pod.id})
    assert pod.state(second)[:2] == (cri.EXITED, 137) and not pod.status()[0]
    pod.remove()
    with pytest.raises(cri.Refused, match="not found"):
        pod.status()


def test_neither_a_second_container_nor_the_sandboxs_death_disturb_the_first(run_pod, token, tmp_path):
    """Of which the second is refused, and the other, as under runc, is the end of the pod only for the kubelet."""
    pod = run_pod("two", "runx")
    _, address, pid = pod.status()
    first = pod.start("app", IMAGE, "sh", "-c", SERVE, mounts=[("/token", token, True)])
    log_of(tmp_path, "app-0.log", 1)
    wait_for_page(address, b"first\n")
    with pytest.raises(cri.Refused, match="another container, and containers cannot share a VM yet"):
        pod.start("sidecar", IMAGE, "true")
    assert fetch(f"http://{address}:8080/token") == b"first\n"
    os.kill(pid, signal.SIGKILL)
    wait_for_pid(pid)
    wait_until(lambda: not pod.status()[0], "containerd's word of the sandbox's end", 60, pause=1)
    assert fetch(f"http://{address}:8080/token") == b"first\n"
    assert pod.exec(first, "echo", "still here") == (b"still here\n", 0)
    pod.call("StopPodSandbox", {1: pod.id})
    assert pod.state(first)[:2] == (cri.EXITED, 137)
