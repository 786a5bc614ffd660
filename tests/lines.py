# SPDX-License-Identifier: Apache-2.0
"""A runx whose lines mark that they were reached, in all processes together.

With RUNX_LINES, a file that fast.py has prepared, every process that has called start_if_asked() gets a runx in which
each statement first marks its line: a byte in memory that all share.  So a process that forks, ends by os._exit() or
is killed is counted like any other, and nothing is under a tracer, which would make all else slow.
"""

import marshal
import mmap
import os
import sys

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "runx.py")
LINES_MAX = 1 << 14
MARK = "lines_seen[{}] = 1"


def start_if_asked():
    """To be called before runx is imported."""
    path = os.environ.get("RUNX_LINES")
    if not path or "runx" in sys.modules:
        return
    with open(path, "r+b") as file:
        seen = mmap.mmap(file.fileno(), LINES_MAX)
    with open(f"{path}.code", "rb") as file:
        code = marshal.load(file)
    module = sys.modules["runx"] = type(sys)("runx")
    vars(module).update(__file__=MODULE, lines_seen=seen)
    exec(code, vars(module))
