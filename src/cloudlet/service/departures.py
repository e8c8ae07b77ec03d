"""Hand-offs to peers: asked for, watched, cancelled, and brought to their end whoever was killed meanwhile.

What is sent and decided is the keeper's (:mod:`cloudlet.control.handoff`); this is what its site knows of it,
and what it decides where the keeper is gone. Of each hand-off there is a row, at both sites under one id.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.control.courier import PeerState, answered
from cloudlet.control.handoff import Departure, Progress
from cloudlet.control.ownership import Ownership, OwnershipFile, Record, read_record
from cloudlet.control.pace import Terms
from cloudlet.errors import CloudletError, ConflictError, CorruptError
from cloudlet.keeper.correspondence import HttpPeer, connector
from cloudlet.keeper.order import KeeperState, Status, describe
from cloudlet.service.instances import check_here
from cloudlet.service.underway import check_not_moving
from cloudlet.service.work import operation
from cloudlet.store import journal
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import (
    APPS,
    HANDOFFS,
    INSTANCES,
    OPEN_HANDOFFS,
    PEERS,
    Direction,
    Handoff,
    HandoffState,
    Instance,
    InstanceState,
    Operation,
    Peer,
    now,
)

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED)
_STATES: Mapping[Ownership, HandoffState] = {
    Ownership.COPYING: HandoffState.COPYING,
    Ownership.SWITCHING: HandoffState.SWITCHING,
    Ownership.COMMITTED: HandoffState.SWITCHING,
    Ownership.SERVING: HandoffState.SERVING,
    Ownership.COMPLETED: HandoffState.COMPLETED,
    Ownership.REVERTED: HandoffState.REVERTED,
    Ownership.LOST: HandoffState.LOST,
}


_AT_SWITCH = (Ownership.SWITCHING, Ownership.COMMITTED, Ownership.SERVING)
_GIVEN_AWAY = (Ownership.COMMITTED, Ownership.SERVING, Ownership.COMPLETED, Ownership.LOST)
_HAS_IT = (Ownership.LOADED, Ownership.RUNNING, Ownership.FILLING)
"""What a target is that has the instance, whether it runs there already or not."""
_DECIDES = {"keep": Ownership.REVERTED, "give_up": Ownership.LOST}
"""What an operator's word makes of a departure whose machine is gone."""
_HEED_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants of a hand-off."""

    peer: Peer
    terms: Terms = field(default_factory=Terms)
    needs: str = "any"
    """Whether the target must (``overlay``), may (``any``) or must not (``nothing``) use the overlay."""


class Departures:
    """The hand-offs that leave this site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def create(
        self, instance: Instance, wish: Wish, remember: Remember = forget, request_id: str = ""
    ) -> tuple[Handoff, Operation]:
        """Have an instance handed off to a peer.

        :raises ConflictError: it does not run, is about to be suspended, or is being handed off already.
        """
        self._site.peers.connection(wish.peer).close()  # which a blocked one has none of
        row = Handoff(
            project_id=instance.project_id, user_id=instance.user_id, instance_id=instance.id,
            direction=Direction.OUT, peer_id=wish.peer.id, epoch=instance.epoch,
            order={"terms": wish.terms.to_json(), "needs": wish.needs, "seed": secrets.token_hex(8)},
        )  # fmt: skip

        def begin(connection: Connection) -> tuple[Handoff, Operation]:
            before = INSTANCES.get(connection, instance.id, lock=True)
            check_here(before)
            check_not_moving(connection, before)
            if before.state not in _RUNNING:
                raise ConflictError(
                    f"instance {instance.id} is {before.state}", hint="only one that runs can be handed off"
                )
            self._check_goes_on(connection, before)
            paused = before.state is InstanceState.PAUSED
            made = HANDOFFS.insert(connection, replace(row, paused=paused, epoch=before.epoch))
            moving = INSTANCES.update(connection, instance.id, state=InstanceState.MOVING)
            journal.emit(connection, "instance", "moving", moving, handoff_id=made.id, peer_id=wish.peer.id)
            begun = operation("handoff.send", moving, {"instance": moving.id, "handoff": made.id})
            begun = self._site.work.add(connection, replace(begun, request_id=request_id))
            remember(connection, begun.id)
            return made, begun

        made, begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return made, begun

    def _check_goes_on(self, connection: Connection, instance: Instance) -> None:
        """That nobody has asked for the end of its machine.

        :raises ConflictError: it is about to be suspended.
        """
        for begun in self._site.work.open_on(connection, instance.id):
            if begun.kind == "instance.suspend":
                hint = f"wait for that, or cancel it: cloudlet operation cancel {begun.id}"
                raise ConflictError(f"instance {instance.id} is being suspended", hint=hint)

    def offer(self, handoff: Handoff) -> dict[str, Any]:
        """What is offered to the peer.

        :raises CloudletError: the machine has gone.
        """
        instance = self._instance(handoff)
        about = self._site.keeping.keepers.ask(instance.id, "describe")
        needs = handoff.order["needs"]
        if not about.pop("layer") and needs == "any":
            needs = "nothing"  # this end knows nothing of the app's layer
        lease: dict[str, Any] = {"warned": instance.warned}
        if instance.lease_seconds:
            lease["seconds"] = instance.lease_seconds
        if instance.expires_at:
            lease["left"] = (instance.expires_at - now()).total_seconds()
        return {
            "id": handoff.id,
            "seed": handoff.order["seed"],
            "needs": needs,
            **({"early": True} if handoff.order["terms"]["early"] else {}),
            "instance": {
                "id": instance.id,
                "epoch": handoff.epoch,
                "name": instance.name,
                "project_id": instance.project_id,
                "user_id": instance.user_id,
                "metadata": dict(instance.metadata),
                "ports": list(instance.order.get("ports", ())),
                "restart": instance.restart,
                "early": self.allows_early(instance),
                "lease": lease,
                "paused": handoff.paused,
                "cpus": instance.cpus,
                "created_at": instance.created_at.isoformat(),
                **about,
            },
        }

    def allows_early(self, instance: Instance) -> bool:
        """Whether its app's publisher has said that an instance may be lost on its way.

        The app may be another site's, from which the instance came: that has said so with its offer.
        """

        def read(connection: Connection) -> bool:
            if instance.app_id:
                app = APPS.find(connection, id=instance.app_id)
                return bool(app and app.descriptor.get("handoff", {}).get("early"))
            came = HANDOFFS.list(
                connection, instance_id=instance.id, direction=Direction.IN, state=HandoffState.COMPLETED,
                sort="epoch", descending=True, limit=1,
            )  # fmt: skip
            return bool(came and came[0].order["instance"].get("early"))

        return self._site.database.read(read)

    def depart(self, handoff: Handoff, holds: str) -> dict[str, Any]:
        """What the keeper is told."""
        grace = self._site.options.peers.grace_seconds
        return {
            "handoff": handoff.id,
            "instance": handoff.instance_id,
            "epoch": handoff.epoch,
            "seed": handoff.order["seed"],
            "terms": handoff.order["terms"],
            "holds": holds,
            "grace": grace,
            **self._last(handoff.peer_id),
            "peer": self._whom(handoff),
        }

    def peer(self, handoff: Handoff) -> HttpPeer:
        """The other end of a hand-off."""
        return HttpPeer.of(self._whom(handoff), handoff.id, self._site.machine.keys)

    def target(self, handoff: Handoff) -> str:
        """What the peer is called that a hand-off goes to."""
        return self._peer(handoff).name

    def left_alone(self, handoff: Handoff, peer: HttpPeer) -> Departure | None:
        """The departure whose keeper is gone, if that had begun."""
        folder = self._site.keeping.folder(handoff.instance_id)
        record = self._record_or_word(handoff, folder)
        if record is None or record.handoff != handoff.id:
            return None
        return Departure(
            OwnershipFile(folder, record), peer, Terms.from_json(dict(handoff.order["terms"])),
            told=lambda progress: self._try_to_note(handoff.id, progress),
        )  # fmt: skip

    def _try_to_note(self, handoff_id: str, progress: Progress) -> None:
        """Have the row say how far it is; what waits for a peer does not end where that cannot be said."""
        try:
            self.note(handoff_id, progress.state, in_doubt=progress.in_doubt)
        except Exception:
            LOG.exception("how far hand-off %s is could not be noted", handoff_id)

    def _record_or_word(self, handoff: Handoff, folder: Path) -> Record | None:
        """What was written down; where that cannot be read, what an operator has said instead."""
        try:
            return read_record(folder)
        except CorruptError as error:
            word = _DECIDES.get(self.get(handoff.id).order.get("word", ""))
            if word is None:
                raise
            reason = f"an operator decided it; {error.message}"
            record = Record(handoff.id, handoff.instance_id, handoff.epoch, word, handoff.paused, reason)
            OwnershipFile(folder, record)
            return record

    @contextmanager
    def heeding(self, handoff: Handoff, departure: Departure, peer: HttpPeer) -> Iterator[None]:
        """Have a departure without a keeper hear what an operator says of it, until the context is left.

        :param peer: whom it asks; if it is somewhere else meanwhile, it is asked there.
        """
        over = threading.Event()

        def listen(known: Mapping[str, str]) -> None:
            while not over.wait(_HEED_SECONDS):
                try:
                    if (whom := self._whom(handoff)) != known:
                        known = whom
                        peer.be_at(connector(whom, self._site.machine.keys))
                    word = self.get(handoff.id).order.get("word")
                    if word == "keep":
                        departure.keep()
                    elif word == "give_up":
                        departure.give_up()
                except ConflictError:
                    pass  # it has just been decided otherwise
                except Exception:
                    LOG.exception("an operator's word on hand-off %s could not be heard", handoff.id)

        thread = threading.Thread(target=listen, args=(self._whom(handoff),), name="heeding", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def note(self, handoff_id: str, state: Ownership, *, in_doubt: bool = False, **more: Any) -> None:
        """Have the row say how far it is."""
        shown = HandoffState.IN_DOUBT if in_doubt else _STATES[state]
        if shown.ended:
            return  # said with what follows from it, in one transaction

        def note(connection: Connection) -> None:
            before = HANDOFFS.get(connection, handoff_id, lock=True)
            if before.state.ended:
                return
            after = HANDOFFS.update(connection, handoff_id, state=shown, **more)
            if before.state is not shown:
                journal.emit(connection, "handoff", shown, after, instance_id=after.instance_id)

        self._site.database.write(note)

    def moved(
        self,
        handoff: Handoff,
        told: Mapping[str, Any],
        statistics: Mapping[str, Any],
        lost: Mapping[str, Any] | None = None,
    ) -> None:
        """The instance is the peer's: its row says where it is; can be done again.

        :param lost: why it has ended there before all of its memory was there, if it has.
        """
        peer = self._peer(handoff)
        where = {
            "cloudlet_id": peer.id,
            "url": str(told.get("api_url") or ""),
            "endpoints": list(told.get("endpoints") or ()),
            "events_after": told.get("events_after"),
        }

        state = HandoffState.LOST if lost else HandoffState.COMPLETED

        def note(connection: Connection) -> None:
            if HANDOFFS.get(connection, handoff.id, lock=True).state.ended:
                return
            done = HANDOFFS.update(
                connection, handoff.id, state=state, told=where, statistics=dict(statistics), error=lost
            )
            after = INSTANCES.update(
                connection, handoff.instance_id, state=InstanceState.MOVED, endpoints=[], moved_to=where,
                expires_at=None,
            )  # fmt: skip
            journal.emit(connection, "handoff", state, done, instance_id=after.id)
            journal.emit(connection, "instance", "moved", after, handoff_id=handoff.id, moved_to=where)

        self._site.database.write(note)
        if not self._site.keeping.keepers.lives(handoff.instance_id):
            self._site.keeping.end(handoff.instance_id)  # nobody shows users the way

    def stayed(self, handoff: Handoff, error: CloudletError) -> None:
        """It came to nothing: the instance is here, as it was, unless it ended; can be done again."""
        try:
            record = read_record(self._site.keeping.folder(handoff.instance_id))
        except CorruptError as unreadable:  # an operator has to say it
            self.note(handoff.id, Ownership.COMMITTED, in_doubt=True, error=describe(unreadable))
            return
        if record and record.handoff == handoff.id and record.state is Ownership.COMPLETED:
            self.moved(handoff, record.told, {})
            return
        if record and record.handoff == handoff.id and record.state is Ownership.LOST:
            self.moved(handoff, record.told, {}, lost=describe(error))
            return
        lives = self._site.keeping.keepers.lives(handoff.instance_id)
        open_ = record and record.handoff == handoff.id and not record.state.ended
        # At the switch the target may be told that it is its own, whoever was to wait for that.
        at_switch = record is not None and record.state in _AT_SWITCH
        if record and open_ and (lives or at_switch):
            # What failed was to wait: nobody knows yet. The keeper's word, or whoever keeps house, goes on.
            in_doubt = record.state in (Ownership.COMMITTED, Ownership.SERVING) or not lives
            self.note(handoff.id, record.state, in_doubt=in_doubt, error=describe(error))
            return

        # Above that of the copy at the target, which has run.
        undone = record is not None and record.handoff == handoff.id and record.as_of_switch
        epoch = handoff.epoch + (2 if undone else 0)

        def note(connection: Connection) -> None:
            open_row = HANDOFFS.get(connection, handoff.id, lock=True)
            if open_row.state.ended:
                return
            done = HANDOFFS.update(
                connection, handoff.id, state=HandoffState.REVERTED, error=describe(error),
                order=open_row.order_when_reverted,
            )  # fmt: skip
            journal.emit(connection, "handoff", HandoffState.REVERTED, done, instance_id=done.instance_id)
            before = INSTANCES.get(connection, handoff.instance_id, lock=True)
            if before.state is not InstanceState.MOVING:
                return
            state = InstanceState.PAUSED if handoff.paused else InstanceState.ACTIVE
            after = INSTANCES.update(connection, before.id, state=state, epoch=epoch)
            journal.emit(connection, "instance", "stayed", after, handoff_id=handoff.id, error=done.error)

        self._site.database.write(note)
        self._site.leases.look()
        if not lives:
            self._site.keeping.look_again(handoff.instance_id)

    def look_at(self, instance: Instance, status: Status) -> None:
        """Go on with a hand-off that nobody waits for any more, as its keeper has brought it to an end."""
        said = status.handoff or {}
        decided = said.get("state") in (Ownership.COMPLETED, Ownership.REVERTED, Ownership.LOST)
        if status.state is not KeeperState.ENDED and not decided:
            return
        leaving = {"instance_id": instance.id, "direction": Direction.OUT, "state": OPEN_HANDOFFS}
        handoff = self._site.database.read(lambda connection: HANDOFFS.find(connection, **leaving))
        if not handoff:
            return
        try:
            self._record_or_word(handoff, self._site.keeping.folder(instance.id))
            self.resolve(handoff)
        except CorruptError as unreadable:
            self.note(handoff.id, Ownership.COMMITTED, in_doubt=True, error=describe(unreadable))
        except ConflictError:
            pass  # it has just been said

    def go_on(self) -> None:
        """Go on with what is in doubt without a keeper, and for which nobody waits any more."""

        def read(connection: Connection) -> list[Handoff]:
            doubt = HANDOFFS.list(connection, direction=Direction.OUT, state=HandoffState.IN_DOUBT)
            return [one for one in doubt if not self._site.work.open_on(connection, one.instance_id)]

        for handoff in self._site.database.read(read):
            if self._site.keeping.keepers.lives(handoff.instance_id):
                continue
            with suppress(ConflictError, CorruptError):  # decided just now; or only by an operator's word
                self._record_or_word(handoff, self._site.keeping.folder(handoff.instance_id))
                self.resolve(handoff)

    def resolve(self, handoff: Handoff) -> Operation:
        """Have it go on, if it was left in doubt; who asks again is told of the same.

        :raises ConflictError: it is decided.
        """

        def begin(connection: Connection) -> Operation:
            row = HANDOFFS.get(connection, handoff.id, lock=True)
            if row.state.ended:
                raise ConflictError(f"the hand-off is {row.state}: there is nothing to decide")
            for open_ in self._site.work.open_on(connection, row.instance_id):
                if open_.resources.get("handoff") == row.id:
                    return open_
            resources = {"instance": row.instance_id, "handoff": row.id}
            return self._site.work.add(connection, operation("handoff.send", row, resources))

        begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun

    def decided(self, handoff: Handoff) -> Ownership | None:
        """What this end's keeper has written down of a hand-off, whether it lives or not; None if nothing.

        :raises CorruptError: it cannot be read.
        """
        record = read_record(self._site.keeping.folder(handoff.instance_id))
        return record.state if record and record.handoff == handoff.id else None

    def keep(self, handoff: Handoff) -> None:
        """An operator's word while the peer is silent: it runs here again, though it may run there too.

        If its machine is gone with its keeper, it has failed here.

        :raises ConflictError: there is nothing to decide, or the peer answers that it has it.
        """
        self._speak(handoff, "keep")

    def resume_as_of_switch(self, handoff: Handoff) -> None:
        """An operator's word: it goes on here as it was when it was switched early.

        :raises ConflictError: it runs at the peer, there is nothing to decide, or its machine is gone.
        """
        self._speak(handoff, "resume_as_of_switch")

    def give_up(self, handoff: Handoff) -> None:
        """An operator's word: what is kept here of an instance that was switched early is ended.

        :raises ConflictError: it runs at the peer, or there is nothing to decide.
        """
        self._speak(handoff, "give_up")

    def _speak(self, handoff: Handoff, word: str) -> None:
        """Tell the keeper an operator's word about this hand-off, and no other."""
        if handoff.state.ended:
            raise ConflictError(f"the hand-off is {handoff.state}: there is nothing to decide")
        if self._site.keeping.keepers.lives(handoff.instance_id):
            if word == "keep" and self._is_given_away(handoff):
                self._check_not_there(handoff)
            try:
                self.tell(handoff, word)
            except ConflictError:
                if word != "keep" or self.decided(handoff) is not Ownership.REVERTED:
                    raise  # else the keeper has just heard from its target that this has given it up
            return
        # Its machine is gone with its keeper: what is left to decide is done by the operation.
        try:
            state = self.decided(handoff)
            fitting = "give_up" if state is Ownership.SERVING else "keep"
            if word != fitting:
                hint = f"cloudlet handoff resolve --{fitting.replace('_', '-')}"
                raise ConflictError(f"its machine is gone, and it is {state}", hint=hint)
            if word == "keep":
                self._check_silent(handoff)
        except CorruptError as unreadable:
            if word not in _DECIDES:
                hint = "cloudlet handoff resolve --keep, or --give-up"
                raise ConflictError("its machine is gone", hint=hint) from unreadable
            self._check_not_there(handoff)

        def note(connection: Connection) -> None:
            order = {**HANDOFFS.get(connection, handoff.id, lock=True).order, "word": word}
            HANDOFFS.update(connection, handoff.id, order=order)

        self._site.database.write(note)
        self.resolve(handoff)

    def tell(self, handoff: Handoff, word: str, **more: Any) -> None:
        """Tell the keeper a word about this hand-off, and where its peer is now.

        :raises CloudletError: there is no keeper, or the word does not fit.
        """
        self._site.keeping.keepers.ask(
            handoff.instance_id, word, handoff=handoff.id, peer=self._whom(handoff), **more
        )

    def _is_given_away(self, handoff: Handoff) -> bool:
        """Whether the target may run the instance, and has not said that it does, for all one can read."""
        try:
            return self.decided(handoff) is Ownership.COMMITTED
        except CorruptError:
            return True

    def _check_not_there(self, handoff: Handoff) -> None:
        """Have the target give the instance up, if it answers.

        :raises ConflictError: it does not.
        """
        peer = self.peer(handoff)
        said = answered(peer.drop) or answered(peer.state)
        peer.close()
        if said and said.state in (Ownership.RUNNING, Ownership.FILLING):
            raise ConflictError("the instance runs at its target", hint="have it deleted there, or let it be")
        if said and said.state == Ownership.LOADED:
            raise ConflictError("the target answers, and does not give the instance up", hint="try it again")

    def _check_silent(self, handoff: Handoff) -> None:
        """That the target does not say that it has the instance: what is there is the only one.

        :raises ConflictError: it says so.
        """
        peer = self.peer(handoff)
        said = answered(peer.state)
        peer.close()
        if said and said.state in _HAS_IT:
            raise ConflictError(
                f"the target answers, and has the instance: it is {said.state}",
                hint="wait for it, or cloudlet handoff resolve --retry",
            )

    def cancel(self, handoff: Handoff) -> Operation:
        """Have the instance stay.

        :raises ConflictError: it has ended, or has been given away.
        """
        with suppress(CorruptError):
            if (state := self.decided(handoff)) in _GIVEN_AWAY:
                raise ConflictError(f"the instance is at its target already, or about to be: it is {state}")
        for open_ in self._site.database.read(
            lambda connection: self._site.work.open_on(connection, handoff.instance_id)
        ):
            if open_.resources.get("handoff") == handoff.id:
                return self._site.work.cancel(open_.id)
        raise ConflictError(f"the hand-off is {handoff.state}: there is nothing to cancel")

    def state(self, handoff: Handoff) -> PeerState:
        """What a peer is told that asks how the source has decided."""
        record = None
        with suppress(CloudletError, OSError):
            record = read_record(self._site.keeping.folder(handoff.instance_id))
        here = {"here": self.has(handoff.instance_id)}
        if record and record.handoff == handoff.id:
            return PeerState(record.state, reason=record.reason, told=here)
        known = {
            HandoffState.COMPLETED: Ownership.COMPLETED, HandoffState.REVERTED: Ownership.REVERTED,
            HandoffState.LOST: Ownership.LOST,
        }  # fmt: skip
        return PeerState(known.get(handoff.state, Ownership.COPYING), told=here)

    def has(self, instance_id: str) -> bool:
        """Whether an instance is this site's, as far as its rows and its keeper say."""
        leaving = {"instance_id": instance_id, "direction": Direction.OUT, "state": OPEN_HANDOFFS}

        def read(connection: Connection) -> tuple[Instance | None, Handoff | None]:
            return INSTANCES.find(connection, id=instance_id), HANDOFFS.find(connection, **leaving)

        instance, handoff = self._site.database.read(read)
        if instance is None or instance.state is not InstanceState.MOVING:
            return instance is not None and instance.state is not InstanceState.MOVED
        if handoff is None:
            return False  # it comes
        try:
            return self.decided(handoff) not in _GIVEN_AWAY
        except CorruptError:
            return True

    def accepted(self, handoff: Handoff, holds: str) -> None:
        """The peer has a place for the instance, on what it holds."""
        order = {**handoff.order, "holds": holds}
        self._site.database.write(lambda connection: HANDOFFS.update(connection, handoff.id, order=order))

    def get(self, handoff_id: str) -> Handoff:
        return self._site.database.read(lambda connection: HANDOFFS.get(connection, handoff_id))

    def _last(self, peer_id: str) -> dict[str, float | None]:
        """What the last hand-off to a peer has shown: what the link carries, how long deciding takes."""
        last = self._site.database.read(
            lambda connection: HANDOFFS.list(
                connection, peer_id=peer_id, direction=Direction.OUT, state=HandoffState.COMPLETED,
                sort="updated_at", descending=True, limit=1,
            )
        )  # fmt: skip
        statistics = last[0].statistics if last else {}
        return {"rate": statistics.get("rate"), "overhead": statistics.get("overhead_seconds")}

    def _instance(self, handoff: Handoff) -> Instance:
        return self._site.database.read(lambda connection: INSTANCES.get(connection, handoff.instance_id))

    def _peer(self, handoff: Handoff) -> Peer:
        return self._site.database.read(lambda connection: PEERS.get(connection, handoff.peer_id))

    def _whom(self, handoff: Handoff) -> dict[str, str]:
        return self._site.peers.whom(self._peer(handoff))
