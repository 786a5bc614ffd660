# SPDX-License-Identifier: Apache-2.0
"""Consoles that come and go while a VM runs, as those of `runX exec` do."""

import os
import select
import subprocess

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
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, output
            output += chunk
        return output[:-3].decode()

    def announce(self, *numbers):
        """New consoles, connected."""
        channels = runx.EventChannels()
        consoles = [runx.Console(self.domain, number, channels) for number in numbers]
        for console in consoles:
            self.xenstore.transaction(console.introduce)
        while unconnected := [console for console in consoles if not console.page]:
            self.xenstore.take_events()
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
                self.xenstore.take_events()
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
    for count in range(8):
        consoles = guest.announce(*range(3, 19))
        if count % 4 == 1:  # somebody has held this open since it was another
            assert guest.run("echo lost >&7 || echo refused").split() == ["refused"]
        guest.run("exec 7<>/dev/hvc3; echo seven >&7; cat </dev/hvc18 >/dev/null & echo eight >/dev/hvc18")
        assert take(consoles[0], 7) == b"seven\r\n" and take(consoles[-1], 7) == b"eight\r\n"
        if count % 2:
            guest.run("exec 7>&-")
        guest.withdraw(consoles, told=count % 3 > 0)
        if count in (1, 7):
            wait_until(lambda: guest.run("echo /dev/hvc??").strip() == "/dev/hvc??", "the last console to go")
            looks.append(look())
    (*before, memory), (*after, memory_after) = looks
    assert before == after
    assert memory_after > memory - 192, "KiB; half of a page of each"
