# SPDX-License-Identifier: Apache-2.0
"""Through Docker, whose daemon is started once for all of these tests."""

import contextlib
import json
import shutil
import subprocess

import pytest
from conftest import Bundle, call, difference, dom0_state, fetch, wait_in, wait_until
from test_xen_exec import check_exec
from test_xen_network import engines_firewall
from test_xen_streams import OUR_PS1

pytestmark = pytest.mark.skipif(not shutil.which("dockerd"), reason="needs Docker")

OPTIONS = ["--runtime", "runx", "--env", "PATH=/bin"]
SERVER = "cat /etc/hosts; exec httpd -f -h /"


@contextlib.contextmanager
def docker_daemon(folder):
    """Docker's daemon with runX as a runtime; yields the start of a docker command."""
    host = f"unix://{folder}/docker.sock"
    (folder / "daemon.json").write_text(json.dumps({"runtimes": {"runx": {"path": "/usr/sbin/runX"}}}))
    command = ["dockerd", "--config-file", str(folder / "daemon.json"), "--host", host]
    for option in ("data-root", "exec-root", "pidfile"):
        command += [f"--{option}", str(folder / option)]
    with open(folder / "log", "wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until((folder / "docker.sock").exists, "dockerd", 60)  # at which a command waits until it is ready
        yield ["docker", "--host", host]
    finally:
        daemon.terminate()
        daemon.wait()
        call("umount", "-R", str(folder / "data-root"))
        call("umount", "-R", str(folder / "exec-root"))
        shutil.rmtree("/run/docker", ignore_errors=True)


@pytest.fixture(scope="module")
def docker(tmp_path_factory):
    """The start of a docker command, with an image `test`; when all tests here have ended, dom0 is as it was."""
    before, folder = dom0_state(), tmp_path_factory.mktemp("docker")
    bundle = Bundle(folder)
    bundle.add_applets("httpd", "rm")
    (bundle.rootfs / "page").write_text("hello from a VM\n")
    (bundle.rootfs / "tmp/well").touch()
    rootfs = subprocess.run(["tar", "-C", str(bundle.rootfs), "-c", "."], stdout=subprocess.PIPE, check=True)
    with engines_firewall(), docker_daemon(folder) as docker:
        assert call(*docker, "import", "-", "test", input=rootfs.stdout).returncode == 0
        yield docker
    wait_until(lambda: not difference(before), "dom0 as it was before these tests", 10)


@pytest.fixture(scope="module")
def web(docker):
    """The name of a container that runs: a web server with a published port, and a check of its health."""
    health = ["--health-cmd", "[ -e /tmp/well ]", "--health-interval", "5s", "--health-retries", "1"]
    options = [*OPTIONS, "-d", "-p", "8082:80", "--env", OUR_PS1, *health, "--name", "web"]
    started = call(*docker, "run", *options, "test", "sh", "-c", SERVER)
    assert started.returncode == 0, started
    yield "web"
    assert call(*docker, "rm", "--force", "web").returncode == 0


def test_a_container_runs_twice_in_two_vms(docker):
    limits = ["--network", "none", "--memory", "80m", "--pids-limit", "50"]
    script = "echo out; echo err >&2; cat /proc/version; exit 3"
    result = call(*docker, "run", *OPTIONS, *limits, "--name", "one", "test", "sh", "-c", script)
    assert result.returncode == 3 and result.stderr.endswith(b"err\n"), result  # before it Docker's words on swap
    assert result.stdout.startswith(b"out\nLinux version ") and b"-runx" in result.stdout
    assert call(*docker, "start", "--attach", "one").returncode == 3
    assert call(*docker, "rm", "--force", "one").returncode == 0


def test_a_published_port_and_what_is_told_of_a_container(docker, web):
    wait_until(lambda: fetch("http://127.0.0.1:8082/page") == b"hello from a VM\n", "the page", 60)
    assert b"172.17.0." in call(*docker, "logs", web).stdout
    _, row = call(*docker, "top", web, "-efww").stdout.decode().splitlines()  # procps 4.0.4 cuts it otherwise
    assert row.endswith(f"sh -c {SERVER}"), row  # by config.json: what the VM runs, only the VM knows
    stats = call(*docker, "stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", web)
    assert stats.stdout.split()[0] not in (b"", b"0", b"--") and not stats.stderr, stats


def test_exec(docker, web):
    check_exec([*docker, "exec"], [web])


def test_a_health_check(docker, web, tmp_path):
    listen = [*docker, "events", "--since", "0", "--filter", "event=health_status", "--format", "{{.Action}}"]
    events = tmp_path / "events"

    def becomes(status):
        event = f"health_status: {status}"
        wait_in(tmp_path, lambda: event in events.read_text().splitlines(), event)

    with open(events, "wb") as output, subprocess.Popen(listen, stdin=subprocess.DEVNULL, stdout=output) as listening:
        try:
            becomes("healthy")
            assert call(*docker, "exec", web, "rm", "/tmp/well").returncode == 0
            becomes("unhealthy")
        finally:
            listening.kill()
