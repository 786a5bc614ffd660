# SPDX-License-Identifier: Apache-2.0
"""What runX costs on this dom0, each figure beside its yardstick of the same run.

    bench.py [--json FILE] [--runs N]               a container's life, exec, its processes, memory and output
    bench.py --waits [--json FILE] [--runs N]       of these only how long one waits: for exec, an engine, a late start
    bench.py --smallest [--json FILE]               the smallest VMs in which `echo hello` runs
    bench.py --network [--json FILE] [--runs N]     TCP between a container and dom0, by iperf3
    bench.py --many N [--json FILE]                 how long a creation takes beside N running containers
    bench.py --files DISK [--json FILE] [--runs N]  what programs do with files, on a disk or image with a Debian, which
                                                    is written to: 9p and runc on its files, block on a copy of it
    bench.py --files-native [--json FILE]           requests to the file server alone, which needs no Xen

All else runs on any dom0 with Xen's tools and an installed runX; in the lab by
`lab.py run -- python3 /repo/tests/bench.py ...`, where DISK is /dev/vdb (see lab/debian.py).
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import mmap
import os
import pathlib
import select
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bench_files  # noqa: E402
import served  # noqa: E402

import runx  # noqa: E402


def call(*args, **options):
    """Runs a command that must succeed; returns what it prints."""
    done = subprocess.run(args, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options})
    if done.returncode:
        raise SystemExit(f"{' '.join(args)}: status {done.returncode}")
    return done.stdout


# ---- bundles


def make_bundle(folder, *args, env=(), namespace=None, programs=(), settings=()):
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
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"},
            {"type": "network", **({"path": namespace} if namespace else {})},
        ]},
        "vm": {"hypervisor": {"parameters": list(settings)}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


# ---- a life

INSTALLED = pathlib.Path("/usr/lib/runX")
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
MEMORY = 64  # MiB of each VM
TYPE = runx.Host().type or runx.host_guest_type()
ROOTFS = ("ramdisk", "block", "9p")
OTHERS = ("runc", "crun", "youki", "kata-runtime", "urunc")  # where they are installed


def processor_time(usage):
    return usage.ru_utime + usage.ru_stime


def wait_for(pid):
    """Waits for a process's end; returns its processor time in seconds, with that of the children it has waited for."""
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"process {pid} has ended with status {status}")
    return processor_time(usage)


def be_subreaper():
    """A monitor whose runX create has ended becomes our child, so that we see its end and its processor time."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spawn(*args, stdout=None):
    return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=stdout).pid


def forks():
    """How many processes and threads this host has started since it booted."""
    text = pathlib.Path("/proc/stat").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("processes"))


def first_byte(fd):
    if not select.select([fd], [], [], 60)[0]:
        raise SystemExit("no output of the container in 60 s")
    if not os.read(fd, 4096):
        raise SystemExit("the container has ended without output")


def bare_settings(folder, script, memory=MEMORY, kind=TYPE):
    """A file for `xl create`: our kernel, with a ramdisk whose init is this script."""
    init = f"#!/bin/sh\nexport PATH=/bin:/sbin\n{script}\nbusybox poweroff -f\n"
    base = (INSTALLED / "initrd").read_bytes()
    ramdisk = base + runx.padding(len(base)) + b"".join(runx.cpio_members([("init", 0o100755, init.encode(), 0)]))
    (folder / "bare.ramdisk").write_bytes(ramdisk)
    settings = {
        "name": f"bench-{os.getpid()}", "type": kind, "memory": memory, "kernel": str(INSTALLED / "kernel"),
        "ramdisk": str(folder / "bare.ramdisk"), "cmdline": runx.KERNEL_PARAMETERS, "on_poweroff": "preserve",
    }  # fmt: skip
    (folder / "xl.cfg").write_text(runx.xl_config(settings))
    return settings["name"], str(folder / "xl.cfg")


def bare_life(folder):
    """The yardstick: `xl create`, `xl unpause`, a line on hvc0, the end, `xl destroy`."""
    name, settings = bare_settings(folder, "echo hello")
    xenstore, before, started = runx.Xenstore(), forks(), time.monotonic()
    # libxc complains of a ramdisk of two archives, and takes it
    call("xl", "create", "-e", "-p", "-q", settings, stderr=subprocess.DEVNULL)
    created = time.monotonic()
    domid = call("xl", "domid", name).decode().strip()
    console = os.open(xenstore.read(f"/local/domain/{domid}/console/tty"), os.O_RDONLY | os.O_NOCTTY)
    xenstore.watch(("@releaseDomain", "end"))
    xenstore.take_events()
    start = time.monotonic()
    call("xl", "unpause", domid)
    first_byte(console)
    output = time.monotonic()
    select.select([xenstore.fd], [], [], 60)
    call("xl", "destroy", domid)
    end = time.monotonic()
    os.close(console)
    return {
        "create": created - started, "start to output": output - start, "output to end": end - output, "delete": 0.0,
        "whole life": end - started - (start - created), "processes": forks() - before - 1, "CPU": 0.0,
    }  # fmt: skip


def container_life(runtime, bundle, rest=0):
    """rest: seconds between create and start, which no figure has in it."""
    before, started = forks(), time.monotonic()
    reader, writer = os.pipe()
    pid_file = bundle / "pid"
    pid = spawn(runtime, "create", "--bundle", str(bundle), "--pid-file", str(pid_file), "bench", stdout=writer)
    used = wait_for(pid)
    os.close(writer)
    created = time.monotonic()
    time.sleep(rest)
    starting = time.monotonic()
    pid = spawn(runtime, "start", "bench")
    first_byte(reader)
    output = time.monotonic()
    used += wait_for(pid) + wait_for(int(pid_file.read_text()))
    end = time.monotonic()
    used += wait_for(spawn(runtime, "delete", "bench"))
    deleted = time.monotonic()
    os.close(reader)
    return {
        "create": created - started, "start to output": output - starting, "output to end": end - output,
        "delete": deleted - end, "whole life": deleted - started - (starting - created),
        "processes": forks() - before, "CPU": used,
    }  # fmt: skip


def make_hello(folder, rootfs=None, *args):
    bundle = make_bundle(folder, "/bin/busybox", *(args or ("echo", "hello")))
    if rootfs:
        spec = json.loads((bundle / "config.json").read_text())
        spec["annotations"] = {"org.runx.rootfs": rootfs, "org.runx.memory": str(MEMORY)}
        if rootfs == "block":
            call("mkfs.ext4", "-q", "-F", "-d", str(bundle / "rootfs"), str(bundle / "image"), "16m")
            spec["root"] = {"path": "image"}
        (bundle / "config.json").write_text(json.dumps(spec))
    return bundle


def measure_life(folder, runs):
    """{way: {what: median, in seconds}}, by turns."""
    ways = {"bare xl": lambda: bare_life(folder)}
    for rootfs in ROOTFS:
        bundle = make_hello(folder / rootfs, rootfs)
        ways[f"runX, {rootfs}"] = lambda bundle=bundle: container_life("runX", bundle)
    for runtime in filter(shutil.which, OTHERS):
        bundle = make_hello(folder / runtime)
        ways[runtime] = lambda runtime=runtime, bundle=bundle: container_life(runtime, bundle)
    for life in ways.values():
        life()  # what is read for the first time is not in the memory yet
    found = {way: [] for way in ways}
    for _ in range(runs):
        for way, life in ways.items():
            found[way].append(life())
    return {way: {key: statistics.median(each[key] for each in lives) for key in lives[0]}
            for way, lives in found.items()}  # fmt: skip


def print_life(results):
    base, columns = results["bare xl"], list(results["bare xl"])
    print(f"{'seconds (of bare xl)':22}" + "".join(f"{column:>18}" for column in columns))
    for way, each in results.items():
        cells = [f"{value:.2f}" + (f" ({value / base[key]:.2f})" if base[key] else "") for key, value in each.items()]
        print(f"{way:22}" + "".join(f"{cell:>18}" for cell in cells))
        both = (each["create"] + each["start to output"]) / (base["create"] + base["start to output"])
        print(f"{'':22}create and start to output: {both:.2f} of bare xl")


REST = 2  # seconds between create and start, when an engine takes its time
IMAGE = "docker.io/library/busybox:latest"  # of containerd's
WAITS = {  # what is waited for, and what of a bare domain's life stands beside it
    f"start to output, {REST} s after create": ["start to output"],
    "exec to output": ["start to output"],
    "ctr run to output": ["create", "start to output"],
}


def seconds_to_output(*command):
    """From the start of a command to the first byte of its output; wait for its end."""
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = spawn(*command, stdout=writer)
    os.close(writer)
    first_byte(reader)
    output = time.monotonic()
    wait_for(pid)
    os.close(reader)
    return output - started


def ways_to_wait(folder, stack):
    """{(what, way): its measurement}"""
    ways, (late, executed, engine) = {}, WAITS
    for rootfs in ("ramdisk", "9p"):
        bundle = make_hello(folder / f"late-{rootfs}", rootfs)
        ways[late, f"runX, {rootfs}"] = lambda bundle=bundle: container_life("runX", bundle, REST)["start to output"]
    for runtime, way in (("runX", "runX, 9p"), *((name, name) for name in ("runc",) if shutil.which(name))):
        bundle, name = make_hello(folder / f"executed-{runtime}", "9p", "sleep", "100000"), f"bench-{runtime}"
        with open(folder / "output", "wb") as output:
            call(runtime, "create", "--bundle", str(bundle), name, stdout=output)
        stack.callback(call, runtime, "delete", "--force", name)
        call(runtime, "start", name)
        command = [runtime, "exec", name, "/bin/busybox", "echo", "hello"]
        ways[executed, way] = lambda command=command: seconds_to_output(*command)
    if shutil.which("ctr") and IMAGE in call("ctr", "images", "ls", "-q").decode().split():
        binary = ["--runc-binary", shutil.which("runX")]
        for way, options in (
            ("runX, ramdisk", [*binary, "--annotation", "org.runx.rootfs=ramdisk"]), ("runX, 9p", binary), ("runc", []),
        ):  # fmt: skip
            command = ["ctr", "run", "--rm", *options, IMAGE, "bench", "echo", "hello"]
            ways[engine, way] = lambda command=command: seconds_to_output(*command)
    return ways


def measure_waits(folder, runs):
    """{what: {way: seconds, the median}}, by turns."""
    with contextlib.ExitStack() as stack:
        ways = ways_to_wait(folder, stack)
        for measured in (lambda: bare_life(folder), *ways.values()):
            measured()  # what is read for the first time is not in the memory yet
        found, lives = {key: [] for key in ways}, []
        for _ in range(runs):
            lives.append(bare_life(folder))
            for key, measured in ways.items():
                found[key].append(measured())
    results = {what: {"bare xl": statistics.median(sum(life[key] for key in keys) for life in lives)}
               for what, keys in WAITS.items()}  # fmt: skip
    for (what, way), seconds in found.items():
        results[what][way] = statistics.median(seconds)
    return results


def print_waits(results):
    for what, ways in results.items():
        base = ways["bare xl"]
        cells = ", ".join(f"{way} {seconds:.2f} s ({seconds / base:.2f})" for way, seconds in ways.items())
        print(f"{what}: {cells}")


def measure_commands(folder, runs):
    """{command: seconds} of whole processes, for a container that has ended, beside Python's own start."""
    bundle = make_hello(folder / "ended", "ramdisk")
    with open(folder / "output", "wb") as output:
        call("runX", "create", "--bundle", str(bundle), "--pid-file", str(folder / "pid"), "bench-ended", stdout=output)
    call("runX", "start", "bench-ended")
    wait_for(int((folder / "pid").read_text()))
    commands = {
        "python3 -IS -c pass": ("python3", "-IS", "-c", "pass"),
        "runX state": ("runX", "state", "bench-ended"),
        "runX kill": ("runX", "kill", "bench-ended", "KILL"),
    }
    found = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            started = time.monotonic()
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[name].append(time.monotonic() - started)
    call("runX", "delete", "bench-ended")
    return {name: statistics.median(each) for name, each in found.items()}


def print_commands(results):
    base = results["python3 -IS -c pass"]
    for name, seconds in results.items():
        print(f"{name:22}{seconds * 1000:>8.0f} ms ({seconds / base:.2f} of Python's start)")


def proportional_sizes():
    """{pid: (command, PSS in KiB)} of all processes."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "smaps_rollup").read_text()
            size = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
            found[int(path.name)] = ((path / "comm").read_text().strip(), size)
        except (OSError, StopIteration):
            pass  # it has ended, or is the kernel's
    return found


def measure_memory(folder, count=3):
    """{way: KiB that a running container adds to dom0's processes, the file server and all others apart, and that Xen
    gives to its domain}, the mean of count."""
    results = {}
    for rootfs in ROOTFS:
        bundle = make_hello(folder / f"memory-{rootfs}", rootfs, "sleep", "1000")
        if rootfs == "block":
            (bundle / "image").chmod(0o444)  # only what nobody writes can be shared
        before, free = proportional_sizes(), int(runx.xl_info("free_memory"))
        for number in range(count):
            with open(folder / "output", "wb") as output:
                call("runX", "create", "--bundle", str(bundle), f"bench-{number}", stdout=output)
            call("runX", "start", f"bench-{number}")
        added = {"file server": 0, "others": 0}
        for pid, (command, size) in proportional_sizes().items():
            if pid not in before:
                added["file server" if command == "runX files" else "others"] += size / count
        added["domain"] = (free - int(runx.xl_info("free_memory")) << 10) / count
        results[rootfs] = added
        for number in range(count):
            call("runX", "delete", "--force", f"bench-{number}")
    return results


def print_memory(results):
    for rootfs, added in results.items():
        sizes = ", ".join(f"{key} {size / 1024:.1f} MiB" for key, size in added.items())
        print(f"memory of a running container, {rootfs}: {sizes}")


def read_stream(fd, size):
    """Reads until the end or size bytes; returns the data's checksum, its length, and bytes/s after the first one."""
    digest, total, started = hashlib.sha256(), 0, None
    while total < size and select.select([fd], [], [], 60)[0]:
        try:
            data = os.read(fd, 65536)
        except OSError:  # EIO: the end of a pty
            break
        if not data:
            break
        if started is None:
            started, first = time.monotonic(), len(data)
        digest.update(data)
        total += len(data)
    return digest.hexdigest(), total, (total - first) / (time.monotonic() - started) if total else 0.0


@contextlib.contextmanager
def bare_domain(name, settings):
    """A bare domain that has just been unpaused; yields its hvc0.  Raises CalledProcessError if it cannot be made."""
    # quietly: libxc complains of a ramdisk of two archives, and takes it
    subprocess.run(["xl", "create", "-e", "-p", "-q", settings], check=True, capture_output=True)
    try:
        domid = call("xl", "domid", name).decode().strip()
        console = os.open(runx.Xenstore().read(f"/local/domain/{domid}/console/tty"), os.O_RDONLY | os.O_NOCTTY)
        call("xl", "unpause", domid)
        yield console
        os.close(console)
    finally:
        call("xl", "destroy", name)


def xenconsoled_rate(folder, size):
    """Bytes/s of the same kernel writing to hvc0, which xenconsoled carries, as a bare domain."""
    script = f"mount -t devtmpfs dev /dev; stty -F /dev/hvc0 raw -echo -opost\n" \
        f"dd if=/dev/zero of=/dev/hvc0 bs=4096 count={size >> 12} 2>/dev/null"  # fmt: skip
    with bare_domain(*bare_settings(folder, script, memory=128)) as console:
        return read_stream(console, size)[2]


def input_rate(folder, size):
    """Bytes/s of what a container's program is given."""
    bundle = make_hello(folder / "input", "ramdisk", "sh", "-c", "echo ready; exec /bin/busybox wc -c")
    command = ["runX", "run", "--bundle", str(bundle), "bench-input"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as running:
        running.stdout.readline()
        began = time.monotonic()
        running.stdin.write(bytes(size))
        running.stdin.close()
        if running.stdout.read() != b"%d\n" % size:
            raise SystemExit("the container has not got all of its input")
        return size / (time.monotonic() - began)


def measure_output(folder, size=4 << 20):
    """{way: bytes/s} of a program's output, to a pipe and to hvc0, and of its input."""
    bundle = make_hello(folder / "stream", "ramdisk", "dd", "if=/dev/zero", "bs=4096", f"count={size >> 12}")
    command = ["runX", "run", "--bundle", str(bundle), "bench-output"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        rate = read_stream(running.stdout.fileno(), 1 << 40)[2]
    return {
        "standard output": rate,
        "hvc0, xenconsoled": xenconsoled_rate(folder, size >> 2),
        "standard input": input_rate(folder, size >> 2),
    }


def print_output(results):
    base = results["hvc0, xenconsoled"]
    for way, rate in results.items():
        print(f"{way}: {rate / 1000:.0f} kB/s ({rate / base:.2f})")


def bare_runs(memory, kind, folder):
    """Whether a bare domain of so many MiB says hello."""
    found = b""
    try:
        with bare_domain(*bare_settings(folder, "echo hello", memory, kind)) as console:
            while b"hello" not in found and select.select([console], [], [], 5)[0]:
                found += os.read(console, 4096)
    except subprocess.CalledProcessError:
        pass  # libxc has no room for the kernel
    return b"hello" in found


def container_runs(memory, kind, folder, rootfs):
    bundle = make_hello(folder, rootfs)
    spec = json.loads((bundle / "config.json").read_text())
    spec["annotations"]["org.runx.memory"] = str(memory)
    spec["vm"] = {"hypervisor": {"parameters": [f'type="{kind}"']}}
    (bundle / "config.json").write_text(json.dumps(spec))
    with open(folder / "stdout", "wb") as stdout:
        running = subprocess.Popen(
            ["runX", "run", "--bundle", str(bundle), "bench-small"],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stdout,
        )
    try:
        running.wait(20)
    except subprocess.TimeoutExpired:  # one that is too small may hang
        call("runX", "delete", "--force", "bench-small")
        running.wait()
    return (folder / "stdout").read_bytes() == b"hello\n"


def smallest(lowest, runs, *args):
    """MiB of the smallest VM that says hello, down from 32 in steps of 2; None: 32 are not enough."""
    return min(itertools.takewhile(lambda size: runs(size, *args), range(32, lowest - 1, -2)), default=None)


def measure_smallest(folder):
    """{kind of guest: {way: MiB}}; no container is tried below what runX gives to each VM."""
    results = {}
    for kind in ("pvh", "pv"):
        results[kind] = {"bare": smallest(10, bare_runs, kind, folder)}
        for rootfs in ROOTFS:
            results[kind][rootfs] = smallest(runx.MINIMUM_MEMORY, container_runs, kind, folder / rootfs, rootfs)
        print(f"the smallest {kind} guest, MiB: {results[kind]}", flush=True)
    return results


ENDS = 5  # how many of the first creations, and of the last, are compared


def measure_many(folder, count):
    """{way: seconds of each creation}: of count containers, which all go on running, and of ENDS bare domains before
    the first and ENDS after the last of them."""
    bundle = make_hello(folder / "many", "ramdisk", "sh", "-c", "echo hello; sleep 100000")
    results = {"bare xl": [], "runX": []}

    def bare():
        _, settings = bare_settings(folder, "echo hello", memory=24)
        name, started = f"bench-bare-{len(results['bare xl'])}", time.monotonic()
        call("xl", "create", "-e", "-p", "-q", settings, f'name="{name}"', stderr=subprocess.DEVNULL)
        results["bare xl"].append(time.monotonic() - started)
        stack.callback(call, "xl", "destroy", name)

    def container():
        name, (reader, writer) = f"bench-{len(results['runX'])}", os.pipe()
        stack.callback(os.close, reader)
        started = time.monotonic()
        call("runX", "create", "--bundle", str(bundle), name, stdout=writer)
        results["runX"].append(time.monotonic() - started)
        stack.callback(call, "runX", "delete", "--force", name)
        os.close(writer)
        call("runX", "start", name)
        first_byte(reader)

    with contextlib.ExitStack() as stack:
        bare_life(folder)  # what is read for the first time is not in the memory yet
        for way in (*[bare] * ENDS, *[container] * count, *[bare] * ENDS):
            way()
    return results


def print_many(results):
    for way, found in results.items():
        first, last = (statistics.median(each) for each in (found[:ENDS], found[-ENDS:]))
        print(f"{way}, create: the first {first:.2f} s, the last {last:.2f} s ({last / first:.2f})")


# ---- network


BRIDGE, ADDRESS = "benchbr0", "10.74.0.1"


def measure_network(folder, runs):
    """{way: {direction: Mbit/s, the median}}, in both directions between a container and dom0 on one bridge."""
    networks = pathlib.Path("/etc/cni/net.d/bench.conf")
    with contextlib.ExitStack() as stack:
        for command in (
            f"ip link add {BRIDGE} type bridge", f"ip address add {ADDRESS}/24 dev {BRIDGE}",
            f"ip link set {BRIDGE} up", "ip netns add bench",
            "ip link add benchveth type veth peer name eth0 netns bench", f"ip link set benchveth master {BRIDGE} up",
        ):  # fmt: skip
            call(*command.split())
        for command in ("ip netns del bench", f"ip link del {BRIDGE}"):
            stack.callback(subprocess.run, command.split())
        networks.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(networks.unlink)
        ipam = {"type": "host-local", "subnet": "10.74.0.0/24", "dataDir": str(folder / "ipam")}
        network = {"cniVersion": "1.0.0", "type": "bridge", "bridge": BRIDGE, "ipam": ipam}
        limit = {"type": "bandwidth", "egressRate": 80_000_000, "egressBurst": 80_000_000}
        documents = [
            {**network, "name": "port"},
            {**network, "name": "plugin", "hairpinMode": True},
            {"cniVersion": "1.0.0", "name": "limited", "plugins": [{**network, "hairpinMode": True}, limit]},
        ]
        networks.write_text("\n".join(map(json.dumps, documents)))
        server = subprocess.Popen(["iperf3", "-s"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        ways = {
            "runX, a port of the bridge": ("runX", {"env": [f"NETCONF={networks},port,10.74.0.11"]}),
            "runX, the plugin bridge": ("runX", {"env": [f"NETCONF={networks},plugin,10.74.0.12"]}),
            "runX, 80 Mbit/s of the plugin bandwidth": ("runX", {"env": [f"NETCONF={networks},limited,10.74.0.13"]}),
            "Xen's script vif-bridge": ("runX", {"settings": [f'vif=["bridge={BRIDGE},script=vif-bridge"]']}),
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


# ---- what programs do with files

PROGRAMS_MEMORY = 256  # MiB of each VM
PROGRAMS_SECONDS = 60  # no group of figures is taken again in one VM when so many have gone
PROGRAMS_PREPARED = """
    set -e; mkdir /bench/repository; cd /bench/repository; export HOME=/bench
    git init -q; tar -xf ../tree.tar --wildcards "tree/[0-4]/*"; git add .
    git -c user.name=bench -c user.email=bench commit -qm all; git gc -q
    dpkg-deb -b ../package ../package.deb; rm -r ../package
"""


def prepare_programs(root):
    """Put into a Debian what bench_files.py works on: an archive of 2,000 files, a repository and a package of 500."""
    folder = root / "bench"
    tree, control = folder / "package/usr/share/bench", folder / "package/DEBIAN"
    shutil.rmtree(folder, ignore_errors=True)
    for each in (tree, control):
        each.mkdir(parents=True)
    (control / "control").write_text("Package: bench\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    with tarfile.open(folder / "tree.tar", "w") as tar:
        for number in range(2000):
            content = f"{number}\n".encode() * 200
            member = tarfile.TarInfo(f"tree/{number % 20}/{number}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            if number < 500:
                (tree / f"{number}").write_bytes(content)
    shutil.copy(bench_files.__file__, folder)
    call("chroot", str(root), "sh", "-c", PROGRAMS_PREPARED)


def programs_bundle(folder, way, root, *args):
    """A bundle of that Debian that runs bench_files.py."""
    folder.mkdir(exist_ok=True)
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/usr/bin/python3", "-I", "/bench/bench_files.py", *args], "cwd": "/",
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), list(runx.CAPABILITIES)),
        },
        "root": {"path": str(root)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "network")]},
        "annotations": {"org.runx.memory": str(PROGRAMS_MEMORY), **({} if way == "runc" else {"org.runx.rootfs": way})},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


def measure_programs(folder, disk, runs):
    """{way: {what: seconds of each time}}, a group of figures after the other, each in a VM of its own; they are
    printed on standard error when they are there."""
    with contextlib.ExitStack() as stack:
        image, root = folder / "image", folder / "root"
        root.mkdir()
        call("mount", disk, str(root))
        stack.callback(call, "umount", str(root))
        prepare_programs(root)
        call("umount", str(root))
        call("cp", "--sparse=always", disk, str(image))
        call("mount", disk, str(root))
        roots = {"9p": root, "block": image, **({"runc": root} if shutil.which("runc") else {})}
        found = {way: {} for way in roots}
        for group, way in itertools.product(bench_files.GROUPS, roots):
            bundle = programs_bundle(folder / way, way, roots[way], group, str(runs), str(PROGRAMS_SECONDS))
            command = ["runc" if way == "runc" else "runX", "run", "--bundle", str(bundle), "bench"]
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as running:
                for line in running.stdout:
                    name, seconds = line.split("\t")
                    found[way].setdefault(name, []).append(float(seconds))
                    print(f"{way}: {line}", end="", file=sys.stderr, flush=True)
            if running.returncode:
                raise SystemExit(f"{' '.join(command)}: status {running.returncode}")
    return found


def print_programs(results):
    medians = {way: {name: statistics.median(each) for name, each in found.items()} for way, found in results.items()}
    print(f"{'seconds (of block), times':34}" + "".join(f"{way:>20}" for way in results))
    for name, base in medians["block"].items():
        cells = [f"{each[name]:.3f} ({each[name] / base:.2f})" for each in medians.values()]
        times = [f", {len(found[name])}" for found in results.values()]
        print(f"{name:34}" + "".join(f"{cell + count:>20}" for cell, count in zip(cells, times)))


# ---- the file server


def measure_files(folder, runs):
    """{what: requests per second}, medians: FUSE's, from memory and into memory as that of a ring."""
    (folder / "file").write_bytes(os.urandom(1 << 20))
    guest = served.Guest(runx.Fuse(os.open(folder, os.O_PATH), 0))
    node = guest.look_up(b"file")
    _, handle, _ = guest.open(node, os.O_RDWR)
    requests = {"getattr": ["getattr", node, bytes(16)], "lookup": ["lookup", 1, b"file\0"]}
    for size in (4096, runx.CONTENT_MAX):
        head = struct.pack("<QQIIQII", handle, 0, size, 0, 0, 0, 0)
        requests[f"read {size >> 10} KiB"] = ["read", node, head]
        requests[f"write {size >> 10} KiB"] = ["write", node, head + bytes(size)]
    return {
        what: statistics.median(request_rate(guest.fuse, served.fuse_request(*request)) for _ in range(runs))
        for what, request in requests.items()
    }


def request_rate(fuse, data, count=2000):
    request, reply = (memoryview(mmap.mmap(-1, served.MESSAGE_MAX)) for _ in range(2))
    request[: len(data)] = data
    begin = time.perf_counter()
    for _ in range(count):
        message = served.Message(request[: len(data)], reply)
        fuse.reply_room(message)
        fuse.answer(message)
    return count / (time.perf_counter() - begin)


def print_files(rates):
    for what, rate in rates.items():
        print(f"{what:20} {rate:10,.0f} requests per second")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--many", type=int, metavar="N")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--files", metavar="DISK")
    parser.add_argument("--files-native", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--runs", type=int, metavar="N")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("bench.py must run as root, in dom0")
    if options.many is not None and options.many < 2 * ENDS:
        parser.error(f"--many compares the first {ENDS} with the last {ENDS}: it needs {2 * ENDS} or more")
    results = {}
    # of --files on a disk, where an engine's files are too: /tmp may be in the memory
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp" if options.files else None) as name:
        folder = pathlib.Path(name)
        if options.files_native:
            results["files"] = measure_files(folder, options.runs or 5)
            print_files(results["files"])
        elif options.waits:
            be_subreaper()
            results["waits"] = measure_waits(folder, options.runs or 10)
            print_waits(results["waits"])
        elif options.network:
            results["network"] = measure_network(folder, options.runs or 3)
            print_network(results["network"])
        elif options.many:
            results["many"] = measure_many(folder, options.many)
            print_many(results["many"])
        elif options.files:
            results["programs"] = measure_programs(folder, options.files, options.runs or 5)
            print_programs(results["programs"])
        elif options.smallest:
            results["smallest"] = measure_smallest(folder)
        else:
            be_subreaper()
            results["life"] = measure_life(folder, options.runs or 10)
            print_life(results["life"])
            results["waits"] = measure_waits(folder, options.runs or 10)
            print_waits(results["waits"])
            results["commands"] = measure_commands(folder, options.runs or 10)
            print_commands(results["commands"])
            results["memory"] = measure_memory(folder)
            print_memory(results["memory"])
            results["output"] = measure_output(folder)
            print_output(results["output"])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
