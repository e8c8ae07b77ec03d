"""No room, wherever it ends: exit code 6, one line, and nothing that takes up the little room there is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Hello
from tests.cli.moments import import_arguments
from tests.cli.test_corruption import refused
from tests.cli.traces import running, traces
from tests.conftest import CommandLine, Finished
from tests.images.build import build

pytestmark = pytest.mark.qemu


def no_room(done: Finished, place: Path) -> None:
    line = refused(done, 6)
    assert "room" in line or "no space left" in line.lower(), line
    left = [path for path in place.rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []


@pytest.mark.parametrize("small_place", ["8k", "16k", "32k", "64k"], indirect=True)
def test_run(small_place: Path, hello: Hello, cloudlet: CommandLine) -> None:
    no_room(cloudlet("--state-dir", small_place, "run", hello.path), small_place)


@pytest.mark.parametrize("small_place", ["64m"], indirect=True)
def test_run_with_enough_room(small_place: Path, hello: Hello, cloudlet: CommandLine) -> None:
    with running(cloudlet.with_state(small_place), hello.path):
        assert any(small_place.rglob("disk.qcow2"))


@pytest.mark.parametrize("small_place", ["16k", "256k", "2m"], indirect=True)
def test_overlay_create_in_the_state_folder(
    small_place: Path, hello: Hello, cloudlet: CommandLine, tmp_path: Path
) -> None:
    done = cloudlet(
        "-q", "--state-dir", small_place, "overlay", "create", hello.base_id,
        "--recipe", hello.recipe, "-o", tmp_path / "x.overlay",
    )  # fmt: skip
    no_room(done, small_place)
    assert not (tmp_path / "x.overlay").exists()


@pytest.mark.parametrize("small_place", ["64k", "120k"], indirect=True)
def test_overlay_create_where_it_is_written(small_place: Path, hello: Hello, cloudlet: CommandLine) -> None:
    output = small_place / "x.overlay"
    done = cloudlet("-q", "overlay", "create", hello.base_id, "--recipe", hello.recipe, "-o", output)
    assert str(output) in done.err
    no_room(done, small_place)
    signed = cloudlet("-q", "overlay", "sign", hello.path, "-o", output)
    assert signed.status == (6 if os.statvfs(small_place).f_blocks < 20 else 0)


@pytest.mark.parametrize("small_place", ["4m"], indirect=True)
def test_base_export(small_place: Path, hello: Hello, cloudlet: CommandLine) -> None:
    no_room(cloudlet("base", "export", hello.base_id, "-o", small_place / "x.base"), small_place)


@pytest.mark.parametrize("small_place", ["4k", "4m", "80m"], indirect=True)
def test_base_import_of_an_export(
    small_place: Path, hello: Hello, cloudlet: CommandLine, tmp_path: Path
) -> None:
    exported = tmp_path / "x.base"
    assert cloudlet("base", "export", hello.base_id, "-o", exported).status == 0
    no_room(cloudlet("--cache-dir", small_place, "base", "import", exported), small_place)
    assert cloudlet("--cache-dir", small_place, "base", "list").out.strip() == ""


@pytest.mark.parametrize("small_place", ["4m", "110m"], indirect=True)
def test_base_import_of_an_image(small_place: Path, images: Path, cloudlet: CommandLine) -> None:
    arguments = import_arguments(build("quick", images))
    no_room(cloudlet("-q", "--cache-dir", small_place, *arguments), small_place)


@pytest.mark.parametrize("small_place", ["4k"], indirect=True)
def test_key_create(small_place: Path, cloudlet: CommandLine) -> None:
    """A key of which there is only a half would be in the way of the whole one."""
    done = cloudlet("key", "create", OS_DEFAULT__KEYS_DIR=str(small_place))
    no_room(done, small_place)


def test_standard_output(own_base: Path, cloudlet: CommandLine) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            cloudlet.argv("base", "list"), stdout=full, stderr=subprocess.PIPE, text=True,
            env=cloudlet.environment, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 6
    assert len(done.stderr.splitlines()) == 1
    assert traces(cloudlet.settings) == []
