# SPDX-License-Identifier: Apache-2.0
"""Thousands of broken config.json, CNI documents and command lines: each gives one sentence, and leaves nothing.

TEST_SEED=N draws other ones; a failure names the seed and the case.
"""

import contextlib
import copy
import io
import json
import os
import random
import re

import mutate
import pytest
from conftest import config
from test_engines import CONFIGS

import runx

SEED = int(os.environ.get("TEST_SEED", "1"))
CONFIG_CASES, NETWORK_CASES, COMMAND_CASES = 3000, 2000, 3000
DEEP, ENDLESS, DIGITS = "@deep@", "@endless@", "@digits@"  # what json cannot write
RAW = {DEEP: "[" * 100000 + "]" * 100000, ENDLESS: "1e999", DIGITS: "7" * 5000}
ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63, 2**64, -(2**70), 0.5, 1e300, float("nan"), float("-inf"),
    "", " ", "x", "/", "..", "../..", "/..", ".", "a\0b", "\0", "\ud800", "a\udfffb", "\u00b2", "\u0663", "x" * 5000,
    "/x" * 3000, "a\nb", 'a"b', "a,b", "é世界", "1." + "0" * 5000 + ".0", "1.0.0", "1e999", "network", "/dev/null",
    "/proc/self/ns/uts", "/proc/self/fd/0", [], {}, [1], [[]], [None], [""], ["\0"], {"": ""}, {"path": "/x"},
    {"type": "bind"}, [{}], [[[1]]], {"a": {"b": [{"c": None}]}}, DEEP, ENDLESS, DIGITS,
]  # fmt: skip
RICH = {
    **config("sh", "-c", "x", env=["PATH=/bin", "HOME=/", "RUNX_KERNEL=/k", "NETCONF=/x,y"], terminal=False),
    "hostname": "box", "domainname": "example",
    "annotations": {"org.runx.memory": "64", "org.runx.rate": "1Mb/s", "org.runx.vcpus": "2", "note": "x"},
    "hooks": {"prestart": [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 3}]},
    "vm": {
        "kernel": {"path": "", "parameters": ["a=b"]}, "hypervisor": {"parameters": ["x=1"]},
        "image": {"format": "raw"},
        "hwConfig": {"memory": 1 << 26, "vcpus": 2, "irqs": [5], "iomems": [{"firstMFN": 1, "nrMFNs": 2}]},
    },
    "linux": {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
        "devices": [{"path": "/dev/f", "type": "c", "major": 10, "minor": 229, "fileMode": 438}],
        "sysctl": {"net.ipv4.ip_forward": "1"}, "maskedPaths": ["/proc/x"], "personality": {"domain": "LINUX"},
        "resources": {
            "memory": {"limit": 1 << 26}, "cpu": {"quota": 200000, "period": 100000, "cpus": "0-1"},
            "pids": {"limit": 7},
            "unified": {"cpu.idle": "1"}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
        },
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
        ]},
    },
}  # fmt: skip
NETWORKS = [
    {
        "cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "br0", "isGateway": True, "mtu": 1400,
        "ipam": {
            "type": "host-local", "ranges": [[{"subnet": "10.1.0.0/16", "gateway": "10.1.0.1"}]],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}],
        },
        "dns": {"nameservers": ["10.1.0.1"], "domain": "x", "search": ["a", "b"], "options": ["c"]},
    },
    {
        "cniVersion": "1.0.0", "name": "net", "plugins": [
            {"type": "macvlan", "args": {"cni": {"ips": []}}, "ipam": {"type": "static", "addresses": []}},
            {"type": "bandwidth", "egressRate": 8000, "runtimeConfig": {"bandwidth": {"egressBurst": 8}}},
        ],
    },
]  # fmt: skip
RESULT = {
    "cniVersion": "0.4.0", "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "version": "4"}],
    "routes": [{"dst": "0.0.0.0/0"}], "dns": {"nameservers": ["10.1.0.1"]}, "interfaces": [{"name": "eth0"}],
    "ip4": {"ip": "10.1.0.5/16", "routes": [{"dst": "0.0.0.0/0"}]}, "supportedVersions": ["0.4.0"],
}  # fmt: skip


def places(value, found):
    """All (container, key) of a JSON object or array."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(each, (dict, list)):
            places(each, found)
    return found


def mutated(dice, document):
    """The document's text with one to three things that are not as they should be."""
    document = json.loads(json.dumps(document))
    for _ in range(dice.choice((1, 1, 2, 3))):
        section, key = dice.choice(places(document, []))
        kind = dice.random()
        if kind < 0.6:
            section[key] = copy.deepcopy(dice.choice(ODD))
        elif kind < 0.75:
            section[key] = [section[key]] if dice.random() < 0.5 else {"x": section[key]}
        elif kind < 0.85 and isinstance(section, dict):
            odd = dice.choice(ODD)
            section[odd if isinstance(odd, str) else "x"] = section.pop(key)
        elif kind < 0.95:
            other, other_key = dice.choice(places(document, []))
            section[key] = json.loads(json.dumps(other[other_key]))
        else:
            del section[key]
        if not document:
            break
    text = json.dumps(document)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    if dice.random() < 0.1:  # and the text itself
        at = dice.randrange(len(text))
        odd = dice.choice(["", "\0", "\x7f", "\ufeff", '"', "{", "]", ",", "-", "\\u", "//"])
        text = text[:at] + odd + text[at + 1 :]
    return text


def strictly(text):
    """What a parser that takes no more than JSON reads."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()  # no halves of characters
    return value


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A function that runs one command line here, and returns its status, output and only sentence."""
    log, root = tmp_path / "log", tmp_path / "root"
    monkeypatch.setattr(runx, "HOST_CONFIG", str(tmp_path / "host.json"))
    (tmp_path / "host.json").write_text(json.dumps({"annotations": list(runx.ANNOTATIONS)}))
    monkeypatch.setattr(runx, "find_xl", lambda: "/nowhere/xl")
    monkeypatch.setattr(runx, "host_processors", lambda: 4)
    monkeypatch.chdir(tmp_path)

    def stop(container):
        raise runx.Error("accepted")

    monkeypatch.setattr(runx.Container, "reserve", stop)

    def run(case, *words):
        log.write_text("")
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = runx.main(["--root", str(root), "--log", str(log), "--log-format", "json", *words])
        sentence = stderr.getvalue()
        where = f"TEST_SEED={SEED}, case {case}: {words}, {sentence}"
        assert "internal error" not in sentence and "Traceback" not in sentence, where
        assert not root.exists(), where
        if status:
            assert re.fullmatch(r"runX: [^\n]*\n", sentence) and len(sentence.encode()) < 9000, where
            records = [strictly(line) for line in log.read_text().splitlines()]
            assert [record["msg"] for record in records] == [sentence[6:-1]], where
        return status, stdout.getvalue(), sentence

    yield run
    ours = {"log", "host.json", "rootfs", "networks"}
    assert {name for name in os.listdir(tmp_path) if not name.startswith("config")} <= ours


def test_mutated_configs(tmp_path, trial):
    dice, accepted = random.Random(SEED), 0
    print(f"TEST_SEED={SEED}: {CONFIG_CASES} mutated config.json")
    (tmp_path / "rootfs").mkdir()
    bases = [RICH, RICH, *(CONFIGS[name] for name in ("docker-bridge", "podman-defaults", "cri-plain-sandbox"))]
    bases = json.loads(json.dumps(bases))
    for base in bases:
        base["root"]["path"] = "rootfs"
        for mount in base["mounts"]:
            if "bind" in mount.get("options", ()):
                mount["source"] = "rootfs"
        for namespace in base["linux"]["namespaces"]:
            namespace.pop("path", None)
    for case in range(CONFIG_CASES):
        (tmp_path / "config.json").write_text(mutated(dice, dice.choice(bases)), encoding="utf-8", errors="replace")
        status, _, sentence = trial(case, "create", "x")
        assert status == 1
        if sentence.endswith("accepted\n"):
            accepted += 1
            parsed = runx.Config(str(tmp_path))
            for kept in (parsed.annotations, parsed.hooks, parsed.raw_resources, parsed.base, parsed.oci_version):
                assert strictly(runx.json_text(kept)) == kept
            with contextlib.suppress(runx.Error):
                runx.guest_config(parsed, "{}", {})
                runx.xl_config(parsed.machine.options)
                runx.command_line(parsed.machine)
    assert CONFIG_CASES // 20 < accepted < CONFIG_CASES // 2  # the others are not all refused for one reason


class Made:
    """A container with a state and nothing else."""

    folder, state = "/root/x", runx.State(name="runx-x")

    def path(self, name):
        return f"{self.folder}/{name}"


def test_mutated_networks(tmp_path, trial, monkeypatch):
    dice, accepted, files = random.Random(SEED), 0, tmp_path / "networks"
    print(f"TEST_SEED={SEED}: {NETWORK_CASES} mutated CNI documents")
    files.mkdir(mode=0o755)
    (tmp_path / "host.json").write_text(json.dumps({"netconf": [str(files)]}))
    (tmp_path / "rootfs").mkdir()
    for address in ("", ",auto", ",10.1.0.7"):
        spec = config("true", env=[f"NETCONF={files}/net.conf,net{address}"])
        (tmp_path / f"config{address}").write_text(json.dumps(spec))
    monkeypatch.setattr(runx, "prepare_bridge", lambda network, by_plugins: None)
    monkeypatch.setattr(runx, "find_plugin", lambda name: f"/plugins/{name}")
    monkeypatch.setattr(runx, "call_plugin", lambda *call: mutated(dice, RESULT))
    for case in range(NETWORK_CASES):
        address = dice.choice(("", ",auto", ",10.1.0.7"))
        (tmp_path / "config.json").write_bytes((tmp_path / f"config{address}").read_bytes())
        text = mutated(dice, dice.choice(NETWORKS))
        (files / "net.conf").write_text(text, encoding="utf-8", errors="replace")
        status, _, sentence = trial(case, "create", "x")
        assert status == 1
        if sentence.endswith("accepted\n"):
            accepted += 1
            request = ("NETCONF", f"{files}/net.conf", "net", address[1:])
            with contextlib.suppress(runx.Error):
                network = runx.Network(request, [str(files)])
                attachment = runx.plan_attachment(network, 0, Made(), runx.Log(str(tmp_path / "log")))
                runx.attach_network(attachment, network)
                runx.resolv_conf(attachment.dns).encode()
                strictly(runx.json_text(attachment.__dict__))
    assert NETWORK_CASES // 20 < accepted < NETWORK_CASES // 2


def test_mutated_command_lines(tmp_path, trial):
    dice, statuses = random.Random(SEED), set()
    print(f"TEST_SEED={SEED}: {COMMAND_CASES} mutated command lines")
    options = sorted({name for _, flags, values, _ in runx.COMMANDS.values() for name in (*flags, *values)})
    options += [*sorted(runx.GLOBAL_FLAGS | runx.GLOBAL_VALUES), "bogus", ""]
    commands = sorted({*runx.COMMANDS, *runx.UNSUPPORTED} - {"pack-initrd"})
    values = ["x", "", "json", "true", "false", "é", "\udcff", "-1", "9" * 5000, "/no/such", "a\nb", "x" * 300, "5s"]
    for case in range(COMMAND_CASES):
        words = []
        for _ in range(dice.randrange(6)):
            name, value = dice.choice(options), dice.choice(values)
            dashes = dice.choice(("-", "--", "--", "---"))
            words += dice.choice(([f"{dashes}{name}"], [f"{dashes}{name}={value}"], [dashes + name, value], [value]))
        words.insert(dice.randrange(len(words) + 1), dice.choice(commands))
        words = [word for word in words if not re.match(r"-*(root|log|log-format|r|resources)\b", word)]
        statuses.add(trial(case, *words)[0])
    assert statuses == {0, 1, 3, 255}  # 3: an unknown command


def test_faults_of_the_source_are_such_as_can_be_seen():
    """tests/mutate.py: the order of what stands behind `in` is none."""

    def swapped(text):
        return [fault.replacement for fault in mutate.find_faults(text) if fault.kind == "swapped items"]

    assert swapped("x in (1, 2)") == swapped("x not in [1, 2]") == []
    assert swapped("(1, 2) in x") == swapped("(1, 2) == x") == swapped("for y in (1, 2): pass") == ["((2, 1))"]
