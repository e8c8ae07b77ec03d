"""A file that is whole or not there: how overlays and exported bases are written.

Until it is whole the file has no name (``O_TMPFILE``), so that even a program that is killed leaves
nothing of it. Where a file system has no nameless files, it has a hidden name beside its place.
"""

from __future__ import annotations

import errno
import os
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
    name = output.with_name(f".{output.name}.{os.getpid()}.new")
    try:
        with _opened(output.absolute().parent, name) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not name.exists():
                _give_name(file.fileno(), name)
        name.replace(output)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise CapacityError(f"no room for {output}", hint="free space, or write elsewhere") from error
        raise
    finally:
        with suppress(OSError):
            name.unlink()


def _give_name(descriptor: int, name: Path) -> None:
    folder = os.open(name.absolute().parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only with a folder's descriptor does Python follow the link to the nameless file.
        os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _opened(folder: Path, name: Path) -> BinaryIO:
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as error:
        raise NotFoundError(f"the folder {folder} is not there") from error
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
        return name.open("w+b")
    return os.fdopen(descriptor, "w+b")
