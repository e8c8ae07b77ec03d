"""One file for a base, to carry it to another site and know there that it is whole.

Format (``docs/formats/base.md``): magic, length and bytes of the canonical document (name, date,
description), the BLAKE3 digest of all that, then for each file in the order of the document its chunks
that are not all zeros: ``u64 number, u32 size, that many bytes of Zstandard``, ended by the number
2^64-1. The description pins every file by its digest, and its own digest is the base's identity.

The same base is packed to the same bytes each time. So who sends one over a network needs no copy of it: an
:class:`Export` knows where each chunk lies in the file, and packs those that are asked for.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cloudlet.errors import (
    CapacityError,
    CorruptError,
    LimitError,
    NotFoundError,
    TruncatedError,
    UsageError,
)
from cloudlet.output import written
from cloudlet.overlay import canonical
from cloudlet.sparse import CHUNK_BYTES, Progress, SparseDigest, chunk_at, chunks, write_at
from cloudlet.store.bases import FILES, Base, BaseStore, Description, check_name

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"\x89CLB\r\n\x1a\n"
_LENGTH = struct.Struct("<I")
_CHUNK = struct.Struct("<QI")
_END = (1 << 64) - 1
_END_PART = _CHUNK.pack(_END, 0)
_LEVEL = 3
_DIGEST_BYTES = 32
_LONGEST_DOCUMENT = 1 << 20
_LONGEST_CHUNK = CHUNK_BYTES + (64 << 10)
_PARTS = "export-index"
_NO_CHUNK = -1
"""In the place of a chunk's number: the end of a file."""


def export_base(base: Base, output: Path, progress: Progress | None = None) -> int:
    """Write a base to a file; its size in bytes. An error leaves no file."""
    sizes = [base.description.files[name][0] for name in _in_order(base.description)]
    before = [0, *accumulate(sizes)]
    with written(output) as out, _opened(base) as files:
        out.write(_start(base))
        for place, number, part in _parts(files):
            out.write(part)
            if progress and number != _NO_CHUNK:
                progress(before[place] + number * CHUNK_BYTES, before[-1])
    return output.stat().st_size


@dataclass(frozen=True, slots=True)
class Export:
    """The file that :func:`export_base` would write, which is there only as far as somebody reads it."""

    base: Base
    digest: str
    """BLAKE3 of all its bytes, in hexadecimal digits."""
    size: int
    parts: NDArray[np.int64]
    """A row for each part behind the document: which file, which chunk (or none), and where the part ends."""

    @classmethod
    def of(cls, base: Base) -> Export:
        """The export of a base. The first time all of it is packed once, and where its parts are is kept."""
        if kept := cls.kept(base):
            return kept
        start = _start(base)
        digest, end, rows = blake3(start), len(start), array("q")
        with _opened(base) as files:
            for place, number, part in _parts(files):
                digest.update(part)
                end += len(part)
                rows.extend((place, number, end))
        export = cls(base, digest.hexdigest(), end, np.array(rows).reshape(-1, 3))
        with suppress(CapacityError), written(base.path / _PARTS) as out:
            np.savez(out, of=_packing(start), digest=export.digest, parts=export.parts)
        return export

    @classmethod
    def kept(cls, base: Base) -> Export | None:
        """The export of a base that was packed before; None if it was not, or other bytes would come now."""
        try:
            with (base.path / _PARTS).open("rb") as file, np.load(file, allow_pickle=False) as found:
                if str(found["of"]) != _packing(_start(base)):
                    return None
                parts = found["parts"]
                return cls(base, str(found["digest"]), int(parts[-1, 2]), parts)
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            return None

    @contextmanager
    def read(self, start: int, length: int) -> Iterator[Iterator[bytes]]:
        """Some of its bytes, in pieces. In the context the base may be removed: its files are open.

        :raises FileNotFoundError: it has been removed before.
        """
        with _opened(self.base) as files:
            yield self._pieces(files, start, start + length)

    def _pieces(self, files: Sequence[BinaryIO], start: int, end: int) -> Iterator[bytes]:
        head = _start(self.base)
        if start < min(end, len(head)):
            yield head[start:end]
        ends = self.parts[:, 2]
        first = int(np.searchsorted(ends, start, side="right"))
        begin = int(ends[first - 1]) if first else len(head)
        for row in self.parts[first:]:
            place, number, after = row.tolist()
            if begin >= end:
                return
            part = _END_PART
            if number != _NO_CHUNK:
                part = _part(number, chunk_at(files[place].fileno(), number))
            if begin + len(part) != after:
                raise CorruptError(f"base {self.base.name} was changed", hint="import it again")
            yield part[max(0, start - begin) : end - begin]
            begin = after


def import_base(
    store: BaseStore,
    path: Path,
    name: str | None,
    progress: Progress | None = None,
    *,
    rename: bool = True,
) -> Base | None:
    """Take a base from a file that :func:`export_base` wrote; None if the file is something else.

    Whoever wrote it is not trusted: all that its document says is checked before a file is read.

    :param name: what to call it here; None: what it was called there.
    :param rename: whether a base that is here already is called so from now on.
    :raises IntegrityError: it is such a file, but not whole; nothing is kept.
    :raises UsageError: no base may have that name.
    """
    if name is not None:
        check_name(name)
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there") from error
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
        document = _read_document(file)
        description = Description.from_json(document["description"])
        name = name or _name_of(document)
        with store.workspace() as workspace:
            total = sum(size for size, _ in description.files.values())
            done = 0
            for entry in _in_order(description):
                size, digest = description.files[entry]
                _read_file(file, workspace.path / entry, entry, size, digest)
                done += size
                if progress:
                    progress(done, total)
            if file.read(1):
                raise CorruptError(f"{path} goes on after its end")
            if not rename:
                with suppress(NotFoundError):
                    name = store.get(description.identity).name
            base = store.adopt(workspace.path, description, name, document["created"])
    base.index(progress)
    return base


def _start(base: Base) -> bytes:
    """What stands before the first file."""
    document = {"name": base.name, "created": base.created, "description": base.description.to_json()}
    head = canonical.encode(document)
    start = MAGIC + _LENGTH.pack(len(head)) + head
    return start + blake3(start).digest()


def _packing(start: bytes) -> str:
    """What the bytes of an export depend on: the base, what it is called, and the library that packs it."""
    return blake3(start + f"{zstd.zstd_version} {_LEVEL}".encode()).hexdigest()


def _parts(files: Sequence[BinaryIO]) -> Iterator[tuple[int, int, bytes]]:
    """What stands behind the document: for each file its chunks and its end, each with the file's place."""
    for place, file in enumerate(files):
        for number, chunk in chunks(file.fileno()):
            yield place, number, _part(number, chunk)
        yield place, _NO_CHUNK, _END_PART


def _part(number: int, chunk: memoryview) -> bytes:
    packed = zstd.compress(chunk, _LEVEL)
    return _CHUNK.pack(number, len(packed)) + packed


@contextmanager
def _opened(base: Base) -> Iterator[list[BinaryIO]]:
    """The files of a base, in the order of an export."""
    with ExitStack() as stack:
        names = _in_order(base.description)
        yield [stack.enter_context((base.path / name).open("rb")) for name in names]


def _in_order(description: Description) -> list[str]:
    return [name for name in FILES if name in description.files]


def _read_document(file: BinaryIO) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    if length > _LONGEST_DOCUMENT:
        raise LimitError(f"the base's document has {length} bytes, {_LONGEST_DOCUMENT} are allowed")
    head = _exactly(file, length)
    if _exactly(file, _DIGEST_BYTES) != blake3(MAGIC + _LENGTH.pack(length) + head).digest():
        raise CorruptError("the base's document was changed")
    document = canonical.decode(head, "the base's document")
    if not isinstance(document, dict) or set(document) != {"name", "created", "description"}:
        raise CorruptError("the base's document has other members than a base's")
    canonical.time(document["created"], "the base's date")
    return document


def _name_of(document: dict[str, Any]) -> str:
    try:
        return check_name(canonical.line(document["name"], "the base's name"))
    except UsageError as error:
        raise CorruptError(error.message, hint="give it a name with --name") from error


def _read_file(file: BinaryIO, target: Path, name: str, size: int, digest: str) -> None:
    found = SparseDigest(size)
    last = -1
    with target.open("wb") as out:
        out.truncate(size)
        while True:
            number, packed_size = _CHUNK.unpack(_exactly(file, _CHUNK.size))
            if number == _END:
                break
            if not last < number < -(-size // CHUNK_BYTES) or packed_size > _LONGEST_CHUNK:
                raise CorruptError(
                    f"{name} of the base has a chunk {number} of {packed_size} bytes out of place"
                )
            last = number
            chunk = _unpack(_exactly(file, packed_size), min(CHUNK_BYTES, size - number * CHUNK_BYTES), name)
            found.add(number, chunk)
            write_at(out.fileno(), chunk, number * CHUNK_BYTES)
    if found.hex() != digest:
        raise CorruptError(f"{name} of the base does not have the digest that its description says")


def _unpack(packed: bytes, size: int, name: str) -> bytes:
    decompressor = zstd.ZstdDecompressor()
    try:
        chunk = decompressor.decompress(packed, max_length=size + 1)
    except zstd.ZstdError as error:
        raise CorruptError(f"a chunk of {name} cannot be decompressed") from error
    if len(chunk) != size or not decompressor.eof or decompressor.unused_data:
        raise CorruptError(f"a chunk of {name} is not of its size")
    return chunk


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise TruncatedError(f"the base's file ends at byte {file.tell()}, {size - len(data)} bytes early")
    return data
