"""Errors on the wire, as a client raises them: an error of ours for each answer that is one.

The last part of an error's code says what kind it is; where that is not known, the status does.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import requests
from keystoneauth1 import exceptions as keystone
from openstack import exceptions as sdk

from cloudlet import errors
from cloudlet.errors import CloudletError, FailedError, RefusedError, UnconfirmedError, UsageError


class LostError(FailedError):
    """Nobody answered, or the connection ended before the answer did."""


class CancelledError(FailedError):
    """Somebody has cancelled the operation that was waited for."""


REASONS: Mapping[str, type[CloudletError]] = {
    "unauthenticated": RefusedError,
    "clock": RefusedError,
    "refused": RefusedError,
    "not_found": errors.NotFoundError,
    "no_such_path": errors.NotFoundError,
    "conflict": errors.ConflictError,
    "changed": errors.ConflictError,
    "unconfirmed": UnconfirmedError,
    "invalid": UsageError,
    "not_acceptable": UsageError,
    "range": UsageError,
    "method": UsageError,
    "no_capacity": errors.CapacityError,
    "draining": errors.DrainingError,
    "busy": errors.CapacityError,
    "too_large": errors.TooLargeError,
    "truncated": errors.TruncatedError,
    "corrupt": errors.CorruptError,
    "limit": errors.LimitError,
    "version": errors.VersionError,
    "signature": errors.SignatureError,
    "mismatch": errors.MismatchError,
    "integrity": errors.IntegrityError,
    "failed": FailedError,
    "unreachable": FailedError,
    "impossible": UsageError,
    "defect": FailedError,
}
_STATUSES: Mapping[int, type[CloudletError]] = {
    400: UsageError,
    401: RefusedError,
    402: RefusedError,
    403: RefusedError,
    404: errors.NotFoundError,
    405: UsageError,
    406: UsageError,
    409: errors.ConflictError,
    412: errors.ConflictError,
    413: errors.CapacityError,
    416: UsageError,
    422: errors.IntegrityError,
    429: errors.CapacityError,
    503: errors.CapacityError,
}


def error_of(response: requests.Response) -> CloudletError:
    """The error that an answer is."""
    error = _described(response)
    status = response.status_code
    if error is None:
        # A proxy in between, or not a cloudlet at all.
        return _error(
            _STATUSES.get(status, FailedError), f"{response.url} answers {status} {response.reason}"
        )
    detail = str(error.get("detail", ""))
    if status == 500:
        detail = f"{detail} ({error.get('request_id')})"
    found = coded(str(error.get("code", "")), detail, _STATUSES.get(status, FailedError))
    if isinstance(found, UnconfirmedError):
        found.fingerprint = str(error.get("fingerprint", ""))
    return found


def coded(code: str, detail: str, otherwise: type[CloudletError] = FailedError) -> CloudletError:
    """The error with this code, ``cloudlet.NOUN.REASON``; ``otherwise`` where the reason is unknown."""
    return _error(REASONS.get(code.rpartition(".")[2], otherwise), detail)


@contextmanager
def translated(where: str = "the site") -> Iterator[None]:
    """Raise what the libraries below raise as errors of ours.

    :raises LostError: the site did not answer, or not to the end.
    :raises CloudletError: it could not be asked.
    """
    try:
        yield
    except keystone.SSLError as error:
        raise LostError(
            f"the certificate of {where} is not trusted: {_verdict(error)}",
            hint="name a file of certificates to trust: --os-cacert",
        ) from error
    except (keystone.ConnectFailure, keystone.DiscoveryFailure) as error:
        raise LostError(
            f"no cloudlet answers at {where}", hint="start one with: cloudlet serve; or name another place"
        ) from error
    except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise LostError(f"the connection to {where} was cut", hint="try again") from error
    except keystone.HttpError as error:
        raise _STATUSES.get(error.http_status or 0, FailedError)(str(error)) from error
    except (keystone.ClientException, sdk.SDKException, requests.exceptions.RequestException) as error:
        raise FailedError(f"{where}: {error}") from error


def _verdict(error: BaseException | None) -> str:
    """What was found wrong with a certificate, deep below."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error.verify_message if error else "TLS did not begin"


def _error(kind: type[CloudletError], detail: str) -> CloudletError:
    error = kind(detail)
    error.hint = ""  # the site has said what to do, in the detail
    return error


def _described(response: requests.Response) -> Mapping[str, Any] | None:
    """The first error in an answer's body, if it is one of ours."""
    try:
        found = response.json()["errors"][0]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, dict) else None
