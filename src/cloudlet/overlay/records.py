"""The records of a hand-off as they go over the wire (``docs/formats/handoff.md``, Records).

A record is a kind and a body. What is checked here needs no more than the record and the size of the machine;
what a record does to a machine is in ``rounds.py``. Each error names the record by its number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, Self

import numpy as np

from cloudlet.errors import CorruptError, LimitError, TruncatedError
from cloudlet.model import Machine
from cloudlet.overlay.frames import ENTRY_BYTES, FrameEntry, FrameKind, Packer, check_frame
from cloudlet.overlay.limits import FRAME_BYTES
from cloudlet.overlay.pages import Numbers, Runs, Space, numbers_of, runs_of

BODY_BYTES = FRAME_BYTES + ENTRY_BYTES
"""The largest body of a record."""

SAME_PAGES = 16_384
"""Pages that one SAME may name: their reader reads them all, 64 MiB."""

DIGEST_BYTES = 32

_HEAD = struct.Struct("<B3sI")
_SAME = struct.Struct("<B3s")
_RUN_BYTES = 8
_ROUND = struct.Struct("<IIIQ")


class RecordKind(IntEnum):
    """What a record says."""

    PAGES = 1
    SAME = 2
    ROUND = 3
    DEVICE = 4
    END = 5
    MISSING = 6


_FRAMES = {
    RecordKind.PAGES: (FrameKind.RAM, FrameKind.DISK),
    RecordKind.DEVICE: (FrameKind.DEVICE,),
    RecordKind.MISSING: (FrameKind.MAP,),
}
_MISSING_LEVEL = 3
"""How hard the list of missing pages is compressed: the machine stands still meanwhile."""


class ReadStream(Protocol):
    """What records are read from."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none only at the end."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record."""

    kind: RecordKind
    body: bytes

    def encode(self) -> bytes:
        """Head and body."""
        return _HEAD.pack(self.kind, b"", len(self.body)) + self.body


def read_record(stream: ReadStream, number: int) -> Record | None:
    """The next record of a stream, the one with this number; ``None`` where the stream ends between two.

    Memory: one body, 4 MiB and a little at most.

    :raises TruncatedError: the stream ends within the record.
    :raises LimitError: its body is larger than that of any record.
    :raises CorruptError: it is of no known kind.
    """
    head = _read(stream, _HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise TruncatedError(f"record {number} is cut within its head")
    kind, zero, size = _HEAD.unpack(head)
    if kind not in tuple(RecordKind) or any(zero):
        raise CorruptError(f"record {number} is of an unknown kind {kind}")
    if size > BODY_BYTES:
        raise LimitError(f"record {number} has {size} bytes; {BODY_BYTES} are allowed")
    body = _read(stream, size)
    if len(body) < size:
        raise TruncatedError(f"record {number} is cut after {len(body)} of {size} bytes")
    return Record(RecordKind(kind), body)


def of_frame(kind: RecordKind, entry: FrameEntry, blob: bytes) -> Record:
    """A record that brings a frame."""
    return Record(kind, entry.pack() + blob)


def frame_in(record: Record, where: str) -> tuple[FrameEntry, bytes]:
    """The frame that a record brings, by its digest as it was sent.

    :raises CorruptError: it is not what its entry pins, or no frame that such a record brings.
    :raises LimitError: its entry declares more than a frame may have.
    """
    if len(record.body) < ENTRY_BYTES:
        raise CorruptError(f"{where} has {len(record.body)} bytes, fewer than the entry of its frame")
    entry = FrameEntry.unpack(record.body[:ENTRY_BYTES], where)
    if entry.kind not in _FRAMES[record.kind]:
        raise CorruptError(f"{where} is {record.kind.name} and brings a frame of kind {entry.kind.name}")
    blob = record.body[ENTRY_BYTES:]
    check_frame(entry, blob, where)
    return entry, blob


@dataclass(frozen=True, slots=True)
class Same:
    """Pages that have their content of what the target holds."""

    space: Space
    runs: Runs

    @classmethod
    def of(cls, space: Space, numbers: Numbers) -> Iterator[Self]:
        """As many as these pages take; the numbers increase strictly."""
        for at in range(0, numbers.size, SAME_PAGES):
            yield cls(space, runs_of(numbers[at : at + SAME_PAGES]))

    @property
    def numbers(self) -> Numbers:
        return numbers_of(self.runs)

    def encode(self) -> Record:
        return Record(RecordKind.SAME, _SAME.pack(self.space, b"") + self.runs.astype("<u4").tobytes())

    @classmethod
    def decode(cls, body: bytes, machine: Machine, where: str) -> Self:
        """:raises CorruptError: the runs are not in order, touch each other or leave the machine.
        :raises LimitError: they name more pages than one record may.
        """
        if len(body) <= _SAME.size or (len(body) - _SAME.size) % _RUN_BYTES:
            raise CorruptError(f"{where} has {len(body)} bytes, which are no runs of pages")
        space, zero = _SAME.unpack_from(body)
        if space not in tuple(Space) or any(zero):
            raise CorruptError(f"{where} names pages of an unknown space {space}")
        pages = {Space.RAM: machine.ram_pages, Space.DISK: machine.disk_blocks}[Space(space)]
        runs = np.frombuffer(body, "<u4", offset=_SAME.size).reshape(-1, 2)
        starts, lengths = runs.astype(np.int64).T
        ends = starts + lengths
        if not lengths.all() or (starts[1:] <= ends[:-1]).any():
            raise CorruptError(f"{where} names pages in runs that are empty or not in order")
        if ends[-1] > pages:
            raise CorruptError(f"{where} names {Space(space).label} {ends[-1] - 1}, beyond the machine")
        if lengths.sum() > SAME_PAGES:
            raise LimitError(f"{where} names {lengths.sum()} pages; {SAME_PAGES} are allowed")
        return cls(Space(space), runs)


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """What a round was: pages looked at, pages sent, and nanoseconds since the round before it."""

    number: int
    looked: int
    sent: int
    nanoseconds: int

    def encode(self) -> Record:
        return Record(RecordKind.ROUND, _ROUND.pack(self.number, self.looked, self.sent, self.nanoseconds))

    @classmethod
    def decode(cls, body: bytes, where: str) -> Self:
        """:raises CorruptError: it is not of its size."""
        if len(body) != _ROUND.size:
            raise CorruptError(f"{where} has {len(body)} bytes, not the {_ROUND.size} of a round")
        return cls(*_ROUND.unpack(body))


@dataclass(frozen=True, slots=True)
class End:
    """The last record: the root, and the digest of the whole machine or zeros."""

    root: bytes
    full: bytes

    def encode(self) -> Record:
        return Record(RecordKind.END, self.root + self.full)

    @classmethod
    def decode(cls, body: bytes, where: str) -> Self:
        """:raises CorruptError: it is not of its size."""
        if len(body) != 2 * DIGEST_BYTES:
            raise CorruptError(f"{where} has {len(body)} bytes, not the {2 * DIGEST_BYTES} of an end")
        return cls(body[:DIGEST_BYTES], body[DIGEST_BYTES:])


def missing_record(numbers: Numbers, machine: Machine) -> Record:
    """The record that says which pages of RAM come later.

    :raises LimitError: the machine has more RAM than the record can speak of, 128 GiB.
    """
    bits = np.zeros(machine.ram_pages, np.bool_)
    bits[numbers] = True
    raw = np.packbits(bits, bitorder="little").data
    if len(raw) > FRAME_BYTES:
        raise LimitError(f"pages of a machine with {machine.ram_pages} pages of RAM cannot come later")
    return of_frame(RecordKind.MISSING, *Packer(_MISSING_LEVEL).pack(FrameKind.MAP, raw))


def missing_pages(raw: memoryview, machine: Machine, where: str) -> Numbers:
    """The pages that :func:`missing_record` named, from its frame as it was before it was packed.

    :raises CorruptError: it is not of the machine's size, names a page beyond it, or none.
    """
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    numbers = np.flatnonzero(bits).astype(np.uint32)
    if len(raw) != -(-machine.ram_pages // 8) or not numbers.size or int(numbers[-1]) >= machine.ram_pages:
        raise CorruptError(f"{where} names missing pages that the machine does not have")
    return numbers


def _read(stream: ReadStream, size: int) -> bytes:
    """So many bytes, or fewer where the stream ends."""
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
