"""Which pages of a private mapping were changed, told from outside and compared with the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu import changed
from tests.unit.hypervisor.sealed import sealed_ram

PAGES = 3000
PAGE = 4096

_CHILD = """
import json, mmap, os, sys
descriptor, pages, written, only_read, swapped = json.loads(sys.argv[1])
memory = mmap.mmap(descriptor, pages * 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for page in only_read:
    memory[page * 4096]
for page in written:
    memory[page * 4096 : page * 4096 + 4] = page.to_bytes(4, "little")
for page in swapped:
    memory.madvise(21, page * 4096, 4096)  # MADV_PAGEOUT
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[int]:
    """A sealed RAM whose page n holds ``n`` over and over, but for a hole at its end."""
    path = tmp_path / "ram"
    rows = np.repeat(np.arange(PAGES, dtype="<u4"), PAGE // 4).reshape(PAGES, -1)
    rows[-100:] = 0
    with path.open("wb") as file:
        file.write(rows[:-100].tobytes())
        file.truncate(PAGES * PAGE)
    descriptor = sealed_ram("ab" * 32, path, [])
    yield descriptor
    os.close(descriptor)


@contextmanager
def machine(
    ram: int, written: list[int], only_read: list[int] = (), swapped: list[int] = ()
) -> Iterator[int]:
    """A process that maps the RAM privately, changes pages, and stands still."""
    arguments = json.dumps([ram, PAGES, list(written), list(only_read), list(swapped)])
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[ram],
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def expected(written: list[int]) -> bytes:
    rows = []
    for page in written:
        row = bytearray(page.to_bytes(4, "little") * (PAGE // 4) if page < PAGES - 100 else bytes(PAGE))
        row[:4] = page.to_bytes(4, "little")
        rows.append(bytes(row))
    return b"".join(rows)


def path_of(ram: int) -> Path:
    return Path(f"/proc/self/fd/{ram}")


def look(pid: int, ram: int, target: Path) -> tuple[list[int], bytes]:
    mapping = changed.find_mapping(pid, path_of(ram), PAGES * PAGE)
    numbers = changed.private_pages(mapping)
    with target.open("wb") as file:
        changed.read_pages(mapping, numbers, file.fileno())
    return numbers.tolist(), target.read_bytes()


@pytest.mark.parametrize(
    "written",
    [
        [],
        [0],
        [PAGES - 1],
        [0, 1, 2, 7, 500, 501, PAGES - 100, PAGES - 1],
        list(range(200, 2500)),  # longer than what is read at once
        list(range(0, PAGES, 2)),
        list(range(PAGES)),
    ],
    ids=["none", "first", "last", "some", "a long run", "every other", "all"],
)
def test_the_changed_pages_and_their_bytes(ram: int, tmp_path: Path, written: list[int]) -> None:
    others = [page for page in range(0, PAGES, 3) if page not in set(written)]
    with machine(ram, written, only_read=others) as pid:
        numbers, content = look(pid, ram, tmp_path / "pages")
    assert numbers == written
    assert content == expected(written)


def test_the_machine_must_have_mapped_it(ram: int) -> None:
    with machine(ram, []) as pid, pytest.raises(FailedError, match="no mapping"):
        changed.find_mapping(pid, Path(__file__), PAGES * PAGE)
    with machine(ram, []) as pid, pytest.raises(FailedError, match="no mapping"):
        changed.find_mapping(pid, path_of(ram), PAGES * PAGE + 1)


def test_access_is_checked_at_the_start(ram: int) -> None:
    with machine(ram, []) as pid:
        changed.check_access(pid)
    with pytest.raises(FailedError, match="gone"):
        changed.check_access(pid)


def test_without_the_right_it_is_refused(ram: int) -> None:
    """An ordinary user may not look into a process of root's."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    script = """
import os, pathlib, sys
sys.path[:0] = sys.argv[3:]
from cloudlet.errors import RefusedError
from cloudlet.hypervisor.qemu import changed
from tests.unit.hypervisor.sealed import sealed_ram
os.setgroups([]), os.setgid(65534), os.setuid(65534)
pid, ram = int(sys.argv[1]), pathlib.Path(sys.argv[2])
mapping = changed.Mapping(pid, 0, 1)
for attempt in (
    lambda: changed.check_access(pid),
    lambda: changed.find_mapping(pid, ram, 1),
    lambda: changed.private_pages(mapping),
):
    try:
        attempt()
    except RefusedError as error:
        print(error)
"""
    with machine(ram, []) as pid:
        result = subprocess.run(
            [sys.executable, "-c", script, str(pid), "/"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert result.stdout.count("may not be read") == 3, result.stderr
