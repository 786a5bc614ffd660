# SPDX-License-Identifier: Apache-2.0
"""What tests talk to: a fake dom0, its containers, and the check that nothing of them is left."""

import errno
import json
import mmap
import os
import pathlib
import re
import select
import shutil
import socket
import struct
import subprocess
import sys

HOST = pathlib.Path(__file__).with_name("host.py")
PATIENCE = 20  # seconds until a test that waits for something is called stuck


class Result:
    """A process that has ended."""

    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr

    def __repr__(self):
        return f"exit status {self.returncode}, stdout {self.stdout!r}, stderr {self.stderr!r}"


class Process:
    """One that runs in the dom0.  Its standard output and error are files in memory, unless others are given."""

    def __init__(self, dom0, pid, stdout, stderr):
        self.dom0, self.pid, self.stdout, self.stderr = dom0, pid, stdout, stderr

    def wait(self):
        status = self.dom0.wait(self.pid)
        return Result(status, *(content(fd) for fd in (self.stdout, self.stderr)))

    def signal(self, number):
        self.dom0.signal(self.pid, number)


def content(fd):
    return os.pread(fd, 1 << 22, 0).decode("utf-8", "replace") if fd is not None else ""


class Dom0:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "faults").write_bytes(bytes(4096))
        with open(self.folder / "faults", "r+b") as file:
            self.page = mmap.mmap(file.fileno(), 4096)
        self.commands, commands = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.xen, xen = socket.socketpair()
        with commands, xen:
            self.host = subprocess.Popen(
                [sys.executable, HOST, str(commands.fileno()), str(xen.fileno()), str(self.folder)],
                pass_fds=(commands.fileno(), xen.fileno()),
                start_new_session=True,  # it tidies up when we are killed
            )
        self.ended, self.received, self.descriptors, self.bundles = {}, b"", [], []
        self.armed = self.spared = False
        self.constants, self.env = {}, {"PATH": os.environ["PATH"]}
        assert self.hear()[0] == "ready"
        self.inside = f"/proc/{self.find_init()}/root"
        self.empty = self.sight()
        self.containers = 0

    def find_init(self):
        """The pid, as we see it, of the dom0's PID 1."""
        pid = self.host.pid
        for _ in range(2):
            pid = int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text())
        return pid

    def close(self):
        self.commands.close()
        self.xen.close()
        self.host.wait()
        self.release()

    def release(self):
        """Closes what processes have written into, and removes bundles: sight() looks into each that there is."""
        while self.descriptors:
            os.close(self.descriptors.pop())
        while self.bundles:
            shutil.rmtree(self.bundles.pop(), ignore_errors=True)

    # ---- processes

    def hear(self):
        if not select.select([self.commands], [], [], PATIENCE)[0]:
            raise AssertionError(f"nothing has happened in the dom0 for {PATIENCE} s: {self.processes()}")
        return json.loads(self.commands.recv(4096))

    def start(self, *words, stdin=None, stdout=None, stderr=None, program=None, session=False, env=None, folder="/",
              closed=()):  # fmt: skip
        """Starts runX, or a program; returns the Process.  stdin: bytes, or a descriptor.  closed: which of 0, 1, 2."""
        if not isinstance(stdin, int):
            data, stdin = stdin or b"", self.file()
            os.pwrite(stdin, data, 0)
        files = [self.file() if fd is None else fd for fd in (stdout, stderr)]
        request = {
            "words": list(words), "program": program, "session": session, "env": {**self.env, **(env or {})},
            "folder": str(folder), "constants": self.constants, "closed": list(closed),
        }  # fmt: skip
        socket.send_fds(self.commands, [json.dumps(request).encode()], [stdin, *files])
        while True:
            what, pid, *status = self.hear()
            if what == "started":
                return Process(self, pid, files[0] if stdout is None else None, files[1] if stderr is None else None)
            self.ended[pid] = status[0]

    def run(self, *words, **options):
        return self.start(*words, **options).wait()

    def file(self):
        self.descriptors.append(os.memfd_create("fake"))
        return self.descriptors[-1]

    def wait(self, pid):
        """Its exit status, below 0 for a signal."""
        while pid not in self.ended:
            _, ended, status = self.hear()
            self.ended[ended] = status
        return self.ended.pop(pid)

    def processes(self):
        """{pid: command line} of those that are not the dom0's own two."""
        found = {}
        for name in os.listdir(f"{self.inside}/proc"):
            if name.isdecimal() and int(name) > 2:
                try:
                    words = pathlib.Path(f"{self.inside}/proc/{name}/cmdline").read_bytes()
                    state = pathlib.Path(f"{self.inside}/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if state not in "ZX":
                    found[int(name)] = words.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        return found

    def signal(self, pid, number):
        assert self.run(program=["kill", f"-{int(number)}", str(pid)]).returncode == 0

    # ---- Xen's side

    def ask(self, name, *args):
        """What the server's test_<name> says, as soon as it has something to say."""
        self.xen.sendall(json.dumps([name, *args]).encode() + b"\n")
        while b"\n" not in self.received:
            if not select.select([self.xen], [], [], PATIENCE)[0]:
                raise AssertionError(f"{name}{args} is not so after {PATIENCE} s: {self.processes()}")
            data = self.xen.recv(1 << 16)
            assert data, "the fake dom0's server has ended"
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        answer = json.loads(line)
        if isinstance(answer, dict) and "failed" in answer:
            raise AssertionError(f"{name}{args}: {answer['failed']}")
        return answer

    def fail(self, what, nth, how, after=False, match=""):
        """Has the nth `what` (xenstore, xl; of those with match in them) from now fail.  after: it is done first.

        how: an errno's name or xl's message; "hang"; "slow", an xl until ask("release"); "close", the connection;
        "kill", who has asked; "destroy", every VM, just before; or "nothing" is done.
        """
        self.armed = True
        self.ask("fail", what, nth, how, after, match)

    def fail_system_call(self, nth, code="EIO"):
        """Has the nth of runX's system calls from now fail, see host.py; with code "kill" who has called is killed."""
        self.armed = True
        count = struct.unpack_from("=Q", self.page)[0]
        struct.pack_into("=QQ", self.page, 8, count + nth, 0 if code == "kill" else getattr(errno, code))

    def forget(self):
        """Forgets calls and faults, and notes in `spared` whether the last of these has not struck."""
        count, target = struct.unpack_from("=QQ", self.page)
        self.page[8:24] = bytes(16)
        waits = bool(self.ask("forget")["to come"]) or target > count
        if self.armed:
            self.armed, self.spared = False, waits

    def calls(self, what):
        """What xenstore or xl have been asked for since the last forget()."""
        return self.ask("calls")[what]

    def nodes(self):
        return self.ask("nodes")

    def domains(self):
        return {int(domid): domain for domid, domain in self.ask("domains").items()}

    # ---- what is left

    def sight(self):
        """Everything that a container adds to a dom0 and must take away again."""
        inside, files = pathlib.Path(self.inside), []
        for place in ("run", "var/tmp", "var/log/xen", "sys/bus/xen-backend/devices"):
            files += (str(path.relative_to(inside)) for path in (inside / place).rglob("*"))
        mounts = pathlib.Path(f"/proc/{self.find_init()}/mountinfo").read_text().splitlines()
        links = pathlib.Path(f"/proc/{self.find_init()}/net/dev").read_text().splitlines()[2:]
        return {
            "domains": [domain["name"] for domain in self.domains().values()],
            "nodes": sorted(self.nodes()),
            "processes": list(self.processes().items()),
            "files": sorted(file for file in files if not file.startswith(("run/fake", "run/runX-domains"))),
            "mounts": sorted(line.split(" ", 1)[1] for line in mounts),
            "links": sorted(line.split(":")[0].strip() for line in links),
            "cgroups": sorted(self.cgroups()),
            "bundles": sorted(str(path) for path in self.folder.glob("*/root/*")),
        }

    def cgroups(self):
        """The cgroups of the dom0, if it has a hierarchy of its own."""
        if not (self.folder / "cgroup").exists():
            return []
        root = pathlib.Path(self.inside) / "sys/fs/cgroup"
        return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()]

    def settle(self):
        """Waits until no process is left."""
        while self.processes():
            _, ended, status = self.hear()
            self.ended[ended] = status

    def left(self):
        """What is there that was not in the empty dom0, and what is not any more: {} where all is as it was."""
        now, found = self.sight(), {}
        for key, before in self.empty.items():
            for word, these, those in (("more", now[key], before), ("missing", before, now[key])):
                found.update({f"{word} {key}": [each for each in these if each not in those]})
        found["missing mounts"] = []  # of the machine's that happen to have been there when we came
        return {key: each for key, each in found.items() if each}

    def clean(self):
        """Ends and removes whatever a test has left."""
        self.constants, self.env = {}, {"PATH": os.environ["PATH"]}
        self.forget()
        for pid in self.processes():
            self.run(program=["kill", "-9", str(pid)])
        self.settle()
        self.ask("reset")
        for root in self.folder.glob("*/root"):
            shutil.rmtree(root)

    # ---- containers

    def container(self, *steps, **changes):
        """A Container whose process does these steps, see guest.py; nothing is made yet but its bundle."""
        self.containers += 1
        return Container(self, f"c{self.containers}", steps, changes)


def config(*steps, **changes):
    """A config.json.  changes: members of it, or of its process where that has such a one."""
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/guest", *steps], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
            "terminal": False,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "annotations": {"org.runx.rootfs": "ramdisk"},
    }  # fmt: skip
    for key, value in changes.items():
        if key in ("terminal", "consoleSize"):
            spec["process"][key] = value
            if key == "terminal" and value:
                spec["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts"})
        elif key == "annotations":
            spec[key] = {**spec[key], **value}
        else:
            spec[key] = value
    return spec


class Container:
    def __init__(self, dom0, container_id, steps, changes):
        self.dom0, self.id = dom0, container_id
        self.bundle = dom0.folder / container_id
        dom0.bundles.append(self.bundle)
        self.root, self.log = self.bundle / "root", self.bundle / "log"
        (self.bundle / "rootfs/bin").mkdir(parents=True)
        self.program = self.bundle / "rootfs/bin/guest"
        self.program.write_bytes(b"")
        self.program.chmod(0o755)
        self.write(config(*steps, **changes))
        self.pid_file, self.stdout, self.stderr = self.bundle / "pid", None, None

    def write(self, spec):
        (self.bundle / "config.json").write_text(json.dumps(spec))

    def words(self, command, *args):
        return ["--root", str(self.root), "--log", str(self.log), command, *args]

    def start_runx(self, command, *args, **options):
        """args: what comes before the id."""
        return self.dom0.start(*self.words(command, *args, self.id), **options)

    def runx(self, command, *args, **options):
        return self.start_runx(command, *args, **options).wait()

    def create(self, *options, **streams):
        """Its standard output and error are the container's from now on."""
        process = self.start_runx("create", "--bundle", str(self.bundle), "--pid-file", str(self.pid_file), *options,
                                  **streams)  # fmt: skip
        self.stdout, self.stderr = process.stdout, process.stderr
        return process.wait()

    def created(self, *options, **streams):
        result = self.create(*options, **streams)
        assert (result.returncode, result.stderr) == (0, ""), (result, self.log_text())
        return self

    def started(self, *options, **streams):
        self.created(*options, **streams)
        result = self.runx("start")
        assert (result.returncode, result.stderr) == (0, ""), (result, self.log_text())
        return self

    def ready(self):
        """Waits until its process runs."""
        self.dom0.ask("await_node", f"/local/domain/{self.domid()}/data/process/0/ready", "1")
        return self

    def pid(self):
        return int(self.pid_file.read_text())

    def wait(self):
        """The exit status of the container, as its engine, who reaps it, sees it."""
        return self.dom0.wait(self.pid())

    def output(self):
        return content(self.stdout)

    def errors(self):
        return content(self.stderr)

    def state(self):
        return json.loads(self.runx("state").stdout)

    def status(self):
        return self.state()["status"]

    def stored(self):
        """What is in its state.json."""
        return json.loads((self.root / self.id / "state.json").read_text())

    def store(self, change):
        """Changes state.json as nobody but time does: change gets the object."""
        state = self.stored()
        change(state)
        (self.root / self.id / "state.json").write_text(json.dumps(state))

    def domid(self):
        return self.stored()["domid"]

    def guest(self):
        return self.dom0.ask("guest", self.domid())

    def log_text(self):
        """Its records, with their messages unquoted."""
        text = self.log.read_text() if self.log.exists() else ""
        return re.sub('msg=(".*")', lambda match: f"msg={json.loads(match[1])}", text)
