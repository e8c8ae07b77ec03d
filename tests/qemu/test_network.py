"""The network process, with a real network stack in the guest's place.

Root's rights or user namespaces are needed, and /dev/net/tun for the guest's stand-in; without them
the tests fail and say so.
"""

import hashlib
import os
import random
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from cloudlet.errors import ConflictError, FailedError, RefusedError
from cloudlet.hypervisor.qemu.network import (
    PUBLIC_MAC,
    NetworkProcess,
    bind_ports,
    start_network,
)
from cloudlet.hypervisor.records import start_time_of
from cloudlet.model import Endpoint, PublishedPort
from tests.addresses import host_addresses
from tests.qemu import guest_frames
from tests.qemu.guest_peer import DIGEST, ECHO, GATEWAY, ZEROS, GuestPeer, guest_peer

SECONDS = 10.0  # of patience for anything; a few are only used up when a test fails


class Network:
    """A started network and where its ports are published."""

    def __init__(self, process: NetworkProcess, endpoints: list[Endpoint], log: Path) -> None:
        self.process = process
        self.endpoints = endpoints
        self.log = log

    def connect(self, index: int = 0) -> socket.socket:
        endpoint = self.endpoints[index]
        return socket.create_connection((endpoint.host, endpoint.host_port), SECONDS)


@contextmanager
def network(
    folder: Path,
    *guest_ports: int,
    connections: int = 256,
    name: str = "instance",
    host: str = "127.0.0.1",
) -> Iterator[Network]:
    bound = bind_ports([PublishedPort(port, host) for port in guest_ports])
    endpoints = [port.endpoint for port in bound]
    log = folder / f"{name}.log"
    with log.open("ab") as file:
        process = start_network(bound, name, file.fileno(), max_connections=connections)
    try:
        process.wait_ready(time.monotonic() + SECONDS)
        yield Network(process, endpoints, log)
    finally:
        process.stop()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, GuestPeer]]:
    folder = tmp_path_factory.mktemp("network")
    with (
        network(folder, ECHO, DIGEST, ZEROS) as served,
        guest_peer(served.process.qemu_fd) as peer,
    ):
        served.process.close_qemu_fd()
        yield served, peer


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Network]:
    """A network whose guest is played frame by frame."""
    with network(tmp_path, ECHO, name=f"bare-{os.getpid()}") as served:
        yield served


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Send all data and the end of it, and return all that comes back, at the same time."""

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(send)
        received = bytearray()
        while block := client.recv(1 << 20):
            received += block
        sending.result(SECONDS)
    return bytes(received)


def test_a_published_port_answers(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    with served.connect() as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"


def test_a_large_transfer_both_ways_at_once_is_intact(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    data = random.Random(1).randbytes(16 << 20)
    with served.connect() as client, ThreadPoolExecutor(1) as executor:
        sending = executor.submit(client.sendall, data)
        received = bytearray()
        while len(received) < len(data):
            received += client.recv(1 << 20)
        sending.result(SECONDS)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"bye"
    assert received == data


def test_a_large_upload_is_intact_and_its_end_arrives(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    data = random.Random(2).randbytes(64 << 20)
    with served.connect(1) as client:
        assert exchange(client, data).decode() == hashlib.sha256(data).hexdigest()


def test_a_large_download_follows_the_end_of_the_request(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    with served.connect(2) as client:
        assert exchange(client, b"64000000") == bytes(64_000_000)


def test_fifty_connections_at_a_time(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    everyone = threading.Barrier(50)

    def one(number: int) -> bool:
        data = random.Random(number).randbytes(100_000)
        with served.connect() as client:
            everyone.wait(SECONDS)
            return exchange(client, data) == data + b"bye"

    with ThreadPoolExecutor(50) as executor:
        assert all(executor.map(one, range(50)))


def test_a_client_that_does_not_read_is_not_read_from(guest: tuple[Network, GuestPeer]) -> None:
    served, _ = guest
    data = random.Random(3).randbytes(64 << 20)
    before = resident_bytes(served.process.pid)
    with served.connect() as client:
        client.setblocking(False)
        sent = 0
        while select.select([], [client], [], 1.0)[1]:
            sent += client.send(data[sent : sent + (1 << 20)])
        assert sent < len(data), "64 MiB found room between a client and a guest that echoes"
        assert resident_bytes(served.process.pid) - before < 4 << 20
        client.settimeout(SECONDS)
        client.shutdown(socket.SHUT_WR)
        received = bytearray()
        while block := client.recv(1 << 20):
            received += block
        assert received == data[:sent] + b"bye"


def test_clients_beyond_the_bound_see_an_end_and_others_go_on(tmp_path: Path) -> None:
    with (
        network(tmp_path, ECHO, connections=3) as served,
        guest_peer(served.process.qemu_fd),
        ExitStack() as open_clients,
    ):
        clients = [open_clients.enter_context(served.connect()) for _ in range(3)]
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        with served.connect() as refused:
            assert refused.recv(1) == b""
        assert exchange(clients.pop(), b"last") == b"lastbye"
        with served.connect() as client:
            assert exchange(client, b"room again") == b"room againbye"


def test_a_client_may_come_before_the_network_is_ready(tmp_path: Path) -> None:
    bound = bind_ports([PublishedPort(ECHO)])
    endpoint = bound[0].endpoint
    with socket.create_connection((endpoint.host, endpoint.host_port), SECONDS) as client:
        client.sendall(b"early")
        with (tmp_path / "log").open("wb") as log:
            process = start_network(bound, "early", log.fileno())
        try:
            process.wait_ready(time.monotonic() + SECONDS)
            with guest_peer(process.qemu_fd):
                assert exchange(client, b" bird") == b"early birdbye"
        finally:
            process.stop()


def test_a_taken_port_is_a_clear_error_and_nothing_stays_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free = probe.getsockname()[1]
        ports = [PublishedPort(80, host_port=free), PublishedPort(81, host_port=port)]
        with pytest.raises(ConflictError, match=f"port 127.0.0.1:{port} is taken"):
            bind_ports(ports)
        socket.create_server(("127.0.0.1", free)).close()


def test_a_foreign_address_is_a_clear_error() -> None:
    with pytest.raises(FailedError, match=r"192\.0\.2\.99:80 cannot be bound"):
        bind_ports([PublishedPort(80, host="192.0.2.99", host_port=80)])


def test_dhcp_gives_the_guest_its_address_and_gateway_and_no_dns(bare: Network) -> None:
    with guest_frames.Link(bare.process.qemu_fd) as link:
        link.send(guest_frames.dhcp_message(guest_frames.DISCOVER))
        offer = link.receive(guest_frames.dhcp_reply, SECONDS)
        link.send(guest_frames.dhcp_message(guest_frames.REQUEST, offer.address))
        acknowledged = link.receive(guest_frames.dhcp_reply, SECONDS)
        link.send(guest_frames.dhcp_message(guest_frames.REQUEST, "192.168.1.7"))
        refused = link.receive(guest_frames.dhcp_reply, SECONDS)
    assert offer.options[53] == b"\x02"
    assert acknowledged.options[53] == b"\x05"
    assert refused.options[53] == b"\x06"
    for reply in (offer, acknowledged):
        assert reply.address == "10.0.2.15"
        assert reply.options[3] == socket.inet_aton(GATEWAY)
        assert reply.options[1] == socket.inet_aton("255.255.255.0")
        assert reply.options[26] == struct.pack(">H", 1500)
        assert 6 not in reply.options


def test_frames_that_are_none_do_no_harm(bare: Network) -> None:
    with guest_frames.Link(bare.process.qemu_fd) as link:
        for frame in (b"", b"x", bytes(13), bytes(60), random.Random(4).randbytes(65536)):
            link.send(frame)
        for length in range(200, 300):  # cut-off DHCP
            link.send(guest_frames.dhcp_message(guest_frames.DISCOVER)[:length])
        link.send(guest_frames.arp_request())
        assert link.receive(guest_frames.arp_reply, SECONDS) == guest_frames.GATEWAY_MAC


def test_a_card_that_does_not_speak_in_frames_is_cut_off(bare: Network) -> None:
    os.write(bare.process.qemu_fd, b"\xff" * 64)
    assert bare.process.wait(2.0)
    assert "does not send frames" in bare.log.read_text()


def test_without_the_right_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that allows no more network namespaces, as seen from a user namespace of its own."""
    bound = bind_ports([PublishedPort(ECHO)])
    no_more = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    script = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$0" "$@"'
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join([*no_more, script, sys.executable])} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    with (tmp_path / "log").open("wb") as log:
        process = start_network(bound, "refused", log.fileno())
    with pytest.raises(RefusedError, match=r"sysctl -w user\.max_net_namespaces"):
        process.wait_ready(time.monotonic() + SECONDS)
    assert process.wait(0)


@pytest.mark.qemu
def test_a_real_qemu_gets_its_address_by_dhcp_and_takes_the_network_with_it(tmp_path: Path) -> None:
    """Its network boot ROM is the guest: it has a DHCP client and says what it got."""
    bound = bind_ports([PublishedPort(ECHO)])
    with (tmp_path / "log").open("wb") as log:
        process = start_network(bound, "rom", log.fileno())
    card = f"stream,id=net0,server=off,addr.type=fd,addr.str={process.qemu_fd}"
    qemu = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-nographic", "-monitor", "none", "-m", "64", "-netdev", card),
            *("-device", f"virtio-net-pci,netdev=net0,bootindex=0,mac={PUBLIC_MAC}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=[process.qemu_fd],
    )
    process.close_qemu_fd()
    try:
        assert qemu.stdout is not None
        process.wait_ready(time.monotonic() + SECONDS)
        said, deadline = b"", time.monotonic() + 120
        while b"net0: 10.0.2.15" not in said:
            left = deadline - time.monotonic()
            assert select.select([qemu.stdout], [], [], max(0.0, left))[0], said
            block = os.read(qemu.stdout.fileno(), 4096)
            assert block, said
            said += block
        qemu.kill()
        assert process.wait(2.0)
    finally:
        qemu.kill()
        qemu.communicate()
        process.stop()


def test_the_guest_reaches_nothing_outside(guest: tuple[Network, GuestPeer], tmp_path: Path) -> None:
    _, peer = guest
    with (
        network(tmp_path, ECHO, name="neighbour", host="0.0.0.0") as neighbour,
        socket.create_server(("0.0.0.0", 0)) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        listener.setblocking(False)
        datagrams.setblocking(False)
        datagrams.bind(("0.0.0.0", 0))
        ports = (listener.getsockname()[1], neighbour.endpoints[0].host_port)
        lan = host_addresses()
        for host in [*lan, "127.0.0.1"]:  # the listener can be reached: the test could fail
            socket.create_connection((host, ports[0]), SECONDS).close()
            listener.accept()[0].close()
        outcomes = {
            (host, port): peer.reach("tcp", host, port)
            for host in [GATEWAY, "169.254.169.254", "192.0.2.77", *lan]
            for port in ports
        }
        assert set(outcomes.values()) == {"ECONNREFUSED"}, outcomes
        assert peer.reach("tcp", "10.0.2.16", ports[1], SECONDS) == "EHOSTUNREACH"  # no neighbours
        for host in (GATEWAY, *lan):
            assert peer.reach("udp", host, datagrams.getsockname()[1]) == "sent"
        assert peer.reach("tcp", GATEWAY, ports[0]) != "connected"  # the datagrams are past
        with pytest.raises(BlockingIOError):
            listener.accept()
        with pytest.raises(BlockingIOError):
            datagrams.recv(100)


def test_a_guest_that_forges_loopback_packets_reaches_nothing(bare: Network) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        with guest_frames.Link(bare.process.qemu_fd) as link:
            for source in ("10.0.2.15", "127.0.0.1", GATEWAY):
                for target in ("127.0.0.1", "127.0.0.2", "0.0.0.0"):
                    link.send(guest_frames.tcp_syn(source, target, port))
            link.send(guest_frames.arp_request())
            link.receive(guest_frames.arp_reply, SECONDS)  # answered in order: all was looked at
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("how", ["qemu ends", "SIGTERM", "SIGKILL"])
def test_its_end_ends_everything_and_frees_the_port(bare: Network, how: str) -> None:
    inside = network_of(bare.process.pid)
    with bare.connect() as client:
        if how == "qemu ends":
            bare.process.close_qemu_fd()
        else:
            os.kill(bare.process.pid, getattr(signal, how))
        assert bare.process.wait(2.0)
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert not users_of(inside)
    bind_ports([PublishedPort(ECHO, host_port=bare.endpoints[0].host_port)])[0].close()


def test_another_owner_adopts_and_stops_it(bare: Network) -> None:
    pid, start_time = bare.process.pid, bare.process.start_time
    assert NetworkProcess(pid, start_time + 1).wait(0), "another process with that pid"
    adopted = NetworkProcess(pid, start_time)
    assert not adopted.wait(0)
    adopted.stop()
    assert bare.process.wait(2.0)


def test_released_it_runs_on_and_leaves_no_zombie(bare: Network) -> None:
    pid, start_time = bare.process.pid, bare.process.start_time
    bare.process.release()  # with QEMU's end, here the only one
    adopted = NetworkProcess(pid, start_time)
    assert adopted.wait(2.0)
    for thread in threading.enumerate():
        if thread.name == f"network-{pid}":
            thread.join(2.0)
    with pytest.raises(ProcessLookupError):
        start_time_of(pid)


def test_it_is_a_process_of_the_instance_with_no_rights(bare: Network) -> None:
    pid = bare.process.pid
    assert os.getsid(pid) == pid
    name = f"bare-{os.getpid()}"
    assert name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert processes_of(name) == {pid}
    assert network_of(pid) != network_of(os.getpid())
    status = status_of(pid)
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split()
        assert int(status["CapEff"], 16) == 0


def test_twenty_starts_leave_no_descriptor_and_no_process(tmp_path: Path) -> None:
    def descriptors() -> list[str]:
        return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())

    name = f"leak-{os.getpid()}"
    before = descriptors()
    for _ in range(20):
        with network(tmp_path, ECHO, DIGEST, name=name) as served:
            assert processes_of(name) == {served.process.pid}
            inside = network_of(served.process.pid)
            assert users_of(inside) == processes_of(name)
        assert not processes_of(name)
        assert not users_of(inside)
    assert descriptors() == before


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def resident_bytes(pid: int) -> int:
    return int(status_of(pid)["VmRSS"].split()[0]) * 1024


def network_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def pids_where(test: Callable[[Path], bool]) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if test(entry):
                    found.add(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def processes_of(name: str) -> set[int]:
    mark = f"CLOUDLET_INSTANCE={name}".encode()
    return pids_where(lambda entry: mark in (entry / "environ").read_bytes().split(b"\0"))


def users_of(inside: str) -> set[int]:
    return pids_where(lambda entry: str((entry / "ns" / "net").readlink()) == inside)
