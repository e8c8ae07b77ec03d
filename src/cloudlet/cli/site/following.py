"""``cloudlet instance follow``: where an instance is reached, at whichever site it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cloudlet.cli.command import printable
from cloudlet.cli.site.command import ShowsOne, add_which
from cloudlet.cli.site.shown import Columns

if TYPE_CHECKING:
    from cloudlet.client.following import Located
    from cloudlet.client.resources import Event

_UNREACHED = ("ended", "failed", "deleting", "deleted")
"""What happens to an instance that has no endpoints afterwards, and whose event does not say so."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an instance is reached, since a moment."""

    time: str
    state: str
    site: str
    endpoints: tuple[Mapping[str, Any], ...]

    def same(self, other: Place) -> bool:
        """Whether nothing has changed for who uses it."""
        return (self.site, self.endpoints) == (other.site, other.endpoints)


class Follow(ShowsOne):
    """Tell where an instance is reached, and again whenever that changes, until its end.

    It is followed to the cloudlets that it is handed off to, with the same user and password. Each change is
    a line as soon as it is known (with -f json, a line of JSON), until Ctrl-C.

    Example: cloudlet instance follow hello -f json
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        found = self.client.locate_instance(self.client.find_instance(parsed_args.instance))
        as_json = parsed_args.formatter == "json"
        try:
            for place in places(found):
                self.app.stdout.write(f"{json.dumps(asdict(place)) if as_json else _line(place)}\n")
                self.app.stdout.flush()
        finally:
            if found.site is not self.client:
                found.site.close()
        return (), ()

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Sequence[Any]]
    ) -> int:
        return 0  # all has been said


def places(found: Located) -> Iterator[Place]:
    """Where an instance that was found is reached, then each change of that, until it is deleted."""
    row = found.instance
    place = Place(row.updated_at, row.state, found.site.place, tuple(map(_endpoint, row.endpoints)))
    yield place
    for event in found.site.follow_instance(row, found.events_after):
        before, place = place, _after(event, place)
        if not place.same(before) or place.state == "deleted":
            yield place


def _after(event: Event, place: Place) -> Place:
    """The place after something happened."""
    detail, what = event.detail, event.kind.rpartition(".")[2]
    now = replace(place, time=event.time, state=str(detail.get("state") or what))
    if moved_to := detail.get("moved_to"):
        return replace(now, site=moved_to["url"], endpoints=tuple(map(_endpoint, moved_to["endpoints"])))
    if "endpoints" in detail:
        return replace(now, site=event.site, endpoints=tuple(map(_endpoint, detail["endpoints"])))
    return replace(now, endpoints=()) if what in _UNREACHED else now


def _endpoint(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """An endpoint of an instance, or of an event."""
    return {"name": told["name"], "url": told["url"], "guest_port": told["guest_port"]}


def _line(place: Place) -> str:
    reached = ", ".join(f"{one['url']} (port {one['guest_port']})" for one in place.endpoints)
    site = place.site or "a site that does not say where its API is"
    return printable(f"{place.time} {place.state} at {site}: {reached or 'not reached'}")
