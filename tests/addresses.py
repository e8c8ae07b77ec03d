"""This machine's own addresses, for tests of who may reach them."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from contextlib import suppress


def host_addresses() -> list[str]:
    """This machine's IPv4 addresses besides the loopback's."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("40s", name.encode()))
            with suppress(OSError):
                fcntl.ioctl(control, 0x8915, request)  # SIOCGIFADDR
                found.append(socket.inet_ntoa(request[20:24].tobytes()))
    return [address for address in found if not address.startswith("127.")]
