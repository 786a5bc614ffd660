# SPDX-License-Identifier: Apache-2.0
"""What the container gets of its config.json, beside what the same config.json gives under runc in the same dom0."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys

import pytest
from conftest import DEVPTS, PROGRAM_MOUNTS, call, config, in_memory, wait_for, wait_in

REPORT = pathlib.Path("/usr/share/lab/report")  # tests/report.c
DATA = pathlib.Path(__file__).with_name("data")

pytestmark = [
    pytest.mark.usefixtures("clean_dom0"),
    pytest.mark.skipif(not shutil.which("runc") or not REPORT.exists(), reason="needs runc, to compare with"),
]

NAMESPACES = [{"type": name} for name in ("pid", "ipc", "uts", "mount", "network", "cgroup")]

DEFAULT_CAPABILITIES = ["CAP_CHOWN", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_KILL"]


# Limits that no config.json sets are the kernel's own: they go by memory, or the engine's service.
LIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME".split()


def mount(destination, kind, *options, source=None):
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


USUAL_MOUNTS = [
    DEVPTS,
    mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
    mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
]


def report_config(*paths, **process):
    spec = config("report", *paths, **process)
    spec["mounts"] += USUAL_MOUNTS
    spec["linux"] = {"namespaces": NAMESPACES}
    return spec


@pytest.fixture
def busybox(bundle):
    """The bundle, whose rootfs has all of busybox's commands and the reporter."""
    bundle.add_applets(*call("busybox", "--list").stdout.decode().split())
    shutil.copy(REPORT, bundle.rootfs / "bin/report")
    return bundle


@pytest.fixture
def outputs(busybox):
    """A function that runs a config under runc and under runX, and returns both standard outputs; what of the rootfs is
    named is removed after each."""

    def run(spec, *made):
        busybox.write_config(spec)
        found = []
        runc = ["runc", "--root", str(busybox.folder / "root-runc"), "run", "--bundle", str(busybox.folder), busybox.id]
        for command in (runc, busybox.command("run")):
            result = call(*command)
            assert result.returncode == 0, result
            found.append(result.stdout.decode())
            for name in made:
                shutil.rmtree(busybox.rootfs / name, ignore_errors=True)  # a VM's memory has left none
        return found

    return run


@pytest.fixture
def reports(outputs):
    """A function that runs a config under both runtimes and returns both reports."""
    return lambda spec: [report(output) for output in outputs(spec)]


def report(output):
    fields = json.loads(output)
    fields["limits"] = dict(zip(LIMITS, fields["limits"]))
    fields["mounts"] = [mounted(line) for line in fields["mounts"] if not hidden(line.split()[4])]
    return fields


def hidden(path):
    """Mounts that cover what a path shows are seen by what it shows."""
    return path == "/" or path.startswith(("/proc/", "/sys/firmware", "/sys/dev", "/sys/fs/selinux"))


def mounted(line):
    """(where, options, what) of a line of mountinfo."""
    head, tail = line.split(" - ")
    at, options = head.split()[4:6]
    kind, source, data = tail.split()
    # how dom0's own cgroup2 and tmpfs are made; a default size is shown where dom0's memory has changed (on Arm)
    ours = r"inode64|nsdelegate|memory_recursiveprot|nr_inodes=\d+|size=\d{6,}k"
    return at, options, f"{kind} {source} {','.join(word for word in data.split(',') if not re.fullmatch(ours, word))}"


def comparable(mounts, from_dom0):
    """Of dom0's files, which it serves to the VM, only where and how they are mounted, but for times of access."""
    for at, options, what in mounts:
        if at in from_dom0:
            yield at, set(options.split(",")) - {"relatime", "noatime"}
        else:
            yield at, options, what


def runc_version():
    """Its first two numbers."""
    return tuple(map(int, re.search(rb"runc version (\d+)\.(\d+)", call("runc", "--version").stdout).groups()))


def compare(runc, runx, *limits):
    """limits: those that the config sets."""
    different, from_dom0 = {}, {at for at, _, what in runx["mounts"] if what.startswith("xenfuse")}
    for fields in (runc, runx):
        fields["mounts"] = list(comparable(fields["mounts"], from_dom0))
        if runc_version() >= (1, 3):  # which puts a name that is given twice where the second one stands
            fields["env"].sort()
    for name, value in runc.items():
        if name == "limits":
            pairs = [(runx["limits"][limit], value[limit]) for limit in limits]
        elif isinstance(value, list):
            pairs = itertools.zip_longest(runx[name], value)
        else:
            pairs = [(runx[name], value)]
        found = [f"{ours!r}, under runc {theirs!r}" for ours, theirs in pairs if ours != theirs]
        if found:
            different[name] = found
    assert not different


def documents():
    """Of tests/data, without those that differ from the one before in nothing but ociVersion."""
    found = {}
    for path in sorted(DATA.glob("*.json")):
        found.setdefault(json.dumps({**json.loads(path.read_text()), "ociVersion": ""}), path.stem)
    return list(found.values())


@pytest.mark.parametrize("name", documents())
def test_the_default_config_of_an_engine_is_what_it_is_under_runc(reports, busybox, name):
    """tests/data: what each engine has written for a plain `run`, with its version."""
    spec = json.loads((DATA / f"{name}.json").read_text())
    spec["root"]["path"] = "rootfs"
    paths = ["/dev", "/dev/null", "/dev/tty", "/dev/fd", "/dev/ptmx", "/proc/keys", "/proc/sys", "/sys", "/tmp"]
    spec["process"]["args"] = ["/bin/report", *paths]
    limits = [entry["type"].removeprefix("RLIMIT_") for entry in spec["process"].get("rlimits", [])]
    spec["linux"].pop("cgroupsPath")
    spec.pop("hooks", None)  # of the engine's network
    for namespace in spec["linux"]["namespaces"]:
        namespace.pop("path", None)  # the engine's own, and gone
    shared = busybox.folder / "shm"
    for entry in spec["mounts"]:
        if entry["destination"] == "/dev/shm" and entry["type"] == "bind":
            shared.mkdir()
            assert call("mount", "-t", "tmpfs", "-o", "size=65536k,mode=1777", "shm", str(shared)).returncode == 0
            entry["source"] = str(shared)
        elif entry["type"] == "bind":
            file = busybox.folder / f"bound{entry['destination'].replace('/', '-')}"
            file.write_text("of the engine's\n")
            entry["source"] = str(file)
    try:
        runc, runx = reports(spec)
    finally:
        if shared.exists():
            call("umount", str(shared))
    if not any(namespace["type"] == "cgroup" for namespace in spec["linux"]["namespaces"]):
        runc["cgroup"] = runx["cgroup"]  # a path of dom0's
    compare(runc, runx, *limits)
    assert not busybox.log.exists()  # no warning


@pytest.fixture
def many_descriptors():
    """A dom0 whose processes may have more than a million descriptors, as systemd sets it."""
    setting = pathlib.Path("/proc/sys/fs/nr_open")
    before = setting.read_text()
    setting.write_text("1073741816")
    yield
    setting.write_text(before)


def test_a_rich_config_is_what_it_is_under_runc(reports, busybox, many_descriptors):
    (busybox.rootfs / "etc").mkdir()
    (busybox.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    ambient = ["CAP_NET_BIND_SERVICE", "CAP_SYS_NICE"]
    spec = report_config(
        "/", "/dev/fuse", "/dev/pipe", "/dev/deep/node", "/dev/core", "/dev/stdin", "/made/here",
        user={"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o077},
        capabilities={
            "bounding": [*DEFAULT_CAPABILITIES, *ambient], "effective": ambient, "permitted": ambient,
            "inheritable": ambient, "ambient": ambient,
        },
        rlimits=[
            {"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": (1 << 64) - 1},
            {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2000000}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ],
        oomScoreAdj=321, noNewPrivileges=True, cwd="/made/here", env=["PATH=/bin", "EMPTY=", "QUOTED=\"' \\"],
    )  # fmt: skip
    spec["root"]["readonly"] = True
    spec["hostname"] = "box"
    spec["mounts"] += [
        mount("/mem", "tmpfs", "nosuid", "mode=755", "size=64k"),
        mount("/mem", "tmpfs", "remount", "nodev", "noexec", "size=128k"),
    ]
    spec["linux"].update(
        sysctl={"kernel.shm_rmid_forced": "1", "net.ipv4.ping_group_range": "7 8"},
        devices=[
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 7, "gid": 8},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
            {"path": "/dev/deep/node", "type": "b", "major": 7, "minor": 99},
        ],
        resources={"pids": {"limit": 33}},
        personality={"domain": "LINUX"},
    )
    compare(*reports(in_memory(spec)), "STACK", "NOFILE", "CORE")


def test_masked_and_readonly_paths_are_what_they_are_under_runc(outputs, busybox):
    (busybox.rootfs / "masked").mkdir()
    (busybox.rootfs / "masked/secret").write_text("x")
    (busybox.rootfs / "file").write_text("x")
    script = "cat /masked/* /file /proc/keys | wc -c; for path in /proc/sys /fixed; do echo x >$path/new; done; true"
    spec = in_memory(config("sh", "-c", f"({script}) 2>&1"))
    (busybox.rootfs / "fixed").mkdir()
    spec["linux"] = {
        "namespaces": NAMESPACES, "maskedPaths": ["/masked", "/file", "/proc/keys", "/no/such/path"],
        "readonlyPaths": ["/proc/sys", "/proc/bus", "/fixed", "/no/such/path"],
    }  # fmt: skip
    runc, runx = outputs(spec)
    assert runx == runc and "0\n" in runx


def test_what_this_runc_does_not_know_applies(busybox):
    spec = report_config(
        ioPriority={"class": "IOPRIO_CLASS_IDLE", "priority": 0}, scheduler={"policy": "SCHED_BATCH", "nice": 7}
    )
    spec["domainname"] = "example.org"
    spec["linux"].update(
        personality={"domain": "LINUX32"},
        resources={
            "pids": {"limit": 33},
            "unified": {"pids.max": "44", "memory.swap.max": "0", "memory.oom.group": "1"},  # the kubelet's last two
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        },
    )
    fields = json.loads(busybox.run(in_memory(spec)).stdout)
    expected = {
        "io priority": 3 << 13, "scheduler": 3, "nice": 7, "domainname": ["example.org"], "personality": 8,
        "pids.max": ["44"],
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected


def test_the_process_has_its_user_and_a_large_environment_and_what_has_no_effect_is_logged_once(bundle):
    user = {"uid": 1000, "gid": 2000, "additionalGids": [3000, 4000], "umask": 0o027}
    variables = [f"V{number}={'x' * 1000}{number}" for number in range(100)]
    # the user may open its standard streams again
    script = "(id -u; id -G; umask; pwd) >/proc/self/fd/1; env -u PWD -u SHLVL"
    env = ["PATH=/bin", *variables]
    spec = in_memory(config("sh", "-c", script, env=env, user=user, cwd="/new/folder", apparmorProfile="x"))
    spec["linux"] = {"mountLabel": "x", "resources": {"blockIO": {"weight": 9}, "network": {}}}
    result = bundle.run(spec)
    lines = result.stdout.decode().splitlines()
    assert lines[:4] == ["1000", "2000 3000 4000", "0027", "/new/folder"], result
    assert sorted(lines[4:]) == sorted(["PATH=/bin", "HOME=/", *variables])
    records = [json.loads(line) for line in bundle.log.read_text().splitlines()]
    assert {record["level"] for record in records} == {"warning"}
    named = [record["msg"].split(": ")[1].split()[0] for record in records]
    assert named == ["process.apparmorProfile", "linux.mountLabel", "linux.resources.blockIO"]


def test_seccomp_does_what_it_does_under_runc(outputs, busybox):
    script = """
        mkdir -p /tmp/a; chmod 700 /tmp/a; echo chmod $?; sync; echo sync $?; hostname x; echo hostname $?
        linux32 echo personality; linux32 -R true; echo fixed $?
        (kill -9 $$ && echo killed) & wait; unshare -n true; echo unshare $?
    """
    spec = in_memory(config("/bin/sh", "-c", f"({script}) 2>&1 | cat"))
    spec["linux"] = {
        "namespaces": NAMESPACES,
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["chmod", "fchmodat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
                {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["sync"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                 "args": [{"index": 0, "value": 0x40000, "valueTwo": 0x40000, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 3,
                 "args": [{"index": 1, "value": 9, "op": "SCMP_CMP_EQ"}]},
                {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                 "args": [{"index": 0, "value": 0x10000000, "op": "SCMP_CMP_GE"}]},
            ],
        },
    }  # fmt: skip
    for privileges in (False, True):
        spec["process"]["noNewPrivileges"] = privileges
        runc, runx = outputs(spec)
        assert runx == runc
    assert "chmod 1" in runx and "sync 159" in runx and "personality\n" in runx and "fixed 1" in runx


def test_the_process_is_the_first_of_its_pid_namespace(busybox):
    script = "trap 'echo terminated; exit 3' TERM; echo $$ $(ls -d /proc/[0-9]*); (exit 5) & sleep 1000 & wait"
    spec = in_memory(config("sh", "-c", script))
    spec["linux"] = {"namespaces": NAMESPACES}
    pidfd = busybox.started(spec)
    wait_in(busybox.folder, lambda: busybox.output().endswith("\n"), "the process's own words")
    words = busybox.output().split()
    assert words[:2] == ["1", "/proc/1"] and len(words) < 5  # nothing of the kernel's, nothing of init's
    busybox.succeed("kill", "TERM")
    wait_for(pidfd)
    assert busybox.output().endswith("terminated\n")


def test_mounts_are_what_they_are_under_runc(outputs, busybox):
    for folder in ("plain", "plain/inner", "upper", "work", "nested"):
        (busybox.folder / folder).mkdir()
    for path in ("plain/file", "plain/inner/file", "nested/file", "single"):
        (busybox.folder / path).write_text(f"{path}\n")
    (busybox.rootfs / "link").symlink_to("/../../target")
    (busybox.rootfs / "target").mkdir()
    (busybox.rootfs / "filled").mkdir()
    (busybox.rootfs / "filled/file").write_text("filled\n")
    (busybox.rootfs / "filled/link").symlink_to("file")
    source = str(busybox.folder / "plain")

    def bind(destination, *options, source=source):
        return mount(destination, "bind", *options, source=source)

    layers = f"lowerdir={source},upperdir={busybox.folder}/upper,workdir={busybox.folder}/work"
    script = """
        report /a /b /c/d/e /f /g /g/inner /target /tmpfs /overlay /filled; echo ---
        cat /a/file /c/d/e/inner/file /f /g/inner/file /target/file /overlay/file /filled/link
        stat -c '%A %u %s %N' /filled/*; echo new >/a/new; echo new >/overlay/new; echo x >/b/x; echo x >/f
        rm -f /a/report.new /overlay/report.new; ls /target /overlay
    """
    spec = report_config()
    spec["process"]["args"] = ["sh", "-c", script]
    spec["mounts"] += [
        bind("/a", "bind", "rw"),
        bind("/b", "bind", "ro", "nosuid", "nodev", "noexec", "nosymfollow"),
        bind("/c/d/e", "rbind", "rprivate"),
        bind("/f", "bind", "ro", source=str(busybox.folder / "single")),
        bind("/g", "rbind", "rw", "nosuid"),
        bind("/g/inner", "bind", source=str(busybox.folder / "nested")),
        bind("/link", "bind"),
        mount("/tmpfs", "tmpfs", "nosuid", "noexec", "nosymfollow", "silent", "size=4m", "mode=1770"),
        mount("/overlay", "overlay", layers),
        # with a mode: where none is set, newer runc's show the folder's as an option of the mount, older ones do not
        mount("/filled", "tmpfs", "tmpcopyup", "size=1m", "mode=755"),
    ]
    (runc_report, runc), (runx_report, runx) = (output.split("---\n") for output in outputs(spec))
    runc_report, runx_report = report(runc_report), report(runx_report)
    runc_report["pid"] = runx_report["pid"]  # the shell's first child, whatever has run in its namespace before
    compare(runc_report, runx_report)
    assert len(runx_report["mounts"]) >= 17
    assert runx == runc and "filled\n" in runx and runx.count("\nnew\n") == 2
    assert (busybox.folder / "plain/new").read_text() == (busybox.folder / "upper/new").read_text() == "new\n"
    assert not (busybox.folder / "plain/x").exists() and (busybox.folder / "single").read_text() == "single\n"


# where something is mounted, and whether it can be written
MOUNTED = "while read source where kind options rest; do echo $where ${options%%,*}; done </proc/mounts"


def bind(destination, *options, source):
    return mount(destination, "bind", "bind", *options, source=str(source))


LINKS = {  # of the image, to what it has not
    "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf", "etc/localtime": "/usr/share/zoneinfo/UTC",
    "etc/first": "second", "etc/second": "../../../x/third", "x/third": "/y/z/end", "etc/up": "no/../made/other",
    "folder": "/var/data/", "below": "not/there", "memory": "/made/tmp",
}  # fmt: skip


@pytest.fixture
def linked(busybox):
    """A config that mounts files and folders onto LINKS, which are in the rootfs."""
    for name, target in LINKS.items():
        (busybox.rootfs / name).parent.mkdir(exist_ok=True)
        (busybox.rootfs / name).symlink_to(target)
    (busybox.folder / "source").write_text("file\n")
    (busybox.folder / "sources").mkdir()
    (busybox.folder / "sources/in").write_text("folder\n")
    files = ["/etc/resolv.conf", "/etc/localtime", "/etc/first", "/etc/up"]
    folders = ["/folder", "/below/deeper"]
    script = f"""
        cat {" ".join(files)} {"/in ".join(folders)}/in; {MOUNTED}
        ls / /run/systemd/resolve /made /not /var; cd /etc; stat -c '%N %F' *
    """
    spec = config("sh", "-c", script)
    spec["linux"] = {"namespaces": NAMESPACES}
    spec["mounts"] += [bind(path, source=busybox.folder / "source") for path in files]
    spec["mounts"] += [bind(path, "ro", source=busybox.folder / "sources") for path in folders]
    spec["mounts"] += [mount("/memory", "tmpfs"), mount("/memory/more", "tmpfs", "ro")]
    return spec


def test_a_mount_onto_a_link_is_where_the_link_leads(linked, outputs, busybox):
    image = busybox.folder / "image"
    assert call("mkfs.ext4", "-q", "-d", str(busybox.rootfs), str(image), "16m").returncode == 0
    runc, runx = outputs(linked, "run", "usr", "y", "var", "made", "not", "etc/made")
    assert runx == runc and runx.count("file\n") == 3 and "/usr/share/zoneinfo/UTC rw\n" in runx
    for spec in (in_memory(linked), {**linked, "root": {"path": str(image)}}):
        result = busybox.run(spec)
        assert result.stdout.decode().replace("lost+found\n", "") == runx, result


def test_a_mount_onto_links_without_end_is_refused(bundle):
    (bundle.rootfs / "one").symlink_to("/two/x")
    (bundle.rootfs / "two").symlink_to("one")
    spec = in_memory(config("true"))
    spec["mounts"].append(mount("/one", "tmpfs"))
    result = bundle.run(spec)
    reason = b"unable to start container process: follow /one: Symbolic link loop"
    assert (result.returncode, result.stderr) == (1, b"runX: " + reason + b"\n"), result


@pytest.mark.parametrize("rootfs", ["9p", "ramdisk"])
def test_fifos_sockets_and_nodes_are_bound_and_bound_over(outputs, busybox, rootfs):
    for folder in (busybox.folder, busybox.rootfs):
        os.mkfifo(folder / "fifo")
        os.mknod(folder / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
    (busybox.folder / "file").write_text("file\n")
    script = "stat -c '%n %A %t:%T' /new/* /over/* /fifo /socket /node; cat /fifo /socket /node"
    spec = config("sh", "-c", f"{script}; {MOUNTED}")
    spec["linux"] = {"namespaces": NAMESPACES}
    spec["annotations"] = {"org.runx.rootfs": rootfs}
    (busybox.rootfs / "over").mkdir()
    os.mkfifo(busybox.rootfs / "over/fifo")
    for name in ("fifo", "socket", "node"):
        source = busybox.folder / name
        spec["mounts"] += [
            bind(f"/new/{name}", source=source), bind(f"/new/ro-{name}", "ro", source=source),
            bind(f"/{name}", "ro", source=busybox.folder / "file"),
        ]  # fmt: skip
    spec["mounts"].append(bind("/over/fifo", "ro", source=busybox.folder / "fifo"))
    runc, runx = outputs(spec, "new")
    assert runx == runc and runx.count("file\n") == 3 and "/new/ro-fifo prw" in runx and "/new/ro-fifo ro" in runx


def test_what_is_read_only_has_all_that_is_made_in_it(outputs, busybox):
    (busybox.folder / "file").write_text("file\n")
    script = f"""
        pwd; stat -c '%n %A %u:%g %t:%T' $(find /dev /t | sort); cat /t/file; {MOUNTED}
        for path in / /dev /t /t/cwd /fixed; do touch $path/new; done; true
    """
    spec = config("sh", "-c", f"({script}) 2>&1", cwd="/t/cwd")
    spec["root"]["readonly"] = True
    spec["mounts"][1]["options"].append("ro")
    spec["mounts"] += [
        *USUAL_MOUNTS[:3], mount("/t", "tmpfs", "ro", "size=1m"), bind("/t/file", source=busybox.folder / "file"),
        mount("/t/full", "tmpfs", "ro", "tmpcopyup"),
    ]  # fmt: skip
    spec["linux"] = {
        "namespaces": NAMESPACES, "readonlyPaths": ["/fixed", "/t/cwd"], "maskedPaths": ["/t/masked", "/t/full"],
        "devices": [
            {"path": "/dev/deep/fifo", "type": "p", "fileMode": 0o600},
            {"path": "/t/node", "type": "c", "major": 1, "minor": 3},
        ],
    }  # fmt: skip
    (busybox.rootfs / "fixed").mkdir()
    runc, runx = outputs(spec, "t")
    assert runx == runc and "/t/cwd\n" in runx and runx.count("Read-only file system") == 5
    script = "pwd; tty; ls -l /dev/console | cut -c1-10"
    spec["process"].update(cwd="/no/such", args=["sh", "-c", script], terminal=True)
    busybox.write_config(in_memory(spec))
    spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
    result = call(sys.executable, "-c", spawn, *busybox.command("run"))
    assert result.stdout.split() == [b"/no/such", b"/dev/pts/0", b"crw--w----"], result


def test_a_tmpfs_of_no_mode_has_that_of_the_folder(outputs, busybox):
    """And, beside it, a HOME that is empty."""
    for name, mode in (("plain", 0o750), ("sticky", 0o1770), ("setgid", 0o2711), ("filled", 0o700)):
        (busybox.rootfs / name).mkdir()
        os.chown(busybox.rootfs / name, 5, 6)
        (busybox.rootfs / name).chmod(mode)
    (busybox.rootfs / "filled/file").touch()
    (busybox.rootfs / "etc").mkdir()
    (busybox.rootfs / "etc/passwd").write_text("root:x:0:0::/home/of/root:/bin/sh\n")
    names = ["plain", "sticky", "setgid", "filled", "missing"]
    script = f"cd /; stat -c '%n %a %u:%g' {' '.join(names)} group; ls filled; env"
    spec = in_memory(config("sh", "-c", script, env=["PATH=/none", "HOME=/x", "PATH=/bin", "HOME="]))
    spec["linux"] = {"namespaces": NAMESPACES}
    spec["mounts"] += [mount(f"/{name}", "tmpfs", "size=1m") for name in names if name != "filled"]
    spec["mounts"] += [mount("/filled", "tmpfs", "tmpcopyup"), mount("/group", "tmpfs", "gid=7", "mode=2775")]
    runc, runx = outputs(spec, "missing")
    assert runx == runc and "plain 750 0:0\n" in runx and "HOME=/home/of/root\n" in runx


@pytest.mark.parametrize("link", ["cwd", "fd/3"])
def test_no_working_directory_is_outside_of_the_rootfs(bundle, link):
    """Links of /proc lead to what init has open, and an image names its working directory."""
    result = bundle.run(in_memory(config("ls", "..", cwd=f"/proc/self/{link}")))
    assert (result.returncode, result.stdout) == (1, b""), result
    assert b"set in config.json failed: " in result.stderr


def test_options_and_propagation_of_mounts_are_what_they_are_under_runc(outputs, busybox):
    """And what a bind mount has from its source's mount; in an image's own /dev there are the default devices."""
    for folder in ("plain", "strict"):
        (busybox.folder / folder).mkdir()
    assert call("mount", "-t", "tmpfs", "-o", "nosuid,noexec", "strict", str(busybox.folder / "strict")).returncode == 0
    script = """
        while read -r id parent device root at options rest; do
            rest=" $rest"
            case $at in /t/*) echo "$at $options${rest%% - *}" | sed 's/,\\(rel\\|no\\)atime//; s/:[0-9]*//' ;; esac
        done </proc/self/mountinfo
        stat -c '%n %A' /t/*; stat -c '%n %A %u:%g %t:%T' /dev/* | sort; echo x >/dev/null
    """
    spec = in_memory(config("sh", "-c", script))
    spec["linux"] = {"namespaces": NAMESPACES, "rootfsPropagation": "rslave"}
    plain, strict = str(busybox.folder / "plain"), str(busybox.folder / "strict")
    spec["mounts"] = [
        spec["mounts"][0],
        mount("/t", "tmpfs"),
        mount("/t/silent", "tmpfs", "nosymfollow", "noiversion", "nomand", "silent", "mode=700"),
        mount("/t/filled", "tmpfs", "tmpcopyup"),
        mount("/t/shared", "bind", "rbind", "rshared", source=plain),
        mount("/t/kept", "bind", "rbind", source=strict),
        mount("/t/set", "bind", "bind", "ro", "rprivate", source=strict),
    ]
    try:
        runc, runx = outputs(spec, "dev")
    finally:
        call("umount", strict)
    assert "/t/kept rw,nosuid,noexec" in runx and "/t/shared rw shared" in runx
    if runc_version() >= (1, 3):  # which makes all mounts slaves in the end, also one that is to be shared
        assert "/t/shared rw\n" in runc
        runc = runc.replace("/t/shared rw\n", "/t/shared rw shared\n")
    assert runx == runc
    assert "/dev/null crw-rw-rw- 0:0 1:3\n" in runx and "nosymfollow" in runx


@pytest.mark.parametrize("uid", [0, 1000])
def test_capabilities_that_cannot_be_granted_are_left_out(reports, busybox, uid):
    names = ["CAP_CHOWN", "CAP_KILL"]
    capabilities = {name: names for name in ("bounding", "effective", "permitted", "ambient")}  # as `runc spec` has it
    spec = in_memory(report_config(user={"uid": uid, "gid": 0}, capabilities=capabilities))
    compare(*reports(spec))
    if uid == 0:
        return  # it has all that is in the bounding set
    # where this runc gives up, what can be granted is
    spec["process"]["capabilities"] = {
        "bounding": ["CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_CHOWN", "CAP_SETUID"],
        "inheritable": names, "ambient": names,
    }  # fmt: skip
    fields = json.loads(busybox.run(spec).stdout)
    assert {fields[name] for name in ("bounding", "permitted", "effective", "inheritable", "ambient")} == {1}
    assert "left out of process.capabilities: effective CAP_SETUID" in busybox.log.read_text()


@pytest.fixture
def shared_mounts(busybox):
    """A folder whose mounts propagate, as systemd has them."""
    folder = busybox.folder / "shared"
    folder.mkdir()
    call("mount", "-t", "tmpfs", "shared", str(folder))
    call("mount", "--make-shared", str(folder))
    (folder / "later").mkdir()
    yield folder
    call("umount", "-R", str(folder))


@contextlib.contextmanager
def conversation(bundle, spec):
    """Run a container of this config, which takes lines and answers them; yield its process on dom0."""
    bundle.write_config(spec)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(bundle.command("run"), text=True, bufsize=1, **pipes) as running:
        yield running
    assert running.returncode == 0


def test_what_the_host_mounts_later_comes_with_propagation_only(busybox, shared_mounts):
    spec = config("sh", "-c", "echo ready; read -r _; ls /slave/later /private/later")
    spec["mounts"] += [
        mount("/slave", "bind", "rbind", "rslave", source=str(shared_mounts)),
        mount("/private", "bind", "rbind", "rprivate", source=str(shared_mounts)),
    ]
    with conversation(busybox, spec) as running:
        assert running.stdout.readline() == "ready\n"
        assert call("mount", "-t", "tmpfs", "later", str(shared_mounts / "later")).returncode == 0
        (shared_mounts / "later/file").touch()
        running.stdin.write("go\n")
        assert running.stdout.read() == "/private/later:\n\n/slave/later:\nfile\n"


def test_a_file_that_the_host_changes_is_seen_changed(busybox):
    """Mounted alone, in a folder, and held open; in place, grown, and replaced."""
    names = ("alone", "folder/file", "folder/open")
    (busybox.folder / "folder").mkdir()
    for name in names:
        (busybox.folder / name).write_text("old\n")
    script = """
        exec 3</folder/open; read -r line <&3
        cat /alone /folder/file; echo done
        while read -r _; do cat /alone /folder/file /folder/open; cat <&3; echo done; done
    """
    spec = config("sh", "-c", script)
    for name in ("alone", "folder"):
        spec["mounts"].append(mount(f"/{name}", "bind", "bind", "ro", source=str(busybox.folder / name)))
    longer = "new\n" + "longer " * 2000 + "\n"
    with conversation(busybox, spec) as running:

        def told():
            return "".join(iter(running.stdout.readline, "done\n"))

        assert told() == "old\n" * 2
        for text, more in (("new\n", ""), (longer, longer.removeprefix("new\n"))):
            for name in names:
                with open(busybox.folder / name, "r+", encoding="ascii") as file:
                    file.write(text)
            running.stdin.write("look\n")
            assert told() == text * 3 + more
        running.stdin.close()


def test_special_files_on_the_rootfs(busybox):
    """Sockets, fifos and nodes; and the sticky bit of a file is just that."""
    script = """
        cd /made
        mkfifo fifo; (echo through >fifo &); cat fifo
        mknod null c 1 3; echo x >null; mknod disk b 7 5
        chmod 640 fifo; chown 5:6 fifo; mv fifo renamed; ln renamed linked
        socat UNIX-LISTEN:socket,mode=700 EXEC:'echo served' & until [ -S socket ]; do sleep 0.1; done
        socat -u UNIX-CONNECT:socket -; wait
        cp -a renamed copied; touch file; chmod 1644 file forged; rm linked; ls -l
    """
    made = busybox.rootfs / "made"
    made.mkdir()
    (made / "forged").write_text("9p stand-in for special file c 001:00003\n")
    spec = config("sh", "-c", script)
    spec["mounts"] += PROGRAM_MOUNTS
    spec["process"]["env"] = ["PATH=/bin:/usr/bin"]
    listed = busybox.run(spec).stdout.decode().splitlines()
    assert listed[:2] == ["through", "served"], listed
    kinds = {line.split()[-1]: (line.split()[0], line.split()[2:4]) for line in listed[3:]}
    assert kinds == {
        "copied": ("prw-r-----", ["5", "6"]), "renamed": ("prw-r-----", ["5", "6"]),
        "null": ("crw-r--r--", ["0", "0"]), "disk": ("brw-r--r--", ["0", "0"]),
        "file": ("-rw-r--r-T", ["0", "0"]), "forged": ("-rw-r--r-T", ["0", "0"]),
    }, listed  # fmt: skip
    # they are such files on dom0, too
    assert call("busybox", "ls", "-ln", str(made)).stdout.decode().splitlines() == listed[2:]


def test_a_container_runtime_runs_in_the_container(busybox):
    """runc of Debian in the VM: control groups, namespaces, mounts and seccomp, all of the guest's kernel."""
    inner = busybox.rootfs / "inner"
    shutil.copytree(busybox.rootfs / "bin", inner / "rootfs/bin", symlinks=True)
    spec = report_config("/dev/null")
    spec["linux"]["resources"] = {"pids": {"limit": 12}, "memory": {"limit": 20 << 20}}
    spec["linux"]["seccomp"] = json.loads((DATA / "docker-20.10.24.json").read_text())["linux"]["seccomp"]
    (inner / "config.json").write_text(json.dumps(spec))
    # a cgroup that has groups below it must not have processes itself: cgroups(7)
    prepare = "mkdir /sys/fs/cgroup/init; echo 1 >/sys/fs/cgroup/init/cgroup.procs"
    outer = config("sh", "-c", f"{prepare}; exec runc --root /tmp/state run --bundle /inner nested")
    outer["process"]["env"] = ["PATH=/bin:/usr/sbin:/usr/bin"]
    outer["mounts"] += [
        *PROGRAM_MOUNTS, DEVPTS, mount("/sys", "sysfs"), mount("/sys/fs/cgroup", "cgroup", "rw"),
        mount("/tmp", "tmpfs"), mount("/sys/kernel/security", "securityfs"),
    ]  # fmt: skip
    outer["linux"] = {"namespaces": NAMESPACES, "resources": {"memory": {"limit": 160 << 20}}}
    result = busybox.run(outer)
    assert result.returncode == 0, result
    fields = json.loads(result.stdout)
    assert (fields["pid"], fields["pids.max"], fields["seccomp"], fields["cgroup"]) == (1, ["12"], 2, ["0::/"])
