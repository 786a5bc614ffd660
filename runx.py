#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""runX: an OCI runtime that runs each container as a Xen VM of its own.

An engine (containerd, Podman, Docker) calls it as it would call runc.  `create` forks a monitor, which builds a domain
with `xl create`, and forks a holder, whose pid is the container's pid and whose namespaces are the container's.  The
domain boots meanwhile, and waits until `start` lets it execute the process.  The monitor carries the standard streams
over PV consoles, waits for the domain to end and destroys it; the holder exits with the container's exit status.  In
the VM there is an init and no agent; host and guest meet only in what Xen gives every domain: ramdisk, xenstore, and
devices (consoles, files, disk, network interfaces).

One module, standard library only.  It is started for every operation of every container, so what only one operation
needs is imported there: json, signal or ctypes cost more than most operations.

The parts, each using only names of those above it: errors and log, programs, xenstore, domain and xl, devices,
container, OCI config, seccomp, guest protocol, rootfs, file server, cgroup, network (rtnetlink, CNI, vif), hooks,
holder, builder, streams, monitor, carrier, commands, command line.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import select
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # annotations are never evaluated
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
    from subprocess import Popen
    from typing import Any, BinaryIO, NoReturn, TypeVar, Union

    JsonObject = dict[str, Any]
    Work = Callable[[], object]

VERSION = "0.2.0"
DEFAULT_ROOT = "/run/runX"
LIVING_FILE = "/run/runX-domains"  # when the last look at all domains began, time.monotonic(); domids of the living
HOST_CONFIG = "/etc/runX/config.json"
# An engine may call with an empty environment (Podman's `state`), and xl needs to find its helpers.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# ==== errors and log =====================================================================================
# An error is one sentence for the user; main() alone turns it into stderr, log and exit status.  Here is also what all
# parts use: undoing, plain records, and what stands in for slow modules of the standard library.


class Error(Exception):
    """What went wrong with which object and, where there is one, the remedy, in one sentence."""

    def __init__(self, sentence: str, exit_status: int = 1) -> None:
        super().__init__(sentence)
        self.exit_status = exit_status


class NoContainer(Error):
    """There is no container of that id."""

    def __init__(self, container_id: str) -> None:
        super().__init__(f'container "{container_id}" does not exist')


class NotRunning(Error):
    """The container's VM is gone, or is not there yet."""

    def __init__(self) -> None:
        super().__init__("container not running")


class Log:
    """The engine's log file, one record a line, or standard error.  Podman reads the file as a single JSON object, so
    only what a user must learn is written, the last "error" for containerd; `debug` adds what a developer wants."""

    def __init__(self, path: str | None = None, as_json: bool = False, debug: bool = False, subject: str = "") -> None:
        self.path = os.path.abspath(path) if path else None  # the monitor leaves this folder
        self.as_json = as_json
        self.wants_debug = debug
        self.subject = subject

    def about(self, container_id: str) -> Log:
        """The same log, for messages that name the container first."""
        return Log(self.path, self.as_json, self.wants_debug, f"container {container_id}: ")

    def write(self, level: str, message: str) -> None:
        now = timestamp()
        message = self.subject + message
        if self.as_json:
            line = json_text({"level": level, "msg": message, "time": now})
        else:
            line = f'time="{now}" level={level} msg={json_text(message)}'
        try:
            if self.path is None:
                select.select([], [2], [], 1.0)  # see unblock_standard(): it may be full for a moment
                print(line, file=sys.stderr, flush=True)
                return
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError:
            pass  # an unwritable log must not hide the error

    def warn(self, message: str) -> None:
        self.write("warning", message)

    def debug(self, message: str) -> None:
        if self.wants_debug:
            self.write("debug", message)

    def attempt(self, what: str, work: Callable[..., Any], *args: Any) -> bool:
        """Call work(*args); what fails, in whatever way, is a warning.  Return whether nothing did."""
        try:
            work(*args)
            return True
        except Exception as error:
            self.warn(str(error) if isinstance(error, Error) else f"cannot {what}: {error}")
            return False


class Undo:
    """What is acquired in `with Undo(log) as undo:` is registered there, with how it is given back when an exception
    leaves the block, the last one first."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.steps: list[Work] = []
        self.held: list[int] = []

    def add(self, what: str, work: Callable[..., Any], *args: Any) -> None:
        """what: the words behind "cannot" if that fails, which is a warning."""
        self.steps.append(lambda: self.log.attempt(what, work, *args))

    def hold(self, fd: int) -> int:
        """Return fd, which is closed behind the block, and not before all has been given back."""
        self.held.append(fd)
        return fd

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while kind is not None and self.steps:
            self.steps.pop()()
        for fd in self.held:
            os.close(fd)


class Attempt:
    """`with Attempt("read x"):` an OSError in the block becomes the Error "cannot read x: " with its reason."""

    def __init__(self, what: str, *kinds: type[Exception], remedy: str = "") -> None:
        """kinds: of exceptions besides OSError.  remedy: what stands behind the reason."""
        self.what = what
        self.remedy = remedy
        self.kinds: tuple[type[Exception], ...] = (OSError, *kinds)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, self.kinds):
            reason = getattr(error, "strerror", None) or error
            raise Error(f"cannot {self.what}: {reason}{self.remedy}") from None


class Descriptor(int):
    """A file descriptor that `with` closes at its end."""

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self)


class Record:
    """Base of plain records: the fields are the class's annotations, by name, all required that have no default.  To
    import dataclasses would double the time that `state` takes."""

    def __init__(self, **fields: Any) -> None:
        kind = type(self)
        values = {name: getattr(kind, name) for name in kind.__annotations__ if hasattr(kind, name)}
        for name, value in values.items():
            if isinstance(value, (dict, list)):
                values[name] = value.copy()
        values.update(fields)
        if values.keys() != kind.__annotations__.keys():
            raise TypeError(f"{kind.__name__} takes {', '.join(kind.__annotations__)}")
        self.__dict__.update(values)


def refuse(number: int) -> NoReturn:
    """Raise OSError."""
    raise OSError(number, os.strerror(number))


def timestamp() -> str:
    """Now, in RFC 3339 with nanoseconds: what Go's time.Time parses."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{nanoseconds:09d}Z", time.gmtime(seconds))


def is_number(text: str, digits: int) -> bool:
    """Return whether it is made of the digits 0 to 9, up to so many: int() takes those of any script."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


def printable(text: str, most: int = 2000) -> str:
    """Text of the guest's for the log: a hostile guest must not write control characters to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[-most:].strip()


# ---- instead of slow modules, each with that module where anything is not as expected


def import_core(name: str) -> Any:
    """C's half of socket, signal or weakref: what the other adds to it takes longer to import than `state` takes."""
    try:
        return __import__(f"_{name}")
    except ImportError:
        return __import__(name)


C_LIBRARY: dict[str, Any] = {}  # what c_library() has made


def c_library() -> dict[str, Any]:
    """How to call the C library: {"long": a type, "find": function by name, "errno": function}."""
    if C_LIBRARY:
        return C_LIBRARY
    try:
        import _ctypes  # ctypes adds to it what takes seven times as long to import

        core: Any = _ctypes

        class Long(core._SimpleCData):  # type: ignore[misc]
            _type_ = "l"

        class Function(core.CFuncPtr):  # type: ignore[misc]
            _flags_ = core.FUNCFLAG_CDECL | core.FUNCFLAG_USE_ERRNO  # what comes back is an int, if nothing is said

        handle = core.dlopen(None, 0)

        def find(name: str) -> Any:
            return Function(core.dlsym(handle, name))

        find("getpid")
        C_LIBRARY.update(long=Long, find=find, errno=core.get_errno)
    except Exception:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        C_LIBRARY.update(long=ctypes.c_long, find=library.__getitem__, errno=ctypes.get_errno)
    return C_LIBRARY


def system_call(name: str, *args: Any) -> int:
    """Call a function of the C library, with numbers (as long), strings and memory.  Return its int.  Raise OSError."""
    library = c_library()
    long = library["long"]
    values = [long(arg) if isinstance(arg, int) else os.fsencode(arg) if isinstance(arg, str) else arg for arg in args]
    result: int = library["find"](name)(*values)
    if result < 0:
        refuse(library["errno"]())
    return result


def has_function(name: str) -> bool:
    """Return whether the C library has a function."""
    try:
        return bool(c_library()["find"](name))
    except (OSError, AttributeError):  # of _ctypes, of ctypes
        return False


def json_number(text: str) -> int | float:
    """The int that a number of JSON stands for, or the float where it is one, or is larger than any of the kernel's."""
    if len(text) <= 20 and text.lstrip("-").isdecimal():
        return int(text)
    number = float(text)
    if number - number:  # NaN, for infinity and NaN
        raise ValueError(f"{text[:40]} is no number that JSON has")
    return number


JSON_NUMBERS: Any = dict.fromkeys(("parse_float", "parse_int", "parse_constant"), json_number)


class JsonScanner:
    """What C's half of json wants to know (Modules/_json.c): as json.loads does it, but for numbers."""

    strict = True
    memo: dict[str, str] = {}
    object_hook = object_pairs_hook = array_hook = None
    parse_float = parse_int = parse_constant = json_number


def parse_json(text: str) -> Any:
    """json.loads, without importing json: `state` would take twice as long.  Raise ValueError."""
    try:
        import _json

        start = len(text) - len(text.lstrip(" \t\n\r"))
        scanner: Any = JsonScanner
        value, end = _json.make_scanner(scanner)(text, start)
        if not text[end:].strip(" \t\n\r"):
            return value
    except Exception:
        pass  # it is not JSON, or this Python's scanner is not like those that we know
    import json

    try:
        return json.loads(text, **JSON_NUMBERS)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_text(value: Any, indent: int | None = None, margin: str = "\n") -> str:
    """json.dumps, for the same reason; without indent as compact as Go's."""
    if isinstance(value, str):
        try:
            from _json import encode_basestring_ascii
        except ImportError:
            from json import dumps as encode_basestring_ascii
        return encode_basestring_ascii(value)
    if value is None:
        return "null"
    if isinstance(value, (int, float)):
        return repr(value).lower()  # also True and False
    inner, colon = margin + " " * (indent or 0), ":" if indent is None else ": "
    brackets = "[]"
    if isinstance(value, dict):
        brackets = "{}"
        parts = [json_text(str(key)) + colon + json_text(item, indent, inner) for key, item in value.items()]
    else:
        parts = [json_text(item, indent, inner) for item in value]
    if not parts or indent is None:
        return ",".join(parts).join(brackets)
    return (inner + f",{inner}".join(parts) + margin).join(brackets)


DOCUMENT_MAX, DEPTH_MAX = 16 << 20, 64  # characters and levels of JSON that others have written


def read_text(path: str | int) -> str:
    """A file that others have written.  Raise OSError and ValueError."""
    with open(path, encoding="utf-8") as file:
        text = file.read(DOCUMENT_MAX + 1)
    if len(text) > DOCUMENT_MAX:
        raise ValueError(f"it is larger than {DOCUMENT_MAX >> 20} MiB")
    return text


def read_document(path: str | int) -> Any:
    """The JSON in such a file.  Raise OSError and ValueError."""
    return check_document(parse_json(read_text(path)))


def check_document(document: Any, place: str = "", depth: int = 0) -> Any:
    """The document, if all its strings can be handed to the kernel and be written again.  Raise ValueError."""
    if depth > DEPTH_MAX:
        raise ValueError(f"it is nested too deeply at {printable(place[:100])}")
    if isinstance(document, str) and not is_text(document):
        raise ValueError(f"{printable(place[1:])} holds a NUL or half a character")
    if isinstance(document, dict):
        if not all(map(is_text, document)):
            raise ValueError(f"a name in {printable(place[1:]) or 'it'} holds a NUL or half a character")
        for key, inner in document.items():
            check_document(inner, f"{place}.{key}", depth + 1)
    elif isinstance(document, list):
        for number, inner in enumerate(document):
            check_document(inner, f"{place}[{number}]", depth + 1)
    return document


def is_text(text: str) -> bool:
    """Whether it can be a C string in UTF-8: without NUL and the surrogates that JSON and names of files can have."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


# ==== programs ===========================================================================================
# Files and processes of dom0's kernel: small files of /proc and /sys, programs that get JSON and have a time limit, and
# the waiting for processes, and for what those of ours say.

SIGHUP, SIGKILL, SIGPIPE, SIGCHLD, SIGWINCH = 1, 9, 13, 17, 28  # <signal.h>
RELAYED = (SIGHUP, 2, 3, 10, 12, 15)  # also INT, QUIT, USR1, USR2, TERM: for the container's process, whoever gets them
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80  # <linux/sched.h>
CLONE_PARENT, SYS_CLONE3 = 0x8000, 435  # the number in <asm-generic/unistd.h>, the same on each machine
OUTPUT_MAX = 1 << 20  # bytes of a program's that are taken
SENTENCE_MAX = 4000  # bytes that processes of ours say at once
FAILED = 255  # the exit status where a process has none of its own, as runc's exec
OWN_NETWORK = "/proc/self/ns/net"  # the network namespace that we are in: dom0's, until we enter another one


def read_file(path: str) -> str:
    """A small file of the kernel's, without the white space around it.  Raise OSError."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().strip()


def write_file(path: str, value: str | int, mode: str = "w") -> None:
    """mode: "x" for a new one, where somebody else might have put a link.  Raise OSError."""
    with open(path, mode, encoding="utf-8") as file:
        file.write(str(value))


def boot_id() -> str:
    """What tells this boot of the host from all others: pids, domids and what has them begin anew with it."""
    return read_file("/proc/sys/kernel/random/boot_id")


def take_ordinary_score() -> None:
    """When memory is short, have the kernel not spare us, as it does engines: we unpack images, and serve guests."""
    path = "/proc/self/oom_score_adj"
    try:
        if int(read_file(path)) < 0:
            write_file(path, 0)
    except OSError:
        pass  # where there is no /proc


def fork_program(path: str, argv: list[str], env: dict[str, str], streams: Sequence[int], prepare: Work) -> int:
    """Start a program, with these standard streams; prepare() is called in its process before.  Return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            for target, source in enumerate(streams):
                os.dup2(source, target)
            prepare()
            signal = import_core("signal")
            signal.signal(SIGPIPE, signal.SIG_DFL)  # Python ignores it, and so would the program
            os.execve(path, argv, env)
        except BaseException as error:  # nothing may return into the caller's side
            os.write(2, f"cannot execute {path}: {getattr(error, 'strerror', None) or error}".encode())
        os._exit(127)
    return pid


def reap(pid: int, timeout: float | None, kill: Callable[[int, int], None]) -> tuple[bool, int]:
    """Wait for a child, or kill it in the end.  Return whether it has ended by itself, and its status, -N: signal N."""
    with Descriptor(os.pidfd_open(pid)) as pidfd:
        ended = bool(select.select([pidfd], [], [], timeout)[0])
    if not ended:
        kill(pid, SIGKILL)
    return ended, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_program(
    argv: list[str], path: str, env: dict[str, str], stdin: bytes, timeout: float | None = None,
    folder: str | None = None, namespaces: Sequence[str] = (),
) -> tuple[str, bytes, bytes]:  # fmt: skip
    """Run a program to its end or its timeout, in seconds.  Return what went wrong, or "", its stdout and its stderr.
    env: all that it gets.  folder: where it works, if that is there.  namespaces: paths of those that it joins."""
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]  # never full, as a pipe may be
    os.pwrite(files[0], stdin, 0)  # where it begins to read

    def prepare() -> None:
        os.setsid()  # a group of its own, to be killed with its children
        for namespace in [os.open(name, os.O_RDONLY) for name in namespaces]:
            system_call("setns", namespace, 0)
        if folder and os.path.isdir(folder):
            os.chdir(folder)

    ended, status = reap(fork_program(path, argv, env, files, prepare), timeout, os.killpg)
    stdout, stderr = (os.pread(fd, OUTPUT_MAX, 0) for fd in files[1:])
    for fd in files:
        os.close(fd)
    reason = f"signal {-status}" if status < 0 else f"exit status {status}" if status else ""
    return (reason if ended else f"ran past its time of {timeout} s"), stdout, stderr


def process_start_time(pid: int) -> int | None:
    """Clock ticks since boot at which process pid was started, None if it has ended: proc(5) /proc/pid/stat."""
    try:
        fields = read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def end_process(pid: int, start_time: int, timeout: float) -> None:
    """Wait for the end of a process, and kill it if that does not come in time, in seconds."""
    try:
        pidfd = Descriptor(os.pidfd_open(pid))
    except OSError:
        return  # it has ended, and the number may be a thread's
    with pidfd:
        if process_start_time(pid) == start_time and not select.select([pidfd], [], [], timeout)[0]:
            try:
                import_core("signal").pidfd_send_signal(pidfd, SIGKILL)
            except ProcessLookupError:
                return  # just now
            select.select([pidfd], [], [], timeout)


def close_standard(*fds: int) -> None:
    """Close some of 0, 1, 2, so that the other end sees it, and keep the numbers taken."""
    with Descriptor(os.open("/dev/null", os.O_RDWR)) as null:
        for fd in fds:
            os.dup2(null, fd)


def unblock_standard(fd: int) -> None:
    """Have one of 0, 1, 2 that is a terminal or a pipe never block us, by an opening of our own: who else has the
    caller's may want to block.  What cannot be opened again, such as /dev/tty of a session not ours, stays as it is."""
    path = f"/proc/self/fd/{fd}"
    try:
        what, mode = os.readlink(path), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if what.startswith("pipe:") or os.isatty(fd) and not what.endswith("ptmx"):  # which makes another pty
            with Descriptor(os.open(path, mode | os.O_NONBLOCK | os.O_NOCTTY)) as ours:
                os.dup2(ours, fd)
    except OSError:
        pass


def fork_linked(
    name: str, keep: Collection[object], life: Callable[..., int], *args: Any, fork: Callable[[], int] = os.fork
) -> tuple[int, Any]:
    """Fork a process that ends with what life(*args, link) returns, link being a socket to us, or tells us there why it
    fails.  It has those of our descriptors that it keeps, and 0, 1, 2.  Return its pid, and our end.  Raise OSError."""
    socket = import_core("socket")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, status = fork(), FAILED
    if pid == 0:
        try:
            os.setsid()
            os.chdir("/")
            for fd in set(map(int, os.listdir("/proc/self/fd"))).difference((0, 1, 2, theirs.fileno()), keep):
                os.closerange(fd, fd + 1)  # the one that listdir had open is no error
            status = life(*args, theirs)
        except BaseException as error:
            tell(theirs, reason_of(error, name))
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours


def fork_sibling() -> int:
    """As os.fork(), but it is our parent's child, and the first process of a new pid namespace.  Raise OSError."""
    # os.fork() would do more for a child of several threads, and we have one
    return system_call("syscall", SYS_CLONE3, struct.pack("=8Q", CLONE_PARENT | CLONE_NEWPID, *[0] * 7), 64)


def tell(link: Any, words: bytes | str) -> None:
    """Say something to another process of ours; that it has ended is seen elsewhere."""
    try:
        link.send(words if isinstance(words, bytes) else words.encode("utf-8", "replace")[:SENTENCE_MAX])
    except OSError:
        pass


def receive(link: Any) -> bytes:
    """Wait for what the other process says next; b"" if it has ended."""
    try:
        words: bytes = link.recv(SENTENCE_MAX)
    except ConnectionResetError:  # told once, before its last words, where it has left something unread
        words = link.recv(SENTENCE_MAX)
    return words


def hear(link: Any, lost: str = "its process was killed") -> str:
    """Wait for its next word.  Return "" for "+", else why it fails; lost: where it has ended without a word."""
    word = receive(link)
    return "" if word == b"+" else word.decode("utf-8", "replace") or lost


def reason_of(error: BaseException, process: str) -> str:
    """What is said of a failure that ends a process of ours."""
    foreseen = isinstance(error, (Error, OSError))  # the latter such as a full disk
    return str(error) if foreseen else f"internal error of the {process}: {error!r}"


def in_namespace(path: str, work: Callable[..., T], *args: Any, kind: str = "net") -> T:
    """Return work(*args), called in the namespace at path.  kind: "net" or "uts".  Raise OSError."""
    flag = {"net": CLONE_NEWNET, "uts": CLONE_NEWUTS}[kind]  # one of another type is refused
    target, home = (Descriptor(os.open(name, os.O_RDONLY)) for name in (path, f"/proc/self/ns/{kind}"))
    with target, home:
        system_call("setns", target, flag)
        try:
            return work(*args)
        finally:
            system_call("setns", home, flag)


# ==== xenstore ===========================================================================================
# A client of xenstored's socket: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt.

if TYPE_CHECKING:
    Step = tuple[str, Union[str, tuple[str, ...]]]  # see Xenstore.write_all()

# types of requests, by what an error calls them
XS_REQUESTS = {
    "list": 1, "read": 2, "watch": 4, "unwatch": 5, "start a transaction": 6, "end a transaction": 7,
    "write": 11, "remove": 13, "set the permissions of": 14, "ask for": 23,
}  # fmt: skip
XS_WATCH_EVENT, XS_ERROR = 15, 16
XS_WATCHDEPTH = 4  # XENSTORE_SERVER_FEATURE_WATCHDEPTH, from Xen 4.22 on
XS_HEADER, XS_HEADER_SIZE = "<IIII", 16  # type, req_id, tx_id, length of the payload
XENSTORED_SOCKET = "/run/xenstored/socket"
XENBUS_DEVICE = "/dev/xen/xenbus"  # the way where xenstored is a VM of its own
TRANSACTION_ATTEMPTS = 100  # a guest that makes changes without end is refused in the end


class XenstoreError(Error):
    """xenstored's refusal; code is its name, such as ENOENT."""

    def __init__(self, operation: str, path: str, code: str) -> None:
        super().__init__(f"cannot {operation} {path} in xenstore: {code}")
        self.code = code


class Xenstore:
    """A connection.  Watch events that have come wait in `events`."""

    def __init__(self) -> None:
        socket = import_core("socket")
        self.received = b""  # no more than a part of a message, for poll(2) tells nothing of what is here
        self.events: list[str] = []  # their tokens
        self.replies: list[tuple[int, bytes]] = []  # type and body of each
        self.number = 0  # of the transaction that all requests belong to; 0: none
        try:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(XENSTORED_SOCKET)
            self.fd, self.takes_many = self.socket.fileno(), True
        except OSError:
            try:
                self.fd, self.takes_many = os.open(XENBUS_DEVICE, os.O_RDWR), False
            except OSError as error:
                raise Error(f"cannot connect to xenstored ({error.strerror}): is this a Xen dom0?") from None

    def request(self, operation: str, path: str, payload: bytes) -> bytes:
        return self.exchange([(operation, path, payload)])[0]

    def exchange(self, requests: list[tuple[str, str, bytes]]) -> list[bytes]:
        """Send all (operation, path, payload) at once.  Return their replies, or raise the first XenstoreError."""
        if len(requests) > 1 and not self.takes_many:
            # by the device each waits: its driver may send the one before late, from where this one would lie then
            return [self.request(*each) for each in requests]
        message = b""
        for operation, _, body in requests:
            message += struct.pack(XS_HEADER, XS_REQUESTS[operation], 0, self.number, len(body)) + body
        with Attempt("write to xenstored"):
            while message:
                message = message[os.write(self.fd, message) :]
        while len(self.replies) < len(requests):
            self.receive()
        replies, self.replies = self.replies, []
        for (operation, path, _), (kind, body) in zip(requests, replies):
            if kind == XS_ERROR:
                code = body.rstrip(b"\0").decode("ascii", "replace")
                raise XenstoreError(operation, path, code)
        return [body for _, body in replies]

    def receive(self) -> None:
        """Take what has come, at least a part of a message."""
        with Attempt("read from xenstored"):
            chunk = os.read(self.fd, 1 << 16)
        if not chunk:
            raise Error("xenstored has closed the connection")
        self.received += chunk
        while len(self.received) >= XS_HEADER_SIZE:
            kind, _, _, length = struct.unpack_from(XS_HEADER, self.received)
            end = XS_HEADER_SIZE + length
            if len(self.received) < end:
                break
            body = self.received[XS_HEADER_SIZE:end]
            self.received = self.received[end:]
            if kind == XS_WATCH_EVENT:
                self.events.append(body.split(b"\0")[1].decode("ascii", "replace"))
            else:
                self.replies.append((kind, body))

    def ask(self, operation: str, path: str) -> bytes | None:
        """Return what is said of a node, None where there is none."""
        try:
            return self.request(operation, path, path.encode() + b"\0")
        except XenstoreError as error:
            if error.code != "ENOENT":
                raise
            return None

    def read(self, path: str) -> str:
        """The value as text (never trusted, so undecodable bytes are replaced), "" where there is no node."""
        return (self.ask("read", path) or b"").decode("utf-8", "replace")

    def read_numbers(self, *paths: str) -> list[int]:
        """Return what is in these nodes, in one round trip.  Raise Error, also where one is missing, and ValueError."""
        requests = [("read", path, path.encode() + b"\0") for path in paths]
        return [int(body) for body in self.exchange(requests)]

    def write(self, path: str, value: str) -> None:
        self.write_all([(path, value)])

    def write_all(self, steps: Iterable[Step]) -> None:
        """steps: (path, value), a node with its parent's permissions, or (path, permissions), such as ("n0", "r5")."""
        requests = []
        for path, value in steps:
            if isinstance(value, str):
                requests.append(("write", path, f"{path}\0{value}".encode()))
            else:
                words = "\0".join((path, *value, ""))
                requests.append(("set the permissions of", path, words.encode()))
        self.exchange(requests)

    def remove(self, path: str) -> None:
        """Remove path and all below it; no error where there is none."""
        self.ask("remove", path)

    def watch(self, *watches: tuple[str, str]) -> None:
        """watches: (path, token)."""
        self.exchange([("watch", path, f"{path}\0{token}\0".encode()) for path, token in watches])

    def watch_one_end(self, domid: int) -> None:
        """Have the watch of "@releaseDomain" fire for the end of this domain only, where xenstored can tell."""
        try:
            features = int(self.request("ask for", "features", b"").rstrip(b"\0"))
        except XenstoreError:
            features = 0  # it does not know the question
        if features & XS_WATCHDEPTH:
            self.watch((f"@releaseDomain/{domid}", "release"))
            self.request("unwatch", "@releaseDomain", b"@releaseDomain\0release\0")

    def take_events(self) -> list[str]:
        """The tokens of the watches that have fired, each once; block if there is none yet."""
        while not self.events:
            self.receive()
        events, self.events = self.events, []
        return list(dict.fromkeys(events))

    def transaction(self, work: Work) -> None:
        """Run work(), whose requests are one transaction, again if somebody else's change came between."""
        for attempt in range(1, TRANSACTION_ATTEMPTS + 1):
            self.number = int(self.request("start a transaction", "", b"\0").rstrip(b"\0"))
            end = b"F\0"  # it is dropped
            try:
                try:
                    work()
                    end = b"T\0"
                finally:
                    self.request("end a transaction", "", end)
                return
            except XenstoreError as error:
                if error.code != "EAGAIN" or attempt == TRANSACTION_ATTEMPTS:
                    raise
            finally:
                self.number = 0

    def list(self, path: str) -> list[str]:
        """Names of the nodes below path, [] where there is none."""
        body = self.ask("list", path) or b""
        return [name.decode("ascii", "replace") for name in body.split(b"\0") if name]


# ==== domain and xl ======================================================================================
# A VM as dom0 has it.  The only place where xl is called, and where its configuration grammar (libxlu) is written.

LOOK_TIME_LIMIT = 5  # seconds that a monitor waits for another's look at all domains
XL_TIME_LIMIT = 300  # seconds that xl has; what it waits for itself has less
# bytes of memory that xl has to unpack a kernel, and the QEMU that it starts for an image in qcow2 or vhd for all that
# a guest asks it for.  RLIMIT_DATA counts what is written only here, not the VM's memory that xl maps.
XL_DATA, XL_STACK = 384 << 20, 1 << 20
XL_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"})
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MOST_REQUESTS = 150
LOG_FOLDER = "/var/log/xen"


def xl(*args: str | int, data_limit: int = 0) -> tuple[int, str]:
    """Run xl.  Return its exit status, and its stdout and stderr as text.  data_limit: bytes of memory that xl, and
    each program that it starts, may have; and xl does not outlive a caller that is killed."""
    take_ordinary_score()
    parent, path = os.getpid(), find_xl()
    argv, env = ["xl", *map(str, args)], {**os.environ, "PATH": PATH}

    def tie() -> None:
        import resource

        system_call("prctl", PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:
            os._exit(127)  # it has died before
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))
        resource.setrlimit(resource.RLIMIT_STACK, (XL_STACK, XL_STACK))

    with Descriptor(os.open("/dev/null", os.O_RDWR)) as null, Descriptor(os.memfd_create("xl")) as output:
        streams = (null, output, output)
        if data_limit:
            pid = fork_program(path, argv, env, streams, tie)
        else:  # without a fork(2), which takes several times as long
            actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(streams)]
            pid = os.posix_spawn(path, argv, env, file_actions=actions, setsigdef=[SIGPIPE])
        ended, status = reap(pid, XL_TIME_LIMIT, os.kill)
        text = os.pread(output, OUTPUT_MAX, 0).decode("utf-8", "replace")
    return status, text if ended else f"{text}\nxl has not ended in {XL_TIME_LIMIT} s: is xenstored stuck?"


def find_xl() -> str:
    """The path of xl.  On Debian the one in PATH is a script that starts that of the running Xen: we do it as well."""
    try:
        version = ".".join(read_file(f"/sys/hypervisor/version/{part}") for part in ("major", "minor"))
    except OSError:
        version = "?"
    for folder in (f"/usr/lib/xen-{version}/bin", *PATH.split(":")):
        path = os.path.join(folder, "xl")
        if os.access(path, os.X_OK):
            return path
    raise Error("cannot find xl: install the Xen tools (Debian: xen-utils), runX drives Xen with it")


def xl_errors(output: str) -> str:
    """The sentences of libxl's messages, without the source positions that it puts before them."""
    import re

    position = re.compile(r"^(libxl|xc): error: (\S+:\d+:\s?\w+: )?(Domain \d+:)?")
    sentences = [position.sub("", line).strip() for line in output.splitlines() if not line.startswith("Parsing")]
    return "; ".join(dict.fromkeys(filter(None, sentences))) or "xl gave no reason"


def quote(value: str | int | list[str]) -> str:
    """A value of xl.cfg: libxlu_cfg_l.l knows these escapes and no numeric ones."""
    if isinstance(value, list):
        return f"[ {', '.join(map(quote, value))} ]"
    return f'"{value.translate(XL_ESCAPES)}"' if isinstance(value, str) else str(value)


def xl_config(settings: Mapping[str, str | int | list[str]]) -> str:
    """A line for each, but where there is nothing to be said."""
    return "".join(f"{key} = {quote(value)}\n" for key, value in settings.items() if value not in ("", []))


def xl_info(key: str) -> str:
    """What `xl info` says of it, "" if nothing."""
    for line in xl("info")[1].splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def host_processors() -> int:
    """How many the host has: dom0 may see fewer, and only on x86 its kernel knows of all."""
    folder = "/sys/devices/system/xen_cpu"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sum(name.startswith("xen_cpu") for name in names) or int(xl_info("nr_cpus") or 1)


def on_x86() -> bool:
    return os.uname().machine in ("x86_64", "i686")


def host_guest_type() -> str:
    """PVH where the hypervisor can run it: it needs hardware support, PV does not; on Arm there is only PVH."""
    if not on_x86():
        return "pvh"
    try:
        return "pvh" if "hvm-3.0-x86_64" in read_file("/sys/hypervisor/properties/capabilities") else "pv"
    except OSError:
        return "pv"


def change_domain(*args: str | int) -> None:
    """An xl command that changes a domain.  Some exit with 0 whatever happens, and only their messages tell."""
    status, output = xl(*args)
    if status != 0 or output.strip():
        raise Error(f"xl {args[0]} failed: {xl_errors(output)}")


class Listing(Record):
    """A domain in `xl list` (xl.1)."""

    memory: int  # MiB
    state: str  # such as "r-----": the 3rd p if paused, the 4th s once shut down, the 5th why, the 6th d if dying
    time: float  # seconds of processor time, in tenths

    def end(self) -> str:
        """How the domain ended: a letter, or "" while it lives."""
        if self.state[5] == "d":
            return "gone"
        return self.state[4] if self.state[3] == "s" else ""


def parse_listings(output: str) -> dict[int, Listing]:
    """What `xl list` says, by domid, without the lines that cannot be understood: the heading, or a message."""
    found = {}
    for line in output.splitlines():
        try:
            domid, memory, _, state, seconds = line.rsplit(None, 5)[-5:]
            if len(state) >= 6:
                found[int(domid)] = Listing(memory=int(memory), state=state, time=float(seconds))
        except ValueError:
            continue
    return found


class Domain:
    """A VM: its number, and the uuid that tells it from another one that has got the number since."""

    def __init__(self, xenstore: Xenstore, domid: int, uuid: str) -> None:
        self.xenstore = xenstore
        self.domid = domid
        self.uuid = uuid
        self.path = f"/local/domain/{domid}"

    def check(self) -> None:
        """Raise NotRunning unless it is there: a write below one that is gone would make its folder anew, for ever."""
        if self.xenstore.read(f"{self.path}/vm") != f"/vm/{self.uuid}":
            raise NotRunning()

    def told(self, node: str) -> str:
        """What the guest has written below data/, "" if nothing."""
        return self.xenstore.read(f"{self.path}/data/{node}")

    def listing(self) -> Listing | None:
        """None if there is none.  Raise Error if xl cannot tell."""
        status, output = xl("list", self.domid)
        if status != 0:
            if "does not exist" in output:
                return None
            raise Error(f"xl list failed: {xl_errors(output)}")
        listing = parse_listings(output).get(self.domid)
        if not listing:
            raise Error(f"cannot understand xl list: {output}")
        return listing

    def end(self) -> str:
        """How it ended: a letter of its Listing, "gone", or "" while it lives."""
        listing = self.listing()
        return listing.end() if listing else "gone"

    def destroy(self) -> None:
        """Destroy it and what xl started for it; no error if it is gone already."""
        status, output = xl("destroy", self.domid)
        if status != 0 and self.end() != "gone":
            raise Error(f"xl destroy failed: {xl_errors(output)}")

    def pause(self) -> None:
        change_domain("pause", self.domid)

    def unpause(self) -> None:
        change_domain("unpause", self.domid)

    def transaction(self, work: Work) -> None:
        """Xenstore.transaction() with the domain still there at its end.  Raise NotRunning."""

        def checked() -> None:
            self.check()
            work()

        self.xenstore.transaction(checked)

    def write(self, nodes: dict[str, str]) -> None:
        """Write nodes of its own, all or none.  Raise NotRunning."""
        steps = [(f"{self.path}/{node}", value) for node, value in nodes.items()]
        self.transaction(lambda: self.xenstore.write_all(steps))

    def set_memory(self, mebibytes: int) -> None:
        """Have its kernel take or give back memory, in MiB.  On Arm xl's way fails, as Xen populates nothing on demand
        there (xc_domain_set_pod_target), and to ask the kernel is all there is."""
        if on_x86():
            change_domain("mem-set", self.domid, f"{mebibytes}m")
        else:
            self.write({"memory/target": str(mebibytes << 10)})

    def shut_down(self) -> None:
        """Ask a VM that boots a system of its own to power off, as `xl shutdown` does."""
        self.write({"control/shutdown": "poweroff"})

    def start(self, words: Iterable[str], told: dict[str, str]) -> None:
        """Have the guest's init execute the container's process, which until now it was waiting to do.  words: what
        the VM has got, and is to set up before: "net" or "network", "disk".  told: nodes that it needs for that."""
        self.write({**told, "data/process/0/start": " ".join(words) or "-"})

    def request(
        self, request: str, key: str = "", data: dict[str, str] | None = None, more: Work | None = None
    ) -> None:
        """Queue what the guest's init is asked for, and ring if the process that it is about is there: who comes up
        looks at the queue by itself, and a kernel that still boots takes the bell for the VM's end.
        request: "kill N SIGNAL", "killall 0 SIGNAL", "look N", "run N" or "cpus", of process N: 0 is the container's.
        key: of two requests with one key the guest gets the last.  data: nodes to be written with it, below data/.
        more: what else belongs to the transaction.  Raise NotRunning and Error."""
        xenstore, queue = self.xenstore, f"{self.path}/data/request"
        number = request.split()[1] if request.startswith(("kill ", "look ")) else "0"

        def write() -> None:
            if more:
                more()
            xenstore.write_all([(f"{self.path}/data/{name}", text) for name, text in (data or {}).items()])
            # one reply must hold all their names, or the guest cannot list them any more (XENSTORE_PAYLOAD_MAX)
            if len(xenstore.list(queue)) >= MOST_REQUESTS:
                raise XenstoreError("list", queue, "E2BIG")
            xenstore.write(f"{queue}/{key or format(time.monotonic_ns(), '020d')}", request)
            if xenstore.read(f"{self.path}/data/process/{number}/ready"):
                xenstore.write(f"{self.path}/control/shutdown", "poweroff")

        try:
            self.transaction(write)
        except XenstoreError as error:
            what = f'takes no more requests, here "{request}" ({error.code})'
            raise Error(f"the container's VM {what}: kill it with SIGKILL if it stays so") from None


def create_domain(xenstore: Xenstore, path: str, uuid: str, memory: int, paused: bool) -> Domain:
    """`xl create` with no xl left behind.  path: of the settings, with that uuid.  memory: MiB that the VM may get."""
    options = ["-e", "-p", "-q"] if paused else ["-e", "-q"]
    # beside what it has of its own, libxc has a few bytes for each page of the VM
    status, output = xl("create", *options, path, data_limit=XL_DATA + (memory << 20 >> 6))
    if status == 0:
        domain = find_domain(xenstore, uuid)
        if not domain:
            raise Error(f"xl create made no domain with the uuid {uuid}")
        return domain
    free = xl_info("free_memory")
    if free.isdigit() and int(free) < memory:
        raise Error(f"Xen has not enough memory for a VM of {memory} MiB: {free} MiB are free")
    remedy = ": only an image in the format raw does without a QEMU" if "device model" in output.lower() else ""
    raise Error(f"xl create failed: {xl_errors(output)}{remedy}")


def find_domain(xenstore: Xenstore, uuid: str) -> Domain | None:
    """By xenstore, or else by the hypervisor's own word, a line of uuid and domid: it may be half built."""
    for domid in reversed(xenstore.list("/local/domain")):
        if xenstore.read(f"/local/domain/{domid}/vm") == f"/vm/{uuid}":
            return Domain(xenstore, int(domid), uuid)
    status, output = xl("vm-list")
    if status != 0:
        raise Error(f"xl vm-list failed: {xl_errors(output)}")
    for words in map(str.split, output.splitlines()):
        if words[:1] == [uuid]:
            return Domain(xenstore, int(words[1]), uuid)
    return None


def seen_alive(domid: int) -> bool:
    """Whether a look at all domains that began after this call finds this one alive; False also if nobody could look.
    The end of any domain wakes every monitor, and the first one looks for all that wait."""
    called = time.monotonic()
    try:
        fd = Descriptor(os.open(LIVING_FILE, os.O_RDWR | os.O_CREAT, 0o600))  # who can read it can lock it
    except OSError:
        return False
    with fd:
        while time.monotonic() < called + LOOK_TIME_LIMIT:  # one that is stuck must not stop all others
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            return domid in (last_look(fd, called) or look(fd))
    return False


def last_look(fd: int, earliest: float) -> list[int]:
    """The domids of the last look, if it began after that time; [] if it did not, or the file is not understood."""
    try:
        began, *living = os.pread(fd, 1 << 16, 0).decode("ascii").split()
        return [int(domid) for domid in living] if earliest < float(began) < time.monotonic() else []
    except ValueError:
        return []


def look(fd: int) -> list[int]:
    """Return the domids of all domains that have not ended, and write them into the file."""
    began, listings = time.monotonic(), parse_listings(xl("list")[1])
    living = [domid for domid, listing in listings.items() if not listing.end()]
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, " ".join(map(str, [began, *living])).encode(), 0)
    except OSError:
        pass  # /run is full: the others look for themselves
    return living


def remove_files(name: str) -> None:
    """Remove what xl, a QEMU that it has started for an image, and `create` have left of the domain of that name."""
    for file in os.listdir(LOG_FOLDER) if os.path.isdir(LOG_FOLDER) else ():
        if f"-{name}.log" in file:
            os.unlink(os.path.join(LOG_FOLDER, file))
    if os.path.isfile(ramdisk := f"/var/tmp/{name}"):  # its maker was killed before it had lost its name
        os.unlink(ramdisk)


def new_uuid() -> str:
    """A random uuid (RFC 4122, version 4) as text."""
    return read_file("/proc/sys/kernel/random/uuid")


# ==== devices ============================================================================================
# What a VM has of dom0: a frontend and a backend that find one another in xenstore (xen/include/public/io/xenbus.h),
# announced without xl.  Disks and network interfaces have backends in dom0's kernel, and `create` or `start` announces
# them; those of consoles and of the container's files are runX, and the monitor announces them.

XENBUS_INITIALISING, XENBUS_INITWAIT, XENBUS_INITIALISED, XENBUS_CONNECTED = "1", "2", "3", "4"
XENBUS_CLOSING, XENBUS_CLOSED = "5", "6"


class Device:
    """Device `number` of a kind ("console", "fuse", "9pfs", "vif", "vbd") of a domain."""

    def __init__(self, domain: Domain, kind: str, number: int) -> None:
        self.domain = domain
        self.xenstore = domain.xenstore
        self.kind = kind
        self.number = number
        self.frontend = f"{domain.path}/device/{kind}/{number}"
        self.backends = f"/local/domain/0/backend/{kind}"
        self.backend = f"{self.backends}/{domain.domid}/{number}"
        self.listed = f"/libxl/{domain.domid}/device/{kind}/{number}"

    def announce(self, backend: dict[str, str], frontend: dict[str, str], listed: bool = True) -> None:
        """Write both ends into xenstore, with these keys for each, in a transaction of the caller's: the guest must see
        them whole, with their permissions, or not at all.  listed: xl knows it too."""
        domid, state = self.domain.domid, XENBUS_INITIALISING
        back = {"frontend": self.frontend, "frontend-id": str(domid), "online": "1", "state": state, **backend}
        front = {"backend": self.backend, "backend-id": "0", **frontend, "state": state}
        steps: list[Step] = []
        # what the guest is told is not the guest's to change, though it adds more there
        for folder, nodes in ((self.backend, back), (self.frontend, front)):
            steps += [(folder, ""), (folder, ("n0", f"r{domid}"))]
            steps += [(f"{folder}/{key}", value) for key, value in nodes.items()]
        steps += [(node, (f"n{domid}", "r0")) for node in (f"{self.frontend}/state", self.frontend)]
        if listed:
            steps += [(f"{self.listed}/{key}", value) for key, value in {**back, "backend": self.backend}.items()]
        self.xenstore.write_all(steps)

    def unlist(self) -> None:
        """xl knows it no more.  For each device that it knows, `xl destroy` may wait seconds."""
        self.xenstore.remove(self.listed)

    def withdraw(self) -> None:
        """Take the backend out of xenstore, and the folders above once nothing else is in them."""
        self.unlist()
        self.xenstore.remove(f"/local/domain/0/error/backend/{self.kind}/{self.domain.domid}")

        def remove() -> None:
            self.xenstore.remove(self.backend)
            for folder in (f"{self.backends}/{self.domain.domid}", self.backends):
                if not self.xenstore.list(folder):
                    self.xenstore.remove(folder)

        self.xenstore.transaction(remove)

    def forget(self) -> None:
        """Withdraw it from a VM that has not been told to use it."""
        self.withdraw()
        self.xenstore.remove(self.frontend)


class OwnDevice(Device):
    """A device whose backend is runX."""

    introduce: Work  # announce it, in a transaction of the caller's
    connect: Work  # take what the guest has granted for it
    is_connected = is_confirmed = False
    waits = False  # the guest is not to be connected yet

    def follow(self) -> bool:
        """Answer a change of the frontend's state; without an answer a guest waits 5 s when it shuts down.  Return
        whether there is a frontend."""
        state = self.xenstore.read(f"{self.frontend}/state")
        if state == XENBUS_INITIALISED and not (self.is_connected or self.waits):
            self.is_connected = True
            self.connect()
        elif state in (XENBUS_CLOSING, XENBUS_CLOSED):
            self.is_confirmed = True
            self.answer(state)
        return bool(state)

    def confirm(self) -> None:
        """Tell the guest, once, that it is connected: what it has written to a console before that is taken first."""
        if self.is_connected and not self.is_confirmed:
            self.is_confirmed = True
            self.answer(XENBUS_CONNECTED)

    def answer(self, state: str) -> None:
        """Change the backend's state, unless somebody has withdrawn it: that would make its folder anew."""

        def write() -> None:
            if self.xenstore.read(f"{self.backend}/state"):
                self.xenstore.write(f"{self.backend}/state", state)

        self.xenstore.transaction(write)


# ---- the backend of a console (xen/include/public/io/console.h): one shared page, granted by the guest
#
#     0 ..1023   in    host → guest       3072 in_cons   3076 in_prod    indexes run freely modulo 2^32;
#     1024..3071 out   guest → host       3080 out_cons  3084 out_prod   prod - cons bytes wait in the ring
#
# The page stays mapped, and so readable, when the domain has ended: the last output is never lost.

CONSOLE_IN, CONSOLE_OUT = 1024, 2048  # bytes
PAGE = 4096  # bytes
EVENT_CHANNELS = "/dev/xen/evtchn"
GRANTED_PAGES = "/dev/xen/gntdev"
CONSOLE_DELAY = 0.1  # seconds that xenconsoled has for what a VM has written last
# <xen/gntdev.h>, <xen/evtchn.h>: _IOC(_IOC_NONE, letter, number, size)
IOCTL_GNTDEV_MAP_GRANT_REF = (24 << 16) | (ord("G") << 8) | 0
IOCTL_EVTCHN_BIND_INTERDOMAIN = (8 << 16) | (ord("E") << 8) | 1
IOCTL_EVTCHN_NOTIFY = (4 << 16) | (ord("E") << 8) | 4
IOCTL_EVTCHN_RESTRICT_DOMID = (2 << 16) | (ord("E") << 8) | 6


class EventChannels:
    """Readable when one of the bound channels has fired."""

    def __init__(self) -> None:
        with Attempt(f"open {EVENT_CHANNELS}", remedy="; is dom0's module xen-evtchn loaded?"):
            self.fd = os.open(EVENT_CHANNELS, os.O_RDWR | os.O_NONBLOCK)

    def bind(self, domid: int, port: int) -> int:
        """Return our number for the guest's channel port.  Raise OSError."""
        request = bytearray(struct.pack("=II", domid, port))  # for bytes, ioctl would not return the number
        return int(fcntl.ioctl(self.fd, IOCTL_EVTCHN_BIND_INTERDOMAIN, request))

    def restrict(self, domid: int) -> None:
        """Never bind a channel of another domain.  Raise OSError."""
        fcntl.ioctl(self.fd, IOCTL_EVTCHN_RESTRICT_DOMID, struct.pack("=H", domid))

    def notify(self, port: int) -> None:
        fcntl.ioctl(self.fd, IOCTL_EVTCHN_NOTIFY, struct.pack("=I", port))

    def acknowledge(self) -> None:
        """Take what has fired, and let it fire again: before the rings are looked at, so no event is lost."""
        try:
            os.write(self.fd, os.read(self.fd, 64))
        except BlockingIOError:
            pass


class Grants:
    """What guests grant of their memory."""

    def __init__(self) -> None:
        import mmap

        self.mmap = mmap.mmap
        with Attempt(f"open {GRANTED_PAGES}", remedy="; is dom0's module xen-gntdev loaded?"):
            self.fd, self.null = (os.open(path, os.O_RDWR) for path in (GRANTED_PAGES, "/dev/null"))

    def map(self, domid: int, references: Sequence[int]) -> memoryview:
        """Return the pages, one behind the other; they stay when this is closed.  Raise OSError."""
        count = len(references)
        pairs = [number for reference in references for number in (domid, reference)]
        request = bytearray(struct.pack(f"=IIQ{2 * count}I", count, 0, 0, *pairs))
        fcntl.ioctl(self.fd, IOCTL_GNTDEV_MAP_GRANT_REF, request)
        copy = os.dup(self.fd)
        os.close(copy)
        pages = self.mmap(self.fd, PAGE * count, offset=struct.unpack_from("=Q", request, 8)[0])
        os.dup2(self.null, copy, False)  # mmap keeps a copy of the descriptor, by which anything could be mapped
        return memoryview(pages)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.null)


class Barrier:
    """A full memory barrier, as xenconsoled has it (xen_mb()) between the ring's bytes and its indexes.  Python has
    none, but to give up a lock is a release, and to take it an acquire (POSIX 4.12 "Memory Synchronization"; C's
    atomics in CPython), and these two stay in this order: what stands before is seen by all before what stands behind.
    The other way round they would not do: both sides could move to between them."""

    def __init__(self) -> None:
        import _thread

        self.lock = _thread.allocate_lock()
        self.lock.acquire()

    def __call__(self) -> None:
        self.lock.release()
        self.lock.acquire()


class Console(OwnDevice):
    """Console `number` of a domain: /dev/hvc<number> in the guest."""

    def __init__(self, domain: Domain, number: int, channels: EventChannels) -> None:
        super().__init__(domain, "console", number)
        self.channels = channels
        self.barrier = Barrier()
        self.page = memoryview(b"")
        self.indexes = memoryview(struct.pack("=4I", 0, CONSOLE_IN, 0, 0)).cast("I")  # nothing waits, nothing has room

    def introduce(self) -> None:
        # a type of our own, so that xenconsoled does not take it
        self.announce({}, {"type": "runx", "limit": "0"}, listed=False)

    def connect(self) -> None:
        domid = self.domain.domid
        with Attempt(f"connect to console {self.number} of domain {domid}", ValueError, struct.error):
            reference, port = self.xenstore.read_numbers(f"{self.frontend}/ring-ref", f"{self.frontend}/port")
            grants = Grants()
            try:
                page = grants.map(domid, [reference])
            finally:
                grants.close()
            self.port = self.channels.bind(domid, port)
        self.page = page
        self.indexes = page[3072:3088].cast("I")  # in_cons, in_prod, out_cons, out_prod

    def take(self) -> bytes:
        """What the guest has written, at most one ring full; b"" if nothing."""
        _, _, cons, prod = self.indexes
        count = (prod - cons) & 0xFFFFFFFF
        if count == 0:
            return b""
        if count > CONSOLE_OUT:  # only a guest that means no good writes such an index
            raise Error(f"console {self.number} of domain {self.domain.domid}: the ring's indexes are impossible")
        self.barrier()  # the index is read before what it counts
        start, ring = cons % CONSOLE_OUT, bytes(self.page[CONSOLE_IN : CONSOLE_IN + CONSOLE_OUT])
        data = (ring + ring)[start : start + count]
        self.barrier()  # all is read before the guest may write there again
        self.indexes[2] = prod
        self.channels.notify(self.port)
        return data

    def room(self) -> int:
        """How many bytes the guest's side can take now."""
        cons, prod, *_ = self.indexes
        return max(0, CONSOLE_IN - ((prod - cons) & 0xFFFFFFFF))

    def put(self, data: bytes) -> int:
        """Write what fits.  Return how many bytes that were."""
        data = data[: self.room()]
        if data:
            self.barrier()  # the guest has read all that is overwritten
            prod = self.indexes[1]
            start = prod % CONSOLE_IN
            first = min(len(data), CONSOLE_IN - start)
            self.page[start : start + first] = data[:first]
            self.page[0 : len(data) - first] = data[first:]
            self.barrier()  # what the index counts is there before it
            self.indexes[1] = (prod + len(data)) & 0xFFFFFFFF
            self.channels.notify(self.port)
        return len(data)


def consoles_of(domain: Domain, number: int) -> list[Device]:
    """Those of process `number`: standard input and output, and errors."""
    return [Device(domain, "console", 2 * number + each) for each in (1, 2)]


class FirstConsole:
    """The VM's first console, of which xenconsoled makes a pty: for a VM that boots a system of its own."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ended = False

    def take(self) -> bytes:
        """What the guest has written, b"" if nothing."""
        try:
            data = os.read(self.fd, CONSOLE_OUT)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""  # xenconsoled has gone
        self.ended = not data
        return data

    def waits(self) -> bool:
        """Whether something more comes in time: what the VM has written last may be on its way through xenconsoled."""
        return not self.ended and bool(select.select([self.fd], [], [], CONSOLE_DELAY)[0])

    def put(self, data: bytes) -> int:
        """Write what fits.  Return how many bytes that were."""
        try:
            return os.write(self.fd, data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody is there


# ==== container ==========================================================================================
# A container is the folder <root>/<id>; the folder is made by create and removed by delete.  state.json is written here
# only, and flock(2) on the folder keeps operations on one container apart.

STATE_VERSION = 1
STANDARD_DEVICES = [["console", 1], ["console", 2], ["fuse", 0], ["9pfs", 0]]  # which a VM may have from the beginning
ESSENTIAL = ("status", "bundle", "uuid", "name", "pid", "pid_start_time")  # no state.json is without these


class State(Record):
    """What state.json holds: each key with what it is as long as nothing is written, or was by an older runX."""

    version: int = STATE_VERSION
    status: str = "creating"  # or created, running; what else there is follows from the processes and from Xen
    paused: bool = False
    switched: int = 0  # seconds of CLOCK_MONOTONIC when its VM was last started, paused or resumed
    oci_version: str = "1.0.0"
    bundle: str = ""
    rootfs: str = ""
    created: str = "0001-01-01T00:00:00Z"  # RFC 3339; Go has no empty time
    annotations: dict[str, str] = {}
    hooks: JsonObject = {}  # as in config.json
    hostname: str = ""  # that a DHCP server is told
    startable: bool = True  # config.json has a process
    own_init: bool = False
    starts_paused: bool = True  # the VM does not run before `start`
    is_sandbox: bool = False  # of a pod: it has no VM
    # what is there of it
    boot: str = ""  # of which boot_id() all of it is
    pid: int = 0  # the container's: the holder's, and until there is one the monitor's
    pid_start_time: int = 0
    monitor: list[int] = [0, 0]  # pid, start time
    cgroups: list[list[str]] = []  # [root, path] of each
    uuid: str = ""  # of the domain
    name: str = ""
    domid: int = 0  # 0 until it is built
    devices: list[list[Any]] = []  # [kind, number] of each that runX has announced
    plugged: list[JsonObject] = []  # a Vif each
    last_vif: int = -1  # the highest number that a vif of the VM has had
    # what the VM is made from
    namespace: str | None = None  # path of the engine's network namespace; "": one of its own, None: none
    networks: list[JsonObject] = []  # an Attachment each
    rate: str = ""  # of the interfaces in namespace
    disk: JsonObject | None = None  # a Disk
    maxmem: int = 0  # MiB
    maxvcpus: int = 0
    resources: JsonObject = {}  # linux.resources of config.json, as `update` has changed it
    base: dict[str, int] = {}  # what Resources has beside these
    updating: bool = False  # an `update` has begun, and Xen may have anything

    def may_run(self) -> bool:
        """Whether its VM runs unless it is paused: one that boots a system of its own does so from `start` on."""
        return not self.is_sandbox and (self.status == "running" or not self.starts_paused)


def parse_state(text: str) -> State:
    """The State in state.json.  Raise Error where a newer runX has written it, and ValueError where none can have."""
    found = parse_json(text)
    if not isinstance(found, dict) or not all(key in found for key in ESSENTIAL):
        raise ValueError("something is missing")
    version = found.get("version", 0)
    if version not in range(STATE_VERSION + 1):
        if isinstance(version, int) and version > 0:
            raise Error(f"its state has version {version}, and this runX knows {STATE_VERSION}: use the newer one")
        raise ValueError("version")
    if version == 0:
        fill_up(found)
    state = State(**{key: value for key, value in found.items() if key in State.__annotations__})
    optional = {"namespace": str, "disk": dict}
    for key, value in state.__dict__.items():
        if type(value) not in (type(getattr(State, key)), optional.get(key)):
            raise ValueError(key)
    numbers = [*state.monitor, *(number for _, number in state.devices)]
    if state.status not in ("creating", "created", "running") or set(map(type, numbers)) != {int}:
        raise ValueError("status, monitor or devices")
    return state


def fill_up(found: JsonObject) -> None:
    """Give the state of a runX before 0.2 today's keys, as far as their defaults would not do."""
    found["oci_version"] = found.pop("ociVersion", State.oci_version)
    found["devices"] = [*STANDARD_DEVICES]
    for kind in ("vif", "vbd"):
        found["devices"] += [[kind, number] for number in found.pop(f"{kind}s", [])]
    namespace = found.get("namespace") or f"/proc/{found.get('pid')}/ns/net"
    unknown = {"number": -1, "mac": "", "mtu": 0, "namespace": namespace, "index": 0}
    found["plugged"] = [{**unknown, "device": name} for name in found.pop("joined", [])]


def told_to_xl(path: str) -> dict[str, str]:
    """name and uuid of the VM as xl.cfg has them, {} if it has not: for a container whose state is lost."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            settings = dict(line.split(" = ", 1) for line in file if " = " in line)
        return {key: settings[key].strip('"\n') for key in ("name", "uuid")}
    except (OSError, KeyError):
        return {}


class Container:
    """One container: its folder, its stored state, its lock."""

    def __init__(self, root: str, container_id: str) -> None:
        allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-."
        if container_id in ("", ".", "..") or len(container_id) > 200 or container_id.strip(allowed):
            raise Error(f"invalid container ID format: {container_id!r}: use up to 200 of A-Z a-z 0-9 _ + - .")
        self.id = container_id
        self.folder = os.path.join(root, self.id)
        self.state = State()
        self.forgiving = False  # a state that cannot be read is an empty one

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def reserve(self) -> None:
        """Make the folder: the step of which two creates of one id can do only one."""
        try:
            os.makedirs(os.path.dirname(self.folder), 0o711, exist_ok=True)
            os.mkdir(self.folder, 0o700)
        except OSError as error:
            if isinstance(error, FileExistsError) and error.filename == self.folder:
                raise Error(f"container with given ID already exists: {self.id}") from None
            raise Error(f"cannot make {error.filename}: {error.strerror}") from None

    # ---- state.json

    def load(self) -> Container:
        path = self.path("state.json")
        try:
            with open(path, encoding="utf-8") as file:
                self.state = parse_state(file.read())
        except (FileNotFoundError, NotADirectoryError):
            try:
                names = set(os.listdir(self.folder))
            except OSError:
                raise NoContainer(self.id) from None
            if names - {"state.json.new"} and "xl.cfg" not in names:
                raise NoContainer(self.id) from None  # the folder is not ours: nobody may remove it by our hand
            self.state = State(**told_to_xl(self.path("xl.cfg")))  # between its first two steps, or killed there
        except (Error, OSError, ValueError, TypeError) as error:
            if not self.forgiving:
                remedy = f"remove the container by `runX delete --force {self.id}`"
                reason = f": {error}" if isinstance(error, Error) else f", runX has not written it so: {remedy}"
                raise Error(f"cannot read {path}{reason}") from None
            self.state = State(**told_to_xl(self.path("xl.cfg")), devices=STANDARD_DEVICES)
        return self

    def save(self, **changes: Any) -> None:
        """Store the state with these changes, or leave it as it was.  Raise Error."""
        path = self.path("state.json")
        state = State(**{**self.state.__dict__, **changes})
        with Attempt(f"write {path}"):
            write_file(path + ".new", json_text(state.__dict__))
            os.rename(path + ".new", path)
        self.state = state

    def public_state(self, status: str = "") -> JsonObject:
        """The state as runtime.md and `runc state` give it.  status: what hooks are told, where it is not that yet."""
        status, state = status or self.status(), self.state
        return {
            "ociVersion": state.oci_version,
            "id": self.id,
            "pid": state.pid if status != "stopped" else 0,
            "status": status,
            "bundle": state.bundle,
            "rootfs": state.rootfs,
            "created": state.created,
            "annotations": state.annotations,
            "owner": "",
        }

    def remove(self) -> None:
        """Remove the folder, by name and only what create made: below `share` there may be mounts of others' files."""
        mounts = self.path("share/mounts")
        for name in os.listdir(mounts) if os.path.isdir(mounts) else ():
            remove_empty(os.path.join(mounts, name))
        for name in ("share/mounts", "share/rootfs", "share"):
            remove_empty(self.path(name))
        for name in sorted(os.listdir(self.folder), key="state.json".__eq__):  # the last says what is to be done
            if not os.path.isdir(self.path(name)):
                os.unlink(self.path(name))
        remove_empty(self.folder)

    # ---- the lock

    def __enter__(self) -> Container:
        """`with container:` waits for other operations on it, and loads what they have stored."""
        while True:
            try:
                self.lock_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
            except (FileNotFoundError, NotADirectoryError):
                raise NoContainer(self.id) from None
            try:
                if self.is_ours():
                    return self.load()
            except Error:
                os.close(self.lock_fd)
                raise
            os.close(self.lock_fd)  # deleted while we waited, and perhaps made again

    def __exit__(self, *_: object) -> None:
        os.close(self.lock_fd)

    def is_ours(self) -> bool:
        """Whether the folder that we have locked is still the container's."""
        try:
            return os.path.samestat(os.fstat(self.lock_fd), os.stat(self.folder))
        except FileNotFoundError:
            return False

    # ---- what is there of it

    def status(self, ask: bool = True) -> str:
        """creating, created, running or stopped (runtime.md "State"), and runc's paused.  ask: Xen, if that must be."""
        state = self.state
        is_held = process_start_time(state.pid) == state.pid_start_time and self.is_of_this_boot()
        if state.pid and not is_held:
            return "stopped"
        if ask and state.domid and self.unsettled():
            self.settle()
        return "paused" if state.paused else state.status

    def is_of_this_boot(self) -> bool:
        return self.state.boot in ("", boot_id())

    def domain(self) -> Domain:
        """Its VM.  Raise NotRunning."""
        self.check_vm()
        domain = Domain(Xenstore(), self.state.domid, self.state.uuid)
        domain.check()
        return domain

    def check_vm(self) -> None:
        if self.state.is_sandbox:
            raise Error(f"container {self.id} is the sandbox of a pod, and has no VM")

    def switch(self, work: Work, **changes: Any) -> None:
        """Have the VM paused, unpaused or started by work, which it is not yet, and store what has changed by that.  A
        file `unsettled` is there from before to after: whoever finds it asks how it is.  It is empty, so that a full
        disk has room for it, and there the rest can wait; its name tells whether the container has been started."""
        mark = self.path(f"unsettled-{self.state.status}")
        with Attempt(f"make {mark}"):
            write_file(mark, "")
        work()
        try:
            self.save(**changes, switched=int(time.monotonic()))
        except Error:
            return
        for mark in self.unsettled():
            os.unlink(mark)

    def unsettled(self) -> list[str]:
        return list(filter(os.path.exists, map(self.path, ("unsettled-created", "unsettled-running"))))

    def settle(self) -> None:
        """Take over from Xen and xenstore whether the container is started, and its VM paused."""
        state = self.state
        try:
            domain = self.domain()
            listing, started = domain.listing(), self.path("unsettled-running") in self.unsettled()
            if not started and not state.starts_paused:
                started = bool(domain.told("process/0/start"))
        except NotRunning:
            return  # its monitor is about to end
        paused = bool(listing and listing.state[2] == "p")
        if started or state.starts_paused and listing and not paused:
            state.status = "running"
        if listing and state.may_run():
            state.paused = paused

    def acquire(self, device: Device) -> None:
        """Note a device before it is announced: whoever ends the container withdraws it."""
        self.save(devices=[*self.state.devices, [device.kind, device.number]])

    def release(self, device: Device) -> None:
        """Take it away from a VM that has not been told to use it."""
        device.forget()
        self.save(devices=[each for each in self.state.devices if each != [device.kind, device.number]])

    def tell_monitor(self, request: str) -> None:
        """request: see Monitor.handle_control().  Raise NotRunning."""
        try:
            with Descriptor(os.open(self.path("control"), os.O_WRONLY | os.O_NONBLOCK)) as fd:
                os.write(fd, request.encode() + b"\n")
        except BlockingIOError:
            raise Error(f"the monitor of container {self.id} takes no more requests: is xl stuck?") from None
        except OSError:  # no such file, or nobody reads it
            raise NotRunning() from None

    def open_pidfd(self) -> int | None:
        """A descriptor that is readable once the container has ended; None if it has."""
        if not self.state.pid or self.status() == "stopped":
            return None
        try:
            return os.pidfd_open(self.state.pid)
        except ProcessLookupError:
            return None


def is_locked(container: Container) -> bool:
    """Return whether another operation on it goes on."""
    try:
        with Descriptor(os.open(container.folder, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return False


def carriers_of(container: Container) -> dict[int, list[int]]:
    """pid and start time of who carries it, or 0 and 0, for each process of `exec` by its number."""
    found = {}
    for name in os.listdir(container.folder):
        kind, _, number = name.partition("-")
        if kind == "process" and number.isdecimal():
            try:
                words = read_file(container.path(name)).split()
                found[int(number)] = [*map(int, words), 0, 0][:2]
            except FileNotFoundError:
                pass  # it has just ended
    return found


def remove_empty(path: str) -> None:
    """Remove an empty folder or file, if it is there; what has content stays, and that is an Error."""
    with Attempt(f"remove {path}"):
        if os.path.isdir(path):
            os.rmdir(path)
        elif os.path.lexists(path):
            if os.path.getsize(path):
                raise OSError(0, "it is not empty")
            os.unlink(path)


# ==== OCI config =========================================================================================
# config.json of the bundle (runtime-spec config.md), checked and parsed once into Config.

if TYPE_CHECKING:
    T = TypeVar("T")
    BootFile = tuple[str, bool]  # its path, whether that is in the rootfs
    Netconf = tuple[str, str, str, str]  # variable, file, name of the network, address or ""
    Namespaces = dict[str, str]  # path of the one to join, or "", by type
    Options = dict[str, Union[str, list[str]]]  # of xl.cfg

REQUIRED: Any = object()  # in place of a default
JSON_NAMES = {"dict": "object", "list": "array", "str": "string", "int": "integer", "bool": "boolean"}
ANY = float("inf")


class Section:
    """A JSON object that knows its place in a document, and a method for each type that a member may have.  One that is
    null is as good as missing, for engines write both: the default is returned, whatever the bounds are.  What is
    missing without a default, of another type or out of bounds raises Error."""

    def __init__(self, values: Any, where: str, separator: str = ".", warnings: list[str] | None = None) -> None:
        if type(values) is not dict:
            raise Error(f"{where} must be a JSON object")
        self.values: JsonObject = values
        self.where = where
        self.separator = separator  # between that and the name of a member
        self.warnings: list[str] = [] if warnings is None else warnings  # the whole document's

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def place(self, key: str) -> str:
        return f"{self.where}{self.separator}{key}"

    def refuse(self, reason: str, key: str = "") -> NoReturn:
        """Raise Error, of the member if there is a key."""
        raise Error(f"{self.place(key) if key else self.where} {reason}")

    def member(self, key: str, kind: type[T], default: T = REQUIRED) -> T:
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                self.refuse("is missing", key)
            return default
        if type(value) is not kind:  # exactly: to Python, true is an int
            self.refuse(f"must be a JSON {JSON_NAMES[kind.__name__]}", key)
        return value

    def flag(self, key: str) -> bool:
        return self.member(key, bool, False)

    def number(self, key: str, default: int = REQUIRED, least: float = -ANY, most: float = ANY) -> int:
        number = self.member(key, int, default)
        if key in self and not least <= number <= most:
            self.refuse(f"must not be below {least}" if most == ANY else f"must be from {least} to {most}", key)
        return number

    def unsigned(self, key: str, bits: int, default: int = 0) -> int:
        return self.number(key, default, 0, 2**bits - 1)

    def text(self, key: str, default: str = REQUIRED) -> str:
        return self.member(key, str, default)

    def path(self, key: str) -> str:
        path = self.text(key)
        if not path.startswith("/"):
            self.refuse("must be an absolute path", key)
        return path

    def choice(self, key: str, known: Collection[str], default: str = REQUIRED) -> str:
        text = self.text(key, default)
        if text not in known:
            self.refuse(f"must be one of {', '.join(filter(None, known))}, not {printable(text)}", key)
        return text

    def section(self, key: str) -> Section:
        """Return an empty one where it is missing."""
        return Section(self.member(key, dict, {}), self.place(key), ".", self.warnings)

    def each(self, key: str, read: Callable[..., T], *args: Any, default: Sequence[T] = ()) -> list[T]:
        """Return what a method of Section makes of each item of an array."""
        items = self.member(key, list, list(default))
        array = {f"[{number}]": item for number, item in enumerate(items)}
        section = Section(array, self.place(key), "", self.warnings)
        return [read(section, place, *args) for place in array]

    def sections(self, key: str) -> list[Section]:
        return self.each(key, Section.section)

    def texts(self, key: str, default: Sequence[str] = ()) -> list[str]:
        return self.each(key, Section.text, default=default)

    def table(self, key: str) -> dict[str, str]:
        """Return an object that holds only strings."""
        section = self.section(key)
        return {name: section.text(name) for name in section.values}


class Config:
    """<bundle>/config.json."""

    def __init__(self, bundle: str) -> None:
        """Raise Error, in runc's words where engines show them."""
        spec, self.text = read_config(bundle)  # all of it
        linux, vm = spec.section("linux"), spec.section("vm")
        namespaces = parse_namespaces(linux)
        self.joined = {kind: path for kind, path in namespaces.items() if path and kind != "network"}
        warn_of_no_effect(spec)
        self.warnings = spec.warnings  # what is asked for and cannot be had in a VM, a sentence each
        self.hostname, self.domainname = parse_names(spec, namespaces)
        self.hooks = spec.section("hooks").values  # as there: parse_hooks() accepts them
        for kind in HOOK_KINDS:
            parse_hooks(self.hooks, kind)
        # None: such a container can be created but not started
        self.process = Process(spec.section("process"), spec) if "process" in spec else None
        self.mounts = [Mount(bundle, mount) for mount in spec.sections("mounts")]
        for number, mount in enumerate(filter(Mount.on_host, self.mounts)):
            mount.place = f"mounts/{number}"
        host = Host()
        hardware = vm.section("hwConfig" if "hwConfig" in vm else "hwconfig")  # the document's spelling and Go's
        annotations = parse_annotations(spec, linux.section("resources"), host)
        env = believed_variables(spec, self.process.env if self.process else [], host)
        self.machine = Machine(bundle, vm, hardware, annotations, env, host)
        if self.machine.own_init and self.hooks.get("startContainer"):
            spec.section("hooks").refuse("need runX's own init, and the VM boots another one", "startContainer")
        self.raw_resources = linux.section("resources").values  # linux.resources: what `update` must not change
        if memory := hardware.number("memory", 0, 0) or annotations.number("memory") << 20:
            limit = {**(self.raw_resources.get("memory") or {}), "limit": memory}
            self.raw_resources = {**self.raw_resources, "memory": limit}
        self.base = {  # those fields of Resources that are not there
            "default_memory": host.memory or DEFAULT_MEMORY,
            "minimum_memory": 1 if self.machine.own_init else MINIMUM_MEMORY,
            "default_vcpus": host.vcpus or 1,
            "fixed_vcpus": hardware.number("vcpus", 0, 0) or annotations.number("vcpus"),
            "most_vcpus": VCPUS_MAX,
        }
        # each network that process.env asks for; path of the network namespace to join, "": a new one, None: none
        self.netconf, self.namespace = find_networks(spec, env, namespaces, self.mounts)
        self.netconf_folders = host.netconf  # where these files may be
        self.oci_version = check_version(spec.text("ociVersion"))
        self.rootfs = find_rootfs(bundle, spec, self.machine)  # absolute
        self.readonly = spec.section("root").flag("readonly")
        self.linux = Linux(linux, namespaces)
        self.annotations = spec.table("annotations")
        self.is_sandbox, self.sandbox = parse_pod(self.annotations, self.process.args if self.process else [])
        if self.is_sandbox and self.hooks.get("startContainer"):
            self.warnings.append("hooks.startContainer has no effect on the sandbox of a pod: nothing runs in it")
        self.resources = Resources(self.raw_resources, "config.json: linux.resources", self.base)
        self.cgroup = linux.text("cgroupsPath", "")
        rate = annotations.text("rate", "")
        self.rate = rate and parse_rate(rate)  # of the network interfaces, as netback wants it


def read_config(bundle: str) -> tuple[Section, str]:
    """Return it, and its text.  Raise Error."""
    path = os.path.join(bundle, "config.json")
    if not os.path.exists(path):
        raise Error(f"JSON specification file config.json not found in bundle {bundle}")
    with Attempt(f"read config.json of bundle {bundle}", ValueError):
        text = read_text(path)
        return Section(check_document(parse_json(text)), "config.json", ": "), text


def check_version(version: str) -> str:
    """Return any 1.x, pre-releases included: minor versions only add properties."""
    numbers = version.replace("-", "+").partition("+")[0].split(".")
    is_known = len(numbers) == 3 and numbers[0] == "1" and all(is_number(each, 60) for each in numbers)
    if not is_known or len(version) > 60:
        raise Error(f'config.json: ociVersion "{printable(version[:60])}" is not supported: runX knows 1.0.0 to 1.3.x')
    return version


# what a VM cannot have or does not need, and an engine may ask for: docs/config.md gives the reasons
NOT_APPLIED = """
    process.apparmorProfile process.selinuxLabel process.execCPUAffinity linux.personality.flags linux.memoryPolicy
    linux.timeOffsets linux.mountLabel linux.intelRdt linux.netDevices linux.resources.rdma linux.resources.blockIO
    linux.resources.network linux.resources.cpu.burst linux.resources.cpu.idle linux.resources.cpu.mems
    linux.resources.cpu.realtimePeriod linux.resources.cpu.realtimeRuntime linux.resources.memory.kernelTCP
    linux.resources.memory.swappiness linux.resources.memory.disableOOMKiller linux.resources.memory.kernel
""".split()


def warn_of_no_effect(spec: Section) -> None:
    """Warn of each property that is asked for and has no effect.  Raise Error for what must not be ignored."""
    linux = spec.section("linux")
    for key in ("uidMappings", "gidMappings"):
        if linux.member(key, list, []):
            linux.refuse("cannot be applied: the container's root is root of its own VM", key)
    for path in NOT_APPLIED:
        *names, key = path.split(".")
        section = spec
        for name in names:
            section = section.section(name)
        asked = section.values.get(key)
        if asks(asked) or asked and key == "netDevices":  # which are moved also if nothing is said of them
            spec.warnings.append(f"{path} has no effect on a container in a VM of its own")


def asks(value: Any) -> bool:
    """Return whether a property asks for anything: engines write many that are empty, or say that there is no limit."""
    if isinstance(value, dict):
        return any(asks(inner) for inner in value.values())
    return bool(value) and value != -1


def parse_names(spec: Section, namespaces: Namespaces) -> tuple[str, str]:
    """Return hostname and domainname."""
    names = spec.text("hostname", ""), spec.text("domainname", "")
    if any(names) and namespaces and "uts" not in namespaces:
        raise Error("config.json: hostname and domainname need a uts namespace in linux.namespaces")
    if any(len(name.encode()) > 64 for name in names):  # __NEW_UTS_LEN
        raise Error("config.json: hostname and domainname must not be longer than 64 bytes")
    return names


def find_rootfs(bundle: str, spec: Section, machine: Machine) -> str:
    """Return the path of a folder, or of an image: a file or block device."""
    root = spec.section("root").text("path", "" if machine.image else REQUIRED)
    path = os.path.join(bundle, machine.image or root)
    if machine.image or not os.path.isdir(path):
        if machine.own_init or not is_image(path):
            if machine.image:
                raise Error(f"the image {path} is neither a file nor a block device")
            raise Error(f"the rootfs {path} is not a folder: unpack or mount the image there before create")
        if machine.rootfs not in ("block", "auto"):
            raise Error(f"the rootfs {path} is an image, which is not for {machine.rootfs}: use org.runx.rootfs=block")
    rootfs = os.path.realpath(path)
    folder = os.path.join(bundle, root)
    if root and os.path.isdir(folder):
        check_links(spec.section("vm"), bundle, folder)
    return rootfs


def is_image(path: str) -> bool:
    """Return whether it is a file or a block device."""
    mode = os.stat(path).st_mode if os.path.exists(path) else 0
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def check_links(vm: Section, bundle: str, root: str) -> None:
    """Raise Error if a file that vm names in the rootfs, a folder, is elsewhere, by a link of the image's or as a node
    of a device of dom0's."""
    for name, key in (("kernel", "path"), ("kernel", "initrd"), ("image", "path")):
        section = vm.section(name)
        path = section.text(key, "") or "/"
        if not os.path.isabs(path):
            path = os.path.join(bundle if name == "image" else os.getcwd(), path)
        above = os.path.dirname(path)
        while above.strip("/") and not os.path.samefile(above, root):  # whatever the name is by which it leads there
            above = os.path.dirname(above)
        if not above.strip("/"):
            continue  # it is elsewhere
        if not os.path.realpath(path).startswith(f"{os.path.realpath(root)}/"):
            raise Error(f"{section.place(key)}: a link leads from {path} out of the rootfs")
        if not os.path.isfile(path):
            raise Error(f"{section.place(key)}: {path} is in the rootfs, and not a regular file there")


# in the order of a container's life; runtime-spec config.md "POSIX-platform Hooks"
HOOK_KINDS = "prestart createRuntime createContainer startContainer poststart poststop".split()


class Hook:
    def __init__(self, spec: Section) -> None:
        self.path = spec.path("path")
        self.args = spec.texts("args") or [self.path]  # argv
        self.env = spec.texts("env")
        self.timeout = spec.number("timeout", 0, 1, 2**31 - 1)  # seconds, 0: none


def parse_hooks(hooks: JsonObject, kind: str) -> list[Hook]:
    """Return the Hooks of one kind of config.json's hooks object."""
    return [Hook(spec) for spec in Section(hooks, "config.json: hooks").sections(kind)]


# ---- what the host says, and whom it believes

MACHINE_TYPES = ("", "pv", "pvh")
ROOTFS_MODES = ("9p", "ramdisk", "block", "auto")
# docs/security.md: an annotation may be the image's, and config.json does not tell whose a variable is
ANNOTATIONS = "memory vcpus maxmem maxvcpus rootfs rate type kernel ramdisk cmdline xlconf".split()
VARIABLES = ("NETCONF", "RUNX_KERNEL", "RUNX_RAMDISK", "XLCONF")


class Host:
    """The host's own settings (docs/machine.md)."""

    def __init__(self) -> None:
        """Read HOST_CONFIG; what is silent or absent there has its default."""
        with Attempt(f"read {HOST_CONFIG}", ValueError):
            document = read_document(HOST_CONFIG) if os.path.lexists(HOST_CONFIG) else {}
        spec = Section(document, HOST_CONFIG, ": ")
        self.type = spec.choice("type", MACHINE_TYPES, "")
        self.memory = spec.number("memory", 0, 0)  # MiB, 0: not said
        self.vcpus = spec.number("vcpus", 0, 0)  # 0: not said
        self.cmdline = spec.text("cmdline", "")
        self.rootfs = spec.choice("rootfs", ROOTFS_MODES, "auto")
        self.xlconf = spec.texts("xlconf", ["/etc/runX/xl"])  # folders
        self.netconf = spec.texts("netconf", ["/etc/cni/net.d"])  # folders
        self.maxmem = spec.number("maxmem", 512, 0)  # MiB
        # those that are believed
        self.annotations = spec.each("annotations", Section.choice, ANNOTATIONS, default=ANNOTATIONS[:6])
        self.environment = spec.each("environment", Section.choice, VARIABLES, default=VARIABLES[:3])
        if spec.values.keys() - vars(self).keys():
            spec.refuse(f"must be a JSON object with no other members than {', '.join(vars(self))}")


def parse_annotations(spec: Section, resources: Section, host: Host) -> Section:
    """Return org.runx.* as far as the host believes them: they may be the image's."""
    table, known = spec.table("annotations"), {f"org.runx.{name}": name for name in host.annotations}
    warn_of_dropped(spec, "annotations", [key for key in table if key.startswith("org.runx.") and key not in known])
    believed: JsonObject = {name: table.get(key) for key, name in known.items()}
    annotations = Section(believed, "config.json: the annotation org.runx.", "")
    # no higher than config.json's resources allow, or the host where these do not say
    limits = Resources(resources.values, resources.where, {})
    bounds = {"maxmem": host.maxmem, "memory": host.maxmem}
    if limits.memory > 0:
        bounds["memory"] = limits.memory >> 20
    if limits.quota > 0:
        bounds["vcpus"] = limits.vcpus(0)
    for name in ("maxmem", "memory", "vcpus", "maxvcpus"):
        text = annotations.text(name, "") or "0"
        if not is_number(text, 7):
            annotations.refuse("must be a number", name)
        believed[name] = min(int(text), bounds.get(name, int(text)))
        if believed[name] < int(text):
            spec.warnings.append(f"the annotation org.runx.{name} cannot be {int(text)}, it is {believed[name]}")
    return annotations


def believed_variables(spec: Section, env: list[str], host: Host) -> list[str]:
    """Return the variables of the environment without those of VARIABLES that the host does not believe."""
    kept, dropped = [], []
    for variable in env:
        name, _, value = variable.partition("=")
        kind = name.rstrip("0123456789") if name.startswith("NETCONF") else name
        if value and kind in VARIABLES and kind not in host.environment:
            dropped.append(name)
        else:
            kept.append(variable)
    warn_of_dropped(spec, "variables", dropped)
    return kept


def warn_of_dropped(spec: Section, what: str, names: list[str]) -> None:
    if names:
        text = printable(", ".join(names)[:400])
        spec.warnings.append(f"these {what} have no effect, for {HOST_CONFIG} does not believe them: {text}")


def read_trusted(what: str, path: str, folders: list[str]) -> str:
    """Return the text of a file that a variable names, perhaps the image's: it must be where only root puts files."""
    path = os.path.realpath(path)
    above = [folder for folder in map(os.path.realpath, folders) if path.startswith(folder + "/")]
    if not above:
        raise Error(f"{what} {path} is in none of the folders that {HOST_CONFIG} allows: {', '.join(folders)}")
    with Attempt(f"read {what} {path}", ValueError):
        part = path
        while len(part) >= len(above[0]):
            status = os.stat(part)
            if status.st_uid != 0 or status.st_mode & 0o022:
                raise Error(f"{what} {path} is not to be trusted: others than root may write to {part}")
            part = os.path.dirname(part)
        return read_text(path)


# ---- the VM: config-vm.md, and linux.resources


def parse_iomem(spec: Section) -> str:
    """Return a range of page frames as xl.cfg.5 wants it, in hexadecimal: MFN,NUMBER[@GFN]."""
    first = spec.number("firstMFN", least=0)
    count = spec.number("nrMFNs", least=1)
    guest = spec.number("firstGFN", -1, 0)
    return f"{first:x},{count:x}" + (f"@{guest:x}" if guest >= 0 else "")


class Machine:
    """What the VM is made of beside Resources, as config.json's vm object, an annotation or the host has it."""

    def __init__(
        self, bundle: str, vm: Section, hardware: Section, annotations: Section, env: list[str], host: Host
    ) -> None:
        """vm goes before annotations, these before env, what the image says in its environment."""
        boot = vm.section("kernel")
        disk = vm.section("image")
        hypervisor = vm.section("hypervisor")
        said = dict(variable.partition("=")[::2] for variable in env)

        def asked(annotation: str, variable: str) -> str:
            return annotations.text(annotation, "") or said.get(variable, "")

        self.kernel = find_boot_file(boot.text("path", ""), asked("kernel", "RUNX_KERNEL"))  # None: ours
        self.ramdisk = find_boot_file(boot.text("initrd", ""), asked("ramdisk", "RUNX_RAMDISK"))
        image = disk.text("path", "") and os.path.join(bundle, disk.text("path"))
        kind = (disk.choice("format", IMAGE_FORMATS, "") or "raw") if image else ""
        # the VM boots a system of its own, and nothing of ours is in it
        self.own_init = bool(self.ramdisk or (image and self.kernel))
        self.image = "" if self.own_init else image  # of a disk that is the rootfs; "": root.path says where that is
        self.options: Options = {  # of xl.cfg
            "device_tree": hardware.text("deviceTree", ""),
            "dtdev": hardware.texts("dtdevs"),
            "iomem": [parse_iomem(entry) for entry in hardware.sections("iomems")],
            "irqs": [str(number) for number in hardware.each("irqs", Section.number, REQUIRED, 0)],
        }
        if image and self.own_init:
            check_references(image, kind)
            self.options["disk"] = [f"format={kind},vdev=xvda,access=rw,target={image}"]
        if not self.kernel and (self.ramdisk or kind not in ("", "raw")):
            raise Error("a VM with its own ramdisk or disk image needs its own kernel too: name it where that is named")
        program = hypervisor.text("path", "")
        if program and os.path.basename(program) != "xl":
            hypervisor.refuse(f"cannot be {program}: runX drives Xen with xl", "path")
        self.lines = [check_line(line) for line in hypervisor.texts("parameters")]  # of xl.cfg, as they are
        xlconf = asked("xlconf", "XLCONF")
        if xlconf:
            self.lines.append(read_trusted("XLCONF", xlconf, host.xlconf))
        self.cmdline = f"{host.cmdline} {annotations.text('cmdline', '')}".split()  # words for its kernel
        self.cmdline += [quote_word(word) for word in boot.texts("parameters")]
        modes = ("9p", "none") if self.own_init else ROOTFS_MODES
        rootfs = annotations.choice("rootfs", ("", *modes), "")
        self.rootfs = rootfs or ("none" if self.own_init else host.rootfs)
        self.type = annotations.choice("type", MACHINE_TYPES, "") or host.type  # "": what the host offers
        self.maxmem = annotations.number("maxmem")  # MiB, 0: no more than memory
        self.maxvcpus = annotations.number("maxvcpus")  # 0: no more than vcpus
        # kind of the device by which the kernel gets what is served: other kernels than ours have only 9p
        self.share_device = "9pfs" if self.kernel or self.own_init else "fuse"


def find_boot_file(host_path: str, path: str) -> BootFile | None:
    """Return which file to boot and whether it is in the rootfs, or None for ours.  host_path: of the vm object, which
    is the engine's; path: of annotations and the image's environment, which name files in the rootfs alone."""
    if not host_path:
        return (path, True) if path else None
    if not os.path.isfile(host_path):
        raise Error(f"cannot boot {host_path}: there is no such file on this host")
    return os.path.realpath(host_path), False


# of those that config-vm.md names, what xl-disk-configuration.5 can
IMAGE_FORMATS = ("", "raw", "qcow2", "vhd")


def check_references(path: str, kind: str) -> None:
    """Raise Error if an image names another file, which dom0's QEMU would give to the VM: it is not trusted."""
    if not is_image(path) and os.path.exists(path):
        raise Error(f"the image {path} is neither a file nor a block device")  # a fifo would stop us
    with Attempt(f"read the image {path}"), open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 512))
        # the footer of vhd has the type of the disk, fixed, dynamic or with a parent, and a copy of it may come first
        footers = [part for part in (head, file.read(512)) if part.startswith(b"conectix")]
    reference = ""
    if kind == "qcow2" and len(head) >= 80 and head.startswith(b"QFI\xfb"):  # docs/interop/qcow2.rst of QEMU's sources
        version, backing, features = struct.unpack_from(">IQ56xQ", head, 4)
        reference = "a backing file" if backing else "a data file outside" if version > 2 and features & 4 else ""
    elif kind == "vhd" and footers:
        reference = "a parent" if {part[60:64] for part in footers} - {b"\0\0\0\2", b"\0\0\0\3"} else ""
    elif kind != "raw":
        raise Error(f"the image {path} is not in the format {kind}")
    if reference:
        raise Error(f"cannot give the image {path} to a VM, for it has {reference}: make it one that stands alone")


def check_line(line: str) -> str:
    """Return a setting for xl.cfg, as `xl create` takes it behind the file's name."""
    key, equals, _ = line.partition("=")
    name = key.strip().rstrip("+").strip()
    if not equals or not name.replace("_", "").isalnum() or "\n" in line:
        raise Error(f"config.json: vm.hypervisor.parameters must hold settings of xl.cfg, not {printable(line)}")
    return line


def quote_word(word: str) -> str:
    """Return a word for the kernel's command line, which knows quotes and no escapes (lib/cmdline.c)."""
    if '"' in word or "\n" in word:
        raise Error(f"config.json: vm.kernel.parameters cannot hold quotes or line ends: {printable(word)}")
    return word if word.split() == [word] else f'"{word}"'


VCPUS_MAX, VCPU_MEMORY = 4096, 8  # more than any Xen; MiB for each, of which its kernel takes 0.7
DEFAULT_MEMORY, MINIMUM_MEMORY = 64, 24  # MiB; a limit below the minimum could not hold the kernel
NO_LIMIT = (1 << 63) - 4096  # bytes, the most that a cgroup can be given: as if there were none


class Resources:
    """What Xen can give a VM, of linux.resources (config-linux.md); 0 or "": not said."""

    default_memory = DEFAULT_MEMORY  # MiB
    minimum_memory = MINIMUM_MEMORY  # MiB
    default_vcpus = 1
    fixed_vcpus = 0  # whatever the quota is
    most_vcpus = VCPUS_MAX  # whatever is asked for

    def __init__(self, spec: JsonObject, where: str, base: dict[str, int]) -> None:
        """base: what is not said there; an older runX has not kept all of it."""
        resources = Section(spec, where)
        memory, cpu = resources.section("memory"), resources.section("cpu")
        limit = memory.number("limit", 0)
        self.memory = max(-1, limit) if limit < NO_LIMIT else -1  # bytes; -1: no limit
        # microseconds of processor time in each period, of all processors together; -1: no limit
        self.quota = max(-1, cpu.number("quota", 0))
        self.period = max(0, cpu.number("period", 0)) or 100000  # microseconds
        self.shares = max(0, cpu.number("shares", 0))  # cgroup v1's weight: 1024 is the usual one
        self.cpus = cpu.text("cpus", "")  # physical processors, such as 0-3,7
        if self.cpus.strip("0123456789,-"):
            cpu.refuse("must be a list such as 0-3,7", "cpus")
        vars(self).update(base)

    def mebibytes(self, unlimited: int) -> int:
        """Return the memory of the VM; unlimited: what it gets where there is no limit."""
        if self.memory < 0:
            return unlimited
        return max(self.memory >> 20, self.minimum_memory) if self.memory else self.default_memory

    def vcpus(self, unlimited: int) -> int:
        """Return as many as the quota can keep busy."""
        if self.fixed_vcpus or not self.quota:
            wanted = self.fixed_vcpus or self.default_vcpus
        else:
            wanted = unlimited if self.quota < 0 else -(-self.quota // self.period)
        return min(wanted, self.most_vcpus)

    def share(self) -> tuple[int, int]:
        """Return the weight for Xen's scheduler, usually 256, and the cap: percent of one processor, 0: no limit."""
        weight = min(65535, max(1, (self.shares or 1024) // 4))
        if self.quota <= 0:
            return weight, 0
        return weight, min(max(1, self.quota * 100 // self.period), 100 * self.vcpus(0))


def parse_cgroup(resources: Section) -> list[tuple[str, str]]:
    """Return what of linux.resources becomes a limit of the guest's kernel: files of cgroup v2 and a line for each."""
    pids = resources.section("pids").number("limit", 0)
    lines = [("pids.max", str(pids))] if pids > 0 else []
    for entry in resources.sections("hugepageLimits"):
        size = entry.text("pageSize")
        if size not in {f"{1 << power}{unit}B" for power in range(10) for unit in "KMG"}:  # as kernels name them
            entry.refuse(f"must be a size such as 2MB, not {printable(size)}", "pageSize")
        limit = str(entry.number("limit"))
        lines += [(f"hugetlb.{size}{kind}.max", limit) for kind in ("", ".rsvd")]
    for name, value in resources.table("unified").items():
        if "/" in name:
            resources.refuse("must hold names of files, such as memory.high", "unified")
        if not name.startswith(("memory.swap.", "memory.zswap.")):  # the VM has none, and its kernel no such files
            lines += [(name, line) for line in value.split("\n") if line]
    return lines


# ---- namespaces and networks

NAMESPACES = {
    "cgroup": CLONE_NEWCGROUP,
    "ipc": CLONE_NEWIPC,
    "mount": CLONE_NEWNS,
    "network": CLONE_NEWNET,
    "pid": CLONE_NEWPID,
    "time": CLONE_NEWTIME,
    "user": CLONE_NEWUSER,
    "uts": CLONE_NEWUTS,
}
NS_GET_NSTYPE = 0xB703  # <linux/nsfs.h>
PODMANS_MARK = "/run/.containerenv"  # which it mounts into each container
POD_MARKS = (
    "io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.container.manager",
)  # fmt: skip
PODMANS_PAUSES = ["/catatonit", "-P"], ["/pause"]  # what it runs in a pod's sandbox, which has no mark
PAUSE_ENDS = {2: 0, 15: 0, SIGKILL: 137}  # their exit status at each signal that ends them
# of a VM by NETCONF, perhaps the image's, and addresses in each: a network takes a megabyte of dom0's memory
NETWORKS_MAX = 32


def parse_namespaces(linux: Section) -> Namespaces:
    """Return linux.namespaces, {} where all are the VM's.  Raise Error for one of dom0's; see join_pod() for others."""
    found: Namespaces = {}
    for entry in linux.sections("namespaces"):
        kind = entry.choice("type", NAMESPACES)
        path = entry.text("path", "")
        if kind in found:
            entry.refuse(f"{kind} is there twice", "type")
        if path:
            check_namespace(kind, path)
        found[kind] = path
    for kind in ("mount", "pid", "ipc"):
        if found and kind not in found:
            reason = f"asks for the host's own {kind} namespace, which a VM cannot have: add one of its own"
            linux.refuse(reason, "namespaces")
    if "user" in found:
        raise Error("config.json: linux.namespaces: leave out user, for the container's root is root of its own VM")
    return found


def is_own_network(path: str) -> bool:
    """Return whether the network namespace at path is the one that we are in.  Raise OSError."""
    return os.path.samefile(path, OWN_NETWORK)


def check_namespace(kind: str, path: str) -> None:
    """Raise Error unless there is a namespace of this kind at path."""
    with Attempt(f"join the {kind} namespace {path}"):
        fd = Descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    with fd:
        try:
            found = fcntl.ioctl(fd, NS_GET_NSTYPE)
        except OSError:
            found = 0  # no namespace at all
    if found != NAMESPACES[kind]:
        raise Error(f"cannot join the {kind} namespace {path}: it is none")


def parse_pod(annotations: dict[str, str], args: list[str]) -> tuple[bool, str]:
    """Return whether it is a pod's sandbox, and else that one's id, or "": as containerd, CRI-O and Podman tell it."""
    kind, crios_kind, sandbox, crios_sandbox, manager = [annotations.get(mark, "") for mark in POD_MARKS]
    is_podmans = manager == "libpod" and args in PODMANS_PAUSES
    return (kind or crios_kind) == "sandbox" or is_podmans, sandbox or crios_sandbox


def join_pod(config: Config, root: str) -> None:
    """Take over what comes with the namespaces of a pod, host name and sysctls.  Raise Error where one is named that is
    not its sandbox's network, ipc or uts, nor an ipc or uts that CRI-O has made for it, which nobody uses: all that is
    in one namespace would have to be in one VM; or where a sandbox wants a terminal."""
    if config.is_sandbox and config.process and config.process.terminal:
        raise Error("config.json: process.terminal: nothing runs at it in the sandbox of a pod: leave it out")
    paths = {**config.joined, "net": config.namespace or ""}
    shared: list[str] = []
    sysctls: dict[str, str] = {}
    try:
        sandbox = Container(root, config.sandbox).load()
        if sandbox.state.is_sandbox and sandbox.status() != "stopped":
            own = f"/proc/{sandbox.state.pid}/ns"
            for kind in ("net", "ipc", "uts"):
                if paths.get(kind) and os.path.samefile(paths[kind], f"{own}/{kind}"):
                    shared.append(kind)
            sysctls = read_config(sandbox.folder)[0].section("linux").table("sysctl")
    except (Error, OSError):
        pass
    with Attempt("join the namespaces of a pod"):
        shared += [kind for kind in {"ipc", "uts"} & paths.keys() - {*shared} if is_unused(kind, paths[kind])]
        if "uts" in shared:
            config.hostname = config.hostname or in_namespace(paths["uts"], os.uname, kind="uts").nodename
    for name, value in sysctls.items():
        if ("net" if name.startswith("net") else "ipc") in shared:
            config.linux.sysctl.setdefault(name, value)
    refused = [kind for kind in config.joined if kind not in shared]
    if refused:
        owner = f"names {', '.join(refused)} of another container or of the host"
        raise Error(f"config.json: linux.namespaces {owner}, and containers cannot share a VM yet")


def is_unused(kind: str, path: str) -> bool:
    """Return whether no process is in a namespace.  Raise OSError."""
    namespace = os.stat(path)
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.path.samestat(namespace, os.stat(f"/proc/{pid}/ns/{kind}")):
                return False
        except OSError:
            pass  # it has just ended
    return True


def find_networks(
    spec: Section, env: list[str], namespaces: Namespaces, mounts: list[Mount]
) -> tuple[list[Netconf], str | None]:
    """Return the networks that process.env asks for, and the network namespace as Config has it."""
    netconf, path = parse_netconf(env), namespaces.get("network")
    is_podmans = any(mount.destination == PODMANS_MARK for mount in mounts)
    if netconf and is_podmans and path == "":  # its other networks have a path
        spec.warnings.append("NETCONF has no effect, for Podman was asked for no network")
        netconf = []
    if path and is_own_network(path):
        path = None
    if path is None and namespaces and not netconf:
        remedy = "give it a network namespace of its own, or a network by NETCONF"
        raise Error(f"config.json: linux.namespaces asks for the host's own network, which a VM cannot have: {remedy}")
    return netconf, path


def parse_netconf(env: list[str]) -> list[Netconf]:
    """Return (variable, file, name, address or "") of NETCONF, NETCONF1, NETCONF2, …, in that order."""
    found = []
    for variable in env:
        key, _, value = variable.partition("=")
        digits = key.removeprefix("NETCONF")
        if not key.startswith("NETCONF") or not is_number(digits or "0", 5) or not value:
            continue
        path, _, network = value.partition(",")
        name, _, address = network.partition(",")
        if not path.startswith("/") or not name:
            raise Error(f'{key} must be "/path/to/cni/file,name" with ",IP" or without, not {printable(value)}')
        count = 1 + address.count(";")
        if count > NETWORKS_MAX:
            raise Error(f"{key} gives {count} addresses: a network can have {NETWORKS_MAX}")
        found.append((int(digits or 0), (key, path, name, address)))
    if len(found) > NETWORKS_MAX:
        raise Error(f"NETCONF asks for {len(found)} networks: a VM can have {NETWORKS_MAX}")
    return [network for _, network in sorted(found)]


def parse_rate(text: str) -> str:
    """Return netback's "bytes,microseconds" for a rate as in xl-network-configuration.5: 10Mb/s or 1MB/s@20ms."""
    import re

    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)([bB])/s(?:@([0-9]{1,12})([mu]?)s)?", text)
    if not match:
        raise Error(f"the rate {printable(text)} must be such as 10Mb/s (bits) or 1MB/s@20ms (bytes)")
    number, scale, unit, interval, prefix = match.groups()
    rate = int(number) * 1000 ** " KMG".index(scale or " ") // (8 if unit == "b" else 1)
    microseconds = int(interval) * 1000 ** "um ".index(prefix or " ") if interval else 50000
    size = rate * microseconds // 10**6
    if not 0 < size < 1 << 32 or microseconds >= 1 << 32:
        raise Error(f"the rate {printable(text)} is out of range")
    return f"{size},{microseconds}"


# ---- the process, and what the guest applies to itself

# <linux/capability.h>: a bit for each
CAPABILITIES = {f"CAP_{name}": 1 << number for number, name in enumerate((
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split())}  # fmt: skip
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
# <asm-generic/resource.h>: the same
RLIMITS = (
    "RLIMIT_CPU RLIMIT_FSIZE RLIMIT_DATA RLIMIT_STACK RLIMIT_CORE RLIMIT_RSS RLIMIT_NPROC RLIMIT_NOFILE "
    "RLIMIT_MEMLOCK RLIMIT_AS RLIMIT_LOCKS RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME"
).split()
EXEC_MAX = 6 << 20  # characters of arguments, environment and pointers to them: execve(2) takes no more, in any case
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}  # <linux/ioprio.h>
# <linux/sched.h>
POLICIES = "SCHED_OTHER SCHED_FIFO SCHED_RR SCHED_BATCH SCHED_ISO SCHED_IDLE SCHED_DEADLINE".split()
SCHEDULER_FLAGS = [f"SCHED_FLAG_{name}" for name in (
    "RESET_ON_FORK RECLAIM DL_OVERRUN KEEP_POLICY KEEP_PARAMS UTIL_CLAMP_MIN UTIL_CLAMP_MAX"
).split()]  # fmt: skip


class Process:
    def __init__(self, spec: Section, config: Section) -> None:
        """config: the whole config.json."""
        user = spec.section("user")
        self.terminal = spec.flag("terminal")
        if self.terminal and not any(mount.text("type", "") == "devpts" for mount in config.sections("mounts")):
            spec.refuse("needs a mount of the type devpts at /dev/pts", "terminal")
        console = spec.section("consoleSize") if self.terminal else Section({}, "")
        self.console_size = console.unsigned("height", 16), console.unsigned("width", 16)  # 0, 0: not said
        self.args = spec.texts("args")
        if not self.args:
            spec.refuse("must not be empty", "args")
        words = self.args + spec.member("env", list, [])
        if sum(struct.calcsize("P") + len(word) for word in words if isinstance(word, str)) > EXEC_MAX:
            program = printable(self.args[0][:100])
            raise Error(f'unable to start container process: exec: "{program}": argument list too long')
        env = {variable.partition("=")[0]: variable for variable in spec.texts("env")}  # the last counts
        self.env = list(env.values())
        for variable in self.env:
            if variable.find("=") < 1:
                spec.refuse(f"must hold NAME=VALUE, not {printable(variable) or 'an empty string'}", "env")
        self.cwd = spec.path("cwd")
        self.is_piped = False  # it leads to no terminal of the caller's
        self.uid = user.unsigned("uid", 32)
        self.gid = user.unsigned("gid", 32)
        self.groups = list(dict.fromkeys(user.each("additionalGids", Section.unsigned, 32, REQUIRED)))
        self.umask = user.number("umask", 0o022, 0, 0o777)
        self.capabilities = parse_capabilities(spec.section("capabilities"))
        self.no_new_privileges = spec.flag("noNewPrivileges")
        self.rlimits = parse_rlimits(spec)
        self.oom_score_adj = spec.number("oomScoreAdj", 0, -1000, 1000)
        self.io_priority = parse_io_priority(spec.section("ioPriority")) if "ioPriority" in spec else None
        self.scheduler = parse_scheduler(spec.section("scheduler")) if "scheduler" in spec else None


def parse_exec(spec: Section, asked: JsonObject, where: str) -> tuple[Process, Linux, list[str]]:
    """Return the Process of `exec`, what Linux has of it, and warnings.  spec: config.json.  asked: an object as its
    process, from where.  As under runc, what that does not say of capabilities, limits, scheduling and umask is what
    the container's process has, and its score for the OOM killer always."""
    own = spec.section("process")
    values = {**asked, "oomScoreAdj": own.values.get("oomScoreAdj")}
    for key in ("capabilities", "scheduler", "ioPriority"):
        if values.get(key) is None:
            values[key] = own.values.get(key)
    values["rlimits"] = values.get("rlimits") or own.values.get("rlimits")
    section = Section(values, where, ": ")
    user = section.section("user").values
    if user.get("umask") is None:
        values["user"] = {**user, "umask": own.section("user").values.get("umask")}
    return Process(section, spec), Linux(spec.section("linux"), {}), section.warnings


def parse_capabilities(spec: Section) -> dict[str, int]:
    """Return a bit set for each of CAPABILITY_SETS; without any the process has no capability, as under runc."""
    asked = {name: frozenset(spec.texts(name)) for name in CAPABILITY_SETS}
    unknown = frozenset().union(*asked.values()).difference(CAPABILITIES)
    if unknown:
        spec.warnings.append(f"unknown capabilities are left out: {', '.join(sorted(unknown))}")
    sets = dict(asked)  # the rules of capset(2) and prctl(2): the kernel refuses what goes beyond
    sets["effective"] &= sets["permitted"]
    sets["inheritable"] &= sets["bounding"]
    sets["ambient"] &= sets["permitted"] & sets["inheritable"]
    beyond = {name: sorted(asked[name] - sets[name] - unknown) for name in CAPABILITY_SETS}
    left_out = [" ".join([name, *names]) for name, names in beyond.items() if names]
    if left_out:
        what = "capabilities that no process can have without others are left out of process.capabilities"
        spec.warnings.append(f"{what}: {', '.join(left_out)}")
    return {name: sum(CAPABILITIES.get(each, 0) for each in kept) for name, kept in sets.items()}


def parse_rlimits(process: Section) -> list[tuple[int, int, int]]:
    """Return (number, soft, hard) of each."""
    limits = {}
    for entry in process.sections("rlimits"):
        name = entry.choice("type", RLIMITS)
        hard = entry.unsigned("hard", 64, REQUIRED)
        if name in limits:
            entry.refuse(f"{name} is there twice", "type")
        soft = entry.number("soft", least=0, most=hard)
        limits[name] = (RLIMITS.index(name), soft, hard)
    return list(limits.values())


def parse_io_priority(spec: Section) -> int:
    """Return it as ioprio_set(2) takes it."""
    number = IO_CLASSES[spec.choice("class", IO_CLASSES)]
    return number << 13 | spec.number("priority", 0, 0, 7)


def parse_scheduler(spec: Section) -> tuple[int, ...]:
    """Return the fields of struct sched_attr, sched_setattr(2)."""
    policy = POLICIES.index(spec.choice("policy", POLICIES))
    flags = 0
    for name in spec.each("flags", Section.choice, SCHEDULER_FLAGS):
        flags |= 1 << SCHEDULER_FLAGS.index(name)
    nice = spec.number("nice", 0, -20, 19)
    numbers = [spec.unsigned(key, 63) for key in ("priority", "runtime", "deadline", "period")]
    return (policy, flags, nice, *numbers)


DEVICE_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
PERSONALITIES = {"": None, "LINUX": 0, "LINUX32": 8}  # <sys/personality.h>; None: as it is


class Linux:
    """What of config-linux.md the guest applies to itself."""

    def __init__(self, spec: Section, namespaces: Namespaces) -> None:
        self.pid_namespace = "pid" in namespaces
        self.devices = [parse_device(device) for device in spec.sections("devices")]
        self.sysctl = spec.table("sysctl")
        if any(".." in name or name.startswith("/") for name in self.sysctl):
            spec.refuse("must hold names such as net.ipv4.ip_forward", "sysctl")
        self.masked_paths = spec.each("maskedPaths", Section.path)
        self.readonly_paths = spec.each("readonlyPaths", Section.path)
        # flags of mount(2), 0: private as it is; of "/" alone, for each mount has its own
        self.propagation = PROPAGATIONS[spec.choice("rootfsPropagation", PROPAGATIONS, "")] & ~MS_REC
        self.personality = PERSONALITIES[spec.section("personality").choice("domain", PERSONALITIES, "")]
        self.cgroup = parse_cgroup(spec.section("resources"))
        self.seccomp = spec.section("seccomp").values if "seccomp" in spec else None  # as there


def parse_device(spec: Section) -> tuple[str, int, int, int, int, int]:
    """Return (path, mode, major, minor, uid, gid) of a node, of a device that the guest's kernel may have."""
    path = spec.path("path")
    kind = spec.choice("type", DEVICE_TYPES)
    default = 0 if kind == "p" else REQUIRED
    major = spec.unsigned("major", 32, default)
    minor = spec.unsigned("minor", 32, default)
    mode = DEVICE_TYPES[kind] | spec.number("fileMode", 0o666) & 0o7777
    return path, mode, major, minor, spec.unsigned("uid", 32), spec.unsigned("gid", 32)


# ---- mounts

# <sys/mount.h>; bind mounts are told from others by these, not by their type
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 32, 4096, 8192, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
RECURSIVE_RO = 1 << 32  # not mount(2)'s: read-only with all that is mounted below

# flag: an option that sets it and one that clears it, and those with an r, which are the same here: what is mounted
# below a bind mount is part of it in the VM
MOUNT_FLAGS = {
    MS_RDONLY: "ro rw rro rrw",
    MS_NOSUID: "nosuid suid rnosuid rsuid",
    MS_NODEV: "nodev dev rnodev rdev",
    MS_NOEXEC: "noexec exec rnoexec rexec",
    1024: "noatime atime rnoatime ratime",
    2048: "nodiratime diratime rnodiratime rdiratime",
    1 << 21: "relatime norelatime rrelatime rnorelatime",
    1 << 24: "strictatime nostrictatime rstrictatime rnostrictatime",
    256: "nosymfollow symfollow rnosymfollow rsymfollow",
    16: "sync async",
    1 << 25: "lazytime nolazytime",
    1 << 23: "iversion noiversion",
    64: "mand nomand",
    1 << 15: "silent loud",
}
# option: (flags to set, flags to clear); runtime-spec config.md "Linux mount options"
MOUNT_OPTIONS = {
    **{name: (flag, 0) for flag, names in MOUNT_FLAGS.items() for name in names.split()[::2]},
    **{name: (0, flag) for flag, names in MOUNT_FLAGS.items() for name in names.split()[1::2]},
    "bind": (MS_BIND, 0),
    "rbind": (MS_BIND | MS_REC, 0),
    "dirsync": (128, 0),
    "remount": (MS_REMOUNT, 0),
    "rro": (MS_RDONLY | RECURSIVE_RO, 0),
    **dict.fromkeys(("defaults", "acl", "noacl"), (0, 0)),  # nothing to the file systems that a container gets
}
PROPAGATIONS = {"private": MS_PRIVATE, "slave": MS_SLAVE, "shared": MS_SHARED, "unbindable": MS_UNBINDABLE}
PROPAGATIONS.update({f"r{name}": flag | MS_REC for name, flag in PROPAGATIONS.items()})
PROPAGATIONS[""] = 0
# what the guest's kernel makes by itself; any other type is for dom0's kernel to mount
GUEST_FILESYSTEMS = "proc sysfs tmpfs ramfs devpts mqueue cgroup cgroup2 securityfs hugetlbfs binfmt_misc".split()


class Mount:
    """An entry of `mounts`; flags are those of mount(2), data what the file system gets."""

    place = ""  # below the share, if dom0 mounts it

    def __init__(self, bundle: str, spec: Section) -> None:
        self.destination = "/" + spec.text("destination").lstrip("/")
        self.type = spec.text("type", "")
        self.source = spec.text("source", "")
        self.flags = MS_BIND if self.type == "bind" else 0
        self.propagation = 0  # flags of mount(2), 0: private
        self.kept = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC  # those that it has if what it is bound from has them
        self.copy_up = False  # a tmpfs that begins with what is below it
        data = [option for option in spec.texts("options") if not self.take(option)]
        if self.is_bound():
            self.source = os.path.join(bundle, self.source)
        where = f"cannot mount {self.source} at {self.destination}"
        if not os.path.normpath(self.destination).strip("/"):
            raise Error(f"cannot mount {self.source} over the rootfs at {self.destination}: name it as root.path")
        if spec.values.get("uidMappings") or spec.values.get("gidMappings"):
            raise Error(f"{where}: ID-mapped mounts are not supported")
        if self.is_bound():
            if not os.path.exists(self.source):
                raise Error(f"{where}: the source does not exist")
            status = os.statvfs(self.source)
            self.kept &= status.f_flag  # <sys/statvfs.h> has the same numbers
            if self.destination.rstrip("/") == "/dev/shm" and is_empty_memory(self.source):
                # shared memory is shared inside one VM only: the guest's own is memory, dom0's would be files
                data = ["mode=1777", f"size={status.f_blocks * status.f_frsize >> 10}k"]
                self.type = "tmpfs"
                self.source = "shm"
                self.flags = self.flags & ~(MS_BIND | MS_REC) | self.kept
            elif data:
                raise Error(f"{where}: a bind mount has no option {data[0]} here")
        elif not self.type:
            raise Error(f"cannot mount at {self.destination}: the mount has no type")
        else:
            self.kept = 0
        self.data = "" if self.type == "cgroup" else ",".join(data)  # controllers of version 1

    def take(self, option: str) -> bool:
        """Return whether an option is none of the file system's."""
        if option in ("tmpcopyup", "notmpcopyup") and self.type == "tmpfs":
            self.copy_up = option == "tmpcopyup"  # not the kernel's, but container engines'
        elif option in MOUNT_OPTIONS:
            add, remove = MOUNT_OPTIONS[option]
            self.flags = (self.flags | add) & ~remove
            if option[0] == "r" and option[1:] in MOUNT_OPTIONS:  # also for what is below; all else stays
                self.kept &= ~remove
            elif remove or add & ~MS_BIND:
                self.kept = 0
        elif option in PROPAGATIONS:
            self.propagation = 0 if PROPAGATIONS[option] & MS_PRIVATE else PROPAGATIONS[option]
        else:
            return False
        return True

    def is_bound(self) -> bool:
        """Return whether its source is a path; with MS_REMOUNT it is what has been mounted there, see mount(2)."""
        return self.flags & (MS_BIND | MS_REMOUNT) == MS_BIND

    def on_host(self) -> bool:
        """Return whether dom0 mounts it, and the guest has it in the share: what names files or devices of dom0's."""
        return self.is_bound() or not self.flags & MS_REMOUNT and self.type not in GUEST_FILESYSTEMS

    def is_sealed_late(self) -> bool:
        """Return whether it is read-only memory of the guest's, in which mount points and nodes are made before."""
        return self.type == "tmpfs" and bool(self.flags & MS_RDONLY) and not self.on_host()

    def is_folder(self) -> bool:
        """Return whether what dom0 mounts is a folder: all but a bind mount of a file."""
        return not self.is_bound() or os.path.isdir(self.source)


def is_empty_memory(path: str) -> bool:
    """Return whether an engine has mounted a tmpfs there for one container."""
    return os.path.ismount(path) and os.major(os.stat(path).st_dev) == 0 and not os.listdir(path)


# ==== seccomp ============================================================================================
# linux.seccomp (runtime-spec config-linux.md) as a program of seccomp(2), with the meaning that runc and
# libseccomp give it.  System calls are named in it: the guest knows the numbers of its architecture.

if TYPE_CHECKING:
    Instruction = tuple[int, int, int, Union[int, str]]  # code, jt, jf, k; k is a number or a system call's name
    Condition = tuple[int, str, int, int]  # index of an argument, operator, value, mask
    Rule = tuple[list[Condition], int]  # which must all hold, and the action

# <linux/audit.h>: of the machine, and of its 32-bit programs
SECCOMP_ARCHITECTURES = {
    "x86_64": (("SCMP_ARCH_X86_64", 0xC000003E), ("SCMP_ARCH_X86", 0x40000003)),
    "aarch64": (("SCMP_ARCH_AARCH64", 0xC00000B7),),
    "armv7l": (("SCMP_ARCH_ARM", 0x40000028),),
}
# all that runtime-spec names: what is none is a slip, after which programs of what was meant would be killed
SECCOMP_NAMES = [f"SCMP_ARCH_{name}" for name in (
    "X86 X86_64 X32 ARM AARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE S390 S390X PARISC "
    "PARISC64 RISCV64 LOONGARCH64 M68K SH SHEB"
).split()]  # fmt: skip
# <linux/seccomp.h>; those with data carry it in the lower half
SECCOMP_ACTIONS = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
SECCOMP_WITH_DATA = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
# of <linux/seccomp.h>; 0: what has no object here, with one thread and no listener
SECCOMP_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 0,
}
# <linux/bpf_common.h>: BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_RET|K, BPF_JMP|..|K
LOAD, AND, RETURN = 0x20, 0x54, 0x06
JUMP, IF_EQUAL, IF_GREATER, IF_NOT_LESS = 0x05, 0x15, 0x25, 0x35
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16  # struct seccomp_data, little-endian
FILTER_MAX, BRANCH_MAX = 4096, 255  # instructions: BPF_MAXINSNS, and what jt and jf pass over
X32_CALLS = 1 << 30  # <asm/unistd.h>: of x86_64, whose architecture they have
# how a test compares, and whether it passes if so
SECCOMP_OPERATORS = {
    "SCMP_CMP_NE": (IF_EQUAL, False),
    "SCMP_CMP_LT": (IF_NOT_LESS, False),
    "SCMP_CMP_LE": (IF_GREATER, False),
    "SCMP_CMP_EQ": (IF_EQUAL, True),
    "SCMP_CMP_GE": (IF_NOT_LESS, True),
    "SCMP_CMP_GT": (IF_GREATER, True),
    "SCMP_CMP_MASKED_EQ": (IF_EQUAL, True),
}


def compile_seccomp(spec: JsonObject, machine: str) -> tuple[int, list[Instruction]] | None:
    """Return the flags of seccomp(2) and the program, None if it filters nothing.  machine: as uname(2) names it."""
    section = Section(spec, "config.json: linux.seccomp")
    if not section.text("defaultAction", "") and not section.sections("syscalls"):
        return None  # Go's empty object, as by runc
    flags = 0
    wanted = section.each("architectures", Section.choice, SECCOMP_NAMES)
    default = seccomp_action(section, "defaultAction", "defaultErrnoRet")
    for flag in section.each("flags", Section.choice, SECCOMP_FLAGS):
        flags |= SECCOMP_FLAGS[flag]
    if machine not in SECCOMP_ARCHITECTURES:
        section.refuse(f"cannot be applied on {machine}: leave it out")
    rules = seccomp_rules(section, default)
    if not any(rules.values()) and default == SECCOMP_ACTIONS["SCMP_ACT_ALLOW"]:
        return None
    program = [statement(LOAD, ARCHITECTURE_OFFSET)]
    for place, (name, number) in enumerate(SECCOMP_ARCHITECTURES[machine]):
        if place == 0 or name in wanted:
            block = seccomp_block(rules, default, "-" if place else "")
            program += [(IF_EQUAL, 1, 0, number), statement(JUMP, len(block)), *block]
    program.append(statement(RETURN, SECCOMP_ACTIONS["SCMP_ACT_KILL"]))  # programs of an architecture that is not named
    if len(program) > FILTER_MAX:
        section.refuse(f"has too many rules: they make {len(program)} instructions, and {FILTER_MAX} are possible")
    return flags, program


def seccomp_action(spec: Section, key: str, errno_key: str) -> int:
    """Return the value that the filter returns."""
    name = spec.choice(key, SECCOMP_ACTIONS)
    data = spec.unsigned(errno_key, 16, errno.EPERM)
    return SECCOMP_ACTIONS[name] | (data if name in SECCOMP_WITH_DATA else 0)


def seccomp_rules(spec: Section, default: int) -> dict[str, list[Rule]]:
    """Return the rules, if any, of each system call that is named.  The first without conditions stands alone."""
    rules: dict[str, list[Rule]] = {}
    for entry in spec.sections("syscalls"):
        action = seccomp_action(entry, "action", "errnoRet")
        args = [seccomp_condition(arg) for arg in entry.sections("args")]
        # of several conditions on one argument one is enough, as runc has it
        repeated = len({index for index, *_ in args}) < len(args)
        alternatives = [[arg] for arg in args] if repeated else [args]
        for name in entry.texts("names"):
            if not name.isidentifier():
                entry.refuse(f"must hold names of system calls, not {printable(name)}", "names")
            known = rules.setdefault(name, [])
            if action == default or (known and not known[0][0]):
                continue
            if args:
                known += [(conditions, action) for conditions in alternatives]
            else:
                rules[name] = [([], action)]
    return rules


def seccomp_condition(spec: Section) -> Condition:
    """Return an entry of args."""
    operator = spec.choice("op", SECCOMP_OPERATORS)
    index = spec.number("index", 0, 0, 5)
    value = spec.unsigned("value", 64)
    second = spec.unsigned("valueTwo", 64)
    if operator == "SCMP_CMP_MASKED_EQ":
        return index, operator, second & value, value
    return index, operator, value, 2**64 - 1


def seccomp_block(rules: dict[str, list[Rule]], default: int, prefix: str) -> list[Instruction]:
    """Return the instructions for the programs of one architecture."""
    block = [statement(LOAD, NUMBER_OFFSET)]
    not_there = statement(RETURN, SECCOMP_ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS)
    if rules and not SECCOMP_ACTIONS["SCMP_ACT_TRACE"] <= default <= SECCOMP_ACTIONS["SCMP_ACT_ALLOW"]:
        # as runc: what is newer than all that is named here is not there, and the C library does without
        block += [(IF_GREATER, 0, 1, prefix + "max"), not_there]
    elif rules:  # nor is what x32 calls by numbers of its own; the highest is a tracer's, who leaves a call out
        block += [(IF_NOT_LESS, 0, 2, X32_CALLS), (IF_EQUAL, 1, 0, 2**32 - 1), not_there]
    for name in sorted(rules):
        # the default stands behind conditions, of which none may hold
        code = [statement(RETURN, default)] if rules[name] and rules[name][0][0] else []
        for conditions, action in reversed(rules[name]):
            rule = [statement(RETURN, action)]
            for condition in reversed(conditions):
                rule = seccomp_test(condition, rule)
            code = rule + code
        if len(code) > BRANCH_MAX:
            block += [(IF_EQUAL, 1, 0, prefix + name), statement(JUMP, len(code))]
        else:
            block.append((IF_EQUAL, 0, len(code), prefix + name))
        block += code
    return [*block, statement(RETURN, default)]


def seccomp_test(condition: Condition, code: list[Instruction]) -> list[Instruction]:
    """Return the code with a test before it, which goes on behind the code if the condition does not hold."""
    index, operator, value, mask = condition
    high_value, low_value = divmod(value, 1 << 32)
    high_mask, low_mask = divmod(mask, 1 << 32)
    offset = ARGUMENTS_OFFSET + 8 * index
    compare, passes = SECCOMP_OPERATORS[operator]
    holds, fails = (0, len(code)) if passes else (len(code), 0)  # instructions to jump over where it compares so
    low = [*seccomp_load(offset, low_mask), (compare, holds, fails, low_value)]
    high = seccomp_load(offset + 4, high_mask)
    if compare != IF_EQUAL:
        high.append((IF_GREATER, 1 + len(low) + holds, 0, high_value))
    return [*high, (IF_EQUAL, 0, len(low) + fails, high_value), *low, *code]


def seccomp_load(offset: int, mask: int) -> list[Instruction]:
    load = [statement(LOAD, offset)]
    if mask != 0xFFFFFFFF:
        load.append(statement(AND, mask))
    return load


def statement(code: int, operand: int) -> Instruction:
    """Return what does not branch, as BPF_STMT of <linux/filter.h> does."""
    return code, 0, 0, operand


# ==== guest protocol =====================================================================================
# What runX and the guest's init (initrd/) agree on: /container/config in the ramdisk, and nodes below the domain's
# data/ in xenstore, as docs/design.md lists them.

if TYPE_CHECKING:
    Words = Iterable[tuple[Union[str, int], ...]]  # each time a keyword and its operands

# the default devices of runtime-spec config-linux.md: name, major, minor
DEVICES = "null 1 3, zero 1 5, full 1 7, random 1 8, urandom 1 9, tty 5 0"
DEVICE_LINKS = (
    ("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"), ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"), ("pts/ptmx", "ptmx"), ("/proc/kcore", "core"),
)  # fmt: skip


def guest_config(config: Config, state: str, capabilities: dict[str, bytes]) -> bytes:
    """Return /container/config, for initrd/container.c: NUL-terminated keywords and operands, executed in order.
    state: JSON, for hooks.  capabilities: of files, by path below the share."""
    process = config.process
    parts = [guest_files(config, capabilities), guest_seals(config)]
    if process:
        parts.append(guest_process(config.linux, process, parse_hooks(config.hooks, "startContainer"), state))
    return encode_words(*parts)


def exec_config(linux: Linux, process: Process) -> bytes:
    """Return what init gets by the console of a process of `exec`: the length in 4 bytes, and words as there."""
    content = encode_words([(0,)], guest_place(process), guest_process(linux, process, [], ""))
    return struct.pack("<I", len(content)) + content


def encode_words(*parts: Words) -> bytes:
    words = [word for part in parts for operation in part for word in operation]
    return b"".join(str(word).encode("utf-8", "surrogateescape") + b"\0" for word in words)


def guest_files(config: Config, capabilities: dict[str, bytes]) -> Words:
    """Yield what makes the mounts, and what comes before them and is in them."""
    yield (CLONE_NEWPID if config.linux.pid_namespace else 0,)
    for path, value in capabilities.items():
        yield "file_capability", path, len(value), *value
    cgroup = config.linux.cgroup
    if cgroup or any(entry.type in ("cgroup", "cgroup2") for entry in config.mounts):
        yield "cgroup", len(cgroup), *(word for item in cgroup for word in item)
    over_dev = [entry for entry in config.mounts if os.path.normpath(entry.destination) == "/dev"]
    if not over_dev:
        yield from guest_devices(config.linux)
    for entry in config.mounts:
        yield from guest_mount(entry)
        if entry in over_dev and not entry.on_host():
            yield from guest_devices(config.linux)
    if not any(entry.is_bound() for entry in over_dev):  # else what is there is dom0's
        for path, *numbers in config.linux.devices:
            if path != "/dev/ptmx":  # it is a link, to the container's own
                yield "node", path, *numbers
        for content, name in DEVICE_LINKS:
            yield "link", content, f"/dev/{name}"
    if config.process:
        yield from guest_place(config.process)
    if config.netconf and not any(os.path.normpath(entry.destination) == "/etc/resolv.conf" for entry in config.mounts):
        yield ("resolv_conf",)


def guest_devices(linux: Linux) -> Words:
    """Yield what makes the default devices, without those for which config.json has its own."""
    for name, major, minor in map(str.split, DEVICES.split(",")):
        if all(path != f"/dev/{name}" for path, *_ in linux.devices):
            yield "node", f"/dev/{name}", stat.S_IFCHR | 0o666, major, minor, 0, 0


def guest_mount(entry: Mount) -> Words:
    target = entry.destination
    flags = entry.flags & ~(MS_BIND | MS_REC | RECURSIVE_RO)
    if entry.is_sealed_late():
        flags &= ~MS_RDONLY
    if entry.on_host():
        yield "mount", entry.place, target, "", MS_BIND | (entry.flags & MS_REC), ""
        flags |= entry.kept
        if flags:  # a bind mount takes its options only from a second call
            yield "mount", entry.place, target, "", MS_BIND | MS_REMOUNT | flags, ""
    elif entry.flags & MS_REMOUNT:
        yield "mount", "", target, "", flags | entry.flags & MS_BIND, entry.data
    else:
        kind = "cgroup2" if entry.type == "cgroup" else entry.type
        yield "copy_up" if entry.copy_up else "mount", entry.source or kind, target, kind, flags, entry.data
    if entry.propagation:
        yield "propagation", target, entry.propagation


def guest_seals(config: Config) -> Words:
    """Yield what may be done once all is made that was to be made in the mounts."""
    linux = config.linux
    for entry in filter(Mount.is_sealed_late, config.mounts):
        flags = MS_REMOUNT | MS_BIND | entry.flags & ~(MS_REC | RECURSIVE_RO)
        yield "mount", "", entry.destination, "", flags, ""
    yield "hostname", config.hostname or os.uname().nodename  # a new UTS namespace begins with the host's too
    if config.domainname:
        yield "domainname", config.domainname
    for name, value in linux.sysctl.items():  # which may be kernel.hostname
        yield "sysctl", f"sys/{name if '/' in name else name.replace('.', '/')}", value
    for path in linux.readonly_paths:
        yield "readonly", path
    for path in linux.masked_paths:
        yield "mask", path
    if linux.propagation:
        yield "propagation", "/", linux.propagation
    if config.readonly:
        yield "mount", "", "/", "", MS_BIND | MS_REMOUNT | MS_RDONLY, ""


def guest_place(process: Process) -> Words:
    if process.terminal:
        yield ("plain_terminal" if process.is_piped else "terminal",)
    yield "cwd", process.cwd


def guest_process(linux: Linux, process: Process, hooks: list[Hook], state: str) -> Words:
    """Yield what a process of the container gets, and what is executed before it."""
    yield "oom", process.oom_score_adj
    if process.io_priority is not None:
        yield "ioprio", process.io_priority
    if process.scheduler:
        yield "scheduler", *process.scheduler
    if linux.personality is not None:
        yield "personality", linux.personality
    yield "capabilities", *(process.capabilities[name] for name in CAPABILITY_SETS)
    if process.no_new_privileges:
        yield ("no_new_privileges",)
    seccomp = linux.seccomp and compile_seccomp(linux.seccomp, os.uname().machine)
    if seccomp:
        flags, program = seccomp
        yield "seccomp", flags, len(program), *(word for instruction in program for word in instruction)
    yield "user", process.uid, process.gid, process.umask
    if hooks:
        yield "state", state
    for hook in hooks:
        yield "hook", hook.path, hook.timeout, len(hook.args), *hook.args, len(hook.env), *hook.env
    for group in process.groups:
        yield "group", group
    for arg in process.args:
        yield "arg", arg
    for variable in process.env:
        yield "env", variable
    for limit in process.rlimits:  # the last, for init opens files for what is above
        yield "rlimit", *limit


# ==== rootfs =============================================================================================
# Where a VM has the container's files: its rootfs, served, in its memory or on a block device, and what dom0 mounts
# for it.  Both are put together in a folder, the share, in the monitor's own mount namespace.  What serves it to the
# guest lives there too; when both are gone the kernel undoes every mount, whoever was killed before.

# ---- mounts

SYS_OPENAT2, SYS_MOUNT_SETATTR = 437, 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000  # <linux/fcntl.h>
RESOLVE_IN_ROOT = 0x10  # <linux/openat2.h>
OPEN_ATTEMPTS = 128  # where others rename and mount; a few µs each
LINKS_MAX = 40  # that a path may lead through, as for the kernel
PATH_MAX = 4096  # bytes with the NUL, <linux/limits.h>
MNT_DETACH = 2  # <sys/mount.h>


def mount(source: str | None, target: str, flags: int, kind: str | None = None, data: str | None = None) -> None:
    """mount(2).  source: None to change a mount.  kind: the file system's type, data: its options."""
    try:
        system_call("mount", source, target, kind, flags, data)
    except OSError as error:
        reason = f"neither VM nor dom0 has a type {kind}" if error.errno == errno.ENODEV else error.strerror
        what = "change the mount" if source is None else f"mount {source} at"
        raise Error(f"cannot {what} {target}: {reason}") from None


def detach(target: str, flags: int = MNT_DETACH) -> None:
    """Take what is mounted there out of our own mount namespace, if anything is."""
    try:
        system_call("umount2", target, flags)
    except OSError:
        pass


def discard(path: str) -> None:
    """Unmount and remove a file, if it is there."""
    if os.path.lexists(path):
        detach(path, 0)
        os.unlink(path)


def own_mounts() -> None:
    """Enter a mount namespace of our own.  Raise OSError and Error."""
    system_call("unshare", CLONE_NEWNS)
    # the host's unmounts still arrive here, so that nothing stays busy because of us
    mount(None, "/", MS_REC | MS_SLAVE)


def restrict(target: str, flags: int = 0, writable: bool = False) -> None:
    """Make no device of dom0's reachable by a node below target; the guest opens its own devices itself.  flags: with
    MS_RDONLY target is read-only, with RECURSIVE_RO what is mounted below it too.  writable: it is so by no means."""
    cleared, below = MS_RDONLY if writable else 0, MS_RDONLY if flags & RECURSIVE_RO else 0
    try:
        for added, gone, at in ((MS_NODEV | MS_NOSUID | below, 0, AT_RECURSIVE), (flags & MS_RDONLY, cleared, 0)):
            values = struct.pack("=QQQQ", added, gone, 0, 0)  # MOUNT_ATTR_* of <linux/mount.h> are the same numbers
            system_call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, target, at, values, len(values))
    except OSError as error:
        if error.errno != errno.ENOSYS or below:
            raise Error(f"cannot restrict the mount {target}: {error.strerror}") from None
        # Linux before 5.12: what is mounted below stays as it is
        kept = os.statvfs(target).f_flag & (MS_RDONLY ^ cleared | MS_NOEXEC)  # <sys/statvfs.h> has the same numbers
        mount(None, target, MS_BIND | MS_REMOUNT | MS_NODEV | MS_NOSUID | kept | flags & MS_RDONLY)


class HostMount:
    """A line of /proc/<pid>/mountinfo, proc(5)."""

    def __init__(self, line: str) -> None:
        fields, _, rest = line.rstrip("\n").partition(" - ")
        # root: of the mount in its file system
        _, _, device, self.root, self.target, options = fields.split(" ")[:6]
        for character in " \t\n\\":  # which the kernel writes as octal numbers
            self.target = self.target.replace(f"\\{ord(character):03o}", character)
        self.device = os.makedev(*map(int, device.split(":")))
        self.kind, _, of_all = rest.split(" ", 2)
        self.options, self.of_all = options.split(","), of_all.split(",")  # of_all: those of the file system


def host_mounts(process: str = "self") -> Iterator[HostMount]:
    """Raise OSError."""
    path = f"/proc/{process}/mountinfo"
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:  # names may have a "\r"
        yield from map(HostMount, file)


def top_mount(target: str) -> HostMount | None:
    """Return what is seen at target, the last of all that are mounted there."""
    found = [entry for entry in host_mounts() if entry.target == target]
    return found[-1] if found else None


# ---- names below a root: found as by a process whose root folder that is, so that no link leads out of it


def open_in_root(root: str, path: str, flags: int = os.O_PATH) -> Descriptor:
    """flags: of open(2).  Raise OSError."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT)
    with Descriptor(os.open(root, os.O_PATH | os.O_DIRECTORY)) as root_fd:
        for _ in range(OPEN_ATTEMPTS):
            try:
                return Descriptor(system_call("syscall", SYS_OPENAT2, root_fd, path, how, len(how)))
            except BlockingIOError:  # openat2(2): a ".." while anything on the host was renamed or mounted
                pass
    refuse(errno.EAGAIN)


def open_file_in_root(root: str, path: str, what: str) -> Descriptor:
    """Return a descriptor, O_PATH, of a regular file.  what: as of an Attempt.  Raise Error."""
    with Attempt(what):
        fd = open_in_root(root, path)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(0, "it is not a regular file")


def read_in_root(root: str, path: str, limit: int) -> bytes:
    """Return the content of a regular file, up to limit bytes.  Raise Error."""
    what = f"read {path} of the container"
    with open_file_in_root(root, path, what) as fd, open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(limit)


def find_in_root(root: str, path: str, folder: bool, make: bool) -> Descriptor:
    """Return an O_PATH descriptor.  make: what is missing is made, a folder or an empty file, and folders above it;
    where a link leads to nothing, that is made.  Raise OSError."""
    names = resolve_in_root(root, path)
    fd = Descriptor(os.open(root, os.O_PATH | os.O_DIRECTORY))
    for number, name in enumerate(names, 1):
        with fd as above:
            if make:
                make_empty(name, folder or number < len(names), above)
            fd = Descriptor(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=above))
    return fd


def make_empty(path: str, folder: bool, above: int | None = None) -> None:
    """Make a folder or an empty file, unless there is something already.  Raise OSError."""
    try:
        if folder:
            os.mkdir(path, 0o755, dir_fd=above)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=above))
    except FileExistsError:
        pass


def resolve_in_root(root: str, path: str, ends: Sequence[list[str]] = ()) -> list[str]:
    """Return the names, none of them a link's, by which path leads below root, or to the first of ends on that way.
    What is missing counts as a folder, as for runc.  Raise OSError if links lead on without end, or if they and path
    together are longer than a path may be: an image's links could keep us busy for hours."""
    names: list[str] = []
    left, length, links = path.split("/"), len(path), 0
    while left and names not in ends:
        if links > LINKS_MAX or length > PATH_MAX:
            refuse(errno.ELOOP)
        name = left.pop(0)
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            try:
                link = os.readlink("/".join((root, *names, name)))
            except OSError:
                names.append(name)
                continue
            links, length = links + 1, length + len(link)
            left = link.split("/") + left
            names = [] if link.startswith("/") else names
    return names


def is_there(root: str, path: str) -> bool:
    """Return whether a path leads to something below root."""
    try:
        os.close(find_in_root(root, path, folder=True, make=False))
        return True
    except OSError:
        return False


def mount_places(root: str, mounts: list[Mount]) -> tuple[list[list[str]], list[Mount]]:
    """Return the names below root of where the guest will mount something, and of each what that is, without what is in
    another mount.  Of a mount whose links lead on without end, the guest says so."""
    covered: list[list[str]] = []
    found = []
    for entry in mounts:
        try:
            names = resolve_in_root(root, entry.destination, covered)
        except OSError:
            continue
        if names not in covered:
            covered.append(names)
            found.append(entry)
    return covered, found


# ---- the share


def build_share(folder: str, config: Config) -> None:
    """Fill folder with rootfs/ and mounts/0, 1, …, in a mount namespace of our own.  Raise Error and OSError."""
    with Attempt("make a mount namespace"):
        own_mounts()
    os.mkdir(folder)
    mount(folder, folder, MS_BIND)
    rootfs = f"{folder}/rootfs"
    os.mkdir(rootfs)
    os.mkdir(f"{folder}/mounts")
    if os.path.isdir(config.rootfs):
        mount(config.rootfs, rootfs, MS_BIND | MS_REC)
        restrict(rootfs, seal_rootfs(rootfs, config) if config.readonly else 0)
    for entry in filter(Mount.on_host, config.mounts):
        target = f"{folder}/{entry.place}"
        make_empty(target, entry.is_folder())
        if entry.flags & MS_BIND:
            mount(entry.source, target, MS_BIND | (entry.flags & MS_REC))
        else:
            mount(entry.source or entry.type, target, entry.flags & ~RECURSIVE_RO, entry.type, entry.data)
        if not entry.propagation:  # what the host mounts below it later is not the container's
            mount(None, target, MS_REC | MS_PRIVATE)
        restrict(target, entry.flags, not (entry.flags | entry.kept) & MS_RDONLY)
    # what is left of the folder itself is memory of the host's, which the guest must not fill
    mount(None, folder, MS_BIND | MS_REMOUNT | MS_RDONLY)


def seal_rootfs(rootfs: str, config: Config) -> int:
    """Return MS_RDONLY if dom0 can keep the guest from ever writing to the rootfs: all that init makes in it are places
    for mounts and the working directory, which are made now.  Else 0: it is the guest that makes it read-only."""
    if config.machine.rootfs not in ("9p", "auto"):
        return 0  # it is not served
    if config.machine.own_init:
        return MS_RDONLY
    covered, mounts = mount_places(rootfs, config.mounts)

    def is_covered(path: str) -> bool:
        try:
            return resolve_in_root(rootfs, path, covered) in covered
        except OSError:
            return True  # links that lead on without end: nothing is made there

    nodes = [*(f"/dev/{name}" for _, name in DEVICE_LINKS), *(path for path, *_ in config.linux.devices)]
    if not all(map(is_covered, nodes)):
        return 0
    for entry in mounts:
        if entry.type == "tmpfs" and "mode=" not in entry.data and not is_there(rootfs, entry.destination):
            entry.data = ",".join(filter(None, (entry.data, "mode=1777")))  # not that of the folder that is made now
    wanted = [(entry.destination, entry.is_folder()) for entry in mounts]
    others = [("/etc/resolv.conf", False)] if config.netconf else []
    others += [(config.process.cwd, True)] if config.process else []
    umask = os.umask(0o022)
    for path, folder in (*wanted, *(each for each in others if not is_covered(each[0]))):
        try:
            os.close(find_in_root(rootfs, path, folder, make=True))
        except OSError:
            pass  # why it cannot be made, the guest says
    os.umask(umask)
    return MS_RDONLY


def change_root(share: str, config: Config, exported: bool) -> None:
    """Make what dom0 knows of the container's files the root of a mount namespace of our own, in which nothing of
    dom0's can be reached: the rootfs, read-only if the container's is, and its bind mounts.  An empty folder that stays
    so takes the place of what is in the VM only; if nothing is exported, that is all."""
    root, empty = f"{share}/rootfs", f"{share}/mounts"
    on_host = filter(Mount.on_host, config.mounts) if exported else ()
    with Attempt("make the container's files the root of its mount namespace"):
        own_mounts()
        sources = {entry.place: os.open(f"{share}/{entry.place}", os.O_PATH) for entry in on_host}
        mount("tmpfs", empty, MS_RDONLY | MS_NODEV | MS_NOSUID | MS_NOEXEC, "tmpfs", "mode=755,size=4k")
        sources[""] = os.open(empty, os.O_PATH)
        if exported:
            mount_in_root(root, config.mounts, sources)
            restrict(root, MS_RDONLY if config.readonly else 0)
        os.chdir(root if exported else empty)
        for fd in sources.values():
            os.close(fd)
        pivot_root()


def mount_in_root(root: str, mounts: list[Mount], sources: dict[str, int]) -> None:
    """Put each of the mounts at its destination below root, as the guest will do; one that has none there is left out.
    sources: descriptors, by place in the share; of "" what is seen where the guest's kernel mounts something."""
    missing: list[str] = []
    for entry in mounts:
        if entry.flags & MS_REMOUNT or entry.destination.startswith(tuple(missing)):
            continue  # it is in a file system of the guest's, for which nothing is made here
        try:
            with find_in_root(root, entry.destination, entry.is_folder(), make=entry.on_host()) as target:
                mount(f"/proc/self/fd/{sources[entry.place]}", f"/proc/self/fd/{target}", MS_BIND | MS_REC)
        except OSError:
            missing += [] if entry.on_host() else [entry.destination.rstrip("/") + "/"]
        except Error:
            pass  # the image has another kind of file there


def pivot_root() -> None:
    """Make the working folder, a mount, the root of our mount namespace, and let go of all else.  Raise OSError."""
    try:
        system_call("pivot_root", ".", ".")
        system_call("umount2", ".", MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        system_call("mount", ".", "/", None, MS_MOVE, None)  # dom0 runs in its initramfs, which cannot be detached
        system_call("chroot", ".")
    os.chdir("/")


# ---- ramdisks: the archive that the kernel unpacks as its initramfs is cpio's "newc", see
# Documentation/driver-api/early-userspace in its sources.  Archives may follow one another; an uncompressed one starts
# at a multiple of 4.

INODE_MEMORY = 1024  # bytes of the guest's for each file, about
SHARE_MAX = 1 << 20  # files, so that a hostile image ends
CAPABLE_MAX = 1 << 10  # of them with capabilities, of which dom0 keeps the paths, some KiB each
RAMDISK_OVERHEAD = 18  # MiB that the guest needs beside its files

if TYPE_CHECKING:
    Entry = tuple[str, int, bytes, int]  # name, mode, content, rdev


def cpio_header(
    name: str, mode: int, size: int, inode: int = 0, rdev: int = 0,
    owner: tuple[int, int] = (0, 0), links: int = 1, mtime: int = 0,
) -> bytes:  # fmt: skip
    """Return what stands before a member's content.  mode: as in st_mode, owner: uid and gid, mtime: seconds."""
    raw = os.fsencode(name) + b"\0"
    if size >= 2**32:
        raise Error(f"cannot pack {name}: the archive format ends at 4 GiB")
    if len(raw) > PATH_MAX:
        raise Error(f"cannot pack {name[:100]}...: its path is longer than the {PATH_MAX} bytes that a kernel takes")
    devices = (0, 0, os.major(rdev), os.minor(rdev))
    fields = (inode, mode, *owner, links, max(0, mtime) & 0xFFFFFFFF, size, *devices, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in fields) + raw
    return header + padding(len(header))


def padding(size: int) -> bytes:
    """Return what follows a header or content of that size."""
    return b"\0" * (-size % 4)


def cpio_members(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the members of an archive and its end.  entries: folders before what is in them.  Owner root, time 0: the
    same input gives the same bytes."""
    for inode, (name, mode, content, rdev) in enumerate(entries, 1):
        yield cpio_header(name, mode, len(content), inode, rdev) + content + padding(len(content))
    yield cpio_header("TRAILER!!!", 0, 0)


class Member(Record):
    """Something in a folder that goes into a ramdisk."""

    path: str  # below the folder that is packed
    name: str
    folder: int  # a descriptor of the folder that it is in
    status: os.stat_result
    inode: int  # the same for all names of a file
    size: int  # bytes of content; 0 for the second name of a file
    is_gone: bool = False  # the name was another file's, or nobody's, when it was to be packed

    def header(self, size: int) -> bytes:
        status = self.status
        owner = (status.st_uid, status.st_gid)
        mtime = int(status.st_mtime)
        name = f"mnt/{self.path}"
        return cpio_header(name, status.st_mode, size, self.inode, status.st_rdev, owner, status.st_nlink, mtime)

    def open(self) -> Descriptor:
        """Open a regular file.  Raise OSError, also if somebody has put another thing there."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = Descriptor(os.open(self.name, flags, dir_fd=self.folder))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            refuse(errno.ESTALE)
        return fd

    def link(self) -> bytes:
        """Return what it leads to, b"" if it is no link.  Raise OSError."""
        is_link = stat.S_ISLNK(self.status.st_mode)
        return os.fsencode(os.readlink(self.name, dir_fd=self.folder)) if is_link else b""


def walk(root: str) -> Iterator[Member]:
    """Yield what is below root, folders first, and follow no name out of it: others may change a volume meanwhile."""
    folders, inode = [("", "")], 0  # of an image's there may be millions: none has a path of its own here
    files: dict[tuple[int, ...], int] = {}
    while folders:
        parent = os.path.join(*folders.pop())
        try:
            folder = open_in_root(root, parent or ".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and parent:
                continue  # somebody has removed it
            raise Error(f"cannot pack {os.path.join(root, parent)}: {error.strerror}") from None
        inner: set[str] = set()  # folders in it
        with folder, os.scandir(folder) as entries:
            for entry in entries:  # one by one, for there may be millions of these too
                name = entry.name
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if name in inner:
                    continue  # made anew, perhaps as a link, and who unpacks would have its content where that leads
                inode += 1
                path, is_file = os.path.join(parent, name), stat.S_ISREG(status.st_mode)
                key = (status.st_dev, status.st_ino) if is_file and status.st_nlink > 1 else ()
                number = files.get(key, inode)
                size = status.st_size if is_file and number == inode else 0
                member = Member(path=path, name=name, folder=folder, status=status, inode=number, size=size)
                yield member
                if key and not member.is_gone:
                    files[key] = number
                if stat.S_ISDIR(status.st_mode):
                    folders.append((parent, name))
                    inner.add(name)


def pack_initrd(folder: str, output: str) -> None:
    """Pack folder into the gzip'ed archive output, replacing it in one step; hard links become copies."""
    import gzip

    entries = []
    for member in walk(folder):
        content = member.link()
        if stat.S_ISREG(member.status.st_mode):
            with open(member.open(), "rb") as file:
                content = file.read()
        entries.append((member.path, member.status.st_mode, content, member.status.st_rdev))
    packed = gzip.compress(b"".join(cpio_members(sorted(entries))), 9, mtime=0)
    temporary = f"{output}.{os.getpid()}"
    with open(temporary, "wb") as archive:
        archive.write(packed)
    os.rename(temporary, output)


def pack_share(output: BinaryIO, share: str, memory: int) -> dict[str, bytes]:
    """Write the share as an archive, for the guest's /mnt.  Return the capabilities of its files, by path, which an
    archive cannot hold.  memory: MiB that the VM has.  Raise Error also if that is not enough: while the guest unpacks
    it, the share is there a second time, and its kernel gives files half of the rest, and half as many files as that
    has pages."""
    size = count = needed = 0
    capabilities: dict[str, bytes] = {}
    output.write(cpio_header("mnt", stat.S_IFDIR | 0o755, 0))
    for member in walk(share):
        size, count = size + INODE_MEMORY + member.size + -member.size % PAGE, count + 1
        if count > SHARE_MAX:
            raise Error(f"the rootfs and its mounts have more than {SHARE_MAX} files: use org.runx.rootfs=9p")
        needed = RAMDISK_OVERHEAD + (size + 2 * max(size, count * PAGE) >> 20) + 1
        if needed <= memory:  # else it is only to be told how much would be
            pack_member(output, member, capabilities)
        if len(capabilities) > CAPABLE_MAX:
            raise Error(f"the rootfs has more than {CAPABLE_MAX} programs with capabilities: use org.runx.rootfs=9p")
    if needed > memory:
        raise Error(
            f"the rootfs and its mounts need a VM of {needed} MiB to be in its memory, and it has {memory}: raise the "
            f"container's memory limit or the annotation org.runx.memory, or use org.runx.rootfs=9p"
        )
    output.write(cpio_header("TRAILER!!!", 0, 0))
    return capabilities


def pack_member(output: BinaryIO, member: Member, capabilities: dict[str, bytes]) -> None:
    """Write a Member, and add the capabilities that it has."""
    try:
        if stat.S_ISREG(member.status.st_mode):
            with member.open() as file:
                output.write(member.header(member.size))
                left = member.size
                while left:  # exactly so much, zeros for what the file has lost meanwhile; more would stay in our heap
                    count = min(left, 1 << 16)
                    data = os.read(file, count) or bytes(count)
                    output.write(data)
                    left -= len(data)
                output.write(padding(member.size))
                member.is_gone = not os.path.samestat(os.fstat(file), member.status)
                if member.status.st_mode & 0o111 and (capability := capability_of(file)):
                    capabilities[member.path] = capability
        else:
            link = member.link()
            output.write(member.header(len(link)) + link + padding(len(link)))
    except FileNotFoundError:
        member.is_gone = True  # somebody has removed it meanwhile; nor is it there under runc any more
    except OSError as error:
        raise Error(f"cannot pack {member.path}: {error.strerror}") from None


def capability_of(file: int) -> bytes:
    """Return a program's capabilities as its file has them, b"" if none.  Raise OSError."""
    try:
        return os.getxattr(file, "security.capability")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return b""


# ---- a block device, or an image file behind a loop device: dom0's blkback gives it to the VM at `start`
# (xen/include/public/io/blkif.h), without a script.  Until then it is mounted where the engine has mounted it, never at
# the same time; what a guest has written, runX does not mount again.

DISK, DISK_NAME = 202 << 8, "xvda"  # xen-vbd-interface.7
DISK_TIME_LIMIT = 10.0  # seconds for dom0's kernel to open it
# what the guest's kernel can mount: name, where its magic number is in the superblock, and that
FILE_SYSTEMS = (("ext4", 1080, b"\x53\xef"), ("squashfs", 0, b"hsqs"), ("erofs", 1024, b"\xe2\xe1\xf5\xe0"))
LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A  # <linux/loop.h>
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
LOOP_ATTEMPTS = 100  # every 10 ms


class Disk(Record):
    """Where a rootfs is that a VM gets as a block device."""

    path: str  # of a block device or an image file
    kind: str  # of its file system, as in FILE_SYSTEMS
    writable: bool  # else the VM writes into its memory
    mounted: list[Any]  # target, flags, options of dom0's mount that must go before; [] if none must

    def for_guest(self) -> bytes:
        return f"{self.kind} {'rw' if self.writable else 'ro'}\n".encode()


def find_disk(config: Config) -> Disk:
    """Return the Disk that config.rootfs is, or is mounted from."""
    path, writable = config.rootfs, not config.readonly
    mounted = []
    if os.path.isdir(path):
        top = top_mount(path)
        if not top or top.root != "/" or not os.major(top.device):
            what = f"a mount of {top.kind}" if top else "a folder"
            raise Error(f"the rootfs {path} is {what}, not where a block device is mounted: use org.runx.rootfs=9p")
        path = device_path(top.device)
        if "rw" in top.of_all:
            flags = sum(MOUNT_OPTIONS[option][0] for option in top.options if option in MOUNT_OPTIONS)
            data = [option for option in top.of_all if option not in ("rw", "seclabel")]
            mounted = [top.target, flags, ",".join(data)]
        writable = writable and bool(mounted) and "rw" in top.options
    kind = file_system(path)
    can_be_written = bool(os.stat(path).st_mode & 0o222) and os.access(path, os.W_OK)
    return Disk(path=path, kind=kind, writable=writable and kind == "ext4" and can_be_written, mounted=mounted)


def device_path(device: int) -> str:
    """Return the node of a block device in /dev."""
    numbers = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(f"/sys/dev/block/{numbers}/uevent", encoding="utf-8") as file:
            return next(f"/dev/{line[8:].strip()}" for line in file if line.startswith("DEVNAME="))
    except (OSError, StopIteration):
        raise Error(f"cannot find the block device {numbers} in /sys") from None


def file_system(path: str) -> str:
    """Return which of FILE_SYSTEMS an image or block device holds."""
    with Attempt(f"read the image {path}"), open(path, "rb") as file:
        head = file.read(2048)
    for kind, offset, magic in FILE_SYSTEMS:
        if head.startswith(magic, offset):
            return kind
    known = ", ".join(kind for kind, _, _ in FILE_SYSTEMS)
    raise Error(f"{path} holds no file system that a VM can have as its rootfs: make it one of {known}")


def open_disk(disk: Disk) -> Descriptor:
    """Open the block device, or a new loop device with the image in it, which goes with who has it open last."""
    with Attempt(f"open the block device {disk.path}"):
        if stat.S_ISBLK(os.stat(disk.path).st_mode):
            return Descriptor(os.open(disk.path, os.O_RDONLY))
    mode, flags = (os.O_RDWR, 0) if disk.writable else (os.O_RDONLY, LO_FLAGS_READ_ONLY)
    remedy = "; is dom0's module loop loaded, of Linux 5.8 or later?"
    with Attempt(f"put {disk.path} into a loop device", remedy=remedy):
        with Descriptor(os.open(disk.path, mode)) as file, open("/dev/loop-control", "rb") as control:
            # struct loop_config with its struct loop_info64, in which losetup(8) looks for the name
            request = struct.pack("=II52xI64s176x", file, 0, flags | LO_FLAGS_AUTOCLEAR, os.fsencode(disk.path)[:63])
            for _ in range(LOOP_ATTEMPTS):
                loop = Descriptor(os.open(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}", mode))
                try:
                    fcntl.ioctl(loop, LOOP_CONFIGURE, request)
                    return loop
                except OSError as error:
                    os.close(loop)
                    if error.errno != errno.EBUSY:
                        raise
                time.sleep(0.01)  # somebody else has just taken it, or holds it as it is
        refuse(errno.EBUSY)


def attach_disk(container: Container, domain: Domain, undo: Undo) -> None:
    """Give a VM the block device of its rootfs, if it is to have one, before it is told of it."""
    if not container.state.disk:
        return
    disk, device = Disk(**container.state.disk), Device(domain, "vbd", DISK)
    if domain.xenstore.read(f"{device.frontend}/backend"):
        raise Error(f"cannot give the VM its rootfs as {DISK_NAME}: its settings for xl name a disk of that name")
    number = os.fstat(undo.hold(open_disk(disk))).st_rdev  # where `mount -o loop` has made it, it goes with who has it
    top = top_mount(disk.mounted[0]) if disk.mounted else None
    with Undo(undo.log) as unseen:
        if top and top.device == number:
            with Attempt(f"unmount {top.target} from dom0, which the VM's writing would ruin"):
                system_call("umount2", top.target, 0)
            target, flags, options = disk.mounted
            # our kernel writes nothing before it is told to use it; another one may as soon as it sees the device
            is_safe = not disk.writable or ["fuse", 0] in container.state.devices
            what = f"mount {disk.path} on {target} again"
            (undo if is_safe else unseen).add(what, mount, disk.path, target, flags, disk.kind, options)
        check_image(disk, number)
        check_unused(disk, number)
    container.acquire(device)
    undo.add(f"withdraw the VM's {DISK_NAME}", container.release, device)
    announce_disk(device, disk, number)


def backing_file(name: str) -> str:
    """Return the image in the loop device of that name, "" if there is none."""
    try:
        with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read().rstrip(b"\n"))
    except OSError:
        return ""


def check_image(disk: Disk, device: int) -> None:
    """Raise Error if the image in a loop device is in another one too, and either of them is writable."""
    ours = os.path.basename(device_path(device))
    image = backing_file(ours)
    for name in os.listdir("/sys/block") if image else ():
        try:
            if name == ours or not os.path.samefile(backing_file(name), image):
                continue
            writable = read_file(f"/sys/block/{name}/ro") == "0"
        except OSError:
            continue  # it is none, or has just gone
        if writable or disk.writable:
            raise Error(f"cannot give the image {image} to the VM: /dev/{name} has it too, and one could write")


def check_unused(disk: Disk, device: int) -> None:
    """Raise Error if dom0 uses a block device, unless neither its mounts nor the VM can write.  What can be opened by
    O_EXCL is nobody's: mounted in no namespace, part of no volume group."""
    mode = os.O_RDWR if disk.writable else os.O_RDONLY
    try:
        os.close(os.open(device_path(device), mode | os.O_EXCL))
        return
    except OSError as error:
        reason = error.strerror
    mounts = [entry for entry in host_mounts() if entry.device == device]
    if mounts and not disk.writable and "ro" in mounts[0].of_all:
        return
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            target = next((entry.target for entry in host_mounts(pid) if entry.device == device), None)
        except OSError:
            continue
        if target:
            reason = f"for process {pid} it is mounted at {target}; unmount it there"
            break
    raise Error(f"cannot give {disk.path} to the VM, because dom0 uses it: {reason}")


def announce_disk(vbd: Device, disk: Disk, device: int) -> None:
    """Have blkback open the block device for a domain."""
    numbers, mode = f"{os.major(device):x}:{os.minor(device):x}", "w" if disk.writable else "r"
    backend = {
        "dev": DISK_NAME, "type": "phy", "params": disk.path, "physical-device": numbers, "mode": mode,
        "removable": "0", "bootable": "1", "device-type": "disk", "hotplug-status": "connected",
    }  # fmt: skip
    frontend = {"virtual-device": str(DISK), "device-type": "disk"}
    xenstore = vbd.xenstore

    def write() -> None:
        for other in xenstore.list(vbd.backends):
            for number in xenstore.list(f"{vbd.backends}/{other}"):
                node = f"{vbd.backends}/{other}/{number}"
                same = xenstore.read(f"{node}/physical-device") == numbers
                if same and "w" in mode + xenstore.read(f"{node}/mode"):
                    raise Error(f"cannot give {disk.path} to the VM: domain {other} has it, and one could write")
        vbd.announce(backend, frontend)

    vbd.domain.transaction(write)
    await_blkback(vbd, disk)


def await_blkback(vbd: Device, disk: Disk) -> None:
    """Wait until it has opened the block device: it tells nobody, but then there is a file of it."""
    domid = vbd.domain.domid
    opened, deadline = f"/sys/bus/xen-backend/devices/vbd-{domid}-{DISK}/mode", time.monotonic() + DISK_TIME_LIMIT
    while not os.path.exists(opened):
        reason = vbd.xenstore.read(f"/local/domain/0/error/backend/vbd/{domid}/{DISK}/error")
        if reason or time.monotonic() > deadline:
            remedy = f"it says {reason}" if reason else "is its module xen-blkback loaded?"
            raise Error(f"dom0's kernel has not opened {disk.path} for the VM: {remedy}")
        time.sleep(0.01)


# ---- the ways: served, in the VM's memory, on a block device


class Rootfs(Record):
    """How a VM comes to what is in the share: in neither way if it is not to."""

    is_served: bool = False  # over 9p, or FUSE where the kernel is runX's own, from a process that the monitor forks
    in_memory: bool = False  # in the ramdisk, and so in the VM's memory
    disk: Disk | None = None  # that has the rootfs, and comes with `start`

    def modules(self) -> tuple[str, ...]:
        """Return those of Linux by which the guest gets it."""
        served = ("9pnet_xen", "9p") if self.is_served else ()
        of_disk = ("xen_blkfront", self.disk.kind, "overlay") if self.disk else ()
        return served + of_disk

    def open_ramdisk(self, container: Container) -> tuple[BinaryIO, str]:
        """Return the container's ramdisk, to be written, and the path that xl gets; it has a name only for a moment,
        see remove_files().  With all files in it, it has no place in /run, which is dom0's memory.  Raise OSError."""
        path = f"/var/tmp/{container.state.name}" if self.in_memory else container.path("ramdisk")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        return os.fdopen(fd, "wb"), f"/proc/{os.getpid()}/fd/{fd}"


def choose_rootfs(config: Config) -> Rootfs:
    """Return the way that is asked for (docs/machine.md)."""
    way = config.machine.rootfs
    disk = None
    if way == "block" or not os.path.isdir(config.rootfs):
        # volumes are served; the files that engines mount, such as /etc/hosts, are not worth a server
        has_volumes = any(each.on_host() and each.is_folder() for each in config.mounts)
        way = "9p" if has_volumes else "ramdisk"
        disk = find_disk(config)
    return Rootfs(is_served=way not in ("none", "ramdisk"), in_memory=way == "ramdisk", disk=disk)


# ==== file server ========================================================================================
# The container's files, as its guest asks for them: FUSE for our own kernel, 9P for others.  A file is held by a
# descriptor, and only single names below one are looked up, never through a link: nothing outside the share is reached.

if TYPE_CHECKING:
    Ids = tuple[int, int]  # a user and a group
    Status = os.stat_result  # a file's attributes
    Found = tuple["Node", Status]  # a file, and these just now
    Listed = tuple[int, int, int, bytes]  # of what is in a folder: inode, offset behind it, type (DT_*) and name

PATH_FLAGS, NEW_FLAGS = os.O_PATH | os.O_NOFOLLOW, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
NODES_MAX, HANDLES_MAX = 1 << 15, 1 << 14  # each has a descriptor and about 2 KiB of dom0's memory
READERS_MAX = 128  # files that are kept open, as the guest reads them without opening
FIXED_MAX = 1024  # processes that look up again, at a time, what they cannot change
LISTS_MAX, LISTS_OF_ONE = 64, 4  # folders that dom0's kernel may have the names of, and of one as it was each time
LISTS_SIZE = 8 << 20  # bytes of these folders together, unless one alone has more: about half a million names
PREFIXES_MAX = 1 << 15  # of files' numbers: each file system in the share has one
CONTENT_MAX = 1 << 17  # bytes of a file in a message
ENTRIES_MAX = 1 << 15  # bytes of a folder's entries that are read at once
COPY_MAX = 1 << 22  # bytes that are copied before the next request is looked at
ACCESS_LIST, ACCESS_LIST_MAX = b"system.posix_acl_", 4 + 124 * 8  # bytes: 124 entries are a KiB of dom0's kernel
SETTLED = 20_000_000  # ns after which a change gets another time than the last one: two ticks of the slowest clock
CLOCK_REALTIME_COARSE = 5  # <linux/time.h>: that of the times of files
# <linux/magic.h>: apparmorfs, binfmt_misc, bpf, cgroup, cgroup2, configfs, debugfs, efivarfs, fusectl, mqueue, nfsd,
# proc, pstore, resctrl, securityfs, selinuxfs, smackfs, sysfs, tracefs, xenfs: what they say of sizes means nothing
SIZELESS = """
    5a3c69f0 42494e4d cafe4a11 0027e0eb 63677270 62656570 64626720 de5e81e4 65735543 19800202 6e667364
    00009fa0 6165676c 07655821 73636673 f97cff8c 43415d53 62656572 74726163 abba1974
"""
SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276}  # <asm/unistd.h>: not every C library has it
CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)  # <linux/capability.h>: version 3, our own
NO_USER = 0xFFFFFFFF
DIRENT = struct.Struct("=QQHB")  # struct linux_dirent64, getdents64(2); the name follows
NOWHERE = (0, b"")  # the place of what is no folder
IN_DELETE_SELF = 0x400  # <linux/inotify.h>
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = 1, 2, 4, 8, 16, 32  # FATTR_* of <linux/fuse.h>, and 9P's


def check_name(name: bytes) -> bytes:
    """Return what names one file in one folder.  Raise OSError."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        refuse(errno.EINVAL)
    return name


def request_table(text: str) -> dict[str, tuple[int, str]]:
    """Return {name: (number, what it carries)} of a table."""
    rows = (row.split() for row in text.split(","))
    return {name: (int(number), form.strip("-")) for name, number, form in rows}


def content_state(status: Status) -> tuple[int, ...]:
    """Return what is another after each change of a file's content, but a second one within one tick of the clock."""
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size


def is_settled(state: tuple[int, ...]) -> bool:
    """Return whether its next change will make another state."""
    return time.time_ns() - state[0] > SETTLED


def may_be_two(status: Status) -> bool:
    """Whether another file may have this one's number: an overlay's names of one file in a lower layer are files of
    their own, for the one that is changed is copied."""
    return status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode) and not os.major(status.st_dev)


class Node:
    """A file by an O_PATH descriptor, closed when nobody has the Node any more."""

    __slots__ = ("fd", "path", "kind", "inode", "sizeless", "key", "number", "lookups", "place", "seen", "own")

    def __init__(self, fd: int) -> None:
        """kind, inode and sizeless are Files' to set."""
        self.fd = fd
        self.kind, self.inode, self.sizeless = 0, 0, False
        self.path = b"/proc/self/fd/%d" % fd  # leads to the file itself, also where that is a link
        # what Known keeps of it: where it finds it, its number for the guest, how often and, of a folder, where that
        # has looked it up, and in which state the content is that it may have kept
        self.key: int | tuple[int, Any] = 0
        self.number, self.lookups, self.place = 0, 0, NOWHERE
        self.own = False  # in the rootfs, which dom0 seldom changes, and not in a volume
        self.seen: tuple[int, ...] | None = None  # it has not been told of the file, and so keeps nothing

    def tell(self, status: Status) -> None:
        """The guest gets these attributes.  Where time or size are others, it drops what it has of the content, but not
        beside what it has not sent yet: so it is made to at its next opening."""
        state = content_state(status)
        if state != self.seen:
            self.seen = state if self.seen is None and is_settled(state) else ()

    def __del__(self) -> None:
        os.close(self.fd)


class Handle:
    """An open file or folder, closed when nobody has the Handle any more."""

    __slots__ = ("fd", "node", "position", "listed", "__weakref__")

    def __init__(self, fd: int, node: Node) -> None:
        self.fd, self.node, self.position = fd, node, 0
        # which folder, and in what state, was read from its beginning; its size last
        self.listed: tuple[int, ...] = ()

    def __del__(self) -> None:
        os.close(self.fd)


class Lists:
    """Which open folders were read.  For each of an overlay's, dom0's kernel keeps all names as they were when that
    began, in memory that no cgroup counts and that cannot be taken away."""

    def __init__(self) -> None:
        self.refer = import_core("weakref").ref
        self.read: list[Any] = []  # references to Handles, the latest last

    def read_next(self, handle: Handle, anew: bool) -> None:
        """This one is read.  Those for which it is too much are opened anew: they go on by their place, which is
        another one then if the folder was changed meanwhile.  anew: from its beginning.  Raise OSError."""
        if handle.node.sizeless or not anew and self.read and self.read[-1]() is handle:
            return
        if anew or not handle.listed:
            handle.listed = handle.node.inode, *content_state(os.fstat(handle.fd))
        others = [each for reference in self.read if (each := reference()) and each is not handle]
        same = [each for each in others if each.node.inode == handle.node.inode]
        kept = {each.listed: each.listed[-1] for each in (*others, handle)}  # one list of names and its size, of each
        size = sum(kept.values())
        for each in others:
            if each.listed != handle.listed and size > LISTS_SIZE:
                size -= kept.pop(each.listed, 0)
        too_many = {*same[: 1 - LISTS_OF_ONE], *others[: 1 - LISTS_MAX]}
        for each in too_many.union(each for each in others if each.listed not in kept):
            with Descriptor(os.open(each.node.path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
                os.dup2(fd, each.fd, False)
            each.position, each.listed = 0, ()
            others.remove(each)
        self.read = [self.refer(each) for each in (*others, handle)]


def drop_privileges(node: Node, is_due: int) -> None:
    """Take set-user-ID, and set-group-ID of a program, as writing does without CAP_FSETID, which we have."""
    mode = stat.S_IMODE(os.fstat(node.fd).st_mode) if is_due else 0
    taken = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
    if mode & taken:
        os.chmod(node.path, mode & ~taken)


def mount_of(node: Node) -> int:
    """Return the number of the mount by which it was found: proc(5); 0 where Linux before 5.14 does not let us look
    with the rights of a process in the guest."""
    try:
        return int(read_file(f"/proc/self/fdinfo/{node.fd}").partition("mnt_id:")[2].split()[0])
    except PermissionError:
        return 0


def list_xattrs(node: Node) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in os.listxattr(node.path))


def check_xattr(name: bytes, size: int) -> None:
    """Raise OSError for a long access list: dom0's kernel keeps it in memory that no cgroup counts, and where files are
    in memory too, beside what their file system may take."""
    if name.startswith(ACCESS_LIST) and size > ACCESS_LIST_MAX:
        refuse(errno.ENOSPC)  # as ext4, for which there is one of its blocks


class Files:
    """The files of a share, and what can be done with them.  All methods raise OSError."""

    def __init__(self, root: int, capabilities: int) -> None:
        """root: an O_PATH descriptor.  capabilities: of the guest's root where dom0 asks for some, a bit each."""
        self.capabilities, self.lists = capabilities, Lists()
        self.memory: Any = (c_library()["long"] * (ENTRIES_MAX // struct.calcsize("l")))()  # that system calls fill
        try:
            home = os.open("rootfs", PATH_FLAGS, dir_fd=root)  # has most files; open, it keeps its number
        except OSError:
            home = root
        self.device = os.fstat(home).st_dev
        self.sizeless = self.is_sizeless(home, self.device)
        self.prefixes = {(self.device, 0): 0}
        self.getdents = "getdents64" if has_function("getdents64") else "getdents"  # as musl calls it
        self.sys_renameat2 = SYS_RENAMEAT2.get(os.uname().machine, 0) if sys.maxsize > 1 << 32 else 0
        self.root, _ = self.node(root)

    def node(self, fd: int) -> Found:
        """fd: O_PATH, the Node's from now on, also if this fails."""
        node = Node(fd)
        status = os.fstat(fd)
        device, node.kind = status.st_dev, stat.S_IFMT(status.st_mode)
        node.sizeless = self.sizeless if device == self.device else self.is_sizeless(fd, device)
        node.inode = node.key = self.inode(device, status.st_ino)
        return node, status

    def is_sizeless(self, fd: int, device: int) -> bool:
        """Nothing is kept by a device's number: what is mounted later may get that of what was unmounted."""
        if os.major(device):
            return False
        system_call("fstatfs", fd, self.memory)
        return f"{self.memory[0] & 0xFFFFFFFF:08x}" in SIZELESS

    def inode(self, device: int, number: int) -> int:
        """Return a number that no other file in the share has; for most files it is their own."""
        if device == self.device and number < 1 << 48:
            return number
        key = device, number >> 48
        if key not in self.prefixes and len(self.prefixes) == PREFIXES_MAX:
            refuse(errno.EOVERFLOW)
        return self.prefixes.setdefault(key, len(self.prefixes)) << 48 | number & (1 << 48) - 1

    def find(self, folder: Node, name: bytes) -> Found:
        return self.node(os.open(name, PATH_FLAGS, dir_fd=folder.fd))

    # ---- making

    def create(self, folder: Node, name: bytes, flags: int, mode: int, owner: Ids) -> tuple[Handle, Status]:
        """Return a new regular file, open.  name: b"" for none.  Raise FileExistsError, whatever flags say."""
        flags, mode = self.open_flags(flags) & ~os.O_TRUNC, mode & 0o7777
        fd = os.open(name or b".", flags | (NEW_FLAGS if name else os.O_TMPFILE), mode, dir_fd=folder.fd)
        try:
            node, status = self.node(os.open(b"/proc/self/fd/%d" % fd, os.O_PATH))
            node, status = self.give(node, status, folder, owner)
            return Handle(fd, node), status
        except OSError:
            os.close(fd)
            if name:
                os.unlink(name, dir_fd=folder.fd)
            raise

    def make(self, folder: Node, name: bytes, owner: Ids, work: Callable[..., None], *args: Any) -> Found:
        """Return the new folder, link or special file that work(name, *args, dir_fd) makes."""
        work(name, *args, dir_fd=folder.fd)
        try:
            return self.give(*self.find(folder, name), folder, owner)
        except OSError:
            (os.rmdir if work is os.mkdir else os.unlink)(name, dir_fd=folder.fd)
            raise

    @staticmethod
    def give(node: Node, status: Status, folder: Node, owner: Ids) -> Found:
        """Make a new file its maker's, of its folder's group where that has set-group-ID."""
        uid, gid = owner
        if status.st_gid != gid and os.fstat(folder.fd).st_mode & stat.S_ISGID:
            gid = status.st_gid
        if (status.st_uid, status.st_gid) != (uid, gid):
            try:
                os.chown(node.path, uid, gid)
            except PermissionError:  # a file system without owners, such as vfat, says itself whose it is
                return node, status
            if status.st_mode & 0o6000:  # which chown(2) takes
                os.chmod(node.path, stat.S_IMODE(status.st_mode))
            status = os.fstat(node.fd)
        return node, status

    @staticmethod
    def link(node: Node, folder: Node, name: bytes) -> None:
        os.link(node.path, name, dst_dir_fd=folder.fd, follow_symlinks=True)

    def rename(self, old_folder: Node, old: bytes, new_folder: Node, new: bytes, flags: int = 0) -> None:
        """flags: of renameat2(2)."""
        if not flags:
            os.rename(old, new, src_dir_fd=old_folder.fd, dst_dir_fd=new_folder.fd)
        elif self.sys_renameat2:
            system_call("syscall", self.sys_renameat2, old_folder.fd, old, new_folder.fd, new, flags)
        else:
            refuse(errno.EINVAL)

    # ---- opening

    @staticmethod
    def open_flags(flags: int) -> int:
        """Return those of open(2) that dom0 is to know; their numbers are the same on x86 and Arm.  Not O_APPEND: the
        guest's kernel knows where its pages belong, and pwrite(2) would not."""
        return flags & (os.O_ACCMODE | os.O_TRUNC | os.O_NOATIME) | os.O_NOCTTY

    def open(self, node: Node, flags: int) -> Handle:
        """Regular files and folders alone: all else is the guest's kernel's."""
        if node.kind == stat.S_IFDIR:
            return Handle(os.open(node.path, os.O_RDONLY | os.O_DIRECTORY), node)
        if node.kind != stat.S_IFREG:
            refuse(errno.ENXIO)
        wanted = self.open_flags(flags) | (os.O_NONBLOCK if node.sizeless else 0)
        try:
            return Handle(os.open(node.path, wanted), node)
        except PermissionError:
            if not flags & os.O_APPEND:
                raise
            return Handle(os.open(node.path, wanted | os.O_APPEND), node)  # chattr(1) lets it grow only

    def entries(self, handle: Handle, offset: int, room: int, least: int, unit: int = 1) -> Iterator[Listed]:
        """Yield what is next in a folder.  Each takes of the room what is least and its name, in whole units."""
        self.lists.read_next(handle, not offset)
        if offset != handle.position:
            os.lseek(handle.fd, offset, os.SEEK_SET)
        handle.position = offset
        # about as many as there is room for: of one with a short name the kernel makes 24 bytes
        size = max(min(room * 24 // (least + 8), ENTRIES_MAX), DIRENT.size + 261)
        end = system_call(self.getdents, handle.fd, self.memory, size)
        data = bytes(memoryview(self.memory).cast("B")[:end])
        device, at = os.fstat(handle.fd).st_dev, 0
        while at < end:
            number, after, length, kind = DIRENT.unpack_from(data, at)
            name = data[at + DIRENT.size : data.index(0, at + DIRENT.size)]
            room -= least + len(name) + -len(name) % unit
            if room < 0:
                os.lseek(handle.fd, handle.position, os.SEEK_SET)
                if not at:
                    refuse(errno.EINVAL)
                return
            above = name == b".." and handle.node is self.root
            yield self.root.inode if above else self.inode(device, number), after, kind, name
            handle.position = after
            at += length

    # ---- attributes

    @staticmethod
    def set_attributes(node: Node, at: int | bytes, valid: int, mode: int, owner: Ids, size: int, *times: int) -> None:
        """at: node's path, or a descriptor that it is open by, which is faster.  valid: which of the others, SET_*.
        times: of the last access and change, in nanoseconds."""
        if valid & (SET_UID | SET_GID):
            uid, gid = owner
            os.chown(at, uid if valid & SET_UID else -1, gid if valid & SET_GID else -1)
        if valid & SET_MODE:
            if node.kind == stat.S_IFLNK:
                refuse(errno.EOPNOTSUPP)
            os.chmod(at, mode & 0o7777)
        if valid & SET_SIZE:
            if node.kind != stat.S_IFREG:
                refuse(errno.EINVAL)
            os.truncate(node.path, size)
        if valid & (SET_ATIME | SET_MTIME):
            status = os.fstat(node.fd)
            now = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
            access, change = (now if valid & each << 3 else new for each, new in zip((SET_ATIME, SET_MTIME), times))
            access = access if valid & SET_ATIME else status.st_atime_ns
            change = change if valid & SET_MTIME else status.st_mtime_ns
            os.utime(at, ns=(access, change))

    def as_asker(self, ids: Ids, work: Callable[..., T], *args: Any) -> T:
        """Return work(*args), done with the rights that the process in the guest would have on dom0."""
        uid, gid = ids
        if NO_USER in ids:
            refuse(errno.EPERM)
        system_call("capget", CAPABILITY_HEADER, self.memory)
        own = bytes(memoryview(self.memory).cast("B")[:24])
        rights = memoryview(bytearray(own)).cast("I")  # effective, permitted, inheritable: 32 bits of each, twice
        allowed = 0 if uid else self.capabilities
        rights[0] = allowed & rights[1]
        rights[3] = allowed >> 32 & rights[4]
        try:
            os.setresgid(-1, gid, -1)
            os.setresuid(-1, uid, -1)  # not setfsuid(2): /proc/sys looks at this one
            system_call("capset", CAPABILITY_HEADER, bytes(rights))
            return work(*args)
        finally:
            os.setresuid(-1, 0, -1)
            os.setresgid(-1, 0, -1)
            system_call("capset", CAPABILITY_HEADER, own)
            system_call("prctl", PR_SET_PDEATHSIG, SIGKILL)  # which the kernel forgets when the user changes


# ---- the rings: requests of the guest's, and our replies (xen/include/public/io/9pfs.h, ring.h: DEFINE_XEN_FLEX_RING)
#
#     indexes, 4 bytes each:  0 in_cons   1 in_prod   16 out_cons   17 out_prod   32 ring_order   33... references
#     data, 2^ring_order pages: the first half has replies (in), the second requests (out)
#
# The indexes run freely modulo 2^32.  Ours are never read back from the page that the guest can write.  Word 18,
# which 9P does not use, says that we look at out_prod all the time, and need no event.

IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, OUT_LOOKS, RING_ORDER, REFERENCES = 0, 1, 16, 17, 18, 32, 33
RING_ORDER_MAX = 7  # 256 KiB in each direction
RINGS_MAX = {"fuse": 1, "9pfs": 2}  # of a device of that kind; Linux's 9p takes no backend with less than two
HEAD_MAX = 128  # bytes of a request that are copied at once: all but strings and content


class Ring:
    """Takes requests from the guest's pages, and puts replies there.  port: where the guest is told so.  A request is
    what has been found last: only its length has been checked, and head is a copy of its first HEAD_MAX bytes, or of
    all.  What a guest does that does not keep to the protocol is an Error."""

    def __init__(self, indexes: memoryview, data: memoryview, channels: EventChannels, port: int) -> None:
        self.indexes = indexes
        self.channels = channels
        self.port = port
        self.size = len(data) // 2
        self.replies = data[: self.size]
        self.requests = data[self.size :]
        self.out_cons = self.in_prod = 0
        self.in_cons = self.out_prod = 0  # as last seen, for they are the guest's
        self.barrier, self.is_stuck = Barrier(), False
        self.head, self.length = b"", 0
        self.other: Ring | None = None  # of the same guest

    # ---- the request

    def copy(self, start: int, end: int) -> bytes:
        end, known = min(end, self.length), len(self.head)
        if end <= known:
            return self.head[start:end]
        rest = max(start, known)
        return b"".join([self.head[start:], *self.content(rest, end - rest)])

    def content(self, start: int, count: int) -> list[memoryview]:
        """Return a part where it lies, which the guest may change at any time."""
        return self.views(self.requests, self.out_cons + start, count)

    def room(self, start: int, count: int) -> list[memoryview]:
        """Return a part of the reply where it will lie, from its byte `start` on."""
        return self.views(self.replies, self.in_prod + start, count)

    # ---- the ring

    def views(self, half: memoryview, index: int, count: int) -> list[memoryview]:
        """Return the count bytes of a half that begin at an index, without a copy."""
        start = index & (self.size - 1)
        end = start + count
        return [half[start:end]] if end <= self.size else [half[start:], half[: end - self.size]]

    def serve(self, protocol: Protocol, in_order: bool = True) -> bool:
        """Answer what is there when this begins, as far as the replies have room; is_stuck says whether some of it had
        none.  Return whether anything was answered.  in_order: what must come behind all that the guest has asked
        before, such as a change of size behind writes, waits until the other ring is empty.  Raise Error."""
        begun, is_told = self.out_cons, True
        end = self.out_prod = self.indexes[OUT_PROD]
        if end != begun:
            self.in_cons = self.indexes[IN_CONS]
            self.barrier()  # an index is read before what it counts, and before what it frees is overwritten
        while self.out_cons != end and self.find(protocol, end):
            if in_order and self.other and self.head[4] in protocol.ordered:
                self.other.serve(protocol, in_order=False)
                if self.other.is_stuck:
                    break
            is_told = self.finish(*protocol.answer(self))
        self.is_stuck = self.out_cons != end
        if not is_told:
            self.barrier()  # either the guest sees the room, or we see all that it has put in before
            if (self.indexes[OUT_PROD] - begun) & 0xFFFFFFFF > self.size - protocol.longest:
                self.channels.notify(self.port)  # it may wait for room for a request
        return self.out_cons != begun

    def find(self, protocol: Protocol, end: int) -> bool:
        """Return whether there is a request before the index end that is whole, and room for its reply."""
        waiting = (end - self.out_cons) & 0xFFFFFFFF
        if waiting > self.size:
            raise Error("the indexes of its ring are impossible")
        if waiting < protocol.shortest:
            return False
        head = b"".join(self.content(0, min(waiting, HEAD_MAX)))
        (length,) = struct.unpack_from("<I", head)
        if not protocol.shortest <= length <= min(protocol.longest, self.size):
            raise Error(f"a request of it is {length} bytes long")
        self.head, self.length = head[:length], length
        return length <= waiting and self.has_room(protocol.reply_room(self))

    def has_room(self, count: int) -> bool:
        """Return whether a reply of so many bytes has room; if not, the guest sees that, and tells of more."""
        if count > self.size:
            raise Error(f"its ring has no room for a reply of {count} bytes")
        for _ in range(2):
            used = (self.in_prod - self.in_cons) & 0xFFFFFFFF
            if used > self.size:
                raise Error("the indexes of its ring are impossible")
            if count <= self.size - used:
                return True
            self.barrier()  # our last index is there before we look at the guest's
            self.in_cons = self.indexes[IN_CONS]
            self.barrier()
        return False

    def finish(self, beginning: bytes, count: int) -> bool:
        """Give the request's place back, and its reply to the guest: the beginning, with count bytes behind it that are
        there already; b"": there is none.  Return whether the guest knows."""
        if beginning:
            at = 0
            for view in self.room(0, len(beginning)):
                view[:] = beginning[at : at + len(view)]
                at += len(view)
        self.barrier()  # the indexes are written after all that they stand for has been read and written
        self.out_cons = (self.out_cons + self.length) & 0xFFFFFFFF
        self.indexes[OUT_CONS] = self.out_cons
        if not beginning:
            return False
        self.in_prod = (self.in_prod + len(beginning) + count) & 0xFFFFFFFF
        self.indexes[IN_PROD] = self.in_prod
        self.channels.notify(self.port)
        return True

    def set_looks(self, looks: bool) -> None:
        """Tell the guest whether we look, and need no event."""
        self.indexes[OUT_LOOKS] = looks
        self.barrier()  # either the guest sees that, or we see what it has not told


def connect_rings(domid: int, ends: Iterable[tuple[int, int]], channels: EventChannels, grants: Grants) -> list[Ring]:
    """Return a device's rings.  ends: of each, the reference of its indexes and the guest's port.  Raise Error."""
    rings = []
    for reference, channel in ends:
        with Attempt(f"connect to a ring of domain {domid}"):
            port = channels.bind(domid, channel)
            indexes = grants.map(domid, [reference]).cast("I")
            order = indexes[RING_ORDER]
            if not 1 <= order <= RING_ORDER_MAX:
                raise Error("the size of its ring is impossible")
            references = indexes[REFERENCES : REFERENCES + (1 << order)].tolist()
            rings.append(Ring(indexes, grants.map(domid, references), channels, port))
    if len(rings) == 2:
        rings[0].other, rings[1].other = rings[1], rings[0]
    return rings


U16, U32, U64 = (struct.Struct(form) for form in ("<H", "<I", "<Q"))


class Protocol:
    """What a guest says by its rings: FUSE or 9P.  A request has a handler, the method of its name in a table.  That
    returns a reply's body, None for an empty one, or the body and how many bytes of content have been put behind it."""

    # returns the beginning of the reply, b"" for none, and how many bytes of content have been put behind it
    answer: Callable[[Ring], tuple[bytes, int]]
    shortest, longest = 0, 0  # bytes of a request
    # by byte 4 of a request, which tells kinds apart: what must come behind all that was asked before by another ring,
    # and where it says how long its reply may be
    ordered: Collection[int] = ()
    sized: dict[int, int] = {}
    reply_head = 0  # bytes of a reply before that

    def __init__(self, root: int, capabilities: int) -> None:
        self.files = Files(root, capabilities)
        self.most = CONTENT_MAX  # bytes of content in a reply
        self.request: Ring  # that is being answered
        self.handlers: dict[int, tuple[Any, ...]] = {}  # by kind, with what they take

    def reply_room(self, request: Ring) -> int:
        """Return the most bytes that its reply can have."""
        at, most = self.sized.get(request.head[4]), 4096
        if at and request.length >= at + U32.size:
            (size,) = U32.unpack_from(request.head, at)
            most = max(most, min(size, self.most))
        return self.reply_head + most

    @staticmethod
    def attempt(work: Callable[..., Any], *args: Any) -> tuple[int, bytes, int]:
        """Return the errno of a failure, or 0, and what the handler returns that work(*args) calls."""
        try:
            result = work(*args)
        except OSError as failure:
            return failure.errno or errno.EIO, b"", 0
        except (struct.error, ValueError, OverflowError):  # what the guest says makes no sense
            return errno.EINVAL, b"", 0
        return (0, *result) if isinstance(result, tuple) else (0, result or b"", 0)


# ---- FUSE, <linux/fuse.h>: a request is struct fuse_in_header, a structure of its kind, and strings

FUSE_VERSION, FUSE_MINOR, FUSE_MINOR_LEAST, FUSE_ROOT_ID = 7, 40, 36, 1
FUSE_VALID = 1  # seconds for which the guest does not ask for a name or for attributes again
FUSE_BACKGROUND = 16  # requests at once that nobody in the guest waits for
# opcode; the structure, or what counts of it, H: the number of a Handle; then n: a name in a folder, s: another string,
# b: the rest; -: nothing
FUSE_REQUESTS = request_table(
    """
    lookup 1 n, forget 2 Q, getattr 3 -, setattr 4 I4xQQ8xqq8xII4xI4xII4x, readlink 5 -, symlink 6 ns, mknod 8 III4xn,
    mkdir 9 IIn, unlink 10 n, rmdir 11 n, rename 12 Qnn, link 13 Qn, open 14 II, read 15 HQI, write 16 HQII8xI,
    statfs 17 -, release 18 Q, fsync 20 HI, setxattr 21 III4xsb, getxattr 22 I4xs, listxattr 23 I, removexattr 24 s,
    init 26 IIII, opendir 27 -, readdir 28 HQI, releasedir 29 Q, fsyncdir 30 HI, create 35 III4xn,
    batch_forget 42 I4xb, fallocate 43 HQQI, readdirplus 44 HQI, rename2 45 QI4xnn, lseek 46 HqI,
    copy_file_range 47 HQQQQQQ, syncfs 50 -, tmpfile 51 III
    """
)
FUSE_SILENT = {2, 36, 42}  # have no reply, unless they have a number for it: forget, interrupt, batch_forget
FUSE_SIZED = {15: 56, 28: 56, 44: 56, 22: 40, 23: 40}  # where a request says how long its reply may be
# ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, DONT_MASK, AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO, ASYNC_DIO,
# PARALLEL_DIROPS, WRITEBACK_CACHE, POSIX_ACL, MAX_PAGES, CACHE_SYMLINKS, HANDLE_KILLPRIV_V2, SETXATTR_EXT, INIT_EXT
FUSE_FLAGS = sum(1 << bit for bit in (0, 3, 5, 6, 12, 13, 14, 15, 16, 18, 20, 22, 23, 28, 29, 30))
FATTR_KILL_SUIDGID = 1 << 11
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, DIRECT_IO_ALLOW_MMAP = 1, 2, 1 << 36
ATTR_NO_OPEN = 1 << 31  # of our kernel's alone: what the guest may keep is right, and it may read without a handle
OPEN_KILL_SUIDGID, ACL_KILL_SGID, FSYNC_FDATASYNC = 1, 1, 1
WRITE_CACHE, WRITE_KILL_SUIDGID = 1, 4
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIII4x"), struct.Struct("<IiQ")  # 40 and 16 bytes
RWF_SYNC, RWF_APPEND = 4, 16  # <linux/fs.h>; Python has the latter from 3.10 on
WRITE_DATA = 80  # where a write has what is written
ATTR = "QQQqqqIIIIIIIIII"
ENTRY_OUT, ATTR_OUT, FUSE_DIRENT = (struct.Struct(form) for form in ("<QQQQII" + ATTR, "<QII" + ATTR, "<QQII"))
INIT_OUT, STATFS_OUT = struct.Struct("<IIIIHHIIHHII24s"), struct.Struct("<QQQQQIIII24s")
OPEN_OUT, U32_PAIR = struct.Struct("<QIi"), struct.Struct("<II")


def split_strings(data: bytes, kinds: str) -> list[bytes]:
    """Return the strings of a request, kinds as in FUSE_REQUESTS.  Raise OSError."""
    ends = len(kinds.rstrip("b"))
    strings = data.split(b"\0", ends)
    if len(strings) <= ends:
        refuse(errno.EINVAL)
    return [check_name(string) if kind == "n" else string for kind, string in zip(kinds, strings)]


def fuse_attr(node: Node, status: Status) -> tuple[int, ...]:
    node.tell(status)
    atime, atime_ns = divmod(status.st_atime_ns, 10**9)
    mtime, mtime_ns = divmod(status.st_mtime_ns, 10**9)
    ctime, ctime_ns = divmod(status.st_ctime_ns, 10**9)
    return (
        node.inode, status.st_size, status.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev & 0xFFFFFFFF,
        status.st_blksize, ATTR_NO_OPEN if node.own and node.seen and not node.sizeless else 0,
    )  # fmt: skip


class Known:
    """What the guest knows: files by numbers that are never given twice, and what it has open."""

    def __init__(self, files: Files, last: int = FUSE_ROOT_ID) -> None:
        """last: of the numbers that were given before."""
        self.files, self.last, root = files, last, files.root
        root.number = FUSE_ROOT_ID
        self.nodes: dict[int, Node] = {root.number: root}
        self.by_key: dict[int | tuple[int, Any], Node] = {root.key: root}
        self.handles: dict[int, Handle] = {}
        self.readers: dict[int, Handle] = {}  # those by which files are read that are not open, the latest last
        # asking process, file and read-only mount of what is being looked up again, the latest last
        self.fixed: dict[tuple[int, int, int], bool] = {}

    def node(self, number: int) -> Node:
        """Raise OSError."""
        return self.nodes.get(number) or refuse(errno.ESTALE)

    def enter(self, node: Node, folder: Node, name: bytes) -> Node:
        """Return the Node by which the guest knows a file that has a name in a folder.  Raise OSError."""
        known, place = self.by_key.get(node.key), (folder.number, name)
        if known and known.kind != stat.S_IFDIR:
            with Descriptor(system_call("inotify_init1", os.O_CLOEXEC)) as fd:  # in it, one file has one number
                found = {system_call("inotify_add_watch", fd, each.path, IN_DELETE_SELF) for each in (known, node)}
            if len(found) == 2:
                node.key = node.inode, place
                known = self.by_key.get(node.key)
        elif known and known.place != place:
            # it was moved, or is there by another mount: for Linux a folder is at one place
            mount = mount_of(node)
            if mount == mount_of(known):
                known.place = place
            else:
                node.key = node.inode, mount
                known = self.by_key.get(node.key)
        if known is None:
            if len(self.nodes) >= NODES_MAX:
                refuse(errno.ENFILE)
            self.last += 1
            node.own = folder.own or place == (FUSE_ROOT_ID, b"rootfs")
            node.number, node.place = self.last, place if node.kind == stat.S_IFDIR else NOWHERE
            self.nodes[node.number] = known = node
            if not node.sizeless or node.kind != stat.S_IFLNK:  # the guest reads a link once, and these lead elsewhere
                self.by_key[node.key] = node
        known.lookups += 1
        return known

    def look_again(self, node: Node, asker: int) -> None:
        """Raise OSError, ESTALE, if the guest is to look a file up that it cannot change: what it was found by is
        read-only, and the name that is used now may be in a mount that is not.  A process, asker, is told so once, for
        its system call fails at the second time."""
        if node.kind == stat.S_IFDIR:
            return
        found = asker, node.inode, mount_of(node)
        self.lose(node)
        if not self.fixed.pop(found, False):
            self.fixed[found] = True
            if len(self.fixed) > FIXED_MAX:
                del self.fixed[next(iter(self.fixed))]
            refuse(errno.ESTALE)

    def status(self, node: Node) -> Status:
        """Return a file's attributes.  It is found by what it is now: an overlay may have copied it."""
        status = os.fstat(node.fd)
        inode = node.inode if node.inode == status.st_ino else self.files.inode(status.st_dev, status.st_ino)
        if inode != node.inode and node.kind != stat.S_IFDIR:
            self.lose(node)
            node.inode = node.key = inode
            self.by_key[inode] = node
        return status

    def lose(self, node: Node) -> None:
        """Not find it any more by what it is."""
        if self.by_key.get(node.key) is node:
            del self.by_key[node.key]

    def check_room(self, nodes: int = 1) -> None:
        """Raise OSError if there may be no room for so many more files, and for one more that is open."""
        if len(self.nodes) + nodes > NODES_MAX or len(self.handles) >= HANDLES_MAX:
            refuse(errno.ENFILE)

    def open(self, handle: Handle, flags: int, keeps: int = 0) -> bytes:
        """Return struct fuse_open_out.  Whoever opens a file, checks that there is room before.  flags: of open(2)."""
        self.last += 1
        self.handles[self.last] = handle
        # of what is open to append, dom0 knows where the end is, and the guest keeps no page
        direct = flags & os.O_APPEND or handle.node.sizeless
        return OPEN_OUT.pack(self.last, keeps | (FOPEN_DIRECT_IO if direct else 0), 0)

    def handle(self, number: int, node: Node) -> Handle:
        """Return what the guest has open of a file, number 0: to read it without.  Raise OSError."""
        if number:
            handle = self.handles.get(number)
            if handle is None or handle.node is not node:
                refuse(errno.EBADF)
            return handle
        handle = self.readers.pop(node.number, None)
        if handle is None:
            if node.sizeless or node.kind != stat.S_IFREG:  # of the former it counts who opens it
                refuse(errno.EBADF)
            handle = self.files.open(node, os.O_RDONLY)
            if len(self.readers) >= READERS_MAX:
                del self.readers[next(iter(self.readers))]
        self.readers[node.number] = handle
        return handle


class FuseNames(Protocol):
    """FUSE's server, as far as it is about names and attributes.  The guest's kernel checks permissions."""

    shortest, longest = IN_HEADER.size, WRITE_DATA + CONTENT_MAX
    sized, reply_head = FUSE_SIZED, OUT_HEADER.size

    def __init__(self, root: int, capabilities: int) -> None:
        super().__init__(root, capabilities)
        self.known = Known(self.files)
        self.asker: Ids = NO_USER, NO_USER  # whose request is being answered
        self.umask = -1  # as last used
        for name, (opcode, form) in FUSE_REQUESTS.items():
            numbers = form.rstrip("nsb")
            structure = struct.Struct("<" + numbers.replace("H", "Q"))
            self.handlers[opcode] = getattr(self, name), structure, form[len(numbers) :], "H" in form

    def answer(self, request: Ring) -> tuple[bytes, int]:
        _, opcode, unique, number, uid, gid, pid = IN_HEADER.unpack_from(request.head)
        self.request, self.asker = request, (uid, gid)
        number = number or FUSE_ROOT_ID  # some are about no file
        error, body, content = self.attempt(self.handle, opcode, number)
        if error == errno.EROFS:
            error = self.attempt(self.known.look_again, self.known.node(number), pid)[0] or error
        if error == errno.EMFILE:
            error = errno.ENFILE  # at which the guest's kernel forgets files, and asks again
        if opcode in FUSE_SILENT and not unique:  # by readdirplus's way of forgetting, a process waits
            return b"", 0
        return OUT_HEADER.pack(OUT_HEADER.size + len(body) + content, -error, unique) + body, content

    def handle(self, opcode: int, number: int) -> Any:
        """Return what the handler does.  Raise OSError and struct.error."""
        handler, structure, kinds, is_open = self.handlers.get(opcode) or refuse(errno.ENOSYS)
        node = self.known.node(number)
        request, end = self.request, IN_HEADER.size + structure.size
        fields = structure.unpack_from(request.head, IN_HEADER.size)
        if is_open:
            fields = (self.known.handle(fields[0], node), *fields[1:])
        if kinds:
            fields = (*fields, *split_strings(request.copy(end, request.length), kinds))
        if node.sizeless:  # dom0's kernel looks at who asks
            return self.files.as_asker(self.asker, handler, node, *fields)
        return handler(node, *fields)

    # ---- the connection

    def init(self, node: Node, major: int, minor: int, readahead: int, flags: int) -> bytes:
        if (major, minor) < (FUSE_VERSION, FUSE_MINOR_LEAST):
            refuse(errno.EPROTO)
        self.known = Known(self.files, self.known.last)
        return INIT_OUT.pack(
            FUSE_VERSION, FUSE_MINOR, readahead, flags & FUSE_FLAGS, FUSE_BACKGROUND, FUSE_BACKGROUND * 3 // 4,
            CONTENT_MAX, 1, CONTENT_MAX // 4096, 0, DIRECT_IO_ALLOW_MMAP >> 32, 0, b"",
        )  # fmt: skip

    def forget(self, node: Node, count: int) -> None:
        node.lookups -= count
        if node.lookups <= 0 and node is not self.files.root:
            self.known.readers.pop(node.number, None)
            del self.known.nodes[node.number]
            self.known.lose(node)

    def batch_forget(self, _node: Node, count: int, pairs: bytes) -> None:
        for number, times in struct.iter_unpack("<QQ", pairs[: 16 * count]):
            if node := self.known.nodes.get(number):
                self.forget(node, times)

    # ---- names

    def entry(self, node: Node, status: Status, folder: Node, name: bytes) -> bytes:
        """Return struct fuse_entry_out of what was found by a name in a folder, or made there.  Raise OSError."""
        return self.entry_out(self.known.enter(node, folder, name), status)

    @staticmethod
    def entry_out(node: Node, status: Status) -> bytes:
        return ENTRY_OUT.pack(node.number, 0, FUSE_VALID, FUSE_VALID, 0, 0, *fuse_attr(node, status))

    def find(self, folder: Node, name: bytes) -> bytes:
        """Return struct fuse_entry_out of what has a name in a folder.  Raise OSError."""
        status = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
        known = self.known.by_key.get(self.files.inode(status.st_dev, status.st_ino))
        is_elsewhere = known and known.kind == stat.S_IFDIR and known.place != (folder.number, name)
        if known is None or is_elsewhere or may_be_two(status):
            return self.entry(*self.files.find(folder, name), folder, name)
        known.lookups += 1
        return self.entry_out(known, status)

    def lookup(self, folder: Node, name: bytes) -> bytes:
        try:
            return self.find(folder, name)
        except FileNotFoundError:
            return ENTRY_OUT.pack(0, 0, FUSE_VALID, *bytes(19))

    def create(self, folder: Node, flags: int, mode: int, umask: int, name: bytes = b"") -> bytes:
        self.known.check_room()
        self.use_umask(umask)
        try:
            handle, status = self.files.create(folder, name, self.access(flags), mode, self.asker)
        except FileExistsError:
            # the guest does not know of it and has checked no permission: it looks the name up and tries again
            refuse(errno.EEXIST if flags & os.O_EXCL else errno.ESTALE)
        handle.node.seen = content_state(status)
        return self.entry(handle.node, status, folder, name) + self.known.open(handle, flags)

    tmpfile = create  # without a name

    def use_umask(self, umask: int) -> None:
        """It counts where no default access list does."""
        if umask != self.umask:
            os.umask(umask & 0o777)
            self.umask = umask

    def make(self, folder: Node, name: bytes, umask: int, work: Callable[..., None], *args: Any) -> bytes:
        self.known.check_room()
        self.use_umask(umask)
        return self.entry(*self.files.make(folder, name, self.asker, work, *args), folder, name)

    def mknod(self, folder: Node, mode: int, device: int, umask: int, name: bytes) -> bytes:
        return self.make(folder, name, umask, os.mknod, mode, device)

    def mkdir(self, folder: Node, mode: int, umask: int, name: bytes) -> bytes:
        return self.make(folder, name, umask, os.mkdir, mode)

    def symlink(self, folder: Node, name: bytes, target: bytes) -> bytes:
        return self.make(folder, name, 0, lambda new, dir_fd: os.symlink(target, new, dir_fd=dir_fd))

    def link(self, folder: Node, number: int, name: bytes) -> bytes:
        node = self.known.node(number)
        self.change(node, self.files.link, node, folder, name)
        try:
            return self.find(folder, name)
        except OSError:
            os.unlink(name, dir_fd=folder.fd)
            raise

    def unlink(self, folder: Node, name: bytes) -> None:
        os.unlink(name, dir_fd=folder.fd)

    def rmdir(self, folder: Node, name: bytes) -> None:
        os.rmdir(name, dir_fd=folder.fd)

    def rename(self, folder: Node, to: int, *names: Any) -> None:
        *flags, old, new = names
        status = os.stat(old, dir_fd=folder.fd, follow_symlinks=False)
        node = self.known.by_key.get(self.files.inode(status.st_dev, status.st_ino), folder)
        self.change(node, self.files.rename, folder, old, self.known.node(to), new, *flags)

    rename2 = rename  # with flags before the names

    # ---- attributes

    def getattr(self, node: Node, status: Status | None = None) -> bytes:
        return ATTR_OUT.pack(FUSE_VALID, 0, 0, *fuse_attr(node, status or os.fstat(node.fd)))

    def setattr(self, node: Node, valid: int, number: int, size: int, *fields: int) -> bytes:
        atime, mtime, atime_ns, mtime_ns, mode, uid, gid = fields
        drop_privileges(node, valid & SET_SIZE and valid & FATTR_KILL_SUIDGID)
        times = atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns
        handle = self.known.handles.get(number)  # 0, which none has, if the guest names none
        at = handle.fd if handle and handle.node is node else node.path
        work = self.files.set_attributes, node, at, valid, mode, (uid, gid), size, *times
        return self.getattr(node, self.change(node, *work)[1])

    def change(self, node: Node, work: Callable[..., T], *args: Any) -> tuple[T, Status]:
        """Return work(*args), by which the guest changes a file, and its attributes then.  What the guest knows of the
        content stays true."""
        same = node.seen == content_state(os.fstat(node.fd))
        try:
            done = work(*args)
        finally:
            status = self.known.status(node)
            node.seen = content_state(status) if same else ()
        return done, status

    def access(self, flags: int) -> int:
        """Return flags of open(2): the guest keeps what is written, and must read the rest of its page."""
        return flags ^ os.O_WRONLY ^ os.O_RDWR if flags & os.O_ACCMODE == os.O_WRONLY else flags


class Fuse(FuseNames):
    """FUSE's server.  Locks are the guest's kernel's alone."""

    def open(self, node: Node, flags: int, more: int) -> bytes:
        if node.kind != stat.S_IFREG:
            refuse(errno.ENXIO)
        self.known.check_room(0)  # before it is truncated
        drop_privileges(node, more & OPEN_KILL_SUIDGID)
        if node.sizeless:
            return self.known.open(self.files.open(node, flags), flags)
        handle = self.files.open(node, self.access(flags))
        state = content_state(self.known.status(node))
        keeps = node.seen == state
        # what was changed just now by others may be changed once more, and look the same
        node.seen = state if keeps or flags & os.O_TRUNC or is_settled(state) else ()
        return self.known.open(handle, flags, FOPEN_KEEP_CACHE if keeps else 0)

    def readlink(self, node: Node) -> bytes:
        return os.readlink(b"", dir_fd=node.fd)

    def read(self, node: Node, handle: Handle, offset: int, size: int) -> tuple[bytes, int]:
        size = min(size, self.most)
        done = os.preadv(handle.fd, self.request.room(OUT_HEADER.size, size), offset)
        if 0 < done < size and done % PAGE == 0 and not node.sizeless:
            # for the guest's kernel the file ends there, but it may be that what follows cannot be read
            done += os.preadv(handle.fd, self.request.room(OUT_HEADER.size + done, size - done), offset + done)
        return b"", done

    def write(self, node: Node, handle: Handle, offset: int, size: int, flags: int, opened: int) -> bytes:
        if size > self.request.length - WRITE_DATA:
            refuse(errno.EINVAL)
        if flags & WRITE_KILL_SUIDGID:
            drop_privileges(node, True)
        opened = 0 if node.sizeless else opened
        how = RWF_APPEND if opened & os.O_APPEND else 0
        how |= RWF_SYNC if opened & os.O_DSYNC else 0  # what the guest does where it keeps pages
        done, _ = self.change(node, os.pwritev, handle.fd, self.request.content(WRITE_DATA, size), offset, how)
        while 0 < done < size and flags & WRITE_CACHE:  # pages, which the guest's kernel does not count
            rest = self.request.content(WRITE_DATA + done, size - done)
            done += self.change(node, os.pwritev, handle.fd, rest, offset + done, how)[0] or refuse(errno.EIO)
        return U32_PAIR.pack(done, 0)

    def release(self, node: Node, number: int) -> None:
        self.known.handle(number, node)
        self.known.handles.pop(number, None)

    def fsync(self, node: Node, handle: Handle, flags: int) -> None:
        (os.fdatasync if flags & FSYNC_FDATASYNC else os.fsync)(handle.fd)

    releasedir, fsyncdir = release, fsync

    def syncfs(self, node: Node) -> None:
        """All file systems of which the guest knows a file, also where one fails.  Those without sizes have nothing to
        write, and not all of their files can be opened."""
        known = self.known.nodes.values()
        ones = {}
        for kind in (stat.S_IFREG, stat.S_IFDIR):  # rather by a folder: it can be opened
            ones.update({each.inode >> 48: each for each in known if each.kind == kind and not each.sizeless})
        if error := max((self.attempt(self.sync, each)[0] for each in ones.values()), default=0):
            refuse(error)

    def sync(self, node: Node) -> None:
        handle = self.files.open(node, os.O_RDONLY)
        system_call("syncfs", handle.fd)

    def fallocate(self, node: Node, handle: Handle, offset: int, length: int, mode: int) -> None:
        if offset + length > sys.maxsize:
            refuse(errno.EFBIG)
        drop_privileges(node, self.asker[0])
        self.change(node, system_call, "fallocate", handle.fd, mode, offset, length)

    def lseek(self, node: Node, handle: Handle, offset: int, whence: int) -> bytes:
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            refuse(errno.EINVAL)
        return U64.pack(os.lseek(handle.fd, offset, whence))

    def copy_file_range(self, node: Node, handle: Handle, offset: int, to: int, *fields: int) -> bytes:
        to_number, to_offset, size, flags = fields
        changed = self.known.node(to)
        target = self.known.handle(to_number, changed)
        if changed.sizeless or node.sizeless or flags:
            refuse(errno.EXDEV)  # the guest copies by reading and writing
        drop_privileges(changed, self.asker[0])
        size = min(size, COPY_MAX)
        done, _ = self.change(changed, os.copy_file_range, handle.fd, target.fd, size, offset, to_offset)
        return U32_PAIR.pack(done, 0)

    def statfs(self, node: Node) -> bytes:
        found = os.statvfs(node.fd)
        return STATFS_OUT.pack(
            found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree, found.f_bsize, found.f_namemax,
            found.f_frsize, 0, b"",
        )  # fmt: skip

    # ---- folders

    def opendir(self, node: Node) -> bytes:
        if node.kind != stat.S_IFDIR:
            refuse(errno.ENOTDIR)
        self.known.check_room(0)
        return self.known.open(self.files.open(node, os.O_RDONLY), os.O_RDONLY)

    def readdir(self, node: Node, handle: Handle, offset: int, size: int, plus: int = 0) -> bytes:
        room, least, parts = min(size, self.most), plus + FUSE_DIRENT.size, []
        for inode, after, kind, name in self.files.entries(handle, offset, room, least, 8):
            if plus:  # zeros where it does not matter what it is, or it was removed meanwhile
                try:
                    parts.append(bytes(plus) if name in (b".", b"..") else self.find(node, name))
                except OSError:
                    parts.append(bytes(plus))
            parts.append(FUSE_DIRENT.pack(inode, after, len(name), kind) + name + bytes(-len(name) % 8))
        return b"".join(parts)

    def readdirplus(self, node: Node, handle: Handle, offset: int, size: int) -> bytes:
        return self.readdir(node, handle, offset, size, ENTRY_OUT.size)

    # ---- extended attributes

    def on_xattr(self, node: Node, name: bytes, work: Callable[..., T], *args: Any) -> T:
        """Return work(*args): for names that need CAP_SYS_ADMIN, which we have not, with the asker's own rights."""
        if name.startswith((b"trusted.", b"security.")) and name != b"security.capability":
            return self.files.as_asker(self.asker, work, *args)
        return work(*args)

    @staticmethod
    def xattr(size: int, value: bytes) -> bytes:
        """Return what answers a question for an attribute, or for its size."""
        if size and len(value) > size:
            refuse(errno.ERANGE)
        return value if size else U32_PAIR.pack(len(value), 0)

    def getxattr(self, node: Node, size: int, name: bytes) -> bytes:
        try:
            return self.xattr(size, self.on_xattr(node, name, os.getxattr, node.path, name))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and name.startswith(ACCESS_LIST):
                refuse(errno.ENODATA)  # to the guest's kernel the other one is a reason to open nothing
            raise

    def listxattr(self, node: Node, size: int) -> bytes:
        return self.xattr(size, self.files.as_asker(self.asker, list_xattrs, node))

    def setxattr(self, node: Node, size: int, flags: int, more: int, name: bytes, value: bytes) -> None:
        if len(value) < size:
            refuse(errno.EINVAL)
        check_xattr(name, size)
        self.on_xattr(node, name, os.setxattr, node.path, name, value[:size], flags)
        if more & ACL_KILL_SGID:
            os.chmod(node.path, stat.S_IMODE(os.fstat(node.fd).st_mode) & ~stat.S_ISGID)

    def removexattr(self, node: Node, name: bytes) -> None:
        self.on_xattr(node, name, os.removexattr, node.path, name)


# ---- 9P2000.L, for Linux's 9p (diod's protocol.md, <net/9p/9p.h>): a message is size[4] type[1] tag[2] and its body

# type; the body, of numbers, F: one of a Fid, n: a name in a folder, s: another string, b: the rest; -: nothing
NINEP_REQUESTS = request_table(
    """
    statfs 8 F, lopen 12 FI, lcreate 14 FnIII, symlink 16 FnsI, mknod 18 FnIIII, readlink 22 F, getattr 24 F,
    setattr 26 FIIIIQqQqQ, xattrwalk 30 FIs, xattrcreate 32 FsQI, readdir 40 FQI, fsync 50 FI, lock 52 F,
    getlock 54 FBQQI, link 70 FFn, mkdir 72 FnII, renameat 74 FnFn, unlinkat 76 FnI, version 100 Is,
    attach 104 IIssI, flush 108 -, walk 110 IIHb, read 116 FQI, write 118 FQI, clunk 120 I
    """
)
RLERROR, TWRITE = 7, 118
NINEP_SIZED = {40: 19, 116: 19}  # where a request says how long its reply may be: Treaddir, Tread
# v9fs truncates a file, or opens it to do so, while what it has written before is still on its way in the other ring
NINEP_ORDERED = {12, 26, 50, 108}  # Tlopen, Tsetattr, Tfsync, Tflush
NINEP_MAKING = {14, 16, 18, 72}  # Tlcreate, Tsymlink, Tmknod, Tmkdir: they end with the maker's group
NINEP_NUMBERS = {kind: struct.Struct("<" + kind.replace("F", "I")) for kind in "BFHIQq"}
NINEP_HEADER, QID, NINEP_DIRENT = (struct.Struct(form) for form in ("<IBH", "<BIQ", "<QBH"))
NINEP_ATTR = struct.Struct("<Q13s3I5Q6q4Q")
READ_DATA, WRITTEN_DATA = 11, 23  # where Rread and Twrite have content
QID_TYPES = {stat.S_IFDIR >> 12: 0x80, stat.S_IFLNK >> 12: 2}  # by DT_* of <dirent.h>
IOUNIT = 31 * 4096  # whole pages that fit into a message, beside its head
V9FS_MAGIC, ATTR_BASIC, LOCK_UNLOCKED = 0x01021997, 0x7FF, 2
WALK_MAX, XATTR_MAX, NOBODY = 16, 1 << 16, 65534
P9_REMOVEDIR = 0x200


def ninep_fields(data: bytes, kinds: str) -> Iterator[Any]:
    """Yield what a body has, kinds as in NINEP_REQUESTS.  Raise struct.error or OSError."""
    at = 0
    for kind in kinds:
        if kind in NINEP_NUMBERS:
            yield NINEP_NUMBERS[kind].unpack_from(data, at)[0]
            at += NINEP_NUMBERS[kind].size
        elif kind == "b":
            yield data[at:]
        else:
            start = at + 2
            at = start + U16.unpack_from(data, at)[0]
            if at > len(data):
                refuse(errno.EINVAL)
            yield check_name(data[start:at]) if kind == "n" else data[start:at]


def ninep_string(data: bytes) -> bytes:
    return U16.pack(len(data)) + data


class Fid:
    """What the guest calls by a number: a file, which may be open, or one of its extended attributes."""

    __slots__ = ("node", "uid", "open", "xattr", "value", "size", "flags")

    def __init__(self, node: Node, uid: int, xattr: bytes = b"", value: bytes = b"") -> None:
        self.node, self.uid, self.xattr, self.value = node, uid, xattr, value
        self.open: Handle | None = None
        self.size, self.flags = -1, 0  # size: bytes of a value that is written, to be set when the Fid goes

    def handle(self) -> Handle:
        """Raise OSError."""
        return self.open or refuse(errno.EBADF)

    def check_unused(self) -> None:
        """Raise OSError if it is open or an attribute."""
        if self.open or self.xattr:
            refuse(errno.EINVAL)


class NinePFids(Protocol):
    """9P2000.L's server, as far as it is about messages and what they call by numbers."""

    shortest, longest = NINEP_HEADER.size, CONTENT_MAX
    ordered, sized, reply_head = NINEP_ORDERED, NINEP_SIZED, READ_DATA

    def __init__(self, root: int, capabilities: int) -> None:
        super().__init__(root, capabilities)
        self.fids: dict[int, Fid] = {}
        for name, (kind, form) in NINEP_REQUESTS.items():
            self.handlers[kind] = getattr(self, name), form

    def answer(self, request: Ring) -> tuple[bytes, int]:
        _, kind, tag = NINEP_HEADER.unpack_from(request.head)
        self.request = request
        error, body, content = self.attempt(self.handle, kind)
        if error:
            kind, body = RLERROR - 1, U32.pack(error)
        return NINEP_HEADER.pack(NINEP_HEADER.size + len(body) + content, kind + 1, tag) + body, content

    def handle(self, kind: int) -> Any:
        """Return what the handler does.  Raise OSError and struct.error."""
        handler, form = self.handlers.get(kind) or refuse(errno.EOPNOTSUPP)
        # what is written stays where it lies
        data = self.request.copy(NINEP_HEADER.size, WRITTEN_DATA if kind == TWRITE else self.request.length)
        fields = [self.fid(each) if of == "F" else each for of, each in zip(form, ninep_fields(data, form))]
        fid = fields[0] if form.startswith("F") else None
        if fid and fid.node.sizeless:  # dom0's kernel looks at who asks
            gid: Any = fields[-1] if kind in NINEP_MAKING else NOBODY if fid.uid else 0
            return self.files.as_asker((fid.uid, gid), handler, *fields)
        return handler(*fields)

    def read(self, fid: Fid, offset: int, size: int) -> tuple[bytes, int]:
        size = min(size, self.most)
        if fid.xattr:
            part = fid.value[offset : offset + size]
            return U32.pack(len(part)) + part, 0
        done = os.preadv(fid.handle().fd, self.request.room(READ_DATA, size), offset)
        return U32.pack(done), done

    def write(self, fid: Fid, offset: int, size: int) -> bytes:
        if size > self.request.length - WRITTEN_DATA:
            refuse(errno.EINVAL)
        if not fid.xattr:
            return U32.pack(os.pwritev(fid.handle().fd, self.request.content(WRITTEN_DATA, size), offset))
        if offset != len(fid.value) or offset + size > fid.size:
            refuse(errno.EINVAL)
        fid.value += self.request.copy(WRITTEN_DATA, WRITTEN_DATA + size)
        return U32.pack(size)

    # ---- fids

    def fid(self, number: int) -> Fid:
        return self.fids.get(number) or refuse(errno.EBADF)

    def add(self, number: int, fid: Fid) -> None:
        if number in self.fids:
            refuse(errno.EINVAL)
        if len(self.fids) >= NODES_MAX // 2:  # an open one has two descriptors
            refuse(errno.EMFILE)
        self.fids[number] = fid

    @staticmethod
    def qid(node: Node) -> bytes:
        """Its version is 0 where v9fs is to keep nothing of the content."""
        status = os.fstat(node.fd)
        version = 0 if node.sizeless else (status.st_mtime_ns ^ status.st_size << 8) & 0xFFFFFFFF or 1
        return QID.pack(QID_TYPES.get(node.kind >> 12, 0), version, node.inode)

    def version(self, size: int, name: bytes) -> bytes:
        self.fids.clear()
        if size < 8192:
            refuse(errno.EMSGSIZE)
        size = min(size, CONTENT_MAX)
        self.most = size - READ_DATA
        return U32.pack(size) + ninep_string(name if name == b"9P2000.L" else b"unknown")

    def attach(self, number: int, _afid: int, _name: bytes, where: bytes, uid: int) -> bytes:
        if where not in (b"", b"/"):
            refuse(errno.ENOENT)
        self.add(number, Fid(self.files.root, 0 if uid == NO_USER else uid))
        return self.qid(self.files.root)

    def walk(self, number: int, new: int, count: int, names: bytes) -> bytes:
        fid, found = self.fid(number), b""
        if new == number:
            fid.check_unused()
        if count > WALK_MAX:
            refuse(errno.EINVAL)
        node = fid.node
        for name in ninep_fields(names, "n" * count):
            try:
                node, _ = self.files.find(node, name)
            except OSError:
                if not found:
                    raise
                return U16.pack(len(found) // QID.size) + found
            found += self.qid(node)
        if new == number:
            del self.fids[number]
        self.add(new, Fid(node, fid.uid))
        return U16.pack(count) + found

    def clunk(self, number: int) -> None:
        fid = self.fid(number)
        del self.fids[number]
        if fid.size >= 0:
            if len(fid.value) != fid.size:
                refuse(errno.EINVAL)
            if fid.size:
                os.setxattr(fid.node.path, fid.xattr, fid.value, fid.flags)
            else:
                os.removexattr(fid.node.path, fid.xattr)

    def flush(self) -> None:
        """What it is about has been answered."""


class NineP(NinePFids):
    """9P2000.L's server.  Locks are the guest's kernel's alone, and it checks permissions."""

    def lopen(self, fid: Fid, flags: int) -> bytes:
        fid.check_unused()
        fid.open = self.files.open(fid.node, flags)
        return self.qid(fid.node) + U32.pack(IOUNIT)

    def lcreate(self, fid: Fid, name: bytes, flags: int, mode: int, gid: int) -> bytes:
        fid.check_unused()
        try:
            handle, _ = self.files.create(fid.node, name, flags, mode, (fid.uid, gid))
        except FileExistsError:
            node, _ = self.files.find(fid.node, name)
            if flags & os.O_EXCL or node.kind != stat.S_IFREG:
                raise
            handle = self.files.open(node, flags)
        fid.node, fid.open = handle.node, handle
        return self.qid(fid.node) + U32.pack(IOUNIT)

    def make(self, fid: Fid, name: bytes, gid: int, work: Callable[..., None], *args: Any) -> bytes:
        node, _ = self.files.make(fid.node, name, (fid.uid, gid), work, *args)
        return self.qid(node)

    def mkdir(self, fid: Fid, name: bytes, mode: int, gid: int) -> bytes:
        return self.make(fid, name, gid, os.mkdir, mode)

    def mknod(self, fid: Fid, name: bytes, mode: int, major: int, minor: int, gid: int) -> bytes:
        return self.make(fid, name, gid, os.mknod, mode, os.makedev(major, minor))

    def symlink(self, fid: Fid, name: bytes, target: bytes, gid: int) -> bytes:
        return self.make(fid, name, gid, lambda new, dir_fd: os.symlink(target, new, dir_fd=dir_fd))

    def link(self, folder: Fid, fid: Fid, name: bytes) -> None:
        self.files.link(fid.node, folder.node, name)

    def readlink(self, fid: Fid) -> bytes:
        return ninep_string(os.readlink(b"", dir_fd=fid.node.fd))

    def renameat(self, old_folder: Fid, old: bytes, new_folder: Fid, new: bytes) -> None:
        self.files.rename(old_folder.node, old, new_folder.node, new)

    def unlinkat(self, fid: Fid, name: bytes, flags: int) -> None:
        (os.rmdir if flags & P9_REMOVEDIR else os.unlink)(name, dir_fd=fid.node.fd)

    def getattr(self, fid: Fid) -> bytes:
        node = fid.node
        status = os.fstat(node.fd)
        stamps = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
        times = [part for each in stamps for part in divmod(each, 10**9)]
        return NINEP_ATTR.pack(
            ATTR_BASIC, self.qid(node), status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_rdev,
            status.st_size, status.st_blksize, status.st_blocks, *times, *bytes(4),
        )  # fmt: skip

    def setattr(self, fid: Fid, valid: int, mode: int, uid: int, gid: int, size: int, *times: int) -> None:
        valid ^= (valid & (SET_ATIME | SET_MTIME)) << 3  # where these bits are set, a time is not now
        new = [seconds * 10**9 + fraction for seconds, fraction in zip(times[::2], times[1::2])]
        self.files.set_attributes(fid.node, fid.node.path, valid, mode, (uid, gid), size, *new)

    def xattrwalk(self, fid: Fid, new: int, name: bytes) -> bytes:
        value = os.getxattr(fid.node.path, name) if name else list_xattrs(fid.node)
        self.add(new, Fid(fid.node, fid.uid, name or b"*", value))
        return U64.pack(len(value))

    def xattrcreate(self, fid: Fid, name: bytes, size: int, flags: int) -> None:
        fid.check_unused()
        if not name or size > XATTR_MAX:
            refuse(errno.E2BIG if name else errno.EINVAL)
        check_xattr(name, size)
        fid.xattr, fid.value, fid.size, fid.flags = name, b"", size, flags

    def readdir(self, fid: Fid, offset: int, size: int) -> bytes:
        room, least, parts = min(size, self.most), QID.size + NINEP_DIRENT.size, []
        for inode, after, kind, name in self.files.entries(fid.handle(), offset, room, least):
            qid = QID.pack(QID_TYPES.get(kind, 0), 0, inode)
            parts.append(qid + NINEP_DIRENT.pack(after, kind, len(name)) + name)
        data = b"".join(parts)
        return U32.pack(len(data)) + data

    def fsync(self, fid: Fid, only_data: int) -> None:
        (os.fdatasync if only_data else os.fsync)(fid.handle().fd)

    def lock(self, fid: Fid) -> bytes:
        return b"\0"  # P9_LOCK_SUCCESS

    def getlock(self, fid: Fid, _kind: int, *asked: int) -> bytes:
        return struct.pack("<BQQIH", LOCK_UNLOCKED, *asked, 0)  # which nobody has

    def statfs(self, fid: Fid) -> bytes:
        found = os.statvfs(fid.node.fd)
        return struct.pack(
            "<IIQQQQQQI", V9FS_MAGIC, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files,
            found.f_ffree, found.f_fsid, found.f_namemax,
        )  # fmt: skip


# ---- the process, and the device by which the guest finds it

# for files of whatever owner; SETGID and SETUID, to open with another's rights what is not a file of a disk's
SERVING = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID MKNOD SETFCAP SETGID SETUID"
SERVING_CAPABILITIES = sum(CAPABILITIES[f"CAP_{name}"] for name in SERVING.split())
PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS = 4, 15, 38  # <linux/prctl.h>
SERVING_DATA = 128 << 20  # bytes of memory that it may write, most of it for what the guest has opened
LOOKS_MAX, UNLOOKED_MAX = 2048, 64  # looks take 0.1 ms
LOOK_EACH = 256  # rounds in which a guest does not pause: the monitor may have ended within as_asker()


class FileServer:
    """The monitor's side of the process that serves a container's files: its pid, 0 if there is none, and a socket.  It
    says "+" when it can begin, is sent domid and of each ring grant and event channel, and says "+" again when it has
    them.  All else that it says is why it ends."""

    pid = 0
    link: Any = None

    def start(self, kind: str, share: str, capabilities: int) -> None:
        """Have it begin, in our mount namespace and cgroup.  kind: of the device.  capabilities: a bit for each that
        the container's processes may have.  Raise OSError."""
        self.pid, self.link = fork_linked("file server", (), run_file_server, kind, share, capabilities)

    def stop(self) -> None:
        """End it, wherever it is."""
        if self.pid:
            self.link.close()
            os.kill(self.pid, SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class ShareDevice(OwnDevice):
    """What the guest mounts: of kind "fuse" for runX's own kernel, "9pfs" for others."""

    def __init__(self, domain: Domain, kind: str, server: FileServer) -> None:
        super().__init__(domain, kind, 0)
        self.server = server

    def introduce(self) -> None:
        limits = {"versions": "1", "max-rings": str(RINGS_MAX[self.kind]), "max-ring-page-order": str(RING_ORDER_MAX)}
        self.announce({**limits, "state": XENBUS_INITWAIT}, {"tag": "share"}, listed=False)

    def connect(self) -> None:
        """Have the server take the rings; confirm() is called when it has.  Raise Error."""
        domid = self.domain.domid
        with Attempt(f"connect to device {self.kind} of domain {domid}", ValueError, struct.error):
            count = int(self.xenstore.read(f"{self.frontend}/num-rings"))
            if not 1 <= count <= RINGS_MAX[self.kind]:
                raise ValueError(f"it has {count} rings")
            names = f"{self.frontend}/ring-ref", f"{self.frontend}/event-channel-"
            ends = self.xenstore.read_numbers(*(f"{name}{number}" for number in range(count) for name in names))
            tell(self.server.link, struct.pack(f"={1 + len(ends)}I", domid, *ends))


def run_file_server(kind: str, share: str, capabilities: int, link: Any) -> int:
    """The process's whole life: until the monitor is gone.  Raise Error if the guest does what it must not."""
    try:
        system_call("prctl", PR_SET_PDEATHSIG, SIGKILL)
        system_call("prctl", PR_SET_NAME, "runX files")  # for ps
        signal = import_core("signal")
        for number in RELAYED:  # who signals all of a cgroup: the container's process still needs its files
            signal.signal(number, signal.SIG_IGN)
        gc.disable()  # nothing here refers to itself, and what is shared with the monitor stays so
        close_standard(0, 1, 2)
        channels, grants = EventChannels(), Grants()
        rights = int(read_file("/proc/self/status").partition("CapPrm:")[2].split()[0], 16)
        enter_share(share)
        share_fd = os.open("/share", os.O_PATH | os.O_DIRECTORY)
        protocol: Protocol = NineP(share_fd, capabilities) if kind == "9pfs" else Fuse(share_fd, capabilities)
        give_up_rights(capabilities & rights)
        link.send(b"+")
        if isinstance(protocol, Fuse):  # what the guest asks first, for a forked process copies what memory it uses
            protocol.find(protocol.files.root, b"rootfs")  # which init() forgets
        where = link.recv(256)
        if where:
            domid, *numbers = struct.unpack(f"={len(where) // 4}I", where)
            channels.restrict(domid)
            rings = connect_rings(domid, zip(numbers[::2], numbers[1::2]), channels, grants)
            grants.close()
            link.send(b"+")
            serve_rings(protocol, rings, channels, link.fileno())
    except MemoryError:
        raise Error(f"what it has open and remembers takes more than {SERVING_DATA >> 20} MiB") from None
    return 0


def enter_share(share: str) -> None:
    """Enter mount and network namespaces of our own, which have nothing but /share and, for what is opened again by its
    descriptor, two folders of /proc/self.  Raise Error and OSError."""
    system_call("unshare", CLONE_NEWNET)
    own_mounts()
    hide_ourselves(share)
    root = os.path.dirname(share)
    with Descriptor(os.open(share, os.O_PATH)) as source:
        mount("tmpfs", root, MS_NODEV | MS_NOSUID | MS_NOEXEC, "tmpfs", "mode=755,size=64k")
        os.mkdir(f"{root}/share")
        mount(f"/proc/self/fd/{source}", f"{root}/share", MS_BIND | MS_REC)
    for folder in ("/proc/self/fd", "/proc/self/fdinfo"):
        os.makedirs(f"{root}{folder}")
        mount(folder, f"{root}{folder}", MS_BIND)
    os.chdir(root)
    pivot_root()


def hide_ourselves(share: str) -> None:
    """Cover our own folder in each /proc below the share that has one: a process can always write its own memory."""
    mounts = [entry for entry in host_mounts() if entry.target.startswith(f"{share}/")]
    for itself in [f"{entry.target}/self" for entry in mounts if entry.kind == "proc" and entry.root == "/"]:
        try:
            os.stat(itself)
        except FileNotFoundError:  # of a pid namespace in which we have no number
            continue
        mount("tmpfs", itself, MS_RDONLY, "tmpfs", "size=4k")


def give_up_rights(capabilities: int) -> None:
    """Keep the rights to serve files, and in reach those that the container has.  Raise OSError."""
    import resource

    limits = {resource.RLIMIT_NOFILE: NODES_MAX + HANDLES_MAX + 256, resource.RLIMIT_DATA: SERVING_DATA}
    for limit, wanted in limits.items():
        most = resource.getrlimit(limit)[1]
        most = wanted if most == resource.RLIM_INFINITY else min(most, wanted)
        resource.setrlimit(limit, (most, most))
    os.umask(0)  # 9P's guest has applied its own, and FUSE's tells it
    if os.getgroups():
        os.setgroups([])
    system_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    low, high = SERVING_CAPABILITIES | capabilities & 0xFFFFFFFF, capabilities >> 32
    rights = struct.pack("=6I", SERVING_CAPABILITIES, low, 0, 0, high, 0)  # as in Files.as_asker()
    system_call("capset", CAPABILITY_HEADER, rights)
    system_call("prctl", PR_SET_DUMPABLE, 0)


class Lookout:
    """Looks for the next request for a while: it often comes sooner than we have gone to sleep and are woken again.
    Not where that has been of no use lately, as where the guest shares our processor: then only now and then."""

    def __init__(self, rings: list[Ring]) -> None:
        self.rings, self.looks, self.unlooked = rings, LOOKS_MAX, 0

    def sees_more(self) -> bool:
        """Return whether there is more than when the rings were last served."""
        if not self.looks:
            self.unlooked += 1
            if self.unlooked < UNLOOKED_MAX:
                return False
            self.looks, self.unlooked = LOOKS_MAX, 0
        for _ in range(self.looks):
            for ring in self.rings:
                if ring.indexes[OUT_PROD] != ring.out_prod:
                    self.looks = LOOKS_MAX
                    return True
        self.looks //= 2
        return False


def serve_rings(protocol: Protocol, rings: list[Ring], channels: EventChannels, link: int) -> None:
    """Serve them until something is said on the link, or its other end is closed.  Raise Error."""
    poll = select.poll()
    for fd in (channels.fd, link):
        poll.register(fd, select.POLLIN)
    rounds, lookout, answered = 0, Lookout(rings), True
    while True:
        looks, answered, rounds = answered, any([ring.serve(protocol) for ring in rings]), rounds + 1
        waits = not answered and not (looks and lookout.sees_more())
        if waits or rounds % LOOK_EACH == 0:
            for ring in rings:
                ring.set_looks(False)
            waits = waits and all([ring.indexes[OUT_PROD] == ring.out_prod for ring in rings])
            if poll.poll(None if waits else 0) not in ([], [(channels.fd, select.POLLIN)]):
                return
            channels.acknowledge()
            for ring in rings:
                ring.set_looks(True)


# ==== cgroup =============================================================================================
# The control group, at linux.cgroupsPath, of what runs on dom0 for a container: there engines read what it uses.  It
# bounds these processes, not the VM, which is Xen's to bound.

if TYPE_CHECKING:
    Cgroups = list[list[str]]  # [root, path] in each hierarchy, as in the state

SERVING_MEMORY = 64 << 20  # bytes that dom0 may need for a container beside what its limit is
SCOPE_TIME_LIMIT = 30.0  # seconds to make a scope of systemd's
CGROUP_TIME_LIMIT = 2.0  # seconds to end the last process in a cgroup


def find_cgroups(path: str, scope: bool) -> Cgroups:
    """Return [root, path] of a cgroup in each hierarchy that dom0 has mounted.  Raise Error if it, or one above, is
    frozen, or if others are in it, unless it is a scope, which systemd has just made for us."""
    path = os.path.normpath("/" + path.lstrip("/"))  # two slashes would stay
    cgroups, seen = [], set()
    for entry in host_mounts():
        # what a cpuset of version 1 holds are dom0's processors, and it takes nobody until it has some
        if not entry.kind.startswith("cgroup") or entry.device in seen or "cpuset" in entry.of_all:
            continue
        seen.add(entry.device)
        cgroups.append([entry.target, path])
        folder = entry.target + path
        remedy = "name another one by linux.cgroupsPath"
        if path == "/" or (not scope and any(cgroup_lines(each) for each, _, _ in os.walk(folder))):
            raise Error(f"cannot make the cgroup {path}: others are in it; {remedy}")
        while folder != entry.target:  # who is put into one that is frozen, or below it, stops
            frozen = cgroup_lines(folder, "cgroup.freeze") == ["1"]
            state = cgroup_lines(folder, "freezer.state")  # of version 1
            if frozen or state not in ([], ["THAWED"]):
                at = folder[len(entry.target) :]
                raise Error(f"cannot make the cgroup {path}: container's cgroup unexpectedly frozen at {at}; {remedy}")
            folder = os.path.dirname(folder)
    return cgroups


def cgroup_lines(folder: str, name: str = "cgroup.procs") -> list[str]:
    """Return what is in a cgroup's file: pids, or what name says."""
    try:
        return read_file(f"{folder}/{name}").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []


def make_cgroups(cgroups: Cgroups, resources: Resources) -> None:
    """Make them, with their limits.  Raise Error."""
    for root, path in cgroups:
        folder = root
        with Attempt(f"make the cgroup {path} in {root}"):
            for name in path.split("/")[1:]:
                enable_controllers(folder)
                folder += f"/{name}"
                os.makedirs(folder, exist_ok=True)
            limit_cgroup(folder, resources)


def join_cgroups(cgroups: Cgroups) -> None:
    """Move us there.  Raise Error."""
    for root, path in cgroups:
        with Attempt(f"move process {os.getpid()} to the cgroup {path} in {root}"):
            write_file(f"{root}{path}/cgroup.procs", os.getpid())


def check_devices(path: str, cgroups: Cgroups) -> None:
    """Raise Error, and have us out again, if the cgroup that we are in, or one above, forbids a device that we need."""
    for device in ("/dev/null", GRANTED_PAGES):
        try:
            os.close(os.open(device, os.O_RDWR))
        except PermissionError:
            join_cgroups([[root, ""] for root, _ in cgroups])
            reason = f"nobody there may open {device}; name another one by linux.cgroupsPath"
            raise Error(f"cannot use the cgroup {path}: {reason}") from None
        except OSError:
            pass  # who needs it says so


def enable_controllers(folder: str) -> None:
    """Let the cgroups below have what this one has; of version 2, where each must be asked for."""
    controllers = f"{folder}/cgroup.controllers"
    for name in read_file(controllers).split() if os.path.exists(controllers) else ():
        try:
            write_file(f"{folder}/cgroup.subtree_control", f"+{name}")
        except OSError:
            pass  # the cgroup has processes of its own, or those below could not have it


def cgroup_limits(resources: Resources) -> dict[str, str]:
    """Return the content of each file of either version."""
    limits = {}
    if resources.memory:
        memory = str(resources.memory + SERVING_MEMORY)
        limits = {"memory.max": memory, "memory.limit_in_bytes": memory}
    if resources.memory < 0:
        limits = {"memory.max": "max", "memory.limit_in_bytes": "-1"}
    if resources.shares:
        shares = max(2, min(resources.shares, 262144))
        limits["cpu.weight"] = str(1 + (shares - 2) * 9999 // 262142)  # as runc makes it of shares
        limits["cpu.shares"] = str(resources.shares)
    return limits


def limit_cgroup(folder: str, resources: Resources) -> None:
    """Write those limits that this hierarchy has.  Raise OSError."""
    for name, value in cgroup_limits(resources).items():
        if os.path.exists(f"{folder}/{name}"):
            write_file(f"{folder}/{name}", value)


def start_scope(path: str, resources: Resources) -> tuple[Popen[bytes], str]:
    """Return a process that keeps a new scope of systemd's until its standard input ends, and the scope's path."""
    import subprocess

    unit, command = scope_command(path, resources)
    with Attempt(f"make the scope {unit}: systemd-run"):
        scope = subprocess.Popen(
            [*command, "sh", "-c", "cat /proc/self/cgroup; read -r _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": PATH},
        )
    assert scope.stdout
    lines: list[str] = []
    while select.select([scope.stdout], [], [], SCOPE_TIME_LIMIT)[0]:
        data = os.read(scope.stdout.fileno(), 1 << 16)  # of whole lines, and first perhaps a warning of systemd-run's
        lines += data.decode("utf-8", "replace").splitlines()
        paths = [line.split(":", 2)[2] for line in lines if line.startswith("0::") or ":name=systemd:" in line]
        if paths:
            return scope, paths[-1]
        if not data:
            break
    scope.kill()
    scope.communicate()
    raise Error(f"cannot make the scope {unit}: systemd-run says {printable(' '.join(lines)) or 'nothing'}")


def scope_command(path: str, resources: Resources) -> tuple[str, list[str]]:
    """Return the name of the scope at a cgroupsPath in systemd's form, and the start of the command that makes it."""
    parent, colon, name = path.partition(":")
    if not colon:
        raise Error(f"config.json: linux.cgroupsPath must be SLICE:PREFIX:NAME for systemd, not {printable(path)}")
    unit = name[1:] if name.startswith(":") else name.replace(":", "-", 1)
    command = ["systemd-run", "--quiet", "--scope", "--collect", f"--unit={unit}.scope"]
    # as runc has it: else systemd ends it at shutdown beside the engine, which is to do that
    command += [f"--slice={parent or 'system.slice'}", "--property=Delegate=yes", "--property=DefaultDependencies=no"]
    limits = cgroup_limits(resources)  # without them, systemd would put its own there again
    for limit, name in (("memory.max", "MemoryMax"), ("cpu.weight", "CPUWeight")):
        if limit in limits:
            command.append(f"--property={name}={limits[limit].replace('max', 'infinity')}")
    return unit, command


def remove_cgroups(cgroups: Cgroups, pids: Sequence[int]) -> None:
    """Remove what make_cgroups() has made, with cgroups below; pids go to the root.  Raise Error if others stay."""
    left, deadline = [], time.monotonic() + CGROUP_TIME_LIMIT
    for root, path in cgroups:
        for folder, _, _ in os.walk(root + path, topdown=False):
            while not remove_cgroup(root, folder, pids):
                if time.monotonic() > deadline:
                    left.append(folder)
                    break
                time.sleep(0.01)  # who was killed has not quite ended
    if left:
        raise Error(f"cannot remove the cgroup {', '.join(left)}: others are in it")


def remove_cgroup(root: str, folder: str, pids: Sequence[int]) -> bool:
    """Return whether it is gone."""
    try:
        for pid in set(cgroup_lines(folder)) & set(map(str, pids)):
            write_file(f"{root}/cgroup.procs", pid)
        os.rmdir(folder)
    except FileNotFoundError:
        pass  # systemd, or the engine, was quicker
    except OSError:
        return False
    return True


MCL_FUTURE = 2  # <sys/mman.h>
OOM_MEMORY, OOM_MEMORY_MAX = 4 << 20, 128 << 20  # bytes that the process asks for, beside what is used and with it


def show_oom(cgroups: Cgroups, log: Log) -> None:
    """Let engines, which watch the container's cgroup, see that memory has run out, as the VM's kernel has told."""
    try:
        for root, path in cgroups:
            for limit, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
                limit = f"{root}{path}/memory.{limit}"
                if os.path.exists(limit):
                    cached = cached_memory(f"{root}{path}/memory.stat")
                    run_out_of_memory(limit, int(read_file(f"{root}{path}/memory.{usage}")) - cached)
    except OSError as error:
        log.debug(f"its cgroup does not show that memory has run out: {error}")


def cached_memory(path: str) -> int:
    """Return the bytes of files and, if memory.stat tells, of names that a cgroup has and a lower limit takes away."""
    told = {name: int(size) for name, size in map(str.split, read_file(path).splitlines())}
    in_files = told.get("file", told.get("cache", 0)) - told.get("shmem", 0)
    return in_files + told.get("slab_reclaimable", 0)


def run_out_of_memory(limit: str, usage: int) -> None:
    """Have dom0's kernel kill, and count, a process of ours in a cgroup.  usage: bytes that cannot be taken away."""
    before, most = read_file(limit), usage + OOM_MEMORY
    if most > OOM_MEMORY_MAX or read_file("/proc/sys/vm/panic_on_oom") == "2":
        return  # the guest's word is not worth that
    pid = os.fork()
    if pid == 0:
        try:
            write_file("/proc/self/oom_score_adj", 1000)
            system_call("mlockall", MCL_FUTURE)  # dom0 must not swap instead
            write_file(limit, most)
            b"\1" * (2 * most)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    write_file(limit, before)


# ==== rtnetlink ==========================================================================================
# Links, addresses, routes and neighbours: rtnetlink(7) with dom0's kernel, and what the guest sends to its own.

if TYPE_CHECKING:
    Attributes = dict[int, Any]  # by their kind
    Address = Union[IPv4Address, IPv6Address]
    Prefixed = Union[IPv4Interface, IPv6Interface]  # an address with its subnet
    Subnet = Union[IPv4Network, IPv6Network]

RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 16, 20, 24, 28  # <linux/rtnetlink.h>
RTM_NEWQDISC, RTM_NEWTFILTER = 36, 44
RTM_DELETE, RTM_GET = 1, 2  # RTM_DELLINK and RTM_GETLINK, and all others too, are by that much above RTM_NEWLINK
RTMGRP_LINK = 1
DUMP_ATTEMPTS = 32  # to be told all at once while it changes
NLMSG_ERROR, NLMSG_DONE = 2, 3  # <linux/netlink.h>
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 1, 4, 0x10, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER = 1, 3, 4, 10  # <linux/if_link.h>
IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD = 18, 26, 28
IFLA_INFO_KIND, IFLA_INET6_ADDR_GEN_MODE = 1, 8
IFF_UP, IFF_ALLMULTI, ARPHRD_ETHER = 1, 0x200, 1  # <linux/if.h>, <linux/if_arp.h>
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8  # <linux/if_addr.h>
IFA_F_NODAD, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x80, 0x200
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY = 1, 2, 4, 5
RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_VIA = 6, 7, 8, 9, 18
RTAX_MTU, RTAX_ADVMSS = 2, 8
RT_TABLE_MAIN, RTN_UNICAST, RTNH_F_ONLINK = 254, 1, 4
RTPROT_STATIC, RTPROT_RA, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 4, 9, 0, 253
NDA_DST, NDA_LLADDR, NUD_PERMANENT = 1, 2, 0x80  # <linux/neighbour.h>
AF_INET, AF_INET6 = 2, 10
TC_H_INGRESS, INGRESS_HANDLE = 0xFFFFFFF1, 0xFFFF0000  # <linux/pkt_sched.h>
TCA_KIND, TCA_OPTIONS, TCA_MATCHALL_ACT, TC_ACT_STOLEN = 1, 2, 2, 4  # <linux/pkt_cls.h>
TCA_ACT_KIND, TCA_ACT_OPTIONS = 1, 2
TCA_MIRRED_PARMS, TCA_EGRESS_REDIR = 2, 1  # <linux/tc_act/tc_mirred.h>
ETH_P_ALL_BIG_ENDIAN = 0x0300
HEADS = {  # the struct that a message of a kind begins with; index, a link's, is its second word
    0: "=i",  # struct nlmsgerr, of NLMSG_ERROR: errno
    RTM_NEWLINK: "=BxHiII",  # struct ifinfomsg: family, type, index, flags, which of them are changed
    RTM_NEWADDR: "=4BI",  # struct ifaddrmsg: family, length of the prefix, flags, scope, index
    RTM_NEWROUTE: "=8BI",  # struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type
    RTM_NEWNEIGH: "=B3xiHBB",  # struct ndmsg: family, index, state, flags, type
    RTM_NEWQDISC: "=B3xiIII",  # struct tcmsg: family, index, handle, parent, info
    RTM_NEWTFILTER: "=B3xiIII",
}


class Message:
    """An attribute that has come is bytes; one to be sent may be a string, a number of 32 bits or a dict too."""

    def __init__(self, kind: int, head: tuple[int, ...], attributes: Attributes) -> None:
        self.kind, self.head, self.attributes = kind, head, attributes

    def pack(self, flags: int) -> bytes:
        body = struct.pack(HEADS[self.kind & ~3], *self.head) + pack_attributes(self.attributes)
        flags |= NLM_F_REQUEST | NLM_F_ACK
        return struct.pack("=IHHII", 16 + len(body), self.kind, flags, 0, 0) + body

    def for_guest(self, flags: int) -> str:
        """Return it in hexadecimal, with "@" for the interface's number there: in the head, of a route at the end."""
        data = self.pack(flags)
        place = len(data) - 4 if self.kind == RTM_NEWROUTE else 20
        return f"{data[:place].hex()}@{data[place + 4 :].hex()}"


def parse_message(kind: int, body: bytes) -> Message:
    form = HEADS[kind & ~3]
    data, attributes = body[struct.calcsize(form) :], {}
    while len(data) >= 4 and kind >= RTM_NEWLINK:
        length, name = struct.unpack_from("=HH", data)
        attributes[name & 0x3FFF] = data[4:length]
        data = data[max(4, (length + 3) & ~3) :]
    return Message(kind, struct.unpack_from(form, body), attributes)


def pack_attributes(attributes: Attributes) -> bytes:
    """Return a struct rtattr for each."""
    data = b""
    for kind, value in attributes.items():
        if isinstance(value, dict):
            value = pack_attributes(value)
        elif isinstance(value, str):
            value = value.encode() + b"\0"
        elif isinstance(value, int):
            value = struct.pack("=I", value)
        data += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    return data


def link_message(index: int, attributes: Attributes, up: bool = False) -> Message:
    """Return what changes a link.  up: that it gets up, else that stays as it is."""
    flags = IFF_UP if up else 0
    return Message(RTM_NEWLINK, (0, 0, index, flags, flags), attributes)


def family_of(address: Address | Subnet) -> int:
    return AF_INET if address.version == 4 else AF_INET6


def address_message(address: Prefixed, index: int = 0) -> Message:
    found = {IFA_LOCAL: address.packed, IFA_ADDRESS: address.packed}
    length, is_ipv6 = address.network.prefixlen, address.version == 6
    if not is_ipv6 and length < 31:
        found[IFA_BROADCAST] = address.network.broadcast_address.packed
    # who had an address on dom0 has made sure already that nobody else has it
    flags = IFA_F_NODAD if is_ipv6 else 0
    return Message(RTM_NEWADDR, (family_of(address), length, flags, RT_SCOPE_UNIVERSE, index), found)


class Link:
    """A link as the kernel tells it."""

    def __init__(self, message: Message) -> None:
        _, self.type, self.index, flags, _ = message.head  # ARPHRD_*
        found = message.attributes
        self.name: str = found[IFLA_IFNAME].rstrip(b"\0").decode()
        self.mac: bytes = found.get(IFLA_ADDRESS, b"")
        self.mtu = int.from_bytes(found.get(IFLA_MTU, b""), sys.byteorder)
        self.up = bool(flags & IFF_UP)
        # whether it takes only what multicast its namespace has asked for: a veth always takes all
        self.filters = not flags & IFF_ALLMULTI and b"veth" not in found.get(IFLA_LINKINFO, b"")


class Rtnetlink:
    """A connection to the rtnetlink of one network namespace: of ours, or of the one at a path."""

    def __init__(self, namespace: str = "", groups: int = 0) -> None:
        socket = import_core("socket")
        kind = socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE
        self.socket = in_namespace(namespace, socket.socket, *kind) if namespace else socket.socket(*kind)
        self.socket.bind((0, groups))
        self.interrupted = False  # whether what it told of had changed before it was told in whole

    def receive(self) -> Iterator[Message]:
        """Yield each message in the next datagram."""
        data = self.socket.recv(1 << 17)
        while len(data) >= 16:
            length, kind, flags = struct.unpack_from("=IHH", data)
            self.interrupted |= bool(flags & NLM_F_DUMP_INTR)
            yield parse_message(kind, data[16:length])
            data = data[(length + 3) & ~3 :]

    def request(self, message: Message, flags: int = 0) -> list[Message]:
        """Send a message, and return what the kernel answers.  Raise OSError."""
        self.socket.send(message.pack(flags))
        answers: list[Message] = []
        while True:
            for answer in self.receive():
                if answer.kind in (NLMSG_ERROR, NLMSG_DONE):
                    if answer.head[0] < 0:
                        refuse(-answer.head[0])
                    return answers
                answers.append(answer)

    def dump(self, kind: int) -> list[Message]:
        """Return all of a kind, RTM_NEW…, that there are.  If they change meanwhile, the kernel may leave one out."""
        nothing = struct.unpack(HEADS[kind], bytes(struct.calcsize(HEADS[kind])))
        for _ in range(DUMP_ATTEMPTS):
            self.interrupted = False
            found = self.request(Message(kind + RTM_GET, nothing, {}), NLM_F_DUMP)
            if not self.interrupted:
                break
        return found

    def set_link(self, index: int, attributes: Attributes, up: bool = False) -> None:
        self.request(link_message(index, attributes, up))

    def take_all_multicast(self, index: int, takes: bool) -> None:
        """Have a link take multicast of any group, as far as it can, or only of those that its namespace asks for."""
        try:
            self.request(Message(RTM_NEWLINK, (0, 0, index, IFF_ALLMULTI * takes, IFF_ALLMULTI), {}))
        except OSError:
            pass

    def links(self) -> list[Link]:
        return list(map(Link, self.dump(RTM_NEWLINK)))

    def link(self, name: str) -> Link:
        """Raise OSError."""
        return Link(self.request(Message(RTM_NEWLINK + RTM_GET, (0, 0, 0, 0, 0), {IFLA_IFNAME: name}))[0])

    def find_link(self, name: str) -> Link | None:
        try:
            return self.link(name)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ERANGE):  # no link has so long a name
                raise
            return None

    def await_link(self, name: str, seconds: float) -> bool:
        """Return once there is a link of that name, or False if there is none in time.  It needs RTMGRP_LINK."""
        deadline, netlink = time.monotonic() + seconds, Rtnetlink()
        while select.select([self.socket], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                self.socket.recv(1)  # that something has changed; what has, the other one tells
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than there was room to tell
                    raise
            if netlink.find_link(name):
                return True
        return False


def mark_namespace() -> Any:
    """Return a socket whose name says, as long as it is open, that a VM has our network namespace.  Raise Error."""
    socket = import_core("socket")
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(b"\0runX")  # abstract names, unix(7), are a network namespace's own
        return mark
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    raise Error("cannot join the network namespace of another container, and containers cannot share a VM yet")


def make_namespace(path: str) -> None:
    """Make a network namespace that lasts as long as path, a file onto which it is mounted.  Raise Error."""

    def keep() -> None:
        system_call("unshare", CLONE_NEWNET)
        mount("/proc/thread-self/ns/net", path, MS_BIND)

    with Attempt(f"make the network namespace {path}"):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        in_namespace(OWN_NETWORK, keep)


def redirect(netlink: Rtnetlink, source: int, target: int) -> None:
    """Have what arrives at each of two links leave by the other.  Raise OSError, EEXIST if one has a classifier."""
    made, once = [], NLM_F_CREATE | NLM_F_EXCL
    try:
        for link, other in ((source, target), (target, source)):
            ingress = (0, link, INGRESS_HANDLE, TC_H_INGRESS, 0)
            netlink.request(Message(RTM_NEWQDISC, ingress, {TCA_KIND: "ingress"}), once)
            made.append(link)
            mirred = struct.pack("=8xi8xiI", TC_ACT_STOLEN, TCA_EGRESS_REDIR, other)
            action = {TCA_ACT_KIND: "mirred", TCA_ACT_OPTIONS: {TCA_MIRRED_PARMS: mirred}}
            matchall = {TCA_KIND: "matchall", TCA_OPTIONS: {TCA_MATCHALL_ACT: {1: action}}}
            everything = (0, link, 0, INGRESS_HANDLE, 1 << 16 | ETH_P_ALL_BIG_ENDIAN)
            netlink.request(Message(RTM_NEWTFILTER, everything, matchall), once)
    except OSError:
        for link in made:
            end_redirect(netlink, link)
        raise


def end_redirect(netlink: Rtnetlink, index: int) -> None:
    """Undo one side of redirect().  Raise OSError."""
    netlink.request(Message(RTM_NEWQDISC + RTM_DELETE, (0, index, INGRESS_HANDLE, TC_H_INGRESS, 0), {}))


# ==== CNI ================================================================================================
# Networks that NETCONF names: configuration files and plugins of the CNI specification, SPEC.md 0.1.0 to 1.1.0.

CNI_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
# the folders of the plugins: the engine's word, or the usual ones
CNI_PATH = os.environ.get("CNI_PATH", "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni")
CNI_TIME_LIMIT = 30  # seconds that a plugin has
DNS_MAX = 3500  # bytes; see GUEST_NODE_MAX
MTU_MAX = 65535  # of Linux's
ROUTE_NUMBERS = {"priority": 32, "mtu": 32, "advmss": 32, "scope": 8}  # of a route in SPEC.md, and their bits


class Attachment(Record):
    """An interface of a container's in a network.  Kept in its state, so that whoever deletes it can give all back."""

    network: str
    identity: str  # CNI_CONTAINERID
    interface: str  # CNI_IFNAME
    namespace: str  # CNI_NETNS
    calls: list[list[Any]] = []  # [plugin, configuration] of each that is executed, in order
    result: JsonObject | None = None  # of the last ADD
    bridge: str = ""  # of which the vif becomes a port; "": it gets what arrives at interface in namespace
    mac: str
    mtu: int  # 0: the bridge's
    rate: str  # as netback wants it, or ""
    dhcp: bool
    addresses: list[str]  # such as "192.168.0.7/24"; these and routes where there is a bridge
    routes: list[list[Any]] = []  # [destination, gateway or "", its ROUTE_NUMBERS]; of an older runX perhaps without
    gateways: list[str]  # that are default routes, whatever the routes are
    dns: JsonObject  # as in SPEC.md


class Network:
    """A network as NETCONF names it, and what the container wants of it."""

    def __init__(self, request: Netconf, folders: list[str]) -> None:
        """folders: where its file may be.  Raise Error."""
        _, self.file, self.name, address = request
        document = find_document(request, folders)
        plugins = document.sections("plugins") if "plugins" in document else [document]
        if not plugins:
            document.refuse("must name a plugin", "plugins")
        first, ipam = plugins[0], plugins[0].section("ipam")
        kind = ipam.text("type", "")
        self.ipam = "" if kind == "dhcp" else kind  # the plugin that chooses addresses, or ""
        for program in (self.ipam or "none", *(plugin.text("type") for plugin in plugins)):
            if "/" in program or program in ("", ".", "..") or not program.isprintable():
                document.refuse(f"has the type {printable(program)}, which is not the name of a plugin")
        for plugin in plugins:
            plugin.section("args").section("cni")
        is_bridge = first.values["type"] == "bridge"
        if address == "auto" and not self.ipam:
            document.refuse('has no ipam that chooses an address: leave out "auto", and the VM asks by DHCP')
        stated = [document.text("cniVersion", "0.2.0"), *document.texts("cniVersions")]
        known = [version for version in stated if version in CNI_VERSIONS]
        self.version = max(known, key=CNI_VERSIONS.index) if known else document.choice("cniVersion", CNI_VERSIONS)
        self.plugins = [plugin.values for plugin in plugins]  # the first one makes the interface
        self.ranges = parse_ranges(ipam)
        self.bridge = first.text("bridge", "cni0") if is_bridge else ""  # of the bridge plugin; "" for another one
        self.mtu = first.number("mtu", 0, 0, MTU_MAX)  # 0: not said
        self.rate = bandwidth_rate(plugins)
        self.dns = check_dns(first.section("dns"))
        # the VM asks for its address by itself; else it is one of these, or ipam chooses.  It is a bridge as RunX has
        # always taken it; what makes a link of its own, as CNI has it
        self.dhcp = not address and (is_bridge or not self.ipam)
        given = address.split(";") if address not in ("", "auto") else []
        self.addresses = [parse_address(part, self) for part in given]
        # first the one of a given address: its gateway is the default route
        self.ranges.sort(key=lambda each: not any(address.ip in each[0] for address in self.addresses))


def find_document(request: Netconf, folders: list[str]) -> Section:
    """Return the network of a NETCONF variable as its file has it."""
    import json

    variable, path, name, _ = request
    text = read_trusted(variable, path, folders)
    documents: list[Any] = []
    decoder = json.JSONDecoder(**JSON_NUMBERS)
    with Attempt(f"read the networks in {path}", ValueError, RecursionError):
        while text := text.lstrip():  # one behind the other or in an array
            document, end = decoder.raw_decode(text)
            documents += check_document(document) if isinstance(document, list) else [check_document(document)]
            text = text[end:]
    networks = [Section(document, f"{path}: network {name}", ": ") for document in documents]
    found = [network for network in networks if network.values.get("name") == name]
    if len(found) != 1:
        names = [printable(str(network.values.get("name"))) for network in networks] or ["none"]
        has = f"has {len(found)} networks {printable(name)}, not one; it has {', '.join(names)}"
        raise Error(f"{variable}: {path} {has}")
    return found[0]


def parse_ranges(ipam: Section) -> list[tuple[Subnet, Prefixed, bool]]:
    """Return of each range that an ipam names, in one of three ways, the subnet, its gateway, by custom the first
    address, and whether that is said.  Raise Error."""
    import ipaddress

    ranges = []
    alternatives = ipam.each("ranges", Section.sections)
    for entry in (ipam, *sum(alternatives, []), *ipam.sections("addresses")):
        network = entry.text("subnet", "") or entry.text("address", "")
        gateway = entry.text("gateway", "")
        try:
            if network:
                subnet = ipaddress.ip_network(network, strict=False)
                first = ipaddress.ip_interface(f"{gateway or subnet.network_address + 1}/{subnet.prefixlen}")
                if first.version != subnet.version:
                    raise ValueError(f"{gateway} is no gateway of {subnet}")
                ranges.append((subnet, first, bool(gateway)))
        except ValueError as error:
            entry.refuse(f"cannot be understood: {error}")
    return ranges


def parse_address(text: str, network: Network) -> Prefixed:
    """Return a static address of NETCONF, with its subnet's prefix where none is given.  Raise Error."""
    import ipaddress

    try:
        address = ipaddress.ip_interface(text.strip())
    except ValueError:
        raise Error(f"network {network.name}: {printable(text)} is not an IP address") from None
    subnets = [subnet for subnet, *_ in network.ranges if subnet.version == address.version]
    around = [subnet for subnet in subnets if address.ip in subnet]
    if subnets and not around:
        raise Error(f"network {network.name}: the address {address.ip} is not in {', '.join(map(str, subnets))}")
    if "/" in text:
        return address
    if not around:
        raise Error(f"network {network.name} has no subnet: give {address.ip} with its prefix, such as /24")
    return ipaddress.ip_interface(f"{address.ip}/{around[0].prefixlen}")


def bandwidth_rate(plugins: list[Section]) -> str:
    """Return what the bandwidth plugin in a chain lets the VM send, as netback wants it, or ""."""
    for plugin in plugins[1:]:
        if plugin.text("type") == "bandwidth":
            limits = plugin.section("runtimeConfig").section("bandwidth")
            bits = limits.number("egressRate", plugin.number("egressRate", 0))
            return parse_rate(f"{bits}b/s") if bits else ""
    return ""


def lower_rate(*rates: str) -> str:
    """Return the lowest of some rates as netback wants them, of which "" is none."""

    def speed(rate: str) -> float:
        size, microseconds = rate.split(",")
        return int(size) / int(microseconds)

    return min(filter(None, rates), key=speed, default="")


def check_dns(dns: Section) -> JsonObject:
    """Return a dns object of CNI's.  Raise Error."""
    words = [dns.text("domain", "")]
    for key in ("nameservers", "search", "options"):
        words += dns.texts(key)
    if not all(word.isprintable() for word in words):
        dns.refuse("must hold words for a line of resolv.conf")
    return dns.values


def resolv_conf(dns: JsonObject) -> str:
    """Return the text of resolv.conf(5) for a dns object of CNI's, "" where it says nothing."""
    lines = [f"nameserver {server}" for server in dns.get("nameservers") or ()]
    if dns.get("domain"):
        lines.append(f"domain {dns['domain']}")
    lines += [f"{key} {' '.join(dns[key])}" for key in ("search", "options") if dns.get(key)]
    return "".join(line + "\n" for line in lines)


# ---- what is to be done: runX makes a bridge's port by itself, and has plugins do what it cannot

# what only the bridge plugin does; the former concern addresses that it has given itself
BRIDGE_LAYER_3 = ("isGateway", "isDefaultGateway", "ipMasq", "enabledad")
BRIDGE_LAYER_2 = ("vlan", "vlanTrunk", "hairpinMode", "promiscMode", "macspoofchk", "portIsolation",
                  "disableContainerInterface")  # fmt: skip


def plan_attachment(network: Network, number: int, container: Container, log: Log) -> Attachment:
    """Return the container's Attachment of that number, not made yet.  Raise Error."""
    attachment = Attachment(
        network=network.name,
        identity=container.state.name.replace("+", "_"),
        interface=f"eth{number}",
        namespace=container.path("netns"),
        mac=stable_mac(container.folder, number),
        mtu=network.mtu,
        rate=lower_rate(container.state.rate, network.rate),
        dhcp=network.dhcp,
        addresses=list(map(str, network.addresses)),
        gateways=[str(gateway.ip) for _, gateway, is_said in network.ranges if is_said],
        dns=network.dns,
    )
    plan_calls(attachment, network, log)
    if network.version == CNI_VERSIONS[-1]:
        negotiate_version(attachment)
    return attachment


def plan_calls(attachment: Attachment, network: Network, log: Log) -> None:
    """Say in an Attachment which plugins are executed, and what is known without them.  Raise Error."""
    by_plugins = needs_plugins(network, log)
    if network.bridge:
        prepare_bridge(network, by_plugins)
    if by_plugins:
        attachment.calls = [[plugin["type"], plugin_configuration(network, plugin)] for plugin in network.plugins]
        return
    attachment.bridge, first = network.bridge, network.plugins[0]
    if network.dhcp:
        return
    if network.ipam and find_plugin(network.ipam):  # which reserves an address
        attachment.calls = [[network.ipam, plugin_configuration(network, first)]]
    elif not network.addresses:
        remedy = f"install it in {CNI_PATH}"
        raise Error(f"network {network.name}: no address without the CNI plugin {network.ipam}: {remedy}")
    else:
        log.warn(f"network {network.name}: no CNI plugin reserves {', '.join(attachment.addresses)}")
        use_result(attachment, {"routes": (first.get("ipam") or {}).get("routes")}, network)


def stable_mac(*identity: str | int) -> str:
    """Return a locally administered unicast address (IEEE 802), the same for the same host, container and interface."""
    import hashlib

    try:
        host = read_file("/etc/machine-id")
    except OSError:
        host = ""
    digest = hashlib.blake2s(repr((host, *identity)).encode()).digest()
    return bytes([digest[0] & 0xFC | 2, *digest[1:6]]).hex(":")


def needs_plugins(network: Network, log: Log) -> bool:
    """Return whether the network's plugins make the interface, and not runX by itself."""
    chained = {plugin["type"] for plugin in network.plugins[1:]}
    if "bandwidth" in chained and not find_plugin("bandwidth"):
        chained.discard("bandwidth")  # netback can do that too, for what the VM sends
        if any(plugin.get("ingressRate") for plugin in network.plugins):
            log.warn(f"network {network.name}: ingressRate has no effect without the CNI plugin bandwidth")
    if not network.bridge or chained:
        return True
    keys = BRIDGE_LAYER_2 if network.dhcp else BRIDGE_LAYER_2 + BRIDGE_LAYER_3
    wanted = [key for key in keys if network.plugins[0].get(key)]
    if not wanted or find_plugin("bridge"):
        return bool(wanted)
    lost = ", ".join(key for key in wanted if not key.endswith("Gateway"))
    if lost:
        log.warn(f"network {network.name}: {lost} have no effect without the CNI plugin bridge")
    return False


def plugin_configuration(network: Network, plugin: JsonObject) -> JsonObject:
    """What a plugin gets on standard input: SPEC.md "Deriving execution configuration from plugin configuration"."""
    configuration = {**plugin, "name": network.name, "cniVersion": network.version}
    configuration.pop("capabilities", None)  # what it could take in runtimeConfig, and nobody gives
    if network.dhcp and plugin is network.plugins[0]:
        configuration["ipam"] = {}  # the VM asks for its address by itself
    if network.addresses:
        ips = [str(each) for each in network.addresses]
        if network.ipam == "host-local":  # which took no prefix before 0.9
            ips = [str(each.ip) for each in network.addresses]
        args = configuration.get("args") or {}
        cni = args.get("cni") or {}
        configuration["args"] = {**args, "cni": {**cni, "ips": ips}}
    return configuration


def prepare_bridge(network: Network, by_plugins: bool) -> None:
    """Make the bridge if it is missing and the network begins on this host, which is its gateway.  by_plugins: but for
    a gateway that it never makes, that is left to the bridge plugin, which knows of VLANs.  Raise Error."""
    first, name, netlink = network.plugins[0], network.bridge, Rtnetlink()
    ours = first.get("isGateway") or first.get("isDefaultGateway")
    with Attempt(f"make the bridge {printable(name)} of network {network.name}"):
        bridge = netlink.find_link(name)
        if not bridge and not ours:
            remedy = f"make it, or set isGateway in {network.file} for a network that begins there"
            raise Error(f"network {network.name}: there is no bridge {printable(name)} on this host: {remedy}")
        if by_plugins and (not network.dhcp or first.get("vlan") or first.get("vlanTrunk")):
            return
        if not bridge:
            kind = {IFLA_IFNAME: name, IFLA_LINKINFO: {IFLA_INFO_KIND: "bridge"}}
            netlink.request(link_message(0, kind), NLM_F_CREATE)
            bridge = netlink.link(name)
        if ours:
            netlink.set_link(bridge.index, {}, up=True)
            for _, address, _ in network.ranges:
                netlink.request(address_message(address, bridge.index), NLM_F_CREATE | NLM_F_REPLACE)


def find_plugin(name: str) -> str | None:
    """Return the path of a CNI plugin."""
    paths = (os.path.join(folder, name) for folder in CNI_PATH.split(":"))
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def attach_network(attachment: Attachment, network: Network) -> None:
    """Execute the plugins of an Attachment, and put what they say into it.  Raise Error."""
    for plugin, configuration in attachment.calls:
        output = call_plugin("ADD", attachment, plugin, configuration)
        try:
            attachment.result = {**check_document(parse_json(output))}
        except (ValueError, TypeError):
            raise Error(f"network {network.name}: the CNI plugin {plugin} has not printed a result") from None
    if attachment.result and attachment.bridge:
        use_result(attachment, attachment.result, network)
    elif attachment.result:
        attachment.dns = result_dns(attachment.result, network) or attachment.dns


def negotiate_version(attachment: Attachment) -> None:
    """Have the plugins of an Attachment called in the newest version of CNI that all of them know.  Raise Error."""
    known = set(CNI_VERSIONS)
    for plugin, _ in attachment.calls:
        output = call_plugin("VERSION", attachment, plugin, {"cniVersion": CNI_VERSIONS[-1]})
        try:
            known &= set(parse_json(output)["supportedVersions"])
        except (ValueError, TypeError, KeyError):
            raise Error(f"network {attachment.network}: the CNI plugin {plugin} does not tell its versions") from None
    for _, configuration in attachment.calls:
        configuration["cniVersion"] = max(known, key=CNI_VERSIONS.index, default=CNI_VERSIONS[-1])


def detach_network(fields: JsonObject, log: Log) -> None:
    """Give back what attach_network() has got; what fails is a warning.  fields: the Attachment's."""
    attachment = Attachment(**fields)
    for plugin, configuration in reversed(attachment.calls):
        what = f"give back the network {attachment.network}"
        log.attempt(what, call_plugin, "DEL", attachment, plugin, configuration)


def call_plugin(command: str, attachment: Attachment, plugin: str, configuration: JsonObject) -> str:
    """Return what a plugin prints: SPEC.md "Execution Protocol".  Raise Error with the plugin's own reason."""
    what, path = f"network {attachment.network}: CNI plugin {plugin}", find_plugin(plugin)
    if not path:
        raise Error(f"{what} is not installed in {CNI_PATH}")
    if attachment.result is not None:
        configuration = {**configuration, "prevResult": attachment.result}
    env = {
        **os.environ,
        "PATH": PATH,
        "CNI_PATH": CNI_PATH,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.identity,
        "CNI_NETNS": attachment.namespace,
        "CNI_IFNAME": attachment.interface,
        "CNI_ARGS": f"IgnoreUnknown=1;MAC={attachment.mac}",
    }
    reason, *outputs = run_program([path], path, env, json_text(configuration).encode(), CNI_TIME_LIMIT)
    output, errors = (data.decode("utf-8", "replace") for data in outputs)
    if reason:
        raise Error(f"{what}, {command}: {printable(plugin_error(output) or f'{reason} {errors}')}")
    return output


def plugin_error(output: str) -> str:
    """Return what a plugin says in SPEC.md's "Error" type, "" where that is none."""
    try:
        error = parse_json(output)
        words = [str(error[key]) for key in ("msg", "details") if error.get(key)]
        return f"{': '.join(words)} (code {error['code']})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""


def use_result(attachment: Attachment, result: JsonObject, network: Network) -> None:
    """Put what the IPAM plugin has said, or the file, into the Attachment of a bridge's port.  Raise Error."""
    import ipaddress

    what = f"understand the addresses and routes of network {network.name}"
    with Attempt(what, ValueError, TypeError, KeyError, AttributeError):
        old = [result[key] for key in ("ip4", "ip6") if result.get(key)]  # before 0.3.0
        ips = result.get("ips") or [{"address": each["ip"], **each} for each in old]
        routes = result.get("routes") or [route for each in ips for route in each.get("routes") or ()]
        if not attachment.addresses:
            attachment.addresses = [str(ipaddress.ip_interface(each["address"])) for each in ips]
        gateways = [ipaddress.ip_address(each["gateway"]) for each in ips if each.get("gateway")]
        if not ips:
            gateways = [gateway.ip for _, gateway, _ in network.ranges]
        first = {gateway.version: str(gateway) for gateway in reversed(gateways)}
        versions = {ipaddress.ip_interface(address).version for address in attachment.addresses}
        attachment.routes = []
        for route in routes:
            destination = ipaddress.ip_network(route["dst"], strict=False)
            if destination.version in versions and route.get("table") in (None, 0, RT_TABLE_MAIN):
                section = Section(route, f"network {network.name}: the route to {destination}", ": ")
                numbers = {key: section.unsigned(key, bits) for key, bits in ROUTE_NUMBERS.items() if route.get(key)}
                gateway = route.get("gw")
                if numbers.get("scope", 0) < RT_SCOPE_LINK:  # else it goes by none
                    gateway = gateway or first.get(destination.version)
                way = str(ipaddress.ip_address(gateway)) if gateway else ""
                attachment.routes.append([str(destination), way, numbers])
    attachment.dns = attachment.dns or result_dns(result, network)
    if network.plugins[0].get("isDefaultGateway"):
        attachment.gateways += first.values()


def result_dns(result: JsonObject, network: Network) -> JsonObject:
    return check_dns(Section(result, f"network {network.name}", ": ").section("dns"))


# ==== vif ================================================================================================
# The VM's network interfaces: what each is like, its backend in dom0 (netback: xen/include/public/io/netif.h), where
# that is joined to, and what the guest is told.  What is known when `create` ends is plugged then; engines fill a
# namespace until `start`, which plugs what is new, unplugs what has gone, and tells the guest of all.

VIF_TIME_LIMIT = 40  # seconds that netback has to make a vif, as libxl gives its hotplug scripts
GUEST_NODE_MAX = 3500  # bytes in a node for the guest, which reads 4096 at once (XENSTORE_PAYLOAD_MAX)
HOTPLUG_SCRIPT = "/bin/true"  # for an `xl destroy` by hand; nothing else runs it
IPV6_SETTINGS = ("disable_ipv6", "accept_ra")  # of net.ipv6.conf.<name>, taken over from a namespace


class Interface:
    """One of the VM's.  The messages are for the guest, without the number that it has there."""

    def __init__(self, name: str, mac: str, mtu: int) -> None:
        self.name = name
        self.mac = mac  # in hexadecimal; by it the VM finds the interface
        self.own_mac = ""  # that it then gets, where another one of the VM's has that too
        self.mtu = mtu  # 0: the bridge's
        self.addresses: list[Message] = []
        self.routes: list[Message] = []
        self.neighbours: list[Message] = []  # permanent ones
        self.ipv6: dict[str, str] = {}  # IPV6_SETTINGS
        self.dhcp, self.rate = False, ""
        self.bridge = ""  # of which the vif becomes a port, or
        self.namespace = ""  # path of a network namespace, whose
        self.device, self.index = "", 0  # link, and its number, it is joined to
        self.filters = False  # see Link: what groups the guest is in, dom0 does not know


def route_message(
    destination: Subnet, gateway: Address | None, addresses: Sequence[Prefixed], numbers: Mapping[str, int] = {}
) -> Message:
    """gateway: None, or one that is on the link even if it is in no network of addresses.  numbers: ROUTE_NUMBERS."""
    found: Attributes = {}
    if "priority" in numbers:
        found[RTA_PRIORITY] = numbers["priority"]
    metrics = {"mtu": RTAX_MTU, "advmss": RTAX_ADVMSS}
    if wanted := {metric: numbers[key] for key, metric in metrics.items() if key in numbers}:
        found[RTA_METRICS] = wanted
    scope, flags = RT_SCOPE_LINK, 0
    length = destination.prefixlen
    if length:
        found[RTA_DST] = destination.network_address.packed
    if gateway:
        found[RTA_GATEWAY] = gateway.packed
        scope = RT_SCOPE_UNIVERSE
        if not any(gateway in address.network for address in addresses):
            flags = RTNH_F_ONLINK
    kind = (RT_TABLE_MAIN, RTPROT_STATIC, numbers.get("scope", scope), RTN_UNICAST)
    return Message(RTM_NEWROUTE, (family_of(destination), length, 0, 0, *kind, flags), found)


# ---- what there is in a network namespace


def namespace_interfaces(path: str, log: Log) -> Iterator[Interface]:
    """Yield the Interfaces of a network namespace, as they are now.  Raise Error."""
    with Attempt(f"read the network namespace {path}"):
        netlink = Rtnetlink(path)
        links = netlink.links()  # first: what an engine adds now has its addresses and routes later
        addresses, routes, neighbours = map(netlink.dump, (RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH))
        if any(each.head[4] == RT_TABLE_MAIN and RTA_MULTIPATH in each.attributes for each in routes):
            log.warn("a route by several gateways stays outside the VM: make it several routes of one gateway each")
        for link in links:
            interface = Interface(link.name, link.mac.hex(), link.mtu)
            interface.addresses = list(link_addresses(addresses, link.index))
            if link.name == "lo" or not (link.up or interface.addresses):
                continue
            if link.type != ARPHRD_ETHER:
                log.warn(f"the interface {link.name} is none of Ethernet and stays outside the VM")
                continue
            interface.routes = list(link_routes(routes, link.index))
            interface.neighbours = list(link_neighbours(neighbours, link.index))
            interface.ipv6 = in_namespace(path, read_ipv6_settings, link.name)
            interface.namespace, interface.device, interface.index = path, link.name, link.index
            interface.filters = link.filters
            yield interface


def link_addresses(addresses: list[Message], index: int) -> Iterator[Message]:
    """Yield those of a link, without what a router has advertised: that the guest hears by itself.  Their subnets are
    no routes: what is one, link_routes() says."""
    for message in addresses:
        family, length, flags, scope, link = message.head
        is_ipv6 = family == AF_INET6
        if link != index or not (family == AF_INET or (is_ipv6 and flags & IFA_F_PERMANENT)):
            continue
        kept = kept_attributes(message, IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST)
        kept[IFA_FLAGS] = IFA_F_NODAD if is_ipv6 else 0
        if not is_ipv6 or scope == RT_SCOPE_UNIVERSE:
            kept[IFA_FLAGS] |= IFA_F_NOPREFIXROUTE
        yield Message(RTM_NEWADDR, (family, length, 0, scope, 0), kept)


def link_routes(routes: list[Message], index: int) -> Iterator[Message]:
    """Yield those through a link, without what the guest's kernel has by itself."""
    for message in routes:
        family, *_, table, protocol, _, kind, flags = message.head
        values = message.attributes
        if values.get(RTA_OIF) != struct.pack("=I", index) or family not in (AF_INET, AF_INET6):
            continue
        if (table, kind) != (RT_TABLE_MAIN, RTN_UNICAST) or protocol == RTPROT_RA:
            continue
        if family == AF_INET6 and values.get(RTA_DST, b"").startswith(b"\xfe\x80"):
            continue
        # the other flags are states of a link, such as that its cable is out
        head = (*message.head[:8], flags & RTNH_F_ONLINK)
        kinds = (RTA_DST, RTA_SRC, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_VIA)
        yield Message(RTM_NEWROUTE, head, kept_attributes(message, *kinds))


def link_neighbours(neighbours: list[Message], index: int) -> Iterator[Message]:
    """Yield the permanent ones on a link."""
    for message in neighbours:
        family, link, state, _, _ = message.head
        kept = kept_attributes(message, NDA_DST, NDA_LLADDR)
        if link == index and state & NUD_PERMANENT and NDA_LLADDR in kept:
            yield Message(RTM_NEWNEIGH, (family, 0, NUD_PERMANENT, 0, 0), kept)


def kept_attributes(message: Message, *kinds: int) -> Attributes:
    return {kind: value for kind, value in message.attributes.items() if kind in kinds}


def read_ipv6_settings(device: str) -> dict[str, str]:
    """Return IPV6_SETTINGS of a link in our namespace, {} where dom0 has no IPv6."""
    folder = f"/proc/sys/net/ipv6/conf/{device}"
    return {key: read_file(f"{folder}/{key}") for key in IPV6_SETTINGS if os.path.exists(folder)}


# ---- what the VM gets


def find_interfaces(container: Container, taken: int, log: Log) -> list[Interface]:
    """Return all Interfaces of a container's VM, in order, beside as many as are taken: eth0, eth1, …  Raise Error."""
    state, found = container.state, []
    if state.namespace is not None:
        inside = namespace_interfaces(f"/proc/{state.pid}/ns/net", log)
        # netback's are the VM's own, or of a pod's last one, of which dom0's kernel is about to make an end
        found = [each for each in inside if not each.device.startswith("vif")]
    names = {f"eth{number}" for number in range(taken)}
    for interface in found:
        interface.rate = state.rate
        if interface.name in names:
            raise Error(f"the VM has an {interface.name} of xl's settings, and one of the engine's network namespace")
    names |= {interface.name for interface in found}
    possible = [f"eth{number}" for number in range(len(names) + len(state.networks))]
    free = [name for name in possible if name not in names]
    for fields, name in zip(state.networks, free):
        interface = attachment_interface(Attachment(**fields), log)
        interface.name = name
        found.append(interface)
    # eth0, eth1, …, and then those with other names
    found.sort(key=lambda each: (not each.name.startswith("eth"), len(each.name), each.name))
    by_mac: dict[str, str] = {}
    for interface in found:
        if other := by_mac.get(interface.mac):  # as vlan and ipvlan make them on one link
            if state.own_init:
                mac = bytes.fromhex(interface.mac).hex(":")
                reason = "and the system of its own that it boots cannot tell them apart: give one of them another"
                raise Error(f"the VM's {other} and {interface.name} have one MAC address, {mac}, {reason}")
            interface.own_mac = interface.mac
            interface.mac = stable_mac(container.folder, interface.name).replace(":", "")
        by_mac[interface.mac] = interface.name
    return found


def attachment_interface(attachment: Attachment, log: Log) -> Interface:
    """Return the Interface of a network that NETCONF names.  Raise Error."""
    import ipaddress

    if attachment.bridge:  # it becomes a port of that
        interface = Interface("", attachment.mac.replace(":", ""), attachment.mtu)
        interface.bridge = attachment.bridge
        interface.ipv6 = {} if attachment.dhcp else {"accept_ra": "0"}
    else:
        inside = namespace_interfaces(attachment.namespace, log)
        made = next((each for each in inside if each.device == attachment.interface), None)
        if not made:
            reason = f"its plugins have made no interface {attachment.interface} that is up"
            raise Error(f"network {attachment.network}: {reason}")
        interface = made
    interface.dhcp, interface.rate = attachment.dhcp, attachment.rate
    addresses = [ipaddress.ip_interface(address) for address in attachment.addresses]
    for address in addresses:
        if not any(address.packed in message.attributes.values() for message in interface.addresses):
            interface.addresses.append(address_message(address))  # which no plugin has set
    for destination, way, *numbers in attachment.routes:
        gateway = ipaddress.ip_address(way) if way else None
        interface.routes.append(route_message(ipaddress.ip_network(destination), gateway, addresses, *numbers))
    families = {message.head[0] for message in interface.addresses}
    places = [(message.attributes[IFA_ADDRESS], message.head[1]) for message in interface.addresses]
    subnets = [ipaddress.ip_network(place, strict=False) for place in places]
    gateways = list(map(ipaddress.ip_address, attachment.gateways))
    # first the one of an address that a plugin has chosen in one of several subnets
    for gateway in sorted(gateways, key=lambda each: not any(each in subnet for subnet in subnets)):
        family = family_of(gateway)
        if family in families and not any(route.head[:2] == (family, 0) for route in interface.routes):
            everything = ipaddress.ip_network("0.0.0.0/0" if family == AF_INET else "::/0")
            interface.routes.append(route_message(everything, gateway, addresses))
    return interface


def may_have_interfaces(state: State) -> bool:
    """Return whether a VM has network interfaces, or may get some: a look at an empty namespace takes no netlink."""
    if state.networks or any(kind == "vif" for kind, _ in state.devices):
        return True
    try:
        links = read_file(f"/proc/{state.pid}/net/dev").splitlines()[2:] if state.namespace is not None else []
        return any(line.split(":")[0].strip() != "lo" for line in links)
    except OSError:
        return True  # to read the namespace tells why


class Vif(Record):
    """A network interface that a VM has got, kept in the state, so that who comes later knows what it is joined to."""

    number: int  # -1: not known, a runX before 0.2 has plugged it
    mac: str  # "": not known, or it may be joined or not: who comes later takes it away, and with it what is there
    mtu: int
    namespace: str  # path of the network namespace, whose
    device: str  # link, and its number, it is joined to; "" for a port of a bridge
    index: int  # 0: not known, as the number
    filters: bool = False  # see Link: it does again without the vif


def plug(container: Container, undo: Undo) -> dict[str, str]:
    """Give a VM the interfaces that it has not got yet, and take away those that are gone.  Return what the guest is
    told of all: nodes below its own, {} if it has none.  Raise Error, NotRunning if the VM has ended."""
    state = container.state
    if state.is_sandbox or not may_have_interfaces(state):
        return {}
    domain = container.domain()
    ours = {number for kind, number in state.devices if kind == "vif"}
    others = set(map(int, domain.xenstore.list(f"/libxl/{domain.domid}/device/vif"))) - ours  # of xl's settings
    interfaces = find_interfaces(container, len(others), undo.log)
    wanted = {interface.mac: interface for interface in interfaces}
    plugged = [Vif(**fields) for fields in state.plugged]
    kept = {vif.mac: vif for vif in plugged if vif.mac in wanted}
    for number in (ours | {vif.number for vif in plugged}) - {vif.number for vif in kept.values()}:
        unplug(container, Device(domain, "vif", number))
    for mac, vif in kept.items():
        interface = wanted[mac]
        interface.mtu, interface.filters = interface.mtu or vif.mtu, interface.filters or vif.filters
        if (interface.mtu, interface.device, interface.index) != (vif.mtu, vif.device, vif.index):
            vif.mac = ""
            note_vif(container, vif)
            end_redirection(state, vif)
            join_noted(container, vif.number, interface)
    new = [interface for interface in interfaces if interface.mac not in kept]
    # never the number of one that is unplugged, also by another command: the guest may have it still
    for number, interface in enumerate(new, max(ours | others | {state.last_vif}) + 1):
        device = Device(domain, "vif", number)
        container.state.last_vif = number
        container.acquire(device)
        undo.add(f"take the interface {interface.name} away from the VM", unplug, container, device)
        announce_vif(device, interface)
        join_noted(container, number, interface)
    domain.check()
    return guest_nodes(state, interfaces)


def join_noted(container: Container, number: int, interface: Interface) -> None:
    """join() of a vif, which is noted before: whoever is killed meanwhile leaves nothing that is not undone later."""
    vif = Vif(
        number=number, mac="", mtu=interface.mtu, namespace=interface.namespace, device=interface.device,
        index=interface.index, filters=interface.filters,
    )  # fmt: skip
    before = container.state.plugged
    note_vif(container, vif)
    try:
        join(interface, f"vif{container.state.domid}.{number}")
    except Error:
        container.save(plugged=before)  # join() has left nothing: a classifier that is there is somebody else's
        raise
    vif.mac, vif.mtu = interface.mac, interface.mtu
    note_vif(container, vif)


def note_vif(container: Container, vif: Vif) -> None:
    """Store what a vif is joined to, or without its MAC address, may be joined to.  Raise Error."""
    others = [each for each in container.state.plugged if each["number"] != vif.number]
    container.save(plugged=[*others, {**vif.__dict__}])


def unplug(container: Container, vif: Device) -> None:
    """Take a network interface away from the VM, as far as it has got it.  Raise Error."""
    state = container.state
    for each in (Vif(**fields) for fields in state.plugged):
        if each.number == vif.number and each.device:
            end_redirection(state, each)
    state.plugged = [fields for fields in state.plugged if fields["number"] != vif.number]
    container.release(vif)


def announce_vif(vif: Device, interface: Interface) -> None:
    """Have netback make a vif, and wait until it is there.  Raise Error."""
    events, name = Rtnetlink(groups=RTMGRP_LINK), f"vif{vif.domain.domid}.{vif.number}"
    common = {"handle": str(vif.number), "mac": bytes.fromhex(interface.mac).hex(":")}
    backend = {**common, "script": HOTPLUG_SCRIPT, "hotplug-status": "connected", "type": "vif"}
    if interface.bridge:
        backend["bridge"] = interface.bridge
    if interface.rate:
        backend["rate"] = interface.rate
    vif.domain.transaction(lambda: vif.announce(backend, common))
    if not events.await_link(name, VIF_TIME_LIMIT):
        raise Error(f"dom0's kernel has not made {name} in {VIF_TIME_LIMIT} s: is its module xen-netback loaded?")


# ---- where a vif is joined to


def join(interface: Interface, vif: str) -> None:
    """Connect a vif, by its name in dom0, with the network that it is for.  Raise Error."""
    try:
        if interface.bridge:
            join_bridge(interface, vif)
        else:
            join_namespace(interface, vif)
    except OSError as error:
        target = interface.bridge or interface.device
        reasons = {
            errno.EEXIST: f"{target} is another VM's, or something else classifies its traffic",
            errno.ENODEV: f"{target} or {vif} is gone",
            errno.ENOENT: f"{error.strerror}: is dom0's kernel without sch_ingress, cls_matchall and act_mirred?",
        }
        raise Error(f"cannot connect the VM to {target}: {reasons.get(error.errno or 0, error.strerror)}") from None


def join_bridge(interface: Interface, name: str) -> None:
    netlink = Rtnetlink()
    vif, bridge = netlink.link(name), netlink.link(interface.bridge)
    interface.mtu = interface.mtu or bridge.mtu
    make_silent(netlink, vif.index)
    netlink.set_link(vif.index, {IFLA_MTU: interface.mtu, IFLA_MASTER: bridge.index}, up=True)


def join_namespace(interface: Interface, name: str) -> None:
    """Move a vif into the namespace, if it is not there yet, and have it and the link there forward to one another."""
    netlink, outside = Rtnetlink(interface.namespace), Rtnetlink()
    if not netlink.find_link(name):
        with Descriptor(os.open(interface.namespace, os.O_RDONLY)) as namespace:
            outside.set_link(outside.link(name).index, {IFLA_NET_NS_FD: namespace})
    vif, device = netlink.link(name), netlink.link(interface.device)
    make_silent(netlink, vif.index)
    netlink.set_link(vif.index, {IFLA_MTU: interface.mtu}, up=True)
    redirect(netlink, device.index, vif.index)
    if interface.filters:  # else mDNS, VRRP and others do not reach the guest
        netlink.take_all_multicast(device.index, True)


def make_silent(netlink: Rtnetlink, index: int) -> None:
    """A vif has nothing to say by itself: no address by IPv6, and none of what comes with one."""
    try:
        netlink.set_link(index, {IFLA_AF_SPEC: {AF_INET6: {IFLA_INET6_ADDR_GEN_MODE: b"\1"}}})
    except OSError:
        pass  # dom0 has no IPv6


def end_redirects(state: State) -> None:
    """Undo what join() has made in the engine's network namespace, and of links that may outlast any other one."""
    for vif in (Vif(**fields) for fields in state.plugged):
        if vif.filters or state.namespace and vif.namespace in (state.namespace, f"/proc/{state.pid}/ns/net"):
            end_redirection(state, vif)


def end_redirection(state: State, vif: Vif) -> None:
    """Undo redirect() between a vif and the link that it is joined to, as far as they are still there."""
    ours, namespace = f"vif{state.domid}.", vif.namespace
    is_held = process_start_time(state.pid) == state.pid_start_time  # else it may be another container's by now
    if not is_held and namespace == f"/proc/{state.pid}/ns/net":
        if not state.namespace:
            return  # it ended with the holder
        namespace = state.namespace
    try:
        if not is_held and is_own_network(namespace):
            return  # the path was by a pid, of a pod's sandbox, which is another process's by now
        netlink = Rtnetlink(namespace)
        links = netlink.links()
        # by its number: it may have got another name, and another link its own
        ends = [link for link in links if (link.index == vif.index if vif.index else link.name == vif.device)]
        ends += [link for link in links if link.name == f"{ours}{vif.number}"]
        others = [link for link in links if link.name.startswith("vif") and not link.name.startswith(ours)]
        for link in ends if is_held or not others else ():
            if vif.filters and link.index == vif.index:
                netlink.take_all_multicast(link.index, False)
            end_redirect(netlink, link.index)
    except OSError:
        pass  # the engine has taken the interface or the namespace away


# ---- what the guest is told


def guest_nodes(state: State, interfaces: list[Interface]) -> dict[str, str]:
    """Return what init reads, by names of nodes: data/network/0, 1, …, and data/dhcp and data/dns."""
    texts = []
    # the guest's kernel calls them eth0, eth1, … in the order in which they have come: no name is another one's then
    for number, interface in enumerate(interfaces) if len(interfaces) > 1 else ():
        texts.append(f"{interface.mac} {link_message(0, {IFLA_IFNAME: f'runx{number}'}).for_guest(0)}")
    for interface in interfaces:
        texts += split_words(interface.mac, guest_words(interface))
    told = {f"data/network/{number}": text for number, text in enumerate(texts)}
    dhcp = [interface.name for interface in interfaces if interface.dhcp]
    if dhcp:
        told.update({"data/hostname": state.hostname, "data/dhcp": " ".join(dhcp)})
    dns = "".join(resolv_conf(fields["dns"]) for fields in state.networks).encode()
    if dns:  # whole lines: half an address is another one's
        end = dns.rfind(b"\n", 0, DNS_MAX) + 1
        told["data/dns"] = dns[:end].decode()
    return told


def split_words(mac: str, words: Iterable[str]) -> list[str]:
    """Return texts of no more than GUEST_NODE_MAX bytes, each with the MAC address that tells the interface first."""
    texts = [mac]
    for word in words:
        if len(texts[-1]) + len(word) >= GUEST_NODE_MAX:
            texts.append(mac)
        texts[-1] += f" {word}"
    return texts


def guest_words(interface: Interface) -> Iterator[str]:
    """Yield what the guest does with its interface, in order: messages and settings."""
    found: Attributes = {IFLA_IFNAME: interface.name, IFLA_MTU: interface.mtu}
    if interface.own_mac:
        found[IFLA_ADDRESS] = bytes.fromhex(interface.own_mac)
    yield link_message(0, found).for_guest(0)
    for key, value in {**interface.ipv6, "accept_dad": "0"}.items():
        yield f"sys/net/ipv6/conf/{interface.name}/{key}={value}"
    yield link_message(0, {}, up=True).for_guest(0)
    for address in interface.addresses:
        if interface.ipv6.get("disable_ipv6") != "1" or address.head[0] != AF_INET6:
            yield address.for_guest(NLM_F_CREATE | NLM_F_REPLACE)
    # first those of the link, through which gateways are reached
    for route in sorted(interface.routes, key=lambda way: RTA_GATEWAY in way.attributes or RTA_VIA in way.attributes):
        route.attributes[RTA_OIF] = 0  # the last one: see for_guest()
        # behind the one that came with an address, if a gateway is told for the same subnet; IPv6 cannot have both
        behind = NLM_F_APPEND if route.head[0] == AF_INET else 0
        yield route.for_guest(NLM_F_CREATE | behind)
    for neighbour in interface.neighbours:
        yield neighbour.for_guest(NLM_F_CREATE | NLM_F_REPLACE)


# ==== hooks ==============================================================================================
# Programs of the engine's: runtime-spec config.md "POSIX-platform Hooks".  Those of startContainer the guest runs.


def run_hooks(
    container: Container, kind: str, status: str, namespaces: Sequence[str] = (), log: Log | None = None
) -> None:
    """Run the hooks of one kind, with a state of that status, in the namespaces with these paths.  The first that fails
    is an Error, in runc's words, and the last that runs; but with a log all run, and it is a warning there."""
    for number, hook in enumerate(parse_hooks(container.state.hooks, kind)):
        state, bundle = json_text(container.public_state(status)).encode(), container.state.bundle
        env = dict(variable.partition("=")[::2] for variable in hook.env) or dict(os.environ)  # as under runc and crun
        reason, *outputs = run_program(hook.args, hook.path, env, state, hook.timeout or None, bundle, namespaces)
        if not reason:
            continue
        if reason.startswith("ran past"):
            reason = f"hook ran past specified timeout of {hook.timeout}s"
        stdout, stderr = (printable(output[:4096].decode("utf-8", "replace")) for output in outputs)
        failure = f"error running {kind} hook #{number}: {reason}, stdout: {stdout}, stderr: {stderr}"
        if not log:
            raise Error(failure)
        log.warn(failure)


# ==== holder =============================================================================================
# The process whose pid is the container's.  Engines and their tools enter its namespaces, read its cgroup, signal it
# and reap it; so it has nothing of dom0's open and does nothing but relay signals to the monitor, which is in dom0.

PR_SET_MM, PR_SET_MM_ARG_START, PR_SET_MM_ARG_END = 35, 8, 9  # <linux/prctl.h>
TITLE_MAX = 4096  # bytes of the command line that the holder shows
SHOWN: list[bytes] = []
# signals that end a container which is not started, as they end runc's init, a Go program; others do nothing to it
ENDING_SIGNALS = {*range(1, 10), 11, 15, 16, 31}


class Holder:
    """Its pid, and the monitor's end of a socket to it: it says "+" or an error, and then the signals that it gets, a
    byte each, and is told the exit status, one."""

    pid = 0
    link: Any = None

    def start(self, config: Config, share: str, exported: bool) -> None:
        """Make it, a child of our parent's, with the mount namespace that the share is in.  Raise Error."""
        with Attempt("make a pid namespace"), Descriptor(os.pidfd_open(os.getpid())) as monitor:
            args = config, share, exported, monitor
            self.pid, self.link = fork_linked("holder", (monitor,), run_holder, *args, fork=fork_sibling)

    def check(self) -> None:
        """Wait until it is in its namespaces.  Raise Error."""
        if reason := hear(self.link, "the process that holds its namespaces was killed"):
            raise Error(reason)

    def end(self, status: int) -> None:
        """Have it exit with a status, once we have ended."""
        if self.link:
            tell(self.link, bytes([status]))


def run_holder(config: Config, share: str, exported: bool, monitor: int, link: Any) -> int:
    """The holder's whole life.  monitor: a pidfd.  Return its exit status."""
    os.umask(0o022)
    os.closerange(0, 3)
    signals = relay_signals(RELAYED)
    flags = CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWUTS
    name, process = config.hostname or os.uname().nodename, config.process
    with Attempt("enter the container's namespaces"):
        if config.namespace:
            if is_own_network(config.namespace):
                raise Error(f"cannot join the network namespace {config.namespace}: it is the host's own by now")
            with Descriptor(os.open(config.namespace, os.O_RDONLY)) as fd:
                system_call("setns", fd, CLONE_NEWNET)
        else:
            flags |= CLONE_NEWNET
        system_call("unshare", flags)
        if not config.is_sandbox:  # it leaves the network to the pod's containers
            mark_namespace().detach()  # open as long as we live
        system_call("sethostname", name, len(os.fsencode(name)))
    change_root(share, config, exported)
    show_arguments(process.args if process else ["runX"])
    link.send(b"+")
    status, message = 128 + SIGKILL, b"+"  # if the monitor is killed
    while message:
        if signals in select.select([link, signals], [], [])[0]:
            tell(link, os.read(signals, 64))
        else:
            message = receive(link)
            status = message[0] if message else status
    select.select([monitor], [], [])  # who hears that we have ended finds nothing of ours
    return status


def show_arguments(args: list[str]) -> None:
    """What ps(1) shows for us is the container's process, as far as config.json tells."""
    title = b"".join(arg.encode("utf-8", "surrogateescape") + b"\0" for arg in args)[:TITLE_MAX]
    SHOWN.append(title)  # the kernel reads it as long as we live
    start = id(title) + bytes.__basicsize__ - 1  # where CPython keeps the content
    try:
        system_call("prctl", PR_SET_MM, PR_SET_MM_ARG_START, start, 0, 0)
        system_call("prctl", PR_SET_MM, PR_SET_MM_ARG_END, start + len(title), 0, 0)
    except OSError:
        pass  # a kernel without it shows runX


def relay_signals(numbers: Iterable[int]) -> int:
    """The descriptor from which these signals arrive, a byte each."""
    signal = import_core("signal")
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reader


# ==== builder ============================================================================================
# What the monitor does first: it makes the domain, and what that needs on dom0.

# quiet: hvc0 is for what went wrong.  panic=-1: end at once, and be seen ending.
KERNEL_PARAMETERS = "console=hvc0 quiet loglevel=2 panic=-1"
OWN_INIT_PARAMETERS = "console=hvc0 panic=-1"
KERNEL_PARAMETERS_MAX = 1023  # bytes: MAX_GUEST_CMDLINE of xen/include/public/xen.h without its NUL


def lib_folder() -> str:
    """Return where kernel and initrd are: beside this module, or <prefix>/lib/runX if it is <prefix>/sbin/runX."""
    here = os.path.dirname(os.path.realpath(__file__))
    return here if os.path.basename(here) == "runX" else os.path.normpath(os.path.join(here, "../lib/runX"))


def installed_file(name: str) -> str:
    path = os.path.join(lib_folder(), name)
    if not os.path.isfile(path):
        remedy = f"build one with {name}/build.sh and install it with install.sh --{name}"
        raise Error(f"there is no {name} at {path}: {remedy}")
    return path


def command_line(machine: Machine) -> str:
    """Return the words for the VM's kernel.  Raise Error where they do not fit: Xen would cut them off silently."""
    line = " ".join([OWN_INIT_PARAMETERS if machine.own_init else KERNEL_PARAMETERS, *machine.cmdline])
    length = len(line.encode())
    if length > KERNEL_PARAMETERS_MAX:
        raise Error(f"the kernel's command line is {length} bytes long: make it {KERNEL_PARAMETERS_MAX} at most")
    return line


def vm_sizes(config: Config) -> dict[str, int]:
    """Return what the VM has at first and what it may get, by the names of xl.cfg; memory in MiB."""
    resources, machine = config.resources, config.machine
    memory, vcpus = resources.mebibytes(resources.default_memory), resources.vcpus(resources.default_vcpus)
    maxmem, maxvcpus = max(memory, machine.maxmem), max(vcpus, machine.maxvcpus)
    sizes = {"memory": memory, "maxmem": maxmem, "vcpus": vcpus, "maxvcpus": maxvcpus}
    for line in "\n".join(machine.lines).replace(";", "\n").splitlines():  # of xl.cfg: the last one counts
        key, _, value = line.partition("#")[0].partition("=")
        number = value.strip(" \t\"'")
        if key.strip() in sizes and is_number(number, 9):
            sizes[key.strip()] = int(number)
    return sizes


# ---- what a kernel of the container's own rootfs needs from there

KERNEL_MAX = 128  # MiB of dom0's memory that a kernel of an image may take while it is unpacked
BZIMAGE_HEADER = 0x250  # bytes
MODULE_MAX = 4 << 20  # bytes, also of modules.dep: the rootfs may be hostile, and dom0's memory is small
MODULES_MAX, MODULES_SIZE_MAX = 16, 16 << 20  # files, bytes of them all
FOLDERS_MAX = 100  # in PATH, to be looked into; in /lib/modules
XZ_MEMORY = 64 << 20  # bytes that `xz -9` needs, and an image may ask for 4 GiB


def check_boot_file(fd: int, name: str, memory: int, what: str) -> None:
    """Raise Error if a kernel or ramdisk does not fit into the VM's memory, in MiB, or a kernel into dom0: xl has all
    of it in memory before it finds out.  what: as of an Attempt."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        unpacked = unpacked_size(file) >> 20 if name == "kernel" else 0
    size = max(os.fstat(fd).st_size >> 20, unpacked)
    if size >= memory:
        raise Error(f"cannot {what}: {size} MiB do not fit into a VM of {memory} MiB")
    if unpacked > KERNEL_MAX:
        raise Error(f"cannot {what}: unpacked it has {unpacked} MiB, and dom0 has {KERNEL_MAX} for that")


def unpacked_size(file: BinaryIO) -> int:
    """Return the bytes that libxc sets aside to unpack a kernel, 0 if it is not packed: the number at the end of what
    is, perhaps in a bzImage (xen/tools/libs/guest, xg_dom_core.c and xg_dom_bzimageloader.c).  What is packed twice,
    only xl's own limit of memory stops."""
    header = file.read(BZIMAGE_HEADER)
    first, end = 0, os.fstat(file.fileno()).st_size
    if header[0x202:0x206] == b"HdrS" and len(header) == BZIMAGE_HEADER:
        offset, length = struct.unpack_from("<II", header, 0x248)
        first = 512 * (header[0x1F1] + 1) + offset
        end = min(end, first + length)
    elif not header.startswith(b"\x1f\x8b"):
        return 0
    if end - first < 4:
        return 0  # nothing that could be unpacked
    return int.from_bytes(os.pread(file.fileno(), 4, end - 4), "little")


def kernel_modules(root: str, kernel: str, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return (file name, content) of those wanted for a kernel from root, in the order to load; the others it should
    have built in.  Their folder in /lib/modules has the name that the kernel's ends with, or is the only one."""
    try:
        with open_in_root(root, "/lib/modules", os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as entries:
            folder = [entry.name for _, entry in zip(range(FOLDERS_MAX), entries)]
    except OSError:
        return []
    names = [name for name in folder if os.path.basename(kernel).endswith(f"-{name}")] or folder
    if len(names) != 1:
        return []
    base = f"/lib/modules/{names[0]}"
    dependencies = {}
    for line in io.BytesIO(read_in_root(root, f"{base}/modules.dep", MODULE_MAX)):  # no list of all that it names
        module, _, needed = line.partition(b":")
        name = module.rpartition(b"/")[2].partition(b".ko")[0].replace(b"-", b"_").decode("latin-1")
        if name in wanted:
            words = [*reversed(needed.split(None, MODULES_MAX)), module]
            dependencies[name] = [word.decode("utf-8", "replace") for word in words]
    paths = list(dict.fromkeys(path for name in wanted for path in dependencies.get(name, ())))
    purpose = f"the container's {base}/modules.dep names, for {' and '.join(wanted)}, more than"
    if len(paths) > MODULES_MAX:
        raise Error(f"{purpose} {MODULES_MAX} modules")
    found = []
    for path in paths:
        found.append(load_module(root, f"{base}/{path}"))
        if sum(len(content) for _, content in found) > MODULES_SIZE_MAX:
            raise Error(f"{purpose} {MODULES_SIZE_MAX >> 20} MiB of modules")
    return found


def load_module(root: str, path: str) -> tuple[str, bytes]:
    """Return a module's name and content."""
    data = read_in_root(root, path, MODULE_MAX)
    name, _, packing = os.path.basename(path).rpartition(".ko")
    with Attempt(f"unpack the kernel module {path} of the container", Exception):  # lzma's, zlib's or MemoryError too
        if packing == ".xz":
            import lzma

            data = lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress(data, MODULE_MAX)
        elif packing == ".gz":
            import zlib

            data = zlib.decompressobj(31).decompress(data, MODULE_MAX)
        elif packing:
            raise ValueError("use .ko, .ko.xz or .ko.gz")
    return f"{name}.ko", data


def check_executable(root: str, process: Process, mounts: list[Mount]) -> None:
    """Find process.args[0] in root as the guest will, unless a mount may cover it.  Raise Error in runc's words."""
    covered, _ = mount_places(root, mounts)
    name = process.args[0]
    by_path, reason = "/" not in name, "executable file not found in $PATH"
    path = next((value[5:] for value in process.env if value.startswith("PATH=")), "")
    if path.count(":") > FOLDERS_MAX:
        return  # to look into each, behind links perhaps, could take minutes
    for folder in (path.split(":") if path else []) if by_path else [""]:
        candidate = os.path.join(process.cwd, folder, name)
        try:
            if resolve_in_root(root, candidate, covered) in covered:
                return
            with open_in_root(root, candidate) as fd:
                mode = os.fstat(fd).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return  # such as a kernel without openat2(2)
            reason = reason if by_path else f"stat {name}: {os.strerror(error.errno).lower()}"
            continue
        if stat.S_ISREG(mode) and mode & 0o111:
            if not by_path or folder.startswith("/"):
                return
            reason = "cannot run executable found relative to current directory"
            break
        reason = reason if by_path else "permission denied"
    raise Error(f'unable to start container process: exec: "{name}": {reason}')


class Builder:
    """Makes one domain."""

    def __init__(self, container: Container, config: Config, networks: list[Network], log: Log) -> None:
        self.container, self.config, self.networks, self.log = container, config, networks, log
        self.share = container.path("share")
        self.sizes = vm_sizes(config)
        self.populated = self.sizes["memory" if on_x86() else "maxmem"]  # MiB; see Domain.set_memory()
        self.xenstore: Xenstore
        self.rootfs = Rootfs()
        self.ramdisk: BinaryIO | None = None

    def prepare(self, bundle: str, systemd: bool) -> None:
        """Have on dom0 what the holder is to be in.  systemd: it makes the cgroup."""
        if not self.config.is_sandbox:
            self.xenstore = Xenstore()  # first: where it is not to be had, there is nothing to give back
        self.begin(bundle)
        os.close(self.container.lock_fd)  # who comes when create has died knows whom to wait for
        self.enter_cgroup(systemd)
        self.attach_networks()
        build_share(self.share, self.config)

    def build(self) -> Domain:
        """Return the domain."""
        xenstore = self.xenstore
        self.rootfs = choose_rootfs(self.config)
        try:
            xl_cfg = self.write_settings(*self.write_boot_files())
            xenstore.watch(("@releaseDomain", "release"))  # as soon as it is there it may end
            xenstore.read("domid")  # the watch fires once when it is made, and before this is answered
            xenstore.take_events()
            state = self.container.state
            domain = create_domain(xenstore, xl_cfg, state.uuid, self.populated, state.starts_paused)
        finally:
            self.discard_boot_files()
        disk, most = self.rootfs.disk, {key: self.sizes[key] for key in ("maxmem", "maxvcpus")}
        if disk:
            detach(self.config.rootfs)  # what `start` unmounts must not go on in this namespace
        self.container.save(domid=domain.domid, disk=disk and disk.__dict__, **most)
        if self.populated > self.sizes["memory"]:
            domain.set_memory(self.sizes["memory"])
        xenstore.watch_one_end(domain.domid)
        return domain

    def begin(self, bundle: str) -> None:
        """Write down what is to be given back, before there is any of it."""
        container, config, uuid = self.container, self.config, new_uuid()
        monitor = [os.getpid(), process_start_time(os.getpid())]
        devices = [each for each in STANDARD_DEVICES if each[0] in ("console", config.machine.share_device)]
        container.save(
            oci_version=config.oci_version, bundle=bundle, rootfs=config.rootfs, created=timestamp(),
            annotations=config.annotations, hooks=config.hooks, hostname=config.hostname or container.id[:63],
            startable=bool(config.process), own_init=config.machine.own_init,
            starts_paused=config.machine.own_init, is_sandbox=config.is_sandbox, uuid=uuid,
            # the uuid tells apart what has the same id in another root, or is still being destroyed
            name=f"runx-{container.id[:64]}-{uuid[:8]}",
            # until there is a holder, the monitor stands for it
            boot=boot_id(), monitor=monitor, pid=monitor[0], pid_start_time=monitor[1], devices=devices,
            namespace=config.namespace, rate=config.rate, resources=config.raw_resources, base=config.base,
        )  # fmt: skip
        os.mkfifo(container.path("control"), 0o600)  # says, as long as it is there, that something may be left

    def enter_cgroup(self, systemd: bool) -> None:
        """Have us and what we start in the container's cgroup, if it has one; noted before it is made."""
        path, resources, scope = self.config.cgroup, self.config.resources, None
        if not path:
            return
        if systemd:
            scope, path = start_scope(path, resources)
        try:
            cgroups = find_cgroups(path, bool(scope))
            self.container.save(cgroups=cgroups)
            make_cgroups(cgroups, resources)
            join_cgroups(cgroups)
            check_devices(path, cgroups)
        finally:
            if scope:
                scope.communicate()  # which ends it

    def attach_networks(self) -> None:
        """Have each network of NETCONF made or reserved, by its plugins; kept in the state before it is done."""
        container = self.container
        for number, network in enumerate(self.networks):
            attachment = plan_attachment(network, number, container, self.log)
            container.save(networks=[*container.state.networks, attachment.__dict__])
            if attachment.calls and not attachment.bridge and not os.path.exists(attachment.namespace):
                make_namespace(attachment.namespace)
            try:
                attach_network(attachment, network)
            finally:  # some plugins give back only what the result names, also that of half a chain
                container.save()  # the attachment that is there already

    def write_boot_files(self) -> tuple[str, str]:
        """Return the paths of kernel and ramdisk; the latter is "" where a system of the VM's own needs none."""
        machine = self.config.machine
        kernel = self.boot_file("kernel", machine.kernel)
        if not machine.own_init:
            return kernel, self.write_ramdisk(installed_file("initrd"))
        return kernel, self.boot_file("initrd", machine.ramdisk) if machine.ramdisk else ""

    def boot_file(self, name: str, source: tuple[str, bool] | None) -> str:
        """Return the path that xl gets: ours, dom0's, or a mount of one in the rootfs, on a name without surprises."""
        if source is None:
            return installed_file(name)
        path, in_rootfs = source
        if not in_rootfs:
            return path
        what = f"boot {path} of the container"
        target = self.container.path(name)
        with open_file_in_root(self.config.rootfs, path, what) as fd:
            check_boot_file(fd, name, self.sizes["memory"], what)
            make_empty(target, folder=False)
            mount(f"/proc/self/fd/{fd}", target, MS_BIND)
        return target

    def write_ramdisk(self, base: str) -> str:
        """Write the container's archive, and base, the path of ours.  Return the path that xl gets."""
        config = self.config
        if config.process and os.path.isdir(config.rootfs):
            check_executable(config.rootfs, config.process, config.mounts)
        if self.rootfs.disk:
            detach(os.path.join(self.share, "rootfs"))
        state = json_text({**self.container.public_state("created"), "pid": 1})  # for startContainer hooks, in the VM
        with Attempt("write the container's ramdisk"):
            self.ramdisk, path = self.rootfs.open_ramdisk(self.container)
            capabilities: dict[str, bytes] = {}
            if self.rootfs.in_memory:
                capabilities = pack_share(self.ramdisk, self.share, self.sizes["memory"])
            guest = guest_config(config, state, capabilities)
            entries: list[Entry] = [
                ("container", stat.S_IFDIR | 0o700, b"", 0),
                ("container/config", stat.S_IFREG | 0o600, guest, 0),
            ]
            if self.rootfs.disk:
                entries.append(("container/disk", stat.S_IFREG | 0o600, self.rootfs.disk.for_guest(), 0))
            kernel, wanted = config.machine.kernel, self.rootfs.modules()  # to reach the container's files
            modules = kernel_modules(config.rootfs, kernel[0], wanted) if kernel and wanted else []
            entries += [("modules", stat.S_IFDIR | 0o700, b"", 0)] if modules else []
            for number, (name, content) in enumerate(modules):
                entries.append((f"modules/{number:02}-{name}", stat.S_IFREG | 0o600, content, 0))
            # libxc takes a file that begins as gzip for one archive, and unpacks it in vain; the kernel takes any order
            with open(base, "rb") as file:
                self.ramdisk.writelines(cpio_members(entries))
                self.ramdisk.write(file.read())
            self.ramdisk.flush()
        return path

    def write_settings(self, kernel: str, ramdisk: str) -> str:
        """Write the settings for xl.  Return their path."""
        state = self.container.state
        machine = self.config.machine
        resources = self.config.resources
        weight, cap = resources.share()
        settings: dict[str, str | int | list[str]] = {
            "name": state.name, "uuid": state.uuid, "type": machine.type or host_guest_type(),
            "kernel": kernel, "cmdline": command_line(machine), **self.sizes, "memory": self.populated,
            "cap": cap, **machine.options, "ramdisk": ramdisk, "cpu_weight": weight if resources.shares else "",
            "cpus": resources.cpus,
        }  # fmt: skip
        path = self.container.path("xl.cfg")
        write_file(path, xl_config(settings) + "".join(line + "\n" for line in machine.lines))
        return path

    def discard_boot_files(self) -> None:
        """Xen has them in memory now, if it is to; /run is memory too, and the rootfs must not stay busy."""
        try:
            if self.ramdisk:
                self.ramdisk.close()
        except OSError:
            pass  # that it could not be written has been said
        for name in ("kernel", "initrd"):
            discard(self.container.path(name))


# ==== streams ============================================================================================
# The three standard streams, or the terminal, of one process in a VM: between descriptors of ours and consoles.

ESCAPE, END = b"\x10", b"\x10\x04"  # in standard input: see initrd/streams.c.  The end of a terminal is a hang-up.


class Output:
    """From a console to a descriptor of ours, without blocking."""

    def __init__(self, console: Console | FirstConsole, fd: int) -> None:
        self.console = console
        self.fd = fd
        self.pending = b""
        self.ended = False  # the process has closed it
        self.unread = False  # who has read it is gone

    def advance(self, writable: bool) -> bool:
        """Write what is pending, and take what is next.  Return whether something was written.  What
        unblock_standard() cannot open again blocks only if others write there too: what poll(2) calls writable takes
        PIPE_BUF bytes at once, a socket more, and no console has so many."""
        writes = writable and bool(self.pending)
        if writes:
            try:
                self.pending = self.pending[os.write(self.fd, self.pending) :]
            except BlockingIOError:
                pass
            except OSError:
                self.pending, self.unread = b"", True
        self.pending = self.pending or self.console.take()
        if self.ended and not self.pending:
            close_standard(self.fd)
            self.ended = False
        return writes


class Input:
    """From descriptor 0 to a console: standard input, or what is typed at a terminal.  raw: the console's other end is
    not init, which knows escapes and an end."""

    def __init__(self, console: Console | FirstConsole, fd: int, raw: bool = False) -> None:
        self.console = console
        self.fd = fd
        self.raw = raw
        self.pending, self.open = b"", True

    def advance(self, readable: bool) -> None:
        if readable and self.open and not self.pending:
            try:
                data = os.read(self.fd, PAGE)  # more than a ring, so that the next one is at hand
            except BlockingIOError:
                return  # somebody else has taken it, such as the shell at the same terminal
            except OSError:
                data = b""  # such as the terminal of another session
            self.open = bool(data)
            self.pending = data if self.raw else data.replace(ESCAPE, ESCAPE * 2) if data else END
        self.pending = self.pending[self.console.put(self.pending) :]


class Streams:
    """Of a process in a VM; the streams have our descriptors 0, 1 and 2."""

    def __init__(self, consoles: Sequence[Console | FirstConsole], terminal: bool) -> None:
        """consoles: for input and output, and perhaps errors; to a terminal that brings why init could not open it."""
        self.terminal, self.first = terminal, consoles[0]
        for fd in () if terminal else (0, 1, 2):
            unblock_standard(fd)
        raw = isinstance(self.first, FirstConsole)
        self.outputs = [Output(console, 2 if number and not terminal else 1) for number, console in enumerate(consoles)]
        self.input = Input(self.first, 0, raw)
        self.share_a_pipe = os.path.sameopenfile(1, 2)
        self.ready = raw  # the process takes input
        self.told_unread = ""

    def interests(self) -> Iterator[tuple[int, int]]:
        """(descriptor, events of poll(2)) that advance() waits for."""
        if isinstance(self.first, FirstConsole) and not self.first.ended:
            reading = 0 if self.outputs[0].pending else select.POLLIN
            if events := reading | (select.POLLOUT if self.input.pending else 0):  # else a hang-up would end each wait
                yield self.first.fd, events
        for output in self.outputs:
            if output.pending:
                yield output.fd, select.POLLOUT
        if self.ready and self.input.open and not self.input.pending:
            yield self.input.fd, select.POLLIN

    def advance(self, ready: set[int]) -> None:
        """Move what can be moved.  ready: descriptors that poll(2) has named."""
        written = False
        for output in self.outputs:
            written = output.advance(output.fd in ready and not (written and self.share_a_pipe)) or written
        if written and self.share_a_pipe:
            self.outputs.reverse()  # the other one's turn, when the pipe is writable again
        self.input.advance(self.ready and self.input.fd in ready)

    def are_delivered(self) -> bool:
        """Whether all output is written, once the VM has ended."""
        for output in self.outputs:
            output.advance(False)
        late = isinstance(self.first, FirstConsole) and self.first.waits()
        return not late and not any(output.pending for output in self.outputs)

    def close_ended(self, streams: str) -> None:
        """streams: the numbers of those that the process has closed, in the guest's words."""
        if self.terminal:
            return  # a terminal ends in no other way than by hanging up
        for output in self.outputs:
            output.ended = output.ended or str(output.fd) in streams
        if "0" in streams and self.input.open:
            self.input.open = False
            close_standard(0)

    def window_size(self) -> str:
        """Rows and columns of the terminal, "" if the engine has hung up."""
        try:
            size = os.get_terminal_size(0)
        except OSError:
            return ""
        return f"{size.lines} {size.columns}"

    def hang_up(self) -> None:
        """The kernel tells us, as the pty's owner, that the engine has closed the terminal."""
        self.outputs[0].unread = True

    def newly_unread(self) -> str:
        """The numbers of all streams that nobody reads any more, when there is one more; else ""."""
        unread = "".join(sorted({str(output.fd) for output in self.outputs if output.unread}))
        if unread == self.told_unread:
            return ""
        self.told_unread = unread
        return unread


class Loop:
    """Carries the streams of a process of a VM, and what host and guest tell each other about it, until it has ended
    and its output is delivered.  number: the process's, of the guest protocol.  phase: "serving"; "draining", when it
    has ended and the readers of its output have until `deadline`, or for ever; "done".  deadline: when it is to have
    ended, or 0.  look_at: when to look whether the domain has ended, where xl could not tell; else 0."""

    streams: Streams

    def __init__(self, domain: Domain, number: int, consoles: int, terminal: bool, log: Log) -> None:
        """consoles: how many the process has."""
        self.domain = domain
        self.xenstore = domain.xenstore
        self.request: Callable[..., None] = domain.request
        self.number = number
        self.terminal = terminal
        self.log = log
        self.phase = "serving"
        self.deadline = self.look_at = 0.0
        self.status = FAILED
        self.channels = EventChannels()
        devices = consoles_of(domain, number)[:consoles]
        self.consoles = [Console(domain, device.number, self.channels) for device in devices]
        self.devices: list[OwnDevice] = [*self.consoles]

    def watch(self) -> None:
        """Watch devices, and what the guest says of the process, also before: each watch fires once when it is made."""
        self.xenstore.watch(
            *((f"{device.frontend}/state", f"device {number}") for number, device in enumerate(self.devices)),
            *((f"{self.domain.path}/data/process/{self.number}/{node}", node) for node in ("ready", "ended", "exit")),
        )

    def run(self, signals: int) -> int:
        """Return the process's exit status.  signals: see relay_signals()."""
        self.signals = signals
        while self.phase != "done" and not (self.phase == "draining" and self.streams.are_delivered()):
            handlers, poll = self.handlers(), select.poll()
            for fd in handlers:
                poll.register(fd, select.POLLIN)
            for fd, events in self.streams.interests():
                poll.register(fd, events)
            wake_at = min(filter(None, (self.deadline, self.look_at)), default=0)
            timeout = max(0, (wake_at - time.monotonic()) * 1000) if wake_at else None
            ready = {fd for fd, _ in poll.poll(0 if self.xenstore.events else timeout)}
            if self.xenstore.events:
                ready.add(self.xenstore.fd)
            for fd, work in handlers.items():
                if fd in ready:
                    work()
            self.advance(ready)
            for console in self.consoles:
                console.confirm()
            if unread := self.streams.newly_unread():  # which the process is to see, as with a pipe of the host's
                self.look("unread", unread)
            if self.deadline and time.monotonic() >= self.deadline:
                self.expire()
        return self.status

    def is_open(self) -> bool:
        return self.phase == "serving"

    def end(self, status: int, abandon: bool = False) -> None:
        """It has ended with status; abandon: do not wait for readers of its output."""
        if self.is_open():
            self.status, self.phase = status, "draining"
            self.log.debug(f"the exit status is {status}")
        if abandon:
            self.phase = "done"

    def handlers(self) -> dict[int, Callable[[], None]]:
        """What is called, in this order, when a descriptor is readable."""
        return {
            self.channels.fd: self.channels.acknowledge,
            self.xenstore.fd: self.handle_xenstore,
            self.signals: lambda: self.handle_signals(os.read(self.signals, 64)),
        }

    def advance(self, ready: set[int]) -> None:
        self.streams.advance(ready)

    def expire(self) -> None:
        """The deadline is over."""
        self.end(128 + SIGKILL, abandon=True)

    # ---- what the guest says

    def told(self, node: str) -> str:
        """What it has said of the process, "" if nothing."""
        return self.domain.told(f"process/{self.number}/{node}")

    def take_exit_status(self) -> bool:
        """Return whether the guest has told it, and it was not known."""
        text = self.told("exit")
        if not text or not self.is_open():
            return False
        if is_number(text, 3) and int(text) <= 255:
            self.end(int(text))
        else:
            self.log.warn("the VM told no valid exit status")
            self.end(FAILED)
        return True

    def handle_xenstore(self) -> None:
        # the end of some domain comes last: if it is ours, it has told its exit status before
        for token in sorted(self.xenstore.take_events(), key="release".__eq__):
            if not token.startswith("device "):
                self.hear(token)
            elif not self.devices[int(token.split()[1])].follow():
                self.lose_container()

    def hear(self, token: str) -> None:
        """A watch has fired."""
        if token == "ready" and not self.streams.ready and self.told("ready"):
            self.streams.ready = True
            self.begin()
        elif token == "ended":
            self.streams.close_ended(self.told("ended"))
        elif token == "exit":
            self.take_exit_status()

    def begin(self) -> None:
        """The program is executed."""

    def lose_container(self) -> None:
        """The VM is gone, or about to be."""

    # ---- what the host says

    def handle_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == SIGWINCH and self.terminal:
                self.resize()
            elif number == SIGHUP and self.terminal:
                self.streams.hang_up()
            else:
                self.send(number)

    def send(self, number: int) -> None:
        """A signal for the process."""
        self.ask(f"kill {self.number} {number}")

    def resize(self) -> None:
        if size := self.streams.window_size():
            self.look("winsize", size)

    def look(self, node: str, value: str) -> None:
        """Have the process's supervisor see what is new below its node."""
        self.ask(f"look {self.number}", f"look-{self.number}", {f"process/{self.number}/{node}": value})

    def ask(self, *request: Any) -> None:
        """As Domain.request."""
        try:
            self.request(*request)
        except Error as error:
            self.log.debug(str(error))  # gone, or its quota is full: the deadline or the container's end ends it


def take_terminal(console_socket: str | int, size: tuple[int, int]) -> None:
    """Make a pty, send its master and name as runc does, and have its slave for our standard streams and controlling
    terminal: a hang-up is SIGHUP.  console_socket: see send_descriptor().  size: rows, columns.  Raise Error."""
    import termios
    import tty

    with Attempt(f"send a terminal to the console socket {console_socket}"):
        master, slave = os.openpty()
        tty.setraw(slave)  # the terminal in the guest edits, echoes and makes signals
        os.set_blocking(slave, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        send_descriptor(console_socket, os.ttyname(slave).encode(), master)
        os.close(master)
        # a resize of the master is a SIGWINCH for the foreground of the slave's session: us
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    os.dup2(slave, 0)
    os.dup2(slave, 1)
    os.close(slave)
    close_standard(2)


def send_descriptor(target: str | int, message: bytes, fd: int) -> None:
    """Send a message and fd to a socket: at a path, or a connected one of ours, which is closed.  Raise OSError."""
    import socket

    with socket.socket(fileno=target) if isinstance(target, int) else socket.socket(socket.AF_UNIX) as connection:
        if isinstance(target, str):
            connection.connect(target)
        socket.send_fds(connection, [message], [fd])


# ==== monitor ============================================================================================
# The process on dom0 that has the domain built, carries the streams, answers the guest, and in the end takes all down.

KILL_GRACE = 2.0  # seconds that a guest has to end by itself on SIGKILL, so that its writes are kept
LOOK_AGAIN = 5.0  # seconds until xl is asked again whether the domain lives, when it could not tell
CONSOLE_TAIL = 8192  # bytes of the guest's own console that are kept for the log
CARRIERS_END = 2.0  # seconds that processes of `exec` have, once there is no VM

# how a domain ended that has not told an exit status: exit status, reason.  A pid namespace under runc ends
# by SIGINT on power-off and by SIGHUP on reboot (reboot(2)), so these are 130 and 129 here too.
ENDS = {
    "-": (130, "the VM was powered off from inside"),
    "r": (129, "the VM was rebooted from inside"),
    "s": (255, "the VM suspended itself"),
    "c": (255, "the VM crashed"),
    "w": (255, "the VM's watchdog fired"),
    "S": (255, "the VM made a soft reset"),
    "gone": (137, "the VM was destroyed"),
}


def leave(container: Container, log: Log, name: str, text: str) -> None:
    """Write a file, "ready" or the first "error", for a `start` that is too late to see in xenstore which it is."""
    path = container.path(name)
    if not any(map(os.path.exists, map(container.path, ("ready", "error")))):
        log.attempt(f"write {path}", write_file, path, text)


class BootConsole(FirstConsole):
    """The VM's first console where init has it: the last words of kernel and init, for the log."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.ended, self.text = fd < 0, b""

    def read(self) -> None:
        self.text = (self.text + self.take())[-CONSOLE_TAIL:]

    def report(self, log: Log, message: str) -> None:
        """A warning, with these words."""
        while not self.ended and select.select([self.fd], [], [], 0)[0]:
            self.read()
        log.warn(message)
        words = printable(self.text.decode("utf-8", "replace"), CONSOLE_TAIL)
        if words:
            log.warn(f"the VM's console: {words}")


class Commit:
    """create's word: "+" when it has done its part.  An end without that means that create is gone, and all goes with
    it.  Until then the monitor is where the share is, in a mount namespace of its own, for createContainer hooks."""

    def __init__(self) -> None:
        self.link: Any = None  # to create
        self.home = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        self.given: bool | None = None  # not known yet

    def take(self) -> bool:
        """Wait for it, and go back to dom0's mount namespace: the share is the holder's now, and the file server's.
        Return whether all was done.  Raise Error."""
        if self.given is None:
            self.given = bool(receive(self.link))
            self.return_home()
        return self.given

    def return_home(self) -> None:
        """Raise Error."""
        with Attempt("return to dom0's mount namespace"):
            system_call("setns", self.home, CLONE_NEWNS)
            os.chdir("/")


class Execs:
    """The processes of `exec` in a container: what their carriers have announced is given back when these end."""

    def __init__(self, container: Container, domain: Domain, log: Log) -> None:
        self.container, self.domain, self.log = container, domain, log
        self.carriers: dict[int, int] = {}  # number of the process, by a pidfd of its carrier

    def take(self, number: int, pid: int) -> None:
        """A process of dom0's carries process `number` from now on."""
        try:
            self.carriers[os.pidfd_open(pid)] = number
        except ProcessLookupError:
            self.log.attempt(f"end process {number}", self.lose, number)

    def look(self) -> None:
        """Some carrier has ended."""
        for pidfd in select.select(self.carriers, [], [], 0)[0]:
            os.close(pidfd)
            number = self.carriers.pop(pidfd)
            self.log.attempt(f"end process {number}", self.lose, number)

    def lose(self, number: int) -> None:
        """Nobody carries process `number` any more: kill it, if it has not ended, and forget it."""
        domain, node = self.domain, f"process/{number}"
        domain.xenstore.remove(f"{domain.path}/data/request/run-{number}")  # if the guest has not taken it
        for console in consoles_of(domain, number):  # first: without them the guest tells nothing of it any more
            console.forget()
        try:
            if domain.told(f"{node}/ready") and not domain.told(f"{node}/exit"):
                domain.request(f"kill {number} {SIGKILL}")
        finally:  # a VM that takes no request is not to keep the number
            domain.xenstore.remove(f"{domain.path}/data/{node}")
            discard(self.container.path(f"process-{number}"))


class Monitor(Loop):
    """Serves one domain until it has ended, and all output of the container's process is delivered."""

    def __init__(self, plan: Plan, holder: Holder, server: FileServer, commit: Commit, domain: Domain) -> None:
        config = plan.config
        self.own_init = config.machine.own_init
        self.container, self.holder, self.server, self.commit = plan.container, holder, server, commit
        terminal = bool(config.process and config.process.terminal)
        super().__init__(domain, 0, 0 if self.own_init else 2, terminal, plan.log.about(plan.container.id))
        self.share = ShareDevice(domain, config.machine.share_device, server)
        self.devices += [self.share] if server.pid else []
        # another kernel than ours runs whatever it likes before `start`, and hooks of dom0's go by names in the rootfs
        self.share.waits = self.share.kind != "fuse" and any(map(config.hooks.get, HOOK_KINDS[:3]))
        if self.own_init:
            self.request = self.power_off
        self.boot_console = BootConsole(-1)
        self.execs = Execs(plan.container, domain, self.log)
        self.control = os.open(plan.container.path("control"), os.O_RDWR | os.O_NONBLOCK)

    def prepare(self) -> None:
        """Announce consoles and files, and watch what the guest says: it runs already."""
        self.domain.transaction(lambda: [device.introduce() for device in self.devices])
        self.watch()
        path = self.xenstore.read(f"{self.domain.path}/console/tty")
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
        try:  # it is a pty of xenconsoled's, or nothing
            self.first_console = os.open(path if path.startswith("/dev/pts/") else "", flags)
        except OSError:
            if self.own_init:
                raise Error("cannot reach the VM's console: is xenconsoled running?") from None
            self.first_console = -1

    def serve(self) -> int:
        """Return the container's exit status."""
        signals = relay_signals((*RELAYED, SIGWINCH) if self.terminal else RELAYED)
        if not self.own_init:
            self.boot_console = BootConsole(self.first_console)
        self.streams = Streams([FirstConsole(self.first_console)] if self.own_init else self.consoles, self.terminal)
        if self.terminal:
            self.resize()
        return self.run(signals)

    def handlers(self) -> dict[int, Callable[[], None]]:
        found = {self.commit.link.fileno(): self.handle_commit} if self.commit.given is None else {}
        found.update(super().handlers())
        found[self.control] = self.handle_control
        found[self.holder.link.fileno()] = self.handle_holder
        if self.server.pid:
            found[self.server.link.fileno()] = self.handle_server
        if not self.boot_console.ended:
            found[self.boot_console.fd] = self.boot_console.read
        return {**found, **dict.fromkeys(self.execs.carriers, self.execs.look)}

    def advance(self, ready: set[int]) -> None:
        super().advance(ready)
        if self.look_at and time.monotonic() >= self.look_at:
            self.check_domain()

    def explain(self, message: str, reason: str = "") -> None:
        """A warning in the log; and the reason, or else the message, for a `start` that fails by it."""
        self.boot_console.report(self.log, message)
        leave(self.container, self.log, "error", reason or message)

    # ---- what the guest says

    def hear(self, token: str) -> None:
        if token == "release":
            self.check_domain()
        else:
            super().hear(token)

    def begin(self) -> None:
        leave(self.container, self.log, "ready", "")

    def take_exit_status(self) -> bool:
        if not super().take_exit_status():
            return False
        error, oom = printable(self.told("error")), self.domain.told("oom")
        if error:
            self.explain(f"the VM's init: {error}", error)
        if oom:
            self.boot_console.report(self.log, f"the VM has run out of memory: {printable(oom)}")
            show_oom(self.container.state.cgroups, self.log)
        return True

    def check_domain(self) -> None:
        """Look whether it was ours, when some domain has ended."""
        again, self.look_at = self.look_at, 0.0
        if not self.is_open() or seen_alive(self.domain.domid):
            return
        try:
            end = self.domain.end()
        except Error as error:  # xl is stuck, or has no memory
            if not again:
                self.log.warn(f"{error}; whether the VM has ended is asked again every {LOOK_AGAIN:.0f} s")
            self.look_at = time.monotonic() + LOOK_AGAIN
            return
        if end:
            self.take_exit_status()  # which the guest may have told just before
        if not end or not self.is_open():
            return
        if self.own_init and end == "-":
            self.end(0)
        else:
            status, reason = ENDS.get(end, ENDS["c"])
            self.explain(f"{reason}; exit status {status}", reason)
            self.end(status)

    # ---- what the host says

    def handle_commit(self) -> None:
        if not self.commit.take():
            self.end(FAILED, abandon=True)
        elif self.share.waits:
            self.share.waits = False
            self.share.follow()

    def handle_server(self) -> None:
        reason = hear(self.server.link)
        if not reason:
            return self.share.confirm()
        self.server.stop()
        self.take_exit_status()  # which the guest may have told just before
        if self.is_open():
            self.explain(f"its files are not served any more: {printable(reason)}")
            self.end(FAILED, abandon=True)

    def handle_control(self) -> None:
        """Lines of other runX processes: "kill N", "destroy N" (signals), "mute N" (seconds), "exec N PID"."""
        for line in os.read(self.control, 1 << 16).decode("ascii").splitlines():  # all that a pipe holds
            verb, number, *pid = line.split()
            if verb == "exec":
                self.execs.take(int(number), int(pid[0]))
            elif verb == "mute" and self.is_open():
                self.explain(f"the VM has not found its devices within {number} s: does its kernel boot?")
                self.end(FAILED, abandon=True)
            elif verb == "destroy" or not self.is_open():
                self.end(128 + int(number), abandon=True)
            elif not self.deadline:
                self.deadline = time.monotonic() + KILL_GRACE
                self.ask(f"kill 0 {number}")

    def handle_holder(self) -> None:
        self.handle_signals(signals := receive(self.holder.link))
        if not signals:
            self.end(128 + SIGKILL, abandon=True)  # for the engine the container is killed

    def send(self, number: int) -> None:
        if self.is_started():
            super().send(number)
        elif number in ENDING_SIGNALS:
            self.end(128 + number)

    def is_started(self) -> bool:
        """Whether there is a process that takes signals, or will be."""
        if self.own_init:
            return self.container.load().state.status == "running" or bool(self.container.unsettled())
        return self.streams.ready or bool(self.domain.told("process/0/start"))

    def power_off(self, request: str, *_: object) -> None:
        """All that a VM can be asked for that boots a system of its own."""
        verb, *operands = request.split()
        if verb == "kill" and int(operands[1]) in ENDING_SIGNALS:
            self.domain.shut_down()


class Sandbox:
    """Serves the sandbox of a pod: it has no VM, for in it nothing runs but a program that waits, and what the pod's
    containers share is dom0's.  It is there until it is killed."""

    def __init__(self, plan: Plan, holder: Holder, commit: Commit) -> None:
        self.holder, self.commit = holder, commit
        self.control = os.open(plan.container.path("control"), os.O_RDWR | os.O_NONBLOCK)

    def serve(self) -> int:
        """Return its exit status."""
        signals = relay_signals(RELAYED)
        numbers = b""
        while PAUSE_ENDS.keys().isdisjoint(numbers):
            links = [self.control, signals, self.holder.link] + [self.commit.link] * (self.commit.given is None)
            ready = select.select(links, [], [])[0]
            if self.control in ready:  # "kill N", "destroy N"
                numbers = bytes(int(line.split()[1]) for line in os.read(self.control, 1 << 16).splitlines())
            elif signals in ready:
                numbers = os.read(signals, 64)
            elif self.holder.link in ready:
                numbers = receive(self.holder.link) or bytes([SIGKILL])
            elif not self.commit.take():
                return FAILED
        return next(PAUSE_ENDS[number] for number in numbers if number in PAUSE_ENDS)


# ---- the process


class Plan(Record):
    """What `create` and `run` have made of config.json and command line: all that the monitor needs."""

    container: Container
    config: Config
    networks: list[Network]
    bundle: str
    engine: int | None
    console_socket: str | int | None  # with engine as find_console() returns them
    systemd: bool  # it makes the cgroup
    log: Log


def run_monitor(plan: Plan, commit: Commit, link: Any) -> int:
    """The monitor's whole life.  link: to create, that gets the holder's pid when there is one, and then "+" or an
    error.  Return the container's exit status."""
    container, committed, status, failure = plan.container, False, FAILED, ""
    holder, server, commit.link = Holder(), FileServer(), link
    monitor: Monitor | Sandbox | None = None
    try:
        monitor = build(plan, holder, server, commit)
        link.send(b"+")
        status = monitor.serve()
    except BaseException as error:
        failure = reason_of(error, "monitor")
    try:
        close_standard(0, 1, 2)  # who reads the streams sees the end at once
        if monitor:
            if failure:
                leave(container, plan.log, "error", failure)
            committed = commit.take()
        server.stop()
        if clean_up(container, plan.log) and os.path.exists(container.path("control")):
            os.unlink(container.path("control"))  # tells delete that nothing is left outside the folder
        plan.log.about(container.id).debug("the domain is gone")
        if not committed:
            commit.return_home()  # poststop hooks run where the others have run
            destroy(container, plan.log)
    except BaseException as error:
        plan.log.write("error", f"cannot clean up after container {container.id}: {error}")
    if committed:
        plan.log.attempt(f"end what else runs in container {container.id}", end_carriers, container)
    if committed and failure:
        plan.log.write("error", failure)
    elif failure:
        tell(link, failure)
    holder.end(status)
    return status


def end_carriers(container: Container) -> None:
    """Wait until the processes of `exec` have ended and are reaped: their ends come before the container's, as a pid
    namespace has it, and engines such as containerd 1.x hear of no other end behind that."""
    deadline = time.monotonic() + CARRIERS_END
    for pid, start_time in carriers_of(container).values():
        end_process(pid, start_time, max(0, deadline - time.monotonic()))
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)


def build(plan: Plan, holder: Holder, server: FileServer, commit: Commit) -> Monitor | Sandbox:
    """Have the domain built; return what serves it.  Raise Error.  The holder comes when the VM boots already."""
    container, config = plan.container, plan.config
    builder = Builder(container, config, plan.networks, plan.log)
    builder.prepare(plan.bundle, plan.systemd)
    domain = None if config.is_sandbox else builder.build()
    is_served = builder.rootfs.is_served
    holder.start(config, builder.share, is_served and not builder.rootfs.disk)
    container.save(pid=holder.pid, pid_start_time=process_start_time(holder.pid) or 0)  # it is in the cgroup already
    commit.link.send(str(holder.pid).encode())
    if domain is None:
        holder.check()
        return Sandbox(plan, holder, commit)
    if is_served:
        capabilities = config.process.capabilities["bounding"] if config.process else 0
        server.start(config.machine.share_device, builder.share, capabilities)
    monitor = Monitor(plan, holder, server, commit, domain)
    monitor.prepare()
    if monitor.terminal and config.process and plan.console_socket is not None:
        signal = import_core("signal")
        signal.signal(SIGHUP, signal.SIG_IGN)  # if it hangs up before we serve it, create's end decides
        take_terminal(plan.console_socket, config.process.console_size)
    holder.check()
    if server.pid and (reason := hear(server.link)):
        raise Error(f"cannot serve the container's files: {reason}")
    monitor.log.debug(f"domain {domain.domid} ({container.state.name}) is built")
    return monitor


def refresh(container: Container) -> State:
    """Return the container's state with what `create`, `start` and `exec` have added: they note all before they
    announce it, and announce nothing when the domain is gone."""
    try:
        container.load()
    except Error:
        pass  # what we know is what there is
    return container.state


def clean_up(container: Container, log: Log) -> bool:
    """Remove what a container has outside its folder: domain, devices, log files.  Return whether nothing is left: what
    cannot be removed is a warning.  Raise Error if that is the domain, which must not be forgotten."""
    state = refresh(container)
    if not state.uuid or state.is_sandbox:
        return True  # it came no further, or has no VM
    xenstore = Xenstore()
    living = find_domain(xenstore, state.uuid)
    domain = living or Domain(xenstore, state.domid, state.uuid)
    if living:
        for kind, number in state.devices:
            Device(domain, kind, number).unlist()
        living.destroy()
        state = refresh(container)
    devices = [Device(domain, kind, number) for kind, number in state.devices]
    devices += [console for number in carriers_of(container) for console in consoles_of(domain, number)]
    what = f"remove what {state.name} has had in dom0"
    done = [log.attempt(f"remove the files of {state.name}", remove_files, state.name)]
    if domain.domid and xenstore.read(f"{domain.path}/vm") in ("", f"/vm/{state.uuid}"):  # else it is another VM's
        done.append(log.attempt(what, end_redirects, state))
        done += [log.attempt(what, device.withdraw) for device in devices]
    return all(done)


def destroy(container: Container, log: Log) -> None:
    """Remove what is left of a container that has no monitor any more, give back its addresses, and run its poststop
    hooks.  What fails is a warning; Error if the VM or the folder is still there."""
    state, of_this_boot = container.state, container.is_of_this_boot()
    if not of_this_boot:  # nor is anything else in Xen
        log.attempt(f"remove the files of {state.name}", remove_files, state.name)
    elif os.path.exists(container.path("control")):  # it goes when a monitor has taken all down
        clean_up(container, log)
    for fields in reversed(state.networks):
        log.attempt(f"give back a network of {container.id}", detach_network, fields, log)
    log.attempt(f"remove the network namespace of {container.id}", discard, container.path("netns"))
    if of_this_boot:
        pids = (state.pid, state.monitor[0])
        log.attempt(f"remove the cgroup of {container.id}", remove_cgroups, state.cgroups, pids)
    container.remove()
    log.attempt(f"run the poststop hooks of {container.id}", run_hooks, container, "poststop", "stopped", (), log)


# ==== carrier ============================================================================================
# The process on dom0 that stands for one of `exec`, as the holder stands for the container's own: the engine signals it
# and reaps it.  It is in dom0's namespaces, where nobody looks for the container's, and carries the streams itself.

EXECS_MAX = 27  # of a container at a time: of the 64 consoles that its kernel has each takes two
EXEC_TIME_LIMIT = 60.0  # seconds until the VM has executed the program, or told why it cannot
# what can be caught, but for the C library's own, faults', which return to them, and PIPE and XFSZ, of our own writes
CARRIED = set(range(1, 65)) - {4, 7, 8, SIGKILL, 11, SIGPIPE, 19, 25, 32, 33}


class Order(Record):
    """What `exec` has made of its command line: all that the carrier needs."""

    container: Container
    number: int = 0  # the process's
    process: Process
    words: bytes  # see exec_config()
    engine: int | None
    console_socket: str | int | None  # with engine as find_console() returns them
    is_patient: bool = False  # the VM is paused, and takes its time
    log: Log


class Carrier(Loop):
    """Has a VM execute one more process, and carries its streams."""

    is_greeted = is_told = False

    def __init__(self, order: Order, link: Any) -> None:
        """link: to `exec`, that gets "+" when the program is executed."""
        container, process = order.container, order.process
        consoles, log = 1 if process.terminal else 2, order.log.about(container.id)
        super().__init__(container.domain(), order.number, consoles, process.terminal, log)
        self.order, self.link = order, link
        holder = container.open_pidfd()
        if holder is None:
            raise NotRunning()
        self.holder = holder

    def prepare(self) -> None:
        """Take what the process is to have on dom0, noted before it is there, and have the VM run it.  Raise Error."""
        container, number = self.order.container, self.number
        container.tell_monitor(f"exec {number} {os.getpid()}")
        write_file(container.path(f"process-{number}"), f"{os.getpid()} {process_start_time(os.getpid())}")
        data = {}
        if self.terminal and self.order.console_socket is not None:
            take_terminal(self.order.console_socket, self.order.process.console_size)
        self.streams = Streams(self.consoles, self.terminal)
        if self.terminal and (size := self.streams.window_size()):
            data[f"process/{number}/winsize"] = size
        self.watch()
        self.domain.request(f"run {number}", f"run-{number}", data, self.introduce)
        show_arguments(self.order.process.args)  # the VM works meanwhile
        for each in container.state.cgroups:  # as far as it is possible
            try:
                join_cgroups([each])
            except Error as error:
                self.log.debug(str(error))
        if not self.order.is_patient:
            self.deadline = time.monotonic() + EXEC_TIME_LIMIT

    def introduce(self) -> None:
        """Announce the consoles; and forget what the guest has told late of another process of that number."""
        self.xenstore.remove(f"{self.domain.path}/data/process/{self.number}")
        self.xenstore.events.clear()  # of watches that have just been made
        for console in self.consoles:
            console.introduce()

    def handlers(self) -> dict[int, Callable[[], None]]:
        found = {**super().handlers(), self.holder: self.lose_container}
        if not self.is_greeted:  # the guest keeps what is asked of the process from then on, and drops it before
            del found[self.signals]
        return found

    def advance(self, ready: set[int]) -> None:
        """What the guest says first is that its side of the console is raw: not one byte of the words is lost then."""
        if not self.is_greeted and (greeting := self.consoles[0].take()):
            self.is_greeted = True
            self.streams.input.pending, self.streams.outputs[0].pending = self.order.words, greeting[1:]
        if self.is_greeted:
            super().advance(ready)

    def expire(self) -> None:
        raise Error(f"the container's VM has not executed it within {EXEC_TIME_LIMIT:.0f} s: is it too busy?")

    def begin(self) -> None:
        self.deadline = 0
        self.link.send(b"+")
        self.is_told = True

    def hear(self, token: str) -> None:
        if token == "exit":
            super().hear("ready")  # which it has told before
        super().hear(token)
        if not (self.is_told or self.is_open()):
            reason = printable(self.told("error")) or "the VM does not tell why"
            raise Error(f"unable to start container process: {reason}")

    def lose_container(self) -> None:
        self.end(128 + SIGKILL, abandon=True)
        if not self.is_told:
            raise NotRunning()


def run_carrier(order: Order, link: Any) -> int:
    """The carrier's whole life.  link: to `exec`.  Return the process's exit status."""
    signals, carrier = relay_signals(CARRIED), Carrier(order, link)
    try:
        carrier.prepare()
        os.close(order.container.lock_fd)
        return carrier.run(signals)
    except BaseException as error:
        if carrier.is_told:  # `exec` does not listen any more
            carrier.log.write("error", reason_of(error, "carrier"))
        raise


# ==== commands ===========================================================================================
# One function per command, in the order of a container's life.  Each gets the Invocation.

BOOT_TIME_LIMIT = 600.0  # seconds from `start` until the VM's kernel has found a console
SIGNALS = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU "
    "URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
).split()
MONITOR_END = 60.0  # seconds that delete, and a start that fails, give a monitor to take its domain down
MONITOR_LOST = "its monitor was killed"

# What a command answers where it can do nothing, by the container's status, in runc's words.
NOT_RUNNING, NOT_PAUSED = "container not running", "container not paused"
GONE = "container with id {id} is not running"
NOT_STOPPED = "cannot delete container {id} that is not stopped: {status}"
REFUSED = {
    "start": {
        "creating": "cannot start a container in the creating state",
        "running": "cannot start an already running container",
        "paused": "cannot start a container in the paused state",
        "stopped": "cannot start a container that has stopped",
    },
    "kill": {"creating": NOT_RUNNING, "stopped": NOT_RUNNING},
    "pause": {"creating": NOT_RUNNING, "paused": NOT_RUNNING, "stopped": NOT_RUNNING},
    "resume": {"creating": NOT_PAUSED, "created": NOT_PAUSED, "running": NOT_PAUSED, "stopped": NOT_PAUSED},
    "exec": {
        "creating": "cannot exec in a container that is being created",
        "created": "cannot exec in a container that is not started: there is no process yet whose namespaces to enter",
        "paused": "cannot exec in a paused container (use --ignore-paused to override)",
        "stopped": "cannot exec in a stopped container",
    },
    "ps": {"creating": NOT_RUNNING},
    "events": {"creating": GONE, "stopped": GONE},
    "update": {"creating": NOT_RUNNING, "stopped": NOT_RUNNING},
    "delete": {"creating": NOT_STOPPED, "running": NOT_STOPPED, "paused": NOT_STOPPED},
}


class Invocation(Record):
    """A parsed command line."""

    command: str
    root: str
    log: Log
    systemd: bool  # it makes the cgroups
    options: dict[str, Any]  # without their dashes; flags are True
    attached: bool  # it ends with the process, and is a terminal's other end
    arguments: list[str]

    def container(self) -> Container:
        if not self.arguments:
            raise Error("a container ID is required as an argument")
        return Container(self.root, self.arguments[0])


def check_status(command: str, container: Container, status: str = "") -> str:
    """Return the container's status, unless we are told.  Raise Error where the command can do nothing."""
    status = status or container.status()
    sentence = REFUSED[command].get(status)
    if sentence:
        raise Error(sentence.format(id=container.id, status=status))
    return status


def read_object(path: str | int, what: str) -> JsonObject:
    """The JSON object in a file, or for 0 on standard input.  what: its name, such as "the process".  Raise Error."""
    name = path or "standard input"
    with Attempt(f"read {what} from {name}", ValueError):
        found = read_document(path)
    if not isinstance(found, dict):
        raise Error(f"{what} in {name} must be a JSON object")
    return found


def command_create(call: Invocation) -> None:
    create(make_plan(call), call.options)


def make_plan(call: Invocation) -> Plan:
    """What create and run begin with, and nothing is made yet."""
    container, bundle = call.container(), os.path.realpath(call.options.get("bundle", "."))
    if not is_text(bundle + call.root):
        raise Error(f"the paths of bundle and root must be UTF-8: {printable(bundle)}, {printable(call.root)}")
    config = Config(bundle)
    join_pod(config, call.root)
    find_xl()
    fit_vcpus(config)
    take_ordinary_score()
    networks = [Network(request, config.netconf_folders) for request in config.netconf if not config.is_sandbox]
    config.warnings += [f"{what} has no effect: nothing that is open on dom0 reaches a VM" for what in handed(call)]
    engine, console_socket = find_console(call, config.process)
    return Plan(
        container=container, config=config, networks=networks, bundle=bundle, systemd=call.systemd, log=call.log,
        engine=engine, console_socket=console_socket,
    )  # fmt: skip


def handed(call: Invocation) -> list[str]:
    """Return by what the caller hands descriptors of its own to the process, or wants to hear from it."""
    asked = {
        "--preserve-fds": call.options.get("preserve-fds", "0") != "0",
        "LISTEN_FDS": os.environ.get("LISTEN_PID") == str(os.getpid()),
        "NOTIFY_SOCKET": bool(os.environ.get("NOTIFY_SOCKET")),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def fit_vcpus(config: Config) -> None:
    """Have no more vcpus than the host has processors, and than the VM's memory can carry."""
    resources, machine = config.resources, config.machine
    if max(resources.vcpus(resources.default_vcpus), machine.maxvcpus) > 1:
        carried = max(1, resources.mebibytes(resources.default_memory) // VCPU_MEMORY)
        resources.most_vcpus = config.base["most_vcpus"] = most = min(host_processors(), carried)
        machine.maxvcpus = min(machine.maxvcpus, most)


def find_console(call: Invocation, process: Process | None) -> tuple[int | None, str | int | None]:
    """Where a terminal goes to: two connected sockets, one for attach(), or None and the path of --console-socket, or
    None twice.  Raise Error, in runc's words, unless that option is there just when needed."""
    path = call.options.get("console-socket")
    terminal = process if process and process.terminal else None
    if terminal and not path and not call.attached:
        raise Error("cannot allocate tty if runX will detach without setting console socket")
    if path and (call.attached or not terminal):
        raise Error("cannot use console socket if runX will not detach or allocate tty")
    if not (call.attached and terminal):
        return None, path and os.path.abspath(path)
    import socket

    terminal.is_piped = not os.isatty(1)
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def create(plan: Plan, options: JsonObject) -> int:
    """Make the container: fork the monitor, and wait until all is built.  Return the holder's pid."""
    container, log = plan.container, plan.log
    if plan.config.namespace and not plan.config.is_sandbox:
        in_namespace(plan.config.namespace, mark_namespace)
    container.reserve()
    with container, Undo(log) as undo:
        undo.add(f"remove container {container.id}", remove_unmade, container, log)
        for warning in plan.config.warnings:
            log.about(container.id).warn(warning)
        for module in ("mmap", "resource"):  # here, so that what we fork shares the half a megabyte that each takes
            __import__(module)
        word = Commit()
        kept = word.home, plan.console_socket, container.lock_fd
        monitor, link = fork_linked("monitor", kept, run_monitor, plan, word)
        os.close(word.home)
        children = [monitor]
        undo.add("wait for its processes", lambda: [os.waitpid(child, 0) for child in children])
        undo.add("end the monitor", link.close)  # it takes all down when it sees this
        reason = hear(link, MONITOR_LOST)
        if reason.isdecimal():
            children.append(int(reason))
            reason = hear(link, MONITOR_LOST)
        if reason:
            raise Error(f"cannot create container {container.id}: {reason}")
        commit(plan, children[1], monitor, options, undo)
        try:
            link.send(b"+")
        except ConnectionError:
            raise Error(f"cannot create container {container.id}: {MONITOR_LOST}") from None
        return children[1]


def remove_unmade(container: Container, log: Log) -> None:
    """Remove what a monitor that was killed has left."""
    if container.is_ours():
        destroy(container.load(), log)


def commit(plan: Plan, pid: int, monitor: int, options: JsonObject, undo: Undo) -> None:
    """create's part once the domain is built: hooks, network interfaces, pid file, state.  Raise Error."""
    container = plan.container.load()
    with Attempt("keep config.json"):  # for `exec`, as it was read
        write_file(container.path("config.json"), plan.config.text)
    run_hooks(container, "prestart", "creating")
    run_hooks(container, "createRuntime", "creating")
    run_hooks(container, "createContainer", "creating", (f"/proc/{pid}/ns/net", f"/proc/{monitor}/ns/mnt"))
    try:
        with Undo(plan.log) as plugging:
            plug(container, plugging)  # while the VM boots
    except NotRunning:
        pass  # it has ended: `start` says why
    hand_out(pid, options, b"standard")
    if path := options.get("pid-file"):
        undo.add(f"remove {path}", os.unlink, path)
    container.save(status="created")


def hand_out(pid: int, options: JsonObject, kind: bytes) -> None:
    """Give who asks for it a pidfd of a process, as runc does, and its pid.  kind: runc's word for it.  Raise Error."""
    if path := options.get("pidfd-socket"):
        with Attempt(f"send a pidfd to the socket {path}"), Descriptor(os.pidfd_open(pid)) as pidfd:
            send_descriptor(path, kind, pidfd)
    if path := options.get("pid-file"):
        temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
        with Attempt(f"write the pid file {path}"):
            try:
                if os.path.lexists(temporary):
                    os.unlink(temporary)  # of a runX that was killed
                write_file(temporary, pid, "x")
                os.rename(temporary, path)  # in one step: engines read it as soon as it is there
            except OSError:
                if os.path.lexists(temporary):
                    os.unlink(temporary)
                raise


def command_start(call: Invocation) -> None:
    """Have the container's process executed.  Raise Error if it cannot be, with the reason."""
    with call.container() as container:
        status = container.status()
        try:
            check_status("start", container, status)
            domain = begin(container, call.log)
        except Error as error:
            reason = reason_of_end(container) if container.state.status == "created" else ""
            if reason and (status == "stopped" or isinstance(error, NotRunning)):
                error = Error(f"{REFUSED['start']['stopped']}: {reason}")  # it has ended by itself, or is about to
            raise error from None
    # without the lock: it may be killed meanwhile, and a hook may call runX
    if domain and not container.state.starts_paused:
        await_process(container, domain)
    try:
        run_hooks(container, "poststart", "running")
    except Error:
        remove_own(call, container)
        raise


def reason_of_end(container: Container) -> str:
    """Why the process of a container that has ended was never executed; "" if its monitor has not told."""
    try:
        return read_text(container.path("error"))
    except OSError:
        return ""


def begin(container: Container, log: Log) -> Domain | None:
    """Give the VM, if it has one, what it is to have by `start`, and have it go on.  Return it.  Raise Error."""
    state = container.state
    if not state.startable:
        raise Error(f"cannot start container {container.id}: its config.json has no process")
    if state.is_sandbox:
        container.save(status="running")
        return None
    domain = container.domain()
    for kind, number in state.devices:  # of a `start` that was killed, or has failed
        if [kind, number] not in STANDARD_DEVICES and kind != "vif":
            container.release(Device(domain, kind, number))
    with Undo(log) as undo:
        attach_disk(container, domain, undo)
        told, words = plug(container, undo), ["disk"] if state.disk else []
        if told:  # to read messages takes no script
            words.append("net" if told.keys().isdisjoint(("data/dhcp", "data/dns")) else "network")
        if told and state.starts_paused:  # an init of a runX before 0.2 looks for it when it boots
            domain.write(told)
        try:
            going = domain.unpause if state.starts_paused else lambda: domain.start(words, told)
            container.switch(going, status="running")
        except BaseException:
            if container.unsettled():  # it was asked for: the VM may go on, and needs its devices
                undo.steps.clear()
            raise
    return domain


def await_process(container: Container, domain: Domain) -> None:
    """Return once the container's process is executed.  Raise Error, in runc's words, if it cannot be."""
    xenstore, pidfd = domain.xenstore, container.open_pidfd()
    error = ""
    xenstore.watch((f"{domain.path}/data/process/0", "process"))
    limit: float | None = BOOT_TIME_LIMIT
    while pidfd is not None and not error:
        ready = [xenstore.fd]
        if not xenstore.events:
            ready = select.select([xenstore.fd, pidfd], [], [], limit)[0]
        if pidfd in ready:
            break
        if ready:
            xenstore.take_events()
        elif refresh(container) and container.status() == "paused":
            limit = BOOT_TIME_LIMIT
        else:
            # without any, if it lives: init has time limits of its own
            rest = container.state.switched + BOOT_TIME_LIMIT - time.monotonic()
            limit = rest if rest > 0 else None
            if not limit and xenstore.read(f"{domain.path}/device/console/1/state") == XENBUS_INITIALISING:
                container.tell_monitor(f"mute {BOOT_TIME_LIMIT:.0f}")
        error = domain.told("process/0/error")
        if domain.told("process/0/ready"):
            os.close(pidfd)
            return
    if not error and os.path.exists(container.path("ready")):
        return  # it was over before we were told
    if error and pidfd:  # who hears of it finds the container stopped: buildah deletes it at once, and not by force
        select.select([pidfd], [], [], MONITOR_END)
    reason = printable(error) or reason_of_end(container) or "its VM has ended, see the log"
    raise Error(f"unable to start container process: {reason}")


def command_run(call: Invocation) -> int:
    """create, start and, unless detached, wait: the exit status is the container's."""
    plan = make_plan(call)
    pid = create(plan, call.options)
    if call.attached:
        forward_signals(pid)
    try:
        command_start(call)
    except BaseException:
        if os.path.isfile(path := call.options.get("pid-file", "")):
            os.unlink(path)
        remove_own(call, plan.container)
        raise
    if not call.attached:
        return 0
    status = await_child(pid, plan.engine)
    remove_own(call, plan.container)
    return status


def await_child(pid: int, engine: int | None) -> int:
    """Return a process's exit status as a shell has it.  engine: of its terminal, if it has one."""
    if engine is not None:
        attach(engine)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


def attach(engine: int) -> None:
    """Join our standard input and output, a terminal or not, to the terminal that comes by a socket, until it ends."""
    import signal
    import socket
    import termios
    import tty

    with socket.socket(fileno=engine) as connection:
        master = socket.recv_fds(connection, 4096, 1)[1][0]

    def resize(*_: object) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))

    saved = termios.tcgetattr(0) if os.isatty(0) else None
    if saved:
        tty.setraw(0)
        if not os.isatty(1):  # what is at our output's other end may write here, lines of plain text
            mode = termios.tcgetattr(0)
            mode[1] = saved[1]
            termios.tcsetattr(0, termios.TCSANOW, mode)
        signal.signal(signal.SIGWINCH, resize)
        resize()
    os.set_blocking(master, False)
    try:
        join_terminal(master)
    except OSError:
        pass  # EIO from the master: the container's end is closed; or nobody is at ours any more
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        os.close(master)  # which hangs up, if it has not ended
        try:
            if saved:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)
        except termios.error:
            pass  # the terminal has gone


def join_terminal(master: int) -> NoReturn:
    """Carry what is typed and what is shown.  Raise OSError when that ends."""
    typed, reading = b"", True  # typed: what the container has yet to take
    while True:
        sources = [master] if typed or not reading else [master, 0]
        readable, writable, _ = select.select(sources, [master] if typed else [], [])
        if 0 in readable:
            typed = os.read(0, 4096)
            reading = bool(typed)
        if writable:
            typed = typed[os.write(master, typed) :]
        if master in readable:
            output = os.read(master, 4096)
            while output:
                select.select([], [1], [])  # the caller's may be such that does not block
                output = output[os.write(1, output) :]


def forward_signals(pid: int) -> None:
    """What a person or a supervisor sends to `run` or `exec` goes to the process."""
    signal = import_core("signal")

    def forward(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    for number in RELAYED:
        signal.signal(number, forward)


def command_exec(call: Invocation) -> int:
    """Run one more process in a container; unless detached, wait: the exit status is the process's."""
    try:
        order = make_order(call)
        pid = start_carrier(call, order)
        if not call.attached:
            return 0
        if order.engine is None:  # the carrier alone has them now, so that it can end them one by one
            close_standard(0, 1, 2)
        return await_child(pid, order.engine)
    except (Error, OSError) as error:
        raise Error(f"exec failed: {error}", FAILED) from None


def make_order(call: Invocation) -> Order:
    """What exec begins with, and nothing is made yet.  Raise Error."""
    container = call.container().load()
    check_exec(call, container)
    for name in call.options.get("cgroup", []):
        if name.strip("/"):
            raise Error(f"cannot run it in the cgroup {printable(name)}: runX has only the container's own")
    bundle, path = container.state.bundle, call.options.get("process", "")
    asked = read_object(path, "the process") if path else ask_process(call, read_config(bundle)[0].section("process"))
    # what the container has, as `create` has found it, if its runX has kept that
    is_kept = os.path.exists(container.path("config.json"))
    spec, _ = read_config(container.folder if is_kept else bundle)
    process, linux, warnings = parse_exec(spec, asked, path or "the process")
    for warning in warnings:
        call.log.about(container.id).warn(warning)
    engine, console_socket = find_console(call, process)
    return Order(
        container=container, process=process, words=exec_config(linux, process), engine=engine,
        console_socket=console_socket, log=call.log,
    )  # fmt: skip


def check_exec(call: Invocation, container: Container) -> str:
    """Return the container's status.  Raise Error where no process can be run."""
    status = container.status()
    if container.state.own_init:
        raise Error("cannot exec in a container whose VM boots a system of its own: reach it by its console or network")
    container.check_vm()
    if status == "paused" and container.state.status == "created":
        status = "created"
    if status != "paused" or "ignore-paused" not in call.options:
        check_status("exec", container, status)
    return status


def ask_process(call: Invocation, own: Section) -> JsonObject:
    """The OCI process that the options ask for: config.json's own, changed as `runc exec` changes it."""
    options, user, args = call.options, own.section("user"), call.arguments[1:]
    if not args:
        raise Error("process args cannot be empty")
    capabilities = {name: own.section("capabilities").texts(name) for name in CAPABILITY_SETS}
    for name in ("bounding", "effective", "permitted"):
        capabilities[name] += options.get("cap", [])
    capabilities["ambient"] += [name for name in options.get("cap", []) if name in capabilities["inheritable"]]
    uid, colon, gid = options.get("user", "").partition(":")
    groups = [parse_user_number("gid", text) for text in options.get("additional-gids", [])]
    return {
        **own.values,
        "args": args,
        "cwd": options.get("cwd") or own.values.get("cwd"),
        "env": own.texts("env") + options.get("env", []),
        "terminal": "tty" in options,
        "noNewPrivileges": "no-new-privs" in options or own.flag("noNewPrivileges"),
        "capabilities": capabilities if "cap" in options else own.values.get("capabilities"),
        "user": {
            **user.values,
            "uid": parse_user_number("uid", uid) if uid or colon else user.unsigned("uid", 32),
            "gid": parse_user_number("gid", gid) if colon else user.unsigned("gid", 32),
            "additionalGids": user.each("additionalGids", Section.unsigned, 32, REQUIRED) + groups,
        },
    }


def parse_user_number(what: str, text: str) -> int:
    if not is_number(text, 10) or int(text) >= 1 << 32:
        raise Error(f"bad {what}: {printable(text) or repr(text)} is no number of a user or group")
    return int(text)


def start_carrier(call: Invocation, order: Order) -> int:
    """Return the pid of the carrier once the program is executed.  Raise Error."""
    container = order.container
    with container:
        order.is_patient = check_exec(call, container) == "paused"
        taken = carriers_of(container)
        order.number = next((number for number in range(1, EXECS_MAX + 1) if number not in taken), 0)
        if not order.number:
            raise Error(f"{EXECS_MAX} processes run there besides its own, and its VM has consoles for no more")
        kept = container.lock_fd, order.console_socket
        pid, link = fork_linked("carrier", kept, run_carrier, order)
    if call.attached:
        forward_signals(pid)
    try:
        if reason := hear(link, "the process that carries its streams was killed"):
            raise Error(reason)
        hand_out(pid, call.options, b"setns")
    except BaseException:
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        raise
    link.close()
    return pid


def command_state(call: Invocation) -> None:
    print_json(call.container().load().public_state())


def print_json(value: Any, indent: int | None = 2) -> None:
    """indent None: on one line, at once, for a reader of a stream."""
    with Attempt("write to standard output"):
        print(json_text(value, indent), flush=indent is None)


def command_kill(call: Invocation) -> None:
    """Ask for the signal and return; whether and when the container ends is its monitor's to see."""
    text = call.options.get("signal") or "".join(call.arguments[1:]) or "TERM"
    container, number, to_all = call.container(), parse_signal(text), "all" in call.options
    if number == SIGKILL and container.load().state.status == "running" and is_locked(container):
        try:
            container.tell_monitor(f"kill {number}")  # now: what goes on may be an xl that hangs
            return
        except NotRunning:
            pass  # as below
    with container:
        status = container.status(ask=number != SIGKILL)  # which must not wait for xl
        if status == "stopped" and to_all:
            return  # as runc: all of nothing is done
        check_status("kill", container, status)
        try:
            send_signal(container, number, to_all)
        except NotRunning:
            pass  # it is ending, and as long as its pid is there it takes signals, as any process does


def parse_signal(text: str) -> int:
    """The number of a signal given as 15, TERM or SIGTERM (also RTMIN+1, RTMAX-1)."""
    name = text.upper().removeprefix("SIG")
    if is_number(name, 9) and int(name) <= 64:
        return int(name)
    numbers = {"RTMIN": 34, "RTMAX": 64}
    numbers.update((each, number) for number, each in enumerate(SIGNALS, 1))
    for number in range(34, 65):
        numbers.update({f"RTMIN+{number - 34}": number, f"RTMAX-{64 - number}": number})
    if name not in numbers:
        raise Error(f"unknown signal {text!r}: give a number from 0 to 64 or a name such as TERM")
    return numbers[name]


def send_signal(container: Container, number: int, to_all: bool) -> None:
    state = container.state
    certain = number != SIGKILL or not container.unsettled()
    if state.is_sandbox or state.status == "created" and certain:  # there is no process: only the end can be had
        if number in ENDING_SIGNALS:
            container.tell_monitor(f"destroy {number}")
    elif number == SIGKILL:
        container.tell_monitor(f"destroy {number}" if state.own_init else f"kill {number}")
        try:  # so that its last writes reach the host, if that can be
            if container.status() == "paused" and state.status == "running" and not state.own_init:
                container.switch(container.domain().unpause, paused=False)
        except Error:
            pass
    elif state.own_init:
        if number in ENDING_SIGNALS:
            container.domain().shut_down()
    elif number != 0:
        container.domain().request(f"{'killall' if to_all else 'kill'} 0 {number}")


def remove_own(call: Invocation, container: Container) -> None:
    """Remove a container that we have created or started, or with `run --keep` end it; what fails is a warning."""
    call.log.attempt(f"remove container {container.id}", command_delete, call, container)


def command_delete(call: Invocation, own: Container | None = None) -> None:
    """own: the container, if it is ours, and not any that has its id by now."""
    container, uuid = own or call.container(), own and own.state.uuid
    force = container.forgiving = own is not None or "force" in call.options
    if force:  # it is done also when who asks for it is killed, which containerd is by itself after five seconds
        system_call("prctl", PR_SET_PDEATHSIG, 0)
    try:
        with container:
            if uuid not in (None, container.state.uuid):
                return
            status = container.status(ask=not force)
            if not container.state.pid and os.path.exists(container.path("state.json")):
                call.log.warn(f"the state of container {container.id} is lost: its networks and cgroup stay")
            if not force:
                check_status("delete", container, status)
            try:
                container.tell_monitor(f"destroy {SIGKILL}")
            except NotRunning:
                pass  # it is ending already
            state = container.state
            for pid, start_time in (state.monitor, (state.pid, state.pid_start_time)):
                if pid and container.is_of_this_boot():  # by force, if it does not end by itself in time
                    end_process(pid, start_time, MONITOR_END)
            # a monitor that was still creating has removed it by itself
            if container.is_ours() and "keep" not in call.options:
                destroy(container, call.log)
    except NoContainer:
        if not force:
            raise


def command_pause(call: Invocation) -> None:
    """`pause`: the VM gets no processor time until `resume`."""
    with call.container() as container:
        check_status(call.command, container)
        pauses = call.command == "pause"
        if container.state.may_run():
            domain = container.domain()
            container.switch(domain.pause if pauses else domain.unpause, paused=pauses)
        else:  # it gets none anyway
            container.save(paused=pauses)


def output_format(call: Invocation) -> str:
    """ "table" or "json"; Error if --format is another."""
    wanted: str = call.options.get("format", "table")
    if wanted not in ("table", "json"):
        raise Error(f"invalid format option {printable(wanted)}: use table or json")
    return wanted


def command_ps(call: Invocation) -> None:
    """The container's processes as dom0 has them: the holder, and the carriers of `exec`."""
    import subprocess

    container, form = call.container().load(), output_format(call)
    stopped = check_status("ps", container) == "stopped"
    shown = [] if stopped else [container.state.pid]
    shown += [carrier for carrier, start in carriers_of(container).values() if process_start_time(carrier) == start]
    if form == "json":
        print_json(shown or None, None)
        return
    asked = call.arguments[1:]
    command = ["ps", *asked] if asked else ["sh", "-c", "ps -ef 2>/dev/null || ps"]  # oe-core's busybox has no options
    env = {**os.environ, "PATH": PATH}
    result = subprocess.run(command, stdout=subprocess.PIPE, env=env, encoding="utf-8", errors="replace", check=False)
    head, *rows = result.stdout.splitlines() or [""]
    if result.returncode != 0 or "PID" not in head.split():
        raise Error(f"cannot tell a PID column in the output of {' '.join(command)}: try --format json")
    column, pids = head.split().index("PID"), [[str(each)] for each in shown]  # as runc: stopped, the heading alone
    print(head, *(row for row in rows if row.split()[column : column + 1] in pids), sep="\n")


def command_events(call: Invocation) -> None:
    """As `runc events`: one line of JSON every --interval, and "oom" when that happens; once with --stats."""
    interval = parse_duration(call.options.get("interval", "5s"))
    container = call.container().load()
    check_status("events", container)
    pidfd = container.open_pidfd()
    if pidfd is None:
        raise Error(GONE.format(id=container.id))
    domain = container.domain()
    if "stats" in call.options:
        print_stats(container, domain)
        return
    xenstore, told, deadline = domain.xenstore, False, time.monotonic()
    xenstore.watch((f"{domain.path}/data/oom", "oom"))
    while True:
        if time.monotonic() >= deadline:
            print_stats(container, domain)
            deadline += interval
        wait = 0 if xenstore.events else max(0, deadline - time.monotonic())
        ready = select.select([xenstore.fd, pidfd], [], [], wait)[0]
        if xenstore.fd in ready or xenstore.events:
            xenstore.take_events()
            if not told and domain.told("oom"):
                told = True
                print_json({"type": "oom", "id": container.id}, None)
        elif pidfd in ready:
            return


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as 5s, 500ms, 1m30s; Error if it is none or not positive."""
    import re

    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise Error(f"option --interval of events needs a duration such as 5s, not {text!r}")
    return seconds


def print_stats(container: Container, domain: Domain) -> None:
    """What Xen has counted, in runc's shape (types/events.go): nanoseconds and bytes.  Nothing if it is gone."""
    listing = domain.listing()
    if listing is None:
        return
    memory = {"limit": container.state.maxmem << 20, "usage": listing.memory << 20, "failcnt": 0}
    time_used = {"total": round(listing.time * 10) * 10**8, "kernel": 0, "user": 0}
    none = {"failcnt": 0}
    data = {
        "cpu": {"usage": time_used, "throttling": {}},
        "memory": {"usage": memory, "swap": none, "kernel": none, "kernelTCP": none},
        **dict.fromkeys(("pids", "blkio", "hugetlb", "intel_rdt"), {}),
    }
    print_json({"type": "stats", "id": container.id, "data": data}, None)


# the field of linux.resources for each option, runc's names
UPDATE_OPTIONS = {
    "memory": "memory.limit", "memory-reservation": "memory.reservation", "memory-swap": "memory.swap",
    "kernel-memory": "memory.kernel", "kernel-memory-tcp": "memory.kernelTCP", "cpu-quota": "cpu.quota",
    "cpu-period": "cpu.period", "cpu-share": "cpu.shares", "cpu-burst": "cpu.burst", "cpu-idle": "cpu.idle",
    "cpu-rt-period": "cpu.realtimePeriod", "cpu-rt-runtime": "cpu.realtimeRuntime", "cpuset-cpus": "cpu.cpus",
    "cpuset-mems": "cpu.mems", "blkio-weight": "blockIO.weight", "pids-limit": "pids.limit",
    "l3-cache-schema": "intelRdt.l3CacheSchema", "mem-bw-schema": "intelRdt.memBwSchema",
}  # fmt: skip
TEXTS = ("cpuset-cpus", "cpuset-mems", "l3-cache-schema", "mem-bw-schema")  # all others are numbers
SHARELESS = ("null", "rtds", "arinc653")  # schedulers of Xen's without weight and cap
# what is not refused.  A VM has no swap, so any limit of it is kept; a reservation is a wish.
UPDATABLE = """
    memory.limit memory.swap memory.reservation unified.memory.swap.max cpu.quota cpu.period cpu.shares cpu.cpus
""".split()


def command_update(call: Invocation) -> None:
    """Change what Xen can change in a VM that runs; refuse all if anything else is to be different."""
    container, changes = call.container(), read_update(call.options)
    with container:
        check_status("update", container)
        container.check_vm()
        update(container, changes)


def read_update(options: dict[str, Any]) -> dict[str, Any]:
    """The linux.resources that are asked for: as by runc, beside --resources only Intel's options count."""
    source, changes = options.get("resources"), {}
    if source:
        changes = read_object(0 if source == "-" else source, "the resources")
    for name, field in UPDATE_OPTIONS.items():
        if options.get(name) and (not source or "schema" in name):
            section, _, key = field.partition(".")
            values = Section(changes, "resources").section(section).values
            changes[section] = {**values, key: parse_quantity(name, options[name])}
    return changes


def parse_quantity(name: str, text: str) -> int | str:
    """An integer, or a number of bytes such as 64m, 0.5g, 64MB or 64MiB; what is no number for runc either is text."""
    import re

    if name in TEXTS:
        return text
    try:
        if "memory" in name and text != "-1":
            [(digits, unit)] = re.findall(r"\A([0-9.]+) ?([kmgtp]?)i?b?\Z", text.lower())
            return int(float(digits) * 1024 ** " kmgtp".index(unit))
        return int(text)
    except (ValueError, OverflowError):
        raise Error(f"option --{name} of update needs a number, not {text!r}") from None


def update(container: Container, changes: JsonObject) -> None:
    state = container.state
    asked = merge_resources(container, changes)
    resources = Resources(asked, "resources", state.base)
    new, old = xen_values(resources, state), xen_values(Resources(state.resources, "resources", state.base), state)
    for key, most, what in (("memory", state.maxmem, "MiB of memory"), ("vcpus", state.maxvcpus, "vcpus")):
        if new[key] > most:
            raise Error(
                f"cannot update container {container.id} to {new[key]} {what}: its VM was made for {most} at most, "
                f"see the annotations org.runx.maxmem and org.runx.maxvcpus"
            )
    known = {} if state.updating else old  # an `update` that was killed has left nobody knows what
    scheduler = xl_info("xen_scheduler") if new["share"] != known.get("share") else ""
    if scheduler in SHARELESS and new["share"] != old["share"]:
        reason = f"Xen's scheduler, {scheduler}, knows neither shares nor quotas: boot Xen with sched=credit2"
        raise Error(f"cannot update container {container.id}: {reason}")
    container.save(updating=True)
    try:
        apply_values(container, new, known, scheduler)
    except Error:
        apply_values(container, old, known and new, scheduler)  # all or nothing; what was not reached stays as it is
        container.save(updating=False)
        raise
    container.save(resources=asked, updating=False)
    for root, path in state.cgroups:
        try:
            limit_cgroup(root + path, resources)
        except OSError:
            pass  # of version 1, it has more than that; the VM's own memory is not there


def merge_resources(container: Container, changes: JsonObject) -> JsonObject:
    """The container's linux.resources with the changes.  Raise Error for what cannot change."""
    known, refused = container.state.resources, []
    new = {key: dict(value) if isinstance(value, dict) else value for key, value in known.items()}
    for section, values in changes.items():
        old = known.get(section)
        if not isinstance(values, dict) or not isinstance(old or {}, dict):
            if values and values != old:
                refused.append(section)
            continue
        for key, value in values.items():
            field = f"{section}.{key}"
            if field in UPDATABLE and value:
                new.setdefault(section, {})[key] = value
            elif value and value != (old or {}).get(key, -1):  # no limit, as where none is set
                refused.append(field)
    if refused:
        raise Error(f"cannot update container {container.id}: {', '.join(refused)} cannot change while its VM exists")
    return new


def xen_values(resources: Resources, state: State) -> dict[str, Any]:
    """Return what Xen is told of them: MiB, vcpus, (weight, cap) and the processors to run on."""
    return {
        "memory": resources.mebibytes(state.maxmem),
        "vcpus": resources.vcpus(state.maxvcpus),
        "share": resources.share(),
        "cpus": resources.cpus or "all",
    }


def apply_values(container: Container, new: dict[str, Any], old: dict[str, Any], scheduler: str) -> None:
    """Tell Xen those that are not as the old ones, of which some may be missing.  Raise Error."""
    domain = container.domain()
    changed = {key for key, value in new.items() if value != old.get(key)}
    if "memory" in changed:
        domain.set_memory(new["memory"])
    if "vcpus" in changed:
        change_domain("vcpu-set", domain.domid, new["vcpus"])
        if new["vcpus"] > old.get("vcpus", 0):  # the kernel finds one more; that it is used is userspace's to say
            domain.request("cpus", "cpus")
    if "share" in changed and scheduler not in SHARELESS:
        weight, cap = new["share"]
        change_domain(f"sched-{scheduler or 'credit2'}", "-d", domain.domid, "-w", weight, "-c", cap)
    if "cpus" in changed:
        change_domain("vcpu-pin", domain.domid, "all", new["cpus"])


def command_list(call: Invocation) -> None:
    """As `runc list`: a table, --format json, or --quiet for ids alone."""
    states = []
    with Attempt(f"list the containers of {call.root}"):
        may_be_missing = call.root == DEFAULT_ROOT and not os.path.exists(call.root)
        names = [] if may_be_missing else sorted(os.listdir(call.root))
    for name in names:
        try:
            container = Container(call.root, name).load()
            states.append({**container.public_state(), "owner": owner_of(container.folder)})
        except (NoContainer, FileNotFoundError):
            pass  # deleted meanwhile, or no folder
        except Error as error:
            call.log.warn(str(error))
    if "quiet" in call.options:
        print("".join(f"{state['id']}\n" for state in states), end="")
    elif output_format(call) == "json":
        print_json(states or None, None)  # null for none, as runc's
    else:
        heads = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
        rows = [list(heads), *([str(state[head.lower()]) for head in heads] for state in states)]
        widths = [max(12, 3 + max(map(len, column))) for column in zip(*rows)]
        for row in rows:
            print("".join(map(str.ljust, row, widths)).rstrip())


def owner_of(path: str) -> str:
    import pwd

    uid = os.stat(path).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


OWN_NAMESPACES = "cgroup ipc mount network pid uts".split()  # those that a VM has instead of dom0's


def command_features(call: Invocation) -> None:
    """runtime-spec features.md: what is in it is there, what is not is not."""
    off = {"enabled": False}
    print_json({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": HOOK_KINDS,
        "mountOptions": sorted({*MOUNT_OPTIONS, *filter(None, PROPAGATIONS), "tmpcopyup", "notmpcopyup"}),
        "linux": {
            "namespaces": OWN_NAMESPACES,
            "capabilities": list(CAPABILITIES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": False},
            "seccomp": {
                "enabled": os.uname().machine in SECCOMP_ARCHITECTURES,
                "actions": list(SECCOMP_ACTIONS),
                "operators": list(SECCOMP_OPERATORS),
                "archs": [name for pairs in SECCOMP_ARCHITECTURES.values() for name, _ in pairs],
                "knownFlags": list(SECCOMP_FLAGS),
                "supportedFlags": [name for name, value in SECCOMP_FLAGS.items() if value],
            },
            **dict.fromkeys(("apparmor", "selinux", "intelRdt", "netDevices"), off),
            "mountExtensions": {"idmap": off},
        },
        "annotations": {"org.runx.version": VERSION},
        "potentiallyUnsafeConfigAnnotations": ["org.runx.", *POD_MARKS],
    })  # fmt: skip


# what `spec` writes, runc's values: of a mount its destination, type, source and options
SPEC_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
SPEC_MOUNTS = (
    ("/proc", "proc", "proc", ""),
    ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
    ("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
)
SPEC_MASKED = """
    /proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats
    /proc/sched_debug /sys/firmware /proc/scsi
""".split()
SPEC_READONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()


def command_spec(call: Invocation) -> None:
    """As `runc spec`: write a config.json to begin with, which runc takes too.  Raise Error if there is one."""
    if "rootless" in call.options:
        raise Error("cannot write a rootless config.json: root of dom0 makes VMs, so call spec without --rootless")
    path = os.path.join(call.options.get("bundle", "."), "config.json")
    if os.path.lexists(path):
        raise Error("File config.json exists. Remove it first")
    mounts: list[JsonObject] = []
    for destination, kind, source, options in SPEC_MOUNTS:
        mounts.append({"destination": destination, "type": kind, "source": source})
        if options:
            mounts[-1]["options"] = options.split(",")
    example = {  # a shell on a terminal
        "ociVersion": "1.0.2",
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [f"PATH={PATH}", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), SPEC_CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "runX",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in OWN_NAMESPACES],
            "maskedPaths": SPEC_MASKED,
            "readonlyPaths": SPEC_READONLY,
        },
    }
    with Attempt(f"write {printable(path)}"), open(path, "x", encoding="utf-8") as file:
        print(json_text(example, 4), file=file)


def command_pack_initrd(call: Invocation) -> None:
    if len(call.arguments) != 2:
        raise Error("usage: runX pack-initrd FOLDER FILE")
    pack_initrd(*call.arguments)


# ==== command line =======================================================================================
# Hand-made, as argparse costs more than most commands: --x v, --x=v and -x v, as in Go.  Every failure ends in main().

CREATE_FLAGS = {"no-pivot", "no-new-keyring"}
CREATE_VALUES = {"bundle", "pid-file", "console-socket", "pidfd-socket", "preserve-fds"}
SHORT = {
    "b": "bundle", "d": "detach", "f": "force", "a": "all", "q": "quiet", "r": "resources", "h": "help", "v": "version",
    "p": "process", "e": "env", "u": "user", "g": "additional-gids", "c": "cap", "t": "tty",
}  # fmt: skip
EXEC_FLAGS = {"detach", "tty", "no-new-privs", "ignore-paused"}
REPEATED = {"env", "cap", "additional-gids", "cgroup"}  # options of which all values count
EXEC_VALUES = CREATE_VALUES - {"bundle"} | {"process", "cwd", "user", "apparmor", "process-label", *REPEATED}

# command: (function, flags, options with a value, most arguments)
COMMANDS: dict[str, tuple[Callable[[Invocation], int | None], Collection[str], Collection[str], int]] = {
    "create": (command_create, CREATE_FLAGS, CREATE_VALUES, 1),
    "start": (command_start, (), (), 1),
    "run": (command_run, CREATE_FLAGS | {"detach", "keep", "no-subreaper"}, CREATE_VALUES, 1),
    "state": (command_state, (), (), 1),
    "kill": (command_kill, {"all"}, {"signal"}, 2),
    "delete": (command_delete, {"force"}, (), 1),
    "pause": (command_pause, (), (), 1),
    "resume": (command_pause, (), (), 1),
    "exec": (command_exec, EXEC_FLAGS, EXEC_VALUES, sys.maxsize),
    "ps": (command_ps, (), {"format"}, 1000),
    "events": (command_events, {"stats"}, {"interval"}, 1),
    "update": (command_update, (), {"resources", *UPDATE_OPTIONS}, 1),
    "list": (command_list, {"quiet"}, {"format"}, 0),
    "features": (command_features, (), (), 0),
    "spec": (command_spec, {"rootless"}, {"bundle"}, 0),
    "pack-initrd": (command_pack_initrd, (), (), 2),
}
# what other runtimes have, so that the refusal can say that it is known; also with --help, by which engines find out
UNSUPPORTED = {"checkpoint", "restore"}
TRUE, FALSE = "1 t T true TRUE True".split(), "0 f F false FALSE False".split()  # values of flags, as Go has them
GLOBAL_FLAGS = {"debug", "systemd-cgroup", "help", "version"}
GLOBAL_VALUES = {"root", "log", "log-format", "rootless", "criu", "cgroup-manager"}

USAGE = f"""usage: runX [--root DIR] [--log FILE] [--log-format text|json] [--debug] COMMAND [OPTIONS] [ID]

commands:
  create [--bundle DIR] [--pid-file FILE] ID       make the container's VM, which waits for start
  start ID                                         execute its process
  run [--bundle DIR] [--detach] [--keep] ID        create, start, wait for its end
  state ID                                         print its state as JSON
  kill [--all] ID [SIGNAL]                         send a signal to its process
  delete [--force] ID                              remove what is left of it
  exec [--process FILE | OPTIONS] ID [COMMAND..]   run one more process in it: see docs/exec.md
  pause ID                                         stop its VM
  resume ID                                        let it go on
  ps [--format table|json] ID [PS OPTIONS]         its processes on this host
  events [--stats] [--interval 5s] ID              what Xen counts for it, as JSON
  update [--resources FILE|-] [--memory N] ID      change memory, processors and their share: see docs/lifecycle.md
  list [--format table|json] [--quiet]             all containers below the root
  features                                         what this runtime can do, as JSON
  spec [--bundle DIR]                              write a config.json to begin with
  pack-initrd FOLDER FILE                          make a ramdisk

The root is {DEFAULT_ROOT} by default."""


def usage_of(command: str) -> str:
    """Return how a command is called, with all of its options."""
    _, flags, values, _ = COMMANDS[command]
    line = next(line for line in USAGE.splitlines() if f" {command} " in line)
    options = sorted([f"  --{name}" for name in flags] + [f"  --{name} VALUE" for name in values])
    usage = [f"usage: runX {line.strip()}"]
    if options:
        usage += ["", "options:", *options]
    return "\n".join(usage)


def parse_options(command: str, words: list[str], options: JsonObject) -> list[str]:
    """Take a command's options, or for "" those before one, into options, in any order and as far as they can be
    understood.  Return the other words.  Raise Error."""
    flags, values, most = COMMANDS[command][1:] if command else (GLOBAL_FLAGS, GLOBAL_VALUES, len(words))
    arguments: list[str] = []
    while words:
        word, *words = words
        if word == "--":
            arguments += words
            break
        if len(word) < 2 or not word.startswith("-"):
            arguments.append(word)
            if command in ("", "ps", "exec"):
                return arguments + words  # the command's, ps(1)'s own, or the program's
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = SHORT.get(name, name)
        if command in ("list", "ps") and name == "force":
            name = "format"
        if name in flags or name == "help":
            if equals and value not in TRUE + FALSE:
                raise Error(f"option --{name} is true or false, not {value!r}")
            if value not in FALSE:
                options[name] = True
        elif name in values:
            if not (equals or words):
                raise Error(f"option --{name}{command and f' of {command}'} needs a value")
            if not equals:
                value, *words = words
            options[name] = [*options.get(name, []), value] if name in REPEATED else value
        elif command:
            raise Error(f"{command} has no option {word}: see runX --help")
        else:
            raise Error(f"there is no option {printable(word)} before the command: see runX --help")
    if len(arguments) > most and "help" not in options:
        raise Error(f"{command} takes no more than {most} arguments, and {printable(arguments[most])} is one more")
    return arguments


def parse_command(words: list[str], options: dict[str, Any], log: Log) -> Invocation | None:
    """The rest of the command line; None if only something about runX is asked for, which is printed."""
    if "version" in options:
        print(f"runX version {VERSION}\nspec: 1.3.0")
        return None
    if options.get("log-format") not in (None, "", "text", "json"):
        raise Error(f"invalid log-format: {options['log-format']}")
    if "help" in options or not words or words[0] in ("help", "h"):
        print(usage_of(words[1]) if words[1:] and words[1] in COMMANDS else USAGE)
        return None
    command = words.pop(0)
    if command in UNSUPPORTED:
        raise Error(f"runX does not support {command}")
    if command not in COMMANDS:
        raise Error(f"unknown command {command!r}: see runX --help", 3)  # runc's exit status
    command_options: JsonObject = {}
    arguments = parse_options(command, words, command_options)
    if "help" in command_options:
        print(usage_of(command))
        return None
    return Invocation(
        command=command, root=os.path.abspath(options.get("root", DEFAULT_ROOT)), log=log,
        systemd="systemd-cgroup" in options, options=command_options, arguments=arguments,
        attached=command in ("run", "exec") and "detach" not in command_options,
    )  # fmt: skip


def main(words: list[str]) -> int:
    """Run one command line; return the exit status.  The only place where an Error ends."""
    log, call, status = Log(), None, 1
    options: dict[str, Any] = {}
    try:
        try:
            words = parse_options("", words, options)
        finally:
            log = Log(options.get("log"), options.get("log-format") == "json", "debug" in options)
        call = parse_command(words, options, log)
        return (COMMANDS[call.command][0](call) or 0) if call else 0
    except Error as error:
        message, status = str(error), error.exit_status
    except KeyboardInterrupt:
        message = "interrupted"
    except OSError as error:
        message = f"cannot {' '.join([call.command, *call.arguments[:1]]) if call else 'run runX'}: {error}"
    except Exception as error:
        import traceback

        message = f"internal error: {error!r}"
        log.debug(traceback.format_exc())
    message = printable(message[:2000])
    if log.path or log.as_json:
        log.write("error", message)
    if log.path or not log.as_json:
        say(message)
    return status


def say(message: str) -> None:
    """Write it to standard error, if that can be."""
    try:
        print(f"runX: {message}", file=sys.stderr, flush=True)
    except OSError:
        pass


def run() -> NoReturn:
    """main() as a whole process, which ends without Python's tidying up: that is a tenth of what `state` takes."""
    gc.freeze()  # what is loaded stays, and what we fork shares it: no collection must look at it, and so write to it
    open_standard()
    signal = import_core("signal")
    signal.signal(SIGCHLD, signal.SIG_DFL)  # a caller may ignore it, and then there is nobody to wait for
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        if status == 0:  # else something has been said
            say(f"cannot write to standard output: {error.strerror}")
        status = status or 1
    os._exit(status)


def open_standard() -> None:
    """Have 0, 1 and 2 open, as Go has it: what we open must not get the number of one that the caller has closed."""
    while (fd := os.open("/dev/null", os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")


if __name__ == "__main__":
    run()
