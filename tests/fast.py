#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""All tests that need no Xen, on this machine, and how many lines of runx.py they reach.

    tests/fast.py [--missed] [--alone] [PYTEST OPTIONS AND PATHS]

It fails if a test does, or if less than COVERAGE of the lines are reached; with paths among the options it only tells.
As many pytests as there are processors take a file of tests at a time; --alone: one does it all.  --missed: also the
numbers of the lines that are not reached.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import lines

TESTS = pathlib.Path(__file__).resolve().parent
COVERAGE = 0.85
SLOWEST = ("test_lab.py", "test_failures.py", "test_mutations.py", "test_interfaces.py", "test_life.py")  # come first
FLAGS = ("--missed", "--alone")


def pytest_runtestloop(session):
    """As a plugin of each pytest: it runs a file's tests if no other has claimed the file before."""
    if session.testsfailed or session.config.option.collectonly:
        return None  # as usual
    files = {}
    for item in session.items:
        files.setdefault(item.path.name, []).append(item)
    for name in sorted(files, key=lambda name: (SLOWEST.index(name) if name in SLOWEST else len(SLOWEST), name)):
        try:
            os.mkdir(os.path.join(os.environ["FILE_CLAIMS"], name))
        except FileExistsError:
            continue
        for item, following in zip(files[name], [*files[name][1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


def ranges(numbers):
    """ "1-3, 7" """
    found = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def run_tests(options, seen, workers):
    """Has pytest run them; returns its exit status, or that of one that has failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fast", *options]
    with tempfile.TemporaryDirectory() as claims:
        search = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "FILE_CLAIMS": claims, "RUNX_LINES": seen, "PYTHONPATH": search}
        outputs = [tempfile.TemporaryFile() for _ in range(workers)]
        running = [subprocess.Popen(command, env=env, stdout=output, stderr=output) for output in outputs[1:]]
        running.insert(0, subprocess.Popen(command, env=env))
        statuses = [process.wait() for process in running]
    for output in outputs[1:]:
        output.seek(0)
        print(output.read().decode("utf-8", "replace"), end="")
    return max(statuses)


def main(words):
    options = [word for word in words if word not in FLAGS]
    some = any(not option.startswith("-") for option in options)
    paths = [] if some else sorted(str(path) for path in TESTS.glob("test_*.py") if "_xen_" not in path.name)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(lines.LINES_MAX)
        workers = 1 if "--alone" in words else os.cpu_count() or 1
        status = run_tests([*options, *paths], file.name, workers)
        share, missed = lines.report(file.name)
    print(f"runx.py: {share:.1%} of its lines are reached without Xen")
    if "--missed" in words:
        print(f"not reached: {ranges(missed)}")
    if status == 0 and not some and share < COVERAGE:
        print(f"that is less than {COVERAGE:.0%}")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
