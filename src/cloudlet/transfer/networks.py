"""Where users may lead a site: to public addresses, and into networks that its operator allows.

Users name URLs, of overlays and of webhooks, and a site reaches what they do not: its own loopback, its
neighbours, a cloud's metadata. So an address is looked at when its name is resolved, and that address is
connected to, whatever the name leads to a moment later. Where a proxy is configured, what may be reached
through it is the proxy's to say.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

from cloudlet.errors import ImpossibleError, UsageError

_Address = IPv4Address | IPv6Address
_Found = tuple[socket.AddressFamily, Any, _Address]
"""What kind of address, where it is for the kernel, and as a number."""
_MOST_ADDRESSES = 4
"""How many addresses of a name are tried."""
_GLOBAL_6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


class Networks:
    """The networks that may be reached besides the public ones."""

    def __init__(self, allowed: Iterable[str] | None) -> None:
        """Those that are named.

        :param allowed: such as ``10.1.0.0/16``; None: all there are.
        :raises UsageError: one is no network.
        """
        self._everywhere = allowed is None
        try:
            self._allowed: tuple[IPv4Network | IPv6Network, ...] = tuple(map(ip_network, allowed or ()))
        except ValueError as error:
            raise UsageError(f"no network: {error}", hint="write 10.1.0.0/16 or fd00::/8") from error

    def check(self, url: str, what: str) -> None:
        """That a URL leads where it may; one whose name is unknown at the moment leads nowhere.

        :param what: what the user calls it, such as ``webhook.url``.
        :raises ImpossibleError: it does not, or it is not a URL.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 0
        except ValueError as error:
            raise ImpossibleError(f"{what}: {error}", hint="write http://HOST/PATH") from error
        try:
            self._addresses(host, port)
        except ImpossibleError as error:
            raise ImpossibleError(f"{what}: {error.message}", hint=error.hint) from error
        except (OSError, UnicodeError):
            return

    def allows(self, address: str) -> bool:
        """Whether an address, as numbers, may be reached."""
        meant = ip_address(address)
        family = socket.AF_INET if meant.version == 4 else socket.AF_INET6
        return self._may(family, (address, 0), meant)

    def connect(self, host: str, port: int, timeout: float | None) -> socket.socket:
        """A connection to one of a host's addresses that may be reached.

        :param timeout: seconds for all of it, and then for what is read and written.
        :raises ImpossibleError: none may be.
        :raises OSError: none answers.
        """
        if self._everywhere:
            return socket.create_connection((host, port), timeout)
        ends = time.monotonic() + timeout if timeout is not None else None
        addresses = self._addresses(host, port)[:_MOST_ADDRESSES]
        problem: OSError = TimeoutError(f"{host} does not answer")
        for tried, (family, place, _) in enumerate(addresses):
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                if ends is not None:
                    # Each has its share: the first one may be of a kind that leads nowhere from here.
                    connection.settimeout(max(0.1, (ends - time.monotonic()) / (len(addresses) - tried)))
                connection.connect(place)
                connection.settimeout(timeout)
            except OSError as error:
                connection.close()
                problem = error
            else:
                return connection
        raise problem

    def connection(self, scheme: str, host: str, timeout: float) -> HTTPConnection:
        """A client of a web server that connects to where it may.

        :param host: with or without a port, as a URL has it.
        """
        return _Secure(self, host, timeout) if scheme == "https" else _Plain(self, host, timeout)

    def _addresses(self, host: str, port: int) -> list[_Found]:
        """The addresses of a host that may be reached, as the resolver orders them."""
        found: list[_Found] = [
            (family, place, ip_address(str(place[0]).partition("%")[0]))
            for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            if family in (socket.AF_INET, socket.AF_INET6)
        ]
        if allowed := [entry for entry in found if self._may(*entry)]:
            return allowed
        if not found:
            raise OSError(f"{host} has no address")
        raise ImpossibleError(
            f"{host} leads to {found[0][2]}, which is not a public address",
            hint="the site's operator can allow its network",
        )

    def _may(self, family: socket.AddressFamily, place: Any, address: _Address) -> bool:
        address = _meant(address)
        if self._everywhere or any(address in network for network in self._allowed):
            return True
        return _public(address) and not _ours(family, place)


EVERYWHERE = Networks(None)


class _Plain(HTTPConnection):
    def __init__(self, networks: Networks, host: str, timeout: float) -> None:
        super().__init__(host, timeout=timeout)
        self._networks = networks

    def connect(self) -> None:
        self.sock = _connected(self._networks, self)


class _Secure(HTTPSConnection):
    def __init__(self, networks: Networks, host: str, timeout: float) -> None:
        self._trusted = ssl.create_default_context()
        super().__init__(host, timeout=timeout, context=self._trusted)
        self._networks = networks

    def connect(self) -> None:
        connection = _connected(self._networks, self)
        try:
            self.sock = self._trusted.wrap_socket(connection, server_hostname=self.host)
        except BaseException:
            connection.close()
            raise


def _connected(networks: Networks, client: HTTPConnection) -> socket.socket:
    connection = networks.connect(client.host, client.port, client.timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _meant(address: _Address) -> _Address:
    """The address of IPv4 that one of IPv6 stands for, where it does."""
    if not isinstance(address, IPv6Address):
        return address
    translated = IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
    return address.ipv4_mapped or address.sixtofour or translated or address


def _public(address: _Address) -> bool:
    if isinstance(address, IPv6Address):
        return address in _GLOBAL_6 and address.is_global
    return address.is_global and not address.is_multicast


def _ours(family: socket.AddressFamily, place: Any) -> bool:
    """Whether an address is this machine's own: what leads to it goes past every firewall."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((place[0], place[1] or 9, *place[2:]))  # which sends nothing
        return bool(probe.getsockname()[0] == place[0])
    return False
