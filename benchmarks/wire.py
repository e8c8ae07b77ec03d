"""A wire between two sites: a relay that shapes each direction to a rate, and can be cut and mended.

Ports of the near end lead to places at the far end (*there*), others the other way (*back*). What goes from
the near to the far end shares one rate, whichever connection it is of, and so does what goes the other way.
TLS passes through as it is. What is emulated:

- *The rate* counts what TCP carries; its own headers are free. Connections take turns, a piece each.
- *The delay* is added to each direction. TCP's slow start is not emulated, nothing is lost.
- *A cut*: all connections are reset, and new ones too, until the wire is mended.

A piece that is sent late counts as sent in time if it is not later than the burst, so that a busy machine
does not change the rate. Buffers are small, so that who sends feels at once what the wire carries.

``python -m benchmarks.wire --there HOST:PORT --back HOST:PORT --mbit 100`` prints its ports as JSON, and
takes commands from standard input until that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PACKET, _LARGEST_PIECE = 1448, 16 << 10
_PIECE_SECONDS, _BURST_SECONDS = 0.002, 0.005
_BUFFER = 64 << 10
_RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER``: closing a socket resets its connection."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Wire:
    """A wire in a process of its own. A rate of 0 does not shape."""

    there: tuple[int, ...]
    """Ports on 127.0.0.1 that lead to the far end's places, in their order."""
    back: tuple[int, ...]
    """The same for the near end's places."""
    _process: subprocess.Popen[str]

    def rate(self, mbit: float) -> None:
        """Carry so many Mbit/s each way from now on; 0: as many as it can."""
        self._ask(f"rate {mbit}")

    def cut(self) -> None:
        """End all connections, and let none come to be."""
        self._ask("cut")

    def mend(self) -> None:
        """Carry again."""
        self._ask("mend")

    def carried(self) -> int:
        """Bytes that went over it since it is there, both ways together."""
        return self._ask("carried")

    def _ask(self, command: str) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def wire(there: Sequence[Address], back: Sequence[Address] = (), mbit: float = 0.0) -> Iterator[Wire]:
    """A wire to these places at its ends, until the context is left."""
    command = [sys.executable, "-I", "-S", __file__, "--mbit", str(mbit)]
    for way, places in (("--there", there), ("--back", back)):
        for host, port in places:
            command += [way, f"{host}:{port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            if not (line := process.stdout.readline()):
                raise OSError("the wire does not come up")
            ports = json.loads(line)
            yield Wire(tuple(ports["there"]), tuple(ports["back"]), process)
        finally:
            process.kill()


class _Lane:
    """One direction: when what is put on it has left it."""

    def __init__(self) -> None:
        self.rate = 0.0
        """Bytes per second; 0: no limit."""
        self.carried = 0
        self._free_at = 0.0

    @property
    def piece(self) -> int:
        """Bytes that take their turn together."""
        if not self.rate:
            return _BUFFER
        return max(_PACKET, min(_LARGEST_PIECE, int(self.rate * _PIECE_SECONDS)))

    def take(self, size: int, now: float) -> float:
        """Put so many bytes on it; the moment at which the last of them has left."""
        self.carried += size
        if not self.rate:
            return now
        self._free_at = max(self._free_at, now - _BURST_SECONDS) + size / self.rate
        return self._free_at


@dataclass
class _Relay:
    """Both directions, and whoever is connected."""

    delay: float
    there: _Lane = field(default_factory=_Lane)
    back: _Lane = field(default_factory=_Lane)
    whole: bool = True
    _sockets: set[socket.socket] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def rate(self, mbit: float) -> None:
        self.there.rate = self.back.rate = mbit * 125_000

    def cut(self) -> None:
        self.whole = False
        for task in self._tasks:
            task.cancel()

    async def accept(self, listener: socket.socket, place: Address, *, backwards: bool) -> None:
        """Take connections to a place at one of the ends, for ever."""
        loop = asyncio.get_running_loop()
        up, down = (self.back, self.there) if backwards else (self.there, self.back)
        while True:
            client, _ = await loop.sock_accept(listener)
            task = loop.create_task(self._connection(client, place, up, down))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connection(self, client: socket.socket, place: Address, up: _Lane, down: _Lane) -> None:
        with client, _socket() as server:
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            if not self.whole:
                return
            with suppress(OSError):
                await asyncio.get_running_loop().sock_connect(server, place)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(client, server, up))
                    group.create_task(self._carry(server, client, down))

    async def _carry(self, source: socket.socket, target: socket.socket, lane: _Lane) -> None:
        """Carry what one side of a connection says, until it has said all, or either is gone."""
        loop = asyncio.get_running_loop()
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = loop.create_task(self._deliver(target, on_its_way))
        try:
            with suppress(OSError):
                while piece := await loop.sock_recv(source, lane.piece):
                    left = lane.take(len(piece), loop.time())
                    await _until(left)
                    on_its_way.put_nowait((left + self.delay, piece))
                    if not self.delay:
                        await on_its_way.join()
            on_its_way.put_nowait((loop.time() + self.delay, b""))
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(self, target: socket.socket, on_its_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await on_its_way.get()
            await _until(due)
            with suppress(OSError):
                if piece:
                    await loop.sock_sendall(target, piece)
                else:
                    target.shutdown(socket.SHUT_WR)
            on_its_way.task_done()
            if not piece:
                return


async def _until(moment: float) -> None:
    wait = moment - asyncio.get_running_loop().time()
    if wait > 0:
        await asyncio.sleep(wait)


def _socket() -> socket.socket:
    made = socket.socket()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        made.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    return made


def _listener() -> socket.socket:
    """A listening socket, whose connections have its options."""
    made = _socket()
    made.bind(("127.0.0.1", 0))
    made.listen(64)
    return made


async def _serve(there: Sequence[Address], back: Sequence[Address], mbit: float, delay: float) -> None:
    loop = asyncio.get_running_loop()
    relay = _Relay(delay)
    relay.rate(mbit)
    ports: dict[str, list[int]] = {"there": [], "back": []}
    accepting = []
    for name, places in (("there", there), ("back", back)):
        for place in places:
            listener = _listener()
            ports[name].append(listener.getsockname()[1])
            accepting.append(loop.create_task(relay.accept(listener, place, backwards=name == "back")))
    print(json.dumps(ports), flush=True)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        word, *rest = line.decode().split()
        if word == "rate":
            relay.rate(float(rest[0]))
        elif word == "cut":
            relay.cut()
        elif word == "mend":
            relay.whole = True
        print(relay.there.carried + relay.back.carried, flush=True)


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire", description="A wire between two sites."
    )
    for way in ("there", "back"):
        parser.add_argument(f"--{way}", type=_address, action="append", default=[], metavar="HOST:PORT")
    parser.add_argument("--mbit", type=float, default=0.0, help="rate of each direction; 0: no limit")
    parser.add_argument("--delay", type=float, default=0.0, help="of each direction, in ms")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.there, options.back, options.mbit, options.delay / 1e3))


if __name__ == "__main__":
    main()
