"""The reference application, in the guest: a model held twice in memory, and answers from it.

``/answer?at=N`` gives the digest of the model, taken when it was loaded, and digests of 64 KiB of both
copies at byte N; ``/digest`` reads both copies whole.
"""

import gc
import hashlib
import http.server
import json
from pathlib import Path

PIECE = 64 << 10

MODEL = Path("/opt/reference/model.bin").read_bytes()
COPY = bytearray(MODEL)
DIGEST = hashlib.sha256(MODEL).hexdigest()
WORDS: dict[bytes, list[int]] = {}
for number, word in enumerate(MODEL[len(MODEL) // 2 :][: 1 << 20].split()):
    WORDS.setdefault(word, []).append(number)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, query = self.path.partition("?at=")
        if path == "/digest":
            answer: dict[str, object] = {"digests": [digest(MODEL), digest(COPY)]}
        else:
            at = int(query or 0)
            pieces = [digest(MODEL[at : at + PIECE]), digest(COPY[at : at + PIECE])]
            answer = {"digest": DIGEST, "words": len(WORDS), "at": at, "pieces": pieces}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    # What was loaded stays: no collection has to look at all of it again (and so touch its pages).
    gc.collect()
    gc.freeze()
    http.server.ThreadingHTTPServer(("", 9090), Answers).serve_forever()
