"""What the source of a hand-off sends: rounds, and what is left after an early switch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from cloudlet.control.courier import Courier, Peer
from cloudlet.control.pace import Pace, Round, Terms
from cloudlet.hypervisor.driver import Instance, Rounds
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.index import Lookup
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.pages import Numbers, Rows, Space
from cloudlet.overlay.rounds import Left, RoundWriter, pack

_AT_ONCE = 128
"""Pages that are looked at together; those that have changed are copied three times. 512 were not faster
(measured), and are four times the memory."""
_SAMPLE_PAGES = 8192
"""Of more pages of a space, a sample of about so many tells how many have changed."""
_ORDER = (Space.DISK, Space.RAM)
_WAITING_BYTES_EARLY = 1 << 20
"""Of records that wait where the switch may be early: they go over before it, however thin the link."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is to be handed off, and what both ends hold already."""

    instance: Instance
    known: KnownPages
    index: Lookup
    seed: int
    with_layer: bool
    """Whether the target lacks the layer on which the machine stands here."""
    besides: Mapping[Space, Numbers] = field(default_factory=dict)
    """Pages that the target holds otherwise than what the machine stands on here: they may differ, though the
    machine has never written them."""


@contextmanager
def sending(
    parcel: Parcel, peer: Peer, terms: Terms, pace: Pace, stopped: threading.Event
) -> Iterator[Sender]:
    """What rounds of a machine are made with, until the context is left.

    :param stopped: set when nothing more is to be sent.
    """
    rounds = parcel.instance.rounds(with_layer=parcel.with_layer)
    try:
        with (
            ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="pack") as workers,
            Courier(peer, stopped, patience=terms.patience_seconds, limit=terms.bytes_per_second) as courier,
        ):
            # An app's files are in its own buffers, too: of the counter's 57 MiB spans leave 30 (measured).
            writer = RoundWriter(
                parcel.known, parcel.index, parcel.seed, spans=parcel.with_layer, leaves=terms.early
            )
            if terms.early:
                courier.most_waiting = _WAITING_BYTES_EARLY
            yield Sender(rounds, writer, courier, workers, pace, parcel.besides)
    finally:
        rounds.close()


@dataclass(slots=True)
class Sender:
    """What rounds are made with."""

    rounds: Rounds
    writer: RoundWriter
    courier: Courier
    workers: ThreadPoolExecutor
    pace: Pace
    besides: Mapping[Space, Numbers]
    number: int = 0
    looked: int = 0
    whole: bool = False
    """Whether all pages have been looked at, and sent if they had changed."""

    def round(self, told: Callable[[int], None] = lambda _: None) -> Round:
        """Look at all pages that may have changed and have sent those that have; the disk first.

        Of RAM only some are, where the hand-off is late and may leave memory for later.

        :param told: how many have changed so far, again and again.
        """
        self.number += 1
        began, looked, changed, late = time.monotonic(), 0, 0, False
        for space, numbers, rows in self._pages():
            looked += numbers.size
            changed += self.writer.look(space, numbers, rows)
            self._put_payloads()
            told(changed)
            if late := space is Space.RAM and self.pace.is_late:
                break
        self.whole |= not late
        ended = self.writer.end_round(self.number)
        self._put_payloads()
        for record in ended:
            self._put_record(record.encode())
        self.looked = looked
        return Round(self.number, looked, changed, seconds=time.monotonic() - began)

    def count(self) -> tuple[int, int]:
        """How many pages may have changed since the last round, and how many have; nothing is sent."""
        looked = changed = 0
        for space, numbers, rows in self._pages():
            looked += numbers.size
            changed += self.writer.count(space, numbers, rows)
        return looked, changed

    def estimate(self) -> tuple[int, int]:
        """As :meth:`count`, but where there are many pages some stand for all of them."""
        looked = changed = 0
        for space in _ORDER:
            held = self._held(space)
            step = 1 + held.size // _SAMPLE_PAGES
            found = sum(self.writer.count(space, *batch) for batch in self._batches(space, held, step))
            looked += held.size
            changed += min(held.size, step * found)
        return looked, changed

    def leave(self) -> Left:
        """The last round of an early switch: the disk's blocks, and of RAM only which pages come later."""
        self.number += 1
        parts, self.looked = [], 0
        for space, numbers, rows in self._pages():
            self.looked += numbers.size
            if space is Space.RAM:
                parts.append(self.writer.leave(numbers, rows))
            else:
                self.writer.look(space, numbers, rows)
                self._put_payloads()
        left = Left.of(parts)
        ended = self.writer.end_round(self.number)
        self._put_payloads()
        if left.numbers.size:
            ended.append(self.writer.missing_record(left))
        for record in ended:
            self._put_record(record.encode())
        return left

    def bring(self, numbers: Numbers) -> None:
        """Have pages sent that were left."""
        rows: Rows = np.empty((numbers.size, PAGE_BYTES), np.uint8)
        self.rounds.read(Space.RAM, numbers, rows)
        self.writer.bring(numbers, rows)
        self._put_payloads()

    def end(self, device_state: bytes, full: bytes) -> None:
        for record in self.writer.device_records(device_state):
            self._put_record(record.encode())
        self.put_end(device_state, full)

    def put_end(self, device_state: bytes, full: bytes = bytes(32)) -> None:
        self._put_record(self.writer.end_record(device_state, full).encode())

    def _pages(self) -> Iterator[tuple[Space, Numbers, Rows]]:
        for space in _ORDER:
            for numbers, rows in self._batches(space, self._held(space)):
                yield space, numbers, rows

    def _held(self, space: Space) -> Numbers:
        """The pages that may have changed."""
        held = self.rounds.held(space)
        if not self.whole and space in self.besides:
            held = np.union1d(held, self.besides[space]).astype(np.uint32)
        return held

    def _batches(self, space: Space, held: Numbers, step: int = 1) -> Iterator[tuple[Numbers, Rows]]:
        """Pages as they are now, some at a time; the rows are only lent. Of ``step`` batches one is read."""
        room: Rows = np.empty((_AT_ONCE, PAGE_BYTES), np.uint8)
        for at in range(0, held.size, step * _AT_ONCE):
            numbers = held[at : at + _AT_ONCE]
            rows = room[: numbers.size]
            self.rounds.read(space, numbers, rows)
            yield numbers, rows

    def _put_payloads(self) -> None:
        courier = self.courier
        for payload in self.writer.payloads():
            self.pace.adjust(courier.held, courier.rate())
            level = self.pace.level
            size = payload.literals.nbytes + payload.numbers.nbytes
            courier.put(self.workers.submit(pack, payload, level), size)

    def _put_record(self, record: bytes) -> None:
        packed: Future[bytes] = Future()
        packed.set_result(record)
        self.courier.put(packed, len(record))
