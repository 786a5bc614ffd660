# SPDX-License-Identifier: Apache-2.0
"""The life of a container in a dom0 without Xen: what each command does in each state (docs/lifecycle.md)."""

import json
import os
import pathlib
from types import SimpleNamespace

import pytest
from conftest import record, wait_until
from fake.dom0 import config

import runx

STATES = ("created", "running", "paused", "stopped")


def bring(dom0, status, *steps, **changes):
    """A container in one of STATES; its process does these steps, or waits."""
    container = dom0.container(*(steps or ("wait",)), **changes).created()
    if status == "stopped":
        kill(container, "KILL")
        assert container.wait() == 137
    elif status != "created":
        assert container.runx("start").returncode == 0
        container.ready()
        if status == "paused":
            assert container.runx("pause").returncode == 0
    assert container.status() == status
    return container


def kill(container, *words):
    return container.dom0.run(*container.words("kill", container.id, *words))


def remove(container):
    result = container.runx("delete", "--force")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_life_from_create_to_delete(dom0):
    container = dom0.container("out:hello", "err:oops", "exit:3").created()
    assert container.status() == "created"
    assert container.runx("start").returncode == 0
    assert (container.wait(), container.output(), container.errors()) == (3, "hello", "oops")
    assert (container.status(), container.runx("delete").returncode) == ("stopped", 0)
    assert container.log_text() == ""


# ---- the table

GONE = 'container "{id}" does not exist'
EXISTS = "container with given ID already exists: {id}"
NOT_RUNNING, NOT_PAUSED = "container not running", "container not paused"
REFUSED = {
    "unknown": {
        "state": GONE, "start": GONE, "kill": GONE, "kill --all": GONE, "pause": GONE, "resume": GONE, "ps": GONE,
        "events --stats": GONE, "update --memory=32m": GONE, "delete": GONE,
        "checkpoint": "runX does not support checkpoint", "restore": "runX does not support restore",
    },
    "created": {"create": EXISTS, "resume": NOT_PAUSED},
    "running": {
        "create": EXISTS, "start": "cannot start an already running container", "resume": NOT_PAUSED,
        "delete": "cannot delete container {id} that is not stopped: running",
    },
    "paused": {
        "create": EXISTS, "start": "cannot start a container in the paused state", "pause": NOT_RUNNING,
        "delete": "cannot delete container {id} that is not stopped: paused",
    },
    "stopped": {
        "create": EXISTS, "start": "cannot start a container that has stopped", "kill": NOT_RUNNING,
        "pause": NOT_RUNNING, "resume": NOT_PAUSED, "events --stats": "container with id {id} is not running",
        "update --memory=32m": NOT_RUNNING,
    },
}  # fmt: skip


@pytest.mark.parametrize("status", REFUSED)
def test_what_cannot_be_done_in_a_state_is_refused_in_runcs_words_and_changes_nothing(dom0, status):
    container = dom0.container() if status == "unknown" else bring(dom0, status)
    before = dom0.domains(), status != "unknown" and container.stored()
    for command, sentence in REFUSED[status].items():
        options = ["--bundle", str(container.bundle)] if command == "create" else []
        result = container.runx(*command.split(), *options)
        assert (command, result.stderr) == (command, f"runX: {sentence.format(id=container.id)}\n")
        assert (result.returncode, result.stdout) == (1, "")
        assert container.log_text().endswith(f"level=error msg={sentence.format(id=container.id)}\n")
    assert (dom0.domains(), status != "unknown" and container.stored()) == before
    assert status == "unknown" or container.status() == status
    remove(container)


@pytest.mark.parametrize("status", STATES)
def test_what_can_be_asked_in_any_state(dom0, status):
    container = bring(dom0, status)
    pid = container.pid()
    state = container.state()
    assert (state["id"], state["status"], state["pid"]) == (container.id, status, 0 if status == "stopped" else pid)
    assert (state["bundle"], state["rootfs"]) == (str(container.bundle), str(container.bundle / "rootfs"))
    assert (state["ociVersion"], state["annotations"]) == ("1.0.2", {"org.runx.rootfs": "ramdisk"})
    listed = dom0.run("--root", str(container.root), "list", "--format", "json")
    assert json.loads(listed.stdout) == [{**state, "owner": "root"}]
    assert dom0.run("--root", str(container.root), "list", "-q").stdout == f"{container.id}\n"
    table = dom0.run("--root", str(container.root), "list").stdout.splitlines()
    assert table[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert table[1].split() == [container.id, str(state["pid"]), status, state["bundle"], state["created"], "root"]
    processes = container.runx("ps", "--format", "json")
    assert json.loads(processes.stdout) == (None if status == "stopped" else [pid])
    shown = container.runx("ps").stdout.splitlines()
    assert shown[0].split()[:2] == ["UID", "PID"]
    assert [line.split()[1] for line in shown[1:]] == ([] if status == "stopped" else [str(pid)])
    if status != "stopped":
        stats = json.loads(container.runx("events", "--stats").stdout)
        assert (stats["type"], stats["id"]) == ("stats", container.id)
        assert stats["data"]["cpu"]["usage"]["total"] == 1_500_000_000
        assert stats["data"]["memory"]["usage"]["limit"] == stats["data"]["memory"]["usage"]["usage"] == 64 << 20
    remove(container)


def test_the_list_of_an_empty_root(dom0):
    container = dom0.container()
    assert dom0.run("list", "--format", "json").stdout == "null\n"
    assert dom0.run("list", "-q").stdout == ""
    missing = dom0.run("--root", str(container.root), "list")  # as under runc, but for its own
    assert missing.stderr == f"runX: cannot list the containers of {container.root}: No such file or directory\n"
    assert missing.returncode == 1
    container.root.mkdir()
    assert dom0.run("--root", str(container.root), "list", "--format", "json").stdout == "null\n"


def test_while_create_runs_it_is_creating_and_what_would_change_it_waits(dom0):
    container = dom0.container("exit:6")
    dom0.fail("xl", 1, "slow", match="create")
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    dom0.ask("await_calls", "xl", "create")
    assert container.status() == "creating"
    assert container.runx("ps").stderr == "runX: container not running\n"
    assert container.runx("events").stderr == f"runX: container with id {container.id} is not running\n"
    assert container.create().stderr == f"runX: container with given ID already exists: {container.id}\n"
    start = container.start_runx("start")
    dom0.ask("release")
    assert (create.wait().returncode, start.wait().returncode, container.wait()) == (0, 0, 6)
    remove(container)


def test_a_signal_that_comes_while_the_vm_is_taken_down_leaves_the_exit_status(dom0):
    """The monitor does not listen any more, and ends without having read it; the holder reads the status late."""
    container = dom0.container("exit:3").created()
    monitor, holder = container.stored()["monitor"][0], container.pid()
    dom0.fail("xl", 1, "slow", match="destroy")
    assert container.runx("start").returncode == 0
    dom0.ask("await_calls", "xl", "destroy")
    dom0.signal(holder, 15)
    status = pathlib.Path(f"{dom0.inside}/proc/{holder}/status")
    wait_until(lambda: {"State:\tS (sleeping)", f"ShdPnd:\t{0:016x}"} <= set(status.read_text().splitlines()), "TERM")
    dom0.signal(holder, 19)
    dom0.ask("release")
    wait_until(lambda: monitor not in dom0.processes(), "the monitor's end")
    dom0.signal(holder, 18)
    assert container.wait() == 3
    remove(container)


def test_a_forced_delete_waits_for_create(dom0):
    container = dom0.container("wait")
    dom0.fail("xl", 1, "slow", match="create")
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    dom0.ask("await_calls", "xl", "create")
    delete = container.start_runx("delete", "--force")
    dom0.ask("release")
    assert (create.wait().returncode, delete.wait().returncode) == (0, 0)


# ---- kill


@pytest.mark.parametrize("signal", ["HUP", "2", "SIGQUIT", "KILL", "TERM", "SEGV"])
def test_a_deadly_signal_ends_what_is_not_started(dom0, signal):
    numbers = {"HUP": 1, "2": 2, "SIGQUIT": 3, "KILL": 9, "TERM": 15, "SEGV": 11}
    container = bring(dom0, "created")
    assert kill(container, signal).returncode == 0
    assert (container.wait(), container.status()) == (128 + numbers[signal], "stopped")
    assert not dom0.domains()
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("status", ["created", "paused before it was started"])
def test_other_signals_do_nothing_to_what_is_not_started(dom0, status):
    container = bring(dom0, "created")
    if status != "created":
        assert container.runx("pause").returncode == 0
        assert dom0.domains()[container.domid()]["paused"]
    for signal in ("0", "USR1", "CHLD", "CONT", "URG", "WINCH", "RTMIN+1"):
        assert kill(container, signal).returncode == 0
    assert container.status() == status.split()[0]
    assert kill(container, "TERM").returncode == 0
    assert container.wait() == 143
    remove(container)


def test_signals_reach_the_process_by_name_and_number(dom0):
    container = bring(dom0, "running", "signal:6")
    signals = {"": 15, "SIGUSR1": 10, "12": 12, "0": None, "rtmin+2": 36, "63": 63, "RTMAX": 64}
    for signal, number in signals.items():
        assert kill(container, signal).returncode == 0
        if number and signal != "RTMAX":  # which is the last
            dom0.ask("await_asked", container.domid(), f"kill 0 {number}")
    assert container.wait() == 0
    assert container.output() == "15 10 12 36 63 64"
    remove(container)


def test_what_a_vm_is_asked_for_keeps_its_order_when_the_clock_is_set_back(monkeypatch):
    class Store:
        names: list[str] = []

        def transaction(self, work):
            work()

        def read(self, path):
            return "/vm/u" if path.endswith("/vm") else ""

        def list(self, path):
            return self.names

        def write(self, path, value):
            self.names.append(path)

        def write_all(self, steps):
            pass

    clock = iter([2 * 10**18, 10**18])
    monkeypatch.setattr(runx.time, "time_ns", lambda: next(clock))
    for number in (19, 18):  # STOP, and CONT while the VM is paused
        runx.Domain(Store(), 5, "u").request(f"kill 0 {number}")
    assert sorted(Store.names) == Store.names != []


def test_a_kill_does_not_wait_for_a_command_whose_xl_hangs(dom0):
    container = bring(dom0, "running", "wait")
    dom0.fail("xl", 1, "slow", match="pause")
    pause = container.start_runx("pause")
    dom0.ask("await_calls", "xl", "pause")
    assert kill(container, "KILL").returncode == 0
    assert container.wait() == 137
    dom0.ask("release")
    pause.wait()
    remove(container)


def test_kill_all_reaches_every_process(dom0):
    container = bring(dom0, "running", "wait")
    assert container.runx("kill", "--all", "--signal", "TERM").returncode == 0
    assert container.wait() == 143
    assert kill(container, "--all", "TERM").returncode == 0
    remove(container)


@pytest.mark.parametrize("count, width, code", [(runx.MOST_REQUESTS, 1, "E2BIG"), (25, 200, "E2BIG"), (0, 0, "ENOSPC")])
def test_a_vm_that_takes_no_requests_is_told_and_killed(dom0, count, width, code):
    """It may write what it likes where they are queued."""
    container = bring(dom0, "running", "wait")
    for number in range(count):
        dom0.ask("write", f"/local/domain/{container.domid()}/data/request/{number:0{width}}", "look 0")
    if not count:
        dom0.fail("xenstore", 1, code, match="data/request")
    what = f'takes no more requests, here "kill 0 15" ({code})'
    words = f"the container's VM {what}: kill it with SIGKILL if it stays so"
    assert kill(container, "TERM").stderr == f"runX: {words}\n"
    assert kill(container, "KILL").returncode == 0
    assert container.wait() == 137
    remove(container)


@pytest.mark.parametrize("signal", ["nonsense", "65", "-1", "RTMIN+99", "SIGSIG"])
def test_a_signal_that_is_none(dom0, signal):
    container = bring(dom0, "created")
    result = kill(container, "--signal=" + signal)
    assert result.stderr == f"runX: unknown signal {signal!r}: give a number from 0 to 64 or a name such as TERM\n"
    remove(container)


def test_a_signal_for_a_paused_container_waits_for_resume(dom0):
    container = bring(dom0, "paused", "wait")
    assert kill(container, "TERM").returncode == 0
    assert (container.status(), container.guest()["signals"]) == ("paused", [])
    assert container.runx("resume").returncode == 0
    assert container.wait() == 143
    remove(container)


def test_sigkill_ends_a_paused_container_now_and_lets_it_write_its_last(dom0):
    container = bring(dom0, "paused", "wait")
    assert kill(container, "KILL").returncode == 0
    assert container.wait() == 137
    assert container.log_text() == ""
    remove(container)


def test_sigkill_ends_what_does_not_answer(dom0):
    dom0.constants["KILL_GRACE"] = 0.05
    container = bring(dom0, "running", "mute")
    assert kill(container, "KILL").returncode == 0
    assert container.wait() == 137
    remove(container)


@pytest.mark.parametrize(
    "name, number", [("HUP", 1), ("INT", 2), ("QUIT", 3), ("TERM", 15), ("USR1", 10), ("USR2", 12)]
)
def test_what_is_sent_to_its_pid_goes_to_the_process(dom0, name, number):
    container = bring(dom0, "running", "signal:1")
    dom0.signal(container.pid(), number)
    assert (container.wait(), container.output()) == (0, str(number))
    remove(container)


def test_what_is_sent_to_the_pid_of_one_that_is_not_started_ends_it(dom0):
    container = bring(dom0, "created")
    for number in (10, 12, 15):
        dom0.signal(container.pid(), number)
    assert container.wait() == 143
    remove(container)


def test_what_is_sent_to_the_pid_of_one_with_a_system_of_its_own_powers_that_off_or_does_nothing():
    """As `kill` does; KILL destroys it before."""
    asked, requests = [], ["look 0", *(f"kill 0 {number}" for number in runx.RELAYED)]
    for request in requests:
        domain = SimpleNamespace(shut_down=lambda request=request: asked.append(request))
        record(runx.Monitor, domain=domain).power_off(request)
    assert asked == [f"kill 0 {number}" for number in (1, 2, 3, 15)]


# ---- pause, resume


def test_pause_and_resume(dom0):
    container = bring(dom0, "running", "wait")
    for _ in range(2):
        assert container.runx("pause").returncode == 0
        assert (container.status(), dom0.domains()[container.domid()]["paused"]) == ("paused", True)
        assert container.runx("resume").returncode == 0
        assert (container.status(), dom0.domains()[container.domid()]["paused"]) == ("running", False)
    remove(container)


def test_one_that_is_paused_before_it_is_started_is_created_again_after_resume(dom0):
    container = bring(dom0, "created", "exit:4")
    assert (container.runx("pause").returncode, container.status()) == (0, "paused")
    assert dom0.domains()[container.domid()]["paused"]
    assert container.runx("start").stderr == "runX: cannot start a container in the paused state\n"
    assert (container.runx("resume").returncode, container.status()) == (0, "created")
    assert not dom0.domains()[container.domid()]["paused"]
    assert (container.runx("start").returncode, container.wait()) == (0, 4)
    remove(container)


@pytest.mark.parametrize("command, before, after", [("pause", "created", "paused"), ("resume", "paused", "created")])
@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_pause_or_resume_of_a_created_container_that_is_killed_leaves_no_wrong_state(
    dom0, command, before, after, done
):
    container = bring(dom0, "created", "exit:4")
    assert before == "created" or container.runx("pause").returncode == 0
    dom0.fail("xl", 1, "kill", done)
    assert container.runx(command).returncode == -9
    dom0.forget()
    assert container.status() == (after if done else before)
    if container.status() == "paused":
        assert container.runx("resume").returncode == 0
    assert container.runx("start").returncode == 0
    assert container.wait() == 4
    remove(container)


# ---- start


def test_start_starts_no_xl_and_returns_when_the_process_is_there(dom0):
    container = dom0.container("begun:until:data/go", "wait").created()
    dom0.forget()
    start, ready = container.start_runx("start"), f"/local/domain/{container.domid()}/data/process/0/ready"
    dom0.ask("await_calls", "xenstore", f"watch {ready.removesuffix('/ready')}")
    assert container.status() == "running"
    assert container.runx("start").stderr == "runX: cannot start an already running container\n"
    dom0.ask("write", f"/local/domain/{container.domid()}/data/go", "1")
    assert start.wait().returncode == 0
    assert (dom0.nodes()[ready], dom0.calls("xl")) == ("1", [])
    remove(container)


@pytest.mark.parametrize("text", ['exec: "x": permission denied', "no\x07 \u20ac " + "x" * 1900])
def test_a_start_whose_process_cannot_be_executed_says_why(dom0, text):
    container = dom0.container(f"begun:set:data/process/0/error={text}", "begun:exit:126").created()
    result = container.runx("start")
    reason = text.replace("\x07", " ")
    assert result.stderr == f"runX: unable to start container process: {reason}\n"
    assert (result.returncode, container.wait(), container.status()) == (1, 126, "stopped")
    assert f"the VM's init: {reason}\n" in container.log_text()
    assert container.runx("start").stderr == "runX: cannot start a container that has stopped\n"
    remove(container)


def test_who_is_told_that_start_has_failed_can_delete(dom0):
    """As buildah does it at once, and without force."""
    container = dom0.container("begun:set:data/process/0/error=no", "begun:exit:126").created()
    dom0.fail("xl", 1, "slow", match="destroy")
    start = container.start_runx("start")
    dom0.ask("await_calls", "xl", "destroy")
    dom0.ask("release")
    assert start.wait().returncode == 1
    assert container.runx("delete").returncode == 0, container.log_text()
    assert container.wait() == 126


def test_a_vm_that_ends_while_start_waits_is_the_reason(dom0):
    container = dom0.container("begun:end:c").created()
    assert container.runx("start").stderr == "runX: unable to start container process: the VM crashed\n"
    assert container.wait() == 255
    remove(container)


def test_a_signal_while_start_waits_is_the_processs(dom0):
    container = dom0.container("begun:until:data/go", "signal:1").created()
    start, data = container.start_runx("start"), f"/local/domain/{container.domid()}/data"
    dom0.ask("await_node", f"{data}/process/0/start", "-")
    assert kill(container, "TERM").returncode == 0
    dom0.ask("write", f"{data}/go", "1")
    assert (start.wait().returncode, container.wait(), container.output()) == (0, 0, "15")
    remove(container)


def test_sigkill_ends_one_whose_start_waits(dom0):
    dom0.constants["KILL_GRACE"] = 0.05
    container = dom0.container("begun:mute").created()
    start = container.start_runx("start")
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/0/start", "-")
    assert kill(container, "KILL").returncode == 0
    assert (start.wait().returncode, container.wait()) == (1, 137)
    remove(container)


def test_a_kernel_that_hangs_while_it_boots_ends_start_with_its_last_words(dom0):
    dom0.constants["BOOT_TIME_LIMIT"] = 0.0
    container = dom0.container("early:say:no timer\n", "early:mute").created()
    result = container.runx("start")
    reason = "the VM has not found its devices within 0 s: does its kernel boot?"
    assert result.stderr == f"runX: unable to start container process: {reason}\n"
    assert (result.returncode, container.wait(), container.status()) == (1, 255, "stopped")
    assert f"{reason}\n" in container.log_text() and "the VM's console: no timer\n" in container.log_text()
    remove(container)


@pytest.mark.parametrize(
    "looks, limits, told",
    [
        ([("1", "running", 0)], [600, None], ["mute 600"]),
        ([("1", "paused", 0), ("1", "running", 0)], [600, 600, None], ["mute 600"]),
        ([("1", "running", 599), ("1", "running", 599)], [600, 599, None], ["mute 600"]),
        ([("1", "running", 599), ("1", "paused", 1190), ("1", "running", 1191)], [600, 599, 600, None], ["mute 600"]),
        ([("3", "paused", 0), ("3", "running", 0)], [600, 600, None], []),
        ([("4", "running", 0)], [600, None], []),
    ],
)
def test_start_gives_up_a_vm_that_runs_and_has_never_found_a_device(monkeypatch, looks, limits, told):
    """looks: the state of its console, its own, and since when, at the end of each limit; at last it ends."""
    waited, requests, now = [], [], [1e6]
    left = iter(looks)
    state = runx.State()

    def wait(fds, _, __, limit):
        waited.append(limit)
        if limit is None:
            return [fds[1]], [], []
        now[0] += limit
        look.append(next(left))
        return [], [], []

    look = []
    monkeypatch.setattr(runx.select, "select", wait)
    monkeypatch.setattr(runx.time, "monotonic", lambda: now[0])
    xenstore = SimpleNamespace(fd=0, events=[], watch=lambda watch: None, read=lambda path: look[-1][0])
    domain = SimpleNamespace(xenstore=xenstore, path="/local/domain/1", told=lambda node: "")
    container = SimpleNamespace(
        state=state, open_pidfd=lambda: 1, path=lambda name: "/no/such", tell_monitor=requests.append,
        load=lambda: setattr(state, "switched", 10**6 + look[-1][2]), status=lambda: look[-1][1],
    )  # fmt: skip
    with pytest.raises(runx.Error, match="its VM has ended"):
        runx.await_process(container, domain)
    assert (waited, requests) == (limits, told)


def test_a_start_that_is_killed_while_it_waits_has_started_the_container(dom0):
    container = dom0.container("begun:until:data/go", "wait").created()
    dom0.forget()
    start, data = container.start_runx("start"), f"/local/domain/{container.domid()}/data"
    dom0.ask("await_calls", "xenstore", f"watch {data}/process/0")
    start.signal(9)
    assert start.wait().returncode == -9
    dom0.ask("write", f"{data}/go", "1")
    assert container.ready().status() == "running"
    assert kill(container, "TERM").returncode == 0
    assert container.wait() == 143
    remove(container)


def test_a_vm_that_ends_while_a_hook_of_create_runs_is_a_stopped_container(dom0):
    container = dom0.container()
    ended = container.bundle / "ended"
    script = f"until [ -e {ended} ]; do sleep 0.02; done"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}
    container.write(config("early:end:c", hooks={"createRuntime": [hook]}))
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    wait_until(lambda: "the VM crashed" in container.log_text(), "the monitor to see the end")
    ended.touch()
    assert create.wait().returncode == 0
    assert (container.wait(), container.status()) == (255, "stopped")
    result = container.runx("start")
    assert result.stderr == "runX: cannot start a container that has stopped: the VM crashed\n"
    remove(container)


# ---- delete


@pytest.mark.parametrize("status", STATES)
def test_delete_force_removes_it_in_any_state(dom0, status):
    container = bring(dom0, status)
    pid = container.pid()
    remove(container)
    assert status == "stopped" or dom0.wait(pid) == 137
    assert container.runx("state").returncode == 1
    assert container.runx("delete", "--force").returncode == 0


@pytest.mark.parametrize("status", ["created", "stopped"])
def test_delete_removes_what_does_not_run(dom0, status):
    container = bring(dom0, status)
    assert container.runx("delete").returncode == 0
    assert container.runx("delete").stderr == f'runX: container "{container.id}" does not exist\n'


# ---- how it ends

ENDS = {
    "exit:0": (0, None), "exit:255": (255, None), "exit:256": (255, "the VM told no valid exit status"),
    "exit:x": (255, "the VM told no valid exit status"), "exit:-1": (255, "the VM told no valid exit status"),
    "end:-": (130, "the VM was powered off from inside; exit status 130"),
    "end:r": (129, "the VM was rebooted from inside; exit status 129"),
    "end:s": (255, "the VM suspended itself; exit status 255"),
    "end:c": (255, "the VM crashed; exit status 255"),
    "end:w": (255, "the VM's watchdog fired; exit status 255"),
    "end:S": (255, "the VM made a soft reset; exit status 255"),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_status_of_each_end(dom0, end):
    status, reason = ENDS[end]
    container = dom0.container("say:Kernel panic\x1b[2J\n", "out:last words", end).started()
    assert (container.wait(), container.status(), container.output()) == (status, "stopped", "last words")
    if reason is None:
        assert container.log_text() == ""
    else:
        assert f"level=warning msg=container {container.id}: {reason}\n" in container.log_text()
    if end.startswith("end"):
        assert f"msg=container {container.id}: the VM's console: Kernel panic [2J\n" in container.log_text()
    assert not dom0.domains()
    remove(container)


def test_one_that_ends_before_its_process_is_there(dom0):
    container = dom0.container("early:say:No init found\n", "early:end:c").created()
    assert container.wait() == 255
    assert "the VM's console: No init found" in container.log_text()
    assert container.status() == "stopped"
    result = container.runx("start")
    assert result.stderr == "runX: cannot start a container that has stopped: the VM crashed\n"
    remove(container)


def test_one_that_is_destroyed_by_hand(dom0):
    container = bring(dom0, "running")
    dom0.ask("destroy", container.domid())
    assert (container.wait(), container.status()) == (137, "stopped")
    assert "the VM was destroyed; exit status 137" in container.log_text()
    remove(container)


def test_an_end_that_xl_cannot_tell_of_is_asked_for_again(dom0):
    """Each time it looks at all domains and then at the one; and it complains once."""
    dom0.constants["LOOK_AGAIN"] = 0.05
    container = bring(dom0, "running", "wait")
    for nth in range(1, 7):
        dom0.fail("xl", nth, "no luck", match="list")
    dom0.ask("end", container.domid(), "c")
    assert container.wait() == 255
    dom0.forget()
    assert "the VM crashed; exit status 255" in container.log_text()
    told = "xl list failed: no luck; whether the VM has ended is asked again every 0 s"
    assert container.log_text().count(told) == 1
    remove(container)


def test_requests_by_the_hundred_are_all_understood(dom0):
    """As they wait for a monitor that an xl keeps busy: they are more than a page."""
    container = bring(dom0, "running", "ignore", "wait")
    monitor = container.stored()["monitor"][0]
    dom0.signal(monitor, 19)
    control = os.open(container.root / container.id / "control", os.O_WRONLY | os.O_NONBLOCK)
    for _ in range(1000):
        os.write(control, b"kill 9\n")
    os.close(control)
    dom0.signal(monitor, 18)
    assert container.wait() == 137
    assert container.log_text() == ""
    remove(container)


def test_the_end_of_another_vm_ends_nothing(dom0):
    first, second = bring(dom0, "running", "wait"), bring(dom0, "running", "wait")
    dom0.ask("destroy", second.domid())
    assert second.wait() == 137, second.log_text()
    assert first.status() == "running"
    assert kill(first, "TERM").returncode == 0
    assert first.wait() == 143
    remove(first)
    remove(second)


def test_where_xenstored_can_tell_one_end_from_another_each_container_is_told_of_its_own_only(dom0):
    dom0.ask("features", 4)  # XENSTORE_SERVER_FEATURE_WATCHDEPTH, Xen 4.22
    first, second = bring(dom0, "running", "wait"), bring(dom0, "running", "wait")
    watched = [path for path in dom0.ask("watched") if path.startswith("@")]
    assert sorted(watched) == sorted(f"@releaseDomain/{each.domid()}" for each in (first, second))
    dom0.ask("destroy", second.domid())
    assert second.wait() == 137, second.log_text()
    assert first.status() == "running"
    dom0.ask("end", first.domid(), "c")
    assert first.wait() == 255, first.log_text()
    remove(first)
    remove(second)


def test_why_it_could_not_be_started_is_in_the_log(dom0):
    container = dom0.container(
        "begun:set:data/process/0/error=cannot mount\x07 it", "begun:err:no such thing\n", "begun:exit:127"
    ).created()
    assert "cannot mount  it" in container.runx("start").stderr
    assert (container.wait(), container.errors()) == (127, "no such thing\n")
    assert f"msg=container {container.id}: the VM's init: cannot mount  it\n" in container.log_text()
    remove(container)


def test_a_lack_of_memory_is_in_the_log(dom0):
    container = dom0.container("set:data/oom=Killed process 7 (x)", "exit:137").started()
    assert container.wait() == 137
    assert "the VM has run out of memory: Killed process 7 (x)\n" in container.log_text()
    remove(container)


# ---- who is killed


def test_a_killed_monitor_leaves_nothing_for_good(dom0):
    for status in STATES[:3]:
        container = bring(dom0, status)
        dom0.signal(container.stored()["monitor"][0], 9)
        assert (container.wait(), container.status()) == (137, "stopped")
        assert dom0.domains()
        assert container.runx("delete").returncode == 0
        assert not dom0.domains()


def test_a_killed_holder_ends_the_container(dom0):
    for status in ("created", "running"):
        container = bring(dom0, status)
        dom0.signal(container.pid(), 9)
        assert (container.wait(), container.status()) == (-9, "stopped")
        dom0.settle()
        assert not dom0.domains()
        assert container.runx("delete").returncode == 0


def test_a_create_that_is_killed_is_taken_down_by_its_monitor(dom0):
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID"]}
    container = dom0.container(hooks={"createRuntime": [hook]})
    assert container.create().returncode == -9
    dom0.settle()
    assert container.runx("state").returncode == 1
