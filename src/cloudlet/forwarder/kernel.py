"""The system calls that Python 3.11 does not offer: ``unshare`` and ``prctl``."""

import ctypes
import os

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces; ``OSError`` where the kernel refuses."""
    _checked(_libc.unshare(flags))


def set_name(name: str) -> None:
    """Set the short name that ``top`` shows (the kernel keeps 15 bytes)."""
    _checked(_libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0))


def forbid_new_privileges() -> None:
    """From now on no executed file can raise this process's rights."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
