from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cloudlet.errors import CorruptError, IntegrityError, LimitError, MismatchError
from cloudlet.overlay import canonical
from cloudlet.overlay.root import DeviceSection, Root

from .forge import Forged
from .world import MACHINE, SECTIONS, unsigned

DIGEST = "ab" * 32


def test_it_reads_what_it_writes(small: bytes) -> None:
    reader = unsigned(small)
    assert Root.decode(reader.root_bytes) == reader.root
    assert reader.root.encode() == reader.root_bytes
    assert reader.root.app.name == "hello"
    assert reader.root.machine == MACHINE


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(root: dict[str, Any]) -> None:
        *way, last = path.split(".")
        at: Any = root
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        at[int(last) if isinstance(at, list) else last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("news", 1, CorruptError),
        ("app.news", 1, CorruptError),
        ("app.name", "a\x1b[2J", CorruptError),
        ("app.name", "a" * 129, CorruptError),
        ("app.ready", "never", CorruptError),
        ("app.ready", "http:80", CorruptError),
        ("app.ready", "serial:((", CorruptError),
        ("app.ready", "serial:" + "(" * 1000, CorruptError),
        ("app.publish", "soon", CorruptError),
        ("app.ports", [{"name": "web", "port": 0}], CorruptError),
        ("app.ports", [{"name": "web"}], CorruptError),
        ("base", "xy", CorruptError),
        ("created", "yesterday", CorruptError),
        ("created", "2026-13-24T23:00:00Z", CorruptError),
        ("device_sections.0", ["ram", 0], CorruptError),
        ("device_sections.0", ["ram", "0", 4], CorruptError),
        ("machine.news", 1, CorruptError),
        ("machine.cpus", "1", CorruptError),
        ("machine.cpus", True, CorruptError),
        ("machine.accelerator", "warp", CorruptError),
        ("machine.memory_bytes", 4095, CorruptError),
        ("machine.memory_bytes", 4096, LimitError),
        ("machine.disk_bytes", 1 << 46, LimitError),
        ("machine.disk_bytes", 1 << 60, CorruptError),
        ("frames.map", [], CorruptError),
        ("frames.device", [], CorruptError),
        ("frames.map.0.0", 2, CorruptError),
        ("frames.map.0.2", 5 << 20, LimitError),
        ("frames.hot.0.0", 1, CorruptError),
        ("frames.hot.0", [3, 1], CorruptError),
        ("frames.hot.0.3", 513, LimitError),
        ("index.0", [1], CorruptError),
        ("index.0.0", 257, LimitError),
        ("index.0.0", 0, LimitError),
        ("index.0.2", 1 << 30, LimitError),
        ("index.0.1", 1 << 40, CorruptError),
        ("index.0.3", 1 << 20, CorruptError),
        ("totals.literals", 1, CorruptError),
        ("totals.frames", 1 << 30, CorruptError),
        ("totals.device_bytes", 0, CorruptError),
        ("totals.disk_pages", 6, CorruptError),
        ("totals.ram_pages", -1, CorruptError),
        ("totals.ram_pages", 1.5, CorruptError),
    ],
)
def test_every_field_is_checked(small: bytes, path: str, value: Any, error: type[Exception]) -> None:
    root = canonical.decode(unsigned(small).root_bytes, "root")
    put(path, value)(root)
    with pytest.raises(error):
        Root.decode(canonical.encode(root))


def test_too_much_map_and_device_state_is_refused(small: bytes) -> None:
    root = canonical.decode(unsigned(small).root_bytes, "root")
    for name, kind in (("map", 1), ("device", 2)):
        large = {
            **root,
            "frames": {**root["frames"], name: [[kind, 1000, 4 << 20, 0, 0, DIGEST]] * 5},
        }
        with pytest.raises(LimitError):
            Root.decode(canonical.encode(large))


def test_a_root_that_is_too_large_is_not_written(small: bytes) -> None:
    root = unsigned(small).root
    with pytest.raises(LimitError):
        replace(root, hot_frames=root.hot_frames * 1000).encode()


def test_one_base_only(small: bytes) -> None:
    root = unsigned(small).root
    root.check_base("ab" * 32, MACHINE, SECTIONS)
    with pytest.raises(MismatchError, match="made for base"):
        root.check_base("cd" * 32, MACHINE, SECTIONS)
    with pytest.raises(MismatchError, match="cpus"):
        root.check_base("ab" * 32, replace(MACHINE, cpus=2), SECTIONS)
    with pytest.raises(MismatchError, match="slirp"):
        root.check_base("ab" * 32, MACHINE, (*SECTIONS, DeviceSection("slirp", 0, 4)))
    with pytest.raises(MismatchError, match="differ"):
        root.check_base("ab" * 32, MACHINE, (*SECTIONS, SECTIONS[0]))
    root.check_base("ab" * 32, MACHINE, SECTIONS[::-1])  # as another version of QEMU has them


def test_the_forge_is_faithful(small: bytes) -> None:
    """What the tests of refusal build upon: unchanged parts give the same file."""
    assert Forged.of(small).data() == small


def test_the_file_is_as_long_as_its_parts(small: bytes) -> None:
    for more in (-1, 1):
        size = (len(small) + more).to_bytes(8, "little")
        with pytest.raises(IntegrityError, match="add up"):
            unsigned(small[:48] + size + small[56:])
