"""The Debian guest's recipe as far as it can be judged without packages and without QEMU."""

import os
import subprocess
from pathlib import Path

import pytest

import cloudlet.guests

RECIPE = Path(cloudlet.guests.__file__).parent / "debian"
IN_GUEST = RECIPE / "files/usr/lib/cloudlet"
SCRIPTS = {
    RECIPE / "build": "bash",
    RECIPE / "settle": "sh",
    IN_GUEST / "clone-agent": "sh",
    IN_GUEST / "quiet": "sh",
}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("script", "shell"), SCRIPTS.items(), ids=lambda value: Path(value).name)
def test_scripts_parse_in_the_shell_that_they_name(script: Path, shell: str) -> None:
    assert script.read_text().splitlines()[0] == f"#!/bin/{shell}"
    parsed = run(shell, "-n", script)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_tree_holds_plain_files_only_because_wheels_carry_nothing_else() -> None:
    odd = [path for path in RECIPE.rglob("*") if path.is_symlink()]
    assert odd == []


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "CLOUDLET_OUT is not set"),
        ({"CLOUDLET_DISK_BYTES": "4G"}, "not a number of bytes"),
        ({"CLOUDLET_DISK_BYTES": "4294967297"}, "not a multiple of 4096"),
        ({"CLOUDLET_DISK_BYTES": "1048576"}, "less than 1 GiB"),
        ({"CLOUDLET_DISK_BYTES": "4294967296", "CLOUDLET_ACCELERATOR": "x"}, "neither tcg nor kvm"),
    ],
)
def test_build_refuses_a_wrong_environment_before_any_work(
    environment: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    if environment:
        environment = {"CLOUDLET_OUT": str(tmp_path / "out"), **environment}
    refused = run("bash", RECIPE / "build", **environment)
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert not (tmp_path / "out").exists()


# Only arguments that are refused: a valid call would rename the machine that runs the tests.
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--epoch is not"),
        (["--epoch", "12a", "--hostname", "x"], "--epoch is not"),
        (["--epoch", "1.2.3", "--hostname", "x"], "--epoch is not"),
        (["--epoch", "1"], "--hostname is not"),
        (["--epoch", "1", "--hostname", "a b"], "--hostname is not"),
        (["--epoch", "1", "--hostname", '"; reboot'], "--hostname is not"),
        (["--epoch", "1", "--hostname", "a" * 64], "longer than 63"),
        (["--epoch", "1", "--hostname"], "needs a value"),
        (["--verbose", "1"], "unknown argument"),
    ],
)
def test_clone_agent_refuses_wrong_arguments(arguments: list[str], complaint: str) -> None:
    refused = run("sh", IN_GUEST / "clone-agent", *arguments)
    assert refused.returncode == 2
    assert complaint in refused.stderr
