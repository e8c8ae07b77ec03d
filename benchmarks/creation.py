"""What making an overlay costs, and what its bytes are, stage by stage."""

from __future__ import annotations

import io
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import REFERENCE
from benchmarks.lab import MODEL, ROUTE_PLANNER, Lab, say, tool
from benchmarks.results import Results
from benchmarks.starts import saved
from benchmarks.transfers import compress_into
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.model import MEBIBYTE, PAGE_BYTES
from cloudlet.overlay.apply import apply
from cloudlet.overlay.create import CreateReport
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, Space, runs_of
from cloudlet.overlay.payload import Operation
from cloudlet.overlay.reader import OverlayReader
from cloudlet.sparse import write_at
from cloudlet.store.bases import Base
from cloudlet.transfer.source import open_source

_XDELTA_SECONDS = 90.0


def create(lab: Lab, results: Results) -> None:
    """The recipe is run and its result captured and packed, several times; the last time with its sizes."""
    base = lab.base()
    output = lab.scratch / "created.overlay"
    for _ in range(lab.times(3)):
        used: dict[str, float] = {}

        def told(step: str, used: dict[str, float] = used) -> None:
            used[step] = time.process_time()

        published = lab.publish(base, output, told=told)
        cpu = time.process_time() - used["pack"]
        changed_mib = published.report.changed_pages * PAGE_BYTES / MEBIBYTE
        results.add("create.changed_mib", changed_mib)
        results.add("create.pause_s", published.pause_seconds)
        results.add("create.pause_per_100_mib_s", published.pause_seconds / changed_mib * 100)
        results.add("create.cpu_s", cpu)
        results.add("create.cpu_per_100_mib_s", cpu / changed_mib * 100)
        results.add("create.pack_s", published.seconds["pack"])


def sizes(lab: Lab, results: Results) -> None:
    """The overlay's bytes: reference application and route planner, on our guest and on a default one."""
    output = lab.scratch / "created.overlay"
    for app, recipe, told in (("", REFERENCE, MODEL), ("planner.", ROUTE_PLANNER, {})):
        for guest, ours in (("", True), ("default.", False)):
            say(f"sizes: {recipe.name} on {'our' if ours else 'a default'} guest")
            try:
                made = lab.publish(lab.base(ours=ours), output, told, recipe=recipe, plain_delta=True)
            except FailedError as error:
                results.notes[f"{app}{guest}sizes"] = str(error)  # the planner's wheels need a network
                continue
            _sizes(made.report, results, f"{app}{guest}")


def stages(lab: Lab, results: Results) -> None:
    """The same change as other tools would send it: a full stream, a full image, xdelta3 of both files."""
    with saved(lab, results) as (_, stream):
        packed = stream.with_suffix(".zst")
        results.add("stream_zstd_bytes", compress_into(stream, packed))
    results.add("our_guest_stream_zstd_bytes", _stream_of_clone(lab, results))
    base, overlay = lab.base(), lab.overlay()
    results.add("overlay_bytes", overlay.stat().st_size)
    folder = lab.scratch / "rebuilt"
    folder.mkdir()
    try:
        say("xdelta3 of the RAM and of the disk")
        _rebuild(base, overlay, folder)
        _xdelta(base, folder, results)
    finally:
        shutil.rmtree(folder)


def _sizes(report: CreateReport, results: Results, prefix: str) -> None:
    results.add(f"{prefix}created_overlay_bytes", report.file_bytes)
    assert report.plain_delta_bytes
    results.add(f"{prefix}plain_delta_bytes", report.plain_delta_bytes)
    results.add(f"{prefix}changed_bytes", report.changed_pages * PAGE_BYTES)
    results.add(f"{prefix}captured_bytes", sum(report.captured.values()) * PAGE_BYTES)
    results.add(f"{prefix}literal_bytes", report.literal_bytes)
    for operation in Operation:
        pages = sum(counts[operation] for counts in report.pages.values())
        results.add(f"{prefix}pages.{operation.name.lower()}", pages)


def _stream_of_clone(lab: Lab, results: Results) -> int:
    """A full stream of the synthesised machine: the smallest, since its kernel zeroes what it frees."""
    stream, packed = lab.scratch / "clone.stream", lab.scratch / "clone.zst"
    with (
        open_source(str(lab.overlay()), io.BytesIO()) as source,
        synthesise(lab.site, source, Request(start=Start.FULL)) as made,
    ):
        instance = made.instance
        assert isinstance(instance, QemuInstance)
        instance.pause()
        plain.save_stream(instance, stream)
    try:
        results.add("our_guest_stream_bytes", stream.stat().st_size)
        return compress_into(stream, packed)
    finally:
        stream.unlink()
        packed.unlink(missing_ok=True)


class _Files:
    """A sink that writes pages over copies of the base's files."""

    def __init__(self, folder: Path, base: Base) -> None:
        self._files = {}
        for space, source in ((Space.RAM, base.image().ram), (Space.DISK, base.image().disk)):
            copy = folder / space.name.lower()
            tool(["cp", "--sparse=always", str(source), str(copy)])
            copy.chmod(0o600)
            self._files[space] = copy.open("r+b", buffering=0)

    def begin(self, pages: PageMap) -> None:
        pass

    def pages(self, batch: PageBatch) -> None:
        content, at = batch.data.data.cast("B"), 0
        for start, length in runs_of(batch.numbers).tolist():
            piece = content[at : at + length * PAGE_BYTES]
            write_at(self._files[batch.space].fileno(), piece, start * PAGE_BYTES)
            at += length * PAGE_BYTES

    def finish(self, device_state: bytes) -> None:
        for file in self._files.values():
            file.close()


def _rebuild(base: Base, overlay: Path, folder: Path) -> None:
    """The whole RAM and disk that an overlay stands for, as two files."""
    with overlay.open("rb") as file, base.pages() as pages:
        apply(OverlayReader(file, allow_unsigned=True), pages, _Files(folder, base))


def _xdelta(base: Base, folder: Path, results: Results) -> None:
    deadline = time.monotonic() + _XDELTA_SECONDS
    total = 0
    began = time.monotonic()
    for name, old in (("ram", base.image().ram), ("disk", base.image().disk)):
        delta = folder / f"{name}.xdelta"
        # The largest source window it takes, so that it sees the whole of the old file if it can.
        command = ["xdelta3", "-e", "-f", "-q", "-3", "-B", str(2 << 30 if name == "disk" else 1 << 30)]
        command += ["-s", str(old), str(folder / name), str(delta)]
        try:
            tool(command, seconds=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            results.notes["xdelta3"] = f"did not end within {_XDELTA_SECONDS:.0f} s ({name})"
            return
        size = delta.stat().st_size
        results.add(f"xdelta_{name}_bytes", size)
        total += size
    results.add("xdelta_bytes", total)
    results.add("xdelta_s", time.monotonic() - began)
