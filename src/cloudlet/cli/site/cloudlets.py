"""``cloudlet site show``: the site itself."""

from __future__ import annotations

import argparse

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import ShowsOne
from cloudlet.cli.site.shown import Columns


class Show(ShowsOne):
    """Show the site: what it is, what it may give, what it has given."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.cloudlet(self.client.get_cloudlet()))
