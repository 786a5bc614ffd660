"""Bad input: one clear sentence on stderr and as the log's last record, exit status not 0, nothing left."""

import os
import shutil
import signal
import subprocess

import pytest
from conftest import call, config, in_memory, wait_until

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")


def check_refused(bundle, result, *words):
    message = result.stderr.decode()
    assert result.returncode != 0
    assert message.count("\n") == 1 and message.startswith("runX: "), message
    for word in words:
        assert word in message
    record = bundle.last_log()
    assert record["level"] == "error" and message == f"runX: {record['msg']}\n"
    assert not bundle.root.joinpath(bundle.id).exists()
    assert not bundle.pid_file.exists()


def test_config_json_missing(bundle):
    check_refused(bundle, bundle.create(), "JSON specification file config.json not found")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"ociVersion": 1}'])
def test_config_json_broken(bundle, text):
    (bundle.folder / "config.json").write_text(text)
    check_refused(bundle, bundle.create(), "config.json")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ociVersion": "invalid"}, 'ociVersion "invalid"'),
        ({"ociVersion": "2.0.0"}, 'ociVersion "2.0.0"'),
        ({"root": {"path": "missing"}}, "rootfs"),
        ({"root": {}}, "path is missing"),
        ({"root": {"path": "config.json"}}, "holds no file system"),
        ({"process": {"args": [], "cwd": "/"}}, "args"),
        ({"process": {"args": ["true"], "cwd": "relative"}}, "cwd"),
        ({"process": {"args": [1], "cwd": "/"}}, "args"),
        ({"process": {"args": ["a\0b"], "cwd": "/"}}, "NUL"),
        ({"process": {"args": ["true"], "cwd": "/", "user": {"uid": -1}}}, "user"),
        ({"mounts": [{"destination": "/x", "type": "ext9", "source": "x"}]}, "type ext9"),
        ({"mounts": [{"destination": "/x", "type": "bind", "source": "/no/such/source"}]}, "/no/such/source"),
        ({"hooks": {"prestart": [{"path": "true"}]}}, "hooks.prestart: path must be absolute"),
        ({"hooks": {"poststop": [{"path": "/bin/true", "timeout": 0}]}}, "hooks.poststop: timeout"),
        ({"process": {"args": ["true"], "cwd": "/", "terminal": True}}, "devpts"),
        ({"annotations": {"org.runx.rootfs": "nfs"}}, "org.runx.rootfs"),
    ],
)
def test_config_invalid(bundle, change, words):
    bundle.write_config({**config("true"), **change})
    check_refused(bundle, bundle.create(), words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no-such-command", 'exec: "no-such-command": executable file not found in $PATH'),
        ("/no/such/file", 'exec: "/no/such/file": stat /no/such/file: no such file or directory'),
        ("/tmp", 'exec: "/tmp": permission denied'),
        ("/plain", 'exec: "/plain": permission denied'),
        ("/escape", 'exec: "/escape": stat /escape: no such file or directory'),
    ],
)
def test_command_not_found(bundle, name, words):
    (bundle.rootfs / "plain").write_text("not executable")
    (bundle.rootfs / "escape").symlink_to("../../../../../../../../usr/bin/python3")
    bundle.write_config(config(name))
    check_refused(bundle, bundle.create(), words)


def test_cleaning_up_touches_no_file_of_the_user(bundle, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("still here")
    spec = config("no-such-command")
    spec["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(precious), "options": ["rbind"]},
        {"destination": "/file", "type": "bind", "source": str(precious / "file"), "options": ["bind"]},
    ]
    bundle.write_config(spec)
    check_refused(bundle, bundle.create(), "executable file not found")
    bundle.write_config({**spec, "process": config("true")["process"]})
    assert bundle.create().returncode == 0
    os.kill(bundle.pid(), signal.SIGKILL)
    assert bundle.runx("delete", "--force", bundle.id).returncode == 0
    assert not bundle.root.joinpath(bundle.id).exists()
    assert (precious / "file").read_text() == "still here"
    assert (bundle.rootfs / "bin/busybox").exists()


@pytest.mark.parametrize("container_id", ["", "..", "a/b", "a b", pytest.param("x" * 300, id="long"), "é"])
def test_bad_id(bundle, container_id):
    bundle.write_config(config("true"))
    bundle.id = container_id
    result = bundle.create()
    assert result.returncode != 0 and b"invalid container ID format" in result.stderr
    assert not bundle.root.exists() or not list(bundle.root.iterdir())
    bundle.id = "never-made"


def test_id_in_use(bundle):
    bundle.write_config(in_memory(config("true")))
    assert bundle.create().returncode == 0
    again = bundle.create()
    assert again.returncode != 0 and b"container with given ID already exists" in again.stderr
    assert bundle.state()["status"] == "created"


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete"])
def test_unknown_id(bundle, command):
    result = bundle.runx(command, bundle.id)
    check_refused(bundle, result, "does not exist")


def test_delete_force_of_an_unknown_id_succeeds(bundle):
    result = bundle.runx("delete", "--force", bundle.id)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.parametrize("command", ["create", "start", "state", "kill", "delete"])
def test_missing_id(bundle, command):
    bundle.write_config(config("true"))
    result = call(*bundle.command(command), cwd=bundle.folder)
    assert result.returncode != 0 and b"container ID" in result.stderr


def test_delete_of_a_running_container_is_refused(bundle):
    bundle.write_config(in_memory(config("sleep", "1000")))
    assert bundle.create().returncode == 0 and bundle.runx("start", bundle.id).returncode == 0
    result = bundle.runx("delete", bundle.id)
    assert (
        result.returncode != 0
        and f"cannot delete container {bundle.id} that is not stopped: running" in result.stderr.decode()
    )
    assert bundle.runx("start", bundle.id).stderr == b"runX: cannot start an already running container\n"
    assert bundle.state()["status"] == "running"


def test_no_kernel(bundle, tmp_path):
    # a copy of the module, so that the kernel is not where it looks
    (tmp_path / "sbin").mkdir()
    runx = shutil.copy("/usr/lib/runX/runx.py", tmp_path / "sbin/runX")
    bundle.write_config(config("true"))
    result = call(
        "python3", "-IS", str(runx), "--root", str(bundle.root), "create", "--bundle", str(bundle.folder), bundle.id
    )
    message = result.stderr.decode()
    assert result.returncode == 1 and "there is no kernel at" in message and "kernel/build.sh" in message
    assert not list(bundle.root.iterdir())


def test_no_xl(bundle):
    # a mount namespace in which xl is hidden behind /dev/null
    bundle.write_config(config("true"))
    create = f"runX --root {bundle.root} create --bundle {bundle.folder} {bundle.id}"
    hide = "".join(f"mount --bind /dev/null {path} && " for path in {shutil.which("xl"), runx.find_xl()})
    result = call("unshare", "-m", "sh", "-c", f"{hide} exec {create}")
    assert result.returncode == 1 and b"cannot find xl" in result.stderr
    assert not bundle.root.exists() or not list(bundle.root.iterdir())


def test_not_enough_memory(bundle):
    spec = config("true")
    spec["linux"] = {"resources": {"memory": {"limit": 1 << 40}}}
    bundle.write_config(spec)
    check_refused(bundle, bundle.create(), "not enough memory", "1048576 MiB", "free")


def test_the_pid_file_cannot_be_written(bundle):
    bundle.write_config(config("true"))
    bundle.pid_file = bundle.folder / "missing/pid"
    check_refused(bundle, bundle.create(), "pid file")


def test_create_killed_half_way_leaves_nothing(bundle):
    bundle.write_config(config("true"))
    creating = subprocess.Popen(
        bundle.command("create", "--bundle", str(bundle.folder), bundle.id),
        stdin=subprocess.DEVNULL,
    )
    wait_until(lambda: bundle.root.joinpath(bundle.id, "xl.cfg").exists(), "create to call xl")
    creating.kill()
    creating.wait()
    wait_until(lambda: not bundle.root.joinpath(bundle.id).exists(), "the state folder to go")
    assert bundle.domain() is None


def test_the_guest_cannot_mount_what_it_has_not(bundle):
    # its init says why on its own console, and that comes to the log
    spec = config("true")
    spec["mounts"].append({"destination": "/bin/busybox/below-a-file", "type": "tmpfs", "source": "tmpfs"})
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.returncode == 126
    assert b"mount /bin/busybox/below-a-file" in result.stderr
