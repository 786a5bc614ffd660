# SPDX-License-Identifier: Apache-2.0
"""A container's served files: as on a local file system, and the same as dom0's at every moment."""

import ast
import concurrent.futures
import contextlib
import ctypes
import inspect
import json
import mmap
import os
import pathlib
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import zlib

import pytest
from conftest import (
    ALL_CAPABILITIES,
    PROGRAM_MOUNTS,
    Bundle,
    call,
    closing,
    config,
    file_servers,
    wait_for,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("clean_dom0")

PROGRAM = pathlib.Path(__file__).with_name("files_guest.py")
# What a program can see in served files that is not as on a local ext4: {check of files_guest.py: the reason}
DIFFERENCES = {
    "ranges_are_collapsed_and_inserted": "FUSE has no operation for it: EOPNOTSUPP, as on tmpfs",
    "setgid_of_no_program_goes_with_a_write": "FUSE's server is not told the writer's groups",
    "setuid_goes_with_chown_to_nobody_else": "FUSE does not tell the server of it",
    "reading_moves_atime": "dom0 says when: in the lab its file system is mounted noatime",
    "birth_times": "FUSE's attributes have none; the server has no statx",
    "writing_where_no_file_can_be": "what is written is sent later: EFBIG and ENOSPC come at fsync or close",
    "file_handles": "of a file that the guest's kernel has forgotten: ESTALE",
    "inode_flags": "chattr is an ioctl, of which the server has none: ENOTTY",
}
# Those that also run on a volume, which the same server serves in the same way
ON_A_VOLUME = (
    "changes_of_a_file_renamed_over", "reading_of_a_file_made_anew_by_another", "mapping_of_a_removed_file",
    "use_of_an_unlinked_file", "inotify_of_a_file", "capabilities_of_a_program", "setuid_goes_with_a_change",
    "attributes_of_every_kind", "access_control_lists", "allocation_of_space", "what_moves_times",
    "what_only_owners_may", "renaming_of_folders", "nameless_files", "random_operations", "locks_by_flock",
)  # fmt: skip


def bind(source, destination, *options):
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", *options]}


def python_config(*args, memory=160, capabilities=ALL_CAPABILITIES):
    """A config of a container that has dom0's Python; memory: the VM's, in MiB."""
    spec = config("/usr/bin/python3", *args, env=["PATH=/usr/bin:/bin"])
    spec["mounts"] += PROGRAM_MOUNTS
    spec["process"]["capabilities"] = {name: capabilities for name in ("bounding", "effective", "permitted")}
    spec["annotations"] = {"org.runx.memory": str(memory)}
    return spec


@pytest.fixture
def stored():
    """A bundle on dom0's disk: in the lab /tmp is a tmpfs, which can less."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield from closing(Bundle(pathlib.Path(folder)))


# ---- within the VM


def failures(bundle, spec):
    """Run a container with the program; return what has failed each time that it runs, {check: why}, and print it."""
    result = bundle.run(spec, timeout=600)
    lines = result.stdout.decode(errors="replace").splitlines()
    runs, found = [], {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FAIL":
            name, _, found[name] = rest.partition(": ")
        elif word == "#":
            runs.append(found)
            found = {}
    print(*(line for line in lines if not line.startswith("ok ")), sep="\n")
    assert lines and lines[-1].startswith("# seed"), (result, bundle.log.read_text())
    assert (result.returncode, result.stderr) == (0, b""), result
    return runs


def test_served_files_are_as_on_a_local_file_system(stored):
    """Those of the rootfs, and of a volume."""
    shutil.copy(PROGRAM, stored.rootfs)
    program = f"/usr/bin/python3 -IS /{PROGRAM.name}"
    spec = python_config()
    spec["process"]["args"] = ["sh", "-c", f"{program} /work; exec {program} /volume/work {' '.join(ON_A_VOLUME)}"]
    (stored.folder / "volume").mkdir()
    spec["mounts"].append(bind(stored.folder / "volume", "/volume"))
    found, of_a_volume = failures(stored, spec)
    assert {name: why for name, why in found.items() if name not in DIFFERENCES} == {} == of_a_volume
    assert DIFFERENCES.keys() - found.keys() == set(), "these pass now"


def test_a_block_device_is_a_local_file_system(bundle):
    """The same program where no file is served: what fails here, the program has wrong."""
    shutil.copy(PROGRAM, bundle.rootfs)
    image = bundle.folder / "image"
    command = ["mkfs.ext4", "-q", "-b", "4096", "-I", "256", "-d", str(bundle.rootfs), str(image), "128m"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    spec = python_config("-IS", f"/{PROGRAM.name}", "/work")
    spec["root"]["path"] = str(image)
    spec["annotations"]["org.runx.rootfs"] = "block"
    assert failures(bundle, spec) == [{}]


# ---- on both sides


def brief(content):
    """What both sides say of a content: a console is slow."""
    if len(content) <= 40:
        return content
    return f"{len(content)} bytes, {content.count(0)} of them NUL, {zlib.crc32(content):08x}"


def kept(fd):
    """Return how many pages of a file the kernel has at hand, after a look at what the server says of it."""
    size = os.fstat(fd).st_size
    pages = ctypes.create_string_buffer(-(-size // 4096))
    with mmap.mmap(fd, size) as memory:
        place = ctypes.c_char.from_buffer(memory)
        error = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size), pages)
        del place
    return -1 if error else sum(page & 1 for page in pages.raw)


INTERPRETER = f"""
import ctypes, mmap, os, zlib
{inspect.getsource(brief)}
{inspect.getsource(kept)}
import ast, errno, mmap, os, signal, socket, subprocess, sys
def get(path):
    with open(path, "rb", 0) as file:
        return brief(file.read())
def read(fd, offset=0):
    return brief(os.pread(fd, 400000, offset))
def put(path, content):
    with open(path, "wb", 0) as file:
        file.write(content)
def drop():
    os.sync()
    put("/proc/sys/vm/drop_caches", b"3")
print("ready", flush=True)
spaces = {{}}
for line in sys.stdin:
    try:
        asker, text = ast.literal_eval(line)
        names = spaces.setdefault(asker, dict(globals()))
        try:
            code = compile(text, "text", "eval")
        except SyntaxError:
            exec(compile(text, "text", "exec"), names)
            result = None
        else:
            result = eval(code, names)
    except OSError as error:
        result = errno.errorcode[error.errno]
    print(repr(result), flush=True)
"""


class Guest:
    """A Python in a container, which does what it is told; each of our threads has variables of its own there."""

    def __init__(self, process):
        self.process, self.lock = process, threading.Lock()

    def __call__(self, text, **values):
        """Let it execute a statement, or evaluate an expression, with these values for its {names}; return the result:
        the name of the errno if it has raised OSError."""
        text = text.format(**{name: repr(value) for name, value in values.items()})
        with self.lock:
            self.process.stdin.write(f"{(threading.get_ident(), text)!r}\n")
            self.process.stdin.flush()
            return ast.literal_eval(self.line(text))

    def line(self, what):
        """Return what it says next; fail after 60 s."""
        assert select.select([self.process.stdout], [], [], 60)[0], f"still no answer after 60 s: {what!r}"
        line = self.process.stdout.readline()
        assert line, f"the container has ended at {what!r}"
        return line


@contextlib.contextmanager
def guest_of(bundle, spec):
    """Run a container with INTERPRETER; yield its Guest."""
    bundle.write_config(spec)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(bundle.command("run"), text=True, **pipes) as process:
        guest = Guest(process)
        try:
            assert guest.line("begin") == "ready\n"
            yield guest
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


class Both:
    """A folder as dom0 has it (host) and as the guest has it (path)."""

    def __init__(self, guest, host, path):
        self.guest, self.host, self.path = guest, host, path

    def at(self, name):
        return f"{self.path}/{name}"

    def put(self, name, content):
        (self.host / name).write_bytes(content)

    def replace(self, name, content):
        """As editors and engines do it."""
        self.put(f".{name}", content)
        os.rename(self.host / f".{name}", self.host / name)

    def get(self, name):
        return self.guest("get({path})", path=self.at(name))

    def set(self, name, content):
        """Give a file new content, and wait until the guest sees it."""
        self.put(name, content)
        wait_until(lambda: self.get(name) == brief(content), f"the new content of {name}", 3)

    def becomes(self, new, old, text, **values):
        """What the guest sees is the new at once or after the second that a cache may have; until then the old, and
        never something else.  new, old: contents, or what else the text may be."""
        new, old = (brief(each) if isinstance(each, bytes) else each for each in (new, old))
        seen = []

        def look():
            seen.append(self.guest(text, **values))
            assert seen[-1] in (new, old), f"{seen[-1]!r}, neither {new!r} nor {old!r}"
            return seen[-1] == new

        wait_until(look, f"{new!r} instead of {old!r}", 3)

    def content_becomes(self, new, old, name):
        self.becomes(new, old, "get({path})", path=self.at(name))


OLD, SHORT, LONG = b"old content, " * 1000, b"short", b"long content, " * 4000


def replaced(both):
    """The guest has it closed, open, mapped; what it has open stays."""
    for new in (SHORT, LONG):
        both.set("f", OLD)
        both.guest("fd = os.open({path}, os.O_RDWR); memory = mmap.mmap(fd, 0)", path=both.at("f"))
        both.replace("f", new)
        both.content_becomes(new, OLD, "f")
        for _ in range(2):
            assert both.guest("read(fd)") == brief(OLD), "the open file"
            assert both.guest("(os.fstat(fd).st_size, brief(memory[:]))") == (len(OLD), brief(OLD)), "the mapping"
            both.guest("memory.madvise(mmap.MADV_DONTNEED); drop()")
        both.guest("os.ftruncate(fd, 0); os.close(fd); memory.close()")
        assert (both.host / "f").read_bytes() == new


def removed(both):
    both.put("f", OLD)
    both.guest("fd = os.open({path}, os.O_RDWR); memory = mmap.mmap(fd, 0)", path=both.at("f"))
    assert both.get("f") == brief(OLD)
    (both.host / "f").unlink()
    both.content_becomes("ENOENT", OLD, "f")
    both.guest("memory.madvise(mmap.MADV_DONTNEED); drop()")
    wanted = (len(OLD), brief(OLD), brief(OLD))
    assert both.guest("(os.fstat(fd).st_size, brief(memory[:]), read(fd))") == wanted
    both.guest("os.close(fd); memory.close()")


def made(both):
    """A name that the guest has looked for in vain."""
    assert both.get("new") == "ENOENT"
    both.put("new", SHORT)
    both.content_becomes(SHORT, "ENOENT", "new")
    assert "new" in both.guest("os.listdir({path})", path=both.path)


def made_anew(both):
    """Its inode number may be that of the one before."""
    for number, content in enumerate((SHORT, LONG, OLD)):
        both.set("f", b"%d" % number)
        (both.host / "f").unlink()
        both.put("f", content)
        both.becomes(content, b"%d" % number, "get({path})", path=both.at("f"))
        (both.host / "f").unlink()
        both.becomes("ENOENT", content, "get({path})", path=both.at("f"))
        (both.host / "f").mkdir()
        both.becomes("EISDIR", "ENOENT", "get({path})", path=both.at("f"))
        (both.host / "f").rmdir()
        (both.host / "f").symlink_to("target")
        both.becomes("target", "EINVAL", "os.readlink({path})", path=both.at("f"))
        (both.host / "f").unlink()


def truncated(both):
    for new in (b"", OLD[:5], OLD[:5000]):
        both.set("f", OLD)
        both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("f"))
        os.truncate(both.host / "f", len(new))
        both.content_becomes(new, OLD, "f")
        both.becomes(new, OLD, "read(fd)")
        both.guest("os.close(fd)")


def changed_in_place(both):
    """The size is the same."""
    both.put("f", OLD)
    both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("f"))
    assert both.get("f") == brief(OLD)
    with open(both.host / "f", "r+b") as file:
        file.write(b"OLD")
    new = b"OLD" + OLD[3:]
    both.content_becomes(new, OLD, "f")
    both.becomes(new, OLD, "read(fd)")
    both.guest("os.close(fd)")


def changed_in_place_beside_what_is_unsent(both):
    """In another page than what the guest has written and not sent yet; that is not lost."""
    both.set("f", LONG)
    both.guest("fd = os.open({path}, os.O_RDWR)", path=both.at("f"))
    assert both.guest("read(fd)") == brief(LONG)
    both.guest("os.pwrite(fd, b'GUEST', 40000)")
    with open(both.host / "f", "r+b") as file:
        file.write(b"DOM0")
    old = LONG[:40000] + b"GUEST" + LONG[40005:]
    new = b"DOM0" + old[4:]
    both.becomes(new, old, "read(fd)")
    both.guest("os.close(fd)")
    assert (both.host / "f").read_bytes() == new


def opened_and_read(both):
    """A file of 14 pages, which the guest has open as fd, and all of it at hand."""
    both.set("f", LONG)
    both.guest("fd = os.open({path}, os.O_RDWR)", path=both.at("f"))
    assert both.guest("(read(fd), kept(fd))") == (brief(LONG), 14)


def synchronized_twice_within_a_tick(both):
    """The guest's clock gives both writes one time, and dom0's another one: what is at hand is right nevertheless."""
    opened_and_read(both)
    both.guest("""if True:
        found = []
        for number in range(100):
            for _ in range(2):
                os.pwrite(fd, b"x", number)
                os.close(os.dup(fd))
            found.append(kept(fd))
        os.close(fd)""")
    assert both.guest("set(found)") == {14}


def allocated_beside_looks(both):
    """By which the time changes that dom0 tells before the guest has sent its own."""
    opened_and_read(both)
    both.guest("""if True:
        pid, found = os.fork(), []
        while not pid:
            os.fstat(fd)
        for number in range(200):
            done = ctypes.CDLL(None).fallocate(fd, 1, ctypes.c_long(100_000 + number), ctypes.c_long(1))
            found.append((done, kept(fd)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)""")
    assert both.guest("set(found)") == {(0, 14)}


def written_where_times_are_coarse(both):
    """What the guest has set the time to, dom0 tells it otherwise."""
    opened_and_read(both)
    stamps = "(kept(fd), os.fstat(fd).st_mtime_ns % 10**9)"
    for sending in ("os.fsync(fd)", "os.close(os.dup(fd))", "os.utime(fd, ns=(5, 10**18 + 5))", "os.sync()"):
        both.guest(f"os.pwrite(fd, b'x', 0); {sending}")
        assert both.guest(stamps) == (14, 0), sending
    both.guest("os.close(fd)")


def changed_in_place_before_its_mode(both):
    """The guest changes the mode, and what it knows of the content is no newer by that."""
    both.put("f", b"old words")
    both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("f"))
    assert both.guest("read(fd)") == b"old words"
    with open(both.host / "f", "r+b") as file:
        file.write(b"new words")
    both.guest("os.fchmod(fd, 0o600)")
    both.becomes(b"new words", b"old words", "read(fd)")
    both.guest("os.close(fd)")


def grown_for_lseek(both):
    """Which alone asks for the size, at the end of the second."""
    both.put("f", OLD)
    both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("f"))
    assert both.guest("os.lseek(fd, 0, os.SEEK_END)") == len(OLD)
    with open(both.host / "f", "ab") as file:
        file.write(SHORT)
    both.becomes(len(OLD + SHORT), len(OLD), "os.lseek(fd, 0, os.SEEK_END)")
    both.guest("os.close(fd)")


def appended(both):
    """As `tail -f` waits for it."""
    both.put("f", OLD)
    both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("f"))
    content = OLD
    for line in (b"one\n", LONG, b"three\n"):
        assert both.guest("read(fd)") == brief(content)
        with open(both.host / "f", "ab") as file:
            file.write(line)
        both.becomes(line, b"", "read(fd, {offset})", offset=len(content))
        content += line
        both.becomes(len(content), len(content) - len(line), "os.fstat(fd).st_size")
    both.content_becomes(content, content, "f")
    both.guest("os.close(fd)")


def appended_by_both(both):
    both.put("f", b"")
    both.guest("fd = os.open({path}, os.O_WRONLY | os.O_APPEND)", path=both.at("f"))
    with open(both.host / "f", "ab", 0) as file:
        for number in range(10):
            both.guest("os.write(fd, {line})", line=b"guest %d\n" % number)
            file.write(b"host %d\n" % number)
    both.guest("os.close(fd)")
    wanted = b"".join(b"guest %d\nhost %d\n" % (number, number) for number in range(10))
    assert (both.host / "f").read_bytes() == wanted


def rotated(both):
    """A log that the guest writes: renamed and made anew; and copied and truncated, after which it begins at 0."""
    both.put("log", b"")
    both.guest("fd = os.open({path}, os.O_WRONLY | os.O_APPEND)", path=both.at("log"))
    both.guest("os.write(fd, b'first\\n')")
    os.rename(both.host / "log", both.host / "log.1")
    both.put("log", b"")
    both.guest("os.write(fd, b'second\\n')")
    assert (both.host / "log.1").read_bytes() == b"first\nsecond\n"
    wait_until(lambda: both.guest("os.stat({path}).st_size", path=both.at("log")) == 0, "the new log", 3)
    both.guest("os.close(fd); fd = os.open({path}, os.O_WRONLY | os.O_APPEND)", path=both.at("log"))
    both.guest("os.write(fd, b'third\\n')")
    assert (both.host / "log").read_bytes() == b"third\n"
    os.truncate(both.host / "log", 0)
    both.guest("os.write(fd, b'fourth\\n')")
    assert (both.host / "log").read_bytes() == b"fourth\n"
    both.guest("os.close(fd)")


def swapped(both):
    """A config map: `key` is a link to ..data/key, and ..data one to a folder, which is replaced as a whole."""

    def version(name, content):
        (both.host / name).mkdir()
        both.put(f"{name}/key", content)
        (both.host / "..data_tmp").symlink_to(name)
        os.rename(both.host / "..data_tmp", both.host / "..data")

    version("..1", OLD)
    (both.host / "key").symlink_to("..data/key")
    old = OLD
    for number, new in ((2, SHORT), (3, LONG), (4, OLD)):
        assert both.get("key") == brief(old)
        both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("key"))
        version(f"..{number}", new)
        shutil.rmtree(both.host / f"..{number - 1}")
        # ENOENT: the link's content is known for a moment longer than its target is there
        allowed = (brief(new), brief(old), "ENOENT")
        wait_until(lambda allowed=allowed: see(both, "key", allowed) == allowed[0], f"version {number}", 3)
        assert both.guest("read(fd)") == brief(old)
        both.guest("os.close(fd)")
        old = new


def see(both, name, allowed):
    seen = both.get(name)
    assert seen in allowed, seen
    return seen


def attributes(both):
    both.put("f", b"x")
    look = "(lambda s: (oct(s.st_mode), s.st_uid, s.st_gid, s.st_mtime_ns))(os.stat({path}))"
    before = both.guest(look, path=both.at("f"))
    os.chown(both.host / "f", 12, 34)
    os.chmod(both.host / "f", 0o4751)
    os.utime(both.host / "f", ns=(5, 10**18 + 5))
    both.becomes(("0o104751", 12, 34, 10**18 + 5), before, look, path=both.at("f"))
    os.setxattr(both.host / "f", "user.x", b"1")
    both.becomes(b"1", "ENODATA", "os.getxattr({path}, 'user.x')", path=both.at("f"))
    os.setxattr(both.host / "f", "user.x", b"2")
    both.becomes(b"2", b"1", "os.getxattr({path}, 'user.x')", path=both.at("f"))


def folders(both):
    (both.host / "d/sub").mkdir(parents=True)
    both.put("d/sub/f", OLD)
    listing = "sorted(os.listdir({path}))"
    assert both.guest(listing, path=both.at("d")) == ["sub"]
    both.guest("os.chdir({path})", path=both.at("d/sub"))
    for number in range(5):
        both.put(f"d/{number}", b"")
        wanted = sorted(["sub", *map(str, range(number + 1))])
        both.becomes(wanted, wanted[:-2] + ["sub"], listing, path=both.at("d"))
    os.rename(both.host / "d", both.host / "e")
    both.becomes(OLD, "ENOENT", "get({path})", path=both.at("e/sub/f"))
    both.becomes("ENOENT", OLD, "get({path})", path=both.at("d/sub/f"))
    assert both.guest("get('f')") == brief(OLD), "below the working directory"
    both.guest("put('g', b'made')")
    assert (both.host / "e/sub/g").read_bytes() == b"made"
    shutil.rmtree(both.host / "e")
    both.becomes("ENOENT", OLD, "get('f')")
    both.guest("os.chdir('/')")


def turned_inside_out(both):
    """A folder is in the one that was in it: the guest, which knows both, cannot have it in its own child."""
    (both.host / "a/b").mkdir(parents=True)
    both.guest("fd = os.open({path}, os.O_RDONLY)", path=both.at("a/b"))
    os.rename(both.host / "a/b", both.host / "b")
    os.rename(both.host / "a", both.host / "b/a")
    both.guest("""if True:
        pid = os.fork()
        if pid == 0:
            os._exit(os.listdir(fd) != ["a"])""")
    wait_until(lambda: both.guest("os.waitpid(pid, os.WNOHANG)") == both.guest("(pid, 0)"), "the listing", 30)
    both.guest("os.close(fd)")


def read_while_it_grows(both):
    """What the guest reads is the beginning of the file, each time."""
    content, states = os.urandom(300_000), {b""}
    both.put("f", b"")
    with open(both.host / "f", "ab", 0) as file:
        for end in range(20_001, len(content), 20_001):
            file.write(content[end - 20_001 : end])
            states.add(brief(content[:end]))
            see(both, "f", states)
    wait_until(lambda: both.get("f") == brief(content[:end]), "all of it", 3)


def seen_on_dom0(both):
    """What the guest has done, its content with fsync, close or msync."""
    both.guest("fd = os.open({path}, os.O_RDWR | os.O_CREAT)", path=both.at("f"))
    both.guest("os.write(fd, {old}); os.fsync(fd)", old=OLD)
    assert (both.host / "f").read_bytes() == OLD
    both.guest("memory = mmap.mmap(fd, 0); memory[:3] = b'map'; memory.flush(); memory.close()")
    assert (both.host / "f").read_bytes() == b"map" + OLD[3:]
    both.guest("os.ftruncate(fd, 2); os.fchmod(fd, 0o600); os.setxattr(fd, 'user.x', b'1')")
    assert (both.host / "f").read_bytes() == b"ma"
    assert (oct((both.host / "f").stat().st_mode), os.getxattr(both.host / "f", "user.x")) == ("0o100600", b"1")
    both.guest("os.rename({path}, {other}); os.close(fd)", path=both.at("f"), other=both.at("g"))
    assert [path.name for path in both.host.iterdir()] == ["g"]
    with open(both.host / "g", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        both.guest("put({path}, b'MA')", path=both.at("g"))
        assert memory[:] == b"MA"


def attributes_of_a_new_file(both):
    """They are there when it is closed, or gets a name; and what dom0 does with it meanwhile counts."""
    both.guest("fd = os.open({path}, os.O_RDWR | os.O_CREAT, 0o600); os.write(fd, b'x')", path=both.at("f"))
    both.guest("os.fchmod(fd, 0o644); os.utime(fd, ns=(10**18, 2 * 10**18)); os.link({path}, {other})",
               path=both.at("f"), other=both.at("g"))  # fmt: skip
    seen = (both.host / "g").stat()
    assert (oct(seen.st_mode), seen.st_atime_ns, seen.st_mtime_ns) == ("0o100644", 10**18, 2 * 10**18)
    both.guest("os.close(fd)")
    for closed in ("os.close(fd)", "os.fsync(fd)", "os.close(os.dup(fd))"):
        both.guest("fd = os.open({path}, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)", path=both.at("h"))
        both.guest("os.write(fd, b'x'); os.fchmod(fd, 0o755); os.utime(fd, ns=(10**18, 2 * 10**18)); " + closed)
        seen = (both.host / "h").stat()
        assert (oct(seen.st_mode), seen.st_atime_ns, seen.st_mtime_ns) == ("0o100755", 10**18, 2 * 10**18), closed
        (both.host / "h").unlink()
    both.guest("fd = os.open({path}, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)", path=both.at("i"))
    both.guest("os.fchmod(fd, 0o666)")
    both.put("i", LONG)
    os.utime(both.host / "i", ns=(10**18, 3 * 10**18))
    both.guest("os.close(fd)")
    seen = (both.host / "i").stat()
    assert (oct(seen.st_mode), seen.st_mtime_ns) == ("0o100666", 3 * 10**18)
    both.content_becomes(LONG, LONG, "i")


def owners(both):
    """As under runc: ids and modes are the same on both sides."""
    os.chmod(both.host, 0o777)
    both.guest("""if True:
        pid = os.fork()
        if pid == 0:
            os.setgroups([]); os.setgid(1001); os.setuid(1000); os.chdir({path})
            put("f", b""); os.mkdir("d"); os.symlink("x", "l"); os.mkfifo("p")
            socket.socket(socket.AF_UNIX).bind("s"); os.chmod("f", 0o4711)
            os._exit(0)
        os.waitpid(pid, 0)
        os.mknod({node}, 0o20640, os.makedev(1, 3))""", path=both.path, node=both.at("n"))  # fmt: skip
    found = {path.name: (path.lstat().st_uid, path.lstat().st_gid, oct(path.lstat().st_mode)) for path in
             both.host.iterdir()}  # fmt: skip
    assert found == {
        "f": (1000, 1001, "0o104711"), "d": (1000, 1001, "0o40755"), "l": (1000, 1001, "0o120777"),
        "p": (1000, 1001, "0o10644"), "s": (1000, 1001, "0o140755"), "n": (0, 0, "0o20640"),
    }  # fmt: skip
    assert (both.host / "n").stat().st_rdev == os.makedev(1, 3)


CASES = [
    replaced, removed, made, made_anew, truncated, changed_in_place, changed_in_place_before_its_mode, grown_for_lseek,
    appended, appended_by_both, rotated, swapped, attributes, folders, turned_inside_out, read_while_it_grows,
    seen_on_dom0, attributes_of_a_new_file, owners,
]  # fmt: skip
ALONE = [  # others drop the caches
    changed_in_place_beside_what_is_unsent, synchronized_twice_within_a_tick, allocated_beside_looks,
]  # fmt: skip
ON_THE_ROOTFS = [replaced, made, truncated, appended, appended_by_both, attributes, owners]  # the same server serves it


def no_space(both):
    """The error arrives, with fsync at the latest."""
    written = both.guest("""if True:
        fd = os.open({path}, os.O_WRONLY | os.O_CREAT)
        for _ in range(64): os.write(fd, bytes(65536))""", path=both.at("f"))  # fmt: skip
    assert "ENOSPC" in (written, both.guest("os.fsync(fd)"))
    assert both.guest("os.close(fd)") in (None, "ENOSPC")
    assert (both.host / "f").stat().st_size <= 1 << 20


def no_space_at_close(both):
    """Who has written is told, whoever else has closed the file before."""
    for first in ("os.close(other)", "os.close(os.dup(fd))", "subprocess.call(['true'])"):
        both.guest("fd = os.open({path}, os.O_RDWR | os.O_CREAT)", path=both.at("f"))
        both.guest("other = os.open({path}, os.O_RDONLY)", path=both.at("f"))
        written = both.guest("for _ in range(64): os.write(fd, bytes(65536))")
        both.guest(first)
        assert "ENOSPC" in (written, both.guest("os.close(fd)")), first
        both.put("f", b"")


def no_space_for_the_last_piece(both):
    """Of what the guest sends at once."""
    both.put("filled", bytes((1 << 20) - 5 * 4096))
    both.guest("fd = os.open({path}, os.O_WRONLY | os.O_CREAT); os.write(fd, bytes(25 * 4096))", path=both.at("f"))
    assert both.guest("os.fsync(fd)") == "ENOSPC"
    assert (both.host / "f").stat().st_size == 5 * 4096
    both.guest("os.close(fd)")


ON_A_SMALL_DISK = [no_space, no_space_at_close, no_space_for_the_last_piece]  # one after the other


def what_is_wrong(case, guest, host, path):
    """Run a case in a new folder of host, on dom0, which in the guest is path; return what was wrong, or ""."""
    (host / case.__name__).mkdir()
    try:
        case(Both(guest, host / case.__name__, f"{path}/{case.__name__}"))
    except AssertionError as error:
        return f"{path}: {case.__name__}: {error}".split("\n")[0]
    return ""


def on_a_small_disk(case, guest, host, path):
    """As what_is_wrong, and leave room for the next one, also where the guest does not forget a file."""
    wrong = what_is_wrong(case, guest, host, path)
    for file in (host / case.__name__).iterdir():
        file.write_bytes(b"")
    return wrong


@contextlib.contextmanager
def tmpfs(folder):
    folder.mkdir()
    assert call("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)).returncode == 0
    try:
        yield folder
    finally:
        call("umount", str(folder))


@contextlib.contextmanager
def coarse_times(folder):
    """An ext4 as old as has no room for parts of seconds."""
    folder.mkdir()
    image = folder.with_suffix(".image")
    command = ["mkfs.ext4", "-q", "-I", "128", str(image), "4m"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert call("mount", "-o", "loop", str(image), str(folder)).returncode == 0
    try:
        yield folder
    finally:
        call("umount", str(folder))


def test_what_one_side_changes_the_other_one_sees(stored):
    work, volume, file = stored.rootfs / "work", stored.folder / "volume", stored.folder / "one"
    work.mkdir()
    volume.mkdir()
    file.write_bytes(OLD)
    with tmpfs(stored.folder / "small") as small, coarse_times(stored.folder / "coarse") as coarse:
        spec = python_config("-ISc", INTERPRETER)
        spec["mounts"] += [bind(volume, "/volume"), bind(file, "/one"), bind(small, "/small"), bind(coarse, "/coarse")]
        with guest_of(stored, spec) as guest:
            # most of a case is waiting for the second that the guest may believe what it knows
            with concurrent.futures.ThreadPoolExecutor(5) as pool:
                jobs = [pool.submit(what_is_wrong, case, guest, volume, "/volume") for case in CASES]
                jobs += [pool.submit(what_is_wrong, case, guest, work, "/work") for case in ON_THE_ROOTFS]
                wrong = [job.result() for job in jobs]
            wrong += [what_is_wrong(case, guest, volume, "/volume") for case in ALONE]
            wrong.append(what_is_wrong(written_where_times_are_coarse, guest, coarse, "/coarse"))
            wrong += [on_a_small_disk(case, guest, small, "/small") for case in ON_A_SMALL_DISK]
            # a single file that is bound: what is written into it, as an engine does to resolv.conf
            one = Both(guest, stored.folder, "")
            for old, new in ((OLD, SHORT), (SHORT, LONG)):
                assert one.get("one") == brief(old)
                file.write_bytes(new)
                wait_until(lambda new=new: one.get("one") == brief(new), "the bound file's content", 3)
            assert list(filter(None, wrong)) == []


def test_names_of_one_file_below_an_overlay_are_files_of_their_own(stored):
    """Of dom0's, as engines make root file systems: the one that is changed is copied, and the others stay."""
    folders = {name: stored.folder / name for name in ("lower", "upper", "work", "merged")}
    for folder in folders.values():
        folder.mkdir()
    (folders["lower"] / "a").write_bytes(OLD)
    for name in "bc":
        os.link(folders["lower"] / "a", folders["lower"] / name)
    options = ",".join(f"{name}dir={folders[name]}" for name in ("lower", "upper", "work"))
    merged = folders["merged"]
    assert call("mount", "-t", "overlay", "-o", options, "none", str(merged)).returncode == 0
    try:
        spec = python_config("-ISc", INTERPRETER)
        spec["mounts"].append(bind(merged, "/merged"))
        with guest_of(stored, spec) as guest:
            both = Both(guest, merged, "/merged")
            assert [both.get(name) for name in "abc"] == [brief(OLD)] * 3
            guest("os.chmod('/merged/b', 0o600); put('/merged/c', b'changed')")
            modes = [oct(os.stat(merged / name).st_mode) for name in "abc"]
            assert modes == ["0o100644", "0o100600", "0o100644"]
            assert modes == guest("[oct(os.stat('/merged/' + name).st_mode) for name in 'abc']")
            assert [both.get(name) for name in "abc"] == [brief(OLD), brief(OLD), b"changed"]
            assert [brief((merged / name).read_bytes()) for name in "abc"] == [brief(OLD), brief(OLD), b"changed"]
    finally:
        assert call("umount", str(merged)).returncode == 0


def test_a_guest_that_knows_as_many_files_as_it_may_forgets_some_for_others(stored):
    """With a limit that comes sooner than the server's own."""
    (stored.rootfs / "many").mkdir()
    for number in range(150):
        (stored.rootfs / f"many/{number}").write_text(f"{number}")
    before = file_servers()
    with guest_of(stored, python_config("-ISc", INTERPRETER)) as guest:
        (server,) = file_servers() - before
        most = len(os.listdir(f"/proc/{server}/fd")) + 50
        resource.prlimit(server, resource.RLIMIT_NOFILE, (most, most))
        for _ in range(2):
            assert guest("sum(int(get('/many/%d' % number)) for number in range(150))") == sum(range(150))
        # what it has open it cannot forget
        guest("fds = []")
        opening = "[fds.append(os.open('/many/%d' % number, os.O_RDWR)) for number in range(150)]"
        assert guest(opening) == "ENFILE"
        guest("[os.close(fd) for fd in fds]")
        assert guest("get('/many/149')") == b"149"


def test_a_container_whose_file_server_is_killed_ends_at_once_with_a_sentence(bundle):
    before = file_servers()
    pidfd = bundle.started(config("sh", "-c", "echo begun; while :; do echo x >/tmp/file; done"))
    bundle.wait_for_output("begun\n")
    (server,) = file_servers() - before
    os.kill(server, signal.SIGKILL)
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    logged = [json.loads(line) for line in bundle.log.read_text().splitlines()]
    assert any("its files are not served any more: its process was killed" in line["msg"] for line in logged), logged
    bundle.succeed("delete")


# ---- what has no size


@pytest.fixture
def device():
    """A network device of dom0's, for what is written to its files."""
    name = f"rx{os.getpid() % 100000}"
    assert call("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p").returncode == 0
    yield pathlib.Path("/sys/class/net") / name
    call("ip", "link", "delete", name)


def pseudo_config(*, capabilities):
    spec = python_config("-ISc", INTERPRETER, capabilities=capabilities)
    cgroup = "/sys/fs/cgroup/unified" if os.path.isdir("/sys/fs/cgroup/unified") else "/sys/fs/cgroup"
    spec["mounts"] += [
        bind("/proc", "/h", "ro"), bind("/proc/meminfo", "/meminfo", "ro"), bind("/sys", "/host/sys"),
        bind(cgroup, "/host/cgroup", "ro"),
    ]  # fmt: skip
    return spec


def test_files_without_a_size_are_read_and_written_as_under_runc(bundle, device):
    with guest_of(bundle, pseudo_config(capabilities=ALL_CAPABILITIES)) as guest:
        for path in ("/h/meminfo", "/meminfo"):
            assert guest("open({path}, 'rb').read(9)", path=path) == b"MemTotal:", path
        assert guest("open('/h/stat', 'rb').read(4)") == b"cpu "
        assert " 0 of them NUL" in guest("get('/h/stat')")
        for path in ("/meminfo", "/host/sys/class/net/lo/mtu"):
            sent = guest("os.sendfile(os.memfd_create('x'), os.open({path}, os.O_RDONLY), None, 5)", path=path)
            assert sent == 5, path
        assert len(guest("get('/h/uptime')").split()) == 2
        assert guest("get('/h/sys/kernel/ostype')") == b"Linux\n"
        assert guest("put('/h/sys/kernel/hostname', b'no')") == "EROFS"
        assert guest("get('/host/sys/class/net/lo/mtu')") == b"65536\n"
        assert guest("os.pread(os.open('/host/sys/class/net/lo/mtu', os.O_RDONLY), 3, 2)") == b"536"
        mtu = f"/host{device}/mtu"
        assert guest("get({mtu})", mtu=mtu) == b"1500\n"
        assert guest("put({mtu}, b'bogus')", mtu=mtu) == "EINVAL"
        assert (device / "mtu").read_text() == "1500\n"
        assert guest("put({mtu}, b'1400')", mtu=mtu) is None
        assert (device / "mtu").read_text() == "1400\n"
        assert guest("get({mtu})", mtu=mtu) == b"1400\n"
        assert guest("open('/host/cgroup/cgroup.procs', 'rb').readline()") == b"1\n"
        assert guest("put('/host/cgroup/cgroup.procs', b'1')") == "EROFS"


def test_without_its_capability_root_in_the_vm_does_not_write_as_dom0s_root(bundle, device):
    capabilities = [name for name in ALL_CAPABILITIES if name != "CAP_NET_ADMIN"]
    with guest_of(bundle, pseudo_config(capabilities=capabilities)) as guest:
        for content in (b"1400", b"bogus"):
            assert guest("put({mtu}, {content})", mtu=f"/host{device}/mtu", content=content) == "EPERM"
        assert guest("get({mtu})", mtu=f"/host{device}/mtu") == b"1500\n"
    assert (device / "mtu").read_text() == "1500\n"
