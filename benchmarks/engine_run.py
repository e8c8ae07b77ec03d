"""The engine without QEMU, in processes of its own that stay on one core: see :mod:`benchmarks.engine`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.lab import Lab, say
from benchmarks.results import Results

OVERLAYS_MIB = (16, 64, 256)


def throughput(lab: Lab, results: Results) -> None:
    """Apply, beside ``zstd -d``: the reference application's overlay, and a synthetic capture."""
    rounds = str(lab.times(5, 2))
    say("engine: the real overlay")
    base = lab.base()
    real = _engine("--base", str(base.path), "--overlay", str(lab.overlay()), "--rounds", rounds)
    say("engine: a synthetic capture")
    synthetic = _engine("--seed", str(lab.seed), "--rounds", rounds)
    for name, measured in (("real", real), ("synthetic", synthetic)):
        for figure in ("apply_mib_per_second", "zstd_mib_per_second", "throughput_ratio", "equal_work_ratio"):
            results.add(f"engine.{name}.{figure}", measured[figure])
        results.add(f"engine.{name}.overlay_mib", measured["overlay_mib"])
    results.add("engine.synthetic.create_cpu_per_100_mib_s", synthetic["create_cpu_seconds_per_100_mib"])


def memory(lab: Lab, results: Results) -> None:
    """Memory of the process that applies overlays of three sizes."""
    for mib in OVERLAYS_MIB:
        say(f"engine: memory, overlay of {mib} MiB")
        measured = _engine("--overlay-mib", str(mib), "--seed", str(lab.seed))
        results.add(f"engine.memory_{mib}_mib", measured["memory_mib"])
        further = measured["memory_of_two_mib"] - measured["memory_mib"]
        results.add(f"engine.memory_further_{mib}_mib", further)


def _engine(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engine", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(result.stdout)
    return document
