# SPDX-License-Identifier: Apache-2.0
"""A guest: what initrd/ does in a VM, as far as dom0 can see it, and what a hostile VM might do instead.

It reads /container/config from its ramdisk, as init would, and "executes" the container's process: whose arguments
are the steps of a script.  `guest out:hello exit:3` says hello and ends; `guest early:end:c` crashes while it boots,
and `guest begun:end:c` after `start`, before the process is there.  A step is a generator that yields whenever it
waits, and is continued whenever anything has happened.
"""

import gzip
import mmap
import struct

INITIALISED, CONNECTED, CLOSED = "3", "4", "6"  # xenbus states
IN_SIZE, OUT_SIZE = 1024, 2048  # bytes of a console's two rings
IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = range(4)
HARMLESS = {0, 17, 18, 23, 28}  # signals that end nothing: CHLD, CONT, URG, WINCH

# the operands of each keyword of /container/config, beside those that say how many they have: container.c, keywords[]
OPERANDS = {
    "mount": 5, "copy_up": 5, "node": 6, "link": 2, "terminal": 0, "plain_terminal": 0, "mask": 1, "readonly": 1,
    "resolv_conf": 0, "propagation": 2, "sysctl": 2, "hostname": 1, "domainname": 1, "rlimit": 3, "oom": 1, "ioprio": 1,
    "scheduler": 7, "user": 3, "group": 1, "capabilities": 5, "no_new_privileges": 0, "personality": 1, "cwd": 1,
    "arg": 1, "env": 1, "state": 1,
}  # fmt: skip


def archives(data):
    """{name: (mode, content)} of each archive in a ramdisk, the last, packed one too."""
    while data:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        members, position = {}, 0
        while True:
            if data[position : position + 6] != b"070701":
                raise ValueError(f"no cpio header at {position}: {data[position : position + 20]!r}")
            fields = [int(data[position + start : position + start + 8], 16) for start in range(6, 110, 8)]
            mode, size, length = fields[1], fields[6], fields[11]
            name = data[position + 110 : position + 110 + length - 1].decode("utf-8", "surrogateescape")
            start = position + 110 + length
            start += -start % 4
            position = start + size + -size % 4
            if name == "TRAILER!!!":
                break
            members[name] = (mode, data[start : start + size])
        yield members
        data = data[position:].lstrip(b"\0")


def parse_config(content):
    """The records of /container/config: (keyword, operands).  ValueError where container.c would not understand it."""
    if not content.endswith(b"\0"):
        raise ValueError("the config does not end with a NUL")
    words = iter(content[:-1].decode("utf-8", "surrogateescape").split("\0"))
    records = [("flags", [int(next(words))])]
    for keyword in words:
        if keyword in OPERANDS:
            operands = [next(words) for _ in range(OPERANDS[keyword])]
        elif keyword == "file_capability":
            path, length = next(words), int(next(words))
            operands = [path, bytes(int(next(words)) for _ in range(length))]
        elif keyword == "cgroup":
            operands = [(next(words), next(words)) for _ in range(int(next(words)))]
        elif keyword == "seccomp":
            flags, count = int(next(words)), int(next(words))
            operands = [flags, [tuple(int(next(words)) for _ in range(4)) for _ in range(count)]]
        elif keyword == "hook":
            path, timeout = next(words), int(next(words))
            args = [next(words) for _ in range(int(next(words)))]
            operands = [path, timeout, args, [next(words) for _ in range(int(next(words)))]]
        else:
            raise ValueError(f"unknown keyword {keyword!r}")
        records.append((keyword, operands))
    return records


class Ended(Exception):
    """The process has ended with a status."""


class Frontend:
    """A device of `guest` at `node`; told() is what it tells its backend before they connect."""

    def connect(self):
        guest = self.guest
        for key, value in {**self.told(), "state": INITIALISED}.items():
            guest.write(f"{self.node}/{key}", guest.hostile.get(f"{self.node}/{key}", str(value)))
        backend = guest.read(f"{self.node}/backend")
        yield from guest.until(lambda: guest.read_absolute(f"{backend}/state") == CONNECTED)
        guest.write(f"{self.node}/state", CONNECTED)

    def close(self):
        guest = self.guest
        backend = guest.read(f"{self.node}/backend")
        guest.write(f"{self.node}/state", CLOSED)
        yield from guest.until(lambda: guest.read_absolute(f"{backend}/state") in (CLOSED, None))


class Console(Frontend):
    """The frontend of a console (xen/include/public/io/console.h)."""

    def __init__(self, guest, number, start=0):
        """start: what the free-running indexes of its rings begin with."""
        self.guest, self.number, self.node = guest, number, f"device/console/{number}"
        self.reference, self.port = 8 + number, 20 + number
        self.path = guest.grant(self.reference)
        with open(self.path, "w+b") as file:
            file.truncate(4096)
            self.page = mmap.mmap(file.fileno(), 4096)
        self.indexes = memoryview(self.page)[3072:3088].cast("I")
        for number in range(4):
            self.indexes[number] = start

    def told(self):
        return {"ring-ref": self.reference, "port": self.port}

    def put(self, data):
        while data:
            produced = self.indexes[OUT_PROD]
            room = OUT_SIZE - (produced - self.indexes[OUT_CONS] & 0xFFFFFFFF)
            if not room:
                yield
                continue
            part, data = data[:room], data[room:]
            for at, byte in enumerate(part):
                self.page[1024 + (produced + at) % OUT_SIZE] = byte
            self.indexes[OUT_PROD] = produced + len(part) & 0xFFFFFFFF
            self.guest.notify(self.port)

    def drained(self):
        return self.indexes[OUT_PROD] == self.indexes[OUT_CONS]

    def take(self):
        consumed, produced = self.indexes[IN_CONS], self.indexes[IN_PROD]
        data = bytes(self.page[at % IN_SIZE] for at in range(consumed, consumed + (produced - consumed & 0xFFFFFFFF)))
        if data:
            self.indexes[IN_CONS] = produced
            self.guest.notify(self.port)
        return data


class Ring:
    """One of those between a guest and what serves its share (xen/include/public/io/9pfs.h)."""

    ORDER = 6

    def __init__(self, guest, number):
        self.guest, self.size, self.taken = guest, 4096 << self.ORDER - 1, b""
        self.reference, self.port = 100 * (1 + number), 140 + number
        self.indexes = memoryview(self.pages(self.reference, 1)).cast("I")
        self.data = self.pages(self.reference + 1, 1 << self.ORDER)
        self.indexes[32] = int(guest.hostile.get("order", self.ORDER))
        for page in range(1 << self.ORDER):
            self.indexes[33 + page] = self.reference + 1 + page

    def pages(self, reference, count):
        with open(self.guest.grant(reference), "w+b") as file:
            file.truncate(4096 * count)
            return mmap.mmap(file.fileno(), 4096 * count)

    def put(self, request):
        """There is room: only one is under way."""
        produced = self.indexes[17]
        for at, byte in enumerate(request):
            self.data[self.size + (produced + at) % self.size] = byte
        self.indexes[17] = produced + len(request) & 0xFFFFFFFF
        self.guest.notify(self.port)

    def take(self):
        """The reply, once it is whole."""
        while True:
            consumed, produced = self.indexes[0], self.indexes[1]
            self.taken += bytes(self.data[at % self.size] for at in range(consumed, produced))
            self.indexes[0] = produced
            if len(self.taken) >= 4 and len(self.taken) >= struct.unpack_from("<I", self.taken)[0]:
                reply, self.taken = self.taken, b""
                return reply
            yield


class Share(Frontend):
    """The frontend: of runX's own kernel, or of another, which has two rings."""

    def __init__(self, guest, kind):
        self.guest, self.node = guest, f"device/{kind}/0"
        self.rings = [Ring(guest, number) for number in range(2 if kind == "9pfs" else 1)]

    def told(self):
        nodes = {"version": 1, "num-rings": len(self.rings)}
        for number, ring in enumerate(self.rings):
            nodes.update({f"ring-ref{number}": ring.reference, f"event-channel-{number}": ring.port})
        return nodes


class Guest:
    """machine: its domain, with read, write, remove, grant, notify and shut_down of the hypervisor's."""

    def __init__(self, machine, ramdisk):
        self.prepare(machine, 0)
        self.others = {}  # the processes of `runX exec`, by number
        self.files = {}
        for archive in archives(ramdisk):
            for name, member in archive.items():
                self.files.setdefault(name, member)
        self.records = parse_config(self.files["container/config"][1])
        self.script = [operands[0] for keyword, operands in self.records if keyword == "arg"][1:]
        self.terminal = self.has_terminal()
        self.life = self.live()

    def prepare(self, machine, number):
        """What every process has."""
        self.machine, self.number, self.hostile, self.signals, self.asked = machine, number, {}, [], []
        self.read, self.write, self.remove = machine.read, machine.write, machine.remove
        self.read_absolute, self.grant, self.notify = machine.read_absolute, machine.grant, machine.notify
        self.deadly, self.ready, self.escaped, self.input_ended = None, False, False, False
        self.ignores, self.input, self.cut, self.sizes = False, b"", set(), []

    def has_terminal(self):
        return ("terminal", []) in self.records or ("plain_terminal", []) in self.records

    def run(self):
        """Goes on until it waits; nothing any more once it has ended."""
        next(self.life, None)
        for process in list(self.others.values()):
            next(process.life, None)

    def until(self, condition):
        while not condition():
            yield

    # ---- init

    def live(self):
        early = [step[6:] for step in self.script if step.startswith("early:") and "index:" not in step]
        begun = [step[6:] for step in self.script if step.startswith("begun:")]
        self.hostile = dict(step[8:].split("=", 1) for step in self.script if step.startswith("hostile:"))
        self.consoles, self.share = [], None
        try:
            yield from self.process(early)
            yield from self.do_until("device/console/2/backend")  # dom0 announces all its devices at once
            for kind in ("fuse", "9pfs"):
                if self.read(f"device/{kind}/0/backend"):
                    self.share = Share(self, kind)
                    yield from self.share.connect()
            yield from self.connect()
            yield from self.do_until("data/process/0/start")
            yield from self.process(begun)
            self.write("data/process/0/ready", "1")
            self.ready = True
            self.take_requests()
            apart = ("early:", "begun:", "hostile:")
            yield from self.process([step for step in self.script if not step.startswith(apart)])
            status = 0
        except Ended as end:
            status = end.args[0]
        for console in self.consoles:
            yield from self.until(console.drained)
        self.write("data/process/0/exit", str(status))
        for device in (*self.consoles, *([self.share] if self.share else [])):
            yield from device.close()
        self.machine.shut_down("-")

    def connect(self):
        start = [int(step[12:]) for step in self.script if step.startswith("early:index:")]
        self.consoles = [Console(self, number, *start) for number in (1, 2)]
        for console in self.consoles:
            yield from console.connect()

    def take_requests(self):
        """What the doorbell does."""
        for name in self.machine.list("data/request"):
            request = self.read(f"data/request/{name}")
            self.remove(f"data/request/{name}")
            self.asked.append(request)
            verb, *operands = request.split()
            process = self.others.get(int(operands[0])) if operands and operands[0] != "0" else self
            if verb == "run":
                assert process is None, request
                self.others[int(operands[0])] = Further(self, int(operands[0]))
            elif verb in ("kill", "killall") and process:
                process.take_signal(int(operands[1]))
            elif verb == "look" and process:
                process.cut |= set(self.read(f"data/process/{process.number}/unread") or "")
                process.sizes.append(self.read(f"data/process/{process.number}/winsize"))

    def take_signal(self, number):
        self.signals.append(number)
        if number == 9 or not self.ignores and number not in HARMLESS:
            self.deadly = number

    def wait(self):
        """Waits for anything, and does what init does meanwhile."""
        yield
        if self.read("control/shutdown") == "poweroff":
            self.write("control/shutdown", "")
            self.take_requests()
        if self.deadly is not None:
            raise Ended(128 + self.deadly)

    # ---- the process: a script

    def process(self, steps):
        for step in steps:
            verb, _, operand = step.partition(":")
            yield from getattr(self, f"do_{verb}")(operand)

    def do_out(self, text):
        yield from self.output(0, text.encode())

    def do_err(self, text):
        yield from self.output(1, text.encode())

    def do_much(self, count):
        """So many bytes of output, of a pattern."""
        yield from self.output(0, pattern(int(count)))

    def output(self, number, data):
        if self.terminal:
            number = 0
        if str(number + 1) in self.cut:
            raise Ended(128 + 13)
        yield from self.consoles[number].put(data)

    def take_input(self):
        """Bytes of standard input, without their escapes; notes its end."""
        for byte in self.consoles[0].take():
            if self.escaped:
                self.escaped = False
                if byte == 4:
                    self.input_ended = True
                else:
                    self.input += bytes([byte])
            elif byte == 0x10:
                self.escaped = True
            else:
                self.input += bytes([byte])

    def do_cat(self, _):
        """Standard input to standard output, until its end."""
        while not (self.input_ended and not self.input):
            self.take_input()
            data, self.input = self.input, b""
            yield from self.output(0, data)
            if not data and not self.input_ended:
                yield from self.wait()

    def do_line(self, _):
        """A line of standard input to standard output."""
        while b"\n" not in self.input and not self.input_ended:
            self.take_input()
            if b"\n" not in self.input:
                yield from self.wait()
        line, _, self.input = self.input.partition(b"\n")
        yield from self.output(0, line + b"\n")

    def do_wait(self, _):
        """For ever, or a signal."""
        while True:
            yield from self.wait()

    def do_signal(self, count):
        """Until so many signals have come, ignoring them; what they were goes to standard output."""
        self.ignores = True
        while len(self.signals) < int(count):
            yield from self.wait()
        yield from self.output(0, " ".join(map(str, self.signals)).encode())

    def do_ignore(self, _):
        self.ignores = True
        yield from ()

    def do_broken(self, _):
        """Writes until nobody reads any more."""
        while "1" not in self.cut:
            if self.consoles[0].drained():
                yield from self.output(0, b"y\n")
            yield from self.wait()
        raise Ended(128 + 13)

    def do_close(self, streams):
        self.write(f"data/process/{self.number}/ended", streams)
        yield from ()

    def do_exit(self, status):
        """Any text, for a hostile guest."""
        raise Ended(int(status) if status.isdecimal() else status)
        yield

    def do_set(self, assignment):
        node, _, value = assignment.partition("=")
        self.write(node, value)
        yield from ()

    def do_end(self, reason):
        """The domain ends: a letter of xl list."""
        self.machine.shut_down(reason)
        while True:
            yield

    def do_say(self, text):
        """On the VM's own console, of the kernel."""
        self.machine.say(text)
        yield from ()

    def do_mute(self, _):
        """Does nothing more, whatever is asked."""
        while True:
            yield

    def do_ring(self, indexes):
        """Writes these indexes into its second console's page."""
        for number, value in enumerate(indexes.split(",")):
            self.consoles[0].indexes[number] = int(value, 0)
        self.notify(self.consoles[0].port)
        yield from self.do_wait("")

    def do_ask(self, request):
        """Of the file server, in hexadecimal, by each ring in turn; the reply goes to standard output so."""
        ring = self.share.rings[0]
        self.share.rings.append(self.share.rings.pop(0))
        ring.put(bytes.fromhex(request))
        reply = yield from ring.take()
        yield from self.output(0, reply.hex().encode() + b"\n")

    def do_overrun(self, produced):
        """Claims to have asked more than the ring can hold."""
        (ring,) = self.share.rings
        ring.indexes[17] = int(produced)
        self.notify(ring.port)
        yield from self.do_wait("")

    def do_until(self, node):
        """Until a node of its own is there."""
        yield from self.until(lambda: self.read(node) is not None)


class Further(Guest):
    """A process of `runX exec`, and its supervisor: its words come by its console."""

    def __init__(self, guest, number):
        self.prepare(guest.machine, number)
        self.guest, self.records, self.node = guest, [], f"data/process/{number}"
        self.hostile = guest.hostile
        self.life = self.live()

    def live(self):
        numbers = [2 * self.number + 1, 2 * self.number + 2]
        self.consoles = [Console(self, n) for n in numbers if self.read(f"device/console/{n}/backend")]
        for console in self.consoles:
            yield from console.connect()
        try:
            yield from self.take_words()
            self.write(f"{self.node}/ready", "1")
            self.ready = True
            yield from self.process(self.script)
            status = 0
        except Ended as end:
            status = end.args[0]
        for console in self.consoles:
            if self.read(f"{console.node}/backend"):
                yield from self.until(console.drained)
        del self.guest.others[self.number]
        if status is not None:
            self.write(f"{self.node}/exit", str(status))

    def take_words(self):
        yield from self.consoles[0].put(self.hostile.get("greeting", "+").encode())
        data, length = b"", 4
        while len(data) < length:
            data += self.consoles[0].take()
            if length == 4 and len(data) >= 4:
                length += struct.unpack_from("<I", data)[0]
            if len(data) < length:
                yield from self.wait()
        assert len(data) == length, "input came before the process"
        self.records = parse_config(data[4:])
        self.terminal = self.has_terminal()
        program, *self.script = [operands[0] for keyword, operands in self.records if keyword == "arg"]
        if program != "guest":
            self.write(f"{self.node}/error", f'exec: "{program}": executable file not found in $PATH')
            raise Ended(255)

    def wait(self):
        yield
        if not self.read(f"{self.consoles[0].node}/backend") and self.deadly is None and not self.ready:
            raise Ended(255)  # its console has been hung up
        if self.deadly is not None:
            raise Ended(128 + self.deadly)


def pattern(count):
    """count bytes in which a lost or repeated one would show."""
    return b"".join(struct.pack(">I", number) for number in range((count + 3) // 4))[:count]
