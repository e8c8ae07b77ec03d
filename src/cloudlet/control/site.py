"""The site: everything a story needs, wired once.

This is the one place that knows which driver, which store and which key ring there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from stevedore import DriverManager
from stevedore.exception import NoMatches

from cloudlet.errors import NotFoundError
from cloudlet.hypervisor.driver import Hypervisor
from cloudlet.hypervisor.fake.driver import FakeHypervisor
from cloudlet.hypervisor.qemu.driver import QemuHypervisor
from cloudlet.hypervisor.records import abandon
from cloudlet.model import MEBIBYTE
from cloudlet.settings import Settings
from cloudlet.store.bases import BaseStore
from cloudlet.store.hints import HintStore
from cloudlet.store.images import ImageStore
from cloudlet.store.keyring import KeyRing

DRIVERS = "cloudlet.hypervisors"
"""Entry points of other packages' drivers: each is called with the settings."""
_OURS: dict[str, Callable[[Settings], Hypervisor]] = {"qemu": QemuHypervisor, "fake": FakeHypervisor}


@dataclass(frozen=True, slots=True)
class Site:
    """A cloudlet on this machine."""

    settings: Settings
    hypervisor: Hypervisor
    bases: BaseStore
    keys: KeyRing
    images: ImageStore
    hints: HintStore

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The site of these settings; what dead processes left in its folders is removed."""
        site = cls(
            settings,
            _hypervisor(settings),
            BaseStore(settings.bases_dir),
            KeyRing(settings.keys_dir),
            ImageStore(settings.images_dir, settings.image_cache_mib * MEBIBYTE),
            HintStore(settings.hints_dir),
        )
        site.hypervisor.reap()
        site.bases.reap()
        site.images.reap()
        return site

    @staticmethod
    def abandon(settings: Settings) -> None:
        """Remove what this process has begun and not finished, at its end after an interrupt."""
        for folder in (settings.instances_dir, settings.bases_dir, settings.images_dir):
            abandon(folder)


def _hypervisor(settings: Settings) -> Hypervisor:
    if ours := _OURS.get(settings.hypervisor):
        return ours(settings)
    try:
        manager: DriverManager[Any] = DriverManager(DRIVERS, settings.hypervisor)
    except NoMatches as error:
        raise NotFoundError(
            f"there is no hypervisor driver {settings.hypervisor!r}",
            hint=f"ours are: {', '.join(_OURS)}; install the package that has it",
        ) from error
    hypervisor: Hypervisor = manager.driver(settings)
    return hypervisor
