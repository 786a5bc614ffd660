# SPDX-License-Identifier: Apache-2.0
"""Uses what the guest's kernel has for gateways and cars, and prints what of it has not worked, as JSON: {name: error}.

A container of tests/test_xen_machine.py runs it, with dom0's Python and iproute2.
"""

import ctypes
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import traceback

CHECKS = []
TEXT = b"what goes through it" * 50


def check(function):
    CHECKS.append(function)
    return function


def ip(*commands, tool="ip"):
    """All in one process: the start of one, from files over 9p, is what takes time."""
    subprocess.run([tool, "-batch", "-"], input="\n".join(commands), check=True, capture_output=True, text=True)


def connected(protocol=0, before=None):
    """Two ends of a connection over the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        if before:
            before(client)
        client.connect(listener.getsockname())
        return client, listener.accept()[0]


def carries(client, server):
    client.sendall(TEXT)
    received = b""
    while len(received) < len(TEXT):
        data = server.recv(4096)
        assert data, "the connection has ended"
        received += data
    assert received == TEXT
    client.close()
    server.close()


@check
def can_raw():
    ip("link add vcan0 type vcan", "link set vcan0 up")
    ends = [socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) for _ in range(2)]
    for end in ends:
        end.bind(("vcan0",))
        end.settimeout(5)
    frame = struct.pack("=IB3x8s", 0x123, 8, b"eight...")
    ends[0].send(frame)
    assert ends[1].recv(16) == frame


@check
def can_bcm():
    sender = socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_BCM)
    sender.connect(("vcan0",))
    receiver = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
    receiver.bind(("vcan0",))
    receiver.settimeout(5)
    frame = struct.pack("=IB3x8s", 0x42, 8, b"cyclical")
    head = struct.pack("@IIIllllII0q", socket.CAN_BCM_TX_SETUP, 3, 0, 0, 0, 0, 10000, 0x42, 1)  # SETTIMER | STARTTIMER
    sender.send(head + frame)
    assert [receiver.recv(16) for _ in range(3)] == [frame] * 3


@check
def can_isotp():
    ends = [socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_ISOTP) for _ in range(2)]
    for end, ids in zip(ends, ((0x701, 0x702), (0x702, 0x701))):
        end.bind(("vcan0", *ids))
        end.settimeout(5)
    ends[0].send(TEXT)
    assert ends[1].recv(4096) == TEXT


@check
def can_j1939():
    ends = [socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_J1939) for _ in range(2)]
    for end, address in zip(ends, (0x20, 0x21)):
        end.bind(("vcan0", socket.J1939_NO_NAME, socket.J1939_NO_PGN, address))
        end.settimeout(5)
    ends[0].sendto(TEXT, ("vcan0", socket.J1939_NO_NAME, 0x12300, 0x21))
    assert ends[1].recv(4096) == TEXT


@check
def can_gateway():
    """A rule of AF_CAN's own, by rtnetlink, from one end of a vxcan to another interface."""
    ip("link add vxcan0 type vxcan peer name vxcan1", "link set vxcan0 up", "link set vxcan1 up")
    index = {name: socket.if_nametoindex(name) for name in ("vxcan1", "vcan0")}
    attributes = struct.pack("=HHI", 8, 9, index["vxcan1"]) + struct.pack("=HHI", 8, 10, index["vcan0"])
    body = struct.pack("=BBH", socket.AF_CAN, 1, 1) + attributes  # rtcanmsg: CGW_TYPE_CAN_CAN, CGW_FLAGS_CAN_ECHO
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    netlink.send(struct.pack("=IHHII", 16 + len(body), 24, 0x605, 1, 0) + body)  # RTM_NEWROUTE
    error = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    assert error == 0, os.strerror(-error)
    sender, receiver = (socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) for _ in range(2))
    receiver.bind(("vcan0",))
    receiver.settimeout(5)
    sender.bind(("vxcan0",))
    frame = struct.pack("=IB3x8s", 0x77, 8, b"routed..")
    sender.send(frame)
    assert receiver.recv(16) == frame


@check
def sctp():
    carries(*connected(socket.IPPROTO_SCTP))


@check
def mptcp():
    client, server = connected(262)
    fields = server.getsockopt(284, 1, 64)  # SOL_MPTCP, MPTCP_INFO: a connection that fell back to TCP has none
    assert len(fields) >= 8
    carries(client, server)


@check
def bbr():
    ip("qdisc add dev lo root fq", tool="tc")
    client, server = connected(before=lambda it: it.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr"))
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr")
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"cubic")
    carries(client, server)


@check
def tls():
    client, server = connected()
    for end, direction in ((client, 1), (server, 2)):  # TLS_TX, TLS_RX
        end.setsockopt(socket.IPPROTO_TCP, 31, b"tls")  # TCP_ULP
        info = struct.pack("=HH8s16s4s8s", 0x0303, 51, b"iv......", b"key of sixteen..", b"salt", bytes(8))
        end.setsockopt(282, direction, info)  # SOL_TLS; AES-128-GCM of TLS 1.2
    carries(client, server)


@check
def ciphers():
    operation, kind, name = socket.ALG_OP_ENCRYPT, "skcipher", "cbc(aes)"
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind(("hash", "sha256"))
        with algorithm.accept()[0] as call:
            call.sendall(TEXT)
            assert call.recv(64) == hashlib.sha256(TEXT).digest()
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind((kind, name))
        algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, bytes.fromhex("06a9214036b8a15b512e03d534120006"))
        with algorithm.accept()[0] as call:  # RFC 3602, case 1
            iv = bytes.fromhex("3dafba429d9eb430b422da802c9fac41")
            call.sendmsg_afalg([b"Single block msg"], op=operation, iv=iv)
            assert call.recv(16).hex() == "e353779c1079aeb82708942dbe77181a"
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind(("aead", "gcm(aes)"))
        algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, bytes(16))
        algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_AEAD_AUTHSIZE, None, 16)
        with algorithm.accept()[0] as call:  # the GCM specification's test case 2
            call.sendmsg_afalg([bytes(16)], op=operation, iv=bytes(12), assoclen=0)
            assert call.recv(32).hex() == "0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf"
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind(("rng", "stdrng"))
        algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, bytes(32))
        with algorithm.accept()[0] as call:
            assert len({call.recv(16) for _ in range(4)}) == 4


def neighbour(work):
    """The pid of a child that works in a network namespace of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


@check
def ipsec():
    """A packet between two network namespaces, by ESP: in the clear it would be dropped."""
    ends = [("192.0.2.1", "192.0.2.2"), ("192.0.2.2", "192.0.2.1")]
    algorithms = (
        f"aead rfc4106(gcm(aes)) 0x{'01' * 20} 128",
        f"enc cbc(aes) 0x{'02' * 16} auth-trunc hmac(sha256) 0x{'03' * 32} 128",
    )
    ready, go = os.pipe(), os.pipe()

    def configure(link, own, other, *before):
        commands = [*before, f"addr add {own}/24 dev {link}", f"link set {link} up"]
        for number, algorithm in enumerate(algorithms):
            way = "src {} dst {}".format(*ends[number])
            commands.append(f"xfrm state add {way} proto esp spi {number + 1} reqid 1 mode tunnel {algorithm}")
        for source, target, way in ((own, other, "out"), (other, own, "in")):
            path = f"src {source} dst {target}"
            commands.append(f"xfrm policy add {path} dir {way} tmpl {path} proto esp reqid 1 mode tunnel")
        ip(*commands)

    def answer():
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        configure("there", *ends[1])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.bind((ends[1][0], 7))
            os.write(ready[1], b"x")
            data, sender = end.recvfrom(4096)
            end.sendto(data, sender)

    pid = neighbour(answer)
    os.read(ready[0], 1)
    make = f"link add here type veth peer name there netns {pid}"
    configure("here", *ends[0], make, "link add ipsec0 type xfrm dev here if_id 1")
    os.write(go[1], b"x")
    os.read(ready[0], 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.sendto(TEXT, (ends[1][0], 7))
        assert end.recv(4096) == TEXT
    socket.socket(15, socket.SOCK_RAW, 2).close()  # PF_KEY, PF_KEY_V2
    os.waitpid(pid, 0)


@check
def wireguard():
    ip("link add wg0 type wireguard", "addr add 198.51.100.1/24 dev wg0", "link set wg0 up")


@check
def landlock():
    call = ctypes.CDLL(None, use_errno=True).syscall
    assert call(444, None, 0, 1) >= 1, "no landlock"  # landlock_create_ruleset: its version
    rules = struct.pack("=Q", 1 << 2)  # LANDLOCK_ACCESS_FS_READ_FILE
    ruleset = call(444, rules, len(rules), 0)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert call(446, ruleset, 0) == 0, os.strerror(ctypes.get_errno())
    try:
        open("/bin/busybox", "rb").close()
    except PermissionError:
        return
    raise AssertionError("a file could be read")


def give_up(*_):
    raise TimeoutError("it does not come")


def main():
    failed = {}
    signal.signal(signal.SIGALRM, give_up)
    for function in CHECKS:
        signal.alarm(60)
        try:
            function()
        except subprocess.CalledProcessError as error:
            failed[function.__name__] = f"{error.cmd}: {error.stderr}"
        except Exception:
            failed[function.__name__] = traceback.format_exc(limit=-2)
        signal.alarm(0)
    print(json.dumps(failed))


main()
