"""Bases from images that we did not make: imported, changed, resumed, rebooted.

The images are built on first use, and those that boot slowly are imported once and kept, as the quick
guest's base is (``tests/conftest.py``).
"""

from __future__ import annotations

import http.client
import os
import pty
import select
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cloudlet.control import bases
from cloudlet.control.publishing import create_interactively, create_overlay
from cloudlet.control.readiness import wait_ready
from cloudlet.control.site import Site
from cloudlet.control.synthesis import Synthesised, synthesise
from cloudlet.errors import FailedError, NotFoundError
from cloudlet.hypervisor.driver import Instance
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.model import MEBIBYTE, Firmware, GuestPort, PublishedPort, Readiness
from cloudlet.overlay.root import App
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from cloudlet.transfer.source import open_source
from tests.conftest import KEPT, CommandLine
from tests.images.build import TestImage, build
from tests.qemu import guest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

REBOOT_SECONDS = 300.0


def import_image(site: Site, image: TestImage, name: str, *, cloud_init: bool = False) -> Base:
    """Import an image as its description says."""
    request = bases.BaseRequest(
        name=name,
        memory_bytes=image.memory_mib * MEBIBYTE,
        firmware=Firmware.UEFI if image.uefi else Firmware.BIOS,
        ready=Readiness.parse(image.ready),
    )
    return bases.import_image(
        site,
        request,
        image.disk,
        say=print,
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.cmdline,
        cloud_init=cloud_init,
    )


@dataclass(frozen=True)
class Kept:
    """Imported bases, from one run to the next."""

    images: Path
    folder: Path

    def __call__(self, name: str, *, cloud_init: bool = False, ready: str = "") -> str:
        """The identity of the base made from an image."""
        image = build(name, self.images)
        image = replace(image, ready=ready or image.ready)
        settings = Settings(
            cache_dir=KEPT / "cache", state_dir=self.folder, keys_dir=self.folder / "keys", accelerator="tcg"
        )
        site = Site.open(settings)
        kept = f"{name}-{image.disk.stat().st_mtime_ns}"
        try:
            return site.bases.find(kept).id
        except NotFoundError:
            return import_image(site, image, kept, cloud_init=cloud_init).id


@pytest.fixture(scope="session")
def kept(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(images, tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def serial(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line in folders that hold one base: a guest with nothing but a serial console."""
    folder = tmp_path_factory.mktemp("serial")
    settings = Settings(
        cache_dir=folder / "cache", state_dir=folder / "state", keys_dir=folder / "keys", accelerator="tcg"
    )
    site = Site.open(settings)
    site.keys.generate()
    base = import_image(site, build("serial", images), "serial")
    assert not base.description.guest.agent
    assert site.hypervisor.instances() == []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
    environment |= {
        "OS_DEFAULT__CACHE_DIR": str(settings.cache_dir),
        "OS_DEFAULT__STATE_DIR": str(settings.state_dir),
        "OS_DEFAULT__KEYS_DIR": str(settings.keys_dir),
        "OS_DEFAULT__ACCELERATOR": settings.accelerator,
    }
    yield CommandLine(settings, environment)
    # What a command that a failing test killed has left is removed when the site is opened.
    assert Site.open(settings).hypervisor.instances() == []


class Typist:
    """Somebody at a terminal that a command runs on."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self._terminal, theirs = pty.openpty()
        try:
            self.process = subprocess.Popen(
                argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
            )
        finally:
            os.close(theirs)
        self.seen = b""

    def expect(self, text: bytes, seconds: float = 30.0) -> None:
        """Read until ``text`` has come after what was waited for before."""
        deadline = time.monotonic() + seconds
        pending = b""
        while text not in pending:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come within {seconds:.0f} s: {self.seen!r}"
            try:
                pending += (block := os.read(self._terminal, 4096))
            except OSError:  # the other side of the terminal is closed
                raise AssertionError(f"the command ended before {text!r}: {self.seen!r}") from None
            self.seen += block

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def rest(self, seconds: float = 60.0) -> bytes:
        """All that still comes until the command has ended."""
        deadline = time.monotonic() + seconds
        said = b""
        with suppress(OSError):
            while select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                said += os.read(self._terminal, 4096)
        self.process.wait(max(0.1, deadline - time.monotonic()))
        return said

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._terminal)


def test_a_guest_without_agent_is_changed_by_hand_on_a_terminal(serial: CommandLine, tmp_path: Path) -> None:
    overlay = tmp_path / "by-hand.overlay"
    argv = serial.argv("overlay", "create", "serial", "--interactive", "-o", overlay, "-p", "8080")
    typist = Typist(argv, serial.environment)
    try:
        typist.expect(b"Ctrl-]")
        typist.type(b"\r")
        typist.expect(b"# ")
        typist.type(b"mkdir /www/made; echo by-ha''nd > /www/made/word; sync; cat /www/made/word\r")
        typist.expect(b"by-hand")
        typist.type(b"\x1d")
        said = typist.rest()
        assert typist.process.returncode == 0, said
    finally:
        typist.leave()
    check_by_hand(serial, overlay)


def test_a_guest_without_agent_is_changed_through_a_pipe(serial: CommandLine, tmp_path: Path) -> None:
    overlay = tmp_path / "by-hand.overlay"
    argv = serial.argv("overlay", "create", "serial", "--interactive", "-o", overlay, "-p", "8080")
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=serial.environment
    )
    try:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"mkdir /www/made; echo by-ha''nd > /www/made/word; sync; cat /www/made/word\n")
        process.stdin.flush()
        seen = b""
        while b"by-hand" not in seen:
            block = os.read(process.stdout.fileno(), 4096)
            assert block, "the command ended early"
            seen += block
        _, said = process.communicate(timeout=60)  # closes the pipe, which means: done
        assert process.returncode == 0, said.decode()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    check_by_hand(serial, overlay)


def check_by_hand(serial: CommandLine, overlay: Path) -> None:
    """A clone of the overlay serves what was typed, and comes up again after a reboot."""
    site = Site.open(serial.settings)
    with open_source(str(overlay), None) as source, synthesise(site, source) as made:
        assert not made.renewed, "nobody in the guest can be told"
        assert made.instance.agent is not None
        assert not made.instance.agent.ping(0.3)
        endpoint = made.instance.endpoints[0]
        fetch(endpoint.host_port, "/made/word", b"by-hand\n")
        with made.instance.open_console() as console:
            console.sendall(b"\rreboot\r")
        wait_ready(made.instance, Readiness.parse("serial:cloudlet-test ready"), REBOOT_SECONDS)
        fetch(endpoint.host_port, "/made/word", b"by-hand\n")


def fetch(port: int, path: str, wanted: bytes) -> None:
    """The guest's answer over HTTP is this."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        assert answer.read() == wanted


def recipe_overlay(site: Site, base: Base, folder: Path, run: str) -> Path:
    """An overlay made by a recipe with a file and a command."""
    recipe, output = folder / "recipe", folder / "made.overlay"
    (recipe / "files").mkdir(parents=True)
    (recipe / "files" / "word").write_text("from the recipe")
    (recipe / "recipe.yaml").write_text(
        f"name: made\nfiles: [{{from: files/, to: /srv/made/}}]\nrun: ['{run}']\n"
    )
    create_overlay(
        site, base, recipe, output, build_folder=folder / "build", sign=site.keys.signer(), say=print
    )
    return output


def reboot(instance: QemuInstance) -> None:
    """Reboot by the guest's own means and wait until its agent answers again, in another boot."""
    before = guest.shell(instance, "cat /proc/sys/kernel/random/boot_id", timeout=60.0)
    guest.shell(instance, "(sleep 1; reboot) > /dev/null 2>&1 &", timeout=60.0)
    deadline = time.monotonic() + REBOOT_SECONDS
    while True:
        with suppress(AssertionError, FailedError):
            if guest.shell(instance, "cat /proc/sys/kernel/random/boot_id", timeout=5.0) != before:
                return
        assert not instance.wait(0.5), f"the machine ended: {instance.last_words()}"
        assert time.monotonic() < deadline, "the guest did not come up again"


def check_clone_and_reboot(
    made: Synthesised, also: Callable[[QemuInstance], None] = lambda instance: None
) -> None:
    assert made.renewed
    assert isinstance(made.instance, QemuInstance)
    read = "cat /srv/made/word; echo; cat /srv/made/run"
    assert guest.shell(made.instance, read).split("\n") == ["from the recipe", "ran"]
    name = guest.shell(made.instance, "hostname")
    assert name == f"made-{made.instance.id}"
    reboot(made.instance)
    assert guest.shell(made.instance, read, timeout=60.0).split("\n") == ["from the recipe", "ran"]
    assert guest.shell(made.instance, "hostname", timeout=60.0) == name, "a clone stays who it is"
    also(made.instance)


@pytest.mark.slow
def test_a_uefi_image_is_imported_changed_and_rebooted(site: Site, kept: Kept, tmp_path: Path) -> None:
    base = site.bases.find(kept("uefi"))
    assert base.machine.firmware is Firmware.UEFI
    assert base.description.guest.agent
    overlay = recipe_overlay(site, base, tmp_path, "echo ran > /srv/made/run; sync")
    with open_source(str(overlay), None) as source, synthesise(site, source) as made:
        check_clone_and_reboot(made)
    site.bases.verify(base)


@pytest.mark.slow
def test_a_cloud_image_is_imported_changed_and_rebooted(site: Site, kept: Kept, tmp_path: Path) -> None:
    base = site.bases.find(kept("grub-bios", cloud_init=True))
    assert base.description.guest.agent
    overlay = recipe_overlay(site, base, tmp_path, "echo ran > /srv/made/run; sync")

    def cloud_init_stays_off(instance: QemuInstance) -> None:
        assert "disabled" in guest.shell(instance, "cloud-init status || true", timeout=60.0)
        # Its network, which cloud-init wrote on the first boot, is there without it.
        assert "10.0.2.15/24" in guest.shell(instance, "ip -br -4 address", timeout=60.0)
        grown = int(guest.shell(instance, "df -B1 --output=size / | tail -n 1", timeout=60.0))
        assert grown > 7 << 30, "the root file system fills the disk"

    with open_source(str(overlay), None) as source, synthesise(site, source) as made:
        keys = guest.shell(made.instance, "cat /etc/ssh/ssh_host_*.pub", timeout=60.0)
        with guest.resumed(site, base) as other:
            assert guest.shell(other, "cat /etc/ssh/ssh_host_ed25519_key.pub", timeout=60.0) not in keys
        check_clone_and_reboot(made, cloud_init_stays_off)
        assert guest.shell(made.instance, "cat /etc/ssh/ssh_host_*.pub", timeout=60.0) == keys
    site.bases.verify(base)


@pytest.mark.slow
def test_another_distribution_with_its_own_service_is_imported_and_rebooted(
    site: Site, kept: Kept, tmp_path: Path
) -> None:
    # The service answers whom it does not know with status 401, which is not what the rule http: waits for.
    rule = Readiness.parse("serial:Listening on 0.0.0.0:8080")
    base = site.bases.find(kept("alpine", ready=str(rule)))
    assert not base.description.guest.agent
    overlay = tmp_path / "alpine.overlay"
    app = App("alpine", ports=(GuestPort(8080),), ready=rule)

    def look(instance: Instance) -> None:
        await_status(instance.endpoints[0].host_port, "/ping", 401)

    create_interactively(
        site, base, app, overlay, until=look, sign=site.keys.signer(), say=print, ports=[PublishedPort(8080)]
    )
    with open_source(str(overlay), None) as source, synthesise(site, source) as made:
        assert not made.renewed
        assert isinstance(made.instance, QemuInstance)
        look(made.instance)
        made.instance.monitor.execute("system_reset")
        wait_ready(made.instance, rule, REBOOT_SECONDS)
        look(made.instance)


def await_status(port: int, path: str, wanted: int) -> None:
    """The guest's service answers with this status; it listens a little before its network is up."""
    deadline = time.monotonic() + 60.0
    while True:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with closing(connection):
                connection.request("GET", path)
                assert connection.getresponse().status == wanted
                return
        assert time.monotonic() < deadline, "the service does not answer"
        time.sleep(0.2)  # a guest tells nobody when it can be reached
