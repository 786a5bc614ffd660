"""Through containerd, as users meet runX: `ctr run --runc-binary=/usr/sbin/runX`."""

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
from conftest import IMAGE, call, config, shim_pid, wait_until

pytestmark = [
    pytest.mark.usefixtures("clean_dom0"),
    pytest.mark.skipif(not shutil.which("ctr"), reason="needs containerd's ctr"),
]


def ctr(*args, **options):
    return call("ctr", *args, **options)


def ctr_run(*args, options=(), **keywords):
    name = f"test-{uuid.uuid4().hex[:8]}"
    return ctr("run", "--rm", "--runc-binary=/usr/sbin/runX", *options, IMAGE, name, *args, **keywords)


@pytest.fixture
def detached():
    """Starts `ctr run -d` containers and removes them."""
    names = []

    def start(*args):
        names.append(f"test-{uuid.uuid4().hex[:8]}")
        result = ctr("run", "-d", "--runc-binary=/usr/sbin/runX", IMAGE, names[-1], *args)
        assert result.returncode == 0, result
        return names[-1]

    yield start
    for name in names:
        ctr("task", "rm", "--force", name)
        ctr("container", "rm", name)


def wait_for_exit(name):
    """The task's exit status, when containerd has seen it: `ctr task rm` tells one that is not 0."""
    wait_until(lambda: task_status(name) == "STOPPED", f"task {name} stopped")
    removed = ctr("task", "rm", name)
    told = re.search(r"non-zero exit code (\d+)", (removed.stdout + removed.stderr).decode())
    return int(told[1]) if told else removed.returncode


def task_status(name):
    for line in ctr("task", "ls").stdout.decode().splitlines():
        if line.split()[0] == name:
            return line.split()[2]
    return None


def test_streams_are_separate_and_the_exit_status_is_the_processs():
    result = ctr_run("sh", "-c", "echo out; echo err >&2; exit 37")
    assert (result.returncode, result.stdout, result.stderr) == (37, b"out\n", b"err\n")


def test_megabytes_through_stdin_and_stdout_have_the_same_checksums():
    data = os.urandom(1 << 20)
    script = (
        "sha256sum >&2; dd if=/dev/urandom of=/tmp/f bs=65536 count=64 2>/dev/null; sha256sum </tmp/f >&2; cat /tmp/f"
    )
    result = ctr_run("sh", "-c", script, input=data)
    assert (len(result.stdout), result.returncode) == (4 << 20, 0)
    sums = [line.split()[0] for line in result.stderr.decode().splitlines()]
    assert sums == [hashlib.sha256(data).hexdigest(), hashlib.sha256(result.stdout).hexdigest()]


def test_arguments_and_environment_arrive_exactly():
    awkward = ["two words", "'", '"', "$HOME `id` \\", "line\nbreak\n", "héłló 世界", "", "*", "-n", "a=b"]
    script = 'for a; do printf "%s" "$a" | od -An -tx1 -v | tr -d " \\n"; echo; done; pwd; printf "%s" "$AWKWARD"'
    options = ["--env", "AWKWARD=a b\t'\"$x\\ \u00e9", "--cwd", "/usr/new/folder"]
    result = ctr_run("sh", "-c", script, "sh", *awkward, options=options)
    lines = result.stdout.split(b"\n")
    assert [bytes.fromhex(line.decode()).decode() for line in lines[: len(awkward)]] == awkward
    assert lines[-2] == b"/usr/new/folder"
    assert lines[-1].decode() == options[1].partition("=")[2]


def test_tasks_at_once_end_each_with_its_status(detached):
    natural = detached("sh", "-c", "exit 3")
    terminated = detached("sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.1; done")
    killed = detached("sh", "-c", "trap '' TERM INT; while :; do sleep 1; done")
    assert ctr("task", "kill", "--signal", "KILL", killed).returncode == 0
    terminate(terminated)
    assert [wait_for_exit(name) for name in (natural, terminated, killed)] == [3, 8, 137]


def terminate(name):
    """Sends TERM until it is heard: the first process of a PID namespace ignores it before its trap is set."""
    wait_until(lambda: ctr("task", "kill", name).returncode != 0 or task_status(name) == "STOPPED", "TERM to end it")


def test_a_task_is_listed_paused_and_resumed(detached):
    name = detached("sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.1; done")
    assert task_status(name) == "RUNNING"
    refused = ctr("task", "exec", "--exec-id", "x", name, "true")
    assert b"runX does not support exec" in refused.stderr
    listed = ctr("task", "ls").stdout.decode().split()
    pid = listed[listed.index(name) + 1]
    assert ctr("task", "ps", name).stdout.split()[:3] == [b"PID", b"INFO", pid.encode()]
    assert ctr("task", "pause", name).returncode == 0
    assert task_status(name) == "PAUSED"
    assert ctr("task", "kill", name).returncode == 0
    assert ctr("task", "resume", name).returncode == 0
    terminate(name)
    assert wait_for_exit(name) == 8


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


@pytest.mark.parametrize("stage", ["creating", "created", "running"])
def test_a_shim_that_is_killed_leaves_nothing(stage):
    name = f"test-{uuid.uuid4().hex[:8]}"
    run = subprocess.Popen(
        ["ctr", "run", "-d", "--runc-binary=/usr/sbin/runX", IMAGE, name, "sleep", "1000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state = pathlib.Path(f"/run/containerd/runc/default/{name}/state.json")

    stages = ["creating", "created", "running"]

    def at_stage():  # or past it: created is short
        return state.exists() and stages.index(json.loads(state.read_text())["status"]) >= stages.index(stage)

    wait_until(at_stage, stage)
    os.kill(shim_pid(name), signal.SIGKILL)
    run.wait()
    wait_until(lambda: not state.parent.exists(), "the state folder to go")
    ctr("task", "rm", "--force", name)
    ctr("container", "rm", name)


def test_containerd_hears_that_a_containers_memory_has_run_out():
    with subprocess.Popen(["ctr", "events"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as events:
        result = ctr_run("tail", "/dev/zero", options=["--memory-limit", str(48 << 20)])
        assert result.returncode == 137, result
        topics = [next(line.split()[-2] for line in events.stdout if b"/tasks/" in line)]
        while topics[-1] != b"/tasks/delete":
            topics.append(next(line.split()[-2] for line in events.stdout if b"/tasks/" in line))
        events.kill()
    assert topics == [b"/tasks/create", b"/tasks/start", b"/tasks/oom", b"/tasks/exit", b"/tasks/delete"]


def test_an_unknown_command_is_named_in_containerds_error():
    result = ctr_run("no-such-command")
    assert result.returncode != 0
    assert b'exec: "no-such-command": executable file not found in $PATH' in result.stderr


def test_the_default_spec_is_served():
    script = (
        "uname -r; hostname; cat /proc/1/comm;ls -d /dev/null /dev/shm /dev/pts/ptmx /sys/kernel /proc/self/fd; mount"
    )
    result = ctr_run("sh", "-c", script)
    assert result.returncode == 0 and result.stderr == b"", result
    kernel, *lines = result.stdout.decode().splitlines()
    assert kernel.endswith("-runx") and kernel != os.uname().release
    lines = [line.split() for line in lines if " type " in line]
    mounts = {line[2]: line[4] for line in lines}
    expected = {"/": "9p", "/dev": "tmpfs", "/proc": "proc", "/sys": "sysfs", "/dev/pts": "devpts", "/run": "tmpfs"}
    assert expected.items() <= mounts.items()


def test_features_are_what_containerd_asks_for():
    result = subprocess.run(["/usr/sbin/runX", "features"], capture_output=True, env={})
    features = json.loads(result.stdout)
    assert features["ociVersionMin"] == "1.0.0" and result.stderr == b""


def test_podman_runs_a_container(bundle, podman):
    script = "echo out; echo err >&2; exit 3"
    result = podman("run", "--rm", "--network", "none", "--rootfs", str(bundle.rootfs), "sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
