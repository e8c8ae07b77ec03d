"""Events that are pushed: signed, tried again, given up in the end."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cloudlet.service.options import Options
from cloudlet.service.push import signature
from cloudlet.transfer.networks import Networks
from tests.service.certificates import certificate
from tests.service.conftest import Caller, Running, serving

SECRET = "a secret of these tests".replace(" ", "-")


@dataclass
class Receiver:
    """Somebody who wants events."""

    url: str = ""
    failures: int = 0
    """How many of the next pushes fail."""
    seconds: float = 0.0
    """How long an answer takes."""
    at_once: int = 0
    """How many pushes were being answered at the same time, at most."""
    redirect: str = ""
    """Where to send who pushes."""
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, count: int) -> list[dict[str, object]]:
        """Wait for so many events that were taken; all of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.came) >= count, 30), f"{len(self.came)} came"
            return [json.loads(body) for _, body in self.came]


@contextmanager
def receiving(host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()
    now: list[None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            now.append(None)
            receiver.at_once = max(receiver.at_once, len(now))
            time.sleep(receiver.seconds)
            now.pop()
            with receiver.changed:
                fails = receiver.failures > 0
                receiver.failures -= fails
                if not fails:
                    receiver.came.append(
                        ({name.lower(): value for name, value in self.headers.items()}, body)
                    )
                receiver.changed.notify_all()
            self.send_response(500 if fails else 302 if receiver.redirect else 204)
            if receiver.redirect:
                self.send_header("Location", receiver.redirect)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.url = f"{'https' if context else 'http'}://{host}:{server.server_address[1]}/events"
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


def overlays(call: Caller, count: int) -> None:
    """Make so many events."""
    for number in range(count):
        call.post("/v1/overlays", {"overlay": {"name": str(number)}})


@contextmanager
def hanging(*said: bytes) -> Iterator[str]:
    """Somebody who accepts and never answers, or says something again and again; the URL."""
    ended = threading.Event()

    def speak(connection: socket.socket) -> None:
        with connection:
            while not ended.wait(0.1):
                for piece in said:
                    connection.sendall(piece)

    def serve() -> None:
        while not ended.is_set():
            connection, _ = listener.accept()
            threading.Thread(target=speak, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            ended.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def test_who_is_slow_keeps_nobody_waiting(running: Running) -> None:
    call = running.call
    with hanging() as silent, hanging(b"H") as dripping, receiving() as slow, receiving() as quick:
        slow.seconds = 0.5
        for url in (silent, dripping, dripping, silent, slow.url, quick.url):
            call.post("/v1/webhooks", {"webhook": {"url": url}})
        began = time.monotonic()
        overlays(call, 10)
        numbers = [event["number"] for event in quick.wait(10)]
        assert time.monotonic() - began < 5
        assert len(slow.came) < 10
        assert numbers == sorted(numbers)
        numbers = [event["number"] for event in slow.wait(10)]
        assert numbers == sorted(numbers), "they overtook each other"
        assert slow.at_once == 1
        ended = time.monotonic()
    # Its end does not wait for them either.
    running.site.webhooks.close()
    assert time.monotonic() - ended < 5


def test_who_does_not_answer_is_given_up_for_all_that_waits(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudlet.service.push._ANSWER_SECONDS", 0.3)
    with hanging() as url, serving(eager(options, attempts=2)) as running:
        made = running.call.post("/v1/webhooks", {"webhook": {"url": url}})["webhook"]
        began = time.monotonic()
        overlays(running.call, 20)
        while len(dead := running.call.get(f"/v1/webhooks/{made['id']}")["webhook"]["dead"]) < 20:
            assert time.monotonic() - began < 30, dead
            time.sleep(0.05)
        assert time.monotonic() - began < 20 * 2 * 0.3, "each of them was waited for"
        assert {one["error"] for one in dead} == {"TimeoutError"}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]:8790/",
        "https://192.168.0.1/",
    ],
)
def test_a_webhook_leads_to_public_addresses_only(url: str, running: Running) -> None:
    call = running.call
    running.site.options = replace(running.site.options, webhook_networks=Networks(()))
    refused = call("POST", "/v1/webhooks", {"webhook": {"url": url}})
    assert refused.status_code == 422
    (error,) = refused.json()["errors"]
    assert error["code"] == "cloudlet.webhook.impossible"
    assert error["detail"].startswith("webhook.url: ")
    assert "which is not a public address" in error["detail"]
    assert call.get("/v1/webhooks")["webhooks"] == []
    call.post("/v1/webhooks", {"webhook": {"url": "http://8.8.8.8/", "kinds": ["none"]}})


def test_where_it_leads_is_looked_at_at_each_push(options: Options) -> None:
    with receiving() as receiver, receiving("127.0.0.2") as elsewhere:
        receiver.redirect = elsewhere.url
        with serving(eager(options, attempts=2)) as running:
            call = running.call
            made = call.post("/v1/webhooks", {"webhook": {"url": receiver.url}})["webhook"]
            overlays(call, 1)
            receiver.wait(2)
        # The network it leads to is allowed no more; as when its name leads there only now.
        here = replace(eager(options, attempts=2), webhook_networks=Networks(["127.0.0.2"]))
        with serving(here) as running:
            call = running.call
            overlays(call, 1)
            deadline = time.monotonic() + 30
            while len(dead := call.get(f"/v1/webhooks/{made['id']}")["webhook"]["dead"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            refused = "127.0.0.1 leads to 127.0.0.1, which is not a public address"
            assert [one["error"] for one in dead] == [refused, "status 302"]
        assert len(receiver.came) == 2
        assert elsewhere.came == [], "a redirect was followed"


def test_a_push_over_tls_with_a_password(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown, key = certificate(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown, key)
    with receiving(context=context) as receiver:
        url = receiver.url.replace("https://", "https://me:pass%20word@") + "/a?x=1&y=%20"
        with serving(eager(options, attempts=1)) as running:
            call = running.call
            made = call.post("/v1/webhooks", {"webhook": {"url": url}})["webhook"]
            overlays(call, 1)
            deadline = time.monotonic() + 30
            while not (dead := call.get(f"/v1/webhooks/{made['id']}")["webhook"]["dead"]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert dead[0]["error"] == "SSLCertVerificationError"
            monkeypatch.setenv("SSL_CERT_FILE", str(shown))
            overlays(call, 1)
            receiver.wait(1)
    ((headers, _),) = receiver.came
    assert headers["authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert headers["host"] == receiver.url.split("/")[2]
