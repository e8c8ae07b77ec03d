"""An instance's disk, read through its own file, its layer's and the base's."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cloudlet.errors import CorruptError
from cloudlet.hypervisor.digest import MachineDigest
from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.disk import InstanceDisk
from cloudlet.hypervisor.qemu.layer import layer_pages
from cloudlet.hypervisor.qemu.qcow2 import GrowingQcow2, Qcow2Writer
from cloudlet.model import Accelerator, Machine
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, Rows, Space, runs_of

BLOCK = 4096
BLOCKS = 2000
SIZE = BLOCKS * BLOCK
BASE, LAYER, OWN = range(1, 4)


def rows_of(numbers: list[int], mark: int) -> Rows:
    rows = np.zeros((len(numbers), BLOCK), np.uint8)
    rows[:, 0] = mark
    rows[:, 1:5] = np.array(numbers, "<u4").view(np.uint8).reshape(-1, 4)
    return rows


def numbers(of: list[int]) -> Numbers:
    return np.array(sorted(of), np.uint32)


class Chain:
    """A base with blocks 0 to 99, a layer with 50 to 149, and what the guest wrote: 90 to 109 and 500."""

    def __init__(self, folder: Path, *, with_layer: bool) -> None:
        self.base, self.layer_disk, self.own = folder / "base", folder / "layer", folder / "own"
        with self.base.open("wb") as file:
            file.write(rows_of(list(range(100)), BASE).tobytes())
            file.truncate(SIZE)
        self.layer = None
        under = list(range(50, 150))
        (folder / "ram").touch()
        if with_layer:
            layer = Qcow2Writer(self.layer_disk, SIZE)
            layer.announce(numbers(under))
            layer.write(numbers(under), rows_of(under, LAYER))
            layer.close()
            none = runs_of(np.empty(0, np.uint32))
            self.layer = Layer(
                "ab" * 32, PageMap(none, runs_of(numbers(under))), folder / "ram", self.layer_disk
            )
        own = GrowingQcow2(self.own, SIZE)
        written = [*range(90, 110), 500]
        own.write(numbers(written), rows_of(written, OWN))
        # Given back: where the layer or the base has something, where only the base has, where nothing is.
        own.write(numbers([20, 60, 700, 120]), np.zeros((4, BLOCK), np.uint8))
        own.finish()
        own.close()

    def open(self) -> InstanceDisk:
        return InstanceDisk(self.own, self.base, self.layer, SIZE)

    def truth(self, folder: Path) -> Rows:
        """The whole disk, as QEMU's tool reads it."""
        options = [f"driver=raw,file.filename={self.base}"]
        for path in ([self.layer_disk] if self.layer else []) + [self.own]:
            under = ",".join(f"backing.{option}" for option in options[-1].split(","))
            options.append(f"driver=qcow2,file.filename={path},{under}")
        command = ["qemu-img", "convert", "--image-opts", options[-1], "-O", "raw", str(folder / "raw")]
        subprocess.run(command, check=True, timeout=60)
        return np.fromfile(folder / "raw", np.uint8).reshape(-1, BLOCK)


@pytest.mark.parametrize("on_layer", [False, True])
@pytest.mark.parametrize("with_layer", [False, True])
def test_the_blocks_that_differ(tmp_path: Path, on_layer: bool, with_layer: bool) -> None:
    chain = Chain(tmp_path, with_layer=on_layer)
    truth = chain.truth(tmp_path)
    with chain.open() as disk:
        blocks = disk.look(with_layer=with_layer)
        own = {*range(90, 110), 500, 20, 60}
        if on_layer:
            own |= {120}
        assert blocks.numbers.tolist() == sorted(
            own | (set(range(50, 150)) if on_layer and with_layer else set())
        )
        for settled in (True, False):
            rows = np.full((len(blocks.numbers), BLOCK), 0xEE, np.uint8)
            disk.read(blocks, blocks.numbers.astype(np.uint32), rows, settled=settled)
            assert np.array_equal(rows, truth[blocks.numbers])
        # Any block can be read, whether it was found or not.
        everything = np.arange(BLOCKS, dtype=np.uint32)
        rows = np.full((BLOCKS, BLOCK), 0xEE, np.uint8)
        disk.read(blocks, everything, rows)
        assert np.array_equal(rows, truth)
        assert np.array_equal(disk.read_base(everything)[:100], rows_of(list(range(100)), BASE))


def test_blocks_at_random(tmp_path: Path) -> None:
    chain = Chain(tmp_path, with_layer=True)
    truth = chain.truth(tmp_path)
    rng = random.Random(5)
    with chain.open() as disk:
        blocks = disk.look()
        for _ in range(30):
            some = numbers(rng.sample(range(BLOCKS), rng.randrange(1, 300)))
            rows = np.full((len(some), BLOCK), 0xEE, np.uint8)
            disk.read(blocks, some, rows)
            assert np.array_equal(rows, truth[some])


def test_a_file_that_is_behind_its_tables(tmp_path: Path) -> None:
    """While QEMU writes this is nothing; when it stands still something is wrong."""
    chain = Chain(tmp_path, with_layer=False)
    with chain.open() as disk:
        blocks = disk.look()
        wanted = blocks.numbers.astype(np.uint32)
        rows = np.zeros((len(wanted), BLOCK), np.uint8)
        os.truncate(chain.own, int(blocks.offsets.max()))
        disk.read(blocks, wanted, rows, settled=False)
        assert rows[wanted == 100][0, 0] in (0, OWN)
        with pytest.raises(CorruptError, match="ends before"):
            disk.read(blocks, wanted, rows)
        # The tables stood behind the blocks and are gone now.
        assert disk.look(settled=False).numbers.tolist() == []
        with pytest.raises(CorruptError, match="ends before its tables"):
            disk.look()


def test_a_layer_and_where_its_pages_are(tmp_path: Path) -> None:
    chain = Chain(tmp_path, with_layer=True)
    assert chain.layer
    machine = Machine("fake", Accelerator.TCG, "fake", 1, SIZE, SIZE)
    before = sorted(Path("/proc/self/fd").iterdir())
    with layer_pages(chain.layer, machine) as held:
        blocks = held[Space.DISK]
        assert blocks.numbers.tolist() == list(range(50, 150))
        found = b"".join(os.pread(blocks.descriptor, BLOCK, at) for at in blocks.offsets.tolist())
        assert found == rows_of(list(range(50, 150)), LAYER).tobytes()
        assert held[Space.RAM].numbers.size == 0
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_digest_is_of_content_and_place() -> None:
    def digest(ram: Rows, blocks: list[int], rows: Rows) -> bytes:
        made = MachineDigest()
        for row in ram:
            made.add_ram(row.reshape(1, -1))
        for at, block in enumerate(blocks):
            made.add_blocks(numbers([block]), rows[at : at + 1])
        return made.digest()

    ram, blocks = rows_of([0, 1, 2], BASE), rows_of([7, 9], OWN)
    first = digest(ram, [7, 9], blocks)
    whole = MachineDigest()
    whole.add_ram(ram)
    whole.add_blocks(numbers([7, 9]), blocks)
    assert whole.digest() == first
    others = [
        digest(ram[::-1], [7, 9], blocks),
        digest(ram, [7, 10], blocks),
        digest(ram, [7, 9], blocks[::-1]),
        digest(ram, [7], blocks),
        digest(ram[:2], [7, 9], blocks),
    ]
    assert len({first, *others}) == 6
