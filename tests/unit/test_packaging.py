"""The units of systemd: systemd understands them, and machines outlive the server that started them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from cloudlet.cli.command import CloudletApp
from cloudlet.cli.manage.command import ManageApp

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
NAMES = ("cloudlet.service", "cloudlet-conductor.service")
GUESTS = "cloudlet-guests.service"
INSTALLED = "/opt/cloudlet/bin/"
FORBIDDEN = {
    # With the server's end they would go from under machines that go on.
    "PrivateTmp", "RuntimeDirectory", "DynamicUser", "PrivateNetwork", "PrivateIPC",
    # QEMU, FUSE and networks of guests need these.
    "MemoryDenyWriteExecute", "PrivateDevices", "PrivateUsers", "RestrictNamespaces", "SystemCallFilter",
    "ProtectProc", "ProcSubset",
}  # fmt: skip


def settings(name: str) -> dict[str, list[str]]:
    """What a unit says, section by section alike."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        key, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found[key].append(value)
    return found


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "systemd is missing: tools/setup test"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The units, with the programs of this environment."""
    for name in (*NAMES, GUESTS):
        text = (UNITS / name).read_text(encoding="utf-8")
        programs = f"{Path(sys.executable).parent}/"
        (tmp_path / name).write_text(text.replace(INSTALLED, programs), encoding="utf-8")
    return tmp_path


def test_systemd_understands_them(here: Path) -> None:
    done = analyze("verify", "--man=no", *(here / name for name in (*NAMES, GUESTS)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_systemd_does_not_understand_would_be_noticed(here: Path) -> None:
    unit = here / NAMES[0]
    unit.write_text(unit.read_text().replace("KillMode=process", "KillMode=one"))
    assert "kill mode" in analyze("verify", "--man=no", unit).stderr


@pytest.mark.parametrize("name", NAMES)
def test_machines_outlive_what_started_them(name: str) -> None:
    unit = settings(name)
    assert unit["KillMode"] == ["process"]
    assert unit["OOMPolicy"] == ["continue"]
    assert unit["TasksMax"] == ["infinity"]
    assert FORBIDDEN.isdisjoint(unit)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_needed_is_taken_away(name: str, here: Path) -> None:
    assert settings(name)["NoNewPrivileges"] == ["yes"]
    done = analyze("security", "--offline=true", "--no-pager", "--threshold=65", here / name)
    assert done.returncode == 0, done.stdout


def test_both_have_the_same_rights() -> None:
    server, conductor = (settings(name) for name in NAMES)
    own = {"Description", "After", "ExecStart"}
    assert {key for key in server.keys() | conductor.keys() if server[key] != conductor[key]} <= own


def test_guests_are_suspended_before_who_does_it_is_stopped() -> None:
    unit = settings(GUESTS)
    assert set(NAMES) <= set(unit["After"][0].split())
    assert (unit["Type"], unit["RemainAfterExit"]) == (["oneshot"], ["yes"])
    (command,) = unit["ExecStop"]
    assert int(command.split()[-1]) < int(unit["TimeoutStopSec"][0])


def test_their_commands_can_be_typed() -> None:
    values = [settings(NAMES[0])["ExecStart"], settings(GUESTS)["ExecStop"], settings(NAMES[1])["ExecStart"]]
    typed = [shlex.split(value.removeprefix(INSTALLED)) for (value,) in values]
    assert [command[0] for command in typed] == ["cloudlet", "cloudlet-manage", "cloudlet-conductor"]
    for kind, arguments in ((CloudletApp, typed[0][1:]), (ManageApp, typed[1][1:])):
        app = kind()
        _, rest = app.parser.parse_known_args(arguments)
        factory, found, left = app.command_manager.find_command(rest)
        factory(app, None).get_parser(found).parse_args(left)
    help_ = subprocess.run(
        [Path(sys.executable).with_name("cloudlet-conductor"), *typed[2][1:], "--help"],
        capture_output=True, check=False,
    )  # fmt: skip
    assert help_.returncode == 0
