"""The applications of the early start, each with the requests that are timed and what must come back.

Two lie between the extremes: the reference application and the route planner. The *heap* is large and its
answers need little of it; *everything* reads all of its memory for each answer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.answers import REFERENCE, REFERENCE_PORT, Question, Reference, reference_model
from benchmarks.guests.reference.model import model
from benchmarks.lab import MEMORY_MIB, MODEL_MIB, ROUTE_PLANNER, Lab
from cloudlet.errors import FailedError

HEAP = REFERENCE.with_name("heap")
EVERYTHING = REFERENCE.with_name("everything")
REQUESTS = 10
HEAP_MIB = 200
GROWTH_MEMORY_MIB = 1024
GROWTH_HEAPS_MIB = (18, 88, 366)
"""Heaps whose overlays have about 16, 64 and 256 MiB; the largest needs a guest of 1 GiB, so all get one."""
_EVERYTHING_MIB = 32
_WARM_PLACES = tuple(n * 1_500_007 for n in range(REQUESTS))
"""Where the reference application's warm-up asks."""
_INDEX, _PIECE, _STEP = 256 << 10, 64 << 10, 40_961
"""Of the heap's index; what ``guests/heap/files/heap.py`` says."""


@dataclass(frozen=True, slots=True)
class App:
    """An application: how its overlay is made, and how it is asked."""

    name: str
    recipe: Path
    port: int
    memory_mib: int
    """Of the guest's base."""
    environment: Mapping[str, str]
    """What the recipe's ``prepare`` is told."""
    requests: tuple[Question, ...]
    """Ten different ones, of the kind that its warm-up makes; the first is also its readiness request, or
    needs more than that."""
    all: Question
    """Needs all of the application's memory, or as much as its own front door reaches."""
    unforeseen: Question | None = None
    """Asks for what no warm-up has met, if its front door lets one."""
    removed: Mapping[str, str] = field(default_factory=dict)
    """Files that it removes once they are loaded: places in the guest, and what ``prepare`` called them."""

    @property
    def key(self) -> str:
        """What its figures are called."""
        return self.recipe.name

    def first(self, url: str, timeout: float) -> None:
        """The first request: the first answer is timed by it."""
        self.requests[0](url, timeout)

    def tenth(self, url: str, timeout: float) -> None:
        """All ten requests, one after the other, with a time limit for each."""
        for request in self.requests:
            request(url, timeout)


def reference(seed: int, mib: int = MODEL_MIB) -> App:
    """The reference application, asked where its warm-up asks; or at places that it cannot foresee."""
    ask = Reference(mib, seed)

    digests = {"digests": [hashlib.sha256(reference_model(mib)).hexdigest()] * 2}
    environment = {"REFERENCE_MIB": str(mib)}
    requests = tuple(partial(ask.at, place) for place in _WARM_PLACES)
    return App(
        "reference", REFERENCE, REFERENCE_PORT, MEMORY_MIB, environment, requests,
        lambda url, timeout: _expect(f"{url}/digest", timeout, digests), ask,
    )  # fmt: skip


def route_planner() -> App:
    """The route planner: one iteration on 20 customers from ten seeds; and a large problem, and its page."""
    check = _module(ROUTE_PLANNER / "check.py")
    small, large = (
        (ROUTE_PLANNER / "data" / f"{name}.vrp").read_text() for name in ("X-n200-first20", "X-n303-k21")
    )

    def plan(url: str, timeout: float, problem: str, query: str) -> None:
        report = check.check(problem, _get(f"{url}/plan?{query}", timeout, problem.encode())["routes"])
        if not report.ok:
            raise FailedError(f"the route planner answers wrongly: {report.violations}")

    def asker(seed: int) -> Question:
        return lambda url, timeout: plan(url, timeout, small, f"iterations=1&seed={seed}")

    def everything(url: str, timeout: float) -> None:
        plan(url, timeout, large, "iterations=1")
        with urllib.request.urlopen(f"{url}/", timeout=timeout) as page:
            if b"<svg" not in page.read():
                raise FailedError("the route planner's page draws no plan")

    requests = tuple(asker(seed) for seed in range(REQUESTS))
    return App(
        "route planner", ROUTE_PLANNER, 8080, MEMORY_MIB, {}, requests, everything,
        lambda url, timeout: plan(url, timeout, large, "iterations=1"),
    )  # fmt: skip


def heap(mib: int = HEAP_MIB, memory_mib: int = MEMORY_MIB) -> App:
    """A heap of so many MiB, an even number; making it here too, to check answers, takes seconds.

    :param memory_mib: of the guest: at least 256 more.
    """
    content = model(mib)
    start = (len(content) - _INDEX) // 2
    index, digest = content[start : start + _INDEX], hashlib.sha256(content).hexdigest()

    def asker(at: int) -> Question:
        place = at * _STEP % (_INDEX - _PIECE)
        piece = hashlib.sha256(index[place : place + _PIECE]).hexdigest()
        right = {"at": at, "place": start + place, "piece": piece}
        return lambda url, timeout: _expect(f"{url}/answer?at={at}", timeout, right)

    def whole(url: str, timeout: float) -> None:
        _expect(f"{url}/digest", timeout, {"bytes": mib << 20, "digest": digest})

    requests = tuple(asker(at) for at in range(REQUESTS))
    return App(
        f"heap of {mib} MiB", HEAP, 9091, memory_mib, {"HEAP_MIB": str(mib)}, requests, whole,
        removed={"/opt/heap/heap.bin": "heap.bin"},
    )  # fmt: skip


def everything() -> App:
    """The application that reads all of its memory for each answer."""
    content = model(_EVERYTHING_MIB)

    def asker(at: int) -> Question:
        right = {"at": at, "bytes": len(content), "sum": zlib.crc32(content, at)}
        return lambda url, timeout: _expect(f"{url}/answer?at={at}", timeout, right)

    requests = tuple(asker(at) for at in range(REQUESTS))
    return App("everything", EVERYTHING, 9092, MEMORY_MIB, {}, requests, requests[0])


def overlay_of(lab: Lab, app: App) -> Path:
    """The application's overlay, made with trials, kept."""
    return lab.overlay_of(app.recipe, app.environment, app.memory_mib)


def _expect(url: str, timeout: float, right: dict[str, Any]) -> None:
    if (answer := _get(url, timeout)) != right:
        raise FailedError(f"{url}: {answer} instead of {right}")


def _get(url: str, timeout: float, body: bytes | None = None) -> dict[str, Any]:
    with urllib.request.urlopen(url, body, timeout) as answer:
        document: dict[str, Any] = json.load(answer)
        return document


def _module(path: Path) -> ModuleType:
    """A program of an example, which stands in no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks.examples_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
