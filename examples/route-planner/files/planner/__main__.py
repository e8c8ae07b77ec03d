"""Starts the service: listens, warms up by its own front door, then says that it is ready.

The warm-up posts the bundled instance and fetches the page over the socket, so that solver, parser,
HTTP and drawing have all run once and their pages are in memory before anyone captures the machine.
Ready is said three ways: /healthz answers 200, systemd is told (Type=notify), and a line
"ready on http://HOST:PORT" goes to standard output. SIGTERM or SIGINT ends it.
"""

import argparse
import http.client
import os
import pathlib
import signal
import socket
import threading

ENDS = {signal.SIGTERM, signal.SIGINT}
# Before the solver is imported: its libraries start threads, and a thread that does not block these
# signals would be given them, and end the process at once.
signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)

from .server import Server  # noqa: E402
from .service import Handler  # noqa: E402

WARM_UP_SECONDS = 240  # an emulated processor included


def main() -> None:
    """Serve until a signal comes."""
    arguments = argparse.ArgumentParser(prog="planner", description="Plan routes over HTTP.")
    arguments.add_argument("--host", default="127.0.0.1")
    arguments.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    arguments.add_argument("--warm-up", type=pathlib.Path, required=True, help="a CVRPLIB instance")
    options = arguments.parse_args()
    with Server((options.host, options.port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        warm_up(server, options.warm_up.read_bytes())
        server.planner.ready.set()
        tell_systemd("READY=1")
        print(f"ready on http://{options.host}:{server.server_port}", flush=True)
        signal.sigwait(ENDS)
        server.shutdown()


def warm_up(server: Server, instance: bytes) -> None:
    """Go once through every code path that a user's first request takes."""
    for method, path, body in (("POST", "/plan?iterations=1", instance), ("GET", "/", None)):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, WARM_UP_SECONDS)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise SystemExit(f"warm-up: {path} answered {answer.status}: {answer.read()!r}")
            answer.read()
        finally:
            connection.close()


def tell_systemd(message: str) -> None:
    """sd_notify(3), if systemd asked for it."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(message.encode())


if __name__ == "__main__":
    main()
