"""``cloudlet-manage blobs ...``: the bytes of a site's overlays."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from cliff.lister import Lister

from cloudlet.cli.exclusive import only_server
from cloudlet.cli.manage.command import ManageCommand
from cloudlet.cli.manage.database import opened
from cloudlet.cli.progress import progress_bar
from cloudlet.errors import CorruptError
from cloudlet.service.options import Options
from cloudlet.store.blobs import BlobStore
from cloudlet.store.database import Database

_HARMLESS = "not in the database"


class Verify(ManageCommand, Lister):
    """Read all blobs and list what is damaged, missing, or spoken of nowhere.

    The exit code is 7 if something is damaged or missing. A site may be served meanwhile.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        options = self.site_options
        with (
            opened(options.database_url) as database,
            progress_bar("reading", in_bytes=True, quiet=self.app.quiet) as progress,
        ):
            store = _store(database, options)
            found = store.verify(progress)
            rows = [(damage.digest, damage.what, ", ".join(store.holders(damage.digest))) for damage in found]
        return ("digest", "what", "held by"), rows

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Any]
    ) -> int:
        rows = list(data)
        status = super().produce_output(parsed_args, column_names, rows)
        if bad := sum(what != _HARMLESS for _, what, _ in rows):
            raise CorruptError(f"{bad} blobs are damaged or missing", hint="upload their overlays again")
        return status


class Reap(ManageCommand):
    """Remove files of blobs that no overlay and no instance knows; refused while the site is served."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        options = self.site_options
        with only_server(options.machine.state_dir), opened(options.database_url) as database:
            removed = _store(database, options).reap()
        self.app.say(f"{len(removed)} files were removed")


def _store(database: Database, options: Options) -> BlobStore:
    return BlobStore(database, options.blobs_dir, options.limits.blob_cache_bytes)
