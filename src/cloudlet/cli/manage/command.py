"""What the commands of ``cloudlet-manage`` share: the application, and the settings of a service."""

from __future__ import annotations

from cloudlet.cli.command import CloudletApp, CloudletCommand
from cloudlet.service.options import Options, read_options
from cloudlet.settings import read_files


class ManageApp(CloudletApp):
    """The application."""

    NAME = "cloudlet-manage"
    COMMANDS = "cloudlet.manage"
    DESCRIPTION = "Look after a site: its database, its blobs, its users, its place in Keystone's catalogue."


class ManageCommand(CloudletCommand):
    """A command about a site, which need not be served."""

    @property
    def site_options(self) -> Options:
        """The settings of the site, read anew."""
        return read_options(read_files(self.app.options.config_file), self.app.settings)
