"""Frames and their table: what is known of a frame before it comes, and how it is packed.

A :class:`FrameEntry` pins one frame: its kind, sizes and digest. Entries of the first frames
stand in the root; the others stand in index chunks, each of which a :class:`ChunkEntry` of the
root pins.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

import numpy as np
from blake3 import blake3

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from cloudlet.errors import CorruptError, LimitError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay import canonical
from cloudlet.overlay.limits import CHUNK_FRAMES, FRAME_BYTES, FRAME_PAGES
from cloudlet.overlay.pages import Space

ENTRY_BYTES = 48
PAYLOAD_HEAD_BYTES = 8
"""First literal and number of references, at the start of a frame of pages."""

_LAYOUT = struct.Struct("<BBHIIHH32s")
_PIECE_BYTES = 32 << 10  # One block of the library's output buffer: no joining of several.
_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): FRAME_BYTES.bit_length() - 1}


class FrameKind(IntEnum):
    """What a frame brings."""

    MAP = 1
    DEVICE = 2
    RAM = 3
    DISK = 4

    @property
    def is_pages(self) -> bool:
        return self >= FrameKind.RAM

    @property
    def space(self) -> Space:
        """The space of a frame of pages."""
        return Space(self)


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """One frame: bytes in the file, bytes decompressed, pages it brings, literals among them."""

    kind: FrameKind
    size: int
    raw_size: int
    pages: int
    literals: int
    digest: bytes

    @property
    def references(self) -> int:
        """References in a frame of pages: what its other sizes leave room for."""
        return (self.raw_size - PAYLOAD_HEAD_BYTES - 5 * self.pages - PAGE_BYTES * self.literals) // 4

    def to_json(self) -> list[Any]:
        return [
            int(self.kind),
            self.size,
            self.raw_size,
            self.pages,
            self.literals,
            self.digest.hex(),
        ]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        kind, size, raw_size, pages, literals, digest = canonical.row(value, where, 6)
        return cls._checked(
            canonical.integer(kind, where),
            canonical.integer(size, where),
            canonical.integer(raw_size, where),
            canonical.integer(pages, where),
            canonical.integer(literals, where),
            canonical.digest(digest, where),
            where,
        )

    def pack(self) -> bytes:
        return _LAYOUT.pack(self.kind, 0, self.pages, self.size, self.raw_size, self.literals, 0, self.digest)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        kind, zero, pages, size, raw_size, literals, zero_too, digest = _LAYOUT.unpack(data)
        if zero or zero_too:
            raise CorruptError(f"{where}: a reserved field of its entry is not 0")
        return cls._checked(kind, size, raw_size, pages, literals, digest, where)

    @classmethod
    def _checked(
        cls,
        kind: int,
        size: int,
        raw_size: int,
        pages: int,
        literals: int,
        digest: bytes,
        where: str,
    ) -> Self:
        if kind not in tuple(FrameKind):
            raise CorruptError(f"{where} is of an unknown kind {kind}")
        entry = cls(FrameKind(kind), size, raw_size, pages, literals, digest)
        if not (0 < size <= FRAME_BYTES and 0 < raw_size <= FRAME_BYTES):
            raise LimitError(
                f"{where} has {size} bytes in the file and {raw_size} decompressed; "
                f"1 to {FRAME_BYTES} are allowed"
            )
        if not entry.kind.is_pages:
            if pages or literals:
                raise CorruptError(f"{where} is of kind {entry.kind.name} and declares pages")
        elif not 0 < pages <= FRAME_PAGES:
            raise LimitError(f"{where} declares {pages} pages; 1 to {FRAME_PAGES} are allowed")
        elif (
            literals > pages
            or not 0 <= entry.references <= pages - literals
            or raw_size != payload_bytes(pages, entry.references, literals)
        ):
            raise CorruptError(f"{where} declares sizes that do not fit each other")
        return entry


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One index chunk as the root pins it: its frames, and their bytes, pages and literals in all.

    The sums make every chunk's place computable from the root alone.
    """

    frames: int
    size: int
    pages: int
    literals: int
    digest: bytes

    @property
    def table_bytes(self) -> int:
        """Size of the chunk itself, before its frames."""
        return self.frames * ENTRY_BYTES

    def to_json(self) -> list[Any]:
        return [self.frames, self.size, self.pages, self.literals, self.digest.hex()]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        frames, size, pages, literals, digest = canonical.row(value, where, 5)
        if not 0 < canonical.integer(frames, where) <= CHUNK_FRAMES:
            raise LimitError(f"{where} declares {frames} frames; 1 to {CHUNK_FRAMES} are allowed")
        if not frames <= canonical.integer(pages, where) <= frames * FRAME_PAGES:
            raise LimitError(f"{where} declares {pages} pages in {frames} frames")
        canonical.integer(literals, where, high=pages)
        canonical.integer(size, where, low=frames, high=frames * FRAME_BYTES)
        return cls(frames, size, pages, literals, canonical.digest(digest, where))


def pack_chunk(entries: Sequence[FrameEntry]) -> tuple[ChunkEntry, bytes]:
    """An index chunk, and the entry by which the root pins it."""
    table = b"".join(entry.pack() for entry in entries)
    sums = (
        sum(e.size for e in entries),
        sum(e.pages for e in entries),
        sum(e.literals for e in entries),
    )
    return ChunkEntry(len(entries), *sums, blake3(table).digest()), table


def unpack_chunk(chunk: ChunkEntry, table: bytes, first_frame: int, where: str) -> tuple[FrameEntry, ...]:
    """The entries of an index chunk whose first frame has the number ``first_frame``.

    :raises CorruptError: not the bytes that the root pins, or entries that break the format.
    """
    if len(table) != chunk.table_bytes or blake3(table).digest() != chunk.digest:
        raise CorruptError(f"{where} does not have the digest of the root")
    entries = tuple(
        FrameEntry.unpack(table[at * ENTRY_BYTES : (at + 1) * ENTRY_BYTES], f"frame {first_frame + at}")
        for at in range(chunk.frames)
    )
    if any(not entry.kind.is_pages for entry in entries):
        raise CorruptError(f"{where} holds a frame that brings no pages")
    if pack_chunk(entries)[0] != chunk:
        raise CorruptError(f"{where} does not add up to what the root declares")
    return entries


def payload_bytes(pages: int, references: int, literals: int) -> int:
    """Size of a decompressed frame of pages."""
    return PAYLOAD_HEAD_BYTES + 5 * pages + 4 * references + PAGE_BYTES * literals


class Packer:
    """Compresses frames, one Zstandard context for all of them."""

    def __init__(self, level: int) -> None:
        self._compressor = zstd.ZstdCompressor(level=level)

    def pack(
        self, kind: FrameKind, raw: bytes | memoryview, pages: int = 0, literals: int = 0
    ) -> tuple[FrameEntry, bytes]:
        blob = self._compressor.compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)
        return FrameEntry(kind, len(blob), len(raw), pages, literals, blake3(blob).digest()), blob


def compressed_size(pieces: Iterable[memoryview], level: int = 3) -> int:
    """What pieces would take as one long stream: the measure that the format is held against."""
    compressor = zstd.ZstdCompressor(level=level)
    return sum(len(compressor.compress(piece)) for piece in pieces) + len(compressor.flush())


def check_frame(entry: FrameEntry, blob: bytes, where: str) -> None:
    """:raises CorruptError: these are not the bytes that the entry pins."""
    if len(blob) != entry.size or blake3(blob).digest() != entry.digest:
        raise CorruptError(f"{where} does not have the digest of its entry")


class Unpacker:
    """Decompresses frames that :func:`check_frame` has passed, each into the same buffer.

    A fresh 2 MiB for every frame would cost three times the decompression in page faults (measured).
    """

    def __init__(self) -> None:
        self._room = np.empty(FRAME_BYTES, np.uint8).data

    def unpack(self, entry: FrameEntry, blob: bytes, where: str) -> memoryview:
        """The decompressed bytes, lent until the next call; never more than the declared size.

        :raises CorruptError: not one Zstandard frame of exactly that size.
        """
        done = 0
        try:
            sound = zstd.get_frame_info(blob).decompressed_size == entry.raw_size
            decompressor = zstd.ZstdDecompressor(options=_OPTIONS)
            while sound and done < entry.raw_size:
                most = min(_PIECE_BYTES, entry.raw_size - done)
                piece = decompressor.decompress(b"" if done else blob, most)
                sound = len(piece) > 0
                self._room[done : done + len(piece)] = piece
                done += len(piece)
            if sound and not decompressor.eof:
                sound = not decompressor.decompress(b"", 1)
        except (zstd.ZstdError, EOFError, MemoryError) as error:
            raise CorruptError(f"{where} does not decompress: {error}") from error
        if not (sound and decompressor.eof) or decompressor.unused_data:
            raise CorruptError(f"{where} does not decompress to the {entry.raw_size} bytes declared")
        return self._room[:done]
