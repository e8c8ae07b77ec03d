"""Nothing is lost: what a capture holds, and what a clone gets, against the truth got on other ways."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import RunState
from cloudlet.overlay.apply import apply
from cloudlet.overlay.pages import Space, numbers_of
from cloudlet.overlay.reader import OverlayReader
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from tests.qemu import guest
from tests.qemu.conftest import Warm

pytestmark = pytest.mark.qemu


def test_qemu_and_the_process_agree_on_the_memory(warm: Warm) -> None:
    # Else the two truths below were no truths.
    seen = guest.differing(warm.memory, warm.cpu_view)
    assert [page for page in seen if page not in range(guest.SHADOWED.start, guest.SHADOWED.stop)] == []


def test_base_and_captured_pages_are_the_whole_memory(warm: Warm, warm_base: Base) -> None:
    rebuilt = guest.base_memory(warm_base)
    really = set(guest.differing(rebuilt, warm.memory))
    captured = set(warm.capture.ram.numbers.tolist())
    assert really - captured == set(), "pages changed and were not captured"
    assert len(really) > 24 << 8, "the guest wrote 24 MiB into memory"
    rebuilt[warm.capture.ram.numbers] = warm.capture.ram.data
    assert guest.differing(rebuilt, warm.memory) == []


def test_base_and_captured_blocks_are_the_whole_disk(warm: Warm, warm_base: Base, tmp_path: Path) -> None:
    sink = guest.FileSink(warm_base, tmp_path / "ram", tmp_path / "disk")
    descriptor = os.open(tmp_path / "disk", os.O_RDWR)
    guest.write_pages(descriptor, warm.capture.disk.numbers, warm.capture.disk.data)
    os.close(descriptor)
    sink.finish(b"")
    assert guest.digest(tmp_path / "disk") == guest.digest(warm.disk)
    assert guest.digest(warm.disk) != guest.digest(warm_base.image().disk)


def test_a_block_given_back_by_the_guest_is_captured_as_zeros(warm: Warm, warm_base: Base) -> None:
    zeros = ~warm.capture.disk.data.any(axis=1)
    with warm_base.pages() as pages:
        before = pages.disk(warm.capture.disk.numbers[zeros])
    assert before.any(axis=1).sum() > 0, "no block went from something to nothing: fstrim did not arrive"
    # All of the free disk was given back, a million blocks; where the base has zeros too, nothing changed.
    assert len(warm.capture.disk.numbers) < 10_000


def test_the_overlay_rebuilds_memory_and_disk(warm: Warm, warm_base: Base, tmp_path: Path) -> None:
    sink = guest.FileSink(warm_base, tmp_path / "ram", tmp_path / "disk")
    with warm.overlay.open("rb") as source, warm_base.pages() as pages:
        apply(OverlayReader(source, None, allow_unsigned=True), pages, sink)
    ram = np.fromfile(tmp_path / "ram", np.uint8).reshape(warm.memory.shape)
    assert guest.differing(ram, warm.memory) == []
    assert guest.digest(tmp_path / "disk") == guest.digest(warm.disk)
    assert sink.device_state == warm.capture.device_state
    brought = set(numbers_of(sink.announced[Space.RAM]).tolist())
    assert brought == set(guest.differing(guest.base_memory(warm_base), warm.memory)), "and nothing more"


@contextmanager
def halted(settings: Settings) -> Iterator[Settings]:
    """Settings whose QEMU does not let a machine run by itself (``-S``), so that its start can be seen."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # the machine's user has to start it
        program = folder / "qemu"
        program.write_text('#!/bin/sh\ncase $1 in --version) exec qemu-system-x86_64 "$1" ;; esac\n')
        with program.open("a") as file:
            file.write('exec qemu-system-x86_64 "$@" -S\n')
        program.chmod(0o755)
        yield replace(settings, qemu_binary=str(program))


def test_a_clone_starts_with_exactly_the_captured_memory(
    site: Site, settings: Settings, warm: Warm, warm_base: Base
) -> None:
    with (
        halted(settings) as changed,
        guest.clone_of(Site.open(changed), warm_base, warm.overlay) as instance,
    ):
        assert instance.state() is RunState.PAUSED
        loaded = guest.memory_of(instance)
        generation = uuid.UUID(instance.monitor.execute("query-vm-generation-id")["guid"])
        (page,) = guest.differing(loaded, warm.memory)
        places = np.flatnonzero(loaded[page] != warm.memory[page])
        first = int(loaded[page].tobytes().find(generation.bytes_le))
        assert first >= 0, "the one page that differs holds the new generation ID"
        assert set(places.tolist()) <= set(range(first, first + 16)), "and differs in nothing else"
        instance.resume()
        assert guest.shell(instance, "sha256sum < /run/known").split()[0] == warm.in_memory


def test_a_process_goes_on_where_it_was_captured(site: Site, warm: Warm, warm_base: Base) -> None:
    with guest.clone_of(site, warm_base, warm.overlay) as instance:
        script = f"{guest.COUNT}; {guest.COUNT}"
        assert guest.shell(instance, script).split() == ["4", "5"]
    with guest.clone_of(site, warm_base, warm.overlay) as instance:
        assert guest.shell(instance, script).split() == ["4", "5"], "each clone counts for itself"


def test_files_are_whole_in_memory_and_on_disk(site: Site, warm: Warm, warm_base: Base) -> None:
    with guest.clone_of(site, warm_base, warm.overlay) as instance:
        assert guest.shell(instance, "sha256sum < /run/known").split()[0] == warm.in_memory
        assert guest.shell(instance, "sha256sum < /root/known").split()[0] == warm.on_disk
        guest.shell(instance, "sync; echo 3 > /proc/sys/vm/drop_caches")
        reads = int(guest.shell(instance, "awk '{print $3}' /sys/block/vda/stat"))
        assert guest.shell(instance, "sha256sum < /root/known; cat /root/late").split() == [
            warm.on_disk,
            "-",
            "not-yet-on-the-disk",
        ]
        sectors = int(guest.shell(instance, "awk '{print $3}' /sys/block/vda/stat")) - reads
        assert sectors >= (8 << 20) // 512, "the second reading came from the disk"


def test_the_disk_of_a_clone_that_was_shut_down_is_clean(
    site: Site, warm: Warm, warm_base: Base, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    with guest.clone_of(site, warm_base, warm.overlay) as instance:
        guest.shell(
            instance, "echo written by the clone > /root/clone; (sleep 1; poweroff) >/dev/null 2>&1 &"
        )
        assert instance.wait(30.0), "the guest did not go off"
        guest.saved_disk_of(instance, warm_base, disk)
    assert subprocess.run(["e2fsck", "-p", disk], check=False, timeout=60).returncode in (0, 1)
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stdout.decode()
    for inside, want in (
        ("/root/clone", b"written by the clone\n"),
        ("/root/late", b"not-yet-on-the-disk\n"),
    ):
        command = ["debugfs", "-R", f"cat {inside}", str(disk)]
        assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == want
    known = tmp_path / "known"
    subprocess.run(["debugfs", "-R", f"dump /root/known {known}", str(disk)], check=True, timeout=60)
    found = subprocess.run(["sha256sum", str(known)], capture_output=True, check=True, text=True)
    assert found.stdout.split()[0] == warm.on_disk
