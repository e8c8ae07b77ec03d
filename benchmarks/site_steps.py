"""What TaskFlow costs: an operation whose two steps do nothing, and the same steps called without it.

All else is the same in both: the operation is read, noted as running, each step noted as it begins and ends,
the end noted with an event. What TaskFlow adds is its own rows, which say after a crash what was done.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

from benchmarks.lab import Lab
from benchmarks.results import Results
from cloudlet.api.identity import OPERATOR
from cloudlet.errors import CloudletError
from cloudlet.service.options import Listening, read_options
from cloudlet.service.site import ServedSite
from cloudlet.service.steps import Flow, Lane, Running, Step
from cloudlet.service.work import Work, operation
from cloudlet.settings import Settings, read_files
from cloudlet.store.rows import Operation, OperationState

_KIND = "benchmark.nothing"


class _Nothing(Step):
    """A step that does nothing."""

    def do(self) -> None:
        """Nothing."""


class _First(_Nothing):
    step: ClassVar[str] = "first"


class _Second(_Nothing):
    step: ClassVar[str] = "second"


_FLOWS = {_KIND: Flow((_First, _Second))}


class _Later:
    """A queue of which nothing is taken: operations are done when they are to be measured."""

    def post(self, operation: Operation, lane: Lane) -> None:
        """Nothing."""

    def known(self) -> set[str]:
        return set()

    def close(self) -> None:
        """Nothing."""


class _Plain:
    """Calls the steps, in the place of the engine that has TaskFlow do it."""

    def run(self, running: Running, flow: Flow) -> tuple[OperationState, CloudletError | None]:
        for step in flow.steps:
            step(running).execute()
        return OperationState.SUCCEEDED, None

    def forget(self, operation: Operation) -> None:
        """There is nothing."""


class _PlainWork(Work):
    """Operations without TaskFlow, which no crash survives."""

    _engine: _Plain  # type: ignore[assignment]

    def __init__(self, site: ServedSite) -> None:
        super().__init__(site, _FLOWS, _Later(), lambda *_: None)
        self._engine = _Plain()


def taskflow(lab: Lab, results: Results) -> None:
    """Operations of two steps that do nothing, through TaskFlow and in turns without it."""
    folder = lab.scratch / "steps"
    settings = Settings(folder / "cache", folder / "state", folder / "keys", hypervisor="fake")
    options = replace(read_options(read_files("/dev/null"), settings), listening=Listening(folder / "none"))
    site = ServedSite.open(options)
    try:
        site.housekeeping.close()  # nobody else shall find an operation that is to be measured
        ways = {
            "taskflow": Work(site, _FLOWS, _Later(), lambda *_: None),
            "plain": _PlainWork(site),
        }
        for turn in range(1 + lab.times(5, 2)):
            for way, work in ways.items():
                _turn(results if turn else Results(), way, site, work, lab.times(50, 10))
    finally:
        site.close()


def _turn(results: Results, way: str, site: ServedSite, work: Work, count: int) -> None:
    begun = [
        site.database.write(lambda connection: work.add(connection, operation(_KIND, OPERATOR, {})))
        for _ in range(count)
    ]
    began, used = time.monotonic(), time.thread_time()
    for one in begun:
        work.perform(one.id)
    results.add(f"steps.{way}.ms", 1000 * (time.monotonic() - began) / count)
    results.add(f"steps.{way}.cpu_ms", 1000 * (time.thread_time() - used) / count)
