"""What a page server tells of its files is not believed where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.early import told_in_pages
from cloudlet.hypervisor.qemu.layer import LayerWriter
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, Space, runs_of
from tests.unit.overlay.world import MACHINE

BLOCKS = [7, 8, 40]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LayerWriter]:
    runs = [runs_of(np.array(numbers, np.uint32)) for numbers in ([1, 2], BLOCKS)]
    writer = LayerWriter(Layer("", PageMap(*runs), tmp_path / "ram", tmp_path / "disk"), MACHINE)
    yield writer
    writer.close()


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ((0, 1, 2), [(Space.RAM, [1, 2])]),
        ((0, 1 << 60, 1), []),
        ((0, 0, 0), []),
        ((2, 0, 1), []),
        ((255, 0, 1), []),
    ],
)
def test_places_become_pages(
    told: tuple[int, int, int], found: list[tuple[Space, list[int]]], writer: LayerWriter
) -> None:
    assert _told(writer, *told) == found


def test_no_more_than_there_is(writer: LayerWriter) -> None:
    last = MACHINE.memory_bytes // PAGE_BYTES - 1
    assert _told(writer, 0, last, (1 << 32) - 1) == [(Space.RAM, [last])]
    assert _told(writer, 1, 0, (1 << 32) - 1) == [(Space.DISK, BLOCKS)]


def _told(writer: LayerWriter, file: int, place: int, count: int) -> list[tuple[Space, list[int]]]:
    found: list[tuple[Space, list[int]]] = []

    def wanted(space: Space, numbers: Numbers) -> None:
        found.append((space, numbers.tolist()))

    told_in_pages(wanted, writer)(file, place, count)
    return found
