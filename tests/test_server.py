# SPDX-License-Identifier: Apache-2.0
"""The rings by which a guest asks for its files, and the process at their other end: what it keeps to itself, how it
ends, and what a guest gets that does not keep to the protocol."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
from types import SimpleNamespace

import conftest
import pytest
from namespace import in_own_mounts

import runx

IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, OUT_LOOKS = 0, 1, 16, 17, 18


class Echo:
    """Requests and replies: length, a letter, and the rest.  r asks for so much room; n has no reply; o must come
    behind all others; c is answered by its own content."""

    shortest, longest, ordered = 8, 4096, b"o"

    def __init__(self):
        self.seen, self.meanwhile = [], None

    def reply_room(self, message):
        if self.meanwhile:
            self.meanwhile()
        return int(message.copy(5, message.length)) if message.head[4:5] == b"r" else message.length

    def answer(self, message):
        rest = message.copy(5, message.length)
        self.seen.append(message.head[4:5] + rest)
        if message.head[4:5] == b"n":
            return b"", 0
        if message.head[4:5] != b"c":
            return struct.pack("<I", message.length) + message.head[4:5] + rest, 0
        at = 0
        data = b"".join(message.content(5, message.length - 5))
        for view in message.room(5, len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)
        return struct.pack("<I", message.length) + b"c", len(data)


class Guest:
    """The other side of a Ring: one page for each direction."""

    SIZE = 4096

    def __init__(self, start=0):
        self.page, self.data, self.told = memoryview(bytearray(4096)).cast("I"), memoryview(bytearray(2 * self.SIZE)), 0
        self.ring = runx.Ring(self.page, self.data, SimpleNamespace(notify=self.notify), 7)
        self.ring.out_cons = self.ring.in_prod = start
        for index in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD):
            self.page[index] = start

    def notify(self, port):
        assert port == 7
        self.told += 1

    def ask(self, *texts, length=None):
        """Put requests into the ring, of a letter and the rest each."""
        for text in texts:
            text = text.encode() if isinstance(text, str) else text
            self.write(struct.pack("<I", length or 4 + len(text)) + text)

    def write(self, data):
        produced = self.page[OUT_PROD]
        for at, byte in enumerate(data):
            self.data[self.SIZE + (produced + at) % self.SIZE] = byte
        self.page[OUT_PROD] = produced + len(data) & 0xFFFFFFFF

    def replies(self):
        """Take all that is there, without their lengths."""
        consumed, count = self.page[IN_CONS], self.page[IN_PROD] - self.page[IN_CONS] & 0xFFFFFFFF
        data = bytes(self.data[(consumed + at) % self.SIZE] for at in range(count))
        self.page[IN_CONS] = self.page[IN_PROD]
        found = []
        while data:
            (length,) = struct.unpack_from("<I", data)
            found.append(data[4:length])
            data = data[length:]
        return found


@pytest.mark.parametrize("start", [0, 4000, 0xFFFFFF00])
def test_requests_and_replies_go_across_the_ends_of_ring_and_counter(start):
    guest, protocol = Guest(start), Echo()
    for size in (3, 100, 1000, 4091, 5, 3000):
        for letter in (b"x", b"c"):
            text = letter + bytes(at % 251 for at in range(size))
            guest.ask(text)
            assert guest.ring.serve(protocol)
            assert guest.replies() == [text]
    assert guest.page[OUT_CONS] == guest.page[OUT_PROD], "the guest has room again"
    assert (guest.told, guest.ring.serve(protocol)) == (12, False)


def test_what_has_no_reply_is_taken_and_the_guest_told_once():
    guest, protocol = Guest(), Echo()
    guest.ask("none", "next", "nobody")
    guest.ring.serve(protocol)
    assert (guest.replies(), guest.told, len(protocol.seen)) == ([], 1, 3)
    guest.ask("none", "some")
    guest.ring.serve(protocol)
    assert (guest.replies(), guest.told) == ([b"some"], 2)


def test_a_guest_is_not_told_that_cannot_wait_for_room():
    guest, protocol = Guest(), Echo()
    protocol.longest = 100
    for size, told in ((10, 0), (45, 1)):
        guest.ask(*["none"] * 3, *["n" + "x" * 85] * size)
        guest.ring.serve(protocol)
        assert (guest.page[OUT_CONS], guest.told) == (guest.page[OUT_PROD], told)


def test_a_guest_is_told_that_found_no_room_while_others_were_answered():
    """It has put in what is only answered by the next round, and has looked for room before this one."""
    guest, protocol = Guest(), Echo()
    protocol.longest = 100
    guest.ask(*["n" + "x" * 85] * 25)
    protocol.meanwhile = lambda: (setattr(protocol, "meanwhile", None), guest.ask(*["n" + "x" * 85] * 20))
    for _ in range(2):
        guest.ring.serve(protocol)
    assert (guest.page[OUT_CONS], guest.told) == (guest.page[OUT_PROD], 1)


def test_the_next_request_is_looked_for_as_long_as_that_is_of_use():
    guest, protocol = Guest(), Echo()
    lookout = runx.Lookout([guest.ring])
    guest.ask("next")
    assert lookout.sees_more()
    guest.ring.serve(protocol)
    tries = 0
    while lookout.looks:
        assert not lookout.sees_more()
        tries += 1
    assert 8 < tries < 16
    guest.ask("next")
    assert [lookout.sees_more() for _ in range(runx.UNLOOKED_MAX)].index(True) == runx.UNLOOKED_MAX - 1
    guest.ring.serve(protocol)
    assert [lookout.sees_more() for _ in range(2)] == [False, False]
    guest.ask("next")
    assert lookout.sees_more() and lookout.looks == runx.LOOKS_MAX


def test_a_ring_without_room_for_replies_is_not_looked_at_for_ever():
    guest, protocol = Guest(), Echo()
    guest.ask("r4090", "r4090")
    assert guest.ring.serve(protocol) and guest.ring.is_stuck
    assert not guest.ring.serve(protocol) and not runx.Lookout([guest.ring]).sees_more()


def serve_until_told(protocol, guests, events, acknowledge):
    """Serve their rings until something is written to what acknowledge() is given, after 30 s by us."""
    link, monitor = os.pipe()
    timer = threading.Timer(30, os.write, (monitor, b"end"))
    timer.start()
    channels = SimpleNamespace(fd=events, acknowledge=lambda: acknowledge(monitor))
    runx.serve_rings(protocol, [guest.ring for guest in guests], channels, link)
    timer.cancel()
    os.close(link)
    os.close(monitor)


@pytest.mark.parametrize("last", [0, 1])
def test_what_comes_untold_while_it_goes_to_sleep_is_answered(last):
    guests, protocol, said = [Guest(), Guest()], Echo(), []
    events, writer = os.pipe()

    def set_looks(looks):
        said.append(looks)
        if said == [False]:
            guests[last].ask("late")
        runx.Ring.set_looks(guests[last].ring, looks)

    def acknowledge(monitor):
        said.append([guest.page[OUT_LOOKS] for guest in guests])
        os.write(monitor, b"end")

    guests[last].ring.set_looks = set_looks
    serve_until_told(protocol, guests, events, acknowledge)
    assert (protocol.seen, said) == ([b"late"], [False, [0, 0], True, False])
    os.close(events)
    os.close(writer)


def test_what_comes_soon_is_found_without_an_event_and_without_sleep(monkeypatch):
    guest, protocol = Guest(), Echo()
    events, writer = os.pipe()
    seen, sees_more = [], runx.Lookout.sees_more

    def comes_soon(lookout):
        if len(protocol.seen) < 3:
            guest.ask("soon")
        seen.append(sees_more(lookout))
        return seen[-1]

    monkeypatch.setattr(runx.Lookout, "sees_more", comes_soon)
    guest.ask("first")
    guest.ring.set_looks = lambda looks: seen.append(looks)
    os.write(writer, b"event")
    serve_until_told(protocol, [guest], events, lambda monitor: os.write(monitor, b"end"))
    assert seen[:4] == [True, True, False, False], "found twice, not found, and only then said to sleep"
    assert protocol.seen == [b"first", b"soon", b"soon"]
    os.close(events)
    os.close(writer)


def test_no_reply_is_begun_that_may_have_no_room():
    guest, protocol = Guest(), Echo()
    guest.ask("x" * 3000, "r4090", "last")
    assert guest.ring.serve(protocol) and guest.ring.is_stuck
    assert [text[:1] for text in protocol.seen] == [b"x"]
    assert not guest.ring.serve(protocol), "it does not spin"
    assert guest.replies() == [b"x" * 3000]
    assert guest.ring.serve(protocol) and not guest.ring.is_stuck
    assert guest.replies() == [b"r4090", b"last"]


def test_half_a_request_waits_for_its_rest():
    guest, protocol = Guest(), Echo()
    whole = struct.pack("<I", 10) + b"abcdef"
    for part in (whole[:3], whole[3:9]):
        guest.write(part)
        assert not guest.ring.serve(protocol) and guest.ring.is_stuck
    guest.write(whole[9:])
    guest.ring.serve(protocol)
    assert guest.replies() == [b"abcdef"]


def test_a_head_that_the_guest_changes_meanwhile_is_as_it_was_checked():
    guest, protocol = Guest(), Echo()
    protocol.meanwhile = lambda: guest.data[guest.SIZE : guest.SIZE + 60].__setitem__(slice(None), b"\xff" * 60)
    guest.ask("y" * 70)
    guest.ring.serve(protocol)
    assert guest.replies() == [b"y" * 70]


@pytest.mark.parametrize("length", [0, 1, 7, 4097, 0xFFFFFFFF])
def test_an_impossible_length_ends_it(length):
    guest = Guest()
    guest.write(struct.pack("<I", length) + b"12345678")
    with pytest.raises(runx.Error, match=f"a request of it is {length} bytes long"):
        guest.ring.serve(Echo())


@pytest.mark.parametrize(
    "index, value", [(OUT_PROD, 4097), (OUT_PROD, 0xFFFFFFFF), (IN_CONS, 1), (IN_CONS, 0x80000000)]
)
def test_impossible_indexes_end_it(index, value):
    guest = Guest()
    guest.ask("text")
    guest.page[index] = value
    with pytest.raises(runx.Error, match="the indexes of its ring are impossible"):
        guest.ring.serve(Echo())


def test_our_own_indexes_are_not_the_guests_to_change():
    guest, protocol = Guest(), Echo()
    guest.ask("one!")
    guest.ring.serve(protocol)
    guest.page[OUT_CONS] = guest.page[IN_PROD] = 4000
    guest.ask("two!")
    guest.ring.serve(protocol)
    assert guest.replies() == [b"one!", b"two!"]


def test_a_ring_that_is_too_small_for_a_reply_ends_it():
    guest = Guest()
    guest.ask("r4097")
    with pytest.raises(runx.Error, match="no room for a reply of 4097 bytes"):
        guest.ring.serve(Echo())


def pair():
    guests, protocol = (Guest(), Guest()), Echo()
    guests[0].ring.other, guests[1].ring.other = guests[1].ring, guests[0].ring
    return (*guests, protocol)


def test_what_must_come_last_comes_behind_what_the_other_ring_has():
    first, second, protocol = pair()
    second.ask("write", "owner")
    first.ask("look", "open")
    first.ring.serve(protocol)
    second.ring.serve(protocol)
    assert protocol.seen == [b"look", b"write", b"owner", b"open"]


def test_what_must_come_last_waits_while_the_other_ring_has_no_room():
    first, second, protocol = pair()
    second.ask("x" * 3000, "r4000", "write")
    first.ask("open")
    assert not first.ring.serve(protocol)
    assert (first.replies(), len(second.replies())) == ([], 1)
    second.page[OUT_PROD] -= 9  # "write" comes later
    assert first.ring.serve(protocol)
    second.page[OUT_PROD] += 9
    second.ring.serve(protocol)
    assert [text[:5] for text in protocol.seen] == [b"xxxxx", b"r4000", b"open", b"write"]


def test_a_guest_that_never_pauses_does_not_keep_the_process_beyond_its_monitor():
    served = iter(range(2 * runx.LOOK_EACH))
    ring = SimpleNamespace(serve=lambda protocol: next(served) >= 0, set_looks=lambda looks: None)
    events, writer = os.pipe()
    link, monitor = os.pipe()
    os.close(monitor)
    channels = SimpleNamespace(fd=events, acknowledge=lambda: None)
    runx.serve_rings(Echo(), [ring], channels, link)
    assert next(served) < 2 * runx.LOOK_EACH
    for fd in (events, writer, link):
        os.close(fd)


def test_who_has_acted_for_another_still_ends_with_its_monitor(tmp_path):
    prctl, found = ctypes.CDLL(None).prctl, ctypes.c_int()
    files = runx.Files(os.open(tmp_path, os.O_PATH), 0)
    try:
        assert files.as_asker((1000, 1000), os.geteuid) == 1000
        assert prctl(2, ctypes.byref(found), 0, 0, 0) == 0  # PR_GET_PDEATHSIG
    finally:
        prctl(runx.PR_SET_PDEATHSIG, 0, 0, 0, 0)
    assert found.value == runx.SIGKILL


# ---- the process, on the fake dom0


def served(dom0, *steps, **changes):
    return dom0.container(*steps, annotations={"org.runx.rootfs": "9p"}, **changes)


def server_of(dom0, container):
    """The pid of its process: a child of the monitor's that is not the holder."""
    monitor = container.stored()["monitor"][0]
    (pid,) = (
        pid for pid in dom0.processes()
        if f"\nPPid:\t{monitor}\n" in inside(dom0, pid, "status") and pid != container.pid()
    )  # fmt: skip
    return pid


def inside(dom0, pid, name):
    with open(f"{dom0.inside}/proc/{pid}/{name}") as file:
        return file.read()


def test_the_guest_is_connected_and_at_its_end_the_process_is_gone(dom0):
    container = served(dom0, "out:hello", "exit:3").started()
    assert (container.wait(), container.output()) == (3, "hello")
    assert container.runx("delete").returncode == 0


def fuse(opcode, node, body, user=0):
    """A request of FUSE's, in hexadecimal."""
    return (struct.pack("<IIQQIIII", 40 + len(body), opcode, 7, node, user, user, 1, 0) + body).hex()


INIT = fuse(26, 0, struct.pack("<IIII48x", 7, 40, 131072, 0))


def test_the_guest_finds_its_files_by_the_ring(dom0):
    lookups = [fuse(1, 1, name + b"\0") for name in (b"rootfs", b"..", b"secret")]
    ask = [f"ask:{request}" for request in (INIT, *lookups)]
    container = served(dom0, *ask, "exit:0").started()
    assert container.wait() == 0
    replies = [bytes.fromhex(line) for line in container.output().splitlines()]
    errors = [struct.unpack_from("<IiQ", reply)[1] for reply in replies]
    assert [struct.unpack_from("<IiQ", reply)[2] for reply in replies] == [7] * 4
    assert errors[:3] == [0, 0, -22]
    assert replies[0][16:24] == struct.pack("<II", 7, 40)
    (inode,) = struct.unpack_from("<Q", replies[1], 16 + 40)
    assert inode == (container.bundle / "rootfs").stat().st_ino or inode >> 48
    assert errors[3] == -2 or struct.unpack_from("<Q", replies[3], 16)[0] == 0
    container.runx("delete")


def ninep(kind, body):
    """A message of 9P's, in hexadecimal."""
    return (struct.pack("<IBH", 7 + len(body), kind, 1) + body).hex()


def test_another_kernel_finds_its_files_by_9p_and_two_rings(dom0):
    version = ninep(100, struct.pack("<IH8s", 8192, 8, b"9P2000.L"))
    attach = ninep(104, struct.pack("<IIHHI", 0, 0xFFFFFFFF, 0, 0, 0))
    walk = ninep(110, struct.pack("<IIHH6s", 0, 1, 1, 6, b"rootfs"))
    opened, listed = ninep(12, struct.pack("<II", 1, 0)), ninep(40, struct.pack("<IQI", 1, 0, 4096))
    container = served(dom0, *(f"ask:{request}" for request in (version, attach, walk, opened, listed)), "exit:0")
    (container.bundle / "rootfs/kernel").write_text("theirs")
    spec = json.loads((container.bundle / "config.json").read_text())
    spec["vm"] = {"kernel": {"path": str(container.bundle / "rootfs/kernel")}}
    container.write(spec)
    container.started()
    assert container.wait() == 0
    replies = [bytes.fromhex(line) for line in container.output().splitlines()]
    assert [reply[4] for reply in replies] == [101, 105, 111, 13, 41]
    assert b"\3\0bin" in replies[-1] and b"\6\0kernel" in replies[-1]
    container.runx("delete")


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_another_kernel_gets_no_file_before_hooks_have_done_with_them(dom0, kind):
    """It is the image's, and could put a link where a hook, which is root on dom0, makes a file."""
    container = served(dom0, "exit:0")
    fifo, kernel = container.bundle / "fifo", container.bundle / "rootfs/kernel"
    os.mkfifo(fifo)
    kernel.write_text("theirs")
    spec = json.loads((container.bundle / "config.json").read_text())
    spec["vm"] = {"kernel": {"path": str(kernel)}}
    spec["hooks"] = {kind: [{"path": "/bin/cat", "args": ["cat", str(fifo)]}]}
    container.write(spec)
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    with open(fifo, "w"):  # the hook runs
        home = f"/local/domain/{container.domid()}"
        dom0.ask("await_node", f"{home}/device/9pfs/0/state", runx.XENBUS_INITIALISED)
        dom0.ask("write", f"{home}/data/process/0/ready", "1")
        conftest.wait_in(container.root / container.id, (container.root / container.id / "ready").exists, "its monitor")
        backend = f"/local/domain/0/backend/9pfs/{container.domid()}/0/state"
        assert dom0.ask("nodes")[backend] == runx.XENBUS_INITWAIT
    assert create.wait().returncode == 0
    dom0.ask("await_node", backend, runx.XENBUS_CONNECTED)
    assert container.runx("start").returncode == 0
    assert container.wait() == 0
    container.runx("delete")


def test_the_process_has_nothing_but_the_share(dom0):
    container = served(dom0, "wait").started().ready()
    pid = server_of(dom0, container)
    links = {}
    for fd in runx.os.listdir(f"{dom0.inside}/proc/{pid}/fd"):
        links[int(fd)] = runx.os.readlink(f"{dom0.inside}/proc/{pid}/fd/{fd}")
    assert all(links.pop(fd).endswith("/null") for fd in (0, 1, 2))
    assert sorted(link.partition("[")[0] for link in links.values() if not link.startswith("/")) == ["socket:"] * 2
    files = {link.rpartition("/")[2] for link in links.values() if link.startswith("/")}
    assert files == {"share", "rootfs", "null"}  # mmap keeps the latter instead of what it maps
    mounts = [line.split()[4] for line in inside(dom0, pid, "mountinfo").splitlines()]
    expected = ["/", "/share", "/share/rootfs", "/proc/self/fd", "/proc/self/fdinfo"]
    assert [place for place in mounts if not place.startswith("/share/rootfs/")] == expected
    status = dict(line.split(":\t", 1) for line in inside(dom0, pid, "status").splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], status["Umask"], status["CapInh"]) == ("1", "0000", f"{0:016x}")
    assert int(status["CapEff"], 16) == runx.SERVING_CAPABILITIES
    assert [line.split(":")[0].strip() for line in inside(dom0, pid, "net/dev").splitlines()[2:]] == ["lo"]
    container.runx("delete", "--force")


def test_of_dom0s_proc_the_guest_gets_all_but_the_process_itself(dom0):
    """Which may always write its own memory."""
    volume = {"destination": "/h", "type": "bind", "source": "/proc", "options": ["rbind"]}
    container = served(dom0, "wait", mounts=[volume]).started().ready()
    pid = server_of(dom0, container)
    below = [line.split()[4] for line in inside(dom0, pid, "mountinfo").splitlines() if "/share/mounts/0" in line]
    assert f"/share/mounts/0/{pid}" in below
    container.runx("delete", "--force")


def test_a_proc_of_other_processes_than_dom0s_needs_nothing_hidden(tmp_path):
    share = tmp_path / "share"
    names = ("ours", "theirs")
    for name in names:
        (share / name).mkdir(parents=True)

    def work():
        runx.mount("proc", str(share / "ours"), 0, "proc")
        runx.system_call("unshare", runx.CLONE_NEWPID)
        if not os.fork():
            runx.mount("proc", str(share / "theirs"), 0, "proc")
            os._exit(0)
        os.wait()
        runx.hide_ourselves(str(share))
        return [entry.target for entry in runx.host_mounts() if entry.target.startswith(str(share))], os.getpid()

    mounts, pid = in_own_mounts(work)
    assert mounts == [*(str(share / name) for name in names), f"{share}/ours/{pid}"]


def test_a_process_that_dies_ends_the_container_with_a_sentence(dom0):
    container = served(dom0, "wait").started().ready()
    dom0.signal(server_of(dom0, container), 9)
    assert container.wait() == 255
    assert "its files are not served any more: its process was killed" in container.log_text()
    container.runx("delete")


def test_a_signal_for_all_of_a_cgroup_leaves_the_container_its_files(dom0):
    container = served(dom0, "wait").started().ready()
    for number in runx.RELAYED:
        dom0.signal(server_of(dom0, container), number)
    dom0.signal(container.pid(), 15)
    assert container.wait() == 143, container.log_text()
    container.runx("delete")


def test_a_process_dies_with_its_monitor(dom0):
    """Also when it has taken another's rights for a moment, after which the kernel does not kill it any more."""
    volume = {"destination": "/h", "type": "bind", "source": "/sys", "options": ["rbind"]}
    ask = [INIT, fuse(1, 1, b"mounts\0"), fuse(1, 2, b"0\0"), fuse(3, 3, bytes(16), user=5)]
    steps = [*(f"ask:{request}" for request in ask), "set:data/over=1", "wait"]
    container = served(dom0, *steps, mounts=[volume]).started()
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/over", "1")
    dom0.signal(container.stored()["monitor"][0], 9)
    assert container.wait() == 137
    assert container.runx("delete", "--force").returncode == 0
    dom0.settle()


@pytest.mark.parametrize(
    "steps, sentence",
    [
        (["overrun:999999"], "its files are not served any more: the indexes of its ring are impossible"),
        (["ask:0000000000000000000000000000000000000000000000000000000000000000000000000000000000"],
         "its files are not served any more: a request of it is 0 bytes long"),
        (["hostile:order=40"], "its files are not served any more: the size of its ring is impossible"),
        (["hostile:device/fuse/0/num-rings=2"], "cannot connect to device fuse of domain"),
        (["hostile:device/fuse/0/num-rings=many"], "cannot connect to device fuse of domain"),
        (["hostile:device/fuse/0/ring-ref0=-1"], "cannot connect to device fuse of domain"),
        (["hostile:device/fuse/0/ring-ref0=77"], "its files are not served any more: "),
    ],
)  # fmt: skip
def test_a_guest_that_does_not_keep_to_the_protocol_ends_with_a_sentence(dom0, steps, sentence):
    container = served(dom0, *steps).created()
    result = container.runx("start")
    assert result.returncode == 0 or sentence in result.stderr
    assert container.wait() == 255
    assert sentence in container.log_text() and "internal error" not in container.log_text()
    container.runx("delete")
