"""What all commands share: the application with its global options, and errors as exit codes.

This is the one place where an error becomes a line on standard error and an exit code, and where what
the kernel refuses (no room, no right, no descriptor) becomes an error of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import Any

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager

import cloudlet
from cloudlet.cli import signals
from cloudlet.control.site import Site
from cloudlet.errors import CloudletError, ExitCode, of_the_system
from cloudlet.settings import Settings, load


class CloudletApp(App):
    """The application: what cliff needs to know, and the site that commands work on."""

    NAME = "cloudlet"

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
        # Our name, whatever file was started.
        named = {"prog": self.NAME, "conflict_handler": "resolve", **(argparse_kwargs or {})}
        parser = super().build_option_parser(description, version, named)
        parser.add_argument(
            "--version", action="version", version=f"{self.NAME} {version}", help="print the version"
        )
        parser.add_argument("--config-file", metavar="FILE", help="read the settings from this file")
        parser.add_argument("--cache-dir", metavar="DIR", help="where bases are kept")
        parser.add_argument("--state-dir", metavar="DIR", help="where running instances are kept")
        return parser

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
        return Site.open(self.settings)

    def say(self, text: str) -> None:
        """Tell a person what is being done; ``--quiet`` silences it."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)


class CloudletCommand(Command):
    """A command: its application, typed, and errors as exit codes."""

    app: CloudletApp

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
            print("cloudlet: this is a defect: please report the lines above", file=sys.stderr)
            return ExitCode.FAILED
        return status

    def _report(self, error: CloudletError) -> int:
        if self.app.options.debug:
            traceback.print_exception(error)
        print(f"cloudlet: {printable(str(error))}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return error.exit_code

    def _leave_nothing(self) -> None:
        """An interrupt can fall between the making of a workspace and its being remembered."""
        signals.ignore()
        try:
            Site.abandon(self.app.settings)
        except (CloudletError, OSError) as error:
            print(f"cloudlet: {error}", file=sys.stderr)


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
