"""Files to and from a site; a transfer that is cut goes on where it was.

The site says with HEAD how much of an upload it has. A download is collected beside its place, in a hidden
file that bears the digest, and gets its name when all of it has that digest: so the next try, also of another
process, goes on, and a file of that name is whole.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import requests
from blake3 import blake3
from keystoneauth1.adapter import Adapter

from cloudlet.client.faults import LostError, translated
from cloudlet.errors import ConflictError, CorruptError, TruncatedError

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and all there are."""

_PIECE = 256 << 10
_DOWN = 64 << 10
"""Of a download: a piece that is cut is lost."""
_PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds before each further try that brought nothing; a site needs ten to see that a client has gone."""
_VERIFYING = (10.0, 1800.0)
"""Seconds to connect, and for the answer: to the last byte it comes when all bytes have been verified, and of
what the site packs when it has done that."""


def digest_of(file: Path, progress: Progress | None = None) -> str:
    """BLAKE3 of a file, in hexadecimal digits: how a site names the bytes of an overlay."""
    digest, size, done = blake3(), file.stat().st_size, 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            if progress:
                progress(done, size)
    return digest.hexdigest()


def upload(
    site: Adapter, url: str, file: Path, whole: Callable[[], bool], progress: Progress | None = None
) -> requests.Response | None:
    """Send a file, from where the site has it on; the answer to its last byte; None if it had that.

    :param whole: asks the site whether it has all of it.
    :raises ConflictError: the site has more than the file, or takes no bytes.
    :raises LostError: the connection was cut again and again, and nothing more arrived.
    """
    here, patience = _received(site, url), _Patience()
    while True:
        try:
            if here == file.stat().st_size and whole():
                return None
            return _send(site, url, file, here, progress)
        except (LostError, TruncatedError, ConflictError) as error:
            if whole():
                return None
            # A site may believe for a while that a connection is still there which was cut; not at first.
            if isinstance(error, ConflictError) and not patience.tried:
                raise
            if not patience.again():
                raise
            before, here = here, _received(site, url)
            patience.moved(here > before)


def described(site: Adapter, url: str) -> tuple[str, int]:
    """The BLAKE3 digest and the size of a file that a site packs as it sends it."""
    headers = {"Accept": "*/*", "Range": "bytes=0-0"}
    answer = site.get(url, headers=headers, timeout=_VERIFYING)
    return answer.headers["ETag"].strip('"'), int(answer.headers["Content-Range"].rpartition("/")[2])


def download(
    site: Adapter, url: str, target: Path, digest: str, size: int, progress: Progress | None = None
) -> None:
    """Fetch a file of this BLAKE3 digest and size to a place, on from where an earlier try ended.

    :raises CorruptError: what came has another digest; nothing of it is kept.
    :raises ConflictError: another process fetches it to the same place.
    :raises LostError: the connection was cut again and again, and nothing more arrived; what came is kept.
    """
    part = target.with_name(f".{target.name[:200]}.{digest[:16]}.part")
    with part.open("a+b") as out, _alone(out, target):
        found, patience = _Collected(out, size, progress), _Patience()
        while found.done < size:
            before = found.done
            try:
                _fetch(site, url, digest, found)
            except LostError:
                patience.moved(found.done > before)
                if not patience.again():
                    raise
        if found.digest != digest:
            part.unlink()
            raise CorruptError(f"what came for {target} is not what the site says that it is")
        part.replace(target)


class _Patience:
    """So many tries that bring nothing, with longer and longer pauses before them."""

    def __init__(self) -> None:
        self.tried = False
        self._pauses = iter(_PAUSES)

    def moved(self, something: bool) -> None:
        """Say whether the last try moved anything: then one may fail as often again."""
        if something:
            self._pauses = iter(_PAUSES)

    def again(self) -> bool:
        """Whether to try again; after the pause."""
        self.tried = True
        if (pause := next(self._pauses, None)) is None:
            return False
        time.sleep(pause)
        return True


class _Body:
    """The rest of a file, in pieces; it knows its length, which the site wants to be told first."""

    def __init__(self, stream: BinaryIO, size: int, progress: Progress | None) -> None:
        self._stream = stream
        self._size = size
        self._begin = stream.tell()
        self._progress = progress

    def __len__(self) -> int:
        return self._size - self._begin

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._stream.read(min(_PIECE, self._size - self._stream.tell())):
            yield piece
            if self._progress:
                self._progress(self._stream.tell(), self._size)


class _Collected:
    """What has come of a download, and its digest so far."""

    def __init__(self, out: BinaryIO, size: int, progress: Progress | None) -> None:
        self._out = out
        self._size = size
        self._progress = progress
        self._digest = blake3()
        self.done = 0
        out.seek(0)
        while piece := out.read(_PIECE):
            self._note(piece)

    @property
    def digest(self) -> str:
        self._out.flush()
        return self._digest.hexdigest()

    def add(self, piece: bytes) -> None:
        self._out.write(piece)
        self._note(piece)
        if self._progress:
            self._progress(self.done, self._size)

    def _note(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.done += len(piece)


def _received(site: Adapter, url: str) -> int:
    return int(site.head(url).headers["Upload-Offset"])


def _send(site: Adapter, url: str, file: Path, here: int, progress: Progress | None) -> requests.Response:
    size = file.stat().st_size
    if here > size:
        raise ConflictError(f"{here} bytes are there, {file} has {size}", hint="it is another file's upload")
    headers = {"Upload-Offset": str(here), "Content-Type": "application/octet-stream"}
    with file.open("rb") as stream:
        stream.seek(here)
        # A body of no length would be sent as one of unknown length.
        body = _Body(stream, size, progress) if here < size else b""
        return site.put(url, data=body, headers=headers, timeout=_VERIFYING)


def _fetch(site: Adapter, url: str, digest: str, found: _Collected) -> None:
    headers = {"Accept": "*/*"}
    if found.done:
        headers |= {"Range": f"bytes={found.done}-", "If-Range": f'"{digest}"'}
    with translated(), closing(site.get(url, headers=headers, stream=True)) as answer:
        if found.done and answer.status_code != 206:
            raise CorruptError("the site has other bytes now", hint="download it anew")
        for piece in answer.iter_content(_DOWN):
            found.add(piece)


@contextmanager
def _alone(out: BinaryIO, target: Path) -> Iterator[None]:
    try:
        fcntl.flock(out.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(f"{target} is being downloaded", hint="wait, or name another file") from error
    yield
