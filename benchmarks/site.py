"""A site that serves: its API beside a bare handler, and an instance over HTTP beside ``cloudlet run``.

The server whose requests are counted has one core to itself, all of its threads together; clients, and the
processes of its machines, are on the other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

from benchmarks import apps, starts
from benchmarks.apps import App
from benchmarks.lab import Lab, say
from benchmarks.results import Results
from benchmarks.site_load import Job
from benchmarks.site_served import (
    CORES,
    PROJECT,
    PUBLISHER,
    SERVER,
    Caller,
    FakeSite,
    Served,
    fake_site,
    loaded,
    program,
    serving,
    without_images,
)
from cloudlet.errors import FailedError
from cloudlet.settings import Settings

CONNECTIONS = 8
LISTED = 50
"""Instances that run while requests are counted, and that are listed."""
POSTS = 100
"""Instances that are asked for in one go."""
_WORKERS = 16
"""More than a site works on at a time, by default."""
_WARM_SECONDS, _IDLE_SECONDS = 0.5, 0.5
_IMAGE_SECONDS, _ANSWER_SECONDS, _READY_SECONDS = 60.0, 60.0, 60.0
_PAUSE = 0.01


def throughput(lab: Lab, results: Results) -> None:
    """Requests per second on one core and CPU per request, in turns with a bare handler on the same rows."""
    seconds, posts = (1.0, 40) if lab.quick else (3.0, POSTS)
    with fake_site(lab, "fake") as site:
        for _ in range(LISTED):
            site.call("POST", "/v1/instances", {"instance": {"app_id": site.app}})
        site.call.settle()
        kept = {instance["id"] for instance in site.call.instances()}
        reads = {"get": f"/v1/instances/{min(kept)}", "list": f"/v1/instances?limit={LISTED}"}
        with _bare(lab, site) as bare:
            for turn in range(lab.times(5)):
                say(f"turn {turn + 1}")
                for name, path in reads.items():
                    job = Job(path, "GET", connections=CONNECTIONS, seconds=seconds)
                    loaded(_at(site, replace(job, seconds=_WARM_SECONDS)))
                    _measure(results, f"site.{name}", site.served, _at(site, job))
                    job = replace(job, url=f"{bare.url}{path}{f'&project_id={PROJECT}' * (name == 'list')}")
                    loaded(replace(job, seconds=_WARM_SECONDS))
                    _measure(results, f"bare.{name}", bare, job)
                _posts(results, site, bare, posts, kept)


def over_http(lab: Lab, results: Results) -> None:
    """POST of an instance to its first answer, overlay in the store, in turns with ``cloudlet run`` of it."""
    app = apps.reference(lab.seed)
    overlay = apps.overlay_of(lab, app)
    served_by, run_by = (without_images(lab.settings, lab.scratch / name) for name in ("served", "run"))
    with serving(served_by, lab.scratch / "served", set(CORES)) as served:
        app_id = Caller(served.url, PUBLISHER).publish(overlay, app.key)
        call = Caller(served.url)
        for turn in range(1 + lab.times(7, 2)):
            # In the first turn files are read that were not read for a while.
            into = results if turn else Results()
            for way in ("first", "again"):
                if way == "first":
                    _forget_images(served_by, run_by)
                _instance(into, f"http.{way}", call, app_id, app, partial(_wait_image, served_by))
                seconds = starts.command(run_by, overlay, app.first, then=partial(_wait_image, run_by))
                into.add(f"http.{way}.run_answer_s", seconds)


def _posts(results: Results, site: FakeSite, bare: Served, count: int, kept: Collection[str]) -> None:
    """Ask for instances in one go: of the bare handler, and of the site, which makes them or waits."""
    body = json.dumps({"instance": {"app_id": site.app}})
    job = Job("/v1/instances", "POST", body=body, status=202, connections=CONNECTIONS, most=count)
    _measure(results, "bare.post", bare, replace(job, url=bare.url + job.url))
    used = site.served.cpu()
    _measure(results, "site.working", site.served, _at(site, job))
    site.call.settle()
    results.add("api.site.whole.cpu_ms", 1000 * (site.served.cpu() - used) / count)
    _remove(site, kept)
    with _nothing_is_made(site):
        loaded(_at(site, replace(job, most=_WORKERS)))  # all who work are waiting now
        _wait_idle(site.served)
        _measure(results, "site.post", site.served, _at(site, job))
    site.call.settle()
    _remove(site, kept)


def _measure(results: Results, name: str, served: Served, job: Job) -> None:
    used = served.cpu()
    done = loaded(job)
    results.add(f"api.{name}.cpu_ms", 1000 * (served.cpu() - used) / done.count)
    results.add(f"api.{name}.per_second", done.count / done.seconds)


def _at(site: FakeSite, job: Job) -> Job:
    """The job, by the user of a site."""
    return replace(job, url=site.served.url + job.url, authorization=site.call.authorization)


@contextmanager
def _bare(lab: Lab, site: FakeSite) -> Iterator[Served]:
    """The bare handler, on a copy of a site's rows."""
    copy = lab.scratch / "bare.sqlite"
    with closing(sqlite3.connect(site.database)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    with program("site_bare", str(copy), cores=SERVER) as (bare, _):
        yield bare


@contextmanager
def _nothing_is_made(site: FakeSite) -> Iterator[None]:
    """Meanwhile the process stands still of which keepers are forked: who works waits for it."""
    for child in site.served.children():
        os.kill(child, signal.SIGSTOP)
    try:
        yield
    finally:
        for child in site.served.children():
            os.kill(child, signal.SIGCONT)


def _wait_idle(served: Served) -> None:
    """Wait until a server has done nothing for a while."""
    used = -1.0
    while (now := served.cpu()) > used + 0.02:
        used = now
        time.sleep(_IDLE_SECONDS)


def _remove(site: FakeSite, kept: Collection[str]) -> None:
    for instance in site.call.instances():
        if instance["id"] not in kept:
            site.call("DELETE", f"/v1/instances/{instance['id']}")
    site.call.settle()


def _instance(results: Results, name: str, call: Caller, app_id: str, app: App, then: partial[None]) -> None:
    """An instance, from POST to its first answer; its user waits for the operation, and looks where it is."""
    began = time.monotonic()
    instance = call.started(app_id)
    app.first(instance["endpoints"][0]["url"], _ANSWER_SECONDS)
    results.add(f"{name}.answer_s", time.monotonic() - began)
    then()
    deadline = time.monotonic() + _READY_SECONDS
    while not (timings := call("GET", f"/v1/instances/{instance['id']}")["instance"]["timings"]):
        if time.monotonic() > deadline:
            raise FailedError(f"instance {instance['id']} is not ready")
        time.sleep(_PAUSE)
    results.add(f"{name}.synthesis_s", timings["answering"])
    call.delete(instance["id"])


def _forget_images(*several: Settings) -> None:
    for settings in several:
        for folder in (settings.images_dir, settings.hints_dir):
            shutil.rmtree(folder, ignore_errors=True)


def _wait_image(settings: Settings) -> None:
    """Wait until the app's image is kept."""
    deadline = time.monotonic() + _IMAGE_SECONDS
    while not list(settings.images_dir.glob("*/image.json")):
        if time.monotonic() > deadline:
            raise FailedError(f"no image is kept in {settings.images_dir}")
        time.sleep(_PAUSE)
