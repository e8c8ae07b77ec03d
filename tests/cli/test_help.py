"""The help, which a newcomer reads first: every command says what it does, and every option."""

from __future__ import annotations

import argparse
from importlib.metadata import EntryPoint, entry_points

import pytest

import cloudlet as package
from cloudlet.cli.command import CloudletApp
from tests.conftest import CommandLine

COMMANDS = sorted(entry_points(group="cloudlet.commands"), key=lambda entry: entry.name)
NEED_AN_EXAMPLE = {
    "base build",
    "base import",
    "base export",
    "key trust",
    "overlay create",
    "overlay sign",
    "run",
}
"""Commands with more than one thing to say."""


def name_of(entry: EntryPoint) -> str:
    return entry.name.replace("_", " ")


@pytest.mark.parametrize("entry", COMMANDS, ids=name_of)
def test_every_command_explains_itself(entry: EntryPoint) -> None:
    app = CloudletApp()
    command = entry.load()(app, argparse.Namespace(), cmd_name=name_of(entry))
    parser = command.get_parser(f"cloudlet {name_of(entry)}")
    description = command.get_description()
    assert description.split("\n")[0].endswith((".", ";", ":"))
    assert len(description) > 15
    for action in parser._actions:
        assert action.help, f"{action.dest} of {name_of(entry)} is not explained"
    if name_of(entry) in NEED_AN_EXAMPLE:
        assert f"Example: cloudlet {name_of(entry)} " in description


def test_without_arguments_all_commands_are_listed(cloudlet: CommandLine) -> None:
    done = cloudlet()
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("usage: cloudlet ")
    for entry in COMMANDS:
        assert f"\n  {name_of(entry)}  " in done.out


def test_the_help_of_one_command(cloudlet: CommandLine) -> None:
    done = cloudlet("run", "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("usage: cloudlet run ")
    assert "--allow-unsigned" in done.out


def test_a_command_that_is_not_there(cloudlet: CommandLine) -> None:
    done = cloudlet("base", "destroy")
    assert done.status == 2
    assert "base delete" in done.out + done.err


def test_the_version(cloudlet: CommandLine) -> None:
    assert cloudlet("--version").out == f"cloudlet {package.__version__}\n"
