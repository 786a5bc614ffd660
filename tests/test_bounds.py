# SPDX-License-Identifier: Apache-2.0
"""config.json at its edges: each number at its bounds, each field in its place, each name with the kernel's number."""

import json
import os
import pathlib
import stat
import struct
from types import SimpleNamespace

import pytest
from conftest import DEVPTS, config, record

import runx

LINUX = {
    line.split()[0]: int(line.split()[1])
    for line in pathlib.Path(__file__).with_name("data").joinpath("linux.txt").read_text().splitlines()
    if not line.startswith("#")
}
BASE = {"default_memory": 128, "minimum_memory": 48, "default_vcpus": 1, "fixed_vcpus": 0, "most_vcpus": 64}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads a config.json, and host's file if there is one."""
    (tmp_path / "rootfs").mkdir()
    monkeypatch.setattr(runx, "HOST_CONFIG", str(tmp_path / "host.json"))

    def load(spec, host=None):
        (tmp_path / "config.json").write_text(json.dumps(spec))
        if host is not None:
            (tmp_path / "host.json").write_text(json.dumps(host))
        return runx.Config(str(tmp_path))

    return load


# ---- Section


def section(**values):
    return runx.Section(values, "file", ": ")


@pytest.mark.parametrize(
    "read, kind, right, empty",
    [
        (lambda spec: spec.flag("x"), "boolean", True, False),
        (lambda spec: spec.number("x", 5), "integer", 7, 5),
        (lambda spec: spec.text("x", "d"), "string", "t", "d"),
        (lambda spec: spec.texts("x"), "array", ["t"], []),
        (lambda spec: spec.texts("x", ("d",)), "array", ["t"], ["d"]),
        (lambda spec: spec.section("x").values, "object", {"y": 1}, {}),
        (lambda spec: spec.table("x"), "object", {"y": "z"}, {}),
        (lambda spec: [inner.values for inner in spec.sections("x")], "array", [{"y": 1}], []),
    ],
)
def test_a_member_is_of_its_type_or_its_default(read, kind, right, empty):
    assert read(section(x=right)) == right
    assert read(section(x=None)) == read(section()) == empty
    for wrong in (True, 0, 1.0, "", [], {}):
        if type(wrong) is not type(right):
            with pytest.raises(runx.Error, match=f"^file: x must be a JSON {kind}$"):
                read(section(x=wrong))


def test_an_empty_member_is_not_a_missing_one():
    assert section(x=[]).texts("x", ("d",)) == [] and section(x="").text("x", "d") == ""
    assert "x" in section(x=0) and "x" in section(x=False) and "x" not in section(x=None) and "x" not in section()


@pytest.mark.parametrize("read", [runx.Section.number, runx.Section.text, runx.Section.path])
def test_what_has_no_default_must_be_there(read):
    for spec in (section(), section(x=None)):
        with pytest.raises(runx.Error, match="^file: x is missing$"):
            read(spec, "x")


def test_a_number_has_bounds_which_its_default_has_not():
    for number in (-3, 0, 4):
        assert section(x=number).number("x", least=-3, most=4) == number
    for number in (-4, 5, -(10**19), 10**19):
        with pytest.raises(runx.Error, match="^file: x must be from -3 to 4$"):
            section(x=number).number("x", least=-3, most=4)
        assert section(x=number).number("x") == number
    assert section(x=2**64).number("x", least=2) == 2**64 and section().number("x", 0, 1, 2) == 0
    with pytest.raises(runx.Error, match="^file: x must not be below 2$"):
        section(x=1).number("x", least=2)


def test_a_path_is_absolute():
    assert section(x="/a").path("x") == "/a" and section(x=["/a", "/"]).each("x", runx.Section.path) == ["/a", "/"]
    for path in ("", "a", "./a", " /a"):
        with pytest.raises(runx.Error, match="^file: x must be an absolute path$"):
            section(x=path).path("x")


def test_a_choice_is_one_of_those_that_are_known():
    known = ("", "A", "B")
    assert section(x="A").choice("x", known) == "A" and section().choice("x", known, "") == ""
    with pytest.raises(runx.Error, match="^file: x must be one of A, B, not a b$"):
        section(x="a\nb").choice("x", known)


def test_an_error_says_where_it_is():
    spec = section(a={"b": [{}, {"c": ["x", 1], "d": {"e": 1}}], "n": [1, -1]}, l=[{}, 1], t={"k": 1})
    inner = spec.section("a").sections("b")[1]
    for read, sentence in (
        (lambda: inner.texts("c"), "file: a.b[1].c[1] must be a JSON string"),
        (lambda: inner.section("d").text("e"), "file: a.b[1].d.e must be a JSON string"),
        (lambda: spec.section("a").each("n", runx.Section.number, 0, 0), "file: a.n[1] must not be below 0"),
        (lambda: spec.sections("l"), "file: l[1] must be a JSON object"),
        (lambda: spec.table("t"), "file: t.k must be a JSON string"),
        (lambda: inner.refuse("is odd"), "file: a.b[1] is odd"),
        (lambda: inner.refuse("is odd", "c"), "file: a.b[1].c is odd"),
        (lambda: runx.Section([], "file"), "file must be a JSON object"),
        (lambda: runx.Section({}, "a.b").text("c"), "a.b.c is missing"),
    ):
        with pytest.raises(runx.Error) as caught:
            read()
        assert str(caught.value) == sentence


def test_warnings_are_those_of_the_whole_document():
    spec, other = section(a={"b": [{}]}), section()
    spec.section("a").sections("b")[0].warnings.append("w")
    assert spec.warnings == ["w"] and other.warnings == []


# ---- numbers of config.json


def with_member(spec, path, value):
    """The spec with a value at a path such as process.user.uid or linux.devices.0.major."""
    place = spec = json.loads(json.dumps(spec))
    *names, last = path.split(".")
    for name in names:
        place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
    if last.isdigit():
        place[int(last)] = value
    else:
        place[last] = value
    return spec


def sample():
    spec = config("true", cwd="/", user={"uid": 0, "gid": 0, "additionalGids": [0]}, terminal=True)
    spec["mounts"].append(DEVPTS)
    spec["process"]["rlimits"] = [{"type": "RLIMIT_CORE", "soft": 3, "hard": 2**64 - 1}]
    spec["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_BE"}
    spec["process"]["scheduler"] = {"policy": "SCHED_FIFO"}
    spec["hooks"] = {"poststop": [{"path": "/h"}]}
    spec["linux"] = {
        "devices": [{"path": "/dev/f", "type": "c", "major": 1, "minor": 1}],
        "resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]},
    }
    spec["vm"] = {"hwConfig": {"irqs": [1], "iomems": [{"firstMFN": 1, "nrMFNs": 1}]}}
    return spec


def process(field):
    return lambda parsed: getattr(parsed.process, field)


def device(number):
    return lambda parsed: parsed.linux.devices[0][number]


def scheduler(number):
    return lambda parsed: parsed.process.scheduler[number]


def iomem(number):
    return lambda parsed: int(parsed.machine.options["iomem"][0].replace("@", ",").split(",")[number], 16)


U16, U32, I63, U64 = 2**16 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1
NUMBERS = [
    ("process.consoleSize.height", 0, U16, lambda parsed: parsed.process.console_size[0]),
    ("process.consoleSize.width", 0, U16, lambda parsed: parsed.process.console_size[1]),
    ("process.user.uid", 0, U32, process("uid")),
    ("process.user.gid", 0, U32, process("gid")),
    ("process.user.additionalGids.0", 0, U32, lambda parsed: parsed.process.groups[0]),
    ("process.user.umask", 0, 0o777, process("umask")),
    ("process.oomScoreAdj", -1000, 1000, process("oom_score_adj")),
    ("process.ioPriority.priority", 0, 7, lambda parsed: parsed.process.io_priority & 0x1FFF),
    ("process.scheduler.nice", -20, 19, scheduler(2)),
    ("process.scheduler.priority", 0, I63, scheduler(3)),
    ("process.scheduler.runtime", 0, I63, scheduler(4)),
    ("process.scheduler.deadline", 0, I63, scheduler(5)),
    ("process.scheduler.period", 0, I63, scheduler(6)),
    ("process.rlimits.0.soft", 0, U64, lambda parsed: parsed.process.rlimits[0][1]),
    ("hooks.poststop.0.timeout", 1, 2**31 - 1, lambda parsed: runx.parse_hooks(parsed.hooks, "poststop")[0].timeout),
    ("linux.devices.0.major", 0, U32, device(2)),
    ("linux.devices.0.minor", 0, U32, device(3)),
    ("linux.devices.0.uid", 0, U32, device(4)),
    ("linux.devices.0.gid", 0, U32, device(5)),
    ("vm.hwConfig.memory", 0, None, lambda parsed: parsed.raw_resources.get("memory", {}).get("limit", 0)),
    ("vm.hwConfig.vcpus", 0, None, lambda parsed: parsed.resources.fixed_vcpus),
    ("vm.hwConfig.irqs.0", 0, None, lambda parsed: int(parsed.machine.options["irqs"][0])),
    ("vm.hwConfig.iomems.0.firstMFN", 0, None, iomem(0)),
    ("vm.hwConfig.iomems.0.nrMFNs", 1, None, iomem(1)),
    ("vm.hwConfig.iomems.0.firstGFN", 0, None, iomem(2)),
]  # fmt: skip


@pytest.mark.parametrize("path, least, most, found", NUMBERS, ids=[row[0] for row in NUMBERS])
def test_each_number_has_its_bounds_and_its_place(load, path, least, most, found):
    for number in (least, least + 1, 2**63 if most is None else most - 1, 2**64 if most is None else most):
        assert found(load(with_member(sample(), path, number))) == number
    for number in [least - 1] if most is None else [least - 1, most + 1]:
        with pytest.raises(runx.Error) as caught:
            load(with_member(sample(), path, number))
        assert str(caught.value).startswith(f"config.json: {path.replace('.0', '[0]')} must ")
    for wrong in ("1", True, 1.0, [1]):
        with pytest.raises(runx.Error, match="must be a JSON integer"):
            load(with_member(sample(), path, wrong))


def test_a_soft_limit_is_no_higher_than_the_hard_one():
    def parsed(soft, hard):
        return runx.parse_rlimits(section(rlimits=[{"type": "RLIMIT_CORE", "soft": soft, "hard": hard}]))

    for soft, hard in ((0, 0), (3, 3), (2, 3), (U64, U64)):
        assert parsed(soft, hard) == [(LINUX["RLIMIT_CORE"], soft, hard)]
    for soft, hard, sentence in (
        (4, 3, "soft must be from 0 to 3"),
        (-1, 3, "soft must be from 0 to 3"),
        (0, -1, f"hard must be from 0 to {U64}"),
        (0, U64 + 1, f"hard must be from 0 to {U64}"),
    ):
        with pytest.raises(runx.Error, match=rf"^file: rlimits\[0\].{sentence}$"):
            parsed(soft, hard)


@pytest.mark.parametrize("key", ["memory", "vcpus", "maxmem"])
def test_each_number_of_the_hosts_file_has_its_bound(load, key):
    for number in (0, 1, 2**40):
        load(config("true"), {key: number})
        assert getattr(runx.Host(), key) == number
    for wrong in (-1, "1", True, 0.5):
        with pytest.raises(runx.Error, match=f"host.json: {key} must"):
            load(config("true"), {key: wrong})


@pytest.mark.parametrize("key", ["memory", "vcpus", "maxmem", "maxvcpus"])
def test_an_annotated_number_has_seven_digits_at_most(load, key):
    def annotated(text):
        return load({**config("true"), "annotations": {f"org.runx.{key}": text}}, {"maxmem": 10**7})

    parsed = annotated("9999999")
    found = {
        "memory": parsed.resources.memory >> 20, "vcpus": parsed.resources.fixed_vcpus,
        "maxmem": parsed.machine.maxmem, "maxvcpus": parsed.machine.maxvcpus,
    }  # fmt: skip
    assert found == {**dict.fromkeys(found, 0), key: 9999999} and parsed.warnings == []
    empty, none = annotated(""), load(config("true"))
    assert (empty.machine.__dict__, empty.base) == (none.machine.__dict__, none.base)
    for wrong in ("10000000", "-1", "1.5", "0x1", "1 ", "64m", "\u0661"):
        with pytest.raises(runx.Error, match=f"^config.json: the annotation org.runx.{key} must be a number$"):
            annotated(wrong)


@pytest.mark.parametrize("key", ["hostname", "domainname"])
def test_a_name_has_64_bytes_at_most(load, key):
    assert getattr(load({**config("true"), key: "é" * 32}), key) == "é" * 32
    with pytest.raises(runx.Error, match="must not be longer than 64 bytes"):
        load({**config("true"), key: "é" * 32 + "x"})


def test_a_version_has_60_characters_at_most():
    assert runx.check_version("1.0.0-" + "x" * 54)
    with pytest.raises(runx.Error, match="is not supported"):
        runx.check_version("1.0.0-" + "x" * 55)


@pytest.mark.parametrize("version", ["1..0", "1.0.", "1.0", "1.0.0.0", "01.0.0", "1.0.x", "1.-1.0", ""])
def test_a_version_has_three_numbers(version):
    with pytest.raises(runx.Error, match="is not supported"):
        runx.check_version(version)


# ---- every field of every record


def test_every_field_of_a_process(load):
    spec = config(
        "a", "b", env=["X=1", "Y=2"], cwd="/c", terminal=True, consoleSize={"height": 3, "width": 4},
        user={"uid": 5, "gid": 6, "umask": 7, "additionalGids": [8, 9]}, noNewPrivileges=True, oomScoreAdj=10,
        capabilities={
            "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_SETUID"], "inheritable": ["CAP_KILL"],
            "permitted": ["CAP_SETUID", "CAP_KILL", "CAP_BPF"], "ambient": ["CAP_KILL"],
        },
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 11, "hard": 12}, {"type": "RLIMIT_CPU", "soft": 13, "hard": 13}],
        ioPriority={"class": "IOPRIO_CLASS_IDLE", "priority": 1},
        scheduler={
            "policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RECLAIM", "SCHED_FLAG_DL_OVERRUN"], "nice": -2,
            "priority": 14, "runtime": 15, "deadline": 16, "period": 17,
        },
    )  # fmt: skip
    spec["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts"})
    assert load(spec).process.__dict__ == {
        "args": ["a", "b"], "env": ["X=1", "Y=2"], "cwd": "/c", "terminal": True, "is_piped": False,
        "console_size": (3, 4), "uid": 5, "gid": 6, "umask": 7, "groups": [8, 9],
        "no_new_privileges": True, "oom_score_adj": 10,
        "capabilities": {
            "bounding": 1 << 0 | 1 << 5, "effective": 1 << 7, "inheritable": 1 << 5,
            "permitted": 1 << 7 | 1 << 5 | 1 << 39, "ambient": 1 << 5,
        },
        "rlimits": [(LINUX["RLIMIT_NOFILE"], 11, 12), (LINUX["RLIMIT_CPU"], 13, 13)], "io_priority": 3 << 13 | 1,
        "scheduler": (6, 2 | 4, -2, 14, 15, 16, 17),
    }  # fmt: skip


def test_a_process_that_says_little(load):
    spec = {**config("a"), "process": {"args": ["a"], "cwd": "/"}}
    assert load(spec).process.__dict__ == {
        "args": ["a"], "env": [], "cwd": "/", "terminal": False, "is_piped": False, "console_size": (0, 0),
        "uid": 0, "gid": 0, "umask": 0o022, "groups": [], "no_new_privileges": False, "oom_score_adj": 0,
        "capabilities": dict.fromkeys(runx.CAPABILITY_SETS, 0), "rlimits": [], "io_priority": None, "scheduler": None,
    }  # fmt: skip
    for missing in ({"cwd": "/"}, {"args": [], "cwd": "/"}):
        with pytest.raises(runx.Error, match="process.args must not be empty"):
            load({**spec, "process": missing})
    with pytest.raises(runx.Error, match="process.cwd is missing"):
        load({**spec, "process": {"args": ["a"]}})


def test_every_field_of_linux(load):
    spec = config("true")
    spec["linux"] = {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "network", "time", "cgroup", "uts")],
        "devices": [
            {"path": "/a", "type": "c", "major": 1, "minor": 2, "fileMode": 0o107640, "uid": 3, "gid": 4},
            {"path": "/b", "type": "b", "major": 5, "minor": 6},
            {"path": "/p", "type": "p"},
            {"path": "/u", "type": "u", "major": 7, "minor": 8},
        ],
        "sysctl": {"a.b": "1"}, "maskedPaths": ["/m"], "readonlyPaths": ["/r"], "rootfsPropagation": "rslave",
        "personality": {"domain": "LINUX32"}, "seccomp": {"defaultAction": "SCMP_ACT_LOG"}, "cgroupsPath": "/g",
        "resources": {
            "pids": {"limit": 1}, "hugepageLimits": [{"pageSize": "64KB", "limit": 2}, {"pageSize": "1GB", "limit": 3}],
            "unified": {"cpu.idle": "1"},
        },
    }  # fmt: skip
    parsed = load(spec)
    assert parsed.linux.__dict__ == {
        "pid_namespace": True,
        "devices": [
            ("/a", stat.S_IFCHR | 0o7640, 1, 2, 3, 4), ("/b", stat.S_IFBLK | 0o666, 5, 6, 0, 0),
            ("/p", stat.S_IFIFO | 0o666, 0, 0, 0, 0), ("/u", stat.S_IFCHR | 0o666, 7, 8, 0, 0),
        ],
        "sysctl": {"a.b": "1"}, "masked_paths": ["/m"], "readonly_paths": ["/r"],
        "propagation": LINUX["MS_SLAVE"], "personality": LINUX["PER_LINUX32"],
        "cgroup": [
            ("pids.max", "1"), ("hugetlb.64KB.max", "2"), ("hugetlb.64KB.rsvd.max", "2"), ("hugetlb.1GB.max", "3"),
            ("hugetlb.1GB.rsvd.max", "3"), ("cpu.idle", "1"),
        ],
        "seccomp": {"defaultAction": "SCMP_ACT_LOG"},
    }  # fmt: skip
    assert (parsed.cgroup, parsed.namespace) == ("/g", "")
    spec["linux"]["personality"]["domain"] = "LINUX"
    assert load(spec).linux.personality == LINUX["PER_LINUX"]


def test_a_linux_that_says_nothing(load):
    parsed = load(config("true"))
    assert parsed.linux.__dict__ == {
        "pid_namespace": False, "devices": [], "sysctl": {}, "masked_paths": [], "readonly_paths": [],
        "propagation": 0, "personality": None, "cgroup": [], "seccomp": None,
    }  # fmt: skip
    assert (parsed.cgroup, parsed.namespace, parsed.readonly, parsed.hostname, parsed.domainname) == (
        "", None, False, "", ""
    )  # fmt: skip


def test_every_other_field_of_a_config(load, tmp_path):
    spec = config("true", env=["NETCONF=/a,n", "NETCONF2=/b,m,10.0.0.1"])
    spec["root"]["readonly"] = True
    spec.update(ociVersion="1.2.3", hostname="h", domainname="d")
    spec["annotations"] = {"org.runx.rate": "1MB/s@20ms", "org.runx.maxvcpus": "3", "org.runx.vcpus": "2", "x": "y"}
    spec["hooks"] = {"prestart": [{"path": "/h", "args": ["a"], "env": ["E=1"], "timeout": 5}]}
    spec["linux"] = {"resources": {"memory": {"limit": 96 << 20}}}
    parsed = load(spec, {"netconf": ["/n"], "memory": 33, "vcpus": 4})
    assert (parsed.oci_version, parsed.hostname, parsed.domainname, parsed.readonly) == ("1.2.3", "h", "d", True)
    assert (parsed.rootfs, parsed.rate, parsed.hooks) == (str(tmp_path / "rootfs"), "20000,20000", spec["hooks"])
    assert parsed.annotations == spec["annotations"] and parsed.raw_resources == spec["linux"]["resources"]
    assert parsed.netconf == [("NETCONF", "/a", "n", ""), ("NETCONF2", "/b", "m", "10.0.0.1")]
    assert parsed.netconf_folders == ["/n"]
    base = {"default_memory": 33, "minimum_memory": 24, "default_vcpus": 4, "fixed_vcpus": 2, "most_vcpus": 4096}
    assert parsed.base == base
    assert parsed.resources.__dict__ == {
        "memory": 96 << 20, "quota": 0, "period": 100000, "shares": 0, "cpus": "", **base
    }  # fmt: skip
    hook = runx.parse_hooks(parsed.hooks, "prestart")[0]
    assert hook.__dict__ == {"path": "/h", "args": ["a"], "env": ["E=1"], "timeout": 5}


def test_every_field_of_a_machine(load, tmp_path):
    (tmp_path / "vmlinuz").touch()
    (tmp_path / "initrd").touch()
    (tmp_path / "disk").write_bytes(bytes(512))
    (tmp_path / "extra").write_text("e=1\n")
    spec = config("true")
    spec["vm"] = {
        "kernel": {"path": str(tmp_path / "vmlinuz"), "initrd": str(tmp_path / "initrd"), "parameters": ["k=1"]},
        "image": {"path": str(tmp_path / "disk")}, "hypervisor": {"path": "/usr/sbin/xl", "parameters": ["h=1"]},
        "hwConfig": {"deviceTree": "/t", "memory": 5 << 20, "vcpus": 2},
    }  # fmt: skip
    annotations = {"maxmem": "70", "maxvcpus": "6", "type": "pv", "rootfs": "9p", "cmdline": "a=1"}
    annotations["xlconf"] = str(tmp_path / "extra")
    spec["annotations"] = {f"org.runx.{key}": value for key, value in annotations.items()}
    host = {"annotations": list(runx.ANNOTATIONS), "type": "pvh", "cmdline": "z", "xlconf": [str(tmp_path)]}
    parsed = load(spec, host)
    assert parsed.machine.__dict__ == {
        "type": "pv", "maxmem": 70, "maxvcpus": 6, "rootfs": "9p", "image": "", "own_init": True,
        "kernel": (str(tmp_path / "vmlinuz"), False), "ramdisk": (str(tmp_path / "initrd"), False),
        "cmdline": ["z", "a=1", "k=1"], "lines": ["h=1", "e=1\n"],
        "share_device": "9pfs", "options": {
            "device_tree": "/t", "dtdev": [], "iomem": [], "irqs": [],
            "disk": [f"format=raw,vdev=xvda,access=rw,target={tmp_path / 'disk'}"],
        },
    }  # fmt: skip
    assert (parsed.resources.memory, parsed.resources.fixed_vcpus, parsed.base["minimum_memory"]) == (5 << 20, 2, 1)
    assert parsed.raw_resources == {"memory": {"limit": 5 << 20}}
    plain = load(config("true"), {}).machine
    assert plain.__dict__ == {
        "type": "", "maxmem": 0, "maxvcpus": 0, "rootfs": "auto", "image": "", "own_init": False, "kernel": None,
        "ramdisk": None, "cmdline": [], "lines": [], "share_device": "fuse",
        "options": {"device_tree": "", "dtdev": [], "iomem": [], "irqs": []},
    }  # fmt: skip


def test_every_field_of_the_hosts_file(load):
    settings = {
        "type": "pv", "memory": 1, "vcpus": 2, "cmdline": "c", "rootfs": "9p", "xlconf": ["/x"], "netconf": ["/n"],
        "maxmem": 3, "annotations": ["rate"], "environment": ["XLCONF"],
    }  # fmt: skip
    load(config("true"), settings)
    assert runx.Host().__dict__ == settings
    load(config("true"), dict.fromkeys(settings))
    assert runx.Host().__dict__ == {
        "type": "", "memory": 0, "vcpus": 0, "cmdline": "", "rootfs": "auto", "xlconf": ["/etc/runX/xl"],
        "netconf": ["/etc/cni/net.d"], "maxmem": 512,
        "annotations": ["memory", "vcpus", "maxmem", "maxvcpus", "rootfs", "rate"],
        "environment": ["NETCONF", "RUNX_KERNEL", "RUNX_RAMDISK"],
    }  # docs/security.md  # fmt: skip
    load(config("true"), {key: [] for key in ("xlconf", "netconf", "annotations", "environment")})
    host = runx.Host()
    assert (host.xlconf, host.netconf, host.annotations, host.environment) == ([], [], [], [])


def test_every_field_of_a_mount(load, tmp_path, monkeypatch):
    status = [4096, 4096, 1, 0, 0, 0, 0, 0, LINUX["MS_RDONLY"] | LINUX["MS_RELATIME"], 255]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    spec = config("true")
    spec["mounts"] = [
        {"destination": "t", "type": "tmpfs", "source": "s", "options": ["ro", "a=1", "tmpcopyup", "b", "slave"]},
        {"destination": "/b", "source": "rootfs", "options": ["rbind", "nosuid", "suid", "rprivate"]},
        {"destination": "/c", "type": "tmpfs", "options": ["tmpcopyup", "notmpcopyup"]},
    ]
    mounts = load(spec).mounts
    assert [mount.__dict__ for mount in mounts] == [
        {"destination": "/t", "type": "tmpfs", "source": "s", "flags": LINUX["MS_RDONLY"], "data": "a=1,b",
         "propagation": LINUX["MS_SLAVE"], "copy_up": True, "kept": 0},
        {"destination": "/b", "type": "", "source": str(tmp_path / "rootfs"), "data": "", "propagation": 0,
         "flags": LINUX["MS_BIND"] | LINUX["MS_REC"], "copy_up": False, "kept": 0, "place": "mounts/0"},
        {"destination": "/c", "type": "tmpfs", "source": "", "flags": 0, "data": "", "propagation": 0,
         "copy_up": False, "kept": 0},
    ]  # fmt: skip
    assert [(mount.on_host(), mount.is_sealed_late(), mount.is_folder()) for mount in mounts] == [
        (False, True, True), (True, False, True), (False, False, True)
    ]  # fmt: skip


def test_what_of_a_mount_is_a_file_or_the_guests(tmp_path):
    def mount(**fields):
        usual = {"destination": "/d", "type": "tmpfs", "source": "", "flags": 0, "data": "", "propagation": 0}
        return record(runx.Mount, **{**usual, "copy_up": False, **fields})

    (tmp_path / "file").touch()
    bind, readonly = LINUX["MS_BIND"], LINUX["MS_RDONLY"]
    assert not mount(source=str(tmp_path / "file"), flags=bind).is_folder()
    assert mount(source=str(tmp_path), flags=bind).is_folder()
    assert mount(flags=bind).on_host() and mount(type="overlay").on_host() and not mount().on_host()
    sealed = {"tmpfs": True, "ramfs": False, "overlay": False}
    assert {kind: mount(type=kind, flags=readonly).is_sealed_late() for kind in sealed} == sealed
    assert not mount().is_sealed_late() and not mount(flags=readonly | bind).is_sealed_late()


# ---- sizes


def resources(**fields):
    usual = {"memory": 0, "quota": 0, "period": 100000, "shares": 0, "cpus": "", **BASE}
    return record(runx.Resources, **{**usual, **fields})


def test_what_memory_is_in_mebibytes():
    mebibytes = [resources(memory=memory).mebibytes(999) for memory in (-1, 0, 1, (48 << 20) - 1, 48 << 20, 49 << 20)]
    assert mebibytes == [999, 128, 48, 48, 48, 49]
    assert resources(memory=(50 << 20) - 1).mebibytes(999) == 49


def test_how_many_vcpus_there_are():
    def vcpus(**fields):
        return resources(**fields).vcpus(9)

    assert [vcpus(quota=quota) for quota in (-1, 0, 1, 100000, 100001, 200000)] == [9, 1, 1, 1, 2, 2]
    assert vcpus(default_vcpus=3) == 3 and vcpus(fixed_vcpus=5, quota=100000) == 5
    assert vcpus(quota=-1, most_vcpus=4) == vcpus(fixed_vcpus=5, most_vcpus=4) == vcpus(quota=10**9, most_vcpus=4) == 4


def test_what_a_quota_caps_and_a_share_weighs():
    caps = [resources(quota=quota).share()[1] for quota in (-1, 0, 1, 999, 1000, 1999, 2000, 150000)]
    assert caps == [0, 0, 1, 1, 1, 1, 2, 150]
    assert resources(quota=300000, most_vcpus=2).share()[1] == 200
    weights = [resources(shares=shares).share()[0] for shares in (0, 2, 8, 1024, 262143, 262144)]
    assert weights == [256, 1, 2, 256, 65535, 65535]


def test_resources_that_are_odd():
    def parsed(**spec):
        found = runx.Resources(spec, "here", BASE)
        return found.memory, found.quota, found.period, found.shares, found.cpus

    assert parsed() == (0, 0, 100000, 0, "")
    odd = {"memory": {"limit": -2}, "cpu": {"quota": -5, "period": -1, "shares": -1, "cpus": "0-3,7"}}
    assert parsed(**odd) == (-1, -1, 100000, 0, "0-3,7")
    assert parsed(memory={"limit": 1}, cpu={"quota": 2, "period": 3, "shares": 4}) == (1, 2, 3, 4, "")
    for spec, words in (
        ({"cpu": {"cpus": "0;1"}}, "here.cpu.cpus must be a list"),
        ({"cpu": {"quota": "1"}}, "here.cpu.quota must be a JSON integer"),
        ({"memory": []}, "here.memory must be a JSON object"),
    ):
        with pytest.raises(runx.Error, match=words):
            parsed(**spec)


@pytest.mark.parametrize(
    "text, rate",
    [
        ("8b/s@1s", "1,1000000"), ("1B/s@1s", "1,1000000"), ("1KB/s", "50,50000"), ("1Mb/s@20ms", "2500,20000"),
        ("2MB/s@7us", "14,7"), ("1GB/s", "50000000,50000"), ("4294967295B/s@1s", "4294967295,1000000"),
        ("1B/s@4294s", "4294,4294000000"),
    ],
)  # fmt: skip
def test_rates(text, rate):
    assert runx.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["7b/s@1s", "4294967296B/s@1s", "1B/s@4295s", "0B/s", "1TB/s", "1B", "1b/s@1h", "x"])
def test_wrong_rates_are_refused(text):
    with pytest.raises(runx.Error, match=r"the rate .* (is out of range|must be such as)"):
        runx.parse_rate(text)


@pytest.mark.parametrize("form", ["{}b/s", "1B/s@{}s"])
@pytest.mark.parametrize("digit, count", [("9", 5000), ("9", 13), ("\u0661", 1)])
def test_a_rate_has_up_to_twelve_digits_that_are_ours(form, digit, count):
    with pytest.raises(runx.Error, match="must be such as 10Mb/s"):
        runx.parse_rate(form.format(digit * count))
    assert runx.parse_rate("1" + "0" * 11 + "b/s@1ms")


def test_a_size_for_xl_that_is_no_number_is_left_to_xl():
    lines = ["memory=64; vcpus = '2'", f"memory={'9' * 5000}", "memory=\u0661"]
    machine = SimpleNamespace(lines=lines, maxmem=0, maxvcpus=0)
    config = SimpleNamespace(machine=machine, resources=runx.Resources({}, "x", {"default_memory": 32}))
    assert runx.vm_sizes(config) == {"memory": 64, "maxmem": 32, "vcpus": 2, "maxvcpus": 1}


# ---- names and the kernel's numbers


@pytest.mark.parametrize("name", [name for name in LINUX if name.startswith("MS_") and hasattr(runx, name)])
def test_flags_of_mount(name):
    """The others are in MOUNT_OPTIONS alone."""
    assert getattr(runx, name) == LINUX[name]


SETS = {  # runtime-spec config.md "Linux mount options", mount(8)
    "ro": "RDONLY", "nosuid": "NOSUID", "nodev": "NODEV", "noexec": "NOEXEC", "noatime": "NOATIME",
    "nodiratime": "NODIRATIME", "relatime": "RELATIME", "strictatime": "STRICTATIME", "nosymfollow": "NOSYMFOLLOW",
}  # fmt: skip
CLEARS = {
    "rw": "RDONLY", "suid": "NOSUID", "dev": "NODEV", "exec": "NOEXEC", "atime": "NOATIME", "diratime": "NODIRATIME",
    "norelatime": "RELATIME", "nostrictatime": "STRICTATIME", "symfollow": "NOSYMFOLLOW",
}  # fmt: skip


def test_options_of_mount():
    expected = {"defaults": (0, 0), "bind": (LINUX["MS_BIND"], 0), "rbind": (LINUX["MS_BIND"] | LINUX["MS_REC"], 0)}
    for prefix in ("", "r"):
        expected.update({prefix + option: (LINUX[f"MS_{name}"], 0) for option, name in SETS.items()})
        expected.update({prefix + option: (0, LINUX[f"MS_{name}"]) for option, name in CLEARS.items()})
    for option, without, name in (
        ("sync", "async", "SYNCHRONOUS"), ("lazytime", "nolazytime", "LAZYTIME"), ("mand", "nomand", "MANDLOCK"),
        ("iversion", "noiversion", "I_VERSION"), ("silent", "loud", "SILENT"),
    ):  # fmt: skip
        expected.update({option: (LINUX[f"MS_{name}"], 0), without: (0, LINUX[f"MS_{name}"])})
    expected.update({name: (LINUX[f"MS_{name.upper()}"], 0) for name in ("dirsync", "remount")})
    expected.update(dict.fromkeys(("acl", "noacl"), (0, 0)))
    expected["rro"] = (LINUX["MS_RDONLY"] | runx.RECURSIVE_RO, 0)
    assert runx.MOUNT_OPTIONS == expected
    assert runx.RECURSIVE_RO not in LINUX.values() and not runx.RECURSIVE_RO & 0xFFFFFFFF  # none of mount(2)'s


def test_propagations_of_mount():
    names = ("private", "slave", "shared", "unbindable")
    flags = {name: LINUX[f"MS_{name.upper()}"] for name in names}
    assert runx.PROPAGATIONS == {
        "": 0, **flags, **{f"r{name}": flag | LINUX["MS_REC"] for name, flag in flags.items()}
    }  # fmt: skip


def test_what_the_guests_kernel_mounts():
    assert set(runx.GUEST_FILESYSTEMS) == {
        "proc", "sysfs", "tmpfs", "ramfs", "devpts", "mqueue", "cgroup", "cgroup2", "securityfs", "hugetlbfs",
        "binfmt_misc",
    }  # docs/config.md  # fmt: skip


def test_namespaces():
    names = {"mount": "NS", "network": "NET"}
    kinds = ("cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts")
    assert runx.NAMESPACES == {kind: LINUX[f"CLONE_NEW{names.get(kind, kind.upper())}"] for kind in kinds}
    for kind, name in {"mount": "mnt", "network": "net", **{kind: kind for kind in ("ipc", "pid", "uts")}}.items():
        runx.check_namespace(kind, f"/proc/self/ns/{name}")  # is one, says the kernel


def test_capabilities_rlimits_and_policies():
    assert runx.CAPABILITIES == {name: 1 << number for name, number in LINUX.items() if name.startswith("CAP_")}
    assert runx.CAPABILITY_SETS == ("bounding", "effective", "inheritable", "permitted", "ambient")
    names = [name for name in LINUX if name.startswith("RLIMIT_")]
    limits = [{"type": name, "soft": 0, "hard": 0} for name in names]
    assert runx.parse_rlimits(section(rlimits=limits)) == [(LINUX[name], 0, 0) for name in names]
    for name in ("OTHER", "FIFO", "RR", "BATCH", "IDLE", "DEADLINE"):
        policy = LINUX["SCHED_NORMAL" if name == "OTHER" else f"SCHED_{name}"]
        assert runx.parse_scheduler(section(policy=f"SCHED_{name}")) == (policy, 0, 0, 0, 0, 0, 0)
    assert runx.parse_scheduler(section(policy="SCHED_ISO"))[0] == 4  # reserved in <linux/sched.h>
    for name in [name for name in LINUX if name.startswith("SCHED_FLAG_")]:
        spec = section(policy="SCHED_OTHER", flags=[name])
        assert runx.parse_scheduler(spec)[1] == LINUX[name]
    for name in ("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"):
        expected = LINUX[name] << LINUX["IOPRIO_CLASS_SHIFT"]
        assert runx.parse_io_priority(section(**{"class": name})) == expected
        assert runx.parse_io_priority(section(**{"class": name, "priority": 7})) == expected | 7
    with pytest.raises(runx.Error, match="class must be one of IOPRIO_CLASS_RT"):
        runx.parse_io_priority(section(**{"class": "IOPRIO_CLASS_NONE"}))


def test_hooks_come_in_the_order_of_a_life():
    kinds = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
    assert runx.HOOK_KINDS == kinds


# ---- seccomp


def test_actions_flags_and_architectures_of_seccomp():
    assert runx.SECCOMP_ACTIONS == {
        f"SCMP_ACT_{name}": LINUX[f"SECCOMP_RET_{name}"]
        for name in ("KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP", "ERRNO", "TRACE", "LOG", "ALLOW")
    }
    flags = {name: LINUX[name] for name in LINUX if name.startswith("SECCOMP_FILTER_FLAG_")}
    for idle in ("TSYNC", "WAIT_KILLABLE_RECV"):
        flags[f"SECCOMP_FILTER_FLAG_{idle}"] = 0
    assert runx.SECCOMP_FLAGS == flags
    assert runx.SECCOMP_ARCHITECTURES == {
        "x86_64": (("SCMP_ARCH_X86_64", LINUX["AUDIT_ARCH_X86_64"]), ("SCMP_ARCH_X86", LINUX["AUDIT_ARCH_I386"])),
        "aarch64": (("SCMP_ARCH_AARCH64", LINUX["AUDIT_ARCH_AARCH64"]),),
        "armv7l": (("SCMP_ARCH_ARM", LINUX["AUDIT_ARCH_ARM"]),),
    }
    every = {"defaultAction": "SCMP_ACT_ERRNO", "flags": list(flags)}
    assert runx.compile_seccomp(every, "x86_64")[0] == sum(set(flags.values()))


def test_instructions_of_bpf():
    def code(*names):
        return sum({LINUX[f"BPF_{name}"] for name in names})

    assert (runx.LOAD, runx.AND, runx.RETURN) == (code("LD", "W", "ABS"), code("ALU", "AND", "K"), code("RET", "K"))
    jumps = (runx.JUMP, runx.IF_EQUAL, runx.IF_GREATER, runx.IF_NOT_LESS)
    assert jumps == tuple(code("JMP", name, "K") for name in ("JA", "JEQ", "JGT", "JGE"))


@pytest.mark.parametrize("action", ["TRAP", "ERRNO", "TRACE", "LOG", "ALLOW", "KILL_PROCESS"])
def test_the_data_of_an_action(action):
    def returned(**data):
        spec = {
            "defaultAction": "SCMP_ACT_KILL",
            "syscalls": [{"names": ["x"], "action": f"SCMP_ACT_{action}", **data}],
        }
        _, program = runx.compile_seccomp(spec, "aarch64")
        return [k for code, _, _, k in program if code == runx.RETURN][1]  # behind that for what is not there

    carries = action in ("ERRNO", "TRACE")
    value = LINUX[f"SECCOMP_RET_{action}"]
    assert returned() == value | (1 if carries else 0)  # EPERM
    assert [returned(errnoRet=data) for data in (0, 2, 65535)] == [
        value | (data if carries else 0) for data in (0, 2, 65535)
    ]
    for data in (-1, 65536):
        with pytest.raises(runx.Error, match=r"syscalls\[0\].errnoRet must be from 0 to 65535"):
            returned(errnoRet=data)


@pytest.mark.parametrize("key, most", [("index", 5), ("value", U64), ("valueTwo", U64)])
def test_numbers_of_a_condition_have_bounds(key, most):
    def condition(number):
        spec = {"op": "SCMP_CMP_MASKED_EQ", "index": 1, "value": U64, "valueTwo": 3, key: number}
        return runx.seccomp_condition(section(**spec))

    usual = {"index": 1, "value": U64, "valueTwo": 3}
    for number in (0, 1, most):
        numbers = {**usual, key: number}
        expected = (numbers["index"], numbers["value"] & numbers["valueTwo"], numbers["value"])
        index, operator, value, mask = condition(number)
        assert (index, value, mask) == expected and operator == "SCMP_CMP_MASKED_EQ"
    for number in (-1, most + 1):
        with pytest.raises(runx.Error, match=f"{key} must be from 0 to {most}"):
            condition(number)


def filter_of(*names, last=()):
    syscalls = [{"names": list(names), "action": "SCMP_ACT_ALLOW"}, *last]
    return runx.compile_seccomp({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": syscalls}, "aarch64")[1]


def test_a_filter_has_4096_instructions_at_most():
    longest = [f"call{number}" for number in range(2044)]
    assert len(filter_of(*longest)) == LINUX["BPF_MAXINSNS"]
    conditional = {"names": ["x"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "op": "SCMP_CMP_EQ"}]}
    with pytest.raises(runx.Error, match="they make 4097 instructions, and 4096 are possible"):
        filter_of(*longest[:2041], last=[conditional])


def test_a_jump_passes_over_255_instructions_at_most():
    def equal(*indexes):
        args = [{"index": index, "value": 0, "op": "SCMP_CMP_EQ"} for index in indexes]
        return {"names": ["x"], "action": "SCMP_ACT_KILL", "args": args}

    def jump_over(*rules):
        program = filter_of("z", last=rules)
        for at, (_, jump_true, jump_false, _) in enumerate(program):
            assert 0 <= jump_true <= 255 and 0 <= jump_false <= 255 and at + max(jump_true, jump_false) < len(program)
        for instruction in program:
            struct.pack("<HBBI", *instruction[:3], 0)
        at = next(at for at, instruction in enumerate(program) if instruction[3] == "x")
        return program[at][:3], program[at + 1]

    assert jump_over(*[equal(0)] * 49, equal(0, 1))[0] == (runx.IF_EQUAL, 0, 255)
    first, second = jump_over(*[equal(0)] * 51)
    assert first == (runx.IF_EQUAL, 1, 0) and second == (runx.JUMP, 0, 0, 256)


def test_what_is_newer_than_the_filter_is_not_there_unless_all_is_let_through_or_nothing_is_named():
    ends = {"ERRNO": True, "KILL": True, "KILL_PROCESS": True, "TRACE": False, "LOG": False, "ALLOW": False}
    named = [{"names": ["x"], "action": "SCMP_ACT_TRAP"}]
    cases = [(f"SCMP_ACT_{action}", named, expected) for action, expected in ends.items()]
    for action, syscalls, expected in [*cases, ("SCMP_ACT_ERRNO", [], False)]:
        spec = {"defaultAction": action, "defaultErrnoRet": 0xFFFF, "syscalls": syscalls}
        _, program = runx.compile_seccomp(spec, "x86_64")
        assert ((runx.IF_GREATER, 0, 1, "max") in program) is expected
        not_there = (runx.RETURN, 0, 0, LINUX["SECCOMP_RET_ERRNO"] | 38)  # ENOSYS
        assert (not_there in program) is bool(syscalls)  # where all is let through, what x32 calls


# ---- namespaces, images, hosts


def test_the_path_of_each_namespace_is_looked_at(load, monkeypatch):
    seen = []
    monkeypatch.setattr(runx, "check_namespace", lambda kind, path: seen.append((kind, path)))
    monkeypatch.setattr(runx.os.path, "samefile", lambda *paths: False)
    entries = [{"type": kind} for kind in ("pid", "mount", "ipc")] + [{"type": "network", "path": "/n"}]
    assert load({**config("true"), "linux": {"namespaces": entries}}).namespace == "/n"
    assert seen == [("network", "/n")]


@pytest.mark.parametrize("kind, content, sentence", [
    ("qcow2", b"QFI\xfb" + bytes(75), "not in the format qcow2"),
    ("qcow2", b"qfi\xfb" + bytes(76), "not in the format qcow2"),
    ("qcow2", b"QFI\xfb" + struct.pack(">IQ", 2, 0) + bytes(64), ""),
    ("qcow2", b"QFI\xfb" + struct.pack(">IQ", 2, 1) + bytes(64), "it has a backing file"),
    ("qcow2", b"QFI\xfb" + struct.pack(">IQ", 3, 0) + bytes(56) + struct.pack(">Q", 4), "it has a data file outside"),
    ("qcow2", b"QFI\xfb" + struct.pack(">IQ", 3, 0) + bytes(56) + struct.pack(">Q", 3), ""),
    ("qcow2", b"QFI\xfb" + struct.pack(">IQ", 2, 0) + bytes(56) + struct.pack(">Q", 4), ""),
    ("vhd", bytes(512), "not in the format vhd"),
    *(("vhd", bytes(700) + b"conectix" + bytes(52) + struct.pack(">I", number) + bytes(448), sentence)
      for number, sentence in ((2, ""), (3, ""), (4, "it has a parent"))),
    ("vhd", b"conectix" + bytes(52) + struct.pack(">I", 4) + bytes(448) + b"conectix" + bytes(52)
     + struct.pack(">I", 3) + bytes(448), "it has a parent"),
    ("raw", b"QFI\xfb" + struct.pack(">IQ", 2, 1) + bytes(64), ""),
])  # fmt: skip
def test_an_image_that_names_another_file_is_refused(tmp_path, kind, content, sentence):
    (tmp_path / "image").write_bytes(content)
    if sentence:
        with pytest.raises(runx.Error, match=sentence):
            runx.check_references(str(tmp_path / "image"), kind)
    else:
        runx.check_references(str(tmp_path / "image"), kind)
    with pytest.raises(runx.Error, match="cannot read the image .*: No such file"):
        runx.check_references(str(tmp_path / "none"), kind)


def test_an_image_is_the_rootfs_of_some_modes_only(load, tmp_path):
    (tmp_path / "image").write_bytes(bytes(512))
    spec = {**config("true"), "root": {"path": "image"}}
    for mode in ("block", "auto"):
        parsed = load({**spec, "annotations": {"org.runx.rootfs": mode}})
        assert (parsed.rootfs, parsed.machine.rootfs) == (str(tmp_path / "image"), mode)
    for mode in ("9p", "ramdisk"):
        with pytest.raises(runx.Error, match=f"is an image, which is not for {mode}: use org.runx.rootfs=block"):
            load({**spec, "annotations": {"org.runx.rootfs": mode}})
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "none"):
        with pytest.raises(runx.Error, match=f"the rootfs .*/{name} is not a folder"):
            load({**spec, "root": {"path": name}})
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "none", "folder"):
        with pytest.raises(runx.Error, match=f"^the image .*/{name} is neither a file nor a block device$"):
            load({**spec, "vm": {"image": {"path": name}}})


# ---- what is refused, and what else is done, in whole sentences


def refused(load, spec, host=None):
    with pytest.raises(runx.Error) as caught:
        load(spec, host)
    return str(caught.value)


def test_a_bundle_without_a_config_that_can_be_read(tmp_path):
    def sentence():
        with pytest.raises(runx.Error) as caught:
            runx.Config(str(tmp_path))
        return str(caught.value)

    assert sentence() == f"JSON specification file config.json not found in bundle {tmp_path}"
    (tmp_path / "config.json").write_text("[]")
    assert sentence() == "config.json must be a JSON object"
    (tmp_path / "config.json").write_text("{")
    assert sentence().startswith(f"cannot read config.json of bundle {tmp_path}: ")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert sentence().startswith(f"cannot read config.json of bundle {tmp_path}: ")


def test_a_hook_in_the_vm_needs_an_init_of_ours(load):
    spec = {**config("true"), "hooks": {"startContainer": [{"path": "/h"}]}}
    assert not load(spec).machine.own_init
    spec["annotations"] = {"org.runx.kernel": "/k", "org.runx.ramdisk": "/r"}
    assert refused(load, spec, {"annotations": ["kernel", "ramdisk"]}) == (
        "config.json: hooks.startContainer need runX's own init, and the VM boots another one"
    )
    assert load({**spec, "hooks": {"startContainer": []}}).machine.own_init


@pytest.mark.parametrize("section, key", [("kernel", "path"), ("kernel", "initrd"), ("image", "path")])
def test_a_file_that_vm_names_in_the_rootfs_is_there(load, tmp_path, section, key):
    for name in ("secret", "rootfs/kernel"):
        (tmp_path / name).write_bytes(bytes(512))
    (tmp_path / "rootfs/out").symlink_to(tmp_path / "secret")
    (tmp_path / "link").symlink_to("rootfs")  # what root.path says
    spec = {**config("true"), "root": {"path": "link"}}

    def vm(folder, name):
        files = {"kernel": {"path": str(tmp_path / "rootfs/kernel")}, "image": {}}
        files[section][key] = f"{tmp_path}/{folder}/{name}"
        return {**spec, "vm": files}

    for folder in ("rootfs", "link"):
        load(vm(folder, "kernel"))
        words = f"config.json: vm.{section}.{key}: a link leads from {tmp_path}/{folder}/out out of the rootfs"
        assert refused(load, vm(folder, "out")) == words
    load(vm(".", "secret"))
    (tmp_path / "alias").symlink_to(tmp_path)
    for root in ("link", "./link", "rootfs/"):  # by whatever names the rootfs is
        spec["root"] = {"path": root}
        load(vm("alias/rootfs", "kernel"))
        words = f"config.json: vm.{section}.{key}: a link leads from {tmp_path}/alias/rootfs/out out of the rootfs"
        assert refused(load, vm("alias/rootfs", "out")) == words


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_disk_that_vm_names_in_the_rootfs_is_no_device_of_dom0s(load, tmp_path, has_kernel):
    """An image has nodes as it likes, and a fifo that nobody writes would keep create waiting."""
    (tmp_path / "kernel").write_bytes(bytes(512))
    (tmp_path / "rootfs").mkdir(exist_ok=True)
    os.mknod(tmp_path / "rootfs/disk", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    os.mkfifo(tmp_path / "rootfs/fifo")
    (tmp_path / "rootfs/link").symlink_to("disk")
    vm = {"kernel": {"path": str(tmp_path / "kernel")}} if has_kernel else {}
    for name in ("disk", "link", "fifo"):
        path = tmp_path / "rootfs" / name
        with pytest.raises(runx.Error) as caught:
            load({**config("true"), "vm": {**vm, "image": {"path": str(path)}}})
        is_node = f"config.json: vm.image.path: {path} is in the rootfs, and not a regular file there"
        is_fifo = f"the image {path} is neither a file nor a block device"
        assert str(caught.value) == (is_fifo if name == "fifo" else is_node)


def test_a_disk_that_vm_names_by_its_place_in_the_bundle_is_there(load, tmp_path, monkeypatch):
    for name in ("kernel", "disks/own"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(512))
    monkeypatch.chdir("/")
    vm = {"kernel": {"path": str(tmp_path / "kernel")}, "image": {"path": "disks/own"}}
    disk = f"format=raw,vdev=xvda,access=rw,target={tmp_path}/disks/own"
    assert load({**config("true"), "vm": vm}).machine.options["disk"] == [disk]


def test_a_bundle_is_read_from_a_folder_that_is_gone(load, tmp_path, monkeypatch):
    (tmp_path / "rootfs").mkdir(exist_ok=True)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert load({**config("true"), "root": {"path": "rootfs"}}).rootfs == str(tmp_path / "rootfs")


def test_an_image_that_vm_names_by_its_place_in_the_bundle_is_there(load, tmp_path, monkeypatch):
    for name in ("secret", "rootfs/disk"):
        (tmp_path / name).write_bytes(bytes(512))
    (tmp_path / "rootfs/out").symlink_to(tmp_path / "secret")
    monkeypatch.chdir("/")
    spec = {**config("true"), "root": {"path": "rootfs"}, "vm": {"image": {"path": "rootfs/disk"}}}
    assert load(spec).rootfs == str(tmp_path / "rootfs/disk")
    spec["vm"]["image"]["path"] = "rootfs/out"
    words = f"config.json: vm.image.path: a link leads from {tmp_path}/rootfs/out out of the rootfs"
    assert refused(load, spec) == words


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"mounts": [{"destination": "/d", "source": "none", "options": ["bind"]}]}, None),
        ({"mounts": [{"destination": "/d", "source": "x"}]}, "cannot mount at /d: the mount has no type"),
        ({"mounts": [{"destination": "/d", "type": "tmpfs", "gidMappings": [{}]}]},
         "cannot mount  at /d: ID-mapped mounts are not supported"),
        ({"process": {"args": ["a"], "cwd": "/", "env": ["NETCONF=a,n"]}},
         'NETCONF must be "/path/to/cni/file,name" with ",IP" or without, not a,n'),
        ({"process": {"args": ["a"], "cwd": "/", "env": ["NETCONF1=/a"]}},
         'NETCONF1 must be "/path/to/cni/file,name" with ",IP" or without, not /a'),
        ({"vm": {"hypervisor": {"path": "/usr/sbin/xm"}}},
         "config.json: vm.hypervisor.path cannot be /usr/sbin/xm: runX drives Xen with xl"),
        ({"linux": {"gidMappings": [{}]}},
         "config.json: linux.gidMappings cannot be applied: the container's root is root of its own VM"),
        ({"root": None}, "config.json: root.path is missing"),
        ({"ociVersion": "2.0.0"}, 'config.json: ociVersion "2.0.0" is not supported: runX knows 1.0.0 to 1.3.x'),
        ({"linux": {"sysctl": {"/x": "1"}}}, "config.json: linux.sysctl must hold names such as net.ipv4.ip_forward"),
        ({"process": {"args": ["a"], "cwd": "/", "terminal": True}},
         "config.json: process.terminal needs a mount of the type devpts at /dev/pts"),
    ],
)  # fmt: skip
def test_what_else_is_refused(load, tmp_path, change, sentence):
    sentence = sentence or f"cannot mount {tmp_path}/none at /d: the source does not exist"
    assert refused(load, {**config("true"), **change}) == sentence


def test_memory_of_an_engine_is_memory_of_the_guest(load, monkeypatch):
    def mount(destination, **options):
        mounts = [{"destination": destination, "source": "rootfs", "options": ["rbind", "ro", "idmap"], **options}]
        return load({**config("true"), "mounts": mounts}).mounts[0]

    monkeypatch.setattr(runx, "is_empty_memory", lambda path: path.endswith("/rootfs"))
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255]))
    assert mount("/dev/shm/").__dict__ == {
        "destination": "/dev/shm/", "type": "tmpfs", "source": "shm", "flags": LINUX["MS_RDONLY"],
        "data": "mode=1777,size=65536k", "propagation": 0, "copy_up": False, "kept": 0,
    }  # fmt: skip
    with pytest.raises(runx.Error, match="a bind mount has no option idmap here"):
        mount("/dev/shm2")
    kept = LINUX["MS_NOSUID"] | LINUX["MS_NODEV"] | LINUX["MS_NOEXEC"]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 16384, 0, 0, 0, 0, 0, kept, 255]))
    for options, flags in ((["rbind", "rprivate"], kept), (["rbind", "ro"], LINUX["MS_RDONLY"])):
        assert mount("/dev/shm", options=options).flags == flags
    shared = mount("/dev/shm", options=["rbind", "rprivate"])
    assert list(runx.guest_mount(shared)) == [("mount", "shm", "/dev/shm", "tmpfs", kept, "mode=1777,size=65536k")]


def test_what_is_empty_memory(tmp_path):
    assert not runx.is_empty_memory(str(tmp_path))  # no mount
    assert not runx.is_empty_memory("/proc")  # not empty
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split() for line in file]
    for words in mounts:
        folder = words[4]
        if "tmpfs" in words and os.path.isdir(folder) and os.stat(folder).st_dev == os.makedev(*devices(words[2])):
            assert runx.is_empty_memory(folder) is (os.listdir(folder) == [])


def devices(text):
    return [int(number) for number in text.split(":")]


def test_networks_come_in_the_order_of_their_numbers(load):
    env = ["NETCONF10=/c,n", "NETCONF=/a,n", "NETCONF2=/b,n,1,2", "NETCONF00003=/d,n", "NETCONF000004=x", "NETCONFX=x"]
    assert load(config("true", env=[*env, "NETCONF9="])).netconf == [
        ("NETCONF", "/a", "n", ""), ("NETCONF2", "/b", "n", "1,2"), ("NETCONF00003", "/d", "n", ""),
        ("NETCONF10", "/c", "n", ""),
    ]  # fmt: skip


def test_what_has_no_effect_is_said_of_each(load):
    spec = config("true")
    spec["process"].update(apparmorProfile="x", selinuxLabel="x", execCPUAffinity={"initial": "0"})
    spec["linux"] = {
        "mountLabel": "x", "intelRdt": {"a": {"b": 1}}, "timeOffsets": {"a": 1}, "memoryPolicy": {"mode": "x"},
        "netDevices": {"eth0": {"name": "x"}}, "resources": {
            "blockIO": {"weight": 1}, "network": {"classID": 1}, "rdma": {"x": {"hcaHandles": 1}},
            "cpu": {"burst": 1, "idle": 1, "mems": "0", "realtimePeriod": 1, "realtimeRuntime": 1},
            "memory": {"kernel": 1, "kernelTCP": 1, "swappiness": 1, "disableOOMKiller": True},
        },
    }  # fmt: skip
    spec["linux"]["personality"] = {"domain": "LINUX", "flags": ["x"]}
    names = [f"process.{name}" for name in ("apparmorProfile", "selinuxLabel", "execCPUAffinity")]
    names += ["linux.personality.flags", "linux.memoryPolicy", "linux.timeOffsets", "linux.mountLabel"]
    names += ["linux.intelRdt", "linux.netDevices"]
    names += [f"linux.resources.{name}" for name in ("rdma", "blockIO", "network", "cpu.burst", "cpu.idle", "cpu.mems")]
    names += [f"linux.resources.cpu.realtime{name}" for name in ("Period", "Runtime")]
    names += [f"linux.resources.memory.{name}" for name in ("kernelTCP", "swappiness", "disableOOMKiller", "kernel")]
    assert load(spec).warnings == [f"{name} has no effect on a container in a VM of its own" for name in names]
    spec = config("true")
    spec["linux"] = {"netDevices": {"eth0": {}}}  # which keeps its name
    assert load(spec).warnings == ["linux.netDevices has no effect on a container in a VM of its own"]
    for empty in (None, "", {}, [], 0, -1, {"a": {"b": -1, "c": []}}):
        assert not runx.asks(empty)
    for asked in (1, -2, "x", [0], {"a": {"b": 1}}, True):
        assert runx.asks(asked)
