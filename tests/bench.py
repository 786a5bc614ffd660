"""What runX costs on this dom0, each figure beside its yardstick of the same run.

    bench.py --network [--json FILE] [--runs N]     TCP between a container and dom0, by iperf3

Runs on any dom0 with Xen's tools and an installed runX; in the lab: `lab.py run -- python3 /repo/tests/bench.py ...`.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import runx  # noqa: E402


def call(*args, **options):
    """Runs a command that must succeed; returns what it prints."""
    done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)}: status {done.returncode}")
    return done.stdout


# ---- bundles


def make_bundle(folder, *args, env=(), namespace=None, programs=()):
    """A bundle of busybox and these programs of dom0's, with their libraries."""
    rootfs = folder / "rootfs"
    (rootfs / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("busybox", *programs):
        path = shutil.which(name)
        shutil.copy(path, rootfs / "bin")
        libraries = subprocess.run(["ldd", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        for library in (word for word in libraries.split() if word.startswith("/")):
            target = rootfs / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    capabilities = [f"CAP_{name}" for name in ("NET_ADMIN", "NET_RAW", "SYS_ADMIN")]
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "args": list(args), "cwd": "/", "env": ["PATH=/bin", *env], "user": {"uid": 0, "gid": 0},
            "capabilities": {name: capabilities for name in ("bounding", "effective", "permitted")},
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            *({"destination": path, "type": "tmpfs", "source": "tmpfs"} for path in ("/tmp", "/dev")),
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "network", **({"path": namespace} if namespace else {})},
        ]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


# ---- network


BRIDGE, ADDRESS = "benchbr0", "10.74.0.1"


def measure_network(folder, runs):
    """{way: {direction: Mbit/s, the median}}, in both directions between a container and dom0 on one bridge."""
    import contextlib

    networks, settings = pathlib.Path("/etc/cni/net.d/bench.conf"), pathlib.Path("/etc/runX/xl/bench")
    with contextlib.ExitStack() as stack:
        for command in (
            f"ip link add {BRIDGE} type bridge", f"ip address add {ADDRESS}/24 dev {BRIDGE}",
            f"ip link set {BRIDGE} up", "ip netns add bench",
            "ip link add benchveth type veth peer name eth0 netns bench", f"ip link set benchveth master {BRIDGE} up",
        ):  # fmt: skip
            call(*command.split())
        for command in ("ip netns del bench", f"ip link del {BRIDGE}"):
            stack.callback(subprocess.run, command.split())
        for path in (networks, settings):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(path.unlink)
        ipam = {"type": "host-local", "subnet": "10.74.0.0/24", "dataDir": str(folder / "ipam")}
        network = {"cniVersion": "1.0.0", "type": "bridge", "bridge": BRIDGE, "ipam": ipam}
        limit = {"type": "bandwidth", "egressRate": 80_000_000, "egressBurst": 80_000_000}
        documents = [
            {**network, "name": "port"},
            {**network, "name": "plugin", "hairpinMode": True},
            {"cniVersion": "1.0.0", "name": "limited", "plugins": [{**network, "hairpinMode": True}, limit]},
        ]
        networks.write_text("\n".join(map(json.dumps, documents)))
        settings.write_text(f'vif = [ "bridge={BRIDGE},script=vif-bridge" ]\n')
        server = subprocess.Popen(["iperf3", "-s"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        ways = {
            "runX, a port of the bridge": ("runX", {"env": [f"NETCONF={networks},port,10.74.0.11"]}),
            "runX, the plugin bridge": ("runX", {"env": [f"NETCONF={networks},plugin,10.74.0.12"]}),
            "runX, 80 Mbit/s of the plugin bandwidth": ("runX", {"env": [f"NETCONF={networks},limited,10.74.0.13"]}),
            "Xen's script vif-bridge": ("runX", {"env": [f"XLCONF={settings}"]}),
        }
        if shutil.which("runc"):
            ways["runc, a veth"] = ("runc", {"namespace": "/run/netns/bench"})
        results = {way: {"to dom0": [], "from dom0": []} for way in ways}
        script = f"""
            ip address | grep -q inet.10 || ip address add 10.74.0.14/24 dev eth0; ip link set eth0 up
            for option in "" -R; do iperf3 -c {ADDRESS} -t 3 -J $option; done"""
        for _ in range(runs):
            for way, (runtime, options) in ways.items():
                bundle = make_bundle(folder / "network", "/bin/busybox", "sh", "-c", script,
                                     programs=("iperf3",), **options)  # fmt: skip
                for name in ("ip", "grep"):
                    if not (bundle / "rootfs/bin" / name).exists():
                        (bundle / "rootfs/bin" / name).symlink_to("busybox")
                output = call(runtime, "run", "--bundle", str(bundle), "bench").decode()
                for direction, report in zip(results[way], runx.parse_documents(way, output), strict=True):
                    if "error" in report:
                        raise SystemExit(f"{way}: {report['error']}")
                    results[way][direction].append(report["end"]["sum_received"]["bits_per_second"] / 1e6)
    return {way: {key: statistics.median(found) for key, found in each.items()} for way, each in results.items()}


def print_network(results):
    base = results.get("runc, a veth")
    print(f"{'Mbit/s (of runc)':42}{'to dom0':>16}{'from dom0':>16}")
    for way, each in results.items():
        cells = [f"{rate:.0f}" + (f" ({rate / base[key]:.2f})" if base else "") for key, rate in each.items()]
        print(f"{way:42}" + "".join(f"{cell:>16}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("bench.py must run as root, in dom0")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = {"network": measure_network(pathlib.Path(folder), options.runs)}
        print_network(results["network"])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
