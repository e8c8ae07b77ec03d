"""``cloudlet-manage user ...``: who may use a site whose ``auth_strategy`` is http_basic."""

from __future__ import annotations

import argparse
import getpass
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cliff.lister import Lister

from cloudlet.api.identity import User, hash_of, read_users, write_users
from cloudlet.cli.manage.command import ManageCommand
from cloudlet.errors import NotFoundError, UsageError
from cloudlet.hypervisor.records import folder_lock

_MOST_BYTES = 4096
_WORD = re.compile(r"[^\s:,#][^\s:,]*")
"""What stands between the colons of the file."""


class _Users(ManageCommand):
    @property
    def file(self) -> Path:
        return self.site_options.users_file

    def change(self, how: Callable[[dict[str, User]], None]) -> None:
        """Change the file; two who do it at once do not undo each other's change."""
        file = self.file
        with folder_lock(file.parent):
            users = {user.name: user for user in read_users(file)}
            how(users)
            write_users(file, list(users.values()))


class List(_Users, Lister):
    """List the users, with their projects and roles."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        rows = [(user.name, user.project, ", ".join(sorted(user.roles))) for user in read_users(self.file)]
        return ("name", "project", "roles"), rows


class Set(_Users):
    """Make a user, or change one; a server that runs hears of it with the next request.

    The password is asked for on a terminal, and else read from standard input. What is not given stays as it
    was; a new user is in the project 'default' and has the role 'member'.

    Example: cloudlet-manage user set mia --project shop --role member --role publisher
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", metavar="NAME", type=_word, help="the user")
        parser.add_argument("--project", type=_word, help="who is in it sees what its readers may see")
        parser.add_argument(
            "--role", action="append", type=_word, metavar="ROLE",
            help="admin, publisher, member or reader; again for several",
        )  # fmt: skip
        password = parser.add_mutually_exclusive_group()
        password.add_argument(
            "--password-file", type=Path, metavar="FILE", help="read the password from this file"
        )
        password.add_argument("--keep-password", action="store_true", help="leave the password as it is")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        name = parsed_args.name
        hashed = None if parsed_args.keep_password else hash_of(_password(parsed_args.password_file))

        def how(users: dict[str, User]) -> None:
            if hashed is None and name not in users:
                raise _nobody(name)
            user = users.get(name, User(name, ""))
            users[name] = replace(
                user,
                hash=hashed or user.hash,
                project=parsed_args.project or user.project,
                roles=frozenset(parsed_args.role or user.roles),
            )

        self.change(how)
        self.app.say(f"user {name} is in {self.file}")


class Delete(_Users):
    """Remove a user; what they have on the site stays."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", metavar="NAME", help="the user")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        def how(users: dict[str, User]) -> None:
            if users.pop(parsed_args.name, None) is None:
                raise _nobody(parsed_args.name)

        self.change(how)
        self.app.say(f"user {parsed_args.name} is removed")


def _word(text: str) -> str:
    if not _WORD.fullmatch(text) or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: no spaces, colons or commas, and no # at its beginning")
    return text


def _nobody(name: str) -> NotFoundError:
    return NotFoundError(f"there is no user {name}", hint="list them: cloudlet-manage user list")


def _password(file: Path | None) -> str:
    if file is None and sys.stdin.isatty():
        return _asked()
    with file.open("rb") if file else sys.stdin.buffer as source:
        data = source.read(_MOST_BYTES)
    try:
        password = data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError("the password is not UTF-8") from error
    if "\n" in password:
        raise UsageError("a password is one line")
    return password


def _asked() -> str:
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise UsageError("the two passwords are not the same")
    return password
