# SPDX-License-Identifier: Apache-2.0
"""Which lines of runx.py the tests reach, in all processes together.

With RUNX_LINES, a file, every process that has called start_if_asked() marks each line of runx.py that it executes, a
byte each in memory that all share: a process that forks, ends by os._exit() or is killed is counted like any other,
and nothing has to be written when it ends.
"""

import ast
import dis
import mmap
import os
import pathlib
import sys

MODULE = pathlib.Path(__file__).resolve().parent.parent / "runx.py"
LINES_MAX = 1 << 14


def start_if_asked():
    """To be called before runx is imported."""
    path = os.environ.get("RUNX_LINES")
    if not path or "runx" in sys.modules:
        return
    with open(path, "r+b") as file:
        seen = mmap.mmap(file.fileno(), LINES_MAX)
    name = str(MODULE)
    if hasattr(sys, "monitoring"):
        watch(name, seen)
    else:
        sys.settrace(tracer(name, seen))


def watch(name, seen):
    """By sys.monitoring, which costs each line but once."""
    tool, events = sys.monitoring.COVERAGE_ID, sys.monitoring.events

    def line(code, number):
        if code.co_filename == name:
            seen[number] = 1
        return sys.monitoring.DISABLE

    sys.monitoring.use_tool_id(tool, "lines")
    sys.monitoring.register_callback(tool, events.LINE, line)
    sys.monitoring.set_events(tool, events.LINE)


def tracer(name, seen):
    """For sys.settrace(): functions whose lines all are seen are traced no more."""
    left = {}  # code: numbers of its lines that are not seen yet

    def line(frame, event, _):
        if event == "line":
            seen[frame.f_lineno] = 1
            left[frame.f_code].discard(frame.f_lineno)
        return line

    def call(frame, _event, _):
        code = frame.f_code
        if code.co_filename != name:
            return None
        if code not in left:
            left[code] = {number for _, number in dis.findlinestarts(code) if number and not seen[number]}
        elif not left[code]:
            return None
        return line

    return call


def statements(source):
    """{line: the first line of its statement} of all lines of the module that can be executed."""
    first, todo, found = {}, [compile(source, str(MODULE), "exec")], {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            end = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno
            for number in range(node.lineno, max(end, node.lineno) + 1):
                first[number] = max(first.get(number, 0), node.lineno)
    while todo:
        code = todo.pop()
        found.update({n: first.get(n, n) for _, n in dis.findlinestarts(code) if n})
        todo += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
    return found


def report(path):
    """(share of statements that were reached, numbers of those that were not)."""
    of = statements(MODULE.read_text(encoding="utf-8"))
    seen = pathlib.Path(path).read_bytes()
    reached = {of[number] for number in of if seen[number]}
    missed = sorted(set(of.values()) - reached)
    return len(reached) / len(set(of.values())), missed
