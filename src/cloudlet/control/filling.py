"""Filling: a machine that came from another site runs before all of its memory is here.

Its source brings what is missing; who reads such a page waits until it has come. An instance of which a page
does not come cannot go on: it is lost here, and its source may still have it as it was at the switch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from cloudlet.control.arrival import Arrival
from cloudlet.control.courier import PeerState, answered
from cloudlet.control.ownership import Ownership, OwnershipFile
from cloudlet.errors import CloudletError
from cloudlet.hypervisor.driver import ReceivingEarly
from cloudlet.model import Machine
from cloudlet.overlay.pages import Numbers, PageBatch, Space
from cloudlet.overlay.rounds import Ended, RoundReader

_LOOK_SECONDS = 0.25
_FIRST_ASK, _LONGEST_ASK = 2.0, 10.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a guest waits for."""

    missing: int
    """Pages that have not come, in all."""
    pages: list[int]
    """Those that it has waited for since the last question, and that have not come."""
    after: int
    """The number to ask with next."""


class WantedPages:
    """The pages that are missing, and those of them that a guest waits for. For any number of threads."""

    def __init__(self, machine: Machine) -> None:
        """Nothing is missing."""
        self._missing = np.zeros(machine.ram_pages, np.bool_)
        self._news: list[tuple[int, int]] = []
        self._number = 0
        self._changed = threading.Condition()

    def want(self, space: Space, numbers: Numbers) -> None:
        """A guest waits for some of these pages."""
        with self._changed:
            for page in numbers[self._missing[numbers]].tolist() if space is Space.RAM else ():
                self._number += 1
                self._news.append((self._number, page))
            self._changed.notify_all()

    def lack(self, numbers: Numbers) -> None:
        """These pages are missing."""
        with self._changed:
            self._missing[numbers] = True

    def came(self, batch: PageBatch) -> None:
        """These pages have come."""
        if batch.space is Space.RAM:
            with self._changed:
                self._missing[batch.numbers] = False

    def note(self) -> None:
        """Something else has changed: whoever waits for a wish is told."""
        with self._changed:
            self._number += 1
            self._changed.notify_all()

    def ask(self, after: int, timeout: float) -> Wish:
        """What is wished for since the number ``after``: at once, or as soon as there is something."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > after, timeout)
            self._news = [(number, page) for number, page in self._news if self._missing[page]]
            pages = [page for number, page in self._news if number > after]
            return Wish(int(np.count_nonzero(self._missing)), pages, self._number)


class EarlyArrival(Arrival):
    """The target's end of a hand-off that may switch early."""

    _may_lack = True

    def __init__(
        self,
        ownership: OwnershipFile,
        receiving: ReceivingEarly,
        reader: RoundReader,
        wanted: WantedPages,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        """An arrival whose reader hands its pages to ``receiving`` and says so to ``wanted``."""
        super().__init__(ownership, receiving, reader, told)
        self._early = receiving
        self._wanted = wanted
        self._complete = False
        self._loader: threading.Thread | None = None

    @property
    def takes_records(self) -> bool:
        open_ = (Ownership.RECEIVING, Ownership.LOADED, Ownership.FILLING)
        return self.state in open_ and not self._complete

    def ask(self, after: int, timeout: float) -> Wish:
        """What the guest waits for; see :meth:`WantedPages.ask`."""
        return self._wanted.ask(after, timeout)

    @property
    def _runs_as(self) -> Ownership:
        return Ownership.RUNNING if self._complete else Ownership.FILLING

    def watch(self, source: Callable[[], PeerState], patience: float) -> None:
        """See to it, while pages are missing, that nobody waits for ever.

        :param source: the source's state of the hand-off.
        :param patience: seconds that a guest waits for a page.
        """
        heard, count, wait = time.monotonic(), self.count, _FIRST_ASK
        while self.state is Ownership.FILLING:
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)
            since, now = self._early.progress().waiting_since, time.monotonic()
            if since is None:
                self._try_again()
            if since is not None and now - since > patience:
                self.lose(f"the guest has waited {patience:.0f} s for a page that does not come")
            elif self.count != count:
                heard, count, wait = now, self.count, _FIRST_ASK
            elif now - heard > wait:
                wait += min(wait, _LONGEST_ASK)
                answer = answered(source)
                if answer and answer.state in (Ownership.REVERTED, Ownership.LOST):
                    self.lose(f"the source has taken it back: {answer.reason}")
        self._see_to_it()

    def _try_again(self) -> None:
        """Do what could not be done in its time: have the machine run, write down that it is whole."""
        self._try_to_go_on()  # without the lock: its QEMU may read a page that is still to be loaded
        with self._loading, suppress(OSError):
            if self._complete and self.state is Ownership.FILLING:
                self._ownership.become(Ownership.RUNNING)

    def lose(self, reason: str) -> None:
        """It cannot go on here, if pages are missing: its machine ends."""
        with self._loading, suppress(OSError):  # it cannot be written down: its site will
            self._drop(reason)
        self._note()

    def _drop(self, reason: str) -> None:
        if self.state is Ownership.FILLING:
            self._early.sever()
            self._ownership.become(Ownership.LOST, reason=reason)
        elif not self.state.ended:
            super()._drop(reason)

    def _end(self, ended: Ended) -> None:
        if ended.missing.size:
            self._wanted.lack(ended.missing)
            self._early.lack(ended.missing)
            loader = threading.Thread(target=self._load, args=(ended.device_state,), name="load", daemon=True)
            loader.start()
            self._loader = loader
        elif self._loader:
            self._filled()
        else:
            super()._end(ended)
            self._filled()

    def _load(self, device_state: bytes) -> None:
        """Load the devices, beside the records that bring what loading them reads."""
        try:
            self._early.load(device_state)
            self._write_down(partial(self._ownership.become, Ownership.LOADED))
        except (CloudletError, OSError) as error:
            self._write_down(partial(self._drop, str(error)))
        self._note()

    def _write_down(self, decide: Callable[[], None]) -> None:
        """Decide something as soon as it can be written down; nobody sends again what it follows from."""
        while True:
            with self._loading, suppress(OSError):
                decide()
                return
            time.sleep(_LOOK_SECONDS)

    def _filled(self) -> None:
        self._early.complete()
        self._complete = True
        if self.state is Ownership.FILLING:
            self._ownership.become(Ownership.RUNNING)
        self._note()

    def _note(self) -> None:
        self._wanted.note()
        super()._note()
