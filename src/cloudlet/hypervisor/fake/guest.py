"""The guest of a fake machine: a small deterministic program whose whole state is RAM and disk.

It counts, serves pages over HTTP, runs the commands of its shell, and notices by its generation ID that
it was resumed. ``/run``, ``/tmp`` and ``/proc`` are in RAM, all else is on the disk. It knows no host:
files, optical medium and console are handed to it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from mmap import mmap
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

from cloudlet.hypervisor.fake.files import COUNTER_PAGE, PAGE, Files, page_of
from cloudlet.hypervisor.fake.programs import PROGRAMS
from cloudlet.hypervisor.fake.shell import Shell, Streams

CLONE_AGENT = "/usr/lib/cloudlet/clone-agent"
QUIET = "/usr/lib/cloudlet/quiet"
READY_LINE = "cloudlet fake guest ready"

_IN_RAM = ("/run", "/tmp", "/proc")
_HOST_NAME, _GENERATION, _MOUNTS = "/proc/sys/kernel/hostname", "/proc/generation", "/proc/mounts"
_PROGRAM_FOLDERS = ("", "/bin", "/sbin", "/usr/bin", "/usr/sbin")
_COUNTER = struct.Struct("<Q")
_FIRST_FILES = {
    "/etc/hostname": "fake\n",
    "/www/index.html": "cloudlet fake guest\n",
    CLONE_AGENT: '#!/bin/sh\nhostname "$4"\nhostname > /etc/hostname\necho "{}"\n',
    QUIET: "#!/bin/sh\nsync\n",
}

Page = tuple[int, bytes]
"""An HTTP status and a body."""


class Guest:
    """The guest, over the bytes of its machine."""

    def __init__(self, ram: mmap, disk: mmap, print_line: Callable[[str], None]) -> None:
        self._spaces = {"ram": ram, "disk": disk}
        self._ram, self._disk = Files(ram), Files(disk)
        self._print = print_line
        self.tree = GuestTree(self._ram, self._disk)

    def boot(self, generation: str) -> None:
        """Start from the disk, which is formatted if it is not ours."""
        if not self._disk.formatted:
            self._disk.format()
            for path, text in _FIRST_FILES.items():
                self._disk.write(path, text.encode(), executable=text.startswith("#!"))
        self._ram.format()
        self._ram.write(_MOUNTS, b"")
        self._ram.write(_GENERATION, generation.encode())
        self._ram.write(_HOST_NAME, self._disk.read("/etc/hostname"))
        for folder in ("/run", "/tmp"):
            self._ram.make_folder(folder)
        self._print("cloudlet fake guest boots")
        self._print(READY_LINE)

    def go_on(self, generation: str) -> None:
        """Run on after a resume, as another machine than the captured one if the generation differs."""
        if self._ram.read(_GENERATION) != generation.encode():
            self._ram.write(_GENERATION, generation.encode())
            self._print(f"generation {generation}")

    def insert(self, medium: dict[str, bytes] | None) -> None:
        """A medium is in the optical drive now, or none."""
        self.tree.drive = medium

    def answer(self, target: str) -> Page:
        """A page of the guest's web server."""
        url = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        match url.path:
            case "/healthz":
                return 200, b"ok\n"
            case "/counter" | "/cgi-bin/counter":
                return 200, f"{self._count(0 if url.query == 'peek' else 1)}\n".encode()
            case "/identity":
                names = {"hostname": self.host_name(), "generation": self._ram.read(_GENERATION).decode()}
                return 200, json.dumps(names).encode()
            case "/write":
                try:
                    self.write_page(query["space"], int(query["page"]), int(query["seed"]))
                except (KeyError, ValueError) as error:
                    return 400, f"{error}\n".encode()
                return 200, b"written\n"
        path = "/www" + (url.path if url.path != "/" else "/index.html")
        return (200, self.tree.read(path)) if self.tree.is_file(path) else (404, b"not found\n")

    def run(self, argv: Sequence[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        """Run a program of the guest; its exit status, output and errors.

        :raises FileNotFoundError: there is no such program.
        """
        streams = Streams(stdin)
        if not self._has(argv[0]):
            raise FileNotFoundError(2, "No such file or directory", argv[0])
        status = self._execute(list(argv), streams)
        return status, bytes(streams.out), bytes(streams.err)

    def write_page(self, space: str, page: int, seed: int) -> None:
        """Change a page of the half that is not the file system's."""
        memory = self._spaces[space]
        pages = len(memory) // PAGE
        if not pages // 2 <= page < pages:
            raise ValueError(f"pages {pages // 2} to {pages - 1} of the {space} can be written")
        memory[page * PAGE : (page + 1) * PAGE] = page_of(seed)

    def host_name(self) -> str:
        return self._ram.read(_HOST_NAME).decode().strip()

    def set_host_name(self, name: str) -> None:
        self._ram.write(_HOST_NAME, f"{name}\n".encode())

    def mount(self, device: str, folder: str) -> None:
        if device != "/dev/sr0" or self.tree.drive is None or not self.tree.is_folder(folder):
            raise OSError(123, "No medium found", device)
        mounts = self._ram.read(_MOUNTS)
        self._ram.write(_MOUNTS, mounts + f"{device} {folder} iso9660 ro 0 0\n".encode())

    def unmount(self, folder: str) -> None:
        lines = self._ram.read(_MOUNTS).decode().splitlines(keepends=True)
        kept = [line for line in lines if line.split()[1] != folder]
        if kept == lines:
            raise OSError(22, "Not mounted", folder)
        self._ram.write(_MOUNTS, "".join(kept).encode())

    def _count(self, step: int) -> int:
        ram = self._spaces["ram"]
        (count,) = _COUNTER.unpack_from(ram, COUNTER_PAGE * PAGE)
        if step:
            _COUNTER.pack_into(ram, COUNTER_PAGE * PAGE, count + step)
        return int(count) + step

    def _execute(self, argv: list[str], streams: Streams) -> int:
        name = PurePosixPath(argv[0]).name
        try:
            if not self._has(argv[0]):
                streams.err += f"{argv[0]}: not found\n".encode()
                return 127
            if self.tree.is_executable(argv[0]):
                shell = Shell(self._execute, self.tree, argv)
                return shell.run(self.tree.read(argv[0]).decode(), streams, strict=True)
            if name == "sh":
                return self._shell(argv, streams)
            if name == "command":
                return 0 if all(self._has(wanted) for wanted in argv[2:]) else 1
            return PROGRAMS[name](self, argv[1:], streams)
        except OSError as error:
            streams.err += f"{name}: {error.filename or ''}: {error.strerror}\n".encode()
        except ValueError as error:
            streams.err += f"{name}: {error}\n".encode()
        return 1

    def _shell(self, argv: list[str], streams: Streams) -> int:
        match argv[1:]:
            case ["-c" | "-ec" | "-ce" as options, script, *rest]:
                shell = Shell(self._execute, self.tree, rest or ["sh"])
                return shell.run(script, streams, strict="e" in options)
            case [path, *rest]:
                script = self.tree.read(path).decode()
                return Shell(self._execute, self.tree, [path, *rest]).run(script, streams)
            case _:
                return Shell(self._execute, self.tree).run(streams.stdin.decode(), streams)

    def _has(self, program: str) -> bool:
        path = PurePosixPath(program)
        folder = "" if path.parent == PurePosixPath() else str(path.parent)
        known = path.name in PROGRAMS or path.name in ("sh", "command")
        return self.tree.is_executable(program) or (known and folder in _PROGRAM_FOLDERS)


class GuestTree:
    """All files of the guest: on its disk, in its RAM, and on a mounted medium."""

    def __init__(self, ram: Files, disk: Files) -> None:
        self._ram, self._disk = ram, disk
        self.drive: dict[str, bytes] | None = None

    def read(self, path: str) -> bytes:
        if path == "/dev/null":
            return b""
        if (inside := self._on_medium(path)) is not None:
            if self.drive is None or inside not in self.drive:
                raise FileNotFoundError(2, "No such file or directory", path)
            return self.drive[inside]
        return self._home(path).read(path)

    def write(self, path: str, content: bytes) -> None:
        if path != "/dev/null":
            self._writable(path).write(path, content)

    def make_folder(self, path: str) -> None:
        self._writable(path).make_folder(path)

    def make_executable(self, path: str) -> None:
        self._writable(path).make_executable(path)

    def remove(self, path: str) -> None:
        self._writable(path).remove(path)

    def is_file(self, path: str) -> bool:
        if (inside := self._on_medium(path)) is not None:
            return inside in (self.drive or {})
        return self._home(path).is_file(path)

    def is_folder(self, path: str) -> bool:
        if (inside := self._on_medium(path)) is not None:
            return not inside or any(name.startswith(f"{inside}/") for name in self.drive or {})
        return self._home(path).is_folder(path)

    def is_executable(self, path: str) -> bool:
        return self._on_medium(path) is None and self._home(path).is_executable(path)

    def below(self, folder: str) -> list[str]:
        inside = self._on_medium(folder)
        if inside is None:
            return self._home(folder).below(folder)
        start = f"{inside}/" if inside else ""
        above = folder.rstrip("/").removesuffix(inside).rstrip("/")
        return [f"{above}/{name}" for name in sorted(self.drive or {}) if name.startswith(start)]

    def _home(self, path: str) -> Files:
        top = "/" + path.strip("/").partition("/")[0]
        return self._ram if top in _IN_RAM else self._disk

    def _writable(self, path: str) -> Files:
        if self._on_medium(path) is not None:
            raise OSError(30, "Read-only file system", path)
        return self._home(path)

    def _on_medium(self, path: str) -> str | None:
        """The path on the mounted medium, or None for one that is elsewhere."""
        if not self._ram.is_file(_MOUNTS):
            return None
        for line in self._ram.read(_MOUNTS).decode().splitlines():
            place = line.split()[1]
            if path == place or path.startswith(f"{place}/"):
                return path.removeprefix(place).strip("/")
        return None
