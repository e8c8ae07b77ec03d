"""Rights given up by system calls that Python 3.11 does not offer: ``unshare`` and ``prctl``."""

import ctypes
import os

_CLONE_NEWIPC, _CLONE_NEWNET = 0x08000000, 0x40000000
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 15, 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


def set_name(name: str) -> None:
    """Set the short name that ``top`` shows (the kernel keeps 15 bytes)."""
    _checked(_libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0))


def give_up_rights(uid: int) -> None:
    """Become user and group ``uid``, in an empty network; -1 stays who it is.

    In either case no executed file can raise this process's rights, and no other process of its user
    can look into it or stop it as a debugger.
    """
    if uid >= 0:
        _checked(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC))
        capability = 0
        while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1  # up to the last that this kernel knows
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
