# SPDX-License-Identifier: Apache-2.0
"""NETCONF, CNI files and plugins, interfaces and what the guest is told, in network namespaces of the tests' own."""

import contextlib
import errno
import json
import os
import re
import socket
import struct
import subprocess
import threading

import pytest
from conftest import call, open_descriptors, wait_until

import runx


def netconf_file(folder, text):
    folder.chmod(0o755)
    path = folder / "net.conf"
    path.write_text(text)
    return str(path)


def load_network(folder, text, name="net", address=""):
    return runx.Network(("NETCONF", netconf_file(folder, text), name, address), [str(folder)])


OTHER = '{"name": "other", "type": "x"}'
BRIDGE = '{"name": "net", "type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.0.0/16"}}'


def test_netconf_variables_are_taken_in_order():
    env = ["NETCONF2=/c,n", "NETCONF=/a,n,10.0.0.1", "NETCONFIG=x", "NETCONF1=/b,n,auto", "NETCONF10=", "PATH=/bin"]
    env += ["NETCONF\u0663=/d,n", "NETCONF\uff11=/e,n", "NETCONF\u00b2=/f,n"]  # digits of others
    assert runx.parse_netconf(env) == [
        ("NETCONF", "/a", "n", "10.0.0.1"), ("NETCONF1", "/b", "n", "auto"), ("NETCONF2", "/c", "n", ""),
    ]  # fmt: skip
    same = ["NETCONF1=/b,n", "NETCONF01=/c,n", "NETCONF0=/d,n", "NETCONF=/a,n"]  # numbers: each is a network
    assert [path for _, path, _, _ in runx.parse_netconf(same)] == ["/a", "/d", "/c", "/b"]
    for value in ("/a", "a,n", "/a,"):
        with pytest.raises(runx.Error, match="NETCONF must be"):
            runx.parse_netconf([f"NETCONF={value}"])


def test_an_image_cannot_ask_for_all_addresses_of_a_network():
    env = [f"NETCONF{number}=/a,n" for number in range(33)]
    assert len(runx.parse_netconf(env[:32])) == 32
    with pytest.raises(runx.Error, match="NETCONF asks for 33 networks: a VM can have 32"):
        runx.parse_netconf(env)
    addresses = ";".join(f"10.0.0.{number}" for number in range(33))
    assert runx.parse_netconf([f"NETCONF=/a,n,{addresses.rpartition(';')[0]}"])[0][3].count(";") == 31
    with pytest.raises(runx.Error, match="^NETCONF gives 33 addresses: a network can have 32$"):
        runx.parse_netconf([f"NETCONF=/a,n,{addresses}"])


@pytest.mark.parametrize(
    "text, address, mode",
    [
        (BRIDGE, "", "dhcp"),
        (BRIDGE.replace("bridge", "ptp"), "", "auto"),
        ('{"name": "net", "type": "macvlan", "ipam": {"type": "dhcp"}}', "", "dhcp"),
        (OTHER + '{"name": "net", "plugins": [' + BRIDGE + "]}", "auto", "auto"),
        (f"[{OTHER}, {BRIDGE}]", "10.1.2.3", "static"),
    ],
)
def test_where_an_address_comes_from(tmp_path, text, address, mode):
    network = load_network(tmp_path, text, address=address)
    assert (network.name, network.dhcp) == ("net", mode == "dhcp")
    assert [str(each) for each in network.addresses] == (["10.1.2.3/16"] if address == "10.1.2.3" else [])


@pytest.mark.parametrize(
    "text, address, words",
    [
        ("", "", "0 networks net, not one; it has none"),
        ("{", "", "cannot read the networks"),
        ("[1]", "", "network net must be a JSON object"),
        (OTHER + BRIDGE + BRIDGE, "", "2 networks net, not one; it has other, net, net"),
        ('{"name": "other", "type": "bridge"}', "", "0 networks net, not one; it has other"),
        ('{"name": "net", "type": "../x"}', "", "not the name of a plugin"),
        ('{"name": "net", "type": ""}', "", "not the name of a plugin"),
        ('{"name": "net", "type": ".."}', "", "not the name of a plugin"),
        ('{"name": "net", "type": "a\\nb"}', "", "not the name of a plugin"),
        (r'{"name": "net", "type": "a\u0000b"}', "", "net.conf: type holds a NUL or half a character"),
        (r'{"name": "net", "type": "a\ud800b"}', "", "net.conf: type holds a NUL or half a character"),
        ('{"name": "net", "type": 1}', "", "type must be a JSON string"),
        ('{"name": "net", "type": "x", "ipam": {"type": "../x"}}', "", "not the name of a plugin"),
        ('{"name": "net", "type": "x", "args": {"cni": [1]}}', "", "cni must be a JSON object"),
        ('{"name": "net", "type": "x", "mtu": 1e999}', "", "no number that JSON has"),
        ("[" * 100000, "", "cannot read the networks in"),
        (
            BRIDGE.replace("10.1.0.0/16", "10.1.0.0/16", 1).replace('"10.1.0.0/16"', "true"),
            "10.1.2.3",
            "subnet must be",
        ),
        (
            '{"name": "net", "cniVersion": "2.0.0", "type": "bridge"}',
            "",
            "cniVersion must be one of 0.1.0, 0.2.0, 0.3.0",
        ),
        ('{"name": "net", "plugins": []}', "", "plugins must name a plugin"),
        ('{"name": "net", "type": "bridge"}', "10.0.0.1", "give 10.0.0.1 with its prefix"),
        ('{"name": "net", "type": "bridge"}', "auto", "has no ipam that chooses"),
        (BRIDGE, "10.2.0.1", "10.2.0.1 is not in 10.1.0.0/16"),
        ('{"name": "net", "type": "bridge", "ipam": {"subnet": "x"}}', "10.2.0.1", "ipam cannot be understood: 'x'"),
        (
            '{"name": "net", "type": "bridge", "ipam": {"subnet": "fd00::/64", "gateway": "10.1.0.1"}}',
            "",
            "ipam cannot be understood: '10.1.0.1/64'",
        ),
        (
            '{"name": "net", "type": "bridge", "ipam": {"subnet": "10.1.0.0/16", "gateway": "fd00::1"}}',
            "",
            "ipam cannot be understood: fd00::1 is no gateway of 10.1.0.0/16",
        ),
        ('{"name": "net", "type": "bridge", "mtu": 65536}', "", "mtu must be from 0 to 65535"),
        ('{"name": "net", "type": "bridge", "mtu": -1}', "", "mtu must be from 0 to 65535"),
        ('{"name": "net", "type": "bridge", "bridge": 1}', "", "bridge must be a JSON string"),
        (BRIDGE, "10.1.2.300", "10.1.2.300 is not an IP address"),
        (BRIDGE, "fd00::1", "give fd00::1 with its prefix"),
        ('{"name": "net", "type": "x", "dns": {"search": ["a\\nb"]}}', "", "must hold words for a line of resolv.conf"),
        ('{"name": "net", "type": "x", "dns": {"domain": "a\\nb"}}', "", "must hold words for a line of resolv.conf"),
        ('{"name": "net", "type": "x", "dns": {"options": [1]}}', "", "dns.options[0] must be a JSON string"),
        ('{"name": "net", "plugins": [{"type": "x"}, {"type": "bandwidth", "egressRate": -8}]}', "", "the rate -8b/s"),
    ],
)
def test_a_network_that_cannot_be_is_refused(tmp_path, text, address, words):
    with pytest.raises(runx.Error, match=re.escape(words)):
        load_network(tmp_path, text, address=address)


def test_a_file_that_others_may_write_is_not_trusted(tmp_path):
    path = netconf_file(tmp_path, '{"name": "net", "type": "bridge"}')
    os.chmod(path, 0o666)
    with pytest.raises(runx.Error, match="not to be trusted"):
        runx.Network(("NETCONF", path, "net", ""), [str(tmp_path)])
    with pytest.raises(runx.Error, match="in none of the folders"):
        runx.Network(("NETCONF", "/etc/passwd", "net", ""), [str(tmp_path)])


def test_what_a_network_says_is_read_once(tmp_path):
    ipam = {
        "type": "host-local", "subnet": "10.1.0.7/16", "gateway": "10.1.0.1",
        "ranges": [[{"subnet": "10.2.0.0/16"}], [{"subnet": "fd00::/64", "gateway": "fd00::9"}]],
        "addresses": [{"address": "10.3.0.5/24", "gateway": "10.3.0.1"}, {}],
    }  # fmt: skip
    first = {"type": "bridge", "mtu": 65535, "ipam": ipam, "dns": {"nameservers": ["10.1.0.1"]}}
    limit = {"type": "bandwidth", "egressRate": 16000, "runtimeConfig": {"bandwidth": {"egressRate": 8000}}}
    document = {"name": "net", "cniVersion": "0.4.0", "plugins": [first, {"type": "tuning"}, limit]}
    network = load_network(tmp_path, json.dumps(document), address="10.3.0.5; 10.2.0.9/8;fd00::1")
    assert network.plugins == document["plugins"] and network.version == "0.4.0" and network.ipam == "host-local"
    assert [(str(subnet), str(gateway), is_said) for subnet, gateway, is_said in network.ranges] == [
        ("10.2.0.0/16", "10.2.0.1/16", False), ("fd00::/64", "fd00::9/64", True), ("10.3.0.0/24", "10.3.0.1/24", True),
        ("10.1.0.0/16", "10.1.0.1/16", True),
    ]  # fmt: skip
    assert (network.bridge, network.mtu, network.rate) == ("cni0", 65535, "50,50000")
    assert network.dns == {"nameservers": ["10.1.0.1"]}
    assert [str(each) for each in network.addresses] == ["10.3.0.5/24", "10.2.0.9/8", "fd00::1/64"]
    network = load_network(tmp_path, '{"name": "net", "type": "x", "bridge": "br7"}')
    assert (network.bridge, network.mtu, network.rate, network.dns, network.version) == ("", 0, "", {}, "0.2.0")
    limit["runtimeConfig"] = {}
    assert load_network(tmp_path, json.dumps(document)).rate == "100,50000"
    assert load_network(tmp_path, json.dumps({**document, "plugins": [first, {**limit, "egressRate": 0}]})).rate == ""
    assert load_network(tmp_path, json.dumps({**document, "plugins": [limit]})).rate == ""
    assert load_network(tmp_path, json.dumps({**document, "plugins": [first, {"type": "bandwidth"}]})).rate == ""


ATTACHMENT = {
    "network": "net", "calls": [["plugin", {"name": "net"}]], "identity": "id", "interface": "eth0",
    "namespace": "/none", "result": None, "bridge": "br", "mac": "02:00:00:00:00:01", "mtu": 0, "rate": "",
    "dhcp": False, "addresses": [], "routes": [], "gateways": [], "dns": {},
}  # fmt: skip


def attachment(**changes):
    fields = {**json.loads(json.dumps(ATTACHMENT)), **changes}
    return runx.Attachment(**fields)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that installs a shell script as the CNI plugin "plugin"."""
    monkeypatch.setattr(runx, "CNI_PATH", str(tmp_path))

    def install(script):
        (tmp_path / "plugin").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "plugin").chmod(0o755)

    return install


def test_a_plugin_that_fails_gives_its_own_reason(plugin):
    plugin("""echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no room", "details": "all taken"}'; exit 1""")
    with pytest.raises(runx.Error, match=re.escape("CNI plugin plugin, ADD: no room: all taken (code 11)")):
        runx.call_plugin("ADD", attachment(), "plugin", {})
    plugin("echo broken >&2; exit 3")
    with pytest.raises(runx.Error, match="ADD: exit status 3 broken"):
        runx.call_plugin("ADD", attachment(), "plugin", {})
    with pytest.raises(runx.Error, match="CNI plugin absent is not installed in"):
        runx.call_plugin("ADD", attachment(), "absent", {})


def test_a_plugin_that_hangs_is_killed_with_its_children(plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(runx, "CNI_TIME_LIMIT", 1)
    plugin(f"sleep 1000 & echo $! >{tmp_path}/child; wait")
    with pytest.raises(runx.Error, match="ran past its time of 1 s"):
        runx.call_plugin("ADD", attachment(), "plugin", {})
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: runx.process_start_time(child) is None, "the killed child to be reaped by who inherits it")


def test_a_plugin_gets_the_protocol(plugin, tmp_path):
    plugin(f"env | grep ^CNI_ | sort >{tmp_path}/env; cat >{tmp_path}/stdin; echo '{{}}'")
    assert runx.call_plugin("ADD", attachment(), "plugin", {"name": "net"}) == "{}\n"
    assert (tmp_path / "env").read_text().splitlines() == [
        "CNI_ARGS=IgnoreUnknown=1;MAC=02:00:00:00:00:01", "CNI_COMMAND=ADD", "CNI_CONTAINERID=id", "CNI_IFNAME=eth0",
        "CNI_NETNS=/none", f"CNI_PATH={tmp_path}",
    ]  # fmt: skip
    assert (tmp_path / "stdin").read_text() == '{"name":"net"}'


@pytest.mark.parametrize(
    "text, rate", [("10Mb/s", "62500,50000"), ("1MB/s@20ms", "20000,20000"), ("8000b/s@1s", "1000,1000000")]
)
def test_rates_are_xls(text, rate):
    assert runx.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "10", "10Mb", "0Mb/s", "10Tb/s", "1b/s@1us"])
def test_rates_that_are_none_are_refused(text):
    with pytest.raises(runx.Error, match="the rate"):
        runx.parse_rate(text)


def test_words_for_the_guest_are_split_where_xenstore_ends():
    texts = runx.split_words("mac", ["x" * 1000] * 7)
    assert [text.split()[0] for text in texts] == ["mac"] * 3
    assert sum(text.count("x") for text in texts) == 7000 and max(map(len, texts)) <= runx.GUEST_NODE_MAX
    most = "x" * (runx.GUEST_NODE_MAX - len("mac "))
    assert runx.split_words("mac", [most]) == [f"mac {most}"]
    assert runx.split_words("mac", ["y", most]) == ["mac y", f"mac {most}"]


def test_the_lowest_rate_holds():
    assert runx.lower_rate("", "") == "" and runx.lower_rate("5,10", "") == "5,10"
    assert runx.lower_rate("2000,1000", "300,100") == "2000,1000"


def test_resolv_conf_has_a_line_for_each_server():
    dns = {"nameservers": ["10.0.0.1", "::1"], "domain": "x", "search": ["a", "b"], "options": ["ndots:2"]}
    text = "nameserver 10.0.0.1\nnameserver ::1\ndomain x\nsearch a b\noptions ndots:2\n"
    assert runx.resolv_conf(dns) == text and runx.resolv_conf({}) == ""


def test_the_guest_is_told_whole_lines_of_all_networks_servers_as_far_as_a_node_goes():
    servers = [{"nameservers": [f"10.0.{network}.{number}" for number in range(100, 200)]} for network in (1, 2)]
    state = runx.State(networks=[{"dns": dns} for dns in servers])
    text = "".join(map(runx.resolv_conf, servers))
    told = runx.guest_nodes(state, [])["data/dns"]
    assert text.startswith(told) and told.endswith("\n") and runx.DNS_MAX - 30 < len(told) <= runx.DNS_MAX
    state.networks = [{"dns": {"domain": "x", "search": ["\xe4" * 3000]}}]
    assert runx.guest_nodes(state, []) == {"data/dns": "domain x\n"}
    assert runx.guest_nodes(runx.State(networks=[{"dns": {}}]), []) == {}


# ---- what is planned, and what plugins do


class Made:
    """A container with a state and nothing else."""

    folder, state = "/root/x", runx.State(name="runx-x+y")

    def path(self, name):
        return f"{self.folder}/{name}"


@pytest.fixture
def planned(tmp_path, plugin, monkeypatch):
    """A function that loads a network and plans an Attachment; it returns both, and what the log says."""
    monkeypatch.setattr(runx, "prepare_bridge", lambda network, by_plugins: None)

    def plan(document, address="", number=0, rate=""):
        network, log = load_network(tmp_path, json.dumps(document), address=address), tmp_path / "log"
        log.write_text("")
        monkeypatch.setattr(Made.state, "rate", rate)
        made = runx.plan_attachment(network, number, Made(), runx.Log(str(log)))
        return network, made, log.read_text()

    return plan


NET = {"name": "net", "cniVersion": "0.4.0", "type": "bridge", "bridge": "br7", "mtu": 1400}
HOST_LOCAL = {"type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1"}
PLUGIN = {"type": "plugin", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1"}


def test_a_bridge_for_dhcp_needs_no_plugin(planned):
    _, made, log = planned({**NET, "ipMasq": True, "isGateway": True}, number=3, rate="9,9")
    assert made.__dict__ == {
        "network": "net", "identity": "runx-x_y", "interface": "eth3", "namespace": "/root/x/netns",
        "mac": runx.stable_mac("/root/x", 3), "mtu": 1400, "rate": "9,9", "dhcp": True, "addresses": [],
        "gateways": [], "dns": {}, "bridge": "br7", "routes": [], "calls": [], "result": None,
    }  # fmt: skip
    assert log == ""
    bits = [int(digits, 16) for digits in made.mac.split(":")]
    assert len(bits) == 6 and bits[0] & 3 == 2 and made.mac != runx.stable_mac("/root/x", 4)


def test_a_mac_address_is_the_same_each_time_but_of_its_host_alone(monkeypatch):
    def on(host):
        def read(path):
            assert path == "/etc/machine-id"
            if not host:
                raise FileNotFoundError
            return host

        monkeypatch.setattr(runx, "read_file", read)
        return runx.stable_mac("/root/x", 0)

    assert len({on(""), on("aa"), on("bb")}) == 3
    assert (on("aa"), on("")) == (on("aa"), on(""))


def test_what_only_the_bridge_plugin_does_is_done_by_it_or_told(planned, plugin, tmp_path):
    settings = {**NET, "ipam": PLUGIN, "ipMasq": True, "isDefaultGateway": True, "vlan": 7}
    plugin("exit 0")
    _, made, log = planned(settings, "auto")
    assert "network net: vlan, ipMasq have no effect without the CNI plugin bridge" in log
    assert made.bridge == "br7" and [name for name, _ in made.calls] == ["plugin"]
    _, made, log = planned({**NET, "ipam": PLUGIN, "isGateway": True}, "auto")
    assert made.bridge == "br7" and log == ""
    _, made, log = planned({**NET, "vlan": 7})
    assert "network net: vlan have no effect" in log and made.calls == []
    (tmp_path / "plugin").rename(tmp_path / "bridge")
    network, made, log = planned({**settings, "ipam": PLUGIN}, "auto")
    assert made.bridge == "" and log == "" and made.gateways == ["10.1.0.1"]
    assert made.calls == [["bridge", {**settings, "ipam": PLUGIN}]]
    _, made, _ = planned({**NET, "vlan": 7})
    assert made.calls == [["bridge", {**NET, "vlan": 7, "ipam": {}}]]
    for key in ("isGateway", "isDefaultGateway", "ipMasq"):
        assert [name for name, _ in planned({**NET, "ipam": PLUGIN, key: True}, "auto")[1].calls] == ["bridge"]
        assert planned({**NET, "ipam": PLUGIN, key: True})[1].calls == []  # by DHCP it is the server's host


@pytest.mark.parametrize("key", ["vlan", "vlanTrunk", "hairpinMode", "promiscMode", "macspoofchk", "ipMasq",
                                 "enabledad", "portIsolation", "disableContainerInterface"])  # fmt: skip
def test_what_the_bridge_plugin_would_do_is_told(planned, plugin, key):
    plugin("exit 0")
    _, made, log = planned({**NET, "ipam": PLUGIN, key: True}, "auto")
    assert f"network net: {key} have no effect without the CNI plugin bridge" in log and made.bridge == "br7"
    assert ("have no effect" in planned({**NET, "ipam": PLUGIN, key: True})[2]) == (key not in ("ipMasq", "enabledad"))


def test_a_chain_is_executed_and_a_rate_limit_alone_is_netbacks(planned, plugin, tmp_path):
    chain = [{"type": "bridge"}, {"type": "bandwidth", "egressRate": 8000}]
    document = {"name": "net", "plugins": chain}
    _, made, _ = planned(document, rate="9000,50000")
    assert made.calls == [] and made.rate == "50,50000" and made.bridge == "cni0"
    lost = "network net: ingressRate has no effect without the CNI plugin bandwidth"
    assert lost not in planned(document)[2]
    assert lost in planned({"name": "net", "plugins": [chain[0], {**chain[1], "ingressRate": 8000}]})[2]
    _, made, _ = planned({"name": "net", "plugins": [*chain, {"type": "tuning"}]})
    assert [name for name, _ in made.calls] == ["bridge", "bandwidth", "tuning"] and made.bridge == ""
    plugin("exit 0")
    (tmp_path / "plugin").rename(tmp_path / "bandwidth")
    _, made, _ = planned(document)
    assert made.calls == [
        ["bridge", {"type": "bridge", "name": "net", "cniVersion": "0.2.0", "ipam": {}}],
        ["bandwidth", {"type": "bandwidth", "egressRate": 8000, "name": "net", "cniVersion": "0.2.0"}],
    ]  # fmt: skip
    _, made, _ = planned({"name": "net", "type": "macvlan"})
    assert made.calls == [["macvlan", {"name": "net", "type": "macvlan", "cniVersion": "0.2.0", "ipam": {}}]]


@pytest.mark.parametrize(
    "stated, version",
    [
        ({"cniVersions": ["0.3.1", "1.0.0"]}, "1.0.0"),
        ({"cniVersion": "1.0.0", "cniVersions": ["0.4.0"]}, "1.0.0"),
        ({"cniVersion": "9.0.0", "cniVersions": ["0.4.0", "9.1.0"]}, "0.4.0"),
    ],
)
def test_the_highest_version_that_a_network_states_is_its_plugins(planned, stated, version):
    """SPEC.md: and capabilities are for us, not for the plugin."""
    document = {"name": "net", **stated, "plugins": [{"type": "macvlan", "capabilities": {"mac": True}}]}
    _, made, _ = planned(document)
    assert made.calls == [["macvlan", {"name": "net", "type": "macvlan", "cniVersion": version, "ipam": {}}]]


def test_a_static_address_is_asked_of_the_plugin_in_its_own_way(planned, plugin, tmp_path):
    args = {"args": {"x": 1, "cni": {"y": 2}}}
    plugin("exit 0")
    _, made, log = planned({**NET, "ipam": PLUGIN, **args}, "10.1.2.3")
    expected = {**NET, "ipam": PLUGIN, "args": {"x": 1, "cni": {"y": 2, "ips": ["10.1.2.3/16"]}}}
    assert made.calls == [["plugin", expected]] and made.addresses == ["10.1.2.3/16"] and log == ""
    (tmp_path / "plugin").rename(tmp_path / "host-local")
    _, made, _ = planned({**NET, "ipam": HOST_LOCAL}, "10.1.2.3")
    expected = {**NET, "ipam": HOST_LOCAL, "args": {"cni": {"ips": ["10.1.2.3"]}}}
    assert made.calls == [["host-local", expected]]


def test_without_plugins_the_file_says_the_routes(planned):
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.9.9.9/16", "gw": "10.1.0.2"}]
    document = {**NET, "ipam": {**HOST_LOCAL, "routes": routes}, "dns": {"domain": "x"}}
    _, made, log = planned(document, "10.1.2.3")
    assert "network net: no CNI plugin reserves 10.1.2.3/16" in log
    assert made.routes == [["0.0.0.0/0", "10.1.0.1", {}], ["10.9.0.0/16", "10.1.0.2", {}]]
    assert made.dns == {"domain": "x"}
    del document["ipam"]["gateway"]
    _, made, _ = planned({**document, "isDefaultGateway": True}, "10.1.2.3")
    assert made.routes[0] == ["0.0.0.0/0", "10.1.0.1", {}] and made.gateways == ["10.1.0.1"]  # by custom the first one
    _, made, _ = planned({**NET, "ipam": {"routes": [{"dst": "0.0.0.0/0"}]}}, "10.1.2.3/24")
    assert made.routes == [["0.0.0.0/0", "", {}]]
    with pytest.raises(runx.Error, match="no address without the CNI plugin host-local: install it in /"):
        planned(document, "auto")
    with pytest.raises(runx.Error, match="cannot understand the addresses and routes of network net: "):
        planned({**NET, "ipam": {**HOST_LOCAL, "routes": [{"dst": "x"}]}}, "10.1.2.3")


RESULTS = {
    "0.2.0": {
        "cniVersion": "0.2.0",
        "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.8.0.0/16"}]},
        "ip6": {"ip": "fd00::5/64", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
        "dns": {"nameservers": ["10.1.0.2"]},
    },
    "0.4.0": {
        "cniVersion": "0.4.0",
        "ips": [{"version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1"},
                {"version": "4", "address": "10.2.0.5/16", "gateway": "10.2.0.1"},
                {"version": "6", "address": "fd00::5/64"}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1"}, {"dst": "10.8.0.0/16", "gw": "10.2.0.9"}],
        "dns": {"nameservers": ["10.1.0.2"]},
    },
    "1.1.0": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1"}],
              "routes": [{"dst": "10.9.0.0/16", "table": 100}, {"dst": "0.0.0.0/0", "table": 254}, {"dst": "::/0"}]},
}  # fmt: skip


def run_plan(plugin, planned, version, document=NET, script=""):
    """An Attachment of a bridge's port, with the result of that version from an IPAM plugin."""
    supported = json.dumps({"cniVersion": "1.1.0", "supportedVersions": ["0.4.0", "1.0.0", "2.0.0"]})
    plugin(f"[ $CNI_COMMAND = VERSION ] && {{ echo '{supported}'; exit; }}\n{script}\n"
           f"echo '{json.dumps(RESULTS[version])}'")  # fmt: skip
    network, made, _ = planned({**document, "cniVersion": version, "ipam": {"type": "plugin"}}, "auto")
    runx.attach_network(made, network)
    return made


def test_results_of_all_versions_are_understood(planned, plugin, tmp_path):
    made = run_plan(plugin, planned, "0.2.0")
    assert made.addresses == ["10.1.0.5/16", "fd00::5/64"] and made.dns == {"nameservers": ["10.1.0.2"]}
    assert made.routes == [["0.0.0.0/0", "10.1.0.1", {}], ["10.8.0.0/16", "10.1.0.1", {}], ["::/0", "fd00::1", {}]]
    assert made.gateways == [] and made.result == RESULTS["0.2.0"]
    made = run_plan(plugin, planned, "0.4.0", {**NET, "isDefaultGateway": True, "dns": {"domain": "x"}})
    assert made.addresses == ["10.1.0.5/16", "10.2.0.5/16", "fd00::5/64"] and made.dns == {"domain": "x"}
    assert made.routes == [["0.0.0.0/0", "10.1.0.1", {}], ["::/0", "fd00::1", {}], ["10.8.0.0/16", "10.2.0.9", {}]]
    assert made.gateways == ["10.1.0.1"]
    made = run_plan(plugin, planned, "1.1.0", script=f"cat >{tmp_path}/stdin")
    assert made.addresses == ["10.1.0.5/16"] and made.routes == [["0.0.0.0/0", "10.1.0.1", {}]] and made.dns == {}
    assert json.loads((tmp_path / "stdin").read_text())["cniVersion"] == "1.0.0"  # the newest that both know


def test_a_route_has_the_numbers_that_are_told_of_it(planned, plugin, namespaces):
    """As the plugin bridge sets them: the kernel has them when our message has come."""
    routes = [
        {"dst": "10.8.0.0/16", "priority": 70, "mtu": 1400, "advmss": 1300},
        {"dst": "10.9.0.0/16", "scope": 253}, {"dst": "10.7.0.0/16", "scope": 0, "priority": None},
        {"dst": "0.0.0.0/0", "gw": "10.1.0.9", "priority": 0xFFFFFFFF},
    ]  # fmt: skip
    result = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1"}], "routes": routes}
    plugin(f"echo '{json.dumps(result)}'")
    network, made, _ = planned({**NET, "cniVersion": "1.0.0", "ipam": {"type": "plugin"}}, "auto")
    runx.attach_network(made, network)
    assert made.routes[2] == ["10.7.0.0/16", "10.1.0.1", {}]
    interface = runx.attachment_interface(runx.Attachment(**json.loads(json.dumps(vars(made)))), None)
    for line in ("link add eth0 up type veth peer name x", "link set x up", "address add 10.1.0.5/16 dev eth0"):
        ip(line)
    netlink = runx.Rtnetlink()
    for route in interface.routes:
        route.attributes[runx.RTA_OIF] = netlink.find_link("eth0").index
        netlink.request(route, runx.NLM_F_CREATE)
    shown = {each["dst"]: each for each in ip("route show proto static")}
    mine = shown["10.8.0.0/16"]
    assert (mine["gateway"], mine["metric"], mine["metrics"]) == ("10.1.0.1", 70, [{"mtu": 1400, "advmss": 1300}])
    assert (shown["10.9.0.0/16"]["scope"], "gateway" in shown["10.9.0.0/16"]) == ("link", False)
    assert (shown["default"]["gateway"], shown["default"]["metric"], len(shown)) == ("10.1.0.9", 0xFFFFFFFF, 4)


@pytest.mark.parametrize("number", [{"mtu": -1}, {"priority": 1 << 32}, {"scope": 256}, {"advmss": "1"}])
def test_a_number_of_a_route_that_is_none_is_refused(planned, plugin, number):
    result = {"ips": [{"address": "10.1.0.5/16"}], "routes": [{"dst": "10.8.0.0/16", **number}]}
    plugin(f"echo '{json.dumps(result)}'")
    network, made, _ = planned({**NET, "ipam": {"type": "plugin"}}, "auto")
    with pytest.raises(runx.Error, match=f"network net: the route to 10.8.0.0/16: {next(iter(number))} must be"):
        runx.attach_network(made, network)


def test_what_plugins_tell_of_their_versions(plugin):
    plugin('echo \'{"supportedVersions": ["9.0.0"]}\'')
    made = attachment()
    runx.negotiate_version(made)
    assert made.calls == [["plugin", {"name": "net", "cniVersion": "1.1.0"}]]
    for answer in ("{}", "[]", "x", '{"supportedVersions": [[]]}'):
        plugin(f"echo '{answer}'")
        with pytest.raises(runx.Error, match="network net: the CNI plugin plugin does not tell its versions"):
            runx.negotiate_version(attachment())


def test_each_plugin_of_a_chain_gets_the_result_of_the_one_before(planned, plugin, tmp_path):
    plugin(f"""cat >{tmp_path}/$CNI_COMMAND-$(basename $0); printf "$0 $CNI_COMMAND\\n" >>{tmp_path}/calls
[ $(basename $0) = broken ] && {{ echo '{{"code": 7, "msg": "no"}}'; exit 1; }}
echo '{{"from": "'$(basename $0)'", "dns": {{"domain": "'$(basename $0)'"}}}}'""")
    for name in ("second", "broken"):
        os.link(tmp_path / "plugin", tmp_path / name)
    document = {"name": "net", "cniVersion": "1.0.0", "plugins": [{"type": "plugin"}, {"type": "second"}]}
    network, made, _ = planned(document)
    runx.attach_network(made, network)
    assert made.result == {"from": "second", "dns": {"domain": "second"}} and made.dns == {"domain": "second"}
    first, second = (json.loads((tmp_path / f"ADD-{name}").read_text()) for name in ("plugin", "second"))
    assert "prevResult" not in first and second["prevResult"]["from"] == "plugin"
    document["plugins"].insert(1, {"type": "broken"})
    network, made, log = planned(document)
    with pytest.raises(runx.Error, match=r"network net: CNI plugin broken, ADD: no \(code 7\)"):
        runx.attach_network(made, network)
    assert made.result["from"] == "plugin"
    (tmp_path / "calls").unlink()
    runx.detach_network(json.loads(json.dumps(made.__dict__)), runx.Log(str(tmp_path / "log")))
    calls = [line.split("/")[-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == ["second DEL", "broken DEL", "plugin DEL"]  # all are told, whatever one says
    assert "CNI plugin broken, DEL: no (code 7)" in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "DEL-second").read_text())["prevResult"]["from"] == "plugin"


@pytest.mark.parametrize("output", ["", "x", "[]", '"x"', '{"a": "\\ud800"}', "1e999"])
def test_a_plugin_that_prints_no_result_is_an_error(plugin, planned, output):
    plugin(f"echo '{output}'")
    network, made, _ = planned({"name": "net", "type": "plugin"})
    with pytest.raises(runx.Error, match="network net: the CNI plugin plugin has not printed a result"):
        runx.attach_network(made, network)


@pytest.mark.parametrize("result", [
    {"ips": [{"address": "x"}]}, {"ips": [{}]}, {"ips": 7}, {"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]},
    {"ip4": {}, "ips": [[]]}, {"ips": [{"address": "10.0.0.1/8"}], "routes": [{"dst": "0.0.0.0/0", "gw": "x"}]},
])  # fmt: skip
def test_a_result_that_says_no_addresses_is_an_error(tmp_path, result):
    with pytest.raises(runx.Error, match="cannot understand the addresses and routes of network net: "):
        runx.use_result(attachment(), result, load_network(tmp_path, BRIDGE))
    with pytest.raises(runx.Error, match="network net: dns.domain must be a JSON string"):
        runx.use_result(attachment(), {"dns": {"domain": 1}}, load_network(tmp_path, BRIDGE))


def test_without_a_reason_of_the_plugins_its_output_is_told(plugin):
    for text in ("7", "{}", "[1]", '{"msg": "no"}'):
        plugin(f"echo '{text}'; echo broken >&2; exit 2")
        with pytest.raises(runx.Error, match="CNI plugin plugin, DEL: exit status 2 broken$"):
            runx.call_plugin("DEL", attachment(), "plugin", {})
    plugin("exit 0")
    assert runx.find_plugin("absent") is None


# ---- namespaces of the tests' own, with veth pairs: one end is the vif, the other what a guest has


def ip(words, namespace=""):
    """What `ip` says, as JSON where it says anything."""
    run = lambda: call("ip", "-j", *words.split())  # noqa: E731
    result = runx.in_namespace(namespace, run) if namespace else run()
    assert result.returncode == 0, (words, result)
    return json.loads(result.stdout) if result.stdout.strip() else []


@pytest.fixture
def namespaces(tmp_path):
    """We are in a network namespace of our own, and the path of another one, for a guest, is returned."""
    home, guest = os.open("/proc/self/ns/net", os.O_RDONLY), str(tmp_path / "guest")
    try:
        runx.system_call("unshare", runx.CLONE_NEWNET)
    except OSError as error:
        os.close(home)
        pytest.skip(f"no network namespace of our own: {error.strerror}")
    try:
        runx.make_namespace(guest)
        yield guest
    finally:
        call("umount", "--lazy", guest)
        runx.system_call("setns", home, runx.CLONE_NEWNET)
        os.close(home)


def pair(name, mac, guest, peer="guest0"):
    """A link here, and its other end in the guest with this MAC address."""
    ip(f"link add {name} type veth peer name {peer} address {mac} netns {guest}", "")


def apply(words, guest, mac):
    """Does what initrd/ does with these words."""

    def work():
        netlink = runx.Rtnetlink()
        index = next(link.index for link in netlink.links() if link.mac.hex() == mac)
        for word in words:
            if "=" in word:
                path, _, value = word.partition("=")
                runx.write_file(f"/proc/{path}", value)
                continue
            assert word.count("@") == 1
            data = bytes.fromhex(word.replace("@", struct.pack("=I", index).hex()))
            assert struct.unpack_from("=I", data)[0] == len(data)
            netlink.socket.send(data)
            answer = next(netlink.receive())
            assert (answer.kind, answer.head) == (runx.NLMSG_ERROR, (0,)), (word, os.strerror(-answer.head[0]))

    runx.in_namespace(guest, work)


def addresses_of(device, namespace):
    """What `ip` says about a link's addresses, without those that it has by itself."""
    found = ip(f"address show dev {device}", namespace)[0]["addr_info"]
    keys = ("local", "address", "prefixlen", "broadcast", "scope", "nodad", "noprefixroute")
    return [{key: each[key] for key in keys if key in each} for each in found if each["scope"] != "link"]


def routes_of(device, namespace, option=""):
    found = [each for each in ip(f"{option} route show", namespace) if each.get("dev") == device]
    return [{key: value for key, value in each.items() if key not in ("dev", "flags")} | {"flags": sorted(
        set(each["flags"]) - {"linkdown"})} for each in found if each["dst"] != "fe80::/64"]  # fmt: skip


ENGINES = """
link set lo up
link add eth3 mtu 1400 address 02:00:00:00:77:03 type veth peer name peer3
link set peer3 up
link set eth3 up
address add 10.77.0.33/24 broadcast + dev eth3
address add 10.5.0.1 peer 10.5.0.9 dev eth3
address add fd77::33/64 dev eth3 nodad
address add fe80::77/64 dev eth3 nodad
address add 10.79.0.1/24 scope 100 dev eth3
address add 10.80.0.1/24 dev peer3
address add 10.77.1.33/24 dev eth3 valid_lft 1000 preferred_lft 1000
address add fd78::33/64 dev eth3 nodad noprefixroute valid_lft 1000 preferred_lft 1000
route add default via 10.77.0.1 metric 5 src 10.77.0.33 mtu 1300
route add 10.7.0.0/16 via 10.99.0.1 dev eth3 onlink
route add 10.8.0.0/16 via inet6 fd77::1 dev eth3
-6 route add default via fd77::1
-6 route add fd01::/64 via fd77::1 proto ra
-6 route add fd02::/64 from fd77::/64 via fd77::1
route add blackhole 10.66.0.0/16
route add 10.67.0.0/16 dev eth3 table 7
neighbour add 10.77.0.99 lladdr 02:00:00:00:77:99 dev eth3
neighbour add fd77::99 lladdr 02:00:00:00:77:98 dev eth3
neighbour add 10.77.0.98 lladdr 02:00:00:00:77:97 nud reachable dev eth3
link add idle type veth peer name idlepeer
link add addressed type veth peer name addressedpeer
address add 10.78.0.1/24 dev addressed
"""


def test_an_engines_interface_is_the_same_in_the_guest(namespaces, tmp_path):
    for line in ENGINES.strip().splitlines():
        ip(line)
    runx.write_file("/proc/sys/net/ipv6/conf/eth3/accept_ra", 0)
    log = tmp_path / "log"
    found = {each.name: each for each in runx.namespace_interfaces("/proc/self/ns/net", runx.Log(str(log)))}
    assert set(found) == {"eth3", "peer3", "addressed"} and not log.exists()
    interface = found["eth3"]
    assert (interface.mac, interface.mtu, interface.device) == ("020000007703", 1400, "eth3")
    assert (interface.namespace, interface.bridge, interface.dhcp, interface.rate) == ("/proc/self/ns/net", "", 0, "")
    assert interface.ipv6 == {"disable_ipv6": "0", "accept_ra": "0"}
    pair("vif7.0", "02:00:00:00:77:03", namespaces)
    ip("link set vif7.0 up")
    apply(runx.guest_words(interface), namespaces, "020000007703")
    link = ip("link show dev eth3", namespaces)[0]
    assert link["mtu"] == 1400 and "UP" in link["flags"]
    expected = [{**each, "noprefixroute": True} for each in addresses_of("eth3", "")]
    expected = [each for each in expected if each["local"] != "fd78::33"]  # as a router would have advertised it
    assert addresses_of("eth3", namespaces) == expected and len(expected) == 5 and expected[4]["nodad"]
    found = {each["local"]: each for each in ip("address show dev eth3", namespaces)[0]["addr_info"]}
    assert found["fe80::77"]["nodad"] and "noprefixroute" not in found["fe80::77"]
    assert found["10.77.0.33"]["broadcast"] == "10.77.0.255" and found["10.5.0.1"]["address"] == "10.5.0.9"
    assert routes_of("eth3", namespaces) == routes_of("eth3", "") and len(routes_of("eth3", "")) == 7
    v6 = [each for each in routes_of("eth3", "", "-6") if each.get("protocol") != "ra"]
    assert routes_of("eth3", namespaces, "-6") == v6 and len(v6) == 3
    kept = {each["dst"]: each["lladdr"] for each in ip("neighbour show dev eth3", namespaces)}
    assert kept == {"10.77.0.99": "02:00:00:00:77:99", "fd77::99": "02:00:00:00:77:98"}
    assert runx.read_file("/proc/self/net/dev").count("eth3") == 1
    settings = {"accept_ra": "0", "accept_dad": "0", "disable_ipv6": "0"}
    folder = "/proc/sys/net/ipv6/conf/eth3"
    read = lambda: {key: runx.read_file(f"{folder}/{key}") for key in settings}  # noqa: E731
    assert runx.in_namespace(namespaces, read) == settings


def test_an_interface_without_ipv6_gets_none_of_its_addresses(namespaces):
    for line in ("link add eth3 type veth peer name peer3", "link set eth3 up", "address add 10.7.0.3/24 dev eth3",
                 "address add fd77::33/64 dev eth3 nodad"):  # fmt: skip
        ip(line)
    interface = next(each for each in runx.namespace_interfaces("/proc/self/ns/net", None) if each.name == "eth3")
    interface.ipv6["disable_ipv6"] = "1"
    interface.routes = []
    words = list(runx.guest_words(interface))
    kinds = [struct.unpack_from("=H", bytes.fromhex(word[8:12]))[0] for word in words if "=" not in word]
    assert kinds == [runx.RTM_NEWLINK, runx.RTM_NEWLINK, runx.RTM_NEWADDR]
    assert [word for word in words if "=" in word] == [
        "sys/net/ipv6/conf/eth3/disable_ipv6=1", "sys/net/ipv6/conf/eth3/accept_ra=1",
        "sys/net/ipv6/conf/eth3/accept_dad=0",
    ]  # fmt: skip


def test_a_tunnel_stays_outside_with_a_warning(namespaces, tmp_path):
    if call("ip", "tuntap", "add", "tunnel0", "mode", "tun").returncode:
        pytest.skip("this kernel has no tun")
    ip("link set tunnel0 up")
    assert list(runx.namespace_interfaces("/proc/self/ns/net", runx.Log(str(tmp_path / "log")))) == []
    assert "the interface tunnel0 is none of Ethernet and stays outside the VM" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("family, gateways", [("-4", ["10.7.0.1", "10.7.0.2"]), ("-6", ["fd77::1", "fd77::2"])])
def test_a_route_by_several_gateways_stays_outside_with_a_warning(namespaces, tmp_path, family, gateways):
    for line in ("link add eth3 type veth peer name peer3", "link set eth3 up", "link set peer3 up",
                 "address add 10.7.0.3/24 dev eth3", "address add fd77::33/64 dev eth3 nodad"):  # fmt: skip
        ip(line)
    hops = [word for each in gateways for word in ("nexthop", "via", each, "dev", "eth3")]
    added = call("ip", family, "route", "add", "default", *hops)
    if b"Multipath support not enabled" in added.stderr:
        pytest.skip("this kernel has no route by several gateways")
    assert added.returncode == 0, added.stderr
    log = tmp_path / "log"
    found = {each.name: each for each in runx.namespace_interfaces("/proc/self/ns/net", runx.Log(str(log)))}
    kept = [route for route in found["eth3"].routes if not route.head[1]]
    assert (kept, log.read_text().count("a route by several gateways stays outside the VM")) == ([], 1)


def test_a_namespace_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(runx.Error, match=f"cannot read the network namespace {tmp_path}/x: No such file"):
        list(runx.namespace_interfaces(f"{tmp_path}/x", None))
    before = len(open_descriptors())
    with pytest.raises(FileNotFoundError):
        runx.in_namespace(f"{tmp_path}/x", os.getpid)
    assert len(open_descriptors()) == before
    with pytest.raises(runx.Error, match=f"cannot make the network namespace {tmp_path}/no/x: No such file"):
        runx.make_namespace(f"{tmp_path}/no/x")


def test_a_namespace_lasts_and_is_another_one(namespaces):
    assert [link["ifname"] for link in ip("link show", namespaces)] == ["lo"]
    outside, descriptors = os.stat("/proc/self/ns/net").st_ino, open_descriptors()
    inside = runx.in_namespace(namespaces, lambda: os.stat("/proc/self/ns/net").st_ino)
    assert inside != outside == os.stat("/proc/self/ns/net").st_ino
    with pytest.raises(ZeroDivisionError):
        runx.in_namespace(namespaces, lambda: 1 / 0)
    assert os.stat("/proc/self/ns/net").st_ino == outside
    assert open_descriptors() == descriptors


def test_one_vm_has_a_namespace(namespaces):
    mark = runx.mark_namespace()
    with pytest.raises(runx.Error, match="cannot join the network namespace of another container"):
        runx.mark_namespace()
    runx.in_namespace(namespaces, runx.mark_namespace).close()
    mark.close()
    runx.mark_namespace().close()


def test_a_bridge_is_made_with_its_gateways_once(namespaces, tmp_path):
    ipam = {"type": "x", "subnet": "10.9.0.0/24", "ranges": [[{"subnet": "fd09::/64", "gateway": "fd09::7"}]]}
    document = {"name": "net", "type": "bridge", "bridge": "testbr0", "ipam": ipam}
    for name in ("testbr0", "x" * 16):  # of the latter the kernel says that it is too long
        missing = load_network(tmp_path, json.dumps({**document, "bridge": name}))
        with pytest.raises(
            runx.Error, match=f"network net: there is no bridge {name} on this host: make it, or set is"
        ):
            runx.prepare_bridge(missing, False)
    for key in ("isGateway", "isDefaultGateway"):
        network = load_network(tmp_path, json.dumps({**document, key: True}))
        runx.prepare_bridge(network, False)
    link = ip("-d link show dev testbr0")[0]
    assert link["linkinfo"]["info_kind"] == "bridge" and "UP" in link["flags"]
    assert addresses_of("testbr0", "") == [
        {"local": "10.9.0.1", "prefixlen": 24, "broadcast": "10.9.0.255", "scope": "global"},
        {"local": "fd09::7", "prefixlen": 64, "scope": "global", "nodad": True},
    ]  # fmt: skip
    ip("link set testbr0 down")
    runx.prepare_bridge(load_network(tmp_path, json.dumps(document)), False)
    assert "UP" not in ip("link show dev testbr0")[0]["flags"]  # whose it is looks after it
    network.bridge = "x" * 16
    with pytest.raises(runx.Error, match=f"cannot make the bridge {'x' * 16} of network net: "):
        runx.prepare_bridge(network, False)


@pytest.mark.parametrize("changes, address", [({}, "auto"), ({"vlan": 10}, "auto"), ({"vlan": 10}, ""),
                                              ({"vlanTrunk": [{"id": 7}]}, "")])  # fmt: skip
def test_a_bridge_of_the_plugins_is_left_to_it(namespaces, tmp_path, plugin, changes, address):
    """Which makes it with the MTU and with VLANs, and then the gateway belongs to the VLAN."""
    plugin("exit 0")
    (tmp_path / "plugin").rename(tmp_path / "bridge")
    document = {**NET, "bridge": "testbr0", "ipam": PLUGIN, "isGateway": True, **changes}
    network = load_network(tmp_path, json.dumps(document), address=address)
    made = runx.plan_attachment(network, 0, Made(), runx.Log())
    assert [name for name, _ in made.calls] == ["bridge"]
    assert [link["ifname"] for link in ip("link show")] == ["lo"]
    network = load_network(tmp_path, json.dumps({**document, "isGateway": False, "ipMasq": True}), address="auto")
    with pytest.raises(runx.Error, match="there is no bridge testbr0 on this host"):
        runx.plan_attachment(network, 0, Made(), runx.Log())


def test_where_the_vm_asks_by_dhcp_the_gateway_of_a_plugins_bridge_is_made(namespaces, tmp_path, plugin):
    plugin("exit 0")
    (tmp_path / "plugin").rename(tmp_path / "bridge")
    document = {**NET, "bridge": "testbr0", "ipam": PLUGIN, "isGateway": True, "hairpinMode": True}
    made = runx.plan_attachment(load_network(tmp_path, json.dumps(document)), 0, Made(), runx.Log())
    assert [name for name, _ in made.calls] == ["bridge"]
    assert [each["local"] for each in addresses_of("testbr0", "")] == ["10.1.0.1"]


def test_a_link_is_awaited(namespaces):
    events = runx.Rtnetlink(groups=runx.RTMGRP_LINK)
    ip("link add other type veth peer name vif7.0")
    assert events.await_link("vif7.0", 30)
    link = runx.Rtnetlink().link("vif7.0")
    assert (link.name, link.up, link.type) == ("vif7.0", False, runx.ARPHRD_ETHER)
    assert link.mac.hex(":") == ip("link show dev vif7.0")[0]["address"]
    assert link.index == ip("link show dev vif7.0")[0]["ifindex"] and link.mtu == 1500
    assert not events.await_link("vif7.1", 0.01)


def test_a_link_is_awaited_beside_messages_that_name_none(namespaces):
    """As of a wireless one (IFLA_WIRELESS), which has no name."""
    events = runx.Rtnetlink(groups=runx.RTMGRP_LINK)
    events.socket.close()
    kernel, events.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ip("link add other type veth peer name vif7.0")
    for _ in range(2):
        kernel.send(runx.Message(runx.RTM_NEWLINK, (0, 1, 7, 0, 0), {11: b"event"}).pack(0))
    assert events.await_link("vif7.0", 30)
    assert not events.await_link("vif7.1", 0.01)


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "later"])
def test_a_link_is_awaited_where_more_changes_than_the_kernel_can_tell(namespaces, is_there):
    """netlink(7): ENOBUFS, after which nothing is told until all that was has been read."""
    events, other = runx.Rtnetlink(groups=runx.RTMGRP_LINK), runx.Rtnetlink()
    if is_there:
        ip("link add other type veth peer name vif7.0")
    lo = other.find_link("lo").index
    for number in range(2000):
        other.set_link(lo, {runx.IFLA_MTU: 1500 + number % 2})
    maker = threading.Thread(target=lambda: None if is_there else ip("link add other type veth peer name vif7.0"))
    maker.start()
    assert events.await_link("vif7.0", 30)
    maker.join()


class FakeXenstore:
    """A store; a vif is there once its backend has been announced: announced() makes it."""

    def __init__(self, announced):
        self.nodes, self.announced = {"/local/domain/7/vm": "/vm/u"}, announced

    def read(self, path, default=""):
        return self.nodes.get(path, default)

    def list(self, path):
        return list(
            dict.fromkeys(node[len(path) + 1 :].split("/")[0] for node in self.nodes if node.startswith(path + "/"))
        )

    def write(self, path, value):
        self.nodes[path] = value

    def write_all(self, steps):
        self.nodes.update((path, value) for path, value in steps if isinstance(value, str))

    def remove(self, path):
        self.nodes = {node: value for node, value in self.nodes.items() if not f"{node}/".startswith(f"{path}/")}

    def transaction(self, work):
        before = set(self.nodes)
        work()
        for path in sorted(set(self.nodes) - before):
            if re.fullmatch("/local/domain/0/backend/vif/7/[0-9]+/handle", path):
                self.announced(self.nodes[path], self.nodes[path.replace("handle", "mac")])


@pytest.fixture
def plugged(namespaces, tmp_path):
    """A function that plugs a container with this state into domain 7; it returns its xenstore and container."""

    def announced(number, mac):
        pair(f"vif7.{number}", mac, namespaces, f"guest{number}")

    store, container = FakeXenstore(announced), runx.Container(str(tmp_path / "root"), "x")
    container.domain = lambda: runx.Domain(store, 7, "u")
    container.reserve()

    def plug(**state):
        container.save(**{"uuid": "u", "domid": 7, "hostname": "box", **state})
        with runx.Undo(runx.Log(str(tmp_path / "log"))) as undo:
            told = runx.plug(container, undo)
            store.nodes.update((f"/local/domain/7/{node}", value) for node, value in told.items())
        return store, container

    plug.store, plug.container = store, container
    return plug


def told(store):
    """The texts for the guest, in order."""
    folder = "/local/domain/7/data/network"
    return [store.nodes[f"{folder}/{number}"] for number in range(len(store.list(folder)))]


def joined(container):
    """The links that the container's vifs are joined to, in the order of their numbers."""
    return [vif["device"] for vif in sorted(container.state.plugged, key=lambda vif: vif["number"])]


def ping(address):
    return call("busybox", "ping", "-c", "1", "-w", "5", address).returncode == 0


def test_ports_of_a_bridge_reach_it(namespaces, plugged):
    for line in ("link add testbr0 mtu 1450 type bridge", "address add 10.9.0.1/24 dev testbr0", "link set testbr0 up",
                 "address add fd09::1/64 dev testbr0 nodad"):  # fmt: skip
        ip(line)
    static = {
        "network": "net", "identity": "id", "interface": "eth0", "namespace": "/none", "calls": [], "result": None,
        "bridge": "testbr0", "mac": "02:00:00:00:09:05", "mtu": 0, "rate": "5,10", "dhcp": False,
        "dns": {"domain": "x"},
        "addresses": ["10.9.0.5/24", "fd09::5/64"],
        "routes": [["10.30.0.0/16", "10.99.0.1"], ["10.31.0.0/16", ""], ["10.9.0.0/24", "10.9.0.1"]],
        "gateways": ["10.9.0.1", "10.9.0.2", "fd09::1"],
    }  # fmt: skip
    dhcp = {**static, "mac": "02:00:00:00:09:06", "mtu": 1300, "rate": "", "dhcp": True, "addresses": [], "routes": [],
            "dns": {}}  # fmt: skip
    plugged.store.nodes["/libxl/7/device/vif/0/frontend"] = ""  # a vif of xl's settings
    store, container = plugged(networks=[static, dhcp])
    assert container.state.devices == [["vif", 1], ["vif", 2]] and joined(container) == ["", ""]
    backend = "/local/domain/0/backend/vif/7"
    nodes = {
        key: store.nodes.get(f"{backend}/1/{key}") for key in ("mac", "bridge", "rate", "script", "type", "online")
    }
    assert nodes == {"mac": "02:00:00:00:09:05", "bridge": "testbr0", "rate": "5,10", "script": "/bin/true",
                     "type": "vif", "online": "1"}  # fmt: skip
    assert f"{backend}/2/rate" not in store.nodes and store.nodes[f"{backend}/2/hotplug-status"] == "connected"
    assert store.nodes["/local/domain/7/device/vif/1/mac"] == "02:00:00:00:09:05"
    port = ip("-d link show dev vif7.1")[0]
    assert (port["master"], port["mtu"], port["inet6_addr_gen_mode"]) == ("testbr0", 1450, "none")
    assert "UP" in port["flags"] and ip("link show dev vif7.2")[0]["mtu"] == 1300
    data = "/local/domain/7/data"
    assert [store.nodes[f"{data}/{key}"] for key in ("hostname", "dhcp", "dns")] == ["box", "eth2", "domain x\n"]
    texts = told(store)
    assert [text.split()[0] for text in texts] == ["020000000905", "020000000906"] * 2  # first out of each other's way
    assert "sys/net/ipv6/conf/eth1/accept_ra=0" in texts[2] and "accept_ra" not in texts[3]
    for text in texts:
        mac, *words = text.split()
        apply(words, namespaces, mac)
    assert ip("link show dev eth1", namespaces)[0]["mtu"] == 1450
    assert ip("link show dev eth2", namespaces)[0]["mtu"] == 1300
    assert addresses_of("eth1", namespaces) == [
        {"local": "10.9.0.5", "prefixlen": 24, "broadcast": "10.9.0.255", "scope": "global"},
        {"local": "fd09::5", "prefixlen": 64, "scope": "global", "nodad": True},
    ]  # fmt: skip
    assert routes_of("eth1", namespaces) == [
        {"dst": "default", "gateway": "10.9.0.1", "protocol": "static", "flags": []},
        {"dst": "10.9.0.0/24", "protocol": "kernel", "scope": "link", "prefsrc": "10.9.0.5", "flags": []},
        {"dst": "10.9.0.0/24", "gateway": "10.9.0.1", "protocol": "static", "flags": []},  # behind that one
        {"dst": "10.30.0.0/16", "gateway": "10.99.0.1", "protocol": "static", "flags": ["onlink"]},
        {"dst": "10.31.0.0/16", "protocol": "static", "scope": "link", "flags": []},
    ]  # fmt: skip
    v6 = [each for each in routes_of("eth1", namespaces, "-6") if each["dst"] == "default"]
    assert [(each["gateway"], each["protocol"], each["flags"]) for each in v6] == [("fd09::1", "static", [])]
    assert addresses_of("eth2", namespaces) == [] and ping("10.9.0.5") and ping("fd09::5")


@pytest.mark.parametrize("address, broadcast", [("10.9.0.4/30", "10.9.0.7"), ("10.9.0.4/31", None),
                                                ("10.9.0.4/32", None), ("fd09::4/16", None)])  # fmt: skip
def test_a_subnet_of_two_and_ipv6_have_no_broadcast(address, broadcast):
    import ipaddress

    message = runx.address_message(ipaddress.ip_interface(address), 9)
    found = message.attributes.get(runx.IFA_BROADCAST)
    assert found == (broadcast and ipaddress.ip_address(broadcast).packed) and message.head[-1] == 9


def test_a_link_is_up_only_where_that_is_asked_for(namespaces):
    """Before it has its settings, it would take what a router advertises."""
    pair("vif7.0", "02:00:00:00:09:05", namespaces)
    netlink = runx.Rtnetlink()
    index = netlink.find_link("vif7.0").index
    seen = []
    for up in (False, True, False):
        netlink.set_link(index, {runx.IFLA_MTU: 1400}, up)
        seen.append("UP" in ip("link show dev vif7.0")[0]["flags"])
    assert seen == [False, True, True]


def test_a_port_that_cannot_be_leaves_nothing(namespaces, plugged, monkeypatch):
    network = {**ATTACHMENT, "bridge": "gone", "addresses": ["10.9.0.5/24"]}
    with pytest.raises(runx.Error, match="cannot connect the VM to gone: gone or vif7.0 is gone"):
        plugged(networks=[network])
    assert plugged.container.state.devices == []
    assert [node for node in plugged.store.nodes if "/vif" in node] == []
    ip("link add gone type veth peer name x")  # no bridge
    with pytest.raises(runx.Error, match="cannot connect the VM to gone: "):
        plugged(networks=[network])
    monkeypatch.setattr(runx, "VIF_TIME_LIMIT", 0.01)
    plugged.store.announced = lambda number, mac: None
    with pytest.raises(
        runx.Error, match=r"dom0's kernel has not made vif7.2 in 0.01 s: is its module xen-netback load"
    ):
        plugged(networks=[network])


def test_a_vm_that_ends_meanwhile_keeps_no_interface(namespaces, plugged):
    ip("link add testbr0 type bridge")
    made = plugged.store.announced

    def announced(number, mac):
        made(number, mac)
        plugged.store.remove("/local/domain/7/vm")

    plugged.store.announced = announced
    with pytest.raises(runx.NotRunning):
        plugged(networks=[{**ATTACHMENT, "bridge": "testbr0", "addresses": ["10.9.0.5/24"]}])
    assert plugged.container.state.devices == plugged.container.state.plugged == []
    assert [node for node in plugged.store.nodes if "/vif" in node] == []


def test_no_network_is_no_interface(plugged):
    store, container = plugged(namespace=None)
    assert (list(store.nodes), container.state.devices) == (["/local/domain/7/vm"], [])


@pytest.fixture
def own(namespaces, tmp_path):
    """The path of a namespace as runX makes one for plugins."""
    path = str(tmp_path / "own")
    runx.make_namespace(path)
    yield path
    call("umount", "--lazy", path)


@pytest.fixture
def engine(namespaces):
    """A process in a namespace as an engine makes it, with an eth0 and an eth2."""
    process = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE)
    process.stdout.readline()
    path = f"/proc/{process.pid}/ns/net"
    for line in (
        "link add eth2 address 02:00:00:00:00:22 mtu 1400 type veth peer name out2", "link set eth2 up",
        "link add eth0 address 02:00:00:00:00:20 type veth peer name out0", "address add 10.4.0.1/24 dev eth0",
    ):  # fmt: skip
        ip(line, path)
    yield process, path
    process.kill()
    process.communicate()


def test_the_engines_links_forward_to_the_vifs(namespaces, plugged, engine, own, monkeypatch):
    process, path = engine
    redirected = []
    monkeypatch.setattr(runx, "redirect", lambda netlink, *numbers: redirected.append(numbers))
    ip("link add eth5 up address 02:00:00:00:00:25 mtu 1400 type veth peer name out5", own)
    network = {**ATTACHMENT, "namespace": own, "interface": "eth5", "bridge": "", "addresses": ["10.9.0.5/24"],
               "gateways": ["10.9.0.1"], "rate": "5,10", "dhcp": True}  # fmt: skip
    store, container = plugged(namespace="", pid=process.pid, networks=[network], rate="7,8")
    # eth0 and eth2 of the engine's, and eth1 of the network's
    ends = [("eth0", path), ("eth5", own), ("eth2", path)]
    assert redirected == [(index_of(name, at), index_of(f"vif7.{n}", at)) for n, (name, at) in enumerate(ends)]
    assert joined(container) == ["eth0", "eth5", "eth2"]
    moved = ip("-d link show dev vif7.1", own)[0]
    assert moved["mtu"] == 1400 and "UP" in moved["flags"] and moved["inet6_addr_gen_mode"] == "none"
    backend = "/local/domain/0/backend/vif/7"
    assert [store.nodes[f"{backend}/{number}/rate"] for number in range(3)] == ["7,8", "5,10", "7,8"]
    assert f"{backend}/0/bridge" not in store.nodes
    assert store.nodes["/local/domain/7/data/dhcp"] == "eth1"
    assert [text.split()[0] for text in told(store)] == ["020000000020", "020000000025", "020000000022"] * 2
    assert len({text.split()[1] for text in told(store)}) == 6  # their names
    mac, *words = told(store)[3].split()
    apply(words, namespaces, mac)
    assert [each["local"] for each in addresses_of("eth0", namespaces)] == ["10.4.0.1"]


@pytest.fixture
def ended(monkeypatch):
    """Numbers of the links whose redirection has ended; none is made."""
    numbers = []
    monkeypatch.setattr(runx, "redirect", lambda *_: None)
    monkeypatch.setattr(runx, "end_redirect", lambda _, number: numbers.append(number))
    return numbers


def test_what_a_start_of_an_older_runx_has_redirected_is_ended(plugged, engine, ended):
    process, path = engine
    state = {"pid": process.pid, "pid_start_time": 1, "namespace": path, "joined": ["eth2"]}
    runx.fill_up(state)
    _, container = plugged(namespace=path, pid=process.pid, plugged=state["plugged"])
    assert ended == [index_of("eth2", path)]
    assert joined(container) == ["eth0", "eth2"]


def index_of(device, namespace):
    return ip(f"link show dev {device}", namespace)[0]["ifindex"]


def test_only_what_has_changed_is_plugged_again(plugged, engine, ended):
    """As between `create` and `start`: one link gone, one new, one made again, one of another MTU."""
    process, path = engine
    ip("link add eth1 up address 02:00:00:00:00:21 type veth peer name out1", path)
    store, container = plugged(namespace=path, pid=process.pid)
    assert container.state.devices == [["vif", 0], ["vif", 1], ["vif", 2]] and ended == []
    first = index_of("eth1", path), index_of("eth2", path)
    for line in (
        "link del eth0", "link del eth1", "link set eth2 mtu 1300",
        "link add eth1 up address 02:00:00:00:00:21 type veth peer name out1",
        "link add eth3 up address 02:00:00:00:00:23 type veth peer name out3",
    ):  # fmt: skip
        ip(line, path)
    backends = set(store.list("/local/domain/0/backend/vif/7"))
    plugged()
    assert container.state.devices == [["vif", 1], ["vif", 2], ["vif", 3]]
    assert joined(container) == ["eth1", "eth2", "eth3"]
    # nobody is joined to what is gone; of the two others all ends that are still there let go, and are joined anew
    assert ended == [index_of(name, path) for name in ("vif7.0", "vif7.1", "eth2", "vif7.2")]
    assert first[0] != index_of("eth1", path) and first[1] == index_of("eth2", path)
    assert ip("link show dev vif7.2", path)[0]["mtu"] == 1300
    assert (backends, set(store.list("/local/domain/0/backend/vif/7"))) == ({"0", "1", "2"}, {"1", "2", "3"})
    assert [text.split()[0] for text in told(store)] == ["020000000021", "020000000022", "020000000023"] * 2
    del ended[:]
    plugged()
    assert ended == [] and joined(container) == ["eth1", "eth2", "eth3"]


def test_what_filters_multicast_takes_all_as_long_as_a_vif_is_joined_to_it(plugged, engine, ended):
    process, path = engine
    add = "ip link add eth{0} address 02:00:00:00:00:3{0} up link out0 type macvlan mode bridge"
    for number in (6, 7):
        if runx.in_namespace(path, lambda: call(*add.format(number).split())).returncode:  # noqa: B023
            pytest.skip("this kernel has no macvlan")
    ip("link set eth7 allmulticast on", path)

    def taking():
        return [link["ifname"] for link in ip("link show", path) if "ALLMULTI" in link["flags"]]

    _, container = plugged(namespace=path, pid=process.pid)
    assert taking() == ["eth6", "eth7"]
    ip("link set eth6 mtu 1300", path)
    plugged()
    assert taking() == ["eth6", "eth7"] and len(ended) == 2
    runx.end_redirects(container.state)
    assert taking() == ["eth7"]  # which was so before


def test_links_that_have_got_each_others_names_stay_joined(plugged, engine, monkeypatch):
    process, path = engine
    classified = set()  # numbers of the links

    def redirect(_, *numbers):
        if classified.intersection(numbers):
            raise FileExistsError(errno.EEXIST, "File exists")
        classified.update(numbers)

    monkeypatch.setattr(runx, "redirect", redirect)
    monkeypatch.setattr(runx, "end_redirect", lambda _, number: classified.discard(number))
    _, container = plugged(namespace=path, pid=process.pid)
    before = set(classified)
    for old, new in (("eth0", "x"), ("eth2", "eth0"), ("x", "eth2")):
        ip(f"link set {old} down", path)
        ip(f"link set {old} name {new} up", path)
    plugged()
    assert (classified, joined(container), len(before)) == (before, ["eth2", "eth0"], 4)


def test_what_comes_under_the_name_of_a_link_that_is_gone_keeps_its_own_classifier(plugged, engine, ended):
    process, path = engine
    plugged(namespace=path, pid=process.pid)
    ip("link del eth0", path)
    ip("link add eth0 up address 02:00:00:00:00:24 type veth peer name out4", path)
    plugged()
    assert ended == [index_of("vif7.0", path)]


def test_what_has_not_changed_needs_no_room_on_the_disk(plugged, engine, ended, monkeypatch):
    process, path = engine
    store, container = plugged(namespace=path, pid=process.pid)
    monkeypatch.setattr(container, "save", None)
    with runx.Undo(runx.Log()) as undo:
        assert runx.plug(container, undo).keys() >= {"data/network/0", "data/network/1"}


def test_a_redirection_that_cannot_be_stored_is_ended(plugged, engine, ended, monkeypatch):
    process, path = engine
    save = runx.Container.save

    def save_no_link(container, **changes):
        if container.state.plugged:
            raise runx.Error("no space")
        save(container, **changes)

    monkeypatch.setattr(runx.Container, "save", save_no_link)
    with pytest.raises(runx.Error, match="no space"):
        plugged(namespace=path, pid=process.pid)
    assert ended == [index_of("eth0", path), index_of("vif7.0", path)]
    assert plugged.container.state.devices == plugged.container.state.plugged == []


def test_two_of_one_name_are_refused(plugged, engine):
    plugged.store.nodes["/libxl/7/device/vif/0/frontend"] = ""
    with pytest.raises(runx.Error, match="the VM has an eth0 of xl's settings, and one of the engine's network namesp"):
        plugged(namespace="", pid=engine[0].pid)
    with pytest.raises(runx.Error, match="network net: its plugins have made no interface eth7 that is up"):
        plugged(namespace=None, networks=[{**ATTACHMENT, "namespace": engine[1], "interface": "eth7", "bridge": ""}])


def test_two_of_one_mac_address_both_have_it_in_the_vm(namespaces, plugged, engine, monkeypatch):
    """As two of vlan or ipvlan on one link: the VM finds the second one by another address, before it sets its own."""
    monkeypatch.setattr(runx, "redirect", lambda *args: None)
    process, path = engine
    for line in ("link set eth0 down", "link set eth0 address 02:00:00:00:00:22"):
        ip(line, path)
    store, container = plugged(namespace="", pid=process.pid)
    first, second = [store.nodes[f"/local/domain/7/device/vif/{number}/mac"] for number in (0, 1)]
    assert first == "02:00:00:00:00:22" != second and int(second[:2], 16) & 3 == 2  # locally administered, of one
    texts = told(store)
    assert [text.split()[0] for text in texts] == [mac.replace(":", "") for mac in (first, second)] * 2
    for text in texts:
        mac, *words = text.split()
        apply(words, namespaces, mac)
    shown = {name: ip(f"link show dev {name}", namespaces)[0] for name in ("eth0", "eth2")}
    assert [each["address"] for each in shown.values()] == [first, first]
    assert [each["mtu"] for each in shown.values()] == [1500, 1400] and joined(container) == ["eth0", "eth2"]
    plugged()  # by `start`, which finds what `create` has plugged
    assert (told(store), container.state.devices) == (texts, [["vif", 0], ["vif", 1]])


def test_two_of_one_mac_address_are_refused_where_the_vm_sets_them_up_by_itself(plugged, engine):
    ip("link set eth0 down", engine[1])
    ip("link set eth0 address 02:00:00:00:00:22", engine[1])
    with pytest.raises(runx.Error, match="the VM's eth0 and eth2 have one MAC address, 02:00:00:00:00:22, and the sys"):
        plugged(namespace="", pid=engine[0].pid, own_init=True)
    assert plugged.container.state.devices == plugged.container.state.plugged == []
    assert [node for node in plugged.store.nodes if "/vif" in node] == []


def test_interfaces_are_in_the_order_of_their_names(plugged, engine, monkeypatch):
    process, path = engine
    ip("link add eth10 up type veth peer name ab", path)
    ip("link set ab up", path)
    made = runx.find_interfaces(plugged.container, 0, None)
    assert made == []
    networks = [{**ATTACHMENT}, {**ATTACHMENT, "mac": "02:00:00:00:00:02"}]
    plugged.container.save(namespace="", pid=process.pid, networks=networks)
    names = [each.name for each in runx.find_interfaces(plugged.container, 0, None)]
    assert names == ["eth0", "eth1", "eth2", "eth3", "eth10", "ab"]
    plugged.container.save(namespace=None)
    assert [each.name for each in runx.find_interfaces(plugged.container, 2, None)] == ["eth2", "eth3"]


TWO_RANGES = {"ranges": [[{"subnet": f"10.{n}.0.0/24", "gateway": f"10.{n}.0.1"} for n in (0, 1)]]}


def default_gateways(made):
    routes = [route for route in runx.attachment_interface(made, None).routes if not route.head[1]]
    return [".".join(map(str, route.attributes[runx.RTA_GATEWAY])) for route in routes]


@pytest.mark.parametrize("routes", [[], [{"dst": "0.0.0.0/0"}]])
@pytest.mark.parametrize("ipam, address", [("plugin", "10.1.0.7"), ("plugin", "10.1.0.7/8"), ("plugin", "auto"),
                                           ("absent", "10.1.0.7"), ("absent", "10.1.0.7/8")])  # fmt: skip
def test_the_default_route_is_by_the_gateway_of_the_address(planned, plugin, ipam, address, routes):
    result = {"ips": [{"address": "10.1.0.7/24", "gateway": "10.1.0.1"}], "routes": routes}
    plugin(f"echo '{json.dumps(result)}'")
    network, made, _ = planned({**NET, "ipam": {"type": ipam, "routes": routes, **TWO_RANGES}}, address)
    runx.attach_network(made, network)
    assert default_gateways(made) == ["10.1.0.1"]


def test_the_default_route_of_what_plugins_make_is_by_the_gateway_of_its_address(namespaces):
    for line in ("link add eth0 up type veth peer name x", "address add 10.1.0.7/24 dev eth0"):
        ip(line)
    made = attachment(bridge="", namespace="/proc/self/ns/net", gateways=["10.0.0.1", "10.1.0.1"])
    assert default_gateways(made) == ["10.1.0.1"]


def test_an_address_that_a_plugin_has_set_stays_as_it_is(namespaces):
    for line in ("link add eth0 up type veth peer name x", "address add 10.9.0.5/24 dev eth0",
                 "link set x up", "route add default via 10.9.0.7"):  # fmt: skip
        ip(line)
    made = attachment(bridge="", namespace="/proc/self/ns/net", addresses=["10.9.0.5/24", "10.9.0.6/24"],
                      gateways=["10.9.0.1", "fd00::1"], rate="1,1", dhcp=True)  # fmt: skip
    interface = runx.attachment_interface(made, None)
    local = [each.attributes[runx.IFA_LOCAL] for each in interface.addresses if each.head[0] == runx.AF_INET]
    assert local == [bytes([10, 9, 0, 5]), bytes([10, 9, 0, 6])] and (interface.rate, interface.dhcp) == ("1,1", True)
    ways = [each.attributes[runx.RTA_GATEWAY] for each in interface.routes if not each.head[1] and each.head[0] == 2]
    assert ways == [bytes([10, 9, 0, 7])]


def test_ends_of_a_redirection(namespaces):
    """What classifies the engine's traffic goes with its VM's, and only then; and nobody minds what is gone."""
    for line in ("link add eth0 type veth peer name vif7.0", "link add eth1 type veth peer name vif8"):
        ip(line, namespaces)
    netlink = runx.Rtnetlink(namespaces)
    ingress = (0, netlink.find_link("eth0").index, runx.INGRESS_HANDLE, runx.TC_H_INGRESS, 0)
    look = lambda: call("tc", "qdisc", "show", "dev", "eth0").stdout  # noqa: E731

    vif = {"number": 0, "mac": "", "mtu": 0, "namespace": "/proc/0/ns/net", "index": 0}
    both = [{**vif, "device": name} for name in ("gone", "eth0")]

    def end(**state):
        runx.end_redirects(runx.State(**{"domid": 7, "plugged": both, "namespace": namespaces, **state}))
        return b"ingress" not in runx.in_namespace(namespaces, look)

    netlink.request(runx.Message(runx.RTM_NEWQDISC, ingress, {runx.TCA_KIND: "ingress"}), runx.NLM_F_CREATE)
    assert not end(namespace="") and not end(namespace="/gone") and not end(namespace=None)
    assert not end()  # vif8 is another VM's
    ip("link set vif8 name other", namespaces)
    assert not end(plugged=[{**vif, "device": ""}])
    # by a command that finds the holder killed, too; where the namespace was its own, that is gone
    for namespace, stays in (("", True), (namespaces, False)):
        runx.end_redirection(runx.State(domid=7, namespace=namespace), runx.Vif(**both[1]))
        assert (b"ingress" in runx.in_namespace(namespaces, look)) is stays
    assert end() and end()


@pytest.mark.parametrize("changes", [0, 3, 1000])
def test_links_that_change_while_they_are_told_are_asked_for_again(changes):
    """<linux/netlink.h>: NLM_F_DUMP_INTR.  The kernel tells of veth0 only when nothing changes."""

    class Changing:
        asked = 0

        def send(self, data):
            self.asked += 1

        def recv(self, size):
            changed, names = (0x10, ["lo"]) if self.asked <= changes else (0, ["lo", "veth0"])
            return b"".join(told(16, 2 | changed, name) for name in names) + told(3, 2 | changed, None)

    def told(kind, flags, name):
        body = bytes(16) + runx.pack_attributes({runx.IFLA_IFNAME: name}) if name else bytes(4)
        return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body

    netlink = runx.Rtnetlink()
    netlink.socket.close()
    netlink.socket = Changing()
    found = [link.name for link in netlink.links()]
    assert found == (["lo"] if changes == 1000 else ["lo", "veth0"])
    assert netlink.socket.asked == min(changes + 1, 32)


class Recorder:
    """Takes the messages of a Rtnetlink, and fails at one of them."""

    def __init__(self, fails=-1):
        self.sent, self.fails = [], fails

    def request(self, message, flags=0):
        self.sent.append(message.pack(flags).hex())
        if len(self.sent) - 1 == self.fails:
            raise OSError(errno.EEXIST, "File exists")


QDISC = (
    "30000000 2400 0506 0000000000000000 00000000 {0:02x}000000 0000ffff f1ffffff 00000000 0c000100 696e677265737300"
)
FILTER = (
    "70000000 2c00 0506 0000000000000000 00000000 {0:02x}000000 00000000 0000ffff 00030100"
    "0d000100 6d61746368616c6c00000000 3c000200 38000200 34000100 0b000100 6d697272656400 00"
    "24000200 20000200 0000000000000000 04000000 0000000000000000 01000000 {1:02x}000000"
)
DELETE = "24000000 2500 0500 0000000000000000 00000000 {0:02x}000000 0000ffff f1ffffff 00000000"


def test_a_redirection_has_two_ways(monkeypatch):
    """struct tcmsg, TCA_KIND and so on, as <linux/pkt_sched.h>, pkt_cls.h and tc_act/tc_mirred.h have them."""

    def expected(form, *numbers):
        return form.format(*numbers).replace(" ", "")

    netlink = Recorder()
    runx.redirect(netlink, 3, 9)
    both = [expected(QDISC, 3), expected(FILTER, 3, 9), expected(QDISC, 9), expected(FILTER, 9, 3)]
    assert netlink.sent == both
    for fails, ended in ((0, []), (1, [3]), (2, [3]), (3, [3, 9])):
        netlink = Recorder(fails)
        with pytest.raises(OSError, match="File exists"):
            runx.redirect(netlink, 3, 9)
        assert netlink.sent == both[: fails + 1] + [expected(DELETE, number) for number in ended]


def test_traffic_is_redirected(namespaces):
    """Between eth0 and a vif in one namespace, from a host at the other end of eth0 to the guest behind the vif."""
    for line in ("link add eth0 up type veth peer name host0", "address add 10.9.0.1/24 dev host0", "link set host0 up",
                 f"link add vif7.0 up type veth peer name guest0 netns {namespaces}"):  # fmt: skip
        ip(line)
    for line in ("link set guest0 up", "address add 10.9.0.5/24 dev guest0"):
        ip(line, namespaces)
    netlink = runx.Rtnetlink()
    eth0, vif = (netlink.find_link(name).index for name in ("eth0", "vif7.0"))
    try:
        runx.redirect(netlink, eth0, vif)
    except FileNotFoundError:
        assert b"ingress" not in call("tc", "qdisc", "show", "dev", "eth0").stdout
        pytest.skip("this kernel has no cls_matchall or act_mirred")
    assert ping("10.9.0.5")
    with pytest.raises(FileExistsError):
        runx.redirect(netlink, eth0, vif)
    runx.end_redirect(netlink, eth0)
    assert not ping("10.9.0.5")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EEXIST, "eth0: eth0 is another VM's, or something else classifies its traffic"),
        (errno.ENOENT, "eth0: No such file or directory: is dom0's kernel without sch_ingress, cls_matchall and act_m"),
        (errno.EPERM, "eth0: Operation not permitted$"),
    ],
)
def test_why_a_vif_cannot_be_joined(monkeypatch, number, words):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runx, "join_namespace", fail)
    interface = runx.Interface("", "", 0)
    interface.device = "eth0"
    with pytest.raises(runx.Error, match=f"cannot connect the VM to {words}"):
        runx.join(interface, None)


def test_a_link_that_has_gone_meanwhile_is_an_error(namespaces, engine):
    ip(f"link add vif7.0 type veth peer name guest0 netns {namespaces}")
    interface = runx.Interface("", "", 1500)
    interface.namespace, interface.device = engine[1], "gone"
    with pytest.raises(runx.Error, match="cannot connect the VM to gone: gone or vif7.0 is gone"):
        runx.join(interface, "vif7.0")
    assert "vif7.0" in [link["ifname"] for link in ip("link show", engine[1])]


def test_the_kernels_refusal_is_an_oserror(namespaces):
    with pytest.raises(OSError) as caught:
        runx.Rtnetlink().set_link(99, {}, up=True)
    assert caught.value.errno == errno.ENODEV
    with contextlib.suppress(OSError):
        runx.make_silent(runx.Rtnetlink(), 99)
