"""Apps: what a publisher says of an overlay that is to be run, and bringing it here before it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError
from cloudlet.store import journal
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import APPS, INSTANCES, OVERLAYS, App, Operation

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite


class Apps:
    """The apps of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def create(self, app: App, remember: Remember = forget) -> App:
        """Publish an app.

        :raises NotFoundError: an overlay that it names is not here.
        :raises ConflictError: the project has it in this version already.
        """

        def insert(connection: Connection) -> App:
            for component in app.descriptor["components"]:
                OVERLAYS.get(connection, component["overlay_id"])
            APPS.insert(connection, app)
            remember(connection, app.id)
            journal.emit(connection, "app", "created", app, name=app.name, version=app.version)
            return app

        return self._site.database.write(insert)

    def update(self, app: App, public: bool | None, changes: Mapping[str, Any]) -> App:
        """Change an app, and some of its descriptor; what runs of it stays as it is."""

        def update(connection: Connection) -> App:
            before = APPS.get(connection, app.id, lock=True)
            after = APPS.update(
                connection,
                app.id,
                public=before.public if public is None else public,
                descriptor={**before.descriptor, **changes},
            )
            journal.emit(connection, "app", "updated", after, name=after.name, version=after.version)
            return after

        return self._site.database.write(update)

    def delete(self, app: App) -> None:
        """Withdraw an app.

        :raises ConflictError: it runs.
        """

        def remove(connection: Connection) -> None:
            if used := INSTANCES.count(connection, app_id=app.id):
                raise ConflictError(f"{used} instances run app {app.name}", hint="delete them first")
            APPS.delete(connection, app.id)
            journal.emit(connection, "app", "deleted", app, name=app.name, version=app.version)

        self._site.database.write(remove)

    def prestage(self, app: App) -> Operation:
        """Bring its overlay here."""

        def begin(connection: Connection) -> Operation:
            (component,) = app.descriptor["components"]
            overlay = OVERLAYS.get(connection, component["overlay_id"])
            return self._site.overlays.prestage(connection, overlay, app)

        begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun
