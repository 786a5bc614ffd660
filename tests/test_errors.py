# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear sentence on stderr and as the log's last record, exit status 1, nothing left.

What is found before Xen is asked for anything; the rest is in test_xen_errors.py.
"""

import json
import os
import re
import sys

import pytest
from conftest import call, config, runx_command

import runx


def test_config_json_missing(bundle):
    bundle.check_refused("JSON specification file config.json not found")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"ociVersion": 1}'])
def test_config_json_broken(bundle, text):
    (bundle.folder / "config.json").write_text(text)
    bundle.check_refused("config.json")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ociVersion": "invalid"}, 'ociVersion "invalid"'),
        ({"ociVersion": "2.0.0"}, 'ociVersion "2.0.0"'),
        ({"root": {"path": "missing"}}, "rootfs"),
        ({"root": {}}, "path is missing"),
        ({"process": {"args": [], "cwd": "/"}}, "args"),
        ({"process": {"args": ["true"], "cwd": "relative"}}, "cwd"),
        ({"process": {"args": [1], "cwd": "/"}}, "args"),
        ({"process": {"args": ["true"], "cwd": "/", "env": ["A=1", "B"]}}, "env must hold NAME=VALUE, not B"),
        ({"process": {"args": ["true"], "cwd": "/", "env": ["=x"]}}, "env must hold NAME=VALUE, not =x"),
        ({"process": {"args": ["a\0b"], "cwd": "/"}}, "NUL"),
        ({"process": {"args": ["true"], "cwd": "/", "user": {"uid": -1}}}, "user"),
        ({"mounts": [{"destination": "/x", "type": "bind", "source": "/no/such/source"}]}, "/no/such/source"),
        ({"hooks": {"prestart": [{"path": "true"}]}}, "hooks.prestart[0].path must be an absolute path"),
        ({"hooks": {"poststop": [{"path": "/bin/true", "timeout": 0}]}}, "hooks.poststop[0].timeout must be from 1 to"),
        ({"process": {"args": ["true"], "cwd": "/", "terminal": True}}, "devpts"),
        ({"annotations": {"org.runx.rootfs": "nfs"}}, "org.runx.rootfs"),
    ],
)
def test_config_invalid(bundle, change, words):
    bundle.write_config({**config("true"), **change})
    bundle.check_refused(words)


@pytest.mark.parametrize("container_id", ["", "..", "a/b", "a b", pytest.param("x" * 300, id="long"), "é"])
def test_bad_id(bundle, container_id):
    bundle.write_config(config("true"))
    bundle.id = container_id
    try:
        assert "invalid container ID format" in bundle.refused("create")
        assert not bundle.root.exists()
    finally:
        bundle.id = "never-made"


def test_a_root_that_is_no_folder(dom0):
    container = dom0.container()
    container.root.write_text("here")
    assert container.create().stderr == f"runX: cannot make {container.root}: File exists\n"
    container.root.unlink()


def test_a_root_in_which_no_folder_can_be_made(dom0):
    """Which is no other container, whatever the reason is."""
    container = dom0.container()
    result = dom0.run("--root", "/proc", "create", "--bundle", str(container.bundle), container.id)
    assert result.stderr == f"runX: cannot make /proc/{container.id}: No such file or directory\n"


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete"])
def test_unknown_id(bundle, command):
    bundle.check_refused("does not exist", command=command)


def test_delete_force_of_an_unknown_id_succeeds(bundle):
    assert bundle.succeed("delete", "--force") == b""


@pytest.mark.parametrize("command", ["create", "start", "state", "kill", "delete"])
def test_missing_id(bundle, command):
    bundle.write_config(config("true"))
    result = call(*runx_command(*bundle.globals(), command), cwd=bundle.folder)
    assert (result.returncode, result.stderr) == (1, b"runX: a container ID is required as an argument\n")


# ---- standard streams


def shell(redirections, *words):
    """Run a command with redirections of the shell's."""
    return call("sh", "-c", f'"$@" {redirections}', "sh", *words)


def test_a_stream_that_the_caller_has_closed_gets_nothing_and_no_other_one_does():
    state = runx_command("state", "never-made")
    result = shell("2>&-", *state)
    assert (result.returncode, result.stdout) == (1, b"")
    assert shell("2>/dev/full", *state).returncode == 1
    assert shell(">&-", *runx_command("features")).returncode == 0


def test_what_runx_opens_never_gets_the_number_of_a_standard_stream():
    script = (
        "import os, runx\n"
        "runx.open_standard()\n"
        "places = {os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)}\n"
        "os._exit(os.open('/', os.O_RDONLY) if places == {'/dev/null'} else 1)"
    )
    folder = os.path.dirname(runx.__file__)
    result = shell("<&- >&- 2>&-", "env", f"PYTHONPATH={folder}", sys.executable, "-c", script)
    assert result.returncode == 3


@pytest.mark.parametrize("command", ["features", "--version"])
def test_output_that_cannot_be_written_is_an_error_that_is_told_once(command):
    result = shell(">/dev/full", *runx_command(command))
    assert result.returncode == 1
    assert result.stderr == b"runX: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("command", ["checkpoint", "restore"])
def test_an_engine_that_asks_whether_there_are_checkpoints_hears_that_there_are_none(command):
    """Podman and CRI-O call `checkpoint --help`, and go by the exit status."""
    result = call(*runx_command(command, "--help"))
    assert (result.returncode, result.stderr.decode()) == (1, f"runX: runX does not support {command}\n")


# ---- the log


def test_a_record_of_the_log_is_one_line_as_runcs(tmp_path):
    log = tmp_path / "log"
    call(*runx_command("--log", str(log), "state", "never-made"))
    time, told = r'time="[0-9]{4}-[^" ]*Z"', r'level=error msg="container \\"never-made\\" does not exist"'
    assert re.fullmatch(f"{time} {told}\n", log.read_text())


@pytest.mark.parametrize("empty", [(), ("--log", "")])
def test_without_a_log_standard_error_has_its_format(empty):
    told = json.loads(call(*runx_command(*empty, "--log-format", "json", "state", "never-made")).stderr)
    assert (told["level"], told["msg"]) == ("error", 'container "never-made" does not exist')
