# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear sentence on stderr and as the log's last record, exit status 1, nothing left.

What is found with Xen, or at the container's files; what needs neither is in test_errors.py.
"""

import os
import shutil
import signal

import pytest
from conftest import call, config

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"root": {"path": "config.json"}}, "holds no file system"),
        ({"mounts": [{"destination": "/x", "type": "ext9", "source": "x"}]}, "type ext9"),
    ],
)
def test_a_file_system_that_is_none(bundle, change, words):
    bundle.write_config({**config("true"), **change})
    bundle.check_refused(words)


def test_a_command_that_is_not_in_the_rootfs_or_cannot_be_executed(bundle):
    (bundle.rootfs / "plain").write_text("not executable")
    (bundle.rootfs / "escape").symlink_to("../../../../../../../../usr/bin/python3")
    for name, words in (
        ("no-such-command", 'exec: "no-such-command": executable file not found in $PATH'),
        ("/no/such/file", 'exec: "/no/such/file": stat /no/such/file: no such file or directory'),
        ("/tmp", 'exec: "/tmp": permission denied'),
        ("/plain", 'exec: "/plain": permission denied'),
        ("/escape", 'exec: "/escape": stat /escape: no such file or directory'),
    ):
        bundle.write_config(config(name))
        bundle.check_refused(words)


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
    bundle.check_refused("executable file not found")
    bundle.created({**spec, "process": config("true")["process"]})
    os.kill(bundle.pid(), signal.SIGKILL)
    bundle.succeed("delete", "--force")
    assert not bundle.root.joinpath(bundle.id).exists()
    assert (precious / "file").read_text() == "still here"
    assert (bundle.rootfs / "bin/busybox").exists()


def test_no_kernel(bundle, tmp_path):
    # a copy of the module, so that the kernel is not where it looks
    (tmp_path / "sbin").mkdir()
    copy = shutil.copy("/usr/lib/runX/runx.py", tmp_path / "sbin/runX")
    bundle.write_config(config("true"))
    result = call("python3", "-IS", str(copy), *bundle.command("create")[1:])
    message = result.stderr.decode()
    assert result.returncode == 1 and "there is no kernel at" in message and "kernel/build.sh" in message
    assert not list(bundle.root.iterdir())


def test_no_xl(bundle):
    # a mount namespace in which xl is hidden behind /dev/null
    bundle.write_config(config("true"))
    hide = "".join(f"mount --bind /dev/null {path} && " for path in {shutil.which("xl"), runx.find_xl()})
    result = call("unshare", "-m", "sh", "-c", f"{hide} exec {' '.join(bundle.command('create'))}")
    assert result.returncode == 1 and b"cannot find xl" in result.stderr
    assert not bundle.root.exists()


def test_not_enough_memory(bundle):
    spec = config("true")
    spec["linux"] = {"resources": {"memory": {"limit": 1 << 40}}}
    bundle.write_config(spec)
    bundle.check_refused("not enough memory", "1048576 MiB", "free")


def test_the_pid_file_cannot_be_written(bundle):
    bundle.write_config(config("true"))
    bundle.pid_file = bundle.folder / "missing/pid"
    bundle.check_refused("pid file")
