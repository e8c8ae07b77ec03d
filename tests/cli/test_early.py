"""The early start as its users see it: what they are told, and how it ends when something goes wrong."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from cloudlet.hypervisor.driver import Paging
from cloudlet.hypervisor.qemu.page_server import read_progress
from cloudlet.hypervisor.records import Record, read_record
from cloudlet.settings import Settings
from tests.cli.conftest import Hello
from tests.cli.damage import flipped, hot_end
from tests.cli.moments import RUN_SECONDS, killed, told_to_end
from tests.cli.test_corruption import refused
from tests.cli.traces import DEADLINE, first_line, traces
from tests.cli.web import Web, serving
from tests.conftest import CommandLine, Finished

pytestmark = pytest.mark.qemu

SEED = 20240605
ENDING_SECONDS = 10.0
"""Longest time from a fault that cannot be mended to the end."""
PATIENCE, LONG = "3", "60"
"""Seconds; a stream that a test holds stands from a moment before the machine answers."""


@pytest.fixture
def web(early: Hello) -> Iterator[Web]:
    """The overlay on a web server that sends the hot part, and the rest when it is told to."""
    with serving(early.path.read_bytes()) as web:
        web.hold = hot_end(web.content) + (1 << 20)
        yield web


@dataclass
class Early:
    """A ``cloudlet run`` that has answered, while most of its pages have not come."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    """Its instance's folder."""
    record: Record

    def ended(self, *, within: float = ENDING_SECONDS) -> Finished:
        """What it said when it ended by itself."""
        out, err = self.process.communicate(timeout=within)
        return Finished(self.process.returncode, out, err)


@contextmanager
def started(
    cloudlet: CommandLine, where: str, *, quiet: bool = True, patience: str = LONG
) -> Iterator[Early]:
    """``cloudlet run`` until its first URL; when quiet it tells of an error and of nothing else."""
    options = ["-q"] if quiet else []
    process = cloudlet.start(*options, "run", where, "--start", "hot", "--patience", patience)
    try:
        url = first_line(process)
        (folder,) = [path for path in cloudlet.settings.instances_dir.iterdir() if path.name != ".lock"]
        record = read_record(folder)
        assert record
        assert record.pages
        yield Early(process, url, folder, record)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=DEADLINE)


def nothing_left(settings: Settings, record: Record | None = None) -> None:
    """Whatever was started is gone, also where the kernel would have to let go of it first."""
    assert traces(settings) == []
    for process in record.processes if record else ():
        assert process.wait(2.0), f"process {process.pid} does not end"
        assert not process.alive()


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
        return bytes(answer.read())


@contextmanager
def asking_for_what_has_not_come(early: Early) -> Iterator[list[bytes]]:
    """Somebody reads the file of which the guest has no page yet; what they got."""
    got: list[bytes] = []

    def read() -> None:
        with suppress(OSError, HTTPException):
            got.append(ask(f"{early.url}/cold"))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield got
    finally:
        thread.join(DEADLINE)
        assert not thread.is_alive()


@contextmanager
def waiting(cloudlet: CommandLine, web: Web, patience: str = LONG) -> Iterator[Early]:
    """``cloudlet run`` of a guest that waits for a page which the server does not send."""
    with started(cloudlet, f"{web.url}/whole", patience=patience) as early:
        web.hold_ranges = True
        with asking_for_what_has_not_come(early):
            _wait_until(early.folder, lambda paging: paging.waiting_since is not None)
            yield early


# ------ as it should be


def test_the_rest_comes_while_it_runs(web: Web, cloudlet: CommandLine) -> None:
    with started(cloudlet, f"{web.url}/whole", quiet=False) as early:
        machine = _listed(cloudlet)
        assert machine["state"] == "running"
        assert 0 < int(machine["arrived"].split()[0]) < 100
        assert ", longest " in machine["stalls"]
        web.hold_ranges = True
        with asking_for_what_has_not_come(early) as got:
            _wait_until(early.folder, lambda paging: paging.waiting_since is not None)
            assert _listed(cloudlet)["stalls"].endswith(", waits now")
            web.go.set()
        assert len(got[0]) == 4 << 20
        said = _said(early.process, "all ")
        assert [line.partition(" ")[0] for line in said] == ["early", "started", "all"]
        assert said[1].endswith("it was asked for\n")
        machine = _listed(cloudlet)
        assert machine["arrived"] == "100 %"
        assert int(machine["stalls"].partition(",")[0]) > 0
        assert cloudlet.end(early.process).status == 130


def test_a_second_start_is_from_the_image(
    early: Hello, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    web.rate = 4e6
    first = _run_json(cloudlet, f"{web.url}/whole", until_arrived=True, then=web.go.set)
    assert first["start"] == "hot"
    assert first["paging"]["received"] < first["paging"]["bytes"] == first["bytes"]
    (image,) = cloudlet("image", "list", "-f", "json").json  # type: ignore[misc]
    assert (image["app"], image["base"]) == ("early", early.base_id[:16])
    sent = web.sent
    second = _run_json(cloudlet, f"{web.url}/whole")
    assert (second["start"], second["paging"]) == ("image", None)
    assert web.sent - sent < len(web.content) // 2
    assert "arrived" not in second["seconds"]

    without = _run_json(cloudlet, f"{web.url}/whole", "--no-image")
    assert without["start"] == "hot"
    assert cloudlet("image", "delete", "early").status == 0
    assert cloudlet("image", "list", "-f", "json").json == []
    assert "image list" in refused(cloudlet("image", "delete", "early"), 3)
    none = _run_json(cloudlet, f"{web.url}/whole", until_arrived=True, OS_DEFAULT__IMAGE_CACHE_MIB="0")
    assert none["start"] == "hot"
    assert cloudlet("image", "list", "-f", "json").json == []
    nothing_left(settings)


def test_the_image_of_a_deleted_base_is_gone(early: Hello, cloudlet: CommandLine, settings: Settings) -> None:
    _run_json(cloudlet, early.path, "--start", "hot", until_arrived=True)
    assert len(cloudlet("image", "list", "-f", "json").json) == 1  # type: ignore[arg-type]
    assert cloudlet("base", "delete", early.base_id).status == 0
    assert cloudlet("image", "list", "-f", "json").json == []
    nothing_left(settings)


# ------ what goes wrong


def test_the_page_server_killed(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    with started(cloudlet, f"{web.url}/whole") as early:
        assert early.record.pages
        early.record.pages.kill()
        refused_after_start(early.ended(), 1)
        nothing_left(settings, early.record)


def test_the_page_server_killed_while_the_guest_waits(
    web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    with waiting(cloudlet, web) as early:
        assert early.record.pages
        early.record.pages.kill()
        refused_after_start(early.ended(), 1)
        nothing_left(settings, early.record)


def test_the_owner_killed_while_the_guest_waits(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    with waiting(cloudlet, web) as early:
        early.process.kill()
        early.process.communicate(timeout=DEADLINE)
        pages, machine, _ = early.record.processes
        assert pages.wait(ENDING_SECONDS), "the page server outlives who fills it"
        assert machine.wait(ENDING_SECONDS), "the machine outlives its pages"
        assert cloudlet("ps").status == 0
        nothing_left(settings, early.record)


def test_a_page_that_does_not_come(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    with waiting(cloudlet, web, PATIENCE) as early:
        refused_after_start(early.ended(within=float(PATIENCE) + ENDING_SECONDS), 1)
        nothing_left(settings, early.record)


def test_the_server_gone_for_good(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    with started(cloudlet, f"{web.url}/whole", patience=PATIENCE) as early:
        web.leave()
        assert web.left.wait(DEADLINE)
        line = refused_after_start(early.ended(within=float(PATIENCE) + ENDING_SECONDS), 1)
        assert "does not come" in line
        nothing_left(settings, early.record)


def test_the_server_gone_and_back(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    with started(cloudlet, f"{web.url}/whole") as early:
        web.leave()
        assert web.left.wait(DEADLINE)
        web.hold = None
        web.back.set()
        assert len(ask(f"{early.url}/cold")) == 4 << 20
        web.go.set()
        _wait_until(early.folder, lambda paging: paging.complete)
        assert cloudlet.end(early.process).status == 130
        nothing_left(settings, early.record)


@pytest.mark.parametrize(
    "waited_for", [False, True], ids=["a cold frame", "a frame that the guest waits for"]
)
def test_damage_behind_the_hot_part(
    waited_for: bool, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    with started(cloudlet, f"{web.url}/whole") as early:
        if waited_for:
            web.damaged = len(web.content) - (1 << 20)
            with asking_for_what_has_not_come(early) as got:
                refused_after_start(early.ended(), 7)
            assert got == []
        else:
            assert web.hold
            web.damaged = web.hold + (1 << 20)
            web.go.set()
            refused_after_start(early.ended(), 7)
        nothing_left(settings, early.record)
    assert list(settings.images_dir.glob("*/image.json")) == []


@pytest.mark.parametrize("damage", ["one byte short", "cut in the cold part", "goes on"])
def test_another_length_than_the_hot_part_says(
    damage: str, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    """The machine has begun to run, and may have answered, or have asked for what is not there."""
    whole = web.content
    web.content = {
        "one byte short": whole[:-1],
        "cut in the cold part": whole[: len(whole) - (1 << 20)],
        "goes on": whole + b"\0",
    }[damage]
    process = cloudlet.start("-q", "run", f"{web.url}/whole", "--start", "hot", "--patience", LONG)
    assert web.holding.wait(DEADLINE)
    web.go.set()
    out, err = process.communicate(timeout=DEADLINE)
    refused_after_start(Finished(process.returncode, out, err), 7)
    nothing_left(settings)
    assert list(settings.images_dir.glob("*/image.json")) == []


def test_damage_in_the_hot_part(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    """The machine has begun to run, and may have answered."""
    web.content = flipped(web.content, hot_end(web.content) - 10, 3)
    done = cloudlet("-q", "run", f"{web.url}/whole", "--start", "hot", timeout=DEADLINE)
    assert "digest" in refused_after_start(done, 7)
    nothing_left(settings)


@pytest.mark.parametrize(
    ("how", "status"),
    [("lying-range", 7), ("wrong-range", 1), ("short-range", 1), ("changed-ranges", 7), ("slow-ranges", 1)],
)
def test_a_server_that_gives_wrong_ranges(
    how: str, status: int, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    patience = PATIENCE if how == "slow-ranges" else LONG
    process = cloudlet.start("-q", "run", f"{web.url}/{how}", "--start", "hot", "--patience", patience)
    try:
        # It may need one before it answers.
        asking = threading.Thread(target=lambda: _ask_if_it_answers(process))
        asking.start()
        assert process.wait(DEADLINE) == status
        asking.join(DEADLINE)
        assert process.stderr
        refused_after_start(Finished(status, "", process.stderr.read()), status)
        nothing_left(settings)
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_takes_its_ranges_back(web: Web, cloudlet: CommandLine, settings: Settings) -> None:
    """It said that it has some, and answers with the whole: what the guest waits for comes in its turn."""

    def go_on_when_one_was_asked_for() -> None:
        if web.wait_single_range(DEADLINE):
            web.go.set()

    # A guest may ask for a page before it answers too; it must not wait for a stream that stands.
    going_on = threading.Thread(target=go_on_when_one_was_asked_for)
    going_on.start()
    with started(cloudlet, f"{web.url}/claimed-ranges") as early:
        assert len(ask(f"{early.url}/cold")) == 4 << 20
        _wait_until(early.folder, lambda paging: paging.complete)
        assert web.go.is_set(), "no range was asked for"
        assert cloudlet.end(early.process).status == 130
        nothing_left(settings, early.record)
    going_on.join()


def _ask_if_it_answers(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    if url := process.stdout.readline().strip():
        with suppress(OSError, HTTPException):
            ask(f"{url}/cold")


@pytest.mark.parametrize("small_place", ["300k", "4m", "6m"], indirect=True)
def test_no_room_for_what_comes(
    small_place: Path, early: Hello, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    settings.images_dir.symlink_to(small_place)
    web.hold = None
    process = cloudlet.start("-q", "run", f"{web.url}/whole", "--start", "hot", "--patience", LONG)
    _, err = process.communicate(timeout=DEADLINE)
    assert "--cache-dir" in refused_after_start(Finished(process.returncode, "", err), 6)
    nothing_left(settings)
    assert [path for path in small_place.iterdir() if path.name != ".lock"] == []


def test_told_to_end_at_any_moment(web: Web, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(5):
        web.go.clear()
        if rng.random() < 0.5:
            web.go.set()
            web.rate = rng.uniform(2e6, 8e6)
        run = ["run", f"{web.url}/whole", "--start", "hot", "--no-image"]
        done = told_to_end(cloudlet, run, RUN_SECONDS, rng)
        assert done.clean, done


def test_killed_at_any_moment(web: Web, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(4):
        delay = rng.uniform(0.4, RUN_SECONDS)
        left = killed(cloudlet, ["run", f"{web.url}/whole", "--start", "hot"], delay)
        assert left == [], f"killed after {delay:.3f} s"


# ------ where it cannot be


WITHOUT_FUSE = """
mount -t tmpfs dev "$0"
for node in null zero full random urandom; do
  touch "$0/$node"
  mount --bind "/dev/$node" "$0/$node"
done
mkdir "$0/shm" "$0/net"
touch "$0/net/tun"
mount --bind /dev/net/tun "$0/net/tun"
mount --rbind "$0" /dev
exec "$@"
"""
"""What a container has that was given a network and no FUSE, in a mount namespace of its own."""


READ_ONLY = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'


def test_where_no_image_can_be_built_it_starts_when_all_is_here(
    early: Hello, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    web.hold = None
    process = _inside(READ_ONLY, settings.cache_dir, cloudlet, "run", f"{web.url}/whole", "--start", "hot")
    try:
        assert len(ask(f"{first_line(process)}/cold")) == 4 << 20
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert "cannot be written" in err
    assert "--cache-dir" in err


def test_without_fuse_it_starts_when_all_is_here(
    early: Hello, web: Web, cloudlet: CommandLine, settings: Settings, tmp_path: Path
) -> None:
    web.hold = None
    process = _without_fuse(cloudlet, tmp_path, "run", f"{web.url}/whole", "--start", "hot")
    try:
        assert len(ask(f"{first_line(process)}/cold")) == 4 << 20
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    (line,) = [line for line in err.splitlines() if line.startswith("it could answer sooner: ")]
    assert "/dev/fuse is missing" in line
    nothing_left(settings)


@pytest.mark.slow
def test_without_fuse_an_overlay_is_made_and_says_so(
    early: Hello, cloudlet: CommandLine, settings: Settings, tmp_path: Path
) -> None:
    output = tmp_path / "late.overlay"
    create = ["overlay", "create", early.base_id, "--recipe", str(early.recipe), "-o", str(output)]
    process = _without_fuse(cloudlet, tmp_path, *create)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert "this overlay will not start early: /dev/fuse is missing" in err
    late = _run_json(cloudlet, output, "--rate", "40M")
    assert (late["start"], late["start_because"]) == ("full", "the overlay does not say what is needed first")

    again = str(tmp_path / "again.overlay")
    process = _without_fuse(cloudlet, tmp_path, "overlay", "reorder", str(output), "-o", again)
    out, err = process.communicate(timeout=DEADLINE)
    assert "modprobe fuse" in refused(Finished(process.returncode, out, err), 4)

    assert cloudlet("-q", "overlay", "reorder", output, "-o", again).status == 0
    assert _run_json(cloudlet, again, "--rate", "40M")["start"] == "hot"
    nothing_left(settings)


def _without_fuse(cloudlet: CommandLine, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    devices = folder / "dev"
    devices.mkdir(exist_ok=True)
    return _inside(WITHOUT_FUSE, devices, cloudlet, *arguments)


def _inside(script: str, folder: Path, cloudlet: CommandLine, *arguments: str) -> subprocess.Popen[str]:
    """Run in a mount namespace of its own, which the script makes with the folder as its ``$0``."""
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, str(folder)]
    return subprocess.Popen(
        [*inside, *cloudlet.argv(*arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cloudlet.environment,
    )


def refused_after_start(done: Finished, status: int) -> str:
    """The one line with which a machine that ran was ended."""
    assert done.status == status, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("cloudlet: ")
    assert line.endswith(")"), f"no advice in {line!r}"
    return line


def _listed(cloudlet: CommandLine) -> dict[str, str]:
    (machine,) = cloudlet("ps", "-f", "json").json  # type: ignore[misc]
    return dict(machine)


def _wait_until(folder: Path, met: Callable[[Paging], bool]) -> None:
    """Look at an instance's state file, of which nobody tells that it changed, until it says this."""
    deadline = time.monotonic() + DEADLINE
    while not ((paging := read_progress(folder)) and met(paging)):
        assert time.monotonic() < deadline, paging
        time.sleep(0.02)


def _said(process: subprocess.Popen[str], last: str) -> list[str]:
    """What a command says on standard error, up to the line that begins so."""
    lines: list[str] = []

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if line.startswith(last):
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert lines[-1:], "it said nothing"
    assert lines[-1].startswith(last), lines
    return lines


def _run_json(
    cloudlet: CommandLine,
    where: str | Path,
    *arguments: str,
    until_arrived: bool = False,
    then: Callable[[], None] = lambda: None,
    **environment: str,
) -> dict[str, Any]:
    process = cloudlet.start("run", where, "-f", "json", *arguments, **environment)
    try:
        document = json.loads(first_line(process))
        then()
        if until_arrived:
            _said(process, "all ")
        assert cloudlet.end(process).status == 130
        return dict(document)
    finally:
        process.kill()
        process.communicate()
