"""A file system in the pages of a fake machine: its RAM holds one, its disk another.

Page 0 says that there is one and how long its index is; pages 1 to 15 hold the index as JSON; files lie
in whole pages from page 17 to the middle. What is written is in the bytes at once, so that a capture
carries it and a resumed guest finds it. Page 16 and the second half are not the file system's.
"""

from __future__ import annotations

import json
import struct
from mmap import mmap
from pathlib import PurePosixPath

PAGE = 4096
COUNTER_PAGE = 16
LEAST_PAGES = 64
"""The smallest RAM or disk, in pages."""

_MAGIC = b"cloudlet fake 1\0"
_HEAD = struct.Struct("<16sI")
_INDEX_BYTES = 15 * PAGE
_FIRST_DATA = 17

Entry = tuple[int, int, bool]
"""First page, length in bytes, whether it is executable; a folder has page 0."""


class Files:
    """The files in ``memory``, which is a whole RAM or disk."""

    def __init__(self, memory: mmap) -> None:
        self._memory = memory
        self._end = len(memory) // PAGE // 2
        self._index: dict[str, Entry] = {}
        magic, length = _HEAD.unpack_from(memory)
        self.formatted = magic == _MAGIC
        if self.formatted:
            raw = json.loads(memory[PAGE : PAGE + length])
            self._index = {path: (first, size, runs) for path, (first, size, runs) in raw.items()}

    def format(self) -> None:
        """Begin anew, with no files."""
        self.formatted = True
        self._index = {}
        self._save()

    def read(self, path: str) -> bytes:
        first, length, _ = self._file(path)
        return self._memory[first * PAGE : first * PAGE + length]

    def write(self, path: str, content: bytes, *, executable: bool | None = None) -> None:
        """Write a whole file; folders above it are made. The pages of an earlier content are used again."""
        if self.is_folder(path):
            raise IsADirectoryError(21, "Is a directory", path)
        before = self._index.pop(path, None)
        first = self._free(-(-len(content) // PAGE))
        self._memory[first * PAGE : first * PAGE + len(content)] = content
        self.make_folder(str(PurePosixPath(path).parent))
        runs = executable if executable is not None else bool(before and before[2])
        self._index[path] = (first, len(content), runs)
        self._save()

    def make_folder(self, path: str) -> None:
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            if self.is_file(str(folder)):
                raise NotADirectoryError(20, "Not a directory", str(folder))
            self._index.setdefault(str(folder), (0, 0, True))
        self._save()

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all below it."""
        if path not in self._index:
            raise FileNotFoundError(2, "No such file or directory", path)
        for name in [name for name in self._index if name == path or name.startswith(f"{path}/")]:
            del self._index[name]
        self._save()

    def make_executable(self, path: str) -> None:
        first, length, _ = self._file(path)
        self._index[path] = (first, length, True)
        self._save()

    def is_file(self, path: str) -> bool:
        return self._index.get(path, (0, 0, False))[0] > 0

    def is_folder(self, path: str) -> bool:
        return self._index.get(path, (1, 0, False))[0] == 0

    def is_executable(self, path: str) -> bool:
        return self.is_file(path) and self._index[path][2]

    def below(self, folder: str) -> list[str]:
        """The paths of all files below a folder."""
        start = folder.rstrip("/") + "/"
        return sorted(path for path in self._index if path.startswith(start) and self.is_file(path))

    def _file(self, path: str) -> Entry:
        if self.is_folder(path):
            raise IsADirectoryError(21, "Is a directory", path)
        if path not in self._index:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self._index[path]

    def _free(self, pages: int) -> int:
        start = _FIRST_DATA
        for first, length, _ in sorted(entry for entry in self._index.values() if entry[0]):
            if first - start >= pages:
                break
            start = first + max(1, -(-length // PAGE))
        if start + max(1, pages) > self._end:
            raise OSError(28, "No space left on device")
        return start

    def _save(self) -> None:
        raw = json.dumps(self._index, separators=(",", ":")).encode()
        if len(raw) > _INDEX_BYTES:
            raise OSError(28, "No space left on device")
        self._memory[: _HEAD.size] = _HEAD.pack(_MAGIC, len(raw))
        _put(self._memory, PAGE, raw)


def page_of(seed: int) -> bytes:
    """The page that ``/write?seed=SEED`` writes: always the same for a seed, and not compressible."""
    state = (seed * 0x9E3779B97F4A7C15 + 1) & 0xFFFFFFFFFFFFFFFF
    words = []
    for _ in range(PAGE // 8):  # xorshift64*
        state ^= state >> 12
        state = (state ^ (state << 25)) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        words.append((state * 0x2545F4914F6CDD1D) & 0xFFFFFFFFFFFFFFFF)
    return struct.pack(f"<{len(words)}Q", *words)


def _put(memory: mmap, offset: int, content: bytes) -> None:
    """Write where it differs, so that saving an index does not touch all its pages."""
    for at in range(0, len(content), PAGE):
        part = content[at : at + PAGE]
        if memory[offset + at : offset + at + len(part)] != part:
            memory[offset + at : offset + at + len(part)] = part
