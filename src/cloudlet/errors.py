"""The one tree of errors: what went wrong, which thing, and what to do next.

An error is raised where its cause is known and is translated into an exit code or an HTTP status at
the edge only. A ``CloudletError`` is meant for the person who runs the command and is shown as one
line; every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; their meaning never changes."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    CONFLICT = 5
    NO_CAPACITY = 6
    INTEGRITY = 7
    INTERRUPTED = 130


class CloudletError(Exception):
    """An error with a message for the user and, where there is one, a hint what to do about it."""

    exit_code = ExitCode.FAILED
    usual_hint = ""
    """What to do where who raises knows nothing better."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """An error.

        :param hint: None: the usual one; empty: none, as the message says all of it.
        """
        super().__init__(message)
        self.message = message
        self.hint = self.usual_hint if hint is None else hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FailedError(CloudletError):
    """The work was tried and did not succeed: a process died, a deadline passed, a disk is full."""


class UnreachableError(FailedError):
    """What the request names elsewhere does not answer."""

    usual_hint = "check the address"


class UsageError(CloudletError):
    """The request itself is wrong: an unknown option, a recipe that does not validate."""

    exit_code = ExitCode.USAGE


class ImpossibleError(UsageError):
    """The request is well formed, and what it wants cannot be: two things together, a forbidden address."""


class NotFoundError(CloudletError):
    """The named thing is not here: a base, a file, a program."""

    exit_code = ExitCode.NOT_FOUND


class RefusedError(CloudletError):
    """It is known and could be done, but may not: a right is missing, a policy says no."""

    exit_code = ExitCode.REFUSED


class CreditError(RefusedError):
    """It costs more than is left. Amounts are in millionths of the currency's unit."""

    usual_hint = "redeem a voucher, or have the invoice's limit raised"

    def __init__(
        self,
        message: str,
        *,
        available: int = 0,
        wanted: int = 0,
        currency: str = "",
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.available = available
        self.wanted = wanted
        self.currency = currency


class ConflictError(CloudletError):
    """It cannot be done in the present state: a port is taken, a base is in use."""

    exit_code = ExitCode.CONFLICT


class UnconfirmedError(ConflictError):
    """A key is shown that nobody has confirmed yet: a person has to compare its fingerprint."""

    def __init__(self, message: str, *, fingerprint: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.fingerprint = fingerprint
        """Of the key, as hexadecimal digits."""


class CapacityError(CloudletError):
    """There is no room for it: memory, disk, descriptors."""

    exit_code = ExitCode.NO_CAPACITY


class DrainingError(CapacityError):
    """The site is being emptied: what it has goes on, but nothing new begins."""

    usual_hint = "start it at another site, or try again later"


class TooLargeError(CapacityError):
    """It is larger than it may be, or than what is left of what its owner may have."""


class IntegrityError(CloudletError):
    """Bytes are not what they claim to be. Nothing of them has been used."""

    exit_code = ExitCode.INTEGRITY
    usual_hint = "get it again from where it was made"


class TruncatedError(IntegrityError):
    """The bytes end before they should."""


class CorruptError(IntegrityError):
    """A digest does not match, or a structure is not well formed."""


class LimitError(IntegrityError):
    """A declared or real size is beyond what the format allows."""


class VersionError(IntegrityError):
    """The format is of another version than this program reads."""

    usual_hint = "use a newer Cloudlet, or ask for it in this version"


class SignatureError(IntegrityError):
    """Not signed, signed by a key that is not trusted here, or the signature does not match."""


class MismatchError(IntegrityError):
    """Well formed, but made for another base, machine, CPU model or accelerator."""

    usual_hint = "ask the publisher for one that is made for this base"


_MEANINGS: dict[int | None, tuple[type[CloudletError], str]] = {
    errno.ENOSPC: (CapacityError, "free space there, or set --state-dir or --cache-dir"),
    errno.EDQUOT: (CapacityError, "free space there, or set --state-dir or --cache-dir"),
    errno.EFBIG: (CapacityError, "raise the limit for the size of files"),
    errno.EMFILE: (CapacityError, "raise the limit: ulimit -n"),
    errno.ENFILE: (CapacityError, "raise the limit: sysctl fs.file-max"),
    errno.EAGAIN: (CapacityError, "raise the limit of processes: ulimit -u"),
    errno.ENOMEM: (CapacityError, "free memory"),
    errno.EACCES: (RefusedError, "give this user the right, or name another place"),
    errno.EPERM: (RefusedError, "give this user the right, or name another place"),
    errno.EROFS: (RefusedError, "name another place"),
    errno.ENOENT: (NotFoundError, "check the name; a program may have to be installed"),
    errno.ENOTDIR: (NotFoundError, "check the name"),
    errno.EISDIR: (UsageError, "name a file"),
    errno.ENAMETOOLONG: (UsageError, "use a shorter name"),
    errno.EEXIST: (ConflictError, "remove it, or name another place"),
}


def of_the_system(error: OSError | MemoryError) -> CloudletError:
    """What the kernel refused, as an error for the user; for where nobody knew more of it."""
    if isinstance(error, MemoryError):
        return CapacityError("there is not enough memory", hint="free memory")
    kind, hint = _MEANINGS.get(error.errno, (FailedError, None))
    said = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    return kind(f"{where}{said[0].lower()}{said[1:]}", hint=hint)
