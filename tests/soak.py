#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A dom0 after many containers: is anything left, does anything grow, is any byte lost?

    soak.py [--rounds N] [--mebibytes N]

Runs on a Xen dom0 with runX and pytest, so also by `tests/lab/lab.py run -- python3 /repo/tests/soak.py`.
Creates, starts, ends and deletes one container after the other (100), then compares what dom0 has
with what it had after the first ones; then carries 64 MiB through a container's standard output,
and prints the rate beside xenconsoled's in the same boot.  Exit status 1 if anything is wrong.
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import bench  # noqa: E402
import conftest  # noqa: E402

DAEMONS = ("xenstored", "xenconsoled", "containerd")
# what may differ by chance: pages in per-CPU lists, slabs that are freed later
MEMORY_NOISE = 4 << 10  # KiB
DAEMON_NOISE = 256  # KiB


def memory():
    """KiB of dom0 that are in use and could not be freed, and of each daemon."""
    info = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    used = int(info["MemTotal"].split()[0]) - int(info["MemAvailable"].split()[0])
    return {"dom0": used, **resident()}


def resident():
    pages = {
        name: int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
        for pid, name in conftest.running()
        if name in DAEMONS
    }
    return {name: count * os.sysconf("SC_PAGE_SIZE") >> 10 for name, count in pages.items()}


def open_files(xenstore):
    """{daemon: how many files it has open}, when xenstored has closed the connections of who is gone: each of its turns
    looks at all of them, and its second answer to us comes a turn after that."""
    for _ in range(2):
        xenstore.read("domid")
    return conftest.descriptors(*DAEMONS)


def live_once(bundle):
    """create, start, exit, delete."""
    pidfd = bundle.started(conftest.config("sh", "-c", "echo out; echo err >&2; exit 5"))
    conftest.wait_for(pidfd)
    bundle.succeed("delete")
    os.close(bundle.pidfds.pop())
    assert ((bundle.folder / "stdout").read_bytes(), (bundle.folder / "stderr").read_bytes()) == (b"out\n", b"err\n")


def check_rounds(bundle, rounds):
    """Yield what is wrong after that many lives, a sentence each."""
    xenstore = conftest.runx.Xenstore()
    for _ in range(min(rounds, 3)):  # what is made once: folders, caches, a daemon's buffers
        live_once(bundle)
    before, files, used = conftest.dom0_state(), open_files(xenstore), memory()
    for number in range(rounds):
        live_once(bundle)
        if sys.stdout.isatty() or number % 10 == 9:
            print(f"{number + 1} rounds", flush=True)
    try:
        conftest.wait_until(lambda: not conftest.difference(before), "dom0 as it was before")
    except AssertionError:
        yield f"left behind or taken away: {conftest.difference(before)}"
    try:
        conftest.wait_until(lambda: open_files(xenstore) == files, "the daemons to have the files open that they had")
    except AssertionError:
        yield f"daemons have {open_files(xenstore)} files open, and had {files}"
    growth = {name: size - used[name] for name, size in memory().items()}
    print("memory of dom0 and its daemons, KiB more than before:", growth)
    for name, kibibytes in growth.items():
        if kibibytes > (MEMORY_NOISE if name == "dom0" else DAEMON_NOISE):
            yield f"{name} has grown by {kibibytes} KiB in {rounds} rounds"


def check_stream(bundle, mebibytes):
    """A file of that size through a container's standard output."""
    digest = hashlib.sha256()
    with open(bundle.rootfs / "data", "wb") as file:
        for _ in range(mebibytes):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    bundle.write_config(conftest.config("cat", "/data"))
    with subprocess.Popen(bundle.command("run"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        received, total, rate = bench.read_stream(running.stdout.fileno(), 1 << 40)
    if (received, total) != (digest.hexdigest(), mebibytes << 20):
        yield f"of {mebibytes} MiB through standard output {total} bytes arrived, or others"
    beside = bench.xenconsoled_rate(bundle.folder, min(mebibytes, 4) << 18)  # a quarter: it is slow
    print(f"standard output: {rate / 1000:.0f} kB/s; xenconsoled's hvc0: {beside / 1000:.0f} kB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--mebibytes", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = conftest.Bundle(pathlib.Path(folder))
        wrong = [*check_rounds(bundle, options.rounds), *check_stream(bundle, options.mebibytes)]
    for sentence in wrong:
        print(f"soak: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
