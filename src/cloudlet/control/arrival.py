"""The target's end of a hand-off: what comes is loaded into a paused machine, which runs when it is its own.

What it does when the source is silent is ``docs/formats/handoff.md``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO

from cloudlet.control.courier import PeerState, answered
from cloudlet.control.ownership import DOUBT_SECONDS, Ownership, OwnershipFile
from cloudlet.errors import CloudletError, ConflictError, CorruptError, FailedError, of_the_system
from cloudlet.hypervisor.driver import Receiving
from cloudlet.overlay.records import Record, RecordKind, read_record
from cloudlet.overlay.rounds import Ended, RoundReader

_FIRST_ASK, _LONGEST_ASK = 2.0, 5.0
"""Seconds until the source is asked, and between two questions at last."""
_LOOK_SECONDS, _AGAIN_SECONDS = 0.25, 0.1
_TURN_SECONDS = 5.0
"""How long records wait for those before them; then the source is told how many have come, to send again."""


class Arrival:
    """The target's end of one hand-off."""

    _may_lack = False
    """Whether it may run before all of its memory is here."""

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
        self._ended: Ended | None = None
        """What the last record has proven, until what follows from it is done."""
        self._loaded = False
        """Whether its devices are."""
        self._refusal: CloudletError | None = None
        """Why it cannot be completed."""
        self._going = threading.Lock()
        """Held while its machine is told to run."""
        self._goes = threading.Event()
        """Set when its machine has been told so, or to stay as its user wants it."""

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

        None is loaded if those before them do not come: :attr:`count` says so.

        :raises IntegrityError: they are damaged, or what they make is not what the source has.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.count >= first or not self.takes_records, _TURN_SECONDS)
        with self._loading:
            if not self.takes_records or self.count < first:
                return
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

        :raises ConflictError: it is not loaded, or it is of another epoch.
        """
        with self._loading:
            record = self._ownership.record
            if self.state not in (Ownership.RECEIVING, Ownership.LOADED):
                return
            if epoch != record.epoch or self.state is not Ownership.LOADED:
                raise ConflictError(f"the machine is {self.state}, of epoch {record.epoch}")
            if self._receiving.instance.wait(0):
                self._drop("its machine ended")
                return
            self._ownership.become(self._runs_as)
        # Without the lock: records may still come.
        self._try_to_go_on()
        self._note()

    @property
    def _runs_as(self) -> Ownership:
        """What it becomes when it runs."""
        return Ownership.RUNNING

    def _note(self) -> None:
        """Tell who waits that it is otherwise."""
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
                wait += min(wait, _LONGEST_ASK)
                with suppress(OSError):  # it cannot be written down: it is asked again
                    self._ask(source)
                if self.state is Ownership.LOADED and time.monotonic() - heard > DOUBT_SECONDS:
                    self.in_doubt = True
                    self._told()
        self._see_to_it()
        return self.state

    def _see_to_it(self) -> None:
        """Have a machine go on that is this site's, if that could not be done at once."""
        while self.state is Ownership.RUNNING and not self._receiving.instance.wait(0):
            self._try_to_go_on()
            if self._goes.wait(_AGAIN_SECONDS):
                break

    def _try_to_go_on(self) -> None:
        """Have the machine run, unless its user had paused it; nothing happens if it does, or cannot now."""
        instance = self._receiving.instance
        if self._goes.is_set() or not self._going.acquire(blocking=False):
            return
        try:
            done = None if self._ownership.record.paused else instance.begin_resume()
            # Who has come already is let in now: a guest that does not run yet would not hear them.
            instance.hold_connections(False)
            threading.Thread(target=self._go_on, args=(done,), name="go-on", daemon=True).start()
        except (CloudletError, OSError, RuntimeError):
            self._going.release()

    def _go_on(self, done: Callable[[], None] | None) -> None:
        """Wait until the machine says that it runs: its QEMU does when its guest lets it."""
        try:
            with suppress(CloudletError, OSError):
                if done:
                    done()
                self._goes.set()
                # Who has its address finds it later, too.
                self._receiving.instance.announce()
        finally:
            self._going.release()

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
        self._note()

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
        if record.kind is RecordKind.MISSING and not self._may_lack:
            raise CorruptError(f"record {self.count} leaves pages for later, which was not agreed")
        if record.kind is not RecordKind.END:
            self._reader.take(record)
            return
        try:
            if self._refusal:
                raise self._refusal
            # It comes again if what follows from it could not be written down.
            self._ended = self._ended or self._reader.take(record)
            assert self._ended
            self._end(self._ended)
            self._ended = None
        except CloudletError as error:
            # To send it again would change nothing.
            self._refusal = error
            self._drop(error.message)
            raise

    def _end(self, ended: Ended) -> None:
        """All has come; can be done again."""
        if not self._loaded:
            self._load_whole(ended)
            self._loaded = True
        self._ownership.become(Ownership.LOADED)

    def _load_whole(self, ended: Ended) -> None:
        try:
            self._receiving.load(ended.device_state)
            if any(ended.full) and self._receiving.instance.digest() != ended.full:
                raise FailedError("the whole memory or disk differs from the source's")
        except OSError as error:
            raise of_the_system(error) from error
