"""A fake machine's pages, read while it runs: its RAM and its disk are files, and so are the base's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cloudlet.errors import FailedError
from cloudlet.hypervisor.digest import MachineDigest
from cloudlet.hypervisor.driver import Sections
from cloudlet.hypervisor.fake.devices import read_state
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.base import read_rows
from cloudlet.overlay.pages import Numbers, Rows, Space, equal_rows
from cloudlet.sparse import CHUNK_BYTES, chunks

Files = Mapping[Space, tuple[Path, Path]]
"""Of each space the machine's file and the base's."""


class FakeRounds:
    """See :class:`cloudlet.hypervisor.driver.Rounds`."""

    def __init__(self, files: Files, stand_still: Callable[[], bytes]) -> None:
        self._stand_still = stand_still
        self._told = {space: np.empty(0, np.uint32) for space in files}
        with ExitStack() as on_error:
            self._descriptors = {
                space: [on_error.enter_context(path.open("rb")).fileno() for path in paths]
                for space, paths in files.items()
            }
            self._files = on_error.pop_all()

    def held(self, space: Space) -> Numbers:
        """The pages that differ, and those that once did, in order."""
        found = [numbers for numbers, _ in differing(*self._descriptors[space])]
        self._told[space] = np.unique(np.concatenate([self._told[space], *found]))
        return self._told[space]

    def read(self, space: Space, numbers: Numbers, rows: Rows) -> None:
        """Fill ``rows`` with pages."""
        mine, _ = self._descriptors[space]
        if read_rows(mine, numbers, rows, np.arange(len(numbers))) is not None:
            raise FailedError("a file of the machine ends early")

    def pass_over_layer(self) -> None:
        """There is none."""

    def settle(self) -> tuple[bytes, Sections]:
        """Have the machine stand still: its device state and the sections of that."""
        state = self._stand_still()
        return state, read_state(state)[0]

    def close(self) -> None:
        """Close the files. Can be called again."""
        self._files.close()


def digest_files(files: Files) -> bytes:
    """See :class:`~cloudlet.hypervisor.digest.MachineDigest`."""
    digest = MachineDigest()
    digest.add_ram(np.fromfile(files[Space.RAM][0], np.uint8).reshape(-1, PAGE_BYTES))
    mine, base = files[Space.DISK]
    with mine.open("rb") as one, base.open("rb") as other:
        for numbers, rows in differing(one.fileno(), other.fileno()):
            digest.add_blocks(numbers, rows)
    return digest.digest()


def differing(mine: int, base: int) -> Iterator[tuple[Numbers, Rows]]:
    """The pages of a file that differ from another's of the same size, in order."""
    # A chunk without data in either file is zeros in both.
    for chunk in sorted({number for file in (mine, base) for number, _ in chunks(file)}):
        one, other = (_rows(file, chunk) for file in (mine, base))
        places = np.flatnonzero(~equal_rows(one, other))
        yield (places + chunk * (CHUNK_BYTES // PAGE_BYTES)).astype(np.uint32), one[places]


def _rows(file: int, chunk: int) -> Rows:
    return np.frombuffer(os.pread(file, CHUNK_BYTES, chunk * CHUNK_BYTES), np.uint8).reshape(-1, PAGE_BYTES)
