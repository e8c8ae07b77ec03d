"""A file that is whole or not there: how overlays and exported bases are written.

Until it is whole the file has no name (``O_TMPFILE``), so that even a program that is killed leaves
nothing of it. Where a file system has no nameless files, it has a hidden name beside its place.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cloudlet.errors import CapacityError, NotFoundError, UsageError

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def written(output: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``output`` when the context is left without an error.

    :raises NotFoundError: its folder is not there.
    :raises UsageError: a folder is in its place.
    :raises CapacityError: there is no room for it.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint="name a file")
    # A name that nobody can have put there before.
    name = output.with_name(f".{output.name[:200]}.{secrets.token_hex(8)}.new")
    try:
        file, nameless = _opened(output.absolute().parent, name)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if nameless:
                    _give_name(file.fileno(), name)
            name.replace(output)
        finally:
            with suppress(OSError):
                name.unlink()
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise CapacityError(f"no room for {output}", hint="free space, or write elsewhere") from error
        raise


def _give_name(descriptor: int, name: Path) -> None:
    folder = os.open(name.absolute().parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only with a folder's descriptor does Python follow the link to the nameless file.
        os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _opened(folder: Path, name: Path) -> tuple[BinaryIO, bool]:
    """A new file, and whether it is still without a name."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as error:
        raise NotFoundError(f"the folder {folder} is not there") from error
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(name, flags, 0o666), "w+b"), False
    return os.fdopen(descriptor, "w+b"), True
