"""Captures: what an instance changed is in them, goes on elsewhere, and is nobody else's."""

from __future__ import annotations

import secrets
import urllib.request
from dataclasses import replace

import pytest

from cloudlet.errors import IntegrityError, MismatchError
from cloudlet.hypervisor.driver import Instance, RunState
from cloudlet.hypervisor.records import records
from cloudlet.model import Accelerator
from cloudlet.overlay.pages import PageSource
from cloudlet.overlay.root import DeviceSection
from tests.contract.conftest import Driver, fill, kept, sh

NOTHING = PageSource.empty()


def count(instance: Instance) -> int:
    with urllib.request.urlopen(instance.endpoints[0].url + "/cgi-bin/counter", timeout=10) as answer:
        return int(answer.read())


def holds(source: PageSource, word: str) -> bool:
    return word.encode() in source.data.tobytes()


def test_a_capture_goes_on_in_another_machine(driver: Driver) -> None:
    in_ram, on_disk = secrets.token_hex(16), secrets.token_hex(16)
    incoming = driver.start()
    try:
        sh(incoming.instance, f"echo {in_ram} > /run/word; echo {on_disk} > /www/word; sync")
        assert [count(incoming.instance) for _ in range(3)] == [1, 2, 3]
        capture = incoming.instance.capture()
        assert incoming.instance.state() is RunState.PAUSED
        assert 0 < sum(capture.seconds.values()) <= capture.pause_seconds + 0.001
        assert capture.sections == driver.base.sections
        ram, disk = kept([capture.ram, capture.disk])
        first = driver.machine_of(incoming.instance)
    finally:
        incoming.abort()
    assert holds(ram, in_ram)
    assert holds(disk, on_disk)
    for source, pages in ((ram, driver.base.machine.ram_pages), (disk, driver.base.machine.disk_blocks)):
        numbers = source.numbers.tolist()
        assert numbers == sorted(set(numbers))
        assert source.data.shape == (len(numbers), 4096)
        assert numbers[-1] < pages

    incoming = driver.start(ram, disk, capture.device_state)
    try:
        assert driver.machine_of(incoming.instance) != first
        assert sh(incoming.instance, "cat /run/word /www/word") == f"{in_ram}\n{on_disk}\n"
        with urllib.request.urlopen(incoming.instance.endpoints[0].url + "/word", timeout=10) as answer:
            assert answer.read().decode().strip() == on_disk
        assert count(incoming.instance) == 4
    finally:
        incoming.abort()


def test_a_captured_machine_can_run_on(driver: Driver) -> None:
    incoming = driver.start()
    try:
        assert count(incoming.instance) == 1
        incoming.instance.capture()
        incoming.instance.resume()
        assert count(incoming.instance) == 2
    finally:
        incoming.abort()


def test_an_adopted_instance_is_captured_as_its_owners_is(driver: Driver) -> None:
    word = secrets.token_hex(16)
    incoming = driver.start()
    try:
        sh(incoming.instance, f"echo {word} > /run/word")
        (adopted,) = type(driver.hypervisor)(driver.settings).instances()
        assert holds(adopted.capture().ram, word)
        adopted.resume()
        assert count(incoming.instance) == 1
        adopted.stop()
    finally:
        incoming.abort()


def test_instances_of_a_base_do_not_see_each_other(driver: Driver) -> None:
    word = secrets.token_hex(16)
    one = driver.start()
    try:
        two = driver.start()
        try:
            sh(one.instance, f"echo {word} > /run/word; echo {word} > /www/word; sync")
            assert [count(one.instance), count(one.instance)] == [1, 2]
            assert count(two.instance) == 1
            assert sh(two.instance, "test ! -e /run/word; test ! -e /www/word; echo none") == "none\n"
            capture = two.instance.capture()
            assert not holds(capture.ram, word)
            assert not holds(capture.disk, word)
            assert {record.id for _, record in records(driver.settings.instances_dir)} == {
                one.instance.id,
                two.instance.id,
            }
        finally:
            two.abort()
        assert count(one.instance) == 3
    finally:
        one.abort()
    # Nor does the base see them.
    three = driver.start()
    try:
        assert count(three.instance) == 1
    finally:
        three.abort()


def _without_last(sections: tuple[DeviceSection, ...]) -> tuple[DeviceSection, ...]:
    return sections[:-1]


def _newer(sections: tuple[DeviceSection, ...]) -> tuple[DeviceSection, ...]:
    return (*sections[:-1], sections[-1]._replace(version=sections[-1].version + 1))


def _exchanged(sections: tuple[DeviceSection, ...]) -> tuple[DeviceSection, ...]:
    return (sections[1], sections[0], *sections[2:])


@pytest.mark.parametrize("change", [_without_last, _newer])
def test_other_devices_are_refused_before_the_machine_sees_them(driver: Driver, change) -> None:
    base = replace(driver.base, sections=change(driver.base.sections))
    incoming = driver.hypervisor.resume(base)
    try:
        fill(incoming, NOTHING, NOTHING)
        with pytest.raises(MismatchError, match="device section"):
            incoming.finish(driver.base.device_state.read_bytes())
        assert incoming.instance.state() is RunState.INCOMING
    finally:
        incoming.abort()


def test_the_same_devices_in_another_order_are_the_same(driver: Driver) -> None:
    """Each version of a hypervisor saves them in its own."""
    base = replace(driver.base, sections=_exchanged(driver.base.sections))
    incoming = driver.hypervisor.resume(base)
    try:
        fill(incoming, NOTHING, NOTHING)
        incoming.finish(driver.base.device_state.read_bytes())
        assert incoming.instance.state() is RunState.RUNNING
    finally:
        incoming.abort()


@pytest.mark.parametrize("state", [b"", b"junk", b"\x04\0\0\0\1\3cpu"])
def test_what_is_no_device_state_is_refused(driver: Driver, state: bytes) -> None:
    incoming = driver.hypervisor.resume(driver.base)
    try:
        fill(incoming, NOTHING, NOTHING)
        with pytest.raises(IntegrityError):
            incoming.finish(state)
        assert incoming.instance.state() is RunState.INCOMING
    finally:
        incoming.abort()


@pytest.mark.parametrize(
    "difference", [{"cpu_model": "Another"}, {"accelerator": Accelerator.KVM}, {"layout": 99}]
)
def test_a_capture_of_another_machine_is_refused(driver: Driver, difference: dict[str, object]) -> None:
    machine = replace(driver.base.machine, **difference)
    driver.hypervisor.check(driver.base.machine)
    with pytest.raises(MismatchError):
        driver.hypervisor.check(machine)
    with pytest.raises(MismatchError):
        driver.hypervisor.resume(replace(driver.base, machine=machine))
    assert not driver.settings.instances_dir.exists() or records(driver.settings.instances_dir) == []
