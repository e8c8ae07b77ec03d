"""A stateful application, in the guest: it counts, it holds things, and it changes as much as it is told.

Port 9094 answers each line with the number of lines that were ever answered. Port 9093 is HTTP:
``/held`` gives the CRC-32 of all that it holds and never changes, ``/busy?mib=N`` has it overwrite N MiB
per second of a buffer of 48 MiB, round and round, until it is told another number; ``/alloc?mib=N`` holds N
MiB more, ``/disk?mib=N`` writes N MiB to the disk. A page that it makes is one random kB four times: it
compresses to a quarter. While it has nothing to change it sleeps, so that many of them fit on a machine.
"""

import http.server
import itertools
import json
import os
import random
import socketserver
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

MIB, PAGE, BUSY_MIB = 1 << 20, 4096, 48
TICK = 0.01
FILES = Path("/var/tmp")

CHOOSE = random.Random()


def pages(count: int) -> bytes:
    """So many new pages."""
    return b"".join(CHOOSE.randbytes(PAGE // 4) * 4 for _ in range(count))


class State:
    """All of it."""

    def __init__(self) -> None:
        self.held = [bytearray(Path("/opt/counter/model.bin").read_bytes()) for _ in range(2)]
        self.buffer = bytearray()
        for _ in range(BUSY_MIB):
            self.buffer += pages(MIB // PAGE)
        self.busy_mib = 0.0
        self.is_busy = threading.Event()
        self.counted = itertools.count(1)
        self.files = itertools.count()

    def digest(self) -> str:
        digest = 0
        for part in self.held:
            digest = zlib.crc32(part, digest)
        return f"{digest:08x}"

    def alloc(self, mib: int) -> None:
        for _ in range(mib):
            self.held.append(bytearray(pages(MIB // PAGE)))

    def write(self, mib: int) -> None:
        with (FILES / f"counter-{next(self.files)}").open("wb") as file:
            for _ in range(mib):
                file.write(pages(MIB // PAGE))
            file.flush()
            os.fsync(file.fileno())

    def be_busy(self) -> None:
        """Overwrite the buffer at the rate that is asked for, for ever."""
        at, owed, last = 0, 0.0, time.monotonic()
        while self.is_busy.wait():
            time.sleep(TICK)
            now = time.monotonic()
            owed = min(owed + (now - last) * self.busy_mib * MIB / PAGE, self.busy_mib * MIB / PAGE)
            last = now
            for _ in range(int(owed)):
                self.buffer[at : at + PAGE] = pages(1)
                at = (at + PAGE) % len(self.buffer)
            owed -= int(owed)


STATE = State()


class Told(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        mib = int(parse_qs(asked.query).get("mib", ["0"])[0])
        answer: dict[str, object] = {}
        if asked.path == "/held":
            answer = {"digest": STATE.digest(), "mib": sum(map(len, STATE.held)) // MIB}
        elif asked.path == "/busy":
            STATE.busy_mib = float(mib)
            (STATE.is_busy.set if mib else STATE.is_busy.clear)()
        elif asked.path == "/alloc":
            STATE.alloc(mib)
        elif asked.path == "/disk":
            STATE.write(mib)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Counting(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while self.rfile.readline():
            self.wfile.write(b"%d\n" % next(STATE.counted))


class Counter(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    threading.Thread(target=STATE.be_busy, daemon=True).start()
    threading.Thread(target=Counter(("", 9094), Counting).serve_forever, daemon=True).start()
    http.server.ThreadingHTTPServer(("", 9093), Told).serve_forever()
