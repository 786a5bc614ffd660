"""Bytes that others read: cpio archives, xl's configuration, console rings."""

import fcntl
import gzip
import itertools
import json
import os
import struct
import subprocess

import pytest

import runx


def members(archive):
    """(name, mode, data) of each member of a newc archive, read by its definition."""
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701" and offset % 4 == 0
        numbers = [int(archive[offset + 6 + 8 * n : offset + 14 + 8 * n], 16) for n in range(13)]
        name_end = offset + 110 + numbers[11]
        name = archive[offset + 110 : name_end - 1].decode()
        data_start = (name_end + 3) & ~3
        data = archive[data_start : data_start + numbers[6]]
        if name == "TRAILER!!!":
            return
        yield name, numbers[1], data
        offset = (data_start + len(data) + 3) & ~3


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
    found = {name: (mode, data) for name, mode, data in members(gzip.decompress(first))}
    assert list(found) == ["fifo", "link", "sub", "sub/file"]
    assert found["sub/file"] == (0o100755, b"12345")
    assert found["link"] == (0o120777, b"sub/file")
    assert found["fifo"][0] & 0o170000 == 0o010000


@pytest.mark.parametrize("size", range(0, 9))
def test_members_are_aligned_whatever_their_size(size):
    archive = runx.cpio_archive([("n" * (size + 1), 0o100644, b"x" * size), ("after", 0o100644, b"y")])
    assert [data for _, _, data in members(archive)] == [b"x" * size, b"y"]


def test_a_share_is_packed_for_the_guest_and_no_name_leads_out_of_it(folder, tmp_path):
    os.link(folder / "sub/file", folder / "same")
    (folder / "sub/out").symlink_to("/etc")
    (folder / "rootless").mkdir(0o500)
    with open(tmp_path / "ramdisk", "wb") as output:
        assert runx.pack_share(output, str(folder), 64) == {}
    found = {name: (mode, data) for name, mode, data in members((tmp_path / "ramdisk").read_bytes())}
    folders = [name for name, (mode, _) in found.items() if mode & 0o170000 == 0o040000]
    assert folders == ["mnt", "mnt/rootless", "mnt/sub"]
    assert found["mnt/sub/out"] == (0o120777, b"/etc")
    assert (found["mnt/same"][1], found["mnt/sub/file"][1]) == (b"12345", b""), "the second name has no content"


def test_a_share_that_changes_while_it_is_packed(folder, tmp_path, monkeypatch):
    """Another container that has the volume too makes a folder a link to dom0's files."""
    walk = runx.walk_share

    def interrupted(share):
        for member in walk(share):
            yield member
            if member.path == "sub":
                os.rename(folder / "sub", folder / "gone")
                (folder / "sub").symlink_to("/etc")

    monkeypatch.setattr(runx, "walk_share", interrupted)
    with open(tmp_path / "ramdisk", "wb") as output:
        runx.pack_share(output, str(folder), 64)
    assert "mnt/sub" in (names := [name for name, *_ in members((tmp_path / "ramdisk").read_bytes())])
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
    assert [runx.json_text(value, indent) for indent in (None, 2)] == [json.dumps(value, indent=i) for i in (None, 2)]
    assert runx.parse_json(f" {json.dumps(value, indent=1)}\n") == value


@pytest.mark.parametrize("text", ["", " ", "{", "[1,]", '{"a"}', "x", "1 2", "\ufeff{}"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match="."):
        runx.parse_json(text)


def test_strings_for_xl_are_quoted():
    assert runx.quote('a"b\\c\nd\re') == '"a\\"b\\\\c\\nd\\re"'
    assert runx.quote("$`;#'é") == '"$`;#\'é"'
    with pytest.raises(runx.Error, match="NUL"):
        runx.quote("a\0b")


def test_xl_config_has_one_setting_a_line():
    text = runx.xl_config({"name": 'x"', "memory": 64, "p9": ["tag=a", "tag=b"]})
    assert text == 'name = "x\\""\nmemory = 64\np9 = [ "tag=a", "tag=b" ]\n'


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


class Channels:
    def notify(self, port):
        pass


@pytest.fixture
def console():
    """A console whose page is our own memory: the guest's end is the test."""
    console = runx.Console.__new__(runx.Console)
    console.page = memoryview(bytearray(4096))
    console.indexes = console.page[3072:3088].cast("I")
    console.channels, console.port, console.number, console.domid = Channels(), 0, 1, 1
    return console


def guest_writes(console, data):
    prod = console.indexes[3]
    for position, byte in enumerate(data):
        console.page[1024 + (prod + position) % 2048] = byte
    console.indexes[3] = (prod + len(data)) & 0xFFFFFFFF


@pytest.mark.parametrize("start", [0, 2000, 0xFFFFFFF0])
def test_output_arrives_across_the_ends_of_ring_and_counter(console, start):
    console.indexes[2] = console.indexes[3] = start
    for data in (b"a" * 100, bytes(range(256)) * 8, b"z"):
        guest_writes(console, data)
        assert console.take() == data
    assert console.take() == b""


@pytest.mark.parametrize("start", [0, 1000, 0xFFFFFFFF])
def test_input_is_written_up_to_what_fits(console, start):
    console.indexes[0] = console.indexes[1] = start
    assert console.put(b"x" * 700) == 700
    assert console.put(b"y" * 700) == 324
    assert console.put(b"z") == 0
    ring = bytes(console.page[(start + n) % 1024] for n in range(1024))
    assert ring == b"x" * 700 + b"y" * 324


@pytest.mark.parametrize("prod", [2049, 0x80000000, 0xFFFFFFFF])
def test_impossible_indexes_of_a_guest_are_refused(console, prod):
    console.indexes[3] = prod
    with pytest.raises(runx.Error, match="impossible"):
        console.take()


def test_impossible_input_indexes_give_no_room(console):
    console.indexes[0], console.indexes[1] = 5, 4
    assert console.room() == 0 and console.put(b"x") == 0


def test_the_end_of_input_cannot_be_imitated():
    encoded = runx.encode_input(b"a\x10\x04b\x10\x10")
    assert encoded == b"a\x10\x10\x04b\x10\x10\x10\x10"
    assert b"\x10\x04" not in encoded.replace(b"\x10\x10", b"")


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
    # _IOC_NONE is 0: (size << 16) | (type << 8) | number
    assert runx.IOCTL_GNTDEV_MAP_GRANT_REF == struct.calcsize("=IIQII") << 16 | ord("G") << 8
    assert runx.IOCTL_EVTCHN_BIND_INTERDOMAIN == struct.calcsize("=II") << 16 | ord("E") << 8 | 1
    assert runx.IOCTL_EVTCHN_NOTIFY == struct.calcsize("=I") << 16 | ord("E") << 8 | 4
