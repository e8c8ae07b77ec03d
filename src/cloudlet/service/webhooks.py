"""Webhooks: events are pushed to who asked for them until they arrive or are given up.

To one webhook they are pushed one after the other, in their order; to several at the same time, so that one
which is slow keeps nobody else waiting. What did not arrive is tried again later, when others may have been
pushed that came after it: an event may come twice, and not always in its turn. Its number tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import NotFoundError
from cloudlet.service.push import UnansweredError, push
from cloudlet.store import deliveries, journal
from cloudlet.store.deliveries import Delivery
from cloudlet.store.journal import Event
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import WEBHOOKS, Webhook, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
LONGEST_RETRY = timedelta(hours=1)
_AT_ONCE, _BATCH = 32, 200
_TURN_SECONDS = 5.0
"""How long one webhook keeps a thread while others wait for one."""
_TROUBLE_SECONDS = 1.0
_LONGEST_SLEEP = 3600.0


class Webhooks:
    """The webhooks of a site, and the threads that push."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._any = False
        """Whether there may be one."""
        self._poked = threading.Event()
        self._served: set[str] = set()
        """The webhooks that have a thread."""
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def begin(self) -> None:
        self._any = bool(self._site.database.read(WEBHOOKS.count))
        self._site.database.when_committed(self._hear)
        if not self._thread.ident:
            self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._poked.set()
        if self._thread.ident:
            self._thread.join()

    def look(self) -> None:
        """Another process of the site may have made a webhook, or written an event for one."""
        self._any = bool(self._site.database.read(WEBHOOKS.count))
        if self._any:
            self._poked.set()

    def _hear(self) -> None:
        """Somebody has written."""
        if self._any:
            self._poked.set()

    def create(self, webhook: Webhook, remember: Remember = forget) -> Webhook:
        """Have events pushed from now on.

        :raises UsageError: its URL leads where it may not.
        """
        self._site.options.webhook_networks.check(webhook.url, "webhook.url")

        def insert(connection: Connection) -> Webhook:
            WEBHOOKS.insert(connection, webhook)
            remember(connection, webhook.id)
            return webhook

        made = self._site.database.write(insert)
        self._any = True
        self._poked.set()
        return made

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
                    wait = _TROUBLE_SECONDS
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
        """Give a thread to webhooks to which something is due; the seconds until that is so for another."""
        waiting = self._site.database.read(deliveries.waiting) if self._any else ()
        with self._lock:
            for webhook_id, moment in waiting:
                if webhook_id in self._served:
                    continue
                if (seconds := (moment - now()).total_seconds()) > 0:
                    return min(seconds, _LONGEST_SLEEP)
                if len(self._served) >= _AT_ONCE:
                    break  # whose turn ends pokes
                self._served.add(webhook_id)
                threads.submit(self._serve, webhook_id)
        return _LONGEST_SLEEP

    def _serve(self, webhook_id: str) -> None:
        """Push what is due to a webhook, for a while."""
        ends = time.monotonic() + _TURN_SECONDS
        try:
            while not self._closed and time.monotonic() < ends and self._deliver(webhook_id):
                pass
        except Exception:
            LOG.exception("webhook %s could not be served", webhook_id)
            time.sleep(_TROUBLE_SECONDS)
        finally:
            with self._lock:
                self._served.discard(webhook_id)
            self._poked.set()

    def _deliver(self, webhook_id: str) -> bool:
        """Push the next event that is due to a webhook; whether to go on with the one after it."""
        moment, read = now(), self._site.database.read
        webhook, due = read(
            lambda connection: (
                _found(connection, webhook_id), deliveries.due(connection, webhook_id, moment, 1)
            )
        )  # fmt: skip
        if webhook is None or not due:
            return False
        try:
            status = push(webhook, due[0], self._site.options.webhook_networks, lambda: self._closed)
        except UnansweredError as error:
            if not self._closed:
                # The others would not be answered either, and would each keep a thread until that is known.
                others = read(lambda connection: deliveries.due(connection, webhook_id, moment, _BATCH))
                self._put_off(others, str(error))
            return False
        if status < 300:
            self._site.database.write(lambda connection: deliveries.remove(connection, due[0]))
        else:
            self._put_off(due, f"status {status}")
        return True

    def _put_off(self, tried: Iterable[Delivery], problem: str) -> None:
        """Try deliveries again later, or give them up."""
        options, moment = self._site.options, now()

        def note(connection: Connection) -> None:
            for delivery in tried:
                again = moment + min(LONGEST_RETRY, options.webhook_retry * 2**delivery.attempts)
                dead = delivery.attempts + 1 >= options.webhook_attempts
                deliveries.failed(connection, delivery, problem, again, dead=dead)

        self._site.database.write(note)


def _found(connection: Connection, webhook_id: str) -> Webhook | None:
    return WEBHOOKS.find(connection, id=webhook_id)


def _wants(webhook: Webhook, event: Event) -> bool:
    mine = (event.project_id, event.user_id) == (webhook.project_id, webhook.user_id)
    return (webhook.everything or mine) and (not webhook.kinds or event.kind.startswith(tuple(webhook.kinds)))


def _body(event: Event) -> Mapping[str, Any]:
    return {**asdict(event), "time": event.time.isoformat().replace("+00:00", "Z")}
