"""process.terminal: the container's terminal as an engine and a person at it see it."""

import os
import pathlib
import pty
import shutil
import signal
import uuid

import pytest
from conftest import DEVPTS, IMAGE, ConsoleSocket, Terminal, call, config, in_memory, shim_pid, wait_for, wait_until

pytestmark = pytest.mark.usefixtures("clean_dom0")

PROMPT = b"ready> "


def terminal_config(*args):
    spec = config(*args, terminal=True, env=["PATH=/bin", "TERM=xterm", "PS1=ready> "])
    spec["process"]["consoleSize"] = {"height": 33, "width": 101}
    spec["mounts"].append(DEVPTS)
    return spec


@pytest.fixture
def terminal(bundle, tmp_path):
    """A function that starts a container with a terminal; returns the Terminal and a pidfd of the monitor."""
    opened = []

    def start(*args):
        bundle.write_config(terminal_config(*args))
        console_socket = ConsoleSocket(tmp_path / "console.sock")
        pidfd = bundle.created("--console-socket", console_socket.path)
        terminal = console_socket.receive()
        opened.append(terminal.fd)
        assert bundle.runx("start", bundle.id).returncode == 0
        return terminal, pidfd

    yield start
    for fd in opened:
        os.close(fd)


def test_a_shell_has_all_that_a_terminal_has(bundle, terminal):
    shell, pidfd = terminal("sh", "-i")

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
    assert (bundle.rootfs / "tmp/file").read_text() == "written in vi\n"
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
    shell, pidfd = terminal(
        "sh", "-c", "trap 'echo hung up >/tmp/hup; exit 3' HUP; echo set; while :; do sleep 0.1; done"
    )
    shell.expect(b"set\r\n")
    shell.type(b"x" * 1000)  # what nobody has read does not hold the hang-up back
    os.dup2(os.open("/dev/null", os.O_RDWR), shell.fd)  # closes it, and the number stays the fixture's
    wait_for(pidfd)
    assert (bundle.rootfs / "tmp/hup").read_text() == "hung up\n"


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


def check_at_a_terminal(*argv):
    """argv runs `sh -i` in a container at our terminal."""
    pid, shell = spawn(*argv)
    shell.expect(b"# ")
    for rows in (25, 26):
        shell.resize(rows, 81)
        size = b"%d 81\r" % rows  # not the echo before it: a shell writes its line anew when the size changes
        wait_until(lambda size=size: follows(shell, b"stty size\n", size), "the new window size")
    shell.type(b"sleep 1000\n")
    shell.expect(b"sleep 1000\r")
    wait_until(lambda: follows(shell, b"\x03", b"# "), "Ctrl-C to end it")
    shell.type(b"exit 7\n")
    shell.rest()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_run_joins_its_own_terminal_to_the_containers(bundle):
    spec = in_memory(terminal_config("sh", "-i"))
    spec["process"]["env"] = ["PATH=/bin", "PS1=# "]
    bundle.write_config(spec)
    assert check_at_a_terminal(*bundle.command("run", "--bundle", str(bundle.folder), bundle.id)) == 7


@pytest.mark.skipif(not shutil.which("ctr"), reason="needs containerd's ctr")
def test_ctr_run_with_a_terminal():
    name = f"test-{uuid.uuid4().hex[:8]}"
    options = ["--rm", "-t", "--runc-binary=/usr/sbin/runX", "--env", "PS1=# "]
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
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), "the hook to run")
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
        ({"cwd": "/file/x"}, "chdir /file/x: Not a directory"),
        ({"args": ["/broken"]}, "exec /broken: Exec format error"),
    ],
)
def test_why_a_process_cannot_be_started_reaches_the_terminal(bundle, tmp_path, change, reason):
    """Before the terminal is there, and with it."""
    (bundle.rootfs / "file").touch()
    (bundle.rootfs / "broken").write_text("\x7fELF")
    (bundle.rootfs / "broken").chmod(0o755)
    spec = in_memory(terminal_config("true"))
    spec["mounts"] = change.pop("mounts", []) + spec["mounts"]
    spec["process"].update(change)
    bundle.write_config(spec)
    console_socket = ConsoleSocket(tmp_path / "console.sock")
    pidfd = bundle.created("--console-socket", console_socket.path)
    terminal = console_socket.receive()
    assert bundle.runx("start", bundle.id).returncode == 0
    wait_for(pidfd)
    assert reason.encode() in terminal.rest() and reason in bundle.log.read_text()
    os.close(terminal.fd)
