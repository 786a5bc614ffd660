#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""All tests that need no Xen, on this machine, and how many lines of runx.py they reach.

    tests/fast.py [--missed] [--alone] [PYTEST OPTIONS AND PATHS]

It fails if a test does, or if less than COVERAGE of the lines are reached; with paths among the options it only tells.
As many pytests as there are processors take a file of tests at a time; --alone: one does it all.  --missed: also the
numbers of the lines that are not reached.
"""

import ast
import marshal
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


def marked(text):
    """(The syntax tree of runx.py in which each statement first marks its line, those lines)"""
    tree, numbers = ast.parse(text), set()
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, [each for statement in block for each in with_mark(statement, numbers)])
    return tree, numbers


def with_mark(statement, numbers):
    """The statement, and its mark before it if it does anything and need not be the first."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if is_text or isinstance(statement, (ast.Global, ast.Nonlocal)) or getattr(statement, "module", "") == "__future__":
        return [statement]
    numbers.add(statement.lineno)
    (mark,) = ast.parse(lines.MARK.format(statement.lineno)).body
    for node in ast.walk(mark):
        node.lineno = node.end_lineno = statement.lineno
    return [mark, statement]


def prepare_page(path):
    """Makes the file for lines.py, with no line marked, and the code beside it; returns the lines that can be."""
    tree, numbers = marked(pathlib.Path(lines.MODULE).read_text(encoding="utf-8"))
    pathlib.Path(path).write_bytes(bytes(lines.LINES_MAX))
    pathlib.Path(f"{path}.code").write_bytes(marshal.dumps(compile(tree, lines.MODULE, "exec", dont_inherit=True)))
    return numbers


def test_files():
    return sorted(str(path) for path in TESTS.glob("test_*.py") if "_xen_" not in path.name)


def ranges(numbers):
    """ "1-3, 7" """
    found = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def run_tests(options, pages):
    """Has a pytest run them for each of the pages; returns its exit status, or that of one that has failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "fast", *options]
    search = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as claims:
        env = {**os.environ, "FILE_CLAIMS": claims, "PYTHONPATH": search}
        outputs = [None, *(tempfile.TemporaryFile() for _ in pages[1:])]
        running = [
            subprocess.Popen(command, env={**env, "RUNX_LINES": page}, stdout=output, stderr=output)
            for page, output in zip(pages, outputs)
        ]
        statuses = [process.wait() for process in running]
    for output in outputs[1:]:
        output.seek(0)
        print(output.read().decode("utf-8", "replace"), end="")
    return max(statuses)


def main(words):
    options = [word for word in words if word not in FLAGS]
    some = any(not option.startswith("-") for option in options)
    workers = 1 if "--alone" in words else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        page = f"{folder}/page"
        numbers = prepare_page(page)
        status = run_tests([*options, *([] if some else test_files())], [page] * workers)
        seen = pathlib.Path(page).read_bytes()
    missed = sorted(number for number in numbers if not seen[number])
    share = 1 - len(missed) / len(numbers)
    print(f"runx.py: {share:.1%} of its lines are reached without Xen")
    if "--missed" in words:
        print(f"not reached: {ranges(missed)}")
    if status == 0 and not some and share < COVERAGE:
        print(f"that is less than {COVERAGE:.0%}")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
