"""The fault matrix of the early switch, with real machines: what fails while memory is still at the source.

The faults are those of ``handoff_faults.py``. While pages are missing the instance can be lost, and it has
to be lost then at both sites; what stands at the source is resumed as of the switch by an operator's word.
Who watches knows of processes, threads and what the guests answer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from cloudlet.control.ownership import Ownership
from tests.service import busy
from tests.service.handoff_faults import FAULTS, STEPS, Cell, Fault, Outcome, Step, play
from tests.service.handoff_world import SOON, World, wait_for
from tests.service.watching import Guest, Observer, processes_below, watching

_PROGRAM = b"qemu-system"
_LOOK_SECONDS = 0.04
_RUNS_NS = 3_000_000
"""Of processor time in a look: a guest that writes all the time uses more, also beside much else; one that
stands still uses none."""

SERVING = Step("serving", lambda *_: False, lambda view: view.departure is Ownership.SERVING, waits=False)
EARLY_STEPS = (*(step for step in STEPS if step.name in ("switching", "loaded", "committed")), SERVING)
EARLY_CELLS = tuple(
    (step, fault)
    for step in EARLY_STEPS
    for fault in FAULTS
    if (step.name if step is not SERVING else "running") in fault.only
)
"""The matrix."""


class Machine(Guest):
    """A QEMU, as the kernel shows it."""

    def worked(self) -> int:
        """Nanoseconds for which all threads but the first have run: that of the guest's processor, mostly."""
        total = 0
        with suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                if task.name != str(self.pid):
                    with suppress(OSError):
                        total += int((task / "schedstat").read_text().split()[0])
        return total

    def runs(self) -> bool:
        return bool(_at_work([self], 5 * _LOOK_SECONDS))


def _at_work(machines: list[Machine], seconds: float = _LOOK_SECONDS) -> list[Machine]:
    """Those whose guests run meanwhile."""
    before = [machine.worked() for machine in machines]
    time.sleep(seconds)
    return [
        machine for machine, was in zip(machines, before, strict=True) if machine.worked() - was > _RUNS_NS
    ]


def machines_below(folder: Path) -> list[Machine]:
    """The QEMUs whose folders are somewhere below a folder."""
    return processes_below(folder, _PROGRAM, Machine)


class MachineObserver(Observer[Machine]):
    """Looks at what processor time machines use; two may never use it in two looks in a row."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, machines_below)
        self._before = False

    def look(self, guests: list[Machine]) -> None:
        both = len(_at_work(guests)) > 1
        self.ran_twice |= both and self._before
        self._before = both
        self.looks += 1


class BusyUser:
    """Who asks the guest how often it has written, and for what it never changes."""

    def __init__(self, world: World) -> None:
        self.problems: list[str] = []
        self.counted = 0
        self._world = world
        self._cold = b""

    def begin(self) -> None:
        """Begin with a new guest."""
        instance = self._instance()
        self.problems.clear()
        self._cold = busy.cold(instance)
        busy.begin(instance)
        wait_for(lambda: busy.turn(instance) > busy.TURNS, SOON, "it does not write")
        self.look()

    def look(self) -> None:
        self.counted = busy.turn(self._instance())

    def counts_on(self, _: Guest) -> bool:
        """Whether it has written more often than before."""
        deadline = time.monotonic() + SOON
        while busy.turn(self._instance()) <= self.counted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def verify(self, _: Guest) -> list[str]:
        """What it does not have any more."""
        return [] if busy.cold(self._instance()) == self._cold else ["what it never changes has changed"]

    def _instance(self) -> dict[str, Any]:
        instance = self._world.instance
        assert instance
        return self._world.sites[self._world.at].call.instance(instance["id"])


class EarlyWorld(World):
    """Two sites with real machines."""

    settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "DEFAULT": {"hypervisor": "qemu", "accelerator": "tcg"}
    }
    state_mib = 1024

    def guests(self, which: int | None = None) -> list[Guest]:
        return list(machines_below(self.folder if which is None else self.sites[which].folder))

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.observer, self.user = MachineObserver(self.folder), BusyUser(self)
        with watching(self.observer.run):
            yield


class EarlyCell(Cell):
    """One hand-off with an early switch, in which one thing fails at one step."""

    terms: ClassVar[Mapping[str, Any]] = busy.TERMS
    ends = Cell.ends | {("lost", "lost"), ("lost", None), ("reverted", "lost")}
    gone = ("moved", "failed")
    """Where it was lost, and is resumed at the source."""

    def hold(self) -> dict[str, Any]:
        assert isinstance(self.world.user, BusyUser)
        self.world.user.look()
        return super().hold()

    def resolve(self, said: Mapping[str, Any]) -> None:
        """It ended at the target, and stands at the source: have it go on there, as of the switch."""
        if said["departure"] == "in_doubt" and said["arrival"] == "lost":
            word = {"resolve": {"action": "resume_as_of_switch"}}
            self.source.call("POST", f"/v1/handoffs/{self.view.handoff}/resolve", word)


def may_become(step: Step, fault: Fault, away: float) -> set[Outcome]:
    """What may become of it.

    :param away: seconds for which something was away.
    """
    decided = step.name in ("committed", "serving")
    if fault.kills == "source":
        return {("lost", False)} if decided else {("reverted", False)}
    if fault.kills == "target":
        return {("reverted", True)}
    return {("completed", True)} | ({("reverted", True)} if fault.reverts and not decided else set())


def run_early_cell(world: World, step: Step, fault: Fault, source: int, dice: random.Random) -> list[str]:
    """Have a thing fail at a step of an early switch from a site; what is not as it has to be."""
    return play(EarlyCell(world, step, source, dice), fault, may_become)
