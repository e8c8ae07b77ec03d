"""Reading an overlay from a stream: header, root and signature at once, then its parts in file
order.

Nothing is handed out that has not passed its digest, and the memory used is one part and one index
chunk. The stream needs only ``read(n)``; short reads are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cloudlet.errors import CorruptError, SignatureError, TruncatedError
from cloudlet.overlay.frames import ChunkEntry, FrameEntry, check_frame, unpack_chunk
from cloudlet.overlay.header import HEADER_BYTES, KEY_ID_BYTES, SIGNATURE_BYTES, Header
from cloudlet.overlay.root import Root

Verify = Callable[[bytes, bytes, bytes], str]
"""``verify(key_id, message, signature)``: the key's name, or a :class:`SignatureError`."""

Progress = Callable[[int, int], None]
"""``progress(done, total)``; raising from it is how a caller cancels."""


class ReadStream(Protocol):
    """What a reader needs of a stream: up to ``size`` bytes, none at the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it came: verified, not yet decompressed."""

    number: int
    entry: FrameEntry
    blob: bytes

    @property
    def where(self) -> str:
        return f"frame {self.number}"


@dataclass(frozen=True, slots=True)
class Chunk:
    """An index chunk as it came, verified."""

    number: int
    entry: ChunkEntry
    blob: bytes


class OverlayReader:
    """An overlay whose header, root and signature have been read and verified.

    With ``allow_unsigned`` a file without a signature is accepted, and one that has a signature
    is accepted unseen when there is no ``verify``. A signature that ``verify`` refuses is never
    accepted.
    """

    def __init__(
        self, stream: ReadStream, verify: Verify | None = None, *, allow_unsigned: bool = False
    ) -> None:
        """Read up to the first part.

        :raises IntegrityError: truncated, corrupt, beyond the limits, of another version, not
            signed by a key that ``verify`` knows.
        """
        self._stream = stream
        self._offset = 0
        self._begun = False
        self.header = Header.decode(self._read(HEADER_BYTES, "the header"))
        self.root_bytes = self._read(self.header.root_bytes, "the root")
        self.header.check_root(self.root_bytes)
        self.signature = self._read(self.header.signatures * SIGNATURE_BYTES, "the signature")
        self.signed_by = self._verified(verify, allow_unsigned)
        self.root = Root.decode(self.root_bytes)
        expected = self.header.parts_start + self.root.parts_bytes
        if self.header.file_bytes != expected:
            raise CorruptError(
                f"the header declares {self.header.file_bytes} bytes, the parts add up to {expected}"
            )

    @property
    def identity(self) -> str:
        """The overlay's name, in hex."""
        return self.header.identity(self.root_bytes)

    @property
    def offset(self) -> int:
        """Bytes read so far; all of them verified between two parts."""
        return self._offset

    def parts(self) -> Iterator[Frame | Chunk]:
        """All frames and index chunks in file order, and that nothing follows. Once only.

        :raises IntegrityError: truncated or corrupt; what was yielded before stands.
        """
        if self._begun:
            raise ValueError("the parts of a stream can be read only once")
        self._begun = True
        number = 0
        for entry in self.root.listed_frames:
            yield self._frame(number, entry)
            number += 1
        for at, chunk in enumerate(self.root.chunks):
            where = f"index chunk {at} (offset {self._offset})"
            table = self._read(chunk.table_bytes, where)
            entries = unpack_chunk(chunk, table, number, where)
            yield Chunk(at, chunk, table)
            for entry in entries:
                yield self._frame(number, entry)
                number += 1
        if self._stream.read(1):
            raise CorruptError(f"the file goes on after its end at offset {self._offset}")

    def _frame(self, number: int, entry: FrameEntry) -> Frame:
        where = f"frame {number} (offset {self._offset})"
        blob = self._read(entry.size, where)
        check_frame(entry, blob, where)
        return Frame(number, entry, blob)

    def _verified(self, verify: Verify | None, allow_unsigned: bool) -> str | None:
        if not self.signature:
            if allow_unsigned:
                return None
            raise SignatureError("the overlay is not signed", hint="--allow-unsigned runs it all the same")
        if verify is None:
            if allow_unsigned:
                return None
            raise SignatureError("the overlay is signed, but there are no keys to verify it with")
        key_id, signature = self.signature[:KEY_ID_BYTES], self.signature[KEY_ID_BYTES:]
        return verify(key_id, self.header.message(self.root_bytes), signature)

    def _read(self, size: int, what: str) -> bytes:
        """Exactly so many bytes. Parts are at most 4 MiB, so this is the most that is held."""
        data = self._stream.read(size) if size else b""
        if len(data) < size:
            pieces = [data]
            missing = size - len(data)
            while missing and pieces[-1]:
                pieces.append(self._stream.read(missing))
                missing -= len(pieces[-1])
            if missing:
                at = self._offset + size - missing
                raise TruncatedError(
                    f"the file ends at offset {at}, {missing} bytes before the end of {what}"
                )
            data = b"".join(pieces)
        self._offset += size
        return data
