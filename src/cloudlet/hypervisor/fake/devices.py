"""The device state of a fake machine: a JSON list of sections, each with name, instance, version, content."""

from __future__ import annotations

import json
from typing import Any

from cloudlet.errors import CorruptError, MismatchError
from cloudlet.hypervisor.driver import Sections
from cloudlet.overlay.root import DeviceSection


def read_state(device_state: bytes) -> tuple[Sections, list[list[Any]]]:
    """The sections of a device state, and the state as the machine takes it.

    :raises CorruptError: it is not one.
    """
    try:
        state = json.loads(device_state)
        sections = tuple(
            DeviceSection(str(name), int(instance), int(version)) for name, instance, version, _ in state
        )
    except (ValueError, TypeError) as error:
        raise CorruptError("the device state is not one of a fake machine") from error
    return sections, state


def check_state(device_state: bytes, expected: Sections) -> list[list[Any]]:
    """The state as the machine takes it, if it has exactly the sections of the base, in whatever order.

    :raises MismatchError: it has not.
    """
    found, state = read_state(device_state)
    if sorted(found) != sorted(expected):
        names = [" ".join(section.name for section in sections) for sections in (found, expected)]
        raise MismatchError(f"other device sections than the base's: {names[0]}, not {names[1]}")
    return state
