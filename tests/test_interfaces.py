# SPDX-License-Identifier: Apache-2.0
"""Whole lives with network interfaces: a namespace of the engine's, CNI plugins; a veth stands for netback's vif."""

import ipaddress
import itertools
import json
import pathlib
import shutil

import pytest
from conftest import namespaces
from fake.dom0 import config
from test_failures import is_sentence, try_each

MAC = "02:00:00:00:00:07"


@pytest.fixture(autouse=True)
def ip(dom0):
    """Runs ip(8) in the dom0; afterwards its links are as before."""
    if not shutil.which("ip"):
        pytest.skip("needs ip(8)")

    def run(*words):
        result = dom0.run(program=["ip", *words])
        assert result.returncode == 0, (words, result)
        return result.stdout

    yield run
    for path in (pathlib.Path(dom0.inside) / "run/netns").glob("*"):
        run("netns", "delete", path.name)
    for link in json.loads(run("-j", "link")):
        if link["ifname"] not in dom0.empty["links"]:
            dom0.run(program=["ip", "link", "delete", link["ifname"]])  # with its peer, which may come later
    shutil.rmtree(pathlib.Path(dom0.inside) / "run/netns", ignore_errors=True)
    for place in ("run/fake/etc", "opt"):
        for path in (pathlib.Path(dom0.inside) / place).rglob("*"):
            if path.is_file():
                path.unlink()


def links(ip, namespace=None):
    words = ["-n", namespace] if namespace else []
    return {link["ifname"]: link for link in json.loads(ip(*words, "-j", "-d", "address"))}


def finish(container, status=0):
    assert container.wait() == status, container.log_text()
    assert container.runx("delete").returncode == 0, container.log_text()


def told(container):
    """What the guest is told of each of its interfaces: {MAC: words}."""
    nodes, home, found = container.dom0.nodes(), f"/local/domain/{container.domid()}/data/network/", {}
    for path in sorted(node for node in nodes if node.startswith(home)):
        mac, *words = nodes[path].split(" ")
        found.setdefault(mac, []).extend(words)
    return found


# ---- a namespace of the engine's


@pytest.fixture
def engines(dom0, ip):
    """A namespace with an interface eth0, as an engine makes one, and a container that is to have it."""
    ip("netns", "add", "engine")
    ip("link", "add", "ours", "type", "veth", "peer", "name", "eth0", "netns", "engine")
    for words in (
        ["link", "set", "eth0", "address", MAC, "mtu", "1400", "up"],
        ["address", "add", "10.9.0.2/24", "dev", "eth0"],
        ["address", "add", "fd00::2/64", "dev", "eth0", "nodad"],
        ["route", "add", "default", "via", "10.9.0.1"],
        ["neighbour", "add", "10.9.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0", "nud", "permanent"],
    ):
        ip("-n", "engine", *words)
    empty, dom0.empty = dom0.empty, dom0.sight()
    yield lambda *steps: dom0.container(*steps, linux={"namespaces": namespaces(network="/run/netns/engine")})
    dom0.empty = empty


def test_the_vm_takes_over_the_interface_of_the_engines_namespace(dom0, ip, engines):
    container = engines("wait").started()
    domid = container.domid()
    vif = links(ip, "engine")[f"vif{domid}.0"]
    assert ("UP" in vif["flags"], vif["mtu"]) == (True, 1400)
    assert f"vif{domid}.0" not in links(ip)
    nodes = dom0.nodes()
    back, front = f"/local/domain/0/backend/vif/{domid}/0", f"/local/domain/{domid}/device/vif/0"
    assert (nodes[f"{back}/mac"], nodes[f"{front}/mac"], nodes[f"{front}/handle"]) == (MAC, MAC, "0")
    assert (nodes[f"{back}/hotplug-status"], nodes[f"{back}/online"]) == ("connected", "1")
    assert nodes[f"/libxl/{domid}/device/vif/0/backend"] == back
    assert nodes[f"/local/domain/{domid}/data/process/0/start"] == "net"
    words = told(container)[MAC.replace(":", "")]
    text = " ".join(words)
    assert (
        ipaddress.ip_address("10.9.0.2").packed.hex() in text and ipaddress.ip_address("fd00::2").packed.hex() in text
    )
    assert ipaddress.ip_address("10.9.0.1").packed.hex() in text and "020000000009" in text
    assert b"eth0\0".hex() in text and "sys/net/ipv6/conf/eth0/accept_dad=0" in words
    assert [vif["device"] for vif in container.stored()["plugged"]] == ["eth0"]
    dom0.run(*container.words("kill", container.id, "TERM"))
    finish(container, 143)
    assert set(links(ip, "engine")) == {"lo", "eth0"}


def test_containers_of_a_pod_have_its_interface_one_after_the_other(dom0, ip, engines):
    kinds = [each for each in namespaces(network="/run/netns/engine") if each["type"] != "cgroup"]
    marks = {"io.kubernetes.cri.container-type": "sandbox"}
    sandbox = dom0.container(linux={"namespaces": kinds}, annotations=marks).started()
    assert set(links(ip, "engine")) == {"lo", "eth0"}
    paths = {kind: f"/proc/{sandbox.pid()}/ns/{kind}" for kind in ("ipc", "uts")}
    entries = namespaces(network=f"/proc/{sandbox.pid()}/ns/net", **paths)
    marks = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox.id}
    for signal, status in (("TERM", 143), ("KILL", 137)):
        container = dom0.container("wait", linux={"namespaces": entries}, annotations=marks)
        container.root = sandbox.root
        container.started()
        assert f"vif{container.domid()}.0" in links(ip, "engine")
        assert list(told(container)) == [MAC.replace(":", "")]
        dom0.run(*container.words("kill", container.id, signal))
        finish(container, status)
        assert set(links(ip, "engine")) == {"lo", "eth0"}
    dom0.run(*sandbox.words("kill", sandbox.id, "KILL"))
    finish(sandbox, 137)
    assert set(links(ip, "engine")) == {"lo", "eth0"}


def test_the_vif_of_a_pods_last_container_is_no_interface_of_the_next_one(dom0, ip, engines):
    """dom0's kernel takes it away by and by."""
    ip("-n", "engine", "link", "add", "vif999.0", "type", "veth", "peer", "name", "guest999.0")
    ip("-n", "engine", "link", "set", "vif999.0", "up")
    container = engines("wait").started()
    assert list(told(container)) == [MAC.replace(":", "")]
    ip("-n", "engine", "link", "delete", "vif999.0")
    dom0.run(*container.words("kill", container.id, "TERM"))
    finish(container, 143)


def test_a_namespace_belongs_to_one_vm(dom0, engines):
    first, second = engines("wait").created(), engines("wait")
    assert "cannot join the network namespace of another container" in second.create().stderr
    assert first.runx("delete", "--force").returncode == 0
    second.created()
    assert second.runx("delete").returncode == 0


@pytest.mark.parametrize("killed", [False, True])
def test_the_redirection_ends_with_the_vm_but_not_that_of_one_which_came_later(dom0, ip, engines, killed):
    """Beside the vif of another VM, of before or, where the holder was killed, perhaps of after it."""
    container = engines("wait").started()
    ip("-n", "engine", "link", "add", "vif999.0", "type", "veth", "peer", "name", "guest999.0")
    dom0.signal(container.pid(), 9 if killed else 15)
    finish(container, -9 if killed else 143)
    assert redirected(ip) == (["eth0"] if killed else [])
    ip("-n", "engine", "link", "delete", "vif999.0")


def test_a_sandboxs_pid_that_is_another_process_by_now_leads_to_no_link_of_dom0s(dom0, ip, engines):
    container = engines("wait").started()
    dom0.run(program=["kill", "-9", str(container.stored()["monitor"][0]), str(container.pid())])
    assert container.wait() in (-9, 137)
    ip("link", "set", "ours", "alias", "theirs")

    def change(state):
        state["namespace"] = "/proc/1/ns/net"
        state["plugged"][0]["index"] = links(ip)["ours"]["ifindex"]

    container.store(change)
    assert container.runx("delete").returncode == 0
    assert links(ip)["ours"]["ifalias"] == "theirs"


def test_a_namespace_that_becomes_dom0s_while_the_vm_is_built_gives_it_no_link_of_dom0s(dom0, ip, engines):
    """As /proc/PID/ns/net of a sandbox that was killed meanwhile."""
    path = "/run/netns/sandboxs"
    assert dom0.run(program=["ln", "-s", "/run/netns/engine", path]).returncode == 0
    container = dom0.container("wait", linux={"namespaces": namespaces(network=path)})
    dom0.fail("xl", 1, "slow", match="create")
    create = container.start_runx("create", "--bundle", str(container.bundle))
    dom0.ask("await_calls", "xl", "create")
    assert dom0.run(program=["ln", "-sfn", "/proc/1/ns/net", path]).returncode == 0
    dom0.ask("release")
    result = create.wait()
    dom0.run(program=["rm", path])
    assert f"cannot join the network namespace {path}: it is the host's own" in result.stderr
    assert not any(name.startswith("vif") for name in links(ip))


def test_what_is_plugged_while_the_vm_is_taken_down_leaves_nothing(dom0, ip, engines):
    container = engines("wait").created()
    dom0.fail("xl", 1, "slow", match="destroy")
    dom0.ask("end", container.domid(), "c")
    dom0.ask("await_calls", "xl", "destroy")
    add(ip, "eth1", "02:00:00:00:00:11")
    started = container.start_runx("start")
    dom0.ask("await_node", f"/local/domain/{container.domid()}/data/process/0/start")
    assert "eth1" in redirected(ip)
    dom0.ask("release")
    assert "the VM crashed" in started.wait().stderr
    finish(container, 255)
    assert redirected(ip) == []


def test_an_empty_namespace_asks_xenstore_nothing(dom0):
    container = dom0.container("wait", linux={"namespaces": namespaces()}).created()
    dom0.forget()
    assert container.runx("start").stderr == ""
    assert not [call for call in dom0.calls("xenstore") if "/vif" in call]
    assert dom0.nodes()[f"/local/domain/{container.domid()}/data/process/0/start"] == "-"
    assert container.runx("delete", "--force").returncode == 0


def test_what_a_hook_puts_into_the_containers_own_namespace(dom0, ip):
    script = (
        "set -e; state=$(cat); pid=${state#*'\"pid\":'}; pid=${pid%%,*}; "
        "ip link add ours type veth peer name eth0 netns $pid; nsenter -t $pid -n ip link set eth0 up"
    )
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
    hooks = {"createRuntime": [hook]}
    container = dom0.container("wait", linux={"namespaces": namespaces()}, hooks=hooks).started()
    (words,) = told(container).values()
    assert b"eth0\0".hex() in words[0]
    dom0.run(*container.words("kill", container.id, "TERM"))
    finish(container, 143)


def vifs(container):
    """The numbers of those that the VM has."""
    home = f"/local/domain/{container.domid()}/device/vif/"
    return sorted({int(node[len(home) :].split("/")[0]) for node in container.dom0.nodes() if node.startswith(home)})


def add(ip, name, mac):
    """One more interface of the engine's."""
    ip("link", "add", f"our-{name}", "type", "veth", "peer", "name", name, "address", mac, "netns", "engine")
    ip("-n", "engine", "link", "set", name, "up")


def test_what_is_there_when_create_ends_is_plugged_then(dom0, ip, engines):
    container = engines("wait").created()
    vif = f"vif{container.domid()}.0"
    assert vifs(container) == [0] and "UP" in links(ip, "engine")[vif]["flags"]
    assert told(container) == {}  # until `start` it may change
    dom0.forget()
    assert container.runx("start").stderr == ""
    assert vifs(container) == [0] and list(told(container)) == [MAC.replace(":", "")]
    assert not [call for call in dom0.calls("xenstore") if "write" in call and "/vif/" in call]
    assert container.runx("delete", "--force").returncode == 0
    assert set(links(ip, "engine")) == {"lo", "eth0"}


def test_a_created_container_that_is_deleted_leaves_no_interface(dom0, ip, engines):
    container = engines().created()
    assert vifs(container) == [0]
    assert container.runx("delete").returncode == 0
    assert set(links(ip, "engine")) == {"lo", "eth0"}


def test_start_plugs_what_is_new_and_unplugs_what_has_gone(dom0, ip, engines):
    container = engines("wait").created()
    ip("-n", "engine", "link", "delete", "eth0")
    add(ip, "eth1", "02:00:00:00:00:11")
    add(ip, "eth0", "02:00:00:00:00:10")
    assert container.runx("start").stderr == ""
    assert vifs(container) == [1, 2]
    assert [vif["device"] for vif in container.stored()["plugged"]] == ["eth0", "eth1"]
    domid = container.domid()
    assert set(links(ip, "engine")) == {"lo", "eth0", "eth1", f"vif{domid}.1", f"vif{domid}.2"}
    assert sorted(told(container)) == ["020000000010", "020000000011"]
    assert container.runx("delete", "--force").returncode == 0
    assert set(links(ip, "engine")) == {"lo", "eth0", "eth1"}


def test_what_the_engine_changes_before_start_is_what_the_guest_is_told(dom0, ip, engines):
    container = engines("wait").created()
    for words in (["address", "add", "10.9.0.77/24", "dev", "eth0"], ["link", "set", "eth0", "mtu", "1300"]):
        ip("-n", "engine", *words)
    assert container.runx("start").stderr == ""
    assert vifs(container) == [0] and links(ip, "engine")[f"vif{container.domid()}.0"]["mtu"] == 1300
    assert ipaddress.ip_address("10.9.0.77").packed.hex() in " ".join(*told(container).values())
    assert container.runx("delete", "--force").returncode == 0


def test_what_boots_only_when_it_is_started_is_told_of_its_interfaces_before(dom0, engines):
    """As the VM of a runX before 0.2, whose init looks for them when it boots."""
    container = engines("wait").created()
    assert container.runx("pause").stderr == ""
    container.store(lambda state: state.update(starts_paused=True, paused=False))
    assert container.runx("start").stderr == ""
    assert list(told(container)) == [MAC.replace(":", "")]
    assert container.runx("delete", "--force").returncode == 0


def test_a_vm_that_ends_while_its_interfaces_are_plugged_is_a_stopped_container(dom0, ip, engines):
    container = engines()
    dom0.ask("deaf", True)
    create = container.start_runx("create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file))
    dom0.ask("await_calls", "xenstore", "/device/vif/0")
    dom0.ask("end", container.domid(), "c")
    dom0.ask("deaf", False)
    assert create.wait().returncode == 0
    assert (container.wait(), [node for node in dom0.nodes() if "/vif/" in node]) == (255, [])
    reason = "cannot start a container that has stopped: the VM crashed"
    assert container.runx("start").stderr == f"runX: {reason}\n"
    assert container.runx("delete").returncode == 0
    assert set(links(ip, "engine")) == {"lo", "eth0"}


def test_a_vm_that_is_destroyed_while_its_interfaces_are_plugged_leaves_nothing(dom0, ip, engines):
    ip("-n", "engine", "address", "flush", "dev", "eth0")

    def life(arm):
        ip("-n", "engine", "link", "set", "eth0", "down")
        container = engines("wait").created()
        ip("-n", "engine", "link", "set", "eth0", "up")
        arm()
        result = container.runx("start")
        dom0.forget()
        assert is_sentence(result, container) and (result.returncode == 0) == dom0.spared
        assert container.runx("delete", "--force").returncode == 0, container.log_text()

    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, "destroy", match="/vif"), life, 3)


@pytest.mark.parametrize("how, step", [("EIO", 2), ("kill", 5)])
def test_a_create_that_fails_or_is_killed_while_it_plugs_leaves_nothing(dom0, engines, how, step):
    def life(arm):
        container = engines("wait")
        arm()
        result = container.create()
        dom0.forget()
        assert result.returncode == -9 or is_sentence(result, container)
        assert container.runx("delete", "--force").returncode == 0, container.log_text()

    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, how, match="/vif/"), life, step)


def test_a_start_with_an_interface_that_xenstore_fails_can_be_done_again(dom0, ip, engines):
    ip("-n", "engine", "link", "set", "eth0", "down")
    ip("-n", "engine", "address", "flush", "dev", "eth0")
    container = engines("wait").created()
    ip("-n", "engine", "link", "set", "eth0", "up")
    dom0.armed = dom0.spared = False
    for nth in itertools.count(1):
        dom0.forget()
        dom0.fail("xenstore", nth, "EIO", match="/vif/")  # the monitor asks for none of these
        result = container.runx("start")
        dom0.forget()
        assert is_sentence(result, container)
        if dom0.spared:
            break
        assert (nth, [node for node in dom0.nodes() if "/vif/" in node]) == (nth, [])
        assert container.status() == "created"
    assert (nth > 20, result.returncode) == (True, 0)
    assert container.runx("delete", "--force").returncode == 0


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_start_that_fails_or_is_killed_keeps_the_interface_for_a_vm_that_may_go_on(dom0, ip, engines, done):
    container = engines("wait").created()
    add(ip, "eth1", "02:00:00:00:00:11")
    for number in (1, 2):  # when these are connected, no transaction is the monitor's
        dom0.ask("await_node", f"/local/domain/0/backend/console/{container.domid()}/{number}/state", "4")
    dom0.fail("xenstore", 2, "kill" if done else "EIO", done, "transaction_end")  # the first makes the interface
    assert container.runx("start").returncode == (-9 if done else 1)
    dom0.forget()
    assert container.status() == ("running" if done else "created")
    assert done or container.runx("start").stderr == ""
    assert vifs(container) == [0, 1]
    assert container.runx("delete", "--force").returncode == 0


def redirected(ip):
    """The interfaces in the engine's namespace that are, see fake/host.py."""
    return sorted(name for name, link in links(ip, "engine").items() if link.get("ifalias"))


@pytest.mark.parametrize("code, again, step", [("EIO", True, 2), ("kill", True, 3), ("kill", False, 1)])
def test_a_start_that_ends_while_it_joins_interfaces_leaves_none_half_joined(dom0, ip, engines, code, again, step):
    """One is new, and one is to be joined anew: its MTU has changed, which the engine takes back later."""

    def life(arm):
        for words in (["set", "eth0", "mtu", "1400"], ["delete", "eth1"]):
            dom0.run(program=["ip", "-n", "engine", "link", *words])
        container = engines("wait").created()
        assert redirected(ip) == ["eth0", f"vif{container.domid()}.0"]
        ip("-n", "engine", "link", "set", "eth0", "mtu", "1300")
        add(ip, "eth1", "02:00:00:00:00:11")
        arm()
        result = container.runx("start")
        dom0.forget()
        assert result.returncode == -9 or is_sentence(result, container)
        if again:
            if result.returncode:
                ip("-n", "engine", "link", "set", "eth0", "mtu", "1400")
                assert container.runx("start").stderr == ""
            of_vm = [f"vif{container.domid()}.{number}" for number in vifs(container)]
            assert (len(of_vm), redirected(ip)) == (2, sorted(["eth0", "eth1", *of_vm]))
        assert container.runx("delete", "--force").returncode == 0, container.log_text()
        assert redirected(ip) == []
        ip("-n", "engine", "link", "delete", "eth1")

    try_each(dom0, lambda nth: dom0.fail_system_call(8 + nth, code), life, step)  # eight are to look what there is


def test_a_classifier_of_somebody_elses_stays_when_the_interface_cannot_be_joined(dom0, ip, engines):
    container = engines("wait").created()
    add(ip, "eth1", "02:00:00:00:00:11")
    ip("-n", "engine", "link", "set", "eth1", "alias", "theirs")
    assert "eth1 is another VM's, or something else classifies its traffic" in container.runx("start").stderr
    assert container.runx("delete", "--force").returncode == 0
    assert redirected(ip) == ["eth1"]


def test_no_two_vifs_of_a_vm_have_one_number(dom0, ip, engines):
    container = engines("wait").created()
    add(ip, "eth1", "02:00:00:00:00:11")
    dom0.constants["VIF_TIME_LIMIT"] = 0.05
    dom0.ask("deaf", True)
    for _ in range(2):  # the VM has seen those of a `start` that has failed, and may have them still
        assert "has not made vif" in container.runx("start").stderr
    dom0.ask("deaf", False)
    dom0.constants.clear()
    assert container.runx("start").stderr == ""
    assert vifs(container) == [0, 3]
    assert container.runx("delete", "--force").returncode == 0


def test_a_netback_that_makes_no_vif_is_told(dom0, ip, engines):
    dom0.constants["VIF_TIME_LIMIT"] = 0.05
    reason = "in 0.05 s: is its module xen-netback loaded?"
    dom0.ask("deaf", True)
    container = engines("wait")
    assert reason in container.create().stderr
    assert (container.runx("state").returncode, set(links(ip, "engine"))) == (1, {"lo", "eth0"})
    dom0.ask("deaf", False)
    container = engines("wait").created()
    add(ip, "eth1", "02:00:00:00:00:11")
    dom0.ask("deaf", True)
    result = container.runx("start")
    dom0.ask("deaf", False)
    assert "has not made vif" in result.stderr and reason in result.stderr
    assert (container.status(), vifs(container)) == ("created", [0])
    assert container.runx("delete").returncode == 0


def test_an_interface_that_is_gone_at_start(dom0, ip, engines):
    container = engines("exit:0").created()
    ip("-n", "engine", "link", "delete", "eth0")
    assert container.runx("start").stderr == ""
    assert told(container) == {}
    finish(container)


# ---- networks of NETCONF


def install(dom0, path, text, mode=0o755):
    path = pathlib.Path(dom0.inside) / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


PLUGIN = """#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS ${0##*/}" >>/run/fake/etc/calls
cat >/run/fake/etc/stdin.$CNI_COMMAND
[ ! -e /run/fake/etc/broken.$CNI_COMMAND ] || { echo '{"code": 7, "msg": "no", "details": "luck"}'; exit 1; }
[ ! -e /run/fake/etc/kill.$CNI_COMMAND ] || kill -9 $PPID
[ $CNI_COMMAND = VERSION ] && exec cat /run/fake/etc/versions
[ $CNI_COMMAND = ADD ] || exit 0
[ "${0##*/}" = host-local ] ||
    nsenter --net=$CNI_NETNS sh -c "ip link add $CNI_IFNAME type veth peer name other && ip link set $CNI_IFNAME up"
echo '{"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.7.0.5/24", "gateway": "10.7.0.1"}],
    "routes": [{"dst": "0.0.0.0/0"}], "dns": {"nameservers": ["10.7.0.1"], "search": ["here"]}}'
"""
BRIDGE = {
    "cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "br7",
    "isGateway": True, "isDefaultGateway": True,
    "ipam": {"type": "host-local", "subnet": "10.7.0.0/24", "gateway": "10.7.0.1"},
}  # fmt: skip


@pytest.fixture
def networks(dom0):
    """Makes a container with these networks of NETCONF, whose addresses are chosen for it."""

    def make(*documents, steps=("wait",), address=",auto"):
        install(dom0, "run/fake/etc/config.json", json.dumps({"netconf": ["/run/fake/etc"]}), 0o644)
        install(dom0, "opt/cni/bin/host-local", PLUGIN)
        install(dom0, "opt/cni/bin/ptp", PLUGIN)
        container, spec = dom0.container(), config(*steps)
        for number, document in enumerate(documents):
            install(dom0, f"run/fake/etc/{number}.conf", json.dumps(document), 0o644)
            spec["process"]["env"].append(f"NETCONF{number}=/run/fake/etc/{number}.conf,{document['name']}{address}")
        container.write(spec)
        return container

    return make


def calls(dom0):
    path = pathlib.Path(dom0.inside) / "run/fake/etc/calls"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_a_port_of_a_bridge_with_an_address_of_an_ipam_plugin(dom0, ip, networks):
    container = networks(BRIDGE).created()
    assert [call[0] for call in calls(dom0)] == ["ADD"]
    assert vifs(container) == [0]
    assert container.runx("start").stderr == ""
    domid = container.domid()
    vif, bridge = links(ip)[f"vif{domid}.0"], links(ip)["br7"]
    assert (vif["master"], "UP" in vif["flags"], "UP" in bridge["flags"]) == ("br7", True, True)
    assert "10.7.0.1" in [address.get("local") for address in bridge["addr_info"]]
    nodes = dom0.nodes()
    assert nodes[f"/local/domain/0/backend/vif/{domid}/0/bridge"] == "br7"
    ((mac, words),) = told(container).items()
    assert nodes[f"/local/domain/{domid}/device/vif/0/mac"].replace(":", "") == mac
    for address in ("10.7.0.5", "10.7.0.1"):
        assert ipaddress.ip_address(address).packed.hex() in " ".join(words)
    assert sorted(nodes[f"/local/domain/{domid}/data/dns"].splitlines()) == ["nameserver 10.7.0.1", "search here"]
    assert nodes[f"/local/domain/{domid}/data/process/0/start"] == "network"  # and a resolv.conf
    assert ["resolv_conf", []] in container.guest()["records"]
    dom0.run(*container.words("kill", container.id, "TERM"))
    finish(container, 143)
    assert [call[0] for call in calls(dom0)] == ["ADD", "DEL"]
    assert calls(dom0)[0][1:3] == calls(dom0)[1][1:3] == [dom0_name(container), "eth0"]


def dom0_name(container):
    return next(call[1] for call in calls(container.dom0) if call[1].startswith(f"runx-{container.id}-"))


def test_an_interface_that_plugins_make(dom0, networks):
    container = networks({**BRIDGE, "type": "ptp"}, BRIDGE | {"name": "second"}).started()
    domid = container.domid()
    assert sorted(call[-1] for call in calls(dom0)) == ["host-local", "ptp"]
    assert len(told(container)) == 2
    assert {f"/local/domain/0/backend/vif/{domid}/{number}" for number in (0, 1)} <= set(dom0.nodes())
    dom0.run(*container.words("kill", container.id, "KILL"))
    finish(container, 137)
    assert [call[0] for call in calls(dom0)].count("DEL") == 2


def test_a_sandbox_takes_no_address_from_the_containers_of_its_pod(dom0, networks):
    sandbox = networks({**BRIDGE, "type": "ptp"}, BRIDGE | {"name": "second"})
    spec = json.loads((sandbox.bundle / "config.json").read_text())
    sandbox.write({**spec, "annotations": {"io.kubernetes.cri.container-type": "sandbox"}})
    sandbox.started()
    assert (calls(dom0), sandbox.stored()["networks"]) == ([], [])
    dom0.run(*sandbox.words("kill", sandbox.id, "TERM"))
    finish(sandbox)


def test_a_bridge_where_the_vm_asks_by_dhcp(dom0, ip, networks):
    ip("link", "add", "br7", "type", "bridge")
    container = networks({"name": "net", "type": "bridge", "bridge": "br7", "mtu": 1300}, address="").started()
    nodes, home = dom0.nodes(), f"/local/domain/{container.domid()}/data"
    assert (nodes[f"{home}/dhcp"], nodes[f"{home}/hostname"]) == ("eth0", container.id)
    assert links(ip)[f"vif{container.domid()}.0"]["mtu"] == 1300
    dom0.run(*container.words("kill", container.id, "KILL"))
    finish(container, 137)


def test_an_address_that_is_given(dom0, networks):
    container = networks(BRIDGE, address=",10.7.0.77").created()
    assert json.loads((pathlib.Path(dom0.inside) / "run/fake/etc/stdin.ADD").read_text())["name"] == "net"
    assert container.runx("start").stderr == ""
    assert ipaddress.ip_address("10.7.0.77").packed.hex() in " ".join(*told(container).values())
    dom0.run(*container.words("kill", container.id, "KILL"))
    finish(container, 137)


@pytest.mark.parametrize("kind", ["ptp", "bridge"])
def test_a_plugin_that_fails_undoes_create_and_gives_back(dom0, networks, kind):
    container = networks({**BRIDGE, "type": kind})
    install(dom0, "run/fake/etc/broken.ADD", "")
    result = container.create()
    assert "ADD: no: luck (code 7)\n" in result.stderr
    assert [call[0] for call in calls(dom0)] == ["ADD", "DEL"]
    assert container.runx("state").returncode == 1


def stdin_of(dom0, command):
    return json.loads((pathlib.Path(dom0.inside) / f"run/fake/etc/stdin.{command}").read_text())


@pytest.mark.parametrize("version, called", [("0.4.0", "0.4.0"), ("1.1.0", "1.0.0")])
def test_a_create_that_is_killed_in_a_plugin_gives_back_in_the_same_version(dom0, networks, version, called):
    container = networks({**BRIDGE, "cniVersion": version})
    install(dom0, "run/fake/etc/versions", '{"supportedVersions": ["0.4.0", "1.0.0"]}', 0o644)
    install(dom0, "run/fake/etc/kill.ADD", "")
    assert container.create().returncode == 1
    assert container.runx("delete", "--force").returncode == 0, container.log_text()
    assert [call[0] for call in calls(dom0) if call[0] != "VERSION"] == ["ADD", "DEL"]
    assert [stdin_of(dom0, command)["cniVersion"] for command in ("ADD", "DEL")] == [called] * 2


def test_a_plugin_that_gives_nothing_back_is_a_warning(dom0, networks):
    container = networks(BRIDGE).created()
    install(dom0, "run/fake/etc/broken.DEL", "")
    assert container.runx("delete").returncode == 0
    assert "level=warning" in container.log_text() and "DEL: no: luck (code 7)" in container.log_text()


def test_a_bridge_that_is_nowhere(dom0, networks):
    container = networks({"name": "net", "type": "bridge", "bridge": "br7"}, address="")
    assert "there is no bridge br7 on this host: make it, or set isGateway" in container.create().stderr


def test_a_plugin_that_is_not_installed(dom0, networks):
    container = networks({**BRIDGE, "type": "nobody"})
    assert "CNI plugin nobody is not installed in /opt/cni/bin" in container.create().stderr


def test_a_create_with_networks_whose_mounts_and_namespaces_fail_gives_them_back(dom0, networks):
    def life(arm):
        container = networks({**BRIDGE, "type": "ptp"})
        arm()
        result = container.create()
        dom0.forget()
        assert is_sentence(result, container)
        container.runx("delete", "--force")
        commands = [call[0] for call in calls(dom0)]
        assert commands.count("ADD") <= commands.count("DEL")
        return container

    try_each(dom0, lambda nth: dom0.fail_system_call(nth, "EIO"), life)
