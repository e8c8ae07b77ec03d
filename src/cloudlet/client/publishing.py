"""What publishers bring to a site: bases, overlays, apps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloudlet.client import transfers
from cloudlet.client.asking import Asking, id_of, retry_headers
from cloudlet.client.resources import App, Base, Operation, Overlay
from cloudlet.client.transfers import Progress
from cloudlet.errors import ConflictError


class Publishing(Asking):
    """The verbs of bases, overlays and apps."""

    def bases(self, **query: Any) -> Iterator[Base]:
        """All bases with these values."""
        return self._listed(Base, query)

    def get_base(self, base: str | Base) -> Base:
        return self._get(Base, base)

    def find_base(self, name_or_id: str) -> Base:
        return self._named(Base, name_or_id)

    def create_base(self, name: str, *, retry_key: str | None = None) -> Base:
        """Make the record of a base whose file is to be uploaded."""
        return self._made(Base, {"name": name}, retry_key)

    def upload_base(self, base: str | Base, file: Path, progress: Progress | None = None) -> Operation:
        """Send the exported file of a base; its last byte begins the import."""
        key = id_of(base)

        def whole() -> bool:
            return self.get_base(key).state in ("verifying", "active")

        if answer := transfers.upload(self, f"/bases/{key}/file", file, whole, progress):
            return self._begun(answer)
        imports = self._listed(Operation, {"kind": "base.import", "sort": "created_at:desc"})
        return next(operation for operation in imports if operation.resources["base"] == key)

    def fetch_base(self, url: str, name: str | None = None, *, retry_key: str | None = None) -> Operation:
        """Have the site fetch a base's exported file; ``resources["base"]`` of the operation is its id.

        :param name: what to call it there; without, as the file says.
        """
        wanted = {"url": url, **({"name": name} if name else {})}
        headers = retry_headers(retry_key)
        return self._begun(self.post("/bases", json={"base": wanted}, headers=headers))

    def download_base(self, base: str | Base, target: Path, progress: Progress | None = None) -> Base:
        """Fetch the exported file of a base, on from where an earlier try ended, and check it.

        :raises CorruptError: it is not what the site says it is.
        """
        found = self.get_base(id_of(base))
        url = f"/bases/{found.id}/file"
        digest, size = transfers.described(self, url)
        transfers.download(self, url, target, digest, size, progress)
        return found

    def delete_base(self, base: str | Base) -> None:
        self._delete(Base, id_of(base), ignore_missing=False)

    def overlays(self, **query: Any) -> Iterator[Overlay]:
        """All overlays with these values."""
        return self._listed(Overlay, query)

    def get_overlay(self, overlay: str | Overlay) -> Overlay:
        return self._get(Overlay, overlay)

    def find_overlay(self, name_or_id: str) -> Overlay:
        return self._named(Overlay, name_or_id)

    def create_overlay(self, name: str, *, retry_key: str | None = None, **attributes: Any) -> Overlay:
        """Make the record of an overlay whose bytes are to be uploaded, or are at ``url``.

        Who repeats it with the same ``retry_key`` gets the same record.
        """
        return self._made(Overlay, {"name": name, **attributes}, retry_key)

    def upload_overlay(self, overlay: str | Overlay, file: Path, progress: Progress | None = None) -> Overlay:
        """Send the bytes of an overlay, on from where the site has them; the last one makes it active."""
        key = id_of(overlay)

        def whole() -> bool:
            return self.get_overlay(key).state == "active"

        transfers.upload(self, f"/overlays/{key}/file", file, whole, progress)
        return self.get_overlay(key)

    def download_overlay(
        self, overlay: str | Overlay, target: Path, progress: Progress | None = None
    ) -> Overlay:
        """Fetch the bytes of an overlay to a file, on from where an earlier try ended, and check them.

        :raises CorruptError: they are not what the site says they are.
        """
        found = self.get_overlay(id_of(overlay))
        if found.digest is None or found.size is None or found.state != "active":
            raise ConflictError(f"overlay {found.id} is {found.state}", hint="its bytes are not at the site")
        url = f"/overlays/{found.id}/file"
        transfers.download(self, url, target, found.digest, found.size, progress)
        return found

    def delete_overlay(self, overlay: str | Overlay) -> None:
        self._delete(Overlay, id_of(overlay), ignore_missing=False)

    def apps(self, **query: Any) -> Iterator[App]:
        """All apps with these values."""
        return self._listed(App, query)

    def get_app(self, app: str | App) -> App:
        return self._get(App, app)

    def find_app(self, name_or_id: str) -> App:
        return self._named(App, name_or_id)

    def create_app(
        self, name: str, overlay: str | Overlay, component: Mapping[str, Any] | None = None, **attributes: Any
    ) -> App:
        """Publish an app of an overlay.

        :param component: what else there is to say of its VM: ``ports``, ``readiness``.
        """
        components = [{"overlay_id": id_of(overlay), **(component or {})}]
        return self._made(App, {"name": name, "components": components, **attributes})

    def update_app(self, app: str | App, **changes: Any) -> App:
        """Change an app; what runs of it stays as it is."""
        return self._changed(App, id_of(app), changes)

    def delete_app(self, app: str | App) -> None:
        self._delete(App, id_of(app), ignore_missing=False)

    def prestage_app(self, app: str | App) -> Operation:
        """Have the site fetch what the app needs before somebody asks for it."""
        return self._begun(self.post(f"/apps/{id_of(app)}/prestage"))
