"""Who may do what: every row of the table with every persona, made from the table."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.api.operation import Operation
from cloudlet.api.table import TABLE
from cloudlet.service.options import Options
from cloudlet.store.rows import (
    APPS,
    BASES,
    HANDOFFS,
    INSTANCES,
    OPERATIONS,
    OVERLAYS,
    PEERS,
    WEBHOOKS,
    App,
    Base,
    Handoff,
    HandoffState,
    Instance,
    InstanceState,
    OperationState,
    Overlay,
    Peer,
    Rows,
    Webhook,
)
from cloudlet.store.rows import Operation as Work
from cloudlet.store.tokens import PeerTokens
from tests.service.conftest import USERS, Caller, Running, serving

PERSONAS = (*USERS, None)
"""The users of the site, and nobody. Each row of the site is mia's; max is another member of her project."""
MISSING = "00000000-0000-4000-8000-000000000000"
PUBLIC = [operation for operation in TABLE if operation.public]
GUARDED = [operation for operation in TABLE if not (operation.public or operation.for_peers)]
FOR_PEERS = [operation for operation in TABLE if operation.for_peers]

MAY = {
    # rule of the table: who may do it to mia's row, or make something new
    "rule:reader": {"root", "paula", "mia", "max", "rita"},
    "rule:member": {"root", "paula", "mia", "max"},
    "rule:publisher": {"root", "paula"},
    "rule:admin": {"root"},
    "rule:owner": {"root", "mia"},
    "rule:visible": {"root", "mia", "rita"},
}
SEES = {"root", "mia", "rita"}
"""Who sees mia's row: its owner, the operator, and who may only look at the project."""
SHARED = {BASES.noun}
"""Nouns whose rows everybody sees."""


@dataclass(frozen=True)
class Site:
    """A site with a row of mia's of each noun."""

    call: Caller
    ids: dict[str, str]
    peer: Ed25519PrivateKey
    """The key of the peer among the rows."""

    def path(self, operation: Operation) -> str:
        names = {name: self.ids[name.removesuffix("_id")] for name in operation.parameters}
        return operation.path.format(**names)


@pytest.fixture(scope="module")
def running(module_options: Options) -> Iterator[Running]:
    with serving(module_options) as running:
        yield running


@pytest.fixture
def site(running: Running) -> Iterator[Site]:
    key = Ed25519PrivateKey.generate()
    owner = {"project_id": "shop", "user_id": "mia"}
    sizes = {"base_identity": "0" * 64, "memory_bytes": 1, "disk_bytes": 1, "cpus": 1}
    overlay = Overlay(**owner, name="o")
    app = App(**owner, name="a", version="", public=False, descriptor=_descriptor(overlay.id))
    peer = Peer(**owner, name="p", url="https://127.0.0.1:9", fingerprint="", public_key=_public(key))
    handoff = {"instance_id": MISSING, "peer_id": peer.id, "epoch": 1, "state": HandoffState.REVERTED}
    rows: list[tuple[Rows[Any], Any]] = [
        (BASES, Base(**owner, name="b")),
        (OVERLAYS, overlay),
        (APPS, app),
        (INSTANCES, Instance(**owner, **sizes, name="i", state=InstanceState.DELETING)),  # type: ignore[arg-type]
        (OPERATIONS, Work(**owner, kind="instance.create", state=OperationState.SUCCEEDED)),
        (WEBHOOKS, Webhook(**owner, url="http://127.0.0.1:9/", secret="s" * 16, after=0)),
        (PEERS, peer),
        (HANDOFFS, Handoff(**owner, **handoff)),  # type: ignore[arg-type]
    ]
    database = running.site.database
    for kind, row in rows:
        database.write(lambda connection, kind=kind, row=row: kind.insert(connection, row))  # type: ignore[misc]
    yield Site(running.call, {kind.noun: row.id for kind, row in rows}, key)
    for kind, row in rows:
        database.write(lambda connection, kind=kind, row=row: kind.delete(connection, row.id))  # type: ignore[misc]


def _public(key: Ed25519PrivateKey) -> str:
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def _descriptor(overlay_id: str) -> dict[str, object]:
    components = [{"name": "main", "overlay_id": overlay_id}]
    return {"summary": "", "components": components, "restart": False, "lease_seconds": None, "intent": {}}


@pytest.mark.parametrize("persona", PERSONAS, ids=str)
@pytest.mark.parametrize("operation", GUARDED, ids=lambda operation: operation.rule)
def test_what_the_table_says_is_so(operation: Operation, persona: str | None, site: Site) -> None:
    # Without a body, and with bytes that are nothing: whether it may be tried is what is asked.
    answer = site.call.as_(persona)(operation.method, site.path(operation))
    status = answer.status_code
    if persona is None:
        assert status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        return
    allowed = persona in MAY[operation.check]
    if operation.rows is None:
        assert (status != 403) == allowed, answer.text
        assert status != 404, answer.text
        return
    seen = persona in SEES or operation.noun in SHARED
    if not seen:
        assert status == 404, answer.text
    elif not allowed:
        assert status == 403, answer.text
    else:
        assert status not in (401, 403, 404), answer.text


@pytest.mark.parametrize("persona", PERSONAS, ids=str)
@pytest.mark.parametrize("operation", FOR_PEERS, ids=lambda operation: operation.rule)
def test_what_is_for_peers_is_for_nobody_else(operation: Operation, persona: str | None, site: Site) -> None:
    answer = site.call.as_(persona)(operation.method, site.path(operation))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Cloudlet-Peer"


@pytest.mark.parametrize(
    "operation", [*GUARDED, *FOR_PEERS], ids=lambda operation: f"{operation.method} {operation.rule}"
)
def test_a_peer_may_do_what_is_for_peers_and_nothing_else(
    operation: Operation, running: Running, site: Site
) -> None:
    path, tokens = site.path(operation), PeerTokens(site.ids["peer"], site.peer)
    token = tokens.make(operation.method, path, running.site.id)
    headers = {"Authorization": f"Cloudlet-Peer {token}"}
    answer = site.call.as_(None)(operation.method, path, headers=headers)
    if operation.for_peers:
        assert answer.status_code not in (401, 403, 404), answer.text
    else:
        assert answer.status_code == 403, answer.text


@pytest.mark.parametrize(
    "operation", [row for row in FOR_PEERS if row.rows], ids=lambda row: f"{row.method} {row.rule}"
)
def test_what_is_shared_with_one_peer_is_not_there_for_another(
    operation: Operation, running: Running, site: Site
) -> None:
    database, key = running.site.database, Ed25519PrivateKey.generate()
    names = {"name": "another", "url": "https://127.0.0.1:9", "fingerprint": ""}
    other = Peer(project_id="shop", user_id="mia", **names, public_key=_public(key))
    database.write(lambda connection: PEERS.insert(connection, other))
    try:
        path = site.path(operation)
        token = PeerTokens(other.id, key).make(operation.method, path, running.site.id)
        headers = {"Authorization": f"Cloudlet-Peer {token}"}
        answer = site.call.as_(None)(operation.method, path, headers=headers)
        assert answer.status_code == 404, answer.text
    finally:
        database.write(lambda connection: PEERS.delete(connection, other.id))


@pytest.mark.parametrize("operation", PUBLIC, ids=lambda operation: operation.rule)
def test_what_is_public_is_answered_to_nobody(operation: Operation, site: Site) -> None:
    assert site.call.as_(None)(operation.method, operation.path).status_code in (200, 204)


@pytest.mark.parametrize("operation", [row for row in GUARDED if row.parameters], ids=lambda row: row.rule)
def test_what_is_not_there_is_not_there_for_anybody(operation: Operation, site: Site) -> None:
    for missing in (MISSING, "..%2f..%2fetc", "x" * 300, "%00", "1 OR 1=1"):
        path = operation.path.replace("{" + operation.parameters[0] + "}", missing)
        answer = site.call.as_("root")(operation.method, path)
        assert answer.status_code == 404, f"{path}: {answer.text}"


def test_lists_show_what_one_may_see(site: Site) -> None:
    for noun, body in (("overlays", "overlays"), ("apps", "apps"), ("instances", "instances")):
        for persona in USERS:
            rows = site.call.as_(persona).get(f"/v1/{noun}")[body]
            assert len(rows) == (persona in SEES), f"{persona} sees {rows}"


def test_a_wrong_password_is_nobody(site: Site) -> None:
    for credentials in (("root", "wrong"), ("nobody", "wrong"), ("root", ""), ("", "")):
        answer = site.call.session.get(f"{site.call.url}/v1/instances", auth=credentials, timeout=10)
        assert answer.status_code == 401
    for header in ("Basic", "Basic !!", "Basic AAAA", "Bearer x", "Basic " + "A" * 4000):
        headers = {"Authorization": header}
        answer = site.call.session.get(f"{site.call.url}/v1/instances", headers=headers, timeout=10)
        assert answer.status_code == 401, header
