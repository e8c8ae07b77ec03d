from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, LimitError, MismatchError, UsageError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay import create as create_module
from cloudlet.overlay import limits, pack, plan
from cloudlet.overlay.create import Description, create
from cloudlet.overlay.frames import FrameEntry, FrameKind, pack_chunk, payload_bytes
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.pages import PageSource, Rows, Space
from cloudlet.overlay.payload import Operation
from cloudlet.overlay.reader import Frame

from .world import APP, DEVICE, MACHINE, SECTIONS, World, near, noise, page, source, unsigned

# Seeds of pages: some new, some of the base's RAM and disk; None is a page of zeros.
CONTENT = st.none() | st.integers(1, 6) | st.integers(1000, 1005) | st.integers(2000, 2005)
HOT = st.lists(st.tuples(st.sampled_from(Space), st.lists(st.integers(0, 120), max_size=12)), max_size=5)


def rows(content: dict[int, int | None]) -> dict[int, Rows]:
    return {n: np.zeros(4096, np.uint8) if seed is None else page(seed) for n, seed in content.items()}


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 95), CONTENT, max_size=40),
    st.dictionaries(st.integers(0, 63), CONTENT, max_size=40),
    HOT,
    st.integers(1, 5000),
    st.sampled_from([(1, 1, 96 << 10), (2, 3, 100), (7, 2, 96 << 10), (64, 256, 96 << 10), (64, 3, 150)]),
)
def test_what_goes_in_comes_out(
    world: World,
    ram: dict[int, int | None],
    disk: dict[int, int | None],
    hot: list[tuple[Space, list[int]]],
    most: int,
    sizes: tuple[int, int, int],
) -> None:
    """Whatever a capture holds, however frames are cut and however the stream trickles."""
    order = [(space, np.array(numbers, np.uint32)) for space, numbers in hot]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", sizes[0])
        patch.setattr("cloudlet.overlay.create.CHUNK_FRAMES", sizes[1])
        patch.setattr(pack, "FRAME_BYTES_WRITTEN", sizes[2])
        patch.setattr(pack, "CUT_PAGES", 1)
        data, report = world.create(rows(ram), rows(disk), hot=order)
    rebuilt = world.apply(data, most=most)
    expected_ram, expected_disk = world.ram.copy(), world.disk.copy()
    for number, row in rows(ram).items():
        expected_ram[number] = row
    for number, row in rows(disk).items():
        expected_disk[number] = row
    assert (rebuilt.ram == expected_ram).all()
    assert (rebuilt.disk == expected_disk).all()
    assert rebuilt.device == DEVICE
    # Only what differs is in the file.
    assert sorted(rebuilt.came[Space.RAM]) == np.flatnonzero((expected_ram != world.ram).any(1)).tolist()
    assert sorted(rebuilt.came[Space.DISK]) == np.flatnonzero((expected_disk != world.disk).any(1)).tolist()
    assert report.changed_pages == sum(len(came) for came in rebuilt.came.values())
    assert report.file_bytes == len(data)
    new = {seed for seed in [*ram.values(), *disk.values()] if seed is not None and seed < 1000}
    assert report.literal_bytes == 4096 * len(new), "every page that the base lacks comes once"


def test_each_page_takes_the_cheapest_way(world: World) -> None:
    ram = {0: None, 1: 1, 2: 1, 3: 1050, 4: 2001}
    _, report = world.create(rows(ram), rows({9: 1, 10: 2011, 11: 2}))
    assert report.pages[Space.RAM] == {
        Operation.ZERO: 1,
        Operation.EARLIER: 2,
        Operation.BASE_RAM: 1,
        Operation.BASE_DISK: 1,
        Operation.SPAN: 0,
        Operation.LITERAL: 0,
        Operation.XOR: 0,
    }
    assert report.pages[Space.DISK][Operation.LITERAL] == 2
    assert report.captured == {Space.RAM: 5, Space.DISK: 3}


def test_what_is_much_like_the_page_that_it_replaces_is_an_xor(world: World) -> None:
    """A page of two words of which one changed; with the next one changed too, it is not."""
    other = near(page(1007))
    other[8] ^= 1
    ram, disk = {5: near(page(1005)), 6: near(page(1005)), 7: other}, {9: near(page(2009))}
    data, report = world.create(ram, disk)
    counts = {space: {o: n for o, n in counter.items() if n} for space, counter in report.pages.items()}
    assert counts == {Space.RAM: {Operation.XOR: 1, Operation.LITERAL: 2}, Space.DISK: {Operation.XOR: 1}}
    rebuilt = world.apply(data)
    assert (rebuilt.ram[5:8] == np.stack([ram[5], ram[6], ram[7]])).all()
    assert (rebuilt.disk[9] == disk[9]).all()
    cold = [p for p in unsigned(data).parts() if isinstance(p, Frame) and p.entry.kind.is_pages]
    assert sum(p.entry.literals for p in cold) == 4, "an XOR's literal counts as others do"


def test_nothing_is_found_in_the_literal_of_an_xor(world: World) -> None:
    """A page that equals the difference is a page like others, and may be referred to."""
    difference = near(page(1005)) ^ page(1005)
    ram = {5: near(page(1005)), 30: difference, 31: difference, 32: near(page(1005))}
    data, report = world.create(ram)
    assert report.pages[Space.RAM][Operation.XOR] == 1
    assert report.pages[Space.RAM][Operation.LITERAL] == 2
    assert report.pages[Space.RAM][Operation.EARLIER] == 1
    rebuilt = world.apply(data)
    assert all((rebuilt.ram[number] == row).all() for number, row in ram.items())


def test_an_index_that_lies_makes_no_wrong_page(world: World) -> None:
    liar = PageIndex(
        world.index.base,
        world.index._high,
        world.index._low,
        world.index._page[::-1] + 7,
        world.index._space,
    )
    out = io.BytesIO()
    about = Description(APP, "2026-11-24T23:00:00Z", MACHINE, SECTIONS, DEVICE)
    ram = rows({i: 1000 + (i + 5) % 50 for i in range(50)})
    create(out, io.BytesIO(), about, source(ram), PageSource.empty(), world.base, liar)
    assert (world.apply(out.getvalue()).ram[:50] == np.stack(list(ram.values()))).all()


def kinds(data: bytes) -> list[FrameKind]:
    return [p.entry.kind for p in unsigned(data).parts() if isinstance(p, Frame)]


def test_hot_pages_come_first_in_the_order_of_touch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", 2)
    ram, disk = rows({i: i + 1 for i in range(10)}), rows({i: i + 50 for i in range(10)})
    hot = [
        (Space.RAM, np.array([9, 3, 9, 77], np.uint32)),
        (Space.DISK, np.array([8], np.uint32)),
        (Space.RAM, np.array([5, 3], np.uint32)),
    ]
    data, report = world.create(ram, disk, hot=hot)
    rebuilt = world.apply(data)
    assert report.hot_frames == 3
    assert rebuilt.came[Space.RAM][:3] == [3, 9, 5]
    assert rebuilt.came[Space.DISK][:1] == [8]
    assert kinds(data)[2:] == [FrameKind.RAM] * 2 + [FrameKind.DISK] * 6 + [FrameKind.RAM] * 4
    assert rebuilt.map.hot_ram.tolist() == [[3, 1], [5, 1], [9, 1]]
    assert rebuilt.map.hot_disk.tolist() == [[8, 1]]


def test_what_is_hot_beyond_the_root_comes_with_the_cold(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create_module, "HOT_FRAMES", 1)
    monkeypatch.setattr(plan, "FRAME_PAGES_WRITTEN", 2)
    data, report = world.create(
        rows({i: i + 1 for i in range(9)}), hot=[(Space.RAM, np.arange(9, dtype=np.uint32))]
    )
    assert report.hot_frames == 1
    assert world.apply(data).came[Space.RAM] == list(range(9))


def page_frames(data: bytes) -> list[FrameEntry]:
    return [p.entry for p in unsigned(data).parts() if isinstance(p, Frame) and p.entry.kind.is_pages]


def test_a_frame_that_is_large_is_cut(world: World) -> None:
    """64 pages that do not compress, hot and cold; the map names the frames that come of it."""
    hot = [(Space.RAM, np.arange(64, dtype=np.uint32))]
    data, report = world.create(dict(enumerate(noise(64))), dict(enumerate(noise(64, 2))), hot=hot)
    assert [entry.pages for entry in page_frames(data)] == [21, 21, 22] * 2
    assert all(entry.size <= pack.FRAME_BYTES_WRITTEN for entry in page_frames(data))
    assert report.hot_frames == 3
    rebuilt = world.apply(data)
    assert rebuilt.map.hot_frames.tolist() == [0] * 21 + [1] * 21 + [2] * 22
    assert (rebuilt.ram[:64] == noise(64)).all()
    assert (rebuilt.disk == noise(64, 2)).all()


def test_hot_frames_are_cut_as_long_as_the_root_has_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create_module, "HOT_FRAMES", 4)
    monkeypatch.setattr(plan, "FRAME_PAGES_WRITTEN", 32)
    hot = [(Space.RAM, np.arange(96, dtype=np.uint32))]
    data, report = world.create(dict(enumerate(noise(96))), hot=hot)
    assert report.hot_frames == 4
    assert [entry.pages for entry in page_frames(data)] == [16, 16, 32, 32]
    assert (world.apply(data).ram == noise(96)).all()


def test_cold_frames_are_cut_as_long_as_the_root_has_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "FRAME_PAGES_WRITTEN", 32)
    content = dict(enumerate(noise(96)))
    for most, pages in ((2, [32, 32, 32]), (5, [16, 16, 16, 16, 32]), (6, [16] * 6)):
        monkeypatch.setattr(plan, "COLD_FRAMES", most)
        data, _ = world.create(content)
        assert [entry.pages for entry in page_frames(data)] == pages
        assert (world.apply(data).ram == noise(96)).all()


def test_where_the_root_is_full_fewer_frames_are_hot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FRAME_PAGES_WRITTEN", 1)
    ram, hot = rows({i: i + 1 for i in range(40)}), [(Space.RAM, np.arange(40, dtype=np.uint32)[::-1])]
    assert world.create(ram, hot=hot)[1].hot_frames == 40
    monkeypatch.setattr("cloudlet.overlay.root.ROOT_BYTES", 2000)
    data, report = world.create(ram, hot=hot)
    assert unsigned(data).header.root_bytes <= 2000
    assert report.hot_frames == 10
    assert report.changed_pages == 40
    assert world.apply(data).came[Space.RAM] == [*range(39, 29, -1), *range(30)]


def test_a_full_hot_prefix_fits_the_root(world: World) -> None:
    """The largest entries there can be, as many as the writer makes, beside a large application and as many
    cold frames as come of cutting: 12 GiB of pages that changed.
    """
    pages = plan.FRAME_PAGES_WRITTEN
    entry = FrameEntry(FrameKind.RAM, 270_000, payload_bytes(pages, 0, pages), pages, pages, b"\xff" * 32)
    chunk, _ = pack_chunk([entry] * limits.CHUNK_FRAMES)
    root = unsigned(world.create()[0]).root
    large = replace(
        root,
        hot_frames=(entry,) * plan.HOT_FRAMES,
        device_sections=SECTIONS * 40,
        chunks=(chunk,) * (plan.COLD_FRAMES // chunk.frames),
    )
    assert plan.COLD_FRAMES * pages * PAGE_BYTES == 12 << 30
    assert len(large.encode()) <= limits.ROOT_BYTES


def test_the_window_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window of 20 literals, nothing refers further back, and the content is right."""
    for module in ("encode", "payload", "apply"):
        monkeypatch.setattr(f"cloudlet.overlay.{module}.WINDOW_LITERALS", 20)
    monkeypatch.setattr("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", 8)
    content = {i: 1 + (i * 7) % 30 for i in range(96)}
    data, report = world.create(rows(content))
    assert (world.apply(data).ram == np.stack(list(rows(content).values()))).all()
    assert report.pages[Space.RAM][Operation.LITERAL] > 30, "some had left the window"


def test_the_same_capture_gives_the_same_bytes(world: World) -> None:
    ram = rows({i: i for i in range(20)})
    assert world.create(ram)[0] == world.create(ram)[0]


def test_it_accounts_for_every_byte(world: World) -> None:
    ram = dict(enumerate(noise(40)))
    data, report = world.create(ram, hot=[(Space.RAM, np.array([5], np.uint32))], plain_delta=True)
    parts = report.head_bytes + report.map_bytes + report.device_bytes + report.index_bytes
    assert parts + report.frame_bytes == report.file_bytes == len(data)
    assert report.plain_delta_bytes is not None
    assert 40 * 4096 < report.plain_delta_bytes < 41 * 4096
    assert report.identity == unsigned(data).identity
    assert {"compare", "encode", "write", "plain_delta"} == report.seconds.keys()


def test_progress_is_told_and_can_cancel(world: World) -> None:
    told: list[tuple[int, int]] = []
    world.create(rows({i: i + 1 for i in range(10)}), progress=lambda *a: told.append(a))
    assert told == [(10, 10)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.create(rows({1: 1}), progress=stop)


def attempt(world: World, about: Description, ram: PageSource) -> bytes:
    out = io.BytesIO()
    create(out, io.BytesIO(), about, ram, PageSource.empty(), world.base, world.index)
    return out.getvalue()


ABOUT = Description(APP, "2026-11-24T23:00:00Z", MACHINE, SECTIONS, DEVICE)


@pytest.mark.parametrize(
    ("about", "error"),
    [
        (replace(ABOUT, machine=replace(MACHINE, cpus=2)), MismatchError),
        (replace(ABOUT, device_sections=SECTIONS[:1]), MismatchError),
        (replace(ABOUT, device_state=b""), UsageError),
        (replace(ABOUT, device_state=bytes((16 << 20) + 1)), LimitError),
        (replace(ABOUT, created="now"), CorruptError),
        (replace(ABOUT, app=replace(APP, name="two\nlines")), CorruptError),
    ],
)
def test_what_no_reader_would_take_is_not_written(
    world: World, about: Description, error: type[Exception]
) -> None:
    with pytest.raises(error):
        attempt(world, about, PageSource.empty())


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], [5, 96]])
def test_a_capture_must_be_in_order_and_inside(world: World, numbers: list[int]) -> None:
    bad = PageSource(np.array(numbers, np.uint32), noise(2))
    with pytest.raises(UsageError):
        attempt(world, ABOUT, bad)


def test_a_capture_must_have_a_row_for_each_page(world: World) -> None:
    with pytest.raises(UsageError):
        attempt(world, ABOUT, PageSource(np.array([1], np.uint32), noise(2)))


def test_a_device_state_of_many_frames(world: World) -> None:
    state = np.random.default_rng(3).integers(0, 256, 16 << 20, np.uint8).tobytes()
    data, _ = world.create(device=state)
    assert world.apply(data).device == state
    assert kinds(data).count(FrameKind.DEVICE) == 8
