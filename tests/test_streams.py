# SPDX-License-Identifier: Apache-2.0
"""The standard streams and the terminal of a container, from the guest's consoles to the engine's descriptors."""

import os
import select
import socket

import pytest
from conftest import ConsoleSocket, wait_until
from fake.guest import pattern

IMPOSSIBLE = "the ring's indexes are impossible"


def finish(container, status=0):
    assert container.wait() == status, container.log_text()
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("count", [1, 2047, 2048, 2049, 100_001])
def test_output_is_exact(dom0, count):
    container = dom0.container(f"much:{count}", "err:done").started()
    finish(container)
    assert os.pread(container.stdout, count + 1, 0) == pattern(count)
    assert container.errors() == "done"


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 20_000])
def test_input_is_exact_with_its_escapes_and_its_end(dom0, count):
    data = (b"\x10\x04\x00\xff\x10\x10" + pattern(count))[:count]
    container = dom0.container("cat:").started(stdin=data)
    finish(container)
    assert os.pread(container.stdout, count + 1, 0) == data


def test_input_that_comes_late_and_never_ends(dom0):
    reader, writer = os.pipe()
    container = dom0.container("line:", "line:", "exit:5").started(stdin=reader)
    os.close(reader)
    container.ready()
    os.write(writer, b"one\n")
    os.write(writer, b"two\nthree\n")
    finish(container, 5)
    assert container.output() == "one\ntwo\n"
    os.close(writer)


def test_input_waits_until_the_process_is_there(dom0):
    """What init and hooks have not asked for is the process's."""
    container = dom0.container("begun:set:data/x=1", "begun:until:data/go", "cat:").created(stdin=b"mine")
    start = container.start_runx("start")
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/x", "1")
    dom0.ask("write", f"/local/domain/{container.domid()}/data/go", "1")
    assert start.wait().returncode == 0
    finish(container)
    assert container.output() == "mine"


def test_both_outputs_into_one_pipe_lose_nothing(dom0):
    reader, writer = os.pipe()
    container = dom0.container("much:9000", "err:" + "e" * 9000, "much:9000").started(stdout=writer, stderr=writer)
    os.close(writer)
    data = read_to_end(reader)
    finish(container)
    assert len(data) == 27000
    assert data.replace(b"e", b"") == pattern(9000).replace(b"e", b"") * 2


def read_to_end(fd):
    with open(fd, "rb") as file:
        return file.read()


def test_a_reader_that_waits_loses_nothing(dom0):
    """The VM is gone long before its output is read."""
    reader, writer = os.pipe()
    container = dom0.container("much:60000").started(stdout=writer)
    os.close(writer)
    assert read_to_end(reader) == pattern(60000)
    finish(container)


def test_a_reader_that_goes_ends_the_process(dom0):
    reader, writer = os.pipe()
    container = dom0.container("broken:").started(stdout=writer)
    os.close(writer)
    assert os.read(reader, 2) == b"y\n"
    os.close(reader)
    finish(container, 141)


def test_one_at_a_terminal_that_nobody_reads_can_be_killed(dom0):
    """poll(2) calls it writable though a write of what a console has would block."""
    dom0.constants["KILL_GRACE"] = 0.05
    master, terminal = os.openpty()
    container = dom0.container("much:200000").started(stdin=terminal, stdout=terminal, stderr=terminal)
    wait_until(lambda: not select.select([], [terminal], [], 0)[1], "that it takes no more")
    assert dom0.run(*container.words("kill", container.id, "KILL")).returncode == 0
    finish(container, 137)
    assert os.get_blocking(terminal)
    os.close(terminal)
    os.close(master)


def test_a_full_disk_ends_the_process(dom0):
    full = os.open("/dev/full", os.O_WRONLY)
    container = dom0.container("broken:").started(stdout=full)
    os.close(full)
    finish(container, 141)


def test_a_stream_that_the_process_closes_ends_at_once(dom0):
    (out, out_end), (err, err_end), (in_end, writer) = os.pipe(), os.pipe(), os.pipe()
    container = dom0.container("out:x", "close:01", "wait").started(stdin=in_end, stdout=out_end, stderr=err_end)
    for fd in (out_end, err_end, in_end):
        os.close(fd)
    assert read_to_end(out) == b"x"
    poll = select.poll()
    poll.register(writer, 0)
    assert poll.poll(20000)[0][1] & select.POLLERR
    dom0.run(*container.words("kill", container.id, "TERM"))
    assert read_to_end(err) == b""
    os.close(writer)
    finish(container, 143)


@pytest.mark.parametrize("streams", ["0", "", "3", "junk", "2" * 2000])
def test_what_a_guest_says_of_its_streams_is_not_believed(dom0, streams):
    container = dom0.container(f"close:{streams}", "out:still here").started()
    finish(container)
    assert container.output() == "still here"


@pytest.mark.parametrize("indexes", ["0,0,0,2049", "0,0,5,4", "0,0,0,0xffffffff", "7,0,2048,1"])
def test_impossible_indexes_of_a_ring_end_the_container(dom0, indexes):
    container = dom0.container(f"ring:{indexes}").created()
    container.runx("start")  # which fails where the monitor has ended before it has looked
    assert container.wait() == 255
    assert IMPOSSIBLE in container.log_text()
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("indexes", ["5,4", "0,1025", "0xffffffff,0", "0,0xffffffff"])
def test_impossible_indexes_of_the_other_ring_take_no_input(dom0, indexes):
    """They harm nobody but the guest; it can still be ended."""
    container = dom0.container(f"ring:{indexes}").started(stdin=b"x" * 5000)
    container.ready()
    dom0.run(*container.words("kill", container.id, "KILL"))
    assert container.wait() == 137
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("start", [0xFFFFFFF0, 0x7FFFFFFF])
def test_indexes_run_over(dom0, start):
    container = dom0.container(f"early:index:{start}", "much:5000", "cat:").started(stdin=b"in" * 900)
    finish(container)
    assert os.pread(container.stdout, 9000, 0) == pattern(5000) + b"in" * 900


@pytest.mark.parametrize(
    "node, value",
    [("ring-ref", "x"), ("ring-ref", "-1"), ("ring-ref", "4294967296"), ("ring-ref", ""), ("port", "x"),
     ("port", "99999999999")],
)  # fmt: skip
def test_a_console_that_cannot_be_connected_ends_the_container(dom0, node, value):
    container = dom0.container(f"hostile:device/console/1/{node}={value}", "wait").created()
    assert container.wait() == 255
    assert "cannot connect to console 1 of domain" in container.runx("start").stderr
    assert "cannot connect to console 1 of domain" in container.log_text()
    assert "internal error" not in container.log_text()
    assert container.runx("delete").returncode == 0


@pytest.mark.parametrize("state", ["1", "2", "7", "x", "99999999999999999999"])
def test_states_of_a_console_that_mean_nothing_are_passed_over(dom0, state):
    container = dom0.container("out:a", f"set:device/console/2/state={state}", "out:b").started()
    finish(container)
    assert container.output() == "ab"


def test_a_guest_may_not_write_what_is_dom0s(dom0):
    """Permissions as runX gives them: what the guest is told is not the guest's to change."""
    container = dom0.container("wait").started().ready()
    home, domid = f"/local/domain/{container.domid()}", container.domid()
    ours, theirs = ["n0", f"r{domid}"], [f"n{domid}", "r0"]
    for number in (1, 2):
        front, back = f"{home}/device/console/{number}", f"/local/domain/0/backend/console/{domid}/{number}"
        assert dom0.ask("perms", front) == theirs
        assert dom0.ask("perms", f"{front}/state") == theirs
        for node in (back, f"{back}/state", f"{back}/frontend", f"{front}/backend", f"{front}/type"):
            assert dom0.ask("perms", node) == ours
        assert dom0.nodes()[f"{front}/backend"] == back
        assert dom0.nodes()[f"{back}/frontend"] == front
        assert dom0.nodes()[f"{front}/backend-id"] == "0"
        assert dom0.nodes()[f"{back}/frontend-id"] == str(domid)
    dom0.run(*container.words("kill", container.id, "TERM"))
    finish(container, 143)


# ---- the terminal


@pytest.fixture
def engine(tmp_path):
    """What waits for a terminal."""
    end = ConsoleSocket(tmp_path / "socket")
    yield end
    end.socket.close()


def test_a_terminal_carries_everything_both_ways(dom0, engine):
    container = dom0.container("line:", "err:oops", "exit:2", terminal=True, consoleSize={"height": 30, "width": 99})
    assert container.create("--console-socket", engine.path).returncode == 0
    terminal = engine.receive()
    assert os.get_terminal_size(terminal.fd) == (99, 30)
    assert container.runx("start").returncode == 0
    container.ready()
    terminal.type(b"\x10\x03hi\n")
    assert terminal.rest() == b"\x10\x03hi\noops"
    os.close(terminal.fd)
    finish(container, 2)


def test_a_terminals_size_reaches_the_guest_now_and_after_each_change(dom0, engine):
    container = dom0.container("wait", terminal=True, consoleSize={"height": 30, "width": 99})
    assert container.create("--console-socket", engine.path).returncode == 0
    terminal = engine.receive()
    assert container.runx("start").returncode == 0
    size = f"/local/domain/{container.domid()}/data/process/0/winsize"
    dom0.ask("await_node", size, "30 99")
    terminal.resize(50, 132)
    dom0.ask("await_node", size, "50 132")
    dom0.run(*container.words("kill", container.id, "TERM"))
    assert terminal.rest() == b""
    os.close(terminal.fd)
    finish(container, 143)


@pytest.mark.parametrize("script, status", [(["broken:"], 141), (["until:data/process/0/unread", "exit:9"], 9)])
def test_a_terminal_that_the_engine_closes_hangs_up(dom0, engine, script, status):
    """Also where nothing is written, and so nothing fails."""
    container = dom0.container(*script, terminal=True)
    assert container.create("--console-socket", engine.path).returncode == 0
    terminal = engine.receive()
    assert container.runx("start").returncode == 0
    container.ready()
    os.close(terminal.fd)
    assert container.wait() == status
    assert container.runx("delete").returncode == 0


def test_a_terminal_needs_a_console_socket_and_nothing_else_may_have_one(dom0, tmp_path):
    for terminal, options, sentence in (
        (True, [], "cannot allocate tty if runX will detach without setting console socket"),
        (False, ["--console-socket", "/x"], "cannot use console socket if runX will not detach or allocate tty"),
        (True, ["--console-socket", str(tmp_path / "none")], "cannot send a terminal to the console socket"),
    ):
        container = dom0.container(terminal=terminal)
        result = container.create(*options)
        assert (result.returncode, sentence in result.stderr) == (1, True), result
        assert container.runx("state").returncode == 1


def test_closed_sockets_are_no_traceback(dom0, tmp_path):
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(tmp_path / "socket"))
        container = dom0.container(terminal=True)
        result = container.create("--console-socket", str(tmp_path / "socket"))
    assert "cannot send a terminal to the console socket" in result.stderr
