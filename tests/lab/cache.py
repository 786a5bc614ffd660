# SPDX-License-Identifier: Apache-2.0
"""What is made once and kept: folders in the cache, named after all that decides their content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from image import cache_root


def kept(name: str, inputs: list[bytes], make: Callable[[Path, Path], None]) -> Path:
    """Return the folder `name`-<hash of inputs>.  If there is none, make(a new folder, its later path) fills it.

    Of two programs that want it, one makes it.  Older ones of that name are removed when it has been made, but for
    the one used last: two checkouts must not take turns in making theirs.
    """
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"".join(b"%d:%s" % (len(each), each) for each in inputs)).hexdigest()[:16]
    target = root / f"{name}-{digest}"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for leftover in root.glob(f"partial-{name}-*"):
                shutil.rmtree(leftover)
            work = Path(tempfile.mkdtemp(prefix=f"partial-{name}-", dir=root))
            make(work, target)
            work.chmod(0o755)
            work.rename(target)
            others = sorted(root.glob(f"{name}-*"), key=lambda folder: folder.stat().st_mtime)
            for folder in [folder for folder in others if folder != target][:-1]:
                shutil.rmtree(folder)
        os.utime(target)  # the time of its last use
    return target
