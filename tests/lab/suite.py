# SPDX-License-Identifier: Apache-2.0
"""Every test and every check: what runs here, what runs in a dom0, and all of it side by side."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pythons
from arch import ARM64, X86_64, Architecture
from build import Built, build
from common import REPO, Interrupted, LabError, say
from image import cache_root, image_folder, machine_name
from machine import booted_lab
from release import BOOKWORM, FORKY, TRIXIE, Release

LAB = Path(__file__).resolve().parent
BEGAN = time.monotonic()
TIME_LIMIT = 5400  # seconds, for a dom0's tests
ELSEWHERE_LIMIT = 2700  # seconds after BEGAN: others take up to 40 minutes, and CI ends after 90
TEST_TIME_LIMIT = 900  # seconds, for one test in a dom0; the longest one takes 6 minutes
PYTHON_TIME_LIMIT = 600  # seconds, for the fast tests under one Python
PYTEST = ["-pplugin", "-pno:cacheprovider", "-rs"]
# What every Python runs too is the rest: these start many processes, or none that runs runx.py, or their own python3.
ONE_PYTHON = (
    "commands", "exec", "failures", "initrd", "install", "interfaces", "lab", "life", "machine", "mutations", "shape",
    "streams", "yocto",
)  # fmt: skip
NONE_SELECTED = 5  # pytest's status where -k, or a path, leaves nothing


@dataclasses.dataclass
class Job:
    """Something that runs beside others, in a process of its own: it prints, and returns a status."""

    name: str
    work: Callable[[], int]


# -- what runs here --------------------------------------------------------------------------------


def call(
    argv: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    time_limit: float = TIME_LIMIT,
    quiet: bool = False,
) -> int:
    """Run a program of this machine that cleans up after SIGINT; let it do so when we must end.

    A quiet one's output is shown only if it fails.
    """
    process = subprocess.Popen(
        argv,
        cwd=REPO,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        start_new_session=True,  # so that a terminal's Ctrl-C reaches only us
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
        if quiet and process.returncode:
            sys.stdout.buffer.write(output)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    except subprocess.TimeoutExpired:
        print(f"{argv[0]} has not ended in {time_limit:.0f} s", flush=True)
        os.killpg(process.pid, signal.SIGKILL)
        return 124
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()


def python_of(built: Built) -> Path:
    """The interpreter that has pytest and what checks."""
    assert built.tools
    return built.tools / "bin/python"


def shell_scripts() -> list[str]:
    """The tracked files that a shell runs."""
    # whoever owns the tree: root may look at it
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=REPO, stdout=subprocess.PIPE, check=True).stdout
    found = []
    for name in listed.decode().split("\0"):
        if name and (REPO / name).is_file():
            with open(REPO / name, "rb") as file:
                first = file.readline(100).rstrip()
            if name.endswith(".bash-completion") or first.startswith(b"#!") and first.endswith((b"sh", b"bash")):
                found.append(name)
    return found


def check(built: Built) -> int:
    """Run what reads the sources without running them; return 1 if one complains."""
    python = python_of(built)
    checks: dict[str, list[str | Path]] = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "mypy tests/lab": [python, "-m", "mypy", "--config-file", LAB / "mypy.ini", "tests/lab"],
        "mypy runx.py": [python, "-m", "mypy", "--config-file", LAB / "mypy.ini", "runx.py"],
        "shellcheck": ["shellcheck", *shell_scripts()],
    }
    failed = [name for name, argv in checks.items() if call(argv, quiet=True)]
    for name in checks:
        print(f"{name}: {'complains, see above' if name in failed else 'nothing to say'}", flush=True)
    return 1 if failed else 0


def fast_tests(built: Built, words: list[str], results: Path) -> int:
    """Run the tests that need no Xen under this machine's python3, and tell how much of runx.py they reach."""
    env = {"PYTHONPATH": str(LAB), "LAB_RESULTS": str(results)}
    return call([python_of(built), "tests/fast.py", *PYTEST, *words], env)


def other_pythons(built: Built, share: Path) -> int:
    """Run the fast tests, but for those of ONE_PYTHON, under every other CPython; return 1 if one fails."""
    found = pythons.find(built.pythons)
    missing = [f"3.{minor}" for minor in range(pythons.OLDEST, max(found)) if minor not in found]
    print(f"no CPython {', '.join(missing)} to test with" if missing else "no CPython is missing", flush=True)
    packages = next(python_of(built).parents[1].glob("lib/python3.*/site-packages"))
    env = {"PYTHONPATH": f"{packages}:{LAB}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ignored = ["--ignore-glob=*/test_xen_*", *(f"--ignore-glob=*/test_{name}.py" for name in ONE_PYTHON)]
    words: list[str | Path] = ["-m", "pytest", "-q", *PYTEST, *ignored, REPO / "tests"]

    def run(minor: int) -> int:
        began = time.monotonic()
        results = {"LAB_RESULTS": str(share / f"python3.{minor}")}
        status = call([found[minor], *words], {**env, **results}, PYTHON_TIME_LIMIT, quiet=True)
        what = f"failed with status {status}" if status else "passed"
        print(f"CPython 3.{minor} ({found[minor]}): {what}, {time.monotonic() - began:.0f} s", flush=True)
        return status

    others = [minor for minor in found if found[minor].resolve() != Path("/usr/bin/python3").resolve()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return 1 if any(list(pool.map(run, others))) else 0


# -- what runs in a dom0 ---------------------------------------------------------------------------


def in_dom0(built: Built, words: list[str], share: Path, name: str, processors: int = 2) -> int:
    """Run pytest in a dom0; with other dom0s that have the same share, each test in one.

    With two emulated processors the tests take a quarter longer where all real ones are busy: QEMU has to keep the two
    in step.  A test marked `processors` wants them.
    """
    options = ["-v", "-o", "console_output_style=classic", "--durations=10", "-o", "python_files=test_xen_*.py"]
    command = ["python3", "-m", "pytest", *PYTEST, *options, *words]
    env = {"PYTHONPATH": "/repo/tests/lab", "LAB_CLAIMS": "/share/claims", "LAB_RESULTS": f"/share/{name}"}
    # what is compiled, the next one finds: to compile all tests takes half a minute there
    env.update(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX="/share/pycache")
    env["LAB_TIME_LIMIT"] = str(TEST_TIME_LIMIT)
    if (share / "seconds.json").exists():
        env["LAB_SECONDS"] = "/share/seconds.json"
    began = time.monotonic()
    with booted_lab(**built.machine(), disk=built.debian, share=share, processors=processors) as lab:
        print(f"up after {time.monotonic() - began:.1f} s", flush=True)
        return lab.run(command, env=env, time_limit=TIME_LIMIT)


# -- all of it -------------------------------------------------------------------------------------


def run_some(built: Built, words: list[str]) -> int:
    """Run what pytest's arguments select: here, and in one dom0."""
    here, there = divide(words)
    with results_folder(built) as share:
        jobs = []
        if here:
            jobs.append(Job("here", lambda: fast_tests(built, here, share / "here")))
        if there:
            jobs.append(Job("dom0", lambda: in_dom0(built, there, share, "dom0")))
        return summary(jobs, side_by_side(jobs), share)


# What takes as long as all else: whole programs on a container's files, and the yardstick for what checks these
BY_NAME = ["test_xen_apps.py", "test_xen_files.py::test_a_block_device_is_a_local_file_system"]


def run_all(built: Built) -> int:
    """Run every check, and every test: here and under other Pythons, and then in two dom0s, which leave nothing idle;
    last, where all is run for this machine's own kind, the main path on other machines.

    Not at once: a dom0 that has to wait for a real processor is not in time for what has a limit.
    """
    own = machine_name(built.arch, built.release) == X86_64.name
    with results_folder(built) as share:
        here = [
            Job("checks", lambda: check(built)),
            Job("here", lambda: fast_tests(built, [], share / "here")),
            Job("pythons", lambda: other_pythons(built, share)),
        ]
        if not own:
            here = []  # nothing of it depends on the machine
        words = ["/repo/tests", *(f"--deselect={test}" for test in BY_NAME)]
        print(f"left out, and run by name: {', '.join(BY_NAME)}", flush=True)

        def most(name: str) -> int:
            return in_dom0(built, ["-m", "not processors", *words], share, name, processors=1)

        def rest_and_most(name: str) -> int:
            # first, so that both end at the same time; and of another name, for pytest may get the same pid in both,
            # and its results are kept by that
            return max(in_dom0(built, ["-m", "processors", *words], share, f"{name}-processors"), most(name))

        dom0s = [Job("dom0-1", lambda: most("dom0-1")), Job("dom0-2", lambda: rest_and_most("dom0-2"))]
        statuses = side_by_side(here) + side_by_side(dom0s)
        status = summary([*here, *dom0s], statuses, share)
    elsewhere = run_elsewhere() if own else 0
    return status or elsewhere


def run_elsewhere() -> int:
    """Test the main path on an Arm machine, and beside it on newer Debians; return the status."""
    if time.monotonic() - BEGAN > ELSEWHERE_LIMIT:
        say(f"no other machine is tested: the rest has taken more than {ELSEWHERE_LIMIT // 60} minutes")
        return 0
    machines = [(ARM64, BOOKWORM), (X86_64, TRIXIE), (X86_64, FORKY)]
    made = side_by_side([Job(machine_name(*each), functools.partial(prepare, *each)) for each in machines])
    jobs = [
        Job("arm64", lambda: main_path(ARM64, BOOKWORM)),
        Job("trixie, forky", lambda: main_path(X86_64, TRIXIE) or main_path(X86_64, FORKY)),
    ]
    return max(made) or max(side_by_side(jobs))


def prepare(arch: Architecture, release: Release) -> int:
    """Build what a machine needs."""
    if release is FORKY and call([LAB / "image.py", arch.name, release.name]):
        say("forky changes every day, and today its dom0 cannot be made: it is not tested; the reason is above")
    else:
        build(arch=arch, release=release)
    return 0


def main_path(arch: Architecture, release: Release) -> int:
    """Run the tests that are marked main_path in a dom0 of that machine, unless there is none."""
    if not image_folder(arch, release).is_dir():
        return 0  # prepare() has said why
    built = build(arch=arch, release=release)
    with results_folder(built) as share:
        job = Job("dom0", lambda: in_dom0(built, ["-m", "main_path", "/repo/tests"], share, "dom0", processors=1))
        return summary([job], side_by_side([job]), share)


def results_file(name: str) -> Path:
    """Where is kept what became of each test on the machine of that name: {test: [outcome, seconds]}."""
    return cache_root() / f"seconds{'' if name == X86_64.name else '-' + name}.json"


def versions_file(name: str) -> Path:
    """Where the versions of what its dom0 has are kept: {what: version}."""
    return cache_root() / f"versions-{name}.json"


@contextlib.contextmanager
def results_folder(built: Built) -> Iterator[Path]:
    """What the runs of pytest share: their claims, their results, and how long each test took the last time.

    What became of each test is kept, and the versions of what is in the dom0, for tests/platforms.py.
    """
    name = machine_name(built.arch, built.release)
    kept = results_file(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "claims").mkdir()
        if kept.exists():
            (folder / "seconds.json").write_bytes(kept.read_bytes())
        yield folder
        seconds = json.loads(kept.read_text()) if kept.exists() else {}
        for path in folder.glob("dom0*.*.json"):
            seconds.update(json.loads(path.read_text()))
        keep(kept, json.dumps(seconds))
        for path in folder.glob("dom0*.versions"):
            keep(versions_file(name), path.read_text())


def keep(path: Path, text: str) -> None:
    """Replace a file in the cache in one step."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    partial.write_text(text)
    partial.rename(path)


def summary(jobs: list[Job], statuses: list[int], share: Path) -> int:
    """Print what became of all jobs and tests; return the status for all."""
    outcomes: list[str] = []
    for path in sorted(share.glob("*.*.json")):
        place = path.name.rsplit(".", 2)[0]  # such as dom0-1 or python3.9
        results = json.loads(path.read_text())
        outcomes += [outcome for outcome, _ in results.values() if not place.startswith("python")]
        for test in (test for test, (outcome, _) in results.items() if outcome == "failed"):
            say(f"{place}: {test} has failed")
    # That no test was selected may well be so in one of the places.
    bad = [status for status in statuses if status not in (0, NONE_SELECTED)]
    for job, status in zip(jobs, statuses):
        if status in bad:
            say(f"{job.name} has failed with status {status}")
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    print(f"tests: {', '.join(counts)}", flush=True)
    return bad[0] if bad else min(statuses)


class Running:
    """A job that has been started."""

    def __init__(self, job: Job, named: bool):
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(writer, True)
        self.child = start(job, writer)
        os.close(writer)
        self.output, self.ended = reader, os.pidfd_open(self.child)
        self.head = f"{job.name:7} | ".encode() if named else b""
        self.rest = b""  # of a line that has not ended
        self.began = time.monotonic()

    def show(self) -> bool:
        """Print the whole lines that have come; return whether there may be more."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        *lines, self.rest = (self.rest + data).split(b"\n")
        sys.stdout.buffer.write(b"".join(self.head + line + b"\n" for line in lines))
        sys.stdout.flush()
        return bool(data)

    def finish(self) -> int:
        """Print the rest and return the status.  Its output need not end: who it has left behind may hold it open."""
        while self.show():
            pass
        _, waited = os.waitpid(self.child, 0)
        status = os.waitstatus_to_exitcode(waited)
        ended = f"status {status} after {time.monotonic() - self.began:.0f} s".encode()
        lines = [self.rest] * bool(self.rest) + [ended] * bool(self.head)
        sys.stdout.buffer.write(b"".join(self.head + line + b"\n" for line in lines))
        sys.stdout.flush()
        os.close(self.output)
        os.close(self.ended)
        return status


def side_by_side(jobs: list[Job]) -> list[int]:
    """Return their statuses.  Each line that one of them prints comes at once, behind its name if there are several."""
    running: list[Running] = []
    statuses: dict[Running, int] = {}
    try:
        for job in jobs:
            running.append(Running(job, len(jobs) > 1))
        with selectors.DefaultSelector() as selector:
            for each in running:
                selector.register(each.output, selectors.EVENT_READ, each)
                selector.register(each.ended, selectors.EVENT_READ, each)
            while len(statuses) < len(running):
                for key, _ in selector.select():
                    each = key.data
                    if each in statuses:
                        continue
                    if key.fd == each.output and each.show():
                        continue
                    selector.unregister(key.fd)  # the output, at its end, or both
                    if key.fd == each.ended:
                        with contextlib.suppress(KeyError):
                            selector.unregister(each.output)
                        statuses[each] = each.finish()
    finally:
        left = [each for each in running if each not in statuses]
        for each in left:
            os.kill(each.child, signal.SIGINT)
        for each in left:
            each.finish()
    return [statuses[each] for each in running]


def start(job: Job, output: int) -> int:
    """Run it in a process of its own, which is returned, with its output and errors in a pipe."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    status = 1
    try:
        status = job.work()
    except (LabError, OSError, subprocess.SubprocessError) as error:
        say(str(error))
    except Interrupted as interrupted:
        status = interrupted.status
    finally:
        sys.stdout.flush()
        os._exit(status)


def divide(words: list[str]) -> tuple[list[str], list[str]]:
    """Pytest's arguments here and in the dom0; an empty list where there is nothing to run.

    Files and folders of the working tree are named by their path in the respective place, and
    files only where they belong; the other arguments are the same.
    """
    here, there = [], []
    paths_here, paths_there = [], []
    for word in words:
        path, colons, test = word.partition("::")
        inside = Path(path).exists() and REPO in [Path(path).resolve(), *Path(path).resolve().parents]
        if word.startswith("-") or not inside:
            here.append(word)
            there.append(word)
            continue
        full = Path(path).resolve()
        if full.is_dir() or not full.name.startswith("test_xen_"):
            paths_here.append(str(full) + colons + test)
        if full.is_dir() or full.name.startswith("test_xen_"):
            paths_there.append(str("/repo" / full.relative_to(REPO)) + colons + test)
    if not paths_here and not paths_there:
        paths_here, paths_there = [str(REPO / "tests")], ["/repo/tests"]
    return (here + paths_here if paths_here else [], there + paths_there if paths_there else [])
