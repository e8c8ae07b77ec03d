"""A guest goes on elsewhere before its memory is there, and ends up with every byte of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from cloudlet.control.site import Site
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import Layer, ReceivingEarly, Rounds, RunState
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.records import processes_of
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers, PageBatch, Space
from cloudlet.store.bases import Base
from cloudlet.store.images import DISK as LAYER_DISK
from tests.qemu import guest
from tests.qemu.conftest import Warm
from tests.qemu.early import image_of, starting
from tests.qemu.test_rounds import BATCH, check_equal, check_goes_on, keep_busy, received, send_round

pytestmark = pytest.mark.qemu


class Wanted:
    """What a guest waits for, as it is told."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pages: list[int] = []
        self.seen: set[int] = set()

    def __call__(self, space: Space, numbers: Numbers) -> None:
        assert space is Space.RAM
        with self._changed:
            self._pages += numbers.tolist()
            self.seen.update(numbers.tolist())
            self._changed.notify_all()

    def take(self, timeout: float) -> list[int]:
        with self._changed:
            self._changed.wait_for(lambda: self._pages, timeout)
            taken, self._pages = self._pages, []
            return taken


@contextmanager
def received_early(
    site: Site, base: Base, source: QemuInstance, wanted: Wanted, layer: Layer | None = None
) -> Iterator[ReceivingEarly]:
    receiving = site.hypervisor.receive_early(
        base.image(), wanted, layer=layer, generation_id=source.generation_id()
    )
    try:
        receiving.begin()
        yield receiving
    finally:
        receiving.abort()


class Missing:
    """The pages of a machine that stands still, of which some are brought one after the other."""

    def __init__(self, rounds: Rounds, receiving: ReceivingEarly, numbers: Numbers) -> None:
        self._rounds = rounds
        self._receiving = receiving
        self._left = set(numbers.tolist())
        receiving.lack(numbers)

    def bring(self, pages: list[int]) -> None:
        numbers = np.array(sorted(self._left.intersection(pages)), np.uint32)
        self._left.difference_update(pages)
        for at in range(0, numbers.size, BATCH):
            part = numbers[at : at + BATCH]
            rows = np.empty((part.size, PAGE_BYTES), np.uint8)
            self._rounds.read(Space.RAM, part, rows)
            self._receiving.pages(PageBatch(Space.RAM, part, rows))

    def serve(self, wanted: Wanted, until: threading.Event) -> None:
        """Bring what is waited for."""
        while not until.is_set():
            self.bring(wanted.take(0.05))

    def bring_all(self) -> None:
        self.bring(list(self._left))
        self._receiving.complete()


def stop_early(rounds: Rounds, receiving: ReceivingEarly) -> tuple[bytes, Missing]:
    """Two rounds while the guest runs; then it stands still, its disk is sent, and of RAM nothing."""
    send_round(rounds, receiving)
    send_round(rounds, receiving)
    state, _ = rounds.settle()
    room = np.empty((BATCH, PAGE_BYTES), np.uint8)
    held = rounds.held(Space.DISK)
    for at in range(0, held.size, BATCH):
        numbers = held[at : at + BATCH]
        rounds.read(Space.DISK, numbers, room[: numbers.size])
        receiving.pages(PageBatch(Space.DISK, numbers, room[: numbers.size]))
    return state, Missing(rounds, receiving, rounds.held(Space.RAM))


@contextmanager
def serving(missing: Missing, wanted: Wanted) -> Iterator[None]:
    """Bring what is waited for, beside what is done here."""
    over = threading.Event()
    thread = threading.Thread(target=missing.serve, args=(wanted, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_nothing_is_lost_of_a_guest_that_waits_for_its_memory(
    site: Site, quick_base: Base, tmp_path: Path
) -> None:
    wanted = Wanted()
    with guest.resumed(site, quick_base) as source:
        keep_busy(source)
        with (
            received_early(site, quick_base, source, wanted) as receiving,
            closing(source.rounds(with_layer=False)) as rounds,
        ):
            state, missing = stop_early(rounds, receiving)
            with serving(missing, wanted):
                receiving.load(state)
                assert receiving.progress().missing > 500
            missing.bring_all()
            paging = receiving.progress()
            assert (paging.missing, paging.complete) == (0, True)
            target = receiving.instance
            assert isinstance(target, QemuInstance)
            check_equal(source, target, quick_base, tmp_path, (None, None))
            source.stop()
            check_goes_on(target)


@pytest.mark.slow
def test_on_an_image_and_from_there_on(
    site: Site, warm: Warm, warm_base: Base, ordered: Path, tmp_path: Path
) -> None:
    """It runs while pages come, is captured right, and goes on to a third site."""
    wanted = Wanted()
    with starting(site, str(ordered)) as early:
        source = early.instance
        early.wait()
        layer, app = source.layer, image_of(site, early.made) / LAYER_DISK
        keep_busy(source)
        with received_early(site, warm_base, source, wanted, layer) as receiving:
            with closing(source.rounds(with_layer=False)) as rounds:
                state, missing = stop_early(rounds, receiving)
                with serving(missing, wanted):
                    receiving.load(state)
                    target = receiving.instance
                    assert isinstance(target, QemuInstance)
                    check_goes_on(target, warm)
                    assert wanted.seen, "it has waited for none"
                    assert receiving.progress().missing > 0
                missing.bring_all()
            source.stop()
            check_captured(target, warm_base, app, tmp_path)
            target.resume()
            with (
                closing(target.rounds(with_layer=True)) as again,
                received(site, warm_base, target) as last,
            ):
                state, _ = again.settle()
                send_round(again, last)
                last.load(state)
                check_equal(target, last.instance, warm_base, tmp_path, (app, None))
            with (
                closing(target.rounds(with_layer=False)) as again,
                received(site, warm_base, target, target.layer) as last,
            ):
                state, _ = again.settle()
                send_round(again, last)
                last.load(state)
                check_equal(target, last.instance, warm_base, tmp_path, (app, app))


def check_captured(instance: QemuInstance, base: Base, app: Path, folder: Path) -> None:
    """What a capture finds, on the base, is what the machine has."""
    capture = instance.capture()
    memory = guest.memory_of(instance)
    rebuilt = guest.base_memory(base)
    rebuilt[capture.ram.numbers] = capture.ram.data
    assert guest.differing(rebuilt, memory) == []
    truth, ours = folder / "truth.raw", folder / "ours.raw"
    guest.saved_disk_of(instance, base, truth, app)
    sink = guest.FileSink(base, folder / "ours.ram", ours)
    with ours.open("r+b") as file:
        guest.write_pages(file.fileno(), capture.disk.numbers, capture.disk.data)
    sink.finish(b"")
    assert guest.digest(ours) == guest.digest(truth)


def test_who_waits_ends_when_no_page_comes_any_more(site: Site, quick_base: Base) -> None:
    wanted = Wanted()
    with guest.resumed(site, quick_base) as source:
        with (
            received_early(site, quick_base, source, wanted) as receiving,
            closing(source.rounds(with_layer=False)) as rounds,
        ):
            state, missing = stop_early(rounds, receiving)
            target = receiving.instance
            with serving(missing, wanted):
                receiving.load(state)
                assert target.state() is RunState.PAUSED
                target.resume()  # QEMU itself waits for pages then
            assert wanted.take(20.0), "the guest wants no page"
            assert receiving.progress().waiting_since is not None
            receiving.sever()
            assert target.wait(10.0)
            folder = target.directory
            with pytest.raises(FailedError):
                target.capture()
        assert processes_of(folder) == []
        source.resume()
        assert guest.shell(source, "echo still here") == "still here"
