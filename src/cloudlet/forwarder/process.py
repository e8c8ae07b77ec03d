"""The life of a network process: get the descriptors, go inside, plug in, relay, end with QEMU.

It is a process of the instance, not of the site: it ends when QEMU closes its end of the pair, or
at a signal, and its network ends with it. What it needs comes by inherited descriptors and a fixed
list of arguments; nothing is read from files or the environment.
"""

import os
import resource
import socket
from collections.abc import Sequence

from cloudlet.forwarder import dhcp
from cloudlet.forwarder.kernel import set_name
from cloudlet.forwarder.loop import Loop
from cloudlet.forwarder.namespace import (
    GUEST_ADDRESS,
    NotFurnishedError,
    enter_empty_network,
    give_up_rights,
    plug_in,
)
from cloudlet.forwarder.relay import Relay
from cloudlet.forwarder.uplink import Uplink, plug_into
from cloudlet.forwarder.wire import Wire

_DESCRIPTORS_BESIDES = 32  # descriptors that are not of a relayed connection, generously


class Order:
    """What the site orders, as the list of arguments that `cloudlet.hypervisor.qemu.network` makes.

    INSTANCE GUEST_MAC BRIDGE UID GID CONNECTIONS READY LINK [LISTENER:GUESTPORT ...]

    INSTANCE is there for ``ps``. BRIDGE is empty where the guest is to be at none. READY, LINK (the
    other end of QEMU's socket) and each LISTENER are inherited descriptors.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.instance, self.guest_mac, self.bridge, *numbers = arguments[:8]
        self.uid, self.gid, self.connections, self.ready, link = map(int, numbers)
        self.link = socket.socket(fileno=link)
        ports = [argument.split(":") for argument in arguments[8:]]
        self.listeners = [socket.socket(fileno=int(descriptor)) for descriptor, _ in ports]
        self.guest_ports = [int(port) for _, port in ports]


def main(arguments: Sequence[str]) -> int:
    """Run the network process to its end; the exit status is 0 unless it did not become ready."""
    order = Order(arguments)
    set_name("cloudlet-net")
    loop = Loop()
    relay = Relay(loop, _raise_limit(order.connections))
    try:
        uplink = Uplink(plug_into(order.bridge), order.guest_mac) if order.bridge else None
        privileged = enter_empty_network()
        tap = plug_in(order.guest_mac)
        server = dhcp.open_server()
        give_up_rights(order.uid, order.gid, privileged=privileged)
    except NotFurnishedError as error:
        _tell(order.ready, error.kind, str(error), error.hint)
        os.write(2, f"network process: {error}\n".encode())
        return 1
    except OSError as error:
        _tell(order.ready, "failed", f"the network cannot be furnished: {error.strerror}", "")
        return 1
    Wire(loop, order.link, tap, uplink)
    dhcp.serve(loop, server)
    for listener, port in zip(order.listeners, order.guest_ports, strict=True):
        relay.listen(listener, (GUEST_ADDRESS, port))
    _tell(order.ready, "ready")
    os.close(order.ready)
    loop.run()
    return 0


def _raise_limit(connections: int) -> int:
    """Allow two descriptors for each connection; return how many connections there is room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(connections, (hard - _DESCRIPTORS_BESIDES) // 2)


def _tell(ready: int, *fields: str) -> None:
    """Write the one line that the site awaits, its fields separated by tabs.

    A site that has gone in the meantime does not matter: the instance goes on without it.
    """
    try:
        os.write(ready, ("\t".join(field.replace("\n", " ") for field in fields) + "\n").encode())
    except BrokenPipeError:
        return
