# SPDX-License-Identifier: Apache-2.0
"""Standard input, output and error; and process.terminal, as an engine and a person at it see it."""

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import uuid

import pytest
from conftest import (
    DEVPTS,
    IMAGE,
    ConsoleSocket,
    Terminal,
    call,
    config,
    in_memory,
    shim_pid,
    wait_for,
    wait_in,
    wait_until,
    xl,
)

pytestmark = pytest.mark.usefixtures("clean_dom0")


@pytest.mark.main_path
def test_run_joins_its_own_streams_and_returns_the_exit_status_and_all_output(bundle):
    # what runs beside the process ends with it, and what is written in the last instant is delivered
    script = """
        [ -t 0 ] || echo pipe; cat; cat; echo end; echo err >&2
        sleep 1000 & sleep 1000 & dd if=/dev/zero bs=1000 count=100 2>/dev/null; echo last; exit 5
    """
    result = bundle.run(config("sh", "-c", script), input=b"1\x10\x04\x00\x11\x132")
    assert (result.returncode, result.stderr) == (5, b"err\n"), result
    assert result.stdout == b"pipe\n1\x10\x04\x00\x11\x132end\n" + b"\0" * 100000 + b"last\n"
    assert not bundle.root.joinpath(bundle.id).exists()


WRITER = """
    line=$(printf %01023d 0) count=0
    while [ $count -lt 256 ]; do
        echo $line; count=$((count + 1)); [ "$seen" ] || [ ! -e /tmp/reading ] || seen=$count
    done
    echo $seen >&2
"""


def test_a_slow_reader_loses_nothing_and_holds_the_guest_back(bundle):
    """The guest tells how many KiB it had written when the reader began."""
    bundle.write_config(config("sh", "-c", WRITER))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(bundle.command("run"), bufsize=0, **pipes) as running:
        looks = []

        def look():
            """(bytes in the pipe, whether the guest waits, the processor time it has had in seconds)"""
            size = fcntl.ioctl(running.stdout, termios.FIONREAD, bytes(4))
            *_, letters, seconds = xl("list", str(bundle.domain())).splitlines()[-1].split()
            return int.from_bytes(size, sys.byteorder), letters[1] == "b", float(seconds)

        def has_gone_as_far_as_it_can():
            """It only waits, or has had half a second for more than it was let."""
            looks.append(look())
            if looks[-1][0] < 48 << 10:  # a pipe of 64 KiB may have pages that are not full
                looks.clear()
                return False
            rests = len(looks) > 4 and len({*looks[-5:]}) == 1 and looks[-1][1]
            return rests or looks[-1][2] - looks[0][2] >= 0.5

        wait_until(lambda: bundle.domain() is not None, "the domain")
        wait_until(has_gone_as_far_as_it_can, "the guest to write what it can", 60)
        (bundle.rootfs / "tmp/reading").touch()
        total = 0
        while chunk := os.read(running.stdout.fileno(), 65536):
            total += len(chunk)
        assert (total, running.wait()) == (256 << 10, 0)
        # pipes of 64 KiB on both sides, the ring and the monitor with 2 KiB each, and the guest's init and its terminal
        assert 48 <= int(running.stderr.read()) <= 2 * 64 + 2 * 2 + 12


def test_the_process_gets_sigpipe_when_the_reader_of_its_output_has_gone(bundle):
    script = "dd if=/dev/zero bs=1024 count=1000000 2>/dev/null; echo $? >&2; exit 6"
    bundle.write_config(in_memory(config("sh", "-c", script)))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(bundle.command("run"), bufsize=0, **pipes) as running:
        assert running.stdout.read(1) == b"\0"
        running.stdout.close()
        assert (running.wait(60), running.stderr.read()) == (6, b"%d\n" % (128 + signal.SIGPIPE))


def test_streams_that_the_process_closes_end_while_it_lives(bundle):
    script = "trap exit TERM; echo out; exec >&-; read -r line; echo $line >&2; exec <&-; sleep 1000 & wait"
    bundle.write_config(in_memory(config("sh", "-c", script)))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(bundle.command("create", "--pid-file", str(bundle.pid_file)), bufsize=0, **pipes) as creating:
        assert creating.wait() == 0
        bundle.pidfds.append(os.pidfd_open(bundle.pid()))
        bundle.succeed("start")
        assert creating.stdout.read() == b"out\n"
        creating.stdin.write(b"typed\n")
        assert creating.stderr.readline() == b"typed\n"
        with contextlib.suppress(BrokenPipeError):
            creating.stdin.write(b"nobody reads this")
        hang_up = select.poll()
        hang_up.register(creating.stdin, 0)
        assert hang_up.poll(60_000), "standard input still has a reader"
        bundle.succeed("kill", "TERM")
        wait_for(bundle.pidfds[0])
        assert creating.stderr.read() == b""


def test_sigkill_ends_a_container_whose_output_nobody_reads(bundle):
    # what the full pipe does not take is in the console's ring: the VM itself can end
    bundle.write_config(in_memory(config("sh", "-c", "echo unread; echo written >&2; sleep 1000")))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = bundle.command("create", "--pid-file", str(bundle.pid_file))
    streams = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, bufsize=0, **streams) as creating:
        os.close(writer)
        assert creating.wait() == 0
        bundle.pidfds.append(os.pidfd_open(bundle.pid()))
        bundle.succeed("start")
        assert creating.stderr.readline() == b"written\n"
        bundle.succeed("kill", "KILL")
        wait_for(bundle.pidfds[0])
    os.close(reader)


# ---- the terminal

PROMPT = b"ready> "


def terminal_config(*args):
    spec = config(*args, terminal=True, env=["PATH=/bin", "TERM=xterm", "PS1=ready> "])
    spec["process"]["consoleSize"] = {"height": 33, "width": 101}
    spec["mounts"].append(DEVPTS)
    return spec


@pytest.fixture
def terminal(bundle, tmp_path):
    """A function that starts a container with a terminal; it returns the Terminal and a pidfd of the container."""
    opened = []

    def start(spec):
        console_socket = ConsoleSocket(tmp_path / "console.sock")
        pidfd = bundle.created(spec, "--console-socket", console_socket.path)
        terminal = console_socket.receive()
        opened.append(terminal.fd)
        bundle.succeed("start")
        return terminal, pidfd

    yield start
    for fd in opened:
        os.close(fd)


def test_a_shell_has_all_that_a_terminal_has(bundle, terminal):
    shell, pidfd = terminal(in_memory(terminal_config("sh", "-i")))

    def command(text):
        shell.type(text + b"\n")
        shell.expect(text + b"\r\n")  # the echo
        return shell.expect(PROMPT)

    shell.expect(PROMPT)
    assert command(b"stty size").split(b"\r\n")[0] == b"33 101"
    assert command(b"tty").startswith(b"/dev/pts/0\r\n")
    assert command(b"echo to the tty >/dev/tty").startswith(b"to the tty\r\n")
    assert command(b"echo to the console >/dev/console").startswith(b"to the console\r\n")
    # two resizes at once: the last one counts
    shell.resize(40, 120)
    shell.resize(41, 121)
    wait_until(lambda: follows(shell, b"stty size\n", b"41 121\r\n"), "the new window size")
    shell.expect(PROMPT)
    # job control
    shell.type(b"sleep 1000\n")
    shell.expect(b"sleep 1000\r\n")
    wait_until(lambda: follows(shell, b"\x1a", b"Stopped"), "Ctrl-Z to stop it")
    shell.expect(PROMPT)
    shell.type(b"fg\n")
    shell.expect(b"fg\r\nsleep 1000\r\n")
    shell.type(b"\x03")
    shell.expect(PROMPT)
    assert command(b"echo status $?").startswith(b"status 130\r\n")
    shell.type(b"vi /tmp/file\n")
    shell.expect(b"- /tmp/file")
    shell.type(b"iwritten in vi")
    shell.expect(b"I /tmp/file")
    shell.type(b"\x1b")
    shell.expect(b"- /tmp/file")  # Escape and what is typed at once with it would be a key
    shell.type(b":wq\n")
    shell.expect(PROMPT)
    assert command(b"cat /tmp/file").startswith(b"written in vi\r\n")
    # one that has closed all of it for a while
    shell.type(b"exec sh -c 'exec <&- >&- 2>&-; sleep 1; exec </dev/console >/dev/console 2>&1; exec sh -i'\n")
    shell.expect(PROMPT)
    shell.type(b"echo last words; exit 5\n")
    shell.expect(b"exit 5\r\n")
    wait_for(pidfd)
    assert shell.rest().startswith(b"last words\r\n")
    assert bundle.state()["status"] == "stopped"


def follows(shell, key, text):
    """Whether text follows key: a shell may take a key before it has started what that is meant for."""
    shell.type(key)
    try:
        shell.expect(text, 2)
    except AssertionError:
        return False
    return True


def test_the_engine_hanging_up_is_a_hang_up_in_the_container(bundle, terminal):
    script = "trap 'echo hung up >/tmp/hup; exit 3' HUP; echo set; while :; do sleep 1000 & wait $!; done"
    shell, pidfd = terminal(terminal_config("sh", "-c", script))
    shell.expect(b"set\r\n")
    shell.type(b"x" * 1000)  # what nobody has read does not hold the hang-up back
    os.dup2(os.open("/dev/null", os.O_RDWR), shell.fd)  # closes it, and the number stays the fixture's
    wait_for(pidfd)
    assert (bundle.rootfs / "tmp/hup").read_text() == "hung up\n"


def test_a_signal_ends_the_wait_for_a_terminal_that_nobody_reads(bundle, terminal):
    """The VM's only processor must not wait for it for ever."""
    script = """
        dd if=/dev/zero bs=4096 & writer=$! times=0
        while [ $times -lt 30 ]; do  # it is in write(2), and stays there
            if busybox grep -q -e '^1 ' -e '^64 ' /proc/$writer/syscall; then times=$((times+1)); else times=0; fi
        done
        stty -echo </dev/tty & waiter=$!
        until busybox grep -q -e 0x5403 -e 0x402c542c /proc/$waiter/syscall; do :; done  # TCSETSW or TCSETSW2
        exec 2>/dev/null  # for the shell may say there that it was terminated, and nobody reads that
        kill $waiter
        wait $waiter
        echo $? >/tmp/status
    """
    _, pidfd = terminal(terminal_config("sh", "-c", script))
    status = bundle.rootfs / "tmp/status"
    wait_in(status.parent, lambda: status.exists() and status.read_bytes(), "the end of what waits")
    assert status.read_bytes() == b"143\n"
    bundle.succeed("kill", "KILL")
    wait_for(pidfd)


def test_a_console_socket_is_there_when_and_only_when_needed(bundle, tmp_path):
    bundle.write_config(terminal_config("true"))
    assert b"cannot allocate tty if runX will detach without setting console socket" in bundle.create().stderr
    missing = str(tmp_path / "missing.sock")
    result = bundle.create("--console-socket", missing)
    assert result.returncode == 1 and missing.encode() in result.stderr
    bundle.write_config(config("true"))
    assert b"cannot use console socket" in bundle.create("--console-socket", missing).stderr
    assert not bundle.root.exists() or not list(bundle.root.iterdir())


def spawn(*argv):
    """Runs a command at a terminal of its own, of 24 rows and 80 columns; returns its pid and the Terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp(argv[0], argv)
    terminal = Terminal(fd)
    terminal.resize(24, 80)
    return pid, terminal


OUR_PS1 = "PS1=ready>"  # without a blank: ctr of containerd 2 takes it off


def check_at_a_terminal(*argv):
    """argv runs `sh -i` in a container at our terminal, with OUR_PS1."""
    pid, shell = spawn(*argv)
    shell.expect(b"ready>")

    def resized(rows):
        for columns in (82, 81):  # anew: an engine's command may look for changes only some time after the prompt
            shell.resize(rows, columns)
        # not the echo before it: a shell writes its line anew when the size changes
        return follows(shell, b"stty size\n", b"%d 81\r" % rows)

    for rows in (25, 26):
        wait_until(lambda rows=rows: resized(rows), "the new window size")
    shell.interrupt(b"ready>")
    shell.type(b"exit $(($? - 123))\n")
    shell.rest()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_terminal_shows_has_no_carriage_returns_in_a_pipe(bundle):
    result = bundle.run(in_memory(terminal_config("sh", "-c", "echo one; exec tty")))
    assert (result.returncode, result.stdout) == (0, b"one\n/dev/pts/0\n"), result


def test_run_joins_its_own_terminal_to_the_containers(bundle):
    spec = in_memory(terminal_config("sh", "-i"))
    spec["process"]["env"] = ["PATH=/bin", OUR_PS1]
    bundle.write_config(spec)
    assert check_at_a_terminal(*bundle.command("run")) == 7


@pytest.mark.main_path
@pytest.mark.skipif(not shutil.which("ctr"), reason="needs containerd's ctr")
def test_ctr_run_with_a_terminal():
    name = f"test-{uuid.uuid4().hex[:8]}"
    options = ["--rm", "-t", "--runc-binary=/usr/sbin/runX", "--env", OUR_PS1]
    assert check_at_a_terminal("ctr", "run", *options, IMAGE, name, "sh", "-i") == 7


@pytest.mark.skipif(not shutil.which("ctr"), reason="needs containerd's ctr")
def test_a_shim_that_is_killed_while_a_hook_runs_leaves_nothing(bundle, tmp_path):
    # the terminal hangs up and create is killed; the hook, which is neither's, is left to end by itself
    spec = terminal_config("sh")
    spec["root"]["path"] = str(bundle.rootfs)
    hook, stop = f"echo $$ >{tmp_path}/hook; exec sleep 1000", f"echo stopped >>{tmp_path}/poststop"
    spec["hooks"] = {
        "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook], "env": ["PATH=/bin"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", stop]}],
    }
    bundle.write_config(spec)
    options = ["-t", "--runc-binary=/usr/sbin/runX", "--config", str(bundle.folder / "config.json")]
    pid, engine = spawn("ctr", "run", *options, bundle.id)
    pid_file = tmp_path / "hook"
    wait_in(tmp_path, lambda: pid_file.exists() and pid_file.read_text(), "the hook to run")
    os.kill(shim_pid(bundle.id), signal.SIGKILL)
    engine.rest()
    os.waitpid(pid, 0)
    folder = pathlib.Path(f"/run/containerd/runc/default/{bundle.id}")
    wait_until(lambda: not folder.exists(), "the state folder to go")
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    call("ctr", "task", "rm", "--force", bundle.id)
    call("ctr", "container", "rm", bundle.id)
    assert (tmp_path / "poststop").read_text() == "stopped\n"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mounts": [{"destination": "/x", "type": "tmpfs", "options": ["no=1"]}]}, "mount /x: Invalid argument"),
        ({"cwd": "/file/x"}, 'chdir to cwd ("/file/x") set in config.json failed: not a directory'),
        ({"args": ["/broken"]}, 'exec: "/broken": exec format error'),
    ],
)
def test_why_a_process_cannot_be_executed_is_the_error_of_start_and_its_terminal_hangs_up(
    bundle, tmp_path, change, reason
):
    """Before the terminal is there, and with it."""
    (bundle.rootfs / "file").touch()
    (bundle.rootfs / "broken").write_text("\x7fELF")
    (bundle.rootfs / "broken").chmod(0o755)
    spec = in_memory(terminal_config("true"))
    spec["mounts"] = change.get("mounts", []) + spec["mounts"]
    spec["process"].update({key: value for key, value in change.items() if key != "mounts"})
    console_socket = ConsoleSocket(tmp_path / "console.sock")
    pidfd = bundle.created(spec, "--console-socket", console_socket.path)
    screen = console_socket.receive()
    assert bundle.refused("start") == f"runX: unable to start container process: {reason}\n"
    wait_for(pidfd)
    assert (screen.rest(), json.dumps(reason)[1:-1] in bundle.log.read_text()) == (b"", True)
    os.close(screen.fd)
