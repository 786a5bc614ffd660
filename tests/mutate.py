#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the fast tests would see it: a one-line fault in runx.py at a time, and the tests run against each.

    tests/mutate.py [--seed N] [--count N] [--line N] [PYTEST OPTIONS]

Faults are found by what the source is like (comparisons, arithmetic, constants, flags, calls, records), so that they
need no care when it changes; which of them are taken, the seed says.  It fails if less than CAUGHT of them are caught.
Not part of CI: it takes as long as some sixty runs of the fast tests that stop at the first failure.
"""

import argparse
import ast
import concurrent.futures
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COUNT, CAUGHT = 60, 0.9
TIME_LIMIT = 300  # seconds until a run is stopped: a fault that makes runX hang is seen, too
# what is quick and likely to see a fault comes first, and what takes long last
FIRST = ("test_formats", "test_config", "test_life", "test_commands", "test_streams", "test_state", "test_network")
LAST = "test_failures"
# what is none of runX's, or sees only what has no sense at all
WITHOUT = ("test_lab.py", "test_initrd.py", "test_fake.py", "test_mutations.py", "test_shape.py")

COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
TYPES = ("tuple", "list", "dict", "set", "Callable", "Iterator", "Sequence", "Iterable")
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.Mult: ast.FloorDiv}


class Fault:
    def __init__(self, kind, node, replacement):
        self.kind, self.node, self.replacement = kind, node, replacement

    def apply(self, source):
        """The source with the fault in it; all else, and all line numbers, are as they were."""
        rows = source.splitlines(keepends=True)
        first, last = self.node.lineno - 1, self.node.end_lineno - 1
        start = len("".join(rows[:first]).encode()) + self.node.col_offset
        end = len("".join(rows[:last]).encode()) + self.node.end_col_offset
        raw = source.encode()
        return (raw[:start] + self.replacement.encode() + raw[end:]).decode()

    def describe(self, source):
        return f"{self.kind}, line {self.node.lineno}: {source.splitlines()[self.node.lineno - 1].strip()}"


def replaced(node, **fields):
    return ast.unparse(ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node))


def faults_of(node, parent):
    """The Faults that a node of the syntax tree can have."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]()
        yield Fault("comparison", node, f"({replaced(node, ops=[other])})")
    elif isinstance(node, ast.BoolOp):
        yield Fault(
            "and for or", node, f"({replaced(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())})"
        )
        yield Fault("dropped condition", node, f"({replaced(node, values=node.values[1:] + [node.values[-1]])})")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield Fault("dropped not", node, f"({ast.unparse(node.operand)})")
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield Fault("operator", node, f"({replaced(node, op=OPERATORS[type(node.op)]())})")
    elif isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1024:
        yield Fault("off by one", node, f"({node.value + 1})")
    elif isinstance(node, ast.Constant) and type(node.value) is bool and getattr(parent, "arg", "") != "check":
        yield Fault("flag", node, str(not node.value))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield Fault("dropped call", node, "pass")
    elif isinstance(node, ast.AugAssign):
        yield Fault("dropped change", node, "pass")
    elif isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
        yield Fault("dropped item", node, f"({replaced(node, elts=node.elts[:-1])})")
        swapped = [node.elts[1], node.elts[0], *node.elts[2:]]
        yield Fault("swapped items", node, f"({replaced(node, elts=swapped)})")
    elif isinstance(node, ast.Dict) and len(node.keys) > 1:
        yield Fault("dropped entry", node, f"({replaced(node, keys=node.keys[:-1], values=node.values[:-1])})")


def find_faults(source):
    """All Faults in functions and tables; none in what is only said (annotations, messages, raise, docstrings)."""
    faults, todo = [], [(ast.parse(source), None)]
    while todo:
        node, parent = todo.pop()
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or is_immaterial(node):
            continue
        faults += faults_of(node, parent)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                todo += [(each, node) for each in (value if isinstance(value, list) else [value]) if is_node(each)]
    return sorted(faults, key=lambda fault: (fault.node.lineno, fault.node.col_offset, fault.kind))


def is_immaterial(node):
    """Whether nobody could tell a fault there: types, what is said for developers, what is closed by a process that
    ends, and how long or how much something may be at most."""
    if isinstance(node, ast.Assign):
        names = ast.unparse(node.targets[0])
        return names.isupper() and any(word in names for word in ("MAX", "LIMIT", "DELAY", "GRACE", "_END", "MOST"))
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.value) in TYPES
    return isinstance(node, ast.Expr) and any(word in ast.unparse(node) for word in (".debug(", "os.close("))


def is_node(value):
    return isinstance(value, ast.AST)


def choose(faults, count, seed):
    """count of them, of each kind as many as there can be."""
    shuffled, kinds = random.Random(seed).sample(faults, len(faults)), {}
    for fault in shuffled:
        kinds.setdefault(fault.kind, []).append(fault)
    chosen = []
    while len(chosen) < count and any(kinds.values()):
        for kind in sorted(kinds):
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop())
    return chosen


def is_sound(text):
    """Whether Python takes it: a fault that nobody could commit is none."""
    try:
        compile(text, "runx.py", "exec")
        return True
    except SyntaxError:
        return False


def test_files(folder):
    names = sorted(path.name for path in (folder / "tests").glob("test_*.py") if "_xen_" not in path.name)
    names = [name for name in names if name not in WITHOUT]
    return sorted(names, key=lambda name: (*rank(name[:-3]), name))


def rank(name):
    return (FIRST.index(name) if name in FIRST else len(FIRST), name == LAST)


def is_caught(text, options):
    """Whether the tests fail with this runx.py.  Returns the first that does, "" if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"), symlinks=True)
        (copy / "runx.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--basetemp",
                   f"{folder}/tests", *options, *(f"tests/{name}" for name in test_files(copy))]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=copy, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output = process.communicate(timeout=TIME_LIMIT)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return f"nothing within {TIME_LIMIT} s"
    if process.returncode == 0:
        return ""
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:150] if failed else f"pytest ends with {process.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--line", type=int, help="only the faults of this line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments, options = parser.parse_known_args()
    source = (REPOSITORY / "runx.py").read_text(encoding="utf-8")
    faults = [fault for fault in find_faults(source) if arguments.line in (None, fault.node.lineno)]
    chosen = [fault for fault in choose(faults, 2 * arguments.count, arguments.seed) if is_sound(fault.apply(source))]
    chosen = chosen[: arguments.count]
    print(f"seed {arguments.seed}: {len(chosen)} of {len(faults)} faults", flush=True)
    reason = is_caught(source, options)
    if reason:
        print(f"without any fault: {reason}")
        return 2
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {pool.submit(is_caught, fault.apply(source), options): fault for fault in chosen}
        for run in concurrent.futures.as_completed(runs):
            fault, reason = runs[run], run.result()
            print(f"{'caught  ' if reason else 'SURVIVED'} {fault.describe(source)}  [{reason}]", flush=True)
            survivors += [] if reason else [fault]
    caught = 1 - len(survivors) / len(chosen)
    print(f"{caught:.0%} of {len(chosen)} faults are caught; seed {arguments.seed}")
    for fault in sorted(survivors, key=lambda fault: fault.node.lineno):
        print(f"  survived: {fault.describe(source)}\n       with: {fault.replacement.splitlines()[0][:100]}")
    return 0 if caught >= CAUGHT else 1


if __name__ == "__main__":
    sys.exit(main())
