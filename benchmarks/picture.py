"""The pictures: how soon a guest answers, what travels, how both grow; by the link; hand-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import handoff
from benchmarks.early import RATES, RTT
from benchmarks.early_report import APPS, eager_seconds, image_and_boot_seconds
from benchmarks.growth import MEMORIES_MIB, MODELS_MIB
from benchmarks.handoff_report import migration_seconds
from benchmarks.report import Figures, image_seconds, stream_seconds
from benchmarks.results import Results
from cloudlet.model import MEBIBYTE

_OURS, _STREAM, _IMAGE, _OTHER = "#0072B2", "#E69F00", "#D55E00", "#999999"
"""Okabe and Ito's colours, which people tell apart whatever colours they see."""


def draw(results: Results, path: Path) -> None:
    """Draw what was measured; panels without figures stay empty."""
    _draw(results, path, (_answers, _rates, _bytes, _growth))


def draw_early(results: Results, path: Path) -> None:
    """Draw the early start: a panel for each application."""
    panels = [partial(_by_rate, key=key, name=name) for key, name in APPS.items()]
    _draw(results, path, panels)


def draw_handoff(results: Results, path: Path) -> None:
    """Draw the hand-off: what it takes and carries, the gaps, and what the pause grows with."""
    _draw(results, path, (_handoff_seconds, _handoff_bytes, _handoff_gaps, _handoff_pauses))


def _draw(results: Results, path: Path, fills: Sequence[Callable[[Any, Figures], None]]) -> None:
    """Four panels."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figures = Figures(results)
    for panel, fill in zip(panels.flat, fills, strict=True):
        with suppress(LookupError):
            fill(panel, figures)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_rate(panel: Any, f: Figures, *, key: str, name: str) -> None:
    lines = (
        ("full image and boot", [image_and_boot_seconds(f, key, rate) for rate in RATES], _IMAGE),
        ("eager: all bytes first", [eager_seconds(f, key, rate)[0] for rate in RATES], _STREAM),
        ("early", [f(f"early.{key}.{rate}.{RTT}.first_s") for rate in RATES], _OURS),
    )
    for label, seconds, colour in lines:
        panel.plot(RATES, seconds, "o-", color=colour, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(RATES, map(str, RATES))
    panel.set_xlabel(f"Mbit/s (round trip {RTT} ms)")
    panel.set_ylabel("seconds to the first answer")
    panel.set_ylim(0.1, 1000)
    panel.legend(frameon=False)
    panel.set_title(f"{name}, overlay of {f(f'early.{key}.overlay_bytes') / MEBIBYTE:.0f} MiB", loc="left")


def _answers(panel: Any, f: Figures) -> None:
    bars = [
        ("resume of a base (its agent)", f("resume.answer_s"), _OURS),
        ("synthesis, local overlay", f("synthesis.answer_s"), _OURS),
        ("QEMU: full stream restore", f("restore_s"), _STREAM),
        ("QEMU: loadvm", f("loadvm_s"), _STREAM),
        ("cold boot of the base (its agent)", f("boot.base_s"), _IMAGE),
        ("cold boot of the full image", f("boot.full_s"), _IMAGE),
    ]
    _bars(panel, bars, "{:.2f} s")
    panel.set_xscale("log")
    panel.set_xlabel("seconds to the first answer (logarithmic)")
    panel.set_title("All bytes are here", loc="left")


def _rates(panel: Any, f: Figures) -> None:
    bars = []
    for mbit in (100, 10):
        image = f("image_100_s") if mbit == 100 else image_seconds(f, mbit)
        stream = f("stream_100_s") if mbit == 100 else stream_seconds(f, mbit)
        bars += [
            (f"{mbit} Mbit/s: synthesis", f(f"synthesis_{mbit}.answer_s"), _OURS),
            (f"{mbit} Mbit/s: full stream", stream, _STREAM),
            (f"{mbit} Mbit/s: full image + boot", image, _IMAGE),
        ]
    _bars(panel, bars, "{:.1f} s")
    panel.set_xscale("log")
    panel.set_xlabel("seconds to the first answer (logarithmic)")
    panel.set_title("The bytes have to come first", loc="left")


def _bytes(panel: Any, f: Figures) -> None:
    bars = [
        ("overlay", f("created_overlay_bytes"), _OURS),
        ("overlay on a default guest", f("default.created_overlay_bytes"), _OURS),
        ("all changed pages, zstd -3", f("plain_delta_bytes"), _OTHER),
        ("full stream, zstd -3", f("stream_zstd_bytes"), _STREAM),
        ("full image, qcow2 with zstd", f("image_bytes"), _IMAGE),
    ]
    _bars(panel, [(name, count / MEBIBYTE, colour) for name, count, colour in bars], "{:.0f} MiB")
    panel.set_xlabel("MiB")
    panel.set_title("What travels", loc="left")


def _growth(panel: Any, f: Figures) -> None:
    sizes = [f(f"growth.model_{mib}.overlay_bytes") / MEBIBYTE for mib in MODELS_MIB]
    seconds = [f(f"growth.model_{mib}.answer_s") for mib in MODELS_MIB]
    panel.plot(sizes, seconds, "o-", color=_OURS, label="overlays of three sizes, 512 MiB of RAM")
    for mib, marker in zip(MEMORIES_MIB, "^sDv", strict=True):
        size = f(f"growth.memory_{mib}.overlay_bytes") / MEBIBYTE
        panel.plot(
            [size], [f(f"growth.memory_{mib}.answer_s")], marker, color=_IMAGE, label=f"{mib} MiB of RAM"
        )
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("overlay, MiB")
    panel.set_ylabel("seconds to the first answer")
    panel.legend(frameon=False)
    panel.set_title("Synthesis, by overlay and by RAM", loc="left")


def _handoff_seconds(panel: Any, f: Figures) -> None:
    lines = [
        ("QEMU, idle", [migration_seconds(f, 0, rate)[0] for rate in handoff.RATES], _STREAM, "o-"),
        *(
            (f"{name}, {does}", _by_rate_of(f, f"handoff.{busy}.{way}"), colour, style)
            for way, name, colour in (("base", "base only", _OTHER), ("overlay", "overlay known", _OURS))
            for busy, does, style in ((0, "idle", "o-"), (5, "5 MiB/s", "o--"))
        ),
    ]  # fmt: skip
    for label, seconds, colour, style in lines:
        panel.plot(handoff.RATES, seconds, style, color=colour, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(handoff.RATES, [*map(str, handoff.RATES[:-1]), "not\nshaped"])
    panel.set_xlabel("Mbit/s")
    panel.set_ylabel("seconds")
    panel.legend(frameon=False)
    panel.set_title("From the first byte to running", loc="left")


def _by_rate_of(f: Figures, name: str) -> list[float]:
    return [f(f"{name}.{rate}.seconds_s") for rate in handoff.RATES]


def _handoff_bytes(panel: Any, f: Figures) -> None:
    rate = handoff.PROMISED
    bars = []
    for busy, does in ((0, "idle"), (5, "5 MiB/s"), (20, "20 MiB/s")):
        with suppress(LookupError):
            bars += [
                (f"{does}: overlay known", f(f"handoff.{busy}.overlay.{rate}.bytes") / MEBIBYTE, _OURS),
                (f"{does}: base only", f(f"handoff.{busy}.base.{rate}.bytes") / MEBIBYTE, _OTHER),
                (f"{does}: QEMU", f(f"migration.{busy}.{rate}.bytes") / MEBIBYTE, _STREAM),
            ]
    _bars(panel, bars, "{:.1f} MiB")
    panel.set_xscale("log")
    panel.set_xlabel("MiB on the wire (logarithmic)")
    panel.set_title(f"What travels, {rate} Mbit/s", loc="left")


def _handoff_gaps(panel: Any, f: Figures) -> None:
    rate = handoff.PROMISED
    bars = []
    for busy, does in ((0, "idle"), (5, "5 MiB/s"), (20, "20 MiB/s")):
        with suppress(LookupError):
            bars += [
                (f"{does}: pause", 1000 * f(f"handoff.{busy}.overlay.{rate}.pause_s"), _OTHER),
                (f"{does}: gap", 1000 * f(f"handoff.{busy}.overlay.{rate}.gap_s"), _OURS),
                (f"{does}: QEMU's gap", 1000 * f(f"migration.{busy}.{rate}.gap_s"), _STREAM),
            ]
    _bars(panel, bars, "{:.0f} ms")
    panel.set_xlabel("ms")
    panel.set_title(f"How long nobody is answered, overlay known, {rate} Mbit/s", loc="left")


def _handoff_pauses(panel: Any, f: Figures) -> None:
    names = [f"handoff.alloc.{held}" for held in handoff.ALLOCS_MIB]
    private = [f(f"{name}.private_mib") for name in names]
    for what, colour in (("pause", _OURS), ("gap", _OTHER)):
        panel.plot(private, [1000 * f(f"{name}.{what}_s") for name in names], "o-", color=colour, label=what)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("private memory, MiB")
    panel.set_ylabel("ms")
    panel.legend(frameon=False)
    panel.set_title(f"What the pause grows with, idle, {handoff.PROMISED} Mbit/s", loc="left")


def _bars(panel: Any, bars: list[tuple[str, float, str]], label: str) -> None:
    names, values, colours = zip(*reversed(bars), strict=True)
    drawn = panel.barh(names, values, color=colours)
    panel.bar_label(drawn, [label.format(value) for value in values], padding=3)
    panel.margins(x=0.15)
