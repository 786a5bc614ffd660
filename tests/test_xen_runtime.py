"""runX called directly, as its callers call it: the life of a container, its state, and both kinds of guest."""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import time

import pytest
from conftest import call, can_run_pvh, config, in_memory, wait_for, wait_until, xl
from spec import check_state

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")

STATE_FIELDS = {"ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"}


@pytest.fixture
def created(bundle):
    """A function that creates a container and returns a pidfd of its monitor."""

    def create(*args, rootfs="9p"):
        spec = config(*args)
        spec["annotations"] = {"org.example.note": "kept", "org.runx.rootfs": rootfs}
        bundle.write_config(spec)
        return bundle.created()

    return create


def test_run_waits_and_returns_the_exit_status_and_all_output(bundle):
    # what runs beside the process ends with it, and what is written in the last instant is delivered
    script = "echo err >&2; sleep 1000 & sleep 1000 & dd if=/dev/zero bs=1000 count=100 2>/dev/null; echo last; exit 5"
    result = bundle.run("sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (5, b"\0" * 100000 + b"last\n", b"err\n")
    assert not bundle.root.joinpath(bundle.id).exists()


def test_stdin_is_a_pipe_and_stays_at_its_end(bundle):
    result = bundle.run("sh", "-c", "[ -t 0 ] || echo pipe; cat; cat; echo end", input=b"1\x10\x04\x00\x11\x132")
    assert (result.stdout, result.returncode) == (b"pipe\n1\x10\x04\x00\x11\x132end\n", 0)


def test_state_through_a_life(bundle, created):
    mounted = pathlib.Path("/proc/self/mountinfo").read_text()
    pidfd = created("sleep", "1000")
    assert pathlib.Path("/proc/self/mountinfo").read_text() == mounted
    state = bundle.state()
    check_state(state)
    assert set(state) == STATE_FIELDS
    assert (state["status"], state["pid"], state["id"]) == ("created", bundle.pid(), bundle.id)
    assert (state["bundle"], state["annotations"]["org.example.note"]) == (str(bundle.folder), "kept")
    assert bundle.domain() is not None
    listed = json.loads(bundle.runx("list", "--format=json").stdout)
    assert [(state["id"], state["status"]) for state in listed] == [(bundle.id, "created")]
    assert bundle.runx("list", "-q").stdout.decode().split() == [bundle.id]
    assert bundle.runx("list").stdout.decode().split()[:6] == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert bundle.runx("start", bundle.id).returncode == 0
    check_state(bundle.state())
    assert bundle.state()["status"] == "running"
    assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
    wait_for(pidfd)
    state = bundle.state()
    check_state(state)
    assert (state["status"], state["pid"], set(state)) == ("stopped", 0, STATE_FIELDS)
    assert bundle.runx("delete", bundle.id).returncode == 0
    assert b"does not exist" in bundle.runx("state", bundle.id).stderr


def test_state_while_create_still_runs(bundle):
    bundle.write_config(config("true"))
    creating = subprocess.Popen(
        bundle.command("create", "--bundle", str(bundle.folder), bundle.id),
        stdin=subprocess.DEVNULL,
    )
    wait_until(lambda: bundle.root.joinpath(bundle.id).exists(), "the state folder")
    assert bundle.state()["status"] == "creating"
    assert creating.wait() == 0
    assert bundle.state()["status"] == "created"


def test_a_domain_destroyed_behind_our_back_stops_its_container_and_no_other(bundle, second):
    """Both monitors are woken by either end, and share a look at which domains are alive."""
    pidfds = {}
    for each in (bundle, second):
        script = "trap 'echo still served' USR1; echo ready; while :; do sleep 1000 & wait; done"
        each.write_config(in_memory(config("sh", "-c", script)))
        pidfds[each] = each.created()
        each.runx("start", each.id)
        wait_until(lambda output=each.folder / "stdout": output.read_bytes() == b"ready\n", "the container's output")

    def destroy(each):
        xl("destroy", str(each.domain()))
        wait_for(pidfds[each])
        assert each.state()["status"] == "stopped"
        assert each.runx("delete", each.id).returncode == 0

    survivor, destroyed = second.domain(), time.monotonic()
    destroy(bundle)

    def survivor_seen():
        with open(runx.LIVING_FILE, "rb") as file:
            return survivor in runx.last_look(file.fileno(), destroyed)

    wait_until(survivor_seen, "the shared look")
    assert second.runx("kill", second.id, "USR1").returncode == 0
    wait_until(lambda: (second.folder / "stdout").read_bytes() == b"ready\nstill served\n", "what the survivor prints")
    destroy(second)


@pytest.mark.parametrize("stage", ["running", "ending"])
def test_a_killed_monitor_means_stopped_and_delete_removes_the_domain(bundle, created, stage):
    pidfd = created("sleep", "1000" if stage == "running" else "0")
    xenstore, node = runx.Xenstore(), f"/local/domain/{bundle.domain()}/data"
    bundle.runx("start", bundle.id)
    node += "/ready" if stage == "running" else "/exit"
    wait_until(lambda: xenstore.read(node), f"{node} in xenstore")
    os.kill(bundle.monitor(), signal.SIGKILL)
    wait_for(pidfd)
    assert bundle.state()["status"] == "stopped"
    assert stage == "ending" or bundle.domain() is not None
    assert bundle.runx("delete", bundle.id).returncode == 0
    assert bundle.domain() is None


def test_writes_of_the_container_are_in_the_bundles_rootfs(bundle):
    script = "echo kept > /tmp/file; chmod 4711 /tmp/file; ln -s file /tmp/link; mkdir /tmp/dir"
    assert bundle.run("sh", "-c", script).returncode == 0
    written = bundle.rootfs / "tmp/file"
    assert written.read_text() == "kept\n"
    assert written.stat().st_mode & 0o7777 == 0o4711
    assert os.readlink(bundle.rootfs / "tmp/link") == "file"
    assert (bundle.rootfs / "tmp/dir").is_dir()


def test_writes_survive_sigkill(bundle, created):
    pidfd = created("sh", "-c", "exec 5>/tmp/open; echo written >&5; echo done; sleep 1000")
    bundle.runx("start", bundle.id)
    wait_until(lambda: (bundle.folder / "stdout").read_bytes() == b"done\n", "the container to have written")
    bundle.runx("kill", bundle.id, "9")
    wait_for(pidfd)
    assert (bundle.rootfs / "tmp/open").read_text() == "written\n"


def crashes_of_the_emulated_processor():
    """QEMU's software emulation of SVM loses the state of a PVH guest now and then; Xen sees a triple fault."""
    return xl("dmesg").count("Triple fault")


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_both_kinds_of_guest_boot(bundle, kind):
    if kind == "pvh" and not can_run_pvh():
        pytest.skip("this hypervisor cannot run PVH guests: no hardware virtualization")
    spec = config("sh", "-c", "cat; exit 4")
    spec["vm"] = {"hypervisor": {"parameters": [f'type="{kind}"']}}
    bundle.write_config(spec)
    for _ in range(3):
        crashes = crashes_of_the_emulated_processor()
        result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id, input=kind.encode() * 1000)
        if crashes_of_the_emulated_processor() == crashes:
            break
    assert (result.returncode, result.stdout, result.stderr) == (4, kind.encode() * 1000, b"")


def test_the_host_chooses_the_kind_of_guest(bundle):
    # in a mount namespace where the host's own configuration is hidden, if it has one
    bundle.write_config(config("true"))
    create = f"exec runX --root {bundle.root} create --bundle {bundle.folder} {bundle.id} >/dev/null 2>&1"
    hide = "if [ -d /etc/runX ]; then mount -t tmpfs none /etc/runX; fi"
    assert call("unshare", "-m", "sh", "-c", f"{hide}; {create}").returncode == 0
    chosen = call("xenstore-read", f"/libxl/{bundle.domain()}/type").stdout.decode().strip()
    assert chosen == ("pvh" if can_run_pvh() else "pv")


def test_the_process_has_its_user_umask_folder_and_a_large_environment(bundle):
    user = {"uid": 1000, "gid": 2000, "additionalGids": [3000, 4000], "umask": 0o027}
    variables = [f"V{number}={'x' * 1000}{number}" for number in range(100)]
    # the user may open its standard streams again
    script = "(id -u; id -G; umask; pwd) >/proc/self/fd/1; env -u PWD -u SHLVL"
    spec = config("sh", "-c", script, env=["PATH=/bin", *variables], user=user, cwd="/new/folder")
    bundle.write_config(in_memory(spec))
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    lines = result.stdout.decode().splitlines()
    assert lines[:4] == ["1000", "2000 3000 4000", "0027", "/new/folder"]
    assert sorted(lines[4:]) == sorted(["PATH=/bin", "HOME=/", *variables])


def test_a_read_only_root_keeps_its_mounts_writable(bundle):
    spec = config("sh", "-c", "echo x >/dev/file && cat /dev/file; echo y >/tmp/file")
    spec["root"]["readonly"] = True
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.stdout == b"x\n" and b"Read-only file system" in result.stderr
    assert not (bundle.rootfs / "tmp/file").exists()


def test_a_slow_reader_loses_nothing_and_holds_the_guest_back(bundle):
    bundle.write_config(in_memory(config("sh", "-c", "dd if=/dev/zero bs=1024 count=512 2>/dev/null; echo end >&2")))
    reader, writer = os.pipe()
    running = subprocess.Popen(
        bundle.command("run", "--bundle", str(bundle.folder), bundle.id),
        stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    first = os.read(reader, 1)
    # nobody reads stdout now; stderr must not come before all of stdout fits somewhere, and it does not
    monitor = pathlib.Path(f"/proc/{bundle.monitor()}/statm")
    before = int(monitor.read_text().split()[1])
    assert not select.select([running.stderr], [], [], 10)[0]
    assert (int(monitor.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 128 << 10
    total = len(first)
    while chunk := os.read(reader, 65536):
        total += len(chunk)
    assert (total, running.stderr.read(), running.wait()) == (512 * 1024, b"end\n", 0)


def test_the_process_gets_sigpipe_when_the_reader_of_its_output_has_gone(bundle):
    script = "dd if=/dev/zero bs=1024 count=1000000 2>/dev/null; echo $? >/tmp/status; exit 6"
    bundle.write_config(config("sh", "-c", script))
    reader, writer = os.pipe()
    running = subprocess.Popen(
        bundle.command("run", "--bundle", str(bundle.folder), bundle.id),
        stdin=subprocess.DEVNULL, stdout=writer,
    )  # fmt: skip
    os.close(writer)
    assert os.read(reader, 1) == b"\0"
    os.close(reader)
    assert running.wait(60) == 6
    assert (bundle.rootfs / "tmp/status").read_text() == f"{128 + signal.SIGPIPE}\n"


def test_streams_that_the_process_closes_end_while_it_lives(bundle):
    script = (
        "echo out; exec >&-; read -r line; echo $line >&2; exec <&-; while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 4"
    )
    bundle.write_config(config("sh", "-c", script))
    options = ["--bundle", str(bundle.folder), "--pid-file", str(bundle.pid_file)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(bundle.command("create", *options, bundle.id), **pipes) as creating:
        assert creating.wait() == 0
        pidfd = os.pidfd_open(bundle.pid())
        bundle.runx("start", bundle.id)
        assert creating.stdout.read() == b"out\n"
        os.write(creating.stdin.fileno(), b"typed\n")
        assert creating.stderr.readline() == b"typed\n"
        wait_until(lambda: is_broken(creating.stdin.fileno()), "standard input to have no reader")
        (bundle.rootfs / "tmp/go").touch()
        wait_for(pidfd)
        assert creating.stderr.read() == b""


def is_broken(fd):
    try:
        return os.write(fd, b"nobody reads this") < 0
    except BrokenPipeError:
        return True


def test_kill_of_a_created_container_destroys_the_domain(bundle, created):
    pidfd = created("sleep", "1000", rootfs="ramdisk")
    assert bundle.runx("kill", bundle.id, "TERM").returncode == 0
    wait_for(pidfd)
    assert bundle.domain() is None
    assert b"cannot start a container that has stopped" in bundle.runx("start", bundle.id).stderr


def test_a_signal_sent_before_the_process_runs_is_not_lost(bundle, created):
    pidfd = created("sleep", "1000", rootfs="ramdisk")
    bundle.runx("start", bundle.id)
    bundle.runx("kill", bundle.id, "TERM")
    wait_for(pidfd)


def test_sigkill_ends_a_container_whose_output_nobody_reads(bundle):
    # what the full pipe does not take is in the console's ring: the VM itself can end
    bundle.write_config(config("sh", "-c", "echo unread; echo > /tmp/written; sleep 1000"))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    options = ["--bundle", str(bundle.folder), "--pid-file", str(bundle.pid_file)]
    streams = {"capture_output": False, "stdout": writer, "stderr": subprocess.DEVNULL}
    bundle.runx("create", *options, bundle.id, **streams)
    os.close(writer)
    pidfd = os.pidfd_open(bundle.pid())
    bundle.runx("start", bundle.id)
    wait_until((bundle.rootfs / "tmp/written").exists, "the output to be written")
    assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
    wait_for(pidfd)
    os.close(reader)
    os.close(pidfd)


def test_kill_returns_while_the_guest_is_deaf(bundle, created):
    # a paused domain is as deaf as a guest can be
    pidfd = created("sleep", "1000", rootfs="ramdisk")
    bundle.runx("start", bundle.id)
    xl("pause", str(bundle.domain()))
    assert bundle.runx("kill", bundle.id, "TERM").returncode == 0
    assert not select.select([pidfd], [], [], 0)[0]
    assert bundle.runx("kill", bundle.id, "KILL").returncode == 0
    wait_for(pidfd)


def test_a_signal_to_the_monitor_goes_to_the_process(bundle, created):
    script = "trap 'echo caught; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    pidfd, output = created("sh", "-c", script, rootfs="ramdisk"), bundle.folder / "stdout"
    bundle.runx("start", bundle.id)
    wait_until(lambda: output.read_bytes() == b"ready\n", "the trap to be set")
    os.kill(bundle.pid(), signal.SIGTERM)
    wait_for(pidfd)
    assert output.read_bytes() == b"ready\ncaught\n"


def test_what_the_guest_writes_to_xenstore_is_checked(bundle):
    # a container that is root in its VM can reach the guest's xenstore device
    script = (
        "mknod /tmp/xenbus c 10 $(sed -n 's/ xen.xenbus//p' /proc/misc) || exit 1;"
        "printf '\\013\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\020\\0\\0\\0data/exit\\0999999' >/tmp/xenbus; sleep 1000"
    )
    spec = in_memory(config("sh", "-c", script))
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.returncode == 255, result
    assert "no valid exit status" in bundle.log.read_text()


def test_bind_mounts_are_served(bundle, tmp_path):
    host = tmp_path / "host"
    host.mkdir()
    (host / "file").write_text("from the host")
    below = host / "below"
    below.mkdir()
    call("mount", "-t", "tmpfs", "none", str(below))
    script = "cat /data/file /one/file; echo back >/data/new; echo x >/data/below/x; echo no >/one/file"
    # dom0 enforces it: root in the VM may undo its own mounts
    hostile = "mount -o remount,rw /all; echo no >/all/new; echo no >/all/below/new"
    spec = config("sh", "-c", f"{hostile}; {script}")
    spec["mounts"] += [
        {"destination": "/all", "type": "bind", "source": str(host), "options": ["rbind", "rro"]},
        {"destination": "/data", "type": "bind", "source": str(host), "options": ["rbind", "rw"]},
        {"destination": "/one/file", "type": "bind", "source": str(host / "file"), "options": ["bind", "ro"]},
    ]
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.stdout == b"from the host" * 2
    written = (below / "x").read_text() if (below / "x").exists() else ""
    call("umount", str(below))
    assert result.stderr.count(b"Read-only file system") == 3 and result.returncode == 1
    assert written == "x\n"
    assert (host / "new").read_text() == "back\n"
    assert (host / "file").read_text() == "from the host"


def test_the_guest_cannot_fill_the_hosts_memory(bundle):
    # what is exported beside the rootfs is the state folder's, on the host's /run
    script = (
        "mkdir /s; mount -t 9p -o trans=xen,version=9p2000.L share /s; ls /s; echo x >/s/file; echo x >/s/mounts/file"
    )
    result = bundle.run("sh", "-c", script)
    assert result.stdout.count(b"\n") <= 2 and result.returncode != 0
    assert not list(bundle.folder.glob("**/share/**/file"))


def test_a_memory_limit_is_the_size_of_the_vm(bundle):
    for mebibytes, most in ((96, 96), (6, 40)):
        spec = config("sh", "-c", "read -r _ kibibytes _ </proc/meminfo; echo $kibibytes")
        spec["linux"] = {"resources": {"memory": {"limit": mebibytes << 20}}}
        bundle.write_config(spec)
        result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
        assert (most - 40) << 10 < int(result.stdout) < most << 10, result
