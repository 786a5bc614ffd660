"""What the container gets of its config.json, beside what the same config.json gives under runc in the same dom0."""

import json
import shutil
import subprocess

import pytest
from conftest import DEVPTS, config

pytestmark = [
    pytest.mark.usefixtures("clean_dom0"),
    pytest.mark.skipif(not shutil.which("runc"), reason="needs runc, to compare with"),
]

# what the process sees of itself, a section each; $$ is the process, not a child of it
REPORT = r"""
section() { echo "== $1"; }
section user; id -u; id -g; id -G; umask; pwd
section status; sed -n '/^Cap/p;/^NoNewPrivs/p' /proc/$$/status
section limits; cat /proc/$$/limits
section oom; cat /proc/$$/oom_score_adj
section names; hostname; cat /proc/sys/kernel/domainname
section environment; env | sed '/^_=/d;/^SHLVL=/d;/^PWD=/d'
section priority; ionice -p $$; cut -d ' ' -f 18-19 /proc/$$/stat
section devices; for node in $NODES; do stat -c '%n %F %a %u %g %t %T' $node; done
section links; for link in fd stdin stdout stderr ptmx core; do readlink /dev/$link; done
section masked; for path in $MASKED; do cat $path/* $path 2>/dev/null | wc -c; done
section readonly; for path in $READONLY; do (echo x >$path/new) 2>&1 | sed 's/.*: //'; done
section sysctl; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward
section mounts; while read -r id parent device root at options rest; do
    case $at in / | /proc/*) ;; *) echo "$at $options ${rest#*- }" ;; esac
done </proc/$$/mountinfo | sed 's/,inode64//'
"""

NAMESPACES = [{"type": name} for name in ("pid", "ipc", "uts", "mount", "network")]
DEFAULT_CAPABILITIES = ["CAP_CHOWN", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_KILL"]


def report_config(**process):
    spec = config("sh", "-c", REPORT, **process)
    spec["mounts"] += [
        DEVPTS,
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
         "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    ]  # fmt: skip
    spec["linux"] = {"namespaces": NAMESPACES}
    return spec


def report(output):
    """The sections of a report."""
    sections = {}
    for part in output.split("== ")[1:]:
        name, _, text = part.partition("\n")
        sections[name] = text.splitlines()
    return sections


@pytest.fixture
def reports(bundle):
    """A function that runs a config under both runtimes and returns both reports."""

    def run(spec):
        bundle.write_config(spec)
        for applet in ("hostname", "ionice", "cut", "stat", "readlink", "wc"):
            if not (bundle.rootfs / "bin" / applet).exists():
                (bundle.rootfs / "bin" / applet).symlink_to("busybox")
        found = []
        for runtime in ("runc", "runX"):
            command = [runtime, "--root", str(bundle.folder / f"root-{runtime}"), "run", bundle.id]
            result = subprocess.run(
                command, cwd=bundle.folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
            )
            assert result.returncode == 0, result
            found.append(report(result.stdout.decode()))
        return found

    return run


def compare(runc, runx, *but):
    assert runx.keys() == runc.keys()
    assert {name: lines for name, lines in runx.items() if name not in but} == {
        name: lines for name, lines in runc.items() if name not in but
    }


def limit(report, name):
    """A line of limits; those that no config.json sets are the kernel's, or the engine's own."""
    return next(line for line in report["limits"] if line.startswith(f"Max {name}")).split()


def test_a_usual_config_is_what_it_is_under_runc(reports):
    spec = report_config(
        capabilities={name: DEFAULT_CAPABILITIES for name in ("bounding", "effective", "permitted")},
        noNewPrivileges=True,
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2048}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        env=[
            "PATH=/bin", "READONLY=/proc/sys /proc/bus /sys", "MASKED=/proc/keys /proc/scsi /masked",
            "NODES=/dev/null /dev/tty",
        ],
    )  # fmt: skip
    spec["hostname"] = "box"
    spec["linux"].update(
        maskedPaths=["/proc/keys", "/proc/scsi", "/masked", "/no/such/path"],
        readonlyPaths=["/proc/sys", "/proc/bus", "/no/such/path"],
    )
    runc, runx = reports(spec)
    compare(runc, runx, "limits")
    for name in ("open files", "core file size"):
        assert limit(runx, name) == limit(runc, name)
    assert limit(runx, "open files")[3:5] == ["1024", "2048"]


def test_a_rich_config_is_what_it_is_under_runc(reports, bundle):
    (bundle.rootfs / "etc").mkdir()
    (bundle.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    ambient = ["CAP_NET_BIND_SERVICE", "CAP_SYS_NICE"]
    spec = report_config(
        user={"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o077},
        capabilities={
            "bounding": [*DEFAULT_CAPABILITIES, *ambient], "effective": ambient, "permitted": ambient,
            "inheritable": ambient, "ambient": ambient,
        },
        rlimits=[{"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": (1 << 64) - 1}],
        oomScoreAdj=321,
        env=["PATH=/bin", "READONLY=/", "MASKED=", "NODES=/dev/fuse /dev/pipe /dev/deep/node"],
    )  # fmt: skip
    spec["root"]["readonly"] = True
    spec["hostname"] = "box"
    spec["linux"].update(
        sysctl={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"},
        devices=[
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 7, "gid": 8},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
            {"path": "/dev/deep/node", "type": "b", "major": 7, "minor": 99},
        ],
    )
    runc, runx = reports(spec)
    compare(runc, runx, "limits")
    assert limit(runx, "stack size") == limit(runc, "stack size")


def test_what_this_runc_does_not_know_applies(bundle):
    spec = config(
        "sh", "-c", "ionice -p $$; cut -d ' ' -f 19 /proc/$$/stat; cat /proc/sys/kernel/domainname",
        ioPriority={"class": "IOPRIO_CLASS_IDLE", "priority": 0}, scheduler={"policy": "SCHED_BATCH", "nice": 7},
    )  # fmt: skip
    for applet in ("ionice", "cut"):
        (bundle.rootfs / "bin" / applet).symlink_to("busybox")
    spec["domainname"] = "example.org"
    bundle.write_config(spec)
    result = bundle.runx("run", "--bundle", str(bundle.folder), bundle.id)
    assert result.stdout == b"idle\n7\nexample.org\n", result


def test_what_has_no_effect_is_logged_once(bundle):
    spec = config("true", apparmorProfile="x")
    spec["linux"] = {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}, "resources": {"pids": {"limit": 9}, "blockIO": {}}}
    bundle.write_config(spec)
    assert bundle.runx("run", "--bundle", str(bundle.folder), bundle.id).returncode == 0
    records = [json.loads(line) for line in bundle.log.read_text().splitlines()]
    assert {record["level"] for record in records} == {"warning"}
    named = [record["msg"].split(": ")[1].split()[0] for record in records]
    assert named == ["process.apparmorProfile", "linux.seccomp", "linux.resources.pids"]
