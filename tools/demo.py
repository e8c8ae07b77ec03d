"""The main job, shown: an app's warm VM answers in about a second from a small overlay.

Builds the base VM (once), makes and signs the route planner's overlay (once), then synthesises it at an
assumed 100 Mbit/s, posts a real routing problem, and has the routes checked by a program that shares no
code with the planner. Every step is a ``cloudlet`` command that you can type yourself. ``--compare``
adds what a user would do without it: boot, or download, the full image.

Files: the base and the overlay in the cache folder, keys in the configuration folder, nothing running
at the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich.console import Console
from rich.table import Table

from cloudlet.model import format_bytes
from cloudlet.settings import load

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "route-planner"
BASE = "debian-12"
RATE = "100M"
PLANNING_SECONDS = 20

sys.path.insert(0, str(EXAMPLE))
console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true", help="also measure the slow ways (minutes)")
    arguments = parser.parse_args()
    settings = load()
    overlay = settings.cache_dir / "route-planner.overlay"
    try:
        make_base()
        make_overlay(overlay)
        with synthesised(overlay) as (run, seconds):
            plan(run, seconds)
        if arguments.compare:
            compare(overlay)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]{' '.join(map(str, error.cmd[3:]))} ended with status {error.returncode}[/]")
        return error.returncode
    console.print(f"The signed overlay is {overlay}. Try: .venv/bin/cloudlet run {overlay}")
    return 0


def cloudlet(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cloudlet.cli.app", *map(str, arguments)]


def step(command: list[str]) -> None:
    console.print(f"[bold]$ cloudlet {' '.join(command[3:])}[/]")
    subprocess.run(command, check=True)


def listed(*command: str) -> list[dict[str, Any]]:
    answer = subprocess.run(cloudlet(*command, "-f", "json"), check=True, capture_output=True).stdout
    rows: list[dict[str, Any]] = json.loads(answer)
    return rows


def make_base() -> None:
    if not any(base["name"] == BASE for base in listed("base", "list")):
        console.print("Building the base VM; this is done once and takes about two minutes.")
        step(cloudlet("base", "build", "--name", BASE))


def make_overlay(overlay: Path) -> None:
    """Make the overlay unless it is there and belongs to this base and this recipe."""
    if not any(key["name"] == "default" and key["signs"] == "yes" for key in listed("key", "list")):
        step(cloudlet("key", "create"))
    base = next(base for base in listed("base", "list") if base["name"] == BASE)
    made_from = overlay.with_suffix(".made-from")
    wanted = f"{base['id']} {digest_of(EXAMPLE)}"
    if overlay.exists() and made_from.exists() and made_from.read_text() == wanted:
        return
    step(cloudlet("overlay", "create", BASE, "--recipe", EXAMPLE, "-o", overlay))
    made_from.write_text(wanted)


def digest_of(folder: Path) -> str:
    digest = blake3()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def synthesised(overlay: Path) -> Iterator[tuple[dict[str, Any], float]]:
    """The running app as ``cloudlet run`` reports it, and the moment the command was typed."""
    command = cloudlet("run", overlay, "--rate", RATE, "-f", "json")
    console.print(f"[bold]$ cloudlet {' '.join(command[3:])}[/]")
    typed = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(process.wait(), command)
        yield json.loads(line), typed
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def plan(run: dict[str, Any], typed: float) -> None:
    """Post two problems and check the answers."""
    from check import check, read_solution

    small = (EXAMPLE / "data" / "X-n200-first20.vrp").read_text()
    problem = (EXAMPLE / "data" / "X-n200-k36.vrp").read_text()
    first = post(run["endpoint"], small, "iterations=1")
    if not (report := check(small, first["routes"])).ok:
        raise SystemExit(f"the first answer is wrong: {report.violations}")
    answered = time.monotonic() - typed
    console.print(f"Planning X-n200-k36 for {PLANNING_SECONDS} s in the emulated guest ...")
    routes = post(run["endpoint"], problem, f"seconds={PLANNING_SECONDS}")["routes"]
    _, best = read_solution((EXAMPLE / "data" / "X-n200-k36.sol").read_text())
    report = check(problem, routes, best)
    if not report.ok:
        raise SystemExit(f"the routes are wrong: {report.violations}")
    show(run, answered, report)


def post(endpoint: str, problem: str, query: str) -> Any:
    request = urllib.request.Request(f"{endpoint}/plan?{query}", problem.encode(), method="POST")
    with urllib.request.urlopen(request, timeout=PLANNING_SECONDS * 10) as answer:
        return json.load(answer)


def show(run: dict[str, Any], answered: float, report: Any) -> None:
    seconds, wire = run["seconds"], run["bytes"] * 8 / 100e6
    table = Table(
        title=f"route-planner from a {format_bytes(run['bytes'])} overlay at 100 Mbit/s", title_justify="left"
    )
    table.add_column("moment, after the first byte was asked for")
    table.add_column("seconds", justify="right")
    for name, text in (
        ("root", "signature checked, base found"),
        ("started", "QEMU started, waiting for the overlay"),
        ("resumed", f"all bytes here ({wire:.2f} s on the wire), verified and loaded: resumed"),
        ("answering", "the app answers"),
        ("ready", "its clock, name and keys are its own"),
    ):
        table.add_row(text, f"{seconds[name]:.2f}")
    table.add_row("first planned route checked, since the command was typed", f"{answered:.2f}")
    console.print(table)
    gap = "" if report.gap is None else f", {report.gap:.2f} % above the best known"
    console.print(
        f"X-n200-k36: cost {report.cost}{gap}; {report.vehicles} vehicles; every customer once, no overload."
    )


def compare(overlay: Path) -> None:
    """The same first answer by other ways; each row is said when it is done."""
    from benchmarks.compare import compare as measure

    from cloudlet.control.site import Site

    table = Table(title="The same first answer, by other ways", title_justify="left")
    table.add_column("way")
    for column in ("over the link", "first answer, s", "times synthesis"):
        table.add_column(column, justify="right")
    synthesised: dict[str, float] = {}
    for row in measure(Site.open(load()), overlay, first_answer):
        rate = "10 Mbit/s" if "10 Mbit/s" in row.what else "100 Mbit/s"
        if row.what.startswith("synthesis"):
            synthesised[rate] = row.seconds
        console.print(f"  {row.what}: {row.seconds:.1f} s")
        table.add_row(
            row.what + (" (wire computed)" if row.computed else ""),
            format_bytes(row.bytes) if row.bytes else "",
            f"{row.seconds:.1f}",
            f"{row.seconds / synthesised[rate]:.1f}",
        )
    console.print(table)


def first_answer(endpoint: str, timeout: float) -> None:
    """One planned route, checked."""
    from check import check

    problem = (EXAMPLE / "data" / "X-n200-first20.vrp").read_text()
    request = urllib.request.Request(f"{endpoint}/plan?iterations=1", problem.encode(), method="POST")
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        report = check(problem, json.load(answer)["routes"])
    if not report.ok:
        raise SystemExit(f"the answer is wrong: {report.violations}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
