"""How soon a guest answers whose bytes have to come first, at the rate of a link.

The bytes come from a web server in a process of its own; the rate is kept by who receives them, as
``cloudlet run --rate`` does. What a slow link would only prolong is measured at 100 Mbit/s and computed
for 10 from its bytes: the figures say so.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import REFERENCE_PORT, Question, Reference, wait_answer
from benchmarks.lab import MODEL_MIB, Lab, compress_image, say, tool
from benchmarks.results import Results
from benchmarks.starts import saved, synthesis
from cloudlet.settings import Settings
from cloudlet.transfer.source import open_source

RATES = (1000, 100, 10)
"""Mbit/s."""
_PIECE = 256 << 10


def synthesised(lab: Lab, results: Results) -> None:
    """Synthesis at each rate."""
    ask = Reference(MODEL_MIB, lab.seed)
    overlay = lab.overlay()
    results.add("overlay_bytes", overlay.stat().st_size)
    with served(overlay) as url:
        synthesis_runs = {1000: lab.times(5, 1), 100: lab.times(3), 10: 1}
        for rate, runs in synthesis_runs.items():
            say(f"synthesis at {rate} Mbit/s")
            for _ in range(runs):
                synthesis(lab, results, f"synthesis_{rate}", url, ask, bytes_per_second(rate))


def images(lab: Lab, results: Results) -> None:
    """The full image, downloaded at 100 Mbit/s as a compressed qcow2 file, then booted."""
    ask = Reference(MODEL_MIB, lab.seed)
    image = lab.customised_image()
    packed = lab.scratch / "image.qcow2"
    results.add("image_bytes", compress_image(image.disk, packed))
    whole, boot = download_and_boot(lab.settings, image, packed, REFERENCE_PORT, ask, lab.scratch)
    results.add("image_100_s", whole)
    results.add("image.boot_s", boot)


def download_and_boot(
    settings: Settings,
    image: plain.Plain,
    packed: Path,
    port: int,
    ask: Question,
    scratch: Path,
) -> tuple[float, float]:
    """Download at 100 Mbit/s and boot from what has come: seconds of both, and of the boot alone."""
    here = scratch / "downloaded.qcow2"
    with served(packed) as url:
        began = time.monotonic()
        _download(url, here)
        came = time.monotonic()
        downloaded = plain.Plain(image.machine, here, image.kernel, image.initrd, image.cmdline)
        with plain.run(settings, downloaded, port) as instance:
            wait_answer(instance, ask)
            answered = time.monotonic()
    here.unlink()
    return answered - began, answered - came


def streams(lab: Lab, results: Results) -> None:
    """QEMU's full stream at 100 Mbit/s, compressed, restored while it comes; before it the disk's changes."""
    ask = Reference(MODEL_MIB, lab.seed)
    with saved(lab, results) as (disk, stream):
        packed = stream.with_suffix(".zst")
        results.add("stream_zstd_bytes", compress_into(stream, packed))
        changes = lab.scratch / "changes.qcow2"
        shutil.copyfile(lab.disk_changes(), changes)
        results.add("disk_changes_bytes", changes.stat().st_size)
        with served(packed) as url, served(changes) as first_url:
            tool(["qemu-img", "snapshot", "-a", "warm", str(disk.disk)])
            began = time.monotonic()
            _download(first_url, lab.scratch / "came.qcow2")
            with (
                _decompressing(url, bytes_per_second(100)) as pipe,
                plain.run(lab.settings, disk, REFERENCE_PORT, incoming=pipe) as instance,
            ):
                plain.run_on(instance)
                wait_answer(instance, ask, 60.0)
                results.add("stream_100_s", time.monotonic() - began)


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The URL of a file on a web server of its own process, on the loopback address."""
    program = (
        "import functools, http.server as h, sys\n"
        "handler = functools.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1])\n"
        "server = h.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path.parent)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/{path.name}"
        finally:
            server.kill()


def compress_into(path: Path, packed: Path) -> int:
    """Compress a file with zstd -3; the bytes it has then."""
    if not packed.exists():
        tool(["zstd", "-q", "-f", "-3", "-T2", str(path), "-o", str(packed)])
    return packed.stat().st_size


def wire(count: float, mbit: float) -> float:
    """Seconds that so many bytes take on a link."""
    return count * 8 / 1e6 / mbit


def bytes_per_second(mbit: float) -> float:
    return mbit * 1e6 / 8


def _download(url: str, path: Path) -> None:
    """Download at 100 Mbit/s."""
    with open_source(url, io.BytesIO(), bytes_per_second(100)) as source, path.open("wb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)


@contextmanager
def _decompressing(url: str, rate: float) -> Iterator[int]:
    """A pipe with the decompressed bytes of a URL, filled from a thread."""
    with (
        open_source(url, io.BytesIO(), rate) as source,
        subprocess.Popen(["zstd", "-q", "-d"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zstd,
    ):
        assert zstd.stdin and zstd.stdout
        target = zstd.stdin

        def feed() -> None:
            try:
                while piece := source.read(_PIECE):
                    target.write(piece)
                target.close()
            except (BrokenPipeError, ValueError):
                return  # QEMU ended early; who waits for its answer says so

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        descriptor = os.dup(zstd.stdout.fileno())
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            zstd.kill()
            thread.join(10.0)
