"""The whole of a container's life, beyond the usual one: hooks, pause, update, every way to end, every way to fail."""

import json
import os
import pathlib
import signal
import subprocess
import threading

import pytest
import soak
from conftest import call, config, in_memory, processes, wait_for, wait_until, xl

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")

HOOK_KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def create(bundle, spec=None):
    """Creates the container; returns a pidfd of its monitor."""
    if spec:
        bundle.write_config(spec)
    return bundle.created()


def succeed(bundle, command, *args, **options):
    result = bundle.runx(command, *args, bundle.id, **options)
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout


# ---- hooks


def test_hooks_run_in_their_order_each_with_its_state(bundle, tmp_path):
    (bundle.rootfs / "tmp").chmod(0o777)
    text = 'cat >"$1/$2.json"; echo "$2 $0 $FOO $PWD" >>"$1/$3"; echo ignored; echo ignored >&2'
    script(bundle.rootfs / "hook", text)
    script(tmp_path / "hook", text)
    spec = config("sh", "-c", "echo process >>/tmp/guest", user={"uid": 5, "gid": 6})
    spec["annotations"] = {"org.example.note": "kept"}
    spec["hooks"] = {
        kind: [
            {
                "path": str(tmp_path / "hook"),
                "args": [kind, str(bundle.rootfs / "tmp"), kind, "host"],
                "env": ["FOO=bar"],
            }
        ]
        for kind in HOOK_KINDS
    }
    guest_hook = {"path": "/hook", "args": ["x", "/tmp", "startContainer", "guest"], "env": ["FOO=bar"], "timeout": 30}
    # without an environment of its own, a startContainer hook has the process's
    spec["hooks"]["startContainer"] = [guest_hook, {"path": "/hook", "args": ["x", "/tmp", "second", "guest"]}]
    pidfd = create(bundle, spec)
    pid = bundle.pid()
    succeed(bundle, "start")
    wait_for(pidfd)
    succeed(bundle, "delete")
    host = [f"{kind} {tmp_path}/hook bar {tmp_path}" for kind in HOOK_KINDS if kind != "startContainer"]
    assert (bundle.rootfs / "tmp/host").read_text().splitlines() == host
    guest = ["startContainer /hook bar /", "second /hook  /", "process"]
    assert (bundle.rootfs / "tmp/guest").read_text().splitlines() == guest
    states = {kind: json.loads((bundle.rootfs / f"tmp/{kind}.json").read_text()) for kind in HOOK_KINDS}
    assert {state["bundle"] for state in states.values()} == {str(bundle.folder)}
    assert all(state["annotations"] == spec["annotations"] for state in states.values())
    assert [(states[kind]["status"], states[kind]["pid"]) for kind in HOOK_KINDS] == [
        *[("creating", pid)] * 3, ("created", pid), ("running", pid), ("stopped", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_ends_create_and_poststop_runs(bundle, tmp_path, kind):
    first = script(tmp_path / "first", f"echo {kind} >>{tmp_path}/order; echo said; echo why >&2; exit 3")
    second = script(tmp_path / "second", f"echo $1 >>{tmp_path}/order")
    spec = config("true")
    spec["hooks"] = {
        kind: [{"path": first}, {"path": second, "args": ["x", "never"]}],
        "poststop": [{"path": "/no/such/hook"}, {"path": second, "args": ["x", "poststop"]}],
    }
    bundle.write_config(spec)
    result = bundle.create()
    assert f"error running {kind} hook #0: exit status 3, stdout: said, stderr: why" in result.stderr.decode()
    assert result.returncode == 1 and not bundle.pid_file.exists()
    assert not bundle.root.joinpath(bundle.id).exists() and bundle.domain() is None
    assert (tmp_path / "order").read_text().split() == [kind, "poststop"]
    assert "error running poststop hook #0: exit status 127" in bundle.log.read_text()


def test_a_hook_that_takes_too_long_is_killed_with_its_children(bundle, tmp_path):
    slow = script(tmp_path / "slow", f"sleep 1000 & echo $! $$ >{tmp_path}/pids; wait")
    spec = config("true")
    spec["hooks"] = {"createRuntime": [{"path": slow, "timeout": 1}]}
    bundle.write_config(spec)
    assert b"hook ran past specified timeout of 1s" in bundle.create().stderr
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: not pathlib.Path("/proc", pid).exists(), "the hook and its child to be killed")


@pytest.mark.parametrize(
    "text, limit, reason",
    [
        ("echo out; printf 'x\\033[1m%01000d\\n' 5 >&2; exit 3", {}, "exit status 3, stdout: out, stderr: x [1m000"),
        ("echo out; sleep 1000 & wait", {"timeout": 1}, "hook ran past specified timeout of 1s, stdout: out, stderr:"),
    ],
)
def test_a_start_container_hook_that_fails_ends_the_container(bundle, text, limit, reason):
    script(bundle.rootfs / "hook", text)
    spec = in_memory(config("echo", "ran"))
    spec["hooks"] = {"startContainer": [{"path": "/hook", **limit}]}
    pidfd = create(bundle, spec)
    result = bundle.runx("start", bundle.id)
    message = f"error running startContainer hook #0: {reason}"
    assert result.returncode == 1 and message in result.stderr.decode()
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert not (bundle.folder / "stdout").read_bytes()
    assert message in bundle.log.read_text()


def test_a_poststart_hook_that_fails_ends_and_removes_the_container(bundle, tmp_path):
    spec = in_memory(config("sleep", "1000"))
    spec["hooks"] = {
        "poststart": [{"path": script(tmp_path / "hook", "exit 3")}],
        "poststop": [{"path": script(tmp_path / "last", f"cat >{tmp_path}/state")}],
    }
    pidfd = create(bundle, spec)
    result = bundle.runx("start", bundle.id)
    assert result.returncode == 1 and b"error running poststart hook #0: exit status 3" in result.stderr
    wait_for(pidfd, 0)
    assert b"does not exist" in bundle.runx("state", bundle.id).stderr
    assert json.loads((tmp_path / "state").read_text())["status"] == "stopped"


# ---- signals


def test_every_signal_reaches_the_process_again_and_again(bundle):
    traps = "".join(f"trap 'echo {number}' {number};" for number in (1, 2, 3, 10, 12, 13, 15, 34, 50, 64))
    loop = "while :; do sleep 1000 & wait $!; done"  # a signal ends the wait at once
    child = f"(trap 'echo child; exit' USR2; echo ready; {loop}) &"
    pidfd = create(bundle, in_memory(config("sh", "-c", f"{child} {traps} echo ready; {loop}")))
    succeed(bundle, "start")
    caught, expected = bundle.folder / "stdout", ["ready", "ready"]
    wait_until(lambda: caught.read_text().split() == expected, "the traps to be set")

    def kill(name, *lines):
        assert bundle.runx("kill", bundle.id, name).returncode == 0
        expected.extend(lines)
        wait_until(lambda: caught.read_text().split() == expected, f"{name} to be caught")

    for name, line in (
        ("SIGHUP", "1"), ("INT", "2"), ("3", "3"), ("usr1", "10"), ("PIPE", "13"), ("TERM", "15"), ("15", "15"),
        ("SIGRTMIN", "34"), ("RTMIN+16", "50"), ("RTMAX", "64"), ("64", "64"),
    ):  # fmt: skip
        kill(name, line)
    for name in ("0", "WINCH", "CHLD", "CONT", "URG"):
        kill(name)
    # stopped processes get their signals when they go on
    assert bundle.runx("kill", bundle.id, "STOP").returncode == 0
    assert bundle.runx("kill", bundle.id, "TERM").returncode == 0
    requests = f"/local/domain/{bundle.domain()}/data/request"
    wait_until(lambda: not runx.Xenstore().list(requests), "the doorbell to have sent both")
    assert caught.read_text().split() == expected
    kill("CONT", "15")
    # --all: the process and its child
    assert bundle.runx("kill", "--all", bundle.id, "USR2").returncode == 0
    wait_until(lambda: sorted(caught.read_text().split()[len(expected) :]) == ["12", "child"], "both to catch USR2")
    assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
    wait_for(pidfd)
    assert b"container not running" in bundle.runx("kill", bundle.id, "TERM").stderr
    assert succeed(bundle, "kill", "--all") == b""


# ---- ends


@pytest.mark.parametrize(
    "name, command, status, reason",
    [
        ("oom", "exec tail /dev/zero", 137, "the VM has run out of memory: Out of memory: Killed process"),
        ("at once", "exec dd if=/dev/zero of=/x bs=1G", 137, "the VM has run out of memory: Out of memory: Killed"),
        ("panic", "echo 2 >/proc/sys/vm/panic_on_oom; exec tail /dev/zero", 255, "the VM crashed; exit status 255"),
        ("poweroff", "poweroff -f", 130, "the VM was powered off from inside; exit status 130"),
        ("reboot", "reboot -f", 129, "the VM was rebooted from inside; exit status 129"),
    ],
)
def test_a_vm_that_ends_in_a_way_of_its_own_has_a_status_and_a_reason(bundle, name, command, status, reason):
    spec = in_memory(config("sh", "-c", command))
    spec["linux"] = {"resources": {"memory": {"limit": 48 << 20}}}
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")
    assert reason in bundle.log.read_text()
    if name == "panic":
        assert "Kernel panic - not syncing: Out of memory" in bundle.log.read_text()


# ---- pause, resume, ps, events, update


def test_pause_resume_ps_events_and_update(bundle):
    count = 'n=0; while read -r word _; do [ "$word" != processor ] || n=$((n+1)); done </proc/cpuinfo'
    beat = f"{count}; read -r _ kib _ </proc/meminfo; echo $kib $n; sleep 0.3"
    spec = in_memory(config("sh", "-c", f"trap 'echo caught' TERM; while :; do {beat}; done"))
    spec["annotations"].update({"org.runx.memory": "128", "org.runx.maxmem": "160", "org.runx.maxvcpus": "2"})
    spec["linux"] = {"resources": {"pids": {"limit": 1000}}}
    pidfd = create(bundle, spec)
    beats = bundle.folder / "stdout"

    def refused(command, *args, **options):
        result = bundle.runx(command, *args, bundle.id, **options)
        assert result.returncode == 1
        return result.stderr.decode()

    def seen(condition, what):
        def last_beat():
            return [line for line in beats.read_text().split("\n")[:-1] if line != "caught"][-1]

        wait_until(lambda: condition(*map(int, last_beat().split())), what)

    # a created container
    for name in ("0", "WINCH", "SIGCHLD", "CONT", "URG", "USR1", "RTMIN"):
        assert bundle.runx("kill", bundle.id, name).returncode == 0
    assert "container not paused" in refused("resume")
    succeed(bundle, "pause")
    assert bundle.state()["status"] == "paused"
    assert "cannot start a container in the paused state" in refused("start")
    succeed(bundle, "resume")
    assert bundle.state()["status"] == "created"
    # running
    succeed(bundle, "start")
    wait_until(beats.read_text, "the process to run")
    assert json.loads(succeed(bundle, "ps", "--format", "json")) == [bundle.pid()]
    head, *rows = bundle.runx("ps", bundle.id, "-o", "pid,comm").stdout.decode().splitlines()
    assert (head.split(), [row.split()[0] for row in rows]) == (["PID", "COMMAND"], [str(bundle.pid())])
    succeed(bundle, "pause")
    assert "container not running" in refused("pause")
    assert "cannot start a container in the paused state" in refused("start")
    assert "cannot delete container" in refused("delete")
    assert bundle.id.encode() in succeed_list(bundle) and b"paused" in succeed_list(bundle)
    silent = beats.read_text()
    assert bundle.runx("kill", bundle.id, "TERM").returncode == 0  # waits for resume
    stats = json.loads(succeed(bundle, "events", "--stats"))
    assert (stats["type"], stats["id"], stats["data"]["memory"]["usage"]) == (
        "stats", bundle.id, {"limit": 160 << 20, "usage": 128 << 20, "failcnt": 0},
    )  # fmt: skip
    assert 10**8 <= stats["data"]["cpu"]["usage"]["total"] < 100 * 10**9
    assert beats.read_text() == silent
    succeed(bundle, "resume")
    wait_until(lambda: "caught\n" in beats.read_text(), "the signal sent while it was paused")
    # update
    stream = subprocess.Popen(bundle.command("events", "--interval", "300ms", bundle.id), stdout=subprocess.PIPE)
    succeed(bundle, "update", "--memory", "64m")
    seen(lambda kib, _: kib < 64 << 10, "less memory")
    succeed(bundle, "update", "-r", "-", input=b'{"memory": {"limit": 167772160}, "cpu": {"quota": 150000}}')
    seen(lambda kib, _: kib > 130 << 10, "more memory than at first")
    seen(lambda _, cpus: cpus == 2, "a second processor")
    succeed(bundle, "update", "--cpu-quota=90000", "--cpu-share", "512", "--cpuset-cpus", "0", "--pids-limit", "1000")
    seen(lambda _, cpus: cpus == 1, "one processor")
    assert xl("sched-credit2", "-d", str(bundle.domain())).split()[-2:] == ["128", "90"]
    assert xl("vcpu-list", str(bundle.domain())).splitlines()[1].split()[-3] == "0"
    assert "160 at most" in refused("update", "--memory", "161m")
    assert "pids.limit cannot change" in refused("update", "--pids-limit", "5")
    succeed(bundle, "update", "--cpu-quota", "300000")
    seen(lambda _, cpus: cpus == 2, "no more processors than the host has")
    lines = [json.loads(stream.stdout.readline()) for _ in range(2)]
    assert [line["type"] for line in lines] == ["stats", "stats"]
    # SIGKILL does not wait for resume
    succeed(bundle, "pause")
    assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
    wait_for(pidfd)
    assert stream.wait(60) == 0
    for command in ("pause", "resume", "events", "update"):
        assert "not running" in refused(command) or command == "resume"
    assert (succeed(bundle, "ps").count(b"\n"), succeed(bundle, "ps", "--format", "json")) == (1, b"null\n")


def succeed_list(bundle):
    return bundle.runx("list").stdout


# ---- engines that fail


def monitor_pid(bundle):
    """The pid of the monitor, as soon as create has forked it."""
    path = bundle.root / bundle.id / "state.json"
    wait_until(path.exists, "the state file")
    return bundle.monitor()


def xenstore_has(path):
    return call("xenstore-exists", path).returncode == 0


STAGES = {
    "xl.cfg": lambda bundle: (bundle.root / bundle.id / "xl.cfg").exists(),
    "xl": lambda bundle: any(comm == "xl" for _, comm in processes()),
    "domain": lambda bundle: len(xl("list").splitlines()) > 2,
    "QEMU": lambda bundle: any(comm.startswith(("qemu", "xen-qemu")) for _, comm in processes()),
    "consoles": lambda bundle: xenstore_has("/local/domain/0/backend/console"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_monitor_killed_during_create_leaves_nothing(bundle, stage):
    bundle.write_config(config("true"))
    results = []
    creating = threading.Thread(target=lambda: results.append(bundle.create()))
    creating.start()
    pid = monitor_pid(bundle)
    wait_until(lambda: STAGES[stage](bundle), f"the stage {stage} of create")
    os.kill(pid, signal.SIGKILL)
    creating.join()
    if stage != "consoles":  # after these create may just have been over
        assert b"its monitor was killed" in results[0].stderr
        assert not bundle.root.joinpath(bundle.id).exists()
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0
    assert bundle.domain() is None


def test_delete_force_during_create_waits_and_removes_all(bundle):
    bundle.write_config(config("true"))
    creating = threading.Thread(target=bundle.create)
    creating.start()
    wait_until(lambda: (bundle.root / bundle.id).exists(), "the state folder")
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0
    creating.join()
    assert not (bundle.root / bundle.id).exists() and bundle.domain() is None
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0
    assert b"does not exist" in bundle.runx("delete", bundle.id).stderr


def test_of_two_creates_of_one_id_one_succeeds(bundle):
    bundle.write_config(config("true"))
    command = bundle.command("create", "--bundle", str(bundle.folder), bundle.id)
    with open(bundle.folder / "stderr", "wb") as stderr:
        both = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr) for _ in range(2)]
        assert sorted(process.wait() for process in both) == [0, 1]
    assert b"container with given ID already exists" in (bundle.folder / "stderr").read_bytes()
    assert bundle.state()["status"] == "created"
    assert xl("list").count(f"runx-{bundle.id}-") == 1


def test_a_short_soak(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak.py", "--rounds", "1", "--mebibytes", "1"])
    assert soak.main() == 0, capsys.readouterr()
    assert "kB/s" in capsys.readouterr().out
