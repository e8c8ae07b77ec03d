"""A real guest that never stops writing is read in rounds, and goes on elsewhere with every byte of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import Layer, Receiving, Rounds, RunState
from cloudlet.hypervisor.qemu.instance import DISK, QemuInstance
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.apply import apply
from cloudlet.overlay.pages import PageBatch, Space
from cloudlet.overlay.reader import OverlayReader
from cloudlet.store.bases import Base
from cloudlet.store.images import DISK as LAYER_DISK
from cloudlet.store.images import layer_in
from tests.qemu import guest
from tests.qemu.conftest import Warm
from tests.qemu.early import image_of, starting

pytestmark = pytest.mark.qemu

BATCH = 256
BUSY = """
while true; do
  turn=$((turn + 1)); echo $turn > /run/turn.new; mv /run/turn.new /run/turn
  dd if=/dev/urandom of=/run/busy bs=64k count=16 seek=$((turn % 8 * 16)) conv=notrunc
  dd if=/dev/urandom of=/root/busy bs=64k count=4 seek=$((turn % 8 * 4)) conv=notrunc
  test $((turn % 4)) = 3 && rm /root/busy
  sync
  test $((turn % 4)) = 3 && fstrim /
done
"""
"""Shell commands that write to memory and disk, and give blocks of the disk back."""


@contextmanager
def received(site: Site, base: Base, source: QemuInstance, layer: Layer | None = None) -> Iterator[Receiving]:
    receiving = site.hypervisor.receive(base.image(), layer=layer, generation_id=source.generation_id())
    try:
        receiving.begin()
        yield receiving
    finally:
        receiving.abort()


def keep_busy(instance: QemuInstance) -> None:
    guest.shell(instance, f"({BUSY}) >/dev/null 2>&1 &\nuntil test -e /run/turn; do usleep 20000; done")


def turns(instance: QemuInstance) -> int:
    return int(guest.shell(instance, "cat /run/turn"))


def send_round(rounds: Rounds, receiving: Receiving) -> dict[Space, int]:
    """Send all that is held, as it is now; how many pages."""
    room = np.empty((BATCH, PAGE_BYTES), np.uint8)
    sent = {}
    for space in Space:
        held = rounds.held(space)
        for at in range(0, held.size, BATCH):
            numbers = held[at : at + BATCH]
            rounds.read(space, numbers, room[: numbers.size])
            receiving.pages(PageBatch(space, numbers, room[: numbers.size]))
        sent[space] = held.size
    return sent


def hand_over(rounds: Rounds, receiving: Receiving, turns_of: QemuInstance | None = None) -> None:
    """Some rounds while the guest writes, and the last one while it stands still."""
    for _ in range(3):
        send_round(rounds, receiving)
        rounds.pass_over_layer()
        if turns_of:
            before = turns(turns_of)
            guest.shell(turns_of, f"until test $(cat /run/turn) -gt {before + 1}; do usleep 20000; done")
    state, _ = rounds.settle()
    sent = send_round(rounds, receiving)
    assert sent[Space.RAM] > 200
    assert sent[Space.DISK] > 0
    receiving.load(state)


def check_equal(
    source: QemuInstance, target: QemuInstance, base: Base, folder: Path, layers: tuple[Path | None, ...]
) -> None:
    """Both stand still, and all RAM and all of the disk are the same: not only to the program's own eyes.

    :param layers: the files of the disks on which theirs stand.
    """
    assert [source.state(), target.state()] == [RunState.PAUSED, RunState.PAUSED]
    assert guest.differing(guest.memory_of(source), guest.memory_of(target)) == []
    checked = subprocess.run(
        ["qemu-img", "check", "--force-share", "-f", "qcow2", str(target.directory / DISK)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "No errors" in checked.stdout
    disks = []
    for instance, layer in zip((source, target), layers, strict=True):
        disks.append(folder / f"{instance.id}.raw")
        guest.saved_disk_of(instance, base, disks[-1], layer)
    assert guest.digest(disks[0]) == guest.digest(disks[1])
    # The journal of a disk that was in use is replayed, as at the next boot; then nothing is wrong.
    assert subprocess.run(["e2fsck", "-p", disks[1]], check=False, timeout=60).returncode in (0, 1)
    checked = subprocess.run(
        ["e2fsck", "-fn", disks[1]], capture_output=True, text=True, check=False, timeout=60
    )
    assert checked.returncode == 0, checked.stdout
    for disk in disks:
        disk.unlink()
    assert source.digest() == target.digest()


def check_goes_on(target: QemuInstance, warm: Warm | None = None) -> None:
    target.resume()
    first = turns(target)
    guest.shell(target, f"until test $(cat /run/turn) -gt {first + 2}; do usleep 20000; done")
    if warm:
        guest.shell(target, "echo 3 > /proc/sys/vm/drop_caches")
        assert guest.shell(target, "sha256sum < /run/known").split()[0] == warm.in_memory
        assert guest.shell(target, "sha256sum < /root/known").split()[0] == warm.on_disk
        assert guest.shell(target, f"{guest.COUNT}") == "4"
    forks = "dmesg | grep -c 'crng reseeded due to virtual' || true"
    assert guest.shell(target, forks) == str(warm.forks + 1 if warm else 1), "it noticed that it is a copy"


def test_a_busy_guest_goes_on_elsewhere(site: Site, quick_base: Base, tmp_path: Path) -> None:
    with guest.resumed(site, quick_base) as source:
        guest.shell(source, "rm /www/index.html")  # a block of the base that is zeros when it is given back
        keep_busy(source)
        with (
            received(site, quick_base, source) as receiving,
            closing(source.rounds(with_layer=False)) as rounds,
        ):
            hand_over(rounds, receiving, source)
            target = receiving.instance
            assert isinstance(target, QemuInstance)
            check_equal(source, target, quick_base, tmp_path, (None, None))
            source.stop()
            check_goes_on(target)


def test_on_an_image_or_on_the_base_only(
    site: Site, warm: Warm, warm_base: Base, ordered: Path, tmp_path: Path
) -> None:
    with starting(site, str(ordered)) as early:
        source, layer = early.instance, early.instance.layer
        assert layer
        keep_busy(source)
        # It waits for what is still to come. The target has the base only.
        with (
            closing(source.rounds(with_layer=True)) as rounds,
            received(site, warm_base, source) as on_base,
        ):
            early.wait()
            assert rounds.held(Space.RAM).size > layer.pages.runs(Space.RAM)[:, 1].sum()
            app = image_of(site, early.made) / LAYER_DISK
            hand_over(rounds, on_base, source)
            check_equal(source, on_base.instance, warm_base, tmp_path, (app, None))
            with (
                closing(source.rounds(with_layer=False)) as fewer,
                received(site, warm_base, source, layer) as on_image,
            ):
                # It was settled before, and is settled again.
                hand_over(fewer, on_image)
                # After the first round what the layer brings is passed over there, too.
                assert np.array_equal(fewer.held(Space.RAM), rounds.held(Space.RAM))
                check_equal(source, on_image.instance, warm_base, tmp_path, (app, app))
                source.stop()
                check_goes_on(on_image.instance, warm)
                # And from there to one that has nothing but the base.
                with (
                    closing(on_image.instance.rounds(with_layer=True)) as again,
                    received(site, warm_base, on_image.instance) as last,
                ):
                    hand_over(again, last, on_image.instance)
                    check_equal(on_image.instance, last.instance, warm_base, tmp_path, (app, None))


def test_a_layer_that_is_written_without_a_machine(
    site: Site, warm: Warm, warm_base: Base, ordered: Path, tmp_path: Path
) -> None:
    with ordered.open("rb") as stream, warm_base.pages() as pages:
        reader = OverlayReader(stream, None, allow_unsigned=True)
        sink = _InLayer(site, warm_base, tmp_path, reader.identity)
        try:
            apply(reader, pages, sink)
        finally:
            sink.close()
    with site.hypervisor.layer_pages(sink.layer, warm_base.machine) as held:
        for space, truth in ((Space.RAM, warm.capture.ram), (Space.DISK, warm.capture.disk)):
            found = held[space]
            # An overlay does not bring what the base has there.
            brought = np.isin(truth.numbers, found.numbers)
            assert np.array_equal(found.numbers, truth.numbers[brought])
            assert found.numbers.size > truth.numbers.size // 2
            file = np.memmap(f"/proc/self/fd/{found.descriptor}", np.uint8, "r")
            rows = np.stack([file[at : at + PAGE_BYTES] for at in found.offsets.tolist()])
            assert np.array_equal(rows, truth.data[brought])
    incoming = site.hypervisor.resume(warm_base.image(), layer=sink.layer)
    try:
        guest.begin_with_nothing(incoming)
        incoming.finish(sink.device_state)
        assert guest.shell(incoming.instance, "sha256sum < /run/known").split()[0] == warm.in_memory
        assert guest.shell(incoming.instance, "sha256sum < /root/known").split()[0] == warm.on_disk
    finally:
        incoming.abort()


class _InLayer:
    """The sink of a layer whose map is known only when it comes."""

    def __init__(self, site: Site, base: Base, folder: Path, overlay_id: str) -> None:
        self._site, self._base, self._folder, self._overlay_id = site, base, folder, overlay_id

    def begin(self, pages) -> None:
        self.layer = layer_in(self._folder, self._overlay_id, pages)
        self._sink = self._site.hypervisor.layer_sink(self._base.image(), self.layer)
        self._sink.begin(pages)

    def pages(self, batch: PageBatch) -> None:
        self._sink.pages(batch)

    def finish(self, device_state: bytes) -> None:
        self.device_state = device_state
        self._sink.finish(device_state)

    def close(self) -> None:
        self._sink.close()
