"""The network process of a guest at a bridge: what passes between the two, and what does not."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from socket import SOCK_SEQPACKET, SOCK_STREAM

import pytest

from cloudlet.control.site import Site
from cloudlet.errors import CloudletError, ConflictError, FailedError, RefusedError
from cloudlet.forwarder.loop import Loop
from cloudlet.forwarder.uplink import Uplink
from cloudlet.forwarder.wire import Wire
from cloudlet.hypervisor.qemu.network import NetworkProcess, bind_ports, start_network
from cloudlet.model import Endpoint, PublishedPort
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from tests.qemu import guest, guest_frames
from tests.qemu.bridged import BRIDGE, GUEST, inside, joined_networks
from tests.qemu.guest_frames import EVERYBODY, GATEWAY_MAC, MAC, Link
from tests.qemu.guest_peer import ECHO, GATEWAY, guest_peer

SECONDS = 10.0
CLIENT = "10.0.2.77"
STRANGER = bytes.fromhex("525400c10dff")
KIND = b"\x88\xb5"
"""The EtherType for experiments."""


@pytest.fixture(scope="module")
def networks() -> Iterator[tuple[str, str, str]]:
    with joined_networks() as names:
        yield names


@contextmanager
def plugged(
    folder: Path, namespace: str, bridge: str = BRIDGE
) -> Iterator[tuple[NetworkProcess, list[Endpoint]]]:
    """A network process in a namespace of a site, and where its port is published there."""
    with (folder / "network.log").open("ab") as log:

        def start() -> tuple[NetworkProcess, list[Endpoint]]:
            bound = bind_ports([PublishedPort(ECHO)])
            endpoints = [port.endpoint for port in bound]
            return start_network(bound, str(folder), log.fileno(), bridge=bridge), endpoints

        process, endpoints = inside(namespace, start)
    try:
        process.wait_ready(time.monotonic() + SECONDS)
        yield process, endpoints
    finally:
        process.stop()


def spoken_with(host: str, port: int) -> bytes:
    """What the guest's echo answers."""
    with socket.create_connection((host, port), SECONDS) as client:
        client.sendall(b"hello")
        return client.recv(5, socket.MSG_WAITALL)


def client_socket() -> socket.socket:
    """Frames as the client's card has them."""
    card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
    card.bind(("user", 0))
    card.settimeout(SECONDS)
    return card


def heard(card: socket.socket, end: bytes) -> list[bytes]:
    """The frames of our kind that came, up to one that ends with ``end``."""
    frames: list[bytes] = []
    while not frames or not frames[-1].rstrip(b"\0").endswith(end):
        frame = card.recv(2048)
        if frame[12:14] == KIND:
            frames.append(frame)
    return frames


def of_kind(frame: bytes) -> bytes | None:
    """For `Link.receive`: a frame of our kind."""
    return frame.rstrip(b"\0") if frame[12:14] == KIND else None


def of_kind_or_ip(frame: bytes) -> bytes | None:
    """The same, or a packet from a client of the published port."""
    return b"IP" if frame[12:14] == b"\x08\x00" else of_kind(frame)


def answers_who_it_is(seconds: float) -> bool:
    """Whether the guest answers one question after its hardware address in time."""
    head = bytes.fromhex("08060001080006040001")
    with client_socket() as card:
        card.settimeout(seconds)
        card.send(EVERYBODY + STRANGER + head + STRANGER + bytes(10) + socket.inet_aton(GUEST))
        try:
            while guest_frames.arp_reply(card.recv(2048)) != MAC:
                pass
        except TimeoutError:
            return False
    return True


def taps(namespace: str) -> list[str]:
    shown = ["ip", "-n", namespace, "-br", "link", "show", "master", BRIDGE]
    lines = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith("cloudlet")]


def test_both_ways_lead_to_the_guest(networks: tuple[str, str, str], tmp_path: Path) -> None:
    site, _, client = networks
    with plugged(tmp_path, site) as (process, (endpoint,)), guest_peer(process.qemu_fd) as peer:
        process.close_qemu_fd()
        assert inside(client, lambda: spoken_with(GUEST, ECHO)) == b"hello"
        assert inside(site, lambda: spoken_with(endpoint.host, endpoint.host_port)) == b"hello"
        listener = inside(client, lambda: socket.create_server((CLIENT, 0)))
        with listener:
            port = listener.getsockname()[1]
            assert peer.reach("tcp", CLIENT, port) == "connected", "it reaches who is at the bridge"
        for host in (GATEWAY, "198.18.0.1", "192.0.2.77"):
            assert peer.reach("tcp", host, port) == "ECONNREFUSED", "and nobody else"
        assert len(taps(site)) == 1
    assert taps(site) == []


def test_the_gateway_still_gives_the_address(networks: tuple[str, str, str], tmp_path: Path) -> None:
    with plugged(tmp_path, networks[0]) as (process, _), Link(process.qemu_fd) as link:
        link.send(guest_frames.dhcp_message(guest_frames.DISCOVER))
        assert link.receive(guest_frames.dhcp_reply, SECONDS).address == GUEST
        link.send(guest_frames.arp_request())
        assert link.receive(guest_frames.arp_reply, SECONDS) == GATEWAY_MAC


def test_only_the_guests_own_frames_pass(networks: tuple[str, str, str], tmp_path: Path) -> None:
    site, _, client = networks
    refused = [
        EVERYBODY + STRANGER + KIND + b"of another address",
        bytes.fromhex("0180c2000000") + MAC + KIND + b"between bridges",
        GATEWAY_MAC + MAC + KIND + b"for the gateway",
        *(EVERYBODY[:length] for length in range(7)),
        EVERYBODY + MAC,
    ]
    with (
        inside(client, client_socket) as card,
        plugged(tmp_path, site) as (process, _),
        Link(process.qemu_fd) as link,
    ):
        for frame in refused:
            link.send(frame)
        link.send(EVERYBODY + MAC + KIND + b"last")
        (frame,) = heard(card, b"last")
        assert frame[:12] == EVERYBODY + MAC
        link.send(guest_frames.arp_request())
        assert link.receive(guest_frames.arp_reply, SECONDS) == GATEWAY_MAC, "it goes on"


def test_a_machine_that_has_said_nothing_hears_nothing(
    networks: tuple[str, str, str], tmp_path: Path
) -> None:
    """Frames from before it ran would come late, all at once, and before those that matter."""
    site, _, client = networks
    with (
        inside(client, client_socket) as card,
        plugged(tmp_path, site) as (process, (endpoint,)),
        Link(process.qemu_fd) as link,
    ):
        old = STRANGER + KIND + b"old"
        card.send(EVERYBODY + old)
        # Its published port is another matter: who comes early is heard as soon as it can.
        with inside(site, lambda: socket.create_connection((endpoint.host, endpoint.host_port), SECONDS)):
            assert link.receive(of_kind_or_ip, SECONDS) == b"IP"
        link.send(EVERYBODY + MAC + KIND + b"awake")
        heard(card, b"awake")
        card.send(MAC + STRANGER + KIND + b"new")
        assert link.receive(of_kind, SECONDS).endswith(b"new")


def test_one_guest_at_a_time(networks: tuple[str, str, str], tmp_path: Path) -> None:
    site, other, _ = networks
    with plugged(tmp_path, site):
        with (
            pytest.raises(ConflictError, match=f"another instance is at bridge {BRIDGE}"),
            plugged(tmp_path, site),
        ):
            pass
        with plugged(tmp_path, other):
            assert len(taps(site)) == len(taps(other)) == 1
    with plugged(tmp_path, site):
        assert len(taps(site)) == 1


@pytest.mark.parametrize(
    ("bridge", "said"),
    [
        ("nosuch0", "there is no bridge nosuch0 .*ip link add nosuch0 type bridge"),
        ("lo", "lo is no bridge"),
        ("backhaul", "backhaul is no bridge"),
    ],
)
def test_what_is_no_bridge(networks: tuple[str, str, str], tmp_path: Path, bridge: str, said: str) -> None:
    with pytest.raises(FailedError, match=said), plugged(tmp_path, networks[0], bridge):
        pass
    shown = ["ip", "-n", networks[0], "-br", "link"]
    assert "cloudlet" not in subprocess.run(shown, capture_output=True, text=True, check=True).stdout


def test_without_the_right_the_error_says_what_to_do(
    networks: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is root in a user namespace only has no right to the site's network."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec unshare --user --map-root-user {shlex.quote(sys.executable)} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    with (
        pytest.raises(RefusedError, match=r"may not put a tap device at bridge guests .*as root"),
        plugged(tmp_path, networks[0]),
    ):
        pass


def test_a_stopped_process_is_silent_and_one_that_is_gone_leaves_no_tap(
    networks: tuple[str, str, str], tmp_path: Path
) -> None:
    """As the source's is between the machine's stop and its end."""
    site, _, client = networks
    with plugged(tmp_path, site) as (process, _), guest_peer(process.qemu_fd):
        process.close_qemu_fd()
        assert inside(client, lambda: spoken_with(GUEST, ECHO)) == b"hello"
        assert inside(client, lambda: answers_who_it_is(SECONDS))
        subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
        assert not inside(client, lambda: answers_who_it_is(1.0))
        subprocess.run(["kill", "-KILL", str(process.pid)], check=True)
        assert process.wait(SECONDS)
        assert taps(site) == []


def test_a_tap_that_is_deleted_is_the_end_of_that_way_only(
    networks: tuple[str, str, str], tmp_path: Path
) -> None:
    site = networks[0]
    with plugged(tmp_path, site) as (process, (endpoint,)), guest_peer(process.qemu_fd):
        (tap,) = taps(site)
        subprocess.run(["ip", "-n", site, "link", "delete", tap], check=True)
        assert inside(site, lambda: spoken_with(endpoint.host, endpoint.host_port)) == b"hello"
        assert "the tap device at the bridge is gone" in (tmp_path / "network.log").read_text()


class Wired:
    """A wire whose taps are sockets, which take and give one frame per system call as well."""

    def __init__(self, stack: ExitStack) -> None:
        kinds = (SOCK_STREAM, SOCK_SEQPACKET, SOCK_SEQPACKET)
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in kinds]
        for end in chain(*pairs):
            stack.enter_context(end)
            end.settimeout(SECONDS)
        (self.link, self.guest), (gateway, self.inside), (outer, self.bridge) = pairs
        self.uplink = Uplink(outer.fileno(), MAC.hex(":"))
        loop = Loop()
        Wire(loop, self.link, gateway.fileno(), self.uplink)
        self._thread = threading.Thread(target=loop.run)
        stack.callback(self._end)

    def start(self) -> None:
        self._thread.start()

    def _end(self) -> None:
        self.guest.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


def test_each_frame_goes_where_it_belongs() -> None:
    neighbour = STRANGER + MAC + KIND + b"for a neighbour"
    gateway = GATEWAY_MAC + MAC + KIND + b"for the gateway"
    everybody = EVERYBODY + MAC + KIND + b"for all"
    with ExitStack() as stack:
        wired = Wired(stack)
        wired.start()
        for frame in (neighbour, gateway, everybody):
            wired.guest.sendall(len(frame).to_bytes(4, "big") + frame)
        assert [wired.inside.recv(2048) for _ in range(2)] == [gateway, everybody]
        assert [wired.bridge.recv(2048) for _ in range(2)] == [neighbour, everybody]


def test_a_guest_that_is_slow_gets_whole_frames_of_both() -> None:
    count = 600  # of 1,000 bytes each: more than the link holds, and less than the sockets do
    with ExitStack() as stack:
        wired = Wired(stack)
        wired.uplink.awake = True
        wired.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        ends = {b"i": wired.inside, b"o": wired.bridge}
        for name, end in ends.items():
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
            for number in range(count):
                end.send(name + number.to_bytes(4, "big") + bytes(995))
        wired.start()
        frames: dict[bytes, list[int]] = {name: [] for name in ends}
        with wired.guest.makefile("rb") as stream:
            for _ in range(2 * count):
                frame = stream.read(int.from_bytes(stream.read(4), "big"))
                assert len(frame) == 1000
                frames[frame[:1]].append(int.from_bytes(frame[1:5], "big"))
    assert frames == {b"i": list(range(count)), b"o": list(range(count))}


@pytest.mark.qemu
def test_a_machine_says_where_it_is_when_it_runs_and_when_it_goes_on(
    networks: tuple[str, str, str], settings: Settings, quick_base: Base
) -> None:
    """A hand-off that is reverted after its target had loaded the machine must lead everybody back."""
    name, _, client = networks
    site = at_bridge(settings, BRIDGE)
    with inside(client, client_socket) as card:
        waiting = inside(name, lambda: site.hypervisor.resume(quick_base.image(), overlay_id="any"))
        try:
            guest.begin_with_nothing(waiting)
            waiting.finish(quick_base.image().device_state.read_bytes())
            wait_announced(card)
            while not _silent(card):
                pass
            waiting.instance.hold_connections(True)
            waiting.instance.pause()
            waiting.instance.resume()
            waiting.instance.hold_connections(False)
            waiting.instance.announce()
            wait_announced(card)
        finally:
            waiting.abort()


@pytest.mark.qemu
def test_what_is_made_into_something_is_at_no_bridge(settings: Settings, quick_base: Base) -> None:
    site = at_bridge(settings, "nosuch0")
    with guest.resumed(site, quick_base) as private:
        assert guest.shell(private, "echo here") == "here"
    instance = site.hypervisor.resume(quick_base.image(), overlay_id="any")
    try:
        with pytest.raises(CloudletError, match="there is no bridge nosuch0"):
            guest.begin_with_nothing(instance)
    finally:
        instance.abort()


def at_bridge(settings: Settings, bridge: str) -> Site:
    return Site.open(replace(settings, bridge=bridge))


def wait_announced(card: socket.socket) -> None:
    """Wait for a reverse ARP of the guest's card, by which switches learn (RFC 903)."""
    while True:
        frame = card.recv(2048)
        if frame[6:14] == MAC + b"\x80\x35":
            return


def _silent(card: socket.socket) -> bool:
    """Whether nothing of the guest comes for longer than between two of its announcements."""
    card.settimeout(1.0)
    try:
        while card.recv(2048)[6:12] != MAC:
            pass
    except TimeoutError:
        return True
    finally:
        card.settimeout(SECONDS)
    return False
