"""What the commands that talk to a site share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cliff.lister import Lister
from cliff.show import ShowOne

from cloudlet.cli.command import CloudletCommand, printable
from cloudlet.cli.progress import Report, progress_bar

if TYPE_CHECKING:
    from cloudlet.client.proxy import Proxy
    from cloudlet.client.resources import Operation


class SiteCommand(CloudletCommand):
    """A command that talks to a site; its application is ours, or that of the OpenStack client."""

    required_scope = False
    """For the OpenStack client: a site without Keystone has no scope."""

    @property
    def client(self) -> Proxy:
        """The site."""
        return self.app.client_manager.cloudlet

    @property
    def quiet(self) -> bool:
        """Whether ``--quiet`` was given."""
        return not self.app.options.verbose_level

    def say(self, text: str) -> None:
        """Tell a person what was done; ``--quiet`` silences it."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def progress(self, title: str) -> AbstractContextManager[Report]:
        """A bar for bytes, on a terminal."""
        return progress_bar(title, in_bytes=True, quiet=self.quiet)

    def wait(self, operation: Operation) -> Operation:
        """Wait for the end of an operation, and show how far it is.

        :raises CloudletError: it failed.
        """
        try:
            with self.progress(operation.kind) as report:
                return self.client.wait_for_operation(operation, told=self._told(report))
        except KeyboardInterrupt:
            self._interrupted(operation)
            raise

    def _interrupted(self, operation: Operation) -> None:
        """What Ctrl-C does to an operation that is waited for."""
        self.say(f"it goes on: cloudlet operation show {operation.id} --wait")

    def _told(self, report: Report) -> Callable[[Operation], None] | None:
        """What shows progress; nothing where nobody sees it: then the site tells the end, and only that."""
        if self.quiet or not sys.stderr.isatty():
            return None

        def told(operation: Operation) -> None:
            done, total = operation.moved
            if total:
                report(done, total)

        return told

    def _leave_nothing(self) -> None:
        """Nothing of it is on this machine."""


class ShowsOne(SiteCommand, ShowOne):
    """A command that shows one thing."""


class Lists(SiteCommand, Lister):
    """A command that lists things."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--limit", type=count, metavar="N", help="list so many at most")
        return parser


def count(text: str) -> int:
    """A number above zero, as an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number


def amount(least: float, most: float, unit: str) -> Callable[[str], float]:
    """What reads a number of a unit within limits, which are in it, as an argument."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {unit}") from None
        if not least <= number <= most:  # nor is what is not a number
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most} {unit}")
        return number

    return read


def add_pause(parser: argparse.ArgumentParser) -> None:
    """An option that says how long an instance may stand still that is handed off."""
    parser.add_argument(
        "--pause",
        type=amount(0.02, 60, "seconds"),
        metavar="SECONDS",
        help="an instance switches as soon as what is left fits into this: 0.02 to 60 (default: 0.1)",
    )


def add_which(parser: argparse.ArgumentParser, noun: str, *, several: bool = False) -> None:
    """An argument that says which one of a noun is meant."""
    if several:
        parser.add_argument(noun, nargs="+", metavar=noun.upper(), help="its name or its id")
    else:
        parser.add_argument(noun, metavar=noun.upper(), help="its name or its id")
