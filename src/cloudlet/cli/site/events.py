"""``cloudlet event list``: what happened at a site."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from cliff.columns import FormattableColumn

from cloudlet.cli.command import printable
from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists
from cloudlet.cli.site.shown import Shown, Table

if TYPE_CHECKING:
    from cloudlet.client.resources import Event


class List(Lists):
    """List events: those that are remembered, or with --follow those that come.

    With --follow each event is a line as soon as it comes (with -f json, a line of JSON), until Ctrl-C. Who
    goes on with --after and the number of the last one seen has missed nothing.

    Example: cloudlet event list --follow --kind instance
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--after", type=int, metavar="NUMBER", help="only those after the event of this number"
        )
        parser.add_argument("--follow", action="store_true", help="wait for more")
        parser.add_argument("--kind", help="only kinds that begin so: instance, overlay.active ...")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        after = parsed_args.after
        if after is None and not parsed_args.follow:
            after = 0
        events = self.client.events(after, follow=parsed_args.follow, kind=parsed_args.kind)
        events = islice(events, parsed_args.limit)
        if parsed_args.follow:
            self._follow(events, as_json=parsed_args.formatter == "json")
            events = iter(())
        return shown.table(("number", "time", "kind", "resource_id", "detail"), events, shown.event)

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Sequence[Any]]
    ) -> int:
        if parsed_args.follow:
            return 0  # all has been said
        return int(super().produce_output(parsed_args, column_names, data))

    def _follow(self, events: Iterable[Event], *, as_json: bool) -> None:
        for event in events:
            values = shown.event(event)
            line = json.dumps(_plain(values)) if as_json else _line(values)
            self.app.stdout.write(f"{line}\n")
            self.app.stdout.flush()


def _plain(values: Shown) -> dict[str, object]:
    return {
        name: value.machine_readable() if isinstance(value, FormattableColumn) else value
        for name, value in values.items()
    }


def _line(values: Shown) -> str:
    detail = values["detail"].human_readable()
    return printable(f"{values['number']} {values['time']} {values['kind']} {values['resource_id']} {detail}")
