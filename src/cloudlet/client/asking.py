"""Asking a site: requests whose refusals are errors of ours, and what the verbs of all nouns share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, Self, TypeVar

import requests
from openstack import proxy

from cloudlet.client import faults
from cloudlet.client.resources import Noun, Operation
from cloudlet.errors import ConflictError, NotFoundError

N = TypeVar("N", bound=Noun)

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MOST_ROWS = 1000
"""In a page of a list."""
_PATIENCE = (10.0, 90.0)
"""Seconds to connect, and between two bytes of an answer: more than a site waits for something."""


class Asking(proxy.Proxy):
    """A site that can be asked; :class:`cloudlet.client.proxy.Proxy` has the verbs."""

    api_version = "1"
    place = "the site"
    """Where it is, for people."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections to the site."""
        self._connection.close()

    def request(
        self,
        url: str,
        method: str,
        error_message: str | None = None,
        raise_exc: bool = False,
        connect_retries: int | None = None,
        global_request_id: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> requests.Response:
        """Make a request.

        :raises CloudletError: the site refused it, or did not answer.
        """
        kwargs.setdefault("timeout", _PATIENCE)
        with faults.translated(self.place):
            kwargs.setdefault("endpoint_override", self._root)
            response = super().request(
                url, method, error_message, False, connect_retries, global_request_id, *args, **kwargs
            )
        if response.status_code >= 400:
            raise faults.error_of(response)
        return response

    def _listed(self, kind: type[N], query: Mapping[str, Any]) -> Iterator[N]:
        """All that have these values; ``max_items`` says how many at most."""
        given = {name: value for name, value in query.items() if value is not None}
        if most := given.get("max_items"):
            given["limit"] = min(most, _MOST_ROWS)
        return self._list(kind, **given)

    def _named(self, kind: type[N], name_or_id: str) -> N:
        """The one thing of this id or name.

        :raises NotFoundError: there is none.
        :raises ConflictError: several have that name.
        """
        if is_id(name_or_id):
            with suppress(NotFoundError):
                return self._get(kind, name_or_id)
        noun = kind.resource_key
        found = list(self._list(kind, name=name_or_id))
        if not found:
            raise NotFoundError(f"there is no {noun} {name_or_id!r} at this site", hint=f"list the {noun}s")
        if len(found) > 1:
            ids = ", ".join(row.told() for row in found)
            raise ConflictError(
                f"{len(found)} {noun}s are called {name_or_id}", hint=f"name one by id: {ids}"
            )
        return found[0]

    def _made(self, kind: type[N], attributes: Mapping[str, Any], retry_key: str | None = None) -> N:
        body = {kind.resource_key: dict(attributes)}
        answer = self.post(kind.base_path, json=body, headers=retry_headers(retry_key))
        return kind.existing(connection=self._connection, **answer.json()[kind.resource_key])

    def _changed(self, kind: type[N], key: str, changes: Mapping[str, Any]) -> N:
        answer = self.patch(f"{kind.base_path}/{key}", json={kind.resource_key: dict(changes)})
        return kind.existing(connection=self._connection, **answer.json()[kind.resource_key])

    def _begun(self, answer: requests.Response) -> Operation:
        return Operation.existing(connection=self._connection, **answer.json()["operation"])

    @cached_property
    def _root(self) -> str | None:
        """Where this version of the API is; plug-ins with a fixed endpoint name the site itself."""
        data = self.get_endpoint_data()
        return data.url if data else None


def is_id(text: str) -> bool:
    """Whether a text is an id, and not a name."""
    return _ID.fullmatch(text) is not None


def id_of(thing: str | Noun) -> str:
    return thing if isinstance(thing, str) else thing.id


def retry_headers(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key} if key else {}
