"""An empty network of one's own: a new network namespace with a cable to the guest and no way out.

Sockets that exist already stay in the network in which they were made; sockets made later belong
to the new one. That is the whole trick of the network process: it accepts on the host's ports and
connects inside.
"""

import errno
import fcntl
import os
import socket
import struct

from cloudlet.forwarder.kernel import CLONE_NEWNET, CLONE_NEWUSER, forbid_new_privileges, unshare

INTERFACE = "guest0"
GUEST_ADDRESS = "10.0.2.15"
GATEWAY_ADDRESS = "10.0.2.2"
PREFIX, NETMASK = 24, "255.255.255.0"
MTU = 1500
_GATEWAY_MAC = "52:55:0a:00:02:02"  # fixed, because a captured guest has it in its memory
_LOOPBACK = 1  # the interface index of "lo" in every namespace

# from linux/if_tun.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
# from linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h and linux/neighbour.h
_NEWLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 20, 24, 28
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 0x001, 0x004, 0x200, 0x400
_IFF_UP, _IFLA_ADDRESS, _IFLA_MTU = 1, 1, 4
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

_TUN_HINT = "modprobe tun, and let this user open /dev/net/tun (in a container: --device /dev/net/tun)"


class RightMissingError(Exception):
    """The kernel does not let this user have a network namespace; ``hint`` says what would help."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


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
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        raise RightMissingError(f"/dev/net/tun: {error.strerror}", _TUN_HINT) from error
    index = socket.if_nametoindex(INTERFACE)
    gateway, guest = socket.inet_aton(GATEWAY_ADDRESS), socket.inet_aton(GUEST_ADDRESS)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        _ask(netlink, _NEWLINK, _link(_LOOPBACK))
        name_and_size = _attribute(_IFLA_ADDRESS, _mac(_GATEWAY_MAC))
        name_and_size += _attribute(_IFLA_MTU, struct.pack("=I", MTU))
        _ask(netlink, _NEWLINK, _link(index) + name_and_size)
        address = struct.pack("=BBBBI", socket.AF_INET, PREFIX, 0, 0, index)
        address += _attribute(_IFA_LOCAL, gateway) + _attribute(_IFA_ADDRESS, gateway)
        _ask(netlink, _NEWADDR, address, _CREATE | _EXCLUSIVE)
        neighbour = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_STALE, 0, 0)
        neighbour += _attribute(_NDA_DST, guest) + _attribute(_NDA_LLADDR, _mac(guest_mac))
        _ask(netlink, _NEWNEIGH, neighbour, _CREATE | _EXCLUSIVE)
        everything = struct.pack(
            "=BBBBBBBBI",
            *(socket.AF_INET, 0, 0, 0, _TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _LOCAL, 0),
        ) + _attribute(_RTA_OIF, struct.pack("=I", _LOOPBACK))
        _ask(netlink, _NEWROUTE, everything, _CREATE | _EXCLUSIVE)
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


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _link(index: int) -> bytes:
    """Return the request's body that switches an interface on."""
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP)


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def _ask(netlink: socket.socket, kind: int, body: bytes, flags: int = 0) -> None:
    """Send one request to the kernel and read its acknowledgement."""
    size = 16 + len(body)
    netlink.send(struct.pack("=IHHII", size, kind, flags | _REQUEST | _ACK, 1, 0) + body)
    (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))
