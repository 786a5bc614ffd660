"""What the runtime-spec says of the JSON that a runtime prints: runtime.md "State" and features.md.

Each check raises AssertionError with the name of the field.
"""

import re

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
