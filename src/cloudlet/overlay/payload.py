"""A frame of pages, decompressed: which pages come, and where the content of each is found.

:class:`PagePayload` is the parsed form, over the frame's own bytes without a copy. Decoding checks
everything that needs no other frame, so that whoever builds the pages need not look again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.frames import FrameEntry, payload_bytes
from cloudlet.overlay.limits import WINDOW_LITERALS
from cloudlet.overlay.pages import Numbers, Positions, Rows, Space

_HEAD = struct.Struct("<II")


class Operation(IntEnum):
    """How a page comes to its content."""

    ZERO = 0
    BASE_RAM = 1
    BASE_DISK = 2
    EARLIER = 3
    SPAN = 4
    LITERAL = 5
    XOR = 6


_CODES = {operation: int(operation) for operation in Operation}
"""As plain integers: to compare an array with a member of an enumeration takes numpy five times as long."""
_ZERO, _SPAN, _LITERAL = _CODES[Operation.ZERO], _CODES[Operation.SPAN], _CODES[Operation.LITERAL]


def _refers(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pages need a reference."""
    return np.asarray((codes > _ZERO) & (codes < _LITERAL))


def _has_literal(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pages need a literal."""
    return np.asarray(codes >= _LITERAL)


def oldest_reference(first_literal: int, literals: int) -> int:
    """The smallest literal number that a frame may refer to: readers keep only the window."""
    return max(0, first_literal + literals - WINDOW_LITERALS)


@dataclass(frozen=True, slots=True)
class PagePayload:
    """Pages of one frame; references and literals follow the order of the pages that need one."""

    space: Space
    first_literal: int
    numbers: Numbers
    operations: NDArray[np.uint8]
    references: Numbers
    literals: Rows

    @property
    def raw_bytes(self) -> int:
        """Size of the frame before it is compressed."""
        return payload_bytes(self.numbers.size, self.references.size, len(self.literals))

    def encode(self) -> NDArray[np.uint8]:
        """The raw bytes of the frame."""
        n, r = self.numbers.size, self.references.size
        raw = np.empty(self.raw_bytes, np.uint8)
        raw[:8] = np.frombuffer(_HEAD.pack(self.first_literal, r), np.uint8)
        deltas = np.diff(self.numbers, prepend=np.uint32(0)).astype("<u4")
        raw[8 : 8 + 4 * n] = deltas.view(np.uint8)
        raw[8 + 4 * n : 8 + 5 * n] = self.operations
        raw[8 + 5 * n : 8 + 5 * n + 4 * r] = self.references.astype("<u4").view(np.uint8)
        raw[8 + 5 * n + 4 * r :] = self.literals.reshape(-1)
        return raw

    @classmethod
    def decode(cls, entry: FrameEntry, raw: bytes | memoryview, machine: Machine, where: str) -> Self:
        """Parse a frame whose size is the one that ``entry`` declares.

        :raises CorruptError: a field contradicts the entry, or refers to what does not exist.
        """
        n, r = entry.pages, entry.references
        first, references = _HEAD.unpack_from(raw)
        if references != r:
            raise CorruptError(f"{where} counts {references} references, its sizes leave room for {r}")
        deltas = np.frombuffer(raw, "<u4", n, 8)
        payload = cls(
            entry.kind.space,
            first,
            np.cumsum(deltas, dtype=np.uint32),
            np.frombuffer(raw, np.uint8, n, 8 + 4 * n),
            np.frombuffer(raw, "<u4", r, 8 + 5 * n),
            np.frombuffer(raw, np.uint8, PAGE_BYTES * entry.literals, 8 + 5 * n + 4 * r).reshape(
                -1, PAGE_BYTES
            ),
        )
        payload._check(machine, where)
        return payload

    def by_operation(self) -> dict[Operation, tuple[Positions, Numbers]]:
        """Of each operation that occurs, in the order of the codes: the positions of its pages, and their
        references; only four operations have any.
        """
        codes, counts = self.operations, np.bincount(self.operations).tolist()
        referring = codes[_refers(codes)]
        return {
            operation: (np.flatnonzero(codes == code), self.references[referring == code])
            for operation, code in _CODES.items()
            if code < len(counts) and counts[code]
        }

    def literals_of(self, operation: Operation) -> Rows:
        """The literals of the pages with this operation, which is one that needs a literal."""
        codes = self.operations[_has_literal(self.operations)]
        mine = codes == _CODES[operation]
        return self.literals if mine.all() else self.literals[mine]

    def span_starts(self, references: Numbers) -> NDArray[np.int64]:
        """Where spans with these references begin, in bytes of the sequence of all literals."""
        end = (self.first_literal + len(self.literals)) * PAGE_BYTES
        return end - references.astype(np.int64)

    def without(self, positions: Positions) -> PagePayload:
        """The payload without some of the pages that refer to something."""
        kept = np.ones(self.numbers.size, np.bool_)
        kept[positions] = False
        return replace(
            self,
            numbers=self.numbers[kept],
            operations=self.operations[kept],
            references=self.references[kept[_refers(self.operations)]],
        )

    def split(self, parts: int) -> Iterator[PagePayload]:
        """The same pages as payloads of several frames, one behind the other and about as long."""
        refers, has_literal = _refers(self.operations), _has_literal(self.operations)
        edges = np.linspace(0, self.numbers.size, parts + 1, dtype=np.intp)
        references, literals = (
            np.concatenate(([0], np.cumsum(some)))[edges].tolist() for some in (refers, has_literal)
        )
        for at, pages in enumerate(pairwise(edges.tolist())):
            mine = slice(*pages)
            codes, first, after = self.operations[mine], literals[at], literals[at + 1]
            own = self.references[references[at] : references[at + 1]].copy()
            # Spans count back from their frame's last literal, which is an earlier one now.
            own[codes[refers[mine]] == _SPAN] -= np.uint32((len(self.literals) - after) * PAGE_BYTES)
            yield replace(
                self,
                first_literal=self.first_literal + first,
                numbers=self.numbers[mine],
                operations=codes,
                references=own,
                literals=self.literals[first:after],
            )

    def _check(self, machine: Machine, where: str) -> None:
        counts = np.bincount(self.operations, minlength=len(Operation)).tolist()
        if len(counts) > len(Operation):
            raise CorruptError(f"{where} holds an unknown operation, {len(counts) - 1}")
        _, *referring, literals, xors = counts
        if literals + xors != len(self.literals):
            raise CorruptError(f"{where} uses {literals + xors} literals and has {len(self.literals)}")
        if sum(referring) != self.references.size:
            raise CorruptError(f"{where} does not have one reference for each page that needs one")
        spaces = {Space.RAM: machine.ram_pages, Space.DISK: machine.disk_blocks}
        if int(self.numbers.max()) >= spaces[self.space]:
            raise CorruptError(f"{where} brings {self.space.label} {self.numbers.max()}, beyond the machine")
        if not self.references.size:
            return
        last = self.first_literal + len(self.literals)
        limits = {
            Operation.BASE_RAM: (0, spaces[Space.RAM]),
            Operation.BASE_DISK: (0, spaces[Space.DISK]),
            Operation.EARLIER: (oldest_reference(self.first_literal, len(self.literals)), last),
            Operation.SPAN: (PAGE_BYTES, min(last, WINDOW_LITERALS) * PAGE_BYTES + 1),
        }
        codes = self.operations[_refers(self.operations)]
        lows, highs = np.array([(0, 0), *limits.values()]).T[:, codes]
        if (outside := (self.references < lows) | (self.references >= highs)).any():
            operation = Operation(int(codes[outside.argmax()]))
            low, high = limits[operation]
            raise CorruptError(f"{where} refers to {operation.name} outside {low} to {high - 1}")
