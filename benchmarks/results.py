"""What was measured: every sample under a name, and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudlet.hypervisor.driver import Hypervisor
from cloudlet.hypervisor.qemu import launch


@dataclass
class Results:
    """Samples by name. Names end with their unit: ``_s`` seconds, ``_mib`` MiB, ``_bytes`` bytes."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """The median, or None if it was not measured."""
        values = self.samples.get(name)
        return statistics.median(values) if values else None

    def range(self, name: str) -> tuple[float, float]:
        return min(self.samples[name]), max(self.samples[name])


def machine(hypervisor: Hypervisor, binary: str) -> dict[str, Any]:
    """The machine in general terms: nothing that names it."""
    info = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.count(":") and not line.startswith("flags")
    )
    model = next((value.strip() for name, value in info.items() if name.strip() == "model name"), "unknown")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    major, minor = launch.find_qemu(binary)[1]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "qemu": f"{major}.{minor}",
        "accelerator": hypervisor.accelerator().value,
        "load_before": round(os.getloadavg()[0], 2),
    }
