# SPDX-License-Identifier: Apache-2.0
"""What xl does and says: xl(1) and libxl's writing into xenstore, as far as runX comes to see it."""

import os
import shutil
import subprocess
import sys

# The program hands its words to the server, and says what that answers: status, output and errors, with NULs between.
# Where there is a C compiler it is one of C, which starts in a tenth of the time.
SCRIPT = """#!{python} -IS
import os, sys
from _socket import AF_UNIX, SOCK_SEQPACKET, socket
server = socket(AF_UNIX, SOCK_SEQPACKET)
server.connect("/run/fake/xl")
server.send("\\0".join([str(os.getppid()), *sys.argv[1:]]).encode("utf-8", "surrogateescape"))
status, output, errors = (server.recv(1 << 20) or b"1\\0\\0libxl: error: gone").split(b"\\0")
os.write(1, output)
os.write(2, errors)
os._exit(int(status))
"""
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
static char request[1 << 16], answer[1 << 16];
int main(int argc, char **argv)
{
    struct sockaddr_un address = { AF_UNIX, "/run/fake/xl" };
    int server = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    size_t used = snprintf(request, sizeof request, "%d", getppid());
    for (int i = 1; i < argc && used + strlen(argv[i]) + 2 < sizeof request; i++)
        used += 1 + strlen(strcpy(request + used + 1, argv[i]));
    if (server < 0 || connect(server, (struct sockaddr *)&address, sizeof address))
        return 1;
    if (send(server, request, used, 0) < 0)
        return 1;
    ssize_t length = recv(server, answer, sizeof answer - 1, 0);
    if (length <= 0)
        return 1;
    char *output = answer + strlen(answer) + 1, *errors = output + strlen(output) + 1;
    if (write(1, output, strlen(output)) < 0 || write(2, errors, answer + length - errors) < 0)
        return 1;
    return atoi(answer);
}
"""


def install(path):
    """Makes the program."""
    compiler = shutil.which("cc")
    if compiler:
        subprocess.run([compiler, "-O1", "-x", "c", "-", "-o", path], input=PROGRAM.encode(), check=True)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(SCRIPT.format(python=os.path.realpath(sys.executable)))
        os.chmod(path, 0o755)


NO_DOMAIN = "libxl: error: libxl_domain.c:1111:fake: Domain {}:Non-existant domain\n"


class Failure(Exception):
    """What xl writes to standard error before it exits with 1."""


def parse_settings(text):
    """{key: string, number or list} of an xl.cfg.  ValueError where libxlu would not take it."""
    settings = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise ValueError(line)
        settings[key.strip()] = parse_value(value.strip())
    return settings


def parse_value(text):
    if text.startswith("["):
        rest, values = text[1:].strip(), []
        while not rest.startswith("]"):
            value, rest = parse_string(rest)
            values.append(value)
            rest = rest.lstrip(", ")
        return values
    return parse_string(text)[0] if text[0] in "\"'" else int(text, 0)


def parse_string(text):
    """(string, what follows it), with the escapes of libxlu_cfg_l.l."""
    quote, found, position = text[0], "", 1
    while text[position] != quote:
        if text[position] == "\\":
            position += 1
            found += {"n": "\n", "r": "\r", "t": "\t"}.get(text[position], text[position])
        else:
            found += text[position]
        position += 1
    return found, text[position + 1 :].strip()


class Xl:
    def __init__(self, xen):
        self.xen, self.store = xen, xen.store

    def run(self, words):
        """(exit status, standard output, standard error)."""
        verb, *args = words
        try:
            return 0, getattr(self, "do_" + verb.replace("-", "_"))(*args) or "", ""
        except Failure as failure:
            return 1, "", str(failure)

    def machine(self, domid):
        machine = self.xen.domains.get(int(domid))
        if machine is None:
            raise Failure(NO_DOMAIN.format(domid))
        return machine

    # ---- looking

    def do_info(self):
        told = {"nr_cpus": 4, "free_memory": self.xen.free_memory, "xen_scheduler": self.xen.scheduler}
        return "".join(f"{key:23}: {value}\n" for key, value in told.items())

    def do_list(self, domid=None):
        if domid is not None and int(domid) not in self.xen.domains:
            raise Failure(f"Error: Domain '{domid}' does not exist.\n")
        lines = ["Name                                        ID   Mem VCPUs\tState\tTime(s)"]
        if domid is None:
            lines.append("Domain-0                                     0  1024     2     r-----     100.0")
        for machine in self.xen.domains.values():
            if domid in (None, str(machine.domid)):
                paused, end = "p" if machine.pauses else "-", machine.end
                blocked = "-" if paused == "p" or end else "b"
                state = f"-{blocked}{paused}{'s' if end else '-'}{end or '-'}{'d' if machine.dying else '-'}"
                lines.append(
                    f"{machine.name:40} {machine.domid:5} {machine.memory:5} {machine.vcpus:5}     {state}     "
                    f"{machine.time:5.1f}"
                )
        return "\n".join(lines) + "\n"

    def do_vm_list(self):
        lines = ["UUID                                  ID    name"]
        lines += [f"{machine.uuid}  {machine.domid}    {machine.name}" for machine in self.xen.domains.values()]
        return "\n".join(lines) + "\n"

    # ---- changing

    def do_unpause(self, domid):
        machine = self.machine(domid)
        if not machine.pauses:
            raise Failure(f"libxl: error: libxl_domain.c:553:fake: Domain {domid}:Failed to unpause domain\n")
        machine.pauses -= 1

    def do_pause(self, domid):
        self.machine(domid).pauses += 1

    def do_mem_set(self, domid, size):
        self.machine(domid).memory = int(size.removesuffix("m"))

    def do_vcpu_set(self, domid, count):
        machine = self.machine(domid)
        if int(count) > machine.settings.get("maxvcpus", machine.vcpus):
            raise Failure(f"xl: error: cannot set {count} vcpus\n")
        machine.vcpus = int(count)

    def do_sched_credit(self, *words):
        self.set_share("credit", words)

    def do_sched_credit2(self, *words):
        self.set_share("credit2", words)

    def set_share(self, scheduler, words):
        if self.xen.scheduler != scheduler:
            raise Failure("libxl: error: Invalid argument\n")
        options = dict(zip(words[::2], words[1::2]))
        self.machine(options["-d"]).told["scheduler"] = [int(options["-w"]), int(options["-c"])]

    def do_vcpu_pin(self, domid, which, processors):
        self.machine(domid).told["pinned"] = [which, processors]

    def do_create(self, *words):
        *options, path = words
        if options not in (["-e", "-p", "-q"], ["-e", "-q"]):
            raise Failure(f"a create that would stay: {words}\n")
        try:
            with open(path, encoding="utf-8") as file:
                settings = parse_settings(file.read())
        except (OSError, ValueError) as error:
            raise Failure(f"Failed to read config file: {path}: {error}\n") from None
        files = {}
        for key in ("kernel", "ramdisk"):
            if key in settings:
                try:
                    with open(settings[key], "rb") as file:
                        files[key] = file.read()
                except OSError as error:
                    raise Failure(f"xc: error: panic: xg_dom_core.c:270: failed to open {key}: {error}\n") from None
        if settings["memory"] > self.xen.free_memory:
            raise Failure("libxl: error: libxl_create.c:709:fake: domain creation fail: Cannot allocate memory\n")
        if any(machine.name == settings["name"] for machine in self.xen.domains.values()):
            raise Failure(f'libxl: error: libxl_create.c:1: Domain with name "{settings["name"]}" already exists\n')
        machine = self.xen.make_domain(settings, files.get("ramdisk") if not own_init(settings) else None)
        self.write_domain(machine)
        machine.pauses = int("-p" in options)
        self.store.fire("@introduceDomain")

    def do_destroy(self, domid):
        machine = self.machine(domid)
        del self.xen.domains[machine.domid]
        for fd in machine.pty:
            os.close(fd)
        self.store.release(machine.domid)
        listed = f"/libxl/{domid}/device"
        for kind in self.names(listed):
            for number in self.names(f"{listed}/{kind}"):
                self.remove_backend(kind, domid, number)
        self.remove_backend("console", domid, "0")
        for path in (f"/local/domain/{domid}", f"/libxl/{domid}", f"/vm/{machine.uuid}"):
            self.remove(path)

    def remove_backend(self, kind, domid, number):
        """libxl takes away what then is empty, too."""
        self.remove(f"/local/domain/0/backend/{kind}/{domid}/{number}")
        for empty in (f"/local/domain/0/backend/{kind}/{domid}", f"/local/domain/0/backend/{kind}"):
            if empty in self.store.nodes and not self.store.list(empty):
                self.remove(empty)

    def names(self, path):
        return self.store.list(path) if path in self.store.nodes else []

    def remove(self, path):
        if path in self.store.nodes:
            self.store.remove(path)

    # ---- what libxl writes for a new domain

    def write_domain(self, machine):
        domid, store, settings = machine.domid, self.store, machine.settings
        home, ours, theirs = machine.home, ["n0", f"r{domid}"], [f"n{domid}"]
        nodes = [
            (home, "", ours), ("vm", f"/vm/{machine.uuid}", ours), ("name", machine.name, ours),
            ("domid", str(domid), ours), ("cpu", "", ours), ("cpu/0/availability", "online", ours),
            ("memory", "", ours), ("memory/static-max", str(settings.get("maxmem", machine.memory) << 10), ours),
            ("memory/target", str(machine.memory << 10), ours), ("device", "", ours), ("control", "", ours),
            ("control/shutdown", "", theirs), ("control/platform-feature-xs_reset_watches", "1", ours),
            ("hvmloader", "", ours), ("data", "", theirs), ("drivers", "", theirs), ("attr", "", theirs),
            ("error", "", theirs), ("console", "", ours), ("console/type", "xenconsoled", ours),
            ("console/output", "pty", ours), ("console/tty", os.ttyname(machine.pty[1]), ours),
            ("console/limit", "1048576", ours), ("console/ring-ref", "1", ours), ("console/port", "2", ours),
        ]  # fmt: skip
        for node, value, perms in nodes:
            path = node if node.startswith("/") else f"{home}/{node}"
            store.write(path, value.encode())
            store.set_perms(path, perms)
        self.write_all(f"/vm/{machine.uuid}", {"name": machine.name, "uuid": machine.uuid})
        self.write_all(f"/libxl/{domid}", {"type": settings["type"], "dm-version": "qemu_xen"})
        first = {"frontend": f"{home}/console", "frontend-id": str(domid), "online": "1", "state": "1"}
        self.write_all(f"/local/domain/0/backend/console/{domid}/0", first)
        for number, share in enumerate(settings.get("p9", ())):
            options = dict(item.split("=", 1) for item in share.split(","))
            if not os.path.isdir(options["path"]):
                self.do_destroy(domid)
                raise Failure(f"libxl: error: libxl_dm.c:1: Domain {domid}:device model: no folder {options['path']}\n")
            self.write_device("9pfs", domid, number, options)

    def write_device(self, kind, domid, number, options):
        front = f"/local/domain/{domid}/device/{kind}/{number}"
        back = f"/local/domain/0/backend/{kind}/{domid}/{number}"
        backend = {"frontend": front, "frontend-id": str(domid), "online": "1", "state": "1", **options}
        self.write_all(back, backend)
        self.store.set_perms(back, ["n0", f"r{domid}"])
        self.write_all(front, {"backend": back, "backend-id": "0", "state": "1", "tag": options.get("tag", "")})
        self.store.set_perms(front, [f"n{domid}", "r0"])
        self.write_all(f"/libxl/{domid}/device/{kind}/{number}", {**backend, "backend": back})

    def write_all(self, folder, values):
        for key, value in values.items():
            self.store.write(f"{folder}/{key}", value.encode())


def own_init(settings):
    """Whether the VM boots a system of its own: then there is nothing of ours that could be scripted."""
    return "quiet" not in settings.get("cmdline", "")
