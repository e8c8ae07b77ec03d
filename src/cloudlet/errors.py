"""The one tree of errors: what went wrong, which thing, and what to do next.

An error is raised where its cause is known and is translated into an exit code or an HTTP status at
the edge only. A ``CloudletError`` is meant for the person who runs the command and is shown as one
line; every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

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

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FailedError(CloudletError):
    """The work was tried and did not succeed: a process died, a deadline passed, a disk is full."""


class UsageError(CloudletError):
    """The request itself is wrong: an unknown option, a recipe that does not validate."""

    exit_code = ExitCode.USAGE


class NotFoundError(CloudletError):
    """The named thing is not here: a base, a file, a program."""

    exit_code = ExitCode.NOT_FOUND


class RefusedError(CloudletError):
    """It is known and could be done, but may not: a right is missing, a policy says no."""

    exit_code = ExitCode.REFUSED


class ConflictError(CloudletError):
    """It cannot be done in the present state: a port is taken, a base is in use."""

    exit_code = ExitCode.CONFLICT


class CapacityError(CloudletError):
    """There is no room for it: memory, disk, descriptors."""

    exit_code = ExitCode.NO_CAPACITY


class IntegrityError(CloudletError):
    """Bytes are not what they claim to be. Nothing of them has been used."""

    exit_code = ExitCode.INTEGRITY


class TruncatedError(IntegrityError):
    """The bytes end before they should."""


class CorruptError(IntegrityError):
    """A digest does not match, or a structure is not well formed."""


class LimitError(IntegrityError):
    """A declared or real size is beyond what the format allows."""


class VersionError(IntegrityError):
    """The format is of a later version than this program reads."""


class SignatureError(IntegrityError):
    """Not signed, signed by a key that is not trusted here, or the signature does not match."""


class MismatchError(IntegrityError):
    """Well formed, but made for another base, machine, CPU model or accelerator."""
