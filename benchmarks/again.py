"""Further starts of an app that was here before; and the memory of many instances, by their start."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks import apps
from benchmarks.apps import App, overlay_of
from benchmarks.density import memory_of
from benchmarks.early import EAGER, EARLY, RTT, Client, running
from benchmarks.lab import Lab, say
from benchmarks.link import link
from benchmarks.results import Results
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request
from cloudlet.errors import FailedError

RATE = 100
"""Mbit/s of the link behind which the overlay stays; a start from the image reads no more than its head."""
COUNTS = (1, 2, 4)
_PARTS = ("all", "qemu", "network", "ram_own", "ram_shared", "translated")
WAYS = {"early": EARLY, "image": Request(), "full": EAGER}
_IDLE_SECONDS = 3.0
_ANSWER_SECONDS = 60.0
_ARRIVAL_SECONDS = 120.0


def second(lab: Lab, results: Results) -> None:
    """First, second and third start of an app at a site, and what each further instance takes."""
    for app in (apps.reference(lab.seed), apps.route_planner())[: lab.times(2)]:
        with link(overlay_of(lab, app), RATE, RTT) as url:
            _leave_image(lab, app, url, _first(app, results, f"second.{app.key}.first"))
            again = _first(app, results, f"second.{app.key}.second")
            for _ in range(lab.times(5, 2)):
                with running(lab, url, Request(), again) as (made, used):
                    used.result()
                    if not made.started.from_image:
                        raise FailedError(f"{app.name} did not start from its image")
            with ExitStack() as stack:
                folders: list[Path] = []
                for count in COUNTS[: lab.times(3, 2)]:
                    while len(folders) < count:
                        client = _first(app, results, f"second.{app.key}.beside") if folders else again
                        made, used = stack.enter_context(running(lab, url, Request(), client))
                        used.result()
                        folders.append(made.instance.directory)
                    time.sleep(_IDLE_SECONDS)
                    memory = sum((memory_of(folder) for folder in folders), Counter[str]())
                    for part in _PARTS:
                        results.add(f"second.{app.key}.{count}.{part}_mib", memory[part] / 1024)
        for part in _PARTS:
            first, last = (results.samples[f"second.{app.key}.{n}.{part}_mib"][-1] for n in (1, len(folders)))
            results.add(f"second.{app.key}.further.{part}_mib", (last - first) / (len(folders) - 1))


def memory_by_way(lab: Lab, results: Results) -> None:
    """Eight idle instances of three apps, each having answered its ten requests, in each of the ways."""
    kinds = [apps.reference(lab.seed), apps.route_planner(), apps.heap()]
    chosen = (kinds * 3)[: lab.times(8, 3)]
    results.add("memory.instances", len(chosen))
    for way, request in WAYS.items():
        say(f"memory: {way}")
        if way == "image":
            for app in kinds:
                _leave_image(lab, app, str(overlay_of(lab, app)), lambda *_: None)
        with ExitStack() as stack:
            parts = Counter[str]()
            folders = []
            for app in chosen:
                here = threading.Event()
                made, used = stack.enter_context(
                    running(lab, str(overlay_of(lab, app)), request, _ten(app), here.set)
                )
                used.result()
                if made.started.delivery and not here.wait(_ARRIVAL_SECONDS):
                    raise FailedError(f"{app.name} does not arrive")
                folders.append(made.instance.directory)
            time.sleep(_IDLE_SECONDS)
            for folder in folders:
                parts.update(memory_of(folder))
            cached = _cached_kib() if way == "early" else 0
            if cached:
                # What is mapped of the page servers' files is in the machines' share already.
                parts["cache"] = max(0, cached - parts["ram_shared"] + parts["ram_own"])
                parts["all"] += parts["cache"]
            for part in ("qemu", "network", "pages", "cache", "all", "ram_own", "ram_shared", "ram_mapped"):
                results.add(f"memory.{way}.{part}_mib", parts[part] / 1024)


def _leave_image(lab: Lab, app: App, where: str, client: Client) -> None:
    """A first start, early, until all has come and the site has the app's image; unless it has it."""
    if any(image.app == app.key for image in lab.site.images.all()):
        return
    here = threading.Event()
    with running(lab, where, Request(start=Start.HOT), client, here.set) as (_, used):
        used.result()
        if not here.wait(_ARRIVAL_SECONDS):
            raise FailedError(f"{app.name} does not arrive")


def _first(app: App, results: Results, name: str) -> Client:
    def use(url: str, began: float) -> None:
        app.first(url, _ANSWER_SECONDS)
        results.add(f"{name}_s", time.monotonic() - began)

    return use


def _ten(app: App) -> Client:
    def use(url: str, _: float) -> None:
        app.tenth(url, _ANSWER_SECONDS)

    return use


def _cached_kib() -> int:
    """What the kernel keeps of the page servers' files, which this process holds open."""
    devices: dict[int, Path] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            # A mount of its own whose root is a file: its name is that of the root.
            if str(entry.readlink()) == "/" and entry.is_file():
                devices[entry.stat().st_dev] = Path(f"/proc/{os.getpid()}/fd/{entry.name}")
        except OSError:
            continue
    command = ["fincore", "--raw", "--noheadings", "--bytes", "--output", "RES", *map(str, devices.values())]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(line) for line in said.split()) >> 10
