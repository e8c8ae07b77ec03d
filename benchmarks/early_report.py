"""The page of the early start: its promises, and the tables that stand behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from benchmarks import report
from benchmarks.again import COUNTS, RATE, WAYS
from benchmarks.apps import GROWTH_HEAPS_MIB, HEAP_MIB
from benchmarks.early import NEXT, PROMISED_RATES, RATES, RTT, RTTS
from benchmarks.report import Figures, Line, MissingError, Row
from benchmarks.results import Results
from benchmarks.transfers import wire
from cloudlet.model import MEBIBYTE

APPS = {
    "reference": "reference application",
    "route-planner": "route planner",
    "heap": f"heap of {HEAP_MIB} MiB",
    "everything": "everything",
}
"""What the figures' names call them, and what people do."""
_REFERENCE = "reference"
_T = TypeVar("_T")
_MOST_STALL, _MOST_SPREAD = 0.5, 0.20


def eager_seconds(f: Figures, key: str, rate: int) -> tuple[float, bool]:
    """The first answer of a start that waits for all bytes, and whether it was computed.

    Then it is the wire's time at this rate and what the fastest link showed beyond its own.
    """
    try:
        return f(f"eager.{key}.{rate}.first_s"), False
    except MissingError:
        size, fastest = f(f"early.{key}.overlay_bytes"), RATES[-1]
        beyond = f(f"eager.{key}.{fastest}.first_s") - wire(size, fastest)
        return wire(size, rate) + max(0.0, beyond), True


def image_and_boot_seconds(f: Figures, key: str, rate: int) -> float:
    """The full image's time on the wire, computed, and its boot as it was measured."""
    return wire(f(f"early.{key}.image_bytes"), rate) + f(f"early.{key}.boot_s")


def _first(f: Figures, rate: int, promise: float) -> Row:
    name = f"early.{_REFERENCE}.{rate}.{RTT}"
    ours, (eager, computed) = f(f"{name}.first_s"), eager_seconds(f, _REFERENCE, rate)
    image = image_and_boot_seconds(f, _REFERENCE, rate)
    return Row(
        f"early start at {rate} Mbit/s, round trip {RTT} ms, overlay of {_mib(f, _REFERENCE)}: first answer",
        f"<= {promise} s",
        f"{f.seconds(f'{name}.first_s')}, the site's own readiness request (status 200) before it "
        f"{f.seconds(f'{name}.answering_s')}; for a client who asks from the start "
        f"{f.seconds(f'{name}.known.first_s')}; {eager / ours:.0f} x and {image / ours:.0f} x faster",
        f"all bytes first {eager:.1f} s{' (computed)' if computed else ''}; "
        f"full image + boot {image:.0f} s (wire computed)",
        ours <= promise,
    )


def _sizes(f: Figures) -> Row:
    parts, spreads = [], []
    for rate in PROMISED_RATES:
        times = {mib: f(f"early.size.{mib}.{rate}.first_s") for mib in GROWTH_HEAPS_MIB}
        spreads.append(max(times.values()) / min(times.values()) - 1)
        listed = ", ".join(f"{seconds:.2f} s" for seconds in times.values())
        parts.append(f"{rate} Mbit/s: {listed}, spread {spreads[-1]:.0%}")
    sizes = ", ".join(f"{f(f'early.size.{mib}.overlay_bytes') / MEBIBYTE:.0f}" for mib in GROWTH_HEAPS_MIB)
    return Row(
        f"early start by the overlay's size: {sizes} MiB, guest of 1 GiB",
        f"within {_MOST_SPREAD:.0%}",
        "; ".join(parts),
        "",
        max(spreads) <= _MOST_SPREAD,
    )


def _stalls(f: Figures) -> Row:
    foreseen = f(f"stalls.{_REFERENCE}.foreseen_s")
    return Row(
        f"the slowest of the next {NEXT} requests while the rest arrives, 10 Mbit/s, round trip {RTT} ms",
        f"<= {_MOST_STALL} s of the kind that the warm-up made",
        f"{f.seconds(f'stalls.{_REFERENCE}.foreseen_s')}; "
        f"at places that nothing foresaw {f.seconds(f'stalls.{_REFERENCE}.unforeseen_s')}",
        f"when all is here {f.seconds(f'stalls.{_REFERENCE}.here_s')}",
        foreseen <= _MOST_STALL,
    )


def _second(f: Figures) -> Row:
    seconds, each = f(f"second.{_REFERENCE}.second_s"), f(f"second.{_REFERENCE}.further.all_mib")
    return Row(
        "second and later starts of an app at a site: first answer; memory of each further instance",
        "<= 0.35 s; <= 60 MiB",
        f"{f.seconds(f'second.{_REFERENCE}.second_s')}; beside another instance "
        f"{f.seconds(f'second.{_REFERENCE}.beside_s')}; {each:.0f} MiB, "
        f"{f(f'second.{_REFERENCE}.further.ram_own_mib'):.0f} of it guest RAM, "
        f"{f(f'second.{_REFERENCE}.further.translated_mib'):.0f} translated code",
        f"first start, {RATE} Mbit/s: {f.seconds(f'second.{_REFERENCE}.first_s')}",
        seconds <= 0.35 and each <= 60,
    )


LINES: Sequence[Line] = (
    lambda f: _first(f, 10, 0.9),
    lambda f: _first(f, 100, 0.5),
    _sizes,
    _stalls,
    _second,
)


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The page of the documentation."""
    f = Figures(results)
    lines = [
        "# Measured: the early start",
        "",
        *report.origin(about, "python -m benchmarks --only early"),
        "The link is emulated (`benchmarks/link.py`): a rate, a round trip, slow start, ranges on "
        "connections of their own. Time is counted from when the first byte is asked for, opening the "
        "connection included, to when a client has read the right answer to its end; it is given the "
        "address when the app's own readiness rule holds. No start knows the app from before, but "
        "for those that say so. *Early*: resumed with the first bytes. *Eager*: resumed when all is here.",
        "",
        "Four applications, 512 MiB of RAM. The *reference application* holds a model of 16 MiB twice. The "
        "*route planner* plans for 20 customers. The *heap* needs for its answers 256 KiB of what it holds; "
        "*everything* needs for each answer all of its 32 MiB, and is what an early start gains least from. "
        "The publisher's warm-up asked what the ten requests ask (reference), or the same with other "
        "numbers.",
        "",
        "![first answer by the link's rate](early.png)",
        "",
        *report.table(report.rows(results, LINES)),
        "",
    ]
    for part in (_curves, _size_table, _stall_table, _storm_text, _second_table, _memory_table):
        lines += [*part(f), ""]
    return "\n".join(lines)


def _curves(f: Figures) -> Iterator[str]:
    for key, name in APPS.items():
        yield f"## {name[0].upper()}{name[1:]}: overlay of {_mib(f, key)}, image of {_mib(f, key, 'image')}\n"
        trips = [f"first answer, {rtt} ms" for rtt in RTTS]
        yield _row("Mbit/s", *trips, "tenth", "all touched", "eager: first", "image + boot")
        yield _row(*["---:"] * (len(RTTS) + 5))
        for rate in RATES:
            firsts = [_seconds(f, f"early.{key}.{rate}.{rtt}.first_s") for rtt in RTTS]
            tenth, whole = (_seconds(f, f"early.{key}.{rate}.{RTT}.{what}_s") for what in ("tenth", "all"))
            yield _row(str(rate), *firsts, tenth, whole, _eager(f, key, rate), _image(f, key, rate))
        yield ""
    yield (
        f"Seconds; tenth, all, eager at a round trip of {RTT} ms. *c*: computed, the time on the wire from "
        "the bytes and the rest as it was measured."
    )


def _size_table(f: Figures) -> Iterator[str]:
    yield "## By the overlay's size\n"
    yield _row("overlay, MiB", *(f"first answer at {rate} Mbit/s" for rate in PROMISED_RATES))
    yield _row(*["---:"] * (len(PROMISED_RATES) + 1))
    for mib in GROWTH_HEAPS_MIB:
        size = _number(f, f"early.size.{mib}.overlay_bytes", MEBIBYTE)
        yield _row(size, *(_spread(f, f"early.size.{mib}.{rate}.first_s") for rate in PROMISED_RATES))


def _stall_table(f: Figures) -> Iterator[str]:
    yield f"## The slowest of the next {NEXT} requests, 10 Mbit/s, {RTT} ms\n"
    yield _row("", "as in the warm-up", "the same, all here", "not foreseen", "the same, all here")
    yield _row("---", *["---:"] * 4)
    for key, name in APPS.items():
        ways = ("foreseen", "here", "unforeseen", "here_unforeseen")
        if (cells := [_spread(f, f"stalls.{key}.{way}_s") for way in ways]) != ["-"] * 4:
            yield _row(name, *cells)


def _storm_text(f: Figures) -> Iterator[str]:
    yield "## Beside a storm\n"
    yield (
        f"While another instance reads all of its heap of {HEAP_MIB} MiB as it comes over a link of 10 "
        f"Mbit/s of its own, the slowest of {NEXT} requests to the reference application behind such a link: "
        f"{_spread(f, 'storm.beside_s')} s; alone {_spread(f, 'storm.alone_s')} s. The other waited "
        f"{_number(f, 'storm.stalls')} times meanwhile."
    )


def _second_table(f: Figures) -> Iterator[str]:
    counts = [f"MiB of {count}" for count in COUNTS]
    yield f"## Again at the same site, {RATE} Mbit/s, {RTT} ms\n"
    yield _row(
        "", "first start", "second", "beside others", *counts, "each further", "its own RAM", "its code"
    )
    yield _row("---", *["---:"] * (len(COUNTS) + 6))
    for key in ("reference", "route-planner"):
        starts = (_spread(f, f"second.{key}.{which}_s") for which in ("first", "second", "beside"))
        sums = (_number(f, f"second.{key}.{count}.all_mib") for count in COUNTS)
        further = (
            _number(f, f"second.{key}.further.{part}_mib") for part in ("all", "ram_own", "translated")
        )
        yield _row(APPS[key], *starts, *sums, *further)
    yield ""
    yield (
        "Seconds, and MiB of PSS of QEMU and its network process, idle after an answer. *Its code*: what "
        "QEMU has translated the guest's code into, for each machine on its own; under KVM there is none."
    )


def _memory_table(f: Figures) -> Iterator[str]:
    names = {
        "early": "early, all has come", "image": "from the apps' images", "full": "eager",
    }  # fmt: skip
    parts = ("qemu", "network", "pages", "cache", "all")
    yield f"## Memory of {_number(f, 'memory.instances')} instances of three apps, MiB\n"
    yield _row("", "QEMU", "network", "page servers", "cache besides", "together", "RAM: own", "RAM: shared")
    yield _row("---", *["---:"] * 7)
    for way in WAYS:
        sums = [_number(f, f"memory.{way}.{part}_mib") for part in parts]
        yield _row(names[way], *sums, _number(f, f"memory.{way}.ram_own_mib"), _shared(f, way))
    yield ""
    yield (
        "PSS, summed: what several share is counted once. *Cache besides*: what the kernel keeps of the page "
        "servers' files and no machine has mapped. *RAM: own*: pages of guest RAM that are an instance's "
        "alone, written or loaded. *RAM: shared*: pages mapped from a file, summed over the instances, and "
        "in brackets what they take; a page server's file is one instance's, all others are shared by all "
        "instances of a base, or of an app's image."
    )


def _shared(f: Figures, way: str) -> str:
    try:
        own, share, mapped = (f(f"memory.{way}.ram_{part}_mib") for part in ("own", "shared", "mapped"))
    except MissingError:
        return "-"
    return f"{mapped - own:.0f} ({share - own:.0f})"


def _eager(f: Figures, key: str, rate: int) -> str:
    return _or_dash(lambda: eager_seconds(f, key, rate), lambda found: f"{found[0]:.1f}{' c' * found[1]}")


def _image(f: Figures, key: str, rate: int) -> str:
    return _or_dash(lambda: image_and_boot_seconds(f, key, rate), lambda seconds: f"{seconds:.0f} c")


def _seconds(f: Figures, name: str) -> str:
    return _or_dash(lambda: f(name), lambda seconds: f"{seconds:.2f}")


def _number(f: Figures, name: str, unit: int = 1) -> str:
    return _or_dash(lambda: f(name), lambda value: f"{value / unit:.0f}")


def _spread(f: Figures, name: str) -> str:
    """A median with its range."""
    return _or_dash(lambda: f.seconds(name), lambda text: text.replace(" s", ""))


def _or_dash(figure: Callable[[], _T], show: Callable[[_T], str]) -> str:
    try:
        return show(figure())
    except MissingError:
        return "-"


def _mib(f: Figures, key: str, what: str = "overlay") -> str:
    return _or_dash(lambda: f(f"early.{key}.{what}_bytes"), lambda count: f"{count / MEBIBYTE:.1f} MiB")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
