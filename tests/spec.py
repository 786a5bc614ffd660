# SPDX-License-Identifier: Apache-2.0
"""What the runtime-spec says of the JSON that a runtime prints: runtime.md "State" and features.md; and what of a
config.json's process must come out of it again.

Each check raises AssertionError with the name of the field.
"""

import re

import runx

HOOKS = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
NAMESPACES = {"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"}
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)([-+][0-9A-Za-z.+-]+)?")
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def is_strings(value):
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def is_annotations(value):
    return isinstance(value, dict) and all(key and isinstance(text, str) for key, text in value.items())


def is_version(value):
    return isinstance(value, str) and SEMVER.fullmatch(value)


def is_bool(value):
    return isinstance(value, bool)


def is_path(value):
    return isinstance(value, str) and value.startswith("/")


def check(section, fields, required=(), where=""):
    """Every key of section is one of fields, and its value passes that field's check, or is an object of such."""
    assert isinstance(section, dict), where
    assert not set(required) - section.keys(), (where, set(required) - section.keys())
    for key, value in section.items():
        assert key in fields, f"{where}.{key} is not in the specification"
        if isinstance(fields[key], dict):
            check(value, fields[key], (), f"{where}.{key}")
        else:
            assert fields[key](value), f"{where}.{key}: {value!r}"


STATE = {
    "ociVersion": is_version,
    "id": lambda value: isinstance(value, str) and value,
    "status": lambda value: value in ("creating", "created", "running", "stopped", "paused"),
    "pid": lambda value: type(value) is int and value >= 0,
    "bundle": is_path,
    "annotations": is_annotations,
    # not in the specification: what runc adds, and engines read
    "rootfs": is_path,
    "created": lambda value: isinstance(value, str) and RFC3339.fullmatch(value),
    "owner": lambda value: isinstance(value, str),
}

ENABLED = {"enabled": is_bool}
FEATURES = {
    "ociVersionMin": is_version,
    "ociVersionMax": is_version,
    "hooks": lambda value: is_strings(value) and set(value) <= HOOKS,
    "mountOptions": is_strings,
    "linux": {
        "namespaces": lambda value: is_strings(value) and set(value) <= NAMESPACES,
        "capabilities": lambda value: is_strings(value) and all(name.startswith("CAP_") for name in value),
        "cgroup": dict.fromkeys(("v1", "v2", "systemd", "systemdUser", "rdma"), is_bool),
        "seccomp": {
            **ENABLED,
            **dict.fromkeys(("actions", "operators", "archs", "knownFlags", "supportedFlags"), is_strings),
        },
        "apparmor": ENABLED,
        "selinux": ENABLED,
        "intelRdt": ENABLED,
        "mountExtensions": {"idmap": ENABLED},
        "netDevices": ENABLED,
    },
    "annotations": is_annotations,
    "potentiallyUnsafeConfigAnnotations": is_strings,
}


def check_state(state):
    check(state, STATE, ("ociVersion", "id", "status", "pid", "bundle", "annotations"), "state")
    assert (state["pid"] > 0) == (state["status"] in ("creating", "created", "running", "paused")), state


def check_features(features):
    check(features, FEATURES, ("ociVersionMin", "ociVersionMax"), "features")


def guest_words(config):
    """What a Config says to the guest, as text."""
    *words, rest = runx.guest_config(config, "{}", {}).decode().split("\0")
    assert rest == ""
    return words


def check_guest_words(config, spec):
    """The guest is told of each mount, of the user, and at the end of the process's arguments, environment, limits."""
    words, process = guest_words(config), spec["process"]
    end = [word for arg in process["args"] for word in ("arg", arg)]
    end += [word for variable in process["env"] for word in ("env", variable)]
    end += [word for limit in config.process.rlimits for word in ("rlimit", *map(str, limit))]
    assert words[-len(end) :] == end
    user = [str(process["user"].get(key, usual)) for key, usual in (("uid", 0), ("gid", 0), ("umask", 0o022))]
    at = words.index("user")
    assert words[at + 1 : at + 4] == user
    places = [at for at, word in enumerate(words[: words.index("hostname")]) if word in ("mount", "copy_up")]
    targets = {words[at + 2] for at in places if words[at + 1]}
    assert targets == {mount["destination"] for mount in spec["mounts"]}
