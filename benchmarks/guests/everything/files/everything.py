"""An application that reads all of its memory for each answer, in the guest.

``/answer?at=N`` gives the checksum (CRC-32) of all of its bytes, begun with N.
"""

import http.server
import json
import zlib
from pathlib import Path

MEMORY = Path("/opt/everything/memory.bin").read_bytes()


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        at = int(self.path.partition("?at=")[2] or 0)
        answer = {"at": at, "bytes": len(MEMORY), "sum": zlib.crc32(MEMORY, at)}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("", 9092), Answers).serve_forever()
