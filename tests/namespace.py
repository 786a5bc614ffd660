# SPDX-License-Identifier: Apache-2.0
"""Runs a part of a test where it can mount: in a child with a mount namespace of its own, which ends with it."""

import os
import pickle
import traceback

import runx


def in_own_mounts(work):
    """Return what work() returns there, which pickle must know; AssertionError, with the traceback, if it fails."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            runx.system_call("unshare", runx.CLONE_NEWNS)
            runx.mount(None, "/", runx.MS_REC | runx.MS_PRIVATE)
            answer = (True, work())
        except BaseException:
            answer = (False, traceback.format_exc())
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        done, result = pickle.loads(file.read())
    os.waitpid(pid, 0)
    assert done, result
    return result
