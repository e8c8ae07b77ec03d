"""What one process of a site does for all: it finds what the last one left, and does what time demands.

Where a site is a single process, that is it. Where several conductors work, the one that holds a lock keeps
house; the kernel gives the lock to another when that one ends, however it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from oslo_log import log

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_SWEEP_SECONDS = 2.0
_TRY_SECONDS = 0.5


class Housekeeping:
    """The household of a site: :meth:`begin` at once, or :meth:`wait` for one's turn."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._closed = threading.Event()
        self._held = ExitStack()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Take over from the last process, and go on until :meth:`close`."""
        self._take_over()
        self._go_on(self._sweep)

    def wait(self) -> None:
        """Begin when no other process keeps house."""
        self._go_on(self._take_turn)

    def close(self) -> None:
        """Leave the house to others."""
        self._closed.set()
        if self._thread:
            self._thread.join()
        for part in (self._site.webhooks, self._site.tidying, self._site.leases):
            part.close()
        self._held.close()

    def _go_on(self, run: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=run, name="housekeeping", daemon=True)
        self._thread.start()

    def _take_turn(self) -> None:
        while not self._closed.wait(_TRY_SECONDS):
            try:
                if self._held.enter_context(self._site.alone.at_once("housekeeping")):
                    LOG.info("this process keeps house")
                    self._take_over()
                    break
            except Exception:
                LOG.exception("the house could not be taken over")
            self._held.close()
        self._sweep()

    def _take_over(self) -> None:
        site = self._site
        site.blobs.reap()
        site.bases.find_new()
        site.bases.find_left()
        site.overlays.find_left()
        site.keeping.adopt()
        if left := site.work.resume():
            LOG.info("going on with %d operations of the last process", len(left))
        site.shutdown.look()
        site.leases.begin()
        site.tidying.begin()
        site.webhooks.begin()

    def _sweep(self) -> None:
        """Find what other processes of the site began, and what was lost on its way."""
        while not self._closed.wait(_SWEEP_SECONDS):
            try:
                self._site.shutdown.look()
                self._site.work.resume()
                self._site.leases.look()
                self._site.keeping.find_new()
                self._site.departures.go_on()
                self._site.webhooks.look()
            except Exception:
                LOG.exception("what others left could not be found")
