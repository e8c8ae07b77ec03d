"""The hand-off, shown: a user moves from one cloudlet to another, and the running instance follows.

Two cloudlets with the same base VM, a link of 100 Mbit/s between them, one stateful application, and one user
who asks it every 10 ms, and has it change its memory meanwhile. First the far cloudlet has nothing of the
application, and the link is cut for a second on the way. Then the far one has the application's overlay, too.
Beside it, in the same run: QEMU's own live migration of the same machine, with a copy of what it has changed
on its disk.

Builds the base VM and the application's overlay, once. Files: both in the cache folder, keys in the
configuration folder. Nothing runs at the end.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.handoff_client import using  # noqa: E402
from benchmarks.handoff_qemu import Migrated, migrate  # noqa: E402
from benchmarks.handoff_sites import (  # noqa: E402
    COUNT_PORT,
    HTTP_PORT,
    LOOK_AFTER,
    Load,
    ask,
    free_port,
)
from demo import cloudlet, console, make_base, make_overlay  # noqa: E402
from demo_link import Link, Place, link  # noqa: E402
from rich.table import Table  # noqa: E402

from cloudlet.control.site import Site  # noqa: E402
from cloudlet.errors import CloudletError, FailedError  # noqa: E402
from cloudlet.keeper.handle import Keepers  # noqa: E402
from cloudlet.model import MEBIBYTE  # noqa: E402
from cloudlet.settings import Settings, load  # noqa: E402

RECIPE = ROOT / "benchmarks" / "guests" / "counter"
MBIT, BUSY_MIB = 100, 5
CUT_AFTER_BYTES, CUT_SECONDS = MEBIBYTE, 1.0
MIGRATION_SECONDS = 120.0


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupted)
    settings = load()
    overlay = settings.cache_dir / "counter.overlay"
    folder = settings.state_dir / "demo-handoff"
    try:
        make_base()
        make_overlay(overlay, RECIPE, "--no-profile")
        with emptied(folder), link(MBIT) as between:
            console.print(f"The link: {between.what}.")
            bare, known = move(settings, folder, overlay, between)
            console.print("QEMU's own live migration of the same machine takes its time ...")
            site = Site.open(replace(settings, state_dir=folder / "qemu"))
            beside = migrate(site, overlay, folder, MBIT, Load(BUSY_MIB), MIGRATION_SECONDS)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]{' '.join(map(str, error.cmd))} ended with status {error.returncode}[/]")
        return error.returncode
    except CloudletError as error:
        console.print(f"[red]{error.message}[/]")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("Ended; nothing is left.")
        return 130
    show(bare, known, beside)
    return 0


@dataclass(frozen=True, slots=True)
class Leg:
    """One hand-off, as its user saw it."""

    statistics: dict[str, Any]
    carried_bytes: int
    began: float
    ended: float
    gap_seconds: float = 0.0
    answers: int = 0
    unheard: int = 0
    """Answers that were lost on their way, with the connection that is cut."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A cloudlet of the demo."""

    name: str
    file: Path
    """Its settings."""
    settings: Settings
    place: Place

    def command(self, *arguments: str | Path) -> list[str]:
        return cloudlet("--config-file", self.file, *arguments)

    def say(self, *arguments: str | Path, after: str = "") -> None:
        """Show what is typed here."""
        words = " ".join(map(str, arguments))
        console.print(f"[bold]{self.name}$ cloudlet {words}{after}[/]", soft_wrap=True)

    def __call__(self, *arguments: str | Path) -> dict[str, Any]:
        """Do what its operator, or a user, types; what is answered."""
        self.say(*arguments)
        answer = subprocess.run(
            self.command(*arguments, "-f", "json"), check=True, stdout=subprocess.PIPE
        ).stdout
        row: dict[str, Any] = json.loads(answer)
        return row


def move(settings: Settings, folder: Path, overlay: Path, between: Link) -> tuple[Leg, Leg]:
    """Twice from the near to the far cloudlet: with a cut, and with the overlay there."""
    with (
        served(settings, folder, "near", between.near) as near,
        served(settings, folder, "far", between.far) as far,
    ):
        for here, other in ((near, far), (far, near)):
            fingerprint = other("site", "show")["fingerprint"]
            here("peer", "add", other.place.peers_url, "--name", other.name, "--fingerprint", fingerprint)
        near("app", "publish", overlay)
        bare = journey(near, far, between, "nothing", cut=True)
        far("app", "publish", overlay)
        return bare, journey(near, far, between, "overlay")


def journey(near: Edge, far: Edge, between: Link, holds: str, *, cut: bool = False) -> Leg:
    """An instance at the near cloudlet, used from there to the far one, and ended."""
    count, control = free_port(), free_port()
    ports = ("--port", f"{count}:{COUNT_PORT}", "--port", f"{control}:{HTTP_PORT}")
    near("instance", "create", "counter", *ports)
    Load(BUSY_MIB).begin(f"http://{near.place.address}:{control}")
    held = ask(f"http://{near.place.address}:{control}/held")
    with using((near.place.address, count), (far.place.address, count)) as user:
        leg = hand_off(near, far, holds, between, cut=cut)
        time.sleep(LOOK_AFTER)
    if ask(f"http://{far.place.address}:{control}/held") != held:
        raise FailedError("the application's memory is not what it was")
    if not user.kept_counting():
        raise FailedError("the application has counted something twice, or nothing")
    for edge in (far, near):
        edge.say("instance", "delete", "counter")
        subprocess.run(edge.command("instance", "delete", "counter"), check=True)
    numbers = [answer.number for answer in user.answers]
    return replace(
        leg,
        gap_seconds=user.gap(leg.began, leg.ended + LOOK_AFTER / 2),
        answers=len(numbers),
        unheard=max(numbers) - min(numbers) + 1 - len(numbers),
    )


def hand_off(near: Edge, far: Edge, holds: str, between: Link, *, cut: bool = False) -> Leg:
    """Hand the instance off; the link may be cut while it is copied."""
    before, began = between.carried(), time.monotonic()
    words = ("handoff", "create", "counter", far.name, "--overlay", holds)
    near.say(*words)
    with subprocess.Popen(near.command(*words, "-f", "json"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        if cut:
            while between.carried() < before + CUT_AFTER_BYTES and process.poll() is None:
                time.sleep(0.02)
            console.print(f"  the link is cut for {CUT_SECONDS:.0f} s")
            between.cut(CUT_SECONDS)
        said = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, near.command(*words))
    return Leg(json.loads(said)["statistics"], between.carried() - before, began, time.monotonic())


def show(bare: Leg, known: Leg, beside: Migrated | None) -> None:
    """The table."""
    table = Table(
        title=f"a running instance over {MBIT} Mbit/s, {BUSY_MIB} MiB changed per second",
        title_justify="left",
    )
    table.add_column("")
    for head in (
        "target has the base,\nlink cut for 1 s",
        "target has the\napp's overlay too",
        "QEMU: migration\nand disk copy",
    ):
        table.add_column(head, justify="right")
    legs = (bare, known)
    missing = f"not in {MIGRATION_SECONDS:.0f} s"
    table.add_row(
        "over the link, MiB", *(f"{leg.carried_bytes / MEBIBYTE:.1f}" for leg in legs),
        f"{beside.carried_bytes / MEBIBYTE:.1f}" if beside else missing,
    )  # fmt: skip
    table.add_row(
        "seconds", *(f"{leg.statistics['seconds']:.2f}" for leg in legs),
        f"{beside.seconds:.2f}" if beside else missing,
    )  # fmt: skip
    table.add_row("rounds", *(str(leg.statistics["rounds"]) for leg in legs), "")
    table.add_row("stood still, ms", *(f"{leg.statistics['pause_seconds'] * 1000:.0f}" for leg in legs), "")
    alive = beside is not None and beside.alive
    table.add_row(
        "longest gap in the user's answers, ms", *(f"{leg.gap_seconds * 1000:.0f}" for leg in legs),
        f"{beside.gap_seconds * 1000:.0f}" if beside and alive else missing if beside is None else "for ever",
    )  # fmt: skip
    table.add_row(
        "pages of memory that differ",
        "0 (proven)",
        "0 (proven)",
        str(beside.differing_pages) if beside else "",
    )
    console.print(table)
    console.print(
        f"The user was answered {sum(leg.answers for leg in legs)} times, by a count that went on: no number "
        f"came twice, and {sum(leg.unheard for leg in legs)} were not heard, their connection being cut then."
    )
    if beside and not alive:
        console.print("QEMU's guest was dead then: under TCG, QEMU 7.2 loses pages of a busy guest.")


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """A folder of the demo's own: empty now, and gone afterwards; what runs of it is ended both times."""
    _remove(folder)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        _remove(folder)


@contextmanager
def served(settings: Settings, folder: Path, name: str, place: Place) -> Iterator[Edge]:
    """A cloudlet with this machine's bases and a key of its own, that trusts this machine's publishers."""
    own = folder / name
    (own / "cache").mkdir(parents=True)
    (own / "cache" / "bases").symlink_to(settings.bases_dir)
    trusted = own / "keys" / "trusted"
    trusted.mkdir(parents=True)
    for key in (settings.keys_dir / "trusted").glob("*.pub"):
        shutil.copy(key, trusted / f"publisher-{key.name}")
    edge = Edge(name, own / "cloudlet.conf", _settings_of(settings, own), place)
    edge.file.write_text(
        f"[DEFAULT]\ncache_dir = {own / 'cache'}\nstate_dir = {own}\nkeys_dir = {own / 'keys'}\n"
        f"accelerator = {settings.accelerator}\nqemu_binary = {settings.qemu_binary}\n"
        f"[api]\npublish_address = {place.address}\n"
        f"[peers]\nlisten = {place.peers_listen}\nurl = {place.peers_url}\n"
    )
    command = [*place.prefix, *edge.command("serve")]
    edge.say("serve", after=" &")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if "serving at" in line:
                break
        else:
            raise subprocess.CalledProcessError(process.wait(), command)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield edge
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _settings_of(settings: Settings, own: Path) -> Settings:
    return replace(settings, cache_dir=own / "cache", state_dir=own, keys_dir=own / "keys")


def _remove(folder: Path) -> None:
    """End what runs of the demo's cloudlets, and remove their files."""
    for file in folder.glob("*/cloudlet.conf"):
        settings = _settings_of(load(), file.parent)
        keepers = Keepers(settings, lambda *_: None)
        try:
            for path in settings.keepers_dir.glob("*"):
                keepers.end(path.name)
        finally:
            keepers.close()
    shutil.rmtree(folder, ignore_errors=True)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
