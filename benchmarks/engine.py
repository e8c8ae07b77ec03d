"""What the overlay engine costs, without QEMU: apply and create, on one core, beside their anchors.

    python -m benchmarks.engine [--mib 100] [--rounds 5] [--json] [--seed N]
    python -m benchmarks.engine --base FOLDER --overlay FILE       a real overlay, applied only
    python -m benchmarks.engine --overlay-mib 256                  memory of whoever applies one of that size

The capture is synthetic and made from a seed: of its pages 25 % are copies of base pages (RAM and
disk), 3 % zero, 15 % repeat earlier ones, and the others are new: half random, half text and tables.
Everything lies on tmpfs, so that no disk is measured. The anchor of apply is ``zstd -d`` of the same
frames with its output written to tmpfs: by throughput (bytes each writes per second), and for equal
work, where the anchor also writes (zeros) until it has written as much as apply. Memory is that of a
fresh process: its peak beyond what it had when everything was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cloudlet.model import PAGE_BYTES, Accelerator, Machine
from cloudlet.overlay.apply import apply
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.create import CreateReport, Description, create
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, PageSource, Rows, Space, runs_of
from cloudlet.overlay.reader import Frame, OverlayReader
from cloudlet.overlay.root import App, DeviceSection
from cloudlet.store.bases import Base, BaseStore

MIB = 1 << 20
SEED = 20261124
RAM_PAGES, DISK_PAGES = 524_288, 1_048_576
SECTIONS = (DeviceSection("ram", 0, 4), DeviceSection("cpu_common", 0, 1))
_OVERLAY_SHARE = 0.45
"""Bytes of the overlay per byte of the synthetic capture, roughly."""
MACHINE = Machine(
    "pc-q35-7.2", Accelerator.TCG, "Nehalem", 1, RAM_PAGES * PAGE_BYTES, DISK_PAGES * PAGE_BYTES
)


class Bench:
    """A directory with a base, a capture on it and what is made of them; or a real base and its overlay."""

    def __init__(self, directory: Path, real: Base | None = None, seed: int = SEED) -> None:
        self.directory = directory
        self.real = real
        self.seed = seed

    def open(self, stack: ExitStack, name: str, mode: str = "rb") -> Any:
        return stack.enter_context((self.directory / name).open(mode))

    def base(self, stack: ExitStack) -> BasePages:
        if self.real:
            return stack.enter_context(self.real.pages())
        ram, disk = self.open(stack, "ram"), self.open(stack, "disk")
        return BasePages("ab" * 32, MACHINE, SECTIONS, ram.fileno(), disk.fileno())

    def source(self, name: str) -> PageSource:
        numbers = np.fromfile(self.directory / f"{name}.numbers", np.uint32)
        data = np.memmap(self.directory / f"{name}.pages", np.uint8, "r", shape=(numbers.size, PAGE_BYTES))
        return PageSource(numbers, data)

    def fill(self, mib: int) -> None:
        """Write base and capture."""
        random = np.random.default_rng(self.seed)
        base_rows = content(random, 24_000)
        with ExitStack() as stack:
            ram, disk = self.open(stack, "ram", "wb+"), self.open(stack, "disk", "wb+")
            os.truncate(ram.fileno(), MACHINE.memory_bytes)
            os.truncate(disk.fileno(), MACHINE.disk_bytes)
            os.pwrite(ram.fileno(), base_rows[:16_000].data, 1000 * PAGE_BYTES)
            os.pwrite(disk.fileno(), base_rows[16_000:].data, 5000 * PAGE_BYTES)
        pages = mib * MIB // PAGE_BYTES
        for name, share, total in (("disk", 0.15, DISK_PAGES), ("ram", 0.85, RAM_PAGES)):
            count = int(pages * share)
            rows = content(random, count)
            kind = random.random(count)
            rows[kind < 0.25] = base_rows[random.integers(0, 24_000, int((kind < 0.25).sum()))]
            rows[(kind >= 0.25) & (kind < 0.28)] = 0
            repeats = np.flatnonzero((kind >= 0.28) & (kind < 0.43))
            rows[repeats] = rows[random.integers(0, count, repeats.size)]
            scattered(random, count, total).tofile(self.directory / f"{name}.numbers")
            rows.tofile(self.directory / f"{name}.pages")


def content(random: np.random.Generator, count: int) -> Rows:
    """New pages: half random bytes, a quarter text, a quarter tables of small integers; all different."""
    rows = random.integers(0, 256, (count, PAGE_BYTES), np.uint8)
    letters = np.frombuffer(b"etaoinshrdlu cmfwypvbgkjqxz ETAOI\n0123456789;:(){}[]=+-_<>", np.uint8)
    words = letters[np.minimum(random.geometric(0.12, (2000, 8)), letters.size) - 1]
    quarter = np.arange(count) // 32 % 4
    text = np.flatnonzero(quarter == 0)
    picks = np.minimum(random.zipf(1.3, (text.size, PAGE_BYTES // 8)), 2000) - 1
    rows[text] = words[picks].reshape(-1, PAGE_BYTES)
    table = np.flatnonzero(quarter == 1)
    values = np.cumsum(random.integers(0, 40, (table.size, PAGE_BYTES // 4)), axis=1, dtype=np.uint32)
    rows[table] = values.view(np.uint8)
    return rows


def scattered(random: np.random.Generator, count: int, total: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Page numbers in runs of eight on average, as guests have them."""
    gaps = np.where(random.random(count) < 1 / 8, random.integers(2, 8, count), 1)
    numbers = np.cumsum(gaps)
    if numbers[-1] >= total:
        numbers = np.arange(count) + (total - count) // 2
    return numbers.astype(np.uint32)


class FileSink:
    """Writes pages to two files, one call for each run."""

    def __init__(self, ram_fd: int, disk_fd: int) -> None:
        self.descriptors = {Space.RAM: ram_fd, Space.DISK: disk_fd}
        self.written = 0

    def begin(self, pages: PageMap) -> None:
        pass

    def pages(self, batch: PageBatch) -> None:
        at = 0
        content = batch.data.data.cast("B")
        for start, length in runs_of(batch.numbers).tolist():
            piece = content[at * PAGE_BYTES : (at + length) * PAGE_BYTES]
            os.pwrite(self.descriptors[batch.space], piece, start * PAGE_BYTES)
            at += length
        self.written += at * PAGE_BYTES

    def finish(self, device_state: bytes) -> None:
        pass


def run_create(bench: Bench, name: str, **options: Any) -> tuple[CreateReport, float]:
    """Create an overlay; the report and CPU seconds."""
    with ExitStack() as stack:
        base = bench.base(stack)
        with (bench.directory / "index").open("rb") as file:
            index = PageIndex.load(file.fileno(), base.identity)
        out = bench.open(stack, name, "wb")
        spool = stack.enter_context(tempfile.TemporaryFile(dir=bench.directory))
        state = np.random.default_rng(1).integers(0, 4, 256 << 10, np.uint8).tobytes()
        about = Description(App("bench"), "2026-11-24T23:00:00Z", MACHINE, SECTIONS, state)
        started = time.process_time()
        report = create(out, spool, about, bench.source("ram"), bench.source("disk"), base, index, **options)
        return report, time.process_time() - started


def run_apply(bench: Bench, transfers: int = 1) -> dict[str, float]:
    """Apply once, in this process; or several times at once, the further ones with literals in files."""
    with ExitStack() as stack:
        base = bench.base(stack)
        sinks = [
            FileSink(
                bench.open(stack, f"out.{number}.ram", "wb").fileno(),
                bench.open(stack, f"out.{number}.disk", "wb").fileno(),
            )
            for number in range(transfers)
        ]
        files = [bench.open(stack, "overlay") for _ in sinks]
        before = resident("VmRSS")
        started, cpu = time.perf_counter(), time.process_time()
        threads = [
            threading.Thread(
                target=apply,
                args=(OverlayReader(file, allow_unsigned=True), base, sink),
                kwargs={"spool_fd": bench.open(stack, f"out.{number}.spool", "w+b").fileno()},
            )
            for number, (file, sink) in enumerate(zip(files[1:], sinks[1:], strict=True))
        ]
        for thread in threads:
            thread.start()
        apply(OverlayReader(files[0], allow_unsigned=True), base, sinks[0])
        for thread in threads:
            thread.join()
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "bytes": sum(sink.written for sink in sinks),
            "memory_mib": (resident("VmHWM") - before) / MIB,
        }


def resident(field: str) -> int:
    """A field of this process' status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run_anchor(bench: Bench, bytes_out: int) -> dict[str, float]:
    """``zstd -d`` of the frames alone, and the time that writing as much as apply does would add."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = ["zstd", "-q", "-d", "-f", "--single-thread", "frames.zst", "-o", "frames.raw"]
    subprocess.run(command, cwd=bench.directory, check=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    written = (bench.directory / "frames.raw").stat().st_size
    rest = memoryview(bytes(2 * MIB))
    with (bench.directory / "rest").open("wb", buffering=0) as file:
        started, cpu_started = time.perf_counter(), time.process_time()
        for at in range(written, bytes_out, len(rest)):
            file.write(rest[: bytes_out - at])
        rest_seconds, rest_cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "bytes": written,
        "with_write_seconds": seconds + rest_seconds,
        "with_write_cpu_seconds": cpu + rest_cpu,
    }


def in_child(bench: Bench, transfers: int = 1) -> dict[str, float]:
    """Apply in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--apply-in", str(bench.directory)]
    command += ["--transfers", str(transfers)]
    if bench.real:
        command += ["--base", str(bench.real.path)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def medians(run: Callable[[], dict[str, float]], rounds: int) -> dict[str, float]:
    results = [run() for _ in range(rounds)]
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def measure(bench: Bench, mib: int, rounds: int) -> dict[str, Any]:
    bench.fill(mib)
    with ExitStack() as stack:
        base = bench.base(stack)
        runs = np.array([[5000, 8000]], np.uint32)
        started = time.process_time()
        index = PageIndex.build(base, runs)
        built = time.process_time() - started
        index.save(bench.open(stack, "index", "wb"))
    created = [run_create(bench, "overlay") for _ in range(rounds)]
    report = run_create(bench, "overlay", plain_delta=True)[0]
    changed_mib = report.changed_pages * PAGE_BYTES / MIB
    return {
        "changed_mib": changed_mib,
        "overlay_mib": report.file_bytes / MIB,
        "plain_delta_mib": (report.plain_delta_bytes or 0) / MIB,
        "index_build_cpu_us_per_page": built / 24_000 * 1e6,
        "index_entries": len(index),
        "create_cpu_seconds_per_100_mib": statistics.median(cpu for _, cpu in created) / changed_mib * 100,
        "create_wall_seconds": report.seconds,
        **measure_apply(bench, report.changed_pages * PAGE_BYTES, rounds),
        "pages": {
            space.name: {o.name: n for o, n in counts.items()} for space, counts in report.pages.items()
        },
    }


def measure_apply(bench: Bench, bytes_out: int, rounds: int) -> dict[str, Any]:
    """Apply an overlay and do what it is compared with, in turns, so that a noisy neighbour meets both."""
    with ExitStack() as stack:
        frames = bench.open(stack, "frames.zst", "wb")
        reader = OverlayReader(bench.open(stack, "overlay"), allow_unsigned=True)
        for part in reader.parts():
            if isinstance(part, Frame):
                frames.write(part.blob)
    anchors, applied = [], []
    for _ in range(rounds):
        anchors.append(run_anchor(bench, bytes_out))
        applied.append(in_child(bench))
    anchor, applying = (
        medians(lambda: anchors.pop(), rounds),
        medians(lambda: applied.pop(), rounds),
    )
    return {
        "apply": applying,
        "apply_mib_per_second": applying["bytes"] / MIB / applying["seconds"],
        "zstd": anchor,
        "zstd_mib_per_second": anchor["bytes"] / MIB / anchor["seconds"],
        "throughput_ratio": applying["bytes"] / applying["seconds"] / (anchor["bytes"] / anchor["seconds"]),
        "equal_work_ratio": anchor["with_write_seconds"] / applying["seconds"],
        "equal_work_cpu_ratio": anchor["with_write_cpu_seconds"] / applying["cpu_seconds"],
    }


def measure_real(bench: Bench, overlay: Path, rounds: int) -> dict[str, Any]:
    """Apply an overlay of a real machine."""
    shutil.copyfile(overlay, bench.directory / "overlay")
    with overlay.open("rb") as file:
        totals = OverlayReader(file, allow_unsigned=True).root.totals
    pages = totals.ram_pages + totals.disk_pages
    return {
        "overlay_mib": overlay.stat().st_size / MIB,
        "changed_mib": pages * PAGE_BYTES / MIB,
        **measure_apply(bench, pages * PAGE_BYTES, rounds),
    }


def measure_memory(bench: Bench, overlay_mib: int) -> dict[str, Any]:
    """Memory of a process that applies a synthetic overlay of about this size, once and twice at a time."""
    bench.fill(int(overlay_mib / _OVERLAY_SHARE))
    with ExitStack() as stack:
        index = PageIndex.build(bench.base(stack), np.array([[5000, 8000]], np.uint32))
        index.save(bench.open(stack, "index", "wb"))
    report, _ = run_create(bench, "overlay")
    for name in ("ram.pages", "disk.pages"):
        (bench.directory / name).unlink()
    return {
        "overlay_mib": report.file_bytes / MIB,
        "memory_mib": in_child(bench)["memory_mib"],
        "memory_of_two_mib": in_child(bench, transfers=2)["memory_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the overlay engine on one core.")
    parser.add_argument("--mib", type=int, default=100, help="size of the capture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--base", type=Path, help="the folder of a real base")
    parser.add_argument("--overlay", type=Path, help="an overlay on it")
    parser.add_argument("--overlay-mib", type=int, help="measure memory, with an overlay of about this size")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--apply-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--transfers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    real = BaseStore(options.base.parent).find(options.base.name) if options.base else None
    if options.apply_in:
        print(json.dumps(run_apply(Bench(options.apply_in, real), options.transfers)))
        return
    if not shutil.which("zstd"):
        parser.error("the anchor needs the program zstd")
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as directory:
        bench = Bench(Path(directory), real, options.seed)
        if real:
            result = measure_real(bench, options.overlay, options.rounds)
        elif options.overlay_mib:
            result = measure_memory(bench, options.overlay_mib)
        else:
            result = measure(bench, options.mib, options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()
