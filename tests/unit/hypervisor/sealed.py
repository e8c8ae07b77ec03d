"""RAM in a sealed memory file, when all of it is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.memory import coming_ram
from cloudlet.hypervisor.records import ProcessId


def sealed_ram(
    base_id: str, ram: Path, siblings: Iterable[tuple[ProcessId, int]], layer: Layer | None = None
) -> int:
    """The descriptor, which the caller closes."""
    coming = coming_ram(base_id, ram, siblings, layer)
    coming.wait()
    return coming.descriptor
