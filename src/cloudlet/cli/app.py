"""The program ``cloudlet``: global options, settings, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager

import cloudlet
from cloudlet.control.site import Site
from cloudlet.errors import CloudletError, ExitCode
from cloudlet.settings import Settings, load


class CloudletApp(App):
    """The application: what cliff needs to know, and the site that commands work on."""

    def __init__(self) -> None:
        super().__init__(
            description="An edge cloud: warm virtual machines from small overlays, on an unmodified QEMU.",
            version=cloudlet.__version__,
            command_manager=CommandManager("cloudlet.commands"),
            deferred_help=True,
        )

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, Any] | None = None
    ) -> argparse.ArgumentParser:
        parser = super().build_option_parser(description, version, argparse_kwargs)
        parser.add_argument("--config-file", metavar="FILE", help="read the settings from this file")
        parser.add_argument("--cache-dir", metavar="DIR", help="where bases are kept")
        parser.add_argument("--state-dir", metavar="DIR", help="where running instances are kept")
        return parser

    @property
    def settings(self) -> Settings:
        """The settings, read anew."""
        options = self.options
        return load(options.config_file, cache_dir=options.cache_dir, state_dir=options.state_dir)

    def site(self) -> Site:
        """The site of this machine, cleaned of what dead processes left."""
        return Site.open(self.settings)

    def say(self, text: str) -> None:
        """Tell a person what is being done; ``--quiet`` silences it."""
        if self.options.verbose_level:
            print(text, file=self.stderr, flush=True)


class CloudletCommand(Command):
    """What all commands share: their application, typed, and errors as exit codes."""

    app: CloudletApp

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            return super().run(parsed_args) or ExitCode.DONE
        except CloudletError as error:
            if self.app.options.debug:
                raise
            print(f"cloudlet: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
        except BrokenPipeError:
            return ExitCode.FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``api.md`` lists them."""
    # Being told to end is the same as Ctrl-C: what runs is ended, what was begun is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(CloudletApp().run(argv or ["help"]))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
