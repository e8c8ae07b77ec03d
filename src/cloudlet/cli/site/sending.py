"""Sending files to a site: what is there already is not sent again, and what was cut goes on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from cloudlet.cli.site.command import SiteCommand
from cloudlet.errors import NotFoundError
from cloudlet.model import format_bytes

if TYPE_CHECKING:
    from cloudlet.client.resources import Base, Overlay
    from cloudlet.overlay.root import App


class Sends(SiteCommand):
    """A command that sends files."""

    def app_in(self, file: Path) -> App:
        """What an overlay's file says of its app; who signed it is for the site to judge.

        :raises IntegrityError: it is no overlay.
        """
        from cloudlet.overlay.reader import OverlayReader

        with file.open("rb") as stream:
            return OverlayReader(stream, None, allow_unsigned=True).root.app

    def send_overlay(self, file: Path, name: str, *, public: bool) -> Overlay:
        """The overlay at the site that has the bytes of a file."""
        digest = self._digest(file)
        for found in self.client.overlays(state="active", digest=digest):
            if found.public or not public:
                self.say(f"these bytes are there already, as overlay {found.name}, {found.id}")
                return found
        record = self._overlay(name, public, _retry_key("overlay", digest, name, str(public)))
        with self.progress("sending") as report:
            sent = self.client.upload_overlay(record, file, report)
        self.say(f"sent {format_bytes(file.stat().st_size)}, overlay {sent.id}")
        return sent

    def send_base(self, file: Path, name: str) -> Base:
        """The base at the site that has been made of an exported file."""
        key = _retry_key("base", self._digest(file), name)
        try:
            record = self.client.create_base(name, retry_key=key)
        except NotFoundError:  # it was, and has been deleted
            record = self.client.create_base(name)
        if record.state == "active":
            self.say(f"it is there already, as base {record.name}, {record.id}")
            return record
        with self.progress("sending") as report:
            operation = self.client.upload_base(record, file, report)
        self.wait(operation)
        return self.client.get_base(record.id)

    def _overlay(self, name: str, public: bool, key: str) -> Overlay:
        with suppress(NotFoundError):  # it was, and has been deleted
            return self.client.create_overlay(name, public=public, retry_key=key)
        return self.client.create_overlay(name, public=public)

    def _digest(self, file: Path) -> str:
        from cloudlet.client.transfers import digest_of

        with self.progress("reading") as report:
            return digest_of(file, report)


def _retry_key(*parts: str) -> str:
    """The same for the same file under the same name: a second try finds what the first one began."""
    digest = blake3("\0".join(parts).encode()).hexdigest()
    return f"sent-{digest}"
