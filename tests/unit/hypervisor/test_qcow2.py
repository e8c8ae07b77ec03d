"""The disk's qcow2 file, as QEMU's own tools read it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.hypervisor.qemu.qcow2 import GrowingQcow2, Qcow2Writer, held_blocks
from cloudlet.model import GIBIBYTE
from cloudlet.overlay.known import ZEROS

BLOCK = 4096
LARGE = 8 * GIBIBYTE


def tool(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def content(block: int) -> np.ndarray[Any, Any]:
    row = np.zeros(BLOCK, np.uint8)
    row[:] = np.frombuffer(block.to_bytes(4, "little") * (BLOCK // 4), np.uint8)
    return row ^ 0x5A


def write(path: Path, size: int, blocks: list[int], order: list[int] | None = None) -> None:
    """A file with these blocks (sorted), written in another order and in several calls."""
    writer = Qcow2Writer(path, size)
    try:
        writer.announce(np.array(blocks, np.uint32))
        order = blocks if order is None else order
        for at in range(0, len(order), 700):
            part = order[at : at + 700]
            writer.write(np.array(part, np.uint32), np.stack([content(block) for block in part]))
    finally:
        writer.close()
        writer.close()


def check(path: Path, size: int, blocks: list[int]) -> None:
    """That QEMU finds the file whole, and in it these blocks and nothing else."""
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", str(path))
    assert json.loads(tool("qemu-img", "info", "--output=json", str(path)))["virtual-size"] == size
    found = {}
    with path.open("rb") as file:
        for block, offset in zip(*held_blocks(path, size), strict=True):
            assert offset != ZEROS
            found[int(block)] = os.pread(file.fileno(), BLOCK, int(offset))
    assert sorted(found) == blocks
    assert all(found[block] == content(block).tobytes() for block in blocks)


def check_whole(path: Path, size: int, blocks: list[int], raw: Path) -> None:
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    model = np.zeros((size // BLOCK, BLOCK), np.uint8)
    for block in blocks:
        model[block] = content(block)
    assert raw.read_bytes() == model.tobytes()


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        (LARGE, []),
        (LARGE, [0]),
        (LARGE, [LARGE // BLOCK - 1]),
        (LARGE, [0, 511, 512, 1023, 1024, LARGE // BLOCK - 1]),
        (LARGE, list(range(0, LARGE // BLOCK, 512 * 16))),
        (BLOCK, [0]),
        (BLOCK * 513, [0, 512]),
    ],
    ids=["none", "first", "last", "edges", "a block in many tables", "one block", "odd size"],
)
def test_blocks_are_where_they_belong(tmp_path: Path, size: int, blocks: list[int]) -> None:
    write(tmp_path / "disk", size, blocks)
    check(tmp_path / "disk", size, blocks)


def test_more_blocks_than_one_count_block_counts(tmp_path: Path) -> None:
    size = 40 << 20
    blocks = list(range(5000))
    write(tmp_path / "disk", size, blocks)
    check(tmp_path / "disk", size, blocks)
    check_whole(tmp_path / "disk", size, blocks, tmp_path / "raw")


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_blocks_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("qcow2")
    size = data.draw(st.integers(1, 2048)) * BLOCK
    blocks = sorted(data.draw(st.sets(st.integers(0, size // BLOCK - 1), max_size=300)))
    write(folder / "disk", size, blocks, data.draw(st.permutations(blocks)))
    check(folder / "disk", size, blocks)
    check_whole(folder / "disk", size, blocks, folder / "raw")


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, LARGE // BLOCK - 1), min_size=1, max_size=60))
@example({0, LARGE // BLOCK - 1})
def test_any_blocks_of_a_large_disk(tmp_path_factory: pytest.TempPathFactory, blocks: set[int]) -> None:
    folder = tmp_path_factory.mktemp("qcow2-large")
    write(folder / "disk", LARGE, sorted(blocks))
    check(folder / "disk", LARGE, sorted(blocks))


def test_a_block_that_comes_again_replaces_the_first(tmp_path: Path) -> None:
    writer = Qcow2Writer(tmp_path / "disk", 1 << 20)
    writer.announce(np.array([3, 9], np.uint32))
    writer.write(np.array([9, 3], np.uint32), np.stack([content(1), content(2)]))
    writer.write(np.array([9, 3], np.uint32), np.stack([content(9), content(3)]))
    writer.close()
    check(tmp_path / "disk", 1 << 20, [3, 9])


def test_a_block_that_did_not_come_is_zeros(tmp_path: Path) -> None:
    write(tmp_path / "disk", 1 << 20, [3, 9, 200], [200])
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", str(tmp_path / "disk"))
    check_whole(tmp_path / "disk", 1 << 20, [200], tmp_path / "raw")


def test_qemu_can_write_on_in_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    write(tmp_path / "disk", LARGE, [0, 700, LARGE // BLOCK - 1])
    # More than the reference counts that are there can count: QEMU has to add some.
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 16M 12M", "-c", f"discard {700 * BLOCK} 4k", path)
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", path)
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 7 16M 12M", path)
    blocks, offsets = held_blocks(tmp_path / "disk", LARGE)
    assert blocks.tolist() == [0, 700, *range(4096, 7168), LARGE // BLOCK - 1]
    assert blocks[offsets == ZEROS].tolist() == [700]


def test_the_file_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    with pytest.raises(FileExistsError):
        Qcow2Writer(tmp_path / "disk", BLOCK)


def test_a_file_that_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"no disk")
    with pytest.raises(CorruptError, match="it is cut"):
        held_blocks(tmp_path / "disk", 1 << 20)


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, b"XXXX"),  # another format
        (8, (4096).to_bytes(8, "big")),  # a backing file
        (20, (16).to_bytes(4, "big")),  # larger clusters
        (24, (1 << 40).to_bytes(8, "big")),  # another size
        (36, (1 << 30).to_bytes(4, "big")),  # a huge root table
        (40, (1 << 40).to_bytes(8, "big")),  # a root table beyond the file
        (72, (4).to_bytes(8, "big")),  # blocks in another file
        (4096, b"\x80" + (1 << 40).to_bytes(7, "big")),  # a table beyond the file
    ],
)
def test_what_a_machine_that_was_taken_over_can_write(tmp_path: Path, at: int, new: bytes) -> None:
    write(tmp_path / "disk", 1 << 20, [3, 9])
    with (tmp_path / "disk").open("r+b") as file:
        os.pwrite(file.fileno(), new, at)
    with pytest.raises(CorruptError):
        held_blocks(tmp_path / "disk", 1 << 20)


def test_one_cluster_for_all_blocks(tmp_path: Path) -> None:
    write(tmp_path / "disk", 1 << 21, [3])
    with (tmp_path / "disk").open("r+b") as file:
        root = int.from_bytes(os.pread(file.fileno(), 8, 4096), "big") & ~(1 << 63)
        os.pwrite(file.fileno(), os.pread(file.fileno(), 8, root + 24) * 512, root)
    with pytest.raises(CorruptError, match="cannot be where it says"):
        held_blocks(tmp_path / "disk", 1 << 21)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_blocks_that_nobody_announced(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("growing")
    count = data.draw(st.integers(1, 3000))
    block = st.integers(0, count - 1)
    base = np.stack([content(number) for number in range(count)])
    (folder / "base").write_bytes(base.tobytes())
    writer, model = GrowingQcow2(folder / "disk", count * BLOCK), base.copy()
    # Batches of blocks in no order, some again and again, some of them zeros.
    for batch in data.draw(st.lists(st.lists(st.tuples(block, st.integers(0, 3)), max_size=40), max_size=12)):
        numbers = np.array([number for number, _ in batch], np.uint32)
        rows = np.zeros((len(batch), BLOCK), np.uint8)
        for row, (_, mark) in zip(rows, batch, strict=True):
            row[:] = mark
        writer.write(numbers, rows)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            model[number] = row
    writer.finish()
    writer.close()
    writer.close()
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", str(folder / "disk"))
    image = f"driver=qcow2,file.filename={folder / 'disk'}"
    backing = f"backing.driver=raw,backing.file.filename={folder / 'base'}"
    tool("qemu-img", "convert", "--image-opts", f"{image},{backing}", "-O", "raw", str(folder / "raw"))
    assert (folder / "raw").read_bytes() == model.tobytes()
    found, _ = held_blocks(folder / "disk", count * BLOCK)
    assert set(np.flatnonzero((model != base).any(axis=1)).tolist()) <= set(found.tolist())


@pytest.mark.parametrize("count", [0, 1, 2040, 2050, 9000])
def test_a_large_disk_that_grows(tmp_path: Path, count: int) -> None:
    blocks = np.unique(np.linspace(0, LARGE // BLOCK - 1, count).astype(np.uint32))
    writer = GrowingQcow2(tmp_path / "disk", LARGE)
    for at in range(0, len(blocks), 256):
        part = blocks[at : at + 256]
        writer.write(part, np.stack([content(int(block)) for block in part]))
    writer.finish()
    writer.close()
    check(tmp_path / "disk", LARGE, blocks.tolist())
    # QEMU writes on where our clusters end.
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 16M 12M", str(tmp_path / "disk"))
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", str(tmp_path / "disk"))


def test_a_zero_block_takes_no_room(tmp_path: Path) -> None:
    writer = GrowingQcow2(tmp_path / "disk", 1 << 30)
    writer.write(np.arange(5000, dtype=np.uint32), np.zeros((5000, BLOCK), np.uint8))
    writer.finish()
    writer.close()
    assert (tmp_path / "disk").stat().st_size < 1 << 20
    blocks, offsets = held_blocks(tmp_path / "disk", 1 << 30)
    assert blocks.tolist() == list(range(5000))
    assert (offsets == ZEROS).all()


def test_what_a_running_machine_has_not_written_yet_is_passed_over(tmp_path: Path) -> None:
    path, size = tmp_path / "disk", 4 << 20
    write(path, size, [3, 9, 700])
    with path.open("r+b") as file:
        first = int.from_bytes(os.pread(file.fileno(), 8, 4096), "big") & ~(1 << 63)
        # A block that is compressed, one beyond the end, and a table that is beyond the end.
        os.pwrite(file.fileno(), ((1 << 62) | 8192).to_bytes(8, "big"), first + 8 * 9)
        os.pwrite(file.fileno(), (1 << 40).to_bytes(8, "big"), first + 8 * 11)
    blocks, _ = held_blocks(path, size, settled=False)
    assert blocks.tolist() == [3, 700]
    with pytest.raises(CorruptError, match="cannot be where it says"):
        held_blocks(path, size)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), (1 << 40 | 1 << 63).to_bytes(8, "big"), 4096 + 8)
    blocks, _ = held_blocks(path, size, settled=False)
    assert blocks.tolist() == [3]
    with pytest.raises(CorruptError, match="ends before its tables"):
        held_blocks(path, size)


def test_not_even_while_it_runs_may_it_say_anything(tmp_path: Path) -> None:
    path, size = tmp_path / "disk", 64 << 20
    write(path, size, [3])
    with path.open("r+b") as file:
        root = os.pread(file.fileno(), 8, 4096)
        table = int.from_bytes(root, "big") & ~(1 << 63)
        os.pwrite(file.fileno(), os.pread(file.fileno(), 8, table + 24) * 512, table)
        os.pwrite(file.fileno(), root * 32, 4096)
    with pytest.raises(CorruptError, match="cannot be where it says"):
        held_blocks(path, size, settled=False)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 8, 40)
    with pytest.raises(CorruptError, match="ends before its tables"):
        held_blocks(path, size, settled=False)
