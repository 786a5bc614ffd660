# SPDX-License-Identifier: Apache-2.0
"""`runX exec` in a dom0 without Xen: what the VM is asked for, streams, signals, exit status, and what is left."""

import contextlib
import functools
import json
import os
import signal
import socket

import pytest
from conftest import ConsoleSocket, check_our_terminal, wait_until
from fake.guest import pattern
from test_failures import try_each
from test_life import bring, remove

import runx

PTS = [
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
]


def execute(container, *words, options=(), **streams):
    """Starts `runX exec` of these steps, see fake/guest.py."""
    args = container.words("exec", *options, container.id, "guest", *words)
    return container.dom0.start(*args, **streams)


def running(dom0, *steps, **changes):
    return dom0.container(*(steps or ("wait",)), **changes).started().ready()


def node(container, name):
    return container.dom0.nodes().get(f"/local/domain/{container.domid()}/{name}")


def freed(container, number=1):
    """Waits until process `number` has left nothing."""
    wait_until(lambda: not (container.root / container.id / f"process-{number}").exists(), "that its number is free")
    nodes = [path for path in container.dom0.nodes() if path.startswith(f"/local/domain/{container.domid()}/")]
    consoles = [f"/device/console/{2 * number + each}" for each in (1, 2)]
    assert [path for path in nodes if path.endswith((f"/data/process/{number}", *consoles))] == []
    assert node(container, f"data/request/run-{number}") is None
    assert [
        path for path in container.dom0.nodes() if f"backend/console/{container.domid()}/{2 * number + 1}" in path
    ] == []


def finish(container):
    assert container.dom0.run(*container.words("kill", container.id, "KILL")).returncode == 0
    assert container.wait() == 137, container.log_text()
    result = container.runx("delete")
    assert (result.returncode, result.stderr) == (0, "")


# ---- what it does


def test_exec_is_the_process(dom0):
    container = running(dom0)
    process = execute(container, "cat:", "err:oops", "exit:3", stdin=b"in and out")
    result = process.wait()
    assert (result.returncode, result.stdout, result.stderr) == (3, "in and out", "oops")
    freed(container)
    assert container.status() == "running"
    finish(container)


def test_output_and_input_are_exact(dom0):
    data = b"\x10\x04\x00\xff" + pattern(20_000)
    container = running(dom0)
    process = execute(container, "cat:", f"much:{100_000}", stdin=data)
    assert process.wait().returncode == 0
    assert os.pread(process.stdout, 1 << 20, 0) == data + pattern(100_000)
    finish(container)


def test_many_at_once_have_numbers_of_their_own(dom0):
    container = running(dom0)
    processes = [execute(container, f"out:{number}", f"exit:{number}") for number in range(8)]
    results = [process.wait() for process in processes]
    assert [(result.returncode, result.stdout) for result in results] == [(n, str(n)) for n in range(8)]
    for number in range(1, 9):
        freed(container, number)
    finish(container)


def test_detached_it_returns_when_the_program_is_executed(dom0, tmp_path):
    container = running(dom0)
    process = execute(container, "until:go", "exit:7", options=["-d", "--pid-file", str(tmp_path / "pid")])
    assert process.wait().returncode == 0
    pid = int((tmp_path / "pid").read_text())
    assert json.loads(container.runx("ps", "--format", "json").stdout) == [container.pid(), pid]
    assert node(container, "data/process/1/ready") == "1"
    dom0.ask("write", f"/local/domain/{container.domid()}/go", "1")
    assert dom0.wait(pid) == 7
    freed(container)
    finish(container)


def test_a_program_that_cannot_be_executed_is_exec_s_own_failure_in_runc_s_words(dom0, tmp_path):
    container = running(dom0)
    reason = 'exec failed: unable to start container process: exec: "none": executable file not found in $PATH'
    for options in ([], ["--detach", "--pid-file", str(tmp_path / "pid")]):
        result = dom0.run(*container.words("exec", *options, container.id, "none"))
        assert (result.returncode, result.stdout, result.stderr) == (255, "", f"runX: {reason}\n")
        freed(container)
    assert not (tmp_path / "pid").exists()
    assert container.log_text().count(reason) == 2
    finish(container)


@pytest.mark.parametrize("count", [1, 4])
def test_it_ends_before_the_container(dom0, count):
    """An engine may hear of no other end behind that: with containerd 1.x, `docker exec` never returned."""
    container, pids = running(dom0), []
    for number in range(count):
        path = container.bundle / f"exec-{number}"
        assert execute(container, "wait", options=["-d", "--pid-file", str(path)]).wait().returncode == 0
        pids.append(int(path.read_text()))
    assert dom0.run(*container.words("kill", container.id, "KILL")).returncode == 0
    assert container.wait() == 137
    assert [dom0.ended.get(pid) for pid in pids] == [137] * count
    for pid in pids:
        dom0.wait(pid)
    assert container.runx("delete").returncode == 0


def test_one_that_does_not_end_holds_the_container_up_for_a_moment_only(dom0):
    dom0.constants["CARRIERS_END"] = 0.1
    container = running(dom0)
    path = container.bundle / "exec"
    assert execute(container, "wait", options=["-d", "--pid-file", str(path)]).wait().returncode == 0
    dom0.signal(int(path.read_text()), signal.SIGSTOP)
    assert dom0.run(*container.words("kill", container.id, "KILL")).returncode == 0
    assert container.wait() == 137
    assert dom0.wait(int(path.read_text())) == -9
    assert container.runx("delete").returncode == 0


# ---- refusals


@pytest.mark.parametrize(
    "status, options, reason",
    [
        ("created", [], runx.REFUSED["exec"]["created"]),
        ("paused", [], "cannot exec in a paused container (use --ignore-paused to override)"),
        ("stopped", ["--ignore-paused"], "cannot exec in a stopped container"),
        ("running", ["--console-socket", "/x"], "cannot use console socket if runX will not detach or allocate tty"),
        ("running", ["--tty"], "the process: terminal needs a mount of the type devpts at /dev/pts"),
        ("running", ["--cgroup", "sub"], "cannot run it in the cgroup sub: runX has only the container's own"),
        ("running", ["--user", "root"], "bad uid: root is no number of a user or group"),
        ("running", ["--user", ":5"], "bad uid: '' is no number of a user or group"),
        ("running", ["--user", "5:"], "bad gid: '' is no number of a user or group"),
        ("running", ["--cwd", "here"], "the process: cwd must be an absolute path"),
        ("running", ["--process", "/"], "cannot read the process from /: Is a directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once_and_leaves_nothing(dom0, status, options, reason):
    container = bring(dom0, status)
    result = execute(container, options=options).wait()
    assert (result.returncode, result.stdout, result.stderr) == (255, "", f"runX: exec failed: {reason}\n")
    assert container.log_text().endswith(f"level=error msg=exec failed: {reason}\n")
    assert not list((container.root / container.id).glob("process-*"))
    assert not [path for path in dom0.nodes() if "/console/3" in path or "/data/process/1" in path or "/run-1" in path]
    remove(container)


def test_a_created_container_that_is_paused_is_not_started_either(dom0):
    container = bring(dom0, "created")
    assert container.runx("pause").returncode == 0
    assert runx.REFUSED["exec"]["created"] in execute(container, options=["--ignore-paused"]).wait().stderr
    remove(container)


def test_without_a_container_or_a_command(dom0):
    container = dom0.container("wait")
    assert container.runx("exec").stderr == f'runX: exec failed: container "{container.id}" does not exist\n'
    container.started()
    result = container.runx("exec")
    assert (result.returncode, result.stderr) == (255, "runX: exec failed: process args cannot be empty\n")
    remove(container)


def test_a_vm_of_its_own_system_runs_no_process_for_us(dom0):
    container = dom0.container(annotations={"org.runx.kernel": "/boot/vmlinuz", "org.runx.init": "own"})
    container = bring(dom0, "running")
    container.store(lambda state: state.update(own_init=True))
    assert "whose VM boots a system of its own" in execute(container).wait().stderr
    container.store(lambda state: state.update(own_init=False))
    remove(container)


def test_in_a_paused_container_it_waits_for_resume(dom0):
    container = bring(dom0, "paused")
    dom0.constants = {"EXEC_TIME_LIMIT": 0.0}
    process = execute(container, "out:hello", options=["--ignore-paused"])
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/request/run-1")
    assert container.runx("resume").returncode == 0
    result = process.wait()
    assert (result.returncode, result.stdout) == (0, "hello")
    remove(container)


def test_no_more_run_at_once_than_there_are_consoles(dom0):
    container = running(dom0)
    dom0.constants = {"EXECS_MAX": 2}
    processes = [execute(container, "wait") for _ in range(2)]
    for number in (1, 2):
        dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/{number}/ready")
    result = execute(container).wait()
    assert (result.returncode, "2 processes run there besides its own" in result.stderr) == (255, True)
    processes[0].signal(9)
    assert processes[0].wait().returncode == -9
    remove(container)


def test_a_vm_whose_xenstore_is_full_is_out_of_room(dom0):
    container = running(dom0)
    dom0.fail("xenstore", 1, "ENOSPC", match="console/3/backend")
    result = execute(container).wait()
    assert result.returncode == 255
    assert 'exec failed: the container\'s VM takes no more requests, here "run 1" (ENOSPC)' in result.stderr
    freed(container)
    assert execute(container, "exit:4").wait().returncode == 4
    finish(container)


# ---- the process that is asked for


def records(container, number=1):
    (process,) = container.guest()["others"].values()
    return process["records"]


def test_the_process_is_the_containers_own_with_what_the_options_change(dom0):
    container = dom0.container("wait")
    spec = json.loads((container.bundle / "config.json").read_text())
    spec["process"] |= {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 8, "hard": 9}], "oomScoreAdj": 77}
    spec["process"]["user"] |= {"umask": 0o27, "additionalGids": [5]}
    known = ["CAP_KILL", "CAP_CHOWN"]
    spec["process"]["capabilities"] = {"bounding": known, "permitted": known[:1], "inheritable": known}
    spec["linux"] = {"personality": {"domain": "LINUX32"}}
    container.write(spec)
    container.started().ready()
    options = [
        "--cwd",
        "/tmp",
        "-e",
        "A=1",
        "--env=PATH=/x",
        "-u",
        "7:8",
        "-g",
        "6",
        "-c",
        "CAP_CHOWN",
        "--no-new-privs",
    ]
    process = execute(container, "wait", options=options)
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/1/ready")
    kill, chown = 1 << 5, 1
    assert records(container) == [
        ["flags", [0]], ["cwd", ["/tmp"]], ["oom", ["77"]], ["personality", ["8"]],
        ["capabilities", [str(each) for each in (kill | chown, chown, kill | chown, kill | chown, chown)]],
        ["no_new_privileges", []],
        ["user", ["7", "8", str(0o27)]], ["group", ["5"]], ["group", ["6"]], ["arg", ["guest"]], ["arg", ["wait"]],
        ["env", ["PATH=/x"]], ["env", ["A=1"]], ["rlimit", ["7", "8", "9"]],
    ]  # fmt: skip
    process.signal(15)
    assert process.wait().returncode == 143
    remove(container)


def test_an_oci_process_is_taken_as_it_is(dom0, tmp_path):
    container = dom0.container("wait")
    spec = json.loads((container.bundle / "config.json").read_text())
    spec["process"] |= {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 8, "hard": 9}], "oomScoreAdj": 77}
    spec["process"] |= {"scheduler": {"policy": "SCHED_BATCH"}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE"}}
    spec["process"]["capabilities"] = {"bounding": ["CAP_KILL"]}
    container.write(spec)
    container.started().ready()
    process = {"args": ["guest", "wait"], "cwd": "/", "env": ["B=2"], "capabilities": {}, "oomScoreAdj": 3}
    process["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 5}
    (tmp_path / "process").write_text(json.dumps(process))
    started = dom0.start(*container.words("exec", "--process", str(tmp_path / "process"), container.id))
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/1/ready")
    assert records(container) == [
        ["flags", [0]], ["cwd", ["/"]], ["oom", ["77"]], ["ioprio", [str(2 << 13 | 5)]],
        ["scheduler", ["3", *["0"] * 6]], ["capabilities", ["0"] * 5], ["user", ["0", "0", "18"]],
        ["arg", ["guest"]], ["arg", ["wait"]], ["env", ["B=2"]], ["rlimit", ["7", "8", "9"]],
    ]  # fmt: skip
    started.signal(1)
    assert started.wait().returncode == 129
    remove(container)


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_the_container_has_is_what_create_has_found(dom0, tmp_path, is_kept):
    """As under runc, whose state.json has it; what is the command line's to change is config.json's of today."""
    container = dom0.container("wait")
    spec = json.loads((container.bundle / "config.json").read_text())
    changed = json.loads(json.dumps(spec))
    spec["linux"] = {"personality": {"domain": "LINUX32"}}
    container.write(spec)
    changed["process"]["cwd"] = "/tmp"
    dom0.fail("xl", 1, "slow", match="create")
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    dom0.ask("await_calls", "xl", "create")
    container.write(changed)  # while `create` is at work, so what counts is what it has read
    dom0.ask("release")
    assert create.wait().returncode == container.runx("start").returncode == 0
    container.ready()
    if not is_kept:  # by the runX that has created it
        (container.root / container.id / "config.json").unlink()
    process = execute(container, "wait")
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/1/ready")
    words = records(container)
    assert (["personality", ["8"]] in words, ["cwd", ["/tmp"]] in words) == (is_kept, True)
    process.signal(15)
    assert process.wait().returncode == 143
    freed(container)
    (container.bundle / "config.json").unlink()
    (tmp_path / "process").write_text(json.dumps({"args": ["guest", "exit:4"], "cwd": "/"}))
    ended = dom0.run(*container.words("exec", "--process", str(tmp_path / "process"), container.id))
    assert ended.returncode == (4 if is_kept else 255)
    finish(container)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "cannot read the process from"),
        ("[]", "must be a JSON object"),
        ('{"cwd": "/"}', "args must not be empty"),
        ('{"args": ["x"]}', "cwd is missing"),
    ],
)
def test_a_process_that_is_none_is_refused(dom0, tmp_path, text, reason):
    container = running(dom0)
    (tmp_path / "process").write_text(text)
    result = dom0.run(*container.words("exec", "--process", str(tmp_path / "process"), container.id))
    assert (result.returncode, reason in result.stderr) == (255, True), result
    remove(container)


def test_words_that_no_kernel_takes_are_refused_at_once(dom0, tmp_path):
    container = running(dom0)
    process = {"args": ["guest"], "cwd": "/", "env": [f"E{number}={'x' * 100_000}" for number in range(84)]}
    (tmp_path / "process").write_text(json.dumps(process))
    result = dom0.run(*container.words("exec", "--process", str(tmp_path / "process"), container.id))
    reason = 'exec failed: unable to start container process: exec: "guest": argument list too long'
    assert (result.returncode, result.stderr) == (255, f"runX: {reason}\n")
    freed(container)
    remove(container)


# ---- signals and the terminal


@pytest.mark.parametrize("number", [1, 2, 10, 12, 14, 28, 34, 64])
def test_signals_reach_the_process_alone(dom0, number):
    container = running(dom0)
    pid_file = container.bundle / "exec"
    process = execute(container, "signal:1", options=["-d", "--pid-file", str(pid_file)])
    assert process.wait().returncode == 0
    pid = int(pid_file.read_text())
    dom0.signal(pid, number)
    assert dom0.wait(pid) == 0
    assert process.stdout is not None and os.pread(process.stdout, 9, 0) == str(number).encode()
    assert container.guest()["signals"] == []
    finish(container)


def asked_when_paused(dom0, options, meanwhile):
    """What the VM was asked for of a process that runs until it gets a signal or its terminal hangs up; meanwhile() has
    come before the VM has taken the request for it, and ends it."""
    container = bring(dom0, "paused", "wait", mounts=PTS)
    process = execute(container, "broken:", options=["--ignore-paused", *options])
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/request/run-1")
    meanwhile(int((container.root / container.id / "process-1").read_text().split()[0]))
    assert container.runx("resume").returncode == 0
    process.wait()
    freed(container)
    asked = container.guest()["asked"]
    finish(container)
    return asked


def test_a_signal_that_comes_before_the_vm_has_heard_of_the_process_is_not_lost(dom0):
    assert asked_when_paused(dom0, [], lambda carrier: dom0.signal(carrier, 15)) == ["run 1", "kill 1 15"]


def test_a_terminal_that_hangs_up_before_that_hangs_up_for_the_process(dom0, tmp_path):
    engine = ConsoleSocket(tmp_path / "socket")
    options = ["-t", "-d", "--console-socket", engine.path]
    first, *asked = asked_when_paused(dom0, options, lambda _: hang_up(engine))
    assert (first, "look 1" in asked) == ("run 1", True)


def test_a_carrier_that_is_killed_takes_its_process_along(dom0):
    container = running(dom0)
    process = execute(container, "ignore", "wait", options=["-d", "--pid-file", str(container.bundle / "exec")])
    assert process.wait().returncode == 0
    pid = int((container.bundle / "exec").read_text())
    dom0.signal(pid, 9)
    assert dom0.wait(pid) == -9
    freed(container)
    assert "kill 1 9" in container.guest()["asked"]
    finish(container)


def test_a_carrier_that_is_killed_frees_its_number_also_in_a_vm_that_takes_no_more_requests(dom0):
    container = running(dom0)
    process = execute(container, "wait", options=["-d", "--pid-file", str(container.bundle / "exec")])
    assert process.wait().returncode == 0
    for number in range(runx.MOST_REQUESTS):
        dom0.ask("write", f"/local/domain/{container.domid()}/data/request/{number}", "look 0")
    pid = int((container.bundle / "exec").read_text())
    dom0.signal(pid, 9)
    assert dom0.wait(pid) == -9
    freed(container)
    assert 'the container\'s VM takes no more requests, here "kill 1 9"' in container.log_text()
    assert container.runx("delete", "--force").returncode == 0
    container.wait()


def test_a_terminal_is_the_engines_with_its_size_at_once_and_after_each_change(dom0, tmp_path):
    engine = ConsoleSocket(tmp_path / "socket")
    container = running(dom0, mounts=PTS)
    process = {
        "args": ["guest", "line:", "exit:6"], "cwd": "/", "terminal": True, "consoleSize": {"height": 30, "width": 99},
    }  # fmt: skip
    (tmp_path / "process").write_text(json.dumps(process))
    options = ["--detach", "--console-socket", engine.path, "--process", str(tmp_path / "process")]
    options += ["--pid-file", str(tmp_path / "pid")]
    assert dom0.run(*container.words("exec", *options, container.id)).returncode == 0
    terminal = engine.receive()
    engine.socket.close()
    assert node(container, "data/process/1/winsize") == "30 99"
    assert node(container, "device/console/4/state") is None
    terminal.resize(50, 132)
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/1/winsize", "50 132")
    terminal.type(b"\x10hi\n")
    assert terminal.rest() == b"\x10hi\n"
    os.close(terminal.fd)
    assert dom0.wait(int((tmp_path / "pid").read_text())) == 6
    finish(container)


def test_a_reader_of_the_output_that_goes_ends_nobody_who_writes_no_more(dom0):
    """The carrier's write raises SIGPIPE, which nobody has sent to the process: that may be a shell, and another has
    written."""
    container = running(dom0)
    reader, writer = os.pipe()
    os.close(reader)
    process = execute(container, "out:lost", "until:data/process/1/unread", "err:on", "exit:9", stdout=writer)
    os.close(writer)
    result = process.wait()
    assert (result.returncode, result.stderr) == (9, "on")
    assert "kill 1 13" not in container.guest()["asked"]
    finish(container)


def hang_up(engine):
    """An engine's end of a terminal that comes, when it has come."""
    with contextlib.closing(engine.socket):
        os.close(engine.receive().fd)


def test_a_terminal_that_the_engine_closes_hangs_up(dom0, tmp_path):
    """Also where nothing is written, and so nothing fails."""
    engine = ConsoleSocket(tmp_path / "socket")
    container = running(dom0, mounts=PTS)
    options = ["-t", "-d", "--console-socket", engine.path, "--pid-file", str(tmp_path / "pid")]
    process = execute(container, "until:data/process/1/unread", "exit:9", options=options)
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/1/ready")
    hang_up(engine)
    assert process.wait().returncode == 0
    assert dom0.wait(int((tmp_path / "pid").read_text())) == 9
    finish(container)


def test_a_terminal_needs_a_console_socket_where_exec_does_not_stay(dom0):
    container = running(dom0, mounts=PTS)
    result = execute(container, options=["--tty", "--detach"]).wait()
    reason = "cannot allocate tty if runX will detach without setting console socket"
    assert (result.returncode, result.stderr) == (255, f"runX: exec failed: {reason}\n")
    finish(container)


@pytest.mark.parametrize(
    "path, reason", [("/none/socket", "No such file or directory"), ("/x" * 99, "AF_UNIX path too long")]
)
def test_why_a_pidfd_cannot_be_sent(path, reason):
    with pytest.raises(runx.Error, match=f"^cannot send a pidfd to the socket {path}: {reason}$"):
        runx.hand_out(os.getpid(), {"pidfd-socket": path}, b"setns")


def test_a_terminal_is_joined_to_ours(dom0):
    container = running(dom0, mounts=PTS)
    check_our_terminal(functools.partial(execute, container, "out:go", "line:", "exit:4", options=["-t"]))
    finish(container)


def test_a_terminal_adds_no_carriage_returns_to_what_goes_to_a_pipe(dom0):
    container = running(dom0, mounts=PTS)
    reader, writer = os.pipe()
    process = execute(container, "out:go", "wait", options=["-t"], stdout=writer)
    assert os.read(reader, 2) == b"go"
    assert ["plain_terminal", []] in container.guest()["others"]["1"]["records"]
    process.signal(15)
    assert process.wait().returncode == 143
    for fd in (reader, writer):
        os.close(fd)
    finish(container)


@contextlib.contextmanager
def pidfd_socket(path):
    """An engine's socket; yield what gives the message and the pidfd that come by it."""
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()

        def receive():
            connection, _ = engine.accept()
            with connection:
                name, (pidfd,), _, _ = socket.recv_fds(connection, 100, 4)
            return name, pidfd

        yield receive


def test_a_pidfd_of_the_process_is_sent(dom0, tmp_path):
    container = running(dom0)
    with pidfd_socket(tmp_path / "socket") as receive:
        process = execute(container, "wait", options=["--pidfd-socket", str(tmp_path / "socket")])
        name, pidfd = receive()
    assert name == b"setns"
    signal.pidfd_send_signal(pidfd, 15)
    os.close(pidfd)
    assert process.wait().returncode == 143
    finish(container)


def test_a_pidfd_of_the_container_is_sent(dom0, tmp_path):
    container = dom0.container("wait")
    assert "cannot send a pidfd to the socket /none" in container.create("--pidfd-socket", "/none").stderr
    assert container.runx("state").returncode == 1 and not container.pid_file.exists()
    with pidfd_socket(tmp_path / "socket") as receive:
        container.created("--pidfd-socket", str(tmp_path / "socket"))
        name, pidfd = receive()
    assert name == b"standard"
    signal.pidfd_send_signal(pidfd, 15)
    os.close(pidfd)
    assert container.wait() == 143
    remove(container)


@pytest.mark.parametrize("place", ["none/pid", ""])  # "": the folder itself
def test_a_pid_file_that_cannot_be_written_ends_the_process_and_leaves_no_other(dom0, tmp_path, place):
    container, folder = running(dom0), tmp_path / "folder"
    folder.mkdir()
    result = execute(container, "wait", options=["--detach", "--pid-file", str(folder / place)]).wait()
    assert (result.returncode, f"cannot write the pid file {folder / place}" in result.stderr) == (255, True)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
    freed(container)
    finish(container)


def test_a_pid_file_is_written_by_no_link_that_others_have_put_there(dom0, tmp_path):
    container = running(dom0)
    (tmp_path / "passwd").write_text("root")
    (tmp_path / ".pid").symlink_to("passwd")
    process = execute(container, "exit:4", options=["--detach", "--pid-file", str(tmp_path / "pid")])
    assert process.wait().returncode == 0
    assert (tmp_path / "passwd").read_text() == "root" and int((tmp_path / "pid").read_text())
    assert not (tmp_path / "pid").is_symlink() and not os.path.lexists(tmp_path / ".pid")
    finish(container)


def test_a_pid_file_without_a_name_is_none(dom0):
    container = running(dom0)
    assert execute(container, "exit:4", options=["--pid-file", "", "--pidfd-socket="]).wait().returncode == 4
    finish(container)


# ---- guests that mean no good, and what is left


@pytest.mark.parametrize(
    "steps, status", [(["exit:256"], 255), (["exit:no number"], 255), (["ring:0,0,0,9999"], 255)]
)  # fmt: skip
def test_what_a_guest_tells_of_it_is_checked(dom0, steps, status):
    container = running(dom0)
    assert execute(container, *steps).wait().returncode == status
    assert container.status() == "running"
    remove(container)


def test_a_vm_that_never_takes_it_is_given_up(dom0):
    container = running(dom0, "mute")
    dom0.constants = {"EXEC_TIME_LIMIT": 0.1}
    result = execute(container).wait()
    assert (result.returncode, "the container's VM has not executed it within" in result.stderr) == (255, True)
    freed(container)
    remove(container)


def test_many_one_after_the_other_leave_nothing(dom0):
    container = running(dom0)
    for number in range(40):
        assert execute(container, f"exit:{number}").wait().returncode == number
    freed(container)
    finish(container)


def test_what_a_killed_monitor_leaves_delete_withdraws(dom0):
    container = running(dom0)
    process = execute(container, "wait", options=["-d"])
    assert process.wait().returncode == 0
    dom0.signal(container.stored()["monitor"][0], 9)
    assert container.wait() == 137
    remove(container)


def test_one_that_comes_while_the_vm_is_taken_down_leaves_nothing(dom0):
    """The monitor does not listen any more, and the domain is still there."""
    container = running(dom0)
    domid = container.domid()
    dom0.fail("xl", 1, "slow", match="destroy")
    assert dom0.run(*container.words("kill", container.id, "TERM")).returncode == 0
    dom0.ask("await_calls", "xl", "destroy")
    process = execute(container)
    dom0.ask("await_node", f"/local/domain/{domid}/device/console/3/backend")
    dom0.ask("release")
    assert container.wait() == 143
    assert process.wait().stderr == "runX: exec failed: container not running\n"
    remove(container)


@pytest.mark.parametrize("how", ["EIO", "kill"])
def test_whatever_fails_and_whoever_is_killed_nothing_is_left(dom0, how):
    def life(arm):
        container = running(dom0)
        arm()
        result = execute(container, "exit:3").wait()
        dom0.forget()
        assert "internal error" not in result.stderr + container.log_text()
        assert result.returncode in (3, 255) or how == "kill", result
        remove(container)

    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, how), life)
