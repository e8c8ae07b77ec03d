"""The hand-off, shown: a user moves from one cloudlet to another, and the running instance follows.

Two cloudlets with the same base VM, a link of 100 Mbit/s between them, one stateful application, and one user
who asks it every 10 ms, and meanwhile has it change its memory. The instance goes to the far cloudlet, which
has nothing of the application, and the link is cut for a second on the way; then it comes back to the near
one, which has the application's overlay. Beside it, in the same run: QEMU's own live migration of the same
machine, with a copy of what it has changed on its disk.

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

from benchmarks.handoff_client import Using, using  # noqa: E402
from benchmarks.handoff_qemu import Migrated, migrate  # noqa: E402
from benchmarks.handoff_sites import (  # noqa: E402
    COUNT_PORT,
    HTTP_PORT,
    LOOK_AFTER,
    Load,
    ask,
    free_port,
    settle,
)
from demo import cloudlet, console, listed_one, make_base, make_overlay, step  # noqa: E402
from demo_link import Link, Place, link  # noqa: E402
from rich.table import Table  # noqa: E402

from cloudlet.control.site import Site  # noqa: E402
from cloudlet.errors import CloudletError  # noqa: E402
from cloudlet.keeper.handle import Keepers  # noqa: E402
from cloudlet.model import MEBIBYTE  # noqa: E402
from cloudlet.settings import Settings, load  # noqa: E402

RECIPE = ROOT / "benchmarks" / "guests" / "counter"
MBIT, BUSY_MIB = 100, 5
CUT_AFTER_BYTES, CUT_SECONDS = MEBIBYTE, 1.0
MIGRATION_SECONDS = 120.0
AWAY_SECONDS = 3.0
"""The user stays so long at the far cloudlet."""


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
            there, back, user = move(settings, folder, overlay, between)
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
    show(there, back, beside)
    if not user.kept_counting():
        console.print("[red]The application has counted something twice, or nothing at all.[/]")
        return 1
    console.print(
        f"The user was answered {len(user.answers)} times, by one count that went on: no number came twice; "
        f"{unheard(user)} were not heard, since a connection was cut in that moment."
    )
    return 0


@dataclass(frozen=True, slots=True)
class Leg:
    """One hand-off, as its user saw it."""

    statistics: dict[str, Any]
    carried_bytes: int
    began: float
    ended: float
    gap_seconds: float = 0.0


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

    def __call__(self, *arguments: str | Path) -> None:
        """Do what its operator, or a user, types."""
        step(self.command(*arguments))

    def shown(self, *arguments: str | Path) -> dict[str, Any]:
        return listed_one("--config-file", self.file, *arguments)


def move(settings: Settings, folder: Path, overlay: Path, between: Link) -> tuple[Leg, Leg, Using]:
    """There, with a cut on the way, and back, while somebody uses it."""
    with (
        served(settings, folder, "near", between.near) as near,
        served(settings, folder, "far", between.far) as far,
    ):
        for here, other in ((near, far), (far, near)):
            about = other.shown("site", "show")
            here("peer", "add", other.place.peers_url, "--name", other.name,
                 "--fingerprint", about["fingerprint"])  # fmt: skip
        near("app", "publish", overlay)
        count, control = free_port(), free_port()
        near("instance", "create", "counter", "--port", f"{count}:{COUNT_PORT}",
             "--port", f"{control}:{HTTP_PORT}")  # fmt: skip
        Load(BUSY_MIB).begin(f"http://{near.place.address}:{control}")
        held = ask(f"http://{near.place.address}:{control}/held")
        instance = near.shown("instance", "show", "counter")["id"]
        with using((near.place.address, count), (far.place.address, count)) as user:
            there = hand_off(near, far, "nothing", between, cut=True)
            time.sleep(AWAY_SECONDS)
            settle(far.settings, instance)
            back = hand_off(far, near, "overlay", between)
            time.sleep(LOOK_AFTER)
        if ask(f"http://{near.place.address}:{control}/held") != held:
            raise SystemExit("the application's memory is not what it was")
        near("instance", "delete", "counter")
    return seen(there, user), seen(back, user), user


def hand_off(here: Edge, there: Edge, holds: str, between: Link, *, cut: bool = False) -> Leg:
    """Hand the instance off; the link may be cut while it is copied."""
    before, began = between.carried(), time.monotonic()
    command = here.command("handoff", "create", "counter", there.name, "--overlay", holds, "-f", "json")
    console.print(f"[bold]$ cloudlet {' '.join(command[3:])}[/]")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        if cut:
            while between.carried() < before + CUT_AFTER_BYTES and process.poll() is None:
                time.sleep(0.02)
            console.print(f"  the link is cut for {CUT_SECONDS:.0f} s")
            between.cut(CUT_SECONDS)
        said = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Leg(json.loads(said)["statistics"], between.carried() - before, began, time.monotonic())


def seen(leg: Leg, user: Using) -> Leg:
    """A hand-off with what its user has seen of it."""
    return replace(leg, gap_seconds=user.gap(leg.began, leg.ended + LOOK_AFTER / 2))


def unheard(user: Using) -> int:
    """How many answers were lost on their way."""
    numbers = [answer.number for answer in user.answers]
    return max(numbers) - min(numbers) + 1 - len(numbers)


def show(there: Leg, back: Leg, beside: Migrated | None) -> None:
    """The table."""
    table = Table(
        title=f"a running instance over {MBIT} Mbit/s, {BUSY_MIB} MiB changed per second",
        title_justify="left",
    )
    table.add_column("")
    for head in (
        "there: base only,\nlink cut for 1 s",
        "back: the app's\noverlay is known",
        "QEMU: migration\nand disk copy",
    ):
        table.add_column(head, justify="right")
    legs = (there, back)
    missing = "not in time"
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
    console.print(f"[bold]$ {' '.join([*place.prefix, 'cloudlet', *edge.command('serve')[3:]])} &[/]")
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
