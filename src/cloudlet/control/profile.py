"""A trial: what a resumed guest touches first, page by page, until it has answered and been warmed up.

The trial does what every clone does (it resumes, answers, and gets its identity), and what the publisher's
``warm-up`` commands ask of it, so that the first requests of real users find their pages at the front, too;
before the identity, where an app is given out as soon as it answers. It is made several times: with all pages
there, and then with the pages coming in the order found, no faster than over a thin link, until that finds no
more. A guest that has to wait does what a quick one does not: its timers expire, its clients try again.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cloudlet.control import identity
from cloudlet.control.order import Page, Touched, almost_the_base, merged, stretches
from cloudlet.control.readiness import WHILE_ARRIVING, guest_port, wait_ready
from cloudlet.control.site import Site
from cloudlet.errors import CloudletError, FailedError
from cloudlet.hypervisor.driver import Arriving, Instance
from cloudlet.hypervisor.records import MARKER, Workspace
from cloudlet.model import PublishedPort, ReadinessKind
from cloudlet.overlay.limits import FRAME_PAGES
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, PageSource, Space, runs_of
from cloudlet.overlay.plan import Hot
from cloudlet.overlay.root import App, Publish
from cloudlet.store.bases import Base
from cloudlet.store.images import layer_in

READY_SECONDS = 120.0
_GROUP_PAGES, _GROUP_SECONDS = 64, 0.04
"""How the pages of a slow trial come: about as a frame of them over 10 Mbit/s."""
_ASKED_SECONDS = 0.01
"""How long a page takes that the guest waits for out of turn."""
_SLOW_TRIALS, _FEW = 6, 32
"""How often to try slowly at most: until two trials in a row have found few pages that are new."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Commands that use the app as its users will, run on this machine in ``folder``."""

    commands: Sequence[str]
    folder: Path


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried: a capture that need not be packed yet, on its base."""

    site: Site
    base: Base
    app: App
    sources: Mapping[Space, PageSource]
    device_state: bytes
    warm_up: WarmUp

    def order(self) -> Hot:
        """The pages in the order in which they are needed; none that is the base's.

        :raises RefusedError: this site's machines cannot be watched.
        :raises FailedError: the app did not answer, or a warm-up command failed.
        """
        trials = [self._touched(None)]
        found: list[int] = []
        while len(found) < _SLOW_TRIALS and not (len(found) > 1 and max(found[-2:]) <= _FEW):
            known = {page for trial in trials for page in trial.pages}
            trials.append(self._touched(self._merged(trials)))
            found.append(len(known.union(trials[-1].pages)) - len(known))
        return stretches(self._merged(trials))

    def _touched(self, order: Sequence[Page] | None) -> Touched:
        """One trial, in which the pages come slowly if in an ``order``."""
        ram, disk = (runs_of(self.sources[space].numbers) for space in (Space.RAM, Space.DISK))
        pages = PageMap(ram, disk)
        ports = _ports(self.app)
        wanted: queue.SimpleQueue[Page | None] = queue.SimpleQueue()

        def told(space: Space, numbers: Numbers) -> None:
            for number in numbers.tolist():
                wanted.put((space, number))

        with self.site.images.workspace() as workspace:
            layer = layer_in(workspace.path, "", pages)
            incoming = self.site.hypervisor.resume_early(
                self.base.image(), layer, told, ports, name=self.app.name, record_touched=True
            )
            try:
                with self._slowly(incoming, order, wanted) if order else self._at_once(incoming):
                    incoming.begin(pages)
                    incoming.start(self.device_state)
                    if self.app.ready.kind is not ReadinessKind.SERIAL:
                        wait_ready(incoming.instance, self.app.ready, READY_SECONDS, first_try=WHILE_ARRIVING)
                    answered = len(self._ours(incoming.touched()))
                    self._use(incoming.instance)
                    return Touched(self._ours(incoming.touched()), answered)
            finally:
                incoming.abort()

    def _merged(self, trials: Sequence[Touched]) -> list[Page]:
        with self.base.pages() as base:
            return merged(trials, almost_the_base(trials, self.sources, base))

    def _ours(self, touched: Sequence[tuple[Space, Numbers]]) -> list[Page]:
        """Those of the pages that are the overlay's."""
        ours = {space: set(source.numbers.tolist()) for space, source in self.sources.items()}
        return [(space, n) for space, numbers in touched for n in numbers.tolist() if n in ours[space]]

    def _use(self, instance: Instance) -> None:
        """What every clone does when its app has answered, and what its first users do."""
        steps = [self._renew, self._warm_up]
        if self.app.publish is Publish.ANSWERING:
            steps.reverse()  # as it will be: users come first
        for step in steps:
            step(instance)

    def _renew(self, instance: Instance) -> None:
        name = identity.host_name(self.app.name, instance.id)
        identity.renew(instance.agent, self.base.description.guest, name)

    def _warm_up(self, instance: Instance) -> None:
        run_here(self.site, self.warm_up.commands, self.warm_up.folder, _endpoints(instance), "warm-up")

    @contextmanager
    def _at_once(self, incoming: Arriving) -> Iterator[None]:
        """All pages are there before the machine is."""
        for space, source in self.sources.items():
            for at in range(0, source.numbers.size, FRAME_PAGES):
                batch = slice(at, at + FRAME_PAGES)
                rows = np.ascontiguousarray(source.data[batch])
                incoming.pages(PageBatch(space, source.numbers[batch], rows))
        yield

    @contextmanager
    def _slowly(
        self, incoming: Arriving, order: Sequence[Page], wanted: queue.SimpleQueue[Page | None]
    ) -> Iterator[None]:
        """The pages of the order come group by group, meanwhile; others only when they are waited for."""

        def feed() -> None:
            left = dict.fromkeys(order)
            next_group = time.monotonic()
            while True:
                with suppress(queue.Empty):
                    pause = max(0.0, next_group - time.monotonic()) if left else None
                    page = wanted.get(timeout=pause)
                    if page is None:
                        return
                    if page not in left:
                        time.sleep(_ASKED_SECONDS)
                        self._hand_over(incoming, [page])
                    continue
                group = list(islice(left, _GROUP_PAGES))
                for page in group:
                    del left[page]
                self._hand_over(incoming, group)
                next_group = time.monotonic() + _GROUP_SECONDS

        failed: list[BaseException] = []

        def guarded() -> None:
            try:
                feed()
            except BaseException as error:  # raised below, when who waits for the machine has seen its end
                failed.append(error)
                incoming.sever()

        thread = threading.Thread(target=guarded, name="slow-link", daemon=True)
        thread.start()
        try:
            yield
        except CloudletError as error:
            if failed:
                raise failed[0] from error
            raise
        finally:
            wanted.put(None)
            thread.join()
        if failed:
            raise failed[0]

    def _hand_over(self, incoming: Arriving, pages: Sequence[Page]) -> None:
        for space, source in self.sources.items():
            numbers = np.array([number for of, number in pages if of is space], np.uint32)
            if numbers.size:
                rows = source.data[np.searchsorted(source.numbers, numbers)]
                incoming.pages(PageBatch(space, numbers, rows))


def run_here(
    site: Site, commands: Sequence[str], folder: Path, environment: Mapping[str, str], what: str
) -> None:
    """Run a recipe's commands on this machine; they belong to a workspace, so none outlives this.

    :raises FailedError: one gave another status than 0.
    """
    with Workspace.create(site.settings.instances_dir, prefix=f"{what}-") as workspace:
        for command in commands:
            result = subprocess.run(
                ["/bin/sh", "-ec", command],
                cwd=folder,
                env={**os.environ, MARKER: str(workspace.path), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                start_new_session=True,
            )
            if result.returncode:
                tail = result.stdout.strip()[-500:]
                raise FailedError(f"{what}: {command!r} gave {result.returncode}: {tail}")


def _ports(app: App) -> list[PublishedPort]:
    numbers = [port.port for port in app.ports]
    if (asked := guest_port(app.ready)) is not None:
        numbers.append(asked)
    return [PublishedPort(number) for number in dict.fromkeys(numbers)]


def _endpoints(instance: Instance) -> dict[str, str]:
    """Where the app answers, for a warm-up: its first port, and each by its number in the guest."""
    urls = {f"CLOUDLET_ENDPOINT_{endpoint.guest_port}": endpoint.url for endpoint in instance.endpoints}
    if instance.endpoints:
        urls["CLOUDLET_ENDPOINT"] = instance.endpoints[0].url
    return urls
