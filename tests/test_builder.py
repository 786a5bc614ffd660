# SPDX-License-Identifier: Apache-2.0
"""What the monitor makes of config.json before there is a VM: settings for xl, kernel and ramdisk, and the state."""

import json
import lzma
import os
import pathlib
import re
import stat
import struct
import sys
import zlib
from types import SimpleNamespace

import pytest
from archive import members
from conftest import REPOSITORY, call, config
from namespace import in_own_mounts

import runx

UUID = "01234567-89ab-4cde-8f01-23456789abcd"


def is_mounted(path):
    return any(entry.target == str(path) for entry in runx.host_mounts())


class Dom0:
    """A bundle, a container, and what stands in for Xen; `seen` of each xl create: the settings and the ramdisk."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.failures, self.warnings, self.seen = folder, [], [], []
        self.rootfs = folder / "rootfs"
        (self.rootfs / "bin").mkdir(parents=True)
        (self.rootfs / "bin/sh").write_text("#!")
        (self.rootfs / "bin/sh").chmod(0o755)
        (folder / "volume").mkdir()
        (folder / "volume/file").write_text("of the volume")
        (folder / "hosts").write_text("here")
        for name in ("kernel", "initrd"):
            (folder / name).write_bytes(b"ours: " + name.encode())
        self.spec = config("sh", env=["PATH=/bin"])
        self.spec["mounts"] = [
            {"destination": name, "type": "bind", "source": str(folder / name[1:]), "options": ["rbind"]}
            for name in ("/volume", "/hosts")
        ]
        self.spec["hostname"], self.networks = "box", []
        monkeypatch.setattr(runx, "installed_file", lambda name: str(folder / name))
        monkeypatch.setattr(runx, "Xenstore", lambda: self)
        monkeypatch.setattr(runx, "create_domain", self.create_domain)
        monkeypatch.setattr(runx, "host_guest_type", lambda: "pvh")
        monkeypatch.setattr(runx, "new_uuid", lambda: UUID)
        monkeypatch.setattr(runx, "HOST_CONFIG", str(folder / "host.json"))

    # ---- of xenstore

    def watch(self, *watches):
        self.watches = watches

    def read(self, _):
        return "0"

    def take_events(self):
        return []

    def watch_one_end(self, domid):
        assert domid == 7

    # ---- of xl

    def create_domain(self, xenstore, path, uuid, memory, paused):
        lines = pathlib.Path(path).read_text().splitlines()
        pairs = [line.split(" = ", 1) for line in reversed(lines) if " = " in line]  # of two, ours, which is before
        settings = {key: value.strip('"') for key, value in pairs}
        files = {key: pathlib.Path(settings[key]).read_bytes() for key in ("kernel", "ramdisk") if key in settings}
        share = {}
        for path, _, names in os.walk(self.folder / "root/c/share"):
            share.update((os.path.join(path, name)[len(str(self.folder)) + 14 :], name) for name in names)
        self.seen.append({"settings": settings, "memory": memory, "paused": paused, "share": sorted(share), **files})
        assert (xenstore, uuid, self.watches) == (self, UUID, (("@releaseDomain", "release"),))
        if self.failures:
            raise runx.Error(self.failures.pop(0))
        return SimpleNamespace(domid=7, set_memory=self.set_memory)

    def set_memory(self, mebibytes):
        self.seen.append({"given back": mebibytes})

    def annotate(self, **annotations):
        self.spec["annotations"] = {f"org.runx.{key}": str(value) for key, value in annotations.items()}
        return self

    def with_host(self, *annotations):
        """Have the host believe these annotations too."""
        believed = ["memory", "vcpus", "maxmem", "maxvcpus", "rootfs", "rate", *annotations]
        (self.folder / "host.json").write_text(json.dumps({"annotations": believed}))
        return self

    def builder(self):
        (self.folder / "config.json").write_text(json.dumps(self.spec))
        self.container = runx.Container(str(self.folder / "root"), "c")
        self.container.reserve()
        self.container.lock_fd = os.open(self.container.folder, os.O_RDONLY)
        parsed = runx.Config(str(self.folder))
        log = SimpleNamespace(warn=self.warnings.append)
        return runx.Builder(self.container, parsed, self.networks, log)

    def build(self):
        """Return what is seen of it all, from a mount namespace of its own."""

        def work():
            builder = self.builder()
            try:
                builder.prepare("/bundle", False)
                assert builder.build().domid == 7
                error = ""
            except runx.Error as failure:
                error = str(failure)
            return SimpleNamespace(
                seen=self.seen, state=vars(self.container.state), warnings=self.warnings, error=error,
                left=sorted(os.listdir(self.container.folder)), exported=builder.rootfs.is_served,
                mounted=is_mounted(self.rootfs), closed=builder.ramdisk is None or builder.ramdisk.closed,
            )  # fmt: skip

        return in_own_mounts(work)


@pytest.fixture
def dom0(tmp_path, monkeypatch):
    return Dom0(tmp_path, monkeypatch)


def contents(ramdisk):
    """{name: (mode, content)} of the archives in a ramdisk before our own."""
    found = {}
    while ramdisk.startswith(b"070701"):
        for name, mode, data in members(ramdisk):
            found[name] = (mode, data)
        ramdisk = ramdisk[ramdisk.index(b"TRAILER!!!\0") :]
        ramdisk = ramdisk[ramdisk.index(b"\0") :].lstrip(b"\0")
    return found, ramdisk


def find_disk(monkeypatch, path="/dev/disk", writable=True):
    disk = runx.Disk(path=str(path), kind="ext4", writable=writable, mounted=[])
    monkeypatch.setattr(runx, "find_disk", lambda config: disk)
    return vars(disk)


# ---- settings and ramdisk of each way


def test_what_is_served_is_in_the_share_and_the_guest_gets_its_words(dom0):
    built = dom0.annotate(rootfs="9p").build()
    (create,) = built.seen
    settings = create["settings"]
    assert re.fullmatch(r"/proc/\d+/fd/\d+", settings.pop("ramdisk"))
    assert settings == {
        "name": f"runx-c-{UUID[:8]}", "uuid": UUID, "type": "pvh", "kernel": str(dom0.folder / "kernel"),
        "cmdline": "console=hvc0 quiet loglevel=2 panic=-1", "memory": "64", "maxmem": "64", "vcpus": "1",
        "maxvcpus": "1", "cap": "0",
    }  # fmt: skip
    assert create["share"] == ["mounts/0/file", "mounts/1", "rootfs/bin/sh"]
    found, base = contents(create["ramdisk"])
    assert base == b"ours: initrd" and create["memory"] == 64
    assert {name: mode for name, (mode, _) in found.items()} == {"container": 0o40700, "container/config": 0o100600}
    assert b"mount\0mounts/0\0/volume\0" in found["container/config"][1]
    assert built.error == "" and built.exported
    assert built.left == ["control", "share", "state.json", "xl.cfg"]


def test_the_state_has_what_was_made(dom0):
    dom0.spec["annotations"] = {"org.runx.rootfs": "9p", "org.runx.maxmem": "128", "org.runx.maxvcpus": "3"}
    dom0.spec["hooks"] = {"poststop": [{"path": "/x"}]}
    dom0.spec["linux"] = {"resources": {"cpu": {"shares": 512}}}
    state = dom0.build().state
    expected = {
        "oci_version": "1.0.2", "bundle": "/bundle", "rootfs": str(dom0.rootfs), "hostname": "box", "startable": True,
        "annotations": dom0.spec["annotations"], "hooks": dom0.spec["hooks"], "own_init": False, "uuid": UUID,
        "name": f"runx-c-{UUID[:8]}", "boot": runx.boot_id(), "namespace": None,
        "devices": [["console", 1], ["console", 2], ["fuse", 0]],
        "rate": "", "resources": dom0.spec["linux"]["resources"], "domid": 7, "disk": None, "maxmem": 128,
        "maxvcpus": 3, "cgroups": [],
        "base": {"default_memory": 64, "default_vcpus": 1, "minimum_memory": 24, "fixed_vcpus": 0,
                 "most_vcpus": runx.VCPUS_MAX},
    }  # fmt: skip
    assert {key: state[key] for key in expected} == expected
    assert state["created"].endswith("Z") and all(state["monitor"])
    assert [state["pid"], state["pid_start_time"]] == state["monitor"]  # the child in which it was built


def test_a_long_id_is_cut_for_names(dom0):
    dom0.annotate(rootfs="9p")
    del dom0.spec["hostname"]
    builder = dom0.builder()
    builder.container = runx.Container(str(dom0.folder / "root"), "i" * 100)
    builder.container.reserve()
    builder.begin("/bundle")
    state = builder.container.state
    assert (state.hostname, state.name) == ("i" * 63, "runx-" + "i" * 64 + "-01234567")
    assert os.stat(builder.container.path("control")).st_mode == stat.S_IFIFO | 0o600


def test_what_is_said_of_the_machine_is_in_the_settings(dom0):
    dom0.annotate(rootfs="9p", type="pv", vcpus=2, maxvcpus=4, memory=48).with_host("type")
    dom0.spec["linux"] = {"resources": {"cpu": {"shares": 512, "cpus": "0-1", "quota": 150000, "period": 100000}}}
    dom0.spec["vm"] = {"hypervisor": {"parameters": ["x=1", 'y="2"']}, "kernel": {"parameters": ["a=b"]},
                       "hwConfig": {"irqs": [5]}}  # fmt: skip
    settings = dom0.build().seen[0]["settings"]
    assert settings.items() >= {
        "type": "pv", "cmdline": "console=hvc0 quiet loglevel=2 panic=-1 a=b", "memory": "48", "maxmem": "48",
        "vcpus": "2", "maxvcpus": "4", "cap": "150", "irqs": '[ "5" ]', "cpu_weight": "128", "cpus": "0-1",
    }.items()  # fmt: skip
    text = (dom0.folder / "root/c/xl.cfg").read_text()
    assert text.endswith('cpus = "0-1"\nx=1\ny="2"\n')


def test_in_memory_the_ramdisk_has_the_files_and_no_name(dom0):
    os.setxattr(dom0.rootfs / "bin/sh", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
    built = dom0.annotate(rootfs="ramdisk").build()
    (create,) = built.seen
    assert re.fullmatch(r"/proc/\d+/fd/\d+", create["settings"]["ramdisk"])
    found, base = contents(create["ramdisk"])
    assert base == b"ours: initrd"
    assert found["mnt/rootfs/bin/sh"] == (0o100755, b"#!")
    assert found["mnt/mounts/0/file"][1] == b"of the volume" and found["mnt/mounts/1"][1] == b"here"
    assert found["container/config"][1].startswith(b"0\0file_capability\0rootfs/bin/sh\x0020\0")
    assert not built.exported and built.closed and built.left == ["control", "share", "state.json", "xl.cfg"]


@pytest.mark.parametrize("volumes", [True, False])
def test_on_a_block_device_the_share_has_only_the_rest(dom0, monkeypatch, volumes):
    disk = find_disk(monkeypatch)
    if not volumes:
        del dom0.spec["mounts"][0]
    real = dom0.create_domain

    def create_domain(*args):
        # what `start` unmounts is still seen by xl
        assert is_mounted(dom0.rootfs)
        return real(*args)

    monkeypatch.setattr(runx, "create_domain", create_domain)

    def mounted_before(*args):
        runx.mount(str(dom0.rootfs), str(dom0.rootfs), runx.MS_BIND)
        return build_share(*args)

    build_share = runx.build_share
    monkeypatch.setattr(runx, "build_share", mounted_before)
    built = dom0.annotate(rootfs="block").build()
    assert built.error == ""
    (create,) = built.seen
    found, _ = contents(create["ramdisk"])
    assert found["container/disk"] == (0o100600, b"ext4 rw\n")
    assert built.exported == volumes
    assert ("mnt/mounts/0" in found) == (not volumes) and "mnt/rootfs/bin" not in found
    assert "rootfs/bin/sh" not in create["share"]
    assert (built.state["disk"], built.mounted) == (disk, False)


def test_an_error_of_xl_is_the_users(dom0):
    dom0.failures = ["no memory"]
    built = dom0.annotate(rootfs="9p").build()
    assert (built.error, len(built.seen), built.closed) == ("no memory", 1, True)
    assert built.left == ["control", "share", "state.json", "xl.cfg"]


def test_a_ramdisk_for_which_there_is_no_room_is_a_sentence(dom0, monkeypatch):
    monkeypatch.setattr(runx.Rootfs, "open_ramdisk", lambda *_: (open("/dev/full", "wb"), "/dev/full"))
    built = dom0.annotate(rootfs="9p").build()
    assert built.error == "cannot write the container's ramdisk: No space left on device"
    assert (built.seen, built.closed) == ([], True)


# ---- a kernel of the container's own


def kernel_of(size):
    """A kernel that unpacks to so many MiB."""
    return b"\x1f\x8b" + struct.pack("<I", size << 20)


SIZES = [
    # limit in MiB, the host's memory, the annotation, further settings: what the VM has
    (None, 0, 0, [], 64), (None, 512, 0, [], 512), (-1, 512, 0, [], 512), (-1, 0, 0, [], 64), (100, 512, 0, [], 100),
    (1, 512, 0, [], 24), (None, 512, 96, [], 96), (-1, 512, 96, [], 96), (100, 0, 80, [], 80),
    (None, 0, 0, ["memory=256"], 256), (100, 512, 80, ["x=1", "memory = 300", ' memory ="200" # more'], 200),
    (None, 0, 0, ["memory=1; memory=128"], 128), (None, 0, 0, ["maxmem=256", "memory=x"], 64),
]  # fmt: skip


@pytest.mark.parametrize("limit, host, annotation, lines, memory", SIZES)
def test_a_kernel_of_the_rootfs_is_judged_by_what_the_vm_gets(dom0, limit, host, annotation, lines, memory):
    (dom0.folder / "host.json").write_text(json.dumps({"memory": host, "annotations": ["memory", "kernel", "rootfs"]}))
    dom0.annotate(rootfs="9p", kernel="/kernel", **({"memory": annotation} if annotation else {}))
    if limit:
        dom0.spec["linux"] = {"resources": {"memory": {"limit": limit << 20 if limit > 0 else limit}}}
    if lines:
        dom0.spec["vm"] = {"hypervisor": {"parameters": lines}}
    (dom0.rootfs / "kernel").write_bytes(kernel_of(min(memory, 128) - 1))
    assert dom0.build().error == ""
    (dom0.rootfs / "kernel").write_bytes(kernel_of(memory))
    (dom0.folder / "root").rename(dom0.folder / "done")
    error = dom0.build().error
    assert error == f"cannot boot /kernel of the container: {memory} MiB do not fit into a VM of {memory} MiB"


@pytest.mark.parametrize("content, fits", [(b"\x1f\x8b\0\4", False), (b"\x1f\x8b\0", True), (b"\0\0\0\4", True)])
def test_the_smallest_of_what_is_packed_tells_its_size(tmp_path, content, fits):
    (tmp_path / "kernel").write_bytes(content)  # the last four bytes: 64 MiB, and a little
    with open(tmp_path / "kernel", "rb") as file:
        assert runx.unpacked_size(file) == (0 if fits else 0x04008B1F)


def test_xl_and_the_state_are_told_the_memory_that_further_settings_say(dom0):
    dom0.annotate(rootfs="ramdisk")
    dom0.spec["vm"] = {"hypervisor": {"parameters": ["memory=96", "maxmem=200", "maxvcpus=4", "memory=100"]}}
    with open(dom0.rootfs / "large", "wb") as file:
        file.truncate(25 << 20)  # which 64 MiB could not hold
    built = dom0.build()
    assert (built.error, built.seen[0]["memory"]) == ("", 100)
    assert (built.state["maxmem"], built.state["maxvcpus"]) == (200, 4)
    assert "\nmemory = 100\n" in (dom0.folder / "root/c/xl.cfg").read_text()


def test_on_arm_a_vm_begins_with_all_that_it_may_get_and_gives_back_what_is_too_much(dom0, monkeypatch):
    """Xen populates on demand on x86 only."""
    monkeypatch.setattr(runx, "on_x86", lambda: False)
    begun, then = dom0.annotate(rootfs="9p", maxmem=128).build().seen
    assert (begun["settings"]["memory"], begun["settings"]["maxmem"], begun["memory"]) == ("128", "128", 128)
    assert then == {"given back": 64}


def test_a_kernel_of_the_rootfs_is_what_xl_gets_and_no_link_leads_out(dom0):
    (dom0.rootfs / "boot").mkdir()
    (dom0.rootfs / "boot/vmlinuz").write_bytes(b"theirs")
    (dom0.rootfs / "kernel").symlink_to("/boot/vmlinuz")
    built = dom0.annotate(rootfs="9p", kernel="/kernel").with_host("kernel").build()
    (create,) = built.seen
    assert create["kernel"] == b"theirs"
    assert create["settings"]["kernel"] == str(dom0.folder / "root/c/kernel")
    assert built.left == ["control", "share", "state.json", "xl.cfg"]


@pytest.mark.parametrize("target, reason", [("/../secret", "No such file"), ("/bin", "it is not a regular file")])
def test_what_is_no_file_of_the_rootfs_is_not_booted(dom0, target, reason):
    (dom0.folder / "secret").write_bytes(b"dom0's")
    (dom0.rootfs / "kernel").symlink_to(target)
    built = dom0.annotate(rootfs="9p", kernel="/kernel").with_host("kernel").build()
    assert built.error.startswith(f"cannot boot /kernel of the container: {reason}") and built.seen == []


@pytest.mark.parametrize("wanted, in_share", [("9p", True), ("none", False)])
def test_a_system_of_its_own_has_its_own_ramdisk_and_nothing_of_ours(dom0, wanted, in_share):
    (dom0.rootfs / "kernel").write_bytes(b"theirs")
    (dom0.rootfs / "initrd").write_bytes(b"their initrd")
    dom0.spec["process"]["args"] = ["not there"]
    dom0.annotate(rootfs=wanted, kernel="/kernel", ramdisk="/initrd").with_host("kernel", "ramdisk")
    built = dom0.build()
    (create,) = built.seen
    assert (create["kernel"], create["ramdisk"]) == (b"theirs", b"their initrd")
    assert create["settings"]["cmdline"] == "console=hvc0 panic=-1"
    assert built.exported == in_share
    assert built.state["devices"] == [["console", 1], ["console", 2], ["9pfs", 0]]  # its kernel has no xenfuse
    assert built.state["own_init"] and built.left == ["control", "share", "state.json", "xl.cfg"]


def test_a_system_on_its_own_disk_has_no_ramdisk(dom0):
    for name in ("disk", "own-kernel"):
        (dom0.folder / name).write_bytes(b"x")
    dom0.spec["vm"] = {
        "kernel": {"path": str(dom0.folder / "own-kernel")},
        "image": {"path": str(dom0.folder / "disk"), "format": "raw"},
    }  # fmt: skip
    (create,) = dom0.build().seen
    assert create["settings"]["kernel"] == str(dom0.folder / "own-kernel") and "ramdisk" not in create["settings"]


def gzip(data):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def modules_of(dom0, **files):
    """Modules in the rootfs, which depend on the one before."""
    folder = dom0.rootfs / "lib/modules/6.1.0/kernel"
    folder.mkdir(parents=True)
    lines, before = [], ""
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        lines.append(f"kernel/{name}:{before}\n")
        before = f" kernel/{name}"
    (folder.parent / "modules.dep").write_text("".join(lines))


def test_a_kernel_of_the_rootfs_gets_its_modules_in_order(dom0):
    modules_of(dom0, x9pnet_xen__ko=b"unused", **{"9pnet_xen__ko": b"first", "9p__ko__gz": gzip(b"second")})
    (dom0.rootfs / "vmlinuz-6.1.0").write_bytes(b"theirs")
    built = dom0.annotate(rootfs="9p", kernel="/vmlinuz-6.1.0").with_host("kernel").build()
    found, _ = contents(built.seen[0]["ramdisk"])
    assert {name: member for name, member in found.items() if name.startswith("modules")} == {
        "modules": (0o40700, b""), "modules/00-x9pnet_xen.ko": (0o100600, b"unused"),
        "modules/01-9pnet_xen.ko": (0o100600, b"first"), "modules/02-9p.ko": (0o100600, b"second"),
    }  # fmt: skip


def test_in_memory_no_module_is_needed(dom0):
    modules_of(dom0, **{"9p__ko": b"x"})
    (dom0.rootfs / "kernel").write_bytes(b"theirs")
    built = dom0.annotate(rootfs="ramdisk", kernel="/kernel").with_host("kernel").build()
    assert "modules" not in contents(built.seen[0]["ramdisk"])[0]


FULL = bytes(5 << 20)
PACKED = {
    "a.ko": (b"plain", b"plain"), "a.ko.gz": (gzip(b"gz"), b"gz"), "a.ko.xz": (lzma.compress(b"xz"), b"xz"),
    "large/a.ko": (FULL, FULL[: 4 << 20]), "large/a.ko.gz": (gzip(FULL), FULL[: 4 << 20]),
    "large/a.ko.xz": (lzma.compress(FULL), FULL[: 4 << 20]),
    "bad/a.ko.gz": (b"not gzip", "Error -3 while decompressing data"),
    "bad/a.ko.xz": (b"not xz", "Input format not supported"), "bad/a.ko.zst": (b"", "use .ko, .ko.xz or .ko.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_modules_are_unpacked_up_to_a_bound(tmp_path, name):
    content, expected = PACKED[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(runx.Error, match=f"cannot unpack the kernel module {name} of the container: {expected}"):
            runx.load_module(str(tmp_path), name)
    else:
        assert runx.load_module(str(tmp_path), name) == ("a.ko", expected)


def test_an_xz_that_asks_for_too_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 128 << 20}]
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(b"x", filters=filters))
    with pytest.raises(runx.Error, match="a.ko.xz of the container: Memory usage limit"):
        runx.load_module(str(tmp_path), "a.ko.xz")


def test_no_more_modules_than_a_kernel_can_need(tmp_path):
    folder = tmp_path / "lib/modules/6.1"
    folder.mkdir(parents=True)
    names = [f"m{number}.ko" for number in range(16)]
    for name in [*names, "a-b.ko"]:
        (folder / name).write_text(name)
    (folder / "modules.dep").write_text(f"a-b.ko: {' '.join(names[:15])}\n")
    found = runx.kernel_modules(str(tmp_path), "/kernel", ("a_b",))
    assert [name for name, _ in found] == [*reversed(names[:15]), "a-b.ko"]
    (folder / "modules.dep").write_text(f"a-b.ko: {' '.join(names)}\n")
    with pytest.raises(runx.Error, match="/lib/modules/6.1/modules.dep names, for a_b and c, more than 16 modules"):
        runx.kernel_modules(str(tmp_path), "/kernel", ("a_b", "c"))


def test_modules_that_have_a_hole_for_content_do_not_fill_dom0s_memory(tmp_path):
    folder = tmp_path / "lib/modules/6.1"
    folder.mkdir(parents=True)
    names = [f"m{number}.ko" for number in range(16)]
    for name in names:
        (folder / name).touch()
        os.truncate(folder / name, runx.MODULE_MAX)
    for count in (3, 15):
        (folder / "modules.dep").write_text(f"m0.ko: {' '.join(names[1 : count + 1])}\n")
        if count == 3:
            assert len(runx.kernel_modules(str(tmp_path), "/kernel", ("m0",))) == 4
    with pytest.raises(runx.Error, match="/lib/modules/6.1/modules.dep names, for m0, more than 16 MiB of modules"):
        runx.kernel_modules(str(tmp_path), "/kernel", ("m0",))


@pytest.mark.parametrize("line", ["{:06}:\n", " {:06}"])
def test_a_long_list_of_modules_does_not_fill_dom0s_memory(tmp_path, line):
    folder = tmp_path / "lib/modules/6.1"
    folder.mkdir(parents=True)
    text = "m0.ko:" + "".join(map(line.format, range(600000)))
    (folder / "modules.dep").write_text(text)
    assert 4 << 20 < len(text)
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import runx
def most():  # KiB; not of getrusage(2), which knows those of before execve(2)
    return int(runx.read_file("/proc/self/status").partition("VmHWM:")[2].split()[0])
before = most()
try:
    runx.kernel_modules({str(tmp_path)!r}, "/kernel", ("m0",))
except runx.Error as error:
    print(error, file=sys.stderr)
print(most() - before)
"""
    result = call(sys.executable, "-c", script)
    assert b"modules.dep names" in result.stderr or b"cannot read" in result.stderr, result
    assert int(result.stdout) < 32 << 10, result


# ---- the command of the container


@pytest.mark.parametrize(
    "name, env, cwd, reason",
    [
        ("sh", ["PATH=/bin"], "/", ""), ("sh", ["PATH=/none:/bin"], "/", ""), ("./sh", [], "/bin", ""),
        ("/bin/sh", [], "/", ""), ("link", ["PATH=/bin"], "/", ""), ("sh", ["PATH=.:/bin"], "/", ""),
        ("/proc/self/exe", [], "/", ""), ("sh", ["PATH=/proc/x:/none"], "/", ""),
        ("none", ["PATH=/bin"], "/", "executable file not found in $PATH"),
        ("tool", [], "/", "executable file not found in $PATH"),
        ("sh", ["PATH="], "/bin", "executable file not found in $PATH"),
        ("sh", ["PATH=.:/bin"], "/bin", "cannot run executable found relative to current directory"),
        ("sh", ["PATH=bin"], "/", "cannot run executable found relative to current directory"),
        ("bin/none", [], "/", "stat bin/none: no such file or directory"),
        ("data", ["PATH=/bin:/none"], "/", "executable file not found in $PATH"),
        ("/bin", [], "/", "permission denied"), ("/bin/data", [], "/", "permission denied"),
        ("/bin/sh/", [], "/", "stat /bin/sh/: not a directory"),
        ("/bin/endless", [], "/", "stat /bin/endless: too many levels of symbolic links"),
        ("out", ["PATH=/bin"], "/", "executable file not found in $PATH"),
        ("endless", ["PATH=/bin"], "/", "executable file not found in $PATH"),
    ],
)  # fmt: skip
def test_the_command_is_looked_for_as_in_the_container(dom0, tmp_path, name, env, cwd, reason):
    root = dom0.rootfs
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").touch(0o711)
    (root / "bin/data").touch(0o644)
    (root / "bin/link").symlink_to("/usr/bin/tool")
    (root / "bin/out").symlink_to(f"{tmp_path}/outside")
    (tmp_path / "outside").touch(0o755)
    (root / "bin/endless").symlink_to("endless")
    process = SimpleNamespace(args=[name], env=env, cwd=cwd)
    mounts = [SimpleNamespace(destination="/proc/")]
    if reason:
        message = re.escape(f'unable to start container process: exec: "{name}": {reason}')
        with pytest.raises(runx.Error, match=f"^{message}$"):
            runx.check_executable(str(root), process, mounts)
    else:
        runx.check_executable(str(root), process, mounts)


@pytest.mark.parametrize(
    "name, path, cwd, destination",
    [
        ("/run/tools/x", "", "/", "/var/run/tools"), ("/var/run/tools/x", "", "/", "/run/tools/"),
        ("./x", "", "/app", "/opt/app"), ("tool", "/usr/bin", "/", "/opt/app"), ("/usr/bin/x", "", "/", "/sbin/x"),
        ("../tools/x", "", "/bin", "/tools"), ("/opt/app/tools/x", "", "/", "/opt/app"), ("/x", "", "/", "/"),
    ],
)  # fmt: skip
def test_a_command_in_a_mount_is_left_to_the_guest_also_behind_links(dom0, name, path, cwd, destination):
    for folder in ("usr/bin", "run", "var", "opt/app"):
        (dom0.rootfs / folder).mkdir(parents=True)
    for link, target in (
        ("var/run", "../run"), ("sbin", "usr/bin"), ("app", "/opt/app/current"), ("usr/bin/tool", "/opt/app/bin/tool"),
        ("opt/app/tools", "/run/tools"), ("endless", "endless"),
    ):  # fmt: skip
        (dom0.rootfs / link).symlink_to(target)
    process = SimpleNamespace(args=[name], env=[f"PATH={path}"], cwd=cwd)
    mounts = [SimpleNamespace(destination=path) for path in ("/endless/x", destination)]
    runx.check_executable(str(dom0.rootfs), process, mounts)
    with pytest.raises(runx.Error, match="unable to start container process"):
        runx.check_executable(str(dom0.rootfs), process, mounts[:1])


def test_a_command_is_left_to_the_guest_where_an_image_has_more_folders_in_path_than_anybody_needs(dom0):
    process = SimpleNamespace(args=["none"], env=["PATH=" + ":".join(["/bin"] * 101)], cwd="/")
    with pytest.raises(runx.Error, match="executable file not found in"):
        runx.check_executable(str(dom0.rootfs), process, [])
    process.env[0] += ":/bin"
    runx.check_executable(str(dom0.rootfs), process, [])


def test_a_command_is_left_to_the_guest_where_dom0_cannot_look(dom0, monkeypatch):
    def refuse(*_):
        raise OSError(38, "no openat2")

    monkeypatch.setattr(runx, "system_call", refuse)
    runx.check_executable(str(dom0.rootfs), SimpleNamespace(args=["/none"], env=[], cwd="/"), [])


def test_a_command_that_is_not_there_makes_no_vm(dom0):
    dom0.spec["process"]["args"] = ["none"]
    built = dom0.annotate(rootfs="9p").build()
    assert built.error == 'unable to start container process: exec: "none": executable file not found in $PATH'
    assert built.seen == []


# ---- cgroup and networks


@pytest.mark.parametrize("systemd", [True, False])
def test_the_cgroup_is_in_the_state_before_it_is_made(dom0, monkeypatch, systemd):
    done = []
    scope = SimpleNamespace(communicate=lambda: done.append("scope ends"))
    monkeypatch.setattr(runx, "start_scope", lambda path, resources: done.append(path) or (scope, "/made"))
    monkeypatch.setattr(runx, "find_cgroups", lambda path, is_scope: done.append((path, is_scope)) or [["/r", path]])

    def make(cgroups, resources):
        assert dom0.container.state.cgroups == cgroups
        done.append(cgroups)
        raise runx.Error("no cgroup")

    monkeypatch.setattr(runx, "make_cgroups", make)
    dom0.spec["linux"] = {"cgroupsPath": "a:b:c"}
    with pytest.raises(runx.Error, match="no cgroup"):
        dom0.builder().enter_cgroup(systemd)
    path = "/made" if systemd else "a:b:c"
    made = [(path, systemd), [["/r", path]]]
    assert done == (["a:b:c", *made, "scope ends"] if systemd else made)


def test_each_network_is_in_the_state_before_and_after_it_is_made(dom0, monkeypatch):
    done = []
    paths = {"first": str(dom0.folder / "none"), "there": str(dom0.folder), "bridged": str(dom0.folder / "none")}

    def plan(network, number, container, log):
        bridge, names = "br0" if network == "bridged" else "", {"name": network, "namespace": paths[network]}
        return SimpleNamespace(calls=[1], bridge=bridge, number=number, result="", **names)

    def attach(attachment, network):
        done.append((network, [each["name"] for each in dom0.container.state.networks]))
        attachment.result = "made"
        if network == "bridged":
            raise runx.Error("no bridge")

    monkeypatch.setattr(runx, "plan_attachment", plan)
    monkeypatch.setattr(runx, "attach_network", attach)
    monkeypatch.setattr(runx, "make_namespace", lambda path: done.append(path))
    dom0.networks = ["first", "there", "bridged"]
    with pytest.raises(runx.Error, match="no bridge"):
        dom0.builder().attach_networks()
    assert done == [
        paths["first"], ("first", ["first"]), ("there", ["first", "there"]), ("bridged", ["first", "there", "bridged"]),
    ]  # fmt: skip
    assert [(each["number"], each["result"]) for each in dom0.container.state.networks] == [
        (0, "made"), (1, "made"), (2, "made"),
    ]  # fmt: skip


def test_the_vm_is_made_in_the_cgroup_and_when_it_has_its_networks(dom0, monkeypatch):
    done = []
    monkeypatch.setattr(runx, "find_cgroups", lambda path, is_scope: [["/r", path]])
    monkeypatch.setattr(runx, "make_cgroups", lambda cgroups, *_: done.append(cgroups))
    monkeypatch.setattr(runx, "join_cgroups", lambda cgroups: done.append(["joined", cgroups]))
    monkeypatch.setattr(runx.Builder, "attach_networks", lambda self: done.append("networks"))
    monkeypatch.setattr(runx.Builder, "write_boot_files", lambda self: done.append("files") or ("/kernel", ""))
    monkeypatch.setattr(runx, "create_domain", lambda *_: done.append("xl") or SimpleNamespace(domid=7))
    dom0.annotate(rootfs="ramdisk").spec["linux"] = {"cgroupsPath": "/a"}

    def work():
        builder = dom0.builder()
        builder.prepare("/bundle", False)
        builder.build()
        return done

    cgroups = [["/r", "/a"]]
    assert in_own_mounts(work) == [
        cgroups, ["joined", cgroups], "networks", "files", "xl",
    ]  # fmt: skip


# ---- what is installed


def test_kernel_and_initrd_are_beside_the_module_or_in_lib(tmp_path, monkeypatch):
    monkeypatch.setattr(runx, "__file__", str(tmp_path / "sbin/runX"))
    assert runx.lib_folder() == str(tmp_path / "lib/runX")
    monkeypatch.setattr(runx, "__file__", str(tmp_path / "lib/runX/runx.py"))
    assert runx.lib_folder() == str(tmp_path / "lib/runX")
    (tmp_path / "lib/runX").mkdir(parents=True)
    (tmp_path / "lib/runX/kernel").touch()
    assert runx.installed_file("kernel") == str(tmp_path / "lib/runX/kernel")
    message = f"there is no initrd at {tmp_path}/lib/runX/initrd: build one with initrd/build.sh and install it"
    with pytest.raises(runx.Error, match=message):
        runx.installed_file("initrd")


def test_a_command_line_that_xen_would_cut_is_refused():
    machine = SimpleNamespace(own_init=False, cmdline=["x" * (1023 - len(runx.KERNEL_PARAMETERS) - 1)])
    assert len(runx.command_line(machine)) == 1023
    machine.cmdline = [machine.cmdline[0][1:] + "é"]
    with pytest.raises(runx.Error, match="the kernel's command line is 1024 bytes long: make it 1023 at most"):
        runx.command_line(machine)
    machine.own_init, machine.cmdline = True, ["a", "b"]
    assert runx.command_line(machine) == "console=hvc0 panic=-1 a b"
