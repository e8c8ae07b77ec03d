"""The images of a site: apps whose pages are here as files, so that a further start has nothing to build.

An image is an overlay's layer and device state, as they were built and verified when the overlay arrived. It
is named by the overlay's identity and is used only under an overlay's head that was verified again. It is a
cache: what was not used for longest goes when there are more bytes than allowed, and nothing is lost by
that. A machine that stands on an image holds its files open, and so does not mind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cloudlet.errors import IntegrityError, NotFoundError, RefusedError
from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.records import Workspace, folder_lock, reap
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.root import Root

RAM, DISK, DEVICE_STATE, MAP = "ram", "disk.qcow2", "device-state", "map"
_DOCUMENT = "image.json"
_NEW = ".new-"


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here."""

    path: Path
    app: str
    version: str
    base_id: str
    used: float
    """When it was last used, in seconds since 1970."""

    @property
    def overlay_id(self) -> str:
        return self.path.name

    def read(self, root: Root) -> tuple[Layer, bytes] | None:
        """Its layer and device state, for the overlay with this root; None if they are not as they were."""
        try:
            pages = PageMap.decode((self.path / MAP).read_bytes(), root)
            device_state = (self.path / DEVICE_STATE).read_bytes()
            layer = layer_in(self.path, self.overlay_id, pages)
            sound = layer.ram.stat().st_size == root.machine.memory_bytes and layer.disk.stat().st_size > 0
        except (OSError, IntegrityError):
            return None
        return (layer, device_state) if sound and len(device_state) == root.totals.device_bytes else None

    def bytes_on_disk(self) -> int:
        """Bytes it takes on this machine's disk."""
        return sum(file.stat().st_blocks * 512 for file in self.path.iterdir())


class ImageStore:
    """The folder of all images; ``limit`` is how many bytes they may take, 0 keeps none."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def all(self) -> list[Image]:
        """All images, the one that was used last at the end."""
        found = [self._read(document.parent) for document in self.folder.glob(f"*/{_DOCUMENT}")]
        return sorted((image for image in found if image), key=lambda image: image.used)

    def find(self, overlay_id: str) -> Image | None:
        """The image of an overlay, which counts as a use of it; None if it is not here."""
        image = self._read(self.folder / overlay_id)
        if image:
            with contextlib.suppress(OSError):
                os.utime(image.path / _DOCUMENT)
        return image

    def get(self, reference: str) -> Image:
        """The image whose overlay's identity begins so, or the last used of the app with this name.

        :raises NotFoundError: there is none.
        """
        for image in reversed(self.all()):
            if image.app == reference or (len(reference) >= 4 and image.overlay_id.startswith(reference)):
                return image
        raise NotFoundError(f"there is no image {reference!r} here", hint="cloudlet image list")

    def obstacle(self) -> str:
        """Why no image can be built here, and what to do; empty if one can."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return f"{self.folder} cannot be written ({error.strerror}): name another with --cache-dir"
        if not os.access(self.folder, os.W_OK | os.X_OK):
            return f"{self.folder} cannot be written: name another with --cache-dir"
        return ""

    def workspace(self) -> Workspace:
        """A folder to build an image in; when it is left it is gone."""
        return Workspace.create(self.folder, prefix=_NEW)

    def adopt(self, folder: Path, overlay_id: str, root: Root, device_state: bytes, pages: PageMap) -> bool:
        """Keep the layer in ``folder`` (:func:`layer_in`), if there is room; whether it is kept.

        All of it is on the disk before it has its name: after a power cut a page that was not written would
        read as zeros.
        """
        size = sum((folder / name).stat().st_blocks * 512 for name in (RAM, DISK))
        if size > self.limit:
            return False
        staged = folder / "adopted"
        staged.mkdir(mode=0o755)
        for name in (RAM, DISK):
            (folder / name).rename(staged / name)
        (staged / DEVICE_STATE).write_bytes(device_state)
        (staged / MAP).write_bytes(pages.encode())
        document = {"app": root.app.name, "version": root.app.version, "base": root.base}
        (staged / _DOCUMENT).write_text(json.dumps(document))
        for path in (*staged.iterdir(), staged):
            _write_through(path)
        with folder_lock(self.folder):
            target = self.folder / overlay_id
            if self._read(target):  # another start of the same app was as fast
                return True
            self._make_room(size)
            self._remove(target, self.folder / f".deleted-{overlay_id[:16]}")  # what is none
            staged.rename(target)
        _write_through(self.folder)
        return True

    def delete(self, image: Image) -> None:
        """Remove an image."""
        # Renamed first: one that is half removed must not look like one.
        doomed = self.folder / f".deleted-{image.overlay_id[:16]}"
        with folder_lock(self.folder):
            self._remove(image.path, doomed)

    def delete_of_base(self, base_id: str) -> None:
        """Remove the images of a base, without which they are of no use."""
        for image in self.all():
            if image.base_id == base_id:
                self.delete(image)

    def reap(self) -> list[str]:
        """Remove what dead processes left."""
        removed = reap(self.folder)
        if doomed := list(self.folder.glob(".deleted-*")):
            with contextlib.suppress(RefusedError), folder_lock(self.folder):
                for left in doomed:
                    shutil.rmtree(left, ignore_errors=True)
        return removed

    def _make_room(self, wanted: int) -> None:
        images = self.all()
        taken = sum(image.bytes_on_disk() for image in images)
        for image in images:
            if taken + wanted <= self.limit:
                return
            taken -= image.bytes_on_disk()
            self._remove(image.path, self.folder / f".deleted-{image.overlay_id[:16]}")

    @staticmethod
    def _remove(path: Path, doomed: Path) -> None:
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    @staticmethod
    def _read(path: Path) -> Image | None:
        document = path / _DOCUMENT
        try:
            told = json.loads(document.read_text())
            used = document.stat().st_mtime
            return Image(path, str(told["app"]), str(told["version"]), str(told["base"]), used)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _write_through(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def layer_in(folder: Path, overlay_id: str, pages: PageMap) -> Layer:
    """The layer whose files are in a folder."""
    return Layer(overlay_id, pages, folder / RAM, folder / DISK)
