r"""The language of the fake guest's shell: the part of POSIX's that recipes need.

Lists (newline, ``;``), ``&&``, ``||``, ``!``, pipes, ``for NAME in ...; do ...; done``, quotes, ``$NAME``,
``$1``, ``$?``, ``$(...)``, assignments, redirections to and from files, ``2>&1``, comments, ``-e``. No
word splitting, patterns, functions or background jobs. Nothing is executed on the host: commands are
functions that the guest gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cloudlet.hypervisor.fake.script import AndOr, For, ScriptError, Simple, parse

_PART = re.compile(
    r"""'(?P<single>[^']*)'|"(?P<double>(?:\\.|\$\([^)]*\)|[^"\\])*)"|\\(?P<escaped>.)
    |\$\((?P<command>[^)]*)\)|\$(?P<name>\w+|[?#])|(?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
_QUOTED_PART = re.compile(
    r"""\\(?P<escaped>[$`"\\\n])|\$\((?P<command>[^)]*)\)|\$(?P<name>\w+|[?#])|(?P<plain>.)""", re.DOTALL
)
_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


class Disk(Protocol):
    """What redirections need of the guest's files."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, content: bytes) -> None: ...


@dataclass(slots=True)
class Streams:
    """What a program reads and writes."""

    stdin: bytes = b""
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)


Execute = Callable[[list[str], Streams], int]
"""Runs a program by its name and arguments; its exit status."""


class _Break(Exception):  # noqa: N818 (control flow, no error)
    pass


class _Exit(Exception):  # noqa: N818 (control flow, no error)
    def __init__(self, status: int) -> None:
        self.status = status


class Shell:
    """One run of a script."""

    def __init__(self, execute: Execute, disk: Disk, arguments: Sequence[str] = ("sh",)) -> None:
        self._execute = execute
        self._disk = disk
        self._variables = {str(number): text for number, text in enumerate(arguments)}
        self._variables["#"] = str(max(0, len(arguments) - 1))
        self._status = 0
        self._strict = False

    def run(self, script: str, streams: Streams, *, strict: bool = False) -> int:
        """Run a script to its end; its exit status.

        :param strict: ``-e``: the first command that fails ends it.
        """
        self._strict = strict
        try:
            self._list(parse(script), streams)
        except _Exit as end:
            return end.status
        except ScriptError as problem:
            streams.err += f"sh: {problem}\n".encode()
            return 2
        return self._status

    def _list(self, commands: list[AndOr], streams: Streams) -> None:
        for command in commands:
            for number, (operator, negated, pipeline) in enumerate(command.parts):
                if (operator == "&&" and self._status) or (operator == "||" and not self._status):
                    continue
                self._pipe(pipeline, streams)
                if negated:
                    self._status = int(not self._status)
                last = number == len(command.parts) - 1
                if self._status and self._strict and last and not negated:
                    raise _Exit(self._status)

    def _pipe(self, pipeline: list[Simple | For], streams: Streams) -> None:
        stdin = streams.stdin
        for number, command in enumerate(pipeline):
            last = number == len(pipeline) - 1
            mine = Streams(stdin, streams.out if last else bytearray(), streams.err)
            if isinstance(command, For):
                self._for(command, mine)
            else:
                self._status = self._simple(command, mine)
            stdin = bytes(mine.out)

    def _for(self, command: For, streams: Streams) -> None:
        self._status = 0
        for word in command.words:
            self._variables[command.name] = self._expand(word)
            try:
                self._list(command.body, streams)
            except _Break:
                break

    def _simple(self, command: Simple, outer: Streams) -> int:
        words = list(command.words)
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            self._variables[match["name"]] = self._expand(match["value"])
            words.pop(0)
        argv = [self._expand(word) for word in words]
        mine = Streams(outer.stdin)
        # Where each stream ends up: one of the outer buffers, or a file.
        targets: dict[str, bytearray | tuple[str, bool]] = {"out": outer.out, "err": outer.err}
        try:
            for operator, word in command.redirections:
                if operator == "<":
                    mine.stdin = self._disk.read(self._expand(word))
                elif operator == "2>&1":
                    targets["err"] = targets["out"]
                else:
                    stream = "err" if operator.startswith("2") else "out"
                    targets[stream] = (self._expand(word), operator.endswith(">>"))
            status = self._builtin(argv, mine) if argv else 0
            self._deliver(mine, targets)
        except OSError as error:
            outer.err += f"sh: {error.filename}: {error.strerror}\n".encode()
            return 1
        return status

    def _deliver(self, mine: Streams, targets: dict[str, bytearray | tuple[str, bool]]) -> None:
        written: set[str] = set()
        for stream, content in (("out", mine.out), ("err", mine.err)):
            target = targets[stream]
            if isinstance(target, bytearray):
                target += content
            elif target[0] != "/dev/null":
                path, append = target
                before = self._disk.read(path) if path in written else _content(self._disk, path, append)
                self._disk.write(path, before + content)
                written.add(path)

    def _builtin(self, argv: list[str], streams: Streams) -> int:
        match argv:
            case ["exit", *status]:
                raise _Exit(int(status[0]) if status else self._status)
            case ["break"]:
                raise _Break
            case [":", *_]:
                return 0
            case ["set", *options]:
                self._strict = self._strict or any("e" in option for option in options)
                return 0
        return self._execute(argv, streams)

    def _expand(self, raw: str, parts: re.Pattern[str] = _PART) -> str:
        text = []
        for part in parts.finditer(raw):
            match part.lastgroup:
                case "double":
                    text.append(self._expand(part["double"], _QUOTED_PART))
                case "command":
                    streams = Streams()
                    self._list(parse(part["command"]), streams)
                    text.append(streams.out.decode(errors="replace").rstrip("\n"))
                case "name":
                    text.append(str(self._status) if part["name"] == "?" else self._variable(part["name"]))
                case "escaped":
                    text.append("" if part["escaped"] == "\n" else part["escaped"])
                case _:
                    text.append(part[part.lastgroup or 0])
        return "".join(text)

    def _variable(self, name: str) -> str:
        return self._variables.get(name, "")


def _content(disk: Disk, path: str, wanted: bool) -> bytes:
    try:
        return disk.read(path) if wanted else b""
    except FileNotFoundError:
        return b""
