"""``cloudlet image ...``: the apps that were started here and can start again without being downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cliff.lister import Lister

from cloudlet.cli.command import CloudletCommand


class List(CloudletCommand, Lister):
    """List the images of apps that are kept here, the one that was used last at the end.

    An image is made when an app has arrived while it ran. A further start of the same overlay maps it and
    shares its memory. It is a cache: image_cache_mib in the settings says how much it may take.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        rows = []
        for image in self.app.site().images.all():
            used = datetime.fromtimestamp(image.used, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            what = (image.overlay_id[:16], image.app, image.version, image.base_id[:16])
            rows.append((*what, image.bytes_on_disk(), used))
        return ("overlay", "app", "version", "base", "bytes_on_disk", "used"), rows


class Delete(CloudletCommand):
    """Remove images; machines that run from them go on, and the next start downloads its overlay."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "images", nargs="+", metavar="IMAGE", help="the beginning of its overlay's id, or its app's name"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        store = self.app.site().images
        for reference in parsed_args.images:
            image = store.get(reference)
            store.delete(image)
            self.app.say(f"the image of {image.app} {image.version} is removed")
