# SPDX-License-Identifier: Apache-2.0
"""The lab itself: its protocol without a boot, then a booted dom0, and what an end of any kind leaves behind."""

import contextlib
import hashlib
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios

import pytest
from conftest import REPOSITORY, call, on_xen, wait_until

LAB = REPOSITORY / "tests/lab/lab.py"
sys.path.insert(0, str(LAB.parent))

import agent  # noqa: E402
import arch  # noqa: E402
import cache  # noqa: E402
import common  # noqa: E402
import frames  # noqa: E402
import image  # noqa: E402
import lab as program  # noqa: E402
import machine  # noqa: E402
import platforms  # noqa: E402
import pythons  # noqa: E402
import release  # noqa: E402
import suite  # noqa: E402

pytestmark = pytest.mark.skipif(on_xen(), reason="the lab does not run inside the lab")

can_boot = pytest.mark.skipif(
    os.geteuid() != 0 or not image.image_folder().exists() or "LAB_RESULTS" not in os.environ,
    reason="boots a dom0, which takes longer than all others: `python3 tests/lab/lab.py test tests/test_lab.py` does",
)


# ---- the protocol


@pytest.fixture
def links():
    """The two ends of a link."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield frames.Link(ours.fileno()), frames.Link(theirs.fileno())


def receive_all(link):
    link.receive()
    received = []
    while link.has_frame():
        received.append(link.next_frame())
    return received


def test_frames_arrive_in_order_with_every_byte_value(links):
    sent = [(frames.STDOUT, bytes(range(256))), (frames.STDERR, b""), (frames.STDOUT, b"\0\n")]
    for frame in sent:
        links[0].send(*frame)
    links[0].flush()
    assert receive_all(links[1]) == sent


def test_a_frame_is_taken_only_when_all_of_it_has_come(links):
    links[0].send(frames.STDOUT, b"whole")
    whole = bytes(links[0].outgoing)
    links[0].outgoing.clear()
    for byte in whole[:-1]:
        os.write(links[0].fd, bytes([byte]))
        links[1].receive()
        assert not links[1].has_frame()
    os.write(links[0].fd, whole[-1:])
    assert receive_all(links[1]) == [(frames.STDOUT, b"whole")]


def test_receive_says_when_the_other_end_is_gone(links):
    socket.socket(fileno=os.dup(links[0].fd)).shutdown(socket.SHUT_RDWR)
    with pytest.raises(EOFError):
        links[1].receive()


def test_data_behind_a_control_message_waits_for_the_next_step(links):
    links[0].control(start={})
    links[0].send(frames.STDIN, b"for the command that starts")
    links[0].flush()
    assert frames.Pump(links[1]).step()[0] == {"start": {}}
    taken = []
    pump = frames.Pump(links[1], sinks=[frames.Sink(links[1], frames.STDIN, taken.append)])
    pump.step(timeout=0)
    assert taken == [b"for the command that starts"]


def test_a_source_stops_at_the_window_and_goes_on_with_credit(links):
    content = os.urandom(3 * frames.WINDOW)
    with machine.in_memory(content) as file:
        source = frames.Source(links[0], frames.STDOUT, file.fileno())
        sender = frames.Pump(links[0], [source])
        taken = []
        receiver = frames.Pump(links[1], sinks=[frames.Sink(links[1], frames.STDOUT, taken.append)])
        while source.wants_to_read():
            sender.step()
        assert source.credit == 0 and file.tell() == frames.WINDOW
        while not source.ended or links[0].outgoing:
            receiver.step(timeout=0)
            sender.step(timeout=0)
        receiver.step(timeout=0)
    assert b"".join(taken) == content


def test_a_sink_without_a_reader_drops_data_and_still_gives_credit(links):
    reader, writer = os.pipe()
    os.close(reader)
    sink = frames.Sink(links[0], frames.STDOUT, writer)
    sink.accept(b"x" * 1000)
    sink.pump()
    os.close(writer)
    links[0].flush()
    assert sink.broken and not sink.pending
    assert receive_all(links[1]) == [(frames.CONTROL, b'{"credit": [2, 1000]}')]


def test_a_stuck_stream_does_not_hold_up_the_other(links):
    reader, writer = os.pipe()  # nobody reads it
    taken = []
    receiver = frames.Pump(
        links[1],
        sinks=[frames.Sink(links[1], frames.STDOUT, writer), frames.Sink(links[1], frames.STDERR, taken.append)],
    )
    with machine.in_memory(bytes(2 * frames.WINDOW)) as stdout, machine.in_memory(b"hello") as stderr:
        sender = frames.Pump(
            links[0],
            [
                frames.Source(links[0], frames.STDOUT, stdout.fileno()),
                frames.Source(links[0], frames.STDERR, stderr.fileno()),
            ],
        )
        while not taken:
            sender.step(timeout=0)
            receiver.step(timeout=0)
    assert taken == [b"hello"]
    os.close(reader)
    os.close(writer)


# ---- the arguments


def test_architecture_and_release_come_before_the_command_and_pytests_words_behind_it():
    for words, expected in [
        (["test", "-k", "a", "--arch=b"], ("x86_64", "bookworm", "test", ["-k", "a", "--arch=b"])),
        (["--arch", "arm64", "test", "-x"], ("arm64", "bookworm", "test", ["-x"])),
        (["--arch=arm64", "test"], ("arm64", "bookworm", "test", [])),
        (["--release", "trixie", "test", "--release", "x"], ("x86_64", "trixie", "test", ["--release", "x"])),
        (["--release=trixie", "--arch", "arm64", "test"], ("arm64", "trixie", "test", [])),
        (["--arch=arm64", "run", "--", "test", "--", "x"], ("arm64", "bookworm", "run", ["test", "--", "x"])),
        (["run", "--", "test"], ("x86_64", "bookworm", "run", ["test"])),
    ]:
        args = program.parse(words)
        assert (args.arch.name, args.release.name, args.name, args.words) == expected


@pytest.mark.parametrize("name", arch.ARCHITECTURES)
def test_all_that_the_dom0_needs_is_on_the_machines_own_bus(name, tmp_path):
    kind = arch.ARCHITECTURES[name]
    lab = machine.Lab(arch=kind, disk=tmp_path / "a,b", share=tmp_path, network=True)
    lab.folder = tmp_path
    command = lab.qemu_command(7)
    devices = [word.split(",")[0] for word in command if word.startswith("virtio-") and "romfile" not in word]
    names = ["blk", "serial", "9p", "9p", "blk", "9p", "net"]
    assert devices == [f"virtio-{name}-{kind.bus}" for name in names]
    assert any("LAB_SHARE=1 LAB_NETWORK=1" in word for word in command)
    assert sum("/a,,b" in word for word in command) == 1


def test_divide_sends_files_where_they_belong(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    name = "tests/test_lab.py"
    assert suite.divide(["-x"]) == (["-x", str(REPOSITORY / "tests")], ["-x", "/repo/tests"])
    assert suite.divide([f"{name}::test_x", "-k", "y"]) == (
        ["-k", "y", f"{REPOSITORY}/{name}::test_x"],
        [],
    )
    xen = next(REPOSITORY.glob("tests/test_xen_*.py"))
    assert suite.divide([str(xen)]) == ([], [f"/repo/tests/{xen.name}"])


# ---- several runs of pytest


TESTS = """
import pytest

@pytest.fixture(scope="module")
def shared():
    return []

def test_short():
    pass

def test_long():
    assert 1 == 2, "why"

@pytest.mark.crowd
def test_many():
    pass

class TestTogether:
    def test_a(self):
        pass

    def test_b(self):
        pass

def test_first_of_two(shared):
    shared.append(1)

def test_second_of_two(shared):
    assert shared == [1]
"""

HANGING = """
import os

def test_hangs():
    os.read(os.pipe()[0], 1)

def test_next():
    pass
"""


@pytest.fixture
def run_tests(tmp_path):
    """Runs pytest with the lab's plugin on TESTS; the results, and the ids in the order in which they ran."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = crowd\n")
    seconds = {"test_it.py::test_long": ["passed", 9.5], "test_it.py::TestTogether::test_b": ["passed", 15.0]}
    (tmp_path / "seconds.json").write_text(json.dumps({**seconds, "test_it.py::test_short": ["passed", 1.0]}))

    def run(*words, **more):
        names = {"LAB_CLAIMS": "claims", "LAB_RESULTS": "results", "LAB_SECONDS": "seconds.json"}
        env = {**os.environ, **{name: str(tmp_path / path) for name, path in names.items()}}
        env.update(PYTHONPATH=str(LAB.parent), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **more)
        done = call(
            sys.executable,
            "-m",
            "pytest",
            "-pplugin",
            "-pno:cacheprovider",
            *words,
            str(tmp_path),
            env=env,
            cwd=tmp_path,
        )
        (path,) = tmp_path.glob("results.*.json")
        results = json.loads(path.read_text())
        path.unlink()
        return done, results, [name.split("::")[-1].split("_", 1)[1] for name in results]

    return run


def test_what_took_longest_begins_and_what_belongs_together_stays_together(run_tests):
    _, _, order = run_tests()
    assert order == ["a", "b", "first_of_two", "second_of_two", "long", "short", "many"]


def test_a_test_that_another_run_has_claimed_is_not_run_again(run_tests):
    assert run_tests("-k", "Together or short")[2] == ["a", "b", "short"]
    assert run_tests()[2] == ["first_of_two", "second_of_two", "long", "many"]
    assert run_tests()[2] == []


def test_a_run_that_is_to_stop_at_the_first_failure_does(run_tests):
    assert run_tests("-x")[2] == ["a", "b", "first_of_two", "second_of_two", "long"]


def test_a_failure_is_printed_when_it_happens_and_is_in_the_results(run_tests):
    done, results, _ = run_tests()
    at_once, _, at_the_end = done.stdout.partition(b"= FAILURES =")
    assert b"test_it.py::test_long failed (call)" in at_once and b"assert 1 == 2" in at_once and at_the_end
    assert done.returncode == 1
    assert [name for name, (outcome, _) in results.items() if outcome != "passed"] == ["test_it.py::test_long"]


def test_a_test_that_hangs_fails_and_what_the_machine_is_at_is_printed_and_the_next_one_runs(run_tests, tmp_path):
    tmp_path.joinpath("test_it.py").write_text(HANGING)
    done, results, _ = run_tests("-s", LAB_TIME_LIMIT="0.5")
    assert b"TimeoutError: the test has not ended in time" in done.stdout and b" ELAPSED " in done.stdout
    assert {name.split("::")[1]: outcome for name, (outcome, _) in results.items()} == {
        "test_hangs": "failed", "test_next": "passed",
    }  # fmt: skip


TABLE = f"""Before.
{platforms.BEGIN}
| | amd64, bookworm | amd64, trixie |
| --- | --- | --- |
| Xen | 4.17.4 | 4.20.1 |
| Podman | 4.3.1 | – |
| a VM of type PVH | – | 1 passed |
| Podman | 8 passed | – |
| exec | 2 passed | 5 passed |
| errors | 4 passed, 2 skipped | 3 passed |

{platforms.END}Behind.
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Takes what a machine's cache keeps of one platform: {test: outcome}, and the version of Xen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "runx").mkdir()

    def keep(platform, outcomes, xen=None):
        found = {f"test_xen_{test}": [outcome, 1.0] for test, outcome in outcomes.items()}
        suite.results_file(platform).write_text(json.dumps(found))
        if xen:
            suite.versions_file(platform).write_text(json.dumps({"Xen": xen}))

    return keep


def test_the_table_of_platforms_has_the_last_result_of_each_test_that_there_is(kept):
    life, gone = "life.py::test_a_short_soak", "life.py::test_that_was_removed"
    kept("x86_64", {life: "passed", gone: "failed"}, "4.17.5")
    kept("arm64", {life + "[x]": "skipped", life: "failed"})
    rows = dict(line.strip("| ").split(" | ", 1) for line in platforms.table("").splitlines()[1:])
    of_life = next(feature for feature in rows if feature.startswith("life"))
    assert (rows["Xen"], rows[of_life]) == ("4.17.5 | –", "1 passed | 1 failed, 1 skipped")
    assert all(platforms.feature_of(f"{path.name}::test") for path in REPOSITORY.glob("tests/test_xen_*.py"))


def test_the_table_of_platforms_keeps_what_nothing_newer_was_run_of(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(platforms, "DOCUMENT", tmp_path / "document")
    platforms.DOCUMENT.write_text(TABLE)
    platforms.main()
    empty = platforms.DOCUMENT.read_text()
    assert set(TABLE.splitlines()) <= set(empty.splitlines())
    assert empty.startswith("Before.\n") and empty.endswith("Behind.\n")
    tests = [f"errors.py::test_{name}" for name in ("no_xl", "no_kernel", "not_enough_memory")]
    kept("x86_64", {tests[0]: "passed"})
    kept("trixie-x86_64", {tests[0]: "skipped", tests[1]: "passed", tests[2]: "passed"}, "4.20.5")
    platforms.main()
    some = platforms.DOCUMENT.read_text()
    changed = {"| Xen | 4.17.4 | 4.20.5 |", "| errors | 4 passed, 2 skipped | 2 passed, 1 skipped |"}
    assert set(some.splitlines()) - set(empty.splitlines()) == changed
    kept("x86_64", {tests[0]: "failed"})
    platforms.main()
    assert "| errors | 1 failed | 2 passed, 1 skipped |" in platforms.DOCUMENT.read_text()


def test_jobs_side_by_side_have_their_statuses_and_each_line_comes_at_once(capfdbinary):
    reader, writer = os.pipe()

    def first():
        os.write(1, b"first\n")
        os.read(reader, 1)  # which the second one writes
        os.write(1, b"and last")
        return 0

    def second():
        os.write(1, b"second\n")
        os.write(writer, b"\n")
        return 3

    def third():
        raise common.LabError("third")

    jobs = [suite.Job(work.__name__, work) for work in (first, second, third)]
    assert suite.side_by_side(jobs) == [0, 3, 1]
    lines = [re.sub(rb"after \d+ s", b"", line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith(b"first")] == [
        b"first   | first", b"first   | and last", b"first   | status 0 ",
    ]  # fmt: skip
    assert {b"second  | second", b"second  | status 3 ", b"third   | status 1 "} < set(lines)
    os.close(reader)
    os.close(writer)


def test_a_job_ends_though_what_it_has_started_keeps_its_output_open():
    reader, writer = os.pipe()

    def work():
        subprocess.Popen(["cat"], stdin=reader)  # ends when the writer is closed
        return 0

    assert suite.side_by_side([suite.Job("work", work)]) == [0]
    os.close(writer)
    os.close(reader)


def test_a_program_that_does_not_end_is_killed_and_fails(capfd):
    assert suite.call(["sleep", "1000"], time_limit=0.1, quiet=True) == 124
    assert "sleep has not ended" in capfd.readouterr().out


@pytest.mark.parametrize(
    "broken, ran, status",
    [
        (None, ["arm64", "trixie-x86_64", "forky-x86_64"], 0),
        ("forky-x86_64", ["arm64", "trixie-x86_64"], 0),  # it is in motion: no fault of ours
        ("trixie-x86_64", [], 1),
        ("arm64", [], 1),
    ],
)
def test_the_main_path_runs_on_each_machine_whose_dom0_can_be_made(broken, ran, status, tmp_path, monkeypatch, capfd):
    def make(arch, release):
        if image.machine_name(arch, release) == broken:
            raise common.LabError("making the dom0 image: no packages")
        suite.image_folder(arch, release).mkdir(exist_ok=True)
        return suite.Built(None, None, arch=arch, release=release)

    def call(argv):
        try:
            return make(arch.ARCHITECTURES[argv[1]], release.RELEASES[argv[2]]) is None
        except common.LabError:
            return 1

    def in_dom0(built, words, share, name, processors):
        print(f"ran {image.machine_name(built.arch, built.release)} {' '.join(words)}\n", end="")  # in one write
        return 0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image.cache_root().mkdir()
    for replacement in (call, in_dom0):
        monkeypatch.setattr(suite, replacement.__name__, replacement)
    monkeypatch.setattr(suite, "build", make)
    assert suite.run_elsewhere() == status
    output, said = capfd.readouterr()
    assert sorted(re.findall(r"ran (\S+) -m main_path /repo/tests", output)) == sorted(ran)
    assert ("forky changes every day" in output + said) == (broken == "forky-x86_64")


def test_each_test_runs_in_one_of_two_dom0s_and_what_wants_two_processors_has_them(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image.cache_root().mkdir()

    def in_dom0(built, words, share, name, processors=2):
        print(f"ran {name} {processors} {' '.join(words[:2])}\n", end="")  # in one write
        return 0

    monkeypatch.setattr(suite, "in_dom0", in_dom0)
    assert suite.run_all(suite.Built(None, None, arch=arch.X86_64, release=release.TRIXIE)) == 0
    ran = re.findall(r"ran (.*)", capfd.readouterr().out)
    both = ["dom0-2-processors 2 -m processors", "dom0-2 1 -m not processors"]
    assert sorted(ran) == sorted(["dom0-1 1 -m not processors", *both])
    assert [each for each in ran if each in both] == both


# ---- what is kept


def test_what_is_kept_is_made_once_for_the_same_inputs_and_one_older_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(folder, target):
        made.append(target)
        (folder / "file").touch()

    one, same, two, three = (cache.kept("x", inputs, make) for inputs in ([b"1", b"2"], [b"1", b"2"], [b"12"], [b"3"]))
    assert one == same and made == [one, two, three]
    assert sorted(path.name for path in (tmp_path / "runx").glob("x-*")) == sorted([two.name, three.name])
    assert (three / "file").exists()


def test_what_could_not_be_made_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.kept("x", [b"1"], lambda folder, target: 1 / 0)
    assert not list((tmp_path / "runx").glob("x-*"))


def test_of_each_python_the_first_is_found_and_nothing_else(tmp_path, monkeypatch):
    for name, text in [
        ("3.9", "cpython 3 9"),
        ("3.14", "pypy 3 14"),
        ("3.15", "cpython 3 15 t"),
        ("3.8", "cpython 3 8"),
    ]:
        program = tmp_path / f"python{name}"
        program.write_text(f"#!/bin/sh\necho {text}\n")
        program.chmod(0o755)
    (tmp_path / "python3.7").write_text("no program")
    monkeypatch.setattr(pythons, "candidates", lambda folder: sorted(tmp_path.iterdir()) + [pathlib.Path("/python3.9")])
    assert pythons.find(None) == {9: tmp_path / "python3.9"}


# ---- the dom0 image


def test_a_kernel_that_is_not_packed_is_taken_as_it_is():
    kernel = b"MZ" + bytes(1000)
    assert image.unpacked_kernel(kernel) == kernel


needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd, which the lab installs")


@pytest.mark.parametrize("program", ["xz", pytest.param("zstd", marks=needs_zstd)])
def test_a_kernel_is_unpacked(program):
    kernel = os.urandom(5000)
    packed = subprocess.run([program], input=kernel, stdout=subprocess.PIPE, check=True).stdout
    packed += len(kernel).to_bytes(4, "little")
    image_head = bytearray(1024)  # with one sector of set-up code
    image_head[0x1F1], image_head[0x202:0x206] = 1, b"HdrS"
    image_head[0x248:0x250] = struct.pack("<II", 0, len(packed))
    assert image.unpacked_kernel(bytes(image_head) + packed + b"behind it") == kernel


def test_images_of_two_machines_are_two_folders_and_making_one_leaves_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machines = [(arch.X86_64, release.BOOKWORM), (arch.ARM64, release.BOOKWORM), (arch.X86_64, release.TRIXIE)]
    folders = [image.image_folder(*each) for each in machines]
    names = ["dom0-x86_64", "dom0-arm64", "dom0-trixie-x86_64"]
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == names
    older = [folder.with_name(f"{name}-{key}") for folder, name in zip(folders, names) for key in ("1", "2")]
    for folder in [*older, *folders]:
        folder.mkdir(parents=True)
    image.remove_old_images(folders[0])
    left = set(folders[0].parent.iterdir())
    assert {*folders, *older[2:]} < left and len(left) == len(folders) + len(older) - 1


def test_the_mirrors_of_this_machine_have_the_other_releases(monkeypatch):
    lines = ["bookworm\turi\tmain", "bookworm-security\tother\tmain", "bookworm\turi\tcontrib", "sid\turi\tmain"]
    monkeypatch.setattr(image, "run", lambda *argv: "".join(f"Debian\t{line}\n" for line in lines))
    assert image.apt_sources("trixie") == "deb other trixie-security main\ndeb uri trixie main\n"


def test_the_busybox_layer_is_the_same_each_time():
    busybox = pathlib.Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("needs busybox-static")
    assert image.busybox_layer(busybox) == image.busybox_layer(busybox)


# ---- a booted dom0


def image_state():
    """What would show that a boot has written to the cached image."""
    state = {}
    for path in sorted(image.image_folder().iterdir()):
        status = path.stat()
        with open(path, "rb") as file:
            file.seek(1024)  # an ext4 superblock, which a mount changes
            head = hashlib.sha256(file.read(64 << 10)).hexdigest()
        state[path.name] = (status.st_size, status.st_mtime_ns, status.st_blocks, head)
    return state


def lab_processes():
    """The QEMU processes of labs started by this process or its children, by their temporary folder."""
    found = set()
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and b"qemu-system" in (folder / "cmdline").read_bytes():
                environment = (folder / "environ").read_bytes().split(b"\0")
                if marker() in environment:
                    found.add(int(folder.name))
    return found


def marker():
    return f"RUNX_TEST_LAB={os.getpid()}".encode()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The folder for the labs' temporary files; what these tests start can be told from other labs."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        name, value = marker().decode().split("=")
        patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="class")
def lab(temporary, tmp_path_factory):
    """One boot for all the tests that only run commands."""
    share = tmp_path_factory.mktemp("share")
    before = image_state()
    with machine.Lab(share=share) as lab:
        yield lab
    assert image_state() == before, "the boot has changed the cached image"
    assert not lab_processes() and not os.listdir(temporary), "something is left of the lab"


def capture(lab, *argv, **options):
    """Run a command in the dom0; its status and output."""
    stdout, stderr = [], []
    status = lab.run(argv, stdout=stdout.append, stderr=stderr.append, time_limit=120, **options)
    return status, b"".join(stdout), b"".join(stderr)


@can_boot
class TestCommands:
    """Commands in one dom0, booted once."""

    def test_the_boot_reports_its_steps(self, lab):
        assert "import of busybox into containerd" in [step.name for step in lab.steps]
        assert lab.warnings == []

    def test_stdout_and_stderr_are_separate_and_exact(self, lab):
        script = (
            "import os; data = bytes(range(256)) * 2000; os.write(2, b'err'); [os.write(1, data) for _ in range(4)]"
        )
        status, stdout, stderr = capture(lab, "python3", "-c", script)
        assert (status, stderr) == (0, b"err")
        assert stdout == bytes(range(256)) * 8000

    def test_stdin_is_exact_and_ends(self, lab):
        content = os.urandom(1 << 20)
        status, stdout, _ = capture(lab, "sha256sum", stdin=content)
        assert (status, stdout.split()[0].decode()) == (0, hashlib.sha256(content).hexdigest())

    def test_output_comes_while_the_command_runs(self, lab):
        reader, writer = os.pipe()
        stdout = []

        def answer(data):
            stdout.append(data)
            if b"".join(stdout) == b"question\n":
                os.write(writer, b"answer\n")
                os.close(writer)

        status = lab.run(["sh", "-c", "echo question; cat"], stdin=reader, stdout=answer, time_limit=60)
        os.close(reader)
        assert (status, b"".join(stdout)) == (0, b"question\nanswer\n")

    def test_a_command_that_reads_no_stdin_ends_all_the_same(self, lab):
        assert capture(lab, "true", stdin=bytes(4 * frames.WINDOW))[0] == 0
        assert capture(lab, "echo", "next")[1] == b"next\n"

    def test_a_daemon_left_behind_does_not_keep_the_command_open(self, lab):
        status, stdout, _ = capture(lab, "sh", "-c", "sleep 1000 & echo started")
        assert (status, stdout) == (0, b"started\n")

    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["sh", "-c", "exit 7"], 7),
            (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
            (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
            (["/no/such/program"], 127),
            (["/etc/passwd"], 126),
        ],
    )
    def test_exit_status_is_the_commands(self, lab, argv, expected):
        status, _, stderr = capture(lab, *argv)
        assert status == expected
        if status in (126, 127):
            assert argv[0].encode() in stderr

    def test_argv_environment_and_folder_arrive_unchanged(self, lab):
        words = ["", " a  b ", "$HOME", "ü", "--"]
        status, stdout, _ = capture(
            lab,
            "sh",
            "-c",
            'pwd; echo "$X"; for word; do echo "<$word>"; done',
            "sh",
            *words,
            env={"X": "1 2"},
            cwd="/tmp",
        )
        assert stdout.decode().splitlines() == ["/tmp", "1 2", *[f"<{word}>" for word in words]]

    def test_a_terminal_has_its_size_and_learns_of_a_new_one(self, lab, monkeypatch):
        monkeypatch.setattr(machine, "window_size", lambda: [50, 132])
        reader, writer = os.pipe2(os.O_NONBLOCK)
        stdout = []

        def resize_once(data):
            stdout.append(data)
            if b"".join(stdout) == b"first 24 80\r\n":
                os.write(writer, b"\0")

        script = "trap 'echo second $(stty size); exit 3' WINCH; echo first $(stty size); sleep 1000 & wait"
        keyboard = os.pipe()
        status = lab.run(
            ["bash", "-c", script],
            stdin=keyboard[0],
            stdout=resize_once,
            window=[24, 80],
            resizes=reader,
            time_limit=60,
        )
        for fd in (reader, writer, *keyboard):
            os.close(fd)
        assert (status, b"".join(stdout)) == (3, b"first 24 80\r\nsecond 50 132\r\n")

    def test_repo_is_the_working_tree_and_read_only(self, lab):
        status, stdout, _ = capture(lab, "sha256sum", "/repo/tests/lab/lab.py")
        assert stdout.split()[0].decode() == hashlib.sha256(LAB.read_bytes()).hexdigest()
        status, _, stderr = capture(lab, "touch", "/repo/new")
        assert status != 0 and b"Read-only" in stderr
        assert not (REPOSITORY / "new").exists()

    def test_share_is_read_write(self, lab):
        (lab.share / "from-host").write_bytes(b"host")
        status, stdout, _ = capture(lab, "sh", "-c", "cat /share/from-host; echo dom0 >/share/from-dom0")
        assert (status, stdout) == (0, b"host")
        assert (lab.share / "from-dom0").read_bytes() == b"dom0\n"

    def test_xen_and_containerd_are_up(self, lab):
        assert b"Domain-0" in capture(lab, "xl", "list")[1]
        assert image.BUSYBOX_REFERENCE in capture(lab, "ctr", "image", "ls", "-q")[1].decode().splitlines()


# ---- the end of a lab


@can_boot
def test_shell_is_a_terminal_of_our_size_and_passes_the_status_on(temporary):
    master, slave = pty.openpty()
    agent.set_window(slave, [37, 99])
    before = termios.tcgetattr(slave)
    with subprocess.Popen([sys.executable, str(LAB), "shell"], stdin=slave, stdout=slave, stderr=slave) as process:
        screen = b""
        while not screen.endswith(b"# "):
            screen += os.read(master, 4096)
        os.write(master, b"stty size; tty; exit 9\r")
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            if select.select([master], [], [], 0.1)[0]:
                screen += os.read(master, 4096)
    assert process.returncode == 9, screen
    assert b"37 99" in screen and b"/dev/pts/" in screen
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
    assert not lab_processes() and not os.listdir(temporary)


def start_run(*words):
    return subprocess.Popen(
        [sys.executable, str(LAB), "run", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@can_boot
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_powers_off_and_leaves_nothing(temporary, signum):
    before = image_state()
    with start_run("--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        wait_until(lab_processes, "QEMU")
        process.send_signal(signum)
        assert process.wait(10) == 128 + signum
    assert not lab_processes() and not os.listdir(temporary)
    assert image_state() == before


@can_boot
def test_time_limit_powers_off_with_the_console_on_stderr(temporary):
    with start_run("--time-limit", "10", "--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 124
    assert b"time limit" in stderr and b"(XEN)" in stderr
    assert not lab_processes() and not os.listdir(temporary)


@can_boot
def test_qemu_ends_when_the_lab_is_killed(temporary):
    with start_run("--kernel", "/dev/null", "--initrd", "/dev/null", "--", "true") as process:
        wait_until(lab_processes, "QEMU")
        process.kill()
        process.wait()
        wait_until(lambda: not lab_processes(), "no QEMU", 5)
    for folder in temporary.iterdir():  # nobody could remove it
        shutil.rmtree(folder)
