"""``cloudlet handoff ...``: running instances on their way to other cloudlets."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, add_which
from cloudlet.cli.site.shown import Columns, Table

if TYPE_CHECKING:
    from cloudlet.client.resources import Operation


class Create(ShowsOne):
    """Hand a running instance off to another cloudlet; it goes on running, but for a blink at the end.

    The command ends when it runs there, and shows where. Ctrl-C before that has it stay.

    Example: cloudlet handoff create hello edge-2
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        parser.add_argument("peer", metavar="PEER", help="the cloudlet that it goes to, by name or id")
        parser.add_argument(
            "--pause",
            type=float,
            metavar="SECONDS",
            help="switch as soon as what is left fits into this (default: 0.1)",
        )
        parser.add_argument(
            "--deadline",
            type=float,
            metavar="SECONDS",
            help="have switched by then, however long the pause becomes (default: 60)",
        )
        parser.add_argument("--bandwidth", type=float, metavar="MBIT", help="megabits per second at most")
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
        terms = {
            "pause_seconds": parsed_args.pause,
            "deadline_seconds": parsed_args.deadline,
            "bandwidth_mbit": parsed_args.bandwidth,
            "verify": parsed_args.verify,
            "overlay": parsed_args.overlay,
            "switch": parsed_args.switch,
        }
        operation = self.client.hand_off(
            self.client.find_instance(parsed_args.instance),
            self.client.find_peer(parsed_args.peer),
            **{name: value for name, value in terms.items() if value is not None},
        )
        if not parsed_args.no_wait:
            operation = self.wait(operation)
        handoff = self.client.get_handoff(operation.resources["handoff"])
        return shown.columns({**shown.handoff(handoff), "operation_id": operation.id})

    def _interrupted(self, operation: Operation) -> None:
        self.client.cancel_operation(operation)
        self.say("cancelled: the instance stays where it is, unless it has just left")


class List(Lists):
    """List the hand-offs that you may see."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--state", help="only those in this state: copying, completed, in_doubt ...")
        parser.add_argument("--instance", metavar="ID", help="only those of this instance")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        query = {"state": parsed_args.state, "instance_id": parsed_args.instance}
        rows = self.client.handoffs(max_items=parsed_args.limit, **query)
        names = ("id", "instance_id", "direction", "peer_id", "state", "created_at", "error")
        return shown.table(names, rows, shown.handoff)


class Show(ShowsOne):
    """Show a hand-off: how far it is, what is expected, and what it took."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("handoff", metavar="ID", help="its id")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.handoff(self.client.get_handoff(parsed_args.handoff)))


class Cancel(Show):
    """Have an instance stay that is being handed off."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        handoff = self.client.get_handoff(parsed_args.handoff)
        self.client.cancel_handoff(handoff)
        return shown.columns(shown.handoff(self.client.get_handoff(handoff)))


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
        return shown.columns(shown.handoff(self.client.get_handoff(parsed_args.handoff)))
