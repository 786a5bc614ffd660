"""config.json and the command line: what is accepted, what is refused, in which words."""

import json
import pathlib

import pytest
import spec as runtime_spec
from conftest import call, config

import runx

RUNX = ["python3", "-IS", runx.__file__]


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "rootfs").mkdir()

    def write(spec):
        (tmp_path / "config.json").write_text(json.dumps(spec))
        return str(tmp_path)

    return write


def test_a_config_is_parsed_once(bundle, tmp_path):
    spec = config("a", "b c", env=["X=1"], user={"uid": 1, "gid": 2, "additionalGids": [3]})
    spec.update(hostname="box", linux={"resources": {"memory": {"limit": 64 << 20}}}, unknownProperty=1)
    parsed = runx.load_config(bundle(spec))
    assert parsed.rootfs == str(tmp_path / "rootfs")
    assert (parsed.hostname, parsed.resources.memory, parsed.process.args) == ("box", 64 << 20, ["a", "b c"])
    assert (parsed.process.uid, parsed.process.gid, parsed.process.groups, parsed.process.umask) == (1, 2, [3], 0o022)


def test_hooks_are_parsed():
    hooks = {"prestart": [{"path": "/a"}, {"path": "/b", "args": ["x", "y"], "env": ["E=1"], "timeout": 3}]}
    parsed = [(hook.path, hook.args, hook.env, hook.timeout) for hook in runx.parse_hooks(hooks, "prestart")]
    assert parsed == [("/a", ["/a"], [], 0), ("/b", ["x", "y"], ["E=1"], 3)]
    assert runx.parse_hooks(hooks, "poststop") == []


@pytest.mark.parametrize(
    "hooks",
    [{"prestart": {}}, {"prestart": ["/a"]}, {"prestart": [{}]}, {"prestart": [{"path": "a"}]},
     {"prestart": [{"path": "/a", "timeout": 0}]}, {"prestart": [{"path": "/a", "args": "x"}]}],
)  # fmt: skip
def test_wrong_hooks_are_refused(hooks):
    with pytest.raises(runx.Error, match="config.json: hooks"):
        runx.parse_hooks(hooks, "prestart")


def test_a_terminal_is_parsed_and_needs_a_devpts(bundle):
    spec = config("sh", terminal=True, consoleSize={"height": 24, "width": 80})
    with pytest.raises(runx.Error, match="devpts"):
        runx.load_config(bundle(spec))
    spec["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts"})
    assert runx.load_config(bundle(spec)).process.console_size == (24, 80)
    spec["process"]["consoleSize"]["width"] = 1 << 16
    with pytest.raises(runx.Error, match="consoleSize"):
        runx.load_config(bundle(spec))


@pytest.mark.parametrize(
    "cpu, vcpus, cap, weight",
    [
        ({}, 1, 0, 1),
        ({"quota": -1, "period": 100000, "shares": 1024}, 8, 0, 256),
        ({"quota": 50000}, 1, 50, 1),
        ({"quota": 150000, "shares": 2}, 2, 150, 1),
        ({"quota": 40000, "period": 10000, "shares": 1 << 20}, 4, 400, 65535),
        ({"quota": 1000, "period": 1000000}, 1, 1, 1),
    ],
)
def test_what_a_share_of_the_processors_is_in_xen(cpu, vcpus, cap, weight):
    resources = runx.parse_resources({"cpu": cpu}, "resources")
    assert (resources.vcpus(8), resources.cap(), resources.weight()) == (vcpus, cap, weight)


def test_a_list_of_processors_is_nothing_else(bundle):
    spec = config("true")
    spec["linux"] = {"resources": {"cpu": {"cpus": '0-3,7"'}}}
    with pytest.raises(runx.Error, match="0-3,7"):
        runx.load_config(bundle(spec))


def test_mount_options_become_flags_and_data(bundle):
    spec = config("true")
    spec["mounts"] = [
        {"destination": "/t", "type": "tmpfs", "source": "t", "options": ["nosuid", "ro", "rw", "size=1m", "mode=755"]}
    ]
    mount = runx.load_config(bundle(spec)).mounts[0]
    assert (mount.flags, mount.data) == (runx.MS_NOSUID, "size=1m,mode=755")


def test_a_bind_mount_has_no_other_options(bundle, tmp_path):
    spec = config("true")
    spec["mounts"] = [{"destination": "/t", "source": str(tmp_path), "options": ["rbind", "rro", "rnodev"]}]
    mount = runx.load_config(bundle(spec)).mounts[0]
    flags = runx.MS_BIND | runx.MS_REC | runx.MS_RDONLY | runx.RECURSIVE_RO | runx.MS_NODEV
    assert mount.flags == flags
    assert runx.guest_mount(mount, iter(["mounts/0"]))[10] == (runx.MS_BIND | 32 | runx.MS_RDONLY | runx.MS_NODEV)
    spec["mounts"][0]["options"].append("idmap")
    with pytest.raises(runx.Error, match="a bind mount has no option idmap here"):
        runx.load_config(bundle(spec))


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.3.0", "1.9.9+x"])
def test_supported_versions(version):
    assert runx.check_version(version) == version


@pytest.mark.parametrize("version", ["", "1", "1.0", "one.0.0", "2.0.0", "0.1.0", "1.0.0.0"])
def test_unsupported_versions(version):
    with pytest.raises(runx.Error, match="ociVersion"):
        runx.check_version(version)


def test_a_config_without_process_is_valid(bundle):
    spec = config("true")
    del spec["process"]
    assert runx.load_config(bundle(spec)).process is None


def test_the_guests_config_keeps_the_order_of_mounts(bundle, tmp_path):
    (tmp_path / "source").mkdir()
    spec = config("sh", "-c", "x")
    spec["mounts"] = [
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/run/x", "type": "bind", "source": "source", "options": ["ro"]},
    ]
    words = runx.guest_config(runx.load_config(bundle(spec)), ["mounts/0"], "{}").split(b"\0")
    assert words[:6] == [b"mount", b"tmpfs", b"/run", b"tmpfs", b"0", b""]
    assert words[6:12] == [b"mount", b"mounts/0", b"/run/x", b"", b"%d" % runx.MS_BIND, b""]
    assert words[16] == b"%d" % (runx.MS_BIND | runx.MS_REMOUNT | runx.MS_RDONLY)
    assert words[-7:] == [b"sh", b"arg", b"-c", b"arg", b"x", b"env", b"PATH=/bin", b""][-7:]


def test_the_hosts_own_configuration(bundle, tmp_path, monkeypatch):
    file = tmp_path / "host.json"
    monkeypatch.setattr(runx, "HOST_CONFIG", str(file))
    assert runx.load_config(bundle(config("true"))).guest_type == ""
    file.write_text('{"type": "pv"}')
    assert runx.load_config(bundle(config("true"))).guest_type == "pv"
    assert runx.load_config(bundle({**config("true"), "annotations": {"org.runx.type": "pvh"}})).guest_type == "pvh"
    for wrong in ("{", "[]", '{"type": "hvm"}', '{"tpye": "pv"}'):
        file.write_text(wrong)
        with pytest.raises(runx.Error, match="host.json"):
            runx.load_config(bundle(config("true")))


# ---- the command line


def parse(*words):
    words = list(words)
    options = runx.parse_globals(words)
    command = words.pop(0)
    return options, command, *runx.parse_options(command, words)


def test_what_containerd_writes():
    options, command, flags, arguments = parse(
        "--root", "/run/containerd/runc/default", "--log", "/b/log.json", "--log-format", "json", "--systemd-cgroup",
        "create", "--bundle", "/b", "--pid-file", "/b/init.pid", "demo",
    )  # fmt: skip
    assert options["root"] == "/run/containerd/runc/default" and options["systemd-cgroup"] is True
    assert (command, flags, arguments) == ("create", {"bundle": "/b", "pid-file": "/b/init.pid"}, ["demo"])


def test_what_podman_writes():
    options, command, flags, arguments = parse(
        "--log-format=json",
        "--log=/b/oci-log",
        "--rootless=false",
        "create",
        "--bundle=/b",
        "--pid-file=/p",
        "-b",
        "/c",
        "x",
    )
    assert (options["log"], options["rootless"]) == ("/b/oci-log", "false")
    assert (command, flags["bundle"], arguments) == ("create", "/c", ["x"])


@pytest.mark.parametrize("unknown", [["--new"], ["--new=1"], ["--new", "value"], ["-new", "value"]])
def test_unknown_globals_are_passed_over(unknown):
    options, command, _, arguments = parse(*unknown, "--root", "/r", "state", "x")
    assert (options["root"], command, arguments) == ("/r", "state", ["x"])


def test_options_may_follow_the_id():
    assert parse("kill", "--all", "x", "9")[2:] == ({"all": True}, ["x", "9"])
    assert parse("delete", "x", "-f")[2:] == ({"force": True}, ["x"])
    assert parse("list", "-f", "json")[2] == {"format": "json"}


def test_unknown_options_are_refused():
    with pytest.raises(runx.Error, match="create has no option --bogus"):
        parse("create", "--bogus", "x")


@pytest.mark.parametrize(
    "text, number",
    [
        ("9", 9),
        ("KILL", 9),
        ("SIGTERM", 15),
        ("winch", 28),
        ("RTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("0", 0),
    ],
)
def test_signals_by_name_and_number(text, number):
    assert runx.parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "\u00b2", "65", "-1", "NOPE", "RTMIN+40", "RTMIN+x"])
def test_unknown_signals_are_refused(text):
    with pytest.raises(runx.Error, match="unknown signal"):
        runx.parse_signal(text)


@pytest.mark.parametrize("words", [["--version"], ["features"], ["--help"]])
def test_what_needs_no_xen(words):
    result = call(*RUNX, *words)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout


@pytest.mark.parametrize("words", [["bogus"], [], ["exec", "x"], ["kill"], ["create", "--bundle"]])
def test_wrong_calls_fail(words):
    result = call(*RUNX, *words)
    assert result.returncode == 1 and result.stdout + result.stderr


def test_an_error_is_the_logs_only_record(tmp_path):
    log = tmp_path / "log.json"
    result = call(*RUNX, "--root", str(tmp_path), "--log", str(log), "--log-format=json", "state", "x")
    record = json.loads(log.read_text())  # as Podman reads it: one JSON object
    assert record["level"] == "error" and record["msg"] == 'container "x" does not exist'
    assert result.stderr == b'runX: container "x" does not exist\n'
    assert record["time"].endswith("Z") and "T" in record["time"]


@pytest.mark.parametrize("container_id", ["a", "A.b_c-d+e", "0" * 64])
def test_ids(container_id):
    assert runx.check_id(container_id) == container_id


def test_an_empty_list(tmp_path):
    assert json.loads(call(*RUNX, "--root", str(tmp_path / "none"), "list", "--format", "json").stdout) == []


def test_features_are_what_the_specification_allows():
    features = json.loads(call(*RUNX, "features").stdout)
    runtime_spec.check_features(features)
    assert set(features["hooks"]) == runtime_spec.HOOKS


@pytest.mark.parametrize("text, seconds", [("5s", 5), ("300ms", 0.3), ("1m30s", 90), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert runx.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0s", "-1s", "s", "1s x"])
def test_wrong_durations(text):
    with pytest.raises(runx.Error, match="--interval"):
        runx.parse_duration(text)


# ---- update


class Stored:
    """A container with a state and nothing else."""

    id = "x"

    def __init__(self, resources):
        self.state = {"resources": resources, "maxmem": 256, "maxvcpus": 2}

    def save(self, **changes):
        self.state.update(changes)


@pytest.fixture
def applied(monkeypatch):
    """What update applies to the VM: a list of (new, old) Resources."""
    applied = []
    monkeypatch.setattr(runx, "apply_resources", lambda container, new, old: applied.append((new, old)))
    return applied


def test_an_update_keeps_what_it_does_not_name(applied):
    container = Stored({"cpu": {"shares": 512}, "pids": {"limit": 7}, "devices": [{"allow": False}]})
    changes = {"memory": {"limit": 64 << 20, "swap": 1 << 30}, "pids": {"limit": 7}, "devices": [{"allow": False}]}
    runx.update(container, changes)
    new, old = applied[0]
    assert (new.memory, old.memory, new.shares) == (64 << 20, 0, 512)
    assert container.state["resources"]["pids"] == {"limit": 7}
    runx.update(container, {"cpu": {"quota": 200000, "period": 0, "cpus": ""}, "blockIO": None, "memory": {}})
    assert (applied[1][0].memory, applied[1][0].vcpus(2)) == (64 << 20, 2)
    runx.update(container, {"cpu": {"quota": -1}, "memory": {"limit": -1}})
    new = applied[2][0]
    assert (new.mebibytes(256), new.vcpus(2), new.cap()) == (256, 2, 0)


def test_an_update_that_xen_refuses_is_undone(monkeypatch):
    applied = []

    def refuse(container, new, old):
        applied.append((new.memory, old.memory))
        if len(applied) == 1:
            raise runx.Error("no such processor")

    monkeypatch.setattr(runx, "apply_resources", refuse)
    container = Stored({"memory": {"limit": 96 << 20}})
    with pytest.raises(runx.Error, match="no such processor"):
        runx.update(container, {"memory": {"limit": 64 << 20}})
    assert applied == [(64 << 20, 96 << 20), (96 << 20, 64 << 20)]
    assert container.state["resources"] == {"memory": {"limit": 96 << 20}}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pids": {"limit": 8}}, "pids.limit cannot change"),
        ({"cpu": {"mems": "0", "realtimeRuntime": 5}, "memory": {"limit": 1 << 20}}, "cpu.mems, cpu.realtimeRuntime"),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}, "hugepageLimits cannot change"),
        ({"unified": {"memory.high": "1"}}, "unified.memory.high cannot change"),
        ({"memory": {"limit": 257 << 20}}, "257 MiB of memory: its VM was made for 256 at most"),
        ({"cpu": {"quota": 200001}}, "3 vcpus: its VM was made for 2 at most"),
        ({"memory": {"limit": "much"}}, "limit must be a JSON integer"),
    ],
)
def test_an_update_that_is_not_possible_changes_nothing(applied, changes, words):
    container = Stored({"pids": {"limit": 7}})
    with pytest.raises(runx.Error, match=words):
        runx.update(container, changes)
    assert not applied and container.state["resources"] == {"pids": {"limit": 7}}


def test_the_options_of_update_are_fields_of_resources(tmp_path):
    (tmp_path / "resources").write_text('{"memory": {"limit": 1}, "cpu": {"shares": 2}}')
    words = ["--memory=64m", "--cpu-quota", "-1", "--cpuset-cpus=0-1", "-r", str(tmp_path / "resources"), "id"]
    options, arguments = runx.parse_options("update", words)
    assert arguments == ["id"]
    assert runx.read_update(options) == {
        "memory": {"limit": 64 << 20}, "cpu": {"shares": 2, "quota": -1, "cpus": "0-1"},
    }  # fmt: skip
    with pytest.raises(runx.Error, match="--memory of update needs a number"):
        runx.read_update({"memory": "much"})
    (tmp_path / "resources").write_text("{")
    with pytest.raises(runx.Error, match="cannot read the resources"):
        runx.read_update({"resources": str(tmp_path / "resources")})


def test_what_follows_the_id_of_ps_is_for_ps():
    assert runx.parse_options("ps", ["--format", "json", "id"]) == ({"format": "json"}, ["id"])
    assert runx.parse_options("ps", ["id", "-o", "pid"]) == ({}, ["id", "-o", "pid"])


# ---- process and linux


def test_capabilities_are_a_bit_each():
    warnings = []
    spec = {"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE", "CAP_NEW"], "ambient": ["CAP_KILL", "CAP_NEW"]}
    sets = runx.parse_capabilities(spec, warnings)
    assert sets == {"bounding": 1 | 1 << 40, "effective": 0, "inheritable": 0, "permitted": 0, "ambient": 1 << 5}
    assert warnings == ["unknown capabilities are left out: CAP_NEW"]


def test_rlimits_io_priority_and_scheduler_are_numbers():
    limits = [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}, {"type": "RLIMIT_CPU", "soft": 0, "hard": 2**64 - 1}]
    assert runx.parse_rlimits(limits) == [(7, 1, 2), (0, 0, 2**64 - 1)]
    assert runx.parse_io_priority({"class": "IOPRIO_CLASS_BE", "priority": 5}) == 2 << 13 | 5
    spec = {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RECLAIM"], "runtime": 1, "deadline": 2, "period": 3}
    assert runx.parse_scheduler(spec) == (6, 2, 0, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "section, change, words",
    [
        ("process", {"rlimits": [{"type": "RLIMIT_NEW", "soft": 1, "hard": 1}]}, "there is no type RLIMIT_NEW"),
        ("process", {"rlimits": [{"type": "NOFILE", "soft": 1, "hard": 1}]}, "there is no type NOFILE"),
        ("process", {"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2}, "RLIMIT_CPU is there twice"),
        ("process", {"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]}, "RLIMIT_CPU needs a soft limit"),
        ("process", {"oomScoreAdj": 1001}, "oomScoreAdj must be"),
        ("process", {"ioPriority": {"class": "IOPRIO_CLASS_NEW"}}, "ioPriority needs one of"),
        ("process", {"scheduler": {"policy": "SCHED_NEW"}}, "there is no policy SCHED_NEW"),
        ("process", {"scheduler": {"policy": "SCHED_OTHER", "nice": 20}}, "nice must be from -20 to 19"),
        ("process", {"scheduler": {"policy": "SCHED_OTHER", "flags": ["NEW"]}}, "there is no flag NEW"),
        ("linux", {"sysctl": {"../x": "1"}}, "sysctl must be names"),
        ("linux", {"sysctl": {"kernel.x": 1}}, "sysctl must be names"),
        ("linux", {"maskedPaths": ["proc"]}, "maskedPaths must hold absolute paths"),
        ("linux", {"rootfsPropagation": "open"}, "there is no rootfsPropagation open"),
        ("linux", {"devices": [{"path": "/dev/x", "type": "x"}]}, "a type of c, b, u or p"),
        ("linux", {"devices": [{"path": "/dev/x", "type": "c"}]}, "major is missing"),
        ("linux", {"devices": [{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]}, "numbers of /dev/x"),
        ("linux", {"uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}, "linux.uidMappings cannot be applied"),
    ],
)
def test_what_cannot_be_applied_is_refused(bundle, section, change, words):
    spec = config("true")
    spec.setdefault(section, {}).update(change)
    with pytest.raises(runx.Error, match=words):
        runx.load_config(bundle(spec))


def test_what_has_no_effect_is_a_warning(bundle):
    spec = config("true", apparmorProfile="docker-default", selinuxLabel="")
    spec["linux"] = {
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}, "intelRdt": None, "mountLabel": "",
        "resources": {"pids": {"limit": -1}, "blockIO": {"weight": 0}, "hugepageLimits": [], "unified": {"a": "1"}},
    }  # fmt: skip
    named = [warning.split()[0] for warning in runx.load_config(bundle(spec)).warnings]
    assert named == ["process.apparmorProfile", "linux.seccomp", "linux.resources.unified"]


def test_the_home_of_a_user(tmp_path):
    (tmp_path / "etc").mkdir()
    assert runx.home_of(str(tmp_path), 0) == "/"
    passwd = tmp_path / "etc/passwd"
    passwd.write_text("root:x:0:0:::\nbroken\nuser:x:10:0::/home/user:/bin/sh\nagain:x:10:0::/other:/bin/sh\n")
    assert [runx.home_of(str(tmp_path), uid) for uid in (0, 10, 11)] == ["/", "/home/user", "/"]
    passwd.unlink()
    passwd.symlink_to("/../../../../etc/passwd")  # a link to itself, in this root
    assert runx.home_of(str(tmp_path), 0) == "/"


def test_the_guest_gets_records_for_all_of_it(bundle):
    spec = config("true", noNewPrivileges=True, oomScoreAdj=5)
    spec["linux"] = {
        "sysctl": {"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/x": "2"}, "maskedPaths": ["/m"],
        "readonlyPaths": ["/r"], "rootfsPropagation": "shared",
        "devices": [{"path": "/dev/f", "type": "c", "major": 10, "minor": 229, "uid": 1, "gid": 2}],
    }  # fmt: skip
    text = runx.guest_config(runx.load_config(bundle(spec)), [], "{}").replace(b"\0", b" ").decode()
    for record in (
        f"node /dev/f {0o20666} 10 229 1 2 ", "sysctl sys/net/ipv4/ip_forward 1 sysctl sys/net/ipv4/conf/eth0.1/x 2 ",
        "readonly /r mask /m ", f"propagation {1 << 20 | 16384} ", "oom 5 ", "no_new_privileges ",
    ):  # fmt: skip
        assert record in text, record


DATA = pathlib.Path(__file__).with_name("data")


@pytest.mark.parametrize(
    "name, warnings", [("ctr-1.6.20", []), ("podman-4.3.1", ["linux.seccomp", "linux.resources.pids"])]
)
def test_the_default_configs_of_engines_are_accepted(bundle, monkeypatch, name, warnings):
    """tests/data: what each engine has written for a plain `run`, with its version."""
    spec = json.loads((DATA / f"{name}.json").read_text())
    spec["root"]["path"] = "rootfs"
    monkeypatch.setattr(runx.os.path, "exists", lambda path: True)  # sources of bind mounts
    parsed = runx.load_config(bundle(spec))
    assert [warning.split()[0] for warning in parsed.warnings] == warnings
    bind_sources = [f"mounts/{number}" for number in range(len(parsed.mounts))]
    assert runx.guest_config(parsed, bind_sources, "{}").endswith(b"\0")
