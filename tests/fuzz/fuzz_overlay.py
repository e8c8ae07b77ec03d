"""Throws damaged and forged overlays at the readers: each must be refused cleanly or applied rightly.

    python tests/fuzz/fuzz_overlay.py --runs 100000 [--seed 1]

An input is a short program of bytes that picks a sound overlay and damages it: anywhere in the file,
or inside a frame or the root with all digests and sums made right again, so that the checks behind
them are reached too. What ``apply`` says of it, an ``Arrival`` must say that gets the same parts, in file
order and in a random one. With atheris (``pip install atheris``) the programs are guided by coverage,
without it they are random and the address space is limited. A failure prints its program;
``--program HEX`` runs it again.
"""

from __future__ import annotations

import argparse
import copy
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

try:
    import atheris
except ImportError:
    atheris = None  # type: ignore[assignment]

if atheris is not None:
    with atheris.instrument_imports(include=["cloudlet.overlay"]):
        import cloudlet.overlay.apply
        import cloudlet.overlay.arrival  # noqa: F401

import numpy as np
from tests.unit.overlay.forge import Forged
from tests.unit.overlay.guest import Guest, guest_of
from tests.unit.overlay.world import Rebuilt, World, near, noise, page, unsigned

from cloudlet.errors import IntegrityError
from cloudlet.overlay.apply import apply, verify_only
from cloudlet.overlay.pages import Space

ROOM_BYTES = 512 << 20
VALUES = (
    0,
    1,
    -1,
    2,
    5,
    255,
    256,
    4096,
    1 << 16,
    (1 << 22) + 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 52,
    None,
    "",
    True,
)


def seeds(world: World) -> list[bytes]:
    """Sound overlays: of nothing, of every operation with a hot prefix, of what does not compress, of a frame
    that was cut, and of many small frames, of which six are hot and refer to each other.
    """
    zero = np.zeros(4096, np.uint8)
    mixed = {0: zero, 1: page(1), 2: page(1), 3: page(1050), 4: page(2001), 70: page(2), 90: page(1)}
    mixed |= {6: near(page(1006))}
    hot = [(Space.RAM, np.array([70, 2], np.uint32))]
    with mock.patch("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", 2):
        touched = [(space, np.array([8, 3, 6, 1, 9, 2], np.uint32)) for space in Space]
        many = world.create(
            {i: page(i % 5 + 1) for i in range(20)}, {i: page(i) for i in range(12)}, hot=touched
        )
    spread = {i: near(page(1000 + i)) if i % 3 else page(i % 4 + 1) for i in range(24)}
    with mock.patch.multiple("cloudlet.overlay.pack", FRAME_BYTES_WRITTEN=150, CUT_PAGES=1):
        cut = world.create(spread, hot=[(Space.RAM, np.arange(9, dtype=np.uint32))])
    return [
        many[0],
        cut[0],
        world.create()[0],
        world.create(mixed, {5: page(4), 6: page(1003), 7: near(page(2007)), 50: page(2)}, hot=hot)[0],
        world.create(dict(enumerate(noise(3))), {9: page(9)})[0],
    ]


class Program:
    """The bytes of an input, read as small numbers; past the end it reads zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def more(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        width = 1 if below <= 256 else 3
        piece = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(piece, "little") % max(below, 1)


def in_any_order(guest: Guest, order: random.Random) -> None:
    """Frames in any order, each with its chunk; now and then somebody waits for a page."""
    numbers = list(range(len(guest.table)))
    order.shuffle(numbers)
    for number in numbers:
        if not order.randrange(3):
            guest.ask(order.choice(tuple(Space)), order.randrange(100))
        while part := guest.arrival.part_of_frame(number):
            guest.take(part)


class Target:
    """The overlays that are damaged, and what sound ones give."""

    def __init__(self) -> None:
        self.world = World()
        self.sound = seeds(self.world)
        self.parsed = [Forged.of(data) for data in self.sound]
        self.runs = self.refused = 0

    def run(self, data: bytes) -> None:
        """One input.

        :raises AssertionError: a sink saw what it must not. Any other error is a defect too.
        """
        self.runs += 1
        program = Program(data)
        which = program.number(len(self.sound))
        damages = (self._anywhere, self._in_frame, self._in_root, self._frames, self._hot_frames)
        bad = damages[program.number(len(damages))](which, program)
        if bad is None:
            return
        whole = self._applied(bad, 1 + program.number(5000))
        self._arrives(bad, whole, Guest.rest)
        self._arrives(bad, whole, lambda guest: in_any_order(guest, random.Random(data)))
        self.refused += whole is None

    def _applied(self, bad: bytes, piece: int) -> Rebuilt | None:
        """What ``apply`` makes of a stream that gives so many bytes at a time; ``None`` if it refuses it."""
        sink = Rebuilt(self.world)
        try:
            apply(unsigned(bad, piece), self.world.base, sink)
        except IntegrityError:
            assert sink.device is None, "finished although refused"
            return None
        for space in Space:
            assert sorted(sink.came[space]) == sorted(sink.announced[space]), "not every page came once"
        verify_only(unsigned(bad))
        return sink

    def _arrives(self, bad: bytes, whole: Rebuilt | None, bring: Callable[[Guest], None]) -> None:
        try:
            with guest_of(self.world, bad) as guest:
                bring(guest)
                # Who fetches parts by their place never sees what stands behind the last.
                assert whole or len(bad) > guest.size, "refused as a stream, but it arrived"
                if whole:
                    guest.check(whole)
        except IntegrityError:
            assert whole is None, "applied as a stream, but refused as it arrived"

    def _anywhere(self, which: int, program: Program) -> bytes:
        bad = bytearray(self.sound[which])
        while program.more() and bad:
            at = program.number(len(bad))
            match program.number(5):
                case 0:
                    bad[at] ^= 1 << program.number(8)
                case 1:
                    bad[at] = program.number(256)
                case 2:
                    del bad[at : at + 1 + program.number(64)]
                case 3:
                    bad[at:at] = bad[: program.number(64)]
                case _:
                    del bad[at:]
        return bytes(bad)

    def _in_frame(self, which: int, program: Program) -> bytes:
        forged = self._copy(which)
        while program.more():
            frame = program.number(len(forged.frames))
            raw = forged.raw(frame)
            for _ in range(1 + program.number(4)):
                at = program.number(min(len(raw), 256)) if program.number(4) else program.number(len(raw))
                raw[at] = program.number(256) if program.number(2) else raw[at] ^ (1 << program.number(8))
            forged.set_raw(frame, raw)
        return forged.data()

    def _frames(self, which: int, program: Program) -> bytes | None:
        forged = self._copy(which)
        frames = forged.frames
        for _ in range(1 + program.number(3)):
            if not frames:
                break
            one, other = program.number(len(frames)), program.number(len(frames))
            match program.number(5):
                case 0:
                    frames[one], frames[other] = frames[other], frames[one]
                case 1:
                    frames.insert(one, frames[other])
                case 2:
                    del frames[one]
                case 3:
                    forged.set_blob(one, frames[other][1])
                case _:
                    cut = bytearray(frames[one][1])
                    cut[program.number(len(cut))] ^= 1 << program.number(8)
                    forged.set_blob(one, bytes(cut))
        return forged.data()

    def _hot_frames(self, which: int, program: Program) -> bytes | None:
        """Hot pages change places in the map's list of their frames."""
        forged = self._copy(which)
        raw = forged.raw(0)
        pages = sum(entry.pages for entry in forged.root.hot_frames)
        names = np.frombuffer(raw, "<u2", offset=len(raw) - 2 * pages)
        for _ in range(1 + program.number(4)):
            if pages:
                pair = [program.number(pages), program.number(pages)]
                names[pair] = names[pair[::-1]]
        forged.set_raw(0, raw)
        return forged.data()

    def _in_root(self, which: int, program: Program) -> bytes | None:
        def edit(root: dict[str, Any]) -> None:
            for _ in range(1 + program.number(2)):
                at: Any = root
                for _ in range(6):
                    keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
                    if not keys:
                        return
                    key = keys[program.number(len(keys))]
                    if isinstance(at[key], dict | list) and program.number(8):
                        at = at[key]
                        continue
                    old = at[key]
                    match program.number(3):
                        case 0 if isinstance(old, int):
                            at[key] = old + program.number(5) - 2
                        case 1:
                            del at[key]
                        case _:
                            at[key] = VALUES[program.number(len(VALUES))]
                    break

        return self._copy(which).data(edit=edit)

    def _copy(self, which: int) -> Forged:
        return Forged(self.parsed[which].root, copy.copy(self.parsed[which].frames))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the overlay reader.")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--program", type=bytes.fromhex, help="run one input, in hex, and stop")
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    target = Target()
    if options.program is not None:
        target.run(options.program)
        return
    seed = (
        options.seed
        if options.seed is not None
        else int.from_bytes(random.SystemRandom().randbytes(4), "little")
    )
    guided = atheris is not None and not options.plain
    print(f"seed {seed}, {options.runs} runs, {'guided by coverage' if guided else 'random'}", flush=True)
    started = time.monotonic()

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            print(f"failed in run {target.runs}: --program {data.hex()}", flush=True)
            raise
        if target.runs == options.runs:
            seconds = time.monotonic() - started
            print(f"{target.runs} runs, {target.refused} refused, 0 failed, {seconds:.0f} s", flush=True)

    if guided:
        arguments = [sys.argv[0], f"-runs={options.runs}", f"-seed={seed}", "-max_len=64", "-verbosity=0"]
        atheris.Setup(arguments, one)
        atheris.Fuzz()
        return
    limit = ROOM_BYTES + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    source = random.Random(seed)
    for _ in range(options.runs):
        one(source.randbytes(source.randint(2, 32)))


if __name__ == "__main__":
    main()
