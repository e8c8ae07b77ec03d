"""What a process of a site has measured, for Prometheus: steps of its work, bytes that came and went."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Meters:
    """The meters of one process; others of its registry may be added."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._steps = Histogram(
            "cloudlet_step_seconds", "Seconds of the steps of operations.", ["operation", "step"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._moments = Histogram(
            "cloudlet_synthesis_seconds", "Seconds from the order of a machine to moments of its synthesis.",
            ["moment"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._bytes = Counter(
            "cloudlet_transferred_bytes", "Bytes of uploads, and of downloads and streams of events.",
            ["direction"], registry=self.registry,
        )  # fmt: skip

    def step(self, operation: str, step: str, seconds: float) -> None:
        """Note how long a step of a kind of operation took."""
        self._steps.labels(operation, step).observe(seconds)

    def synthesised(self, timings: Mapping[str, float]) -> None:
        """Note when the moments of a synthesis came, in seconds from its beginning."""
        for moment, seconds in timings.items():
            self._moments.labels(moment).observe(seconds)

    def received(self, count: int) -> None:
        """Note bytes of an upload."""
        self._bytes.labels("received").inc(count)

    def sent(self, count: int) -> None:
        """Note bytes of a download, or of a stream of events."""
        self._bytes.labels("sent").inc(count)

    def text(self) -> str:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry).decode()
