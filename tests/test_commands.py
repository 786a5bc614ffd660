# SPDX-License-Identifier: Apache-2.0
"""What an engine meets beside the life itself: hooks, `run`, update, events, and what the guest is told."""

import functools
import json
import os
import pathlib
import select
import signal
import termios

import pytest
from conftest import call, check_our_terminal, record, runx_command, wait_until
from fake.dom0 import config

import runx


def kill(container, signal="KILL"):
    assert container.dom0.run(*container.words("kill", container.id, signal)).returncode == 0


def finish(container, status=0):
    assert container.wait() == status, container.log_text()
    result = container.runx("delete")
    assert (result.returncode, result.stderr) == (0, "")


# ---- hooks


def hook(container, kind, command="cat", **more):
    """One that appends its kind, its working directory and what its command says to a file of the bundle."""
    notes = container.bundle / "notes"
    script = f"{{ echo ===={kind}; pwd; {command}; }} >>{notes}"
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], **more}


KINDS = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")


def with_hooks(dom0, *steps, kinds=KINDS, **changed):
    """A container with a hook of each kind.  changed: {kind: what differs in its hook}."""
    container = dom0.container()
    hooks = {kind: [hook(container, kind, **changed.get(kind, {}))] for kind in kinds}
    container.write(config(*steps, hooks=hooks))
    return container


def records(container):
    """[kind, working directory, output] of each hook that has run."""
    notes = (container.bundle / "notes").read_text().split("====")[1:]
    return [[part.strip() for part in note.split("\n", 2)] for note in notes]


def test_a_hook_without_an_environment_has_that_of_the_command(dom0):
    dom0.env["OF_THE_ENGINE"] = "x"
    kinds = ["prestart", "createRuntime"]
    bare = {"command": "echo $OF_THE_ENGINE", "env": []}
    container = with_hooks(dom0, kinds=kinds, prestart={**bare, "env": ["A=b"]}, createRuntime=bare)
    assert container.create().returncode == 0
    assert [text for _, _, text in records(container)] == ["", "x"]
    kill(container)
    finish(container, 137)


def test_hooks_run_in_their_order_in_the_bundle_with_the_state_on_stdin(dom0):
    container = with_hooks(dom0, "wait").started()
    kill(container)
    pid = container.pid()
    finish(container, 137)
    found = records(container)
    assert [kind for kind, _, _ in found] == list(KINDS)
    for kind, folder, text in found:
        state = json.loads(text)
        assert folder == str(container.bundle)
        assert state["status"] == {"poststart": "running", "poststop": "stopped"}.get(kind, "creating")
        assert (state["id"], state["pid"]) == (container.id, 0 if kind == "poststop" else pid)
        assert (state["bundle"], state["ociVersion"]) == (str(container.bundle), "1.0.2")


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_of_create_that_fails_undoes_it(dom0, kind):
    container = with_hooks(dom0, **{kind: {"command": "echo out; echo err >&2; exit 3"}})
    result = container.create()
    assert result.returncode == 1
    assert f"error running {kind} hook #0: exit status 3, stdout: , stderr: err\n" in result.stderr
    ran = [kind for kind, _, *_ in records(container)]
    assert ran == [*KINDS[: KINDS.index(kind) + 1], "poststop"]
    assert not container.pid_file.exists()
    assert container.runx("state").returncode == 1


def test_a_hook_that_runs_past_its_time_is_killed_with_what_it_has_started(dom0):
    slow = {"command": "sleep 1000 & sleep 1000", "timeout": 1}
    container = with_hooks(dom0, createRuntime=slow)
    result = container.create()
    assert "error running createRuntime hook #0: hook ran past specified timeout of 1s" in result.stderr
    dom0.settle()


@pytest.mark.parametrize("path, reason", [("/no/such", "No such file or directory"), ("/etc", "Permission denied")])
def test_a_hook_that_cannot_be_executed(dom0, path, reason):
    container = dom0.container(hooks={"prestart": [{"path": path}]})
    result = container.create()
    sentence = f"exit status 127, stdout: , stderr: cannot execute {path}: {reason}"
    assert result.stderr == f"runX: error running prestart hook #0: {sentence}\n"


def test_the_first_hook_that_fails_is_the_last_that_runs(dom0):
    container = dom0.container()
    hooks = [hook(container, "one"), hook(container, "two", "exit 1"), hook(container, "three")]
    container.write(config(hooks={"createRuntime": hooks}))
    assert "createRuntime hook #1: exit status 1" in container.create().stderr
    assert [kind for kind, *_ in records(container)] == ["one", "two"]


def test_a_poststart_hook_that_fails_ends_and_removes_the_container(dom0):
    container = with_hooks(dom0, "wait", poststart={"command": "exit 7"}).created()
    pid = container.pid()
    result = container.runx("start")
    assert (result.returncode, "error running poststart hook #0: exit status 7" in result.stderr) == (1, True)
    assert dom0.wait(pid) == 137
    assert records(container)[-1][0] == "poststop"
    assert container.runx("state").returncode == 1


def with_poststart_that_waits_and_fails(dom0):
    """A container, and the fifo that its hook waits for."""
    container = dom0.container()
    fifo = container.bundle / "fifo"
    os.mkfifo(fifo)
    container.write(config("wait", hooks={"poststart": [hook(container, "poststart", f"cat {fifo}; exit 7")]}))
    return container, fifo


def test_a_poststart_hook_that_fails_late_leaves_the_next_container_of_that_id(dom0):
    container, fifo = with_poststart_that_waits_and_fails(dom0)
    pid = container.created().pid()
    start = container.start_runx("start")
    with open(fifo, "w"):  # the hook runs
        assert container.runx("delete", "--force").returncode == 0
        assert dom0.wait(pid) == 137
        container.created()
    assert "error running poststart hook #0: exit status 7" in start.wait().stderr
    assert container.status() == "created"
    assert container.runx("delete").returncode == 0


def test_why_a_poststart_hook_has_failed_is_told_when_the_container_is_gone(dom0):
    container, fifo = with_poststart_that_waits_and_fails(dom0)
    pid = container.created().pid()
    start = container.start_runx("start")
    with open(fifo, "w"):  # the hook runs
        assert container.runx("delete", "--force").returncode == 0
    assert "error running poststart hook #0: exit status 7" in start.wait().stderr
    assert dom0.wait(pid) == 137


def test_a_poststop_hook_that_fails_is_a_warning_and_the_others_run(dom0):
    container = dom0.container()
    hooks = [hook(container, "one", "exit 1"), hook(container, "two")]
    container.write(config("exit:0", hooks={"poststop": hooks}))
    container.started()
    finish(container)
    assert "level=warning msg=error running poststop hook #0: exit status 1" in container.log_text()
    assert [kind for kind, *_ in records(container)] == ["one", "two"]


def test_start_waits_for_the_process(dom0):
    container = with_hooks(dom0, "begun:until:data/go", "wait", kinds=["poststart"]).created()
    dom0.forget()
    start = container.start_runx("start")
    data = f"/local/domain/{container.domid()}/data"
    dom0.ask("await_calls", "xenstore", f"watch {data}/process/0")
    assert not (container.bundle / "notes").exists()
    dom0.ask("write", f"{data}/go", "1")
    assert start.wait().returncode == 0
    assert json.loads(records(container)[0][2])["status"] == "running"
    kill(container)
    finish(container, 137)


def test_a_start_container_hook_that_fails_fails_start(dom0):
    hooks = {"startContainer": [{"path": "/bin/false", "args": ["false", "x"], "env": ["A=b"], "timeout": 9}]}
    reason = "data/process/0/error=error running startContainer hook #0: exit status 1"
    steps = ("begun:until:data/go", f"begun:set:{reason}", "begun:exit:1")
    container = dom0.container(*steps, hooks=hooks).created()
    told = dict(container.guest()["records"])
    assert told["hook"] == ["/bin/false", 9, ["false", "x"], ["A=b"]]
    assert json.loads(told["state"][0])["status"] == "created"
    dom0.forget()
    start = container.start_runx("start")
    data = f"/local/domain/{container.domid()}/data"
    dom0.ask("await_calls", "xenstore", f"watch {data}/process/0")
    dom0.ask("write", f"{data}/go", "1")
    result = start.wait()
    assert result.returncode == 1
    reason = "error running startContainer hook #0: exit status 1"
    assert result.stderr == f"runX: unable to start container process: {reason}\n"
    finish(container, 1)


def test_a_process_that_is_over_before_start_looks_has_been_there(dom0):
    container = with_hooks(dom0, "exit:3", kinds=["poststart"]).created()
    assert container.runx("start").returncode == 0
    finish(container, 3)


# ---- run


def run(container, *options, **streams):
    return container.start_runx("run", "--bundle", str(container.bundle), *options, **streams)


def test_run_is_the_container(dom0):
    container = dom0.container("cat:", "err:oops", "exit:3")
    process = run(container, stdin=b"in and out")
    result = process.wait()
    assert (result.returncode, result.stdout, result.stderr) == (3, "in and out", "oops")
    assert container.runx("state").returncode == 1


def test_a_container_whose_creator_has_closed_its_streams_has_empty_ones(dom0):
    container = dom0.container("cat:", "err:oops", "exit:3").created(closed=(0, 1, 2))
    assert container.runx("start", closed=(0, 1, 2)).returncode == 0
    finish(container, 3)
    assert container.log_text() == ""


def test_run_keep_leaves_it_to_be_looked_at(dom0):
    container = dom0.container("exit:0")
    assert run(container, "--keep").wait().returncode == 0
    assert container.status() == "stopped"
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("options", [["--keep"], ["--keep", "--detach"]])
@pytest.mark.parametrize("what", ["program", "vm", "hook"])
def test_run_keep_leaves_what_could_not_start_too(dom0, what, options):
    """As under runc: it is stopped, and `state` and `delete` work."""
    container = with_hooks(dom0, "wait", poststart={"command": "exit 7" if what == "hook" else "true"})
    sentence = "error running poststart hook #0"
    if what == "program":
        sentence = 'exec: "x": exec format error'
        container.write(config(f"begun:set:data/process/0/error={sentence}", "begun:exit:255"))
    elif what == "vm":
        sentence = "process/0/start in xenstore: EIO"
        dom0.fail("xenstore", 1, "EIO", match="process/0/start")
    result = run(container, *options, "--pid-file", str(container.pid_file)).wait()
    assert (result.returncode, sentence in result.stderr) == (1, True), result
    assert (container.status(), container.pid_file.exists()) == ("stopped", False)
    assert "cannot start a container that has stopped" in container.runx("start").stderr
    result = container.runx("delete")
    assert (result.returncode, result.stderr) == (0, "")
    assert container.runx("state").returncode == 1


def test_run_detached_returns_when_it_runs(dom0):
    container = dom0.container("wait")
    process = run(container, "--detach", "--pid-file", str(container.pid_file))
    assert process.wait().returncode == 0
    assert container.status() == "running"
    kill(container, "TERM")
    finish(container, 143)


def test_what_is_sent_to_run_goes_to_the_process(dom0):
    container = dom0.container("out:go\n", "signal:1", "exit:9")
    reader, writer = os.pipe()
    process = run(container, stdout=writer)
    os.close(writer)
    assert os.read(reader, 3) == b"go\n"
    status = pathlib.Path(dom0.inside) / f"proc/{process.pid}/status"
    wait_until(
        lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> 14 & 1, "that it takes signals"
    )
    process.signal(15)
    assert process.wait().returncode == 9
    assert os.read(reader, 10) == b"15"
    os.close(reader)


def test_run_of_what_cannot_start_leaves_nothing(dom0):
    container = dom0.container()
    dom0.fail("xenstore", 1, "EIO", match="process/0/start")
    result = run(container).wait()
    assert (result.returncode, result.stderr.endswith("/data/process/0/start in xenstore: EIO\n")) == (1, True)
    dom0.settle()


def test_run_of_what_cannot_be_executed_leaves_nothing(dom0):
    reason = 'exec: "x": exec format error'
    container = dom0.container(f"begun:set:data/process/0/error={reason}", "begun:exit:255")
    result = run(container, "--pid-file", str(container.pid_file)).wait()
    assert (result.returncode, result.stderr) == (1, f"runX: unable to start container process: {reason}\n")
    assert not container.pid_file.exists()
    dom0.settle()


def test_run_ends_with_the_status_of_what_it_cannot_remove(dom0):
    """As under runc, where that is a warning."""
    container = dom0.container("out:go", "wait")
    reader, writer = os.pipe()
    process = run(container, stdout=writer)
    os.close(writer)
    assert os.read(reader, 2) == b"go"
    (container.root / container.id / "others").mkdir()
    kill(container, "TERM")
    assert (process.wait().returncode, os.read(reader, 1)) == (143, b"")
    os.close(reader)
    warning = f"level=warning msg=cannot remove {container.root}/{container.id}: Directory not empty"
    assert warning in container.log_text()
    (container.root / container.id / "others").rmdir()
    assert container.runx("delete", "--force").returncode == 0


def test_run_leaves_the_next_container_of_its_id(dom0):
    container = with_hooks(dom0, "wait", kinds=["poststart"])
    process = run(container)
    wait_until((container.bundle / "notes").exists, "that it runs, and `run` knows it")
    process.signal(signal.SIGSTOP)
    assert container.runx("delete", "--force").returncode == 0
    container.created()
    process.signal(signal.SIGCONT)
    assert process.wait().returncode == 137
    assert (container.status(), container.runx("delete").returncode) == ("created", 0)


def test_run_joins_a_terminal_to_ours(dom0):
    container = dom0.container("line:", "err:bye", "exit:4", terminal=True)
    result = run(container, stdin=b"hello\n").wait()
    assert (result.returncode, result.stdout, result.stderr) == (4, "hello\nbye", "")


def test_run_at_a_pipe_that_must_not_block_waits_for_its_reader(dom0):
    """It was taken for one that has gone, and the container was hung up on."""
    container = dom0.container("much:200000", "exit:4", terminal=True)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = run(container, stdout=writer)
    wait_until(lambda: not select.select([], [writer], [], 0)[1], "that the pipe is full")
    os.close(writer)
    with open(reader, "rb") as output:
        assert len(output.read()) == 200000
    assert process.wait().returncode == 4


def test_run_joins_our_own_terminal(dom0):
    container = dom0.container("out:go", "line:", "exit:4", terminal=True)
    check_our_terminal(functools.partial(run, container))


def test_run_adds_no_carriage_returns_to_what_goes_to_a_pipe(dom0):
    """As under runc; at our terminal, where they are added, a line of who reads the pipe begins on the left."""
    container = dom0.container("out:go", "wait", terminal=True)
    master, slave = os.openpty()
    reader, writer = os.pipe()
    for stdout, output, word in ((writer, reader, "plain_terminal"), (slave, master, "terminal")):
        process = run(container, stdin=slave, stdout=stdout, session=True)
        assert os.read(output, 2) == b"go"
        assert [word, []] in container.guest()["records"]
        modes = termios.tcgetattr(slave)
        assert (bool(modes[1] & termios.OPOST), modes[3] & termios.ICANON) == (output == reader, 0)
        kill(container)
        assert process.wait().returncode == 137
    for fd in (master, slave, reader, writer):
        os.close(fd)


def test_run_cannot_have_a_console_socket(dom0):
    container = dom0.container(terminal=True)
    result = run(container, "--console-socket", "/x").wait()
    assert result.stderr == "runX: cannot use console socket if runX will not detach or allocate tty\n"


@pytest.mark.parametrize("command", ["create", "run"])
def test_what_no_vm_can_take_over_is_a_warning(dom0, command):
    container = dom0.container("exit:0")
    asked = ["--bundle", str(container.bundle), "--preserve-fds", "2"]
    env = {"NOTIFY_SOCKET": "/run/notify", "LISTEN_FDS": "1", "LISTEN_PID": "1"}  # which is not ours
    assert container.start_runx(command, *asked, env=env).wait().returncode == 0
    assert [line.split(": ")[1].split()[0] for line in container.log_text().splitlines()] == [
        "--preserve-fds",
        "NOTIFY_SOCKET",
    ]
    container.runx("delete", "--force")


def test_descriptors_of_systemd_count_for_the_process_that_they_are_meant_for(monkeypatch):
    asked = record(runx.Invocation, options={"preserve-fds": "0"})
    for pid, told in ((os.getpid(), ["LISTEN_FDS"]), (os.getppid(), [])):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        assert runx.handed(asked) == told


# ---- update, events


def limited(dom0, status="running", **annotations):
    annotations = {f"org.runx.{key}": value for key, value in annotations.items()}
    container = dom0.container("wait", annotations=annotations, linux={"resources": {"memory": {"limit": 128 << 20}}})
    if status == "created":
        return container.created()
    return container.started().ready()


@pytest.mark.parametrize("status", ["created", "running", "paused"])
def test_update_changes_what_xen_can_change(dom0, status):
    dom0_settings = {"maxvcpus": "4", "maxmem": "256"}
    container = limited(dom0, status, **dom0_settings)
    if status == "paused":
        assert container.runx("pause").returncode == 0
    options = ["--memory", "192m", "--cpu-quota", "150000", "--cpu-period", "100000", "--cpu-share", "2048"]
    before = dom0.calls("xl").count("info")
    result = container.runx("update", *options, "--cpuset-cpus", "0-1")
    assert (result.returncode, result.stderr) == (0, "")
    assert dom0.calls("xl").count("info") == before + 1  # of what scheduler Xen has
    domain = dom0.domains()[container.domid()]
    assert (domain["memory"], domain["vcpus"]) == (192, 2)
    assert domain["told"] == {"scheduler": [512, 150], "pinned": ["all", "0-1"]}
    kill(container)
    finish(container, 137)


@pytest.mark.parametrize("option", [["-r", "-"], ["--resources", "-"], ["--resources=-"]])
def test_an_update_by_a_document(dom0, option):
    """containerd before 2.0 gives the option and its value as two words, and since then as one."""
    container = limited(dom0)
    document = json.dumps({"memory": {"limit": 64 << 20, "swap": -1}})
    assert container.runx("update", *option, stdin=document.encode()).returncode == 0
    assert dom0.domains()[container.domid()]["memory"] == 64
    assert container.stored()["resources"] == {"memory": {"limit": 64 << 20, "swap": -1}}
    for text, words in (("[]", "must be a JSON object"), ("{", "cannot read the resources")):
        assert words in container.runx("update", *option, stdin=text.encode()).stderr
    kill(container)
    finish(container, 137)


@pytest.mark.parametrize(
    "memory", ["96m", "96MB", "96MiB", "98304KiB", "98304 kb", "100663296", "100663296B", "0.09375g", "100663296.5"]
)
def test_a_number_of_bytes_is_written_as_for_runc(memory):
    assert runx.read_update({"memory": memory, "cpu-quota": ""}) == {"memory": {"limit": 96 << 20}}


def test_no_limit_is_no_change_where_there_is_none(dom0):
    container = limited(dom0)
    assert container.runx("update", "--pids-limit", "-1", "--memory-swap", "-1").stderr == ""
    kill(container)
    finish(container, 137)


@pytest.mark.parametrize("scheduler", ["credit", "null", "rtds", "arinc653"])
def test_a_share_is_updated_where_xens_scheduler_knows_any(dom0, scheduler):
    dom0.ask("scheduler", scheduler)
    container = limited(dom0)
    for options in (["--cpu-share", "512"], ["--cpu-quota", "50000"]):
        result = container.runx("update", "--memory", "96m", *options)
        knows = scheduler == "credit"
        words = f"cannot update container {container.id}: Xen's scheduler, {scheduler}, knows neither shares nor quotas"
        assert result.stderr == ("" if knows else f"runX: {words}: boot Xen with sched=credit2\n")
    domain = dom0.domains()[container.domid()]
    assert (domain["memory"], domain["told"].get("scheduler")) == ((96, [128, 50]) if knows else (128, None))
    assert container.runx("update", "--memory", "96m").stderr == ""
    dom0.fail("xl", 1, "kill", after=True, match="mem-set")  # what there is of the next one, nobody knows
    assert container.runx("update", "--memory", "64m").returncode == -9
    dom0.forget()
    assert container.runx("update", "--memory", "80m").stderr == ""
    assert dom0.domains()[container.domid()]["memory"] == 80
    kill(container)
    finish(container, 137)


def test_an_update_is_all_or_nothing(dom0):
    container = limited(dom0)
    before = dom0.domains()
    for options, words in (
        (["--memory", "64m", "--pids-limit", "5"], "pids.limit cannot change while its VM exists"),
        (["--memory", "512m"], "to 512 MiB of memory: its VM was made for 128 at most"),
        (["--cpu-quota", "400000"], "vcpus: its VM was made for 1 at most"),
        (["--memory", "x"], "option --memory of update needs a number, not 'x'"),
        (["--memory", "1e3"], "option --memory of update needs a number, not '1e3'"),
        (["--memory", "-5"], "option --memory of update needs a number, not '-5'"),
        (["--memory", "9" * 400], "option --memory of update needs a number, not '999"),
        (["--cpu-quota", "0.5"], "option --cpu-quota of update needs a number, not '0.5'"),
        (["--cpu-quota", "5b"], "option --cpu-quota of update needs a number, not '5b'"),
    ):
        assert words in container.runx("update", *options).stderr
        assert dom0.domains() == before
    dom0.fail("xl", 1, "no luck", match="sched")
    result = container.runx("update", "--memory", "96m", "--cpu-share", "512")
    assert result.stderr == "runX: xl sched-credit2 failed: no luck\n"
    domain = dom0.domains()[container.domid()]
    assert (domain["memory"], domain["told"]["scheduler"]) == (128, [256, 0])
    kill(container)
    finish(container, 137)


def test_after_an_update_that_was_killed_the_next_one_sets_everything(dom0):
    container = limited(dom0)
    dom0.fail("xl", 1, "kill", after=True, match="mem-set")
    assert container.runx("update", "--memory", "96m").returncode == -9
    dom0.forget()
    assert dom0.domains()[container.domid()]["memory"] == 96
    assert container.runx("update", "--cpu-share", "1024").returncode == 0
    assert [call.split()[0] for call in dom0.calls("xl")] == [
        "info",
        "mem-set",
        "vcpu-set",
        "sched-credit2",
        "vcpu-pin",
    ]
    assert dom0.domains()[container.domid()]["memory"] == 128
    kill(container)
    finish(container, 137)


def test_an_update_that_fails_after_one_that_was_killed_puts_everything_back(dom0):
    container = limited(dom0)
    dom0.fail("xl", 1, "kill", after=True, match="mem-set")
    assert container.runx("update", "--memory", "96m").returncode == -9
    dom0.forget()
    dom0.fail("xl", 1, "no luck", match="mem-set")
    assert container.runx("update", "--cpu-share", "512").stderr == "runX: xl mem-set failed: no luck\n"
    assert dom0.domains()[container.domid()]["memory"] == 128
    assert not container.stored()["updating"]
    kill(container)
    finish(container, 137)


def test_events_end_with_the_container_and_tell_of_its_lack_of_memory(dom0):
    container = dom0.container("until:data/go", "set:data/oom=killed", "exit:137").started()
    reader, writer = os.pipe()
    events = container.start_runx("events", "--interval", "1h", stdout=writer)
    os.close(writer)
    lines = open(reader, encoding="utf-8")
    assert json.loads(lines.readline())["type"] == "stats"
    dom0.ask("await_calls", "xenstore", "data/oom")
    dom0.ask("write", f"/local/domain/{container.domid()}/data/go", "1")
    assert json.loads(lines.readline()) == {"type": "oom", "id": container.id}
    assert lines.read() == ""
    assert events.wait().returncode == 0
    lines.close()
    finish(container, 137)


@pytest.mark.parametrize("interval", ["", "5", "x", "0s", "-1s", "1d"])
def test_an_interval_that_is_none(dom0, interval):
    container = dom0.container().created()
    assert "option --interval of events needs a duration" in container.runx("events", f"--interval={interval}").stderr
    kill(container)
    finish(container, 137)


# ---- what xl and the guest are told


def test_xl_gets_what_config_json_asks_for(dom0):
    resources = {
        "memory": {"limit": 96 << 20},
        "cpu": {"shares": 512, "quota": 250000, "period": 100000, "cpus": "0,2"},
    }
    container = dom0.container("exit:0", linux={"resources": resources}).created()
    settings = dom0.domains()[container.domid()]["settings"]
    assert (settings["memory"], settings["maxmem"], settings["vcpus"], settings["maxvcpus"]) == (96, 96, 3, 3)
    assert (settings["cap"], settings["cpu_weight"], settings["cpus"]) == (250, 128, "0,2")
    assert settings["name"] == f"runx-{container.id}-{settings['uuid'][:8]}"
    assert (settings["type"], settings["kernel"]) == ("pv", "/run/fake/lib/kernel")
    assert settings["cmdline"] == "console=hvc0 quiet loglevel=2 panic=-1"
    assert "p9" not in settings
    assert container.runx("start").stderr == ""
    finish(container)


def test_files_go_over_9p_or_into_the_ramdisk(dom0):
    for rootfs in ("9p", "ramdisk"):
        container = dom0.container("exit:0", annotations={"org.runx.rootfs": rootfs}).created()
        settings, files = dom0.domains()[container.domid()]["settings"], container.guest()["files"]
        served = f"/local/domain/{container.domid()}/device/fuse/0/tag" in dom0.nodes()
        assert (served, "p9" in settings) == (rootfs == "9p", False)
        assert ("mnt/rootfs/bin/guest" in files) == (rootfs == "ramdisk")
        assert settings["ramdisk"].startswith("/proc/")
        assert not os.path.exists(container.root / container.id / "ramdisk")
        assert container.runx("start").stderr == ""
        finish(container)


def test_where_xl_has_no_qemu_for_an_image_the_remedy_is_told(dom0):
    dom0.fail("xl", 1, "device model did not start", match="create")
    told = dom0.container("exit:0", annotations={"org.runx.rootfs": "9p"}).create().stderr
    assert "xl create failed: device model did not start: only an image in the format raw does without a QEMU" in told


def test_too_little_memory_is_told_with_what_there_is(dom0):
    dom0.ask("memory", 20)
    container = dom0.container()
    assert "Xen has not enough memory for a VM of 64 MiB: 20 MiB are free\n" in container.create().stderr


def test_the_guest_is_told_the_process_and_its_mounts(dom0):
    container = dom0.container()
    (container.bundle / "volume").mkdir()
    (container.bundle / "hosts").write_text("x")
    spec = config("exit:0", hostname="inner", domainname="there")
    spec["process"].update(
        cwd="/bin", env=["A=1", "B=2", "A=3"], noNewPrivileges=True, oomScoreAdj=-5,
        user={"uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 0o77},
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
        capabilities={"bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]},
    )  # fmt: skip
    spec["root"]["readonly"] = True
    spec["mounts"] += [
        {"destination": "/volume", "type": "bind", "source": "volume", "options": ["rbind", "ro"]},
        {"destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind"]},
    ]
    spec["linux"] = {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
        "sysctl": {"net.ipv4.ip_forward": "1"}, "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o600, "uid": 1}],
        "resources": {"pids": {"limit": 99}},
    }  # fmt: skip
    container.write(spec)
    container.created()
    told = container.guest()["records"]
    alone = {keyword: operands for keyword, operands in told}
    assert alone["flags"] == [0x20000000]
    assert alone["cwd"] == ["/bin"]
    assert [operands[0] for keyword, operands in told if keyword == "env"] == ["A=3", "B=2"]
    assert [operands[0] for keyword, operands in told if keyword == "arg"] == ["/bin/guest", "exit:0"]
    assert [operands[0] for keyword, operands in told if keyword == "group"] == ["9", "10"]
    assert alone["user"] == ["7", "8", str(0o77)]
    assert alone["capabilities"] == [str(1 << 0 | 1 << 5), str(1 << 5), "0", str(1 << 5), "0"]
    assert alone["rlimit"] == ["7", "10", "20"]
    assert (alone["oom"], alone["no_new_privileges"]) == (["-5"], [])
    assert (alone["hostname"], alone["domainname"]) == (["inner"], ["there"])
    assert alone["sysctl"] == ["sys/net/ipv4/ip_forward", "1"]
    assert (alone["mask"], alone["readonly"]) == (["/proc/kcore"], ["/proc/sys"])
    assert ["node", ["/dev/fuse", str(0o20600), "10", "229", "1", "0"]] in told
    assert alone["cgroup"] == [["pids.max", "99"]]
    mounts = [operands for keyword, operands in told if keyword == "mount"]
    assert ["mounts/0", "/volume", "", str(4096 | 16384), ""] in mounts
    assert ["mounts/0", "/volume", "", str(4096 | 32 | 1), ""] in mounts
    assert ["mounts/1", "/etc/hosts", "", "4096", ""] in mounts
    assert ["", "/", "", str(4096 | 32 | 1), ""] in mounts
    assert container.runx("start").stderr == ""
    finish(container)


def test_the_holder_is_in_the_containers_namespaces_and_files(dom0):
    container = dom0.container("wait", annotations={"org.runx.rootfs": "9p"}, hostname="inner").started()
    inside = pathlib.Path(dom0.inside) / f"proc/{container.pid()}"
    assert (inside / "root/bin/guest").exists()
    assert not (inside / "root/etc").exists()
    home = pathlib.Path(dom0.inside) / "proc/1"
    for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
        assert os.readlink(inside / f"ns/{kind}") != os.readlink(home / f"ns/{kind}")
    assert len(os.listdir(inside / "fd")) <= 6
    kill(container)
    finish(container, 137)


# ---- states of another runX


def test_a_state_of_an_older_runx_goes_on(dom0):
    """Keys that it has not written: start, update and delete do without."""
    for keys in (("networks", "namespace", "resources", "vbds", "disk", "rate", "plugged", "base"), ("monitor", "boot"),
                 ("cgroups", "hostname", "maxmem", "maxvcpus")):  # fmt: skip
        container = dom0.container("wait").created()
        container.store(lambda state, keys=keys: [state.pop(key, None) for key in (*keys, "version")])
        for command in (["start"], ["update", "--cpu-share", "512"], ["pause"], ["resume"], ["kill"]):
            result = container.runx(*command)
            assert result.returncode == 0 or command[0] == "update", result
            assert "error: " not in result.stderr and "KeyError" not in result.stderr, result
        finish(container, 143)


def test_a_state_of_a_newer_runx_is_refused_with_a_sentence(dom0):
    container = dom0.container("wait").created()
    state = (container.root / container.id / "state.json").read_text()
    container.store(lambda state: state.update(version=99))
    for command in ("state", "start", "kill", "pause", "resume", "ps", "update", "delete"):
        result = container.runx(command)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "its state has version 99" in result.stderr and "use the newer one" in result.stderr
    (container.root / container.id / "state.json").write_text(state)
    assert container.runx("delete").returncode == 0


# ---- spec


def test_spec_writes_a_config_that_create_accepts(dom0):
    container = dom0.container()
    path = container.bundle / "config.json"
    path.unlink()
    result = dom0.run("spec", "--bundle", str(container.bundle))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    spec = json.loads(path.read_text())
    assert (spec["process"]["terminal"], spec["process"]["args"]) == (True, ["sh"])
    assert spec["process"]["capabilities"]["bounding"] == ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    spec["process"].update(args=["/bin/guest", "exit:3"], terminal=False)
    container.write(spec)
    container.created()
    told = container.guest()["records"]
    assert container.runx("start").returncode == 0
    assert ["readonly", ["/proc/sys"]] in told and ["mask", ["/proc/keys"]] in told and ["hostname", ["runX"]] in told
    assert {operands[1] for keyword, operands in told if keyword == "mount" and operands[0]} >= {"/proc", "/sys"}
    finish(container, 3)
    assert container.log_text() == ""


def test_spec_writes_where_it_is_called_and_nothing_over(tmp_path):
    folder, command = tmp_path / "bundle", runx_command("spec")
    folder.mkdir()
    for path in (folder / "config.json", tmp_path / "config.json"):
        options = ["-b", str(folder)] if path.parent == folder else []
        assert call(*command, *options, cwd=tmp_path, umask=0o027).returncode == 0
        assert path.stat().st_mode & 0o777 == 0o640
        path.write_text("mine")
        result = call(*command, *options, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (1, b"runX: File config.json exists. Remove it first\n")
        assert path.read_text() == "mine"


@pytest.mark.parametrize("option, words", [("--rootless", "without --rootless"), ("-b=/no/such", "/no/such/config")])
def test_what_spec_cannot_write(tmp_path, option, words):
    result = call(*runx_command("spec", option), cwd=tmp_path)
    assert (result.returncode, result.stderr.count(b"\n"), list(tmp_path.iterdir())) == (1, 1, [])
    assert words in result.stderr.decode()
