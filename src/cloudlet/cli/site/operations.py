"""``cloudlet operation ...``: long work at a site."""

from __future__ import annotations

import argparse
from contextlib import suppress

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.errors import FailedError


class List(Lists):
    """List the operations at a site that you may see."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--state", help="only those in this state: pending, running, failed ...")
        parser.add_argument("--kind", help="only those of this kind: instance.create, base.import ...")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        query = {"state": parsed_args.state, "kind": parsed_args.kind}
        rows = self.client.operations(max_items=parsed_args.limit, **query)
        names = ("id", "kind", "state", "resources", "created_at", "error")
        return shown.table(names, rows, shown.operation)


class Show(ShowsOne):
    """Show an operation: its steps, and why it failed.

    With --wait the command ends when the operation has, and with the exit code that says how that went.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("operation", metavar="ID", help="its id")
        parser.add_argument("--wait", action="store_true", help="wait until it has ended")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        operation = self.client.get_operation(parsed_args.operation)
        if parsed_args.wait:
            operation = self.wait(operation)
        return shown.columns(shown.operation(operation))


class Cancel(Show):
    """Cancel an operation, and have what it did undone."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        operation = self.client.cancel_operation(parsed_args.operation)
        if parsed_args.wait:
            with suppress(FailedError):  # that is what being cancelled looks like
                self.wait(operation)
            operation = self.client.get_operation(operation)
        return shown.columns(shown.operation(operation))
