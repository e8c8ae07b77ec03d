from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloudlet.cli.app import main
from cloudlet.cli.overlay import build_folder
from cloudlet.errors import ExitCode


def test_each_recipe_has_a_build_folder_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "planner", tmp_path / "b" / "planner"
    one.mkdir(parents=True)
    other.mkdir(parents=True)
    folder = build_folder(tmp_path, one)
    assert folder.parent == tmp_path / "recipes"
    assert re.fullmatch(r"planner-[0-9a-f]{12}", folder.name)
    assert build_folder(tmp_path, other) != folder
    (tmp_path / "link").symlink_to(one)
    assert (
        build_folder(tmp_path, tmp_path / "link") == build_folder(tmp_path, one / ".." / "planner") == folder
    )


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_is_none_is_said_at_once(port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = ["--cache-dir", str(tmp_path), "--state-dir", str(tmp_path)]
    command = ["overlay", "create", "none", "--interactive", f"--port={port}", "-o", str(tmp_path / "x")]
    assert main([*places, *command]) == ExitCode.USAGE
    assert "a port is a number" in capsys.readouterr().err
