# SPDX-License-Identifier: Apache-2.0
"""What the guest's init is told: the words of /container/config for what config.json says."""

import json
import os

import pytest
from conftest import config, record

import runx

BIND, RDONLY, REMOUNT = runx.MS_BIND, runx.MS_RDONLY, runx.MS_REMOUNT


@pytest.fixture
def guest(tmp_path):
    """Return the words for a config.json with these changes; those for the image's own /dev are always the same."""
    (tmp_path / "rootfs").mkdir()

    def words(spec, capabilities=None):
        (tmp_path / "config.json").write_text(json.dumps(spec))
        parsed = runx.Config(str(tmp_path))
        found = runx.guest_config(parsed, '{"a": 1}', capabilities or {}).decode().split("\0")[:-1]
        if "/dev" in [mount.destination for mount in parsed.mounts]:
            return found
        devices = [word for words in runx.guest_devices(parsed.linux) for word in words]
        for keyword, same in (("node", devices), ("link", LINKS)):
            place = found.index(keyword)
            assert found[place : place + len(same)] == text(*same)
            del found[place : place + len(same)]
        return found

    return words


LINKS = [word for content, name in runx.DEVICE_LINKS for word in ("link", content, f"/dev/{name}")]


def plain(**others):
    spec = {**config("sh", "-c", "x"), "mounts": [], "hostname": "box", **others}
    spec["process"]["capabilities"] = {}
    return spec


def process(**others):
    spec = plain()
    spec["process"].update(others)
    return spec


def linux(**others):
    return plain(linux=others)


def mounts(*entries):
    return plain(mounts=list(entries))


def text(*words):
    return [str(word) for word in words]


PLAIN = text(0, "cwd", "/", "hostname", "box", "oom", 0, "capabilities", 0, 0, 0, 0, 0, "user", 0, 0, 0o22) + text(
    "arg", "sh", "arg", "-c", "arg", "x", "env", "PATH=/bin"
)


def test_a_plain_process_needs_these_words(guest):
    assert guest(plain()) == PLAIN


def test_a_container_without_a_process_has_only_its_files(guest):
    assert guest({key: value for key, value in plain().items() if key != "process"}) == ["0", "hostname", "box"]


def test_without_a_name_it_has_dom0s(guest):
    assert guest(plain(hostname="", domainname=""))[3:5] == ["hostname", os.uname().nodename]


def test_names_and_arguments_that_are_no_utf_8_arrive_as_they_are(tmp_path):
    process = runx.Process(runx.Section({"args": ["a"], "cwd": "/"}, "the process"), runx.Section({}, "config.json"))
    process.args = ["a\udcff"]  # JSON cannot have them
    words = runx.guest_process(record(runx.Linux, personality=None, seccomp=None), process, [], "")
    assert runx.encode_words(words).endswith(b"\0arg\0a\xff\0")


# what config.json has besides, the words for it, and the word that they stand before
NAMESPACES = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
CASES = [
    (linux(namespaces=NAMESPACES), [str(runx.CLONE_NEWPID)], "cwd"),
    (linux(resources={"pids": {"limit": 7}, "unified": {"memory.swap.max": "0", "memory.high": "5"}}),
     text("cgroup", 2, "pids.max", 7, "memory.high", 5), "cwd"),
    (linux(resources={"unified": {"io.max": "259:0 rbps=2\n253:0 wiops=3\n", "cpu.idle": "1"}}),
     text("cgroup", 3, "io.max", "259:0 rbps=2", "io.max", "253:0 wiops=3", "cpu.idle", 1), "cwd"),
    (linux(devices=[{"path": "/dev/f", "type": "c", "major": 10, "minor": 229, "uid": 1, "gid": 2}]),
     text("node", "/dev/f", 0o20666, 10, 229, 1, 2), "cwd"),
    (process(cwd="/home"), ["cwd", "/home"], "hostname"),
    (linux(sysctl={"net.ipv4.ip_forward": "1", "net/x.y/z": "2"}),
     text("sysctl", "sys/net/ipv4/ip_forward", 1, "sysctl", "sys/net/x.y/z", 2), "oom"),
    (linux(sysctl={"kernel.hostname": "y"}), text("hostname", "box", "sysctl", "sys/kernel/hostname", "y"), "oom"),
    (linux(readonlyPaths=["/a", "/b"], maskedPaths=["/c"]),
     ["readonly", "/a", "readonly", "/b", "mask", "/c"], "oom"),
    (linux(rootfsPropagation="rslave"), text("propagation", "/", runx.MS_SLAVE), "oom"),
    (plain(root={"path": "rootfs", "readonly": True}),
     text("mount", "", "/", "", BIND | REMOUNT | RDONLY, ""), "oom"),
    (plain(domainname="example"), ["domainname", "example"], "oom"),
    (process(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}]), text("rlimit", 7, 5, 6), None),
    (process(oomScoreAdj=-5), ["oom", "-5"], "capabilities"),
    (process(ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 0}), text("ioprio", 2 << 13), "capabilities"),
    (process(ioPriority={"class": "IOPRIO_CLASS_RT", "priority": 4}), text("ioprio", 1 << 13 | 4), "capabilities"),
    (process(scheduler={"policy": "SCHED_BATCH", "nice": 3}), text("scheduler", 3, 0, 3, 0, 0, 0, 0), "capabilities"),
    (linux(personality={"domain": "LINUX"}), ["personality", "0"], "capabilities"),
    (linux(personality={"domain": "LINUX32"}), ["personality", "8"], "capabilities"),
    (process(noNewPrivileges=True), ["no_new_privileges"], "user"),
    (process(user={"uid": 5, "gid": 6, "umask": 7, "additionalGids": [8, 9]}),
     text("user", 5, 6, 7, "group", 8, "group", 9), "arg"),
    (process(args=["a", ""]), ["arg", "a", "arg", ""], "env"),
    (process(env=["A=1", "B=2"]), ["env", "A=1", "env", "B=2"], None),
    (plain(hooks={"startContainer": [
        {"path": "/h", "args": ["h", "x"], "env": ["E=1"], "timeout": 3}, {"path": "/i"}]}),
     text("state", '{"a": 1}', "hook", "/h", 3, 2, "h", "x", 1, "E=1", "hook", "/i", 0, 1, "/i", 0), "arg"),
    (plain(hooks={"prestart": [{"path": "/h"}]}), [], None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_config_json_asks_for_is_told_in_its_place(guest, number):
    spec, expected, before = CASES[number]
    words = guest(spec)
    if before is None:
        assert words[len(words) - len(expected) :] == expected
    else:
        end = words.index(before)
        assert words[end - len(expected) : end] == expected


def test_words_stand_in_one_order_whatever_config_json_has(guest):
    spec = process(
        terminal=True, noNewPrivileges=True, rlimits=[{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}],
        ioPriority={"class": "IOPRIO_CLASS_BE"}, scheduler={"policy": "SCHED_OTHER"},
        user={"uid": 1, "gid": 1, "additionalGids": [2]},
    )  # fmt: skip
    spec["domainname"] = "example"
    spec["root"]["readonly"] = True
    spec["hooks"] = {"startContainer": [{"path": "/h"}]}
    spec["mounts"] = [
        {"destination": "/dev", "type": "tmpfs", "options": ["ro"]}, {"destination": "/dev/pts", "type": "devpts"},
    ]  # fmt: skip
    spec["linux"] = {
        "resources": {"pids": {"limit": 7}}, "devices": [{"path": "/f", "type": "p"}], "sysctl": {"a.b": "1"},
        "maskedPaths": ["/m"], "readonlyPaths": ["/r"], "rootfsPropagation": "shared",
        "personality": {"domain": "LINUX"},
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO"}]},
    }  # fmt: skip
    words = guest(spec, capabilities={"bin/x": b"\1\2"})
    keywords = [
        "file_capability", "cgroup", "mount", "node", "mount", "node", "link", "terminal", "cwd", "mount", "hostname",
        "domainname", "sysctl", "readonly", "mask", "propagation", "mount", "oom", "ioprio", "scheduler",
        "personality", "capabilities", "no_new_privileges", "seccomp", "user", "state", "hook", "group", "arg", "env",
        "rlimit",
    ]  # fmt: skip
    place = 0
    for keyword in keywords:
        place = words.index(keyword, place) + 1
    assert words[1:6] == text("file_capability", "bin/x", 2, 1, 2)


def test_a_seccomp_filter_is_its_flags_and_instructions(guest):
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO"}]}
    spec = linux(seccomp=seccomp)
    words = guest(spec)
    place = words.index("seccomp")
    flags, program = runx.compile_seccomp(seccomp, os.uname().machine)
    flat = [number for instruction in program for number in instruction]
    assert words[place:].index("user") == len(flat) + 3
    assert words[place + 1 : place + 3 + len(flat)] == text(flags, len(program), *flat)


def test_memory_at_dev_has_the_default_devices(guest):
    words = guest(mounts({"destination": "/dev", "type": "tmpfs", "source": "x", "options": ["nosuid", "mode=755"]}))
    expected = text("mount", "x", "/dev", "tmpfs", runx.MS_NOSUID, "mode=755", "node", "/dev/null", 0o20666, 1, 3, 0, 0)
    assert words[1 : 1 + len(expected)] == expected
    nodes = [words[place + 1] for place, word in enumerate(words) if word == "node"]
    assert nodes == [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")]
    links = {words[place + 2]: words[place + 1] for place, word in enumerate(words) if word == "link"}
    assert links == {
        "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
        "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx", "/dev/core": "/proc/kcore",
    }  # fmt: skip


def test_bind_mounts_come_from_the_share_in_their_order(guest, tmp_path):
    (tmp_path / "file").touch()
    words = guest(
        mounts(
            {"destination": "/a", "source": "rootfs", "options": ["rbind", "ro", "rprivate"]},
            {"destination": "/p", "type": "proc"},
            {"destination": "/b", "source": "file", "options": ["bind", "rslave"]},
        )
    )
    expected = [
        "mount", "mounts/0", "/a", "", BIND | runx.MS_REC, "", "mount", "mounts/0", "/a", "", BIND | REMOUNT | RDONLY,
        "", "mount", "proc", "/p", "proc", 0, "", "mount", "mounts/1", "/b", "", BIND, "",
        "propagation", "/b", runx.MS_SLAVE | runx.MS_REC, "cwd",
    ]  # fmt: skip
    assert words[1 : 1 + len(expected)] == text(*expected)


def test_a_cgroup_mount_is_of_version_2_and_makes_a_cgroup(guest):
    words = guest(mounts({"destination": "/c", "type": "cgroup", "options": ["memory"]}))
    assert words[1:9] == text("cgroup", 0, "mount", "cgroup2", "/c", "cgroup2", 0, "")
    assert guest(mounts({"destination": "/c", "type": "cgroup2"}))[1:3] == ["cgroup", "0"]


def test_memory_that_is_read_only_is_sealed_when_all_is_in_it(guest):
    words = guest(mounts({"destination": "/t", "type": "tmpfs", "options": ["ro", "nosuid", "tmpcopyup"]}))
    assert words[1:7] == text("copy_up", "tmpfs", "/t", "tmpfs", runx.MS_NOSUID, "")
    seal = text("mount", "", "/t", "", REMOUNT | BIND | RDONLY | runx.MS_NOSUID, "")
    assert words[9:15] == seal


@pytest.mark.parametrize("bind", [[], ["bind"]])
def test_memory_that_is_mounted_again_read_only_is_sealed_late_too(guest, bind):
    """As by runc: what comes behind it in mounts may lie in it."""
    again = {"destination": "/t", "type": "tmpfs", "options": ["remount", "ro", "nosuid", "tmpcopyup", *bind]}
    words = guest(mounts({"destination": "/t", "type": "tmpfs"}, again, {"destination": "/t/p", "type": "proc"}))
    flags = REMOUNT | runx.MS_NOSUID | (BIND if bind else 0)
    assert words[7:19] == text("mount", "", "/t", "", flags, "", "mount", "proc", "/t/p", "proc", 0, "")
    seal = text("mount", "", "/t", "", REMOUNT | BIND | RDONLY | runx.MS_NOSUID, "")
    assert words[words.index("/t", 13) - 2 :][:6] == seal


@pytest.mark.parametrize("own, there", [(False, True), (True, False)])
def test_a_network_brings_resolv_conf_unless_the_engine_does(guest, tmp_path, own, there):
    spec = plain()
    spec["process"]["env"].append("NETCONF=/etc/cni/net.d/x,net")
    if own:
        (tmp_path / "file").touch()
        spec["mounts"] = [{"destination": "/etc//./resolv.conf/", "source": "file", "options": ["bind"]}]
    assert ("resolv_conf" in guest(spec)) == there
