"""``cloudlet base upload``, ``download`` and ``fetch``, ``cloudlet site base ...``: bases at a site."""

from __future__ import annotations

import argparse
from pathlib import Path

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_which
from cloudlet.cli.site.sending import Sends
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.model import format_bytes


class Upload(Sends, ShowsOne):
    """Send a base VM to a site, as the file that 'base export' wrote.

    After a cut, the same command goes on where it was.

    Example: cloudlet base upload debian-12.base --name debian-12
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", type=Path, metavar="FILE", help="a file from 'base export'")
        parser.add_argument("--name", help="what to call it there (default: the file's name)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        name = parsed_args.name or parsed_args.file.name.removesuffix(".base")
        return shown.columns(shown.base(self.send_base(parsed_args.file, name)))


class Download(SiteCommand):
    """Fetch a base VM from a site to a file that 'base import' takes, and check it against the site's digest.

    After a cut, the same command goes on where it was.

    Example: cloudlet base download debian-12 -o debian-12.base
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "base")
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="the file to write"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        base = self.client.find_base(parsed_args.base)
        with self.progress("receiving") as report:
            self.client.download_base(base, parsed_args.output, report)
        self.say(f"{parsed_args.output}: {format_bytes(parsed_args.output.stat().st_size)}")


class Fetch(ShowsOne):
    """Have a site fetch a base VM from a URL, where a file from 'base export' is; this machine is not passed.

    Ctrl-C ends the waiting, and not what the site does.

    Example: cloudlet base fetch https://bases.example.org/debian-12.base
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("url", metavar="URL", help="where the site finds the file: http(s)")
        parser.add_argument("--name", help="what to call it there (default: as the file says)")
        parser.add_argument("--no-wait", action="store_true", help="do not wait until it is there")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        operation = self.client.fetch_base(parsed_args.url, parsed_args.name)
        if not parsed_args.no_wait:
            operation = self.wait(operation)
        base = self.client.get_base(operation.resources["base"])
        return shown.columns({**shown.base(base), "operation_id": operation.id})


class List(Lists):
    """List the bases at a site."""

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        rows = self.client.bases(max_items=parsed_args.limit)
        return shown.table(("id", "name", "state", "identity", "memory_bytes", "size"), rows, shown.base)


class Show(ShowsOne):
    """Show a base at a site."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "base")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.base(self.client.find_base(parsed_args.base)))


class Delete(SiteCommand):
    """Delete bases at a site, for its operator; refused while instances stand on them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "base", several=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        for base in [self.client.find_base(name) for name in parsed_args.base]:
            self.client.delete_base(base)
            self.say(f"base {base.name} is deleted")
