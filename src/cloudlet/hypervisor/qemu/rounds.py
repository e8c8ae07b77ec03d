"""A machine's pages, read again and again while it runs: from its process's memory and its disk's file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cloudlet.hypervisor.driver import Layer, Sections
from cloudlet.hypervisor.qemu import changed, sections
from cloudlet.hypervisor.qemu.changed import Mapping
from cloudlet.hypervisor.qemu.disk import InstanceDisk
from cloudlet.overlay.pages import Numbers, Rows, Space, numbers_of


class QemuRounds:
    """See :class:`cloudlet.hypervisor.driver.Rounds`."""

    def __init__(
        self,
        mapping: Mapping,
        disk: InstanceDisk,
        layer: Layer | None,
        stand_still: Callable[[], bytes],
        received: Numbers | None = None,
    ) -> None:
        """Rounds of a machine.

        :param disk: is closed with the rounds.
        :param layer: whose pages count as held.
        :param stand_still: pauses the machine and gives its device state.
        :param received: pages of RAM beneath what the guest has written that are neither base's nor layer's.
        """
        self._mapping = mapping
        self._disk = disk
        self._with_layer = layer is not None
        nothing = np.empty(0, np.uint32)
        of_layer = numbers_of(layer.pages.runs(Space.RAM)) if layer else nothing
        self._brought = np.union1d(of_layer, nothing if received is None else received)
        self._stand_still = stand_still
        self._settled = False
        self._told: Numbers = np.empty(0, np.uint32)
        self._written: Numbers = np.empty(0, np.uint32)
        """Blocks that the machine itself has written since the rounds began, or before."""
        self._blocks = disk.look(with_layer=self._with_layer, settled=False)
        self._memory = changed.open_memory(mapping.pid)

    def held(self, space: Space) -> Numbers:
        """The pages that may differ, in order."""
        if space is Space.RAM:
            return self._held_ram()
        if not self._settled:
            self._look_at_disk()
        return self._told

    def read(self, space: Space, numbers: Numbers, rows: Rows) -> None:
        """Fill ``rows`` with pages.

        :raises FailedError: the machine is gone.
        """
        if space is Space.RAM:
            changed.read_rows(self._memory, self._mapping, numbers, rows)
        else:
            self._disk.read(self._blocks, numbers, rows, settled=self._settled)

    def pass_over_layer(self) -> None:
        """Hold no longer what only the layer brings."""
        self._brought = np.empty(0, np.uint32)
        if self._with_layer:
            self._with_layer = False
            self._told = self._written

    def settle(self) -> tuple[bytes, Sections]:
        """Have the machine stand still: its device state and the sections of that."""
        state = self._stand_still()
        self._settled = True
        self._look_at_disk()
        return state, sections.read_sections(state)

    def close(self) -> None:
        """Let go of the machine's memory and files. Can be called again."""
        self._memory.close()
        self._disk.close()

    def _held_ram(self) -> Numbers:
        held = np.zeros(self._mapping.pages, np.bool_)
        held[changed.private_pages(self._mapping)] = True
        held[self._brought] = True
        return np.flatnonzero(held).astype(np.uint32)

    def _look_at_disk(self) -> None:
        self._blocks = self._disk.look(with_layer=self._with_layer, settled=self._settled)
        now = self._blocks.numbers.astype(np.uint32)
        # A block that was given back is the base's again, but whoever was told of it has another content.
        if not np.array_equal(now, self._told):
            self._told = np.union1d(now, self._told)
        if self._with_layer:
            self._written = np.union1d(self._blocks.written.astype(np.uint32), self._written)
