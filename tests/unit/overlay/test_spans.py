"""Spans: content that came before at another place within a page."""

from __future__ import annotations

from tempfile import TemporaryFile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlet.overlay.pages import Rows, Space
from cloudlet.overlay.payload import Operation
from cloudlet.overlay.spans import SpanFinder

from .world import World, noise


def shifted(content: Rows, by: int) -> Rows:
    """The same bytes, ``by`` bytes further on, in as many pages and one."""
    sequence = np.zeros(content.size + 4096, np.uint8)
    sequence[by : by + content.size] = content.reshape(-1)
    return sequence.reshape(-1, 4096)


def numbered(first: int, rows: Rows) -> dict[int, Rows]:
    return {first + at: row for at, row in enumerate(rows)}


@pytest.mark.parametrize("by", [16, 48, 2048, 4088])
def test_a_buffer_that_holds_a_file_costs_references(world: World, by: int) -> None:
    file = noise(20)
    data, report = world.create(numbered(10, shifted(file, by)), numbered(20, file))
    assert report.pages[Space.DISK][Operation.LITERAL] == 20
    # The first and the last page of the buffer are not all of the file's.
    assert report.pages[Space.RAM][Operation.SPAN] >= 15
    rebuilt = world.apply(data)
    assert (rebuilt.ram[10:31] == shifted(file, by)).all()
    with TemporaryFile() as spool:
        assert (world.apply(data, spool_fd=spool.fileno()).ram == rebuilt.ram).all()


def test_what_is_shifted_by_odd_bytes_is_not_looked_for(world: World) -> None:
    file = noise(8)
    data, report = world.create(numbered(10, shifted(file, 3)), numbered(20, file))
    assert report.pages[Space.RAM][Operation.SPAN] == 0
    assert (world.apply(data).ram[10:19] == shifted(file, 3)).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 511)), min_size=1, max_size=12))
def test_pieces_of_what_came_are_put_together_rightly(world: World, pieces: list[tuple[int, int]]) -> None:
    file = noise(13)
    sequence = file.reshape(-1)
    cut = np.stack([sequence[page * 4096 + word * 8 :][:4096] for page, word in pieces])
    data, _ = world.create(numbered(30, cut), numbered(20, file))
    assert (world.apply(data).ram[30 : 30 + len(cut)] == cut).all()


def test_what_has_left_the_window_is_not_named() -> None:
    finder = SpanFinder()
    first = noise(1)
    anchors, offsets = (column.tolist() for column in finder.anchors(first))
    finder.add(first[0], anchors[0], offsets[0])
    assert finder.find(first[0], anchors[0], offsets[0], oldest=0) == 0
    assert finder.find(first[0], anchors[0], offsets[0], oldest=1) is None
    filler = np.zeros(4096, np.uint8)
    for number in range(16_384):
        filler[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        finder.add(filler, number + 1, 0)
    assert finder.find(first[0], anchors[0], offsets[0], oldest=4096) is None
