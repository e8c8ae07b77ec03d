"""What hostile clients do to others: a polite client's requests before, during and after, by kind of them.

The polite client asks at a fixed rate, every second time on a new connection. Time is counted from when a
request was due: one that had to wait for the one before it has waited too.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.lab import Lab, say
from benchmarks.results import Results
from benchmarks.site_hostile import DOWNLOAD_MIB, KINDS
from benchmarks.site_served import CLIENTS, CORES, Caller, Served, fake_site, on_cores, program

RATE = 50
"""Requests per second."""
_SECONDS = 30.0
"""Longest wait for one answer."""
_MOST_AFTER = 15.0
"""Longest wait until all is as before."""
STORM_SECONDS = 2.0
"""So long after hostile clients came, those that came at once are here."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: when it was due, how long it took from then on, and whether it was answered well."""

    due: float
    seconds: float
    well: bool


class Polite:
    """Somebody who asks for an instance, again and again."""

    def __init__(self, call: Caller, instance_id: str) -> None:
        parts = urlsplit(call.url)
        self._address = parts.hostname or "", parts.port
        self._path, self._headers = f"/v1/instances/{instance_id}", {"Authorization": call.authorization}
        self._kept = self._connection()

    def ask(self, seconds: float) -> list[Asked]:
        """Ask at the rate for so long."""
        began = time.monotonic()
        return [self._one(began + at / RATE, new=bool(at % 2)) for at in range(round(seconds * RATE))]

    def _one(self, due: float, *, new: bool) -> Asked:
        time.sleep(max(0.0, due - time.monotonic()))
        connection = self._connection() if new else self._kept
        well = False
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", self._path, headers=self._headers)
            with connection.getresponse() as answer:
                well = bool(answer.read()) and answer.status == 200
        if new or not well:
            connection.close()
        return Asked(due, time.monotonic() - due, well)

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self._address, timeout=_SECONDS)


def hostile(lab: Lab, results: Results) -> None:
    """The latency that others see, undisturbed and beside each kind of hostile clients, and afterwards."""
    before, during = (1.5, 2.0) if lab.quick else (4.0, 10.0)
    undisturbed: list[Asked] = []
    with fake_site(lab, "hostile", DOWNLOAD_MIB, set(CORES)) as site, on_cores(CLIENTS):
        polite = Polite(site.call, site.call.started(site.app)["id"])
        polite.ask(1.0)
        for kind in KINDS:
            say(f"hostile: {KINDS[kind].what}")
            undisturbed += polite.ask(before)
            usual = p99(undisturbed)
            arguments = (kind, site.served.url, site.call.authorization, site.overlay)
            with program("site_hostile", *arguments, cores=CLIENTS) as (_, process):
                began, used = time.monotonic(), site.served.cpu()
                asked = polite.ask(during)
                share = (site.served.cpu() - used) / (time.monotonic() - began)
                results.add(f"hostile.{kind}.server_mib", _resident_mib(site.served))
                assert process.stdin and process.stdout
                process.stdin.close()
                ended = time.monotonic()
                answers: dict[str, int] = json.loads(process.stdout.readline())
            results.add(f"hostile.{kind}.after_s", _back_after(polite, usual, ended))
            later = [one for one in asked if one.due > began + STORM_SECONDS]
            results.add(f"hostile.{kind}.p99_ms", 1000 * p99(asked))
            results.add(f"hostile.{kind}.later_p99_ms", 1000 * p99(later or asked))
            results.add(f"hostile.{kind}.median_ms", 1000 * percentile(asked, 50))
            results.add(f"hostile.{kind}.failed", sum(not one.well for one in asked))
            results.add(f"hostile.{kind}.server_cpu_share", share)
            let_in = sum(count for status, count in answers.items() if int(status) < 400)
            results.add(f"hostile.{kind}.let_in", 0 if KINDS[kind].harmless else let_in)
            results.notes[f"hostile.{kind}.answers"] = ", ".join(
                f"{count} x {status}" for status, count in sorted(answers.items())
            )
    results.add("hostile.undisturbed.p99_ms", 1000 * p99(undisturbed))
    results.add("hostile.undisturbed.median_ms", 1000 * percentile(undisturbed, 50))
    results.add("hostile.undisturbed.failed", sum(not one.well for one in undisturbed))


def percentile(asked: Iterable[Asked], percent: int) -> float:
    """The time within which so many of a hundred requests were answered."""
    times = sorted(one.seconds for one in asked)
    return times[min(len(times) - 1, len(times) * percent // 100)]


def p99(asked: Iterable[Asked]) -> float:
    """The time within which 99 of 100 were answered."""
    return percentile(asked, 99)


def _back_after(polite: Polite, usual: float, ended: float) -> float:
    """Seconds until a second begins of whose requests no more than one in fifty is slow, or fails."""
    while (began := time.monotonic()) < ended + _MOST_AFTER:
        slow = sum(one.seconds > 2 * usual or not one.well for one in polite.ask(1.0))
        if slow <= RATE // 50:
            break
    return began - ended


def _resident_mib(served: Served) -> float:
    pages = int(Path(f"/proc/{served.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
