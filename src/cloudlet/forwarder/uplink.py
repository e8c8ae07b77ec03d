"""The guest's way to a bridge of the site, where the operator has given it one.

A bridge is a network in which others are, and which may reach as far as another site: there the guest
has the same address after a hand-off, and whoever was connected to it still is. Its gateway stays in
the empty network of its own; what is passed on here are the frames between guest and bridge.

All guests have the same addresses, so there is one at a bridge at a time.
"""

import errno
import os
import socket
from contextlib import suppress

from cloudlet.forwarder import netlink
from cloudlet.forwarder.kernel import open_tap
from cloudlet.forwarder.namespace import (
    GATEWAY_MAC,
    TUN_HINT,
    NotFurnishedError,
    RightMissingError,
    hardware_address,
)

_GATEWAY = hardware_address(GATEWAY_MAC)
_BRIDGES_ONLY = bytes.fromhex("0180c20000")
"""How the addresses begin by which bridges speak to each other (IEEE 802.1D, table 7-10)."""


class BridgeMissingError(NotFurnishedError):
    """There is no such bridge."""

    kind = "failed"


class BridgeTakenError(NotFurnishedError):
    """Another guest is there."""

    kind = "taken"


def plug_into(bridge: str) -> int:
    """Make a tap device at a bridge of the network in which this process is; return its descriptor.

    It is called after the bridge's number, as ``cloudlet7``, so that the kernel refuses a second one.
    Raises `RightMissingError`, `BridgeMissingError` and `BridgeTakenError`.
    """
    no_bridge = f"ip link add {bridge} type bridge, or set another one as bridge"
    try:
        master = socket.if_nametoindex(bridge)
    except OSError as error:
        raise BridgeMissingError(f"there is no bridge {bridge}", no_bridge) from error
    name = f"cloudlet{master}"
    try:
        tap = open_tap(name)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BridgeTakenError(
                f"another instance is at bridge {bridge}, with the address that all have",
                "stop that one first, or give this site another bridge",
            ) from error
        if error.errno == errno.EPERM:
            raise RightMissingError(
                f"this user may not put a tap device at bridge {bridge}",
                "run the site as root (in a container: --cap-add NET_ADMIN), or set no bridge",
            ) from error
        raise RightMissingError(f"/dev/net/tun: {error.strerror}", TUN_HINT) from error
    with suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file:  # noqa: PTH123
        file.write("1")  # the site itself says nothing to the guest
    index = socket.if_nametoindex(name)
    with netlink.open_socket() as kernel:
        try:
            netlink.put_under(kernel, index, master)
        except OSError as error:
            os.close(tap)
            raise BridgeMissingError(f"{bridge} is no bridge: {error.strerror}", no_bridge) from error
        netlink.set_up(kernel, index)
    return tap


class Uplink:
    """Which frames pass between a guest and its bridge."""

    def __init__(self, tap: int, guest_mac: str) -> None:
        self.tap = tap
        self.awake = False
        """Whether the machine has said anything yet: one that is being loaded is to find no old frames."""
        self._guest = hardware_address(guest_mac)

    def takes(self, frame: memoryview) -> bool:
        """Whether a frame of the guest is for the bridge: it is its own, and not one between bridges."""
        self.awake = True
        target, source = frame[:6], frame[6:12]
        return source == self._guest and target != _GATEWAY and target[:5] != _BRIDGES_ONLY


def for_gateway(frame: memoryview) -> bool:
    """Whether a frame of the guest is for its gateway, or for all."""
    return bool(frame) and (frame[0] & 1 == 1 or frame[:6] == _GATEWAY)
