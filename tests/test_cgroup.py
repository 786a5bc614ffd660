# SPDX-License-Identifier: Apache-2.0
"""The control group of what serves a container on dom0, on folders that only look like a hierarchy."""

import errno
import os
import pathlib
import time

import pytest
from conftest import record

import runx

BASE = {"default_memory": 64, "minimum_memory": 24, "default_vcpus": 1, "fixed_vcpus": 0, "most_vcpus": 4}
RESOURCES = runx.Resources({"memory": {"limit": 80 << 20}, "cpu": {"shares": 2048}}, "resources", BASE)


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """Mounts folders, by the mountinfo that runX reads: a function of the kind and more options, that returns one."""
    mounts = []

    def add(kind, *options):
        root = tmp_path / f"{kind}{len(mounts)}"
        root.mkdir()
        entry = {"device": len(mounts), "root": "/", "target": str(root), "options": ["rw"], "kind": kind}
        mounts.append(record(runx.HostMount, **entry, of_all=["rw", *options]))
        return root

    monkeypatch.setattr(runx, "host_mounts", lambda: mounts)
    return add


def test_all_hierarchies_get_the_processes_and_each_its_own_limits(hierarchy):
    unified, memory, cpu, cpuset = (
        hierarchy("cgroup2"), hierarchy("cgroup", "memory"), hierarchy("cgroup", "cpu", "cpuacct"),
        hierarchy("cgroup", "cpuset"),
    )  # fmt: skip
    (unified / "cgroup.controllers").write_text("cpu memory\n")
    for root, names in ((unified, ("memory.max", "cpu.weight")), (memory, ("memory.limit_in_bytes",))):
        (root / "a/b").mkdir(parents=True)
        for name in names:
            (root / "a/b" / name).touch()
    cgroups = runx.find_cgroups("a//../a/b", False)
    assert cgroups == [[str(root), "/a/b"] for root in (unified, memory, cpu)]
    runx.make_cgroups(cgroups, RESOURCES)
    runx.join_cgroups(cgroups)
    assert (unified / "cgroup.subtree_control").read_text() == "+memory"  # the last word that was written
    assert (unified / "a/b/memory.max").read_text() == str(144 << 20)
    assert (unified / "a/b/cpu.weight").read_text() == "79"
    assert (memory / "a/b/memory.limit_in_bytes").read_text() == str(144 << 20)
    assert not (cpu / "a/b/cpu.shares").exists()
    assert [(root / "a/b/cgroup.procs").read_text() for root in (unified, memory, cpu)] == [str(os.getpid())] * 3
    assert not list(cpuset.iterdir())


def test_a_hierarchy_that_takes_no_group_is_an_error(hierarchy):
    (hierarchy("cgroup", "memory") / "a").write_text("no folder")
    with pytest.raises(runx.Error, match="cannot make the cgroup /a/b in "):
        runx.make_cgroups(runx.find_cgroups("//a/b", False), RESOURCES)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/xen/gntdev"])
def test_a_group_that_forbids_devices_is_an_error_and_left(hierarchy, monkeypatch, device):
    """As Podman 4.3 makes a pod's without systemd, where runc's containers do not start either."""
    opened, root = os.open, hierarchy("cgroup2")
    (root / "pod").mkdir()

    def forbid(path, *args, **options):
        if path == device:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        return opened("/dev/null" if path == "/dev/xen/gntdev" else path, *args, **options)

    cgroups = runx.find_cgroups("/pod", False)
    runx.join_cgroups(cgroups)
    runx.check_devices("/pod", cgroups)  # a device that is not there is another's to tell
    assert not (root / "cgroup.procs").exists()
    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(runx.Error, match=f"cannot use the cgroup /pod: nobody there may open {device}; name another"):
        runx.check_devices("/pod", cgroups)
    assert (root / "cgroup.procs").read_text() == str(os.getpid())


@pytest.mark.parametrize("scope", [False, True])
def test_the_root_is_no_group_of_a_container_even_if_nobody_is_there(hierarchy, scope):
    hierarchy("cgroup2")
    with pytest.raises(runx.Error, match="cannot make the cgroup /: others are in it"):
        runx.find_cgroups("/", scope)


@pytest.mark.parametrize("path", ["/", "/a/../..", "/busy", "/busy/"])
def test_a_group_of_others_is_refused(hierarchy, path):
    (hierarchy("cgroup2") / "busy/below").mkdir(parents=True)
    (hierarchy("cgroup", "memory") / "busy/below").mkdir(parents=True)
    for mount in runx.host_mounts():
        with open(f"{mount.target}/busy/below/cgroup.procs", "w", encoding="ascii") as file:
            file.write("1\n")
    with pytest.raises(runx.Error, match="others are in it"):
        runx.find_cgroups(path, False)
    assert path != "/busy" or runx.find_cgroups(path, True)


@pytest.mark.parametrize("path", ["/cold", "/cold/new", "/cold/new/below"])
@pytest.mark.parametrize(
    "kind, options, name, frozen, thawed",
    [
        ("cgroup2", (), "cgroup.freeze", "1", "0"),
        ("cgroup", ("freezer",), "freezer.state", "FROZEN", "THAWED"),
        ("cgroup", ("freezer",), "freezer.state", "FREEZING", "THAWED"),
    ],
)
def test_a_frozen_group_is_refused_and_stays(hierarchy, kind, options, name, frozen, thawed, path):
    """Its processes stop, and those of a new one below it; so would the one that makes the container's VM."""
    folder = hierarchy(kind, *options) / "cold"
    folder.mkdir()
    (folder / name).write_text(f"{frozen}\n")
    reason = f"cannot make the cgroup {path}: container's cgroup unexpectedly frozen at /cold;"
    with pytest.raises(runx.Error, match=reason):
        runx.find_cgroups(path, False)
    (folder / name).write_text(f"{thawed}\n")
    assert runx.find_cgroups(path, False) == [[str(folder.parent), path]]


def test_limits_that_end_are_no_limits():
    unlimited = runx.cgroup_limits(runx.Resources({"memory": {"limit": -1}}, "resources", BASE))
    assert unlimited == {"memory.max": "max", "memory.limit_in_bytes": "-1"}
    assert runx.cgroup_limits(runx.Resources({}, "resources", BASE)) == {}


@pytest.mark.parametrize(
    "path, options",
    [
        ("system.slice:cri-containerd:abc", ["--unit=cri-containerd-abc.scope", "--slice=system.slice"]),
        (":runx:a-b", ["--unit=runx-a-b.scope", "--slice=system.slice"]),
        ("machine.slice::abc", ["--unit=abc.scope", "--slice=machine.slice"]),
    ],
)
def test_systemd_makes_a_scope(tmp_path, monkeypatch, path, options):
    for name, script in (
        ("systemd-run", f'echo "$@" >{tmp_path}/args; while [ "${{1#-}}" != "$1" ]; do shift; done; "$@"\n'
                        f"echo ended >>{tmp_path}/args"),
        ("cat", f'echo "$@" >{tmp_path}/file; printf "1:name=systemd:/old\\n0::/x.slice/y:z.scope\\n"'),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(runx, "PATH", f"{tmp_path}:{runx.PATH}")
    scope, place = runx.start_scope(path, RESOURCES)
    assert place == "/x.slice/y:z.scope" and scope.poll() is None
    scope.communicate()
    assert (tmp_path / "file").read_text() == "/proc/self/cgroup\n"
    args, ended = (tmp_path / "args").read_text().splitlines()
    options += [f"--property={each}" for each in (
        "Delegate=yes", "DefaultDependencies=no", f"MemoryMax={144 << 20}", "CPUWeight=79"
    )]  # fmt: skip
    assert ended == "ended" and set(options) <= set(args.split())


def test_a_warning_of_systemd_before_the_scope_is_there_is_none_of_its_path(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "read")
    script = f"echo odd >&2; read -r _ <{tmp_path}/read; echo 0::/a; read -r _"
    (tmp_path / "systemd-run").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "systemd-run").chmod(0o755)
    monkeypatch.setattr(runx, "PATH", f"{tmp_path}:{runx.PATH}")
    read_some = os.read

    def read(fd, size):
        data = read_some(fd, size)
        if data == b"odd\n":
            (tmp_path / "read").write_text("\n")
        return data

    monkeypatch.setattr(os, "read", read)
    scope, place = runx.start_scope("::a", RESOURCES)
    scope.communicate()
    assert place == "/a"


def test_a_scope_that_systemd_does_not_make_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(runx.Error, match="must be SLICE:PREFIX:NAME for systemd, not /a/b"):
        runx.start_scope("/a/b", RESOURCES)
    monkeypatch.setattr(runx, "PATH", str(tmp_path))
    with pytest.raises(runx.Error, match="cannot make the scope a-b: systemd-run: No such file"):
        runx.start_scope("s.slice:a:b", RESOURCES)
    (tmp_path / "systemd-run").write_text("#!/bin/sh\necho Failed to connect to bus >&2\nexit 1\n")
    (tmp_path / "systemd-run").chmod(0o755)
    with pytest.raises(runx.Error, match="cannot make the scope a-b: systemd-run says Failed to connect to bus"):
        runx.start_scope("s.slice:a:b", RESOURCES)


def test_a_scope_that_comes_too_late_is_ended(tmp_path, monkeypatch):
    program = tmp_path / "systemd-run"
    program.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(runx, "PATH", f"{tmp_path}:{runx.PATH}")
    monkeypatch.setattr(runx, "SCOPE_TIME_LIMIT", 0.5)
    with pytest.raises(runx.Error, match="cannot make the scope b: systemd-run says nothing$"):
        runx.start_scope("::b", runx.Resources({}, "resources", BASE))
    pid = tmp_path / "pid"
    assert not pid.exists() or runx.process_start_time(int(pid.read_text())) is None


def test_what_systemd_is_told():
    def command(path, resources):
        return runx.scope_command(path, runx.Resources(resources, "resources", BASE))

    start = ["systemd-run", "--quiet", "--scope", "--collect", "--unit=a-b:c.scope", "--slice=system.slice"]
    last = "--property=DefaultDependencies=no"
    assert command(":a:b:c", {}) == ("a-b:c", [*start, "--property=Delegate=yes", last])
    unit, words = command("x.slice:a", {"memory": {"limit": -1}, "cpu": {"shares": 1024}})
    assert (unit, words[-2:]) == ("a", ["--property=MemoryMax=infinity", "--property=CPUWeight=39"])
    assert command("x.slice:a", {"cpu": {"shares": 1024}})[1][-2] == last


@pytest.mark.parametrize(
    "shares, weight", [(1, 1), (2, 1), (28, 1), (29, 2), (1024, 39), (262143, 9999), (262144, 10000), (1 << 30, 10000)]
)
def test_shares_are_a_weight_as_runc_makes_it(shares, weight):
    limits = runx.cgroup_limits(runx.Resources({"cpu": {"shares": shares}}, "resources", BASE))
    assert limits == {"cpu.weight": str(weight), "cpu.shares": str(shares)}


def test_version_1_has_shares_and_a_hierarchy_counts_once(hierarchy):
    cpu, other = hierarchy("cgroup", "cpu"), hierarchy("ext4")
    (cpu / "a").mkdir()
    (cpu / "a/cpu.shares").touch()
    runx.host_mounts().append(runx.host_mounts()[0])  # it is mounted at two places
    cgroups = runx.find_cgroups("a", False)
    assert cgroups == [[str(cpu), "/a"]] and list(other.iterdir()) == []
    runx.make_cgroups(cgroups, RESOURCES)
    assert (cpu / "a/cpu.shares").read_text() == "2048" and os.listdir(cpu / "a") == ["cpu.shares"]


def test_a_controller_that_the_kernel_does_not_give_is_done_without(hierarchy):
    root = hierarchy("cgroup2")
    (root / "cgroup.controllers").write_text("cpu")
    (root / "cgroup.subtree_control").mkdir()  # cannot be written
    runx.make_cgroups([[str(root), "/a"]], RESOURCES)
    assert (root / "a").is_dir()


@pytest.fixture
def group(hierarchy):
    """A cgroup with one below, as the kernel shows them: their files do not hinder rmdir."""
    root = hierarchy("cgroup2")
    (root / "a/b").mkdir(parents=True)
    return root


def test_groups_go_with_those_below(group):
    (group / "other").mkdir()
    runx.remove_cgroups([[str(group), "/a"], [str(group), "/absent"]], [7])
    assert os.listdir(group) == ["other"]


def test_our_own_processes_leave_a_group_to_the_root(group, monkeypatch):
    (group / "a/b/cgroup.procs").write_text("7\n8\n9\n")
    written = []
    monkeypatch.setattr(runx, "write_file", lambda path, value: written.append((path, value)))
    assert not runx.remove_cgroup(str(group), str(group / "a/b"), [8, 9, 10])
    assert sorted(written) == [(str(group / "cgroup.procs"), "8"), (str(group / "cgroup.procs"), "9")]


def test_a_group_that_others_hold_is_left_with_an_error(group, monkeypatch):
    (group / "a/b/cgroup.procs").write_text("1\n")
    monkeypatch.setattr(runx, "CGROUP_TIME_LIMIT", 0.05)
    words = f"cannot remove the cgroup {group}/a/b, {group}/a: others are in it"
    with pytest.raises(runx.Error, match=words):
        runx.remove_cgroups([[str(group), "/a"]], [7])


def test_who_was_killed_has_time_to_end(group, monkeypatch):
    (group / "a/b/cgroup.procs").write_text("1\n")
    monkeypatch.setattr(time, "sleep", lambda _: (group / "a/b/cgroup.procs").unlink(missing_ok=True))
    runx.remove_cgroups([[str(group), "/a"]], [7])
    assert os.listdir(group) == []


@pytest.mark.parametrize("limit, usage", [("max", "current"), ("limit_in_bytes", "usage_in_bytes")])
def test_a_process_that_asks_for_too_much_shows_that_memory_has_run_out(group, tmp_path, monkeypatch, limit, usage):
    log, write = tmp_path / "log", runx.write_file

    def note(path, value):
        with open(log, "a", encoding="ascii") as file:
            file.write(f"{os.getpid() == test} {pathlib.Path(path).name} {value}\n")
        write(path, value)

    def lock(name, flags):
        note(f"{tmp_path}/{name}", flags)

    def leave(status):
        assert os.getpid() != test
        leave_python(status)

    test, leave_python = os.getpid(), os._exit
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(runx, "write_file", note)
    monkeypatch.setattr(runx, "system_call", lock)
    (group / f"a/memory.{limit}").write_text("max\n")
    cached = {"max": "anon 7\nfile 90000000000\nshmem 600\nslab_reclaimable 500\n",
              "limit_in_bytes": "cache 90000000000\nrss 7\nshmem 100\n"}  # fmt: skip
    (group / "a/memory.stat").write_text(cached[limit])
    (group / f"a/memory.{usage}").write_text(f"{90000000000 + 900}\n")
    runx.show_oom([[str(group), "/a"], [str(group), "/absent"]], runx.Log())
    most = 1000 + (4 << 20)
    child = f"False oom_score_adj 1000\nFalse mlockall 2\nFalse memory.{limit} {most}\n"
    assert log.read_text() == child + f"True memory.{limit} max\n"
    assert (group / f"a/memory.{limit}").read_text() == "max"
    log.write_text("")
    (group / "a/memory.stat").write_text("")
    (group / f"a/memory.{usage}").write_text(str((124 << 20) + 1))
    runx.show_oom([[str(group), "/a"]], runx.Log())
    assert log.read_text() == ""  # the guest's word is not worth so much
    (group / f"a/memory.{usage}").write_text(str(124 << 20))
    monkeypatch.setattr(os, "fork", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runx.show_oom([[str(group), "/a"]], runx.Log())
    read = runx.read_file
    monkeypatch.setattr(runx, "read_file", lambda path: "2" if path == "/proc/sys/vm/panic_on_oom" else read(path))
    runx.show_oom([[str(group), "/a"]], runx.Log())
    assert log.read_text() == ""  # dom0 would panic
