from __future__ import annotations

from collections.abc import Iterator

import pytest

from .world import BUFFER, CONTENT, World, near, page


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="session")
def small(world: World) -> bytes:
    """An unsigned overlay with every operation, hot and cold frames, in both spaces."""
    import numpy as np

    from cloudlet.overlay.pages import Space

    ram = {
        0: np.zeros(4096, np.uint8),
        1: page(1),
        2: page(1),
        3: page(1050),
        4: page(2001),
        70: page(2),
        80: page(3),
        81: page(1),
        90: BUFFER[0],
        91: BUFFER[1],
    }
    disk = {
        5: page(4),
        6: page(1003),
        7: page(2000),
        8: near(page(2008)),
        50: page(2),
        60: np.full(4096, 7, np.uint8),
    }
    disk |= {61: CONTENT[0], 62: CONTENT[1], 63: CONTENT[2]}
    data, _ = world.create(ram, disk, hot=[(Space.RAM, np.array([70, 2], np.uint32))])
    return data
