"""Hand-off: a running machine follows its user to another cloudlet.

At the source a :class:`Departure` sends, round by round and while the machine runs, what the target cannot
rebuild from what it holds. When what is left fits the pause that was asked for, the machine stands still, the
last round is exact, both ends prove that they have the same, and the source gives the machine away. At the
target an :class:`Arrival` loads what comes into a paused machine, and lets it run when it is its own.

Who may run it is written down at each end before anything follows (:mod:`~cloudlet.control.ownership`); the
protocol, and what each end does when the other is silent, is ``docs/formats/handoff.md``.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np

from cloudlet.control.courier import Courier, Peer, PeerState, answered
from cloudlet.control.ownership import Ownership, OwnershipFile
from cloudlet.control.pace import GUESSED_RATE, Forecast, Pace, Round, Terms
from cloudlet.control.serving import Serving
from cloudlet.errors import CloudletError, ConflictError, FailedError, UnreachableError, of_the_system
from cloudlet.hypervisor.driver import Instance, Receiving, Rounds, RunState
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.index import Lookup
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.limits import FRAME_PAGES
from cloudlet.overlay.pages import Numbers, Rows, Space
from cloudlet.overlay.records import Record, RecordKind, read_record
from cloudlet.overlay.rounds import Ended, Left, RoundReader, RoundWriter, pack

_HAS_RUN = (Ownership.RUNNING, Ownership.FILLING, Ownership.LOST)
"""The target was told that it may run the machine, though here that is forgotten."""
_STANDING_SECONDS = 10.0
"""So long the machine stands still for a peer that does not answer, before it goes on here."""
DOUBT_SECONDS = 10.0
"""So long a side waits for the other's word before it says that it is in doubt."""
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_FIRST_ASK, _LOOK_SECONDS = 2.0, 0.25
_UNWRITTEN_SECONDS = 0.5
"""Between two attempts to write down what is decided, where the disk is full."""
_TURN_SECONDS = 30.0
"""How long records wait for those before them."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a departure is."""

    state: Ownership
    rounds: int = 0
    bytes_sent: int = 0
    forecast: Forecast | None = None
    in_doubt: bool = False
    """Whether it waits for the peer's word, or an operator's, with the machine standing still."""
    error: str = ""
    """Why it waits for an operator."""


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


@dataclass(slots=True)
class Statistics:
    """What a departure took: seconds, bytes on the wire, pages."""

    rounds: int = 0
    bytes: int = 0
    seconds: float = 0.0
    pause_seconds: float = 0.0
    """From the stop here to the target's word that it runs."""
    forecast_pause_seconds: float = 0.0
    """What was expected of the pause when the machine was stopped."""
    overhead_seconds: float | None = None
    """Of the pause, without what was looked at and sent in it."""
    private_bytes: int = 0
    level: int = 0
    """Of the compression, at last."""
    rate: float | None = None
    """Bytes per second that the link carried."""
    early: bool = False
    """Whether it switched before all memory was at the target."""
    missing_pages: int = 0
    """How many were missing then."""
    wanted_pages: int = 0
    """How many of these the guest has waited for."""
    serving_seconds: float = 0.0
    """From the stop until the last of them was there."""


class Departure:
    """The source's end of one hand-off."""

    def __init__(
        self,
        ownership: OwnershipFile,
        peer: Peer,
        terms: Terms,
        parcel: Parcel | None = None,
        told: Callable[[Progress], None] = lambda _: None,
        rate: float | None = None,
        overhead: float | None = None,
    ) -> None:
        """A departure that goes on from where ``ownership`` says that it is.

        :param parcel: the machine, unless that is gone.
        :param rate: bytes per second of the last hand-off to this peer.
        :param overhead: seconds of its pause, without what was looked at and sent.
        """
        self.statistics = Statistics()
        self._ownership = ownership
        self._peer = peer
        self._parcel = parcel
        self._told = told
        self._terms = terms
        self._pace = Pace(terms, rate, overhead)
        self._stopped = threading.Event()
        """Nothing more is to be sent."""
        self._woken = threading.Event()
        """Whoever waits to ask the peer again shall do so now."""
        self._deciding = threading.Lock()
        self._keep = False
        self._word: Ownership | None = None
        """What an operator wants it to become while pages are missing at the target."""
        self._serving: Serving | None = None
        self._goes_on = False
        """Whether the machine that stays was told to go on."""
        self._asked_again = False
        """Whether the target was told more than once that it may run the machine."""
        self._stood_at = 0.0
        self._sent_before = 0
        """Bytes that had been sent when the machine was stopped."""

    @property
    def state(self) -> Ownership:
        return self._ownership.state

    @property
    def told(self) -> Mapping[str, Any]:
        """What the target said when it had it: where the instance is reached there."""
        return self._ownership.record.told

    def run(self) -> Ownership:
        """Hand the machine over: `COMPLETED`, or the error that made it go on here.

        :raises CloudletError: it was reverted.
        """
        assert self._parcel
        try:
            with self._sending(self._parcel) as sender:
                if self._copy(sender):
                    self._switch_early(sender)
                else:
                    self._switch(sender)
        except BaseException as error:
            self.revert(_reason_of(error), silent=isinstance(error.__cause__, UnreachableError))
            if self.state is Ownership.REVERTED:
                raise
        return self.conclude()

    def conclude(self) -> Ownership:
        """Bring it to its end from what is written down; wait for the peer's word as long as that takes.

        :raises CloudletError: it was reverted, or lost.
        """
        if self.state in (Ownership.COPYING, Ownership.SWITCHING):
            self._conclude_without_machine()
        wait, began = _FIRST_WAIT, time.monotonic()
        while self.state is Ownership.COMMITTED:
            kept = self._keep
            answer = self._ask_to_drop() if kept else answered(self._commit)
            with self._deciding, suppress(OSError):  # it cannot be written down: it is asked again
                if answer and answer.state == Ownership.RUNNING:
                    self._ownership.become(Ownership.COMPLETED, told=answer.told or {})
                    self._note_pause()
                elif answer and answer.state in (Ownership.FILLING, Ownership.LOST):
                    self._ownership.become(Ownership.SERVING, told=answer.told or {})
                    self._note_pause()
                elif answer and answer.state == Ownership.DROPPED:
                    why = "its operator kept it" if kept else "it was lost at the target before it ran there"
                    self._revert(f"{why}: {answer.reason}" if answer.reason else why)
                elif kept:
                    self._revert("its operator kept it")
                else:
                    self._tell(in_doubt=time.monotonic() - began > DOUBT_SECONDS)
            if self.state is Ownership.COMMITTED:
                self._asked_again = True
                self._wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        if self.state is Ownership.SERVING:
            self._serve()
        self._go_on_here()
        self._tell()
        if self.state is Ownership.REVERTED:
            raise FailedError(f"the instance stays here: {self._ownership.record.reason}")
        if self.state is Ownership.LOST:
            raise FailedError(f"the instance is lost: {self._ownership.record.reason}")
        return self.state

    def _commit(self) -> PeerState:
        return self._peer.commit(self._ownership.record.epoch)

    def _ask_to_drop(self) -> PeerState | None:
        """What the target says when it is told to give the copy up; if it cannot any more, what it is."""
        return answered(self._peer.drop) or answered(self._peer.state)

    def cancel(self) -> None:
        """Have the machine stay here.

        :raises ConflictError: it is given away already.
        """
        with self._deciding:
            if self.state not in (Ownership.COPYING, Ownership.SWITCHING, Ownership.REVERTED):
                raise ConflictError("the instance is at its target already, or about to be")
            self._stopped.set()

    def keep(self) -> None:
        """An operator's word, while the peer is silent: it runs here again, though it may run there too.

        :raises ConflictError: there is no doubt.
        """
        with self._deciding:
            doubt = (Ownership.COMMITTED,) if self._parcel else (Ownership.COMMITTED, Ownership.SWITCHING)
            if self.state not in doubt:
                raise ConflictError(f"the hand-off is {self.state}: there is nothing to decide")
            self._keep = True
            self._woken.set()

    def resume_as_of_switch(self) -> None:
        """An operator's word: it goes on here as it was at the switch; what it did at the target is undone.

        :raises ConflictError: it runs at the target, or there is nothing to decide.
        """
        self._speak(Ownership.REVERTED)

    def give_up(self) -> None:
        """An operator's word: what is kept of it here is ended.

        :raises ConflictError: it runs at the target, or there is nothing to decide.
        """
        self._speak(Ownership.LOST)

    def _speak(self, word: Ownership) -> None:
        answer = answered(self._peer.state)
        with self._deciding:
            if self.state is not Ownership.SERVING:
                raise ConflictError(f"the hand-off is {self.state}: there is nothing to decide")
            if answer and answer.state in (Ownership.LOADED, Ownership.FILLING, Ownership.RUNNING):
                raise ConflictError("the instance runs at its target", hint="wait until its memory is there")
            self._word = word
            self._woken.set()

    def revert(self, reason: str, *, silent: bool = False) -> None:
        """The machine goes on here; unless it is given away, or the target runs it by its operator's word.

        :param silent: whether the target does not answer anyway: the machine does not stand still for longer.
        """
        if self.state is Ownership.SWITCHING and not silent:
            answer = self._ask_to_drop()
            if answer and answer.state in _HAS_RUN:
                with self._deciding, suppress(OSError):
                    self._ownership.become(Ownership.COMMITTED)
        while self.state in (Ownership.COPYING, Ownership.SWITCHING):
            try:
                with self._deciding:
                    self._revert(reason)
            except OSError:  # it cannot be written down: the machine is as it was until it can
                time.sleep(_UNWRITTEN_SECONDS)
        self._go_on_here()
        self._tell()
        if self.state is Ownership.REVERTED:
            answered(self._peer.drop)

    def _revert(self, reason: str, *, as_of_switch: bool = False) -> None:
        self._ownership.become(Ownership.REVERTED, reason=reason, as_of_switch=as_of_switch)
        self._try_to_go_on()

    def _go_on_here(self) -> None:
        """See to it that a machine that stays goes on; one that is gone is seen by whoever keeps it."""
        while self.state is Ownership.REVERTED and not self._try_to_go_on():
            time.sleep(_FIRST_WAIT)

    def _try_to_go_on(self) -> bool:
        """Whether the machine goes on, or is gone; can be done again."""
        if not self._parcel or self._goes_on:
            return True
        instance, done = self._parcel.instance, True
        try:
            if not self._ownership.record.paused:
                instance.resume()
        except (CloudletError, OSError):
            done = False
        try:
            instance.hold_connections(False)
        except (CloudletError, OSError):
            done = False
        if not done:
            return instance.wait(0)
        self._goes_on = True
        with suppress(CloudletError, OSError):  # its copy may have done so already
            instance.announce()
        return True

    def _conclude_without_machine(self) -> None:
        """The machine is gone, and nothing was decided: what the target has is all there is."""
        wait = _FIRST_WAIT
        while self.state is Ownership.SWITCHING:
            answer = answered(self._peer.state)
            with self._deciding, suppress(OSError):
                # What was switched early is not whole at the target, and never will be.
                loaded = answer and answer.state == Ownership.LOADED and not self._ownership.record.early
                if (loaded and not self._keep) or (answer and answer.state in _HAS_RUN):
                    self._ownership.become(Ownership.COMMITTED)
                elif answer or self._keep:
                    self._ownership.become(Ownership.REVERTED, reason="its machine ended")
            if self.state is Ownership.SWITCHING:
                self._tell(in_doubt=True)
                self._wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        self.revert("its machine ended")

    def _wait(self, seconds: float) -> None:
        """Wait before the peer is asked again, or until an operator has spoken."""
        self._woken.wait(seconds)
        self._woken.clear()

    @contextmanager
    def _sending(self, parcel: Parcel) -> Iterator[_Sender]:
        terms = self._terms
        rounds = parcel.instance.rounds(with_layer=parcel.with_layer)
        try:
            with (
                ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="pack") as workers,
                Courier(
                    self._peer,
                    self._stopped,
                    patience=terms.patience_seconds,
                    limit=terms.bytes_per_second,
                ) as courier,
            ):
                writer = RoundWriter(parcel.known, parcel.index, parcel.seed, leaves=terms.early)
                yield _Sender(rounds, writer, courier, workers, self._pace, parcel.besides)
        finally:
            rounds.close()

    def _copy(self, sender: _Sender) -> bool:
        """Send rounds while the machine runs, until what is left fits or there is no more time.

        The answer is whether what is left is to be sent after the switch.
        """
        self._tell(self._pace.begun(*sender.count()))
        while True:
            done = sender.round()
            sender.courier.flush()
            self._pace.ended(replace(done, bytes=sender.courier.sent - self.statistics.bytes))
            self.statistics.bytes = sender.courier.sent
            self.statistics.rounds = done.number
            sender.rounds.pass_over_layer()
            counted = sender.count()
            at_last = self._pace.forecast(*counted)
            self._tell(at_last)
            if self._stopped.is_set():
                raise FailedError("the hand-off was cancelled")
            if self._pace.switches(at_last):
                if early := self._pace.leaves(at_last):
                    at_last = self._pace.early(*counted)
                self.statistics.forecast_pause_seconds = at_last.pause_seconds
                return early

    def _switch(self, sender: _Sender) -> None:
        """The machine stands still, the rest goes over, both ends have the same: then it is given away."""
        assert self._parcel
        instance = self._parcel.instance
        device_state = self._stop(sender)
        sender.round()
        full = instance.digest() if self._terms.verify_full else bytes(32)
        sender.end(device_state, full)
        self._give_away(sender.courier.flush(), sender)

    def _switch_early(self, sender: _Sender) -> None:
        """The machine stands still, and is given away before its memory has gone over, which follows."""
        device_state = self._stop(sender, early=True)
        left = sender.leave()
        sender.end(device_state, bytes(32))
        if not left.numbers.size:  # its guest has stood still by itself, since
            self._give_away(sender.courier.flush(), sender)
            return
        self.statistics.early, self.statistics.missing_pages = True, left.numbers.size

        def end() -> None:
            sender.put_end(device_state)

        with Serving(self._peer, sender.courier, left, sender.bring, end) as serving:
            try:
                self._give_away(self._loaded(serving), sender)
                sender.courier.patience, serving.hurries = math.inf, False
                self._serving = serving
                self.conclude()
            finally:
                self._serving = None
                self._stopped.set()
                self.statistics.bytes = sender.courier.sent

    def _stop(self, sender: _Sender, *, early: bool = False) -> bytes:
        """The machine stands still; its device state."""
        assert self._parcel
        self._ownership.become(Ownership.SWITCHING, early=early)
        self._tell()
        sender.courier.patience = min(sender.courier.patience, _STANDING_SECONDS)
        self._stood_at, self._sent_before = time.monotonic(), sender.courier.sent
        self._parcel.instance.hold_connections(True)
        device_state, _ = sender.rounds.settle()
        return device_state

    def _loaded(self, serving: Serving) -> PeerState:
        """What the target says when it has loaded the machine, or has given up."""
        while True:
            answer = serving.hear(_LOOK_SECONDS)
            if answer and answer.state != Ownership.RECEIVING:
                return answer
            if serving.error:
                raise serving.error
            if self._stopped.is_set():
                raise FailedError("the hand-off was cancelled")

    def _give_away(self, answer: PeerState, sender: _Sender) -> None:
        """The target has loaded it: it is the target's."""
        self.statistics.bytes = sender.courier.sent
        self.statistics.seconds = round(self._pace.elapsed, 3)
        self.statistics.private_bytes = sender.looked * PAGE_BYTES
        self.statistics.level = self._pace.level
        self.statistics.rate = sender.courier.rate()
        if answer.state != Ownership.LOADED and answer.state not in _HAS_RUN:
            raise FailedError(f"the target has not loaded the machine: {answer.reason or answer.state}")
        with self._deciding:
            if self._stopped.is_set():
                raise FailedError("the hand-off was cancelled")
            self._ownership.become(Ownership.COMMITTED)

    def _serve(self) -> None:
        """Wait until the target has all of it; where that cannot be, until an operator speaks."""
        heard, told, lost = time.monotonic(), 0.0, ""
        while self.state is Ownership.SERVING:
            answer, now = self._hear(), time.monotonic()
            heard = now if answer else heard
            if answer and answer.state in (Ownership.LOST, Ownership.DROPPED, "unknown"):
                lost = answer.reason or "it is gone at the target"
            elif answer and answer.state == Ownership.FILLING and not self._can_serve():
                lost = "its machine ended at the source before all of its memory had gone over"
            with self._deciding, suppress(OSError):  # it cannot be written down: it is looked at again
                if answer and answer.state == Ownership.RUNNING:
                    self._ownership.become(Ownership.COMPLETED)
                elif self._word is Ownership.REVERTED:
                    self._revert("an operator resumed it as of the switch", as_of_switch=True)
                elif self._word or (lost and not self._stands_here()):
                    self._ownership.become(Ownership.LOST, reason=lost or "an operator gave it up")
            if now - told > _LOOK_SECONDS:
                told, silent = now, now - heard > DOUBT_SECONDS
                self._tell(self._left_to_serve(), in_doubt=bool(lost) or silent, error=lost)
        if self._stood_at:
            self.statistics.serving_seconds = round(time.monotonic() - self._stood_at, 3)

    def _hear(self) -> PeerState | None:
        """What the target says now; None if it says nothing."""
        if self._serving:
            self.statistics.wanted_pages = self._serving.asked
            return self._serving.hear(_LOOK_SECONDS)
        self._wait(_LONGEST_WAIT)
        return answered(self._peer.state)

    def _can_serve(self) -> bool:
        """Whether what is missing at the target still comes."""
        return self._stands_here() or (self._serving is not None and not self._serving.error)

    def _stands_here(self) -> bool:
        """Whether the machine is here still, as it was at the switch."""
        return self._parcel is not None and not self._parcel.instance.wait(0)

    def _left_to_serve(self) -> Forecast | None:
        if not self._serving:
            return None
        left = int(self._serving.missing * self._pace.page_bytes())
        seconds = left / (self.statistics.rate or GUESSED_RATE)
        return Forecast(round(seconds, 3), left, 0.0, can_be_lost=True)

    def _note_pause(self) -> None:
        if not self._stood_at:
            return
        statistics, pause = self.statistics, time.monotonic() - self._stood_at
        statistics.pause_seconds = round(pause, 4)
        if self._asked_again or self._terms.verify_full:
            return  # the pause says nothing of the next one
        looked, sent = statistics.private_bytes // PAGE_BYTES, statistics.bytes - self._sent_before
        statistics.overhead_seconds = round(self._pace.overhead(pause, looked, sent), 4)

    def _tell(self, forecast: Forecast | None = None, *, in_doubt: bool = False, error: str = "") -> None:
        statistics = self.statistics
        self._told(Progress(self.state, statistics.rounds, statistics.bytes, forecast, in_doubt, error))


@dataclass(slots=True)
class _Sender:
    """What rounds are made with."""

    rounds: Rounds
    writer: RoundWriter
    courier: Courier
    workers: ThreadPoolExecutor
    pace: Pace
    besides: Mapping[Space, Numbers]
    number: int = 0
    looked: int = 0

    def round(self) -> Round:
        """Look at all pages that may have changed and have sent those that have; the disk first."""
        self.number += 1
        began, looked, changed = time.monotonic(), 0, 0
        for space, numbers, rows in self._pages():
            looked += numbers.size
            changed += self.writer.look(space, numbers, rows)
            self._put_payloads()
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
        room: Rows = np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8)
        for space in (Space.DISK, Space.RAM):
            held = self.rounds.held(space)
            if self.number < 2 and space in self.besides:
                held = np.union1d(held, self.besides[space]).astype(np.uint32)
            for at in range(0, held.size, FRAME_PAGES):
                numbers = held[at : at + FRAME_PAGES]
                rows = room[: numbers.size]
                self.rounds.read(space, numbers, rows)
                yield space, numbers, rows

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


class Arrival:
    """The target's end of one hand-off."""

    def __init__(
        self,
        ownership: OwnershipFile,
        receiving: Receiving,
        reader: RoundReader,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self.count = 0
        """Records that have been loaded."""
        self.in_doubt = False
        """Whether it is complete, and the source does not say whose it is."""
        self._ownership = ownership
        self._receiving = receiving
        self._reader = reader
        self._told = told
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._goes = False
        """Whether its machine was told to run, or to stay as its user wants it."""

    @property
    def state(self) -> Ownership:
        return self._ownership.state

    @property
    def reason(self) -> str:
        return self._ownership.record.reason

    @property
    def takes_records(self) -> bool:
        """Whether more of it may come."""
        return self.state is Ownership.RECEIVING

    def is_of(self, handoff: str) -> bool:
        """Whether it is of the hand-off with this id."""
        return self._ownership.record.handoff == handoff

    def records(self, first: int, body: bytes) -> None:
        """Load whole records, of which the first has the number ``first``; those known are passed over.

        :raises ConflictError: those before them do not come.
        :raises IntegrityError: they are damaged, or what they make is not what the source has.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.count >= first or not self.takes_records, _TURN_SECONDS)
        with self._loading:
            if not self.takes_records:
                return
            if self.count < first:
                raise ConflictError(f"records {self.count} to {first - 1} have not come")
            stream, number = BytesIO(body), first
            while (record := read_record(stream, number)) is not None:
                if number >= self.count:
                    self._take(record)
                    with self._changed:
                        self.count += 1
                        self._changed.notify_all()
                number += 1
        self._told()

    def commit(self, epoch: int) -> None:
        """The machine is this site's, and runs.

        :raises ConflictError: it is not complete, or it is of another epoch.
        """
        with self._loading:
            record = self._ownership.record
            if self.state in (Ownership.RUNNING, Ownership.DROPPED):
                return
            if epoch != record.epoch or self.state is not Ownership.LOADED:
                raise ConflictError(f"the machine is {self.state}, of epoch {record.epoch}")
            instance = self._receiving.instance
            if instance.state() is not RunState.PAUSED:
                self._drop("its machine ended")
                return
            self._ownership.become(Ownership.RUNNING)
            self._try_to_go_on()
        with self._changed:
            self._changed.notify_all()
        self._told()

    def settle(self, source: Callable[[], PeerState], patience: float) -> Ownership:
        """Wait until it is decided who runs the machine, and ask the source when it is silent.

        :param source: the source's state of the hand-off.
        :param patience: seconds without a record until the copy is given up; the source runs its own then.
        """
        heard, count, wait = time.monotonic(), self.count, _FIRST_ASK
        while self.state in (Ownership.RECEIVING, Ownership.LOADED):
            before = self.state
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)
            if self._receiving.instance.wait(0):
                self._drop_unless_running("its machine ended")
            elif self.count != count or self.state is not before:
                heard, count, wait = time.monotonic(), self.count, _FIRST_ASK
            elif self.state is Ownership.RECEIVING and time.monotonic() - heard > patience:
                self._drop_unless_running(f"nothing came from the source for {patience:.0f} s")
            elif self.state is Ownership.LOADED and time.monotonic() - heard > wait:
                wait += min(wait, _LONGEST_WAIT)
                with suppress(OSError):  # it cannot be written down: it is asked again
                    self._ask(source)
                if self.state is Ownership.LOADED and time.monotonic() - heard > DOUBT_SECONDS:
                    self.in_doubt = True
                    self._told()
        self._see_to_it()
        return self.state

    def _see_to_it(self) -> None:
        """Have a machine go on that is this site's, if that could not be done at once."""
        while self.state is Ownership.RUNNING and not (self._goes or self._receiving.instance.wait(0)):
            self._try_to_go_on()
            time.sleep(_FIRST_WAIT)

    def _try_to_go_on(self) -> None:
        """Have the machine run, unless its user had paused it; nothing happens if it does, or cannot now."""
        instance = self._receiving.instance
        with suppress(CloudletError, OSError):
            if self._goes:
                return
            if not self._ownership.record.paused:
                instance.resume()
            # Who has come already is let in now: a guest that does not run yet would not hear them.
            instance.hold_connections(False)
            self._goes = True
            # Beside: a QEMU that waits for pages answers when they have come.
            threading.Thread(target=self._announce, name="announce", daemon=True).start()

    def _announce(self) -> None:
        with suppress(CloudletError, OSError):  # who has its address finds it later
            self._receiving.instance.announce()

    def take(self) -> None:
        """An operator's word, while the source is silent: the machine runs here, though it may run there too.

        :raises ConflictError: it is not complete.
        """
        self.commit(self._ownership.record.epoch)

    def drop(self, reason: str) -> None:
        """Give up the copy, which never ran.

        :raises ConflictError: it runs.
        """
        with self._loading:
            if self.state in (Ownership.RUNNING, Ownership.FILLING):
                raise ConflictError("the instance runs here")
            self._drop(reason)
        with self._changed:
            self._changed.notify_all()
        self._told()

    def _ask(self, source: Callable[[], PeerState]) -> None:
        answer = answered(source)
        if answer and answer.state in (Ownership.COMMITTED, Ownership.COMPLETED):
            self.commit(self._ownership.record.epoch)
        elif answer and answer.state == Ownership.REVERTED:
            self._drop_unless_running(f"the source kept it: {answer.reason}")

    def _drop_unless_running(self, reason: str) -> None:
        with suppress(ConflictError, OSError):
            self.drop(reason)

    def _drop(self, reason: str) -> None:
        self._ownership.become(Ownership.DROPPED, reason=reason)

    def _take(self, record: Record) -> None:
        if record.kind is not RecordKind.END:
            self._reader.take(record)
            return
        try:
            ended = self._reader.take(record)
            assert ended
            self._end(ended)
        except CloudletError as error:
            # To send it again would change nothing.
            self._drop(error.message)
            raise

    def _end(self, ended: Ended) -> None:
        """All has come."""
        self._receiving.load(ended.device_state)
        if any(ended.full) and self._receiving.instance.digest() != ended.full:
            raise FailedError("the whole memory or disk differs from the source's")
        self._ownership.become(Ownership.LOADED)


def _reason_of(error: BaseException) -> str:
    """Why a hand-off came to nothing, for who reads of it."""
    if isinstance(error, OSError):
        error = of_the_system(error)
    return error.message if isinstance(error, CloudletError) else f"a defect: {error!r}"


def answer_of(arrival: Arrival, told: dict[str, Any]) -> PeerState:
    """What the target says of an arrival."""
    return PeerState(arrival.state, arrival.count, told=told, reason=arrival.reason)
