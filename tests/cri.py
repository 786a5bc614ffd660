# SPDX-License-Identifier: Apache-2.0
"""A small client of the Container Runtime Interface: pods and their containers, as the kubelet asks for them.

It speaks gRPC, which is protobuf over HTTP/2 (RFC 9113, with the headers of RFC 7541), at containerd's socket, with a
connection for each call.  A message is {field number: value}, as api.proto of k8s.io/cri-api, runtime.v1, numbers them.
"""

import io
import json
import socket
import struct
import urllib.parse

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8  # frames
ACK, END_STREAM, END_HEADERS = 1, 1, 4  # their flags
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4  # settings
MOST = 1 << 30  # bytes of an answer

# The characters of headers' Huffman codes: the codes of one length, in bits, are consecutive numbers
CODES = {
    5: "012aceiost", 6: " %-./3456789=A_bdfghlmnpru", 7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz", 8: "&*,;XZ", 10: '!"()?',
    11: "'+|", 12: "#>", 13: "\0$@[]~", 14: "^}", 15: "<`{", 19: "\\",
}  # fmt: skip


class Refused(Exception):
    """A call that has failed; its text is the reason."""


# ---- protobuf


def varint(number):
    data = b""
    while number > 127:
        number, data = number >> 7, data + bytes([number & 127 | 128])
    return data + bytes([number])


def read_varint(file):
    value = shift = 0
    while True:
        byte = file.read(1)[0]
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value


def encode(message):
    """Values are numbers, texts, messages, and lists of those."""
    data = b""
    for field, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                data += varint(field << 3) + varint(each)
            else:
                each = encode(each) if isinstance(each, dict) else each.encode()
                data += varint(field << 3 | 2) + varint(len(each)) + each
    return data


def decode(data):
    """Return {field number: [value, …]}; a value is a number, or bytes, which may be a text or a message."""
    message, file = {}, io.BytesIO(data)
    while file.tell() < len(data):
        key, value = read_varint(file), read_varint(file)
        message.setdefault(key >> 3, []).append(file.read(value) if key & 7 == 2 else value)
    return message


# ---- HTTP/2


def frame(kind, flags, stream, data):
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def call_headers(path):
    """Those of a call: POST, http, and the names of the others but `te` are numbers in HPACK's static table."""
    pairs = ((b"\4", path), (b"\1", "localhost"), (b"\x0f\x10", "application/grpc"), (b"\0\2te", "trailers"))
    return b"\x83\x86" + b"".join(name + varint(len(value)) + value.encode() for name, value in pairs)


def unpacked(data):
    """A text in Huffman codes, in which rarer characters than those of CODES are not found."""
    names, code, before = {}, 0, 0
    for length, characters in CODES.items():
        code, before = code << (length - before), length
        for character in characters:
            names[f"{code:0{length}b}"], code = character, code + 1
    text = bits = ""
    for bit in "".join(f"{byte:08b}" for byte in data):
        bits += bit
        if bits in names:
            text, bits = text + names[bits], ""
    return text


def read_headers(block):
    """{name: value}; where the name is in HPACK's static table, its number."""
    headers, file = {}, io.BytesIO(block)

    def number(first, most):
        value = first & most
        return value if value < most else value + read_varint(file)

    def text():
        first = file.read(1)[0]
        data = file.read(number(first, 127))
        return unpacked(data) if first & 128 else data.decode()

    while byte := file.read(1):
        first = byte[0]
        if first & 128:  # a whole header of the table
            number(first, 127)
        elif first & 96 == 32:  # the table's size
            number(first, 31)
        else:
            name = number(first, 63 if first & 64 else 15) or text()
            headers[name] = text()
    return headers


def read_answer(connection, file):
    """(what was sent, its headers) of the only stream."""
    data, headers, ended = b"", {}, False
    while not ended:
        head = file.read(9)
        if len(head) < 9:
            raise ConnectionError("the server has hung up")
        kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
        content = file.read(int.from_bytes(head[:3], "big"))
        if kind in (SETTINGS, PING) and not flags & ACK:
            connection.sendall(frame(kind, ACK, 0, content if kind == PING else b""))
        elif kind == HEADERS:
            headers.update(read_headers(content))
        elif kind == DATA:
            data += content
        elif kind == RST_STREAM:
            raise Refused(f"the server has reset the stream: {content.hex()}")
        ended = stream == 1 and kind in (DATA, HEADERS) and flags & END_STREAM
    return data, headers


def call(address, method, message, service="RuntimeService"):
    """The answer to a message of who has a socket at this path.  Raises Refused, and OSError if it is not there."""
    request = encode(message)
    settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, MOST)
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as file:
        connection.settimeout(120)
        connection.connect(str(address))
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MOST))
            + frame(HEADERS, END_HEADERS, 1, call_headers(f"/runtime.v1.{service}/{method}"))
            + frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, len(request)) + request)
        )
        data, headers = read_answer(connection, file)
    if headers.get("grpc-status") != "0":
        raise Refused(urllib.parse.unquote(headers.get("grpc-message", str(headers))))
    return decode(data[5:])


# ---- pods

POD, CONTAINER = 0, 1  # whose a namespace is
EXITED = 2  # a container's state
PORT_START = "net.ipv4.ip_unprivileged_port_start"  # a sysctl that any pod may ask for


class Pod:
    """A pod that runs, as the kubelet asks for one, and its containers."""

    def __init__(self, address, name, handler, logs):
        """address: containerd's socket.  handler: of the runtime.  logs: a folder for what containers write."""
        self.address, self.modes = address, {1: POD, 2: CONTAINER, 3: POD}  # of network, pid, ipc
        self.config = {
            1: {1: name, 2: f"uid-{name}", 3: "default"},
            2: name,  # of the host
            3: str(logs),
            4: {1: ["10.96.0.10"], 2: ["default.svc.test"], 3: ["ndots:5"]},  # DNS
            8: {1: f"/kubepods/besteffort/pod-{name}", 2: {1: self.modes}, 3: {1: PORT_START, 2: "79"}},
        }
        self.id = self.call("RunPodSandbox", {1: self.config, 2: handler})[1][0].decode()

    def call(self, method, message):
        return call(self.address, method, message)

    def status(self):
        """(whether it is ready, its address, the sandbox's pid)."""
        answer = self.call("PodSandboxStatus", {1: self.id, 2: 1})
        status, info = decode(answer[1][0]), decode(answer[2][0])
        network = decode(status.get(5, [b""])[0])
        return 3 not in status, network.get(1, [b""])[0].decode(), json.loads(info[2][0])["pid"]

    def start(self, name, image, *command, mounts=(), attempt=0):
        """The id of a new container, which runs.  mounts: (path in it, path on the host, whether it is read-only)."""
        config = {
            1: {1: name, 2: attempt},
            2: {1: image},
            3: list(command),
            7: [{1: path, 2: str(source), 3: readonly} for path, source, readonly in mounts],
            11: f"{name}-{attempt}.log",
            15: {1: {3: 2, 5: 1000}, 2: {3: self.modes}},  # CPU shares, score for the OOM killer
        }
        container = self.call("CreateContainer", {1: self.id, 2: config, 3: self.config})[1][0].decode()
        self.call("StartContainer", {1: container})
        return container

    def state(self, container):
        """(its state, its exit status, its pid)."""
        answer = self.call("ContainerStatus", {1: container, 2: 1})
        status, info = decode(answer[1][0]), decode(answer[2][0])
        return status.get(3, [0])[0], status.get(7, [0])[0], json.loads(info[2][0])["pid"]

    def exec(self, container, *command):
        """(its output, its exit status)."""
        answer = self.call("ExecSync", {1: container, 2: list(command), 3: 60})
        return answer.get(1, [b""])[0], answer.get(3, [0])[0]

    def remove(self):
        """It and its containers are gone, also those that run."""
        self.call("RemovePodSandbox", {1: self.id})
