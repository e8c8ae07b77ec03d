"""A model of two sites that hand one fake machine off to each other, while everything that can fails.

What decides is the very code that runs: :class:`~cloudlet.control.handoff.Departure` and ``Arrival``, with
records on a real disk and machines that are real processes. Only the wire between them is the model's: it
loses, repeats, damages and delays messages, and kills who sends or gets them, at the message that the plan
says. A kill is what the kernel does: nothing of the killed end runs any more, and nothing is written.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudlet.control.arrival import Arrival
from cloudlet.control.courier import PeerState
from cloudlet.control.handoff import Departure
from cloudlet.control.ownership import Ownership, OwnershipFile, Record, read_record
from cloudlet.control.pace import Terms
from cloudlet.control.sending import Parcel
from cloudlet.errors import CloudletError, FailedError, NotFoundError, UnreachableError
from cloudlet.hypervisor.driver import BaseImage, Hypervisor, Instance, Receiving, RunState
from cloudlet.hypervisor.fake.driver import FakeHypervisor
from cloudlet.hypervisor.fake.instance import FakeInstance
from cloudlet.model import PublishedPort
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageSource, runs_of
from cloudlet.overlay.rounds import RoundReader
from cloudlet.settings import Settings

PORT = 8080
MESSAGES = ("records", "commit", "drop", "state", "ask")
"""Of a hand-off; ``ask`` is the target's question how the source has decided."""
FAULTS = ("request lost", "answer lost", "twice", "again later", "damaged", "source killed", "target killed",
          "target killed after", "source machine killed", "target machine killed")  # fmt: skip
_SEED = 0x5EED


class Killed(BaseException):
    """Whoever was killed does nothing any more."""


@dataclass(frozen=True)
class Fault:
    """What happens to the message of a kind that is the ``nth`` of its kind."""

    message: str
    nth: int
    kind: str


class MortalFile(OwnershipFile):
    """The record of an end that may be killed: then nothing is written any more."""

    def __init__(self, folder: Path, record: Record, dead: threading.Event) -> None:
        self._dead = dead
        super().__init__(folder, record)

    def become(self, state: Ownership, **changes: Any) -> None:
        if self._dead.is_set():
            raise Killed
        super().become(state, **changes)


@dataclass
class End:
    """One end of a hand-off: its folder, and whether it was killed."""

    folder: Path
    dead: threading.Event = field(default_factory=threading.Event)
    machine: Instance | None = None
    receiving: Receiving | None = None
    arrival: Arrival | None = None

    def kill(self) -> None:
        """As the kernel does: nothing more is written, and its machine goes with it."""
        self.dead.set()
        self.kill_machine()

    def kill_machine(self) -> None:
        instance = self.receiving.instance if self.receiving else self.machine
        if isinstance(instance, FakeInstance) and instance.record.machine:
            instance.record.machine.kill()
            instance.record.machine.wait(10.0)

    def record(self) -> Record | None:
        return read_record(self.folder)


class Wire:
    """The way from the source to the target. See :class:`cloudlet.control.courier.Peer`."""

    def __init__(self, source: End, target: End, plan: Sequence[Fault]) -> None:
        self._source, self._target = source, target
        self._plan = list(plan)
        self._counts = dict.fromkeys(MESSAGES, 0)
        self._lock = threading.Lock()
        self._later: list[Callable[[], PeerState]] = []
        self.happened: list[Fault] = []

    def state(self, wait: float = 0.0) -> PeerState:
        return self._carry("state", self._say)

    def records(self, first: int, body: bytes) -> PeerState:
        def load(content: bytes = body) -> PeerState:
            arrival = self._living()
            if arrival:
                arrival.records(first, content)
            return self._say()

        return self._carry("records", load, lambda: load(_damaged(body)))

    def commit(self, epoch: int) -> PeerState:
        def commit() -> PeerState:
            if arrival := self._living():
                arrival.commit(epoch)
            return self._say()

        return self._carry("commit", commit)

    def drop(self) -> PeerState:
        def drop() -> PeerState:
            if arrival := self._living():
                arrival.drop("the source keeps it")
            return self._say()

        return self._carry("drop", drop)

    def close(self) -> None:
        """Nothing stays on its way here."""

    def ask(self) -> PeerState:
        """The target asks how the source has decided."""

        def say() -> PeerState:
            record = self._source.record()
            if record is None:
                raise NotFoundError("there is no such hand-off")
            return PeerState(record.state, reason=record.reason)

        return self._carry("ask", say)

    def heal(self) -> None:
        """Nothing fails from here on; what was to come again later comes now."""
        with self._lock:
            self._plan.clear()
            later, self._later = self._later, []
        for again in later:
            with suppress(CloudletError, Killed):
                again()

    def _carry(
        self, message: str, deliver: Callable[[], PeerState], damaged: Callable[[], PeerState] | None = None
    ) -> PeerState:
        asking = message == "ask"
        sender, getter = (self._target, self._source) if asking else (self._source, self._target)
        if sender.dead.is_set():
            raise Killed
        fault = self._fault(message)
        if getter.dead.is_set() and not asking and self._left_alone():
            pass  # its site answers, from what is written down
        match fault.kind if fault else "":
            case "request lost":
                raise UnreachableError("the request was lost")
            case "answer lost":
                with suppress(CloudletError):
                    deliver()
                raise UnreachableError("the answer was lost")
            case "twice":
                with suppress(CloudletError):
                    deliver()
            case "again later":
                with self._lock:
                    self._later.append(deliver)
            case "damaged" if damaged:
                return damaged()
            case "source killed":
                self._source.kill()
                raise Killed
            case "target killed":
                self._target.kill()
                raise UnreachableError("the target was killed")
            case "target killed after":
                with suppress(CloudletError):
                    deliver()
                self._target.kill()
                raise UnreachableError("the target was killed")
            case "source machine killed":
                self._source.kill_machine()
            case "target machine killed":
                self._target.kill_machine()
        return deliver()

    def _fault(self, message: str) -> Fault | None:
        with self._lock:
            self._counts[message] += 1
            nth = self._counts[message]
            for fault in self._plan:
                if (fault.message, fault.nth) == (message, nth):
                    self.happened.append(fault)
                    return fault
        return None

    def _living(self) -> Arrival | None:
        return None if self._target.dead.is_set() else self._target.arrival

    def _left_alone(self) -> bool:
        """What a site does whose keeper was killed: a machine that never ran is dropped."""
        record = self._target.record()
        if record and record.state in (Ownership.RECEIVING, Ownership.LOADED):
            OwnershipFile(self._target.folder, record).become(
                Ownership.DROPPED, reason="its keeper was killed"
            )
        return True

    def _say(self) -> PeerState:
        record = self._target.record()
        if record is None:
            raise NotFoundError("there is no such hand-off")
        arrival = self._target.arrival
        count = arrival.count if arrival and not self._target.dead.is_set() else 0
        return PeerState(record.state, count, reason=record.reason)


@dataclass
class Outcome:
    """What a hand-off came to."""

    departure: Ownership
    arrival: Ownership
    happened: list[Fault]
    ran_twice: bool
    reasons: tuple[str, str]


class World:
    """Two sites, one machine, and an observer that looks only at machines."""

    def __init__(self, folder: Path, base: BaseImage, pages: BasePages, index: PageIndex) -> None:
        self._folder = folder
        self._base, self._pages, self._index = base, pages, index
        self._stack = ExitStack()
        self._hypervisors: list[Hypervisor] = [
            FakeHypervisor(Settings(folder / name, folder / name, folder / name, hypervisor="fake"))
            for name in "ab"
        ]
        self.at = 0
        self.epoch = 1
        self.handoffs = 0
        self.machine: Instance | None = None
        self.start()

    def close(self) -> None:
        self._stack.close()

    def start(self) -> None:
        """Begin with a new machine, at the first site."""
        if self.machine:
            self.machine.stop()
        incoming = self._hypervisors[0].resume(self._base, [PublishedPort(PORT)])
        self._stack.callback(incoming.abort)
        nothing = runs_of(PageSource.empty().numbers)
        incoming.begin(PageMap(nothing, nothing))
        incoming.finish(self._base.device_state.read_bytes())
        self.machine, self.at, self.epoch = incoming.instance, 0, 1

    def lives(self) -> bool:
        return self.machine is not None and self.machine.state() is not RunState.GONE

    def count(self) -> int:
        """Have the guest count one more; what it says."""
        assert self.machine
        endpoint = self.machine.endpoints[0]
        url = f"http://{endpoint.host}:{endpoint.host_port}/counter"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.read())

    def write(self, space: str, page: int, seed: int) -> None:
        """Have the guest change a page of its memory or its disk."""
        assert self.machine
        endpoint = self.machine.endpoints[0]
        query = f"space={space}&page={page}&seed={seed}"
        with urllib.request.urlopen(
            f"http://{endpoint.host}:{endpoint.host_port}/write?{query}", timeout=20
        ) as answer:
            assert answer.status == 200

    def hand_off(self, plan: Sequence[Fault], *, full: bool = False) -> Outcome:
        """Hand the machine off to the other site; all that fails is back in the end, but who was killed."""
        assert self.machine
        self.handoffs += 1
        number = self.handoffs
        source, target = (End(self._folder / f"{number}-{which}") for which in ("source", "target"))
        for end in (source, target):
            end.folder.mkdir()
        source.machine = self.machine
        before = self.machine
        self._prepare(target, number)
        wire = Wire(source, target, plan)
        observer = _Observer(before, target)
        settled = threading.Thread(target=self._settle, args=(target, wire), daemon=True)
        departure = self._departure(source, wire, number, full=full)
        with observer:
            settled.start()
            self._run(departure.run)
            wire.heal()
            if source.dead.is_set():
                # Its site has found it out, and brings to an end what was written down.
                record = source.record()
                assert record
                left = Departure(
                    OwnershipFile(source.folder, record), wire_of_the_site(wire, source), Terms()
                )
                self._run(left.conclude)
            settled.join(60.0)
            assert not settled.is_alive(), "the target does not settle"
        self._take_stock(source, target)
        ended, come = source.record(), target.record()
        assert ended and come
        reasons = ended.reason, come.reason
        return Outcome(ended.state, come.state, wire.happened, observer.ran_twice, reasons)

    def _prepare(self, target: End, number: int) -> None:
        assert self.machine
        kept = self.machine.generation_id()
        site = self._hypervisors[1 - self.at]
        receiving = site.receive(self._base, [PublishedPort(PORT)], generation_id=kept)
        self._stack.callback(receiving.abort)
        receiving.begin()
        target.receiving = receiving
        reader = RoundReader(KnownPages(self._pages), _SEED + number, receiving.pages)
        record = Record(str(number), "one", self.epoch, Ownership.RECEIVING)
        target.arrival = Arrival(MortalFile(target.folder, record, target.dead), receiving, reader)

    def _departure(self, source: End, wire: Wire, number: int, *, full: bool) -> Departure:
        assert source.machine
        parcel = Parcel(source.machine, KnownPages(self._pages), self._index, _SEED + number, with_layer=True)
        record = Record(str(number), "one", self.epoch, Ownership.COPYING)
        terms = Terms(patience_seconds=1.0, verify_full=full)
        return Departure(MortalFile(source.folder, record, source.dead), wire, terms, parcel)

    def _settle(self, target: End, wire: Wire) -> None:
        assert target.arrival
        with suppress(Killed):
            while not target.dead.is_set():
                state = target.arrival.settle(wire.ask, patience=2.0)
                if state in (Ownership.RUNNING, Ownership.DROPPED):
                    return

    def _run(self, conclude: Callable[[], object]) -> None:
        with suppress(CloudletError, Killed):
            conclude()

    def _take_stock(self, source: End, target: End) -> None:
        """Where the machine is now, as the records say."""
        come, assert_receiving = target.record(), target.receiving
        assert come and assert_receiving
        if come.state is Ownership.RUNNING:
            assert source.machine
            source.machine.stop()
            self.machine, self.at, self.epoch = assert_receiving.instance, 1 - self.at, self.epoch + 1
        else:
            assert_receiving.abort()


def wire_of_the_site(wire: Wire, source: End) -> Wire:
    """The same wire, used by the source's site, which lives."""
    living = End(source.folder, machine=source.machine)
    return Wire(living, wire._target, ())


class _Observer:
    """Looks at both machines again and again: they may never run at the same moment."""

    def __init__(self, source: Instance, target: End) -> None:
        self.ran_twice = False
        self._source, self._target = source, target
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.is_set():
            # The target first: once it runs, the source runs no more.
            if self._runs(self._target.receiving.instance if self._target.receiving else None) and self._runs(
                self._source
            ):
                self.ran_twice = True
            time.sleep(0.002)

    @staticmethod
    def _runs(instance: Instance | None) -> bool:
        try:
            return instance is not None and instance.state() is RunState.RUNNING
        except FailedError:
            return False


def _damaged(body: bytes) -> bytes:
    """Records of which a byte was changed, in the middle."""
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
