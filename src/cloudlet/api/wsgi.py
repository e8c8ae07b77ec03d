"""The API as a WSGI application: the one module that knows the web framework."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from wsgiref.types import WSGIApplication

import falcon

from cloudlet.api.dispatch import Dispatcher, Request, Response
from cloudlet.api.faults import MethodError, PathError
from cloudlet.api.operation import Operation, Stream
from cloudlet.errors import UsageError

Responder = Callable[..., None]


def application(dispatcher: Dispatcher, table: Iterable[Operation]) -> WSGIApplication:
    """The application that serves the operations of a table."""
    app = falcon.App(media_type=falcon.MEDIA_JSON)
    app.req_options.strip_url_path_trailing_slash = True
    app.req_options.auto_parse_qs_csv = False
    app.req_options.keep_blank_qs_values = True
    routes: dict[str, dict[str, Operation]] = {}
    for operation in table:
        routes.setdefault(operation.path, {})[operation.method] = operation
    for path, operations in routes.items():
        app.add_route(path, _resource(dispatcher, operations))

    def nowhere(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        _refuse(dispatcher, resp, PathError(f"there is no path {req.path[:200]}"))

    def failed(_: falcon.Request, response: falcon.Response, error: Exception, __: Any) -> None:
        _refuse(dispatcher, response, error)

    app.add_sink(nowhere)
    app.add_error_handler(Exception, failed)
    served: WSGIApplication = app
    return served


def _resource(dispatcher: Dispatcher, operations: dict[str, Operation]) -> Any:
    """An object with a method for each of the path's, as falcon wants it."""
    allowed = ", ".join(sorted(operations))
    methods: dict[str, Responder] = {}
    for method in falcon.HTTP_METHODS:
        if operation := operations.get(method):
            methods[f"on_{method.lower()}"] = _responder(dispatcher, operation)
        else:
            methods[f"on_{method.lower()}"] = _not_allowed(dispatcher, allowed)
    return type("Resource", (), methods)()


def _responder(dispatcher: Dispatcher, operation: Operation) -> Responder:
    def respond(_: object, request: falcon.Request, response: falcon.Response, **parameters: str) -> None:
        length = request.content_length
        _send(
            dispatcher,
            response,
            dispatcher.answer(
                operation,
                Request(
                    headers=request.env,
                    parameters=parameters,
                    query={name: _one(value) for name, value in request.params.items()},
                    stream=request.bounded_stream if length is not None else request.stream,  # type: ignore[arg-type]
                    length=length,
                    root=request.prefix,
                ),
            ),
        )

    return respond


def _not_allowed(dispatcher: Dispatcher, allowed: str) -> Responder:
    def respond(_: object, request: falcon.Request, response: falcon.Response, **__: str) -> None:
        _refuse(
            dispatcher,
            response,
            MethodError(f"{request.method} is not possible here", hint=f"allowed: {allowed}"),
        )
        response.set_header("Allow", allowed)

    return respond


def _one(value: Any) -> str:
    """A parameter that was given twice is as good as one that nobody understands."""
    return ",".join(value) if isinstance(value, list) else str(value)


def _refuse(dispatcher: Dispatcher, response: falcon.Response, error: Exception) -> None:
    if isinstance(error, falcon.HTTPStatus):
        raise error
    if isinstance(error, falcon.HTTPError):
        error = UsageError(f"{error.title}: {error.description or 'the request is not understood'}")
    _send(dispatcher, response, dispatcher.refuse(error))


def _send(dispatcher: Dispatcher, response: falcon.Response, answer: Response) -> None:
    # First, for it may be refused.
    pieces = _Pieces(answer.stream, dispatcher.site.meters.sent) if answer.stream else None
    response.status = str(answer.status)
    response.set_headers(answer.headers)
    if pieces is None or answer.stream is None:
        response.data = answer.content
        if not answer.content and "Content-Length" in answer.headers:
            response.data = None
        return
    response.stream = pieces
    if answer.stream.length is not None:
        response.content_length = answer.stream.length


class _Pieces:
    """The pieces of a stream, ended when the server closes it, which it always does."""

    def __init__(self, stream: Stream, sent: Callable[[int], None]) -> None:
        self._context: AbstractContextManager[Iterator[bytes]] = stream.pieces
        self._pieces = self._context.__enter__()
        self._sent = sent
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            yield piece
            self._sent(len(piece))

    def close(self) -> None:
        with self._lock:
            context, self._context = self._context, nullcontext(iter(()))
        context.__exit__(None, None, None)
