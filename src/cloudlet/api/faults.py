"""Errors on the wire: which status and code each kind of error has. Codes are never used again for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlet import errors
from cloudlet.errors import CloudletError, RefusedError, UsageError


class UnauthenticatedError(RefusedError):
    """Who calls has not shown who they are."""

    usual_hint = "send credentials"


class ClockError(UnauthenticatedError):
    """The token of another cloudlet is of a time that is not this site's; ``Date`` says which that is."""


class NotAcceptableError(UsageError):
    """The version or the form that is asked for is not there."""


class BusyError(errors.CapacityError):
    """Too many do this at the moment."""

    usual_hint = "try again in a few seconds"


class ChangedError(errors.ConflictError):
    """It is not any more what ``If-Match`` says."""

    usual_hint = "get it again, and look whether you still want this"


class RangeError(UsageError):
    """Of a file of ``size`` bytes there is no such part."""

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class MethodError(UsageError):
    """The path is known, the method is not."""


class PathError(errors.NotFoundError):
    """There is no such path."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a kind of error is on the wire."""

    status: int
    reason: str
    """The last part of its code."""
    title: str
    retry_after: int | None = None
    """Seconds."""


FAULTS: Mapping[type[CloudletError], Fault] = {
    UnauthenticatedError: Fault(401, "unauthenticated", "Not authenticated"),
    ClockError: Fault(401, "clock", "The clocks differ"),
    NotAcceptableError: Fault(406, "not_acceptable", "No such version"),
    BusyError: Fault(503, "busy", "Too many at once", 5),
    errors.ImpossibleError: Fault(422, "impossible", "It cannot be so"),
    RangeError: Fault(416, "range", "There is no such range"),
    ChangedError: Fault(412, "changed", "It has changed"),
    MethodError: Fault(405, "method", "The method is not allowed"),
    PathError: Fault(404, "no_such_path", "There is no such path"),
    errors.DrainingError: Fault(503, "draining", "The site is being emptied", 60),
    errors.TooLargeError: Fault(413, "too_large", "Too large"),
    errors.TruncatedError: Fault(422, "truncated", "Bytes are missing"),
    errors.CorruptError: Fault(422, "corrupt", "Bytes are not what they claim to be"),
    errors.LimitError: Fault(422, "limit", "Beyond what the format allows"),
    errors.VersionError: Fault(422, "version", "Of another version"),
    errors.SignatureError: Fault(422, "signature", "Not signed by a trusted key"),
    errors.MismatchError: Fault(422, "mismatch", "Made for another base or machine"),
    errors.IntegrityError: Fault(422, "integrity", "Bytes are not what they claim to be"),
    errors.UnconfirmedError: Fault(409, "unconfirmed", "Nobody has confirmed the key"),
    errors.UnreachableError: Fault(422, "unreachable", "It does not answer"),
    errors.UsageError: Fault(400, "invalid", "The request is wrong"),
    errors.NotFoundError: Fault(404, "not_found", "It is not here"),
    errors.RefusedError: Fault(403, "refused", "It may not be done"),
    errors.ConflictError: Fault(409, "conflict", "Not in the present state"),
    errors.CapacityError: Fault(503, "no_capacity", "There is no room", 30),
    errors.FailedError: Fault(503, "failed", "It did not succeed", 10),
}
DEFECT = Fault(500, "defect", "A defect of the service")


def fault_of(error: Exception) -> Fault:
    """What an error is on the wire; one of no known kind is a defect."""
    for kind in type(error).__mro__:
        if kind in FAULTS:
            return FAULTS[kind]
    return DEFECT


def described(kind: str) -> Fault:
    """What the error of this class name is on the wire; for errors that were written down."""
    return next((fault for known, fault in FAULTS.items() if known.__name__ == kind), DEFECT)


def body(error: Exception, noun: str, request_id: str) -> dict[str, Any]:
    """The body of an answer that is an error."""
    fault = fault_of(error)
    known = isinstance(error, CloudletError)
    described = {
        "request_id": request_id,
        "code": f"cloudlet.{noun}.{fault.reason}",
        "status": fault.status,
        "title": fault.title,
        "detail": str(error) if known else "this is a defect: please report it with the request's id",
        "links": [],
    }
    if isinstance(error, errors.UnconfirmedError):
        described["fingerprint"] = error.fingerprint
    return {"errors": [described]}
