# SPDX-License-Identifier: Apache-2.0
"""What the lab adds to a run of pytest: `-p plugin`, with its folder in PYTHONPATH.

A failure is printed when it happens, not only at the end.  In the environment:

    LAB_CLAIMS=FOLDER   several runs with the same folder share the tests: each runs in the one that comes to it first
    LAB_RESULTS=PATH    write to PATH.<pid>.json what became of each test: {id: [outcome, seconds]}; and on a dom0 to
                        PATH.versions those of Xen, Linux and the engines: {what: version}
    LAB_SECONDS=FILE    the same of earlier runs: what took longest then begins now
    LAB_TIME_LIMIT=S    a test that has not ended by then fails, and what the machine is at is printed

Tests of one class, and those of one module that share a fixture, stay together and in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

LOOKS = ("ps -eo pid,ppid,stat,etimes,wchan:20,args", "xl list", "xenstore-ls -fp /local")  # at a machine that hangs
TO_CLEAN_UP = 60  # seconds, for what a test does after it has failed
VERSIONS = {  # what tells them
    "Xen": "xl info", "Linux": "uname -r", "Python": "python3 --version", "containerd": "containerd --version",
    "Podman": "podman --version", "Docker": "docker --version", "runc": "runc --version",
}  # fmt: skip
Unit = list[pytest.Item]  # what runs in one place, one after the other

results: dict[str, tuple[str, float]] = {}
reporters: list[Any] = []  # pytest's terminal reporter, once it is there


def units_of(items: list[pytest.Item]) -> list[Unit]:
    """Return all tests, those together that have to stay together."""
    units: dict[tuple[str, str], Unit] = {}
    for item in items:
        definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 (pytest keeps it to itself)
        if any(definition[-1].scope == "module" for definition in definitions):
            key = ("module", str(item.path))
        else:
            parent = item.getparent(pytest.Class)
            key = ("class", parent.nodeid) if parent else ("test", item.nodeid)
        units.setdefault(key, []).append(item)
    return list(units.values())


def longest_first(units: list[Unit]) -> list[Unit]:
    """Return them in the order to run them in: a `crowd` is last."""
    earlier: dict[str, tuple[str, float]] = {}
    if "LAB_SECONDS" in os.environ:
        with open(os.environ["LAB_SECONDS"], encoding="utf-8") as file:
            earlier = json.load(file)

    def key(unit: Unit) -> tuple[bool, float]:
        seconds = sum(earlier[item.nodeid][1] if item.nodeid in earlier else 10 for item in unit)
        return any(item.get_closest_marker("crowd") for item in unit), -seconds

    return sorted(units, key=key)


def claimed(units: list[Unit], folder: str) -> Iterator[pytest.Item]:
    """The tests that no other run has come to first; each is claimed when it is asked for."""
    for unit in units:
        try:
            os.mkdir(os.path.join(folder, hashlib.sha256(unit[0].nodeid.encode()).hexdigest()))
        except FileExistsError:
            continue
        yield from unit


def pytest_sessionstart(session: pytest.Session) -> None:
    reporters.append(session.config.pluginmanager.getplugin("terminalreporter"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if "LAB_CLAIMS" not in os.environ or session.testsfailed:
        return None  # as usual
    items = claimed(longest_first(units_of(session.items)), os.environ["LAB_CLAIMS"])
    item = next(items, None)
    while item:
        following = next(items, None)  # now, for pytest keeps what the two of them share
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def give_up(*_: object) -> None:
    for look in LOOKS:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(look.split(), stdin=subprocess.DEVNULL, timeout=20, check=False)
    raise TimeoutError("the test has not ended in time")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, float(os.environ.get("LAB_TIME_LIMIT", "0")), TO_CLEAN_UP)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome, seconds = results.get(report.nodeid, ("passed", 0.0))
    if report.outcome != "passed":
        outcome = report.outcome
    results[report.nodeid] = (outcome, seconds + report.duration)
    if report.failed:
        for reporter in filter(None, reporters):
            reporter.ensure_newline()
            reporter.write_line(f"{report.nodeid} failed ({report.when}):\n{report.longreprtext}")


def versions() -> dict[str, str]:
    found = {}
    for what, command in VERSIONS.items():
        if shutil.which(command.split()[0]):
            text = subprocess.run(command.split(), stdout=subprocess.PIPE, text=True, timeout=60, check=False).stdout
            match = re.search(r"\d+\.\d+(\.\d+)?", text.partition("xen_version")[2] or text)
            found[what] = match[0] if match else "?"
    return found


def pytest_sessionfinish() -> None:
    if "LAB_RESULTS" in os.environ and shutil.which("xl"):
        with open(f"{os.environ['LAB_RESULTS']}.versions", "w", encoding="utf-8") as file:
            json.dump(versions(), file)
    if "LAB_RESULTS" in os.environ:
        with open(f"{os.environ['LAB_RESULTS']}.{os.getpid()}.json", "w", encoding="utf-8") as file:
            json.dump(results, file)
