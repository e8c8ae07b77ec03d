"""What a user would write otherwise, to measure a site's API beside it: falcon and SQLAlchemy, and no more.

``python -m benchmarks.site_bare DATABASE`` serves the instances of a copy of a site's database, by the same
HTTP server, with as many threads. There is no authentication, no policy, no validation, no log, no event and
no work to be done; a new instance is two rows in one transaction.
"""

from __future__ import annotations

import sys
import uuid
from datetime import UTC, datetime
from typing import Any

import falcon
import sqlalchemy as sa
from cheroot.wsgi import Server
from sqlalchemy.engine import Engine, Row

from cloudlet.store.tables import instances, operations

_THREADS = 16
"""As many as a site has by default."""


class Instances:
    """A resource as falcon's tutorial has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List instances."""
        query = sa.select(instances).where(instances.c.project_id == req.get_param("project_id"))
        query = query.order_by(instances.c.created_at, instances.c.id).limit(req.get_param_as_int("limit"))
        with self._engine.connect() as connection:
            resp.media = {"instances": [_shown(row) for row in connection.execute(query)]}

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Note an instance, and the operation that would make it."""
        asked = req.get_media()["instance"]
        moment = datetime.now(UTC)
        owned = {"project_id": "shop", "user_id": "mia", "created_at": moment, "updated_at": moment}
        instance = owned | {
            "id": str(uuid.uuid4()), "name": "hello", "state": "requested", "app_id": asked["app_id"],
            "overlay_id": None, "base_identity": "", "memory_bytes": 1 << 22, "disk_bytes": 1 << 22,
            "cpus": 1, "order": {}, "endpoints": [], "metadata": {}, "timings": {}, "lease_seconds": None,
            "expires_at": None, "warned": False, "restart": False, "restarts": 0, "error": None,
        }  # fmt: skip
        operation = owned | {
            "id": str(uuid.uuid4()), "kind": "instance.create", "state": "pending",
            "resources": {"instance": instance["id"]}, "input": {}, "steps": [], "error": None,
            "cancelled": False, "request_id": "",
        }  # fmt: skip
        with self._engine.begin() as connection:
            connection.execute(sa.insert(instances).values(instance))
            connection.execute(sa.insert(operations).values(operation))
        resp.status = falcon.HTTP_202
        resp.location = f"/v1/operations/{operation['id']}"
        resp.media = {"operation": _plain(operation)}


class Instance:
    """One instance."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_get(self, req: falcon.Request, resp: falcon.Response, instance_id: str) -> None:
        """Show an instance."""
        query = sa.select(instances).where(instances.c.id == instance_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise falcon.HTTPNotFound
        resp.media = {"instance": _shown(row)}


def _shown(row: Row[Any]) -> dict[str, Any]:
    return _plain(row._mapping)


def _plain(values: Any) -> dict[str, Any]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()
    }


def main() -> None:
    """Serve until killed, and say where."""
    engine = sa.create_engine(f"sqlite:///{sys.argv[1]}")

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        # As a site's: nobody waits for the disk.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}")

    app = falcon.App()
    app.add_route("/v1/instances", Instances(engine))
    app.add_route("/v1/instances/{instance_id}", Instance(engine))
    server = Server(("127.0.0.1", 0), app, numthreads=_THREADS)
    server.prepare()
    print(f"http://127.0.0.1:{server.bind_addr[1]}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
