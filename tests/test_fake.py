# SPDX-License-Identifier: Apache-2.0
"""The fake dom0's xenstored does what docs/misc/xenstore.txt says, where tests rely on it."""

import struct

import pytest
from fake import xenstored

READ, WATCH, START, END, WRITE, RM, SET_PERMS, EVENT, ERROR = 2, 4, 6, 7, 11, 13, 14, 15, 16


class Client:
    """Speaks the wire protocol with a Connection."""

    def __init__(self, store):
        self.said = b""
        self.connection = xenstored.Connection(store, self.hear)

    def hear(self, data):
        self.said += data

    def ask(self, kind, payload, transaction=0):
        """(type, body) of each message that comes back."""
        for request in self.connection.requests(struct.pack("<IIII", kind, 7, transaction, len(payload)) + payload):
            self.connection.answer(*request)
        messages = []
        while self.said:
            kind, _, _, length = struct.unpack_from("<IIII", self.said)
            messages.append((kind, self.said[16 : 16 + length]))
            self.said = self.said[16 + length :]
        return messages

    def start(self):
        return int(self.ask(START, b"\0")[0][1][:-1])


@pytest.fixture
def store():
    return xenstored.Store()


def test_what_changes_between_makes_a_transaction_fail(store):
    one, two = Client(store), Client(store)
    number = one.start()
    assert one.ask(WRITE, b"/a/b\x00mine", number) == [(WRITE, b"OK\0")]
    assert two.ask(READ, b"/a/b\0") == [(ERROR, b"ENOENT\0")]
    assert two.ask(WRITE, b"/a/b\x00theirs") == [(WRITE, b"OK\0")]
    assert one.ask(END, b"T\0", number) == [(ERROR, b"EAGAIN\0")]
    assert one.ask(READ, b"/a/b\0") == [(READ, b"theirs")]
    number = one.start()
    one.ask(RM, b"/a\0", number)
    assert two.ask(READ, b"/a/b\0") == [(READ, b"theirs")]
    assert one.ask(END, b"T\0", number) == [(END, b"OK\0")]
    assert two.ask(READ, b"/a/b\0") == [(ERROR, b"ENOENT\0")]
    number = one.start()
    one.ask(WRITE, b"/c\0", number)
    assert one.ask(END, b"F\0", number) == [(END, b"OK\0")]
    assert one.ask(READ, b"/c\0") == one.ask(END, b"T\0", number) == [(ERROR, b"ENOENT\0")]


def test_who_removes_what_somebody_else_has_removed_meanwhile_begins_again(store):
    one, two = Client(store), Client(store)
    for mine, theirs in ((b"/a/b", b"/a/b/c"), (b"/a", b"/a/b/c"), (b"/a/b/c", b"/a/b"), (b"/a/b", b"/a/b")):
        one.ask(WRITE, b"/a/b/c\0x")
        number = one.start()
        assert one.ask(WRITE, b"/a/b/mine\0x", number) == [(WRITE, b"OK\0")]
        two.ask(RM, theirs + b"\0")
        assert one.ask(RM, mine + b"\0", number)[0] in [(RM, b"OK\0"), (ERROR, b"ENOENT\0")]
        assert one.ask(END, b"T\0", number) == [(ERROR, b"EAGAIN\0")]
    one.ask(WRITE, b"/a/b/c\0x")
    number = one.start()
    one.ask(RM, b"/a\0", number)
    two.ask(WRITE, b"/a/b/late\0x")
    assert one.ask(RM, b"/a/b/late\0", number) == [(ERROR, b"ENOENT\0")]
    assert one.ask(END, b"T\0", number) == [(ERROR, b"EAGAIN\0")]


def test_a_watch_fires_when_it_is_made_and_at_each_change_below(store):
    client, other = Client(store), Client(store)
    assert client.ask(WATCH, b"/a\0token\0") == [(WATCH, b"OK\0"), (EVENT, b"/a\0token\0")]
    other.ask(WRITE, b"/a/b\x001")
    other.ask(WRITE, b"/ab\x001")
    number = other.start()
    other.ask(WRITE, b"/a/c\x001", number)
    other.ask(END, b"T\0", number)
    other.ask(RM, b"/a\0")
    messages = client.ask(READ, b"/none\0")
    assert [body for _, body in messages] == [b"/a/b\0token\0", b"/a/c\0token\0", b"/a\0token\0", b"ENOENT\0"]
    assert client.ask(WATCH, b"@releaseDomain\0x\0")[1] == (EVENT, b"@releaseDomain\0x\0")
    store.fire("@releaseDomain")
    assert client.ask(READ, b"/none\0")[0] == (EVENT, b"@releaseDomain\0x\0")


def test_a_guest_reads_and_writes_what_it_may(store):
    client = Client(store)
    for path, perms in ((b"/mine", b"n5"), (b"/told", b"n0\0r5"), (b"/theirs", b"n0"), (b"/all", b"r0")):
        client.ask(WRITE, path + b"\0x")
        assert client.ask(SET_PERMS, path + b"\0" + perms + b"\0") == [(SET_PERMS, b"OK\0")]
    assert [store.read(path, 5) for path in ("/mine", "/told", "/all")] == [b"x"] * 3
    store.write("/mine/below", b"y", 5)
    assert store.nodes["/mine/below"].perms == ["n5"]
    for refused in (
        lambda: store.read("/theirs", 5), lambda: store.write("/told", b"y", 5), lambda: store.remove("/told", 5),
        lambda: store.write("/theirs/new", b"y", 5), lambda: store.read("/mine", 6),
        lambda: store.set_perms("/told", ["n5"], 5),
    ):  # fmt: skip
        with pytest.raises(xenstored.Refused, match="EACCES"):
            refused()


def test_a_guest_has_a_quota_and_dom0_has_none(store):
    store.write("/mine", b"")
    store.set_perms("/mine", ["n5"])
    with pytest.raises(xenstored.Refused, match="ENOSPC"):
        store.write("/mine/large", bytes(xenstored.SIZE_MAX + 1), 5)
    for number in range(xenstored.NODES_MAX - 1):
        store.write(f"/mine/{number}", b"", 5)
    with pytest.raises(xenstored.Refused, match="ENOSPC"):
        store.write("/mine/more", b"", 5)
    store.write("/mine/more", b"")


@pytest.mark.parametrize("path", [b"/a//b", b"/a/", b"/a b", b"/\xff", b"/" + b"a" * 4000])
def test_paths_that_are_none(store, path):
    assert Client(store).ask(READ, path + b"\0") == [(ERROR, b"EINVAL\0")]
