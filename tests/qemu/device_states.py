"""Device states taken apart and put together again, so that tests can make wrong ones.

The program finds sections by their frames; here each is looked for by what the base says it must be,
so that the two ways can be compared.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

from cloudlet.overlay.root import DeviceSection

_END = b"\0"


@dataclass(frozen=True)
class Section:
    """One section of a device state, as bytes."""

    number: int
    name: bytes
    instance: int
    version: int
    payload: bytes

    def encode(self) -> bytes:
        head = struct.pack(">BIB", 4, self.number, len(self.name)) + self.name
        return (
            head
            + struct.pack(">II", self.instance, self.version)
            + self.payload
            + struct.pack(">BI", 0x7E, self.number)
        )


def take_apart(state: bytes, expected: tuple[DeviceSection, ...]) -> list[Section]:
    """The sections of a device state that has those of ``expected``, in order."""
    marks = []
    position = 0
    for entry in expected:
        name = entry.name.encode()
        tail = bytes([len(name)]) + name + struct.pack(">II", entry.instance, entry.version)
        found = state.index(tail, position)
        marks.append((found - 5, found + len(tail)))
        position = found + len(tail)
    ends = [start for start, _ in marks[1:]] + [len(state) - len(_END)]
    sections = []
    for entry, (start, body), end in zip(expected, marks, ends, strict=True):
        kind, number = struct.unpack_from(">BI", state, start)
        assert kind == 4
        assert state[end - 5 : end] == struct.pack(">BI", 0x7E, number)
        sections.append(
            Section(number, entry.name.encode(), entry.instance, entry.version, state[body : end - 5])
        )
    assert put_together(sections) == state
    return sections


def put_together(sections: list[Section]) -> bytes:
    return b"".join(section.encode() for section in sections) + _END


def with_garbage(sections: list[Section], index: int, seed: int) -> list[Section]:
    """The same frames, with noise as the content of one."""
    noise = random.Random(seed).randbytes(len(sections[index].payload))
    return [replace(one, payload=noise) if n == index else one for n, one in enumerate(sections)]


def with_flips(sections: list[Section], seed: int) -> tuple[list[Section], str]:
    """One to four bytes within contents changed, and which."""
    source = random.Random(seed)
    changed = list(sections)
    told = []
    for _ in range(source.randint(1, 4)):
        index = source.choice([n for n, one in enumerate(changed) if one.payload])
        payload = bytearray(changed[index].payload)
        at = source.randrange(len(payload))
        payload[at] ^= source.randint(1, 255)
        changed[index] = replace(changed[index], payload=bytes(payload))
        told.append(f"{changed[index].name.decode()}[{at}]")
    return changed, " ".join(told)
