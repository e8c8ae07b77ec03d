"""Parts in any order: what comes of them is held, byte by byte, against what ``apply`` makes of the file."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, IntegrityError, MismatchError
from cloudlet.overlay import arrival as arrival_module
from cloudlet.overlay import pack
from cloudlet.overlay.arrival import Arrival, PartKind
from cloudlet.overlay.pages import Rows, Space
from cloudlet.overlay.payload import Operation

from .forge import Forged
from .guest import Guest, guest_of
from .world import DEVICE, DISK_PAGES, RAM_PAGES, World, near, page, unsigned

FILE = np.arange(12 * 512, dtype="<u8").view(np.uint8)
"""Twelve pages, each of whose words is another."""

BUFFER = 72
"""How many bytes further on an app holds the file."""


def written(
    world: World, ram: dict[int, Rows], disk: dict[int, Rows], sizes: tuple[int, ...], **options: Any
) -> bytes:
    """An overlay with so many pages in a frame, and so many frames in a chunk; with a third number, frames
    with more bytes are cut.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", sizes[0])
        patch.setattr("cloudlet.overlay.create.CHUNK_FRAMES", sizes[1])
        if sizes[2:]:
            patch.setattr(pack, "FRAME_BYTES_WRITTEN", sizes[2])
            patch.setattr(pack, "CUT_PAGES", 1)
        return world.create(ram, disk, **options)[0]


@pytest.fixture
def many(world: World) -> bytes:
    """A file on the disk and, shifted, in RAM; pages that come again; two hot frames, chunks of four."""
    disk = {20 + i: FILE[i * 4096 : (i + 1) * 4096] for i in range(12)} | {i: page(i + 1) for i in range(6)}
    ram = {50 + i: FILE[BUFFER + i * 4096 :][:4096] for i in range(11)} | {
        i: page(i % 9 + 1) for i in range(30)
    }
    return written(world, ram, disk, (3, 4), hot=[(Space.RAM, np.array([40, 3, 29, 28, 7], np.uint32))])


CONTENT = st.none() | st.integers(1, 8) | st.integers(1000, 1005) | st.integers(2000, 2005)
HOT = st.lists(st.tuples(st.sampled_from(Space), st.lists(st.integers(0, 99), max_size=12)), max_size=4)
SIZES = st.sampled_from(
    [(1, 1), (2, 3), (3, 2), (7, 256), (64, 256), (8, 3, 120), (64, 2, 150), (64, 256, 400)]
)


@st.composite
def captures(draw: st.DrawFn, pages: int, base: int) -> dict[int, Rows]:
    """Pages of zeros, of the base, new ones that come again, stretches of the file at any shift, and pages
    that are nearly the base's, whose page 0 has the seed ``base``.
    """
    content: dict[int, Rows] = {}
    for number, seed in draw(st.dictionaries(st.integers(0, pages - 1), CONTENT, max_size=30)).items():
        content[number] = np.zeros(4096, np.uint8) if seed is None else page(seed)
    for _ in range(draw(st.integers(0, 3))):
        start, length, shift = (
            draw(st.integers(0, pages - 12)),
            draw(st.integers(1, 11)),
            draw(st.integers(0, 512)),
        )
        for i in range(length):
            content[start + i] = FILE[8 * shift + i * 4096 :][:4096]
    for number in draw(st.sets(st.integers(0, pages - 1), max_size=8)):
        content[number] = near(page(base + number))
    return content


@st.composite
def overlays(draw: st.DrawFn) -> tuple[dict[int, Rows], dict[int, Rows], tuple[int, ...], list[object]]:
    hot = [(space, np.array(numbers, np.uint32)) for space, numbers in draw(HOT)]
    return draw(captures(RAM_PAGES, 1000)), draw(captures(DISK_PAGES, 2000)), draw(SIZES), hot


@settings(deadline=None)
@given(overlays(), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_machine(world: World, made: tuple[Any, ...], random: Random) -> None:
    ram, disk, sizes, hot = made
    data = written(world, ram, disk, sizes, hot=hot)
    with guest_of(world, data) as guest:
        numbers = list(range(len(guest.table)))
        random.shuffle(numbers)
        for number in numbers:
            chunk = guest.table.chunk_of(number)
            if chunk is not None and not guest.table.has_chunk(chunk):
                guest.take(guest.chunk(chunk))
            assert not guest.arrival.complete
            guest.take(guest.frame(number))
        assert guest.arrival.next_part() is None
        guest.check(world.apply(data))
        for space, captured in ((Space.RAM, ram), (Space.DISK, disk)):
            assert all((guest.pages[space][number] == row).all() for number, row in captured.items())


@settings(deadline=None)
@given(overlays(), st.randoms(use_true_random=False))
def test_what_is_needed_brings_the_page(world: World, made: tuple[Any, ...], random: Random) -> None:
    """Whatever is asked for, hot or cold, wherever the file order has got to."""
    ram, disk, sizes, hot = made
    data = written(world, ram, disk, sizes, hot=hot)
    whole = world.apply(data)
    with guest_of(world, data) as guest:
        guest.take(guest.frame(0))
        asked = [(space, number) for space, came in whole.came.items() for number in came]
        random.shuffle(asked)
        for space, number in asked:
            if random.random() < 0.1 and (part := guest.arrival.next_part()):
                guest.take(part)
            here = number in guest.built[space]
            taken = guest.ask(space, number)
            assert number in guest.built[space]
            assert not (here and taken)
        guest.rest()
        guest.check(whole)


def test_in_file_order_no_page_waits(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        at = unsigned(many).header.parts_start
        hot_end = at + sum(entry.size for entry in guest.root.listed_frames)
        while part := guest.arrival.next_part():
            assert part.place.offset == at
            at += part.place.size
            assert guest.arrival.hot_here == (part.place.offset >= hot_end)
            came = guest.take(part)
            if part.kind is PartKind.CHUNK:
                guest.table.add_chunk(part.number, guest.blob(part))
            else:
                assert came == guest.table.entry(part.number).pages
        assert at == len(many)
        guest.check(world.apply(many))


def test_map_and_device_state_are_known_with_their_frames(world: World) -> None:
    """A device state of several frames, taken backwards."""
    state = np.random.default_rng(3).integers(0, 256, 5 << 20, np.uint8).tobytes()
    data = world.create({1: page(1)}, device=state)[0]
    with guest_of(world, data) as guest:
        for number in (3, 2, 1):
            assert guest.arrival.device_state is None
            guest.take(guest.frame(number))
        assert guest.arrival.device_state == state
        assert guest.arrival.page_map is None
        guest.take(guest.frame(0))
        assert guest.arrival.page_map is not None
        assert guest.arrival.page_map.ram.tolist() == [[1, 1]]


def test_pages_before_the_map_wait_for_it(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        guest.tables()
        assert sum(guest.take(guest.frame(number)) for number in range(1, len(guest.table))) == 0
        guest.take(guest.frame(0))
        guest.check(world.apply(many))


def test_a_damaged_frame_is_refused_though_the_map_is_not_here(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        last_listed = guest.frame(len(guest.root.listed_frames) - 1)
        with pytest.raises(CorruptError, match="digest"):
            guest.take(last_listed, bytes(last_listed.place.size))


def test_a_part_gives_its_pages_once(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        while part := guest.arrival.next_part():
            guest.take(part)
            assert guest.arrival.take(part, guest.blob(part)) == []


def frames_of_pages(guest: Guest) -> dict[tuple[Space, int], int]:
    """Which frame brings each page, from the frames themselves."""
    frames = {}
    first = len(guest.root.map_frames) + len(guest.root.device_frames)
    for number in range(first, len(guest.table)):
        payload = guest.table.decode(number, guest.blob(guest.frame(number)))
        frames |= {(payload.space, n): number for n in payload.numbers.tolist()}
    return frames


def test_the_frame_of_a_page_is_known_with_the_map(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        assert guest.arrival.needed(Space.DISK, 20) == []
        guest.take(guest.frame(0))
        assert [part.kind for part in guest.arrival.needed(Space.DISK, 20)] == [PartKind.CHUNK]
        guest.tables()
        expected = frames_of_pages(guest)
        taken: set[int] = set()
        for listed in range(1, len(guest.root.listed_frames) + 1):
            for space, count in ((Space.RAM, RAM_PAGES), (Space.DISK, DISK_PAGES)):
                for number in range(count):
                    frame = expected.get((space, number))
                    parts = [guest.frame(frame)] if frame is not None and frame not in taken else []
                    assert guest.arrival.needed(space, number) == parts
            if listed < len(guest.root.listed_frames):
                guest.take(guest.frame(listed))
                taken.add(listed)
        assert guest.arrival.hot_here
        assert (
            len([frame for frame in expected.values() if frame not in taken]) == guest.arrival.pages_missing
        )


def test_a_cold_page_need_not_wait_for_the_hot_ones(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        guest.take(guest.frame(0))
        for space, number in ((Space.DISK, 20), (Space.RAM, 55), (Space.RAM, 12)):
            assert guest.ask(space, number)
            assert number in guest.built[space]
        assert not guest.arrival.hot_here
        guest.rest()
        guest.check(world.apply(many))


@pytest.fixture
def warm(world: World) -> bytes:
    """Four hot frames of a page each, 2 to 5 in the file, of which the third refers to the second; a cold
    page that refers to the last.
    """
    ram, disk = {1: page(1), 2: page(2), 5: page(1), 9: page(9)}, {4: page(2), 7: page(7)}
    order = ((Space.RAM, [9, 2]), (Space.DISK, [4]), (Space.RAM, [1]))
    hot = [(space, np.array(numbers, np.uint32)) for space, numbers in order]
    return written(world, ram, disk, (1, 4), hot=hot)


WARM = {(Space.RAM, 9): 2, (Space.RAM, 2): 3, (Space.DISK, 4): 4, (Space.RAM, 1): 5}


def test_a_hot_page_is_asked_for_by_its_frame(world: World, warm: bytes) -> None:
    """Before its turn, and before the frames that stand in front of it."""
    with guest_of(world, warm) as guest:
        assert [guest.arrival.needed(*wanted) for wanted in WARM] == [[]] * 4
        guest.take(guest.frame(0))
        for wanted, frame in WARM.items():
            assert guest.arrival.needed(*wanted) == [guest.frame(frame)]
        assert guest.ask(Space.RAM, 1) == 1
        assert guest.built[Space.RAM] == {1}
        assert guest.take(guest.frame(4)) == 0
        assert guest.arrival.needed(Space.DISK, 4) == [guest.frame(3)]
        assert guest.take(guest.frame(3)) == 2
        assert [guest.arrival.needed(*wanted) for wanted in WARM] == [[guest.frame(2)], [], [], []]
        assert guest.ask(Space.RAM, 5) == 2, "its chunk and its frame: the literal is here"
        assert not guest.arrival.hot_here
        guest.rest()
        guest.check(world.apply(warm))


def test_a_hot_frame_from_before_the_map_is_not_asked_for_again(world: World, warm: bytes) -> None:
    """Nor when its page waits: then it is the frame of the literal."""
    with guest_of(world, warm) as guest:
        guest.take(guest.frame(4))
        guest.take(guest.frame(5))
        assert guest.take(guest.frame(0)) == 1
        assert guest.arrival.needed(Space.RAM, 1) == []
        assert guest.arrival.needed(Space.DISK, 4) == [guest.frame(3)]
        guest.rest()
        guest.check(world.apply(warm))


@pytest.mark.parametrize("seed", range(5))
def test_a_writer_that_names_other_hot_frames_costs_time_only(world: World, seed: int) -> None:
    """Two hot frames of three pages, each named for the pages of the other."""
    ram = {i: page(i + 1) for i in range(16)} | {12: page(2), 14: page(13)}
    order = np.array([2, 1, 3, 11, 13, 12], np.uint32)
    forged = Forged.of(written(world, ram, {}, (3, 4), hot=[(Space.RAM, order)]))
    labels = len(forged.raw(0)) - 12
    raw = forged.raw(0)
    assert np.frombuffer(raw, "<u2", offset=labels).tolist() == [0, 0, 0, 1, 1, 1]
    raw[labels:] = np.array([1, 1, 1, 0, 0, 0], "<u2").tobytes()
    forged.set_raw(0, raw)
    data = forged.data()
    with guest_of(world, data) as guest:
        guest.take(guest.frame(0))
        assert guest.arrival.needed(Space.RAM, 2) == [guest.frame(3)]
        assert guest.ask(Space.RAM, 2) == 1
        assert 2 not in guest.built[Space.RAM]
        assert {11, 13} <= guest.built[Space.RAM]
        assert guest.arrival.needed(Space.RAM, 2) == []
        asked = list(range(16))
        Random(seed).shuffle(asked)
        for number in asked:
            guest.ask(Space.RAM, number)
            assert guest.arrival.needed(Space.RAM, number) == []
        guest.rest()
        guest.check(world.apply(data))


def test_a_span_over_two_frames_needs_both(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        guest.prefix()
        guest.tables()
        frames = frames_of_pages(guest)
        # The file's third page ends a frame, so the third page of the buffer is in that one and in the next.
        waiting = next(n for n in range(50, 61) if frames[Space.DISK, n - 30] != frames[Space.DISK, n - 29])
        guest.take(guest.frame(frames[Space.RAM, waiting]))
        assert waiting not in guest.built[Space.RAM]
        parts = [guest.frame(frames[Space.DISK, waiting - at]) for at in (30, 29)]
        assert guest.arrival.needed(Space.RAM, waiting) == parts
        guest.take(parts[0])
        assert guest.arrival.needed(Space.RAM, waiting) == parts[1:]
        guest.take(parts[1])
        assert waiting in guest.built[Space.RAM]


def test_it_says_which_pages_are_there(world: World, many: bytes) -> None:
    """Those that were built, and with the map those that are the base's; not those that wait."""
    with guest_of(world, many) as guest:
        assert not guest.arrival.is_built(Space.RAM, 90)
        guest.prefix()
        guest.tables()
        brought = {space: set(came) for space, came in world.apply(many).came.items()}
        for number in reversed(range(len(guest.root.listed_frames), len(guest.table))):
            guest.take(guest.frame(number))
            for space, count in ((Space.RAM, RAM_PAGES), (Space.DISK, DISK_PAGES)):
                there = {n for n in range(count) if guest.arrival.is_built(space, n)}
                assert there == set(range(count)) - brought[space] | guest.built[space]


def test_a_frame_by_its_number_is_a_part(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        last = len(guest.table) - 1
        chunk = guest.arrival.part_of_frame(last)
        assert chunk == guest.chunk(len(guest.root.chunks) - 1)
        guest.take(chunk)
        frame = guest.arrival.part_of_frame(last)
        assert frame == guest.frame(last)
        guest.take(frame)
        assert guest.arrival.part_of_frame(last) is None


def test_when_very_many_pages_wait_the_order_goes_on(
    world: World, many: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "MOST_WAITING", 1)
    with guest_of(world, many) as guest:
        guest.prefix()
        guest.tables()
        guest.take(guest.frame(frames_of_pages(guest)[Space.RAM, 55]))
        assert guest.arrival.needed(Space.RAM, 55) == []
        assert guest.arrival.needed(Space.DISK, 20) == []
        guest.rest()
        guest.check(world.apply(many))


@pytest.mark.parametrize("seed", range(5))
def test_a_writer_with_another_order_costs_time_only(world: World, seed: int) -> None:
    """RAM before disk: at last nothing is asked for any more, and all comes right in file order."""
    ram, disk = {i: page(i % 20 + 1) for i in range(40)}, {i: page(i + 10) for i in range(30)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudlet.overlay.plan.COLD_SPACES", (Space.RAM, Space.DISK))
        data = written(world, ram, disk, (3, 4), hot=[(Space.RAM, np.array([7, 5], np.uint32))])
    with guest_of(world, data) as guest:
        guest.prefix()
        random = Random(seed)
        asked = [(Space.RAM, n) for n in range(40)] + [(Space.DISK, n) for n in range(30)]
        random.shuffle(asked)
        taken = [guest.ask(*wanted) for wanted in asked]
        assert sum(taken) <= 6, "after the first frame that was in vain the order is not believed"
        assert guest.arrival.needed(Space.DISK, 29) == []
        guest.rest()
        guest.check(world.apply(data))


def test_a_frame_that_is_not_as_expected_ends_the_asking(world: World) -> None:
    """Frames in page order, except that two of them change places of a page."""
    data = written(world, {i: page(i + 1) for i in range(12)}, {}, (3, 8))
    forged = Forged.of(data)
    for at, numbers in ((3, [3, 4, 6]), (4, [5, 7, 8])):
        raw = forged.raw(at)
        raw[8:20] = np.diff(np.array(numbers, np.uint32), prepend=np.uint32(0)).tobytes()
        forged.set_raw(at, raw)
    with guest_of(world, forged.data()) as guest:
        guest.prefix()
        guest.tables()
        guest.take(guest.frame(2))
        assert guest.arrival.needed(Space.RAM, 9) == [guest.frame(5)]
        guest.take(guest.frame(3))
        assert guest.arrival.needed(Space.RAM, 9) == []
        guest.rest()
        guest.check(world.apply(forged.data()))


def test_a_frame_from_before_the_map_is_held_against_the_order_later(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudlet.overlay.plan.COLD_SPACES", (Space.RAM, Space.DISK))
        data = written(world, {i: page(i + 1) for i in range(9)}, {i: page(i + 30) for i in range(9)}, (3, 4))
    with guest_of(world, data) as guest:
        guest.tables()
        first_cold = len(guest.root.listed_frames)
        guest.take(guest.frame(first_cold))
        guest.prefix()
        assert guest.arrival.needed(Space.DISK, 0) == []
        guest.rest()
        guest.check(world.apply(data))


def test_a_damaged_part_is_refused(world: World, many: bytes) -> None:
    """Any part, cut, grown, another's, or with a flipped bit, wherever the order has got to."""
    with guest_of(world, many) as guest:
        parts = []
        while part := guest.arrival.next_part():
            parts.append(part)
            guest.take(part)
        good = guest.pages
    for at, part in enumerate(parts):
        with guest_of(world, many) as guest:
            blob = guest.blob(part)
        bad = [blob[:-1], blob + b"\0", b"", guest.blob(parts[at - 1])]
        for place in {0, len(blob) // 3, len(blob) // 2, len(blob) - 1}:
            bad.append(blob[:place] + bytes([blob[place] ^ 1 << at % 8]) + blob[place + 1 :])
        for damaged in bad:
            with guest_of(world, many) as guest:
                for before in parts[:at]:
                    guest.take(before)
                with pytest.raises(IntegrityError):
                    guest.take(part, damaged)
                for space, built in guest.built.items():
                    assert (guest.pages[space][list(built)] == good[space][list(built)]).all()


def refuse(world: World, data: bytes, frames: list[int]) -> str:
    """Take the map and these frames; the last is refused."""
    with guest_of(world, data) as guest:
        guest.tables()
        for number in [0, *frames[:-1]]:
            guest.take(guest.frame(number))
        with pytest.raises(CorruptError) as info:
            guest.take(guest.frame(frames[-1]))
        return str(info.value)


@pytest.mark.parametrize("order", [[3, 4], [4, 3]])
def test_a_page_from_two_frames_is_refused(world: World, order: list[int]) -> None:
    """A root that is sound in itself, and two frames that bring the same page."""
    data = written(world, {i: page(i + 1) for i in range(9)}, {}, (3, 4))
    forged = Forged.of(data)
    raw = forged.raw(3)
    raw[8:12] = (6).to_bytes(4, "little")
    forged.set_raw(3, raw)
    assert "a second time" in refuse(world, forged.data(), order)


def test_a_hot_page_in_a_cold_frame_is_refused(world: World, many: bytes) -> None:
    """And the other way round. In file order the hot frame is refused first; here the cold one may be."""
    last = len(Forged.of(many).frames) - 1
    for at, numbers, why in ((2, [8, 28, 29], "is cold"), (last, [28], "is hot")):
        forged = Forged.of(many)
        raw = forged.raw(at)
        raw[8 : 8 + 4 * len(numbers)] = np.diff(np.array(numbers, np.uint32), prepend=np.uint32(0)).tobytes()
        forged.set_raw(at, raw)
        assert why in refuse(world, forged.data(), [at])


def test_frames_that_contradict_the_root_are_refused(world: World) -> None:
    data = written(world, {i: page(i + 1) for i in range(9)}, {}, (3, 4))
    for at, value, why in (
        (8, 50, "not in the map"),
        (8, 200, "beyond"),
        (0, 2, "begins with literal"),
        (4, 1, "counts"),
    ):
        forged = Forged.of(data)
        raw = forged.raw(4)
        raw[at] = value
        forged.set_raw(4, raw)
        assert why in refuse(world, forged.data(), [4])


def test_a_reference_ahead_is_refused_even_when_its_literal_is_here(world: World, small: bytes) -> None:
    """In file order it could not be followed, so it is no overlay in any order."""
    with guest_of(world, small) as guest:
        guest.tables()
        payload = guest.table.decode(3, guest.blob(guest.frame(3)))
        ahead = payload.first_literal + len(payload.literals)
        earlier = int(payload.by_operation()[Operation.EARLIER][1][0])
        at = 8 + 5 * payload.numbers.size + 4 * payload.references.tolist().index(earlier)
    for reference, fits in ((ahead - 1, True), (ahead, False)):
        forged = Forged.of(small)
        raw = forged.raw(3)
        raw[at : at + 4] = reference.to_bytes(4, "little")
        forged.set_raw(3, raw)
        with guest_of(world, forged.data()) as guest:
            guest.tables()
            guest.take(guest.frame(0))
            guest.take(guest.frame(4))
            if fits:
                guest.take(guest.frame(3))
            else:
                with pytest.raises(CorruptError, match="EARLIER outside"):
                    guest.take(guest.frame(3))


def test_a_forged_table_is_refused(world: World, many: bytes) -> None:
    with guest_of(world, many) as guest:
        part, other = guest.chunk(0), guest.chunk(1)
        table = guest.blob(part)
        for bad in (table[48:] + table[:48], table[:-48], guest.blob(other), bytes(len(table))):
            with pytest.raises(CorruptError, match="index chunk 0"):
                guest.arrival.take(part, bad)


def test_another_base_is_refused(world: World, small: bytes) -> None:
    reader = unsigned(small)
    with TemporaryFile() as spool, pytest.raises(MismatchError):
        Arrival(reader.header, reader.root, replace(world.base, identity="cd" * 32), spool.fileno())


def test_an_overlay_of_nothing(world: World) -> None:
    data = world.create()[0]
    with guest_of(world, data) as guest:
        assert not guest.arrival.complete
        guest.rest()
        listed = sum(entry.size for entry in guest.root.listed_frames)
        assert unsigned(data).header.parts_start + listed == len(data)
        assert guest.arrival.needed(Space.RAM, 1) == []
        guest.check(world.apply(data))
        assert guest.arrival.device_state == DEVICE
