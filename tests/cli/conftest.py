"""Sites of a test's own for the command line: a base in a cache that may be broken, a signed overlay."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cloudlet.settings import Settings
from tests.cli.traces import traces
from tests.conftest import KEPT, CommandLine

RECIPE = """\
name: hello
version: "1.2"
files: [{from: files/, to: /www/hello/}]
run: ["test -s /www/hello/word"]
ports: [{port: 8080, name: web}]
ready: http:8080/
"""

EARLY_RECIPE = """\
name: early
files: [{from: files/, to: /www/hello/}]
run:
  - dd if=/dev/urandom of=/root/cold bs=64k count=32 2>/dev/null
  - dd if=/dev/urandom of=/run/cold bs=64k count=64 2>/dev/null
  - ln -s /run/cold /www/cold
ports: [{port: 8080}]
ready: http:8080/
"""
"""An app with 2 MiB on its disk and 4 MiB in memory that are not needed first; it serves the latter."""


@dataclass(frozen=True)
class Hello:
    """An overlay that was made and signed once for all tests, and the keys of who made it."""

    path: Path
    keys: Path
    recipe: Path
    base_id: str


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe that puts a file into the quick guest's web server."""
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "word").write_text("from the recipe")
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A site of the test's own, whose cache has the quick guest's base if ``own_base`` is asked for."""
    return Settings(
        cache_dir=tmp_path / "cache",
        state_dir=tmp_path / "state",
        keys_dir=tmp_path / "keys",
        accelerator="tcg",
    )


@pytest.fixture(scope="session")
def made(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Hello:
    """The overlay, made by the commands that a publisher types."""
    return publish(quick_base_id, tmp_path_factory.mktemp("hello"), RECIPE)


@pytest.fixture(scope="session")
def made_early(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Hello:
    """An overlay of which little is needed first."""
    return publish(quick_base_id, tmp_path_factory.mktemp("early"), EARLY_RECIPE)


def publish(base_id: str, folder: Path, recipe_text: str, *options: str) -> Hello:
    """Make and sign an overlay as a publisher does."""
    settings = Settings(
        cache_dir=KEPT / "cache", state_dir=folder / "state", keys_dir=folder / "keys", accelerator="tcg"
    )
    cloudlet = command_line(settings)
    recipe, output = write_recipe(folder / "recipe", recipe_text), folder / "made.overlay"
    assert cloudlet("key", "create").status == 0
    done = cloudlet("overlay", "create", base_id, "--recipe", recipe, "-o", output, *options)
    assert done.status == 0, done.err
    return Hello(output, folder / "keys", recipe, base_id)


@pytest.fixture
def own_base(settings: Settings, quick_base_id: str) -> Path:
    """The folder of the quick guest's base in the test's own cache; its files are links."""
    target = settings.bases_dir / quick_base_id
    target.mkdir(parents=True)
    for file in (KEPT / "cache" / "bases" / quick_base_id).iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # the test's folder is on another file system
            copy(file, target / file.name)
    return target


@pytest.fixture
def hello(made: Hello, own_base: Path, settings: Settings) -> Hello:
    """The overlay, where its base is here and its key trusted."""
    shutil.copytree(made.keys, settings.keys_dir)
    return replace(made, keys=settings.keys_dir)


@pytest.fixture
def early(made_early: Hello, own_base: Path, settings: Settings) -> Hello:
    """The overlay that starts early, where its base is here and its key trusted."""
    shutil.copytree(made_early.keys, settings.keys_dir)
    return replace(made_early, keys=settings.keys_dir)


@pytest.fixture(autouse=True)
def nothing_is_left(settings: Settings, tmp_path: Path) -> Iterator[None]:
    """After each test there is no instance, no process and no temporary file."""
    yield
    assert traces(settings, tmp_path) == []


def command_line(settings: Settings) -> CommandLine:
    """The command line of a site."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OS_") and not name.lower().endswith("_proxy")
    }
    environment |= {
        "OS_DEFAULT__CACHE_DIR": str(settings.cache_dir),
        "OS_DEFAULT__STATE_DIR": str(settings.state_dir),
        "OS_DEFAULT__KEYS_DIR": str(settings.keys_dir),
        "OS_DEFAULT__ACCELERATOR": settings.accelerator,
    }
    return CommandLine(settings, environment)


@pytest.fixture
def cloudlet(settings: Settings) -> CommandLine:
    """The command line of the test's own site."""
    return command_line(settings)


def copy(source: Path, target: Path) -> None:
    """Copy a file of a base, holes as holes."""
    target.unlink(missing_ok=True)
    subprocess.run(["cp", "--sparse=always", "--no-preserve=mode", source, target], check=True)


@pytest.fixture
def small_place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with little room, a file system of its own, of the size that an indirect parameter gives."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a small file system")
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={request.param},mode=700", "cloudlet-test", place]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
