"""Early starts in large numbers: what arrives is what an eager twin has, and what is cut leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cloudlet.control.site import Site
from cloudlet.errors import CloudletError
from tests.cli.conftest import EARLY_RECIPE, write_recipe
from tests.cli.damage import hot_end
from tests.cli.moments import RUN_SECONDS, create_arguments, killed, told_to_end
from tests.cli.web import serving
from tests.qemu.conftest import make_warm
from tests.qemu.early import Twin, check_arrival, check_captures

if TYPE_CHECKING:
    from tests.soak.__main__ import Soak


def early_starts(soak: Soak) -> None:
    """Guests of the warm overlay, each with other dice."""
    site = Site.open(soak.settings)
    base = site.bases.get(soak.base_id)
    folders = {name: soak.folder / name for name in ("warm", "twin", "arrivals")}
    for folder in folders.values():
        folder.mkdir()
    warm = make_warm(site, soak.base_id, folders["warm"])
    soak.about = f" That of guests that are compared has {warm.overlay.stat().st_size:,} bytes."
    twin = Twin.make(site, base, warm, folders["twin"])

    def each(check: Callable[[int], str], name: str) -> Callable[[int], Iterator[str]]:
        def tries(count: int) -> Iterator[str]:
            rng = soak.dice(name)
            for _ in range(count):
                seed = rng.randrange(1 << 32)
                try:
                    print(f"  {seed}: {check(seed)}", flush=True)
                except (AssertionError, CloudletError) as problem:
                    yield f"seed {seed}: {problem}"
                for path in folders["arrivals"].iterdir():
                    path.unlink()

        return tries

    def arrival(seed: int) -> str:
        return check_arrival(site, base, warm, twin, seed, folders["arrivals"])

    def captures(seed: int) -> str:
        return check_captures(site, base, warm, seed, folders["arrivals"])

    expected = "RAM, disk and files of its eager twin"
    soak.row("guest that runs while its pages arrive", expected, 50, each(arrival, "arrivals"))
    expected = "the memory and the disk that QEMU has, on every page"
    soak.row("capture of such a guest, and of one from its image", expected, 20, each(captures, "captures"))


def cut_early_starts(soak: Soak) -> None:
    """``cloudlet run`` that is killed or told to end while pages are missing."""
    recipe, overlay = soak.folder / "early", soak.folder / "early.overlay"
    write_recipe(recipe, EARLY_RECIPE)
    done = soak.cloudlet("-q", *create_arguments(soak.base_id, recipe, overlay))
    if done.status:
        raise SystemExit(done.err)

    def cuts(name: str, cut: Callable[[list[str | Path]], Iterator[str]]) -> Callable[[int], Iterator[str]]:
        def tries(count: int) -> Iterator[str]:
            rng = soak.dice(name)
            for _ in range(count):
                with serving(overlay.read_bytes()) as web:
                    if rng.random() < 0.5:
                        web.hold = hot_end(web.content) + rng.randrange(1 << 20)
                    else:
                        web.rate = rng.uniform(1e6, 8e6)
                    yield from cut(["run", f"{web.url}/whole", "--start", "hot"])
                soak.cloudlet("image", "delete", "early")

        return tries

    rng = soak.dice("moments of early starts")

    def kill(arguments: list[str | Path]) -> Iterator[str]:
        delay = rng.uniform(0.3, RUN_SECONDS)
        if left := killed(soak.cloudlet, arguments, delay):
            yield f"killed after {delay:.3f} s: left {left}"

    def tell(arguments: list[str | Path]) -> Iterator[str]:
        done = told_to_end(soak.cloudlet, arguments, RUN_SECONDS, rng, soak.output)
        if not done.clean:
            yield str(done)

    soak.row("early `run` killed", "nothing left after `cloudlet ps`", 50, cuts("early killed", kill))
    expected = "exit 130 within 10 s, nothing left, no traceback"
    soak.row("early `run` told to end", expected, 50, cuts("early told", tell))
