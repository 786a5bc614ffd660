# SPDX-License-Identifier: Apache-2.0
"""What all of the lab shares: where the working tree is, errors, and words to the user."""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


class LabError(Exception):
    """Something that the user should know, in a sentence; the lab ends with `status`."""

    status = 125


class TimeLimit(LabError):
    """Something took too long; the status is that of timeout(1)."""

    status = 124


class Interrupted(BaseException):
    """A signal asks the lab to end; like KeyboardInterrupt, not for `except Exception`."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.status = 128 + signum


def say(text: str) -> None:
    """Tell the user something, beside the output of what runs."""
    print(f"lab: {text}", file=sys.stderr, flush=True)
