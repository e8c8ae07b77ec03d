"""The main job, shown: an app's warm VM answers over a thin link long before all of its overlay is here.

Builds the base VM (once), makes and signs the route planner's overlay (once), then synthesises it at an
assumed 10 Mbit/s, posts a real routing problem while the rest still arrives, and has the routes checked by a
program that shares no code with the planner; then once more at 100 Mbit/s. Then the machine becomes a site:
the app is published, a user gets an instance over HTTP, uses it, saves it, starts what was saved, and ends
it. Every step is a ``cloudlet`` command that you can type yourself. ``--compare`` adds the other ways: all
bytes first, a second start, and what a user would do without it: boot, or download, the full image.

The first two starts are first ones: no image of the app is used, and none is left. Files: the base and the
overlay in the cache folder, keys in the configuration folder, nothing running at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from blake3 import blake3
from rich.console import Console
from rich.table import Table

from cloudlet.model import format_bytes
from cloudlet.overlay.header import VERSION
from cloudlet.settings import load

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "route-planner"
BASE = "debian-12"
THIN, WIDE = 10, 100
"""Mbit/s of the assumed links."""
PLANNING_SECONDS = 20
ARRIVAL_SECONDS = 120.0
ANSWER_SECONDS = 120.0
FIRST_TRY, LONGEST_TRY = 0.5, 10.0

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
        with running(overlay, THIN) as thin:
            report = plan(thin)
            thin.wait_arrived()
            stalls = next(row for row in listed("ps") if row["id"] == thin.told["id"])["stalls"]
        with running(overlay, WIDE) as wide:
            pass
        show(thin, stalls, wide, report)
        at_a_site(overlay)
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


def listed_one(*command: str | Path) -> dict[str, Any]:
    answer = subprocess.run(cloudlet(*command, "-f", "json"), check=True, capture_output=True).stdout
    row: dict[str, Any] = json.loads(answer)
    return row


def listed(*command: str) -> list[dict[str, Any]]:
    answer = subprocess.run(cloudlet(*command, "-f", "json"), check=True, capture_output=True).stdout
    rows: list[dict[str, Any]] = json.loads(answer)
    return rows


def make_base() -> None:
    if not any(base["name"] == BASE for base in listed("base", "list")):
        console.print("Building the base VM; this is done once and takes about two minutes.")
        step(cloudlet("base", "build", "--name", BASE))


def make_overlay(overlay: Path, recipe: Path = EXAMPLE, *options: str) -> None:
    """Make the overlay unless it is there and belongs to this base and this recipe."""
    if not any(key["name"] == "default" and key["signs"] == "yes" for key in listed("key", "list")):
        step(cloudlet("key", "create"))
    base = next(base for base in listed("base", "list") if base["name"] == BASE)
    made_from = overlay.with_suffix(".made-from")
    wanted = f"{base['id']} {digest_of(recipe)} {VERSION}"
    if overlay.exists() and made_from.exists() and made_from.read_text() == wanted:
        return
    step(cloudlet("overlay", "create", BASE, "--recipe", recipe, "-o", overlay, *options))
    made_from.write_text(wanted)


def digest_of(folder: Path) -> str:
    digest = blake3()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Running:
    """An app that ``cloudlet run`` runs, and what is known of how it came to be."""

    mbit: int
    told: dict[str, Any]
    """What the command printed when the clone was ready."""
    answered: float
    """Seconds from when the command was typed to the first planned route, checked."""
    arrived: threading.Event
    """Whether the command said that all is here, or ended."""
    arrived_seconds: float | None = None

    def wait_arrived(self) -> None:
        """Wait until all is here, where the machine started before that."""
        if self.told["start"] == "hot" and not self.arrived.wait(ARRIVAL_SECONDS):
            raise SystemExit("the overlay does not arrive")


@contextmanager
def running(overlay: Path, mbit: int) -> Iterator[Running]:
    """The app on a link of so many Mbit/s, once it has given its first answer and is ready."""
    port = free_port()
    command = cloudlet("run", overlay, "--rate", f"{mbit}M", "--no-image", "-p", f"{port}:8080", "-f", "json")
    console.print(f"[bold]$ cloudlet {' '.join(command[3:])}[/]")
    typed = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        run = Running(mbit, {}, 0.0, threading.Event())
        reader = threading.Thread(target=listen, args=(process.stderr, run), daemon=True)
        reader.start()
        wait_answering(process, command, endpoint := f"http://127.0.0.1:{port}")
        first_answer(endpoint, ANSWER_SECONDS)
        run.answered = time.monotonic() - typed
        if not (line := process.stdout.readline()):
            raise subprocess.CalledProcessError(process.wait(), command)
        run.told = json.loads(line)
        yield run
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def listen(said: IO[str], run: Running) -> None:
    """Pass on what the command says; note when all is here."""
    for line in said:
        console.print(line.rstrip(), markup=False)
        if found := re.search(r"are here after ([0-9.]+) s", line):
            run.arrived_seconds = float(found[1])
            run.arrived.set()
    run.arrived.set()


def free_port() -> int:
    """A port that is free now: so its user can ask before the command has said where."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_answering(process: subprocess.Popen[str], command: list[str], endpoint: str) -> None:
    """Ask whether the app is well, as somebody does who waits for it: again and again, more patiently."""
    patience = FIRST_TRY
    while True:
        asked = time.monotonic()
        with (
            suppress(OSError, HTTPException),
            urllib.request.urlopen(f"{endpoint}/healthz", timeout=patience),
        ):
            return
        if time.monotonic() - asked >= patience:
            patience = min(LONGEST_TRY, patience * 1.5)
        try:
            status = process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise subprocess.CalledProcessError(status, command)


def plan(run: Running) -> Any:
    """Post the whole problem and check the answer."""
    from check import check, read_solution

    problem = (EXAMPLE / "data" / "X-n200-k36.vrp").read_text()
    console.print(f"Planning X-n200-k36 for {PLANNING_SECONDS} s in the emulated guest ...")
    request = urllib.request.Request(
        f"{run.told['endpoint']}/plan?seconds={PLANNING_SECONDS}", problem.encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=PLANNING_SECONDS * 10) as answer:
        routes = json.load(answer)["routes"]
    _, best = read_solution((EXAMPLE / "data" / "X-n200-k36.sol").read_text())
    report = check(problem, routes, best)
    if not report.ok:
        raise SystemExit(f"the routes are wrong: {report.violations}")
    return report


def show(thin: Running, stalls: str, wide: Running, report: Any) -> None:
    size = thin.told["bytes"]
    table = Table(title=f"route-planner from an overlay of {format_bytes(size)}", title_justify="left")
    table.add_column("moment, in seconds after the first byte was asked for")
    for run in (thin, wide):
        table.add_column(f"{run.mbit} Mbit/s", justify="right")
    early = thin.told["start"] == "hot"
    for name, text in (
        ("root", "signature checked, base found"),
        ("head", "what must be there before there can be a machine"),
        ("started", "QEMU started"),
        ("resumed", "resumed" + ("" if early else ": all bytes here, verified and loaded")),
        ("answering", "the app answers"),
        ("ready", "its clock, name and keys are its own"),
    ):
        if any(name in run.told["seconds"] for run in (thin, wide)):
            table.add_row(text, *(moment(run.told["seconds"].get(name)) for run in (thin, wide)))
    if early:
        table.add_row("all has arrived", moment(thin.arrived_seconds), "not waited for")
    table.add_row("first planned route checked, since the command was typed",
                  *(moment(run.answered) for run in (thin, wide)))  # fmt: skip
    wires = [f"{size * 8 / 1e6 / run.mbit:.1f}" for run in (thin, wide)]
    table.add_row("all bytes first would take, on the wire alone", *wires)
    console.print(table)
    if early:
        console.print(f"While the rest arrived at {thin.mbit} Mbit/s the guest waited for pages: {stalls}.")
    gap = "" if report.gap is None else f", {report.gap:.2f} % above the best known"
    console.print(
        f"X-n200-k36: cost {report.cost}{gap}; {report.vehicles} vehicles; every customer once, no overload."
    )


def at_a_site(overlay: Path) -> None:
    """Serve this machine as a site, in a folder of its own, and be its publisher and its user."""
    with tempfile.TemporaryDirectory(prefix="cloudlet-demo-") as folder, served(Path(folder)) as site:
        site("app", "publish", overlay)
        asked = time.monotonic()
        site("instance", "create", "route-planner")
        first_answer(site.endpoint("route-planner"), ANSWER_SECONDS)
        seconds = time.monotonic() - asked
        site("instance", "save", "route-planner", "--name", "my-rounds")
        site("instance", "delete", "route-planner")
        site("instance", "create", "--overlay", "my-rounds", "--name", "again")
        first_answer(site.endpoint("again"), ANSWER_SECONDS)
        site("instance", "delete", "again")
    console.print(
        f"At a site: an instance over HTTP gave its first planned route {seconds:.2f} s after the command "
        "was typed; what was saved of it goes on, and nothing is left."
    )


@dataclass
class Site:
    """A site that is served in a folder."""

    folder: Path

    def __call__(self, *arguments: str | Path) -> None:
        """Do what a publisher or a user types."""
        step(cloudlet("--state-dir", self.folder, *arguments))

    def endpoint(self, instance: str) -> str:
        """Where an instance is reached."""
        shown = listed_one("--state-dir", self.folder, "instance", "show", instance)
        return str(shown["endpoint"])


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    """A site in a folder, as long as the context lasts; its instances have to be ended in it."""
    command = cloudlet("--state-dir", folder, "serve")
    console.print(f"[bold]$ cloudlet {' '.join(command[3:])} &[/]")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if "serving at" in line:
                break
        else:
            raise subprocess.CalledProcessError(process.wait(), command)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Site(folder)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def moment(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def compare(overlay: Path) -> None:
    """The same first answer by other ways; each row is said when it is done."""
    from benchmarks.compare import compare as measure

    from cloudlet.control.site import Site

    table = Table(title="The same first answer, by other ways", title_justify="left")
    table.add_column("way")
    for column in ("over the link", "first answer, s", "times ours"):
        table.add_column(column, justify="right")
    ours: dict[int, float] = {}
    for row in measure(Site.open(load()), overlay, first_answer):
        # The first at each rate, and the first where all is here.
        first = ours.setdefault(row.mbit, row.seconds)
        console.print(f"  {row.what}: {row.seconds:.2f} s")
        table.add_row(
            row.what + (" (wire computed)" if row.computed else ""),
            format_bytes(row.bytes) if row.bytes else "",
            f"{row.seconds:.2f}",
            f"{row.seconds / first:.1f}",
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
