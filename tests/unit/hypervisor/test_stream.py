"""The incoming stream, read back by a parser that knows QEMU's format and nothing of our writer."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.hypervisor.qemu import stream

PAGE = 4096


class Reader:
    """QEMU's ``qemu_loadvm_state`` and ``ram_load_precopy``, as far as our streams go."""

    def __init__(self, raw: bytes) -> None:
        self.file = io.BytesIO(raw)
        self.pages: dict[int, bytes] = {}
        self.firmware: dict[int, bytes] = {}
        self.blocks: dict[str, int] = {}
        self.machine = ""
        self.devices = b""
        self.parts = 0

    def take(self, size: int) -> bytes:
        raw = self.file.read(size)
        assert len(raw) == size, "the stream ends early"
        return raw

    def number(self, kind: str) -> int:
        return struct.unpack(f">{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self, kind: str) -> str:
        return self.take(self.number(kind)).decode()

    def read(self, device_bytes: int) -> None:
        assert self.take(4) == b"QEVM"
        assert self.number("I") == 3
        assert self.number("B") == 7
        self.machine = self.text("I")
        assert self.number("B") == 1
        section = self.number("I")
        assert (self.text("B"), self.number("I"), self.number("I")) == ("ram", 0, 4)
        self.ram(section)
        while (kind := self.number("B")) == 2:
            assert self.number("I") == section
            self.ram(section)
            self.parts += 1
        assert kind == 3
        assert self.number("I") == section
        self.ram(section)
        self.devices = self.take(device_bytes)
        assert self.number("B") == 6
        assert self.text("I") == "{}"
        assert self.file.read() == b""

    def ram(self, section: int) -> None:
        block = None
        while True:
            word = self.number("Q")
            flags, address = word & (PAGE - 1), word & ~(PAGE - 1)
            if flags == 0x10:
                break
            if flags == 0x04:
                left = address
                while left > 0:
                    name = self.text("B")
                    self.blocks[name] = self.number("Q")
                    left -= self.blocks[name]
                assert left == 0
                continue
            assert flags & ~0x20 == 0x08, hex(flags)
            if not flags & 0x20:
                block = self.text("B")
            assert block in self.blocks, "a page names no block"
            assert address + PAGE <= self.blocks[block]
            (self.pages if block == "pc.ram" else self.firmware)[address // PAGE] = self.take(PAGE)
        assert self.number("B") == 0x7E
        assert self.number("I") == section


def read_back(batches: list[list[int]], device: bytes, ram_pages: int = 1 << 20) -> Reader:
    parts = [stream.opening("pc-q35-7.2", ram_pages * PAGE)]
    for batch in batches:
        rows = np.stack([np.full(PAGE, number % 251, np.uint8) for number in batch])
        parts.append(bytes(stream.pages(np.array(batch, np.uint32), rows)))
    parts.append(stream.closing(device))
    reader = Reader(b"".join(parts))
    reader.read(len(device))
    return reader


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, (1 << 20) - 1), min_size=1, max_size=40), max_size=4),
    st.binary(max_size=300),
)
def test_every_page_and_the_devices_are_read_back(batches: list[list[int]], device: bytes) -> None:
    reader = read_back(batches, device)
    assert reader.machine == "pc-q35-7.2"
    assert reader.blocks == {"pc.ram": 1 << 32}
    assert reader.parts == len(batches)
    assert reader.devices == device
    numbers = {number for batch in batches for number in batch}
    assert reader.pages == {number: bytes([number % 251]) * PAGE for number in numbers}


def test_a_page_beyond_four_gibibytes() -> None:
    assert list(read_back([[1 << 21]], b"", ram_pages=1 << 22).pages) == [1 << 21]


def test_the_firmware_is_a_block_of_its_own() -> None:
    firmware = bytes(PAGE) + b"\1" * PAGE
    page = stream.pages(np.array([9], np.uint32), np.full((1, PAGE), 9, np.uint8))
    reader = Reader(stream.opening("m", 1 << 20, firmware) + bytes(page) + stream.closing(b"devices"))
    reader.read(len(b"devices"))
    assert reader.blocks == {"pc.ram": 1 << 20, "pc.bios": len(firmware)}
    assert b"".join(reader.firmware[number] for number in range(2)) == firmware
    assert reader.pages == {9: b"\x09" * PAGE}


def test_a_page_that_comes_again_replaces_the_first() -> None:
    first, second = np.zeros((1, PAGE), np.uint8), np.ones((1, PAGE), np.uint8)
    number = np.array([5], np.uint32)
    raw = stream.opening("m", 1 << 20) + bytes(stream.pages(number, first))
    reader = Reader(raw + bytes(stream.pages(number, second)) + stream.closing(b""))
    reader.read(0)
    assert reader.pages == {5: b"\1" * PAGE}


def test_saved_devices_lose_header_and_configuration() -> None:
    header = b"QEVM\0\0\0\3"
    configuration = b"\x07\0\0\0\x0apc-q35-7.2"
    assert stream.device_sections(header + b"\4devices") == b"\4devices"
    assert stream.device_sections(header + configuration + b"\4devices") == b"\4devices"


@pytest.mark.parametrize(
    "saved", [b"", b"QEVM\0\0\0\2\4devices", b"junk", b"QEVM\0\0\0\3\x07\0\0\0\1m\x05\0\0\0\1caps"]
)
def test_what_qemu_did_not_save_so_is_refused(saved: bytes) -> None:
    with pytest.raises(CorruptError):
        stream.device_sections(saved)


@pytest.mark.parametrize("length", range(9, 13))
def test_a_configuration_that_is_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CorruptError):
        stream.device_sections(b"QEVM\0\0\0\3\x07\0\0\0\1m"[:length])
