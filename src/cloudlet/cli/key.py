"""``cloudlet key ...``: keys that sign overlays, and keys whose overlays run here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliff.lister import Lister

from cloudlet.cli.command import CloudletCommand
from cloudlet.store.keyring import DEFAULT, KeyRing


class _Key(CloudletCommand):
    @property
    def ring(self) -> KeyRing:
        return KeyRing(self.app.settings.keys_dir)


class Create(_Key):
    """Make a key to sign overlays with; it is trusted here."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", nargs="?", default=DEFAULT, help=f"its name (default: {DEFAULT})")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        key = self.ring.generate(parsed_args.name)
        self.app.say(f"key {key.name} ({key.key_id.hex()[:16]}) signs here and is trusted here")


class List(_Key, Lister):
    """List the keys of this site."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        rows = [
            (key.name, key.key_id.hex()[:16], "yes" if key.signs else "no", "yes" if key.trusted else "no")
            for key in self.ring.all()
        ]
        return ("name", "id", "signs", "trusted"), rows


class Show(_Key):
    """Print the public half of a key, for other sites to trust."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", nargs="?", default=DEFAULT, help=f"the key (default: {DEFAULT})")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        self.app.stdout.write(self.ring.public_pem(parsed_args.name).decode())


class Trust(_Key):
    """Let overlays run here that are signed by a key.

    Example: cloudlet key trust alice alice.pub
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", help="what to call the key here")
        parser.add_argument(
            "file", type=Path, help="its public half, from 'cloudlet key show' at the publisher's"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        key = self.ring.trust(parsed_args.file, parsed_args.name)
        self.app.say(f"key {key.name} ({key.key_id.hex()[:16]}) is trusted here")


class Distrust(_Key):
    """No longer let overlays run here that are signed by a key."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", help="what the key is called here")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        self.ring.distrust(parsed_args.name)
        self.app.say(f"key {parsed_args.name} is no longer trusted here")
