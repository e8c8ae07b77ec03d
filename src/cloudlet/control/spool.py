"""The pages of an overlay, built and kept in files: for who wants to pack them again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, PageSource, Space, numbers_of
from cloudlet.sparse import write_rows


class PageSpool:
    """A sink of the overlay engine; its files are in ``folder``, and go with it."""

    def __init__(self, folder: Path) -> None:
        self.device_state = b""
        self._folder = folder
        self._numbers: dict[Space, Numbers] = {}

    def begin(self, pages: PageMap) -> None:
        """Make room for the pages that will come."""
        for space in Space:
            self._numbers[space] = numbers_of(pages.runs(space))
            with self._file(space).open("xb") as file:
                file.truncate(self._numbers[space].size * PAGE_BYTES)

    def pages(self, batch: PageBatch) -> None:
        """Keep some."""
        places = np.searchsorted(self._numbers[batch.space], batch.numbers)
        descriptor = os.open(self._file(batch.space), os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_rows(descriptor, places, batch.data)
        finally:
            os.close(descriptor)

    def finish(self, device_state: bytes) -> None:
        """All is here."""
        self.device_state = device_state

    def sources(self) -> dict[Space, PageSource]:
        """The pages as a capture would give them."""
        return {space: self._source(space) for space in Space}

    def _source(self, space: Space) -> PageSource:
        numbers = self._numbers[space]
        if not numbers.size:
            return PageSource.empty()
        return PageSource(numbers, np.memmap(self._file(space), np.uint8, "r").reshape(-1, PAGE_BYTES))

    def _file(self, space: Space) -> Path:
        return self._folder / space.name.lower()
