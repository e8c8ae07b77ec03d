"""The page server: right bytes, those who wait, those who die, and who must not be trusted.

All files are served by a real page server over real FUSE mounts, and read by processes of their own,
which map guest RAM privately as QEMU does: a fault that is never answered would hang this one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cloudlet.errors import RefusedError
from cloudlet.hypervisor.driver import Paging
from cloudlet.hypervisor.qemu import page_server
from cloudlet.hypervisor.qemu.page_server import PageServer, ServedFile, read_progress
from cloudlet.hypervisor.records import Workspace, processes_of
from cloudlet.model import PAGE_BYTES
from cloudlet.pageserver.state import BASE, HERE, MISSING, NAME, SERVERS, SERVERS_AT, SHAPE

pytestmark = pytest.mark.skipif(bool(os.geteuid()), reason="only root can mount")

RAM, LAYER = 0, 1
DEADLINE = 20.0
NOBODY = 400123


def text(kind: str, page: int) -> bytes:
    """What a page holds, different in each."""
    return f"{kind}-{page:07d},".encode().ljust(16, b".") * (PAGE_BYTES // 16)


def memory_file(pages: int) -> int:
    descriptor = os.memfd_create("pages", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, pages * PAGE_BYTES)
    return descriptor


def until(condition: Callable[[], bool]) -> None:
    """Look until it is so: what the server counts cannot be awaited."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@dataclass
class Served:
    """Two files in one state, their server, and what it says of those who wait."""

    workspace: Workspace
    pages: int
    kinds: list[np.ndarray]
    server: PageServer
    deltas: list[int]
    wanted: queue.Queue[tuple[int, int, int]]

    def bring(self, file: int, *pages: int) -> None:
        for page in pages:
            os.pwrite(self.deltas[file], text("here", page), page * PAGE_BYTES)
        self.server.arrived(file, np.array(pages, np.uint32))

    def waiting(self) -> int:
        """Reads that wait now."""
        header = (self.workspace.path / NAME).read_bytes()
        return SERVERS.unpack_from(header, SERVERS_AT)[-1]

    def expected(self, file: int, start: int, end: int) -> bytes:
        known = self.kinds[file]
        first, after = start // PAGE_BYTES, -(-end // PAGE_BYTES)
        base = (lambda page: text("base", page)) if file == RAM else (lambda page: bytes(PAGE_BYTES))
        whole = b"".join(
            base(page) if known[page] == BASE else text("here", page) for page in range(first, after)
        )
        return whole[start - first * PAGE_BYTES : end - first * PAGE_BYTES]

    def open(self, file: int) -> int:
        return os.open(f"/proc/self/fd/{self.server.descriptors[file]}", os.O_RDONLY | os.O_CLOEXEC)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server: ``serve(ram_kinds, layer_kinds, ...)``; at the end nothing is left of any."""
    mounts = Path("/proc/self/mountinfo").read_text()
    threads = set(Path("/proc/self/task").iterdir())
    with contextlib.ExitStack() as cleanup:

        def start(ram: list[int], layer: list[int] | None = None, **options: object) -> Served:
            workspace = cleanup.enter_context(Workspace.create(tmp_path / "instances"))
            kinds = [np.array(ram, np.uint8), np.array(layer or [BASE], np.uint8)]
            base = memory_file(len(ram))
            deltas = [memory_file(len(pages)) for pages in kinds]
            for descriptor in (base, *deltas):
                cleanup.callback(os.close, descriptor)
            os.pwrite(base, b"".join(text("base", page) for page in range(len(ram))), 0)
            for delta, pages in zip(deltas, kinds, strict=True):
                for page in np.flatnonzero(pages == HERE).tolist():
                    os.pwrite(delta, text("here", page), page * PAGE_BYTES)
            wanted: queue.Queue[tuple[int, int, int]] = queue.Queue()
            files = [
                ServedFile(len(pages) * PAGE_BYTES, delta, from_base, pages)
                for pages, delta, from_base in zip(kinds, deltas, (base, None), strict=True)
            ]
            with (workspace.path / "log").open("ab") as log:
                server = PageServer.start(
                    workspace, files, lambda *what: wanted.put(what), log_fd=log.fileno(), **options
                )
            cleanup.callback(lambda: print((workspace.path / "log").read_text()))
            cleanup.callback(server.stop)
            return Served(workspace, len(ram), kinds, server, deltas, wanted)

        yield start
    assert Path("/proc/self/mountinfo").read_text() == mounts
    until(lambda: set(Path("/proc/self/task").iterdir()) <= threads)


READER = """
import mmap, os, signal, sys
number, uid = map(int, sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: None)
if uid:
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
file = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
ram = mmap.mmap(file, os.fstat(file).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
print("mapped", flush=True)
for line in sys.stdin:
    how, start, end = line.split()
    start, end = int(start), int(end)
    print((ram[start:end] if how == "map" else os.pread(file, end - start, start)).hex(), flush=True)
"""


class Reader:
    """A process that maps a served file and reads what it is asked to."""

    def __init__(self, served: Served, file: int = RAM, uid: int = 0) -> None:
        descriptor = served.server.descriptors[file]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", READER, str(descriptor), str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[descriptor],
        )
        assert self._line() == "mapped"

    def ask(self, start: int, end: int, how: str = "map") -> None:
        self.process.stdin.write(f"{how} {start} {end}\n".encode())
        self.process.stdin.flush()

    def answer(self) -> bytes:
        return bytes.fromhex(self._line())

    def read(self, start: int, end: int, how: str = "map") -> bytes:
        self.ask(start, end, how)
        return self.answer()

    def waits(self) -> bool:
        """Whether nothing has been answered yet."""
        return not select.select([self.process.stdout], [], [], 0)[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        self.process.stdin.close()
        self.process.stdout.close()

    def _line(self) -> str:
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], "no answer"
        return self.process.stdout.readline().decode().strip()


@pytest.fixture
def reader(serve: Serve) -> Iterator[Callable[..., Reader]]:
    """Start readers; they end before the servers."""
    started: list[Reader] = []

    def start(served: Served, file: int = RAM, uid: int = 0) -> Reader:
        started.append(Reader(served, file, uid))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(DEADLINE)
        with contextlib.suppress(BrokenPipeError):
            each.process.stdin.close()
        each.process.stdout.close()


MIXED = [BASE, HERE, HERE, BASE, BASE, HERE, BASE, HERE]


@pytest.mark.parametrize("push_pages", [0, 4])
def test_bytes_are_right_across_pages_of_different_kinds(serve: Serve, reader, push_pages: int) -> None:
    served = serve(MIXED, MIXED * 40, push_pages=push_pages)
    process = reader(served)
    for start, end in [(0, 1), (4000, 4200), (8190, 8193), (5, 8 * PAGE_BYTES), (3 * PAGE_BYTES, 20480)]:
        assert process.read(start, end) == served.expected(RAM, start, end)
    layer = served.open(LAYER)
    try:
        size = 320 * PAGE_BYTES
        assert os.fstat(layer).st_size == size
        for start, end in [(0, 1 << 20), (100, 5000), (4096, 4097), (size - 5000, size), (12345, 987654)]:
            assert os.pread(layer, end - start, start) == served.expected(LAYER, start, end)
        assert os.pread(layer, 4096, size - 10) == served.expected(LAYER, size - 10, size)
        assert os.pread(layer, 4096, 1 << 60) == b""
    finally:
        os.close(layer)


def test_a_big_read_is_one_request(serve: Serve) -> None:
    served = serve([BASE], MIXED * 32, push_pages=0)
    layer = served.open(LAYER)
    try:
        with mmap.mmap(-1, 1 << 20) as aligned:
            assert os.preadv(layer, [aligned], 0) == 1 << 20
            assert aligned[:] == served.expected(LAYER, 0, 1 << 20)
    finally:
        os.close(layer)
    assert served.server.progress().reads == 1


def test_a_fault_waits_until_its_page_has_come(serve: Serve, reader) -> None:
    served = serve([BASE, MISSING, MISSING, HERE], push_pages=0)
    process = reader(served)
    process.ask(PAGE_BYTES, PAGE_BYTES + 16)
    assert served.wanted.get(timeout=DEADLINE) == (RAM, 1, 1)
    until(lambda: served.waiting() == 1)
    before = served.server.progress()
    assert before.waiting_since is not None
    assert before.waiting_since <= time.monotonic()
    served.bring(RAM, 2)  # another one changes nothing
    assert process.waits()
    served.bring(RAM, 1)
    assert process.answer() == text("here", 1)[:16]
    assert served.wanted.empty()
    after = served.server.progress()
    assert (after.pages, after.missing, after.stalls, after.waiting_since) == (3, 0, 1, None)
    assert served.waiting() == 0
    assert 0 < after.longest_stall == after.waited <= time.monotonic() - before.waiting_since
    assert process.read(0, 4 * PAGE_BYTES) == served.expected(RAM, 0, 4 * PAGE_BYTES)


def test_stalls_are_added_up(serve: Serve, reader) -> None:
    served = serve([MISSING] * 3, push_pages=0)
    process = reader(served)
    for page in range(3):
        process.ask(page * PAGE_BYTES, page * PAGE_BYTES + 1)
        served.wanted.get(timeout=DEADLINE)
        served.bring(RAM, page)
        assert process.answer() == b"h"
    progress = served.server.progress()
    assert progress.stalls == 3
    assert progress.longest_stall < progress.waited


def test_a_read_over_several_pages_waits_for_all_of_them(serve: Serve, reader) -> None:
    kinds = [BASE, MISSING, HERE, MISSING, BASE, MISSING]
    served = serve([BASE], kinds, push_pages=0)
    process = reader(served, LAYER)
    process.ask(0, 5 * PAGE_BYTES, "read")
    assert served.wanted.get(timeout=DEADLINE) == (LAYER, 1, 3)
    served.bring(LAYER, 1)
    until(lambda: served.server.progress().missing == 2)
    assert process.waits()
    served.bring(LAYER, 3)
    assert process.answer() == served.expected(LAYER, 0, 5 * PAGE_BYTES)
    assert served.server.progress().stalls == 1


def test_a_signal_is_no_reason_to_fail_but_death_is(serve: Serve, reader) -> None:
    served = serve([MISSING] * 3, push_pages=0)
    process = reader(served)
    process.ask(0, 4)
    served.wanted.get(timeout=DEADLINE)
    process.process.send_signal(signal.SIGUSR1)
    # The kernel has told of the signal when the wait cannot be interrupted any more, and the server has
    # been told before it answers for the second time.
    stat = Path(f"/proc/{process.process.pid}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "D")
    for _ in range(2):
        assert served.server.flush_touched()
    served.bring(RAM, 0)
    assert process.answer() == b"here"
    process.ask(PAGE_BYTES, PAGE_BYTES + 4)
    served.wanted.get(timeout=DEADLINE)
    process.process.send_signal(signal.SIGUSR1)
    process.process.kill()
    assert process.process.wait(2) == -signal.SIGKILL
    until(lambda: served.waiting() == 0)
    assert served.server.progress().waiting_since is None
    other = reader(served)
    assert other.read(0, 4) == b"here"


def test_the_death_of_the_server_fails_those_who_wait(serve: Serve, reader) -> None:
    served = serve([MISSING, BASE], [MISSING], push_pages=16)
    faulting, reading = reader(served), reader(served, LAYER)
    faulting.ask(0, 1)
    reading.ask(0, 1, "read")
    for _ in range(2):
        served.wanted.get(timeout=DEADLINE)
    os.kill(served.server.process.pid, signal.SIGKILL)
    assert faulting.process.wait(2) == -signal.SIGBUS
    assert reading.process.wait(2) == 1  # OSError
    assert not served.server.process.alive()
    # Its owner can go on as if nothing had happened.
    served.bring(RAM, 0)
    served.server.received(1, 2)
    assert not served.server.flush_touched(timeout=0.1)
    assert served.server.progress().received == 1
    for _ in range(2):
        served.server.stop()
    assert served.server.progress().received == 1
    served.bring(RAM, 0)
    assert Path(f"/proc/{served.server.process.pid}").exists() is False


@pytest.mark.parametrize("push_pages", [0, 16])
def test_an_owner_that_dies_too_early_takes_the_server_along(serve: Serve, reader, push_pages: int) -> None:
    served = serve([MISSING, BASE], push_pages=push_pages)
    process = reader(served)
    process.ask(0, 1)
    served.wanted.get(timeout=DEADLINE)
    served.server.release()
    assert served.server._child.wait(DEADLINE) == 1
    assert process.process.wait(2) == -signal.SIGBUS


@pytest.mark.parametrize("push_pages", [0, 16])
def test_a_complete_instance_does_not_need_its_owner(serve: Serve, reader, push_pages: int) -> None:
    served = serve([BASE, MISSING] * 20, push_pages=push_pages)
    process = reader(served)
    served.bring(RAM, *range(1, 40, 2))
    served.server.complete()
    served.server.release()
    served.server.release()
    assert process.read(0, 40 * PAGE_BYTES) == served.expected(RAM, 0, 40 * PAGE_BYTES)
    assert served.server.process.alive()
    paging = read_progress(served.workspace.path)
    assert paging is not None
    assert paging.complete
    assert paging.reads > 0
    # With the last who has the files, the server ends.
    process.close()
    assert served.server._child.wait(DEADLINE) == 0


@pytest.mark.parametrize("push_pages", [0, 16])
def test_files_that_nobody_ever_opened_end_as_well(serve: Serve, push_pages: int) -> None:
    served = serve([BASE], push_pages=push_pages)
    os.close(served.open(RAM))
    served.server.complete()
    served.server.release()
    assert served.server._child.wait(DEADLINE) == 0


def test_the_order_of_first_touches(serve: Serve, reader, tmp_path: Path) -> None:
    with (tmp_path / "touched").open("w+b") as target:
        served = serve([BASE] * 8, [HERE] * 8, push_pages=0, touched=target.fileno())
        process = reader(served)
        for page in (3, 1, 3, 7):
            process.read(page * PAGE_BYTES, page * PAGE_BYTES + 1)
        layer = served.open(LAYER)
        os.pread(layer, 3 * PAGE_BYTES, 2 * PAGE_BYTES)
        os.pread(layer, 3 * PAGE_BYTES, 0)
        os.close(layer)
        process.read(0, 1)
        assert served.server.flush_touched()
        order = list(struct.iter_unpack("<BI", (tmp_path / "touched").read_bytes()))
        ram, disk = [[page for file, page in order if file == number] for number in (RAM, LAYER)]
        assert ram == [3, 1, 7, 0]
        assert disk == [2, 3, 4, 0, 1]
        assert order[-1] == (RAM, 0)


def test_neighbours_that_are_here_need_no_read_of_their_own(serve: Serve, reader) -> None:
    kinds = [BASE, HERE, BASE, MISSING, *[HERE] * 12, *[BASE] * 16]
    served = serve(kinds, push_pages=16)
    process = reader(served)
    # Before it has its own opening, which shows as the root of a file system, nothing is read along.
    files = Path(f"/proc/{served.server.process.pid}/fd")
    until(lambda: Path("/") in [entry.readlink() for entry in files.iterdir()])
    process.read(0, 1)
    until(lambda: served.server.progress().reads == 3)
    for page in (1, 2, *range(4, 16)):
        start, end = page * PAGE_BYTES, (page + 1) * PAGE_BYTES
        assert process.read(start, end) == served.expected(RAM, start, end)
    assert served.server.progress().reads == 3, "page 0, two ranges around the one that is missing"
    assert served.server.progress().stalls == 0
    assert served.wanted.empty(), "a page was read along that has not come"


def test_many_may_wait_and_others_are_served(serve: Serve, reader) -> None:
    missing = 3000
    served = serve([MISSING] * missing + [BASE] * 64, push_pages=16)
    ram = served.open(RAM)
    try:
        os.fstat(ram)  # before, the kernel does not know how large it is
        for page in range(missing):
            os.posix_fadvise(ram, page * PAGE_BYTES, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
        asked = {served.wanted.get(timeout=DEADLINE)[1] for _ in range(missing)}
        assert asked == set(range(missing))
        start, end = missing * PAGE_BYTES, (missing + 64) * PAGE_BYTES
        assert reader(served).read(start, end) == served.expected(RAM, start, end)
        assert served.waiting() == missing
        served.bring(RAM, *range(missing))
        until(lambda: served.waiting() == 0)
        assert served.server.progress().stalls == missing
        assert os.pread(ram, PAGE_BYTES, 5 * PAGE_BYTES) == text("here", 5)
    finally:
        os.close(ram)


STRESS = """
import mmap, os, random, sys
number, pages, seed = map(int, sys.argv[1:])
file = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
ram = mmap.mmap(file, os.fstat(file).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
order = list(range(pages)); random.Random(seed).shuffle(order)
for page in order:
    kind = "here" if page % 2 else "base"
    wanted = f"{kind}-{page:07d},".encode().ljust(16, b".") * 256
    if ram[page * 4096 : page * 4096 + 4096] != wanted: sys.exit(f"page {page} is wrong")
print("all right")
"""


@pytest.mark.parametrize("push_pages", [0, 16])
def test_no_byte_is_wrong_while_pages_come_in_any_order(serve: Serve, push_pages: int) -> None:
    seed = 20140
    served = serve([BASE, MISSING] * 2000, push_pages=push_pages)
    descriptor = served.server.descriptors[RAM]
    readers = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STRESS, *map(str, (descriptor, served.pages, seed + turn))],
            stdout=subprocess.PIPE,
            pass_fds=[descriptor],
        )
        for turn in range(3)
    ]
    try:
        order = list(range(1, 4000, 2))
        chance = random.Random(seed)
        chance.shuffle(order)
        while order:
            count = chance.randrange(1, 40)
            served.bring(RAM, *order[:count])
            del order[:count]
            with contextlib.suppress(queue.Empty):
                _, first, _ = served.wanted.get(timeout=0.001)
                if first in order:
                    order.remove(first)
                    served.bring(RAM, first)
        assert [each.communicate(timeout=DEADLINE)[0] for each in readers] == [b"all right\n"] * 3
    finally:
        for each in readers:
            each.kill()
            each.wait(DEADLINE)
    progress = served.server.progress()
    assert (progress.pages, progress.missing, served.waiting()) == (2000, 0, 0)
    assert progress.stalls > 0, "nobody had to wait: this was no test"


def test_a_server_killed_under_load_leaves_nobody_behind(serve: Serve) -> None:
    for turn in range(5):
        served = serve([BASE] * 4000, push_pages=16)
        descriptor = served.server.descriptors[RAM]
        command = [sys.executable, "-I", "-S", "-c", STRESS.replace("if page % 2", "if False")]
        readers = [
            subprocess.Popen([*command, *map(str, (descriptor, 4000, number))], pass_fds=[descriptor])
            for number in range(3)
        ]
        until(lambda served=served, turn=turn: served.server.progress().reads > 40 * turn)
        served.server.stop()
        assert {each.wait(2) for each in readers} <= {0, 1, -signal.SIGBUS}


HOSTILE = """
import array, contextlib, errno, fcntl, mmap, os, sys
uid = 400123
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
for number in map(int, sys.argv[1:]):
    path = f"/proc/self/fd/{number}"
    file = os.open(path, os.O_RDWR)
    size = os.fstat(file).st_size
    for attempt in (
        lambda: os.pwrite(file, b"x", 0),
        lambda: os.pwrite(file, b"x" * (1 << 20), 0),
        lambda: os.ftruncate(file, 0),
        lambda: os.ftruncate(file, 1 << 40),
        lambda: os.close(os.open(path, os.O_RDWR | os.O_TRUNC)),
        lambda: os.posix_fallocate(file, 0, 1 << 30),
        lambda: fcntl.ioctl(file, 0x1234),
        lambda: fcntl.ioctl(file, 0x40087601, array.array("L", [1] * 4)),
        lambda: os.setxattr(path, "user.x", b"y" * 60000),
        lambda: os.getxattr(path, "user.x"),
        lambda: os.listdir(path),
        lambda: os.chmod(path, 0o777),
        lambda: os.utime(path, (1, 1)),
        lambda: os.copy_file_range(file, file, 4096, 0, 4096),
    ):
        try:
            print("done:", attempt(), attempt.__code__.co_firstlineno)
        except OSError as error:
            pass
    for offset in (size, size - 1, 1 << 40, (1 << 63) - 4097):
        assert len(os.pread(file, 4096, offset)) == max(0, min(4096, size - offset))
    with contextlib.suppress(OSError):
        shared = mmap.mmap(file, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        shared[:4] = b"mine"
        shared.flush()
        print("done: flush")
    with contextlib.suppress(OSError):
        os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
    os.close(file)
"""


def test_a_hostile_holder_harms_neither_the_server_nor_the_app(serve: Serve, reader) -> None:
    served = serve([HERE, BASE] * 40, [HERE] * 40, push_pages=16, uid=NOBODY)
    before = [os.pread(delta, 1 << 20, 0) for delta in served.deltas]
    command = [sys.executable, "-I", "-S", "-c", HOSTILE, *map(str, served.server.descriptors)]
    done = subprocess.run(
        command, pass_fds=served.server.descriptors, capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [os.pread(delta, 1 << 20, 0) for delta in served.deltas] == before
    assert served.server.process.alive()
    process = reader(served, LAYER, NOBODY)
    assert process.read(0, 4 * PAGE_BYTES, "read") == served.expected(LAYER, 0, 4 * PAGE_BYTES)


def test_whoever_holds_the_mount_can_open_it_without_rights(serve: Serve, reader) -> None:
    served = serve(MIXED, uid=NOBODY)
    assert reader(served, RAM, NOBODY).read(0, 8 * PAGE_BYTES) == served.expected(RAM, 0, 8 * PAGE_BYTES)


def test_the_server_has_no_rights_and_cannot_change_an_app(serve: Serve) -> None:
    served = serve(MIXED, uid=NOBODY)
    os.close(served.open(RAM))  # answered: it has given up what it had
    process = served.server.process
    assert process in processes_of(served.workspace.path)
    proc = Path(f"/proc/{process.pid}")
    status = dict(
        line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line
    )
    assert status["Name"] == "cloudlet-pages"
    assert status["Uid"].split() == [str(NOBODY)] * 4
    assert status["Gid"].split() == [str(NOBODY)] * 4
    assert status["Groups"].split() == []
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (proc / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert (proc / "fd").stat().st_uid == 0, "another process of its user could look into it"
    files = {}
    for entry in (proc / "fd").iterdir():
        flags = (proc / "fdinfo" / entry.name).read_text().split("flags:")[1].split()[0]
        files.setdefault(str(entry.readlink()), set()).add(int(flags, 8) & os.O_ACCMODE)
    assert files["/memfd:pages (deleted)"] == {os.O_RDONLY}
    assert files[str(served.workspace.path / NAME)] == {os.O_RDWR}


def test_progress_is_there_for_others(serve: Serve) -> None:
    served = serve([BASE, MISSING, HERE, MISSING], [MISSING, MISSING])
    served.server.received(10, 100)
    served.bring(RAM, 1, 1)
    served.bring(LAYER, 1)
    served.bring(RAM)
    paging = read_progress(served.workspace.path)
    assert paging == served.server.progress()
    assert paging == Paging(5, 2, 100, 10, complete=False)
    served.server.complete()
    assert read_progress(served.workspace.path) == Paging(5, 2, 100, 10, complete=True)
    assert (served.workspace.path / NAME).read_bytes()[4096:] == bytes(
        [BASE, HERE, HERE, MISSING, MISSING, HERE]
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"cl-pages",
        bytes(5000),
        random.Random(1).randbytes(5000),
        SHAPE.pack(b"cl-pages", 2, 1, 1, 0).ljust(4097, b"\0"),
        SHAPE.pack(b"cl-pages", 1, 1, 2, 0).ljust(4097, b"\0"),
        SHAPE.pack(b"cl-pages", 1, 9, 1, 0).ljust(4097, b"\0"),
        SHAPE.pack(b"cl-pages", 1, 2, (1 << 64) - 1, 2).ljust(4097, b"\0"),
    ],
)
def test_a_state_file_that_is_not_sound_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert read_progress(tmp_path) is None


def test_no_state_file_is_none(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / NAME).mkdir()
    assert read_progress(tmp_path) is None


def test_who_may_not_mount_is_told_what_to_do() -> None:
    code = (
        "import os; from cloudlet.hypervisor.qemu.page_server import obstacle\n"
        f"os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3); print(obstacle())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=True
    ).stdout
    assert "run as root" in said
    assert len(said.splitlines()) == 1


def test_where_it_cannot_be_nothing_is_started(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server.mount, "DEVICE", "/dev/none")
    page_server.obstacle.cache_clear()
    try:
        assert "modprobe fuse" in page_server.obstacle()
        with pytest.raises(RefusedError, match="modprobe fuse"):
            serve([BASE])
    finally:
        page_server.obstacle.cache_clear()


def test_what_was_read_before_a_page_came_again_is_forgotten(serve: Serve, reader) -> None:
    """While pages may change, whoever has read one sees what came after, once it is settled."""
    served = serve([BASE, BASE, HERE, BASE], push_pages=4, changes=True)
    process = reader(served)
    old = [process.read(page * PAGE_BYTES, page * PAGE_BYTES + 16) for page in range(4)]
    assert old == [text("base", 0)[:16], text("base", 1)[:16], text("here", 2)[:16], text("base", 3)[:16]]
    served.bring(RAM, 1)
    os.pwrite(served.deltas[RAM], text("newer", 2), 2 * PAGE_BYTES)
    served.server.arrived(RAM, np.array([2], np.uint32))
    served.server.settle()
    new = [process.read(page * PAGE_BYTES, page * PAGE_BYTES + 16) for page in range(4)]
    assert new == [text("base", 0)[:16], text("here", 1)[:16], text("newer", 2)[:16], text("base", 3)[:16]]
    served.server.settle()  # once is enough, and again does nothing


def test_a_page_that_was_there_may_be_missing_again(serve: Serve, reader) -> None:
    served = serve([BASE, HERE, BASE, BASE], push_pages=0, changes=True)
    process = reader(served)
    assert process.read(PAGE_BYTES, PAGE_BYTES + 16) == text("here", 1)[:16]
    served.server.expect(RAM, np.array([1, 2], np.uint32))
    paging = served.server.progress()
    assert (paging.missing, paging.complete) == (2, False)
    served.server.settle()
    process.ask(PAGE_BYTES, PAGE_BYTES + 16)
    assert served.wanted.get(timeout=DEADLINE) == (RAM, 1, 1)
    assert process.waits()
    os.pwrite(served.deltas[RAM], text("newer", 1), PAGE_BYTES)
    served.server.arrived(RAM, np.array([1], np.uint32))
    assert process.answer() == text("newer", 1)[:16]
    assert served.server.progress().missing == 1


def test_it_is_settled_while_somebody_waits(serve: Serve, reader) -> None:
    """A page that is being read holds up the kernel, not who brings it."""
    served = serve([MISSING, BASE], push_pages=0, changes=True)
    process = reader(served)
    process.ask(0, 16)
    assert served.wanted.get(timeout=DEADLINE) == (RAM, 0, 1)
    settled = threading.Thread(target=served.server.settle)
    settled.start()
    served.bring(RAM, 0)
    settled.join(DEADLINE)
    assert not settled.is_alive()
    assert process.answer() == text("here", 0)[:16]
