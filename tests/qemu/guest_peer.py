"""A guest without a virtual machine: a real Linux network stack at QEMU's end of the network.

Started as a process with the descriptor that QEMU would have got, it makes a network namespace with
a tap device that has the guest's address, and carries frames between the tap and the descriptor in
QEMU's framing. Inside it serves port 80 (echo, then ``bye`` at the end), 81 (the SHA-256 of what it
got, once that has ended) and 82 (once what it got has ended, as many zeros as that said). On
standard input it takes commands, one JSON value a line, and answers each with one:
``["tcp"|"udp", host, port, seconds]`` tries to reach that address and answers how it ended.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudlet.forwarder.kernel import CLONE_NEWNET, CLONE_NEWUSER, unshare

MAC = bytes.fromhex("525400c10d01")
ADDRESS, GATEWAY = "10.0.2.15", "10.0.2.2"
ECHO, DIGEST, ZEROS = 80, 81, 82


class GuestPeer:
    """The test's side of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def reach(self, kind: str, host: str, port: int, seconds: float = 3.0) -> str:
        """Try to reach an address from the guest: ``connected``, ``sent`` or the error's name."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, host, port, seconds]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, str)
        return answer


@contextmanager
def guest_peer(descriptor: int) -> Iterator[GuestPeer]:
    """Run a guest on the descriptor until the block is left."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(descriptor)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[descriptor],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == '"up"\n', (
            "the guest's stand-in did not start: it needs root, or user namespaces and /dev/net/tun"
        )
        yield GuestPeer(process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _enter_network() -> int:
    """Make the namespace with its tap; return the tap's descriptor."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        unshare(CLONE_NEWNET)
    else:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    tap = os.open("/dev/net/tun", os.O_RDWR)
    name = b"public0"
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name, 0x0002 | 0x1000))  # TUNSETIFF
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def address(text: str) -> bytes:
            return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))

        def configure(request: int, value: bytes, interface: bytes = name) -> None:
            fcntl.ioctl(control, request, struct.pack("16s24s", interface, value))

        configure(0x8924, struct.pack("H6s", 1, MAC))  # SIOCSIFHWADDR
        configure(0x8916, address(ADDRESS))  # SIOCSIFADDR
        configure(0x891C, address("255.255.255.0"))  # SIOCSIFNETMASK
        for interface in (b"lo", name):
            configure(0x8914, struct.pack("H", 0x1 | 0x40), interface)  # SIOCSIFFLAGS: up
        nowhere = address("0.0.0.0")
        route = struct.pack(
            "@L16s16s16sHhLPhPLLH",
            *(0, nowhere, address(GATEWAY), nowhere, 0x3, 0, 0, 0, 0, 0, 0, 0, 0),
        )
        fcntl.ioctl(control, 0x890B, route)  # SIOCADDRT: default via the gateway
    return tap


def _carry_out(tap: int, stream: socket.socket) -> None:
    while True:
        frame = os.read(tap, 65536)
        stream.sendall(struct.pack(">I", len(frame)) + frame)


def _carry_in(tap: int, stream: socket.socket) -> None:
    with stream.makefile("rb") as frames:
        while header := frames.read(4):
            os.write(tap, frames.read(*struct.unpack(">I", header)))


def _echo(client: socket.socket) -> None:
    while block := client.recv(65536):
        client.sendall(block)
    client.sendall(b"bye")


def _digest(client: socket.socket) -> None:
    digest = hashlib.sha256()
    while block := client.recv(65536):
        digest.update(block)
    client.sendall(digest.hexdigest().encode())


def _zeros(client: socket.socket) -> None:
    asked = b""
    while block := client.recv(100):
        asked += block
    client.sendall(bytes(int(asked)))


def _serve(port: int) -> None:
    services = {ECHO: _echo, DIGEST: _digest, ZEROS: _zeros}

    def one(client: socket.socket) -> None:
        with client:
            services[port](client)

    def accept(listener: socket.socket) -> None:
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server((ADDRESS, port), backlog=128)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()


def _reach(kind: str, host: str, port: int, seconds: float) -> str:
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    with socket.socket(socket.AF_INET, kinds[kind]) as attempt:
        attempt.settimeout(seconds)
        try:
            attempt.connect((host, port))
            if kind == "tcp":
                return "connected"
            attempt.send(b"anybody?")
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "sent"


def main() -> None:
    """Serve until killed."""
    stream = socket.socket(fileno=int(sys.argv[1]))
    stream.setblocking(True)
    tap = _enter_network()
    for port in (ECHO, DIGEST, ZEROS):
        _serve(port)
    for carry in (_carry_in, _carry_out):
        threading.Thread(target=carry, args=(tap, stream), daemon=True).start()
    print('"up"', flush=True)
    for line in sys.stdin:
        print(json.dumps(_reach(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
