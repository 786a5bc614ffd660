#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""runX: an OCI runtime that runs each container as a Xen VM of its own.

An engine (containerd, Podman, Docker) calls it as it would call runc.  `create` forks a holder, whose
pid is the container's pid and whose namespaces are the container's, and a monitor, which builds a
paused domain with `xl create`.  `start` unpauses it.  The monitor then carries the standard streams
over PV consoles, waits for the domain to end and destroys it; the holder exits with the
container's exit status.  In the VM there is an init and
no agent; host and guest meet only in what Xen gives every domain (ramdisk, xenstore, consoles, 9p, vif).

One module, standard library only.  It is started for every operation of every container, so what
only one operation needs is imported there: json, signal or ctypes cost more than most operations.

The parts, each knowing only those above it: errors and log, OCI config, seccomp, cpio, programs, xenstore, xl,
PV console, guest, rootfs, block device, cgroup, rtnetlink, CNI, vif, state, hooks, holder, monitor, commands, command
line.
"""

import os
import sys
import time

VERSION = "0.1.0"
DEFAULT_ROOT = "/run/runX"
LIVING_FILE = "/run/runX-domains"  # when the last look at all domains began, time.monotonic(); domids of the living
HOST_CONFIG = "/etc/runX/config.json"
# An engine may call with an empty environment (Podman's `state`), and xl needs to find its helpers.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# ==== errors and log =====================================================================================
# An error is one sentence for the user.  The command line alone turns it into stderr, log and exit status.
# Beside them what all parts use: JSON, and plain records.


class Error(Exception):
    """What went wrong with which object and, where there is one, the remedy, in one sentence."""


class NoContainer(Error):
    """There is no container of that id."""

    def __init__(self, container_id):
        super().__init__(f'container "{container_id}" does not exist')


class NotRunning(Error):
    """The container's VM is gone, or is not there yet."""

    def __init__(self):
        super().__init__("container not running")


class Log:
    """The engine's log file (--log, --log-format), one record a line; without one, it is standard error.

    Podman reads the file as a single JSON object and containerd looks for the last "error", so
    nothing is written but what a user must learn; `debug` adds what a developer wants.
    """

    def __init__(self, path=None, as_json=False, debug=False):
        self.path = path and os.path.abspath(path)  # the monitor leaves this folder
        self.as_json, self.wants_debug = as_json, debug

    def write(self, level, message):
        now = timestamp()
        if self.as_json:
            line = json_text({"level": level, "msg": message, "time": now})
        else:
            line = f"time={now} level={level} msg={message}"
        try:
            if self.path is None:
                print(line, file=sys.stderr, flush=True)
                return
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError:
            pass  # an unwritable log must not hide the error

    def debug(self, message):
        if self.wants_debug:
            self.write("debug", message)

    def attempt(self, what, work, *args):
        """Calls work(*args); what fails, in whatever way, is a warning: a clean-up goes on."""
        try:
            work(*args)
        except Exception as error:
            self.write("warning", str(error) if isinstance(error, Error) else f"cannot {what}: {error}")


def timestamp():
    """Now, in RFC 3339 with nanoseconds: what Go's time.Time parses."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def printable(text):
    """Text of the guest's for the log: a hostile guest must not write control characters to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[-2000:].strip()


def json_number(text):
    """The int that a number of JSON stands for, or the float where it is one, or is larger than any of the kernel's."""
    number = int(text) if len(text) <= 20 and text.lstrip("-").isdecimal() else float(text)
    if number - number:  # NaN, for infinity and NaN
        raise ValueError(f"{text[:40]} is no number that JSON has")
    return number


class JsonScanner:
    """What C's half of json wants to know (Modules/_json.c): as json.loads does it, but for numbers."""

    strict, memo, object_hook, object_pairs_hook = True, {}, None, None
    parse_float = parse_int = parse_constant = json_number


def parse_json(text):
    """json.loads, without the import of json, which compiles regular expressions: `state` would take twice
    as long.  Raises ValueError."""
    from _json import make_scanner

    start = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        value, end = make_scanner(JsonScanner)(text, start)
        if not text[end:].strip(" \t\n\r"):
            return value
    except (StopIteration, SystemError):  # the latter where it would raise an exception of json's that is not imported
        pass
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    import json

    return json.loads(text, parse_constant=json_number)  # which says what is wrong


DOCUMENT_MAX, DEPTH_MAX = 16 << 20, 64  # characters and levels of JSON that others have written


def read_text(path):
    """A file that others have written.  Raises OSError and ValueError."""
    with open(path, encoding="utf-8") as file:
        text = file.read(DOCUMENT_MAX + 1)
    if len(text) > DOCUMENT_MAX:
        raise ValueError(f"it is larger than {DOCUMENT_MAX >> 20} MiB")
    return text


def read_document(path):
    """The JSON in such a file.  Raises OSError and ValueError."""
    return check_document(parse_json(read_text(path)))


def check_document(document):
    """The document, when all its strings can be handed to the kernel and be written again.  Raises ValueError, with
    the place."""
    todo = [(document, "", 0)]
    while todo:
        value, place, depth = todo.pop()
        if depth > DEPTH_MAX:
            raise ValueError(f"it is nested too deeply at {printable(place[:100])}")
        if isinstance(value, str) and not is_text(value):
            raise ValueError(f"{printable(place[1:])} holds a NUL or half a character")
        if isinstance(value, dict):
            if not all(map(is_text, value)):
                raise ValueError(f"a name in {printable(place[1:]) or 'it'} holds a NUL or half a character")
            todo += [(inner, f"{place}.{key}", depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(inner, f"{place}[{number}]", depth + 1) for number, inner in enumerate(value)]
    return document


def is_text(text):
    """Whether it can be a C string in UTF-8: without NUL and the surrogates that JSON and names of files can have."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def json_text(value, indent=None, margin="\n"):
    """json.dumps, for the same reason."""
    from _json import encode_basestring_ascii

    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    inner, brackets = margin + " " * (indent or 0), "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        parts = [f"{json_text(str(key))}: {json_text(item, indent, inner)}" for key, item in value.items()]
    else:
        parts = [json_text(item, indent, inner) for item in value]
    if not parts or indent is None:
        return ", ".join(parts).join(brackets)
    return (inner + f",{inner}".join(parts) + margin).join(brackets)


class Record:
    """Base of plain records: the fields are the class's annotations, all required, by name.

    The job of dataclasses, whose import alone would double the time that `state` takes.
    """

    def __init__(self, **fields):
        names = type(self).__annotations__
        if fields.keys() != names.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(names)}")
        self.__dict__.update(fields)


# ==== OCI config =========================================================================================
# config.json of the bundle (runtime-spec config.md), checked and parsed once into Config.


class Mount(Record):
    """An entry of `mounts`; flags are those of mount(2), data what the file system gets."""

    destination: str
    type: str
    source: str
    flags: int
    data: str
    propagation: int  # flags of mount(2), 0: private
    copy_up: bool  # a tmpfs that begins with what is below it

    def on_host(self):
        """Whether dom0 mounts it, and the guest gets it over 9p: what names files or devices of dom0's."""
        return bool(self.flags & MS_BIND) or self.type not in GUEST_FILESYSTEMS

    def is_sealed_late(self):
        """Whether it is read-only memory of the guest's, in which mount points and nodes are made before."""
        return self.type == "tmpfs" and bool(self.flags & MS_RDONLY) and not self.on_host()

    def is_folder(self):
        """Whether what dom0 mounts is a folder: all but a bind mount of a file."""
        return not self.flags & MS_BIND or os.path.isdir(self.source)


class Process(Record):
    args: list
    env: list
    cwd: str
    terminal: bool
    console_size: tuple  # rows, columns; 0, 0: not said
    uid: int
    gid: int
    groups: list
    umask: int
    capabilities: dict  # set's name: a bit for each capability
    no_new_privileges: bool
    rlimits: list  # (number, soft, hard)
    oom_score_adj: int
    io_priority: int  # as ioprio_set(2) takes it, or None
    scheduler: tuple  # policy, flags, nice, priority, runtime, deadline, period, or None


class Linux(Record):
    """What of config-linux.md the guest applies to itself."""

    pid_namespace: bool
    devices: list  # (path, mode, major, minor, uid, gid)
    sysctl: dict
    masked_paths: list
    readonly_paths: list
    propagation: int  # flags of mount(2), 0: private as it is
    personality: int  # as personality(2) takes it, or None
    cgroup: dict  # file of the container's cgroup: what is written to it
    seccomp: dict  # as in config.json, or None


class Hook(Record):
    path: str
    args: list  # argv
    env: list
    timeout: int  # seconds, 0: none


VCPUS_MAX, VCPU_MEMORY = 4096, 8  # more than any Xen; MiB for each, of which its kernel takes a half
DEFAULT_MEMORY, MINIMUM_MEMORY = 64, 24  # MiB; a limit below the minimum could not hold the kernel


class Resources(Record):
    """What Xen can give a VM, of linux.resources; 0 or "": not said."""

    memory: int  # bytes; -1: no limit
    quota: int  # microseconds of processor time in each period, of all processors together; -1: no limit
    period: int  # microseconds
    shares: int  # cgroup v1's weight: 1024 is the usual one
    cpus: str  # physical processors, such as 0-3,7
    default_memory: int  # MiB
    minimum_memory: int  # MiB
    default_vcpus: int
    fixed_vcpus: int  # whatever the quota is
    most_vcpus: int  # whatever is asked for

    def mebibytes(self, unlimited):
        """Memory of the VM; unlimited: what it gets where there is no limit."""
        if self.memory < 0:
            return unlimited
        return max(self.memory >> 20, self.minimum_memory) if self.memory else self.default_memory

    def vcpus(self, unlimited):
        """As many as the quota can keep busy."""
        if self.fixed_vcpus or not self.quota:
            wanted = self.fixed_vcpus or self.default_vcpus
        else:
            wanted = unlimited if self.quota < 0 else -(-self.quota // self.period)
        return min(wanted, self.most_vcpus)

    def cap(self):
        """The most that all vcpus may use together, in percent of one processor; 0: no limit."""
        return min(max(1, self.quota * 100 // self.period), 100 * self.vcpus(0)) if self.quota > 0 else 0

    def weight(self):
        """For Xen's scheduler, where 256 is the usual one."""
        return min(65535, max(1, self.shares * 256 // 1024))


class Machine(Record):
    """What the VM is made of beside Resources, as config.json's vm object, an annotation or the host has it."""

    type: str  # "pv" or "pvh"; "": what the host offers
    maxmem: int  # MiB, 0: no more than memory
    maxvcpus: int  # 0: no more than vcpus
    rootfs: str  # "9p", "ramdisk", "block", "auto" (what works here) or "none"
    image: str  # of a disk that is the rootfs; "": root.path says where that is
    kernel: tuple  # path, whether that is in the rootfs; or None: ours
    ramdisk: tuple  # the same
    own_init: bool  # the VM boots a system of its own, and nothing of ours is in it
    cmdline: list  # words for its kernel
    options: dict  # of xl.cfg
    lines: list  # of xl.cfg, as they are


class Config(Record):
    oci_version: str
    rootfs: str  # absolute
    readonly: bool
    process: Process  # or None: such a container can be created but not started
    hostname: str
    domainname: str
    linux: Linux
    warnings: list  # what is asked for and cannot be had in a VM, a sentence each
    mounts: list
    annotations: dict
    hooks: dict  # as in config.json: parse_hooks() has accepted it
    resources: Resources
    raw_resources: dict  # as in config.json: what `update` must not change
    namespace: str  # path of the network namespace to join; "": a new one; None: none
    cgroup: str  # linux.cgroupsPath
    netconf: list  # (variable, file, name, address) of each network that process.env asks for
    netconf_folders: list  # where these files may be
    rate: str  # of the network interfaces, as netback wants it, or ""
    base: dict  # what parse_resources() needs beside them
    machine: Machine


# <sys/mount.h>; bind mounts are told from others by these, not by their type
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 32, 128, 1024, 2048
MS_BIND, MS_MOVE, MS_REC, MS_UNBINDABLE = 4096, 8192, 16384, 1 << 17
MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 18, 1 << 19, 1 << 20
RECURSIVE_RO = 1 << 32  # not mount(2)'s: read-only with all that is mounted below
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25

# option: (flags to set, flags to clear); runtime-spec config.md "Linux mount options"
MOUNT_OPTIONS = {
    "defaults": (0, 0), "async": (0, MS_SYNCHRONOUS), "sync": (MS_SYNCHRONOUS, 0), "dirsync": (MS_DIRSYNC, 0),
    "ro": (MS_RDONLY, 0), "rw": (0, MS_RDONLY),
    "suid": (0, MS_NOSUID), "nosuid": (MS_NOSUID, 0), "dev": (0, MS_NODEV), "nodev": (MS_NODEV, 0),
    "exec": (0, MS_NOEXEC), "noexec": (MS_NOEXEC, 0), "bind": (MS_BIND, 0), "rbind": (MS_BIND | MS_REC, 0),
    "atime": (0, MS_NOATIME), "noatime": (MS_NOATIME, 0),
    "diratime": (0, MS_NODIRATIME), "nodiratime": (MS_NODIRATIME, 0),
    "relatime": (MS_RELATIME, 0), "norelatime": (0, MS_RELATIME),
    "strictatime": (MS_STRICTATIME, 0), "nostrictatime": (0, MS_STRICTATIME),
    "lazytime": (MS_LAZYTIME, 0), "nolazytime": (0, MS_LAZYTIME),
    # what is mounted below a bind mount is part of it in the VM, so there these are the same as those without r
    "rro": (MS_RDONLY | RECURSIVE_RO, 0), "rrw": (0, MS_RDONLY), "rsuid": (0, MS_NOSUID), "rnosuid": (MS_NOSUID, 0),
    "rdev": (0, MS_NODEV), "rnodev": (MS_NODEV, 0), "rexec": (0, MS_NOEXEC), "rnoexec": (MS_NOEXEC, 0),
    "ratime": (0, MS_NOATIME), "rnoatime": (MS_NOATIME, 0), "rdiratime": (0, MS_NODIRATIME),
    "rnodiratime": (MS_NODIRATIME, 0), "rrelatime": (MS_RELATIME, 0), "rnorelatime": (0, MS_RELATIME),
    "rstrictatime": (MS_STRICTATIME, 0), "rnostrictatime": (0, MS_STRICTATIME),
}  # fmt: skip
PROPAGATIONS = {
    "": 0, "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip
DEVICE_TYPES = {"c": 0o020000, "u": 0o020000, "b": 0o060000, "p": 0o010000}  # <sys/stat.h>
# what the guest's kernel makes by itself; any other type is for dom0's kernel to mount
GUEST_FILESYSTEMS = {
    "proc", "sysfs", "tmpfs", "ramfs", "devpts", "mqueue", "cgroup", "cgroup2", "securityfs", "hugetlbfs",
    "binfmt_misc",
}  # fmt: skip

REQUIRED = object()


def field(section, key, kind, default=REQUIRED, where="config.json"):
    """section[key], checked to be of the type kind; a missing or null one is the default, or an Error."""
    value = section.get(key)
    if value is None:
        if default is REQUIRED:
            raise Error(f"{where}: {key} is missing")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Error(f"{where}: {key} must be a JSON {JSON_NAMES[kind]}")
    return value


JSON_NAMES = {dict: "object", list: "array", str: "string", int: "integer", bool: "boolean"}


def strings(section, key, where):
    """An array of strings."""
    values = field(section, key, list, [], where)
    if not all(isinstance(value, str) for value in values):
        raise Error(f"{where}: {key} must hold only strings")
    return values


def load_config(bundle):
    """Reads <bundle>/config.json.  Raises Error, in runc's words where engines show them."""
    try:
        spec = read_document(os.path.join(bundle, "config.json"))
    except FileNotFoundError:
        raise Error(f"JSON specification file config.json not found in bundle {bundle}") from None
    except (OSError, ValueError) as error:
        raise Error(f"cannot read config.json of bundle {bundle}: {error}") from None
    if not isinstance(spec, dict):
        raise Error(f"config.json of bundle {bundle} must be a JSON object")
    linux = field(spec, "linux", dict, {})
    resources = field(linux, "resources", dict, {}, "config.json: linux")
    hostname, domainname = field(spec, "hostname", str, ""), field(spec, "domainname", str, "")
    namespaces, warnings = parse_namespaces(linux), not_applied(spec, linux, resources)
    if (hostname or domainname) and namespaces and "uts" not in namespaces:
        raise Error("config.json: hostname and domainname need a uts namespace in linux.namespaces")
    if max(len(hostname.encode()), len(domainname.encode())) > 64:
        raise Error("config.json: hostname and domainname must not be longer than 64 bytes")
    hooks = field(spec, "hooks", dict, {})
    for kind in HOOK_KINDS:
        parse_hooks(hooks, kind)
    process = parse_process(field(spec, "process", dict, None), warnings)
    mounts = [parse_mount(bundle, mount) for mount in field(spec, "mounts", list, [])]
    if process and process.terminal and not any(mount.type == "devpts" for mount in mounts):
        raise Error("config.json: process.terminal needs a mount of the type devpts at /dev/pts")
    host = load_host_config()
    hardware, annotations = parse_hardware(spec), parse_annotations(spec, host["annotations"], warnings)
    env = believed_variables(process.env if process else [], host["environment"], warnings)
    machine = parse_machine(spec, annotations, hardware, env, host)
    root = field(spec, "root", dict, {"path": machine.image} if machine.image else REQUIRED)
    rootfs, readonly = find_rootfs(bundle, root, machine), field(root, "readonly", bool, False, "config.json: root")
    check_links(spec.get("vm") or {}, {rootfs, os.path.join(bundle, text_of(root, "path", "config.json: root"))})
    netconf = parse_netconf(env)
    if netconf and namespaces.get("network") == "" and any(mount.destination == PODMANS_MARK for mount in mounts):
        netconf = warnings.append("NETCONF has no effect, for Podman was asked for no network") or []
    if machine.own_init and hooks.get("startContainer"):
        raise Error("config.json: hooks.startContainer need runX's own init, and the VM boots another one")
    base = {
        "default_memory": host["memory"] or DEFAULT_MEMORY, "default_vcpus": host["vcpus"] or 1,
        "minimum_memory": 1 if machine.own_init else MINIMUM_MEMORY, "fixed_vcpus": 0, "most_vcpus": VCPUS_MAX,
    }  # fmt: skip
    bound_annotations(annotations, parse_resources(resources, "config.json: linux.resources", base), host, warnings)
    memory = hardware["memory"] or annotations["memory"] << 20
    if memory:
        resources = {**resources, "memory": {**field(resources, "memory", dict, {}), "limit": memory}}
    base["fixed_vcpus"] = hardware["vcpus"] or annotations["vcpus"]
    machine.maxmem, machine.maxvcpus = annotations["maxmem"], annotations["maxvcpus"]
    return Config(
        oci_version=check_version(field(spec, "ociVersion", str)),
        rootfs=rootfs,
        readonly=readonly,
        process=process,
        hostname=hostname,
        domainname=domainname,
        linux=parse_linux(linux, namespaces),
        warnings=warnings,
        mounts=mounts,
        annotations=field(spec, "annotations", dict, {}),  # parse_annotations() has accepted them
        hooks=hooks,
        resources=parse_resources(resources, "config.json: linux.resources", base),
        raw_resources=resources,
        base=base,
        namespace=network_namespace(namespaces, netconf),
        cgroup=text_of(linux, "cgroupsPath", "config.json: linux"),
        netconf=netconf,
        netconf_folders=host["netconf"],
        rate=annotations["rate"] and parse_rate(annotations["rate"]),
        machine=machine,
    )


# what a VM cannot have or does not need, and an engine may ask for: docs/config.md gives the reasons
NOT_APPLIED = {
    "process": ("apparmorProfile", "selinuxLabel", "execCPUAffinity"),
    "linux": ("mountLabel", "intelRdt", "timeOffsets", "memoryPolicy", "netDevices"),
    "linux.resources": ("blockIO", "network", "rdma"),
}


def not_applied(spec, linux, resources):
    """A sentence for each property that is asked for and has no effect.  Raises Error for what must not be ignored."""
    for key in ("uidMappings", "gidMappings"):
        if field(linux, key, list, [], "config.json: linux"):
            raise Error(f"config.json: linux.{key} cannot be applied: the container's root is root of its own VM")
    sections = {"process": field(spec, "process", dict, {}), "linux": linux, "linux.resources": resources}
    asked = (f"{name}.{key}" for name, keys in NOT_APPLIED.items() for key in keys if asks(sections[name].get(key)))
    return [f"{path} has no effect on a container in a VM of its own" for path in asked]


def asks(value):
    """Whether a property asks for anything: engines write many that are empty, or say that there is no limit."""
    if isinstance(value, dict):
        return any(asks(inner) for inner in value.values())
    return bool(value) and value != -1


ROOTFS_MODES, ROOTFS_CHOICE = ("9p", "ramdisk", "block", "auto"), '"9p", "ramdisk", "block" or "auto"'
# docs/security.md: an annotation may be the image's, and config.json does not tell whose a variable is
ANNOTATIONS = (
    "memory", "vcpus", "maxmem", "maxvcpus", "rootfs", "rate", "type", "kernel", "ramdisk", "cmdline", "xlconf",
)  # fmt: skip
VARIABLES = ("NETCONF", "RUNX_KERNEL", "RUNX_RAMDISK", "XLCONF")
HOST_SETTINGS = {
    "type": "", "memory": 0, "vcpus": 0, "cmdline": "", "rootfs": "auto", "xlconf": ["/etc/runX/xl"],
    "netconf": ["/etc/cni/net.d"], "maxmem": 512, "annotations": list(ANNOTATIONS[:6]),
    "environment": list(VARIABLES[:3]),
}  # fmt: skip


def load_host_config():
    """The host's own settings (docs/config.md), each with its default where HOST_CONFIG is silent or absent."""
    try:
        settings = read_document(HOST_CONFIG)
    except FileNotFoundError:
        return HOST_SETTINGS
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {HOST_CONFIG}: {error}") from None
    if not isinstance(settings, dict) or settings.keys() - HOST_SETTINGS.keys():
        raise Error(f"{HOST_CONFIG} must be a JSON object with no other members than {', '.join(HOST_SETTINGS)}")
    found = {key: field(settings, key, type(value), value, HOST_CONFIG) for key, value in HOST_SETTINGS.items()}
    check_type(found["type"], f"{HOST_CONFIG}: type")
    if min(found["memory"], found["vcpus"], found["maxmem"]) < 0:
        raise Error(f"{HOST_CONFIG}: memory and maxmem, in MiB, and vcpus must not be below 0")
    if found["rootfs"] not in ROOTFS_MODES:
        raise Error(f"{HOST_CONFIG}: rootfs is {ROOTFS_CHOICE}, not {printable(found['rootfs'])}")
    for key, known in (("xlconf", ()), ("netconf", ()), ("annotations", ANNOTATIONS), ("environment", VARIABLES)):
        if set(strings(found, key, HOST_CONFIG)) - set(known) and known:
            raise Error(f"{HOST_CONFIG}: {key} must hold none but {', '.join(known)}")
    return found


def check_type(text, where):
    if text not in ("", "pv", "pvh"):
        raise Error(f'{where} is "pv" or "pvh", not {printable(text)}')


def parse_annotations(spec, believed, warnings):
    """The annotations org.runx.* that are believed, without that prefix: those that are numbers as int, and 0 or "" if
    not there."""
    annotations, found = field(spec, "annotations", dict, {}), {}
    strings({"annotations": list(annotations.values())}, "annotations", "config.json")
    dropped = [key for key in annotations if key.startswith("org.runx.") and key[9:] not in believed]
    annotations = {key: text for key, text in annotations.items() if key not in dropped}
    warn_of_dropped("annotations", dropped, warnings)
    for key in ("memory", "vcpus", "maxmem", "maxvcpus"):
        text = annotations.get(f"org.runx.{key}") or "0"
        if not (isinstance(text, str) and text.isdecimal() and len(text) < 8):
            raise Error(f"config.json: the annotation org.runx.{key} must be a number")
        found[key] = int(text)
    for key in ("type", "rootfs", "kernel", "ramdisk", "cmdline", "xlconf", "rate"):
        found[key] = text_of(annotations, f"org.runx.{key}", "config.json: annotations")
    check_type(found["type"], "config.json: the annotation org.runx.type")
    return found


def bound_annotations(annotations, resources, host, warnings):
    """Lowers those that ask for more than config.json's resources, or for more than the host gives where these do not
    say: they may be the image's."""
    bounds = {"maxmem": host["maxmem"], "memory": resources.memory >> 20 if resources.memory > 0 else host["maxmem"]}
    if resources.quota > 0:
        bounds["vcpus"] = resources.vcpus(0)
    for key, bound in bounds.items():
        if annotations[key] > bound:
            warnings.append(f"the annotation org.runx.{key} cannot be {annotations[key]}, it is {bound}")
            annotations[key] = bound


def believed_variables(env, believed, warnings):
    """The variables of the environment without those of VARIABLES that the host does not believe."""
    kept, dropped = [], []
    for variable in env:
        name, _, value = variable.partition("=")
        kind = name.rstrip("0123456789") if name.startswith("NETCONF") else name
        if value and kind in VARIABLES and kind not in believed:
            dropped.append(name)
        else:
            kept.append(variable)
    warn_of_dropped("variables", dropped, warnings)
    return kept


def warn_of_dropped(what, names, warnings):
    if names:
        names = printable(", ".join(names)[:400])
        warnings.append(f"these {what} have no effect, for {HOST_CONFIG} does not believe them: {names}")


def text_of(section, key, where):
    """A string, "" if it is missing: engines write both."""
    return field(section, key, str, "", where)


def parse_hardware(spec):
    """vm.hwConfig (config-vm.md) with "memory" in bytes, "vcpus", and "options" of xl.cfg for the rest."""
    vm, where = field(spec, "vm", dict, {}), "config.json: vm.hwConfig"
    key = "hwConfig" if vm.get("hwConfig") is not None else "hwconfig"  # the document's spelling and Go's
    hardware, options = field(vm, key, dict, {}, "config.json: vm"), {}
    numbers = {key: field(hardware, key, int, 0, where) for key in ("memory", "vcpus")}
    irqs, iomems = (field(hardware, key, list, [], where) for key in ("irqs", "iomems"))
    if not all(isinstance(number, int) and number >= 0 for number in [*numbers.values(), *irqs]):
        raise Error(f"{where}: memory, vcpus and irqs must be integers not below 0")
    device_tree, dtdevs = text_of(hardware, "deviceTree", where), strings(hardware, "dtdevs", where)
    if device_tree:
        options["device_tree"] = device_tree
    if dtdevs:
        options["dtdev"] = dtdevs
    if iomems:
        options["iomem"] = [parse_iomem(iomem, where + ".iomems") for iomem in iomems]
    if irqs:
        options["irqs"] = [str(number) for number in irqs]
    return {**numbers, "options": options}


def parse_iomem(spec, where):
    """A range of page frames as xl.cfg.5 wants it, in hexadecimal: MFN,NUMBER[@GFN]."""
    if not isinstance(spec, dict):
        raise Error(f"{where} must hold objects")
    first, count = (field(spec, key, int, where=where) for key in ("firstMFN", "nrMFNs"))
    guest = field(spec, "firstGFN", int, None, where)
    if first < 0 or count <= 0 or (guest or 0) < 0:
        raise Error(f"{where}: the numbers must not be below 0")
    return f"{first:x},{count:x}" + ("" if guest is None else f"@{guest:x}")


IMAGE_FORMATS = ("raw", "qcow2", "vhd")  # of those that config-vm.md names, what xl-disk-configuration.5 can


def check_references(path, kind):
    """Raises Error if an image names another file, which dom0's QEMU would give to the VM: its content is not trusted.

    qcow2: docs/interop/qcow2.rst of QEMU's sources.  vhd: a footer with the type of the disk, and perhaps a copy first.
    """
    import struct

    try:
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 512))
            tail = file.read(512)
    except OSError as error:
        raise Error(f"cannot read the image {path}: {error.strerror}") from None
    reference = ""
    if kind == "qcow2":
        if len(head) < 80 or not head.startswith(b"QFI\xfb"):
            raise Error(f"the image {path} is not in the format qcow2")
        version, backing = struct.unpack_from(">IQ", head, 4)
        features = struct.unpack_from(">Q", head, 72)[0] if version > 2 else 0
        reference = "a backing file" if backing else "a data file outside" if features & 4 else ""
    elif kind == "vhd":
        types = [part[60:64] for part in (head, tail) if part.startswith(b"conectix")]
        if not types:
            raise Error(f"the image {path} is not in the format vhd")
        known = (b"\0\0\0\2", b"\0\0\0\3")  # fixed, dynamic; 4 has a parent
        reference = "" if all(each in known for each in types) else "a parent"
    if reference:
        raise Error(f"cannot give the image {path} to a VM, for it has {reference}: make it one that stands alone")


def parse_machine(spec, annotations, hardware, env, host):
    """The Machine.  vm goes before annotations, these before what the image says in its environment."""
    vm, where = field(spec, "vm", dict, {}), "config.json: vm"
    sections = {key: field(vm, key, dict, {}, where) for key in ("hypervisor", "kernel", "image")}
    variables = dict(variable.partition("=")[::2] for variable in env)
    kernel, ramdisk = (
        find_boot_file(text_of(sections["kernel"], key, where + ".kernel"), annotations[name], variables.get(variable))
        for key, name, variable in (("path", "kernel", "RUNX_KERNEL"), ("initrd", "ramdisk", "RUNX_RAMDISK"))
    )
    options, image = dict(hardware["options"]), text_of(sections["image"], "path", where + ".image")
    own_init = bool(ramdisk or image and kernel)
    if image:
        kind = text_of(sections["image"], "format", where + ".image") or "raw"
        if kind not in IMAGE_FORMATS:
            raise Error(f"{where}.image: Xen cannot read the format {printable(kind)}: use {', '.join(IMAGE_FORMATS)}")
        if own_init:
            check_references(image, kind)
            options["disk"] = [f"format={kind},vdev=xvda,access=rw,target={image}"]
    if not kernel and (ramdisk or image and kind != "raw"):
        raise Error("a VM with its own ramdisk or disk image needs its own kernel too: name it where that is named")
    rootfs = annotations["rootfs"]
    if rootfs and rootfs not in (("9p", "none") if own_init else ROOTFS_MODES):
        choice = '"9p" or "none" for a VM with its own ramdisk' if own_init else ROOTFS_CHOICE
        raise Error(f"config.json: the annotation org.runx.rootfs is {choice}, not {printable(rootfs)}")
    check_hypervisor(text_of(sections["hypervisor"], "path", where + ".hypervisor"))
    xlconf = annotations["xlconf"] or variables.get("XLCONF")
    lines = [check_line(line) for line in strings(sections["hypervisor"], "parameters", where + ".hypervisor")]
    words = [*host["cmdline"].split(), *annotations["cmdline"].split()]
    return Machine(
        type=annotations["type"] or host["type"], maxmem=0, maxvcpus=0,
        rootfs=rootfs or ("none" if own_init else host["rootfs"]), image="" if own_init else image,
        kernel=kernel, ramdisk=ramdisk, own_init=own_init,
        cmdline=words + [quote_word(word) for word in strings(sections["kernel"], "parameters", where + ".kernel")],
        options=options, lines=lines + ([read_trusted("XLCONF", xlconf, host["xlconf"])] if xlconf else []),
    )  # fmt: skip


def find_boot_file(host_path, annotation, variable):
    """Which file to boot: (path, whether it is in the rootfs), or None for ours.

    Only the vm object, which is the engine's, names files of dom0's; annotations and the image's own
    environment name files in the rootfs.
    """
    if host_path:
        if not os.path.isfile(host_path):
            raise Error(f"cannot boot {host_path}: there is no such file on this host")
        return os.path.realpath(host_path), False
    return (annotation or variable, True) if annotation or variable else None


def check_links(vm, roots):
    """Raises Error if a file that vm names in the rootfs is elsewhere: the name is the engine's, a link in there is the
    image's.  roots: paths of the rootfs."""
    for section, key in (("kernel", "path"), ("kernel", "initrd"), ("image", "path")):
        path = (vm.get(section) or {}).get(key) or "/"
        for root in roots:
            inside = os.path.realpath(path).startswith(f"{os.path.realpath(root)}/")
            if os.path.abspath(path).startswith(f"{root}/") and not inside:
                raise Error(f"config.json: vm.{section}.{key}: a link leads from {path} out of the rootfs")


def check_hypervisor(path):
    if path and os.path.basename(path) != "xl":
        raise Error(f"config.json: vm.hypervisor.path cannot be {path}: runX drives Xen with xl")


def check_line(line):
    """A setting for xl.cfg, as `xl create` takes it behind the file's name."""
    key, equals, _ = line.partition("=")
    if not equals or not key.strip().rstrip("+").strip().replace("_", "").isalnum() or "\n" in line:
        raise Error(f"config.json: vm.hypervisor.parameters must hold settings of xl.cfg, not {printable(line)}")
    return line


def quote_word(word):
    """A word for the kernel's command line, which knows quotes and no escapes (lib/cmdline.c)."""
    if '"' in word or "\n" in word:
        raise Error(f"config.json: vm.kernel.parameters cannot hold quotes or line ends: {printable(word)}")
    return word if word.split() == [word] else f'"{word}"'


def read_trusted(what, path, folders):
    """The text of a file that the variable `what` names.  The image may have set it, so it must be where only root
    puts files."""
    path = os.path.realpath(path)
    folder = next((folder for folder in map(os.path.realpath, folders) if path.startswith(folder + "/")), None)
    if folder is None:
        raise Error(f"{what} {path} is in none of the folders that {HOST_CONFIG} allows: {', '.join(folders)}")
    try:
        part = path
        while len(part) >= len(folder):
            status = os.stat(part)
            if status.st_uid != 0 or status.st_mode & 0o022:
                raise Error(f"{what} {path} is not to be trusted: others than root may write to {part}")
            part = os.path.dirname(part)
        return read_text(path)
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {what} {path}: {error}") from None


def parse_netconf(env):
    """(variable, file, name, address or "") of NETCONF, NETCONF1, NETCONF2, …, in that order."""
    found = {}
    for variable in env:
        key, _, value = variable.partition("=")
        digits = key.removeprefix("NETCONF")
        if not key.startswith("NETCONF") or digits.strip("0123456789") or len(digits) > 5 or not value:
            continue
        path, name, address = (*value.split(",", 2), "", "")[:3]
        if not path.startswith("/") or not name:
            raise Error(f'{key} must be "/path/to/cni/file,name" with ",IP" or without, not {printable(value)}')
        found[int(digits or 0)] = (key, path, name, address)
    return [found[number] for number in sorted(found)]


# <linux/sched.h>: what NS_GET_NSTYPE of <linux/nsfs.h> says of each
NAMESPACES = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "mount": 0x00020000, "network": 0x40000000, "pid": 0x20000000,
    "time": 0x00000080, "user": 0x10000000, "uts": 0x04000000,
}  # fmt: skip
NS_GET_NSTYPE = 0xB703
PODMANS_MARK = "/run/.containerenv"  # which it mounts into each container


def parse_namespaces(linux):
    """{type: path to join, or ""} of linux.namespaces; {} where there are none, and all are the VM's.  Raises Error for
    what a VM cannot have: to share one with dom0 or with another container."""
    where, found = "config.json: linux.namespaces", {}
    for entry in field(linux, "namespaces", list, [], "config.json: linux"):
        if not isinstance(entry, dict):
            raise Error(f"{where} must hold objects")
        kind, path = field(entry, "type", str, where=where), text_of(entry, "path", where)
        if kind not in NAMESPACES:
            raise Error(f"{where}: there is no type {printable(kind)}")
        if kind in found:
            raise Error(f"{where}: {kind} is there twice")
        if path:
            check_namespace(kind, path)
        found[kind] = path
    joined = [kind for kind, path in found.items() if path and kind != "network"]
    if joined:
        owner = f"names {', '.join(joined)} of another container or of the host"
        raise Error(f"{where} {owner}, and containers cannot share a VM yet")
    for kind in ("mount", "pid", "ipc"):
        if found and kind not in found:
            raise Error(f"{where} asks for the host's own {kind} namespace, which a VM cannot have: add one of its own")
    if "user" in found:
        raise Error(f"{where}: leave out user, for the container's root is root of its own VM")
    return found


def check_namespace(kind, path):
    """Raises Error unless there is a namespace of this kind at path."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            is_one = fcntl.ioctl(fd, NS_GET_NSTYPE) == NAMESPACES[kind]
        except OSError:
            is_one = False  # no namespace at all
        finally:
            os.close(fd)
    except OSError as error:
        raise Error(f"cannot join the {kind} namespace {path}: {error.strerror}") from None
    if not is_one:
        raise Error(f"cannot join the {kind} namespace {path}: it is none")


def network_namespace(namespaces, netconf):
    """The path of the network namespace that the container joins, "" for one of its own, or None.  Raises Error."""
    path = namespaces.get("network")
    if path is not None and not (path and os.path.samefile(path, "/proc/self/ns/net")):
        return path
    if namespaces and not netconf:
        raise Error(
            "config.json: linux.namespaces asks for the host's own network, which a VM cannot have: give it a network "
            "namespace of its own, or a network by NETCONF"
        )
    return None


def check_version(version):
    """Any 1.x, pre-releases included: minor versions only add properties."""
    numbers = version.split("-")[0].split("+")[0].split(".")
    if len(numbers) != 3 or not "".join(numbers).isdecimal() or numbers[0] != "1" or len(version) > 60:
        raise Error(f'config.json: ociVersion "{printable(version[:60])}" is not supported: runX knows 1.0.0 to 1.3.x')
    return version


def is_image(path):
    import stat

    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def find_rootfs(bundle, root, machine):
    """The path of a folder, or of an image: a file or block device.  Raises Error."""
    path = os.path.join(bundle, machine.image or field(root, "path", str, where="config.json: root"))
    if os.path.isdir(path) and not machine.image:
        return os.path.realpath(path)
    if machine.own_init or not is_image(path):
        raise Error(f"the rootfs {path} is not a folder: unpack or mount the image there before create")
    if machine.rootfs not in ("block", "auto"):
        raise Error(f"the rootfs {path} is an image, which is not for {machine.rootfs}: use org.runx.rootfs=block")
    return os.path.realpath(path)


# <linux/capability.h>: the number of each is its place
CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
# <asm-generic/resource.h>
RLIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME".split()
# <linux/ioprio.h>, <linux/sched.h>
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
POLICIES = {"OTHER": 0, "FIFO": 1, "RR": 2, "BATCH": 3, "ISO": 4, "IDLE": 5, "DEADLINE": 6}
SCHEDULER_FLAGS = {
    "RESET_ON_FORK": 1, "RECLAIM": 2, "DL_OVERRUN": 4, "KEEP_POLICY": 8, "KEEP_PARAMS": 16,
    "UTIL_CLAMP_MIN": 32, "UTIL_CLAMP_MAX": 64,
}  # fmt: skip


def parse_process(spec, warnings):
    if spec is None:
        return None
    where = "config.json: process"
    user = field(spec, "user", dict, {}, where)
    groups = field(user, "additionalGids", list, [], where + ".user")
    env = {variable.partition("=")[0]: variable for variable in strings(spec, "env", where)}  # the last counts
    process = Process(
        args=strings(spec, "args", where),
        env=list(env.values()),
        cwd=field(spec, "cwd", str, where=where),
        terminal=field(spec, "terminal", bool, False, where),
        console_size=tuple(
            field(field(spec, "consoleSize", dict, {}, where), key, int, 0, where + ".consoleSize")
            for key in ("height", "width")
        ),
        uid=field(user, "uid", int, 0, where + ".user"),
        gid=field(user, "gid", int, 0, where + ".user"),
        groups=groups,
        umask=field(user, "umask", int, 0o022, where + ".user"),
        capabilities=parse_capabilities(field(spec, "capabilities", dict, {}, where), warnings),
        no_new_privileges=field(spec, "noNewPrivileges", bool, False, where),
        rlimits=parse_rlimits(field(spec, "rlimits", list, [], where)),
        oom_score_adj=field(spec, "oomScoreAdj", int, 0, where),
        io_priority=parse_io_priority(field(spec, "ioPriority", dict, None, where)),
        scheduler=parse_scheduler(field(spec, "scheduler", dict, None, where)),
    )
    if not -1000 <= process.oom_score_adj <= 1000:
        raise Error("config.json: process.oomScoreAdj must be from -1000 to 1000")
    if not 0 <= process.umask <= 0o777:
        raise Error("config.json: process.user.umask must be from 0 to 511, which is 0777")
    if not process.args:
        raise Error("config.json: process.args must not be empty")
    if not process.cwd.startswith("/"):
        raise Error("config.json: process.cwd must be an absolute path")
    if not all(0 <= number < 2**16 for number in process.console_size):
        raise Error("config.json: process.consoleSize must be from 0 to 65535")
    if not all(isinstance(gid, int) and 0 <= gid < 2**32 for gid in [process.uid, process.gid, *groups]):
        raise Error("config.json: the ids in process.user must be integers from 0 to 4294967295")
    return process


def parse_capabilities(spec, warnings):
    """A bit set for each of CAPABILITY_SETS; without any the process has no capability, as under runc."""
    sets, unknown = {}, []
    for name in CAPABILITY_SETS:
        sets[name] = 0
        for capability in strings(spec, name, "config.json: process.capabilities"):
            if capability.removeprefix("CAP_") in CAPABILITIES:
                sets[name] |= 1 << CAPABILITIES.index(capability.removeprefix("CAP_"))
            elif capability not in unknown:
                unknown.append(capability)
    if unknown:
        warnings.append(f"unknown capabilities are left out: {', '.join(unknown)}")
    asked = dict(sets)  # the rules of capset(2) and prctl(2): the kernel refuses what goes beyond
    sets["effective"] &= sets["permitted"]
    sets["inheritable"] &= sets["bounding"]
    sets["ambient"] &= sets["permitted"] & sets["inheritable"]
    left_out = [name for name in CAPABILITY_SETS if sets[name] != asked[name]]
    if left_out:
        warnings.append(
            "capabilities that no process can have without others are left out of process.capabilities: "
            + ", ".join(f"{name} {capability_names(asked[name] & ~sets[name])}" for name in left_out)
        )
    return sets


def capability_names(bits):
    return " ".join(f"CAP_{name}" for number, name in enumerate(CAPABILITIES) if bits >> number & 1)


def parse_rlimits(entries):
    where, limits = "config.json: process.rlimits", {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise Error(f"{where} must hold objects")
        name = field(entry, "type", str, where=where)
        soft, hard = (field(entry, key, int, where=where) for key in ("soft", "hard"))
        if name.removeprefix("RLIMIT_") not in RLIMITS or not name.startswith("RLIMIT_"):
            raise Error(f"{where}: there is no type {printable(name)}")
        number = RLIMITS.index(name.removeprefix("RLIMIT_"))
        if number in limits:
            raise Error(f"{where}: {name} is there twice")
        if not 0 <= soft <= hard < 2**64:
            raise Error(f"{where}: {name} needs a soft limit from 0 to the hard one")
        limits[number] = (number, soft, hard)
    return list(limits.values())


def parse_io_priority(spec):
    if spec is None:
        return None
    where = "config.json: process.ioPriority"
    name, priority = field(spec, "class", str, where=where), field(spec, "priority", int, 0, where)
    if name not in IO_CLASSES or not 0 <= priority <= 7:
        raise Error(f"{where} needs one of {', '.join(IO_CLASSES)} and a priority from 0 to 7")
    return IO_CLASSES[name] << 13 | priority


def parse_scheduler(spec):
    """The fields of struct sched_attr, sched_setattr(2)."""
    if spec is None:
        return None
    where = "config.json: process.scheduler"
    name, flags = field(spec, "policy", str, where=where), 0
    if not name.startswith("SCHED_") or name.removeprefix("SCHED_") not in POLICIES:
        raise Error(f"{where}: there is no policy {printable(name)}")
    policy = POLICIES[name.removeprefix("SCHED_")]
    for name in strings(spec, "flags", where):
        if name.removeprefix("SCHED_FLAG_") not in SCHEDULER_FLAGS:
            raise Error(f"{where}: there is no flag {printable(name)}")
        flags |= SCHEDULER_FLAGS[name.removeprefix("SCHED_FLAG_")]
    numbers = [field(spec, key, int, 0, where) for key in ("nice", "priority", "runtime", "deadline", "period")]
    if not -20 <= numbers[0] <= 19 or not all(0 <= number < 2**63 for number in numbers[1:]):
        raise Error(f"{where}: nice must be from -20 to 19, the other numbers not below 0")
    return (policy, flags, *numbers)


def parse_linux(spec, namespaces):
    where = "config.json: linux"
    sysctl = field(spec, "sysctl", dict, {}, where)
    for name, value in sysctl.items():
        if not isinstance(value, str) or ".." in name or name.startswith("/"):
            raise Error(f"{where}: sysctl must be names, such as net.ipv4.ip_forward, with strings")
    propagation = field(spec, "rootfsPropagation", str, "", where)
    if propagation not in PROPAGATIONS:
        raise Error(f"{where}: there is no rootfsPropagation {printable(propagation)}")
    personality = field(field(spec, "personality", dict, {}, where), "domain", str, "", where + ".personality")
    if personality not in PERSONALITIES:
        raise Error(f"{where}.personality: there is no domain {printable(personality)}")
    return Linux(
        pid_namespace="pid" in namespaces,
        devices=[parse_device(device) for device in field(spec, "devices", list, [], where)],
        sysctl=sysctl,
        masked_paths=absolute_paths(spec, "maskedPaths", where),
        readonly_paths=absolute_paths(spec, "readonlyPaths", where),
        propagation=PROPAGATIONS[propagation] and PROPAGATIONS[propagation] | MS_REC,
        personality=PERSONALITIES[personality],
        cgroup=parse_cgroup(field(spec, "resources", dict, {}, where), where + ".resources"),
        seccomp=field(spec, "seccomp", dict, None, where),
    )


PERSONALITIES = {"": None, "LINUX": 0, "LINUX32": 8}  # <sys/personality.h>


def parse_cgroup(resources, where):
    """What of linux.resources becomes a limit of the guest's kernel: file of cgroup v2 and its content."""
    files = {}
    pids = field(field(resources, "pids", dict, {}, where), "limit", int, 0, where + ".pids")
    if pids > 0:
        files["pids.max"] = str(pids)
    for entry in field(resources, "hugepageLimits", list, [], where):
        if not isinstance(entry, dict):
            raise Error(f"{where}.hugepageLimits must hold objects")
        size = field(entry, "pageSize", str, where=where + ".hugepageLimits")
        if not (size[:-2].isdecimal() and size[-2:] in ("KB", "MB", "GB")):
            raise Error(f"{where}.hugepageLimits: pageSize must be a size such as 2MB, not {printable(size)}")
        files[f"hugetlb.{size}.max"] = str(field(entry, "limit", int, where=where + ".hugepageLimits"))
    for name, value in field(resources, "unified", dict, {}, where).items():
        if "/" in name or not isinstance(value, str):
            raise Error(f"{where}.unified must be names of files, such as memory.high, with strings")
        files[name] = value
    return files


def absolute_paths(spec, key, where):
    paths = strings(spec, key, where)
    if not all(path.startswith("/") for path in paths):
        raise Error(f"{where}: {key} must hold absolute paths")
    return paths


def parse_device(spec):
    """config-linux.md "Devices": a node for the guest's kernel, which knows only the devices of its VM."""
    where = "config.json: linux.devices"
    if not isinstance(spec, dict):
        raise Error(f"{where} must hold objects")
    path, kind = field(spec, "path", str, where=where), field(spec, "type", str, where=where)
    if kind not in DEVICE_TYPES or not path.startswith("/"):
        raise Error(f"{where} needs an absolute path and a type of c, b, u or p")
    default = REQUIRED if kind != "p" else 0
    major, minor = (field(spec, key, int, default, where) for key in ("major", "minor"))
    mode = field(spec, "fileMode", int, 0o666, where) & 0o7777
    uid, gid = (field(spec, key, int, 0, where) for key in ("uid", "gid"))
    if not all(0 <= number < 2**32 for number in (major, minor, uid, gid)):
        raise Error(f"{where}: the numbers of {path} must be from 0 to 4294967295")
    return (path, DEVICE_TYPES[kind] | mode, major, minor, uid, gid)


def parse_resources(spec, where, base):
    """Resources of runtime-spec config-linux.md; base: those fields of ours that are not in spec."""
    memory, cpu = field(spec, "memory", dict, {}, where), field(spec, "cpu", dict, {}, where)

    def number(section, name, key):
        return max(-1, field(section, key, int, 0, f"{where}.{name}"))

    cpus = field(cpu, "cpus", str, "", where + ".cpu")
    if cpus.strip("0123456789,-"):
        raise Error(f"{where}.cpu: cpus must be a list such as 0-3,7")
    return Resources(
        memory=number(memory, "memory", "limit"), quota=number(cpu, "cpu", "quota"),
        period=max(0, number(cpu, "cpu", "period")) or 100000,
        shares=max(0, number(cpu, "cpu", "shares")), cpus=cpus, **base,
    )  # fmt: skip


# in the order of a container's life; runtime-spec config.md "POSIX-platform Hooks"
HOOK_KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def parse_hooks(hooks, kind):
    """The Hooks of one kind of config.json's hooks object."""
    parsed, where = [], f"config.json: hooks.{kind}"
    for spec in field(hooks, kind, list, [], "config.json: hooks"):
        if not isinstance(spec, dict):
            raise Error(f"{where} must hold objects")
        path, timeout = field(spec, "path", str, where=where), field(spec, "timeout", int, None, where)
        if not path.startswith("/"):
            raise Error(f"{where}: path must be absolute")
        if timeout is not None and not 0 < timeout < 1 << 31:
            raise Error(f"{where}: timeout must be greater than 0, and fewer than 2147483648 seconds")
        args, env = strings(spec, "args", where) or [path], strings(spec, "env", where)
        parsed.append(Hook(path=path, args=args, env=env, timeout=timeout or 0))
    return parsed


def parse_mount(bundle, spec):
    where = "config.json: mounts"
    if not isinstance(spec, dict):
        raise Error(f"{where} must hold objects")
    destination = field(spec, "destination", str, where=where)
    kind = field(spec, "type", str, "", where)
    source = field(spec, "source", str, "", where)
    flags, data, propagation, copy_up = 0, [], 0, False
    for option in strings(spec, "options", where):
        if option in ("tmpcopyup", "notmpcopyup") and kind == "tmpfs":
            copy_up = option == "tmpcopyup"  # not the kernel's, but container engines'
        elif option in MOUNT_OPTIONS:
            add, remove = MOUNT_OPTIONS[option]
            flags = (flags | add) & ~remove
        elif option in PROPAGATIONS:
            propagation = PROPAGATIONS[option]
        else:
            data.append(option)
    if os.path.normpath("/" + destination).strip("/") == "":
        raise Error(f"cannot mount {source} over the rootfs at /{destination.lstrip('/')}: name it as root.path")
    if spec.get("uidMappings") or spec.get("gidMappings"):
        raise Error(f"cannot mount {source} at {destination}: ID-mapped mounts are not supported")
    if kind == "bind":
        flags |= MS_BIND
    if flags & MS_BIND:
        source = os.path.join(bundle, source)
        if not os.path.exists(source):
            raise Error(f"cannot mount {source} at {destination}: the source does not exist")
        if destination.rstrip("/") == "/dev/shm" and is_empty_memory(source):
            # shared memory is shared inside one VM only: the guest's own is memory, dom0's would be 9p
            kind, flags, data = "tmpfs", flags & ~(MS_BIND | MS_REC), ["mode=1777", f"size={size_of(source) >> 10}k"]
            source = "shm"
    if flags & MS_BIND:
        if data:
            raise Error(f"cannot mount {source} at {destination}: a bind mount has no option {data[0]} here")
    elif not kind:
        raise Error(f"cannot mount at {destination}: the mount has no type")
    if kind == "cgroup":
        data = []  # controllers of version 1
    return Mount(
        destination="/" + destination.lstrip("/"), type=kind, source=source, flags=flags, data=",".join(data),
        propagation=0 if propagation & MS_PRIVATE else propagation, copy_up=copy_up,
    )  # fmt: skip


def is_empty_memory(path):
    """Whether an engine has mounted a tmpfs there for one container."""
    return os.path.ismount(path) and os.major(os.stat(path).st_dev) == 0 and not os.listdir(path)


def size_of(path):
    """Bytes of the file system at path."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


# ==== seccomp ============================================================================================
# linux.seccomp (runtime-spec config-linux.md) as a program of seccomp(2), with the meaning that runc and
# libseccomp give it.  System calls are named in it: the guest knows the numbers of its architecture.

# <linux/audit.h>: of the machine, and of its 32-bit programs
SECCOMP_ARCHITECTURES = {
    "x86_64": (("SCMP_ARCH_X86_64", 0xC000003E), ("SCMP_ARCH_X86", 0x40000003)),
    "aarch64": (("SCMP_ARCH_AARCH64", 0xC00000B7),),
    "armv7l": (("SCMP_ARCH_ARM", 0x40000028),),
}  # fmt: skip
# <linux/seccomp.h>; those with data carry it in the lower half
SECCOMP_ACTIONS = {
    "SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000, "SCMP_ACT_ERRNO": 0x00050000, "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000,
}  # fmt: skip
SECCOMP_WITH_DATA = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
# of <linux/seccomp.h>; 0: what has no object here, with one thread and no listener
SECCOMP_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 0,
}  # fmt: skip
EPERM, ENOSYS = 1, 38
# <linux/bpf_common.h>: BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_RET|K, BPF_JMP|..|K
LOAD, AND, RETURN, JUMP, IF_EQUAL, IF_GREATER, IF_NOT_LESS = 0x20, 0x54, 0x06, 0x05, 0x15, 0x25, 0x35
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16  # struct seccomp_data, little-endian
FILTER_MAX = 4096  # instructions, BPF_MAXINSNS


def compile_seccomp(spec, machine):
    """The flags of seccomp(2) and the program: instructions (code, jt, jf, k), k a number or a system call's name.

    None if there is nothing to filter.  machine: as uname(2) names it.  Raises Error.
    """
    where = "config.json: linux.seccomp"
    flags, default = 0, seccomp_action(spec, "defaultAction", "defaultErrnoRet", where)
    for flag in strings(spec, "flags", where):
        if flag not in SECCOMP_FLAGS:
            raise Error(f"{where}: there is no flag {printable(flag)}")
        flags |= SECCOMP_FLAGS[flag]
    if field(spec, "listenerPath", str, "", where):
        raise Error(f"{where}: listenerPath cannot be served, for no process on this host sees into the VM")
    if machine not in SECCOMP_ARCHITECTURES:
        raise Error(f"{where} cannot be applied on {machine}: leave it out")
    rules = seccomp_rules(field(spec, "syscalls", list, [], where), default, where)
    if not rules and default == SECCOMP_ACTIONS["SCMP_ACT_ALLOW"]:
        return None
    wanted, program = strings(spec, "architectures", where), [(LOAD, 0, 0, ARCHITECTURE_OFFSET)]
    for place, (name, number) in enumerate(SECCOMP_ARCHITECTURES[machine]):
        if place == 0 or name in wanted:
            block = seccomp_block(rules, default, "-" if place else "")
            program += [(IF_EQUAL, 1, 0, number), (JUMP, 0, 0, len(block)), *block]
    program.append((RETURN, 0, 0, SECCOMP_ACTIONS["SCMP_ACT_KILL"]))  # programs of an architecture that is not named
    if len(program) > FILTER_MAX:
        raise Error(f"{where} has too many rules: they make {len(program)} instructions, and {FILTER_MAX} are possible")
    return flags, program


def seccomp_action(spec, key, errno_key, where):
    """The value that the filter returns."""
    name = field(spec, key, str, where=where)
    if name not in SECCOMP_ACTIONS:
        raise Error(f"{where}: the {key} {printable(name)} is not possible in a VM")
    data = field(spec, errno_key, int, EPERM, where)
    if not 0 <= data < 1 << 16:
        raise Error(f"{where}: {errno_key} must be from 0 to 65535")
    return SECCOMP_ACTIONS[name] | (data if name in SECCOMP_WITH_DATA else 0)


def seccomp_rules(entries, default, where):
    """System call's name: [(conditions, action)].  One without conditions stands alone."""
    rules = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise Error(f"{where}.syscalls must hold objects")
        action = seccomp_action(entry, "action", "errnoRet", where + ".syscalls")
        args = [seccomp_condition(arg, where) for arg in field(entry, "args", list, [], where + ".syscalls")]
        # of several conditions on one argument one is enough, as runc has it
        repeated = len({index for index, *_ in args}) < len(args)
        alternatives = [[arg] for arg in args] if repeated else [args]
        for name in strings(entry, "names", where + ".syscalls"):
            if not name.isidentifier():
                raise Error(f"{where}.syscalls: {printable(name)} is not the name of a system call")
            if action == default:
                continue
            if not args:
                rules[name] = [([], action)]
            elif rules.get(name, [([None], 0)])[0][0]:
                rules.setdefault(name, []).extend((conditions, action) for conditions in alternatives)
    return rules


SECCOMP_OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")


def seccomp_condition(spec, where):
    """(index, operator, value, mask) of an entry of args."""
    where += ".syscalls.args"
    if not isinstance(spec, dict):
        raise Error(f"{where} must hold objects")
    operator = field(spec, "op", str, where=where).removeprefix("SCMP_CMP_")
    index, value, second = (field(spec, key, int, 0, where) for key in ("index", "value", "valueTwo"))
    if operator not in SECCOMP_OPERATORS or not 0 <= index < 6 or not all(0 <= n < 1 << 64 for n in (value, second)):
        raise Error(f"{where}: need an op such as SCMP_CMP_EQ, an index from 0 to 5 and values of 64 bits")
    if operator == "MASKED_EQ":
        return index, "EQ", second & value, value
    return index, operator, value, (1 << 64) - 1


def seccomp_block(rules, default, prefix):
    """The instructions for the programs of one architecture."""
    block = [(LOAD, 0, 0, NUMBER_OFFSET)]
    if default not in (SECCOMP_ACTIONS["SCMP_ACT_ALLOW"], SECCOMP_ACTIONS["SCMP_ACT_LOG"]):
        # as runc: what is newer than all that the filter names is not there, and the C library does without
        block += [(IF_GREATER, 0, 1, prefix + "max"), (RETURN, 0, 0, SECCOMP_ACTIONS["SCMP_ACT_ERRNO"] | ENOSYS)]
    for name in sorted(rules):
        code = []
        for conditions, action in rules[name]:
            tests = [instruction for condition in conditions for instruction in seccomp_test(condition)]
            # a test jumps to its end to pass, and past the action to fail
            code += [
                (operation, *(len(tests) - at if jump == FAIL else jump for jump in jumps), operand)
                for at, (operation, *jumps, operand) in enumerate(tests)
            ]
            code.append((RETURN, 0, 0, action))
        if rules[name][0][0]:
            code.append((RETURN, 0, 0, default))
        far = len(code) > 255
        jump = (
            [(IF_EQUAL, 1, 0, prefix + name), (JUMP, 0, 0, len(code))]
            if far
            else [(IF_EQUAL, 0, len(code), prefix + name)]
        )
        block += [*jump, *code]
    return [*block, (RETURN, 0, 0, default)]


FAIL = -1


def seccomp_test(condition):
    """Instructions that go on behind the last one if the condition holds; FAIL: where to jump if not."""
    index, operator, value, mask = condition
    low = ARGUMENTS_OFFSET + 8 * index
    (high_value, low_value), (high_mask, low_mask) = divmod(value, 1 << 32), divmod(mask, 1 << 32)

    def load(offset, mask):
        return [(LOAD, 0, 0, offset)] + ([(AND, 0, 0, mask)] if mask != 0xFFFFFFFF else [])

    low_test = {
        "EQ": (IF_EQUAL, 0, FAIL), "NE": (IF_EQUAL, FAIL, 0), "GT": (IF_GREATER, 0, FAIL), "LE": (IF_GREATER, FAIL, 0),
        "GE": (IF_NOT_LESS, 0, FAIL), "LT": (IF_NOT_LESS, FAIL, 0),
    }[operator]  # fmt: skip
    end = [*load(low, low_mask), (*low_test, low_value)]
    skip = len(end)  # past the lower half, where the upper one decides
    high_test = {
        "EQ": [(IF_EQUAL, 0, FAIL, high_value)],
        "NE": [(IF_EQUAL, 0, skip, high_value)],
        "GT": [(IF_GREATER, skip + 1, 0, high_value), (IF_EQUAL, 0, FAIL, high_value)],
        "LT": [(IF_NOT_LESS, 0, skip + 1, high_value), (IF_EQUAL, 0, FAIL, high_value)],
    }
    high_test["GE"], high_test["LE"] = high_test["GT"], high_test["LT"]
    return [*load(low + 4, high_mask), *high_test[operator], *end]


# ==== cpio ===============================================================================================
# The archive that the kernel unpacks as its initramfs: "newc", Documentation/driver-api/early-userspace
# in the kernel sources.  Archives may follow one another; an uncompressed one starts at a multiple of 4.

PATH_MAX = 4096  # bytes with the NUL, <linux/limits.h>


def cpio_header(name, mode, size, inode=0, rdev=0, owner=(0, 0), links=1, mtime=0):
    """What stands before a member's content; mode as in st_mode, owner: uid and gid, mtime: seconds."""
    raw = os.fsencode(name) + b"\0"
    if size >= 2**32:
        raise Error(f"cannot pack {name}: the archive format ends at 4 GiB")
    if len(raw) > PATH_MAX:
        raise Error(f"cannot pack {name[:100]}...: its path is longer than the {PATH_MAX} bytes that a kernel takes")
    devices = (0, 0, os.major(rdev), os.minor(rdev))
    fields = (inode, mode, *owner, links, max(0, mtime) & 0xFFFFFFFF, size, *devices, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in fields) + raw
    return header + padding(len(header))


def padding(size):
    """What follows a header or content of that size."""
    return b"\0" * (-size % 4)


def cpio_entry(name, mode, data=b"", inode=0, rdev=0):
    """One member.  Owner root, time 0: the same input gives the same bytes."""
    return cpio_header(name, mode, len(data), inode, rdev) + data + padding(len(data))


def cpio_archive(entries):
    """entries: (name, mode, data[, rdev]), folders before what is in them."""
    members = [cpio_entry(*entry[:3], inode, *entry[3:]) for inode, entry in enumerate(entries, 1)]
    return b"".join(members) + cpio_entry("TRAILER!!!", 0)


def folder_entries(folder, prefix=""):
    """What cpio_archive needs of a folder, sorted by name; hard links become copies."""
    import stat

    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            data = os.fsencode(os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                data = file.read()
        else:
            data = b""
        yield (prefix + name, status.st_mode, data, status.st_rdev)
        if stat.S_ISDIR(status.st_mode):
            yield from folder_entries(path, f"{prefix}{name}/")


def pack_initrd(folder, output):
    """Packs folder into the gzip'ed archive output, replacing it in one step."""
    import gzip

    packed = gzip.compress(cpio_archive(folder_entries(folder)), 9, mtime=0)
    temporary = f"{output}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(packed)
    os.rename(temporary, output)


# ==== programs ===========================================================================================
# System calls that Python has no function for, and programs of the host's that get JSON and have a time limit.

SIGHUP, SIGKILL, SIGWINCH = 1, 9, 28  # import signal costs a tenth of what `state` takes
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000  # <linux/sched.h>


C_LIBRARY = {}  # what system_call() has made of it


def system_call(name, *args):
    """A function of the C library that takes numbers, as long, and strings, and returns an int; raises OSError."""
    import _ctypes  # ctypes adds to it what takes seven times as long to import

    if not C_LIBRARY:

        class Int(_ctypes._SimpleCData):
            _type_ = "i"

        class Long(_ctypes._SimpleCData):
            _type_ = "l"

        class Function(_ctypes.CFuncPtr):
            _flags_, _restype_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO, Int

        C_LIBRARY.update(long=Long, function=Function, handle=_ctypes.dlopen(None, 0))
    function = C_LIBRARY["function"](_ctypes.dlsym(C_LIBRARY["handle"], name))
    args = [C_LIBRARY["long"](arg) if isinstance(arg, int) else arg and os.fsencode(arg) for arg in args]
    result = function(*args)
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def default_signals():
    """Python ignores SIGPIPE, and so would a program that it executes."""
    import _signal  # signal adds enums to it, which take longer than all else that a child does

    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)


def run_program(argv, path, env, stdin, timeout=None, folder=None, namespaces=()):
    """Runs a program to its end or its timeout, in seconds; returns what went wrong, or "", its stdout and its stderr.

    env: a dict, all that it gets.  folder: its working directory, if that is there.  namespaces: paths of those that it
    joins.
    """
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]  # never full, as a pipe may be
    os.write(files[0], stdin)
    os.lseek(files[0], 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        execute_program(argv, path, env, files, folder, namespaces)
    ended, status = reap(pid, timeout, os.killpg)
    outputs = [os.pread(fd, OUTPUT_MAX, 0) for fd in files[1:]]
    for fd in files:
        os.close(fd)
    reason = f"signal {-status}" if status < 0 else f"exit status {status}" if status else ""
    return (reason if ended else f"ran past its time of {timeout} s", *outputs)


OUTPUT_MAX = 1 << 20  # bytes


def reap(pid, timeout, kill):
    """Waits for a child, and kills it after a timeout, in seconds; returns whether it has ended by itself, and its exit
    status, below 0 for a signal."""
    import select

    pidfd = os.pidfd_open(pid)
    ended = bool(select.select([pidfd], [], [], timeout)[0])
    os.close(pidfd)
    if not ended:
        kill(pid, SIGKILL)
    return ended, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take_ordinary_score():
    """Lets the kernel end us and what we start like anything else when memory is short: engines have themselves
    spared, and what unpacks an image or serves a guest must not be."""
    path = "/proc/self/oom_score_adj"
    try:
        with open(path, encoding="ascii") as file:
            score = int(file.read())
        if score < 0:
            with open(path, "w", encoding="ascii") as file:
                file.write("0")
    except OSError:
        pass  # where there is no /proc


def execute_program(argv, path, env, files, folder, namespaces):
    """The program's side of the fork; never returns."""
    try:
        os.setsid()  # a group of its own, to be killed with its children
        for target, source in enumerate(files):
            os.dup2(source, target)
        for namespace in [os.open(name, os.O_RDONLY) for name in namespaces]:
            system_call("setns", namespace, 0)
        if folder and os.path.isdir(folder):
            os.chdir(folder)
        default_signals()
        os.execve(path, argv, env)
    except BaseException as error:  # nothing may return into the caller's side
        os.write(2, f"cannot execute {path}: {error}".encode())
    os._exit(127)


# ==== xenstore ===========================================================================================
# A client of xenstored's socket: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt.

XS_DIRECTORY, XS_READ, XS_WATCH = 1, 2, 4
XS_TRANSACTION_START, XS_TRANSACTION_END = 6, 7
XS_WRITE, XS_RM, XS_SET_PERMS, XS_WATCH_EVENT, XS_ERROR = 11, 13, 14, 15, 16
XS_HEADER = "<IIII"  # type, req_id, tx_id, length of the payload
XENSTORED_SOCKET = "/run/xenstored/socket"
XENBUS_DEVICE = "/dev/xen/xenbus"  # the way where xenstored is a VM of its own


class XenstoreError(Error):
    """xenstored's refusal; code is its name, such as ENOENT."""

    def __init__(self, operation, path, code):
        super().__init__(f"cannot {operation} {path} in xenstore: {code}")
        self.code = code


class Xenstore:
    """A connection.  Watch events that come between request and reply wait in `events`."""

    def __init__(self):
        import _socket  # socket adds enums and selectors to it, which take longer to import than this takes

        try:
            self.socket = _socket.socket(_socket.AF_UNIX)
            self.socket.connect(XENSTORED_SOCKET)
            self.fd = self.socket.fileno()
        except OSError:
            try:
                self.fd = os.open(XENBUS_DEVICE, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise Error(f"cannot connect to xenstored ({error.strerror}): is this a Xen dom0?") from None
        self.events = []

    def request(self, kind, operation, path, payload, transaction=0):
        return self.exchange([(kind, operation, path, payload)], transaction)[0]

    def exchange(self, requests, transaction=0):
        """Sends requests (type, operation, path, payload) one behind the other, and then takes their replies, which
        are returned: a round trip for all.  Raises the first XenstoreError among them."""
        import struct

        for kind, _, _, payload in requests:  # a write each: /dev/xen/xenbus takes no more at once
            message = struct.pack(XS_HEADER, kind, 0, transaction, len(payload)) + payload
            while message:
                message = message[os.write(self.fd, message) :]
        replies, failure = [], None
        for _, operation, path, _ in requests:
            reply, body = self._receive()
            while reply == XS_WATCH_EVENT:
                self.events.append(body)
                reply, body = self._receive()
            if reply == XS_ERROR:
                code = body.rstrip(b"\0").decode("ascii", "replace")
                failure = failure or XenstoreError(operation, path, code)
            replies.append(body)
        if failure:
            raise failure
        return replies

    def _receive(self):
        import struct

        kind, _, _, length = struct.unpack(XS_HEADER, self._receive_exactly(16))
        return kind, self._receive_exactly(length)

    def _receive_exactly(self, length):
        data = b""
        while len(data) < length:
            chunk = os.read(self.fd, length - len(data))
            if not chunk:
                raise Error("xenstored has closed the connection")
            data += chunk
        return data

    def read(self, path, default=None, transaction=0):
        """The value as text (never trusted, so undecodable bytes are replaced); default where there is no node."""
        try:
            body = self.request(XS_READ, "read", path, path.encode() + b"\0", transaction)
            return body.decode("utf-8", "replace")
        except XenstoreError as error:
            if error.code == "ENOENT":
                return default
            raise

    def list(self, path, transaction=0):
        """Names of the nodes below path, [] where there is none."""
        try:
            body = self.request(XS_DIRECTORY, "list", path, path.encode() + b"\0", transaction)
        except XenstoreError as error:
            if error.code == "ENOENT":
                return []
            raise
        return [name.decode("ascii", "replace") for name in body.split(b"\0") if name]

    def write(self, path, value, transaction=0):
        self.write_all([(path, value)], transaction)

    def write_all(self, steps, transaction=0):
        """Each step is (path, value), which makes a node with its parent's permissions, or (path, permissions) of a
        node, such as ("n0", "r5"): xenstore.txt "Permissions"."""
        requests = []
        for path, value in steps:
            if isinstance(value, str):
                requests.append((XS_WRITE, "write", path, path.encode() + b"\0" + value.encode()))
            else:
                listed = "".join(entry + "\0" for entry in (path, *value))
                requests.append((XS_SET_PERMS, "set the permissions of", path, listed.encode()))
        self.exchange(requests, transaction)

    def remove(self, path, transaction=0):
        """Removes path and all below it; no error where there is none."""
        try:
            self.request(XS_RM, "remove", path, path.encode() + b"\0", transaction)
        except XenstoreError as error:
            if error.code != "ENOENT":
                raise

    def watch(self, *watches):
        """watches: (path, token)."""
        self.exchange([(XS_WATCH, "watch", path, f"{path}\0{token}\0".encode()) for path, token in watches])

    def take_events(self):
        """The tokens of the watches that have fired, each once; blocks if there is none yet."""
        while not self.events:
            kind, body = self._receive()
            if kind == XS_WATCH_EVENT:
                self.events.append(body)
        events, self.events = self.events, []
        return list(dict.fromkeys(event.split(b"\0")[1].decode("ascii", "replace") for event in events))

    def transaction(self, work):
        """Runs work(transaction id), again if somebody else's change came between; a guest that makes changes
        without end is refused in the end."""
        for attempt in range(100):
            number = int(self.request(XS_TRANSACTION_START, "start a transaction", "", b"\0").rstrip(b"\0"))
            try:
                work(number)
            except BaseException:
                self.request(XS_TRANSACTION_END, "drop a transaction", "", b"F\0", number)
                raise
            try:
                self.request(XS_TRANSACTION_END, "end a transaction", "", b"T\0", number)
                return
            except XenstoreError as error:
                if error.code != "EAGAIN" or attempt == 99:
                    raise


def find_domain(xenstore, uuid):
    """The domid of the domain with this uuid, or None."""
    for domid in reversed(xenstore.list("/local/domain")):
        if xenstore.read(f"/local/domain/{domid}/vm") == f"/vm/{uuid}":
            return int(domid)
    return None


# ==== xl =================================================================================================
# The only place where xl is called, and where its configuration grammar (libxlu) is written.

LOOK_TIME_LIMIT = 5  # seconds that a monitor waits for another's look at all domains
XL_TIME_LIMIT = 300  # seconds that xl has; what it waits for itself, such as a QEMU, has less
# bytes of memory that xl has to unpack a kernel, and QEMU for all that a guest asks it for: 128 requests at once are
# 128 MiB of coroutines and 64 threads.  RLIMIT_DATA counts what is written only here, not the VM's memory that xl maps.
XL_DATA, XL_STACK = 384 << 20, 1 << 20


def xl(*args, data_limit=None):
    """Runs xl; returns (exit status, its stdout and stderr as text).

    data_limit: bytes of memory that xl, and each program that it starts, may have; and xl does not outlive a caller
    that is killed.
    """
    take_ordinary_score()
    null, output = os.open("/dev/null", os.O_RDWR), os.memfd_create("xl")
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in ((null, 0), (output, 1), (output, 2))]
    environment = {**os.environ, "PATH": PATH}
    try:
        if data_limit:
            pid = spawn_tied(find_xl(), ["xl", *args], environment, actions, data_limit)
        else:
            # Python ignores SIGPIPE; xl and the device models it starts must not inherit that
            pid = os.posix_spawn(find_xl(), ["xl", *args], environment, file_actions=actions, setsigdef=[13])
        ended, status = reap(pid, XL_TIME_LIMIT, os.kill)
        text = os.pread(output, 1 << 16, 0).decode("utf-8", "replace")
        return status, text if ended else f"{text}\nxl has not ended in {XL_TIME_LIMIT} s: is xenstored stuck?"
    finally:
        os.close(null)
        os.close(output)


def spawn_tied(path, argv, environment, actions, data_limit):
    """posix_spawn(3) of a process that gets SIGKILL when we die (prctl(2), PR_SET_PDEATHSIG)."""
    import resource

    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    try:
        system_call("prctl", 1, SIGKILL)
        if os.getppid() == parent:
            for _, source, target in actions:
                os.dup2(source, target)
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))
            resource.setrlimit(resource.RLIMIT_STACK, (XL_STACK, XL_STACK))
            default_signals()
            os.execve(path, argv, environment)
    except BaseException:
        pass  # nothing may return into the caller's side
    os._exit(127)


def find_xl():
    """The path of xl.  On Debian the one in PATH is a script that starts that of the running Xen: we do it as well."""
    try:
        version = ".".join(open(f"/sys/hypervisor/version/{part}").read().strip() for part in ("major", "minor"))
    except OSError:
        version = "?"
    for folder in (f"/usr/lib/xen-{version}/bin", *PATH.split(":")):
        path = os.path.join(folder, "xl")
        if os.access(path, os.X_OK):
            return path
    raise Error("cannot find xl: install the Xen tools (Debian: xen-utils), runX drives Xen with it")


def xl_errors(output):
    """The sentences of libxl's messages, without the source positions that it puts before them."""
    import re

    position = re.compile(r"^(libxl|xc): error: (\S+:\d+:\s?\w+: )?(Domain \d+:)?")
    sentences = [position.sub("", line).strip() for line in output.splitlines() if not line.startswith("Parsing")]
    return "; ".join(dict.fromkeys(filter(None, sentences))) or "xl gave no reason"


def quote(text):
    """A string of xl.cfg: libxlu_cfg_l.l knows these escapes and no numeric ones."""
    if "\0" in text:
        raise Error("a string for xl must not hold a NUL")
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return f'"{text}"'


def xl_config(settings):
    """settings: key → str, int or list of str."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, list):
            lines.append(f"{key} = [ {', '.join(map(quote, value))} ]")
        else:
            lines.append(f"{key} = {value if isinstance(value, int) else quote(value)}")
    return "\n".join(lines) + "\n"


def create_domain(path, memory):
    """`xl create` of a paused domain, with no xl left behind.  memory: MiB that the VM may get."""
    # beside what it has of its own, libxc has a few bytes for each page of the VM
    status, output = xl("create", "-e", "-p", "-q", path, data_limit=XL_DATA + (memory << 20 >> 6))
    if status == 0:
        return
    free = xl_info("free_memory")
    if free.isdigit() and int(free) < memory:
        raise Error(f"Xen has not enough memory for a VM of {memory} MiB: {free} MiB are free")
    raise Error(f"xl create failed: {xl_errors(output)}")


def xl_info(key):
    for line in xl("info")[1].splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def host_processors():
    """How many the host has: dom0 may see fewer, and only on x86 its kernel knows of all."""
    folder = "/sys/devices/system/xen_cpu"
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sum(name.startswith("xen_cpu") for name in names) or int(xl_info("nr_cpus") or 1)


def change_domain(*args):
    """An xl command that changes a domain.  Some exit with 0 whatever happens, and only their messages tell."""
    status, output = xl(*map(str, args))
    if status != 0 or output.strip():
        raise Error(f"xl {args[0]} failed: {xl_errors(output)}")


class Listing(Record):
    """A domain in `xl list` (xl.1)."""

    memory: int  # MiB
    state: str  # such as "r-----"; the 4th is s once it is shut down, the 5th why, the 6th d while it is destroyed
    time: float  # seconds of processor time, in tenths

    def end(self):
        """How the domain ended: a letter, or "" while it lives."""
        return "gone" if self.state[5] == "d" else self.state[4] if self.state[3] == "s" else ""


def parse_listing(line):
    """(domid, Listing) of a line of `xl list`; ValueError if it is none."""
    domid, memory, _, state, seconds = line.rsplit(None, 5)[-5:]
    if len(state) < 6:
        raise ValueError(line)
    return int(domid), Listing(memory=int(memory), state=state, time=float(seconds))


def list_domain(domid):
    """The domain's Listing, or None if there is none.  Raises Error if xl cannot tell."""
    status, output = xl("list", str(domid))
    if status != 0:
        if "does not exist" in output:
            return None
        raise Error(f"xl list failed: {xl_errors(output)}")
    try:
        return parse_listing(output.splitlines()[-1])[1]
    except (ValueError, IndexError):
        raise Error(f"cannot understand xl list: {output}") from None


def list_living():
    """The domids of all domains that have not ended; without those whose lines cannot be understood."""
    living = []
    for line in xl("list")[1].splitlines():
        try:
            domid, listing = parse_listing(line)
        except ValueError:
            continue  # the heading, or a message
        if not listing.end():
            living.append(domid)
    return living


def seen_alive(domid):
    """Whether a look at all domains that began after this call finds this one alive; False also if nobody could look.

    The end of any domain wakes every monitor: the first one looks for all that wait, so that xl is started once or
    twice and not as often as there are containers.
    """
    import fcntl

    called = time.monotonic()
    try:
        fd = os.open(LIVING_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # who can read it can lock it
    except OSError:
        return False
    try:
        while time.monotonic() < called + LOOK_TIME_LIMIT:  # one that is stuck must not stop all others
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            return domid in (last_look(fd, called) or look(fd))
    finally:
        os.close(fd)
    return False


def last_look(fd, earliest):
    """The domids of the last look, if it began after that time; [] if it did not, or the file is not understood."""
    try:
        began, *living = os.pread(fd, 1 << 16, 0).decode("ascii").split()
        return [int(domid) for domid in living] if earliest < float(began) < time.monotonic() else []
    except ValueError:
        return []


def look(fd):
    began, living = time.monotonic(), list_living()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, " ".join(map(str, [began, *living])).encode(), 0)
    except OSError:
        pass  # /run is full: the others look for themselves
    return living


def domain_end(domid):
    """How the domain ended: a letter of its Listing, "gone", or "" while it lives."""
    listing = list_domain(domid)
    return listing.end() if listing else "gone"


def destroy_domain(domid):
    """Destroys a domain and what xl started for it; no error if it is gone already."""
    status, output = xl("destroy", str(domid))
    if status != 0 and domain_end(domid) != "gone":
        raise Error(f"xl destroy failed: {xl_errors(output)}")


def find_half_built(uuid):
    """The domid of the domain with this uuid, or None, by the hypervisor's own word: xenstore may not have it yet."""
    status, output = xl("vm-list")
    if status != 0:
        raise Error(f"xl vm-list failed: {xl_errors(output)}")
    for line in output.splitlines():
        words = line.split()
        if words and words[0] == uuid:
            return int(words[1])
    return None


def host_guest_type():
    """PVH where the hypervisor can run it: it needs hardware support, PV does not; on Arm there is only PVH."""
    if os.uname().machine not in ("x86_64", "i686"):
        return "pvh"
    try:
        with open("/sys/hypervisor/properties/capabilities", encoding="utf-8") as file:
            return "pvh" if "hvm-3.0-x86_64" in file.read() else "pv"
    except OSError:
        return "pv"


# ==== PV console =========================================================================================
# The backend of a console (xen/include/public/io/console.h): one shared page, granted by the guest.
#
#     0 ..1023   in    host → guest       3072 in_cons   3076 in_prod    indexes run freely modulo 2^32;
#     1024..3071 out   guest → host       3080 out_cons  3084 out_prod   prod - cons bytes wait in the ring
#
# The page stays mapped, and so readable, when the domain has ended: the last output is never lost.

CONSOLE_IN, CONSOLE_OUT = 1024, 2048  # bytes
CONSOLE_DELAY = 0.1  # seconds that xenconsoled has for what a VM has written last
XENBUS_INITIALISED, XENBUS_CONNECTED, XENBUS_CLOSING, XENBUS_CLOSED = "3", "4", "5", "6"
# <xen/gntdev.h>, <xen/evtchn.h>: _IOC(_IOC_NONE, letter, number, size)
IOCTL_GNTDEV_MAP_GRANT_REF = (24 << 16) | (ord("G") << 8) | 0
IOCTL_EVTCHN_BIND_INTERDOMAIN = (8 << 16) | (ord("E") << 8) | 1
IOCTL_EVTCHN_NOTIFY = (4 << 16) | (ord("E") << 8) | 4


class EventChannels:
    """/dev/xen/evtchn: readable when one of the bound channels has fired."""

    def __init__(self):
        self.fd = os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)

    def bind(self, domid, port):
        """Returns our number for the guest's channel port."""
        import fcntl
        import struct

        request = bytearray(struct.pack("=II", domid, port))  # for bytes, ioctl would not return the number
        return fcntl.ioctl(self.fd, IOCTL_EVTCHN_BIND_INTERDOMAIN, request)

    def notify(self, port):
        import fcntl
        import struct

        fcntl.ioctl(self.fd, IOCTL_EVTCHN_NOTIFY, struct.pack("=I", port))

    def acknowledge(self):
        """Takes what has fired, and lets it fire again: before the rings are looked at, so no event is lost."""
        try:
            os.write(self.fd, os.read(self.fd, 64))
        except BlockingIOError:
            pass


def announce_device(xenstore, kind, domid, number, backend, frontend, transaction):
    """Writes both ends of a new device into xenstore, with more keys for each; returns all of the backend's.

    In one transaction: the guest must see them whole, with their permissions, or not at all.
    """
    ours, theirs = ("n0", f"r{domid}"), (f"n{domid}", "r0")
    front, back = f"/local/domain/{domid}/device/{kind}/{number}", f"/local/domain/0/backend/{kind}/{domid}/{number}"
    backend = {"frontend": front, "frontend-id": str(domid), "online": "1", "state": "1", **backend}
    frontend = {"backend": back, "backend-id": "0", **frontend, "state": "1"}
    steps = [(back, ""), (back, ours), *((f"{back}/{key}", value) for key, value in backend.items())]
    # what the guest is told is not the guest's to change, though it adds more there
    steps += [(front, ""), (front, ours), *((f"{front}/{key}", value) for key, value in frontend.items())]
    xenstore.write_all([*steps, (f"{front}/state", theirs), (front, theirs)], transaction)
    return {**backend, "backend": back}


def announce_listed(xenstore, kind, domid, number, *ends, transaction):
    """announce_device(), and xl lists it too."""
    listed = announce_device(xenstore, kind, domid, number, *ends, transaction)
    node = f"/libxl/{domid}/device/{kind}/{number}"
    xenstore.write_all([(f"{node}/{key}", value) for key, value in listed.items()], transaction)


class Console:
    """Console `number` of a domain: /dev/hvc<number> in the guest."""

    def __init__(self, xenstore, channels, domid, number):
        self.xenstore, self.channels, self.domid, self.number = xenstore, channels, domid, number
        self.frontend = f"/local/domain/{domid}/device/console/{number}"
        self.backend = f"/local/domain/0/backend/console/{domid}/{number}"
        self.page = None

    def announce(self, transaction):
        # a type of our own, so that neither QEMU ("ioemu") nor xenconsoled takes it
        frontend = {"type": "runx", "limit": "0"}
        announce_device(self.xenstore, "console", self.domid, self.number, {}, frontend, transaction)

    def follow(self):
        """Answers a change of the frontend's state; without an answer a guest waits 5 s when it shuts down."""
        state = self.xenstore.read(self.frontend + "/state")
        if state == XENBUS_INITIALISED and self.page is None:
            self._connect()
            self.xenstore.write(self.backend + "/state", XENBUS_CONNECTED)
        elif state in (XENBUS_CLOSING, XENBUS_CLOSED):
            self.xenstore.write(self.backend + "/state", state)

    def _connect(self):
        import fcntl
        import mmap
        import struct

        try:
            reference = int(self.xenstore.read(self.frontend + "/ring-ref"))
            port = int(self.xenstore.read(self.frontend + "/port"))
            grants = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
            request = bytearray(struct.pack("=IIQII", 1, 0, 0, self.domid, reference))
            fcntl.ioctl(grants, IOCTL_GNTDEV_MAP_GRANT_REF, request)
            offset = struct.unpack("=IIQII", request)[2]
            page = mmap.mmap(grants, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
            os.close(grants)
            self.port = self.channels.bind(self.domid, port)
        except (OSError, ValueError, TypeError, struct.error) as error:
            raise Error(f"cannot connect to console {self.number} of domain {self.domid}: {error}") from None
        self.page = memoryview(page)
        self.indexes = self.page[3072:3088].cast("I")  # in_cons, in_prod, out_cons, out_prod

    def take(self):
        """What the guest has written, at most one ring full; b"" if nothing."""
        if self.page is None:
            return b""
        _, _, cons, prod = self.indexes
        count = (prod - cons) & 0xFFFFFFFF
        if count == 0:
            return b""
        if count > CONSOLE_OUT:  # only a guest that means no good writes such an index
            raise Error(f"console {self.number} of domain {self.domid}: the ring's indexes are impossible")
        start = cons % CONSOLE_OUT
        ring = self.page[1024:3072]
        data = bytes(ring[start : start + count]) + bytes(ring[: max(0, start + count - CONSOLE_OUT)])
        self.indexes[2] = prod
        self.channels.notify(self.port)
        return data

    def room(self):
        """How many bytes the guest's side can take now."""
        if self.page is None:
            return 0
        cons, prod = self.indexes[0], self.indexes[1]
        return max(0, CONSOLE_IN - ((prod - cons) & 0xFFFFFFFF))

    def put(self, data):
        """Writes what fits; returns how many bytes that were."""
        data = data[: self.room()]
        if data:
            prod = self.indexes[1]
            start = prod % CONSOLE_IN
            first = min(len(data), CONSOLE_IN - start)
            self.page[start : start + first] = data[:first]
            self.page[0 : len(data) - first] = data[first:]
            self.indexes[1] = (prod + len(data)) & 0xFFFFFFFF
            self.channels.notify(self.port)
        return len(data)


class FirstConsole:
    """The VM's first console, of which xenconsoled makes a pty: for a VM that boots a system of its own."""

    def __init__(self, fd):
        self.fd, self.ended = fd, False

    def take(self):
        """What the guest has written, b"" if nothing."""
        try:
            data = os.read(self.fd, CONSOLE_OUT)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""  # xenconsoled has gone
        self.ended = not data
        return data

    def waits(self):
        """Whether something more comes in time: what the VM has written last may be on its way through xenconsoled."""
        import select

        return not self.ended and bool(select.select([self.fd], [], [], CONSOLE_DELAY)[0])

    def put(self, data):
        """Writes what fits; returns how many bytes that were."""
        try:
            return os.write(self.fd, data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody is there


def remove_backends(xenstore, kind, domid, numbers):
    """Takes backend nodes of a domain out of xenstore, and the folders above once nothing else is in them."""
    folder = f"/local/domain/0/backend/{kind}"

    def remove(transaction):
        for number in numbers:
            xenstore.remove(f"{folder}/{domid}/{number}", transaction)
        for empty in (f"{folder}/{domid}", folder):
            if not xenstore.list(empty, transaction):
                xenstore.remove(empty, transaction)

    xenstore.transaction(remove)


# ==== guest ==============================================================================================
# What runX and the guest's init (initrd/) agree on: /container/config in the ramdisk, and nodes below
# the domain's data/ in xenstore.  All of it is written before the domain runs, but for requests.

# the default devices of runtime-spec config-linux.md: path, major, minor
DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
DEVICE_LINKS = (
    ("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"), ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"), ("pts/ptmx", "ptmx"), ("/proc/kcore", "core"),
)  # fmt: skip
S_IFREG, S_IFDIR, S_IFCHR = 0o100000, 0o040000, 0o020000

MOST_REQUESTS = 150
ESCAPE, END = b"\x10", b"\x10\x04"  # in standard input: see enter.c.  The end of a terminal is a hang-up.


def guest_config(config, bind_sources, state, capabilities):
    """enter's /container/config: NUL-terminated keywords and operands, executed in order.

    bind_sources: for each mount of config that dom0 makes, its path below the share.  state: JSON, for hooks.
    capabilities: of files, {path below the share: bytes}.
    """
    words = [CLONE_NEWPID if config.linux.pid_namespace else 0]
    for path, value in capabilities.items():
        words += ["file_capability", path, len(value), *value]
    if config.linux.cgroup or any(mount.type in ("cgroup", "cgroup2") for mount in config.mounts):
        words += ["cgroup", len(config.linux.cgroup)]
        for item in config.linux.cgroup.items():
            words += item
    bind_sources = iter(bind_sources)
    for mount in config.mounts:
        words += guest_mount(mount, bind_sources)
        if mount.destination == "/dev" and mount.type == "tmpfs":
            for name, major, minor in DEVICES:
                words += ["node", f"/dev/{name}", S_IFCHR | 0o666, major, minor, 0, 0]
            for content, name in DEVICE_LINKS:
                words += ["link", content, f"/dev/{name}"]
    for device in config.linux.devices:
        words += ["node", *device]
    if config.process and config.process.terminal:
        words += ["terminal"]
    if config.process:
        words += ["cwd", config.process.cwd]
    if config.netconf and not any(mount.destination.rstrip("/") == "/etc/resolv.conf" for mount in config.mounts):
        words += ["resolv_conf"]
    for mount in config.mounts:  # now that all is made that was to be made in them
        if mount.is_sealed_late():
            flags = MS_REMOUNT | MS_BIND | mount.flags & ~(MS_REC | RECURSIVE_RO)
            words += ["mount", "", mount.destination, "", flags, ""]
    for name, value in config.linux.sysctl.items():
        words += ["sysctl", f"sys/{name if '/' in name else name.replace('.', '/')}", value]
    for keyword, paths in (("readonly", config.linux.readonly_paths), ("mask", config.linux.masked_paths)):
        for path in paths:
            words += [keyword, path]
    if config.linux.propagation:
        words += ["propagation", "/", config.linux.propagation]
    if config.readonly:  # after the mounts, which may need folders to be made
        words += ["mount", "", "/", "", MS_BIND | MS_REMOUNT | MS_RDONLY, ""]
    words += ["hostname", config.hostname or os.uname().nodename]  # a new UTS namespace begins with the host's too
    if config.domainname:
        words += ["domainname", config.domainname]
    if config.process:
        words += guest_process(config, state)
    return b"".join(str(word).encode("utf-8", "surrogateescape") + b"\0" for word in words)


def guest_process(config, state):
    process, words = config.process, []
    for limit in process.rlimits:
        words += ["rlimit", *limit]
    words += ["oom", process.oom_score_adj]
    if process.io_priority is not None:
        words += ["ioprio", process.io_priority]
    if process.scheduler:
        words += ["scheduler", *process.scheduler]
    if config.linux.personality is not None:
        words += ["personality", config.linux.personality]
    words += ["capabilities", *(process.capabilities[name] for name in CAPABILITY_SETS)]
    if process.no_new_privileges:
        words += ["no_new_privileges"]
    seccomp = config.linux.seccomp and compile_seccomp(config.linux.seccomp, os.uname().machine)
    if seccomp:
        flags, program = seccomp
        words += ["seccomp", flags, len(program), *(operand for instruction in program for operand in instruction)]
    words += ["user", process.uid, process.gid, process.umask]
    hooks = parse_hooks(config.hooks, "startContainer")
    if hooks:
        words += ["state", state]
    for hook in hooks:
        words += ["hook", hook.path, hook.timeout, len(hook.args), *hook.args, len(hook.env), *hook.env]
    for keyword, values in (("group", process.groups), ("arg", process.args), ("env", process.env)):
        for value in values:
            words += [keyword, value]
    return words


def guest_mount(mount, bind_sources):
    target, flags = mount.destination, mount.flags & ~(MS_BIND | MS_REC | RECURSIVE_RO)
    if mount.on_host():
        source = next(bind_sources)
        words = ["mount", source, target, "", MS_BIND | (mount.flags & MS_REC), ""]
        if flags:  # a bind mount takes its options only from a second call
            words += ["mount", source, target, "", MS_BIND | MS_REMOUNT | flags, ""]
    else:
        kind = "cgroup2" if mount.type == "cgroup" else mount.type
        keyword = "copy_up" if mount.copy_up else "mount"
        if mount.is_sealed_late():
            flags &= ~MS_RDONLY
        words = [keyword, mount.source or kind, target, kind, flags, mount.data]
    if mount.propagation:
        words += ["propagation", target, mount.propagation]
    return words


def encode_input(data):
    return data.replace(ESCAPE, ESCAPE + ESCAPE)


def check_alive(xenstore, domid, uuid, transaction=0):
    """Raises NotRunning unless the domain is there: another one may have its number by now, and a write below one that
    is gone would make its folder anew, for ever."""
    if xenstore.read(f"/local/domain/{domid}/vm", transaction=transaction) != f"/vm/{uuid}":
        raise NotRunning()


def shut_down(xenstore, domid, uuid):
    """Asks a VM that boots a system of its own to power off, as `xl shutdown` does."""

    def write(transaction):
        check_alive(xenstore, domid, uuid, transaction)
        xenstore.write(f"/local/domain/{domid}/control/shutdown", "poweroff", transaction=transaction)

    xenstore.transaction(write)


def send_request(xenstore, domid, uuid, request, key=None, data=None):
    """Queues what the guest's init is asked for, and rings; one that is not ready yet looks at the queue by itself.

    request: "kill N", "killall N", "look" or "cpus", see initrd/poweroff.  key: of two requests with one
    key the guest gets the last.  data: nodes to be written with it, below data/.
    """
    domain = f"/local/domain/{domid}"

    def write(transaction):
        check_alive(xenstore, domid, uuid, transaction)
        for name, value in (data or {}).items():
            xenstore.write(f"{domain}/data/{name}", value, transaction=transaction)
        # one reply must hold all their names, or the guest cannot list them any more (xs_wire.h, XENSTORE_PAYLOAD_MAX)
        if len(xenstore.list(f"{domain}/data/request", transaction)) >= MOST_REQUESTS:
            raise Error("the container's VM does not take its signals: kill it with SIGKILL")
        name = f"{domain}/data/request/{key or format(time.time_ns(), '020d')}"
        xenstore.write(name, request, transaction=transaction)
        if xenstore.read(f"{domain}/data/ready", transaction=transaction):
            xenstore.write(f"{domain}/control/shutdown", "poweroff", transaction=transaction)

    xenstore.transaction(write)


# ==== rootfs =============================================================================================
# What the guest gets over 9p: a folder with the rootfs and the bind mounts' sources, put together in the
# monitor's own mount namespace.  The QEMU that exports it lives there too; when both are gone the kernel
# undoes every mount, whoever was killed before, and the host's mount table never shows one.

SYS_OPENAT2, SYS_MOUNT_SETATTR = 437, 442  # the same on every architecture
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4  # <linux/mount.h>
AT_FDCWD, AT_RECURSIVE = -100, 0x8000  # <linux/fcntl.h>
RESOLVE_IN_ROOT = 0x10  # <linux/openat2.h>
LINKS_MAX = 40  # that a path may lead through, as for the kernel
MNT_DETACH = 2  # <sys/mount.h>


def mount(source, target, flags, kind=None, data=None):
    """mount(2); kind: the file system's type, data: its options."""
    import errno

    try:
        system_call("mount", source, target, kind, flags, data)
    except OSError as error:
        reason = f"neither VM nor dom0 has a type {kind}" if error.errno == errno.ENODEV else error.strerror
        raise Error(f"cannot mount {source} at {target}: {reason}") from None


def build_share(folder, config):
    """Fills folder with rootfs/ and mounts/0, 1, …; returns the guest's paths of the latter, below the share."""
    try:
        system_call("unshare", CLONE_NEWNS)
    except OSError as error:
        raise Error(f"cannot make a mount namespace: {error.strerror}") from None
    # the host's unmounts still arrive here, so that nothing stays busy because of us
    mount(None, "/", MS_REC | MS_SLAVE)
    os.mkdir(folder)
    mount(folder, folder, MS_BIND)
    rootfs = os.path.join(folder, "rootfs")
    os.mkdir(rootfs)
    os.mkdir(os.path.join(folder, "mounts"))
    if os.path.isdir(config.rootfs):
        mount(config.rootfs, rootfs, MS_BIND | MS_REC)
        restrict(rootfs)
    paths = []
    for entry in config.mounts:
        if entry.on_host():
            path = f"mounts/{len(paths)}"
            mount_on_host(entry, os.path.join(folder, path))
            paths.append(path)
    # what is left of the folder itself is memory of the host's, which the guest must not fill
    mount(None, folder, MS_BIND | MS_REMOUNT | MS_RDONLY)
    return paths


def mount_on_host(entry, target):
    """Makes a mount of config.json's at target, which is to be exported."""
    if entry.is_folder():
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    if entry.flags & MS_BIND:
        mount(entry.source, target, MS_BIND | (entry.flags & MS_REC))
    else:
        mount(entry.source or entry.type, target, entry.flags & ~RECURSIVE_RO, entry.type, entry.data)
    if not entry.propagation:  # what the host mounts below it later is not the container's
        mount(None, target, MS_REC | MS_PRIVATE)
    restrict(target, entry.flags)


def restrict(target, flags=0):
    """Makes no device of dom0's reachable by a node below target; the guest opens its own devices itself.

    flags: with MS_RDONLY target is read-only, with RECURSIVE_RO what is mounted below it too.  Enforced on
    this side: the guest is not asked.
    """
    import errno

    below = MOUNT_ATTR_RDONLY if flags & RECURSIVE_RO else 0
    try:
        set_mount_attributes(target, MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | below, AT_RECURSIVE)
        if flags & MS_RDONLY:
            set_mount_attributes(target, MOUNT_ATTR_RDONLY, 0)
    except OSError as error:
        if error.errno != errno.ENOSYS or below:
            raise Error(f"cannot restrict the mount {target}: {error.strerror}") from None
        # Linux before 5.12: what is mounted below stays as it is
        kept = os.statvfs(target).f_flag & (MS_RDONLY | MS_NOEXEC)  # <sys/statvfs.h> has the same numbers
        mount(None, target, MS_BIND | MS_REMOUNT | MS_NODEV | MS_NOSUID | kept | flags & MS_RDONLY)


def set_mount_attributes(target, attributes, flags):
    """mount_setattr(2).  Raises OSError."""
    import struct

    values = struct.pack("=QQQQ", attributes, 0, 0, 0)
    system_call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, target, flags, values, len(values))


def open_in_root(root, path):
    """An O_PATH descriptor of path as a process would find it whose root folder is root.  Raises OSError."""
    import struct

    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT)
    try:
        return system_call("syscall", SYS_OPENAT2, root_fd, path, how, len(how))
    finally:
        os.close(root_fd)


def open_folder_in_root(root, path):
    """A descriptor of a folder in root, to be read.  Raises OSError."""
    fd = open_in_root(root, path)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def open_file_in_root(root, path, purpose):
    """A descriptor, O_PATH, of a regular file in root.  Raises Error, that begins with purpose."""
    import stat

    try:
        fd = open_in_root(root, path)
    except OSError as error:
        raise Error(f"{purpose}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Error(f"{purpose}: it is not a regular file")
    return fd


def mount_of(fd):
    """A path that leads to what a descriptor is open for, also where something else is mounted on its name."""
    return f"/proc/self/fd/{fd}"


def change_root(share, config, exported):
    """Makes what dom0 knows of the container's files the root of a mount namespace of our own, in which nothing of
    dom0's can be reached: the rootfs, read-only if the container's is, and its bind mounts.  An empty folder that stays
    so takes the place of what is in the VM only; if nothing is exported, that is all.  Raises Error.
    """
    root, sources = os.path.join(share, "rootfs"), []
    try:
        system_call("unshare", CLONE_NEWNS)
        mount(None, "/", MS_REC | MS_SLAVE)
        if exported:
            names = (f"mounts/{number}" for number, each in enumerate(filter(Mount.on_host, config.mounts)))
            sources = [os.open(os.path.join(share, name), os.O_PATH) for name in names]
        empty = os.path.join(share, "mounts")
        mount("tmpfs", empty, MS_RDONLY | MS_NODEV | MS_NOSUID | MS_NOEXEC, "tmpfs", "mode=755,size=4k")
        sources.append(os.open(empty, os.O_PATH))
        if exported:
            mount_in_root(root, config.mounts, sources)
            restrict(root, MS_RDONLY if config.readonly else 0)
        os.chdir(root if exported else empty)
        for fd in sources:
            os.close(fd)
        pivot_root()
    except OSError as error:
        raise Error(f"cannot make the container's files the root of its mount namespace: {error.strerror}") from None


def mount_in_root(root, mounts, sources):
    """Puts each of the mounts at its place below root, as the guest will do; one that has no place there is left out.

    sources: descriptors of those that dom0 makes, then one of what is seen where the guest's kernel mounts something.
    """
    *on_host, empty = sources
    on_host, missing = iter(on_host), []
    for entry in mounts:
        source = next(on_host) if entry.on_host() else empty
        if entry.destination.startswith(tuple(missing)):
            continue  # it is in a file system of the guest's, for which nothing is made here
        try:
            target = find_in_root(root, entry.destination, entry.is_folder(), make=entry.on_host())
        except OSError:
            missing += [] if entry.on_host() else [entry.destination.rstrip("/") + "/"]
            continue
        try:
            mount(mount_of(source), mount_of(target), MS_BIND | MS_REC)
        except Error:
            pass  # the image has another kind of file there
        os.close(target)


def find_in_root(root, path, folder, make):
    """An O_PATH descriptor of path as a process finds it whose root folder is root.  make: what is missing is made, a
    folder or an empty file, and folders above it; where a link leads to nothing, that is made.  Raises OSError."""
    names = resolve_in_root(root, path)
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        for number, name in enumerate(names, 1):
            try:
                if make and (folder or number < len(names)):
                    os.mkdir(name, 0o755, dir_fd=fd)
                elif make:
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=fd))
            except FileExistsError:
                pass
            above, fd = fd, os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=fd)
            os.close(above)
        return fd
    except BaseException:
        os.close(fd)
        raise


def resolve_in_root(root, path):
    """The names, none of them a link's, by which path leads below root.  What is missing counts as a folder, as for
    runc.  Raises OSError if links lead on without end."""
    import errno

    names, left, links = [], path.split("/"), 0
    while left:
        name = left.pop(0)
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            try:
                link = os.readlink(os.path.join(root, *names, name))
            except OSError:
                names.append(name)
                continue
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            left = link.split("/") + left
            names = [] if link.startswith("/") else names
    return names


def pivot_root():
    """Makes the working folder, a mount, the root of our mount namespace, and lets go of all else.  Raises OSError."""
    import errno

    try:
        system_call("pivot_root", ".", ".")
        system_call("umount2", ".", MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        system_call("mount", ".", "/", None, MS_MOVE, None)  # dom0 runs in its initramfs, which cannot be detached
        system_call("chroot", ".")
    os.chdir("/")


def read_in_root(root, path, limit):
    """The content of a regular file in root, up to limit bytes.  Raises Error."""
    fd = open_file_in_root(root, path, f"cannot read {path} of the container")
    try:
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return file.read(limit)
    finally:
        os.close(fd)


QEMU_FOLDERS = ("/usr/libexec", "/usr/libexec/xen/bin", "/usr/lib/xen/bin", "/usr/local/lib/xen/bin", "/usr/bin")


def has_qemu():
    """Whether this host has a QEMU that libxl may start, in the folders that Xen is built with."""
    folders = filter(os.path.isdir, QEMU_FOLDERS)
    return any("qemu-system-" in name for folder in folders for name in os.listdir(folder))


PAGE = 4096  # bytes
INODE_MEMORY = 1024  # bytes of the guest's for each file, about
SHARE_MAX = 1 << 20  # files, so that a hostile image ends
RAMDISK_OVERHEAD = 18  # MiB that the guest needs beside its files


class Member(Record):
    """Something of the share that goes into a ramdisk."""

    path: str  # below the share
    name: str
    folder: int  # a descriptor of the folder that it is in
    status: os.stat_result
    inode: int  # the same for all names of a file
    size: int  # bytes of content; 0 for the second name of a file


def walk_share(share):
    """The Members of a share, folders before what is in them.  Raises Error.

    Another container may change a volume meanwhile, so no name is followed out of the share.
    """
    import stat

    folders, files, inode = ["."], {}, 0
    while folders:
        parent = folders.pop()
        try:
            folder = open_folder_in_root(share, parent)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Error(f"cannot pack {parent}: {error.strerror}") from None
        try:
            for name in sorted(os.listdir(folder)):
                try:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                inode += 1
                path, number = os.path.join(parent, name).removeprefix("./"), inode
                size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                    number = files.setdefault((status.st_dev, status.st_ino), inode)
                    size = size if number == inode else 0
                yield Member(path=path, name=name, folder=folder, status=status, inode=number, size=size)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(path)
        finally:
            os.close(folder)


def pack_share(output, share, memory):
    """Writes the share as an archive to the open file output, for the guest's /mnt; returns the capabilities of its
    files, {path: bytes}, which an archive cannot hold.  memory: MiB that the VM has.  Raises Error, also if that is not
    enough: while the guest unpacks it, the share is there a second time, and its kernel gives files half of the rest,
    and half as many files as that has pages."""
    size = count = needed = 0
    capabilities = {}
    output.write(cpio_header("mnt", S_IFDIR | 0o755, 0))
    for member in walk_share(share):
        size, count = size + INODE_MEMORY + member.size + -member.size % PAGE, count + 1
        if count > SHARE_MAX:
            raise Error(f"the rootfs and its mounts have more than {SHARE_MAX} files: use org.runx.rootfs=9p")
        needed = RAMDISK_OVERHEAD + (size + 2 * max(size, count * PAGE) >> 20) + 1
        if needed <= memory:  # else it is only to be told how much would be
            pack_member(output, member, capabilities)
    if needed > memory:
        raise Error(
            f"the rootfs and its mounts need a VM of {needed} MiB to be in its memory, and it has {memory}: raise the "
            f"container's memory limit or the annotation org.runx.memory, or use org.runx.rootfs=9p"
        )
    output.write(cpio_entry("TRAILER!!!", 0))
    return capabilities


def pack_member(output, member, capabilities):
    """Writes a Member, and adds the capabilities that it has.  Raises Error."""
    import stat

    try:
        if stat.S_ISREG(member.status.st_mode):
            pack_file(output, member, capabilities)
        else:
            link = stat.S_ISLNK(member.status.st_mode)
            content = os.fsencode(os.readlink(member.name, dir_fd=member.folder)) if link else b""
            output.write(member_header(member, len(content)) + content + padding(len(content)))
    except FileNotFoundError:
        pass  # somebody has removed it meanwhile; nor is it there under runc any more
    except OSError as error:
        raise Error(f"cannot pack {member.path}: {error.strerror}") from None


def member_header(member, size):
    status = member.status
    owner, time_, links = (status.st_uid, status.st_gid), int(status.st_mtime), status.st_nlink
    return cpio_header(f"mnt/{member.path}", status.st_mode, size, member.inode, status.st_rdev, owner, links, time_)


def pack_file(output, member, capabilities):
    """Writes a regular file, and adds its capabilities to those that are found already.  Raises OSError."""
    import errno
    import stat

    file = os.open(member.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=member.folder)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # somebody has put another thing there
        output.write(member_header(member, member.size))
        copy_content(file, output, member.size)
        output.write(padding(member.size))
        if member.status.st_mode & 0o111:
            try:
                capabilities[member.path] = os.getxattr(file, "security.capability")
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
    finally:
        os.close(file)


def copy_content(file, output, size):
    """Copies exactly size bytes: zeros for what the file has lost meanwhile."""
    while size:
        data = os.read(file, min(size, 1 << 20)) or bytes(min(size, 1 << 20))
        output.write(data)
        size -= len(data)


KERNEL_MAX = 128  # MiB of dom0's memory that a kernel of an image may take while it is unpacked
BZIMAGE_HEADER = 0x250  # bytes


def check_boot_file(fd, name, memory, purpose):
    """Raises Error, that begins with purpose, if a kernel or ramdisk does not fit into a VM, or the former into dom0:
    xl has all of it in memory before it finds out.  memory: MiB of the VM, where a packed ramdisk is unpacked."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        unpacked = unpacked_size(file) >> 20 if name == "kernel" else 0
    size = max(os.fstat(fd).st_size >> 20, unpacked)
    if size >= memory:
        raise Error(f"{purpose}: {size} MiB do not fit into a VM of {memory} MiB")
    if unpacked > KERNEL_MAX:
        raise Error(f"{purpose}: unpacked it has {unpacked} MiB, and dom0 has {KERNEL_MAX} for that")


def unpacked_size(file):
    """Bytes that libxc sets aside to unpack a kernel: the number at the end of what is packed, which may be in a
    bzImage (xen/tools/libs/guest, xg_dom_core.c and xg_dom_bzimageloader.c).  0 if it is not packed.

    What is packed twice, only xl's own limit of memory stops.
    """
    import struct

    header, start, end = file.read(BZIMAGE_HEADER), 0, os.fstat(file.fileno()).st_size
    if header[0x202:0x206] == b"HdrS" and len(header) == BZIMAGE_HEADER:
        offset, length = struct.unpack_from("<II", header, 0x248)
        start = 512 * (header[0x1F1] + 1) + offset
        end = min(end, start + length)
    elif not header.startswith(b"\x1f\x8b"):
        return 0
    if end - start < 4:
        return 0  # nothing that could be unpacked
    return struct.unpack("<I", os.pread(file.fileno(), 4, end - 4))[0]


MODULE_MAX, MODULES_MAX = 4 << 20, 16  # bytes, files: the rootfs may be hostile, and dom0's memory is small


def kernel_modules(root, kernel, wanted):
    """What of these a kernel from root has there as modules: (file name, content), in the order to load.

    They are looked up below root's /lib/modules, in the folder whose name the kernel's ends with, as in
    vmlinuz-6.1.0-1-amd64, or in the only one; modules.dep(5).  What is not there, the kernel should have built in.
    """
    folder = list_in_root(root, "/lib/modules")
    names = [name for name in folder if os.path.basename(kernel).endswith(f"-{name}")] or folder
    if len(names) != 1:
        return []
    base = f"/lib/modules/{names[0]}"
    dependencies = {}
    for line in read_in_root(root, f"{base}/modules.dep", MODULE_MAX).decode("utf-8", "replace").splitlines():
        path, _, needed = line.partition(":")
        dependencies[os.path.basename(path).split(".ko")[0].replace("-", "_")] = [*reversed(needed.split()), path]
    paths = list(dict.fromkeys(path for name in wanted for path in dependencies.get(name, ())))
    if len(paths) > MODULES_MAX:
        raise Error(f"the container's {base}/modules.dep names {len(paths)} modules for {' and '.join(wanted)}")
    return [load_module(root, f"{base}/{path}") for path in paths]


def load_module(root, path):
    data, name = read_in_root(root, path, MODULE_MAX), os.path.basename(path)
    purpose = f"cannot unpack the kernel module {path} of the container"
    if name.endswith(".xz"):
        import lzma

        # xz -9 needs that much memory, and an image may ask for 4 GiB
        unpack, failure = lzma.LZMADecompressor(memlimit=64 << 20).decompress, lzma.LZMAError
    elif name.endswith(".gz"):
        import zlib

        unpack, failure = zlib.decompressobj(31).decompress, zlib.error
    elif name.endswith(".ko"):
        return name, data
    else:
        raise Error(f"{purpose}: use .ko, .ko.xz or .ko.gz")
    try:
        data = unpack(data, MODULE_MAX)
    except (failure, MemoryError) as error:
        raise Error(f"{purpose}: {error}") from None
    return name.split(".ko")[0] + ".ko", data


def list_in_root(root, path):
    """The names in a folder in root, [] if it is not there."""
    try:
        folder = open_folder_in_root(root, path)
    except OSError:
        return []
    try:
        return os.listdir(folder)
    finally:
        os.close(folder)


def check_executable(root, config):
    """Finds process.args[0] in root as execvp(3) will in the guest; raises Error in runc's words.

    What a mount of the guest's may cover is not judged here; the guest says it on standard error.
    """
    import errno
    import stat

    process, name = config.process, config.process.args[0]
    if "/" in name:
        candidates = [os.path.join(process.cwd, name)]
    else:
        path = next((value[5:] for value in process.env if value.startswith("PATH=")), "/bin:/usr/bin")
        candidates = [os.path.join(process.cwd, folder, name) for folder in path.split(":")]
    reason = f"stat {name}: no such file or directory" if "/" in name else "executable file not found in $PATH"
    for candidate in candidates:
        if any(f"{candidate}/".startswith(f"{mount.destination.rstrip('/')}/") for mount in config.mounts):
            return
        try:
            fd = open_in_root(root, candidate)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return  # such as a kernel without openat2(2)
            continue
        mode = os.fstat(fd).st_mode
        os.close(fd)
        if stat.S_ISREG(mode) and mode & 0o111:
            return
        reason = "permission denied"
    raise Error(f'unable to start container process: exec: "{name}": {reason}')


# ==== block device =======================================================================================
# A rootfs on a block device, or in an image file behind a loop device: dom0's blkback gives it to the VM at `start`
# (xen/include/public/io/blkif.h), without a script.  Until then it is mounted where the engine has mounted it, never
# at the same time; what a guest has written, runX does not mount again.

DISK, DISK_NAME = 202 << 8, "xvda"  # xen-vbd-interface.7
DISK_TIME_LIMIT = 10.0  # seconds for dom0's kernel to open it
# what the guest's kernel can mount: name, where its magic number is in the superblock, and that
FILE_SYSTEMS = (("ext4", 1080, b"\x53\xef"), ("squashfs", 0, b"hsqs"), ("erofs", 1024, b"\xe2\xe1\xf5\xe0"))
LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A  # <linux/loop.h>
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4


class Disk(Record):
    """Where a rootfs is that a VM gets as a block device."""

    path: str  # of a block device or an image file
    kind: str  # of its file system, as in FILE_SYSTEMS
    writable: bool  # else the VM writes into its memory
    mounted: list  # target, flags, options of dom0's mount that must go before; [] if none must


class HostMount(Record):
    """A line of /proc/<pid>/mountinfo, proc(5)."""

    device: int
    root: str  # of the mount in its file system
    target: str
    options: list
    kind: str
    of_all: list  # options that all mounts of the file system have


def host_mounts(process="self"):
    """The HostMounts of a process.  Raises OSError."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.rstrip("\n").partition(" - ")
            _, _, device, root, target, options = fields.split(" ")[:6]
            kind, _, of_all = rest.split(" ", 2)
            for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                target = target.replace(code, character)
            yield HostMount(
                device=os.makedev(*map(int, device.split(":"))), root=root, target=target, options=options.split(","),
                kind=kind, of_all=of_all.split(","),
            )  # fmt: skip


def top_mount(target):
    """The HostMount that is seen at target, or None."""
    found = None
    for entry in host_mounts():
        if entry.target == target:
            found = entry
    return found


def find_disk(config):
    """The Disk that config.rootfs is, or is mounted from.  Raises Error."""
    path, mounted, writable = config.rootfs, [], not config.readonly
    if os.path.isdir(path):
        top = top_mount(path)
        if not top or top.root != "/" or not os.major(top.device):
            what = f"a mount of {top.kind}" if top else "a folder"
            raise Error(f"the rootfs {path} is {what}, not where a block device is mounted: use org.runx.rootfs=9p")
        path = device_path(top.device)
        if "rw" in top.of_all:
            flags = sum(MOUNT_OPTIONS[option][0] for option in top.options if option in MOUNT_OPTIONS)
            data = [option for option in top.of_all if option not in ("rw", "seclabel")]
            mounted = [top.target, flags, ",".join(data)]
        writable = writable and bool(mounted) and "rw" in top.options
    kind = file_system(path)
    writable = writable and kind == "ext4" and os.stat(path).st_mode & 0o222 and os.access(path, os.W_OK)
    return Disk(path=path, kind=kind, writable=bool(writable), mounted=mounted)


def device_path(device):
    """The node of a block device in /dev.  Raises Error."""
    numbers = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(f"/sys/dev/block/{numbers}/uevent", encoding="utf-8") as file:
            return next(f"/dev/{line[8:].strip()}" for line in file if line.startswith("DEVNAME="))
    except (OSError, StopIteration):
        raise Error(f"cannot find the block device {numbers} in /sys") from None


def file_system(path):
    """Which of FILE_SYSTEMS an image or block device holds.  Raises Error."""
    try:
        with open(path, "rb") as file:
            start = file.read(2048)
    except OSError as error:
        raise Error(f"cannot read the image {path}: {error.strerror}") from None
    for kind, offset, magic in FILE_SYSTEMS:
        if start[offset : offset + len(magic)] == magic:
            return kind
    known = ", ".join(kind for kind, _, _ in FILE_SYSTEMS)
    raise Error(f"{path} holds no file system that a VM can have as its rootfs: make it one of {known}")


def open_disk(disk):
    """A descriptor of the block device; a loop device of ours goes with who has it open last.  Raises Error."""
    import stat

    try:
        if stat.S_ISBLK(os.stat(disk.path).st_mode):
            return os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Error(f"cannot open the block device {disk.path}: {error.strerror}") from None
    return attach_loop(disk.path, disk.writable)


def attach_loop(path, writable):
    """A descriptor of a new loop device with an image file in it.  Raises Error."""
    import errno
    import fcntl
    import struct

    mode = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        file = os.open(path, mode)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        flags = LO_FLAGS_AUTOCLEAR | (0 if writable else LO_FLAGS_READ_ONLY)
        # struct loop_config with its struct loop_info64, in which losetup(8) looks for the name
        request = struct.pack("=II52xI64s176x", file, 0, flags, os.fsencode(path)[:63])
        while True:
            loop = os.open(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}", mode)
            try:
                fcntl.ioctl(loop, LOOP_CONFIGURE, request)
                break
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # somebody else has just taken it
                    raise
        os.close(control)
        os.close(file)
        return loop
    except OSError as error:
        remedy = "is dom0's module loop loaded, of Linux 5.8 or later?"
        raise Error(f"cannot put {path} into a loop device: {error.strerror}; {remedy}") from None


def backing_file(name):
    """The image in the loop device of that name, or None."""
    try:
        with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().rstrip("\n")
    except OSError:
        return None


def check_image(disk, device):
    """Raises Error if the image in a loop device is in another one too, and either of them is writable."""
    ours = os.path.basename(device_path(device))
    image = backing_file(ours)
    for name in os.listdir("/sys/block") if image else ():
        try:
            if name == ours or not os.path.samefile(backing_file(name) or "", image):
                continue
            with open(f"/sys/block/{name}/ro", encoding="utf-8") as file:
                writable = file.read().strip() == "0"
        except OSError:
            continue  # it has just gone
        if writable or disk.writable:
            raise Error(f"cannot give the image {image} to the VM: /dev/{name} has it too, and one could write")


def attach_disk(container):
    """Gives a VM that does not run yet the block device of its rootfs, if it is to have one; returns whether dom0 had
    to unmount it.  Raises Error."""
    state = container.state
    if not state.get("disk"):
        return False
    disk, xenstore, unmounted = Disk(**state["disk"]), Xenstore(), False
    if state["vbds"]:  # of a `start` that was killed
        return_disk(container, False)
    if xenstore.read(f"/local/domain/{state['domid']}/device/vbd/{DISK}/backend"):
        raise Error(f"cannot give the VM its rootfs as {DISK_NAME}: its settings for xl name a disk of that name")
    fd = open_disk(disk)
    device = os.fstat(fd).st_rdev
    try:
        top = top_mount(disk.mounted[0]) if disk.mounted else None
        if top and top.device == device:
            unmount(top.target)
            unmounted = True
        check_image(disk, device)
        check_unused(disk, device)
        container.save(vbds=[DISK])
        announce_disk(xenstore, state["domid"], disk, device)
        return unmounted
    except BaseException:
        return_disk(container, unmounted)
        raise
    finally:
        os.close(fd)


def return_disk(container, unmounted):
    """Undoes attach_disk(); no VM has seen the device yet, so dom0 may have it mounted again."""
    state, xenstore = container.state, Xenstore()
    if state["vbds"]:
        detach_disk(xenstore, state)
        xenstore.remove(f"/local/domain/{state['domid']}/device/vbd/{DISK}")
        container.save(vbds=[])
    if unmounted:
        disk = Disk(**state["disk"])
        target, flags, options = disk.mounted
        mount(disk.path, target, flags, disk.kind, options)


def unmount(target):
    try:
        system_call("umount2", target, 0)
    except OSError as error:
        raise Error(f"cannot unmount {target} from dom0, which the VM's writing would ruin: {error.strerror}") from None


def check_unused(disk, device):
    """Raises Error if dom0 uses a block device, unless neither its mounts nor the VM can write.  What can be opened by
    O_EXCL is nobody's: mounted in no namespace, part of no volume group."""
    mode = os.O_RDWR if disk.writable else os.O_RDONLY
    try:
        os.close(os.open(device_path(device), mode | os.O_EXCL | os.O_CLOEXEC))
        return
    except OSError as error:
        reason = error.strerror
    mounts = [mount for mount in host_mounts() if mount.device == device]
    if mounts and not disk.writable and "ro" in mounts[0].of_all:
        return
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            target = next((mount.target for mount in host_mounts(pid) if mount.device == device), None)
        except OSError:
            continue
        if target:
            reason = f"for process {pid} it is mounted at {target}; unmount it there"
            break
    raise Error(f"cannot give {disk.path} to the VM, because dom0 uses it: {reason}")


def announce_disk(xenstore, domid, disk, device):
    """Has blkback open the block device for a domain.  Raises Error."""
    numbers, mode = f"{os.major(device):x}:{os.minor(device):x}", "w" if disk.writable else "r"
    backends = "/local/domain/0/backend/vbd"
    backend = {
        "dev": DISK_NAME, "type": "phy", "params": disk.path, "physical-device": numbers, "mode": mode,
        "removable": "0", "bootable": "1", "device-type": "disk", "hotplug-status": "connected",
    }  # fmt: skip
    frontend = {"virtual-device": str(DISK), "device-type": "disk"}

    def write(transaction):
        for other in xenstore.list(backends, transaction):
            for number in xenstore.list(f"{backends}/{other}", transaction):
                node = f"{backends}/{other}/{number}"
                same = xenstore.read(f"{node}/physical-device", "", transaction) == numbers
                if same and "w" in mode + xenstore.read(f"{node}/mode", "", transaction):
                    raise Error(f"cannot give {disk.path} to the VM: domain {other} has it, and one could write")
        announce_listed(xenstore, "vbd", domid, DISK, backend, frontend, transaction=transaction)

    xenstore.transaction(write)
    # blkback tells nobody that it has opened the device, but then this is there
    opened, deadline = f"/sys/bus/xen-backend/devices/vbd-{domid}-{DISK}/mode", time.monotonic() + DISK_TIME_LIMIT
    while not os.path.exists(opened):
        reason = xenstore.read(f"/local/domain/0/error/backend/vbd/{domid}/{DISK}/error")
        if reason or time.monotonic() > deadline:
            remedy = f"it says {reason}" if reason else "is its module xen-blkback loaded?"
            raise Error(f"dom0's kernel has not opened {disk.path} for the VM: {remedy}")
        time.sleep(0.01)


def detach_disk(xenstore, state):
    """Takes away what attach_disk() has made in dom0; the loop device goes by itself."""
    for number in state.get("vbds", ()):
        xenstore.remove(f"/libxl/{state['domid']}/device/vbd/{number}")
        remove_backends(xenstore, "vbd", state["domid"], (number,))
        xenstore.remove(f"/local/domain/0/error/backend/vbd/{state['domid']}")


# ==== cgroup =============================================================================================
# The control group, at linux.cgroupsPath, of what runs on dom0 for a container: there engines read what it uses.  It
# bounds these processes, not the VM, which is Xen's to bound.

SERVING_MEMORY = 64 << 20  # bytes that dom0 may need for a container beside what its limit is
SCOPE_TIME_LIMIT, CGROUP_TIME_LIMIT = 30.0, 2.0  # seconds to make a scope, and to end the last process in a cgroup


def find_cgroups(path, scope):
    """[root, path] of a cgroup in each of the hierarchies that dom0 has mounted.  Raises Error if others are in it.

    scope: whether it is one that systemd has just made for us.
    """
    path, cgroups, seen = os.path.normpath("/" + path.lstrip("/")), [], set()  # two slashes would stay
    for entry in host_mounts():
        # what a cpuset of version 1 holds are dom0's processors, and it takes nobody until it has some
        if not entry.kind.startswith("cgroup") or entry.device in seen or "cpuset" in entry.of_all:
            continue
        seen.add(entry.device)
        cgroups.append([entry.target, path])
        if path == "/" or not scope and any(map(cgroup_processes, cgroup_folders(entry.target + path))):
            raise Error(f"cannot make the cgroup {path}: others are in it; name another one by linux.cgroupsPath")
    return cgroups


def cgroup_folders(folder):
    """The folder of a cgroup behind all below it, none if it is not there."""
    return (each for each, _, _ in os.walk(folder, topdown=False))


def cgroup_processes(folder):
    try:
        return read_file(os.path.join(folder, "cgroup.procs")).split()
    except FileNotFoundError:
        return []


def make_cgroups(cgroups, resources, pids):
    """Makes them, with their limits, and moves processes there.  Raises Error."""
    for root, path in cgroups:
        folder = root
        try:
            for name in path.split("/")[1:]:
                enable_controllers(folder)
                folder = os.path.join(folder, name)
                if not os.path.isdir(folder):
                    os.mkdir(folder)
            limit_cgroup(folder, resources)
            for pid in pids:
                write_file(os.path.join(folder, "cgroup.procs"), pid)
        except OSError as error:
            raise Error(f"cannot make the cgroup {path} in {root}: {error.strerror}") from None


def cgroup_limits(resources):
    """{file of either version: its content}."""
    memory, limits = str(resources.memory + SERVING_MEMORY), {}
    if resources.memory:
        unlimited = resources.memory < 0
        limits = {"memory.max": "max" if unlimited else memory, "memory.limit_in_bytes": "-1" if unlimited else memory}
    if resources.shares:
        weight = 1 + (max(2, min(resources.shares, 262144)) - 2) * 9999 // 262142  # as runc makes it of shares
        limits.update({"cpu.weight": str(weight), "cpu.shares": str(resources.shares)})
    return limits


def limit_cgroup(folder, resources):
    """Raises OSError."""
    for name, value in cgroup_limits(resources).items():
        if os.path.exists(os.path.join(folder, name)):
            write_file(os.path.join(folder, name), value)


def enable_controllers(folder):
    """Lets the cgroups below have what this one has; of version 2, where each must be asked for."""
    controllers = os.path.join(folder, "cgroup.controllers")
    for name in read_file(controllers).split() if os.path.exists(controllers) else ():
        try:
            write_file(os.path.join(folder, "cgroup.subtree_control"), f"+{name}")
        except OSError:
            pass  # the cgroup has processes of its own, or those below could not have it


def write_file(path, value):
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


def read_file(path):
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def start_scope(path, resources):
    """A process in a new scope of systemd, which lasts until its standard input ends or others are in it too, and the
    scope's path.  Raises Error."""
    import select
    import subprocess

    parent, colon, name = path.partition(":")
    if not colon:
        raise Error(f"config.json: linux.cgroupsPath must be SLICE:PREFIX:NAME for systemd, not {printable(path)}")
    unit, limits = name.replace(":", "-", 1) if name.split(":")[0] else name[1:], cgroup_limits(resources)
    # systemd would put its own limits there again
    properties = (("MemoryMax", "memory.max"), ("CPUWeight", "cpu.weight"))
    properties = [f"{key}={limits[file].replace('max', 'infinity')}" for key, file in properties if file in limits]
    command = ["systemd-run", "--quiet", "--scope", "--collect", f"--unit={unit}.scope"]
    command += [f"--slice={parent or 'system.slice'}", "--property=Delegate=yes"]
    command += [f"--property={each}" for each in properties]
    try:
        scope = subprocess.Popen(
            [*command, "sh", "-c", "cat /proc/self/cgroup; read -r _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, "PATH": PATH},
        )  # fmt: skip
    except OSError as error:
        raise Error(f"cannot make the scope {unit}: systemd-run: {error.strerror}") from None
    answered = select.select([scope.stdout], [], [], SCOPE_TIME_LIMIT)[0]
    lines = os.read(scope.stdout.fileno(), 4096).decode("utf-8", "replace").splitlines() if answered else ["nothing"]
    paths = [line.split(":", 2)[2] for line in lines if line.startswith("0::") or ":name=systemd:" in line]
    if not paths:
        scope.kill()
        scope.communicate()
        raise Error(f"cannot make the scope {unit}: systemd-run says {printable(' '.join(lines))}")
    return scope, paths[-1]


def remove_cgroups(cgroups, pids):
    """Removes what make_cgroups() has made, with cgroups below; of who is still there, pids go to the root.  Raises
    Error if others are there too."""
    left, deadline = [], time.monotonic() + CGROUP_TIME_LIMIT
    for root, path in cgroups:
        for folder in cgroup_folders(root + path):
            while not remove_cgroup(root, folder, pids):
                if time.monotonic() > deadline:
                    left.append(folder)
                    break
                time.sleep(0.01)  # who was killed has not quite ended
    if left:
        raise Error(f"cannot remove the cgroup {', '.join(left)}: others are in it")


def remove_cgroup(root, folder, pids):
    """Whether it is gone."""
    try:
        for pid in set(cgroup_processes(folder)) & set(map(str, pids)):
            write_file(os.path.join(root, "cgroup.procs"), pid)
        os.rmdir(folder)
    except FileNotFoundError:
        pass  # systemd, or the engine, was quicker
    except OSError:
        return False
    return True


MCL_FUTURE = 2  # <sys/mman.h>
OOM_MEMORY, OOM_MEMORY_MAX = 4 << 20, 128 << 20  # bytes that the process asks for, beside what is used and with it


def show_oom(cgroups):
    """Lets engines, which watch the container's cgroup, see that memory has run out, as the VM's kernel has told: there
    a process of ours asks for too much, and dom0's kernel kills it and counts that.  Raises OSError."""
    for root, path in cgroups:
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, usage = os.path.join(root + path, limit), os.path.join(root + path, usage)
            if not os.path.exists(limit):
                continue
            before, most = read_file(limit), int(read_file(usage)) + OOM_MEMORY
            if most > OOM_MEMORY_MAX or read_file("/proc/sys/vm/panic_on_oom") == "2":
                continue  # the guest's word is not worth that
            pid = os.fork()
            if pid == 0:
                try:
                    write_file("/proc/self/oom_score_adj", 1000)
                    system_call("mlockall", MCL_FUTURE)  # dom0 must not swap instead
                    write_file(limit, most)
                    b"\1" * (2 * most)
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            write_file(limit, before)


# ==== rtnetlink ==========================================================================================
# Links, addresses, routes and neighbours, as the kernel knows them: rtnetlink(7).  runX talks to dom0's kernel,
# and makes messages that the guest sends to its own.

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 20, 22  # <linux/rtnetlink.h>
RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEIGH, RTM_GETNEIGH = 24, 26, 28, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
RTMGRP_LINK = 1
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300  # <linux/netlink.h>
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 10, 18  # <linux/if_link.h>
IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_INFO_KIND, IFLA_INET6_ADDR_GEN_MODE = 26, 28, 1, 8
IFF_UP, ARPHRD_ETHER = 1, 1  # <linux/if.h>, <linux/if_arp.h>
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8  # <linux/if_addr.h>
IFA_F_NODAD, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x80, 0x200
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_VIA = 1, 2, 4, 5, 6, 7, 8, 18
RT_TABLE_MAIN, RTN_UNICAST, RTNH_F_ONLINK = 254, 1, 4
RTPROT_STATIC, RTPROT_RA, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 4, 9, 0, 253
NDA_DST, NDA_LLADDR, NUD_PERMANENT = 1, 2, 0x80  # <linux/neighbour.h>
AF_INET, AF_INET6 = 2, 10
# <linux/pkt_sched.h>, <linux/pkt_cls.h>, <linux/tc_act/tc_mirred.h>
TC_H_INGRESS, INGRESS_HANDLE, TCA_KIND, TCA_OPTIONS = 0xFFFFFFF1, 0xFFFF0000, 1, 2
TCA_MATCHALL_ACT, TCA_ACT_KIND, TCA_ACT_OPTIONS, TCA_MIRRED_PARMS, TC_ACT_STOLEN, TCA_EGRESS_REDIR = 2, 1, 2, 2, 4, 1
ETH_P_ALL_BIG_ENDIAN = 0x0300

INDEX = None  # in a message for the guest: the number of the interface, which only the guest knows


def attribute(kind, value):
    """A struct rtattr.  value: bytes, a string or a number of 32 bits."""
    import struct

    if not isinstance(value, bytes):
        value = value.encode() + b"\0" if isinstance(value, str) else struct.pack("=I", value)
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data):
    """{kind: value} of a series of struct rtattr."""
    import struct

    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[max(4, (length + 3) & ~3) :]
    return found


def link_message(index, *parts, up=None):
    """The parts of the body of an RTM_NEWLINK; up: True or False to change that.  index: a number, or INDEX."""
    import struct

    flags = struct.pack("=II", IFF_UP if up else 0, 0 if up is None else IFF_UP)
    index = (b"\0\0\0\0", INDEX) if index is INDEX else (struct.pack("=xxxxi", index),)
    return (*index, flags + b"".join(parts))


def guest_message(kind, flags, *parts):
    """A message of rtnetlink in hexadecimal; "@" for the four bytes of INDEX."""
    import struct

    length = 16 + sum(4 if part is INDEX else len(part) for part in parts)
    head = struct.pack("=IHHII", length, kind, NLM_F_REQUEST | NLM_F_ACK | flags, 0, 0)
    return head.hex() + "".join("@" if part is INDEX else part.hex() for part in parts)


class Link(Record):
    index: int
    name: str
    mac: bytes
    mtu: int
    type: int  # ARPHRD_*
    up: bool


class Rtnetlink:
    """A connection to the rtnetlink of one network namespace: of ours, or of the one at a path."""

    def __init__(self, namespace=None, groups=0):
        import _socket  # as in Xenstore

        def connect():
            return _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, _socket.NETLINK_ROUTE)

        self.socket = in_namespace(namespace, connect) if namespace else connect()
        self.socket.bind((0, groups))

    def receive(self):
        """(message type, body) of each message in the next datagram."""
        import struct

        data = self.socket.recv(1 << 17)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            yield kind, data[16:length]
            data = data[(length + 3) & ~3 :]

    def request(self, kind, flags, body):
        """Sends one message; returns the bodies of what the kernel answers.  Raises OSError."""
        import struct

        head = struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 0, 0)
        self.socket.send(head + body)
        answers = []
        while True:
            for answer, data in self.receive():
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    number = -struct.unpack_from("=i", data)[0]
                    if number > 0:
                        raise OSError(number, os.strerror(number))
                    return answers
                answers.append(data)

    def set_link(self, index, *parts, up=None):
        self.request(RTM_NEWLINK, 0, b"".join(link_message(index, *parts, up=up)))

    def links(self):
        return [parse_link(body) for body in self.request(RTM_GETLINK, NLM_F_DUMP, bytes(16))]

    def find_link(self, name):
        return next((link for link in self.links() if link.name == name), None)

    def await_link(self, name, seconds):
        """The link of that name, from the moment that it is there; None if it is not in time.  Needs RTMGRP_LINK."""
        import select

        deadline = time.monotonic() + seconds
        while select.select([self.socket], [], [], max(0, deadline - time.monotonic()))[0]:
            for kind, body in self.receive():
                if kind == RTM_NEWLINK and parse_link(body).name == name:
                    return parse_link(body)
        return None


def parse_link(body):
    import struct

    type_, index, flags = struct.unpack_from("=xxHiI", body)
    found = attributes(body[16:])
    return Link(
        index=index, name=found[IFLA_IFNAME].rstrip(b"\0").decode(), mac=found.get(IFLA_ADDRESS, b""),
        mtu=struct.unpack("=I", found.get(IFLA_MTU, bytes(4)))[0], type=type_, up=bool(flags & IFF_UP),
    )  # fmt: skip


def in_namespace(path, work):
    """Calls work() in the network namespace at path, and returns what it returns.  Raises OSError."""
    home, target = (os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in ("/proc/self/ns/net", path))
    try:
        system_call("setns", target, CLONE_NEWNET)
        try:
            return work()
        finally:
            system_call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)
        os.close(target)


def mark_namespace():
    """A socket whose name says, as long as it is open, that a VM has our network namespace, whatever root or engine it
    is of.  Raises Error where one has."""
    import _socket
    import errno

    mark = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        mark.bind(b"\0runX")  # abstract names, unix(7), are a network namespace's own
        return mark
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    raise Error("cannot join the network namespace of another container, and containers cannot share a VM yet")


def make_namespace(path):
    """Makes a network namespace that lasts as long as path, a file onto which it is mounted.  Raises Error."""

    def keep():
        system_call("unshare", CLONE_NEWNET)
        mount("/proc/thread-self/ns/net", path, MS_BIND)

    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    in_namespace("/proc/self/ns/net", keep)


def redirect(netlink, source, target):
    """All that arrives at the link source leaves through target (numbers), and the other way round.  Raises OSError,
    EEXIST if somebody's classifier sits at one of them already."""
    import struct

    for link, other in ((source, target), (target, source)):
        head = struct.pack("=xxxxiII", link, INGRESS_HANDLE, TC_H_INGRESS)
        body = head + struct.pack("=I", 0) + attribute(TCA_KIND, "ingress")
        netlink.request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body)
        mirred = struct.pack("=IIiiiiI", 0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, other)
        options = attribute(TCA_ACT_OPTIONS, attribute(TCA_MIRRED_PARMS, mirred))
        action = attribute(1, attribute(TCA_ACT_KIND, "mirred") + options)
        head = struct.pack("=xxxxiIII", link, 0, INGRESS_HANDLE, 1 << 16 | ETH_P_ALL_BIG_ENDIAN)
        matchall = attribute(TCA_KIND, "matchall") + attribute(TCA_OPTIONS, attribute(TCA_MATCHALL_ACT, action))
        try:
            netlink.request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, head + matchall)
        except OSError:
            end_redirect(netlink, link)
            raise


def end_redirect(netlink, index):
    """Undoes one side of redirect().  Raises OSError."""
    import struct

    netlink.request(RTM_DELQDISC, 0, struct.pack("=xxxxiIII", index, INGRESS_HANDLE, TC_H_INGRESS, 0))


# ==== CNI ================================================================================================
# Networks that NETCONF names: configuration files and plugins of the CNI specification, SPEC.md 0.2.0 to 1.1.0.

CNI_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
CNI_PATH = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni"
CNI_TIME_LIMIT = 30  # seconds that a plugin has
DNS_MAX = 3500  # bytes; see GUEST_NODE_MAX


class Network(Record):
    """A network as NETCONF names it, and what the container wants of it."""

    file: str
    name: str
    version: str
    plugins: list  # as in the file; the first one makes the interface
    mode: str  # where the address is from: "dhcp", "static", or "auto": the network's IPAM plugin
    addresses: list  # of ipaddress's IPv4Interface and IPv6Interface, for "static"

    def ipam(self):
        return self.plugins[0].get("ipam") or {}


class Attachment(Record):
    """An interface of a container's in a network.  Kept in its state, so that whoever deletes it can give all back."""

    network: str
    calls: list  # [plugin, configuration] of each that is executed, in order
    identity: str  # CNI_CONTAINERID
    interface: str  # CNI_IFNAME
    namespace: str  # CNI_NETNS
    result: dict  # of the last ADD, or None
    bridge: str  # of which the vif becomes a port; "": it gets what arrives at interface in namespace
    mac: str
    mtu: int  # 0: the bridge's
    rate: str  # as netback wants it, or ""
    dhcp: bool
    addresses: list  # such as "192.168.0.7/24"; these and routes where there is a bridge
    routes: list  # [destination, gateway or ""]
    gateways: list  # that are default routes, whatever the routes are
    dns: dict  # as in SPEC.md


def load_network(request, folders):
    """The Network of a NETCONF variable: request: (variable, file, name, address).  Raises Error."""
    variable, path, name, address = request
    documents = parse_documents(path, read_trusted(variable, path, folders))
    found = [document for document in documents if document.get("name") == name]
    if len(found) != 1:
        names = ", ".join(printable(str(document.get("name"))) for document in documents)
        raise Error(f"{variable}: {path} has {len(found)} networks {printable(name)}, not one; it has {names}")
    where = f"{path}: network {name}"
    version = field(found[0], "cniVersion", str, "0.2.0", where)
    if version not in CNI_VERSIONS:
        raise Error(f"{where}: cniVersion {printable(version)} is not one of {', '.join(CNI_VERSIONS)}")
    plugins = field(found[0], "plugins", list, [found[0]], where)
    if not plugins or not all(isinstance(plugin, dict) for plugin in plugins):
        raise Error(f"{where}: plugins must hold objects")
    ipam = field(plugins[0], "ipam", dict, {}, where)
    kind = field(ipam, "type", str, "", where + ".ipam")
    for program in (kind or "none", *(field(plugin, "type", str, where=where) for plugin in plugins)):
        if "/" in program or program in ("", ".", "..") or not program.isprintable():
            raise Error(f"{where}: the type {printable(program)} is not the name of a plugin")
    for plugin in plugins:
        field(field(plugin, "args", dict, {}, where), "cni", dict, {}, where + ".args")
    network = Network(file=path, name=name, version=version, plugins=plugins, mode="", addresses=[])
    if not address:  # a bridge as RunX has always taken it; what makes a link of its own, as CNI has it
        network.mode = "dhcp" if plugins[0]["type"] == "bridge" or kind in ("", "dhcp") else "auto"
    elif address == "auto":
        if kind in ("", "dhcp"):
            raise Error(f'{where} has no ipam that chooses an address: leave out "auto", and the VM asks by DHCP')
        network.mode = "auto"
    else:
        network.mode, network.addresses = "static", parse_addresses(address, network)
    return network


def parse_documents(path, text):
    """The JSON objects in a file, one behind the other or in an array."""
    import json

    number, documents = json_number, []
    decoder = json.JSONDecoder(parse_float=number, parse_int=number, parse_constant=number)
    try:
        while text := text.lstrip():
            document, end = decoder.raw_decode(text)
            documents += check_document(document) if isinstance(document, list) else [check_document(document)]
            text = text[end:]
    except (ValueError, RecursionError) as error:
        raise Error(f"cannot read the networks in {path}: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise Error(f"cannot read the networks in {path}: it must hold JSON objects")
    return documents


def ipam_ranges(network):
    """(subnet, gateway or None) of each range that the network's ipam names; ipaddress's types.  Raises Error."""
    import ipaddress

    ipam, ranges = network.ipam(), []
    try:
        entries = [ipam, *(entry for entries in ipam.get("ranges") or [] for entry in entries)]
        for entry in [*entries, *(ipam.get("addresses") or [])]:
            subnet, gateway = (text_of(entry, key, "ipam") for key in ("subnet", "gateway"))
            subnet = subnet or text_of(entry, "address", "ipam")
            if subnet:
                subnet = ipaddress.ip_network(subnet, strict=False)
                ranges.append((subnet, ipaddress.ip_address(gateway) if gateway else None))
    except (ValueError, TypeError, AttributeError) as error:
        raise Error(f"{network.file}: network {network.name}: cannot understand its ipam: {error}") from None
    return ranges


def parse_addresses(text, network):
    """The static addresses of NETCONF: with the prefix of the network's subnet where none is given.  Raises Error."""
    import ipaddress

    addresses = []
    for part in text.split(";"):
        try:
            address = ipaddress.ip_interface(part.strip())
        except ValueError:
            raise Error(f"network {network.name}: {printable(part)} is not an IP address") from None
        subnets = [subnet for subnet, _ in ipam_ranges(network) if subnet.version == address.version]
        subnet = next((subnet for subnet in subnets if address.ip in subnet), None)
        if subnets and not subnet:
            raise Error(f"network {network.name}: the address {address.ip} is not in {', '.join(map(str, subnets))}")
        if "/" not in part:
            if not subnet:
                raise Error(f"network {network.name} has no subnet: give {address.ip} with its prefix, such as /24")
            address = ipaddress.ip_interface(f"{address.ip}/{subnet.prefixlen}")
        addresses.append(address)
    return addresses


def cni_path():
    """The folders of the plugins: the engine's word, or the usual ones."""
    return os.environ.get("CNI_PATH", CNI_PATH)


def find_plugin(name):
    """The path of a CNI plugin, or None."""
    if "/" in name or "\0" in name:
        return None
    for folder in cni_path().split(":"):
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK):
            return path
    return None


# what only the bridge plugin does; the first three concern addresses that it has given itself
BRIDGE_LAYER_3 = ("isGateway", "isDefaultGateway", "ipMasq")
BRIDGE_LAYER_2 = ("vlan", "vlanTrunk", "hairpinMode", "promiscMode", "macspoofchk")


def plan_attachment(network, number, container, rate, log):
    """The Attachment number of the container, not made yet.  Raises Error."""
    first, name = network.plugins[0], container.state["name"]
    attachment = Attachment(
        network=network.name, calls=[], identity=name.replace("+", "_"), interface=f"eth{number}",
        namespace=container.path("netns"), result=None, bridge="", mac=stable_mac(container.folder, number),
        mtu=field(first, "mtu", int, 0, network.file), rate=lower_rate(rate, bandwidth_rate(network)),
        dhcp=network.mode == "dhcp", addresses=list(map(str, network.addresses)), routes=[],
        gateways=[str(gateway) for _, gateway in ipam_ranges(network) if gateway],
        dns=check_dns(field(first, "dns", dict, {}, network.file), network.name),
    )  # fmt: skip
    if not 0 <= attachment.mtu < 1 << 16:
        raise Error(f"{network.file}: network {network.name}: the mtu {attachment.mtu} is out of range")
    if first["type"] == "bridge":
        attachment.bridge = field(first, "bridge", str, "cni0", network.file)
    if needs_plugins(network, log):
        attachment.calls = [[plugin["type"], plugin_configuration(network, plugin)] for plugin in network.plugins]
        if attachment.bridge:
            prepare_bridge(network, attachment.bridge)
            attachment.bridge = ""
    else:
        prepare_bridge(network, attachment.bridge)
        plan_addresses(network, attachment, log)
    return attachment


def needs_plugins(network, log):
    """Whether the network's plugins make the interface, and not runX by itself."""
    first = network.plugins[0]
    chained = [plugin for plugin in network.plugins[1:] if plugin["type"] != "bandwidth" or find_plugin("bandwidth")]
    if first["type"] != "bridge" or chained:
        return True
    keys = BRIDGE_LAYER_2 if network.mode == "dhcp" else BRIDGE_LAYER_2 + BRIDGE_LAYER_3
    wanted = [key for key in keys if first.get(key)]
    if wanted and not find_plugin("bridge"):
        lost = [key for key in wanted if key not in ("isGateway", "isDefaultGateway")]
        if lost:
            lost = ", ".join(lost)
            log.write("warning", f"network {network.name}: {lost} have no effect without the CNI plugin bridge")
        return False
    return bool(wanted)


def plan_addresses(network, attachment, log):
    """Who reserves the address of a port of a bridge: the IPAM plugin if there is one."""
    kind = network.ipam().get("type") or ""
    if network.mode == "dhcp":
        return
    if kind not in ("", "dhcp") and find_plugin(kind):
        attachment.calls = [[kind, plugin_configuration(network, network.plugins[0])]]
    elif network.mode == "auto":
        raise Error(f"network {network.name}: no address without the CNI plugin {kind}: install it in {cni_path()}")
    else:
        log.write("warning", f"network {network.name}: no CNI plugin reserves {', '.join(attachment.addresses)}")
        use_result(attachment, {"routes": network.ipam().get("routes") or []}, network)


def plugin_configuration(network, plugin):
    """What a plugin gets on standard input: SPEC.md "Deriving execution configuration from plugin configuration"."""
    configuration = {**plugin, "name": network.name, "cniVersion": network.version}
    if network.mode == "dhcp" and plugin is network.plugins[0]:
        configuration["ipam"] = {}  # the VM asks for its address by itself
    if network.addresses:
        args = configuration.get("args") or {}
        ips = [str(address if plugin_wants_prefix(network) else address.ip) for address in network.addresses]
        configuration["args"] = {**args, "cni": {**(args.get("cni") or {}), "ips": ips}}
    return configuration


def plugin_wants_prefix(network):
    return network.ipam().get("type") != "host-local"  # which took none before 0.9


def prepare_bridge(network, name):
    """Makes the bridge if it is missing and the network begins on this host, which is its gateway.  Raises Error."""
    first, netlink = network.plugins[0], Rtnetlink()
    bridge, ours = netlink.find_link(name), first.get("isGateway") or first.get("isDefaultGateway")
    if not bridge and not ours:
        raise Error(
            f"network {network.name}: there is no bridge {printable(name)} on this host: make it, or set isGateway "
            f"in {network.file} for a network that begins there"
        )
    try:
        if not bridge:
            kind = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, "bridge"))
            body = b"".join(link_message(0, attribute(IFLA_IFNAME, name), kind))
            netlink.request(RTM_NEWLINK, NLM_F_CREATE, body)
            bridge = netlink.find_link(name)
        if ours:
            netlink.set_link(bridge.index, up=True)
            add_gateways(netlink, bridge.index, ipam_ranges(network))
    except OSError as error:
        raise Error(f"network {network.name}: cannot make the bridge {name}: {error.strerror}") from None


def add_gateways(netlink, index, ranges):
    """Gives a bridge the addresses of the gateways that are to be on it."""
    import ipaddress

    for subnet, gateway in ranges:
        address = ipaddress.ip_interface(f"{gateway or subnet.network_address + 1}/{subnet.prefixlen}")
        head, tail = address_message(address)
        netlink.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, head + index.to_bytes(4, sys.byteorder) + tail)


def stable_mac(*identity):
    """A locally administered unicast address (IEEE 802) that is the same for the same container and interface."""
    import hashlib

    digest = hashlib.blake2s(repr(identity).encode()).digest()
    return bytes([digest[0] & 0xFC | 2, *digest[1:6]]).hex(":")


def parse_rate(text):
    """netback's "bytes,microseconds" for a rate as in xl-network-configuration.5, such as 10Mb/s or 1MB/s@20ms."""
    import re

    match = re.fullmatch(r"(\d+)([KMG]?)([bB])/s(?:@(\d+)([mu]?)s)?", text)
    if not match:
        raise Error(f"the rate {printable(text)} must be such as 10Mb/s (bits) or 1MB/s@20ms (bytes)")
    number, scale, unit, interval, prefix = match.groups()
    rate = int(number) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[scale] // (8 if unit == "b" else 1)
    microseconds = int(interval) * {"": 10**6, "m": 1000, "u": 1}[prefix] if interval else 50000
    if not 0 < rate * microseconds // 10**6 < 1 << 32 or microseconds >= 1 << 32:
        raise Error(f"the rate {printable(text)} is out of range")
    return f"{rate * microseconds // 10**6},{microseconds}"


def lower_rate(*rates):
    """The lowest of some rates as netback wants them, of which "" is none."""

    def speed(rate):
        size, microseconds = rate.split(",")
        return int(size) / int(microseconds)

    return min(filter(None, rates), key=speed, default="")


def bandwidth_rate(network):
    """What the bandwidth plugin of the network allows the VM to send, as netback wants it, or ""."""
    for plugin in network.plugins[1:]:
        if plugin["type"] == "bandwidth":
            where = f"{network.file}: bandwidth"
            limits = {**plugin, **field(field(plugin, "runtimeConfig", dict, {}, where), "bandwidth", dict, {}, where)}
            bits = field(limits, "egressRate", int, 0, where)
            return parse_rate(f"{bits}b/s") if bits else ""
    return ""


def attach_network(attachment, network):
    """Executes the plugins of an Attachment, and puts what they say into it.  Raises Error."""
    version = negotiate_version(attachment) if network.version == CNI_VERSIONS[-1] else network.version
    for plugin, configuration in attachment.calls:
        configuration["cniVersion"] = version
        output = call_plugin("ADD", attachment, plugin, configuration)
        try:
            attachment.result = {**check_document(parse_json(output))}
        except (ValueError, TypeError):
            raise Error(f"network {attachment.network}: the CNI plugin {plugin} has not printed a result") from None
    if attachment.result and attachment.bridge:
        use_result(attachment, attachment.result, network)
    elif attachment.result:
        attachment.dns = check_dns(attachment.result.get("dns"), network.name) or attachment.dns


def negotiate_version(attachment):
    """The newest version of CNI that all plugins of an Attachment know: many know less than the newest."""
    known = set(CNI_VERSIONS)
    for plugin, _ in attachment.calls:
        output = call_plugin("VERSION", attachment, plugin, {"cniVersion": CNI_VERSIONS[-1]})
        try:
            known &= set(parse_json(output)["supportedVersions"])
        except (ValueError, TypeError, KeyError):
            raise Error(f"network {attachment.network}: the CNI plugin {plugin} does not tell its versions") from None
    return max(known, key=CNI_VERSIONS.index, default=CNI_VERSIONS[-1])


def detach_network(fields, log):
    """Gives back what attach_network() has got, as far as it came.  What fails is a warning, no reason to stay.

    fields: of the Attachment, as they are in the state."""
    attachment = Attachment(**fields)
    for plugin, configuration in reversed(attachment.calls):
        what = f"give back the network {attachment.network}"
        log.attempt(what, call_plugin, "DEL", attachment, plugin, configuration)


def call_plugin(command, attachment, plugin, configuration):
    """What a plugin prints: SPEC.md "Execution Protocol".  It gets the result of the one before, if there is one.

    Raises Error with the plugin's own reason.
    """
    what, path = f"network {attachment.network}: CNI plugin {plugin}", find_plugin(plugin)
    if not path:
        raise Error(f"{what} is not installed in {cni_path()}")
    if attachment.result is not None:
        configuration = {**configuration, "prevResult": attachment.result}
    env = {
        **os.environ, "PATH": PATH, "CNI_PATH": cni_path(), "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.identity, "CNI_NETNS": attachment.namespace,
        "CNI_IFNAME": attachment.interface, "CNI_ARGS": f"IgnoreUnknown=1;MAC={attachment.mac}",
    }  # fmt: skip
    reason, output, errors = run_program([path], path, env, json_text(configuration).encode(), CNI_TIME_LIMIT)
    output = output.decode("utf-8", "replace")
    if not reason:
        return output
    try:
        error = parse_json(output)
        words = [str(error[key]) for key in ("msg", "details") if error.get(key)]
        reason = f"{': '.join(words)} (code {error['code']})"
    except (ValueError, TypeError, KeyError, AttributeError):
        reason = f"{reason} {errors.decode('utf-8', 'replace')}"
    raise Error(f"{what}, {command}: {printable(reason)}")


def use_result(attachment, result, network):
    """Puts what the IPAM plugin has said, or the file, into the Attachment of a bridge's port.  Raises Error."""
    import ipaddress

    try:
        old = [result[key] for key in ("ip4", "ip6") if result.get(key)]  # 0.2.0
        ips = result.get("ips") or [{"address": each["ip"], **each} for each in old]
        routes = result.get("routes") or [route for entry in ips for route in entry.get("routes") or ()]
        addresses = attachment.addresses or [entry["address"] for entry in ips]
        attachment.addresses = [str(ipaddress.ip_interface(address)) for address in addresses]
        versions = {ipaddress.ip_interface(address).version for address in attachment.addresses}
        gateways = [ipaddress.ip_address(entry["gateway"]) for entry in ips if entry.get("gateway")]
        if not ips:
            gateways = [gateway or subnet.network_address + 1 for subnet, gateway in ipam_ranges(network)]
        first = {gateway.version: str(gateway) for gateway in reversed(gateways)}
        for route in routes:
            destination = ipaddress.ip_network(route["dst"], strict=False)
            if destination.version in versions:
                gateway = str(ipaddress.ip_address(route["gw"])) if route.get("gw") else ""
                attachment.routes.append([str(destination), gateway or first.get(destination.version, "")])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Error(f"network {network.name}: cannot understand its addresses and routes: {error}") from None
    attachment.dns = attachment.dns or check_dns(result.get("dns"), network.name)
    if network.plugins[0].get("isDefaultGateway"):
        attachment.gateways += first.values()


def check_dns(dns, network):
    """A dns object of CNI's, {} for none.  Raises Error."""
    where = f"network {network}: dns"
    dns = field({"dns": dns}, "dns", dict, {}, f"network {network}")
    words = [text_of(dns, "domain", where)]
    for key in ("nameservers", "search", "options"):
        words += strings(dns, key, where)
    if not all(word.isprintable() for word in words):
        raise Error(f"{where} must hold words for a line of resolv.conf")
    return dns


def resolv_conf(dns):
    """The text of resolv.conf(5) for a dns object of CNI's, "" where it says nothing."""
    lines = [f"nameserver {server}" for server in dns.get("nameservers") or ()]
    lines += [f"domain {dns['domain']}"] if dns.get("domain") else []
    lines += [f"{key} {' '.join(dns[key])}" for key in ("search", "options") if dns.get(key)]
    return "".join(line + "\n" for line in lines)[:DNS_MAX]


# ==== vif ================================================================================================
# The VM's network interfaces: what each is like, its backend in dom0 (netback: xen/include/public/io/netif.h), where
# that is joined to, and what the guest is told.  `start` does it all: engines fill a namespace until then.

VIF_TIME_LIMIT = 40  # seconds that netback has to make a vif, as libxl gives its hotplug scripts
GUEST_NODE_MAX = 3500  # bytes in a node for the guest, which reads 4096 at once (XENSTORE_PAYLOAD_MAX)
HOTPLUG_SCRIPT = "/bin/true"  # for an `xl destroy` by hand; nothing else runs it
# taken over from a namespace; and who had an address there has made sure already that nobody else has it
IPV6_SETTINGS = ("disable_ipv6", "accept_ra")


class Interface(Record):
    name: str
    mac: bytes
    mtu: int
    addresses: list  # (struct ifaddrmsg up to the index, attributes)
    routes: list  # (struct rtmsg, {RTA_*: value})
    neighbours: list  # (family, attributes), permanent ones
    ipv6: dict  # of net.ipv6.conf.<name>
    dhcp: bool
    rate: str
    bridge: str  # of which the vif becomes a port, or
    namespace: str  # path of a network namespace, whose
    device: str  # link it is joined to


def address_message(address):
    """What Interface.addresses holds, for one of ipaddress's interfaces."""
    import struct

    family, local = family_of(address), address.packed
    found = attribute(IFA_LOCAL, local) + attribute(IFA_ADDRESS, local)
    if address.version == 4 and address.network.prefixlen < 31:
        found += attribute(IFA_BROADCAST, address.network.broadcast_address.packed)
    flags = IFA_F_NODAD if address.version == 6 else 0
    return struct.pack("=BBBB", family, address.network.prefixlen, flags, RT_SCOPE_UNIVERSE), found


def family_of(address):
    return AF_INET if address.version == 4 else AF_INET6


def route_message(destination, gateway, addresses):
    """What Interface.routes holds.  gateway: or None; one that is in no network of addresses is on the link still."""
    import struct

    onlink = gateway and not any(gateway in address.network for address in addresses)
    scope = RT_SCOPE_UNIVERSE if gateway else RT_SCOPE_LINK
    head = (family_of(destination), destination.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST)
    found = {RTA_DST: destination.network_address.packed} if destination.prefixlen else {}
    if gateway:
        found[RTA_GATEWAY] = gateway.packed
    return struct.pack("=8BI", *head, RTNH_F_ONLINK if onlink else 0), found


def namespace_interfaces(path, log):
    """The Interfaces of a network namespace, as they are now.  Raises Error."""
    try:
        netlink = Rtnetlink(path)
        links = [link for link in netlink.links() if link.name != "lo"]
        if not links:
            return []
        addresses, routes, neighbours = (dump(netlink) for dump in (dump_addresses, dump_routes, dump_neighbours))
        found = []
        for link in links:
            if not (link.up or addresses.get(link.index)):
                continue
            if link.type != ARPHRD_ETHER:
                log.write("warning", f"the interface {link.name} is none of Ethernet and stays outside the VM")
                continue
            found.append(Interface(
                name=link.name, mac=link.mac, mtu=link.mtu, addresses=addresses.get(link.index, []),
                routes=routes.get(link.index, []), neighbours=neighbours.get(link.index, []),
                ipv6=in_namespace(path, lambda device=link.name: read_ipv6_settings(device)),
                dhcp=False, rate="", bridge="", namespace=path, device=link.name,
            ))  # fmt: skip
        return found
    except OSError as error:
        raise Error(f"cannot read the network namespace {path}: {error.strerror}") from None


def dump_addresses(netlink):
    """{link's number: what Interface.addresses holds}.  What a router has advertised, the guest hears by itself.

    Their subnets are not routes by themselves: what is one, dump_routes() says.
    """
    import struct

    found = {}
    for body in netlink.request(RTM_GETADDR, NLM_F_DUMP, bytes(8)):
        family, length, flags, scope, index = struct.unpack_from("=BBBBI", body)
        if family == AF_INET or (family == AF_INET6 and flags & IFA_F_PERMANENT):
            head = struct.pack("=BBBB", family, length, 0, scope)
            kept = {kind: value for kind, value in attributes(body[8:]).items() if kind in ADDRESS_ATTRIBUTES}
            routed = IFA_F_NOPREFIXROUTE if family == AF_INET or scope == RT_SCOPE_UNIVERSE else 0
            kept[IFA_FLAGS] = struct.pack("=I", routed | (IFA_F_NODAD if family == AF_INET6 else 0))
            tail = b"".join(attribute(*item) for item in kept.items())
            found.setdefault(index, []).append((head, tail))
    return found


ADDRESS_ATTRIBUTES = (IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST)
ROUTE_ATTRIBUTES = (RTA_DST, RTA_SRC, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_VIA)


def dump_routes(netlink):
    """{link's number: what Interface.routes holds}, without those that the guest's kernel has by itself."""
    import struct

    found = {}
    for body in netlink.request(RTM_GETROUTE, NLM_F_DUMP, bytes(12)):
        family, *_, table, protocol, _, kind, flags = struct.unpack_from("=8BI", body)
        values = attributes(body[12:])
        if family not in (AF_INET, AF_INET6) or RTA_OIF not in values or protocol == RTPROT_RA:
            continue
        if family == AF_INET6 and values.get(RTA_DST, b"").startswith(b"\xfe\x80"):
            continue
        if (table, kind) == (RT_TABLE_MAIN, RTN_UNICAST):
            index = struct.unpack("=I", values[RTA_OIF])[0]
            kept = {name: value for name, value in values.items() if name in ROUTE_ATTRIBUTES}
            # the other flags are states of a link, such as that its cable is out
            head = body[:8] + struct.pack("=I", flags & RTNH_F_ONLINK)
            found.setdefault(index, []).append((head, kept))
    return found


def dump_neighbours(netlink):
    import struct

    found = {}
    for body in netlink.request(RTM_GETNEIGH, NLM_F_DUMP, bytes(12)):
        family, index, state = struct.unpack_from("=BxxxiH", body)
        values = attributes(body[12:])
        if state & NUD_PERMANENT and family in (AF_INET, AF_INET6) and NDA_LLADDR in values:
            tail = attribute(NDA_DST, values[NDA_DST]) + attribute(NDA_LLADDR, values[NDA_LLADDR])
            found.setdefault(index, []).append((family, tail))
    return found


def read_ipv6_settings(device):
    """IPV6_SETTINGS of a link in our network namespace, {} where dom0 has no IPv6."""
    settings = {}
    for key in IPV6_SETTINGS:
        try:
            with open(f"/proc/sys/net/ipv6/conf/{device}/{key}", encoding="utf-8") as file:
                settings[key] = file.read().strip()
        except FileNotFoundError:
            pass
    return settings


def attachment_interface(attachment, log):
    """The Interface of a network that NETCONF names.  Raises Error."""
    import ipaddress

    addresses = [ipaddress.ip_interface(address) for address in attachment.addresses]
    if attachment.bridge:
        interface = Interface(
            name="", mac=bytes.fromhex(attachment.mac.replace(":", "")), mtu=attachment.mtu, addresses=[], routes=[],
            neighbours=[], ipv6={} if attachment.dhcp else {"accept_ra": "0"}, dhcp=attachment.dhcp, rate="",
            bridge=attachment.bridge, namespace="", device="",
        )  # fmt: skip
        for destination, gateway in attachment.routes:
            gateway = ipaddress.ip_address(gateway) if gateway else None
            interface.routes.append(route_message(ipaddress.ip_network(destination), gateway, addresses))
    else:
        found = namespace_interfaces(attachment.namespace, log)
        interface = next((each for each in found if each.device == attachment.interface), None)
        if not interface:
            raise Error(f"network {attachment.network}: its plugins have made no interface {attachment.interface}")
        interface.dhcp = attachment.dhcp
    for address in addresses:  # unless a plugin has set it
        if not any(address.packed in tail for _, tail in interface.addresses):
            interface.addresses.append(address_message(address))
    for gateway in map(ipaddress.ip_address, attachment.gateways):
        families = {head[0] for head, _ in interface.addresses}
        routed = {head[0] for head, _ in interface.routes if head[1] == 0}
        if family_of(gateway) in families - routed:
            everything = ipaddress.ip_network("0.0.0.0/0" if gateway.version == 4 else "::/0")
            interface.routes.append(route_message(everything, gateway, addresses))
    interface.rate = attachment.rate
    return interface


def find_interfaces(container, taken, log):
    """All Interfaces of a container's VM beside as many as are taken: eth0, eth1, … in this order, and then those with
    other names.  Raises Error."""
    state, found = container.state, []
    if state["namespace"] is not None:
        found = namespace_interfaces(f"/proc/{state['pid']}/ns/net", log)
        for interface in found:
            interface.rate = state["rate"]
    names = {f"eth{number}" for number in range(taken)}
    for interface in found:
        if interface.name in names:
            raise Error(f"the VM has an {interface.name} of xl's settings, and one of the engine's network namespace")
    names |= {interface.name for interface in found}
    for fields in state["networks"]:
        interface = attachment_interface(Attachment(**fields), log)
        interface.name = next(name for name in map("eth{}".format, range(len(names) + 1)) if name not in names)
        names.add(interface.name)
        found.append(interface)
    return sorted(found, key=lambda each: (not each.name.startswith("eth"), len(each.name), each.name))


def plug(container, log):
    """Gives a VM that does not run yet its network interfaces, and tells it about them.  Raises Error."""
    state = container.state
    if state["namespace"] is None and not state["networks"]:
        return
    xenstore, domid = Xenstore(), state["domid"]
    taken = xenstore.list(f"/libxl/{domid}/device/vif")  # what a file of xl's settings asks for
    interfaces = find_interfaces(container, len(taken), log)
    if not interfaces:
        return
    numbers = [number for number in range(len(interfaces) + len(taken)) if str(number) not in taken]
    container.save(vifs=numbers[: len(interfaces)], joined=[])
    try:
        for number, interface in zip(numbers, interfaces):
            join(interface, announce_vif(xenstore, domid, number, interface))
            if interface.namespace not in ("", container.path("netns")):  # it is to be as before afterwards
                state["joined"].append(interface.device)
                container.save()
            xenstore.write(f"/local/domain/0/backend/vif/{domid}/{number}/hotplug-status", "connected")
        tell_guest(xenstore, container, interfaces)
    except BaseException:
        unplug(xenstore, state)
        for number in state["vifs"]:
            xenstore.remove(f"/local/domain/{domid}/device/vif/{number}")
        raise


def announce_vif(xenstore, domid, number, interface):
    """Has netback make a vif, and returns its Link in dom0.  Raises Error."""
    events, name = Rtnetlink(groups=RTMGRP_LINK), f"vif{domid}.{number}"
    common = {"handle": str(number), "mac": interface.mac.hex(":")}
    backend = {**common, "script": HOTPLUG_SCRIPT, "hotplug-status": "", "type": "vif"}
    if interface.bridge:
        backend["bridge"] = interface.bridge
    if interface.rate:
        backend["rate"] = interface.rate

    def write(transaction):
        announce_listed(xenstore, "vif", domid, number, backend, common, transaction=transaction)

    xenstore.transaction(write)
    link = events.await_link(name, VIF_TIME_LIMIT)
    if not link:
        raise Error(f"dom0's kernel has not made {name} in {VIF_TIME_LIMIT} s: is its module xen-netback loaded?")
    return link


def join(interface, link):
    """Connects a vif in dom0 with the network that it is for.  Raises Error."""
    netlink = Rtnetlink()
    try:
        if interface.bridge:
            bridge = netlink.find_link(interface.bridge)
            if not bridge:
                raise Error(f"cannot connect the VM to the bridge {interface.bridge}: it is gone")
            interface.mtu = interface.mtu or bridge.mtu
            make_silent(netlink, link.index)
            port = attribute(IFLA_MTU, interface.mtu) + attribute(IFLA_MASTER, bridge.index)
            netlink.set_link(link.index, port, up=True)
            return
        namespace = os.open(interface.namespace, os.O_RDONLY)
        netlink.set_link(link.index, attribute(IFLA_NET_NS_FD, namespace))
        os.close(namespace)
        netlink = Rtnetlink(interface.namespace)
        moved, device = netlink.find_link(link.name), netlink.find_link(interface.device)
        if not device:
            raise Error(f"cannot connect the VM to {interface.device}: it is gone")
        make_silent(netlink, moved.index)
        netlink.set_link(moved.index, attribute(IFLA_MTU, interface.mtu), up=True)
        redirect(netlink, device.index, moved.index)
    except OSError as error:
        import errno

        reason = error.strerror
        if error.errno == errno.EEXIST:
            reason = f"{interface.device} is another VM's, or something else classifies its traffic"
        elif error.errno == errno.ENOENT:
            reason += ": is dom0's kernel without sch_ingress, cls_matchall and act_mirred?"
        raise Error(f"cannot connect the VM to {interface.bridge or interface.device}: {reason}") from None


def make_silent(netlink, index):
    """A vif has nothing to say by itself: no address by IPv6, and none of what comes with one."""
    mode = attribute(AF_INET6, attribute(IFLA_INET6_ADDR_GEN_MODE, b"\1"))
    try:
        netlink.set_link(index, attribute(IFLA_AF_SPEC, mode))
    except OSError:
        pass  # dom0 has no IPv6


def unplug(xenstore, state):
    """Takes away what plug() has made in dom0, as far as it came."""
    domid, vifs = state.get("domid"), state.get("vifs")
    if not vifs:
        return
    for number in vifs:
        xenstore.remove(f"/libxl/{domid}/device/vif/{number}")
    remove_backends(xenstore, "vif", domid, vifs)
    for device in state["joined"] if state["namespace"] else ():  # any other namespace ends with the container
        try:
            netlink = Rtnetlink(state["namespace"])
            links = {link.name: link for link in netlink.links()}
            # that of another VM which has come after ours
            taken = any(name.startswith("vif") and not name.startswith(f"vif{domid}.") for name in links)
            if device in links and not taken:
                end_redirect(netlink, links[device].index)
        except OSError:
            pass  # the engine has taken the interface or the namespace away


def tell_guest(xenstore, container, interfaces):
    """Writes what init/enter.c reads: data/network/0, 1, …, and data/dhcp and data/dns for init."""
    state = container.state
    data, texts = f"/local/domain/{state['domid']}/data", []
    # backwards: the guest's kernel calls them eth0, eth1, …, so an eth2 that is the second must be that before eth1 is
    for interface in reversed(interfaces):
        texts += split_words(guest_words(interface))
    for number, text in enumerate(texts):
        xenstore.write(f"{data}/network/{number}", text)
    dhcp = [interface.name for interface in interfaces if interface.dhcp]
    if dhcp:
        xenstore.write(f"{data}/hostname", state["hostname"])
        xenstore.write(f"{data}/dhcp", " ".join(dhcp))
    dns = "".join(resolv_conf(fields["dns"]) for fields in state["networks"])
    if dns:
        xenstore.write(f"{data}/dns", dns)


def split_words(words):
    """Texts of no more than GUEST_NODE_MAX bytes, each with the first word before some of the others."""
    head, *rest = words
    texts = [head]
    for word in rest:
        if len(texts[-1]) + len(word) >= GUEST_NODE_MAX:
            texts.append(head)
        texts[-1] += f" {word}"
    return texts


def guest_words(interface):
    """The MAC address that tells the interface, then what the guest does with it: messages and settings."""
    import struct

    name = attribute(IFLA_IFNAME, interface.name)
    words = [interface.mac.hex()]
    words.append(guest_message(RTM_NEWLINK, 0, *link_message(INDEX, name, attribute(IFLA_MTU, interface.mtu))))
    for key, value in {**interface.ipv6, "accept_dad": "0"}.items():
        words.append(f"sys/net/ipv6/conf/{interface.name}/{key}={value}")
    words.append(guest_message(RTM_NEWLINK, 0, *link_message(INDEX, up=True)))
    add = NLM_F_CREATE | NLM_F_REPLACE
    for head, tail in interface.addresses:
        if interface.ipv6.get("disable_ipv6") != "1" or head[0] != AF_INET6:
            words.append(guest_message(RTM_NEWADDR, add, head, INDEX, tail))
    # first those of the link, through which gateways are reached
    for head, values in sorted(interface.routes, key=lambda route: RTA_GATEWAY in route[1] or RTA_VIA in route[1]):
        body = head + b"".join(attribute(*item) for item in values.items()) + struct.pack("=HH", 8, RTA_OIF)
        # behind the one that came with an address, if a gateway is told for the same subnet; IPv6 cannot have both
        behind = NLM_F_APPEND if head[0] == AF_INET else 0
        words.append(guest_message(RTM_NEWROUTE, NLM_F_CREATE | behind, body, INDEX))
    for family, tail in interface.neighbours:
        head, state = struct.pack("=Bxxx", family), struct.pack("=HBB", NUD_PERMANENT, 0, 0)
        words.append(guest_message(RTM_NEWNEIGH, add, head, INDEX, state + tail))
    return words


# ==== state ==============================================================================================
# A container is the folder <root>/<id>; the folder is made by create and removed by delete.  state.json is
# written here only, and flock(2) on the folder keeps operations on one container apart.


def check_id(container_id):
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-."
    if container_id in ("", ".", "..") or len(container_id) > 200 or container_id.strip(allowed):
        raise Error(f"invalid container ID format: {container_id!r}: use up to 200 of A-Z a-z 0-9 _ + - .")
    return container_id


def process_start_time(pid):
    """Clock ticks since boot at which process pid was started, None if it has ended: proc(5) /proc/pid/stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def boot_id():
    """What tells this boot of the host from all others: pids, domids and what has them begin anew with it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


# what state.json holds from its first writing on
STATE_TYPES = {
    "ociVersion": str, "status": str, "bundle": str, "rootfs": str, "created": str, "annotations": dict, "hooks": dict,
    "uuid": str, "name": str, "boot": str, "pid": int, "pid_start_time": int, "startable": bool, "own_init": bool,
    "networks": list, "vifs": list, "rate": str, "hostname": str, "vbds": list, "monitor": list, "cgroups": list,
}  # fmt: skip
# and of a container that is created
CREATED_TYPES = {"domid": int, "maxmem": int, "maxvcpus": int, "resources": dict, "base": dict}


def parse_state(text):
    """The state in state.json.  Raises ValueError where runX cannot have written it."""
    state = parse_json(text)
    if not isinstance(state, dict) or state.get("status") not in ("creating", "created", "running"):
        raise ValueError
    older = {"boot": boot_id(), "monitor": [state.get("pid"), state.get("pid_start_time")], "cgroups": []}
    state = {**older, **state}  # an older runX has not written these
    types = STATE_TYPES if state["status"] == "creating" else {**STATE_TYPES, **CREATED_TYPES}
    if not all(isinstance(state.get(key), kind) for key, kind in types.items()):
        raise ValueError
    if list(map(type, state["monitor"])) != [int, int]:
        raise ValueError
    return state


class Container:
    """One container: its folder, its stored state, its lock."""

    def __init__(self, root, container_id):
        self.id = check_id(container_id)
        self.folder = os.path.join(root, self.id)
        self.state = {}
        self.forgiving = False  # a state that cannot be read is an empty one

    def path(self, name):
        return os.path.join(self.folder, name)

    def reserve(self):
        """Makes the folder: the step of which two creates of one id can do only one."""
        try:
            os.makedirs(os.path.dirname(self.folder), 0o711, exist_ok=True)
            os.mkdir(self.folder, 0o700)
        except FileExistsError:
            raise Error(f"container with given ID already exists: {self.id}") from None
        except OSError as error:
            raise Error(f"cannot make {self.folder}: {error.strerror}") from None

    def load(self):
        try:
            with open(self.path("state.json"), encoding="utf-8") as file:
                self.state = parse_state(file.read())
        except (FileNotFoundError, NotADirectoryError):
            if not os.path.isdir(self.folder):
                raise NoContainer(self.id) from None
            self.state = {"status": "creating"}  # between its first two steps, or killed there
        except (OSError, ValueError, TypeError, RecursionError):
            if not self.forgiving:
                remedy = f"remove the container by `runX delete --force {self.id}`"
                raise Error(f"cannot read {self.path('state.json')}, runX has not written it so: {remedy}") from None
            self.state = {"status": "creating", **self.told_to_xl()}
        return self

    def told_to_xl(self):
        """name and uuid of the VM as xl.cfg has them, {} if it has not: for a container whose state is lost."""
        try:
            with open(self.path("xl.cfg"), encoding="utf-8", errors="replace") as file:
                settings = dict(line.split(" = ", 1) for line in file if " = " in line)
            return {key: settings[key].strip().strip('"') for key in ("name", "uuid")}
        except (OSError, KeyError):
            return {}

    def save(self, **changes):
        """Stores the state with these changes, or leaves it as it was.  Raises Error."""
        path, state = self.path("state.json"), {**self.state, **changes}
        try:
            with open(path + ".new", "w", encoding="utf-8") as file:
                file.write(json_text(state))
            os.rename(path + ".new", path)
        except OSError as error:
            raise Error(f"cannot write {path}: {error.strerror}") from None
        self.state.update(changes)

    def domid(self, xenstore=None):
        """The number of its domain.  Raises NotRunning."""
        check_alive(xenstore or Xenstore(), self.state["domid"], self.state["uuid"])
        return self.state["domid"]

    def command_domain(self, verb, **changes):
        """Has xl `pause` or `unpause` the VM, which is not so yet, and stores what has changed by that.

        A file `unsettled` is there from before to after: whoever finds it asks Xen how it is.  It is empty, so that a
        full disk has room for it, and there the rest can wait; its name tells whether the VM has ever run.
        """
        domid, mark = self.domid(), self.path(f"unsettled-{self.state['status']}")
        try:
            open(mark, "w", encoding="ascii").close()
        except OSError as error:
            raise Error(f"cannot make {mark}: {error.strerror}") from None
        change_domain(verb, domid)
        try:
            self.save(**changes)
        except Error:
            return
        for mark in self.unsettled():
            os.unlink(mark)

    def unsettled(self):
        return list(filter(os.path.exists, map(self.path, ("unsettled-created", "unsettled-running"))))

    def settle(self):
        """Takes over from Xen whether the VM runs."""
        if self.path("unsettled-running") in self.unsettled():
            self.state["status"] = "running"
        try:
            listing = list_domain(self.domid())
        except NotRunning:
            return  # its monitor is about to end
        if listing and listing.state[2] != "p":
            self.state.update(status="running", paused=False)
        elif listing and self.state["status"] == "running":
            self.state["paused"] = True

    def __enter__(self):
        """`with container:` waits for other operations on it, and loads what they have stored."""
        import fcntl

        while True:
            try:
                self.lock_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
            except (FileNotFoundError, NotADirectoryError):
                raise NoContainer(self.id) from None
            try:
                if self.is_ours():
                    return self.load()
            except Error:
                os.close(self.lock_fd)
                raise
            os.close(self.lock_fd)  # deleted while we waited, and perhaps made again

    def is_ours(self):
        """Whether the folder that we have locked is still the container's."""
        try:
            return os.path.samestat(os.fstat(self.lock_fd), os.stat(self.folder))
        except FileNotFoundError:
            return False

    def __exit__(self, *_):
        os.close(self.lock_fd)

    def status(self, ask=True):
        """creating, created, running or stopped (runtime.md "State"), and runc's paused.  ask: Xen, if that must be."""
        if "pid" in self.state and not self.is_monitored():
            return "stopped"
        if ask and "domid" in self.state and self.unsettled():
            self.settle()
        return "paused" if self.state.get("paused") else self.state["status"]

    def is_of_this_boot(self):
        return self.state.get("boot") in (boot_id(), None)

    def is_monitored(self):
        """Whether the process is still there whose pid is the container's."""
        return process_start_time(self.state["pid"]) == self.state["pid_start_time"] and self.is_of_this_boot()

    def state_for_hooks(self, status):
        """The state as hooks get it, JSON: status is what it is by the runtime-spec, not yet or no more in fact."""
        return json_text(self.public_state(status))

    def public_state(self, status=None):
        """The state as runtime.md and `runc state` give it."""
        status, state = status or self.status(), self.state
        return {
            "ociVersion": state.get("ociVersion", "1.0.0"),
            "id": self.id,
            "pid": state.get("pid", 0) if status != "stopped" else 0,
            "status": status,
            "bundle": state.get("bundle", ""),
            "rootfs": state.get("rootfs", ""),
            "created": state.get("created", ""),
            "annotations": state.get("annotations", {}),
            "owner": "",
        }

    def remove(self):
        """Removes the folder, by name and only what create made: below `share` there may be mounts of others' files."""
        mounts = self.path("share/mounts")
        for name in os.listdir(mounts) if os.path.isdir(mounts) else ():
            remove_empty(os.path.join(mounts, name))
        for name in ("share/mounts", "share/rootfs", "share"):
            remove_empty(self.path(name))
        names = sorted(os.listdir(self.folder), key="state.json".__eq__)  # that one last: it says what is to be done
        for name in names:
            if not os.path.isdir(self.path(name)):
                os.unlink(self.path(name))
        remove_empty(self.folder)


def remove_empty(path):
    """Removes an empty folder or file, if it is there; what has content stays, and that is an Error."""
    try:
        if os.path.isdir(path):
            os.rmdir(path)
        elif os.path.lexists(path):
            if os.path.getsize(path):
                raise OSError(0, "it is not empty")
            os.unlink(path)
    except OSError as error:
        raise Error(f"cannot remove {path}: {error.strerror}") from None


# ==== hooks ==============================================================================================
# Programs of the engine's that run at points of a container's life: runtime-spec config.md "POSIX-platform
# Hooks".  Those of startContainer run in the guest, see enter.c.


def run_hooks(container, kind, status, namespaces=()):
    """Runs the container's hooks of one kind; the first that fails is an Error, and the last that runs."""
    for error in hook_errors(container, kind, status, namespaces):
        raise Error(error)


def hook_errors(container, kind, status, namespaces=()):
    """Runs hooks one by one, and yields a sentence, in runc's words, for each that fails.

    status: what the state that they read says.  namespaces: paths of those that they join.
    """
    for number, hook in enumerate(parse_hooks(container.state.get("hooks", {}), kind)):
        state = container.state_for_hooks(status).encode()
        reason, output = run_hook(hook, state, container.state["bundle"], namespaces)
        if reason:
            yield f"error running {kind} hook #{number}: {reason}{output}"


def run_hook(hook, state, bundle, namespaces):
    """Runs one hook to its end or its timeout; returns what went wrong, or "", and what it has written."""
    env = dict(variable.partition("=")[::2] for variable in hook.env)
    reason, *outputs = run_program(hook.args, hook.path, env, state, hook.timeout or None, bundle, namespaces)
    texts = [printable(output[:4096].decode("utf-8", "replace")) for output in outputs]
    if reason.startswith("ran past"):
        reason = f"hook ran past specified timeout of {hook.timeout}s"
    return reason, f", stdout: {texts[0]}, stderr: {texts[1]}"


# ==== holder =============================================================================================
# The process whose pid is the container's.  Engines and their tools enter its namespaces, read its cgroup, signal it
# and reap it; so it has nothing of dom0's open and does nothing but relay signals to the monitor, which is in dom0.

PR_SET_MM, PR_SET_MM_ARG_START, PR_SET_MM_ARG_END = 35, 8, 9  # <linux/prctl.h>
TITLE_MAX = 4096  # bytes of the command line that the holder shows


class Holder:
    """The monitor's side: the holder's pid, and a socket to it.

    The monitor sends two descriptors and whether the container's files are exported, and gets "+" or an error; later
    one byte, the exit status.  The holder sends signals, a byte each.
    """

    def __init__(self, pid, link):
        self.pid, self.link = pid, link

    def enter(self, exported):
        """Has the holder take our mount namespace's files as its own.  Raises Error."""
        import _socket
        import struct

        fds = [os.pidfd_open(os.getpid()), os.open("/proc/self/ns/mnt", os.O_RDONLY)]
        try:
            rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("ii", *fds))
            self.link.sendmsg([b"9p" if exported else b"-"], [rights])
            answer = self.link.recv(4096)
        except OSError:
            answer = b""
        finally:
            for fd in fds:
                os.close(fd)
        if answer != b"+":
            raise Error(answer.decode() or "the process that holds its namespaces was killed")

    def take_signals(self):
        """The numbers of signals that the holder has got, as bytes; none if it is gone."""
        try:
            return self.link.recv(64)
        except OSError:
            return b""

    def end(self, status):
        try:
            self.link.send(bytes([status]))
        except OSError:
            pass  # it was killed


def start_holder(config, share):
    """Makes the holder, as the first process of a new pid namespace; returns the Holder.  Raises Error."""
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        system_call("unshare", CLONE_NEWPID)
        pid = os.fork()
        if pid:
            system_call("setns", home, CLONE_NEWPID)  # what we start later is dom0's
    except OSError as error:
        raise Error(f"cannot make a pid namespace: {error.strerror}") from None
    if pid == 0:
        run_holder(config, share, theirs)
    os.close(home)
    theirs.close()
    return Holder(pid, ours)


def run_holder(config, share, link):
    """The holder's whole life; never returns."""
    import _socket
    import select
    import struct

    status = 128 + SIGKILL  # if the monitor is killed
    try:
        os.setsid()
        os.umask(0o022)
        close_other_descriptors({link.fileno()})
        signals, monitor = relay_signals(False), None
        message, rights, _, _ = link.recvmsg(16, _socket.CMSG_SPACE(8))
        if rights:  # else the monitor has failed before
            monitor, namespace = struct.unpack("ii", rights[0][2])
            try:
                enter_namespaces(config, share, namespace, message == b"9p")
                link.send(b"+")
            except Exception as error:
                link.send(str(error).encode("utf-8", "replace")[:4000])
        while rights and message:
            if signals in select.select([link, signals], [], [])[0]:
                link.send(os.read(signals, 64))
            else:
                message = link.recv(1)
                status = message[0] if message else status
        if monitor is not None:  # who hears that we have ended finds nothing of ours
            select.select([monitor], [], [])
    finally:
        os._exit(status)


def enter_namespaces(config, share, namespace, exported):
    """Makes the holder's namespaces the container's.  namespace: a descriptor of a mount namespace in which the share
    is.  Raises Error."""
    flags = CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWUTS
    name, process = config.hostname or os.uname().nodename, config.process
    try:
        if config.namespace:
            fd = os.open(config.namespace, os.O_RDONLY)
            system_call("setns", fd, CLONE_NEWNET)
            os.close(fd)
        else:
            flags |= CLONE_NEWNET
        system_call("unshare", flags)
        mark_namespace().detach()  # open as long as we live
        system_call("sethostname", name, len(os.fsencode(name)))
        system_call("setns", namespace, CLONE_NEWNS)
        os.close(namespace)
    except OSError as error:
        raise Error(f"cannot enter the container's namespaces: {error.strerror}") from None
    change_root(share, config, exported)
    show_arguments(process.args if process else ["runX"])


def show_arguments(args):
    """What ps(1) shows for us is the container's process, as far as config.json tells."""
    global title  # the kernel reads it as long as we live
    title = b"".join(arg.encode("utf-8", "surrogateescape") + b"\0" for arg in args)[:TITLE_MAX]
    start = id(title) + bytes.__basicsize__ - 1  # where CPython keeps the content
    try:
        system_call("prctl", PR_SET_MM, PR_SET_MM_ARG_START, start, 0, 0)
        system_call("prctl", PR_SET_MM, PR_SET_MM_ARG_END, start + len(title), 0, 0)
    except OSError:
        pass  # a kernel without it shows runX


def relay_signals(terminal):
    """The descriptor from which arrive, a byte each, the signals that a container's own process would get."""
    import _signal  # as in default_signals()

    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    names = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"]
    for name in [*names, "SIGWINCH"] if terminal else names:
        _signal.signal(getattr(_signal, name), lambda *_: None)
    return reader


def close_other_descriptors(keep):
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass  # the one that listdir had open


# ==== monitor ============================================================================================
# The process on dom0 that builds the domain, carries the streams, answers the guest, and takes everything down again,
# whatever the reason for the end.

# quiet: hvc0 is for what went wrong.  panic=-1: end at once, and be seen ending.
KERNEL_PARAMETERS = "console=hvc0 quiet loglevel=2 panic=-1"
OWN_INIT_PARAMETERS = "console=hvc0 panic=-1"
KERNEL_PARAMETERS_MAX = 1023  # bytes: MAX_GUEST_CMDLINE of xen/include/public/xen.h without its NUL
KILL_GRACE = 2.0  # seconds that a guest has to end by itself on SIGKILL, so that its writes are kept
CONSOLE_TAIL = 8192  # bytes of the guest's own console that are kept for the log

# how a domain ended that has not told an exit status: exit status, reason.  A pid namespace under runc ends
# by SIGINT on power-off and by SIGHUP on reboot (reboot(2)), so these are 130 and 129 here too.
ENDS = {
    "-": (130, "the VM was powered off from inside"),
    "r": (129, "the VM was rebooted from inside"),
    "s": (255, "the VM suspended itself"),
    "c": (255, "the VM crashed"),
    "w": (255, "the VM's watchdog fired"),
    "S": (255, "the VM made a soft reset"),
    "gone": (137, "the VM was destroyed"),
}


def lib_folder():
    """Where kernel and initrd are: beside this module, or <prefix>/lib/runX if it is <prefix>/sbin/runX."""
    here = os.path.dirname(os.path.realpath(__file__))
    return here if os.path.basename(here) == "runX" else os.path.normpath(os.path.join(here, "../lib/runX"))


def installed_file(name):
    path = os.path.join(lib_folder(), name)
    if not os.path.isfile(path):
        remedy = f"build one with {name}/build.sh and install it with install.sh --{name}"
        raise Error(f"there is no {name} at {path}: {remedy}")
    return path


def command_line(machine):
    """The words for the VM's kernel.  Raises Error where they do not fit: Xen would cut them off without a word."""
    line = " ".join([OWN_INIT_PARAMETERS if machine.own_init else KERNEL_PARAMETERS, *machine.cmdline])
    length = len(line.encode())
    if length > KERNEL_PARAMETERS_MAX:
        raise Error(f"the kernel's command line is {length} bytes long: make it {KERNEL_PARAMETERS_MAX} at most")
    return line


def detach(target):
    """Takes what is mounted there out of our own mount namespace, if anything is."""
    try:
        system_call("umount2", target, MNT_DETACH)
    except OSError:
        pass


def discard(path):
    """Unmounts and removes a file, if it is there."""
    if os.path.lexists(path):
        try:
            system_call("umount2", path, 0)
        except OSError:
            pass  # not a mount
        os.unlink(path)


def close_standard(fd):
    """Closes one of 0, 1, 2, so that the other end sees it, and keeps the number taken."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)


class Output:
    """One of the container's output streams: from a console to a descriptor of ours, without ever blocking."""

    def __init__(self, console, fd):
        self.console, self.fd, self.pending = console, fd, b""
        self.ended = False  # the process has closed it
        self.unread = False  # who has read it is gone

    def advance(self):
        """Moves what can be moved.  A pipe that is writable now takes PIPE_BUF bytes at once; asked for each
        write, because both streams may be one pipe."""
        import select

        if self.pending and select.select([], [self.fd], [], 0)[1]:
            try:
                self.pending = self.pending[os.write(self.fd, self.pending) :]
            except BlockingIOError:
                pass
            except OSError:
                self.pending, self.unread = b"", True
        if not self.pending:
            self.pending = self.console.take()
        if self.ended and not self.pending:
            close_standard(self.fd)
            self.ended = False
        return bool(self.pending)


class Input:
    """The container's standard input, or what is typed at its terminal: from descriptor 0 to a console.

    raw: the console's other end is not init/enter.c, which knows escapes and an end.
    """

    def __init__(self, console, fd, raw=False):
        self.console, self.fd, self.pending, self.open, self.raw = console, fd, b"", True, raw

    def advance(self, readable):
        if readable and not self.pending:
            try:
                data = os.read(self.fd, CONSOLE_IN)
            except OSError:
                data = b""  # such as the terminal of another session
            self.open = bool(data)
            self.pending = data if self.raw else encode_input(data) if data else END
        self.pending = self.pending[self.console.put(self.pending) :]


def open_terminal(console_socket, size):
    """Makes a pty, gives the engine its master, and returns its slave, which becomes our controlling terminal.

    console_socket: a path, or the descriptor of a connected socket; it gets one message, the pty's name and
    the one descriptor, as runc sends it.  size: rows, columns.  Raises Error.
    """
    import fcntl
    import socket
    import struct
    import termios
    import tty

    try:
        master, slave = os.openpty()
        tty.setraw(slave)  # the terminal in the guest edits, echoes and makes signals
        os.set_blocking(slave, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        if isinstance(console_socket, int):
            engine = socket.socket(fileno=console_socket)
        else:
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(console_socket)
        socket.send_fds(engine, [os.ttyname(slave).encode()], [master])
        engine.close()
        os.close(master)
        # a resize of the master is a SIGWINCH for the foreground of the slave's session: us
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    except OSError as error:
        raise Error(
            f"cannot send a terminal to the console socket {console_socket}: {error.strerror or error}"
        ) from None
    return slave


class Monitor:
    """Builds one domain, serves it until it ends, and leaves nothing of it."""

    def __init__(self, container, config, networks, bundle, log, console_socket=None, systemd=False):
        self.container, self.config, self.bundle, self.log = container, config, bundle, log
        self.networks, self.holder, self.systemd = networks, None, systemd
        self.console_socket, self.own_init = console_socket, config.machine.own_init
        self.xenstore = self.domid = self.exit_status = self.deadline = None
        self.consoles, self.ramdisk, self.disk, self.exported = [], None, None, False
        self.abandoned = False  # the end cannot wait for a reader of the output
        self.ready = False
        self.told_unread = ""
        self.tail = b""
        self.tail_fd = -1

    # ---- building

    def build(self):
        container, config = self.container, self.config
        uuid = new_uuid()
        container.save(
            ociVersion=config.oci_version, status="creating", bundle=self.bundle, rootfs=config.rootfs,
            created=timestamp(), annotations=config.annotations, hooks=config.hooks, uuid=uuid,
            # the uuid tells apart what has the same id in another root, or is still being destroyed
            name=f"runx-{container.id[:64]}-{uuid[:8]}",
            boot=boot_id(), pid=self.holder.pid, pid_start_time=process_start_time(self.holder.pid),
            monitor=[os.getpid(), process_start_time(os.getpid())], startable=bool(config.process),
            own_init=config.machine.own_init, namespace=config.namespace, networks=[], vifs=[], rate=config.rate,
            hostname=config.hostname or container.id[:63], disk=None, vbds=[],
            cgroups=[],
        )  # fmt: skip
        os.mkfifo(container.path("control"), 0o600)
        self.control = os.open(container.path("control"), os.O_RDWR | os.O_NONBLOCK)
        if config.cgroup:
            self.enter_cgroup()
        self.xenstore = Xenstore()
        self.attach_networks()
        self.boot(container.path("share"))
        self.channels = EventChannels()
        if not self.own_init:
            self.consoles = [Console(self.xenstore, self.channels, self.domid, number) for number in (1, 2)]
            self.xenstore.transaction(lambda number: [console.announce(number) for console in self.consoles])
        self.xenstore.watch(
            *((console.frontend + "/state", f"console {console.number}") for console in self.consoles),
            *((f"/local/domain/{self.domid}/data/{node}", node) for node in ("ready", "ended", "exit")),
            ("@releaseDomain", "release"),
        )
        self.xenstore.read("domid")  # each watch fires once when it is made, and before this is answered
        self.xenstore.take_events()
        if self.has_terminal():
            self.take_terminal()
        self.holder.enter(self.exported and not self.disk)
        sizes = self.sizes()
        container.save(
            domid=self.domid, disk=self.disk and self.disk.__dict__, maxmem=sizes["maxmem"],
            maxvcpus=sizes["maxvcpus"], resources=config.raw_resources, base=config.base,
        )  # fmt: skip
        self.debug(f"domain {self.domid} ({container.state['name']}) is built")

    def enter_cgroup(self):
        """Has the holder and us, and what we start, in the container's cgroup; kept in the state before it is made."""
        path, resources, scope = self.config.cgroup, self.config.resources, None
        if self.systemd:
            scope, path = start_scope(path, resources)
        try:
            cgroups = find_cgroups(path, bool(scope))
            self.container.save(cgroups=cgroups)
            make_cgroups(cgroups, resources, (self.holder.pid, os.getpid()))
        finally:
            if scope:
                scope.communicate()  # which ends it

    def attach_networks(self):
        """Has each network of NETCONF made or reserved, by its plugins; kept in the state before it is done."""
        container, attachments = self.container, []
        for number, network in enumerate(self.networks):
            attachment = plan_attachment(network, number, container, self.config.rate, self.log)
            attachments.append(attachment)
            container.save(networks=[each.__dict__ for each in attachments])
            if attachment.calls and not attachment.bridge and not os.path.exists(attachment.namespace):
                make_namespace(attachment.namespace)
            try:
                attach_network(attachment, network)
            finally:  # some plugins give back only what the result names, also that of half a chain
                container.save(networks=[each.__dict__ for each in attachments])

    def boot(self, share):
        """Builds the domain, with its rootfs where that is to be."""
        config, wanted = self.config, self.config.machine.rootfs
        if wanted == "block" or not os.path.isdir(config.rootfs):
            # volumes are exported; the files that engines mount, such as /etc/hosts, are not worth a QEMU
            self.disk = find_disk(config)
            self.exported = any(each.on_host() and each.is_folder() for each in config.mounts)
        else:
            self.exported = wanted in ("9p", "auto")
        sources = build_share(share, config)
        try:
            if self.exported and wanted != "9p" and not has_qemu():
                raise Error("there is no device model")
            self.build_domain(share, sources)
        except Error as error:
            if not self.exported or wanted == "9p" or "device model" not in str(error).lower():
                raise
            self.do_without_qemu()
            self.build_domain(share, sources)
        if self.disk:
            detach(config.rootfs)  # what `start` unmounts must not go on in this namespace

    def do_without_qemu(self):
        """Finds another place for what cannot be exported over 9p."""
        self.exported = False
        if not self.disk:
            try:
                self.disk = find_disk(self.config)
            except Error:
                pass  # nor is it on a block device
        instead = "has its rootfs on a block device, the rest" if self.disk else "has all of it"
        self.warn(f"QEMU cannot export the container's files over 9p on this host: the VM {instead} in its memory")

    def build_domain(self, share, sources):
        if self.disk:
            detach(os.path.join(share, "rootfs"))
        self.create_domain(*self.boot_files(share, sources), share)

    def boot_files(self, share, sources):
        """The paths of kernel and ramdisk; the latter may be None where the VM boots a system of its own."""
        config, machine, rootfs = self.config, self.config.machine, self.config.rootfs
        kernel = self.boot_file("kernel", machine.kernel, rootfs)
        if machine.own_init:
            return kernel, machine.ramdisk and self.boot_file("initrd", machine.ramdisk, rootfs)
        base = self.boot_file("initrd", None, rootfs)
        if config.process and os.path.isdir(rootfs):
            check_executable(rootfs, config)
        capabilities, modules, needed = {}, [], ()  # the latter: modules that a kernel needs to reach its rootfs
        try:
            self.ramdisk, path = self.open_ramdisk()
            if self.exported:
                needed = ("9pnet_xen", "9p")
            else:
                capabilities = pack_share(self.ramdisk, share, self.memory())
            if self.disk:
                needed += ("xen_blkfront", self.disk.kind, "overlay")
            if machine.kernel and needed:
                modules = kernel_modules(rootfs, machine.kernel[0], needed)
            guest = guest_config(config, sources, self.container.state_for_hooks("created"), capabilities)
            self.write_ramdisk(base, guest, modules)
        except OSError as error:
            raise Error(f"cannot write the container's ramdisk: {error.strerror}") from None
        return kernel, path

    def boot_file(self, name, source, rootfs):
        """The path that xl gets: ours, dom0's, or a mount of one in the rootfs, below a name without surprises."""
        if source is None:
            return installed_file(name)
        path, in_rootfs = source
        if not in_rootfs:
            return path
        purpose = f"cannot boot {path} of the container"
        fd = open_file_in_root(rootfs, path, purpose)
        check_boot_file(fd, name, self.memory(), purpose)
        target = self.container.path(name)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
        mount(f"/proc/self/fd/{fd}", target, MS_BIND)
        os.close(fd)
        return target

    def has_terminal(self):
        return bool(self.config.process and self.config.process.terminal)

    def take_terminal(self):
        """The standard streams become a terminal's, whose other end the engine has."""
        import signal

        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # if it hangs up now, create's end decides
        slave = open_terminal(self.console_socket, self.config.process.console_size)
        os.dup2(slave, 0)
        os.dup2(slave, 1)
        os.close(slave)
        close_standard(2)

    def memory(self):
        """MiB that the VM has at first."""
        return self.config.resources.mebibytes(self.config.resources.default_memory)

    def sizes(self):
        """What the VM has at first and what it may get, as xl.cfg has it; memory in MiB."""
        resources, machine, memory = self.config.resources, self.config.machine, self.memory()
        vcpus = resources.vcpus(resources.default_vcpus)
        maxmem, maxvcpus = max(memory, machine.maxmem), max(vcpus, machine.maxvcpus)
        return {"memory": memory, "maxmem": maxmem, "vcpus": vcpus, "maxvcpus": maxvcpus}

    def open_ramdisk(self):
        """The container's ramdisk, an open file, and the path that xl gets.  One that holds the rootfs has no place
        in /run, which is dom0's memory, and no name that could be left behind."""
        if self.exported:
            path = self.container.path("ramdisk")
            return open(path, "wb"), path
        name = f"/var/tmp/{self.container.state['name']}"
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(name)
        return os.fdopen(fd, "wb"), f"/proc/{os.getpid()}/fd/{fd}"

    def write_ramdisk(self, initrd, guest, modules):
        """Writes the rest of the ramdisk.  modules: (file name, content), in order."""
        entries = [("container", S_IFDIR | 0o700, b""), ("container/config", S_IFREG | 0o600, guest)]
        if self.disk:
            disk = f"{self.disk.kind} {'rw' if self.disk.writable else 'ro'}\n"
            entries += [("container/disk", S_IFREG | 0o600, disk.encode())]
        if modules:
            entries += [("modules", S_IFDIR | 0o700, b"")]
            entries += [(f"modules/{n:02}-{name}", S_IFREG | 0o600, data) for n, (name, data) in enumerate(modules)]
        # libxc takes a file that begins as gzip for one archive, and unpacks it in vain; the kernel takes any order
        with open(initrd, "rb") as base:
            self.ramdisk.write(cpio_archive(entries) + base.read())
        self.ramdisk.flush()

    def create_domain(self, kernel, ramdisk, share):
        state, machine, resources = self.container.state, self.config.machine, self.config.resources
        settings = {
            "name": state["name"], "uuid": state["uuid"], "type": machine.type or host_guest_type(),
            "kernel": kernel, "cmdline": command_line(machine),
            **self.sizes(), "cap": resources.cap(),
            **machine.options,
        }  # fmt: skip
        if ramdisk:
            settings["ramdisk"] = ramdisk
        if self.exported:
            if "," in share:
                raise Error(f"the state folder {share} must not hold a comma: xl cannot export it over 9p")
            settings["p9"] = [f"tag=share,security_model=none,path={share}"]
        if resources.shares:
            settings["cpu_weight"] = resources.weight()
        if resources.cpus:
            settings["cpus"] = resources.cpus
        xl_cfg = self.container.path("xl.cfg")
        with open(xl_cfg, "w", encoding="utf-8") as file:
            file.write(xl_config(settings) + "".join(line + "\n" for line in machine.lines))
        try:
            create_domain(xl_cfg, self.memory())
        finally:  # Xen has them in memory now, if it is to; /run is memory too, and the rootfs must not stay busy
            if self.ramdisk:
                self.ramdisk.close()
            for name in ("ramdisk", "kernel", "initrd"):
                discard(self.container.path(name))
        self.domid = find_domain(self.xenstore, settings["uuid"])
        if self.domid is None:
            raise Error(f"xl create made no domain with the uuid {settings['uuid']}")

    # ---- serving

    def serve(self):
        """Returns the container's exit status once its domain has ended and all output is delivered."""
        import select

        self.signals = relay_signals(self.has_terminal())
        self.open_tail()
        if self.own_init:
            self.ready, self.console = True, FirstConsole(self.tail_fd)
            self.outputs, self.input = [Output(self.console, 1)], Input(self.console, 0, raw=True)
        else:
            # to a terminal the second one brings why init could not open it
            self.outputs = [Output(self.consoles[0], 1), Output(self.consoles[1], 1 if self.has_terminal() else 2)]
            self.input = Input(self.consoles[0], 0)
        if self.has_terminal():
            self.resize()
        while not self.finished():
            poll = select.poll()
            for fd, events in self.interests():
                poll.register(fd, events)
            ready = {fd: events for fd, events in poll.poll(self.timeout())}
            self.handle(ready)
        return self.exit_status

    def finished(self):
        """Moves what can be moved without waiting; true when there is nothing left to wait for."""
        if self.exit_status is None:
            return False
        if self.abandoned:
            return True
        return not any([output.advance() for output in self.outputs]) and not (self.own_init and self.console.waits())

    def interests(self):
        import select

        for fd in (self.xenstore.fd, self.channels.fd, self.control, self.signals):
            yield fd, select.POLLIN
        if not self.abandoned:
            yield self.holder.link.fileno(), select.POLLIN
        if self.own_init and not self.console.ended:
            reading = 0 if self.outputs[0].pending else select.POLLIN
            yield self.tail_fd, reading | (select.POLLOUT if self.input.pending else 0)
        elif self.tail_fd >= 0 and not self.own_init:
            yield self.tail_fd, select.POLLIN
        for output in self.outputs:
            if output.pending:
                yield output.fd, select.POLLOUT
        if self.ready and self.input.open and not self.input.pending:
            yield self.input.fd, select.POLLIN

    def timeout(self):
        """Milliseconds; None waits for ever."""
        if self.xenstore.events:
            return 0
        return None if self.deadline is None else max(0, (self.deadline - time.monotonic()) * 1000)

    def handle(self, ready):
        if self.channels.fd in ready:
            self.channels.acknowledge()
        if self.xenstore.fd in ready or self.xenstore.events:
            self.handle_xenstore()
        for output in self.outputs:
            output.advance()
        if self.ready:
            self.input.advance(self.input.fd in ready)
        if self.control in ready:
            self.handle_control()
        if self.signals in ready:
            self.handle_signals(os.read(self.signals, 64))
        if self.holder.link.fileno() in ready:
            signals = self.holder.take_signals()
            self.handle_signals(signals)
            if not signals:
                self.end(128 + SIGKILL, abandon=True)  # for the engine the container is killed
        self.tell_unread()
        if self.tail_fd in ready and not self.own_init:
            self.read_tail()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.end(128 + 9, abandon=True)

    def handle_xenstore(self):
        # the end of some domain comes last: if it is ours, it has told its exit status before
        for token in sorted(self.xenstore.take_events(), key="release".__eq__):
            if token.startswith("console "):
                self.consoles[int(token.split()[1]) - 1].follow()
            elif token == "ready" and not self.ready:
                self.ready = self.read_data("ready") is not None
                if self.ready and self.config.hooks:  # for a start that comes too late to see it in xenstore
                    open(self.container.path("ready"), "w", encoding="utf-8").close()
            elif token == "ended":
                self.close_ended(self.read_data("ended") or "")
            elif token == "exit":
                self.take_exit_status()
            elif token == "release" and self.exit_status is None:
                self.check_domain()

    def close_ended(self, streams):
        """streams: the numbers of those that the process has closed, in the guest's words."""
        if self.has_terminal():
            return  # a terminal ends in no other way than by hanging up
        for output in self.outputs:
            output.ended = output.ended or str(output.fd) in streams
        if "0" in streams and self.input.open:
            self.input.open = False
            close_standard(0)

    def tell_unread(self):
        """Lets the process see that nobody reads its output any more, as it would see it with a pipe of the host's."""
        unread = "".join(str(output.fd) for output in self.outputs if output.unread)
        if unread != self.told_unread:
            self.told_unread = unread
            self.ask("look", "look", {"unread": unread})

    def read_data(self, node):
        """What the guest has written below data/, or None."""
        return self.xenstore.read(f"/local/domain/{self.domid}/data/{node}")

    def take_exit_status(self):
        text = self.read_data("exit")
        if text is None or self.exit_status is not None:
            return
        if text.isascii() and text.isdecimal() and int(text) <= 255:
            self.end(int(text))
        else:
            self.warn("the VM told no valid exit status")
            self.end(255)
        for node, what in (("error", "the VM's init"), ("oom", "the VM has run out of memory")):
            reason = self.read_data(node)
            if reason:
                self.warn(f"{what}: {printable(reason)}")
                self.report_tail()
            if reason and node == "oom":
                self.show_oom()

    def show_oom(self):
        try:
            show_oom(self.container.state["cgroups"])
        except OSError as error:
            self.debug(f"its cgroup does not show that memory has run out: {error}")

    def check_domain(self):
        if seen_alive(self.domid):
            return
        try:
            end = domain_end(self.domid)
        except Error as error:  # xl is stuck, or has no memory: the next end of a domain is the next chance
            self.warn(str(error))
            return
        if not end:
            return
        # the guest may have told its status just before
        self.take_exit_status()
        if self.exit_status is None and self.own_init and end == "-":
            self.end(0)
        elif self.exit_status is None:
            status, reason = ENDS.get(end, ENDS["c"])
            self.warn(f"{reason}; exit status {status}")
            self.report_tail()
            self.end(status)

    def handle_control(self):
        """Requests of other runX processes: "kill N", "destroy N" (N: a signal), a line each."""
        for line in os.read(self.control, 4096).decode("ascii").splitlines():
            verb, _, number = line.partition(" ")
            if verb == "destroy" or self.exit_status is not None:
                self.end(128 + int(number), abandon=True)
            elif self.deadline is None:
                self.deadline = time.monotonic() + KILL_GRACE
                self.signal(int(number))

    def handle_signals(self, numbers):
        for number in numbers:
            if number == SIGWINCH:
                self.resize()
            elif number == SIGHUP and self.has_terminal():
                self.outputs[0].unread = True  # the kernel tells us, as the pty's owner, that the engine has hung up
            elif self.container.load().state["status"] == "created" and not self.container.unsettled():
                self.end(128 + number)
            else:
                self.signal(number)

    def signal(self, number):
        self.ask(f"kill {number}")

    def resize(self):
        try:
            size = os.get_terminal_size(0)
        except OSError:
            return  # the engine has hung up
        self.ask("look", "look", {"winsize": f"{size.lines} {size.columns}"})

    def ask(self, request, key=None, data=None):
        domain = (self.xenstore, self.domid, self.container.state["uuid"])
        try:
            if not self.own_init:
                send_request(*domain, request, key, data)
            elif request.startswith("kill"):
                shut_down(*domain)
        except Error as error:
            self.debug(str(error))  # gone, or its quota is full: the deadline or @releaseDomain ends it

    def end(self, status, abandon=False):
        """The container has ended with status; abandon: do not wait for readers of its output."""
        if self.exit_status is None:
            self.exit_status = status
            self.debug(f"the exit status is {status}")
        self.abandoned = self.abandoned or abandon
        if self.abandoned:
            self.deadline = None  # else, after SIGKILL, it is what readers of the output still have

    # ---- the guest's own console: kernel and init

    def open_tail(self):
        path = self.xenstore.read(f"/local/domain/{self.domid}/console/tty", "")
        if path.startswith("/dev/pts/"):
            try:
                self.tail_fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                self.debug(f"cannot open {path}: {error.strerror}")
        if self.own_init and self.tail_fd < 0:
            raise Error("cannot reach the VM's console: is xenconsoled running?")

    def read_tail(self):
        try:
            data = os.read(self.tail_fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os.close(self.tail_fd)
            self.tail_fd = -1
        self.tail = (self.tail + data)[-CONSOLE_TAIL:]

    def warn(self, message):
        self.log.write("warning", f"container {self.container.id}: {message}")

    def debug(self, message):
        self.log.debug(f"container {self.container.id}: {message}")

    def report_tail(self):
        while self.tail_fd >= 0 and self.tail_fd_ready():
            self.read_tail()
        if self.tail.strip():
            self.warn(f"the VM's console: {printable(self.tail.decode('utf-8', 'replace'))}")

    def tail_fd_ready(self):
        import select

        return bool(select.select([self.tail_fd], [], [], 0)[0])

    # ---- taking down

    def take_down(self):
        """Undoes build(), as far as it came.  Streams first: who reads them sees the end at once."""
        for fd in (0, 1, 2):
            close_standard(fd)
        try:
            state = self.container.load().state  # `start` has added to it
        except Error:
            state = self.container.state
        if self.xenstore is not None:
            clean_up(self.xenstore, state, self.log)
        self.debug("the domain is gone")


def clean_up(xenstore, state, log):
    """Removes what a container has outside its folder: domain, QEMU with it, xenstore nodes, vifs, log files.

    What cannot be removed is a warning; Error if that is the domain, which must not be forgotten.
    """
    uuid, name = state.get("uuid"), state.get("name")
    if uuid is None:
        return  # it came no further
    domid = find_domain(xenstore, uuid) or find_half_built(uuid)
    if domid is not None:
        # xl destroy signals QEMU and then waits two seconds for each of its devices (LIBXL_QEMU_BODGE_TIMEOUT in
        # libxl_internal.h), answer or not; a device that is not on libxl's list it does not wait for
        xenstore.remove(f"/libxl/{domid}/device/9pfs")
        for kind, numbers in (("vif", state.get("vifs", ())), ("vbd", state.get("vbds", ()))):
            for number in numbers:
                xenstore.remove(f"/libxl/{domid}/device/{kind}/{number}")
        destroy_domain(domid)
    domid = domid or state.get("domid")
    ours = f"/vm/{uuid}"
    if domid is not None and xenstore.read(f"/local/domain/{domid}/vm", ours) == ours:  # else it is another VM's by now
        what = f"remove what {name} has had in dom0"
        log.attempt(what, unplug, xenstore, state)
        log.attempt(what, detach_disk, xenstore, state)
        for kind, numbers in (("9pfs", (0,)), ("console", (1, 2))):
            log.attempt(what, remove_backends, xenstore, kind, domid, numbers)
    log.attempt(f"remove the log files of {name}", remove_logs, name)


def remove_logs(name):
    folder = "/var/log/xen"
    for file in os.listdir(folder) if os.path.isdir(folder) else ():
        if f"-{name}.log" in file:
            os.unlink(os.path.join(folder, file))


def destroy(container, log):
    """Removes what is left of a container that has no monitor any more, gives back its addresses, and runs its poststop
    hooks.  What fails is a warning; Error if the VM or the folder is still there."""
    state = container.state
    if not container.is_of_this_boot():  # nor is anything else in Xen
        log.attempt(f"remove the log files of {state['name']}", remove_logs, state["name"])
    elif "uuid" in state and os.path.exists(container.path("control")):  # which goes when a monitor has taken all down
        clean_up(Xenstore(), state, log)
    for fields in reversed(state.get("networks", ())):
        log.attempt(f"give back a network of {container.id}", detach_network, fields, log)
    log.attempt(f"remove the network namespace of {container.id}", discard, container.path("netns"))
    if container.is_of_this_boot():
        pids = (state.get("pid"), *state.get("monitor", ())[:1])
        log.attempt(f"remove the cgroup of {container.id}", remove_cgroups, state.get("cgroups", ()), pids)
    container.remove()
    log.attempt(f"run the poststop hooks of {container.id}", run_poststop, container, log)


def run_poststop(container, log):
    for error in hook_errors(container, "poststop", "stopped"):
        log.write("warning", error)


def new_uuid():
    """A random uuid (RFC 4122, version 4) as text."""
    number = bytearray(os.urandom(16))
    number[6], number[8] = number[6] & 0x0F | 0x40, number[8] & 0x3F | 0x80
    digits = number.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def run_monitor(monitor, report, commit):
    """The monitor's whole life; never returns.

    report: a pipe to create, that gets "+" or an error.  commit: a pipe from create, that gets one byte
    once create has done its part; its end without one means that create is gone, and all goes with it.
    """
    committed, status, failure, home = False, 255, None, None
    try:
        os.setsid()
        os.chdir("/")
        close_other_descriptors({0, 1, 2, report, commit, monitor.console_socket, monitor.holder.link.fileno()})
        home = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        monitor.build()
        os.write(report, b"+")
        os.close(report)
        committed = bool(os.read(commit, 1))
        return_home(home)  # the share is the holder's now, and QEMU's
        if committed:
            status = monitor.serve()
    except BaseException as error:
        failure = str(error) if isinstance(error, Error) else f"internal error of the monitor: {error!r}"
    try:
        monitor.take_down()
        if os.path.exists(monitor.container.path("control")):
            os.unlink(monitor.container.path("control"))  # tells delete that nothing is left outside the folder
        if not committed:
            if home is not None:
                return_home(home)  # poststop hooks run where the others have run
            destroy(monitor.container, monitor.log)
    except BaseException as error:
        monitor.log.write("error", f"cannot clean up after container {monitor.container.id}: {error}")
    if committed and failure:
        monitor.log.write("error", failure)
    elif failure:
        report_failure(report, failure)
    monitor.holder.end(status)
    os._exit(status)


def return_home(namespace):
    """Goes back to dom0's mount namespace, a descriptor."""
    system_call("setns", namespace, CLONE_NEWNS)
    os.chdir("/")


def report_failure(report, failure):
    try:
        os.write(report, failure.encode("utf-8", "replace"))
    except OSError:
        pass  # create is gone too


# ==== commands ===========================================================================================
# One function per command, in the order of a container's life.  Each gets the Invocation.

# signals that end a container which is not started, as they end runc's init, a Go program; others do nothing to it
ENDING_SIGNALS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 31}
SIGNALS = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU "
    "URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
).split()
MONITOR_END = 60.0  # seconds that delete gives a monitor to take its domain down


class Invocation(Record):
    """A parsed command line."""

    root: str
    log: Log
    systemd: bool  # it makes the cgroups
    options: dict  # without their dashes; flags are True
    arguments: list

    def container(self):
        if not self.arguments:
            raise Error("a container ID is required as an argument")
        return Container(self.root, self.arguments[0])


def command_create(call):
    container, config, bundle = prepare(call)
    create(call, container, config, bundle, find_console_socket(call, config, attached=False))


def prepare(call):
    """What create and run begin with: the container, not made yet, its config and its bundle."""
    container = call.container()
    bundle = os.path.realpath(call.options.get("bundle", "."))
    if not is_text(bundle + call.root):
        raise Error(f"the paths of bundle and root must be UTF-8: {printable(bundle)}, {printable(call.root)}")
    config = load_config(bundle)
    find_xl()
    fit_vcpus(config)
    take_ordinary_score()
    return container, config, bundle


def fit_vcpus(config):
    """Has no more vcpus than the host has processors, and than the VM's memory can carry."""
    resources, machine = config.resources, config.machine
    if max(resources.vcpus(resources.default_vcpus), machine.maxvcpus) > 1:
        carried = max(1, resources.mebibytes(resources.default_memory) // VCPU_MEMORY)
        resources.most_vcpus = config.base["most_vcpus"] = most = min(host_processors(), carried)
        machine.maxvcpus = min(machine.maxvcpus, most)


def find_console_socket(call, config, attached):
    """The absolute path of --console-socket, or None; Error, in runc's words, unless it is there just when needed.

    attached: the caller is there to be the terminal's other end.
    """
    path = call.options.get("console-socket")
    terminal = bool(config.process and config.process.terminal)
    if terminal and not path and not attached:
        raise Error("cannot allocate tty if runX will detach without setting console socket")
    if path and (attached or not terminal):
        raise Error("cannot use console socket if runX will not detach or allocate tty")
    return path and os.path.abspath(path)


def create(call, container, config, bundle, console_socket):
    """Makes the container; returns the monitor's pid."""
    networks = [load_network(request, config.netconf_folders) for request in config.netconf]
    if config.namespace:
        in_namespace(config.namespace, mark_namespace)
    container.reserve()
    with container:
        try:
            for warning in config.warnings:
                call.log.write("warning", f"container {container.id}: {warning}")
            monitor = Monitor(container, config, networks, bundle, call.log, console_socket, call.systemd)
            return start_monitor(monitor, call.options.get("pid-file"))
        except BaseException:
            if container.is_ours():  # still there: the monitor was killed
                destroy(container.load(), call.log)
            raise


def start_monitor(monitor, pid_file):
    """Returns the pid of the holder, which is the container's.  Raises Error."""
    holder = monitor.holder = start_holder(monitor.config, monitor.container.path("share"))
    report_reader, report_writer = os.pipe()
    commit_reader, commit_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_monitor(monitor, report_writer, commit_reader)
    os.close(report_writer)
    os.close(commit_reader)
    holder.link.close()
    written = None
    try:
        report = read_all(report_reader)
        if report != b"+":
            reason = report.decode() or "its monitor was killed"
            raise Error(f"cannot create container {monitor.container.id}: {reason}")
        container = monitor.container.load()
        run_hooks(container, "prestart", "creating")
        run_hooks(container, "createRuntime", "creating")
        namespaces = (f"/proc/{holder.pid}/ns/net", f"/proc/{pid}/ns/mnt")
        run_hooks(container, "createContainer", "creating", namespaces)
        if pid_file:
            write_pid_file(pid_file, holder.pid)
            written = pid_file
        container.save(status="created")
        os.write(commit_writer, b"+")
        return holder.pid
    except BaseException as error:
        os.close(commit_writer)  # the monitor takes all down when it sees this
        os.waitpid(pid, 0)
        os.waitpid(holder.pid, 0)
        if written:
            os.unlink(written)
        if isinstance(error, BrokenPipeError):
            raise Error(f"cannot create container {monitor.container.id}: its monitor was killed") from None
        raise


def read_all(fd):
    data = b""
    while chunk := os.read(fd, 65536):
        data += chunk
    return data


def write_pid_file(path, pid):
    """The pid in decimal and nothing else, in one step: engines read it as soon as it is there."""
    temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(str(pid))
        os.rename(temporary, path)
    except OSError as error:
        raise Error(f"cannot write the pid file {path}: {error.strerror}") from None


def command_start(call):
    start(call.container(), call.log)


def start(container, log):
    with container:
        status = container.status()
        if status == "stopped":
            raise Error("cannot start a container that has stopped")
        if status == "running":
            raise Error("cannot start an already running container")
        if status != "created":
            raise Error(f"cannot start a container in the {status} state")
        if not container.state["startable"]:
            raise Error(f"cannot start container {container.id}: its config.json has no process")
        container.domid()  # the number that all of this is for
        unmounted = attach_disk(container)
        try:
            plug(container, log)
            container.command_domain("unpause", status="running")
        except BaseException:
            if container.state.get("disk"):
                return_disk(container, unmounted)
            raise
    # without the lock: a hook may call runX
    if container.state["hooks"].get("startContainer") or container.state["hooks"].get("poststart"):
        if not container.state.get("own_init"):
            await_process(container)
        try:
            run_hooks(container, "poststart", "running")
        except Error:
            with container:
                stop_monitor(container)
                destroy(container, log)
            raise


def await_process(container):
    """Waits until the container's process is executed; Error if it ends before: a startContainer hook has failed."""
    import select

    xenstore, data = Xenstore(), f"/local/domain/{container.state['domid']}/data"
    xenstore.watch((data, "data"))
    pidfd = open_pidfd(container)
    reason = None
    while pidfd is not None:
        if not xenstore.events and pidfd in select.select([xenstore.fd, pidfd], [], [])[0]:
            break
        xenstore.take_events()
        if xenstore.read(f"{data}/ready"):
            os.close(pidfd)
            return
        reason = xenstore.read(f"{data}/error") or reason
    if os.path.exists(container.path("ready")):
        return  # it was over before we were told
    raise Error(f"cannot start container {container.id}: {printable(reason or 'its VM has ended, see the log')}")


def command_run(call):
    """create, start and, unless detached, wait: the exit status is the container's."""
    container, config, bundle = prepare(call)
    attached = "detach" not in call.options
    console_socket, engine = find_console_socket(call, config, attached), None
    if attached and config.process and config.process.terminal:
        import socket

        engine, console_socket = (end.detach() for end in socket.socketpair())
    pid = create(call, container, config, bundle, console_socket)
    try:
        start(container, call.log)
    except BaseException:
        delete(container, True, call.log)
        raise
    if not attached:
        return 0
    forward_signals(pid)
    if engine is not None:
        os.close(console_socket)
        with socket.socket(fileno=engine) as connection:
            attach(socket.recv_fds(connection, 4096, 1)[1][0])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if "keep" not in call.options:
        delete(call.container(), True, call.log)
    return status if status >= 0 else 128 - status


def attach(master):
    """Joins our standard input and output, a terminal or not, to a container's terminal until that ends."""
    import select
    import signal
    import termios
    import tty

    def resize(*_):
        import fcntl

        fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))

    saved = termios.tcgetattr(0) if os.isatty(0) else None
    if saved:
        tty.setraw(0)
        signal.signal(signal.SIGWINCH, resize)
        resize()
    os.set_blocking(master, False)
    typed, reading = b"", True  # typed: what the container has yet to take
    try:
        while True:
            sources = [master] if typed or not reading else [master, 0]
            readable, writable, _ = select.select(sources, [master] if typed else [], [])
            if 0 in readable:
                typed = os.read(0, 4096)
                reading = bool(typed)
            if writable:
                typed = typed[os.write(master, typed) :]
            if master in readable:
                output = os.read(master, 4096)
                while output:
                    output = output[os.write(1, output) :]
    except OSError:
        pass  # EIO from the master: the container's end is closed; or nobody is at ours any more
    finally:
        os.close(master)  # which hangs up, if it has not ended
        try:
            if saved:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)
        except termios.error:
            pass  # the terminal has gone


def forward_signals(pid):
    """What a person or a supervisor sends to `run` goes to the monitor, which gives it to the process."""
    import signal

    def forward(number, _):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, forward)


def command_state(call):
    print_json(call.container().load().public_state())


def print_json(value, indent=2):
    """indent None: on one line, at once, for a reader of a stream."""
    print(json_text(value, indent=indent), flush=True)


def parse_signal(text):
    """The number of a signal given as 15, TERM or SIGTERM (also RTMIN+1, RTMAX-1)."""
    name = text.upper().removeprefix("SIG")
    if name.isdecimal() and len(name) < 10 and int(name) <= 64:
        return int(name)
    if name in SIGNALS:
        return SIGNALS.index(name) + 1
    for base, number in (("RTMIN", 34), ("RTMAX", 64)):
        if name.startswith(base):
            offset = name[len(base) :] or "+0"
            if offset[0] in "+-" and offset[1:].isdecimal() and len(offset) < 5 and 34 <= number + int(offset) <= 64:
                return number + int(offset)
    raise Error(f"unknown signal {text!r}: give a number from 0 to 64 or a name such as TERM")


def command_kill(call):
    signal = call.options.get("signal") or (call.arguments[1] if len(call.arguments) > 1 else "TERM")
    kill(call.container(), parse_signal(signal), "all" in call.options)


def kill(container, number, to_all=False):
    """Asks for the signal and returns; whether and when the container ends is its monitor's to see."""
    with container:
        status = container.status(ask=number != SIGKILL)  # which must not wait for xl
        if status == "stopped" and to_all:
            return  # as runc: all of nothing is done
        if status in ("stopped", "creating"):
            raise NotRunning()
        try:
            send_signal(container, number, to_all)
        except NotRunning:
            pass  # it is ending, and as long as its pid is there it takes signals, as any process does


def send_signal(container, number, to_all):
    own_init, domain = container.state["own_init"], (container.state["domid"], container.state["uuid"])
    certain = number != SIGKILL or not container.unsettled()
    if container.state["status"] == "created" and certain:  # its process is yet to be: only the end can be had
        if number in ENDING_SIGNALS:
            tell_monitor(container, f"destroy {number}")
    elif number == SIGKILL:
        tell_monitor(container, f"destroy {number}" if own_init else f"kill {number}")
        try:  # so that its last writes reach the host, if that can be
            if container.status() == "paused" and container.state["status"] == "running" and not own_init:
                container.command_domain("unpause", paused=False)
        except Error:
            pass
    elif own_init:
        if number in ENDING_SIGNALS:
            shut_down(Xenstore(), *domain)
    elif number != 0:
        send_request(Xenstore(), *domain, f"killall {number}" if to_all else f"kill {number}")


def open_pidfd(container):
    """A descriptor that is readable once the monitor has ended; None if it has."""
    if container.state.get("pid") is None or container.status() == "stopped":
        return None
    try:
        return os.pidfd_open(container.state["pid"])
    except ProcessLookupError:
        return None


def tell_monitor(container, request):
    try:
        fd = os.open(container.path("control"), os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no such file, or nobody reads it
        raise NotRunning() from None
    os.write(fd, request.encode() + b"\n")
    os.close(fd)


def command_delete(call):
    delete(call.container(), "force" in call.options, call.log)


def delete(container, force, log):
    container.forgiving = force
    try:
        with container:
            status = container.status(ask=not force)
            if "pid" not in container.state and os.path.exists(container.path("state.json")):
                log.write("warning", f"the state of container {container.id} is lost: its networks and cgroup stay")
            if status not in ("stopped", "created") and not force:
                raise Error(f"cannot delete container {container.id} that is not stopped: {status}")
            stop_monitor(container)
            if container.is_ours():  # a monitor that was still creating has removed it by itself
                destroy(container, log)
    except NoContainer:
        if not force:
            raise


def stop_monitor(container):
    """Ends the monitor with its domain, and the holder; by force if they do not do so themselves in time."""
    state = container.state
    try:
        tell_monitor(container, f"destroy {SIGKILL}")
    except NotRunning:
        pass  # it is ending already
    for pid, start_time in (state.get("monitor", (None, 0)), (state.get("pid"), state.get("pid_start_time"))):
        if pid is not None and container.is_of_this_boot():
            end_process(pid, start_time)


def end_process(pid, start_time):
    """Waits for the end of a process, and kills it if that does not come in time."""
    import select

    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return  # it has ended, and the number may be a thread's
    try:
        if process_start_time(pid) == start_time and not select.select([pidfd], [], [], MONITOR_END)[0]:
            os.kill(pid, SIGKILL)
            select.select([pidfd], [], [], MONITOR_END)
    finally:
        os.close(pidfd)


def command_pause(call):
    """The VM gets no processor time until `resume`.  One that is not started has none anyway."""
    container = call.container()
    with container:
        status = container.status()
        if status not in ("created", "running"):
            raise NotRunning()
        if status == "running":
            container.command_domain("pause", status="running", paused=True)
        else:
            container.save(paused=True)


def command_resume(call):
    container = call.container()
    with container:
        if container.status() != "paused":
            raise Error("container not paused")
        if container.state["status"] == "running":
            container.command_domain("unpause", paused=False)
        else:
            container.save(paused=False)


def output_format(call):
    """ "table" or "json"; Error if --format is another."""
    wanted = call.options.get("format", "table")
    if wanted not in ("table", "json"):
        raise Error(f"invalid format option {printable(wanted)}: use table or json")
    return wanted


def command_ps(call):
    """The container's process as dom0 sees it: the monitor.  What runs in the VM, only the VM knows."""
    import subprocess

    container, form = call.container().load(), output_format(call)
    status, pid = container.status(), str(container.state.get("pid"))
    if status == "creating":
        raise NotRunning()
    if form == "json":
        print_json(None if status == "stopped" else [int(pid)], None)
        return
    if status == "stopped":
        pid = None  # as runc: the heading alone
    command = ["ps", *(call.arguments[1:] or ["-ef"])]
    result = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "PATH": PATH}, text=True, check=False)
    head, *rows = result.stdout.splitlines() or [""]
    if result.returncode != 0 or "PID" not in head.split():
        raise Error(f"cannot tell a PID column in the output of {' '.join(command)}: try --format json")
    column = head.split().index("PID")
    print(head, *(row for row in rows if row.split()[column : column + 1] == [pid]), sep="\n")


def command_events(call):
    """As `runc events`: one line of JSON every --interval, and "oom" when that happens; once with --stats."""
    import select

    container = call.container()
    interval = parse_duration(call.options.get("interval", "5s"))
    container.load()
    pidfd = None if container.status() == "creating" else open_pidfd(container)
    if pidfd is None:
        raise Error(f"container with id {container.id} is not running")
    if "stats" in call.options:
        print_stats(container)
        return
    xenstore, told = Xenstore(), False
    oom = f"/local/domain/{container.domid(xenstore)}/data/oom"
    xenstore.watch((oom, "oom"))
    deadline = time.monotonic()
    while True:
        if time.monotonic() >= deadline:
            print_stats(container)
            deadline += interval
        wait = 0 if xenstore.events else max(0, deadline - time.monotonic())
        ready = select.select([xenstore.fd, pidfd], [], [], wait)[0]
        if xenstore.fd in ready or xenstore.events:
            xenstore.take_events()
            if not told and xenstore.read(oom):
                told = True
                print_json({"type": "oom", "id": container.id}, None)
        elif pidfd in ready:
            return


def parse_duration(text):
    """Seconds of a Go duration such as 5s, 500ms, 1m30s; Error if it is none or not positive."""
    import re

    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise Error(f"option --interval of events needs a duration such as 5s, not {text!r}")
    return seconds


def print_stats(container):
    """What Xen has counted, in runc's shape (types/events.go): nanoseconds and bytes.  Nothing if it is gone."""
    try:
        domain = list_domain(container.domid())
    except NotRunning:
        return
    if domain is None:
        return
    memory = {"limit": container.state["maxmem"] << 20, "usage": domain.memory << 20, "failcnt": 0}
    print_json({
        "type": "stats",
        "id": container.id,
        "data": {
            "cpu": {"usage": {"total": round(domain.time * 10) * 10**8, "kernel": 0, "user": 0}, "throttling": {}},
            "memory": {"usage": memory, "swap": {"failcnt": 0}, "kernel": {"failcnt": 0}, "kernelTCP": {"failcnt": 0}},
            "pids": {},
            "blkio": {},
            "hugetlb": {},
            "intel_rdt": {},
        },
    }, None)  # fmt: skip


# `update`: the option for each field of linux.resources, runc's names
UPDATE_OPTIONS = {
    "memory": ("memory", "limit"), "memory-reservation": ("memory", "reservation"), "memory-swap": ("memory", "swap"),
    "kernel-memory": ("memory", "kernel"), "kernel-memory-tcp": ("memory", "kernelTCP"),
    "cpu-quota": ("cpu", "quota"), "cpu-period": ("cpu", "period"), "cpu-share": ("cpu", "shares"),
    "cpu-burst": ("cpu", "burst"), "cpu-idle": ("cpu", "idle"), "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"), "cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems"),
    "blkio-weight": ("blockIO", "weight"), "pids-limit": ("pids", "limit"),
    "l3-cache-schema": ("intelRdt", "l3CacheSchema"), "mem-bw-schema": ("intelRdt", "memBwSchema"),
}  # fmt: skip
UPDATABLE = {("memory", "limit"), ("cpu", "quota"), ("cpu", "period"), ("cpu", "shares"), ("cpu", "cpus")}
# A VM has no swap, so any limit of it is kept; a reservation is a wish.
IMMATERIAL = {("memory", "swap"), ("memory", "reservation")}


def command_update(call):
    """Changes what Xen can change in a VM that runs; refuses all if anything else is to be different."""
    container = call.container()
    changes = read_update(call.options)
    with container:
        if container.status() in ("creating", "stopped"):
            raise NotRunning()
        update(container, changes)


def read_update(options):
    """The linux.resources that --resources and the other options ask for."""
    source, changes = options.get("resources"), {}
    if source:
        try:
            changes = read_document(0 if source == "-" else source)
        except (OSError, ValueError) as error:
            raise Error(f"cannot read the resources from {source}: {error}") from None
        if not isinstance(changes, dict):
            raise Error(f"the resources in {source} must be a JSON object")
    for name, (section, key) in UPDATE_OPTIONS.items():
        if name in options:
            values = field(changes, section, dict, {}, "resources")
            changes[section] = {**values, key: parse_quantity(name, options[name])}
    return changes


def parse_quantity(name, text):
    """An integer, with k, m or g behind a number of bytes; what is no number for runc either is text."""
    if name in ("cpuset-cpus", "cpuset-mems", "l3-cache-schema", "mem-bw-schema"):
        return text
    digits, scale = text.lower().removesuffix("b"), 1
    if "memory" in name and digits and digits[-1] in "kmg":
        digits, scale = digits[:-1], 1 << {"k": 10, "m": 20, "g": 30}[digits[-1]]
    try:
        return int(digits) * scale
    except ValueError:
        raise Error(f"option --{name} of update needs a number, not {text!r}") from None


def update(container, changes):
    state = container.state
    new = {key: dict(value) if isinstance(value, dict) else value for key, value in state["resources"].items()}
    refused = []
    for section, values in changes.items():
        old = state["resources"].get(section)
        if not isinstance(values, dict) or not isinstance(old or {}, dict):
            if values and values != old:
                refused.append(section)
            continue
        for key, value in values.items():
            if (section, key) in UPDATABLE | IMMATERIAL and value:
                new.setdefault(section, {})[key] = value
            elif value and value != (old or {}).get(key):
                refused.append(f"{section}.{key}")
    if refused:
        raise Error(f"cannot update container {container.id}: {', '.join(refused)} cannot change while its VM exists")
    base = {"most_vcpus": VCPUS_MAX, **state["base"]}  # an older runX has not written it
    resources, old = (parse_resources(spec, "resources", base) for spec in (new, state["resources"]))
    memory, vcpus = resources.mebibytes(state["maxmem"]), resources.vcpus(state["maxvcpus"])
    for wanted, most, what in ((memory, state["maxmem"], "MiB of memory"), (vcpus, state["maxvcpus"], "vcpus")):
        if wanted > most:
            raise Error(
                f"cannot update container {container.id} to {wanted} {what}: its VM was made for {most} at most, "
                f"see the annotations org.runx.maxmem and org.runx.maxvcpus"
            )
    known = None if state.get("updating") else old  # an `update` that was killed has left nobody knows what
    container.save(updating=True)
    try:
        apply_resources(container, resources, known)
    except Error:
        apply_resources(container, old, resources)  # all or nothing; what was not reached it leaves as it is
        container.save(updating=False)
        raise
    container.save(resources=new, updating=False)
    for root, path in state["cgroups"]:
        try:
            limit_cgroup(root + path, resources)
        except OSError:
            pass  # of version 1, it has more than that; the VM's own memory is not there


def apply_resources(container, new, old):
    """Has Xen change what is new in the Resources, or all of them where the old ones are None."""
    domid, maxmem, maxvcpus = container.domid(), container.state["maxmem"], container.state["maxvcpus"]
    if not old or new.mebibytes(maxmem) != old.mebibytes(maxmem):
        change_domain("mem-set", domid, f"{new.mebibytes(maxmem)}m")
    if not old or new.vcpus(maxvcpus) != old.vcpus(maxvcpus):
        change_domain("vcpu-set", domid, new.vcpus(maxvcpus))
        # the kernel finds one more; that it is used is userspace's to say
        if not old or new.vcpus(maxvcpus) > old.vcpus(maxvcpus):
            send_request(Xenstore(), domid, container.state["uuid"], "cpus", "cpus")
    if not old or (new.shares, new.cap()) != (old.shares, old.cap()):
        scheduler = "sched-credit" if xl_info("xen_scheduler") == "credit" else "sched-credit2"
        change_domain(scheduler, "-d", domid, "-w", new.weight() if new.shares else 256, "-c", new.cap())
    if not old or new.cpus != old.cpus:
        change_domain("vcpu-pin", domid, "all", new.cpus or "all")


def command_list(call):
    """As `runc list`: a table, --format json, or --quiet for ids alone."""
    states, made = [], os.path.isdir(call.root)
    if not made and call.root != DEFAULT_ROOT:
        raise Error(f"there is no root {printable(call.root)}")
    for name in sorted(os.listdir(call.root)) if made else ():
        try:
            states.append(Container(call.root, name).load().public_state())
        except NoContainer:
            pass  # deleted meanwhile, or no folder
        except Error as error:
            call.log.write("warning", str(error))
    if "quiet" in call.options:
        print("".join(f"{state['id']}\n" for state in states), end="")
    elif output_format(call) == "json":
        print_json(states or None)  # null for none, as runc's
    else:
        print_table(states)


def print_table(states):
    heads = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
    rows = [heads, *([str(state[head.lower()]) for head in heads] for state in states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def command_features(call):
    """runtime-spec features.md: what is in it is there, what is not is not."""
    print_json({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": list(HOOK_KINDS),
        "mountOptions": sorted({*MOUNT_OPTIONS, *filter(None, PROPAGATIONS), "tmpcopyup", "notmpcopyup"}),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": [f"CAP_{name}" for name in CAPABILITIES],
            "cgroup": {"v1": False, "v2": True, "systemd": False, "systemdUser": False, "rdma": False},
            "seccomp": {
                "enabled": os.uname().machine in SECCOMP_ARCHITECTURES,
                "actions": list(SECCOMP_ACTIONS),
                "operators": [f"SCMP_CMP_{name}" for name in SECCOMP_OPERATORS],
                "archs": [name for pairs in SECCOMP_ARCHITECTURES.values() for name, _ in pairs],
                "knownFlags": list(SECCOMP_FLAGS),
                "supportedFlags": [name for name, value in SECCOMP_FLAGS.items() if value],
            },
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
        "annotations": {"org.runx.version": VERSION},
        "potentiallyUnsafeConfigAnnotations": ["org.runx."],
    })  # fmt: skip


def command_pack_initrd(call):
    if len(call.arguments) != 2:
        raise Error("usage: runX pack-initrd FOLDER FILE")
    pack_initrd(*call.arguments)


# ==== command line =======================================================================================
# Hand-made, because argparse costs more than most commands, and because engines write options in Go's
# manner: --x v, --x=v, -x v.  Every failure ends in main().

CREATE_FLAGS = {"no-pivot", "no-new-keyring", "detach", "no-subreaper", "keep"}
CREATE_VALUES = {"bundle", "pid-file", "console-socket", "pidfd-socket", "preserve-fds"}
SHORT = {
    "b": "bundle", "d": "detach", "f": "force", "a": "all", "q": "quiet", "r": "resources", "h": "help", "v": "version",
}  # fmt: skip

# command: (function, flags, options with a value)
COMMANDS = {
    "create": (command_create, CREATE_FLAGS, CREATE_VALUES),
    "start": (command_start, set(), set()),
    "run": (command_run, CREATE_FLAGS, CREATE_VALUES),
    "state": (command_state, set(), set()),
    "kill": (command_kill, {"all"}, {"signal"}),
    "delete": (command_delete, {"force"}, set()),
    "pause": (command_pause, set(), set()),
    "resume": (command_resume, set(), set()),
    "ps": (command_ps, set(), {"format"}),
    "events": (command_events, {"stats"}, {"interval"}),
    "update": (command_update, set(), {"resources", *UPDATE_OPTIONS}),
    "list": (command_list, {"quiet"}, {"format"}),
    "features": (command_features, set(), set()),
    "pack-initrd": (command_pack_initrd, set(), set()),
}
ARGUMENTS_MAX = {"list": 0, "features": 0, "kill": 2, "pack-initrd": 2, "ps": 1000}  # 1 for the others
# what other runtimes have, so that the refusal can say that it is known
UNSUPPORTED = {"checkpoint", "exec", "restore"}
GLOBAL_FLAGS = {"debug", "systemd-cgroup", "help", "version"}
GLOBAL_VALUES = {"root", "log", "log-format", "rootless", "criu", "cgroup-manager"}

USAGE = f"""usage: runX [--root DIR] [--log FILE] [--log-format text|json] [--debug] COMMAND [OPTIONS] [ID]

commands:
  create [--bundle DIR] [--pid-file FILE] ID       make the container's VM, paused
  start ID                                         let it run
  run [--bundle DIR] [--detach] [--keep] ID        create, start, wait for its end
  state ID                                         print its state as JSON
  kill [--all] ID [SIGNAL]                         send a signal to its process
  delete [--force] ID                              remove what is left of it
  pause ID, resume ID                              stop and continue its VM
  ps [--format table|json] ID [PS OPTIONS]         its process on this host
  events [--stats] [--interval 5s] ID              what Xen counts for it, as JSON
  update [--resources FILE|-] [--memory N] ID      change memory, processors and their share: see docs/lifecycle.md
  list [--format table|json] [--quiet]             all containers below the root
  features                                         what this runtime can do, as JSON
  pack-initrd FOLDER FILE                          make a ramdisk

The root is {DEFAULT_ROOT} by default."""


def split_option(word):
    """("bundle", None) of --bundle, -bundle or -b; ("bundle", "x") of --bundle=x."""
    name, equals, value = word.lstrip("-").partition("=")
    return SHORT.get(name, name), value if equals else None


def is_set(name, value):
    """Whether a flag, such as --debug or --debug=true, is: Go's strconv.ParseBool.  Raises Error."""
    if value is None or value in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if value in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise Error(f"option --{name} is true or false, not {value!r}")


def parse_globals(words, options):
    """Takes the options before the command off words, into options; one that runX does not know is passed over."""
    while words and words[0].startswith("-"):
        name, value = split_option(words.pop(0))
        if value is None and name in GLOBAL_VALUES and name != "rootless":
            if not words:
                raise Error(f"option --{name} needs a value")
            value = words.pop(0)
        elif value is None and name not in GLOBAL_FLAGS and len(words) > 1 and words[0] not in COMMANDS:
            if not words[0].startswith("-") and words[0] not in UNSUPPORTED:
                value = words.pop(0)
        if name not in GLOBAL_FLAGS or is_set(name, value):
            options[name] = True if value is None else value


def parse_options(command, words):
    """Options and arguments of a command, in any order; what follows -- are arguments."""
    _, flags, values = COMMANDS[command]
    options, arguments = {}, []
    while words:
        word = words.pop(0)
        if word == "--":
            arguments += words
            break
        if len(word) < 2 or not word.startswith("-"):
            arguments.append(word)
            if command == "ps":
                return options, arguments + words  # the options of ps(1)
            continue
        name, value = split_option(word)
        if command in ("list", "ps") and name == "force":
            name = "format"
        if name in flags or name == "help":
            if is_set(name, value):
                options[name] = True
        elif name in values:
            if value is None and not words:
                raise Error(f"option --{name} of {command} needs a value")
            options[name] = words.pop(0) if value is None else value
        else:
            raise Error(f"{command} has no option {word}: see runX --help")
    return options, arguments


def run_command(words, options, log):
    if "version" in options:
        print(f"runX version {VERSION}\nspec: 1.3.0")
        return 0
    if options.get("log-format", "text") not in ("text", "json"):
        raise Error(f"invalid log-format: {options['log-format']}")
    refused_help = words and words[0] in UNSUPPORTED and words[1:] in (["-h"], ["--help"])
    if "help" in options or not words or words[0] in ("help", "h") or refused_help:
        print(USAGE)
        return 0
    command = words.pop(0)
    if command in UNSUPPORTED:
        raise Error(f"runX does not support {command}")
    if command not in COMMANDS:
        raise Error(f"unknown command {command!r}: see runX --help")
    command_options, arguments = parse_options(command, words)
    if "help" in command_options:
        print(USAGE)
        return 0
    most = ARGUMENTS_MAX.get(command, 1)
    if len(arguments) > most:
        raise Error(f"{command} takes no more than {most} arguments, and {printable(arguments[most])} is one more")
    root = os.path.abspath(options.get("root", DEFAULT_ROOT))
    systemd = "systemd-cgroup" in options
    call = Invocation(root=root, log=log, systemd=systemd, options=command_options, arguments=arguments)
    return COMMANDS[command][0](call) or 0


def main(words):
    """Runs one command line; returns the exit status.  The only place where an Error ends."""
    log, options = Log(), {}
    try:
        try:
            parse_globals(words, options)
        finally:
            log = Log(options.get("log"), options.get("log-format") == "json", "debug" in options)
        return run_command(words, options, log)
    except Error as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted"
    except OSError as error:
        message = f"cannot run {' '.join(words[:1]) or 'runX'}: {error}"
    except Exception as error:
        import traceback

        message = f"internal error of runX: {error!r}"
        log.debug(traceback.format_exc())
    message = printable(message[:2000])
    if log.path:
        log.write("error", message)
    print(f"runX: {message}", file=sys.stderr)
    return 1


def run():
    """main() as a whole process, which ends without Python's tidying up: that is a tenth of what `state` takes."""
    status = main(sys.argv[1:])
    try:
        if sys.stdout:  # None if the caller has closed it
            sys.stdout.flush()
    except OSError as error:
        print(f"runX: cannot write to standard output: {error.strerror}", file=sys.stderr)
        status = 1
    os._exit(status)


if __name__ == "__main__":
    run()
