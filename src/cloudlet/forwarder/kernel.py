"""What Python 3.11 does not offer of the kernel: ``unshare``, ``prctl`` and tap devices."""

import ctypes
import fcntl
import os
import struct

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # from linux/if_tun.h

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


def open_tap(name: str) -> int:
    """Make a tap device and return its descriptor, with which it goes; ``OSError`` if it is there."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError:
        os.close(tap)
        raise
    return tap
