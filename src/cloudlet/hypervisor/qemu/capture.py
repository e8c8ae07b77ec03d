"""What a paused instance has made of its base, copied to files of its own: pages of RAM, blocks of the disk.

An instance stands on its base, and, where it was started from an app's image, on a layer of the app's
pages between them (:class:`~cloudlet.hypervisor.driver.Layer`). The kernel tells only what the guest has
written since. So what it never wrote but the layer brings is added from the layer's files; and what came from
another site likewise, from a file of the machine's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from cloudlet.errors import CloudletError
from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.disk import InstanceDisk
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.known import ZEROS
from cloudlet.overlay.pages import Numbers, PageSource, Space, numbers_of
from cloudlet.sparse import copy_some

Offsets = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class PagesBelow:
    """Pages of RAM that are not the base's, whether the guest has written them or not."""

    numbers: Numbers
    """In order."""
    ram: Path
    """A file as large as the guest's RAM, each page at its place."""

    @classmethod
    def of(cls, layer: Layer) -> Self:
        return cls(numbers_of(layer.pages.runs(Space.RAM)), layer.ram)


def add_below(path: Path, private: Numbers, below: PagesBelow) -> Numbers:
    """Add pages of RAM to the file of private pages, each page in the order of its number.

    :param path: the pages ``private``, one after the other; replaced by a file of all pages.
    :return: the numbers of all pages.
    """
    brought = below.numbers[~np.isin(below.numbers, private, assume_unique=True)]
    numbers = np.union1d(private, brought).astype(np.uint32)
    whole = path.with_suffix(".whole")
    with ExitStack() as files:
        source, pages = (os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in (path, below.ram))
        files.callback(os.close, source)
        files.callback(os.close, pages)
        target = os.open(whole, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        files.callback(os.close, target)
        os.ftruncate(target, len(numbers) * PAGE_BYTES)
        own = np.arange(len(private), dtype=np.int64)
        for descriptor, held, places in ((source, private, own), (pages, brought, brought.astype(np.int64))):
            _copy_pages(descriptor, places, target, np.searchsorted(numbers, held))
    whole.replace(path)
    return numbers


def copy_disk(disk: InstanceDisk, target: int) -> Numbers:
    """Copy the changed blocks of a disk whose machine is paused, in order, to ``target``; their numbers."""
    blocks = disk.look()
    os.ftruncate(target, len(blocks.numbers) * PAGE_BYTES)
    rows = np.arange(len(blocks.numbers))
    for number, descriptor in enumerate(disk.descriptors):
        mine = (blocks.files == number) & (blocks.offsets != ZEROS)
        _copy_pages(descriptor, blocks.offsets[mine] // PAGE_BYTES, target, rows[mine])
    return np.asarray(blocks.numbers, np.uint32)


def spooled(path: Path, numbers: Numbers) -> PageSource:
    """Pages that stand one after the other in a file."""
    if not len(numbers):
        return PageSource.empty()
    return PageSource(numbers, np.memmap(path, np.uint8, "r").reshape(-1, PAGE_BYTES))


def _copy_pages(source: int, places: Offsets, target: int, rows: np.ndarray[Any, Any]) -> None:
    """Copy pages at ``places`` of a file to ``rows`` of another; neighbours in both with one call."""
    for first, after in _stretches(places, rows):
        at, to = int(places[first]) * PAGE_BYTES, int(rows[first]) * PAGE_BYTES
        left = (after - first) * PAGE_BYTES
        while left:
            count = copy_some(source, target, left, at, to)
            if count == 0:
                raise CloudletError("a file of the instance ends before its tables say")
            at, to, left = at + count, to + count, left - count


def _stretches(places: Offsets, rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    if len(places):
        apart = (np.diff(places) != 1) | (np.diff(rows) != 1)
        yield from pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(places)])
