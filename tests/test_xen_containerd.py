"""Through containerd, as users meet runX: `ctr run --runc-binary=/usr/sbin/runX`."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid

import pytest
from conftest import IMAGE, call, wait_until

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


def test_output_is_the_processs_own():
    result = ctr_run("echo", "hello")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"hello\n", b"")


def test_streams_are_separate_and_the_exit_status_is_the_processs():
    result = ctr_run("sh", "-c", "echo out; echo err >&2; exit 37")
    assert (result.returncode, result.stdout, result.stderr) == (37, b"out\n", b"err\n")


def test_a_mebibyte_through_stdin_and_back_is_identical():
    data = os.urandom(1 << 20)
    result = ctr_run("cat", input=data)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    assert (len(result.stdout), result.returncode, result.stderr) == (len(data), 0, b"")


def test_arguments_and_environment_arrive_exactly():
    awkward = ["two words", "'", '"', "$HOME `id` \\", "line\nbreak\n", "héłló 世界", "", "*", "-n", "a=b"]
    script = 'for a; do printf "%s" "$a" | od -An -tx1 -v | tr -d " \\n"; echo; done; printf "%s" "$AWKWARD"'
    options = ["--env", "AWKWARD=a b\t'\"$x\\ \u00e9"]
    result = ctr_run("sh", "-c", script, "sh", *awkward, options=options)
    lines = result.stdout.split(b"\n")
    assert [bytes.fromhex(line.decode()).decode() for line in lines[: len(awkward)]] == awkward
    assert lines[-1].decode() == options[1].partition("=")[2]


def test_the_working_directory_is_made_and_used():
    assert ctr_run("pwd", options=["--cwd", "/usr/new/folder"]).stdout == b"/usr/new/folder\n"


def test_a_detached_task_runs_until_its_trap_ends_it(detached):
    name = detached("sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 1; done")
    assert task_status(name) == "RUNNING"
    ctr("task", "exec", "--exec-id", "x", name, "true")  # refused, and harmless
    # the trap may not be set yet, and TERM is then what ends it: both are the container's own doing
    assert ctr("task", "kill", "--signal", "TERM", name).returncode == 0
    assert wait_for_exit(name) in (7, 143)


def test_an_uncaught_signal_ends_the_task_with_143(detached):
    name = detached("sleep", "1000")
    assert ctr("task", "kill", "--signal", "TERM", name).returncode == 0
    assert wait_for_exit(name) == 143


def test_sigkill_ends_the_task_with_137(detached):
    name = detached("sh", "-c", "trap '' TERM INT; while :; do sleep 1; done")
    assert ctr("task", "kill", "--signal", "KILL", name).returncode == 0
    assert wait_for_exit(name) == 137


def test_a_task_that_ends_by_itself_is_stopped_with_its_status(detached):
    assert wait_for_exit(detached("sh", "-c", "exit 3")) == 3


def test_an_unknown_command_is_named_in_containerds_error():
    result = ctr_run("no-such-command")
    assert result.returncode != 0
    assert b'exec: "no-such-command": executable file not found in $PATH' in result.stderr


def test_containers_may_run_at_once(detached):
    names = [detached("sh", "-c", f"exit {number}") for number in (11, 12, 13)]
    assert [wait_for_exit(name) for name in names] == [11, 12, 13]


def test_it_runs_a_kernel_of_its_own():
    result = ctr_run("uname", "-r")
    assert result.stdout.strip().endswith(b"-runx")
    assert result.stdout.decode().strip() != os.uname().release


def test_the_default_spec_is_served():
    script = "hostname; cat /proc/1/comm; ls -d /dev/null /dev/shm /dev/pts/ptmx /sys/kernel /proc/self/fd; mount"
    result = ctr_run("sh", "-c", script)
    assert result.returncode == 0 and result.stderr == b"", result
    lines = [line.split() for line in result.stdout.decode().splitlines() if " type " in line]
    mounts = {line[2]: line[4] for line in lines}
    expected = {"/": "9p", "/dev": "tmpfs", "/proc": "proc", "/sys": "sysfs", "/dev/pts": "devpts", "/run": "tmpfs"}
    assert expected.items() <= mounts.items()


def test_features_are_what_containerd_asks_for():
    result = subprocess.run(["/usr/sbin/runX", "features"], capture_output=True, env={})
    features = json.loads(result.stdout)
    assert features["ociVersionMin"] == "1.0.0" and result.stderr == b""
