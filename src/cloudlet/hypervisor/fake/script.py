"""A script of the fake guest's shell, read: words and operators, and lists of commands of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""[ \t]+|\\\n|(?<![^\s;&|])\#[^\n]*
    |(?P<operator>\n|;|&&|\|\||\||2>&1|2>>|2>|>>|>|<)
    |(?P<word>(?:'[^']*'|"(?:\\.|\$\([^)]*\)|[^"\\])*"|\\.|\$\([^)]*\)|[^\s;&|<>'"\\])+)""",
    re.VERBOSE | re.DOTALL,
)
_SEPARATORS = ("\n", ";")


class ScriptError(Exception):
    """The script is not in the language."""


@dataclass(frozen=True, slots=True)
class Simple:
    words: list[str]
    redirections: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class For:
    name: str
    words: list[str]
    body: list[AndOr]


@dataclass(frozen=True, slots=True)
class AndOr:
    """Pipelines with the operator before each; a pipeline is (negated, commands)."""

    parts: list[tuple[str, bool, list[Simple | For]]]


def parse(script: str) -> list[AndOr]:
    """The commands of a script; words are left as they are written.

    :raises ScriptError: the script is not in the language (``shell.py``).
    """
    return _Parser(script).whole()


class _Parser:
    """A script as lists of commands."""

    def __init__(self, script: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(script):
            match = _TOKEN.match(script, position)
            if not match:
                raise ScriptError(f"cannot read {script[position : position + 20]!r}")
            if match.lastgroup:
                self._tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        self._at = 0

    def whole(self) -> list[AndOr]:
        commands = self._list(())
        if self._at < len(self._tokens):
            raise ScriptError(f"unexpected {self._text()!r}")
        return commands

    def _list(self, ends: tuple[str, ...]) -> list[AndOr]:
        commands: list[AndOr] = []
        while True:
            while self._operator(*_SEPARATORS):
                pass
            if self._at >= len(self._tokens) or self._text() in ends:
                return commands
            commands.append(self._and_or())
            if self._at < len(self._tokens) and self._text() not in _SEPARATORS:
                raise ScriptError(f"unexpected {self._text()!r}")

    def _and_or(self) -> AndOr:
        parts = [("", *self._pipeline())]
        while operator := self._operator("&&", "||"):
            while self._operator("\n"):
                pass
            parts.append((operator, *self._pipeline()))
        return AndOr(parts)

    def _pipeline(self) -> tuple[bool, list[Simple | For]]:
        negated = self._text() == "!"
        self._at += negated
        commands = [self._command()]
        while self._operator("|"):
            commands.append(self._command())
        return negated, commands

    def _command(self) -> Simple | For:
        return self._for() if self._text() == "for" else self._simple()

    def _for(self) -> For:
        self._at += 1
        name = self._word()
        self._expect("in")
        words = []
        while not self._operator(*_SEPARATORS):
            words.append(self._word())
        self._expect("do")
        body = self._list(("done",))
        self._expect("done")
        return For(name, words, body)

    def _simple(self) -> Simple:
        words, redirections = [], []
        while True:
            if operator := self._operator(">", ">>", "<", "2>", "2>>"):
                redirections.append((operator, self._word()))
            elif self._operator("2>&1"):
                redirections.append(("2>&1", ""))
            elif self._at < len(self._tokens) and self._tokens[self._at][0] == "word":
                words.append(self._word())
            elif words or redirections:
                return Simple(words, redirections)
            else:
                raise ScriptError(f"a command is missing before {self._text()!r}")

    def _text(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _operator(self, *wanted: str) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at] in [("operator", w) for w in wanted]:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return ""

    def _word(self) -> str:
        if self._at >= len(self._tokens) or self._tokens[self._at][0] != "word":
            raise ScriptError(f"a word is missing before {self._text()!r}")
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _expect(self, word: str) -> None:
        if self._text() != word:
            raise ScriptError(f"{word!r} is missing before {self._text()!r}")
        self._at += 1
