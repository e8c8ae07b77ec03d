"""An operator's word where the other site answers after all, at another address, or without a memory."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from tests.service.handoff_faults import Cell
from tests.service.handoff_world import SOON, wait_for
from tests.service.test_operators_word import (  # noqa: F401 (fixtures)
    held,
    part,
    resolve,
    two,
    wait_state,
)
from tests.service.two_sites import PeerSite


def query(site: PeerSite, statement: str, *values: Any) -> list[Any]:
    """Ask a site's database, or change it behind its back."""
    place = site.folder / "state" / "site.sqlite"
    with closing(sqlite3.connect(place, timeout=30, isolation_level=None)) as database:
        return database.execute(statement, values).fetchall()


@contextmanager
def peer_at(site: PeerSite, url: str) -> Iterator[None]:
    """Have the row of a site's peer say that it is elsewhere, which nobody is told."""
    ((before,),) = query(site, "SELECT url FROM peers WHERE id = ?", site.peer_id)
    query(site, "UPDATE peers SET url = ? WHERE id = ?", url, site.peer_id)
    try:
        yield
    finally:
        query(site, "UPDATE peers SET url = ? WHERE id = ?", before, site.peer_id)


def order(site: PeerSite, cell: Cell) -> dict[str, Any]:
    """What a site remembers of what was asked for."""
    ((text,),) = query(site, 'SELECT "order" FROM handoffs WHERE id = ?', cell.view.handoff)
    return dict(json.loads(text))


def test_nothing_is_kept_that_the_peer_answers_to_have(held: Cell) -> None:  # noqa: F811
    """Though its keeper asks at an address where nobody answers any more."""
    epoch = held.source.call.instance(held.instance_id)["epoch"]
    path = f"/v1/peer/handoffs/{held.view.handoff}/commit"
    said = held.ask(held.source_id, held.source_key, "POST", path, json={"epoch": epoch})
    assert said[0] == 200 and said[1]["handoff"]["state"] == "running"
    with peer_at(held.source, held.target_url):
        assert resolve(held, held.source, "keep") == 409
    held.towards.open()
    for site in (held.source, held.target):
        wait_state(held, site, "completed")
    assert not held.world.observer.ran_twice


def test_who_goes_on_without_a_keeper_asks_where_the_peer_is_now(held: Cell) -> None:  # noqa: F811
    part(held)
    wait_state(held, held.source, "in_doubt")
    with peer_at(held.source, held.target_url):
        for site in (held.source, held.target):
            wait_state(held, site, "completed")
    instance = held.target.call.instance(held.instance_id)
    assert instance["state"] == "active"


def test_what_was_reverted_after_the_switch_is_marked(held: Cell) -> None:  # noqa: F811
    part(held)
    wait_state(held, held.source, "in_doubt")
    assert resolve(held, held.source, "keep") == 200
    wait_state(held, held.source, "reverted")
    wait_state(held, held.target, "in_doubt")
    assert resolve(held, held.target, "give_back") == 200
    wait_state(held, held.target, "reverted")
    for site in (held.source, held.target):
        assert order(site, held)["switched"] == "yes"


def test_what_a_source_knows_nothing_of_may_be_taken(held: Cell) -> None:  # noqa: F811
    """As one does whose database was restored from before."""
    held.towards.cut()
    held.source.end(signal.SIGKILL)
    query(held.source, "DELETE FROM operations WHERE subject = ?", held.instance_id)
    query(held.source, "DELETE FROM handoffs WHERE id = ?", held.view.handoff)
    query(held.source, "DELETE FROM instances WHERE id = ?", held.instance_id)
    held.source.start()
    wait_for(lambda: not held.world.guests(held.which), SOON, "its machine is left at the source")
    assert resolve(held, held.target, "take") == 200
    wait_state(held, held.target, "completed")
    taken = held.target.call.get(f"/v1/handoffs/{held.view.handoff}")["handoff"]
    assert "knows of no such hand-off" in taken["error"]["detail"]
    assert held.target.call.instance(held.instance_id)["state"] == "active"
