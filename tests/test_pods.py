# SPDX-License-Identifier: Apache-2.0
"""Pods: a sandbox, which has no VM, and containers that are in its namespaces, one after the other."""

import json

import pytest
from conftest import namespaces, wait_until

SANDBOX = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1"}
MEMBER = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "c1"}
OF_PODMAN = {"io.container.manager": "libpod"}


def make_sandbox(dom0, **changes):
    entries = [entry for entry in namespaces() if entry["type"] != "cgroup"]
    changes = {"annotations": SANDBOX, "hostname": "pod", "linux": {"namespaces": entries}, **changes}
    container = dom0.container(**changes)
    MEMBER["io.kubernetes.cri.sandbox-id"] = container.id
    return container


def member(sandbox, *steps, kinds=("ipc", "uts"), pid=None, **changes):
    """A container of its pod, with the same --root as engines give it."""
    paths = {kind: f"/proc/{pid or sandbox.pid()}/ns/{kind}" for kind in kinds}
    linux = {"namespaces": namespaces(network=f"/proc/{sandbox.pid()}/ns/net", **paths)}
    container = sandbox.dom0.container(*steps, annotations=MEMBER, linux=linux, **changes)
    container.root = sandbox.root
    return container


def hostname(container):
    return dict(container.guest()["records"])["hostname"][0]


def end(container, status=137, signal="KILL"):
    assert container.dom0.run(*container.words("kill", container.id, signal)).returncode == 0
    assert container.wait() == status
    assert container.runx("delete").returncode == 0, container.log_text()


def test_a_sandbox_is_namespaces_and_no_vm(dom0):
    sandbox = make_sandbox(dom0).created()
    assert (sandbox.status(), dom0.domains()) == ("created", {})
    assert sandbox.runx("start").returncode == 0
    assert (sandbox.status(), sandbox.state()["pid"]) == ("running", sandbox.pid())
    again = sandbox.runx("start")
    assert (again.returncode, "cannot start an already running container" in again.stderr) == (1, True)
    for words in (["exec", sandbox.id, "true"], ["update", "--memory", "1g", sandbox.id], ["events", sandbox.id]):
        refused = dom0.run(*sandbox.words(*words))
        assert refused.returncode != 0
        assert refused.stderr.endswith(f"container {sandbox.id} is the sandbox of a pod, and has no VM\n")
    assert sandbox.runx("ps", "--format", "json").stdout == f"[{sandbox.pid()}]\n"
    for command, status in (("pause", "paused"), ("resume", "running")):
        assert (sandbox.runx(command).returncode, sandbox.status()) == (0, status)
    for what in ("xl", "xenstore"):
        dom0.fail(what, 1, "EIO")
    end(sandbox)
    assert (dom0.calls("xl"), dom0.calls("xenstore")) == ([], [])
    dom0.forget()


@pytest.mark.parametrize(
    "annotations, args",
    [
        (SANDBOX, []),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox"}, []),
        (OF_PODMAN, ["/catatonit", "-P"]),
        (OF_PODMAN, ["/pause"]),  # with --infra-image or infra_image in containers.conf
    ],
)
def test_each_engine_marks_a_sandbox_in_its_own_way(dom0, annotations, args):
    sandbox = make_sandbox(dom0, annotations=annotations)
    spec = json.loads((sandbox.bundle / "config.json").read_text())
    spec["process"]["args"] = args or spec["process"]["args"]
    sandbox.write(spec)
    sandbox.started()
    assert dom0.domains() == {}
    end(sandbox, 0, "TERM")


@pytest.mark.parametrize("who, status", [("holder", -9), ("monitor", 137)])
def test_a_sandbox_ends_with_its_processes(dom0, who, status):
    sandbox = make_sandbox(dom0).started()
    dom0.signal(sandbox.pid() if who == "holder" else sandbox.stored()["monitor"][0], 9)
    assert (sandbox.wait(), sandbox.status()) == (status, "stopped")
    assert sandbox.runx("delete").returncode == 0


def test_signals_that_end_nothing_leave_a_sandbox(dom0):
    sandbox = make_sandbox(dom0).started()
    for number in (17, 28, 18, 10):
        dom0.signal(sandbox.pid(), number)
    for name in ("WINCH", "HUP", "QUIT"):  # as `podman pod kill --signal HUP` sends it to all of a pod
        assert dom0.run(*sandbox.words("kill", sandbox.id, name)).returncode == 0
    dom0.signal(sandbox.pid(), 15)
    assert sandbox.wait() == 0
    assert sandbox.runx("delete").returncode == 0


def test_a_terminal_that_nobody_would_send_is_refused(dom0):
    sandbox = make_sandbox(dom0, terminal=True)
    for words in (["create", "--console-socket", "/nowhere"], ["run"]):
        refused = sandbox.runx(*words, "--bundle", str(sandbox.bundle))
        assert "process.terminal: nothing runs at it in the sandbox of a pod" in refused.stderr


def test_a_hook_that_no_vm_runs_is_a_warning(dom0):
    sandbox = make_sandbox(dom0, hooks={"startContainer": [{"path": "/bin/true"}]}).started()
    assert "level=warning" in sandbox.log_text() and "hooks.startContainer has no effect" in sandbox.log_text()
    end(sandbox)


def test_a_create_that_fails_leaves_nothing_of_a_sandbox(dom0):
    hooks = {"createRuntime": [{"path": "/bin/false"}]}
    refused = make_sandbox(dom0, hooks=hooks).create()
    assert refused.returncode == 1 and "createRuntime" in refused.stderr


def test_containers_of_a_pod_have_its_namespaces_one_after_the_other(dom0):
    sandbox = make_sandbox(dom0).started()
    for status in (3, 4):  # as an init container and then another one, or a restart
        container = member(sandbox, f"exit:{status}").created()
        assert hostname(container) == "pod"
        assert container.runx("start").returncode == 0
        assert container.wait() == status
        assert container.runx("delete").returncode == 0, container.log_text()
    first, second = member(sandbox, "wait").started(), member(sandbox, "wait")
    assert "cannot join the network namespace of another container" in second.create().stderr
    assert first.status() == "running"
    end(first, 143, "TERM")
    end(sandbox)


def sysctls(container):
    return {value[0]: value[1] for name, value in container.guest()["records"] if name == "sysctl"}


def test_a_container_has_the_sysctls_of_those_of_the_pods_namespaces_that_it_has(dom0):
    of_pod = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ip_forward": "1", "kernel.shmmni": "7"}
    entries = [entry for entry in namespaces() if entry["type"] != "cgroup"]
    sandbox = make_sandbox(dom0, linux={"namespaces": entries, "sysctl": of_pod}).started()
    port, forward, shm = (f"sys/{name.replace('.', '/')}" for name in of_pod)
    for kinds, expected in (("ipc", "uts"), {port: "0", forward: "1", shm: "7"}), ((), {port: "0", forward: "1"}):
        container = member(sandbox, "wait", kinds=kinds).started()
        assert sysctls(container) == expected
        end(container, 143, "TERM")
    container = member(sandbox, "wait")
    spec = json.loads((container.bundle / "config.json").read_text())
    spec["linux"]["sysctl"] = {"net.ipv4.ip_forward": "0"}
    container.write(spec)
    assert sysctls(container.started()) == {port: "0", forward: "0", shm: "7"}
    end(container, 143, "TERM")
    end(sandbox)


def test_a_container_has_the_pods_sysctls_and_may_have_a_name_of_its_own(dom0):
    entries = [entry for entry in namespaces() if entry["type"] != "cgroup"]
    sysctl = {"net.ipv4.ip_unprivileged_port_start": "0", "kernel.shm_rmid_forced": "1"}
    sandbox = make_sandbox(dom0, linux={"namespaces": entries, "sysctl": sysctl}).started()
    container = member(sandbox, "wait", hostname="own").started()
    assert hostname(container) == "own"
    told = [operands for keyword, operands in container.guest()["records"] if keyword == "sysctl"]
    assert told == [["sys/net/ipv4/ip_unprivileged_port_start", "0"], ["sys/kernel/shm_rmid_forced", "1"]]
    end(container, 143, "TERM")
    end(sandbox)


def test_other_namespaces_than_a_sandboxs_are_refused(dom0):
    sandbox = make_sandbox(dom0).started()
    other = dom0.container("wait", linux={"namespaces": namespaces()}).started()
    sentence = "linux.namespaces names {} of another container or of the host, and containers cannot share a VM yet"
    for container, kinds in (
        (member(sandbox, kinds=("pid", "ipc", "uts")), "pid"),
        (member(sandbox, pid=other.pid()), "ipc, uts"),
        (member(sandbox, pid="self"), "ipc, uts"),
        (member(other), "ipc, uts"),
    ):
        refused = container.create()
        assert refused.returncode == 1 and sentence.format(kinds) in refused.stderr, refused
    dom0.signal(sandbox.pid(), 9)
    late = member(sandbox)
    assert sandbox.wait() == -9
    assert late.create().returncode == 1
    assert sandbox.runx("delete").returncode == 0
    end(other, 143, "TERM")


@pytest.fixture
def pinned(dom0):
    """The ipc and uts namespaces of a pod as CRI-O makes them: mounted, and no process is in them."""
    paths = {kind: f"/run/{kind}-of-pod" for kind in ("ipc", "uts")}
    options = [f"--{kind}={path}" for kind, path in paths.items()]
    script = "echo crios-pod >/proc/sys/kernel/hostname"
    for program in (["touch", *paths.values()], ["unshare", *options, "sh", "-c", script]):
        assert dom0.run(program=program).returncode == 0
    yield paths
    for program in (["umount", "--no-mtab", *paths.values()], ["rm", *paths.values()]):
        assert dom0.run(program=program).returncode == 0


def of_crio(dom0, kind, paths, *steps, sandbox="none", **linux):
    annotations = {"io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": sandbox}
    return dom0.container(*steps, annotations=annotations, linux={"namespaces": namespaces(**paths), **linux})


@pytest.mark.parametrize("has_sandbox", [False, True])
def test_a_pod_of_crios_has_namespaces_that_no_process_is_in(dom0, pinned, has_sandbox):
    """Its sandbox, the only one that is told of sysctls, is left out by default."""
    sandbox = of_crio(dom0, "sandbox", pinned, sysctl={"kernel.shmmni": "7"}).started() if has_sandbox else None
    assert dom0.domains() == {}
    container = of_crio(dom0, "container", pinned, "exit:3", sandbox=sandbox.id if sandbox else "none")
    container.root = sandbox.root if sandbox else container.root
    container.created()
    assert hostname(container) == "crios-pod"
    assert sysctls(container) == ({"sys/kernel/shmmni": "7"} if sandbox else {})
    assert container.runx("start").returncode == 0
    assert container.wait() == 3
    assert container.runx("delete").returncode == 0, container.log_text()
    if sandbox:
        end(sandbox)


def test_a_namespace_that_another_process_is_in_is_refused(dom0, pinned):
    other = dom0.start(program=["nsenter", f"--ipc={pinned['ipc']}", "sleep", "1000"])
    wait_until(lambda: dom0.processes()[other.pid].startswith("sleep"), "a process in the namespace")
    refused = of_crio(dom0, "container", pinned).create()
    assert "linux.namespaces names ipc of another container or of the host" in refused.stderr
    other.signal(9)
    other.wait()
