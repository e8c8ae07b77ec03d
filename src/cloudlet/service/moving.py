"""The steps of a hand-off: at the source to offer and to move, at the target to provide and to receive."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from cloudlet.control.courier import PeerState, answered
from cloudlet.control.ownership import Ownership
from cloudlet.errors import CloudletError, CorruptError, FailedError, UnreachableError
from cloudlet.keeper.order import KeeperState, Status, describe, raised
from cloudlet.service.departures import Departures
from cloudlet.service.steps import Flow, Lane, Running, Step
from cloudlet.store.rows import Handoff, HandoffState
from cloudlet.transfer.peer import refusal_in

_ANSWER_SECONDS = 15.0
"""Longest time until a peer answers an offer at all."""
_PREPARE_SECONDS = 600.0
"""Longest time until it can be sent anything: it may have to fetch an overlay first."""
_READY_SECONDS = 120.0
_WORD_SECONDS = 60.0
"""Longest time between two words of a keeper."""
_WAIT_SECONDS = 5


_GIVEN_AWAY = (
    Ownership.SWITCHING,
    Ownership.COMMITTED,
    Ownership.SERVING,
    Ownership.COMPLETED,
    Ownership.LOST,
)
_RUNS = (Ownership.LOADED, Ownership.RUNNING, Ownership.FILLING)


class _OfHandoff(Step):
    """A step of a hand-off."""

    @property
    def departures(self) -> Departures:
        return self.site.departures

    def handoff(self) -> Handoff:
        return self.departures.get(self.operation.resources["handoff"])

    def may_be(self, states: Collection[Ownership]) -> bool:
        """Whether this end's record says one of these, or cannot be read."""
        try:
            return self.departures.decided(self.handoff()) in states
        except CorruptError:
            return True


class Offer(_OfHandoff):
    """Have the peer admit the instance and make a place for it."""

    step = "offer"

    def do(self) -> None:
        handoff = self.handoff()
        if "holds" in handoff.order:
            return  # it was accepted before a crash
        peer, name = self.departures.peer(handoff), self.departures.target(handoff)
        try:
            offer = self.departures.offer(handoff)
            state = self._answer(lambda: peer.offer(offer))
            until = time.monotonic() + _PREPARE_SECONDS
            while state.state == "preparing" and time.monotonic() < until:
                self.running.check()
                state = answered(lambda: peer.state(_WAIT_SECONDS)) or state
        except CloudletError as error:
            if refusal := refusal_in(error):
                raise type(error)(f"{name} refuses: {refusal}", hint="") from error
            raise
        finally:
            peer.close()
        if state.state != Ownership.RECEIVING:
            raise FailedError(f"{name} cannot take the instance: {state.reason or state.state}")
        self.departures.accepted(handoff, state.holds)

    def undo(self) -> None:
        """Have the peer give it up, unless it is its own; if it is silent, it asks what became of it."""
        if self.may_be(_GIVEN_AWAY):
            return
        peer = self.departures.peer(self.handoff())
        answered(peer.drop)
        peer.close()

    def _answer(self, ask: Callable[[], PeerState]) -> PeerState:
        until = time.monotonic() + _ANSWER_SECONDS
        while True:
            self.running.check()
            try:
                return ask()
            except UnreachableError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.2)


class Move(_OfHandoff):
    """Have the keeper hand its machine over; if it was killed, bring to its end what it had decided."""

    step = "move"

    def do(self) -> None:
        handoff = self.handoff()
        if handoff.state.ended:
            return  # before a crash
        holds = handoff.order["holds"]
        try:
            self._told_to_stay = False
            done = self.site.keeping.keepers.ask(
                self.running.instance_id, "depart", timeout=_WORD_SECONDS, progress=self._look,
                **self.departures.depart(handoff, holds),
            )  # fmt: skip
        except CloudletError:
            if self.site.keeping.keepers.lives(self.running.instance_id):
                self.running.check()
                raise
            done = self._conclude(handoff)
        self._let_it_be_written(handoff)
        self.departures.moved(handoff, done["told"], done["statistics"])

    def _let_it_be_written(self, handoff: Handoff) -> None:
        """Wait until the target's rows say what it has answered: who looks there next finds the instance."""
        peer = self.departures.peer(handoff)
        answered(peer.state)
        peer.close()

    def undo(self) -> None:
        """Have the keeper stop it, which goes on by itself whoever waits for it."""
        with suppress(CloudletError):  # it is the peer's already, or there is no keeper
            self.departures.tell(self.handoff(), "stay", timeout=_WORD_SECONDS)

    def _conclude(self, handoff: Handoff) -> dict[str, dict[str, object]]:
        peer = self.departures.peer(handoff)
        try:
            departure = self.departures.left_alone(handoff, peer)
            if departure is None:
                raise FailedError("the machine ended before it was handed off")
            with self.departures.heeding(handoff, departure, peer):
                departure.conclude()
            return {"told": dict(departure.told), "statistics": {}}
        finally:
            peer.close()

    def _look(self, sent: int, total: int) -> None:
        """Take note of how far it is, and of somebody who wants it to stay."""
        if self.running.cancelled.is_set() and not self._told_to_stay:
            self._told_to_stay = True
            self.undo()
        self.running.note(sent, total)
        status = self.site.keeping.known(self.running.instance_id)
        if status and status.handoff and status.handoff.get("id") == self.operation.resources["handoff"]:
            self.departures.note(
                status.handoff["id"], Ownership(status.handoff["state"]),
                in_doubt=status.handoff["in_doubt"], forecast=status.handoff["forecast"],
                error=describe(FailedError(why)) if (why := status.handoff.get("error")) else None,
            )  # fmt: skip


class Provide(_OfHandoff):
    """Have here what the machine is to stand on, as far as it must or may."""

    step = "provide"

    def do(self) -> None:
        self.site.arrivals.provide(self.handoff(), self.running)


class Receive(_OfHandoff):
    """Have a keeper with a machine that can be filled."""

    step = "receive"

    def do(self) -> None:
        handoff = self.handoff()
        self._check(handoff)
        self.site.keeping.start(handoff.instance_id, self.site.arrivals.order(handoff))
        status = self.site.keeping.wait(handoff.instance_id, _can_be_filled, _READY_SECONDS, self._look)
        if status.state is KeeperState.ENDED:
            raise raised(status.error or {"message": "the machine ended before it could be filled"})
        self.site.arrivals.receiving(handoff)
        self._check(self.handoff())

    def _check(self, handoff: Handoff) -> None:
        """That it is wanted still: who takes it back does not wait for this step."""
        if handoff.state is HandoffState.REVERTED:
            raise FailedError("the source has taken it back")

    def undo(self) -> None:
        """End the machine, unless it runs: then the hand-off was quicker than what is noted of this step."""
        if not self.may_be(_RUNS):
            self.site.keeping.end(self.running.instance_id)

    def _look(self, _: Status | None) -> None:
        self.running.check()


def stayed(running: Running, error: CloudletError) -> None:
    """A departure that came to nothing."""
    running.site.departures.stayed(running.site.departures.get(running.operation.resources["handoff"]), error)


def refused(running: Running, error: CloudletError) -> None:
    """An arrival that came to nothing before a byte of it had come."""
    running.site.arrivals.gone(running.site.departures.get(running.operation.resources["handoff"]), error)


HANDOFF_FLOWS: dict[str, Flow] = {
    "handoff.send": Flow((Offer, Move), stayed, lane=Lane.WAITING),
    "handoff.receive": Flow((Provide, Receive), refused, can_be_cancelled=False, lane=Lane.WAITING),
}


def _can_be_filled(status: Status) -> bool:
    return status.state is not KeeperState.STARTING
