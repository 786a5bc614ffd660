#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the fast tests would see it: a one-line fault in runx.py at a time, and tests run against each.

    tests/mutate.py [--seed N] [--count N] [--line N]

Faults are found by what the source is like (comparisons, arithmetic, constants, flags, calls, records), so that they
need no care when it changes; which of them are taken, the seed says.  It fails if less than CAUGHT of them are caught.

All tests run once without a fault, to learn which lines each reaches.  A fault in a function then needs only the tests
that reach its statement; one in a table those that reach a use of it, and the files that name it.  The quickest come
first, and the first that fails is enough.
"""

import argparse
import ast
import concurrent.futures
import itertools
import json
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

import fast
import lines

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COUNT, CAUGHT = 60, 0.9
# what is none of runX's, or sees only what has no sense at all
WITHOUT = ("test_lab.py", "test_initrd.py", "test_fake.py", "test_mutations.py", "test_shape.py")
PLUGIN = ("-p", "mutate", "--rootdir")  # and the folder from which on it names tests

COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
TYPES = ("tuple", "list", "dict", "set", "Callable", "Iterator", "Sequence", "Iterable")
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.Mult: ast.FloorDiv}


class Fault:
    """statement: what it is in; names: what that defines, if it runs when the module is loaded, else None."""

    def __init__(self, kind, node, replacement):
        self.kind, self.node, self.replacement = kind, node, replacement
        self.statement, self.names = None, None

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
        if not is_behind_in(node, parent):
            swapped = [node.elts[1], node.elts[0], *node.elts[2:]]
            yield Fault("swapped items", node, f"({replaced(node, elts=swapped)})")
    elif isinstance(node, ast.Dict) and len(node.keys) > 1:
        yield Fault("dropped entry", node, f"({replaced(node, keys=node.keys[:-1], values=node.values[:-1])})")


def is_behind_in(node, parent):
    """Whether the order of its items means nothing."""
    is_in = isinstance(parent, ast.Compare) and isinstance(parent.ops[-1], (ast.In, ast.NotIn))
    return is_in and node is not parent.left


def find_faults(source):
    """All Faults in functions and tables; none in what is only said (annotations, messages, raise, docstrings)."""
    faults, todo = [], [(ast.parse(source), None, None, False)]
    while todo:
        node, parent, statement, is_inside = todo.pop()
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or is_immaterial(node):
            continue
        statement = node if isinstance(node, ast.stmt) else statement
        for fault in faults_of(node, parent):
            fault.statement, fault.names = statement.lineno, None if is_inside else defined(statement)
            faults.append(fault)
        for name, value in ast.iter_fields(node):
            inside = is_inside or isinstance(node, ast.FunctionDef) and name == "body"
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                each = value if isinstance(value, list) else [value]
                todo += [(child, node, statement, inside) for child in each if isinstance(child, ast.AST)]
    return sorted(faults, key=lambda fault: (fault.node.lineno, fault.node.col_offset, fault.kind))


def defined(statement):
    """The names that a statement of the module's or a class's defines."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", statement)]
    names = {getattr(each, "id", None) for target in targets for each in ast.walk(target)}
    return names - {None} if not isinstance(statement, ast.FunctionDef) else {statement.name}


def is_immaterial(node):
    """Whether nobody could tell a fault there: types, what is said for developers, what is closed by a process that
    ends, and how long or how much something may be at most."""
    if isinstance(node, ast.Assign):
        names = ast.unparse(node.targets[0])
        return names.isupper() and any(word in names for word in ("MAX", "LIMIT", "DELAY", "GRACE", "_END", "MOST"))
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.value) in TYPES
    return isinstance(node, ast.Expr) and any(word in ast.unparse(node) for word in (".debug(", "os.close("))


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


# ---- as a plugin of pytest


def pytest_runtest_logstart(nodeid):
    """Which lines a test reaches: none yet.  A test runs for RUNX_LINES, with which it is noted, or for a fault."""
    if "RUNX_LINES" in os.environ:
        sys.modules["runx"].lines_seen[:] = bytes(lines.LINES_MAX)
        began[nodeid] = time.monotonic()


def pytest_runtest_logfinish(nodeid):
    if "RUNX_LINES" in os.environ:
        reached = [number for number, seen in enumerate(bytes(sys.modules["runx"].lines_seen)) if seen]
        with open(os.environ["RUNX_LINES"] + ".tests", "a", encoding="utf-8") as file:
            file.write(json.dumps([nodeid, time.monotonic() - began[nodeid], reached]) + "\n")


def pytest_collection_modifyitems(items):
    """Those that the fault needs, in their order; first what is a test with this fault alone."""
    if "MUTATE_RANKS" in os.environ:
        ranks = json.loads(pathlib.Path(os.environ["MUTATE_RANKS"]).read_text())
        needed = [item for item in items if ranks.get(item.nodeid, -1) is not None]
        items[:] = sorted(needed, key=lambda item: ranks.get(item.nodeid, -1))


began = {}  # id of a test: when


# ---- which tests a fault needs


def look_without_fault(workers):
    """{id of a test: (seconds, lines that it reaches)}, or None if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        pages = [f"{folder}/{number}" for number in range(workers)]
        for page in pages:
            fast.prepare_page(page)
        files = [path for path in fast.test_files() if pathlib.Path(path).name not in WITHOUT]
        if fast.run_tests([*PLUGIN, str(fast.TESTS), *files], pages):
            return None
        notes = [json.loads(note) for page in pages for note in open(f"{page}.tests", encoding="utf-8")]
    return {name: (seconds, set(reached)) for name, seconds, reached in notes}


def statements(node, is_inside=False):
    """Yield (line, names that it mentions by itself, those that it defines or None if it is in a function) of each."""
    todo, blocks, names = [node], [], set()
    while todo:
        part = todo.pop()
        names |= {getattr(part, "id", None), getattr(part, "attr", None)}
        for child in ast.iter_child_nodes(part):
            (blocks if isinstance(child, ast.stmt) else todo).append(child)
    if isinstance(node, ast.stmt):
        yield node.lineno, names - {None}, None if is_inside else defined(node)
    for block in blocks:
        yield from statements(block, is_inside or isinstance(node, ast.FunctionDef))


def users(names, parts):
    """The lines in functions on which a name, or what is made of it when the module is loaded, is mentioned."""
    names, known = set(names), 0
    while known < len(names):
        known = len(names)
        for _, mentioned, made in parts:
            names |= made if made and mentioned & names else set()
    return {number for number, mentioned, made in parts if made is None and mentioned & names}


def ranked(fault, found, parts):
    """{id of a test: its rank, the first is 0, None if it is not needed}."""
    wanted, files = {fault.statement}, set()
    if fault.names is not None:
        wanted, word = users(fault.names, parts), re.compile(rf"\b({'|'.join(fault.names)})\b")
        files = {path.name for path in map(pathlib.Path, fast.test_files()) if word.search(path.read_text())}
    needed = [name for name, (_, reached) in found.items() if reached & wanted or name.partition("::")[0] in files]
    needed = needed if wanted else list(found)  # such as __slots__, which nothing mentions
    needed.sort(key=lambda name: found[name][0])
    return {**dict.fromkeys(found), **{name: rank for rank, name in enumerate(needed)}}


# ---- the runs


def copy_of_tree(folder):
    """A working tree in which runx.py can be replaced, with all that is compiled already."""
    ignored = shutil.ignore_patterns(".git", ".*_cache", "runx.*.pyc")
    return shutil.copytree(REPOSITORY, folder / "copy", ignore=ignored, symlinks=True)


def is_caught(text, ranks, seconds, folder):
    """Whether tests fail with this runx.py in the folder's tree.  Returns the first that does, "" if none does."""
    tests = sorted({name.partition("::")[0] for name, rank in ranks.items() if rank is not None})
    if not tests:
        return ""
    copy = folder / "copy"
    for compiled in copy.glob("__pycache__/runx.*"):
        compiled.unlink()
    (copy / "runx.py").write_text(text, encoding="utf-8")
    (folder / "ranks").write_text(json.dumps(ranks))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--basetemp",
         f"{folder}/tests", *PLUGIN, f"{copy}/tests", *(f"tests/{name}" for name in tests)],
        cwd=copy, env={**os.environ, "MUTATE_RANKS": f"{folder}/ranks", "PYTHONPATH": f"{copy}/tests"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    limit = 60 + 3 * seconds  # a fault that makes runX hang is seen, too
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return f"nothing within {limit:.0f} s"
    if process.returncode in (0, 5):  # 5: none is a test with this fault
        return ""
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:150] if failed else f"pytest ends with {process.returncode}"


def try_all(faults, found, source, jobs):
    """Yield (Fault, who has caught it), in the order in which that is known."""
    parts, folders = list(statements(ast.parse(source))), queue.SimpleQueue()

    def run(fault):
        folder, ranks = folders.get(), ranked(fault, found, parts)
        try:
            seconds = sum(found[name][0] for name, rank in ranks.items() if rank is not None)
            return is_caught(fault.apply(source), ranks, seconds, folder)
        finally:
            folders.put(folder)

    with tempfile.TemporaryDirectory(prefix="mutants-") as top, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            folder = pathlib.Path(top, str(number))
            folder.mkdir()
            copy_of_tree(folder)
            folders.put(folder)
        runs = {pool.submit(run, fault): fault for fault in faults}
        for each in concurrent.futures.as_completed(runs):
            yield runs[each], each.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--line", type=int, help="only the faults of this line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    source = (REPOSITORY / "runx.py").read_text(encoding="utf-8")
    faults = [fault for fault in find_faults(source) if arguments.line in (None, fault.node.lineno)]
    candidates = choose(faults, 2 * arguments.count, arguments.seed)
    sound = (fault for fault in candidates if is_sound(fault.apply(source)))
    chosen = list(itertools.islice(sound, arguments.count))
    found = look_without_fault(arguments.jobs)
    if not found:
        print("a test fails without any fault")
        return 2
    print(f"seed {arguments.seed}: {len(chosen)} of {len(faults)} faults", flush=True)
    survivors = []
    for fault, reason in try_all(chosen, found, source, arguments.jobs):
        print(f"{'caught  ' if reason else 'SURVIVED'} {fault.describe(source)}  [{reason}]", flush=True)
        survivors += [] if reason else [fault]
    caught = 1 - len(survivors) / len(chosen)
    print(f"{caught:.0%} of {len(chosen)} faults are caught; seed {arguments.seed}")
    for fault in sorted(survivors, key=lambda fault: fault.node.lineno):
        print(f"  survived: {fault.describe(source)}\n       with: {fault.replacement.splitlines()[0][:100]}")
    return 0 if caught >= CAUGHT else 1


if __name__ == "__main__":
    sys.exit(main())
