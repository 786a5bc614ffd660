# SPDX-License-Identifier: Apache-2.0
"""The byte stream between lab.py and the agent in its dom0.

One virtio-serial port carries everything.  A frame on it is

    stream: 1 byte | length: 4 bytes, big endian | payload: length bytes

Stream 0 carries control messages, JSON objects (agent.py says which); 1, 2 and 3 are a command's
standard streams, and an empty payload on one of these is its end.

Each data stream has a window of its own: a sender may be WINDOW bytes ahead of what the receiver
has passed on, and the receiver returns credit for what it passes on ({"credit": [stream, n]}).
So a reader that is slow, or stuck, holds up its own stream and no other, and memory is bounded.
"""

from __future__ import annotations

import errno
import json
import os
import select
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Union

CONTROL, STDIN, STDOUT, STDERR = range(4)

HEADER = struct.Struct("!BI")
PAYLOAD = 16 << 10  # bytes at most in one data frame
WINDOW = 256 << 10  # bytes of one stream that may be under way

Message = dict[str, Any]  # a control message
Target = Union[int, Callable[[bytes], object]]  # where bytes go: a descriptor, or a function


class Link:
    """Frames over one descriptor, which it makes non-blocking."""

    def __init__(self, fd: int):
        self.fd = fd
        self.incoming = bytearray()
        self.outgoing = bytearray()
        os.set_blocking(fd, False)

    def send(self, stream: int, payload: bytes) -> None:
        """Queue one frame; flush() sends it."""
        self.outgoing += HEADER.pack(stream, len(payload)) + payload

    def control(self, **message: object) -> None:
        """Queue one control message."""
        self.send(CONTROL, json.dumps(message).encode())

    def flush(self) -> None:
        """Write as much of the queue as the descriptor takes."""
        try:
            while self.outgoing:
                written = os.write(self.fd, self.outgoing[:PAYLOAD])
                del self.outgoing[:written]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise EOFError from None

    def receive(self) -> None:
        """Read what has come; EOFError when the other end is gone."""
        try:
            data = os.read(self.fd, 4 * PAYLOAD)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self.incoming += data

    def has_frame(self) -> bool:
        """Whether a complete frame has been read."""
        if len(self.incoming) < HEADER.size:
            return False
        length: int = HEADER.unpack_from(self.incoming)[1]
        return len(self.incoming) >= HEADER.size + length

    def next_frame(self) -> tuple[int, bytes]:
        """Take the first frame; has_frame() must be true."""
        stream: int
        length: int
        stream, length = HEADER.unpack_from(self.incoming)
        end = HEADER.size + length
        payload = bytes(self.incoming[HEADER.size : end])
        del self.incoming[:end]
        return stream, payload


class Source:
    """Bytes from a descriptor into one stream of a link."""

    def __init__(self, link: Link, stream: int, fd: int):
        self.link, self.stream, self.fd = link, stream, fd
        self.credit = WINDOW
        self.ended = False

    def wants_to_read(self) -> bool:
        return self.credit > 0 and not self.ended

    def has_data(self) -> bool:
        """Whether a read would give bytes now."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return not self.ended and any(event & select.POLLIN for _, event in poller.poll(0))

    def pump(self) -> None:
        """Read once, and queue what that gave."""
        try:
            data = os.read(self.fd, min(self.credit, PAYLOAD))
        except BlockingIOError:
            return
        except OSError as error:
            # A pty whose last user is gone, or our own terminal while we are in the background.
            if error.errno != errno.EIO:
                raise
            data = b""
        self.ended = not data
        self.credit -= len(data)
        self.link.send(self.stream, data)


class Sink:
    """Bytes from one stream of a link to a descriptor, or to a function that takes bytes."""

    def __init__(self, link: Link, stream: int, target: Target):
        self.link, self.stream = link, stream
        self.fd = -1 if callable(target) else target
        self.function = target if callable(target) else None
        self.pending = bytearray()
        self.ended = False  # the stream's end has arrived
        self.broken = False  # nobody reads the descriptor any more
        self.owed = 0  # bytes passed on, for which credit has yet to be returned
        # What poll() calls writable takes PIPE_BUF bytes; more could block.
        if self.fd >= 0:
            self.chunk = select.PIPE_BUF if os.get_blocking(self.fd) else 4 * PAYLOAD

    def accept(self, payload: bytes) -> None:
        """Take one frame's payload."""
        self.ended = self.ended or not payload
        if self.function and payload:
            self.function(payload)
        if self.function or self.broken:
            self.passed_on(len(payload))
        else:
            self.pending += payload

    def pump(self) -> None:
        """Write once."""
        try:
            written = os.write(self.fd, self.pending[: self.chunk])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
                raise
            self.broken = True
            written = len(self.pending)
        del self.pending[:written]
        self.passed_on(written)

    def passed_on(self, count: int) -> None:
        """Return credit, a good deal at a time."""
        self.owed += count
        if self.owed and (self.owed >= WINDOW // 4 or not self.pending):
            self.link.control(credit=[self.stream, self.owed])
            self.owed = 0


class Pump:
    """Moves bytes between a link and the sources and sinks of one command."""

    def __init__(self, link: Link, sources: Iterable[Source] = (), sinks: Iterable[Sink] = ()):
        self.link = link
        self.sources = {source.stream: source for source in sources}
        self.sinks = {sink.stream: sink for sink in sinks}

    def step(self, also: Sequence[int] = (), timeout: float | None = None) -> tuple[Message | None, set[int]]:
        """Wait until something can move, or one of the descriptors `also` is readable; move it.

        `timeout` is in seconds.  Returns a control message, if one has come, and those of `also`
        that are readable.  Frames behind that message stay where they are: they may be for the
        command that it starts.  EOFError when the other end of the link is gone.
        """
        ready = self.wait(also, 0 if self.link.has_frame() else timeout)
        for source in self.sources.values():
            if source.wants_to_read() and source.fd in ready:
                source.pump()
        for sink in self.sinks.values():
            if sink.pending and sink.fd in ready:
                sink.pump()
        if ready.get(self.link.fd, 0) & ~select.POLLOUT:
            self.link.receive()
        message = None
        while message is None and self.link.has_frame():
            message = self.dispatch(*self.link.next_frame())
        self.link.flush()
        return message, ready.keys() & set(also)

    def dispatch(self, stream: int, payload: bytes) -> Message | None:
        """Take one frame; return it if it is a control message that is not credit."""
        if stream != CONTROL:
            if stream in self.sinks:
                self.sinks[stream].accept(payload)
            return None
        message: Message = json.loads(payload)
        if "credit" not in message:
            return message
        stream, count = message["credit"]
        if stream in self.sources:  # it may be late, for a command that has ended
            self.sources[stream].credit += count
        return None

    def wait(self, also: Sequence[int], timeout: float | None) -> dict[int, int]:
        """poll() for all that could move now; a dict of descriptors and their events."""
        wanted = {fd: select.POLLIN for fd in also}
        wanted[self.link.fd] = select.POLLIN | (select.POLLOUT if self.link.outgoing else 0)
        for source in self.sources.values():
            if source.wants_to_read():
                wanted[source.fd] = wanted.get(source.fd, 0) | select.POLLIN
        for sink in self.sinks.values():
            if sink.pending:
                wanted[sink.fd] = wanted.get(sink.fd, 0) | select.POLLOUT
        poller = select.poll()
        for fd, events in wanted.items():
            poller.register(fd, events)
        return dict(poller.poll(None if timeout is None else max(0, timeout) * 1000))
