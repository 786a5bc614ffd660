# SPDX-License-Identifier: Apache-2.0
"""Consoles that come and go while a VM runs, as those of `runX exec` do, and a share whose server goes."""

import contextlib
import os
import select
import struct
import subprocess
import types

import pytest
from conftest import config, in_memory, wait_until

import runx

pytestmark = pytest.mark.usefixtures("clean_dom0")


class Guest:
    """A VM whose container is a shell that sees its kernel's own /dev; and consoles of ours, beside its own two."""

    def __init__(self, bundle):
        bundle.add_applets("grep")
        bundle.write_config(in_memory(config("sh")))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(bundle.command("run"), bufsize=0, **pipes)
        self.run("trap '' HUP; mount -t devtmpfs dev /dev")  # what it opens becomes its controlling terminal
        self.xenstore = runx.Xenstore()
        self.domain = runx.Domain(self.xenstore, bundle.domain(), "")
        self.xenstore.watch((f"{self.domain.path}/device/console", "console"))

    def run(self, script):
        """What the script, one line, writes to standard output."""
        self.process.stdin.write(f"{script}\necho; echo =\n".encode())
        output = b""
        while not output.endswith(b"\n=\n"):
            assert select.select([self.process.stdout], [], [], 60)[0], f"still no end after 60 s: {script}"
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, output
            output += chunk
        return output[:-3].decode()

    def hear(self):
        """Wait for a change in xenstore; fail if there is none for 60 s."""
        assert self.xenstore.events or select.select([self.xenstore.fd], [], [], 60)[0], "no device changes any more"
        self.xenstore.take_events()

    def announce(self, *numbers):
        """New consoles, connected."""
        channels = runx.EventChannels()
        consoles = [runx.Console(self.domain, number, channels) for number in numbers]
        for console in consoles:
            self.xenstore.transaction(console.introduce)
        while unconnected := [console for console in consoles if not console.page]:
            self.hear()
            for console in unconnected:
                console.follow()
        for console in consoles:
            console.confirm()
        return consoles

    def withdraw(self, consoles, told=False):
        """told: the guest is told before that they close, and has closed them."""
        for console in consoles:
            if told:
                self.xenstore.write(f"{console.backend}/state", runx.XENBUS_CLOSING)
            while told and self.xenstore.read(f"{console.frontend}/state") != runx.XENBUS_CLOSED:
                self.hear()
            console.forget()
            console.page = console.indexes = None
        for fd in {console.channels.fd for console in consoles}:
            os.close(fd)


def take(console, size):
    """The next bytes that the guest has written, size of them."""
    data = b""
    while len(data) < size:
        chunk = console.take()
        if not chunk:
            assert select.select([console.channels.fd], [], [], 60)[0], data
            console.channels.acknowledge()
        data += chunk
    return data


@pytest.fixture
def guest(bundle):
    guest = Guest(bundle)
    yield guest
    guest.process.stdin.close()
    assert guest.process.wait(60) == 0
    guest.process.stdout.close()


def test_console_n_is_hvc_n_whatever_has_come_and_gone(guest):
    def check(consoles):
        """Each is /dev/hvc<its number>, and no other is there but the kernel's and the container's own."""
        guest.run("for file in /dev/hvc[!012] /dev/hvc??; do [ ! -e $file ] || echo $file >$file; done")
        for console in consoles:
            line = b"/dev/hvc%d\r\n" % console.number
            assert take(console, len(line)) == line
        numbers = [0, 1, 2, *(console.number for console in consoles)]
        assert set(guest.run("echo /dev/hvc*").split()) == {f"/dev/hvc{number}" for number in numbers}

    low, high = guest.announce(3, 9, 10), guest.announce(63, 62, 11)
    check(low + high)
    guest.withdraw(low, told=True)
    others = guest.announce(30, 10)
    check(high + others)
    guest.withdraw(high)
    again = guest.announce(9, 3, 63, 11, 62)  # the last one's end is seen before
    check(others + again)
    guest.withdraw(others + again)


def test_consoles_that_come_and_go_leave_nothing_in_the_guest(guest):
    def look():
        """(event channels, /dev, KiB of memory that are free)"""
        files = guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; echo /dev/*")
        return guest.run("grep -c . /proc/interrupts"), files, int(guest.run("grep MemFree: /proc/meminfo").split()[1])

    looks = []
    for count in range(6):
        consoles = guest.announce(*range(3, 19))
        if count % 4 == 1:  # somebody has held this open since it was another
            assert guest.run("echo lost >&7 || echo refused").split() == ["refused"]
        guest.run("exec 7<>/dev/hvc3; echo seven >&7; cat </dev/hvc18 >/dev/null & echo eight >/dev/hvc18")
        assert take(consoles[0], 7) == b"seven\r\n" and take(consoles[-1], 7) == b"eight\r\n"
        if count % 2:
            guest.run("exec 7>&-")
        guest.withdraw(consoles, told=count % 3 > 0)
        if count in (1, 5):
            wait_until(lambda: guest.run("echo /dev/hvc??").strip() == "/dev/hvc??", "the last console to go")
            looks.append(look())
    (*before, memory), (*after, memory_after) = looks
    assert before == after
    assert memory_after > memory - 128, "KiB; half of a page of each"


def test_a_console_goes_though_a_process_waits_there_until_all_is_sent(guest):
    """As readline does, which nobody reads any more.  The next console would not come, nor any other device."""
    (console,) = guest.announce(3)
    guest.run("exec 7<>/dev/hvc3; dd if=/dev/zero bs=2100 count=1 >&7 2>/dev/null")  # the ring has 2048
    # TCSETSW or TCSETSW2, and waiting
    guest.run("stty -echo <&7 & until grep -q -e 0x5403 -e 0x402c542c /proc/$!/syscall; do :; done")
    guest.withdraw([console])
    (other,) = guest.announce(4)
    guest.run("wait; exec 7>&-; echo four >/dev/hvc4")
    assert take(other, 6) == b"four\r\n"
    guest.withdraw([other])


@contextlib.contextmanager
def share_of(guest, folder):
    """A share, which the VM has not yet; yield its device, its ring, and what answers the guest's requests."""
    channels, grants, rings = runx.EventChannels(), runx.Grants(), []

    def connect(words):
        domid, *ends = struct.unpack(f"={len(words) // 4}I", words)
        rings.extend(runx.connect_rings(domid, [ends], channels, grants))

    server = types.SimpleNamespace(link=types.SimpleNamespace(send=connect))
    share = runx.ShareDevice(guest.domain, "fuse", server)
    guest.xenstore.watch((share.frontend, "share"))
    guest.xenstore.transaction(share.introduce)
    try:
        while not rings:
            guest.hear()
            share.follow()
        share.confirm()
        yield share, rings[0], runx.Fuse(os.open(folder, os.O_PATH), 0)
    finally:
        share.withdraw()
        for ring in rings:  # what is mapped of a VM keeps it from ending
            for view in (ring.indexes, ring.replies, ring.requests):
                view.release()
        os.close(channels.fd)
        grants.close()


def test_what_waits_for_room_in_the_ring_of_a_server_that_goes_fails_and_keeps_no_unmount(guest, tmp_path):
    with share_of(guest, tmp_path) as (share, ring, protocol):
        guest.run("mkdir /m; mount -t xenfuse share /m")
        wait_until(lambda: ring.serve(protocol), "the guest's first request")
        wait_until(lambda: ring.indexes[runx.IN_CONS] == ring.in_prod, "the guest to take the reply")
        ring.indexes[runx.OUT_CONS] = (ring.out_cons - ring.size) & 0xFFFFFFFF  # full
        guest.run("cat /m/file 2>/dev/null & until grep -q ' D ' /proc/$!/stat; do :; done")
        guest.xenstore.write(f"{share.backend}/state", runx.XENBUS_CLOSED)
        while guest.xenstore.read(f"{share.frontend}/state") != runx.XENBUS_CLOSED:
            guest.hear()
        assert guest.run("wait $! || echo failed; busybox umount /m && echo gone").split() == ["failed", "gone"]
        assert guest.run("mount -t xenfuse share /m 2>/dev/null || echo refused").split() == ["refused"]
