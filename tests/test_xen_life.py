# SPDX-License-Identifier: Apache-2.0
"""A container's life: from create to delete, hooks, signals, pause and update, every way to end, and to fail."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import soak
from conftest import (
    call,
    config,
    in_memory,
    namespaces,
    processes,
    runx_command,
    wait_for,
    wait_in,
    wait_in_xenstore,
    wait_until,
    xl,
)
from spec import check_state

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")

HOOK_KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

STATE_FIELDS = {"ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"}


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def listed(bundle, *options):
    """What `list` prints of the bundle's root."""
    return call(*runx_command(*bundle.globals(), "list", *options)).stdout.decode()


def mounts():
    """What is mounted here, without the options of file systems: that a tmpfs has half of the memory is told only once
    dom0 has given some of its own to map a guest's."""
    return [line.partition(" - ")[0] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]


@pytest.mark.main_path
def test_state_through_a_life(bundle):
    mounted = mounts()
    bundle.write_config({**config("sleep", "1000"), "annotations": {"org.example.note": "kept"}})
    bundle.root.mkdir()
    with open(bundle.folder / "output", "wb") as output:
        command = bundle.command("create", "--pid-file", str(bundle.pid_file))
        creating = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    wait_in(bundle.root, (bundle.root / bundle.id).exists, "the state folder")
    assert bundle.state()["status"] == "creating"
    assert creating.wait() == 0, (bundle.folder / "output").read_text()
    bundle.pidfds.append(os.pidfd_open(bundle.pid()))
    assert mounts() == mounted
    state = bundle.state()
    check_state(state)
    assert set(state) == STATE_FIELDS
    assert (state["status"], state["pid"], state["id"]) == ("created", bundle.pid(), bundle.id)
    assert (state["bundle"], state["annotations"]["org.example.note"]) == (str(bundle.folder), "kept")
    assert bundle.domain() is not None
    states = json.loads(listed(bundle, "--format=json"))
    assert [(state["id"], state["status"]) for state in states] == [(bundle.id, "created")]
    assert listed(bundle, "-q").split() == [bundle.id]
    assert listed(bundle).split()[:6] == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    bundle.succeed("start")
    check_state(bundle.state())
    assert bundle.state()["status"] == "running"
    assert f"cannot delete container {bundle.id} that is not stopped: running" in bundle.refused("delete")
    assert bundle.refused("start") == "runX: cannot start an already running container\n"
    assert bundle.state()["status"] == "running"
    bundle.succeed("kill", "KILL")
    wait_for(bundle.pidfds[0])
    state = bundle.state()
    check_state(state)
    assert (state["status"], state["pid"], set(state)) == ("stopped", 0, STATE_FIELDS)
    bundle.succeed("delete")
    assert "does not exist" in bundle.refused("state")


needs_runc = pytest.mark.skipif(not shutil.which("runc"), reason="needs runc, to compare with")


@needs_runc
def test_what_spec_writes_runs_as_it_does_under_runc(bundle):
    path = bundle.folder / "config.json"
    assert call("runc", "spec", cwd=bundle.folder).returncode == 0
    runcs = json.loads(path.read_text())
    path.unlink()
    assert call(*runx_command("spec", "--bundle", str(bundle.folder))).returncode == 0
    spec = json.loads(path.read_text())
    same = ("root", "mounts", "process", "linux")
    for document in (runcs, spec):  # where they may differ
        document["process"]["capabilities"].pop("ambient", None)  # runc 1.1 asks for what the kernel does not grant
        document["linux"].pop("resources", None)
    kinds, runcs_kinds = ({entry["type"] for entry in each["linux"].pop("namespaces")} for each in (spec, runcs))
    assert kinds - {"cgroup"} == runcs_kinds - {"cgroup"}
    assert {key: spec[key] for key in same} == {key: runcs[key] for key in same}
    script = "hostname; ulimit -n; id -u; grep Cap /proc/self/status; touch /x; echo 1 >/proc/sys/vm/swappiness; pwd"
    bundle.add_applets("hostname", "grep", "touch")
    spec = json.loads(path.read_text())
    spec["process"].update(args=["sh", "-c", script], terminal=False)
    bundle.write_config(spec)
    runc = ["runc", "--root", str(bundle.folder / "root-runc"), "run", "--bundle", str(bundle.folder), bundle.id]
    theirs, ours = (call(*command) for command in (runc, bundle.command("run")))
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, theirs.stdout, theirs.stderr)
    assert ours.stdout.startswith(b"runX\n1024\n0\n") and ours.stderr.count(b"Read-only file system") == 2
    assert not bundle.log.exists()  # no warning


def test_kill_of_a_created_container_destroys_the_domain(bundle):
    pidfd = bundle.created(in_memory(config("sleep", "1000")))
    bundle.succeed("kill", "TERM")
    wait_for(pidfd)
    assert bundle.domain() is None
    assert "cannot start a container that has stopped" in bundle.refused("start")


def test_what_changes_in_the_rootfs_before_start_is_what_the_process_finds(bundle):
    """As `docker cp` into a created container does it; the VM is up and has the share by then."""
    script(bundle.rootfs / "tool", "echo old")
    pidfd = bundle.created(config("/tool"))
    share = f"/local/domain/{bundle.domain()}/device/fuse/0/state"
    wait_in_xenstore(share, lambda: runx.Xenstore().read(share) == runx.XENBUS_CONNECTED, "the share to be connected")
    script(bundle.rootfs / "new", "cat /made/later")
    (bundle.rootfs / "new").rename(bundle.rootfs / "tool")
    (bundle.rootfs / "made").mkdir()
    (bundle.rootfs / "made/later").write_text("new\n")
    bundle.succeed("start")
    wait_for(pidfd)
    assert bundle.output() == "new\n"


def test_a_vm_that_ends_before_start_is_a_stopped_container_and_start_says_why(bundle):
    pidfd = bundle.created(in_memory(config("true")))
    xl("destroy", str(bundle.domain()))
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert bundle.refused("start") == "runX: cannot start a container that has stopped: the VM was destroyed\n"
    assert "the VM was destroyed; exit status 137" in bundle.log.read_text()
    bundle.succeed("delete")


@pytest.mark.main_path
def test_what_only_the_guest_can_know_is_the_error_of_start(bundle):
    (bundle.rootfs / "junk").write_text("junk")
    (bundle.rootfs / "junk").chmod(0o755)
    pidfd = bundle.created(in_memory(config("/junk")))
    reason = 'exec: "/junk": exec format error'
    assert bundle.refused("start") == f"runX: unable to start container process: {reason}\n"
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert json.dumps(reason)[1:-1] in bundle.log.read_text()
    bundle.succeed("delete")


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
    pidfd, pid = bundle.started(spec), bundle.pid()
    wait_for(pidfd)
    bundle.succeed("delete")
    host = [f"{kind} {tmp_path}/hook bar {tmp_path}" for kind in HOOK_KINDS if kind != "startContainer"]
    assert (bundle.rootfs / "tmp/host").read_text().splitlines() == host
    guest = ["startContainer /hook bar /", "second /hook  /", "process"]
    assert (bundle.rootfs / "tmp/guest").read_text().splitlines() == guest
    states = {kind: json.loads((bundle.rootfs / f"tmp/{kind}.json").read_text()) for kind in HOOK_KINDS}
    assert {state["bundle"] for state in states.values()} == {str(bundle.folder)}
    assert all(state["annotations"] == spec["annotations"] for state in states.values())
    assert [(states[kind]["status"], states[kind]["pid"]) for kind in HOOK_KINDS] == [
        *[("creating", pid)] * 3, ("created", 1), ("running", pid), ("stopped", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_ends_create_and_poststop_runs(bundle, tmp_path, kind):
    first = script(tmp_path / "first", f"echo {kind} >>{tmp_path}/order; echo said; echo why >&2; exit 3")
    second = script(tmp_path / "second", f"echo $1 >>{tmp_path}/order")
    spec = in_memory(config("true"))
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
    spec = in_memory(config("true"))
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
    pidfd = bundle.created(spec)
    message = f"error running startContainer hook #0: {reason}"
    assert message in bundle.refused("start")
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert not bundle.output()
    assert message in bundle.log.read_text()


def test_a_poststart_hook_that_fails_ends_and_removes_the_container(bundle, tmp_path):
    spec = in_memory(config("sleep", "1000"))
    spec["hooks"] = {
        "poststart": [{"path": script(tmp_path / "hook", "exit 3")}],
        "poststop": [{"path": script(tmp_path / "last", f"cat >{tmp_path}/state")}],
    }
    pidfd = bundle.created(spec)
    assert "error running poststart hook #0: exit status 3" in bundle.refused("start")
    wait_for(pidfd, 0)
    assert "does not exist" in bundle.refused("state")
    assert json.loads((tmp_path / "state").read_text())["status"] == "stopped"


# ---- signals


@pytest.mark.main_path
def test_every_signal_reaches_the_process_again_and_again(bundle):
    traps = "".join(f"trap 'echo {number}' {number};" for number in (1, 2, 3, 10, 12, 13, 15, 34, 50, 64))
    loop = "while :; do sleep 1000 & wait $!; done"  # a signal ends the wait at once
    child = f"(trap 'echo child; exit' USR2; echo ready; {loop}) &"
    pidfd = bundle.started(in_memory(config("sh", "-c", f"{child} {traps} echo ready; {loop}")))
    expected = []

    def heard(lines, what):
        expected.extend(lines)
        wait_in(bundle.folder, lambda: bundle.output().split() == expected, what)

    def kill(name, *lines):
        bundle.succeed("kill", name)
        heard(lines, f"{name} to be caught")

    heard(["ready", "ready"], "the traps to be set")
    for name, line in (
        ("SIGHUP", "1"), ("INT", "2"), ("3", "3"), ("usr1", "10"), ("PIPE", "13"), ("TERM", "15"), ("15", "15"),
        ("SIGRTMIN", "34"), ("RTMIN+16", "50"), ("RTMAX", "64"), ("64", "64"),
    ):  # fmt: skip
        kill(name, line)
    os.kill(bundle.pid(), signal.SIGTERM)  # the container's pid on dom0 passes on what it gets
    heard(["15"], "a signal to the pid")
    for name in ("0", "WINCH", "CHLD", "CONT", "URG"):
        kill(name)
    # stopped processes get their signals when they go on
    bundle.succeed("kill", "STOP")
    bundle.succeed("kill", "TERM")
    requests = f"/local/domain/{bundle.domain()}/data/request"
    wait_in_xenstore(requests, lambda: not runx.Xenstore().list(requests), "the doorbell to have sent both")
    assert bundle.output().split() == expected
    kill("CONT", "15")
    # --all: the process and its child
    bundle.succeed("kill", "--all", "USR2")
    caught = len(expected)
    wait_in(bundle.folder, lambda: sorted(bundle.output().split()[caught:]) == ["12", "child"], "both to catch USR2")
    # a guest that is deaf, as a paused domain is: `kill` does not wait for it
    xl("pause", str(bundle.domain()))
    bundle.succeed("kill", "TERM")
    with pytest.raises(AssertionError):
        wait_for(pidfd, 0)
    bundle.succeed("kill", "KILL")
    wait_for(pidfd)
    assert "container not running" in bundle.refused("kill", "TERM")
    assert bundle.succeed("kill", "--all") == b""


def test_a_signal_sent_before_the_process_runs_is_not_lost(bundle):
    pidfd = bundle.started(in_memory(config("sleep", "1000")))
    bundle.succeed("kill", "TERM")
    wait_for(pidfd)


@pytest.mark.parametrize("runtime", [pytest.param("runc", marks=needs_runc), "runX"])
def test_a_signal_right_after_start_meets_a_process_that_handles_it(bundle, runtime):
    """The OCI validation suite's killsig (opencontainers/runtime-tools, validation/killsig): two lives of one id."""

    def call_it(*words, **options):
        result = call(runtime, "--root", str(bundle.root), *words, **options)
        assert result.returncode == 0 and not result.stderr, (words, result)
        return result.stdout

    bundle.add_applets("touch")
    for name in ("TERM", "USR1"):
        spec = config("sh", "-c", f"trap 'touch /{name}' {name}; sleep 10 & wait $!")
        spec["linux"] = {"namespaces": namespaces()}
        bundle.write_config(spec)
        options = ["--bundle", str(bundle.folder), "--pid-file", str(bundle.pid_file)]
        call_it("create", *options, bundle.id, capture_output=False, stdout=subprocess.DEVNULL)
        pidfd = os.pidfd_open(bundle.pid())
        call_it("start", bundle.id)
        assert json.loads(call_it("state", bundle.id))["status"] == "running"
        call_it("kill", bundle.id, name)
        wait_for(pidfd)
        os.close(pidfd)
        assert json.loads(call_it("state", bundle.id))["status"] == "stopped"
        call_it("delete", bundle.id)
        assert (bundle.rootfs / name).exists()


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
    result = bundle.run(spec)
    log = bundle.log.read_text()
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b""), log
    assert json.dumps(reason)[1:-1] in log
    if name == "panic":
        assert "Kernel panic - not syncing: Out of memory" in log


def test_a_process_that_is_killed_for_its_memory_is_the_only_one(bundle):
    """kernel/patches/0006: without it one in some 35 takes the shell with it, or ends the VM in a panic."""
    loop = "for i in $(seq 40); do dd if=/dev/zero of=/x bs=1G 2>/dev/null; echo $?; done"
    spec = in_memory(config("sh", "-c", loop))
    spec["linux"] = {"resources": {"memory": {"limit": 48 << 20}}}
    bundle.add_applets("seq")
    result = bundle.run(spec, timeout=600)  # a kill takes 0.3 s, four times that on a busy host
    log = bundle.log.read_text()
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [b"137"] * 40, b""), log


def test_what_the_guest_writes_to_xenstore_is_checked(bundle):
    # a container that is root in its VM can reach the guest's xenstore device
    script = (
        "mknod /tmp/xenbus c 10 $(sed -n 's/ xen.xenbus//p' /proc/misc) || exit 1;"
        r"printf '\13\0\0\0\0\0\0\0\0\0\0\0\32\0\0\0data/process/0/exit\0999999' >/tmp/xenbus; sleep 1000"
    )
    spec = in_memory(config("sh", "-c", script))
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
    result = bundle.run(spec)
    assert result.returncode == 255, result
    assert "no valid exit status" in bundle.log.read_text()


def test_a_domain_destroyed_behind_our_back_stops_its_container_and_no_other(bundle, second):
    """Both monitors are woken by either end, and share a look at which domains are alive."""
    pidfds = {}
    for each in (bundle, second):
        script = "trap 'echo still served' USR1; echo ready; while :; do sleep 1000 & wait; done"
        pidfds[each] = each.started(in_memory(config("sh", "-c", script)))
        each.wait_for_output("ready\n")

    def destroy(each):
        xl("destroy", str(each.domain()))
        wait_for(pidfds[each])
        assert each.state()["status"] == "stopped"
        each.succeed("delete")

    survivor, destroyed = str(second.domain()), time.monotonic()
    destroy(bundle)
    shared = pathlib.Path(runx.LIVING_FILE)

    def survivor_seen():
        looked, *living = shared.read_text().split() or [0]
        return float(looked) > destroyed and survivor in living

    wait_in(shared.parent, survivor_seen, "the shared look")
    second.succeed("kill", "USR1")
    second.wait_for_output("ready\nstill served\n")
    destroy(second)


def test_a_killed_holder_ends_the_vm_and_leaves_nothing(bundle):
    pidfd = bundle.created(in_memory(config("sleep", "1000")))
    bundle.pidfds.append(os.pidfd_open(bundle.monitor()))
    bundle.succeed("start")
    os.kill(bundle.pid(), signal.SIGKILL)
    wait_for(pidfd)
    wait_for(bundle.pidfds[-1])
    assert bundle.domain() is None
    assert bundle.state()["status"] == "stopped"
    bundle.succeed("delete")


@pytest.mark.parametrize("stage", ["running", "ending"])
def test_a_killed_monitor_means_stopped_and_delete_removes_the_domain(bundle, stage):
    if stage == "running":
        spec, node = config("sleep", "1000"), "ready"
    else:
        spec, node = in_memory(config("true")), "exit"
    pidfd = bundle.created(spec)
    path = f"/local/domain/{bundle.domain()}/data/process/0/{node}"
    bundle.succeed("start")
    wait_in_xenstore(path, lambda: runx.Xenstore().read(path), f"{node} in xenstore")
    os.kill(bundle.monitor(), signal.SIGKILL)
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert stage == "ending" or bundle.domain() is not None
    bundle.succeed("delete")
    assert bundle.domain() is None


# ---- pause, resume, ps, events, update


@pytest.mark.processors
def test_pause_resume_ps_events_and_update(bundle):
    count = 'n=0; while read -r word _; do [ "$word" != processor ] || n=$((n+1)); done </proc/cpuinfo'
    beat = f"{count}; read -r _ kib _ </proc/meminfo; echo $kib $n; sleep 0.3"
    spec = in_memory(config("sh", "-c", f"trap 'echo caught' TERM; while :; do {beat}; done"))
    spec["annotations"].update({"org.runx.memory": "128", "org.runx.maxmem": "160", "org.runx.maxvcpus": "2"})
    spec["linux"] = {"resources": {"pids": {"limit": 1000}}}
    pidfd = bundle.created(spec)

    def seen(condition, what):
        def last_beat():
            return [line for line in bundle.output().split("\n")[:-1] if line != "caught"][-1]

        wait_in(bundle.folder, lambda: condition(*map(int, last_beat().split())), what)

    # a created container
    for name in ("0", "WINCH", "SIGCHLD", "CONT", "URG", "USR1", "RTMIN"):
        bundle.succeed("kill", name)
    assert "container not paused" in bundle.refused("resume")
    bundle.succeed("pause")
    assert status_and_xen(bundle) == ("paused", True)
    assert "cannot start a container in the paused state" in bundle.refused("start")
    bundle.succeed("resume")
    assert status_and_xen(bundle) == ("created", False)
    # running
    bundle.succeed("start")
    wait_in(bundle.folder, bundle.output, "the process to run")
    domid = str(bundle.domain())
    assert json.loads(bundle.succeed("ps", "--format", "json")) == [bundle.pid()]
    table = call(*runx_command(*bundle.globals(), "ps", bundle.id, "-o", "pid,comm")).stdout.decode()
    head, *rows = table.splitlines()
    assert (head.split(), [row.split()[0] for row in rows]) == (["PID", "COMMAND"], [str(bundle.pid())])
    bundle.succeed("pause")
    assert "container not running" in bundle.refused("pause")
    assert "cannot start a container in the paused state" in bundle.refused("start")
    assert "cannot delete container" in bundle.refused("delete")
    _, row = listed(bundle).splitlines()
    assert row.split()[:3] == [bundle.id, str(bundle.pid()), "paused"]
    silent = bundle.output()
    bundle.succeed("kill", "TERM")  # waits for resume
    stats = json.loads(bundle.succeed("events", "--stats"))
    assert (stats["type"], stats["id"], stats["data"]["memory"]["usage"]) == (
        "stats", bundle.id, {"limit": 160 << 20, "usage": 128 << 20, "failcnt": 0},
    )  # fmt: skip
    seconds = float(xl("list", domid).splitlines()[-1].split()[-1])  # which a paused domain does not add to
    assert stats["data"]["cpu"]["usage"]["total"] == round(seconds * 10) * 10**8 > 0
    assert bundle.output() == silent
    bundle.succeed("resume")
    wait_in(bundle.folder, lambda: "caught\n" in bundle.output(), "the signal sent while it was paused")
    # update
    stream = subprocess.Popen(bundle.command("events", "--interval", "300ms"), stdout=subprocess.PIPE)
    bundle.succeed("update", "--memory", "64m")
    seen(lambda kib, _: kib < 64 << 10, "less memory")
    bundle.succeed("update", "-r", "-", input=b'{"memory": {"limit": 167772160}, "cpu": {"quota": 150000}}')
    seen(lambda kib, _: kib > 130 << 10, "more memory than at first")
    seen(lambda _, cpus: cpus == 2, "a second processor")
    bundle.succeed("update", "--cpu-quota=90000", "--cpu-share", "512", "--cpuset-cpus", "0", "--pids-limit", "1000")
    seen(lambda _, cpus: cpus == 1, "one processor")
    assert xl("sched-credit2", "-d", domid).split()[-2:] == ["128", "90"]
    assert xl("vcpu-list", domid).splitlines()[1].split()[-3] == "0"
    assert "160 at most" in bundle.refused("update", "--memory", "161m")
    assert "pids.limit cannot change" in bundle.refused("update", "--pids-limit", "5")
    bundle.succeed("update", "--cpu-quota", "300000")
    seen(lambda _, cpus: cpus == 2, "no more processors than the host has")
    lines = [json.loads(stream.stdout.readline()) for _ in range(2)]
    assert [line["type"] for line in lines] == ["stats", "stats"]
    # SIGKILL does not wait for resume
    bundle.succeed("pause")
    bundle.succeed("kill", "KILL")
    wait_for(pidfd)
    assert stream.wait(60) == 0
    for command, words in (
        ("pause", "container not running"), ("resume", "container not paused"), ("update", "container not running"),
        ("events", f"container with id {bundle.id} is not running"),
    ):  # fmt: skip
        assert words in bundle.refused(command)
    assert bundle.succeed("ps").count(b"\n") == 1 and bundle.succeed("ps", "--format", "json") == b"null\n"


# ---- engines that fail


STAGES = {
    "xl.cfg": lambda bundle: (bundle.root / bundle.id / "xl.cfg").exists(),
    "xl": lambda _: any(comm == "xl" for _, comm in processes()),
    "domain": lambda bundle: bundle.domain() is not None,
    "file server": lambda _: any(comm == "runX files" for _, comm in processes()),
    "consoles": lambda _: runx.Xenstore().list("/local/domain/0/backend/console"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_monitor_killed_during_create_leaves_nothing(bundle, stage):
    bundle.write_config(in_memory(config("true")) if stage.startswith("xl") else config("true"))
    results = []
    creating = threading.Thread(target=lambda: results.append(bundle.create()))
    creating.start()
    wait_until((bundle.root / bundle.id / "state.json").exists, "the state file")
    monitor = bundle.monitor()
    wait_until(lambda: STAGES[stage](bundle), f"the stage {stage} of create")
    os.kill(monitor, signal.SIGKILL)
    creating.join()
    if results[0].returncode:
        assert b"its monitor was killed" in results[0].stderr
        assert not bundle.root.joinpath(bundle.id).exists()
    else:  # it was just over
        assert stage in ("file server", "consoles") and bundle.state()["status"] == "stopped"
    bundle.succeed("delete", "--force")
    assert bundle.domain() is None


def test_create_killed_half_way_leaves_nothing(bundle):
    bundle.write_config(in_memory(config("true")))
    creating = subprocess.Popen(bundle.command("create"), stdin=subprocess.DEVNULL)
    wait_until(lambda: STAGES["xl.cfg"](bundle), "create to call xl")
    creating.kill()
    creating.wait()
    wait_in(bundle.root, lambda: not bundle.root.joinpath(bundle.id).exists(), "the state folder to go")
    assert bundle.domain() is None


def test_delete_force_during_create_waits_and_removes_all(bundle):
    bundle.write_config(in_memory(config("true")))
    bundle.root.mkdir()
    creating = threading.Thread(target=bundle.create)
    creating.start()
    wait_in(bundle.root, (bundle.root / bundle.id).exists, "the state folder")
    bundle.succeed("delete", "--force")
    creating.join()
    assert not (bundle.root / bundle.id).exists() and bundle.domain() is None
    bundle.succeed("delete", "--force")
    assert "does not exist" in bundle.refused("delete")


def test_of_two_creates_of_one_id_one_succeeds(bundle):
    bundle.write_config(in_memory(config("true")))
    command = bundle.command("create")
    with open(bundle.folder / "stderr", "wb") as stderr:
        both = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr) for _ in range(2)]
        assert sorted(process.wait() for process in both) == [0, 1]
    assert b"container with given ID already exists" in (bundle.folder / "stderr").read_bytes()
    assert "container with given ID already exists" in bundle.refused("create")
    assert bundle.state()["status"] == "created"
    assert xl("list").count(f"runx-{bundle.id}-") == 1


# ---- the state on disk, beside what Xen does

FOR_EVER = "trap 'echo caught' USR1; echo ready; while :; do sleep 1000 & wait $!; done"


def status_and_xen(bundle):
    """The status, and whether Xen has paused the domain."""
    letters = xl("list", str(bundle.domain())).splitlines()[-1].split()[-2]
    return bundle.state()["status"], letters[2] == "p"


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import runx
work = getattr(runx.Domain, sys.argv[2])
def work_and_die(*args):
    work(*args)
    os.kill(os.getpid(), 9)
setattr(runx.Domain, sys.argv[2], work_and_die)
runx.main(sys.argv[3:])
"""


def killed(bundle, command):
    """Run a runX command that is killed as soon as the VM has got what it asks for."""
    work = {"start": "start", "pause": "pause", "resume": "unpause"}[command]
    folder, words = os.path.dirname(runx.__file__), bundle.command(command)[1:]
    assert call(sys.executable, "-c", KILLED, folder, work, *words).returncode == -signal.SIGKILL


def test_a_command_that_is_killed_or_finds_no_space_leaves_no_wrong_state(bundle):
    bundle.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(bundle.root)], check=True)
    try:
        pidfd = bundle.created(in_memory(config("sh", "-c", FOR_EVER)))
        killed(bundle, "start")
        bundle.wait_for_output("ready\n")
        assert bundle.state()["status"] == "running"
        killed(bundle, "pause")
        assert status_and_xen(bundle) == ("paused", True)
        assert bundle.refused("pause") == "runX: container not running\n"
        killed(bundle, "resume")
        assert status_and_xen(bundle) == ("running", False)
        assert bundle.refused("resume") == "runX: container not paused\n"
        bundle.succeed("kill", "USR1")
        bundle.wait_for_output("caught\n")
        assert call("dd", "if=/dev/zero", f"of={bundle.root}/filler", "bs=4k").returncode == 1
        bundle.succeed("pause")
        assert status_and_xen(bundle) == ("paused", True)
        assert bundle.refused("pause") == "runX: container not running\n"
        bundle.succeed("resume")
        assert status_and_xen(bundle) == ("running", False)
        refused = bundle.refused("update", "--memory", "32m")
        assert "cannot write" in refused and "No space left on device" in refused
        killed(bundle, "pause")
        bundle.succeed("kill", "KILL")
        wait_for(pidfd)
        bundle.succeed("delete")
        result = bundle.create()
        assert result.returncode == 1 and b"No space left on device" in result.stderr, result
        assert os.listdir(bundle.root) == ["filler"]
    finally:
        call("umount", str(bundle.root))


def test_a_state_of_before_a_reboot_hurts_no_living_vm_and_a_lost_one_can_be_removed(bundle, second):
    """Of the old one the process is gone, and its domain's number is another VM's."""
    pidfd = bundle.started(config("sh", "-c", FOR_EVER))
    bundle.wait_for_output("ready\n")
    xenstore, domid = runx.Xenstore(), bundle.domain()
    folder, living = second.root / second.id, bundle.root / bundle.id / "state.json"
    state, gone = json.loads(living.read_text()), [2**22, 1]
    for changes in ({"boot": "of-before"}, {"pid": gone[0], "monitor": gone, "uuid": runx.new_uuid()}):
        folder.mkdir(parents=True)
        os.mkfifo(folder / "control")
        (folder / "state.json").write_text(
            json.dumps({**state, "status": "running", "name": "runx-old", "vifs": [0], "joined": [], **changes})
        )
        before = {kind: xenstore.list(f"/local/domain/0/backend/{kind}/{domid}") for kind in ("console", "fuse")}
        assert second.state()["status"] == "stopped"
        for command in (["kill", "KILL"], ["pause"], ["events", "--stats"]):
            assert "not running" in second.refused(*command)
        second.succeed("delete")
        after = {kind: xenstore.list(f"/local/domain/0/backend/{kind}/{domid}") for kind in before}
        assert after == before == {"console": ["0", "1", "2"], "fuse": ["0"]}
    bundle.succeed("kill", "USR1")
    bundle.wait_for_output("caught\n")
    living.write_bytes(bytes(4096))
    assert "delete --force" in bundle.refused("state")
    bundle.succeed("delete", "--force")
    wait_for(pidfd)
    assert bundle.domain() is None and os.listdir(bundle.root) == []


def test_a_short_soak(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak.py", "--rounds", "1", "--mebibytes", "1"])
    assert soak.main() == 0, capsys.readouterr()
    assert "kB/s" in capsys.readouterr().out
