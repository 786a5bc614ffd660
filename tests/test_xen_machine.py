# SPDX-License-Identifier: Apache-2.0
"""What the VM is made of: its size, its kernel and ramdisk, what xl is told about it, and what serves it on dom0."""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import time
import zlib

import pytest
from conftest import (
    PROGRAM_MOUNTS,
    call,
    can_run_pvh,
    config,
    file_servers,
    in_memory,
    runx_command,
    wait_for,
    wait_in,
    wait_until,
    xl,
)

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")

KERNEL = pathlib.Path("/usr/lib/runX/kernel")


# ---- its size, and what else xl is told


@pytest.mark.processors
def test_the_vm_has_the_memory_and_the_processors_of_linux_resources(bundle):
    """But no less than it needs to boot, and no more processors than the host has."""
    totals = []
    for mebibytes, expected in ((96, 96), (6, 24)):
        spec = config("sh", "-c", "read -r _ kibibytes _ </proc/meminfo; echo $kibibytes $(nproc)")
        spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
        memory = {"limit": mebibytes << 20}
        spec["linux"] = {"resources": {"memory": memory, "cpu": {"quota": 6400000, "period": 100000}}}
        result = bundle.run(spec)
        assert (result.returncode, result.stderr) == (0, b""), result
        kibibytes, processors = map(int, result.stdout.split())
        host = next(int(line.split(":")[1]) for line in xl("info").splitlines() if line.startswith("nr_cpus"))
        assert processors == min(host, expected // 8)  # 8 MiB for each
        totals.append(kibibytes)
    # the same kernel takes its own from both; of each page of what one has more, 64 bytes describe it
    more = (96 - 24) * 1024
    assert more * 62 // 64 < totals[0] - totals[1] < more and totals[1] < 24 * 1024, totals


@pytest.mark.processors
def test_what_xl_is_told(bundle, tmp_path):
    """Annotations, the host's own file, and XLCONF."""
    host, folder = pathlib.Path(runx.HOST_CONFIG), tmp_path / "xl"
    before = host.read_text() if host.exists() else None
    folder.mkdir()
    (folder / "extra").write_text("cap = 77\n")
    settings = {**json.loads(before or "{}"), "memory": 72, "cmdline": "of=host", "xlconf": [str(folder)]}
    settings.update(annotations=["vcpus", "cmdline"], environment=["XLCONF"], rootfs="ramdisk")
    host.write_text(json.dumps(settings))
    try:
        spec = config("sleep", "1000", env=["PATH=/bin", f"XLCONF={folder}/extra"])
        spec["annotations"] = {"org.runx.vcpus": "2", "org.runx.cmdline": "of=mine"}
        bundle.created(spec)
        domain = json.loads(call("xl", "list", "-l", str(bundle.domain())).stdout)[0]["config"]
        sizes = (domain["b_info"]["max_memkb"] >> 10, domain["b_info"]["max_vcpus"])
        assert sizes == (72, 2) and domain["b_info"]["cmdline"].endswith(" of=host of=mine")
        assert domain["b_info"]["sched_params"]["cap"] == 77
    finally:
        host.unlink()
        if before is not None:
            host.write_text(before)


def crashes_of_the_emulated_processor():
    """QEMU's software emulation of SVM loses the state of a PVH guest now and then; Xen sees a triple fault."""
    return xl("dmesg").count("Triple fault")


def test_a_pvh_guest_boots(bundle):
    """All other tests have PV guests in the lab, for its sake."""
    if not can_run_pvh():
        pytest.skip("this hypervisor cannot run PVH guests: no hardware virtualization")
    spec = config("sh", "-c", "cat; exit 4")
    spec["vm"] = {"hypervisor": {"parameters": ['type="pvh"']}}
    for _ in range(3):
        crashes = crashes_of_the_emulated_processor()
        result = bundle.run(spec, input=b"pvh" * 1000)
        if crashes_of_the_emulated_processor() == crashes:
            break
    assert (result.returncode, result.stdout, result.stderr) == (4, b"pvh" * 1000, b"")


def test_the_host_chooses_the_kind_of_guest(bundle):
    # in a mount namespace where the host's own configuration is hidden, if it has one
    bundle.write_config(config("true"))
    create = f"exec {' '.join(bundle.command('create'))} >/dev/null 2>&1"
    hide = "if [ -d /etc/runX ]; then mount -t tmpfs none /etc/runX; fi"
    assert call("unshare", "-m", "sh", "-c", f"{hide}; {create}").returncode == 0
    chosen = call("xenstore-read", f"/libxl/{bundle.domain()}/type").stdout.decode().strip()
    assert chosen == ("pvh" if can_run_pvh() else "pv")


# ---- a kernel and a ramdisk of the container's own


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


def test_a_system_of_its_own_from_the_rootfs_runs_and_can_crash(own_system):
    result = own_system.run(input=b"crash\n")
    lines = result.stdout.decode().replace("\r", "").splitlines()
    assert "own system: console=hvc0 panic=-1 of=mine quiet" in lines and "read crash" in lines, result
    assert result.returncode == 255 and b"the VM crashed" in own_system.log.read_bytes()


def test_a_system_of_its_own_is_shut_down_by_term_and_ends_by_kill(own_system):
    pidfd = own_system.started()
    assert file_servers() == set()  # nothing that would need one
    wait_in(own_system.folder, lambda: "own system" in own_system.output(), "its first words")
    refused = call(*runx_command(*own_system.globals(), "exec", own_system.id, "true"))
    assert refused.returncode == 255 and b"boots a system of its own: reach it by its console" in refused.stderr
    own_system.succeed("kill", "TERM")
    wait_for(pidfd)
    assert "told to" in own_system.output()
    own_system.succeed("delete")
    pidfd = own_system.started()
    own_system.succeed("kill", "KILL")
    wait_for(pidfd)


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
    result = bundle.run(spec, input=b"something\n")
    assert result.returncode == 0 and b"read something" in result.stdout, result
    assert not bundle.log.exists()


def test_a_kernel_that_cannot_be_booted(bundle):
    with open(bundle.rootfs / "large", "wb") as file:
        file.truncate(1 << 32)
    for kernel, words in (
        ("/no/kernel", "cannot boot /no/kernel of the container: No such file"),
        ("/bin", "cannot boot /bin of the container: it is not a regular file"),
        ("/bin/busybox", "xl create failed"),
        ("/large", "cannot boot /large of the container: 4096 MiB do not fit into a VM of"),
        ("", "the kernel's command line is 10"),
    ):
        spec = config("/bin/true", env=[f"RUNX_KERNEL={kernel}"])
        spec["vm"] = {"kernel": {"parameters": ["" if kernel else "x" * 1000]}}
        bundle.write_config(spec)
        bundle.check_refused(words)


def gzipped(content, size=None):
    """size: what it says of itself, if that is not true."""
    body = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = body.compress(content) + body.flush()
    return data if size is None else data[:-4] + struct.pack("<I", size)


def bzimage(payload):
    header = bytearray(1024)
    header[0x1F1], header[0x202:0x206], header[0x206:0x208] = 1, b"HdrS", b"\x0f\x02"
    struct.pack_into("<II", header, 0x248, 0, len(payload))
    return bytes(header) + payload


MEASURED = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
sys.exit(status)"""


@pytest.mark.parametrize(
    "kernel, memory, words",
    [
        (
            gzipped(bytes(1 << 20), 820 << 20),
            64,
            "cannot boot /k of the container: 820 MiB do not fit into a VM of 64 MiB",
        ),
        (bzimage(gzipped(b"", 820 << 20)), 1024, "unpacked it has 820 MiB, and dom0 has 128 for that"),
        # what is packed twice is for xl's own limit
        (gzipped(bzimage(gzipped(bytes(1 << 20), 820 << 20))), 64, "xl create failed"),
    ],
    ids=["gzip", "bzImage", "twice"],
)
def test_a_kernel_that_unpacks_without_end_does_not_reach_dom0s_memory(bundle, kernel, memory, words):
    (bundle.rootfs / "k").write_bytes(kernel)
    spec = in_memory(config("true", env=["PATH=/bin", "RUNX_KERNEL=/k"]))
    spec["linux"] = {"resources": {"memory": {"limit": memory << 20}}}
    bundle.write_config(spec)
    result = call("python3", "-c", MEASURED, *bundle.command("run"))
    assert result.returncode == 1 and words in result.stderr.decode(), result
    assert 0 < int(result.stdout) < 256, "MiB that xl has had"


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
    result = bundle.run(spec)
    assert (result.returncode, result.stdout.decode()) == (0, f"{version}\n"), result
    assert (bundle.rootfs / "file").read_text() == "written\n"


# ---- what the guest's kernel does beyond a container's usual needs


class Dom0Clock:
    """Dom0's clock, which is put back by what it has been moved."""

    def __init__(self):
        self.begin = time.time() - time.monotonic()

    def step(self, seconds):
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    def put_back(self):
        time.clock_settime(time.CLOCK_REALTIME, self.begin + time.monotonic())


@pytest.fixture
def clock():
    clock = Dom0Clock()
    yield clock
    clock.put_back()


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_the_clock_follows_dom0s(bundle, clock, kind):
    """Until a process of the container sets it."""
    if kind == "pvh" and not can_run_pvh():
        pytest.skip("this hypervisor cannot run PVH guests: no hardware virtualization")
    if kind == "pv" and os.uname().machine != "x86_64":
        pytest.skip("only x86 has PV guests")
    (bundle.rootfs / "bin/date").symlink_to("busybox")
    spec = in_memory(config("sh", "-c", "while read line; do [ -z $line ] || date -s $line >/dev/null; date +%s; done"))
    spec["vm"] = {"hypervisor": {"parameters": [f'type="{kind}"']}}
    bundle.write_config(spec)
    container = subprocess.Popen(bundle.command("run"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seconds(line=b""):
        container.stdin.write(line + b"\n")
        container.stdin.flush()
        return int(container.stdout.readline())

    def follows():
        before = int(time.time())
        return before - 1 <= seconds() <= time.time() + 1  # however long the answer takes

    seconds()  # it has booted
    assert follows()
    for step in (3600, -3600, 86400, -86400, 40 * 365 * 86400):
        clock.step(step)
        wait_until(follows, f"the guest's clock after a step of {step} s")
    clock.put_back()
    xl("pause", str(bundle.domain()))
    clock.step(-7200)
    xl("unpause", str(bundle.domain()))
    wait_until(follows, "the clock of a guest that was paused")
    assert seconds(b"@1000000000") < 1000000100
    clock.step(3600)
    for _ in range(5):
        assert seconds() < 1000000100  # its own, from now on
    container.communicate()
    assert container.returncode == 0


def test_protocols_of_gateways_and_cars(bundle):
    shutil.copy(pathlib.Path(__file__).with_name("features.py"), bundle.rootfs)
    spec = config("python3", "/features.py", env=["PATH=/bin:/usr/bin:/usr/sbin"])
    spec["mounts"] += PROGRAM_MOUNTS
    spec["linux"] = {"resources": {"memory": {"limit": 128 << 20}}}
    result = bundle.run(spec, timeout=300)
    assert (result.returncode, json.loads(result.stdout)) == (0, {}), result


# ---- what serves the VM on dom0


def test_what_serves_a_guest_is_bounded_and_spared_no_more_than_others(bundle):
    """The engine has itself spared by the kernel's OOM killer; the file server's limit leaves room for its work."""
    # they begin when all are there, with a line of the fifo for each
    writer = "(read -r _ <&3; exec dd if=/dev/zero of=/tmp/$i bs=64k count=2 conv=fsync 2>/dev/null) &"
    script = f"""
        exec 3<>/go; for i in $(seq 80); do {writer} done; for i in $(seq 80); do echo; done >&3
        wait; echo written; exec sleep 1000
    """
    bundle.add_applets("seq")
    os.mkfifo(bundle.rootfs / "go")
    bundle.write_config(config("sh", "-c", script))
    before = file_servers()
    argv = " ".join(bundle.command("create", "--pid-file", str(bundle.pid_file)))
    with open(bundle.folder / "stdout", "wb") as output:
        script = f"echo -700 >/proc/self/oom_score_adj; exec {argv}"
        created = call("sh", "-c", script, capture_output=False, stdout=output, stderr=output)
    assert created.returncode == 0, (bundle.folder / "stdout").read_text()
    (server,) = file_servers() - before
    for pid in (bundle.pid(), server):
        assert pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
    limits = pathlib.Path(f"/proc/{server}/limits").read_text().splitlines()
    (limit,) = [int(line.split()[3]) for line in limits if line.startswith("Max data size")]
    assert limit == runx.SERVING_DATA
    bundle.succeed("start")
    bundle.wait_for_output("written\n", 120)
    assert [path.stat().st_size for path in (bundle.rootfs / "tmp").iterdir()] == [128 << 10] * 80
    # one that comes to its limit ends, and its container with it
    bundle.pidfds.append(os.pidfd_open(bundle.pid()))
    os.kill(server, signal.SIGABRT)
    wait_for(bundle.pidfds[-1])
    assert "its files are not served any more" in bundle.log.read_text()
    bundle.succeed("delete")


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
    spec = config("sleep", "1000")
    spec["linux"] = {"cgroupsPath": f"/runx-tests/../runx-tests/{bundle.id}"}
    spec["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "cpu": {"shares": 2048}}
    bundle.created(spec)
    folder = pathlib.Path(f"/sys/fs/cgroup/runx-tests/{bundle.id}")
    path = f"/runx-tests/{bundle.id}"
    assert cgroup_of(bundle.pid()) == cgroup_of(bundle.monitor()) == {"": path, "name=runx-test": path}
    names = {pathlib.Path(f"/proc/{pid}/comm").read_text()[:4] for pid in (folder / "cgroup.procs").read_text().split()}
    assert names == {"runX"}
    assert int((folder / "memory.max").read_text()) == 128 << 20
    assert (folder / "cpu.weight").read_text() == "79\n"  # 1024 shares are 39
    bundle.succeed("start")
    bundle.succeed("update", "--cpu-share", "512")
    assert (folder / "cpu.weight").read_text() == "20\n"
    (folder / "below").mkdir()
    bundle.succeed("delete", "--force")
    for root in (folder.parents[1], version_1):
        assert not (root / "runx-tests" / bundle.id).exists()
        (root / "runx-tests").rmdir()


@pytest.fixture
def systemd():
    """A systemd, as the first process of a pid namespace; yield the beginning of a command there."""
    if not os.path.exists("/lib/systemd/systemd"):
        pytest.skip("needs systemd")
    cgroups, private = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/run/systemd/private")
    before = set(cgroups.rglob("*/"))
    command = ["unshare", "--fork", "--pid", "--mount-proc", "--propagation", "slave"]
    command += ["/lib/systemd/systemd", "--system", "--unit=lab.target"]
    pathlib.Path("/etc/machine-id").touch()
    units = private.parent / "system"
    units.mkdir(parents=True)
    # of all that it would start, none is needed; and systemd-tmpfiles would empty /tmp, where the test's files are
    (units / "lab.target").write_text("[Unit]\nDefaultDependencies=no\n")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "container": "lab"}, start_new_session=True, **quiet)
    wait_in(private.parent, private.exists, "systemd's socket")
    pid = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
    enter = ["nsenter", "--target", pid, "--pid", "--mount"]
    state = [*enter, "systemctl", "is-system-running", "--wait"]  # which itself waits
    wait_until(lambda: call(*state).stdout.strip() in (b"running", b"degraded"), "systemd", 60)
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
    words = bundle.command("create")
    words.insert(words.index("--root"), "--systemd-cgroup")
    with open(bundle.folder / "output", "wb") as output:
        created = call(*systemd, *words, capture_output=False, stdout=output)
    assert created.returncode == 0, bundle.last_log()
    assert len((scope / "cgroup.procs").read_text().split()) == 2
    properties = call(*systemd, "systemctl", "show", "--property=ActiveState,Delegate,Slice", scope.name)
    assert set(properties.stdout.split()) == {b"ActiveState=active", b"Delegate=yes", b"Slice=machine.slice"}
    deleted = call(*systemd, *bundle.command("delete", "--force"))
    assert (deleted.returncode, deleted.stderr) == (0, b"")
    wait_until(lambda: not scope.exists(), "the scope to go")
    assert not bundle.log.exists() or not bundle.log.read_text()
