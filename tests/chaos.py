#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lives of containers in the fake dom0, with commands at once and in any order, whatever fails and whoever is killed:
does everything end, and is nothing left?

    tests/chaos.py [--seed N] [--count N]

One life after the other, each by a seed of its own; what has gone wrong is printed with all that was done.  Processes
run at once, so a seed tells what is tried and not what comes of it.  Not part of CI: it finds what happens once in a
thousand lives.  Exit status 1 if anything was wrong.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time

import conftest
from fake.dom0 import PATIENCE, Dom0

SCRIPTS = ("wait", "out:hello exit:3", "cat", "much:20000 exit:0", "ignore wait", "early:end:c", "begun:end:c", "end:r")
COMMANDS = (
    "create create create create start start start start delete kill kill pause resume exec exec exec-detached update "
    "state ps events list run run-detached delete-force"
).split()
SIGNALS = ("KILL", "KILL", "TERM", "USR1", "WINCH", "0")
ERRORS = ("EIO", "ENOSPC", "close", "kill", "destroy")  # of xenstore: see Dom0.fail()
# seconds that would make it slow
CONSTANTS = {"XL_TIME_LIMIT": 5, "KILL_GRACE": 0.3, "EXEC_TIME_LIMIT": 3.0, "LOOK_AGAIN": 0.2, "VIF_TIME_LIMIT": 2}
NETWORKS = ("one", "two")  # an engine's namespaces, for a container each


class Life:
    """Of one container or two."""

    def __init__(self, dom0, seed):
        self.dom0, self.random, self.done = dom0, random.Random(seed), []
        self.networks = list(NETWORKS) if dom0.networks else []
        self.running, self.waiting = [], []  # (what it is, Process): commands, and those that last as long as a process
        self.containers = [self.container() for _ in range(self.random.choice((1, 1, 2)))]

    def container(self):
        linux, changes = {}, {}
        if self.networks and self.random.random() < 0.6:
            linux["namespaces"] = conftest.namespaces(network=f"/run/netns/{self.networks.pop()}")
        if self.random.random() < 0.5:
            linux["cgroupsPath"] = f"/chaos-{self.random.randrange(10**9)}"
        if self.random.random() < 0.3:
            kind = self.random.choice(("createRuntime", "createContainer", "poststart", "poststop"))
            script = self.random.choice(("cat >/dev/null", "true", "exit 1"))
            changes["hooks"] = {kind: [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}
        changes["annotations"] = {"org.runx.rootfs": self.random.choice(("ramdisk", "9p"))}
        script = self.random.choice(SCRIPTS).split()
        made = self.dom0.container(*script, linux=linux, **changes)
        self.note(made.id, *script, linux, changes)
        return made

    def note(self, *words):
        self.done.append(" ".join(map(str, words)))

    def live(self):
        acts = [self.command] * 12 + [self.reap] * 4 + [self.kill] * 2 + [self.fail, self.destroy, self.plug]
        for _ in range(self.random.randrange(4, 16)):
            self.random.choice(acts)()
            # nothing is waited for: what happens at once is to be something else each time
            time.sleep(self.random.choice((0, 0, self.random.random() / 20)))
        self.dom0.forget()
        self.end()
        self.check()

    # ---- what happens

    def command(self):
        command, container = self.random.choice(COMMANDS), self.random.choice(self.containers)
        verb, _, detached = command.partition("-")
        words = {
            "create": ["--bundle", container.bundle, container.id],
            "run": ["--bundle", container.bundle, *(["--detach"] if detached else []), container.id],
            "delete": [*(["--force"] if detached else []), container.id],
            "kill": [container.id, self.random.choice(SIGNALS)],
            "exec": [*(["--detach"] if detached else []), container.id, self.random.choice(("guest", "guest", "none")),
                     self.random.choice(("wait", "exit:4", "cat"))],
            "update": ["--cpu-share", self.random.randrange(2, 2000), container.id],
            "events": ["--stats", container.id],
            "list": [],
        }.get(verb, [container.id])  # fmt: skip
        process = self.dom0.start(*container.words(verb, *map(str, words)))
        self.note("begin", process.pid, verb, *words)
        lasts = command in ("run", "exec", "start", "run-detached")  # a VM that is paused starts later
        (self.waiting if lasts else self.running).append((command, process))

    def reap(self):
        if self.running:
            self.take(self.running.pop(self.random.randrange(len(self.running))))

    def take(self, item):
        """Waits for a command; whatever it says is no internal error."""
        what, process = item
        result = process.wait()
        self.note("end", process.pid, what, result.returncode, result.stderr.strip())
        self.read(result.stdout + result.stderr)

    def read(self, text):
        assert "internal error" not in text and "Traceback" not in text, text

    def kill(self):
        processes = self.dom0.processes()
        if processes:
            pid = self.random.choice(list(processes))
            self.note("kill", pid, processes[pid])
            self.dom0.run(program=["kill", "-9", str(pid)])

    def fail(self):
        number = self.random.randrange(1, 60)
        what = self.random.choice(("xenstore", "xl", "system call"))
        how = self.random.choice(ERRORS if what == "xenstore" else ("EIO", "kill"))
        self.note("fail", what, number, how)
        if what == "system call":
            self.dom0.fail_system_call(number, how)
        else:
            self.dom0.fail(what, number if what == "xenstore" else 1 + number % 3, how)

    def destroy(self):
        domains = self.dom0.domains()
        if domains:
            domid = self.random.choice(list(domains))
            self.note("destroy", domid)
            self.dom0.run(program=["xl", "destroy", str(domid)], env={"PATH": "/run/fake/bin"})

    def plug(self):
        """The engine gives an interface to a network namespace, or takes it away."""
        if self.dom0.networks:
            switch_interface(self.dom0, self.random.choice(NETWORKS))

    # ---- the end

    def end(self):
        self.note("the end")
        while self.running:
            self.take(self.running.pop(0))
        deadline = time.monotonic() + PATIENCE
        while True:  # a `run` may make one as soon as it is deleted
            for container in self.containers:
                result = container.runx("delete", "--force")
                assert result.returncode == 0, result
            if not self.dom0.processes():
                break
            assert time.monotonic() < deadline, self.dom0.processes()
        while self.waiting:
            self.take(self.waiting.pop(0))

    def check(self):
        for container in self.containers:
            self.read(container.log_text())
        self.dom0.settle()
        for name in NETWORKS if self.dom0.networks else ():
            links = interfaces(self.dom0, name)
            assert not [link for link in links if link.startswith("vif") or links[link].get("ifalias")], links
            if "eth1" in links:
                switch_interface(self.dom0, name)
        left = self.dom0.left()
        if list(left) == ["more nodes"] and any("warning msg=cannot " in each.log_text() for each in self.containers):
            self.dom0.ask("reset")  # a node that could not be removed is told, and keeps nobody from going on
        else:
            assert not left, left


# ---- a fake dom0 with networks


def ip(dom0, *words):
    result = dom0.run(program=["ip", *words])
    assert result.returncode == 0, (words, result)
    return result.stdout


def interfaces(dom0, network):
    return {link["ifname"]: link for link in json.loads(ip(dom0, "-n", network, "-j", "link"))}


def switch_interface(dom0, network):
    """eth1 is there, or is not, from now on."""
    if "eth1" in interfaces(dom0, network):
        ip(dom0, "-n", network, "link", "delete", "eth1")
    else:
        ip(dom0, "-n", network, "link", "add", "eth1", "type", "veth", "peer", "name", "other1")
        ip(dom0, "-n", network, "link", "set", "eth1", "up")


@contextlib.contextmanager
def furnished():
    """A fake dom0, with the networks where there is ip(8)."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        dom0 = Dom0(folder)
        dom0.networks = bool(shutil.which("ip"))
        for name in NETWORKS if dom0.networks else ():
            ip(dom0, "netns", "add", name)
            ip(dom0, "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "other0")
            ip(dom0, "-n", name, "link", "set", "eth0", "up")
        dom0.empty = dom0.sight()
        try:
            yield dom0
        finally:
            dom0.close()


def try_seeds(seeds):
    """Has lives go by until something is wrong, or there are no more; returns whether all was well."""
    with furnished() as dom0:
        for number, seed in enumerate(seeds, 1):
            dom0.constants.update(CONSTANTS)
            life = Life(dom0, seed)
            try:
                life.live()
            except AssertionError as error:
                print(f"seed {seed}: {error}", *life.done, *(each.log_text() for each in life.containers), sep="\n    ")
                return False
            dom0.release()
            if number % 100 == 0:
                print(f"seed {seed}: nothing was left so far", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    seeds, wrong = iter(range(arguments.seed, arguments.seed + arguments.count)), 0
    while not try_seeds(seeds):  # the rest in a new dom0
        wrong += 1
    print(f"{arguments.count} lives from seed {arguments.seed} on: {wrong} left something, or hung")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
