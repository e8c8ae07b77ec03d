"""``cloudlet overlay upload`` and ``download``, ``cloudlet site overlay ...``: overlays at a site."""

from __future__ import annotations

import argparse
from pathlib import Path

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_which
from cloudlet.cli.site.sending import Sends
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.model import format_bytes


class Upload(Sends, ShowsOne):
    """Send an overlay's file to a site, which verifies it.

    What is there already is not sent again; after a cut, the same command goes on where it was.

    Example: cloudlet overlay upload route-planner.overlay
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", type=Path, metavar="FILE", help="an overlay")
        parser.add_argument("--name", help="what to call it there (default: as its app is called)")
        parser.add_argument("--public", action="store_true", help="let every user of the site start it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        name = self.app_in(parsed_args.file).name
        sent = self.send_overlay(parsed_args.file, parsed_args.name or name, public=parsed_args.public)
        return shown.columns(shown.overlay(sent))


class Download(SiteCommand):
    """Fetch an overlay from a site to a file, and check it against the site's digest.

    After a cut, the same command goes on where it was.

    Example: cloudlet overlay download my-hello -o my-hello.overlay
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "overlay")
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="the file to write"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        overlay = self.client.find_overlay(parsed_args.overlay)
        with self.progress("receiving") as report:
            got = self.client.download_overlay(overlay, parsed_args.output, report)
        self.say(f"{parsed_args.output}: {format_bytes(got.size or 0)}")


class List(Lists):
    """List the overlays at a site."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--name", help="only those of this name")
        parser.add_argument("--state", help="only those in this state: queued, uploading, active, rejected")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        query = {"name": parsed_args.name, "state": parsed_args.state}
        rows = self.client.overlays(max_items=parsed_args.limit, **query)
        return shown.table(("id", "name", "state", "app", "version", "size", "public"), rows, shown.overlay)


class Show(ShowsOne):
    """Show an overlay at a site."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "overlay")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.overlay(self.client.find_overlay(parsed_args.overlay)))


class Delete(SiteCommand):
    """Delete overlays at a site; refused while instances run from them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "overlay", several=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        for overlay in [self.client.find_overlay(name) for name in parsed_args.overlay]:
            self.client.delete_overlay(overlay)
            self.say(f"overlay {overlay.name} is deleted")
