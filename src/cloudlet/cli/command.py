"""What all commands share: the application with its global options, and errors as exit codes.

This is the one place where an error becomes a line on standard error and an exit code, and where what
the kernel refuses (no room, no right, no descriptor) becomes an error of ours.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager

import cloudlet
from cloudlet.cli import signals
from cloudlet.cli.site.where import ClientManager, add_options
from cloudlet.errors import CloudletError, ExitCode, of_the_system
from cloudlet.settings import Settings, load

if TYPE_CHECKING:  # the OpenStack client, which has our commands too, need not load how a site works
    from cloudlet.control.site import Site


class _Commands(CommandManager):
    """The commands of a group of entry points, each of them imported when it is needed and not before."""

    def load_commands(self, namespace: str) -> None:
        self.group_list.append(namespace)
        self.commands.update(_commands_of(namespace))


@cache
def _commands_of(namespace: str) -> dict[str, EntryPoint]:
    return {point.name.replace("_", " "): point for point in entry_points(group=namespace)}


class CloudletApp(App):
    """The application: what cliff needs to know, and the site that commands work on."""

    NAME = "cloudlet"
    COMMANDS = "cloudlet.commands"
    """Where its commands are: a group of entry points."""
    DESCRIPTION = "An edge cloud: warm virtual machines from small overlays, on an unmodified QEMU."

    def __init__(self) -> None:
        super().__init__(
            description=self.DESCRIPTION,
            version=cloudlet.__version__,
            command_manager=_Commands(self.COMMANDS),
            deferred_help=True,
        )

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, Any] | None = None
    ) -> argparse.ArgumentParser:
        # Our name, whatever file was started. A command's option may be the beginning of one of these.
        ours = {"prog": self.NAME, "conflict_handler": "resolve", "allow_abbrev": False}
        named = {**ours, **(argparse_kwargs or {})}
        parser = super().build_option_parser(description, version, named)
        parser.add_argument(
            "--version", action="version", version=f"{self.NAME} {version}", help="print the version"
        )
        parser.add_argument("--config-file", metavar="FILE", help="read the settings from this file")
        parser.add_argument("--cache-dir", metavar="DIR", help="where bases are kept")
        parser.add_argument("--state-dir", metavar="DIR", help="where running instances are kept")
        if self.COMMANDS == CloudletApp.COMMANDS:  # other programs of ours work on this machine only
            add_options(parser)
        return parser

    def clean_up(self, cmd: Command, result: int, err: BaseException | None) -> None:
        self.client_manager.close()
        super().clean_up(cmd, result, err)

    @cached_property
    def client_manager(self) -> ClientManager:
        """The client of a served site, where the OpenStack client's application has its clients too."""
        return ClientManager(self.options, lambda: self.settings)

    def configure_logging(self) -> None:
        super().configure_logging()
        if not self.options.debug:
            # It tells of its plug-ins and of each step of a migration.
            logging.getLogger("alembic").setLevel(logging.WARNING)

    @property
    def settings(self) -> Settings:
        """The settings, read anew."""
        options = self.options
        return load(options.config_file, cache_dir=options.cache_dir, state_dir=options.state_dir)

    @property
    def quiet(self) -> bool:
        """Whether ``--quiet`` was given."""
        return not self.options.verbose_level

    def site(self) -> Site:
        """The site of this machine, cleaned of what dead processes left."""
        from cloudlet.control.site import Site

        return Site.open(self.settings)

    def say(self, text: str) -> None:
        """Tell a person what is being done; ``--quiet`` silences it."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)


class CloudletCommand(Command):
    """A command: its application, typed, and errors as exit codes."""

    app: CloudletApp

    def get_epilog(self) -> str:
        # cliff's looks through all that is installed, which takes half a second.
        return ""

    def run(self, parsed_args: argparse.Namespace) -> int:
        signals.interrupt()
        try:
            status = super().run(parsed_args) or ExitCode.DONE
            sys.stdout.flush()
        except BrokenPipeError:
            # Who read our output has had enough.
            _drop_output()
            return ExitCode.FAILED
        except CloudletError as error:
            return self._report(error)
        except (OSError, MemoryError) as error:
            return self._report(of_the_system(error))
        except KeyboardInterrupt:
            self._leave_nothing()
            raise
        except Exception:
            traceback.print_exc()
            print(f"{self.app.NAME}: this is a defect: please report the lines above", file=sys.stderr)
            return ExitCode.FAILED
        return status

    def _report(self, error: CloudletError) -> int:
        if self.app.options.debug:
            traceback.print_exception(error)
        print(f"{self.app.NAME}: {printable(str(error))}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return error.exit_code

    def _leave_nothing(self) -> None:
        """An interrupt can fall between the making of a workspace and its being remembered."""
        signals.ignore()
        from cloudlet.control.site import Site

        try:
            Site.abandon(self.app.settings)
        except (CloudletError, OSError) as error:
            print(f"{self.app.NAME}: {error}", file=sys.stderr)


def printable(text: str) -> str:
    """A text in which a guest or a file may have a say, without what would steer a terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _drop_output() -> None:
    """Send what is still buffered nowhere, or the interpreter complains of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
