"""Rows of a site's database as values: frozen records, and one way to keep each kind of them.

A record is what a table's row says, typed. :class:`Rows` puts records into a table and takes them out again,
within a transaction of :class:`~cloudlet.store.database.Database`. A change is made by name and may be bound
to what the row said before, so that of two who change the same thing one is told that it came too late.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError, NotFoundError
from cloudlet.store import tables


def now() -> datetime:
    """The present moment, UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """An identifier for a new row."""
    return str(uuid.uuid4())


SITE = "00000000-0000-0000-0000-000000000000"
"""Who owns what nobody brought: a base that was here before anybody came."""


class CloudletState(StrEnum):
    """Whether the site admits new instances."""

    UP = "up"
    DRAINING = "draining"


class PeerState(StrEnum):
    """Whether another cloudlet is dealt with."""

    TRUSTED = "trusted"
    BLOCKED = "blocked"


class FileState(StrEnum):
    """Where a base or an overlay is on its way into the site."""

    QUEUED = "queued"
    UPLOADING = "uploading"
    VERIFYING = "verifying"
    ACTIVE = "active"
    REJECTED = "rejected"


class InstanceState(StrEnum):
    """What an instance is to its user. See the diagram in the reference."""

    REQUESTED = "requested"
    SYNTHESISING = "synthesising"
    ACTIVE = "active"
    MOVING = "moving"
    """On its way to another site, or from one."""
    MOVED = "moved"
    """At another site: ``moved_to`` says where."""
    PAUSED = "paused"
    SUSPENDED = "suspended"
    EXPIRED = "expired"
    FAILED = "failed"
    DELETING = "deleting"


class OperationState(StrEnum):
    """How far long work is."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (self.SUCCEEDED, self.FAILED, self.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """What every row says that somebody owns."""

    id: str = field(default_factory=new_id)
    project_id: str
    user_id: str
    created_at: datetime = field(default_factory=now)
    updated_at: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Owned):
    """A base as the site offers it; its files are :class:`cloudlet.store.bases.BaseStore`'s."""

    name: str
    state: FileState = FileState.QUEUED
    size: int | None = None
    identity: str | None = None
    description: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    @property
    def public(self) -> bool:
        """Bases are everybody's to see and to start from."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay(Owned):
    """An overlay: its bytes are a blob, or are still to be fetched from ``url``."""

    name: str
    public: bool = False
    """Whether every user of the site may start it, and not its owner alone."""
    state: FileState = FileState.QUEUED
    url: str | None = None
    size: int | None = None
    digest: str | None = None
    """Of the blob: BLAKE3 of all its bytes, in hexadecimal digits."""
    identity: str | None = None
    """The overlay's own: BLAKE3 of its root (``docs/formats/overlay.md``)."""
    base_identity: str | None = None
    description: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class App(Owned):
    """An app: what its publisher says of it."""

    name: str
    version: str
    public: bool = True
    descriptor: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance(Owned):
    """A running app of one user, or one that is on its way."""

    name: str
    state: InstanceState = InstanceState.REQUESTED
    app_id: str | None = None
    overlay_id: str | None = None
    base_identity: str
    memory_bytes: int
    disk_bytes: int
    cpus: int
    order: Mapping[str, Any] = field(default_factory=dict)
    """What its keeper is told."""
    endpoints: Sequence[Mapping[str, Any]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    lease_seconds: int | None = None
    expires_at: datetime | None = None
    warned: bool = False
    restart: bool = False
    """Whether it is started again when it ended by itself."""
    restarts: int = 0
    resume_at_start: bool = False
    """Whether it was suspended only because the machine was shut down."""
    epoch: int = 1
    """How often it has come to another site, and one more."""
    moved_to: Mapping[str, Any] | None = None
    """Where it is, if it has left."""
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Owned):
    """Long work."""

    kind: str
    state: OperationState = OperationState.PENDING
    resources: Mapping[str, str] = field(default_factory=dict)
    """What it works on: the noun and the id."""
    input: Mapping[str, Any] = field(default_factory=dict)
    output: Mapping[str, Any] | None = None
    """What came of it, besides what its resources say; of some kinds already while it goes on."""
    steps: Sequence[Mapping[str, Any]] = ()
    error: Mapping[str, Any] | None = None
    cancelled: bool = False
    """Whether somebody asked for its end."""
    subject: str = ""
    """The id of what it must be alone with: operations of the same follow each other."""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook(Owned):
    """Where events are pushed to."""

    url: str
    kinds: Sequence[str] = ()
    """Beginnings of the kinds that are wanted; none: all."""
    secret: str
    everything: bool = False
    """Whether it gets the events of all users."""
    after: int
    """The number of the last event that was looked at for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer(Owned):
    """Another cloudlet, under its own id, with the key that its operator has confirmed."""

    name: str
    url: str
    public_key: str
    """Of Ed25519: its 32 bytes, in base64."""
    fingerprint: str
    """Of the key: BLAKE3, as hexadecimal digits."""
    certificate: str = ""
    """SHA-256 of the certificate that another TLS server showed for it; empty: it showed its own."""
    state: PeerState = PeerState.TRUSTED
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    """What it said last of what it can do."""
    seen_at: datetime | None = None
    """When it was heard of last, whoever called."""
    error: Mapping[str, Any] | None = None
    """Why the last call from here did not work."""


class Direction(StrEnum):
    """Whether a hand-off leaves this site or comes to it."""

    OUT = "out"
    IN = "in"


class HandoffState(StrEnum):
    """How far a hand-off is."""

    PREPARING = "preparing"
    COPYING = "copying"
    SWITCHING = "switching"
    IN_DOUBT = "in_doubt"
    """The instance stands still until the peer says whether it has it, or an operator what becomes of it."""
    SERVING = "serving"
    """The instance runs at the target, and some of its memory is still at the source."""
    COMPLETED = "completed"
    REVERTED = "reverted"
    LOST = "lost"
    """The instance ended at the target before all of its memory was there."""

    @property
    def ended(self) -> bool:
        return self in (self.COMPLETED, self.REVERTED, self.LOST)


OPEN_HANDOFFS = tuple(state for state in HandoffState if not state.ended)
"""The states of hand-offs that are not decided, or not told of."""
_AT_SWITCH = (HandoffState.SWITCHING, HandoffState.IN_DOUBT, HandoffState.SERVING)
SWITCHED, YES = "switched", "yes"
"""In the order of a hand-off that was reverted: it had come to the switch, and its peer may ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff(Owned):
    """An instance on its way to another site, or from one; the same id at both."""

    instance_id: str
    direction: Direction = Direction.OUT
    peer_id: str
    state: HandoffState = HandoffState.PREPARING
    epoch: int
    """The instance's at the source."""
    paused: bool = False
    """Whether its user had paused it before."""
    order: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for."""
    forecast: Mapping[str, Any] | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] | None = None
    """Where the instance is since."""
    error: Mapping[str, Any] | None = None

    @property
    def order_when_reverted(self) -> dict[str, Any]:
        """What was asked for, with a mark if it had come to the switch."""
        return {**self.order, **({SWITCHED: YES} if self.state in _AT_SWITCH else {})}


class Row(Protocol):
    """What a record has that is kept under an id."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Row)


class Rows(Generic[R]):
    """The records of one kind."""

    def __init__(self, noun: str, kind: type[R], table: sa.Table, listed_by: str = "") -> None:
        self.noun = noun
        self.listed_by = f"list them: cloudlet {listed_by or noun} list"
        """What to do who names one that there is not."""
        self.kind = kind
        self.table = table
        names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
        self._columns = [table.c[name] for name in names]
        # Written once: to write a query costs more than to answer it.
        self._one = sa.select(*self._columns).where(table.c.id == sa.bindparam("key"))
        self._locked = self._one.with_for_update()
        self._insert = sa.insert(table)
        hints = {entry.name: entry.default for entry in fields(kind)}  # type: ignore[arg-type]
        self._states = {name: type(default) for name, default in hints.items() if isinstance(default, Enum)}

    def insert(self, connection: Connection, record: R) -> R:
        """Add a record."""
        values = {column.name: getattr(record, column.name) for column in self._columns}
        connection.execute(self._insert, values)
        return record

    def get(self, connection: Connection, key: str, *, lock: bool = False) -> R:
        """The record with this id; with ``lock`` nobody else changes it in this transaction.

        :raises NotFoundError: there is none.
        """
        query = self._locked if lock else self._one
        row = connection.execute(query, {"key": key}).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no {self.noun} {key}", hint=self.listed_by)
        return self._record(row)

    def find(self, connection: Connection, **equal: Any) -> R | None:
        """The one record with these values, if there is exactly one."""
        rows = connection.execute(sa.select(*self._columns).where(*self._equal(equal)).limit(2)).all()
        return self._record(rows[0]) if len(rows) == 1 else None

    def update(
        self, connection: Connection, key: str, *, where: Mapping[str, Any] | None = None, **values: Any
    ) -> R:
        """Change a record and say what it is now.

        :param where: what it has to say before: a value, or several of which it is one.
        :raises NotFoundError: there is none.
        :raises ConflictError: it does not say so.
        """
        changed = sa.update(self.table).where(self.table.c.id == key, *self._equal(where or {}))
        done = connection.execute(changed.values(updated_at=now(), **values))
        record = self.get(connection, key)
        if not done.rowcount:
            state = getattr(record, "state", "")
            raise ConflictError(f"{self.noun} {key} is {state}", hint="wait until it is not, or use another")
        return record

    def delete(self, connection: Connection, key: str) -> bool:
        """Remove a record; whether it was there."""
        return bool(connection.execute(sa.delete(self.table).where(self.table.c.id == key)).rowcount)

    def list(
        self,
        connection: Connection,
        *conditions: sa.ColumnElement[bool],
        limit: int | None = None,
        marker: str | None = None,
        sort: str = "created_at",
        descending: bool = False,
        **equal: Any,
    ) -> list[R]:
        """Records in order, those after ``marker`` (an id); rows equal in ``sort`` are in order of their ids.

        :raises NotFoundError: the marker's row is gone.
        """
        key, identity = self.table.c[sort], self.table.c.id
        query = sa.select(*self._columns).where(*conditions, *self._equal(equal))
        if marker is not None:
            place = connection.execute(sa.select(key).where(identity == marker)).one_or_none()
            if place is None:
                raise NotFoundError(
                    f"there is no {self.noun} {marker} to go on after", hint="list from the beginning"
                )
            after, beside = (
                (key < place[0], identity < marker) if descending else (key > place[0], identity > marker)
            )
            query = query.where(sa.or_(after, sa.and_(key == place[0], beside)))
        order = (key.desc(), identity.desc()) if descending else (key, identity)
        return [self._record(row) for row in connection.execute(query.order_by(*order).limit(limit))]

    def ids(self, connection: Connection, **equal: Any) -> set[str]:
        """The ids of the records that have these values."""
        query = sa.select(self.table.c.id).where(*self._equal(equal))
        return set(connection.execute(query).scalars())

    def count(self, connection: Connection, **equal: Any) -> int:
        """How many records have these values."""
        query = sa.select(sa.func.count()).select_from(self.table).where(*self._equal(equal))
        return int(connection.execute(query).scalar_one())

    def _equal(self, values: Mapping[str, Any]) -> Sequence[sa.ColumnElement[bool]]:
        several = (list, tuple, set, frozenset)
        return [
            self.table.c[name].in_(value) if isinstance(value, several) else self.table.c[name] == value
            for name, value in values.items()
        ]

    def _record(self, row: Sequence[Any]) -> R:
        values = {column.name: value for column, value in zip(self._columns, row, strict=True)}
        for name, kind in self._states.items():
            values[name] = kind(values[name])
        return self.kind(**values)


BASES = Rows("base", Base, tables.bases, "site base")
OVERLAYS = Rows("overlay", Overlay, tables.overlays, "site overlay")
APPS = Rows("app", App, tables.apps)
INSTANCES = Rows("instance", Instance, tables.instances)
OPERATIONS = Rows("operation", Operation, tables.operations)
WEBHOOKS = Rows("webhook", Webhook, tables.webhooks)
PEERS = Rows("peer", Peer, tables.peers)
HANDOFFS = Rows("handoff", Handoff, tables.handoffs)
