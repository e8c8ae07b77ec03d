"""The program ``cloudlet-manage``: a site's database, blobs, users and its place in Keystone's catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloudlet.cli import app

if TYPE_CHECKING:
    from cloudlet.cli.manage.command import ManageApp


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``errors.py`` lists them."""
    return app.run(_application, arguments)


def _application() -> ManageApp:
    from cloudlet.cli.manage.command import ManageApp

    return ManageApp()
