"""NETCONF, CNI files and plugins, and what the guest is told: all that needs no network."""

import os
import re

import pytest
from conftest import wait_until

import runx


def netconf_file(folder, text):
    folder.chmod(0o755)
    path = folder / "net.conf"
    path.write_text(text)
    return str(path)


def load_network(folder, text, name="net", address=""):
    return runx.load_network(("NETCONF", netconf_file(folder, text), name, address), [str(folder)])


OTHER = '{"name": "other", "type": "x"}'
BRIDGE = '{"name": "net", "type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.0.0/16"}}'


def test_netconf_variables_are_taken_in_order():
    env = ["NETCONF2=/c,n", "NETCONF=/a,n,10.0.0.1", "NETCONFIG=x", "NETCONF1=/b,n,auto", "NETCONF10=", "PATH=/bin"]
    env += ["NETCONF\u0663=/d,n", "NETCONF\uff11=/e,n", "NETCONF\u00b2=/f,n"]  # digits of others
    assert runx.parse_netconf(env) == [
        ("NETCONF", "/a", "n", "10.0.0.1"), ("NETCONF1", "/b", "n", "auto"), ("NETCONF2", "/c", "n", ""),
    ]  # fmt: skip
    for value in ("/a", "a,n", "/a,"):
        with pytest.raises(runx.Error, match="NETCONF must be"):
            runx.parse_netconf([f"NETCONF={value}"])


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
    assert (network.name, network.mode) == ("net", mode)
    assert [str(each) for each in network.addresses] == (["10.1.2.3/16"] if address == "10.1.2.3" else [])


@pytest.mark.parametrize(
    "text, address, words",
    [
        ("", "", "must hold JSON objects"),
        ("{", "", "cannot read the networks"),
        ("[1]", "", "must hold JSON objects"),
        ('{"name": "other", "type": "bridge"}', "", "0 networks net, not one; it has other"),
        ('{"name": "net", "type": "../x"}', "", "not the name of a plugin"),
        ('{"name": "net", "type": ""}', "", "not the name of a plugin"),
        ('{"name": "net", "type": ".."}', "", "not the name of a plugin"),
        ('{"name": "net", "type": "a\\nb"}', "", "not the name of a plugin"),
        (r'{"name": "net", "type": "a\u0000b"}', "", "type holds a NUL or half a character"),
        (r'{"name": "net", "type": "a\ud800b"}', "", "type holds a NUL or half a character"),
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
        ('{"name": "net", "cniVersion": "2.0.0", "type": "bridge"}', "", "cniVersion 2.0.0 is not one of"),
        ('{"name": "net", "plugins": []}', "", "plugins must hold objects"),
        ('{"name": "net", "type": "bridge"}', "10.0.0.1", "give 10.0.0.1 with its prefix"),
        ('{"name": "net", "type": "bridge"}', "auto", "has no ipam that chooses"),
        (BRIDGE, "10.2.0.1", "10.2.0.1 is not in 10.1.0.0/16"),
        ('{"name": "net", "type": "bridge", "ipam": {"subnet": "x"}}', "10.2.0.1", "cannot understand its ipam"),
    ],
)
def test_a_network_that_cannot_be_is_refused(tmp_path, text, address, words):
    with pytest.raises(runx.Error, match=re.escape(words)):
        load_network(tmp_path, text, address=address)


def test_a_file_that_others_may_write_is_not_trusted(tmp_path):
    path = netconf_file(tmp_path, '{"name": "net", "type": "bridge"}')
    os.chmod(path, 0o666)
    with pytest.raises(runx.Error, match="not to be trusted"):
        runx.load_network(("NETCONF", path, "net", ""), [str(tmp_path)])
    with pytest.raises(runx.Error, match="in none of the folders"):
        runx.load_network(("NETCONF", "/etc/passwd", "net", ""), [str(tmp_path)])


def attachment(**changes):
    fields = {
        "network": "net", "calls": [["plugin", {"name": "net"}]], "identity": "id", "interface": "eth0",
        "namespace": "/none", "result": None, "bridge": "br", "mac": "02:00:00:00:00:01", "mtu": 0, "rate": "",
        "dhcp": False, "addresses": [], "routes": [], "gateways": [], "dns": {}, **changes,
    }  # fmt: skip
    return runx.Attachment(**fields)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that installs a shell script as the CNI plugin "plugin"."""
    monkeypatch.setenv("CNI_PATH", str(tmp_path))

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
    assert (tmp_path / "stdin").read_text() == '{"name": "net"}'


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
    texts = runx.split_words(["mac", *["x" * 1000] * 7])
    assert [text.split()[0] for text in texts] == ["mac"] * 3
    assert sum(text.count("x") for text in texts) == 7000 and max(map(len, texts)) <= runx.GUEST_NODE_MAX
