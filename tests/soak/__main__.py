"""The faults of ``tests/cli`` in large numbers: ``python -m tests.soak``.

It makes a site of its own in a temporary folder, prints its seed (``--seed`` throws the same dice again:
the same signals at the same moments, the same places in an overlay of the same size), and writes what
came of it to ``docs/results/soak-main.md``, of each other part to a page of its own; ``--only`` makes one of
them. The exit code is 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cloudlet.settings import Settings
from tests.cli.conftest import command_line, write_recipe
from tests.cli.damage import KINDS, attempt, flipped, flips, signer
from tests.cli.moments import (
    CREATE_SECONDS,
    IMPORT_SECONDS,
    RUN_SECONDS,
    create_arguments,
    import_arguments,
    killed,
    told_to_end,
)
from tests.cli.traces import running, traces
from tests.conftest import KEPT, CommandLine
from tests.images.build import TestImage, build
from tests.soak.bridge import there_and_back
from tests.soak.early import cut_early_starts, early_starts
from tests.soak.handoff import early_fault_matrix, fault_matrix, model
from tests.soak.service import explored, killed_steps, killed_under_load, many_instances, real_instances

FUZZER = Path(__file__).parents[1] / "fuzz" / "fuzz_overlay.py"
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass
class Row:
    """One kind of fault: how often it was tried, and what was not as it should be."""

    name: str
    expected: str
    tries: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Soak:
    """The site, its overlay, and the dice."""

    cloudlet: CommandLine
    folder: Path
    image: TestImage
    seed: int
    scale: float
    base_id: str = ""
    rows: list[Row] = field(default_factory=list)
    about: str = ""
    """What else there is to say of the overlays."""

    @property
    def settings(self) -> Settings:
        return self.cloudlet.settings

    @property
    def overlay(self) -> Path:
        return self.folder / "hello.overlay"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe"

    @property
    def output(self) -> Path:
        """Where commands that are cut write to."""
        return self.folder / "output"

    def set_up(self) -> None:
        write_recipe(self.recipe)
        self.output.mkdir()
        for command in (
            ["key", "create"],
            import_arguments(self.image),
            create_arguments("imported", self.recipe, self.overlay),
        ):
            done = self.cloudlet("-q", *command)
            if done.status:
                raise SystemExit(f"{command}: {done.err}")
        (base,) = self.settings.bases_dir.glob("*/base.json")
        self.base_id = base.parent.name

    def row(self, name: str, expected: str, count: int, problems: Callable[[int], Iterator[str]]) -> None:
        """Try something ``count`` times (by the scale), tell of each problem at once."""
        row = Row(name, expected, max(1, round(count * self.scale)))
        began = time.monotonic()
        for problem in problems(row.tries):
            row.problems.append(problem)
            print(f"  {problem}", flush=True)
        row.seconds = time.monotonic() - began
        self.rows.append(row)
        print(f"{name}: {row.tries}, problems: {len(row.problems)}, {row.seconds:.0f} s", flush=True)

    def dice(self, name: str) -> random.Random:
        """Dice that do not depend on what was thrown before."""
        return random.Random(f"{self.seed} {name}")


def damaged_overlays(soak: Soak) -> None:
    whole = soak.overlay.read_bytes()
    damaged = soak.folder / "damaged"

    def refused(data: bytes, what: str, status: int = 7) -> Iterator[str]:
        damaged.write_bytes(data)
        found, said = attempt(soak.settings, damaged)
        if found != status or "\n" in said:
            yield f"{what}: {found}, {said!r}"
        if left := traces(soak.settings, soak.output):
            yield f"{what}: left {left}"

    def bits(count: int) -> Iterator[str]:
        for at, bit in flips(whole, count, soak.seed):
            yield from refused(flipped(whole, at, bit), f"bit {bit} of byte {at}")

    def cuts(count: int) -> Iterator[str]:
        rng = soak.dice("cuts")
        for _ in range(count):
            length = rng.randrange(len(whole))
            yield from refused(whole[:length], f"{length} bytes")

    def kinds(count: int) -> Iterator[str]:
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            yield from refused(kind.make(whole, signer(soak.settings)), kind.name, kind.status)

    soak.row("overlay with a flipped bit", "exit 7, nothing left", 200, bits)
    soak.row("overlay cut anywhere", "exit 7, nothing left", 100, cuts)
    soak.row("overlay forged", "exit 7 (base missing: 3), nothing left", len(KINDS), kinds)


def damaged_exports(soak: Soak) -> None:
    exported = soak.folder / "imported.base"
    assert soak.cloudlet("-q", "base", "export", "imported", "-o", exported).status == 0
    whole = exported.read_bytes()
    elsewhere = command_line(
        Settings(
            cache_dir=soak.folder / "elsewhere",
            state_dir=soak.settings.state_dir,
            keys_dir=soak.settings.keys_dir,
            accelerator="tcg",
        )
    )

    def bits(count: int) -> Iterator[str]:
        rng = soak.dice("exports")
        for number in range(count):
            # Behind the magic: a file that begins with other bytes is a disk image.
            at, bit = rng.randrange(8, len(whole) if number % 4 else 4000), rng.randrange(8)
            exported.write_bytes(flipped(whole, at, bit))
            done = elsewhere("base", "import", exported)
            if done.status != 7 or len(done.err.splitlines()) != 1:
                yield f"bit {bit} of byte {at}: {done}"
            if left := traces(elsewhere.settings):
                yield f"bit {bit} of byte {at}: left {left}"

    soak.row("exported base with a flipped bit", "exit 7, nothing left", 50, bits)
    exported.unlink()


def fuzzed_reader(soak: Soak) -> None:
    def runs(count: int) -> Iterator[str]:
        seed = soak.dice("fuzz").randrange(1 << 32)
        command = [sys.executable, str(FUZZER), "--plain", "--runs", str(count), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or f"{count} runs" not in done.stdout.splitlines()[-1]:
            yield f"seed {seed}: {(done.stdout + done.stderr)[-400:]}"

    soak.row("overlay reader fuzzed", "clean error or the right pages, memory bounded", 100_000, runs)


def killed_commands(soak: Soak) -> None:
    def kills(arguments: list[str | Path], longest: float, name: str) -> Callable[[int], Iterator[str]]:
        def tries(count: int) -> Iterator[str]:
            rng = soak.dice(name)
            for _ in range(count):
                delay = rng.uniform(0, longest)
                if left := killed(soak.cloudlet, arguments, delay):
                    yield f"{name} killed after {delay:.3f} s: left {left}"
                if half := [path for path in soak.output.iterdir() if path.name != "x.overlay"]:
                    yield f"{name} killed after {delay:.3f} s: wrote {half}"

        return tries

    def beside(count: int) -> Iterator[str]:
        rng = soak.dice("beside")
        with running(soak.cloudlet, soak.overlay) as other:
            for _ in range(count):
                delay = rng.uniform(0.5, RUN_SECONDS)
                left = killed(soak.cloudlet, ["run", soak.overlay], delay)
                if [trace for trace in left if trace.startswith("/")] != [str(other.folder)] or len(
                    left
                ) != 3:
                    yield f"killed after {delay:.3f} s beside another: {left}"
                with urllib.request.urlopen(other.url, timeout=10) as answer:
                    if answer.status != 200:
                        yield f"the other machine answers with {answer.status}"

    expected = "nothing left after `cloudlet ps`"
    create = create_arguments(soak.base_id, soak.recipe, soak.output / "x.overlay")
    soak.row("`run` killed", expected, 50, kills(["run", soak.overlay], RUN_SECONDS, "run"))
    soak.row("`run` killed beside another machine", "the other untouched", 20, beside)
    soak.row("`overlay create` killed", expected, 20, kills(create, CREATE_SECONDS, "create"))
    soak.row("`base import` killed", expected, 10, kills(another_base(soak), IMPORT_SECONDS, "import"))


def interrupted_commands(soak: Soak) -> None:
    def ends(arguments: list[str | Path], longest: float, name: str) -> Callable[[int], Iterator[str]]:
        def tries(count: int) -> Iterator[str]:
            rng = soak.dice(f"end {name}")
            for _ in range(count):
                done = told_to_end(soak.cloudlet, arguments, longest, rng, soak.output)
                # Who is told to end when all is done has done it.
                if not done.clean and (done.status or done.traces):
                    yield f"{name} {done}"

        return tries

    expected = "exit 130 within 10 s, nothing left, no traceback"
    create = create_arguments(soak.base_id, soak.recipe, soak.output / "x.overlay")
    soak.row("`run` told to end", expected, 50, ends(["run", soak.overlay], RUN_SECONDS, "run"))
    soak.row("`overlay create` told to end", expected, 30, ends(create, CREATE_SECONDS, "create"))
    soak.row("`base import` told to end", expected, 12, ends(another_base(soak), IMPORT_SECONDS, "import"))


def another_base(soak: Soak) -> list[str | Path]:
    return [*import_arguments(soak.image), "--cpus", "2"]


def slow_tests(soak: Soak) -> None:
    """The tests that take long: whole distributions, imported, changed and rebooted; second servers."""

    def tries(count: int) -> Iterator[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow"]
        done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            yield done.stdout[-2000:]

    soak.row(
        "the tests that take long: images of others, a Debian base, second servers",
        "as the tests say",
        1,
        tries,
    )


PARTS: dict[str, tuple[Callable[[Soak], None], ...]] = {
    "bases": (slow_tests,),
    "main": (damaged_overlays, damaged_exports, fuzzed_reader, killed_commands, interrupted_commands),
    "early": (early_starts, cut_early_starts),
    "service": (killed_steps, killed_under_load, many_instances, real_instances, explored),
    "handoff": (fault_matrix,),
    "switch": (early_fault_matrix,),
    "model": (model,),
    "bridge": (there_and_back,),
}
TITLES = {
    "bases": "Images of others, and what else takes long",
    "main": "Faults in large numbers",
    "early": "Early starts in large numbers",
    "service": "A site that serves, in large numbers",
    "handoff": "Hand-offs with everything that fails",
    "switch": "Early switches with everything that fails",
    "model": "Hand-offs of the model",
    "bridge": "Hand-offs there and back",
}


def report(soak: Soak, part: str, rows: list[Row], seconds: float) -> str:
    """The results of a part as a page."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    lines = [
        f"# {TITLES[part]}",
        "",
        f"Made by `python -m tests.soak --only {part} --seed {soak.seed} --scale {soak.scale:g}` on "
        f"{datetime.now(UTC):%Y-%m-%d}, in {seconds / 60:.0f} minutes, with "
        f"QEMU {qemu.stdout.split()[3]}, Python "
        f"{platform.python_version()} and Linux {platform.release().partition('-')[0]}. "
        f"The guest is the tests' quick guest under TCG; its overlay has "
        f"{soak.overlay.stat().st_size:,} bytes.{soak.about}",
        "",
        "| fault | expected | tried | not so | seconds |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {row.name} | {row.expected} | {row.tries} | {len(row.problems)} | {row.seconds:.0f} |"
            for row in rows
        ),
        "",
    ]
    if problems := [problem for row in rows for problem in row.problems]:
        lines += ["What was not as expected:", "", *(f"- `{problem}`" for problem in problems), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual counts")
    parser.add_argument("--only", choices=list(PARTS), help="make this part of it")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="the folder to write pages to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"seed {options.seed}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (KEPT / "images").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cloudlet-soak-") as temporary:
        folder = Path(temporary)
        settings = Settings(
            cache_dir=folder / "cache",
            state_dir=folder / "state",
            keys_dir=folder / "keys",
            accelerator="tcg",
        )
        image = build("quick", KEPT / "images")
        soak = Soak(command_line(settings), folder, image, options.seed, options.scale)
        try:
            soak.set_up()
            for part in [options.only] if options.only else PARTS:
                began, before = time.monotonic(), len(soak.rows)
                for faults in PARTS[part]:
                    faults(soak)
                page = report(soak, part, soak.rows[before:], time.monotonic() - began)
                (options.output / f"soak-{part}.md").write_text(page)
                print(page)
        finally:
            soak.cloudlet("ps")  # removes what is left of what was killed, before its folder goes
    return int(any(row.problems for row in soak.rows))


if __name__ == "__main__":
    sys.exit(main())
