"""The table of digests, and the root that both ends compare."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from cloudlet.model import LARGEST_DISK_BYTES
from cloudlet.overlay.digests import DigestTable
from cloudlet.overlay.pages import Rows, Space

from .world import DEVICE, MACHINE, noise, page

SEED = 0xFEDCBA9876543210
IDENTITY = bytes(range(64))
LARGE = replace(MACHINE, memory_bytes=1 << 24, disk_bytes=LARGEST_DISK_BYTES)


def put(table: DigestTable, space: Space, pages: dict[int, Rows]) -> None:
    numbers = np.array(sorted(pages), np.uint32)
    table.put(space, numbers, table.digests(np.stack([pages[number] for number in sorted(pages)])))


def root(ram: dict[int, Rows], disk: dict[int, Rows], seed: int = SEED) -> bytes:
    """As the document says it, and in no other way."""
    whole = b"cloudlet handoff 1" + IDENTITY
    for pages in (ram, disk):
        whole += len(pages).to_bytes(8, "little")
        whole += b"".join(number.to_bytes(4, "little") for number in sorted(pages))
        whole += b"".join(xxh3_128_digest(pages[number].tobytes(), seed) for number in sorted(pages))
    return blake3(whole + blake3(DEVICE).digest()).digest()


_batches = st.lists(
    st.tuples(
        st.sampled_from(Space),
        st.dictionaries(
            # At both ends of the space, and around the borders of the table's parts.
            st.one_of(st.integers(0, 200), st.integers(4000, 4095)), st.integers(0, 3), min_size=1
        ),
    ),
    max_size=8,
)  # fmt: skip


@settings(deadline=None)
@given(_batches)
def test_it_knows_the_last_digest_of_what_was_named(batches: list[tuple[Space, dict[int, int]]]) -> None:
    table = DigestTable(LARGE, SEED)
    model: dict[Space, dict[int, int]] = {space: {} for space in Space}
    for space, pages in batches:
        numbers = np.array(sorted(pages), np.uint32)
        seeds = [pages[number] for number in numbers.tolist()]
        digests = table.digests(np.stack([page(seed) for seed in seeds]))
        named = [number in model[space] for number in numbers.tolist()]
        differs = [
            model[space].get(number) != seed for number, seed in zip(numbers.tolist(), seeds, strict=True)
        ]
        assert table.knows(space, numbers).tolist() == named
        assert table.changed(space, numbers, digests).tolist() == differs
        table.put(space, numbers, digests)
        assert not table.changed(space, numbers, digests).any()
        model[space] |= pages
    everything = np.arange(4096, dtype=np.uint32)
    for space in Space:
        assert np.flatnonzero(table.knows(space, everything)).tolist() == sorted(model[space])
    rows = {space: {number: page(seed) for number, seed in model[space].items()} for space in Space}
    assert table.root(IDENTITY, DEVICE) == root(rows[Space.RAM], rows[Space.DISK])


def test_of_nothing_named_there_is_a_root_too() -> None:
    assert DigestTable(MACHINE, SEED).root(IDENTITY, DEVICE) == root({}, {})


def test_no_pages_have_no_digests() -> None:
    table = DigestTable(MACHINE, SEED)
    nothing = table.digests(np.empty((0, 4096), np.uint8))
    assert nothing.shape == (0, 2)
    table.put(Space.RAM, np.empty(0, np.uint32), nothing)
    assert table.root(IDENTITY, DEVICE) == root({}, {})


def test_the_root_tells_each_ingredient() -> None:
    def made(
        ram: dict[int, Rows],
        disk: dict[int, Rows],
        seed: int = SEED,
        identity: bytes = IDENTITY,
        device: bytes = DEVICE,
    ) -> bytes:
        table = DigestTable(MACHINE, seed)
        for space, pages in ((Space.RAM, ram), (Space.DISK, disk)):
            if pages:
                put(table, space, pages)
        return table.root(identity, device)

    ram, disk = {3: page(1), 4: page(2)}, {3: page(1), 9: page(3)}
    flipped = page(2)
    flipped[4095] ^= 1
    roots = [
        made(ram, disk),
        made(ram, disk, seed=SEED ^ 1),
        made(ram, disk, seed=SEED ^ 1 << 63),
        made(ram, disk, identity=IDENTITY[:31] + b"\xff" + IDENTITY[32:]),
        made(ram, disk, identity=IDENTITY[:63] + b"\xff"),
        made(ram, disk, device=DEVICE + b"\0"),
        made(ram, disk, device=b""),
        made({3: page(1), 4: flipped}, disk),  # a bit of a page
        made({3: page(2), 4: page(1)}, disk),  # two pages exchanged
        made({3: page(1), 5: page(2)}, disk),  # another page
        made({3: page(1)}, disk),  # a page less
        made(ram, {3: page(1)}),
        made(ram, disk | {10: np.zeros(4096, np.uint8)}),  # a page more, of zeros
        made(disk, ram),  # RAM and disk exchanged
        made(ram | disk, {}),
        made({}, ram | disk),
    ]
    assert len(set(roots)) == len(roots)


def test_the_order_of_naming_does_not_matter() -> None:
    one, other = DigestTable(LARGE, SEED), DigestTable(LARGE, SEED)
    pages = dict(enumerate(noise(300)))
    put(one, Space.DISK, pages)
    for number in np.random.default_rng(4).permutation(300).tolist():
        put(other, Space.DISK, {number: page(9)})
        put(other, Space.DISK, {number: pages[number]})
    assert one.root(IDENTITY, DEVICE) == other.root(IDENTITY, DEVICE)


def test_a_huge_disk_costs_what_is_named_of_it() -> None:
    """A dense table of 4 TiB would take 16 GiB."""
    last = LARGEST_DISK_BYTES // 4096 - 1
    tracemalloc.start()
    try:
        table = DigestTable(LARGE, SEED)
        for number in range(0, 1 << 30, 1 << 20):
            put(table, Space.DISK, {number: page(number)})
        put(table, Space.DISK, {last: page(1)})
        assert table.root(IDENTITY, DEVICE) != root({}, {})
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()
    numbers = np.array([0, 1, last - 1, last], np.uint32)
    assert table.knows(Space.DISK, numbers).tolist() == [True, False, False, True]
