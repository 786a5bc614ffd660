# SPDX-License-Identifier: Apache-2.0
"""The VM's network: NETCONF with and without plugins, DHCP, the engine's namespace; and that nothing of it stays."""

import contextlib
import functools
import http.server
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from conftest import (
    IMAGE,
    Bundle,
    call,
    config,
    fetch,
    listing,
    namespaces,
    wait_for,
    wait_in,
    wait_in_xenstore,
    wait_until,
)

import runx

FOLDER = pathlib.Path("/etc/cni/net.d")

LEASES = pathlib.Path("/run/runx-test-ipam")

SUBNET = "10.77.0.0/24"


def host_state():
    """What a network may leave in dom0 beside what clean_dom0 looks at."""
    links = set(os.listdir("/sys/class/net"))
    # the empty chains that the firewall plugin makes once for all containers have no address
    rules = [line for line in call("iptables-save").stdout.decode().splitlines() if " 10.7" in line]
    addresses = {path for path in LEASES.rglob("*") if path.name[0].isdigit()}
    return {"links": links, "rules": rules, "addresses": addresses, "namespaces": listing("/run/netns")}


def ip(*commands, inside=()):
    """Run several of ip's commands in one process.  inside: the options for a namespace."""
    done = call("ip", *inside, "-batch", "-", input="\n".join(commands).encode())
    assert done.returncode == 0, done


@pytest.fixture
def network(clean_dom0, tmp_path):
    """A bridge of dom0's, a web server on it, and networks for NETCONF; afterwards dom0's interfaces are as before."""
    assert call("modprobe", "ifb").returncode == 0
    ip("link add testbr0 type bridge", "address add 10.77.0.1/24 dev testbr0",
       "address add fd77::1/64 dev testbr0 nodad", "link set testbr0 up")  # fmt: skip
    (tmp_path / "page").write_text("hello from dom0\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("10.77.0.1", 8080), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FOLDER.mkdir(parents=True, exist_ok=True)
    before = host_state()
    yield write_network
    server.shutdown()
    server.server_close()
    for path in FOLDER.glob("*test-*"):
        path.unlink()
    try:
        wait_until(lambda: host_state() == before, "dom0's network as before", 10)
    except AssertionError:
        pytest.fail(f"left behind or taken away: {[(now, before[key]) for key, now in host_state().items()]}")
    finally:
        call("ip", "link", "del", "testbr0")
        shutil.rmtree(LEASES, ignore_errors=True)


def ipam(*subnets, **more):
    ranges = [[{"subnet": subnet}] for subnet in subnets or (SUBNET, "fd77::/64")]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    return {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": str(LEASES), **more}


def write_network(name="net", version="1.0.0", plugins=None, **settings):
    """Write a file with one network, after another one; return what NETCONF names it by."""
    first = {"type": "bridge", "bridge": "testbr0", "ipam": ipam(), **settings}
    document = {"cniVersion": version, "name": name}
    document.update({"plugins": [first, *plugins]} if plugins is not None else first)
    path = FOLDER / f"test-{name}.conf"
    other = {"cniVersion": "0.2.0", "name": "other", "type": "bridge"}
    path.write_text(json.dumps(other) + "\n" + json.dumps(document))
    return f"{path},{name}"


def wants(bundle, *args, netconf=(), namespace=None, rootfs="ramdisk"):
    """A config that asks for these networks; the bundle gets the commands of busybox's that use one."""
    bundle.add_applets("ip", "ping", "wget", "nc", "httpd", "grep", "hostname")
    env = ["PATH=/bin", *(f"NETCONF{number or ''}={value}" for number, value in enumerate(netconf))]
    spec = config(*args, env=env)
    spec["annotations"] = {"org.runx.rootfs": rootfs}
    spec["linux"] = {"namespaces": namespaces(network=namespace)}
    return spec


LOOK = "ip -o address show; ip route; ip -6 route; cat /etc/resolv.conf; wget -q -O - http://10.77.0.1:8080/page"


@pytest.mark.main_path
def test_networks_of_several_kinds_and_versions_in_one_vm(bundle, network):
    """A static address by CNI 0.2.0, two by 1.1.0 on the same bridge, and a point-to-point network."""
    dns = {"nameservers": ["10.77.0.53"], "search": ["test"]}
    ipv4 = {"type": "host-local", "subnet": SUBNET, "gateway": "10.77.0.1", "dataDir": str(LEASES)}
    netconf = [
        network("old", version="0.2.0", ipam=ipv4, dns=dns) + ",10.77.0.7",
        network("new", version="1.1.0", ipam=ipam("10.78.1.0/24", "fd77::/64", routes=[])) + ",10.78.1.7;fd77::7/64",
        network("point", type="ptp", ipam=ipam("10.78.0.0/24", routes=[])),
    ]
    script = LOOK + "; ping -c 1 -w 9 fd77::1 >/dev/null && echo v6; ping -c 1 -w 9 10.78.0.1 >/dev/null && echo ptp"
    result = bundle.run(wants(bundle, "sh", "-c", script, netconf=netconf, rootfs="9p"))
    text = result.stdout.decode()
    assert "inet 10.77.0.7/24" in text and "default via 10.77.0.1 dev eth0" in text, result
    assert "eth1    inet 10.78.1.7/24" in text and "inet6 fd77::7/64" in text and "eth2    inet 10.78.0." in text, text
    assert "nameserver 10.77.0.53\nsearch test\n" in text and text.endswith("hello from dom0\nv6\nptp\n"), text
    assert not (bundle.rootfs / "etc/resolv.conf").read_text()


def test_guests_reach_each_other_and_an_address_is_reserved_until_delete(bundle, network, second):
    """Also after the container was killed by its pid."""
    netconf = network()
    (bundle.rootfs / "page").write_text("hello from a VM\n")
    pidfd = bundle.started(wants(bundle, "httpd", "-f", "-h", "/", netconf=[f"{netconf},10.77.0.7"]))
    script = "ping -c 1 -w 9 10.77.0.7 >&2; wget -q -O - http://10.77.0.7/page"
    result = second.run(wants(second, "sh", "-c", script, netconf=[f"{netconf},auto"]))
    assert result.stdout == b"hello from a VM\n", result
    assert fetch("http://10.77.0.7/page") == b"hello from a VM\n"
    os.kill(bundle.pid(), signal.SIGKILL)
    wait_for(pidfd)
    second.write_config(wants(second, "true", netconf=[f"{netconf},10.77.0.7"]))
    message = second.refused("create")
    assert "CNI plugin host-local, ADD: " in message and "requested IP address 10.77.0.7 is not available" in message
    bundle.succeed("delete")
    assert not list(LEASES.glob("net/10.77.*"))


@pytest.fixture
def outside(network, tmp_path):
    """Another host, beyond dom0: a namespace with a web server that knows no way to the networks of containers."""
    call("ip", "netns", "add", "outside")
    ip("link add testout0 type veth peer name eth0 netns outside", "address add 10.79.0.1/24 dev testout0",
       "link set testout0 up")  # fmt: skip
    ip("address add 10.79.0.2/24 dev eth0", "link set eth0 up", inside=("-n", "outside"))
    (tmp_path / "outside").write_text("hello from outside\n" * 10000)
    command = ["ip", "netns", "exec", "outside", "busybox", "httpd", "-f", "-h", str(tmp_path)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield
    server.kill()
    server.wait()
    call("ip", "netns", "del", "outside")
    call("umount", "/run/netns")  # which ip has mounted


def test_the_bridge_plugin_and_a_chain_of_others(bundle, network, outside):
    """A firewall, a limit and a published port; and through masquerading to another host and back."""
    port = {"hostPort": 8089, "containerPort": 80, "protocol": "tcp"}
    chain = [
        {"type": "tuning", "sysctl": {"net.ipv4.conf.all.log_martians": "1"}},
        {"type": "firewall"},
        {"type": "bandwidth", "egressRate": 80_000_000, "egressBurst": 8_000_000},
        {"type": "portmap", "snat": True, "capabilities": {"portMappings": True},
         "runtimeConfig": {"portMappings": [port]}},
    ]  # fmt: skip
    netconf = network(plugins=chain, hairpinMode=True, isGateway=True, ipMasq=True, mtu=1400)
    (bundle.rootfs / "page").write_text("hello from a VM\n")
    script = LOOK + "; ip link show eth0; wget -q -O - http://10.79.0.2/outside | tail -n 1; exec httpd -f -h /"
    bundle.started(wants(bundle, "sh", "-c", script, netconf=[f"{netconf},10.77.0.15"]))
    wait_until(lambda: fetch("http://10.77.0.1:8089/page") == b"hello from a VM\n", "the VM's page", 60)
    text = bundle.output()
    assert "hello from dom0\n" in text and text.endswith("hello from outside\n"), text
    assert "default via 10.77.0.1" in text and "inet 10.77.0.15/24" in text and "mtu 1400" in text, text
    backend = f"/local/domain/0/backend/vif/{bundle.domain()}/0"
    assert runx.Xenstore().read(f"{backend}/rate") == "500000,50000"
    bundle.succeed("delete", "--force")


@pytest.fixture
def cables(network):
    """Two links of dom0's: testlink0, which ends in the bridge, and testlink2, which ends in dom0, at 10.78.4.1."""
    ip("link add testlink0 type veth peer name testlink1", "link set testlink1 master testbr0 up",
       "link add testlink2 type veth peer name testlink3", "address add 10.78.4.1/24 dev testlink3",
       "link set testlink3 up", "link set testlink0 up", "link set testlink2 up")  # fmt: skip
    yield
    ip("link del testlink1", "link del testlink3")


def test_links_of_the_hosts(bundle, network, cables):
    """A VM with one of each kind: a macvlan, a device that moves and comes back, and two VLANs, whose MAC address is
    their link's in the VM, too."""
    assert call("modprobe", "8021q").returncode == 0
    netconf = [network("macvlan", type="macvlan", master="testlink0") + ",auto"]
    device = {"type": "host-device", "device": "testlink2", "ipam": ipam("10.78.4.0/24", routes=[])}
    netconf.append(network("device", **device) + ",10.78.4.7")
    for number in (5, 6):
        ip(f"link add link testlink1 name testvlan{number} type vlan id {number}",
           f"address add 10.78.{number}.1/24 dev testvlan{number}", f"link set testvlan{number} up")  # fmt: skip
        vlan = {"type": "vlan", "master": "testlink0", "vlanId": number}
        netconf.append(network(f"v{number}", **vlan, ipam=ipam(f"10.78.{number}.0/24", routes=[])) + ",auto")
    mac = pathlib.Path("/sys/class/net/testlink0/address").read_text().strip()
    script = f"ip link; {LOOK}; for n in 4 5 6; do ping -c 1 -w 20 10.78.$n.1 >/dev/null && echo through $n; done"
    result = bundle.run(wants(bundle, "sh", "-c", script, netconf=netconf))
    text = result.stdout.decode()
    assert "hello from dom0" in text and "default via 10.77.0.1 dev eth0" in text, result
    assert text.endswith("through 4\nthrough 5\nthrough 6\n") and "inet 10.78.4.7/24" in text, text
    assert text.count(f"link/ether {mac} ") == 2, text
    wait_until(lambda: call(*"ip link show testlink2".split()).returncode == 0, "the link's way back")


def test_a_bridge_of_our_own_on_a_host_without_plugins(bundle, network, tmp_path):
    netconf = network(bridge="testbr1", isGateway=True, ipMasq=True, ipam=ipam("10.78.0.0/24"))
    environment = {**os.environ, "CNI_PATH": str(tmp_path)}
    spec = wants(bundle, "sh", "-c", "ip route; ping -c 1 -w 20 10.78.0.1", netconf=[f"{netconf},10.78.0.7"])
    result = bundle.run(spec, env=environment)
    call("ip", "link", "del", "testbr1")
    assert result.returncode == 0 and b"default via 10.78.0.1" in result.stdout, result
    log = bundle.log.read_text()
    assert "ipMasq have no effect without the CNI plugin bridge" in log
    assert "no CNI plugin reserves 10.78.0.7/24" in log
    bundle.write_config(wants(bundle, "true", netconf=[f"{netconf},auto"]))
    refused = bundle.refused("create", env=environment)
    call("ip", "link", "del", "testbr1")
    assert "no address without the CNI plugin host-local: install it in" in refused


@pytest.mark.processors
@pytest.mark.crowd
def test_four_at_once_get_four_addresses_and_give_them_back(network, tmp_path):
    """Each connects to dom0, and lives until that hangs up: once all are there."""
    netconf, runs = network(), []
    door = socket.create_server(("10.77.0.1", 8090), backlog=4)
    door.settimeout(400)
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        bundle = Bundle(tmp_path / str(number))
        bundle.write_config(wants(bundle, "nc", "10.77.0.1", "8090", netconf=[f"{netconf},auto"]))
        with open(bundle.folder / "output", "wb") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            runs.append(subprocess.Popen(bundle.command("run"), **options))
    connections = []
    try:
        with contextlib.suppress(TimeoutError):  # why one does not come, its output says
            while len(connections) < 4:
                connections.append(door.accept())
        leases = len(list(LEASES.glob("net/10.77.*")))
    finally:
        door.close()
        for connection, _ in connections:
            connection.close()
        outputs = [(run.wait(timeout=200), (tmp_path / f"{n}/output").read_text()) for n, run in enumerate(runs)]
    assert outputs == [(0, "")] * 4
    assert len({host for _, (host, _) in connections}) == 4 == leases


@pytest.fixture
def dnsmasq(network, tmp_path):
    log, leases = tmp_path / "dnsmasq.log", tmp_path / "leases"
    command = [
        "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--interface=testbr0", "--bind-interfaces", "--port=0",
        "--dhcp-range=10.77.0.50,10.77.0.59,2m", "--dhcp-option=6,10.77.0.53", f"--dhcp-leasefile={leases}",
        "--log-dhcp", f"--log-facility={log}", "--user=root",
    ]  # fmt: skip
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_in(tmp_path, lambda: log.exists() and "DHCP, IP range" in log.read_text(), "dnsmasq")
    yield log, leases
    daemon.terminate()
    daemon.wait()


def test_a_lease_by_dhcp_has_the_containers_name_and_is_given_back(bundle, network, dnsmasq):
    log, leases = dnsmasq
    pidfd = bundle.started(wants(bundle, "sh", "-c", LOOK + "; exec sleep 1000", netconf=[network()]))
    bundle.wait_for_output("hello from dom0\n")
    text = bundle.output()
    assert "inet 10.77.0.5" in text and "default via 10.77.0.1" in text and "nameserver 10.77.0.53" in text
    assert f" {bundle.id} " in leases.read_text()
    bundle.succeed("kill", "KILL")
    wait_for(pidfd)
    wait_in(log.parent, lambda: "DHCPRELEASE" in log.read_text(), "the release")
    bundle.succeed("delete")


def test_a_lease_by_dhcp_is_renewed(bundle, network, tmp_path):
    """After half of its 16 s, the least for udhcpc; by busybox's server, for dnsmasq gives none of less than 2 min."""
    settings, log = tmp_path / "udhcpd.conf", tmp_path / "udhcpd.log"
    settings.write_text(
        f"interface testbr0\nstart 10.77.0.60\nend 10.77.0.60\nlease_file {tmp_path}/leases\n"
        f"pidfile {tmp_path}/udhcpd.pid\noption subnet 255.255.255.0\noption lease 16\n"
    )
    bundle.created(wants(bundle, "sleep", "1000", netconf=[network()]))
    with open(log, "wb") as output:
        daemon = subprocess.Popen(["busybox", "udhcpd", "-f", str(settings)], stdin=subprocess.DEVNULL, stderr=output)
    try:
        bundle.succeed("start")
        wait_in(tmp_path, lambda: log.read_text().count("sending ACK to 10.77.0.60") == 2, "the renewal")
        assert call("busybox", "ping", "-c1", "-w9", "10.77.0.60").returncode == 0
        bundle.succeed("delete", "--force")
    finally:
        daemon.terminate()
        daemon.wait()


IN_TEST = ("-n", "test")


@pytest.fixture
def namespace(network):
    """A network namespace as an engine makes it."""
    call("ip", "netns", "add", "test")
    ip("link add eth3 mtu 1400 address 02:00:00:00:77:03 netns test type veth peer name testveth",
       "link set testveth master testbr0 up")  # fmt: skip
    ip("link set eth3 up", "address add 10.77.0.33/24 dev eth3", "address add fd77::33/64 dev eth3 nodad",
       "route add 10.99.0.0/16 via 10.77.0.1", "neighbour add 10.77.0.99 lladdr 02:00:00:00:77:99 dev eth3",
       inside=IN_TEST)  # fmt: skip
    yield "/run/netns/test"
    call("ip", "netns", "del", "test")
    call("umount", "/run/netns")  # which ip has mounted


def test_the_engines_namespace_moves_into_the_vm_and_back_and_no_second_vm_gets_it(bundle, network, namespace, second):
    script = "ip -o link show eth3; " + LOOK.replace("cat /etc/resolv.conf;", "cat /proc/net/arp;")
    (bundle.rootfs / "page").write_text("hello from a VM\n")
    bundle.started(wants(bundle, "sh", "-c", f"{script}; exec httpd -f -h /", namespace=namespace))
    wait_until(lambda: fetch("http://10.77.0.33/page") == b"hello from a VM\n", "the page", 60)
    text = bundle.output()
    assert "mtu 1400" in text and "02:00:00:00:77:03" in text and "10.77.0.33/24" in text, text
    assert "fd77::33/64" in text and "10.99.0.0/16 via 10.77.0.1" in text and "02:00:00:00:77:99" in text
    assert "hello from dom0" in text
    others = second.root
    for root, path in (
        (bundle.root, namespace), (others, namespace),  # the engine's own root, and another one's
        (others, f"/proc/{bundle.pid()}/ns/net"),  # by the container's pid, as engines name it
    ):  # fmt: skip
        second.root = root
        second.write_config(wants(second, "true", namespace=path))
        assert "containers cannot share a VM yet" in second.refused("create")
        assert not (root / second.id).exists()
    assert fetch("http://10.77.0.33/page") == b"hello from a VM\n"
    bundle.succeed("delete", "--force")
    # and again, and back from one that ends by itself
    result = second.run(wants(second, "sh", "-c", LOOK, namespace=namespace))
    assert b"10.77.0.33/24" in result.stdout and b"hello from dom0" in result.stdout, result
    inside = call("ip", "netns", "exec", "test", "busybox", "ping", "-c", "1", "-w", "5", "10.77.0.1")
    assert inside.returncode == 0, inside


def test_what_comes_and_goes_between_create_and_start(bundle, network, namespace):
    """Of the engine's interfaces the first is plugged by `create`; the names that the VM's kernel gives are others'."""
    ip("link set eth3 down", "link set eth3 name eth1", "link set eth1 up", "address replace 10.77.0.33/24 dev eth1",
       inside=IN_TEST)  # fmt: skip
    script = "ip -o link show; " + LOOK
    pidfd = bundle.created(wants(bundle, "sh", "-c", script, namespace=namespace))
    front = f"/local/domain/{bundle.domain()}/device/vif"
    state = runx.Xenstore()
    wait_in_xenstore(f"{front}/0", lambda: state.read(f"{front}/0/state") == runx.XENBUS_CONNECTED, "the interface")
    for number in (0, 2):
        ip(f"link add eth{number} address 02:00:00:00:77:0{number} netns test type veth peer name testveth{number}",
           f"link set testveth{number} master testbr0 up")  # fmt: skip
    # the one that is there gets another address, and the first two of the kernel's names change their owners
    ip("link set eth0 up", "address add 10.77.0.40/24 dev eth0", "link set eth2 up",
       "address add 10.77.0.42/24 dev eth2", "address add 10.77.0.34/24 dev eth1", inside=IN_TEST)  # fmt: skip
    bundle.succeed("start")
    wait_for(pidfd)
    text = bundle.output()
    found = {line.split()[1]: line for line in text.splitlines() if "link/ether" in line}
    for name, number in (("eth0:", "00"), ("eth1:", "03"), ("eth2:", "02")):
        assert f"02:00:00:00:77:{number}" in found[name], text
    for address in ("10.77.0.33/24", "10.77.0.34/24", "10.77.0.40/24", "10.77.0.42/24"):
        assert address in text
    assert "hello from dom0" in text
    bundle.succeed("delete")
    # once more: the one that the VM has goes, and another gets its name
    pidfd = bundle.created(wants(bundle, "sh", "-c", script, namespace=namespace))
    ip("link del eth0", "link del eth2", "link set eth1 down",
       "link set eth1 address 02:00:00:00:77:09 name eth0", "link set eth0 up",
       "address replace 10.77.0.35/24 dev eth0", inside=IN_TEST)  # fmt: skip
    bundle.succeed("start")
    wait_for(pidfd)
    text = bundle.output()
    assert "02:00:00:00:77:09" in text and "10.77.0.35/24" in text and "eth1" not in text and "eth2" not in text, text
    assert "hello from dom0" in text
    bundle.succeed("delete")


def write_plugin(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_what_plugins_refuse_leaves_nothing(bundle, network, tmp_path, monkeypatch):
    monkeypatch.setenv("CNI_PATH", f"{tmp_path}:/usr/lib/cni")
    write_plugin(tmp_path / "fails", """echo '{"code": 11, "msg": "no room", "details": "in here"}'; exit 1""")
    full = LEASES / "full/10.77.0.2"
    full.parent.mkdir(parents=True)
    full.write_text("another\r\neth0")
    chain = network("chain", plugins=[{"type": "firewall"}, {"type": "fails"}], ipMasq=True)
    for netconf, words in (
        (network("full", ipam=ipam("10.77.0.0/30")), "no IP addresses available"),
        (network("missing", bridge="no-such-br"), "there is no bridge no-such-br"),
        (chain, "CNI plugin fails, ADD: no room: in here (code 11)"),
    ):
        bundle.write_config(wants(bundle, "true", netconf=[f"{netconf},auto"]))
        assert words in bundle.refused("create"), netconf
        assert not (bundle.root / bundle.id).exists()
    full.unlink()


def test_a_hook_fills_the_namespace(bundle, network, tmp_path):
    """As nerdctl does it: by the pid in the state that createRuntime hooks get."""
    hook = tmp_path / "hook"
    write_plugin(
        hook,
        """set -e
        pid=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["pid"])')
        ip link add testveth type veth peer name eth0 netns $pid
        ip link set testveth master testbr0 up
        nsenter --net=/proc/$pid/ns/net sh -c '
            ip link set eth0 up; ip address add 10.77.0.44/24 dev eth0; ip route add default via 10.77.0.1'""",
    )
    spec = wants(bundle, "sh", "-c", LOOK)
    spec["hooks"] = {"createRuntime": [{"path": str(hook), "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]}
    result = bundle.run(spec)
    text = result.stdout.decode()
    assert "inet 10.77.0.44/24" in text and "default via 10.77.0.1" in text and "hello from dom0" in text, result


@pytest.mark.main_path
def test_ctr_with_cni(network):
    FOLDER.joinpath("00-test-ctr.conflist").write_text(json.dumps({
        "cniVersion": "0.4.0", "name": "ctr", "plugins": [{"type": "bridge", "bridge": "testbr0", "ipam": ipam()}],
    }))  # fmt: skip
    pathlib.Path("/opt/cni").mkdir(parents=True, exist_ok=True)
    if not pathlib.Path("/opt/cni/bin").exists():
        pathlib.Path("/opt/cni/bin").symlink_to("/usr/lib/cni")
    script = "ip -o address; ping -c 1 -w 9 fd77::1; wget -q -O - http://10.77.0.1:8080/page"
    result = call("ctr", "run", "--rm", "--cni", "--runc-binary=/usr/sbin/runX", IMAGE, "test-cni", "sh", "-c", script)
    assert result.stdout.endswith(b"hello from dom0\n") and b"fd77::" in result.stdout, result


# Without it, tables that nobody had used before an engine did would stay as this has left them
EMPTY_TABLES = b"""*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
"""


@contextlib.contextmanager
def engines_firewall():
    """Engines leave rules, a policy and a bridge of their own, for the next container: for test_xen_docker.py and
    test_xen_podman.py, which have these taken away."""
    links, rules = host_state()["links"], call("iptables-save").stdout
    try:
        yield
    finally:
        for link in host_state()["links"] - links:
            call("ip", "link", "del", link.split("@")[0].rstrip(":"))
        call("iptables-restore", input=EMPTY_TABLES + rules)
    assert b":FORWARD DROP" not in call("iptables-save").stdout
