"""Machines that run before their pages have come: nothing that they are, or become, is any different."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import RunState
from cloudlet.store.bases import Base
from tests.cli.damage import hot_end
from tests.cli.web import Web, serving
from tests.qemu import guest
from tests.qemu.conftest import Warm, settings_in
from tests.qemu.early import (
    ARRIVAL_SECONDS,
    KNOWN,
    Twin,
    check_arrival,
    check_capture,
    image_of,
    read_pieces,
    starting,
    write_on,
)

pytestmark = pytest.mark.qemu

SEED = 20240605
DISK_BYTES = 1 << 20
"""Of the cold part, which begins with the disk's: where a stream stands that is held, no guest waits."""
SKIPPED_BYTES = 64 << 10
"""What a stream reads and throws away rather than asks past (``download.SKIP_BYTES``)."""


@pytest.fixture(scope="module")
def twin(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("twin")
    site = Site.open(settings_in(folder))
    return Twin.make(site, site.bases.get(warm.base_id), warm, folder)


@pytest.mark.parametrize("seed", [SEED, pytest.param(SEED + 1, marks=pytest.mark.slow)])
def test_what_arrives_is_what_an_eager_twin_has(
    seed: int, site: Site, warm: Warm, warm_base: Base, twin: Twin, tmp_path: Path
) -> None:
    print(check_arrival(site, warm_base, warm, twin, seed, tmp_path))


def test_a_capture_waits_for_what_is_missing_and_has_all(
    site: Site, warm_base: Base, ordered: Path, tmp_path: Path
) -> None:
    with serving(ordered.read_bytes()) as web:
        web.hold = hot_end(web.content) + DISK_BYTES
        with starting(site, f"{web.url}/whole") as early:
            # It goes on to write while the rest comes and while it is captured.
            guest.shell(early.instance, write_on(random.Random(SEED)))
            done = threading.Event()

            def capture() -> None:
                check_capture(early, site, warm_base, tmp_path)
                done.set()

            thread = threading.Thread(target=capture)
            thread.start()
            assert web.holding.wait(ARRIVAL_SECONDS)
            assert early.progress().missing > 0
            assert early.instance.state() is RunState.RUNNING, "it is paused only when all is here"
            assert not done.is_set()
            web.go.set()
            early.wait()
            thread.join(ARRIVAL_SECONDS)
            assert done.is_set(), "the capture failed"
            assert early.progress().complete


def test_a_guest_waits_for_its_page_and_for_no_more(
    site: Site, warm: Warm, ordered: Path, twin: Twin
) -> None:
    """The stream stands still; what the guest touches is fetched beside it, and only that."""
    with serving(ordered.read_bytes()) as web:
        web.hold = hot_end(web.content) + DISK_BYTES
        with starting(site, f"{web.url}/whole") as early:
            assert web.holding.wait(ARRIVAL_SECONDS)
            wanted = [KNOWN["/run/known"] - 1, KNOWN["/run/known"] // 2]
            found = guest.shell(early.instance, read_pieces("/run/known", wanted), ARRIVAL_SECONDS).split()
            assert found == [twin.pieces["/run/known"][number] for number in wanted]
            paging = early.progress()
            assert paging.stalls > 0
            assert paging.missing > 0
            assert not early.arrived.is_set()
            web.go.set()
            early.wait()
            assert early.progress().missing == 0


def test_a_stream_that_stands_still_is_not_waited_for(site: Site, warm: Warm, ordered: Path) -> None:
    """The guest reads what the stream is about to bring, too, and the stream brings nothing."""
    with serving(ordered.read_bytes()) as web:
        web.hold = (hot_end(web.content) + len(web.content)) // 2
        with starting(site, f"{web.url}/whole") as early:
            assert web.holding.wait(ARRIVAL_SECONDS)
            found = guest.shell(early.instance, "sha256sum < /run/known", ARRIVAL_SECONDS)
            assert found.split()[0] == warm.in_memory
            assert not web.go.is_set()
            web.go.set()
            early.wait()


def test_what_is_fetched_is_not_sent_again(site: Site, ordered: Path, twin: Twin) -> None:
    rng = random.Random(SEED)
    with serving(ordered.read_bytes()) as web:
        web.rate = 6e6
        with starting(site, f"{web.url}/whole") as early:
            for path, count in KNOWN.items():
                wanted = rng.sample(range(count), 4)
                found = guest.shell(early.instance, read_pieces(path, wanted), ARRIVAL_SECONDS).split()
                assert found == [twin.pieces[path][number] for number in wanted]
            early.wait()
        assert len(_fetched(web)) > 1, "nothing was fetched out of turn"
        assert web.sent_twice() <= SKIPPED_BYTES * len(web.answers)


def test_what_a_guest_waited_for_is_fetched_early_the_next_time(site: Site, ordered: Path) -> None:
    last = [KNOWN["/run/known"] - 1]
    fetched = []
    for turn in range(2):
        with serving(ordered.read_bytes()) as web:
            web.hold = hot_end(web.content) + DISK_BYTES
            with starting(site, f"{web.url}/whole") as early:
                if turn == 0:
                    guest.shell(early.instance, read_pieces("/run/known", last), ARRIVAL_SECONDS)
                else:
                    # Nobody has asked for anything: it is what was learned.
                    assert web.wait_asked(set(fetched[0]), ARRIVAL_SECONDS)
                web.go.set()
                early.wait()
            fetched.append(_fetched(web))
    assert fetched[0]
    assert set(fetched[0]) <= set(fetched[1])


def test_ready_waits_for_all_that_is_hot(site: Site, ordered: Path) -> None:
    with serving(ordered.read_bytes()) as web:
        web.hold = hot_end(web.content) - 1
        with (
            pytest.raises(FailedError, match="does not come"),
            starting(site, f"{web.url}/whole", start=Start.READY, patience=2.0),
        ):
            raise AssertionError("it runs without its last hot frame")
        web.go.set()
        with starting(site, f"{web.url}/whole", start=Start.READY) as early:
            early.wait()


def test_two_of_one_app_arrive_at_once(site: Site, warm: Warm, ordered: Path) -> None:
    """Both leave an image, and there is one."""
    with starting(site, str(ordered)) as one, starting(site, str(ordered)) as other:
        for early in (one, other):
            early.wait()
            assert guest.shell(early.instance, "sha256sum < /run/known").split()[0] == warm.in_memory
        assert [image.path for image in site.images.all()] == [image_of(site, one.made)]


def _fetched(web: Web) -> list[str]:
    """The ranges that were asked for to their ends, which a stream does not."""
    return [wanted for wanted in web.ranges() if wanted and not wanted.endswith("-")]
