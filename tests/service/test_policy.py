"""Who may do what: every row of the table with every persona, made from the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cloudlet.api.operation import Operation
from cloudlet.api.table import TABLE
from cloudlet.service.options import Options
from cloudlet.store.rows import (
    APPS,
    BASES,
    INSTANCES,
    OPERATIONS,
    OVERLAYS,
    WEBHOOKS,
    App,
    Base,
    Instance,
    InstanceState,
    OperationState,
    Overlay,
    Rows,
    Webhook,
)
from cloudlet.store.rows import Operation as Work
from tests.service.conftest import USERS, Caller, Running, serving

PERSONAS = (*USERS, None)
"""The users of the site, and nobody. Each row of the site is mia's; max is another member of her project."""
MISSING = "00000000-0000-4000-8000-000000000000"
PUBLIC = [operation for operation in TABLE if operation.public]
GUARDED = [operation for operation in TABLE if not operation.public]

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

    def path(self, operation: Operation) -> str:
        names = {name: self.ids[name.removesuffix("_id")] for name in operation.parameters}
        return operation.path.format(**names)


@pytest.fixture(scope="module")
def running(module_options: Options) -> Iterator[Running]:
    with serving(module_options) as running:
        yield running


@pytest.fixture
def site(running: Running) -> Iterator[Site]:
    owner = {"project_id": "shop", "user_id": "mia"}
    sizes = {"base_identity": "0" * 64, "memory_bytes": 1, "disk_bytes": 1, "cpus": 1}
    overlay = Overlay(**owner, name="o")
    app = App(**owner, name="a", version="", public=False, descriptor=_descriptor(overlay.id))
    rows: list[tuple[Rows[Any], Any]] = [
        (BASES, Base(**owner, name="b")),
        (OVERLAYS, overlay),
        (APPS, app),
        (INSTANCES, Instance(**owner, **sizes, name="i", state=InstanceState.DELETING)),  # type: ignore[arg-type]
        (OPERATIONS, Work(**owner, kind="instance.create", state=OperationState.SUCCEEDED)),
        (WEBHOOKS, Webhook(**owner, url="http://127.0.0.1:9/", secret="s" * 16, after=0)),
    ]
    database = running.site.database
    for kind, row in rows:
        database.write(lambda connection, kind=kind, row=row: kind.insert(connection, row))  # type: ignore[misc]
    yield Site(running.call, {kind.noun: row.id for kind, row in rows})
    for kind, row in rows:
        database.write(lambda connection, kind=kind, row=row: kind.delete(connection, row.id))  # type: ignore[misc]


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
