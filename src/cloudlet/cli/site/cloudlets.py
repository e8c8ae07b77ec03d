"""``cloudlet site show`` and ``cloudlet drain``: the site itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cliff.lister import Lister

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import ShowsOne, SiteCommand, add_pause, amount
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.errors import ExitCode

if TYPE_CHECKING:
    from cloudlet.client.resources import Operation

_ENTRY = ("id", "name", "result", "peer", "reason")
_REMAINS = ("stays", "in_doubt", "moving")
_NOT_RUNNING = "not_running"


class Show(ShowsOne):
    """Show the site: what it is, what it may give, what it has given."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.cloudlet(self.client.get_cloudlet()))


class Drain(SiteCommand, Lister):
    """Empty the site: have it admit no new instance, and hand what runs off to its peers; for its operator.

    Instances go on running meanwhile, but for a blink each. One that finds no place stays, and goes on here
    until its lease or its user ends it; then the exit code is 6. The site does it by itself: Ctrl-C ends the
    watching only, and `cloudlet operation cancel` the handing off. It admits no instance, over restarts too,
    until it is told otherwise: cloudlet drain --off.

    Example: cloudlet drain --deadline 300 --to edge-2 --to edge-3
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._some_remain = False

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        how = parser.add_mutually_exclusive_group()
        how.add_argument("--off", action="store_true", help="have it admit instances again")
        how.add_argument(
            "--no-handoff", action="store_true", help="hand nothing off: what runs stays until it ends"
        )
        parser.add_argument(
            "--deadline",
            type=amount(0, 86_400, "seconds"),
            metavar="SECONDS",
            help="begin no hand-off later, and have switched by then: 0 to 86400 (default: 600)",
        )
        add_pause(parser)
        parser.add_argument(
            "--to",
            action="append",
            default=[],
            metavar="PEER",
            help="only to this peer, by name or id; can be repeated (default: to all)",
        )
        parser.add_argument("--no-wait", action="store_true", help="do not wait until all have gone")
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        status = super().run(parsed_args)
        return ExitCode.NO_CAPACITY if status == ExitCode.DONE and self._some_remain else status

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        if parsed_args.off or parsed_args.no_handoff:
            return self._become("up" if parsed_args.off else "draining")
        terms = {
            "deadline_seconds": parsed_args.deadline,
            "pause_seconds": parsed_args.pause,
            "peers": [self.client.find_peer(peer).id for peer in parsed_args.to] or None,
        }
        given = {name: value for name, value in terms.items() if value is not None}
        operation = self.client.drain_cloudlet(**given)
        self.say(f"the site admits no more instances, and hands off what runs: operation {operation.id}")
        if parsed_args.no_wait:
            self._interrupted(operation)
            return shown.table(("id", "kind", "state"), [operation], shown.operation)
        return self._result(self._watch(operation))

    def _become(self, state: str) -> Table:
        site = self.client.update_cloudlet(state=state)
        if state == "up":
            self.say("the site admits instances")
        else:
            self.say(f"the site admits no more instances; still there: {site.used['instances']}")
        return shown.table(("id", "name", "state", "used"), [site], shown.cloudlet)

    def _watch(self, operation: Operation) -> Operation:
        """Wait until all is decided, and say what becomes of each instance."""
        try:
            return self.client.wait_for_operation(operation, told=self._teller())
        except KeyboardInterrupt:
            self._interrupted(operation)
            raise

    def _teller(self) -> Callable[[Operation], None]:
        known: dict[str, str] = {}

        def told(operation: Operation) -> None:
            for entry in _entries(operation):
                said = _said(entry)
                if said and known.get(entry["id"]) != said:
                    known[entry["id"]] = said
                    self.say(f"{entry['name']}: {said}")

        return told

    def _result(self, operation: Operation) -> Table:
        entries = _entries(operation)
        if all(entry["result"] == _NOT_RUNNING for entry in entries):
            self.say("nothing runs here")
        remain = sum(entry["result"] in _REMAINS for entry in entries)
        if remain:
            self._some_remain = True
            self.say(f"instances that found no place, and stay: {remain}")
        return shown.table(_ENTRY, entries, lambda entry: entry)


def _entries(operation: Operation) -> list[Mapping[str, Any]]:
    return list((operation.output or {}).get("instances", ()))


def _said(entry: Mapping[str, Any]) -> str:
    """What there is to say of an instance; empty while it waits."""
    return {
        "moving": f"goes to {entry['peer']}",
        "handed_off": f"runs at {entry['peer'] or entry['peer_id']}",
        "stays": f"stays: {entry['reason']}",
        "in_doubt": f"stands still, in doubt: {entry['reason']}",
    }.get(entry["result"], "")
