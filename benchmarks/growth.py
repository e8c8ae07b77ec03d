"""How synthesis grows: with the overlay's bytes, as it should, and with the guest's RAM, as it should not."""

from __future__ import annotations

from benchmarks.answers import Reference
from benchmarks.lab import MODEL_MIB, Lab
from benchmarks.results import Results
from benchmarks.starts import synthesis

MODELS_MIB = (MODEL_MIB, 48, 96)
MEMORIES_MIB = (256, 512, 1024, 2048)


def by_bytes(lab: Lab, results: Results) -> None:
    """Synthesis of overlays of three sizes on one base."""
    asks = {mib: Reference(mib, lab.seed) for mib in MODELS_MIB}
    overlays = {mib: lab.overlay(model_mib=mib) for mib in MODELS_MIB}
    for _ in range(lab.times(5, 2)):  # in turns, so that a noisy neighbour meets all
        for mib, ask in asks.items():
            synthesis(lab, results, f"growth.model_{mib}", str(overlays[mib]), ask)
    for mib, overlay in overlays.items():
        results.add(f"growth.model_{mib}.overlay_bytes", overlay.stat().st_size)


def by_memory(lab: Lab, results: Results) -> None:
    """Synthesis of the same application on bases of four sizes."""
    ask = Reference(MODEL_MIB, lab.seed)
    overlays = {mib: lab.overlay(memory_mib=mib) for mib in MEMORIES_MIB}
    for _ in range(lab.times(7, 2)):
        for mib, overlay in overlays.items():
            synthesis(lab, results, f"growth.memory_{mib}", str(overlay), ask)
    for mib, overlay in overlays.items():
        results.add(f"growth.memory_{mib}.overlay_bytes", overlay.stat().st_size)
