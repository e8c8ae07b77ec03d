"""Ethernet frames as a guest might send them, well-meant or not, in QEMU's framing."""

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

MAC = bytes.fromhex("525400c10d01")
GATEWAY_MAC = bytes.fromhex("52550a000202")
EVERYBODY = b"\xff" * 6
DISCOVER, REQUEST = 1, 3
T = TypeVar("T")


class Link:
    """QEMU's end of the network, used by the test itself."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, frame: bytes) -> None:
        self._socket.sendall(struct.pack(">I", len(frame)) + frame)

    def receive(self, read: Callable[[bytes], T | None], seconds: float) -> T:
        """Return the first frame of which ``read`` makes something; skip others."""
        deadline = time.monotonic() + seconds
        while True:
            (length,) = struct.unpack(">I", self._exactly(4, deadline))
            if (value := read(self._exactly(length, deadline))) is not None:
                return value

    def _exactly(self, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._socket], [], [], left)[0], "no such frame in time"
            block = self._socket.recv(count - len(data))
            assert block, "the network has closed the link"
            data += block
        return data


def arp_request() -> bytes:
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    sender, wanted = socket.inet_aton("10.0.2.15"), socket.inet_aton("10.0.2.2")
    return EVERYBODY + MAC + b"\x08\x06" + head + MAC + sender + bytes(6) + wanted


def arp_reply(frame: bytes) -> bytes | None:
    """Return the gateway's hardware address."""
    return frame[22:28] if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2" else None


def tcp_syn(source: str, target: str, port: int) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    tcp = struct.pack(">HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    pseudo = addresses + struct.pack(">BBH", 0, 6, len(tcp))
    tcp = tcp[:16] + struct.pack(">H", _checksum(pseudo + tcp)) + tcp[18:]
    return GATEWAY_MAC + MAC + b"\x08\x00" + _ip(6, addresses, tcp)


def dhcp_message(kind: int, wanted: str | None = None) -> bytes:
    bootp = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + MAC
    message = bootp.ljust(236, b"\0") + b"\x63\x82\x53\x63" + bytes([53, 1, kind])
    if wanted is not None:
        message += b"\x32\x04" + socket.inet_aton(wanted)
    message += b"\xff"
    udp = struct.pack(">HHHH", 68, 67, 8 + len(message), 0) + message
    return EVERYBODY + MAC + b"\x08\x00" + _ip(17, bytes(4) + b"\xff" * 4, udp)


@dataclass(frozen=True)
class Offer:
    address: str
    options: dict[int, bytes]


def dhcp_reply(frame: bytes) -> Offer | None:
    if frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[34:36] != b"\0\x43":
        return None
    message = frame[42:]
    options, rest = {}, message[240:]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        options[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    return Offer(socket.inet_ntoa(message[16:20]), options)


def _ip(protocol: int, addresses: bytes, payload: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + addresses
    return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + payload


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
