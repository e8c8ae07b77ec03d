"""A link of a given rate and round-trip time, emulated, with a web server for one file at its other end.

``tc netem`` needs a kernel module that is not everywhere; this needs none, and no rights. What is emulated:

- *The rate*, downstream, counts what HTTP sends; headers of TCP and IP are free. All connections share
  one wire and take turns, a piece each, as behind a fair queue. A request is too small to take time.
- *The delay*: a request is served half a round trip after it came, a byte is delivered half a round trip
  after it left the wire, and the wire goes on meanwhile. A new connection costs a round trip before
  its first request; that a client has closed is known half a round trip later, and what is not on the
  wire by then is never sent.
- *Slow start*, for each connection: 10 packets, then one more for each that is acknowledged, up to twice
  what the link holds; after an idle time of 200 ms and a round trip from the beginning, as Linux does.
  Nothing is lost.

Times are those of the model: an event that runs late counts as if it had run in time, so that a busy
machine delays single pieces but does not change the rate.

``python -m benchmarks.link FILE --mbit 10 --rtt 20`` prints the URL and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

_PACKET = 1448
_INITIAL_WINDOW = 10 * _PACKET
_PIECE_SECONDS, _LARGEST_PIECE = 0.002, 11 * _PACKET
"""How long a piece keeps others from the wire, and the 16 KiB above which that saves no work."""
_SPARE_WINDOW = 128 << 10
_RESTART_SECONDS = 0.2
_LONGEST_REQUEST = 64 << 10


@contextmanager
def link(path: Path, mbit: float, rtt_ms: float) -> Iterator[str]:
    """The URL of a file at the other end of a link of so many Mbit/s and ms, in a process of its own."""
    command = [sys.executable, "-I", "-S", __file__, str(path), "--mbit", str(mbit), "--rtt", str(rtt_ms)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().strip()
            if not url:
                raise OSError(f"the link to {path} does not come up")
            yield url
        finally:
            server.kill()


class _Schedule:
    """What happens when, in the order of the model's time; each call is told its own moment."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._order = count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def now(self) -> float:
        return self._loop.time()

    def at(self, when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), call))
        if not self._timer or when < self._timer.when():
            self._arm()

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._events[0][0], self._run) if self._events else None

    def _run(self) -> None:
        now = self.now()
        while self._events and self._events[0][0] <= now:
            when, _, call = heapq.heappop(self._events)
            call(when)
        self._arm()


class _Wire:
    """What all connections send through, one piece after the other."""

    def __init__(self, schedule: _Schedule, rate: float, rtt: float) -> None:
        """A wire of ``rate`` bytes per second and a round trip of ``rtt`` seconds."""
        self.schedule = schedule
        self.rtt, self.half = rtt, rtt / 2
        self.window_limit = int(2 * rate * rtt) + _SPARE_WINDOW
        self._rate = rate
        self._piece = max(1, min(_LARGEST_PIECE, int(rate * _PIECE_SECONDS)) // _PACKET) * _PACKET
        self._turns: deque[_Connection] = deque()
        self._busy = False

    def offer(self, connection: _Connection, when: float) -> None:
        """The connection may have something to send."""
        if connection not in self._turns:
            self._turns.append(connection)
        if not self._busy:
            self._send(when)

    def _send(self, when: float) -> None:
        self._busy = False
        while self._turns:
            connection = self._turns.popleft()
            if piece := connection.take(self._piece):
                sent = when + len(piece) / self._rate
                self._busy = True
                self._turns.append(connection)
                self.schedule.at(sent + self.half, partial(connection.deliver, piece))
                self.schedule.at(sent, self._send)
                return


class _Connection(asyncio.Protocol):
    """A client's connection: its requests, what is still to be sent to it, and its congestion window."""

    def __init__(self, wire: _Wire, file: _File) -> None:
        self._wire, self._file = wire, file
        self._received = b""
        self._output: deque[bytes | range] = deque()
        """Bytes, or a range of the file's."""
        self._window = _INITIAL_WINDOW
        self._in_flight = self._on_wire = self._waiting = 0
        """Bytes not acknowledged; of these, bytes not delivered, and bytes the client has no room for."""
        self._active = 0.0
        self._stuck = self._lost = self._closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # Whether the client's end takes all that is delivered is known only without a buffer between.
        transport.set_write_buffer_limits(high=0)
        self._established = self._wire.schedule.now() + self._wire.rtt

    def data_received(self, data: bytes) -> None:
        self._received += data
        while not self._lost and b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._serve(_Request.parse(head))
        if len(self._received) > _LONGEST_REQUEST:
            self._transport.abort()

    def _serve(self, request: _Request) -> None:
        schedule = self._wire.schedule
        arrives = max(schedule.now(), self._established) + self._wire.half
        schedule.at(arrives, partial(self._respond, request))

    def _respond(self, request: _Request, when: float) -> None:
        if not self._in_flight and when - self._active > _RESTART_SECONDS + self._wire.rtt:
            self._window = _INITIAL_WINDOW
        if not self._closes:
            self._output.extend(self._file.answer(request))
            self._closes = request.closes
            self._wire.offer(self, when)

    def take(self, most: int) -> bytes:
        """The next bytes for the wire, at most so many; none where there are none or the window is full."""
        if not self._output:
            return b""
        part = self._output[0]
        size = min(most, len(part))
        room = self._window - self._in_flight
        if room < min(size, _PACKET):
            return b""
        size = min(size, room)
        piece = part[:size] if isinstance(part, bytes) else self._file.read(part[:size])
        self._output[0] = part[size:]
        if not self._output[0]:
            self._output.popleft()
        self._in_flight += size
        self._on_wire += size
        return piece

    def deliver(self, piece: bytes, when: float) -> None:
        """Bytes come out at the client's end."""
        self._on_wire -= len(piece)
        if self._lost:
            return
        self._transport.write(piece)
        if self._stuck:
            self._waiting += len(piece)
        else:
            self._acknowledge(len(piece), when)
        if self._closes and not self._output and not self._on_wire:
            self._transport.close()

    def _acknowledge(self, size: int, when: float) -> None:
        def acknowledged(when: float) -> None:
            self._in_flight -= size
            self._window = min(self._window + size, self._wire.window_limit)
            self._active = when
            self._wire.offer(self, when)

        self._wire.schedule.at(when + self._wire.half, acknowledged)

    def pause_writing(self) -> None:
        self._stuck = True

    def resume_writing(self) -> None:
        self._stuck = False
        waited, self._waiting = self._waiting, 0
        self._acknowledge(waited, self._wire.schedule.now())

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._wire.schedule.at(self._wire.schedule.now() + self._wire.half, self._leave)

    def _leave(self, when: float) -> None:
        """The server learns that the client has closed."""
        self._output.clear()


@dataclass(frozen=True, slots=True)
class _Request:
    """What of a request matters to a server of one file."""

    method: str
    path: str
    headers: dict[str, str]
    closes: bool

    @classmethod
    def parse(cls, head: bytes) -> _Request:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3:
            return cls("", "", {}, closes=True)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        closes = words[2] != "HTTP/1.1" or headers.get("connection", "").lower() == "close"
        return cls(words[0], words[1], headers, closes)


class _File:
    """The file, and what the server answers about it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self._descriptor)
        self._size, self._tag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        self.path = f"/{path.name}"

    def read(self, part: range) -> bytes:
        return os.pread(self._descriptor, len(part), part.start)

    def answer(self, request: _Request) -> Iterator[bytes | range]:
        """The answer's head and, where it has one, its body."""
        fields, body = ["Accept-Ranges: bytes", f"ETag: {self._tag}"], range(self._size)
        if not request.method:
            status, body = "400 Bad Request", range(0)
        elif request.path != self.path:
            status, body = "404 Not Found", range(0)
        elif request.method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", range(0)
            fields.append("Allow: GET, HEAD")
        elif (wanted := self._wanted(request)) is None:
            status = "200 OK"
        elif wanted:
            status, body = "206 Partial Content", wanted
            fields.append(f"Content-Range: bytes {body[0]}-{body[-1]}/{self._size}")
        else:
            status, body = "416 Range Not Satisfiable", range(0)
            fields.append(f"Content-Range: bytes */{self._size}")
        if request.closes:
            fields.append("Connection: close")
        lines = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]
        yield "\r\n".join(lines).encode()
        if body and request.method == "GET":
            yield body

    def _wanted(self, request: _Request) -> range | None:
        """The range that is asked for, empty if it is not in the file; None where the whole is asked for."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if not found or found[0] == "bytes=-" or request.headers.get("if-range", self._tag) != self._tag:
            return None
        first, last = found[1], found[2]
        if not first:
            return range(self._size)[-int(last) :] if int(last) else range(0)
        if last and int(last) < int(first):
            return None
        return range(self._size)[int(first) : int(last) + 1 if last else None]


async def _serve(path: Path, mbit: float, rtt_ms: float) -> None:
    loop = asyncio.get_running_loop()
    file, wire = _File(path), _Wire(_Schedule(loop), mbit * 1e6 / 8, rtt_ms / 1e3)
    # Asyncio sets TCP_NODELAY by itself.
    server = await loop.create_server(lambda: _Connection(wire, file), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{file.path}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.link", description="Serve a file over a link."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--mbit", type=float, required=True, help="rate of the link, in Mbit/s")
    parser.add_argument("--rtt", type=float, required=True, help="round-trip time, in ms")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.file, options.mbit, options.rtt))


if __name__ == "__main__":
    main()
