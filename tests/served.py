# SPDX-License-Identifier: Apache-2.0
"""A share that runx.Fuse serves to this machine's own kernel, and requests to a protocol without any ring."""

import contextlib
import mmap
import os
import struct
import traceback

import runx

MESSAGE_MAX = runx.Fuse.longest + 4096
UNIQUE = 7  # by which requests know their replies
WRITEBACK_CACHE = 1 << 16


class Message:
    """A request in memory of ours, and room for its reply, as a runx.Ring has them."""

    def __init__(self, request, reply):
        self.head, self.length, self.request = bytes(request[: runx.HEAD_MAX]), len(request), memoryview(request)
        self.reply = memoryview(reply)

    def copy(self, start, end):
        return bytes(self.request[start:end])

    def content(self, start, count):
        return [self.request[start : start + count]]

    def room(self, start, count):
        return [self.reply[start : start + count]]


def ask(protocol, request, reply=None):
    """The whole reply to a request."""
    message = Message(request, bytearray(MESSAGE_MAX) if reply is None else reply)
    most = protocol.reply_room(message)
    beginning, content = protocol.answer(message)
    assert len(beginning) + content <= most
    return beginning + bytes(message.reply[len(beginning) : len(beginning) + content])


def fuse_request(opcode, node, body=b"", uid=0, gid=0, unique=UNIQUE, pid=1):
    """opcode: a name or a number."""
    number = runx.FUSE_REQUESTS[opcode][0] if isinstance(opcode, str) else opcode
    return runx.IN_HEADER.pack(40 + len(body), number, unique, node, uid, gid, pid) + body


class Guest:
    """Asks a runx.Fuse as a kernel would, or as none would."""

    def __init__(self, fuse):
        self.fuse = fuse

    def request(self, *args, **options):
        """(errno, what the reply says) or None if there is no reply."""
        reply = ask(self.fuse, fuse_request(*args, **options))
        if not reply:
            return None
        length, error, unique = runx.OUT_HEADER.unpack_from(reply)
        assert length == len(reply) and unique == UNIQUE and -4096 < error <= 0 and (length == 16 or not error)
        return -error, reply[16:]

    def done(self, *args, **options):
        """What the reply says, which is no error."""
        error, body = self.request(*args, **options)
        assert error == 0, os.strerror(error)
        return body

    def look_up(self, name, node=1):
        """A file's number, 0 if there is none."""
        return struct.unpack_from("<Q", self.done("lookup", node, name + b"\0"))[0]

    def open(self, node, flags, **ids):
        """(errno, handle, flags for the guest's kernel)"""
        error, body = self.request("open", node, struct.pack("<II", flags, 0), **ids)
        return (error, 0, 0) if error else (0, *struct.unpack("<QIi", body)[:2])

    def read(self, node, handle, offset=0, size=4096, **ids):
        """(errno, content)"""
        return self.request("read", node, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0), **ids)

    def write(self, node, handle, data, **ids):
        """An errno."""
        head = struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        return self.request("write", node, head + data, **ids)[0]


class Mounted:
    """A folder as dom0 has it, and as the guest sees it."""

    def __init__(self, host, guest, counts):
        self.host, self.guest, self.counts = host, guest, counts

    def asked(self, name):
        """How often the server has been asked that."""
        return self.counts[runx.FUSE_REQUESTS[name][0]]


def serve(device, fuse, counts, writeback):
    """Answer what the kernel asks, until the file system is unmounted.  writeback: it may keep what is written."""
    request, reply = bytearray(MESSAGE_MAX), bytearray(MESSAGE_MAX)
    view = memoryview(request)
    while True:
        try:
            length = os.readv(device, [view])
        except OSError:  # ENODEV: unmounted
            return
        (opcode,) = struct.unpack_from("<I", request, 4)
        if opcode == runx.FUSE_REQUESTS["init"][0] and not writeback:  # as a kernel begins that cannot
            flags = runx.IN_HEADER.size + 12
            struct.pack_into("<I", request, flags, struct.unpack_from("<I", request, flags)[0] & ~WRITEBACK_CACHE)
        message = Message(view[:length], reply)
        counts[opcode if opcode < len(counts) else 0] += 1
        beginning, content = fuse.answer(message)
        if beginning:
            with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
                os.writev(device, [beginning, *message.room(len(beginning), content)])


@contextlib.contextmanager
def mounted(host, guest, capabilities, writeback):
    """A share, Mounted in our own mount namespace and served by a process of its own."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    how = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={runx.CONTENT_MAX}"
    runx.mount("share", str(guest), runx.MS_NOSUID | runx.MS_NODEV, "fuse", how)
    counts = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    pid = os.fork()
    if not pid:
        try:
            serve(device, runx.Fuse(os.open(host, os.O_PATH), capabilities), counts, writeback)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(device)
    try:
        yield Mounted(host, guest, counts)
    finally:
        runx.detach(str(guest), 0)
        status = os.waitpid(pid, 0)[1]
    assert status == 0


class NinePGuest:
    """Asks a runx.NineP as Linux's 9p would, or as none would.  Fid 0 is the share's folder."""

    def __init__(self, ninep, uid=0):
        self.ninep = ninep
        self.done("version", 1 << 17, b"9P2000.L")
        self.done("attach", 0, runx.NO_USER, b"", b"", uid)

    def send(self, kind, body):
        """(errno, what the reply says)"""
        reply = ask(self.ninep, runx.NINEP_HEADER.pack(7 + len(body), kind, 3) + body)
        length, answered, tag = runx.NINEP_HEADER.unpack_from(reply)
        assert (length, tag) == (len(reply), 3)
        if answered == runx.RLERROR:
            return struct.unpack("<I", reply[7:])[0], b""
        assert answered == kind + 1
        return 0, reply[7:]

    def request(self, name, *fields):
        """(errno, what the reply says), of fields as in NINEP_REQUESTS."""
        kind, form = runx.NINEP_REQUESTS[name]
        body = b""
        for each, field in zip(form, fields):
            if each in runx.NINEP_NUMBERS:
                body += runx.NINEP_NUMBERS[each].pack(field)
            else:
                body += field if each == "b" else runx.ninep_string(field)
        return self.send(kind, body)

    def done(self, *args):
        """What the reply says, which is no error."""
        error, body = self.request(*args)
        assert error == 0, os.strerror(error)
        return body

    def walk(self, new, *names, fid=0):
        """(errno, the types, versions and numbers of what was found)"""
        error, body = self.request("walk", fid, new, len(names), b"".join(map(runx.ninep_string, names)))
        return error, list(runx.QID.iter_unpack(body[2:]))

    def read(self, fid, offset=0, size=4096):
        """(errno, content)"""
        error, body = self.send(runx.NINEP_REQUESTS["read"][0], struct.pack("<IQI", fid, offset, size))
        return error, body[4:]

    def write(self, fid, data, offset=0):
        """An errno."""
        error, body = self.send(runx.TWRITE, struct.pack("<IQI", fid, offset, len(data)) + data)
        assert error or body == struct.pack("<I", len(data))
        return error
