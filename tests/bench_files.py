# SPDX-License-Identifier: Apache-2.0
"""Runs in a container, for bench.py: prints how long its files take for what programs do, `name<tab>seconds` a line.

    bench_files.py GROUP RUNS SECONDS     take this group of figures RUNS times, or until that has taken so many SECONDS

Before each figure all is written and nothing is in the kernel's memory, but where its name says "again".
"""

import os
import subprocess
import sys
import time

FOLDER = "/bench"  # what prepare_programs() of bench.py has made
WORK = f"{FOLDER}/work"
COUNT = 500
TRANSACTIONS = "PRAGMA journal_mode=WAL; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);" + "".join(
    f"INSERT INTO t(b) VALUES('{number:060}');" for number in range(1000)
)


def run(command):
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(name, work):
    """Do the work, a command or a function, and print how long that took."""
    if not name.endswith("again"):
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    started = time.monotonic()
    if isinstance(work, str):
        run(work)
    else:
        work()
    print(f"{name}\t{time.monotonic() - started:.4f}", flush=True)


def create():
    for number in range(COUNT):
        fd = os.open(f"many/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, b"x" * 1000)
        os.close(fd)


def stat():
    for number in range(COUNT):
        os.stat(f"many/{number}")


def read():
    for number in range(COUNT):
        fd = os.open(f"many/{number}", os.O_RDONLY)
        os.read(fd, 2000)
        os.close(fd)


def unlink():
    for number in range(COUNT):
        os.unlink(f"many/{number}")


def dd(size, count):
    """Figures of 32 MiB."""
    return {
        f"write 32 MiB, {size} at a time": f"exec dd if=/dev/zero of=big bs={size} count={count} conv=fsync",
        f"read 32 MiB, {size} at a time": f"exec dd if=big of=/dev/null bs={size}",
    }


MANY = {f"{step.__name__} 500 files": step for step in (create, stat, read, unlink)}
# group: (a command before each time, figures in their order)
GROUPS = {
    "python": ("true", {"python3 -IS -c pass": "exec /usr/bin/python3 -IS -c pass"}),
    "large": ("rm -f big", dd("1M", 32)),
    "blocks": ("rm -f big", dd("4K", 8192)),
    "tree": ("rm -rf tree", {
        "untar 2,000 files": f"exec tar -xf {FOLDER}/tree.tar",
        "find of them": "exec find tree -type f",
        "find of them again": "exec find tree -type f",
    }),
    "git": ("rm -rf clone", {
        "git clone, 500 files": f"exec git clone -q {FOLDER}/repository clone",
        "git status": "cd clone && exec git status",
    }),
    "sqlite": ("rm -f database*", {"sqlite, 1,000 transactions": "exec sqlite3 database <script"}),
    "dpkg": ("dpkg --purge bench", {"dpkg -i, 500 files": f"exec dpkg -i {FOLDER}/package.deb"}),
    "many": ("rm -rf many; mkdir many", MANY),
}  # fmt: skip


def main(group, runs, seconds):
    run(f"rm -rf {WORK}; mkdir {WORK}")
    os.chdir(WORK)
    os.environ.update(HOME=FOLDER, DEBIAN_FRONTEND="noninteractive")
    with open("script", "w") as file:
        file.write(TRANSACTIONS)
    before, figures = GROUPS[group]
    started = time.monotonic()
    for _ in range(int(runs)):
        run(before)
        for name, work in figures.items():
            measure(name, work)
        if time.monotonic() - started > float(seconds):
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
