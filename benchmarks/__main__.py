"""``python -m benchmarks``: measure, print, and write ``docs/results``."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    again,
    creation,
    density,
    early,
    early_report,
    engine_run,
    growth,
    handoff,
    handoff_many,
    handoff_report,
    picture,
    report,
    site,
    site_polite,
    site_report,
    site_steps,
    starts,
    transfers,
)
from benchmarks.lab import CHECKOUT, Lab, say
from benchmarks.results import Results, machine

PARTS: dict[str, tuple[Callable[[Lab, Results], None], ...]] = {
    "resume": (starts.resume,),
    "local": (starts.local,),
    "qemu": (starts.qemu,),
    "transfers": (transfers.synthesised, transfers.images, transfers.streams),
    "create": (creation.create, creation.sizes),
    "stages": (creation.stages,),
    "engine": (engine_run.throughput, engine_run.memory),
    "density": (density.density, density.restored),
    "growth": (growth.by_bytes, growth.by_memory),
    "early": (
        early.curve, early.promised, early.images, early.sizes, early.stalls, early.storm,
        again.second, again.memory_by_way,
    ),
    "site": (site.throughput, site_steps.taskflow, site.over_http, site_polite.hostile),
    "handoff": (
        handoff.promised, handoff.by_rate, handoff.by_memory, handoff.by_disk, handoff.equal,
        handoff_many.many,
    ),
}  # fmt: skip
RESULTS = CHECKOUT / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="measure little, and that once, to try it: no page is written"
    )
    parser.add_argument("--only", metavar="NAME,...", help=f"some parts: {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here too")
    parser.add_argument("--seed", type=int, help="of what is random; printed, so that it can be given again")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    say(f"seed {seed}")
    results = Results()
    began = time.monotonic()
    with Lab.open(seed, options.quick) as lab:
        about = machine(lab.site.hypervisor, lab.settings.qemu_binary)
        about |= {"seed": seed, "date": time.strftime("%Y-%m-%d", time.gmtime())}
        try:
            for name in names:
                for part in PARTS[name]:
                    say(f"{name}: {(part.__doc__ or '').partition(chr(10))[0]}")
                    part(lab, results)
        finally:
            # An hour's samples are not lost with the part that fails.
            if options.json:
                document = {"machine": about, "samples": results.samples, "notes": results.notes}
                options.json.write_text(json.dumps(document, indent=1))
        preparing = lab.preparing
    about |= {
        "seconds": round(time.monotonic() - began - sum(preparing.values())),
        "preparing_seconds": preparing,
    }
    rows = report.rows(results)
    pages = (early_report.LINES, site_report.LINES, handoff_report.LINES)
    others = [row for lines in pages for row in report.rows(results, lines)]
    print("\n" + report.text([*rows, *others]))
    # What is kept of a page is one run of all that stands on it.
    if options.quick:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    if set(names) >= PARTS.keys() - {"early", "site", "handoff"}:
        (RESULTS / "main.md").write_text(report.markdown(rows, about))
        picture.draw(results, RESULTS / "main.png")
        say(f"written: {RESULTS / 'main.md'}, {RESULTS / 'main.png'}")
    if "early" in names:
        (RESULTS / "early.md").write_text(early_report.markdown(results, about))
        picture.draw_early(results, RESULTS / "early.png")
        say(f"written: {RESULTS / 'early.md'}, {RESULTS / 'early.png'}")
    if "site" in names:
        (RESULTS / "site.md").write_text(site_report.markdown(results, about))
        say(f"written: {RESULTS / 'site.md'}")
    if "handoff" in names:
        (RESULTS / "handoff.md").write_text(handoff_report.markdown(results, about))
        picture.draw_handoff(results, RESULTS / "handoff.png")
        say(f"written: {RESULTS / 'handoff.md'}, {RESULTS / 'handoff.png'}")


if __name__ == "__main__":
    main()
