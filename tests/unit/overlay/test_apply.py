"""Applying; that what goes in comes out is in ``test_create``, what is refused in ``test_reader``."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.apply import LiteralRing, LiteralSpool, apply, verify_only
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.create import Description, create
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageSource

from .world import APP, MACHINE, SECTIONS, Rebuilt, World, noise, page, unsigned


def test_progress_ends_at_the_size_of_the_file(world: World, small: bytes) -> None:
    told: list[tuple[int, int]] = []
    apply(unsigned(small), world.base, Rebuilt(world), progress=lambda *a: told.append(a))
    assert told[-1] == (len(small), len(small))
    assert told == sorted(told)
    again: list[tuple[int, int]] = []
    verify_only(unsigned(small), progress=lambda *a: again.append(a))
    assert again == told


def test_the_map_is_known_before_the_first_page(world: World, small: bytes) -> None:
    """A sink that stops at once has got the whole map, and no more was read than it needs."""

    class Stop(Exception):  # noqa: N818
        pass

    class Impatient(Rebuilt):
        def begin(self, pages: PageMap) -> None:
            super().begin(pages)
            raise Stop

    sink, reader = Impatient(world), unsigned(small)
    with pytest.raises(Stop):
        apply(reader, world.base, sink)
    assert sum(len(numbers) for numbers in sink.announced.values()) == 19
    assert reader.offset == reader.header.parts_start + reader.root.map_frames[0].size


def test_an_overlay_of_nothing(world: World) -> None:
    rebuilt = world.apply(world.create()[0])
    assert (rebuilt.ram == world.ram).all()
    assert rebuilt.device is not None


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_last_literals_are_kept(kind: str) -> None:
    with TemporaryFile() as spool:
        literals = LiteralRing(10) if kind == "memory" else LiteralSpool(10, spool.fileno())
        rows = np.stack([page(i) for i in range(37)])
        for at in range(0, 37, 7):
            literals.add(at, rows[at : at + 7])
            end = min(at + 7, 37)
            kept = np.arange(max(0, end - 10), end, dtype=np.uint32)
            room = np.zeros((20, PAGE_BYTES), np.uint8)
            literals.take(kept, room, np.arange(kept.size) * 2)
            assert (room[: 2 * kept.size : 2] == rows[kept]).all()
            assert not room[1::2].any()


def test_literals_in_a_file_give_the_same_pages(world: World) -> None:
    overlay = world.create(ram={5: page(1), 6: page(2), 9: page(1)}, disk={3: page(2), 4: page(3)})[0]
    with TemporaryFile() as spool:
        spooled = world.apply(overlay, spool_fd=spool.fileno())
    plain = world.apply(overlay)
    assert (spooled.ram == plain.ram).all()
    assert (spooled.disk == plain.disk).all()


MEASURE = textwrap.dedent(
    """
    import io, os, resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.unit.overlay.world import MACHINE, SECTIONS
    from dataclasses import replace
    from cloudlet.overlay.apply import apply
    from cloudlet.overlay.base import BasePages
    from cloudlet.overlay.reader import OverlayReader
    def status(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    class Nothing:
        def begin(self, pages): pass
        def pages(self, batch): self.last = batch.data[-1, -1]
        def finish(self, device): print("done", flush=True)
    file, base_fd = os.fdopen(int(sys.argv[2]), "rb"), int(sys.argv[3])
    machine = replace(MACHINE, memory_bytes=int(sys.argv[4]))
    base = BasePages("ab" * 32, machine, SECTIONS, base_fd, base_fd)
    limit = status("VmSize") + (160 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = status("VmRSS")
    apply(OverlayReader(file, allow_unsigned=True), base, Nothing())
    print((status("VmHWM") - before) / (1 << 20))
    """
)


def test_memory_is_bounded() -> None:
    """200 MiB of literals for a guest of 64 GiB, in a process that may have 160 MiB more."""
    machine = replace(MACHINE, memory_bytes=64 << 30)
    pages = noise(51_200)
    numbers = np.arange(51_200, dtype=np.uint32) * 300
    with TemporaryFile() as empty, TemporaryFile() as out:
        empty.truncate(64 << 30)
        base = BasePages("ab" * 32, machine, SECTIONS, empty.fileno(), empty.fileno())
        nothing = (np.empty(0, kind) for kind in (np.uint64, np.uint64, np.uint32, np.uint8))
        index = PageIndex("ab" * 32, *nothing)
        about = Description(APP, "2026-11-24T23:00:00Z", machine, SECTIONS, b"x")
        with TemporaryFile() as spool:
            create(out, spool, about, PageSource(numbers, pages), PageSource.empty(), base, index, level=-5)
        out.seek(0)
        fds = (out.fileno(), empty.fileno())
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(Path(__file__).parents[3]), *map(str, fds), str(64 << 30)],
            pass_fds=fds,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    done, grown = ran.stdout.split()
    assert done == "done"
    assert 60 < float(grown) < 96
