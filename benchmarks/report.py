"""The table: each promise, the figure reached, what stands beside it, and whether it was kept.

One function per line of the specification (those of the early start: ``early_report.py``); a line whose
parts were not measured is left out. Ratios are of medians of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.density import COUNTS
from benchmarks.engine_run import OVERLAYS_MIB
from benchmarks.growth import MEMORIES_MIB, MODELS_MIB
from benchmarks.results import Results
from benchmarks.transfers import wire
from cloudlet.model import MEBIBYTE

_SLACK = 0.15
"""How far apart figures may lie that are called the same."""
_MET = {True: ("met", "yes"), False: ("MISSED", "**no**"), None: ("", "")}
"""For a terminal, and for a page."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    promise: str
    figure: str
    beside: str
    met: bool | None
    """None where nothing is promised."""


class MissingError(LookupError):
    """A figure that was not measured in this run."""


Line = Callable[["Figures"], Row]


class Figures:
    """Medians by name."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def __call__(self, name: str) -> float:
        value = self._results.median(name)
        if value is None:
            raise MissingError(name)
        return value

    def seconds(self, name: str) -> str:
        """A time with its range, where there are several."""
        median = self(name)
        low, high = self._results.range(name)
        many = len(self._results.samples[name])
        return f"{median:.2f} s" + (f" ({low:.2f}-{high:.2f}, {many} runs)" if many > 1 else "")

    def range(self, name: str) -> tuple[float, float]:
        """The least and the largest."""
        return self._results.range(name)

    def samples(self, name: str) -> list[float]:
        """All of them, in their order; none if it was not measured."""
        return self._results.samples.get(name, [])

    def note(self, name: str) -> str:
        return self._results.notes.get(name, "")


def rows(results: Results, lines: Sequence[Line] | None = None) -> list[Row]:
    """The lines that were measured, in the specification's order: these, or those of bases and overlays."""
    figures = Figures(results)
    made = []
    for line in _LINES if lines is None else lines:
        try:
            made.append(line(figures))
        except MissingError:
            continue
    return made


def image_seconds(f: Figures, mbit: int) -> float:
    """Download of the full image at a rate, computed from its bytes, and the boot as it was measured."""
    return wire(f("image_bytes"), mbit) + f("image.boot_s")


def stream_seconds(f: Figures, mbit: int) -> float:
    """Download of the full stream at a rate, computed from its bytes; the rest as measured at 100 Mbit/s."""
    count = f("stream_zstd_bytes") + f("disk_changes_bytes")
    return wire(count, mbit) + max(0.0, f("stream_100_s") - wire(count, 100))


def _resume(f: Figures) -> Row:
    ours, boot = f("resume.answer_s"), f("boot.base_s")
    return Row(
        "resume of a base, to the answer of the guest's agent",
        "<= 0.35 s, >= 50 x faster than a cold boot",
        f"{f.seconds('resume.answer_s')}; {boot / ours:.0f} x faster",
        f"cold boot of the same image to the same answer: {f.seconds('boot.base_s')}",
        ours <= 0.35 and boot >= 50 * ours,
    )


def _local(f: Figures) -> Row:
    ours, loadvm = f("synthesis.answer_s"), f("loadvm_s")
    return Row(
        "synthesis from a local overlay, to the first answer",
        "<= 0.60 s; not slower than loadvm",
        f"{f.seconds('synthesis.answer_s')}; ready (identity renewed) {f.seconds('synthesis.at_ready_s')}; "
        f"where another instance of the base runs {f.seconds('synthesis_beside.answer_s')}; "
        f"`cloudlet run` from its start as a program {f.seconds('synthesis.command_s')}",
        f"loadvm {f.seconds('loadvm_s')}; full stream restore {f.seconds('restore_s')}; "
        f"cold boot of the full image {f.seconds('boot.full_s')} ({f('boot.full_s') / ours:.0f} x)",
        ours <= 0.60 and ours <= loadvm,
    )


def _ready(f: Figures) -> Row:
    return Row(
        "synthesis from a local overlay, to ready (clock, host name, keys, entropy renewed)",
        "<= 2 s",
        f.seconds("synthesis.at_ready_s"),
        "",
        f("synthesis.at_ready_s") <= 2.0,
    )


def _rate(f: Figures, mbit: int, image_factor: float) -> Row:
    ours, wired = f(f"synthesis_{mbit}.answer_s"), wire(f("overlay_bytes"), mbit)
    image = f("image_100_s") if mbit == 100 else image_seconds(f, mbit)
    stream = f("stream_100_s") if mbit == 100 else stream_seconds(f, mbit)
    bare = stream - wire(f("disk_changes_bytes"), mbit)
    how = "measured" if mbit == 100 else "wire time computed from bytes"
    limit = 1.08 * wired + 0.35
    return Row(
        f"synthesis at {mbit} Mbit/s, all bytes first",
        f"<= 1.08 x wire + 0.35 s; >= {image_factor:.0f} x faster than image + boot; "
        ">= 2.3 x than a full stream",
        f"{f.seconds(f'synthesis_{mbit}.answer_s')} (wire {wired:.2f}, limit {limit:.2f}); "
        f"{image / ours:.1f} x and {stream / ours:.1f} x faster",
        f"full image ({_mib(f('image_bytes'))} qcow2, zstd) + boot {image:.1f} s; "
        f"full stream ({_mib(f('stream_zstd_bytes'))} zstd, and {_mib(f('disk_changes_bytes'))} of disk) + "
        f"restore {stream:.1f} s ({how}); without the disk's changes {bare:.1f} s ({bare / ours:.1f} x)"
        + _our_stream(f),
        ours <= limit and image >= image_factor * ours and stream >= 2.3 * ours,
    )


def _fast_links(f: Figures) -> Row:
    ours, wired = f("synthesis_1000.answer_s"), wire(f("overlay_bytes"), 1000)
    return Row(
        "synthesis at 1000 Mbit/s, all bytes first",
        "<= 1.08 x wire + 0.35 s",
        f"{f.seconds('synthesis_1000.answer_s')} (wire {wired:.2f}, limit {1.08 * wired + 0.35:.2f})",
        "",
        ours <= 1.08 * wired + 0.35,
    )


def _bytes(f: Figures) -> Row:
    ratio = f("created_overlay_bytes") / f("plain_delta_bytes")
    default = f("default.created_overlay_bytes") / f("default.plain_delta_bytes")
    try:
        delta = f"xdelta3 of both files {_mib(f('xdelta_bytes'))} in {f('xdelta_s'):.0f} s"
    except MissingError:
        delta = f"xdelta3: {f.note('xdelta3') or 'not measured'}"
    return Row(
        "overlay bytes / all changed pages and blocks, zstd -3",
        "<= 0.66",
        f"{ratio:.2f} ({_mib(f('created_overlay_bytes'))} / {_mib(f('plain_delta_bytes'))}, "
        f"of {_mib(f('changed_bytes'))} changed)",
        f"on a default guest, whose kernel leaves old bytes in freed pages: {default:.2f}; "
        f"route planner {_planner(f, 'created_overlay_bytes', 'plain_delta_bytes')}; {delta}",
        ratio <= 0.66,
    )


def _kind_guest(f: Figures) -> Row:
    ratio = f("created_overlay_bytes") / f("default.created_overlay_bytes")
    return Row(
        "overlay bytes of the same application: guest built by us / default guest",
        "<= 0.70",
        f"{ratio:.2f} ({_mib(f('created_overlay_bytes'))} / {_mib(f('default.created_overlay_bytes'))})",
        f"route planner {_planner(f, 'created_overlay_bytes', 'default.created_overlay_bytes')}; "
        f"all changed, zstd -3: {_mib(f('plain_delta_bytes'))} / {_mib(f('default.plain_delta_bytes'))}; "
        f"changed: {_mib(f('changed_bytes'))} / {_mib(f('default.changed_bytes'))}",
        ratio <= 0.70,
    )


def _create(f: Figures) -> Row:
    pause, cpu = f("create.pause_per_100_mib_s"), f("create.cpu_per_100_mib_s")
    return Row(
        "create an overlay: pause, and CPU of the encoder, per 100 MiB changed",
        "<= 0.2 s; <= 1.0 s",
        f"{pause:.2f} s; {cpu:.2f} s (as a whole {f('create.pause_s'):.2f} s and {f('create.cpu_s'):.2f} s "
        f"for {f('create.changed_mib'):.0f} MiB)",
        f"full stream of {_mib(f('stream_bytes'))}: pause {f('stream.save_s'):.2f} s, "
        f"CPU {f('stream.save_cpu_s'):.2f} s; savevm {f('savevm_s'):.2f} s",
        pause <= 0.2 and cpu <= 1.0,
    )


def _engine(f: Figures) -> Row:
    ratio = f("engine.real.throughput_ratio")
    return Row(
        "engine, apply on one core, no QEMU: bytes of pages written per second / `zstd -d` of its frames",
        ">= 0.7",
        f"{ratio:.2f} ({f('engine.real.apply_mib_per_second'):.0f} / "
        f"{f('engine.real.zstd_mib_per_second'):.0f} MiB/s); "
        f"synthetic capture {f('engine.synthetic.throughput_ratio'):.2f}",
        "where zstd -d also writes as many bytes as apply: "
        f"{f('engine.real.equal_work_ratio'):.2f}; synthetic {f('engine.synthetic.equal_work_ratio'):.2f}",
        ratio >= 0.7,
    )


def _memory(f: Figures) -> Row:
    one = [f(f"engine.memory_{mib}_mib") for mib in OVERLAYS_MIB]
    more = [f(f"engine.memory_further_{mib}_mib") for mib in OVERLAYS_MIB]
    return Row(
        f"memory of the process that applies, overlays of {', '.join(map(str, OVERLAYS_MIB))} MiB",
        "<= 96 MiB beyond start; + 8 MiB per further transfer",
        f"{', '.join(f'{mib:.0f}' for mib in one)} MiB; + {', '.join(f'{mib:.0f}' for mib in more)} MiB",
        "",
        max(one) <= 96 and max(more) <= 8,
    )


def _density(f: Figures) -> Row:
    each, own = f("density.further.all_mib"), f("density.further.ram_own_mib")
    counted = ", ".join(f"{f(f'density.{count}.all_mib'):.0f}" for count in COUNTS)
    return Row(
        "each further idle instance of one base, PSS",
        "<= 60 MiB, <= 5 MiB of it guest RAM",
        f"{each:.0f} MiB ({f('density.further.qemu_mib'):.0f} QEMU, "
        f"{f('density.further.network_mib'):.0f} its network process), {own:.1f} MiB of it guest RAM; "
        f"sums for {', '.join(map(str, COUNTS))}: {counted} MiB",
        f"restored from a full stream: {f('density.restored.all_mib'):.0f} MiB",
        each <= 60 and own <= 5,
    )


def _grows_with_bytes(f: Figures) -> Row:
    points = [
        (f(f"growth.model_{mib}.overlay_bytes") / MEBIBYTE, f(f"growth.model_{mib}.answer_s"))
        for mib in MODELS_MIB
    ]
    (x0, y0), (x1, y1), (x2, y2) = points
    line = y0 + (y2 - y0) * (x1 - x0) / (x2 - x0)
    return Row(
        "growth of synthesis with the overlay's bytes",
        "linear (the middle size within 15 % of the line)",
        ", ".join(f"{x:.0f} MiB {y:.2f} s" for x, y in points)
        + f"; {(y2 - y0) / (x2 - x0) * 1000:.1f} ms per MiB; middle {y1 / line - 1:+.0%} off the line",
        "",
        abs(y1 / line - 1) <= _SLACK,
    )


def _grows_not_with_memory(f: Figures) -> Row:
    times = {mib: f(f"growth.memory_{mib}.answer_s") for mib in MEMORIES_MIB}
    spread = max(times.values()) / min(times.values()) - 1
    return Row(
        "growth of synthesis with the guest's RAM",
        "within 15 % from 256 MiB to 2 GiB",
        ", ".join(f"{mib} MiB {seconds:.2f} s" for mib, seconds in times.items()) + f"; spread {spread:.0%}",
        ", ".join(
            f"{mib} MiB: overlay {_mib(f(f'growth.memory_{mib}.overlay_bytes'))}" for mib in MEMORIES_MIB
        ),
        spread <= _SLACK,
    )


_LINES: tuple[Line, ...] = (
    _resume,
    _local,
    _ready,
    _fast_links,
    lambda f: _rate(f, 100, 10),
    lambda f: _rate(f, 10, 5),
    _bytes,
    _kind_guest,
    _create,
    _engine,
    _memory,
    _density,
    _grows_with_bytes,
    _grows_not_with_memory,
)


def text(made: list[Row]) -> str:
    """The table for a terminal."""
    return "\n".join(
        f"{_MET[row.met][0]:6} {row.what}\n"
        f"       promise: {row.promise or 'none'}\n       reached: {row.figure}"
        + (f"\n       beside:  {row.beside}" if row.beside else "")
        for row in made
    )


def markdown(made: list[Row], about: dict[str, Any]) -> str:
    """The page of the documentation."""
    lines = [
        "# Measured: bases, overlays, synthesis",
        "",
        *origin(about, "make bench"),
        "The work: the guest that `cloudlet base build` makes, 512 MiB, one CPU; the reference application "
        "(`benchmarks/guests/reference`) holds a model of 16 MiB twice in memory. A first answer has "
        "status 200 and a body that was checked against the model. What a figure is compared with runs on a "
        "guest without `init_on_free`, which suits it best.",
        "",
        *table(made),
        "",
        "![first answers, bytes and growth](main.png)",
        "",
    ]
    return "\n".join(lines)


def origin(about: dict[str, Any], command: str) -> list[str]:
    """Where a page's figures come from."""
    kept = sum(about["preparing_seconds"].values())
    return [
        f"Written by `{command}` on {about['date']}, seed {about['seed']}. Medians, with the range and "
        "number of runs; all figures of one run, one after the other.",
        "",
        f"The machine: {about['cpu']}, {about['cores']} cores, {about['memory_mib'] / 1024:.0f} GiB, "
        f"Linux {about['kernel']}, QEMU {about['qemu']} under {about['accelerator'].upper()}, "
        f"Python {about['python']}, load {about['load_before']} before. The run took {about['seconds']} s"
        + (f"; besides, what is kept from run to run was made in {kept:.0f} s." if kept else "."),
        "",
    ]


def table(made: list[Row]) -> list[str]:
    """Promises and what was reached."""
    return [
        "| what | promised | reached | beside | met |",
        "|---|---|---|---|---|",
        *(
            f"| {row.what} | {row.promise} | {row.figure} | {row.beside} | {_MET[row.met][1]} |"
            for row in made
        ),
    ]


def _our_stream(f: Figures) -> str:
    try:
        return f"; of our own guest, which zeroes what it frees, {_mib(f('our_guest_stream_zstd_bytes'))}"
    except MissingError:
        return ""


def _planner(f: Figures, one: str, other: str) -> str:
    """The same ratio for a real application."""
    try:
        above, below = f(f"planner.{one}"), f(f"planner.{other}")
    except MissingError:
        return "not measured"
    return f"{above / below:.2f} ({_mib(above)} / {_mib(below)})"


def _mib(count: float) -> str:
    return f"{count / MEBIBYTE:.1f} MiB"
