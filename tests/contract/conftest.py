"""The two drivers, each with a base and a folder of its own, for one suite of tests.

Both guests have the same face: a counter at ``/cgi-bin/counter`` that lives in memory, files of ``/www``
served on port 8080, and a shell behind the guest agent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloudlet.control.readiness import wait_ready
from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import BaseImage, Boot, Hypervisor, Incoming, Instance
from cloudlet.hypervisor.fake.driver import FakeHypervisor
from cloudlet.hypervisor.records import processes_of, read_record, records
from cloudlet.model import MEBIBYTE, PublishedPort, Readiness
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, PageSource, Space, runs_of
from cloudlet.settings import Settings
from cloudlet.sparse import copy_data
from tests.images.build import build

PORT = 8080
AGENT = Readiness.parse("agent")
_BATCH = 512


@dataclass
class Driver:
    """A driver under test."""

    settings: Settings
    hypervisor: Hypervisor
    base: BaseImage

    def start(
        self,
        ram: PageSource | None = None,
        disk: PageSource | None = None,
        state: bytes | None = None,
        *,
        name: str = "",
    ) -> Incoming:
        """A running instance of the base, with these pages; its agent answers."""
        incoming = self.hypervisor.resume(self.base, [PublishedPort(PORT)], name=name)
        try:
            fill(incoming, ram or PageSource.empty(), disk or PageSource.empty())
            incoming.finish(self.base.device_state.read_bytes() if state is None else state)
            wait_ready(incoming.instance, AGENT, 30.0)
        except BaseException:
            incoming.abort()
            raise
        return incoming

    def machine_of(self, instance: Instance) -> int:
        """The pid of an instance's machine."""
        record = read_record(instance.directory)
        assert record
        assert record.machine
        return record.machine.pid


def fill(incoming: Incoming, ram: PageSource, disk: PageSource) -> None:
    """Announce pages and hand them over in batches, as the overlay engine does."""
    incoming.begin(PageMap(runs_of(ram.numbers), runs_of(disk.numbers)))
    for space, source in ((Space.DISK, disk), (Space.RAM, ram)):
        for at in range(0, len(source.numbers), _BATCH):
            part = slice(at, at + _BATCH)
            incoming.pages(PageBatch(space, source.numbers[part], source.data[part]))


def nothing_left(settings: Settings) -> bool:
    """Whether no folder, process, socket or record of an instance is there."""
    folder = settings.instances_dir
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    sockets = Path("/proc/net/unix").read_text()
    assert str(folder) not in sockets
    assert records(folder) == []
    assert names in ([], [".lock"])
    return True


@pytest.fixture(scope="session")
def fake_base(tmp_path_factory: pytest.TempPathFactory) -> BaseImage:
    """A captured fake machine."""
    folder = tmp_path_factory.mktemp("fake-base")
    settings = Settings(folder / "cache", folder / "state", folder / "keys", hypervisor="fake")
    hypervisor = FakeHypervisor(settings)
    boot = fake_boot(hypervisor, folder / "disk")
    instance = hypervisor.boot(boot)
    try:
        wait_ready(instance, AGENT, 10.0)
        capture = instance.capture_base(folder / "ram")
    finally:
        instance.stop()
    (folder / "devices").write_bytes(capture.device_state)
    return BaseImage(
        base_id="fa" * 32,
        machine=boot.machine,
        ram=folder / "ram",
        disk=folder / "disk",
        device_state=folder / "devices",
        sections=capture.sections,
    )


def fake_boot(hypervisor: Hypervisor, disk: Path) -> Boot:
    with disk.open("wb") as file:
        file.truncate(4 * MEBIBYTE)
    machine = hypervisor.machine(memory_bytes=4 * MEBIBYTE, disk_bytes=4 * MEBIBYTE)
    return Boot(machine, disk)


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def driver(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Driver]:
    """Each driver; at its end nothing may be left."""
    if request.param == "fake":
        found = Driver(settings, FakeHypervisor(settings), request.getfixturevalue("fake_base"))
    else:
        site = Site.open(settings)
        base = site.bases.find(request.getfixturevalue("quick_base_id"))
        found = Driver(settings, site.hypervisor, base.image())
    yield found
    left = [process for path in settings.instances_dir.glob("*") for process in processes_of(path)]
    assert left == []
    assert nothing_left(settings)


@pytest.fixture
def boot(driver: Driver, tmp_path: Path, request: pytest.FixtureRequest) -> Boot:
    """What a machine is booted from."""
    disk = tmp_path / "disk"
    if driver.hypervisor.name == "fake":
        return fake_boot(driver.hypervisor, disk)
    image = build("quick", request.getfixturevalue("images"))
    with image.disk.open("rb") as source, disk.open("wb") as target:
        target.truncate(image.disk.stat().st_size)
        copy_data(source.fileno(), target.fileno())
    machine = driver.hypervisor.machine(
        memory_bytes=image.memory_mib * MEBIBYTE, disk_bytes=disk.stat().st_size
    )
    return Boot(machine, disk, kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline)


def sh(instance: Instance, script: str) -> str:
    """Run a script in the guest, which must succeed; what it prints."""
    assert instance.agent
    status, output = instance.agent.run(["/bin/sh", "-ec", script], timeout=30.0)
    assert status == 0, output
    return output.decode()


def kept(sources: Sequence[PageSource]) -> list[PageSource]:
    """Copies that outlive the instance they were captured from."""
    return [PageSource(source.numbers.copy(), source.data.copy()) for source in sources]
