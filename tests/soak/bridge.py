"""Hand-offs there and back of a real guest under load, while a user keeps one connection to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.qemu.bridged import bridged_sites, walk
from tests.service.conftest import Made

if TYPE_CHECKING:
    from tests.soak.__main__ import Soak

HANDOFFS = 50


def there_and_back(soak: Soak) -> None:
    """One instance, with all memory and disk compared each time (``--verify full``)."""
    made = Made(soak.settings.cache_dir, soak.settings.keys_dir, soak.base_id, soak.overlay)
    with (
        tempfile.TemporaryDirectory(prefix="cloudlet-soak-bridge-") as temporary,
        bridged_sites(Path(temporary), made) as world,
    ):

        def tries(count: int) -> Iterator[str]:
            yield from walk(world, count, soak.dice("there and back").randrange(1 << 32))

        soak.row(
            "hand-offs of one instance under load, between bridges joined by a tunnel",
            "all equal, the connection kept, no answer lost or doubled, the file system clean",
            HANDOFFS, tries,
        )  # fmt: skip
