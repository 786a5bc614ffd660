# SPDX-License-Identifier: Apache-2.0
"""A guest that plays the frontend of its files itself, and asks for what no kernel would (test_xen_hostile.py).

It evaluates what it reads on the console, a line each, and answers with a line that begins with "= ".  Its kernel has
no 9p, but pages to grant (/dev/xen/gntalloc), event channels and xenstore; it speaks xen/include/public/io/9pfs.h and
9P2000.L.  What looks for something wrong returns a list of it.
"""

import collections
import errno
import fcntl
import mmap
import os
import random
import struct
import sys

PAGE, ORDER, MASK = 4096, 7, 0xFFFFFFFF
IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, RING_ORDER, REFERENCES = 0, 1, 16, 17, 32, 33
XS_READ, XS_WRITE, XS_ERROR = 2, 11, 16
IOCTL_GNTALLOC_ALLOC_GREF = 24 << 16 | ord("G") << 8 | 5
IOCTL_EVTCHN_BIND_UNBOUND_PORT, IOCTL_EVTCHN_NOTIFY = 4 << 16 | ord("E") << 8 | 2, 4 << 16 | ord("E") << 8 | 4
WRITABLE = 1  # GNTALLOC_FLAG_WRITABLE
DEVICE = "device/9pfs/0"

# 9P2000.L: type and body of each request; s: a string
STATFS, LOPEN, LCREATE, SYMLINK, MKNOD, READLINK, GETATTR, SETATTR, XATTRWALK, XATTRCREATE = (
    8, 12, 14, 16, 18, 22, 24, 26, 30, 32,
)  # fmt: skip
READDIR, FSYNC, LOCK, GETLOCK, LINK, MKDIR, RENAMEAT, UNLINKAT = 40, 50, 52, 54, 70, 72, 74, 76
VERSION, ATTACH, FLUSH, WALK, READ, WRITE, CLUNK = 100, 104, 108, 110, 116, 118, 120
BODIES = {
    STATFS: "I", LOPEN: "II", LCREATE: "IsIII", SYMLINK: "IssI", MKNOD: "IsIIII", READLINK: "I", GETATTR: "IQ",
    SETATTR: "IIIIIQQQQQ", XATTRWALK: "IIs", XATTRCREATE: "IsQI", READDIR: "IQI", FSYNC: "II", LOCK: "IBIQQIs",
    GETLOCK: "IBQQIs", LINK: "IIs", MKDIR: "IsII", RENAMEAT: "IsIs", UNLINKAT: "IsI", VERSION: "Is", ATTACH: "IIssI",
    FLUSH: "H", WALK: "IIH", READ: "IQI", WRITE: "IQI", CLUNK: "I",
}  # fmt: skip
RLERROR = 7
UNKNOWN, NEW, ROOT, WORK = 77777, 5, 0, 1  # fids


# ---- xenstore, pages, event channels


class Xenstore:
    """A connection, by the kernel's."""

    def __init__(self):
        self.fd = os.open("/dev/xen/xenbus", os.O_RDWR)

    def request(self, kind, payload):
        os.write(self.fd, struct.pack("<IIII", kind, 0, 0, len(payload)) + payload)
        reply, _, _, length = struct.unpack("<IIII", self.exactly(16))
        body = self.exactly(length)
        if reply == XS_ERROR:
            raise OSError(f"xenstore: {body} for {payload}")
        return body

    def exactly(self, length):
        data = b""
        while len(data) < length:
            data += os.read(self.fd, length - len(data))
        return data

    def read(self, path):
        return self.request(XS_READ, path.encode() + b"\0").decode()

    def write(self, path, value):
        self.request(XS_WRITE, f"{path}\0{value}".encode())


class Channel:
    """An event channel to domain 0."""

    def __init__(self):
        self.fd = os.open("/dev/xen/evtchn", os.O_RDWR)
        self.port = fcntl.ioctl(self.fd, IOCTL_EVTCHN_BIND_UNBOUND_PORT, bytearray(struct.pack("=I", 0)))

    def notify(self):
        fcntl.ioctl(self.fd, IOCTL_EVTCHN_NOTIFY, struct.pack("=I", self.port))

    def wait(self):
        os.write(self.fd, os.read(self.fd, 4))


def grant(count):
    """Return so many pages, and a tuple of their references for domain 0."""
    fd = os.open("/dev/xen/gntalloc", os.O_RDWR)
    request = bytearray(struct.pack("=HHIQ", 0, WRITABLE, count, 0) + bytes(4 * count))
    fcntl.ioctl(fd, IOCTL_GNTALLOC_ALLOC_GREF, request)
    (offset,) = struct.unpack_from("=Q", request, 8)
    return mmap.mmap(fd, count * PAGE, offset=offset), struct.unpack_from(f"={count}I", request, 16)


# ---- the rings


class Ring:
    """The guest's side of one.  Replies are kept until they are asked for."""

    def __init__(self, page, data, channel):
        """page: of the indexes, 32 bits each."""
        self.page, self.data, self.channel, self.size = page, data, channel, len(data) // 2
        self.produced = self.consumed = 0
        self.left = b""

    def room(self):
        return self.size - (self.produced - self.page[OUT_CONS] & MASK)

    def put(self, data):
        """Write bytes for which there is room, and tell."""
        start = self.produced % self.size
        first = data[: self.size - start]
        self.data[self.size + start : self.size + start + len(first)] = first
        self.data[self.size : self.size + len(data) - len(first)] = data[len(first) :]
        self.produced = self.page[OUT_PROD] = self.produced + len(data) & MASK
        self.channel.notify()

    def take(self):
        """Return all bytes of replies that are there, and give their room back."""
        produced = self.page[IN_PROD]
        count, start = produced - self.consumed & MASK, self.consumed % self.size
        data = self.data[start : min(start + count, self.size)]
        data += self.data[: count - len(data)]
        self.consumed = self.page[IN_CONS] = produced
        if count:
            self.channel.notify()
        return data

    def exchange(self, requests):
        """Return the reply to each, as (type, body)."""
        return self.finish(b"".join(requests), len(requests))

    def finish(self, data, count):
        """Write what is left of requests; return the next count replies."""
        replies, parts, length, data = [], [self.left], len(self.left), memoryview(data)
        while len(replies) < count:
            part = data[: self.room()]
            if part:
                self.put(part)
                data = data[len(part) :]
            got = self.take()
            if not part and not got:
                self.channel.wait()
                continue
            parts.append(got)
            length += len(got)
            blob, at = b"".join(parts), 0
            while length - at >= 7 and len(replies) < count:
                (size,) = struct.unpack_from("<I", blob, at)
                if size > length - at:
                    break
                replies.append((blob[at + 4], blob[at + 7 : at + size]))
                at += size
            parts, length = [blob[at:]], length - at
        self.left = parts[0]
        return replies


rings = []
xenstore = None


def connect(reference=None):
    """Announce two rings.  reference: what stands in the first page for each of the others, if not the right ones."""
    global xenstore
    xenstore = Xenstore()
    nodes = {"version": 1, "num-rings": 2}
    for number in range(2):
        page, (own,) = grant(1)
        data, references = grant(1 << ORDER)
        indexes = memoryview(page).cast("I")
        indexes[RING_ORDER] = ORDER
        for at, each in enumerate(references):
            indexes[REFERENCES + at] = reference or each
        rings.append(Ring(indexes, data, Channel()))
        nodes.update({f"ring-ref{number}": own, f"event-channel-{number}": rings[-1].channel.port})
    for key, value in nodes.items():
        xenstore.write(f"{DEVICE}/{key}", str(value))
    xenstore.write(f"{DEVICE}/state", "3")
    backend = xenstore.read(f"{DEVICE}/backend")
    while xenstore.read(f"{backend}/state") != "4":
        pass
    xenstore.write(f"{DEVICE}/state", "4")


# ---- 9P


def string(data):
    return struct.pack("<H", len(data)) + data


def request(kind, *fields, rest=b""):
    """Return a message."""
    parts = (string(each) if form == "s" else struct.pack("<" + form, each) for form, each in zip(BODIES[kind], fields))
    body = b"".join(parts) + rest
    return struct.pack("<IBH", 7 + len(body), kind, 1) + body


def walk(fid, new, *names):
    return request(WALK, fid, new, len(names), rest=b"".join(map(string, names)))


def result(reply):
    """Return the body of a reply, or the name of its error."""
    kind, body = reply
    return errno.errorcode[struct.unpack("<I", body)[0]] if kind == RLERROR else body


def say(*messages):
    """Return the last one's result; the others must have succeeded."""
    results = [result(reply) for reply in rings[0].exchange(messages)]
    assert not any(isinstance(each, str) for each in results[:-1]), results
    return results[-1]


def attach():
    """Forget all; WORK is the folder of the same name."""
    return say(request(VERSION, 1 << 17, b"9P2000.L"), request(ATTACH, ROOT, MASK, b"", b"", 0),
               walk(ROOT, WORK, b"rootfs", b"work"))  # fmt: skip


def outcomes(replies):
    """Return how often each error, or "done", is there."""
    return dict(collections.Counter(each if isinstance(each := result(reply), str) else "done" for reply in replies))


def wrong(expected, cases):
    """Ask for cases, {what: message}; return those whose result is not among the expected ones."""
    results = {what: result(reply) for what, reply in zip(cases, rings[0].exchange(list(cases.values())))}
    return [(what, found) for what, found in results.items() if found not in expected]


# ---- what no kernel would ask for


def unknown_fids():
    zeros = {"s": b"x"}
    cases = {}
    for kind, form in BODIES.items():
        if kind not in (VERSION, ATTACH, FLUSH):
            cases[kind] = request(kind, UNKNOWN, *(zeros.get(letter, 0) for letter in form[1:]))
    return wrong(["EBADF"], cases)


# mostly of small numbers, so that they mean something now and then; one in eight is any
NOISE = (0, 0, 0, 1, 2, 4, 255) * 256 + tuple(range(256))


def types(seed):
    """Every type, with every length of a body of noise about fids that are known: it has its own reply, or an error."""
    chance = random.Random(seed)
    messages = []
    for kind in sorted({*range(256)} - {VERSION}):
        for length in (0, 3, 4, 12, 17, 40, 200):
            fid = struct.pack("<I", chance.choice((WORK, NEW, UNKNOWN)))
            body = (fid + bytes(chance.choices(NOISE, k=length)))[:length]
            messages.append(struct.pack("<IBH", 7 + length, kind, 1) + body)
    replies = rings[0].exchange(messages)
    return [
        (message[4], kind) for message, (kind, _) in zip(messages, replies) if kind not in (RLERROR, message[4] + 1)
    ]


NAMES = [b"..", b".", b"", b"/", b"/etc", b"a/b", b"../..", b"..\0", b"a\0b", b"\0", b"inside/../..", b"work/"]


def names():
    """In every place of a name."""
    cases = {}
    for name in NAMES:
        cases.update({
            (name, "walk"): walk(WORK, NEW, name), (name, "walk last"): walk(WORK, NEW, name, b"x"),
            (name, "create"): request(LCREATE, WORK, name, 0o102, 0o644, 0),
            (name, "mkdir"): request(MKDIR, WORK, name, 0o755, 0),
            (name, "mknod"): request(MKNOD, WORK, name, 0o100644, 0, 0, 0),
            (name, "symlink"): request(SYMLINK, WORK, name, b"x", 0),
            (name, "link"): request(LINK, WORK, WORK, name),
            (name, "rename"): request(RENAMEAT, WORK, name, WORK, b"x"),
            (name, "rename to"): request(RENAMEAT, WORK, b"inside", WORK, name),
            (name, "unlink"): request(UNLINKAT, WORK, name, 0), (name, "rmdir"): request(UNLINKAT, WORK, name, 0x200),
        })  # fmt: skip
    found = wrong(["EINVAL"], cases)
    # of what was found before the bad name, the guest may be told
    for name in NAMES:
        whole = say(walk(WORK, NEW, b"inside", name))
        found += [(name, whole)] if whole != "EINVAL" and struct.unpack_from("<H", whole) != (1,) else []
    found += wrong(["ENAMETOOLONG"], {"long": walk(WORK, NEW, b"n" * 256), "longer": walk(WORK, NEW, b"n" * 65000)})
    found += wrong(["EINVAL"], {"deep": walk(WORK, NEW, *[b"inside"] * 17)})
    found += wrong(["ENOENT"], {"attach": request(ATTACH, NEW, MASK, b"", b"/etc", 0)})
    return found + wrong(["EBADF"], {"none of them has made a fid": request(GETATTR, NEW, 0)})


def links(*targets):
    """Below and through a link, also one that the guest has made, is nothing."""
    found = []
    for number, target in enumerate(targets):
        name = b"link%d" % number
        say(request(SYMLINK, WORK, name, target, 0))
        found += wrong(["EBADF"], {(target, "behind"): walk(WORK, NEW, name, b"secret"),
                                   (target, "fid"): request(GETATTR, NEW, 0)}) [1:]  # fmt: skip
        say(walk(WORK, NEW, name))
        found += wrong(["ENXIO"], {(target, "open", flags): request(LOPEN, NEW, flags) for flags in (0, 1, 2, 0o1002)})
        found += wrong(["ENOTDIR"], {
            (target, "walk"): walk(NEW, NEW + 1, b"secret"),
            (target, "create"): request(LCREATE, NEW, b"made", 2, 0o644, 0),
            (target, "mkdir"): request(MKDIR, NEW, b"made", 0o755, 0),
            (target, "rename"): request(RENAMEAT, NEW, b"secret", WORK, b"stolen"),
            (target, "unlink"): request(UNLINKAT, NEW, b"secret", 0),
        })  # fmt: skip
        found += wrong(["EINVAL"], {(target, "size"): request(SETATTR, NEW, 8, 0, 0, 0, 0, 0, 0, 0, 0)})
        # these are the link's own
        rings[0].exchange([
            request(SETATTR, NEW, 1 | 2 | 4 | 16 | 32 | 128 | 256, 0o777, 1, 1, 0, 5, 0, 5, 0),
            request(LINK, WORK, NEW, name + b"x"), request(XATTRCREATE, NEW, b"user.x", 1, 0),
            request(WRITE, NEW, 0, 1, rest=b"x"), request(CLUNK, NEW),
        ])  # fmt: skip
    return found


def nodes():
    """Fifos and devices are not opened on dom0."""
    for name, mode, major, minor in ((b"fifo", 0o10666, 0, 0), (b"mem", 0o20666, 1, 1), (b"zero", 0o20666, 1, 5),
                                     (b"disk", 0o60666, 254, 0), (b"socket", 0o140666, 0, 0)):  # fmt: skip
        say(request(MKNOD, WORK, name, mode, major, minor, 0))
        say(walk(WORK, NEW, name))
        found = wrong(["ENXIO"], {(name, flags): request(LOPEN, NEW, flags) for flags in (0, 1, 2, 0o4000)})
        found += wrong(["EEXIST"], {(name, "create"): request(LCREATE, WORK, name, 2, 0o644, 0)})
        say(request(CLUNK, NEW))
        if found:
            return found
    return []


def sizes():
    """Offsets and counts of all sizes, of a file, a folder and an attribute."""
    found, most = [], (1 << 64) - 1
    say(walk(WORK, NEW, b"inside"), request(LOPEN, NEW, 2), walk(WORK, NEW + 1), request(LOPEN, NEW + 1, 0))
    say(walk(WORK, NEW + 2, b"inside"), request(XATTRCREATE, NEW + 2, b"user.x", 10, 0))
    cases = {("read", offset): request(READ, NEW, offset, 10) for offset in (most, 1 << 63, most - 5)}
    cases.update({("write", offset): request(WRITE, NEW, offset, 4, rest=b"data") for offset in (most, 1 << 63)})
    cases.update({("write", count): request(WRITE, NEW, 0, count, rest=b"data") for count in (5, MASK)})
    for offset, count in ((1, 1), (0, 11), (most, 1)):
        cases["value", offset, count] = request(WRITE, NEW + 2, offset, count, rest=bytes(count))
    cases["value"] = request(CLUNK, NEW + 2)  # has less than was said
    cases["size"] = request(SETATTR, NEW, 8, 0, 0, 0, most, 0, 0, 0, 0)
    found += wrong(["EINVAL"], cases)
    found += wrong(["EMSGSIZE"], {size: request(VERSION, size, b"9P2000.L") for size in (0, 1, 8191)})
    attach()
    say(walk(WORK, NEW, b"inside"), request(LOPEN, NEW, 0), walk(WORK, NEW + 1), request(LOPEN, NEW + 1, 0))
    for count in (0, 1, MASK):
        got = say(request(READ, NEW, 0, count))
        found += [] if got[4:] == b"inside"[:count] else [("read", count, got)]
    for offset in (0, 1, 12345, 1 << 62, most):
        for count in (0, 1, 24, MASK):
            got = say(request(READDIR, NEW + 1, offset, count))
            found += [("folder", offset, count, got)] if not isinstance(got, str) and len(got) > 1 << 17 else []
    return found + wrong(["E2BIG"], {"a value": request(XATTRCREATE, NEW + 2, b"user.x", 1 << 63, 0)})[1:]


def fids(first, count):
    """Ask for so many, and have each open; return how often each result was there."""
    walked, opened = collections.Counter(), collections.Counter()
    for start in range(first, first + count, 500):
        numbers = range(start, min(start + 500, first + count))
        messages = [part for fid in numbers for part in (walk(WORK, fid, b"inside"), request(LOPEN, fid, 0))]
        replies = rings[0].exchange(messages)
        walked.update(outcomes(replies[::2]))
        opened.update(outcomes(replies[1::2]))
    return {"walk": dict(walked), "open": dict(opened)}


def values(first, count):
    """Have the server remember count attributes of 64 KiB that will never be set."""
    for fid in range(first, first + count):
        say(walk(WORK, fid, b"inside"), request(XATTRCREATE, fid, b"user.x", 1 << 16, 0),
            request(WRITE, fid, 0, 1 << 16, rest=bytes(1 << 16)))  # fmt: skip


def race(rounds):
    """Walk by a name that is a folder now and a link then, open, read, write and make what is there; return what was
    read, and how often each result was there."""
    contents, opened, made, truncated = set(), [], [], []
    for number in range(rounds):
        messages = [
            walk(WORK, NEW, b"swapped", b"secret"), request(LOPEN, NEW, 2), request(READ, NEW, 0, 100),
            request(WRITE, NEW, 0, 6, rest=b"INSIDE"), request(CLUNK, NEW),
            walk(WORK, NEW, b"swapped"), request(LCREATE, NEW, b"made%d" % number, 2, 0o644, 0), request(CLUNK, NEW),
            walk(WORK, NEW, b"file"), request(LOPEN, NEW, 0o1002), request(READ, NEW, 0, 100), request(CLUNK, NEW),
        ]  # fmt: skip
        replies = rings[number % 2].exchange(messages * 5)
        contents |= {body[4:] for kind, body in replies[2::12] + replies[10::12] if kind != RLERROR}
        opened, made, truncated = opened + replies[1::12], made + replies[6::12], truncated + replies[9::12]
    return contents, {"open": outcomes(opened), "make": outcomes(made), "truncate": outcomes(truncated)}


def two_faces(rounds):
    """Names that change while the server looks at them, between one that is good and one that is not; return how often
    each result was there."""
    good, bad = (
        b"".join(part for fid in range(1000, 1400) for part in (walk(WORK, fid, name), request(CLUNK, fid)))
        for name in (b"ok", b"..")
    )
    right, found = say(walk(WORK, NEW, b"ok")), collections.Counter()
    say(request(CLUNK, NEW))
    for number in range(rounds):
        ring = rings[number % 2]
        left = ring.size - ring.produced % ring.size
        if left < len(good):  # it is to lie in one piece
            ring.exchange([request(STATFS, UNKNOWN)] * (left // 11 + 1))
        start = ring.size + ring.produced % ring.size
        end = start + len(good)
        ring.put(good)
        while ring.page[OUT_CONS] != ring.produced:
            ring.data[start:end] = bad
            ring.data[start:end] = good
        found.update("the file" if reply[1] == right else result(reply) for reply in ring.finish(b"", 800)[::2])
    return dict(found)


def our_indexes(rounds):
    """The server's own indexes are not read back from the page."""
    found = []
    for number in range(rounds):
        ring, message = rings[number % 2], walk(WORK, NEW, b"none")
        ring.put(message * 100)
        for value in (0, 1, MASK, 0x80000000):
            ring.page[OUT_CONS] = ring.page[IN_PROD] = value
        ring.put(message)  # with the reply to this one they are right again
        while ring.page[IN_PROD] != ring.consumed + 101 * 11 & MASK:
            pass
        found += [reply for reply in ring.finish(b"", 101) if result(reply) != "ENOENT"]
    return found


def flood():
    """Ask until nothing is taken any more, and read no reply; return how many requests each ring has got."""
    attach()
    say(walk(WORK, NEW, b"large"), request(LOPEN, NEW, 0))
    counts, message = [], request(READ, NEW, 0, 4000, rest=bytes(4000))
    for ring in rings:
        counts.append(0)
        # the server begins no reply that may have no room, with its head
        while ring.room() >= len(message) or ring.size - (ring.page[IN_PROD] - ring.consumed & MASK) >= 4096 + 11:
            if ring.room() >= len(message):
                ring.put(message)
                counts[-1] += 1
    return counts


def drain(counts):
    """Read the replies after all; return those that are not as they should be."""
    replies = [reply for ring, count in zip(rings, counts) for reply in ring.finish(b"", count)]
    return [reply for reply in replies if reply != (READ + 1, struct.pack("<I", 4000) + b"x" * 4000)]


def storm(count):
    """Events about nothing, and states that follow no rule."""
    for number in range(count):
        rings[number % 2].channel.notify()
    for state in "3", "1", "4", "x", "3", "5", "", "4", "9" * 1000, "6", "3", "4":
        xenstore.write(f"{DEVICE}/state", state)
    for key in "num-rings", "ring-ref0", "event-channel-0":
        xenstore.write(f"{DEVICE}/{key}", "1000000")


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = eval(line)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(f"= {answer!r}", flush=True)


if __name__ == "__main__":
    main()
