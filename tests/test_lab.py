"""The lab itself: its protocol without a boot, then a booted dom0, and what an end of any kind leaves behind."""

import contextlib
import hashlib
import os
import pathlib
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios

import pytest
from conftest import REPOSITORY, call, on_xen, wait_until

LAB = REPOSITORY / "tests/lab/lab.py"
sys.path.insert(0, str(LAB.parent))

import agent  # noqa: E402
import frames  # noqa: E402
import image  # noqa: E402
import lab as lab_module  # noqa: E402

pytestmark = pytest.mark.skipif(on_xen(), reason="the lab does not run inside the lab")

can_boot = pytest.mark.skipif(
    os.geteuid() != 0 or not image.image_folder().exists(),
    reason="needs root and the dom0 image: `python3 tests/lab/lab.py build` makes it",
)


# ---- the protocol


@pytest.fixture
def links():
    """The two ends of a link."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield frames.Link(ours.fileno()), frames.Link(theirs.fileno())


def receive_all(link):
    link.receive()
    received = []
    while link.has_frame():
        received.append(link.next_frame())
    return received


def test_frames_arrive_in_order_with_every_byte_value(links):
    sent = [(frames.STDOUT, bytes(range(256))), (frames.STDERR, b""), (frames.STDOUT, b"\0\n")]
    for frame in sent:
        links[0].send(*frame)
    links[0].flush()
    assert receive_all(links[1]) == sent


def test_a_frame_is_taken_only_when_all_of_it_has_come(links):
    links[0].send(frames.STDOUT, b"whole")
    whole = bytes(links[0].outgoing)
    links[0].outgoing.clear()
    for byte in whole[:-1]:
        os.write(links[0].fd, bytes([byte]))
        links[1].receive()
        assert not links[1].has_frame()
    os.write(links[0].fd, whole[-1:])
    assert receive_all(links[1]) == [(frames.STDOUT, b"whole")]


def test_receive_says_when_the_other_end_is_gone(links):
    socket.socket(fileno=os.dup(links[0].fd)).shutdown(socket.SHUT_RDWR)
    with pytest.raises(EOFError):
        links[1].receive()


def test_data_behind_a_control_message_waits_for_the_next_step(links):
    links[0].control(start={})
    links[0].send(frames.STDIN, b"for the command that starts")
    links[0].flush()
    assert frames.Pump(links[1]).step()[0] == {"start": {}}
    taken = []
    pump = frames.Pump(links[1], sinks=[frames.Sink(links[1], frames.STDIN, taken.append)])
    pump.step(timeout=0)
    assert taken == [b"for the command that starts"]


def test_a_source_stops_at_the_window_and_goes_on_with_credit(links):
    content = os.urandom(3 * frames.WINDOW)
    with lab_module.in_memory(content) as file:
        source = frames.Source(links[0], frames.STDOUT, file.fileno())
        sender = frames.Pump(links[0], [source])
        taken = []
        receiver = frames.Pump(links[1], sinks=[frames.Sink(links[1], frames.STDOUT, taken.append)])
        while source.wants_to_read():
            sender.step()
        assert source.credit == 0 and file.tell() == frames.WINDOW
        while not source.ended or links[0].outgoing:
            receiver.step(timeout=0)
            sender.step(timeout=0)
        receiver.step(timeout=0)
    assert b"".join(taken) == content


def test_a_sink_without_a_reader_drops_data_and_still_gives_credit(links):
    reader, writer = os.pipe()
    os.close(reader)
    sink = frames.Sink(links[0], frames.STDOUT, writer)
    sink.accept(b"x" * 1000)
    sink.pump()
    os.close(writer)
    links[0].flush()
    assert sink.broken and not sink.pending
    assert receive_all(links[1]) == [(frames.CONTROL, b'{"credit": [2, 1000]}')]


def test_a_stuck_stream_does_not_hold_up_the_other(links):
    reader, writer = os.pipe()  # nobody reads it
    taken = []
    receiver = frames.Pump(
        links[1],
        sinks=[frames.Sink(links[1], frames.STDOUT, writer), frames.Sink(links[1], frames.STDERR, taken.append)],
    )
    with lab_module.in_memory(bytes(2 * frames.WINDOW)) as stdout, lab_module.in_memory(b"hello") as stderr:
        sender = frames.Pump(
            links[0],
            [
                frames.Source(links[0], frames.STDOUT, stdout.fileno()),
                frames.Source(links[0], frames.STDERR, stderr.fileno()),
            ],
        )
        while not taken:
            sender.step(timeout=0)
            receiver.step(timeout=0)
    assert taken == [b"hello"]
    os.close(reader)
    os.close(writer)


# ---- the arguments of `test`


def test_divide_tests_sends_files_where_they_belong(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    name = "tests/test_lab.py"
    assert lab_module.divide_tests(["-x"]) == (["-x", str(REPOSITORY / "tests")], ["-x", "/repo/tests"])
    assert lab_module.divide_tests([f"{name}::test_x", "-k", "y"]) == (
        ["-k", "y", f"{REPOSITORY}/{name}::test_x"],
        [],
    )
    xen = next(REPOSITORY.glob("tests/test_xen_*.py"))
    assert lab_module.divide_tests([str(xen)]) == ([], [f"/repo/tests/{xen.name}"])


# ---- several runs of pytest


def test_a_test_that_another_run_has_claimed_is_not_run_again(tmp_path):
    (tmp_path / "1").mkdir()
    nine = f"{REPOSITORY}/tests/test_formats.py::test_members_are_aligned_whatever_their_size"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", nine]
    for words in (b"8 passed", b"no tests ran"):
        done = call(*command, env={**os.environ, "TEST_CLAIMS": str(tmp_path)})
        assert done.returncode == 0 and words in done.stdout, done
    assert len(os.listdir(tmp_path)) == 9


def test_jobs_side_by_side_have_their_statuses_and_their_output_in_order(capfdbinary):
    reader, writer = os.pipe()

    def first():
        os.write(1, b"first\n" + os.read(reader, 1))  # which the second one writes
        return 0

    def second():
        os.write(1, b"second\n")
        os.write(writer, b"\n")
        return 3

    def third():
        raise lab_module.LabError("third")

    assert lab_module.side_by_side([first, second, third]) == [0, 3, 1]
    assert capfdbinary.readouterr().out == b"first\n\nsecond\n"
    os.close(reader)
    os.close(writer)


# ---- the busybox image


def test_the_busybox_layer_is_the_same_each_time():
    busybox = pathlib.Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("needs busybox-static")
    assert image.busybox_layer(busybox) == image.busybox_layer(busybox)


# ---- a booted dom0


def image_state():
    """What would show that a boot has written to the cached image."""
    state = {}
    for path in sorted(image.image_folder().iterdir()):
        status = path.stat()
        with open(path, "rb") as file:
            file.seek(1024)  # an ext4 superblock, which a mount changes
            head = hashlib.sha256(file.read(64 << 10)).hexdigest()
        state[path.name] = (status.st_size, status.st_mtime_ns, status.st_blocks, head)
    return state


def lab_processes():
    """The QEMU processes of labs started by this process or its children, by their temporary folder."""
    found = set()
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and b"qemu-system" in (folder / "cmdline").read_bytes():
                environment = (folder / "environ").read_bytes().split(b"\0")
                if marker() in environment:
                    found.add(int(folder.name))
    return found


def marker():
    return f"RUNX_TEST_LAB={os.getpid()}".encode()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The folder for the labs' temporary files; what these tests start can be told from other labs."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        name, value = marker().decode().split("=")
        patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="class")
def lab(temporary, tmp_path_factory):
    """One boot for all the tests that only run commands."""
    share = tmp_path_factory.mktemp("share")
    before = image_state()
    with lab_module.Lab(share=share) as lab:
        yield lab
    assert image_state() == before, "the boot has changed the cached image"
    assert not lab_processes() and not os.listdir(temporary), "something is left of the lab"


def capture(lab, *argv, **options):
    """Run a command in the dom0; its status and output."""
    stdout, stderr = [], []
    status = lab.run(argv, stdout=stdout.append, stderr=stderr.append, time_limit=120, **options)
    return status, b"".join(stdout), b"".join(stderr)


@can_boot
class TestCommands:
    """Commands in one dom0, booted once."""

    def test_the_boot_reports_its_steps(self, lab):
        assert "import of busybox into containerd" in [step.name for step in lab.steps]
        assert lab.warnings == []

    def test_stdout_and_stderr_are_separate_and_exact(self, lab):
        script = (
            "import os; data = bytes(range(256)) * 2000; os.write(2, b'err'); [os.write(1, data) for _ in range(4)]"
        )
        status, stdout, stderr = capture(lab, "python3", "-c", script)
        assert (status, stderr) == (0, b"err")
        assert stdout == bytes(range(256)) * 8000

    def test_stdin_is_exact_and_ends(self, lab):
        content = os.urandom(1 << 20)
        status, stdout, _ = capture(lab, "sha256sum", stdin=content)
        assert (status, stdout.split()[0].decode()) == (0, hashlib.sha256(content).hexdigest())

    def test_output_comes_while_the_command_runs(self, lab):
        reader, writer = os.pipe()
        stdout = []

        def answer(data):
            stdout.append(data)
            if b"".join(stdout) == b"question\n":
                os.write(writer, b"answer\n")
                os.close(writer)

        status = lab.run(["sh", "-c", "echo question; cat"], stdin=reader, stdout=answer, time_limit=60)
        os.close(reader)
        assert (status, b"".join(stdout)) == (0, b"question\nanswer\n")

    def test_a_command_that_reads_no_stdin_ends_all_the_same(self, lab):
        assert capture(lab, "true", stdin=bytes(4 * frames.WINDOW))[0] == 0
        assert capture(lab, "echo", "next")[1] == b"next\n"

    def test_a_daemon_left_behind_does_not_keep_the_command_open(self, lab):
        status, stdout, _ = capture(lab, "sh", "-c", "sleep 1000 & echo started")
        assert (status, stdout) == (0, b"started\n")

    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["sh", "-c", "exit 7"], 7),
            (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
            (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
            (["/no/such/program"], 127),
            (["/etc/passwd"], 126),
        ],
    )
    def test_exit_status_is_the_commands(self, lab, argv, expected):
        status, _, stderr = capture(lab, *argv)
        assert status == expected
        if status in (126, 127):
            assert argv[0].encode() in stderr

    def test_argv_environment_and_folder_arrive_unchanged(self, lab):
        words = ["", " a  b ", "$HOME", "ü", "--"]
        status, stdout, _ = capture(
            lab,
            "sh",
            "-c",
            'pwd; echo "$X"; for word; do echo "<$word>"; done',
            "sh",
            *words,
            env={"X": "1 2"},
            cwd="/tmp",
        )
        assert stdout.decode().splitlines() == ["/tmp", "1 2", *[f"<{word}>" for word in words]]

    def test_a_terminal_has_its_size_and_learns_of_a_new_one(self, lab, monkeypatch):
        monkeypatch.setattr(lab_module, "window_size", lambda: [50, 132])
        reader, writer = os.pipe2(os.O_NONBLOCK)
        stdout = []

        def resize_once(data):
            stdout.append(data)
            if b"".join(stdout) == b"first 24 80\r\n":
                os.write(writer, b"\0")

        script = "trap 'echo second $(stty size); exit 3' WINCH; echo first $(stty size); sleep 1000 & wait"
        keyboard = os.pipe()
        status = lab.run(
            ["bash", "-c", script],
            stdin=keyboard[0],
            stdout=resize_once,
            window=[24, 80],
            resizes=reader,
            time_limit=60,
        )
        for fd in (reader, writer, *keyboard):
            os.close(fd)
        assert (status, b"".join(stdout)) == (3, b"first 24 80\r\nsecond 50 132\r\n")

    def test_repo_is_the_working_tree_and_read_only(self, lab):
        status, stdout, _ = capture(lab, "sha256sum", "/repo/tests/lab/lab.py")
        assert stdout.split()[0].decode() == hashlib.sha256(LAB.read_bytes()).hexdigest()
        status, _, stderr = capture(lab, "touch", "/repo/new")
        assert status != 0 and b"Read-only" in stderr
        assert not (REPOSITORY / "new").exists()

    def test_share_is_read_write(self, lab):
        (lab.share / "from-host").write_bytes(b"host")
        status, stdout, _ = capture(lab, "sh", "-c", "cat /share/from-host; echo dom0 >/share/from-dom0")
        assert (status, stdout) == (0, b"host")
        assert (lab.share / "from-dom0").read_bytes() == b"dom0\n"

    def test_xen_and_containerd_are_up(self, lab):
        assert b"Domain-0" in capture(lab, "xl", "list")[1]
        assert image.BUSYBOX_REFERENCE in capture(lab, "ctr", "image", "ls", "-q")[1].decode().splitlines()


# ---- the end of a lab


@can_boot
def test_shell_is_a_terminal_of_our_size_and_passes_the_status_on(temporary):
    master, slave = pty.openpty()
    agent.set_window(slave, [37, 99])
    before = termios.tcgetattr(slave)
    with subprocess.Popen([sys.executable, str(LAB), "shell"], stdin=slave, stdout=slave, stderr=slave) as process:
        screen = b""
        while not screen.endswith(b"# "):
            screen += os.read(master, 4096)
        os.write(master, b"stty size; tty; exit 9\r")
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            if select.select([master], [], [], 0.1)[0]:
                screen += os.read(master, 4096)
    assert process.returncode == 9, screen
    assert b"37 99" in screen and b"/dev/pts/" in screen
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
    assert not lab_processes() and not os.listdir(temporary)


def start_run(*words):
    return subprocess.Popen(
        [sys.executable, str(LAB), "run", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@can_boot
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_powers_off_and_leaves_nothing(temporary, signum):
    before = image_state()
    with start_run("--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        wait_until(lab_processes, "QEMU")
        process.send_signal(signum)
        assert process.wait(10) == 128 + signum
    assert not lab_processes() and not os.listdir(temporary)
    assert image_state() == before


@can_boot
def test_time_limit_powers_off_with_the_console_on_stderr(temporary):
    with start_run("--time-limit", "10", "--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 124
    assert b"time limit" in stderr and b"(XEN)" in stderr
    assert not lab_processes() and not os.listdir(temporary)


@can_boot
def test_qemu_ends_when_the_lab_is_killed(temporary):
    with start_run("--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        wait_until(lab_processes, "QEMU")
        process.kill()
        process.wait()
        wait_until(lambda: not lab_processes(), "no QEMU", 5)
    for folder in temporary.iterdir():  # nobody could remove it
        shutil.rmtree(folder)
