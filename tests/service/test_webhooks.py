"""Events that are pushed: signed, tried again, given up in the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cloudlet.service.options import Options
from cloudlet.service.webhooks import signature
from tests.service.conftest import serving

SECRET = "a secret of these tests".replace(" ", "-")


@dataclass
class Receiver:
    """Somebody who wants events."""

    url: str = ""
    failures: int = 0
    """How many of the next pushes fail."""
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, count: int) -> list[dict[str, object]]:
        """Wait for so many events that were taken; all of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.came) >= count, 30), f"{len(self.came)} came"
            return [json.loads(body) for _, body in self.came]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with receiver.changed:
                fails = receiver.failures > 0
                receiver.failures -= fails
                if not fails:
                    receiver.came.append(
                        ({name.lower(): value for name, value in self.headers.items()}, body)
                    )
                receiver.changed.notify_all()
            self.send_response(500 if fails else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/events"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def eager(options: Options, attempts: int = 12) -> Options:
    return replace(options, webhook_retry=timedelta(milliseconds=20), webhook_attempts=attempts)


def test_events_are_pushed_and_signed(options: Options) -> None:
    with receiving() as receiver, serving(eager(options)) as running:
        paula = running.call.as_("paula")
        hook = {"url": receiver.url, "secret": SECRET, "kinds": ["overlay."]}
        made = paula.post("/v1/webhooks", {"webhook": hook})["webhook"]
        assert made["secret"] == SECRET
        running.call.post("/v1/overlays", {"overlay": {"name": "somebody else's"}})
        overlay = paula.post("/v1/overlays", {"overlay": {"name": "o"}})["overlay"]
        (event,) = receiver.wait(1)
        assert (event["kind"], event["resource_id"]) == ("overlay.queued", overlay["id"])
        ((headers, body),) = receiver.came
        assert headers["webhook-id"] == f"{made['id']}.{event['number']}"
        expected = signature(SECRET, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
        assert headers["webhook-signature"] == expected
        shown = paula.get(f"/v1/webhooks/{made['id']}")["webhook"]
        assert (shown["secret"], shown["dead"]) == (None, [])
        assert running.call.as_("mia")("POST", "/v1/webhooks", {"webhook": hook}).status_code == 403
        everything = {"webhook": {"url": receiver.url, "everything": True}}
        assert paula("POST", "/v1/webhooks", everything).status_code == 403
        paula.delete(f"/v1/webhooks/{made['id']}")
        paula.post("/v1/overlays", {"overlay": {"name": "o"}})
    assert len(receiver.came) == 1


def test_what_does_not_arrive_is_tried_again(options: Options) -> None:
    with receiving() as receiver:
        receiver.failures = 3
        with serving(eager(options)) as running:
            running.call.post("/v1/webhooks", {"webhook": {"url": receiver.url, "everything": True}})
            for number in range(5):
                running.call.as_("mia").post("/v1/overlays", {"overlay": {"name": str(number)}})
            names = [event["detail"]["name"] for event in receiver.wait(5)]  # type: ignore[index]
            assert sorted(names) == list("01234")


def test_what_never_arrives_is_given_up_and_listed(options: Options) -> None:
    with serving(eager(options, attempts=3)) as running:
        call = running.call
        made = call.post("/v1/webhooks", {"webhook": {"url": "http://127.0.0.1:9/"}})["webhook"]
        call.post("/v1/overlays", {"overlay": {"name": "o"}})
        deadline = time.monotonic() + 30
        while not (dead := call.get(f"/v1/webhooks/{made['id']}")["webhook"]["dead"]):
            assert time.monotonic() < deadline, "it is not given up"
            time.sleep(0.05)
        assert [one["attempts"] for one in dead] == [3]
        assert "Connection" in dead[0]["error"]


def test_a_push_survives_the_server(options: Options) -> None:
    with receiving() as receiver:
        receiver.failures = 1_000_000
        with serving(eager(options, attempts=1000)) as running:
            running.call.post("/v1/webhooks", {"webhook": {"url": receiver.url}})
            running.call.post("/v1/overlays", {"overlay": {"name": "o"}})
            with receiver.changed:
                assert receiver.changed.wait_for(lambda: receiver.failures < 1_000_000, 30)
        receiver.failures = 0
        with serving(eager(options)):
            assert [event["kind"] for event in receiver.wait(1)] == ["overlay.queued"]
