"""Rounds of a hand-off: from what a machine's pages are now to records, and from records to the same pages.

The source looks at the machine's pages again and again (:class:`RoundWriter`) and makes records of those
that are not as the target has them. The target builds these pages (:class:`RoundReader`) and in the end
knows by one digest that it has the same machine. Neither side reads a machine, writes to one or knows the
network; each belongs to one thread at a time, and only :func:`pack`, the compression, is for many.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError, LimitError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.apply import LiteralRing, LiteralSpool, build
from cloudlet.overlay.digests import Digests, DigestTable
from cloudlet.overlay.encode import PageEncoder
from cloudlet.overlay.frames import FrameKind, Packer, Unpacker
from cloudlet.overlay.index import Lookup
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.limits import DEVICE_BYTES, FRAME_PAGES, WINDOW_LITERALS
from cloudlet.overlay.pack import pack_whole
from cloudlet.overlay.pages import Numbers, PageBatch, Positions, Rows, Space, equal_rows
from cloudlet.overlay.payload import Operation, PagePayload
from cloudlet.overlay.records import (
    DIGEST_BYTES,
    End,
    Record,
    RecordKind,
    RoundEnd,
    Same,
    frame_in,
    missing_pages,
    missing_record,
    of_frame,
)

FRAME_PAGES_SENT = 128
"""Pages of a record, unless a round ends before. Measured: 64 take 2 % more bytes, 256 take 2 % fewer; with
128, one that does not compress takes half a second at 10 Mbit/s."""

DEVICE_LEVEL = 1
"""How hard the device state is compressed: the machine stands still meanwhile."""


class RoundWriter:
    """The source's end: is shown pages, and says what the target does not have.

    Memory: the digests of all pages that were named (``digests.py``), 150 bytes for each of the last 16,384
    literals, two frames, 4 bytes for each page that the round has sent or found as the target holds it, and
    the payloads that nobody has taken. With spans also the literals, 64 MiB. Where pages may be left for
    later, also the digests of those that :meth:`count` found changed.
    """

    def __init__(
        self,
        known: KnownPages,
        index: Lookup,
        seed: int,
        *,
        spans: bool = False,
        window: int | None = None,
        leaves: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Nothing has been looked at.

        :param known: what the target holds.
        :param index: where content is found in it.
        :param seed: the hand-off's.
        :param spans: whether content is looked for at other places within pages. Measured on a Python app's
            140 MiB: 1.0 ms of CPU more per MiB, to 2.7, and 64 MiB of memory for 0.8 % fewer bytes; 12 to
            47 % fewer where it holds files that it has read in its own buffers.
        :param window: how far back a page may refer, in literals; a record's pages at least, 16,384 at most
            and if not given.
        :param leaves: whether pages may be left for later (:meth:`leave`).
        :param clock: nanoseconds.
        """
        self.looked = 0
        """Pages looked at, in all rounds."""
        self.changed = 0
        """Pages that were not as the target had them, in all rounds."""
        self.operations: Counter[Operation] = Counter()
        """What became of those."""
        self._known = known
        self._table = DigestTable(known.machine, seed)
        self._seen = DigestTable(known.machine, seed) if leaves else None
        self._encoder = PageEncoder(known, index, xor=False, spans=spans, window=window)
        self._clock = clock
        self._round_began = clock()
        self._round_looked = self._round_changed = 0
        self._room: Rows = np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8)
        self._frame = _Frame()
        self._payloads: list[PagePayload] = []
        self._same: dict[Space, list[Numbers]] = {space: [] for space in Space}
        self._sent: dict[Space, list[Numbers]] = {space: [] for space in Space}

    def look(self, space: Space, numbers: Numbers, rows: Rows) -> int:
        """Look at pages as they are now, 512 at most; how many of them the target does not have.

        :param numbers: increasing strictly.
        :param rows: their contents, contiguous; only lent. Pages that have changed are copied three times.
        """
        digests = self._table.digests(rows)
        changed, same = self._compare(space, numbers, rows, digests)
        self._round_looked += numbers.size
        self._round_changed += int(np.count_nonzero(changed))
        if same.size:
            self._table.put(space, numbers[same], digests[same])
            self._same[space].append(numbers[same])
        if changed.any():
            self._table.put(space, numbers[changed], digests[changed])
            self._sent[space].append(numbers[changed])
            self._send(space, numbers[changed], rows[changed])
        return int(np.count_nonzero(changed))

    def count(self, space: Space, numbers: Numbers, rows: Rows) -> int:
        """How many of these pages the target does not have; nothing comes of it. As for :meth:`look`."""
        digests = self._table.digests(rows)
        changed, _ = self._compare(space, numbers, rows, digests)
        if self._seen:
            self._seen.put(space, numbers[changed], digests[changed])
        return int(np.count_nonzero(changed))

    def leave(self, numbers: Numbers, rows: Rows) -> Left:
        """Look at pages of RAM as :meth:`look` does, and leave those that have changed for later.

        The table keeps what both ends know of these.
        """
        assert self._seen
        digests = self._table.digests(rows)
        changed, same = self._compare(Space.RAM, numbers, rows, digests)
        self._round_looked += numbers.size
        self._table.put(Space.RAM, numbers[same], digests[same])
        self._same[Space.RAM].append(numbers[same])
        lately = changed & self._seen.changed(Space.RAM, numbers, digests)
        before = changed & ~lately
        return Left(
            numbers[lately], numbers[before], _filled_words(rows[lately]), _filled_words(rows[before])
        )

    def missing_record(self, left: Left) -> Record:
        """The record that names all pages that were left.

        :raises LimitError: the machine has too much RAM for that.
        """
        return missing_record(left.numbers, self._known.machine)

    def bring(self, numbers: Numbers, rows: Rows) -> None:
        """Send pages that were left; their :meth:`payloads` are there then. As for :meth:`look`."""
        self._table.put(Space.RAM, numbers, self._table.digests(rows))
        self._send(Space.RAM, numbers, rows)
        self._flush()

    def payloads(self) -> list[PagePayload]:
        """What is to be packed and sent, in this order; each is given once."""
        taken, self._payloads = self._payloads, []
        return taken

    def end_round(self, number: int) -> list[Record]:
        """The records that end a round; its last :meth:`payloads` are there then, to be sent before."""
        self._flush()
        records: list[Record] = []
        for space in Space:
            same, sent = (
                np.concatenate([np.empty(0, np.uint32), *numbers])
                for numbers in (self._same[space], self._sent[space])
            )
            # A page can have been looked at twice: what was sent of it is newer.
            records += [part.encode() for part in Same.of(space, np.setdiff1d(same, sent))]
            self._same[space], self._sent[space] = [], []
        now = self._clock()
        records.append(
            RoundEnd(number, self._round_looked, self._round_changed, now - self._round_began).encode()
        )
        self.looked += self._round_looked
        self.changed += self._round_changed
        self._round_began, self._round_looked, self._round_changed = now, 0, 0
        return records

    def device_records(self, device_state: bytes) -> list[Record]:
        """The records that bring the device state, after the last round.

        :raises LimitError: it has more than 16 MiB.
        """
        frames = pack_whole(Packer(DEVICE_LEVEL), FrameKind.DEVICE, device_state, DEVICE_BYTES)
        return [of_frame(RecordKind.DEVICE, entry, blob) for entry, blob in frames]

    def end_record(self, device_state: bytes, full: bytes = bytes(DIGEST_BYTES)) -> Record:
        """The last record: the root.

        :param full: the digest of the whole machine, or zeros where there is none (``verify: full``).
        """
        return End(self._table.root(self._known.identity, device_state), full).encode()

    def _compare(
        self, space: Space, numbers: Numbers, rows: Rows, digests: Digests
    ) -> tuple[NDArray[np.bool_], Positions]:
        """Which pages the target does not have as they are, and which of the others were never named."""
        if numbers.size > FRAME_PAGES or (numbers[1:] <= numbers[:-1]).any():
            raise ValueError("pages are to be looked at in order, and not too many at a time")
        changed = self._table.changed(space, numbers, digests)
        new = np.flatnonzero(~self._table.knows(space, numbers))
        known = self._room[: new.size]
        self._known.read_into(space, numbers[new], known, np.arange(new.size))
        same = new[equal_rows(known, rows[new])]
        changed[same] = False
        return changed, same

    def _send(self, space: Space, numbers: Numbers, rows: Rows) -> None:
        """Put pages into frames; a frame has pages of one space, in order."""
        if space is not self._frame.space or int(numbers[0]) <= self._frame.last:
            self._flush()
        at = 0
        while at < numbers.size:
            after = at + FRAME_PAGES_SENT - self._frame.pages
            self._frame.add(space, numbers[at:after], rows[at:after])
            if self._frame.pages == FRAME_PAGES_SENT:
                self._flush()
            at = after

    def _flush(self) -> None:
        """Encode the frame, and begin another."""
        frame, self._frame = self._frame, _Frame()
        if frame.pages:
            numbers, rows = np.concatenate(frame.numbers), np.concatenate(frame.rows)
            payload = self._encoder.encode(frame.space, numbers, rows)
            counts = np.bincount(payload.operations, minlength=len(Operation)).tolist()
            self.operations.update(dict(zip(Operation, counts, strict=True)))
            self._payloads.append(payload)


@dataclass(frozen=True, slots=True)
class Left:
    """Pages of RAM that are sent later."""

    lately: Numbers
    """Those that have changed since they were looked at last: they are what will be read first."""
    before: Numbers
    """Those that had changed before."""
    filled_lately: NDArray[np.intp]
    """How many words of each page are not zero."""
    filled_before: NDArray[np.intp]

    def in_turn(self) -> Numbers:
        """All of them, those first that are likely to be read first.

        What has changed lately, then the rest; of both what is emptier first: that is bookkeeping more often
        than data, and takes fewer bytes.
        """
        lately = self.lately[np.argsort(self.filled_lately, kind="stable")]
        return np.concatenate((lately, self.before[np.argsort(self.filled_before, kind="stable")]))

    @property
    def numbers(self) -> Numbers:
        """All of them, in order."""
        return np.sort(np.concatenate((self.lately, self.before)))

    @classmethod
    def of(cls, parts: Sequence[Left]) -> Left:
        """All parts together."""
        no_pages, no_counts = np.empty(0, np.uint32), np.empty(0, np.intp)
        return cls(
            np.concatenate([no_pages, *(part.lately for part in parts)]),
            np.concatenate([no_pages, *(part.before for part in parts)]),
            np.concatenate([no_counts, *(part.filled_lately for part in parts)]),
            np.concatenate([no_counts, *(part.filled_before for part in parts)]),
        )


def _filled_words(rows: Rows) -> NDArray[np.intp]:
    return np.asarray(np.count_nonzero(rows.view(np.uint64), axis=1), np.intp)


@dataclass(slots=True)
class _Frame:
    """Changed pages that wait until there are enough of them."""

    space: Space = Space.RAM
    pages: int = 0
    last: int = -1
    numbers: list[Numbers] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)

    def add(self, space: Space, numbers: Numbers, rows: Rows) -> None:
        self.space, self.last = space, int(numbers[-1])
        self.pages += numbers.size
        self.numbers.append(numbers)
        self.rows.append(rows)


def pack(payload: PagePayload, level: int) -> bytes:
    """The PAGES record of a payload as it is sent: compressed, with zstd's ``level``. For any thread."""
    raw = payload.encode().data
    entry, blob = Packer(level).pack(
        FrameKind(payload.space), raw, payload.numbers.size, len(payload.literals)
    )
    return of_frame(RecordKind.PAGES, entry, blob).encode()


@dataclass(frozen=True, slots=True)
class Ended:
    """What the target has once the copy is proven equal."""

    device_state: bytes
    full: bytes
    """The digest of the whole machine at the source, or zeros."""
    missing: Numbers
    """The pages of RAM that are still to come, in order; all others are proven."""


class RoundReader:
    """The target's end: takes the records in order, and hands on the pages that it has to load.

    A page reaches the sink only after its frame's digest and structure were checked. A record that was
    refused has changed nothing that its repetition would not change in the same way.

    Memory: the digests of all pages that were named, two frames, the device state, and 64 MiB of literals,
    touched as they come, or none where there is a file for them.
    """

    def __init__(
        self,
        known: KnownPages,
        seed: int,
        sink: Callable[[PageBatch], None],
        spool_fd: int | None = None,
    ) -> None:
        """No record has come.

        :param known: what this end holds, and what the machine has that the pages are loaded into.
        :param seed: the hand-off's.
        :param sink: gets each page that is not as the machine has it.
        :param spool_fd: an empty temporary file for literals, 64 MiB at most.
        """
        self.records = 0
        """Records taken."""
        self.rounds = 0
        """The number of the last round that ended."""
        self._known = known
        self._sink = sink
        self._table = DigestTable(known.machine, seed)
        self._unpacker = Unpacker()
        self._literal = 0
        self._literals = (
            LiteralRing(WINDOW_LITERALS) if spool_fd is None else LiteralSpool(WINDOW_LITERALS, spool_fd)
        )
        self._room: Rows = np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8)
        self._device: list[bytes] = []
        self._missing: Numbers = np.empty(0, np.uint32)
        self._named_missing = False
        self._ended = False

    def take(self, record: Record) -> Ended | None:
        """Take the next record; what the whole machine is, after an END.

        There is a second END where the first one left pages for later.

        :raises CorruptError: the record is damaged, not the next one, or not of this hand-off; or the copy
            differs from the machine at the source.
        :raises LimitError: it brings more than a record may.
        """
        where = f"record {self.records}"
        if record.kind not in self._expected():
            raise CorruptError(f"{where} is {record.kind.name} and comes after the last round")
        ended = None
        match record.kind:
            case RecordKind.PAGES:
                self._take_pages(record, where)
            case RecordKind.SAME:
                self._take_same(Same.decode(record.body, self._known.machine, where))
            case RecordKind.ROUND:
                self._take_round(RoundEnd.decode(record.body, where), where)
            case RecordKind.DEVICE:
                self._take_device(record, where)
            case RecordKind.MISSING:
                self._take_missing(record, where)
            case RecordKind.END:
                ended = self._take_end(End.decode(record.body, where), where)
        self.records += 1
        return ended

    def _expected(self) -> tuple[RecordKind, ...]:
        """What may come next."""
        if self._ended:
            return (RecordKind.PAGES, RecordKind.END) if self._named_missing else ()
        if self._device or self._named_missing:
            return RecordKind.DEVICE, RecordKind.END
        return tuple(RecordKind)

    def _take_pages(self, record: Record, where: str) -> None:
        entry, blob = frame_in(record, where)
        raw = self._unpacker.unpack(entry, blob, where)
        payload = PagePayload.decode(entry, raw, self._known.machine, where)
        if payload.first_literal != self._literal:
            raise CorruptError(f"{where} begins with literal {payload.first_literal}, not {self._literal}")
        if (payload.operations == Operation.XOR).any():
            raise CorruptError(f"{where} holds an XOR, which is not for hand-offs")
        if (payload.numbers[1:] <= payload.numbers[:-1]).any():
            raise CorruptError(f"{where} brings pages that are not in order")
        if self._ended:
            self._check_missing(payload, where)
        self._literals.add(payload.first_literal, payload.literals)
        rows = build(payload, self._known, self._literals, self._room)
        self._sink(PageBatch(payload.space, payload.numbers, rows))
        self._table.put(payload.space, payload.numbers, self._table.digests(rows))
        self._literal += len(payload.literals)
        if self._ended:
            self._missing = np.setdiff1d(self._missing, payload.numbers, assume_unique=True)

    def _check_missing(self, payload: PagePayload, where: str) -> None:
        missing = payload.space is Space.RAM and np.isin(payload.numbers, self._missing, assume_unique=True)
        if not np.all(missing):
            raise CorruptError(f"{where} brings a page that is not missing")

    def _take_missing(self, record: Record, where: str) -> None:
        raw = self._unpacker.unpack(*frame_in(record, where), where)
        self._missing = missing_pages(raw, self._known.machine, where)
        self._named_missing = True

    def _take_same(self, same: Same) -> None:
        """Name pages that are as this end holds them; the machine has others where they came before."""
        space, all_numbers = same.space, same.numbers
        for at in range(0, all_numbers.size, FRAME_PAGES):
            numbers = all_numbers[at : at + FRAME_PAGES]
            rows = self._room[: numbers.size]
            self._known.read_into(space, numbers, rows, np.arange(numbers.size))
            digests = self._table.digests(rows)
            back = self._table.knows(space, numbers) & self._table.changed(space, numbers, digests)
            if back.any():
                self._sink(PageBatch(space, numbers[back], rows[back]))
            self._table.put(space, numbers, digests)

    def _take_round(self, ended: RoundEnd, where: str) -> None:
        if ended.number != self.rounds + 1:
            raise CorruptError(f"{where} ends round {ended.number}, not {self.rounds + 1}")
        self.rounds = ended.number

    def _take_device(self, record: Record, where: str) -> None:
        entry, blob = frame_in(record, where)
        if sum(map(len, self._device)) + entry.raw_size > DEVICE_BYTES:
            raise LimitError(f"{where} brings more device state than the {DEVICE_BYTES} bytes allowed")
        self._device.append(bytes(self._unpacker.unpack(entry, blob, where)))

    def _take_end(self, end: End, where: str) -> Ended:
        if self._ended:
            if self._missing.size:
                raise CorruptError(f"{where} is END, and {self._missing.size} pages have not come")
        elif self._missing.size and any(end.full):
            raise CorruptError(f"{where} has a digest of a whole machine of which pages are missing")
        device_state = b"".join(self._device)
        if self._table.root(self._known.identity, device_state) != end.root:
            raise CorruptError(
                "the copy differs from the machine at the source", hint="it goes on at the source"
            )
        self._named_missing = self._named_missing and not self._ended
        self._ended = True
        return Ended(device_state, end.full, self._missing)
