"""``cloudlet peer ...``: other cloudlets, to which instances can be handed off; for the site's operator."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_which
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.errors import RefusedError, UnconfirmedError, UsageError

_FINGERPRINT = re.compile(r"([0-9a-fA-F]{2}[ :-]?){31}[0-9a-fA-F]{2}")


class Add(ShowsOne):
    """Trust another cloudlet, after its key's fingerprint was compared; it has to trust this one, too.

    The other site's operator reads it out from 'cloudlet site show'. Without --fingerprint the one that was
    found is shown, and a person at a terminal is asked.

    Example: cloudlet peer add https://edge-2.example.org:8791
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "url", type=_url, metavar="URL", help="where the site reaches it: https://HOST:PORT"
        )
        parser.add_argument("--name", help="what to call it (default: as it calls itself)")
        sure = parser.add_mutually_exclusive_group()
        sure.add_argument(
            "--fingerprint", type=_fingerprint, metavar="F", help="of its key, as its operator says it"
        )
        sure.add_argument("--yes", action="store_true", help="take the key that is found for the right one")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        try:
            peer = self.client.add_peer(parsed_args.url, parsed_args.fingerprint, parsed_args.name)
        except UnconfirmedError as error:
            if not parsed_args.yes:
                _ask(error)
            peer = self.client.add_peer(parsed_args.url, error.fingerprint, parsed_args.name)
        if peer.error:
            self.say(f"it is trusted here, but does not answer yet: {peer.error['detail']}")
        return shown.columns(shown.peer(peer))


class List(Lists):
    """List the peers of a site: when they were heard of last, and why the last call did not work."""

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        rows = self.client.peers(max_items=parsed_args.limit)
        return shown.table(("id", "name", "url", "state", "seen_at", "error"), rows, shown.peer)


class Show(ShowsOne):
    """Show a peer, as it was when it was heard of last."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "peer")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.peer(self.client.find_peer(parsed_args.peer)))


class Refresh(ShowsOne):
    """Have the site ask a peer what it can do, and show whether that worked."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "peer")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        peer = self.client.refresh_peer(self.client.find_peer(parsed_args.peer))
        return shown.columns(shown.peer(peer))


class Set(ShowsOne):
    """Change a peer.

    Example: cloudlet peer set edge-2 --block
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "peer")
        parser.add_argument(
            "--url", type=_url, metavar="URL", help="where it is reached now: it has to be there"
        )
        parser.add_argument("--name", help="what to call it")
        state = parser.add_mutually_exclusive_group()
        state.add_argument(
            "--block", dest="state", action="store_const", const="blocked", help="neither call nor hear it"
        )
        state.add_argument(
            "--trust", dest="state", action="store_const", const="trusted", help="deal with it again"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        wanted = {"url": parsed_args.url, "name": parsed_args.name, "state": parsed_args.state}
        changes: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if not changes:
            raise UsageError("nothing to change", hint="cloudlet help peer set")
        peer = self.client.find_peer(parsed_args.peer)
        return shown.columns(shown.peer(self.client.update_peer(peer, **changes)))


class Delete(SiteCommand):
    """Forget peers and their keys."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "peer", several=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        for peer in [self.client.find_peer(name) for name in parsed_args.peer]:
            self.client.delete_peer(peer)
            self.say(f"peer {peer.name} is forgotten")


def _url(text: str) -> str:
    """Where a peer is reached, as an argument."""
    if not text.startswith("https://"):
        raise argparse.ArgumentTypeError("a peer's URL begins with https://")
    return text


def _fingerprint(text: str) -> str:
    """A fingerprint as people write it, as an argument."""
    if not _FINGERPRINT.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "a fingerprint is 64 hexadecimal digits, in pairs with colons or without"
        )
    return text


def _ask(error: UnconfirmedError) -> None:
    """Have a person confirm a fingerprint.

    :raises UnconfirmedError: there is none to be asked.
    :raises RefusedError: they say no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        error.hint = "give it with --fingerprint, or --yes if you are sure without it"
        raise error
    print(
        f"the key at that address has the fingerprint\n  {shown.grouped(error.fingerprint)}", file=sys.stderr
    )
    print("is it the one that the other site's operator says? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nobody has confirmed the key: nothing is trusted")
