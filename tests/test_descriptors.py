# SPDX-License-Identifier: Apache-2.0
"""Standard streams between descriptors and consoles, in a process whose descriptors 0, 1 and 2 are the test's."""

import contextlib
import json
import os
import select
import signal
import socket

import pytest

import runx


class Console:
    """A console whose guest is the test: what it will write, and what it has been given."""

    def __init__(self, *chunks, room=1024):
        self.chunks, self.given, self.space = list(chunks), b"", room

    def take(self):
        return self.chunks.pop(0) if self.chunks else b""

    def put(self, data):
        count = min(len(data), self.space)
        self.given += data[:count]
        self.space -= count
        return count


def in_child(work):
    """Calls work() in a child whose standard streams are pipes; returns what it returns, and what came out of 1 and 2.

    work gets: a descriptor to write to its standard input, and those to read its outputs from.
    """
    result, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ends = [os.pipe() for _ in range(3)]
            for fd, end in enumerate((ends[0][0], ends[1][1], ends[2][1])):
                os.dup2(end, fd)
                os.close(end)
            os.write(report, json.dumps(work(ends[0][1], ends[1][0], ends[2][0])).encode())
            status = 0
        except BaseException as error:
            os.write(report, json.dumps(repr(error)).encode())
        finally:
            os._exit(status)
    os.close(report)
    with os.fdopen(result) as file:
        value = json.load(file)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, value
    return value


def serve(streams, until):
    """What the monitor's loop does with the streams, until something is so."""
    while not until():
        poll = select.poll()
        for fd, events in streams.interests():
            poll.register(fd, events)
        streams.advance({fd for fd, _ in poll.poll(0)})


def test_each_output_arrives_at_its_descriptor():
    def work(_, out, errors):
        streams = runx.Streams([Console(b"a" * 2048, b"b"), Console(b"error")], False)
        streams.advance(set())
        serve(streams, streams.are_delivered)
        return [os.read(out, 9999).decode(), os.read(errors, 9999).decode(), streams.newly_unread()]

    assert in_child(work) == ["a" * 2048 + "b", "error", ""]


def test_both_outputs_in_one_pipe_have_their_turns():
    def work(_, out, errors):
        os.dup2(1, 2)
        streams = runx.Streams([Console(b"1", b"1", b"1"), Console(b"2", b"2", b"2")], False)
        streams.advance(set())
        while not streams.are_delivered():
            streams.advance({1, 2})
        return os.read(out, 99).decode()

    assert in_child(work) in ("121212", "212121")


def test_a_reader_that_stops_is_waited_for_and_nothing_blocks():
    def work(_, out, errors):
        flood = Console(*[b"x" * 2048] * 100)
        streams = runx.Streams([flood, Console(b"still here")], False)
        streams.advance(set())
        serve(streams, lambda: streams.outputs[0].pending and not select.select([], [1], [], 0)[1])
        before = len(flood.chunks)
        for _ in range(3):
            serve(streams, lambda: True)
        left, count = len(flood.chunks), 0
        delivered = streams.are_delivered()
        while not streams.are_delivered():
            count += len(os.read(out, 4096))
            serve(streams, lambda: streams.are_delivered() or not select.select([], [1], [], 0)[1])
        os.close(1)
        while data := os.read(out, 65536):
            count += len(data)
        return [before > 0, before == left, delivered, count, os.read(errors, 99).decode()]

    assert in_child(work) == [True, True, False, 204800, "still here"]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_nothing_blocks_though_others_have_it_too_and_may_want_to(kind):
    """What poll(2) has said of a stream is over when another one has written or read there."""

    def work(*_):
        master, terminal = os.openpty()
        for fd in (0, 1, 2) if kind == "terminal" else ():
            os.dup2(terminal, fd)
        others = [os.dup(fd) for fd in (0, 1, 2)]
        streams = runx.Streams([Console(b"more"), Console()], False)
        blocking = [os.get_blocking(fd) for fd in (0, 1, 2, *others)]
        assert blocking == [False] * 3 + [True] * 3, blocking
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(1, bytes(2048))
        streams.ready = True
        streams.advance(set())
        streams.advance({0, 1})
        return [streams.input.open, streams.newly_unread()]

    assert in_child(work) == [True, ""]


def test_a_log_on_standard_error_waits_for_a_reader_that_is_slow(monkeypatch):
    def work(_, out, errors):
        runx.unblock_standard(2)
        monkeypatch.setattr(runx.sys, "stderr", open(2, "w", closefd=False))
        monkeypatch.setattr(runx.select, "select", lambda *_: os.read(errors, 1 << 20))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(2, bytes(2048))
        runx.Log().warn("too late")
        return os.read(errors, 999).decode()

    assert in_child(work).endswith('msg="too late"\n')


def test_what_cannot_be_opened_again_stays_what_it_is():
    """A socket, the other end of a pty, a terminal that has gone: it may only be read or written, as before."""

    def work(*_):
        (master, terminal), (gone, hung_up), (ours, theirs) = os.openpty(), os.openpty(), socket.socketpair()
        os.close(gone)
        for fd, end in enumerate((hung_up, master, theirs.fileno())):
            os.dup2(end, fd)
        streams = runx.Streams([Console(b"one\n"), Console(b"two")], False)
        streams.ready = True
        streams.advance(set())
        streams.advance({0, 1, 2})
        return [os.read(terminal, 9).decode(), ours.recv(9).decode(), streams.input.open]

    assert in_child(work) == ["one\n", "two", False]


def test_an_output_that_nobody_reads_is_told_once():
    def work(_, out, errors):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.close(errors)
        streams = runx.Streams([Console(b"out"), Console(b"x", b"y")], False)
        streams.advance(set())
        serve(streams, streams.are_delivered)
        first = streams.newly_unread()
        os.close(out)
        streams.outputs[0].pending = b"more"
        serve(streams, streams.are_delivered)
        return [first, streams.newly_unread(), streams.newly_unread()]

    assert in_child(work) == ["2", "12", ""]


def test_a_stream_that_the_process_closes_ends_when_all_is_written():
    def work(stdin, out, errors):
        streams = runx.Streams([Console(b"last words"), Console()], False)
        streams.close_ended("012")
        streams.advance(set())
        early = [bool(select.select([fd], [], [], 0)[0]) for fd in (out, errors)]
        serve(streams, streams.are_delivered)
        streams.advance(set())
        texts = [os.read(fd, 99).decode() for fd in (out, out, errors)]
        try:
            os.write(stdin, b"x")
        except BrokenPipeError:
            texts.append("closed")
        return [early, *texts, os.path.samefile("/dev/null", "/proc/self/fd/1")]

    assert in_child(work) == [[False, True], "last words", "", "", "closed", True]


@pytest.mark.parametrize("raw, given", [(False, "a\x10\x10\x10\x10b\x10\x04"), (True, "a\x10\x10b")])
def test_input_arrives_with_its_end_where_the_other_side_knows_one(raw, given):
    def work(stdin, *_):
        console = Console()
        stream = runx.Input(console, 0, raw)
        os.write(stdin, b"a\x10\x10b")
        os.close(stdin)
        while stream.open:
            stream.advance(True)
        return console.given.decode()

    assert in_child(work) == given


def test_input_is_read_when_the_process_takes_it_and_what_does_not_fit_waits():
    def work(stdin, *_):
        console = Console(room=0)
        streams = runx.Streams([console, Console()], False)
        os.write(stdin, b"hello")
        asleep = [fd for fd, _ in streams.interests()]
        streams.advance({0})
        streams.ready = True
        waits = [fd for fd, _ in streams.interests()]
        streams.advance({0})
        full = [fd for fd, _ in streams.interests()]
        console.space = 3
        streams.advance(set())
        part = console.given.decode()
        console.space = 9
        streams.advance(set())
        return [asleep, waits, full, part, console.given.decode(), [fd for fd, _ in streams.interests()]]

    assert in_child(work) == [[], [0], [], "hel", "hello", [0]]


def test_a_terminal_ends_by_hanging_up_alone():
    def work(stdin, out, errors):
        streams = runx.Streams([Console(b"x"), Console(b"why")], True)
        streams.close_ended("012")
        streams.advance(set())
        numbers = [output.fd for output in streams.outputs]
        streams.hang_up()
        return [numbers, streams.input.open, [output.ended for output in streams.outputs], streams.newly_unread()]

    assert in_child(work) == [[1, 1], True, [False, False], "1"]


def test_a_resize_after_the_containers_terminal_has_ended_is_no_error():
    """The process is waited for then, and may run on for long."""

    def work(*_):
        master, ended = os.openpty()
        os.close(ended)
        _, ours = os.openpty()
        for fd in (0, 1):
            os.dup2(ours, fd)
        theirs, engine = socket.socketpair()
        socket.send_fds(theirs, [b"/dev/pts/1"], [master])
        os.close(master)
        runx.attach(engine.detach())
        signal.raise_signal(signal.SIGWINCH)
        return "goes on"

    assert in_child(work) == "goes on"


def test_the_first_console_is_read_as_fast_as_it_is_written():
    """A VM with a system of its own: its console is a pty of xenconsoled's."""

    def work(stdin, out, errors):
        import tty

        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(slave, False)
        streams = runx.Streams([runx.FirstConsole(slave)], False)
        os.write(master, b"from the VM")
        os.write(stdin, b"to it\x10")
        serve(streams, lambda: select.select([out], [], [], 0)[0] and select.select([master], [], [], 0)[0])
        texts = [os.read(out, 99).decode(), os.read(master, 99).decode()]
        os.close(master)
        serve(streams, streams.are_delivered)
        return [*texts, streams.first.ended]

    assert in_child(work) == ["from the VM", "to it\x10", True]


def test_a_first_console_that_has_hung_up_wakes_nobody_while_its_output_waits():
    def work(stdin, out, errors):
        master, slave = os.openpty()
        streams = runx.Streams([runx.FirstConsole(slave)], False)
        streams.outputs[0].pending = b"nobody reads"
        os.close(master)
        poll = select.poll()
        for fd, events in streams.interests():
            poll.register(fd, events)
        return [fd for fd, _ in poll.poll(0) if fd == slave]

    assert in_child(work) == []
