#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment that the tests and the checks run in: pytest, mypy, ruff (see requirements.txt).

    tools.py        print its folder, making it first if need be; that needs PyPI

The folder is ${XDG_CACHE_HOME:-~/.cache}/runx/tools-<key>.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cache import kept

HERE = Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3"
REQUIREMENTS = HERE / "requirements.txt"


def make(work: Path, _target: Path) -> None:
    """Fill the folder, which is moved later: programs are called as `bin/python -m pytest`, not by their scripts."""
    subprocess.run([PYTHON, "-m", "venv", work], check=True, stdout=sys.stderr)
    pip = f"{work}/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: --requirement"
    subprocess.run([*pip.split(), REQUIREMENTS], check=True, stdout=sys.stderr)


def main() -> int:
    version = subprocess.run([PYTHON, "-V"], stdout=subprocess.PIPE, check=True).stdout
    print(kept("tools", [version, REQUIREMENTS.read_bytes(), Path(__file__).read_bytes()], make))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"tools.py: making the environment for the tests: {error}; it needs python3-venv and PyPI")
