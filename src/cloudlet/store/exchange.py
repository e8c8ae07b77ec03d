"""One file for a base, to carry it to another site and know there that it is whole.

Format (``docs/formats/base.md``): magic, length and bytes of the canonical document (name, date,
description), the BLAKE3 digest of all that, then for each file in the order of the document its chunks
that are not all zeros: ``u64 number, u32 size, that many bytes of Zstandard``, ended by the number
2^64-1. The description pins every file by its digest, and its own digest is the base's identity.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from cloudlet.errors import CorruptError, LimitError, NotFoundError, TruncatedError, UsageError
from cloudlet.output import written
from cloudlet.overlay import canonical
from cloudlet.sparse import CHUNK_BYTES, Progress, SparseDigest, chunks, write_at
from cloudlet.store.bases import FILES, Base, BaseStore, Description, check_name

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"\x89CLB\r\n\x1a\n"
_LENGTH = struct.Struct("<I")
_CHUNK = struct.Struct("<QI")
_END = (1 << 64) - 1
_DIGEST_BYTES = 32
_LONGEST_DOCUMENT = 1 << 20
_LONGEST_CHUNK = CHUNK_BYTES + (64 << 10)


def export_base(base: Base, output: Path, progress: Progress | None = None) -> int:
    """Write a base to a file; its size in bytes. An error leaves no file."""
    document = {"name": base.name, "created": base.created, "description": base.description.to_json()}
    head = canonical.encode(document)
    total = sum(size for size, _ in base.description.files.values())
    done = 0
    with written(output) as out:
        start = MAGIC + _LENGTH.pack(len(head)) + head
        out.write(start + blake3(start).digest())
        for name in _in_order(base.description):
            with (base.path / name).open("rb") as file:
                for number, chunk in chunks(file.fileno()):
                    packed = zstd.compress(chunk, 3)
                    out.write(_CHUNK.pack(number, len(packed)) + packed)
                    if progress:
                        progress(done + number * CHUNK_BYTES, total)
                done += base.description.files[name][0]
            out.write(_CHUNK.pack(_END, 0))
    return output.stat().st_size


def import_base(
    store: BaseStore, path: Path, name: str | None, progress: Progress | None = None
) -> Base | None:
    """Take a base from a file that :func:`export_base` wrote; None if the file is something else.

    Whoever wrote it is not trusted: all that its document says is checked before a file is read.

    :param name: what to call it here; None: what it was called there.
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
            base = store.adopt(workspace.path, description, name, document["created"])
    base.index(progress)
    return base


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
