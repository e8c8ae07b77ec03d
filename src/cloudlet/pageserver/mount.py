"""Mounts that are one file and are in no mount table; the owner makes them, which takes root.

Source: ``fsopen(2)``, ``fsconfig(2)``, ``fsmount(2)``, Linux 5.2. A mount that is not attached to a
folder lives as long as a descriptor or an open file of it: whatever dies in whatever way, nothing is
left mounted.
"""

import ctypes
import os

DEVICE = "/dev/fuse"
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_OPTIONS = {"source": "cloudlet", "rootmode": "100444", "user_id": "0", "group_id": "0"}

_libc = ctypes.CDLL(None, use_errno=True)


def open_device() -> int:
    """A new descriptor of ``/dev/fuse``, which becomes a connection when it is mounted."""
    return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def mount(device: int) -> int:
    """A mount whose root is a regular file; ``device`` is its other end. Returns an O_PATH descriptor.

    Open ``/proc/self/fd/N`` for the file; this waits until the other end has answered.
    """
    context = _open()
    try:
        for key, value in {**_OPTIONS, "fd": str(device)}.items():
            _call(_FSCONFIG, context, _SET_STRING, key.encode(), value.encode(), 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"allow_other", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC)
    finally:
        os.close(context)


def _open() -> int:
    return _call(_FSOPEN, b"fuse", _CLOEXEC)


def _call(*arguments: int | bytes | None) -> int:
    result = int(_libc.syscall(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
