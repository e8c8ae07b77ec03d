"""``cloudlet-manage db ...``: the tables of a site."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cliff.show import ShowOne

from cloudlet.cli.manage.command import ManageCommand
from cloudlet.cli.manage.database import version_of
from cloudlet.store.database import Database, latest_version


class Sync(ManageCommand):
    """Make the site's tables, or bring them to this program's version; nothing happens where they are."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from cloudlet.service.engine import create_tables  # TaskFlow takes half a second

        database = Database(self.site_options.database_url)
        try:
            before = database.version()
            database.create()
            create_tables(database)
        finally:
            database.close()
        changed = f"was {before or 'empty'}, is" if before != latest_version() else "is"
        self.app.say(f"the database {changed} at version {latest_version()}")


class Version(ManageCommand, ShowOne):
    """Show the version of the site's tables, and the newest that this program knows."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        return ("version", "newest"), (version_of(self.site_options.database_url), latest_version())
