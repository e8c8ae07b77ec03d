"""``cloudlet site show`` and ``cloudlet drain``: the site itself."""

from __future__ import annotations

import argparse

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import ShowsOne
from cloudlet.cli.site.shown import Columns


class Show(ShowsOne):
    """Show the site: what it is, what it may give, what it has given."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.cloudlet(self.client.get_cloudlet()))


class Drain(ShowsOne):
    """Have the site admit no new instance, so that it becomes empty; for its operator.

    What runs goes on until its lease or its user ends it. The site stays like this, over restarts too, until
    it is told otherwise with --off.

    Example: cloudlet drain -f value -c used
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--off", action="store_true", help="have it admit instances again")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        site = self.client.update_cloudlet(state="up" if parsed_args.off else "draining")
        if parsed_args.off:
            self.say("the site admits instances")
        else:
            self.say(f"the site admits no more instances; still there: {site.used['instances']}")
        return shown.columns(shown.cloudlet(site))
