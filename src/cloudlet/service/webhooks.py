"""Webhooks: events are pushed to who asked for them, signed, until they arrive or are given up.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com): HMAC-SHA256 with the secret of
the webhook over ``id.timestamp.body``; the headers are ``webhook-id``, ``webhook-timestamp`` and
``webhook-signature``. An event may come twice, and not always in its turn: its number tells.
"""

from __future__ import annotations

import base64
import hmac
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import requests
from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import NotFoundError
from cloudlet.store import deliveries, journal
from cloudlet.store.deliveries import Delivery
from cloudlet.store.journal import Event
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import WEBHOOKS, Webhook, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
LONGEST_RETRY = timedelta(hours=1)
_ANSWER_SECONDS = 10.0
_AT_ONCE, _BATCH = 4, 200
_LONGEST_SLEEP = 3600.0


class Webhooks:
    """The webhooks of a site, and the thread that pushes."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._any = False
        """Whether there may be one."""
        self._poked = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def begin(self) -> None:
        self._any = bool(self._site.database.read(WEBHOOKS.count))
        self._site.database.when_committed(self._poked.set)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._poked.set()
        self._thread.join()

    def create(self, webhook: Webhook, remember: Remember = forget) -> Webhook:
        """Have events pushed from now on."""

        def insert(connection: Connection) -> Webhook:
            WEBHOOKS.insert(connection, webhook)
            remember(connection, webhook.id)
            return webhook

        self._any = True
        return self._site.database.write(insert)

    def delete(self, webhook: Webhook) -> None:
        """Push nothing more to it."""
        self._site.database.write(lambda connection: WEBHOOKS.delete(connection, webhook.id))

    def dead(self, webhook: Webhook, limit: int) -> list[Delivery]:
        """The events that were given up, the latest first."""
        return self._site.database.read(lambda connection: deliveries.dead(connection, webhook.id, limit))

    def _run(self) -> None:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="push") as threads:
            while not self._closed:
                self._poked.clear()
                try:
                    self._look()
                    wait = self._push(threads)
                except Exception:
                    LOG.exception("webhooks could not be served")
                    wait = 1.0
                self._poked.wait(wait)

    def _look(self) -> None:
        """Make deliveries of the events that came."""
        for webhook in self._site.database.read(WEBHOOKS.list) if self._any else ():
            while self._look_for(webhook.id):
                pass

    def _look_for(self, webhook_id: str) -> bool:
        """Look through some of the journal for a webhook; whether there is more."""
        known, last = self._site.database.read(
            lambda connection: (_found(connection, webhook_id), journal.last_number(connection))
        )
        if known is None or known.after >= last:
            return False  # who wrote would be woken by that, again and again

        def look(connection: Connection) -> bool:
            webhook = WEBHOOKS.get(connection, webhook_id, lock=True)
            events = journal.read(connection, webhook.after, _BATCH)
            for event in events:
                if _wants(webhook, event):
                    deliveries.insert(connection, Delivery(webhook.id, event.number, _body(event), 0, now()))
            if events:
                WEBHOOKS.update(connection, webhook.id, after=events[-1].number)
            return len(events) == _BATCH

        with suppress(NotFoundError):  # it was deleted just now
            return self._site.database.write(look)
        return False

    def _push(self, threads: ThreadPoolExecutor) -> float:
        """Push what is due; the seconds until something is again."""
        if not self._any:
            return _LONGEST_SLEEP
        due = self._site.database.read(lambda connection: deliveries.due(connection, now(), _BATCH))
        for _ in threads.map(self._deliver, due):
            pass
        if due:
            return 0.0
        moment = self._site.database.read(deliveries.next_at)
        return max(0.0, (moment - now()).total_seconds()) if moment else _LONGEST_SLEEP

    def _deliver(self, delivery: Delivery) -> None:
        webhook = self._site.database.read(lambda connection: _found(connection, delivery.webhook_id))
        if webhook is None or self._closed:
            return
        if not (problem := _send(webhook, delivery)):
            self._site.database.write(lambda connection: deliveries.remove(connection, delivery))
            return
        options = self._site.options
        wait = min(LONGEST_RETRY, options.webhook_retry * 2**delivery.attempts)
        dead = delivery.attempts + 1 >= options.webhook_attempts
        self._site.database.write(
            lambda connection: deliveries.failed(connection, delivery, problem, now() + wait, dead=dead)
        )


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, sha256).digest()).decode()


def _send(webhook: Webhook, delivery: Delivery) -> str:
    """Send an event; what went wrong, or nothing."""
    body = json.dumps(delivery.event).encode()
    message_id = f"{webhook.id}.{delivery.number}"
    timestamp = int(datetime.now(UTC).timestamp())
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(webhook.secret, message_id, timestamp, body),
    }
    try:
        # Not where it is sent on to: that is not the address that was given.
        session = requests.Session()
        session.trust_env = False  # nobody's passwords, and no proxy
        with (
            session,
            session.post(
                webhook.url,
                body,
                headers=headers,
                timeout=_ANSWER_SECONDS,
                allow_redirects=False,
                stream=True,
            ) as answer,
        ):
            return "" if answer.status_code < 300 else f"status {answer.status_code}"
    except (requests.RequestException, ValueError) as error:
        return type(error).__name__  # what it says would be of use to who looks around in our network


def _found(connection: Connection, webhook_id: str) -> Webhook | None:
    return WEBHOOKS.find(connection, id=webhook_id)


def _wants(webhook: Webhook, event: Event) -> bool:
    mine = (event.project_id, event.user_id) == (webhook.project_id, webhook.user_id)
    return (webhook.everything or mine) and (not webhook.kinds or event.kind.startswith(tuple(webhook.kinds)))


def _body(event: Event) -> Mapping[str, Any]:
    return {**asdict(event), "time": event.time.isoformat().replace("+00:00", "Z")}
