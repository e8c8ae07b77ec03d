"""Overlays that must not run: each kind of damage, and what ``cloudlet run`` has to say of it.

The damage that an attacker does (``forged``) has every digest right and a good signature, so that only
the check it is about can refuse it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cloudlet.control.site import Site
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.errors import CloudletError, ExitCode
from cloudlet.overlay.frames import zstd
from cloudlet.overlay.header import HEADER_BYTES, SIGNATURE_BYTES
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.sign import Sign, resign
from cloudlet.settings import Settings
from cloudlet.store.keyring import KeyRing
from cloudlet.transfer.source import open_source
from tests.unit.overlay.forge import Forged


@dataclass(frozen=True)
class Kind:
    """A kind of damage, the exit code and a word of the message."""

    name: str
    make: Callable[[bytes, Sign], bytes]
    says: str
    status: ExitCode = ExitCode.INTEGRITY


def signed(data: bytes, sign: Sign | None) -> bytes:
    """The same overlay with another signature, or with none."""
    out = io.BytesIO()
    resign(OverlayReader(io.BytesIO(data), None, allow_unsigned=True), out, sign)
    return out.getvalue()


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def flips(data: bytes, count: int, seed: int) -> list[tuple[int, int]]:
    """Random places and bits: a tenth in the header, a tenth before the first frame, the rest anywhere."""
    rng = random.Random(seed)
    head = OverlayReader(io.BytesIO(data), None, allow_unsigned=True).header.parts_start
    ends = [HEADER_BYTES, head] + [len(data)] * 8
    return [(rng.randrange(ends[number % len(ends)]), rng.randrange(8)) for number in range(count)]


def hot_end(data: bytes) -> int:
    """Where the cold frames begin, those of the disk first."""
    reader = OverlayReader(io.BytesIO(data), None, allow_unsigned=True)
    root = reader.root
    frames = (*root.map_frames, *root.device_frames, *root.hot_frames)
    return reader.header.parts_start + sum(entry.size for entry in frames)


def _swapped(data: bytes, sign: Sign) -> bytes:
    """The last two frames change places, and nothing else is said."""
    *_, (entry, first), (_, second) = Forged.of(data).frames
    at = len(data) - entry.size - len(second)
    return data[:at] + second + first


def _reordered(data: bytes, sign: Sign) -> bytes:
    """The cold frames the other way round, and the root says so."""
    forged = Forged.of(data)
    cold = len(forged.root.listed_frames)
    forged.frames[cold:] = forged.frames[cold:][::-1]
    return signed(forged.data(), sign)


def _growing(data: bytes, sign: Sign) -> bytes:
    """A frame that expands to much more than it declares."""
    forged = Forged.of(data)
    raw = bytes(forged.raw(-1))
    blob = zstd.compress(raw + bytes(64 << 20), 3)
    forged.set_blob(-1, blob)
    return signed(forged.data(), sign)


def _rooted(**changes: object) -> Callable[[bytes, Sign], bytes]:
    def make(data: bytes, sign: Sign) -> bytes:
        forged = Forged.of(data)
        forged.root = replace(forged.root, **changes)  # type: ignore[arg-type]
        return signed(forged.data(), sign)

    return make


def _other_base_unsigned_for(data: bytes, sign: Sign) -> bytes:
    """The root names another base, the header pins the new root, the signature is the old one."""
    other = _rooted(base="ab" * 32)(data, sign)
    root = OverlayReader(io.BytesIO(data), None, allow_unsigned=True)
    start = HEADER_BYTES + len(root.root_bytes)
    return other[:start] + root.signature + other[start + SIGNATURE_BYTES :]


def _other_memory(data: bytes, sign: Sign) -> bytes:
    forged = Forged.of(data)
    machine = forged.root.machine
    forged.root = replace(forged.root, machine=replace(machine, memory_bytes=2 * machine.memory_bytes))
    return signed(forged.data(), sign)


def _other_devices(data: bytes, sign: Sign) -> bytes:
    forged = Forged.of(data)
    first, *others = forged.root.device_sections
    sections = (first._replace(version=first.version + 1), *others)
    forged.root = replace(forged.root, device_sections=sections)
    return signed(forged.data(), sign)


def _forged_signature(data: bytes, sign: Sign) -> bytes:
    head = OverlayReader(io.BytesIO(data), None, allow_unsigned=True).header.parts_start
    return flipped(data, head - 1, 0)


KINDS = (
    Kind("empty", lambda data, sign: b"", "before the end of the header"),
    Kind("cut in the header", lambda data, sign: data[:40], "before the end of the header"),
    Kind("cut in the root", lambda data, sign: data[:200], "before the end of the root"),
    Kind("cut in half", lambda data, sign: data[: len(data) // 2], "before the end of frame"),
    Kind("one byte short", lambda data, sign: data[:-1], "1 bytes before the end"),
    Kind("goes on", lambda data, sign: data + b"\0", "goes on after its end"),
    Kind("another file", lambda data, sign: b"PK\3\4" + bytes(4096), "not an overlay"),
    Kind("frames swapped", _swapped, "does not have the digest"),
    Kind("frames reordered, signed", _reordered, "begins with literal"),
    Kind("signature forged", _forged_signature, "does not match"),
    Kind("unsigned", lambda data, sign: signed(data, None), "not signed"),
    Kind("later version", lambda data, sign: data[:8] + b"\3" + data[9:], "version 3"),
    Kind("grows without end, signed", _growing, "bytes declared"),
    Kind("base forged", _other_base_unsigned_for, "does not match"),
    Kind("base missing, signed", _rooted(base="ab" * 32), "is not here", ExitCode.NOT_FOUND),
    Kind("other memory, signed", _other_memory, "memory_bytes"),
    Kind("other devices, signed", _other_devices, "section"),
)


def attempt(settings: Settings, overlay: Path, *, allow_unsigned: bool = False) -> tuple[int, str]:
    """What ``cloudlet run`` does, without the start of a program: exit code and message."""
    site = Site.open(settings)
    try:
        with (
            open_source(str(overlay), io.BytesIO()) as source,
            synthesise(site, source, Request(allow_unsigned=allow_unsigned)) as made,
        ):
            assert made.instance.endpoints
        return ExitCode.DONE, ""
    except CloudletError as error:
        return error.exit_code, str(error)


def signer(settings: Settings) -> Sign:
    return KeyRing(settings.keys_dir).signer()
