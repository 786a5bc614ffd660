"""What can be entered by the container's pid: the container's files, and nothing of dom0's."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess

import pytest
from conftest import DEVPTS, call, config, in_memory, wait_for, wait_until

pytestmark = pytest.mark.usefixtures("clean_dom0")

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
SLEEP = ["sh", "-c", "echo begun; while :; do sleep 1; done"]


def namespaces_of(pid):
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in NAMESPACES}


def inside(pid, *command, **options):
    """Runs a command of the container's rootfs in all namespaces of a process."""
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
        {"destination": "/data", "type": "bind", "source": str(data), "options": ["rbind"]},
        {"destination": "/data/read", "type": "bind", "source": str(data), "options": ["rbind", "ro"]},
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(data / "file"), "options": ["bind"]},
        {"destination": "/absolute/file", "type": "bind", "source": str(data / "file"), "options": ["bind"]},
        {"destination": "/out/tmp/volume", "type": "bind", "source": str(data), "options": ["bind"]},
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
def test_nothing_of_dom0_is_reachable_through_the_containers_pid(bundle, tmp_path, exported):
    data, spec = full(bundle, tmp_path)
    bundle.write_config(spec if exported else in_memory(spec))
    bundle.created()
    pid, root = bundle.pid(), pathlib.Path(f"/proc/{bundle.pid()}/root")
    assert bundle.runx("start", bundle.id).returncode == 0
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
    assert not exported or (root / "data/file").read_text() == "of the volume\n"


def test_entering_the_container_shows_its_files_its_name_and_no_process_of_dom0(bundle, tmp_path):
    data, spec = full(bundle, tmp_path)
    bundle.write_config({**spec, "root": {"path": "rootfs", "readonly": True}})
    (tmp_path / "real").mkdir()
    bundle.root = tmp_path / "link"  # as Docker's is, in /var/run
    bundle.root.symlink_to("real")
    bundle.created()
    pid = bundle.pid()
    assert bundle.runx("start", bundle.id).returncode == 0
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
    processes, title = lines[len(expected) :]
    assert processes.split()[0] == "1" and len(processes.split()) <= 4, result
    assert title.startswith("sh -c echo begun;")
    assert (data / "new").read_text() == "x\n"
    assert socket.gethostname() != "a-host-of-its-own"
    rows = bundle.runx("ps", bundle.id, "-o", "pid,args").stdout.decode().splitlines()
    assert rows[1].split(None, 2) == [str(pid), "sh", "-c echo begun; while :; do sleep 1; done"]


def cgroup_of(pid):
    """{hierarchy's controllers, or its name: path}; those of version 2 are ""."""
    lines = pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {controllers: path for _, controllers, path in (line.split(":") for line in lines)}


@pytest.fixture
def version_1(tmp_path):
    """A hierarchy of version 1 beside dom0's own."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    assert call("mount", "-t", "cgroup", "-o", "none,name=runx-test", "none", str(folder)).returncode == 0
    yield folder
    assert call("umount", str(folder)).returncode == 0


def test_what_serves_a_container_is_in_the_cgroup_of_config_json(bundle, version_1):
    spec = config(*SLEEP)
    spec["linux"] = {"cgroupsPath": f"/runx-tests/../runx-tests/{bundle.id}"}
    spec["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "cpu": {"shares": 2048}}
    bundle.write_config(spec)
    bundle.created()
    folder = pathlib.Path(f"/sys/fs/cgroup/runx-tests/{bundle.id}")
    path = f"/runx-tests/{bundle.id}"
    assert cgroup_of(bundle.pid()) == cgroup_of(bundle.monitor()) == {"": path, "name=runx-test": path}
    names = {pathlib.Path(f"/proc/{pid}/comm").read_text()[:4] for pid in (folder / "cgroup.procs").read_text().split()}
    assert names == {"runX", "xen-"}
    assert int((folder / "memory.max").read_text()) == 128 << 20
    assert (folder / "cpu.weight").read_text() == "79\n"  # 1024 shares are 39
    assert bundle.runx("start", bundle.id).returncode == 0
    assert bundle.runx("update", "--cpu-share", "512", bundle.id).returncode == 0
    assert (folder / "cpu.weight").read_text() == "20\n"
    (folder / "below").mkdir()
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0
    for root in (folder.parents[1], version_1):
        assert not (root / "runx-tests" / bundle.id).exists()
        (root / "runx-tests").rmdir()


@pytest.fixture
def systemd():
    """A systemd, as the first process of a pid namespace; yields the beginning of a command there."""
    if not os.path.exists("/lib/systemd/systemd"):
        pytest.skip("needs systemd")
    cgroups, private = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/run/systemd/private")
    before = set(cgroups.rglob("*/"))
    command = ["unshare", "--fork", "--pid", "--mount-proc", "--propagation", "slave"]
    command += ["/lib/systemd/systemd", "--system", "--unit=basic.target"]
    pathlib.Path("/etc/machine-id").touch()
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "container": "lab"}, start_new_session=True, **quiet)
    wait_until(private.exists, "systemd")
    pid = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
    enter = ["nsenter", "--target", pid, "--pid", "--mount"]
    wait_until(lambda: call(*enter, "systemd-run", "--scope", "true").returncode == 0, "scopes of systemd", 60)
    yield enter
    os.kill(int(pid), signal.SIGKILL)
    process.wait()
    for folder in sorted(set(cgroups.rglob("*/")) - before, reverse=True):
        wait_until(lambda folder=folder: not folder.exists() or remove(folder), f"{folder} to go")
    shutil.rmtree("/run/systemd")


def remove(folder):
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def test_with_systemd_the_cgroup_is_a_scope(bundle, systemd):
    spec = in_memory(config("true"))
    spec["linux"] = {"cgroupsPath": f"machine.slice:runx:{bundle.id}"}
    bundle.write_config(spec)
    scope = pathlib.Path(f"/sys/fs/cgroup/machine.slice/runx-{bundle.id}.scope")
    words = bundle.command("create", "--bundle", str(bundle.folder), bundle.id)
    with open(bundle.folder / "output", "wb") as output:
        created = call(*systemd, words[0], "--systemd-cgroup", *words[1:], capture_output=False, stdout=output)
    assert created.returncode == 0, bundle.last_log()
    assert len((scope / "cgroup.procs").read_text().split()) == 2
    properties = call(*systemd, "systemctl", "show", "--property=ActiveState,Delegate,Slice", scope.name)
    assert set(properties.stdout.split()) == {b"ActiveState=active", b"Delegate=yes", b"Slice=machine.slice"}
    deleted = call(*systemd, *bundle.command("delete", "--force", bundle.id))
    assert (deleted.returncode, deleted.stderr) == (0, b"")
    wait_until(lambda: not scope.exists(), "the scope to go")
    assert not bundle.log.exists() or not bundle.log.read_text()


def test_a_killed_holder_ends_the_vm_and_leaves_nothing(bundle):
    bundle.write_config(in_memory(config(*SLEEP)))
    pidfd = bundle.created()
    monitor = os.pidfd_open(bundle.monitor())
    bundle.pidfds.append(monitor)
    assert bundle.runx("start", bundle.id).returncode == 0
    os.kill(bundle.pid(), signal.SIGKILL)
    wait_for(pidfd)
    wait_for(monitor)
    assert bundle.domain() is None
    assert bundle.state()["status"] == "stopped"
    assert bundle.runx("delete", bundle.id).returncode == 0


# ---- through engines


def test_podman_copies_to_and_from_the_container_and_never_dom0(bundle, podman, tmp_path):
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/hostname").write_text("of the image\n")
    (tmp_path / "f").write_text("copied\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    options = ["--network", "none", "--name", bundle.id, "--volume", f"{volume}:/volume"]
    result = podman("run", "--detach", *options, "--rootfs", str(bundle.rootfs), *SLEEP)
    assert result.returncode == 0, result
    try:
        before = set(os.listdir("/"))
        for target in ("/f", "/volume/f"):
            assert podman("cp", str(tmp_path / "f"), f"{bundle.id}:{target}").returncode == 0
        assert (bundle.rootfs / "f").read_text() == (volume / "f").read_text() == "copied\n"
        assert set(os.listdir("/")) == before
        # links that the VM has made since: under runc they would lead to processes of the container
        for number in (1, "self"):
            (bundle.rootfs / "escape").symlink_to(f"/proc/{number}/root/tmp")
            assert podman("cp", str(tmp_path / "f"), f"{bundle.id}:/escape/runx-escaped").returncode != 0
            (bundle.rootfs / "escape").unlink()
        assert not os.path.exists("/tmp/runx-escaped")
        assert podman("cp", f"{bundle.id}:/bin/busybox", str(tmp_path / "b")).returncode == 0
        assert (tmp_path / "b").read_bytes() == (bundle.rootfs / "bin/busybox").read_bytes()
        assert podman("cp", f"{bundle.id}:/usr/sbin/runX", str(tmp_path / "x")).returncode != 0
        top = podman("top", bundle.id).stdout.decode()
        assert "runX" not in top and "xenstored" not in top
        stats = podman("stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", bundle.id)
        assert (stats.returncode, stats.stderr) == (0, b""), stats
        assert int(stats.stdout.split()[-1]) >= 2
    finally:
        assert podman("rm", "--force", "--time", "0", bundle.id).returncode == 0
    wait_until(lambda: bundle.domain() is None, "the domain to go")
