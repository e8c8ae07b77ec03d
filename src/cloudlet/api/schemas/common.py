"""What the bodies of several nouns share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import urlencode

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    model_validator,
)
from pydantic_core import CoreSchema

from cloudlet.api.faults import described
from cloudlet.errors import UsageError

MOST_ROWS = 1000
_DEFAULT_ROWS = 100

Moment = Annotated[
    datetime,
    PlainSerializer(lambda moment: moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), return_type=str),
]
"""UTC, ISO 8601, with microseconds."""
# A terminal and a log show names.
Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
_WHOLE = BeforeValidator(lambda value: _whole(value))
"""A whole number of JSON may be written 4.0."""
Seconds = Annotated[int, Field(ge=1, le=31_536_000), _WHOLE]
"""Of a lease: at most a year."""
GuestPortNumber = Annotated[int, Field(ge=1, le=65535), _WHOLE]
HostPortNumber = Annotated[int, Field(ge=0, le=65535), _WHOLE]
Identifier = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=255)],
        Annotated[str, StringConstraints(max_length=1024)],
    ],
    Field(max_length=64),
]
Url = Annotated[str, StringConstraints(max_length=4096, pattern=r"^https?://[!-~]+$")]


class Incoming(BaseModel):
    """What a client sends: no members but those that are listed, and none that is null: it is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_null(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if value is None:
                raise ValueError(f"{str(name)[:64]} is null: leave it out")
        return data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        members = schema.get("properties", {})
        schema["properties"] = {name: without_null(member) for name, member in members.items()}
        return reference


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def without_null(member: dict[str, Any]) -> dict[str, Any]:
    """The schema of a member that may be left out, but is never null."""
    rest = {name: value for name, value in member.items() if name != "anyOf"}
    if rest.get("default", ...) is None:
        del rest["default"]
    choices = [choice for choice in member.get("anyOf", ()) if choice != {"type": "null"}]
    return {**rest, **choices[0]} if choices else rest


class View(BaseModel):
    """What a client sees."""

    model_config = ConfigDict(frozen=True)


class Link(View):
    """Where something is."""

    rel: str
    href: str


class ErrorView(View):
    """Why it went wrong, for what goes on without the caller."""

    code: str
    detail: str


class ListQuery(Incoming):
    """How to list: a page of rows in an order."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "name")

    limit: int = Field(_DEFAULT_ROWS, ge=1, le=MOST_ROWS, description="rows at most")
    marker: Identifier | None = Field(None, description="go on after this row")
    sort: str = Field(
        "created_at:asc", pattern=r"^[a-z_]{1,32}(:(asc|desc))?$", description="KEY or KEY:desc"
    )

    def page(self) -> dict[str, Any]:
        """As :meth:`cloudlet.store.rows.Rows.list` wants it.

        :raises UsageError: there is no such order.
        """
        key, _, direction = self.sort.partition(":")
        if key not in self.SORTED_BY:
            raise UsageError(f"sort: {key} is not one of {', '.join(self.SORTED_BY)}")
        return {
            "limit": self.limit + 1,
            "marker": self.marker,
            "sort": key,
            "descending": direction == "desc",
        }

    def filters(self) -> dict[str, Any]:
        """The equality filters that were given."""
        return self.model_dump(exclude={"limit", "marker", "sort"}, exclude_none=True)

    def links(self, root: str, path: str, rows: Iterable[Any]) -> list[Link]:
        """The link to the next page, if there is one more row than asked for."""
        found = list(rows)
        if len(found) <= self.limit:
            return []
        query = self.model_dump(exclude_none=True) | {"marker": found[self.limit - 1].id}
        return [Link(rel="next", href=f"{root}{path}?{urlencode(query)}")]


def error_view(error: Mapping[str, Any] | None, noun: str) -> ErrorView | None:
    """An error that was written down, as the wire has it."""
    if not error:
        return None
    detail = f"{error['message']} ({error['hint']})" if error.get("hint") else str(error.get("message", ""))
    return ErrorView(code=f"cloudlet.{noun}.{described(str(error.get('kind'))).reason}", detail=detail)
