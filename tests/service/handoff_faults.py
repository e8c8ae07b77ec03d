"""The fault matrix of the hand-off, with real sites, keepers and guests: what fails at which step.

A gate between two sites (``handoff_world.py``) holds what would bring a hand-off from one step to the next,
as the records of both keepers say (``handoff.json``). Then something fails, the gate opens, and all that was
killed or cut comes back. In the end both sites have to say the same, and who watched the guests meanwhile
(``watching.py``) has to have seen no two of them run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.control.ownership import Ownership, Record, read_record
from cloudlet.errors import CloudletError
from cloudlet.hypervisor.records import records
from cloudlet.keeper.folder import ORDER, is_kept
from cloudlet.store.keyring import KeyRing
from cloudlet.store.tokens import PeerTokens
from cloudlet.transfer.peer import PeerConnection, PeerError
from tests.service.gate import Passing
from tests.service.handoff_world import SETTLED_SECONDS, SOON, World, clock_of, free, wait_for
from tests.service.two_sites import PeerSite
from tests.service.watching import Guest

Ends = tuple[str | None, str | None]
"""What the source and the target say of a hand-off."""
AWAY = 1.5
"""Seconds for which something is cut, killed, or full."""
_MOST_HANDSHAKE = 400
"""Bytes of a piece that is no message: the end of a handshake."""
_CLOCK_SECONDS = 300
_GIVES_UP = 12.0
"""Seconds after which who waits may give up: a site takes so long to start on a machine that is busy."""


@dataclass
class View:
    """What the folders of both keepers say of a hand-off."""

    source: Path
    """The keeper's folder there."""
    target: Path
    handoff: str = ""
    copied: int = 0
    """Bytes that have gone up since it copies."""
    most_copied: int = 0
    """At how many of them it is held."""

    @property
    def departure(self) -> Ownership | None:
        return self._state(self.source)

    @property
    def arrival(self) -> Ownership | None:
        return self._state(self.target)

    @property
    def prepares(self) -> bool:
        """Whether the target makes a place for it."""
        with suppress(OSError, ValueError):
            order = json.loads((self.target / ORDER).read_text())
            return bool((order["arrival"] or {}).get("handoff") == self.handoff)
        return False

    def _state(self, folder: Path) -> Ownership | None:
        with suppress(CloudletError, OSError):
            record: Record | None = read_record(folder)
            if record and record.handoff == self.handoff:
                return record.state
        return None


@dataclass(frozen=True)
class Step:
    """A step of the protocol, and how it is held."""

    name: str
    held: Callable[[View, Passing], bool]
    """What does not pass the target's gate."""
    reached: Callable[[View], bool]
    waits: bool = True
    """Whether something waits in the gate when it is reached."""


def _is_message(passing: Passing) -> bool:
    return passing.way == "up" and passing.before > 0 and passing.size > _MOST_HANDSHAKE


def _copies(view: View, passing: Passing) -> bool:
    if passing.way != "up" or view.departure is not Ownership.COPYING:
        return False
    if view.copied + passing.size > view.most_copied:
        return True
    view.copied += passing.size
    return False


STEPS = (
    Step("offer", lambda _, piece: _is_message(piece), lambda view: True),
    Step(
        "preparing",
        lambda view, piece: piece.way == "down" and view.prepares and not view.departure,
        lambda view: view.prepares,
        waits=False,
    ),
    Step("copying", _copies, lambda view: view.departure is Ownership.COPYING),
    Step(
        "switching",
        lambda view, piece: piece.way == "up" and view.departure is Ownership.SWITCHING,
        lambda view: view.departure is Ownership.SWITCHING,
    ),
    Step(
        "loaded",
        lambda view, piece: piece.way == "down" and view.arrival is Ownership.LOADED,
        lambda view: view.arrival is Ownership.LOADED,
    ),
    Step(
        "committed",
        lambda view, piece: _is_message(piece) and view.departure is Ownership.COMMITTED,
        lambda view: view.departure is Ownership.COMMITTED,
    ),
    Step(
        "running",
        lambda view, piece: piece.way == "down" and view.arrival is Ownership.RUNNING,
        lambda view: view.arrival is Ownership.RUNNING,
    ),
    Step("grace", lambda *_: False, lambda view: view.departure is Ownership.COMPLETED, waits=False),
)
NAMES = tuple(step.name for step in STEPS)


class Cell:
    """One hand-off, in which one thing fails at one step."""

    terms: ClassVar[Mapping[str, Any]] = {}
    """How it is asked for."""
    ends: ClassVar[frozenset[Ends]] = frozenset(
        {("completed", "completed"), ("reverted", "reverted"), ("reverted", None)}
    )
    """What both sites may say in the end."""
    gone: ClassVar[tuple[str, ...]] = ("moved",)
    """What the target may say of an instance that is not there in the end."""

    def __init__(self, here: World, step: Step, source: int, dice: random.Random) -> None:
        self.world = here
        self.step = step
        self.dice = dice
        self.source, self.target = here.sites[source], here.sites[1 - source]
        self.source_id, self.target_id = here.ids[source], here.ids[1 - source]
        self.towards, self.back = here.gates[1 - source], here.gates[source]
        """The gates before the target and before the source."""
        self.which = source
        self.problems: list[str] = []
        instance = here.bring_to(source)
        self.instance_id = str(instance["id"])
        self.folders = [site.keepers_dir / self.instance_id for site in here.machines]
        """Of the keepers."""
        self.view = View(self.folders[source], self.folders[1 - source])
        self.view.most_copied = dice.randrange(2_000, 500_000)

    def hold(self) -> dict[str, Any]:
        """Begin, and come to where the step is held; the operation."""
        view, step, gate = self.view, self.step, self.towards
        gate.holds = lambda piece: not view.handoff or step.held(view, piece)
        wanted = {"instance_id": self.instance_id, "peer_id": self.source.peer_id, **self.terms}
        operation: dict[str, Any] = self.source.call.post("/v1/handoffs", {"handoff": wanted})["operation"]
        view.handoff = operation["resources"]["handoff"]

        def there() -> bool:
            return step.reached(view) and (not step.waits or gate.held > 0)

        wait_for(there, SOON, f"{step.name} is not reached")
        return operation

    def resolve(self, said: Mapping[str, Any]) -> None:
        """Give an operator's word, where what the sites say asks for one."""

    def say(self, problem: str) -> None:
        self.problems.append(problem)

    def guest(self, which: int) -> Guest:
        """The guest at a site, which may be about to begin."""
        wait_for(lambda: bool(self.world.guests(which)), SOON, "there is no guest to be killed")
        return self.world.guests(which)[0]

    def keeper(self, which: int) -> int:
        """The process that keeps the instance at a site."""
        folder = self.folders[which]
        wait_for(lambda: is_kept(folder), SOON, "there is no keeper to be killed")
        return keeper_of(folder)

    def ask(
        self, issuer: str, key: Ed25519PrivateKey, method: str, path: str, **more: Any
    ) -> tuple[int, Any]:
        """What the target answers somebody who has the key and says to be the issuer."""
        tokens, audience = PeerTokens(issuer, key), self.target_id

        def make(method: str, path: str, ahead: float) -> str:
            return tokens.make(method, path, audience, offset_seconds=ahead)

        with PeerConnection(self.target_url, self.target_key, make) as line:
            try:
                answer = line.request(method, path, timeout=20, **more)
            except PeerError as error:
                return error.status, None
        return answer.status, answer.json

    @property
    def source_key(self) -> Ed25519PrivateKey:
        return KeyRing(self.world.machines[self.which].keys_dir).signer().private

    @property
    def target_key(self) -> bytes:
        return KeyRing(self.world.machines[1 - self.which].keys_dir).signer().public_raw

    @property
    def target_url(self) -> str:
        """Past the gate."""
        return "https://{}:{}".format(*self.towards.target)


Act = Callable[[Cell], None]


@dataclass(frozen=True)
class Fault:
    """Something that fails."""

    name: str
    do: Act
    """While the step is held."""
    then: Act = lambda cell: None
    """When it is held no more: what brings back what is away."""
    kills: str = ""
    """Whose copy ends by it: the source's or the target's."""
    only: tuple[str, ...] = NAMES
    reverts: bool = False
    """Whether the hand-off may come to nothing by it."""


def _nothing(_: Cell) -> None:
    pass


def _cut(cell: Cell) -> None:
    for gate in (cell.towards, cell.back):
        gate.cut()
    time.sleep(AWAY)


def _mend(cell: Cell) -> None:
    for gate in (cell.towards, cell.back):
        gate.mend()


def _stall(cell: Cell) -> None:
    cell.back.holds = lambda _: True
    time.sleep(2 * AWAY)
    cell.back.open()


def _kill_sites(*ends: str) -> Act:
    def kill(cell: Cell) -> None:
        for end in ends:
            site: PeerSite = getattr(cell, end)
            site.end(signal.SIGKILL)

    return kill


def _start_sites(cell: Cell) -> None:
    time.sleep(AWAY / 2)
    for site in (cell.source, cell.target):
        if site.process.poll() is not None:
            with clock_of(site.folder):
                site.start()


def _kill_guest(end: str) -> Act:
    def kill(cell: Cell) -> None:
        which = cell.which if end == "source" else 1 - cell.which
        os.kill(cell.guest(which).pid, signal.SIGKILL)

    return kill


def _kill_keeper(end: str) -> Act:
    def kill(cell: Cell) -> None:
        which = cell.which if end == "source" else 1 - cell.which
        os.kill(cell.keeper(which), signal.SIGKILL)

    return kill


def _fill(end: str) -> Act:
    def fill(cell: Cell) -> None:
        site: PeerSite = getattr(cell, end)
        with suppress(OSError), (site.folder / "state" / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass

    return fill


def _make_room(cell: Cell) -> None:
    time.sleep(AWAY)
    free(cell.source)
    free(cell.target)


def _flip(cell: Cell) -> None:
    cell.towards.flips = "down" if cell.towards.held and cell.step.name in ("loaded", "running") else "up"


def _unflip(cell: Cell) -> None:
    cell.towards.flips = ""


def _path(cell: Cell, more: str = "") -> str:
    return f"/v1/peer/handoffs/{cell.view.handoff}{more}"


def _damaged_records(cell: Cell) -> None:
    """Behind the encryption, by who has the source's own key."""
    _, said = cell.ask(cell.source_id, cell.source_key, "GET", _path(cell))
    first = said["handoff"]["records"]
    noise = cell.dice.randbytes(300)
    for body in (
        bytes([1, 0, 0, 0]) + (300).to_bytes(4, "little") + noise,
        bytes([2, 0, 0, 0]) + (12).to_bytes(4, "little") + b"\x07" + noise[:11],
        bytes([9, 0, 0, 0]) + (300).to_bytes(4, "little") + noise,
        noise,
        bytes([1, 0, 0, 0]) + (0xFFFFFFFF).to_bytes(4, "little") + noise,
        bytes([5, 0, 0, 0]) + (64).to_bytes(4, "little") + noise[:64],
    ):
        status, _ = cell.ask(
            cell.source_id, cell.source_key, "PUT", _path(cell, "/records"), query={"first": first},
            body=body, headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        if status != 422:
            cell.say(f"damaged records are answered with {status}")


def _all_messages(cell: Cell, issuer: str, key: Ed25519PrivateKey, expected: int) -> None:
    octets = {"Content-Type": "application/octet-stream"}
    for method, path, more in (
        ("POST", _path(cell, "/commit"), {"json": {"epoch": 1}}),
        ("DELETE", _path(cell), {}),
        ("GET", _path(cell), {}),
        (
            "PUT",
            _path(cell, "/records"),
            {"query": {"first": 0}, "body": cell.dice.randbytes(99), "headers": octets},
        ),
    ):
        status, _ = cell.ask(issuer, key, method, path, **more)
        if status != expected:
            cell.say(f"{method} {path} of another is answered with {status}")


def _forge(cell: Cell) -> None:
    """Who says to be the source has another key."""
    _all_messages(cell, cell.source_id, Ed25519PrivateKey.generate(), 401)


def _meddle(cell: Cell) -> None:
    """Another peer, with its own good key."""
    ((issuer, keys),) = cell.world.stranger.items()
    _all_messages(cell, issuer, KeyRing(keys).signer().private, 404)


def _replay_bytes(cell: Cell) -> None:
    """What was overheard, on new connections."""
    for heard in (*cell.towards.heard, *cell.back.heard):
        with socket.create_connection(cell.towards.target, timeout=5) as line, suppress(OSError):
            line.sendall(heard)
            line.shutdown(socket.SHUT_WR)
            while line.recv(1 << 16):
                pass


def _replay_messages(cell: Cell) -> None:
    """A token again; the messages of an earlier hand-off of the same instance again."""
    token = PeerTokens(cell.source_id, cell.source_key).make("GET", _path(cell), cell.target_id)
    statuses = []
    with PeerConnection(cell.target_url, cell.target_key, lambda *_: token) as connection:
        for _ in range(2):
            try:
                statuses.append(connection.request("GET", _path(cell), timeout=20).status)
            except PeerError as error:
                statuses.append(error.status)
    if statuses[0] == 401 or statuses[1] != 401:
        cell.say(f"a token that comes twice is answered with {statuses}")
    for earlier in _earlier(cell):
        status, said = cell.ask(
            cell.source_id, cell.source_key, "POST", f"/v1/peer/handoffs/{earlier['id']}/commit",
            json={"epoch": earlier["epoch"]},
        )  # fmt: skip
        if status != 200 or said["handoff"]["state"] not in ("running", "dropped", "lost"):
            cell.say(f"COMMIT of an earlier hand-off is answered with {status}: {said}")
        for handoff, expected in ((earlier["id"], (202,)), (str(uuid.uuid4()), (409,))):
            offer = {**earlier["offer"], "id": handoff}
            status, _ = cell.ask(
                cell.source_id, cell.source_key, "POST", "/v1/peer/handoffs", json={"handoff": offer}
            )
            if status not in expected:
                cell.say(f"an OFFER of an earlier epoch is answered with {status}")


def _earlier(cell: Cell) -> list[dict[str, Any]]:
    """What the source has offered the target before, of the same instance in an earlier epoch."""
    query = (
        'select id, epoch, "order" from handoffs '
        "where direction = 'in' and instance_id = ? and epoch < ? order by epoch desc limit 1"
    )
    now = cell.source.call.instance(cell.instance_id)["epoch"]
    database = sqlite3.connect(cell.target.folder / "state" / "site.sqlite", timeout=20)
    try:
        rows = database.execute(query, (cell.instance_id, now)).fetchall()
    finally:
        database.close()
    found = []
    for handoff, epoch, text in rows:
        order = json.loads(text)
        wanted = order["instance"]
        wanted["lease"] = {name: value for name, value in wanted["lease"].items() if value is not None}
        offer = {"seed": order["seed"], "needs": order["needs"], "instance": wanted}
        found.append({"id": handoff, "epoch": epoch, "offer": offer})
    return found


def _set_clock(end: str, seconds: int) -> Act:
    def shift(cell: Cell) -> None:
        site: PeerSite = getattr(cell, end)
        (site.folder / "clock").write_text(str(seconds))

    return shift


_LATER = NAMES[NAMES.index("preparing") :]
_SENDING = ("copying", "switching")
FAULTS = (
    Fault("nothing", _nothing),
    Fault("cut", _cut, _mend),
    Fault("stall", _stall),
    Fault("kill source", _kill_sites("source"), _start_sites),
    Fault("kill target", _kill_sites("target"), _start_sites),
    Fault("kill both", _kill_sites("source", "target"), _start_sites),
    Fault("kill source QEMU", _kill_guest("source"), kills="source", only=NAMES[:-1]),
    Fault("kill target QEMU", _kill_guest("target"), kills="target", only=_LATER),
    Fault("kill source keeper", _kill_keeper("source"), kills="source"),
    Fault("kill target keeper", _kill_keeper("target"), kills="target", only=_LATER),
    Fault("disk full at source", _fill("source"), _make_room, reverts=True),
    Fault("disk full at target", _fill("target"), _make_room, reverts=True),
    Fault("corrupt byte", _flip, _unflip),
    Fault("corrupt records", _damaged_records, only=_SENDING, reverts=True),
    Fault("forged peer", _forge),
    Fault("another peer", _meddle),
    Fault("replayed bytes", _replay_bytes),
    Fault("replayed messages", _replay_messages),
    Fault("source's clock ahead", _set_clock("source", _CLOCK_SECONDS)),
    Fault("target's clock ahead", _set_clock("target", _CLOCK_SECONDS)),
)
CELLS = tuple((step, fault) for step in STEPS for fault in FAULTS if step.name in fault.only)
"""The matrix."""

Outcome = tuple[str, bool]
"""What the source says of the hand-off, and whether the instance lives."""


def allowed(step: Step, fault: Fault, away: float) -> set[Outcome]:
    """What may become of it.

    :param away: seconds for which something was away; who waits for too long may give up.
    """
    at, switch = NAMES.index(step.name), NAMES.index("switching")
    if fault.kills == "source":
        if at < switch:
            return {("reverted", False)}
        return {("completed", True)} | ({("reverted", False)} if at == switch else set())
    if fault.kills == "target":
        return {("reverted", True)} if at < NAMES.index("running") else {("completed", False)}
    return {("completed", True)} | ({("reverted", True)} if fault.reverts or away > _GIVES_UP else set())


def run_cell(here: World, step: Step, fault: Fault, source: int, dice: random.Random) -> list[str]:
    """Have a thing fail at a step of a hand-off from a site; what is not as it has to be."""
    return play(Cell(here, step, source, dice), fault, allowed)


def play(cell: Cell, fault: Fault, may_become: Callable[[Step, Fault, float], set[Outcome]]) -> list[str]:
    """Have a thing fail; what is not as it has to be."""
    here = cell.world
    looks = here.observer.looks
    try:
        operation = cell.hold()
        began = time.monotonic()
        fault.do(cell)
        cell.towards.open()
        fault.then(cell)
        away = time.monotonic() - began
        outcome = _settled(cell, operation)
    finally:
        _all_is_well(cell)
    if outcome not in may_become(cell.step, fault, away):
        cell.say(f"it is {outcome[0]}, and the instance {'lives' if outcome[1] else 'has failed'}")
    _check(cell, outcome)
    if here.observer.ran_twice:
        cell.say("two copies ran at the same moment")
    if here.observer.looks < looks + 50:
        cell.say("nobody has watched")
    return cell.problems + here.user.problems


def _all_is_well(cell: Cell) -> None:
    """Whatever failed, fails no more."""
    cell.towards.open()
    cell.back.open()
    _mend(cell)
    _unflip(cell)
    for site in (cell.source, cell.target):
        free(site)
        (site.folder / "clock").unlink(missing_ok=True)


def _settled(cell: Cell, operation: Mapping[str, Any]) -> Outcome:
    """What both sites say in the end; the same."""
    found: dict[str, Any] = {}

    def settled() -> bool:
        found.update(_said(cell, operation))
        cell.resolve(found)
        ends = found["departure"], found["arrival"]
        lives = found["at source"] if ends[0] == "reverted" else found["at target"]
        return (
            found["operation"] in ("succeeded", "failed")
            and ends in cell.ends
            and lives in ("active", "failed")
        )

    wait_for(settled, SETTLED_SECONDS, "it does not settle", found)
    reverted = found["departure"] == "reverted"
    time.sleep(0.1)  # an instance whose machine has ended says so a moment later
    found.update(_said(cell, operation))
    return found["departure"], found["at source" if reverted else "at target"] == "active"


def _said(cell: Cell, operation: Mapping[str, Any]) -> dict[str, Any]:
    """What the sites say now."""
    handoff, instance = f"/v1/handoffs/{cell.view.handoff}", f"/v1/instances/{cell.instance_id}"

    def state(site: PeerSite, path: str, noun: str) -> str | None:
        answer = site.call("GET", path)
        return str(answer.json()[noun]["state"]) if answer.status_code == 200 else None

    return {
        "operation": state(cell.source, f"/v1/operations/{operation['id']}", "operation"),
        "departure": state(cell.source, handoff, "handoff"),
        "arrival": state(cell.target, handoff, "handoff"),
        "at source": state(cell.source, instance, "instance"),
        "at target": state(cell.target, instance, "instance"),
    }


def _check(cell: Cell, outcome: Outcome) -> None:
    """That there is what they say, and nothing else."""
    here, (state, lives) = cell.world, outcome
    at = cell.which if state == "reverted" else 1 - cell.which
    here.at = at
    wait_for(lambda: len(here.guests()) == int(lives), SOON, "guests", here.guests)
    if lives:
        (guest,) = here.guests(at)
        wait_for(guest.runs, SOON, "the guest does not run")
        if not here.user.counts_on(guest):
            cell.say("the guest does not count on")
        cell.problems += here.user.verify(guest)
        here.instance = here.sites[at].call.instance(cell.instance_id)
    other = here.sites[1 - at]
    known = other.call("GET", f"/v1/instances/{cell.instance_id}")
    there = known.json()["instance"]["state"] if known.status_code == 200 else "moved"
    if there not in (cell.gone if other is cell.target else ("moved",)):
        cell.say(f"at the other site the instance is {there}")
    folder = cell.folders[1 - at]
    if there != "failed":  # what is known of its end is kept there, until it is deleted
        wait_for(lambda: not folder.exists(), SOON, f"{folder} is left")
    if left := [path.name for path, _ in records(here.machines[1 - at].instances_dir)]:
        cell.say(f"machines {left} are left")
    if not lives:
        here.lost()


def keeper_of(folder: Path) -> int:
    """The process that holds the lock of a keeper's folder, as the kernel says."""
    found = (folder / "lock").stat()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, mode, pid, place, *_ = line.split()
        if (kind, mode, place) == ("FLOCK", "WRITE", device):
            return int(pid)
    raise AssertionError(f"nobody keeps {folder}")
