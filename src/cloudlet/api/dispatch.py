"""From a request to an answer: version, identity, policy, validation, handler, errors, in this order.

No web framework here: :mod:`cloudlet.api.wsgi` gives a :class:`Request` and takes a :class:`Response`.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, BinaryIO

from oslo_log import log
from pydantic import BaseModel, ValidationError

from cloudlet.api import conditions, faults, microversion
from cloudlet.api.faults import ClockError, NotAcceptableError, RangeError, UnauthenticatedError
from cloudlet.api.identity import NOBODY, Identity, Strategy, identify_peer, refuse_peer
from cloudlet.api.microversion import Version
from cloudlet.api.operation import Answer, Call, Desk, Operation, Slots, Stream, Text, Turns
from cloudlet.api.policy import Policy
from cloudlet.errors import CloudletError, NotFoundError, TooLargeError, UsageError, of_the_system
from cloudlet.service.site import ServedSite
from cloudlet.store.database import Condition
from cloudlet.store.retries import Retry
from cloudlet.store.rows import Peer
from cloudlet.transfer.peer import SCHEME

LOG = log.getLogger(__name__)
REQUEST_ID = "X-Openstack-Request-Id"
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Measured = Callable[[str, int, float], None]
"""Told of an operation's name, its status and its seconds."""


@dataclass(slots=True)
class Request:
    """A request as it came."""

    headers: Mapping[str, str]
    """As in WSGI's environment."""
    parameters: Mapping[str, str]
    """Of the path."""
    query: Mapping[str, str]
    stream: BinaryIO
    length: int | None
    root: str


@dataclass(slots=True)
class Response:
    """An answer as it goes out."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    stream: Stream | None = None


class Dispatcher:
    """The operations of a site, ready to be called."""

    def __init__(
        self,
        site: ServedSite,
        policy: Policy,
        strategy: Strategy,
        *,
        desk: Desk,
        waiters: Slots,
        transfers: Slots,
        turns: Turns,
        measured: Measured = lambda *_: None,
        document: Callable[[], str] = str,
        figures: Callable[[], str] = str,
    ) -> None:
        self.site = site
        self.policy = policy
        self.strategy = strategy
        self._desk = desk
        self._waiters = waiters
        self._transfers = transfers
        self._turns = turns
        self._measured = measured
        self._document = document
        self._figures = figures

    def answer(self, operation: Operation, request: Request) -> Response:
        """The answer to a request for an operation. Never raises."""
        began = time.perf_counter()
        request_id = f"req-{uuid.uuid4()}"
        try:
            version = Version.of(request.headers.get("HTTP_OPENSTACK_API_VERSION"))
            response = self._answer(operation, request, request_id, version)
            response.headers[microversion.HEADER] = f"{microversion.SERVICE_TYPE} {version}"
        except Exception as error:
            challenge = SCHEME if operation.for_peers else self.strategy.challenge
            response = self.fault(error, operation.noun, request_id, challenge)
        response.headers["Vary"] = microversion.HEADER
        response.headers[REQUEST_ID] = request_id
        seconds = time.perf_counter() - began
        self._measured(operation.name, response.status, seconds)
        LOG.info("%s %s: %d in %.1f ms", request_id, operation.name, response.status, 1000 * seconds)
        return response

    def refuse(self, error: Exception) -> Response:
        """The answer to a request for no operation at all."""
        request_id = f"req-{uuid.uuid4()}"
        response = self.fault(error, "api", request_id)
        response.headers[REQUEST_ID] = request_id
        return response

    def fault(self, error: Exception, noun: str, request_id: str, challenge: str = "") -> Response:
        """The answer that an error is.

        :param challenge: how callers show who they are.
        """
        if isinstance(error, (OSError, MemoryError)):
            error = of_the_system(error)
        fault = faults.fault_of(error)
        if fault is faults.DEFECT:
            LOG.error("%s: a defect", request_id, exc_info=error)
        headers = {"Content-Type": "application/json"}
        if isinstance(error, RangeError):
            headers["Content-Range"] = f"bytes */{error.size}"
        if fault.retry_after is not None:
            headers["Retry-After"] = str(fault.retry_after)
        if isinstance(error, UnauthenticatedError) and challenge:
            headers["WWW-Authenticate"] = challenge
        if isinstance(error, ClockError):
            headers["Date"] = formatdate(usegmt=True)
        return Response(fault.status, headers, json.dumps(faults.body(error, noun, request_id)).encode())

    def _answer(self, operation: Operation, request: Request, request_id: str, version: Version) -> Response:
        if not operation.since <= version <= (operation.until or version):
            raise NotAcceptableError(f"{operation.name} is not in version {version}")
        who, peer = self._who(operation, request)
        call = self._call(request, request_id, version, who)
        call.peer = peer
        row = self._row(operation, request)
        if not operation.public:
            self.policy.enforce(operation, who, row, rows=operation.rows)
        wants = operation.wants
        query = self._query(wants.get("query"), request)
        body = self._body(wants["body"], request) if "body" in wants else None
        if (key := request.headers.get("HTTP_IDEMPOTENCY_KEY")) is not None:
            call.retry = Retry.of(
                who.user_id,
                key,
                f"{operation.name} {sorted(request.parameters.items())}",
                body.model_dump_json() if body else "",
            )
        upload = _upload(request, self.site.meters.received) if "upload" in wants else None
        arguments = operation.arguments(call, row, body, query, upload)
        bound = self._bound(operation, request, row)
        # The body has come: from here on a slow client keeps nobody waiting.
        transfer = self._transfers.one() if upload else nullcontext()
        with self._desk.work(), transfer, self.site.database.only_if(bound):
            response = self._response(operation, operation.handler(**arguments))
        if operation.tagged and operation.method == "GET":
            response.headers["ETag"] = conditions.tag_of(row)
        return response

    def _who(self, operation: Operation, request: Request) -> tuple[Identity, Peer | None]:
        """Who calls: for what is peers' another cloudlet and nobody else, for all else none of them."""
        if operation.for_peers:
            return identify_peer(request.headers, self.site.peers)
        if operation.public:
            return NOBODY, None
        refuse_peer(request.headers)
        return self.strategy.identify(request.headers), None

    def _call(self, request: Request, request_id: str, version: Version, who: Identity) -> Call:
        return Call(
            site=self.site,
            who=who,
            request_id=request_id,
            version=version,
            root=request.root,
            waiters=self._waiters,
            transfers=self._transfers,
            turns=self._turns,
            document=self._document,
            figures=self._figures,
            allows=lambda rule, row: self.policy.allows(rule, who, row),
            headers=request.headers,
        )

    def _row(self, operation: Operation, request: Request) -> Any:
        rows = operation.rows
        if rows is None or not operation.parameters:
            return None
        key = request.parameters[operation.parameters[0]]
        if not _ID.fullmatch(key):
            raise NotFoundError(
                f"there is no {rows.noun} {key[:64]!r}", hint="an id is a UUID in small letters"
            )
        return self.site.database.read(lambda connection: rows.get(connection, key))

    def _bound(self, operation: Operation, request: Request, row: Any) -> Condition | None:
        """What ``If-Match`` demands of the transaction that makes the change; asked already here, too.

        :raises ChangedError: it is not so.
        """
        wanted, rows = request.headers.get("HTTP_IF_MATCH"), operation.rows
        if wanted is None or rows is None or not operation.tagged:
            return None
        conditions.check(wanted, row, rows.noun)
        return lambda connection: conditions.check(wanted, rows.get(connection, row.id, lock=True), rows.noun)

    def _query(self, model: type[BaseModel] | None, request: Request) -> BaseModel | None:
        if model is None:
            if request.query:
                raise UsageError(f"{next(iter(request.query))[:64]}: there is no such parameter")
            return None
        return _valid(lambda: model.model_validate(dict(request.query)))

    def _body(self, model: type[BaseModel], request: Request) -> BaseModel:
        most = self.site.options.most_body_bytes
        kind = request.headers.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", ""):
            raise UsageError(f"a body is application/json, not {kind[:64]}")
        if request.length is not None and request.length > most:
            raise TooLargeError(f"a body may have {most} bytes", hint="send less")
        data = request.stream.read(most + 1 if request.length is None else request.length)
        if len(data) > most:
            raise TooLargeError(f"a body may have {most} bytes", hint="send less")
        # Strictly: a number is not a truth, and a text is not a number.
        return _valid(lambda: model.model_validate_json(data or b"{}", strict=True))

    def _response(self, operation: Operation, given: Any) -> Response:
        answer = (
            given if isinstance(given, Answer) else Answer(given if isinstance(given, BaseModel) else None)
        )
        status = answer.status or operation.status
        if isinstance(given, Text):
            return Response(status, {"Content-Type": given.content_type}, given.text.encode())
        if isinstance(given, Stream):
            return Response(given.status, {**given.headers, "Content-Type": given.content_type}, stream=given)
        headers = dict(answer.headers)
        if answer.body is None:
            return Response(status, headers)
        headers["Content-Type"] = "application/json"
        return Response(status, headers, answer.body.model_dump_json(by_alias=True).encode())


@dataclass(slots=True)
class _Upload:
    """What a client sends."""

    stream: BinaryIO
    length: int
    offset: int
    received: Callable[[int], None]

    def read(self, size: int, /) -> bytes:
        try:
            piece = self.stream.read(size)
        except OSError:
            return b""  # it was cut off; who reads it knows how much should have come
        self.received(len(piece))
        return piece


def _upload(request: Request, received: Callable[[int], None]) -> _Upload:
    offset = request.headers.get("HTTP_UPLOAD_OFFSET", "0")
    if not re.fullmatch(r"[0-9]{1,15}", offset):
        raise UsageError("Upload-Offset: it is a number of bytes")
    # Of one that was cut behind its last byte nothing is left to be sent.
    if request.length is None or not (request.length or int(offset)):
        raise UsageError("Content-Length: an upload says how long it is, and is not empty")
    return _Upload(request.stream, request.length, int(offset), received)


def _valid(read: Callable[[], BaseModel]) -> BaseModel:
    try:
        return read()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise UsageError(f"{where[:200]}: {first['msg']}") from error
    except CloudletError as error:
        raise UsageError(str(error)) from error
