"""Hand-offs from peers: admitted before a byte comes, filled by keepers, this site's when the source says so.

What is loaded and decided is the keeper's (:mod:`cloudlet.control.handoff`); this admits, answers the source,
and says in the rows what has become of it. An instance that was here before keeps its row.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.control.courier import PeerState, answered
from cloudlet.control.imaging import make_image
from cloudlet.control.ownership import Ownership, OwnershipFile, Record, read_record
from cloudlet.errors import (
    CloudletError,
    ConflictError,
    CorruptError,
    FailedError,
    MismatchError,
    NotFoundError,
)
from cloudlet.keeper.order import ArrivalOrder, Order, Status, describe
from cloudlet.model import PublishedPort
from cloudlet.overlay.root import Root
from cloudlet.service import capacity
from cloudlet.service.capacity import Usage
from cloudlet.service.keeping import endpoints_of
from cloudlet.service.steps import Running
from cloudlet.service.work import operation
from cloudlet.store import journal
from cloudlet.store.rows import (
    HANDOFFS,
    INSTANCES,
    OPEN_HANDOFFS,
    OVERLAYS,
    PEERS,
    Direction,
    FileState,
    Handoff,
    HandoffState,
    Instance,
    InstanceState,
    Overlay,
    Peer,
)
from cloudlet.transfer.source import open_source

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_GIVEN_AWAY = (Ownership.COMMITTED, Ownership.SERVING, Ownership.COMPLETED)
_UNKNOWN = "unknown"
"""What a source says that has no such hand-off."""
_WENT = (HandoffState.COMPLETED, HandoffState.LOST)
_MOST_EPOCHS = 10_000
"""At so many sites an instance may have been since it was here: in the last epoch it could not come back."""
_ASK_SECONDS = 10.0
_WHERE_SECONDS = 4.0
"""Longest wait for a peer's word on where an instance is: who offers it waits too."""
_WRITE_AFTER = 0.05
"""Seconds after the answer that an instance runs here until its rows say so: the source waits for that."""
_LOAD_SECONDS = 80.0
"""Longest time in which a keeper loads what came, and a whole machine at last."""


@dataclass(frozen=True, slots=True)
class Offered:
    """An instance that a peer offers, as it stands in the message."""

    id: str
    seed: str
    needs: str
    instance: Mapping[str, Any]
    early: bool = False
    """Whether it may run here before all of its memory is here."""


class Arrivals:
    """The hand-offs that come to this site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def offer(self, peer: Peer, offered: Offered) -> Handoff:
        """Admit an instance, and make a place for it; who offers it again is told of the same.

        :raises MismatchError: it is of another base or machine than there is here.
        :raises NotFoundError: it needs an overlay that is not here.
        :raises ConflictError: it is here, or was here later than it was there, or is at another peer.
        :raises CapacityError: it does not fit.
        """
        wanted = offered.instance
        root = _root(wanted["root"])
        self._check(root, wanted, offered.needs)
        if offered.early and (obstacle := self._site.machine.hypervisor.early_obstacle()):
            raise MismatchError(f"it cannot switch early: {obstacle}", hint="hand it off without that")
        handoff = Handoff(
            id=offered.id, project_id=wanted["project_id"], user_id=wanted["user_id"],
            instance_id=wanted["id"], direction=Direction.IN, peer_id=peer.id, epoch=wanted["epoch"],
            paused=wanted["paused"],
            order={
                "seed": offered.seed, "needs": offered.needs, "early": offered.early,
                "instance": dict(wanted),
            },
        )  # fmt: skip

        elsewhere = self._site.database.read(lambda connection: _went_elsewhere(connection, peer, offered))
        if elsewhere:
            self._check_left(elsewhere)

        def admit(connection: Connection) -> tuple[Handoff, Any]:
            capacity.lock(connection)  # first: who offers the same at the same time sees what is written here
            if known := HANDOFFS.find(connection, id=offered.id):
                _check_peer(known, peer)
                if known.direction is not Direction.IN:
                    raise ConflictError(f"hand-off {known.id} leaves there")
                return known, None
            if _went_elsewhere(connection, peer, offered) != elsewhere:
                raise ConflictError(f"instance {wanted['id']} has just moved", hint="offer it again")
            instance = self._admit(connection, wanted, root)
            HANDOFFS.insert(connection, handoff)
            about = {"instance_id": instance.id, "peer_id": peer.id}
            journal.emit(connection, "handoff", "preparing", handoff, **about)
            begun = operation("handoff.receive", instance, {"instance": instance.id, "handoff": handoff.id})
            return handoff, self._site.work.add(connection, begun)

        made, begun = self._site.database.write(admit)
        if begun:
            self._site.work.submit(begun)
        return made

    def provide(self, handoff: Handoff, running: Running) -> None:
        """Decide what the machine stands on here, and have that here.

        :raises CloudletError: it must stand on its overlay, and that does not come.
        """
        if "holds" in handoff.order:
            return
        needs, wanted = handoff.order["needs"], handoff.order["instance"]
        holds = "base"
        if needs != "nothing":
            try:
                self._have_image(wanted, running)
                holds = "overlay"
            except CloudletError:
                if needs == "overlay":
                    raise
        order = {**handoff.order, "holds": holds}
        self._site.database.write(lambda connection: HANDOFFS.update(connection, handoff.id, order=order))

    def order(self, handoff: Handoff) -> Order:
        """What the keeper is told."""
        wanted, peer = handoff.order["instance"], self._peer(handoff)
        return Order(
            source="",
            ports=self._ports(wanted),
            only_these=True,
            arrival=ArrivalOrder(
                handoff=handoff.id,
                instance=handoff.instance_id,
                epoch=handoff.epoch,
                seed=handoff.order["seed"],
                root=wanted["root"],
                overlay=wanted["overlay"],
                holds=handoff.order["holds"],
                generation_id=wanted["generation_id"],
                paused=handoff.paused,
                patience=self._site.options.peers.patience_seconds,
                peer=self._site.peers.whom(peer),
                early=handoff.order["early"],
            ),
        )

    def receiving(self, handoff: Handoff) -> None:
        """It can be filled now."""
        self._become(handoff, HandoffState.COPYING, {HandoffState.PREPARING})

    def get(self, peer: Peer, handoff_id: str) -> Handoff:
        """A hand-off with this peer, in either direction.

        :raises NotFoundError: there is none.
        """
        handoff = self._site.database.read(lambda connection: HANDOFFS.get(connection, handoff_id))
        _check_peer(handoff, peer)
        return handoff

    def records(self, handoff: Handoff, first: int, body: bytes) -> PeerState:
        """Have records loaded that came.

        :raises CorruptError: they are damaged.
        """
        return self._ask(handoff, "records", _LOAD_SECONDS, answers_first=True, first=first, body=body)

    def commit(self, handoff: Handoff, epoch: int) -> PeerState:
        """The source has given the instance away: it runs here.

        :raises ConflictError: it is not complete.
        """
        if epoch != handoff.epoch:
            raise ConflictError(f"the hand-off is of epoch {handoff.epoch}, not {epoch}")
        return self._ask(handoff, "commit", _ASK_SECONDS, answers_first=True, epoch=epoch)

    def drop(self, handoff: Handoff) -> PeerState:
        """The source keeps the instance.

        :raises ConflictError: it runs here.
        """
        if handoff.state is HandoffState.PREPARING:
            self._site.keeping.end(handoff.instance_id)
            self.gone(handoff, FailedError("the source has taken it back"))
            return self.state(handoff)
        return self._ask(handoff, "drop", _ASK_SECONDS, reason="the source has taken it back")

    def wanted(self, handoff: Handoff, after: int, wait: float) -> PeerState:
        """Which missing pages the instance has waited for since ``after``, as soon as there is one.

        :raises ConflictError: it does not run before all of its memory is here.
        """
        if handoff.state.ended:
            return _ended(handoff)
        about: dict[str, Any] = {"handoff": handoff.id, "after": after, "wait": wait}
        try:
            said = self._site.keeping.keepers.ask(
                handoff.instance_id, "wanted", timeout=wait + _ASK_SECONDS, **about
            )
        except CloudletError:
            if self._site.keeping.keepers.lives(handoff.instance_id):
                raise
            return self.state(handoff)
        state = Ownership(said["state"])
        if state.ended:
            return self._said(handoff, state, said["reason"], records=said["records"])
        return PeerState(state, said["records"], handoff.order["holds"], said, said["reason"])

    def take(self, handoff: Handoff) -> PeerState:
        """An operator's word while the source is silent: it runs here, though it may run there too.

        A source that knows nothing of it is as good as silent: nobody can cancel it there.

        :raises ConflictError: it is not complete, or it is decided.
        """
        if handoff.state.ended:
            raise ConflictError(f"the hand-off is {handoff.state}: there is nothing to decide")
        said = self._source_says(handoff)
        if said and said not in (*_GIVEN_AWAY, _UNKNOWN):
            raise ConflictError(
                f"the source answers, and has not given it away: it is {said}",
                hint="wait for it, or cancel the hand-off there",
            )
        taken = self._ask(handoff, "take", _ASK_SECONDS)
        if said == _UNKNOWN:
            self._warn(handoff)
        return taken

    def _warn(self, handoff: Handoff) -> None:
        """Have the row say what was risked where a source knew nothing of what it had sent."""
        error = FailedError(
            "its operator took it, and the source answered that it knows of no such hand-off, as one does "
            "whose database was restored from before. If the instance runs there, there are two of it",
            hint="look for it at the source, and have one of them deleted",
        )
        self._site.database.write(
            lambda connection: HANDOFFS.update(connection, handoff.id, error=describe(error))
        )

    def give_back(self, handoff: Handoff) -> PeerState:
        """An operator's word while the source is silent: the copy here is ended, which never ran.

        :raises ConflictError: it is this site's, or it is decided.
        """
        if handoff.state.ended:
            raise ConflictError(f"the hand-off is {handoff.state}: there is nothing to decide")
        if self._source_says(handoff) in _GIVEN_AWAY:
            raise ConflictError(
                "the source answers, and has given it away: it is this site's", hint="wait for it, or take it"
            )
        if handoff.state is HandoffState.PREPARING:
            return self.drop(handoff)
        reason = "the target's operator gave it back"
        if not self._site.keeping.keepers.lives(handoff.instance_id):
            try:
                self._record(handoff)
            except CorruptError:
                about = (handoff.id, handoff.instance_id, handoff.epoch, Ownership.DROPPED, handoff.paused)
                OwnershipFile(self._site.keeping.folder(handoff.instance_id), Record(*about, reason))
        return self._ask(handoff, "drop", _ASK_SECONDS, reason=reason)

    def _source_says(self, handoff: Handoff) -> str | None:
        """What the hand-off is at the source; None if that does not answer."""
        source = self._site.departures.peer(handoff)
        said = answered(source.state)
        source.close()
        return said.state if said else None

    def state(self, handoff: Handoff) -> PeerState:
        """What the source is told."""
        handoff = self._site.database.read(lambda connection: HANDOFFS.get(connection, handoff.id))
        if handoff.state.ended or handoff.state is HandoffState.PREPARING:
            said = _ended(handoff)
            return replace(said, told={**(said.told or {}), "here": self._has(handoff)})
        record = self._record(handoff)
        if record is None:
            lost, gone = handoff.state is HandoffState.SERVING, FailedError("its machine is gone")
            if not self._site.keeping.keepers.lives(handoff.instance_id):
                note = self._lost if lost else self.gone
                note(handoff, gone)
            return PeerState(Ownership.LOST if lost else Ownership.DROPPED, reason=gone.message)
        if not self._site.keeping.keepers.lives(handoff.instance_id):
            record = self._left_alone(handoff, record)
        status = self._site.keeping.status(handoff.instance_id)
        loaded = ((status and status.handoff) or {}).get("records", 0)
        return self._said(handoff, record.state, record.reason, records=loaded)

    def _has(self, handoff: Handoff) -> bool:
        """Whether the instance is this site's still, which has come by a hand-off."""
        return handoff.state is HandoffState.COMPLETED and self._site.departures.has(handoff.instance_id)

    def look_at(self, instance: Instance, status: Status) -> None:
        """Note what a keeper says of an instance that comes here."""
        coming = {"instance_id": instance.id, "direction": Direction.IN, "state": OPEN_HANDOFFS}
        handoff = self._site.database.read(lambda connection: HANDOFFS.find(connection, **coming))
        if not handoff:
            return
        try:
            record = self._record(handoff)
        except CorruptError as unreadable:  # an operator has to say it
            self._become(handoff, HandoffState.IN_DOUBT, OPEN_HANDOFFS, error=describe(unreadable))
            return
        if not record:
            return
        if not self._site.keeping.keepers.lives(instance.id):
            record = self._left_alone(handoff, record)
        self._said(handoff, record.state, record.reason, status)

    def gone(self, handoff: Handoff, error: CloudletError) -> None:
        """The instance is not here, and never ran here; can be done again."""

        def note(connection: Connection) -> None:
            before = HANDOFFS.get(connection, handoff.id, lock=True)
            if before.state.ended:
                return
            done = HANDOFFS.update(
                connection, handoff.id, state=HandoffState.REVERTED, error=describe(error),
                order=before.order_when_reverted,
            )  # fmt: skip
            journal.emit(connection, "handoff", HandoffState.REVERTED, done, instance_id=done.instance_id)
            with suppress(NotFoundError):
                instance = INSTANCES.get(connection, handoff.instance_id, lock=True)
                if instance.state is not InstanceState.MOVING:
                    return
                if instance.moved_to:
                    INSTANCES.update(connection, instance.id, state=InstanceState.MOVED)
                elif _was_lost(connection, instance):
                    INSTANCES.update(connection, instance.id, state=InstanceState.FAILED)
                else:
                    INSTANCES.delete(connection, instance.id)

        self._site.database.write(note)
        if not self._site.keeping.keepers.lives(handoff.instance_id):
            self._site.keeping.end(handoff.instance_id)

    def _ask(
        self, handoff: Handoff, what: str, timeout: float, *, answers_first: bool = False, **more: Any
    ) -> PeerState:
        """Have the keeper do something; what has become of the hand-off then.

        :param answers_first: the source waits for the answer with its users: the rows are written meanwhile.
        """
        if handoff.state.ended:
            return _ended(handoff)
        try:
            said = self._site.keeping.keepers.ask(
                handoff.instance_id, what, timeout=timeout, handoff=handoff.id, **more
            )
        except CloudletError:
            if self._site.keeping.keepers.lives(handoff.instance_id):
                raise
            return self.state(handoff)
        state = Ownership(said["state"])
        known = state is Ownership.FILLING and handoff.state is HandoffState.SERVING
        if answers_first and state in (Ownership.RUNNING, Ownership.FILLING) and not known:
            return self._runs(handoff, state, said["records"])
        if answers_first and state is Ownership.LOADED:  # what the keeper tells beside this is noted
            return PeerState(state, said["records"], handoff.order["holds"], reason=said["reason"])
        return self._said(handoff, state, said["reason"], records=said["records"])

    def _runs(self, handoff: Handoff, state: Ownership, records: int) -> PeerState:
        """The answer that it runs here, before the rows say so; who asks next has them written if need be."""
        status = self._site.keeping.keepers.status(handoff.instance_id)

        def read(connection: Connection) -> tuple[int, Handoff]:
            # In this order: if the row does not say that it runs, its event has no number yet.
            return journal.last_number(connection), HANDOFFS.get(connection, handoff.id)

        last, row = self._site.database.read(read)
        if row.told is not None:  # what its keeper told beside this was written first
            return replace(_ended(row), state=state, records=records)
        told = {"endpoints": endpoints_of(status) if status else [], "events_after": last}

        def write() -> None:
            try:
                self._said(handoff, state, "", records=records)
            except Exception:
                LOG.exception("that instance %s has come could not be noted", handoff.instance_id)

        after = threading.Timer(_WRITE_AFTER, write)
        after.daemon = True
        after.start()
        return PeerState(state, records, told=told)

    def _said(
        self,
        handoff: Handoff,
        state: Ownership,
        reason: str,
        status: Status | None = None,
        records: int = 0,
    ) -> PeerState:
        """Have the rows say what the keeper has decided."""
        if state is Ownership.FILLING and handoff.state is HandoffState.SERVING:
            return replace(_ended(handoff), records=records)
        if state in (Ownership.RUNNING, Ownership.FILLING):
            return self._arrived(handoff, status, filling=state is Ownership.FILLING, records=records)
        if state is Ownership.LOST:
            return self._lost(handoff, FailedError(reason))
        if state is Ownership.DROPPED:
            self.gone(handoff, FailedError(reason or "its machine ended"))
        elif status and (status.handoff or {}).get("in_doubt"):
            self._become(handoff, HandoffState.IN_DOUBT, {HandoffState.COPYING, HandoffState.SWITCHING})
        elif state is Ownership.LOADED:
            self._become(handoff, HandoffState.SWITCHING, {HandoffState.COPYING})
        return PeerState(state, records, handoff.order.get("holds", "base"), reason=reason)

    def _lost(self, handoff: Handoff, error: CloudletError) -> PeerState:
        """The instance has ended before all of its memory was here; can be done again."""

        def note(connection: Connection) -> Handoff:
            before = HANDOFFS.get(connection, handoff.id, lock=True)
            if before.state.ended:
                return before
            here = INSTANCES.find(connection, id=handoff.instance_id)
            if here and before.state is not HandoffState.SERVING:  # it ended before its row said that it ran
                self._ran(connection, before, HandoffState.SERVING, [])
            done = HANDOFFS.update(connection, handoff.id, state=HandoffState.LOST, error=describe(error))
            journal.emit(connection, "handoff", HandoffState.LOST, done, instance_id=done.instance_id)
            return done

        done = self._site.database.write(note)
        self._site.keeping.look_again(handoff.instance_id)
        return _ended(done)

    def was_lost(self, instance: Instance) -> bool:
        """Whether an instance was lost on its way here: its source may go on with it."""
        return self._site.database.read(lambda connection: _was_lost(connection, instance))

    def _arrived(
        self, handoff: Handoff, status: Status | None, *, filling: bool = False, records: int = 0
    ) -> PeerState:
        """The instance is this site's; can be done again.

        :param filling: whether some of its memory is still to come.
        """
        status = status or self._site.keeping.keepers.status(handoff.instance_id)
        endpoints = endpoints_of(status) if status else []

        def note(connection: Connection) -> Handoff:
            before = HANDOFFS.get(connection, handoff.id, lock=True)
            if before.state.ended or (filling and before.state is HandoffState.SERVING):
                return before  # by another message
            if before.state is HandoffState.SERVING:  # its row says so already, and may have changed since
                done = HANDOFFS.update(connection, handoff.id, state=HandoffState.COMPLETED)
                journal.emit(connection, "handoff", done.state, done, instance_id=done.instance_id)
                return done
            shown = HandoffState.SERVING if filling else HandoffState.COMPLETED
            return self._ran(connection, before, shown, endpoints, status)

        done = self._site.database.write(note)
        self._site.leases.look()
        # It may have ended since.
        self._site.keeping.look_again(handoff.instance_id)
        return replace(_ended(done), records=records)

    def _ran(
        self,
        connection: Connection,
        handoff: Handoff,
        shown: HandoffState,
        endpoints: list[dict[str, Any]],
        status: Status | None = None,
    ) -> Handoff:
        """Write into the rows that the instance is this site's."""
        told = {"endpoints": endpoints, "events_after": journal.last_number(connection)}
        wanted = handoff.order["instance"]
        state = InstanceState.PAUSED if handoff.paused else InstanceState.ACTIVE
        after = INSTANCES.update(
            connection, handoff.instance_id, state=state, endpoints=endpoints, epoch=handoff.epoch + 1,
            moved_to=None, error=None, timings=dict(status.timings) if status else {},
            **self._lease(handoff), **_described(wanted),
        )  # fmt: skip
        done = HANDOFFS.update(connection, handoff.id, state=shown, told=told)
        journal.emit(connection, "handoff", shown, done, instance_id=after.id)
        journal.emit(
            connection, "instance", "arrived", after, state=state, endpoints=endpoints,
            handoff_id=handoff.id, from_=handoff.peer_id,
        )  # fmt: skip
        return done

    def _lease(self, handoff: Handoff) -> dict[str, Any]:
        """What is left of the lease: no more than this site gives, and less what the hand-off took.

        That is measured by this site's clock alone: the other's may be another.
        """
        lease, within = handoff.order["instance"]["lease"], self._site.leases.within
        left = within(lease["left"])
        ends = handoff.created_at + timedelta(seconds=left) if left is not None else None
        return {"lease_seconds": within(lease["seconds"]), "expires_at": ends, "warned": lease["warned"]}

    def _left_alone(self, handoff: Handoff, record: Record) -> Record:
        """What a keeper that was killed has decided: a machine that never ran is dropped."""
        if record.state in (Ownership.RECEIVING, Ownership.LOADED):
            file = OwnershipFile(self._site.keeping.folder(handoff.instance_id), record)
            file.become(Ownership.DROPPED, reason="its machine ended")
            record = file.record
        elif record.state is Ownership.FILLING:
            file = OwnershipFile(self._site.keeping.folder(handoff.instance_id), record)
            file.become(Ownership.LOST, reason="its machine ended before all of its memory had come")
            record = file.record
        return record

    def _record(self, handoff: Handoff) -> Record | None:
        record = read_record(self._site.keeping.folder(handoff.instance_id))
        return record if record and record.handoff == handoff.id else None

    def _check(self, root: Root, wanted: Mapping[str, Any], needs: str) -> None:
        machine = self._site.machine
        try:
            base = machine.bases.get(root.base)
        except NotFoundError as error:
            raise MismatchError(
                f"the base {root.base[:16]} of the instance is not there",
                hint="have its operator import it",
            ) from error
        machine.hypervisor.check(root.machine)
        root.check_base(base.id, base.machine, base.description.sections)
        if wanted["cpus"] not in (None, root.machine.cpus):
            raise MismatchError(
                f"the instance has {wanted['cpus']} CPUs, and the machine of its overlay {root.machine.cpus}"
            )
        # What is started again when it ended is started from its overlay.
        if (needs == "overlay" or wanted["restart"]) and not self._has_overlay(wanted):
            raise NotFoundError(
                f"the overlay {wanted['overlay'][:16]} of the instance is neither there nor can be fetched",
                hint="upload it to the target, or hand the instance off without it",
            )

    def _admit(self, connection: Connection, wanted: Mapping[str, Any], root: Root) -> Instance:
        """The row of an instance that is to come, under the lock of what is admitted."""
        machine = root.machine
        usage = Usage(1, machine.memory_bytes, machine.cpus, machine.disk_bytes)
        capacity.admit(connection, self._site.options.limits, usage)
        here = INSTANCES.find(connection, id=wanted["id"])
        self._check_epoch(connection, wanted, here)
        if here is None:
            coming = Instance(
                id=wanted["id"], project_id=wanted["project_id"], user_id=wanted["user_id"],
                created_at=datetime.fromisoformat(wanted["created_at"]), state=InstanceState.MOVING,
                base_identity=root.base, memory_bytes=machine.memory_bytes, disk_bytes=machine.disk_bytes,
                cpus=machine.cpus, epoch=wanted["epoch"], **_described(wanted),
                order=Order(source="", ports=self._ports(wanted), only_these=True).to_json(),
            )  # fmt: skip
            if overlay := self._overlay(connection, wanted):
                coming = replace(coming, overlay_id=overlay.id, restart=bool(wanted["restart"]))
            return INSTANCES.insert(connection, coming)
        if (here.project_id, here.user_id) != (wanted["project_id"], wanted["user_id"]):
            raise ConflictError(f"instance {here.id} is another user's there")
        # One that was lost here has gone on where it came from.
        lost = here.state is InstanceState.FAILED and _was_lost(connection, here)
        if here.state is not InstanceState.MOVED and not lost:
            raise ConflictError(f"instance {here.id} is there already, and {here.state}")
        had = (here.base_identity, here.memory_bytes, here.disk_bytes, here.cpus)
        if had != (root.base, machine.memory_bytes, machine.disk_bytes, machine.cpus):
            raise MismatchError(f"instance {here.id} was another machine there")
        return INSTANCES.update(connection, here.id, state=InstanceState.MOVING)

    def _check_epoch(self, connection: Connection, wanted: Mapping[str, Any], here: Instance | None) -> None:
        """That the instance has not been here later than where it comes from; also if its row is gone.

        :raises ConflictError: it has, or it says to have been at very many sites since.
        """
        done = HANDOFFS.list(connection, instance_id=wanted["id"], state=_WENT)
        epochs = [one.epoch + (one.direction is Direction.IN) for one in done]
        last = max([*epochs, here.epoch if here else 0])
        if wanted["epoch"] <= last:
            raise ConflictError(
                f"instance {wanted['id']} was there in epoch {last} already, "
                f"and is offered in epoch {wanted['epoch']}"
            )
        if here and wanted["epoch"] > last + _MOST_EPOCHS:
            raise ConflictError(
                f"instance {here.id} was there in epoch {last}, and cannot be in {wanted['epoch']} by now",
                hint="if it is, have its row there deleted",
            )

    def _check_left(self, went: Handoff) -> None:
        """That the peer to which an instance has gone does not answer that it is there still.

        One that is silent, knows nothing of it, or is no peer any more does not say so.

        :raises ConflictError: it does.
        """
        try:
            with self._site.peers.connection(self._peer(went)) as connection:
                path = f"/v1/peer/handoffs/{went.id}"
                answer = connection.request("GET", path, timeout=_WHERE_SECONDS)
            is_there = answer.json["handoff"].get("here") is True
        except (CloudletError, LookupError, TypeError, AttributeError):
            return
        if is_there:
            raise ConflictError(
                f"instance {went.instance_id} is at the cloudlet {went.peer_id}, as that says",
                hint="have it handed off from there",
            )

    def _have_image(self, wanted: Mapping[str, Any], running: Running) -> None:
        """Have the image of the overlay here.

        :raises NotFoundError: neither is it here, nor are the overlay's bytes; or the user may not use it.
        """
        overlay = self._site.database.read(lambda connection: self._overlay(connection, wanted))
        if overlay is None:
            raise NotFoundError(f"the overlay {wanted['overlay'][:16]} of the instance is not there")
        order = self._site.overlays.order(overlay.id, Order(source=""))
        # What was never fetched as a whole has no identity in its row.
        if not overlay.identity and self._site.overlays.peek(order.source)[1] != wanted["overlay"]:
            raise NotFoundError(f"the instance stands on another overlay than {overlay.id}")
        image = self._site.machine.images.find(wanted["overlay"])
        if image and image.read(_root(wanted["root"])):
            return
        networks = self._site.options.fetch_networks
        with open_source(order.source, io.BytesIO(), networks=networks) as source:
            make_image(
                self._site.machine, source, allow_unsigned=order.allow_unsigned, progress=running.progress
            )

    def _has_overlay(self, wanted: Mapping[str, Any]) -> bool:
        return self._site.database.read(lambda connection: self._overlay(connection, wanted)) is not None

    def _overlay(self, connection: Connection, wanted: Mapping[str, Any]) -> Overlay | None:
        """The site's record of the overlay, if its user may use that, or the instance was here with it."""
        for overlay in OVERLAYS.list(connection, identity=wanted["overlay"], state=FileState.ACTIVE):
            if overlay.public or overlay.user_id == wanted["user_id"]:
                return overlay
        here = INSTANCES.find(connection, id=wanted["id"])
        own = OVERLAYS.find(connection, id=here.overlay_id) if here and here.overlay_id else None
        return own if own and own.identity in (None, wanted["overlay"]) else None

    def _ports(self, wanted: Mapping[str, Any]) -> tuple[PublishedPort, ...]:
        """The instance's ports, on this site's address."""
        address = self._site.options.publish_address
        return tuple(
            PublishedPort(port["guest_port"], address, port["host_port"], port["name"])
            for port in wanted["ports"]
        )

    def _become(
        self, handoff: Handoff, state: HandoffState, before: Collection[HandoffState], **more: Any
    ) -> None:
        def note(connection: Connection) -> None:
            with suppress(ConflictError):
                after = HANDOFFS.update(connection, handoff.id, where={"state": before}, state=state, **more)
                journal.emit(connection, "handoff", state, after, instance_id=after.instance_id)

        self._site.database.write(note)

    def _peer(self, handoff: Handoff) -> Peer:
        return self._site.database.read(lambda connection: PEERS.get(connection, handoff.peer_id))


def _described(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": wanted["name"], "metadata": dict(wanted["metadata"])}


def _went_elsewhere(connection: Connection, peer: Peer, offered: Offered) -> Handoff | None:
    """The hand-off by which an offered instance, which was here, is at another peer, for all one knows."""
    here = INSTANCES.find(connection, id=offered.instance["id"])
    away = (InstanceState.MOVED, InstanceState.FAILED)
    if not here or here.state not in away or HANDOFFS.find(connection, id=offered.id):
        return None
    went = HANDOFFS.list(
        connection, instance_id=here.id, state=_WENT, sort="epoch", descending=True, limit=1
    )  # fmt: skip
    return went[0] if went and went[0].peer_id != peer.id else None


def _was_lost(connection: Connection, instance: Instance) -> bool:
    came = HANDOFFS.list(connection, instance_id=instance.id, direction=Direction.IN, state=HandoffState.LOST)
    return any(one.epoch + 1 == instance.epoch for one in came)


def _ended(handoff: Handoff) -> PeerState:
    """What is told of a hand-off that is not the keeper's any more, or not yet."""
    states = {
        HandoffState.SERVING: Ownership.FILLING.value,
        HandoffState.COMPLETED: Ownership.RUNNING.value,
        HandoffState.REVERTED: Ownership.DROPPED.value,
        HandoffState.LOST: Ownership.LOST.value,
    }
    error = handoff.error or {}
    return PeerState(
        states.get(handoff.state, "preparing"), told=dict(handoff.told or {}), reason=error.get("message", "")
    )


def _check_peer(handoff: Handoff, peer: Peer) -> None:
    if handoff.peer_id != peer.id:
        raise NotFoundError(f"there is no hand-off {handoff.id}")


def _root(text: str) -> Root:
    try:
        return Root.decode(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise CorruptError("the root of the instance's overlay is not base64") from error
