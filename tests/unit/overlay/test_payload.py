from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.overlay.frames import FrameEntry, FrameKind
from cloudlet.overlay.pages import Space
from cloudlet.overlay.payload import Operation, PagePayload, oldest_reference

from .world import MACHINE, noise

_REFERRING = (Operation.BASE_RAM, Operation.BASE_DISK, Operation.EARLIER, Operation.SPAN)


def payload(operations: list[int], numbers: list[int], references: list[int], first: int = 7) -> PagePayload:
    literals = noise(operations.count(Operation.LITERAL) + operations.count(Operation.XOR))
    return PagePayload(
        Space.RAM,
        first,
        np.array(numbers, np.uint32),
        np.array(operations, np.uint8),
        np.array(references, np.uint32),
        literals,
    )


def decode(made: PagePayload, change: tuple[int, bytes] | None = None) -> PagePayload:
    raw = bytearray(made.encode().tobytes())
    entry = FrameEntry(FrameKind.RAM, 1, len(raw), made.numbers.size, len(made.literals), bytes(32))
    if change:
        raw[change[0] : change[0] + len(change[1])] = change[1]
    return PagePayload.decode(entry, bytes(raw), MACHINE, "frame 3")


@given(st.data())
def test_it_reads_what_it_writes(data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 95), min_size=1, max_size=20, unique=True))
    count = len(numbers)
    operations = data.draw(st.lists(st.sampled_from(Operation), min_size=count, max_size=count))
    ranges = {operation: st.integers(0, 6) for operation in _REFERRING}
    ranges[Operation.SPAN] = st.integers(4096, 7 * 4096)
    references = [data.draw(ranges[o]) for o in operations if o in _REFERRING]
    made = payload(operations, numbers, references)
    again = decode(made)
    assert again.first_literal == 7
    assert again.numbers.tolist() == numbers
    assert again.operations.tolist() == operations
    assert again.references.tolist() == references
    assert (again.literals == made.literals).all()
    referring = [o for o in operations if o in _REFERRING]
    found = again.by_operation()
    assert list(found) == sorted(set(operations))
    for operation, (positions, own) in found.items():
        assert positions.tolist() == [at for at, o in enumerate(operations) if o == operation]
        assert own.tolist() == [r for o, r in zip(referring, references, strict=True) if o == operation]


@given(st.data())
def test_a_payload_can_be_split(data: st.DataObject) -> None:
    """The pieces follow each other, are well formed, and say the same of every page."""
    count = data.draw(st.integers(1, 20))
    operations = data.draw(st.lists(st.sampled_from(Operation), min_size=count, max_size=count))
    end = (7 + sum(o >= Operation.LITERAL for o in operations)) * 4096
    ranges = {operation: st.integers(0, 6) for operation in _REFERRING}
    ranges[Operation.SPAN] = st.integers(end - 6 * 4096, end)
    references = [data.draw(ranges[o]) for o in operations if o in _REFERRING]
    made = payload(operations, list(range(count)), references)
    pieces = [decode(piece) for piece in made.split(data.draw(st.integers(1, count)))]
    assert max(p.numbers.size for p in pieces) - min(p.numbers.size for p in pieces) <= 1
    literal = 7
    for piece in pieces:
        assert piece.first_literal == literal
        literal += len(piece.literals)
    whole = meaning(made)
    assert [page for piece in pieces for page in meaning(piece)] == whole


def meaning(made: PagePayload) -> list[tuple[int, int, object]]:
    """Of each page: its number, its operation, and what it takes its content from."""
    pages: dict[int, tuple[int, int, object]] = {}
    for operation, (positions, references) in made.by_operation().items():
        if operation is Operation.SPAN:
            sources = made.span_starts(references).tolist()
        elif operation in _REFERRING:
            sources = references.tolist()
        elif operation is Operation.ZERO:
            sources = [None] * positions.size
        else:
            sources = [row.tobytes() for row in made.literals_of(operation)]
        for at, source in zip(positions.tolist(), sources, strict=True):
            pages[at] = int(made.numbers[at]), int(operation), source
    return [pages[at] for at in sorted(pages)]


@pytest.mark.parametrize("code", [7, 255])
def test_unknown_operations_are_refused(code: int) -> None:
    with pytest.raises(CorruptError, match="unknown operation"):
        decode(payload([0, 0], [1, 2], []), (8 + 8, bytes([code])))


def test_counts_must_fit() -> None:
    made = payload([0, 5, 1], [1, 2, 3], [5])
    assert decode(made).references.tolist() == [5]
    with pytest.raises(CorruptError, match="literals"):
        decode(made, (8 + 12, bytes([5, 5, 1])))
    with pytest.raises(CorruptError, match="uses 2 literals and has 1"):
        decode(made, (8 + 12, bytes([6, 5, 1])))
    with pytest.raises(CorruptError, match="uses 0 literals and has 1"):
        decode(payload([0, 6, 1], [1, 2, 3], [5]), (8 + 12, bytes([0, 0, 1])))
    with pytest.raises(CorruptError, match="one reference"):
        decode(made, (8 + 12, bytes([6, 1, 1])))
    with pytest.raises(CorruptError, match="one reference"):
        decode(made, (8 + 12, bytes([1, 5, 1])))
    with pytest.raises(CorruptError, match="counts 2 references"):
        decode(made, (4, b"\2"))


@pytest.mark.parametrize(
    ("operation", "reference", "good"),
    [
        (Operation.BASE_RAM, 95, True),
        (Operation.BASE_RAM, 96, False),
        (Operation.BASE_DISK, 63, True),
        (Operation.BASE_DISK, 64, False),
        (Operation.EARLIER, 20_000, True),
        (Operation.EARLIER, 20_001, False),
        (Operation.EARLIER, 2**32 - 1, False),
        (Operation.EARLIER, 20_001 - 16_384, True),
        (Operation.EARLIER, 20_000 - 16_384, False),
        (Operation.SPAN, 4096, True),
        (Operation.SPAN, 4095, False),
        (Operation.SPAN, 16_384 * 4096, True),
        (Operation.SPAN, 16_384 * 4096 + 1, False),
    ],
)
def test_references_stay_inside(operation: Operation, reference: int, good: bool) -> None:
    made = payload([operation, Operation.LITERAL], [1, 2], [reference], first=20_000)
    if good:
        assert decode(made).by_operation()[operation][1].tolist() == [reference]
    else:
        with pytest.raises(CorruptError, match=f"{operation.name} outside"):
            decode(made)


def test_a_span_does_not_begin_before_the_first_literal() -> None:
    made = decode(payload([5, 4], [1, 2], [2 * 4096], first=1))
    assert made.span_starts(made.references).tolist() == [0]
    with pytest.raises(CorruptError, match="outside"):
        decode(payload([5, 4], [1, 2], [2 * 4096 + 1], first=1))


def test_pages_that_refer_can_be_left_out() -> None:
    made = payload([1, 5, 0, 4, 3], [1, 2, 3, 4, 5], [30, 4096, 2])
    some = made.without(np.array([0, 3]))
    assert some.numbers.tolist() == [2, 3, 5]
    assert some.operations.tolist() == [5, 0, 3]
    assert some.references.tolist() == [2]
    assert (some.literals == made.literals).all()


@pytest.mark.parametrize("numbers", [[96], [5, 2**32 - 1]])
def test_pages_stay_inside_the_machine(numbers: list[int]) -> None:
    with pytest.raises(CorruptError, match="beyond"):
        decode(payload([0] * len(numbers), numbers, []))


def test_the_window_begins_at_the_first_literal() -> None:
    assert oldest_reference(0, 512) == 0
    assert oldest_reference(16_384 - 512, 512) == 0
    assert oldest_reference(16_384, 1) == 1
