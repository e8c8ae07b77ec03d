"""What the fake driver adds to the contract, and the whole way from a recipe to a synthesised machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloudlet.control.publishing import create_overlay
from cloudlet.control.readiness import wait_ready
from cloudlet.control.site import Site
from cloudlet.control.synthesis import resume_base, synthesise
from cloudlet.errors import FailedError, MismatchError, NotFoundError, RefusedError
from cloudlet.hypervisor.driver import Boot, Instance, Layer, RunState
from cloudlet.hypervisor.fake.driver import FakeHypervisor
from cloudlet.hypervisor.fake.files import page_of
from cloudlet.hypervisor.records import records
from cloudlet.model import MEBIBYTE, Accelerator, PublishedPort, Readiness
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import runs_of
from cloudlet.settings import Settings, load
from cloudlet.store import bases as store
from cloudlet.store.bases import Base, Guest
from cloudlet.transfer.source import open_source

AGENT = Readiness.parse("agent")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    settings = Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "keys", hypervisor="fake")
    opened = Site.open(settings)
    opened.keys.generate()
    yield opened
    assert records(settings.instances_dir) == []
    assert [path.name for path in settings.instances_dir.glob("*") if path.name != ".lock"] == []


def boot(site: Site, disk: Path, size: int = 4 * MEBIBYTE) -> Instance:
    with disk.open("wb") as file:
        file.truncate(size)
    machine = site.hypervisor.machine(memory_bytes=size, disk_bytes=size)
    return site.hypervisor.boot(Boot(machine, disk), [PublishedPort(80)])


@pytest.fixture
def base(site: Site) -> Base:
    with site.bases.workspace() as workspace:
        instance = boot(site, workspace.path / store.DISK)
        try:
            wait_ready(instance, AGENT, 10.0)
            capture = instance.capture_base(workspace.path / store.RAM)
        finally:
            instance.stop()
        (workspace.path / store.DEVICE_STATE).write_bytes(capture.device_state)
        description = site.bases.describe(
            workspace.path,
            machine=site.hypervisor.machine(memory_bytes=4 * MEBIBYTE, disk_bytes=4 * MEBIBYTE),
            sections=capture.sections,
            cmdline="",
            ready=AGENT,
            guest=Guest(agent=True, clone_agent=True, quiet=True),
        )
        return site.bases.adopt(workspace.path, description, "fake", "2026-01-01T00:00:00Z")


def get(instance: Instance, path: str) -> bytes:
    with urllib.request.urlopen(instance.endpoints[0].url + path, timeout=5) as answer:
        return answer.read()


def test_from_a_recipe_to_a_synthesised_machine(site: Site, base: Base, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    (recipe / "files").mkdir(parents=True)
    (recipe / "files" / "word").write_text("from the recipe")
    (recipe / "recipe.yaml").write_text(
        "name: hello\nfiles: [{from: files/, to: /www/hello/}]\nports: [{port: 80}]\n"
        "ready: 'http:80/hello/word'\n"
        "run: ['test -s /www/hello/word', 'poke ram 700 1', 'poke ram 701 2', 'poke disk 800 3']\n"
    )
    output = tmp_path / "hello.overlay"
    published = create_overlay(
        site, base, recipe, output, build_folder=tmp_path / "build", sign=site.keys.signer(), say=print
    )
    assert published.path == output
    identities = []
    for _ in range(2):
        with open_source(str(output), None) as source, synthesise(site, source) as made:
            assert made.signed_by == "default"
            assert made.renewed
            assert get(made.instance, "/hello/word") == b"from the recipe"
            assert get(made.instance, "/counter") == b"1\n"
            identities.append(json.loads(get(made.instance, "/identity")))
            assert identities[-1]["hostname"] == f"hello-{made.instance.id}"
            capture = made.instance.capture()
            pages = {
                number: capture.ram.data[at].tobytes()
                for at, number in enumerate(capture.ram.numbers.tolist())
            }
            assert (pages[700], pages[701]) == (page_of(1), page_of(2))
            blocks = dict(zip(capture.disk.numbers.tolist(), capture.disk.data, strict=True))
            assert blocks[800].tobytes() == page_of(3)
            assert set(range(701)) - set(pages), "all of RAM was captured"
    assert identities[0]["generation"] != identities[1]["generation"]


def test_a_step_of_the_recipe_that_fails(site: Site, base: Base, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "recipe.yaml").write_text("name: hello\nrun: ['cat /none']\n")
    with pytest.raises(FailedError, match=r"'cat /none' gave 1: cat: /none: No such file"):
        create_overlay(
            site, base, tmp_path / "recipe", tmp_path / "overlay", build_folder=tmp_path, sign=None, say=print
        )
    assert not (tmp_path / "overlay").exists()


def test_fake_machines_have_no_layers(site: Site, base: Base, tmp_path: Path) -> None:
    none = runs_of(np.empty(0, np.uint32))
    layer = Layer("ab" * 32, PageMap(none, none), tmp_path / "ram", tmp_path / "disk")
    for attempt in (
        lambda: site.hypervisor.receive(base.image(), layer=layer),
        lambda: site.hypervisor.layer_pages(layer, base.machine),
        lambda: site.hypervisor.layer_sink(base.image(), layer),
        lambda: site.hypervisor.receive_early(base.image(), lambda *_: None),
    ):
        with pytest.raises(RefusedError, match="all of their overlay"):
            attempt()


def test_the_power_button(site: Site, base: Base) -> None:
    with resume_base(site, base) as instance:
        instance.pause()
        assert not instance.shut_down(0.05)
        instance.resume()
        assert instance.shut_down(5.0)
        assert instance.state() is RunState.GONE


def test_the_console(site: Site, base: Base) -> None:
    with resume_base(site, base) as instance, instance.open_console() as console:
        console.sendall(b"echo typed; hostname\n")
        answer = b""
        while answer.count(b"\n") < 2:
            answer += console.recv(100)
        assert answer == b"typed\nfake\n"
        wait_ready(instance, Readiness.parse("serial:^typed"), 5.0)


def test_a_client_that_says_nothing_holds_up_nobody(site: Site, base: Base) -> None:
    with resume_base(site, base, [PublishedPort(80)]) as instance:
        endpoint = instance.endpoints[0]
        with socket.create_connection((endpoint.host, endpoint.host_port), 5.0) as silent:
            assert get(instance, "/healthz") == b"ok\n"
            silent.sendall(b"GET /healthz HTTP/1.1\r\n")
            assert get(instance, "/healthz") == b"ok\n"
            silent.sendall(b"\r\n")
            assert silent.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_machine_starts_in_a_moment(site: Site, base: Base) -> None:
    """Ten in a row: what writes tests on this driver counts on it."""
    began = time.monotonic()
    for _ in range(10):
        with resume_base(site, base) as instance:
            assert instance.agent
            assert instance.agent.ping(5.0)
    assert time.monotonic() - began < 10.0


def test_a_machine_that_is_too_small(site: Site, tmp_path: Path) -> None:
    instance = boot(site, tmp_path / "disk", 128 << 10)
    try:
        assert instance.wait(10.0)
        with pytest.raises(FailedError, match=r"gone|smaller"):
            instance.pause()
        with pytest.raises(FailedError, match="smaller than 64 pages"):
            instance.cpu_seconds()
    finally:
        instance.stop()


def test_a_real_machine_is_refused(site: Site) -> None:
    machine = site.hypervisor.machine(memory_bytes=MEBIBYTE, disk_bytes=MEBIBYTE)
    site.hypervisor.check(machine)
    assert (site.hypervisor.name, site.hypervisor.accelerator()) == ("fake", Accelerator.TCG)
    with pytest.raises(MismatchError, match=r"machine_type: pc-q35-7\.2, not fake-1"):
        site.hypervisor.check(replace(machine, machine_type="pc-q35-7.2"))
    assert isinstance(site.hypervisor, FakeHypervisor)
    assert site.hypervisor.instances() == site.hypervisor.reap() == []


def test_the_driver_is_a_setting(tmp_path: Path) -> None:
    folders = {"cache_dir": str(tmp_path / "cache"), "state_dir": str(tmp_path / "state")}
    file = tmp_path / "cloudlet.conf"
    file.write_text("[DEFAULT]\n")
    assert Site.open(load(str(file), **folders)).hypervisor.name == "qemu"
    file.write_text("[DEFAULT]\nhypervisor = fake\n")
    assert Site.open(load(str(file), **folders)).hypervisor.name == "fake"
    file.write_text("[DEFAULT]\nhypervisor = there-is-none\n")
    with pytest.raises(NotFoundError, match="no hypervisor driver 'there-is-none'"):
        Site.open(load(str(file), **folders))


def test_another_packages_driver(tmp_path: Path) -> None:
    """A package on the path with an entry point, as an installed one has it."""
    (tmp_path / "others.py").write_text(
        "class Driver:\n    name = 'theirs'\n    def __init__(self, settings):\n"
        "        self.settings = settings\n"
        "    def reap(self):\n        return []\n"
    )
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cloudlet.hypervisors]\ntheirs = others:Driver\n")
    script = (
        "from pathlib import Path\nfrom cloudlet.control.site import Site\n"
        "from cloudlet.settings import Settings\n"
        "settings = Settings(Path('c'), Path('s'), Path('k'), hypervisor='theirs')\n"
        "driver = Site.open(settings).hypervisor\nprint(driver.name, driver.settings is settings)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.stdout == "theirs True\n", result.stderr
