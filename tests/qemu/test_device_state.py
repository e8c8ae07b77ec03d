"""Device state: only the base's sections, a wrong one refused before QEMU sees it, a forged one contained.

``CLOUDLET_FUZZ_STATES`` says how many damaged states are tried; a failure names the seed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from cloudlet.control.readiness import wait_ready
from cloudlet.control.site import Site
from cloudlet.errors import CorruptError, FailedError, IntegrityError, MismatchError
from cloudlet.hypervisor.driver import RunState
from cloudlet.hypervisor.qemu.incoming import QemuIncoming
from cloudlet.hypervisor.records import processes_of
from cloudlet.model import Readiness
from cloudlet.store.bases import Base
from tests.qemu import guest
from tests.qemu.conftest import Warm
from tests.qemu.device_states import Section, put_together, take_apart, with_flips, with_garbage

pytestmark = pytest.mark.qemu

_AGENT = Readiness.parse("agent")
_STATES = int(os.environ.get("CLOUDLET_FUZZ_STATES", "30"))
_LOADED, _READY = 10.0, 1.5
"""Seconds that QEMU has to load a damaged state, and that the guest then has to answer."""


@pytest.fixture
def sections(quick_base: Base) -> list[Section]:
    image = quick_base.image()
    return take_apart(image.device_state.read_bytes(), image.sections)


def test_a_state_holds_the_sections_of_the_base_and_no_back_end(warm: Warm, warm_base: Base) -> None:
    assert warm.capture.sections == warm_base.image().sections
    names = [entry.name for entry in warm.capture.sections]
    assert "vmgenid" in names
    assert [name for name in names if "slirp" in name or name == "ram"] == []
    assert len(set(warm.capture.sections)) == len(names)
    # What the program found by its frames is what is there when looked for by name.
    take_apart(warm.capture.device_state, warm.capture.sections)


def _renamed(sections: list[Section]) -> list[Section]:
    return [replace(one, name=b"slirp") if one.name == b"vmgenid" else one for one in sections]


def _other_version(sections: list[Section]) -> list[Section]:
    return [replace(one, version=one.version + 1) if one.name == b"apic" else one for one in sections]


def _other_instance(sections: list[Section]) -> list[Section]:
    return [replace(one, instance=7) if one.name == b"cpu" else one for one in sections]


def _dropped(sections: list[Section]) -> list[Section]:
    return [one for one in sections if one.name != b"vmgenid"]


def _last_dropped(sections: list[Section]) -> list[Section]:
    return sections[:-1]


def _added(sections: list[Section]) -> list[Section]:
    return [*sections, Section(999, b"slirp", 0, 4, bytes(100))]


def _twice(sections: list[Section]) -> list[Section]:
    return [*sections, sections[-1]]


@pytest.mark.parametrize(
    "change",
    [_renamed, _other_version, _other_instance, _dropped, _last_dropped, _added, _twice],
)
def test_the_state_of_another_machine_is_refused_before_qemu_sees_it(
    site: Site, quick_base: Base, sections: list[Section], change: Callable[[list[Section]], list[Section]]
) -> None:
    with guest.incoming(site, quick_base) as waiting:
        guest.begin_with_nothing(waiting)
        with pytest.raises(MismatchError, match=r"(has|lacks) device section .*, which the base has"):
            waiting.finish(put_together(change(sections)))
        assert waiting.instance.state() is RunState.INCOMING, "QEMU still waits"
        assert "migration failed" not in waiting.instance.last_words()
        assert waiting.instance.cpu_seconds() < 5.0


@pytest.mark.parametrize("cut", ["nothing", "half", "without its end", "longer"])
def test_bytes_that_are_no_state_are_refused_before_qemu_sees_them(
    site: Site, quick_base: Base, cut: str
) -> None:
    whole = quick_base.image().device_state.read_bytes()
    states = {
        "nothing": b"",
        "half": whole[: len(whole) // 2],
        "without its end": whole[:-1],
        "longer": whole + b"\x04more",
    }
    with guest.incoming(site, quick_base) as waiting:
        guest.begin_with_nothing(waiting)
        with pytest.raises(CorruptError):
            waiting.finish(states[cut])
        assert waiting.instance.state() is RunState.INCOMING


@pytest.mark.slow
def test_noise_within_right_frames_is_one_clean_error_or_a_machine_that_ends(
    site: Site, quick_base: Base, sections: list[Section]
) -> None:
    outcomes = Counter(
        outcome(site, quick_base, put_together(with_garbage(sections, index, seed=index)), one.name.decode())
        for index, one in enumerate(sections)
    )
    assert outcomes["refused"] >= 10, f"QEMU takes any noise: {outcomes}"


def test_damaged_states_are_clean_errors_or_machines_that_end(
    site: Site, quick_base: Base, sections: list[Section]
) -> None:
    first = random.SystemRandom().randrange(1 << 32) if _STATES > 30 else 0
    for seed in range(first, first + _STATES):
        changed, told = with_flips(sections, seed)
        outcome(site, quick_base, put_together(changed), f"seed {seed}: {told}")


def test_after_all_that_a_good_state_still_runs(site: Site, quick_base: Base) -> None:
    with guest.resumed(site, quick_base) as instance:
        assert guest.shell(instance, "echo alive") == "alive"
    site.bases.verify(quick_base)


def test_a_qemu_that_does_not_load_is_given_up_in_time(site: Site, quick_base: Base) -> None:
    with guest.incoming(site, quick_base) as waiting:
        guest.begin_with_nothing(waiting)
        waiting.stream.patience = 0.5
        process = waiting.instance.record.machine
        assert process
        with stopped(process.pid):
            began = time.monotonic()
            with pytest.raises(FailedError, match=r"did not load|takes no memory"):
                waiting.finish(quick_base.image().device_state.read_bytes())
            assert time.monotonic() - began < 5.0
            waiting.abort()
        assert not process.alive()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not move, like one whose disk or memory does not answer."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def outcome(site: Site, base: Base, state: bytes, told: str) -> str:
    """Try a state; what became of it. Whatever that is, it took bounded time and left nothing."""
    began = time.monotonic()
    with guest.incoming(site, base) as waiting:
        waiting.stream.patience = _LOADED
        guest.begin_with_nothing(waiting)
        became = _load(waiting, state)
        folder, processes = waiting.instance.directory, processes_of(waiting.instance.directory)
    seconds = time.monotonic() - began
    assert seconds < _LOADED + _READY + 10.0, f"{told}: {became} after {seconds:.1f} s"
    assert not folder.exists(), told
    assert [process for process in processes if process.alive()] == [], told
    return became


def _load(waiting: QemuIncoming, state: bytes) -> str:
    try:
        waiting.finish(state)
    except IntegrityError:
        return "not well formed"
    except FailedError:
        return "refused"
    try:
        wait_ready(waiting.instance, _AGENT, _READY)
    except FailedError:
        refused = "load of migration failed" in waiting.instance.last_words()
        assert not refused, "QEMU refused it, and it was called running"
        return "hangs"
    return "runs"
