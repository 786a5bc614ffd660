# SPDX-License-Identifier: Apache-2.0
"""What all parts of runx.py stand on: what stands in for slow modules, records, undoing, the log."""

import builtins
import errno
import json
import os
import socket
import subprocess
import sys

import pytest

import runx

DOCUMENTS = [
    "null", "true", "[]", "{}", '""', "0", "-0", "1.5", "1e3", ' \n{"a": [1, {"b": "\\u00e9\\n"}], "c": -7} \t',
    "[1,2]", '"\\ud83d\\ude00"', "18446744073709551615",
]  # fmt: skip
MALFORMED = ["", "{", "[1,]", "nul", '{"a" 1}', "[1] x", "NaN", "[Infinity]", "-Infinity", "1e999", '"\n"', "[" * 5000]


class Older:
    """A scanner of a Python that asks for what ours has not."""

    def __init__(self, scanner):
        raise AttributeError("type object 'JsonScanner' has no attribute 'another_hook'")


@pytest.fixture(params=["C's halves", "the real modules", "a scanner of another Python"])
def modules(request, monkeypatch):
    """Whether the modules that only CPython has are there, and as they are known."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name in ("_json", "_socket", "_signal", "_ctypes") and args and args[0].get("__name__") == "runx":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    if request.param == "the real modules":
        real("json"), real("ctypes"), real("signal")
        monkeypatch.setattr(builtins, "__import__", refuse)
    if request.param == "a scanner of another Python":
        import _json

        real("json")
        monkeypatch.setattr(_json, "make_scanner", Older)
    monkeypatch.setattr(runx, "C_LIBRARY", {})


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("text", DOCUMENTS)
def test_json_is_read_and_written_as_the_library_does(text):
    value = runx.parse_json(text)
    expected = json.loads(text)
    assert value == expected and type(value) in (type(expected), float)
    assert json.loads(runx.json_text(value)) == value
    assert runx.json_text(json.loads(text), 2) == json.dumps(json.loads(text), indent=2)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        runx.parse_json(text)


@pytest.mark.usefixtures("modules")
def test_a_number_that_is_larger_than_any_of_the_kernels_is_a_float():
    assert repr(runx.parse_json("123456789012345678901")) == "1.2345678901234568e+20"
    assert repr(runx.parse_json("12345678901234567890")) == "12345678901234567890"


@pytest.mark.usefixtures("modules")
def test_system_calls_return_numbers_and_raise_their_errors(tmp_path):
    assert runx.system_call("getpid") == os.getpid()
    with pytest.raises(OSError) as raised:
        runx.system_call("chroot", str(tmp_path / "nothing"))
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(OSError) as raised:
        runx.system_call("close", -1)
    assert raised.value.errno == errno.EBADF


@pytest.mark.usefixtures("modules")
def test_sockets_and_signals_are_there():
    assert runx.import_core("socket").AF_UNIX == socket.AF_UNIX and runx.import_core("signal").SIGTERM == 15


def test_state_imports_no_slow_module():
    """What each command pays for, beside what the interpreter has by itself."""
    script = "import sys; before = set(sys.modules); import runx; runx.main(['state', 'x']); print(*sys.modules)"
    folder = os.path.dirname(runx.__file__)
    result = subprocess.run(
        [sys.executable, "-IS", "-c", f"import sys; sys.path.insert(0, {folder!r}); {script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    slow = {"json", "re", "socket", "signal", "ctypes", "_ctypes", "subprocess", "typing", "enum", "dataclasses"}
    assert slow & set(result.stdout.split()) == set()


class Point(runx.Record):
    x: int
    y: int = 5


def test_a_record_takes_its_fields_and_no_others():
    assert (Point(x=1).x, Point(x=1).y, Point(x=1, y=2).y) == (1, 5, 2)
    for fields in ({}, {"y": 1}, {"x": 1, "z": 1}):
        with pytest.raises(TypeError, match="Point takes x, y"):
            Point(**fields)


def test_states_share_no_defaults():
    one, other = runx.State(), runx.State()
    one.devices.append(["vif", 0])
    one.annotations["a"] = "b"
    assert (other.devices, other.annotations, runx.State.devices) == ([], {}, [])


def test_what_is_acquired_is_given_back_in_reverse(tmp_path):
    log, done = runx.Log(str(tmp_path / "log")), []
    with pytest.raises(KeyError), runx.Undo(log) as undo:
        undo.add("undo the first", done.append, 1)
        undo.add("undo the second", os.unlink, tmp_path / "nothing")
        undo.add("undo the third", done.append, 3)
        raise KeyError
    assert done == [3, 1]
    assert 'level=warning msg="cannot undo the second: [Errno 2]' in (tmp_path / "log").read_text()
    with runx.Undo(log) as undo:
        undo.add("undo nothing", done.append, 4)
    assert done == [3, 1]


def test_a_log_about_a_container_names_it(tmp_path):
    log = runx.Log(str(tmp_path / "log"), as_json=True)
    log.about("c1").warn("x")
    log.warn("y")
    log.debug("z")
    runx.Log(str(tmp_path / "log"), as_json=True, debug=True).about("c2").debug("z")
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(record["level"], record["msg"]) for record in records] == [
        ("warning", "container c1: x"), ("warning", "y"), ("debug", "container c2: z"),
    ]  # fmt: skip


# ---- the order of what a console's two ends see


class Trace:
    """A page, its indexes and a barrier, of which each access is noted."""

    def __init__(self, notes, name, content):
        self.notes, self.name, self.content = notes, name, content

    def __getitem__(self, key):
        self.notes.append(f"read {self.name}")
        return self.content[key]

    def __iter__(self):
        self.notes.append(f"read {self.name}")
        return iter(self.content)

    def __setitem__(self, key, value):
        self.notes.append(f"write {self.name}")
        self.content[key] = value


@pytest.fixture
def traced():
    notes = []

    class Channels:
        def notify(self, port):
            notes.append("notify")

    console = runx.Console(runx.Domain(None, 1, "uuid"), 1, Channels())
    page = memoryview(bytearray(4096))
    console.indexes = Trace(notes, "index", page[3072:3088].cast("I"))
    console.page, console.port = Trace(notes, "ring", page), 0
    console.barrier = lambda: notes.append("barrier")
    return console, notes


def squeezed(notes):
    """Without repetitions of one thing."""
    return [note for number, note in enumerate(notes) if number == 0 or notes[number - 1] != note]


def test_bytes_are_in_the_ring_before_the_index_says_so(traced):
    console, notes = traced
    assert console.put(b"abc") == 3
    assert squeezed(notes) == [
        "read index", "barrier", "read index", "write ring", "barrier", "write index", "notify",
    ]  # fmt: skip


def test_bytes_are_read_between_the_two_indexes(traced):
    console, notes = traced
    console.indexes.content[3] = 5
    assert console.take() == bytes(5)
    assert squeezed(notes) == ["read index", "barrier", "read ring", "barrier", "write index", "notify"]


def test_a_barrier_gives_the_lock_up_before_it_takes_it():
    barrier, done = runx.Barrier(), []

    class Lock:
        def release(self):
            done.append("release")

        def acquire(self):
            done.append("acquire")

    assert barrier.lock.locked()
    barrier()
    assert barrier.lock.locked()
    barrier.lock = Lock()
    barrier()
    assert done == ["release", "acquire"]


def test_xenstored_by_the_device_gets_a_request_when_the_one_before_is_answered(monkeypatch):
    """Linux's xenbus_dev_request_and_reply() sends what it has in the buffer of the file, some time after write(2)."""
    done, replies = [], bytearray()

    def write(fd, message):
        done.append("write")
        replies.extend(message[:4] + bytes(8) + b"\3\0\0\0OK\0")
        return len(message)

    def read(fd, size):
        done.append("read")
        part = bytes(replies[:size])
        del replies[:size]
        return part

    monkeypatch.setattr(runx, "XENSTORED_SOCKET", "/none/socket")
    monkeypatch.setattr(runx, "XENBUS_DEVICE", "/dev/null")
    xenstore = runx.Xenstore()
    monkeypatch.setattr(runx.os, "write", write)
    monkeypatch.setattr(runx.os, "read", read)
    xenstore.write_all([("/a", "1"), ("/a", ("n0",)), ("/b", "2")])
    monkeypatch.undo()
    os.close(xenstore.fd)
    assert done == ["write", "read"] * 3


def test_xl_does_not_know_of_our_consoles():
    """It would wait for each when it destroys the domain."""
    written = []

    class Xenstore:
        def write_all(self, steps):
            written.extend(path for path, _ in steps)

    runx.Console(runx.Domain(Xenstore(), 7, "uuid"), 1, None).introduce()
    assert written and not [path for path in written if path.startswith("/libxl/")]
    runx.Device(runx.Domain(Xenstore(), 7, "uuid"), "vif", 0).announce({}, {})
    assert "/libxl/7/device/vif/0/frontend" in written
