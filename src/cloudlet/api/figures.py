"""The figures of a site, for Prometheus: what was asked, how long it took, what there is and may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sqlalchemy as sa
from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.engine import Connection

from cloudlet.api.operation import Slots
from cloudlet.service import capacity
from cloudlet.service.site import ServedSite
from cloudlet.store import tables
from cloudlet.store.rows import CloudletState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class Figures:
    """The figures of one process, with those of the whole site's database."""

    def __init__(self, site: ServedSite, waiters: Slots, transfers: Slots) -> None:
        self._site = site
        self._slots = {"waiters": waiters, "transfers": transfers}
        self._registry = site.meters.registry
        self._requests = Counter(
            "cloudlet_requests",
            "Requests by operation and status.",
            ["operation", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "cloudlet_request_seconds",
            "Seconds of requests.",
            ["operation"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_OfSite(self._gauges))

    def measured(self, operation: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self._requests.labels(operation, status).inc()
        self._seconds.labels(operation).observe(seconds)

    def text(self) -> str:
        """All figures, as Prometheus reads them."""
        return self._site.meters.text()

    def _gauges(self) -> Iterable[Metric]:
        states, operations, used = self._site.database.read(_counted)
        state = self._site.database.read(capacity.state)
        yield _by(
            "cloudlet_state", "1 for the state that the site is in.", "state",
            {one: int(one is state) for one in CloudletState},
        )  # fmt: skip
        yield _by("cloudlet_instances", "Instances by state.", "state", states)
        yield _by("cloudlet_operations", "Operations by kind and state.", "operation", operations)
        limits = self._site.options.limits
        yield _by(
            "cloudlet_used", "What instances have, by resource.", "resource",
            {"instances": used.instances, "memory_bytes": used.memory_bytes, "cpus": used.cpus,
             "disk_bytes": used.disk_bytes},
        )  # fmt: skip
        yield _by(
            "cloudlet_limit", "What instances may have, by resource.", "resource",
            {"instances": limits.instances, "memory_bytes": limits.memory_bytes, "cpus": limits.cpus},
        )  # fmt: skip
        yield _by("cloudlet_blob_bytes", "Bytes of blobs.", "kind", {"all": self._site.blobs.bytes()})
        yield _by(
            "cloudlet_slots", "Clients that wait or transfer.", "kind",
            {name: slots.taken for name, slots in self._slots.items()},
        )  # fmt: skip


class _OfSite(Collector):
    """What prometheus_client asks for figures that are read when they are wanted."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def _by(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _counted(connection: Connection) -> tuple[dict[str, int], dict[str, int], capacity.Usage]:
    instances, operations = tables.instances.c, tables.operations.c
    states = connection.execute(sa.select(instances.state, sa.func.count()).group_by(instances.state))
    kinds = connection.execute(
        sa.select(operations.kind, operations.state, sa.func.count()).group_by(
            operations.kind, operations.state
        )
    )
    return (
        {str(state): int(count) for state, count in states},
        {f"{kind} {state}": count for kind, state, count in kinds},
        capacity.used(connection),
    )
