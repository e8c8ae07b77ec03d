"""What tests share: settings in folders of their own, the quick guest as a base, the command line.

Nothing of the machine's own is used. Images and the bases made from them are kept in ``.setup/tests``
of the checkout from one run to the next (a base's name is its content); all state is temporary.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from blake3 import blake3

from cloudlet.control import bases
from cloudlet.control.site import Site
from cloudlet.errors import NotFoundError
from cloudlet.hypervisor.records import processes_of, records
from cloudlet.model import GIBIBYTE, MEBIBYTE, Readiness
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from tests.images.build import build

KEPT = Path(__file__).parents[1] / ".setup" / "tests"


@pytest.fixture(scope="session")
def images() -> Path:
    """Where test images are kept."""
    folder = KEPT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with state and keys of this test, and the bases of all tests."""
    return Settings(
        cache_dir=KEPT / "cache", state_dir=tmp_path / "state", keys_dir=tmp_path / "keys", accelerator="tcg"
    )


@pytest.fixture
def site(settings: Settings) -> Iterator[Site]:
    """A site with a signing key; at its end nothing may be left running."""
    opened = Site.open(settings)
    opened.keys.generate()
    yield opened
    assert records(settings.instances_dir) == []
    left = [path for path in settings.instances_dir.glob("*") if processes_of(path)]
    assert left == []


@contextmanager
def nobody_else_builds() -> Iterator[None]:
    """Be the only one, of the processes that share the tests, who adds to the bases of all."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "building.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def quick_base_id(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The identity of a base made from the quick guest, which has an agent and boots in seconds."""
    state = tmp_path_factory.mktemp("base-state")
    settings = Settings(cache_dir=KEPT / "cache", state_dir=state, keys_dir=state / "keys", accelerator="tcg")
    opened = Site.open(settings)
    with nobody_else_builds():
        return _quick_base_of(opened, images)


def _quick_base_of(opened: Site, images: Path) -> str:
    image = build("quick", images)
    # The name tells from which image: a rebuilt image makes another base.
    name = f"quick-{image.disk.stat().st_mtime_ns}"
    try:
        return opened.bases.find(name).id
    except NotFoundError:
        request = bases.BaseRequest(
            name=name, memory_bytes=image.memory_mib * MEBIBYTE, ready=Readiness.parse(image.ready)
        )
        return bases.import_image(
            opened,
            request,
            image.disk,
            say=lambda text: None,
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=image.cmdline,
        ).id


@pytest.fixture
def quick_base(site: Site, quick_base_id: str) -> Base:
    """The quick guest as a base of this site."""
    return site.bases.find(quick_base_id)


@pytest.fixture(scope="session")
def debian_base_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The identity of a base built from the Debian recipe as it is now; the building takes two minutes."""
    state = tmp_path_factory.mktemp("debian-state")
    settings = Settings(cache_dir=KEPT / "cache", state_dir=state, keys_dir=state / "keys", accelerator="tcg")
    opened = Site.open(settings)
    recipe = Path(bases.__file__).parents[1] / "guests" / "debian"
    with nobody_else_builds():
        return _debian_base_of(opened, recipe)


def _debian_base_of(opened: Site, recipe: Path) -> str:
    digest = blake3()
    for path in sorted(path for path in recipe.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    name = f"debian-{digest.hexdigest()[:16]}"
    try:
        return opened.bases.find(name).id
    except NotFoundError:
        request = bases.BaseRequest(name=name, memory_bytes=512 * MEBIBYTE, disk_bytes=4 * GIBIBYTE)
        return bases.build(opened, request, "debian", say=lambda text: None).id


@pytest.fixture
def debian_base(site: Site, debian_base_id: str) -> Base:
    """Our Debian guest as a base of this site."""
    return site.bases.find(debian_base_id)


@pytest.fixture(scope="session", autouse=True)
def _terminated_is_interrupted() -> Iterator[None]:
    """Being told to end runs the fixtures' ends, so that no guest is left."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)


@dataclass(frozen=True)
class CommandLine:
    """The program ``cloudlet``, run as its users run it, in the folders of a test."""

    settings: Settings
    environment: dict[str, str]

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "cloudlet.cli.app", *map(str, arguments)]

    def __call__(
        self, *arguments: str | Path, stdin: bytes | None = None, timeout: float = 120.0, **environment: str
    ) -> Finished:
        result = subprocess.run(
            self.argv(*arguments),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env={**self.environment, **environment},
            timeout=timeout,
            check=False,
        )
        return Finished(result.returncode, result.stdout.decode(), result.stderr.decode())

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command that goes on; end it with :meth:`end`."""
        return subprocess.Popen(
            self.argv(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )

    def end(self, process: subprocess.Popen[str], number: int = signal.SIGINT) -> Finished:
        """Send a signal and wait for the end."""
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        return Finished(process.returncode, out, err)

    def with_state(self, folder: Path) -> CommandLine:
        """The same with another state folder."""
        changed = replace(self.settings, state_dir=folder)
        return CommandLine(changed, {**self.environment, "OS_DEFAULT__STATE_DIR": str(folder)})


@pytest.fixture
def cloudlet(settings: Settings) -> CommandLine:
    """The command line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
    environment |= {
        "OS_DEFAULT__CACHE_DIR": str(settings.cache_dir),
        "OS_DEFAULT__STATE_DIR": str(settings.state_dir),
        "OS_DEFAULT__KEYS_DIR": str(settings.keys_dir),
        "OS_DEFAULT__ACCELERATOR": settings.accelerator,
    }
    return CommandLine(settings, environment)
