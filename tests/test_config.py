# SPDX-License-Identifier: Apache-2.0
"""config.json and the command line: what is accepted, what is refused, in which words."""

import json
import os
import pathlib
import re
import stat
import struct

import pytest
import spec as runtime_spec
from conftest import call, config, namespaces, runx_command
from spec import check_guest_words, guest_words

import runx

RUNX = runx_command()


def check_refused(result, words):
    """The call has failed, with one sentence of ours on standard error and no trace; returns that sentence."""
    assert (result.returncode, result.stdout) == (1, b"")
    sentence = re.fullmatch(r"runX: ([^\n]+)\n", result.stderr.decode())
    assert sentence and re.search(words, sentence[1]) and "internal error" not in sentence[1], result.stderr
    return sentence[1]


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "rootfs").mkdir()

    def write(spec):
        (tmp_path / "config.json").write_text(json.dumps(spec))
        return str(tmp_path)

    return write


def test_a_config_is_parsed_once(bundle, tmp_path):
    spec = config("a", "b c", env=["X=1"], user={"uid": 1, "gid": 2, "additionalGids": [3]})
    spec.update(hostname="box", linux={"resources": {"memory": {"limit": 64 << 20}}}, unknownProperty=1)
    parsed = runx.Config(bundle(spec))
    assert parsed.rootfs == str(tmp_path / "rootfs")
    assert (parsed.hostname, parsed.resources.memory, parsed.process.args) == ("box", 64 << 20, ["a", "b c"])
    assert (parsed.process.uid, parsed.process.gid, parsed.process.groups, parsed.process.umask) == (1, 2, [3], 0o022)


def test_hooks_are_parsed():
    hooks = {"prestart": [{"path": "/a"}, {"path": "/b", "args": ["x", "y"], "env": ["E=1"], "timeout": 3}]}
    parsed = [(hook.path, hook.args, hook.env, hook.timeout) for hook in runx.parse_hooks(hooks, "prestart")]
    assert parsed == [("/a", ["/a"], [], 0), ("/b", ["x", "y"], ["E=1"], 3)]
    assert runx.parse_hooks(hooks, "poststop") == []


@pytest.mark.parametrize(
    "hooks, words",
    [
        ({"prestart": {}}, "hooks.prestart must be a JSON array"),
        ({"prestart": ["/a"]}, r"hooks.prestart\[0\] must be a JSON object"),
        ({"prestart": [{}]}, r"hooks.prestart\[0\].path is missing"),
        ({"prestart": [{"path": "/a"}, {"path": "a"}]}, r"hooks.prestart\[1\].path must be an absolute path"),
        ({"prestart": [{"path": "/a", "timeout": 0}]}, r"hooks.prestart\[0\].timeout must be from 1 to 2147483647"),
        ({"prestart": [{"path": "/a", "timeout": 1 << 31}]}, r"hooks.prestart\[0\].timeout must be from 1 to"),
        ({"prestart": [{"path": "/a", "args": "x"}]}, r"hooks.prestart\[0\].args must be a JSON array"),
        ({"prestart": [{"path": "/a", "env": [1]}]}, r"hooks.prestart\[0\].env\[0\] must be a JSON string"),
    ],
)
def test_wrong_hooks_are_refused(bundle, hooks, words):
    with pytest.raises(runx.Error, match=f"^config.json: {words}"):
        runx.parse_hooks(hooks, "prestart")
    for kind in runx.HOOK_KINDS:  # and before anything is made
        with pytest.raises(runx.Error, match=f"^config.json: {words.replace('prestart', kind)}"):
            runx.Config(bundle({**config("true"), "hooks": {kind: hooks["prestart"]}}))


def test_a_terminal_is_parsed_and_needs_a_devpts(bundle):
    spec = config("sh", terminal=True, consoleSize={"height": 24, "width": 80})
    with pytest.raises(runx.Error, match="devpts"):
        runx.Config(bundle(spec))
    spec["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts"})
    assert runx.Config(bundle(spec)).process.console_size == (24, 80)
    spec["process"]["consoleSize"]["width"] = 1 << 16
    with pytest.raises(runx.Error, match="consoleSize"):
        runx.Config(bundle(spec))
    spec["process"]["terminal"] = False  # and the size of none is ignored
    assert runx.Config(bundle(spec)).process.console_size == (0, 0)


BASE = {"default_memory": 128, "minimum_memory": 48, "default_vcpus": 1, "fixed_vcpus": 0, "most_vcpus": 64}


@pytest.mark.parametrize(
    "cpu, vcpus, cap, weight",
    [
        ({}, 1, 0, 256),
        ({"quota": -1, "period": 100000, "shares": 1024}, 8, 0, 256),
        ({"quota": 50000}, 1, 50, 256),
        ({"quota": 150000, "shares": 2}, 2, 150, 1),
        ({"quota": 40000, "period": 10000, "shares": 1 << 20}, 4, 400, 65535),
        ({"quota": 1000, "period": 1000000}, 1, 1, 256),
    ],
)
def test_what_a_share_of_the_processors_is_in_xen(cpu, vcpus, cap, weight):
    resources = runx.Resources({"cpu": cpu}, "resources", BASE)
    assert (resources.vcpus(8), *resources.share()) == (vcpus, weight, cap)


def test_a_list_of_processors_is_nothing_else(bundle):
    spec = config("true")
    spec["linux"] = {"resources": {"cpu": {"cpus": '0-3,7"'}}}
    with pytest.raises(runx.Error, match="0-3,7"):
        runx.Config(bundle(spec))


def test_mount_options_become_flags_and_data(bundle):
    spec = config("true")
    spec["mounts"] = [
        {"destination": "/t", "type": "tmpfs", "source": "t", "options": ["nosuid", "ro", "rw", "size=1m", "mode=755"]}
    ]
    mount = runx.Config(bundle(spec)).mounts[0]
    assert (mount.flags, mount.data) == (runx.MS_NOSUID, "size=1m,mode=755")


def test_a_bind_mount_has_no_other_options(bundle, tmp_path):
    spec = config("true")
    spec["mounts"] = [{"destination": "/t", "source": str(tmp_path), "options": ["rbind", "rro", "rnodev"]}]
    mount = runx.Config(bundle(spec)).mounts[0]
    flags = runx.MS_BIND | runx.MS_REC | runx.MS_RDONLY | runx.RECURSIVE_RO | runx.MS_NODEV
    assert mount.flags == flags
    _, options = runx.guest_mount(mount)
    assert options[4] == runx.MS_BIND | 32 | runx.MS_RDONLY | runx.MS_NODEV
    spec["mounts"][0]["options"].append("idmap")
    with pytest.raises(runx.Error, match="a bind mount has no option idmap here"):
        runx.Config(bundle(spec))


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.3.0", "1.9.9+x"])
def test_supported_versions(version):
    assert runx.check_version(version) == version


@pytest.mark.parametrize("version", ["", "1", "1.0", "one.0.0", "2.0.0", "0.1.0", "1.0.0.0", "1.0.\u0661"])
def test_unsupported_versions(version):
    with pytest.raises(runx.Error, match="ociVersion"):
        runx.check_version(version)


def test_a_config_without_process_is_valid(bundle):
    spec = config("true")
    del spec["process"]
    assert runx.Config(bundle(spec)).process is None


def test_the_guests_config_keeps_the_order_of_mounts(bundle, tmp_path):
    (tmp_path / "source").mkdir()
    spec = config("sh", "-c", "x")
    spec["mounts"] = [
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/run/x", "type": "bind", "source": "source", "options": ["ro"]},
    ]
    words = guest_words(runx.Config(bundle(spec)))
    words = words[:1] + words[words.index("mount") :]
    assert words[:7] == ["0", "mount", "tmpfs", "/run", "tmpfs", "0", ""]
    assert words[7:13] == ["mount", "mounts/0", "/run/x", "", str(runx.MS_BIND), ""]
    readonly = str(runx.MS_BIND | runx.MS_REMOUNT | runx.MS_RDONLY)
    assert words[13:19] == ["mount", "mounts/0", "/run/x", "", readonly, ""]
    assert words[-8:] == ["arg", "sh", "arg", "-c", "arg", "x", "env", "PATH=/bin"]


@pytest.fixture
def host_config(tmp_path, monkeypatch):
    """A function that writes the host's own configuration."""
    file = tmp_path / "host.json"
    monkeypatch.setattr(runx, "HOST_CONFIG", str(file))
    return file.write_text


def test_the_hosts_own_configuration(bundle, host_config):
    def load(annotations=None, **linux):
        return runx.Config(bundle({**config("true"), "annotations": annotations or {}, "linux": linux}))

    def size(config):
        return config.resources.mebibytes(1000), config.resources.vcpus(8)

    assert (load().machine.type, size(load())) == ("", (runx.DEFAULT_MEMORY, 1))
    settings = {"type": "pv", "memory": 72, "vcpus": 2, "cmdline": "a b", "annotations": list(runx.ANNOTATIONS)}
    host_config(json.dumps(settings))
    assert (load().machine.type, load().machine.cmdline, size(load())) == ("pv", ["a", "b"], (72, 2))
    asked = {"memory": {"limit": 80 << 20}, "cpu": {"quota": 350000}}
    assert size(load(resources=asked)) == (80, 4)
    annotations = {"type": "pvh", "memory": "70", "vcpus": "3", "maxmem": "100", "cmdline": "c=d"}
    mine = load({f"org.runx.{key}": value for key, value in annotations.items()}, resources=asked)
    assert (mine.machine.type, mine.machine.cmdline, size(mine)) == ("pvh", ["a", "b", "c=d"], (70, 3))
    assert (mine.machine.maxmem, mine.resources.share()[1]) == (100, 300)  # no more than the vcpus can use


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "^cannot read .*host.json: "),
        ("[]", "host.json must be a JSON object$"),
        ('{"type": "hvm"}', "host.json: type must be one of pv, pvh, not hvm"),
        ('{"tpye": "pv"}', "host.json must be a JSON object with no other members than type, memory, "),
        ('{"memory": "1"}', "host.json: memory must be a JSON integer"),
        ('{"vcpus": -1}', "host.json: vcpus must not be below 0"),
        ('{"maxmem": -1}', "host.json: maxmem must not be below 0"),
        ('{"rootfs": "none"}', "host.json: rootfs must be one of 9p, ramdisk, block, auto, not none"),
        ('{"xlconf": [1]}', r"host.json: xlconf\[0\] must be a JSON string"),
        ('{"netconf": "/x"}', "host.json: netconf must be a JSON array"),
        ('{"annotations": ["xlcfg"]}', r"host.json: annotations\[0\] must be one of memory, .*, xlconf, not xlcfg"),
        ('{"environment": ["PATH"]}', r"host.json: environment\[0\] must be one of NETCONF, .*, not PATH"),
    ],
)
def test_a_wrong_configuration_of_the_host(bundle, host_config, text, words):
    host_config(text)
    with pytest.raises(runx.Error, match=words):
        runx.Config(bundle(config("true")))


@pytest.mark.parametrize(
    "target, reason", [("host.json", "Too many levels of symbolic links"), ("gone", "No such file")]
)
def test_a_configuration_of_the_host_that_cannot_be_reached_is_not_taken_for_none(
    bundle, host_config, tmp_path, target, reason
):
    (tmp_path / "host.json").symlink_to(target)
    with pytest.raises(runx.Error, match=f"^cannot read .*host.json: {reason}"):
        runx.Config(bundle(config("true")))


# ---- what an image may have said


def annotated(bundle, resources=None, **annotations):
    spec = config("true")
    spec["annotations"] = {f"org.runx.{key}": value for key, value in annotations.items()}
    spec["linux"] = {"resources": resources or {}}
    return runx.Config(bundle(spec))


def test_an_annotation_never_asks_for_more_than_the_resources(bundle, host_config):
    limits = {"memory": {"limit": 64 << 20}, "cpu": {"quota": 150000}}
    parsed = annotated(bundle, limits, memory="1500", vcpus="3", maxmem="99999")
    assert (parsed.resources.mebibytes(0), parsed.resources.vcpus(8), parsed.machine.maxmem) == (64, 2, 512)
    assert [warning.split(" cannot ")[0] for warning in parsed.warnings] == [
        "the annotation org.runx.maxmem", "the annotation org.runx.memory", "the annotation org.runx.vcpus"
    ]  # fmt: skip
    parsed = annotated(bundle, limits, memory="32", vcpus="1")
    assert (parsed.resources.mebibytes(0), parsed.resources.vcpus(8), parsed.warnings) == (32, 1, [])
    for limit in (-1, (1 << 63) - 4096, (1 << 63) - 1):  # the last two as cgroups tell it, and some who ask them
        assert runx.Resources({"memory": {"limit": limit}}, "resources", {}).memory == -1
    unlimited = {"memory": {"limit": -1}, "cpu": {"quota": -1}}
    for resources in ({}, unlimited):
        assert annotated(bundle, resources, memory="1500").resources.mebibytes(0) == 512
    host_config('{"maxmem": 2000}')
    assert annotated(bundle, memory="1500").resources.mebibytes(0) == 1500
    vm = {"hwConfig": {"memory": 1500 << 20}}  # the engine's own word
    assert runx.Config(bundle({**config("true"), "vm": vm})).resources.mebibytes(0) == 1500


def test_an_annotation_that_the_host_does_not_believe_has_no_effect(bundle, host_config):
    unbelieved = {"type": "pv", "kernel": "/k", "ramdisk": "/r", "cmdline": "a", "xlconf": "/x"}
    parsed = annotated(bundle, **unbelieved, memroy="1")
    machine = parsed.machine
    assert (machine.type, machine.kernel, machine.own_init, machine.cmdline, machine.lines) == ("", None, False, [], [])
    words = f"these annotations have no effect, for {runx.HOST_CONFIG} does not believe them: "
    assert parsed.warnings == [words + ", ".join(f"org.runx.{name}" for name in (*unbelieved, "memroy"))]
    assert parsed.annotations["org.runx.type"] == "pv"  # for `state`
    host_config('{"annotations": ["cmdline"]}')
    parsed = annotated(bundle, cmdline="a", memory="72")
    assert (parsed.machine.cmdline, parsed.resources.mebibytes(0)) == (["a"], runx.DEFAULT_MEMORY)


def test_a_rate_of_an_annotation_is_a_lower_one():
    assert runx.lower_rate("100,50000", "50,50000") == runx.lower_rate("50,50000", "") == "50,50000"
    assert runx.lower_rate("100,50000", "100,1000") == "100,50000"
    assert runx.lower_rate("", "") == ""


@pytest.mark.parametrize(
    "believed, kernel, networks",
    [(None, ("/k", True), 2), ([], None, 0), (["NETCONF"], None, 2), (["RUNX_KERNEL"], ("/k", True), 0)],
)
def test_variables_that_the_host_does_not_believe_have_no_effect(bundle, host_config, believed, kernel, networks):
    host_config("{}" if believed is None else json.dumps({"environment": believed}))
    env = ["RUNX_KERNEL=/k", "NETCONF=/a,n", "NETCONF7=/b,n", "NETCONFIG=x", "XLCONF=/etc/passwd", "RUNX_RAMDISK="]
    parsed = runx.Config(bundle(config("true", env=env)))
    assert (parsed.machine.kernel, len(parsed.netconf), parsed.machine.lines) == (kernel, networks, [])
    dropped = [*["RUNX_KERNEL"][: not kernel], *["NETCONF", "NETCONF7"][: 2 - networks], "XLCONF"]
    assert [warning.split(": ")[1] for warning in parsed.warnings] == [", ".join(dropped)]
    assert parsed.process.env == env


def test_who_has_refused_a_network_gets_none_by_netconf(bundle):
    spec = config("true", env=["NETCONF=/a,n"])
    spec["linux"] = {"namespaces": namespaces()}
    assert runx.Config(bundle(spec)).netconf  # as ctr writes it by default
    spec["mounts"].append({"destination": runx.PODMANS_MARK, "type": "bind", "source": "rootfs", "options": ["bind"]})
    parsed = runx.Config(bundle(spec))
    assert (parsed.netconf, parsed.namespace) == ([], "")
    assert parsed.warnings == ["NETCONF has no effect, for Podman was asked for no network"]
    del spec["linux"]["namespaces"][-1]  # network
    assert runx.Config(bundle(spec)).netconf


# ---- namespaces


@pytest.mark.parametrize(
    "entries, words",
    [
        (["pid"], r"linux.namespaces\[0\] must be a JSON object"),
        ([*namespaces(), {"type": "pid"}], r"namespaces\[6\].type pid is there twice"),
        ([*namespaces(), {"type": "network", "path": "/x"}], "network is there twice"),
        ([{"type": "disk"}], r"namespaces\[0\].type must be one of cgroup, ipc, .*, not disk"),
        ([{"type": ""}], r"namespaces\[0\].type must be one of cgroup"),
        ([*namespaces(), {"path": "/x"}], r"namespaces\[6\].type is missing"),
        (namespaces(network="/no/such"), "cannot join the network namespace /no/such: No such file"),
        (namespaces(network="/proc/self/ns/uts"), "cannot join the network namespace /proc/self/ns/uts: it is none"),
        (namespaces(network="/dev/null"), "cannot join the network namespace /dev/null: it is none"),
        (namespaces(network="/"), "cannot join the network namespace /: it is none"),
        (namespaces(ipc="/proc/self/ns/pid"), "cannot join the ipc namespace /proc/self/ns/pid: it is none"),
        (namespaces(network="/proc/self/ns/net"), "asks for the host's own network, which a VM cannot have"),
        ([*namespaces(), {"type": "user"}], "root of its own VM"),
        *(
            (
                namespaces(**{kind: f"/proc/self/ns/{name}"}),
                f"names {kind} of another container or of the host",
            )
            for kind, name in [("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("mount", "mnt"), ("cgroup", "cgroup")]
        ),
        *(
            ([entry for entry in namespaces() if entry["type"] != kind], f"asks for the host's own {kind}")
            for kind in ("pid", "ipc", "mount", "network")
        ),
    ],
)
def test_a_namespace_that_a_vm_cannot_have_is_refused(bundle, entries, words):
    with pytest.raises(runx.Error, match=words):
        folder = bundle({**config("true"), "linux": {"namespaces": entries}})
        runx.join_pod(runx.Config(folder), folder)


def test_the_hosts_uts_namespace_gives_its_hostname(bundle):
    entries = [entry for entry in namespaces() if entry["type"] not in ("uts", "cgroup")]
    spec = {**config("true"), "linux": {"namespaces": [*entries, {"type": "time"}]}}
    text = runx.guest_config(runx.Config(bundle(spec)), "{}", {})
    assert f"\0hostname\0{os.uname().nodename}\0".encode() in text
    with pytest.raises(runx.Error, match="need a uts namespace"):
        runx.Config(bundle({**spec, "hostname": "x"}))


# ---- JSON


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100000, "nested too deeply"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested too deeply at .a.a.a"),
        ('{"process": {"args": ["x", "\\ud800"]}}', r"process.args\[1\] holds a NUL or half a character"),
        ('{"root": {"path": "a\\u0000b"}}', "root.path holds a NUL"),
        ('{"process": {"\\udc00": 1}}', "a name in process holds a NUL"),
        ('{"\\u0000": 1}', "a name in it holds a NUL"),
        ('{"annotations": {"a": 1e999}}', "1e999 is no number that JSON has"),
        ('{"annotations": {"a": -Infinity}}', "-Infinity is no number that JSON has"),
        ('{"annotations": {"a": NaN}}', "NaN is no number that JSON has"),
        ('{"a": ' + "9" * 5000 + "}", "is no number that JSON has"),
        (
            '{"ociVersion": "1.0.' + "0" * 5000 + '", "root": {"path": "rootfs"}}',
            'ociVersion "1.0.000.* is not supported',
        ),
        ('{"annotations": {"a": 1}}', "annotations.a must be a JSON string"),
        ('{"process": [1]}', "process must be a JSON object"),
        (" " * ((16 << 20) + 1), "it is larger than 16 MiB"),
    ],
    ids=lambda text: text[:30],
)
def test_json_that_cannot_be_read_is_one_sentence(bundle, tmp_path, text, words):
    bundle(config("true"))
    (tmp_path / "config.json").write_text(text)
    log = tmp_path / "log"
    result = call(*RUNX, "--log", str(log), "--log-format=json", "create", "--bundle", str(tmp_path), "x")
    assert json.loads(log.read_text())["msg"] == check_refused(result, words)


def test_an_exception_of_ours_is_one_sentence_too(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RecursionError("too deep\nby far")

    monkeypatch.setitem(runx.COMMANDS, "features", (fail, set(), set(), 0))
    log = tmp_path / "log"
    assert runx.main(["--log", str(log), "--debug", "features"]) == 1
    assert capsys.readouterr().err == "runX: internal error: RecursionError('too deep\\nby far')\n"
    assert "Traceback" in log.read_text() and log.read_text().count("level=error") == 1


def test_paths_that_are_no_text_are_refused(tmp_path):
    check_refused(
        call(*RUNX, "--root", str(tmp_path / "\udcff"), "create", "--bundle", str(tmp_path), "x"),
        "^the paths of bundle and root must be UTF-8: ",
    )


# ---- the VM


def machine_config(vm=None, annotations=None, env=()):
    spec = config("true", env=["PATH=/bin", *env])
    spec["annotations"] = {f"org.runx.{key}": value for key, value in (annotations or {}).items()}
    if vm is not None:
        spec["vm"] = vm
    return spec


@pytest.mark.parametrize("spelling", ["hwConfig", "hwconfig"])
def test_the_hardware_of_a_vm(bundle, spelling):
    hardware = {
        "deviceTree": "/boot/passthrough.dtb", "vcpus": 2, "memory": 1 << 28, "dtdevs": ["/axi/uart@0", "/axi/can@1"],
        "iomems": [{"firstGFN": 0x10, "firstMFN": 0xFF000, "nrMFNs": 16}, {"firstMFN": 1, "nrMFNs": 1}],
        "irqs": [54, 0x60],
    }  # fmt: skip
    parsed = runx.Config(bundle(machine_config({spelling: hardware, "kernel": {"path": ""}})))
    assert (parsed.resources.mebibytes(0), parsed.resources.vcpus(0), parsed.machine.kernel) == (256, 2, None)
    assert runx.xl_config(parsed.machine.options).splitlines() == [
        'device_tree = "/boot/passthrough.dtb"', 'dtdev = [ "/axi/uart@0", "/axi/can@1" ]',
        'iomem = [ "ff000,10@10", "1,1" ]', 'irqs = [ "54", "96" ]',
    ]  # fmt: skip


def test_empty_strings_in_vm_are_absent(bundle):
    vm = {
        "hypervisor": {"path": "", "parameters": []}, "kernel": {"path": "", "parameters": None, "initrd": ""},
        "image": {"path": "", "format": ""}, "hwConfig": {"deviceTree": "", "memory": 0, "irqs": None},
    }  # fmt: skip
    machine = runx.Config(bundle(machine_config(vm))).machine
    assert machine.__dict__ == runx.Config(bundle(machine_config())).machine.__dict__


def test_a_kernel_of_its_own(bundle, tmp_path, host_config):
    host_config(json.dumps({"annotations": list(runx.ANNOTATIONS)}))
    (tmp_path / "vmlinuz").touch()
    env = ["RUNX_KERNEL=/boot/kernel", "RUNX_RAMDISK="]
    assert runx.Config(bundle(machine_config(env=env))).machine.kernel == ("/boot/kernel", True)
    annotations = {"kernel": "/k", "ramdisk": "/r"}
    machine = runx.Config(bundle(machine_config(annotations=annotations, env=env))).machine
    assert (machine.kernel, machine.ramdisk, machine.own_init) == (("/k", True), ("/r", True), True)
    assert machine.rootfs == "none"
    machine = runx.Config(bundle(machine_config(annotations={**annotations, "rootfs": "9p"}))).machine
    assert machine.rootfs == "9p"
    vm = {"kernel": {"path": str(tmp_path / "vmlinuz"), "parameters": ["a=b", "c=d e"]}}
    machine = runx.Config(bundle(machine_config(vm, {"cmdline": "x y"}, env))).machine
    assert machine.kernel == (str(tmp_path / "vmlinuz"), False)
    assert not machine.own_init
    assert runx.command_line(machine) == runx.KERNEL_PARAMETERS + ' x y a=b "c=d e"'


def test_an_image_of_vm_stands_for_root_path(bundle, tmp_path):
    (tmp_path / "image").write_bytes(bytes(4096))
    spec = {**config("true"), "vm": {"image": {"path": str(tmp_path / "image"), "format": "raw"}}}
    for root in ({}, {"path": ""}, None):
        assert runx.Config(bundle({**spec, "root": root})).rootfs == str(tmp_path / "image")
    with pytest.raises(runx.Error, match="config.json: root.path must be a JSON string"):
        runx.Config(bundle({**spec, "root": {"path": 1}}))


@pytest.mark.parametrize(
    "vm, annotations, words",
    [
        ({"kernel": {"path": "/no/such"}}, {}, "cannot boot /no/such: there is no such file"),
        ({"kernel": {"initrd": "/bin/sh"}}, {}, "needs its own kernel too"),
        ({"kernel": {"parameters": ['a="b"']}}, {}, "cannot hold quotes"),
        (
            {"image": {"path": "/i", "format": "vmdk"}},
            {},
            "vm.image.format must be one of raw, qcow2, vhd, not vmdk",
        ),
        (
            {"hypervisor": {"path": "/usr/bin/qemu"}},
            {},
            "vm.hypervisor.path cannot be /usr/bin/qemu: runX drives Xen with xl",
        ),
        ({"hypervisor": {"parameters": ["nonsense"]}}, {}, "must hold settings of xl.cfg"),
        ({"hypervisor": {"parameters": ['a="b"\nc="d"']}}, {}, "must hold settings of xl.cfg"),
        ({"hwConfig": {"irqs": [-1]}}, {}, r"vm.hwConfig.irqs\[0\] must not be below 0"),
        ({"hwConfig": {"iomems": [{"firstMFN": 1}]}}, {}, r"vm.hwConfig.iomems\[0\].nrMFNs is missing"),
        (None, {"rootfs": "none"}, "org.runx.rootfs must be one of 9p, ramdisk, block, auto, not none"),
        (None, {"rootfs": "nfs"}, "org.runx.rootfs must be one of 9p, ramdisk, block, auto, not nfs"),
        (
            None,
            {"rootfs": "auto", "kernel": "/k", "ramdisk": "/r"},
            "org.runx.rootfs must be one of 9p, none, not auto",
        ),
        (None, {"type": "hvm"}, "the annotation org.runx.type must be one of pv, pvh, not hvm"),
        (None, {"memory": "64m"}, "org.runx.memory must be a number"),
        (None, {"xlconf": "/etc/hostname"}, "is in none of the folders"),
    ],
)
def test_a_vm_that_cannot_be_is_refused(bundle, vm, annotations, words, host_config):
    host_config(json.dumps({"annotations": list(runx.ANNOTATIONS)}))
    with pytest.raises(runx.Error, match=words):
        runx.Config(bundle(machine_config(vm, annotations)))


def test_xlconf_is_taken_only_from_where_root_alone_writes(bundle, tmp_path, host_config):
    folder = tmp_path / "xl"
    folder.mkdir(mode=0o755)
    (folder / "extra").write_text("nomigrate=1\n")
    spec = machine_config(env=[f"XLCONF={folder}/extra"])
    assert runx.Config(bundle(spec)).machine.lines == []
    host_config('{"environment": ["XLCONF"]}')
    with pytest.raises(runx.Error, match="is in none of the folders that .*host.json allows: /etc/runX/xl"):
        runx.Config(bundle(spec))
    host_config(json.dumps({"xlconf": [str(folder)], "environment": ["XLCONF"]}))
    assert runx.Config(bundle(spec)).machine.lines == ["nomigrate=1\n"]
    (tmp_path / "other").write_text("x=1\n")
    (folder / "link").symlink_to("../other")
    for name, reason in (("link", "in none of the folders"), ("../other", "in none of"), ("none", "cannot read")):
        with pytest.raises(runx.Error, match=reason):
            runx.Config(bundle(machine_config(env=[f"XLCONF={folder}/{name}"])))
    (folder / "extra").chmod(0o664)
    with pytest.raises(runx.Error, match="others than root may write"):
        runx.Config(bundle(spec))
    (folder / "extra").chmod(0o600)
    folder.chmod(0o777)
    with pytest.raises(runx.Error, match="others than root may write"):
        runx.Config(bundle(spec))


def test_the_modules_of_a_kernel_of_its_own(tmp_path):
    import lzma

    assert runx.kernel_modules(str(tmp_path), "/boot/vmlinuz-6.1.0", ("9pnet_xen", "9p")) == []
    modules = tmp_path / "lib/modules/6.1.0/kernel"
    modules.mkdir(parents=True)
    (modules.parent / "modules.dep").write_text(
        "kernel/9p.ko: kernel/9pnet.ko kernel/netfs.ko\nkernel/netfs.ko:\nkernel/9pnet.ko:\n"
        "kernel/9pnet_xen.ko.xz: kernel/9pnet.ko\nkernel/other.ko: kernel/9p.ko\n"
    )
    for name in ("9p.ko", "9pnet.ko", "netfs.ko"):
        (modules / name).write_text(name)
    (modules / "9pnet_xen.ko.xz").write_bytes(lzma.compress(b"xen"))
    expected = [("9pnet.ko", b"9pnet.ko"), ("9pnet_xen.ko", b"xen"), ("netfs.ko", b"netfs.ko"), ("9p.ko", b"9p.ko")]
    assert runx.kernel_modules(str(tmp_path), "/vmlinux", ("9pnet_xen", "9p")) == expected
    (tmp_path / "lib/modules/6.1").mkdir()
    assert runx.kernel_modules(str(tmp_path), "/boot/vmlinuz-6.1.0", ("9pnet_xen", "9p")) == expected
    assert runx.kernel_modules(str(tmp_path), "/vmlinux", ("9pnet_xen", "9p")) == []
    (modules / "9p.ko").unlink()
    (modules / "9p.ko").symlink_to("/../../../../../../etc/passwd")
    with pytest.raises(runx.Error, match="cannot read /lib/modules/6.1.0/kernel/9p.ko of the container"):
        runx.kernel_modules(str(tmp_path), "/boot/vmlinuz-6.1.0", ("9pnet_xen", "9p"))


# ---- seccomp


def filtered(program, names, name, *args, architecture=0xC000003E):
    """What a program of compile_seccomp() returns for a system call: a BPF machine.  names: the calls' numbers."""
    data = struct.pack("<iIQ6Q", names.get(name, name), architecture, 0, *args, *[0] * (6 - len(args)))
    at, accumulator = 0, 0
    highest = max(names.values())
    while True:
        code, jump_true, jump_false, operand = program[at]
        at += 1
        if isinstance(operand, str):
            operand = highest if operand.lstrip("-") == "max" else names.get(operand.lstrip("-"), 0xFFFFFFFF)
        if code == runx.LOAD:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif code == runx.AND:
            accumulator &= operand
        elif code == runx.JUMP:
            at += operand
        elif code == runx.RETURN:
            return operand
        else:
            holds = {
                runx.IF_EQUAL: accumulator == operand, runx.IF_GREATER: accumulator > operand,
                runx.IF_NOT_LESS: accumulator >= operand,
            }[code]  # fmt: skip
            at += jump_true if holds else jump_false


ALLOW, KILL, PERMISSION, NOT_THERE = 0x7FFF0000, 0, 0x50001, 0x50026
NAMES = {"read": 0, "write": 1, "clone": 56, "personality": 135}


def seccomp(*syscalls, **other):
    spec = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": list(syscalls), **other}
    return runx.compile_seccomp(spec, "x86_64")


def rule(*names, action="SCMP_ACT_ALLOW", **other):
    return {"names": list(names), "action": action, **other}


def test_a_seccomp_filter_names_what_is_allowed():
    flags, program = seccomp(rule("read", "clone", "unknown_call"), rule("write", action="SCMP_ACT_KILL_PROCESS"))
    assert flags == 0
    calls = [("read", ALLOW), ("clone", ALLOW), ("write", 0x80000000), ("personality", NOT_THERE), (2, PERMISSION)]
    names = {name: NAMES[name] for name in ("read", "write", "clone")}
    for name, result in calls:
        assert filtered(program, names, NAMES.get(name, name)) == result, name
    assert filtered(program, names, "read", architecture=0x40000003) == KILL
    _, program = seccomp(rule("read"), architectures=["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_ARM"])
    assert filtered(program, names, "read", architecture=0x40000003) == ALLOW
    assert filtered(program, names, "write", architecture=0x40000003) == PERMISSION


@pytest.mark.parametrize("action", ["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW"])
@pytest.mark.parametrize("name", ["SCMP_ARCH_X86-64", "X86_64", ""])
def test_an_unknown_architecture_of_seccomp_is_refused(action, name):
    with pytest.raises(runx.Error, match=r"linux\.seccomp\.architectures\[1\] must be one of SCMP_ARCH_X86, "):
        seccomp(defaultAction=action, architectures=["SCMP_ARCH_S390X", name])


@pytest.mark.parametrize("spec", [{"defaultAction": ""}, {"architectures": ["SCMP_ARCH_X86"], "syscalls": []}])
def test_seccomp_without_an_action_and_without_system_calls_filters_nothing(spec):
    assert runx.compile_seccomp(spec, "x86_64") is None


@pytest.mark.parametrize("operator", ["NE", "LT", "LE", "EQ", "GE", "GT"])
def test_seccomp_compares_64_bits(operator):
    compare = {"NE": "__ne__", "LT": "__lt__", "LE": "__le__", "EQ": "__eq__", "GE": "__ge__", "GT": "__gt__"}[operator]
    values = [0, 1, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, (2 << 32) - 1, 2 << 32, (1 << 64) - 1]
    for value in values:
        arg = {"index": 2, "value": value, "op": f"SCMP_CMP_{operator}"}
        _, program = seccomp(rule("clone", args=[arg]))
        for given in values:
            expected = ALLOW if getattr(given, compare)(value) else PERMISSION
            assert filtered(program, NAMES, "clone", 7, 7, given) == expected, (value, given)


def arg(index, value, operator="EQ", second=0):
    return {"index": index, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{operator}"}


def test_all_conditions_of_seccomp_must_hold():
    _, program = seccomp(rule("clone", args=[arg(0, 1), arg(1, 2)]))
    results = [filtered(program, NAMES, "clone", *args) for args in ((1, 2), (1, 3), (0, 2))]
    assert results == [ALLOW, PERMISSION, PERMISSION]


def test_one_of_seccomps_conditions_on_the_same_argument_must_hold():
    _, program = seccomp(rule("personality", args=[arg(0, 0), arg(0, 8)]))
    assert [filtered(program, NAMES, "personality", value) for value in (0, 8, 9)] == [ALLOW, ALLOW, PERMISSION]


def test_a_mask_of_seccomp_has_64_bits():
    _, program = seccomp(rule("clone", args=[arg(0, 0xF0000000F, "MASKED_EQ", 0x300000005)]))
    results = [filtered(program, NAMES, "clone", value) for value in (0x300000005, 0x7F300000FF5, 0x300000004, 5)]
    assert results == [ALLOW, ALLOW, PERMISSION, PERMISSION]


def test_a_rule_without_conditions_stands_alone():
    for rules in ([rule("clone", args=[arg(0, 1)]), rule("clone")], [rule("clone"), rule("clone", args=[arg(0, 1)])]):
        assert filtered(seccomp(*rules)[1], NAMES, "clone", 9) == ALLOW


def test_the_first_rule_without_conditions_counts():
    """As libseccomp has it."""
    other = {"action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    for rules, result in (([{}, other], ALLOW), ([other, {}], NOT_THERE)):
        assert filtered(seccomp(*[rule("clone", **each) for each in rules])[1], NAMES, "clone") == result


def test_a_system_call_may_have_several_actions():
    rules = [rule("clone", args=[arg(0, 1)]), rule("clone", args=[arg(0, 2)], action="SCMP_ACT_ERRNO", errnoRet=38)]
    _, program = seccomp(*rules)
    assert [filtered(program, NAMES, "clone", value) for value in (1, 2, 3)] == [ALLOW, NOT_THERE, PERMISSION]


def test_a_rule_that_says_what_holds_anyway_only_tells_what_is_newer():
    _, program = seccomp({"names": ["read", "clone"], "action": "SCMP_ACT_ERRNO"}, rule("write", "clone"))
    named = {instruction[3]: instruction for instruction in program if isinstance(instruction[3], str)}
    assert list(named) == ["max", "clone", "read", "write"] and named["read"] == (runx.IF_EQUAL, 0, 0, "read")
    results = [filtered(program, NAMES, name) for name in ("read", "write", "clone", "personality", 136)]
    assert results == [PERMISSION, ALLOW, ALLOW, PERMISSION, NOT_THERE]
    same = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("read", "write")]}
    assert runx.compile_seccomp(same, "x86_64") is None


def test_more_rules_than_a_branch_can_pass_over():
    _, program = seccomp(rule("clone", args=[arg(0, value) for value in range(100)]), rule("write"))
    assert filtered(program, NAMES, "clone", 99) == ALLOW and filtered(program, NAMES, "clone", 100) == PERMISSION
    assert filtered(program, NAMES, "write") == ALLOW


def test_a_seccomp_filter_that_allows_by_default():
    spec = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("clone", action="SCMP_ACT_ERRNO", errnoRet=38)]}
    _, program = runx.compile_seccomp({**spec, "flags": ["SECCOMP_FILTER_FLAG_LOG"]}, "aarch64")
    assert filtered(program, {"clone": 220}, 220, architecture=0xC00000B7) == NOT_THERE
    assert filtered(program, {"clone": 220}, 500, architecture=0xC00000B7) == ALLOW
    assert runx.compile_seccomp({"defaultAction": "SCMP_ACT_ALLOW"}, "x86_64") is None


@pytest.mark.parametrize("default, passed", [("SCMP_ACT_ALLOW", ALLOW), ("SCMP_ACT_LOG", 0x7FFC0000)])
def test_what_seccomp_forbids_cannot_be_called_by_x32(default, passed):
    """By the same kernel and under the same architecture, with another number: some have it, and ours says the same."""
    _, program = seccomp(rule("clone", action="SCMP_ACT_KILL"), defaultAction=default)
    assert filtered(program, NAMES, "clone") == KILL and filtered(program, NAMES, "write") == passed
    assert filtered(program, NAMES, 1 << 30 | NAMES["clone"]) == filtered(program, NAMES, 1 << 30) == NOT_THERE
    assert filtered(program, NAMES, -1) == passed  # which is a tracer's, for a call that it has left out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "linux.seccomp.defaultAction must be one of .*, not SCMP_ACT_NOTIFY"),
        ({"defaultErrnoRet": 1 << 16}, "defaultErrnoRet must be"),
        ({"flags": ["NEW"]}, r"flags\[0\] must be one of SECCOMP_FILTER_FLAG_TSYNC, .*, not NEW"),
        (
            {"listenerPath": "/run/agent", "syscalls": [rule("mkdir", action="SCMP_ACT_NOTIFY")]},
            r"syscalls\[0\].action must be one of .*, not SCMP_ACT_NOTIFY",
        ),
        ({"syscalls": [rule("max value")]}, r"syscalls\[0\].names must hold names of system calls, not max value"),
        (
            {"syscalls": [rule("read", args=[{"index": 6, "op": "SCMP_CMP_EQ"}])]},
            r"syscalls\[0\].args\[0\].index must be from 0 to 5",
        ),
        (
            {"syscalls": [rule("read", args=[{"index": 0, "op": "SCMP_CMP_IN"}])]},
            r"args\[0\].op must be one of SCMP_CMP_NE, .*, not SCMP_CMP_IN",
        ),
        (
            {"syscalls": [rule("read", args=[{"index": 0, "op": "EQ"}])]},
            r"args\[0\].op must be one of SCMP_CMP_NE, .*, not EQ",
        ),
        ({"syscalls": [rule(f"call{n}") for n in range(3000)]}, "has too many rules"),
    ],
)
def test_a_seccomp_filter_that_cannot_be_is_refused(change, words):
    with pytest.raises(runx.Error, match=words):
        seccomp(**change)


def test_the_listener_of_a_filter_that_notifies_nobody_is_ignored():
    assert seccomp(rule("read"), listenerPath="/run/agent", listenerMetadata="x") == seccomp(rule("read"))


def test_seccomp_on_another_machine_is_refused():
    with pytest.raises(runx.Error, match="cannot be applied on mips"):
        runx.compile_seccomp({"defaultAction": "SCMP_ACT_ERRNO"}, "mips")


# ---- mounts


@pytest.mark.parametrize("destination", ["/", "", "//", "/.", "/./", "a/..", "/..", ".", "/a/../"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_a_mount_over_the_rootfs_is_refused(bundle, tmp_path, destination, kind):
    with pytest.raises(runx.Error, match="over the rootfs at .*: name it as root.path"):
        mount_of(bundle, destination=destination, type=kind, source=str(tmp_path))


def mount_of(bundle, **mount):
    spec = config("true")
    spec["mounts"] = [{"destination": "/t", **mount}]
    return runx.Config(bundle(spec)).mounts[0]


def test_what_names_files_of_dom0_is_mounted_there(bundle, tmp_path):
    overlay = mount_of(bundle, type="overlay", source="overlay", options=["lowerdir=/a", "upperdir=/b", "nosuid"])
    assert overlay.on_host() and (overlay.data, overlay.flags) == ("lowerdir=/a,upperdir=/b", runx.MS_NOSUID)
    mount, options = runx.guest_mount(overlay)
    assert mount == ("mount", "mounts/0", "/t", "", runx.MS_BIND, "")
    assert options[4] == runx.MS_BIND | runx.MS_REMOUNT | runx.MS_NOSUID
    plain = mount_of(bundle, type="overlay", source="overlay", options=["lowerdir=/a"])
    assert [*runx.guest_mount(plain)] == [mount]
    assert not mount_of(bundle, type="cgroup", source="cgroup", options=["ro", "name=systemd"]).data


@pytest.mark.parametrize(
    "options, flags",
    [(["bind"], 2 | 8), (["rbind", "rslave"], 2 | 8), (["bind", "ro"], 1), (["bind", "nodev"], 4), (["rw", "rbind"], 0),
     (["bind", "exec"], 0), (["bind", "async"], 0), (["rbind", "rro"], 1 | 2 | 8),
     (["rbind", "rsuid", "rnodev"], 4 | 8)],
)  # fmt: skip
def test_a_bind_mount_without_flags_has_those_of_its_source(bundle, tmp_path, monkeypatch, options, flags):
    """As bind mounts on one kernel do, where nosuid and noexec are the mount's."""
    statvfs = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*statvfs[:8], 2 | 8 | 1024, *statvfs[9:]]))
    mount = mount_of(bundle, source=str(tmp_path), options=options)
    changes = [words for words in runx.guest_mount(mount) if words[0] == "mount"][1:]
    expected = ("mount", "mounts/0", "/t", "", runx.MS_BIND | runx.MS_REMOUNT | flags, "")
    assert changes == ([expected] if flags else [])


def test_a_file_system_of_the_guests_can_be_mounted_again_with_other_options(bundle, tmp_path):
    mount = mount_of(bundle, type="tmpfs", source="x", options=["remount", "nodev", "size=2m"])
    assert [*runx.guest_mount(mount)] == [("mount", "", "/t", "", runx.MS_REMOUNT | 4, "size=2m")]


@pytest.mark.parametrize("source", ["none", "/proc"])
def test_what_is_mounted_again_is_what_is_there_whatever_its_source_says(bundle, source):
    mount = mount_of(bundle, type="none", source=source, options=["remount", "bind", "ro"])
    assert not mount.on_host()
    flags = runx.MS_REMOUNT | runx.MS_BIND | runx.MS_RDONLY
    assert [*runx.guest_mount(mount)] == [("mount", "", "/t", "", flags, "")]


def test_a_tmpfs_that_begins_with_what_is_below(bundle):
    mount = mount_of(bundle, type="tmpfs", source="tmpfs", options=["tmpcopyup", "ro", "size=1m"])
    assert [*runx.guest_mount(mount)] == [("copy_up", "tmpfs", "/t", "tmpfs", 0, "size=1m")]


def test_memory_that_is_read_only_is_so_when_all_is_made_in_it(bundle):
    spec = config("sh", cwd="/dev/cwd", terminal=True)
    spec["root"]["readonly"] = True
    spec["mounts"] = [
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["rro", "ro", "nosuid"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["ro"]},
    ]
    spec["linux"] = {"devices": [{"path": "/dev/pipe", "type": "p"}], "readonlyPaths": ["/dev/cwd"]}
    text = runx.guest_config(runx.Config(bundle(spec)), "{}", {}).replace(b"\0", b" ").decode()
    seal = f"mount  /dev  {runx.MS_REMOUNT | runx.MS_BIND | runx.MS_RDONLY | runx.MS_NOSUID}  "
    made = [f"mount tmpfs /dev tmpfs {runx.MS_NOSUID}  ", "node /dev/null ", "mount devpts /dev/pts devpts 1  ",
            "node /dev/pipe ", "terminal ", "cwd /dev/cwd ", seal, "readonly /dev/cwd ", "mount  /  "]  # fmt: skip
    places = [text.index(record) for record in made]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "mounts, found",
    [
        ([], ["/dev/null", "mount", "/dev/f", "/dev/tty"]),  # in the image's own folder
        ([{"destination": "/dev/", "type": "tmpfs"}], ["mount", "mount", "/dev/null", "/dev/f", "/dev/tty"]),
        ([{"destination": "/dev", "type": "ramfs"}], ["mount", "mount", "/dev/null", "/dev/f", "/dev/tty"]),
        ([{"destination": "/dev", "type": "bind", "source": "/"}], ["mount", "mount"]),  # those are dom0's
    ],
)
def test_the_default_devices_are_there_whatever_is_mounted(bundle, mounts, found):
    """And config.json's own in place of them."""
    spec = config("true")
    spec["mounts"] = [{"destination": "/proc", "type": "proc"}, *mounts]
    own = {"type": "c", "major": 5, "minor": 0}
    paths = ["/dev/f", "/dev/tty", "/dev/ptmx"]
    spec["linux"] = {"devices": [{"path": path, "fileMode": 0o600, **own} for path in paths]}
    words = guest_words(runx.Config(bundle(spec)))
    assert [word for word in words if word in ("mount", "/dev/null", "/dev/f", "/dev/tty")] == found
    if "/dev/tty" in words:
        assert words[words.index("/dev/tty") + 1] == str(stat.S_IFCHR | 0o600)
        assert words[words.index("/dev/ptmx") - 1] == "pts/ptmx" and words.count("/dev/ptmx") == 1


def test_the_last_of_two_variables_of_one_name_counts(bundle):
    spec = config("sh", env=["A=1", "B=2", "A=3", "HOME="])
    words = guest_words(runx.Config(bundle(spec)))
    assert words[words.index("env") :] == ["env", "A=3", "env", "B=2", "env", "HOME="]


@pytest.mark.parametrize("env", [["A="] * 630_000, [f"{number}={'x' * (1 << 20)}" for number in range(6)]])
def test_words_that_no_execve_takes_are_refused_before_they_are_read(bundle, env):
    """Linux counts a pointer for each: an image's variables of a byte or two would take hundreds of MiB of dom0's."""
    runx.Config(bundle(config("true", env=env[: len(env) - 1 - len(env) // 10])))
    with pytest.raises(runx.Error, match='^unable to start container process: exec: "true": argument list too long$'):
        runx.Config(bundle(config("true", env=env)))


@pytest.mark.parametrize("option, flags", [("rshared", 1 << 20 | 16384), ("slave", 1 << 19), ("rprivate", None)])
def test_propagation_of_a_mount(bundle, tmp_path, option, flags):
    mount = mount_of(bundle, source=str(tmp_path), options=["bind", option])
    words = [*runx.guest_mount(mount)]
    assert words[1:] == ([("propagation", "/t", flags)] if flags else [])


def test_a_group_that_is_there_twice_counts_once(bundle):
    spec = config("true", user={"uid": 0, "gid": 0, "additionalGids": [6, 5, 6]})
    assert runx.Config(bundle(spec)).process.groups == [6, 5]


def test_id_mapped_mounts_are_refused(bundle, tmp_path):
    mappings = [{"containerID": 0, "hostID": 1000, "size": 1}]
    with pytest.raises(runx.Error, match="ID-mapped mounts are not supported"):
        mount_of(bundle, source=str(tmp_path), options=["bind"], uidMappings=mappings)


# ---- the command line


def parse(*words):
    options = {}
    command, *words = runx.parse_options("", words, options)
    return options, command, *parse_options(command, words)


def parse_options(command, words):
    options = {}
    arguments = runx.parse_options(command, words, options)
    return options, arguments


def test_what_containerd_writes():
    options, command, flags, arguments = parse(
        "--root", "/run/containerd/runc/default", "--log", "/b/log.json", "--log-format", "json", "--systemd-cgroup",
        "create", "--bundle", "/b", "--pid-file", "/b/init.pid", "demo",
    )  # fmt: skip
    assert options["root"] == "/run/containerd/runc/default" and options["systemd-cgroup"] is True
    assert (command, flags, arguments) == ("create", {"bundle": "/b", "pid-file": "/b/init.pid"}, ["demo"])


def test_what_podman_writes():
    options, command, flags, arguments = parse(
        "--log-format=json",
        "--log=/b/oci-log",
        "--rootless=false",
        "create",
        "--bundle=/b",
        "--pid-file=/p",
        "-b",
        "/c",
        "x",
    )
    assert (options["log"], options["rootless"]) == ("/b/oci-log", "false")
    assert (command, flags["bundle"], arguments) == ("create", "/c", ["x"])


def test_options_may_follow_the_id():
    assert parse("kill", "--all", "x", "9")[2:] == ({"all": True}, ["x", "9"])
    assert parse("delete", "x", "-f")[2:] == ({"force": True}, ["x"])
    assert parse("list", "-f", "json")[2] == {"format": "json"}


def test_unknown_options_are_refused():
    with pytest.raises(runx.Error, match="create has no option --bogus"):
        parse("create", "--bogus", "x")
    with pytest.raises(runx.Error, match="create has no option --detach"):  # of `run` alone
        parse("create", "--detach", "x")
    for unknown in (["--new"], ["--new=1"], ["-new", "value"], ["-x"]):
        with pytest.raises(runx.Error, match=f"there is no option {unknown[0]} before the command"):
            parse("--root", "/r", *unknown, "state", "x")


@pytest.mark.parametrize(
    "text, number",
    [
        ("9", 9),
        ("KILL", 9),
        ("SIGTERM", 15),
        ("winch", 28),
        ("RTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("0", 0),
    ],
)
def test_signals_by_name_and_number(text, number):
    assert runx.parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "\u00b2", "\u0661", "65", "-1", "NOPE", "RTMIN+40", "RTMIN+x", "9" * 5000])
def test_unknown_signals_are_refused(text):
    with pytest.raises(runx.Error, match="unknown signal"):
        runx.parse_signal(text)


@pytest.mark.parametrize(
    "words",
    [["--version"], ["-v"], ["features"], ["--help"], ["-h"], ["help"], [], ["create", "--help"], ["kill", "x", "-h"],
     ["--help", "create"], ["list", "--help"], ["--debug=false", "--version"], ["ps", "--help"], ["exec", "--help"]],
)  # fmt: skip
def test_what_needs_no_xen(words):
    result = call(*RUNX, *words)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--bogus", "list"], "there is no option --bogus before the command: see runX --help"),
        (["--criu"], "option --criu needs a value"),
        (["restore", "x"], "runX does not support restore"),
        (["kill"], "a container ID is required as an argument"),
        (["update", "--resources", "nothing"], "a container ID is required as an argument"),
        (["create", "--bundle"], "option --bundle of create needs a value"),
        (["--log-format", "xml", "list"], "invalid log-format: xml"),
        (["list", "x"], "list takes no more than 0 arguments, and x is one more"),
        (["--root", "/etc/passwd", "list"], "cannot list the containers of /etc/passwd: Not a directory"),
        (["list", "--format", "xml"], "invalid format option xml: use table or json"),
        (["state", "x", "y"], "state takes no more than 1 arguments, and y is one more"),
        (["kill", "x", "9", "y"], "kill takes no more than 2 arguments, and y is one more"),
        (["--debug=maybe", "list"], "option --debug is true or false, not 'maybe'"),
        (["list", "--quiet=maybe"], "option --quiet is true or false, not 'maybe'"),
    ],
)
def test_a_wrong_call_is_refused_with_its_reason(words, sentence):
    assert check_refused(call(*RUNX, *words), "") == sentence


def test_an_unknown_command_has_runc_s_status():
    result = call(*RUNX, "bogus")
    assert (result.returncode, result.stderr) == (3, b"runX: unknown command 'bogus': see runX --help\n")


def test_an_error_is_the_logs_only_record(tmp_path):
    log = tmp_path / "log.json"
    result = call(*RUNX, "--root", str(tmp_path), "--log", str(log), "--log-format=json", "state", "x")
    record = json.loads(log.read_text())  # as Podman reads it: one JSON object
    assert record["level"] == "error" and record["msg"] == 'container "x" does not exist'
    assert result.stderr == b'runX: container "x" does not exist\n'
    assert record["time"].endswith("Z") and "T" in record["time"]


@pytest.mark.parametrize("container_id", ["a", "A.b_c-d+e", "0" * 64])
def test_ids(container_id):
    assert runx.Container("/r", container_id).folder == f"/r/{container_id}"


def test_an_empty_list(tmp_path):
    assert call(*RUNX, "--root", str(tmp_path), "list", "--format", "json").stdout == b"null\n"  # as runc's
    assert call(*RUNX, "--root", str(tmp_path), "list", "--quiet").stdout == b""
    for options in ([], ["--log-format", ""], ["--"]):
        result = call(*RUNX, "--root", str(tmp_path), *options, "list")
        heading = b"ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"  # as runc's
        assert (result.returncode, result.stdout, result.stderr) == (0, heading, b"")
    assert not os.listdir(tmp_path)


def test_features_are_what_the_specification_allows():
    features = json.loads(call(*RUNX, "features").stdout)
    runtime_spec.check_features(features)
    assert set(features["hooks"]) == runtime_spec.HOOKS
    assert "remount" in features["mountOptions"]
    linux = features["linux"]
    assert linux["cgroup"] == {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": False}
    assert [linux[key] for key in ("apparmor", "selinux", "intelRdt", "netDevices")] == [{"enabled": False}] * 4
    assert linux["mountExtensions"] == {"idmap": {"enabled": False}}
    assert features["potentiallyUnsafeConfigAnnotations"] == ["org.runx.", *runx.POD_MARKS]


@pytest.mark.parametrize("text, seconds", [("5s", 5), ("300ms", 0.3), ("1m30s", 90), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert runx.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0s", "-1s", "s", "1s x", "\u0661s", "9" * 400 + "h"])
def test_wrong_durations(text):
    with pytest.raises(runx.Error, match="--interval"):
        runx.parse_duration(text)


@pytest.mark.parametrize(
    "processors, memory, quota, vcpus, maxvcpus",
    [
        (2, 64, 6400000, 2, 0),
        (64, 64, 6400000, 8, 0),
        (64, 24, 6400000, 3, 0),
        (4, 256, 300000, 3, 4),
        (1, 64, 0, 1, 1),
    ],
)
def test_no_more_vcpus_than_the_host_and_the_memory_carry(
    bundle, monkeypatch, processors, memory, quota, vcpus, maxvcpus
):
    monkeypatch.setattr(runx, "host_processors", lambda: processors)
    spec = config("true")
    spec["annotations"] = {"org.runx.maxvcpus": "99"} if maxvcpus else {}
    spec["linux"] = {"resources": {"memory": {"limit": memory << 20}, "cpu": {"quota": quota}}}
    parsed = runx.Config(bundle(spec))
    runx.fit_vcpus(parsed)
    assert (parsed.resources.vcpus(1), parsed.machine.maxvcpus) == (vcpus, maxvcpus)
    assert runx.Resources(spec["linux"]["resources"], "x", parsed.base).vcpus(1) == vcpus


# ---- update


class Stored:
    """A container with a state and nothing else."""

    id = "x"

    def __init__(self, resources):
        self.state = runx.State(resources=resources, base=BASE, maxmem=256, maxvcpus=2)

    def save(self, **changes):
        self.state.__dict__.update(changes)


@pytest.fixture
def applied(monkeypatch):
    """What update applies to the VM: a list of (new, old) values."""
    applied = []
    monkeypatch.setattr(runx, "xl_info", lambda key: "credit2")
    monkeypatch.setattr(runx, "apply_values", lambda container, new, old, scheduler: applied.append((new, old)))
    return applied


def test_an_update_keeps_what_it_does_not_name(applied):
    container = Stored({"cpu": {"shares": 512}, "pids": {"limit": 7}, "devices": [{"allow": False}]})
    changes = {"memory": {"limit": 64 << 20, "swap": 1 << 30}, "pids": {"limit": 7}, "devices": [{"allow": False}]}
    changes["unified"] = {"memory.swap.max": "0"}  # as the kubelet asks for
    runx.update(container, changes)
    new, old = applied[0]
    assert (new["memory"], old["memory"], new["share"]) == (64, 128, (128, 0))
    assert container.state.resources["pids"] == {"limit": 7}
    runx.update(container, {"cpu": {"quota": 200000, "period": 0, "cpus": ""}, "blockIO": None, "memory": {}})
    assert (applied[1][0]["memory"], applied[1][0]["vcpus"]) == (64, 2)
    runx.update(container, {"cpu": {"quota": -1}, "memory": {"limit": -1}})
    new = applied[2][0]
    assert (new["memory"], new["vcpus"], new["share"]) == (256, 2, (128, 0))


def test_an_update_that_xen_refuses_is_undone(monkeypatch):
    applied = []

    def refuse(container, new, old, scheduler):
        applied.append((new["memory"], old["memory"]))
        if len(applied) == 1:
            raise runx.Error("no such processor")

    monkeypatch.setattr(runx, "apply_values", refuse)
    container = Stored({"memory": {"limit": 96 << 20}})
    with pytest.raises(runx.Error, match="no such processor"):
        runx.update(container, {"memory": {"limit": 64 << 20}})
    assert applied == [(64, 96), (96, 64)]
    assert container.state.resources == {"memory": {"limit": 96 << 20}}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pids": {"limit": 8}}, "pids.limit cannot change"),
        ({"cpu": {"mems": "0", "realtimeRuntime": 5}, "memory": {"limit": 1 << 20}}, "cpu.mems, cpu.realtimeRuntime"),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}, "hugepageLimits cannot change"),
        ({"unified": {"memory.high": "1"}}, "unified.memory.high cannot change"),
        ({"memory": {"limit": 257 << 20}}, "257 MiB of memory: its VM was made for 256 at most"),
        ({"cpu": {"quota": 200001}}, "3 vcpus: its VM was made for 2 at most"),
        ({"memory": {"limit": "much"}}, "limit must be a JSON integer"),
    ],
)
def test_an_update_that_is_not_possible_changes_nothing(applied, changes, words):
    container = Stored({"pids": {"limit": 7}})
    with pytest.raises(runx.Error, match=words):
        runx.update(container, changes)
    assert not applied and container.state.resources == {"pids": {"limit": 7}}


def test_the_options_of_update_are_fields_of_resources(tmp_path):
    words = ["--memory=64m", "--cpu-quota", "-1", "--cpuset-cpus=0-1", "--resources=", "id"]
    options, arguments = parse_options("update", words)
    assert arguments == ["id"]
    assert runx.read_update(options) == {"memory": {"limit": 64 << 20}, "cpu": {"quota": -1, "cpus": "0-1"}}
    with pytest.raises(runx.Error, match="--memory of update needs a number"):
        runx.read_update({"memory": "much"})
    document = {"memory": {"limit": 1}, "cpu": {"shares": 2}}
    (tmp_path / "resources").write_text(json.dumps(document))
    words = ["--memory=much", "--cpu-quota", "-1", "-r", str(tmp_path / "resources"), "id"]
    options, _ = parse_options("update", words)
    assert runx.read_update(options) == document  # as by runc, which takes these beside it:
    assert runx.read_update({**options, "mem-bw-schema": "x"}) == {**document, "intelRdt": {"memBwSchema": "x"}}
    (tmp_path / "resources").write_text("{")
    with pytest.raises(runx.Error, match="cannot read the resources"):
        runx.read_update({"resources": str(tmp_path / "resources")})


def test_what_follows_the_id_of_ps_is_for_ps():
    assert parse_options("ps", ["--format", "json", "id"]) == ({"format": "json"}, ["id"])
    assert parse_options("ps", ["id", "-o", "pid"]) == ({}, ["id", "-o", "pid"])


def test_what_follows_the_id_of_exec_is_the_command_and_its_own():
    options, arguments = parse_options("exec", ["-t", "--env=A=1", "-e", "B=-d", "id", "ls", "-d", "--", "--env", "C"])
    assert options == {"tty": True, "env": ["A=1", "B=-d"]}
    assert arguments == ["id", "ls", "-d", "--", "--env", "C"]


# ---- process and linux


def test_capabilities_are_a_bit_each():
    spec = {"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE", "CAP_NEW"], "permitted": ["CAP_KILL", "CAP_NEW"]}
    spec = runx.Section(spec, "config.json: process.capabilities")
    sets = runx.parse_capabilities(spec)
    assert sets == {"bounding": 1 | 1 << 40, "effective": 0, "inheritable": 0, "permitted": 1 << 5, "ambient": 0}
    assert spec.warnings == ["unknown capabilities are left out: CAP_NEW"]
    spec = runx.Section({"bounding": ["SYS_ADMIN", "cap_kill", "CAP_"]}, "config.json: process.capabilities")
    assert runx.parse_capabilities(spec)["bounding"] == 0  # as under runc
    assert spec.warnings == ["unknown capabilities are left out: CAP_, SYS_ADMIN, cap_kill"]


@pytest.mark.parametrize(
    "lacking, left_out",
    [
        (("inheritable",), "ambient CAP_CHOWN CAP_KILL"),
        (("permitted",), "effective CAP_CHOWN CAP_KILL, ambient CAP_CHOWN CAP_KILL"),
        (("bounding",), "inheritable CAP_CHOWN CAP_KILL, ambient CAP_CHOWN CAP_KILL"),
        (("ambient", "effective"), ""),
    ],
)
def test_capabilities_that_cannot_be_granted_are_left_out(lacking, left_out):
    names = [name for name in runx.CAPABILITY_SETS if name not in lacking]
    spec = runx.Section({name: ["CAP_KILL", "CAP_CHOWN"] for name in names}, "config.json: process.capabilities")
    sets = runx.parse_capabilities(spec)
    both = 1 << 5 | 1
    without = {*lacking, *(words.split()[0] for words in left_out.split(", ") if words)}
    assert sets == {name: 0 if name in without else both for name in runx.CAPABILITY_SETS}
    assert [warning.split("process.capabilities: ")[1] for warning in spec.warnings] == ([left_out] if left_out else [])


@pytest.mark.parametrize(
    "section, change, words",
    [
        (
            "process",
            {"rlimits": [{"type": "RLIMIT_NEW", "soft": 1, "hard": 1}]},
            r"rlimits\[0\].type must be one of RLIMIT_CPU, .*, not RLIMIT_NEW",
        ),
        (
            "process",
            {"rlimits": [{"type": "NOFILE", "soft": 1, "hard": 1}]},
            r"rlimits\[0\].type must be one of .*, not NOFILE",
        ),
        (
            "process",
            {"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2},
            r"rlimits\[1\].type RLIMIT_CPU is there twice",
        ),
        (
            "process",
            {"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]},
            r"rlimits\[0\].soft must be from 0 to 1",
        ),
        ("process", {"oomScoreAdj": 1001}, "oomScoreAdj must be"),
        ("process", {"env": ["A=b", "NAME"]}, "process.env must hold NAME=VALUE, not NAME"),
        ("process", {"env": ["=b"]}, "process.env must hold NAME=VALUE, not =b"),
        ("process", {"user": {"umask": 0o1000}}, "umask must be from 0 to 511"),
        ("process", {"ioPriority": {"class": "IOPRIO_CLASS_NEW"}}, "ioPriority.class must be one of IOPRIO_CLASS_RT"),
        ("process", {"scheduler": {"policy": "SCHED_NEW"}}, "policy must be one of SCHED_OTHER, .*, not SCHED_NEW"),
        ("process", {"scheduler": {"policy": "SCHED_OTHER", "nice": 20}}, "nice must be from -20 to 19"),
        (
            "process",
            {"scheduler": {"policy": "SCHED_OTHER", "flags": ["RECLAIM"]}},
            r"flags\[0\] must be one of SCHED_FLAG_RESET_ON_FORK, .*, not RECLAIM",
        ),
        ("linux", {"sysctl": {"../x": "1"}}, "linux.sysctl must hold names"),
        ("linux", {"sysctl": {"kernel.x": 1}}, "linux.sysctl.kernel.x must be a JSON string"),
        ("linux", {"maskedPaths": ["/proc", "proc"]}, r"maskedPaths\[1\] must be an absolute path"),
        ("linux", {"rootfsPropagation": "open"}, "linux.rootfsPropagation must be one of private, .*, not open"),
        (
            "linux",
            {"devices": [{"path": "/dev/x", "type": "x"}]},
            r"linux.devices\[0\].type must be one of c, u, b, p, not x",
        ),
        ("linux", {"devices": [{"path": "/dev/x", "type": "c"}]}, r"linux.devices\[0\].major is missing"),
        ("linux", {"devices": [{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]}, "major must be from 0 to"),
        (
            "linux",
            {"personality": {"domain": "SVR4"}},
            "linux.personality.domain must be one of LINUX, LINUX32, not SVR4",
        ),
        ("linux", {"resources": {"unified": {"../x": "1"}}}, "resources.unified must hold names of files"),
        (
            "linux",
            {"resources": {"hugepageLimits": [{"pageSize": "2", "limit": 1}]}},
            r"hugepageLimits\[0\].pageSize must be a size such as 2MB, not 2$",
        ),
        (
            "linux",
            {"resources": {"hugepageLimits": [{"pageSize": "\u0662MB", "limit": 1}]}},
            "hugepageLimits.0..pageSize must be a size such as 2MB, not \u0662MB$",
        ),
        (
            "linux",
            {"resources": {"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}},
            r"hugepageLimits\[0\].pageSize must be a size such as 2MB, not 3MB$",
        ),
        ("linux", {"uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}, "linux.uidMappings cannot be applied"),
    ],
)
def test_what_cannot_be_applied_is_refused(bundle, section, change, words):
    spec = config("true")
    spec.setdefault(section, {}).update(change)
    with pytest.raises(runx.Error, match=words):
        runx.Config(bundle(spec))


def test_what_has_no_effect_is_a_warning(bundle):
    spec = config("true", apparmorProfile="docker-default", selinuxLabel="")
    spec["linux"] = {
        "intelRdt": None, "mountLabel": "x", "personality": {"domain": "LINUX", "flags": ["NEW"]},
        "resources": {
            "pids": {"limit": -1}, "blockIO": {"weight": 0}, "hugepageLimits": [], "unified": {"a": "1"},
            "cpu": {"shares": 5, "mems": "0", "idle": 0, "realtimeRuntime": 7},
            "memory": {"limit": 1 << 26, "swap": 1 << 27, "swappiness": 10, "disableOOMKiller": False},
        },
    }  # fmt: skip
    named = [warning.split()[0] for warning in runx.Config(bundle(spec)).warnings]
    assert named == [
        "process.apparmorProfile", "linux.personality.flags", "linux.mountLabel", "linux.resources.cpu.mems",
        "linux.resources.cpu.realtimeRuntime", "linux.resources.memory.swappiness",
    ]  # fmt: skip


def test_the_guest_gets_records_for_all_of_it(bundle):
    spec = config("true", noNewPrivileges=True, oomScoreAdj=5)
    spec["linux"] = {
        "sysctl": {"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/x": "2"}, "maskedPaths": ["/m"],
        "readonlyPaths": ["/r"], "rootfsPropagation": "shared", "personality": {"domain": "LINUX32"},
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "network", "ipc")],
        "resources": {
            "pids": {"limit": 7}, "hugepageLimits": [{"pageSize": "2MB", "limit": 4096}], "unified": {"cpu.idle": "1"}
        },
        "devices": [{"path": "/dev/f", "type": "c", "major": 10, "minor": 229, "uid": 1, "gid": 2}],
    }  # fmt: skip
    text = runx.guest_config(runx.Config(bundle(spec)), "{}", {}).replace(b"\0", b" ").decode()
    limits = "pids.max 7 hugetlb.2MB.max 4096 hugetlb.2MB.rsvd.max 4096 cpu.idle 1"
    assert text.startswith(f"{0x20000000} cgroup 4 {limits} ")
    for record in (
        "personality 8 ",
        f"node /dev/f {0o20666} 10 229 1 2 ", "sysctl sys/net/ipv4/ip_forward 1 sysctl sys/net/ipv4/conf/eth0.1/x 2 ",
        "readonly /r mask /m ", f"propagation / {1 << 20} ", "oom 5 ", "no_new_privileges ",
    ):  # fmt: skip
        assert record in text, record


DATA = pathlib.Path(__file__).with_name("data")


DEFAULTS = [path.stem for engine in ("ctr", "docker", "podman") for path in sorted(DATA.glob(f"{engine}-*.json"))]


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_configs_of_engines_are_accepted(bundle, monkeypatch, name):
    """tests/data: what each engine has written for a plain `run`, with its version."""
    spec = json.loads((DATA / f"{name}.json").read_text())
    spec["root"]["path"] = "rootfs"
    monkeypatch.setattr(runx.os.path, "exists", lambda path: True)  # sources of bind mounts
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255]))
    # the network namespaces are of another time
    monkeypatch.setattr(runx.os.path, "samefile", lambda *paths: False)
    monkeypatch.setattr(runx, "check_namespace", lambda kind, path: None)
    parsed = runx.Config(bundle(spec))
    assert parsed.warnings == []
    check_guest_words(parsed, spec)


@pytest.mark.parametrize("command", runx.COMMANDS)
def test_the_help_of_a_command_is_its_own_and_names_all_of_its_options(command):
    _, flags, values, _ = runx.COMMANDS[command]
    for words in ([command, "--help"], ["help", command]):
        usage = call(*RUNX, *words).stdout.decode()
        assert re.match(rf"usage: runX {command} .*[a-z]", usage)
        assert set(re.findall(r"(?m)^  --([a-z0-9-]+)", usage)) == {*flags, *values}


def test_the_usage_names_every_command_and_global_option():
    named = set(re.findall(r"[a-z][a-z-]+", runx.USAGE))
    assert set(runx.COMMANDS) <= named
    assert {"root", "log", "log-format", "debug"} <= named
