"""A large heap, in the guest: all of it in the process's own memory, little of it in an answer.

``/answer?at=N`` gives the digest of 64 KiB of the index, which is the 256 KiB around the heap's middle: half
of it random bytes, half text. ``/digest`` reads the heap whole. The heap's file is removed once it is loaded:
an overlay would hold its bytes twice, on the disk and in memory.
"""

import hashlib
import http.server
import json
import mmap
from pathlib import Path

INDEX, PIECE, STEP = 256 << 10, 64 << 10, 40_961


def load(path: Path) -> mmap.mmap:
    """The file's bytes, in private memory and nowhere else."""
    heap = mmap.mmap(-1, path.stat().st_size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with path.open("rb") as file, memoryview(heap) as memory:
        filled = 0
        while count := file.readinto(memory[filled : filled + (1 << 20)]):
            filled += count
    path.unlink()
    return heap


HEAP = load(Path("/opt/heap/heap.bin"))


def answer(path: str, query: str) -> dict[str, object]:
    with memoryview(HEAP) as memory:
        if path == "/digest":
            return {"bytes": len(HEAP), "digest": hashlib.sha256(memory).hexdigest()}
        at = int(query or 0)
        place = (len(HEAP) - INDEX) // 2 + at * STEP % (INDEX - PIECE)
        return {"at": at, "place": place, "piece": hashlib.sha256(memory[place : place + PIECE]).hexdigest()}


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, query = self.path.partition("?at=")
        body = json.dumps(answer(path, query)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("", 9091), Answers).serve_forever()
