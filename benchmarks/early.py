"""The early start over thin links: the first answer, the tenth, and all of the application's memory.

All starts are first starts: what a site learns of an app, its image and its hints, is not there. What a slow
link would only prolong is computed from its bytes, and the figures say so.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException

from benchmarks import apps, plain
from benchmarks.answers import url_of, wait_answer
from benchmarks.apps import App, overlay_of
from benchmarks.lab import Lab, copy_of, say
from benchmarks.link import link
from benchmarks.results import Results
from benchmarks.transfers import wire
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, Synthesised, synthesise
from cloudlet.hypervisor.driver import Instance
from cloudlet.model import PublishedPort
from cloudlet.transfer.source import open_source

RATES = (5, 10, 25, 100, 1000)
"""Mbit/s."""
RTTS = (1, 20, 80)
"""Milliseconds."""
RTT = 20
PROMISED_RATES = (10, 100)
LONGEST_WAIT, _QUICK_WAIT = 60.0, 5.0
"""Seconds on the wire above which an eager start is not measured but computed."""
NEXT = 20
"""Requests while the rest arrives."""
EARLY = Request(start=Start.HOT, use_image=False)
EAGER = Request(start=Start.FULL, use_image=False)
_SLOWEST_FOR_ALL = 10
"""Below this rate nobody waits until all has been touched."""
_ANSWER_SECONDS = 300.0
_PAUSE = 0.005

Client = Callable[[str, float], None]
"""Uses the application at a URL; is told the moment at which the first byte was asked for."""


@contextmanager
def running(
    lab: Lab, where: str, request: Request, client: Client, arrived: Callable[[], None] | None = None
) -> Iterator[tuple[Synthesised, Future[None]]]:
    """A start, ready, and what becomes of the client, who asks from the start (:func:`known`) or later."""
    began = time.monotonic()
    using: list[Future[None]] = []
    with ThreadPoolExecutor(1, "client") as threads, open_source(where, io.BytesIO()) as source:
        if request.ports:
            url = f"http://127.0.0.1:{request.ports[0].host_port}"
            using.append(threads.submit(client, url, began))

        def answers(instance: Instance) -> None:
            if not using:
                using.append(threads.submit(client, url_of(instance), began))

        with synthesise(lab.site, source, request, answering=answers, arrived=arrived) as made:
            yield made, using[0]


def known(request: Request, app: App) -> Request:
    """A request for a client who knows where the app will answer: the port is bound from the start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return replace(request, ports=(PublishedPort(app.port, host_port=port),))


def start(lab: Lab, where: str, request: Request, client: Client) -> Synthesised:
    """Start, let the client do what it does, and end."""
    with running(lab, where, request, client) as (made, used):
        used.result()
        return made


def all_apps(lab: Lab) -> list[App]:
    """Those that are measured; two of them where it has to be quick."""
    chosen = [apps.reference(lab.seed), apps.heap()]
    return chosen if lab.quick else [*chosen, apps.route_planner(), apps.everything()]


def curve(lab: Lab, results: Results) -> None:
    """Early and eager starts, by rate and round-trip time."""
    rates, rtts = ((10, 1000), (RTT,)) if lab.quick else (RATES, RTTS)
    for app in all_apps(lab):
        overlay = overlay_of(lab, app)
        size = overlay.stat().st_size
        results.add(f"early.{app.key}.overlay_bytes", size)
        # Files that were not read for a while are not what is measured.
        start(lab, str(overlay), EARLY, _asks(app, Results(), "unused"))
        for rate in rates:
            say(f"{app.name} at {rate} Mbit/s")
            for rtt in rtts:
                name = f"early.{app.key}.{rate}.{rtt}"
                whole = rtt == RTT and rate >= _SLOWEST_FOR_ALL and not lab.quick
                with link(overlay, rate, rtt) as url:
                    made = start(lab, url, EARLY, _asks(app, results, name, tenth=True, whole=whole))
                results.add(f"{name}.answering_s", made.timings.moments["answering"])
            if wire(size, rate) <= (_QUICK_WAIT if lab.quick else LONGEST_WAIT):
                with link(overlay, rate, RTT) as url:
                    start(lab, url, EAGER, _asks(app, results, f"eager.{app.key}.{rate}"))


def promised(lab: Lab, results: Results) -> None:
    """The cells that the specification speaks of, some times more."""
    app = apps.reference(lab.seed)
    for _ in range(lab.times(4)):
        for rate in PROMISED_RATES:
            name = f"early.{app.key}.{rate}.{RTT}"
            with link(overlay_of(lab, app), rate, RTT) as url:
                made = start(lab, url, EARLY, _asks(app, results, name, tenth=True))
                results.add(f"{name}.answering_s", made.timings.moments["answering"])
                start(lab, url, known(EARLY, app), _asks(app, results, f"{name}.known"))


def images(lab: Lab, results: Results) -> None:
    """The full image of each: its bytes, and its boot."""
    for app in all_apps(lab):
        build = lab.build_folder(app.recipe, app.environment)
        files = {place: build / name for place, name in app.removed.items()}
        image = lab.customised_image(overlay_of(lab, app), files)
        results.add(f"early.{app.key}.image_bytes", lab.packed_bytes(image))
        with copy_of(image, lab.scratch) as disk:
            began = time.monotonic()
            with plain.run(lab.settings, disk, app.port) as instance:
                wait_answer(instance, app.first)
                results.add(f"early.{app.key}.boot_s", time.monotonic() - began)


def sizes(lab: Lab, results: Results) -> None:
    """The first answer by the overlay's size: heaps on one base."""
    heaps = {mib: apps.heap(mib, apps.GROWTH_MEMORY_MIB) for mib in apps.GROWTH_HEAPS_MIB[: lab.times(3, 2)]}
    overlays = {mib: overlay_of(lab, app) for mib, app in heaps.items()}
    for mib, overlay in overlays.items():
        results.add(f"early.size.{mib}.overlay_bytes", overlay.stat().st_size)
    for rate in PROMISED_RATES:
        for _ in range(lab.times(3)):  # in turns, so that a noisy neighbour meets all
            for mib, app in heaps.items():
                name = f"early.size.{mib}.{rate}"
                with link(overlays[mib], rate, RTT) as url:
                    made = start(lab, url, EARLY, _asks(app, results, name))
                results.add(f"{name}.answering_s", made.timings.moments["answering"])


def stalls(lab: Lab, results: Results) -> None:
    """The slowest of the next requests while the rest arrives at 10 Mbit/s, and when all is here."""
    for app in all_apps(lab)[:3]:
        overlay = overlay_of(lab, app)
        for _ in range(lab.times(3)):
            with link(overlay, 10, RTT) as url:
                start(lab, url, EARLY, _slowest(app, results, f"stalls.{app.key}.foreseen"))
                if app.unforeseen:
                    name = f"stalls.{app.key}.unforeseen"
                    start(lab, url, EARLY, _slowest(app, results, name, unforeseen=True))
            start(lab, str(overlay), EAGER, _slowest(app, results, f"stalls.{app.key}.here"))
            if app.unforeseen:
                name = f"stalls.{app.key}.here_unforeseen"
                start(lab, str(overlay), EAGER, _slowest(app, results, name, unforeseen=True))


def storm(lab: Lab, results: Results) -> None:
    """An instance's requests, alone and while another reads all of its memory over its own thin link."""
    app, other = apps.reference(lab.seed), apps.heap()
    with link(overlay_of(lab, app), 10, RTT) as url, link(overlay_of(lab, other), 10, RTT) as other_url:
        for _ in range(lab.times(3)):
            start(lab, url, EARLY, _slowest(app, results, "storm.alone"))
            with running(lab, other_url, EARLY, _reads_all(other)) as (made, reading):
                start(lab, url, EARLY, _slowest(app, results, "storm.beside"))
                if reading.done():
                    raise AssertionError("the storm was over before its neighbour had been asked")
                paging = made.started.progress()
                assert paging
                results.add("storm.stalls", paging.stalls)
            with suppress(OSError, HTTPException):
                reading.result()


def _asks(app: App, results: Results, name: str, *, tenth: bool = False, whole: bool = False) -> Client:
    """Asks the first request, the other nine, and for all; the moments after the first byte was asked for."""

    def use(url: str, began: float) -> None:
        _first(app, url)
        results.add(f"{name}.first_s", time.monotonic() - began)
        if tenth:
            for request in app.requests[1:]:
                request(url, _ANSWER_SECONDS)
            results.add(f"{name}.tenth_s", time.monotonic() - began)
        if whole:
            app.all(url, _ANSWER_SECONDS)
            results.add(f"{name}.all_s", time.monotonic() - began)

    return use


def _first(app: App, url: str) -> None:
    """Ask until it is answered: where nothing listens yet, again and again."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            return app.first(url, _ANSWER_SECONDS)
        except (OSError, HTTPException):
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def _reads_all(app: App) -> Client:
    def use(url: str, _: float) -> None:
        app.all(url, _ANSWER_SECONDS)

    return use


def _slowest(app: App, results: Results, name: str, *, unforeseen: bool = False) -> Client:
    """Asks once, then again and again: the slowest of these."""
    other = app.unforeseen if unforeseen else None
    requests = [other or app.requests[number % len(app.requests)] for number in range(1, NEXT + 1)]

    def use(url: str, _: float) -> None:
        app.first(url, _ANSWER_SECONDS)
        slowest = 0.0
        for request in requests:
            asked = time.monotonic()
            request(url, _ANSWER_SECONDS)
            slowest = max(slowest, time.monotonic() - asked)
        results.add(f"{name}_s", slowest)

    return use
