"""``cloudlet handoff ...``: running instances on their way to other cloudlets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_pause, add_which, amount
from cloudlet.cli.site.shown import Columns, Shown, Table
from cloudlet.errors import CloudletError, FailedError, UsageError

if TYPE_CHECKING:
    from cloudlet.client.resources import Handoff, Instance, Operation, Peer

_FOR_PEOPLE = ("id", "instance", "direction", "peer", "state", "created_at", "error")
_FOR_PROGRAMS = (
    "id", "instance_id", "direction", "peer_id", "state", "created_at", "error", "instance", "peer",
)  # fmt: skip
_ENDING_SECONDS = 10.0
"""Longest time to wait for the end of what is cancelled."""


class _Shows(SiteCommand):
    """A command that shows hand-offs, and says by name what they are of."""

    def shown(self, row: Handoff) -> Shown:
        """One hand-off."""
        instance, peer = row.instance_id, row.peer_id
        with suppress(CloudletError):  # it is not there any more
            instance = self.client.get_instance(instance).name
        with suppress(CloudletError):  # peers are the operator's
            peer = self.client.get_peer(peer).name
        return shown.handoff(row, instance, peer)

    def named(self, rows: Iterable[Handoff]) -> Iterator[Shown]:
        """Many hand-offs."""
        instances, peers = (_names(listed) for listed in (self.client.instances, self.client.peers))
        for row in rows:
            instance = instances.get(row.instance_id, row.instance_id)
            yield shown.handoff(row, instance, peers.get(row.peer_id, row.peer_id))


def _names(listed: Callable[[], Iterable[Instance | Peer]]) -> dict[str, str]:
    """Names by ids, as far as who asks may know them."""
    names: dict[str, str] = {}
    with suppress(CloudletError):
        names.update((row.id, row.name) for row in listed())
    return names


class Create(_Shows, ShowsOne):
    """Hand a running instance off to another cloudlet; it goes on running, but for a blink at the end.

    The command ends when it runs there, and shows where. Ctrl-C before that has it stay.

    Example: cloudlet handoff create hello edge-2
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        parser.add_argument("peer", metavar="PEER", help="the cloudlet that it goes to, by name or id")
        add_pause(parser)
        parser.add_argument(
            "--deadline",
            type=amount(1, 86_400, "seconds"),
            metavar="SECONDS",
            help="have switched by then, however long the pause becomes: 1 to 86400 (default: 60)",
        )
        parser.add_argument(
            "--bandwidth",
            type=amount(0, 1_000_000, "megabits per second"),
            metavar="MBIT",
            help="megabits per second at most; 0: no limit but the site's [peers] bandwidth_mbit (default)",
        )
        parser.add_argument(
            "--verify",
            choices=("sent", "full"),
            help="full: compare all memory and disk before the switch, and not only what was sent",
        )
        parser.add_argument(
            "--overlay",
            choices=("any", "overlay", "nothing"),
            help="whether the target may, must or shall not build on the app's overlay (default: any)",
        )
        parser.add_argument(
            "--switch",
            choices=("whole", "early"),
            help="early: if what is left cannot fit into the pause, have it go on there before all of its "
            "memory is there; until then it can be lost (default: whole)",
        )
        parser.add_argument("--no-wait", action="store_true", help="do not wait until it runs there")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        if parsed_args.switch == "early" and parsed_args.verify == "full":
            raise UsageError("--verify full needs all memory before the switch: leave one of the two out")
        terms = {
            "pause_seconds": parsed_args.pause,
            "deadline_seconds": parsed_args.deadline,
            "bandwidth_mbit": parsed_args.bandwidth,
            "verify": parsed_args.verify,
            "overlay": parsed_args.overlay,
            "switch": parsed_args.switch,
        }
        given = {name: value for name, value in terms.items() if value is not None}
        instance = self.client.find_instance(parsed_args.instance)
        operation = self.client.hand_off(instance, parsed_args.peer, **given)
        handoff = self._followed(operation, instance, to_its_end=not parsed_args.no_wait)
        return shown.columns({**self.shown(handoff), "operation_id": operation.id})

    def _followed(self, operation: Operation, instance: Instance, *, to_its_end: bool) -> Handoff:
        """What an operation is to hand off, at once or at its end.

        :raises CloudletError: it has failed or was cancelled, or nobody knows.
        """
        from cloudlet.client.faults import CancelledError, LostError

        handoff_id = operation.resources["handoff"]
        try:
            if to_its_end:
                self.wait(operation)
            return self.client.get_handoff(handoff_id)
        except CancelledError as error:
            state = self.client.get_handoff(handoff_id).state
            if state != "reverted":
                hint = f"cloudlet handoff show {handoff_id}"
                raise FailedError(
                    f"hand-off {handoff_id} was cancelled, and is {state}", hint=hint
                ) from error
            raise FailedError(f"hand-off {handoff_id} was cancelled: {instance.name} stays here") from error
        except LostError as error:
            goes_on = "the hand-off may go on: cloudlet handoff list"
            error.hint = f"{error.hint}; {goes_on}" if error.hint else goes_on
            raise

    def _interrupted(self, operation: Operation) -> None:
        self.client.cancel_operation(operation)
        self.say("cancelled: the instance stays where it is, unless it has just left")


class List(_Shows, Lists):
    """List the hand-offs that you may see."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--state", help="only those in this state: copying, completed, in_doubt ...")
        parser.add_argument(
            "--instance", metavar="INSTANCE", help="only those of this instance, by name or id"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        query = {"state": parsed_args.state}
        if parsed_args.instance:
            query["instance_id"] = self._instance_id(parsed_args.instance)
        rows = list(self.client.handoffs(max_items=parsed_args.limit, **query))
        for_people = parsed_args.formatter == "table" and not parsed_args.columns
        return shown.table(_FOR_PEOPLE if for_people else _FOR_PROGRAMS, self.named(rows), lambda row: row)

    def _instance_id(self, name_or_id: str) -> str:
        from cloudlet.client.asking import is_id

        # One that is not here any more has hand-offs, too.
        return name_or_id if is_id(name_or_id) else self.client.find_instance(name_or_id).id


class Show(_Shows, ShowsOne):
    """Show a hand-off: how far it is, what is expected, and what it took."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("handoff", metavar="ID", help="its id")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(self.shown(self.client.get_handoff(parsed_args.handoff)))


class Cancel(Show):
    """Have an instance stay that is being handed off."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        handoff = self.client.get_handoff(parsed_args.handoff)
        operation = self.client.cancel_handoff(handoff)
        if not self.client.get_operation(operation, wait=_ENDING_SECONDS).ended:
            self.say(f"it is about to end: cloudlet handoff show {handoff.id}")
        return shown.columns(self.shown(self.client.get_handoff(handoff)))


class Resolve(Show):
    """Bring a hand-off in doubt to its end; for the operator.

    A hand-off is in doubt while the other site does not say whether the instance runs there; the instance
    stands still meanwhile, and goes on by itself when that site is back. If it does not come back: --keep (at
    the site that the instance leaves) or --take (at the one that it comes to) has it run here. If it runs
    at the other site too, there are two of it from then on, with the same name and the same users. At the
    site that it comes to --give-back ends the copy instead; if the other site has given it away and ended its
    own, it is lost. Where the machine itself is gone at the site that it leaves, --keep says that it has
    failed there, --give-up that it is lost.

    After an early switch (--switch early) it may have ended at the other site before all of its memory had
    come there. The site that it left keeps it, paused, as it was at the switch: --resume-as-of-switch has it
    go on from there, without what it did since, and is for where the other site's has ended; --give-up ends
    what is kept.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        how = parser.add_mutually_exclusive_group(required=True)
        how.add_argument("--retry", action="store_const", dest="action", const="retry", help="ask again")
        how.add_argument("--keep", action="store_const", dest="action", const="keep", help="it stays here")
        how.add_argument("--take", action="store_const", dest="action", const="take", help="it runs here")
        how.add_argument(
            "--give-back",
            action="store_const",
            dest="action",
            const="give_back",
            help="the copy that came here is ended",
        )
        how.add_argument(
            "--resume-as-of-switch",
            action="store_const",
            dest="action",
            const="resume_as_of_switch",
            help="it goes on here as it was at the switch",
        )
        how.add_argument(
            "--give-up",
            action="store_const",
            dest="action",
            const="give_up",
            help="what is kept here is ended",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        self.client.resolve_handoff(parsed_args.handoff, parsed_args.action)
        return shown.columns(self.shown(self.client.get_handoff(parsed_args.handoff)))
