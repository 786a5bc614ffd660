# SPDX-License-Identifier: Apache-2.0
"""`exec`, as a person and an engine meet it.

With EXEC_OF=runc in the environment it is runc's, in the same dom0: so these tests were found to say what is right.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import uuid

import pytest
from conftest import (
    IMAGE,
    PROGRAM_MOUNTS,
    Bundle,
    ConsoleSocket,
    Terminal,
    call,
    closing,
    config,
    difference,
    dom0_state,
    file_servers,
    in_memory,
    namespaces,
    nodes,
    wait_for,
    wait_in,
    wait_in_xenstore,
    wait_until,
)
from test_xen_config import DATA, DEFAULT_CAPABILITIES, REPORT, compare, report, report_config
from test_xen_engines import ctr, exit_status, task
from test_xen_streams import OUR_PS1, check_at_a_terminal, follows

import runx

KINDS = ("bounding", "effective", "permitted")  # of capabilities
RUNTIME = os.environ.get("EXEC_OF", "runX")
MANY = int(os.environ.get("EXECS", 30))  # one after the other, more than may be at once; 500 for a long look

pytestmark = pytest.mark.skipif(
    not shutil.which("runc") or not REPORT.exists(), reason="needs runc, to compare with, and the lab's reporter"
)


class Box(Bundle):
    """A bundle, and commands in the container made of it, of either runtime."""

    def __init__(self, folder, runtime):
        folder.mkdir()
        super().__init__(folder)
        self.runtime, self.begun = runtime, []
        self.add_applets(*call("busybox", "--list").stdout.decode().split())
        shutil.copy(REPORT, self.rootfs / "bin/report")
        (self.rootfs / "etc").mkdir()
        (self.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")

    def command(self, command, *args):
        return [self.runtime, *super().command(command, *args)[1:]]

    def exec_command(self, *words, options=()):
        """Return the argv of `exec`."""
        return [self.runtime, *self.globals(), "exec", *map(str, options), self.id, *words]

    def exec(self, *words, options=(), **streams):
        return call(*self.exec_command(*words, options=options), **streams)

    def sh(self, script, **streams):
        """Return the standard output of a script that succeeds."""
        result = self.exec("sh", "-c", script, **streams)
        assert (result.returncode, result.stderr) == (0, b""), result
        return result.stdout.decode()

    def begin(self, script, options=()):
        """Start a script with three pipes; return the process of `exec`."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = self.exec_command("sh", "-c", script, options=options)
        self.begun.append(subprocess.Popen(command, bufsize=0, **pipes))
        return self.begun[-1]

    def end_begun(self):
        """Kill what a test that failed has begun: it may wait for a reader for ever."""
        for process in self.begun:
            process.kill()
            process.wait()
        self.begun.clear()

    def detach(self, *words, options=(), **streams):
        """`exec --detach`, as a shim calls it; return the pid, which is our child."""
        pid_file = self.folder / f"pid-{uuid.uuid4().hex}"
        command = self.exec_command(*words, options=["--detach", "--pid-file", pid_file, *options])
        streams = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL), **streams}
        with subreaper():
            assert subprocess.run(command, timeout=120, **streams).returncode == 0
        return int(pid_file.read_text())

    @contextlib.contextmanager
    def terminal(self, *words):
        """`exec --detach` at a terminal of 33 rows and 101 columns; yield the pid, which is our child, and it."""
        env = ["PATH=/bin", "TERM=xterm", "PS1=ready> "]
        process = {"args": words, "cwd": "/", "env": env, "user": {"uid": 0, "gid": 0}, "terminal": True,
                   "consoleSize": {"height": 33, "width": 101}}  # fmt: skip
        (self.folder / "process.json").write_text(json.dumps(process))
        console = ConsoleSocket(self.folder / f"console-{uuid.uuid4().hex}.sock")
        pid = self.detach(options=["--process", self.folder / "process.json", "--console-socket", console.path])
        connection, _ = console.socket.accept()
        with connection:
            terminal = Terminal(socket.recv_fds(connection, 4096, 1)[1][0])
        yield pid, terminal
        os.close(terminal.fd)

    def refuse(self, *words, options=()):
        """Return what `exec` that must fail says in the log; it says the same on standard error, and nothing else."""
        result = self.exec(*words, options=options)
        assert (result.returncode, result.stdout, result.stderr.count(b"\n")) == (255, b"", 1), result
        message = self.last_log()["msg"]
        assert result.stderr.decode().removeprefix("runX: ") == message + "\n"
        return message

    def footprint(self):
        """Return all that dom0 has of the container that an exec may add to."""
        if self.runtime == "runc":
            return {}
        folder, xenstore, domid = self.root / self.id, runx.Xenstore(), self.domain()
        places = f"/local/domain/{domid}", f"/local/domain/0/backend/console/{domid}"
        return {
            "nodes": {path for place in places for path in nodes(xenstore, place)},
            "files": set(os.listdir(folder)),
            "descriptors": {(pid, len(os.listdir(f"/proc/{pid}/fd"))) for pid in (self.pid(), self.monitor())},
        }

    def check(self, before):
        """The footprint is as before."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.footprint() == before, "", 10)
        assert not {what: changed for what, now in self.footprint().items() if (changed := now ^ before[what])}


@contextlib.contextmanager
def subreaper():
    """Have orphans below us as children, as an engine's shim has: PR_SET_CHILD_SUBREAPER, <linux/prctl.h>."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


@contextlib.contextmanager
def stopped_file_server():
    """Meanwhile the guest gets no answer about its files."""
    (server,) = file_servers()
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def reaped(pid, seconds=60):
    """Return the status of a child when it has ended, negative for the signal that has ended it."""
    pidfd = os.pidfd_open(pid)
    wait_for(pidfd, seconds)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# answers what is asked in its own memory, and TERM with a status
PROCESS = """
    trap 'cp /dev/shm/asked /dev/shm/answered' USR1; trap 'exit 8' TERM; echo ready
    while :; do sleep 1000 & wait $!; done
"""


def process_spec():
    """A container such as Docker's: what exec has of it, and not of its own words, is not the default."""
    spec = report_config(
        args=["sh", "-c", PROCESS], env=["PATH=/bin", "OF=the container"], cwd="/tmp",
        capabilities={
            **dict.fromkeys(KINDS, [*DEFAULT_CAPABILITIES, "CAP_DAC_OVERRIDE"]), "inheritable": ["CAP_DAC_OVERRIDE"],
        },
        rlimits=[{"type": "RLIMIT_CORE", "soft": 1 << 20, "hard": 1 << 21}],
    )  # fmt: skip
    spec["hostname"] = "box"
    spec["linux"]["resources"] = {"pids": {"limit": 200}}
    spec["linux"]["seccomp"] = json.loads((DATA / "docker-20.10.24.json").read_text())["linux"]["seccomp"]
    return spec


@pytest.fixture(scope="class")
def boxes(tmp_path_factory):
    """A running container of each runtime, for all tests here; when they have ended, dom0 is as it was."""
    before, folder = dom0_state(), tmp_path_factory.mktemp("boxes")
    found = {runtime: Box(folder / runtime, runtime) for runtime in ("runc", "runX")}
    try:
        for box in found.values():
            box.started(process_spec())
            box.wait_for_output("ready\n")
            box.sh("true")  # the folder of requests stays
        yield found
    finally:
        for box in found.values():
            box.runx("delete", "--force")
            for pidfd in box.pidfds:
                os.close(pidfd)
    wait_until(lambda: not difference(before), "dom0 as it was before these tests", 10)


@pytest.fixture
def box(boxes):
    """One of them; afterwards dom0 has no more of it than before."""
    box = boxes[RUNTIME]
    before = box.footprint()
    yield box
    box.end_begun()
    box.check(before)


class TestOfARunningContainer:
    def test_output_and_status_come_back(self, box):
        for script, status in (("true", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -KILL $$", 137)):
            result = box.exec("sh", "-c", f"echo out; echo err >&2; {script}")
            assert (result.returncode, result.stdout, result.stderr) == (status, b"out\n", b"err\n"), script

    def test_much_passes_through_unchanged_with_its_end(self, box):
        data = os.urandom(100_000) + b"\x10\x04\x00\x11\x13\x03" * 100
        result = box.exec("sh", "-c", "cat; dd if=/dev/zero bs=1000 count=100 2>/dev/null; sha256sum >&2", input=data)
        assert (result.returncode, result.stdout) == (0, data + bytes(100_000))
        assert result.stderr.split()[0] == hashlib.sha256(b"").hexdigest().encode()

    @pytest.mark.parametrize("how", ["bare", "options", "file"])
    def test_the_process_is_as_it_should_be(self, boxes, how, tmp_path):
        """Of the container's own process come capabilities, limits and cwd, where exec does not give others."""
        options, limits, words = [], ["CORE"], ["report", "/dev/null"]
        if how == "options":
            options = ["--cwd", "/dev/shm", "--env", "OF=exec", "--env", "PATH=/bin:/sbin", "--user", "1000:1000"]
            options += ["--additional-gids", 5, "--additional-gids", 6, "--no-new-privs"]
            options += ["--cap", "CAP_SYS_TIME", "--cap", "CAP_DAC_OVERRIDE"]  # the latter is ambient, too
        elif how == "file":
            limits, kinds = ["CORE", "STACK", "FSIZE"], [*KINDS, "inheritable", "ambient"]
            process = {
                "args": words, "cwd": "/dev", "env": ["PATH=/bin", "EMPTY=", "HOME=/tmp", "QUOTED=\"' \\"],
                "user": {"uid": 1000, "gid": 1001, "additionalGids": [7]},
                "capabilities": dict.fromkeys(kinds, ["CAP_NET_BIND_SERVICE"]),
                "rlimits": [{"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": 1 << 24},
                            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                            {"type": "RLIMIT_FSIZE", "soft": 1 << 30, "hard": 1 << 31}],
            }  # fmt: skip
            (tmp_path / "process.json").write_text(json.dumps(process))
            options, words = ["--process", tmp_path / "process.json"], []
        reports = {}
        for runtime, box in boxes.items():
            result = box.exec(*words, options=options)
            assert (result.returncode, result.stderr) == (0, b""), result
            reports[runtime] = report(result.stdout)
            # it leads a session of its own, and is the first after those of the container: numbers differ
            assert reports[runtime].pop("session") == reports[runtime].pop("pid") > 1
        assert reports["runc"]["parent"] == 0 and reports["runc"]["seccomp"] == 2
        compare(reports["runc"], reports["runX"], *limits)

    def test_it_is_in_the_containers_namespaces_and_cgroup(self, box):
        kinds = "cgroup ipc mnt net pid uts"
        script = f"for kind in {kinds}; do for pid in 1 self; do readlink /proc/$pid/ns/$kind; done; done"
        links = box.sh(script).split()
        assert len(set(links)) == 6 and links[::2] == links[1::2], links
        first, second, *rest = box.sh("cat /proc/1/cgroup /proc/self/cgroup; hostname; ps -o pid,comm").splitlines()
        name, _, *processes = [line.split() for line in rest]
        assert first == second and name == ["box"] and processes[0] == ["1", "sh"]
        assert {command for _, command in processes} == {"sh", "sleep", "ps"}  # and nothing of the VM's own
        # what it writes where only the container is, the container's process reads, and back
        script = """
            echo "of exec" >/dev/shm/asked; kill -USR1 1; until [ -s /dev/shm/answered ]; do sleep 0.1; done
            cat /dev/shm/answered; rm /dev/shm/*; echo "for dom0" >/tmp/file
        """
        assert box.sh(script) == "of exec\n"
        assert (box.rootfs / "tmp/file").read_text() == "for dom0\n"

    def test_arguments_and_environment_are_as_long_as_the_kernel_takes_them(self, box, tmp_path):
        """A quarter of the stack's limit, which is 8 MiB where nobody sets another."""

        def execute(size, *limits):
            env = ["PATH=/bin", "HOME=/", *(f"E{number}={'x' * 100_000}" for number in range(size // 100_000))]
            process = {"args": ["sh", "-c", "sha256sum </proc/$$/environ"], "cwd": "/", "env": env,
                       "user": {"uid": 0, "gid": 0}, "rlimits": limits}  # fmt: skip
            (tmp_path / "process.json").write_text(json.dumps(process))
            return box.exec(options=["--process", tmp_path / "process.json"]), "\0".join([*env, ""])

        result, environment = execute(1_500_000)
        assert (result.returncode, result.stderr) == (0, b""), result
        assert result.stdout.decode().split()[0] == hashlib.sha256(environment.encode()).hexdigest()
        result, _ = execute(500_000, {"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": 1 << 20})
        assert (result.returncode, result.stdout) == (255, b"") and b"argument list too long" in result.stderr, result

    def test_what_cannot_be_executed_is_told_with_the_reason(self, box):
        (box.rootfs / "plain").write_text("x")
        failed = "exec failed: unable to start container process: "
        for word, reason in (
            ("nosuch", "executable file not found in $PATH"), ("/no/such", "stat /no/such: no such file or directory"),
            ("./no", "stat ./no: no such file or directory"), ("/plain", "permission denied"),
            ("/etc", "permission denied"),
        ):  # fmt: skip
            assert box.refuse(word) == f'{failed}exec: "{word}": {reason}'
        for cwd, reason in (("/nosuch", "no such file or directory"), ("/plain/x", "not a directory")):
            message = box.refuse("true", options=["--cwd", cwd])
            assert message == f'{failed}chdir to cwd ("{cwd}") set in config.json failed: {reason}'
        if box.runtime == "runX":  # of which runc 1.1 has another status, and newer ones this
            (box.rootfs / "broken").write_text("\x7fELF")
            (box.rootfs / "broken").chmod(0o755)
            assert box.refuse("/broken") == f'{failed}exec: "/broken": exec format error'

    def test_no_program_is_outside_of_the_rootfs(self, box):
        """Links of /proc lead to what init has open: its own busybox is no file of the container's."""
        # in no folder of the container's, so that it is looked for in all of these
        path = ":".join(f"/proc/self/fd/{fd}/bin" for fd in range(3, 32))
        result = box.exec("busybox", "echo", "shown", options=["--env", f"PATH={path}"])
        assert (result.returncode, result.stdout) == (255, b""), result

    def test_what_makes_no_sense_is_refused(self, box, tmp_path):
        assert "cannot use console socket if" in box.refuse("true", options=["--console-socket", tmp_path / "s"])
        assert "cannot allocate tty if" in box.refuse("true", options=["--detach", "--tty"])
        assert "missing.json" in box.refuse(options=["--process", tmp_path / "missing.json"])
        box.refuse()
        box.refuse("true", options=["--user", "no number"])
        box.refuse("true", options=["--cwd", "relative"])
        assert not list(box.folder.glob("pid-*"))

    def test_a_terminal_has_its_size_at_once_and_after_each_change(self, box):
        prompt = b"ready> "
        with box.terminal("sh", "-i") as (pid, shell):
            shell.expect(prompt)
            shell.type(b"stty size; tty; test -t 2 && echo error too\n")
            size, tty, error = shell.expect(prompt).split(b"\r\n")[1:4]
            assert (size, tty[:9], error) == (b"33 101", b"/dev/pts/", b"error too")
            for rows in (40, 41):
                shell.resize(rows, 121)
                wait_until(
                    lambda rows=rows: follows(shell, b"stty size\n", b"%d 121\r\n" % rows), "the new window size"
                )
            shell.interrupt(prompt)
            shell.type(b"echo status $?; exit 5\n")
            shell.expect(b"status 130\r\n")
            assert shell.rest() == b"" and reaped(pid) == 5

    def test_a_terminal_that_nothing_has_open_for_a_while_is_served_again(self, box):
        script = """
            tty=$(tty)
            for n in 1 2; do exec <&- >&- 2>&-; sleep 1; exec <$tty >$tty 2>&1; echo again $n; done
            while read -r line; do stty size; done; exit 5
        """
        with box.terminal("sh", "-c", script) as (pid, terminal):
            terminal.expect(b"again 1\r\n")
            terminal.expect(b"again 2\r\n")
            terminal.resize(40, 121)
            wait_until(lambda: follows(terminal, b"\n", b"40 121\r\n"), "the new window size")
            terminal.type(b"\x04")
            terminal.rest()
            assert reaped(pid) == 5

    def test_at_our_own_terminal(self, box):
        command = box.exec_command("sh", "-i", options=["--tty", "--env", OUR_PS1, "--env", "PATH=/bin"])
        assert check_at_a_terminal(*command) == 7

    def test_the_pid_of_one_that_is_detached_is_the_process_to_its_parent(self, box):
        reader, writer = os.pipe()
        script = "trap 'echo usr1' USR1; trap 'echo term; exit 6' TERM; echo ready; while :; do sleep 9 & wait $!; done"
        pid = box.detach("sh", "-c", script, stdout=writer)
        os.close(writer)
        with open(reader, "rb", buffering=0) as output:
            assert output.readline() == b"ready\n"
            for number, line in ((signal.SIGUSR1, b"usr1\n"), (signal.SIGUSR1, b"usr1\n"), (signal.SIGTERM, b"term\n")):
                os.kill(pid, number)
                assert select.select([output], [], [], 60)[0] and output.readline() == line
            assert reaped(pid) == 6
        assert reaped(box.detach("sh", "-c", "exit 4")) == 4

    def test_streams_that_the_process_closes_end_while_it_lives(self, box):
        script = "trap 'exit 9' TERM; exec >&-; read -r line; echo $line >&2; exec <&-; echo closed >&2; sleep 9 & wait"
        (to_read, to_type), (out, to_out), (error, to_error) = os.pipe(), os.pipe(), os.pipe()
        pid = box.detach("sh", "-c", script, stdin=to_read, stdout=to_out, stderr=to_error)
        for fd in (to_read, to_out, to_error):
            os.close(fd)
        with open(to_type, "wb", 0) as stdin, open(out, "rb", 0) as stdout, open(error, "rb", 0) as stderr:
            assert stdout.read() == b""
            stdin.write(b"typed\n")
            assert [stderr.readline(), stderr.readline()] == [b"typed\n", b"closed\n"]
            os.kill(pid, signal.SIGTERM)
            assert reaped(pid) == 9

    def test_a_stream_that_the_process_closes_ends_while_nobody_reads_the_other_one(self, box):
        process = box.begin("head -c 200000 /dev/zero >&2 & read -r _; exec >&-; wait; exit 3")
        writer = os.open(f"/proc/self/fd/{process.stderr.fileno()}", os.O_WRONLY)
        wait_until(lambda: not select.select([], [writer], [], 0)[1], "the pipe of standard error to be full")
        os.close(writer)
        process.stdin.write(b"\n")
        assert select.select([process.stdout], [], [], 60)[0] and process.stdout.read() == b""
        assert (len(process.stderr.read()), process.wait()) == (200_000, 3)

    def test_sigkill_of_the_pid_before_the_program_runs_ends_the_process(self, box):
        """Nobody answers the kernel that wants to read the program: the process is there, and not told to be."""
        if box.runtime != "runX":
            pytest.skip("looks at runX's VM")
        (box.rootfs / "unread").mkdir()
        shutil.copy(box.rootfs / "bin/busybox", box.rootfs / "unread/sleep")
        look = box.begin("cd /proc; while read -r _; do echo [0-9]*; done")

        def pids():
            look.stdin.write(b"\n")
            return set(look.stdout.readline().split())

        before, folder = pids(), box.root / box.id
        others = set(folder.glob("process-*"))
        with stopped_file_server():
            box.begun.append(subprocess.Popen(box.exec_command("/unread/sleep", "4322"), stderr=subprocess.DEVNULL))
            wait_until(lambda: pids() - before, "the process to be there")
            (process,), (carrier,) = pids() - before, set(folder.glob("process-*")) - others
            os.kill(int(carrier.read_text().split()[0]), signal.SIGKILL)
            wait_in(folder, lambda: not carrier.exists(), "the monitor to forget it")
        wait_until(lambda: process not in pids(), "the process to be killed")
        look.communicate()

    def test_what_it_leaves_running_lives_on(self, box):
        mine = " >/dev/null 2>&1" if box.runtime == "runc" else ""  # runc waits for the end of the streams
        child = box.sh(f"sleep 4320{mine} & echo $!").strip()
        assert "sleep 4320" in box.sh("ps -o args")
        box.sh(f"kill {child}")
        wait_until(lambda: "sleep 4320" not in box.sh("ps -o args"), "the child to end")

    def test_what_it_leaves_running_is_heard_for_a_while(self, box):
        """Such as the tee that a shell writes to, which has more to do when the shell has ended."""
        script = """
            mkfifo /tmp/heard
            {
                while read -r word; do kept=$word; done; n=0; while [ $n -lt 3000 ]; do n=$((n + 1)); done
                echo $kept; echo error >&2
            } </tmp/heard &
            exec >/tmp/heard; echo hello; exit 3
        """
        result = box.exec("sh", "-c", script)
        assert (result.returncode, result.stdout, result.stderr) == (3, b"hello\n", b"error\n"), result

    def test_one_whose_output_nobody_reads_holds_up_no_other(self, box):
        blocked = box.begin("dd if=/dev/zero bs=1000 count=500 2>/dev/null; exit 7")
        assert blocked.stdout.read(1) == b"\0"  # of more a pipe may give less
        assert box.sh("echo through") == "through\n"
        assert (len(blocked.communicate()[0]), blocked.returncode) == (499_999, 7)

    def test_sixteen_at_once(self, box):
        script = "echo begun; read -r word; echo $word; echo error $word >&2; exit $word"
        several = [box.begin(script) for _ in range(16)]
        for each in several:
            assert each.stdout.readline() == b"begun\n"
        for number, each in enumerate(several):
            each.stdin.write(b"%d\n" % number)
        for number, each in enumerate(several):
            assert each.communicate(timeout=60) == (b"%d\n" % number, b"error %d\n" % number)
            assert each.returncode == number

    def test_sigkill_of_the_pid_ends_the_process(self, box):
        pid = box.detach("sh", "-c", "exec sleep 4321")
        assert "sleep 4321" in box.sh("ps -o args")
        os.kill(pid, signal.SIGKILL)
        assert reaped(pid) == -signal.SIGKILL
        wait_until(lambda: "sleep 4321" not in box.sh("ps -o args"), "the process to be killed")


# ---- others, of containers of their own


@pytest.fixture
def own(clean_dom0, tmp_path):
    """A container that is not created yet."""
    yield from closing(Box(tmp_path / "own", RUNTIME))


def test_it_ends_with_the_container_and_only_a_running_one_takes_it(own):
    assert "does not exist" in own.refuse("true")
    spec = in_memory(config("sh", "-c", PROCESS))
    spec["linux"] = {"namespaces": namespaces()}
    pidfd = own.created(spec)
    if own.runtime == "runX":  # under runc it runs beside runc's own init
        assert "cannot exec in a container that is not started" in own.refuse("true")
    own.succeed("start")
    own.wait_for_output("ready\n")
    before = own.footprint()
    own.succeed("pause")
    assert own.refuse("true") == "exec failed: cannot exec in a paused container (use --ignore-paused to override)"
    own.check(before)
    # one that ignores the pause is executed when that ends
    waiting = own.begin("echo begun; exit 4", options=["--ignore-paused"])
    if own.runtime == "runX":  # the VM has been asked
        request = f"/local/domain/{own.domain()}/data/request/run-1"
        wait_in_xenstore(request, lambda: runx.Xenstore().read(request), "the request")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    own.succeed("resume")
    assert (waiting.communicate(timeout=60), waiting.returncode) == ((b"begun\n", b""), 4)
    attached = own.begin("echo begun; exec sleep 1000")
    detached = own.detach("sleep", "1000")
    assert attached.stdout.readline() == b"begun\n"
    own.succeed("kill", "KILL")
    assert attached.wait(60) == 137
    assert reaped(detached) in (137, -signal.SIGKILL)
    wait_for(pidfd)  # no namespace ends before all of its processes are reaped
    wait_until(lambda: own.state()["status"] == "stopped", "the container to be stopped")  # runc asks its cgroup
    assert own.refuse("true") == "exec failed: cannot exec in a stopped container"


HEADLESS = """
import _thread, ctypes, os

def live():
    while open("/proc/self/stat").read().split()[2] != "Z":
        pass
    os.write(1, b"headless\\n")
    os.read(os.pipe()[0], 1)

_thread.start_new_thread(live, ())
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.skipif(RUNTIME != "runX", reason="runc calls such a container stopped")
def test_a_process_without_its_first_thread_has_no_namespaces_to_enter_and_takes_signals_for_all(own):
    spec = config("python3", "-IS", "-c", HEADLESS, env=["PATH=/usr/bin"])
    spec["mounts"] += PROGRAM_MOUNTS
    pidfd = own.started(spec)
    own.wait_for_output("headless\n")
    message = own.refuse("sh", "-c", "cat /container/config", options=["--env", "PATH=/bin"])  # init's root has both
    reason = "enter the container's ns/cgroup: No such file or directory"
    assert message == f"exec failed: unable to start container process: {reason}"
    own.succeed("kill", "--all", "TERM")
    wait_for(pidfd)


REFS = ("ring-ref", "port")  # of a console: its grant and its event channel


@pytest.mark.skipif(RUNTIME != "runX", reason="looks at runX's VM")
def test_many_one_after_the_other_leave_nothing(own):
    """This VM has one pid namespace, so that an exec sees also what serves it."""
    spec = in_memory(config("sleep", "1000"))
    spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
    own.started(spec)

    def once(number):
        result = own.exec("sh", "-c", f"read -r line; echo $line; exit {number % 100}", input=b"typed\n")
        assert (result.returncode, result.stdout, result.stderr) == (number % 100, b"typed\n", b""), result

    def looks():
        """What the VM has, and the highest grants and event channels of an exec's two consoles."""
        script = """
            sed 's/.* //' /proc/interrupts | sort; ps -o args | grep -v '\\['; ls /sys/bus/xen/devices /sys/class/tty
            mount; echo end; read -r _
        """
        lines, consoles, xenstore = [], f"/local/domain/{own.domain()}/device/console", runx.Xenstore()
        with own.begin(script) as process:
            while (line := process.stdout.readline()) != b"end\n":
                assert line, process.stderr.read()
                lines.append(line)
            refs = [[int(xenstore.read(f"{consoles}/{number}/{key}")) for number in (3, 4)] for key in REFS]
            process.communicate(b"\n")
        return lines, list(map(max, refs))

    for number in range(4):  # what is made once
        once(number)
    lines, refs = looks()
    folder = own.root / own.id
    wait_in(folder, lambda: not list(folder.glob("process-*")), "no exec to be left")
    before = own.footprint()
    for number in range(MANY):
        once(number)
    lines_after, refs_after = looks()
    assert lines_after == lines
    assert all(after < ref + 8 for ref, after in zip(refs, refs_after)), (refs, refs_after)
    own.check(before)


# ---- engines


def check_exec(command, name, terminal="-it", input="-i"):
    """`exec` of an engine: its streams, its status, its terminal, and what cannot be executed."""
    script = "cat; echo err >&2; exit 3"
    result = call(*command, *([input] if input else []), *name, "sh", "-c", script, input=b"in\n")
    assert (result.returncode, result.stdout, result.stderr) == (3, b"in\n", b"err\n"), result
    result = call(*command, *name, "nosuch")
    words = (result.stdout + result.stderr).decode()
    assert result.returncode != 0 and 'exec: "nosuch": executable file not found in $PATH' in words, result
    assert check_at_a_terminal(*command, terminal, *name, "sh", "-i") == 7


@pytest.mark.main_path
def test_a_task_of_containerds_is_listed_executes_more_and_is_paused_and_resumed(clean_dom0):
    name = f"test-{uuid.uuid4().hex[:8]}"
    options = ["--runc-binary=/usr/sbin/runX", "--annotation", "org.runx.rootfs=ramdisk"] if RUNTIME == "runX" else []
    assert ctr("run", "-d", "--env", OUR_PS1, *options, IMAGE, name, "sh", "-c", PROCESS).returncode == 0
    try:
        pid, status = task(name)
        assert status == "RUNNING"
        assert ctr("task", "ps", name).stdout.split()[:3] == [b"PID", b"INFO", pid.encode()]
        command = ["ctr", "task", "exec", "--exec-id", "one"]
        check_exec(command, [name], "-t", None)
        script = "trap 'exit 4' TERM; echo begun; while :; do sleep 9 & wait $!; done"
        with subprocess.Popen([*command, name, "sh", "-c", script], stdout=subprocess.PIPE) as running:
            assert running.stdout.readline() == b"begun\n"
            assert len(ctr("task", "ps", name).stdout.splitlines()) > 2
            assert ctr("task", "kill", "--exec-id", "one", name).returncode == 0
            assert running.wait(60) == 4
        assert ctr("task", "pause", name).returncode == 0
        assert task(name) == (pid, "PAUSED")
        assert ctr("task", "kill", name).returncode == 0  # is heard when it goes on
        assert ctr("task", "resume", name).returncode == 0
        assert exit_status(name) == 8
    finally:
        ctr("task", "rm", "--force", name)
        ctr("container", "rm", name)
