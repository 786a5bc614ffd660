# SPDX-License-Identifier: Apache-2.0
"""A xenstored: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt, in memory.

Store has the nodes, with permissions, transactions and watches; Connection speaks the wire protocol with one client.
"""

import errno
import struct

(DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, TRANSACTION_START, TRANSACTION_END) = range(1, 8)
(GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR) = range(10, 17)
GET_FEATURE = 23
NAMES = {
    DIRECTORY: "directory", READ: "read", GET_PERMS: "get_perms", WATCH: "watch", UNWATCH: "unwatch",
    TRANSACTION_START: "transaction_start", TRANSACTION_END: "transaction_end", GET_DOMAIN_PATH: "get_domain_path",
    WRITE: "write", MKDIR: "mkdir", RM: "rm", SET_PERMS: "set_perms",
    GET_FEATURE: "get_feature",
}  # fmt: skip
HEADER = struct.Struct("<IIII")  # type, req_id, tx_id, length
PAYLOAD_MAX, PATH_MAX = 4096, 3072  # bytes, XENSTORE_PAYLOAD_MAX and XENSTORE_ABS_PATH_MAX
ALLOWED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_@")
NODES_MAX, SIZE_MAX, TRANSACTIONS_MAX = 1000, 2048, 10  # the quota of a guest; the last of any connection
SPECIAL = ("@introduceDomain", "@releaseDomain")
WATCHDEPTH = 4


class Refused(Exception):
    """What a client gets instead of an answer: the name of an errno."""


class Node:
    """value: bytes; perms: such as ["n0", "r5"], the owner's first; changed: the store's count at its last change."""

    def __init__(self, value, perms, changed):
        self.value, self.perms, self.changed, self.children = value, perms, changed, set()

    def copy(self):
        node = Node(self.value, list(self.perms), self.changed)
        node.children = set(self.children)
        return node

    def allows(self, domid, letter):
        """Whether a domain may read (r) or write (w) it."""
        if domid in (0, int(self.perms[0][1:])):
            return True
        mine = next((entry[0] for entry in self.perms[1:] if int(entry[1:]) == domid), self.perms[0][0])
        return mine in (letter, "b")


class Transaction:
    """Nodes as somebody sees and has made them; used: the counts of all that it depends on."""

    def __init__(self):
        self.nodes, self.used, self.fired = {}, {}, []


class Store:
    def __init__(self):
        self.count, self.nodes = 0, {"/": Node(b"", ["n0"], 0)}
        self.watches = []  # (path, domid, call(path))
        self.features = 0  # XENSTORE_SERVER_FEATURE_...; 0: one that does not know the question

    # ---- nodes, in a transaction or none

    def find(self, path, transaction=None):
        if transaction is None:
            return self.nodes.get(path)
        if path in transaction.nodes:
            return transaction.nodes[path]
        node = self.nodes.get(path)
        transaction.used.setdefault(path, node.changed if node else None)
        return node

    def change(self, path, transaction):
        """The node, to be changed."""
        node = self.find(path, transaction)
        if transaction is None:
            self.count += 1
            node.changed = self.count
        elif path not in transaction.nodes:
            node = transaction.nodes[path] = node.copy()
        return node

    def get(self, path, domid, letter, transaction=None):
        """The node; Refused as a xenstored would."""
        node = self.find(path, transaction)
        if node is None:
            raise Refused("ENOENT" if self.may_know(path, domid, transaction) else "EACCES")
        if not node.allows(domid, letter):
            raise Refused("EACCES")
        return node

    def may_know(self, path, domid, transaction):
        while self.find(path, transaction) is None:
            path = parent(path)
        return self.find(path, transaction).allows(domid, "r")

    def read(self, path, domid=0, transaction=None):
        return self.get(path, domid, "r", transaction).value

    def list(self, path, domid=0, transaction=None):
        return sorted(self.get(path, domid, "r", transaction).children)

    def write(self, path, value, domid=0, transaction=None):
        if domid and len(value) > SIZE_MAX:
            raise Refused("ENOSPC")
        self.make(path, domid, transaction)
        self.change(path, transaction).value = value
        self.fire(path, transaction)

    def mkdir(self, path, domid=0, transaction=None):
        if self.find(path, transaction) is None:
            self.make(path, domid, transaction)
            self.fire(path, transaction)

    def make(self, path, domid, transaction):
        """The node, and those above it."""
        node = self.find(path, transaction)
        if node is not None:
            if not node.allows(domid, "w"):
                raise Refused("EACCES")
            return
        above = parent(path)
        self.make(above, domid, transaction)
        if domid and sum(int(node.perms[0][1:]) == domid for node in self.nodes.values()) >= NODES_MAX:
            raise Refused("ENOSPC")
        perms = list(self.find(above, transaction).perms)
        if domid:
            perms[0] = f"{perms[0][0]}{domid}"
        self.count += 1
        node = Node(b"", perms, self.count)
        if transaction is None:
            self.nodes[path] = node
        else:
            transaction.nodes[path] = node
        self.change(above, transaction).children.add(path.rpartition("/")[2])

    def remove(self, path, domid=0, transaction=None):
        if path == "/":
            raise Refused("EINVAL")
        node, above = self.find(path, transaction), self.find(parent(path), transaction)
        if above is None:  # which may be so also of one that has been made since, where a transaction has removed that
            raise Refused("ENOENT")
        if node is None:
            return  # as xenstored does: it is no error if only the last is missing
        if not node.allows(domid, "w"):
            raise Refused("EACCES")
        self.change(parent(path), transaction).children.discard(path.rpartition("/")[2])
        self.drop(path, transaction)
        self.fire(path, transaction, below=True)

    def drop(self, path, transaction):
        node = self.find(path, transaction)
        if node is None:
            return  # removed since the transaction has changed what is above it: that will fail
        for name in node.children:
            self.drop(f"{path}/{name}", transaction)
        if transaction is None:
            self.count += 1
            del self.nodes[path]
        else:
            transaction.nodes[path] = None

    def set_perms(self, path, perms, domid=0, transaction=None):
        node = self.get(path, domid, "w", transaction)
        if domid not in (0, int(node.perms[0][1:])):
            raise Refused("EACCES")
        self.change(path, transaction).perms = list(perms)
        self.fire(path, transaction)

    # ---- transactions

    def commit(self, transaction):
        """Makes what is in it everybody's, or raises Refused EAGAIN."""
        for path, changed in transaction.used.items():
            node = self.nodes.get(path)
            if (node.changed if node else None) != changed:
                raise Refused("EAGAIN")
        self.count += 1
        for path, node in transaction.nodes.items():
            if node is None:
                self.nodes.pop(path, None)
            else:
                node.changed = self.count
                self.nodes[path] = node
        for path, below in transaction.fired:
            self.fire(path, None, below)

    # ---- watches

    def watch(self, path, domid, call):
        """Fires once when it is made."""
        self.watches.append((path, domid, call))
        call(path)

    def release(self, domid):
        """Tells of a domain's end; a watch for one domain's alone is never told by a xenstored without WATCHDEPTH."""
        self.fire("@releaseDomain")
        if self.features & WATCHDEPTH:
            self.fire(f"@releaseDomain/{domid}")

    def unwatch(self, call):
        self.watches = [watch for watch in self.watches if watch[2] != call]

    def fire(self, path, transaction=None, below=False):
        """Tells who watches path, or a node above it, or, if it is removed with all below it, one of those."""
        if transaction is not None:
            transaction.fired.append((path, below))
            return
        for watched, domid, call in list(self.watches):
            node = self.nodes.get(path)
            if domid and node is not None and not node.allows(domid, "r"):
                continue
            if watched == path or path.startswith(watched.rstrip("/") + "/") and not path.startswith("@"):
                call(path)
            elif below and watched.startswith(path + "/"):
                call(watched)


def parent(path):
    return path.rpartition("/")[0] or "/"


class Connection:
    """One client, a process of dom0's.  Gets bytes, gives bytes."""

    def __init__(self, store, send):
        self.store, self.send, self.received = store, send, b""
        self.transactions, self.next, self.watches = {}, 1, {}

    def requests(self, data):
        """(type, req_id, tx_id, payload) of each request that is complete with this data."""
        self.received += data
        while len(self.received) >= HEADER.size:
            kind, request, number, length = HEADER.unpack_from(self.received)
            if len(self.received) < HEADER.size + length:
                return
            payload = self.received[HEADER.size : HEADER.size + length]
            self.received = self.received[HEADER.size + length :]
            yield kind, request, number, payload

    def answer(self, kind, request, number, payload):
        try:
            if len(payload) > PAYLOAD_MAX:
                raise Refused("E2BIG")
            body = self.do(kind, number, payload)
            if len(body) > PAYLOAD_MAX:
                raise Refused("E2BIG")
        except Refused as refusal:
            self.refuse(request, number, str(refusal))
            return
        self.send(HEADER.pack(kind, request, number, len(body)) + body)
        if kind == WATCH:  # which fires when its maker knows of it
            path, token = strings(payload)[:2]
            self.store.watch(absolute(path), 0, self.watches[path, token])

    def refuse(self, request, number, code):
        assert hasattr(errno, code), code
        body = code.encode() + b"\0"
        self.send(HEADER.pack(ERROR, request, number, len(body)) + body)

    def do(self, kind, number, payload):
        """The body of the answer."""
        if kind == TRANSACTION_START:
            if len(self.transactions) >= TRANSACTIONS_MAX:
                raise Refused("ENOSPC")
            number, self.next = self.next, self.next + 1
            self.transactions[number] = Transaction()
            return b"%d\0" % number
        if number and number not in self.transactions:
            raise Refused("ENOENT")
        transaction = self.transactions.get(number)
        if kind == TRANSACTION_END:
            if payload not in (b"T\0", b"F\0") or transaction is None:
                raise Refused("EINVAL")
            del self.transactions[number]
            if payload == b"T\0":
                self.store.commit(transaction)
            return b"OK\0"
        if kind == GET_FEATURE and self.store.features:
            return b"%d\0" % self.store.features
        path, _, rest = payload.partition(b"\0")
        path = path.decode("ascii", "replace")
        if kind in (WATCH, UNWATCH):
            return self.do_watch(kind, path, rest)
        path = absolute(path)
        if kind == WRITE:
            self.store.write(path, rest, 0, transaction)
        elif kind == MKDIR:
            self.store.mkdir(path, 0, transaction)
        elif kind == RM:
            self.store.remove(path, 0, transaction)
        elif kind == SET_PERMS:
            perms = [entry.decode() for entry in rest.split(b"\0") if entry]
            if not perms or not all(entry[0] in "nrwb" and entry[1:].isdecimal() for entry in perms):
                raise Refused("EINVAL")
            self.store.set_perms(path, perms, 0, transaction)
        elif kind == READ:
            return self.store.read(path, 0, transaction)
        elif kind == DIRECTORY:
            return "".join(name + "\0" for name in self.store.list(path, 0, transaction)).encode()
        elif kind == GET_PERMS:
            return "".join(entry + "\0" for entry in self.store.get(path, 0, "r", transaction).perms).encode()
        else:
            raise Refused("ENOSYS")
        return b"OK\0"

    def do_watch(self, kind, path, rest):
        token = rest.rstrip(b"\0").decode()
        if kind == WATCH:
            absolute(path)
            if (path, token) in self.watches:
                raise Refused("EEXIST")
            special = path.startswith("@")

            def fired(changed):
                changed = changed if special or path.startswith("/") else changed.removeprefix("/local/domain/0/")
                body = f"{changed}\0{token}\0".encode()
                self.send(HEADER.pack(WATCH_EVENT, 0, 0, len(body)) + body)

            self.watches[path, token] = fired
        else:
            if (path, token) not in self.watches:
                raise Refused("ENOENT")
            self.store.unwatch(self.watches.pop((path, token)))
        return b"OK\0"

    def close(self):
        for fired in self.watches.values():
            self.store.unwatch(fired)


def strings(payload):
    return payload.decode("ascii", "replace").split("\0")


def absolute(path):
    """A path as the store has it; Refused if there can be none."""
    if path.partition("/")[0] in SPECIAL:
        return path
    if not path.startswith("/"):
        path = f"/local/domain/0/{path}"
    if path != "/" and path.endswith("/") or "//" in path or not set(path) <= ALLOWED or len(path) > PATH_MAX:
        raise Refused("EINVAL")
    return path
