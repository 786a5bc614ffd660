# SPDX-License-Identifier: Apache-2.0
"""Bytes that others read: cpio archives, xl's configuration, console rings.

What is expected comes from the others: from busybox's cpio, from the structs of Xen's headers, or worked out by hand.
"""

import ctypes
import fcntl
import gzip
import itertools
import json
import mmap
import os
import stat
import subprocess
from types import SimpleNamespace

import pytest

import runx


def unpacked(archive, folder):
    """Have busybox unpack an archive into a folder; return it."""
    folder.mkdir()
    command = ["busybox", "cpio", "-i", "-d", "-H", "newc"]
    done = subprocess.run(command, cwd=folder, input=archive, capture_output=True)
    assert done.returncode == 0, done
    return folder


def names_in(archive):
    """The names of the members, in their order, as busybox lists them."""
    done = subprocess.run(["busybox", "cpio", "-t", "-H", "newc"], input=archive, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_bytes(b"12345")
    (source / "sub/file").chmod(0o755)
    (source / "link").symlink_to("sub/file")
    os.mkfifo(source / "fifo")
    return source


def test_a_packed_ramdisk_holds_the_folder_and_is_reproducible(folder, tmp_path):
    runx.pack_initrd(str(folder), str(tmp_path / "one"))
    os.utime(folder / "sub/file", (1, 1))
    runx.pack_initrd(str(folder), str(tmp_path / "two"))
    first = (tmp_path / "one").read_bytes()
    assert first == (tmp_path / "two").read_bytes()
    archive = gzip.decompress(first)
    assert names_in(archive) == ["fifo", "link", "sub", "sub/file"]
    found = unpacked(archive, tmp_path / "found")
    assert (found / "sub/file").read_bytes() == b"12345"
    assert stat.filemode((found / "sub/file").stat().st_mode) == "-rwxr-xr-x"
    assert os.readlink(found / "link") == "sub/file"
    assert (found / "fifo").is_fifo()


def test_a_member_has_the_bytes_that_the_kernels_documentation_defines():
    """driver-api/early-userspace/buffer-format.rst: a magic and thirteen numbers; each part ends at four bytes."""
    expected = (
        b"070701" b"00000001" b"000081A4" b"00000000" b"00000000" b"00000001" b"00000000" b"00000003"
        b"00000000" b"00000000" b"00000000" b"00000000" b"00000002" b"00000000" b"a\0" b"xyz\0"
    )  # fmt: skip
    assert b"".join(runx.cpio_members([("a", 0o100644, b"xyz", 0)]))[: len(expected)] == expected


@pytest.mark.parametrize("size", range(0, 9))
def test_members_are_aligned_whatever_their_size(tmp_path, size):
    archive = b"".join(runx.cpio_members([("n" * (size + 1), 0o100644, b"x" * size, 0), ("after", 0o100644, b"y", 0)]))
    found = unpacked(archive, tmp_path / "found")
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {"n" * (size + 1): b"x" * size, "after": b"y"}


def test_a_share_is_packed_for_the_guest_and_no_name_leads_out_of_it(folder, tmp_path):
    os.link(folder / "sub/file", folder / "same")
    (folder / "sub/out").symlink_to("/etc")
    (folder / "rootless").mkdir(0o500)
    with open(tmp_path / "ramdisk", "wb") as output:
        assert runx.pack_share(output, str(folder), 64) == {}
    archive = (tmp_path / "ramdisk").read_bytes()
    found = unpacked(archive, tmp_path / "found")
    folders = [name for name in names_in(archive) if (found / name).is_dir() and not (found / name).is_symlink()]
    assert folders == ["mnt", "mnt/rootless", "mnt/sub"]
    assert os.readlink(found / "mnt/sub/out") == "/etc"
    assert (found / "mnt/same").read_bytes() == b"12345" and (found / "mnt/same").samefile(found / "mnt/sub/file")
    assert archive.count(b"12345") == 1, "the second name has no content"


def test_a_share_that_changes_while_it_is_packed(folder, tmp_path, monkeypatch):
    """Another container that has the volume too makes a folder a link to dom0's files."""
    walk = runx.walk

    def interrupted(share):
        for member in walk(share):
            yield member
            if member.path == "sub":
                os.rename(folder / "sub", folder / "gone")
                (folder / "sub").symlink_to("/etc")

    monkeypatch.setattr(runx, "walk", interrupted)
    with open(tmp_path / "ramdisk", "wb") as output:
        runx.pack_share(output, str(folder), 64)
    assert "mnt/sub" in (names := names_in((tmp_path / "ramdisk").read_bytes()))
    assert not [name for name in names if name.startswith("mnt/sub/")]


@pytest.mark.parametrize(
    "function", [("umount2", "/no/such/path", 0), ("syscall", -1), ("mount", None, "/no", None, 0, None)]
)
def test_a_function_of_the_c_library_that_fails_is_an_error(function):
    with pytest.raises(OSError):
        runx.system_call(*function)


@pytest.mark.parametrize(
    "value", [None, True, 0, -1.5, 'a"\n\ud800é', [], {}, [1, [2, {}]], {"a": {"b": [False]}, "c": []}]
)
def test_json_is_as_the_library_writes_and_reads_it(value):
    assert runx.json_text(value, 2) == json.dumps(value, indent=2)
    assert runx.json_text(value) == json.dumps(value, separators=(",", ":")), "runc's is compact, and some grep for it"
    assert runx.parse_json(f" {json.dumps(value, indent=1)}\n") == value


@pytest.mark.parametrize("text", ["", " ", "{", "[1,]", '{"a"}', "x", "1 2", "\ufeff{}"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match="."):
        runx.parse_json(text)


def test_strings_for_xl_are_quoted():
    assert runx.quote('a"b\\c\nd\re') == '"a\\"b\\\\c\\nd\\re"'
    assert runx.quote("$`;#'é") == '"$`;#\'é"'


def test_xl_config_has_one_setting_a_line():
    text = runx.xl_config({"name": 'x"', "memory": 64, "cpus": "", "irqs": [], "cap": 0, "p9": ["tag=a", "tag=b"]})
    assert text == 'name = "x\\""\nmemory = 64\ncap = 0\np9 = [ "tag=a", "tag=b" ]\n'


def test_xl_errors_are_told_without_their_position():
    output = (
        "Parsing config from /x\n"
        "libxl: error: libxl_create.c:1720:domcreate_rebuild_done: Domain 3:cannot (re-)build domain: -3\n"
        "libxl: error: libxl_create.c:1720:domcreate_rebuild_done: Domain 3:cannot (re-)build domain: -3\n"
    )
    assert runx.xl_errors(output) == "cannot (re-)build domain: -3"
    assert runx.xl_errors("") == "xl gave no reason"


@pytest.fixture
def looks(tmp_path, monkeypatch):
    """The calls of xl for the domains 0 and 5, which are alive, 6, which is being destroyed, and 7, which has crashed;
    the clock shows 9.0 when seen_alive() asks first, and half more each time."""
    lines = (
        "libxl: info: some message\n",
        "Name                                        ID   Mem VCPUs\tState\tTime(s)\n",
        "Domain-0                                     0  1024     1\tr-----\t  23.0\n",
        "a name with blanks                           5    64     1\t-b----\t   2.1\n",
        "(null)                                       6    64     1\t--p--d\t   2.1\n",
        "runx-crashed                                 7    64     1\t---sc-\t   2.1\n",
    )
    found, clock = [], itertools.count(9, 0.5)
    monkeypatch.setattr(runx, "LIVING_FILE", str(tmp_path / "living"))
    monkeypatch.setattr(runx, "xl", lambda *args: (0, found.append(args) or "".join(lines)))
    monkeypatch.setattr(runx.time, "monotonic", lambda: next(clock))
    return found


def test_every_end_is_followed_by_a_look(looks, tmp_path):
    assert [runx.seen_alive(domid) for domid in (5, 6, 7, 8)] == [True, False, False, False]
    assert looks == [("list",)] * 4
    assert (tmp_path / "living").read_text().split()[1:] == ["0", "5"]
    assert (tmp_path / "living").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("domid, alive", [(6, True), (5, False)])
def test_monitors_share_a_look_that_began_after_they_asked(looks, tmp_path, domid, alive):
    (tmp_path / "living").write_text("9.25 0 6")
    assert runx.seen_alive(domid) is alive
    assert not looks


@pytest.mark.parametrize("content", [b"8.5 0 6", b"13.0 0 6", b"", b"8.", b"garbage", b"9.25 6 x", b"\xff\xfe"])
def test_a_look_that_is_old_or_not_understood_is_not_believed(looks, tmp_path, content):
    (tmp_path / "living").write_bytes(content)
    assert not runx.seen_alive(6)
    assert len(looks) == 1


def test_without_a_look_no_domain_is_taken_for_alive(looks, tmp_path, monkeypatch):
    monkeypatch.setattr(runx.time, "sleep", lambda _: None)
    with open(tmp_path / "living", "w") as file:  # by somebody who does not come back
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not runx.seen_alive(5)
        assert not looks
    monkeypatch.setattr(runx, "xl", lambda *args: (1, "xl: cannot say\n"))
    assert not runx.seen_alive(5)
    monkeypatch.setattr(runx, "LIVING_FILE", str(tmp_path / "no such folder/living"))
    assert not runx.seen_alive(5)


def test_a_half_built_domain_is_the_one_whose_line_begins_with_the_uuid(monkeypatch):
    uuid, other = "11111111-2222-4333-8444-555555555555", "66666666-2222-4333-8444-555555555555"
    lines = ["", "UUID                                  ID    name", f"{other}    7    {uuid} 9", f"{uuid}    8    x"]
    for count, domid in ((2, None), (3, None), (4, 8)):
        monkeypatch.setattr(runx, "xl", lambda *_, shown=lines[:count]: (0, "\n".join(shown) + "\n"))
        found = runx.find_domain(SimpleNamespace(list=lambda path: []), uuid)
        assert (found and found.domid) == domid


class Interface(ctypes.Structure):
    """struct xencons_interface of xen/include/public/io/console.h, as far as it is used; `in` is a word of Python."""

    _fields_ = [
        ("input", ctypes.c_ubyte * 1024), ("output", ctypes.c_ubyte * 2048), ("in_cons", ctypes.c_uint32),
        ("in_prod", ctypes.c_uint32), ("out_cons", ctypes.c_uint32), ("out_prod", ctypes.c_uint32),
    ]  # fmt: skip

    def write(self, data):
        """As the guest does: indexes are not taken modulo the ring's size, positions are."""
        for byte in data:
            self.output[self.out_prod & 2047] = byte
            self.out_prod += 1


class Channels:
    """Event channels: what is bound, and how often it was notified."""

    def __init__(self):
        self.bound, self.notified = [], []

    def bind(self, domid, port):
        self.bound.append((domid, port))
        return 11

    def notify(self, port):
        self.notified.append(port)


class Frontend(dict):
    """What a guest has written to xenstore."""

    def read(self, path):
        return self.get(path.rpartition("/")[2])

    def read_numbers(self, *paths):
        return [int(self.read(path)) for path in paths]

    def transaction(self, work):
        work()

    def write(self, path, value):
        self[path.rpartition("/")[2]] = value


@pytest.fixture
def console(monkeypatch):
    """Console 1 of domain 7, connected; its page is our own memory, and the test is the guest: console.guest."""
    page, requests, opened = mmap.mmap(-1, 4096), [], os.open
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, number, request: requests.append((number, bytes(request))))
    monkeypatch.setattr(mmap, "mmap", lambda *args, **options: page)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, *args: opened("/dev/null" if path == "/dev/xen/gntdev" else path, *args))
        xenstore = Frontend({"state": "3", "ring-ref": "8", "port": "5"})
        console = runx.Console(runx.Domain(xenstore, 7, ""), 1, Channels())
        console.follow()
        assert console.xenstore["state"] == "3"
        for _ in range(2):
            console.confirm()
    # struct ioctl_gntdev_map_grant_ref: count, padding, index, and one domid with one reference
    assert requests == [(0x184700, b"\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\7\0\0\0\10\0\0\0")]
    assert console.channels.bound == [(7, 5)] and console.xenstore["state"] == "4"
    console.guest = Interface.from_buffer(page)
    yield console
    console.guest = None


@pytest.mark.parametrize("start", [0, 2000, 0xFFFFFFF0])
def test_output_arrives_across_the_ends_of_ring_and_counter(console, start):
    console.guest.out_cons = console.guest.out_prod = start
    for data in (b"a" * 100, bytes(range(256)) * 8, b"z"):
        console.guest.write(data)
        assert console.take() == data
        assert console.guest.out_cons == console.guest.out_prod, "the guest has room again"
    assert console.channels.notified == [11] * 3
    assert console.take() == b""


@pytest.mark.parametrize("start", [0, 1000, 0xFFFFFFFF])
def test_input_is_written_up_to_what_fits(console, start):
    guest = console.guest
    guest.in_cons = guest.in_prod = start
    assert console.put(b"x" * 700) == 700
    assert console.put(b"y" * 700) == 324
    assert console.put(b"z") == 0
    assert console.channels.notified == [11] * 2
    assert bytes(guest.input[(start + n) & 1023] for n in range(1024)) == b"x" * 700 + b"y" * 324
    assert guest.in_prod == (start + 1024) & 0xFFFFFFFF and guest.in_cons == start


@pytest.mark.parametrize("prod", [2049, 0x80000000, 0xFFFFFFFF])
def test_impossible_indexes_of_a_guest_are_refused(console, prod):
    console.guest.out_prod = prod
    with pytest.raises(runx.Error, match="impossible"):
        console.take()


def test_the_log_has_the_last_8_kib_of_the_vms_own_console(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"first\n" + b"x" * 8190 + b"\n!")
    os.close(writer)
    runx.BootConsole(reader).report(runx.Log(str(tmp_path / "log")), "it crashed")
    os.close(reader)
    said, words = (tmp_path / "log").read_text().splitlines()
    assert "it crashed" in said and f"the VM's console: {'x' * 8190} !\"" in words


def test_impossible_input_indexes_give_no_room(console):
    console.guest.in_cons, console.guest.in_prod = 5, 4
    assert console.room() == 0 and console.put(b"x") == 0


def test_the_end_of_input_cannot_be_imitated():
    """An end is DLE EOT, and each DLE of the input is there twice."""
    reader, writer = os.pipe()
    stream = runx.Input(SimpleNamespace(put=lambda data: 0), reader)
    os.write(writer, b"a\x10\x04b\x10\x10\x04")
    stream.advance(True)
    assert stream.pending == b"a\x10\x10\x04b\x10\x10\x10\x10\x04"
    os.close(writer)
    stream.pending = b""
    stream.advance(True)
    assert stream.pending == runx.END == b"\x10\x04" and not stream.open
    os.close(reader)


def test_a_uuid_is_random_and_well_formed():
    import uuid

    first, second = uuid.UUID(runx.new_uuid()), uuid.UUID(runx.new_uuid())
    assert first != second and first.version == 4 and first.variant == uuid.RFC_4122


def test_the_module_needs_only_the_standard_library():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import runx; print(*sys.modules)"
    loaded = subprocess.run(
        ["python3", "-ISc", program, os.path.dirname(runx.__file__)], capture_output=True, text=True, check=True
    ).stdout.split()
    # what every call pays for: none of the heavy ones
    assert not {"json", "re", "argparse", "subprocess", "ctypes", "socket", "dataclasses", "typing"} & set(loaded)


def test_the_ioctl_numbers_are_those_of_the_headers():
    """_IOC(_IOC_NONE, letter, number, size) of <linux/ioctl.h> as a C compiler has it, for x86_64 and Arm."""
    assert runx.IOCTL_GNTDEV_MAP_GRANT_REF == 0x00184700  # 'G', 0, of 24 bytes
    assert runx.IOCTL_EVTCHN_BIND_INTERDOMAIN == 0x00084501  # 'E', 1, of 8
    assert runx.IOCTL_EVTCHN_NOTIFY == 0x00044504  # 'E', 4, of 4


@pytest.mark.parametrize(
    "device, module, opened",
    [("EVENT_CHANNELS", "evtchn", runx.EventChannels), ("GRANTED_PAGES", "gntdev", runx.Grants)],
)
def test_without_a_device_of_xens_it_is_said_what_to_load(monkeypatch, device, module, opened):
    monkeypatch.setattr(runx, device, "/dev/no such")
    with pytest.raises(runx.Error, match=f"open /dev/no such: No such file or directory; is .*xen-{module} loaded"):
        opened()
