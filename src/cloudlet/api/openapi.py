"""The table as OpenAPI 3.1: paths, parameters, bodies, answers and errors, from the types that are used."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import cloudlet
from cloudlet.api import faults, microversion
from cloudlet.api.operation import Operation
from cloudlet.api.schemas.common import ListQuery
from cloudlet.api.schemas.operations import OperationBody
from cloudlet.transfer.peer import SCHEME

_REFERENCE = "#/components/schemas/{model}"
_ALWAYS = (400, 406, 500, 503)
_ID = {"type": "string", "format": "uuid"}


def document(table: Iterable[Operation]) -> dict[str, Any]:
    """The OpenAPI document of a table."""
    operations = list(table)
    modes = [(model, "validation") for model in _models(operations, "body")]
    modes += [(model, "serialization") for model in _models(operations, "answer")]
    _, schemas = models_json_schema(modes, ref_template=_REFERENCE)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cloudlet",
            "version": cloudlet.__version__,
            "summary": "Warm virtual machines at the edge, from small overlays",
            "description": f"Microversions {microversion.MIN} to {microversion.MAX}, "
            f"chosen by the header {microversion.HEADER}.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": noun} for noun in dict.fromkeys(operation.noun for operation in operations)],
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Errors": _ERRORS},
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "keystone": {"type": "apiKey", "in": "header", "name": "X-Auth-Token"},
                "peer": {"type": "http", "scheme": SCHEME},
            },
        },
        "security": [{"basic": []}, {"keystone": []}],
    }


@cache
def text(table: tuple[Operation, ...]) -> str:
    """The document as JSON."""
    return json.dumps(document(table), indent=1)


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.noun],
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": {**_answers(operation), **_faults(operation)},
        "x-policy-rule": operation.rule,
        "x-since": str(operation.since),
    }
    if operation.description:
        described["description"] = operation.description
    if operation.public:
        described["security"] = []
    elif operation.for_peers:
        described["security"] = [{"peer": []}]
    if body := operation.wants.get("body"):
        schema = {"$ref": _REFERENCE.format(model=body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif "upload" in operation.wants:
        binary = {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary", "minLength": 1}}
        }
        described["requestBody"] = {"required": True, "content": binary}
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found = [{"name": name, "in": "path", "required": True, "schema": _ID} for name in operation.parameters]
    if operation.method == "POST":
        key = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"}
        found.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": key})
    if operation.tagged and operation.method != "GET":
        tag = {"type": "string", "description": "the ETag of the row as it has to be; *: whatever it is"}
        found.append({"name": "If-Match", "in": "header", "required": False, "schema": tag})
    if "upload" in operation.wants:
        number = {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}
        found.append({"name": "Upload-Offset", "in": "header", "required": False, "schema": number})
    if query := operation.wants.get("query"):
        schema = query.model_json_schema()
        if issubclass(query, ListQuery):
            keys = "|".join(query.SORTED_BY)
            schema["properties"]["sort"]["pattern"] = f"^({keys})(:(asc|desc))?$"
        for name, member in schema["properties"].items():
            found.append(
                {
                    "name": name,
                    "in": "query",
                    "required": name in schema.get("required", ()),
                    "schema": _inline(dict(member), schema.get("$defs", {})),
                }
            )
    return found


def _answers(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in (operation.status, *operation.statuses):
        model = _model_of(operation, status)
        found[str(status)] = {"description": _MEANINGS[status]}
        if model:
            schema = {"$ref": _REFERENCE.format(model=model.__name__)}
            found[str(status)]["content"] = {operation.media: {"schema": schema}}
        elif operation.media != "application/json" or operation.name == "site.openapi":
            found[str(status)]["content"] = {operation.media: {}}
    if operation.tagged and operation.method == "GET":
        found["200"]["headers"] = {"ETag": {"schema": _TEXT, "description": "for If-Match"}}
    if operation.name == "event.list":
        found["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return found


def _faults(operation: Operation) -> dict[str, Any]:
    statuses = {*_ALWAYS}
    if not operation.public:
        statuses |= {401, 403}
    if operation.parameters or {"body", "query"} & operation.wants.keys():
        statuses.add(404)
    if operation.method != "GET" or operation.media != "application/json":
        statuses |= {409, 413, 422}
    if operation.media == "application/octet-stream":
        statuses.add(416)
    if operation.tagged and operation.method != "GET":
        statuses.add(412)
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Errors")}}}
    titles = {fault.status: fault.title for fault in (*faults.FAULTS.values(), faults.DEFECT)}
    return {str(status): {"description": titles[status], "content": content} for status in sorted(statuses)}


def _model_of(operation: Operation, status: int) -> type[BaseModel] | None:
    """The model of an answer: what the handler returns, or an operation where that is only an answer."""
    for kind in _kinds(operation.gives):
        if issubclass(kind, BaseModel) and status != 202:
            return kind
    return OperationBody if status == 202 else None


def _models(operations: Iterable[Operation], what: str) -> list[type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    for operation in operations:
        models = (
            [operation.wants.get("body")]
            if what == "body"
            else [_model_of(operation, status) for status in (operation.status, *operation.statuses)]
        )
        found |= {model.__name__: model for model in models if model}
    return list(found.values())


def _kinds(annotation: Any) -> list[type]:
    kinds = get_args(annotation) if get_origin(annotation) is Union or get_args(annotation) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type)]


def _inline(member: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = member.pop("$ref", None)
    return {**definitions[reference.rpartition("/")[2]], **member} if reference else member


_MEANINGS = {
    200: "It is so",
    201: "It was created",
    202: "It has begun: an operation",
    204: "It is done",
    206: "A part of it",
}
_TEXT = {"type": "string"}
_ERRORS: dict[str, Any] = {
    "title": "Errors",
    "type": "object",
    "required": ["errors"],
    "properties": {
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["request_id", "code", "status", "title", "detail", "links"],
                "properties": {
                    "request_id": _TEXT,
                    "code": {"type": "string", "pattern": r"^cloudlet\.[a-z_]+\.[a-z_]+$"},
                    "status": {"type": "integer"},
                    "title": _TEXT,
                    "detail": _TEXT,
                    "links": {"type": "array"},
                    "fingerprint": {**_TEXT, "description": "of a key that nobody has confirmed"},
                },
            },
        }
    },
}
