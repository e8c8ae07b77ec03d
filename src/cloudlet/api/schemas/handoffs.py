"""Hand-offs on the wire: for users, and between cloudlets (``docs/formats/handoff.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from cloudlet.api.schemas.common import (
    ErrorView,
    Identifier,
    Incoming,
    Link,
    ListQuery,
    Metadata,
    Moment,
    Name,
    Seconds,
    View,
    error_view,
)
from cloudlet.control.courier import PeerState
from cloudlet.control.pace import Terms
from cloudlet.service.arrivals import Offered
from cloudlet.store.rows import Direction, Handoff, HandoffState

_MEGABIT = 125_000
_LONGEST_LEASE = 100 * 366 * 86_400
_LAST_EPOCH = (1 << 31) - 2
LONGEST_WAIT = 30
MOST_RECORDS_BYTES = 8 << 20

Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Needs = Literal["any", "overlay", "nothing"]


class HandoffCreate(Incoming):
    """Which instance goes where, and on what terms."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["peer_id"]}, {"required": ["peer_name"]}]}
    )

    instance_id: Identifier
    peer_id: Identifier | None = Field(
        None, description="the cloudlet that it goes to: its id among the peers; or peer_name"
    )
    peer_name: Name | None = Field(None, description="what that peer is called here, in place of its id")
    pause_seconds: float = Field(
        0.1, ge=0.02, le=60, description="it switches as soon as what is left fits into this"
    )
    deadline_seconds: float = Field(
        60.0, ge=1, le=86_400, description="it has switched by then, however long the pause becomes"
    )
    bandwidth_mbit: float = Field(0.0, ge=0, le=1_000_000, description="at most; 0: as the site allows")
    verify: Literal["sent", "full"] = Field(
        "sent", description="full: all memory and disk is compared before the switch"
    )
    overlay: Needs = Field(
        "any", description="whether the target may, must or shall not build on the app's overlay"
    )
    switch: Literal["whole", "early"] = Field(
        "whole",
        description="early: if what is left cannot fit into the pause, it is resumed at the target first and "
        "follows then; the instance can be lost meanwhile. The app's policy or an operator must allow it",
    )

    @model_validator(mode="after")
    def _goes_to_one_peer(self) -> Self:
        if (self.peer_id is None) == (self.peer_name is None):
            raise ValueError("give peer_id or peer_name, one of the two")
        return self

    @model_validator(mode="after")
    def _can_be_verified(self) -> Self:
        if self.switch == "early" and self.verify == "full":
            raise ValueError("verify full needs all memory before the switch, which is then not early")
        return self

    def terms(self, patience: float, most_bytes_per_second: float | None) -> Terms:
        """What the keeper is told of it."""
        wanted = [rate for rate in (self.bandwidth_mbit * _MEGABIT, most_bytes_per_second) if rate]
        return Terms(
            pause_seconds=self.pause_seconds,
            deadline_seconds=self.deadline_seconds,
            patience_seconds=patience,
            bytes_per_second=min(wanted, default=0.0),
            verify_full=self.verify == "full",
            early=self.switch == "early",
        )


class HandoffCreateBody(Incoming):
    """One new hand-off."""

    handoff: HandoffCreate


class HandoffView(View):
    """An instance on its way to another cloudlet, or from one."""

    id: str
    instance_id: str
    direction: Direction
    peer_id: str
    state: HandoffState
    epoch: int = Field(description="of the instance, at the source")
    forecast: Mapping[str, Any] | None = Field(description="seconds, bytes and pause from now on")
    statistics: Mapping[str, Any] = Field(description="what it took")
    moved_to: Mapping[str, Any] | None = Field(description="where the instance is since")
    error: ErrorView | None
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Handoff) -> HandoffView:
        return cls(
            id=row.id,
            instance_id=row.instance_id,
            direction=row.direction,
            peer_id=row.peer_id,
            state=row.state,
            epoch=row.epoch,
            forecast=row.forecast,
            statistics=row.statistics,
            moved_to=row.told,
            error=error_view(row.error, "handoff"),
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class HandoffBody(View):
    """One hand-off."""

    handoff: HandoffView


class HandoffsBody(View):
    """A page of hand-offs."""

    handoffs: list[HandoffView]
    links: list[Link]


class HandoffsQuery(ListQuery):
    """Which hand-offs."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "state")

    instance_id: Identifier | None = None
    peer_id: Identifier | None = None
    state: HandoffState | None = None
    direction: Direction | None = None


class ResolveBody(Incoming):
    """What to do with a hand-off in doubt."""

    class Resolve(Incoming):
        """An operator's word."""

        action: Literal["retry", "keep", "take", "give_back", "resume_as_of_switch", "give_up"] = Field(
            description="retry: ask the peer again. keep (at the source), take (at the target): the instance "
            "runs here; if it runs there too, there are two of it. give_back (at the target): the copy here "
            "is ended; if the source has given it away, and ended its own, it is lost. At the source: "
            "resume_as_of_switch: after an early switch it goes on as it was then; give_up: lost"
        )

    resolve: Resolve


class Lease(Incoming):
    """What is left of an instance's lease; not when it ends, since clocks differ."""

    seconds: Seconds | None = None
    left: float | None = Field(None, ge=-_LONGEST_LEASE, le=_LONGEST_LEASE, allow_inf_nan=False)
    warned: bool = False


class PeerPort(Incoming):
    """A port of the instance."""

    guest_port: int = Field(ge=1, le=65535)
    # Sources send it, and what is not listed is refused; nobody reads it.
    host: str = Field(
        "", max_length=255, description="at the source; the target publishes on its own address"
    )
    host_port: int = Field(0, ge=0, le=65535, description="that was asked for; 0: any")
    name: str = Field("", max_length=64)


class OfferedInstance(Incoming):
    """The instance that is offered."""

    id: Identifier
    epoch: int = Field(ge=1, le=_LAST_EPOCH)
    name: Name
    project_id: str = Field(max_length=255)
    user_id: str = Field(max_length=255)
    metadata: Metadata = Field({})
    ports: list[PeerPort] = Field([], max_length=64)
    restart: bool = False
    early: bool = Field(False, description="whether its app allows that it is lost on its way")
    lease: Lease
    paused: bool = False
    cpus: int | None = Field(None, ge=1, le=1024, description="as its root says, too")
    created_at: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00$")
    root: str = Field(max_length=100_000, description="of its overlay, in base64")
    overlay: Identity
    generation_id: str = Field("", pattern=r"^[0-9a-fA-F-]{0,36}$")

    @field_validator("created_at")
    @classmethod
    def _is_a_moment(cls, text: str) -> str:
        datetime.fromisoformat(text)
        return text


class Offer(Incoming):
    """OFFER."""

    id: Identifier
    seed: str = Field(pattern=r"^[0-9a-f]{16}$")
    needs: Needs = "any"
    early: bool = Field(False, description="whether it may run before all of its memory is there")
    instance: OfferedInstance

    def offered(self) -> Offered:
        """As the service takes it."""
        return Offered(self.id, self.seed, self.needs, self.instance.model_dump(), self.early)


class OfferBody(Incoming):
    """One offer."""

    handoff: Offer


class CommitBody(Incoming):
    """COMMIT."""

    epoch: int = Field(ge=1, le=_LAST_EPOCH)


class RecordsQuery(Incoming):
    """Which records come."""

    first: int = Field(ge=0, description="the number of the first")


class StateQuery(Incoming):
    """How long to wait for another state than preparing."""

    wait: int = Field(0, ge=0, le=LONGEST_WAIT, description="seconds")


class WantedQuery(Incoming):
    """Since when, and how long to wait."""

    after: int = Field(0, ge=0, description="what was answered before as wanted_after")
    wait: int = Field(0, ge=0, le=LONGEST_WAIT, description="seconds")


class PeerStateView(View):
    """What this end of a hand-off is."""

    state: str
    records: int = Field(description="that have been loaded")
    holds: str
    reason: str
    endpoints: list[Mapping[str, Any]]
    api_url: str
    events_after: int | None
    here: bool | None = Field(description="whether the instance is at this end now; null: it does not say so")

    @classmethod
    def of(cls, state: PeerState, api_url: str) -> PeerStateView:
        told = state.told or {}
        return cls(
            state=state.state,
            records=state.records,
            holds=state.holds,
            reason=state.reason,
            endpoints=list(told.get("endpoints") or ()),
            api_url=api_url,
            events_after=told.get("events_after"),
            here=told.get("here"),
        )


class PeerStateBody(View):
    """What this end of a hand-off is."""

    handoff: PeerStateView


class PeerWantedView(PeerStateView):
    """What an instance waits for that runs before all of its memory is there."""

    missing: int = Field(description="pages that have not come")
    wanted: list[int] = Field(description="those that it has waited for since, and that have not come")
    wanted_after: int | None = Field(description="what to ask with next; null if it waits for none any more")

    @classmethod
    def of(cls, state: PeerState, api_url: str) -> PeerWantedView:
        told = state.told or {}
        known = PeerStateView.of(state, api_url).model_dump()
        return cls(
            **known,
            missing=told.get("missing") or 0,
            wanted=list(told.get("wanted") or ()),
            wanted_after=told.get("wanted_after"),
        )


class PeerWantedBody(View):
    """What an instance waits for."""

    handoff: PeerWantedView
