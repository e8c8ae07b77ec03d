"""A hand-off's two ends: pages read while the machine runs, and a machine made of them elsewhere."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest

from cloudlet.control.readiness import wait_ready
from cloudlet.errors import ConflictError, FailedError, IntegrityError, MismatchError, UsageError
from cloudlet.hypervisor.driver import Boot, Incoming, Instance, Receiving, Rounds, RunState
from cloudlet.model import PAGE_BYTES, PublishedPort, Readiness
from cloudlet.overlay.pages import PageBatch, PageSource, Space
from tests.contract.conftest import AGENT, PORT, Driver, nothing_left, sh

BATCH = 256


@contextmanager
def started(driver: Driver) -> Iterator[Instance]:
    incoming = driver.start()
    try:
        yield incoming.instance
    finally:
        incoming.abort()


@contextmanager
def received(driver: Driver, generation_id: str = "") -> Iterator[Receiving]:
    receiving = driver.hypervisor.receive(driver.base, [PublishedPort(PORT)], generation_id=generation_id)
    try:
        yield receiving
    finally:
        receiving.abort()


def count(instance: Instance) -> int:
    with urllib.request.urlopen(instance.endpoints[0].url + "/cgi-bin/counter", timeout=10) as answer:
        return int(answer.read())


def look(rounds: Rounds, space: Space) -> PageSource:
    """All pages that are held now."""
    numbers = rounds.held(space)
    rows = np.full((numbers.size, PAGE_BYTES), 0xEE, np.uint8)
    for at in range(0, numbers.size, BATCH):
        rounds.read(space, numbers[at : at + BATCH], rows[at : at + BATCH])
    return PageSource(numbers, rows)


def send(receiving: Receiving, space: Space, source: PageSource) -> None:
    """Hand over pages, the last first."""
    for at in reversed(range(0, source.numbers.size, BATCH)):
        part = slice(at, at + BATCH)
        receiving.pages(PageBatch(space, source.numbers[part], source.data[part]))


def page_of(word: str) -> np.ndarray:
    return np.frombuffer(word.encode().ljust(PAGE_BYTES, b"\0"), np.uint8).reshape(1, -1)


def test_rounds_end_with_what_a_capture_finds(driver: Driver) -> None:
    words = [secrets.token_hex(16) for _ in range(4)]
    with started(driver) as instance, closing(instance.rounds(with_layer=True)) as rounds:
        sh(instance, f"echo {words[0]} > /run/word; echo {words[1]} > /www/word; sync")
        while_running = {space: look(rounds, space) for space in Space}
        assert words[0].encode() in while_running[Space.RAM].data.tobytes()
        assert instance.state() is RunState.RUNNING
        sh(instance, f"echo {words[2]} > /run/word; echo {words[3]} > /www/word; sync")
        state, sections = rounds.settle()
        assert instance.state() is RunState.PAUSED
        assert sections == driver.base.sections
        assert state
        settled = {space: look(rounds, space) for space in Space}
        captured = instance.capture()
        for space, truth in ((Space.RAM, captured.ram), (Space.DISK, captured.disk)):
            found = settled[space]
            assert (np.diff(found.numbers.astype(np.int64)) > 0).all()
            assert np.isin(while_running[space].numbers, found.numbers).all(), "what was told is told again"
            assert np.isin(truth.numbers, found.numbers).all()
            assert np.array_equal(found.data[np.isin(found.numbers, truth.numbers)], truth.data)
        assert words[2].encode() in settled[Space.RAM].data.tobytes()
        assert words[3].encode() in settled[Space.DISK].data.tobytes()
        instance.resume()
        assert count(instance) == 1


def test_a_machine_goes_on_where_its_pages_went(driver: Driver) -> None:
    in_ram, on_disk = secrets.token_hex(16), secrets.token_hex(16)
    machine = driver.base.machine
    # What nobody uses: it comes, and then what the base has there comes.
    last = np.array([machine.ram_pages - 1], np.uint32), np.array([machine.disk_blocks - 1], np.uint32)
    with (
        started(driver) as source,
        closing(source.rounds(with_layer=False)) as rounds,
        received(driver, source.generation_id()) as receiving,
    ):
        target = receiving.instance
        receiving.begin()
        assert target.state() is RunState.INCOMING
        for space in Space:
            send(receiving, space, look(rounds, space))
        sh(source, f"echo {in_ram} > /run/word; echo {on_disk} > /www/word; sync")
        assert [count(source) for _ in range(3)] == [1, 2, 3]
        for space, numbers in zip(Space, last, strict=True):
            receiving.pages(PageBatch(space, numbers, page_of("not here")))
        for space in Space:
            send(receiving, space, look(rounds, space))
        state, _ = rounds.settle()
        for space in Space:
            send(receiving, space, look(rounds, space))
        for space, numbers, path in zip(Space, last, (driver.base.ram, driver.base.disk), strict=True):
            rows = np.fromfile(path, np.uint8, PAGE_BYTES, offset=int(numbers[0]) * PAGE_BYTES)
            receiving.pages(PageBatch(space, numbers, rows.reshape(1, -1)))
        receiving.load(state)
        assert target.state() is RunState.PAUSED
        digest = source.digest()
        assert target.digest() == digest
        assert len(digest) == 32
        assert target.generation_id() == source.generation_id()
        source.stop()

        target.announce()
        target.resume()
        wait_ready(target, AGENT, 30.0)
        assert sh(target, "cat /run/word /www/word") == f"{in_ram}\n{on_disk}\n"
        assert count(target) == 4
        target.pause()
        assert target.digest() != digest


def test_a_machine_that_was_received_is_handed_on(driver: Driver) -> None:
    word = secrets.token_hex(16)
    with started(driver) as first, received(driver, first.generation_id()) as second:
        sh(first, f"echo {word} > /www/word; sync")
        hand_over(first, second)
        first.stop()
        second.instance.resume()
        assert count(second.instance) == 1
        with received(driver, second.instance.generation_id()) as third:
            # It stands still already, and does so when it is there.
            second.instance.pause()
            hand_over(second.instance, third)
            assert third.instance.digest() == second.instance.digest()
            second.instance.stop()
            third.instance.resume()
            assert count(third.instance) == 2
            assert sh(third.instance, "cat /www/word") == f"{word}\n"


def hand_over(source: Instance, receiving: Receiving) -> None:
    """In one round."""
    receiving.begin()
    with closing(source.rounds(with_layer=True)) as rounds:
        state, _ = rounds.settle()
        for space in Space:
            send(receiving, space, look(rounds, space))
    receiving.load(state)


def test_a_machine_that_was_settled_can_run_on(driver: Driver) -> None:
    with started(driver) as instance:
        for turn in (1, 2):
            with closing(instance.rounds(with_layer=True)) as rounds:
                assert rounds.settle()[1] == driver.base.sections
                assert rounds.settle()[1] == driver.base.sections
                before = look(rounds, Space.RAM)
                assert np.array_equal(before.data, look(rounds, Space.RAM).data)
            instance.resume()
            assert count(instance) == turn


def test_one_bit_is_another_digest(driver: Driver) -> None:
    with started(driver) as source, received(driver, source.generation_id()) as receiving:
        receiving.begin()
        with closing(source.rounds(with_layer=True)) as rounds:
            state, _ = rounds.settle()
            for space in Space:
                send(receiving, space, look(rounds, space))
            block = np.array([driver.base.machine.disk_blocks - 1], np.uint32)
            row = np.fromfile(driver.base.disk, np.uint8, PAGE_BYTES, offset=int(block[0]) * PAGE_BYTES)
            row[-1] ^= 1
            receiving.pages(PageBatch(Space.DISK, block, row.reshape(1, -1)))
        receiving.load(state)
        assert receiving.instance.digest() != source.digest()


def test_the_generation_id(driver: Driver) -> None:
    for given in ("nonsense", "auto,addr=0x1", "0" * 31):
        with pytest.raises(UsageError, match="generation ID"):
            driver.hypervisor.receive(driver.base, generation_id=given)
    with started(driver) as one, received(driver) as other:
        assert one.generation_id() != other.instance.generation_id()


@pytest.mark.parametrize("stage", ["at once", "begun", "filled", "loaded"])
def test_what_is_aborted_leaves_nothing(driver: Driver, stage: str) -> None:
    receiving = driver.hypervisor.receive(driver.base, [PublishedPort(PORT)])
    endpoint = receiving.instance.endpoints[0]
    if stage != "at once":
        receiving.begin()
    if stage in ("filled", "loaded"):
        for space in Space:
            receiving.pages(PageBatch(space, np.array([3], np.uint32), page_of("something")))
    if stage == "loaded":
        receiving.load(driver.base.device_state.read_bytes())
    receiving.abort()
    assert nothing_left(driver.settings)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((endpoint.host, endpoint.host_port), 5.0)
    receiving.abort()


@pytest.mark.parametrize("state", [b"", b"junk", b"\x04\0\0\0\1\3cpu"])
def test_what_is_no_device_state_is_refused(driver: Driver, state: bytes) -> None:
    with received(driver) as receiving:
        receiving.begin()
        with pytest.raises(IntegrityError):
            receiving.load(state)
        assert receiving.instance.state() is RunState.INCOMING


def test_what_comes_from_another_machine_is_refused(driver: Driver) -> None:
    with started(driver) as source, closing(source.rounds(with_layer=True)) as rounds:
        state, _ = rounds.settle()
    base = replace(driver.base, sections=driver.base.sections[:-1])
    other = Driver(driver.settings, driver.hypervisor, base)
    with received(other) as receiving:
        receiving.begin()
        with pytest.raises(MismatchError, match="device section"):
            receiving.load(state)


def test_a_death_while_pages_come(driver: Driver) -> None:
    with received(driver) as receiving:
        receiving.begin()
        os.kill(driver.machine_of(receiving.instance), signal.SIGKILL)
        assert receiving.instance.wait(5.0)
        with pytest.raises(FailedError):
            receiving.load(driver.base.device_state.read_bytes())


def test_a_death_while_pages_are_read(driver: Driver) -> None:
    with started(driver) as instance, closing(instance.rounds(with_layer=True)) as rounds:
        look(rounds, Space.RAM)
        os.kill(driver.machine_of(instance), signal.SIGKILL)
        assert instance.wait(5.0)
        with pytest.raises(FailedError):
            rounds.settle()
        with pytest.raises(FailedError, match="gone"):
            instance.rounds(with_layer=True)
        with pytest.raises(FailedError, match="gone"):
            instance.digest()


def test_a_machine_that_was_booted_is_not_handed_off(driver: Driver, boot: Boot) -> None:
    instance = driver.hypervisor.boot(boot)
    try:
        with pytest.raises(FailedError, match="was booted"):
            instance.rounds(with_layer=True)
    finally:
        instance.stop()


def test_an_adopted_instance(driver: Driver) -> None:
    with started(driver) as instance:
        (adopted,) = type(driver.hypervisor)(driver.settings).instances()
        assert len(instance.listeners) == 1
        assert adopted.listeners == ()
        assert adopted.layer is None
        with closing(adopted.rounds(with_layer=True)) as rounds:
            rounds.settle()
            found = look(rounds, Space.RAM)
        assert adopted.digest() == instance.digest()
        captured = adopted.capture().ram
        assert np.isin(captured.numbers, found.numbers).all()
        adopted.stop()


def _connect(instance: Instance) -> socket.socket:
    endpoint = instance.endpoints[0]
    client = socket.create_connection((endpoint.host, endpoint.host_port), 10.0)
    client.sendall(b"GET /cgi-bin/counter HTTP/1.0\r\n\r\n")
    return client


def _answer(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as answers:
        return answers.read()


def test_connections_that_are_held_come_through_later(driver: Driver) -> None:
    with started(driver) as instance:
        instance.hold_connections(True)
        instance.hold_connections(True)
        client = _connect(instance)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10.0)
        instance.hold_connections(False)
        instance.hold_connections(False)
        assert _answer(client).endswith(b"1\n")
        assert count(instance) == 2


def test_what_holds_connections_can_be_stopped(driver: Driver) -> None:
    with started(driver) as instance:
        instance.hold_connections(True)
        instance.stop()
        assert nothing_left(driver.settings)
        with pytest.raises(OSError, match="refused"):
            _connect(instance)


def test_who_takes_the_listeners_has_those_who_come(driver: Driver) -> None:
    with started(driver) as instance:
        endpoints = [endpoint for endpoint, _ in instance.listeners]
        assert endpoints == list(instance.endpoints)
        instance.hold_connections(True)
        with _connect(instance) as early:
            ((endpoint, listener),) = instance.take_listeners()
            with listener:
                assert instance.listeners == ()
                assert instance.take_listeners() == []
                instance.stop()
                with _connect(instance) as late:
                    listener.settimeout(10.0)
                    for client in (early, late):
                        accepted, address = listener.accept()
                        with accepted:
                            assert address == client.getsockname()
                            assert accepted.recv(4) == b"GET "
                ports = [PublishedPort(PORT, host_port=endpoint.host_port)]
                with pytest.raises(ConflictError):
                    driver.hypervisor.receive(driver.base, ports)
        driver.hypervisor.receive(driver.base, ports).abort()


def test_a_running_incoming_machine_has_its_listeners_too(driver: Driver) -> None:
    incoming: Incoming = driver.start()
    taken = incoming.instance.take_listeners()
    incoming.abort()
    for _, listener in taken:
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()


def test_connections_of_a_machine_that_is_held_can_be_ended(driver: Driver) -> None:
    with started(driver) as instance:
        endpoint = instance.endpoints[0]
        wait_ready(instance, Readiness.parse(f"tcp:{PORT}"), 30.0)
        with (
            socket.create_connection((endpoint.host, endpoint.host_port), timeout=10) as old,
            socket.create_connection((endpoint.host, endpoint.host_port), timeout=10) as other,
        ):
            other.sendall(b"GET /cgi-bin/counter HTTP/1.0\r\n\r\n")
            assert other.recv(1), "it has taken both"
            instance.hold_connections(True)
            instance.cut_connections()
            old.settimeout(10)
            with suppress(ConnectionResetError):
                assert old.recv(1) == b""
        instance.cut_connections()  # there are none: nothing happens
        instance.hold_connections(False)
        assert count(instance) == 2, "it is served again"
