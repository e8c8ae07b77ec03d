"""The list of device sections, from states made here and from a real machine's."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, MismatchError
from cloudlet.hypervisor.qemu.sections import check_sections, read_sections
from cloudlet.overlay.root import DeviceSection
from cloudlet.store.bases import Base


def encode(number: int, section: DeviceSection, payload: bytes) -> bytes:
    name = section.name.encode()
    head = b"\x04" + struct.pack(">IB", number, len(name)) + name
    return head + struct.pack(">II", section.instance, section.version) + payload + footer(number)


def footer(number: int) -> bytes:
    return b"\x7e" + struct.pack(">I", number)


def state(sections: list[DeviceSection], payloads: list[bytes]) -> bytes:
    parts = zip(sections, payloads, strict=True)
    return b"".join(encode(number, *part) for number, part in enumerate(parts, 1)) + b"\0"


CPU, DISK, TIMER = (
    DeviceSection("cpu", 0, 12),
    DeviceSection("0:4.0/virtio-blk", 0, 2),
    DeviceSection("timer", 1, 2),
)

names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=127)
numbers = st.integers(0, (1 << 32) - 1)
anything = st.builds(DeviceSection, names, numbers, numbers)
# Bytes of a footer and of a section's beginning, but never one after the other.
confusing = st.lists(
    st.one_of(
        st.binary(max_size=40).map(lambda raw: raw + b"\xff"),
        st.integers(0, 6).map(lambda number: footer(number) + b"\xff"),
        st.just(b"\x04\0\0\0\1\3cpu\0\0\0\0\0\0\0\1\xff"),
    ),
    max_size=6,
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(anything, confusing), min_size=1, max_size=6))
def test_sections_are_read_whatever_is_in_them(parts: list[tuple[DeviceSection, bytes]]) -> None:
    sections, payloads = [part[0] for part in parts], [part[1] for part in parts]
    raw = state(sections, payloads)
    assert read_sections(raw) == tuple(sections)
    check_sections(raw, tuple(sections))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(anything, confusing), min_size=1, max_size=3), st.data())
def test_a_state_that_is_cut_short_is_refused(
    parts: list[tuple[DeviceSection, bytes]], data: st.DataObject
) -> None:
    raw = state([part[0] for part in parts], [part[1] for part in parts])
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(CorruptError):
        read_sections(cut)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_junk_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        read_sections(raw)


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        ([CPU, DISK], r"lacks device section timer \(instance 1, version 2\), which the base has"),
        ([CPU, DISK, TIMER, CPU], "has device section cpu .*, which the base has not"),
        ([CPU, DISK, TIMER._replace(version=3)], r"has device section timer \(instance 1, version 3\)"),
        ([CPU, DISK, TIMER._replace(instance=0)], r"has device section timer \(instance 0"),
    ],
)
def test_the_first_difference_is_named(found: list[DeviceSection], difference: str) -> None:
    with pytest.raises(MismatchError, match=difference):
        check_sections(state(found, [b"payload"] * len(found)), (CPU, DISK, TIMER))


def test_each_version_of_qemu_has_its_own_order() -> None:
    found = [DISK, TIMER, CPU]
    check_sections(state(found, [b"payload"] * len(found)), (CPU, DISK, TIMER))


@pytest.mark.parametrize("name", [b"\x1b[31m", b"caf\xc3\xa9"])
def test_a_name_that_cannot_be_printed_is_refused(name: bytes) -> None:
    raw = b"\x04\0\0\0\1" + bytes([len(name)]) + name + bytes(8) + b"payload" + footer(1) + b"\0"
    with pytest.raises(CorruptError):
        read_sections(raw)


@pytest.mark.qemu
def test_a_real_device_state(quick_base: Base) -> None:
    image = quick_base.image()
    raw = image.device_state.read_bytes()
    assert read_sections(raw) == image.sections
    assert len({(section.name, section.instance) for section in image.sections}) == len(image.sections)
    assert any(section.name.endswith("virtio-blk") for section in image.sections)
    generator = random.Random(1)
    for cut in generator.sample(range(len(raw)), 20):
        with pytest.raises(CorruptError):
            read_sections(raw[:cut])
