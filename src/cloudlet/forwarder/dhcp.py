"""The DHCP of a network with one guest (RFC 2131, 2132): always the same address, for ever.

It gives a gateway, because guests wait for one, and an MTU, because a captured guest keeps it and
may wake behind another back end; no name server, because none could be reached.
"""

import socket
import struct

from cloudlet.forwarder.loop import READ, Loop
from cloudlet.forwarder.namespace import GATEWAY_ADDRESS, GUEST_ADDRESS, INTERFACE, MTU, NETMASK

_MAGIC = b"\x63\x82\x53\x63"
_TYPE, _REQUESTED, _END = 53, 50, 255
_OFFER, _ACK, _NAK = 2, 5, 6


def open_server() -> socket.socket:
    """Return the server's socket; call it before the rights to port 67 are given up."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, INTERFACE.encode())
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    server.bind(("0.0.0.0", 67))
    server.setblocking(False)
    return server


def serve(loop: Loop, server: socket.socket) -> None:
    """Answer the guest in ``loop``."""

    def on_request(_events: int) -> None:
        try:
            reply = answer(server.recv(2048))
            if reply is not None:
                server.sendto(reply, ("255.255.255.255", 68))
        except OSError:
            return  # lost, as on any network: the guest asks again

    loop.add(server.fileno(), READ, on_request)


def answer(request: bytes) -> bytes | None:
    """Return the reply to a message of a guest, or None where there is nothing to say."""
    if len(request) < 241 or request[0] != 1 or request[236:240] != _MAGIC:
        return None
    options = _options(request[240:])
    address = socket.inet_aton(GUEST_ADDRESS)
    gateway = socket.inet_aton(GATEWAY_ADDRESS)
    match options.get(_TYPE):
        case b"\x01":  # discover
            kind = _OFFER
        case b"\x03":  # request
            wanted = options.get(_REQUESTED, address)
            kind = _ACK if wanted == address else _NAK
        case _:
            return None
    reply = struct.pack(">BBBB", 2, 1, 6, 0) + request[4:8] + bytes(2) + request[10:12] + bytes(4)
    reply += (bytes(4) if kind == _NAK else address) + gateway + request[24:44]
    reply += bytes(192) + _MAGIC
    reply += _option(_TYPE, bytes([kind])) + _option(54, gateway)
    if kind != _NAK:
        reply += _option(51, b"\xff" * 4) + _option(1, socket.inet_aton(NETMASK))
        reply += _option(3, gateway) + _option(26, struct.pack(">H", MTU))
    return reply + bytes([_END])


def _option(code: int, value: bytes) -> bytes:
    return bytes([code, len(value)]) + value


def _options(data: bytes) -> dict[int, bytes]:
    """Read options up to the first that is cut off."""
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data) and data[position] != _END:
        if data[position] == 0:
            position += 1
            continue
        if position + 1 >= len(data):
            break
        start = position + 2
        position = start + data[position + 1]
        found[data[start - 2]] = data[start:position]
    return found
