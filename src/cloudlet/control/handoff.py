"""Hand-off: a running machine follows its user to another cloudlet.

At the source a :class:`Departure` sends, round by round and while the machine runs, what the target cannot
rebuild from what it holds. When what is left fits the pause that was asked for, the machine stands still, the
last round is exact, both ends prove that they have the same, and the source gives the machine away. At the
target an :class:`~cloudlet.control.arrival.Arrival` loads what comes into a paused machine, and lets it run
when it is its own.

Who may run it is written down at each end before anything follows (:mod:`~cloudlet.control.ownership`); the
protocol, and what each end does when the other is silent, is ``docs/formats/handoff.md``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cloudlet.control.courier import Courier, Peer, PeerState, answered
from cloudlet.control.ownership import DOUBT_SECONDS, Ownership, OwnershipFile
from cloudlet.control.pace import GUESSED_RATE, Forecast, Pace, Terms
from cloudlet.control.sending import Parcel, Sender, sending
from cloudlet.control.serving import Serving
from cloudlet.errors import CloudletError, ConflictError, FailedError, UnreachableError, of_the_system
from cloudlet.model import PAGE_BYTES

_HAS_RUN = (Ownership.RUNNING, Ownership.FILLING, Ownership.LOST)
"""The target was told that it may run the machine, though here that is forgotten."""
_STANDING_SECONDS, _LOADING_SECONDS = 10.0, 90.0
"""So long the machine stands still for a peer that does not answer, and for one that answers and loads; then
it goes on here."""
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_LOOK_SECONDS = 0.25
_TELL_SECONDS = 1.0
"""Between two words about how far the first round is."""
_UNWRITTEN_SECONDS = 0.5
"""Between two attempts to write down what is decided, where the disk is full."""


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
    """Why it waits for an operator, or what keeps it up while pages are missing at the target."""


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
        self._courier: Courier | None = None
        """What takes records over, once the machine was stopped."""
        self._stood_at = self._told_at = 0.0
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
            with sending(self._parcel, self._peer, self._terms, self._pace, self._stopped) as sender:
                if self._copy(sender):
                    self._switch_early(sender)
                else:
                    self._switch(sender)
        except BaseException as error:
            silent = isinstance(error.__cause__, UnreachableError) or self._unheard
            self.revert(_reason_of(error), silent=silent)
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

    @property
    def _unheard(self) -> bool:
        """Whether the machine was stopped, and nothing that was sent since has been answered."""
        return self._courier is not None and self._courier.heard < self._stood_at

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

    def _copy(self, sender: Sender) -> bool:
        """Send rounds while the machine runs, until what is left fits or there is no more time.

        The answer is whether what is left is to be sent after the switch.
        """
        assert self._parcel
        self._tell(self._pace.begun(*sender.estimate()))
        while True:
            before = sender.courier.sent
            done = sender.round(partial(self._tell_within, sender.courier))
            sender.courier.flush()
            self._pace.ended(replace(done, bytes=sender.courier.sent - before))
            self.statistics.bytes = sender.courier.sent
            self.statistics.rounds = done.number
            if sender.whole:
                sender.rounds.pass_over_layer()
            self._parcel.instance.prepare_pause()
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

    def _switch(self, sender: Sender) -> None:
        """The machine stands still, the rest goes over, both ends have the same: then it is given away."""
        assert self._parcel
        instance = self._parcel.instance
        device_state = self._stop(sender)
        sender.round()
        full = instance.digest() if self._terms.verify_full else bytes(32)
        sender.end(device_state, full)
        self._give_away(sender.courier.flush(), sender)

    def _switch_early(self, sender: Sender) -> None:
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
                answer = self._loaded(serving, sender.courier)
                if not self._stands_here():  # what is missing would never come
                    raise FailedError("its machine ended")
                sender.courier.persist()
                if serving.error:
                    raise serving.error
                self._give_away(answer, sender)
                serving.hurries = False
                self._serving = serving
                self.conclude()
            finally:
                self._serving = None
                self._stopped.set()
                self.statistics.bytes = sender.courier.sent

    def _stop(self, sender: Sender, *, early: bool = False) -> bytes:
        """The machine stands still; its device state."""
        assert self._parcel
        self._ownership.become(Ownership.SWITCHING, early=early)
        self._tell()
        sender.courier.patience = min(sender.courier.patience, _STANDING_SECONDS)
        self._stood_at, self._sent_before = time.monotonic(), sender.courier.sent
        self._courier = sender.courier
        self._parcel.instance.hold_connections(True)
        device_state, _ = sender.rounds.settle()
        return device_state

    def _loaded(self, serving: Serving, courier: Courier) -> PeerState:
        """What the target says when it has loaded the machine, or has given up.

        :raises FailedError: it is silent, or takes too long.
        """
        began = time.monotonic()
        while True:
            answer, now = serving.hear(_LOOK_SECONDS), time.monotonic()
            if answer:
                courier.heard = now
                if answer.state != Ownership.RECEIVING:
                    return answer
            if serving.error:
                raise serving.error
            if self._stopped.is_set():
                raise FailedError("the hand-off was cancelled")
            if now - max(began, courier.heard) > _STANDING_SECONDS:
                silence = UnreachableError(f"nothing came for {_STANDING_SECONDS:.0f} s")
                raise FailedError(f"the peer does not answer: {silence.message}") from silence
            if now - began > _LOADING_SECONDS:
                raise FailedError(f"the target has not loaded the machine in {_LOADING_SECONDS:.0f} s")

    def _give_away(self, answer: PeerState, sender: Sender) -> None:
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
            if answer:
                heard, lost = now, self._lost_as_of(answer)
            with self._deciding, suppress(OSError):  # it cannot be written down: it is looked at again
                if answer and answer.state == Ownership.RUNNING:
                    self._ownership.become(Ownership.COMPLETED)
                elif self._word is Ownership.REVERTED:
                    self._revert("an operator resumed it as of the switch", as_of_switch=True)
                elif self._word or (lost and not self._stands_here()):
                    self._ownership.become(Ownership.LOST, reason=lost or "an operator gave it up")
            if now - told > _LOOK_SECONDS:
                told, silent = now, now - heard > DOUBT_SECONDS
                self._tell(
                    self._left_to_serve(), in_doubt=bool(lost) or silent, error=lost or self._trouble()
                )
        if self._stood_at:
            self.statistics.serving_seconds = round(time.monotonic() - self._stood_at, 3)

    def _lost_as_of(self, answer: PeerState) -> str:
        """Why the instance is lost at the target, as that says now; empty: it is not."""
        if answer.state in (Ownership.LOST, Ownership.DROPPED, "unknown"):
            return answer.reason or "it is gone at the target"
        if answer.state == Ownership.FILLING and not self._can_serve():
            return "its machine ended at the source before all of its memory had gone over"
        return ""

    def _trouble(self) -> str:
        """Why pages do not get on just now; empty: they do."""
        trouble = self._serving.trouble if self._serving else None
        return _reason_of(trouble) if trouble else ""

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

    def _tell_within(self, courier: Courier, changed: int) -> None:
        """Tell how far the first round is, now and then."""
        now = time.monotonic()
        if self.statistics.rounds or now - self._told_at < _TELL_SECONDS or not courier.sent:
            return
        self._told_at, self.statistics.bytes = now, courier.sent
        self._tell(self._pace.within(round(changed * courier.share), courier.sent))

    def _tell(self, forecast: Forecast | None = None, *, in_doubt: bool = False, error: str = "") -> None:
        statistics = self.statistics
        self._told(Progress(self.state, statistics.rounds, statistics.bytes, forecast, in_doubt, error))


def _reason_of(error: BaseException) -> str:
    """Why a hand-off came to nothing, for who reads of it."""
    if isinstance(error, OSError | MemoryError):
        error = of_the_system(error)
    return error.message if isinstance(error, CloudletError) else f"a defect: {error!r}"
