"""The page of the hand-off: its promises, and the tables that stand behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from benchmarks import report
from benchmarks.handoff import (
    ALLOCS_MIB,
    BUSY,
    DISKS_MIB,
    LARGE_MEMORY_MIB,
    NOT_CONVERGING,
    PAUSE,
    PROMISED,
    RATES,
    THIN,
    WAYS,
)
from benchmarks.handoff_many import AT_ONCE
from benchmarks.handoff_qemu import DOWNTIME_MS
from benchmarks.report import Figures, Line, MissingError, Row
from benchmarks.results import Results
from benchmarks.transfers import wire
from cloudlet.model import MEBIBYTE

_DOES = {0: "idle", 5: "5 MiB/s changed", 20: "20 MiB/s changed"}
_HAS = {"base": "the base only", "overlay": "the app's overlay too"}
_FORECAST_SLACK = 0.25
_PAUSE_AT_120, _PAUSE_PER_100 = 0.090, 0.050
_GAP_BEYOND = 0.1
_MANY_MIB, _MANY_MIB_EACH = 96, 8
_EARLY_PAUSE, _EARLY_GAP = 0.2, 2.0


def migration_seconds(f: Figures, busy: int, rate: int) -> tuple[float, bool]:
    """What QEMU's live migration takes, and whether it was computed: from an idle guest's bytes.

    :raises MissingError: it was not measured, or does not converge.
    """
    try:
        return f(f"migration.{busy}.{rate}.seconds_s"), False
    except MissingError:
        if busy:
            raise
    carried = f(f"migration.0.{PROMISED}.bytes")
    beyond = f(f"migration.0.{PROMISED}.seconds_s") - wire(carried, PROMISED)
    return wire(carried, rate) + max(0.0, beyond), True


def _faster(f: Figures, busy: int, way: str, times: float, part: int = 0) -> Row:
    """Beside QEMU's live migration: so many times faster, and one such part of its bytes."""
    name, beside = f"handoff.{busy}.{way}.{PROMISED}", f"migration.{busy}.{PROMISED}"
    ours, theirs = f(f"{name}.seconds_s"), f(f"{beside}.seconds_s")
    carried, whole = f(f"{name}.bytes"), f(f"{beside}.bytes")
    promise = f">= {times:.0f} x faster" + (f", <= 1/{part} of its bytes" if part else "")
    return Row(
        f"hand-off at {PROMISED} Mbit/s, {_DOES[busy]}, the target has {_HAS[way]}",
        promise,
        f"{theirs / ours:.1f} x faster, 1/{whole / carried:.0f} of its bytes: "
        f"{f.seconds(f'{name}.seconds_s')}, {_mib(carried)}; from the request to the operation's end "
        f"{f.seconds(f'{name}.operation_s')}",
        f"QEMU live migration + disk copy {f.seconds(f'{beside}.seconds_s')}, {_mib(whole)} "
        f"({_mib(f(f'{beside}.disk_bytes'))} of it disk){_broken(f, busy)}",
        theirs >= times * ours and carried * part <= whole,
    )


def _equal(f: Figures) -> Row:
    runs = f.samples("handoff.equal")
    if not runs:
        raise MissingError("handoff.equal")
    count, good = len(runs), round(sum(runs))
    return Row(
        f"{_DOES[5]}, {PROMISED} Mbit/s, there and back: memory and disk of both ends, compared whole",
        "equal in all of 50",
        f"equal in {good} of {count}" + (f"; {note}" if (note := f.note("handoff.equal")) else ""),
        "; ".join(_lost(f, busy) for busy in BUSY if f.samples(f"migration.{busy}.{PROMISED}.failed")),
        count >= 50 and good == count,
    )


def _pause(f: Figures) -> Row:
    """The pause where little is private, and how it grows with that."""
    points = [
        (f(f"handoff.alloc.{held}.private_mib"), f(f"handoff.alloc.{held}.pause_s")) for held in ALLOCS_MIB
    ]
    (x0, y0), (x1, y1) = points[0], points[-1]
    per_100 = 100 * (y1 - y0) / (x1 - x0)
    name = f"handoff.5.overlay.{PROMISED}"
    private, pause = f(f"{name}.private_mib"), f(f"{name}.pause_s")
    most = _PAUSE_AT_120 + max(0.0, private - 120) / 100 * _PAUSE_PER_100
    listed = ", ".join(f"{x:.0f} MiB {y * 1000:.0f} ms" for x, y in points)
    return Row(
        f"pause, from the stop to running, proof of equality included, {PROMISED} Mbit/s",
        "<= 90 ms at 120 MiB of private memory, <= 50 ms per further 100 MiB",
        f"{_ms(f, f'{name}.pause_s')} at {private:.0f} MiB, {_DOES[5]}; by private memory, idle: {listed}: "
        f"{per_100 * 1000:.0f} ms per 100 MiB",
        "",
        pause <= most and per_100 <= _PAUSE_PER_100,
    )


def _gap(f: Figures) -> Row:
    name = f"handoff.5.overlay.{PROMISED}"
    gap, pause = f(f"{name}.gap_s"), f(f"{name}.pause_s")
    theirs = f(f"migration.0.{PROMISED}.gap_s")
    with suppress(MissingError):
        theirs = f(f"migration.5.{PROMISED}.gap_s")
    return Row(
        f"longest gap in the answers to a client who asks every 10 ms, {_DOES[5]}, {PROMISED} Mbit/s",
        "<= the pause + 100 ms, and <= QEMU's",
        f"{_ms(f, f'{name}.gap_s')}, pause {pause * 1000:.0f} ms; "
        f"for a client who knows only the old address {_ms(f, f'{name}.old_gap_s')}",
        f"QEMU's gap {theirs * 1000:.0f} ms{_gaps(f)}",
        gap <= pause + _GAP_BEYOND and gap <= theirs,
    )


def _deadline(f: Figures) -> Row:
    """Where it cannot converge: in time, and with the pause that was forecast."""
    parts, met = [], True
    for rate in THIN:
        for way in WAYS:
            name = f"handoff.5.{way}.{rate}"
            took, pause, forecast = (f(f"{name}.{what}_s") for what in ("seconds", "pause", "forecast_pause"))
            deadline = f(f"{name}.deadline_s")
            met &= took <= deadline + 0.05 * deadline and abs(pause / forecast - 1) <= _FORECAST_SLACK
            parts.append(
                f"{rate} Mbit/s, {_HAS[way]}: {took:.1f} s of {deadline:.0f}, pause {pause:.1f} s, forecast "
                f"{forecast:.1f} s ({pause / forecast - 1:+.0%})"
            )
    ended = f("migration.5.10.ended")
    return Row(
        f"{_DOES[5]} over 10 and 5 Mbit/s, where it cannot converge",
        "ends by its deadline with the pause that it forecast (within 25 %)",
        "; ".join(parts),
        "QEMU, at 10 Mbit/s: " + ("ended" if ended else f"had not ended after {NOT_CONVERGING:.0f} s"),
        met,
    )


def _early(f: Figures) -> Row:
    """The same with a switch before all memory is there."""
    parts, met = [], True
    for rate in THIN:
        name = f"handoff.early.{rate}"
        pause, gap = f(f"{name}.pause_s"), f(f"{name}.gap_s")
        met &= pause <= _EARLY_PAUSE and gap <= _EARLY_GAP and all(f.samples(f"{name}.early"))
        parts.append(f"{rate} Mbit/s: pause {_ms(f, f'{name}.pause_s')}, gap {_ms(f, f'{name}.gap_s')}")
    whole = ", ".join(f"{rate} Mbit/s {f(f'handoff.5.overlay.{rate}.gap_s'):.1f} s" for rate in THIN)
    return Row(
        f"the same with an early switch, the target has {_HAS['overlay']}",
        "pause <= 0.2 s, gap <= 2 s",
        "; ".join(parts),
        f"gap without it: {whole}",
        met,
    )


def _many(f: Figures) -> Row:
    """Many at once."""
    seconds = sorted(f.samples("handoff.many.operation_s"))
    if not seconds:
        raise MissingError("handoff.many.operation_s")
    median, slowest, count = f("handoff.many.operation_s"), seconds[-1], len(seconds)
    grown = {
        where: f(f"handoff.many.{where}_most_mib") - f(f"handoff.many.{where}_before_mib")
        for where in ("near", "far")
    }
    most = _MANY_MIB + _MANY_MIB_EACH * count
    said = ", ".join(
        f"{name} {f(f'handoff.many.{where}_before_mib'):.0f} -> {f(f'handoff.many.{where}_most_mib'):.0f} MiB"
        for name, where in (("source", "near"), ("target", "far"))
    )
    return Row(
        f"{AT_ONCE} hand-offs at once over one link of {PROMISED} Mbit/s, the target has {_HAS['overlay']}",
        f"all end, the slowest within 2 x the median; memory <= {_MANY_MIB} MiB + {_MANY_MIB_EACH} MiB each",
        f"{count} ended: median {median:.1f} s, slowest {slowest:.1f} s ({slowest / median:.2f} x), "
        f"{_mib(f('handoff.many.bytes'))} in all; processes of the sites, without the machines: {said}",
        "",
        count >= AT_ONCE and slowest <= 2 * median and max(grown.values()) <= most,
    )


LINES: tuple[Line, ...] = (
    lambda f: _faster(f, 0, "base", 5, 6),
    lambda f: _faster(f, 0, "overlay", 30, 100),
    lambda f: _faster(f, 5, "base", 7),
    lambda f: _faster(f, 5, "overlay", 25),
    _equal,
    _pause,
    _gap,
    _deadline,
    _early,
    _many,
)
"""The specification's, in its order."""


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The page of the documentation."""
    f = Figures(results)
    large = f"MiB held besides, in a guest of {LARGE_MEMORY_MIB} MiB"
    lines = [
        "# Measured: the hand-off",
        "",
        *report.origin(about, "python -m benchmarks --only handoff"),
        "Two sites on this machine, each with the base; a wire between them (`benchmarks/wire.py`) that "
        "shapes each direction to a rate; no round trip is added. The guest has 512 MiB, one CPU. The "
        "application (`benchmarks/guests/counter`) holds 16 MiB twice and overwrites a buffer of 48 MiB as "
        "fast as it is told; what it writes compresses to a quarter. *Bytes* are the wire's own count, both "
        "ways, TLS and HTTP included. *Seconds* begin when the target is ready to be filled, and end when "
        f"all of the machine is there; a pause of {PAUSE * 1000:.0f} ms was asked for. *Gap*: the longest "
        "time between two answers to a client who asks every 10 ms, at both addresses; its connection is cut "
        "in between. After each hand-off the application's memory was digested and its count looked at.",
        "",
        "QEMU: the same machine on the same wire to a plain QEMU with the same base, which is there before "
        "the clock starts. Its disk is mirrored over NBD, then its memory is migrated, with "
        f"{DOWNTIME_MS} ms of downtime. The target is held back while the memory of both is compared; that "
        "time is taken off.",
        "",
        "![seconds, bytes, gaps and pauses](handoff.png)",
        "",
        *report.table(report.rows(results, LINES)),
        "",
        *_failed(f),
        *_by_rate(f),
        *_switched_early(f),
        *_grown("By private memory", large, "alloc", ALLOCS_MIB, f),
        *_grown("By what was written to the disk", "MiB written", "disk", DISKS_MIB, f),
    ]
    return "\n".join(lines)


def _by_rate(f: Figures) -> Iterator[str]:
    heads = (
        "Mbit/s", "changes", "target has", "s", "MiB", "rounds", "pause, ms", "forecast", "gap, ms",
        "at the old address", "CPU s, source", "CPU s, target", "QEMU: s", "MiB", "gap, ms",
    )  # fmt: skip
    yield from ("## By the link's rate", "", f"| {' | '.join(heads)} |")
    yield "| ---: | --- | --- |" + " ---: |" * (len(heads) - 3)
    for rate in RATES:
        for busy in BUSY:
            for way in WAYS:
                if f.samples(f"handoff.{busy}.{way}.{rate}.seconds_s"):
                    yield f"| {' | '.join(_cells(f, rate, busy, way))} |"
    yield from (
        "",
        f"Medians. *c*: computed, from the bytes at {PROMISED} Mbit/s. CPU: of the two keepers. Empty: not "
        "measured, did not converge, or ended dead.",
        "",
    )


def _cells(f: Figures, rate: int, busy: int, way: str) -> Iterator[str]:
    """One hand-off, and QEMU's migration beside it."""
    name, beside = f"handoff.{busy}.{way}.{rate}", f"migration.{busy}.{rate}"
    yield from ("not shaped" if rate == RATES[-1] else str(rate), _DOES[busy], way)
    yield f"{f(f'{name}.seconds_s'):.2f}"
    yield f"{f(f'{name}.bytes') / MEBIBYTE:.1f}"
    yield f"{f(f'{name}.rounds'):.0f}"
    for what in ("pause", "forecast_pause", "gap", "old_gap"):
        yield f"{f(f'{name}.{what}_s') * 1000:.0f}"
    for end in ("source", "target"):
        yield f"{f(f'{name}.{end}_cpu_s'):.2f}"
    yield _if_any(lambda: _computed(*migration_seconds(f, busy, rate)))
    yield _if_any(lambda: f"{f(f'{beside}.bytes') / MEBIBYTE:.0f}")
    yield _if_any(lambda: f"{f(f'{beside}.gap_s') * 1000:.0f}")


def _switched_early(f: Figures) -> Iterator[str]:
    """The early switch, where the link does not carry what is changed."""
    rates = [rate for rate in THIN if f.samples(f"handoff.early.{rate}.seconds_s")]
    if not rates:
        return
    yield from (f"## Switched early, {_DOES[5]}, the target has {_HAS['overlay']}", "")
    heads = (
        "Mbit/s", "stop after, s", "pause, ms", "gap, s", "pages missing then", "waited for",
        "all there after, s", "MiB",
    )  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|" + " ---: |" * len(heads)
    for rate in rates:
        name = f"handoff.early.{rate}"
        cells = (
            str(rate),
            f"{f(f'{name}.seconds_s'):.1f}",
            f"{f(f'{name}.pause_s') * 1000:.0f}",
            f"{f(f'{name}.gap_s'):.2f}",
            f"{f(f'{name}.missing_pages'):.0f}",
            f"{f(f'{name}.wanted_pages'):.0f}",
            f"{f(f'{name}.serving_s'):.1f}",
            f"{f(f'{name}.bytes') / MEBIBYTE:.1f}",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _failed(f: Figures) -> Iterator[str]:
    """How many hand-offs came to nothing, if any did."""
    if failed := round(sum(f.samples("handoff.failed"))):
        yield (
            f"Of {len(f.samples('handoff.failed'))} hand-offs {failed} did not go, and are in no figure; the "
            f"last one said: {f.note('handoff.failed')}."
        )
        yield ""


def _grown(title: str, of: str, name: str, sizes: Sequence[int], f: Figures) -> Iterator[str]:
    if not all(f.samples(f"handoff.{name}.{size}.seconds_s") for size in sizes):
        return
    yield from (f"## {title}", "", f"| {of} | private, MiB | s | MiB on the wire | pause, ms | gap, ms |")
    yield "|" + " ---: |" * 6
    for size in sizes:
        at = f"handoff.{name}.{size}"
        cells = (
            str(size),
            f"{f(f'{at}.private_mib'):.0f}",
            f"{f(f'{at}.seconds_s'):.2f}",
            f"{f(f'{at}.bytes') / MEBIBYTE:.1f}",
            f"{f(f'{at}.pause_s') * 1000:.0f}",
            f"{f(f'{at}.gap_s') * 1000:.0f}",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _computed(seconds: float, computed: bool) -> str:
    return f"{seconds:.1f}" + (" c" if computed else "")


def _if_any(figure: Callable[[], str]) -> str:
    try:
        return figure()
    except MissingError:
        return ""


def _lost(f: Figures, busy: int) -> str:
    """What became of QEMU's migrations of a guest."""
    name = f"migration.{busy}.{PROMISED}"
    runs, failed = len(f.samples(f"{name}.failed")), round(sum(f.samples(f"{name}.failed")))
    differing = [round(pages) for pages in f.samples(f"{name}.differing_pages") if pages]
    dead = f.samples(f"{name}.alive").count(0)
    pages = f" ({', '.join(map(str, differing))})" if differing else ""
    return (
        f"QEMU, {_DOES[busy]}: of {runs} migrations {len(differing)} with pages that differ{pages}, {dead} "
        f"with a dead guest, {failed} that failed"
    )


def _broken(f: Figures, busy: int) -> str:
    return f"; {_lost(f, busy)}" if busy else ""


def _gaps(f: Figures) -> str:
    return _if_any(lambda: f" (idle {f(f'migration.0.{PROMISED}.gap_s') * 1000:.0f} ms)")


def _ms(f: Figures, name: str) -> str:
    low, high = f.range(name)
    return f"{f(name) * 1000:.0f} ms ({low * 1000:.0f}-{high * 1000:.0f}, {len(f.samples(name))} runs)"


def _mib(count: float) -> str:
    return f"{count / MEBIBYTE:.1f} MiB"
