# SPDX-License-Identifier: Apache-2.0
"""Through engines, as users meet runX: containerd's `ctr run --runc-binary=/usr/sbin/runX`, and Podman.

What needs a network of theirs is in test_xen_network.py, what needs a terminal in test_xen_streams.py.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import uuid

import pytest
from conftest import IMAGE, SEEN, call, config, make_image, mounted, shim_pid, wait_for, wait_in, wait_until

pytestmark = pytest.mark.usefixtures("clean_dom0")


# ---- containerd

IN_MEMORY = ["--annotation", "org.runx.rootfs=ramdisk"]
needs_ctr = pytest.mark.skipif(not shutil.which("ctr"), reason="needs containerd's ctr")


def ctr(*args, **options):
    return call("ctr", *args, **options)


def ctr_run(*args, options=(), **keywords):
    name = f"test-{uuid.uuid4().hex[:8]}"
    return ctr("run", "--rm", "--runc-binary=/usr/sbin/runX", *options, IMAGE, name, *args, **keywords)


def task(name):
    """(pid, status) of a task, or None."""
    for line in ctr("task", "ls").stdout.decode().splitlines():
        if line.split()[0] == name:
            return tuple(line.split()[1:3])
    return None


def exit_status(name):
    """The task's exit status, when it has ended and containerd has seen that: `ctr task rm` tells one that is not 0."""
    try:
        pidfd = os.pidfd_open(int(task(name)[0]))
    except ProcessLookupError:
        pass  # it has ended
    else:
        wait_for(pidfd)
        os.close(pidfd)
    wait_until(lambda: task(name)[1] == "STOPPED", f"task {name} stopped")
    removed = ctr("task", "rm", name)
    told = re.search(r"non-zero exit code (\d+)", (removed.stdout + removed.stderr).decode())
    return int(told[1]) if told else removed.returncode


@pytest.mark.main_path
@needs_ctr
def test_arguments_environment_and_the_default_spec_arrive_and_streams_and_status_come_back():
    awkward = ["two words", "'", '"', "$HOME `id` \\", "line\nbreak\n", "héłló 世界", "", "*", "-n", "a=b"]
    script = r"""
        for a; do printf "%s" "$a" | od -An -tx1 -v | tr -d " \n"; echo; done; pwd; printf "%s\n" "$AWKWARD"
        uname -r; hostname; cat /proc/1/comm; ls -d /dev/null /dev/shm /dev/pts/ptmx /sys/kernel /proc/self/fd; mount
        echo err >&2; exit 37
    """
    options = ["--env", "AWKWARD=a b\t'\"$x\\ \u00e9", "--cwd", "/usr/new/folder"]
    result = ctr_run("sh", "-c", script, "sh", *awkward, options=options)
    assert (result.returncode, result.stderr) == (37, b"err\n"), result
    lines = iter(result.stdout.decode().splitlines())
    assert [bytes.fromhex(next(lines)).decode() for _ in awkward] == awkward
    assert next(lines) == "/usr/new/folder"
    assert next(lines) == options[1].partition("=")[2]
    kernel = next(lines)
    assert kernel.endswith("-runx") and kernel != os.uname().release
    mounts = {line.split()[2]: line.split()[4] for line in lines if " type " in line}
    expected = {"/": "xenfuse", "/proc": "proc", "/sys": "sysfs", "/dev/pts": "devpts"}
    expected |= dict.fromkeys(("/dev", "/run"), "tmpfs")
    assert expected.items() <= mounts.items()


@needs_ctr
def test_with_the_rootfs_in_memory_much_passes_through_stdin_and_stdout_unchanged():
    """Many times what the consoles' rings hold, 1 and 2 KiB, and more than pipes do: of less, which ctr may have read
    before there is a task, it never tells the end."""
    data = os.urandom(200_000)
    script = """
        sha256sum >&2; dd if=/dev/urandom of=/tmp/f bs=1000 count=400 2>/dev/null; sha256sum </tmp/f >&2
        cat /tmp/f; grep -c xenfuse /proc/mounts >&2
    """
    result = ctr_run("sh", "-c", script, input=data, options=IN_MEMORY)
    assert (len(result.stdout), result.returncode) == (400_000, 1)
    *sums, shared = [line.split()[0] for line in result.stderr.decode().splitlines()]
    assert sums == [hashlib.sha256(data).hexdigest(), hashlib.sha256(result.stdout).hexdigest()]
    assert shared == "0"


@needs_ctr
def test_hooks_of_the_engine_run(bundle):
    spec = config("echo", "hello")
    spec["root"]["path"] = str(bundle.rootfs)
    shell = {"path": "/bin/sh", "args": ["sh", "-c", "cat >>/tmp/hook.json"]}
    host = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >>{bundle.folder}/hooks.json"], "timeout": 10}
    spec["hooks"] = {"startContainer": [shell], "createRuntime": [host], "poststop": [host]}
    bundle.write_config(spec)
    options = ["--rm", "--runc-binary=/usr/sbin/runX", "--config", str(bundle.folder / "config.json")]
    result = ctr("run", *options, bundle.id)
    assert (result.returncode, result.stdout) == (0, b"hello\n"), result
    states = "[" + (bundle.folder / "hooks.json").read_text().replace("}{", "},{") + "]"
    assert [state["status"] for state in json.loads(states)] == ["creating", "stopped"]
    assert json.loads((bundle.rootfs / "tmp/hook.json").read_text())["id"] == bundle.id


@needs_ctr
@pytest.mark.parametrize("stage", ["creating", "running"])
def test_a_shim_that_is_killed_leaves_nothing(stage):
    name, root = f"test-{uuid.uuid4().hex[:8]}", pathlib.Path("/run/containerd/runc/default")
    root.mkdir(mode=0o711, parents=True, exist_ok=True)
    run = subprocess.Popen(
        ["ctr", "run", "-d", "--runc-binary=/usr/sbin/runX", IMAGE, name, "sleep", "1000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state, stages = root / name / "state.json", ["creating", "created", "running"]

    def at_stage():  # or past it: created is short
        return state.exists() and stages.index(json.loads(state.read_text())["status"]) >= stages.index(stage)

    wait_in(root, state.parent.exists, "the state folder")
    wait_in(state.parent, at_stage, stage)
    os.kill(shim_pid(name), signal.SIGKILL)
    run.wait()
    wait_in(root, lambda: not state.parent.exists(), "the state folder to go")
    ctr("task", "rm", "--force", name)
    ctr("container", "rm", name)


@needs_ctr
def test_containerd_hears_that_a_containers_memory_has_run_out():
    with subprocess.Popen(["ctr", "events"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as events:
        result = ctr_run("tail", "/dev/zero", options=[*IN_MEMORY, "--memory-limit", str(48 << 20)])
        assert result.returncode == 137, result
        topics = [next(line.split()[-2] for line in events.stdout if b"/tasks/" in line)]
        while topics[-1] != b"/tasks/delete":
            topics.append(next(line.split()[-2] for line in events.stdout if b"/tasks/" in line))
        events.kill()
    assert topics == [b"/tasks/create", b"/tasks/start", b"/tasks/oom", b"/tasks/exit", b"/tasks/delete"]


@needs_ctr
def test_an_unknown_command_is_named_in_containerds_error():
    result = ctr_run("no-such-command")
    assert result.returncode != 0
    assert b'exec: "no-such-command": executable file not found in $PATH' in result.stderr


def test_features_are_what_containerd_asks_for():
    result = subprocess.run(["/usr/sbin/runX", "features"], capture_output=True, env={})
    features = json.loads(result.stdout)
    assert features["ociVersionMin"] == "1.0.0" and result.stderr == b""


@needs_ctr
def test_a_rootfs_that_a_snapshotter_of_block_devices_has_mounted(bundle):
    """As ctr takes one that is ready."""
    shutil.copytree(bundle.rootfs, bundle.folder / "source", symlinks=True)
    image, target = make_image(bundle.folder, bundle.folder / "source"), bundle.folder / "mnt"
    options = ["--rm", "--runc-binary=/usr/sbin/runX", "--annotation", "org.runx.rootfs=block"]
    options += ["--env", "PATH=/bin", "--rootfs"]  # without an image there is none
    with mounted(image, target):
        result = ctr("run", *options, str(target), bundle.id, "sh", "-c", SEEN + "echo kept >/written")
        assert (result.stdout, result.returncode) == (b"ext4 rw\n/\n", 0), result
    with mounted(image, target, "ro"):
        assert (target / "written").read_text() == "kept\n"


# ---- Podman


@pytest.mark.main_path
def test_podman_runs_a_container(bundle, podman):
    """Also one that has the host's UTS namespace: its name."""
    script = "echo out; echo err >&2; cat /proc/sys/kernel/hostname; exit 3"
    options = ["--rm", "--network", "none", "--uts", "host", "--rootfs", str(bundle.rootfs)]
    result = podman("run", *options, "sh", "-c", script)
    host = pathlib.Path("/proc/sys/kernel/hostname").read_bytes()
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n" + host, b"err\n")


def test_podman_removes_a_container_that_is_ending(bundle, podman):
    """One that does not care for SIGTERM, test_xen_podman.py has.

    Podman gives up where the container ends after its last look and before its `kill` has begun, which is then right to
    fail; of what has ended there is nothing to kill.
    """
    name = bundle.id
    options = ["--detach", "--network", "none", *IN_MEMORY, "--name", name]
    started = podman("run", *options, "--rootfs", str(bundle.rootfs), "sh", "-c", "exit 0")
    assert started.returncode == 0, started
    removed = podman("rm", "--force", "--time", "1", name)
    if b"container state improper: stopped" in removed.stderr:
        removed = podman("rm", "--force", "--time", "1", name)
    assert (removed.returncode, removed.stdout.decode().strip()) == (0, name), removed


def test_podman_builds_an_image_that_gets_no_more_than_its_user_gives(bundle, podman):
    """Each RUN has a VM, over one rootfs; its output and exit status come back.  What an image may say: annotations,
    which Podman 4.3 takes from it, and NETCONF of its environment."""
    said = {"memory": "1500", "vcpus": "3", "cmdline": "of=image", "type": "hvm", "kernel": "/k"}
    annotations = [word for key, value in said.items() for word in ("--annotation", f"org.runx.{key}={value}")]
    file = bundle.folder / "Containerfile"
    build = ["build", "--layers=false", "--force-rm", "--network", "none", str(bundle.folder)]
    file.write_text("FROM scratch\nCOPY rootfs /\nENV NETCONF=/etc/cni/net.d/x,net\nRUN uname -r >/built\n")
    try:
        built = podman(*build, *annotations, "-t", "greedy")
        assert built.returncode == 0, built
        script = "cat /built; grep MemTotal /proc/meminfo; nproc; cat /proc/cmdline; ls /sys/class/net"
        limits = ["-m", "64m", "--cpus", "1", "--network", "none", *IN_MEMORY]
        result = podman("run", "--rm", *limits, "greedy", "sh", "-c", script)
        assert result.returncode == 0, result
        kernel, memory, processors, words, *interfaces = result.stdout.decode().splitlines()
        assert kernel.endswith("-runx") and int(memory.split()[1]) < 64 << 10 and processors == "1"
        assert "of=image" not in words and interfaces == ["lo"]
        file.write_text("FROM greedy\nRUN echo said; exit 7\n")
        failed = podman(*build)
        assert failed.returncode == 7 and b"said\n" in failed.stdout, failed
    finally:
        call("podman", "rmi", "-f", "greedy")
