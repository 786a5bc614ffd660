# SPDX-License-Identifier: Apache-2.0
"""A container's state on disk beside what Xen says: which one is believed.  Xen is a script and a dictionary here."""

import concurrent.futures
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import threading
import time
import zlib

import pytest

import runx

UUID = "11111111-2222-4333-8444-555555555555"
DOMID = 7
XL = """#!/bin/sh
# its domain is $here/domain, which says whether that is paused
here=${0%/*}
echo "$*" >>"$here/calls"
[ ! -e "$here/stuck" ] || exec sleep 1000
[ ! -e "$here/broken" ] || { echo "xc: error: no memory" >&2; exit 1; }
case $1 in
list)
    [ -e "$here/domain" ] || { echo "Error: Domain '$2' does not exist." >&2; exit 1; }
    read -r paused <"$here/domain"
    echo "Name ID Mem VCPUs State Time(s)"; echo "x 7 64 1 --$paused--- 0.1" ;;
pause | unpause)
    read -r paused <"$here/domain"
    [ "$1$paused" != "unpause-" ] && [ "$1$paused" != pausep ] || { echo "libxl: error: it is so already" >&2; exit 1; }
    [ "$1" = pause ] && echo p >"$here/domain" || echo - >"$here/domain"
    [ ! -e "$here/killer" ] || kill -9 $PPID ;;
destroy) rm -f "$here/domain" ;;
vm-list) echo "UUID ID name" ;;
esac
"""


class Xenstore:
    """What runX's client offers, with the nodes in memory."""

    def __init__(self, nodes):
        self.nodes, self.events = nodes, ["something is always new"]

    def watch(self, *watches):
        pass

    def take_events(self):
        pass

    def read(self, path, default=""):
        return self.nodes.get(path, default)

    def list(self, path):
        return sorted({node[len(path) + 1 :].split("/")[0] for node in self.nodes if node.startswith(f"{path}/")})

    def write(self, path, value):
        self.nodes[path] = value

    def remove(self, path):
        for node in [node for node in self.nodes if node == path or node.startswith(f"{path}/")]:
            del self.nodes[node]

    def transaction(self, work):
        work()


class Dom0:
    """A root with one container, whose monitor is this process, and what stands in for Xen."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.root = folder, folder / "root"
        self.nodes = {f"/local/domain/{DOMID}/vm": f"/vm/{UUID}", f"/local/domain/{DOMID}/data/process/0/ready": "1"}
        self.call("xl", XL)
        (folder / "domain").write_text("p\n")
        monkeypatch.setattr(runx, "find_xl", lambda: str(folder / "xl"))
        monkeypatch.setattr(runx, "Xenstore", lambda: Xenstore(self.nodes))
        self.container = runx.Container(str(self.root), "c")
        self.container.reserve()
        os.mkfifo(self.container.path("control"))
        self.control = os.open(self.container.path("control"), os.O_RDWR | os.O_NONBLOCK)
        self.container.save(
            status="created", bundle="/", rootfs="/", hostname="c", uuid=UUID, name="runx-c-11111111", domid=DOMID,
            boot=runx.boot_id(), pid=os.getpid(), pid_start_time=runx.process_start_time(os.getpid()),
            devices=runx.STANDARD_DEVICES, maxmem=64, maxvcpus=1,
        )  # fmt: skip

    def call(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def run(self, *words):
        """Runs a command line; returns its exit status."""
        return runx.main(["--root", str(self.root), "--log", str(self.folder / "log"), *words])

    def status(self):
        return runx.Container(str(self.root), "c").load().status()

    def calls(self):
        """What xl has been asked to change."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[0] for line in lines if line.split()[0] in ("pause", "unpause", "destroy")]

    def change(self, **changes):
        """Changes the state as nobody but time does."""
        path = self.container.path("state.json")
        with open(path, encoding="utf-8") as file:
            state = {**json.load(file), **changes}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(state, file)

    def asked(self):
        """What the monitor has been asked for."""
        try:
            return os.read(self.control, 4096).decode().split("\n")[:-1]
        except BlockingIOError:
            return []

    def log(self):
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def dom0(tmp_path, monkeypatch):
    dom0 = Dom0(tmp_path, monkeypatch)
    yield dom0
    os.close(dom0.control)


@pytest.fixture
def full_disk(dom0, monkeypatch):
    """The state's file cannot grow, but an empty one can be made, as on a file system that is full."""
    save = runx.Container.save

    def save_nothing(container, **changes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            save(container, **changes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(runx.Container, "save", save_nothing)


def killed(dom0, *words):
    """Runs a command line in a process of its own, which xl kills as soon as it has done what it was asked for."""
    (dom0.folder / "killer").touch()
    pid = os.fork()
    if pid == 0:
        os._exit(dom0.run(*words))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    (dom0.folder / "killer").unlink()


def test_start_pause_and_resume_are_each_done_once(dom0):
    assert (dom0.status(), dom0.run("start", "c"), dom0.status()) == ("created", 0, "running")
    assert (dom0.run("pause", "c"), dom0.run("pause", "c"), dom0.status()) == (0, 1, "paused")
    assert (dom0.run("resume", "c"), dom0.run("resume", "c"), dom0.status()) == (0, 1, "running")
    assert dom0.calls() == ["unpause", "pause", "unpause"]
    assert sorted(os.listdir(dom0.container.folder)) == ["control", "state.json"]


def test_what_was_killed_half_way_is_asked_of_xen(dom0):
    killed(dom0, "start", "c")
    assert (dom0.status(), dom0.run("start", "c")) == ("running", 1)
    killed(dom0, "pause", "c")
    assert (dom0.status(), dom0.run("pause", "c")) == ("paused", 1)
    killed(dom0, "resume", "c")
    assert (dom0.status(), dom0.run("resume", "c")) == ("running", 1)
    assert dom0.calls() == ["unpause", "pause", "unpause"]
    assert (dom0.run("pause", "c"), dom0.run("resume", "c"), dom0.status()) == (0, 0, "running")


def test_a_caller_that_ignores_its_children_has_not_ours_ignored(dom0, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["runX", "--root", str(dom0.root), "start", "c"])
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        runx.run()
    assert (os.waitpid(pid, 0)[1], dom0.status(), dom0.calls()) == (0, "running", ["unpause"])


def test_what_xl_refuses_has_not_happened(dom0):
    for status, command in (("created", "start"), ("running", "pause"), ("paused", "resume")):
        (dom0.folder / "broken").touch()
        assert dom0.run(command, "c") == 1
        (dom0.folder / "broken").unlink()
        assert (dom0.status(), dom0.run(command, "c")) == (status, 0)
    assert "no memory" in dom0.log()


@pytest.mark.usefixtures("full_disk")
def test_with_a_full_disk_a_container_can_be_started_paused_resumed_and_killed(dom0):
    assert (dom0.run("start", "c"), dom0.status()) == (0, "running")
    assert (dom0.run("pause", "c"), dom0.status(), dom0.run("pause", "c")) == (0, "paused", 1)
    assert (dom0.run("resume", "c"), dom0.status()) == (0, "running")
    assert (dom0.run("pause", "c"), dom0.run("kill", "c", "KILL")) == (0, 0)
    assert (dom0.calls(), dom0.asked()) == (["unpause", "pause", "unpause", "pause", "unpause"], ["kill 9"])
    assert (dom0.run("delete", "c"), dom0.status()) == (1, "running")


def test_kill_lets_a_paused_vm_run_so_that_its_writes_are_kept(dom0):
    assert (dom0.run("start", "c"), dom0.run("pause", "c"), dom0.run("kill", "c", "KILL")) == (0, 0, 0)
    assert (dom0.status(), dom0.calls(), dom0.asked()) == ("running", ["unpause", "pause", "unpause"], ["kill 9"])


def test_kill_ends_it_whatever_xl_does(dom0):
    dom0.run("start", "c")
    dom0.run("pause", "c")
    (dom0.folder / "broken").touch()
    assert (dom0.run("kill", "c", "KILL"), dom0.asked()) == (0, ["kill 9"])
    assert (dom0.run("state", "c"), dom0.run("kill", "c", "KILL"), dom0.asked()) == (1, 0, ["kill 9"])


def test_as_long_as_its_pid_is_there_a_container_takes_signals(dom0):
    dom0.run("start", "c")
    dom0.nodes.clear()  # its domain is destroyed, its monitor has not ended yet
    os.unlink(dom0.container.path("control"))
    for name in ("TERM", "KILL", "0"):
        assert dom0.run("kill", "c", name) == 0
    assert dom0.status() == "running"
    dom0.change(pid_start_time=1)
    assert (dom0.run("kill", "c", "KILL"), dom0.status()) == (1, "stopped")
    assert dom0.log().endswith('msg="container not running"\n')


def test_an_xl_that_hangs_is_ended(dom0, monkeypatch):
    monkeypatch.setattr(runx, "XL_TIME_LIMIT", 0.2)
    (dom0.folder / "stuck").touch()
    assert dom0.run("start", "c") == 1
    assert "xl unpause failed: xl has not ended in 0.2 s: is xenstored stuck?" in dom0.log()
    (dom0.folder / "stuck").unlink()
    assert (dom0.status(), dom0.run("start", "c"), dom0.status()) == ("created", 0, "running")


DEVICES = [["console", 1], ["console", 2], ["9pfs", 0], ["vif", 0], ["vbd", 51712]]
BACKENDS = [f"/local/domain/0/backend/{kind}/{DOMID}/{number}/state" for kind, number in DEVICES]


@pytest.mark.parametrize("boot", ["another", "ours"])
def test_another_vm_with_the_number_of_one_that_is_gone_is_left_alone(dom0, boot):
    """The state is of before a reboot, or numbers have begun anew; its process is gone."""
    others = {f"/local/domain/{DOMID}/vm": "/vm/other", **dict.fromkeys(BACKENDS, "4")}
    dom0.nodes.clear()
    dom0.nodes.update(others)
    old = {"boot": "old"} if boot == "another" else {"pid_start_time": 1}
    dom0.change(status="running", devices=DEVICES, namespace="", **old)
    assert dom0.status() == "stopped"
    assert (dom0.run("kill", "c", "KILL"), dom0.run("pause", "c"), dom0.run("events", "--stats", "c")) == (1, 1, 1)
    assert dom0.run("delete", "c") == 0
    assert (dom0.nodes, dom0.calls(), os.listdir(dom0.root)) == (others, [], [])


@pytest.mark.parametrize(
    "command", [["pause"], ["start"], ["update", "--memory", "32m"], ["kill"], ["events", "--stats"]]
)
def test_a_number_counts_only_with_the_uuid(dom0, command):
    """The monitor is still there, its domain is not."""
    if command != ["start"]:
        dom0.change(status="running")
    dom0.nodes[f"/local/domain/{DOMID}/vm"] = "/vm/other"
    before = dict(dom0.nodes)
    dom0.run(*command, "c")
    calls = dom0.folder / "calls"
    assert (dom0.nodes, calls.exists()) == (before, False)


def test_what_is_left_of_one_that_is_gone_is_removed(dom0):
    dom0.nodes.clear()
    dom0.nodes.update(dict.fromkeys(BACKENDS, "4"))
    dom0.change(status="running", devices=DEVICES, pid_start_time=1)
    assert (dom0.run("delete", "c"), dom0.nodes, os.listdir(dom0.root)) == (0, {}, [])


def test_a_domain_that_cannot_be_destroyed_is_not_forgotten(dom0):
    dom0.change(pid_start_time=1)
    (dom0.folder / "broken").touch()
    assert (dom0.run("delete", "--force", "c"), os.listdir(dom0.root)) == (1, ["c"])
    assert "xc: error: no memory" not in dom0.log() and "failed: no memory" in dom0.log()
    (dom0.folder / "broken").unlink()
    assert (dom0.run("delete", "--force", "c"), os.listdir(dom0.root), dom0.calls()[-1]) == (0, [], "destroy")


ATTACHMENT = {
    "network": "net", "calls": [["a\0b", {}]], "identity": "x", "interface": "eth0", "namespace": "/x", "result": None,
    "bridge": "", "mac": "", "mtu": 0, "rate": "", "dhcp": False, "addresses": [], "routes": [], "gateways": [],
    "dns": {},
}  # fmt: skip
STATES = {
    "an odd plugin": {"networks": [ATTACHMENT]},
    "an odd plugin's calls": {"networks": [{**ATTACHMENT, "calls": [1]}]},
    "an odd network": {"networks": [1, {"x": 1}]},
    "odd cgroups": {"cgroups": [1]},
    "odd hooks": {"hooks": {"poststop": [{"path": "x"}]}},
    "a hook that is not there": {"hooks": {"poststop": [{"path": "/no/such\0hook"}]}, "bundle": "/no/such"},
}


@pytest.mark.parametrize("name", STATES)
def test_clean_up_goes_on_past_anything(dom0, name):
    dom0.change(status="running", pid_start_time=1, **STATES[name])
    assert (dom0.run("delete", "--force", "c"), os.listdir(dom0.root), dom0.calls()) == (0, [], ["destroy"])
    assert dom0.log().startswith("time=") and " level=warning msg=" in dom0.log(), dom0.log()


TEXTS = [
    "", "{", "[]", "null", "1", '"x"', "{}", '{"status": 1}', '{"status": "gone"}', '{"status": "running"}',
    '{"status": "created", "pid": "x"}', "[" * 100000, '{"status": "running", "pid": [1], "uuid": {}}', "\0" * 4096,
    '{"status": "creating", "networks": {}}',
]  # fmt: skip


CHANGES = [
    {"monitor": 5}, {"monitor": ["x", 1]}, {"domid": None}, {"pid": True, "boot": 1}, {"hooks": []}, {"plugged": 5},
    {"devices": [{}]}, {"devices": [["vif", "0"]]}, {"version": "1"}, {"version": -1}, {"namespace": 1}, {"disk": []},
]  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, *CHANGES], ids=range(len(TEXTS + CHANGES)))
def test_a_state_that_cannot_be_read_is_an_error_and_can_be_removed(dom0, text):
    if isinstance(text, dict):
        dom0.change(**text)
    else:
        with open(dom0.container.path("state.json"), "w", encoding="utf-8") as file:
            file.write(text)
    with open(dom0.container.path("xl.cfg"), "w", encoding="utf-8") as file:
        file.write(f'name = "runx-c-11111111"\nuuid = "{UUID}"\ntype = "pvh"\n')
    consoles = dict.fromkeys((f"/local/domain/0/backend/console/{DOMID}/{number}/state" for number in (1, 2)), "4")
    dom0.nodes.update(consoles)
    for command in ("state", "start", "kill", "pause", "resume", "ps", "events", "update", "delete"):
        assert dom0.run(command, "c") == 1
        assert dom0.log().endswith('remove the container by `runX delete --force c`"\n'), command
    warnings = dom0.log().count("level=warning")
    assert (dom0.run("list"), dom0.log().count("level=warning")) == (0, warnings + 1)
    assert (dom0.run("delete", "--force", "c"), os.listdir(dom0.root)) == (0, [])
    assert (dom0.calls(), dom0.asked()) == (["destroy"], ["destroy 9"])
    assert "the state of container c is lost" in dom0.log() and not dom0.nodes.keys() & consoles.keys()


def older(dom0, *missing):
    """Writes the state as runX 0.1 did, without some keys; its devices are those of BACKENDS."""
    with open(dom0.container.path("state.json"), encoding="utf-8") as file:
        state = json.load(file)
    state = {**state, "ociVersion": "1.0.2", "vifs": [0], "vbds": [51712]}
    for key in ("version", "oci_version", "devices", "paused", "updating", *missing):
        del state[key]
    with open(dom0.container.path("state.json"), "w", encoding="utf-8") as file:
        json.dump(state, file)


@pytest.mark.parametrize(
    "missing", [(), ("cgroups",), ("networks", "namespace", "rate"), ("resources", "base", "disk")]
)
def test_a_container_of_an_older_runx_goes_on(dom0, missing, capsys):
    older(dom0, *missing)
    dom0.nodes.update(dict.fromkeys(BACKENDS, "4"))
    assert (dom0.run("state", "c"), json.loads(capsys.readouterr().out)["ociVersion"]) == (0, "1.0.2")
    assert (dom0.run("start", "c"), dom0.run("update", "--memory", "32m", "c"), dom0.status()) == (0, 0, "running")
    older(dom0, *missing)
    dom0.change(pid_start_time=1, monitor=[os.getpid(), 1])
    assert (dom0.run("delete", "c"), os.listdir(dom0.root)) == (0, [])
    assert not set(BACKENDS) & set(dom0.nodes)


def test_a_container_of_a_newer_runx_is_refused(dom0):
    version = runx.STATE_VERSION + 1
    dom0.change(version=version, pid={"kind": "new"})
    for command in ("state", "start", "kill", "pause", "resume", "ps", "events", "update", "delete"):
        assert dom0.run(command, "c") == 1
        assert f"its state has version {version}, and this runX knows {version - 1}: use the newer one" in dom0.log()
    assert dom0.calls() == []


def test_what_lies_in_the_root_and_is_no_container_is_left_alone(dom0, capsys):
    (dom0.root / "file").write_text("here")
    assert (dom0.run("list", "--quiet"), capsys.readouterr().out) == (0, "c\n")
    for command in (["state"], ["kill"], ["start"], ["delete"]):
        assert dom0.run(*command, "file") == 1
        assert dom0.log().endswith('msg="container \\"file\\" does not exist"\n')
    assert (dom0.run("delete", "--force", "file"), (dom0.root / "file").read_text()) == (0, "here")


def test_a_folder_of_others_in_the_root_is_no_container_and_keeps_what_is_in_it(dom0, capsys):
    (dom0.root / "photos").mkdir()
    (dom0.root / "photos/one").write_text("here")
    assert (dom0.run("list", "--quiet"), capsys.readouterr().out) == (0, "c\n")
    assert [dom0.run(command, "photos") for command in ("state", "kill", "start", "delete")] == [1] * 4
    assert (dom0.run("delete", "--force", "photos"), (dom0.root / "photos/one").read_text()) == (0, "here")


def test_one_whose_create_has_just_begun_is_listed_with_a_time_that_go_reads(dom0, capsys):
    """It takes the whole list for broken where one time is empty."""
    (dom0.root / "new").mkdir()
    assert dom0.run("list", "--format", "json") == 0
    new = next(each for each in json.loads(capsys.readouterr().out) if each["id"] == "new")
    assert (new["status"], time.strptime(new["created"], "%Y-%m-%dT%H:%M:%SZ").tm_year) == ("creating", 1)


def test_of_a_container_without_a_state_the_vm_is_found_and_removed(dom0):
    os.unlink(dom0.container.path("state.json"))
    with open(dom0.container.path("xl.cfg"), "w", encoding="utf-8") as file:
        file.write(f'name = "runx-c-11111111"\nuuid = "{UUID}"\n')
    assert dom0.run("delete", "c") == 1
    assert (dom0.run("delete", "--force", "c"), os.listdir(dom0.root), dom0.calls()) == (0, [], ["destroy"])


def test_ps_of_a_container_that_has_ended(dom0, capsys):
    """As runc 1.1 and later: the heading alone."""
    dom0.change(pid_start_time=1)
    assert dom0.run("ps", "c") == 0
    assert capsys.readouterr().out.split()[:3] == ["UID", "PID", "PPID"]
    assert (dom0.run("ps", "--format", "json", "c"), capsys.readouterr().out) == (0, "null\n")
    assert (dom0.run("ps", "--format", "xml", "c"), dom0.run("ps", "nobody")) == (1, 1)


def test_ps_beside_a_process_whose_name_is_no_utf_8(dom0, monkeypatch, capsys):
    """busybox's ps shows it as it is."""
    ps = dom0.folder / "ps"
    ps.write_text(f"#!/bin/sh\nprintf 'PID COMMAND\\n1 caf\\351\\n{os.getpid()} it\\n'\n")
    ps.chmod(0o755)
    monkeypatch.setattr(runx, "PATH", f"{dom0.folder}:{runx.PATH}")
    assert dom0.run("ps", "c") == 0
    assert capsys.readouterr().out == f"PID COMMAND\n{os.getpid()} it\n"


def test_ps_where_busybox_has_one_without_options(dom0, monkeypatch, capfd):
    """As oe-core builds it: without options it shows all."""
    dom0.call(
        "ps",
        f"""#!/bin/sh
[ $# = 0 ] || {{ echo "ps: invalid option -- 'e'" >&2; exit 1; }}
printf 'PID USER COMMAND\\n1 0 init\\n{os.getpid()} 0 it\\n'
""",
    )
    monkeypatch.setattr(runx, "PATH", f"{dom0.folder}:{runx.PATH}")
    assert dom0.run("ps", "c") == 0
    assert capfd.readouterr() == (f"PID USER COMMAND\n{os.getpid()} 0 it\n", "")
    assert dom0.run("ps", "c", "-e") == 1
    assert "cannot tell a PID column in the output of ps -e: try --format json" in dom0.log()


def test_a_poststart_hook_that_fails_leaves_nothing(dom0):
    """runtime-spec 1.3, lifecycle: the container is destroyed, and its poststop hooks run."""
    hooks = {"poststart": [{"path": "/bin/false"}], "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", "cat >$0"]}]}
    hooks["poststop"][0]["args"].append(str(dom0.folder / "stopped"))
    pid = os.fork()
    if pid == 0:  # the monitor: it ends when it is told to
        os.read(os.open(dom0.container.path("control"), os.O_RDONLY), 100)
        os._exit(0)
    dom0.change(hooks=hooks, pid=pid, pid_start_time=runx.process_start_time(pid))
    os.close(dom0.control)
    try:
        assert dom0.run("start", "c") == 1
        assert "error running poststart hook #0: exit status 1" in dom0.log()
        assert json.loads((dom0.folder / "stopped").read_text())["status"] == "stopped"
        assert os.listdir(dom0.root) == []
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        dom0.control = os.open("/dev/null", os.O_RDONLY)


# ---- what xl and QEMU get of an image


def bzimage(payload):
    header = bytearray(1024)
    header[0x1F1], header[0x202:0x206] = 1, b"HdrS"
    struct.pack_into("<II", header, 0x248, 16, len(payload))
    return bytes(header) + b"\0" * 16 + payload


BOMB = zlib.compress(bytes(1 << 20))[2:-4] + struct.pack("<II", 0, 900 << 20)
KERNELS = {
    "gzip": (b"\x1f\x8b\x08" + bytes(7) + BOMB, 900),
    "gzip of a bzImage": (bzimage(b"\x1f\x8b\x08" + bytes(7) + BOMB), 900),
    "xz of a bzImage": (bzimage(b"\xfd7zXZ\0" + struct.pack("<I", 1000 << 20)), 1000),
    "zstd of a bzImage, and a tail": (bzimage(b"\x28\xb5\x2f\xfd" + struct.pack("<I", 200 << 20)) + b"tail", 200),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_unpacks_to_is_bounded(tmp_path, name):
    content, size = KERNELS[name]
    (tmp_path / "kernel").write_bytes(content)
    fd = os.open(tmp_path / "kernel", os.O_PATH)
    with pytest.raises(runx.Error, match=f"^cannot boot: {size} MiB do not fit into a VM of 64 MiB"):
        runx.check_boot_file(fd, "kernel", 64, "boot")
    with pytest.raises(runx.Error, match=f"^cannot boot: unpacked it has {size} MiB, and dom0 has 128 for that"):
        runx.check_boot_file(fd, "kernel", 4096, "boot")
    runx.check_boot_file(fd, "initrd", 64, "boot")
    os.close(fd)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b", b"\x7fELF" + bytes(8192), bzimage(b""), bzimage(b"\x1f\x8b" + struct.pack("<I", 30 << 20)),
     bzimage(b"x")[:0x210], b"\x1f\x8b" + struct.pack("<I", 63 << 20)],
)  # fmt: skip
def test_a_kernel_that_fits_is_left_to_xl(tmp_path, content):
    (tmp_path / "kernel").write_bytes(content)
    fd = os.open(tmp_path / "kernel", os.O_PATH)
    runx.check_boot_file(fd, "kernel", 64, "boot")
    os.close(fd)


def qcow2(version=3, backing=0, features=0):
    return (
        struct.pack(">4sIQ", b"QFI\xfb", version, backing).ljust(72, b"\0")
        + struct.pack(">Q", features)
        + bytes(1 << 12)
    )


def vhd(*types):
    footers = [(b"conectix".ljust(60, b"\0") + struct.pack(">I", kind)).ljust(512, b"\0") for kind in types]
    return bytes(1 << 12).join(footers) if len(footers) > 1 else bytes(1 << 12) + footers[0]


@pytest.mark.parametrize(
    "kind, content, words",
    [
        ("qcow2", qcow2(backing=0x200), "a backing file"), ("qcow2", qcow2(2, backing=1), "a backing file"),
        ("qcow2", qcow2(features=4), "a data file outside"), ("qcow2", qcow2(features=7), "a data file outside"),
        ("qcow2", b"x" * 1000, "not in the format qcow2"), ("qcow2", b"", "not in the format qcow2"),
        ("vhd", vhd(4), "a parent"), ("vhd", vhd(3, 4), "a parent"), ("vhd", vhd(4, 3), "a parent"),
        ("vhd", b"x" * 1000, "not in the format vhd"), ("vhd", b"", "not in the format vhd"),
    ],
)  # fmt: skip
def test_an_image_that_names_other_files_is_refused(tmp_path, kind, content, words):
    (tmp_path / "image").write_bytes(content)
    with pytest.raises(runx.Error, match=words):
        runx.check_references(str(tmp_path / "image"), kind)


def test_an_image_that_stands_alone_is_taken(tmp_path):
    contents = [
        ("qcow2", qcow2()),
        ("qcow2", qcow2(2)),
        ("qcow2", qcow2(features=3)),
        ("vhd", vhd(2)),
        ("vhd", vhd(3, 3)),
    ]
    for kind, content in [*contents, ("raw", qcow2(backing=1)), ("raw", b"")]:
        (tmp_path / "image").write_bytes(content)
        runx.check_references(str(tmp_path / "image"), kind)


@pytest.mark.parametrize("section, key", [("kernel", "path"), ("kernel", "initrd"), ("image", "path")])
def test_a_link_of_the_image_leads_vm_to_no_file_of_dom0s(tmp_path, section, key):
    """What config.json's vm names is the engine's word; where it is in the rootfs, a link there is not."""
    root = tmp_path / "rootfs"
    (root / "boot").mkdir(parents=True)
    for name in ("secret", "rootfs/boot/kernel"):
        (tmp_path / name).write_bytes(b"")
    (root / "inside").symlink_to("boot/kernel")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(root)
    for path in (root / "inside", root / "boot/kernel", tmp_path / "secret"):
        runx.check_links(runx.Section({section: {key: str(path)}}, "vm"), str(tmp_path), str(root))
    for path in (root / "out", root / "boot/../folder/secret", root / "folder/../inside", tmp_path / "other/out"):
        with pytest.raises(runx.Error, match=f"vm.{section}.{key}: a link leads"):
            runx.check_links(runx.Section({section: {key: str(path)}}, "vm"), str(tmp_path), str(root))


def test_xl_and_what_it_starts_have_a_limit_of_memory(dom0):
    dom0.call("xl", '#!/bin/sh\ngrep -E "data|stack" /proc/$$/limits >"${0%/*}/limits"\n')
    runx.create_domain(runx.Xenstore(), "/x", UUID, 64, False)
    lines = (dom0.folder / "limits").read_text().splitlines()
    data, stack = ([int(word) for word in line.split()[3:5]] for line in lines)
    assert (data, stack) == ([(384 << 20) + (1 << 20)] * 2, [1 << 20] * 2)


def test_a_monitor_that_ends_while_it_is_told_something_is_not_running(tmp_path, monkeypatch):
    container = runx.Container(str(tmp_path), "c")
    container.reserve()
    os.mkfifo(container.path("control"))
    reader, write = os.open(container.path("control"), os.O_RDONLY | os.O_NONBLOCK), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: os.close(reader) or write(fd, data))
    with pytest.raises(runx.NotRunning):
        container.tell_monitor("kill 15")


def test_a_pid_that_is_a_threads_by_now_is_nobodys():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_native_id).result()
        runx.end_process(thread, runx.process_start_time(thread), 60)


def test_what_one_record_changes_of_a_default_is_not_another_ones():
    class Names(runx.Record):
        names: list = []

    Names().names.append("x")
    assert Names().names == [] and runx.State().devices == []


def test_a_process_that_is_reaped_before_it_is_killed_has_ended(monkeypatch):
    """Nor is whoever has its pid by then killed in its place."""
    pid, select = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}), runx.select.select
    start_time, killed = runx.process_start_time(pid), []

    def late(readers, writers, errors, timeout):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        monkeypatch.setattr(runx.select, "select", select)
        monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
        return [], [], []

    monkeypatch.setattr(runx.select, "select", late)
    runx.end_process(pid, start_time, 60)
    assert not killed


def test_a_process_of_which_nothing_can_be_read_has_not_ended(monkeypatch):
    def fail(path):
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE), path)

    monkeypatch.setattr(runx, "read_file", fail)
    with pytest.raises(OSError, match="Too many open files in system"):
        runx.end_process(os.getpid(), 1, 60)


def test_a_process_that_does_not_end_in_time_is_killed():
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
    runx.end_process(pid, runx.process_start_time(pid), 0.01)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_all_of_what_xl_says_of_a_thousand_domains_is_read(dom0):
    line = "echo 11111111-2222-4333-8444-$((100000000000 + i)) $i runx-" + "c" * 40
    dom0.call("xl", f"#!/bin/sh\ni=0\nwhile [ $i -lt 1500 ]; do {line}; i=$((i + 1)); done\n")
    found = runx.find_domain(runx.Xenstore(), "11111111-2222-4333-8444-100000001499")
    assert found and found.domid == 1499


def test_a_delete_by_force_does_not_end_with_its_parent(tmp_path):
    """As containerd's shim, which is killed after five seconds, asks the kernel to have it."""
    prctl, found = ctypes.CDLL(None).prctl, ctypes.c_int()
    try:
        assert prctl(runx.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
        assert runx.main(["--root", str(tmp_path), "delete", "--force", "c"]) == 0
        assert prctl(2, ctypes.byref(found), 0, 0, 0) == 0  # PR_GET_PDEATHSIG
    finally:
        prctl(runx.PR_SET_PDEATHSIG, 0, 0, 0, 0)
    assert found.value == 0
