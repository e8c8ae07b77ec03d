"""The programs of the fake guest: what recipes and the stories of ``cloudlet.control`` call.

Each is a function of the guest, its arguments and its streams, and gives an exit status. They know the
options that are written here and refuse others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Protocol

from cloudlet.hypervisor.fake.shell import Streams


class Tree(Protocol):
    """All files of the guest: those on its disk, in its RAM and on the medium in its drive."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, content: bytes) -> None: ...
    def make_folder(self, path: str) -> None: ...
    def make_executable(self, path: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def is_file(self, path: str) -> bool: ...
    def is_folder(self, path: str) -> bool: ...
    def is_executable(self, path: str) -> bool: ...
    def below(self, folder: str) -> list[str]: ...


class System(Protocol):
    """What programs need of the guest."""

    @property
    def tree(self) -> Tree: ...
    def host_name(self) -> str: ...
    def set_host_name(self, name: str) -> None: ...
    def mount(self, device: str, folder: str) -> None: ...
    def unmount(self, folder: str) -> None: ...
    def write_page(self, space: str, page: int, seed: int) -> None: ...


Program = Callable[[System, list[str], Streams], int]


def echo(_system: System, arguments: list[str], streams: Streams) -> int:
    newline = arguments[:1] != ["-n"]
    streams.out += " ".join(arguments if newline else arguments[1:]).encode() + b"\n" * newline
    return 0


def cat(system: System, arguments: list[str], streams: Streams) -> int:
    for path in arguments or ["-"]:
        streams.out += streams.stdin if path == "-" else system.tree.read(_absolute(path))
    return 0


def tee(system: System, arguments: list[str], streams: Streams) -> int:
    for path in arguments:
        system.tree.write(_absolute(path), streams.stdin)
    streams.out += streams.stdin
    return 0


def grep(system: System, arguments: list[str], streams: Streams) -> int:
    """Lines with a fixed text, of files or of standard input."""
    options, (text, *paths) = _options(arguments, "qF")
    content = b"".join(system.tree.read(_absolute(path)) for path in paths) if paths else streams.stdin
    found = [line for line in content.splitlines(keepends=True) if text.encode() in line]
    if "q" not in options:
        streams.out += b"".join(found)
    return 0 if found else 1


def test(system: System, arguments: list[str], _streams: Streams) -> int:
    tree = system.tree
    match [argument for argument in arguments if argument != "]"]:
        case ["!", *rest]:
            return int(not test(system, rest, _streams))
        case ["-e", path]:
            holds = tree.is_file(path) or tree.is_folder(path)
        case ["-f", path]:
            holds = tree.is_file(path)
        case ["-d", path]:
            holds = tree.is_folder(path)
        case ["-x", path]:
            holds = tree.is_executable(path) or tree.is_folder(path)
        case ["-s", path]:
            holds = tree.is_file(path) and bool(tree.read(path))
        case ["-n", text] | [text]:
            holds = bool(text)
        case ["-z", text]:
            holds = not text
        case [one, "=" | "-eq", other]:
            holds = one == other
        case [one, "!=" | "-ne", other]:
            holds = one != other
        case _:
            raise ValueError("this condition is not one of the fake guest's")
    return 0 if holds else 1


def cp(system: System, arguments: list[str], _streams: Streams) -> int:
    """Copy files, or with ``-a`` or ``-r`` folders; ``FOLDER/.`` is what is in it."""
    options, (*sources, target) = _options(arguments, "arRp")
    tree = system.tree
    into = len(sources) > 1 or target.endswith("/") or tree.is_folder(target)
    for source in sources:
        name = PurePosixPath(source).name
        place = f"{target.rstrip('/')}/{name}" if into and not source.endswith("/.") else target
        folder = source.removesuffix("/.").rstrip("/")
        if tree.is_file(source):
            _copy(tree, source, place)
        elif tree.is_folder(folder) and options:
            for path in tree.below(folder):
                _copy(tree, path, f"{place.rstrip('/')}{path.removeprefix(folder)}")
        else:
            raise FileNotFoundError(2, "No such file or directory", source)
    return 0


def mkdir(system: System, arguments: list[str], _streams: Streams) -> int:
    _, paths = _options(arguments, "p")
    for path in paths:
        system.tree.make_folder(_absolute(path))
    return 0


def rm(system: System, arguments: list[str], _streams: Streams) -> int:
    options, paths = _options(arguments, "rf")
    for path in paths:
        if "f" not in options or system.tree.is_file(path) or system.tree.is_folder(path):
            system.tree.remove(_absolute(path))
    return 0


def rmdir(system: System, arguments: list[str], streams: Streams) -> int:
    for path in arguments:
        if system.tree.below(path):
            raise OSError(39, "Directory not empty", path)
    return rm(system, arguments, streams)


def chmod(system: System, arguments: list[str], _streams: Streams) -> int:
    """All can be read and written; only the right to execute is kept."""
    _, (mode, *paths) = _options(arguments, "R")
    if "x" in mode or (mode.isdecimal() and int(mode, 8) & 0o111):
        for path in paths:
            for file in [path] if system.tree.is_file(path) else system.tree.below(path):
                system.tree.make_executable(file)
    return 0


def ls(system: System, arguments: list[str], streams: Streams) -> int:
    for folder in arguments or ["/"]:
        start = folder.rstrip("/") + "/"
        names = {path.removeprefix(start).partition("/")[0] for path in system.tree.below(folder)}
        streams.out += "".join(f"{name}\n" for name in sorted(names)).encode()
    return 0


def dirname(_system: System, arguments: list[str], streams: Streams) -> int:
    streams.out += f"{PurePosixPath(arguments[0]).parent}\n".encode()
    return 0


def hostname(system: System, arguments: list[str], streams: Streams) -> int:
    if arguments:
        system.set_host_name(arguments[0])
    else:
        streams.out += f"{system.host_name()}\n".encode()
    return 0


def mount(system: System, arguments: list[str], _streams: Streams) -> int:
    *_, device, folder = arguments
    system.mount(device, folder)
    return 0


def umount(system: System, arguments: list[str], _streams: Streams) -> int:
    system.unmount(arguments[0])
    return 0


def poke(system: System, arguments: list[str], _streams: Streams) -> int:
    """``poke ram|disk PAGE SEED``: change a page outside the file system."""
    space, page, seed = arguments
    system.write_page(space, int(page), int(seed))
    return 0


def succeed(_system: System, _arguments: list[str], _streams: Streams) -> int:
    """What has no meaning here: the fake guest has no caches, and its time passes at once."""
    return 0


def fail(_system: System, _arguments: list[str], _streams: Streams) -> int:
    return 1


PROGRAMS: dict[str, Program] = {
    "[": test, "cat": cat, "chmod": chmod, "cp": cp, "date": succeed, "dirname": dirname, "echo": echo,
    "false": fail, "fstrim": succeed, "grep": grep, "hostname": hostname, "ls": ls, "mkdir": mkdir,
    "mount": mount, "poke": poke, "rm": rm, "rmdir": rmdir, "sleep": succeed, "sync": succeed, "tee": tee,
    "test": test, "true": succeed, "umount": umount,
}  # fmt: skip


def _options(arguments: list[str], known: str) -> tuple[set[str], list[str]]:
    """The letters of the options, and what is not an option."""
    options: set[str] = set()
    rest = list(arguments)
    while rest and rest[0].startswith("-") and len(rest[0]) > 1:
        options |= set(rest.pop(0)[1:])
    if unknown := options - set(known):
        raise ValueError(f"unknown option -{min(unknown)}")
    return options, rest


def _absolute(path: str) -> str:
    return "/" + path.strip("/")


def _copy(tree: Tree, source: str, target: str) -> None:
    tree.write(target, tree.read(source))
    if tree.is_executable(source):
        tree.make_executable(target)
