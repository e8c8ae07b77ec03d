"""Hand-off of a running instance between two sites, beside QEMU's own live migration in the same run.

The application (``guests/counter``) holds 16 MiB twice and changes a buffer of 48 MiB as much as it is told.
*base*: the target has the base and nothing else of it. *overlay*: it has the application's overlay, too.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import apps
from benchmarks.handoff_qemu import migrate
from benchmarks.handoff_sites import HTTP_PORT, Load, Sites, ask, mib, port_of, settle, sites, url_of
from benchmarks.lab import MEMORY_MIB, Lab, say
from benchmarks.results import Results
from cloudlet.errors import FailedError

RECIPE = Path(__file__).parent / "guests" / "counter"
LARGE_MEMORY_MIB = 2048
"""Of the guest that holds the most."""
WAYS = {"base": "nothing", "overlay": "overlay"}
"""What the target has, and how a hand-off is told so."""
PROMISED = 100
"""Mbit/s of most promises."""
RATES = (5, 10, 25, 100, 1000)
"""Mbit/s; the last is not shaped: the wire carries what the processors let it."""
THIN = (10, 5)
"""Mbit/s that do not carry what the application changes."""
BUSY = (0, 5, 20)
"""MiB per second that the application changes."""
ALLOCS_MIB = (0, 100, 300, 1000)
DISKS_MIB = (0, 50, 200)
PAUSE, DEADLINE, SLOW_DEADLINE = 0.1, 60.0, 120.0
"""What is asked of a hand-off, in seconds; and where all of a machine takes a link longer than that."""
DEADLINE_BUSY = 40.0
"""Where it cannot converge: until when it is to have switched."""
NOT_CONVERGING = 120.0
"""So long QEMU is given where it does not converge."""
EQUAL_RUNS, EQUAL_DEADLINE = 50, 15.0
"""How often equality is looked at; what a busy guest changes is still enough when it switches by then."""


def counter(memory_mib: int = MEMORY_MIB) -> apps.App:
    """The application that is handed off."""
    return apps.App("counter", RECIPE, HTTP_PORT, memory_mib, {}, (), _answers)


def _answers(url: str, timeout: float) -> None:
    ask(f"{url}/held", timeout)


def promised(lab: Lab, results: Results) -> None:
    """Idle and busy at 100 Mbit/s, in turns with QEMU's live migration."""
    app = counter()
    with sites(lab, app) as both:
        for turn in range(lab.times(5)):
            for busy in BUSY[: lab.times(3, 2)]:
                for way in WAYS:
                    say(f"turn {turn + 1}: hand-off, {busy} MiB/s, {way}")
                    _move(both, results, way, PROMISED, Load(busy))
                if turn < lab.times(3 if busy < BUSY[-1] else 1):
                    say(f"turn {turn + 1}: QEMU, {busy} MiB/s")
                    _migrate(lab, app, results, PROMISED, busy, NOT_CONVERGING)


def by_rate(lab: Lab, results: Results) -> None:
    """By the link's rate, idle and busy; and QEMU where it converges, or is seen not to."""
    app = counter()
    rates = [rate for rate in RATES if rate != PROMISED]
    with sites(lab, app) as both:
        for rate in (25,) if lab.quick else rates:
            thin = rate in THIN
            for busy in BUSY[: lab.times(2)]:
                for way in WAYS:
                    say(f"hand-off at {rate} Mbit/s, {busy} MiB/s, {way}")
                    for _ in range(lab.times(3 if way == "overlay" and not (thin and busy) else 1)):
                        _move(both, results, way, rate, Load(busy))
        for rate in () if lab.quick else THIN:
            for _ in range(lab.times(3)):
                say(f"early hand-off at {rate} Mbit/s, 5 MiB/s, overlay")
                _move(both, results, "overlay", rate, Load(5), f"handoff.early.{rate}", "early")
    if lab.quick:
        return
    for busy in BUSY[:2]:
        _migrate(lab, app, results, RATES[-1], busy)
    say("QEMU at 10 Mbit/s, 5 MiB/s")
    _migrate(lab, app, results, 10, 5, NOT_CONVERGING)


def by_memory(lab: Lab, results: Results) -> None:
    """By private memory: what the application holds besides; nothing of that is in its overlay."""
    with sites(lab, counter(MEMORY_MIB if lab.quick else LARGE_MEMORY_MIB)) as both:
        for held in ALLOCS_MIB[: lab.times(4, 2)]:
            for _ in range(lab.times(3)):
                say(f"hand-off with {held} MiB more in memory")
                _move(both, results, "overlay", PROMISED, Load(alloc_mib=held), f"handoff.alloc.{held}")


def by_disk(lab: Lab, results: Results) -> None:
    """By what the application has written to its disk."""
    with sites(lab, counter()) as both:
        for written in DISKS_MIB[: lab.times(3, 2)]:
            for _ in range(lab.times(3)):
                say(f"hand-off with {written} MiB on the disk")
                _move(both, results, "overlay", PROMISED, Load(disk_mib=written), f"handoff.disk.{written}")


def equal(lab: Lab, results: Results) -> None:
    """A busy guest there and back again and again, with all memory and disk compared before each switch."""
    runs = lab.times(EQUAL_RUNS, 4)
    with sites(lab, counter()) as both:
        both.wire.rate(PROMISED)
        with both.instance(Load(5)) as instance:
            held = ask(f"{url_of(instance)}/held")
            here, there = both.near, both.far
            for turn in range(runs):
                way = list(WAYS)[turn // 2 % 2]
                say(f"{turn + 1} of {runs}: {way}")
                terms = {"verify": "full", "overlay": WAYS[way], "deadline_seconds": EQUAL_DEADLINE}
                try:
                    both.hand_off(here, there, instance["id"], **terms)
                except FailedError as error:
                    say(f"  {error.message}")
                    results.notes.setdefault("handoff.equal", error.message)
                    results.add("handoff.equal", False)
                    continue
                here, there = there, here
                settle(here.settings, instance["id"])
                url = f"http://{here.address}:{port_of(instance, HTTP_PORT)}"
                results.add("handoff.equal", ask(f"{url}/held") == held)


def _deadline(way: str, rate: int, load: Load) -> float:
    if rate >= 25:
        return DEADLINE
    return DEADLINE_BUSY if load.busy_mib and way == "overlay" else SLOW_DEADLINE


def _move(
    both: Sites, results: Results, way: str, rate: int, load: Load, name: str = "", switch: str = "whole"
) -> None:
    """Hand a new instance off, and note what it took; one that does not go is noted as such.

    :param name: of its figures; by default after what is handed off.
    """
    name = name or f"handoff.{load.busy_mib}.{way}.{rate}"
    both.wire.rate(0 if rate == RATES[-1] else rate)
    deadline = _deadline(way, rate, load)
    terms = {"overlay": WAYS[way], "pause_seconds": PAUSE, "deadline_seconds": deadline, "switch": switch}
    try:
        with both.instance(load) as instance:
            moved = both.move(instance, **terms)
    except FailedError as error:
        say(f"  {error.message}")
        results.add("handoff.failed", True)
        results.notes["handoff.failed"] = error.message
        return
    results.add("handoff.failed", False)
    said = moved.statistics
    for figure in ("seconds", "pause_seconds", "forecast_pause_seconds"):
        results.add(f"{name}.{figure.removesuffix('_seconds')}_s", said[figure])
    results.add(f"{name}.rounds", said["rounds"])
    results.add(f"{name}.private_mib", mib(said["private_bytes"]))
    results.add(f"{name}.bytes", moved.carried_bytes)
    results.add(f"{name}.operation_s", moved.operation_seconds)
    results.add(f"{name}.gap_s", moved.gap_seconds)
    results.add(f"{name}.old_gap_s", moved.old_gap_seconds)
    results.add(f"{name}.source_cpu_s", moved.source_cpu_seconds)
    results.add(f"{name}.target_cpu_s", moved.target_cpu_seconds)
    results.add(f"{name}.deadline_s", deadline)
    if switch == "early":
        for figure in ("early", "missing_pages", "wanted_pages"):
            results.add(f"{name}.{figure}", said[figure])
        results.add(f"{name}.serving_s", said["serving_seconds"])
    say(
        f"  {said['seconds']:.2f} s, {mib(moved.carried_bytes):.1f} MiB, {said['rounds']} rounds, pause "
        f"{said['pause_seconds'] * 1000:.0f} ms, gap {moved.gap_seconds * 1000:.0f} ms"
    )


def _migrate(lab: Lab, app: apps.App, results: Results, rate: int, busy: int, seconds: float = 300.0) -> None:
    """Migrate as QEMU does, and note what that took; a migration that failed is noted as such."""
    name = f"migration.{busy}.{rate}"
    try:
        mbit = 0 if rate == RATES[-1] else rate
        done = migrate(lab.site, apps.overlay_of(lab, app), lab.scratch, mbit, Load(busy), seconds)
    except FailedError as error:
        say(f"  QEMU: {error.message}")
        results.add(f"{name}.failed", 1)
        results.notes[name] = error.message
        return
    results.add(f"{name}.failed", 0)
    results.add(f"{name}.ended", done is not None)
    if done is None:
        say(f"  QEMU has not migrated in {seconds:.0f} s")
        return
    results.add(f"{name}.seconds_s", done.seconds)
    results.add(f"{name}.bytes", done.carried_bytes)
    results.add(f"{name}.disk_bytes", done.disk_bytes)
    results.add(f"{name}.differing_pages", done.differing_pages)
    results.add(f"{name}.alive", done.alive)
    if done.alive:
        results.add(f"{name}.gap_s", done.gap_seconds)
    say(
        f"  {done.seconds:.2f} s, {mib(done.carried_bytes):.1f} MiB, gap {done.gap_seconds * 1000:.0f} ms, "
        f"{done.differing_pages} pages differ, the guest is {'well' if done.alive else 'dead'}"
    )
