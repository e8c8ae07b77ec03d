"""The site: everything a story needs, wired once.

This is the one place that knows which driver, which store and which key ring there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cloudlet.hypervisor.driver import Hypervisor
from cloudlet.hypervisor.qemu.driver import QemuHypervisor
from cloudlet.hypervisor.records import abandon
from cloudlet.settings import Settings
from cloudlet.store.bases import BaseStore
from cloudlet.store.keyring import KeyRing


@dataclass(frozen=True, slots=True)
class Site:
    """A cloudlet on this machine."""

    settings: Settings
    hypervisor: Hypervisor
    bases: BaseStore
    keys: KeyRing

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The site of these settings; what dead processes left in its folders is removed."""
        site = cls(
            settings, QemuHypervisor(settings), BaseStore(settings.bases_dir), KeyRing(settings.keys_dir)
        )
        site.hypervisor.reap()
        site.bases.reap()
        return site

    @staticmethod
    def abandon(settings: Settings) -> None:
        """Remove what this process has begun and not finished, at its end after an interrupt."""
        for folder in (settings.instances_dir, settings.bases_dir):
            abandon(folder)
