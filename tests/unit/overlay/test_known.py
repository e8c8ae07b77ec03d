"""What both ends hold: the layer's page where there is one, else the base's."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.overlay.index import JoinedIndex, digest_rows, index_of_layer
from cloudlet.overlay.known import ZEROS, HeldPages, KnownPages
from cloudlet.overlay.pages import Rows, Space

from .moving import OVERLAY, Held, held_pages
from .test_index import look
from .world import DISK_PAGES, RAM_PAGES, World, noise, page

ZERO = np.zeros(4096, np.uint8)
RAM = {0: page(1), 1: page(2), 2: ZERO, 7: page(3), 8: page(1000), 95: page(4)}
DISK = {3: page(5), 63: page(6)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(0, 15), st.integers(0, 2)),
    st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=40),
)
def test_each_page_is_the_layers_or_the_bases(
    world: World, layer: dict[int, int], asked: list[tuple[int, bool]]
) -> None:
    pages: dict[int, Rows] = {number: page(seed) if seed else ZERO for number, seed in layer.items()}
    with Held(world, pages, {}) as held:
        numbers = np.array([number for number, _ in asked], np.uint32)
        assert (held.known.read(Space.RAM, numbers) == held.pages[Space.RAM][numbers]).all()
        # Into rows of which some are to be left alone.
        positions = np.flatnonzero([wanted for _, wanted in asked])
        rows = np.full((numbers.size, 4096), 9, np.uint8)
        held.known.read_into(Space.RAM, numbers[positions], rows, positions)
        others = np.setdiff1d(np.arange(numbers.size), positions)
        assert (rows[positions] == held.pages[Space.RAM][numbers[positions]]).all()
        assert (rows[others] == 9).all()


def test_without_a_layer_it_is_the_base(world: World) -> None:
    known = KnownPages(world.base)
    assert (known.count(Space.RAM), known.count(Space.DISK)) == (RAM_PAGES, DISK_PAGES)
    assert (known.read(Space.DISK, np.arange(64, dtype=np.uint32)) == world.disk).all()
    assert known.identity == b"\xab" * 32 + bytes(32)
    assert known.machine == world.machine


def test_a_layer_may_hold_nothing_of_a_space(world: World) -> None:
    held = held_pages(RAM)
    try:
        known = KnownPages(world.base, {Space.RAM: held}, OVERLAY)
        assert (known.read(Space.DISK, np.arange(64, dtype=np.uint32)) == world.disk).all()
        assert known.identity == b"\xab" * 32 + b"\xcd" * 32
    finally:
        os.close(held.descriptor)


def test_a_page_beyond_the_machine_is_refused(world: World) -> None:
    with Held(world, RAM, DISK) as held, pytest.raises(CorruptError, match="RAM page 96 is beyond"):
        held.known.read(Space.RAM, np.array([7, 96], np.uint32))


def test_a_layer_beyond_the_machine_is_refused(world: World) -> None:
    with pytest.raises(CorruptError, match="RAM page 96, beyond the machine"):
        Held(world, {96: ZERO}, {})


def test_a_file_that_is_cut_is_found(world: World) -> None:
    with Held(world, RAM, DISK) as held:
        assert held.known.layer
        os.truncate(held.known.layer[Space.RAM].descriptor, 4096)
        with pytest.raises(CorruptError, match="the layer's file ends before RAM page"):
            held.known.read(Space.RAM, np.array(sorted(RAM), np.uint32))


@pytest.mark.parametrize(
    ("numbers", "offsets"),
    [([2, 1], [0, 0]), ([1, 1], [0, 0]), ([1, 2], [0]), ([1], [-2]), ([1], [-4096])],
)
def test_a_table_that_is_not_in_order_is_refused(numbers: list[int], offsets: list[int]) -> None:
    with pytest.raises(CorruptError, match="the table of a layer's pages"):
        HeldPages(np.array(numbers, np.uint32), np.array(offsets, np.int64), -1)


def test_a_layer_has_the_identity_of_its_overlay(world: World) -> None:
    with pytest.raises(ValueError, match="go together"):
        KnownPages(world.base, {})
    with pytest.raises(ValueError, match="go together"):
        KnownPages(world.base, None, OVERLAY)


def test_content_is_found_in_the_layer_and_in_the_base(world: World) -> None:
    with Held(world, RAM, DISK) as held:
        layer = index_of_layer(held.known)
        assert look(layer, [1, 5, 1000, 1007]) == [
            (Space.RAM, 0), (Space.DISK, 3), (Space.RAM, 8), None,
        ]  # fmt: skip
        joined = JoinedIndex([layer, world.index])
        assert look(joined, [1, 5, 1000, 1009, 77]) == [
            (Space.RAM, 0), (Space.DISK, 3), (Space.RAM, 8), (Space.RAM, 9), None,
        ]  # fmt: skip


def test_zero_pages_of_a_layer_are_not_indexed(world: World) -> None:
    with Held(world, {2: ZERO}, {4: ZERO}) as held:
        assert look(index_of_layer(held.known), [1]) == [None]


def test_the_index_reads_the_layers_pages_and_no_others(world: World) -> None:
    """Each page of the layer is found as it is in the layer, though its file has another order."""
    content = noise(40)
    with Held(world, {2 * at: row for at, row in enumerate(content)}, {}) as held:
        assert held.known.layer
        assert ZEROS not in held.known.layer[Space.RAM].offsets
        unread = replace(held.known, base=replace(world.base, ram_fd=-1, disk_fd=-1))
        found = index_of_layer(unread)
        assert found.lookup(digest_rows(content, range(40))).page.tolist() == list(range(0, 80, 2))
