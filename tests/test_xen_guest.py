"""What the guest's kernel does beyond a container's usual needs: dom0's clock, and protocols of gateways and cars."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest
from conftest import can_run_pvh, config, in_memory, wait_until, xl

pytestmark = pytest.mark.usefixtures("clean_dom0")


class Dom0Clock:
    """Dom0's clock, which is put back by what it has been moved."""

    def __init__(self):
        self.begin = time.time() - time.monotonic()

    def step(self, seconds):
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    def put_back(self):
        time.clock_settime(time.CLOCK_REALTIME, self.begin + time.monotonic())


@pytest.fixture
def clock():
    clock = Dom0Clock()
    yield clock
    clock.put_back()


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_the_clock_follows_dom0s(bundle, clock, kind):
    """Until a process of the container sets it."""
    if kind == "pvh" and not can_run_pvh():
        pytest.skip("this hypervisor cannot run PVH guests: no hardware virtualization")
    (bundle.rootfs / "bin/date").symlink_to("busybox")
    spec = in_memory(config("sh", "-c", "while read line; do [ -z $line ] || date -s $line >/dev/null; date +%s; done"))
    spec["vm"] = {"hypervisor": {"parameters": [f'type="{kind}"']}}
    bundle.write_config(spec)
    command = bundle.command("run", "--bundle", str(bundle.folder), bundle.id)
    container = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seconds(line=b""):
        container.stdin.write(line + b"\n")
        container.stdin.flush()
        return int(container.stdout.readline())

    def follows():
        return abs(seconds() - time.time()) < 2

    assert follows()
    for step in (3600, -3600, 86400, -86400, 40 * 365 * 86400):
        clock.step(step)
        wait_until(follows, f"the guest's clock after a step of {step} s")
    clock.put_back()
    xl("pause", str(bundle.domain()))
    clock.step(-7200)
    xl("unpause", str(bundle.domain()))
    wait_until(follows, "the clock of a guest that was paused")
    assert seconds(b"@1000000000") < 1000000100
    clock.step(3600)
    for _ in range(5):
        assert seconds() < 1000000100  # its own, from now on
    container.communicate()
    assert container.returncode == 0


def test_protocols_of_gateways_and_cars(bundle):
    shutil.copy(pathlib.Path(__file__).with_name("features.py"), bundle.rootfs)
    spec = config("python3", "/features.py", env=["PATH=/bin:/usr/bin:/usr/sbin"])
    for path in ("/usr", "/lib", "/lib64"):
        source = os.path.realpath(path)
        spec["mounts"].append({"destination": path, "type": "bind", "source": source, "options": ["rbind", "ro"]})
    spec["linux"] = {"resources": {"memory": {"limit": 128 << 20}}}
    bundle.write_config(spec)
    command = bundle.command("run", "--bundle", str(bundle.folder), bundle.id)
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert (result.returncode, json.loads(result.stdout)) == (0, {}), result
