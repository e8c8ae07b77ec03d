"""An empty network of one's own: a new network namespace with a cable to the guest and no way out.

Sockets that exist already stay in the network in which they were made; sockets made later belong
to the new one. That is the whole trick of the network process: it accepts on the host's ports and
connects inside.
"""

import errno
import os
import socket
import struct

from cloudlet.forwarder import netlink
from cloudlet.forwarder.kernel import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    forbid_new_privileges,
    open_tap,
    unshare,
)

INTERFACE = "guest0"
GUEST_ADDRESS = "10.0.2.15"
GATEWAY_ADDRESS = "10.0.2.2"
PREFIX, NETMASK = 24, "255.255.255.0"
MTU = 1500
GATEWAY_MAC = "52:55:0a:00:02:02"  # fixed, because a captured guest has it in its memory
_LOOPBACK = 1  # the interface index of "lo" in every namespace

# from linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h and linux/neighbour.h
_NEWADDR, _NEWROUTE, _NEWNEIGH = 20, 24, 28
_IFLA_ADDRESS, _IFLA_MTU = 1, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _LOCAL = 4, 255, 3, 254, 2
_NDA_DST, _NDA_LLADDR, _NUD_STALE = 1, 2, 0x04

# Each of these, where the kernel has it, can forbid user namespaces to an ordinary user:
# (file, the value that forbids, what to do).
_FORBIDDERS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=15000"),
)

TUN_HINT = "modprobe tun, and let this user open /dev/net/tun (in a container: --device /dev/net/tun)"


class NotFurnishedError(Exception):
    """The guest cannot have its network; ``hint`` says what would help."""

    kind = "refused"
    """The word for it that the site is told."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class RightMissingError(NotFurnishedError):
    """The kernel does not let this user have it."""


def enter_empty_network() -> bool:
    """Leave the host's network for a new and empty one; whether root's rights were used for it.

    Without them the process gets a user namespace too, in which it stays who it is. Raises
    `RightMissingError`.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWNET)
        return True
    except OSError as error:
        if error.errno != errno.EPERM:
            raise RightMissingError(f"no network namespace: {error.strerror}", _hint()) from error
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
    except OSError as error:
        raise RightMissingError(
            f"user {uid} may not make a network namespace: {error.strerror}", _hint()
        ) from error
    # Only oneself is known inside. The kernel wants setgroups denied before the group's line.
    maps = (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"))
    for name, line in maps:
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(line)
    return False


def plug_in(guest_mac: str) -> int:
    """Furnish the empty network with the gateway's end of the cable; return the tap's descriptor.

    The loopback takes every address there is, so that what a guest tries to reach is refused at
    once, by the empty network itself, instead of timing out; nothing listens here but the gateway's
    DHCP. The guest's hardware address is known from the start, though it may change, so that the
    first client need not wait until the guest has answered who it is. Raises `RightMissingError`.
    """
    try:
        tap = open_tap(INTERFACE)
    except OSError as error:
        raise RightMissingError(f"/dev/net/tun: {error.strerror}", TUN_HINT) from error
    index = socket.if_nametoindex(INTERFACE)
    gateway, guest = socket.inet_aton(GATEWAY_ADDRESS), socket.inet_aton(GUEST_ADDRESS)
    attribute = netlink.attribute
    with netlink.open_socket() as kernel:
        netlink.set_up(kernel, _LOOPBACK)
        name_and_size = attribute(_IFLA_ADDRESS, hardware_address(GATEWAY_MAC))
        name_and_size += attribute(_IFLA_MTU, struct.pack("=I", MTU))
        netlink.set_up(kernel, index, name_and_size)
        address = struct.pack("=BBBBI", socket.AF_INET, PREFIX, 0, 0, index)
        address += attribute(_IFA_LOCAL, gateway) + attribute(_IFA_ADDRESS, gateway)
        netlink.create(kernel, _NEWADDR, address)
        neighbour = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_STALE, 0, 0)
        neighbour += attribute(_NDA_DST, guest) + attribute(_NDA_LLADDR, hardware_address(guest_mac))
        netlink.create(kernel, _NEWNEIGH, neighbour)
        everything = struct.pack(
            "=BBBBBBBBI",
            *(socket.AF_INET, 0, 0, 0, _TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _LOCAL, 0),
        ) + attribute(_RTA_OIF, struct.pack("=I", _LOOPBACK))
        netlink.create(kernel, _NEWROUTE, everything)
    return tap


def give_up_rights(uid: int, gid: int, *, privileged: bool) -> None:
    """Become ``uid`` and ``gid`` where root's rights were used, and gain no right any more."""
    if privileged:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    forbid_new_privileges()


def _hint() -> str:
    """Name the setting of this kernel that forbids it, as a command, if there is one."""
    for name, forbidding, command in _FORBIDDERS:
        try:
            with open(f"/proc/sys/{name}", encoding="ascii") as file:  # noqa: PTH123
                if file.read().strip() == forbidding:
                    return command
        except OSError:
            continue
    return (
        "run the site as root or with CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN), "
        "or allow user namespaces"
    )


def hardware_address(text: str) -> bytes:
    """Return the six bytes of an address such as 52:55:0a:00:02:02."""
    return bytes.fromhex(text.replace(":", ""))
