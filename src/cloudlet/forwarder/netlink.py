"""The few requests about interfaces that are made of the kernel (netlink(7), rtnetlink(7))."""

import os
import socket
import struct

# from linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/if.h
_NEWLINK, _REQUEST, _ACK, _EXCLUSIVE, _CREATE = 16, 0x001, 0x004, 0x200, 0x400
_IFLA_MASTER, _IFF_UP = 10, 1


def open_socket() -> socket.socket:
    """Return a socket for requests about the network in which the calling thread is."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


def attribute(kind: int, value: bytes) -> bytes:
    """Return a value as it stands in a request."""
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def set_up(kernel: socket.socket, index: int, attributes: bytes = b"") -> None:
    """Switch an interface on, with what else is to be changed of it."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP)
    _ask(kernel, _NEWLINK, body + attributes)


def put_under(kernel: socket.socket, index: int, master: int) -> None:
    """Make an interface a port of a bridge."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0)
    _ask(kernel, _NEWLINK, body + attribute(_IFLA_MASTER, struct.pack("=I", master)))


def create(kernel: socket.socket, kind: int, body: bytes) -> None:
    """Make something new, such as an address or a route."""
    _ask(kernel, kind, body, _CREATE | _EXCLUSIVE)


def _ask(kernel: socket.socket, kind: int, body: bytes, flags: int = 0) -> None:
    """Send one request to the kernel and read its acknowledgement."""
    size = 16 + len(body)
    kernel.send(struct.pack("=IHHII", size, kind, flags | _REQUEST | _ACK, 1, 0) + body)
    (code,) = struct.unpack_from("=i", kernel.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))
