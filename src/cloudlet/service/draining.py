"""A site is emptied: it admits nothing new, and an operation hands what runs off to its peers.

What that operation does stands in :mod:`cloudlet.service.emptying`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError
from cloudlet.service import capacity
from cloudlet.service.work import operation
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import PEERS, CloudletState, Operation, Owned

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an operator wants of a drain."""

    deadline_seconds: float
    """No hand-off begins later, and those that have begun switch by then."""
    pause_seconds: float
    peers: Sequence[str] = ()
    """Ids: only these; none: all."""


class Draining:
    """Whether the site is emptied, and by which operation."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def begin(
        self, wanted: Wanted, by: Owned, remember: Remember = forget, request_id: str = ""
    ) -> Operation:
        """Admit nothing new from now on, and hand all that runs off to peers.

        :param by: the site's id, and who wants it.
        :raises NotFoundError: one of the peers is not there.
        :raises ConflictError: it is being done already.
        """
        asked = {
            "deadline_seconds": wanted.deadline_seconds,
            "pause_seconds": wanted.pause_seconds,
            "peers": list(wanted.peers),
        }

        def begin(connection: Connection) -> Operation:
            for peer in wanted.peers:
                PEERS.get(connection, peer)
            capacity.become(connection, CloudletState.DRAINING, by)
            for other in self._site.work.open_on(connection, self._site.id):
                raise ConflictError(
                    "the site is being emptied already",
                    hint=f"wait for operation {other.id}, or cancel it",
                )
            begun = operation("cloudlet.drain", by, {"cloudlet": self._site.id}, **asked)
            begun = self._site.work.add(connection, replace(begun, request_id=request_id))
            remember(connection, begun.id)
            return begun

        begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun

    def become(self, wanted: CloudletState, by: Owned) -> None:
        """Have the site admit nothing new, or admit instances again; then nothing more is handed off.

        :param by: the site's id, and who wants it.
        """

        def change(connection: Connection) -> list[Operation]:
            capacity.become(connection, wanted, by)
            return self._site.work.open_on(connection, self._site.id)

        begun = self._site.database.write(change)
        if wanted is CloudletState.UP:
            for one in begun:
                with suppress(ConflictError):  # it has just ended
                    self._site.work.cancel(one.id)
