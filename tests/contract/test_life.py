"""The life of a machine: it boots, waits, runs, pauses, dies, is found again, and leaves nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cloudlet.control.media import write_iso
from cloudlet.control.readiness import wait_ready
from cloudlet.control.site import Site
from cloudlet.errors import ConflictError, FailedError, NotFoundError
from cloudlet.hypervisor.driver import BaseImage, Boot, Instance, RunState
from cloudlet.hypervisor.records import ProcessId, read_record
from cloudlet.model import PublishedPort, Readiness
from cloudlet.overlay.pages import PageSource
from cloudlet.settings import Settings
from tests.contract.conftest import AGENT, PORT, Driver, fill, nothing_left, sh

NOTHING = PageSource.empty()


def get(instance: Instance, path: str, timeout: float = 10.0) -> str:
    with urllib.request.urlopen(instance.endpoints[0].url + path, timeout=timeout) as answer:
        return answer.read().decode()


def test_a_booted_machine_becomes_a_base(driver: Driver, boot: Boot, tmp_path: Path) -> None:
    instance = driver.hypervisor.boot(boot, [PublishedPort(PORT)], name="boots")
    try:
        wait_ready(instance, AGENT, 120.0)
        assert instance.state() is RunState.RUNNING
        wait_ready(instance, Readiness.parse("serial:ready"), 30.0)
        assert get(instance, "/cgi-bin/counter") == "1\n"
        assert instance.cpu_seconds() > 0
        capture = instance.capture_base(tmp_path / "ram")
        assert instance.state() is RunState.PAUSED
    finally:
        instance.stop()
    assert (tmp_path / "ram").stat().st_size == boot.machine.memory_bytes
    (tmp_path / "devices").write_bytes(capture.device_state)
    base = BaseImage(
        "ba" * 32, boot.machine, tmp_path / "ram", boot.disk, tmp_path / "devices", capture.sections,
        boot.kernel, boot.initrd, boot.cmdline,
    )  # fmt: skip
    incoming = Driver(driver.settings, driver.hypervisor, base).start()
    try:
        assert get(incoming.instance, "/cgi-bin/counter") == "2\n"
    finally:
        incoming.abort()


def test_a_machine_waits_for_its_state_and_then_runs(driver: Driver) -> None:
    incoming = driver.hypervisor.resume(driver.base, [PublishedPort(PORT)], name="waits")
    try:
        assert incoming.instance.state() is RunState.INCOMING
        fill(incoming, NOTHING, NOTHING)
        assert incoming.instance.state() is RunState.INCOMING
        incoming.finish(driver.base.device_state.read_bytes())
        assert incoming.instance.state() is RunState.RUNNING
        wait_ready(incoming.instance, Readiness.parse(f"http:{PORT}/"), 30.0)
        assert get(incoming.instance, "/cgi-bin/counter") == "1\n"
    finally:
        incoming.abort()


def test_a_paused_machine_answers_when_it_runs_on(driver: Driver) -> None:
    incoming = driver.start()
    instance = incoming.instance
    try:
        instance.pause()
        instance.pause()
        assert instance.state() is RunState.PAUSED
        assert not instance.agent.ping(0.5)
        with pytest.raises(TimeoutError):
            get(instance, "/", timeout=0.5)
        instance.resume()
        assert instance.state() is RunState.RUNNING
        wait_ready(instance, AGENT, 30.0)
        assert get(instance, "/cgi-bin/counter") == "1\n"
        instance.prepare_pause()
        instance.pause()
        runs = instance.begin_resume()
        runs()
        assert instance.state() is RunState.RUNNING
        assert get(instance, "/cgi-bin/counter") == "2\n"
    finally:
        incoming.abort()


@pytest.mark.parametrize("stage", ["at once", "in the middle", "running"])
def test_what_is_aborted_leaves_nothing(driver: Driver, stage: str) -> None:
    incoming = driver.hypervisor.resume(driver.base, [PublishedPort(PORT)])
    endpoint = incoming.instance.endpoints[0]
    if stage != "at once":
        fill(incoming, NOTHING, NOTHING)
    if stage == "running":
        incoming.finish(driver.base.device_state.read_bytes())
    incoming.abort()
    assert nothing_left(driver.settings)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint.url, timeout=5)
    incoming.abort()


def test_stop_can_be_called_again(driver: Driver) -> None:
    instance = driver.start().instance
    assert not instance.wait(0.05)
    instance.stop()
    assert instance.wait(0.0)
    assert instance.state() is RunState.GONE
    assert nothing_left(driver.settings)
    instance.stop()


def test_a_death_is_noticed(driver: Driver) -> None:
    incoming = driver.start()
    instance = incoming.instance
    try:
        began = time.monotonic()
        assert not instance.wait(0.1)
        assert time.monotonic() - began >= 0.1
        os.kill(driver.machine_of(instance), signal.SIGKILL)
        assert instance.wait(5.0)
        assert instance.state() is RunState.GONE
        with pytest.raises(FailedError, match="ended"):
            wait_ready(instance, AGENT, 5.0)
        with pytest.raises(FailedError, match="gone"):
            instance.capture()
    finally:
        incoming.abort()


def test_a_death_while_pages_come_is_an_error(driver: Driver) -> None:
    incoming = driver.hypervisor.resume(driver.base)
    try:
        fill(incoming, NOTHING, NOTHING)
        os.kill(driver.machine_of(incoming.instance), signal.SIGKILL)
        assert incoming.instance.wait(5.0)
        with pytest.raises(FailedError):
            incoming.finish(driver.base.device_state.read_bytes())
    finally:
        incoming.abort()


def test_another_process_adopts_an_instance(driver: Driver) -> None:
    incoming = driver.start(name="adopted")
    try:
        owned = incoming.instance
        (adopted,) = type(driver.hypervisor)(driver.settings).instances()
        assert (adopted.id, adopted.endpoints) == (owned.id, owned.endpoints)
        assert adopted.state() is RunState.RUNNING
        assert sh(adopted, "cat /etc/hostname")
        adopted.stop()
        assert owned.wait(5.0)
        assert driver.hypervisor.instances() == []
    finally:
        incoming.abort()


def test_a_medium_in_the_optical_drive(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("on the medium")
    write_iso(tmp_path / "image.iso", {"/0/word": tmp_path / "word"}, "words")
    mount = (
        "mkdir -p /run/medium; for try in 1 2 3 4 5 6 7 8 9; do mount -o ro /dev/sr0 /run/medium"
        " 2>/dev/null && break; sleep 1; done; grep -q /run/medium /proc/mounts"
    )
    incoming = driver.start()
    instance = incoming.instance
    try:
        instance.eject_optical()
        instance.insert_optical(tmp_path / "image.iso")
        assert sh(instance, f"{mount}; cat /run/medium/0/word; umount /run/medium") == "on the medium"
        instance.eject_optical()
        status, _ = instance.agent.run(["/bin/sh", "-c", "mount -o ro /dev/sr0 /run/medium"], timeout=30.0)
        assert status
        instance.insert_optical(tmp_path / "image.iso")
        assert sh(instance, f"{mount}; cat /run/medium/0/word; umount /run/medium") == "on the medium"
    finally:
        incoming.abort()


def test_the_guest_has_no_program_of_that_name(driver: Driver) -> None:
    incoming = driver.start()
    try:
        with pytest.raises(FailedError, match="No such file"):
            incoming.instance.agent.run(["/bin/there-is-none"], timeout=10.0)
    finally:
        incoming.abort()


def test_a_port_that_is_taken(driver: Driver) -> None:
    incoming = driver.hypervisor.resume(driver.base, [PublishedPort(PORT)])
    taken = incoming.instance.endpoints[0].host_port
    try:
        with pytest.raises(ConflictError, match=str(taken)):
            driver.hypervisor.resume(driver.base, [PublishedPort(PORT, host_port=taken)])
    finally:
        incoming.abort()
    driver.hypervisor.resume(driver.base, [PublishedPort(PORT, host_port=taken)]).abort()


def test_a_disk_that_is_missing(driver: Driver, boot: Boot) -> None:
    boot.disk.unlink()
    with pytest.raises(NotFoundError, match="missing"):
        driver.hypervisor.boot(boot)
    assert nothing_left(driver.settings)


_OWNER = """
import sys
from pathlib import Path
from tests.contract.test_life import own
own(sys.argv[1], *map(Path, sys.argv[2:]))
"""


def own(kind: str, cache: Path, state: Path, base: Path) -> None:
    """Be the process that starts an instance; say so, and wait to be killed."""
    site = Site.open(Settings(cache, state, state / "keys", hypervisor=kind, accelerator="tcg"))
    driver = Driver(site.settings, site.hypervisor, pickle.loads(base.read_bytes()))
    print(driver.start().instance.id, flush=True)
    signal.pause()


def test_what_a_killed_owner_left_is_removed(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(pickle.dumps(driver.base))
    settings = driver.settings
    folders = [settings.cache_dir, settings.state_dir, tmp_path / "base"]
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, driver.hypervisor.name, *map(str, folders)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with owner:
        assert owner.stdout
        started = owner.stdout.readline().strip()
        record = read_record(settings.instances_dir / started)
        assert record
        assert record.machine
        try:
            assert driver.hypervisor.reap() == []  # its owner lives
            assert record.machine.alive()
        finally:
            owner.kill()
    machine: ProcessId = record.machine
    assert driver.hypervisor.reap() == [started]
    assert not machine.alive()
    assert nothing_left(settings)
