# SPDX-License-Identifier: Apache-2.0
"""Xen's side of the fake dom0, in one process without threads: xenstored, the hypervisor behind xl, the guests.

A test tells it by lines of JSON what is to fail, and asks what it sees.  Whenever anything has come in, all guests go
on until they wait again.
"""

import errno
import json
import os
import selectors
import signal
import socket
import struct
import traceback
import tty

from . import netback, xenstored
from .guest import Guest
from .xl import Xl

FOLDER = "/run/fake"  # sockets and grants
XENSTORED = "/run/xenstored/socket"
FREE_MEMORY = 4096  # MiB


class Machine:
    """A domain."""

    def __init__(self, xen, domid, settings):
        self.xen, self.domid, self.settings = xen, domid, settings
        self.name, self.uuid = settings["name"], settings["uuid"]
        self.memory, self.vcpus = settings["memory"], settings["vcpus"]
        self.pauses, self.end, self.dying = 1, None, False
        self.guest, self.time, self.pty = None, 1.5, None
        self.home, self.told = f"/local/domain/{domid}", {}

    def ended(self):
        return self.end is not None

    # ---- what the guest can do

    def read(self, node):
        return self.read_absolute(f"{self.home}/{node}")

    def read_absolute(self, path):
        try:
            return self.xen.store.read(path, self.domid).decode("utf-8", "replace")
        except xenstored.Refused:
            return None

    def list(self, node):
        try:
            return self.xen.store.list(f"{self.home}/{node}", self.domid)
        except xenstored.Refused:
            return []

    def write(self, node, value):
        self.xen.store.write(f"{self.home}/{node}", value.encode("utf-8", "surrogateescape"), self.domid)

    def remove(self, node):
        self.xen.store.remove(f"{self.home}/{node}", self.domid)

    def grant(self, reference):
        return f"{FOLDER}/grants/{self.domid}-{reference}"

    def notify(self, port):
        self.xen.notify(self.domid, port)

    def say(self, text):
        os.write(self.pty[0], text.encode())

    def shut_down(self, reason):
        self.end = reason
        self.xen.store.release(self.domid)


class Fault:
    """What goes wrong at the nth call from now: how, and whether the call is done before."""

    def __init__(self, what, nth, how, after=False, match=""):
        self.what, self.left, self.how, self.after, self.match = what, nth, how, after, match

    def strikes(self, what, text):
        if self.what != what or self.match not in text:
            return False
        self.left -= 1
        return self.left == 0


class Xen:
    def __init__(self, test):
        self.store, self.domains, self.next_domid = xenstored.Store(), {}, 1
        self.faults, self.calls, self.held, self.waiting = [], {"xenstore": [], "xl": []}, [], []
        self.slow = []  # what is done when the test has time
        self.free_memory, self.scheduler, self.ports = FREE_MEMORY, "credit2", {}
        self.selector, self.test, self.lines = selectors.DefaultSelector(), test, b""
        self.xl, self.backends = Xl(self), netback.Backends(self)
        self.selector.register(test, selectors.EVENT_READ, self.take_command)
        self.listen(XENSTORED, socket.SOCK_STREAM, self.new_client)
        self.listen(f"{FOLDER}/xl", socket.SOCK_SEQPACKET, self.new_xl)
        self.listen(f"{FOLDER}/evtchn", socket.SOCK_SEQPACKET, self.new_channels)
        for path, value in (("/local/domain/0/domid", b"0"), ("/local/domain/0/name", b"Domain-0"), ("/vm", b""),
                            ("/libxl", b""), ("/local/domain/0/backend", b"")):  # fmt: skip
            self.store.write(path, value)
        self.backends.start()

    def listen(self, path, kind, accept):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(path)
        listener.listen(64)
        self.selector.register(listener, selectors.EVENT_READ, lambda: accept(listener.accept()[0]))

    def serve(self):
        while True:
            for key, _ in self.selector.select():
                key.data()
            self.go_on()
            for wait in list(self.waiting):
                if wait():
                    self.waiting.remove(wait)

    def go_on(self):
        self.backends.work()
        for machine in list(self.domains.values()):
            if machine.guest and not machine.pauses and not machine.ended():
                try:
                    machine.guest.run()
                except Exception:  # which no test has asked for
                    traceback.print_exc()
                    machine.shut_down("c")

    # ---- faults

    def fault(self, what, text):
        """The Fault that strikes this call, or None; every call is kept for the test."""
        self.calls[what].append(text)
        struck = [fault for fault in self.faults if fault.strikes(what, text)]
        self.faults = [fault for fault in self.faults if fault not in struck]
        return struck[0] if struck else None

    # ---- xenstored's clients

    def new_client(self, client):
        def close():
            connection.close()
            self.drop(client)

        def take():
            data = receive(client)
            if not data:
                return close()
            for kind, *request in connection.requests(data):
                text = f"{xenstored.NAMES.get(kind, kind)} {request[2].partition(chr(0).encode())[0].decode()}"
                fault = self.fault("xenstore", text)
                if fault and fault.how == "destroy":
                    self.destroy_all()
                    fault = None
                if fault is None or fault.after:
                    connection.answer(kind, *request)
                if fault is None:
                    continue
                if fault.how == "kill":
                    os.kill(peer(client)[0], signal.SIGKILL)
                if fault.how in ("kill", "close"):
                    return close()
                if fault.how == "hang":
                    self.held.append(client)
                elif not fault.after:
                    connection.refuse(*request[:2], fault.how)
                    if kind == xenstored.TRANSACTION_END:
                        connection.transactions.pop(request[1], None)  # a conflict ends it, too
            return None

        def send(message):
            try:
                client.sendall(message)
            except OSError:
                pass  # it has just ended

        connection = xenstored.Connection(self.store, send)
        self.selector.register(client, selectors.EVENT_READ, take)

    def drop(self, client):
        self.selector.unregister(client)
        client.close()

    # ---- xl

    def new_xl(self, client):
        def take():
            data = receive(client)
            self.selector.unregister(client)
            if not data:
                return client.close()
            caller, *words = data.decode("utf-8", "surrogateescape").split("\0")
            fault = self.fault("xl", " ".join(words))
            if fault and fault.how == "slow":
                self.slow.append(lambda: self.answer_xl(client, caller, words, None))
            else:
                self.answer_xl(client, caller, words, fault)
            return None

        self.selector.register(client, selectors.EVENT_READ, take)

    def answer_xl(self, client, caller, words, fault):
        answer = (0, "", "")
        if fault is None or fault.after:
            answer = self.xl.run(words)
        if fault and fault.how == "kill":
            os.kill(int(caller), signal.SIGKILL)
        if fault and fault.how == "hang":
            self.held.append(client)
            return
        if fault and fault.how not in ("kill", "nothing"):
            answer = (1, "", f"libxl: error: libxl_fake.c:1:fake: Domain 1:{fault.how}\n")
        try:
            client.sendall("\0".join(map(str, answer)).encode())
        except OSError:
            pass  # who has asked was killed
        client.close()

    # ---- event channels: a client for each process that has /dev/xen/evtchn open

    def new_channels(self, client):
        def take():
            data = receive(client)
            if not data:
                for key in [key for key, other in self.ports.items() if other is client]:
                    del self.ports[key]
                return self.drop(client)
            verb, domid, port = struct.unpack("=cII", data)
            if verb == b"b":
                self.ports[domid, port] = client
                self.notify(domid, port)  # a channel that has just been bound is pending
            return None

        self.selector.register(client, selectors.EVENT_READ, take)

    def notify(self, domid, port):
        client = self.ports.get((domid, port))
        if client:
            try:
                client.send(b"e", socket.MSG_DONTWAIT)
            except OSError:
                pass  # as many as it can hold are waiting: it will look

    # ---- what a test asks

    def take_command(self):
        data = receive(self.test)
        if not data:
            os._exit(0)
        *lines, self.lines = (self.lines + data).split(b"\n")
        for line in lines:
            name, *args = json.loads(line)
            try:
                answer = getattr(self, f"test_{name}")(*args)
            except Exception as error:
                answer = {"failed": repr(error)}
            if callable(answer):
                self.wait(answer)
            else:
                self.answer(answer)

    def answer(self, value):
        self.test.sendall(json.dumps(value).encode() + b"\n")

    def wait(self, condition):
        """Answers the test once condition() is true."""

        def wait():
            found = condition()
            if found:
                self.answer(found)
            return found

        self.waiting.append(wait)

    def test_fail(self, what, nth, how, after=False, match=""):
        assert how in ("hang", "close", "kill", "nothing", "destroy") or what != "xenstore" or hasattr(errno, how)
        self.faults.append(Fault(what, nth, how, after, match))

    def test_forget(self):
        """Faults, calls and what hangs; returns the calls, and how many faults have not struck."""
        calls, self.calls = {**self.calls, "to come": len(self.faults)}, {"xenstore": [], "xl": []}
        self.faults.clear()
        for client in self.held:
            try:
                self.selector.unregister(client)
            except (KeyError, ValueError):
                pass
            client.close()
        self.held.clear()
        self.free_memory = FREE_MEMORY
        return calls

    def test_release(self):
        """Has what is slow be done."""
        while self.slow:
            self.slow.pop(0)()

    def test_calls(self):
        return self.calls

    def test_nodes(self):
        return {path: node.value.decode("utf-8", "replace") for path, node in self.store.nodes.items()}

    def test_perms(self, path):
        return self.store.nodes[path].perms

    def test_write(self, path, value):
        self.store.write(path, value.encode())

    def test_remove(self, path):
        self.store.remove(path)

    def test_domains(self):
        return {
            domid: {
                "name": machine.name, "uuid": machine.uuid, "paused": bool(machine.pauses), "end": machine.end,
                "memory": machine.memory, "vcpus": machine.vcpus, "settings": machine.settings, "told": machine.told,
            } for domid, machine in self.domains.items()
        }  # fmt: skip

    def test_guest(self, domid):
        guest = self.domains[domid].guest
        return {
            "records": [[keyword, repr(operands) if keyword == "file_capability" else operands]
                        for keyword, operands in guest.records],
            "files": sorted(guest.files), "signals": guest.signals, "asked": guest.asked,
            "others": {
                number: {"records": process.records, "signals": process.signals, "sizes": process.sizes}
                for number, process in guest.others.items()
            },
        }  # fmt: skip

    def test_await_node(self, path, value=None):
        def there():
            node = self.store.nodes.get(path)
            return node is not None and (value is None or node.value.decode() == value)

        return there

    def test_await_calls(self, what, text, count=1):
        return lambda: sum(text in call for call in self.calls[what]) >= count

    def test_await_asked(self, domid, request):
        return lambda: request in self.domains[domid].guest.asked

    def test_destroy(self, domid):
        """As somebody does by hand."""
        self.xl.run(["destroy", str(domid)])

    def test_say(self, domid, text):
        self.domains[domid].say(text)

    def test_hears(self, domid, text):
        """Waits until that is typed at the first console."""
        fd, heard = self.domains[domid].pty[0], b""
        while text.encode() not in heard:
            heard += os.read(fd, 4096)

    def test_end(self, domid, reason):
        self.domains[domid].shut_down(reason)

    def test_deaf(self, deaf):
        """Whether dom0's kernel has no backends."""
        self.backends.deaf, self.backends.changed = deaf, True

    def test_memory(self, free):
        self.free_memory = free

    def test_scheduler(self, name):
        self.scheduler = name

    def test_features(self, features):
        """What xenstored can do: XENSTORE_SERVER_FEATURE_..."""
        self.store.features = features

    def test_watched(self):
        return [path for path, _, _ in self.store.watches]

    def test_reset(self):
        """An empty dom0, whatever was there."""
        self.store.features, self.scheduler = 0, "credit2"
        self.destroy_all()
        for path in ("/local/domain/0/backend", "/libxl", "/vm", "/local/domain/0/error"):
            for name in self.store.list(path) if path in self.store.nodes else ():
                self.store.remove(f"{path}/{name}")

    # ---- domains

    def destroy_all(self):
        for domid in list(self.domains):
            self.xl.run(["destroy", str(domid)])

    def make_domain(self, settings, ramdisk):
        """A paused domain as libxl leaves it."""
        domid = self.next_domid
        self.next_domid += 1
        machine = self.domains[domid] = Machine(self, domid, settings)
        machine.pty = os.openpty()
        tty.setraw(machine.pty[1])
        if ramdisk is not None:
            machine.guest = Guest(machine, ramdisk)
        return machine


def receive(client):
    try:
        return client.recv(1 << 16)
    except OSError:
        return b""


def peer(client):
    """(pid, uid, gid) of the process at the other end."""
    return struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
