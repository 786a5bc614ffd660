"""The control group of what serves a container on dom0, on folders that only look like a hierarchy."""

import pytest

import runx

BASE = {"default_memory": 64, "minimum_memory": 24, "default_vcpus": 1, "fixed_vcpus": 0, "most_vcpus": 4}
RESOURCES = runx.parse_resources({"memory": {"limit": 80 << 20}, "cpu": {"shares": 2048}}, "resources", BASE)


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """Mounts folders, by the mountinfo that runX reads: a function of the kind and more options, that returns one."""
    mounts = []

    def add(kind, *options):
        root = tmp_path / f"{kind}{len(mounts)}"
        root.mkdir()
        mounts.append(runx.HostMount(
            device=len(mounts), root="/", target=str(root), options=["rw"], kind=kind, of_all=["rw", *options],
        ))  # fmt: skip
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
    runx.make_cgroups(cgroups, RESOURCES, [7, 8])
    assert (unified / "cgroup.subtree_control").read_text() == "+memory"  # the last word that was written
    assert (unified / "a/b/memory.max").read_text() == str(144 << 20)
    assert (unified / "a/b/cpu.weight").read_text() == "79"
    assert (memory / "a/b/memory.limit_in_bytes").read_text() == str(144 << 20)
    assert not (cpu / "a/b/cpu.shares").exists()
    assert [(root / "a/b/cgroup.procs").read_text() for root in (unified, memory, cpu)] == ["8"] * 3
    assert not list(cpuset.iterdir())


def test_a_hierarchy_that_takes_no_group_is_an_error(hierarchy):
    (hierarchy("cgroup", "memory") / "a").write_text("no folder")
    with pytest.raises(runx.Error, match="cannot make the cgroup /a/b in "):
        runx.make_cgroups(runx.find_cgroups("//a/b", False), RESOURCES, [])


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


def test_limits_that_end_are_no_limits():
    unlimited = runx.cgroup_limits(runx.parse_resources({"memory": {"limit": -1}}, "resources", BASE))
    assert unlimited == {"memory.max": "max", "memory.limit_in_bytes": "-1"}
    assert runx.cgroup_limits(runx.parse_resources({}, "resources", BASE)) == {}


@pytest.mark.parametrize(
    "path, options",
    [
        ("system.slice:cri-containerd:abc", ["--unit=cri-containerd-abc.scope", "--slice=system.slice"]),
        (":runx:a-b", ["--unit=runx-a-b.scope", "--slice=system.slice"]),
        ("machine.slice::abc", ["--unit=abc.scope", "--slice=machine.slice"]),
    ],
)
def test_systemd_makes_a_scope(tmp_path, monkeypatch, path, options):
    program = tmp_path / "systemd-run"
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/args\nprintf "1:name=systemd:/old\n0::/x.slice/y.scope\n"\n'
                       f"read -r _\necho ended >>{tmp_path}/args\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setattr(runx, "PATH", f"{tmp_path}:{runx.PATH}")
    scope, place = runx.start_scope(path, RESOURCES)
    assert place == "/x.slice/y.scope" and scope.poll() is None
    scope.communicate()
    args, ended = (tmp_path / "args").read_text().splitlines()
    options += [f"--property={each}" for each in ("Delegate=yes", f"MemoryMax={144 << 20}", "CPUWeight=79")]
    assert ended == "ended" and set(options) <= set(args.split())


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
