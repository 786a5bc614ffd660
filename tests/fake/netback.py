# SPDX-License-Identifier: Apache-2.0
"""dom0's kernel as backend: netback's network interfaces, for which one end of a veth stands, and blkback's files."""

import os
import shutil
import socket
import struct

RTM_NEWLINK, RTM_DELLINK, NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 16, 17, 1, 4, 0x200, 0x400
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 3, 18, 1, 2, 1
VIFS, VBDS, OPENED = "/local/domain/0/backend/vif", "/local/domain/0/backend/vbd", "/sys/bus/xen-backend/devices"


class Backends:
    """Makes what the backend nodes in xenstore ask for, and takes it away with them."""

    def __init__(self, xen):
        self.xen, self.made, self.changed, self.deaf = xen, set(), False, False

    def start(self):
        self.xen.store.watch("/local/domain/0/backend", 0, self.note)

    def note(self, _):
        self.changed = True

    def work(self):
        if not self.changed:
            return
        self.changed = False
        nodes = self.xen.store.nodes
        wanted = {
            (kind, *path.split("/")[-3:-1])
            for kind in (VIFS, VBDS) for path in nodes if path.startswith(kind + "/") and path.endswith("/state")
        }  # fmt: skip
        for kind, domid, number in self.made - wanted:
            (end_vif if kind == VIFS else close_vbd)(domid, number)
        for kind, domid, number in wanted - self.made if not self.deaf else ():
            (make_vif if kind == VIFS else open_vbd)(domid, number)
            self.xen.store.write(f"{kind}/{domid}/{number}/state", b"2")  # it waits for the frontend
        self.made = (self.made & wanted) if self.deaf else wanted


def open_vbd(domid, number):
    os.makedirs(f"{OPENED}/vbd-{domid}-{number}", exist_ok=True)
    with open(f"{OPENED}/vbd-{domid}-{number}/mode", "w", encoding="ascii") as file:
        file.write("w")


def close_vbd(domid, number):
    shutil.rmtree(f"{OPENED}/vbd-{domid}-{number}", ignore_errors=True)


def make_vif(domid, number):
    """vif<domid>.<number>, and the guest's end of it."""
    peer = attribute(VETH_INFO_PEER, bytes(16) + name(f"guest{domid}.{number}"))
    kind = attribute(IFLA_INFO_KIND, b"veth\0") + attribute(IFLA_INFO_DATA, peer)
    rtnetlink(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, name(f"vif{domid}.{number}") + attribute(IFLA_LINKINFO, kind))


def end_vif(domid, number):
    try:
        rtnetlink(RTM_DELLINK, 0, name(f"guest{domid}.{number}"))
    except OSError:
        pass  # the namespace of its other end has gone, and both with it


def name(text):
    return attribute(IFLA_IFNAME, text.encode() + b"\0")


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def rtnetlink(kind, flags, body):
    """One message about a link.  Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.bind((0, 0))
        body = bytes(16) + body
        kernel.send(struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, 0) + body)
        number = -struct.unpack_from("=i", kernel.recv(1 << 16), 16)[0]
        if number:
            raise OSError(number, os.strerror(number))
