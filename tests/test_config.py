"""config.json and the command line: what is accepted, what is refused, in which words."""

import json

import pytest
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
    assert (parsed.hostname, parsed.memory, parsed.process.args) == ("box", 64 << 20, ["a", "b c"])
    assert (parsed.process.uid, parsed.process.gid, parsed.process.groups, parsed.process.umask) == (1, 2, [3], 0o022)


def test_mount_options_become_flags_and_data(bundle):
    spec = config("true")
    spec["mounts"] = [
        {"destination": "/t", "type": "tmpfs", "source": "t", "options": ["nosuid", "ro", "rw", "size=1m", "mode=755"]}
    ]
    mount = runx.load_config(bundle(spec)).mounts[0]
    assert (mount.flags, mount.data) == (runx.MS_NOSUID, "size=1m,mode=755")


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
    words = runx.guest_config(runx.load_config(bundle(spec)), ["mounts/0"]).split(b"\0")
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


@pytest.mark.parametrize("text", ["", "65", "-1", "NOPE", "RTMIN+40", "RTMIN+x"])
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
