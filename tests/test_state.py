"""A container's state on disk beside Xen's: what is believed when they differ.  Xen is a script and a dictionary."""

import json
import os
import resource

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
        self.nodes = nodes

    def read(self, path, default=None, transaction=0):
        return self.nodes.get(path, default)

    def list(self, path, transaction=0):
        return sorted({node[len(path) + 1 :].split("/")[0] for node in self.nodes if node.startswith(f"{path}/")})

    def write(self, path, value, transaction=0):
        self.nodes[path] = value

    def remove(self, path, transaction=0):
        for node in [node for node in self.nodes if node == path or node.startswith(f"{path}/")]:
            del self.nodes[node]

    def transaction(self, work):
        work(0)


class Dom0:
    """A root with one container, whose monitor is this process, and what stands in for Xen."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.root = folder, folder / "root"
        self.nodes = {f"/local/domain/{DOMID}/vm": f"/vm/{UUID}", f"/local/domain/{DOMID}/data/ready": "1"}
        self.call("xl", XL)
        (folder / "domain").write_text("p\n")
        monkeypatch.setattr(runx, "find_xl", lambda: str(folder / "xl"))
        monkeypatch.setattr(runx, "Xenstore", lambda: Xenstore(self.nodes))
        self.container = runx.Container(str(self.root), "c")
        self.container.reserve()
        os.mkfifo(self.container.path("control"))
        self.control = os.open(self.container.path("control"), os.O_RDWR | os.O_NONBLOCK)
        self.container.save(
            ociVersion="1.0.2", status="created", bundle="/", rootfs="/", created="", annotations={}, hooks={},
            uuid=UUID, name="runx-c-11111111", boot=runx.boot_id(), pid=os.getpid(),
            pid_start_time=runx.process_start_time(os.getpid()), startable=True, own_init=False, namespace=None,
            networks=[], vifs=[], rate="", hostname="c", disk=None, vbds=[], domid=DOMID, maxmem=64, maxvcpus=1,
            resources={}, base={},
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
